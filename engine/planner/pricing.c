/* What a step of a setup costs: an estimate from bytes and operations, and a simulation by the code that runs steps. */
#include "base/assert.h"
#include "base/duplex.h"
#include "engine/machine/codec_rates.h"
#include "engine/planner/planner_internal.h"
#include "engine/run/runtime.h"

#define STEPS_MAX 3
#define MANY_TRANSFERS 100000 /* a step of so many is simulated once after the first, not twice */

flap_status planner_times(const flap_planner *planner, flap_op_times *times_out) {
  const flap_setup_spec *spec = &planner->spec;
  const flap_op_times_spec of = {.model = spec->model,
                                 .shape = spec->shape,
                                 .gradient_dtype = spec->gradient_dtype,
                                 .optim = spec->optim,
                                 .training = spec->mode == FLAP_MODE_TRAIN,
                                 .threads = spec->threads,
                                 .launch_ns = planner->machine->launch_ns};
  return flap_op_times_from_rates(&of, planner->machine, times_out);
}

void planner_slow_lanes(const flap_machine *machine, const flap_op_times *times, double share,
                        flap_machine *machine_out, flap_op_times *times_out) {
  *machine_out = *machine;
  *times_out = *times;
  if (machine->shared_cores > 0)
    return;
  double *const rates[] = {&machine_out->h2d_bytes,       &machine_out->d2h_bytes,       &machine_out->h2d_both_bytes,
                           &machine_out->d2h_both_bytes,  &machine_out->disk_read_bytes, &machine_out->disk_write_bytes,
                           &machine_out->disk_both_bytes, &machine_out->host_bytes};
  flap_host_ns *const host[] = {&times_out->host, &times_out->host_embedding};
  for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++)
    *rates[i] *= share;
  for (size_t i = 0; i < sizeof host / sizeof host[0]; i++) {
    host[i]->alone /= share;
    host[i]->beside_copies /= share;
  }
}

/* What one window of a program costs: operations and leases [first, end) of the list. */
typedef struct window {
  double seconds; /* of computing */
  double host_seconds;
  uint32_t first, end;
} window;

/* The longer of what each pair of lanes takes that slow each other down; 0 where none does. */
static double pairs_seconds(const flap_machine *machine, const uint64_t bytes[FLAP_LANE_COUNT]) {
  const bool known = machine->h2d_both_bytes > 0 && machine->d2h_both_bytes > 0;
  const flap_duplex bus = {machine->h2d_bytes, machine->d2h_bytes,
                           known ? machine->h2d_both_bytes + machine->d2h_both_bytes : 0};
  const flap_duplex disk = {machine->disk_read_bytes, machine->disk_write_bytes, machine->disk_both_bytes};
  const double copies = flap_duplex_least_seconds((double)bytes[FLAP_LANE_H2D], (double)bytes[FLAP_LANE_D2H], &bus);
  const double disks =
      flap_duplex_least_seconds((double)bytes[FLAP_LANE_DISK_READ], (double)bytes[FLAP_LANE_DISK_WRITE], &disk);
  return copies > disks ? copies : disks;
}

/* Lanes overlap, but not quite: a tenth of what is not the longest shows. */
static double window_seconds(const flap_planner *planner, const flap_setup *setup, const window *w) {
  const flap_machine *machine = planner->machine;
  const flap_program *program = &setup->programs[setup->steady];
  uint64_t bytes[FLAP_LANE_COUNT];
  flap_pager_predict_part(&setup->pager, program->leases, w->first, w->end, bytes);
  const double disk_share = flap_codec_disk_share(machine, &setup->pager, setup->spec.threads, setup->spec.optim);
  for (int lane = FLAP_LANE_DISK_READ; lane <= FLAP_LANE_DISK_WRITE; lane++)
    bytes[lane] = (uint64_t)(disk_share * (double)bytes[lane]);
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = machine->h2d_bytes,
                                         [FLAP_LANE_D2H] = machine->d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = machine->disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = machine->disk_write_bytes};
  double longest = w->seconds > w->host_seconds ? w->seconds : w->host_seconds, sum = w->seconds + w->host_seconds;
  for (int lane = 0; lane < FLAP_LANE_HOST; lane++) {
    const double seconds = bytes[lane] > 0 ? (double)bytes[lane] / rates[lane] : 0;
    sum += seconds;
    longest = seconds > longest ? seconds : longest;
  }
  const double pairs = pairs_seconds(machine, bytes);
  if (pairs > longest) {
    sum += pairs - longest;
    longest = pairs;
  }
  return longest + (sum - longest) * 0.1;
}

static window closed(window *w) {
  const window all = *w;
  *w = (window){.first = all.end, .end = all.end};
  return all;
}

static uint32_t last_backward(const flap_program *program) {
  for (uint32_t i = program->op_count; i-- > 0;)
    if (program->ops[i].kind == FLAP_OP_LAYER_BACKWARD)
      return i;
  return program->op_count;
}

/* Forward and backward passes are windows of their own: states that stream through the forward do not hide behind the
 * backward, whose lanes have nothing but gradients and activations to carry. And what is updated before the first
 * layer, or behind the last, hides behind nothing, unless it waits for disks, which work ahead. */
double planner_estimate(const flap_planner *planner, const flap_setup *setup) {
  const flap_program *program = &setup->programs[setup->steady];
  const uint32_t last = last_backward(program);
  double seconds = 0, later_seconds = 0; /* the latter of the host */
  window w = {0};
  bool backward = false, begun = setup->disk_bytes > 0;
  uint32_t first_layer, first_segment;
  flap_layout_segment(&setup->layout, 0, &first_layer, &first_segment); /* the last layer's part */
  for (uint32_t i = 0; i < program->op_count; i++) {
    const flap_op *op = &program->ops[i];
    if (op->kind == FLAP_OP_PIN)
      w.end = op->operand[0] + 1;
    if (op->kind == FLAP_OP_HOST_ADAMW) {
      w.end = op->operand[2] + 1;
      /* The first segment waits for its own; the others are updated beside the layers before them. */
      const bool first = !begun && setup->layout.slices[op->index].part <= first_segment;
      *(first || begun ? &w.host_seconds : &later_seconds) +=
          1e-9 * (double)flap_op_times_of(planner->times, &setup->layout, op);
      continue;
    }
    bool turns = op->kind == FLAP_OP_LAYER_FORWARD && !begun;
    begun = begun || turns;
    if (op->kind == FLAP_OP_HEAD || op->kind == FLAP_OP_EMBED) {
      turns = (op->kind == FLAP_OP_HEAD) != backward;
      backward = op->kind == FLAP_OP_HEAD;
    }
    turns = turns || (op->kind == FLAP_OP_NORM && i < last); /* all updates are behind it */
    if (turns) {
      const window over = closed(&w);
      seconds += window_seconds(planner, setup, &over);
      w.host_seconds = later_seconds;
      later_seconds = 0;
    }
    w.seconds += 1e-9 * (double)flap_op_times_of(planner->times, &setup->layout, op);
    if (i == last && setup->disk_bytes == 0) {
      const window over = closed(&w);
      seconds += window_seconds(planner, setup, &over);
    }
  }
  return seconds + window_seconds(planner, setup, &w);
}

/* Where the first steady step takes longer than `limit_seconds` (0: however long), it is the one that counts, and the
 * last; what the pager has begun of the next one is left to its end. */
static flap_status run_steps(flap_runtime *runtime, const flap_setup *setup, double limit_seconds,
                             flap_plan_costs *costs) {
  flap_executor *x = &runtime->executor;
  flap_executor_result result;
  const flap_executor_input input = {
      .tokens = x->host.tokens, .targets = x->host.targets, .counted = 1, .learning_rate = 1e-3, .decode_tokens = 1};
  uint64_t moved = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    moved += costs->lane_bytes[lane];
  int steps = moved / setup->choice.transfer_bytes > MANY_TRANSFERS ? 2 : STEPS_MAX;
  const int all = runtime->lists.trace != NULL ? steps + 1 : steps; /* what is traced has one behind it, as usual */
  flap_setup_program sequence[STEPS_MAX + 1];
  uint64_t ended_ns[STEPS_MAX + 1], busy_ns[STEPS_MAX + 1];
  flap_pager_stats stats[STEPS_MAX + 1];
  for (int i = 0; i < all; i++)
    sequence[i] = setup->steady;
  if (setup->steady == FLAP_SETUP_STEADY)
    sequence[0] = FLAP_SETUP_FIRST;
  FLAP_TRY(flap_executor_begin(x, sequence[0]));
  bool is_far = false;
  for (int i = 0; i < all && !is_far; i++) {
    if (i + 1 < all)
      FLAP_TRY(flap_executor_begin(x, sequence[i + 1]));
    if (i == all - 2 && all > steps)
      flap_runtime_start_trace(runtime);
    FLAP_TRY(flap_executor_run(x, &input, &result));
    if (i == all - 2 && all > steps)
      flap_runtime_stop_trace(runtime);
    ended_ns[i] = flap_clock_now_ns(runtime->clock);
    busy_ns[i] = flap_device_busy_ns(flap_pager_device(runtime->pager), FLAP_STREAM_COMPUTE);
    flap_pager_get_stats(runtime->pager, &stats[i]);
    is_far = i == 1 && all > 2 && limit_seconds > 0 && (double)(ended_ns[1] - ended_ns[0]) * 1e-9 > limit_seconds;
    steps = is_far ? 2 : steps;
  }
  costs->step_seconds = (double)(ended_ns[steps - 1] - ended_ns[steps - 2]) * 1e-9;
  costs->compute_seconds = (double)(busy_ns[steps - 1] - busy_ns[steps - 2]) * 1e-9;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    costs->lane_seconds[lane] = (double)(stats[steps - 1].busy_ns[lane] - stats[steps - 2].busy_ns[lane]) * 1e-9;
  return is_far ? FLAP_OK : flap_pager_settle(runtime->pager);
}

/* Of the power that computing takes, so much is left where the stream rests. */
#define REST_CREDIT 0.7

/* A card at its limit of power computes for longer where it rests for little of the step. */
static void charge_power(const flap_op_times *times, flap_plan_costs *costs) {
  const double rests = costs->step_seconds - costs->compute_seconds;
  const double more = (times->sustained - 1) * costs->compute_seconds - REST_CREDIT * rests;
  if (more > 0) {
    costs->step_seconds += more;
    costs->compute_seconds += more;
  }
}

/* `trace`: of the last step, or NULL. */
static flap_status simulate(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup,
                            double limit_seconds, struct flap_trace *trace, flap_plan_costs *costs_out) {
  const flap_runtime_config config = {
      .vram_bytes = budgets->vram_bytes, .machine = planner->machine, .times = planner->times, .trace = trace};
  flap_runtime runtime;
  const flap_program *program = &setup->programs[setup->steady];
  *costs_out = (flap_plan_costs){0};
  if (setup->steady == FLAP_SETUP_STEADY)
    FLAP_TRY(flap_setup_list_program(setup, FLAP_SETUP_FIRST)); /* which goes before it */
  flap_pager_predict(&setup->pager, program->leases, program->lease_count, costs_out->lane_bytes);
  FLAP_TRY(flap_runtime_open_simulated(setup, &config, &runtime));
  const flap_status status = run_steps(&runtime, setup, limit_seconds, costs_out);
  charge_power(planner->times, costs_out);
  flap_runtime_close(&runtime);
  return status;
}

flap_status planner_simulate(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup,
                             double limit_seconds, flap_plan_costs *costs_out) {
  return simulate(planner, budgets, setup, limit_seconds, NULL, costs_out);
}

flap_status flap_planner_trace(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup,
                               struct flap_trace *trace) {
  flap_plan_costs costs;
  return simulate(planner, budgets, setup, 0, trace, &costs);
}
