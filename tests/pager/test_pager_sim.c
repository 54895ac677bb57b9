/* The same pager on the sim device: the same bytes, no deadlock with the fewest slots and buffers, and exact times. */
#include "tests/pager/pager_cases.h"

#include "pager/pager_internal.h"

#include <check.h>
#include <stdlib.h>

/* ---- random programs ------------------------------------------------------------------------------------ */

static void run_cases(uint32_t first, uint32_t count, case_homes homes, bool tight, bool synchronous) {
  static test_case c;
  uint64_t seed = case_first_seed();
  for (uint32_t i = first; i < first + count; i++) {
    case_make(&c, seed + i, homes, tight, 4);
    uint64_t ns = case_run_sim(&c, synchronous);
    ck_assert_uint_eq(case_run_sim(&c, synchronous), ns); /* a simulation is a pure function */
  }
}

START_TEST(sim_random_programs_move_predicted_bytes) {
  run_cases(0, 100, HOMES_MIXED, false, false);
  run_cases(1000, 50, HOMES_RAM, false, false);
}
END_TEST

START_TEST(sim_fewest_slots_and_buffers_terminate) {
  run_cases(2000, 100, HOMES_MIXED, true, false);
  run_cases(3000, 100, HOMES_DISK, true, false);
}
END_TEST

START_TEST(sim_synchronous_compute_accounts_for_all_time) {
  run_cases(4000, 100, HOMES_MIXED, true, true);
  run_cases(5000, 100, HOMES_MIXED, false, true);
  run_cases(6000, 50, HOMES_DISK, true, true);
}
END_TEST

START_TEST(sim_closed_after_every_action_leaves_nothing) {
  static test_case c;
  uint64_t seed = case_first_seed();
  for (uint32_t i = 0; i < 4; i++) {
    case_make(&c, seed + 7000 + i, HOMES_MIXED, true, 2);
    for (c.close_after = 1; c.close_after <= c.action_count; c.close_after++)
      (void)case_run_sim(&c, i % 2 == 0);
  }
}
END_TEST

/* ---- exact times ---------------------------------------------------------------------------------------- */

#define PAGE_BYTES 65536u
#define LEASES 40u

typedef struct line { /* one region per lease, all alike, one chunk each; a byte takes a nanosecond on its lane */
  bool disk, synchronous;
  flap_lease_mode mode;
  uint32_t slots;
  uint64_t compute_ns;
  double h2d_ns, d2h_ns, disk_ns; /* of one region */
} line;

static flap_machine machine_of(const line *l) {
  double per_second = PAGE_BYTES * 1e9;
  return (flap_machine){.name = "line",
                        .flops_bf16 = 1e9,
                        .flops_f32 = 1e9,
                        .device_bytes = 1e15,
                        .h2d_bytes = per_second / l->h2d_ns,
                        .d2h_bytes = per_second / l->d2h_ns,
                        .disk_read_bytes = per_second / l->disk_ns,
                        .disk_write_bytes = per_second / l->disk_ns,
                        .synchronous = l->synchronous};
}

/* The time until compute has ended; that of the write-backs behind it in *settled_out. */
static uint64_t run_line(const line *l, flap_pager_stats *stats_out, uint64_t *settled_out) {
  static flap_pager_region regions[LEASES];
  static flap_lease leases[LEASES];
  for (uint32_t i = 0; i < LEASES; i++) {
    regions[i] = (flap_pager_region){.bytes = PAGE_BYTES, .ring = 0, .ram_pages = l->disk ? 0 : 1};
    leases[i] = (flap_lease){.region = i, .mode = l->mode};
  }
  flap_pager_ring ring = {.name = "line", .slot_bytes = PAGE_BYTES, .slots = l->slots};
  flap_clock *clock = NULL;
  flap_pager *pager = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  flap_pager_config config = {.page_bytes = PAGE_BYTES,
                              .transfer_bytes = PAGE_BYTES,
                              .region_count = LEASES,
                              .regions = regions,
                              .ring_count = 1,
                              .rings = &ring,
                              .read_buffers = 4,
                              .write_buffers = 4,
                              .leases_max = LEASES,
                              .clock = clock};
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  config.device =
      (flap_device_config){.kind = FLAP_DEVICE_SIM, .vram_bytes = sizes.vram_bytes, .machine = machine_of(l)};
  flap_arena arena;
  flap_arena_measure(&arena, "ram");
  ck_assert_msg(flap_pager_open(&config, &arena, &pager) == FLAP_OK, "%s", flap_error_message());
  for (uint32_t i = 0; i < LEASES; i++)
    ck_assert_int_eq(flap_pager_fill(pager, i, NULL, NULL), FLAP_OK);
  ck_assert_int_eq(flap_pager_begin(pager, leases, LEASES), FLAP_OK);
  for (uint32_t i = 0; i < LEASES; i++) {
    void *memory = NULL;
    ck_assert_int_eq(flap_pager_pin(pager, i, &memory), FLAP_OK);
    flap_device_sim_kernel(flap_pager_device(pager), (double)l->compute_ns, 0, true);
    flap_pager_unpin(pager, i);
  }
  ck_assert_int_eq(flap_pager_end(pager), FLAP_OK);
  flap_event last = pager_use_event(0);
  for (uint32_t i = 0; i < l->slots; i++) /* slots end in turn: wait for all */
    flap_device_event_wait(flap_pager_device(pager), last + 2 * i);
  uint64_t ns = flap_clock_now_ns(clock);
  ck_assert_int_eq(flap_pager_settle(pager), FLAP_OK);
  *settled_out = flap_clock_now_ns(clock);
  flap_pager_get_stats(pager, stats_out);
  flap_pager_close(pager);
  flap_clock_close(clock);
  return ns;
}

static void expect_time(line l, uint64_t ns, uint64_t settled_ns) {
  for (int synchronous = 0; synchronous < 2; synchronous++) {
    flap_pager_stats stats;
    uint64_t settled = 0;
    l.synchronous = synchronous;
    ck_assert_uint_eq(run_line(&l, &stats, &settled), ns);
    ck_assert_uint_eq(settled, settled_ns);
  }
}

START_TEST(overlap_two_slots_take_the_longer_of_compute_and_copy) {
  line compute_bound = {
      .mode = FLAP_LEASE_READ, .slots = 2, .compute_ns = 900, .h2d_ns = 400, .d2h_ns = 1, .disk_ns = 1};
  expect_time(compute_bound, 400 + LEASES * 900, 400 + LEASES * 900);
  line copy_bound = {.mode = FLAP_LEASE_READ, .slots = 2, .compute_ns = 400, .h2d_ns = 900, .d2h_ns = 1, .disk_ns = 1};
  expect_time(copy_bound, LEASES * 900 + 400, LEASES * 900 + 400);
}
END_TEST

START_TEST(overlap_one_slot_takes_the_sum) {
  line l = {.mode = FLAP_LEASE_READ, .slots = 1, .compute_ns = 900, .h2d_ns = 400, .d2h_ns = 1, .disk_ns = 1};
  expect_time(l, LEASES * (400 + 900), LEASES * (400 + 900));
  line update = {.mode = FLAP_LEASE_UPDATE, .slots = 1, .compute_ns = 900, .h2d_ns = 400, .d2h_ns = 300, .disk_ns = 1};
  expect_time(update, LEASES * (400 + 900 + 300) - 300, LEASES * (400 + 900 + 300));
}
END_TEST

START_TEST(overlap_updates_with_three_slots_take_the_longest_lane) {
  line l = {.mode = FLAP_LEASE_UPDATE, .slots = 3, .compute_ns = 500, .h2d_ns = 500, .d2h_ns = 500, .disk_ns = 1};
  expect_time(l, (LEASES + 1) * 500, (LEASES + 2) * 500);
}
END_TEST

START_TEST(overlap_disk_reads_with_three_slots_take_the_longest_lane) {
  line l = {
      .disk = true, .mode = FLAP_LEASE_READ, .slots = 3, .compute_ns = 500, .h2d_ns = 500, .d2h_ns = 1, .disk_ns = 500};
  expect_time(l, (LEASES + 2) * 500, (LEASES + 2) * 500);
}
END_TEST

/* Read, up, compute, down, write: the slot is free once it was copied down, so four slots keep five lanes busy. */
START_TEST(overlap_slot_is_reused_while_the_disk_still_writes) {
  line l = {.disk = true,
            .mode = FLAP_LEASE_UPDATE,
            .slots = 4,
            .compute_ns = 500,
            .h2d_ns = 500,
            .d2h_ns = 500,
            .disk_ns = 500};
  expect_time(l, (LEASES + 2) * 500, (LEASES + 4) * 500);
}
END_TEST

START_TEST(stall_is_charged_to_the_lane_that_was_waited_for) {
  flap_pager_stats stats;
  uint64_t settled = 0;
  line h2d = {.mode = FLAP_LEASE_READ,
              .slots = 2,
              .synchronous = true,
              .compute_ns = 100,
              .h2d_ns = 900,
              .d2h_ns = 1,
              .disk_ns = 1};
  (void)run_line(&h2d, &stats, &settled);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_H2D], 900 + (LEASES - 1) * 800);
  line d2h = {.mode = FLAP_LEASE_CREATE,
              .slots = 1,
              .synchronous = true,
              .compute_ns = 100,
              .h2d_ns = 1,
              .d2h_ns = 900,
              .disk_ns = 1};
  (void)run_line(&d2h, &stats, &settled);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_D2H], (LEASES - 1) * 900);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_H2D], 0);
  line read = {.disk = true,
               .mode = FLAP_LEASE_READ,
               .slots = 1,
               .synchronous = true,
               .compute_ns = 100,
               .h2d_ns = 50,
               .d2h_ns = 1,
               .disk_ns = 900};
  (void)run_line(&read, &stats, &settled);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_DISK_READ], LEASES * 900);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_H2D], LEASES * 50);
  ck_assert_uint_eq(stats.busy_ns[FLAP_LANE_DISK_READ], LEASES * 900);
  ck_assert_uint_eq(stats.busy_ns[FLAP_LANE_H2D], LEASES * 50);
  line write = {.disk = true,
                .mode = FLAP_LEASE_CREATE,
                .slots = 1,
                .synchronous = true,
                .compute_ns = 100,
                .h2d_ns = 1,
                .d2h_ns = 50,
                .disk_ns = 900};
  (void)run_line(&write, &stats, &settled);
  ck_assert_uint_eq(stats.bytes[FLAP_LANE_DISK_WRITE], LEASES * PAGE_BYTES);
  ck_assert_uint_gt(stats.stall_ns[FLAP_LANE_DISK_WRITE], (LEASES - 10) * 700);
}
END_TEST

int main(void) {
  pager_full_checks = true;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("sim");
  tcase_set_timeout(tcase, 300);
  tcase_add_test(tcase, sim_random_programs_move_predicted_bytes);
  tcase_add_test(tcase, sim_fewest_slots_and_buffers_terminate);
  tcase_add_test(tcase, sim_synchronous_compute_accounts_for_all_time);
  tcase_add_test(tcase, sim_closed_after_every_action_leaves_nothing);
  tcase_add_test(tcase, overlap_two_slots_take_the_longer_of_compute_and_copy);
  tcase_add_test(tcase, overlap_one_slot_takes_the_sum);
  tcase_add_test(tcase, overlap_updates_with_three_slots_take_the_longest_lane);
  tcase_add_test(tcase, overlap_disk_reads_with_three_slots_take_the_longest_lane);
  tcase_add_test(tcase, overlap_slot_is_reused_while_the_disk_still_writes);
  tcase_add_test(tcase, stall_is_charged_to_the_lane_that_was_waited_for);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
