/* Plans whose lanes may be slower than they were measured, beside what a search finds that knows no other rates. */
#include "base/units.h"
#include "tests/engine/planner_trials.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KINDS 1        /* each plan takes seconds */
#define COMPARES false /* the other searches lead through the code of the first */
#else
#define KINDS 3
#define COMPARES true
#endif

/* Small steps of eight wide layers on a large card, whose bus and host are busy for about as long as it computes; with
 * the last kind for far less. */
static void open_trial(planner_trial *t, int kind) {
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
  const double slower = kind == 0 ? 0.5 : kind == 1 ? 0.8 : 8;
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

/* With the rates as they are, and on average over those that the planner looks at. */
typedef struct outcome {
  double as_measured, average;
} outcome;

static outcome simulate(const planner_trial *t, flap_setup *setup) {
  static const double shares[] = {1 + PLANNER_RESERVE / 2, 1, 1 - PLANNER_RESERVE / 2, 1 - PLANNER_RESERVE};
  enum { SHARES = sizeof shares / sizeof shares[0] };
  outcome o = {0};
  for (int i = 0; i < SHARES; i++) {
    flap_machine machine;
    flap_op_times times;
    flap_planner planner = t->planner;
    flap_plan_costs costs;
    planner_slow_lanes(&t->machine, &t->times, shares[i], &machine, &times);
    planner.machine = &machine;
    planner.times = &times;
    MUST(planner_simulate(&planner, &t->budgets, setup, 0, &costs));
    o.as_measured = i == 1 ? costs.step_seconds : o.as_measured;
    o.average += costs.step_seconds / SHARES;
  }
  return o;
}

/* Of the search that knows no other rates. */
static outcome search_once(const planner_trial *t) {
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
  const outcome o = simulate(t, &setup);
  ck_assert_double_eq(found.costs.step_seconds, o.as_measured);
  flap_setup_close(&setup);
  free(planner.memory);
  return o;
}

/* What a plan comes to, and what the same setup does on a card that computes layer behind layer for longer. */
static void plan_sustained(int kind, double sustained, flap_plan_costs *usual_out, flap_plan_costs *longer_out) {
  planner_trial t;
  flap_setup setup;
  open_trial(&t, kind);
  t.planner.quick = true;
  t.times.sustained = 1;
  MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, usual_out));
  t.times.sustained = sustained;
  MUST(planner_simulate(&t.planner, &t.budgets, &setup, 0, longer_out));
  flap_setup_close(&setup);
}

START_TEST(a_card_that_rests_for_little_pays_for_it) {
  flap_plan_costs usual, longer;
  plan_sustained(2, 1.05, &usual, &longer);
  printf("lanes are fast: computing for %.4f of %.4f s, and %.4f of %.4f s\n", usual.compute_seconds,
         usual.step_seconds, longer.compute_seconds, longer.step_seconds);
  ck_assert_double_gt(usual.compute_seconds, usual.step_seconds * 0.97);
  ck_assert_double_gt(longer.step_seconds, usual.step_seconds * 1.025);
  ck_assert_double_le(longer.step_seconds, usual.step_seconds * 1.05);
  ck_assert_double_eq_tol(longer.step_seconds - usual.step_seconds, longer.compute_seconds - usual.compute_seconds,
                          1e-9);
  plan_sustained(0, 1.05, &usual, &longer);
  ck_assert_double_lt(usual.compute_seconds, usual.step_seconds * 0.92); /* and rests for the others */
  ck_assert_double_eq(longer.step_seconds, usual.step_seconds);
  ck_assert_double_eq(longer.compute_seconds, usual.compute_seconds);
}
END_TEST

START_TEST(plans_bear_slower_lanes) {
  uint32_t better = 0;
  for (int kind = 0; kind < KINDS; kind++) {
    planner_trial t;
    flap_setup setup;
    flap_plan_costs costs;
    open_trial(&t, kind);
    MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &costs));
    const outcome ours = simulate(&t, &setup);
    flap_setup_close(&setup);
    ck_assert_double_eq(costs.step_seconds, ours.as_measured); /* what is told is of the rates as they are */
    if (!COMPARES)
      continue;
    const outcome once = search_once(&t);
    printf("%d: %.4f s, on average over several rates %.4f s; searched once %.4f s and %.4f s\n", kind,
           ours.as_measured, ours.average, once.as_measured, once.average);
    ck_assert_double_le(ours.average, once.average);
    ck_assert_double_le(ours.as_measured, once.as_measured * 1.01);
    better += ours.average < once.average * 0.998;
    if (kind == 0) { /* where the second search finds something else */
      flap_planner quick = t.planner;
      quick.quick = true;
      MUST(flap_planner_choose(&quick, &t.budgets, &setup, &costs));
      flap_setup_close(&setup);
      ck_assert_double_eq(costs.step_seconds, once.as_measured);
      ck_assert_double_ne(costs.step_seconds, ours.as_measured);
    }
    if (kind == 2)
      ck_assert_double_eq(ours.average, once.average); /* lanes that rest may be slower */
  }
  ck_assert(better > 0 || !COMPARES);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("planner reserve");
  tcase_set_timeout(tcase, 0);
  tcase_add_test(tcase, a_card_that_rests_for_little_pays_for_it);
  tcase_add_test(tcase, plans_bear_slower_lanes);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
