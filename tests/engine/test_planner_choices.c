/* On small models the planner's choices are tried by brute force, and the plan is at most 5% slower than the best of
 * all, but for one model in twenty: choices are refined one after the other, so where several must change at once for
 * the step to get shorter, that is missed.
 *
 * All segments, groups, numbers of saving layers, sets of saved tensors, spread or not, parts that the host updates,
 * where nothing is clipped shares that are updated in the backward, and whether the embedding's states stay, sizes of
 * slices and pages, and depths are placed and simulated; what computes or moves for longer than the best so far takes,
 * on some lane alone, is left out unsimulated. As a rule only a random part of them is tried: of so many ways to cut
 * the step one (FLAP_PLANNER_CUTS, 1 for all), and of so many page sizes of it one (FLAP_PLANNER_PAGES); all of them
 * take minutes a model. FLAP_PLANNER_TRIALS says how many models are tried (from FLAP_TEST_SEED on), and
 * FLAP_PLANNER_LAYERS and FLAP_PLANNER_MICRO_BATCHES how large they may be.
 */
#include "tests/engine/planner_trials.h"

#include "base/philox.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TRIALS 4
#define UNCLIPPED_TRIALS 4
#else
#define TRIALS 24
#define UNCLIPPED_TRIALS 8
#endif
#define CUTS 40 /* of so many one is tried, and of each so many pages one */
#define PAGES 3
#define WITHIN 1.05
#define ONE_IN_BEYOND 20u
#define ON_AVERAGE 1.02
#define DEPTHS 5u
#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())

static uint64_t number(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

typedef struct brute {
  const planner_trial *trial;
  flap_philox stream;            /* of what is left out */
  uint64_t drawn, cuts, pages;   /* of so many of them one is tried; 1: all */
  planner_candidates candidates; /* for the sizes of slices and pages */
  double best_seconds;
  flap_choice best;
  uint32_t best_depth;
  uint64_t placed, simulated;
} brute;

/* No step is shorter than any of its lanes. */
static double least_of(const brute *b, const flap_setup *setup) {
  const flap_machine *m = &b->trial->machine;
  const flap_program *program = &setup->programs[setup->steady];
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = m->h2d_bytes,
                                         [FLAP_LANE_D2H] = m->d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = m->disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = m->disk_write_bytes};
  double compute_ns = 0;
  uint64_t bytes[FLAP_LANE_COUNT];
  for (uint32_t i = 0; i < program->op_count; i++)
    if (program->ops[i].kind != FLAP_OP_HOST_ADAMW)
      compute_ns += (double)flap_op_times_of(&b->trial->times, &setup->layout, &program->ops[i]);
  double longest = compute_ns * 1e-9;
  flap_pager_predict(&setup->pager, program->leases, program->lease_count, bytes);
  for (int lane = 0; lane < FLAP_LANE_HOST; lane++)
    if ((double)bytes[lane] / rates[lane] > longest)
      longest = (double)bytes[lane] / rates[lane];
  return longest;
}

static void try_placed(brute *b, flap_setup *setup, uint32_t depth) {
  flap_plan_costs costs;
  b->placed++;
  if (least_of(b, setup) >= b->best_seconds)
    return;
  MUST(planner_simulate(&b->trial->planner, &b->trial->budgets, setup, 0, &costs));
  b->simulated++;
  if (costs.step_seconds >= b->best_seconds)
    return;
  b->best_seconds = costs.step_seconds;
  b->best = setup->choice;
  b->best_depth = depth;
}

static bool same_placement(const flap_choice *a, const flap_choice *b) {
  return memcmp(a->extra_slots, b->extra_slots, sizeof a->extra_slots) == 0 &&
         memcmp(a->resident_bytes, b->resident_bytes, sizeof a->resident_bytes) == 0;
}

/* One in so many is tried. */
static bool is_left_out(brute *b, uint64_t of) {
  return of > 1 && flap_philox_below(&b->stream, b->drawn++, of) > 0;
}

static void try_cut(brute *b, flap_choice choice) {
  flap_setup setup;
  if (is_left_out(b, b->cuts))
    return;
  choice.page_bytes = choice.transfer_bytes = b->candidates.pages[0];
  choice.read_buffers = choice.write_buffers = b->trial->planner.spec.disk_count > 0 ? 1 : 0;
  if (flap_setup_build(&b->trial->planner.spec, &choice, &setup) != FLAP_OK)
    return;
  for (uint32_t p = 0; p < b->candidates.page_count; p++) {
    flap_choice before = {.page_bytes = 0};
    if (is_left_out(b, b->pages))
      continue;
    for (uint32_t depth = 0; depth < DEPTHS; depth++) {
      flap_choice with = choice;
      with.page_bytes = with.transfer_bytes = b->candidates.pages[p];
      const planner_reach reach = planner_fill(&b->trial->planner, &b->trial->budgets, &with, depth, &setup);
      if (reach == PLANNER_NO_VRAM)
        goto close;
      if (reach == PLANNER_FITS && (before.page_bytes == 0 || !same_placement(&before, &setup.choice)))
        try_placed(b, &setup, depth);
      before = setup.choice;
    }
  }
close:
  flap_setup_close(&setup);
}

/* Updated in the backward: of the device's parts and of the host's. */
static void try_updates(brute *b, flap_choice choice) {
  const uint32_t parts = b->trial->model.num_hidden_layers + 2;
  try_cut(b, choice);
  /* A second backward for some parts alone costs as much, and gains less. */
  const uint32_t least = b->trial->planner.spec.needs_no_norm ? 1 : parts;
  for (choice.backward_parts = least; choice.backward_parts <= parts; choice.backward_parts++)
    for (choice.host_backward_parts = 0; choice.host_backward_parts <= (choice.host_parts > 0 ? parts : 0);
         choice.host_backward_parts++)
      for (int keeps = 0; keeps < 2; keeps++) {
        choice.keeps_embedding = keeps == 1;
        try_cut(b, choice);
      }
}

static void try_saved(brute *b, flap_choice choice) {
  const uint32_t parts = b->trial->model.num_hidden_layers + 2;
  const uint32_t hosts = b->trial->planner.spec.device == FLAP_DEVICE_CUDA ? parts : 0;
  for (choice.host_parts = 0; choice.host_parts <= hosts; choice.host_parts++)
    for (int spread = 0; spread < 2; spread++)
      for (uint32_t s = 0; s < b->candidates.slice_count; s++) {
        choice.spread = spread == 1;
        choice.slice_elements = b->candidates.slices[s];
        try_updates(b, choice);
        if (choice.slice_elements > flap_model_parameters(&b->trial->model))
          break; /* larger ones are the same */
      }
}

static void try_all(brute *b) {
  const uint32_t layers = b->trial->model.num_hidden_layers, n = b->trial->planner.spec.micro_batches;
  uint32_t set_count = 0;
  const flap_saved_set *sets = flap_model_saved_sets(&b->trial->model, &set_count);
  planner_candidates lists[PLANNER_LISTS_MAX];
  (void)planner_list(&b->trial->planner, lists);
  b->candidates = lists[0]; /* of slices and pages, the same in all */
  for (uint32_t segment = 1; segment <= layers; segment++)
    for (uint32_t group = 1; group <= n; group++) {
      const uint32_t least = flap_layout_least_tail(layers, segment);
      for (uint32_t tail = least; tail == least || tail < layers; tail += segment) { /* all: one segment */
        flap_choice choice = {.segment_layers = segment, .tail_layers = tail, .group_micro_batches = group};
        try_saved(b, choice);
        for (uint32_t saved = 1; saved <= layers; saved++)
          for (uint32_t k = 0; k < set_count; k++) {
            choice.saved_layers = saved;
            choice.saved_mask = sets[k].mask;
            try_saved(b, choice);
          }
      }
    }
}

static void describe(const char *what, const flap_choice *c, double seconds) {
  printf("  %s: %.4f ms, segments of %u, tail of %u, groups of %u, %u saved (%#x), %s, host %u, backward %u and %u%s, "
         "slices of "
         "%llu, pages of %llu, "
         "transfers of %llu; extra slots",
         what, seconds * 1e3, c->segment_layers, c->tail_layers, c->group_micro_batches, c->saved_layers, c->saved_mask,
         c->spread ? "spread" : "at once", c->host_parts, c->backward_parts, c->host_backward_parts,
         c->keeps_embedding ? ", embedding kept" : "", (unsigned long long)c->slice_elements,
         (unsigned long long)c->page_bytes, (unsigned long long)c->transfer_bytes);
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    printf(" %u", c->extra_slots[k]);
  printf(", resident");
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    printf(" %llu", (unsigned long long)c->resident_bytes[k]);
  printf("\n");
}

START_TEST(choices_are_within_5_percent_of_brute_force) {
  const uint64_t first = number("FLAP_TEST_SEED", 1),
                 trials = number("FLAP_PLANNER_TRIALS", _i == 0 ? TRIALS : UNCLIPPED_TRIALS);
  const uint32_t layers = (uint32_t)number("FLAP_PLANNER_LAYERS", 2);
  const uint32_t micro_batches = (uint32_t)number("FLAP_PLANNER_MICRO_BATCHES", 2);
  double worst = 1, sum = 0;
  uint64_t placed = 0, simulated = 0, beyond = 0;
  for (uint64_t seed = first; seed < first + trials; seed++) {
    planner_trial trial;
    flap_setup setup;
    flap_plan_costs costs;
    planner_trial_open(&trial, seed, layers, micro_batches, _i == 1);
    MUST(flap_planner_choose(&trial.planner, &trial.budgets, &setup, &costs));
    brute b = {.trial = &trial,
               .stream = flap_philox_stream(seed, "left out"),
               .cuts = number("FLAP_PLANNER_CUTS", CUTS * (_i == 0 ? 1 : 20)),
               .pages = number("FLAP_PLANNER_PAGES", PAGES),
               .best_seconds = costs.step_seconds,
               .best = setup.choice};
    try_all(&b);
    const double ratio = costs.step_seconds / b.best_seconds;
    placed += b.placed;
    simulated += b.simulated;
    sum += ratio;
    worst = ratio > worst ? ratio : worst;
    beyond += ratio > WITHIN;
    if (ratio > WITHIN) {
      printf("%s: %.1f%% slower than the best\n", trial.words, 100 * (ratio - 1));
      describe("chosen", &setup.choice, costs.step_seconds);
      describe("best", &b.best, b.best_seconds);
      printf("  depth %u\n", b.best_depth);
      fflush(stdout);
    }
    flap_setup_close(&setup);
  }
  printf("%llu models, %llu placements, %llu simulated: plans are %.2f%% slower than the best on average, %.2f%% at "
         "most, %llu by more than 5%%\n",
         (unsigned long long)trials, (unsigned long long)placed, (unsigned long long)simulated,
         100 * (sum / (double)trials - 1), 100 * (worst - 1), (unsigned long long)beyond);
  ck_assert_uint_gt(simulated, 0);
  ck_assert_uint_le(beyond, (trials + ONE_IN_BEYOND - 1) / ONE_IN_BEYOND);
  ck_assert_double_le(sum / (double)trials, ON_AVERAGE);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("planner choices");
  tcase_set_timeout(tcase, 0); /* ctest has one, and long runs have none */
  tcase_add_loop_test(tcase, choices_are_within_5_percent_of_brute_force, 0, 2);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
