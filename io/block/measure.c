/* Measures a disk as the pager uses it: through the public interface, with the queue kept full. */
#include "io/block/measure.h"

#include "base/arena.h"
#include "base/log.h"
#include "base/philox.h"
#include "base/units.h"

#include <linux/magic.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>

#define PASSES 4
#define DEPTH_DEFAULT 16u
#define DEPTH_MAX 1024u

typedef enum pass_kind { PASS_READ, PASS_WRITE, PASS_BOTH } pass_kind;

typedef struct rate_meter rate_meter;
struct rate_meter {
  flap_block *block;
  pthread_mutex_t mutex;
  pthread_cond_t news;
  uint64_t completions; /* under the mutex */
  flap_block_request *requests;
  uint32_t request_count, request_bytes;
  uint64_t bytes; /* on each disk */
  pass_kind kind;
  uint64_t until_ns;   /* no turn begins later; 0: all do */
  uint64_t turns_done; /* of the last run */
  /* Says what the request does at this turn, and where. */
  void (*place)(const rate_meter *meter, uint64_t turn, flap_block_request *request);
};

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

static void submit_turn(rate_meter *meter, uint64_t turn, flap_block_request *request) {
  meter->place(meter, turn, request);
  flap_block_submit(meter->block, request);
}

static bool is_over(const rate_meter *meter) {
  return meter->until_ns > 0 && flap_units_now_ns() >= meter->until_ns;
}

/* So many turns, or as many as there is time for, with every request in use. After a failure it only drains. */
static flap_status run_turns(rate_meter *meter, uint64_t turns) {
  flap_status status = FLAP_OK;
  uint64_t turn = 0;
  uint32_t active = 0;
  for (; turn < meter->request_count && turn < turns; turn++, active++)
    submit_turn(meter, turn, &meter->requests[turn]);
  flap_block_flush(meter->block);
  while (active > 0) {
    flap_block_request *request = wait_for_one(meter);
    bool submitted = false;
    do {
      active--;
      if (request->status != FLAP_OK && status == FLAP_OK)
        status = flap_block_explain(meter->block, request);
      if (status == FLAP_OK && turn < turns && !is_over(meter)) {
        submit_turn(meter, turn++, request);
        active++;
        submitted = true;
      }
    } while ((request = flap_block_poll(meter->block)) != NULL);
    if (submitted)
      flap_block_flush(meter->block);
  }
  meter->turns_done = turn;
  return status;
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

/* Memory for buffers and requests: whole huge pages, so that the last buffers are no slower than the first. */
static flap_status take_memory(rate_meter *meter, flap_arena *arena, uint64_t buffer_bytes, uint32_t requests,
                               unsigned char **memory_out) {
  FLAP_TRY(
      flap_arena_open(arena, "disk measurement",
                      flap_units_round_up(buffer_bytes + requests * sizeof(flap_block_request) + 64, 2 * FLAP_MIB)));
  *memory_out = flap_arena_take(arena, buffer_bytes, FLAP_BLOCK_ALIGN);
  meter->requests = FLAP_ARENA_ARRAY(arena, flap_block_request, requests);
  fill(*memory_out, buffer_bytes);
  return FLAP_OK;
}

static void share_buffers(rate_meter *meter, unsigned char *memory) {
  for (uint32_t i = 0; i < meter->request_count; i++) {
    meter->requests[i].buffer = memory + (uint64_t)i * meter->request_bytes;
    meter->requests[i].bytes = meter->request_bytes;
  }
}

static flap_status open_block(rate_meter *meter, flap_block_config *config) {
  config->notify = note_completion;
  config->notify_context = meter;
  FLAP_TRY(flap_block_open(config, &meter->block));
  if (strstr(flap_block_describe(meter->block), "buffered") != NULL)
    flap_log(FLAP_LOG_WARNING, "disk %s: no O_DIRECT here; the page cache is measured, not the drive",
             config->disks[0].path);
  return FLAP_OK;
}

/* ---- the rates of plans ---------------------------------------------------------------------------------- */

/* In order; or reads of the first half and writes of the second by turns. */
static void place_in_order(const rate_meter *meter, uint64_t turn, flap_block_request *request) {
  const uint64_t half = (meter->bytes / meter->request_bytes + 1) / 2;
  const bool writes = meter->kind == PASS_WRITE || (meter->kind == PASS_BOTH && turn % 2 == 1);
  request->op = writes ? FLAP_BLOCK_WRITE : FLAP_BLOCK_READ;
  request->offset = (meter->kind != PASS_BOTH ? turn : turn / 2 + (writes ? half : 0)) * meter->request_bytes;
}

/* Moves all bytes once, or as many as there is time for. */
static flap_status run_pass(rate_meter *meter, pass_kind kind, double seconds, double *bytes_per_second_out) {
  meter->kind = kind;
  const uint64_t start_ns = flap_units_now_ns();
  meter->until_ns = seconds > 0 ? start_ns + (uint64_t)(seconds * 1e9) : 0;
  const flap_status status = run_turns(meter, meter->bytes / meter->request_bytes);
  const double bytes = (double)(meter->turns_done * meter->request_bytes);
  *bytes_per_second_out = bytes / ((double)(flap_units_now_ns() - start_ns) * 1e-9);
  return status;
}

/* What the first has no time to write does not count from then on. */
static flap_status run_passes(rate_meter *meter, double seconds, flap_block_rates *rates) {
  const double each = seconds / PASSES;
  double unwritten = 0;
  FLAP_TRY(run_pass(meter, PASS_WRITE, each, &unwritten));
  meter->bytes = meter->turns_done * meter->request_bytes;
  FLAP_TRY(run_pass(meter, PASS_WRITE, each, &rates->write_bytes));
  FLAP_TRY(run_pass(meter, PASS_READ, each, &rates->read_bytes));
  return run_pass(meter, PASS_BOTH, each, &rates->both_bytes);
}

static flap_status measure_with(rate_meter *meter, const char *path, uint32_t depth, double seconds,
                                flap_block_backend backend, flap_arena *arena, flap_block_rates *rates) {
  const uint64_t memory_bytes = (uint64_t)meter->request_count * meter->request_bytes;
  unsigned char *memory = NULL;
  FLAP_TRY(take_memory(meter, arena, memory_bytes, meter->request_count, &memory));
  share_buffers(meter, memory);
  flap_block_config config = {.backend = backend,
                              .disk_count = 1,
                              .disks = {{.path = path, .bytes = meter->bytes}},
                              .bytes = meter->bytes,
                              .requests_max = meter->request_count,
                              .read_depth = depth,
                              .write_depth = depth,
                              .memory = memory,
                              .memory_bytes = memory_bytes};
  flap_status status = open_block(meter, &config);
  if (status == FLAP_OK)
    status = run_passes(meter, seconds, rates);
  flap_block_close(meter->block);
  flap_arena_close(arena);
  return status;
}

static void meter_init(rate_meter *meter) {
  pthread_mutex_init(&meter->mutex, NULL);
  pthread_cond_init(&meter->news, NULL);
}

static void meter_destroy(rate_meter *meter) {
  pthread_cond_destroy(&meter->news);
  pthread_mutex_destroy(&meter->mutex);
}

flap_status flap_block_measure_rates(const char *path, uint64_t bytes, uint32_t request_bytes, uint32_t depth,
                                     double seconds, flap_block_backend backend, flap_block_rates *rates_out) {
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
  rate_meter meter = {.request_count = depth + (depth + 3) / 4,
                      .request_bytes = request_bytes,
                      .bytes = bytes,
                      .place = place_in_order};
  flap_arena arena;
  meter_init(&meter);
  flap_status status = measure_with(&meter, path, depth, seconds, backend, &arena, rates_out);
  meter_destroy(&meter);
  return status;
}

/* ---- probes ---------------------------------------------------------------------------------------------- */

/* A request is a slot: of the requests of its disk it is number `slot`, and at its n-th use it has the place
 * slot + n x depth, so that no two in flight ever overlap, however far one of them falls behind. */
typedef struct probe_slot {
  uint32_t disk, slot;
  uint64_t uses;
} probe_slot;

struct flap_block_probe {
  rate_meter meter;
  flap_arena arena;
  unsigned char *memory;
  uint64_t memory_bytes;
  uint32_t disks, depth, depth_max;
  probe_slot slots[FLAP_BLOCK_DISKS_MAX * FLAP_BLOCK_PROBE_DEPTH_MAX];
};

/* Where byte `offset` of a disk is in the linear space: stripes of equal disks come in turn. */
static uint64_t on_disk(uint32_t disks, uint32_t disk, uint64_t offset) {
  const uint64_t stripe = FLAP_BLOCK_REQUEST_BYTES_MAX;
  return (offset / stripe * disks + disk) * stripe + offset % stripe;
}

static void place_by_slot(const rate_meter *meter, uint64_t turn, flap_block_request *request) {
  (void)turn;
  probe_slot *slot = request->user;
  const flap_block_probe *probe = (const flap_block_probe *)meter; /* the meter is its first member */
  const uint64_t all = meter->bytes / meter->request_bytes, use = slot->uses++;
  const bool both = meter->kind == PASS_BOTH;
  const bool writes = meter->kind == PASS_WRITE || (both && (slot->slot + use) % 2 == 1);
  const uint64_t room = (both ? all / 2 : all) / probe->depth * probe->depth;
  uint64_t place = (slot->slot + (both ? use / 2 : use) * probe->depth) % room;
  if (both && writes)
    place += all / 2;
  request->op = writes ? FLAP_BLOCK_WRITE : FLAP_BLOCK_READ;
  request->offset = on_disk(probe->disks, slot->disk, place * meter->request_bytes);
}

/* The requests as they are for one measurement; turns go round the disks. */
static void arrange(flap_block_probe *probe, pass_kind kind, uint32_t request_bytes, uint32_t depth) {
  rate_meter *meter = &probe->meter;
  meter->kind = kind;
  meter->request_bytes = request_bytes;
  meter->request_count = depth * probe->disks;
  probe->depth = depth;
  share_buffers(meter, probe->memory);
  for (uint32_t i = 0; i < meter->request_count; i++) {
    probe->slots[i] = (probe_slot){.disk = i % probe->disks, .slot = i / probe->disks};
    meter->requests[i].user = &probe->slots[i];
  }
}

flap_status flap_block_probe_check(const char *path) {
  struct statfs info;
  uint64_t free_bytes;
  FLAP_TRY(flap_block_space(path, &free_bytes));
  if (statfs(path, &info) == 0 && (info.f_type == TMPFS_MAGIC || info.f_type == RAMFS_MAGIC))
    return flap_error_set(FLAP_INVALID, "disk %s: the folder is in memory (tmpfs), not on a drive: name one that is",
                          path);
  return FLAP_OK;
}

static flap_status check_probe(const flap_block_probe_config *config) {
  if (config->disk_count == 0 || config->disk_count > FLAP_BLOCK_DISKS_MAX)
    return flap_error_set(FLAP_INVALID, "disk measurement: %u disks; 1 to %u are possible", config->disk_count,
                          FLAP_BLOCK_DISKS_MAX);
  if (config->depth_max == 0 || config->depth_max > FLAP_BLOCK_PROBE_DEPTH_MAX)
    return flap_error_set(FLAP_INVALID, "disk measurement: %u requests in flight; 1 to %u are possible",
                          config->depth_max, FLAP_BLOCK_PROBE_DEPTH_MAX);
  if (config->bytes < 2 * FLAP_BLOCK_REQUEST_BYTES_MAX || config->bytes % FLAP_BLOCK_REQUEST_BYTES_MAX != 0)
    return flap_error_set(FLAP_INVALID, "disk measurement: the extent must be a multiple of 4 MiB, at least 8 MiB");
  if (config->flight_bytes < FLAP_BLOCK_REQUEST_BYTES_MAX || config->flight_bytes % FLAP_BLOCK_ALIGN != 0)
    return flap_error_set(FLAP_INVALID, "disk measurement: at least 4 MiB must fit in flight");
  for (uint32_t i = 0; i < config->disk_count; i++)
    FLAP_TRY(flap_block_probe_check(config->paths[i]));
  return FLAP_OK;
}

static flap_status open_probe(flap_block_probe *probe, const flap_block_probe_config *config) {
  const uint32_t disks = config->disk_count;
  probe->memory_bytes = config->flight_bytes * disks;
  FLAP_TRY(take_memory(&probe->meter, &probe->arena, probe->memory_bytes, disks * config->depth_max, &probe->memory));
  flap_block_config block = {.backend = config->backend,
                             .disk_count = disks,
                             .stripe_bytes = FLAP_BLOCK_REQUEST_BYTES_MAX,
                             .bytes = config->bytes * disks,
                             .requests_max = disks * config->depth_max,
                             .read_depth = config->depth_max,
                             .write_depth = config->depth_max,
                             .memory = probe->memory,
                             .memory_bytes = probe->memory_bytes};
  for (uint32_t i = 0; i < disks; i++)
    block.disks[i] = (flap_block_disk){.path = config->paths[i], .bytes = config->bytes};
  FLAP_TRY(open_block(&probe->meter, &block));
  arrange(probe, PASS_WRITE, FLAP_BLOCK_REQUEST_BYTES_MAX, 1);
  return run_turns(&probe->meter, config->bytes / FLAP_BLOCK_REQUEST_BYTES_MAX * disks);
}

flap_status flap_block_probe_open(const flap_block_probe_config *config, flap_block_probe **probe_out) {
  *probe_out = NULL;
  FLAP_TRY(check_probe(config));
  flap_block_probe *probe = calloc(1, sizeof *probe);
  if (probe == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "disk measurement: no memory");
  probe->meter = (rate_meter){.bytes = config->bytes, .place = place_by_slot};
  probe->disks = config->disk_count;
  probe->depth_max = config->depth_max;
  meter_init(&probe->meter);
  const flap_status status = open_probe(probe, config);
  if (status != FLAP_OK)
    flap_block_probe_close(probe);
  else
    *probe_out = probe;
  return status;
}

const char *flap_block_probe_describe(const flap_block_probe *probe) {
  return flap_block_describe(probe->meter.block);
}

/* A unit is a request for every slot. */
static flap_status run_units(void *context, uint64_t units) {
  flap_block_probe *probe = context;
  return run_turns(&probe->meter, units * probe->meter.request_count);
}

flap_status flap_block_probe_measure(flap_block_probe *probe, flap_block_mix mix, uint32_t request_bytes,
                                     uint32_t depth, const flap_rate_effort *effort, flap_rate *rate_out) {
  static const pass_kind kinds[] = {
      [FLAP_BLOCK_MIX_READ] = PASS_READ, [FLAP_BLOCK_MIX_WRITE] = PASS_WRITE, [FLAP_BLOCK_MIX_BOTH] = PASS_BOTH};
  *rate_out = (flap_rate){0};
  if (request_bytes == 0 || request_bytes > FLAP_BLOCK_REQUEST_BYTES_MAX || request_bytes % FLAP_BLOCK_ALIGN != 0)
    return flap_error_set(FLAP_INVALID, "disk measurement: requests must be multiples of %u bytes, at most %u",
                          FLAP_BLOCK_ALIGN, FLAP_BLOCK_REQUEST_BYTES_MAX);
  const uint64_t flight_bytes = (uint64_t)depth * request_bytes;
  if (depth == 0 || depth > probe->depth_max || flight_bytes * probe->disks > probe->memory_bytes ||
      2 * flight_bytes > probe->meter.bytes)
    return flap_error_set(FLAP_INVALID, "disk measurement: %u requests of %u bytes are too many in flight", depth,
                          request_bytes);
  arrange(probe, kinds[mix], request_bytes, depth);
  return flap_rate_measure(effort, run_units, probe, (double)(flight_bytes * probe->disks), rate_out);
}

void flap_block_probe_close(flap_block_probe *probe) {
  if (probe == NULL)
    return;
  flap_block_close(probe->meter.block);
  flap_arena_close(&probe->arena);
  meter_destroy(&probe->meter);
  free(probe);
}
