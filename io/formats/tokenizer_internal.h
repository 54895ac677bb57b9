/* What the tokenizer's files share. Folder-private. */
#ifndef FLAP_IO_FORMATS_TOKENIZER_INTERNAL_H
#define FLAP_IO_FORMATS_TOKENIZER_INTERNAL_H

#include "io/formats/bpe.h"
#include "io/formats/tokenizer.h"
#include "io/formats/tokenizer_map.h"
#include "io/formats/tokenizer_metaspace.h"
#include "io/formats/tokenizer_nfc.h"
#include "io/formats/tokenizer_split.h"

#include <stdbool.h>
#include <stdint.h>

#define FLAP_TOKENIZER_SPLITS_MAX 16u
#define FLAP_TOKENIZER_TEMPLATE_MAX 16u
#define FLAP_TOKENIZER_IDS_MAX (1u << 24) /* no vocabulary is larger; keeps hostile ids from taking all memory */
#define FLAP_TOKENIZER_BYTES_END "<|endoftext|>"

/* One id. Strings lie in the pool. */
typedef struct flap_token {
  const char *raw;   /* as tokenizer.json spells it; NULL: no such id */
  const char *bytes; /* what it stands for */
  uint32_t raw_bytes, byte_count;
  uint32_t normalized; /* its place in the set of normalized tokens, from 1; 0: it is none of them */
  bool special;
} flap_token;

/* A token that is cut out of the text before anything else happens to it. */
typedef struct flap_added {
  const char *content; /* what is looked for: normalized in the set of normalized tokens */
  uint32_t bytes;
  int32_t id;
  bool special, lstrip, rstrip;
} flap_added;

/* Sorted by first byte, then the longest first; first[b] .. first[b + 1] start with byte b. */
typedef struct flap_added_set {
  flap_added *items;
  uint32_t count;
  uint32_t first[257];
} flap_added_set;

typedef enum flap_tokenizer_file {
  FLAP_FILE_TOKENIZER,
  FLAP_FILE_CONFIG,
  FLAP_FILE_SPECIAL_MAP,
  FLAP_FILE_COUNT
} flap_tokenizer_file;

struct flap_tokenizer {
  char *name;
  char *pool; /* all strings */
  uint64_t pool_bytes, pool_used;
  flap_token *tokens; /* [id_count] */
  uint32_t id_count;
  flap_text_map by_raw;
  flap_text_map whole_words; /* ignore_merges: words that are tokens as they are */
  bool ignore_merges;
  flap_bpe *bpe;
  flap_metaspace *metaspace; /* SentencePiece-style; NULL: byte-level */
  bool nfc;
  flap_nfc nfc_scratch;
  flap_split *splits[FLAP_TOKENIZER_SPLITS_MAX];
  uint32_t split_count;
  bool add_prefix_space;
  flap_split *byte_level_split; /* ByteLevel's own pattern, after the prefix space; NULL without use_regex */
  char *prefixed;
  uint64_t prefixed_max;
  flap_added_set added[2];  /* looked for in the text as it is; in normalized text */
  bool added_across_spaces; /* some added token strips, or holds white space: cuts must mind it */
  int32_t before[FLAP_TOKENIZER_TEMPLATE_MAX], after[FLAP_TOKENIZER_TEMPLATE_MAX];
  uint32_t before_count, after_count;
  int32_t begin, end;
  bool is_bytes;
  int files[FLAP_FILE_COUNT]; /* kept open, so that save copies what was read; -1: there is none */
};

extern const char *const flap_tokenizer_file_names[FLAP_FILE_COUNT];

/* The GPT-2 byte alphabet: every byte has a printable character that stands for it in tokenizer.json. */
uint32_t flap_tokenizer_byte_to_code(uint8_t byte);
int flap_tokenizer_code_to_byte(uint32_t code); /* -1: stands for no byte */

/* Steps of opening, shared by both kinds. The pool must have room; ids must be in range. */
FLAP_CHECKED flap_status flap_tokenizer_take(const char *name, uint32_t id_count, uint64_t strings_max,
                                             uint64_t pool_bytes, uint64_t merges_max, flap_tokenizer **tokenizer_out);
const char *flap_tokenizer_pool_copy(flap_tokenizer *tokenizer, const char *text, uint64_t bytes);
/* Enters a token of the vocabulary, whose bytes follow from the byte alphabet. False if the id is taken. */
bool flap_tokenizer_put_token(flap_tokenizer *tokenizer, const char *raw, uint32_t raw_bytes, int32_t id);
/* What the normalizer makes of a section of text, in scratch or where it is; `prefix`: with Prepend. */
FLAP_CHECKED flap_status flap_tokenizer_normalize(flap_tokenizer *tokenizer, const char *text, uint64_t bytes,
                                                  bool prefix, const char **text_out, uint64_t *bytes_out);
/* A token as decoders see it: of a normalized one, what it was normalized to. */
const char *flap_tokenizer_spelling(const flap_tokenizer *tokenizer, int32_t id, uint32_t *bytes_out);
/* Sorts both sets and indexes them; after the last item. */
void flap_tokenizer_finish_added(flap_tokenizer *tokenizer);

#endif
