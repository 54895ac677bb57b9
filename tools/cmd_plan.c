/* flap plan: what a run would take and how long a step would be, without starting it or reading its data. */
#include "engine/engine.h"
#include "io/formats/trace.h"
#include "tools/arguments.h"
#include "tools/config_yaml.h"
#include "tools/machine_file.h"
#include "tools/print_plan.h"

#include <stdio.h>
#include <unistd.h>

#define ARGUMENTS_MAX 256

static void on_trying(void *context, uint32_t micro_batches) {
  (void)context;
  fprintf(stderr, "\rlooking for the knee: a step of %u micro-batch%s\033[K", micro_batches,
          micro_batches == 1 ? "" : "es");
}

/* Plans of long steps take minutes: who waits at a terminal sees that it goes on. */
static flap_status find_knee(const flap_run_config *config, flap_knee *knee) {
  const bool terminal = isatty(STDERR_FILENO) == 1;
  const flap_status status = flap_engine_knee(config, terminal ? on_trying : NULL, NULL, knee);
  if (terminal)
    fputs("\r\033[K", stderr);
  return status;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  static flap_run_config config;
  static flap_plan plan;
  bool json = false, list = false, knee = false, force = false, help = false;
  const char *trace = NULL;
  flap_knee found;
  const flap_option options[] = {
      {"--json", 0, FLAP_OPTION_FLAG, &json, "Every figure of the plan as JSON, for programs."},
      {"--knee", 0, FLAP_OPTION_FLAG, &knee,
       "Also: from how many tokens a step on compute hides all else (a few plans more, of longer steps)."},
      {"--trace", 0, FLAP_OPTION_TEXT, &trace,
       "Also: write the expected timeline of a step to this .json, for Perfetto, like trace.json of a run."},
      {"--force", 0, FLAP_OPTION_FLAG, &force, "Replace the file of --trace even if it is no timeline of FLAP's."},
      {"--list-machines", 0, FLAP_OPTION_FLAG, &list, "The machines that `machine` knows by name, and nothing else."}};
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (list)
    return flap_machine_file_list(stdout);
  if (count == 0)
    return flap_arguments_error(command, "which configuration? name a run.yaml");
  if (trace)
    FLAP_TRY(flap_arguments_check_ending(command, "--trace", trace, ".json"));
  if (trace)
    FLAP_TRY(flap_arguments_check_new("--trace", trace, force || flap_trace_is_one(trace)));
  FLAP_TRY(flap_config_load(rest[0], rest + 1, count - 1, FLAP_CONFIG_PLAN, &config));
  flap_status status = flap_engine_plan(&config, trace, &plan);
  if (status == FLAP_OK && knee)
    status = find_knee(&config, &found);
  if (status == FLAP_OK && json)
    status = flap_print_plan_json(stdout, &config, &plan, knee ? &found : NULL);
  else if (status == FLAP_OK)
    flap_print_plan(stdout, &config, &plan);
  if (status == FLAP_OK && knee && !json)
    flap_print_knee(stdout, &found);
  flap_run_config_close(&config);
  return status;
}

const flap_command flap_command_plan = {
    .name = "plan",
    .usage = "<run.yaml> [key=value ...]",
    .summary = "Show what a run takes of vram, ram and disk, and how fast it should be; start nothing.",
    .details = "The dataset need not exist. What does not fit is refused, with the smallest budget that works.\n"
               "machine=rtx4090-64g-1nvme plans for such a machine, wherever this runs.",
    .run = run,
};
