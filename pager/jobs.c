/* Jobs: work of the host's cores on regions that live in RAM.
 *
 * A job stands in the program's list of leases like any other use of its regions, so what was changed before it is home
 * when it begins, and what comes behind it sees what it changed. Only the oldest job is looked at: jobs run in their
 * order, one at a time. In real time a thread of their own runs them, without the lock; with a virtual clock their end
 * is an event.
 *
 *   queued ──pager_jobs_start──► running ──finish──► done
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#include <signal.h>
#include <stdatomic.h>

static pager_job *oldest(const flap_pager *pager) {
  return &pager->jobs[pager->jobs_done % pager->jobs_room];
}

static const flap_lease *lease_of(const flap_pager *pager, const pager_job *job, uint32_t i, uint32_t *index_out) {
  const uint32_t index = job->first_lease + i;
  *index_out = index;
  return &pager->programs[job->program].leases[index % pager->leases_max];
}

static bool is_home(const flap_pager *pager, const pager_region *region) {
  const pager_page *page = pager_pages_of(pager, region);
  for (uint32_t i = 0; i < region->page_count; i++)
    if (page[i].stores_left > 0)
      return false;
  return true;
}

static bool is_ready(flap_pager *pager, const pager_job *job) {
  for (uint32_t i = 0; i < job->count; i++) {
    uint32_t index;
    const flap_lease *what = lease_of(pager, job, i, &index);
    const pager_region *region = &pager->regions[what->region];
    if (region->changes_released != pager->leases[index].change || region->loading > 0 || !is_home(pager, region))
      return false;
    if (!region->holds)
      pager_mistake(pager, "a job takes region %u, which holds nothing", what->region);
  }
  return true;
}

/* The bytes of its regions are what the job made of them. */
static void finish(flap_pager *pager) {
  const pager_job *job = oldest(pager);
  const uint64_t now_ns = pager_now_ns(pager);
  uint64_t bytes = 0;
  uint32_t index;
  for (uint32_t i = 0; i < job->count; i++) {
    const flap_lease *what = lease_of(pager, job, i, &index);
    pager_region *region = &pager->regions[what->region];
    region->changes_released++;
    region->holds = pager_stores(what->mode);
    bytes += pager_job_bytes(what);
    pager->leases[index].state = LEASE_RELEASED;
  }
  pager->programs[job->program].released += job->count;
  pager->programs[job->program].in_jobs -= job->count;
  pager->stats.bytes[FLAP_LANE_HOST] += bytes;
  pager->stats.busy_ns[FLAP_LANE_HOST] += now_ns - pager->job_started_ns;
  if (pager->trace)
    pager->trace(pager->trace_context, FLAP_LANE_HOST, lease_of(pager, job, 0, &index)->region, pager->job_started_ns,
                 now_ns, bytes);
  pager->job_running = false;
  pager->jobs_done++;
  pager_ring_bell(pager);
}

static void end_event(void *context) {
  flap_pager *pager = context;
  pthread_mutex_lock(&pager->lock);
  finish(pager);
  pthread_mutex_unlock(&pager->lock);
}

bool pager_jobs_start(flap_pager *pager) {
  if (pager->job_running || pager->jobs_done == pager->jobs_queued || !is_ready(pager, oldest(pager)))
    return false;
  pager->job_running = true;
  pager->job_started_ns = pager_now_ns(pager);
  if (pager->clock) {
    flap_clock_schedule(pager->clock, pager->job_started_ns + oldest(pager)->job.ns, end_event, pager);
    return true;
  }
  atomic_fetch_add(&pager->wanted, 1); /* the job's thread gets the lock before the next round */
  pthread_cond_signal(&pager->job_wake);
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
  pthread_mutex_unlock(&pager->lock);
  pager_ring_bell(pager);
}

/* ---- the thread ----------------------------------------------------------------------------------------- */

static void run_oldest(flap_pager *pager) {
  const pager_job job = *oldest(pager);
  void *memory[FLAP_PAGER_JOB_LEASES_MAX] = {NULL};
  uint32_t index;
  for (uint32_t i = 0; i < job.count; i++)
    memory[i] = pager->regions[lease_of(pager, &job, i, &index)->region].home;
  pthread_mutex_unlock(&pager->lock);
  if (job.job.run)
    job.job.run(job.job.context, memory);
  pager_enter(pager);
  finish(pager);
}

static void *job_thread(void *context) {
  flap_pager *pager = context;
  pthread_mutex_lock(&pager->lock);
  for (;;) {
    while (!pager->job_running && !pager->job_stop)
      pthread_cond_wait(&pager->job_wake, &pager->lock);
    if (!pager->job_running)
      break;
    pager_entered(pager);
    run_oldest(pager);
  }
  pthread_mutex_unlock(&pager->lock);
  return NULL;
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
  pager_enter(pager);
  if (pager->error == FLAP_OK)
    pager->error = FLAP_CLOSED; /* nothing new starts */
  pager->job_stop = true;
  pthread_cond_signal(&pager->job_wake);
  pthread_mutex_unlock(&pager->lock);
  pthread_join(pager->job_thread, NULL);
  pager->job_thread_started = false;
}
