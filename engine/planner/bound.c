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

/* What a step's bytes and operations are, in all parts. */
typedef struct step_work {
  uint64_t state, weights, gradients;
  double forward_flops;
  double product_flops; /* of the gradients of all matrices but the embedding, once more; those of other tensors come */
  double product_share; /* for nothing, and these are such a share of all gradients */
} step_work;

static uint64_t matrix_elements(const flap_model_config *model, flap_part part) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t count = flap_model_tensors(model, part, 0, tensors);
  uint64_t elements = 0;
  for (uint32_t i = 0; i < count; i++)
    elements += tensors[i].rank > 1 ? tensors[i].elements : 0;
  return elements;
}

static step_work count_work(const flap_bound_spec *spec) {
  const flap_model_config *model = spec->model;
  const uint64_t elements = flap_model_part_elements(model, FLAP_PART_LAYER) * model->num_hidden_layers +
                            flap_model_part_elements(model, FLAP_PART_HEAD) +
                            flap_model_part_elements(model, FLAP_PART_EMBEDDING);
  const double matrices = (double)matrix_elements(model, FLAP_PART_LAYER) * model->num_hidden_layers +
                          (double)matrix_elements(model, FLAP_PART_HEAD);
  const double tokens = (double)spec->shape.batch * spec->shape.sequence * spec->micro_batches;
  const uint64_t live = count_live(spec), gradients = elements * flap_dtype_bytes(spec->gradient_dtype);
  return (step_work){.state = spec->needs_no_norm ? live : live - gradients,
                     .weights = elements * flap_dtype_bytes(spec->shape.dtype),
                     .gradients = gradients,
                     .forward_flops = forward_flops(spec) * spec->micro_batches,
                     .product_flops = 2 * tokens * matrices,
                     .product_share = matrices / (double)elements};
}

/* What may be chosen: the share that the host's cores update, and the share of gradients that do not wait for the norm:
 * they are computed once more behind it. */
typedef struct shares {
  double host, again;
} shares;

static uint64_t share_of(double share, uint64_t bytes) {
  return (uint64_t)(share * (double)bytes);
}

/* What the driver takes holds nothing. */
static uint64_t vram_of(const flap_bound_spec *spec) {
  return beyond(spec->vram_bytes, spec->machine->overhead_bytes);
}

/* Of the gradients that are computed again those may be that the device consumes, or the host. */
static void compute_bytes(const flap_bound_spec *spec, const step_work *work, shares of, flap_bound *bound) {
  const uint64_t vram = vram_of(spec), gradients = spec->needs_no_norm ? 0 : work->gradients;
  const uint64_t again = (uint64_t)ceil(of.again * (double)gradients);
  const uint64_t outside = beyond(work->state + gradients - again, vram), on_disk = beyond(outside, spec->ram_bytes);
  const uint64_t streaming = beyond(
      work->state - share_of(of.host, work->state) + beyond(gradients - share_of(of.host, gradients), again), vram);
  bound->lane_bytes[FLAP_LANE_H2D] = streaming + share_of(of.host, work->weights);
  bound->lane_bytes[FLAP_LANE_D2H] = streaming + share_of(of.host, work->gradients);
  bound->lane_bytes[FLAP_LANE_DISK_READ] = bound->lane_bytes[FLAP_LANE_DISK_WRITE] = on_disk;
  bound->lane_bytes[FLAP_LANE_HOST] = share_of(of.host, 2 * work->state + work->gradients);
}

static double flops_again(const step_work *work, double again) {
  const double products = again - (1 - work->product_share);
  return products > 0 ? products / work->product_share * work->product_flops : 0;
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

/* Between the moment when the norm is known and the first backward of the next step. The host's gradients may have gone
 * out before, and those of the others go nowhere. */
static double update_seconds(const flap_bound_spec *spec, const step_work *work, shares of, const flap_bound *bound) {
  uint64_t moved[FLAP_LANE_COUNT];
  if (spec->needs_no_norm)
    return 0;
  memcpy(moved, bound->lane_bytes, sizeof moved);
  moved[FLAP_LANE_D2H] = beyond(work->state - share_of(of.host, work->state), vram_of(spec));
  moved[FLAP_LANE_DISK_WRITE] = beyond(beyond(work->state, vram_of(spec)), spec->ram_bytes);
  return times_of(spec->machine, moved).seconds;
}

/* Seconds of one core for a copy: the cheaper of the two prices. */
static double copy_core_seconds(const flap_machine *machine, uint64_t bytes, double alone_bytes) {
  const double together_bytes = machine->host_bytes / 2 / machine->shared_cores;
  return (double)bytes / fmax(alone_bytes, together_bytes);
}

static flap_bound bound_with(const flap_bound_spec *spec, const step_work *work, shares of) {
  const flap_machine *machine = spec->machine;
  const double flops = spec->shape.dtype == FLAP_F32 ? machine->flops_f32 : machine->flops_bf16;
  flap_bound bound = {0};
  bound.backward_seconds = 2 * work->forward_flops / flops;
  bound.compute_seconds = (3 * work->forward_flops + flops_again(work, of.again)) / flops;
  compute_bytes(spec, work, of, &bound);
  const lane_times times = times_of(machine, bound.lane_bytes);
  memcpy(bound.lane_seconds, times.lane_seconds, sizeof bound.lane_seconds);
  bound.copies_seconds = times.copies_seconds;
  bound.disks_seconds = times.disks_seconds;
  bound.update_seconds = update_seconds(spec, work, of, &bound);
  if (machine->shared_cores > 0) {
    double copies = copy_core_seconds(machine, bound.lane_bytes[FLAP_LANE_H2D], machine->h2d_bytes) +
                    copy_core_seconds(machine, bound.lane_bytes[FLAP_LANE_D2H], machine->d2h_bytes);
    bound.shared_seconds = bound.compute_seconds + copies / machine->shared_cores;
  }
  bound.seconds = fmax(fmax(bound.compute_seconds, bound.shared_seconds), times.seconds);
  bound.seconds = fmax(bound.seconds, bound.backward_seconds + bound.update_seconds);
  return bound;
}

typedef struct search {
  const flap_bound_spec *spec;
  const step_work *work;
  double again; /* where the host's share is looked for */
} search;

/* The share that makes a step shortest, and of those the smallest. Each lane's time is a convex function of both
 * shares, and so is that of updates, so their maximum is one. */
static double least_at(const search *s, double (*seconds)(const search *s, double share)) {
  double low = 0, high = 1;
  for (int i = 0; i < 60; i++) {
    const double left = low + (high - low) / 3, right = high - (high - low) / 3;
    const double at_left = seconds(s, left), at_right = seconds(s, right);
    if (at_left <= at_right && isfinite(at_left))
      high = right;
    else
      low = left; /* where nothing is finite, more of what spares bytes may be */
  }
  const double least = seconds(s, high) * (1 + 1e-9);
  if (seconds(s, 0) <= least)
    return 0;
  for (low = 0; high - low > 1e-9;) {
    const double middle = (low + high) / 2;
    if (seconds(s, middle) <= least)
      high = middle;
    else
      low = middle;
  }
  return high;
}

static double seconds_of_host(const search *s, double host) {
  return bound_with(s->spec, s->work, (shares){.host = host, .again = s->again}).seconds;
}

static shares with_best_host(const search *s, double again) {
  const flap_machine *machine = s->spec->machine;
  const search here = {.spec = s->spec, .work = s->work, .again = again};
  const bool helps = machine->shared_cores == 0 && machine->host_bytes > 0;
  return (shares){.host = helps ? least_at(&here, seconds_of_host) : 0, .again = again};
}

static double seconds_of_again(const search *s, double again) {
  return bound_with(s->spec, s->work, with_best_host(s, again)).seconds;
}

void flap_bound_compute(const flap_bound_spec *spec, flap_bound *bound_out) {
  const flap_machine *machine = spec->machine;
  const step_work work = count_work(spec);
  const search s = {.spec = spec, .work = &work};
  flap_assert((spec->shape.dtype == FLAP_F32 ? machine->flops_f32 : machine->flops_bf16) > 0);
  flap_assert(machine->h2d_bytes > 0 && machine->d2h_bytes > 0);
  *bound_out = bound_with(spec, &work, with_best_host(&s, 0));
  if (!spec->needs_no_norm && bound_out->seconds > bound_out->compute_seconds)
    *bound_out = bound_with(spec, &work, with_best_host(&s, least_at(&s, seconds_of_again)));
}
