#include "tools/print_plan.h"

#include "io/formats/json_file.h"
#include "tools/text.h"

#include <jansson.h>

#define CLIPPING_TOLD_BELOW 0.97

/* ---- the table ------------------------------------------------------------------------------------------- */

static const char *device_kind_name(flap_device_kind kind) {
  return kind == FLAP_DEVICE_CUDA ? "cuda" : kind == FLAP_DEVICE_SIM ? "sim" : "cpu";
}

const char *flap_print_bound_lane(const flap_plan *plan) {
  const char *name = "compute";
  double longest = plan->bound_compute_seconds;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    if (plan->bound_lane_seconds[lane] > longest) {
      longest = plan->bound_lane_seconds[lane];
      name = flap_pager_lane_name((flap_lane)lane);
    }
  if (plan->bound_copies_seconds > longest) {
    longest = plan->bound_copies_seconds;
    name = "h2d and d2h together";
  }
  if (plan->bound_disks_seconds > longest) {
    longest = plan->bound_disks_seconds;
    name = "disk_read and disk_write together";
  }
  if (plan->bound_update_seconds > 0 && plan->bound_update_seconds + plan->bound_backward_seconds > longest) {
    longest = plan->bound_update_seconds + plan->bound_backward_seconds;
    name = "updates behind the norm, then the backward";
  }
  /* On lanes that share cores the bound is more than each of them: the cores themselves are what is busy. */
  return plan->bound_seconds > longest * 1.0001 ? "the cores that all lanes share" : name;
}

static void print_model(FILE *out, const flap_plan *plan) {
  fprintf(out, "model     %s parameters, %u layers, %s, state %s%s\n", flap_text_count(plan->parameters).text,
          plan->layers, flap_dtype_name(plan->dtype), flap_text_bytes(plan->state_bytes).text,
          plan->optim == FLAP_OPTIM_ADAMW_8BIT ? " (8-bit moments, the embedding's in fp32)" : "");
  fprintf(out, "step      %s tokens in %u micro-batches, gradients in %s\n",
          flap_text_grouped(plan->tokens_per_step).text, plan->micro_batches, flap_dtype_name(plan->gradient_dtype));
  fprintf(out, "device    %s (%s)\n", device_kind_name(plan->device), plan->device_name);
}

static void print_budget(FILE *out, const char *tier, uint64_t budget, uint64_t used, uint64_t least) {
  fprintf(out, "%-9s%12s%12s%18s", tier, flap_text_bytes(budget).text, flap_text_bytes(used).text,
          flap_text_bytes(least).text);
}

static void print_budgets(FILE *out, const flap_run_config *config, const flap_plan *plan) {
  fprintf(out, "\n%-9s%12s%12s%18s\n", "tier", "budget", "used", "also works with");
  print_budget(out, "vram", plan->vram_budget, plan->vram_bytes, plan->vram_min);
  fprintf(out, "   regions %s, workspaces %s\n", flap_text_bytes(plan->vram_pager_bytes).text,
          flap_text_bytes(plan->vram_scratch_bytes).text);
  print_budget(out, "ram", plan->ram_budget, plan->ram_bytes, plan->ram_min);
  fprintf(out, "   pages %s, staging %s,\n", flap_text_bytes(plan->ram_home_bytes).text,
          flap_text_bytes(plan->ram_staging_bytes).text);
  if (plan->ram_pool_bytes > 0)
    fprintf(out, "%51s   pool of compressed pages %s,\n", "", flap_text_bytes(plan->ram_pool_bytes).text);
  fprintf(out, "%51s   page table %s, other %s\n", "", flap_text_bytes(plan->ram_table_bytes).text,
          flap_text_bytes(plan->ram_other_bytes).text);
  print_budget(out, "disk", plan->disk_budget, plan->disk_bytes, plan->disk_min);
  fputc('\n', out);
  for (uint32_t i = 0; i < config->disk_count; i++)
    fprintf(out, "%21s   in %s\n", flap_text_bytes(plan->disk_sizes[i]).text, config->disk[i].path);
  fprintf(out, "%-9s%24s%18s   code, stacks, libraries: beside the budgets\n", "process",
          flap_text_bytes(plan->process_bytes).text, "");
}

const char *flap_print_compression(flap_compression compression) {
  static const char *const names[] = {[FLAP_COMPRESSION_OFF] = "off",
                                      [FLAP_COMPRESSION_AUTO] = "auto",
                                      [FLAP_COMPRESSION_LZ4] = "lz4",
                                      [FLAP_COMPRESSION_ZSTD] = "zstd"};
  return names[compression];
}

static void print_choices(FILE *out, const flap_plan *plan) {
  fprintf(out, "\nsegments of %u layers, a tail of %u, groups of %u of %u micro-batches\n", plan->segment_layers,
          plan->tail_layers, plan->group_micro_batches, plan->micro_batches);
  if (plan->saved_layers == 0)
    fprintf(out, "activations recomputed%s", plan->layerwise ? ", layer by layer" : "");
  else
    fprintf(out, "activations of %u layers %s", plan->saved_layers, plan->saved_resident ? "kept" : "offloaded");
  if (plan->saved_layers > 0 && plan->layerwise)
    fputs(",\n   those of the others recomputed, layer by layer", out);
  if (plan->saved_layers > 0 && !plan->saved_whole)
    fprintf(out, ",\n   of which %s; the others are recomputed", plan->saved_tensors);
  fputc('\n', out);
  const char *late = plan->sweep ? "in a sweep after the backward" : "folded into the next forward";
  const char *early = plan->backward_twice ? "in a second backward" : "in the backward";
  if (plan->backward_twice)
    fputs("the first backward of a step is for the norm of its gradients alone, which are computed again, not stored\n",
          out);
  if (plan->backward_parts > 0 && plan->backward_parts < plan->part_count)
    fprintf(out, "update of %u of %u parts %s, of the others %s", plan->backward_parts, plan->part_count, early, late);
  else
    fprintf(out, "update %s", plan->backward_parts > 0 ? early : late);
  if (plan->host_parts > 0)
    fprintf(out, ", of %u of %u parts by the host's cores", plan->host_parts, plan->part_count);
  fprintf(out, "; %u read and %u write buffers\n", plan->read_buffers, plan->write_buffers);
  if (plan->compression != FLAP_COMPRESSION_OFF) {
    fprintf(out, "compression of pages on disk: %s, by %u thread%s; ", flap_print_compression(plan->compression),
            plan->workers, plan->workers == 1 ? "" : "s");
    if (plan->disk_share < 1)
      fprintf(out, "times are with %.2f of their bytes, all else is without it\n", plan->disk_share);
    else
      fprintf(out, "all figures here are without it\n");
  }
  if (plan->pooled_share > 0)
    fprintf(out,
            "   about %.0f%% of them in a pool of %s of ram instead, if they shrink as states mostly do: the step is\n"
            "   planned with that, while lanes, space and the bound count all of them as if on disk%s\n",
            100 * plan->pooled_share, flap_text_bytes(plan->ram_pool_bytes).text,
            plan->machine.encode_bytes > 0
                ? ""
                : ";\n   how fast the cores compress is not known here, and taken for no time at all");
  fprintf(out, "pages of %s, transfers of %s, optimizer slices of %s\n", flap_text_bytes(plan->page_bytes).text,
          flap_text_bytes(plan->transfer_bytes).text, flap_text_bytes(plan->slice_bytes).text);
}

static void print_classes(FILE *out, const flap_plan *plan) {
  fprintf(out, "\n%-18s%14s%16s%14s%14s%18s\n", "what", "bytes", "stays in vram", "in ram", "on disk", "ring in vram");
  for (int i = 0; i < FLAP_CLASS_COUNT; i++) {
    const flap_class_plan *row = &plan->classes[i];
    if (row->bytes == 0 && row->ring_bytes == 0)
      continue;
    char ring[48] = "-";
    if (row->ring_slots > 0)
      (void)snprintf(ring, sizeof ring, "%u = %s", row->ring_slots, flap_text_bytes(row->ring_bytes).text);
    fprintf(out, "%-18s%14s%16s%14s%14s%18s\n", flap_engine_class_name((flap_region_class)i),
            flap_text_bytes(row->bytes).text, flap_text_bytes(row->resident_bytes).text,
            flap_text_bytes(row->ram_bytes).text, flap_text_bytes(row->disk_bytes).text, ring);
  }
  if (plan->ram_shared_bytes > 0)
    fprintf(out, "shared            %s of ram, where gradients and activations are in turn\n",
            flap_text_bytes(plan->ram_shared_bytes).text);
}

static void print_lanes(FILE *out, const flap_plan *plan) {
  double parameters = (double)plan->parameters;
  fprintf(out, "\n%-12s%14s%15s%12s%15s%16s%12s\n", "lane", "bytes a step", "per parameter", "busy for", "least a step",
          "per parameter", "least time");
  for (int i = 0; i < FLAP_LANE_COUNT; i++)
    fprintf(out, "%-12s%14s%15s%12s%15s%16s%12s\n", flap_pager_lane_name((flap_lane)i),
            flap_text_bytes(plan->lane_bytes[i]).text, flap_text_ratio((double)plan->lane_bytes[i], parameters, 2).text,
            flap_text_seconds(plan->lane_seconds[i]).text, flap_text_bytes(plan->bound_bytes[i]).text,
            flap_text_ratio((double)plan->bound_bytes[i], parameters, 2).text,
            flap_text_seconds(plan->bound_lane_seconds[i]).text);
  fprintf(out, "%-12s%41s%43s\n", "compute", flap_text_seconds(plan->compute_seconds).text,
          flap_text_seconds(plan->bound_compute_seconds).text);
}

/* What the whole run writes, where its steps are known. */
static void print_run_wear(FILE *out, const flap_plan *plan) {
  if (plan->ssd_run_bytes == 0)
    return;
  fprintf(out, "run       %s written in %s steps", flap_text_bytes(plan->ssd_run_bytes).text,
          flap_text_grouped(plan->run_steps).text);
  if (plan->run_checkpoints > 0)
    fprintf(out, ", %s checkpoints of %s", flap_text_grouped(plan->run_checkpoints).text,
            flap_text_bytes(plan->checkpoint_bytes - plan->checkpoint_shared_bytes).text);
  if (plan->export_bytes > 0)
    fprintf(out, ", export %s", flap_text_bytes(plan->export_bytes).text);
  fputc('\n', out);
  if (plan->ssd_tbw_bytes > 0)
    fprintf(out, "          %s of the %.4g TB that the drives bear\n",
            flap_text_share((double)plan->ssd_run_bytes, (double)plan->ssd_tbw_bytes).text,
            (double)plan->ssd_tbw_bytes / 1e12);
  if (plan->ssd_budget_bytes > 0)
    fprintf(
        out, "          %s of ssd_budget, %s%s\n",
        flap_text_share((double)(plan->ssd_before_bytes + plan->ssd_run_bytes), (double)plan->ssd_budget_bytes).text,
        flap_text_bytes(plan->ssd_budget_bytes).text,
        plan->ssd_before_bytes > 0 ? ", with what was written before" : "");
}

/* In TB of 10^12 bytes, as data sheets of drives are. */
static void print_wear(FILE *out, const flap_plan *plan) {
  print_run_wear(out, plan);
  if (plan->ssd_step_bytes == 0)
    return;
  fprintf(out, "ssd       %s written a step, %.4g TB per billion tokens", flap_text_bytes(plan->ssd_step_bytes).text,
          plan->ssd_bytes_per_billion_tokens / 1e12);
  if (plan->ssd_tbw_bytes > 0)
    fprintf(out, "; %.4g TB last %s steps", (double)plan->ssd_tbw_bytes / 1e12,
            flap_text_grouped((uint64_t)plan->ssd_steps).text);
  fputc('\n', out);
}

void flap_print_knee(FILE *out, const flap_knee *knee) {
  if (knee->micro_batches > 0)
    fprintf(out, "knee      compute hides the rest from about %s tokens a step (%u micro-batches), %s tokens/s\n",
            flap_text_grouped(knee->tokens_per_step).text, knee->micro_batches,
            flap_text_rate(knee->tokens_per_second).text);
  else
    fprintf(out, "knee      compute does not hide the rest, up to %s tokens a step (%u micro-batches)\n",
            flap_text_grouped(knee->tokens_per_step).text, knee->tried_max);
}

/* What of a checkpoint is on disk before it is saved. */
static void print_sharing(FILE *out, const flap_plan *plan, const flap_run_config *config) {
  const uint64_t on_disk = plan->checkpoint_bytes > 0 ? plan->classes[FLAP_CLASS_STATES].disk_bytes : 0;
  if (plan->checkpoint_shared_bytes > 0)
    fprintf(out, " (%s of it stay where they are)", flap_text_bytes(plan->checkpoint_shared_bytes).text);
  else if (on_disk > 0 && plan->ram_pool_bytes > 0)
    fprintf(out, " (%s of states on disk and in the pool are copied)", flap_text_bytes(on_disk).text);
  else if (on_disk > 0 && !config->save_only_model && config->expert.checkpoint_states == FLAP_RUN_STATES_AUTO)
    fprintf(out, " (%s of states on disk are copied: with one disk, on output_dir's file system, they would stay)",
            flap_text_bytes(on_disk).text);
}

/* Where a step waits for its updates, and would not have to. */
static void print_clipping(FILE *out, const flap_plan *plan) {
  if (plan->unclipped_step_seconds > 0 && plan->unclipped_step_seconds < CLIPPING_TOLD_BELOW * plan->step_seconds)
    fprintf(out,
            "clipping  updates wait for the norm of all gradients: with max_grad_norm=0, which trains\n"
            "          differently, a step would take %s\n",
            flap_text_seconds(plan->unclipped_step_seconds).text);
}

void flap_print_plan(FILE *out, const flap_run_config *config, const flap_plan *plan) {
  print_model(out, plan);
  print_budgets(out, config, plan);
  print_choices(out, plan);
  print_classes(out, plan);
  print_lanes(out, plan);
  fprintf(out, "\nexpected  %s a step, %s tokens/s: %s of the bound\n", flap_text_seconds(plan->step_seconds).text,
          flap_text_rate(plan->tokens_per_second).text,
          flap_text_percent(plan->bound_seconds, plan->step_seconds).text);
  fprintf(out, "bound     %s a step, set by %s\n", flap_text_seconds(plan->bound_seconds).text,
          flap_print_bound_lane(plan));
  print_clipping(out, plan);
  print_wear(out, plan);
  fprintf(out, "files     %s a checkpoint", flap_text_bytes(plan->checkpoint_bytes).text);
  print_sharing(out, plan, config);
  if (plan->checkpoint_bytes > 0)
    fprintf(out, ", %s at once", flap_text_grouped(plan->checkpoints_at_once).text);
  fprintf(out, ", %s the trained model, in %s\n", flap_text_bytes(plan->export_bytes).text, config->output_dir);
}

/* ---- JSON ------------------------------------------------------------------------------------------------ */

/* JSON's have a sign. */
static void set_integer(json_t *object, const char *key, uint64_t value) {
  (void)json_object_set_new(object, key, json_integer(value < INT64_MAX ? (json_int_t)value : INT64_MAX));
}

static void set_number(json_t *object, const char *key, double value) {
  (void)json_object_set_new(object, key, flap_json_real(value));
}

static void set_text(json_t *object, const char *key, const char *value) {
  (void)json_object_set_new(object, key, json_string(value));
}

static void set_bool(json_t *object, const char *key, bool value) {
  (void)json_object_set_new(object, key, json_boolean(value));
}

static json_t *lanes_integers(const uint64_t *values) {
  json_t *object = json_object();
  for (int i = 0; i < FLAP_LANE_COUNT; i++)
    set_integer(object, flap_pager_lane_name((flap_lane)i), values[i]);
  return object;
}

static json_t *lanes_numbers(const double *values) {
  json_t *object = json_object();
  for (int i = 0; i < FLAP_LANE_COUNT; i++)
    set_number(object, flap_pager_lane_name((flap_lane)i), values[i]);
  return object;
}

static json_t *machine_json(const flap_machine *machine) {
  json_t *object = json_object();
  set_text(object, "name", machine->name);
  set_number(object, "flops_bf16", machine->flops_bf16);
  set_number(object, "flops_f32", machine->flops_f32);
  set_number(object, "device_bytes", machine->device_bytes);
  set_number(object, "h2d_bytes", machine->h2d_bytes);
  set_number(object, "d2h_bytes", machine->d2h_bytes);
  set_number(object, "h2d_both_bytes", machine->h2d_both_bytes);
  set_number(object, "d2h_both_bytes", machine->d2h_both_bytes);
  set_number(object, "disk_read_bytes", machine->disk_read_bytes);
  set_number(object, "disk_write_bytes", machine->disk_write_bytes);
  set_number(object, "disk_both_bytes", machine->disk_both_bytes);
  set_number(object, "host_bytes", machine->host_bytes);
  set_number(object, "encode_bytes", machine->encode_bytes);
  set_number(object, "decode_bytes", machine->decode_bytes);
  set_integer(object, "launch_ns", machine->launch_ns);
  set_integer(object, "copy_ns", machine->copy_ns);
  set_integer(object, "disk_ns", machine->disk_ns);
  set_bool(object, "synchronous", machine->synchronous);
  set_integer(object, "shared_cores", machine->shared_cores);
  set_integer(object, "overhead_bytes", machine->overhead_bytes);
  set_integer(object, "process_bytes", machine->process_bytes);
  return object;
}

json_t *flap_print_profile_json(const flap_machine_profile *profile) {
  json_t *object = machine_json(&profile->machine), *disks = json_array();
  static const char *const per_disk[] = {"disk_read_bytes", "disk_write_bytes", "disk_both_bytes"};
  for (size_t i = 0; i < sizeof per_disk / sizeof per_disk[0]; i++)
    (void)json_object_del(object, per_disk[i]);
  set_text(object, "device", profile->device == FLAP_RUN_DEVICE_CUDA ? "cuda" : "cpu");
  set_integer(object, "threads", profile->threads);
  set_integer(object, "vram_bytes", profile->vram_bytes);
  set_integer(object, "ram_bytes", profile->ram_bytes);
  for (uint32_t i = 0; i < profile->disk_count; i++) {
    const flap_profile_disk *disk = &profile->disks[i];
    json_t *entry = json_object();
    set_integer(entry, "size_bytes", disk->bytes);
    set_number(entry, "read_bytes", disk->read_bytes);
    set_number(entry, "write_bytes", disk->write_bytes);
    set_number(entry, "both_bytes", disk->both_bytes);
    (void)json_array_append_new(disks, entry);
  }
  (void)json_object_set_new(object, "disks", disks);
  return object;
}

static json_t *classes_json(const flap_plan *plan) {
  json_t *object = json_object();
  for (int i = 0; i < FLAP_CLASS_COUNT; i++) {
    const flap_class_plan *row = &plan->classes[i];
    json_t *entry = json_object();
    set_integer(entry, "bytes", row->bytes);
    set_integer(entry, "resident_bytes", row->resident_bytes);
    set_integer(entry, "ram_bytes", row->ram_bytes);
    set_integer(entry, "disk_bytes", row->disk_bytes);
    set_integer(entry, "ring_slots", row->ring_slots);
    set_integer(entry, "ring_bytes", row->ring_bytes);
    (void)json_object_set_new(object, flap_engine_class_name((flap_region_class)i), entry);
  }
  return object;
}

static void add_choices(json_t *object, const flap_plan *plan) {
  set_integer(object, "segment_layers", plan->segment_layers);
  set_bool(object, "layerwise", plan->layerwise);
  set_integer(object, "tail_layers", plan->tail_layers);
  set_integer(object, "host_parts", plan->host_parts);
  set_integer(object, "part_count", plan->part_count);
  set_integer(object, "group_micro_batches", plan->group_micro_batches);
  set_integer(object, "saved_layers", plan->saved_layers);
  set_text(object, "saved_tensors", plan->saved_tensors);
  set_bool(object, "saved_whole", plan->saved_whole);
  set_bool(object, "saved_resident", plan->saved_resident);
  set_bool(object, "sweep", plan->sweep);
  set_integer(object, "backward_parts", plan->backward_parts);
  set_bool(object, "backward_twice", plan->backward_twice);
  set_integer(object, "page_bytes", plan->page_bytes);
  set_integer(object, "transfer_bytes", plan->transfer_bytes);
  set_integer(object, "slice_bytes", plan->slice_bytes);
  set_integer(object, "read_buffers", plan->read_buffers);
  set_integer(object, "write_buffers", plan->write_buffers);
  set_integer(object, "workers", plan->workers);
  set_text(object, "compression", flap_print_compression(plan->compression));
  (void)json_object_set_new(object, "classes", classes_json(plan));
}

static void add_sizes(json_t *object, const flap_run_config *config, const flap_plan *plan) {
  set_integer(object, "vram_budget", plan->vram_budget);
  set_integer(object, "ram_budget", plan->ram_budget);
  set_integer(object, "disk_budget", plan->disk_budget);
  set_integer(object, "vram_bytes", plan->vram_bytes);
  set_integer(object, "ram_bytes", plan->ram_bytes);
  set_integer(object, "disk_bytes", plan->disk_bytes);
  set_integer(object, "vram_pager_bytes", plan->vram_pager_bytes);
  set_integer(object, "vram_scratch_bytes", plan->vram_scratch_bytes);
  set_integer(object, "ram_home_bytes", plan->ram_home_bytes);
  set_integer(object, "ram_shared_bytes", plan->ram_shared_bytes);
  set_integer(object, "ram_staging_bytes", plan->ram_staging_bytes);
  set_integer(object, "ram_pool_bytes", plan->ram_pool_bytes);
  set_number(object, "disk_share", plan->disk_share);
  set_number(object, "pooled_share", plan->pooled_share);
  set_integer(object, "ram_table_bytes", plan->ram_table_bytes);
  set_integer(object, "ram_other_bytes", plan->ram_other_bytes);
  set_integer(object, "process_bytes", plan->process_bytes);
  json_t *sizes = json_array();
  for (uint32_t i = 0; i < config->disk_count; i++)
    (void)json_array_append_new(sizes, json_integer((json_int_t)plan->disk_sizes[i]));
  (void)json_object_set_new(object, "disk_sizes", sizes);
  set_integer(object, "export_bytes", plan->export_bytes);
  set_integer(object, "checkpoint_bytes", plan->checkpoint_bytes);
  set_integer(object, "checkpoint_shared_bytes", plan->checkpoint_shared_bytes);
}

static void add_costs(json_t *object, const flap_plan *plan) {
  (void)json_object_set_new(object, "lane_bytes", lanes_integers(plan->lane_bytes));
  (void)json_object_set_new(object, "lane_seconds", lanes_numbers(plan->lane_seconds));
  set_number(object, "compute_seconds", plan->compute_seconds);
  set_number(object, "step_seconds", plan->step_seconds);
  set_number(object, "bound_seconds", plan->bound_seconds);
  (void)json_object_set_new(object, "bound_bytes", lanes_integers(plan->bound_bytes));
  (void)json_object_set_new(object, "bound_lane_seconds", lanes_numbers(plan->bound_lane_seconds));
  set_number(object, "bound_compute_seconds", plan->bound_compute_seconds);
  set_number(object, "bound_copies_seconds", plan->bound_copies_seconds);
  set_number(object, "bound_disks_seconds", plan->bound_disks_seconds);
  set_number(object, "bound_backward_seconds", plan->bound_backward_seconds);
  set_number(object, "bound_update_seconds", plan->bound_update_seconds);
  set_number(object, "unclipped_step_seconds", plan->unclipped_step_seconds);
  set_number(object, "tokens_per_second", plan->tokens_per_second);
  set_integer(object, "vram_min", plan->vram_min);
  set_integer(object, "ram_min", plan->ram_min);
  set_integer(object, "disk_min", plan->disk_min);
  set_integer(object, "ssd_step_bytes", plan->ssd_step_bytes);
  set_number(object, "ssd_bytes_per_billion_tokens", plan->ssd_bytes_per_billion_tokens);
  set_integer(object, "ssd_tbw_bytes", plan->ssd_tbw_bytes);
  set_number(object, "ssd_steps", plan->ssd_steps);
  set_integer(object, "run_steps", plan->run_steps);
  set_integer(object, "checkpoints_at_once", plan->checkpoints_at_once);
  set_integer(object, "run_checkpoints", plan->run_checkpoints);
  set_integer(object, "ssd_run_bytes", plan->ssd_run_bytes);
  set_integer(object, "ssd_before_bytes", plan->ssd_before_bytes);
  set_integer(object, "ssd_budget_bytes", plan->ssd_budget_bytes);
}

static json_t *knee_json(const flap_knee *knee) {
  json_t *object = json_object();
  set_integer(object, "micro_batches", knee->micro_batches);
  set_integer(object, "tried_max", knee->tried_max);
  set_integer(object, "tokens_per_step", knee->tokens_per_step);
  set_number(object, "step_seconds", knee->step_seconds);
  set_number(object, "compute_seconds", knee->compute_seconds);
  set_number(object, "tokens_per_second", knee->tokens_per_second);
  return object;
}

/* What the optimizer's moments are kept in. */
static json_t *moments_json(flap_optim optim) {
  json_t *object = json_object();
  set_text(object, "embedding", "fp32");
  set_text(object, "other", optim == FLAP_OPTIM_ADAMW_8BIT ? "8-bit" : "fp32");
  return object;
}

flap_status flap_print_plan_json(FILE *out, const flap_run_config *config, const flap_plan *plan,
                                 const flap_knee *knee) {
  json_t *object = json_object();
  set_integer(object, "parameters", plan->parameters);
  set_integer(object, "state_bytes", plan->state_bytes);
  set_integer(object, "tokens_per_step", plan->tokens_per_step);
  set_integer(object, "layers", plan->layers);
  set_integer(object, "micro_batches", plan->micro_batches);
  set_text(object, "dtype", flap_dtype_name(plan->dtype));
  set_text(object, "gradient_dtype", flap_dtype_name(plan->gradient_dtype));
  set_text(object, "optim", flap_run_config_optim_name(plan->optim));
  (void)json_object_set_new(object, "moments", moments_json(plan->optim));
  set_text(object, "device", device_kind_name(plan->device));
  set_text(object, "device_name", plan->device_name);
  (void)json_object_set_new(object, "machine", machine_json(&plan->machine));
  add_choices(object, plan);
  add_sizes(object, config, plan);
  add_costs(object, plan);
  if (knee)
    (void)json_object_set_new(object, "knee", knee_json(knee));
  int failed = json_dumpf(object, out, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
  json_decref(object);
  if (failed || fputc('\n', out) == EOF)
    return flap_error_set(FLAP_IO, "the plan cannot be written as JSON");
  return FLAP_OK;
}
