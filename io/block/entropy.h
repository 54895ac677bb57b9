/* Zstandard's entropy coder alone, for one plane of a block: Huffman codes, and a run for a plane of one value. Shared
 * by codec.c and its tests.
 *
 * Its search for what repeats is switched off: among the bytes of numbers there is next to nothing to find, and looking
 * takes most of the time. A plane becomes a frame without magic number, size and checksum, which a page has of its own.
 *
 * Threading: any thread, with a state of its own. Allocates nothing.
 */
#ifndef FLAP_IO_BLOCK_ENTROPY_H
#define FLAP_IO_BLOCK_ENTROPY_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_ENTROPY_PLANE_BYTES (32u << 10) /* at most, of a plane; codes cost about 100 bytes */

/* Of a coder or a decoder, which share it in turn; a multiple of 64. It is aligned as malloc aligns, and lives as long
 * as they do. */
uint64_t flap_entropy_state_bytes(void);

typedef struct flap_entropy_coder flap_entropy_coder;
typedef struct flap_entropy_decoder flap_entropy_decoder;

flap_entropy_coder *flap_entropy_coder_in(void *state);
flap_entropy_decoder *flap_entropy_decoder_in(void *state);

/* Returns how long the plane is in `to`, or 0 when it would not be below `room` there. */
uint32_t flap_entropy_encode(flap_entropy_coder *coder, const void *plane, uint32_t bytes, void *to, uint32_t room);

/* False when `coded` is not a plane of just so many bytes; reads and writes nowhere else. */
bool flap_entropy_decode(flap_entropy_decoder *decoder, const void *coded, uint32_t coded_bytes, void *plane,
                         uint32_t bytes);

#ifdef __cplusplus
}
#endif
#endif
