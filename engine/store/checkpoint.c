/* Checkpoints: saved whole, found again, and pruned. */
#include "engine/store/checkpoint.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/store/hf_config.h"
#include "engine/store/output_folder_internal.h"
#include "engine/store/run_lock.h"
#include "engine/store/state_pages.h"
#include "engine/store/weights.h"
#include "io/formats/checksums.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"
#include "io/formats/safetensors.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define CHECKPOINT "checkpoint-"
#define LATER_NAMED_MAX 4 /* in a message */
#define CONFIG_FILE "config.json"
#define STATE_FILE "trainer_state.json"
#define STATE_FORMAT "flap-trainer-state"
#define STATE_VERSION 1
#define MATMUL_BYTES ((uint64_t)96 << 10) /* at most, of matmul.json: some 650 for each of 128 products */
#define STATE_BYTES_MAX ((uint64_t)1 << 20)
#define READ_AGAIN_BYTES_MAX ((uint64_t)4 << 30) /* only to explain an error: a few seconds */

_Static_assert(FLAP_PATH_MAX >= PATH_MAX, "realpath writes into such a buffer");
_Static_assert(FLAP_PATH_MAX == FLAP_DURABLE_PATH_MAX, "paths of both kinds go into the same buffers");

/* ---- trainer_state.json -------------------------------------------------------------------------------------- */

static json_int_t to_json(uint64_t value) {
  return value > INT64_MAX ? INT64_MAX : (json_int_t)value;
}

static bool add_loss_scale(json_t *root, const flap_trainer_state *state) {
  const flap_loss_scale *scale = &state->loss_scale;
  if (scale->scale == 0)
    return true;
  return json_object_set_new(root, "loss_scale", flap_json_real(scale->scale)) == 0 &&
         json_object_set_new(root, "loss_scale_good_steps", json_integer(to_json(scale->good_steps))) == 0 &&
         json_object_set_new(root, "updates_applied", json_integer(to_json(state->step - scale->skipped))) == 0;
}

/* Numbers that use all 64 bits are texts: JSON readers have 63 or 53. */
static flap_status write_state(const char *folder, const flap_trainer_state *state) {
  char path[FLAP_PATH_MAX], seed[32], digest[32];
  FLAP_TRY(flap_durable_join(path, folder, STATE_FILE));
  (void)snprintf(seed, sizeof seed, "%" PRIu64, state->seed);
  (void)snprintf(digest, sizeof digest, "0x%016" PRIx64, state->dataset_digest);
  json_t *root =
      json_pack("{s:s, s:i, s:I, s:I, s:I, s:I, s:s, s:s, s:s, s:s}", "format", STATE_FORMAT, "version", STATE_VERSION,
                "global_step", to_json(state->step), "max_steps", to_json(state->max_steps), "sequences_consumed",
                to_json(state->cursor), "written_bytes", to_json(state->written_bytes), "seed", seed, "dataset_digest",
                digest, "optim", flap_run_config_optim_name(state->optim), "numerics", state->numerics);
  if (root == NULL || !add_loss_scale(root, state)) {
    json_decref(root);
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", path);
  }
  const flap_status status = flap_json_write_file(path, root);
  json_decref(root);
  return status;
}

static flap_status read_long(const flap_json_object *root, const char *key, int base, uint64_t *value_out) {
  const char *text = NULL;
  FLAP_TRY(flap_json_get_string(root, key, &text));
  char *end = NULL;
  errno = 0;
  const unsigned long long value = strtoull(text, &end, base);
  if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0)
    return flap_json_error(root, key, "%.40s is not a whole number of 64 bits", text);
  *value_out = value;
  return FLAP_OK;
}

static flap_status read_count(const flap_json_object *root, const char *key, uint64_t *value_out) {
  int64_t value = 0;
  FLAP_TRY(flap_json_get_integer(root, key, 0, INT64_MAX, &value));
  *value_out = (uint64_t)value;
  return FLAP_OK;
}

/* A run without a loss scale has none of these keys. */
static flap_status parse_loss_scale(const flap_json_object *root, flap_trainer_state *state) {
  uint64_t applied = 0;
  FLAP_TRY(flap_json_opt_number(root, "loss_scale", 0, 1e300, 0, &state->loss_scale.scale));
  if (state->loss_scale.scale == 0)
    return FLAP_OK;
  if (!flap_loss_scale_valid(state->loss_scale.scale))
    return flap_json_error(root, "loss_scale", "%g is not a power of two between 2^-24 and 2^60",
                           state->loss_scale.scale);
  FLAP_TRY(read_count(root, "loss_scale_good_steps", &state->loss_scale.good_steps));
  FLAP_TRY(read_count(root, "updates_applied", &applied));
  if (applied > state->step)
    return flap_json_error(root, "updates_applied", "%llu is more than the %llu steps in global_step",
                           (unsigned long long)applied, (unsigned long long)state->step);
  state->loss_scale.skipped = state->step - applied;
  return FLAP_OK;
}

/* What was saved before there was a choice has no such key: adamw. */
static flap_status parse_optim(const flap_json_object *root, flap_trainer_state *state) {
  const char *name = NULL;
  FLAP_TRY(flap_json_opt_string(root, "optim", flap_run_config_optim_name(FLAP_OPTIM_ADAMW), &name));
  for (int i = FLAP_OPTIM_ADAMW; i <= FLAP_OPTIM_ADAMW_8BIT; i++)
    if (strcmp(name, flap_run_config_optim_name((flap_optim)i)) == 0) {
      state->optim = (flap_optim)i;
      return FLAP_OK;
    }
  return flap_json_error(root, "optim", "%.40s is neither adamw nor adamw_8bit", name);
}

static flap_status parse_state(const flap_json_object *root, flap_trainer_state *state) {
  const char *format = NULL, *numerics = NULL;
  int64_t version = 0, written = 0;
  FLAP_TRY(flap_json_opt_string(root, "format", "", &format));
  if (strcmp(format, STATE_FORMAT) != 0)
    return flap_json_error(root, "format",
                           "must be " STATE_FORMAT ": only FLAP's own checkpoints can be resumed; to "
                           "train another program's further, give it as model_name_or_path");
  FLAP_TRY(flap_json_get_integer(root, "version", 1, INT64_MAX, &version));
  if (version != STATE_VERSION) {
    (void)flap_json_error(root, "version", "is %lld, but this program reads version %d", (long long)version,
                          STATE_VERSION);
    return FLAP_UNSUPPORTED;
  }
  FLAP_TRY(read_count(root, "global_step", &state->step));
  FLAP_TRY(read_count(root, "max_steps", &state->max_steps));
  FLAP_TRY(read_count(root, "sequences_consumed", &state->cursor));
  FLAP_TRY(flap_json_opt_integer(root, "written_bytes", 0, INT64_MAX, 0, &written));
  state->written_bytes = (uint64_t)written;
  FLAP_TRY(read_long(root, "seed", 10, &state->seed));
  FLAP_TRY(read_long(root, "dataset_digest", 16, &state->dataset_digest));
  FLAP_TRY(parse_optim(root, state));
  FLAP_TRY(parse_loss_scale(root, state));
  FLAP_TRY(flap_json_get_string(root, "numerics", &numerics));
  if (strlen(numerics) >= FLAP_NUMERICS_MAX)
    return flap_json_error(root, "numerics", "is longer than %d bytes", FLAP_NUMERICS_MAX - 1);
  strcpy(state->numerics, numerics);
  return FLAP_OK;
}

flap_status flap_checkpoint_read_state(const char *folder, flap_trainer_state *state_out) {
  char path[FLAP_PATH_MAX];
  json_t *json = NULL;
  flap_json_object root;
  memset(state_out, 0, sizeof *state_out);
  FLAP_TRY(flap_durable_join(path, folder, STATE_FILE));
  FLAP_TRY(flap_json_load_file(path, STATE_BYTES_MAX, &json));
  flap_status status = flap_json_root(json, path, &root);
  if (status == FLAP_OK)
    status = parse_state(&root, state_out);
  json_decref(json);
  return status;
}

/* ---- saving -------------------------------------------------------------------------------------------------- */

/* States that live on disk where checkpoints can share them stay there. Either way they come before the weights. */
static flap_status write_values(const char *folder, flap_pager *pager, const flap_layout *layout, flap_file_piece piece,
                                flap_checksums *checksums) {
  if (!flap_pager_can_keep(pager))
    return flap_weights_save_all(pager, layout, folder, FLAP_SAFETENSORS_SHARD_BYTES, piece, checksums);
  FLAP_TRY(flap_state_pages_save(pager, layout, folder, piece, checksums));
  return flap_weights_save(pager, layout, folder, FLAP_SAFETENSORS_SHARD_BYTES, piece, checksums);
}

/* Weights and states, and what belongs to states. */
static flap_status write_trained(const char *folder, flap_pager *pager, const flap_layout *layout,
                                 const flap_trainer_state *state, flap_file_piece piece, flap_checksums *checksums) {
  flap_status status = FLAP_OK;
  FLAP_TRY(write_values(folder, pager, layout, piece, checksums));
  if (state->matmuls != NULL && state->matmuls->given)
    FLAP_WITH_ROOM(status, piece.room, flap_matmul_choice_save(state->matmuls, folder));
  FLAP_TRY(status);
  FLAP_WITH_ROOM(status, piece.room, write_state(folder, state));
  return status;
}

/* Large files are summed up while they are written; the small ones are read again. */
static flap_status write_all(const char *folder, flap_pager *pager, const flap_layout *layout,
                             const flap_artifacts *artifacts, const flap_trainer_state *state, bool only_model) {
  flap_checksums checksums = {0};
  flap_status status = FLAP_OK;
  FLAP_WITH_ROOM(status, artifacts->piece.room,
                 flap_output_write_artifacts(folder, artifacts, layout->spec.shape.dtype));
  FLAP_TRY_GOTO(status, status);
  status = only_model
               ? flap_weights_save(pager, layout, folder, FLAP_SAFETENSORS_SHARD_BYTES, artifacts->piece, &checksums)
               : write_trained(folder, pager, layout, state, artifacts->piece, &checksums);
  FLAP_TRY_GOTO(status, status);
  FLAP_TRY_GOTO(status, flap_checksums_add_rest(&checksums, folder));
  FLAP_WITH_ROOM(status, artifacts->piece.room, flap_checksums_write(&checksums, folder));
fail:
  flap_checksums_close(&checksums);
  return status;
}

/* The list is of ours alone; `saved_step` (UINT64_MAX: none) is one whatever is in it. To be closed even after a
 * failure. */
static flap_status list_ours(const char *output_dir, uint64_t saved_step, flap_output_steps *list) {
  char path[FLAP_PATH_MAX];
  size_t ours = 0;
  *list = (flap_output_steps){0};
  FLAP_TRY(flap_output_list(output_dir, list));
  for (size_t i = 0; i < list->count; i++) {
    bool known = list->steps[i] == saved_step;
    FLAP_TRY(flap_output_checkpoint_path(output_dir, list->steps[i], path));
    if (!known)
      FLAP_TRY(flap_output_is_ours(path, &known));
    if (known)
      list->steps[ours++] = list->steps[i];
  }
  list->count = ours;
  return FLAP_OK;
}

flap_status flap_checkpoint_count(const char *output_dir, uint64_t *count_out) {
  flap_output_steps list;
  flap_status status = list_ours(output_dir, UINT64_MAX, &list);
  *count_out = status == FLAP_OK ? list.count : 0;
  flap_output_steps_close(&list);
  if (status != FLAP_NOT_FOUND)
    return status;
  flap_error_clear();
  return FLAP_OK;
}

/* The new checkpoint is safe already: what cannot be removed is said and left. */
static void prune(const char *output_dir, uint64_t saved_step, uint32_t total_limit) {
  flap_output_steps list;
  char path[FLAP_PATH_MAX];
  flap_status status = list_ours(output_dir, saved_step, &list);
  size_t left = list.count;
  if (status != FLAP_OK)
    flap_log(FLAP_LOG_WARNING, "save_total_limit: old checkpoints stay: %s", flap_error_message());
  for (size_t i = 0; i < list.count && left > total_limit && status == FLAP_OK; i++) {
    if (list.steps[i] == saved_step)
      continue;
    if (flap_output_checkpoint_path(output_dir, list.steps[i], path) != FLAP_OK ||
        flap_durable_remove_folder(path) != FLAP_OK)
      flap_log(FLAP_LOG_WARNING, "save_total_limit: something of an old checkpoint stays: %s", flap_error_message());
    left--;
  }
  flap_error_clear();
  flap_output_steps_close(&list);
}

static flap_status give_up(const char *folder, flap_status status) {
  flap_checkpoint_abandon(folder);
  return flap_error_prefix(status, "saving %s", folder);
}

flap_status flap_checkpoint_write(const char *output_dir, flap_pager *pager, const flap_layout *layout,
                                  const flap_artifacts *artifacts, const flap_trainer_state *state, bool only_model,
                                  char folder_out[FLAP_PATH_MAX]) {
  char temporary[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_make_folder(output_dir));
  FLAP_TRY(flap_output_checkpoint_path(output_dir, state->step, folder_out));
  flap_status status;
  FLAP_WITH_ROOM(status, artifacts->piece.room, flap_durable_begin_folder(folder_out, temporary));
  FLAP_TRY(status);
  status = write_all(temporary, pager, layout, artifacts, state, only_model);
  return status == FLAP_OK ? FLAP_OK : give_up(folder_out, status);
}

/* What is shared was written long ago, by others. */
static flap_status read_shared(const char *folder) {
  char temporary[FLAP_PATH_MAX], message[2048];
  if (snprintf(temporary, sizeof temporary, "%s.tmp", folder) >= (int)sizeof temporary)
    return flap_error_set(FLAP_INVALID, "%.200s: the path is too long", folder);
  const flap_status status = flap_state_pages_verify(temporary, true);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    return FLAP_OK;
  }
  if (status != FLAP_CORRUPT)
    return status;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  return flap_error_set(
      status,
      "%s: the checkpoint is not kept, what was saved before is; look into the system's log and check "
      "the disk, then go on with resume_from_checkpoint: true, on another disk if in doubt",
      message);
}

flap_status flap_checkpoint_commit(const char *output_dir, const char *folder, uint64_t step, uint32_t total_limit,
                                   bool read_back) {
  flap_status status = read_back ? read_shared(folder) : FLAP_OK;
  if (status == FLAP_OK)
    status = flap_durable_commit_folder(folder, true);
  if (status != FLAP_OK)
    return give_up(folder, status);
  if (total_limit > 0)
    prune(output_dir, step, total_limit);
  return FLAP_OK;
}

void flap_checkpoint_abandon(const char *folder) {
  flap_durable_abort_folder(folder);
}

flap_status flap_checkpoint_save(const char *output_dir, flap_pager *pager, const flap_layout *layout,
                                 const flap_artifacts *artifacts, const flap_trainer_state *state, bool only_model,
                                 uint32_t total_limit, char folder_out[FLAP_PATH_MAX]) {
  FLAP_TRY(flap_checkpoint_write(output_dir, pager, layout, artifacts, state, only_model, folder_out));
  return flap_checkpoint_commit(output_dir, folder_out, state->step, total_limit, true);
}

/* ---- what is not as it was saved ----------------------------------------------------------------------------- */

/* At least as long as it should be, as far as can be told without reading it. */
static bool seems_whole(const char *folder) {
  flap_checksums checksums = {0};
  const bool whole = flap_output_is_there(folder, STATE_FILE) && flap_checksums_read(folder, &checksums) == FLAP_OK &&
                     flap_checksums_check_sizes(&checksums, folder) == FLAP_OK;
  flap_checksums_close(&checksums);
  return whole;
}

/* The folder that a path names its last part in. */
static void parent_of(const char *folder, char parent_out[FLAP_PATH_MAX]) {
  const char *slash = strrchr(folder, '/');
  if (slash == NULL)
    strcpy(parent_out, ".");
  else if (slash == folder)
    strcpy(parent_out, "/");
  else
    (void)snprintf(parent_out, FLAP_PATH_MAX, "%.*s", (int)(slash - folder), folder);
}

static const char *name_of(const char *folder) {
  const char *slash = strrchr(folder, '/');
  return slash != NULL ? slash + 1 : folder;
}

/* The newest checkpoint beside `folder` that is older; false when there is none. */
static bool find_older(const char *folder, char older_out[FLAP_PATH_MAX]) {
  char parent[FLAP_PATH_MAX];
  uint64_t step = 0;
  flap_output_steps list = {0};
  bool found = false;
  if (!flap_output_parse_name(name_of(folder), "", &step))
    return false;
  parent_of(folder, parent);
  if (flap_output_list(parent, &list) != FLAP_OK)
    return false;
  for (size_t i = list.count; i > 0 && !found; i--)
    found = list.steps[i - 1] < step && flap_output_checkpoint_path(parent, list.steps[i - 1], older_out) == FLAP_OK &&
            seems_whole(older_out);
  flap_output_steps_close(&list);
  return found;
}

/* Says what to do about a checkpoint that cannot be trusted. */
static flap_status advise(const char *folder, flap_status status) {
  char message[2048], older[FLAP_PATH_MAX];
  if (status != FLAP_CORRUPT)
    return status;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  if (find_older(folder, older))
    return flap_error_set(status,
                          "%s; nothing was trained on it: move %s away, or delete it, and go back to the checkpoint "
                          "before with resume_from_checkpoint=%s",
                          message, folder, older);
  return flap_error_set(
      status,
      "%s; nothing was trained on it, and no earlier checkpoint is beside it: restore it from a copy, "
      "or start anew",
      message);
}

static bool is_large(const flap_checksums_entry *entry) {
  const size_t length = strlen(entry->name), end = strlen(".safetensors");
  return entry->pages || (length >= end && strcmp(entry->name + length - end, ".safetensors") == 0);
}

/* All files are there, and the small ones are what they were: a table of pages too, of which one read is a moment. */
static flap_status check_small(const char *folder) {
  flap_checksums checksums = {0};
  flap_status status = flap_checksums_read(folder, &checksums);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    return FLAP_OK;
  }
  FLAP_TRY(status);
  status = flap_checksums_check_sizes(&checksums, folder);
  for (size_t i = 0; i < checksums.count && status == FLAP_OK; i++)
    if (!is_large(&checksums.entries[i]))
      status = flap_checksums_check_file(&checksums.entries[i], folder);
  flap_checksums_close(&checksums);
  return status;
}

/* A reader may stumble over a changed byte before a whole file is summed up: then that is what is said. */
static flap_status find_changed(const char *folder, const flap_checksums *checksums, flap_status status) {
  char message[2048];
  uint64_t bytes = 0;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  for (size_t i = 0; i < checksums->count; i++)
    bytes += checksums->entries[i].bytes;
  if (bytes > READ_AGAIN_BYTES_MAX)
    return flap_error_set(status, "%s (flap inspect %s tells whether it is what was saved)", message, folder);
  for (size_t i = 0; i < checksums->count; i++)
    if (flap_checksums_check_file(&checksums->entries[i], folder) == FLAP_CORRUPT)
      return FLAP_CORRUPT;
  if (flap_state_pages_verify(folder, false) == FLAP_CORRUPT)
    return FLAP_CORRUPT;
  return flap_error_set(status, "%s", message);
}

flap_status flap_checkpoint_load(flap_pager *pager, const flap_layout *layout, const char *folder) {
  flap_checksums checksums = {0};
  flap_status status = flap_checksums_read(folder, &checksums);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    flap_log(FLAP_LOG_WARNING,
             "%s has no " FLAP_CHECKSUMS_FILE
             ": an earlier version saved it, or it was changed; whether it is what was "
             "saved cannot be told",
             folder);
    return flap_weights_resume(pager, layout, folder, NULL);
  }
  if (status == FLAP_OK)
    status = flap_weights_resume(pager, layout, folder, &checksums);
  if (status == FLAP_INVALID || status == FLAP_UNSUPPORTED || status == FLAP_NOT_FOUND)
    status = find_changed(folder, &checksums, status);
  flap_checksums_close(&checksums);
  return advise(folder, status);
}

/* ---- finding ------------------------------------------------------------------------------------------------- */

static flap_status open_found(const char *folder, flap_trainer_state *state_out) {
  FLAP_TRY(advise(folder, check_small(folder)));
  return flap_checkpoint_read_state(folder, state_out);
}

/* `or_none`: then the folder is "". */
static flap_status find_newest(const char *output_dir, bool or_none, char folder_out[FLAP_PATH_MAX],
                               flap_trainer_state *state_out) {
  struct stat about;
  folder_out[0] = '\0';
  if (flap_system_stat(output_dir, &about) != 0) {
    if (errno != ENOENT)
      return flap_error_set_os(errno, "resume_from_checkpoint: no checkpoints in %s", output_dir);
    return or_none ? FLAP_OK
                   : flap_error_set(FLAP_NOT_FOUND,
                                    "resume_from_checkpoint: there is no %s yet: with resume_from_checkpoint: auto a "
                                    "run starts anew where no checkpoint is",
                                    output_dir);
  }
  flap_output_steps list = {0};
  FLAP_TRY(flap_output_recover(output_dir));
  FLAP_TRY(flap_output_list(output_dir, &list));
  flap_status status = FLAP_OK;
  bool found = false;
  for (size_t i = list.count; i > 0 && !found && status == FLAP_OK; i--) {
    status = flap_output_checkpoint_path(output_dir, list.steps[i - 1], folder_out);
    if (status == FLAP_OK)
      status = flap_output_look(folder_out, STATE_FILE, &found);
  }
  const size_t count = list.count;
  flap_output_steps_close(&list);
  FLAP_TRY(status);
  if (found)
    return open_found(folder_out, state_out);
  if (count > 0)
    return flap_error_set(FLAP_NOT_FOUND,
                          "resume_from_checkpoint: the checkpoints in %s hold weights only (save_only_model), without "
                          "the optimizer's states; give one as model_name_or_path to start anew from it",
                          output_dir);
  folder_out[0] = '\0';
  return or_none ? FLAP_OK
                 : flap_error_set(FLAP_NOT_FOUND,
                                  "resume_from_checkpoint: %s holds no checkpoint-<step>: with "
                                  "resume_from_checkpoint: auto a run starts anew where no checkpoint is",
                                  output_dir);
}

/* Of the folder of a run; "" where it has none. For advice: what cannot be looked at is not there. */
static void newest_in(const char *output_dir, char path_out[FLAP_PATH_MAX]) {
  flap_output_steps list;
  path_out[0] = '\0';
  if (flap_output_list(output_dir, &list) != FLAP_OK) {
    flap_error_clear();
    return;
  }
  if (list.count > 0 && flap_output_checkpoint_path(output_dir, list.steps[list.count - 1], path_out) != FLAP_OK)
    path_out[0] = '\0';
  flap_output_steps_close(&list);
}

flap_status flap_checkpoint_check_model(const char *output_dir) {
  char newest[FLAP_PATH_MAX];
  bool there = false;
  FLAP_TRY(flap_output_look(output_dir, CONFIG_FILE, &there));
  if (there)
    return FLAP_OK;
  newest_in(output_dir, newest);
  if (newest[0] != '\0')
    return flap_error_set(FLAP_NOT_FOUND, "%s holds no trained model, but checkpoints: add model_name_or_path=%s",
                          output_dir, newest);
  return flap_error_set(FLAP_NOT_FOUND, "%s holds no model (" CONFIG_FILE "): train it first, or name another folder",
                        output_dir);
}

/* What is there has no trainer_state.json. */
static flap_status refuse_weights_only(const char *folder) {
  char newest[FLAP_PATH_MAX];
  bool ours = false;
  newest_in(folder, newest);
  if (newest[0] != '\0')
    return flap_error_set(FLAP_INVALID,
                          "resume_from_checkpoint: %s is the folder of a run: name a checkpoint in it, such as %s",
                          folder, newest);
  FLAP_TRY(flap_output_is_ours(folder, &ours));
  return flap_error_set(FLAP_NOT_FOUND,
                        "resume_from_checkpoint: %s holds no " STATE_FILE "%s; give it as model_name_or_path to start "
                        "anew from its weights",
                        folder, ours ? ": it was saved with save_only_model, weights only" : "");
}

flap_status flap_checkpoint_lies_in(const char *folder, const char *output_dir, bool *lies_out) {
  char parent[FLAP_PATH_MAX], real[FLAP_PATH_MAX];
  struct stat about;
  *lies_out = false;
  if (flap_system_stat(output_dir, &about) != 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "output_dir: %s cannot be looked at", output_dir);
  parent_of(folder, parent);
  *lies_out = flap_system_is_same(parent, output_dir);
  if (*lies_out)
    return FLAP_OK;
  if (realpath(folder, real) == NULL)
    return flap_error_set_os(errno, "%s cannot be looked at", folder);
  parent_of(real, parent);
  *lies_out = flap_system_is_same(parent, output_dir);
  return FLAP_OK;
}

/* A crash may have left the folder under its temporary name; but where another run writes, that name is a checkpoint in
 * the making. The caller has the lock of output_dir. Folders of other names are nobody's to touch. */
static flap_status recover_named(const char *output_dir, const char *folder) {
  char parent[FLAP_PATH_MAX];
  struct stat about;
  uint64_t step;
  if (flap_system_stat(folder, &about) == 0 || !flap_output_parse_name(name_of(folder), "", &step))
    return FLAP_OK;
  parent_of(folder, parent);
  if (flap_system_stat(parent, &about) != 0)
    return FLAP_OK;
  if (flap_system_is_same(parent, output_dir))
    return flap_durable_recover_folder(folder);
  flap_run_lock lock;
  FLAP_TRY(flap_run_lock_take(parent, &lock));
  const flap_status status = flap_durable_recover_folder(folder);
  flap_run_lock_release(&lock);
  return status;
}

/* Whoever goes back beside later checkpoints would lose what is trained now: the next life would go on from the latest,
 * and what is beyond save_total_limit goes by its step. */
static flap_status refuse_later(const char *output_dir, const char *folder, uint64_t step) {
  char names[256] = "";
  flap_output_steps list;
  FLAP_TRY(flap_output_list(output_dir, &list));
  size_t later = 0;
  for (size_t i = 0; i < list.count; i++) {
    const size_t used = strlen(names);
    if (list.steps[i] > step && later++ < LATER_NAMED_MAX)
      (void)snprintf(names + used, sizeof names - used, "%s" CHECKPOINT "%" PRIu64, used > 0 ? ", " : "",
                     list.steps[i]);
  }
  flap_output_steps_close(&list);
  if (later == 0)
    return FLAP_OK;
  if (later > LATER_NAMED_MAX)
    (void)snprintf(names + strlen(names), sizeof names - strlen(names), " and %zu more", later - LATER_NAMED_MAX);
  return flap_error_set(FLAP_INVALID,
                        "resume_from_checkpoint: %s is not the latest in output_dir: %s holds %s, from which the next "
                        "life would go on: to go back, move what is later away or delete it, or give another "
                        "output_dir; to go on from the latest, set resume_from_checkpoint: true",
                        folder, output_dir, names);
}

/* A checkpoint that was named, by whatever name. */
static flap_status open_named(const char *output_dir, const char *folder, flap_trainer_state *state_out) {
  uint64_t step = 0;
  const bool has_step = flap_output_parse_name(name_of(folder), "", &step);
  bool inside = false;
  FLAP_TRY(flap_checkpoint_lies_in(folder, output_dir, &inside));
  if (inside && has_step)
    FLAP_TRY(refuse_later(output_dir, folder, step));
  FLAP_TRY(open_found(folder, state_out));
  return inside && !has_step ? refuse_later(output_dir, folder, state_out->step) : FLAP_OK;
}

flap_status flap_checkpoint_find(const char *output_dir, const char *resume_from, char folder_out[FLAP_PATH_MAX],
                                 flap_trainer_state *state_out) {
  if (strcmp(resume_from, "true") == 0)
    return find_newest(output_dir, false, folder_out, state_out);
  if (strcmp(resume_from, "auto") == 0)
    return find_newest(output_dir, true, folder_out, state_out);
  size_t length = strlen(resume_from);
  while (length > 1 && resume_from[length - 1] == '/')
    length--;
  if (length == 0 || length >= FLAP_PATH_MAX)
    return flap_error_set(FLAP_INVALID, "resume_from_checkpoint: the path is %s", length ? "too long" : "empty");
  memcpy(folder_out, resume_from, length);
  folder_out[length] = '\0';
  struct stat about;
  flap_status status = recover_named(output_dir, folder_out);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "resume_from_checkpoint");
  if (flap_system_stat(folder_out, &about) != 0)
    return flap_error_set_os(errno, "resume_from_checkpoint: %s", folder_out);
  if (!S_ISDIR(about.st_mode))
    return flap_error_set(FLAP_INVALID, "resume_from_checkpoint: %s is not a folder", folder_out);
  bool there = false;
  FLAP_TRY(flap_output_look(folder_out, STATE_FILE, &there));
  return there ? open_named(output_dir, folder_out, state_out) : refuse_weights_only(folder_out);
}

/* ---- sizes --------------------------------------------------------------------------------------------------- */

/* Upwards: config.json and trainer_state.json are a few kilobytes; tokenizer
 * files have up to some 140 bytes per token (Llama 3: 17 MB for 128,256 tokens), and what else is carried some 17 more.
 */
static uint64_t artifact_bytes(const flap_model_config *config) {
  return ((uint64_t)32 << 10) + (uint64_t)config->vocab_size * 160;
}

flap_status flap_checkpoint_export_bytes(const flap_model_config *config, flap_dtype dtype, uint64_t *bytes_out) {
  FLAP_TRY(flap_weights_file_bytes(config, dtype, FLAP_SAFETENSORS_SHARD_BYTES, bytes_out));
  *bytes_out += artifact_bytes(config);
  return FLAP_OK;
}

flap_status flap_checkpoint_bytes(const flap_model_config *config, flap_dtype dtype, flap_optim optim, bool only_model,
                                  uint64_t *bytes_out) {
  uint64_t states = 0;
  FLAP_TRY(flap_checkpoint_export_bytes(config, dtype, bytes_out));
  if (!only_model)
    FLAP_TRY(flap_weights_states_bytes(config, dtype, optim, &states));
  *bytes_out += states + (only_model ? 0 : MATMUL_BYTES);
  return FLAP_OK;
}
