#include "engine/planner/bound.h"

#include "base/assert.h"
#include "base/duplex.h"
#include "base/units.h"

#include <math.h>
#include <string.h>

/* Of 256 elements: the fp32 master weights (in bf16 their two halves), in fp16 the weights beside them, two moments
 * each, and the gradient. Moments are fp32, or a byte, beside an fp32 number that the 256 share. */
#define GROUP 256u
static uint64_t group_bytes(const flap_bound_spec *spec, bool codes) {
  const uint64_t weight = spec->shape.dtype == FLAP_F16 ? 6 : 4;
  const uint64_t gradient = spec->needs_no_norm ? 0 : flap_dtype_bytes(spec->gradient_dtype); /* that waits */
  return codes ? GROUP * (weight + 2 + gradient) + 2 * 4 : GROUP * (weight + 2 * 4 + gradient);
}

/* State and gradients of all parts, the gaps between tensors included, which are whole groups: they are paged like
 * everything else. The embedding's moments are fp32 whatever the others are. */
static uint64_t count_live(const flap_bound_spec *spec) {
  const flap_model_config *model = spec->model;
  const bool codes = spec->optim == FLAP_OPTIM_ADAMW_8BIT;
  uint64_t layers = 0, rest = 0, all = 0;
  bool fits =
      flap_units_mul(flap_model_part_elements(model, FLAP_PART_LAYER), model->num_hidden_layers, &layers) &&
      flap_units_add(flap_model_part_elements(model, FLAP_PART_HEAD), layers, &rest) &&
      flap_units_mul(rest / GROUP, group_bytes(spec, codes), &rest) &&
      flap_units_mul(flap_model_part_elements(model, FLAP_PART_EMBEDDING) / GROUP, group_bytes(spec, false), &all) &&
      flap_units_add(all, rest, &all);
  flap_assert(fits);
  return all;
}

static double forward_flops(const flap_bound_spec *spec) {
  return flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_EMBEDDING) +
         spec->model->num_hidden_layers * flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_LAYER) +
         flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_HEAD);
}

static uint64_t beyond(uint64_t bytes, uint64_t room) {
  return bytes > room ? bytes - room : 0;
}

/* What a step's bytes are made of, in all parts. */
typedef struct step_bytes {
  uint64_t live, state; /* state and gradients that wait; state alone */
  uint64_t weights, gradients;
} step_bytes;

static step_bytes count_bytes(const flap_bound_spec *spec) {
  const flap_model_config *model = spec->model;
  const uint64_t elements = flap_model_part_elements(model, FLAP_PART_LAYER) * model->num_hidden_layers +
                            flap_model_part_elements(model, FLAP_PART_HEAD) +
                            flap_model_part_elements(model, FLAP_PART_EMBEDDING);
  const uint64_t live = count_live(spec), gradients = elements * flap_dtype_bytes(spec->gradient_dtype);
  return (step_bytes){.live = live,
                      .state = spec->needs_no_norm ? live : live - gradients,
                      .weights = elements * flap_dtype_bytes(spec->shape.dtype),
                      .gradients = gradients};
}

static uint64_t share_of(double share, uint64_t bytes) {
  return (uint64_t)(share * (double)bytes);
}

/* What the driver takes holds nothing. */
static uint64_t vram_of(const flap_bound_spec *spec) {
  return beyond(spec->vram_bytes, spec->machine->overhead_bytes);
}

/* `host`: the share of all that the host's cores update. */
static void compute_bytes(const flap_bound_spec *spec, const step_bytes *bytes, double host, flap_bound *bound) {
  const uint64_t vram = vram_of(spec);
  const uint64_t outside = beyond(bytes->live, vram), on_disk = beyond(outside, spec->ram_bytes);
  const uint64_t streaming = beyond(bytes->live - share_of(host, bytes->live), vram);
  bound->lane_bytes[FLAP_LANE_H2D] = streaming + share_of(host, bytes->weights);
  bound->lane_bytes[FLAP_LANE_D2H] = streaming + share_of(host, bytes->gradients);
  bound->lane_bytes[FLAP_LANE_DISK_READ] = bound->lane_bytes[FLAP_LANE_DISK_WRITE] = on_disk;
  bound->lane_bytes[FLAP_LANE_HOST] = share_of(host, 2 * bytes->state + bytes->gradients);
}

/* For how long lanes are busy with so many bytes, and the longest of it. */
typedef struct lane_times {
  double lane_seconds[FLAP_LANE_COUNT], copies_seconds, disks_seconds, seconds;
} lane_times;

static lane_times times_of(const flap_machine *machine, const uint64_t bytes[FLAP_LANE_COUNT]) {
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = machine->h2d_bytes,
                                         [FLAP_LANE_D2H] = machine->d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = machine->disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = machine->disk_write_bytes,
                                         [FLAP_LANE_HOST] = machine->host_bytes};
  const bool known = machine->h2d_both_bytes > 0 && machine->d2h_both_bytes > 0;
  const flap_duplex bus = {.alone_bytes = machine->h2d_bytes,
                           .other_alone_bytes = machine->d2h_bytes,
                           .both_bytes = known ? machine->h2d_both_bytes + machine->d2h_both_bytes : 0};
  const flap_duplex disk = {.alone_bytes = machine->disk_read_bytes,
                            .other_alone_bytes = machine->disk_write_bytes,
                            .both_bytes = machine->disk_both_bytes};
  lane_times times = {
      .copies_seconds = flap_duplex_least_seconds((double)bytes[FLAP_LANE_H2D], (double)bytes[FLAP_LANE_D2H], &bus),
      .disks_seconds =
          flap_duplex_least_seconds((double)bytes[FLAP_LANE_DISK_READ], (double)bytes[FLAP_LANE_DISK_WRITE], &disk)};
  times.seconds = fmax(times.copies_seconds, times.disks_seconds);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    if (bytes[lane] > 0)
      times.lane_seconds[lane] = rates[lane] > 0 ? (double)bytes[lane] / rates[lane] : (double)INFINITY;
    times.seconds = fmax(times.seconds, times.lane_seconds[lane]);
  }
  return times;
}

/* Between the moment when the norm is known and the first backward behind it. The host's gradients may have gone out
 * before, and those of the others go nowhere. */
static double update_seconds(const flap_bound_spec *spec, const step_bytes *bytes, double host,
                             const flap_bound *bound) {
  uint64_t moved[FLAP_LANE_COUNT];
  if (spec->needs_no_norm)
    return 0;
  memcpy(moved, bound->lane_bytes, sizeof moved);
  moved[FLAP_LANE_D2H] = beyond(bytes->state - share_of(host, bytes->state), vram_of(spec));
  moved[FLAP_LANE_DISK_WRITE] = beyond(beyond(bytes->state, vram_of(spec)), spec->ram_bytes);
  return times_of(spec->machine, moved).seconds;
}

/* Seconds of one core for a copy: the cheaper of the two prices. */
static double copy_core_seconds(const flap_machine *machine, uint64_t bytes, double alone_bytes) {
  const double together_bytes = machine->host_bytes / 2 / machine->shared_cores;
  return (double)bytes / fmax(alone_bytes, together_bytes);
}

static flap_bound bound_with(const flap_bound_spec *spec, const step_bytes *bytes, double host) {
  const flap_machine *machine = spec->machine;
  const double flops = spec->shape.dtype == FLAP_F32 ? machine->flops_f32 : machine->flops_bf16;
  flap_bound bound = {0};
  bound.compute_seconds = 3 * forward_flops(spec) * spec->micro_batches / flops;
  compute_bytes(spec, bytes, host, &bound);
  const lane_times times = times_of(machine, bound.lane_bytes);
  memcpy(bound.lane_seconds, times.lane_seconds, sizeof bound.lane_seconds);
  bound.copies_seconds = times.copies_seconds;
  bound.disks_seconds = times.disks_seconds;
  bound.update_seconds = update_seconds(spec, bytes, host, &bound);
  if (machine->shared_cores > 0) {
    double copies = copy_core_seconds(machine, bound.lane_bytes[FLAP_LANE_H2D], machine->h2d_bytes) +
                    copy_core_seconds(machine, bound.lane_bytes[FLAP_LANE_D2H], machine->d2h_bytes);
    bound.shared_seconds = bound.compute_seconds + copies / machine->shared_cores;
  }
  bound.seconds = fmax(fmax(bound.compute_seconds, bound.shared_seconds), times.seconds);
  bound.seconds = fmax(bound.seconds, bound.compute_seconds * 2 / 3 + bound.update_seconds);
  return bound;
}

/* The share of the host's cores that makes the bound least, and of those the smallest. Each lane's time is a convex
 * function of the share, and so is that of updates, so their maximum is one. */
static double best_share(const flap_bound_spec *spec, const step_bytes *bytes) {
  double low = 0, high = 1;
  if (spec->machine->shared_cores > 0 || !(spec->machine->host_bytes > 0))
    return 0;
  for (int i = 0; i < 100; i++) {
    const double left = low + (high - low) / 3, right = high - (high - low) / 3;
    if (bound_with(spec, bytes, left).seconds <= bound_with(spec, bytes, right).seconds)
      high = right;
    else
      low = left;
  }
  const double least = bound_with(spec, bytes, high).seconds * (1 + 1e-9);
  for (low = 0; high - low > 1e-9;) {
    const double middle = (low + high) / 2;
    if (bound_with(spec, bytes, middle).seconds <= least)
      high = middle;
    else
      low = middle;
  }
  return bound_with(spec, bytes, 0).seconds <= least ? 0 : high;
}

void flap_bound_compute(const flap_bound_spec *spec, flap_bound *bound_out) {
  const flap_machine *machine = spec->machine;
  const step_bytes bytes = count_bytes(spec);
  flap_assert((spec->shape.dtype == FLAP_F32 ? machine->flops_f32 : machine->flops_bf16) > 0);
  flap_assert(machine->h2d_bytes > 0 && machine->d2h_bytes > 0);
  *bound_out = bound_with(spec, &bytes, best_share(spec, &bytes));
}
