/* Who advances the pager, and who waits for it.
 *
 * In real time one transfer thread sleeps until somebody rings the bell (the device, the disks, the engine), and then
 * pumps until nothing can advance. With a virtual clock there is no thread: a ring puts a pump among the clock's events
 * at the present time, so that pumps never nest in a device's or a disk's own event, and whoever waits advances the
 * clock.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"
#include "base/thread.h"
#include "base/units.h"

#include <signal.h>
#include <stdatomic.h>

uint64_t pager_now_ns(const flap_pager *pager) {
  return pager->clock ? flap_clock_now_ns(pager->clock) : flap_units_now_ns();
}

/* ---- the pump ----------------------------------------------------------------------------------------- */

static void flush(flap_pager *pager) {
  if (pager->submitted)
    flap_block_flush(pager->block);
  pager->submitted = false;
}

static void entered(flap_pager *pager) {
  if (atomic_fetch_sub(&pager->wanted, 1) == 1)
    pthread_cond_signal(&pager->let_in);
}

void pager_enter(flap_pager *pager) {
  if (pager->clock == NULL)
    atomic_fetch_add(&pager->wanted, 1);
  pager_lock(pager);
  if (pager->clock == NULL)
    entered(pager);
}

/* A mutex that is given back and taken again at once goes to the thread that never slept: so this one sleeps. True:
 * somebody came, and what stood still may go on. */
static bool let_others_in(flap_pager *pager) {
  bool came = false;
  for (; !pager->clock && atomic_load(&pager->wanted) > 0; came = true)
    pthread_cond_wait(&pager->let_in, &pager->lock);
  return came;
}

/* What others have ended. */
static bool collect(flap_pager *pager) {
  bool progress = pager_lane_retire(pager, &pager->h2d);
  progress |= pager_lane_retire(pager, &pager->d2h);
  progress |= pager_disk_poll(pager);
  progress |= pager_jobs_collect(pager);
  return progress;
}

/* What can begin. What frees something comes before what needs it; but checks, which take long, come last. True: they
 * went on, and something before them may be free. `progress_io`: anything moved. */
static bool begin(flap_pager *pager, bool *progress_io) {
  *progress_io |= pager_rings_release(pager);
  *progress_io |= pager_loans_open(pager);
  *progress_io |= pager_snapshot_issue(pager);
  *progress_io |= pager_stores_issue(pager);
  *progress_io |= pager_jobs_start(pager);
  *progress_io |= pager_rings_assign(pager);
  *progress_io |= pager_loads_issue(pager);
  *progress_io |= pager_loads_read_ahead(pager);
  *progress_io |= pager_writes_issue(pager);
  flush(pager);
  pager_wait_look(pager);
  const bool checked = pager_checks_advance(pager);
  *progress_io |= checked;
  return checked;
}

/* For tests, behind a pump, which has not given the lock away since it last looked: nothing that can begin is left.
 * What waits for events is left out, for these may end in between. */
static bool has_begun_all(flap_pager *pager) {
  if (!pager_full_checks || pager->error != FLAP_OK)
    return true;
  return !pager_snapshot_issue(pager) && !pager_stores_issue(pager) && !pager_jobs_start(pager) &&
         !pager_rings_assign(pager) && !pager_loads_issue(pager) && !pager_loads_read_ahead(pager) &&
         !pager_writes_issue(pager);
}

/* After a failure only what is under way is collected. */
void pager_pump(flap_pager *pager) {
  bool again = true;
  if (pager->clock)
    pager->rung = false;
  for (bool progress; (progress = collect(pager)) || again;) {
    again = pager->error == FLAP_OK && begin(pager, &progress);
    if (progress) /* a pump that moves nothing is over at once */
      again |= let_others_in(pager) && pager->error == FLAP_OK;
  }
  flush(pager);
  flap_assert(has_begun_all(pager));
  pager_assert_state(pager);
  pager_wait_look(pager);
}

static void *transfer_thread(void *context) {
  flap_thread_prefer_latency();
  flap_pager *pager = context;
  for (;;) {
    pthread_mutex_lock(&pager->bell_lock);
    while (!pager->rung && !pager->stop)
      pthread_cond_wait(&pager->bell, &pager->bell_lock);
    pager->rung = false;
    bool stop = pager->stop;
    pthread_mutex_unlock(&pager->bell_lock);
    if (stop)
      return NULL;
    pager_lock(pager);
    pager_pump(pager);
    pager_leave(pager);
  }
}

/* With a clock: only after a ring, for without one there is nothing to advance. */
static void pump_if_rung(flap_pager *pager) {
  if (pager->rung)
    pager_pump(pager);
}

static void pump_event(void *context) {
  flap_pager *pager = context;
  pager->pump_scheduled = false;
  pager_lock(pager);
  pump_if_rung(pager);
  pager_leave(pager);
}

void pager_ring_bell(void *context) {
  flap_pager *pager = context;
  if (pager->clock) {
    pager->rung = true;
    if (pager->pump_scheduled || pager->closing)
      return;
    pager->pump_scheduled = true;
    flap_clock_schedule(pager->clock, flap_clock_now_ns(pager->clock), pump_event, pager);
    return;
  }
  pthread_mutex_lock(&pager->bell_lock);
  if (!pager->rung)
    pthread_cond_signal(&pager->bell);
  pager->rung = true;
  pthread_mutex_unlock(&pager->bell_lock);
}

/* Signals are for the threads of the program. */
flap_status pager_thread_start(flap_pager *pager) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(&pager->thread, NULL, transfer_thread, pager);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) {
    (void)flap_error_set_os(error, "pager: cannot start the transfer thread");
    return FLAP_NO_MEMORY;
  }
  pager->thread_started = true;
  return FLAP_OK;
}

void pager_thread_stop(flap_pager *pager) {
  if (!pager->thread_started)
    return;
  pthread_mutex_lock(&pager->bell_lock);
  pager->stop = true;
  pthread_cond_signal(&pager->bell);
  pthread_mutex_unlock(&pager->bell_lock);
  pthread_join(pager->thread, NULL);
  pager->thread_started = false;
}

/* ---- waiting ------------------------------------------------------------------------------------------ */

bool pager_is_idle(flap_pager *pager, uint32_t unused) {
  (void)unused;
  return pager->jobs_done == pager->jobs_queued && pager->loading.count == 0 && pager->released.count == 0 &&
         pager->storing.count == 0 && pager->h2d.issued == pager->h2d.retired &&
         pager->d2h.issued == pager->d2h.retired && pager->read_free == pager->read_buffers &&
         pager->write_free == pager->write_buffers;
}

void pager_stalled(flap_pager *pager, flap_lane lane, uint64_t since_ns, uint64_t now_ns) {
  if (pager->counts_no_stalls)
    return;
  const uint64_t idle_ns = flap_device_idle_since_ns(pager->device);
  const uint64_t from_ns = idle_ns > since_ns ? idle_ns : since_ns;
  if (from_ns >= now_ns)
    return;
  pager->stats.stall_ns[lane] += now_ns - from_ns;
  pager->stats.stalled_until = now_ns;
}

static void look_at(flap_pager *pager, pager_wait *wait, pthread_cond_t *wake) {
  if (!wait->ready)
    return;
  bool over = pager->error != FLAP_OK || wait->ready(pager, wait->argument);
  if (wait->is_pin && !pager->counts_no_stalls) {
    const uint64_t now_ns = pager_now_ns(pager);
    if (wait->lane < FLAP_LANE_COUNT)
      pager_stalled(pager, wait->lane, wait->since_ns, now_ns);
    wait->since_ns = now_ns;
    wait->lane = over ? FLAP_LANE_COUNT : pager_waits_for(pager, wait->argument);
  }
  if (!over)
    return;
  wait->ready = NULL;
  if (!wait->sleeping)
    return;
  wait->sleeping = false;
  atomic_fetch_add(&pager->wanted, 1); /* it gets the lock back before the next round */
  pthread_cond_signal(wake);
}

void pager_wait_look(flap_pager *pager) {
  look_at(pager, &pager->wait, &pager->engine_wake);
  look_at(pager, &pager->drain_wait, &pager->drain_wake);
}

static void wait_on_clock(flap_pager *pager) {
  pager_pump(pager);
  while (pager->wait.ready) {
    /* Events pump too. */
    pager_leave(pager);
    bool advanced = flap_clock_advance(pager->clock);
    pager_lock(pager);
    if (!advanced)
      pager_mistake(pager, "deadlock: somebody waits, and no event is left that could end it");
    pump_if_rung(pager);
  }
}

void pager_wait_until(flap_pager *pager, pager_ready_fn ready, uint32_t argument, bool is_pin) {
  pager->wait = (pager_wait){
      .ready = ready, .argument = argument, .is_pin = is_pin, .lane = FLAP_LANE_COUNT, .since_ns = pager_now_ns(pager)};
  look_at(pager, &pager->wait, &pager->engine_wake);
  if (!pager->wait.ready)
    return;
  if (is_pin)
    flap_device_expect_rest(pager->device);
  if (pager->clock) {
    wait_on_clock(pager);
    return;
  }
  pager->wait.sleeping = true;
  while (pager->wait.ready)
    pthread_cond_wait(&pager->engine_wake, &pager->lock);
  entered(pager);
}

void pager_wait_to_drain(flap_pager *pager, pager_ready_fn ready, uint32_t argument) {
  flap_assert(!pager->clock && !pager->drain_wait.ready);
  pager->drain_wait = (pager_wait){.ready = ready, .argument = argument, .lane = FLAP_LANE_COUNT};
  look_at(pager, &pager->drain_wait, &pager->drain_wake);
  if (!pager->drain_wait.ready)
    return;
  pager->drain_wait.sleeping = true;
  while (pager->drain_wait.ready)
    pthread_cond_wait(&pager->drain_wake, &pager->lock);
  entered(pager);
}
