/* An encoded page: a header, then its blocks one after another; zeros up to the aligned end.
 *
 * A block of LZ4 is shuffled and coded whole, behind its length. One that it cannot shrink stands as it is, not
 * shuffled. A block of zstd is shuffled, and each of its planes (all first bytes, all second ones) coded for itself, or
 * left as it is, behind its length: of a number's bytes mostly one shrinks, and the others are not worth a try. What
 * stands as it is has the highest bit of its length set. Numbers are in the machine's byte order: extents do not
 * outlive the process, and checkpoints that share them are read on machines with the same order.
 */
#include "io/block/codec.h"

#include "base/assert.h"
#include "base/units.h"
#include "io/block/block.h"
#include "io/block/entropy.h"

#include <lz4.h>
#include <string.h>

#define LZ4_MAGIC 0x345a4c46u         /* "FLZ4" */
#define ZSTD_MAGIC 0x54535a46u        /* "FZST" */
#define LZ4_BLOCK_BYTES (256u << 10)  /* shuffled, it fits beside its result into a core's cache */
#define ELEMENT_BYTES_MAX 4u          /* of which a block of zstd has as many as a plane may have bytes */
#define PLAIN 0x80000000u             /* in a length */
#define SAMPLE_PIECES 4u              /* at even distances in the page */
#define SAMPLE_PIECE_BYTES (8u << 10) /* each */
#define SAMPLE_BYTES (SAMPLE_PIECES * SAMPLE_PIECE_BYTES)
#define SAMPLE_SHRUNK (SAMPLE_BYTES - SAMPLE_BYTES / 64) /* what LZ4 does not bring below this is left alone */
#define PLANE_SHARE 16u /* a plane of which zstd spares less than such a part takes more time than that is worth */

typedef struct page_header {
  uint32_t magic, bytes, element_bytes;
} page_header;

/* What codes a page, and its scratch memory: the library's state, then room for a shuffled block. */
typedef struct coding {
  flap_codec codec;
  uint32_t element_bytes;
  uint32_t block_bytes;
  bool worth[ELEMENT_BYTES_MAX]; /* with zstd: the planes that are tried */
  void *lz4;
  flap_entropy_coder *coder;
  flap_entropy_decoder *decoder;
  unsigned char *shuffled;
} coding;

static uint64_t state_bytes(void) {
  const uint64_t lz4 = flap_units_round_up((uint64_t)LZ4_sizeofState(), 64), zstd = flap_entropy_state_bytes();
  return lz4 > zstd ? lz4 : zstd;
}

static uint32_t smaller(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

flap_codec flap_compression_codec(flap_compression compression) {
  return compression == FLAP_COMPRESSION_LZ4 ? FLAP_CODEC_LZ4 : FLAP_CODEC_ZSTD;
}

uint64_t flap_block_codec_scratch(uint64_t page_bytes) {
  return state_bytes() + (page_bytes < LZ4_BLOCK_BYTES ? page_bytes : LZ4_BLOCK_BYTES);
}

static coding coding_of(flap_codec codec, uint32_t element_bytes, void *scratch) {
  coding c = {.codec = codec,
              .element_bytes = element_bytes,
              .block_bytes = codec == FLAP_CODEC_LZ4 ? LZ4_BLOCK_BYTES : element_bytes * FLAP_ENTROPY_PLANE_BYTES,
              .shuffled = (unsigned char *)scratch + state_bytes()};
  for (uint32_t i = 0; i < element_bytes; i++)
    c.worth[i] = true;
  return c;
}

/* ---- bytes beside their like ------------------------------------------------------------------------------ */

/* Where the planes of a block are: one behind another, unless they are elsewhere. */
typedef struct planes {
  unsigned char *of[ELEMENT_BYTES_MAX];
} planes;

static planes planes_in(unsigned char *memory, uint32_t bytes, uint32_t element) {
  planes p;
  for (uint32_t i = 0; i < ELEMENT_BYTES_MAX; i++)
    p.of[i] = memory + (i < element ? i * (bytes / element) : 0);
  return p;
}

static void shuffle(const planes *to, const unsigned char *restrict from, uint32_t bytes, uint32_t element) {
  unsigned char *restrict a = to->of[0], *restrict b = to->of[1], *restrict c = to->of[2], *restrict d = to->of[3];
  const uint32_t count = bytes / element;
  if (element == 2) {
    for (uint32_t i = 0; i < count; i++) {
      a[i] = from[2 * i];
      b[i] = from[2 * i + 1];
    }
  } else if (element == 4) {
    for (uint32_t i = 0; i < count; i++) {
      a[i] = from[4 * i];
      b[i] = from[4 * i + 1];
      c[i] = from[4 * i + 2];
      d[i] = from[4 * i + 3];
    }
  } else {
    memcpy(a, from, bytes);
  }
}

static void unshuffle(unsigned char *restrict to, const unsigned char *const from[ELEMENT_BYTES_MAX], uint32_t bytes,
                      uint32_t element) {
  const unsigned char *restrict a = from[0], *restrict b = from[1], *restrict c = from[2], *restrict d = from[3];
  const uint32_t count = bytes / element;
  if (element == 2) {
    for (uint32_t i = 0; i < count; i++) {
      to[2 * i] = a[i];
      to[2 * i + 1] = b[i];
    }
  } else if (element == 4) {
    for (uint32_t i = 0; i < count; i++) {
      to[4 * i] = a[i];
      to[4 * i + 1] = b[i];
      to[4 * i + 2] = c[i];
      to[4 * i + 3] = d[i];
    }
  } else {
    memcpy(to, a, bytes);
  }
}

/* ---- encoding --------------------------------------------------------------------------------------------- */

/* Most pages shrink or do not as a few pieces of them do, which takes a fraction of the time to find out. */
static bool sample_shrinks(coding *c, const unsigned char *page, uint32_t bytes, unsigned char *to) {
  const uint32_t distance = bytes / SAMPLE_PIECES, plane = SAMPLE_BYTES / c->element_bytes;
  bool any = false;
  for (uint32_t i = 0; i < SAMPLE_PIECES; i++)
    memcpy(to + i * SAMPLE_PIECE_BYTES, page + i * distance / FLAP_BLOCK_ALIGN * FLAP_BLOCK_ALIGN, SAMPLE_PIECE_BYTES);
  const planes sampled = planes_in(c->shuffled, SAMPLE_BYTES, c->element_bytes);
  shuffle(&sampled, to, SAMPLE_BYTES, c->element_bytes);
  if (c->codec == FLAP_CODEC_LZ4)
    return LZ4_compress_fast_extState(c->lz4, (const char *)c->shuffled, (char *)to, (int)SAMPLE_BYTES,
                                      (int)SAMPLE_SHRUNK, 1) > 0;
  for (uint32_t i = 0; i < c->element_bytes; i++) {
    c->worth[i] = flap_entropy_encode(c->coder, c->shuffled + i * plane, plane, to, plane - plane / PLANE_SHARE) > 0;
    any |= c->worth[i];
  }
  return any;
}

/* `bytes` of `coded`, or of `plain` where that is 0, behind their length at `at`. Returns where they end, or 0 when
 * that is beyond `end`: what was coded stands there already. */
static uint32_t put(unsigned char *to, uint32_t at, uint32_t end, uint32_t coded, const unsigned char *plain,
                    uint32_t bytes) {
  const uint32_t from = at + (uint32_t)sizeof(uint32_t);
  if (coded == 0) {
    if (bytes > end - from)
      return 0;
    memcpy(to + from, plain, bytes);
  }
  const uint32_t word = coded > 0 ? coded : bytes | PLAIN;
  memcpy(to + at, &word, sizeof word);
  return from + (coded > 0 ? coded : bytes);
}

static uint32_t encode_lz4(const coding *c, const unsigned char *from, uint32_t bytes, unsigned char *to, uint32_t at,
                           uint32_t end) {
  const uint32_t room = end - at - (uint32_t)sizeof(uint32_t);
  const planes shuffled = planes_in(c->shuffled, bytes, c->element_bytes);
  shuffle(&shuffled, from, bytes, c->element_bytes);
  const int made = LZ4_compress_fast_extState(c->lz4, (const char *)c->shuffled, (char *)to + at + sizeof(uint32_t),
                                              (int)bytes, (int)smaller(room, bytes - 1), 1);
  return put(to, at, end, (uint32_t)made, from, bytes);
}

/* The first planes, up to one that is worth a try, are shuffled to where they are to stand. Returns how many they are,
 * and moves `*at` behind them; they need not be before `end`. */
static uint32_t place_planes(const coding *c, uint32_t plane_bytes, unsigned char *to, uint32_t *at, uint32_t end,
                             planes *planes_io) {
  const uint32_t word = plane_bytes | PLAIN;
  uint32_t count = 0;
  for (; count < c->element_bytes && !c->worth[count] && *at < end; count++) {
    if (sizeof word + plane_bytes > end - *at)
      break;
    memcpy(to + *at, &word, sizeof word);
    planes_io->of[count] = to + *at + sizeof word;
    *at += (uint32_t)sizeof word + plane_bytes;
  }
  return count;
}

static uint32_t encode_planes(const coding *c, const unsigned char *from, uint32_t bytes, unsigned char *to,
                              uint32_t at, uint32_t end) {
  const uint32_t plane_bytes = bytes / c->element_bytes;
  planes shuffled = planes_in(c->shuffled, bytes, c->element_bytes);
  const uint32_t placed = place_planes(c, plane_bytes, to, &at, end, &shuffled);
  shuffle(&shuffled, from, bytes, c->element_bytes);
  for (uint32_t i = placed; i < c->element_bytes; i++) {
    if (at + sizeof(uint32_t) >= end)
      return 0;
    const uint32_t room = smaller(end - at - (uint32_t)sizeof(uint32_t), plane_bytes);
    unsigned char *coded = to + at + sizeof(uint32_t);
    const uint32_t made = c->worth[i] ? flap_entropy_encode(c->coder, shuffled.of[i], plane_bytes, coded, room) : 0;
    at = put(to, at, end, made, shuffled.of[i], plane_bytes);
    if (at == 0)
      return 0;
  }
  return at;
}

uint32_t flap_block_encode(flap_codec codec, const void *page, uint32_t bytes, uint32_t element_bytes, void *to,
                           void *scratch) {
  flap_assert(bytes > 0 && bytes % FLAP_BLOCK_ALIGN == 0 && bytes < PLAIN);
  flap_assert(element_bytes == 1 || element_bytes == 2 || element_bytes == 4);
  const unsigned char *from = page;
  const page_header header = {
      .magic = codec == FLAP_CODEC_LZ4 ? LZ4_MAGIC : ZSTD_MAGIC, .bytes = bytes, .element_bytes = element_bytes};
  const uint32_t end = bytes - FLAP_BLOCK_ALIGN; /* what is longer saves nothing */
  coding c = coding_of(codec, element_bytes, scratch);
  c.lz4 = scratch;
  if (codec == FLAP_CODEC_ZSTD)
    c.coder = flap_entropy_coder_in(scratch);
  if (end == 0 || (bytes >= 2 * SAMPLE_BYTES && !sample_shrinks(&c, from, bytes, to)))
    return bytes;
  memcpy(to, &header, sizeof header);
  uint32_t length = sizeof header;
  for (uint32_t at = 0; at < bytes; at += c.block_bytes) {
    const uint32_t block = smaller(bytes - at, c.block_bytes);
    if (length + sizeof(uint32_t) >= end)
      return bytes;
    length = codec == FLAP_CODEC_LZ4 ? encode_lz4(&c, from + at, block, to, length, end)
                                     : encode_planes(&c, from + at, block, to, length, end);
    if (length == 0)
      return bytes;
  }
  const uint32_t stored = (uint32_t)flap_units_round_up(length, FLAP_BLOCK_ALIGN);
  memset((unsigned char *)to + length, 0, stored - length);
  return stored;
}

/* ---- decoding --------------------------------------------------------------------------------------------- */

typedef struct piece {
  const unsigned char *bytes;
  uint32_t length;
  bool plain;
} piece;

/* The piece at `*at`, which is moved behind it; false if there is none, or a plain one that is not of `plain_bytes`. */
static bool next_piece(const unsigned char *stored, uint32_t *at, uint32_t end, uint32_t plain_bytes,
                       piece *piece_out) {
  uint32_t word;
  if (end - *at < sizeof word)
    return false;
  memcpy(&word, stored + *at, sizeof word);
  *at += (uint32_t)sizeof word;
  *piece_out = (piece){.bytes = stored + *at, .length = word & ~PLAIN, .plain = (word & PLAIN) != 0};
  if (piece_out->length > end - *at || (piece_out->plain && piece_out->length != plain_bytes))
    return false;
  *at += piece_out->length;
  return true;
}

static bool decode_lz4(const coding *c, const unsigned char *stored, uint32_t *at, uint32_t end, unsigned char *to,
                       uint32_t bytes) {
  piece found;
  if (!next_piece(stored, at, end, bytes, &found))
    return false;
  if (found.plain) {
    memcpy(to, found.bytes, bytes);
    return true;
  }
  const int made = LZ4_decompress_safe((const char *)found.bytes, (char *)c->shuffled, (int)found.length, (int)bytes);
  if (made < 0 || (uint32_t)made != bytes)
    return false;
  const planes shuffled = planes_in(c->shuffled, bytes, c->element_bytes);
  const unsigned char *from[ELEMENT_BYTES_MAX] = {shuffled.of[0], shuffled.of[1], shuffled.of[2], shuffled.of[3]};
  unshuffle(to, from, bytes, c->element_bytes);
  return true;
}

/* Planes that stand as they are are read where they stand. */
static bool decode_planes(const coding *c, const unsigned char *stored, uint32_t *at, uint32_t end, unsigned char *to,
                          uint32_t bytes) {
  const uint32_t plane_bytes = bytes / c->element_bytes;
  const unsigned char *from[ELEMENT_BYTES_MAX] = {c->shuffled, c->shuffled, c->shuffled, c->shuffled};
  for (uint32_t i = 0; i < c->element_bytes; i++) {
    unsigned char *decoded = c->shuffled + i * plane_bytes;
    piece found;
    if (!next_piece(stored, at, end, plane_bytes, &found))
      return false;
    if (!found.plain && !flap_entropy_decode(c->decoder, found.bytes, found.length, decoded, plane_bytes))
      return false;
    from[i] = found.plain ? found.bytes : decoded;
  }
  unshuffle(to, from, bytes, c->element_bytes);
  return true;
}

bool flap_block_decode(const void *stored, uint32_t stored_bytes, void *page, uint32_t bytes, void *scratch) {
  page_header header;
  if (stored_bytes < sizeof header)
    return false;
  memcpy(&header, stored, sizeof header);
  if ((header.magic != LZ4_MAGIC && header.magic != ZSTD_MAGIC) || header.bytes != bytes ||
      bytes % FLAP_BLOCK_ALIGN != 0 ||
      (header.element_bytes != 1 && header.element_bytes != 2 && header.element_bytes != 4))
    return false;
  const flap_codec codec = header.magic == LZ4_MAGIC ? FLAP_CODEC_LZ4 : FLAP_CODEC_ZSTD;
  coding c = coding_of(codec, header.element_bytes, scratch);
  if (codec == FLAP_CODEC_ZSTD)
    c.decoder = flap_entropy_decoder_in(scratch);
  uint32_t from = sizeof header;
  for (uint32_t at = 0; at < bytes; at += c.block_bytes) {
    unsigned char *to = (unsigned char *)page + at;
    const uint32_t block = smaller(bytes - at, c.block_bytes);
    if (!(codec == FLAP_CODEC_LZ4 ? decode_lz4(&c, stored, &from, stored_bytes, to, block)
                                  : decode_planes(&c, stored, &from, stored_bytes, to, block)))
      return false;
  }
  return true;
}
