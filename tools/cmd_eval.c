/* flap eval: the loss of a model on a text. */
#include "engine/engine.h"
#include "io/formats/json_file.h"
#include "tools/arguments.h"
#include "tools/config_yaml.h"
#include "tools/progress.h"

#include <jansson.h>
#include <stdio.h>

#define ARGUMENTS_MAX 256

static flap_status print_json(const flap_eval_report *report) {
  json_t *object = json_object();
  (void)json_object_set_new(object, "step", json_integer((json_int_t)report->step));
  (void)json_object_set_new(object, "loss", flap_json_real(report->loss));
  (void)json_object_set_new(object, "tokens", json_integer((json_int_t)report->tokens));
  (void)json_object_set_new(object, "unigram_entropy", flap_json_real(report->unigram_entropy));
  (void)json_object_set_new(object, "seconds", flap_json_real(report->seconds));
  int failed = json_dumpf(object, stdout, JSON_INDENT(2));
  json_decref(object);
  return failed || putchar('\n') == EOF ? flap_error_set(FLAP_IO, "standard output cannot be written") : FLAP_OK;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  static flap_run_config config;
  flap_eval_report report;
  bool json = false, help = false;
  const flap_option options[] = {{"--json", 0, FLAP_OPTION_FLAG, &json, "Print the figures as JSON, for programs."}};
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count == 0)
    return flap_arguments_error(command, "which model? name its folder, or the run.yaml that trained it");
  FLAP_TRY(flap_config_load(rest[0], rest + 1, count - 1, FLAP_CONFIG_USE, &config));
  flap_status status = FLAP_OK;
  if (config.dataset_count == 0)
    status = flap_arguments_error(command, "on which text? add dataset=<file or glob>");
  if (status == FLAP_OK)
    status = flap_engine_eval(&config, NULL, &report);
  if (status == FLAP_OK && json)
    status = print_json(&report);
  else if (status == FLAP_OK)
    flap_progress_print_eval(stdout, config.model_name_or_path, &report);
  flap_run_config_close(&config);
  return status;
}

const flap_command flap_command_eval = {
    .name = "eval",
    .usage = "<model folder | run.yaml> [dataset=<text>] [key=value ...]",
    .summary = "Measure the loss of a model on a text.",
    .details =
        "With a run.yaml it is the trained model in its output_dir, on the part that the run held out (val_size).\n"
        "With a folder it is all of the dataset, unless val_size=... says which part. Tokens of text are kept\n"
        "in the first folder of `disk` meanwhile; without one in TMPDIR, or /var/tmp, of whose space half stays free.",
    .run = run,
};
