/* Small random programs under random budgets and page sizes, each against the oracle of sim_oracle.h: every use finds
 * what was stored last, nothing is used twice at once, and as many bytes move as must.
 *
 * A million programs as a rule; FLAP_SIM_PROGRAMS says how many, or FLAP_SIM_PAGE_EVENTS runs until so many pages were
 * moved, and FLAP_SIM_THREADS says how many threads share them. A pager is opened for a budget and a page size, and
 * runs a few programs: opening one takes as long as two of them. FLAP_TEST_SEED is the first seed; a failure prints
 * its own, which FLAP_SIM_ONLY runs alone.
 */
#include "tests/pager/sim_oracle.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROGRAMS_PER_PAGER 8u
#define LEASES_MAX 10u
#define ACTIONS_MAX 128u
#define RINGS_MAX 2u
#define THREADS_MAX 64u
#define BORROWED_MAX 30u
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PROGRAMS 20000u /* several times as slow */
#else
#define PROGRAMS 1000000u
#endif

/* ---- randomness ------------------------------------------------------------------------------------------ */

typedef struct source {
  uint64_t state;
} source;

static uint64_t draw(source *s) {
  uint64_t x = s->state += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
static uint32_t below(source *s, uint32_t bound) {
  return (uint32_t)((draw(s) >> 32) * bound >> 32);
}
static bool chance(source *s, uint32_t percent) {
  return below(s, 100) < percent;
}

/* ---- a pager and its programs ------------------------------------------------------------------------------ */

typedef enum act { ACT_PIN, ACT_UNPIN, ACT_JOB, ACT_COMPUTE } act;

typedef struct step {
  act what;
  uint32_t index, count; /* leases; of compute ns */
} step;

typedef struct program {
  flap_lease leases[LEASES_MAX];
  step steps[ACTIONS_MAX];
  uint32_t lease_count, step_count;
} program;

typedef struct world {
  source random;
  uint64_t seed;
  flap_pager_config config;
  flap_pager_region regions[ORACLE_REGIONS_MAX];
  flap_pager_ring rings[RINGS_MAX + 1]; /* the last one keeps */
  bool for_jobs[ORACLE_REGIONS_MAX];
  /* at the end of the last program that was made: */
  bool holds[ORACLE_REGIONS_MAX], pinned[ORACLE_REGIONS_MAX];
  uint32_t live[RINGS_MAX + 1], live_leases[LEASES_MAX], live_count;
} world;

static void make_regions(world *w) {
  source *s = &w->random;
  const uint32_t homes = below(s, 4); /* all in RAM, all on disk, and as it comes */
  const bool jobs = homes != 1 && chance(s, 40);
  flap_pager_config *c = &w->config;
  c->ring_count = 1 + below(s, RINGS_MAX);
  c->region_count = 1 + below(s, 5);
  for (uint32_t i = 0; i < c->ring_count; i++)
    w->rings[i] = (flap_pager_ring){.name = "ring", .slot_bytes = FLAP_BLOCK_ALIGN, .slots = 1 + below(s, 3)};
  const bool lends = chance(s, 40);
  bool kept = false;
  for (uint32_t i = 0; i < c->region_count; i++) {
    flap_pager_region *r = &w->regions[i];
    *r = (flap_pager_region){.bytes = FLAP_BLOCK_ALIGN * (1 + (uint64_t)below(s, chance(s, 10) ? 40 : 8)),
                             .ring = below(s, c->ring_count)};
    const uint32_t pages = (uint32_t)((r->bytes + c->page_bytes - 1) / c->page_bytes);
    w->for_jobs[i] = jobs && chance(s, 50);
    r->ram_pages = homes == 0 || w->for_jobs[i] ? pages : homes == 1 ? 0 : below(s, pages + 1);
    if (w->for_jobs[i] && chance(s, 30)) {
      r->ring = FLAP_PAGER_HOST;
    } else if (w->for_jobs[i] && !kept && chance(s, 50)) {
      r->ring = c->ring_count;
      w->rings[r->ring] = (flap_pager_ring){.name = "kept", .slot_bytes = r->bytes, .slots = 1, .keeps = true};
      kept = true;
    } else if (!w->for_jobs[i] && chance(s, lends ? 40 : 10)) {
      *r = (flap_pager_region){.bytes = r->bytes, .ring = FLAP_PAGER_RESIDENT, .lends = lends};
    } else if (w->rings[r->ring].slot_bytes < r->bytes) {
      w->rings[r->ring].slot_bytes = r->bytes;
    }
    w->holds[i] = chance(s, 80);
  }
  c->ring_count += kept;
  uint64_t room = 0;
  for (uint32_t i = 0; i < c->region_count; i++)
    room += w->regions[i].lends ? w->regions[i].bytes / w->rings[0].slot_bytes : 0;
  w->rings[0].borrowed = below(s, (uint32_t)(room < BORROWED_MAX ? room : BORROWED_MAX) + 1);
}

/* Regions of jobs do not: what they empty is empty only once the job is over. */
static void share_homes(world *w) {
  source *s = &w->random;
  if (chance(s, 60))
    return;
  for (uint32_t i = 0; i < w->config.region_count; i++) {
    if (w->for_jobs[i] || chance(s, 20))
      continue;
    w->regions[i].overlay = (uint16_t)(1 + (below(s, 8) == 0));
    w->regions[i].side = (uint8_t)below(s, 2);
    w->holds[i] &= w->regions[i].side == 0;
  }
}

static bool other_side_is_busy(const world *w, uint32_t region) {
  const flap_pager_region *r = &w->regions[region];
  for (uint32_t i = 0; r->overlay > 0 && i < w->config.region_count; i++)
    if (w->regions[i].overlay == r->overlay && w->regions[i].side != r->side && (w->holds[i] || w->pinned[i]))
      return true;
  return false;
}

/* Rates from equal to a hundred times apart, so that each lane is the slowest at times. */
static double rate(source *s) {
  static const double rates[] = {1e8, 4e8, 1e9, 3e9, 1e10};
  return rates[below(s, 5)];
}

static flap_machine make_machine(source *s) {
  const bool both = chance(s, 30);
  flap_machine m = {.flops_bf16 = 1e12,
                    .flops_f32 = 1e12,
                    .device_bytes = 1e12,
                    .h2d_bytes = rate(s),
                    .d2h_bytes = rate(s),
                    .disk_read_bytes = rate(s),
                    .disk_write_bytes = rate(s),
                    .copy_ns = below(s, 3) * 1000,
                    .disk_ns = below(s, 3) * 20000,
                    .synchronous = chance(s, 50)};
  if (both) {
    m.h2d_both_bytes = 0.6 * m.h2d_bytes;
    m.d2h_both_bytes = 0.6 * m.d2h_bytes;
    m.disk_both_bytes = 0.6 * (m.disk_read_bytes + m.disk_write_bytes);
  }
  return m;
}

static void make_world(world *w, uint64_t seed, flap_clock *clock, sim_oracle *oracle) {
  memset(w, 0, sizeof *w);
  w->seed = seed;
  w->random.state = seed * 0xd1342543de82ef95ull;
  source *s = &w->random;
  flap_pager_config *c = &w->config;
  *c = (flap_pager_config){.regions = w->regions,
                           .rings = w->rings,
                           .leases_max = LEASES_MAX,
                           .jobs_max = LEASES_MAX,
                           .clock = clock,
                           .trace = sim_oracle_trace,
                           .trace_context = oracle};
  c->page_bytes = FLAP_BLOCK_ALIGN * (1 + (uint64_t)below(s, 4));
  c->transfer_bytes = c->page_bytes * (1 + below(s, 3));
  c->copy_bytes = c->page_bytes * below(s, 4);
  make_regions(w);
  share_homes(w);
  c->read_buffers = 1 + below(s, chance(s, 20) ? 60 : 3);
  c->write_buffers = 1 + below(s, chance(s, 20) ? 60 : 3);
  c->disk.read_depth = chance(s, 50) ? 1 + below(s, 3) : 0;
  c->disk.write_depth = chance(s, 50) ? 1 + below(s, 3) : 0;
  c->device = (flap_device_config){.kind = FLAP_DEVICE_SIM, .machine = make_machine(s)};
}

static void push(program *p, act what, uint32_t index, uint32_t count) {
  if (p->step_count == ACTIONS_MAX)
    ck_abort_msg("a program of more than %u actions", ACTIONS_MAX);
  p->steps[p->step_count++] = (step){.what = what, .index = index, .count = count};
}

static bool is_kept(const world *w, uint32_t region) {
  return w->regions[region].ring < FLAP_PAGER_HOST && w->rings[w->regions[region].ring].keeps;
}

static void make_job(world *w, program *p) {
  source *s = &w->random;
  const uint32_t first = p->lease_count, start = below(s, w->config.region_count);
  for (uint32_t i = 0;
       i < w->config.region_count && p->lease_count < LEASES_MAX && p->lease_count - first < FLAP_PAGER_JOB_LEASES_MAX;
       i++) {
    const uint32_t region = (start + i) % w->config.region_count;
    if (!w->for_jobs[region] || w->pinned[region] || !w->holds[region] || chance(s, 30))
      continue;
    w->holds[region] = is_kept(w, region) || chance(s, 70);
    p->leases[p->lease_count++] = (flap_lease){.region = region,
                                               .mode = w->holds[region] ? FLAP_LEASE_UPDATE : FLAP_LEASE_CONSUME,
                                               .host_bytes = w->regions[region].bytes};
  }
  if (p->lease_count > first)
    push(p, ACT_JOB, first, p->lease_count - first);
}

static flap_lease_mode choose_mode(world *w, uint32_t region) {
  source *s = &w->random;
  if (is_kept(w, region))
    return FLAP_LEASE_READ;
  if (!w->holds[region])
    return chance(s, 80) ? FLAP_LEASE_CREATE : FLAP_LEASE_SCRATCH;
  const flap_lease_mode mode = chance(s, 40)   ? FLAP_LEASE_READ
                               : chance(s, 60) ? FLAP_LEASE_UPDATE
                                               : (flap_lease_mode)below(s, 5);
  return mode == FLAP_LEASE_SCRATCH && w->regions[region].overlay > 0 ? FLAP_LEASE_CONSUME : mode;
}

static void make_pin(world *w, program *p) {
  const uint32_t region = below(&w->random, w->config.region_count), ring = w->regions[region].ring;
  if (w->pinned[region] || ring == FLAP_PAGER_HOST || (is_kept(w, region) && !w->holds[region]))
    return;
  if (ring == FLAP_PAGER_RESIDENT ? w->regions[region].lends && w->live[0] > 0 : w->live[ring] == w->rings[ring].slots)
    return;
  const flap_lease_mode mode = choose_mode(w, region);
  if (mode == FLAP_LEASE_CREATE && other_side_is_busy(w, region))
    return;
  const uint32_t index = p->lease_count++;
  p->leases[index] = (flap_lease){.region = region, .mode = mode};
  w->pinned[region] = true;
  w->live_leases[w->live_count++] = index;
  if (ring != FLAP_PAGER_RESIDENT)
    w->live[ring]++;
  push(p, ACT_PIN, index, 1);
}

static void make_unpin(world *w, program *p) {
  const uint32_t which = below(&w->random, w->live_count), index = w->live_leases[which];
  const flap_lease *lease = &p->leases[index];
  w->live_leases[which] = w->live_leases[--w->live_count];
  w->pinned[lease->region] = false;
  if (w->regions[lease->region].ring != FLAP_PAGER_RESIDENT)
    w->live[w->regions[lease->region].ring]--;
  if (lease->mode != FLAP_LEASE_READ)
    w->holds[lease->region] = lease->mode == FLAP_LEASE_UPDATE || lease->mode == FLAP_LEASE_CREATE;
  push(p, ACT_UNPIN, index, 1);
}

static void make_program(world *w, program *p) {
  source *s = &w->random;
  const uint32_t leases = 1 + below(s, LEASES_MAX);
  p->lease_count = p->step_count = 0;
  for (uint32_t tries = 0; (p->lease_count < leases && tries < 40) || w->live_count > 0; tries++) {
    const bool more = p->lease_count < leases && tries < 40;
    if (more && chance(s, 15))
      make_job(w, p);
    else if (more && chance(s, 50))
      make_pin(w, p);
    else if (w->live_count > 0 && chance(s, 70))
      make_unpin(w, p);
    else if (w->live_count > 0 && p->step_count + 2 * LEASES_MAX < ACTIONS_MAX)
      push(p, ACT_COMPUTE, 0, 1 + below(s, chance(s, 50) ? 3000 : 60000));
  }
}

/* ---- running ---------------------------------------------------------------------------------------------- */

/* Check writes down each assertion that it comes to, which would take as long as all else. */
static void must(const world *w, flap_status status) {
  if (status != FLAP_OK)
    ck_abort_msg("seed %llu: %s", (unsigned long long)w->seed, flap_error_message());
}

static void begin(const world *w, flap_pager *pager, const program *p) {
  must(w, flap_pager_begin(pager, p->leases, p->lease_count));
}

static void run_program(const world *w, flap_pager *pager, sim_oracle *oracle, const program *p) {
  void *memory[LEASES_MAX];
  sim_oracle_begin(oracle);
  for (uint32_t i = 0; i < p->step_count; i++) {
    const step *at = &p->steps[i];
    const flap_lease *lease = &p->leases[at->index];
    switch (at->what) {
    case ACT_PIN:
      must(w, flap_pager_pin(pager, at->index, &memory[at->index]));
      sim_oracle_pinned(oracle, lease, memory[at->index]);
      break;
    case ACT_UNPIN:
      sim_oracle_unpinned(oracle, lease, memory[at->index]);
      flap_pager_unpin(pager, at->index);
      break;
    case ACT_COMPUTE:
      sim_oracle_compute(oracle, at->count);
      flap_device_sim_work(flap_pager_device(pager), at->count);
      break;
    case ACT_JOB:
      sim_oracle_job(oracle, lease, at->count);
      flap_pager_run_job(
          pager, at->index, at->count,
          &(flap_pager_job){.ns = 500 * at->count + 1, .beside_copies_ns = 700 * at->count, .copies_beside = 1.3});
      break;
    }
  }
  must(w, flap_pager_end(pager));
}

typedef struct worker {
  pthread_t thread;
  uint64_t first_seed, stride, programs_wanted, events_wanted; /* of this worker */
  uint64_t programs, pagers;
  sim_oracle oracle;
  world world;
  program made[2];
  unsigned char *memory; /* of the pager: tables, and addresses of what has no bytes */
} worker;

#define MEMORY_BYTES ((uint64_t)8 << 20)

static void run_world(worker *k, flap_clock *clock, uint64_t seed) {
  world *w = &k->world;
  flap_pager *pager = NULL;
  flap_pager_sizes sizes;
  flap_arena arena;
  make_world(w, seed, clock, &k->oracle);
  flap_pager_measure(&w->config, &sizes);
  w->config.device.vram_bytes = sizes.vram_bytes;
  if (sizes.ram_bytes > MEMORY_BYTES)
    ck_abort_msg("seed %llu: a pager of %llu bytes", (unsigned long long)seed, (unsigned long long)sizes.ram_bytes);
  flap_arena_borrow(&arena, "ram", k->memory, sizes.ram_bytes);
  sim_oracle_listen(NULL);
  must(w, flap_pager_open(&w->config, &arena, &pager));
  sim_oracle_open(&k->oracle, seed, &w->config, pager, k->memory);
  sim_oracle_listen(&k->oracle);
  for (uint32_t i = 0; i < w->config.region_count; i++)
    if (w->holds[i]) {
      must(w, flap_pager_fill(pager, i, NULL, NULL));
      sim_oracle_fill(&k->oracle, i);
    }
  make_program(w, &k->made[0]);
  begin(w, pager, &k->made[0]);
  for (uint32_t i = 0; i < PROGRAMS_PER_PAGER; i++) {
    const bool last = i + 1 == PROGRAMS_PER_PAGER, ahead = !last && chance(&w->random, 60);
    program *next = &k->made[(i + 1) % 2];
    if (!last)
      make_program(w, next);
    if (ahead)
      begin(w, pager, next);
    run_program(w, pager, &k->oracle, &k->made[i % 2]);
    if (!last && !ahead && chance(&w->random, 30))
      must(w, flap_pager_settle(pager));
    if (!last && !ahead)
      begin(w, pager, next);
  }
  must(w, flap_pager_settle(pager));
  sim_oracle_settled(&k->oracle);
  flap_pager_close(pager);
  k->programs += PROGRAMS_PER_PAGER;
  k->pagers++;
}

static void *work(void *context) {
  worker *k = context;
  flap_clock *clock = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  for (uint64_t seed = k->first_seed; k->programs < k->programs_wanted || k->oracle.page_events < k->events_wanted;
       seed += k->stride)
    run_world(k, clock, seed);
  sim_oracle_listen(NULL);
  flap_clock_close(clock);
  return NULL;
}

static uint64_t number(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

/* Half each for two threads. What they share is nothing but the code. */
START_TEST(oracle_agrees_with_small_random_programs) {
  const uint64_t events = number("FLAP_SIM_PAGE_EVENTS", 0), seed = number("FLAP_TEST_SEED", 1);
  const uint64_t programs = number("FLAP_SIM_PROGRAMS", events > 0 ? 0 : PROGRAMS);
  const uint64_t only = number("FLAP_SIM_ONLY", 0);
  const uint32_t threads = only > 0 ? 1 : (uint32_t)number("FLAP_SIM_THREADS", 2);
  uint64_t done = 0, pagers = 0, moved = 0;
  ck_assert(threads > 0 && threads <= THREADS_MAX);
  worker *workers = calloc(threads, sizeof *workers);
  ck_assert_ptr_nonnull(workers);
  for (uint32_t i = 0; i < threads; i++) {
    workers[i].first_seed = only > 0 ? only : seed + i;
    workers[i].stride = threads;
    workers[i].programs_wanted = only > 0 ? 1 : (programs + threads - 1) / threads;
    workers[i].events_wanted = only > 0 ? 0 : (events + threads - 1) / threads;
    workers[i].memory = aligned_alloc(FLAP_BLOCK_ALIGN, MEMORY_BYTES);
    ck_assert_ptr_nonnull(workers[i].memory);
    ck_assert_int_eq(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
  }
  for (uint32_t i = 0; i < threads; i++) {
    ck_assert_int_eq(pthread_join(workers[i].thread, NULL), 0);
    done += workers[i].programs;
    pagers += workers[i].pagers;
    moved += workers[i].oracle.page_events;
    free(workers[i].memory);
  }
  free(workers);
  printf("%llu programs under %llu budgets and page sizes, %llu page events\n", (unsigned long long)done,
         (unsigned long long)pagers, (unsigned long long)moved);
  ck_assert(done >= programs && moved >= events && moved > done);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("oracle");
  tcase_set_timeout(tcase, 0); /* ctest has one, and long runs have none */
  tcase_add_test(tcase, oracle_agrees_with_small_random_programs);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
