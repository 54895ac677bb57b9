/* flap bench all: what could be wrong is found out first, then the profile is measured, then everything else. */
#include "tools/bench.h"

#include "io/block/measure.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"
#include "tools/config_yaml.h"
#include "tools/limits.h"
#include "tools/print_plan.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct bench_run {
  const flap_bench_options *options;
  const char *profile_path;
  const char *paths[FLAP_BLOCK_DISKS_MAX];
  uint32_t path_count;
  flap_machine_profile profile;
  flap_machine machine; /* its rates, with all disks */
  bool planned;
  flap_plan plan;
} bench_run;

/* An output is refused now, and not after a minute. */
static flap_status check_output(const char *option, const char *path, bool force) {
  flap_durable_file file;
  FLAP_TRY(flap_arguments_check_new(option, path, force));
  const flap_status status = flap_durable_begin_file(&file, path);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "%s", option);
  flap_durable_abort_file(&file);
  return FLAP_OK;
}

/* The folder that a file is or will be in, and its name there. */
static bool look_at_place(const char *path, struct stat *folder_out, const char **name_out) {
  char folder[FLAP_DURABLE_PATH_MAX];
  const char *slash = strrchr(path, '/');
  *name_out = slash != NULL ? slash + 1 : path;
  const int length =
      snprintf(folder, sizeof folder, "%.*s", slash != NULL ? (int)(slash - path + 1) : 1, slash != NULL ? path : ".");
  return length < (int)sizeof folder && stat(folder, folder_out) == 0;
}

/* However they are written. A link that is written to is replaced, so what it leads to makes no difference. */
static bool is_same_file(const char *a, const char *b) {
  struct stat in_a, in_b;
  const char *name_a, *name_b;
  return look_at_place(a, &in_a, &name_a) && look_at_place(b, &in_b, &name_b) && in_a.st_dev == in_b.st_dev &&
         in_a.st_ino == in_b.st_ino && strcmp(name_a, name_b) == 0;
}

static flap_status check_outputs(bench_run *run) {
  const flap_bench_options *options = run->options;
  FLAP_TRY(check_output("--profile", run->profile_path, options->force));
  if (options->html == NULL)
    return FLAP_OK;
  if (is_same_file(options->html, run->profile_path))
    return flap_error_set(FLAP_INVALID, "--html: %s is where the profile goes: name another file", options->html);
  return check_output("--html", options->html, options->force);
}

/* `auto` is a GPU that can be used, and the CPU where there is none, as in a run. */
static flap_status measure_profile(bench_run *run) {
  const flap_bench_options *options = run->options;
  flap_machine_profile *profile = &run->profile;
  flap_run_device device = options->device == FLAP_RUN_DEVICE_AUTO ? FLAP_RUN_DEVICE_CUDA : options->device;
  flap_status status = flap_engine_profile(device, options->threads, run->paths[0], true, profile);
  if (options->device == FLAP_RUN_DEVICE_AUTO && flap_engine_falls_to_cpu(status)) {
    device = FLAP_RUN_DEVICE_CPU;
    status = flap_engine_profile(device, options->threads, run->paths[0], true, profile);
  }
  FLAP_TRY(status);
  for (uint32_t i = 1; i < run->path_count; i++) {
    flap_machine_profile other;
    FLAP_TRY(flap_engine_profile(device, options->threads, run->paths[i], true, &other));
    profile->disks[profile->disk_count++] = other.disks[0];
  }
  flap_machine_profile_rates(profile, profile->disk_count, &run->machine);
  return FLAP_OK;
}

static flap_status make_plan(bench_run *run) {
  static flap_run_config config;
  FLAP_TRY(flap_config_load(run->options->plan, NULL, 0, FLAP_CONFIG_PLAN, &config));
  flap_status status = measure_profile(run);
  if (status == FLAP_OK)
    status = flap_engine_plan(&config, NULL, &run->plan);
  flap_run_config_close(&config);
  run->planned = status == FLAP_OK;
  return status;
}

/* What fails here is noted, and the rest still measured: a GPU that may not pin memory has kernels all the same. */
static flap_status measure_parts(bench_run *run, flap_limits *limits) {
  const flap_bench_options *options = run->options;
  const bool cuda = run->profile.device == FLAP_RUN_DEVICE_CUDA;
  if (flap_limits_gpu(limits, cuda ? FLAP_DEVICE_CUDA : FLAP_DEVICE_CPU, options->threads, options->vram_bytes) !=
      FLAP_OK)
    flap_limits_note_failure(limits, "gpu");
  if (cuda && flap_limits_pcie(limits, options->vram_bytes) != FLAP_OK)
    flap_limits_note_failure(limits, "pcie");
  if (flap_limits_host(limits, options->threads) != FLAP_OK)
    flap_limits_note_failure(limits, "host");
  if (flap_limits_disk(limits, run->paths, run->path_count, options->backend) != FLAP_OK)
    flap_limits_note_failure(limits, "disk");
  return limits->section_count > 0 ? FLAP_OK : FLAP_IO;
}

flap_status flap_bench_print_json(struct json_t *object) {
  char *text = flap_json_text(object);
  json_decref(object);
  if (text == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for the results as JSON");
  fputs(text, stdout);
  free(text);
  return FLAP_OK;
}

static flap_status print_json(const bench_run *run, const flap_limits *limits) {
  json_t *object = json_object(), *notes = json_array();
  for (uint32_t i = 0; i < limits->note_count; i++)
    (void)json_array_append_new(notes, json_string(limits->notes[i]));
  (void)json_object_set_new(object, "format", json_string("flap limits 1"));
  (void)json_object_set_new(object, "quick", json_boolean(limits->quick));
  (void)json_object_set_new(object, "profile", flap_print_profile_json(&run->profile));
  (void)json_object_set_new(object, "notes", notes);
  (void)json_object_set_new(object, "sections", flap_limits_json(limits));
  return flap_bench_print_json(object);
}

static flap_status write_outputs(const bench_run *run, const flap_limits *limits) {
  const flap_bench_options *options = run->options;
  json_t *profile = flap_print_profile_json(&run->profile);
  const flap_status status = flap_json_write_file(run->profile_path, profile);
  json_decref(profile);
  FLAP_TRY(status);
  if (options->html != NULL)
    FLAP_TRY(flap_limits_write_page(options->html, limits, &run->machine, run->planned ? &run->plan : NULL));
  if (options->json)
    return print_json(run, limits);
  printf("%s  to plan with: flap plan run.yaml machine=%s%s\n", run->profile_path,
         strchr(run->profile_path, '/') ? "" : "./", run->profile_path);
  if (options->html != NULL)
    printf("%s  the same figures with plots: open it in a browser\n", options->html);
  return FLAP_OK;
}

static flap_status run_all(bench_run *run, flap_limits *limits) {
  FLAP_TRY(check_outputs(run));
  for (uint32_t i = 0; i < run->path_count; i++)
    FLAP_TRY(flap_block_probe_check(run->paths[i]));
  FLAP_TRY(run->options->plan != NULL ? make_plan(run) : measure_profile(run));
  if (!run->options->json) {
    flap_bench_print_machine(&run->machine, true);
    putchar('\n');
    (void)fflush(stdout);
  }
  if (run->planned)
    flap_limits_plan(limits, &run->plan, &run->machine);
  FLAP_TRY(measure_parts(run, limits));
  return write_outputs(run, limits);
}

flap_status flap_bench_all(const flap_bench_options *options) {
  static bench_run run;
  run = (bench_run){.options = options,
                    .profile_path = options->profile != NULL ? options->profile : "profile.json",
                    .path_count = options->path_count};
  memcpy(run.paths, options->paths, sizeof run.paths);
  if (run.path_count == 0)
    run.paths[run.path_count++] = ".";
  flap_limits *limits = flap_limits_new(options->json ? NULL : stdout, options->quick);
  if (limits == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for the results");
  const flap_status status = run_all(&run, limits);
  free(limits);
  return status;
}
