/* A worker pool for data-parallel loops.
 *
 * The pool decides who runs an item, never what the item computes: callers split work into items by shape
 * alone, so results do not depend on the number of threads.
 */
#ifndef FLAP_BASE_POOL_H
#define FLAP_BASE_POOL_H

#include "base/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_POOL_THREADS_MAX 256

typedef struct flap_pool flap_pool;

/* fn(context, item, worker): item in [0, items), worker in [0, flap_pool_threads); two items that run at the
 * same time have different workers, so `worker` may index scratch memory. */
typedef void (*flap_pool_fn)(void *context, uint64_t item, uint32_t worker);

/* `threads` counts the caller: a pool of 1 starts nobody. 0 means all cores this process may run on
 * (flap_pool_threads_available). */
uint32_t flap_pool_threads_available(void);
FLAP_CHECKED flap_status flap_pool_open(uint32_t threads, flap_pool **pool_out);
uint32_t flap_pool_threads(const flap_pool *pool);

/* Runs all items and returns when the last has ended. The caller works too. One caller at a time; not
 * from inside an item. Allocates nothing. Workers spin for a few microseconds, then sleep. */
void flap_pool_run(flap_pool *pool, uint64_t items, flap_pool_fn fn, void *context);
void flap_pool_close(flap_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
