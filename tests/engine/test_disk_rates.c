/* What several disks do together: the one that takes longest decides, and a drive counts once. */
#include "engine/machine/disk_rates.h"

#include <check.h>
#include <stdlib.h>

static flap_disk_set two(double first, double second, uint32_t drive) {
  return (flap_disk_set){
      .count = 2,
      .disks = {{.read_bytes = 2 * first, .write_bytes = first, .both_bytes = 2 * first, .drive = 0},
                {.read_bytes = 2 * second, .write_bytes = second, .both_bytes = 2 * second, .drive = drive}}};
}

START_TEST(disks_weighted_as_measured_add_up) {
  flap_disk_set set = two(3e9, 1e9, 1);
  flap_machine machine;
  flap_disk_set_weigh(&set, NULL);
  ck_assert_uint_eq(set.disks[0].weight, 3 * set.disks[1].weight);
  flap_disk_set_rates(&set, NULL, &machine);
  ck_assert_double_eq_tol(machine.disk_read_bytes, 8e9, 1);
  ck_assert_double_eq_tol(machine.disk_write_bytes, 4e9, 1);
  ck_assert_double_eq_tol(machine.disk_both_bytes, 8e9, 1);
}
END_TEST

START_TEST(disk_with_more_than_its_share_decides) {
  flap_disk_set set = two(3e9, 1e9, 1);
  flap_machine machine;
  flap_disk_set_weigh(&set, NULL);
  flap_disk_set_rates(&set, (const uint64_t[FLAP_RUN_DISKS_MAX]){100, 100}, &machine);
  ck_assert_double_eq_tol(machine.disk_read_bytes, 4e9, 1); /* twice the slower one's 2e9 */
  ck_assert_double_eq_tol(machine.disk_write_bytes, 2e9, 1);
  flap_disk_set_rates(&set, (const uint64_t[FLAP_RUN_DISKS_MAX]){0, 100}, &machine);
  ck_assert_double_eq(machine.disk_read_bytes, 2e9);
  flap_disk_set_rates(&set, (const uint64_t[FLAP_RUN_DISKS_MAX]){0, 0}, &machine);
  ck_assert_double_eq(machine.disk_read_bytes, 0);
}
END_TEST

START_TEST(folders_on_one_drive_share_it) {
  flap_disk_set set = two(3e9, 3e9, 0);
  flap_machine machine;
  flap_disk_set_weigh(&set, NULL);
  ck_assert_uint_eq(set.disks[0].weight, set.disks[1].weight);
  ck_assert_uint_eq(set.disks[0].weight, 3000000000);
  flap_disk_set_rates(&set, NULL, &machine);
  ck_assert_double_eq(machine.disk_read_bytes, 6e9);
  ck_assert_double_eq(machine.disk_write_bytes, 3e9);
}
END_TEST

START_TEST(disk_that_is_full_slows_nothing_down) {
  flap_disk_set set = two(0, 1e9, 1);
  flap_machine machine;
  set.disks[0].full = true;
  flap_disk_set_weigh(&set, NULL);
  flap_disk_set_rates(&set, NULL, &machine);
  ck_assert_double_eq(machine.disk_read_bytes, 2e9);
  ck_assert_double_eq(machine.disk_write_bytes, 1e9);
}
END_TEST

START_TEST(weights_that_are_given_win) {
  flap_disk_set set = two(3e9, 1e9, 1);
  static flap_run_config config;
  flap_machine machine;
  config.disk_count = 2;
  config.disk[0].weight = 0.5;
  config.disk[1].weight = 1.5;
  flap_disk_set_weigh(&set, &config);
  ck_assert_uint_eq(3 * set.disks[0].weight, set.disks[1].weight);
  flap_disk_set_rates(&set, NULL, &machine);
  ck_assert_double_eq_tol(machine.disk_read_bytes, 2e9 / 0.75, 1);
}
END_TEST

START_TEST(unknown_rates_of_both_ways_stay_unknown) {
  flap_disk_set set = two(3e9, 1e9, 1);
  flap_machine machine;
  set.disks[0].both_bytes = set.disks[1].both_bytes = 0;
  flap_disk_set_weigh(&set, NULL);
  flap_disk_set_rates(&set, NULL, &machine);
  ck_assert_double_eq(machine.disk_both_bytes, 0);
  set.disks[1].both_bytes = 2e9; /* the first one does as much as each way alone: 9e9 */
  flap_disk_set_weigh(&set, NULL);
  flap_disk_set_rates(&set, NULL, &machine);
  ck_assert_double_eq_tol(machine.disk_both_bytes, 11e9, 1);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("disk_rates");
  tcase_add_test(tcase, disks_weighted_as_measured_add_up);
  tcase_add_test(tcase, disk_with_more_than_its_share_decides);
  tcase_add_test(tcase, folders_on_one_drive_share_it);
  tcase_add_test(tcase, disk_that_is_full_slows_nothing_down);
  tcase_add_test(tcase, weights_that_are_given_win);
  tcase_add_test(tcase, unknown_rates_of_both_ways_stay_unknown);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
