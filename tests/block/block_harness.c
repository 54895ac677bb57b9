#include "tests/block/block_harness.h"

#include "base/philox.h"

#include <check.h>
#include <errno.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define UNIT FLAP_BLOCK_ALIGN
#define SLOTS 24u

static void note(void *context) {
  block_harness *harness = context;
  pthread_mutex_lock(&harness->mutex);
  harness->notices++;
  pthread_cond_signal(&harness->news);
  pthread_mutex_unlock(&harness->mutex);
}

void harness_init(block_harness *harness, flap_block_backend backend, const char *parent, uint32_t disk_count,
                  const uint64_t *stripes, uint64_t stripe_bytes, uint64_t memory_bytes) {
  memset(harness, 0, sizeof *harness);
  pthread_mutex_init(&harness->mutex, NULL);
  pthread_cond_init(&harness->news, NULL);
  harness->memory = aligned_alloc(UNIT, memory_bytes);
  ck_assert_ptr_nonnull(harness->memory);
  memset(harness->memory, 0xA5, memory_bytes);
  flap_block_config *config = &harness->config;
  config->backend = backend;
  config->disk_count = disk_count;
  config->stripe_bytes = stripe_bytes;
  for (uint32_t d = 0; d < disk_count; d++) {
    snprintf(harness->folders[d], sizeof harness->folders[d], "%s/flap-test-XXXXXX", parent);
    ck_assert_msg(mkdtemp(harness->folders[d]) != NULL, "%s: %s", harness->folders[d], strerror(errno));
    config->disks[d] = (flap_block_disk){
        .path = harness->folders[d], .bytes = stripes[d] * stripe_bytes, .weight = disk_count % 2 ? 3 * d + 1 : 0};
    config->bytes += stripes[d] * stripe_bytes;
  }
  config->requests_max = SLOTS;
  config->memory = harness->memory;
  config->memory_bytes = memory_bytes;
  config->notify = note;
  config->notify_context = harness;
}

void harness_open(block_harness *harness) {
  flap_status status = flap_block_open(&harness->config, &harness->block);
  ck_assert_msg(status == FLAP_OK, "open: %s", flap_error_message());
}

void harness_close(block_harness *harness) {
  flap_block_close(harness->block);
  for (uint32_t d = 0; d < harness->config.disk_count; d++)
    ck_assert_msg(rmdir(harness->folders[d]) == 0, "%s has left-overs", harness->folders[d]);
  free(harness->memory);
  pthread_cond_destroy(&harness->news);
  pthread_mutex_destroy(&harness->mutex);
}

flap_block_request *harness_wait(block_harness *harness) {
  for (;;) {
    pthread_mutex_lock(&harness->mutex);
    uint64_t seen = harness->notices;
    pthread_mutex_unlock(&harness->mutex);
    flap_block_request *request = flap_block_poll(harness->block);
    if (request != NULL)
      return request;
    pthread_mutex_lock(&harness->mutex);
    while (harness->notices == seen)
      pthread_cond_wait(&harness->news, &harness->mutex);
    pthread_mutex_unlock(&harness->mutex);
  }
}

void harness_run(block_harness *harness, flap_block_request *request) {
  flap_block_submit(harness->block, request);
  flap_block_flush(harness->block);
  ck_assert_ptr_eq(harness_wait(harness), request);
}

/* --- the model ------------------------------------------------------------------------------------------------ */

/* The content of a unit is a function of where it lies and which writing it is; version 0 is what was never written. */
static void fill_unit(unsigned char *data, uint64_t unit, uint32_t version) {
  uint64_t *words = (uint64_t *)(void *)data;
  for (uint64_t i = 0; i < UNIT / 8; i++)
    words[i] = version == 0 ? 0 : (unit << 32 ^ version) * 0x9E3779B97F4A7C15ull + i * 0xBF58476D1CE4E5B9ull;
}

typedef struct model {
  uint32_t *version; /* of each unit */
  bool *busy;        /* a request on the unit is in flight */
  uint64_t units;
  flap_block_request requests[SLOTS];
  uint32_t version_next;
  uint64_t draws;
  flap_philox stream;
  uint64_t moved[2];
} model;

static uint64_t draw(model *m, uint64_t bound) {
  return flap_philox_below(&m->stream, m->draws++, bound);
}

/* Makes the slot's request a random one that overlaps nothing in flight; false when the first guesses all did. */
static bool choose_request(model *m, flap_block_request *request, uint64_t slot_units) {
  for (int attempt = 0; attempt < 20; attempt++) {
    /* Small and large sizes alike. */
    uint64_t units = 1 + draw(m, (uint64_t)1 << draw(m, 12));
    if (units > slot_units)
      units = slot_units;
    if (units > m->units)
      units = m->units;
    uint64_t first = draw(m, m->units - units + 1);
    bool clash = false;
    for (uint64_t u = first; u < first + units; u++)
      clash = clash || m->busy[u];
    if (clash)
      continue;
    request->op = draw(m, 2) == 0 ? FLAP_BLOCK_READ : FLAP_BLOCK_WRITE;
    request->offset = first * UNIT;
    request->bytes = (uint32_t)(units * UNIT);
    return true;
  }
  return false;
}

static void start_request(model *m, block_harness *harness, flap_block_request *request) {
  uint64_t first = request->offset / UNIT;
  for (uint64_t u = 0; u < request->bytes / UNIT; u++) {
    m->busy[first + u] = true;
    unsigned char *data = (unsigned char *)request->buffer + u * UNIT;
    if (request->op == FLAP_BLOCK_WRITE)
      fill_unit(data, first + u, m->version[first + u] = ++m->version_next);
    else
      memset(data, 0xEE, UNIT);
  }
  m->moved[request->op] += request->bytes;
  flap_block_submit(harness->block, request);
}

static void check_request(model *m, block_harness *harness, flap_block_request *request) {
  ck_assert_msg(request->status == FLAP_OK, "%s", (flap_block_explain(harness->block, request), flap_error_message()));
  ck_assert_uint_le(request->started_ns, request->ended_ns);
  ck_assert_uint_gt(request->started_ns, 0);
  uint64_t first = request->offset / UNIT;
  unsigned char expected[UNIT] __attribute__((aligned(8)));
  for (uint64_t u = 0; u < request->bytes / UNIT; u++) {
    m->busy[first + u] = false;
    fill_unit(expected, first + u, m->version[first + u]);
    ck_assert_msg(memcmp((unsigned char *)request->buffer + u * UNIT, expected, UNIT) == 0,
                  "unit %llu of the space is not what was written", (unsigned long long)(first + u));
  }
}

void harness_random_program(block_harness *harness, uint64_t seed, uint32_t count) {
  model *m = calloc(1, sizeof *m);
  m->units = harness->config.bytes / UNIT;
  m->version = calloc(m->units, sizeof *m->version);
  m->busy = calloc(m->units, sizeof *m->busy);
  m->stream = flap_philox_stream(seed, "block program");
  uint64_t slot_units = harness->config.memory_bytes / SLOTS / UNIT;
  if (slot_units > FLAP_BLOCK_REQUEST_BYTES_MAX / UNIT)
    slot_units = FLAP_BLOCK_REQUEST_BYTES_MAX / UNIT;
  uint32_t started = 0, active = 0;
  bool in_use[SLOTS] = {false};
  for (uint32_t s = 0; s < SLOTS; s++)
    m->requests[s].buffer = harness->memory + s * slot_units * UNIT;
  while (started < count || active > 0) {
    for (uint32_t s = 0; s < SLOTS && started < count; s++) {
      if (in_use[s] || !choose_request(m, &m->requests[s], slot_units))
        continue;
      in_use[s] = true;
      start_request(m, harness, &m->requests[s]);
      started++;
      active++;
    }
    flap_block_flush(harness->block);
    flap_block_request *request = harness_wait(harness);
    do {
      check_request(m, harness, request);
      in_use[request - m->requests] = false;
      active--;
    } while ((request = flap_block_poll(harness->block)) != NULL);
  }
  ck_assert_uint_gt(m->moved[FLAP_BLOCK_READ], 0);
  ck_assert_uint_gt(m->moved[FLAP_BLOCK_WRITE], 0);
  free(m->version);
  free(m->busy);
  free(m);
}

/* --- the process and its folders ------------------------------------------------------------------------------ */

bool harness_folder_is_empty(const char *path) {
  DIR *folder = opendir(path);
  ck_assert_ptr_nonnull(folder);
  uint32_t count = 0;
  while (readdir(folder) != NULL)
    count++;
  closedir(folder);
  return count == 2; /* itself and its parent */
}

uint32_t harness_count_descriptors(void) {
  DIR *folder = opendir("/proc/self/fd");
  ck_assert_ptr_nonnull(folder);
  uint32_t count = 0;
  while (readdir(folder) != NULL)
    count++;
  closedir(folder);
  return count;
}

void harness_check_refused(const flap_block_config *config, flap_status status, const char *text) {
  uint32_t before = harness_count_descriptors();
  flap_block *block = (flap_block *)(void *)&before;
  ck_assert_msg(flap_block_open(config, &block) == status, "%s", flap_error_message());
  ck_assert_ptr_null(block);
  ck_assert_msg(strstr(flap_error_message(), text) != NULL, "\"%s\" lacks \"%s\"", flap_error_message(), text);
  ck_assert_uint_eq(harness_count_descriptors(), before);
}

int harness_in_child(int (*fn)(void *context), void *context) {
  fflush(NULL);
  pid_t child = fork();
  ck_assert_int_ge(child, 0);
  if (child == 0)
    _exit(fn(context));
  int status = 0;
  ck_assert_int_eq(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
