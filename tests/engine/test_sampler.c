/* The sampler: cuts, ties, determinism, and frequencies against softmax. */
#include "engine/sampler.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define VOCABULARY_MAX 1000u

static double memory[2 * VOCABULARY_MAX];

static flap_sampler open_sampler(const flap_sample_options *options, uint32_t vocabulary) {
  flap_arena arena;
  flap_sampler sampler;
  ck_assert_uint_le(flap_sampler_measure(vocabulary), sizeof memory);
  flap_arena_borrow(&arena, "test", memory, flap_sampler_measure(vocabulary));
  flap_sampler_open(&sampler, options, vocabulary, &arena);
  return sampler;
}

static int32_t next(const flap_sample_options *options, const float *logits, uint32_t vocabulary, uint64_t index) {
  flap_sampler sampler = open_sampler(options, vocabulary);
  int32_t token = -1;
  ck_assert_int_eq(flap_sampler_next(&sampler, logits, index, &token), FLAP_OK);
  ck_assert(token >= 0 && (uint32_t)token < vocabulary);
  return token;
}

/* Softmax over what the cuts leave, the plain way: a full ordering of a few tokens. */
static void expected_shares(const flap_sample_options *options, const float *logits, uint32_t count, double *shares) {
  uint32_t order[VOCABULARY_MAX];
  double sum = 0, reached = 0;
  for (uint32_t i = 0; i < count; i++) {
    uint32_t at = i;
    for (; at > 0 && logits[order[at - 1]] < logits[i]; at--)
      order[at] = order[at - 1];
    order[at] = i;
    shares[i] = 0;
  }
  uint32_t kept = options->top_k > 0 && options->top_k < count ? options->top_k : count;
  for (uint32_t i = 0; i < kept; i++)
    sum += shares[order[i]] = exp((double)(logits[order[i]] - logits[order[0]]) / options->temperature);
  for (uint32_t i = 0; i < kept; i++) {
    if (i > 0 && reached >= options->top_p)
      shares[order[i]] = 0;
    reached += shares[order[i]] / sum;
  }
  sum = 0;
  for (uint32_t i = 0; i < count; i++)
    sum += shares[i];
  for (uint32_t i = 0; i < count; i++)
    shares[i] /= sum;
}

static const float some_logits[] = {0.5f, -1, 2, 0.5f, 1.25f, -3, 0, 2};
#define SOME (sizeof some_logits / sizeof *some_logits)

/* Chi-square of so many draws; the draws are fixed by the seed, so this holds always or never. The 99.9th percentile
 * for 7 degrees of freedom is 24.3; less freedom has less. */
static void check_frequencies(flap_sample_options options) {
  enum { DRAWS = 40000 };
  double shares[SOME], chi_square = 0;
  uint32_t seen[SOME] = {0};
  expected_shares(&options, some_logits, SOME, shares);
  flap_sampler sampler = open_sampler(&options, SOME);
  for (uint64_t i = 0; i < DRAWS; i++) {
    int32_t token;
    ck_assert_int_eq(flap_sampler_next(&sampler, some_logits, i, &token), FLAP_OK);
    seen[token]++;
  }
  for (uint32_t i = 0; i < SOME; i++) {
    if (shares[i] == 0)
      ck_assert_msg(seen[i] == 0, "token %u was cut, but drawn %u times", i, seen[i]);
    else
      chi_square += pow(seen[i] - DRAWS * shares[i], 2) / (DRAWS * shares[i]);
  }
  ck_assert_msg(chi_square < 24.3, "chi-square %g", chi_square);
}

START_TEST(frequencies_follow_softmax_and_cuts) {
  check_frequencies((flap_sample_options){.temperature = 1, .top_p = 1, .seed = 1});
  check_frequencies((flap_sample_options){.temperature = 0.5, .top_p = 1, .seed = 2});
  check_frequencies((flap_sample_options){.temperature = 3, .top_p = 1, .seed = 3});
  check_frequencies((flap_sample_options){.temperature = 1, .top_p = 1, .top_k = 3, .seed = 4});
  check_frequencies((flap_sample_options){.temperature = 1, .top_p = 0.8, .seed = 5});
  check_frequencies((flap_sample_options){.temperature = 1.5, .top_p = 0.6, .top_k = 5, .seed = 6});
  check_frequencies((flap_sample_options){.temperature = 1, .top_p = 0.9999, .top_k = 100, .seed = 7});
}
END_TEST

START_TEST(temperature_zero_takes_the_first_of_the_largest) {
  flap_sample_options options = {.temperature = 0, .top_p = 1};
  ck_assert_int_eq(next(&options, some_logits, SOME, 0), 2);
  float equal[5] = {-4, -4, -4, -4, -4}, one = -1e30f;
  ck_assert_int_eq(next(&options, equal, 5, 9), 0);
  ck_assert_int_eq(next(&options, &one, 1, 0), 0);
}
END_TEST

START_TEST(cuts_to_one_token_are_greedy) {
  for (uint64_t i = 0; i < 200; i++) {
    flap_sample_options one = {.temperature = 1, .top_p = 1, .top_k = 1, .seed = i};
    flap_sample_options none = {.temperature = 1, .top_p = 0, .seed = i};
    flap_sample_options cold = {.temperature = 1e-300, .top_p = 1, .top_k = 1, .seed = i};
    ck_assert_int_eq(next(&one, some_logits, SOME, i), 2);
    ck_assert_int_eq(next(&none, some_logits, SOME, i), 2);
    ck_assert_int_eq(next(&cold, some_logits, SOME, i), 2);
  }
}
END_TEST

START_TEST(cuts_among_equals_keep_the_smaller_ids) {
  float equal[10] = {0};
  uint32_t seen_k = 0, seen_p = 0;
  for (uint64_t i = 0; i < 500; i++) {
    flap_sample_options by_k = {.temperature = 1, .top_p = 1, .top_k = 4, .seed = 3};
    flap_sample_options by_p = {.temperature = 1, .top_p = 0.25, .seed = 3};
    seen_k |= 1u << next(&by_k, equal, 10, i);
    seen_p |= 1u << next(&by_p, equal, 10, i);
  }
  ck_assert_uint_eq(seen_k, 0xf); /* all of them, and no other */
  ck_assert_uint_eq(seen_p, 0x7); /* two tenths do not reach a quarter, three do */
}
END_TEST

START_TEST(top_p_reached_exactly_takes_no_more) {
  float halves[3] = {0, 0, -1000};
  uint32_t seen = 0;
  for (uint64_t i = 0; i < 200; i++) {
    flap_sample_options options = {.temperature = 1, .top_p = 0.5, .seed = 11};
    seen |= 1u << next(&options, halves, 3, i);
  }
  ck_assert_uint_eq(seen, 0x1);
}
END_TEST

START_TEST(tokens_without_a_share_are_never_drawn) {
  float logits[VOCABULARY_MAX];
  for (uint32_t i = 0; i < VOCABULARY_MAX; i++)
    logits[i] = -3e38f;
  logits[700] = 3e38f;
  for (uint64_t i = 0; i < 50; i++) {
    flap_sample_options options = {.temperature = 2, .top_p = 1, .seed = 5};
    ck_assert_int_eq(next(&options, logits, VOCABULARY_MAX, i), 700);
  }
}
END_TEST

START_TEST(seed_and_index_decide) {
  flap_sample_options options = {.temperature = 1, .top_p = 0.95, .top_k = 7, .seed = 42};
  flap_sample_options other = options;
  other.seed = 43;
  uint32_t differ = 0, repeat = 0;
  int32_t before = -1;
  for (uint64_t i = 0; i < 200; i++) {
    int32_t token = next(&options, some_logits, SOME, i);
    (void)next(&other, some_logits, SOME, 1000 - i); /* what was drawn before has no say */
    ck_assert_int_eq(next(&options, some_logits, SOME, i), token);
    differ += next(&other, some_logits, SOME, i) != token;
    repeat += token == before;
    before = token;
  }
  ck_assert_uint_gt(differ, 50);
  ck_assert_uint_lt(repeat, 150);
}
END_TEST

/* Logits that all differ, permuted: the draw must follow the token, not its place. */
START_TEST(large_vocabularies_are_ordered_right) {
  float logits[VOCABULARY_MAX], moved[VOCABULARY_MAX];
  for (uint32_t i = 0; i < VOCABULARY_MAX; i++)
    logits[i] = (float)((i * 617) % VOCABULARY_MAX) * 0.003f;
  for (uint32_t i = 0; i < VOCABULARY_MAX; i++)
    moved[(i * 7 + 3) % VOCABULARY_MAX] = logits[i];
  uint32_t distinct = 0;
  bool seen[VOCABULARY_MAX] = {false};
  for (uint64_t i = 0; i < 300; i++) {
    flap_sample_options options = {.temperature = 1, .top_p = 1, .top_k = i % 2 ? 900 : 0, .seed = 8};
    int32_t token = next(&options, logits, VOCABULARY_MAX, i);
    distinct += !seen[token];
    seen[token] = true;
    if (i % 2) /* the whole vocabulary is summed in the order of ids, whose roundings the permutation changes */
      ck_assert_int_eq(next(&options, moved, VOCABULARY_MAX, i), (token * 7 + 3) % (int32_t)VOCABULARY_MAX);
  }
  ck_assert_uint_gt(distinct, 150);
}
END_TEST

START_TEST(logits_that_are_not_finite_are_refused) {
  const float broken[] = {NAN, INFINITY, -INFINITY};
  for (size_t i = 0; i < 3; i++)
    for (int temperature = 0; temperature < 2; temperature++) {
      float logits[4] = {1, 2, 3, broken[i]};
      flap_sample_options options = {.temperature = temperature, .top_p = 1};
      flap_sampler sampler = open_sampler(&options, 4);
      int32_t token;
      ck_assert_int_eq(flap_sampler_next(&sampler, logits, 0, &token), FLAP_NUMERIC);
      ck_assert_ptr_nonnull(strstr(flap_error_message(), "token 3"));
    }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("sampler");
  TCase *tests = tcase_create("all");
  tcase_add_test(tests, frequencies_follow_softmax_and_cuts);
  tcase_add_test(tests, temperature_zero_takes_the_first_of_the_largest);
  tcase_add_test(tests, cuts_to_one_token_are_greedy);
  tcase_add_test(tests, cuts_among_equals_keep_the_smaller_ids);
  tcase_add_test(tests, top_p_reached_exactly_takes_no_more);
  tcase_add_test(tests, tokens_without_a_share_are_never_drawn);
  tcase_add_test(tests, seed_and_index_decide);
  tcase_add_test(tests, large_vocabularies_are_ordered_right);
  tcase_add_test(tests, logits_that_are_not_finite_are_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
