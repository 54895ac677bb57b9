/* Characters to symbols, and words that merges cannot leave. */
#include "io/formats/tokenizer_metaspace.h"

#include "base/assert.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdlib.h>
#include <string.h>

#define JOINS_EMPTY UINT64_MAX
#define JOINS_LEAST ((uint64_t)1 << 10)

static flap_status no_memory(void) {
  return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for its characters");
}

flap_status flap_metaspace_open(flap_metaspace **metaspace_out) {
  *metaspace_out = calloc(1, sizeof **metaspace_out);
  return *metaspace_out == NULL ? no_memory() : FLAP_OK;
}

void flap_metaspace_close(flap_metaspace *metaspace) {
  if (metaspace == NULL)
    return;
  for (uint32_t page = 0; page < FLAP_METASPACE_PAGES; page++)
    free(metaspace->pages[page]);
  free(metaspace->joins);
  free(metaspace->normal);
  flap_ids_free(&metaspace->symbols);
  free(metaspace);
}

/* ---- the vocabulary ------------------------------------------------------------------------------------ */

flap_status flap_metaspace_put_character(flap_metaspace *metaspace, uint32_t code, int32_t id) {
  flap_assert(code >> 8 < FLAP_METASPACE_PAGES);
  int32_t **page = &metaspace->pages[code >> 8];
  if (*page == NULL) {
    *page = malloc(256 * sizeof **page);
    if (*page == NULL)
      return no_memory();
    memset(*page, 0xff, 256 * sizeof **page); /* -1 */
  }
  (*page)[code & 0xff] = id;
  return FLAP_OK;
}

static int32_t character_id(const flap_metaspace *metaspace, uint32_t code) {
  const int32_t *page = metaspace->pages[code >> 8];
  return page == NULL ? -1 : page[code & 0xff];
}

static uint64_t *find_join(const flap_metaspace *metaspace, uint64_t pair) {
  uint64_t hash = pair * 0x9E3779B97F4A7C15ull;
  uint64_t slot = (hash ^ hash >> 32) & (metaspace->join_slots - 1);
  while (metaspace->joins[slot] != pair && metaspace->joins[slot] != JOINS_EMPTY)
    slot = (slot + 1) & (metaspace->join_slots - 1);
  return &metaspace->joins[slot];
}

static flap_status grow_joins(flap_metaspace *metaspace) {
  uint64_t old_slots = metaspace->join_slots, slots = old_slots == 0 ? JOINS_LEAST : 2 * old_slots;
  uint64_t *old = metaspace->joins, *joins = malloc(slots * sizeof *joins);
  if (joins == NULL)
    return no_memory();
  memset(joins, 0xff, slots * sizeof *joins); /* JOINS_EMPTY */
  metaspace->joins = joins;
  metaspace->join_slots = slots;
  for (uint64_t slot = 0; slot < old_slots; slot++)
    if (old[slot] != JOINS_EMPTY)
      *find_join(metaspace, old[slot]) = old[slot];
  free(old);
  return FLAP_OK;
}

flap_status flap_metaspace_put_join(flap_metaspace *metaspace, uint32_t left, uint32_t right) {
  if (2 * metaspace->join_count >= metaspace->join_slots)
    FLAP_TRY(grow_joins(metaspace));
  uint64_t pair = (uint64_t)left << 32 | right, *slot = find_join(metaspace, pair);
  metaspace->join_count += *slot == JOINS_EMPTY;
  *slot = pair;
  return FLAP_OK;
}

static bool is_joined(const flap_metaspace *metaspace, uint32_t left, bool left_known, uint32_t right,
                      bool right_known) {
  if (metaspace->split && right == FLAP_METASPACE)
    return false;
  if (!left_known || !right_known)
    return metaspace->bytes_join;
  return metaspace->join_slots > 0 && *find_join(metaspace, (uint64_t)left << 32 | right) != JOINS_EMPTY;
}

bool flap_metaspace_joins(const flap_metaspace *metaspace, uint32_t left, uint32_t right) {
  return is_joined(metaspace, left, character_id(metaspace, left) >= 0, right, character_id(metaspace, right) >= 0);
}

static int hex_digit(char c) {
  return c >= '0' && c <= '9'   ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                : -1;
}

/* Small digits and a plus for the first one are what the library's number parser takes, too. */
int flap_metaspace_byte(const char *token, uint64_t bytes) {
  if (bytes != 6 || memcmp(token, "<0x", 3) != 0 || token[5] != '>')
    return -1;
  int high = token[3] == '+' ? 0 : hex_digit(token[3]), low = hex_digit(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* ---- text ---------------------------------------------------------------------------------------------- */

flap_status flap_metaspace_normalize(flap_metaspace *metaspace, const char *text, uint64_t bytes, bool prefix,
                                     const char **text_out, uint64_t *bytes_out) {
  prefix = prefix && metaspace->prepend && bytes > 0;
  *text_out = text;
  *bytes_out = bytes;
  uint64_t spaces = 0;
  for (uint64_t at = 0; metaspace->replace && at < bytes; at++)
    spaces += text[at] == ' ';
  if (!prefix && spaces == 0)
    return FLAP_OK;
  const uint64_t mark = strlen(FLAP_METASPACE_TEXT), need = bytes + spaces * (mark - 1) + mark;
  if (need > metaspace->normal_max) {
    char *grown = realloc(metaspace->normal, need + need / 2);
    if (grown == NULL)
      return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for a text of %llu bytes", (unsigned long long)bytes);
    metaspace->normal = grown;
    metaspace->normal_max = need + need / 2;
  }
  char *out = metaspace->normal;
  if (prefix) {
    memcpy(out, FLAP_METASPACE_TEXT, mark);
    out += mark;
  }
  for (uint64_t at = 0; at < bytes; at++) {
    if (metaspace->replace && text[at] == ' ') {
      memcpy(out, FLAP_METASPACE_TEXT, mark);
      out += mark;
    } else {
      *out++ = text[at];
    }
  }
  *text_out = metaspace->normal;
  *bytes_out = (uint64_t)(out - metaspace->normal);
  flap_assert(*bytes_out <= metaspace->normal_max);
  return FLAP_OK;
}

static flap_status put_bytes(flap_metaspace *metaspace, const char *text, uint64_t bytes) {
  FLAP_TRY(flap_ids_reserve(&metaspace->symbols, bytes));
  for (uint64_t i = 0; i < bytes; i++)
    metaspace->symbols.ids[metaspace->symbols.count++] = metaspace->byte_ids[(uint8_t)text[i]];
  return FLAP_OK;
}

static flap_status end_word(flap_metaspace *metaspace, flap_bpe *bpe, flap_ids *ids) {
  uint64_t count = metaspace->symbols.count;
  metaspace->symbols.count = 0;
  return flap_bpe_encode_symbols(bpe, metaspace->symbols.ids, count, ids);
}

static flap_status put_character(flap_metaspace *metaspace, flap_bpe *bpe, uint32_t code, flap_ids *ids) {
  int32_t id = character_id(metaspace, code);
  if (metaspace->symbols.count > 0 && !is_joined(metaspace, metaspace->left, metaspace->left_known, code, id >= 0))
    FLAP_TRY(end_word(metaspace, bpe, ids));
  metaspace->left = code;
  metaspace->left_known = id >= 0;
  if (id < 0) {
    char text[4];
    return put_bytes(metaspace, text, flap_utf8_encode(code, text));
  }
  FLAP_TRY(flap_ids_reserve(&metaspace->symbols, 1));
  metaspace->symbols.ids[metaspace->symbols.count++] = id;
  return FLAP_OK;
}

flap_status flap_metaspace_encode(flap_metaspace *metaspace, flap_bpe *bpe, const char *text, uint64_t bytes,
                                  bool prefix, flap_ids *ids) {
  uint32_t code = 0;
  metaspace->symbols.count = 0;
  for (uint64_t at = 0; at < bytes;) {
    unsigned length = flap_utf8_decode(text + at, bytes - at, &code);
    flap_assert(length > 0);
    if (metaspace->stage && code == ' ')
      code = FLAP_METASPACE;
    if (at == 0 && prefix && code != FLAP_METASPACE)
      FLAP_TRY(put_character(metaspace, bpe, FLAP_METASPACE, ids));
    FLAP_TRY(put_character(metaspace, bpe, code, ids));
    at += length;
  }
  return end_word(metaspace, bpe, ids);
}

flap_status flap_metaspace_encode_bytes(flap_metaspace *metaspace, flap_bpe *bpe, const char *text, uint64_t bytes,
                                        flap_ids *ids) {
  metaspace->symbols.count = 0;
  FLAP_TRY(put_bytes(metaspace, text, bytes));
  return end_word(metaspace, bpe, ids);
}

uint64_t flap_metaspace_decode(const flap_metaspace *metaspace, const char *token, uint64_t bytes, bool first,
                               char *text_out) {
  const uint64_t mark = strlen(FLAP_METASPACE_TEXT);
  uint64_t count = 0;
  for (uint64_t at = 0; at < bytes;) {
    if (!metaspace->decoder.replace || bytes - at < mark || memcmp(token + at, FLAP_METASPACE_TEXT, mark) != 0) {
      text_out[count++] = token[at++];
      continue;
    }
    at += mark;
    if (!first || !metaspace->decoder.drop_first)
      text_out[count++] = ' ';
  }
  return count;
}
