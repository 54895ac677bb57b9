/* The disk measurement: it gives rates, leaves nothing, and refuses nonsense. How fast is no matter here. */
#include "tests/block/block_harness.h"

#include "io/block/measure.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

START_TEST(measure_rates_are_finite_and_nothing_is_left) {
  const flap_block_backend backends[] = {FLAP_BLOCK_AUTO, FLAP_BLOCK_URING, FLAP_BLOCK_THREADS, FLAP_BLOCK_SIM};
  char folder[] = "/tmp/flap-test-XXXXXX";
  ck_assert_ptr_nonnull(mkdtemp(folder));
  flap_block_rates rates = {0};
  flap_status status = flap_block_measure_rates(folder, 24 * MIB, 65536, 4, backends[_i], &rates);
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
  ck_assert(isfinite(rates.read_bytes) && rates.read_bytes > 1e6);
  ck_assert(isfinite(rates.write_bytes) && rates.write_bytes > 1e6);
  ck_assert(isfinite(rates.both_bytes) && rates.both_bytes > 1e6);
  ck_assert_int_eq(rmdir(folder), 0);
}
END_TEST

START_TEST(measure_extent_smaller_than_the_queue_works) {
  flap_block_rates rates = {0};
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, MIB, 0, FLAP_BLOCK_AUTO, &rates), FLAP_OK);
  ck_assert(rates.read_bytes > 0 && rates.write_bytes > 0 && rates.both_bytes > 0);
}
END_TEST

START_TEST(measure_nonsense_is_refused) {
  flap_block_rates rates = {1, 1, 1};
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, 0, 4, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, 1000, 4, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/tmp", 3 * MIB, 2 * MIB, 4, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, MIB, 5000, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/nowhere", MIB, MIB, 4, FLAP_BLOCK_AUTO, &rates), FLAP_NOT_FOUND);
  ck_assert(rates.read_bytes == 0 && rates.write_bytes == 0 && rates.both_bytes == 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("measure");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, measure_rates_are_finite_and_nothing_is_left, 0, 4);
  tcase_add_test(tests, measure_extent_smaller_than_the_queue_works);
  tcase_add_test(tests, measure_nonsense_is_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
