/* flap inspect: the checkpoints of a run, and whether they are what was saved. */
#include "base/system.h"
#include "base/units.h"
#include "engine/engine.h"
#include "engine/store/output_folder_internal.h"
#include "engine/store/state_pages.h"
#include "io/formats/checksums.h"
#include "io/formats/durable.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define STATE_FILE "trainer_state.json"
#define UNFINISHED ".tmp"

/* Sizes and the newest time of the files in a folder. */
static flap_status measure(const char *folder, flap_checkpoint_report *r) {
  const int fd = flap_system_open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
  if (list == NULL) {
    const int os_error = errno;
    if (fd >= 0)
      (void)flap_system_close(fd);
    return flap_error_set_os(os_error, "cannot list the folder %s", folder);
  }
  flap_status status = FLAP_OK;
  for (const struct dirent *entry; status == FLAP_OK && (entry = readdir(list)) != NULL;) {
    char path[FLAP_PATH_MAX];
    struct stat about;
    status = flap_durable_join(path, folder, entry->d_name);
    if (status != FLAP_OK || flap_system_lstat(path, &about) != 0 || !S_ISREG(about.st_mode))
      continue;
    r->bytes += (uint64_t)about.st_size;
    if ((int64_t)about.st_mtime > r->saved_at)
      r->saved_at = (int64_t)about.st_mtime;
  }
  (void)closedir(list);
  return status;
}

static void say_broken(flap_checkpoint_report *r) {
  r->state = FLAP_CHECKPOINT_BROKEN;
  (void)snprintf(r->problem, sizeof r->problem, "%s", flap_error_message());
  flap_error_clear();
}

/* Files that are checked page by page. */
static flap_status verify_pages(const char *folder) {
  const flap_status status = flap_state_pages_verify(folder, false);
  if (status != FLAP_NOT_FOUND)
    return status;
  flap_error_clear();
  return FLAP_OK;
}

static flap_status compare(const char *folder, bool verify, flap_checkpoint_report *r) {
  flap_checksums checksums = {0};
  const uint64_t started_ns = flap_units_now_ns();
  flap_status status = flap_checksums_read(folder, &checksums);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    r->state = FLAP_CHECKPOINT_UNKNOWN;
    return FLAP_OK;
  }
  if (status == FLAP_OK)
    status = flap_checksums_check_sizes(&checksums, folder);
  for (size_t i = 0; i < checksums.count && status == FLAP_OK && verify; i++)
    status = flap_checksums_check_file(&checksums.entries[i], folder);
  if (status == FLAP_OK && verify)
    status = verify_pages(folder);
  flap_checksums_close(&checksums);
  r->state = verify ? FLAP_CHECKPOINT_WHOLE : FLAP_CHECKPOINT_UNREAD;
  r->read_seconds = (double)(flap_units_now_ns() - started_ns) * 1e-9;
  return status;
}

/* Without the states there is no such file, and nothing to go on from. */
static flap_status read_state(const char *folder, flap_checkpoint_report *r) {
  flap_trainer_state state;
  if (!r->resumable)
    return FLAP_OK;
  FLAP_TRY(flap_checkpoint_read_state(folder, &state));
  r->step = state.step;
  (void)snprintf(r->numerics, sizeof r->numerics, "%s", state.numerics);
  return FLAP_OK;
}

static void look(const char *folder, bool verify, flap_checkpoint_report *r) {
  (void)snprintf(r->folder, sizeof r->folder, "%s", folder);
  r->resumable = flap_output_is_there(folder, STATE_FILE); /* broken or not */
  if (measure(folder, r) != FLAP_OK || compare(folder, verify, r) != FLAP_OK || read_state(folder, r) != FLAP_OK)
    say_broken(r);
}

static bool is_folder(const char *path) {
  struct stat about;
  return flap_system_stat(path, &about) == 0 && S_ISDIR(about.st_mode);
}

/* A finished checkpoint, and what a crash left of one, may have the same step. */
static void look_at_step(const char *folder, uint64_t step, bool verify,
                         void (*report)(void *context, const flap_checkpoint_report *report), void *context,
                         uint32_t *count) {
  static const char *const suffixes[] = {"", UNFINISHED};
  for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
    static flap_checkpoint_report r; /* long paths; one caller at a time */
    char path[FLAP_PATH_MAX];
    if (flap_output_checkpoint_path(folder, step, path) != FLAP_OK ||
        strlen(path) + strlen(suffixes[i]) >= sizeof path) {
      flap_error_clear();
      continue;
    }
    strcat(path, suffixes[i]);
    if (!is_folder(path))
      continue; /* or a run that goes on has just removed it */
    r = (flap_checkpoint_report){.step = step};
    look(path, verify && i == 0, &r);
    if (i > 0) {
      r.state = FLAP_CHECKPOINT_UNFINISHED;
      r.problem[0] = '\0';
    }
    report(context, &r);
    (*count)++;
  }
}

flap_status flap_engine_inspect(const char *folder, bool verify,
                                void (*report)(void *context, const flap_checkpoint_report *report), void *context,
                                uint32_t *count_out) {
  flap_output_steps list = {0};
  *count_out = 0;
  FLAP_TRY(flap_output_list_all(folder, &list));
  for (size_t i = 0; i < list.count; i++)
    if (i == 0 || list.steps[i] != list.steps[i - 1])
      look_at_step(folder, list.steps[i], verify, report, context, count_out);
  flap_output_steps_close(&list);
  if (*count_out == 0 &&
      (flap_output_is_there(folder, STATE_FILE) || flap_output_is_there(folder, FLAP_CHECKSUMS_FILE))) {
    static flap_checkpoint_report r;
    const char *slash = strrchr(folder, '/');
    r = (flap_checkpoint_report){0};
    (void)flap_output_parse_name(slash != NULL ? slash + 1 : folder, "", &r.step);
    look(folder, verify, &r);
    report(context, &r);
    *count_out = 1;
  }
  return FLAP_OK;
}
