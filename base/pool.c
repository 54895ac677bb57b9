/* The worker pool.
 *
 * A run is open while `sequence` is odd. A worker takes part in three steps: it sees a new odd sequence, counts itself
 * in `joined`, and looks at the sequence again. The caller ends a run by making the sequence even and then waiting for
 * `joined` to reach 0. Both sides write one word and then read the other's, all sequentially consistent, so either the
 * worker sees that the run is over and leaves without touching it, or the caller sees the worker and waits. Hence:
 *
 * 1. fn, context, items and next_item change only while the sequence is even and nobody has joined.
 * 2. A worker that wakes late costs a run nothing: it is not waited for unless it has joined.
 *
 * Sleeping works the same way: a sleeper counts itself before it looks at the sequence for the last time, and a caller
 * looks at the count after it changed the sequence.
 */
#include "base/pool.h"

#include "base/assert.h"
#include "base/units.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define SPIN_NS 5000
#define CACHE_LINE 64

typedef struct pool_worker {
  flap_pool *pool;
  uint32_t index;
  pthread_t thread;
} pool_worker;

struct flap_pool {
  uint32_t threads;
  uint32_t started; /* workers that must be joined at close; the caller is not one */
  flap_pool_fn fn;
  void *context;
  uint64_t items;
  atomic_bool stopping;
  atomic_bool busy; /* a run is going on; catches a second caller */
  alignas(CACHE_LINE) atomic_uint_fast64_t sequence;
  alignas(CACHE_LINE) atomic_uint_fast64_t next_item;
  alignas(CACHE_LINE) atomic_uint joined;
  atomic_uint sleepers;
  atomic_bool caller_sleeps;
  pthread_mutex_t mutex; /* only for the two conditions */
  pthread_cond_t work, done;
  pool_worker workers[];
};

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void work_on_items(flap_pool *pool, uint32_t worker) {
  for (;;) {
    uint64_t item = atomic_fetch_add_explicit(&pool->next_item, 1, memory_order_relaxed);
    if (item >= pool->items)
      return;
    pool->fn(pool->context, item, worker);
  }
}

static void leave_run(flap_pool *pool) {
  if (atomic_fetch_sub(&pool->joined, 1) == 1 && atomic_load(&pool->caller_sleeps)) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->mutex);
  }
}

/* There is something to look at: an open run that this worker has not seen, or the end. */
static bool has_news(flap_pool *pool, uint64_t seen) {
  uint64_t sequence = atomic_load(&pool->sequence);
  return (sequence != seen && sequence % 2 == 1) || atomic_load(&pool->stopping);
}

static void wait_for_news(flap_pool *pool, uint64_t seen) {
  for (uint64_t end_ns = flap_units_now_ns() + SPIN_NS; flap_units_now_ns() < end_ns;) {
    if (has_news(pool, seen))
      return;
    pause_cpu();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->sleepers, 1);
  while (!has_news(pool, seen))
    pthread_cond_wait(&pool->work, &pool->mutex);
  atomic_fetch_sub(&pool->sleepers, 1);
  pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *argument) {
  pool_worker *worker = argument;
  flap_pool *pool = worker->pool;
  uint64_t seen = 0;
  for (;;) {
    wait_for_news(pool, seen);
    if (atomic_load(&pool->stopping))
      return NULL;
    uint64_t sequence = atomic_load(&pool->sequence);
    if (sequence % 2 == 0)
      continue; /* the run was over before this worker got to it */
    atomic_fetch_add(&pool->joined, 1);
    if (atomic_load(&pool->sequence) == sequence)
      work_on_items(pool, worker->index);
    leave_run(pool);
    seen = sequence;
  }
}

uint32_t flap_pool_threads_available(void) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0)
    return 1;
  int count = CPU_COUNT(&set);
  if (count < 1)
    return 1;
  return count > FLAP_POOL_THREADS_MAX ? FLAP_POOL_THREADS_MAX : (uint32_t)count;
}

/* Signals are for the threads that expect them: workers start with all of them blocked. */
static flap_status start_workers(flap_pool *pool) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int os_error = 0;
  while (os_error == 0 && pool->started + 1 < pool->threads) {
    pool_worker *worker = &pool->workers[pool->started];
    *worker = (pool_worker){.pool = pool, .index = pool->started + 1};
    os_error = pthread_create(&worker->thread, NULL, worker_main, worker);
    if (os_error == 0)
      pool->started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (os_error == 0)
    return FLAP_OK;
  (void)flap_error_set_os(os_error, "worker pool: cannot start thread %u of %u; allow more threads or use fewer",
                          pool->started + 2, pool->threads);
  return FLAP_NO_MEMORY;
}

flap_status flap_pool_open(uint32_t threads, flap_pool **pool_out) {
  *pool_out = NULL;
  if (threads == 0)
    threads = flap_pool_threads_available();
  if (threads > FLAP_POOL_THREADS_MAX)
    return flap_error_set(FLAP_INVALID, "worker pool: %u threads asked for, at most %d are possible", threads,
                          FLAP_POOL_THREADS_MAX);
  size_t bytes = sizeof(flap_pool) + (threads - 1) * sizeof(pool_worker);
  flap_pool *pool = aligned_alloc(CACHE_LINE, (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
  if (pool == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "worker pool: no memory for %u threads", threads);
  memset(pool, 0, bytes);
  pool->threads = threads;
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->work, NULL);
  pthread_cond_init(&pool->done, NULL);
  flap_status status = start_workers(pool);
  if (status != FLAP_OK) {
    flap_pool_close(pool);
    return status;
  }
  *pool_out = pool;
  return FLAP_OK;
}

uint32_t flap_pool_threads(const flap_pool *pool) {
  return pool->threads;
}

static void wake_workers(flap_pool *pool, uint64_t wanted) {
  unsigned sleepers = atomic_load(&pool->sleepers);
  if (sleepers == 0)
    return;
  pthread_mutex_lock(&pool->mutex);
  if (wanted >= sleepers)
    pthread_cond_broadcast(&pool->work);
  else
    for (uint64_t i = 0; i < wanted; i++)
      pthread_cond_signal(&pool->work);
  pthread_mutex_unlock(&pool->mutex);
}

static void wait_for_joined(flap_pool *pool) {
  for (uint64_t end_ns = flap_units_now_ns() + SPIN_NS; flap_units_now_ns() < end_ns;) {
    if (atomic_load(&pool->joined) == 0)
      return;
    pause_cpu();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_store(&pool->caller_sleeps, true);
  while (atomic_load(&pool->joined) != 0)
    pthread_cond_wait(&pool->done, &pool->mutex);
  atomic_store(&pool->caller_sleeps, false);
  pthread_mutex_unlock(&pool->mutex);
}

void flap_pool_run(flap_pool *pool, uint64_t items, flap_pool_fn fn, void *context) {
  bool was_busy = atomic_exchange(&pool->busy, true);
  flap_assert(!was_busy);
  if (pool->threads == 1 || items <= 1) {
    for (uint64_t item = 0; item < items; item++)
      fn(context, item, 0);
    atomic_store(&pool->busy, false);
    return;
  }
  pool->fn = fn;
  pool->context = context;
  pool->items = items;
  atomic_store(&pool->next_item, 0);
  atomic_fetch_add(&pool->sequence, 1);
  wake_workers(pool, items - 1);
  work_on_items(pool, 0);
  atomic_fetch_add(&pool->sequence, 1);
  wait_for_joined(pool);
  atomic_store(&pool->busy, false);
}

void flap_pool_close(flap_pool *pool) {
  if (pool == NULL)
    return;
  atomic_store(&pool->stopping, true);
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->work);
  pthread_mutex_unlock(&pool->mutex);
  for (uint32_t i = 0; i < pool->started; i++)
    pthread_join(pool->workers[i].thread, NULL);
  pthread_mutex_destroy(&pool->mutex);
  pthread_cond_destroy(&pool->work);
  pthread_cond_destroy(&pool->done);
  free(pool);
}
