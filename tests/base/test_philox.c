/* Philox against its published vectors, and the distributions made from it. */
#include "base/philox.h"

#include <check.h>
#include <math.h>
#include <string.h>

START_TEST(philox_known_answers_match) {
  static const struct {
    uint32_t counter[4], key[2], words[4];
  } cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    uint32_t words[4];
    flap_philox_4x32_10(cases[i].counter, cases[i].key, words);
    ck_assert_mem_eq(words, cases[i].words, sizeof words);
  }
}
END_TEST

START_TEST(philox_block_is_the_generator_at_a_64_bit_counter) {
  flap_philox stream = flap_philox_stream(7, "layer 3 weights");
  uint32_t words[4], expected[4];
  const uint32_t counter[4] = {0x89abcdef, 0x01234567, 0, 0};
  flap_philox_block(&stream, 0x0123456789abcdefull, words);
  flap_philox_4x32_10(counter, stream.key, expected);
  ck_assert_mem_eq(words, expected, sizeof words);
}
END_TEST

START_TEST(philox_streams_differ_by_seed_and_name) {
  static const char *const names[] = {"", "a", "b", "ab", "ba", "layer 1", "layer 11"};
  flap_philox streams[7 * 16];
  int count = 0;
  for (uint64_t seed = 0; seed < 16; seed++)
    for (int i = 0; i < 7; i++)
      streams[count++] = flap_philox_stream(seed, names[i]);
  for (int i = 0; i < count; i++)
    for (int j = 0; j < i; j++)
      ck_assert_mem_ne(&streams[i], &streams[j], sizeof streams[i]);
  flap_philox again = flap_philox_stream(0, "a");
  ck_assert_mem_eq(&again, &streams[1], sizeof again);
}
END_TEST

START_TEST(philox_uniform_reads_the_words_in_order) {
  flap_philox stream = flap_philox_stream(1, "u");
  for (uint64_t i = 0; i < 64; i++) {
    uint32_t words[4];
    flap_philox_block(&stream, i / 4, words);
    ck_assert_float_eq(flap_philox_uniform(&stream, i), (float)(words[i % 4] >> 8) / 16777216.0f);
  }
}
END_TEST

START_TEST(philox_uniform_has_its_moments) {
  enum { COUNT = 1 << 18 };
  flap_philox stream = flap_philox_stream(2, "u");
  double sum = 0, squares = 0;
  for (uint64_t i = 0; i < COUNT; i++) {
    double value = (double)flap_philox_uniform(&stream, i);
    ck_assert(value >= 0 && value < 1);
    sum += value;
    squares += value * value;
  }
  /* Five standard errors. */
  ck_assert_double_eq_tol(sum / COUNT, 0.5, 5 * sqrt(1.0 / 12 / COUNT));
  ck_assert_double_eq_tol(squares / COUNT, 1.0 / 3, 5 * sqrt(4.0 / 45 / COUNT));
}
END_TEST

START_TEST(philox_normal_has_its_moments) {
  enum { COUNT = 1 << 18 };
  flap_philox stream = flap_philox_stream(3, "n");
  double sum = 0, squares = 0, fourth = 0, neighbours = 0, before = 0;
  uint64_t within_one = 0;
  for (uint64_t i = 0; i < COUNT; i++) {
    double value = (double)flap_philox_normal(&stream, i);
    ck_assert(isfinite(value));
    sum += value;
    squares += value * value;
    fourth += value * value * value * value;
    neighbours += value * before;
    before = value;
    within_one += fabs(value) < 1;
  }
  ck_assert_double_eq_tol(sum / COUNT, 0, 5 / sqrt(COUNT));
  ck_assert_double_eq_tol(squares / COUNT, 1, 5 * sqrt(2.0 / COUNT));
  ck_assert_double_eq_tol(fourth / COUNT, 3, 5 * sqrt(96.0 / COUNT));
  ck_assert_double_eq_tol(neighbours / COUNT, 0, 5 / sqrt(COUNT));
  ck_assert_double_eq_tol((double)within_one / COUNT, 0.6826895, 5 * sqrt(0.6827 * 0.3173 / COUNT));
}
END_TEST

START_TEST(philox_normals_in_bulk_are_the_same_bits) {
  flap_philox stream = flap_philox_stream(9, "bulk");
  float values[64];
  for (uint64_t first = 1000000007; first < 1000000009; first++)
    for (uint64_t count = 0; count < 64; count++) {
      memset(values, 0xff, sizeof values);
      flap_philox_normals(&stream, first, count, values);
      for (uint64_t i = 0; i < count; i++) {
        const float one = flap_philox_normal(&stream, first + i);
        ck_assert_mem_eq(&values[i], &one, sizeof one);
      }
    }
}
END_TEST

/* What the polynomials give with every compiler, instruction set and C library; first seen with libm's functions, which
 * gave the same. */
START_TEST(philox_normals_are_the_same_bits_everywhere) {
  enum { COUNT = 4096 };
  flap_philox stream = flap_philox_stream(5, "y");
  float values[COUNT];
  uint64_t hash = 0xcbf29ce484222325u;
  for (uint64_t k = 0; k < 64; k++) {
    flap_philox_normals(&stream, k * 1000003, COUNT - k, values);
    for (uint64_t i = 0; i < COUNT - k; i++) {
      uint32_t bits;
      memcpy(&bits, &values[i], sizeof bits);
      hash = (hash ^ bits) * 0x100000001b3u;
    }
  }
  ck_assert_uint_eq(hash, 0xf197ea74eaf97b5u);
}
END_TEST

START_TEST(philox_below_is_in_range_and_even) {
  enum { BOUND = 7, COUNT = 70000 };
  flap_philox stream = flap_philox_stream(4, "b");
  uint64_t counts[BOUND] = {0};
  for (uint64_t i = 0; i < COUNT; i++) {
    uint64_t value = flap_philox_below(&stream, i, BOUND);
    ck_assert_uint_lt(value, BOUND);
    counts[value]++;
  }
  double chi_square = 0;
  for (int i = 0; i < BOUND; i++) {
    double difference = (double)counts[i] - COUNT / BOUND;
    chi_square += difference * difference / (COUNT / BOUND);
  }
  ck_assert_double_lt(chi_square, 22.46); /* 6 degrees of freedom, p = 0.001 */
  ck_assert_uint_eq(flap_philox_below(&stream, 5, 1), 0);
  uint64_t high = 0;
  for (uint64_t i = 0; i < 100; i++)
    high |= flap_philox_below(&stream, i, UINT64_MAX);
  ck_assert_uint_gt(high, UINT64_MAX / 2);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("philox");
  tcase_add_test(tests, philox_known_answers_match);
  tcase_add_test(tests, philox_block_is_the_generator_at_a_64_bit_counter);
  tcase_add_test(tests, philox_streams_differ_by_seed_and_name);
  tcase_add_test(tests, philox_uniform_reads_the_words_in_order);
  tcase_add_test(tests, philox_uniform_has_its_moments);
  tcase_add_test(tests, philox_normal_has_its_moments);
  tcase_add_test(tests, philox_normals_in_bulk_are_the_same_bits);
  tcase_add_test(tests, philox_normals_are_the_same_bits_everywhere);
  tcase_add_test(tests, philox_below_is_in_range_and_even);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
