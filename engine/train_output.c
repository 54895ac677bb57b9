/* What output_dir means for a run: where it starts, whether it may, and whether there is room.
 *
 * Nothing in the folder is looked at before its lock is taken, and nothing is written before all of it is known.
 */
#include "engine/train_internal.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/planner/wear.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

bool trainer_is_auto(const flap_run_config *config) {
  return strcmp(config->resume_from_checkpoint, "auto") == 0;
}

/* A run of so many steps has nothing left to do. */
static bool is_complete(const trainer *t, uint64_t steps) {
  return t->finished.steps > 0 && t->finished.steps == steps && (t->finished.has_model || !t->config->export_final);
}

/* A run that came to its end is left as it is, or goes on from its last checkpoint; it never begins anew. */
flap_status trainer_check_finished(trainer *t, uint64_t steps) {
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

/* Started in another folder than before, say by a service, a run would begin a second time. */
static void say_begins(const char *folder) {
  char here[FLAP_PATH_MAX];
  struct stat info;
  if (flap_system_stat(folder, &info) == 0)
    return;
  const bool is_relative = folder[0] != '/' && getcwd(here, sizeof here) != NULL;
  flap_log(FLAP_LOG_INFO, "resume_from_checkpoint: auto: there is no %s%s%s yet, so the run begins",
           is_relative ? here : "", is_relative ? "/" : "", folder);
}

/* The same command for every life of a run: on from the last checkpoint, or anew if there is nothing but what a life
 * leaves that ended before its first one. */
static flap_status choose_start(trainer *t) {
  const flap_run_config *config = t->config;
  char what[FLAP_PATH_MAX];
  FLAP_TRY(flap_finished_read(config->output_dir, &t->finished));
  if (is_complete(t, config->max_steps))
    return trainer_check_finished(t, config->max_steps);
  FLAP_TRY(find_checkpoint(t));
  if (t->resume_folder[0])
    return FLAP_OK;
  if (t->finished.steps > 0) /* epochs are steps when the data are known */
    return config->max_steps > 0 ? trainer_check_finished(t, config->max_steps) : FLAP_OK;
  FLAP_TRY(flap_checkpoint_occupied(config->output_dir, false, what));
  if (what[0] != '\0')
    return flap_error_set(FLAP_INVALID,
                          "output_dir: %s holds %s, but no checkpoint to go on from: name another folder, or set "
                          "overwrite_output_dir: true and no resume_from_checkpoint to start anew",
                          config->output_dir, what);
  say_begins(config->output_dir);
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

/* Only what FLAP left there is deleted, and nothing else is written over. */
static flap_status check_foreign(const flap_run_config *config) {
  char what[FLAP_PATH_MAX];
  FLAP_TRY(flap_checkpoint_foreign(config->output_dir, what));
  if (what[0] == '\0')
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "overwrite_output_dir: %s is not known as FLAP's, so it is not deleted, and would be in the "
                        "way: move it away, or name another output_dir",
                        what);
}

/* What there is to go on from, and whether what output_dir holds goes first. */
static flap_status find_start(trainer *t) {
  const flap_run_config *config = t->config;
  bool inside = false;
  if (config->resume_from_checkpoint[0])
    FLAP_TRY(trainer_is_auto(config) ? choose_start(t) : find_checkpoint(t));
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
  if (t->clears) {
    FLAP_TRY(check_inputs_stay(config));
    return check_foreign(config);
  }
  if (t->goes_on_here || trainer_is_auto(config))
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

flap_status trainer_take_output(trainer *t) {
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
flap_status trainer_check_space(trainer *t) {
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

flap_status trainer_make_output(trainer *t) {
  struct stat info;
  t->made_output = flap_system_stat(t->config->output_dir, &info) != 0;
  FLAP_TRY(flap_durable_make_folder(t->config->output_dir));
  if (t->lock.fd < 0) { /* it was not there, and meanwhile another run may have made it, and trained */
    FLAP_TRY(lock_output(t));
    FLAP_TRY(check_output(t));
  }
  if (t->finished.steps > 0) /* it may have nothing to do */
    return FLAP_OK;
  const bool only_exports =
      t->resume_folder[0] && t->config->max_steps > 0 && t->state.step >= (uint64_t)t->config->max_steps;
  return check_space(t, only_exports ? 0 : 1);
}
