/* flap_engine_train: what happens before the first step, the loop, and what happens after the last.
 *
 * Bad input is found before anything is written: model, tokenizer, plan and data come first; output_dir is made last,
 * and taken away again if nothing came of it.
 */
#include "engine/train_internal.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/system.h"
#include "base/units.h"
#include "engine/planner/budgets.h"
#include "engine/planner/pressure.h"
#include "engine/planner/wear.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE_BYTES ((uint64_t)1 << 10) /* of metrics.jsonl, upwards */
#define LINES_MORE 64                  /* evaluations */
#define EVAL_KEY_COUNT 4
#define LINE_ROOM_BYTES_MAX ((uint64_t)1 << 20)

static const char *const EVAL_KEYS[EVAL_KEY_COUNT] = {"eval_loss", "eval_tokens", "eval_unigram_entropy",
                                                      "eval_seconds"};

/* ---- output_dir ------------------------------------------------------------------------------------------ */

/* What is read must not be deleted first. */
static flap_status check_stays(const flap_run_config *config, const char *key, const char *path) {
  bool taken = false;
  if (path[0])
    FLAP_TRY(flap_checkpoint_clear_takes(config->output_dir, path, &taken));
  if (!taken)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "overwrite_output_dir: %s is in output_dir, and would be deleted: give another output_dir, or "
                        "take it out of there (%s: %s)",
                        path, key, path);
}

static flap_status check_data_stays(void *context, const char *path) {
  return check_stays(context, "dataset", path);
}

static flap_status check_inputs_stay(const flap_run_config *config) {
  FLAP_TRY(check_stays(config, "model_name_or_path", config->model_name_or_path));
  if (strcmp(config->tokenizer, "bytes") != 0)
    FLAP_TRY(check_stays(config, "tokenizer", config->tokenizer));
  return flap_dataset_visit((const char *const *)config->dataset, config->dataset_count, check_data_stays,
                            (void *)(uintptr_t)config);
}

/* Moments of one kind are not made into the other: the run would not be the one that was saved. */
static flap_status find_checkpoint(trainer *t) {
  const flap_run_config *config = t->config;
  FLAP_TRY(flap_checkpoint_find(config->output_dir, config->resume_from_checkpoint, t->resume_folder, &t->state));
  if (!t->resume_folder[0] || t->state.optim == config->optim)
    return FLAP_OK;
  const char *saved = flap_run_config_optim_name(t->state.optim);
  return flap_error_set(FLAP_INVALID,
                        "optim: %s was saved with optim: %s, and cannot go on with %s: set optim: %s, or give it as "
                        "model_name_or_path to start anew from its weights",
                        t->resume_folder, saved, flap_run_config_optim_name(config->optim), saved);
}

/* A folder, or nothing yet. */
static flap_status check_folder(const char *path) {
  struct stat info;
  if (flap_system_stat(path, &info) == 0)
    return S_ISDIR(info.st_mode) ? FLAP_OK : flap_error_set(FLAP_INVALID, "output_dir: %s is not a folder", path);
  if (errno != ENOENT)
    return flap_error_set_os(errno, "output_dir: %s cannot be made or looked at", path);
  if (flap_system_lstat(path, &info) == 0)
    return flap_error_set(FLAP_INVALID, "output_dir: %s is a link to what is not there: make that folder", path);
  return FLAP_OK;
}

static bool is_auto(const flap_run_config *config) {
  return strcmp(config->resume_from_checkpoint, "auto") == 0;
}

/* A run of so many steps has nothing left to do. */
static bool is_complete(const trainer *t, uint64_t steps) {
  return t->finished.steps > 0 && t->finished.steps == steps && (t->finished.has_model || !t->config->export_final);
}

/* A run that came to its end is left as it is, or goes on from its last checkpoint; it never begins anew. */
static flap_status check_finished(trainer *t, uint64_t steps) {
  t->result->complete = is_complete(t, steps);
  if (t->result->complete)
    t->result->steps = steps;
  if (t->finished.steps == 0 || t->result->complete || t->resume_folder[0])
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "output_dir: %s holds a run that ended after %llu steps, without a checkpoint from which this "
                        "one of %llu could go on: name another folder, or set overwrite_output_dir: true and no "
                        "resume_from_checkpoint to start anew",
                        t->config->output_dir, (unsigned long long)t->finished.steps, (unsigned long long)steps);
}

/* The same command for every life of a run: on from the last checkpoint, or anew if there is nothing but what a life
 * leaves that ended before its first one. */
static flap_status choose_start(trainer *t) {
  const flap_run_config *config = t->config;
  char what[FLAP_PATH_MAX];
  FLAP_TRY(flap_finished_read(config->output_dir, &t->finished));
  if (is_complete(t, config->max_steps))
    return check_finished(t, config->max_steps);
  FLAP_TRY(find_checkpoint(t));
  if (t->resume_folder[0])
    return FLAP_OK;
  if (t->finished.steps > 0) /* epochs are steps when the data are known */
    return config->max_steps > 0 ? check_finished(t, config->max_steps) : FLAP_OK;
  FLAP_TRY(flap_checkpoint_occupied(config->output_dir, false, what));
  if (what[0] != '\0')
    return flap_error_set(FLAP_INVALID,
                          "output_dir: %s holds %s, but no checkpoint to go on from: name another folder, or set "
                          "overwrite_output_dir: true and no resume_from_checkpoint to start anew",
                          config->output_dir, what);
  return FLAP_OK;
}

/* What output_dir holds is of the same run only where the checkpoint stands in there. Else it must be as for a start
 * from the first step. */
static flap_status check_elsewhere(trainer *t, const char *what) {
  const flap_run_config *config = t->config;
  uint64_t checkpoints = 0;
  if (what[0] == '\0')
    return FLAP_OK;
  FLAP_TRY(flap_checkpoint_count(config->output_dir, &checkpoints));
  return flap_error_set(
      FLAP_INVALID,
      "output_dir: %s already holds %s, while resume_from_checkpoint names %s, which is not in there: "
      "%sname another folder, or set overwrite_output_dir: true to delete what is there and go on "
      "from that checkpoint",
      config->output_dir, what, t->resume_folder,
      checkpoints > 0 ? "to go on from the last checkpoint in output_dir set "
                        "resume_from_checkpoint: true (or auto); else "
                      : "");
}

/* What there is to go on from, and whether what output_dir holds goes first. */
static flap_status find_start(trainer *t) {
  const flap_run_config *config = t->config;
  bool inside = false;
  if (config->resume_from_checkpoint[0])
    FLAP_TRY(is_auto(config) ? choose_start(t) : find_checkpoint(t));
  if (t->resume_folder[0])
    FLAP_TRY(flap_checkpoint_lies_in(t->resume_folder, config->output_dir, &inside));
  t->goes_on_here = inside;
  t->clears = config->overwrite_output_dir && !inside;
  return FLAP_OK;
}

static flap_status check_output(trainer *t) {
  const flap_run_config *config = t->config;
  char what[FLAP_PATH_MAX];
  FLAP_TRY(check_folder(config->output_dir));
  FLAP_TRY(find_start(t));
  if (t->clears)
    return check_inputs_stay(config);
  if (t->goes_on_here || is_auto(config))
    return FLAP_OK;
  FLAP_TRY(flap_checkpoint_occupied(config->output_dir, true, what));
  if (t->resume_folder[0])
    return check_elsewhere(t, what);
  if (what[0] != '\0')
    return flap_error_set(FLAP_INVALID,
                          "output_dir: %s already holds %s: name another folder, or set resume_from_checkpoint: auto "
                          "to go on from the last checkpoint, or from the start if there is none, or "
                          "overwrite_output_dir: true to start anew",
                          config->output_dir, what);
  return FLAP_OK;
}

/* Before anything in the folder is looked at, for what is half-written there may be another run's. */
static flap_status lock_output(trainer *t) {
  const flap_status status = flap_run_lock_take(t->config->output_dir, &t->lock);
  return status == FLAP_OK ? FLAP_OK : flap_error_prefix(status, "output_dir");
}

static flap_status check_and_lock_output(trainer *t) {
  struct stat info;
  if (flap_system_stat(t->config->output_dir, &info) == 0 && S_ISDIR(info.st_mode))
    FLAP_TRY(lock_output(t));
  return check_output(t);
}

/* Files of an earlier run that this one overwrites go before it writes any. */
static flap_status look_at_space(const trainer *t, uint64_t *free_out, uint64_t *overwritten_out) {
  *overwritten_out = 0;
  FLAP_TRY(flap_block_space(t->config->output_dir, free_out));
  if (t->clears)
    FLAP_TRY(flap_checkpoint_clear_bytes(t->config->output_dir, overwritten_out));
  return FLAP_OK;
}

/* For the trained model and so many checkpoints beside those that are there. */
static flap_status check_space(trainer *t, uint64_t checkpoints) {
  const flap_plan *plan = &t->prepared.plan;
  const bool exports = plan->export_bytes > 0;
  uint64_t free_bytes = 0, overwritten = 0;
  char saved[96] = "", overwritable[64] = "";
  if (plan->checkpoint_bytes == 0)
    checkpoints = 0;
  FLAP_TRY(look_at_space(t, &free_bytes, &overwritten));
  const uint64_t needed = plan->export_bytes + checkpoints * plan->checkpoint_bytes;
  if (free_bytes + overwritten >= needed)
    return FLAP_OK;
  if (checkpoints > 0)
    (void)snprintf(saved, sizeof saved, "%s%llu checkpoint%s at once", exports ? " and " : "",
                   (unsigned long long)checkpoints, checkpoints == 1 ? "" : "s");
  if (overwritten > 0)
    (void)snprintf(overwritable, sizeof overwritable, " and %llu to overwrite", (unsigned long long)overwritten);
  return flap_error_set(
      FLAP_NO_SPACE, "output_dir: %s has %llu bytes free%s, but %s%s take%s %llu: free some, or set %s%s%s",
      t->config->output_dir, (unsigned long long)free_bytes, overwritable, exports ? "the trained model" : "", saved,
      exports + checkpoints == 1 ? "s" : "", (unsigned long long)needed,
      checkpoints > 0 ? "save_total_limit (one more is there while it is written), save_strategy: no" : "",
      checkpoints > 0 && exports ? " or " : "", exports ? "export: none" : "");
}

/* Once it is known how many checkpoints the run writes. Where all of them are kept, somebody may take them elsewhere
 * meanwhile: then only two must have room. */
static flap_status check_space_for_all(trainer *t) {
  const flap_run_config *config = t->config;
  const uint64_t written = t->prepared.plan.run_checkpoints;
  uint64_t there = 0;
  if (written == 0)
    return FLAP_OK;
  if (!t->clears)
    FLAP_TRY(flap_checkpoint_count(config->output_dir, &there));
  const uint64_t more = flap_wear_checkpoints_at_once(config, written, there) - there;
  t->room_checkpoints = config->save_total_limit > 0 || more <= 2 ? more : 2;
  FLAP_TRY(check_space(t, t->room_checkpoints));
  if (t->room_checkpoints == more)
    return FLAP_OK;
  if (check_space(t, more) != FLAP_OK) {
    flap_log(FLAP_LOG_WARNING, "%s", flap_error_message());
    flap_error_clear();
  }
  return FLAP_OK;
}

static flap_status make_output(trainer *t) {
  struct stat info;
  t->made_output = flap_system_stat(t->config->output_dir, &info) != 0;
  FLAP_TRY(flap_durable_make_folder(t->config->output_dir));
  if (t->lock.fd < 0) { /* it was not there, and meanwhile another run may have made it, and trained */
    FLAP_TRY(lock_output(t));
    FLAP_TRY(check_output(t));
  }
  return t->finished.steps > 0 ? FLAP_OK : check_space(t, 1); /* it may have nothing to do */
}

/* ---- data ------------------------------------------------------------------------------------------------ */

static flap_status open_dataset(trainer *t) {
  const flap_run_config *config = t->config;
  const flap_dataset_config dataset = {.paths = (const char *const *)config->dataset,
                                       .path_count = config->dataset_count,
                                       .tokenizer = t->prepared.tokenizer,
                                       .vocabulary = t->prepared.model.vocab_size,
                                       .scratch_folder = config->output_dir,
                                       .sequence_length = config->cutoff_len,
                                       .val_size = config->val_size,
                                       .seed = config->seed,
                                       .stop = t->stop};
  FLAP_TRY(flap_dataset_open(&dataset, &t->dataset));
  t->sequences = flap_dataset_sequences(t->dataset);
  t->steps = flap_schedule_steps(config, t->sequences, t->step_sequences);
  t->warmup = flap_schedule_warmup(config, t->steps);
  FLAP_TRY(check_finished(t, t->steps));
  if (t->result->complete)
    return FLAP_OK;
  if (t->steps > t->state.step) {
    const flap_wear_run run = {
        .start = t->state.step, .end = t->steps, .step_sequences = t->step_sequences, .sequences = t->sequences};
    t->prepared.plan.ssd_before_bytes = t->state.written_bytes;
    flap_wear_describe(config, &run, &t->prepared.plan);
  }
  FLAP_TRY(flap_wear_check(config, &t->prepared.plan));
  return check_space_for_all(t);
}

/* ---- the run --------------------------------------------------------------------------------------------- */

static void numerics_key(const trainer *t, char key[FLAP_NUMERICS_MAX]) {
  const flap_plan *plan = &t->prepared.plan;
  const flap_matmul_table *matmuls = &t->prepared.matmuls.table; /* an empty one is how products are without one */
  char products[48] = "";
  if (matmuls->count > 0)
    (void)snprintf(products, sizeof products, "; products 0x%016llx",
                   (unsigned long long)flap_matmul_table_digest(matmuls));
  (void)snprintf(key, FLAP_NUMERICS_MAX, "%s; micro-batch %u x %u; weights %s; gradients %s; adamw %s%s",
                 flap_ops_numerics(t->runtime.ops), t->config->per_device_train_batch_size, t->config->cutoff_len,
                 flap_dtype_name(plan->dtype), flap_dtype_name(plan->gradient_dtype),
                 plan->optim == FLAP_OPTIM_ADAMW_8BIT ? "8-bit, the embedding fp32" : "fp32", products);
}

/* A run that would compute other bits than the one that saved does not go on unless that is wanted. */
static flap_status compare_numerics(const trainer *t) {
  char key[FLAP_NUMERICS_MAX], differences[2 * FLAP_NUMERICS_MAX];
  numerics_key(t, key);
  if (flap_numerics_key_differences(t->state.numerics, key, differences, sizeof differences) == 0)
    return FLAP_OK;
  if (!t->config->allow_numerics_change)
    return flap_error_set(FLAP_INVALID,
                          "resume_from_checkpoint: %s was saved by a run that computed differently (%s): change that "
                          "back, or set allow_numerics_change: true to go on with results that are equal in kind, not "
                          "to the bit",
                          t->resume_folder, differences);
  flap_log(FLAP_LOG_WARNING,
           "%s was saved by a run that computed differently (%s): results will be equal in kind, not to the bit",
           t->resume_folder, differences);
  return FLAP_OK;
}

/* Shapes may be the same where the model is another one. */
static flap_status compare_models(const trainer *t) {
  flap_model_config saved;
  char differences[512];
  uint32_t count = 0;
  if (!t->resume_folder[0])
    return FLAP_OK;
  FLAP_TRY(flap_hf_config_read(t->resume_folder, &saved));
  FLAP_TRY(flap_hf_config_differences(&saved, &t->prepared.model, differences, sizeof differences, &count));
  if (count == 0)
    return FLAP_OK;
  if (!t->config->allow_numerics_change)
    return flap_error_set(FLAP_INVALID,
                          "resume_from_checkpoint: %s was saved of another model (%s): change that back, or set "
                          "allow_numerics_change: true to go on with this one",
                          t->resume_folder, differences);
  flap_log(FLAP_LOG_WARNING, "%s was saved of another model (%s)", t->resume_folder, differences);
  return FLAP_OK;
}

/* What else a resumed run does differently is said, not hidden. */
static void compare_data(const trainer *t) {
  if (t->state.dataset_digest != flap_dataset_digest(t->dataset))
    flap_log(FLAP_LOG_WARNING, "the data are not those that %s was trained on: sequences may come again, or not at all",
             t->resume_folder);
  if (t->state.seed != t->config->seed)
    flap_log(FLAP_LOG_WARNING, "seed: %s was saved with %llu: the order of the data changes", t->resume_folder,
             (unsigned long long)t->state.seed);
}

static flap_status fill_regions(trainer *t) {
  flap_pager *pager = t->runtime.pager;
  const flap_layout *layout = &t->runtime.lists.layout;
  if (!t->resume_folder[0])
    return t->config->model != NULL ? flap_weights_init(pager, layout, t->config->seed)
                                    : flap_weights_load(pager, layout, t->config->model_name_or_path);
  FLAP_TRY(compare_numerics(t));
  compare_data(t);
  t->step = t->state.step;
  t->cursor = t->state.cursor;
  /* At the last step all the same: what a crash after the last checkpoint left undone is the export. */
  if (t->step > t->steps)
    return flap_error_set(FLAP_INVALID,
                          "resume_from_checkpoint: %s is at step %llu already, and the run ends at %llu: raise "
                          "max_steps or num_train_epochs",
                          t->resume_folder, (unsigned long long)t->step, (unsigned long long)t->steps);
  FLAP_TRY(flap_checkpoint_load(pager, layout, t->resume_folder));
  if ((t->state.loss_scale.scale > 0) != (layout->spec.shape.dtype == FLAP_F16))
    return flap_error_set(FLAP_INVALID,
                          "resume_from_checkpoint: trainer_state.json in %s %s loss_scale, but its weights are %s: it "
                          "was changed by hand, or is another checkpoint's",
                          t->resume_folder, t->state.loss_scale.scale > 0 ? "has a" : "has no",
                          flap_dtype_name(layout->spec.shape.dtype));
  t->runtime.executor.loss_scale = t->state.loss_scale;
  /* Until a step is done there is nothing newer. */
  if (t->goes_on_here) {
    t->saved_step = t->step;
    memcpy(t->result->checkpoint, t->resume_folder, sizeof t->result->checkpoint);
  }
  return FLAP_OK;
}

static flap_status open_run(trainer *t) {
  flap_runtime_config config = {
      .vram_bytes = t->prepared.budgets.vram_bytes, .optimizer = t->config, .matmuls = &t->prepared.matmuls};
  flap_setup *setup = &t->prepared.setup;
  if (t->prepared.plan.checkpoint_shared_bytes > 0)
    config.shared_folder = t->config->output_dir;
  memcpy(config.disk_bytes, t->prepared.budgets.disk_bytes, sizeof config.disk_bytes);
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++)
    if (setup->has_program[i])
      flap_pager_predict(&setup->pager, setup->programs[i].leases, setup->programs[i].lease_count, t->predicted[i]);
  const uint64_t started_ns = flap_units_now_ns();
  FLAP_TRY(flap_runtime_open(setup, &config, &t->runtime));
  t->opened = true;
  const uint64_t opened_ns = flap_units_now_ns();
  if (t->observer.planned != NULL)
    t->observer.planned(t->observer.context, &t->prepared.plan, flap_pager_disk_describe(t->runtime.pager));
  FLAP_TRY(fill_regions(t));
  flap_log(FLAP_LOG_DEBUG, "memory was taken in %.1f s, weights and states were filled in in %.1f s",
           (double)(opened_ns - started_ns) * 1e-9, (double)(flap_units_now_ns() - opened_ns) * 1e-9);
  FLAP_TRY(flap_runtime_open_reader(&t->runtime, t->dataset, t->cursor));
  if (t->observer.prepared != NULL)
    t->observer.prepared(t->observer.context, t->sequences * t->config->cutoff_len,
                         flap_dataset_heldout(t->dataset) * t->config->cutoff_len, t->sequences, t->step);
  return FLAP_OK;
}

static flap_status open_companions(trainer *t) {
  const flap_companions_source from = {.model = t->config->model_name_or_path,
                                       .checkpoint = t->resume_folder,
                                       .tokenizer = t->config->tokenizer,
                                       .opened = t->prepared.tokenizer};
  return flap_companions_open(&from, &t->companions);
}

static flap_artifacts artifacts_of(trainer *t) {
  return (flap_artifacts){.model = &t->prepared.model,
                          .tokenizer = t->prepared.tokenizer,
                          .companions = &t->companions,
                          .piece = {&t->behind, &t->room}};
}

/* Some kilobytes for the lines of all steps that are logged; the first million is enough to see a disk fill up. */
static uint64_t line_bytes(const trainer *t) {
  const uint64_t lines = (t->steps - t->step) / t->config->logging_steps + LINES_MORE;
  return lines < LINE_ROOM_BYTES_MAX / LINE_BYTES ? lines * LINE_BYTES : LINE_ROOM_BYTES_MAX;
}

/* What check_space asked for is taken, so that nobody else can have it; where there is more, some for lines. */
static flap_status keep_room(trainer *t) {
  const flap_plan *plan = &t->prepared.plan;
  const char *folder = t->config->output_dir;
  FLAP_TRY(flap_room_open(folder, &t->room));
  FLAP_TRY(flap_room_open(folder, &t->line_room));
  const uint64_t bytes = plan->export_bytes + t->room_checkpoints * plan->checkpoint_bytes;
  flap_status status = flap_room_keep(&t->room, bytes, 0);
  if (status == FLAP_OK)
    status = flap_room_keep(&t->line_room, 0, line_bytes(t));
  if (status == FLAP_OK)
    status = flap_room_keep(&t->room, bytes, FLAP_SAVER_SPARE_BYTES);
  flap_metrics_give_room(t->metrics, &t->line_room);
  if (status == FLAP_OK) {
    (void)flap_room_give(&t->room, flap_pager_shared_bytes(t->runtime.pager));
    return FLAP_OK;
  }
  if (status != FLAP_UNSUPPORTED)
    return flap_error_prefix(status, "output_dir: %s: no room for checkpoints and the trained model", folder);
  flap_log(FLAP_LOG_DEBUG, "output_dir: %s: %s; other programs may take the room that is wanted later", folder,
           flap_error_message());
  flap_error_clear();
  flap_room_close(&t->room);
  flap_room_close(&t->line_room);
  return FLAP_OK;
}

/* What a life left that ended before its first checkpoint. */
static flap_status clear_leftovers(trainer *t) {
  char path[FLAP_DURABLE_PATH_MAX];
  bool steps = false;
  FLAP_TRY(flap_durable_join(path, t->config->output_dir, "metrics.jsonl"));
  FLAP_TRY(flap_metrics_has_steps(path, &steps));
  if (steps)
    flap_log(FLAP_LOG_INFO, "%s holds no checkpoint: training starts anew, and so does metrics.jsonl",
             t->config->output_dir);
  return flap_checkpoint_clear_leftovers(t->config->output_dir);
}

static uint64_t heldout_tokens(const trainer *t) {
  return flap_dataset_heldout(t->dataset) * t->config->cutoff_len;
}

static flap_status read_evaluation(const char *path, int64_t step, flap_eval_report *report_out) {
  flap_metrics_line line;
  bool found = false;
  *report_out = (flap_eval_report){0};
  FLAP_TRY(flap_metrics_find(path, step, EVAL_KEYS, EVAL_KEY_COUNT, &line, &found));
  if (found && line.step >= 0 && line.values[1] >= 1 && line.values[1] < 0x1p63)
    *report_out = (flap_eval_report){.step = (uint64_t)line.step,
                                     .loss = line.values[0],
                                     .tokens = (uint64_t)line.values[1],
                                     .unigram_entropy = line.values[2],
                                     .seconds = line.values[3]};
  return FLAP_OK;
}

/* What earlier lives of the run evaluated: first of all, and after the step that this one begins with. */
static flap_status read_evaluations(trainer *t, const char *path) {
  flap_eval_report first;
  if (heldout_tokens(t) == 0)
    return FLAP_OK;
  FLAP_TRY(read_evaluation(path, (int64_t)t->step, &t->on_record));
  FLAP_TRY(read_evaluation(path, -1, &first));
  if (first.tokens == heldout_tokens(t))
    t->result->first_eval = first;
  return FLAP_OK;
}

/* Files of an earlier run go only now, when nothing can be wrong with this one's input. */
static flap_status open_files(trainer *t) {
  char path[FLAP_DURABLE_PATH_MAX];
  if (t->clears)
    FLAP_TRY(flap_checkpoint_clear(t->config->output_dir));
  if (!t->resume_folder[0] && is_auto(t->config))
    FLAP_TRY(clear_leftovers(t));
  FLAP_TRY(flap_durable_join(path, t->config->output_dir, "metrics.jsonl"));
  FLAP_TRY(flap_metrics_open(path, t->goes_on_here ? (int64_t)t->step : -1, &t->metrics));
  if (t->goes_on_here)
    FLAP_TRY(read_evaluations(t, path));
  FLAP_TRY(flap_write_behind_open(t->runtime.lists.save_memory, t->runtime.lists.save_bytes, &t->behind));
  if (t->config->save_strategy == FLAP_STRATEGY_NO)
    return FLAP_OK;
  FLAP_TRY(keep_room(t));
  FLAP_TRY(flap_pager_next_file(t->runtime.pager));
  const flap_saver_config saver = {.output_dir = t->config->output_dir,
                                   .pager = t->runtime.pager,
                                   .layout = &t->runtime.lists.layout,
                                   .artifacts = artifacts_of(t),
                                   .metrics = t->metrics,
                                   .only_model = t->config->save_only_model,
                                   .total_limit = t->config->save_total_limit,
                                   .room_bytes = t->prepared.plan.export_bytes + t->prepared.plan.checkpoint_bytes -
                                                 flap_pager_shared_bytes(t->runtime.pager)};
  return flap_saver_open(&saver, &t->saver);
}

/* ---- saving ---------------------------------------------------------------------------------------------- */

/* Of a checkpoint, beside what it shares with the run. */
static uint64_t checkpoint_written_bytes(const trainer *t) {
  return t->prepared.plan.checkpoint_bytes - t->shared_bytes;
}

/* By all lives of the run: so far, and for the checkpoint that is about to be written. */
static uint64_t written_bytes(const trainer *t) {
  const flap_plan *plan = &t->prepared.plan;
  flap_pager_stats stats;
  flap_pager_get_stats(t->runtime.pager, &stats);
  return t->state.written_bytes + flap_wear_start_bytes(plan) + stats.disk_bytes[1] + t->result->saved_bytes +
         checkpoint_written_bytes(t);
}

static flap_trainer_state state_of(trainer *t) {
  t->shared_bytes = flap_pager_can_keep(t->runtime.pager) ? flap_pager_shared_bytes(t->runtime.pager) : 0;
  flap_trainer_state state = {.step = t->step,
                              .max_steps = t->steps,
                              .cursor = t->cursor,
                              .seed = t->config->seed,
                              .optim = t->config->optim,
                              .loss_scale = t->runtime.executor.loss_scale,
                              .matmuls = &t->prepared.matmuls,
                              .written_bytes = written_bytes(t),
                              .dataset_digest = flap_dataset_digest(t->dataset)};
  numerics_key(t, state.numerics);
  return state;
}

static void note_saved(trainer *t, uint64_t step, double seconds) {
  t->saved_step = step;
  t->saved_ns = flap_units_now_ns();
  t->result->saved_bytes += checkpoint_written_bytes(t);
  if (t->observer.saved != NULL)
    t->observer.saved(t->observer.context, t->result->checkpoint, seconds);
}

flap_status trainer_save(trainer *t) {
  const flap_artifacts artifacts = artifacts_of(t);
  FLAP_TRY(trainer_collect_save(t, true));
  const flap_trainer_state state = state_of(t);
  const uint64_t started_ns = flap_units_now_ns();
  FLAP_TRY(flap_pager_settle(t->runtime.pager));
  FLAP_TRY(flap_metrics_sync(t->metrics));
  FLAP_TRY(flap_checkpoint_save(t->config->output_dir, t->runtime.pager, &t->runtime.lists.layout, &artifacts, &state,
                                t->config->save_only_model, t->config->save_total_limit, t->result->checkpoint));
  note_saved(t, t->step, (double)(flap_units_now_ns() - started_ns) * 1e-9);
  return FLAP_OK;
}

/* The update may be pending: then the snapshot holds what the next program makes of the weights first of all. */
flap_status trainer_begin_save(trainer *t, bool read_by_step) {
  FLAP_TRY(trainer_collect_save(t, true));
  const flap_trainer_state state = state_of(t);
  flap_pager_snapshot_begin(t->runtime.pager, t->pending ? flap_executor_update_leases(&t->runtime.executor) : 0);
  flap_saver_start(&t->saver, &state, read_by_step);
  t->saved_ns = flap_units_now_ns();
  if (!t->pending)
    flap_saver_judge(&t->saver, true);
  return FLAP_OK;
}

void trainer_approve_save(trainer *t) {
  if (!flap_saver_is_busy(&t->saver))
    return;
  if (!flap_saver_is_judged(&t->saver))
    flap_saver_judge(&t->saver, true);
  flap_saver_look(&t->saver);
}

flap_status trainer_collect_save(trainer *t, bool wait) {
  if (!flap_saver_is_busy(&t->saver) || (!wait && !flap_saver_is_over(&t->saver)))
    return FLAP_OK;
  FLAP_TRY(flap_saver_collect(&t->saver));
  memcpy(t->result->checkpoint, t->saver.folder, sizeof t->result->checkpoint);
  note_saved(t, t->saver.state.step, t->saver.seconds);
  return FLAP_OK;
}

/* The run ends with an error. A checkpoint in the works is of an earlier step: if all of it is there and good it is
 * finished, and else given up. The error that counts is the run's. */
static void end_save(trainer *t, flap_status status) {
  char message[2048];
  if (!flap_saver_is_busy(&t->saver))
    return;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  flap_pager_snapshot_cut_off(t->runtime.pager);
  if (!flap_saver_is_judged(&t->saver))
    flap_saver_judge(&t->saver, flap_executor_updates_are_good(&t->runtime.executor));
  if (trainer_collect_save(t, true) != FLAP_OK)
    flap_log(FLAP_LOG_DEBUG, "the checkpoint in the works was given up: %s", flap_error_message());
  (void)flap_error_set(status, "%s", message);
}

flap_status trainer_evaluate_first(trainer *t) {
  if (t->on_record.tokens == 0 || t->on_record.tokens != heldout_tokens(t))
    return trainer_evaluate(t);
  t->result->last_eval = t->on_record;
  return FLAP_OK;
}

static flap_status write_evaluation(trainer *t, const flap_eval_report *report) {
  flap_metrics_begin_line(t->metrics);
  flap_metrics_add_integer(t->metrics, "step", (int64_t)report->step);
  flap_metrics_add_number(t->metrics, EVAL_KEYS[0], report->loss);
  flap_metrics_add_integer(t->metrics, EVAL_KEYS[1], (int64_t)report->tokens);
  flap_metrics_add_number(t->metrics, EVAL_KEYS[2], report->unigram_entropy);
  flap_metrics_add_number(t->metrics, EVAL_KEYS[3], report->seconds);
  return flap_metrics_end_line(t->metrics);
}

flap_status trainer_evaluate(trainer *t) {
  uint64_t programs = 0;
  bool whole = false;
  flap_eval_report report;
  if (flap_dataset_heldout(t->dataset) == 0)
    return FLAP_OK;
  FLAP_TRY(trainer_collect_save(t, true));
  FLAP_TRY(flap_pager_settle(t->runtime.pager));
  FLAP_TRY(flap_evaluate(&t->runtime, t->dataset, t->step, t->stop, &report, &programs, &whole));
  t->runs[FLAP_SETUP_FORWARD] += programs;
  if (!whole)
    return FLAP_OK;
  if (t->result->first_eval.tokens == 0)
    t->result->first_eval = report;
  t->result->last_eval = report;
  if (t->on_record.tokens == 0 ||
      t->on_record.step != t->step) /* of each step there is one line, be it of other data */
    FLAP_TRY(write_evaluation(t, &report));
  if (t->observer.evaluated != NULL)
    t->observer.evaluated(t->observer.context, &report);
  return FLAP_OK;
}

/* ---- the end --------------------------------------------------------------------------------------------- */

/* Bytes are exact once everything is settled: what other programs moved is known, the rest is the steady ones'. */
static void report_bytes(trainer *t) {
  const flap_setup_program steady = t->prepared.setup.steady;
  flap_pager_stats stats;
  flap_pager_get_stats(t->runtime.pager, &stats);
  for (int i = 0; i < 2; i++) {
    t->result->disk_lane_bytes[i] = stats.bytes[i == 0 ? FLAP_LANE_DISK_READ : FLAP_LANE_DISK_WRITE];
    t->result->disk_bytes[i] = stats.disk_bytes[i];
  }
  t->result->disk_written_bytes = flap_wear_start_bytes(&t->prepared.plan) + stats.disk_bytes[1];
  t->result->trained_tokens = (t->step - t->state.step) * t->prepared.plan.tokens_per_step;
  if (t->runs[steady] == 0)
    return;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    uint64_t other = 0;
    for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++)
      if (i != (int)steady)
        other += t->runs[i] * t->predicted[i][lane];
    t->result->steady_lane_bytes[lane] = (stats.bytes[lane] - other) / t->runs[steady];
  }
}

static void report_peaks(trainer *t) {
  flap_peaks *peaks = &t->result->peaks;
  flap_runtime_peaks(&t->runtime, peaks);
  const bool on_card = t->runtime.spec.device == FLAP_DEVICE_CUDA; /* which has its vram elsewhere */
  const uint64_t peak = flap_budgets_resident_peak(), mine = peaks->ram_bytes + (on_card ? 0 : peaks->vram_bytes);
  peaks->process_bytes = peak > mine ? peak - mine : 0;
}

static flap_status export_model(trainer *t) {
  const flap_artifacts artifacts = artifacts_of(t);
  FLAP_TRY(flap_checkpoint_export(t->config->output_dir, t->runtime.pager, &t->runtime.lists.layout, &artifacts));
  t->result->exported = true;
  t->result->saved_bytes += t->prepared.plan.export_bytes;
  return FLAP_OK;
}

static flap_status finish(trainer *t) {
  char path[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_pager_settle(t->runtime.pager));
  report_bytes(t);
  report_peaks(t);
  flap_room_leave(&t->room, t->prepared.plan.export_bytes); /* no checkpoint follows */
  flap_room_close(&t->line_room);
  t->result->steps = t->step;
  if (t->step == 0 && t->result->interrupted) /* nothing to go on from: the same run may start here again */
    return flap_checkpoint_clear(t->config->output_dir);
  t->result->skipped_steps = t->runtime.executor.loss_scale.skipped;
  FLAP_TRY(flap_metrics_sync(t->metrics));
  if (!t->result->interrupted && t->config->export_final)
    FLAP_TRY(export_model(t));
  if (!t->result->interrupted)
    FLAP_TRY(flap_finished_write(t->config->output_dir, t->steps, t->result->exported, &t->room));
  FLAP_TRY(flap_durable_join(path, t->config->output_dir, "trace.json"));
  return flap_trace_write(t->runtime.lists.trace, path); /* the least of all that is written, so the last */
}

static void close_all(trainer *t) {
  flap_saver_close(&t->saver);
  flap_write_behind_close(&t->behind);
  flap_metrics_close(t->metrics);
  flap_room_close(&t->room);
  flap_room_close(&t->line_room);
  if (t->opened)
    flap_runtime_close(&t->runtime);
  flap_dataset_close(t->dataset);
  flap_companions_close(&t->companions);
  flap_prepare_close(&t->prepared);
  flap_run_lock_release(&t->lock);
  if (t->made_output)
    (void)flap_system_rmdir(t->config->output_dir); /* only if nothing is in it */
}

static flap_status run_to_end(trainer *t) {
  const flap_run_config *config = t->config;
  FLAP_TRY(check_and_lock_output(t));
  if (t->result->complete)
    return FLAP_OK;
  FLAP_TRY(flap_prepare_open(config, false, &t->prepared));
  t->prepared.resume_folder = t->resume_folder;
  FLAP_TRY(compare_models(t));
  FLAP_TRY(open_companions(t));
  FLAP_TRY(flap_prepare_plan(&t->prepared, FLAP_MODE_TRAIN, config->per_device_train_batch_size, config->cutoff_len,
                             config->gradient_accumulation_steps, 0));
  FLAP_TRY(flap_pressure_check_here(&t->prepared));
  FLAP_TRY(make_output(t));
  FLAP_TRY(open_dataset(t));
  if (t->result->complete)
    return FLAP_OK;
  FLAP_TRY(open_run(t));
  FLAP_TRY(open_files(t));
  FLAP_TRY(flap_finished_remove(config->output_dir));
  FLAP_TRY(trainer_loop(t));
  return finish(t);
}

flap_status flap_engine_train(const flap_run_config *config, const flap_observer *observer,
                              const volatile sig_atomic_t *stop, flap_train_result *result_out) {
  static trainer storage; /* one run at a time per process; it holds long paths */
  trainer *t = &storage;
  memset(t, 0, sizeof *t);
  memset(result_out, 0, sizeof *result_out);
  *t = (trainer){.config = config,
                 .stop = stop,
                 .result = result_out,
                 .started_ns = flap_units_now_ns(),
                 .room = FLAP_ROOM_NONE,
                 .line_room = FLAP_ROOM_NONE,
                 .lock = {.fd = -1}};
  if (observer != NULL)
    t->observer = *observer;
  t->step_sequences = (uint64_t)config->per_device_train_batch_size * config->gradient_accumulation_steps;
  flap_status status = run_to_end(t);
  result_out->total_seconds = (double)(flap_units_now_ns() - t->started_ns) * 1e-9;
  if (status == FLAP_INTERRUPTED) { /* while data were read: nothing was begun */
    result_out->interrupted = true;
    result_out->steps = t->state.step;
    status = FLAP_OK;
  }
  if (status != FLAP_OK)
    end_save(t, status);
  close_all(t);
  return status;
}
