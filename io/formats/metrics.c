/* metrics.jsonl: lines built in a fixed buffer and handed over in one write. */
#include "io/formats/metrics.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"
#include "io/formats/json_escape.h"
#include "io/formats/json_file.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NUMBER_BYTES 40
/* That a line takes where it finds none, from a block to a large one. */
#define ROOM_BYTES_MIN ((uint64_t)4 << 10)
#define ROOM_BYTES_MAX ((uint64_t)64 << 10)

struct flap_metrics {
  char *path;
  int fd;
  flap_room *room;
  uint32_t depth; /* 0: no line begun */
  bool needs_comma;
  bool overflowed;
  size_t used;
  char line[FLAP_METRICS_LINE_BYTES_MAX];
};

/* ---- resuming ------------------------------------------------------------------------------------------ */

/* NULL: it is no JSON. */
static flap_status parse_line(const char *path, const char *text, size_t length, json_t **root_out) {
  json_error_t error;
  *root_out = flap_json_parse(text, length, JSON_REJECT_DUPLICATES, &error);
  if (!*root_out && flap_json_no_memory())
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to read a line", path);
  return FLAP_OK;
}

static flap_status is_kept(const char *path, const char *text, size_t length, int64_t keep_to_step, bool *kept_out,
                           bool *sound_out) {
  json_t *root;
  *kept_out = false;
  FLAP_TRY(parse_line(path, text, length, &root));
  const json_t *step = json_object_get(root, "step");
  *sound_out = json_is_object(root);
  *kept_out = *sound_out && (!step || (json_is_integer(step) && json_integer_value(step) <= keep_to_step));
  json_decref(root);
  return FLAP_OK;
}

/* Copies the lines to keep to `to` (NULL: nowhere); tells whether the copy differs from the file. */
static flap_status filter_lines(FILE *from, const char *path, int64_t keep_to_step, flap_durable_file *to,
                                bool *differs_out) {
  char *line = NULL;
  size_t capacity = 0;
  ssize_t length;
  flap_status status = FLAP_OK;
  bool differs = false;
  unsigned long number = 0;
  errno = 0;
  while (status == FLAP_OK && (length = getline(&line, &capacity, from)) > 0) {
    bool whole = line[length - 1] == '\n';
    bool kept, sound;
    number++;
    status = is_kept(path, line, (size_t)length, keep_to_step, &kept, &sound);
    if (status != FLAP_OK)
      break;
    if (to && whole && !sound) /* the last one may be torn */
      flap_log(FLAP_LOG_WARNING, "%s:%lu: not a line of JSON any more: it is dropped", path, number);
    differs = differs || !whole || !kept;
    if (kept && to)
      status = flap_durable_append(to, line, (uint64_t)length);
    if (kept && to && !whole && status == FLAP_OK)
      status = flap_durable_append(to, "\n", 1);
  }
  if (status == FLAP_OK && !feof(from))
    status = flap_error_set_os(errno ? errno : EIO, "cannot read %s", path);
  free(line);
  *differs_out = differs;
  return status;
}

static flap_status rewrite(FILE *from, const char *path, int64_t keep_to_step) {
  flap_durable_file file;
  bool differs;
  FLAP_TRY(flap_durable_begin_file(&file, path));
  flap_status status = filter_lines(from, path, keep_to_step, &file, &differs);
  if (status != FLAP_OK) {
    flap_durable_abort_file(&file);
    return status;
  }
  return flap_durable_commit_file(&file);
}

/* NULL: it is not there. */
static flap_status open_lines(const char *path, FILE **from_out) {
  struct stat about;
  *from_out = NULL;
  if (flap_system_stat(path, &about) != 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "cannot look at %s", path);
  if (!S_ISREG(about.st_mode)) /* a pipe may have no other end, and some devices none at all */
    return flap_error_set(FLAP_IO, "%s is not a regular file: take it away", path);
  const int fd = flap_system_open(path, O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", path);
  *from_out = fdopen(fd, "r");
  if (*from_out)
    return FLAP_OK;
  const int os_error = errno;
  (void)flap_system_close(fd);
  return flap_error_set_os(os_error, "cannot read %s", path);
}

static flap_status drop_later_lines(const char *path, int64_t keep_to_step) {
  FILE *from = NULL;
  FLAP_TRY(open_lines(path, &from));
  if (!from)
    return FLAP_OK;
  bool differs = false;
  flap_status status = filter_lines(from, path, keep_to_step, NULL, &differs);
  if (status == FLAP_OK && differs) {
    rewind(from);
    status = rewrite(from, path, keep_to_step);
  }
  (void)fclose(from);
  return status;
}

/* ---- looking ------------------------------------------------------------------------------------------- */

static flap_status match_line(const char *path, const char *text, size_t length, int64_t step, const char *const *keys,
                              uint32_t key_count, flap_metrics_line *line_out, bool *found_out) {
  json_t *root = NULL;
  if (memmem(text, length, keys[0], strlen(keys[0])) == NULL) /* most lines are of others, and need not be parsed */
    return FLAP_OK;
  FLAP_TRY(parse_line(path, text, length, &root));
  const json_t *of = json_object_get(root, "step");
  bool found = json_is_integer(of) && (step < 0 || json_integer_value(of) == step);
  for (uint32_t i = 0; i < key_count && found; i++) {
    const json_t *value = json_object_get(root, keys[i]);
    found = value != NULL;
    line_out->values[i] = json_is_number(value) ? json_number_value(value) : (double)NAN;
  }
  line_out->step = found ? json_integer_value(of) : -1;
  *found_out = found;
  json_decref(root);
  return FLAP_OK;
}

flap_status flap_metrics_find(const char *path, int64_t step, const char *const *keys, uint32_t key_count,
                              flap_metrics_line *line_out, bool *found_out) {
  FILE *from = NULL;
  char *text = NULL;
  size_t capacity = 0;
  ssize_t length;
  flap_assert(key_count > 0 && key_count <= FLAP_METRICS_KEYS_MAX);
  *found_out = false;
  FLAP_TRY(open_lines(path, &from));
  if (!from)
    return FLAP_OK;
  flap_status status = FLAP_OK;
  errno = 0;
  while (status == FLAP_OK && !*found_out && (length = getline(&text, &capacity, from)) > 0)
    status = match_line(path, text, (size_t)length, step, keys, key_count, line_out, found_out);
  if (status == FLAP_OK && !*found_out && !feof(from))
    status = flap_error_set_os(errno ? errno : EIO, "cannot read %s", path);
  free(text);
  (void)fclose(from);
  return status;
}

static flap_status is_of_step_0(const char *path, const char *text, size_t length, bool *is_out) {
  json_t *root;
  *is_out = false;
  FLAP_TRY(parse_line(path, text, length, &root));
  const json_t *step = json_object_get(root, "step");
  *is_out = json_is_integer(step) && json_integer_value(step) == 0;
  json_decref(root);
  return FLAP_OK;
}

static flap_status look_for_steps(int fd, const char *path, uint64_t bytes, bool *has_out) {
  char text[FLAP_METRICS_LINE_BYTES_MAX];
  *has_out = bytes >= sizeof text; /* a line of step 0 is much shorter, and there is one */
  if (*has_out)
    return FLAP_OK;
  FLAP_TRY(flap_durable_read_all(fd, path, 0, text, bytes));
  for (uint64_t at = 0; at < bytes && !*has_out;) {
    const char *end = memchr(text + at, '\n', bytes - at);
    const size_t length = end ? (size_t)(end - text) - at : bytes - at;
    bool first = false;
    FLAP_TRY(is_of_step_0(path, text + at, length, &first));
    *has_out = !first;
    at += length + 1;
  }
  return FLAP_OK;
}

flap_status flap_metrics_has_steps(const char *path, bool *has_out) {
  struct stat about;
  *has_out = false;
  if (flap_system_lstat(path, &about) != 0)
    return errno == ENOENT ? FLAP_OK : flap_error_set_os(errno, "cannot look at %s", path);
  if (!S_ISREG(about.st_mode)) {
    *has_out = true;
    return FLAP_OK;
  }
  const int fd = flap_system_open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", path);
  const flap_status status = look_for_steps(fd, path, (uint64_t)about.st_size, has_out);
  (void)flap_system_close(fd);
  return status;
}

flap_status flap_metrics_open(const char *path, int64_t keep_to_step, flap_metrics **metrics_out) {
  if (keep_to_step >= 0)
    FLAP_TRY(drop_later_lines(path, keep_to_step));
  flap_metrics *metrics = calloc(1, sizeof *metrics);
  if (!metrics || !(metrics->path = strdup(path))) {
    free(metrics);
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a line", path);
  }
  int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (keep_to_step < 0 ? O_TRUNC : 0);
  metrics->fd = flap_system_open(path, flags, FLAP_DURABLE_FILE_MODE);
  if (metrics->fd < 0) {
    flap_status status = flap_error_set_os(errno, "cannot open %s", path);
    flap_metrics_close(metrics);
    return status;
  }
  /* What flap_metrics_sync makes last must have a name that lasts. */
  const flap_status status = flap_durable_sync_parent(path);
  if (status != FLAP_OK) {
    flap_metrics_close(metrics);
    return status;
  }
  *metrics_out = metrics;
  return FLAP_OK;
}

void flap_metrics_give_room(flap_metrics *metrics, flap_room *room) {
  metrics->room = room;
}

void flap_metrics_close(flap_metrics *metrics) {
  if (!metrics)
    return;
  if (metrics->fd >= 0)
    (void)flap_system_close(metrics->fd);
  free(metrics->path);
  free(metrics);
}

/* ---- building a line ----------------------------------------------------------------------------------- */

static void append(flap_metrics *metrics, const char *text, size_t length) {
  if (metrics->overflowed || length >= sizeof metrics->line - metrics->used) {
    metrics->overflowed = true;
    return;
  }
  memcpy(metrics->line + metrics->used, text, length);
  metrics->used += length;
}

static void append_quoted(flap_metrics *metrics, const char *text) {
  size_t length = flap_json_escape(text, metrics->line + metrics->used, sizeof metrics->line - metrics->used);
  if (length == 0)
    metrics->overflowed = true;
  metrics->used += length;
}

static void append_key(flap_metrics *metrics, const char *key) {
  flap_assert(metrics->depth > 0);
  if (metrics->needs_comma)
    append(metrics, ", ", 2);
  append_quoted(metrics, key);
  append(metrics, ": ", 2);
  metrics->needs_comma = true;
}

void flap_metrics_begin_line(flap_metrics *metrics) {
  flap_assert(metrics->depth == 0);
  metrics->used = 0;
  metrics->overflowed = false;
  metrics->needs_comma = false;
  metrics->depth = 1;
  append(metrics, "{", 1);
}

void flap_metrics_add_integer(flap_metrics *metrics, const char *key, int64_t value) {
  char text[NUMBER_BYTES];
  append_key(metrics, key);
  append(metrics, text, (size_t)snprintf(text, sizeof text, "%lld", (long long)value));
}

void flap_metrics_add_number(flap_metrics *metrics, const char *key, double value) {
  char text[NUMBER_BYTES];
  append_key(metrics, key);
  if (!isfinite(value)) {
    append(metrics, "null", 4);
    return;
  }
  int length = snprintf(text, sizeof text, "%.17g", value);
  /* A program that set a locale may have another decimal point. */
  for (char *at = text; *at; at++)
    if (!strchr("0123456789+-e", *at))
      *at = '.';
  append(metrics, text, (size_t)length);
}

void flap_metrics_add_bool(flap_metrics *metrics, const char *key, bool value) {
  append_key(metrics, key);
  append(metrics, value ? "true" : "false", value ? 4 : 5);
}

void flap_metrics_open_object(flap_metrics *metrics, const char *key) {
  append_key(metrics, key);
  append(metrics, "{", 1);
  metrics->needs_comma = false;
  metrics->depth++;
  flap_assert(metrics->depth <= FLAP_METRICS_DEPTH_MAX);
}

void flap_metrics_close_object(flap_metrics *metrics) {
  flap_assert(metrics->depth > 1);
  append(metrics, "}", 1);
  metrics->needs_comma = true;
  metrics->depth--;
}

/* What was written of one that fails is taken back. */
static flap_status write_line(flap_metrics *metrics) {
  off_t end = lseek(metrics->fd, 0, SEEK_END);
  if (end < 0)
    return flap_error_set_os(errno, "cannot append to %s", metrics->path);
  flap_status status = flap_durable_write_all(metrics->fd, metrics->path, metrics->line, metrics->used);
  if (status == FLAP_OK || flap_system_ftruncate(metrics->fd, end) == 0)
    return status;
  (void)flap_error_prefix(status, "the last line of %s is torn", metrics->path);
  return FLAP_IO;
}

flap_status flap_metrics_end_line(flap_metrics *metrics) {
  flap_assert(metrics->depth == 1);
  append(metrics, "}\n", 2);
  metrics->depth = 0;
  if (metrics->overflowed)
    return flap_error_set(FLAP_INVALID, "%s: a line is over %u bytes", metrics->path, FLAP_METRICS_LINE_BYTES_MAX);
  flap_status status = write_line(metrics);
  for (uint64_t bytes = ROOM_BYTES_MIN; bytes <= ROOM_BYTES_MAX && flap_room_helps(metrics->room, status, bytes);
       bytes *= 2)
    status = write_line(metrics);
  return status;
}

flap_status flap_metrics_sync(flap_metrics *metrics) {
  return flap_system_fsync(metrics->fd) == 0 ? FLAP_OK : flap_durable_write_error(errno, metrics->path);
}
