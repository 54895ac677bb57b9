/* An encoded page: a header, then its blocks one after another, each behind its length; zeros up to the aligned end.
 *
 * A block that LZ4 cannot shrink stands as it is, not shuffled, with the highest bit of its length set. Numbers are in
 * the machine's byte order: extents do not outlive the process.
 */
#include "io/block/codec.h"

#include "base/assert.h"
#include "base/units.h"
#include "io/block/block.h"

#include <lz4.h>
#include <string.h>

#define MAGIC 0x345a4c46u             /* "FLZ4" */
#define BLOCK_BYTES (256u << 10)      /* shuffled, it fits beside its result into a core's cache */
#define PLAIN_BLOCK 0x80000000u       /* in a block's length */
#define SAMPLE_PIECES 4u              /* at even distances in the page */
#define SAMPLE_PIECE_BYTES (8u << 10) /* each */
#define SAMPLE_BYTES (SAMPLE_PIECES * SAMPLE_PIECE_BYTES)
#define SAMPLE_SHRUNK (SAMPLE_BYTES - SAMPLE_BYTES / 64) /* what does not come below this is left alone */

typedef struct page_header {
  uint32_t magic, bytes, element_bytes;
} page_header;

static uint64_t state_bytes(void) {
  return flap_units_round_up((uint64_t)LZ4_sizeofState(), 64);
}

static uint32_t smaller(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

uint64_t flap_block_codec_scratch(uint64_t page_bytes) {
  return state_bytes() + (page_bytes < BLOCK_BYTES ? page_bytes : BLOCK_BYTES);
}

/* ---- bytes beside their like ------------------------------------------------------------------------------ */

static void shuffle(unsigned char *restrict to, const unsigned char *restrict from, uint32_t bytes, uint32_t element) {
  const uint32_t count = bytes / element;
  if (element == 2) {
    for (uint32_t i = 0; i < count; i++) {
      to[i] = from[2 * i];
      to[count + i] = from[2 * i + 1];
    }
  } else if (element == 4) {
    for (uint32_t i = 0; i < count; i++) {
      to[i] = from[4 * i];
      to[count + i] = from[4 * i + 1];
      to[2 * count + i] = from[4 * i + 2];
      to[3 * count + i] = from[4 * i + 3];
    }
  } else {
    memcpy(to, from, bytes);
  }
}

static void unshuffle(unsigned char *restrict to, const unsigned char *restrict from, uint32_t bytes,
                      uint32_t element) {
  const uint32_t count = bytes / element;
  if (element == 2) {
    for (uint32_t i = 0; i < count; i++) {
      to[2 * i] = from[i];
      to[2 * i + 1] = from[count + i];
    }
  } else if (element == 4) {
    for (uint32_t i = 0; i < count; i++) {
      to[4 * i] = from[i];
      to[4 * i + 1] = from[count + i];
      to[4 * i + 2] = from[2 * count + i];
      to[4 * i + 3] = from[3 * count + i];
    }
  } else {
    memcpy(to, from, bytes);
  }
}

/* ---- encoding --------------------------------------------------------------------------------------------- */

/* Most pages shrink or do not as a few pieces of them do, which takes a fraction of the time to find out. */
static bool sample_shrinks(const unsigned char *page, uint32_t bytes, uint32_t element, unsigned char *to,
                           unsigned char *scratch) {
  unsigned char *shuffled = scratch + state_bytes();
  const uint32_t distance = bytes / SAMPLE_PIECES, count = SAMPLE_PIECE_BYTES;
  for (uint32_t i = 0; i < SAMPLE_PIECES; i++)
    shuffle(shuffled + i * count, page + i * distance / FLAP_BLOCK_ALIGN * FLAP_BLOCK_ALIGN, count, element);
  return LZ4_compress_fast_extState(scratch, (const char *)shuffled, (char *)to, (int)SAMPLE_BYTES, (int)SAMPLE_SHRUNK,
                                    1) > 0;
}

/* One block behind what is there, which must not come to more than `end`. Returns the new length, or 0. */
static uint32_t encode_block(const unsigned char *from, uint32_t bytes, uint32_t element, unsigned char *to,
                             uint32_t at, uint32_t end, unsigned char *scratch) {
  unsigned char *shuffled = scratch + state_bytes();
  uint32_t length = 0;
  if (at + sizeof length >= end)
    return 0;
  unsigned char *place = to + at + sizeof length;
  const uint32_t room = end - at - (uint32_t)sizeof length;
  shuffle(shuffled, from, bytes, element);
  length = (uint32_t)LZ4_compress_fast_extState(scratch, (const char *)shuffled, (char *)place, (int)bytes,
                                                (int)smaller(room, bytes - 1), 1);
  uint32_t word = length;
  if (length == 0) {
    if (bytes > room)
      return 0;
    memcpy(place, from, bytes);
    length = bytes;
    word = bytes | PLAIN_BLOCK;
  }
  memcpy(to + at, &word, sizeof word);
  return at + (uint32_t)sizeof word + length;
}

uint32_t flap_block_encode(const void *page, uint32_t bytes, uint32_t element_bytes, void *to, void *scratch) {
  flap_assert(bytes > 0 && bytes % FLAP_BLOCK_ALIGN == 0 && bytes < PLAIN_BLOCK);
  flap_assert(element_bytes == 1 || element_bytes == 2 || element_bytes == 4);
  const unsigned char *from = page;
  const page_header header = {.magic = MAGIC, .bytes = bytes, .element_bytes = element_bytes};
  const uint32_t end = bytes - FLAP_BLOCK_ALIGN; /* what is longer saves nothing */
  if (end == 0 || (bytes >= 2 * SAMPLE_BYTES && !sample_shrinks(from, bytes, element_bytes, to, scratch)))
    return bytes;
  memcpy(to, &header, sizeof header);
  uint32_t length = sizeof header;
  for (uint32_t at = 0; at < bytes; at += BLOCK_BYTES) {
    length = encode_block(from + at, smaller(bytes - at, BLOCK_BYTES), element_bytes, to, length, end, scratch);
    if (length == 0)
      return bytes;
  }
  const uint32_t stored = (uint32_t)flap_units_round_up(length, FLAP_BLOCK_ALIGN);
  memset((unsigned char *)to + length, 0, stored - length);
  return stored;
}

/* ---- decoding --------------------------------------------------------------------------------------------- */

/* Returns where the next block begins, or 0. */
static uint32_t decode_block(const unsigned char *stored, uint32_t at, uint32_t end, unsigned char *to, uint32_t bytes,
                             uint32_t element, unsigned char *scratch) {
  unsigned char *shuffled = scratch + state_bytes();
  uint32_t word;
  if (end - at < sizeof word)
    return 0;
  memcpy(&word, stored + at, sizeof word);
  at += (uint32_t)sizeof word;
  const uint32_t length = word & ~PLAIN_BLOCK;
  if (length > end - at)
    return 0;
  if (word & PLAIN_BLOCK) {
    if (length != bytes)
      return 0;
    memcpy(to, stored + at, bytes);
    return at + length;
  }
  const int made = LZ4_decompress_safe((const char *)stored + at, (char *)shuffled, (int)length, (int)bytes);
  if (made < 0 || (uint32_t)made != bytes)
    return 0;
  unshuffle(to, shuffled, bytes, element);
  return at + length;
}

bool flap_block_decode(const void *stored, uint32_t stored_bytes, void *page, uint32_t bytes, void *scratch) {
  page_header header;
  if (stored_bytes < sizeof header)
    return false;
  memcpy(&header, stored, sizeof header);
  if (header.magic != MAGIC || header.bytes != bytes || bytes % FLAP_BLOCK_ALIGN != 0 ||
      (header.element_bytes != 1 && header.element_bytes != 2 && header.element_bytes != 4))
    return false;
  uint32_t from = sizeof header;
  for (uint32_t at = 0; at < bytes; at += BLOCK_BYTES) {
    from = decode_block(stored, from, stored_bytes, (unsigned char *)page + at, smaller(bytes - at, BLOCK_BYTES),
                        header.element_bytes, scratch);
    if (from == 0)
      return false;
  }
  return true;
}
