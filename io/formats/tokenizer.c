/* The tokenizer's tables, the byte tokenizer, and what needs no pattern: see tokenizer_encode.c for text to ids and
 * tokenizer_load.c for tokenizer.json. */
#include "io/formats/tokenizer_internal.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const flap_tokenizer_file_names[FLAP_FILE_COUNT] = {
    [FLAP_FILE_TOKENIZER] = "tokenizer.json",
    [FLAP_FILE_CONFIG] = "tokenizer_config.json",
    [FLAP_FILE_SPECIAL_MAP] = "special_tokens_map.json",
};

/* Printable bytes stand for themselves; the 68 others take the characters from U+0100 on, in order. */
static bool is_printable(uint32_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

uint32_t flap_tokenizer_byte_to_code(uint8_t byte) {
  if (is_printable(byte))
    return byte;
  uint32_t code = 0x100;
  for (uint32_t other = 0; other < byte; other++)
    code += !is_printable(other);
  return code;
}

int flap_tokenizer_code_to_byte(uint32_t code) {
  if (code < 0x100)
    return is_printable(code) ? (int)code : -1;
  if (code > 0x143)
    return -1;
  if (code <= 0x120)
    return (int)(code - 0x100); /* 0x00 to 0x20 */
  return code == 0x143 ? 0xAD : (int)(code - 0x121 + 0x7F);
}

flap_status flap_tokenizer_take(const char *name, uint32_t id_count, uint64_t strings_max, uint64_t pool_bytes,
                                uint64_t merges_max, flap_tokenizer **tokenizer_out) {
  *tokenizer_out = NULL;
  flap_tokenizer *tokenizer = calloc(1, sizeof *tokenizer);
  if (tokenizer == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a tokenizer", name);
  for (int file = 0; file < FLAP_FILE_COUNT; file++)
    tokenizer->files[file] = -1;
  tokenizer->begin = tokenizer->end = -1;
  tokenizer->id_count = id_count;
  tokenizer->pool_bytes = pool_bytes;
  tokenizer->name = strdup(name);
  tokenizer->pool = malloc(pool_bytes + 1);
  tokenizer->tokens = calloc(id_count, sizeof *tokenizer->tokens);
  flap_status status = FLAP_OK;
  if (tokenizer->name == NULL || tokenizer->pool == NULL || tokenizer->tokens == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "%s: no memory for %u tokens", name, (unsigned)id_count);
    goto fail;
  }
  FLAP_TRY_GOTO(status, flap_text_map_open(&tokenizer->by_raw, strings_max));
  FLAP_TRY_GOTO(status, flap_bpe_open(merges_max, &tokenizer->bpe));
  *tokenizer_out = tokenizer;
  return FLAP_OK;
fail:
  flap_tokenizer_close(tokenizer);
  return status;
}

void flap_tokenizer_close(flap_tokenizer *tokenizer) {
  if (tokenizer == NULL)
    return;
  for (int file = 0; file < FLAP_FILE_COUNT; file++)
    if (tokenizer->files[file] >= 0)
      (void)flap_system_close(tokenizer->files[file]);
  for (uint32_t i = 0; i < tokenizer->split_count; i++)
    flap_split_close(tokenizer->splits[i]);
  flap_split_close(tokenizer->byte_level_split);
  flap_text_map_close(&tokenizer->by_raw);
  flap_text_map_close(&tokenizer->whole_words);
  flap_bpe_close(tokenizer->bpe);
  flap_metaspace_close(tokenizer->metaspace);
  flap_nfc_close(&tokenizer->nfc_scratch);
  free(tokenizer->added[0].items);
  free(tokenizer->added[1].items);
  free(tokenizer->prefixed);
  free(tokenizer->tokens);
  free(tokenizer->pool);
  free(tokenizer->name);
  free(tokenizer);
}

const char *flap_tokenizer_pool_copy(flap_tokenizer *tokenizer, const char *text, uint64_t bytes) {
  flap_assert(bytes <= tokenizer->pool_bytes - tokenizer->pool_used);
  char *copy = tokenizer->pool + tokenizer->pool_used;
  memcpy(copy, text, bytes);
  tokenizer->pool_used += bytes;
  return copy;
}

/* The bytes that a token spells in the byte alphabet; a token with any other character is its own text. */
static void decode_raw(flap_tokenizer *tokenizer, flap_token *token) {
  flap_assert(token->raw_bytes <= tokenizer->pool_bytes - tokenizer->pool_used);
  char *out = tokenizer->pool + tokenizer->pool_used;
  uint32_t count = 0;
  for (uint32_t at = 0; at < token->raw_bytes;) {
    uint32_t code = 0;
    unsigned length = flap_utf8_decode(token->raw + at, token->raw_bytes - at, &code);
    int byte = length > 0 ? flap_tokenizer_code_to_byte(code) : -1;
    if (byte < 0) {
      token->bytes = token->raw;
      token->byte_count = token->raw_bytes;
      return;
    }
    out[count++] = (char)byte;
    at += length;
  }
  tokenizer->pool_used += count;
  token->bytes = out;
  token->byte_count = count;
}

bool flap_tokenizer_put_token(flap_tokenizer *tokenizer, const char *raw, uint32_t raw_bytes, int32_t id) {
  flap_assert(id >= 0 && (uint32_t)id < tokenizer->id_count);
  flap_token *token = &tokenizer->tokens[id];
  if (token->raw != NULL)
    return false;
  token->raw = flap_tokenizer_pool_copy(tokenizer, raw, raw_bytes);
  token->raw_bytes = raw_bytes;
  token->bytes = token->raw; /* until its decoder is known */
  token->byte_count = raw_bytes;
  if (tokenizer->metaspace == NULL)
    decode_raw(tokenizer, token);
  (void)flap_text_map_put(&tokenizer->by_raw, token->raw, raw_bytes, id);
  return true;
}

static int compare_added(const void *left, const void *right) {
  const flap_added *a = left, *b = right;
  unsigned char first_a = (unsigned char)a->content[0], first_b = (unsigned char)b->content[0];
  if (first_a != first_b)
    return first_a < first_b ? -1 : 1;
  if (a->bytes != b->bytes)
    return a->bytes > b->bytes ? -1 : 1;
  /* Two that are the same once normalized: the library takes either, we always the earlier one. */
  return a->id < b->id ? -1 : a->id > b->id;
}

void flap_tokenizer_finish_added(flap_tokenizer *tokenizer) {
  for (int kind = 0; kind < 2; kind++) {
    flap_added_set *set = &tokenizer->added[kind];
    if (set->count > 1)
      qsort(set->items, set->count, sizeof *set->items, compare_added);
    uint32_t item = 0;
    for (uint32_t byte = 0; byte <= 256; byte++) {
      while (item < set->count && (unsigned char)set->items[item].content[0] < byte)
        item++;
      set->first[byte] = item;
    }
    for (uint32_t i = 0; i < set->count; i++) {
      const flap_added *added = &set->items[i];
      if (kind == 1)
        tokenizer->tokens[added->id].normalized = i + 1;
      tokenizer->added_across_spaces |= added->lstrip || added->rstrip;
      uint32_t code = 0;
      for (uint32_t at = 0; at < added->bytes; at += flap_utf8_decode(added->content + at, added->bytes - at, &code))
        tokenizer->added_across_spaces |=
            flap_utf8_decode(added->content + at, added->bytes - at, &code) > 0 && flap_utf8_is_space(code);
    }
  }
}

const char *flap_tokenizer_spelling(const flap_tokenizer *tokenizer, int32_t id, uint32_t *bytes_out) {
  const flap_token *token = &tokenizer->tokens[id];
  const flap_added *added = token->normalized > 0 ? &tokenizer->added[1].items[token->normalized - 1] : NULL;
  *bytes_out = added != NULL ? added->bytes : token->raw_bytes;
  return added != NULL ? added->content : token->raw;
}

flap_status flap_tokenizer_open_bytes(flap_tokenizer **tokenizer_out) {
  FLAP_TRY(flap_tokenizer_take("bytes", 257, 257, 1024, 0, tokenizer_out));
  flap_tokenizer *tokenizer = *tokenizer_out;
  for (int byte = 0; byte < 256; byte++) {
    char raw[4];
    unsigned length = flap_utf8_encode(flap_tokenizer_byte_to_code((uint8_t)byte), raw);
    bool is_new = flap_tokenizer_put_token(tokenizer, raw, length, byte);
    flap_assert(is_new && tokenizer->tokens[byte].byte_count == 1 && (uint8_t)tokenizer->tokens[byte].bytes[0] == byte);
    flap_bpe_set_byte(tokenizer->bpe, (uint8_t)byte, byte);
  }
  bool is_new = flap_tokenizer_put_token(tokenizer, FLAP_TOKENIZER_BYTES_END, strlen(FLAP_TOKENIZER_BYTES_END), 256);
  flap_assert(is_new);
  tokenizer->tokens[256].special = true;
  tokenizer->added[0].items = calloc(1, sizeof(flap_added));
  if (tokenizer->added[0].items == NULL) {
    flap_tokenizer_close(tokenizer);
    *tokenizer_out = NULL;
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a tokenizer");
  }
  tokenizer->added[0].items[0] = (flap_added){
      .content = tokenizer->tokens[256].raw, .bytes = tokenizer->tokens[256].raw_bytes, .id = 256, .special = true};
  tokenizer->added[0].count = 1;
  flap_tokenizer_finish_added(tokenizer);
  tokenizer->end = 256;
  tokenizer->is_bytes = true;
  return FLAP_OK;
}

const char *flap_tokenizer_name(const flap_tokenizer *tokenizer) {
  return tokenizer->name;
}
uint32_t flap_tokenizer_vocabulary(const flap_tokenizer *tokenizer) {
  return tokenizer->id_count;
}
int32_t flap_tokenizer_end(const flap_tokenizer *tokenizer) {
  return tokenizer->end;
}
int32_t flap_tokenizer_begin(const flap_tokenizer *tokenizer) {
  return tokenizer->begin;
}

int32_t flap_tokenizer_find(const flap_tokenizer *tokenizer, const char *token) {
  size_t bytes = strlen(token);
  return bytes > UINT32_MAX ? -1 : flap_text_map_get(&tokenizer->by_raw, token, (uint32_t)bytes);
}

bool flap_tokenizer_is_nfc_byte_level(const flap_tokenizer *tokenizer) {
  return tokenizer->nfc && tokenizer->metaspace == NULL;
}

bool flap_tokenizer_is_special(const flap_tokenizer *tokenizer, int32_t id) {
  return id >= 0 && (uint32_t)id < tokenizer->id_count && tokenizer->tokens[id].special;
}

const char *flap_tokenizer_decode(const flap_tokenizer *tokenizer, int32_t id, uint64_t *bytes_out) {
  *bytes_out = 0;
  if (id < 0 || (uint32_t)id >= tokenizer->id_count || tokenizer->tokens[id].raw == NULL)
    return NULL;
  *bytes_out = tokenizer->tokens[id].byte_count;
  return tokenizer->tokens[id].bytes;
}
