/* Splitting text by a pre-tokenizer's pattern, through PCRE2. Folder-private.
 *
 * The patterns of tokenizer.json are written for Oniguruma. What means the same in both is passed on, what differs is
 * rewritten (\s, \v, \xHH, \uHHHH, script names), and what cannot be rewritten safely is refused.
 */
#ifndef FLAP_IO_FORMATS_TOKENIZER_SPLIT_H
#define FLAP_IO_FORMATS_TOKENIZER_SPLIT_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct flap_split flap_split;

typedef struct flap_split_options {
  const char *file;    /* for messages */
  const char *pattern; /* terminated */
  bool literal;        /* the pattern is text to be found, not an expression */
  bool removed;        /* matches are dropped; otherwise they are pieces of their own */
  bool invert;         /* "match" is what lies between the pattern's matches */
} flap_split_options;

/* FLAP_UNSUPPORTED names the file, the pattern and what is wrong with it. */
FLAP_CHECKED flap_status flap_split_open(const flap_split_options *options, flap_split **split_out);
void flap_split_close(flap_split *split); /* NULL is fine */

/* The pieces of a text, one after the other: start, then next until `piece_bytes` is 0. */
typedef struct flap_split_cursor {
  const char *text;
  uint64_t bytes;
  uint64_t emitted;             /* all before was handed out or dropped */
  uint64_t search;              /* where to look for the next match */
  uint64_t match_end;           /* of the last match; UINT64_MAX before the first */
  uint64_t held_at, held_bytes; /* a match that waits until the piece before it was handed out */
  bool ended;
  const char *piece;
  uint64_t piece_bytes;
} flap_split_cursor;

void flap_split_start(flap_split_cursor *cursor, const char *text, uint64_t bytes); /* valid UTF-8 */
FLAP_CHECKED flap_status flap_split_next(flap_split *split, flap_split_cursor *cursor);

#endif
