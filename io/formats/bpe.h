/* Byte-pair merges of one word. Folder-private.
 *
 * The order is that of the `tokenizers` library: the waiting pair with the lowest rank is merged, the leftmost first
 * among equals; a pair that has changed since it was put in line still counts if it would now give the same token.
 * A heap over a linked list makes a word of n bytes O(n log n).
 */
#ifndef FLAP_IO_FORMATS_BPE_H
#define FLAP_IO_FORMATS_BPE_H

#include "base/status.h"
#include "io/formats/tokenizer.h"

#include <stdint.h>

typedef struct flap_bpe flap_bpe;

/* Room for `merges_max` merges. Bytes have no ids yet. */
FLAP_CHECKED flap_status flap_bpe_open(uint64_t merges_max, flap_bpe **bpe_out);
void flap_bpe_close(flap_bpe *bpe); /* NULL is fine */

/* Bytes without an id (-1) vanish from words, as they do in the library when there is no unknown token. */
void flap_bpe_set_byte(flap_bpe *bpe, uint8_t byte, int32_t id);
/* The next merge, in the order of their ranks. Of two merges of the same pair the later one counts. */
void flap_bpe_put_merge(flap_bpe *bpe, int32_t left, int32_t right, int32_t merged);

/* Appends the ids of a word of fewer than 2^30 bytes. */
FLAP_CHECKED flap_status flap_bpe_encode(flap_bpe *bpe, const char *word, uint64_t bytes, flap_ids *ids);

/* Appends the ids of a word that is given as ids, before any merge. FLAP_INVALID from 2^30 symbols on. */
FLAP_CHECKED flap_status flap_bpe_encode_symbols(flap_bpe *bpe, const int32_t *symbol_ids, uint64_t count,
                                                 flap_ids *ids);

/* Makes room for `count` more ids. */
FLAP_CHECKED flap_status flap_ids_reserve(flap_ids *ids, uint64_t count);

#endif
