#include "kernels/device/measure_machine.h"

#include "base/assert.h"
#include "base/units.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HALF_BYTES (32u << 20) /* copied from one half to the other: beyond most caches */
#define CHUNK_BYTES (1u << 20)
#define PASSES_MAX 7
#define PASSES_NS_MAX (60u * 1000 * 1000) /* of one rate; the first pass is always made */
#define EMPTY_RUNS 64

typedef struct measurement {
  flap_pool *pool;
  char *to;
  const char *from;
} measurement;

static void copy_chunk(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const measurement *m = context;
  memcpy(m->to + item * CHUNK_BYTES, m->from + item * CHUNK_BYTES, CHUNK_BYTES);
}

static void copy_by_one(measurement *m) {
  for (uint64_t item = 0; item < HALF_BYTES / CHUNK_BYTES; item++)
    copy_chunk(m, item, 0);
}

static void copy_by_all(measurement *m) {
  flap_pool_run(m->pool, HALF_BYTES / CHUNK_BYTES, copy_chunk, m);
}

static void nothing(void *context, uint64_t item, uint32_t worker) {
  (void)context, (void)item, (void)worker;
}
static void run_nothing(measurement *m) {
  flap_pool_run(m->pool, flap_pool_threads(m->pool), nothing, NULL);
}

static int ascending(const void *a, const void *b) {
  uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
  return (left > right) - (left < right);
}

/* The median time of a pass, ns, at least 1. */
static uint64_t median_ns(measurement *m, void (*pass)(measurement *), uint32_t passes_max) {
  uint64_t ns[EMPTY_RUNS];
  uint32_t count = 0;
  flap_assert(passes_max > 0 && passes_max <= EMPTY_RUNS);
  uint64_t begun_ns = flap_units_now_ns(), before_ns = begun_ns;
  do {
    pass(m);
    uint64_t after_ns = flap_units_now_ns();
    ns[count++] = after_ns - before_ns;
    before_ns = after_ns;
  } while (count < passes_max && before_ns - begun_ns < PASSES_NS_MAX);
  qsort(ns, count, sizeof ns[0], ascending);
  return ns[count / 2] > 0 ? ns[count / 2] : 1;
}

flap_status flap_device_measure_host(flap_pool *pool, flap_machine *machine_out) {
  flap_assert(pool && machine_out);
  char *memory = mmap(NULL, 2 * (size_t)HALF_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    return flap_error_set_os(errno, "measuring the host: cannot take %u MiB", 2 * HALF_BYTES >> 20);
  (void)madvise(memory, 2 * (size_t)HALF_BYTES, MADV_HUGEPAGE); /* as the arena of the cpu device */
  memset(memory, 1, 2 * (size_t)HALF_BYTES);                    /* so that no pass takes pages */
  measurement there = {.pool = pool, .to = memory, .from = memory + HALF_BYTES};
  measurement back = {.pool = pool, .to = memory + HALF_BYTES, .from = memory};
  machine_out->h2d_bytes = HALF_BYTES * 1e9 / (double)median_ns(&there, copy_by_one, PASSES_MAX);
  machine_out->d2h_bytes = HALF_BYTES * 1e9 / (double)median_ns(&back, copy_by_one, PASSES_MAX);
  machine_out->host_bytes = 2.0 * HALF_BYTES * 1e9 / (double)median_ns(&there, copy_by_all, PASSES_MAX);
  machine_out->device_bytes = machine_out->host_bytes;
  machine_out->launch_ns = median_ns(&there, run_nothing, EMPTY_RUNS);
  machine_out->synchronous = true;
  machine_out->shared_cores = flap_pool_threads(pool);
  munmap(memory, 2 * (size_t)HALF_BYTES);
  return FLAP_OK;
}
