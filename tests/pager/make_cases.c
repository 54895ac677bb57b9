#include "tests/pager/pager_cases.h"

#include "base/philox.h"

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

/* Some cases have a ring that borrows from residents, of which they have more. */
static void choose_borrower(test_case *c) {
  draw d = {.stream = flap_philox_stream(c->seed, "pager loans")};
  c->lends = chance(&d, 30);
  c->borrower = below(&d, c->config.ring_count);
}

/* All that there is, or less. */
static void borrow(test_case *c) {
  draw d = {.stream = flap_philox_stream(c->seed, "pager borrowed slots")};
  uint64_t room = 0;
  for (uint32_t i = 0; i < c->config.region_count; i++)
    room += c->regions[i].lends ? c->regions[i].bytes / c->rings[c->borrower].slot_bytes : 0;
  c->rings[c->borrower].borrowed = chance(&d, 50) ? (uint32_t)room : below(&d, (uint32_t)room + 1);
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
  choose_borrower(c);
  uint32_t kept = 0;
  for (uint32_t i = 0; i < config->region_count; i++) {
    flap_pager_region *region = &c->regions[i];
    region->bytes = FLAP_BLOCK_ALIGN * (1 + below(d, chance(d, 20) ? 64 * scale : 8 * scale));
    region->ring = chance(d, c->lends ? 25 : 15) ? FLAP_PAGER_RESIDENT : below(d, config->ring_count);
    region->element_bytes = (uint8_t)(i % 4 == 3 ? 0 : 1 << i % 4);
    region->klass = (uint8_t)(i % FLAP_PAGER_CLASSES_MAX);
    uint32_t pages = (uint32_t)((region->bytes + config->page_bytes - 1) / config->page_bytes);
    region->ram_pages = homes == HOMES_RAM ? pages : homes == HOMES_DISK ? 0 : below(d, pages + 1);
    c->filled[i] = chance(d, 80);
    if (region->ring == FLAP_PAGER_RESIDENT) {
      region->ram_pages = 0;
      region->lends = c->lends;
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
  borrow(c);
  config->regions = c->regions;
  config->rings = c->rings;
}

/* Some regions share RAM. Those of jobs do not: what they empty is empty only once the job is over. */
static void make_overlays(test_case *c) {
  draw d = {.stream = flap_philox_stream(c->seed, "pager overlays")};
  const uint32_t overlays = 1 + below(&d, 3);
  if (chance(&d, 40))
    return;
  for (uint32_t i = 0; i < c->config.region_count; i++) {
    if (c->for_jobs[i] || chance(&d, 30))
      continue;
    c->regions[i].overlay = (uint16_t)(1 + below(&d, overlays));
    c->regions[i].side = (uint8_t)below(&d, 2);
    if (c->regions[i].side == 1)
      c->filled[i] = false;
  }
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

/* A region of the other side holds something, or may soon. */
static bool other_side_is_busy(const maker *m, uint32_t region) {
  const flap_pager_region *r = &m->c->regions[region];
  for (uint32_t i = 0; r->overlay > 0 && i < m->c->config.region_count; i++) {
    const flap_pager_region *other = &m->c->regions[i];
    if (other->overlay == r->overlay && other->side != r->side && (m->holds[i] || m->pinned[i]))
      return true;
  }
  return false;
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
  if ((is_kept(c, region) && !m->holds[region]) || (c->regions[region].lends && m->live[c->borrower] > 0))
    return false;
  flap_lease_mode mode = (flap_lease_mode)below(m->d, 5);
  if (chance(m->d, 50))
    mode = chance(m->d, 50) ? FLAP_LEASE_READ : FLAP_LEASE_UPDATE;
  if (!m->holds[region] && mode != FLAP_LEASE_SCRATCH)
    mode = FLAP_LEASE_CREATE;
  if (is_kept(c, region))
    mode = FLAP_LEASE_READ;
  if (c->regions[region].overlay > 0 && m->holds[region] && mode == FLAP_LEASE_SCRATCH)
    mode = FLAP_LEASE_CONSUME;
  if (mode == FLAP_LEASE_CREATE && other_side_is_busy(m, region))
    return false;
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
      if (!other_side_is_busy(m, region)) {
        push(c, ACTION_REFILL, region);
        m->holds[region] = true;
      }
    }
    push(c, ACTION_BEGIN, program + 1);
  }
}

void case_make(test_case *c, uint64_t seed, case_homes homes, bool tight, uint32_t scale) {
  memset(c, 0, sizeof *c);
  c->seed = seed;
  draw d = {.stream = flap_philox_stream(seed, "pager case")};
  make_regions(c, &d, homes, scale);
  make_overlays(c);
  maker m = {.d = &d, .c = c, .jobs = homes != HOMES_DISK};
  memcpy(m.holds, c->filled, sizeof m.holds);
  c->program_count = 1 + below(&d, CASE_PROGRAMS_MAX);
  push(c, ACTION_BEGIN, 0);
  for (uint32_t i = 0; i < c->program_count; i++)
    make_program(&m, i, i + 1 == c->program_count);
  for (uint32_t i = 0; i < c->config.ring_count; i++)
    if (!c->rings[i].keeps)
      c->rings[i].slots += c->rings[i].slots == 0 ? 1 : tight ? 0 : below(&d, 3);
  c->config.read_buffers = tight ? 1 : 1 + below(&d, chance(&d, 30) ? 64 : 4);
  c->config.write_buffers = tight ? 1 : 1 + below(&d, chance(&d, 30) ? 64 : 4);
  c->config.disk.read_depth = chance(&d, 50) ? 1 + below(&d, 4) : 0;
  c->config.disk.write_depth = chance(&d, 50) ? 1 + below(&d, 4) : 0;
  c->config.leases_max = c->config.jobs_max = CASE_LEASES_MAX;
  c->config.copy_bytes = c->config.page_bytes * below(&d, 7);
  c->config.workers = below(&d, 4);
  c->config.compression = (flap_compression)below(&d, 4);
  c->config.disk_rates = (flap_duplex){.alone_bytes = 1e6, .other_alone_bytes = 1e6};
  c->config.shared_cores = chance(&d, 50);
  if (c->config.compression != FLAP_COMPRESSION_OFF && c->config.page_bytes > FLAP_BLOCK_ALIGN && chance(&d, 50))
    c->config.pool_bytes = (1 + below(&d, 40)) * FLAP_PAGER_POOL_BLOCK;
  c->config.encode_bytes = chance(&d, 50) ? 1e6 : 0; /* on the clock */
  c->config.decode_bytes = chance(&d, 50) ? 3e6 : 0;
}

void case_add_sharing(test_case *c, const char *folder) {
  c->config.shared_folder = folder;
  for (uint32_t i = 0; i < c->config.region_count; i++)
    c->regions[i].shared = c->regions[i].in_snapshots;
}

void case_add_snapshots(test_case *c) {
  draw d = {.stream = flap_philox_stream(c->seed, "pager snapshots")};
  c->snapshots = true;
  for (uint32_t i = 0; i < c->config.region_count; i++)
    c->regions[i].in_snapshots = chance(&d, 60) && c->regions[i].overlay == 0 && !c->regions[i].lends;
}
