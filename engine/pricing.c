/* What a step of a setup costs: an estimate from bytes and operations, and a simulation by the code that runs steps. */
#include "base/assert.h"
#include "engine/planner_internal.h"
#include "engine/runtime.h"

#define STEPS_MAX 3
#define MANY_TRANSFERS 100000 /* a step of so many is simulated once after the first, not twice */

static double matmul_flops(const flap_planner *planner, const flap_setup *setup) {
  const flap_setup_spec *spec = &planner->spec;
  const uint32_t layers = spec->model->num_hidden_layers;
  const double layer = flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_LAYER);
  const double head = flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_HEAD);
  double passes = 1, recomputed = 0;
  if (spec->mode == FLAP_MODE_TRAIN) {
    passes = 3;
    for (uint32_t i = 0; i < layers; i++)
      recomputed += flap_layout_saved(&setup->layout, i, 0) == FLAP_REGION_NONE ? 1 : 0;
  }
  return spec->micro_batches * (layer * (passes * layers + recomputed) + head * passes);
}

/* Lanes overlap, but not quite: a tenth of what is not the longest shows. */
double planner_estimate(const flap_planner *planner, const flap_setup *setup) {
  const flap_machine *machine = planner->machine;
  const flap_program *program = &setup->programs[setup->steady];
  uint64_t bytes[FLAP_LANE_COUNT];
  flap_pager_predict(&setup->pager, program->leases, program->lease_count, bytes);
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = machine->h2d_bytes,
                                         [FLAP_LANE_D2H] = machine->d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = machine->disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = machine->disk_write_bytes};
  double longest =
      matmul_flops(planner, setup) / (planner->spec.shape.dtype == FLAP_F32 ? machine->flops_f32 : machine->flops_bf16);
  double sum = longest;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    const double seconds = bytes[lane] > 0 ? (double)bytes[lane] / rates[lane] : 0;
    sum += seconds;
    longest = seconds > longest ? seconds : longest;
  }
  return longest + (sum - longest) * 0.1 + (double)program->op_count * 1e-9 * (double)machine->launch_ns;
}

static flap_status run_steps(flap_runtime *runtime, const flap_setup *setup, flap_plan_costs *costs) {
  flap_executor *x = &runtime->executor;
  flap_executor_result result;
  const flap_executor_input input = {
      .tokens = x->host.tokens, .targets = x->host.targets, .counted = 1, .learning_rate = 1e-3, .decode_tokens = 1};
  uint64_t moved = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    moved += costs->lane_bytes[lane];
  const int steps = moved / setup->choice.transfer_bytes > MANY_TRANSFERS ? 2 : STEPS_MAX;
  flap_setup_program sequence[STEPS_MAX];
  uint64_t ended_ns[steps], busy_ns[STEPS_MAX];
  for (int i = 0; i < steps; i++)
    sequence[i] = setup->steady;
  if (setup->steady == FLAP_SETUP_STEADY)
    sequence[0] = FLAP_SETUP_FIRST;
  FLAP_TRY(flap_executor_begin(x, sequence[0]));
  for (int i = 0; i < steps; i++) {
    if (i + 1 < steps)
      FLAP_TRY(flap_executor_begin(x, sequence[i + 1]));
    FLAP_TRY(flap_executor_run(x, &input, &result));
    ended_ns[i] = flap_clock_now_ns(runtime->clock);
    busy_ns[i] = flap_device_busy_ns(flap_pager_device(runtime->pager), FLAP_STREAM_COMPUTE);
  }
  costs->step_seconds = (double)(ended_ns[steps - 1] - ended_ns[steps - 2]) * 1e-9;
  costs->compute_seconds = (double)(busy_ns[steps - 1] - busy_ns[steps - 2]) * 1e-9;
  return flap_pager_settle(runtime->pager);
}

flap_status planner_simulate(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup,
                             flap_plan_costs *costs_out) {
  const flap_runtime_config config = {.vram_bytes = budgets->vram_bytes, .machine = planner->machine};
  flap_runtime runtime;
  const flap_program *program = &setup->programs[setup->steady];
  *costs_out = (flap_plan_costs){0};
  flap_pager_predict(&setup->pager, program->leases, program->lease_count, costs_out->lane_bytes);
  FLAP_TRY(flap_runtime_open_simulated(setup, &config, &runtime));
  const flap_status status = run_steps(&runtime, setup, costs_out);
  flap_runtime_close(&runtime);
  return status;
}
