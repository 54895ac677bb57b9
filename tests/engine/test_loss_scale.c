/* fp16 in the executor: a step that overflows changes nothing but the loss scale, later steps are those of a run in
 * which it never was, and where a smaller scale does not help the run ends with a name. */
#include "tests/engine/engine_rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the rule alone -------------------------------------------------------------------------------------- */

START_TEST(scale_follows_the_rule_of_gradscaler) {
  flap_run_config config;
  flap_loss_scale scale;
  flap_run_config_defaults(&config);
  flap_loss_scale_begin(FLAP_BF16, &config, &scale);
  ck_assert(scale.scale == 0);
  flap_loss_scale_begin(FLAP_F16, &config, &scale);
  ck_assert(scale.scale == 65536 && scale.good_steps == 0 && scale.skipped == 0);
  for (int i = 0; i < 1999; i++)
    flap_loss_scale_good(&config, &scale);
  ck_assert(scale.scale == 65536 && scale.good_steps == 1999);
  flap_loss_scale_good(&config, &scale);
  ck_assert(scale.scale == 131072 && scale.good_steps == 0);
  flap_loss_scale_good(&config, &scale);
  ck_assert(flap_loss_scale_back_off(&config, &scale));
  ck_assert(scale.scale == 65536 && scale.good_steps == 0 && scale.skipped == 1);
}
END_TEST

START_TEST(scale_stays_between_its_ends) {
  flap_run_config config;
  flap_loss_scale scale;
  flap_run_config_defaults(&config);
  config.fp16_init_scale = 0x1p59;
  config.fp16_min_scale = 0x1p58;
  config.fp16_growth_interval = 1;
  flap_loss_scale_begin(FLAP_F16, &config, &scale);
  flap_loss_scale_good(&config, &scale);
  flap_loss_scale_good(&config, &scale);
  ck_assert(scale.scale == 0x1p60);
  ck_assert(flap_loss_scale_back_off(&config, &scale) && flap_loss_scale_back_off(&config, &scale));
  const flap_loss_scale last = scale;
  ck_assert(!flap_loss_scale_back_off(&config, &scale));
  ck_assert(scale.scale == 0x1p58 && scale.skipped == 2 && memcmp(&last, &scale, sizeof scale) == 0);
  static const double bad[] = {0, -1, 3, 0x1p-25, 0x1p61, (double)INFINITY, (double)NAN};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    ck_assert(!flap_loss_scale_valid(bad[i]));
  ck_assert(flap_loss_scale_valid(0x1p-24) && flap_loss_scale_valid(1));
}
END_TEST

/* ---- in a run -------------------------------------------------------------------------------------------- */

/* The same tokens in every step, so that a run with skipped steps can be held against one without. */
static void make_model(rig_model *model, double init_scale, uint64_t growth_interval) {
  rig_model_small(model);
  model->shape.dtype = FLAP_F16;
  model->options.max_steps = 8;
  model->options.warmup_steps = 0;
  model->options.fp16_init_scale = init_scale;
  model->options.fp16_growth_interval = growth_interval;
  rig_model_random_data(model);
  const uint64_t tokens = (uint64_t)model->shape.batch * model->shape.sequence * model->micro_batches;
  for (uint64_t step = 1; step <= model->options.max_steps; step++) {
    memcpy(model->tokens + step * tokens, model->tokens, tokens * sizeof *model->tokens);
    memcpy(model->targets + step * tokens, model->targets, tokens * sizeof *model->targets);
  }
}

static void open_rig(engine_rig *rig, const rig_model *model, bool sweep) {
  flap_choice choice = rig_choice_streaming(model, false);
  choice.segment_layers = 1;
  choice.sweep = sweep;
  rig_begin(rig, model, &(rig_place){.threads = 2});
  rig_open_choice(rig, &choice);
}

/* Folded and swept, in one row and with the update made up for at every step. */
START_TEST(skipped_step_leaves_every_bit) {
  rig_model model;
  engine_rig rig;
  rig_result result = {0};
  rig_state before, after;
  make_model(&model, 0x1p40, 2000);
  open_rig(&rig, &model, _i == 0);
  rig_read_state(&rig, &before);
  rig_train(&rig, 0, 3, _i == 2 ? RIG_SWEPT : RIG_UPDATED, &result);
  rig_read_state(&rig, &after);
  ck_assert_uint_eq(before.bytes, after.bytes);
  ck_assert_int_eq(memcmp(before.data, after.data, before.bytes), 0);
  for (uint32_t i = 0; i < 3; i++) {
    ck_assert(result.skipped[i] != 0 && !isfinite(result.grad_norms[i]));
    ck_assert_double_eq(result.loss_scales[i], ldexp(1, 40 - (int)i));
    ck_assert_double_eq(result.losses[i], result.losses[0]); /* losses are not scaled, and nothing was learnt */
    ck_assert_double_eq(result.learning_rates[i], result.learning_rates[0]);
  }
  ck_assert_uint_eq(rig.runtime.executor.loss_scale.skipped, 3);
  free(before.data), free(after.data);
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

/* `first` steps that are skipped, then `count` good ones: losses, norms, rates and every bit are those of a run that
 * began with a scale that fits, because scales are powers of two and t and the schedule count updates. */
START_TEST(skipped_steps_count_for_nothing) {
  rig_model low, high;
  engine_rig rig;
  rig_result clean = {0}, late = {0};
  make_model(&low, 0x1p10, 2000);
  make_model(&high, 0x1p10, 2000);
  open_rig(&rig, &low, _i == 0);
  rig_train(&rig, 0, 4, RIG_UPDATED, &clean);
  rig_read_state(&rig, &clean.state);
  rig_close(&rig);
  ck_assert(clean.skipped[0] == 0 && clean.skipped[3] == 0);
  open_rig(&rig, &high, _i == 0);
  rig.runtime.executor.loss_scale.scale = 0x1p40; /* where it overflows for sure; */
  rig_train(&rig, 0, 3, RIG_PENDING, &late);
  rig.runtime.executor.loss_scale.scale = 0x1p10; /* and where it does not */
  rig_train(&rig, 3, 7, RIG_UPDATED, &late);
  rig_read_state(&rig, &late.state);
  rig_close(&rig);
  for (uint32_t i = 0; i < 4; i++) {
    ck_assert(late.skipped[i + 3] == 0);
    ck_assert_double_eq(late.losses[i + 3], clean.losses[i]);
    ck_assert_double_eq(late.grad_norms[i + 3], clean.grad_norms[i]);
    ck_assert_double_eq(late.learning_rates[i + 3], clean.learning_rates[i]);
  }
  ck_assert_double_ne(clean.losses[0], clean.losses[3]);
  ck_assert_uint_eq(clean.state.bytes, late.state.bytes);
  ck_assert_int_eq(memcmp(clean.state.data, late.state.data, clean.state.bytes), 0);
  rig_result_close(&clean);
  rig_result_close(&late);
  rig_model_close(&low);
  rig_model_close(&high);
}
END_TEST

START_TEST(scale_grows_after_good_steps) {
  rig_model model;
  engine_rig rig;
  rig_result result = {0};
  make_model(&model, 0x1p8, 3);
  open_rig(&rig, &model, false);
  rig_train(&rig, 0, 7, RIG_UPDATED, &result);
  for (uint32_t i = 0; i < 7; i++) {
    ck_assert(result.skipped[i] == 0);
    ck_assert_double_eq(result.loss_scales[i], ldexp(1, 8 + (int)i / 3));
  }
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

/* Of the first moments of layer 0, after two steps at a scale. Its section follows weights (2 bytes) and masters (4).
 */
static double moments_norm(double init_scale) {
  rig_model model;
  engine_rig rig;
  rig_result result = {0};
  make_model(&model, init_scale, 2000);
  open_rig(&rig, &model, true);
  rig_train(&rig, 0, 2, RIG_UPDATED, &result);
  rig_read_state(&rig, &result.state);
  const uint64_t elements = flap_model_part_elements(&model.config, FLAP_PART_LAYER);
  const float *moments =
      (const float *)(const void *)(rig_state_weights(&model, &result.state, 1) + elements * (2 + 4));
  double squares = 0;
  for (uint64_t i = 0; i < elements; i++)
    squares += (double)moments[i] * (double)moments[i];
  ck_assert(result.skipped[0] == 0 && result.skipped[1] == 0);
  rig_result_close(&result);
  rig_close(&rig);
  rig_model_close(&model);
  return sqrt(squares);
}

/* AdamW hardly sees how large gradients are, as long as they all grow alike: only its moments tell. */
START_TEST(moments_do_not_carry_the_scale) {
  const double small = moments_norm(0x1p9), large = moments_norm(0x1p14);
  ck_assert_double_gt(small, 1e-6);
  ck_assert_double_eq_tol(large / small, 1, 1e-2);
}
END_TEST

static void must_end(engine_rig *rig, uint32_t step, const char *const parts[], size_t count) {
  const rig_model *model = rig->model;
  const uint64_t tokens = (uint64_t)model->shape.batch * model->shape.sequence * model->micro_batches;
  const flap_executor_input input = {.tokens = model->tokens + step * tokens,
                                     .targets = model->targets + step * tokens,
                                     .counted = tokens,
                                     .step = step,
                                     .learning_rate = 1e-3};
  flap_executor_result got;
  MUST(flap_executor_begin(&rig->runtime.executor, FLAP_SETUP_SINGLE));
  ck_assert_int_eq(flap_executor_run(&rig->runtime.executor, &input, &got), FLAP_NUMERIC);
  for (size_t i = 0; i < count; i++)
    ck_assert_msg(strstr(flap_error_message(), parts[i]) != NULL, "no %s in: %s", parts[i], flap_error_message());
}

START_TEST(least_scale_that_overflows_ends_the_run) {
  rig_model model;
  engine_rig rig;
  rig_result result = {0};
  make_model(&model, 0x1p40, 2000);
  model.options.fp16_min_scale = 0x1p39;
  open_rig(&rig, &model, true);
  rig_train(&rig, 0, 1, RIG_UPDATED, &result);
  ck_assert(result.skipped[0] != 0);
  must_end(&rig, 1,
           (const char *const[]){"step 2: gradients are not finite", "the loss scale of 5.49756e+11", "fp16_min_scale",
                                 "bf16"},
           4);
  rig_shut(&rig);
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

/* Activations beyond fp16: no scale of the loss helps, and in the end the layer is named. */
START_TEST(activations_that_overflow_end_at_the_layer) {
  rig_model model;
  engine_rig rig;
  rig_result result = {0};
  make_model(&model, 2, 2000);
  model.config.initializer_range = 90; /* products of a layer pass 65504 */
  open_rig(&rig, &model, true);
  rig_train(&rig, 0, 1, RIG_UPDATED, &result);
  ck_assert(result.skipped[0] != 0 && !isfinite(result.losses[0]));
  must_end(&rig, 1,
           (const char *const[]){"step 2: the loss is not finite", "first in layer 0",
                                 "the loss scale of 1 (fp16_min_scale)"},
           3);
  rig_shut(&rig);
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("loss_scale");
  TCase *tests = tcase_create("fp16");
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, scale_follows_the_rule_of_gradscaler);
  tcase_add_test(tests, scale_stays_between_its_ends);
  tcase_add_loop_test(tests, skipped_step_leaves_every_bit, 0, 3);
  tcase_add_loop_test(tests, skipped_steps_count_for_nothing, 0, 2);
  tcase_add_test(tests, scale_grows_after_good_steps);
  tcase_add_test(tests, moments_do_not_carry_the_scale);
  tcase_add_test(tests, least_scale_that_overflows_ends_the_run);
  tcase_add_test(tests, activations_that_overflow_end_at_the_layer);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
