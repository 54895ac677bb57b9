/* flap export: a checkpoint as a plain Hugging Face folder. */
#include "engine/engine.h"
#include "io/formats/safetensors.h"
#include "tools/arguments.h"
#include "tools/interrupt.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define ARGUMENTS_MAX 16

static flap_status parse_dtype(const flap_command *command, const char *text, flap_dtype *dtype_out) {
  static const struct {
    const char *name;
    flap_dtype dtype;
  } names[] = {{"bfloat16", FLAP_BF16}, {"bf16", FLAP_BF16},   {"float16", FLAP_F16},
               {"fp16", FLAP_F16},      {"float32", FLAP_F32}, {"fp32", FLAP_F32}};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (strcmp(text, names[i].name) == 0) {
      *dtype_out = names[i].dtype;
      return FLAP_OK;
    }
  return flap_arguments_error(command, "--dtype: %.64s is none of bfloat16, float16, float32", text);
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  const char *dtype_text = NULL;
  uint64_t shard_bytes = FLAP_SAFETENSORS_SHARD_BYTES;
  bool help = false;
  const flap_option options[] = {
      {"--dtype", 0, FLAP_OPTION_TEXT, &dtype_text, "bfloat16, float16 or float32 (default: as in the folder)."},
      {"--max-shard-size", 0, FLAP_OPTION_BYTES, &shard_bytes, "Largest file of weights (default: 5GB)."},
  };
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  flap_dtype dtype = FLAP_BF16;
  struct stat info;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count != 2)
    return flap_arguments_error(command, "wanted a checkpoint folder and a folder to make");
  if (stat(rest[0], &info) == 0 && S_ISREG(info.st_mode))
    return flap_arguments_error(command, "%.200s is a file: name a folder: a checkpoint, or an output_dir with a model",
                                rest[0]);
  if (shard_bytes == 0)
    return flap_arguments_error(command, "--max-shard-size must be more than 0");
  FLAP_TRY(dtype_text != NULL ? parse_dtype(command, dtype_text, &dtype) : flap_engine_weights_dtype(rest[0], &dtype));
  flap_interrupt_install(NULL);
  FLAP_TRY(flap_engine_export(rest[0], rest[1], dtype, shard_bytes, &flap_interrupt_flag));
  printf("exported %s to %s (%s)\n", rest[0], rest[1], flap_dtype_name(dtype));
  return FLAP_OK;
}

const flap_command flap_command_export = {
    .name = "export",
    .usage = "<checkpoint or model folder> <new folder>",
    .summary = "Write a checkpoint as a Hugging Face folder, without the states of the optimizer.",
    .details = "The new folder must not exist yet. It gets the weights, config.json and the tokenizer.",
    .run = run,
};
