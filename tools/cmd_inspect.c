/* flap inspect: what is in a model, a checkpoint, a tokenizer or the folder of a run. */
#include "engine/engine.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"
#include "io/formats/safetensors.h"
#include "io/formats/tokenizer.h"
#include "tools/arguments.h"
#include "tools/text.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#define ARGUMENTS_MAX 16

static bool is_file(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

/* <folder>/<name>, if that is a file. */
static bool find_in(const char *folder, const char *name, char path_out[FLAP_DURABLE_PATH_MAX]) {
  return flap_durable_join(path_out, folder, name) == FLAP_OK && is_file(path_out);
}

static bool ends_with(const char *text, const char *end) {
  size_t length = strlen(text), end_length = strlen(end);
  return length >= end_length && strcmp(text + length - end_length, end) == 0;
}

/* ---- tensors --------------------------------------------------------------------------------------------- */

static void shape_text(const flap_safetensors_tensor *tensor, char *buffer, size_t bytes) {
  size_t used = (size_t)snprintf(buffer, bytes, "(");
  for (uint32_t i = 0; i < tensor->rank && used < bytes; i++)
    used += (size_t)snprintf(buffer + used, bytes - used, "%s%llu", i > 0 ? ", " : "",
                             (unsigned long long)tensor->shape[i]);
  if (used < bytes)
    (void)snprintf(buffer + used, bytes - used, ")");
}

/* Names come from a file: control characters must not reach the terminal. */
static void print_name(const char *name, int width) {
  int printed = 0;
  for (; *name; name++, printed++)
    putchar((unsigned char)*name < 0x20 || *name == 0x7f ? '?' : *name);
  printf("%*s", printed < width ? width - printed : 0, "");
}

static flap_status inspect_tensors(const char *path) {
  flap_safetensors *reader = NULL;
  FLAP_TRY(flap_safetensors_open(path, &reader));
  uint64_t count = flap_safetensors_count(reader), elements = 0;
  printf("%s\n", path);
  for (uint64_t i = 0; i < count; i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    char shape[160];
    shape_text(tensor, shape, sizeof shape);
    printf("  ");
    print_name(tensor->name, 56);
    printf(" %-5s %-20s %12s\n", flap_safetensors_dtype_name(tensor->dtype), shape,
           flap_text_bytes(tensor->bytes).text);
    elements += tensor->elements;
  }
  printf("  %s tensors, %s elements, %s\n", flap_text_grouped(count).text, flap_text_grouped(elements).text,
         flap_text_bytes(flap_safetensors_bytes(reader)).text);
  flap_safetensors_close(reader);
  return FLAP_OK;
}

/* ---- other files ----------------------------------------------------------------------------------------- */

static flap_status inspect_tokenizer(const char *path) {
  flap_tokenizer *tokenizer = NULL;
  FLAP_TRY(flap_tokenizer_open(path, &tokenizer));
  printf("%s\n  vocabulary %u, end token %d, begin token %d\n", path, flap_tokenizer_vocabulary(tokenizer),
         flap_tokenizer_end(tokenizer), flap_tokenizer_begin(tokenizer));
  flap_tokenizer_close(tokenizer);
  return FLAP_OK;
}

/* The entries of a JSON object that are short: config.json and the like. */
static flap_status inspect_json(const char *path) {
  json_t *root = NULL;
  flap_json_object object;
  FLAP_TRY(flap_json_load_file(path, FLAP_JSON_BYTES_MAX, &root));
  const flap_status status = flap_json_root(root, path, &object);
  if (status != FLAP_OK) {
    json_decref(root);
    return status;
  }
  printf("%s\n", path);
  const char *key = NULL;
  json_t *value = NULL;
  json_object_foreach(root, key, value) {
    char *text = flap_json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(12) | JSON_ENSURE_ASCII);
    printf("  ");
    print_name(key, 28);
    printf(" %.64s%s\n", text ? text : "?", text && strlen(text) > 64 ? "..." : "");
    free(text);
  }
  json_decref(root);
  return FLAP_OK;
}

static double number_of(const json_t *object, const char *key) {
  const json_t *value = json_object_get(object, key);
  return json_is_number(value) ? json_number_value(value) : -1;
}

typedef struct metrics_summary {
  uint64_t lines, steps;
  long long last_step;
  double first_loss, last_loss, last_rate;
} metrics_summary;

static void add_metrics_line(metrics_summary *summary, const json_t *object) {
  summary->lines++;
  const json_t *loss = json_object_get(object, "loss");
  if (!json_is_number(loss) || !json_is_integer(json_object_get(object, "step")))
    return;
  if (summary->steps++ == 0)
    summary->first_loss = json_number_value(loss);
  summary->last_loss = json_number_value(loss);
  summary->last_step = json_integer_value(json_object_get(object, "step"));
  summary->last_rate = number_of(object, "tokens_per_second");
}

static bool is_blank(const char *line) {
  return line[strspn(line, " \t\r\n")] == '\0';
}

static flap_status inspect_metrics(const char *path) {
  FILE *file = fopen(path, "r");
  if (!file)
    return flap_error_set_os(errno, "%s: cannot open", path);
  metrics_summary summary = {0};
  flap_status status = FLAP_OK;
  char *line = NULL;
  size_t capacity = 0;
  ssize_t length = 0;
  uint64_t number = 0;
  while (status == FLAP_OK && (length = getline(&line, &capacity, file)) > 0) {
    json_t *object = NULL;
    number++;
    if (line[length - 1] != '\n')
      break; /* torn by a kill; the run that continues drops it too */
    if (is_blank(line) && strlen(line) == (size_t)length)
      continue;
    status = flap_json_load_text(path, line, (size_t)length, &object);
    if (status == FLAP_INVALID)
      status = flap_error_set(FLAP_INVALID, "%s:%llu: not a line of JSON", path, (unsigned long long)number);
    if (status == FLAP_OK)
      add_metrics_line(&summary, object);
    json_decref(object);
  }
  free(line);
  (void)fclose(file);
  FLAP_TRY(status);
  printf("%s\n  %s lines", path, flap_text_grouped(summary.lines).text);
  if (summary.steps > 0)
    printf(", loss %.4f at first, %.4f at step %lld, %s tok/s", summary.first_loss, summary.last_loss,
           summary.last_step, flap_text_rate(summary.last_rate).text);
  putchar('\n');
  return FLAP_OK;
}

static flap_status inspect_trace(const char *path) {
  struct stat info;
  if (stat(path, &info) != 0)
    return flap_error_set_os(errno, "%s", path);
  printf("%s\n  a timeline of %s: open it in https://ui.perfetto.dev\n", path,
         flap_text_bytes((uint64_t)info.st_size).text);
  return FLAP_OK;
}

/* ---- folders --------------------------------------------------------------------------------------------- */

typedef struct checkpoint_list {
  uint32_t broken;
  bool numerics_told;
  char numerics[sizeof((flap_checkpoint_report *)0)->numerics]; /* of the one before */
} checkpoint_list;

static const char *state_text(const flap_checkpoint_report *report) {
  switch (report->state) {
  case FLAP_CHECKPOINT_WHOLE:
    return "whole";
  case FLAP_CHECKPOINT_UNKNOWN:
    return "no checksums: cannot be told";
  case FLAP_CHECKPOINT_UNREAD:
    return "complete, not verified";
  case FLAP_CHECKPOINT_UNFINISHED:
    return "unfinished";
  case FLAP_CHECKPOINT_BROKEN:
    break;
  }
  return "BROKEN";
}

/* A line each; the numerics key where it is another than the one before. */
static void print_checkpoint(void *context, const flap_checkpoint_report *report) {
  checkpoint_list *list = context;
  char saved[32] = "?";
  struct tm utc;
  const time_t at = (time_t)report->saved_at;
  if (gmtime_r(&at, &utc) != NULL)
    (void)strftime(saved, sizeof saved, "%Y-%m-%d %H:%M:%S UTC", &utc);
  print_name(report->folder, 0);
  printf(": step %llu, saved %s, %s, %s%s", (unsigned long long)report->step, saved,
         flap_text_bytes(report->bytes).text, state_text(report),
         report->resumable || report->state == FLAP_CHECKPOINT_UNFINISHED ? "" : ", weights only");
  if (report->state == FLAP_CHECKPOINT_WHOLE)
    printf(", read in %s", flap_text_seconds(report->read_seconds).text);
  putchar('\n');
  if (report->problem[0]) {
    printf("  ");
    print_name(report->problem, 0);
    putchar('\n');
  }
  if (report->numerics[0] && (!list->numerics_told || strcmp(report->numerics, list->numerics) != 0)) {
    printf("  numerics: ");
    print_name(report->numerics, 0);
    putchar('\n');
    memcpy(list->numerics, report->numerics, sizeof list->numerics);
    list->numerics_told = true;
  }
  list->broken += report->state == FLAP_CHECKPOINT_BROKEN ? 1 : 0;
}

static flap_status inspect_folder(const char *folder, bool verify) {
  static const struct {
    const char *name;
    flap_status (*show)(const char *path);
  } parts[] = {{"config.json", inspect_json},
               {"tokenizer.json", inspect_tokenizer},
               {"metrics.jsonl", inspect_metrics},
               {"trace.json", inspect_trace},
               {"trainer_state.json", inspect_json}};
  char path[FLAP_DURABLE_PATH_MAX];
  uint32_t found = 0, checkpoints = 0;
  checkpoint_list list = {0};
  for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
    if (find_in(folder, parts[i].name, path)) {
      FLAP_TRY(parts[i].show(path));
      found++;
    }
  if (find_in(folder, FLAP_SAFETENSORS_FILE, path) || find_in(folder, FLAP_SAFETENSORS_INDEX, path)) {
    FLAP_TRY(inspect_tensors(folder));
    found++;
  }
  FLAP_TRY(flap_engine_inspect(folder, verify, print_checkpoint, &list, &checkpoints));
  if (found + checkpoints == 0)
    return flap_error_set(FLAP_NOT_FOUND, "%s: neither a model, a checkpoint, a tokenizer nor the folder of a run",
                          folder);
  if (list.broken > 0)
    return flap_error_set(FLAP_CORRUPT, "%s: %u of %u checkpoints cannot be resumed: they are not what was saved",
                          folder, list.broken, checkpoints);
  return FLAP_OK;
}

static flap_status inspect(const char *path, bool verify) {
  struct stat info;
  if (stat(path, &info) != 0)
    return flap_error_set_os(errno, "%s", path);
  if (S_ISDIR(info.st_mode))
    return inspect_folder(path, verify);
  if (!S_ISREG(info.st_mode))
    return flap_error_set(FLAP_INVALID, "%s: neither a folder nor a regular file", path);
  const char *slash = strrchr(path, '/');
  const char *name = slash ? slash + 1 : path;
  if (ends_with(name, ".safetensors") || ends_with(name, ".index.json"))
    return inspect_tensors(path);
  if (ends_with(name, ".jsonl"))
    return inspect_metrics(path);
  if (strcmp(name, "trace.json") == 0)
    return inspect_trace(path);
  if (strcmp(name, "tokenizer.json") == 0)
    return inspect_tokenizer(path);
  if (ends_with(name, ".json"))
    return inspect_json(path);
  return flap_error_set(FLAP_INVALID, "%s: wanted a folder, or a .safetensors, .json or metrics.jsonl file", path);
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  bool help = false, quick = false;
  const flap_option options[] = {
      {"--quick", 0, FLAP_OPTION_FLAG, &quick, "Of checkpoints look at sizes only: nothing of them is read."}};
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, 1, argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count != 1)
    return flap_arguments_error(command, "wanted one folder or file");
  return inspect(rest[0], !quick);
}

const flap_command flap_command_inspect = {
    .name = "inspect",
    .usage = "[--quick] <folder or file>",
    .summary = "Show what is in a model, a checkpoint, a tokenizer or the folder of a run.",
    .details =
        "Tensors with dtype, shape and size; config.json; the tokenizer; the last loss of metrics.jsonl. Of the\n"
        "folder of a run every checkpoint: its step, when it was saved, its size, and whether each of its files\n"
        "is to the byte what was saved; exit status 1 if one is not.",
    .run = run,
};
