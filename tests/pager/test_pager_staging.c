/* Staging of any depth: what it hides, what may stand behind it, and its lists. On the sim device, in exact times. */
#include "base/philox.h"
#include "pager/pager_internal.h"

#include <check.h>
#include <stdlib.h>

#define PAGE FLAP_BLOCK_ALIGN
#define DISK_NS 500u
#define COPY_NS 10u
#define LEASES_MAX 512u

typedef struct rig {
  flap_pager_region regions[LEASES_MAX];
  flap_pager_ring rings[2];
  flap_lease leases[LEASES_MAX];
  uint32_t region_count, lease_count;
  flap_clock *clock;
  flap_pager *pager;
} rig;

static void add(rig *r, uint32_t region, uint32_t ring, flap_lease_mode mode) {
  r->regions[region] = (flap_pager_region){.bytes = PAGE, .ring = ring}; /* on disk */
  r->leases[r->lease_count++] = (flap_lease){.region = region, .mode = mode};
  if (region >= r->region_count)
    r->region_count = region + 1;
}

/* Both ways of the disk take DISK_NS a page, both ways of the bus COPY_NS. */
static void open_rig(rig *r, uint32_t buffers) {
  ck_assert_int_eq(flap_clock_open(&r->clock), FLAP_OK);
  const double bus = (double)PAGE * 1e9 / COPY_NS, disk = (double)PAGE * 1e9 / DISK_NS;
  flap_pager_config config = {.page_bytes = PAGE,
                              .transfer_bytes = PAGE,
                              .region_count = r->region_count,
                              .regions = r->regions,
                              .ring_count = 2,
                              .rings = r->rings,
                              .read_buffers = buffers,
                              .write_buffers = buffers,
                              .leases_max = LEASES_MAX,
                              .clock = r->clock};
  flap_pager_sizes sizes;
  flap_arena arena;
  flap_pager_measure(&config, &sizes);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_SIM,
                                       .vram_bytes = sizes.vram_bytes,
                                       .machine = {.flops_bf16 = 1e9,
                                                   .flops_f32 = 1e9,
                                                   .device_bytes = 1e9,
                                                   .h2d_bytes = bus,
                                                   .d2h_bytes = bus,
                                                   .disk_read_bytes = disk,
                                                   .disk_write_bytes = disk,
                                                   .synchronous = true}};
  flap_arena_measure(&arena, "ram");
  ck_assert_msg(flap_pager_open(&config, &arena, &r->pager) == FLAP_OK, "%s", flap_error_message());
  for (uint32_t i = 0; i < r->region_count; i++)
    ck_assert_int_eq(flap_pager_fill(r->pager, i, NULL, NULL), FLAP_OK);
  ck_assert_int_eq(flap_pager_begin(r->pager, r->leases, r->lease_count), FLAP_OK);
}

static void close_rig(rig *r) {
  ck_assert_int_eq(flap_pager_end(r->pager), FLAP_OK);
  ck_assert_int_eq(flap_pager_settle(r->pager), FLAP_OK);
  flap_pager_close(r->pager);
  flap_clock_close(r->clock);
}

/* Uses a lease, with so much computing; when it was there. */
static uint64_t use(rig *r, uint32_t lease, uint64_t compute_ns) {
  void *memory = NULL;
  ck_assert_int_eq(flap_pager_pin(r->pager, lease, &memory), FLAP_OK);
  const uint64_t there_ns = flap_clock_now_ns(r->clock);
  flap_device_sim_work(flap_pager_device(r->pager), compute_ns);
  flap_pager_unpin(r->pager, lease);
  return there_ns;
}

/* Long computing, then many small leases through a ring of two slots: ns of the latter. */
static uint64_t burst_ns(uint32_t buffers, uint32_t count) {
  rig r = {
      .rings = {{.name = "long", .slot_bytes = PAGE, .slots = 1}, {.name = "burst", .slot_bytes = PAGE, .slots = 2}}};
  add(&r, 0, 0, FLAP_LEASE_READ);
  for (uint32_t i = 0; i < count; i++)
    add(&r, 1 + i, 1, FLAP_LEASE_UPDATE);
  open_rig(&r, buffers);
  (void)use(&r, 0, (uint64_t)2 * count * DISK_NS);
  const uint64_t started_ns = flap_clock_now_ns(r.clock);
  for (uint32_t i = 0; i < count; i++)
    (void)use(&r, 1 + i, 1);
  const uint64_t ns = flap_clock_now_ns(r.clock) - started_ns;
  close_rig(&r);
  return ns;
}

/* What was read while there was computing takes no time but the bus's, and neither does what is written later. */
START_TEST(staging_deep_buffers_hide_a_burst) {
  enum { COUNT = 300 };
  const uint64_t deep = burst_ns(COUNT + 32, COUNT), few = burst_ns(16, COUNT);
  ck_assert_msg(deep <= COUNT * (2 * COPY_NS + 2), "%llu ns", (unsigned long long)deep);
  ck_assert_msg(few >= (COUNT - 32) * DISK_NS, "%llu ns", (unsigned long long)few);
}
END_TEST

/* Region 0 is changed and needed again at once, while 250 pages are to be written behind and 250 to be read ahead: both
 * its ways stand behind no more than the disk had taken. */
START_TEST(staging_what_is_needed_stands_behind_no_more_than_a_disk_works_on) {
  enum { COUNT = 250, DEPTH = 16 };
  rig r = {
      .rings = {{.name = "one", .slot_bytes = PAGE, .slots = 1}, {.name = "many", .slot_bytes = PAGE, .slots = COUNT}}};
  for (uint32_t i = 0; i < COUNT; i++)
    add(&r, 1 + i, 1, FLAP_LEASE_CREATE);
  add(&r, 0, 0, FLAP_LEASE_UPDATE);
  add(&r, 0, 0, FLAP_LEASE_READ);
  for (uint32_t i = 0; i < COUNT; i++)
    add(&r, 1 + COUNT + i, 0, FLAP_LEASE_READ);
  open_rig(&r, COUNT + 32);
  for (uint32_t i = 0; i < COUNT; i++)
    (void)use(&r, i, 1);
  const uint64_t compute_ns = 2 * COUNT * COPY_NS; /* the others come down meanwhile */
  const uint64_t changed_ns = use(&r, COUNT, compute_ns) + compute_ns;
  const uint64_t waited_ns = use(&r, COUNT + 1, 1) - changed_ns;
  ck_assert_msg(waited_ns <= 2 * (DEPTH + 2) * DISK_NS, "%llu ns", (unsigned long long)waited_ns);
  for (uint32_t i = 0; i < COUNT; i++)
    (void)use(&r, COUNT + 2 + i, 1);
  close_rig(&r);
}
END_TEST

/* Reading ahead comes to the leases of the second half before those of the first have changed their regions; once these
 * are home they are read all the same, while there is computing. */
START_TEST(staging_what_was_passed_is_read_ahead_once_it_is_home) {
  enum { COUNT = 200 };
  rig r = {
      .rings = {{.name = "long", .slot_bytes = PAGE, .slots = 1}, {.name = "burst", .slot_bytes = PAGE, .slots = 2}}};
  add(&r, 0, 0, FLAP_LEASE_READ);
  for (uint32_t i = 0; i < COUNT; i++)
    add(&r, 1 + i, 1, FLAP_LEASE_UPDATE);
  add(&r, 0, 0, FLAP_LEASE_READ);
  for (uint32_t i = 0; i < COUNT; i++)
    add(&r, 1 + i, 1, FLAP_LEASE_READ);
  open_rig(&r, 2 * COUNT + 32);
  (void)use(&r, 0, (uint64_t)2 * COUNT * DISK_NS); /* all that can be is read */
  for (uint32_t i = 0; i < COUNT; i++)
    (void)use(&r, 1 + i, 1);
  (void)use(&r, COUNT + 1, (uint64_t)3 * COUNT * DISK_NS); /* it is written, and read again */
  const uint64_t started_ns = flap_clock_now_ns(r.clock);
  for (uint32_t i = 0; i < COUNT; i++)
    (void)use(&r, COUNT + 2 + i, 1);
  const uint64_t ns = flap_clock_now_ns(r.clock) - started_ns;
  close_rig(&r);
  ck_assert_msg(ns <= COUNT * (2 * COPY_NS + 2), "%llu ns", (unsigned long long)ns);
}
END_TEST

/* ---- lists ------------------------------------------------------------------------------------------------ */

START_TEST(heap_gives_what_is_needed_first) {
  enum { COUNT = 200, TURNS = 20000 };
  static pager_buffer buffers[COUNT];
  static uint32_t of[COUNT];
  flap_pager pager = {.buffers = buffers, .buffer_count = COUNT};
  pager_heap heap = {.of = of};
  bool in[COUNT] = {false};
  flap_philox stream = flap_philox_stream(7, "heap");
  uint32_t held = 0;
  for (uint64_t turn = 0; turn < TURNS; turn++) {
    const uint32_t index = (uint32_t)flap_philox_below(&stream, 3 * turn, COUNT);
    if (!in[index] && flap_philox_below(&stream, 3 * turn + 1, 100) < 55) {
      buffers[index].order = flap_philox_below(&stream, 3 * turn + 2, 50);
      pager_heap_add(&pager, &heap, index);
      in[index] = true;
      held++;
      continue;
    }
    const uint32_t taken = pager_heap_take(&pager, &heap);
    ck_assert_int_eq(taken == PAGER_NONE, held == 0);
    if (taken == PAGER_NONE)
      continue;
    ck_assert(taken < COUNT && in[taken]);
    for (uint32_t i = 0; i < COUNT; i++)
      if (in[i] && buffers[i].order < buffers[taken].order)
        ck_abort_msg("order %llu is taken before %llu", (unsigned long long)buffers[taken].order,
                     (unsigned long long)buffers[i].order);
    in[taken] = false;
    held--;
  }
}
END_TEST

int main(void) {
  pager_full_checks = true;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("staging");
  tcase_set_timeout(tcase, 60);
  tcase_add_test(tcase, staging_deep_buffers_hide_a_burst);
  tcase_add_test(tcase, staging_what_is_needed_stands_behind_no_more_than_a_disk_works_on);
  tcase_add_test(tcase, staging_what_was_passed_is_read_ahead_once_it_is_home);
  tcase_add_test(tcase, heap_gives_what_is_needed_first);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
