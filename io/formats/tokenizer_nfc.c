/* The text is taken in segments that start at stable characters (combining class 0, quick check Yes): by UAX #15
 * nothing composes or moves across their left edge. A segment is decomposed, put into canonical order and composed. */
#include "io/formats/tokenizer_nfc.h"

#include "base/assert.h"
#include "io/formats/tokenizer_nfc_table.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdlib.h>
#include <string.h>

#define HANGUL_BASE 0xAC00u
#define HANGUL_COUNT 11172u
#define LEAD_BASE 0x1100u
#define LEAD_COUNT 19u
#define VOWEL_BASE 0x1161u
#define VOWEL_COUNT 21u
#define TRAIL_BASE 0x11A7u /* the place of "no trailing consonant" */
#define TRAIL_COUNT 28u

#define COUNT_OF(array) (sizeof(array) / sizeof(array)[0])

void flap_nfc_close(flap_nfc *nfc) {
  free(nfc->text);
  free(nfc->codes);
  free(nfc->sorted);
  *nfc = (flap_nfc){0};
}

static bool is_stable(uint32_t code) {
  if (code < 0x300 || code >= NFC_TABLE_LIMIT)
    return true;
  return (nfc_blocks[nfc_block_of[code >> 8]][code >> 5 & 7] >> (code & 31) & 1) == 0;
}

bool flap_nfc_is_stable(const char *text, uint64_t bytes) {
  for (uint64_t at = 0; at < bytes;) {
    if ((unsigned char)text[at] < 0x80) {
      at++;
      continue;
    }
    uint32_t code = 0;
    unsigned length = flap_utf8_decode(text + at, bytes - at, &code);
    flap_assert(length > 0);
    if (!is_stable(code))
      return false;
    at += length;
  }
  return true;
}

static uint8_t class_of(uint32_t code) {
  uint64_t low = 0, high = COUNT_OF(nfc_classes);
  while (low < high) {
    uint64_t middle = (low + high) / 2;
    if (code > nfc_classes[middle].last)
      low = middle + 1;
    else if (code < nfc_classes[middle].first)
      high = middle;
    else
      return nfc_classes[middle].class_;
  }
  return 0;
}

static flap_status reserve_codes(flap_nfc *nfc, uint64_t more) {
  if (nfc->count_max - nfc->count >= more)
    return FLAP_OK;
  uint64_t count = nfc->count_max < 64 ? 64 : nfc->count_max * 2;
  flap_assert(count - nfc->count >= more);
  uint32_t *codes = realloc(nfc->codes, count * sizeof *codes);
  if (codes != NULL)
    nfc->codes = codes;
  uint32_t *sorted = realloc(nfc->sorted, count * sizeof *sorted);
  if (sorted != NULL)
    nfc->sorted = sorted;
  if (codes == NULL || sorted == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory to normalize %llu characters",
                          (unsigned long long)count);
  nfc->count_max = count;
  return FLAP_OK;
}

static flap_status decompose(flap_nfc *nfc, uint32_t code) {
  FLAP_TRY(reserve_codes(nfc, 8));
  uint32_t *out = nfc->codes;
  if (code >= HANGUL_BASE && code < HANGUL_BASE + HANGUL_COUNT) {
    uint32_t index = code - HANGUL_BASE;
    out[nfc->count++] = LEAD_BASE + index / (VOWEL_COUNT * TRAIL_COUNT);
    out[nfc->count++] = VOWEL_BASE + index / TRAIL_COUNT % VOWEL_COUNT;
    if (index % TRAIL_COUNT != 0)
      out[nfc->count++] = TRAIL_BASE + index % TRAIL_COUNT;
    return FLAP_OK;
  }
  uint64_t low = 0, high = COUNT_OF(nfc_decompositions);
  while (low < high) {
    uint64_t middle = (low + high) / 2;
    if (code > nfc_decompositions[middle].code)
      low = middle + 1;
    else
      high = middle;
  }
  if (low < COUNT_OF(nfc_decompositions) && nfc_decompositions[low].code == code) {
    flap_assert(nfc_decompositions[low].count <= 8);
    for (uint64_t i = 0; i < nfc_decompositions[low].count; i++)
      out[nfc->count++] = nfc_pool[nfc_decompositions[low].at + i];
  } else {
    out[nfc->count++] = code;
  }
  return FLAP_OK;
}

/* Stable order by class of each run of non-starters. Counting, so a megabyte of accents is no trap. */
static void order_run(flap_nfc *nfc, uint64_t first, uint64_t end) {
  uint64_t starts[257] = {0};
  for (uint64_t i = first; i < end; i++)
    starts[class_of(nfc->codes[i]) + 1u]++;
  for (unsigned class_ = 0; class_ < 256; class_++)
    starts[class_ + 1] += starts[class_];
  for (uint64_t i = first; i < end; i++)
    nfc->sorted[starts[class_of(nfc->codes[i])]++] = nfc->codes[i];
  memcpy(nfc->codes + first, nfc->sorted, (end - first) * sizeof *nfc->codes);
}

static void order_segment(flap_nfc *nfc) {
  for (uint64_t i = 0; i < nfc->count;) {
    uint64_t first = i;
    while (i < nfc->count && class_of(nfc->codes[i]) != 0)
      i++;
    if (i - first > 1)
      order_run(nfc, first, i);
    i += i == first;
  }
}

/* The primary composite of the pair, 0 if there is none. */
static uint32_t compose_pair(uint32_t first, uint32_t second) {
  if (first >= LEAD_BASE && first < LEAD_BASE + LEAD_COUNT && second >= VOWEL_BASE && second < VOWEL_BASE + VOWEL_COUNT)
    return HANGUL_BASE + ((first - LEAD_BASE) * VOWEL_COUNT + (second - VOWEL_BASE)) * TRAIL_COUNT;
  if (first >= HANGUL_BASE && first < HANGUL_BASE + HANGUL_COUNT && (first - HANGUL_BASE) % TRAIL_COUNT == 0 &&
      second > TRAIL_BASE && second < TRAIL_BASE + TRAIL_COUNT)
    return first + (second - TRAIL_BASE);
  uint64_t low = 0, high = COUNT_OF(nfc_compositions);
  while (low < high) {
    uint64_t middle = (low + high) / 2;
    uint32_t a = nfc_compositions[middle].first, b = nfc_compositions[middle].second;
    if (a < first || (a == first && b < second))
      low = middle + 1;
    else
      high = middle;
  }
  if (low < COUNT_OF(nfc_compositions) && nfc_compositions[low].first == first &&
      nfc_compositions[low].second == second)
    return nfc_compositions[low].composed;
  return 0;
}

/* A character composes with the last starter if nothing between them has class 0 or its own class or a higher one. */
static void compose_segment(flap_nfc *nfc) {
  uint32_t *codes = nfc->codes;
  uint64_t kept = 0, starter = UINT64_MAX;
  int last_class = -1; /* of what was kept since the starter; -1: nothing */
  for (uint64_t i = 0; i < nfc->count; i++) {
    uint8_t class_ = class_of(codes[i]);
    if (starter != UINT64_MAX && last_class < (int)class_) {
      uint32_t composed = compose_pair(codes[starter], codes[i]);
      if (composed != 0) {
        codes[starter] = composed;
        continue;
      }
    }
    if (class_ == 0) {
      starter = kept;
      last_class = -1;
    } else {
      last_class = class_;
    }
    codes[kept++] = codes[i];
  }
  nfc->count = kept;
}

static flap_status flush_segment(flap_nfc *nfc) {
  if (nfc->count > 1 || (nfc->count == 1 && !is_stable(nfc->codes[0]))) {
    order_segment(nfc);
    compose_segment(nfc);
  }
  for (uint64_t i = 0; i < nfc->count; i++) {
    if (nfc->text_bytes_max - nfc->text_bytes < 4) {
      uint64_t bytes = nfc->text_bytes_max < 256 ? 256 : nfc->text_bytes_max * 2;
      char *grown = realloc(nfc->text, bytes);
      if (grown == NULL)
        return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory to normalize %llu bytes",
                              (unsigned long long)bytes);
      nfc->text = grown;
      nfc->text_bytes_max = bytes;
    }
    nfc->text_bytes += flap_utf8_encode(nfc->codes[i], nfc->text + nfc->text_bytes);
  }
  nfc->count = 0;
  return FLAP_OK;
}

flap_status flap_nfc_apply(flap_nfc *nfc, const char *text, uint64_t bytes, const char **text_out,
                           uint64_t *bytes_out) {
  nfc->text_bytes = 0;
  nfc->count = 0;
  for (uint64_t at = 0; at < bytes;) {
    uint32_t code = 0;
    unsigned length = flap_utf8_decode(text + at, bytes - at, &code);
    flap_assert(length > 0);
    if (is_stable(code))
      FLAP_TRY(flush_segment(nfc));
    FLAP_TRY(decompose(nfc, code));
    at += length;
  }
  FLAP_TRY(flush_segment(nfc));
  *text_out = nfc->text;
  *bytes_out = nfc->text_bytes;
  return FLAP_OK;
}
