/* Small random models on random machines under random budgets, for tests of what the planner chooses. Nothing of them
 * is ever opened: plans are simulated.
 */
#ifndef FLAP_TESTS_ENGINE_PLANNER_TRIALS_H
#define FLAP_TESTS_ENGINE_PLANNER_TRIALS_H

#include "engine/planner/planner_internal.h"

typedef struct planner_trial {
  uint64_t seed;
  flap_model_config model;
  flap_machine machine;
  flap_op_times times;
  flap_planner planner; /* points into the trial */
  flap_budgets budgets;
  char words[256]; /* what it is, for messages */
} planner_trial;

/* A pure function of what is given. `layers` and `micro_batches`: at most so many. */
void planner_trial_open(planner_trial *trial, uint64_t seed, uint32_t layers, uint32_t micro_batches,
                        bool needs_no_norm);

#endif
