/* flap sample: text from a model. */
#include "engine/engine.h"
#include "tools/arguments.h"
#include "tools/config_yaml.h"
#include "tools/interrupt.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ARGUMENTS_MAX 256
#define NEW_TOKENS 128u
#define NOT_GIVEN UINT32_MAX

typedef struct output {
  FILE *file;
  bool terminal;
  unsigned char last; /* byte of the text */
} output;

/* Whether a terminal could take it for a command: C0 but for newline and tab, DEL, and the second byte of C1. */
static bool is_control(unsigned char last, unsigned char byte) {
  return (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f || (last == 0xc2 && byte >= 0x80 && byte < 0xa0);
}

static flap_status print_token(void *context, const char *bytes, uint64_t byte_count) {
  output *out = context;
  if (flap_interrupt_flag)
    return FLAP_INTERRUPTED;
  for (uint64_t i = 0; i < byte_count; i++) {
    const unsigned char byte = (unsigned char)bytes[i];
    (void)putc(out->terminal && is_control(out->last, byte) ? '?' : byte, out->file);
    out->last = byte;
  }
  if (fflush(out->file) != 0 || ferror(out->file))
    return flap_error_set(FLAP_IO, "standard output cannot be written");
  return FLAP_OK;
}

static flap_status check_options(const flap_command *command, const flap_sample_options *options) {
  if (options->max_new_tokens == 0)
    return flap_arguments_error(command, "--max-new-tokens must be at least 1");
  if (!(options->temperature >= 0))
    return flap_arguments_error(command, "--temperature must be 0 (the likeliest token each time) or more");
  if (!(options->top_p > 0 && options->top_p <= 1))
    return flap_arguments_error(command, "--top-p must be above 0 and at most 1");
  return FLAP_OK;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  static flap_run_config config;
  flap_sample_options sample = {.prompt = "", .max_new_tokens = NOT_GIVEN, .temperature = 1.0, .top_p = 1.0};
  bool help = false;
  const flap_option options[] = {
      {"--prompt", 'p', FLAP_OPTION_TEXT, &sample.prompt, "The text to continue; none by default."},
      {"--max-new-tokens", 'n', FLAP_OPTION_U32, &sample.max_new_tokens,
       "How many tokens at most (default: 128, or as many as fit)."},
      {"--temperature", 't', FLAP_OPTION_NUMBER, &sample.temperature, "0 takes the likeliest token (default: 1)."},
      {"--top-k", 0, FLAP_OPTION_U32, &sample.top_k, "Only among the k likeliest tokens; 0 for all (default: 0)."},
      {"--top-p", 0, FLAP_OPTION_NUMBER, &sample.top_p,
       "Only among the likeliest that make up this share (default: 1)."},
      {"--seed", 's', FLAP_OPTION_U64, &sample.seed, "The same seed gives the same text (default: 0)."},
  };
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count == 0)
    return flap_arguments_error(command, "which model? name its folder, or the run.yaml that trained it");
  FLAP_TRY(check_options(command, &sample));
  sample.fewer_if_full = sample.max_new_tokens == NOT_GIVEN;
  if (sample.fewer_if_full)
    sample.max_new_tokens = NEW_TOKENS;
  FLAP_TRY(flap_config_load(rest[0], rest + 1, count - 1, FLAP_CONFIG_USE, &config));
  flap_interrupt_install(NULL);
  output out = {.file = stdout, .terminal = isatty(STDOUT_FILENO) == 1};
  flap_status status = flap_engine_sample(&config, &sample, print_token, &out);
  if (status == FLAP_OK || status == FLAP_INTERRUPTED)
    fputc('\n', stdout);
  flap_run_config_close(&config);
  return status;
}

const flap_command flap_command_sample = {
    .name = "sample",
    .usage = "<model folder | run.yaml> [key=value ...]",
    .summary = "Generate text with a model.",
    .details = "With a run.yaml it is the trained model in its output_dir, under the same budgets.",
    .run = run,
};
