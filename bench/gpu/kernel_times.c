/* What runs on a GPU during any program: a table of kernels and copies, by the time that they took.
 *
 *   CUDA_INJECTION64_PATH=build/bench/libkernel_times.so KERNEL_TIMES_LAST_MS=2000 build/tools/flap train run.yaml ...
 *
 * The driver loads this library into the program and calls InitializeInjection (CUPTI's injection); nothing has to be
 * built for it. At exit the records of the last KERNEL_TIMES_LAST_MS milliseconds (all, if it is not set) are added up
 * by name and printed to stderr, or to the file KERNEL_TIMES_FILE, with the share of the time in which a kernel ran at
 * all: what is missing there are gaps between launches, or waits.
 */
#include <cupti.h>

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUFFER_BYTES ((size_t)8 << 20)
#define ROWS_MAX 48

typedef struct record {
  const char *name; /* CUPTI keeps names as long as the program runs */
  uint64_t start_ns, end_ns, bytes;
  bool kernel;
} record;

typedef struct total {
  const char *name;
  uint64_t count, ns, bytes;
} total;

static record *records;
static size_t record_count, record_max;

static void keep(record r) {
  if (record_count == record_max) {
    const size_t larger = record_max ? record_max * 2 : 65536;
    record *moved = realloc(records, larger * sizeof *records);
    if (moved == NULL)
      return;
    records = moved;
    record_max = larger;
  }
  records[record_count++] = r;
}

static void CUPTIAPI buffer_requested(uint8_t **buffer, size_t *bytes, size_t *records_max) {
  *buffer = aligned_alloc(64, BUFFER_BYTES);
  *bytes = *buffer ? BUFFER_BYTES : 0;
  *records_max = 0;
}

static const char *copy_name(uint8_t kind) {
  switch (kind) {
  case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
    return "copy to the GPU";
  case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
    return "copy from the GPU";
  default:
    return "copy within the GPU";
  }
}

static void CUPTIAPI buffer_completed(CUcontext context, uint32_t stream, uint8_t *buffer, size_t bytes, size_t valid) {
  (void)context, (void)stream, (void)bytes;
  CUpti_Activity *activity = NULL;
  while (cuptiActivityGetNextRecord(buffer, valid, &activity) == CUPTI_SUCCESS) {
    if (activity->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const CUpti_ActivityKernel10 *kernel = (const CUpti_ActivityKernel10 *)(const void *)activity;
      keep((record){.name = kernel->name, .start_ns = kernel->start, .end_ns = kernel->end, .kernel = true});
    } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const CUpti_ActivityMemcpy6 *copy = (const CUpti_ActivityMemcpy6 *)(const void *)activity;
      keep((record){
          .name = copy_name(copy->copyKind), .start_ns = copy->start, .end_ns = copy->end, .bytes = copy->bytes});
    } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const CUpti_ActivityMemset4 *set = (const CUpti_ActivityMemset4 *)(const void *)activity;
      keep((record){.name = "memset", .start_ns = set->start, .end_ns = set->end, .bytes = set->bytes, .kernel = true});
    }
  }
  free(buffer);
}

static int by_start(const void *a, const void *b) {
  const record *x = a, *y = b;
  return x->start_ns < y->start_ns ? -1 : x->start_ns > y->start_ns;
}

static int by_time(const void *a, const void *b) {
  const total *x = a, *y = b;
  return x->ns > y->ns ? -1 : x->ns < y->ns;
}

/* Adds up by name; returns how many names there are. */
static size_t add_up(size_t first, total *totals, size_t totals_max) {
  size_t count = 0;
  for (size_t i = first; i < record_count; i++) {
    size_t at = 0;
    while (at < count && strcmp(totals[at].name, records[i].name) != 0)
      at++;
    if (at == count) {
      if (count == totals_max)
        continue;
      totals[count++] = (total){.name = records[i].name};
    }
    totals[at].count++;
    totals[at].ns += records[i].end_ns - records[i].start_ns;
    totals[at].bytes += records[i].bytes;
  }
  qsort(totals, count, sizeof *totals, by_time);
  return count;
}

static void print_table(void) {
  (void)cuptiActivityFlushAll(1);
  if (record_count == 0)
    return;
  qsort(records, record_count, sizeof *records, by_start);
  const char *last_ms = getenv("KERNEL_TIMES_LAST_MS"), *path = getenv("KERNEL_TIMES_FILE");
  const uint64_t end_ns = records[record_count - 1].end_ns;
  const uint64_t span_ns = last_ms ? (uint64_t)(atof(last_ms) * 1e6) : UINT64_MAX;
  size_t first = 0;
  while (first < record_count && end_ns - records[first].start_ns > span_ns)
    first++;
  uint64_t busy_ns = 0, until_ns = records[first].start_ns;
  for (size_t i = first; i < record_count; i++) {
    if (!records[i].kernel || records[i].end_ns <= until_ns)
      continue;
    busy_ns += records[i].end_ns - (records[i].start_ns > until_ns ? records[i].start_ns : until_ns);
    until_ns = records[i].end_ns;
  }
  FILE *out = path ? fopen(path, "w") : stderr;
  static total totals[512];
  const size_t count = add_up(first, totals, sizeof totals / sizeof *totals);
  if (out == NULL)
    return;
  const double span = (double)(end_ns - records[first].start_ns);
  (void)fprintf(out, "kernel times: %.1f ms, a kernel ran in %.1f%% of it\n", span * 1e-6,
                100 * (double)busy_ns / span);
  for (size_t i = 0; i < count && i < ROWS_MAX; i++)
    (void)fprintf(out, "%6.2f%% %9.2f ms %7llu x %9.1f us %8.1f GB/s  %.110s\n", 100 * (double)totals[i].ns / span,
                  (double)totals[i].ns * 1e-6, (unsigned long long)totals[i].count,
                  (double)totals[i].ns * 1e-3 / (double)totals[i].count,
                  totals[i].bytes ? (double)totals[i].bytes / (double)totals[i].ns : 0.0, totals[i].name);
  if (path)
    (void)fclose(out);
}

/* The driver's entry. 1: loaded. */
int InitializeInjection(void);
int InitializeInjection(void) {
  const CUpti_ActivityKind kinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                                      CUPTI_ACTIVITY_KIND_MEMSET};
  if (cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed) != CUPTI_SUCCESS)
    return 0;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (cuptiActivityEnable(kinds[i]) != CUPTI_SUCCESS)
      return 0;
  return atexit(print_table) == 0;
}
