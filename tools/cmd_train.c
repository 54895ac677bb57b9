/* flap train: reads the configuration, trains, and says what came of it. */
#include "base/log.h"
#include "engine/engine.h"
#include "tools/arguments.h"
#include "tools/config_keys.h"
#include "tools/config_yaml.h"
#include "tools/interrupt.h"
#include "tools/progress.h"
#include "tools/text.h"

#include <string.h>

#define ARGUMENTS_MAX 256

/* The command that continues this run: what was typed, with the key that resumes in place of an older one; or just
 * that, if it is a command for every life. */
static void print_resume(FILE *out, const flap_run_config *config, const char *file, const char *const *overrides,
                         size_t count) {
  static const char resume_key[] = "resume_from_checkpoint=", overwrite_key[] = "overwrite_output_dir=";
  fputs("continue with: ", out);
  flap_text_print_word(out, flap_program_name());
  fputs(" train ", out);
  flap_text_print_word(out, file);
  const bool again = strcmp(config->resume_from_checkpoint, "auto") == 0;
  for (size_t i = 0; i < count; i++) {
    bool replaced = !again && (strncmp(overrides[i], resume_key, sizeof resume_key - 1) == 0 ||
                               strncmp(overrides[i], overwrite_key, sizeof overwrite_key - 1) == 0);
    if (replaced)
      continue;
    fputc(' ', out);
    flap_text_print_word(out, overrides[i]);
  }
  if (again)
    fputc('\n', out);
  else
    fprintf(out, "%s %strue\n", config->overwrite_output_dir ? " overwrite_output_dir=false" : "", resume_key);
}

/* A graceful end, which is what was asked for. What is not saved is said. */
static void say_interrupted(FILE *out, const flap_run_config *config, const flap_train_result *result, const char *file,
                            const char *const *overrides, size_t count) {
  fprintf(out, "\nstopped after step %llu, as asked\n", (unsigned long long)result->steps);
  if (result->trained_tokens == 0)
    fputs("nothing was saved, for no step was done: the same command starts again\n", out);
  else if (config->save_strategy == FLAP_STRATEGY_NO)
    fputs("NOTHING WAS SAVED: save_strategy is no, so these steps are lost; with save_strategy=steps a stop saves "
          "them\n",
          out);
  else if (config->save_only_model)
    fprintf(out, "%s holds the weights only (save_only_model), so training cannot continue from it\n",
            result->checkpoint);
  else
    print_resume(out, config, file, overrides, count);
}

static void say_complete(FILE *out, const flap_run_config *config, const flap_train_result *result) {
  fprintf(out, "this run is complete: %llu steps%s %s; nothing was done\n", (unsigned long long)result->steps,
          config->export_final ? ", and the trained model, are in" : " are done in", config->output_dir);
}

/* Output that nobody can read any more (a closed terminal, a reader who left, a full disk) is no failure of the run. */
static void let_go_of_output(FILE *out) {
  if (fflush(out) == 0 && !ferror(out))
    return;
  flap_log(FLAP_LOG_WARNING, "standard output could not be written to the end; the run itself is complete");
  if (freopen("/dev/null", "w", out) == NULL)
    clearerr(out);
}

static const char *stop_notice(const flap_run_config *config) {
  return config->save_strategy == FLAP_STRATEGY_NO
             ? "\nflap: stopping: this step is finished first, and NOTHING IS SAVED (save_strategy: no); once more "
               "stops at once\n"
             : "\nflap: stopping: this step is finished and saved first; once more stops at once\n";
}

static flap_status train(const char *file, const char *const *overrides, size_t count) {
  static flap_run_config config; /* large, and only one */
  static flap_progress progress;
  static flap_train_result result;
  FLAP_TRY(flap_config_load(file, overrides, count, FLAP_CONFIG_TRAIN, &config));
  flap_progress_init(&progress, stdout);
  flap_interrupt_install(stop_notice(&config));
  flap_interrupt_outlive_terminal();
  flap_observer observer = flap_progress_observer(&progress);
  flap_status status = flap_engine_train(&config, &observer, &flap_interrupt_flag, &result);
  flap_progress_end_line(&progress);
  if (status == FLAP_OK && result.complete)
    say_complete(stdout, &config, &result);
  else if (status == FLAP_OK)
    flap_progress_summary(&progress, &config, &result);
  if (status == FLAP_OK && result.interrupted)
    say_interrupted(stdout, &config, &result, file, overrides, count);
  let_go_of_output(stdout);
  flap_run_config_close(&config);
  return status;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  bool reference = false, help = false;
  const flap_option options[] = {
      {"--help-config", 0, FLAP_OPTION_FLAG, &reference, "All keys of run.yaml: kind, default, meaning."}};
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (reference) {
    flap_config_print_reference(stdout);
    return FLAP_OK;
  }
  if (count == 0)
    return flap_arguments_error(command, "which configuration? name a run.yaml");
  return train(rest[0], rest + 1, count - 1);
}

const flap_command flap_command_train = {
    .name = "train",
    .usage = "<run.yaml> [key=value ...]",
    .summary = "Train a model as run.yaml says.",
    .details = "Checkpoints, metrics.jsonl, trace.json and the trained model go to output_dir. Ctrl-C (or SIGTERM)\n"
               "finishes the step, saves, prints the command that continues, and ends with exit status 0 (with\n"
               "save_strategy: no nothing is saved); a second one stops at once, with 130. A terminal that is closed\n"
               "does not end the run.",
    .run = run,
};
