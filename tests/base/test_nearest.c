/* The nearest word: the distance counts edits, and a word that is far from all gets no suggestion. */
#include "base/nearest.h"

#include <check.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

START_TEST(nearest_distance_counts_edits) {
  ck_assert_uint_eq(flap_nearest_distance("kitten", "sitting"), 3);
  ck_assert_uint_eq(flap_nearest_distance("", "abc"), 3);
  ck_assert_uint_eq(flap_nearest_distance("abc", ""), 3);
  ck_assert_uint_eq(flap_nearest_distance("flaw", "lawn"), 2);
  ck_assert_uint_eq(flap_nearest_distance("Save-Steps", "save_steps"), 0);
  char longer[80];
  memset(longer, 'a', sizeof longer - 1);
  longer[sizeof longer - 1] = '\0';
  ck_assert(flap_nearest_distance(longer, "a") == SIZE_MAX);
}
END_TEST

START_TEST(nearest_word_is_near_or_none) {
  static const char *const words[] = {"train", "plan", "sample"};
  ck_assert_str_eq(flap_nearest_word("trian", words, 3), "train");
  ck_assert_str_eq(flap_nearest_word("PLAN", words, 3), "plan");
  ck_assert_ptr_null(flap_nearest_word("zzzzz", words, 3));
  ck_assert_ptr_null(flap_nearest_word("x", words, 0));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("nearest");
  TCase *tcase = tcase_create("nearest");
  tcase_add_test(tcase, nearest_distance_counts_edits);
  tcase_add_test(tcase, nearest_word_is_near_or_none);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
