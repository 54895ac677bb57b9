/* Texts of tokenizers in the style of SentencePiece: spaces are the character U+2581, and a character that the
 * vocabulary lacks is spelt as bytes, <0x00> to <0xFF>. Folder-private.
 *
 * There is often no pre-tokenizer, so a text is one word. It is cut into smaller ones where no merge can join: between
 * two characters of which no merge has the one at the end of its left half and the other at the start of its right
 * half. What is merged on one side of such a place never depends on the other side, so ids are those of the whole text.
 */
#ifndef FLAP_IO_FORMATS_TOKENIZER_METASPACE_H
#define FLAP_IO_FORMATS_TOKENIZER_METASPACE_H

#include "base/status.h"
#include "io/formats/bpe.h"
#include "io/formats/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>

#define FLAP_METASPACE 0x2581u
#define FLAP_METASPACE_TEXT "\xe2\x96\x81"
#define FLAP_METASPACE_PAGES 0x1100u /* of 256 characters each */

/* Where the Metaspace pre-tokenizer puts U+2581 before a section of text that does not begin with it. */
typedef enum flap_prefix {
  FLAP_PREFIX_NEVER,
  FLAP_PREFIX_FIRST, /* where the text begins */
  FLAP_PREFIX_ALWAYS,
} flap_prefix;

typedef struct flap_metaspace_decoder {
  bool replace;          /* U+2581 becomes a space */
  bool drop_first;       /* and vanishes from the first token (Metaspace) */
  bool byte_fallback;    /* runs of <0x00> to <0xFF> become text */
  uint32_t strip_spaces; /* at most so many are dropped where the text begins */
} flap_metaspace_decoder;

typedef struct flap_metaspace {
  bool prepend, replace; /* normalizer: U+2581 before each section, and for each space */
  bool stage;            /* a Metaspace pre-tokenizer, with the two below */
  bool split;            /* before each U+2581 */
  flap_prefix prefix;
  flap_metaspace_decoder decoder;
  int32_t *pages[FLAP_METASPACE_PAGES]; /* ids of characters, -1: none; NULL: none of the page */
  int32_t byte_ids[256];
  uint64_t *joins; /* left << 32 | right; all ones: an empty slot */
  uint64_t join_slots, join_count;
  bool bytes_join; /* some merge has a byte token for a half */
  /* Scratch: a normalized section; the word that is being put together, and its last character. */
  char *normal;
  uint64_t normal_max;
  flap_ids symbols;
  uint32_t left;
  bool left_known; /* as a character of the vocabulary, otherwise as bytes */
} flap_metaspace;

FLAP_CHECKED flap_status flap_metaspace_open(flap_metaspace **metaspace_out);
void flap_metaspace_close(flap_metaspace *metaspace); /* NULL is fine */

/* Of the vocabulary: the id of a character; and that some merge joins `left`, the last character of its left half, to
 * `right`, the first of its right half. FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_metaspace_put_character(flap_metaspace *metaspace, uint32_t code, int32_t id);
FLAP_CHECKED flap_status flap_metaspace_put_join(flap_metaspace *metaspace, uint32_t left, uint32_t right);

/* The byte that a token stands for in the way that ByteFallback reads it; -1: none. */
int flap_metaspace_byte(const char *token, uint64_t bytes);

/* Whether a merge could go across the place between two characters of normalized text; may say yes too often. */
bool flap_metaspace_joins(const flap_metaspace *metaspace, uint32_t left, uint32_t right);

/* What the normalizer makes of a section of text; `prefix`: with Prepend. The result is in the scratch, or `text`. */
FLAP_CHECKED flap_status flap_metaspace_normalize(flap_metaspace *metaspace, const char *text, uint64_t bytes,
                                                  bool prefix, const char **text_out, uint64_t *bytes_out);

/* Appends the ids of normalized, valid UTF-8, after U+2581 if `prefix` says so and it does not begin with it; and of
 * bytes that are none. */
FLAP_CHECKED flap_status flap_metaspace_encode(flap_metaspace *metaspace, flap_bpe *bpe, const char *text,
                                               uint64_t bytes, bool prefix, flap_ids *ids);
FLAP_CHECKED flap_status flap_metaspace_encode_bytes(flap_metaspace *metaspace, flap_bpe *bpe, const char *text,
                                                     uint64_t bytes, flap_ids *ids);

/* What the decoder makes of one token, but for byte fallback and stripping, into room for `bytes` bytes; returns how
 * many. `first`: of the first one of a text. */
uint64_t flap_metaspace_decode(const flap_metaspace *metaspace, const char *token, uint64_t bytes, bool first,
                               char *text_out);

#endif
