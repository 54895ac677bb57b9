#include "engine/run_config.h"

#include "base/pool.h"
#include "base/units.h"
#include "engine/step/loss_scale.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define POOL_BYTES_MAX ((uint64_t)16 << 40)
#define SLICE_BYTES_MAX (64 * FLAP_MIB)
#define PAGE_BYTES_MIN (4 * FLAP_KIB)
#define PAGE_BYTES_MAX (4 * FLAP_MIB)
#define WEIGHT_MAX 1e6 /* of a disk */
#define TOKENS_MAX ((uint64_t)1 << 40)
#define EPOCHS_MAX 1e9
#define RATE_MAX 1e6 /* a learning rate, or a decay */
#define EPSILON_MIN 1e-30
#define EPSILON_MAX 1e6
#define NORM_MAX 1e30
#define MINUTES_MAX 1e9

const char *flap_run_config_saved(flap_run_saved saved) {
  static const char *const names[] = {[FLAP_RUN_SAVED_AUTO] = NULL,
                                      [FLAP_RUN_SAVED_ATTENTION] = "attention",
                                      [FLAP_RUN_SAVED_ALL_BUT_MLP] = "all_but_mlp",
                                      [FLAP_RUN_SAVED_ALL] = "all",
                                      [FLAP_RUN_SAVED_EVERYTHING] = "everything"};
  return names[saved];
}

void flap_run_config_defaults(flap_run_config *config) {
  memset(config, 0, sizeof *config);
  config->cutoff_len = 2048;

  /* Where Hugging Face's TrainingArguments have a default, it is this one, but for two: logging_steps, since people
   * who watch a run want to see something before step 500, and bf16, which every card here has. */
  config->per_device_train_batch_size = 8;
  config->gradient_accumulation_steps = 1;
  config->num_train_epochs = 3.0;
  config->learning_rate = 5e-5;
  config->lr_scheduler_type = FLAP_SCHEDULER_LINEAR;
  config->adam_beta1 = 0.9;
  config->adam_beta2 = 0.999;
  config->adam_epsilon = 1e-8;
  config->max_grad_norm = 1.0;
  config->bf16 = true;
  config->fp16_init_scale = 65536; /* this and the interval are torch.amp.GradScaler's */
  config->fp16_min_scale = 1;
  config->fp16_growth_interval = 2000;
  config->gradient_dtype = FLAP_BF16;
  config->activations = FLAP_ACTIVATIONS_AUTO;
  config->seed = 42;

  config->logging_steps = 10;
  config->save_strategy = FLAP_STRATEGY_STEPS;
  config->save_steps = 500;
  config->export_final = true;

  config->device = FLAP_RUN_DEVICE_AUTO;
  config->vram.kind = FLAP_SIZE_MAX;
  config->ram.kind = FLAP_SIZE_MAX;
  config->compression = FLAP_COMPRESSION_AUTO;
}

static bool between(double value, double low, double high) {
  return value >= low && value <= high;
} /* false for NaN */

static flap_status check_data(const flap_run_config *config) {
  if (config->model && config->model_name_or_path[0])
    return flap_error_set(FLAP_INVALID,
                          "model_name_or_path: contradicts model: give the one to train further, or the other to "
                          "train from scratch");
  if (!config->model && !config->model_name_or_path[0])
    return flap_error_set(FLAP_INVALID, "model: missing: give a mapping of config.json keys to train from scratch, "
                                        "or model_name_or_path with a Hugging Face folder");
  if (!between(config->val_size, 0, 1e15))
    return flap_error_set(FLAP_INVALID, "val_size: %g is neither a share below 1 nor a number of sequences",
                          config->val_size);
  if (config->val_size >= 1 && config->val_size != floor(config->val_size))
    return flap_error_set(FLAP_INVALID, "val_size: %g must be a whole number of sequences, or a share below 1",
                          config->val_size);
  if (config->cutoff_len < 1 || config->cutoff_len > 1u << 24)
    return flap_error_set(FLAP_INVALID, "cutoff_len: %u tokens must be between 1 and %u", config->cutoff_len, 1u << 24);
  return FLAP_OK;
}

/* Positions of a micro-batch are counted with 31 bits, sequences of a step with 32. */
static flap_status check_counts(const flap_run_config *config) {
  const uint64_t batch = config->per_device_train_batch_size;
  if (batch * config->cutoff_len > INT32_MAX)
    return flap_error_set(FLAP_INVALID,
                          "per_device_train_batch_size: %u sequences of %u tokens (cutoff_len) are more than the %d "
                          "tokens that a micro-batch can have: give fewer, and more gradient_accumulation_steps",
                          config->per_device_train_batch_size, config->cutoff_len, INT32_MAX);
  if (batch * config->gradient_accumulation_steps > UINT32_MAX)
    return flap_error_set(FLAP_INVALID,
                          "gradient_accumulation_steps: %u micro-batches of %u sequences "
                          "(per_device_train_batch_size) are more than the %u sequences that a step can have",
                          config->gradient_accumulation_steps, config->per_device_train_batch_size, UINT32_MAX);
  return FLAP_OK;
}

static flap_status check_steps(const flap_run_config *config) {
  if (config->per_device_train_batch_size < 1)
    return flap_error_set(FLAP_INVALID, "per_device_train_batch_size: must be at least 1");
  if (config->gradient_accumulation_steps < 1)
    return flap_error_set(FLAP_INVALID, "gradient_accumulation_steps: must be at least 1");
  uint64_t tokens = 0;
  if (!flap_units_mul(config->per_device_train_batch_size, config->cutoff_len, &tokens) ||
      !flap_units_mul(tokens, config->gradient_accumulation_steps, &tokens) || tokens > TOKENS_MAX)
    return flap_error_set(FLAP_INVALID,
                          "gradient_accumulation_steps: %u micro-batches of %u sequences of %u tokens are more than "
                          "2^40 tokens a step",
                          config->gradient_accumulation_steps, config->per_device_train_batch_size, config->cutoff_len);
  FLAP_TRY(check_counts(config));
  if (config->max_steps == 0 && !(config->num_train_epochs > 0 && config->num_train_epochs <= EPOCHS_MAX))
    return flap_error_set(FLAP_INVALID,
                          "num_train_epochs: %g must be above 0 and at most %g when max_steps is not given",
                          config->num_train_epochs, EPOCHS_MAX);
  return FLAP_OK;
}

static flap_status check_loss_scale(const flap_run_config *config) {
  static const char power[] = "must be a power of two between 2^-24 and 2^60";
  if (!flap_loss_scale_valid(config->fp16_init_scale))
    return flap_error_set(FLAP_INVALID, "fp16_init_scale: %g %s", config->fp16_init_scale, power);
  if (!flap_loss_scale_valid(config->fp16_min_scale))
    return flap_error_set(FLAP_INVALID, "fp16_min_scale: %g %s", config->fp16_min_scale, power);
  if (config->fp16_min_scale > config->fp16_init_scale)
    return flap_error_set(FLAP_INVALID, "fp16_min_scale: %g is more than fp16_init_scale, %g", config->fp16_min_scale,
                          config->fp16_init_scale);
  if (config->fp16_growth_interval < 1)
    return flap_error_set(FLAP_INVALID, "fp16_growth_interval: must be at least 1");
  return FLAP_OK;
}

static flap_status check_optimizer(const flap_run_config *config) {
  if (!between(config->learning_rate, 0, RATE_MAX))
    return flap_error_set(FLAP_INVALID, "learning_rate: %g must be between 0 and %g", config->learning_rate, RATE_MAX);
  if (!between(config->warmup_ratio, 0, 1))
    return flap_error_set(FLAP_INVALID, "warmup_ratio: %g must be between 0 and 1", config->warmup_ratio);
  if (!between(config->weight_decay, 0, RATE_MAX))
    return flap_error_set(FLAP_INVALID, "weight_decay: %g must be between 0 and %g", config->weight_decay, RATE_MAX);
  if (!(config->adam_beta1 >= 0 && config->adam_beta1 < 1))
    return flap_error_set(FLAP_INVALID, "adam_beta1: %g must be at least 0 and below 1", config->adam_beta1);
  if (!(config->adam_beta2 >= 0 && config->adam_beta2 < 1))
    return flap_error_set(FLAP_INVALID, "adam_beta2: %g must be at least 0 and below 1", config->adam_beta2);
  if (!between(config->adam_epsilon, EPSILON_MIN, EPSILON_MAX))
    return flap_error_set(FLAP_INVALID, "adam_epsilon: %g must be between %g and %g", config->adam_epsilon, EPSILON_MIN,
                          EPSILON_MAX);
  if (!between(config->max_grad_norm, 0, NORM_MAX))
    return flap_error_set(FLAP_INVALID, "max_grad_norm: %g must be between 0 (no clipping) and %g",
                          config->max_grad_norm, NORM_MAX);
  if (config->bf16 && config->fp16)
    return flap_error_set(FLAP_INVALID, "fp16: contradicts bf16: at most one of them can be true");
  FLAP_TRY(check_loss_scale(config));
  if (config->gradient_dtype != FLAP_BF16 && config->gradient_dtype != FLAP_F32)
    return flap_error_set(FLAP_INVALID, "gradient_dtype: must be bf16 or fp32");
  return FLAP_OK;
}

static flap_status check_saving(const flap_run_config *config) {
  if (config->logging_steps < 1)
    return flap_error_set(FLAP_INVALID, "logging_steps: must be at least 1");
  if (config->overwrite_output_dir && strcmp(config->resume_from_checkpoint, "auto") == 0)
    return flap_error_set(FLAP_INVALID, "overwrite_output_dir: contradicts resume_from_checkpoint: auto, which deletes "
                                        "no checkpoint and no model: give one of them");
  if (config->eval_steps > 0 && config->val_size == 0)
    return flap_error_set(FLAP_INVALID, "eval_steps: nothing is held out to evaluate on: set val_size");
  if (config->save_strategy == FLAP_STRATEGY_STEPS && config->save_steps < 1)
    return flap_error_set(FLAP_INVALID, "save_steps: must be at least 1 (save_strategy: no turns saving off)");
  if (!between(config->save_minutes, 0, MINUTES_MAX))
    return flap_error_set(FLAP_INVALID, "save_minutes: %g must be between 0 (never) and %g", config->save_minutes,
                          MINUTES_MAX);
  if (config->save_minutes > 0 && config->save_strategy == FLAP_STRATEGY_NO)
    return flap_error_set(FLAP_INVALID, "save_minutes: contradicts save_strategy: no, which saves nothing");
  if (!config->output_dir[0])
    return flap_error_set(FLAP_INVALID, "output_dir: missing: name the folder for checkpoints, metrics and the "
                                        "trained model");
  return FLAP_OK;
}

static flap_status check_size(const char *key, flap_size size) {
  if (size.kind == FLAP_SIZE_BYTES && size.bytes == 0)
    return flap_error_set(FLAP_INVALID, "%s: must be more than 0 bytes, or max, or min", key);
  return FLAP_OK;
}

bool flap_run_config_needs_norm(const flap_run_config *config) {
  return config->max_grad_norm > 0 || config->fp16;
}

flap_update_when flap_run_config_update(const flap_expert *expert) {
  static const flap_update_when same[] = {
      [FLAP_CLIP_AUTO] = FLAP_UPDATE_AUTO, [FLAP_CLIP_FOLD] = FLAP_UPDATE_FOLD, [FLAP_CLIP_SWEEP] = FLAP_UPDATE_SWEEP};
  return expert->update != FLAP_UPDATE_AUTO ? expert->update : same[expert->clip];
}

static flap_status check_update(const flap_run_config *config) {
  const flap_expert *expert = &config->expert;
  flap_expert clip_alone = *expert;
  clip_alone.update = FLAP_UPDATE_AUTO;
  const flap_update_when clip = flap_run_config_update(&clip_alone);
  if (clip != FLAP_UPDATE_AUTO && expert->update != FLAP_UPDATE_AUTO && clip != expert->update)
    return flap_error_set(FLAP_INVALID,
                          "expert.clip: contradicts expert.update, which is about the same: leave it out");
  return FLAP_OK;
}

static flap_status check_machine(const flap_run_config *config) {
  FLAP_TRY(check_size("vram", config->vram));
  FLAP_TRY(check_size("ram", config->ram));
  for (uint32_t i = 0; i < config->disk_count; i++) {
    if (!config->disk[i].path[0])
      return flap_error_set(FLAP_INVALID, "disk: entry %u has no path: name an existing folder", i + 1);
    FLAP_TRY(check_size("disk", config->disk[i].size));
    if (!between(config->disk[i].weight, 0, WEIGHT_MAX))
      return flap_error_set(FLAP_INVALID, "disk: %s: a weight of %g must be above 0 and at most %g",
                            config->disk[i].path, config->disk[i].weight, WEIGHT_MAX);
    if ((config->disk[i].weight > 0) != (config->disk[0].weight > 0))
      return flap_error_set(
          FLAP_INVALID, "disk: %s has a weight and %s has none: give all of them one, or leave it to measurement",
          config->disk[config->disk[i].weight > 0 ? i : 0].path, config->disk[config->disk[i].weight > 0 ? 0 : i].path);
    for (uint32_t j = 0; j < i; j++)
      if (strcmp(config->disk[i].path, config->disk[j].path) == 0)
        return flap_error_set(FLAP_INVALID, "disk: %s is given twice", config->disk[i].path);
  }
  if (!between(config->ssd_budget_share, 0, 1))
    return flap_error_set(FLAP_INVALID, "ssd_budget: %g%% is not between 0 and 100%%", 100 * config->ssd_budget_share);
  const flap_expert *expert = &config->expert;
  if (expert->page_bytes != 0 && (expert->page_bytes < PAGE_BYTES_MIN || expert->page_bytes > PAGE_BYTES_MAX ||
                                  (expert->page_bytes & (expert->page_bytes - 1)) != 0))
    return flap_error_set(FLAP_INVALID, "expert.page_bytes: %llu must be a power of two between 4 KiB and 4 MiB",
                          (unsigned long long)expert->page_bytes);
  if (expert->slice_bytes > SLICE_BYTES_MAX || (expert->slice_bytes != 0 && expert->slice_bytes < PAGE_BYTES_MIN))
    return flap_error_set(FLAP_INVALID, "expert.slice_bytes: %llu must be between 4 KiB and 64 MiB",
                          (unsigned long long)expert->slice_bytes);
  if (expert->staging_bytes != 0 && expert->staging_bytes < 2 * PAGE_BYTES_MIN)
    return flap_error_set(FLAP_INVALID, "expert.staging_bytes: %llu must be at least 8 KiB",
                          (unsigned long long)expert->staging_bytes);
  if (expert->pool_bytes > POOL_BYTES_MAX)
    return flap_error_set(FLAP_INVALID, "expert.pool_bytes: %llu must be at most 16 TiB",
                          (unsigned long long)expert->pool_bytes);
  if (expert->group_micro_batches > config->gradient_accumulation_steps)
    return flap_error_set(FLAP_INVALID, "expert.group_micro_batches: %u is more than the %u micro-batches of a step",
                          expert->group_micro_batches, config->gradient_accumulation_steps);
  if (expert->saved != FLAP_RUN_SAVED_AUTO && config->activations == FLAP_ACTIVATIONS_RECOMPUTE)
    return flap_error_set(FLAP_INVALID,
                          "expert.saved: %s contradicts recomputing all activations (activations, "
                          "gradient_checkpointing): leave one of them out",
                          flap_run_config_saved(expert->saved));
  if (expert->threads > FLAP_POOL_THREADS_MAX)
    return flap_error_set(FLAP_INVALID, "expert.threads: %u is more than %d", expert->threads, FLAP_POOL_THREADS_MAX);
  return FLAP_OK;
}

flap_status flap_run_config_check(const flap_run_config *config) {
  FLAP_TRY(check_data(config));
  FLAP_TRY(check_steps(config));
  FLAP_TRY(check_optimizer(config));
  FLAP_TRY(check_saving(config));
  FLAP_TRY(check_update(config));
  return check_machine(config);
}

void flap_run_config_close(flap_run_config *config) {
  json_decref(config->model);
  free(config->profile);
  for (uint32_t i = 0; i < config->dataset_count; i++)
    free(config->dataset[i]);
  memset(config, 0, sizeof *config);
}

const char *flap_run_config_optim_name(flap_optim optim) {
  return optim == FLAP_OPTIM_ADAMW_8BIT ? "adamw_8bit" : "adamw";
}

flap_dtype flap_run_config_dtype(const flap_run_config *config) {
  return config->bf16 ? FLAP_BF16 : config->fp16 ? FLAP_F16 : FLAP_F32;
}
