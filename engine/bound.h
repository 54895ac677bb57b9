/* The machine bound: the least time that a step can take on a machine, whatever the plan.
 *
 * Folder-private, but for tests. Computed from shapes, budgets and rates alone, by code that shares nothing with
 * planner or pager, so that a poor plan cannot flatter itself.
 */
#ifndef FLAP_ENGINE_BOUND_H
#define FLAP_ENGINE_BOUND_H

#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_bound_spec {
  const flap_model_config *model;
  flap_model_shape shape; /* of a micro-batch */
  uint32_t micro_batches;
  flap_dtype gradient_dtype;
  uint64_t vram_bytes, ram_bytes; /* budgets */
  const flap_machine *machine;
} flap_bound_spec;

typedef struct flap_bound {
  double seconds; /* the largest of all below */
  double compute_seconds;
  double lane_seconds[FLAP_LANE_COUNT];
  double shared_seconds; /* cpu device: the CPU work of all lanes over the cores; else 0 */
  uint64_t lane_bytes[FLAP_LANE_COUNT];
} flap_bound;

void flap_bound_compute(const flap_bound_spec *spec, flap_bound *bound_out);

#ifdef __cplusplus
}
#endif
#endif
