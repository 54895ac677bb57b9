/* The parts of tokenizer.json that only SentencePiece-style tokenizers have, or have in another form. */
#include "io/formats/tokenizer_load.h"

#include "base/assert.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdio.h>
#include <string.h>

#define STRIP_SPACES_MAX 1024

/* ---- model --------------------------------------------------------------------------------------------- */

static flap_status load_bytes(flap_tokenizer *tokenizer, const flap_json_object *vocab) {
  for (unsigned byte = 0; byte < 256; byte++) {
    char raw[8];
    int length = snprintf(raw, sizeof raw, "<0x%02X>", byte);
    int32_t id = flap_text_map_get(&tokenizer->by_raw, raw, (uint32_t)length);
    if (id < 0)
      return flap_json_error(vocab, NULL, "with byte_fallback, all of <0x00> to <0xFF> must be there: %s is missing",
                             raw);
    tokenizer->metaspace->byte_ids[byte] = id;
  }
  return FLAP_OK;
}

flap_status flap_tokenizer_load_metaspace(flap_tokenizer *tokenizer, const flap_json_object *model,
                                          const flap_json_object *vocab) {
  bool ignore_merges, fuse_unk;
  const char *unknown;
  FLAP_TRY(flap_json_opt_bool(model, "ignore_merges", false, &ignore_merges));
  if (ignore_merges)
    return flap_tokenizer_unsupported(model, "ignore_merges", "true beside byte_fallback");
  FLAP_TRY(load_bytes(tokenizer, vocab));
  /* With all bytes there nothing is unknown, so that neither of these two has an effect. */
  FLAP_TRY(flap_json_opt_bool(model, "fuse_unk", false, &fuse_unk));
  FLAP_TRY(flap_json_opt_string(model, "unk_token", NULL, &unknown));
  char shown[FLAP_UTF8_SHOWN_BYTES];
  if (unknown != NULL && flap_tokenizer_find(tokenizer, unknown) < 0)
    return flap_json_error(model, "unk_token", "\"%s\" is not in the vocabulary", flap_utf8_show(unknown, shown));
  for (uint32_t id = 0; id < tokenizer->id_count; id++) {
    const flap_token *token = &tokenizer->tokens[id];
    uint32_t code = 0;
    if (token->raw_bytes > 0 && flap_utf8_decode(token->raw, token->raw_bytes, &code) == token->raw_bytes)
      FLAP_TRY(flap_metaspace_put_character(tokenizer->metaspace, code, (int32_t)id));
  }
  return FLAP_OK;
}

static bool is_byte(const flap_tokenizer *tokenizer, int32_t id) {
  int byte = flap_metaspace_byte(tokenizer->tokens[id].raw, tokenizer->tokens[id].raw_bytes);
  return byte >= 0 && tokenizer->metaspace->byte_ids[byte] == id;
}

flap_status flap_tokenizer_put_joins(flap_tokenizer *tokenizer, int32_t left_id, int32_t right_id) {
  const flap_token *left = &tokenizer->tokens[left_id], *right = &tokenizer->tokens[right_id];
  uint32_t last = 0, first = 0;
  tokenizer->metaspace->bytes_join |= is_byte(tokenizer, left_id) || is_byte(tokenizer, right_id);
  /* JSON's strings are valid UTF-8. */
  unsigned found = flap_utf8_decode_before(left->raw, left->raw_bytes, &last);
  found = found == 0 ? 0 : flap_utf8_decode(right->raw, right->raw_bytes, &first);
  flap_assert(found > 0);
  return flap_metaspace_put_join(tokenizer->metaspace, last, first);
}

/* ---- normalizer ---------------------------------------------------------------------------------------- */

/* A Replace of the one text by the other, be it a normalizer or a decoder. */
static flap_status check_replace(const flap_json_object *object, const char *from, const char *to) {
  flap_json_object pattern;
  const char *text;
  FLAP_TRY(flap_json_get_object(object, "pattern", &pattern));
  if (!flap_json_has(&pattern, "String"))
    return flap_tokenizer_unsupported(object, "pattern", "another pattern than a String");
  FLAP_TRY(flap_json_get_string(&pattern, "String", &text));
  if (strcmp(text, from) != 0)
    return flap_tokenizer_unsupported(object, "pattern", text);
  FLAP_TRY(flap_json_get_string(object, "content", &text));
  return strcmp(text, to) == 0 ? FLAP_OK : flap_tokenizer_unsupported(object, "content", text);
}

static flap_status load_normalizer(flap_metaspace *metaspace, const flap_json_object *object) {
  const char *text;
  FLAP_TRY(flap_json_get_string(object, "type", &text));
  if (strcmp(text, "Replace") == 0) {
    FLAP_TRY(check_replace(object, " ", FLAP_METASPACE_TEXT));
    metaspace->replace = true;
    return FLAP_OK;
  }
  if (strcmp(text, "Prepend") != 0)
    return flap_tokenizer_unsupported(object, "type", text);
  FLAP_TRY(flap_json_get_string(object, "prepend", &text));
  if (strcmp(text, FLAP_METASPACE_TEXT) != 0)
    return flap_tokenizer_unsupported(object, "prepend", text);
  if (metaspace->prepend)
    return flap_tokenizer_unsupported(object, "type", "a second Prepend");
  metaspace->prepend = true;
  return FLAP_OK;
}

static flap_status load_normalizers(flap_metaspace *metaspace, const flap_json_object *root) {
  flap_json_object object, item;
  const char *type;
  const json_t *list;
  if (!flap_json_has(root, "normalizer"))
    return FLAP_OK;
  FLAP_TRY(flap_json_get_object(root, "normalizer", &object));
  FLAP_TRY(flap_json_get_string(&object, "type", &type));
  if (strcmp(type, "Sequence") != 0)
    return load_normalizer(metaspace, &object);
  FLAP_TRY(flap_json_get_array(&object, "normalizers", &list));
  for (size_t i = 0; i < json_array_size(list); i++) {
    FLAP_TRY(flap_tokenizer_array_object(&object, "normalizers", list, i, &item));
    FLAP_TRY(load_normalizer(metaspace, &item));
  }
  return FLAP_OK;
}

/* ---- pre-tokenizer ------------------------------------------------------------------------------------- */

/* Older files have add_prefix_space in place of prepend_scheme. */
static flap_status read_metaspace(const flap_json_object *object, flap_prefix *prefix_out, bool *split_out) {
  static const char *const words[] = {
      [FLAP_PREFIX_NEVER] = "never", [FLAP_PREFIX_FIRST] = "first", [FLAP_PREFIX_ALWAYS] = "always"};
  const char *text;
  bool add_prefix_space;
  FLAP_TRY(flap_json_get_string(object, "replacement", &text));
  if (strcmp(text, FLAP_METASPACE_TEXT) != 0)
    return flap_tokenizer_unsupported(object, "replacement", text);
  FLAP_TRY(flap_json_opt_bool(object, "split", true, split_out));
  FLAP_TRY(flap_json_opt_bool(object, "add_prefix_space", true, &add_prefix_space));
  FLAP_TRY(flap_json_opt_string(object, "prepend_scheme", add_prefix_space ? "always" : "never", &text));
  for (int i = FLAP_PREFIX_NEVER; i <= FLAP_PREFIX_ALWAYS; i++) {
    if (strcmp(text, words[i]) != 0)
      continue;
    if (!add_prefix_space && i != FLAP_PREFIX_NEVER)
      return flap_json_error(object, "add_prefix_space", "false contradicts a prepend_scheme of \"%s\"", words[i]);
    *prefix_out = (flap_prefix)i;
    return FLAP_OK;
  }
  return flap_tokenizer_unsupported(object, "prepend_scheme", text);
}

static flap_status load_pre_tokenizer(flap_metaspace *metaspace, const flap_json_object *object) {
  const char *type;
  FLAP_TRY(flap_json_get_string(object, "type", &type));
  if (strcmp(type, "Metaspace") == 0 && !metaspace->stage) {
    metaspace->stage = true;
    return read_metaspace(object, &metaspace->prefix, &metaspace->split);
  }
  if (strcmp(type, "Split") != 0)
    return flap_tokenizer_unsupported(object, "type", metaspace->stage ? "a stage beside Metaspace" : type);
  /* Gemma's: at spaces, of which the normalizer has left none. */
  flap_json_object pattern;
  const char *text;
  bool invert;
  FLAP_TRY(flap_json_get_object(object, "pattern", &pattern));
  FLAP_TRY(flap_json_opt_string(&pattern, "String", "", &text));
  FLAP_TRY(flap_json_opt_bool(object, "invert", false, &invert));
  if (strcmp(text, " ") != 0 || invert || !metaspace->replace)
    return flap_tokenizer_unsupported(object, "pattern",
                                      "beside byte_fallback a Split, but at spaces that are replaced,");
  return FLAP_OK;
}

static flap_status load_pre_tokenizers(flap_metaspace *metaspace, const flap_json_object *root) {
  flap_json_object object, item;
  const char *type;
  const json_t *list;
  if (!flap_json_has(root, "pre_tokenizer"))
    return FLAP_OK;
  FLAP_TRY(flap_json_get_object(root, "pre_tokenizer", &object));
  FLAP_TRY(flap_json_get_string(&object, "type", &type));
  if (strcmp(type, "Sequence") != 0)
    return load_pre_tokenizer(metaspace, &object);
  FLAP_TRY(flap_json_get_array(&object, "pretokenizers", &list));
  for (size_t i = 0; i < json_array_size(list); i++) {
    FLAP_TRY(flap_tokenizer_array_object(&object, "pretokenizers", list, i, &item));
    FLAP_TRY(load_pre_tokenizer(metaspace, &item));
  }
  return FLAP_OK;
}

/* ---- decoder ------------------------------------------------------------------------------------------- */

static flap_status load_strip(flap_metaspace_decoder *decoder, const flap_json_object *object) {
  const char *text;
  int64_t start, stop;
  FLAP_TRY(flap_json_get_string(object, "content", &text));
  FLAP_TRY(flap_json_get_integer(object, "start", 0, STRIP_SPACES_MAX, &start));
  FLAP_TRY(flap_json_get_integer(object, "stop", 0, INT64_MAX, &stop));
  if (strcmp(text, " ") != 0)
    return flap_tokenizer_unsupported(object, "content", text);
  if (stop != 0)
    return flap_tokenizer_unsupported(object, "stop", "a Strip at the end");
  decoder->strip_spaces = (uint32_t)start;
  return FLAP_OK;
}

/* One stage; `*place` is the last one's among Replace or Metaspace, ByteFallback, Fuse, Strip: another order gives
 * another text, and so does a Strip of each token. */
static flap_status load_decoder(flap_metaspace_decoder *decoder, const flap_json_object *object, int *place) {
  static const char *const types[] = {"", "Replace", "ByteFallback", "Fuse", "Strip"};
  const char *type;
  int at = 1;
  FLAP_TRY(flap_json_get_string(object, "type", &type));
  bool is_metaspace = strcmp(type, "Metaspace") == 0;
  while (at <= 4 && !is_metaspace && strcmp(type, types[at]) != 0)
    at++;
  if (at > 4)
    return flap_tokenizer_unsupported(object, "type", type);
  if (at <= *place || (at == 4 && *place != 3))
    return flap_tokenizer_unsupported(object, "type",
                                      "a decoder in another order than Replace, ByteFallback, Fuse, Strip");
  *place = at;
  flap_prefix prefix;
  bool split;
  switch (at) {
  case 1:
    if (!is_metaspace)
      FLAP_TRY(check_replace(object, FLAP_METASPACE_TEXT, " "));
    else
      FLAP_TRY(read_metaspace(object, &prefix, &split));
    decoder->replace = true;
    decoder->drop_first = is_metaspace && prefix != FLAP_PREFIX_NEVER;
    return FLAP_OK;
  case 2:
    decoder->byte_fallback = true;
    return FLAP_OK;
  case 3:
    return FLAP_OK; /* texts are joined anyway */
  default:
    return load_strip(decoder, object);
  }
}

static flap_status load_decoders(flap_metaspace_decoder *decoder, const flap_json_object *root) {
  flap_json_object object, item;
  const char *type;
  const json_t *list;
  int place = 0;
  if (!flap_json_has(root, "decoder"))
    return flap_tokenizer_unsupported(root, "decoder", "none beside byte_fallback");
  FLAP_TRY(flap_json_get_object(root, "decoder", &object));
  FLAP_TRY(flap_json_get_string(&object, "type", &type));
  if (strcmp(type, "Sequence") != 0)
    return load_decoder(decoder, &object, &place);
  FLAP_TRY(flap_json_get_array(&object, "decoders", &list));
  for (size_t i = 0; i < json_array_size(list); i++) {
    FLAP_TRY(flap_tokenizer_array_object(&object, "decoders", list, i, &item));
    FLAP_TRY(load_decoder(decoder, &item, &place));
  }
  return FLAP_OK;
}

flap_status flap_tokenizer_load_metaspace_stages(flap_tokenizer *tokenizer, const flap_json_object *root) {
  FLAP_TRY(load_normalizers(tokenizer->metaspace, root));
  FLAP_TRY(load_pre_tokenizers(tokenizer->metaspace, root));
  return load_decoders(&tokenizer->metaspace->decoder, root);
}

void flap_tokenizer_finish_metaspace(flap_tokenizer *tokenizer) {
  for (uint32_t id = 0; id < tokenizer->id_count; id++) {
    flap_token *token = &tokenizer->tokens[id];
    if (token->raw == NULL)
      continue;
    uint32_t spelt;
    const char *spelling = flap_tokenizer_spelling(tokenizer, (int32_t)id, &spelt);
    char *out = tokenizer->pool + tokenizer->pool_used;
    flap_assert(spelt <= tokenizer->pool_bytes - tokenizer->pool_used);
    uint64_t bytes = flap_metaspace_decode(tokenizer->metaspace, spelling, spelt, false, out);
    int byte = tokenizer->metaspace->decoder.byte_fallback ? flap_metaspace_byte(out, bytes) : -1;
    if (byte >= 0) {
      out[0] = (char)byte;
      bytes = 1;
    }
    tokenizer->pool_used += bytes;
    token->bytes = out;
    token->byte_count = (uint32_t)bytes;
  }
}
