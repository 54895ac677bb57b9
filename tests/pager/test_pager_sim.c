/* The same pager on the sim device: the same bytes, no deadlock with the fewest slots and buffers, and exact times. */
#include "tests/pager/pager_cases.h"

#include "pager/pager_internal.h"

#include <check.h>
#include <stdlib.h>

/* ---- random programs ------------------------------------------------------------------------------------ */

static void run_cases(uint32_t first, uint32_t count, case_homes homes, bool tight, bool synchronous) {
  static test_case c;
  uint64_t seed = case_first_seed();
  for (uint32_t i = first; i < first + count; i += CASE_STRIDE) {
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
    for (c.close_after = 1; c.close_after <= c.action_count; c.close_after += CASE_STRIDE)
      (void)case_run_sim(&c, i % 2 == 0);
  }
}
END_TEST

/* ---- exact times ---------------------------------------------------------------------------------------- */

#define PAGE_BYTES 65536u
#define LEASES 40u

typedef struct line { /* one region per lease, all alike, one chunk each; a byte takes a nanosecond on its lane */
  bool disk, synchronous;
  bool counts_no_stalls;
  flap_lease_mode mode;
  uint32_t slots;
  uint64_t compute_ns;
  double h2d_ns, d2h_ns, disk_ns; /* of one region */
  uint64_t copy_ns;               /* of one copy, whatever its size */
  double both;                    /* what both ways of the bus, and of the disk, move together, in rates of one; 0: 2 */
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
                        .h2d_both_bytes = l->both / 2 * per_second / l->h2d_ns,
                        .d2h_both_bytes = l->both / 2 * per_second / l->d2h_ns,
                        .disk_both_bytes = l->both * per_second / l->disk_ns,
                        .copy_ns = l->copy_ns,
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
                              .clock = clock,
                              .counts_no_stalls = l->counts_no_stalls};
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
    uint64_t computing_and_resting_ns = LEASES * l.compute_ns;
    for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
      computing_and_resting_ns += stats.stall_ns[lane];
    ck_assert_uint_eq(computing_and_resting_ns, ns);
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

/* The only slot is taken until its compute is over, but the disk reads on into buffers. */
START_TEST(overlap_disk_reads_ahead_of_a_single_slot) {
  line l = {
      .disk = true, .mode = FLAP_LEASE_READ, .slots = 1, .compute_ns = 300, .h2d_ns = 100, .d2h_ns = 1, .disk_ns = 500};
  expect_time(l, LEASES * 500 + 100 + 300, LEASES * 500 + 100 + 300);
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

/* Every region comes and goes once, both ways at once, so what both can do together is what decides; the first load and
 * the last stores have nothing beside them. */
START_TEST(overlap_both_ways_take_what_both_can_do) {
  flap_pager_stats stats;
  uint64_t settled = 0;
  for (int disk = 0; disk < 2; disk++) {
    line l = {.disk = disk,
              .mode = FLAP_LEASE_UPDATE,
              .slots = 6,
              .compute_ns = 10,
              .h2d_ns = 500,
              .d2h_ns = 500,
              .both = 1.25};
    l.h2d_ns = l.d2h_ns = disk ? 50 : 500;
    l.disk_ns = 500;
    (void)run_line(&l, &stats, &settled);
    const double least = 2 * LEASES * 500 / 1.25;
    ck_assert_msg((double)settled >= least && (double)settled <= 1.1 * least, "%g ns instead of %g", (double)settled,
                  least);
    for (int way = 0; way < 2; way++) { /* each lane was slowed, and about alike */
      const uint64_t busy = stats.busy_ns[disk ? (way ? FLAP_LANE_DISK_WRITE : FLAP_LANE_DISK_READ)
                                               : (way ? FLAP_LANE_D2H : FLAP_LANE_H2D)];
      ck_assert_msg(busy > LEASES * 600 && (double)busy <= 1.1 * least, "%llu ns busy", (unsigned long long)busy);
    }
  }
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
  const uint64_t counted_ns = run_line(&read, &stats, &settled);
  /* The next read goes on while this lease is copied and computed with. */
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_DISK_READ], 900 + (LEASES - 1) * (900 - 50 - 100));
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_H2D], LEASES * 50);
  ck_assert_uint_eq(stats.busy_ns[FLAP_LANE_DISK_READ], LEASES * 900);
  ck_assert_uint_eq(stats.busy_ns[FLAP_LANE_H2D], LEASES * 50);
  read.counts_no_stalls = true;
  ck_assert_uint_eq(run_line(&read, &stats, &settled), counted_ns);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_DISK_READ], 0);
  ck_assert_uint_eq(stats.busy_ns[FLAP_LANE_DISK_READ], LEASES * 900);
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

/* ---- orders --------------------------------------------------------------------------------------------- */

/* A script over RAM regions of `chunks` pages each; a page takes 100 ns up and 100 ns down. */
typedef struct script {
  flap_pager_region regions[8];
  flap_pager_ring rings[2];
  flap_lease leases[8];
  uint32_t transfer_pages, copy_pages;
  uint64_t copy_ns;
  uint32_t region_count, lease_count, programs; /* the leases are run so many times, one program ahead */
  uint32_t empty;                               /* a region that holds nothing; 0: none */
  uint64_t compute_ns[8];
} script;

static flap_pager *open_script(const script *s, flap_clock *clock) {
  line l = {.synchronous = true, .h2d_ns = 100, .d2h_ns = 100, .disk_ns = 100, .copy_ns = s->copy_ns};
  flap_pager *pager = NULL;
  flap_pager_config config = {.page_bytes = PAGE_BYTES,
                              .transfer_bytes = s->transfer_pages * PAGE_BYTES,
                              .copy_bytes = s->copy_pages * PAGE_BYTES,
                              .region_count = s->region_count,
                              .regions = s->regions,
                              .ring_count = 2,
                              .rings = s->rings,
                              .read_buffers = 1,
                              .write_buffers = 1,
                              .leases_max = 8,
                              .clock = clock};
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  config.device =
      (flap_device_config){.kind = FLAP_DEVICE_SIM, .vram_bytes = sizes.vram_bytes, .machine = machine_of(&l)};
  flap_arena arena;
  flap_arena_measure(&arena, "ram");
  ck_assert_msg(flap_pager_open(&config, &arena, &pager) == FLAP_OK, "%s", flap_error_message());
  for (uint32_t i = 0; i < s->region_count; i++)
    if (s->empty == 0 || i != s->empty)
      ck_assert_int_eq(flap_pager_fill(pager, i, NULL, NULL), FLAP_OK);
  return pager;
}

/* Pins, computes and unpins one lease after the other; returns when lease `index` was pinned, in the last program. */
static uint64_t time_of_pin(const script *s, uint32_t index) {
  flap_clock *clock = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  flap_pager *pager = open_script(s, clock);
  uint64_t pinned_ns = 0;
  ck_assert_int_eq(flap_pager_begin(pager, s->leases, s->lease_count), FLAP_OK);
  for (uint32_t program = 0; program < s->programs; program++) {
    if (program + 1 < s->programs)
      ck_assert_int_eq(flap_pager_begin(pager, s->leases, s->lease_count), FLAP_OK);
    for (uint32_t i = 0; i < s->lease_count; i++) {
      void *memory = NULL;
      ck_assert_int_eq(flap_pager_pin(pager, i, &memory), FLAP_OK);
      if (i == index)
        pinned_ns = flap_clock_now_ns(clock);
      flap_device_sim_kernel(flap_pager_device(pager), (double)s->compute_ns[i], 0, true);
      flap_pager_unpin(pager, i);
    }
    ck_assert_int_eq(flap_pager_end(pager), FLAP_OK);
  }
  ck_assert_int_eq(flap_pager_settle(pager), FLAP_OK);
  flap_pager_close(pager);
  flap_clock_close(clock);
  return pinned_ns;
}

static script make_script(uint32_t slots, uint32_t other_slots) {
  script s = {.region_count = 4, .programs = 1, .transfer_pages = 1};
  s.rings[0] = (flap_pager_ring){.name = "first", .slot_bytes = PAGE_BYTES, .slots = slots};
  s.rings[1] = (flap_pager_ring){.name = "other", .slot_bytes = 100 * PAGE_BYTES, .slots = other_slots};
  for (uint32_t i = 0; i < 3; i++)
    s.regions[i] = (flap_pager_region){.bytes = PAGE_BYTES, .ring = 0, .ram_pages = 1};
  s.regions[3] = (flap_pager_region){.bytes = PAGE_BYTES, .ring = 1, .ram_pages = 1};
  return s;
}

static void add(script *s, uint32_t region, flap_lease_mode mode, uint64_t compute_ns) {
  s->compute_ns[s->lease_count] = compute_ns;
  s->leases[s->lease_count++] = (flap_lease){.region = region, .mode = mode};
}

START_TEST(order_full_ring_does_not_hold_up_another_ring) {
  script s = make_script(1, 1);
  add(&s, 0, FLAP_LEASE_READ, 1000);
  add(&s, 1, FLAP_LEASE_READ, 0);
  add(&s, 3, FLAP_LEASE_READ, 0);
  /* up, compute, up; the other ring's region came up during the first compute */
  ck_assert_uint_eq(time_of_pin(&s, 2), 100 + 1000 + 100);
}
END_TEST

START_TEST(order_next_program_is_loaded_during_this_one) {
  script s = make_script(2, 1);
  s.programs = 3;
  add(&s, 0, FLAP_LEASE_READ, 1000);
  ck_assert_uint_eq(time_of_pin(&s, 0), 100 + 2 * 1000);
}
END_TEST

/* The ring has one slot of its own and borrows two from region 3, a resident that holds nothing at first. */
static script make_script_of_a_loan(void) {
  script s = make_script(1, 1);
  s.rings[0].borrowed = 2;
  s.regions[3] = (flap_pager_region){.bytes = 2 * PAGE_BYTES, .ring = FLAP_PAGER_RESIDENT, .lends = true};
  s.empty = 3;
  return s;
}

START_TEST(order_borrowed_slots_are_loaded_ahead) {
  script s = make_script_of_a_loan();
  add(&s, 0, FLAP_LEASE_READ, 1000);
  add(&s, 1, FLAP_LEASE_READ, 1000);
  add(&s, 2, FLAP_LEASE_READ, 1000);
  ck_assert_uint_eq(time_of_pin(&s, 2), 100 + 2 * 1000);
  s.rings[0].borrowed = 1; /* the third lease comes up in the first one's slot, while the second one computes */
  ck_assert_uint_eq(time_of_pin(&s, 2), 100 + 2 * 1000);
  s.rings[0].borrowed = 0;
  ck_assert_uint_eq(time_of_pin(&s, 2), 3 * 100 + 2 * 1000);
}
END_TEST

START_TEST(order_what_comes_behind_the_lender_does_not_borrow_before) {
  script s = make_script_of_a_loan();
  add(&s, 0, FLAP_LEASE_READ, 1000);
  add(&s, 3, FLAP_LEASE_SCRATCH, 1000);
  add(&s, 1, FLAP_LEASE_READ, 1000);
  add(&s, 2, FLAP_LEASE_READ, 1000);
  /* The third comes up in the own slot of the first, while the lender computes; the fourth only then, in the lender. */
  ck_assert_uint_eq(time_of_pin(&s, 2), 100 + 2 * 1000);
  ck_assert_uint_eq(time_of_pin(&s, 3), 100 + 3 * 1000);
  s.compute_ns[2] = 50; /* too short for it */
  ck_assert_uint_eq(time_of_pin(&s, 3), 100 + 2 * 1000 + 100);
}
END_TEST

START_TEST(order_lender_waits_for_what_it_lent) {
  script s = make_script_of_a_loan();
  add(&s, 0, FLAP_LEASE_READ, 1000);
  add(&s, 1, FLAP_LEASE_UPDATE, 1000);
  add(&s, 3, FLAP_LEASE_SCRATCH, 1000);
  ck_assert_uint_eq(time_of_pin(&s, 2), 100 + 2 * 1000 + 100); /* until it is home */
  s.programs = 3; /* and what the next program begins with is there when it begins: only the lender is waited for */
  ck_assert_uint_eq(time_of_pin(&s, 0), 100 + 2 * (3 * 1000 + 100));
}
END_TEST

START_TEST(order_reads_of_one_region_do_not_wait_for_each_other) {
  script s = make_script(2, 1);
  add(&s, 0, FLAP_LEASE_READ, 1000);
  add(&s, 0, FLAP_LEASE_READ, 1000);
  ck_assert_uint_eq(time_of_pin(&s, 1), 100 + 1000);
}
END_TEST

START_TEST(order_read_of_a_changed_region_waits_until_it_is_home) {
  script s = make_script(2, 1);
  add(&s, 0, FLAP_LEASE_UPDATE, 1000);
  add(&s, 0, FLAP_LEASE_READ, 1000);
  ck_assert_uint_eq(time_of_pin(&s, 1), 100 + 1000 + 100 + 100);
}
END_TEST

START_TEST(order_lease_needed_first_passes_a_long_load) {
  script s = make_script(1, 1);
  s.regions[3].bytes = 100 * PAGE_BYTES;
  s.regions[3].ram_pages = 100;
  add(&s, 0, FLAP_LEASE_READ, 50);
  add(&s, 1, FLAP_LEASE_READ, 0);
  add(&s, 3, FLAP_LEASE_READ, 0);
  /* The second lease gets its slot at 150 ns, when the lane is full of the long load's pages. At 200 ns one of them
   * ends, and it goes ahead of all the others; they take the lane without a pause. */
  ck_assert_uint_eq(time_of_pin(&s, 1), 200 + PAGER_WINDOW * 100);
  ck_assert_uint_eq(time_of_pin(&s, 2), 102 * 100);
}
END_TEST

START_TEST(order_adjacent_pages_move_as_one_transfer) {
  script s = make_script(1, 1);
  s.transfer_pages = 4;
  s.copy_ns = 7;
  s.regions[3].bytes = 10 * PAGE_BYTES;
  s.regions[3].ram_pages = 10;
  add(&s, 3, FLAP_LEASE_READ, 0);
  ck_assert_uint_eq(time_of_pin(&s, 0), 10 * 100 + 3 * 7); /* 4, 4 and 2 pages */
}
END_TEST

START_TEST(order_adjacent_pages_in_ram_are_copied_together) {
  script s = make_script(1, 1);
  s.transfer_pages = 4;
  s.copy_pages = 8;
  s.copy_ns = 7;
  s.regions[3].bytes = 10 * PAGE_BYTES;
  s.regions[3].ram_pages = 10;
  add(&s, 3, FLAP_LEASE_READ, 0);
  ck_assert_uint_eq(time_of_pin(&s, 0), 10 * 100 + 2 * 7); /* 8 and 2 pages */
}
END_TEST

/* Both scripts begin with a long store that fills the lane at 0 ns, a page at its end every 100 ns. */
static script make_script_of_a_long_store(uint32_t slots) {
  script s = make_script(slots, 1);
  s.regions[3].bytes = 100 * PAGE_BYTES;
  s.regions[3].ram_pages = 100;
  add(&s, 3, FLAP_LEASE_CREATE, 0);
  return s;
}

START_TEST(order_store_whose_slot_is_wanted_passes_a_long_one) {
  script s = make_script_of_a_long_store(1);
  add(&s, 0, FLAP_LEASE_CREATE, 50);
  add(&s, 1, FLAP_LEASE_READ, 0);
  /* It is unpinned at 50 ns and goes onto the lane when the first page is home, at 100 ns; then the slot's next region
   * comes up. */
  ck_assert_uint_eq(time_of_pin(&s, 2), 100 + PAGER_WINDOW * 100 + 100);
}
END_TEST

START_TEST(order_store_whose_bytes_are_wanted_passes_a_long_one) {
  script s = make_script_of_a_long_store(2);
  add(&s, 0, FLAP_LEASE_UPDATE, 50);
  add(&s, 0, FLAP_LEASE_READ, 0);
  /* Up at 100 ns, unpinned at 150, onto the lane at 200. */
  ck_assert_uint_eq(time_of_pin(&s, 2), 200 + PAGER_WINDOW * 100 + 100);
}
END_TEST

START_TEST(order_copies_under_way_are_bounded_in_bytes) {
  script s = make_script(1, 1);
  const uint32_t pages = 2 * (uint32_t)(PAGER_WINDOW_BYTES / PAGE_BYTES);
  s.rings[1].slot_bytes = pages * (uint64_t)PAGE_BYTES;
  s.copy_pages = pages / 8;
  s.regions[3].bytes = s.rings[1].slot_bytes;
  s.regions[3].ram_pages = pages;
  add(&s, 0, FLAP_LEASE_READ, 50);
  add(&s, 1, FLAP_LEASE_READ, 0);
  add(&s, 3, FLAP_LEASE_READ, 0);
  /* Four copies of an eighth each are all that may stand before the second lease, which comes at 150 ns; it goes ahead
   * of the others when the first of them has ended. */
  ck_assert_uint_eq(time_of_pin(&s, 1), 100 + 100 * (4 * s.copy_pages + 1));
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
  tcase_add_test(tcase, overlap_disk_reads_ahead_of_a_single_slot);
  tcase_add_test(tcase, overlap_slot_is_reused_while_the_disk_still_writes);
  tcase_add_test(tcase, overlap_both_ways_take_what_both_can_do);
  tcase_add_test(tcase, stall_is_charged_to_the_lane_that_was_waited_for);
  tcase_add_test(tcase, order_full_ring_does_not_hold_up_another_ring);
  tcase_add_test(tcase, order_next_program_is_loaded_during_this_one);
  tcase_add_test(tcase, order_borrowed_slots_are_loaded_ahead);
  tcase_add_test(tcase, order_what_comes_behind_the_lender_does_not_borrow_before);
  tcase_add_test(tcase, order_lender_waits_for_what_it_lent);
  tcase_add_test(tcase, order_reads_of_one_region_do_not_wait_for_each_other);
  tcase_add_test(tcase, order_read_of_a_changed_region_waits_until_it_is_home);
  tcase_add_test(tcase, order_lease_needed_first_passes_a_long_load);
  tcase_add_test(tcase, order_adjacent_pages_move_as_one_transfer);
  tcase_add_test(tcase, order_adjacent_pages_in_ram_are_copied_together);
  tcase_add_test(tcase, order_store_whose_slot_is_wanted_passes_a_long_one);
  tcase_add_test(tcase, order_store_whose_bytes_are_wanted_passes_a_long_one);
  tcase_add_test(tcase, order_copies_under_way_are_bounded_in_bytes);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
