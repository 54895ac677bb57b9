/* Schedules against what transformers 4.57.1 and the formulae of PyTorch give. */
#include "engine/step/schedule.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>

static flap_run_config config_with(flap_scheduler scheduler) {
  flap_run_config config;
  flap_run_config_defaults(&config);
  config.learning_rate = 5e-5;
  config.lr_scheduler_type = scheduler;
  return config;
}

/* 5e-5 times transformers.optimization._get_*_schedule_with_warmup_lr_lambda, printed with %.17g. */
static const struct {
  flap_scheduler scheduler;
  uint64_t warmup, steps, step;
  double learning_rate;
} recorded[] = {
    {FLAP_SCHEDULER_LINEAR, 0, 10, 0, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_LINEAR, 0, 10, 1, 4.5000000000000003e-05},
    {FLAP_SCHEDULER_LINEAR, 0, 10, 5, 2.5000000000000001e-05},
    {FLAP_SCHEDULER_LINEAR, 0, 10, 9, 5.0000000000000004e-06},
    {FLAP_SCHEDULER_LINEAR, 0, 10, 10, 0},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 0, 0},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 1, 1.6666666666666667e-05},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 2, 3.3333333333333335e-05},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 3, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 4, 4.2857142857142856e-05},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 9, 7.1428571428571427e-06},
    {FLAP_SCHEDULER_LINEAR, 3, 10, 10, 0},
    {FLAP_SCHEDULER_LINEAR, 20, 10, 0, 0},
    {FLAP_SCHEDULER_LINEAR, 20, 10, 9, 2.2500000000000001e-05},
    {FLAP_SCHEDULER_LINEAR, 10, 10, 9, 4.5000000000000003e-05},
    {FLAP_SCHEDULER_LINEAR, 10, 10, 10, 0},
    {FLAP_SCHEDULER_LINEAR, 100, 1234, 99, 4.9500000000000004e-05},
    {FLAP_SCHEDULER_LINEAR, 100, 1234, 100, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_LINEAR, 100, 1234, 777, 2.0149911816578486e-05},
    {FLAP_SCHEDULER_LINEAR, 100, 1234, 1233, 4.4091710758377425e-08},
    {FLAP_SCHEDULER_COSINE, 0, 10, 0, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_COSINE, 0, 10, 1, 4.8776412907378843e-05},
    {FLAP_SCHEDULER_COSINE, 0, 10, 5, 2.5000000000000001e-05},
    {FLAP_SCHEDULER_COSINE, 0, 10, 9, 1.2235870926211619e-06},
    {FLAP_SCHEDULER_COSINE, 0, 10, 10, 0},
    {FLAP_SCHEDULER_COSINE, 3, 10, 0, 0},
    {FLAP_SCHEDULER_COSINE, 3, 10, 2, 3.3333333333333335e-05},
    {FLAP_SCHEDULER_COSINE, 3, 10, 3, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_COSINE, 3, 10, 4, 4.7524221697560477e-05},
    {FLAP_SCHEDULER_COSINE, 3, 10, 9, 2.4757783024395241e-06},
    {FLAP_SCHEDULER_COSINE, 3, 10, 10, 0},
    {FLAP_SCHEDULER_COSINE, 100, 1234, 99, 4.9500000000000004e-05},
    {FLAP_SCHEDULER_COSINE, 100, 1234, 100, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_COSINE, 100, 1234, 777, 1.7498870207885813e-05},
    {FLAP_SCHEDULER_COSINE, 100, 1234, 1233, 9.5936389821194019e-11},
    {FLAP_SCHEDULER_COSINE, 20, 10, 9, 2.2500000000000001e-05},
    {FLAP_SCHEDULER_CONSTANT, 3, 10, 0, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_CONSTANT, 3, 10, 9, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 0, 10, 0, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 0, 10, 9, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 3, 10, 0, 0},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 3, 10, 1, 1.6666666666666667e-05},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 3, 10, 2, 3.3333333333333335e-05},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 3, 10, 3, 5.0000000000000002e-05},
    {FLAP_SCHEDULER_CONSTANT_WITH_WARMUP, 3, 10, 9, 5.0000000000000002e-05},
};

START_TEST(learning_rate_equals_transformers) {
  for (size_t i = 0; i < sizeof recorded / sizeof *recorded; i++) {
    flap_run_config config = config_with(recorded[i].scheduler);
    double got = flap_schedule_learning_rate(&config, recorded[i].warmup, recorded[i].steps, recorded[i].step);
    ck_assert_msg(fabs(got - recorded[i].learning_rate) <= 1e-20 + 1e-12 * recorded[i].learning_rate,
                  "entry %zu: %.17g instead of %.17g", i, got, recorded[i].learning_rate);
  }
}
END_TEST

START_TEST(learning_rate_never_leaves_its_range) {
  for (int scheduler = FLAP_SCHEDULER_LINEAR; scheduler <= FLAP_SCHEDULER_CONSTANT_WITH_WARMUP; scheduler++)
    for (uint64_t steps = 1; steps < 12; steps++)
      for (uint64_t warmup = 0; warmup < 14; warmup++)
        for (uint64_t step = 0; step < steps + 3; step++) {
          flap_run_config config = config_with((flap_scheduler)scheduler);
          double got = flap_schedule_learning_rate(&config, warmup, steps, step);
          ck_assert(got >= 0 && got <= config.learning_rate);
        }
}
END_TEST

START_TEST(steps_follow_max_steps_then_epochs) {
  flap_run_config config = config_with(FLAP_SCHEDULER_LINEAR);
  config.num_train_epochs = 3;
  ck_assert_uint_eq(flap_schedule_steps(&config, 100, 8), 38); /* 37.5: no short step at the end of each epoch */
  ck_assert_uint_eq(flap_schedule_steps(&config, 96, 8), 36);
  ck_assert_uint_eq(flap_schedule_steps(&config, 1, 8), 1);
  ck_assert_uint_eq(flap_schedule_steps(&config, 0, 8), 1);
  config.num_train_epochs = 0.25;
  ck_assert_uint_eq(flap_schedule_steps(&config, 100, 8), 4);
  config.num_train_epochs = 0.001;
  ck_assert_uint_eq(flap_schedule_steps(&config, 100, 8), 1);
  config.num_train_epochs = 1e9;
  ck_assert_uint_eq(flap_schedule_steps(&config, (uint64_t)1 << 62, 1), (uint64_t)1 << 53);
  config.max_steps = 7;
  ck_assert_uint_eq(flap_schedule_steps(&config, 100, 8), 7);
}
END_TEST

/* A run that goes on with more or fewer sequences a step ends where its epochs do. */
START_TEST(steps_of_a_run_that_goes_on_count_what_it_has_seen) {
  flap_run_config config = config_with(FLAP_SCHEDULER_LINEAR);
  config.num_train_epochs = 3;
  for (uint64_t done = 0; done < 60; done++)
    ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 8, done, 8 * done), 38);
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 16, 20, 160), 29); /* 140 of 300 left */
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 4, 20, 160), 55);
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 4, 37, 296), 38);
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 4, 38, 304), 37); /* one more than 300 needed */
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 8, 25, 300), 25);
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 1, 38, 304), 34);
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 1, 3, 400), 1);
  config.max_steps = 7;
  ck_assert_uint_eq(flap_schedule_steps_from(&config, 100, 4, 5, 40), 7);
}
END_TEST

START_TEST(warmup_steps_win_over_the_ratio) {
  /* math.ceil(steps * ratio) in Python. */
  static const struct {
    uint64_t steps;
    double ratio;
    uint64_t warmup;
  } cases[] = {{1000, 0.03, 30}, {100, 0.07, 8}, {10, 0.01, 1}, {7, 0, 0}, {123457, 0.1, 12346}, {50, 1, 50}};
  flap_run_config config = config_with(FLAP_SCHEDULER_LINEAR);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    config.warmup_ratio = cases[i].ratio;
    ck_assert_uint_eq(flap_schedule_warmup(&config, cases[i].steps), cases[i].warmup);
  }
  config.warmup_ratio = 0.5;
  config.warmup_steps = 3;
  ck_assert_uint_eq(flap_schedule_warmup(&config, 1000), 3);
}
END_TEST

START_TEST(clip_scales_only_what_is_too_long) {
  ck_assert_double_eq(flap_schedule_clip(1, 0), 1);
  ck_assert_double_eq(flap_schedule_clip(1, 0.5), 1);
  ck_assert_double_eq(flap_schedule_clip(1, 4), 1 / 4.000001);
  ck_assert_double_eq(flap_schedule_clip(1, 1), 1 / 1.000001); /* as torch: the 1e-6 bites at the limit */
  ck_assert_double_eq(flap_schedule_clip(0.5, 2), 0.5 / 2.000001);
  ck_assert_double_eq(flap_schedule_clip(0, 1e9), 1);
}
END_TEST

START_TEST(adamw_scalars_are_rounded_once) {
  /* 1 / (1 - beta1 ** t) and 1 / sqrt(1 - beta2 ** t) of Python, rounded to fp32. */
  static const struct {
    double beta1, beta2;
    uint64_t t;
    float inverse_bias1, inverse_sqrt_bias2;
  } cases[] = {{0.9, 0.999, 1, 10, 31.622776f},
               {0.9, 0.999, 1000, 1, 1.2575835f},
               {0.9, 0.95, 7, 1.91679907f, 1.82070339f},
               {0, 0, 5, 1, 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    flap_run_config config = config_with(FLAP_SCHEDULER_LINEAR);
    config.adam_beta1 = cases[i].beta1;
    config.adam_beta2 = cases[i].beta2;
    config.adam_epsilon = 1e-8;
    config.weight_decay = 0.1;
    flap_adamw scalars;
    flap_schedule_adamw(&config, 3e-4, 0.25, cases[i].t - 1, &scalars);
    ck_assert_float_eq(scalars.inverse_bias1, cases[i].inverse_bias1);
    ck_assert_float_eq(scalars.inverse_sqrt_bias2, cases[i].inverse_sqrt_bias2);
    ck_assert_float_eq(scalars.beta1, (float)cases[i].beta1);
    ck_assert_float_eq(scalars.beta2, (float)cases[i].beta2);
    ck_assert_float_eq(scalars.one_minus_beta1, (float)(1 - cases[i].beta1));
    ck_assert_float_eq(scalars.one_minus_beta2, (float)(1 - cases[i].beta2));
    ck_assert_float_eq(scalars.learning_rate, 3e-4f);
    ck_assert_float_eq(scalars.epsilon, 1e-8f);
    ck_assert_float_eq(scalars.decay, 0.999970019f);
    ck_assert_float_eq(scalars.gradient_scale, 0.25f);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("schedule");
  TCase *tests = tcase_create("all");
  tcase_add_test(tests, learning_rate_equals_transformers);
  tcase_add_test(tests, learning_rate_never_leaves_its_range);
  tcase_add_test(tests, steps_follow_max_steps_then_epochs);
  tcase_add_test(tests, steps_of_a_run_that_goes_on_count_what_it_has_seen);
  tcase_add_test(tests, warmup_steps_win_over_the_ratio);
  tcase_add_test(tests, clip_scales_only_what_is_too_long);
  tcase_add_test(tests, adamw_scalars_are_rounded_once);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
