/* The page codec: bytes of elements are put beside their like, and Zstandard's entropy coder or LZ4 squeezes them.
 *
 * Exponents of neighbouring numbers are alike and their lowest bits are not, so a page is shuffled first: all first
 * bytes of its elements, then all second ones. A page is cut into blocks that stay in a core's cache meanwhile. What is
 * encoded has a header, which says by which of the two, and its length is rounded up to FLAP_BLOCK_ALIGN, as requests
 * want it.
 *
 * Threading: any thread, with scratch memory of its own. Allocates nothing.
 */
#ifndef FLAP_IO_BLOCK_CODEC_H
#define FLAP_IO_BLOCK_CODEC_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_compression {
  FLAP_COMPRESSION_OFF,
  FLAP_COMPRESSION_AUTO, /* where it saves time, as whoever owns the pages measures */
  FLAP_COMPRESSION_LZ4,  /* every page that shrinks */
  FLAP_COMPRESSION_ZSTD  /* likewise */
} flap_compression;

typedef enum flap_codec {
  FLAP_CODEC_LZ4, /* what repeats */
  FLAP_CODEC_ZSTD /* what is frequent, by Huffman codes: of a model's states three times as much, in less time */
} flap_codec;

/* The codec of a run that compresses so: `auto` takes zstd. */
flap_codec flap_compression_codec(flap_compression compression);

/* Scratch memory for pages of at most so many bytes, with either codec, aligned as malloc aligns. */
uint64_t flap_block_codec_scratch(uint64_t page_bytes);

/* Encodes a page of `bytes` (a multiple of FLAP_BLOCK_ALIGN) with elements of 1, 2 or 4 bytes into `to`, which has room
 * for as many. Returns how long it is then, a multiple of FLAP_BLOCK_ALIGN below `bytes`; or `bytes`, when it does not
 * shrink by so much: then what `to` holds is of no use, and the page is to be stored as it is. */
uint32_t flap_block_encode(flap_codec codec, const void *page, uint32_t bytes, uint32_t element_bytes, void *to,
                           void *scratch);

/* Decodes what flap_block_encode, with either codec, made `stored_bytes` long back into a page of `bytes`. False for
 * anything else, without reading or writing elsewhere; whether the bytes are those that were encoded is for a checksum
 * to tell. */
bool flap_block_decode(const void *stored, uint32_t stored_bytes, void *page, uint32_t bytes, void *scratch);

#ifdef __cplusplus
}
#endif
#endif
