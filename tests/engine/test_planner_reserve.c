/* Plans whose lanes may be slower than they were measured, beside what a search finds that knows no other rates. */
#include "base/units.h"
#include "engine/planner/planner_internal.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KINDS 1 /* each plan takes seconds */
#else
#define KINDS 2
#endif

typedef struct trial {
  flap_model_config model;
  flap_machine machine;
  flap_op_times times;
  flap_planner planner;
  flap_budgets budgets;
} trial;

/* Small steps of eight wide layers on a large card, whose bus and host are busy for about as long as it computes. */
static void open_trial(trial *t, int kind) {
  memset(t, 0, sizeof *t);
  t->model = (flap_model_config){.family = flap_model_find_family("llama"),
                                 .vocab_size = 32000,
                                 .hidden_size = 4096,
                                 .intermediate_size = 14336,
                                 .num_hidden_layers = 8,
                                 .num_attention_heads = 32,
                                 .num_key_value_heads = 8,
                                 .max_position_embeddings = 2048,
                                 .rms_norm_eps = 1e-5,
                                 .initializer_range = 0.1,
                                 .rope = {.theta = 10000}};
  MUST(flap_model_finish_config(&t->model));
  flap_device_default_machine(FLAP_DEVICE_CUDA, &t->machine);
  t->machine.flops_bf16 = t->machine.flops_f32 = 640e12;
  t->machine.device_bytes = 2.8e12;
  const double slower = kind == 0 ? 0.5 : 0.8;
  t->machine.h2d_bytes = slower * 53e9;
  t->machine.d2h_bytes = slower * 54e9;
  t->machine.h2d_both_bytes = slower * 44e9;
  t->machine.d2h_both_bytes = slower * 51e9;
  t->machine.host_bytes = slower * 114e9;
  t->planner = (flap_planner){.spec = {.model = &t->model,
                                       .shape = {.dtype = FLAP_BF16, .batch = 4, .sequence = 2048},
                                       .mode = FLAP_MODE_TRAIN,
                                       .gradient_dtype = FLAP_BF16,
                                       .optim = FLAP_OPTIM_ADAMW,
                                       .micro_batches = 2,
                                       .needs_no_norm = true,
                                       .threads = 2,
                                       .device = FLAP_DEVICE_CUDA,
                                       .io = FLAP_BLOCK_SIM},
                              .machine = &t->machine};
  t->budgets = (flap_budgets){.vram_bytes = (uint64_t)8 * FLAP_GIB, .ram_bytes = (uint64_t)40 * FLAP_GIB};
  MUST(planner_times(&t->planner, &t->times));
  t->planner.times = &t->times;
}

/* With the rates as they are, and with slower ones. */
enum { RATES = 3 };
static void simulate(const trial *t, flap_setup *setup, double seconds_out[RATES]) {
  for (int i = 0; i < RATES; i++) {
    flap_machine machine;
    flap_op_times times;
    flap_planner planner = t->planner;
    flap_plan_costs costs;
    planner_hold_back(&t->machine, &t->times, 1 - PLANNER_RESERVE * i / (RATES - 1), &machine, &times);
    planner.machine = &machine;
    planner.times = &times;
    MUST(planner_simulate(&planner, &t->budgets, setup, &costs));
    seconds_out[i] = costs.step_seconds;
  }
}

/* Of the search that knows no other rates. */
static void search_once(const trial *t, double seconds_out[RATES]) {
  planner_candidates lists[PLANNER_LISTS_MAX];
  planner_found found;
  planner_reach reach = PLANNER_NO_VRAM;
  flap_setup setup;
  flap_planner planner = t->planner;
  planner.memory = calloc(1, sizeof *planner.memory);
  ck_assert_ptr_nonnull(planner.memory);
  const uint32_t count = planner_list(&planner, lists);
  MUST(planner_search(&planner, lists, count, &t->budgets, 0, &found, &reach));
  ck_assert_ptr_nonnull(found.list);
  MUST(planner_settle(&planner, found.list, found.contender.s, &t->budgets, found.contender.depth, &setup, &reach));
  simulate(t, &setup, seconds_out);
  ck_assert_double_eq(found.costs.step_seconds, seconds_out[0]);
  flap_setup_close(&setup);
  free(planner.memory);
}

START_TEST(plans_bear_slower_lanes) {
  double ratio = 0;
  for (int kind = 0; kind < KINDS; kind++) {
    trial t;
    flap_setup setup;
    flap_plan_costs costs;
    double ours[RATES], once[RATES];
    open_trial(&t, kind);
    MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &costs));
    simulate(&t, &setup, ours);
    flap_setup_close(&setup);
    ck_assert_double_eq(costs.step_seconds, ours[0]); /* what is told is of the rates as they are */
    search_once(&t, once);
    printf("%d: %.4f s, with slower lanes %.4f and %.4f s; without a reserve %.4f, %.4f and %.4f s\n", kind, ours[0],
           ours[1], ours[2], once[0], once[1], once[2]);
    const double of_once = (ours[0] + ours[1] + ours[2]) / (once[0] + once[1] + once[2]);
    ck_assert_double_le(of_once, 1);
    ratio += of_once;
  }
  ck_assert_double_lt(ratio / KINDS, 0.995);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("planner reserve");
  tcase_set_timeout(tcase, 0);
  tcase_add_test(tcase, plans_bear_slower_lanes);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
