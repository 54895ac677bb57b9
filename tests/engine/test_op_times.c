/* What operations take: by hand from rates, and that a simulated step is charged with exactly them. */
#include "engine/machine/op_times.h"
#include "engine/planner/planner.h"

#include "base/units.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Memory and launches cost nothing, so only arithmetic counts: 1e9 operations a second. */
static const flap_machine arithmetic = {.name = "arithmetic",
                                        .flops_bf16 = 1e9,
                                        .flops_f32 = 1e9,
                                        .device_bytes = 1e18,
                                        .h2d_bytes = 1e12,
                                        .d2h_bytes = 1e12,
                                        .disk_read_bytes = 1e12,
                                        .disk_write_bytes = 1e12,
                                        .host_bytes = 1e12};

#define ATTENTION 0x06 /* of Llama's saved tensors */

static flap_model_config model(bool tied) {
  flap_model_config config = {.family = flap_model_find_family("llama"),
                              .vocab_size = 256,
                              .hidden_size = 64,
                              .intermediate_size = 128,
                              .num_hidden_layers = 3,
                              .num_attention_heads = 4,
                              .num_key_value_heads = 2,
                              .head_dim = 16,
                              .max_position_embeddings = 64,
                              .rms_norm_eps = 1e-5,
                              .initializer_range = 0.02,
                              .tie_word_embeddings = tied,
                              .rope = {.theta = 10000}};
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  return config;
}

static flap_op_times_spec spec_of(const flap_model_config *config) {
  return (flap_op_times_spec){.model = config,
                              .shape = {.dtype = FLAP_BF16, .batch = 2, .sequence = 32},
                              .gradient_dtype = FLAP_BF16,
                              .training = true,
                              .threads = 1};
}

static void near(const char *what, uint64_t ns, double flops, double share) {
  const double wanted = flops; /* 1e9 a second: one a nanosecond */
  ck_assert_msg((double)ns > wanted * (1 - share) && (double)ns < wanted * (1 + share),
                "%s takes %llu ns, not about %.0f", what, (unsigned long long)ns, wanted);
}

START_TEST(from_rates_arithmetic_decides) {
  const flap_model_config config = model(_i == 1);
  const flap_op_times_spec spec = spec_of(&config);
  flap_op_times times;
  ck_assert_msg(flap_op_times_from_rates(&spec, &arithmetic, &times) == FLAP_OK, "%s", flap_error_message());
  const double layer = flap_model_forward_flops(&config, &spec.shape, FLAP_PART_LAYER);
  const double head = flap_model_forward_flops(&config, &spec.shape, FLAP_PART_HEAD);
  const double down = 2. * 64 * 64 * 128; /* what a recomputation leaves out */
  ck_assert(!times.measured);
  near("forward", times.forward_ns, layer, 0.05);
  near("recompute", times.recompute_ns, layer - down, 0.05);
  near("backward", times.backward_ns[FLAP_SUMS_ADDED_TO], 2 * layer, 0.1);
  near("loss", times.loss_ns, head, 0.1);
  near("head", times.head_ns, 3 * head, 0.1);
  ck_assert_uint_lt(times.recompute_ns, times.forward_ns);
  uint32_t set_count;
  const flap_saved_set *sets = flap_model_saved_sets(&config, &set_count);
  ck_assert_uint_eq(times.set_count, set_count);
  for (uint32_t i = 0; i < set_count; i++)
    ck_assert_uint_eq(times.set_mask[i], sets[i].mask);
  for (uint32_t i = 0; i + 2 < set_count; i++)
    near(sets[i].name, times.set_recompute_ns[i], flap_model_recompute_flops(&config, &spec.shape, sets[i].mask), 0.05);
  ck_assert_uint_eq(flap_op_times_recompute(&times, sets[set_count - 2].mask), 0); /* all */
  ck_assert_uint_eq(flap_op_times_recompute(&times, FLAP_MODEL_SAVED_ALL), 0);
}
END_TEST

/* Sums that are written need not be read: where memory decides, the first micro-batch is cheaper. */
START_TEST(from_rates_first_sums_cost_less) {
  const flap_model_config config = model(false);
  const flap_op_times_spec spec = spec_of(&config);
  flap_machine memory = arithmetic;
  flap_op_times times;
  memory.flops_bf16 = memory.flops_f32 = 1e18;
  memory.device_bytes = 1e9;
  ck_assert_int_eq(flap_op_times_from_rates(&spec, &memory, &times), FLAP_OK);
  ck_assert_uint_lt(times.backward_ns[FLAP_SUMS_FRESH], times.backward_ns[FLAP_SUMS_ADDED_TO]);
  ck_assert_uint_lt(times.head_fresh_ns, times.head_ns);
  /* Nor are spare tensors that are kept: a normalised input of either norm, and silu(gate)·up, of 64 tokens. */
  const uint64_t gain =
      times.backward_ns[FLAP_SUMS_ADDED_TO] - flap_op_times_backward(&times, FLAP_MODEL_SAVED_ALL, FLAP_SUMS_ADDED_TO);
  ck_assert_uint_eq(gain, 64 * 2 * (2 * 64 + 128));
  ck_assert_uint_eq(
      times.backward_ns[FLAP_SUMS_FRESH] - flap_op_times_backward(&times, FLAP_MODEL_SAVED_ALL, FLAP_SUMS_FRESH), gain);
  ck_assert_uint_eq(flap_op_times_backward(&times, ATTENTION, FLAP_SUMS_ADDED_TO),
                    times.backward_ns[FLAP_SUMS_ADDED_TO]);
  ck_assert_double_eq_tol(times.zero_ns, 4, 0.01);  /* bytes an element, at one a nanosecond */
  ck_assert_double_eq_tol(times.store_ns, 6, 0.01); /* fp32 read, bf16 written */
  ck_assert_double_eq_tol(times.measure_ns, 4, 0.01);
  ck_assert_double_eq_tol(times.store_final_ns, 4, 0.01); /* bf16 read and written */
  ck_assert_double_eq_tol(times.measure_final_ns, 2, 0.01);
  /* And a step of one micro-batch writes bf16 gradients in place of the matrices' fp32 sums. */
  const uint64_t matrices = 2 * 64 * 64 + 2 * FLAP_OPS_BLOCK + 3 * 64 * 128; /* k and v have gaps behind them */
  const uint64_t less = times.backward_ns[FLAP_SUMS_FRESH] - flap_op_times_backward(&times, ATTENTION, FLAP_SUMS_FINAL);
  /* But vectors, of a block each, are summed as ever and rounded then, and what rounds them reads 4 and writes 2. */
  ck_assert_uint_eq(less, 2 * matrices - 6 * 2 * FLAP_OPS_BLOCK);
  ck_assert_uint_eq(
      times.backward_ns[FLAP_SUMS_FINAL] - flap_op_times_backward(&times, FLAP_MODEL_SAVED_ALL, FLAP_SUMS_FINAL), gain);
  flap_op_times_spec whole = spec;
  whole.gradient_dtype = FLAP_F32;
  flap_op_times of_whole;
  ck_assert_int_eq(flap_op_times_from_rates(&whole, &memory, &of_whole), FLAP_OK);
  ck_assert_uint_eq(of_whole.backward_ns[FLAP_SUMS_FINAL], of_whole.backward_ns[FLAP_SUMS_FRESH]);
  ck_assert_double_eq_tol(times.adamw_ns, 26, 0.01);
  ck_assert_double_eq(times.adamw_embedding_ns, times.adamw_ns);
  /* Codes are a byte, and what they are relative to is 4 for 256 of them; the embedding's moments stay fp32. */
  flap_op_times_spec eight = spec;
  eight.optim = FLAP_OPTIM_ADAMW_8BIT;
  ck_assert_int_eq(flap_op_times_from_rates(&eight, &memory, &times), FLAP_OK);
  ck_assert_double_eq_tol(times.adamw_ns, 14 + 16. / 256, 0.01);
  ck_assert_double_eq_tol(times.adamw_embedding_ns, 26, 0.01);
}
END_TEST

#define MEMORY ((uint64_t)1 << 30)

/* Of machines that are a thousand times slower and faster than any: what was measured counts. */
START_TEST(measured_on_the_cpu_is_what_operations_take) {
  const flap_model_config config = model(_i == 1);
  const flap_op_times_spec spec = spec_of(&config);
  flap_machine fast = arithmetic;
  flap_op_times here, by_rates;
  fast.flops_bf16 = fast.flops_f32 = 1e15;
  ck_assert_int_eq(flap_op_times_from_rates(&spec, &fast, &by_rates), FLAP_OK);
  ck_assert_msg(flap_op_times_measure_cpu(&spec, &fast, MEMORY, &here) == FLAP_OK, "%s", flap_error_message());
  ck_assert(here.measured);
  const uint64_t measured[] = {here.forward_ns, here.recompute_ns, here.backward_ns[FLAP_SUMS_ADDED_TO], here.loss_ns,
                               here.head_ns};
  const uint64_t estimated[] = {by_rates.forward_ns, by_rates.recompute_ns, by_rates.backward_ns[FLAP_SUMS_ADDED_TO],
                                by_rates.loss_ns, by_rates.head_ns};
  for (int i = 0; i < 5; i++)
    ck_assert_msg(measured[i] > 10 * estimated[i] && measured[i] < 1000000000, "%d: %llu ns, by rates %llu", i,
                  (unsigned long long)measured[i], (unsigned long long)estimated[i]);
  ck_assert_double_eq(here.adamw_ns, by_rates.adamw_ns); /* these are left to rates */
  ck_assert_double_eq(here.store_ns, by_rates.store_ns);
  ck_assert_double_eq(here.host.alone, by_rates.host.alone);
}
END_TEST

/* What would take minutes is measured with fewer tokens: by rates a round of these takes minutes. */
START_TEST(measured_on_the_cpu_with_fewer_tokens_counts_for_all) {
  flap_model_config config = model(false);
  config.max_position_embeddings = 4096;
  flap_op_times_spec spec = spec_of(&config);
  flap_machine slow = arithmetic;
  flap_op_times few, many, few_by_rates, many_by_rates;
  slow.flops_bf16 = slow.flops_f32 = 1e9;
  spec.shape = (flap_model_shape){.dtype = FLAP_BF16, .batch = 1, .sequence = 64};
  ck_assert_int_eq(flap_op_times_from_rates(&spec, &slow, &few_by_rates), FLAP_OK);
  ck_assert_msg(flap_op_times_measure_cpu(&spec, &slow, MEMORY, &few) == FLAP_OK, "%s", flap_error_message());
  spec.shape.batch = 64;
  spec.shape.sequence = 2048;
  ck_assert_int_eq(flap_op_times_from_rates(&spec, &slow, &many_by_rates), FLAP_OK);
  ck_assert_uint_gt(many_by_rates.forward_ns, (uint64_t)10000000000);
  ck_assert_int_eq(flap_op_times_measure_cpu(&spec, &slow, MEMORY, &many), FLAP_OK);
  const double more = (double)many_by_rates.forward_ns / (double)few_by_rates.forward_ns;
  ck_assert_double_gt((double)many.forward_ns, (double)few.forward_ns * more / 10);
  ck_assert_double_lt((double)many.forward_ns, (double)few.forward_ns * more * 10);
  ck_assert_uint_lt(many.forward_ns, many_by_rates.forward_ns); /* no processor is as slow */
}
END_TEST

static uint64_t forward_ns; /* that a forward takes longer than it does */
static uint32_t forwards;
void __real_flap_model_layer_forward(const flap_model_run *run, const void *weights, const void *x_in,
                                     const flap_model_saved *saved, void *x_out);
void __wrap_flap_model_layer_forward(const flap_model_run *run, const void *weights, const void *x_in,
                                     const flap_model_saved *saved, void *x_out);
void __wrap_flap_model_layer_forward(const flap_model_run *run, const void *weights, const void *x_in,
                                     const flap_model_saved *saved, void *x_out) {
  const struct timespec pause = {.tv_nsec = (long)forward_ns};
  forwards++;
  if (forward_ns > 0)
    (void)nanosleep(&pause, NULL);
  __real_flap_model_layer_forward(run, weights, x_in, saved, x_out);
}

/* By rates there is time for seven rounds; by the clock for one. */
START_TEST(measured_on_the_cpu_in_fewer_rounds_where_rates_are_wrong) {
  const flap_model_config config = model(false);
  const flap_op_times_spec spec = spec_of(&config);
  flap_machine fast = arithmetic;
  flap_op_times times;
  fast.flops_bf16 = fast.flops_f32 = 1e15;
  forward_ns = 150000000;
  forwards = 0;
  ck_assert_int_eq(flap_op_times_measure_cpu(&spec, &fast, MEMORY, &times), FLAP_OK);
  ck_assert(times.measured);
  ck_assert_uint_ge(times.forward_ns, 140000000);
  ck_assert_uint_lt(forwards, 40); /* of 80 or so; each operation was timed */
  ck_assert_uint_gt(times.head_ns, 0);
  forward_ns = 0;
}
END_TEST

START_TEST(not_measured_on_the_cpu_without_time_or_memory) {
  const flap_model_config config = model(false);
  const flap_op_times_spec spec = spec_of(&config);
  flap_machine never = arithmetic;
  flap_op_times times;
  ck_assert_int_eq(flap_op_times_measure_cpu(&spec, &arithmetic, 1 << 16, &times), FLAP_BUDGET);
  never.flops_bf16 = never.flops_f32 = 1e5;
  ck_assert_int_eq(flap_op_times_measure_cpu(&spec, &never, MEMORY, &times), FLAP_BUDGET);
  flap_error_clear();
}
END_TEST

START_TEST(of_an_operation_follows_its_kind_and_size) {
  const flap_op_times times = {.embed_ns = 1,
                               .forward_ns = 2,
                               .recompute_ns = 3,
                               .loss_ns = 4,
                               .head_ns = 5,
                               .head_fresh_ns = 6,
                               .backward_ns = {7, 8, 10},
                               .embed_backward_ns = 9,
                               .launch_ns = 100,
                               .store_ns = 0.5,
                               .measure_ns = 0.45,
                               .store_final_ns = 0.4,
                               .measure_final_ns = 0.35,
                               .zero_ns = 0.25,
                               .adamw_ns = 0.75,
                               .adamw_embedding_ns = 1.25,
                               .set_count = 2,
                               .set_mask = {ATTENTION, FLAP_MODEL_SAVED_ALL},
                               .set_recompute_ns = {11, 0},
                               .backward_spare_ns = {5, 6, 8}};
  flap_layout_part part = {.kind = FLAP_PART_LAYER, .elements = 1000};
  flap_layout_slice slice = {.elements = 1000};
  flap_layout layout = {
      .parts = &part, .slices = &slice, .spec = {.saved_mask = ATTENTION, .gradient_dtype = FLAP_BF16}};
#define OF(...) flap_op_times_of(&times, &layout, &(flap_op){__VA_ARGS__})
  ck_assert_uint_eq(OF(.kind = FLAP_OP_EMBED), 1);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_FORWARD, .operand = {0, 1, 2, 3}), 2);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_RECOMPUTE, .operand = {0, 1, FLAP_OPERAND_NONE}), 3);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_RECOMPUTE, .operand = {0, 1, 2}), 11);
  layout.spec.saved_mask = 1; /* no set of which a time is known */
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_RECOMPUTE, .operand = {0, 1, 2}), 3);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_HEAD, .operand = {0, 1, 2, FLAP_OPERAND_NONE}), 4);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_HEAD, .operand = {0, 1, 2, 3}), 5);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_HEAD, .fresh = true, .operand = {0, 1, 2, 3}), 6);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD), 7);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD, .fresh = true), 8);
  layout.spec.saved_mask = FLAP_MODEL_SAVED_ALL;
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD, .operand = {0, 1, 2}), 5);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD, .fresh = true, .operand = {0, 1, 2}), 6);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD, .operand = {0, 1, FLAP_OPERAND_NONE}), 7);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_EMBED_BACKWARD), 9);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_STORE_GRADIENT), 600);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_ZERO), 350);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_NORM), 0);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_ADAMW), 850);
  part.kind = FLAP_PART_HEAD;
  ck_assert_uint_eq(OF(.kind = FLAP_OP_ADAMW), 850);
  part.kind = FLAP_PART_EMBEDDING;
  ck_assert_uint_eq(OF(.kind = FLAP_OP_ADAMW), 1350);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_STORE_GRADIENT), 600);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_STORE_GRADIENT, .operand = {0, FLAP_OPERAND_NONE}), 550);
  layout.spec.micro_batches = 1; /* layers' gradients are final; the embedding's are not */
  layout.spec.shape.dtype = FLAP_BF16;
  ck_assert_uint_eq(OF(.kind = FLAP_OP_STORE_GRADIENT), 600);
  part.kind = FLAP_PART_LAYER;
  ck_assert_uint_eq(OF(.kind = FLAP_OP_STORE_GRADIENT), 500);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_STORE_GRADIENT, .operand = {0, FLAP_OPERAND_NONE}), 450);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD, .fresh = true, .operand = {0, 1, FLAP_OPERAND_NONE}), 10);
  ck_assert_uint_eq(OF(.kind = FLAP_OP_LAYER_BACKWARD, .fresh = true, .operand = {0, 1, 2}), 8);
#undef OF
}
END_TEST

/* Everything resident, and times that no rate would give: a step's computing is their sum, with what is computed again
 * where attention alone is kept. */
START_TEST(simulated_step_is_charged_with_given_times) {
  const flap_model_config config = model(false);
  const flap_op_times times = {.embed_ns = 1000,
                               .forward_ns = 20000,
                               .recompute_ns = 17000,
                               .loss_ns = 1,
                               .head_ns = 50000,
                               .head_fresh_ns = 40000,
                               .backward_ns = {70000, 60000, 60000},
                               .backward_spare_ns = {70000, 60000, 60000},
                               .embed_backward_ns = 9000,
                               .launch_ns = 1,
                               .adamw_ns = 1,
                               .adamw_embedding_ns = 5,
                               .set_count = 2,
                               .set_mask = {ATTENTION, FLAP_MODEL_SAVED_ALL},
                               .set_recompute_ns = {11000, 0}};
  flap_planner planner = {.spec = {.model = &config,
                                   .shape = {.dtype = FLAP_BF16, .batch = 2, .sequence = 32},
                                   .mode = FLAP_MODE_TRAIN,
                                   .gradient_dtype = FLAP_BF16,
                                   .optim = FLAP_OPTIM_ADAMW_8BIT,
                                   .micro_batches = 2,
                                   .threads = 1,
                                   .device = FLAP_DEVICE_CPU},
                          .activations = FLAP_ACTIVATIONS_KEEP,
                          .expert = {.saved = _i == 1 ? FLAP_RUN_SAVED_ATTENTION : FLAP_RUN_SAVED_AUTO},
                          .machine = &arithmetic,
                          .times = &times};
  const flap_budgets budgets = {.vram_bytes = FLAP_GIB, .ram_bytes = FLAP_GIB};
  flap_setup setup;
  flap_plan_costs costs;
  ck_assert_msg(flap_planner_choose(&planner, &budgets, &setup, &costs) == FLAP_OK, "%s", flap_error_message());
  const double layers = 3, updates = 5. * (double)flap_model_part_elements(&config, FLAP_PART_EMBEDDING) +
                                     layers * (double)flap_model_part_elements(&config, FLAP_PART_LAYER) +
                                     (double)flap_model_part_elements(&config, FLAP_PART_HEAD);
  const double wanted =
      1e-9 * (2 * 1000. + layers * (2 * 20000. + 60000 + 70000) + 40000 + 50000 + 2 * 9000. + updates);
  /* What the last layer does not keep is still there when its backward comes. */
  const double again = _i == 1 ? 1e-9 * (layers - 1) * 2 * 11000 : 0;
  ck_assert_double_ge(costs.compute_seconds, wanted + again);
  ck_assert_double_le(costs.compute_seconds,
                      (wanted + again) * 1.02); /* slices' launches, and the downloads of the norm */
  flap_setup_close(&setup);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("op_times");
  TCase *tests = tcase_create("op_times");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, from_rates_arithmetic_decides, 0, 2);
  tcase_add_test(tests, from_rates_first_sums_cost_less);
  tcase_add_loop_test(tests, measured_on_the_cpu_is_what_operations_take, 0, 2);
  tcase_add_test(tests, measured_on_the_cpu_with_fewer_tokens_counts_for_all);
  tcase_add_test(tests, not_measured_on_the_cpu_without_time_or_memory);
  tcase_add_test(tests, measured_on_the_cpu_in_fewer_rounds_where_rates_are_wrong);
  tcase_add_test(tests, of_an_operation_follows_its_kind_and_size);
  tcase_add_loop_test(tests, simulated_step_is_charged_with_given_times, 0, 2);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
