#include "tests/pager/pager_cases.h"

#include "base/philox.h"
#include "base/units.h"
#include "pager/pager_internal.h"
#include "tests/pager/kept_values.h"

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what a case moves ---------------------------------------------------------------------------------------- */

static bool is_kept(const test_case *c, uint32_t region) {
  return c->regions[region].ring < FLAP_PAGER_HOST && c->rings[c->regions[region].ring].keeps;
}

/* What rings that keep load: at the first lease of a program, and at the first behind a job. */
static uint64_t kept_bytes(const test_case *c) {
  bool loaded[CASE_REGIONS_MAX] = {false};
  uint64_t bytes = 0;
  uint32_t program = 0;
  for (uint32_t i = 0; i < c->action_count; i++) {
    const action *a = &c->actions[i];
    const flap_lease *lease = &c->leases[program][a->index];
    if (a->kind == ACTION_END) {
      program++;
      memset(loaded, 0, sizeof loaded);
    } else if (a->kind == ACTION_PIN && is_kept(c, lease->region) && !loaded[lease->region]) {
      loaded[lease->region] = true;
      bytes += c->regions[lease->region].bytes;
    }
    for (uint32_t j = 0; a->kind == ACTION_JOB && j < a->count; j++)
      loaded[lease[j].region] = false;
  }
  return bytes;
}

void case_predict(const test_case *c, uint64_t bytes_out[FLAP_LANE_COUNT]) {
  memset(bytes_out, 0, sizeof(uint64_t) * FLAP_LANE_COUNT);
  for (uint32_t i = 0; i < c->program_count; i++) {
    uint64_t bytes[FLAP_LANE_COUNT];
    flap_lease others[CASE_LEASES_MAX];
    uint32_t count = 0;
    for (uint32_t j = 0; j < c->lease_counts[i]; j++)
      if (!is_kept(c, c->leases[i][j].region) || c->leases[i][j].host_bytes > 0)
        others[count++] = c->leases[i][j];
    flap_pager_predict(&c->config, others, count, bytes);
    for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
      bytes_out[lane] += bytes[lane];
  }
  bytes_out[FLAP_LANE_H2D] += kept_bytes(c);
}

void case_set_disk(test_case *c, flap_block_backend backend, const char *path) {
  flap_pager_sizes sizes;
  flap_pager_measure(&c->config, &sizes);
  flap_block_config *disk = &c->config.disk;
  disk->backend = backend;
  disk->stripe_bytes = FLAP_BLOCK_ALIGN << c->seed % 5;
  disk->disk_count = c->config.shared_folder != NULL ? 1 : 1 + (uint32_t)(c->seed / 5 % 3);
  for (uint32_t i = 0; i < disk->disk_count; i++) /* of different sizes, and a little too large */
    disk->disks[i] =
        (flap_block_disk){.path = path,
                          .bytes = flap_units_round_up(sizes.disk_bytes / disk->disk_count + 1, disk->stripe_bytes) +
                                   i * disk->stripe_bytes,
                          .weight = c->seed / 15 % 2 ? 1 + (c->seed / 30 + i) % 5 : 0};
}

uint64_t case_saved_bytes, case_packable_bytes, case_pooled_bytes, case_rereads, case_snapshots;
uint64_t case_kept_pages, case_unkept;

/* ---- bytes ---------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
  return x ^ (x >> 32);
}

/* Every other time the words are such that they can be compressed. */
static uint64_t mask_of(uint64_t key) {
  return key % 2 ? UINT64_MAX : 0x0003000000030000;
}

static void write_words(void *memory, uint64_t bytes, uint64_t key) {
  uint64_t *words = memory, mask = mask_of(key);
  for (uint64_t i = 0; i < bytes / 8; i++)
    words[i] = mix(key + i) & mask;
}

static void stir_words(void *memory, uint64_t bytes, uint64_t key) {
  uint64_t *words = memory, mask = mask_of(key);
  for (uint64_t i = 0; i < bytes / 8; i++)
    words[i] = (words[i] * 6364136223846793005ull + mix(key + i)) & mask;
}

/* ---- running on the cpu device --------------------------------------------------------------------------- */

/* A snapshot in progress. What each region must hold is copied before the call that makes its value complete. */
typedef struct snapshot_run {
  bool open;
  atomic_bool over;
  pthread_t thread;
  uint32_t stop_after; /* regions */
  bool wanted[CASE_REGIONS_MAX];
  uint32_t changes_left[CASE_REGIONS_MAX];
  unsigned char *expected[CASE_REGIONS_MAX];
  flap_status status;
} snapshot_run;

typedef struct runner {
  const test_case *c;
  flap_pager *pager;
  unsigned char *plain[CASE_REGIONS_MAX]; /* what every region should hold */
  bool holds[CASE_REGIONS_MAX];
  uint32_t program; /* the oldest */
  void *pinned[CASE_LEASES_MAX];
  uint64_t time; /* counts uses, so that every change is another one */
  struct job_run *jobs[CASE_ACTIONS_MAX];
  uint32_t job_count;
  uint32_t begun, next_lease;     /* programs; of the oldest, to be pinned or handed over */
  bool released[CASE_LEASES_MAX]; /* of the oldest */
  flap_philox snapshot_draw;
  uint64_t drawn;
  snapshot_run snapshot;
  kept_values *kept;    /* of what is shared; NULL: nothing is */
  bool snapshot_failed; /* not because the test stopped it: the pager must have failed */
} runner;

typedef struct visit {
  runner *r;
  uint32_t region;
  uint64_t next; /* pieces come in order */
} visit;

static flap_status fill_piece(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  visit *v = context;
  ck_assert_uint_eq(offset, v->next);
  ck_assert(bytes > 0 && bytes <= v->r->c->config.transfer_bytes);
  v->next += bytes;
  memcpy(memory, v->r->plain[v->region] + offset, bytes);
  return FLAP_OK;
}

static flap_status drain_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  visit *v = context;
  ck_assert_uint_eq(offset, v->next);
  v->next += bytes;
  ck_assert_msg(memcmp(memory, v->r->plain[v->region] + offset, bytes) == 0,
                "seed %llu: region %u differs when drained, in the %llu bytes at %llu",
                (unsigned long long)v->r->c->seed, v->region, (unsigned long long)bytes, (unsigned long long)offset);
  return FLAP_OK;
}

static flap_status fill_region(runner *r, uint32_t region) {
  write_words(r->plain[region], r->c->regions[region].bytes, mix(r->c->seed ^ (region + 1000 * r->time++)));
  visit v = {.r = r, .region = region};
  r->holds[region] = false;
  FLAP_TRY(flap_pager_fill(r->pager, region, fill_piece, &v));
  ck_assert_uint_eq(v.next, r->c->regions[region].bytes);
  r->holds[region] = true;
  return FLAP_OK;
}

/* ---- snapshots ---- */

static uint32_t draw_below(runner *r, uint32_t bound) {
  return (uint32_t)flap_philox_below(&r->snapshot_draw, r->drawn++, bound);
}

/* In the midst of its piece, now and then: whoever drains may stop at any. */
static flap_status compare_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  visit *v = context;
  ck_assert_uint_eq(offset, v->next);
  v->next += bytes;
  ck_assert_msg(memcmp(memory, v->r->snapshot.expected[v->region] + offset, bytes) == 0,
                "seed %llu: region %u differs in a snapshot, in the %llu bytes at %llu",
                (unsigned long long)v->r->c->seed, v->region, (unsigned long long)bytes, (unsigned long long)offset);
  return v->r->snapshot.stop_after == 0 ? flap_error_set(FLAP_IO, "the test stops here") : FLAP_OK;
}

static flap_status note_extent(void *context, const flap_pager_extent *extent) {
  visit *v = context;
  ck_assert_uint_eq(extent->offset, v->next);
  v->next += extent->bytes;
  kept_add(v->r->kept, v->region, v->r->c->config.page_bytes, extent,
           v->r->snapshot.expected[v->region] + extent->offset);
  return v->r->snapshot.stop_after == 0 ? flap_error_set(FLAP_IO, "the test stops here") : FLAP_OK;
}

static flap_status drain_or_keep(runner *r, uint32_t region, bool keep, visit *v) {
  return keep && r->c->regions[region].shared ? flap_pager_keep(r->pager, region, compare_piece, note_extent, v)
                                              : flap_pager_drain(r->pager, region, compare_piece, v);
}

/* As a checkpoint does, that was written to its end or was not. */
static flap_status name_kept(runner *r, flap_status status) {
  FLAP_TRY(kept_name(r->kept, r->pager, status == FLAP_OK));
  return status;
}

static void *drain_snapshot(void *context) {
  runner *r = context;
  snapshot_run *s = &r->snapshot;
  const uint32_t count = r->c->config.region_count, start = (uint32_t)(r->c->seed % count);
  const bool keep = r->kept != NULL && flap_pager_can_keep(r->pager);
  case_unkept += r->kept != NULL && !keep;
  for (uint32_t i = 0; i < count && s->status == FLAP_OK; i++) {
    const uint32_t region = r->c->seed % 2 ? (start + i) % count : (start + count - i) % count;
    visit v = {.r = r, .region = region};
    if (!s->wanted[region])
      continue;
    s->status = drain_or_keep(r, region, keep, &v);
    ck_assert(s->status != FLAP_OK || v.next == r->c->regions[region].bytes);
    s->stop_after -= s->stop_after > 0;
  }
  if (keep)
    s->status = name_kept(r, s->status);
  flap_pager_snapshot_end(r->pager);
  if (keep && flap_pager_next_file(r->pager) != FLAP_OK)
    s->status = FLAP_IO;
  atomic_store(&s->over, true);
  return NULL;
}

static void keep_expected(runner *r, uint32_t region) {
  memcpy(r->snapshot.expected[region], r->plain[region], r->c->regions[region].bytes);
}

/* Before the call that tells the pager. */
static void note_change(runner *r, uint32_t region) {
  snapshot_run *s = &r->snapshot;
  if (s->open && s->changes_left[region] > 0 && --s->changes_left[region] == 0)
    keep_expected(r, region);
}

static void count_changes(runner *r, uint32_t program, uint32_t end) {
  for (uint32_t i = 0; i < end; i++) {
    const flap_lease *lease = &r->c->leases[program][i];
    if (lease->mode == FLAP_LEASE_READ || (program == r->program && r->released[i]))
      continue;
    r->snapshot.changes_left[lease->region]++;
    r->snapshot.wanted[lease->region] = pager_stores(lease->mode);
  }
}

/* The first lease from `from` on of a program before which all others are unpinned, or its end. */
static uint32_t next_point(const test_case *c, uint32_t program, uint32_t from) {
  uint32_t at = 0, live = 0;
  for (uint32_t i = 0; i < c->action_count && at <= program; i++) {
    const action *a = &c->actions[i];
    at += a->kind == ACTION_END;
    if (at != program)
      continue;
    if ((a->kind == ACTION_PIN || a->kind == ACTION_JOB) && live == 0 && a->index >= from)
      return a->index;
    live += a->kind == ACTION_PIN;
    live -= a->kind == ACTION_UNPIN;
  }
  return c->lease_counts[program];
}

static void begin_snapshot(runner *r) {
  snapshot_run *s = &r->snapshot;
  const uint32_t last = r->begun - 1, queued = r->begun - r->program;
  const uint32_t pinned = queued == 1 ? r->next_lease : 0;
  const uint32_t from = queued == 0 ? 0 : pinned + draw_below(r, r->c->lease_counts[last] - pinned + 1);
  const uint32_t until = queued == 0 ? 0 : next_point(r->c, last, from);
  s->open = true;
  s->status = FLAP_OK;
  s->stop_after = draw_below(r, 5) == 0 ? draw_below(r, 4) : UINT32_MAX;
  atomic_store(&s->over, false);
  memset(s->changes_left, 0, sizeof s->changes_left);
  memcpy(s->wanted, r->holds, sizeof s->wanted);
  for (uint32_t i = r->program; i < r->begun; i++)
    count_changes(r, i, i == last ? until : r->c->lease_counts[i]);
  for (uint32_t i = 0; i < r->c->config.region_count; i++) {
    s->wanted[i] &= r->c->regions[i].in_snapshots;
    if (s->changes_left[i] == 0)
      keep_expected(r, i);
  }
  flap_pager_snapshot_begin(r->pager, until);
  ck_assert_int_eq(pthread_create(&s->thread, NULL, drain_snapshot, r), 0);
}

/* `ends`: nothing more is coming. */
static void join_snapshot(runner *r, bool ends) {
  snapshot_run *s = &r->snapshot;
  if (!s->open)
    return;
  if (ends)
    flap_pager_snapshot_cut_off(r->pager);
  ck_assert_int_eq(pthread_join(s->thread, NULL), 0);
  s->open = false;
  case_snapshots += s->status == FLAP_OK;
  r->snapshot_failed |= s->status != FLAP_OK && s->stop_after > 0;
}

static void look_after_snapshot(runner *r) {
  if (!r->c->snapshots)
    return;
  if (r->snapshot.open && atomic_load(&r->snapshot.over))
    join_snapshot(r, false);
  if (!r->snapshot.open && draw_below(r, 10) == 0)
    begin_snapshot(r);
}

static void check_bytes(const runner *r, uint32_t index, const char *when) {
  flap_lease lease = r->c->leases[r->program][index];
  uint64_t bytes = r->c->regions[lease.region].bytes;
  const unsigned char *here = r->pinned[index], *plain = r->plain[lease.region];
  if (memcmp(here, plain, bytes) == 0)
    return;
  uint64_t at = 0;
  while (here[at] == plain[at])
    at++;
  ck_abort_msg("seed %llu: program %u, lease %u (region %u, mode %d) differs from byte %llu of %llu on, %s",
               (unsigned long long)r->c->seed, r->program, index, lease.region, (int)lease.mode, (unsigned long long)at,
               (unsigned long long)bytes, when);
}

static flap_status pin(runner *r, uint32_t index) {
  flap_lease lease = r->c->leases[r->program][index];
  uint64_t bytes = r->c->regions[lease.region].bytes;
  FLAP_TRY(flap_pager_pin(r->pager, index, &r->pinned[index]));
  r->next_lease++;
  ck_assert((uintptr_t)r->pinned[index] % FLAP_BLOCK_ALIGN == 0);
  if (pager_loads(lease.mode)) {
    check_bytes(r, index, "at its pin");
    return FLAP_OK;
  }
  uint64_t key = mix(r->c->seed + r->time++);
  write_words(r->pinned[index], bytes, key);
  write_words(r->plain[lease.region], bytes, key);
  return FLAP_OK;
}

/* Every pinned region's bytes go into what the changing ones become. */
static uint64_t digest(const runner *r, bool plain) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < r->c->lease_counts[r->program]; i++) {
    if (!r->pinned[i])
      continue;
    uint32_t region = r->c->leases[r->program][i].region;
    const uint64_t *words = plain ? (const void *)r->plain[region] : r->pinned[i];
    for (uint64_t j = 0; j < r->c->regions[region].bytes / 8; j += 61)
      sum = mix(sum + words[j]);
  }
  return sum;
}

static void compute(runner *r) {
  uint64_t key = digest(r, false) + r->time, plain_key = digest(r, true) + r->time;
  r->time++;
  for (uint32_t i = 0; i < r->c->lease_counts[r->program]; i++) {
    flap_lease lease = r->c->leases[r->program][i];
    if (!r->pinned[i] || lease.mode == FLAP_LEASE_READ || lease.mode == FLAP_LEASE_CONSUME)
      continue;
    stir_words(r->pinned[i], r->c->regions[lease.region].bytes, key);
    stir_words(r->plain[lease.region], r->c->regions[lease.region].bytes, plain_key);
  }
}

/* Checks what its regions hold when it runs, and changes them as the plain ones were when it was handed over. */
typedef struct job_run {
  uint64_t seed, key;
  uint32_t count;
  flap_lease leases[FLAP_PAGER_JOB_LEASES_MAX];
  uint64_t bytes[FLAP_PAGER_JOB_LEASES_MAX];
  unsigned char *expected[FLAP_PAGER_JOB_LEASES_MAX];
} job_run;

static void run_job(void *context, void *const memory[]) {
  job_run *j = context;
  for (uint32_t i = 0; i < j->count; i++) {
    ck_assert_msg(memcmp(memory[i], j->expected[i], j->bytes[i]) == 0,
                  "seed %llu: a job finds other bytes in region %u", (unsigned long long)j->seed, j->leases[i].region);
    if (j->leases[i].mode == FLAP_LEASE_UPDATE)
      stir_words(memory[i], j->bytes[i], j->key);
    else if (j->leases[i].mode == FLAP_LEASE_CONSUME)
      memset(memory[i], 0xee, j->bytes[i]);
    free(j->expected[i]);
    j->expected[i] = NULL;
  }
}

static void hand_over_job(runner *r, action a) {
  ck_assert_uint_lt(r->job_count, CASE_ACTIONS_MAX);
  job_run *j = r->jobs[r->job_count++] = calloc(1, sizeof *j);
  j->seed = r->c->seed;
  j->key = mix(r->c->seed + r->time++);
  j->count = a.count;
  for (uint32_t i = 0; i < a.count; i++) {
    flap_lease lease = j->leases[i] = r->c->leases[r->program][a.index + i];
    uint64_t bytes = j->bytes[i] = r->c->regions[lease.region].bytes;
    j->expected[i] = malloc(bytes);
    memcpy(j->expected[i], r->plain[lease.region], bytes);
    if (lease.mode == FLAP_LEASE_UPDATE)
      stir_words(r->plain[lease.region], bytes, j->key);
    r->holds[lease.region] = lease.mode == FLAP_LEASE_UPDATE;
    r->released[a.index + i] = true;
    note_change(r, lease.region);
  }
  r->next_lease += a.count;
  flap_pager_run_job(r->pager, a.index, a.count, &(flap_pager_job){.run = run_job, .context = j});
}

static void free_jobs(runner *r) {
  for (uint32_t i = 0; i < r->job_count; i++) {
    for (uint32_t k = 0; k < FLAP_PAGER_JOB_LEASES_MAX; k++)
      free(r->jobs[i]->expected[k]); /* of one that never ran */
    free(r->jobs[i]);
  }
}

static void unpin(runner *r, uint32_t index) {
  flap_lease lease = r->c->leases[r->program][index];
  check_bytes(r, index, "at its unpin");
  if (lease.mode == FLAP_LEASE_UPDATE) {
    uint64_t key = mix(r->time++);
    stir_words(r->pinned[index], r->c->regions[lease.region].bytes, key);
    stir_words(r->plain[lease.region], r->c->regions[lease.region].bytes, key);
  }
  if (lease.mode != FLAP_LEASE_READ)
    note_change(r, lease.region);
  r->released[index] = true;
  flap_pager_unpin(r->pager, index);
  r->pinned[index] = NULL;
  if (lease.mode != FLAP_LEASE_READ)
    r->holds[lease.region] = pager_stores(lease.mode);
}

static flap_status act(runner *r, action a) {
  switch (a.kind) {
  case ACTION_BEGIN:
    r->begun++;
    return flap_pager_begin(r->pager, r->c->leases[a.index], r->c->lease_counts[a.index]);
  case ACTION_PIN:
    return pin(r, a.index);
  case ACTION_COMPUTE:
    compute(r);
    return FLAP_OK;
  case ACTION_UNPIN:
    unpin(r, a.index);
    return FLAP_OK;
  case ACTION_JOB:
    hand_over_job(r, a);
    return FLAP_OK;
  case ACTION_END:
    FLAP_TRY(flap_pager_end(r->pager));
    r->program++;
    r->next_lease = 0;
    memset(r->released, 0, sizeof r->released);
    return FLAP_OK;
  case ACTION_SETTLE:
    return flap_pager_settle(r->pager);
  case ACTION_REFILL:
    join_snapshot(r, false);
    return fill_region(r, a.index);
  }
  return FLAP_OK;
}

static void check_bytes_moved(const test_case *c, flap_pager *pager) {
  flap_pager_stats stats;
  uint64_t predicted[FLAP_LANE_COUNT];
  flap_pager_get_stats(pager, &stats);
  case_predict(c, predicted);
  const uint64_t of_disks[] = {stats.bytes[FLAP_LANE_DISK_READ], stats.bytes[FLAP_LANE_DISK_WRITE]};
  for (int i = 0; i < 2; i++) {
    ck_assert_uint_le(stats.disk_bytes[i], of_disks[i] - stats.pooled_bytes[i]);
    case_pooled_bytes += stats.pooled_bytes[i];
    ck_assert(c->config.compression != FLAP_COMPRESSION_OFF || stats.disk_bytes[i] == of_disks[i]);
    if (c->config.compression > FLAP_COMPRESSION_AUTO && c->config.page_bytes > FLAP_BLOCK_ALIGN) {
      case_saved_bytes += of_disks[i] - stats.pooled_bytes[i] - stats.disk_bytes[i];
      case_packable_bytes += of_disks[i] - stats.pooled_bytes[i];
    }
  }
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    ck_assert_msg(stats.bytes[lane] == predicted[lane], "seed %llu: %s moved %llu bytes, predicted %llu",
                  (unsigned long long)c->seed, flap_pager_lane_name((flap_lane)lane),
                  (unsigned long long)stats.bytes[lane], (unsigned long long)predicted[lane]);
}

static flap_status run_all(runner *r) {
  const test_case *c = r->c;
  if (r->kept != NULL)
    FLAP_TRY(flap_pager_next_file(r->pager));
  for (uint32_t i = 0; i < c->config.region_count; i++)
    if (c->filled[i])
      FLAP_TRY(fill_region(r, i));
  for (uint32_t i = 0; i < c->action_count; i++) {
    look_after_snapshot(r);
    FLAP_TRY(act(r, c->actions[i]));
    if (i + 1 == c->close_after)
      return FLAP_OK;
  }
  FLAP_TRY(flap_pager_settle(r->pager));
  join_snapshot(r, false);
  FLAP_TRY(flap_pager_settle(r->pager));
  ck_assert(!r->snapshot_failed);
  check_bytes_moved(c, r->pager);
  for (uint32_t i = 0; i < c->config.region_count; i++) {
    visit v = {.r = r, .region = i};
    if (!r->holds[i])
      continue;
    FLAP_TRY(flap_pager_drain(r->pager, i, drain_piece, &v));
    ck_assert_uint_eq(v.next, c->regions[i].bytes);
  }
  check_bytes_moved(c, r->pager); /* fill and drain do not count */
  if (r->kept != NULL)
    case_kept_pages += kept_compare(r->kept);
  flap_pager_stats stats;
  flap_pager_get_stats(r->pager, &stats);
  case_rereads += stats.reread;
  return FLAP_OK;
}

/* The sticky status is what every call but close and stats gives from then on. */
static void check_sticky(runner *r, flap_status status) {
  char message[1024];
  snprintf(message, sizeof message, "%s", flap_error_message());
  void *memory = NULL;
  visit v = {.r = r};
  flap_pager_stats stats;
  ck_assert_int_eq(flap_pager_begin(r->pager, r->c->leases[0], 0), status);
  ck_assert_int_eq(flap_pager_pin(r->pager, 0, &memory), status);
  ck_assert_int_eq(flap_pager_end(r->pager), status);
  ck_assert_int_eq(flap_pager_settle(r->pager), status);
  ck_assert_int_eq(flap_pager_fill(r->pager, 0, fill_piece, &v), status);
  ck_assert_int_eq(flap_pager_drain(r->pager, 0, drain_piece, &v), status);
  ck_assert_str_eq(flap_error_message(), message);
  flap_pager_get_stats(r->pager, &stats);
}

#define CANARY_BYTES FLAP_BLOCK_ALIGN

/* One assertion: each is a system call. */
static void check_canary(const unsigned char *canary, const char *where) {
  uint32_t whole = 0;
  while (whole < CANARY_BYTES && canary[whole] == 0xa5)
    whole++;
  ck_assert_msg(whole == CANARY_BYTES, "byte %u past the pager's part of %s was written", whole, where);
}

/* The pager gets its part of an arena that goes on behind it, in RAM as in VRAM. */
static flap_status run_between_canaries(runner *r, const flap_pager_config *config, flap_arena *arena,
                                        const flap_pager_sizes *sizes) {
  flap_status status = flap_pager_open(config, arena, &r->pager);
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(arena->bytes_used, sizes->ram_bytes);
  unsigned char *ram_canary = flap_arena_take(arena, CANARY_BYTES, 1);
  flap_arena_seal(arena);
  uint64_t rest = 0;
  unsigned char *vram_canary = flap_pager_vram_rest(r->pager, &rest);
  ck_assert_uint_eq(rest, CANARY_BYTES);
  memset(ram_canary, 0xa5, CANARY_BYTES);
  memset(vram_canary, 0xa5, CANARY_BYTES);
  status = run_all(r);
  join_snapshot(r, true);
  if (status != FLAP_OK)
    check_sticky(r, status);
  check_canary(vram_canary, "vram");
  flap_pager_close(r->pager);
  check_canary(ram_canary, "ram");
  return status;
}

flap_status case_run(const test_case *c) {
  runner r = {.c = c, .snapshot_draw = flap_philox_stream(c->seed, "pager case snapshots")};
  flap_pager_config config = c->config;
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  config.device.kind = FLAP_DEVICE_CPU;
  config.device.vram_bytes = sizes.vram_bytes + CANARY_BYTES;
  flap_arena arena;
  ck_assert_int_eq(flap_arena_open(&arena, "ram", sizes.ram_bytes + CANARY_BYTES), FLAP_OK);
  for (uint32_t i = 0; i < c->config.region_count; i++) {
    r.plain[i] = calloc(1, c->regions[i].bytes);
    r.snapshot.expected[i] = calloc(1, c->regions[i].bytes);
  }
  if (config.shared_folder != NULL)
    r.kept = kept_open(config.shared_folder);
  flap_status status = run_between_canaries(&r, &config, &arena, &sizes);
  kept_close(r.kept);
  free_jobs(&r);
  for (uint32_t i = 0; i < c->config.region_count; i++) {
    free(r.plain[i]);
    free(r.snapshot.expected[i]);
  }
  flap_arena_close(&arena);
  return status;
}

/* ---- running on the sim device ---------------------------------------------------------------------------- */

static void sim_act(const test_case *c, flap_pager *pager, action a) {
  void *memory = NULL;
  switch (a.kind) {
  case ACTION_BEGIN:
    ck_assert_int_eq(flap_pager_begin(pager, c->leases[a.index], c->lease_counts[a.index]), FLAP_OK);
    break;
  case ACTION_PIN:
    ck_assert_int_eq(flap_pager_pin(pager, a.index, &memory), FLAP_OK);
    break;
  case ACTION_COMPUTE:
    flap_device_sim_kernel(flap_pager_device(pager), 1e6, 1e6, true);
    break;
  case ACTION_UNPIN:
    flap_pager_unpin(pager, a.index);
    break;
  case ACTION_JOB:
    flap_pager_run_job(pager, a.index, a.count,
                       &(flap_pager_job){.ns = 1000 * (1 + c->seed % 7 * a.index), .beside_copies_ns = 1500});
    break;
  case ACTION_END:
    ck_assert_int_eq(flap_pager_end(pager), FLAP_OK);
    break;
  case ACTION_SETTLE:
    ck_assert_int_eq(flap_pager_settle(pager), FLAP_OK);
    break;
  case ACTION_REFILL:
    ck_assert_int_eq(flap_pager_fill(pager, a.index, NULL, NULL), FLAP_OK);
    break;
  }
}

static void check_time(const test_case *c, flap_pager *pager, uint64_t elapsed_ns) {
  flap_pager_stats stats;
  flap_pager_get_stats(pager, &stats);
  uint64_t sum_ns = flap_device_busy_ns(flap_pager_device(pager), FLAP_STREAM_COMPUTE);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    sum_ns += stats.stall_ns[lane];
  ck_assert_msg(sum_ns == elapsed_ns, "seed %llu: %llu ns of compute and stalls in a run of %llu ns",
                (unsigned long long)c->seed, (unsigned long long)sum_ns, (unsigned long long)elapsed_ns);
}

uint64_t case_run_sim(const test_case *c, bool synchronous) {
  flap_pager_config config = c->config;
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  flap_clock *clock = NULL;
  flap_pager *pager = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  config.clock = clock;
  config.device.kind = FLAP_DEVICE_SIM;
  config.device.vram_bytes = sizes.vram_bytes;
  flap_device_default_machine(FLAP_DEVICE_CUDA, &config.device.machine);
  config.device.machine.synchronous = synchronous;
  memset(&config.disk, 0, sizeof config.disk);
  flap_arena arena;
  flap_arena_measure(&arena, "ram");
  flap_status status = flap_pager_open(&config, &arena, &pager);
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(arena.bytes_used, sizes.ram_bytes);
  for (uint32_t i = 0; i < config.region_count; i++)
    if (c->filled[i])
      ck_assert_int_eq(flap_pager_fill(pager, i, NULL, NULL), FLAP_OK);
  ck_assert_uint_eq(flap_clock_now_ns(clock), 0); /* filling takes no virtual time */
  uint64_t settling_ns = 0;
  for (uint32_t i = 0; i < c->action_count; i++) {
    uint64_t before_ns = flap_clock_now_ns(clock);
    sim_act(c, pager, c->actions[i]);
    if (c->actions[i].kind == ACTION_SETTLE)
      settling_ns += flap_clock_now_ns(clock) - before_ns;
    if (i + 1 == c->close_after)
      goto close;
  }
  if (synchronous)
    check_time(c, pager, flap_clock_now_ns(clock) - settling_ns);
  ck_assert_int_eq(flap_pager_settle(pager), FLAP_OK);
  check_bytes_moved(c, pager);
close:;
  uint64_t ns = flap_clock_now_ns(clock);
  flap_pager_close(pager);
  ck_assert(!flap_clock_advance(clock)); /* nothing of the pager's is left on the clock */
  flap_clock_close(clock);
  return ns;
}
