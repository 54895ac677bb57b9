/* The page codec: what comes back is what went in, whatever it was; what does not shrink says so; and what was damaged
 * is refused or decoded to something, but never read or written past its end. */
#include "io/block/codec.h"

#include "base/philox.h"
#include "io/block/block.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_MAX (4u << 20)
#define CANARY 64u

typedef enum content { ZEROS, WORDS, NUMBERS, SPARSE, NOISE, HALF_NOISE, CONTENT_COUNT } content;

static const flap_codec codecs[] = {FLAP_CODEC_LZ4, FLAP_CODEC_ZSTD};
#define CODECS ((int)(sizeof codecs / sizeof *codecs)) /* each test is looped over them, as `_i` */

static unsigned char *page, *encoded, *decoded, *scratch;

static void take_memory(void) {
  page = malloc(PAGE_MAX);
  encoded = malloc(PAGE_MAX + CANARY);
  decoded = malloc(PAGE_MAX + CANARY);
  scratch = malloc(flap_block_codec_scratch(PAGE_MAX));
}

static void free_memory(void) {
  free(page);
  free(encoded);
  free(decoded);
  free(scratch);
}

static void make_page(content what, uint32_t bytes, uint64_t seed) {
  flap_philox stream = flap_philox_stream(seed, "codec");
  uint64_t drawn = 0;
  for (uint32_t i = 0; i < bytes; i += 4) {
    const uint32_t draw = (uint32_t)flap_philox_below(&stream, drawn++, (uint64_t)1 << 32);
    uint32_t word = draw;
    if (what == ZEROS)
      word = 0;
    else if (what == WORDS)
      word = 0x01010101u * (draw % 7);
    else if (what == NUMBERS) /* exponents that are much alike, mantissas that are not */
      word = (draw & 0x807fffffu) | (120u + draw % 5) << 23;
    else if (what == SPARSE)
      word = draw % 16 == 0 ? draw : 0;
    else if (what == HALF_NOISE && i < bytes / 2)
      word = 7;
    memcpy(page + i, &word, sizeof word);
  }
}

static void check_canary(const unsigned char *end) {
  for (uint32_t i = 0; i < CANARY; i++)
    ck_assert_uint_eq(end[i], 0xa5);
}

static uint32_t encode(int codec, uint32_t bytes, uint32_t element) {
  memset(encoded + bytes, 0xa5, CANARY);
  const uint32_t stored = flap_block_encode(codecs[codec], page, bytes, element, encoded, scratch);
  check_canary(encoded + bytes);
  ck_assert(stored > 0 && stored <= bytes && stored % FLAP_BLOCK_ALIGN == 0);
  return stored;
}

START_TEST(page_of_any_size_and_content_comes_back) {
  static const uint32_t sizes[] = {4096, 8192, 12288, 65536, 69632, 262144, 266240, 1048576 + 4096, PAGE_MAX};
  static const uint32_t elements[] = {1, 2, 4};
  uint32_t shrunk = 0;
  take_memory();
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    for (size_t e = 0; e < sizeof elements / sizeof *elements; e++)
      for (int what = 0; what < CONTENT_COUNT; what++) {
        const uint32_t bytes = sizes[s];
        make_page((content)what, bytes, s + 10 * e);
        const uint32_t stored = encode(_i, bytes, elements[e]);
        ck_assert(what != NOISE || stored == bytes);
        ck_assert(bytes > 4096 || stored == bytes); /* there is nothing shorter than a block */
        ck_assert(what > ZEROS || bytes == 4096 || stored <= bytes / 2);
        ck_assert(what > NUMBERS || bytes < 262144 || elements[e] < 4 || stored < bytes);
        if (stored == bytes)
          continue;
        shrunk++;
        memset(decoded, 0x5a, bytes);
        memset(decoded + bytes, 0xa5, CANARY);
        ck_assert(flap_block_decode(encoded, stored, decoded, bytes, scratch));
        check_canary(decoded + bytes);
        ck_assert_mem_eq(decoded, page, bytes);
      }
  ck_assert_uint_gt(shrunk, 70);
  free_memory();
}
END_TEST

/* bf16 numbers shrink because their high bytes stand together: in the order of the page they would not. */
START_TEST(shuffling_is_what_makes_numbers_shrink) {
  const uint32_t bytes = 1u << 20;
  take_memory();
  make_page(NUMBERS, bytes, 1);
  ck_assert_uint_lt(encode(_i, bytes, 4), bytes - bytes / 20);
  ck_assert(codecs[_i] == FLAP_CODEC_LZ4 ? encode(_i, bytes, 1) == bytes : encode(_i, bytes, 1) > encode(_i, bytes, 4));
  free_memory();
}
END_TEST

/* Copies of just the right length, so that a sanitizer sees every byte that is read too far. */
static bool decode_copy(const unsigned char *stored, uint32_t stored_bytes, uint32_t bytes) {
  unsigned char *copy = malloc(stored_bytes > 0 ? stored_bytes : 1);
  memcpy(copy, stored, stored_bytes);
  memset(decoded + bytes, 0xa5, CANARY);
  const bool decodes = flap_block_decode(copy, stored_bytes, decoded, bytes, scratch);
  check_canary(decoded + bytes);
  free(copy);
  return decodes;
}

START_TEST(damaged_page_is_refused_or_decoded_within_its_bounds) {
  const uint32_t bytes = 1u << 17;
  flap_philox stream = flap_philox_stream(3, "damage");
  uint64_t drawn = 0;
  uint32_t refused = 0, changed = 0, tries = 0;
  take_memory();
  for (int what = ZEROS; what <= SPARSE; what++) {
    make_page((content)what, bytes, 3);
    const uint32_t stored = encode(_i, bytes, 4);
    ck_assert_uint_lt(stored, bytes);
    for (uint32_t i = 0; i < 3000; i++) { /* the first ones in the header and the first length */
      const uint64_t bit = i < 128 ? i : flap_philox_below(&stream, drawn++, 8 * (uint64_t)stored);
      encoded[bit / 8] ^= (unsigned char)(1u << bit % 8);
      const bool decodes = decode_copy(encoded, stored, bytes);
      ck_assert_msg(i >= 96 || !decodes, "bit %u of the header was flipped, and nobody noticed", i);
      refused += !decodes;
      changed += decodes && memcmp(decoded, page, bytes) != 0;
      tries++;
      encoded[bit / 8] ^= (unsigned char)(1u << bit % 8);
    }
    ck_assert(decode_copy(encoded, stored, bytes));
  }
  ck_assert_uint_gt(refused, tries / 50);
  ck_assert_uint_gt(changed, 0); /* which only a checksum finds */
  free_memory();
}
END_TEST

START_TEST(wrong_length_is_refused) {
  const uint32_t bytes = 1u << 19;
  take_memory();
  make_page(NUMBERS, bytes, 4);
  const uint32_t stored = encode(_i, bytes, 4);
  ck_assert_uint_lt(stored, bytes);
  for (uint32_t shorter = 0; shorter + FLAP_BLOCK_ALIGN <= stored; shorter += shorter < 64 ? 1 : FLAP_BLOCK_ALIGN)
    ck_assert(!decode_copy(encoded, shorter, bytes));
  ck_assert(!decode_copy(encoded, stored, bytes - FLAP_BLOCK_ALIGN));
  ck_assert(!decode_copy(encoded, stored, bytes + FLAP_BLOCK_ALIGN));
  ck_assert(!decode_copy(page, bytes, bytes)); /* never encoded */
  ck_assert(decode_copy(encoded, stored, bytes));
  free_memory();
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tcase = tcase_create("codec");
  tcase_set_timeout(tcase, 60);
  tcase_add_loop_test(tcase, page_of_any_size_and_content_comes_back, 0, CODECS);
  tcase_add_loop_test(tcase, shuffling_is_what_makes_numbers_shrink, 0, CODECS);
  tcase_add_loop_test(tcase, damaged_page_is_refused_or_decoded_within_its_bounds, 0, CODECS);
  tcase_add_loop_test(tcase, wrong_length_is_refused, 0, CODECS);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
