#include "tests/pager/pager_cases.h"

#include "base/philox.h"
#include "base/units.h"
#include "pager/pager_internal.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- making a case -------------------------------------------------------------------------------------- */

typedef struct draw {
  flap_philox stream;
  uint64_t next;
} draw;

static uint32_t below(draw *d, uint32_t bound) {
  return (uint32_t)flap_philox_below(&d->stream, d->next++, bound);
}
static bool chance(draw *d, uint32_t percent) {
  return below(d, 100) < percent;
}

uint64_t case_first_seed(void) {
  const char *text = getenv("FLAP_TEST_SEED");
  uint64_t seed = text ? strtoull(text, NULL, 10) : 20240607;
  printf("FLAP_TEST_SEED=%llu\n", (unsigned long long)seed);
  return seed;
}

static void make_regions(test_case *c, draw *d, case_homes homes, uint32_t scale) {
  flap_pager_config *config = &c->config;
  config->page_bytes = FLAP_BLOCK_ALIGN * (1 + below(d, chance(d, 50) ? 16 : 4));
  config->transfer_bytes = config->page_bytes * (1 + below(d, 4));
  config->ring_count = 1 + below(d, CASE_RINGS_MAX);
  config->region_count = 2 + below(d, CASE_REGIONS_MAX - 1);
  static const char *const names[CASE_RINGS_MAX] = {"weights", "states", "activations"};
  for (uint32_t i = 0; i < config->ring_count; i++)
    c->rings[i] = (flap_pager_ring){.name = names[i], .slot_bytes = FLAP_BLOCK_ALIGN};
  uint32_t kept = 0;
  for (uint32_t i = 0; i < config->region_count; i++) {
    flap_pager_region *region = &c->regions[i];
    region->bytes = FLAP_BLOCK_ALIGN * (1 + below(d, chance(d, 20) ? 64 * scale : 8 * scale));
    region->ring = chance(d, 15) ? FLAP_PAGER_RESIDENT : below(d, config->ring_count);
    region->element_bytes = (uint8_t)(i % 4 == 3 ? 0 : 1 << i % 4);
    region->klass = (uint8_t)(i % FLAP_PAGER_CLASSES_MAX);
    uint32_t pages = (uint32_t)((region->bytes + config->page_bytes - 1) / config->page_bytes);
    region->ram_pages = homes == HOMES_RAM ? pages : homes == HOMES_DISK ? 0 : below(d, pages + 1);
    c->filled[i] = chance(d, 80);
    if (region->ring == FLAP_PAGER_RESIDENT) {
      region->ram_pages = 0;
      continue;
    }
    c->for_jobs[i] = homes != HOMES_DISK && chance(d, 25);
    if (c->for_jobs[i]) {
      region->ram_pages = pages;
      if (chance(d, 30)) {
        region->ring = FLAP_PAGER_HOST;
        continue;
      }
      if (chance(d, 40) && kept < CASE_KEPT_MAX) {
        region->ring = config->ring_count + kept++;
        c->rings[region->ring] =
            (flap_pager_ring){.name = "kept", .slot_bytes = region->bytes, .slots = 1, .keeps = true};
        continue;
      }
    }
    if (c->rings[region->ring].slot_bytes < region->bytes)
      c->rings[region->ring].slot_bytes = region->bytes;
  }
  config->ring_count += kept;
  config->regions = c->regions;
  config->rings = c->rings;
}

typedef struct maker {
  draw *d;
  test_case *c;
  bool holds[CASE_REGIONS_MAX], pinned[CASE_REGIONS_MAX];
  uint32_t live[CASE_RINGS_MAX + CASE_KEPT_MAX];
  uint32_t live_leases[CASE_LEASES_MAX], live_count;
  bool jobs;
} maker;

static void push(test_case *c, action_kind kind, uint32_t index) {
  ck_assert_uint_lt(c->action_count, CASE_ACTIONS_MAX);
  c->actions[c->action_count++] = (action){.kind = kind, .index = index};
}

static bool is_kept(const test_case *c, uint32_t region) {
  return c->regions[region].ring < FLAP_PAGER_HOST && c->rings[c->regions[region].ring].keeps;
}

/* A job of some regions that hold something and that nobody has pinned. */
static void make_job(maker *m, uint32_t program) {
  test_case *c = m->c;
  uint32_t wanted = 1 + below(m->d, FLAP_PAGER_JOB_LEASES_MAX), first = c->lease_counts[program], count = 0;
  uint32_t start = below(m->d, c->config.region_count);
  for (uint32_t i = 0; i < c->config.region_count && count < wanted && first + count < CASE_LEASES_MAX; i++) {
    uint32_t region = (start + i) % c->config.region_count;
    if (!c->for_jobs[region] || m->pinned[region] || !m->holds[region])
      continue;
    flap_lease_mode mode = chance(m->d, 70) || is_kept(c, region) ? FLAP_LEASE_UPDATE : FLAP_LEASE_CONSUME;
    m->holds[region] = mode != FLAP_LEASE_CONSUME;
    c->leases[program][first + count++] =
        (flap_lease){.region = region, .mode = mode, .host_bytes = c->regions[region].bytes};
  }
  if (count == 0)
    return;
  c->lease_counts[program] += count;
  push(c, ACTION_JOB, first);
  c->actions[c->action_count - 1].count = count;
}

static bool make_pin(maker *m, uint32_t program) {
  test_case *c = m->c;
  uint32_t region = below(m->d, c->config.region_count);
  if (m->pinned[region] || m->live_count == 8 || c->regions[region].ring == FLAP_PAGER_HOST)
    return false;
  if (is_kept(c, region) && !m->holds[region])
    return false;
  flap_lease_mode mode = (flap_lease_mode)below(m->d, 5);
  if (chance(m->d, 50))
    mode = chance(m->d, 50) ? FLAP_LEASE_READ : FLAP_LEASE_UPDATE;
  if (!m->holds[region] && mode != FLAP_LEASE_SCRATCH)
    mode = FLAP_LEASE_CREATE;
  if (is_kept(c, region))
    mode = FLAP_LEASE_READ;
  uint32_t index = c->lease_counts[program]++;
  c->leases[program][index] = (flap_lease){.region = region, .mode = mode};
  m->pinned[region] = true;
  m->live_leases[m->live_count++] = index;
  uint32_t ring = c->regions[region].ring;
  if (ring != FLAP_PAGER_RESIDENT && ++m->live[ring] > c->rings[ring].slots)
    c->rings[ring].slots = m->live[ring];
  push(c, ACTION_PIN, index);
  return true;
}

static void make_unpin(maker *m, uint32_t program) {
  test_case *c = m->c;
  uint32_t which = below(m->d, m->live_count), index = m->live_leases[which];
  m->live_leases[which] = m->live_leases[--m->live_count];
  flap_lease lease = c->leases[program][index];
  m->pinned[lease.region] = false;
  if (lease.mode == FLAP_LEASE_CREATE)
    m->holds[lease.region] = true;
  else if (lease.mode == FLAP_LEASE_CONSUME || lease.mode == FLAP_LEASE_SCRATCH)
    m->holds[lease.region] = false;
  if (c->regions[lease.region].ring != FLAP_PAGER_RESIDENT)
    m->live[c->regions[lease.region].ring]--;
  push(c, ACTION_UNPIN, index);
}

static void make_program(maker *m, uint32_t program, bool last) {
  test_case *c = m->c;
  uint32_t leases = below(m->d, CASE_LEASES_MAX + 1);
  uint32_t tries = 0;
  bool next_begun = last;
  while (c->lease_counts[program] < leases || m->live_count > 0) {
    if (++tries == 20 * CASE_LEASES_MAX) /* all that is left may be regions of jobs that hold nothing */
      leases = c->lease_counts[program];
    if (!next_begun && chance(m->d, 4)) { /* handed over ahead of time */
      push(c, ACTION_BEGIN, program + 1);
      next_begun = true;
    }
    if (m->jobs && c->lease_counts[program] < leases && chance(m->d, 15))
      make_job(m, program);
    else if (c->lease_counts[program] < leases && chance(m->d, 45))
      (void)make_pin(m, program);
    else if (m->live_count > 0 && (chance(m->d, 60) || c->lease_counts[program] == leases))
      make_unpin(m, program);
    else if (chance(m->d, 20))
      push(c, ACTION_COMPUTE, 0);
  }
  push(c, ACTION_END, program);
  if (!next_begun) {
    if (chance(m->d, 50)) {
      push(c, ACTION_SETTLE, 0);
      uint32_t region = below(m->d, c->config.region_count);
      push(c, ACTION_REFILL, region);
      m->holds[region] = true;
    }
    push(c, ACTION_BEGIN, program + 1);
  }
}

void case_make(test_case *c, uint64_t seed, case_homes homes, bool tight, uint32_t scale) {
  memset(c, 0, sizeof *c);
  c->seed = seed;
  draw d = {.stream = flap_philox_stream(seed, "pager case")};
  make_regions(c, &d, homes, scale);
  maker m = {.d = &d, .c = c, .jobs = homes != HOMES_DISK};
  memcpy(m.holds, c->filled, sizeof m.holds);
  c->program_count = 1 + below(&d, CASE_PROGRAMS_MAX);
  push(c, ACTION_BEGIN, 0);
  for (uint32_t i = 0; i < c->program_count; i++)
    make_program(&m, i, i + 1 == c->program_count);
  for (uint32_t i = 0; i < c->config.ring_count; i++)
    if (!c->rings[i].keeps)
      c->rings[i].slots += c->rings[i].slots == 0 ? 1 : tight ? 0 : below(&d, 3);
  c->config.read_buffers = tight ? 1 : 1 + below(&d, 4);
  c->config.write_buffers = tight ? 1 : 1 + below(&d, 4);
  c->config.leases_max = c->config.jobs_max = CASE_LEASES_MAX;
  c->config.copy_bytes = c->config.page_bytes * below(&d, 7);
  c->config.workers = below(&d, 4);
  c->config.compression = (flap_compression)below(&d, 3);
  c->config.disk_rates = (flap_duplex){.alone_bytes = 1e6, .other_alone_bytes = 1e6};
  c->config.shared_cores = chance(&d, 50);
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
  disk->disk_count = 1 + (uint32_t)(c->seed / 5 % 3);
  for (uint32_t i = 0; i < disk->disk_count; i++) /* of different sizes, and a little too large */
    disk->disks[i] =
        (flap_block_disk){.path = path,
                          .bytes = flap_units_round_up(sizes.disk_bytes / disk->disk_count + 1, disk->stripe_bytes) +
                                   i * disk->stripe_bytes,
                          .weight = c->seed / 15 % 2 ? 1 + (c->seed / 30 + i) % 5 : 0};
}

uint64_t case_saved_bytes, case_rereads;

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
  }
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
  flap_pager_unpin(r->pager, index);
  r->pinned[index] = NULL;
  if (lease.mode != FLAP_LEASE_READ)
    r->holds[lease.region] = pager_stores(lease.mode);
}

static flap_status act(runner *r, action a) {
  switch (a.kind) {
  case ACTION_BEGIN:
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
    return FLAP_OK;
  case ACTION_SETTLE:
    return flap_pager_settle(r->pager);
  case ACTION_REFILL:
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
    ck_assert_uint_le(stats.disk_bytes[i], of_disks[i]);
    ck_assert(c->config.compression != FLAP_COMPRESSION_OFF || stats.disk_bytes[i] == of_disks[i]);
    if (c->config.compression == FLAP_COMPRESSION_LZ4)
      case_saved_bytes += of_disks[i] - stats.disk_bytes[i];
  }
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    ck_assert_msg(stats.bytes[lane] == predicted[lane], "seed %llu: %s moved %llu bytes, predicted %llu",
                  (unsigned long long)c->seed, flap_pager_lane_name((flap_lane)lane),
                  (unsigned long long)stats.bytes[lane], (unsigned long long)predicted[lane]);
}

static flap_status run_all(runner *r) {
  const test_case *c = r->c;
  for (uint32_t i = 0; i < c->config.region_count; i++)
    if (c->filled[i])
      FLAP_TRY(fill_region(r, i));
  for (uint32_t i = 0; i < c->action_count; i++) {
    FLAP_TRY(act(r, c->actions[i]));
    if (i + 1 == c->close_after)
      return FLAP_OK;
  }
  FLAP_TRY(flap_pager_settle(r->pager));
  check_bytes_moved(c, r->pager);
  for (uint32_t i = 0; i < c->config.region_count; i++) {
    visit v = {.r = r, .region = i};
    if (!r->holds[i])
      continue;
    FLAP_TRY(flap_pager_drain(r->pager, i, drain_piece, &v));
    ck_assert_uint_eq(v.next, c->regions[i].bytes);
  }
  check_bytes_moved(c, r->pager); /* fill and drain do not count */
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

static void check_canary(const unsigned char *canary, const char *where) {
  for (uint32_t i = 0; i < CANARY_BYTES; i++)
    ck_assert_msg(canary[i] == 0xa5, "byte %u past the pager's part of %s was written", i, where);
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
  if (status != FLAP_OK)
    check_sticky(r, status);
  check_canary(vram_canary, "vram");
  flap_pager_close(r->pager);
  check_canary(ram_canary, "ram");
  return status;
}

flap_status case_run(const test_case *c) {
  runner r = {.c = c};
  flap_pager_config config = c->config;
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  config.device.kind = FLAP_DEVICE_CPU;
  config.device.vram_bytes = sizes.vram_bytes + CANARY_BYTES;
  flap_arena arena;
  ck_assert_int_eq(flap_arena_open(&arena, "ram", sizes.ram_bytes + CANARY_BYTES), FLAP_OK);
  for (uint32_t i = 0; i < c->config.region_count; i++)
    r.plain[i] = calloc(1, c->regions[i].bytes);
  flap_status status = run_between_canaries(&r, &config, &arena, &sizes);
  free_jobs(&r);
  for (uint32_t i = 0; i < c->config.region_count; i++)
    free(r.plain[i]);
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
