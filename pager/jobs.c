/* Jobs: work of the host's cores on regions that live in RAM.
 *
 * A job stands in the program's list of leases like any other use of its regions, so what was changed before it is home
 * when it begins, and what comes behind it sees what it changed. Jobs run in their order, one at a time. In real time a
 * thread of their own runs them, and goes from one to the next without the pager's lock; with a virtual clock the end
 * of each is an event.
 *
 *   queued ──pager_jobs_start──► started ──job_thread──► run ──pager_jobs_collect──► done
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#include <signal.h>
#include <stdatomic.h>

static pager_job *job_at(const flap_pager *pager, uint64_t number) {
  return &pager->jobs[number % pager->jobs_room];
}

static const flap_lease *lease_of(const flap_pager *pager, const pager_job *job, uint32_t i, uint32_t *index_out) {
  uint32_t number;
  *index_out = job->first_lease + i;
  return &pager_program_of(pager, *index_out, &number)->leases[number];
}

/* If not, its stores are told who waits. */
static bool is_home(const flap_pager *pager, pager_region *region, uint64_t order) {
  const pager_page *page = pager_pages_of(pager, region);
  for (uint32_t i = 0; i < region->page_count; i++)
    if (page[i].stores_left > 0) {
      if (order < region->wanted)
        region->wanted = order;
      return false;
    }
  region->wanted = UINT64_MAX;
  return true;
}

/* Changes of jobs that were started before count as over: it runs behind them. */
static bool is_ready(flap_pager *pager, const pager_job *job) {
  for (uint32_t i = 0; i < job->count; i++) {
    uint32_t index;
    const flap_lease *what = lease_of(pager, job, i, &index);
    pager_region *region = &pager->regions[what->region];
    const uint64_t order = pager_order_of(pager, index);
    if (region->changes_released + region->changes_started != pager->leases[index].change || region->loading > 0 ||
        pager_is_kept_back(region, pager->leases[index].change) || !is_home(pager, region, order))
      return false;
    if (!region->holds)
      pager_mistake(pager, "a job takes region %u, which holds nothing", what->region);
  }
  return true;
}

static void end_event(void *context) {
  flap_pager *pager = context;
  const uint64_t ran = atomic_load(&pager->jobs_ran);
  job_at(pager, ran)->ended_ns = flap_clock_now_ns(pager->clock);
  flap_device_sim_slow_copies(pager->device, 1);
  atomic_store(&pager->jobs_ran, ran + 1);
  pager_ring_bell(pager);
}

/* With a virtual clock the next one begins when the pump sees the one before over. */
static void run_on_clock(flap_pager *pager, pager_job *job) {
  const bool copies = pager->h2d.issued != pager->h2d.retired || pager->d2h.issued != pager->d2h.retired;
  job->started_ns = pager_now_ns(pager);
  if (job->job.copies_beside > 1)
    flap_device_sim_slow_copies(pager->device, job->job.copies_beside);
  flap_clock_schedule(pager->clock, job->started_ns + (copies ? job->job.beside_copies_ns : job->job.ns), end_event,
                      pager);
}

bool pager_jobs_start(flap_pager *pager) {
  uint64_t started = pager->jobs_started;
  while (started < pager->jobs_queued && (!pager->clock || started == pager->jobs_done)) {
    pager_job *job = job_at(pager, started);
    if (!is_ready(pager, job))
      break;
    uint32_t index;
    for (uint32_t i = 0; i < job->count; i++)
      pager->regions[lease_of(pager, job, i, &index)->region].changes_started++;
    if (pager->clock)
      run_on_clock(pager, job);
    started++;
  }
  if (started == pager->jobs_started)
    return false;
  pthread_mutex_lock(&pager->job_lock);
  pager->jobs_started = started;
  pthread_cond_signal(&pager->job_wake);
  pthread_mutex_unlock(&pager->job_lock);
  return true;
}

/* The bytes of its regions are what the job made of them. */
static void finish(flap_pager *pager, const pager_job *job) {
  uint64_t bytes = 0;
  uint32_t index;
  for (uint32_t i = 0; i < job->count; i++) {
    const flap_lease *what = lease_of(pager, job, i, &index);
    pager_region *region = &pager->regions[what->region];
    region->changes_started--;
    region->changes_released++;
    pager_set_holds(pager, region, pager_stores(what->mode));
    pager_snapshot_changed(pager, region);
    pager_loads_came_home(pager, region);
    bytes += pager_job_bytes(what);
    pager->leases[index].state = LEASE_RELEASED;
  }
  pager->programs[job->program].released += job->count;
  pager->programs[job->program].in_jobs -= job->count;
  pager->stats.bytes[FLAP_LANE_HOST] += bytes;
  pager->stats.busy_ns[FLAP_LANE_HOST] += job->ended_ns - job->started_ns;
  if (pager->trace)
    pager->trace(pager->trace_context, FLAP_LANE_HOST, lease_of(pager, job, 0, &index)->region, job->started_ns,
                 job->ended_ns, bytes);
}

bool pager_jobs_collect(flap_pager *pager) {
  const uint64_t ran = atomic_load(&pager->jobs_ran);
  if (pager->jobs_done == ran)
    return false;
  for (; pager->jobs_done < ran; pager->jobs_done++)
    finish(pager, job_at(pager, pager->jobs_done));
  return true;
}

void flap_pager_run_job(flap_pager *pager, uint32_t first, uint32_t count, const flap_pager_job *job) {
  pager_enter(pager);
  pager_program *program = &pager->programs[pager->program_first];
  flap_assert(pager->program_count > 0 && first == program->pinned && first + count <= program->count);
  flap_assert(count > 0 && count <= FLAP_PAGER_JOB_LEASES_MAX);
  flap_assert(pager->jobs_queued - pager->jobs_done < pager->jobs_room);
  for (uint32_t i = 0; i < count; i++) {
    const flap_lease *what = &program->leases[first + i];
    const pager_region *region = &pager->regions[what->region];
    flap_assert(what->host_bytes > 0 && (what->mode == FLAP_LEASE_UPDATE || what->mode == FLAP_LEASE_CONSUME));
    flap_assert(region->ring != FLAP_PAGER_RESIDENT && region->ram_pages == region->page_count);
    if (region->pinned)
      pager_mistake(pager, "a job takes region %u while a lease of it is pinned", what->region);
    pager->leases[program->first_lease + first + i].state = LEASE_PINNED;
  }
  pager->jobs[pager->jobs_queued++ % pager->jobs_room] = (pager_job){
      .job = *job, .first_lease = program->first_lease + first, .count = count, .program = pager->program_first};
  program->pinned += count;
  program->in_jobs += count;
  pager_leave(pager);
  pager_ring_bell(pager);
}

/* ---- the thread ----------------------------------------------------------------------------------------- */

static void run(flap_pager *pager, pager_job *job) {
  void *memory[FLAP_PAGER_JOB_LEASES_MAX] = {NULL};
  uint32_t index;
  for (uint32_t i = 0; i < job->count; i++)
    memory[i] = pager->regions[lease_of(pager, job, i, &index)->region].home;
  job->started_ns = pager_now_ns(pager);
  if (job->job.run)
    job->job.run(job->job.context, memory);
  job->ended_ns = pager_now_ns(pager);
}

/* What a job is about does not change between its start and its end, nor does the list of its program's leases. */
static void *job_thread(void *context) {
  flap_pager *pager = context;
  for (uint64_t number = 0;; number++) {
    pthread_mutex_lock(&pager->job_lock);
    while (pager->jobs_started == number && !pager->job_stop)
      pthread_cond_wait(&pager->job_wake, &pager->job_lock);
    const bool stop = pager->job_stop;
    pthread_mutex_unlock(&pager->job_lock);
    if (stop)
      return NULL;
    run(pager, job_at(pager, number));
    atomic_store(&pager->jobs_ran, number + 1);
    pager_ring_bell(pager);
  }
}

/* Signals are for the threads of the program. */
flap_status pager_jobs_open(flap_pager *pager) {
  if (pager->jobs_room == 0)
    return FLAP_OK;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(&pager->job_thread, NULL, job_thread, pager);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error)
    return flap_error_set_os(error, "pager: cannot start the thread for jobs of the host");
  pager->job_thread_started = true;
  return FLAP_OK;
}

void pager_jobs_close(flap_pager *pager) {
  if (!pager->job_thread_started)
    return;
  pthread_mutex_lock(&pager->job_lock);
  pager->job_stop = true;
  pthread_cond_signal(&pager->job_wake);
  pthread_mutex_unlock(&pager->job_lock);
  pthread_join(pager->job_thread, NULL);
  pager->job_thread_started = false;
}
