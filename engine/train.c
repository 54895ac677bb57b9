/* flap_engine_train: what happens before the first step, the loop, and what happens after the last.
 *
 * Bad input is found before anything is written: model, tokenizer, plan and data come first; output_dir is made last,
 * and taken away again if nothing came of it.
 */
#include "engine/train_internal.h"

#include "base/log.h"
#include "base/system.h"
#include "base/units.h"
#include "engine/planner/budgets.h"
#include "engine/planner/pressure.h"
#include "engine/planner/wear.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights.h"
#include "io/formats/durable.h"

#include <string.h>

#define LINE_BYTES ((uint64_t)1 << 10) /* of metrics.jsonl, upwards */
#define LINES_MORE 64                  /* evaluations */
#define EVAL_KEY_COUNT 4
#define LINE_ROOM_BYTES_MAX ((uint64_t)1 << 20)

static const char *const EVAL_KEYS[EVAL_KEY_COUNT] = {"eval_loss", "eval_tokens", "eval_unigram_entropy",
                                                      "eval_seconds"};

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
                                       .begin_tokens = true,
                                       .stop = t->stop};
  FLAP_TRY(flap_dataset_open(&dataset, &t->dataset));
  t->sequences = flap_dataset_sequences(t->dataset);
  t->steps = flap_schedule_steps_from(config, t->sequences, t->step_sequences, t->state.step, t->state.cursor);
  t->warmup = flap_schedule_warmup(config, t->steps);
  FLAP_TRY(trainer_check_finished(t, t->steps));
  if (t->result->complete)
    return FLAP_OK;
  if (t->steps > t->state.step) {
    const flap_wear_run run = {
        .start = t->state.step, .end = t->steps, .step_sequences = t->step_sequences, .sequences = t->sequences};
    t->prepared.plan.ssd_before_bytes = t->state.written_bytes;
    flap_wear_describe(config, &run, &t->prepared.plan);
  }
  FLAP_TRY(flap_wear_check(config, &t->prepared.plan));
  return trainer_check_space(t);
}

/* ---- the run --------------------------------------------------------------------------------------------- */

/* A run that would compute other bits than the one that saved does not go on unless that is wanted. */
static flap_status compare_numerics(const trainer *t) {
  char key[FLAP_NUMERICS_MAX], differences[2 * FLAP_NUMERICS_MAX];
  trainer_numerics_key(t, key);
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
  if (t->state.cursor != t->state.step * t->step_sequences)
    flap_log(FLAP_LOG_WARNING,
             "the %llu steps before %s took %llu sequences, and those to come take %llu each "
             "(per_device_train_batch_size, gradient_accumulation_steps): epochs are counted by sequences",
             (unsigned long long)t->state.step, t->resume_folder, (unsigned long long)t->state.cursor,
             (unsigned long long)t->step_sequences);
  if (t->state.seed != t->config->seed)
    flap_log(FLAP_LOG_WARNING, "seed: %s was saved with %llu: the order of the data changes", t->resume_folder,
             (unsigned long long)t->state.seed);
}

/* A schedule is a function of all steps: where their number changes, the rate goes on from elsewhere. */
static void compare_schedule(const trainer *t) {
  const flap_run_config *config = t->config;
  const uint64_t before = t->state.max_steps, next = t->state.step - t->state.loss_scale.skipped;
  if (before == 0 || before == t->steps || t->state.step >= t->steps)
    return;
  const double was = flap_schedule_learning_rate(config, flap_schedule_warmup(config, before), before, next);
  const double is = flap_schedule_learning_rate(config, t->warmup, t->steps, next);
  if (was != is)
    flap_log(FLAP_LOG_WARNING,
             "the run of %s had %llu steps, and this one has %llu: its next learning rate is %.3g, where that one's "
             "would have been %.3g",
             t->resume_folder, (unsigned long long)before, (unsigned long long)t->steps, is, was);
}

static flap_status fill_regions(trainer *t) {
  flap_pager *pager = t->runtime.pager;
  const flap_layout *layout = &t->runtime.lists.layout;
  if (!t->resume_folder[0])
    return t->config->model != NULL ? flap_weights_init(pager, layout, t->config->seed)
                                    : flap_weights_load(pager, layout, t->config->model_name_or_path);
  FLAP_TRY(compare_numerics(t));
  compare_data(t);
  compare_schedule(t);
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

/* What is exported says how its tokenizer is to be read, but not everybody looks. */
static void warn_of_other_tokenizer(const trainer *t) {
  if (t->prepared.tokenizer == NULL || strcmp(flap_model_family_name(t->prepared.model.family), "qwen2") != 0 ||
      flap_tokenizer_is_nfc_byte_level(t->prepared.tokenizer))
    return;
  flap_log(
      FLAP_LOG_WARNING,
      "tokenizer: %s is not like Qwen2's (byte-level, NFC): of a qwen2 model AutoTokenizer of transformers 5 makes "
      "one like Qwen2's all the same, with other ids; load it with PreTrainedTokenizerFast.from_pretrained",
      flap_tokenizer_name(t->prepared.tokenizer));
}

static flap_status open_companions(trainer *t) {
  const flap_companions_source from = {.model = t->config->model_name_or_path,
                                       .checkpoint = t->resume_folder,
                                       .tokenizer = t->config->tokenizer,
                                       .opened = t->prepared.tokenizer};
  return flap_companions_open(&from, &t->companions);
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
    if (t->step < t->steps)
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

/* The checkpoint was trained on the data of this life: what was evaluated then is of the same text. */
static bool has_same_data(const trainer *t) {
  return t->state.dataset_digest == flap_dataset_digest(t->dataset);
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
  if (first.tokens == heldout_tokens(t) && has_same_data(t))
    t->result->first_eval = first;
  return FLAP_OK;
}

/* Files of an earlier run go only now, when nothing can be wrong with this one's input. */
static flap_status open_files(trainer *t) {
  char path[FLAP_DURABLE_PATH_MAX];
  if (t->clears)
    FLAP_TRY(flap_checkpoint_clear(t->config->output_dir));
  if (!t->resume_folder[0] && trainer_is_auto(t->config))
    FLAP_TRY(clear_leftovers(t));
  FLAP_TRY(flap_durable_join(path, t->config->output_dir, "metrics.jsonl"));
  FLAP_TRY(flap_metrics_open(path, t->goes_on_here ? (int64_t)t->step : -1, &t->metrics));
  if (t->goes_on_here)
    FLAP_TRY(read_evaluations(t, path));
  FLAP_TRY(flap_write_behind_open(t->runtime.lists.save_memory, t->runtime.lists.save_bytes, &t->behind));
  if (t->config->save_strategy == FLAP_STRATEGY_NO)
    return FLAP_OK;
  FLAP_TRY(keep_room(t));
  if (t->step >= t->steps) /* what is left is the export */
    return FLAP_OK;
  FLAP_TRY(flap_pager_next_file(t->runtime.pager));
  const flap_saver_config saver = {.output_dir = t->config->output_dir,
                                   .pager = t->runtime.pager,
                                   .layout = &t->runtime.lists.layout,
                                   .artifacts = trainer_artifacts(t),
                                   .metrics = t->metrics,
                                   .only_model = t->config->save_only_model,
                                   .total_limit = t->config->save_total_limit,
                                   .room_bytes = t->prepared.plan.export_bytes + t->prepared.plan.checkpoint_bytes -
                                                 flap_pager_shared_bytes(t->runtime.pager)};
  return flap_saver_open(&saver, &t->saver);
}

flap_status trainer_evaluate_first(trainer *t) {
  if (t->on_record.tokens == 0 || t->on_record.tokens != heldout_tokens(t) || !has_same_data(t))
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
    t->result->pooled_bytes[i] = stats.pooled_bytes[i];
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
  const flap_artifacts artifacts = trainer_artifacts(t);
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
  /* Nothing new to go on from: the same run may start here again. */
  if (t->result->interrupted && t->step == t->state.step && !t->goes_on_here)
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
  FLAP_TRY(trainer_take_output(t));
  if (t->result->complete)
    return FLAP_OK;
  FLAP_TRY(flap_prepare_open(config, false, &t->prepared));
  t->prepared.resume_folder = t->resume_folder;
  FLAP_TRY(compare_models(t));
  warn_of_other_tokenizer(t);
  FLAP_TRY(open_companions(t));
  FLAP_TRY(flap_prepare_plan(&t->prepared, FLAP_MODE_TRAIN, config->per_device_train_batch_size, config->cutoff_len,
                             config->gradient_accumulation_steps, 0));
  FLAP_TRY(flap_pressure_check_here(&t->prepared));
  FLAP_TRY(trainer_make_output(t));
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
    trainer_end_save(t, status);
  close_all(t);
  return status;
}
