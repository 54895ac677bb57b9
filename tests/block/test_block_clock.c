/* The simulated disk on a virtual clock: times are those of two first-come lanes, to the nanosecond. */
#include "io/block/block.h"

#include <check.h>
#include <stdlib.h>

#define MIB ((uint64_t)1 << 20)

typedef struct clock_case {
  flap_clock *clock;
  flap_block *block;
  uint64_t notices;
} clock_case;

static void note(void *context) {
  ((clock_case *)context)->notices++;
}

static void open_both(clock_case *test, double both) {
  *test = (clock_case){0};
  ck_assert_int_eq(flap_clock_open(&test->clock), FLAP_OK);
  flap_block_config config = {.backend = FLAP_BLOCK_SIM,
                              .disk_count = 2,
                              .disks = {{.bytes = 1024 * MIB}, {.bytes = 3072 * MIB}},
                              .stripe_bytes = MIB,
                              .bytes = 4096 * MIB,
                              .requests_max = 64,
                              .notify = note,
                              .notify_context = test,
                              .sim = {.clock = test->clock,
                                      .read_bytes_per_second = 1048576.0 * 1000, /* 1 MiB takes 1 ms */
                                      .write_bytes_per_second = 1048576.0 * 500,
                                      .both_bytes_per_second = both,
                                      .latency_ns = 70000}};
  ck_assert_msg(flap_block_open(&config, &test->block) == FLAP_OK, "%s", flap_error_message());
  ck_assert_str_eq(flap_block_describe(test->block), "sim");
}

static void open_case(clock_case *test) {
  open_both(test, 0);
}

static void close_case(clock_case *test) {
  flap_block_close(test->block);
  flap_clock_close(test->clock);
}

static flap_block_request make(flap_block_op op, uint64_t index, uint64_t mib) {
  return (flap_block_request){.op = op, .offset = index * 4 * MIB, .bytes = (uint32_t)(mib * MIB)};
}

START_TEST(clock_disk_lanes_are_first_come_first_served) {
  clock_case test;
  open_case(&test);
  flap_block_request requests[8];
  for (uint64_t r = 0; r < 8; r++) {
    requests[r] = make(r % 2 == 0 ? FLAP_BLOCK_READ : FLAP_BLOCK_WRITE, r, 1 + r / 2);
    flap_block_submit(test.block, &requests[r]);
  }
  flap_block_flush(test.block);
  ck_assert_ptr_null(flap_block_poll(test.block));
  uint64_t free_ns[2] = {0, 0};
  while (flap_clock_advance(test.clock))
    ;
  ck_assert_uint_eq(test.notices, 8);
  for (uint64_t r = 0; r < 8; r++) {
    uint64_t service_ns = (1 + r / 2) * (r % 2 == 0 ? 1000000u : 2000000u);
    ck_assert_int_eq(requests[r].status, FLAP_OK);
    ck_assert_uint_eq(requests[r].started_ns, free_ns[r % 2]);
    free_ns[r % 2] += service_ns;
    ck_assert_uint_eq(requests[r].ended_ns, free_ns[r % 2] + 70000);
  }
  uint64_t before_ns = 0;
  for (int r = 0; r < 8; r++) {
    flap_block_request *request = flap_block_poll(test.block);
    ck_assert_ptr_nonnull(request);
    ck_assert_uint_ge(request->ended_ns, before_ns);
    before_ns = request->ended_ns;
  }
  ck_assert_ptr_null(flap_block_poll(test.block));
  close_case(&test);
}
END_TEST

START_TEST(clock_disk_idle_lane_starts_now) {
  clock_case test;
  open_case(&test);
  flap_block_request first = make(FLAP_BLOCK_READ, 0, 1), second = make(FLAP_BLOCK_READ, 1, 2);
  flap_block_submit(test.block, &first);
  flap_clock_advance_to(test.clock, 5000000);
  ck_assert_ptr_eq(flap_block_poll(test.block), &first);
  flap_block_submit(test.block, &second);
  flap_clock_advance_to(test.clock, 5000000 + 2069999);
  ck_assert_ptr_null(flap_block_poll(test.block));
  flap_clock_advance_to(test.clock, 5000000 + 2070000);
  ck_assert_ptr_eq(flap_block_poll(test.block), &second);
  ck_assert_uint_eq(second.started_ns, 5000000);
  close_case(&test);
}
END_TEST

/* Reading alone 1 MiB a ms, writing half of that, together as much as reading alone: what reads is beside a write gets
 * a half. */
START_TEST(clock_disk_lanes_slow_each_other) {
  clock_case test;
  open_both(&test, 1048576.0 * 1000);
  flap_block_request write = make(FLAP_BLOCK_WRITE, 0, 2), read = make(FLAP_BLOCK_READ, 1, 3);
  flap_block_request late = make(FLAP_BLOCK_READ, 2, 1);
  flap_block_submit(test.block, &write); /* 0 .. 4 ms, as promised */
  flap_block_submit(test.block, &read);  /* 2 MiB in 4 ms, and 1 MiB alone */
  flap_block_submit(test.block, &late);
  flap_block_flush(test.block);
  while (flap_clock_advance(test.clock))
    ;
  ck_assert_uint_eq(write.ended_ns, 4000000 + 70000);
  ck_assert_uint_eq(read.ended_ns, 5000000 + 70000);
  ck_assert_uint_eq(late.ended_ns, 6000000 + 70000);
  close_case(&test);
}
END_TEST

START_TEST(clock_disk_close_runs_what_is_in_flight) {
  clock_case test;
  open_case(&test);
  flap_block_request request = make(FLAP_BLOCK_WRITE, 0, 1);
  flap_block_submit(test.block, &request);
  close_case(&test);
  ck_assert_uint_eq(request.ended_ns, 2070000);
}
END_TEST

START_TEST(clock_disk_without_rates_is_refused) {
  clock_case test = {0};
  ck_assert_int_eq(flap_clock_open(&test.clock), FLAP_OK);
  flap_block_config config = {.backend = FLAP_BLOCK_SIM,
                              .disk_count = 1,
                              .disks = {{.bytes = MIB}},
                              .bytes = MIB,
                              .requests_max = 1,
                              .sim = {.clock = test.clock, .read_bytes_per_second = 1}};
  ck_assert_int_eq(flap_block_open(&config, &test.block), FLAP_INVALID);
  ck_assert_ptr_null(test.block);
  flap_clock_close(test.clock);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("clock");
  tcase_add_test(tests, clock_disk_lanes_are_first_come_first_served);
  tcase_add_test(tests, clock_disk_idle_lane_starts_now);
  tcase_add_test(tests, clock_disk_lanes_slow_each_other);
  tcase_add_test(tests, clock_disk_close_runs_what_is_in_flight);
  tcase_add_test(tests, clock_disk_without_rates_is_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
