/* What a run writes in all, where numbers are too large for 64 bits. */
#include "engine/planner/wear.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static flap_run_config config;
static flap_plan plan;

static void setup(void) {
  flap_run_config_defaults(&config);
  memset(&plan, 0, sizeof plan);
  config.save_strategy = FLAP_STRATEGY_NO;
  config.ssd_budget = (uint64_t)1 << 40;
}

static void teardown(void) {
  flap_run_config_close(&config);
}

START_TEST(wear_of_more_steps_than_64_bits_count_is_over_the_budget) {
  plan.ssd_step_bytes = (uint64_t)1 << 40;
  flap_wear_describe(&config, &(flap_wear_run){.end = 1 << 24}, &plan); /* 2^64 bytes */
  ck_assert_uint_eq(plan.ssd_run_bytes, UINT64_MAX);
  ck_assert_int_eq(flap_wear_check(&config, &plan), FLAP_BUDGET);
  flap_wear_describe(&config, &(flap_wear_run){.end = 1}, &plan);
  ck_assert_int_eq(flap_wear_check(&config, &plan), FLAP_OK);
  plan.ssd_before_bytes = UINT64_MAX - plan.ssd_run_bytes + 1;
  ck_assert_int_eq(flap_wear_check(&config, &plan), FLAP_BUDGET);
}
END_TEST

START_TEST(wear_of_more_checkpoints_than_64_bits_count_is_over_the_budget) {
  config.save_strategy = FLAP_STRATEGY_STEPS;
  config.save_steps = 1;
  plan.checkpoint_bytes = (uint64_t)1 << 50;
  flap_wear_describe(&config, &(flap_wear_run){.end = 1 << 14}, &plan);
  ck_assert_int_eq(flap_wear_check(&config, &plan), FLAP_BUDGET);
}
END_TEST

START_TEST(wear_counts_epochs_of_long_runs) {
  config.save_strategy = FLAP_STRATEGY_EPOCH;
  const flap_wear_run small = {
      .end = 11, .step_sequences = 3, .sequences = 7}; /* 33 sequences: 4 epochs, and the end */
  flap_wear_describe(&config, &small, &plan);
  ck_assert_uint_eq(plan.run_checkpoints, 5);
  /* 2^65 sequences until now and 2^64 more, in epochs of 2^30 + 1. */
  const flap_wear_run large = {.start = (uint64_t)1 << 41,
                               .end = (uint64_t)3 << 40,
                               .step_sequences = 1 << 24,
                               .sequences = ((uint64_t)1 << 30) + 1};
  flap_wear_describe(&config, &large, &plan);
  ck_assert_uint_ge(plan.run_checkpoints, ((uint64_t)1 << 34) - 32);
  ck_assert_uint_le(plan.run_checkpoints, (uint64_t)1 << 34);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("wear");
  TCase *tests = tcase_create("all");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, wear_of_more_steps_than_64_bits_count_is_over_the_budget);
  tcase_add_test(tests, wear_of_more_checkpoints_than_64_bits_count_is_over_the_budget);
  tcase_add_test(tests, wear_counts_epochs_of_long_runs);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
