/* The error record: what it says, whose it is, and what the macros forward. */
#include "base/status.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>

START_TEST(status_name_every_status_is_distinct) {
  for (int i = 0; i < FLAP_STATUS_COUNT; i++) {
    ck_assert_ptr_nonnull(flap_status_name((flap_status)i));
    for (int j = 0; j < i; j++)
      ck_assert_str_ne(flap_status_name((flap_status)i), flap_status_name((flap_status)j));
  }
  ck_assert_str_eq(flap_status_name(FLAP_NO_SPACE), "no space");
}
END_TEST

START_TEST(status_set_record_holds_the_text) {
  flap_error_clear();
  ck_assert_str_eq(flap_error_message(), "");
  ck_assert_int_eq(flap_error_set(FLAP_INVALID, "%s: line %d", "run.yaml", 3), FLAP_INVALID);
  ck_assert_str_eq(flap_error_message(), "run.yaml: line 3");
  ck_assert_int_eq(flap_error_prefix(FLAP_INVALID, "training"), FLAP_INVALID);
  ck_assert_str_eq(flap_error_message(), "training: run.yaml: line 3");
}
END_TEST

START_TEST(status_set_may_quote_its_own_record) {
  (void)flap_error_set(FLAP_IO, "inner");
  (void)flap_error_set(FLAP_IO, "outer (%s)", flap_error_message());
  ck_assert_str_eq(flap_error_message(), "outer (inner)");
  (void)flap_error_prefix(FLAP_IO, "again %s", flap_error_message());
  ck_assert_str_eq(flap_error_message(), "again outer (inner): outer (inner)");
}
END_TEST

START_TEST(status_set_os_follows_the_os_error) {
  ck_assert_int_eq(flap_error_set_os(ENOENT, "x"), FLAP_NOT_FOUND);
  ck_assert_int_eq(flap_error_set_os(ENOSPC, "x"), FLAP_NO_SPACE);
  ck_assert_int_eq(flap_error_set_os(EDQUOT, "x"), FLAP_NO_SPACE);
  ck_assert_int_eq(flap_error_set_os(ENOMEM, "x"), FLAP_NO_MEMORY);
  ck_assert_int_eq(flap_error_set_os(EACCES, "open %s", "/a"), FLAP_IO);
  ck_assert_str_eq(flap_error_message(), "open /a: Permission denied");
}
END_TEST

START_TEST(status_long_text_is_cut_not_overrun) {
  char text[5000];
  memset(text, 'a', sizeof text - 1);
  text[sizeof text - 1] = '\0';
  (void)flap_error_set_os(EIO, "%s", text);
  size_t length = strlen(flap_error_message());
  ck_assert_uint_gt(length, 500);
  ck_assert_uint_lt(length, sizeof text - 1);
  (void)flap_error_prefix(FLAP_IO, "%s", "why");
  ck_assert_int_eq(strncmp(flap_error_message(), "why: aaa", 8), 0);
}
END_TEST

START_TEST(status_message_is_one_line_whatever_it_quotes) {
  (void)flap_error_set(FLAP_INVALID, "near '%s'",
                       "a\nb\x1b[2J\x7f\t\xc2\x9b"
                       "31m caf\xc3\xa9");
  ck_assert_str_eq(flap_error_message(), "near 'a?b?[2J??"
                                         "??31m caf\xc3\xa9'");
  (void)flap_error_prefix(FLAP_INVALID, "%s", "x\ry");
  ck_assert_int_eq(strncmp(flap_error_message(), "x?y: near", 9), 0);
}
END_TEST

static void *fail_elsewhere(void *unused) {
  (void)flap_error_set(FLAP_DEVICE, "elsewhere");
  return unused;
}

START_TEST(status_record_belongs_to_its_thread) {
  (void)flap_error_set(FLAP_IO, "here");
  pthread_t thread;
  ck_assert_int_eq(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
  pthread_join(thread, NULL);
  ck_assert_str_eq(flap_error_message(), "here");
}
END_TEST

static flap_status forward(flap_status status, int *after) {
  FLAP_TRY(status);
  (*after)++;
  return FLAP_OK;
}

static flap_status forward_and_release(flap_status inner, int *released) {
  flap_status status;
  FLAP_TRY_GOTO(status, inner);
fail:
  (*released)++;
  return status;
}

START_TEST(status_try_forwards_failures_only) {
  int count = 0;
  ck_assert_int_eq(forward(FLAP_CORRUPT, &count), FLAP_CORRUPT);
  ck_assert_int_eq(count, 0);
  ck_assert_int_eq(forward(FLAP_OK, &count), FLAP_OK);
  ck_assert_int_eq(count, 1);
  ck_assert_int_eq(forward_and_release(FLAP_BUDGET, &count), FLAP_BUDGET);
  ck_assert_int_eq(count, 2);
}
END_TEST

START_TEST(status_set_ok_asserts) {
  (void)flap_error_set(FLAP_OK, "nothing failed");
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("status");
  tcase_add_test(tests, status_name_every_status_is_distinct);
  tcase_add_test(tests, status_set_record_holds_the_text);
  tcase_add_test(tests, status_set_may_quote_its_own_record);
  tcase_add_test(tests, status_set_os_follows_the_os_error);
  tcase_add_test(tests, status_long_text_is_cut_not_overrun);
  tcase_add_test(tests, status_message_is_one_line_whatever_it_quotes);
  tcase_add_test(tests, status_record_belongs_to_its_thread);
  tcase_add_test(tests, status_try_forwards_failures_only);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  if (srunner_fork_status(runner) == CK_FORK)
    tcase_add_test_raise_signal(tests, status_set_ok_asserts, SIGABRT);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
