/* Measures a disk as the pager uses it: through the public interface, with the queue kept full. */
#include "io/block/measure.h"

#include "base/arena.h"
#include "base/log.h"
#include "base/philox.h"
#include "base/units.h"

#include <pthread.h>
#include <string.h>

#define DEPTH_DEFAULT 16u
#define DEPTH_MAX 1024u

typedef struct rate_meter {
  flap_block *block;
  pthread_mutex_t mutex;
  pthread_cond_t news;
  uint64_t completions; /* under the mutex */
  flap_block_request *requests;
  uint32_t request_count, request_bytes;
  uint64_t bytes;
} rate_meter;

static void note_completion(void *context) {
  rate_meter *meter = context;
  pthread_mutex_lock(&meter->mutex);
  meter->completions++;
  pthread_cond_signal(&meter->news);
  pthread_mutex_unlock(&meter->mutex);
}

/* A completed request; sleeps until there is one. `seen` is what the caller knew before it looked. */
static flap_block_request *wait_for_one(rate_meter *meter) {
  for (;;) {
    pthread_mutex_lock(&meter->mutex);
    uint64_t seen = meter->completions;
    pthread_mutex_unlock(&meter->mutex);
    flap_block_request *request = flap_block_poll(meter->block);
    if (request != NULL)
      return request;
    pthread_mutex_lock(&meter->mutex);
    while (meter->completions == seen)
      pthread_cond_wait(&meter->news, &meter->mutex);
    pthread_mutex_unlock(&meter->mutex);
  }
}

typedef enum pass_kind { PASS_READ, PASS_WRITE, PASS_BOTH } pass_kind;

/* The request at `turn` of a pass: in order; or reads of the first half and writes of the second by turns. */
static void submit_turn(rate_meter *meter, pass_kind kind, uint64_t turn, flap_block_request *request) {
  const uint64_t half = (meter->bytes / meter->request_bytes + 1) / 2;
  const bool writes = kind == PASS_WRITE || (kind == PASS_BOTH && turn % 2 == 1);
  request->op = writes ? FLAP_BLOCK_WRITE : FLAP_BLOCK_READ;
  request->offset = (kind != PASS_BOTH ? turn : turn / 2 + (writes ? half : 0)) * meter->request_bytes;
  flap_block_submit(meter->block, request);
}

/* Moves all bytes once, with every request in use. After a failure it only drains. */
static flap_status run_pass(rate_meter *meter, pass_kind kind, double *bytes_per_second_out) {
  flap_status status = FLAP_OK;
  const uint64_t start_ns = flap_units_now_ns(), turns = meter->bytes / meter->request_bytes;
  uint64_t turn = 0;
  uint32_t active = 0;
  for (; turn < meter->request_count && turn < turns; turn++, active++)
    submit_turn(meter, kind, turn, &meter->requests[turn]);
  flap_block_flush(meter->block);
  while (active > 0) {
    flap_block_request *request = wait_for_one(meter);
    bool submitted = false;
    do {
      active--;
      if (request->status != FLAP_OK && status == FLAP_OK)
        status = flap_block_explain(meter->block, request);
      if (status == FLAP_OK && turn < turns) {
        submit_turn(meter, kind, turn++, request);
        active++;
        submitted = true;
      }
    } while ((request = flap_block_poll(meter->block)) != NULL);
    if (submitted)
      flap_block_flush(meter->block);
  }
  *bytes_per_second_out = (double)meter->bytes / ((double)(flap_units_now_ns() - start_ns) * 1e-9);
  return status;
}

static flap_status run_passes(rate_meter *meter, flap_block_rates *rates) {
  double unwritten = 0;
  FLAP_TRY(run_pass(meter, PASS_WRITE, &unwritten));
  FLAP_TRY(run_pass(meter, PASS_WRITE, &rates->write_bytes));
  FLAP_TRY(run_pass(meter, PASS_READ, &rates->read_bytes));
  return run_pass(meter, PASS_BOTH, &rates->both_bytes);
}

/* Drives may compress, or skip zeros. */
static void fill(unsigned char *memory, uint64_t bytes) {
  flap_philox stream = flap_philox_stream(0, "disk measurement");
  for (uint64_t i = 0; i < bytes / 16; i++) {
    uint32_t words[4];
    flap_philox_block(&stream, i, words);
    memcpy(memory + i * 16, words, sizeof words);
  }
}

static flap_status measure_with(rate_meter *meter, const char *path, uint32_t depth, flap_block_backend backend,
                                flap_arena *arena, flap_block_rates *rates) {
  uint64_t memory_bytes = (uint64_t)meter->request_count * meter->request_bytes;
  unsigned char *memory = flap_arena_take(arena, memory_bytes, FLAP_BLOCK_ALIGN);
  meter->requests = FLAP_ARENA_ARRAY(arena, flap_block_request, meter->request_count);
  fill(memory, memory_bytes);
  for (uint32_t i = 0; i < meter->request_count; i++) {
    meter->requests[i].buffer = memory + (uint64_t)i * meter->request_bytes;
    meter->requests[i].bytes = meter->request_bytes;
  }
  flap_block_config config = {.backend = backend,
                              .disk_count = 1,
                              .disks = {{.path = path, .bytes = meter->bytes}},
                              .bytes = meter->bytes,
                              .requests_max = meter->request_count,
                              .read_depth = depth,
                              .write_depth = depth,
                              .memory = memory,
                              .memory_bytes = memory_bytes,
                              .notify = note_completion,
                              .notify_context = meter};
  FLAP_TRY(flap_block_open(&config, &meter->block));
  if (strstr(flap_block_describe(meter->block), "buffered") != NULL)
    flap_log(FLAP_LOG_WARNING, "disk %s: no O_DIRECT here; the page cache is measured, not the drive", path);
  flap_status status = run_passes(meter, rates);
  flap_block_close(meter->block);
  return status;
}

flap_status flap_block_measure_rates(const char *path, uint64_t bytes, uint32_t request_bytes, uint32_t depth,
                                     flap_block_backend backend, flap_block_rates *rates_out) {
  *rates_out = (flap_block_rates){0};
  if (request_bytes == 0 || request_bytes > FLAP_BLOCK_REQUEST_BYTES_MAX || request_bytes % FLAP_BLOCK_ALIGN != 0)
    return flap_error_set(FLAP_INVALID, "disk measurement: requests must be multiples of %u bytes, at most %u",
                          FLAP_BLOCK_ALIGN, FLAP_BLOCK_REQUEST_BYTES_MAX);
  if (bytes == 0 || bytes % request_bytes != 0)
    return flap_error_set(FLAP_INVALID, "disk measurement: the size must be a multiple of the requests' %u bytes",
                          request_bytes);
  if (depth > DEPTH_MAX)
    return flap_error_set(FLAP_INVALID, "disk measurement: a depth of at most %u is possible", DEPTH_MAX);
  if (depth == 0)
    depth = DEPTH_DEFAULT;
  /* A few more than the depth: the next requests wait in the lane, so the system never waits for this thread. Not many
   * more, because every further buffer is cache that the transfers miss. */
  rate_meter meter = {.request_count = depth + (depth + 3) / 4, .request_bytes = request_bytes, .bytes = bytes};
  flap_arena arena;
  /* Whole huge pages, so that the last buffers are no slower than the first. */
  uint64_t memory_bytes =
      flap_units_round_up(meter.request_count * (request_bytes + sizeof(flap_block_request)), 2 * FLAP_MIB);
  FLAP_TRY(flap_arena_open(&arena, "disk measurement", memory_bytes));
  pthread_mutex_init(&meter.mutex, NULL);
  pthread_cond_init(&meter.news, NULL);
  flap_status status = measure_with(&meter, path, depth, backend, &arena, rates_out);
  pthread_cond_destroy(&meter.news);
  pthread_mutex_destroy(&meter.mutex);
  flap_arena_close(&arena);
  return status;
}
