/* tokenizer.json and the files beside it. What is not understood is refused, with the file and the key. */
#include "io/formats/tokenizer_load.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/tokenizer_utf8.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define GAPS_MAX ((uint64_t)1 << 20) /* ids without a token that a vocabulary may have */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

flap_status flap_tokenizer_unsupported(const flap_json_object *object, const char *key, const char *what) {
  char shown[FLAP_UTF8_SHOWN_BYTES];
  return flap_error_set(FLAP_UNSUPPORTED,
                        "%s: %s%s%s: %s is not supported: tokenizers are byte-level BPE, or BPE in the style of "
                        "SentencePiece (byte_fallback)",
                        object->file, object->path, object->path[0] != '\0' && key[0] != '\0' ? "." : "", key,
                        flap_utf8_show(what, shown));
}

flap_status flap_tokenizer_array_object(const flap_json_object *parent, const char *key, const json_t *array,
                                        size_t index, flap_json_object *object_out) {
  object_out->json = json_array_get(array, index);
  object_out->file = parent->file;
  (void)snprintf(object_out->path, sizeof object_out->path, "%.120s%s%.40s[%zu]", parent->path,
                 parent->path[0] != '\0' ? "." : "", key, index);
  if (!json_is_object(object_out->json))
    return flap_json_error(object_out, NULL, "must be an object");
  return FLAP_OK;
}

/* ---- model --------------------------------------------------------------------------------------------- */

static flap_status check_model(const flap_json_object *model, bool *byte_fallback_out) {
  const char *text;
  FLAP_TRY(flap_json_opt_string(model, "type", "BPE", &text));
  if (strcmp(text, "BPE") != 0)
    return flap_tokenizer_unsupported(model, "type", text);
  double dropout;
  FLAP_TRY(flap_json_opt_number(model, "dropout", 0, 1, 0, &dropout));
  if (dropout > 0)
    return flap_tokenizer_unsupported(model, "dropout", "a dropout of merges");
  static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
  for (int i = 0; i < 2; i++) {
    FLAP_TRY(flap_json_opt_string(model, affixes[i], "", &text));
    if (text[0] != '\0')
      return flap_tokenizer_unsupported(model, affixes[i], "a prefix or suffix of subwords");
  }
  return flap_json_opt_bool(model, "byte_fallback", false, byte_fallback_out);
}

/* Sizes everything: the largest id, the bytes of all strings, and that ids are sane: tables are as long as the largest
 * one, and a few bytes of JSON must not ask for gigabytes. */
static flap_status measure_vocab(const flap_json_object *root, const flap_json_object *vocab, const json_t *added,
                                 uint32_t *id_count_out, uint64_t *strings_out, uint64_t *bytes_out) {
  json_int_t largest = -1;
  *strings_out = json_object_size(vocab->json) + json_array_size(added);
  *bytes_out = 0;
  const char *key;
  json_t *value;
  char shown[FLAP_UTF8_SHOWN_BYTES];
  json_object_foreach((json_t *)(uintptr_t)vocab->json, key, value) {
    json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id >= (json_int_t)FLAP_TOKENIZER_IDS_MAX)
      return flap_json_error(vocab, NULL, "the id of token \"%s\" must be an integer from 0 to %u",
                             flap_utf8_show(key, shown), FLAP_TOKENIZER_IDS_MAX - 1);
    largest = id > largest ? id : largest;
    *bytes_out += 2 * strlen(key);
  }
  for (size_t i = 0; i < json_array_size(added); i++) {
    flap_json_object token;
    FLAP_TRY(flap_tokenizer_array_object(root, "added_tokens", added, i, &token));
    int64_t id;
    const char *content;
    FLAP_TRY(flap_json_get_integer(&token, "id", 0, FLAP_TOKENIZER_IDS_MAX - 1, &id));
    FLAP_TRY(flap_json_get_string(&token, "content", &content));
    if (strlen(content) >= 1 << 16)
      return flap_json_error(&token, "content", "is longer than 65535 bytes");
    largest = id > largest ? id : largest;
    /* As it is, decoded, and normalized: NFC makes no text more than three times as long, nor does U+2581 for each
     * space, but for the one in front; and with U+2581 what is decoded may be the normalized text. */
    *bytes_out += 8 * strlen(content) + 2 * strlen(FLAP_METASPACE_TEXT);
  }
  if (largest < 0)
    return flap_json_error(vocab, NULL, "has no tokens");
  if ((uint64_t)largest >= GAPS_MAX + *strings_out)
    return flap_json_error(root, NULL, "the largest id is %lld, but there are only %llu tokens", (long long)largest,
                           (unsigned long long)*strings_out);
  *id_count_out = (uint32_t)largest + 1;
  return FLAP_OK;
}

static flap_status load_vocab(flap_tokenizer *tokenizer, const flap_json_object *model, const flap_json_object *vocab) {
  const char *key;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)vocab->json, key, value) {
    if (!flap_tokenizer_put_token(tokenizer, key, (uint32_t)strlen(key), (int32_t)json_integer_value(value)))
      return flap_json_error(vocab, NULL, "two tokens have the id %lld", (long long)json_integer_value(value));
  }
  if (tokenizer->metaspace != NULL)
    return flap_tokenizer_load_metaspace(tokenizer, model, vocab);
  unsigned missing = 0;
  for (unsigned byte = 0; byte < 256; byte++) {
    char raw[4];
    unsigned length = flap_utf8_encode(flap_tokenizer_byte_to_code((uint8_t)byte), raw);
    int32_t id = flap_text_map_get(&tokenizer->by_raw, raw, length);
    flap_bpe_set_byte(tokenizer->bpe, (uint8_t)byte, id);
    missing += id < 0;
  }
  const char *unknown;
  FLAP_TRY(flap_json_opt_string(model, "unk_token", NULL, &unknown));
  if (missing > 0 && unknown != NULL)
    return flap_tokenizer_unsupported(model, "unk_token", "an unknown token beside a vocabulary without all 256 bytes");
  if (missing > 0)
    flap_log(FLAP_LOG_WARNING, "%s: %u of 256 bytes have no token: they vanish from texts", tokenizer->name, missing);
  return FLAP_OK;
}

/* Both halves of merge `index`, as "a b" or as ["a", "b"]. */
static bool merge_halves(const json_t *merge, const char **left, size_t *left_bytes, const char **right,
                         size_t *right_bytes) {
  if (json_is_string(merge)) {
    *left = json_string_value(merge);
    const char *space = strchr(*left, ' ');
    if (space == NULL || strchr(space + 1, ' ') != NULL)
      return false;
    *left_bytes = (size_t)(space - *left);
    *right = space + 1;
    *right_bytes = strlen(*right);
    return true;
  }
  if (!json_is_array(merge) || json_array_size(merge) != 2 || !json_is_string(json_array_get(merge, 0)) ||
      !json_is_string(json_array_get(merge, 1)))
    return false;
  *left = json_string_value(json_array_get(merge, 0));
  *right = json_string_value(json_array_get(merge, 1));
  *left_bytes = strlen(*left);
  *right_bytes = strlen(*right);
  return true;
}

static flap_status load_merges(flap_tokenizer *tokenizer, const flap_json_object *model, const json_t *merges) {
  char *joined = NULL;
  char shown[FLAP_UTF8_SHOWN_BYTES];
  size_t joined_max = 0;
  flap_status status = FLAP_OK;
  for (size_t i = 0; i < json_array_size(merges); i++) {
    const json_t *merge = json_array_get(merges, i);
    if (json_is_string(merge) && strncmp(json_string_value(merge), "#version", 8) == 0)
      continue;
    const char *left, *right;
    size_t left_bytes, right_bytes;
    if (!merge_halves(merge, &left, &left_bytes, &right, &right_bytes)) {
      status = flap_json_error(model, "merges", "entry %zu must be \"a b\" or [\"a\", \"b\"]", i);
      goto fail;
    }
    if (left_bytes == 0 || right_bytes == 0) {
      status =
          flap_json_error(model, "merges", "entry %zu: its %s half is empty", i, left_bytes == 0 ? "left" : "right");
      goto fail;
    }
    if (left_bytes + right_bytes > joined_max) {
      joined_max = 2 * (left_bytes + right_bytes);
      char *grown = realloc(joined, joined_max);
      if (grown == NULL) {
        status = flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a merge", tokenizer->name);
        goto fail;
      }
      joined = grown;
    }
    memcpy(joined, left, left_bytes);
    memcpy(joined + left_bytes, right, right_bytes);
    const flap_text_map *map = &tokenizer->by_raw;
    int32_t left_id = flap_text_map_get(map, left, (uint32_t)left_bytes);
    int32_t right_id = flap_text_map_get(map, right, (uint32_t)right_bytes);
    int32_t merged = flap_text_map_get(map, joined, (uint32_t)(left_bytes + right_bytes));
    if (left_id < 0 || right_id < 0 || merged < 0) {
      status = flap_json_error(model, "merges", "entry %zu (\"%s\"): %s is not in the vocabulary", i,
                               flap_utf8_show(left, shown),
                               left_id < 0    ? "its left half"
                               : right_id < 0 ? "its right half"
                                              : "what it makes");
      goto fail;
    }
    flap_bpe_put_merge(tokenizer->bpe, left_id, right_id, merged);
    if (tokenizer->metaspace != NULL)
      FLAP_TRY_GOTO(status, flap_tokenizer_put_joins(tokenizer, left_id, right_id));
  }
fail:
  free(joined);
  return status;
}

static flap_status load_whole_words(flap_tokenizer *tokenizer, const flap_json_object *model) {
  FLAP_TRY(flap_json_opt_bool(model, "ignore_merges", false, &tokenizer->ignore_merges));
  if (!tokenizer->ignore_merges)
    return FLAP_OK;
  FLAP_TRY(flap_text_map_open(&tokenizer->whole_words, tokenizer->by_raw.count));
  for (uint32_t id = 0; id < tokenizer->id_count; id++) {
    const flap_token *token = &tokenizer->tokens[id];
    if (token->raw != NULL && token->bytes != token->raw) /* only what is spelt in the byte alphabet is a word */
      (void)flap_text_map_put(&tokenizer->whole_words, token->bytes, token->byte_count, (int32_t)id);
  }
  return FLAP_OK;
}

/* ---- added tokens -------------------------------------------------------------------------------------- */

static flap_status load_added(flap_tokenizer *tokenizer, const flap_json_object *root, const json_t *list) {
  for (int kind = 0; kind < 2; kind++) {
    tokenizer->added[kind].items = calloc(json_array_size(list) + 1, sizeof(flap_added));
    if (tokenizer->added[kind].items == NULL)
      return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for added tokens", tokenizer->name);
  }
  for (size_t i = 0; i < json_array_size(list); i++) {
    flap_json_object object;
    FLAP_TRY(flap_tokenizer_array_object(root, "added_tokens", list, i, &object));
    const char *content;
    char shown[FLAP_UTF8_SHOWN_BYTES];
    int64_t id;
    bool single_word, normalized;
    flap_added added = {0};
    FLAP_TRY(flap_json_get_string(&object, "content", &content));
    FLAP_TRY(flap_json_get_integer(&object, "id", 0, FLAP_TOKENIZER_IDS_MAX - 1, &id));
    FLAP_TRY(flap_json_opt_bool(&object, "special", false, &added.special));
    FLAP_TRY(flap_json_opt_bool(&object, "lstrip", false, &added.lstrip));
    FLAP_TRY(flap_json_opt_bool(&object, "rstrip", false, &added.rstrip));
    FLAP_TRY(flap_json_opt_bool(&object, "single_word", false, &single_word));
    FLAP_TRY(flap_json_opt_bool(&object, "normalized", !added.special, &normalized));
    if (single_word)
      return flap_tokenizer_unsupported(&object, "single_word", "an added token that must be a word of its own");
    if (content[0] == '\0')
      continue;
    uint32_t bytes = (uint32_t)strlen(content);
    int32_t known = flap_text_map_get(&tokenizer->by_raw, content, bytes);
    if (known >= 0 && known != id)
      return flap_json_error(&object, "id", "\"%s\" has the id %lld here and %d elsewhere",
                             flap_utf8_show(content, shown), (long long)id, (int)known);
    if (known < 0 && !flap_tokenizer_put_token(tokenizer, content, bytes, (int32_t)id))
      return flap_json_error(&object, "id", "%lld is the id of another token", (long long)id);
    flap_token *token = &tokenizer->tokens[id];
    token->special = added.special;
    token->bytes = token->raw; /* an added token stands for itself */
    token->byte_count = token->raw_bytes;
    added.id = (int32_t)id;
    added.content = token->raw;
    added.bytes = bytes;
    if (normalized) {
      uint64_t normal_bytes;
      FLAP_TRY(flap_tokenizer_normalize(tokenizer, content, bytes, true, &content, &normal_bytes));
      added.content = flap_tokenizer_pool_copy(tokenizer, content, normal_bytes);
      added.bytes = (uint32_t)normal_bytes;
    }
    flap_added_set *set = &tokenizer->added[normalized ? 1 : 0];
    set->items[set->count++] = added;
  }
  flap_tokenizer_finish_added(tokenizer);
  return FLAP_OK;
}

/* ---- normalizer, pre-tokenizer, decoder ---------------------------------------------------------------- */

static flap_status load_normalizer(flap_tokenizer *tokenizer, const flap_json_object *normalizer) {
  const char *type;
  FLAP_TRY(flap_json_get_string(normalizer, "type", &type));
  if (strcmp(type, "NFC") == 0) {
    tokenizer->nfc = true;
    return FLAP_OK;
  }
  if (strcmp(type, "Sequence") != 0)
    return flap_tokenizer_unsupported(normalizer, "type", type);
  const json_t *list;
  FLAP_TRY(flap_json_get_array(normalizer, "normalizers", &list));
  for (size_t i = 0; i < json_array_size(list); i++) {
    flap_json_object item;
    FLAP_TRY(flap_tokenizer_array_object(normalizer, "normalizers", list, i, &item));
    FLAP_TRY(flap_json_get_string(&item, "type", &type));
    if (strcmp(type, "NFC") != 0) /* NFC twice is NFC */
      return flap_tokenizer_unsupported(&item, "type", type);
    tokenizer->nfc = true;
  }
  return FLAP_OK;
}

static flap_status add_split(flap_tokenizer *tokenizer, const flap_json_object *object,
                             const flap_split_options *options) {
  if (tokenizer->split_count == FLAP_TOKENIZER_SPLITS_MAX)
    return flap_json_error(object, NULL, "more than %u stages", FLAP_TOKENIZER_SPLITS_MAX);
  return flap_split_open(options, &tokenizer->splits[tokenizer->split_count++]);
}

static flap_status load_split(flap_tokenizer *tokenizer, const flap_json_object *object) {
  flap_json_object pattern;
  flap_split_options options = {.file = object->file};
  const char *behavior;
  FLAP_TRY(flap_json_get_object(object, "pattern", &pattern));
  options.literal = flap_json_has(&pattern, "String");
  FLAP_TRY(flap_json_get_string(&pattern, options.literal ? "String" : "Regex", &options.pattern));
  FLAP_TRY(flap_json_get_string(object, "behavior", &behavior));
  FLAP_TRY(flap_json_opt_bool(object, "invert", false, &options.invert));
  options.removed = strcmp(behavior, "Removed") == 0;
  if (!options.removed && strcmp(behavior, "Isolated") != 0)
    return flap_tokenizer_unsupported(object, "behavior", behavior);
  return add_split(tokenizer, object, &options);
}

/* One stage; `*ended` once ByteLevel was seen, after which nothing may follow. */
static flap_status load_stage(flap_tokenizer *tokenizer, const flap_json_object *stage, bool *ended) {
  const char *type;
  FLAP_TRY(flap_json_get_string(stage, "type", &type));
  if (*ended)
    return flap_tokenizer_unsupported(stage, "type", "a stage after ByteLevel");
  if (strcmp(type, "Split") == 0)
    return load_split(tokenizer, stage);
  if (strcmp(type, "Digits") == 0) {
    bool individual;
    FLAP_TRY(flap_json_opt_bool(stage, "individual_digits", false, &individual));
    flap_split_options options = {.file = stage->file, .pattern = individual ? "\\p{N}" : "\\p{N}+"};
    return add_split(tokenizer, stage, &options);
  }
  if (strcmp(type, "ByteLevel") != 0)
    return flap_tokenizer_unsupported(stage, "type", type);
  *ended = true;
  bool use_regex;
  FLAP_TRY(flap_json_opt_bool(stage, "add_prefix_space", true, &tokenizer->add_prefix_space));
  FLAP_TRY(flap_json_opt_bool(stage, "use_regex", true, &use_regex));
  if (!use_regex)
    return FLAP_OK;
  flap_split_options options = {.file = stage->file, .pattern = GPT2_PATTERN};
  return flap_split_open(&options, &tokenizer->byte_level_split);
}

static flap_status load_pre_tokenizer(flap_tokenizer *tokenizer, const flap_json_object *root) {
  flap_json_object object;
  const char *type;
  bool ended = false;
  if (!flap_json_has(root, "pre_tokenizer"))
    return flap_tokenizer_unsupported(root, "pre_tokenizer", "none");
  FLAP_TRY(flap_json_get_object(root, "pre_tokenizer", &object));
  FLAP_TRY(flap_json_get_string(&object, "type", &type));
  if (strcmp(type, "Sequence") == 0) {
    const json_t *list;
    FLAP_TRY(flap_json_get_array(&object, "pretokenizers", &list));
    for (size_t i = 0; i < json_array_size(list); i++) {
      flap_json_object stage;
      FLAP_TRY(flap_tokenizer_array_object(&object, "pretokenizers", list, i, &stage));
      FLAP_TRY(load_stage(tokenizer, &stage, &ended));
    }
  } else {
    FLAP_TRY(load_stage(tokenizer, &object, &ended));
  }
  return ended ? FLAP_OK : flap_tokenizer_unsupported(&object, "type", "one without ByteLevel");
}

static flap_status check_decoder(const flap_json_object *root) {
  if (!flap_json_has(root, "decoder"))
    return FLAP_OK;
  flap_json_object decoder;
  const char *type;
  FLAP_TRY(flap_json_get_object(root, "decoder", &decoder));
  FLAP_TRY(flap_json_get_string(&decoder, "type", &type));
  return strcmp(type, "ByteLevel") == 0 ? FLAP_OK : flap_tokenizer_unsupported(&decoder, "type", type);
}

/* ---- post-processor ------------------------------------------------------------------------------------ */

static flap_status load_template_special(flap_tokenizer *tokenizer, const flap_json_object *processor,
                                         const flap_json_object *item, bool before) {
  flap_json_object special, all, named;
  const char *name;
  int64_t ids[FLAP_TOKENIZER_TEMPLATE_MAX];
  size_t count;
  FLAP_TRY(flap_json_get_object(item, "SpecialToken", &special));
  FLAP_TRY(flap_json_get_string(&special, "id", &name));
  FLAP_TRY(flap_json_get_object(processor, "special_tokens", &all));
  FLAP_TRY(flap_json_get_object(&all, name, &named));
  FLAP_TRY(flap_json_get_integers(&named, "ids", 0, (int64_t)tokenizer->id_count - 1, ids, FLAP_TOKENIZER_TEMPLATE_MAX,
                                  &count));
  int32_t *out = before ? tokenizer->before : tokenizer->after;
  uint32_t *out_count = before ? &tokenizer->before_count : &tokenizer->after_count;
  if (count > FLAP_TOKENIZER_TEMPLATE_MAX - *out_count)
    return flap_json_error(item, NULL, "more than %u tokens on one side of the text", FLAP_TOKENIZER_TEMPLATE_MAX);
  for (size_t i = 0; i < count; i++) {
    if (tokenizer->tokens[ids[i]].raw == NULL)
      return flap_json_error(&named, "ids", "%lld is not the id of a token", (long long)ids[i]);
    out[(*out_count)++] = (int32_t)ids[i];
  }
  return FLAP_OK;
}

static flap_status load_template(flap_tokenizer *tokenizer, const flap_json_object *processor) {
  const json_t *list;
  bool before = true;
  if (tokenizer->before_count + tokenizer->after_count > 0)
    return flap_tokenizer_unsupported(processor, "type", "a second template");
  FLAP_TRY(flap_json_get_array(processor, "single", &list));
  for (size_t i = 0; i < json_array_size(list); i++) {
    flap_json_object item;
    FLAP_TRY(flap_tokenizer_array_object(processor, "single", list, i, &item));
    if (!flap_json_has(&item, "Sequence")) {
      FLAP_TRY(load_template_special(tokenizer, processor, &item, before));
      continue;
    }
    if (!before)
      return flap_tokenizer_unsupported(&item, "Sequence", "a template that repeats the text");
    before = false;
  }
  return before ? flap_tokenizer_unsupported(processor, "single", "a template without the text") : FLAP_OK;
}

/* `depth` keeps nested sequences from going on for ever. */
static flap_status load_processor(flap_tokenizer *tokenizer, const flap_json_object *processor, int depth) {
  const char *type;
  FLAP_TRY(flap_json_get_string(processor, "type", &type));
  if (strcmp(type, "ByteLevel") == 0) /* offsets only */
    return FLAP_OK;
  if (strcmp(type, "TemplateProcessing") == 0)
    return load_template(tokenizer, processor);
  if (strcmp(type, "Sequence") != 0 || depth > 4)
    return flap_tokenizer_unsupported(processor, "type", type);
  const json_t *list;
  FLAP_TRY(flap_json_get_array(processor, "processors", &list));
  for (size_t i = 0; i < json_array_size(list); i++) {
    flap_json_object item;
    FLAP_TRY(flap_tokenizer_array_object(processor, "processors", list, i, &item));
    FLAP_TRY(load_processor(tokenizer, &item, depth + 1));
  }
  return FLAP_OK;
}

/* ---- tokenizer.json as a whole ------------------------------------------------------------------------- */

static flap_status load_stages(flap_tokenizer *tokenizer, const flap_json_object *root, const json_t *added) {
  flap_json_object object;
  if (tokenizer->metaspace != NULL) {
    FLAP_TRY(flap_tokenizer_load_metaspace_stages(tokenizer, root));
  } else {
    if (flap_json_has(root, "normalizer")) {
      FLAP_TRY(flap_json_get_object(root, "normalizer", &object));
      FLAP_TRY(load_normalizer(tokenizer, &object));
    }
    FLAP_TRY(load_pre_tokenizer(tokenizer, root));
    FLAP_TRY(check_decoder(root));
  }
  FLAP_TRY(load_added(tokenizer, root, added));
  if (tokenizer->metaspace != NULL)
    flap_tokenizer_finish_metaspace(tokenizer);
  if (flap_json_has(root, "post_processor")) {
    FLAP_TRY(flap_json_get_object(root, "post_processor", &object));
    FLAP_TRY(load_processor(tokenizer, &object, 0));
  }
  return FLAP_OK;
}

static flap_status load_tokenizer(const char *path, const json_t *json, flap_tokenizer **tokenizer_out) {
  flap_json_object root, model, vocab;
  const json_t *merges, *added = NULL;
  FLAP_TRY(flap_json_root(json, path, &root));
  FLAP_TRY(flap_json_get_object(&root, "model", &model));
  bool byte_fallback;
  FLAP_TRY(check_model(&model, &byte_fallback));
  FLAP_TRY(flap_json_get_object(&model, "vocab", &vocab));
  FLAP_TRY(flap_json_get_array(&model, "merges", &merges));
  if (flap_json_has(&root, "added_tokens"))
    FLAP_TRY(flap_json_get_array(&root, "added_tokens", &added));
  uint32_t id_count = 0;
  uint64_t strings = 0, bytes = 0;
  FLAP_TRY(measure_vocab(&root, &vocab, added, &id_count, &strings, &bytes));
  flap_tokenizer *tokenizer;
  FLAP_TRY(flap_tokenizer_take(path, id_count, strings, bytes, json_array_size(merges), &tokenizer));
  flap_status status;
  if (byte_fallback)
    FLAP_TRY_GOTO(status, flap_metaspace_open(&tokenizer->metaspace));
  FLAP_TRY_GOTO(status, load_vocab(tokenizer, &model, &vocab));
  FLAP_TRY_GOTO(status, load_merges(tokenizer, &model, merges));
  FLAP_TRY_GOTO(status, load_whole_words(tokenizer, &model));
  FLAP_TRY_GOTO(status, load_stages(tokenizer, &root, added));
  *tokenizer_out = tokenizer;
  return FLAP_OK;
fail:
  flap_tokenizer_close(tokenizer);
  return status;
}

/* ---- the files beside it ------------------------------------------------------------------------------- */

/* The id of "bos_token": "<s>" or {"content": "<s>"}. `*settled` once the key was there, be it null. */
static flap_status read_named(const flap_tokenizer *tokenizer, const flap_json_object *root, const char *key,
                              bool *settled, int32_t *id_out) {
  const json_t *value = json_object_get(root->json, key);
  if (value == NULL || *settled)
    return FLAP_OK;
  *settled = true;
  if (json_is_null(value))
    return FLAP_OK;
  if (json_is_object(value))
    value = json_object_get(value, "content");
  if (!json_is_string(value))
    return flap_json_error(root, key, "must be a token's text, or an object with its \"content\"");
  char shown[FLAP_UTF8_SHOWN_BYTES];
  *id_out = flap_tokenizer_find(tokenizer, json_string_value(value));
  if (*id_out < 0)
    return flap_json_error(root, key, "the token \"%s\" is not in tokenizer.json",
                           flap_utf8_show(json_string_value(value), shown));
  return FLAP_OK;
}

/* The id of "eos_token_id": 2, or [2, 3], of which the first one counts. */
static flap_status read_numbered(const flap_tokenizer *tokenizer, const flap_json_object *root, const char *key,
                                 bool *settled, int32_t *id_out) {
  const json_t *value = json_object_get(root->json, key);
  if (value == NULL || *settled || json_is_null(value))
    return FLAP_OK;
  if (json_is_array(value))
    value = json_array_get(value, 0);
  if (!json_is_integer(value) || json_integer_value(value) < 0 ||
      json_integer_value(value) >= (json_int_t)tokenizer->id_count ||
      tokenizer->tokens[json_integer_value(value)].raw == NULL)
    return flap_json_error(root, key, "is not the id of a token of tokenizer.json");
  *settled = true;
  *id_out = (int32_t)json_integer_value(value);
  return FLAP_OK;
}

/* Tokens that transformers adds to those of tokenizer.json, and that are words like others here. */
typedef struct unknown_tokens {
  const char *key, *content; /* of the first */
  uint32_t count;
} unknown_tokens;

static void look_at_token(const flap_tokenizer *tokenizer, const char *key, const json_t *value,
                          unknown_tokens *unknown) {
  if (json_is_object(value))
    value = json_object_get(value, "content");
  const char *content = json_string_value(value);
  if (content == NULL || content[0] == '\0' || flap_tokenizer_find(tokenizer, content) >= 0)
    return;
  if (unknown->count++ == 0) {
    unknown->key = key;
    unknown->content = content;
  }
}

static void warn_of_unknown_tokens(const flap_tokenizer *tokenizer, const flap_json_object *root) {
  static const char *const keys[] = {"pad_token", "unk_token", "sep_token", "cls_token", "mask_token"};
  static const char *const lists[] = {"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"};
  unknown_tokens unknown = {0};
  char shown[FLAP_UTF8_SHOWN_BYTES];
  for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
    json_t *list = json_object_get(root->json, lists[i]), *value;
    const char *name;
    json_object_foreach(list, name, value) {
      look_at_token(tokenizer, lists[i], value, &unknown);
    }
    for (size_t at = 0; at < json_array_size(list); at++)
      look_at_token(tokenizer, lists[i], json_array_get(list, at), &unknown);
  }
  for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
    look_at_token(tokenizer, keys[i], json_object_get(root->json, keys[i]), &unknown);
  if (unknown.count > 0)
    flap_log(
        FLAP_LOG_WARNING,
        "%s: %s: the token \"%s\" is not in tokenizer.json (%u such in all): AutoTokenizer of transformers adds it, "
        "FLAP cuts it into pieces like other text; its save_pretrained writes a tokenizer.json that has it",
        root->file, unknown.key, flap_utf8_show(unknown.content, shown), unknown.count);
}

static flap_status read_beside(flap_tokenizer *tokenizer, const char *path, bool numbered, bool settled[2]) {
  json_t *json;
  flap_status status = flap_json_load_file(path, FLAP_JSON_BYTES_MAX, &json);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    return FLAP_OK;
  }
  FLAP_TRY(status);
  flap_json_object root;
  FLAP_TRY_GOTO(status, flap_json_root(json, path, &root));
  if (numbered) {
    FLAP_TRY_GOTO(status, read_numbered(tokenizer, &root, "eos_token_id", &settled[0], &tokenizer->end));
    FLAP_TRY_GOTO(status, read_numbered(tokenizer, &root, "bos_token_id", &settled[1], &tokenizer->begin));
  } else {
    FLAP_TRY_GOTO(status, read_named(tokenizer, &root, "eos_token", &settled[0], &tokenizer->end));
    FLAP_TRY_GOTO(status, read_named(tokenizer, &root, "bos_token", &settled[1], &tokenizer->begin));
    warn_of_unknown_tokens(tokenizer, &root);
  }
fail:
  json_decref(json);
  return status;
}

static void guess_begin_and_end(flap_tokenizer *tokenizer, const bool settled[2]) {
  static const char *const ends[] = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"};
  for (size_t i = 0; i < sizeof ends / sizeof ends[0] && !settled[0] && tokenizer->end < 0; i++)
    tokenizer->end = flap_tokenizer_find(tokenizer, ends[i]);
  if (!settled[1] && tokenizer->before_count > 0)
    tokenizer->begin = tokenizer->before[0];
}

static flap_status open_beside(flap_tokenizer *tokenizer, const char *folder) {
  bool settled[2] = {false, false};
  char path[FLAP_DURABLE_PATH_MAX];
  for (int file = FLAP_FILE_CONFIG; file < FLAP_FILE_COUNT; file++) {
    FLAP_TRY(flap_durable_join(path, folder, flap_tokenizer_file_names[file]));
    FLAP_TRY(read_beside(tokenizer, path, false, settled));
    tokenizer->files[file] = flap_system_open(path, O_RDONLY | O_CLOEXEC, 0);
    if (tokenizer->files[file] < 0 && errno != ENOENT)
      return flap_error_set_os(errno, "%s", path);
  }
  FLAP_TRY(flap_durable_join(path, folder, "config.json"));
  FLAP_TRY(read_beside(tokenizer, path, true, settled));
  guess_begin_and_end(tokenizer, settled);
  return FLAP_OK;
}

/* Splits a path to a file called tokenizer.json into its folder; false if it is called something else. */
static bool folder_of(const char *path, char folder[FLAP_DURABLE_PATH_MAX]) {
  const char *slash = strrchr(path, '/');
  if (strcmp(slash == NULL ? path : slash + 1, flap_tokenizer_file_names[FLAP_FILE_TOKENIZER]) != 0)
    return false;
  size_t length = slash == NULL ? 0 : slash == path ? 1 : (size_t)(slash - path);
  memcpy(folder, length > 0 ? path : ".", length > 0 ? length : 1);
  folder[length > 0 ? length : 1] = '\0';
  return true;
}

static flap_status file_in(const char *folder, char file_out[FLAP_DURABLE_PATH_MAX]) {
  bool there = false;
  FLAP_TRY(flap_durable_join(file_out, folder, flap_tokenizer_file_names[FLAP_FILE_TOKENIZER]));
  FLAP_TRY(flap_durable_look(file_out, &there));
  if (there)
    return FLAP_OK;
  return flap_error_set(FLAP_NOT_FOUND, "tokenizer: %s holds no tokenizer.json: name one, or `bytes`", folder);
}

flap_status flap_tokenizer_open(const char *path, flap_tokenizer **tokenizer_out) {
  *tokenizer_out = NULL;
  char file[FLAP_DURABLE_PATH_MAX], folder[FLAP_DURABLE_PATH_MAX];
  struct stat info;
  if (strlen(path) >= FLAP_DURABLE_PATH_MAX)
    return flap_error_set(FLAP_INVALID, "%.100s...: the path is too long", path);
  if (flap_system_stat(path, &info) != 0)
    return flap_error_set_os(errno, "%s: cannot open the tokenizer", path);
  if (S_ISDIR(info.st_mode))
    FLAP_TRY(file_in(path, file));
  else
    memcpy(file, path, strlen(path) + 1);
  json_t *json = NULL;
  flap_tokenizer *tokenizer = NULL;
  flap_status status;
  FLAP_TRY_GOTO(status, flap_json_load_file(file, FLAP_JSON_BYTES_MAX, &json));
  FLAP_TRY_GOTO(status, load_tokenizer(file, json, &tokenizer));
  tokenizer->files[FLAP_FILE_TOKENIZER] = flap_system_open(file, O_RDONLY | O_CLOEXEC, 0);
  if (tokenizer->files[FLAP_FILE_TOKENIZER] < 0) {
    status = flap_error_set_os(errno, "%s", file);
    goto fail;
  }
  if (folder_of(file, folder))
    FLAP_TRY_GOTO(status, open_beside(tokenizer, folder));
  else
    guess_begin_and_end(tokenizer, (const bool[2]){false, false});
  json_decref(json);
  *tokenizer_out = tokenizer;
  return FLAP_OK;
fail:
  json_decref(json);
  flap_tokenizer_close(tokenizer);
  return status;
}
