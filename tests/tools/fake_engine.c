/* An engine that computes nothing, for tests of the command line: every figure is made up, distinct, and known to
 * test_program.py. FLAP_FAKE chooses what goes wrong: "nan" fails in step 3, "slow" takes 50 ms a step, "stuck" never
 * looks at the stop flag, "nosave" leaves no checkpoint, "noknee" has no knee. */
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static bool fake(const char *what) {
  const char *value = getenv("FLAP_FAKE");
  return value && strcmp(value, what) == 0;
}

const char *flap_engine_class_name(flap_region_class klass) {
  static const char *const names[] = {"weights",       "vocabulary",      "states",     "gradients",        "rounded",
                                      "gradient_sums", "vocabulary_sums", "boundaries", "hidden_gradients", "saved",
                                      "cache"};
  _Static_assert(sizeof names / sizeof *names == FLAP_CLASS_COUNT, "a name per class");
  return names[klass];
}

static void fill_machine(flap_machine *machine) {
  memset(machine, 0, sizeof *machine);
  strcpy(machine->name, "a made-up machine");
  machine->flops_bf16 = 50e9;
  machine->flops_f32 = 100e9;
  machine->device_bytes = 10e9;
  machine->h2d_bytes = machine->d2h_bytes = 8e9;
  machine->disk_read_bytes = 2e9;
  machine->disk_write_bytes = 1e9;
  machine->host_bytes = 12e9;
  machine->launch_ns = 1000;
  machine->shared_cores = 2;
  machine->synchronous = true;
}

static void fill_plan(const flap_run_config *config, flap_plan *plan) {
  memset(plan, 0, sizeof *plan);
  plan->parameters = 5000000;
  plan->state_bytes = 60000000;
  plan->optim = config->optim;
  plan->tokens_per_step =
      (uint64_t)config->cutoff_len * config->per_device_train_batch_size * config->gradient_accumulation_steps;
  plan->layers = 12;
  plan->micro_batches = config->gradient_accumulation_steps;
  plan->dtype = flap_run_config_dtype(config);
  plan->gradient_dtype = config->gradient_dtype;
  strcpy(plan->device_name, "a made-up device");
  fill_machine(&plan->machine);
  plan->segment_layers = 2;
  plan->tail_layers = 2;
  plan->saved_layers = 6;
  strcpy(plan->saved_tensors, "attention, lse");
  plan->group_micro_batches = plan->micro_batches;
  plan->page_bytes = 65536;
  plan->transfer_bytes = 1048576;
  plan->slice_bytes = 524288;
  plan->read_buffers = plan->write_buffers = 4;
  for (uint32_t i = 0; i < FLAP_CLASS_COUNT; i++)
    plan->classes[i] =
        (flap_class_plan){.bytes = 1000000 + i, .ram_bytes = 1000, .disk_bytes = 999000 + i, .ring_slots = i};
  plan->vram_budget = 7340032;
  plan->vram_bytes = 7340000;
  plan->vram_min = 5000000;
  plan->ram_budget = 20971520;
  plan->ram_bytes = 20971000;
  plan->ram_min = 4000000;
  plan->disk_budget = plan->disk_sizes[0] = 100000000;
  plan->disk_bytes = 90000000;
  for (uint32_t i = 0; i < FLAP_LANE_COUNT; i++) {
    plan->lane_bytes[i] = 70000000 + i;
    plan->bound_bytes[i] = 60000000 + i;
    plan->bound_lane_seconds[i] = 0.01 * (i + 1);
    plan->lane_seconds[i] = 0.02 * (i + 1);
  }
  plan->compute_seconds = 0.5;
  plan->bound_compute_seconds = 0.45;
  plan->bound_backward_seconds = 0.3;
  plan->bound_seconds = 0.45;
  plan->step_seconds = 0.5;
  plan->tokens_per_second = 4096;
  plan->ssd_step_bytes = 70000003;
  plan->ssd_bytes_per_billion_tokens = 34e12;
  plan->ssd_tbw_bytes = config->ssd_tbw;
  plan->ssd_steps = (double)config->ssd_tbw / 70000003;
}

flap_status flap_engine_plan(const flap_run_config *config, const char *trace_path, flap_plan *plan_out) {
  (void)trace_path;
  if (config->vram.kind == FLAP_SIZE_BYTES && config->vram.bytes < 5000000)
    return flap_error_set(FLAP_BUDGET, "vram: %llu bytes are too few: 5000000 is the least that works",
                          (unsigned long long)config->vram.bytes);
  fill_plan(config, plan_out);
  return FLAP_OK;
}

flap_status flap_engine_knee(const flap_run_config *config, void (*trying)(void *context, uint32_t micro_batches),
                             void *context, flap_knee *knee_out) {
  for (uint32_t tried = 1; trying != NULL && tried <= 32; tried *= 32)
    trying(context, tried);
  *knee_out = (flap_knee){.micro_batches = fake("noknee") ? 0 : 24,
                          .tried_max = 32,
                          .tokens_per_step = (uint64_t)config->cutoff_len * (fake("noknee") ? 32 : 24),
                          .step_seconds = 2,
                          .compute_seconds = 1.95,
                          .tokens_per_second = 5000};
  return FLAP_OK;
}

static flap_status take_step(const flap_run_config *config, const flap_observer *observer, uint64_t step,
                             uint64_t max_steps) {
  flap_step_report report = {
      .step = step,
      .max_steps = max_steps,
      .loss = 5.0 - 0.01 * (double)step,
      .grad_norm = 1.25,
      .learning_rate = config->learning_rate,
      .tokens_per_second = 12345,
      .step_seconds = 0.5,
      .bound_seconds = 0.4,
      .stall_seconds = {[FLAP_LANE_H2D] = 0.0049, [FLAP_LANE_DISK_READ] = 0.035, [FLAP_LANE_HOST] = 0.005},
      .eta_seconds = 61,
      .logged = step % config->logging_steps == 0};
  if (fake("nan") && step == 3)
    return flap_error_set(FLAP_NUMERIC, "step 3: the loss is not finite; the first layer with such values is 7");
  struct timespec left = {.tv_nsec = fake("slow") || fake("stuck") ? 50000000 : 0};
  while (nanosleep(&left, &left) != 0) /* a signal does not shorten a step */
    ;
  observer->stepped(observer->context, &report);
  return FLAP_OK;
}

flap_status flap_engine_train(const flap_run_config *config, const flap_observer *observer,
                              const volatile sig_atomic_t *stop, flap_train_result *result_out) {
  flap_plan plan;
  FLAP_TRY(flap_engine_plan(config, NULL, &plan));
  flap_eval_report eval = {.loss = 5.5, .tokens = 1000, .unigram_entropy = 3.04, .seconds = 0.1};
  observer->planned(observer->context, &plan, "io_uring, O_DIRECT");
  observer->prepared(observer->context, 400000, 10000, 3000, config->resume_from_checkpoint[0] ? 5 : 0);
  observer->evaluated(observer->context, &eval);
  memset(result_out, 0, sizeof *result_out);
  result_out->first_eval = eval;
  uint64_t max_steps = config->max_steps ? config->max_steps : 20;
  for (uint64_t step = 1; step <= max_steps; step++) {
    FLAP_TRY(take_step(config, observer, step, max_steps));
    result_out->steps = step;
    if (*stop && !fake("stuck")) {
      result_out->interrupted = true;
      break;
    }
  }
  eval.loss = 2.25;
  result_out->last_eval = eval;
  result_out->peaks = (flap_peaks){.vram_bytes = 7340000, .ram_bytes = 20971000, .disk_bytes = 90000000};
  memcpy(result_out->steady_lane_bytes, plan.lane_bytes, sizeof plan.lane_bytes);
  result_out->median_step_seconds = fake("fast") ? 0.3 : 0.6;
  result_out->total_seconds = 12;
  result_out->trained_tokens = result_out->steps * 1000;
  if (!fake("nosave") && !(result_out->interrupted && config->save_strategy == FLAP_STRATEGY_NO)) {
    (void)snprintf(result_out->checkpoint, sizeof result_out->checkpoint, "%.200s/checkpoint-%llu", config->output_dir,
                   (unsigned long long)result_out->steps);
    observer->saved(observer->context, result_out->checkpoint, 0.2);
  }
  result_out->exported = !result_out->interrupted;
  return FLAP_OK;
}

flap_status flap_engine_eval(const flap_run_config *config, const flap_observer *observer,
                             flap_eval_report *report_out) {
  (void)config;
  (void)observer;
  *report_out = (flap_eval_report){.loss = 2.25, .tokens = 1000, .unigram_entropy = 3.04, .seconds = 0.1};
  return FLAP_OK;
}

flap_status flap_engine_sample(const flap_run_config *config, const flap_sample_options *options, flap_sample_fn emit,
                               void *context) {
  char text[256];
  int length = snprintf(text, sizeof text, "[%.100s|%.50s|%u|%g]", config->model_name_or_path, options->prompt,
                        options->max_new_tokens, options->temperature);
  return emit(context, text, (uint64_t)length);
}

flap_status flap_engine_export(const char *from_folder, const char *to_folder, flap_dtype dtype,
                               uint64_t max_shard_bytes, const volatile sig_atomic_t *stop) {
  (void)from_folder;
  (void)dtype;
  (void)max_shard_bytes;
  (void)stop;
  return flap_error_set(FLAP_INVALID, "%s: is there already", to_folder);
}

flap_status flap_engine_weights_dtype(const char *folder, flap_dtype *dtype_out) {
  (void)folder;
  *dtype_out = FLAP_BF16;
  return FLAP_OK;
}

flap_status flap_engine_machine(const flap_machine_query *query, flap_machine *machine_out) {
  if (query->device == FLAP_RUN_DEVICE_CUDA)
    return flap_error_set(FLAP_UNSUPPORTED, "device: cuda: this build has no CUDA");
  fill_machine(machine_out);
  return FLAP_OK;
}

bool flap_engine_falls_to_cpu(flap_status status) {
  return status == FLAP_UNSUPPORTED;
}

flap_status flap_engine_profile(flap_run_device device, uint32_t threads, const char *disk_path, bool fresh,
                                flap_machine_profile *profile_out) {
  memset(profile_out, 0, sizeof *profile_out);
  const flap_machine_query query = {.device = device, .threads = threads, .disk_path = disk_path, .fresh = fresh};
  FLAP_TRY(flap_engine_machine(&query, &profile_out->machine));
  profile_out->device = FLAP_RUN_DEVICE_CPU;
  profile_out->threads = 2;
  profile_out->ram_bytes = (uint64_t)8 << 30;
  if (disk_path)
    profile_out->disks[profile_out->disk_count++] =
        (flap_profile_disk){.bytes = 1000000000000, .read_bytes = 2e9, .write_bytes = 1e9, .both_bytes = 1.5e9};
  return FLAP_OK;
}

void flap_machine_profile_rates(const flap_machine_profile *profile, uint32_t disk_count, flap_machine *machine_out) {
  *machine_out = profile->machine;
  machine_out->disk_both_bytes = disk_count > 0 ? profile->disks[0].both_bytes : 0;
}
