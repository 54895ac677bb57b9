/* flap tokenize: text to token ids, printed or as a shard to train on. */
#include "io/formats/dataset.h"
#include "io/formats/tokenizer.h"
#include "tools/arguments.h"
#include "tools/interrupt.h"
#include "tools/text.h"

#include <stdio.h>
#include <string.h>

#define ARGUMENTS_MAX 4096

static flap_status print_ids(flap_tokenizer *tokenizer, const char *text) {
  flap_ids ids = {0};
  flap_status status = flap_tokenizer_encode(tokenizer, text, strlen(text), 0, &ids);
  for (uint64_t i = 0; i < ids.count && status == FLAP_OK; i++)
    printf("%s%d", i > 0 ? " " : "", ids.ids[i]);
  if (status == FLAP_OK)
    putchar('\n');
  flap_ids_free(&ids);
  return status;
}

static flap_status write_shard(flap_tokenizer *tokenizer, const char *const *files, size_t count, const char *out) {
  const flap_dataset_config config = {.paths = files,
                                      .path_count = (uint32_t)count,
                                      .tokenizer = tokenizer,
                                      .begin_tokens = true,
                                      .stop = &flap_interrupt_flag};
  uint64_t tokens = 0;
  flap_interrupt_install(NULL);
  FLAP_TRY(flap_dataset_write_shard(&config, out, &tokens));
  printf("%s: %s tokens, vocabulary %u\n", out, flap_text_grouped(tokens).text, flap_tokenizer_vocabulary(tokenizer));
  return FLAP_OK;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  const char *text = NULL, *out = NULL;
  bool force = false, help = false;
  const flap_option options[] = {
      {"--output", 'o', FLAP_OPTION_TEXT, &out, "The .bin shard to write."},
      {"--force", 0, FLAP_OPTION_FLAG, &force, "Replace the shard if it is there."},
      {"--text", 0, FLAP_OPTION_TEXT, &text, "Print the ids of this text instead."},
  };
  static const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments: quote a glob, so that the shell leaves it alone",
                                ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count == 0)
    return flap_arguments_error(command, "which tokenizer? name bytes, a tokenizer.json, or a folder with one");
  if (text ? count != 1 || out : count < 2 || !out)
    return flap_arguments_error(command, "wanted either files and -o out.bin, or --text TEXT");
  if (out)
    FLAP_TRY(flap_arguments_check_ending(command, "--output", out, ".bin"));
  if (out)
    FLAP_TRY(flap_arguments_check_new("--output", out, force));
  flap_tokenizer *tokenizer = NULL;
  FLAP_TRY(strcmp(rest[0], "bytes") == 0 ? flap_tokenizer_open_bytes(&tokenizer)
                                         : flap_tokenizer_open(rest[0], &tokenizer));
  flap_status status = text ? print_ids(tokenizer, text) : write_shard(tokenizer, rest + 1, count - 1, out);
  flap_tokenizer_close(tokenizer);
  return status;
}

const flap_command flap_command_tokenize = {
    .name = "tokenize",
    .usage = "<tokenizer> (<file or glob> ... -o out.bin | --text TEXT)",
    .summary = "Turn text into token ids: a shard to train on, or ids to read.",
    .details =
        "The tokenizer is `bytes`, a tokenizer.json, or a folder with one. Files are .txt or .jsonl: each\n"
        "document is put between the tokenizer's begin token (if its post-processor has one) and its end token;\n"
        "of shards (.bin) the tokens are taken as they are.",
    .run = run,
};
