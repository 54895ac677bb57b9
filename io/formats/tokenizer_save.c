/* The files that `transformers` reads. */
#include "io/formats/tokenizer_internal.h"

#include "io/formats/durable.h"
#include "io/formats/json_file.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdio.h>
#include <string.h>

static flap_status write_json(const char *path, json_t *json) {
  if (json == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", path);
  flap_status status = flap_json_write_file(path, json);
  json_decref(json);
  return status;
}

/* 256 byte tokens in the byte alphabet, no merges, no pattern, one added token. */
static json_t *byte_tokenizer_json(void) {
  json_t *vocab = json_object();
  for (int byte = 0; byte < 256; byte++) {
    char raw[5] = {0};
    (void)flap_utf8_encode(flap_tokenizer_byte_to_code((uint8_t)byte), raw);
    if (json_object_set_new(vocab, raw, json_integer(byte)) != 0) {
      json_decref(vocab);
      return NULL;
    }
  }
  return json_pack("{s:s, s:n, s:n, s:[{s:i, s:s, s:b, s:b, s:b, s:b, s:b}], s:n, s:{s:s, s:b, s:b, s:b}, s:n, "
                   "s:{s:s, s:b, s:b, s:b}, s:{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:[]}}",
                   "version", "1.0", "truncation", "padding", "added_tokens", "id", 256, "content",
                   FLAP_TOKENIZER_BYTES_END, "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1,
                   "normalizer", "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1,
                   "use_regex", 0, "post_processor", "decoder", "type", "ByteLevel", "add_prefix_space", 0,
                   "trim_offsets", 1, "use_regex", 0, "model", "type", "BPE", "dropout", "unk_token",
                   "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0,
                   "ignore_merges", 0, "vocab", vocab, "merges");
}

static json_t *token_text(const flap_tokenizer *tokenizer, int32_t id) {
  if (id < 0)
    return json_null();
  return json_stringn(tokenizer->tokens[id].raw, tokenizer->tokens[id].raw_bytes);
}

static json_t *config_json(const flap_tokenizer *tokenizer) {
  return json_pack("{s:s, s:o, s:o, s:b}", "tokenizer_class", "PreTrainedTokenizerFast", "bos_token",
                   token_text(tokenizer, tokenizer->begin), "eos_token", token_text(tokenizer, tokenizer->end),
                   "clean_up_tokenization_spaces", 0);
}

flap_status flap_tokenizer_save(const flap_tokenizer *tokenizer, const char *folder) {
  for (int file = 0; file < FLAP_FILE_COUNT; file++) {
    char path[FLAP_DURABLE_PATH_MAX];
    FLAP_TRY(flap_durable_join(path, folder, flap_tokenizer_file_names[file]));
    if (tokenizer->files[file] >= 0)
      FLAP_TRY(flap_durable_copy_open_file(tokenizer->files[file], path));
    else if (file == FLAP_FILE_TOKENIZER)
      FLAP_TRY(write_json(path, byte_tokenizer_json()));
    else if (file == FLAP_FILE_CONFIG)
      FLAP_TRY(write_json(path, config_json(tokenizer)));
  }
  return FLAP_OK;
}
