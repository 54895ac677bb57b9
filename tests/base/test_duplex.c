/* Two lanes that slow each other down: ends by hand, and nothing faster than the least. */
#include "base/duplex.h"
#include "base/philox.h"

#include <check.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

static const flap_duplex half = {.alone_bytes = 1e9, .other_alone_bytes = 1e9, .both_bytes = 1.4e9};

START_TEST(end_beside_a_busy_lane_is_by_what_is_left_of_both) {
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 100, 1000, 0, 0), 1100); /* the other rests */
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 100, 1000, 0, 100), 1100);
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 100, 1000, 1100, 9000), 1100);    /* it starts when this one is over */
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 100, 1000, 0, 9000), 100 + 2500); /* at 0.4 a ns */
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 100, 1000, 0, 1100), 1100 + 600); /* 400 beside it, 600 alone */
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 100, 1000, 300, 800), 800 + 600); /* 200 alone, 200 beside, 600 alone */
  const flap_duplex free = {.alone_bytes = 1e9, .other_alone_bytes = 2e9};
  ck_assert_uint_eq(flap_duplex_end_ns(&free, 100, 1000, 0, 9000), 1100);
  const flap_duplex none = {.alone_bytes = 1e9, .other_alone_bytes = 2e9, .both_bytes = 1.5e9}; /* nothing is left */
  ck_assert_uint_eq(flap_duplex_end_ns(&none, 100, 1000, 0, 9000), 10000);
  const flap_duplex odd = {.alone_bytes = 1e9, .other_alone_bytes = 1e9, .both_bytes = 3e9}; /* never above alone */
  ck_assert_uint_eq(flap_duplex_end_ns(&odd, 100, 1000, 0, 9000), 1100);
  ck_assert_uint_eq(flap_duplex_end_ns(&half, 5, 0, 0, 9000), 5);
}
END_TEST

START_TEST(two_busy_lanes_take_the_least_together) {
  const uint64_t seed = 11;
  flap_philox stream = flap_philox_stream(seed, "duplex");
  uint64_t draw = 0;
  for (int round = 0; round < 200; round++) {
    const double read = 1e9 + (double)flap_philox_below(&stream, draw++, 1000000000);
    const double write = 1e9 + (double)flap_philox_below(&stream, draw++, 1000000000);
    const double more = (double)flap_philox_below(&stream, draw++, 150) / 100 - 0.5; /* than the faster lane alone */
    const double both = fmin(fmax(read, write) * (1 + more), read + write);
    const bool turns = both < fmax(read, write); /* whoever goes on first is not what is best then */
    const flap_duplex lanes[2] = {{read, write, both}, {write, read, both}};
    uint64_t ends[2] = {0, 0};
    double moved[2] = {0, 0};
    for (int i = 0; i < 40000; i++) { /* the lane that is free first goes on: both are busy to the end */
      const int lane = ends[0] <= ends[1] ? 0 : 1;
      const double bytes = 1000 + (double)flap_philox_below(&stream, draw++, 100000);
      ends[lane] = flap_duplex_end_ns(&lanes[lane], ends[lane], bytes, 0, ends[1 - lane]);
      moved[lane] += bytes;
    }
    const double took = (double)(ends[0] > ends[1] ? ends[0] : ends[1]) * 1e-9;
    const double least = flap_duplex_least_seconds(moved[0], moved[1], &lanes[0]);
    ck_assert_msg(took >= least * 0.9999, "round %d: %g s, but at least %g", round, took, least);
    ck_assert_msg(turns || both == read + write || took <= least * 1.02, "round %d: %g s, and the least is %g", round,
                  took, least);
  }
}
END_TEST

START_TEST(least_is_at_the_rate_of_both) {
  ck_assert_double_eq(flap_duplex_least_seconds(7e9, 7e9, &half), 10);
  ck_assert_double_eq(flap_duplex_least_seconds(14e9, 0, &half), 14); /* one lane is not faster than alone */
  const flap_duplex slower = {.alone_bytes = 1e9, .other_alone_bytes = 2e9, .both_bytes = 0.5e9};
  ck_assert_double_eq(flap_duplex_least_seconds(1e9, 1e9, &slower), 1.5); /* taking turns is best */
  /* Of 1.5e9 both can do 0.5e9 beside the one; the rest of the other goes on alone, at 2e9. */
  const flap_duplex between = {.alone_bytes = 1e9, .other_alone_bytes = 2e9, .both_bytes = 1.5e9};
  ck_assert_double_eq_tol(flap_duplex_least_seconds(2e9, 3e9, &between), 3, 1e-9);
  ck_assert_double_eq_tol(flap_duplex_least_seconds(3e9, 2e9, &between), 3.25, 1e-9);
  const flap_duplex free = {.alone_bytes = 1e9, .other_alone_bytes = 2e9};
  ck_assert_double_eq(flap_duplex_least_seconds(1e9, 1e9, &free), 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("duplex");
  tcase_add_test(tests, end_beside_a_busy_lane_is_by_what_is_left_of_both);
  tcase_add_test(tests, two_busy_lanes_take_the_least_together);
  tcase_add_test(tests, least_is_at_the_rate_of_both);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
