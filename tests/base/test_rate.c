/* Measured rates: the statistics, how much work a round gets, and what a failure leaves. */
#include "base/rate.h"

#include "base/units.h"

#include <check.h>

typedef struct work {
  uint64_t unit_ns, calls, units_last, fail_at;
} work;

/* Waits as long as so many units take. */
static flap_status wait_units(void *context, uint64_t units) {
  work *w = context;
  w->calls++;
  w->units_last = units;
  if (w->calls == w->fail_at)
    return flap_error_set(FLAP_IO, "the work fails");
  const uint64_t until_ns = flap_units_now_ns() + units * w->unit_ns;
  while (flap_units_now_ns() < until_ns) {
  }
  return FLAP_OK;
}

START_TEST(rate_of_values_is_median_with_extremes) {
  double odd[] = {5, 1, 3}, even[] = {4, 1, 2, 9}, one[] = {7};
  flap_rate rate = flap_rate_of(odd, 3);
  ck_assert_double_eq(rate.median, 3);
  ck_assert_double_eq(rate.least, 1);
  ck_assert_double_eq(rate.most, 5);
  ck_assert_uint_eq(rate.rounds, 3);
  ck_assert_double_eq_tol(flap_rate_spread(&rate), 2.0 / 3, 1e-12);
  ck_assert_double_eq(flap_rate_of(even, 4).median, 3);
  rate = flap_rate_of(one, 1);
  ck_assert_double_eq(rate.median, 7);
  ck_assert_double_eq(flap_rate_spread(&rate), 0);
  ck_assert_double_eq(flap_rate_spread(&(flap_rate){0}), 0);
}
END_TEST

/* A unit of 50 us and rounds of 5 ms: about a hundred units a round, and never more of them per second than the work
 * allows. How many fewer depends on what else the machine does. */
START_TEST(rate_rounds_are_filled_with_work) {
  work w = {.unit_ns = 50000};
  flap_rate rate;
  const flap_rate_effort effort = {.rounds = 5, .round_ns = 5000000};
  ck_assert_int_eq(flap_rate_measure(&effort, wait_units, &w, 1000, &rate), FLAP_OK);
  ck_assert_uint_ge(w.units_last, 10);
  ck_assert_uint_le(w.units_last, 200);
  ck_assert_uint_ge(rate.rounds, 1);
  ck_assert_uint_le(rate.rounds, 5);
  ck_assert_double_le(rate.most, 1000 / 50e-6 * 1.0001);
  ck_assert(rate.least > 0 && rate.least <= rate.median && rate.median <= rate.most);
}
END_TEST

/* A unit takes 20 times as long as a round may: three rounds, however many were asked for. */
START_TEST(rate_of_slow_work_ends_early) {
  work w = {.unit_ns = 20000000};
  flap_rate rate;
  const flap_rate_effort effort = {.rounds = 5, .round_ns = 1000000};
  ck_assert_int_eq(flap_rate_measure(&effort, wait_units, &w, 1, &rate), FLAP_OK);
  ck_assert_uint_eq(rate.rounds, 3);
  ck_assert_uint_eq(w.units_last, 1);
  ck_assert_uint_eq(w.calls, 6); /* the first, two to learn from, three that count */
}
END_TEST

START_TEST(rate_of_very_slow_work_is_one_round) {
  work w = {.unit_ns = 700000000};
  flap_rate rate;
  const flap_rate_effort effort = {.rounds = 5, .round_ns = 1000000};
  ck_assert_int_eq(flap_rate_measure(&effort, wait_units, &w, 1, &rate), FLAP_OK);
  ck_assert_uint_eq(rate.rounds, 1);
  ck_assert_uint_eq(w.calls, 4);
}
END_TEST

START_TEST(rate_of_failing_work_is_none) {
  for (uint64_t at = 1; at <= 4; at++) {
    work w = {.unit_ns = 2000000, .fail_at = at};
    flap_rate rate = {.rounds = 9};
    const flap_rate_effort effort = {.rounds = 2, .round_ns = 1000000};
    ck_assert_int_eq(flap_rate_measure(&effort, wait_units, &w, 1, &rate), FLAP_IO);
    ck_assert_uint_eq(w.calls, at);
    ck_assert(rate.rounds == 0 && rate.median == 0);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("rate");
  tcase_add_test(tests, rate_of_values_is_median_with_extremes);
  tcase_add_test(tests, rate_rounds_are_filled_with_work);
  tcase_add_test(tests, rate_of_slow_work_ends_early);
  tcase_add_test(tests, rate_of_very_slow_work_is_one_round);
  tcase_add_test(tests, rate_of_failing_work_is_none);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
