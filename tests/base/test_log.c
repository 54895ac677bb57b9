/* The log: levels, prefixes, whole lines. */
#include "base/log.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int saved_stderr, pipe_read;

static void capture_begin(void) {
  int ends[2];
  ck_assert_int_eq(pipe(ends), 0);
  saved_stderr = dup(STDERR_FILENO);
  dup2(ends[1], STDERR_FILENO);
  close(ends[1]);
  pipe_read = ends[0];
}

static const char *capture_end(void) {
  static char text[8192];
  dup2(saved_stderr, STDERR_FILENO);
  close(saved_stderr);
  ssize_t length = 0, part;
  while ((part = read(pipe_read, text + length, sizeof text - 1 - (size_t)length)) > 0)
    length += part;
  text[length] = '\0';
  close(pipe_read);
  return text;
}

START_TEST(log_levels_below_are_dropped) {
  flap_log_set_level(FLAP_LOG_WARNING);
  capture_begin();
  flap_log(FLAP_LOG_DEBUG, "debug");
  flap_log(FLAP_LOG_INFO, "info");
  flap_log(FLAP_LOG_WARNING, "disk %d", 3);
  flap_log(FLAP_LOG_ERROR, "error");
  ck_assert_str_eq(capture_end(), "flap: warning: disk 3\nflap: error: error\n");
}
END_TEST

START_TEST(log_info_is_plain) {
  flap_log_set_level(FLAP_LOG_DEBUG);
  capture_begin();
  flap_log(FLAP_LOG_DEBUG, "a");
  flap_log(FLAP_LOG_INFO, "b");
  ck_assert_str_eq(capture_end(), "flap: debug: a\nb\n");
}
END_TEST

START_TEST(log_long_line_is_cut_and_still_a_line) {
  char text[6000];
  memset(text, 'x', sizeof text - 1);
  text[sizeof text - 1] = '\0';
  flap_log_set_level(FLAP_LOG_INFO);
  capture_begin();
  flap_log(FLAP_LOG_INFO, "%s", text);
  const char *line = capture_end();
  size_t length = strlen(line);
  ck_assert_uint_gt(length, 1000);
  ck_assert_str_eq(line + length - 5, "x...\n");
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("log");
  tcase_add_test(tests, log_levels_below_are_dropped);
  tcase_add_test(tests, log_info_is_plain);
  tcase_add_test(tests, log_long_line_is_cut_and_still_a_line);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
