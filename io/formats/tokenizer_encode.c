/* Text to ids, in the order of the library's pipeline:
 *
 *   text -> added tokens of the raw text -> normalizer -> added tokens of normalized text
 *        -> Split and Digits stages -> ByteLevel (prefix space, its own pattern) -> words -> merges
 *
 * Each arrow is a function that hands pieces to the next one, depth first; only the normalizer and the prefix space
 * copy text.
 */
#include "io/formats/tokenizer_internal.h"

#include "base/assert.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdlib.h>
#include <string.h>

#define TEXT_BYTES_MAX ((uint64_t)1 << 30)

/* Beside the public flags: the section begins where the text does. Like FLAP_TOKENIZER_CONTINUE it is dropped for what
 * comes later in the text. */
#define AT_BEGIN 16u
#define LATER ~(FLAP_TOKENIZER_CONTINUE | AT_BEGIN)

static flap_status push_id(flap_ids *ids, int32_t id) {
  FLAP_TRY(flap_ids_reserve(ids, 1));
  ids->ids[ids->count++] = id;
  return FLAP_OK;
}

static flap_status encode_word(flap_tokenizer *tokenizer, const char *word, uint64_t bytes, flap_ids *ids) {
  if (tokenizer->ignore_merges && bytes <= UINT32_MAX) {
    int32_t id = flap_text_map_get(&tokenizer->whole_words, word, (uint32_t)bytes);
    if (id >= 0)
      return push_id(ids, id);
  }
  return flap_bpe_encode(tokenizer->bpe, word, bytes, ids);
}

/* Bytes that are not UTF-8. */
static flap_status encode_invalid(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, flap_ids *ids) {
  if (tokenizer->metaspace != NULL)
    return flap_metaspace_encode_bytes(tokenizer->metaspace, tokenizer->bpe, text, bytes, ids);
  return encode_word(tokenizer, text, bytes, ids);
}

/* ---- pre-tokenizer ------------------------------------------------------------------------------------- */

static flap_status byte_level(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, bool prefix, flap_ids *ids) {
  if (prefix && text[0] != ' ') {
    if (tokenizer->prefixed_max <= bytes) {
      char *grown = realloc(tokenizer->prefixed, bytes + bytes / 2 + 64);
      if (grown == NULL)
        return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for a text of %llu bytes",
                              (unsigned long long)bytes);
      tokenizer->prefixed = grown;
      tokenizer->prefixed_max = bytes + bytes / 2 + 64;
    }
    tokenizer->prefixed[0] = ' ';
    memcpy(tokenizer->prefixed + 1, text, bytes);
    text = tokenizer->prefixed;
    bytes++;
  }
  if (tokenizer->byte_level_split == NULL)
    return encode_word(tokenizer, text, bytes, ids);
  flap_split_cursor cursor;
  flap_split_start(&cursor, text, bytes);
  for (;;) {
    FLAP_TRY(flap_split_next(tokenizer->byte_level_split, &cursor));
    if (cursor.piece_bytes == 0)
      return FLAP_OK;
    FLAP_TRY(encode_word(tokenizer, cursor.piece, cursor.piece_bytes, ids));
  }
}

flap_status flap_tokenizer_normalize(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, bool prefix,
                                     const char **text_out, uint64_t *bytes_out) {
  if (tokenizer->metaspace != NULL)
    return flap_metaspace_normalize(tokenizer->metaspace, text, bytes, prefix, text_out, bytes_out);
  if (tokenizer->nfc && !flap_nfc_is_stable(text, bytes))
    return flap_nfc_apply(&tokenizer->nfc_scratch, text, bytes, text_out, bytes_out);
  *text_out = text;
  *bytes_out = bytes;
  return FLAP_OK;
}

static flap_status encode_metaspace(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, unsigned flags,
                                    flap_ids *ids) {
  const flap_prefix prefix = tokenizer->metaspace->prefix;
  bool wanted = prefix == FLAP_PREFIX_ALWAYS ? !(flags & FLAP_TOKENIZER_CONTINUE)
                                             : prefix == FLAP_PREFIX_FIRST && (flags & AT_BEGIN);
  return flap_metaspace_encode(tokenizer->metaspace, tokenizer->bpe, text, bytes, wanted, ids);
}

/* Depth is bounded by FLAP_TOKENIZER_SPLITS_MAX. `continues`: no prefix space before what the text begins with. */
static flap_status pre_tokenize(flap_tokenizer *tokenizer, uint32_t stage, const char *text, uint64_t bytes,
                                bool continues, flap_ids *ids) {
  if (stage == tokenizer->split_count)
    return byte_level(tokenizer, text, bytes, tokenizer->add_prefix_space && !continues, ids);
  flap_split_cursor cursor;
  flap_split_start(&cursor, text, bytes);
  for (;;) {
    FLAP_TRY(flap_split_next(tokenizer->splits[stage], &cursor));
    if (cursor.piece_bytes == 0)
      return FLAP_OK;
    const bool first = cursor.piece == text; /* or what was before it is removed */
    FLAP_TRY(pre_tokenize(tokenizer, stage + 1, cursor.piece, cursor.piece_bytes, continues && first, ids));
  }
}

/* ---- added tokens -------------------------------------------------------------------------------------- */

/* The longest added token at the start of the text. */
static const flap_added *find_added(const flap_added_set *set, const char *text, uint64_t bytes) {
  unsigned char byte = (unsigned char)text[0];
  for (uint32_t i = set->first[byte]; i < set->first[byte + 1]; i++) {
    const flap_added *added = &set->items[i];
    if (added->bytes <= bytes && memcmp(added->content, text, added->bytes) == 0)
      return added;
  }
  return NULL;
}

/* Not past `least`, where a character begins: what is before it was looked at, and would be again for every token. */
static uint64_t spaces_before(const char *text, uint64_t least, uint64_t at) {
  uint32_t code;
  unsigned length;
  while (at > least && (length = flap_utf8_decode_before(text, at, &code)) > 0 && flap_utf8_is_space(code))
    at -= length;
  return at;
}

static uint64_t spaces_after(const char *text, uint64_t at, uint64_t bytes) {
  uint32_t code;
  unsigned length;
  while ((length = flap_utf8_decode(text + at, bytes - at, &code)) > 0 && flap_utf8_is_space(code))
    at += length;
  return at;
}

static flap_status encode_section(flap_tokenizer *tokenizer, int kind, const char *text, uint64_t bytes, unsigned flags,
                                  flap_ids *ids);

/* Cuts the added tokens of one kind out of the text. FLAP_TOKENIZER_CONTINUE and AT_BEGIN concern what starts at its
 * start. */
static flap_status cut_added(flap_tokenizer *tokenizer, int kind, const char *text, uint64_t bytes, unsigned flags,
                             flap_ids *ids) {
  const flap_added_set *set = &tokenizer->added[kind];
  uint64_t done = 0, spaces_end = 0; /* of the white space that a token has taken last */
  for (uint64_t at = 0; at < bytes && set->count > 0;) {
    const flap_added *added = find_added(set, text + at, bytes - at);
    if (added == NULL) {
      at++;
      continue;
    }
    uint64_t start = at, end = at + added->bytes;
    at = end;
    if (added->special && (flags & FLAP_TOKENIZER_LITERAL))
      continue;
    if (added->lstrip)
      start = start > done ? spaces_before(text, done, start) : done;
    if (added->rstrip)
      end = spaces_end = end < spaces_end ? spaces_end : spaces_after(text, end, bytes);
    if (start > done)
      FLAP_TRY(encode_section(tokenizer, kind, text + done, start - done, done == 0 ? flags : flags & LATER, ids));
    /* Nothing is left of a token of white space that the one before has stripped away. */
    if (start < end)
      FLAP_TRY(push_id(ids, added->id));
    done = end;
  }
  if (done < bytes)
    FLAP_TRY(encode_section(tokenizer, kind, text + done, bytes - done, done == 0 ? flags : flags & LATER, ids));
  return FLAP_OK;
}

static flap_status encode_section(flap_tokenizer *tokenizer, int kind, const char *text, uint64_t bytes, unsigned flags,
                                  flap_ids *ids) {
  const bool continues = (flags & FLAP_TOKENIZER_CONTINUE) != 0;
  if (kind == 1 && tokenizer->metaspace != NULL)
    return encode_metaspace(tokenizer, text, bytes, flags, ids);
  if (kind == 1)
    return pre_tokenize(tokenizer, 0, text, bytes, continues, ids);
  FLAP_TRY(flap_tokenizer_normalize(tokenizer, text, bytes, !continues, &text, &bytes));
  return cut_added(tokenizer, 1, text, bytes, flags, ids);
}

/* ---- whole texts --------------------------------------------------------------------------------------- */

static flap_status push_template(const int32_t *template_ids, uint32_t count, flap_ids *ids) {
  FLAP_TRY(flap_ids_reserve(ids, count));
  for (uint32_t i = 0; i < count; i++)
    ids->ids[ids->count++] = template_ids[i];
  return FLAP_OK;
}

flap_status flap_tokenizer_encode(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, unsigned flags,
                                  flap_ids *ids) {
  if (bytes >= TEXT_BYTES_MAX)
    return flap_error_set(FLAP_INVALID, "tokenizer: a text of %llu bytes is too long for one call, cut it into pieces",
                          (unsigned long long)bytes);
  if (flags & FLAP_TOKENIZER_BEGIN)
    FLAP_TRY(push_template(tokenizer->before, tokenizer->before_count, ids));
  for (uint64_t at = 0; at < bytes;) {
    uint64_t valid = flap_utf8_valid(text + at, bytes - at);
    unsigned run_flags = flags;
    if (at > 0) /* Nothing goes between a byte that is no text and what follows it, but where spaces always did. */
      run_flags = (flags & LATER) | (tokenizer->metaspace != NULL ? (unsigned)FLAP_TOKENIZER_CONTINUE : 0);
    else if (!(flags & FLAP_TOKENIZER_CONTINUE))
      run_flags |= AT_BEGIN;
    if (valid > 0)
      FLAP_TRY(cut_added(tokenizer, 0, text + at, valid, run_flags, ids));
    at += valid;
    uint64_t first = at;
    uint32_t code;
    while (at < bytes && flap_utf8_decode(text + at, bytes - at, &code) == 0)
      at++;
    if (at > first)
      FLAP_TRY(encode_invalid(tokenizer, text + first, at - first, ids));
  }
  if (flags & FLAP_TOKENIZER_END)
    FLAP_TRY(push_template(tokenizer->after, tokenizer->after_count, ids));
  return FLAP_OK;
}

/* ---- cutting long texts -------------------------------------------------------------------------------- */

/* Whether an added token would be torn, or would have stripped white space on the other side. */
static bool tears_added(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t at) {
  if (!tokenizer->added_across_spaces)
    return false;
  for (int kind = 0; kind < 2; kind++) {
    for (uint32_t i = 0; i < tokenizer->added[kind].count; i++) {
      const flap_added *added = &tokenizer->added[kind].items[i];
      uint64_t first = added->lstrip ? 0 : 1, last = added->rstrip ? added->bytes : added->bytes - 1;
      for (uint64_t left = first; left <= last; left++) {
        if (left <= at && added->bytes - left <= bytes - at &&
            memcmp(text + at - left, added->content, added->bytes) == 0)
          return true;
      }
    }
  }
  return false;
}

/* Whether the text before `at` ends with an added token. */
static bool ends_with_added(const flap_tokenizer *tokenizer, const char *text, uint64_t at) {
  for (int kind = 0; kind < 2; kind++) {
    for (uint32_t i = 0; i < tokenizer->added[kind].count; i++) {
      const flap_added *added = &tokenizer->added[kind].items[i];
      if (added->bytes <= at && memcmp(text + at - added->bytes, added->content, added->bytes) == 0)
        return true;
    }
  }
  return false;
}

/* What follows a line cut gets no prefix space. It has one in the whole if the stages split there, which takes the
 * whole to know, and if an added token before the newline has taken that along, or is the newline; and where such a
 * token leaves the newline, that itself has a prefix space, and is split from it only by what follows. */
static bool needs_prefix_space(const flap_tokenizer *tokenizer, const char *text, uint64_t at) {
  return tokenizer->add_prefix_space && (tokenizer->split_count > 0 || ends_with_added(tokenizer, text, at) ||
                                         ends_with_added(tokenizer, text, at - 1));
}

static bool is_letter(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

/* After a newline that stands alone between two characters that are no white space. */
static bool is_line_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t at) {
  if (at < 2 || at >= bytes || text[at - 1] != '\n')
    return false;
  uint32_t before, after;
  if (flap_utf8_decode_before(text, at - 1, &before) == 0 || flap_utf8_is_space(before) ||
      flap_utf8_decode(text + at, bytes - at, &after) == 0 || flap_utf8_is_space(after))
    return false;
  return !tears_added(tokenizer, text, bytes, at) && !needs_prefix_space(tokenizer, text, at);
}

/* Before a space that stands alone between two ASCII letters. */
static bool is_word_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t at) {
  return at >= 1 && at + 1 < bytes && text[at] == ' ' && is_letter(text[at - 1]) && is_letter(text[at + 1]) &&
         !tears_added(tokenizer, text, bytes, at);
}

/* ---- with byte_fallback ---- */

static bool is_space_or_mark(uint32_t code) {
  return code == FLAP_METASPACE || flap_utf8_is_space(code);
}

/* Whether `part` begins, ends or goes on at `at`, or may do so past the end of what is shown; where it begins and ends.
 */
static bool touches(const char *text, uint64_t bytes, uint64_t at, bool last, const char *part, uint64_t part_bytes,
                    uint64_t *begin_out, uint64_t *end_out) {
  for (uint64_t left = 0; left <= part_bytes && left <= at; left++) {
    uint64_t there = bytes - (at - left);
    if ((there < part_bytes && last) || memcmp(text + at - left, part, there < part_bytes ? there : part_bytes) != 0)
      continue;
    *begin_out = at - left;
    *end_out = there < part_bytes ? bytes : at - left + part_bytes;
    return true;
  }
  return false;
}

/* Of a normalized token, whose spaces the text may spell in two ways, each part between them counts: a cut is not
 * beside spaces on the left. */
static bool touches_added(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t at, bool last,
                          uint64_t *begin_out, uint64_t *end_out) {
  for (int kind = 0; kind < 2; kind++) {
    for (uint32_t i = 0; i < tokenizer->added[kind].count; i++) {
      const flap_token *token = &tokenizer->tokens[tokenizer->added[kind].items[i].id];
      for (uint64_t first = 0, end; first < token->raw_bytes; first = end) {
        uint32_t code = 0;
        unsigned length = 0;
        for (end = first; end < token->raw_bytes; end += length) {
          length = flap_utf8_decode(token->raw + end, token->raw_bytes - end, &code);
          if (kind == 1 && is_space_or_mark(code))
            break;
        }
        if (end > first && touches(text, bytes, at, last, token->raw + first, end - first, begin_out, end_out))
          return true;
        end += end < token->raw_bytes ? length : 0;
      }
    }
  }
  return false;
}

/* Otherwise what touches the place is given, if it is an added token: there is no cut in all of it. */
static bool is_exact_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t at, bool last,
                         uint64_t *begin_out, uint64_t *end_out) {
  const flap_metaspace *metaspace = tokenizer->metaspace;
  uint32_t left, right;
  *begin_out = *end_out = at;
  if (at == 0 || at >= bytes || flap_utf8_decode_before(text, at, &left) == 0 || is_space_or_mark(left) ||
      flap_utf8_decode(text + at, bytes - at, &right) == 0)
    return false;
  if (right == ' ' && (metaspace->replace || metaspace->stage))
    right = FLAP_METASPACE;
  return !flap_metaspace_joins(metaspace, left, right) &&
         !touches_added(tokenizer, text, bytes, at, last, begin_out, end_out);
}

/* 0: there is none. */
static uint64_t find_exact_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t limit,
                               bool last) {
  uint64_t begin, end;
  for (uint64_t at = limit; at > 0; at = begin > 0 ? begin - 1 : 0)
    if (is_exact_cut(tokenizer, text, bytes, at, last, &begin, &end))
      return at;
  for (uint64_t at = limit + 1; at < bytes; at = end + 1)
    if (is_exact_cut(tokenizer, text, bytes, at, last, &begin, &end))
      return at;
  return 0;
}

static uint64_t find_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t limit) {
  for (uint64_t at = limit; at > 0; at--)
    if (is_line_cut(tokenizer, text, bytes, at))
      return at;
  for (uint64_t at = limit; at > 0; at--)
    if (is_word_cut(tokenizer, text, bytes, at))
      return at;
  for (uint64_t at = limit; at < bytes; at++)
    if (is_line_cut(tokenizer, text, bytes, at) || is_word_cut(tokenizer, text, bytes, at))
      return at;
  return 0;
}

uint64_t flap_tokenizer_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t piece_bytes,
                            bool last) {
  flap_assert(piece_bytes > 0);
  if (bytes <= piece_bytes && (last || bytes == 0))
    return bytes;
  uint64_t limit = bytes < piece_bytes ? bytes : piece_bytes;
  uint64_t cut = tokenizer->metaspace != NULL ? find_exact_cut(tokenizer, text, bytes, limit, last)
                                              : find_cut(tokenizer, text, bytes, limit);
  if (cut > 0)
    return cut;
  if (last)
    return bytes;
  for (uint64_t at = bytes; at > 0; at--)
    if (text[at - 1] == '\n')
      return at;
  /* A character that the end may have cut in two starts the next piece. */
  for (uint64_t length = 1; length <= 3 && length < bytes; length++) {
    unsigned char byte = (unsigned char)text[bytes - length];
    if ((byte & 0xC0) == 0xC0)
      return bytes - length + ((byte >= 0xF0 ? 4u : byte >= 0xE0 ? 3u : 2u) <= length ? length : 0);
    if ((byte & 0xC0) != 0x80)
      break;
  }
  return bytes;
}
