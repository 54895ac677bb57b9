/* The planner: chooses how the step is cut and what lives where.
 *
 * Folder-private, but for tests. A candidate is a skeleton (segments, groups, saved layers and which tensors they save,
 * when and by whom it is updated), a slice size, a page size and how much is staged. The set of candidates does not
 * depend on budgets, and each takes what is left of a budget for placement only, so a plan accepted at one budget is a
 * candidate at every larger one. Candidates are priced from their bytes and operations; the best few are run on the sim
 * device by the code that will run the step. Ties go to the earlier candidate.
 */
#ifndef FLAP_ENGINE_PLANNER_PLANNER_H
#define FLAP_ENGINE_PLANNER_PLANNER_H

#include "engine/machine/op_times.h"
#include "engine/step/setup.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Stands for "whatever is needed" in a budget, while another one is looked for. */
#define FLAP_BUDGET_PLENTY ((uint64_t)1 << 50)

typedef struct flap_budgets {
  uint64_t vram_bytes, ram_bytes;
  uint64_t disk_bytes[FLAP_BLOCK_DISKS_MAX]; /* of each disk */
  uint64_t vram_given_bytes;                 /* what a person gave, before it was cut to whole blocks; 0: nothing */
} flap_budgets;

typedef struct flap_planner {
  flap_setup_spec spec;
  flap_expert expert;
  flap_activations activations;
  const flap_machine *machine;
  const flap_op_times *times;    /* NULL: from the machine's rates */
  bool quick;                    /* only looked at: one search, for lanes as they are */
  struct planner_memory *memory; /* of flap_planner_choose; NULL: none */
  struct flap_pool *pool;        /* likewise; NULL: one thread */
} flap_planner;

typedef struct flap_plan_costs {
  double step_seconds, compute_seconds; /* of a steady step, simulated */
  double lane_seconds[FLAP_LANE_COUNT]; /* for which each lane was busy in it */
  uint64_t lane_bytes[FLAP_LANE_COUNT]; /* exact */
} flap_plan_costs;

/* The best setup for these budgets. FLAP_BUDGET names the budget that is too small and the smallest that works. */
FLAP_CHECKED flap_status flap_planner_choose(const flap_planner *planner, const flap_budgets *budgets,
                                             flap_setup *setup_out, flap_plan_costs *costs_out);

/* What a steady step of a setup that was chosen will look like: its operations, transfers and waits go to the trace,
 * with virtual times. `planner` has times. */
struct flap_trace;
FLAP_CHECKED flap_status flap_planner_trace(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup,
                                            struct flap_trace *trace);

/* A size of one budget that is accepted, the others as given: of vram the least, where the others have room for what
 * plans take before anything is spent; else about the least, as few of all plans are tried. FLAP_BUDGET when there is
 * none: it names another budget that is too small, and a size of that one that works. */
FLAP_CHECKED flap_status flap_planner_vram_min(const flap_planner *planner, const flap_budgets *budgets,
                                               uint64_t *bytes_out);
FLAP_CHECKED flap_status flap_planner_ram_min(const flap_planner *planner, const flap_budgets *budgets,
                                              uint64_t *bytes_out);
/* Both in one search; there are disks. */
FLAP_CHECKED flap_status flap_planner_ram_and_disk_min(const flap_planner *planner, const flap_budgets *budgets,
                                                       uint64_t *ram_out, uint64_t *disk_out);
/* Of all disks together. */
FLAP_CHECKED flap_status flap_planner_disk_min(const flap_planner *planner, const flap_budgets *budgets,
                                               uint64_t *bytes_out);

#ifdef __cplusplus
}
#endif
#endif
