/* Figures as texts, and words for a shell. */
#include "tools/text.h"

#include <check.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

START_TEST(text_figures_are_short) {
  ck_assert_str_eq(flap_text_grouped(0).text, "0");
  ck_assert_str_eq(flap_text_grouped(999).text, "999");
  ck_assert_str_eq(flap_text_grouped(1000).text, "1,000");
  ck_assert_str_eq(flap_text_grouped(UINT64_MAX).text, "18,446,744,073,709,551,615");
  ck_assert_str_eq(flap_text_ratio(70, 5, 2).text, "14.00");
  ck_assert_str_eq(flap_text_ratio(1, 0, 2).text, "-");
  ck_assert_str_eq(flap_text_ratio(NAN, 1, 2).text, "-");
  ck_assert_str_eq(flap_text_percent(0.87, 1).text, "87%");
  ck_assert_str_eq(flap_text_percent(1, 0).text, "-");
  ck_assert_str_eq(flap_text_share(1, 24000).text, "0.0042%");
  ck_assert_str_eq(flap_text_share(1, 1).text, "100%");
  ck_assert_str_eq(flap_text_share(2, 3).text, "67%");
  ck_assert_str_eq(flap_text_share(1, 0).text, "-");
  ck_assert_str_eq(flap_text_rate(0).text, "0");
  ck_assert_str_eq(flap_text_rate(999.4).text, "999");
  ck_assert_str_eq(flap_text_rate(999.6).text, "1.00k");
  ck_assert_str_eq(flap_text_rate(12345).text, "12.3k");
  ck_assert_str_eq(flap_text_rate(1234567).text, "1.23M");
  ck_assert_str_eq(flap_text_rate(NAN).text, "-");
  ck_assert_str_eq(flap_text_seconds(INFINITY).text, "-");
  ck_assert_str_eq(flap_text_seconds(-1).text, "-");
}
END_TEST

static void check_word(const char *text, const char *wanted) {
  char *word = NULL;
  size_t bytes = 0;
  FILE *out = open_memstream(&word, &bytes);
  flap_text_print_word(out, text);
  ck_assert_int_eq(fclose(out), 0);
  ck_assert_str_eq(word, wanted);
  free(word);
}

START_TEST(text_shell_words_survive_a_shell) {
  check_word("run.yaml", "run.yaml");
  check_word("a b", "'a b'");
  check_word("it's", "'it'\\''s'");
  check_word("", "''");
  check_word("disk=[a]", "'disk=[a]'");
  char text[10001], wanted[sizeof text + 2]; /* longer than any path: a list of data */
  memset(text, '*', sizeof text - 1);
  text[sizeof text - 1] = '\0';
  (void)snprintf(wanted, sizeof wanted, "'%s'", text);
  check_word(text, wanted);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("tools");
  TCase *cases = tcase_create("text");
  tcase_add_test(cases, text_figures_are_short);
  tcase_add_test(cases, text_shell_words_survive_a_shell);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
