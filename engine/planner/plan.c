/* flap_engine_plan, and what a setup looks like to people. */
#include "base/log.h"
#include "base/units.h"
#include "engine/planner/bound.h"
#include "engine/planner/budgets.h"
#include "engine/machine/codec_rates.h"
#include "engine/planner/prepare.h"
#include "engine/planner/pressure.h"
#include "engine/planner/wear.h"
#include "engine/store/checkpoint.h"
#include "engine/store/state_pages.h"
#include "io/formats/trace.h"

#include <stdio.h>
#include <string.h>

#define TRACE_EVENTS (1u << 20)
#define WAITS_FOR_NOTHING 0.95          /* of a step is computing */
#define TRANSFERS_PLANNED_TWICE 200000u /* of a step, at most: steps of more take half a minute to plan */

static void describe_model(const flap_prepared *p, flap_plan *plan) {
  const flap_setup_spec *spec = &p->planner.spec;
  for (uint32_t i = 0; i < p->setup.layout.part_count; i++) {
    const flap_layout_part *part = &p->setup.layout.parts[i];
    plan->state_bytes += part->elements * flap_dtype_bytes(spec->shape.dtype) +
                         flap_layout_state_bytes(&p->setup.layout.state_formats[part->kind], part->elements);
  }
  plan->parameters = flap_model_parameters(&p->model);
  plan->tokens_per_step = (uint64_t)spec->shape.batch * spec->shape.sequence * spec->micro_batches;
  plan->layers = p->model.num_hidden_layers;
  plan->micro_batches = spec->micro_batches;
  plan->dtype = spec->shape.dtype;
  plan->gradient_dtype = spec->gradient_dtype;
  plan->optim = spec->optim;
  plan->device = spec->device;
  (void)snprintf(plan->device_name, sizeof plan->device_name, "%s", p->machine.name);
  plan->machine = p->machine;
}

static void describe_saved(const flap_setup *setup, flap_plan *plan) {
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  const uint32_t mask = setup->choice.saved_mask;
  const uint32_t count = flap_model_saved_tensors(setup->spec.model, &setup->spec.shape, mask, tensors);
  size_t used = 0;
  plan->saved_whole = true;
  for (uint32_t i = 0; i < count; i++) {
    if ((mask >> i & 1) == 0)
      plan->saved_whole = plan->saved_whole && tensors[i].spare;
    else if (used < sizeof plan->saved_tensors)
      used += (size_t)snprintf(plan->saved_tensors + used, sizeof plan->saved_tensors - used, "%s%s",
                               used > 0 ? ", " : "", tensors[i].name);
  }
}

/* As they are cut, though a small part may have none so large. */
static uint64_t largest_slice_bytes(const flap_layout *layout) {
  uint64_t largest = 0;
  for (int kind = 0; kind < FLAP_PART_COUNT && layout->spec.mode == FLAP_MODE_TRAIN; kind++) {
    const uint64_t bytes = flap_layout_state_bytes(&layout->state_formats[kind], layout->slice_elements[kind]);
    largest = bytes > largest ? bytes : largest;
  }
  return largest;
}

static void describe_choices(const flap_setup *setup, flap_plan *plan) {
  const flap_choice *choice = &setup->choice;
  plan->segment_layers = choice->segment_layers;
  plan->tail_layers = setup->layout.spec.tail_layers;
  plan->layerwise = choice->layerwise;
  plan->host_parts = choice->host_parts;
  plan->part_count = setup->layout.part_count;
  plan->group_micro_batches = choice->group_micro_batches;
  if (setup->spec.mode == FLAP_MODE_TRAIN) { /* on average over micro-batches */
    const uint64_t group = choice->group_micro_batches, count = flap_layout_saved_count(&setup->layout.spec);
    plan->saved_layers =
        flap_layout_saves_all(&setup->layout.spec) ? choice->saved_layers : (uint32_t)((count + group - 1) / group);
  }
  if (plan->saved_layers > 0)
    describe_saved(setup, plan);
  plan->saved_resident = plan->saved_layers > 0 && setup->classes[FLAP_CLASS_SAVED].ring_slots == 0;
  plan->sweep = choice->sweep;
  for (uint32_t part = 0; part < plan->part_count && setup->spec.mode == FLAP_MODE_TRAIN; part++)
    plan->backward_parts += flap_layout_in_backward(&setup->layout, part);
  plan->backward_twice = setup->layout.spec.backward_twice;

  plan->page_bytes = choice->page_bytes;
  plan->transfer_bytes = choice->transfer_bytes;
  plan->slice_bytes = largest_slice_bytes(&setup->layout);
  plan->read_buffers = choice->read_buffers;
  plan->write_buffers = choice->write_buffers;
  plan->workers = choice->workers;
  plan->compression = setup->disk_bytes > 0 && flap_pager_worker_bytes(&setup->pager) > 0 ? setup->spec.compression
                                                                                          : FLAP_COMPRESSION_OFF;
  memcpy(plan->classes, setup->classes, sizeof plan->classes);
}

static void describe_sizes(const flap_prepared *p, flap_plan *plan) {
  const flap_setup *setup = &p->setup;
  plan->vram_budget = p->budgets.vram_bytes;
  plan->ram_budget = p->budgets.ram_bytes;
  plan->disk_budget = flap_budgets_disk(&p->planner, &p->budgets);
  for (uint32_t i = 0; i < p->planner.spec.disk_count; i++)
    plan->disk_sizes[i] = p->budgets.disk_bytes[i];
  plan->vram_bytes = setup->vram_bytes;
  plan->ram_bytes = setup->ram_bytes;
  plan->disk_bytes = setup->disk_bytes;
  plan->vram_pager_bytes = setup->sizes.vram_bytes;
  plan->vram_scratch_bytes = setup->vram_scratch_bytes;
  plan->ram_home_bytes = setup->sizes.ram_home_bytes;
  plan->ram_shared_bytes = 0;
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    plan->ram_shared_bytes += setup->classes[k].ram_bytes;
  plan->ram_shared_bytes -= setup->sizes.ram_home_bytes;
  plan->ram_staging_bytes = setup->sizes.staging_bytes;
  plan->ram_pool_bytes = setup->sizes.pool_bytes;
  plan->disk_share = setup->disk_bytes > 0
                         ? flap_codec_disk_share(&plan->machine, &setup->pager, setup->spec.threads, setup->spec.optim)
                         : 1;
  plan->pooled_share = flap_pager_pooled_share(plan->ram_pool_bytes, setup->sizes.disk_bytes);
  plan->ram_table_bytes = setup->sizes.table_bytes;
  plan->ram_other_bytes = setup->ram_other_bytes;
  /* Code, stacks and libraries, as they are now, for nothing of the run is taken yet; a device's may come later. */
  plan->process_bytes = flap_budgets_resident();
  if (plan->machine.process_bytes > plan->process_bytes)
    plan->process_bytes = plan->machine.process_bytes;
}

/* The disks that are used share what is written, so their lives add up. */
static uint64_t tbw_of(const flap_run_config *config) {
  uint64_t bytes = 0;
  if (config->ssd_tbw > 0 || config->profile == NULL)
    return config->ssd_tbw;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    if (config->profile->disks[i].tbw_bytes == 0)
      return 0;
    bytes += config->profile->disks[i].tbw_bytes;
  }
  return bytes;
}

static void describe_wear(const flap_run_config *config, flap_plan *plan) {
  const double written = (double)plan->lane_bytes[FLAP_LANE_DISK_WRITE] * (1 - plan->pooled_share);
  plan->ssd_step_bytes = (uint64_t)written;
  plan->ssd_bytes_per_billion_tokens = written / (double)plan->tokens_per_step * 1e9;
  plan->ssd_tbw_bytes = tbw_of(config);
  plan->ssd_steps = written > 0 ? (double)plan->ssd_tbw_bytes / written : 0;
}

static void describe_costs(const flap_prepared *p, flap_plan *plan) {
  const flap_setup_spec *spec = &p->planner.spec;
  const flap_bound_spec bound_spec = {.model = &p->model,
                                      .shape = spec->shape,
                                      .micro_batches = spec->micro_batches,
                                      .gradient_dtype = spec->gradient_dtype,
                                      .optim = spec->optim,
                                      .needs_no_norm = spec->needs_no_norm,
                                      .vram_bytes = p->budgets.vram_bytes,
                                      .ram_bytes = p->budgets.ram_bytes,
                                      .machine = &p->machine};
  flap_bound bound;
  flap_bound_compute(&bound_spec, &bound);
  memcpy(plan->lane_bytes, p->costs.lane_bytes, sizeof plan->lane_bytes);
  memcpy(plan->lane_seconds, p->costs.lane_seconds, sizeof plan->lane_seconds);
  plan->compute_seconds = p->costs.compute_seconds;
  plan->step_seconds = p->costs.step_seconds;
  plan->tokens_per_second = plan->step_seconds > 0 ? (double)plan->tokens_per_step / plan->step_seconds : 0;
  plan->bound_seconds = bound.seconds;
  plan->bound_compute_seconds = bound.compute_seconds;
  plan->bound_backward_seconds = bound.backward_seconds;
  plan->bound_copies_seconds = bound.copies_seconds;
  plan->bound_disks_seconds = bound.disks_seconds;
  plan->bound_update_seconds = bound.update_seconds;
  memcpy(plan->bound_bytes, bound.lane_bytes, sizeof plan->bound_bytes);
  memcpy(plan->bound_lane_seconds, bound.lane_seconds, sizeof plan->bound_lane_seconds);
}

/* The one disk that the run has; NULL where it has several, or none. */
static const char *only_disk(const flap_prepared *p) {
  const char *path = NULL;
  for (uint32_t i = 0; i < p->planner.spec.disk_count; i++) {
    if (p->budgets.disk_bytes[i] < p->setup.choice.transfer_bytes)
      continue;
    if (path != NULL)
      return NULL;
    path = p->planner.spec.disk_paths[i];
  }
  return path;
}

/* Shared or copied, states have about as many bytes; there is room for the more. What a pool may hold is not shared. */
static flap_status describe_checkpoint(const flap_prepared *p, flap_plan *plan) {
  const char *disk = only_disk(p);
  uint64_t model_bytes = 0;
  FLAP_TRY(
      flap_checkpoint_bytes(&p->model, plan->dtype, plan->optim, p->config->save_only_model, &plan->checkpoint_bytes));
  if (plan->classes[FLAP_CLASS_STATES].disk_bytes == 0 || plan->ram_pool_bytes > 0 || disk == NULL ||
      !flap_wear_shares(p->config, disk))
    return FLAP_OK;
  FLAP_TRY(flap_checkpoint_bytes(&p->model, plan->dtype, plan->optim, true, &model_bytes));
  const uint64_t paged = model_bytes + flap_state_pages_bytes(&p->setup.layout, plan->page_bytes);
  plan->checkpoint_shared_bytes = plan->classes[FLAP_CLASS_STATES].disk_bytes;
  if (paged > plan->checkpoint_bytes)
    plan->checkpoint_bytes = paged;
  return FLAP_OK;
}

flap_status flap_plan_describe(const flap_prepared *p, flap_plan *plan) {
  memset(plan, 0, sizeof *plan);
  describe_model(p, plan);
  describe_choices(&p->setup, plan);
  describe_sizes(p, plan);
  describe_costs(p, plan);
  describe_wear(p->config, plan);
  if (p->planner.spec.mode != FLAP_MODE_TRAIN)
    return FLAP_OK;
  if (p->config->save_strategy != FLAP_STRATEGY_NO)
    FLAP_TRY(describe_checkpoint(p, plan));
  plan->checkpoints_at_once = flap_wear_checkpoints_at_once(p->config, 0, 0);
  if (p->config->export_final)
    FLAP_TRY(flap_checkpoint_export_bytes(&p->model, plan->dtype, &plan->export_bytes));
  return FLAP_OK;
}

/* Only for `flap plan`: a run does not need them. */
static flap_status find_least(const flap_prepared *p, flap_plan *plan) {
  FLAP_TRY(flap_planner_vram_min(&p->planner, &p->budgets, &plan->vram_min));
  if (p->planner.spec.disk_count == 0)
    return flap_planner_ram_min(&p->planner, &p->budgets, &plan->ram_min);
  return flap_planner_ram_and_disk_min(&p->planner, &p->budgets, &plan->ram_min, &plan->disk_min);
}

static uint64_t smaller(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* The search tries few skeletons, and the given budgets work too. What a plan takes of them may not: a placement may
 * leave what it could not have been made without. */
static flap_status describe_least(const flap_prepared *p, flap_plan *plan) {
  FLAP_TRY(find_least(p, plan));
  plan->vram_min = smaller(plan->vram_min, p->budgets.vram_bytes);
  plan->ram_min = smaller(plan->ram_min, p->budgets.ram_bytes);
  plan->disk_min = smaller(plan->disk_min, flap_budgets_disk(&p->planner, &p->budgets));
  return FLAP_OK;
}

/* What a run would be refused for. */
static void warn_of(flap_status status) {
  if (status == FLAP_OK)
    return;
  flap_log(FLAP_LOG_WARNING, "%s", flap_error_message());
  flap_error_clear();
}

static flap_status write_trace(flap_prepared *p, const char *path) {
  flap_arena arena;
  FLAP_TRY(flap_arena_open(&arena, "trace", flap_trace_measure(TRACE_EVENTS)));
  flap_trace *trace = flap_trace_open(&arena, TRACE_EVENTS);
  flap_status status = flap_planner_trace(&p->planner, &p->budgets, &p->setup, trace);
  if (status == FLAP_OK)
    status = flap_trace_write(trace, path);
  if (status == FLAP_OK && flap_trace_dropped(trace) > 0)
    flap_log(FLAP_LOG_WARNING, "%s: a step has more events than a trace holds: %llu of them are missing", path,
             (unsigned long long)flap_trace_dropped(trace));
  flap_arena_close(&arena);
  return status;
}

/* Clipping holds back all updates until the norm is known, which costs nothing where a step computes all the time what
 * it would without, too. */
static void plan_without_clipping(const flap_run_config *config, flap_plan *plan) {
  flap_run_config other = *config;
  flap_prepared prepared;
  uint64_t transfers = 0;
  other.max_grad_norm = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    transfers += plan->lane_bytes[lane] / plan->transfer_bytes;
  if (!flap_run_config_needs_norm(config) || flap_run_config_needs_norm(&other) ||
      flap_run_config_update(&config->expert) != FLAP_UPDATE_AUTO ||
      (!plan->backward_twice && plan->compute_seconds > WAITS_FOR_NOTHING * plan->step_seconds) ||
      transfers > TRANSFERS_PLANNED_TWICE)
    return;
  flap_status status = flap_prepare_open(&other, true, &prepared);
  if (status == FLAP_OK) {
    status = flap_prepare_plan(&prepared, FLAP_MODE_TRAIN, config->per_device_train_batch_size, config->cutoff_len,
                               config->gradient_accumulation_steps, 0);
    if (status == FLAP_OK)
      plan->unclipped_step_seconds = prepared.plan.step_seconds;
    flap_prepare_close(&prepared);
  }
  if (status != FLAP_OK)
    flap_error_clear();
}

flap_status flap_engine_plan(const flap_run_config *config, const char *trace_path, flap_plan *plan_out) {
  flap_prepared prepared;
  FLAP_TRY(flap_prepare_open(config, false, &prepared));
  flap_status status = flap_prepare_plan(&prepared, FLAP_MODE_TRAIN, config->per_device_train_batch_size,
                                         config->cutoff_len, config->gradient_accumulation_steps, 0);
  if (status == FLAP_OK) {
    warn_of(flap_pressure_check_here(&prepared));
    warn_of(flap_pressure_check_disks(&prepared));
    flap_pressure_warn_of_buffers(&prepared);
    if (config->max_steps > 0) /* else the data say, which are not read */
      flap_wear_describe(config, &(flap_wear_run){.end = config->max_steps}, &prepared.plan);
    warn_of(flap_wear_check(config, &prepared.plan));
    warn_of(flap_wear_check_space(config, &prepared.plan));
  }
  if (status == FLAP_OK)
    status = describe_least(&prepared, &prepared.plan);
  if (status == FLAP_OK && trace_path != NULL)
    status = write_trace(&prepared, trace_path);
  *plan_out = prepared.plan;
  flap_prepare_close(&prepared);
  if (status == FLAP_OK)
    plan_without_clipping(config, plan_out);
  return status;
}
