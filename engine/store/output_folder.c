/* What lies in an output_dir: listing, clearing, and the final model.
 *
 * Nothing is deleted that FLAP did not write: folders and weights must carry FLAP's mark in their metadata; metrics,
 * traces and what is left of interrupted writes are known by their names.
 */
#include "engine/store/output_folder_internal.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/store/finished.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights.h"
#include "engine/store/weights_internal.h"
#include "io/formats/durable.h"
#include "io/formats/metrics.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHECKPOINT "checkpoint-"
#define CONFIG_FILE "config.json"
#define METRICS_FILE "metrics.jsonl"
#define TRACE_FILE "trace.json"
/* The model to be is assembled in `<output_dir>/export.tmp`. */
#define EXPORT_FOLDER "export"

/* ---- names --------------------------------------------------------------------------------------------------- */

bool flap_output_parse_name(const char *name, const char *suffix, uint64_t *step_out) {
  const size_t prefix = strlen(CHECKPOINT);
  if (strncmp(name, CHECKPOINT, prefix) != 0)
    return false;
  const char *digits = name + prefix, *at = digits;
  uint64_t step = 0;
  for (; *at >= '0' && *at <= '9'; at++) {
    if (step > (UINT64_MAX - 9) / 10)
      return false;
    step = step * 10 + (uint64_t)(*at - '0');
  }
  if (at == digits || (digits[0] == '0' && at - digits > 1) || strcmp(at, suffix) != 0)
    return false;
  *step_out = step;
  return true;
}

flap_status flap_output_checkpoint_path(const char *output_dir, uint64_t step, char path_out[FLAP_PATH_MAX]) {
  char name[48];
  (void)snprintf(name, sizeof name, CHECKPOINT "%" PRIu64, step);
  return flap_durable_join(path_out, output_dir, name);
}

/* "model-00001-of-00003.safetensors"; stores 3. */
static bool is_shard(const char *name, unsigned *shards_out) {
  unsigned shard = 0, shards = 0;
  int length = 0;
  if (sscanf(name, "model-%10u-of-%10u.safetensors%n", &shard, &shards, &length) != 2 || length == 0 ||
      name[length] != '\0')
    return false;
  *shards_out = shards;
  return true;
}

static bool is_weights(const char *name) {
  unsigned shards;
  return strcmp(name, FLAP_SAFETENSORS_FILE) == 0 || strcmp(name, FLAP_SAFETENSORS_INDEX) == 0 ||
         is_shard(name, &shards);
}

flap_status flap_output_look(const char *folder, const char *name, bool *there_out) {
  char path[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, name));
  return flap_durable_look(path, there_out);
}

bool flap_output_is_there(const char *folder, const char *name) {
  bool there = false;
  if (flap_output_look(folder, name, &there) != FLAP_OK)
    flap_error_clear();
  return there;
}

flap_status flap_output_is_ours(const char *folder, bool *ours_out) {
  flap_safetensors *reader = NULL;
  *ours_out = false;
  const flap_status status = flap_safetensors_open(folder, &reader);
  if (status == FLAP_IO || status == FLAP_NO_MEMORY)
    return status;
  if (status != FLAP_OK) {
    flap_error_clear();
    return FLAP_OK;
  }
  const char *mark = flap_safetensors_metadata(reader, FLAP_WEIGHTS_MARK_KEY);
  *ours_out = mark != NULL && strcmp(mark, FLAP_WEIGHTS_MARK_VALUE) == 0;
  flap_safetensors_close(reader);
  return FLAP_OK;
}

/* ---- walking ------------------------------------------------------------------------------------------------- */

typedef flap_status (*entry_fn)(void *context, const char *folder, const char *name);

/* Calls `visit` for each name; a folder that is not there has none. `visit` may remove the entry it is given. */
static flap_status walk(const char *folder, entry_fn visit, void *context) {
  const int fd = flap_system_open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (fd < 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "cannot list the folder %s", folder);
  DIR *list = fdopendir(fd);
  if (list == NULL) {
    const int os_error = errno;
    (void)flap_system_close(fd);
    return flap_error_set_os(os_error, "cannot list the folder %s", folder);
  }
  flap_status status = FLAP_OK;
  while (status == FLAP_OK) {
    errno = 0;
    const struct dirent *entry = readdir(list);
    if (entry == NULL) {
      if (errno != 0)
        status = flap_error_set_os(errno, "cannot list the folder %s", folder);
      break;
    }
    if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
      status = visit(context, folder, entry->d_name);
  }
  (void)closedir(list);
  return status;
}

static flap_status add_step(flap_output_steps *steps, uint64_t step) {
  if (steps->count == steps->capacity) {
    const size_t capacity = steps->capacity ? 2 * steps->capacity : 16;
    uint64_t *larger = realloc(steps->steps, capacity * sizeof *larger);
    if (larger == NULL)
      return flap_error_set(FLAP_NO_MEMORY, "no memory for a list of checkpoints");
    steps->steps = larger;
    steps->capacity = capacity;
  }
  steps->steps[steps->count++] = step;
  return FLAP_OK;
}

static flap_status visit_step(void *context, const char *folder, const char *name) {
  (void)folder;
  uint64_t step;
  return flap_output_parse_name(name, "", &step) ? add_step(context, step) : FLAP_OK;
}

static flap_status visit_interrupted(void *context, const char *folder, const char *name) {
  (void)folder;
  uint64_t step;
  return flap_output_parse_name(name, ".tmp", &step) || flap_output_parse_name(name, ".tmp.old", &step)
             ? add_step(context, step)
             : FLAP_OK;
}

static int by_step(const void *a, const void *b) {
  const uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
  return left < right ? -1 : left > right;
}

static flap_status list_steps(const char *output_dir, entry_fn visit, flap_output_steps *steps_out) {
  *steps_out = (flap_output_steps){0};
  const flap_status status = walk(output_dir, visit, steps_out);
  if (status != FLAP_OK)
    flap_output_steps_close(steps_out);
  else if (steps_out->count > 0)
    qsort(steps_out->steps, steps_out->count, sizeof *steps_out->steps, by_step);
  return status;
}

flap_status flap_output_list(const char *output_dir, flap_output_steps *steps_out) {
  return list_steps(output_dir, visit_step, steps_out);
}

static flap_status visit_any(void *context, const char *folder, const char *name) {
  FLAP_TRY(visit_step(context, folder, name));
  uint64_t step;
  return flap_output_parse_name(name, ".tmp", &step) ? add_step(context, step) : FLAP_OK;
}

flap_status flap_output_list_all(const char *output_dir, flap_output_steps *steps_out) {
  return list_steps(output_dir, visit_any, steps_out);
}

void flap_output_steps_close(flap_output_steps *steps) {
  free(steps->steps);
  *steps = (flap_output_steps){0};
}

static flap_status advise_leftover(flap_status status) {
  char message[2048];
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  return flap_error_set(status, "%s: an earlier life left it unfinished; make it writable, or move it away", message);
}

/* What cannot be removed is in nobody's way where later steps were saved. */
static flap_status recover_step(const char *output_dir, uint64_t step, const flap_output_steps *saved) {
  char path[FLAP_PATH_MAX];
  FLAP_TRY(flap_output_checkpoint_path(output_dir, step, path));
  const flap_status status = flap_durable_recover_folder(path);
  if (status == FLAP_OK)
    return FLAP_OK;
  if (saved->count == 0 || saved->steps[saved->count - 1] <= step)
    return advise_leftover(status);
  flap_log(FLAP_LOG_WARNING, "something of an old checkpoint stays: %s", flap_error_message());
  flap_error_clear();
  return FLAP_OK;
}

flap_status flap_output_recover(const char *output_dir) {
  char path[FLAP_PATH_MAX];
  flap_output_steps list = {0}, saved = {0};
  flap_status status = list_steps(output_dir, visit_interrupted, &list);
  if (status == FLAP_OK)
    status = flap_output_list(output_dir, &saved);
  for (size_t i = 0; i < list.count && status == FLAP_OK; i++)
    status = recover_step(output_dir, list.steps[i], &saved);
  flap_output_steps_close(&list);
  flap_output_steps_close(&saved);
  FLAP_TRY(status);
  FLAP_TRY(flap_durable_join(path, output_dir, EXPORT_FOLDER));
  status = flap_durable_recover_folder(path);
  return status == FLAP_OK ? FLAP_OK : advise_leftover(status);
}

/* ---- occupied, clear ----------------------------------------------------------------------------------------- */

typedef struct occupied {
  bool lines; /* those of steps count */
  char first[256];
} occupied;

typedef struct foreign {
  bool has_ours; /* weights */
  char first[256];
} foreign;

/* metrics.jsonl of a life that did no step is worth nothing. One that is not even a file is not FLAP's. */
static flap_status lines_count(const char *folder, bool lines, bool *count_out) {
  char path[FLAP_PATH_MAX];
  struct stat about;
  FLAP_TRY(flap_durable_join(path, folder, METRICS_FILE));
  if (lines)
    return flap_metrics_has_steps(path, count_out);
  if (flap_system_lstat(path, &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", path);
  *count_out = !S_ISREG(about.st_mode);
  return FLAP_OK;
}

/* Keeps the first name in byte order, so that the same folder always gives the same message. */
static flap_status visit_occupied(void *context, const char *folder, const char *name) {
  occupied *found = context;
  uint64_t step;
  bool counts = is_weights(name) || strcmp(name, CONFIG_FILE) == 0 || flap_output_parse_name(name, "", &step);
  if (strcmp(name, METRICS_FILE) == 0)
    FLAP_TRY(lines_count(folder, found->lines, &counts));
  if (counts && (found->first[0] == '\0' || strcmp(name, found->first) < 0))
    (void)snprintf(found->first, sizeof found->first, "%s", name);
  return FLAP_OK;
}

flap_status flap_checkpoint_occupied(const char *output_dir, bool lines, char what_out[FLAP_PATH_MAX]) {
  occupied found = {.lines = lines};
  what_out[0] = '\0';
  FLAP_TRY(walk(output_dir, visit_occupied, &found));
  if (found.first[0] != '\0')
    (void)snprintf(what_out, FLAP_PATH_MAX, "%.3800s/%s", output_dir, found.first);
  return FLAP_OK;
}

/* The part of output_dir's model that the name is of, or a checkpoint, by which somebody else's may be told. */
static flap_status visit_foreign(void *context, const char *folder, const char *name) {
  foreign *found = context;
  char path[FLAP_PATH_MAX];
  uint64_t step;
  bool ours = false;
  const bool model = is_weights(name) && strcmp(name, FLAP_SAFETENSORS_INDEX) != 0;
  if (!model && !flap_output_parse_name(name, "", &step))
    return FLAP_OK;
  FLAP_TRY(flap_durable_join(path, folder, name));
  FLAP_TRY(flap_output_is_ours(path, &ours));
  found->has_ours |= model && ours;
  if (!ours && (found->first[0] == '\0' || strcmp(name, found->first) < 0))
    (void)snprintf(found->first, sizeof found->first, "%s", name);
  return FLAP_OK;
}

/* config.json alone has no mark: where nothing else is of a run, it is somebody's model whose weights are not looked
 * for. */
flap_status flap_checkpoint_foreign(const char *output_dir, char what_out[FLAP_PATH_MAX]) {
  foreign found = {.has_ours = false};
  what_out[0] = '\0';
  FLAP_TRY(walk(output_dir, visit_foreign, &found));
  if (found.first[0] == '\0' && !found.has_ours && flap_output_is_there(output_dir, CONFIG_FILE) &&
      !flap_output_is_there(output_dir, METRICS_FILE))
    (void)snprintf(found.first, sizeof found.first, "%s", CONFIG_FILE);
  if (found.first[0] != '\0')
    (void)snprintf(what_out, FLAP_PATH_MAX, "%.3800s/%s", output_dir, found.first);
  return FLAP_OK;
}

static flap_status remove_file(const char *folder, const char *name) {
  char path[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, name));
  if (flap_system_unlink(path) != 0 && errno != ENOENT)
    return flap_error_set_os(errno, "cannot remove %s", path);
  return FLAP_OK;
}

static flap_status visit_remove_weights(void *context, const char *folder, const char *name) {
  (void)context;
  return is_weights(name) ? remove_file(folder, name) : FLAP_OK;
}

static flap_status clear_checkpoints(const char *output_dir) {
  char path[FLAP_PATH_MAX];
  bool ours = false;
  flap_output_steps list = {0};
  FLAP_TRY(flap_output_list(output_dir, &list));
  flap_status status = FLAP_OK;
  for (size_t i = 0; i < list.count && status == FLAP_OK; i++) {
    status = flap_output_checkpoint_path(output_dir, list.steps[i], path);
    if (status == FLAP_OK)
      status = flap_output_is_ours(path, &ours);
    if (status == FLAP_OK && ours)
      status = flap_durable_remove_folder(path);
  }
  flap_output_steps_close(&list);
  return status;
}

flap_status flap_checkpoint_clear_leftovers(const char *output_dir) {
  FLAP_TRY(flap_output_recover(output_dir));
  FLAP_TRY(flap_finished_remove(output_dir));
  FLAP_TRY(remove_file(output_dir, METRICS_FILE));
  return remove_file(output_dir, TRACE_FILE);
}

flap_status flap_checkpoint_clear(const char *output_dir) {
  struct stat about;
  bool ours = false;
  if (flap_system_stat(output_dir, &about) != 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "cannot look at %s", output_dir);
  FLAP_TRY(flap_checkpoint_clear_leftovers(output_dir));
  FLAP_TRY(clear_checkpoints(output_dir));
  FLAP_TRY(flap_output_is_ours(output_dir, &ours));
  if (ours) {
    FLAP_TRY(remove_file(output_dir, CONFIG_FILE)); /* without it nobody takes the rest for a model */
    for (size_t i = 0; i < FLAP_COMPANION_COUNT; i++)
      FLAP_TRY(remove_file(output_dir, flap_companion_names[i]));
    FLAP_TRY(walk(output_dir, visit_remove_weights, NULL));
  }
  return FLAP_OK;
}

/* A folder of that name goes with all that is in it. */
static bool is_cleared_folder(const char *name) {
  uint64_t step;
  return flap_output_parse_name(name, "", &step) || flap_output_parse_name(name, ".tmp", &step) ||
         strcmp(name, EXPORT_FOLDER ".tmp") == 0;
}

static bool is_cleared_file(const char *name) {
  static const char *const others[] = {CONFIG_FILE, METRICS_FILE, TRACE_FILE};
  bool found = is_weights(name);
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    found = found || strcmp(name, others[i]) == 0;
  for (size_t i = 0; i < FLAP_COMPANION_COUNT; i++)
    found = found || strcmp(name, flap_companion_names[i]) == 0;
  return found;
}

flap_status flap_checkpoint_clear_takes(const char *output_dir, const char *path, bool *takes_out) {
  char outer[FLAP_PATH_MAX], inner[FLAP_PATH_MAX];
  *takes_out = false;
  const char *missing = realpath(output_dir, outer) == NULL ? output_dir : realpath(path, inner) == NULL ? path : NULL;
  if (missing != NULL)
    return errno == ENOENT || errno == ENOTDIR ? FLAP_OK : flap_error_set_os(errno, "cannot look at %s", missing);
  const size_t length = strcmp(outer, "/") == 0 ? 0 : strlen(outer);
  if (strncmp(inner, outer, length) != 0 || (inner[length] != '/' && inner[length] != '\0'))
    return FLAP_OK;
  char *first = inner + length + (inner[length] == '/'), *rest = strchr(first, '/');
  if (rest != NULL)
    *rest = '\0';
  *takes_out = first[0] == '\0' || is_cleared_folder(first) || (rest == NULL && is_cleared_file(first));
  return FLAP_OK;
}

/* ---- what clearing frees --------------------------------------------------------------------------------------- */

typedef struct freed {
  dev_t device;
  uint64_t bytes;
} freed;

/* A file with another name frees nothing, and one that lies elsewhere nothing here. */
static flap_status visit_count(void *context, const char *folder, const char *name) {
  freed *sum = context;
  struct stat about;
  char path[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, name));
  if (flap_system_lstat(path, &about) != 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "cannot look at %s", path);
  if (S_ISREG(about.st_mode) && about.st_nlink == 1 && about.st_dev == sum->device)
    sum->bytes += (uint64_t)about.st_blocks * 512;
  return FLAP_OK;
}

static flap_status visit_count_weights(void *context, const char *folder, const char *name) {
  return is_weights(name) ? visit_count(context, folder, name) : FLAP_OK;
}

static flap_status visit_count_folder(void *context, const char *folder, const char *name) {
  char path[FLAP_PATH_MAX];
  uint64_t step;
  bool gone = flap_output_parse_name(name, ".tmp", &step) || strcmp(name, EXPORT_FOLDER ".tmp") == 0;
  if (!gone && !flap_output_parse_name(name, "", &step))
    return FLAP_OK;
  FLAP_TRY(flap_durable_join(path, folder, name));
  if (!gone)
    FLAP_TRY(flap_output_is_ours(path, &gone));
  return gone ? walk(path, visit_count, context) : FLAP_OK;
}

flap_status flap_checkpoint_clear_bytes(const char *output_dir, uint64_t *bytes_out) {
  struct stat about;
  bool ours = false;
  *bytes_out = 0;
  if (flap_system_stat(output_dir, &about) != 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "cannot look at %s", output_dir);
  freed sum = {.device = about.st_dev};
  FLAP_TRY(walk(output_dir, visit_count_folder, &sum));
  FLAP_TRY(flap_output_is_ours(output_dir, &ours));
  if (ours)
    FLAP_TRY(walk(output_dir, visit_count_weights, &sum));
  FLAP_TRY(visit_count(&sum, output_dir, METRICS_FILE));
  FLAP_TRY(visit_count(&sum, output_dir, TRACE_FILE));
  *bytes_out = sum.bytes;
  return FLAP_OK;
}

/* ---- the final model ----------------------------------------------------------------------------------------- */

flap_status flap_output_write_artifacts(const char *folder, const flap_artifacts *artifacts, flap_dtype dtype) {
  const flap_tokenizer *tokenizer = artifacts->tokenizer;
  const flap_companions *companions = artifacts->companions;
  char path[FLAP_PATH_MAX], *text = NULL;
  FLAP_TRY(flap_durable_join(path, folder, CONFIG_FILE));
  FLAP_TRY(flap_hf_config_format(artifacts->model, dtype, tokenizer != NULL ? flap_tokenizer_end(tokenizer) : -1,
                                 tokenizer != NULL ? flap_tokenizer_begin(tokenizer) : -1,
                                 companions != NULL ? &companions->ids : NULL, &text));
  const flap_status status = flap_durable_write_file(path, text, strlen(text));
  free(text);
  FLAP_TRY(status);
  if (companions != NULL)
    FLAP_TRY(flap_companions_save(companions, folder));
  return tokenizer != NULL ? flap_tokenizer_save(tokenizer, folder) : FLAP_OK;
}

typedef struct install {
  const char *to;
  const char *head; /* the file without which nobody finds the weights: moved last */
  unsigned shards;
} install;

static flap_status move_file(const char *from_folder, const char *to_folder, const char *name) {
  char from[FLAP_PATH_MAX], to[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(from, from_folder, name));
  FLAP_TRY(flap_durable_join(to, to_folder, name));
  if (flap_system_rename(from, to, 0) != 0)
    return flap_error_set_os(errno, "cannot rename %s to %s", from, to);
  return FLAP_OK;
}

static flap_status visit_move(void *context, const char *folder, const char *name) {
  install *in = context;
  unsigned shards;
  if (is_shard(name, &shards))
    in->shards = shards;
  return strcmp(name, in->head) == 0 ? FLAP_OK : move_file(folder, in->to, name);
}

static flap_status visit_remove_stale(void *context, const char *folder, const char *name) {
  const install *in = context;
  unsigned shards;
  const bool stale = is_shard(name, &shards) ? shards != in->shards : is_weights(name) && strcmp(name, in->head) != 0;
  return stale ? remove_file(folder, name) : FLAP_OK;
}

/* Whatever moment this is cut short at, the folder holds the old weights whole, the new ones whole, or none that
 * anybody would load: an old index goes before any shard is replaced, and the new index, or the new single file, comes
 * last. Readers prefer the single file, so an old index beside it does no harm. */
flap_status flap_output_install(const char *from, const char *to) {
  bool sharded = false;
  FLAP_TRY(flap_output_look(from, FLAP_SAFETENSORS_INDEX, &sharded));
  install in = {.to = to, .head = sharded ? FLAP_SAFETENSORS_INDEX : FLAP_SAFETENSORS_FILE};
  char anything[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(anything, to, in.head));
  if (sharded) {
    FLAP_TRY(remove_file(to, FLAP_SAFETENSORS_INDEX));
    FLAP_TRY(flap_durable_sync_parent(anything));
  }
  FLAP_TRY(walk(from, visit_move, &in));
  FLAP_TRY(flap_durable_sync_parent(anything));
  FLAP_TRY(move_file(from, to, in.head));
  FLAP_TRY(flap_durable_sync_parent(anything));
  FLAP_TRY(walk(to, visit_remove_stale, &in));
  return flap_durable_sync_parent(anything);
}

flap_status flap_checkpoint_export(const char *output_dir, flap_pager *pager, const flap_layout *layout,
                                   const flap_artifacts *artifacts) {
  char final[FLAP_PATH_MAX], temporary[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_make_folder(output_dir));
  FLAP_TRY(flap_durable_join(final, output_dir, EXPORT_FOLDER));
  flap_status status;
  FLAP_WITH_ROOM(status, artifacts->piece.room, flap_durable_begin_folder(final, temporary));
  FLAP_TRY(status);
  FLAP_WITH_ROOM(status, artifacts->piece.room,
                 flap_output_write_artifacts(temporary, artifacts, layout->spec.shape.dtype));
  if (status == FLAP_OK)
    status = flap_weights_save(pager, layout, temporary, FLAP_SAFETENSORS_SHARD_BYTES, artifacts->piece, NULL);
  if (status == FLAP_OK)
    status = flap_output_install(temporary, output_dir);
  flap_durable_abort_folder(final);
  return status == FLAP_OK ? FLAP_OK : flap_error_prefix(status, "exporting to %s", output_dir);
}
