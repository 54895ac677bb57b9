#include "tests/reliability/tiny_run.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/engine.h"
#include "io/block/checksum.h"
#include "io/formats/dataset.h"
#include "tests/reliability/tiny_states.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MEMORY_BYTES ((uint64_t)2 << 20) /* more than it needs */
#define DISK_BYTES ((uint64_t)4 << 20)
#define FILE_BYTES_MAX ((size_t)1 << 20)

static void must(bool fine, const char *what) {
  if (fine)
    return;
  perror(what);
  _exit(99);
}

static void path_of(const tiny_run *run, const char *name, char path_out[FLAP_PATH_MAX]) {
  (void)snprintf(path_out, FLAP_PATH_MAX, "%s/%s", run->folder, name);
}

static void write_text(const char *path, const char *text) {
  FILE *file = fopen(path, "w");
  must(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0, path);
}

/* ---- the folder ---------------------------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *about, int type, struct FTW *where) {
  (void)about, (void)type, (void)where;
  return remove(path);
}

static void remove_tree(const char *path) {
  struct stat about;
  if (lstat(path, &about) == 0)
    must(nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS) == 0, path);
}

/* Fixed rates, so that every process makes the same plan, and so the same calls. */
static void write_machine(const tiny_run *run) {
  char path[FLAP_PATH_MAX];
  path_of(run, "machine.json", path);
  write_text(path, "{\"format\": \"flap machine 1\", \"machines\": [{\"device\": \"cpu\", \"name\": \"tests\", "
                   "\"flops_bf16\": 1e11, \"flops_f32\": 1e11, \"device_bytes\": 1e10, \"h2d_bytes\": 1e10, "
                   "\"d2h_bytes\": 1e10, \"host_bytes\": 1e10, \"launch_ns\": 100, \"copy_ns\": 1000, "
                   "\"disk_ns\": 10000, \"synchronous\": true, \"shared_cores\": 1, \"disk_read_bytes\": 1e9, "
                   "\"disk_write_bytes\": 1e9}]}\n");
  must(setenv("FLAP_MACHINE", path, 1) == 0, "setenv");
}

static void write_data(const tiny_run *run) {
  char path[FLAP_PATH_MAX];
  path_of(run, "text.txt", path);
  FILE *file = fopen(path, "w");
  must(file != NULL, path);
  for (int n = 0; n < 30; n++)
    must(fprintf(file, "The %dth line says that %d and %d make %d.\n", n, n, n + 1, 2 * n + 1) > 0, path);
  must(fclose(file) == 0, path);
}

void tiny_run_open(tiny_run *run, tiny_kind kind) {
  char path[FLAP_PATH_MAX];
  memset(run, 0, sizeof *run);
  run->kind = kind;
  const char *above = access("/dev/shm", R_OK | W_OK | X_OK) == 0 ? "/dev/shm" : "/tmp";
  (void)snprintf(run->folder, sizeof run->folder, "%s/flap-tiny-XXXXXX", above);
  must(mkdtemp(run->folder) != NULL, run->folder);
  path_of(run, "disk", path);
  must(mkdir(path, 0700) == 0, path);
  write_machine(run);
  write_data(run);
  flap_log_set_level(FLAP_LOG_ERROR);
}

void tiny_run_clear(tiny_run *run) {
  static const char *const made[] = {"out", "exported", "exported.tmp", "tokens.bin", "tokens.bin.tmp"};
  char path[FLAP_PATH_MAX];
  for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
    path_of(run, made[i], path);
    remove_tree(path);
  }
  run->saved_step = run->resumed_step = 0;
}

void tiny_run_close(tiny_run *run) {
  remove_tree(run->folder);
}

/* ---- the life ------------------------------------------------------------------------------------------------ */

static void fill_config(const tiny_run *run, flap_run_config *config) {
  flap_run_config_defaults(config);
  config->model = json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:b}", "model_type", "llama", "hidden_size", 16,
                            "intermediate_size", 32, "num_hidden_layers", 1, "num_attention_heads", 2,
                            "max_position_embeddings", 64, "tie_word_embeddings", 1);
  (void)snprintf(config->tokenizer, sizeof config->tokenizer, "bytes");
  config->dataset[0] = malloc(FLAP_PATH_MAX);
  if (config->dataset[0] != NULL) {
    path_of(run, "text.txt", config->dataset[0]);
    config->dataset_count = 1;
  }
  config->val_size = 2;
  config->cutoff_len = 16;
  config->per_device_train_batch_size = 1;
  config->gradient_accumulation_steps = 2;
  config->max_steps = TINY_STEPS;
  config->learning_rate = 1e-2;
  config->logging_steps = 1;
  config->save_strategy = FLAP_STRATEGY_STEPS;
  config->save_steps = 2;
  config->save_total_limit = 2;
  config->device = FLAP_RUN_DEVICE_CPU;
  config->expert.threads = 1;
  config->expert.io = run->kind == TINY_ON_URING ? FLAP_RUN_IO_AUTO : FLAP_RUN_IO_THREADS;
  config->expert.checkpoint_states = run->kind == TINY_COPIED ? FLAP_RUN_STATES_COPIED : FLAP_RUN_STATES_AUTO;
  path_of(run, "out", config->output_dir);
  config->vram = config->ram = (flap_size){.kind = FLAP_SIZE_BYTES, .bytes = MEMORY_BYTES};
  if (run->kind == TINY_IN_RAM)
    return;
  config->vram.kind = config->ram.kind = FLAP_SIZE_MIN;
  config->expert.update = run->kind == TINY_TWICE ? FLAP_UPDATE_BACKWARD : FLAP_UPDATE_FOLD;
  config->disk_count = 1;
  path_of(run, "disk", config->disk[0].path);
  config->disk[0].size = (flap_size){.kind = FLAP_SIZE_BYTES, .bytes = DISK_BYTES};
}

static volatile sig_atomic_t stop;

static void note_step(void *context, const flap_step_report *report) {
  (void)context;
  if (report->step == TINY_INTERRUPT)
    stop = 1;
}

static void note_saved(void *context, const char *folder, double seconds) {
  tiny_run *run = context;
  (void)seconds;
  run->saved_step = strtoull(strrchr(folder, '-') + 1, NULL, 10);
  if (run->saved != NULL)
    run->saved(run->saved_step);
}

static void note_prepared(void *context, uint64_t train_tokens, uint64_t heldout_tokens, uint64_t sequences,
                          uint64_t resumed_step) {
  tiny_run *run = context;
  (void)train_tokens, (void)heldout_tokens, (void)sequences;
  run->resumed_step = resumed_step;
}

typedef enum tiny_start { ANEW, FROM_CHECKPOINT, AS_IT_COMES } tiny_start;

static flap_status train(tiny_run *run, tiny_start start, bool interrupt) {
  static flap_run_config config; /* it holds long paths */
  flap_train_result result;
  const flap_observer observer = {
      .context = run, .prepared = note_prepared, .stepped = interrupt ? note_step : NULL, .saved = note_saved};
  run->phase = start == ANEW ? "training" : "resuming";
  fill_config(run, &config);
  if (config.model == NULL || config.dataset_count == 0) {
    flap_run_config_close(&config);
    return flap_error_set(FLAP_NO_MEMORY, "the test's configuration: no memory");
  }
  config.overwrite_output_dir = start == ANEW;
  if (start != ANEW)
    (void)snprintf(config.resume_from_checkpoint, sizeof config.resume_from_checkpoint, "%s",
                   start == AS_IT_COMES ? "auto" : "true");
  stop = 0;
  const flap_status status = flap_engine_train(&config, &observer, &stop, &result);
  if (status == FLAP_OK && result.complete)
    run->resumed_step = result.steps;
  flap_run_config_close(&config);
  return status;
}

static flap_status export_last(tiny_run *run) {
  char from[FLAP_PATH_MAX], to[FLAP_PATH_MAX], name[48];
  run->phase = "exporting";
  (void)snprintf(name, sizeof name, "out/checkpoint-%u", TINY_STEPS);
  path_of(run, name, from);
  path_of(run, "exported", to);
  return flap_engine_export(from, to, FLAP_F32, UINT64_MAX, NULL);
}

static flap_status tokenize(tiny_run *run) {
  char text[FLAP_PATH_MAX], shard[FLAP_PATH_MAX];
  const char *const paths[] = {text};
  flap_tokenizer *tokenizer = NULL;
  uint64_t tokens;
  run->phase = "tokenizing";
  path_of(run, "text.txt", text);
  path_of(run, "tokens.bin", shard);
  FLAP_TRY(flap_tokenizer_open_bytes(&tokenizer));
  const flap_dataset_config config = {.paths = paths, .path_count = 1, .tokenizer = tokenizer};
  const flap_status status = flap_dataset_write_shard(&config, shard, &tokens);
  flap_tokenizer_close(tokenizer);
  return status;
}

flap_status tiny_run_live(tiny_run *run) {
  FLAP_TRY(tokenize(run));
  FLAP_TRY(train(run, ANEW, true));
  FLAP_TRY(train(run, FROM_CHECKPOINT, false));
  return export_last(run);
}

/* As `ls` shows it: a folder under its final name, or what a crash left of one that was being replaced. */
static bool has_checkpoint(const tiny_run *run) {
  char path[FLAP_PATH_MAX];
  path_of(run, "out", path);
  DIR *folder = opendir(path);
  bool found = false;
  for (const struct dirent *entry; folder != NULL && !found && (entry = readdir(folder)) != NULL;)
    found = strncmp(entry->d_name, "checkpoint-", 11) == 0 && strchr(entry->d_name, '.') == NULL;
  if (folder != NULL)
    (void)closedir(folder);
  return found;
}

flap_status tiny_run_repair(tiny_run *run) {
  char path[FLAP_PATH_MAX];
  struct stat about;
  FLAP_TRY(tokenize(run));
  const tiny_start start = has_checkpoint(run) ? FROM_CHECKPOINT : ANEW;
  FLAP_TRY(train(run, run->kind == TINY_IN_RAM ? AS_IT_COMES : start, false));
  path_of(run, "exported", path);
  return stat(path, &about) == 0 ? FLAP_OK : export_last(run);
}

/* ---- what came of it ----------------------------------------------------------------------------------------- */

static char *read_whole(const char *path, size_t *bytes_out) {
  FILE *file = fopen(path, "rb");
  if (file == NULL)
    return NULL;
  char *data = malloc(FILE_BYTES_MAX + 1);
  must(data != NULL, path);
  *bytes_out = fread(data, 1, FILE_BYTES_MAX, file);
  must(*bytes_out < FILE_BYTES_MAX && !ferror(file), path);
  (void)fclose(file);
  data[*bytes_out] = '\0';
  return data;
}

static uint64_t mix(uint64_t digest, const void *data, size_t bytes, uint64_t name) {
  return flap_block_checksum(data, bytes, (uint32_t)name, 0, digest);
}

/* Of trainer_state.json, what was written to drives: a life that is interrupted writes more. */
static size_t forget_written(char *text, size_t bytes) {
  char *line = strstr(text, "\"written_bytes\""), *end = line != NULL ? strchr(line, '\n') : NULL;
  if (end == NULL)
    return bytes;
  memmove(line, end, strlen(end) + 1);
  return bytes - (size_t)(end - line);
}

static const char *add_file(const tiny_run *run, const char *name, uint64_t number, uint64_t *digest) {
  static char message[TINY_PATH_MAX + 64];
  char path[FLAP_PATH_MAX];
  size_t bytes = 0;
  path_of(run, name, path);
  char *data = read_whole(path, &bytes);
  if (data == NULL) {
    (void)snprintf(message, sizeof message, "%.400s is missing", name);
    return message;
  }
  if (strstr(name, "trainer_state") != NULL)
    bytes = forget_written(data, bytes);
  *digest = mix(*digest, data, bytes, number);
  free(data);
  return "";
}

/* Of each step its loss and norm, once; not the times. An evaluation at most once: which steps have one depends on
 * where a life begins. */
static const char *add_metrics(const tiny_run *run, uint64_t *digest) {
  static char message[128];
  char path[FLAP_PATH_MAX];
  size_t bytes = 0;
  path_of(run, "out/metrics.jsonl", path);
  char *text = read_whole(path, &bytes), *rest = text;
  if (text == NULL)
    return "metrics.jsonl is missing";
  json_int_t next = 1, evaluated = -1;
  message[0] = '\0';
  for (char *line; message[0] == '\0' && (line = strsep(&rest, "\n")) != NULL;) {
    json_t *object = *line ? json_loads(line, 0, NULL) : NULL;
    if (*line && object == NULL)
      (void)snprintf(message, sizeof message, "metrics.jsonl has a torn line: %.60s", line);
    const json_t *norm = json_object_get(object, "grad_norm");
    if (json_object_get(object, "eval_loss") != NULL) {
      const json_int_t step = json_integer_value(json_object_get(object, "step"));
      if (step <= evaluated)
        (void)snprintf(message, sizeof message, "metrics.jsonl has another evaluation of step %lld", (long long)step);
      evaluated = step;
    }
    if (norm != NULL) {
      const double values[2] = {json_number_value(json_object_get(object, "loss")), json_number_value(norm)};
      const json_int_t step = json_integer_value(json_object_get(object, "step"));
      if (step != next++)
        (void)snprintf(message, sizeof message, "metrics.jsonl: step %lld is not in its place", (long long)step);
      *digest = mix(*digest, values, sizeof values, (uint64_t)step);
    }
    json_decref(object);
  }
  if (message[0] == '\0' && next != TINY_STEPS + 1)
    (void)snprintf(message, sizeof message, "metrics.jsonl ends after step %lld", (long long)next - 1);
  free(text);
  return message;
}

/* Each checkpoint that is there: pages of states are what their tables say, and stayed so when the run went on. */
static const char *check_pages(const tiny_run *run) {
  char out[FLAP_PATH_MAX], path[FLAP_PATH_MAX];
  const char *problem = "";
  path_of(run, "out/flap-extents.tmp", path);
  if (access(path, F_OK) == 0 && !run->removals_fail)
    return "out/flap-extents.tmp was left behind";
  path_of(run, "out", out);
  DIR *folder = opendir(out);
  for (const struct dirent *entry; folder != NULL && problem[0] == '\0' && (entry = readdir(folder)) != NULL;)
    if (strncmp(entry->d_name, "checkpoint-", 11) == 0 &&
        snprintf(path, sizeof path, "%s/%s", out, entry->d_name) < (int)sizeof path)
      (void)tiny_states_are_pages(path, &problem);
  if (folder != NULL)
    (void)closedir(folder);
  return problem;
}

static const char *add_states(const tiny_run *run, uint64_t *digest) {
  char path[FLAP_PATH_MAX];
  const char *problem = check_pages(run);
  path_of(run, "out/checkpoint-4", path);
  return problem[0] != '\0' ? problem : tiny_states_digest(path, digest);
}

const char *tiny_run_digest(const tiny_run *run, uint64_t *digest_out) {
  static const char *const names[] = {"tokens.bin",
                                      "out/checkpoint-4/config.json",
                                      "out/checkpoint-4/model.safetensors",
                                      "out/checkpoint-4/tokenizer.json",
                                      "out/checkpoint-4/tokenizer_config.json",
                                      "out/checkpoint-4/trainer_state.json",
                                      "out/config.json",
                                      "out/model.safetensors",
                                      "out/tokenizer.json",
                                      "out/tokenizer_config.json",
                                      "exported/config.json",
                                      "exported/model.safetensors",
                                      "exported/tokenizer.json",
                                      "exported/tokenizer_config.json"};
  *digest_out = 0;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    const char *missing = add_file(run, names[i], i, digest_out);
    if (missing[0] != '\0')
      return missing;
  }
  const char *problem = add_metrics(run, digest_out);
  return problem[0] != '\0' ? problem : add_states(run, digest_out);
}
