/* What the caller may not do asserts and says what it was; what the caller is promised: nothing allocated after open,
 * traces that name the right regions. */
#include "tests/pager/pager_cases.h"

#include "pager/pager_internal.h"

#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- allocation: the linker sends all of FLAP's calls here ----------------------------------------------- */

static _Atomic uint64_t allocations;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__real_aligned_alloc(size_t align, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__wrap_aligned_alloc(size_t align, size_t bytes);

void *__wrap_malloc(size_t bytes) {
  allocations++;
  return __real_malloc(bytes);
}
void *__wrap_calloc(size_t count, size_t bytes) {
  allocations++;
  return __real_calloc(count, bytes);
}
void *__wrap_realloc(void *memory, size_t bytes) {
  allocations++;
  return __real_realloc(memory, bytes);
}
void *__wrap_aligned_alloc(size_t align, size_t bytes) {
  allocations++;
  return __real_aligned_alloc(align, bytes);
}

/* ---- a small pager -------------------------------------------------------------------------------------- */

#define REGIONS 6u

typedef struct small_pager {
  flap_arena arena;
  flap_pager *pager;
  flap_pager_config config;
  flap_pager_region regions[REGIONS];
  flap_pager_ring ring;
} small_pager;

/* Check's own assertions allocate, so these do not use them. */
static void must(flap_status status) {
  if (status == FLAP_OK)
    return;
  fprintf(stderr, "%s\n", flap_error_message());
  _exit(3);
}

static flap_status fill_nothing(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)offset;
  memset(memory, 7, bytes);
  return FLAP_OK;
}

static void open_small(small_pager *s, uint32_t slots, flap_block_backend backend, const char *path) {
  memset(s, 0, sizeof *s);
  s->ring = (flap_pager_ring){.name = "weights", .slot_bytes = 8 * FLAP_BLOCK_ALIGN, .slots = slots};
  for (uint32_t i = 0; i < REGIONS; i++)
    s->regions[i] = (flap_pager_region){.bytes = 8 * FLAP_BLOCK_ALIGN, .ring = 0, .ram_pages = 2};
  s->regions[5].ring = FLAP_PAGER_RESIDENT;
  s->regions[5].ram_pages = 0;
  s->config = (flap_pager_config){.page_bytes = FLAP_BLOCK_ALIGN,
                                  .transfer_bytes = 2 * FLAP_BLOCK_ALIGN,
                                  .region_count = REGIONS,
                                  .regions = s->regions,
                                  .ring_count = 1,
                                  .rings = &s->ring,
                                  .read_buffers = 3,
                                  .write_buffers = 3,
                                  .workers = 2,
                                  .leases_max = 64};
  flap_pager_sizes sizes;
  flap_pager_measure(&s->config, &sizes);
  s->config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  s->config.disk =
      (flap_block_config){.backend = backend, .disk_count = 1, .disks = {{.path = path, .bytes = sizes.disk_bytes}}};
  must(flap_arena_open(&s->arena, "ram", sizes.ram_bytes));
  must(flap_pager_open(&s->config, &s->arena, &s->pager));
}

static void close_small(small_pager *s) {
  flap_pager_close(s->pager);
  flap_arena_close(&s->arena);
}

static void fill_all(small_pager *s) {
  for (uint32_t i = 0; i < REGIONS; i++)
    must(flap_pager_fill(s->pager, i, fill_nothing, NULL));
}

/* ---- mistakes ------------------------------------------------------------------------------------------- */

static void pin(small_pager *s, uint32_t index) {
  void *memory = NULL;
  must(flap_pager_pin(s->pager, index, &memory));
}

static void too_many_live(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_READ},
                                      {.region = 1, .mode = FLAP_LEASE_READ},
                                      {.region = 2, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 3));
  pin(s, 0), pin(s, 1), pin(s, 2);
}

static void same_region_twice(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_UPDATE}, {.region = 0, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 2));
  pin(s, 0), pin(s, 1);
}

static void resident_twice(small_pager *s) {
  static const flap_lease leases[] = {{.region = 5, .mode = FLAP_LEASE_READ}, {.region = 5, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 2));
  pin(s, 0), pin(s, 1);
}

static void load_of_nothing(small_pager *s) {
  static const flap_lease leases[] = {{.region = 3, .mode = FLAP_LEASE_READ}};
  must(flap_pager_begin(s->pager, leases, 1));
  pin(s, 0);
}

static void load_after_consume(small_pager *s) {
  static const flap_lease leases[] = {{.region = 4, .mode = FLAP_LEASE_CONSUME},
                                      {.region = 4, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 2));
  pin(s, 0);
  flap_pager_unpin(s->pager, 0);
  pin(s, 1);
}

static flap_status fail_to_fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)bytes, (void)memory;
  return offset == 0 ? FLAP_OK : flap_error_set(FLAP_INVALID, "the file is too short");
}

static void load_after_failed_fill(small_pager *s) {
  static const flap_lease leases[] = {{.region = 2, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  if (flap_pager_fill(s->pager, 2, fail_to_fill, NULL) != FLAP_INVALID)
    _exit(3);
  must(flap_pager_begin(s->pager, leases, 1));
  pin(s, 0);
}

static flap_status drain_nothing(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  (void)context, (void)offset, (void)bytes, (void)memory;
  return FLAP_OK;
}

static void drain_of_nothing(small_pager *s) {
  must(flap_pager_drain(s->pager, 2, drain_nothing, NULL));
}

static void resident_of_nothing(small_pager *s) {
  static const flap_lease leases[] = {{.region = 5, .mode = FLAP_LEASE_UPDATE}};
  must(flap_pager_begin(s->pager, leases, 1));
  pin(s, 0);
}

static void pin_out_of_order(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_READ}, {.region = 1, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 2));
  pin(s, 1);
}

static void unpin_twice(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 1));
  pin(s, 0);
  flap_pager_unpin(s->pager, 0);
  flap_pager_unpin(s->pager, 0);
}

static void end_too_early(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_READ}};
  fill_all(s);
  must(flap_pager_begin(s->pager, leases, 1));
  pin(s, 0);
  must(flap_pager_end(s->pager));
}

static void fill_in_program(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_CREATE}};
  must(flap_pager_begin(s->pager, leases, 1));
  must(flap_pager_fill(s->pager, 1, fill_nothing, NULL));
}

static void third_program(small_pager *s) {
  static const flap_lease leases[] = {{.region = 0, .mode = FLAP_LEASE_CREATE}};
  for (int i = 0; i < 3; i++)
    must(flap_pager_begin(s->pager, leases, 1));
}

static const struct {
  void (*make)(small_pager *s);
  const char *says;
} mistakes[] = {
    {too_many_live, "ring weights"},
    {same_region_twice, "region 0"},
    {resident_twice, "region 5"},
    {load_of_nothing, "region 3 is loaded, but it holds nothing"},
    {load_after_consume, "region 4 is loaded, but it holds nothing"},
    {load_after_failed_fill, "region 2 is loaded, but it holds nothing"},
    {drain_of_nothing, "region 2 is drained, but it holds nothing"},
    {resident_of_nothing, "region 5"},
    {pin_out_of_order, "index == program->pinned"},
    {unpin_twice, "LEASE_PINNED"},
    {end_too_early, "program->in_jobs == program->count"},
    {fill_in_program, "while a program is queued"},
    {third_program, "PAGER_PROGRAMS_MAX"},
};

START_TEST(mistake_asserts_and_says_which) {
  int ends[2];
  ck_assert_int_eq(pipe(ends), 0);
  pid_t child = fork();
  ck_assert_int_ge(child, 0);
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    alarm(20); /* a hang is not an assert */
    static small_pager s;
    open_small(&s, 2, FLAP_BLOCK_SIM, NULL);
    mistakes[_i].make(&s);
    _exit(0);
  }
  close(ends[1]);
  static char text[65536];
  size_t bytes = 0;
  for (ssize_t got; bytes < sizeof text - 1 && (got = read(ends[0], text + bytes, sizeof text - 1 - bytes)) > 0;)
    bytes += (size_t)got;
  text[bytes] = 0;
  close(ends[0]);
  int status = 0;
  ck_assert_int_eq(waitpid(child, &status, 0), child);
  ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "status %d, %s", status, text);
  ck_assert_msg(strstr(text, mistakes[_i].says) != NULL, "\"%s\" does not say \"%s\"", text, mistakes[_i].says);
}
END_TEST

/* ---- promises ------------------------------------------------------------------------------------------- */

static const flap_lease all_modes[] = {
    {.region = 0, .mode = FLAP_LEASE_READ},    {.region = 1, .mode = FLAP_LEASE_UPDATE},
    {.region = 2, .mode = FLAP_LEASE_CREATE},  {.region = 5, .mode = FLAP_LEASE_UPDATE},
    {.region = 1, .mode = FLAP_LEASE_READ},    {.region = 3, .mode = FLAP_LEASE_CONSUME},
    {.region = 4, .mode = FLAP_LEASE_SCRATCH}, {.region = 3, .mode = FLAP_LEASE_CREATE},
    {.region = 4, .mode = FLAP_LEASE_CREATE}};
#define ALL_MODES (uint32_t)(sizeof all_modes / sizeof all_modes[0])

static void run_all_modes(small_pager *s, uint32_t rounds) {
  for (uint32_t round = 0; round < rounds; round++) {
    must(flap_pager_begin(s->pager, all_modes, ALL_MODES));
    for (uint32_t i = 0; i < ALL_MODES; i++) {
      pin(s, i);
      flap_pager_unpin(s->pager, i);
    }
    must(flap_pager_end(s->pager));
  }
  must(flap_pager_settle(s->pager));
}

START_TEST(sizes_are_what_the_configuration_says) {
  small_pager s;
  flap_pager_sizes sizes;
  uint64_t rest = 1;
  open_small(&s, 3, FLAP_BLOCK_SIM, NULL);
  flap_pager_measure(&s.config, &sizes);
  ck_assert_uint_eq(sizes.vram_bytes, (3 + 1) * 8 * FLAP_BLOCK_ALIGN);
  ck_assert_uint_eq(sizes.ram_home_bytes, 5 * 2 * FLAP_BLOCK_ALIGN);
  ck_assert_uint_eq(sizes.disk_bytes, 5 * 6 * FLAP_BLOCK_ALIGN);
  ck_assert_uint_eq(sizes.staging_bytes, (3 + 3) * 2 * FLAP_BLOCK_ALIGN);
  ck_assert_uint_eq(sizes.ram_bytes, sizes.ram_home_bytes + sizes.staging_bytes + sizes.table_bytes);
  ck_assert_uint_eq(s.arena.bytes_used, sizes.ram_bytes);
  (void)flap_pager_vram_rest(s.pager, &rest);
  ck_assert_uint_eq(rest, 0);
  ck_assert_str_eq(flap_pager_disk_describe(s.pager), "sim");
  /* Without anything on disk: one page for the resident region to pass through. */
  for (uint32_t i = 0; i < 5; i++)
    s.regions[i].ram_pages = 8;
  flap_pager_measure(&s.config, &sizes);
  ck_assert_uint_eq(sizes.disk_bytes, 0);
  ck_assert_uint_eq(sizes.staging_bytes, FLAP_BLOCK_ALIGN);
  close_small(&s);
}
END_TEST

START_TEST(epoch_counts_writings_of_disk_pages) {
  small_pager s;
  open_small(&s, 3, FLAP_BLOCK_SIM, NULL);
  fill_all(&s);
  run_all_modes(&s, 7);
  static const uint32_t writings[REGIONS] = {1, 1 + 7, 1 + 7, 1 + 7, 1 + 7, 0};
  for (uint32_t i = 0; i < 5; i++) {
    const pager_region *region = &s.pager->regions[i];
    for (uint32_t page = region->ram_pages; page < region->page_count; page++)
      ck_assert_uint_eq(s.pager->pages[region->first_page + page].epoch, writings[i]);
  }
  close_small(&s);
}
END_TEST

START_TEST(memory_nothing_is_allocated_after_open) {
  static const flap_block_backend backends[] = {FLAP_BLOCK_SIM, FLAP_BLOCK_THREADS, FLAP_BLOCK_AUTO};
  small_pager s;
  uint64_t at_first = allocations;
  open_small(&s, 3, backends[_i], "/tmp");
  uint64_t before = allocations;
  fill_all(&s);
  run_all_modes(&s, 20);
  for (uint32_t i = 0; i < REGIONS; i++)
    must(flap_pager_drain(s.pager, i, drain_nothing, NULL));
  uint64_t after = allocations;
  ck_assert_uint_gt(before, at_first); /* the counting works: open allocates */
  ck_assert_uint_eq(after, before);
  close_small(&s);
}
END_TEST

typedef struct traced {
  _Atomic uint64_t bytes[FLAP_LANE_COUNT][REGIONS];
} traced;

static void trace(void *context, flap_lane lane, uint32_t region, uint64_t started_ns, uint64_t ended_ns,
                  uint64_t bytes) {
  traced *t = context;
  if (started_ns > ended_ns || region >= REGIONS)
    abort();
  t->bytes[lane][region] += bytes;
}

START_TEST(trace_names_region_and_lane_of_every_transfer) {
  small_pager s;
  static traced t;
  open_small(&s, 3, FLAP_BLOCK_SIM, NULL);
  flap_pager_close(s.pager);
  s.config.trace = trace;
  s.config.trace_context = &t;
  flap_arena_close(&s.arena);
  flap_pager_sizes sizes;
  flap_pager_measure(&s.config, &sizes);
  ck_assert_int_eq(flap_arena_open(&s.arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_int_eq(flap_pager_open(&s.config, &s.arena, &s.pager), FLAP_OK);
  fill_all(&s);
  memset(&t, 0, sizeof t);
  run_all_modes(&s, 30);
  flap_pager_stats stats;
  flap_pager_get_stats(s.pager, &stats);
  uint64_t sums[FLAP_LANE_COUNT] = {0};
  for (uint32_t region = 0; region < REGIONS; region++) {
    uint64_t expected[FLAP_LANE_COUNT] = {0};
    for (uint32_t i = 0; i < ALL_MODES; i++) {
      uint64_t bytes[FLAP_LANE_COUNT];
      flap_pager_predict(&s.config, &all_modes[i], 1, bytes);
      for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
        expected[lane] += all_modes[i].region == region ? 30 * bytes[lane] : 0;
    }
    for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
      ck_assert_uint_eq(t.bytes[lane][region], expected[lane]);
      sums[lane] += expected[lane];
    }
  }
  for (int lane = 0; lane < FLAP_LANE_HOST; lane++) {
    ck_assert_uint_eq(stats.bytes[lane], sums[lane]);
    ck_assert_uint_gt(stats.busy_ns[lane], 0);
  }
  close_small(&s);
}
END_TEST

/* ---- a snapshot along a program -------------------------------------------------------------------------- */

#define ALONG 40u /* more resident regions than there are marks */

static flap_status drain_sevens(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  (void)offset;
  const unsigned char *at = memory;
  uint64_t *drained = context;
  for (uint64_t i = 0; i < bytes; i++)
    if (at[i] != 7)
      return flap_error_set(FLAP_CORRUPT, "byte %llu differs", (unsigned long long)i);
  *drained += bytes;
  return FLAP_OK;
}

typedef struct along {
  flap_pager *pager;
  uint32_t region;
  uint64_t drained;
} along;

static void *drain_thread(void *context) {
  along *a = context;
  must(flap_pager_drain(a->pager, a->region, drain_sevens, &a->drained));
  return NULL;
}

/* Never ends where the region is not there yet. */
static void drain_along(along *a, uint32_t region) {
  pthread_t thread;
  a->region = region;
  ck_assert_int_eq(pthread_create(&thread, NULL, drain_thread, a), 0);
  ck_assert_int_eq(pthread_join(thread, NULL), 0);
}

/* Each resident region is drained as soon as some changes behind its own are over, not behind the last one of all; and
 * in pieces that take turns in two halves of one page. */
START_TEST(snapshot_of_residents_is_drained_along_their_changes) {
  flap_pager_region regions[ALONG];
  flap_lease leases[ALONG];
  flap_pager_sizes sizes;
  flap_arena arena;
  flap_pager *pager;
  for (uint32_t i = 0; i < ALONG; i++) {
    regions[i] = (flap_pager_region){.bytes = 3 * FLAP_BLOCK_ALIGN, .ring = FLAP_PAGER_RESIDENT, .in_snapshots = true};
    leases[i] = (flap_lease){.region = i, .mode = FLAP_LEASE_UPDATE};
  }
  flap_pager_config config = {.page_bytes = FLAP_BLOCK_ALIGN,
                              .transfer_bytes = FLAP_BLOCK_ALIGN,
                              .region_count = ALONG,
                              .regions = regions,
                              .leases_max = ALONG};
  flap_pager_measure(&config, &sizes);
  ck_assert_uint_eq(sizes.staging_bytes, FLAP_BLOCK_ALIGN);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  must(flap_arena_open(&arena, "ram", sizes.ram_bytes));
  must(flap_pager_open(&config, &arena, &pager));
  for (uint32_t i = 0; i < ALONG; i++)
    must(flap_pager_fill(pager, i, fill_nothing, NULL));
  must(flap_pager_begin(pager, leases, ALONG));
  flap_pager_snapshot_begin(pager, ALONG);
  along a = {.pager = pager};
  for (uint32_t i = 0; i < ALONG; i++) {
    void *memory = NULL;
    must(flap_pager_pin(pager, i, &memory));
    flap_pager_unpin(pager, i);
    if (i > 0)
      drain_along(&a, i - 1);
  }
  drain_along(&a, ALONG - 1);
  ck_assert_uint_eq(a.drained, ALONG * regions[0].bytes);
  flap_pager_snapshot_end(pager);
  must(flap_pager_end(pager));
  flap_pager_close(pager);
  flap_arena_close(&arena);
}
END_TEST

START_TEST(lanes_have_their_names) {
  ck_assert_str_eq(flap_pager_lane_name(FLAP_LANE_H2D), "h2d");
  ck_assert_str_eq(flap_pager_lane_name(FLAP_LANE_D2H), "d2h");
  ck_assert_str_eq(flap_pager_lane_name(FLAP_LANE_DISK_READ), "disk_read");
  ck_assert_str_eq(flap_pager_lane_name(FLAP_LANE_DISK_WRITE), "disk_write");
}
END_TEST

int main(void) {
  pager_full_checks = true;
  pager_small_bytes = 0;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("contract");
  tcase_set_timeout(tcase, 120);
  tcase_add_loop_test(tcase, mistake_asserts_and_says_which, 0, (int)(sizeof mistakes / sizeof mistakes[0]));
  tcase_add_test(tcase, sizes_are_what_the_configuration_says);
  tcase_add_test(tcase, epoch_counts_writings_of_disk_pages);
  tcase_add_loop_test(tcase, memory_nothing_is_allocated_after_open, 0, 3);
  tcase_add_test(tcase, trace_names_region_and_lane_of_every_transfer);
  tcase_add_test(tcase, snapshot_of_residents_is_drained_along_their_changes);
  tcase_add_test(tcase, lanes_have_their_names);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
