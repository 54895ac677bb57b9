/* Files and folders that are there whole or not at all, leftovers included. */
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OK(call) ck_assert_msg((call) == FLAP_OK, "%s", flap_error_message())

static void setup(void) {
  scratch_setup();
  flap_durable_refuse_exchange(false);
}

static void setup_without_exchange(void) {
  scratch_setup();
  flap_durable_refuse_exchange(true);
}

static void teardown(void) {
  flap_durable_refuse_exchange(false);
  scratch_teardown();
}

static void assert_content(const char *name, const char *expected) {
  char *text = scratch_read(name, NULL);
  ck_assert_str_eq(text, expected);
  free(text);
}

/* Copied, because scratch_path reuses its buffers. */
static void path_of(char out[FLAP_DURABLE_PATH_MAX], const char *name) {
  OK(flap_durable_join(out, scratch_path(""), name));
}

/* ---- files ---------------------------------------------------------------------------------------------- */

START_TEST(durable_write_file_replaces_content_and_leaves_no_temporary) {
  OK(flap_durable_write_file(scratch_path("f"), "first one", 9));
  assert_content("f", "first one");
  OK(flap_durable_write_file(scratch_path("f"), "second", 6));
  assert_content("f", "second");
  OK(flap_durable_write_file(scratch_path("f"), NULL, 0));
  assert_content("f", "");
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(durable_write_file_in_current_folder_needs_no_slash) {
  char here[1024];
  ck_assert_ptr_nonnull(getcwd(here, sizeof here));
  ck_assert_int_eq(chdir(scratch_path("")), 0);
  flap_status status = flap_durable_write_file("plain", "x", 1);
  ck_assert_int_eq(chdir(here), 0);
  ck_assert_int_eq(status, FLAP_OK);
  assert_content("plain", "x");
}
END_TEST

START_TEST(durable_write_file_on_full_disk_keeps_the_old_content) {
  static const char big[5000];
  OK(flap_durable_write_file(scratch_path("f"), "old", 3));
  scratch_limit(1000);
  flap_status status = flap_durable_write_file(scratch_path("f"), big, sizeof big);
  scratch_unlimit();
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert_msg(scratch_error_has(scratch_path("f.tmp")), "%s", flap_error_message());
  assert_content("f", "old");
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(durable_file_in_pieces_appears_at_commit_only) {
  flap_durable_file file;
  scratch_text("f.tmp", "a leftover that is longer than what comes");
  OK(flap_durable_begin_file(&file, scratch_path("f")));
  OK(flap_durable_append(&file, "one ", 4));
  OK(flap_durable_append(&file, "two", 3));
  ck_assert(!scratch_exists("f"));
  OK(flap_durable_commit_file(&file));
  assert_content("f", "one two");
  OK(flap_durable_begin_file(&file, scratch_path("f")));
  OK(flap_durable_append(&file, "three", 5));
  flap_durable_abort_file(&file);
  flap_durable_abort_file(&file);
  assert_content("f", "one two");
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(durable_errors_name_the_path) {
  flap_durable_file file;
  char long_path[FLAP_DURABLE_PATH_MAX + 10];
  memset(long_path, 'a', sizeof long_path - 1);
  long_path[sizeof long_path - 1] = '\0';
  ck_assert_int_eq(flap_durable_write_file(scratch_path("no/f"), "x", 1), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("no/f"));
  ck_assert_int_eq(flap_durable_write_file("", "x", 1), FLAP_INVALID);
  ck_assert_int_eq(flap_durable_write_file(long_path, "x", 1), FLAP_INVALID);
  ck_assert(scratch_error_has("too long"));
  ck_assert_int_eq(flap_durable_begin_file(&file, long_path), FLAP_INVALID);
  ck_assert_int_eq(file.fd, -1);
  ck_assert_int_eq(flap_durable_join(file.path, long_path, "x"), FLAP_INVALID);
  /* A temporary that is a link is not followed. */
  scratch_text("victim", "safe");
  ck_assert_int_eq(symlink("victim", scratch_path("f.tmp")), 0);
  ck_assert_int_eq(flap_durable_write_file(scratch_path("f"), "x", 1), FLAP_IO);
  assert_content("victim", "safe");
}
END_TEST

START_TEST(durable_copy_file_is_equal_and_refuses_what_is_no_file) {
  enum { BYTES = 700001 };
  char *data = malloc(BYTES);
  size_t bytes;
  for (size_t i = 0; i < BYTES; i++)
    data[i] = (char)(i * 31 >> 3);
  scratch_write("from", data, BYTES);
  OK(flap_durable_copy_file(scratch_path("from"), scratch_path("to")));
  char *copy = scratch_read("to", &bytes);
  ck_assert_uint_eq(bytes, BYTES);
  ck_assert_int_eq(memcmp(copy, data, BYTES), 0);
  free(copy);
  free(data);
  ck_assert_int_eq(flap_durable_copy_file(scratch_path("absent"), scratch_path("to")), FLAP_NOT_FOUND);
  ck_assert_int_eq(flap_durable_copy_file(scratch_path(""), scratch_path("to")), FLAP_INVALID);
  scratch_limit(300000);
  flap_status status = flap_durable_copy_file(scratch_path("from"), scratch_path("third"));
  scratch_unlimit();
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert(!scratch_exists("third") && !scratch_exists("third.tmp"));
}
END_TEST

START_TEST(durable_read_all_past_the_end_is_corrupt) {
  char got[8];
  scratch_text("f", "12345");
  FILE *file = fopen(scratch_path("f"), "rb");
  OK(flap_durable_read_all(fileno(file), "f", 1, got, 4));
  ck_assert_int_eq(memcmp(got, "2345", 4), 0);
  ck_assert_int_eq(flap_durable_read_all(fileno(file), "f", 1, got, 5), FLAP_CORRUPT);
  ck_assert(scratch_error_has("ends at byte 5"));
  (void)fclose(file);
}
END_TEST

/* ---- folders -------------------------------------------------------------------------------------------- */

/* Begins "c", and puts a file and a folder with one into it. */
static void fill_folder(const char *text) {
  char temporary[FLAP_DURABLE_PATH_MAX], final[FLAP_DURABLE_PATH_MAX];
  path_of(final, "c");
  OK(flap_durable_begin_folder(final, temporary));
  ck_assert_int_eq(strcmp(temporary, scratch_path("c.tmp")), 0);
  scratch_text("c.tmp/state", text);
  ck_assert_int_eq(mkdir(scratch_path("c.tmp/model"), 0777), 0);
  scratch_text("c.tmp/model/config.json", text);
}

static flap_status commit(bool replace) {
  return flap_durable_commit_folder(scratch_path("c"), replace);
}

START_TEST(durable_folder_appears_at_commit_only) {
  fill_folder("one");
  ck_assert(!scratch_exists("c"));
  OK(commit(false));
  assert_content("c/state", "one");
  assert_content("c/model/config.json", "one");
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(durable_folder_refuses_or_replaces_as_told) {
  fill_folder("one");
  OK(commit(false));
  fill_folder("two");
  ck_assert_int_eq(commit(false), FLAP_INVALID);
  ck_assert(scratch_error_has("already there"));
  assert_content("c/state", "one");
  assert_content("c.tmp/state", "two");
  ck_assert_int_eq(mkdir(scratch_path("c.old"), 0777), 0); /* somebody's backup */
  scratch_text("c.old/state", "precious");
  OK(commit(true));
  assert_content("c/state", "two");
  assert_content("c.old/state", "precious");
  ck_assert_uint_eq(scratch_count(), 2);
}
END_TEST

START_TEST(durable_folder_replaces_no_file_and_no_strange_folder) {
  fill_folder("one");
  scratch_text("c", "a file");
  ck_assert_int_eq(commit(true), FLAP_INVALID);
  assert_content("c", "a file");
  ck_assert_int_eq(unlink(scratch_path("c")), 0);
  ck_assert_int_eq(mkdir(scratch_path("c"), 0777), 0);
  ck_assert_int_eq(mkdir(scratch_path("c/a"), 0777), 0);
  ck_assert_int_eq(mkdir(scratch_path("c/a/b"), 0777), 0);
  ck_assert_int_eq(commit(true), FLAP_INVALID);
  ck_assert(scratch_error_has("c/a/b"));
  assert_content("c.tmp/state", "one");
}
END_TEST

START_TEST(durable_folder_commit_without_begin_is_not_found) {
  ck_assert_int_eq(commit(false), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("c.tmp"));
}
END_TEST

START_TEST(durable_folder_begin_clears_a_leftover) {
  fill_folder("a run that was killed");
  ck_assert_int_eq(symlink("/etc/passwd", scratch_path("c.tmp/link")), 0);
  char temporary[FLAP_DURABLE_PATH_MAX];
  OK(flap_durable_begin_folder(scratch_path("c"), temporary));
  ck_assert(!scratch_exists("c.tmp/state") && !scratch_exists("c.tmp/model") && !scratch_exists("c.tmp/link"));
  ck_assert(scratch_exists("c.tmp"));
  ck_assert_int_eq(access("/etc/passwd", F_OK), 0);
  flap_durable_abort_folder(scratch_path("c"));
  flap_durable_abort_folder(scratch_path("c"));
  ck_assert_uint_eq(scratch_count(), 0);
}
END_TEST

START_TEST(durable_folder_leftover_with_strange_things_is_left_alone) {
  char temporary[FLAP_DURABLE_PATH_MAX];
  ck_assert_int_eq(mkdir(scratch_path("c.tmp"), 0777), 0);
  scratch_text("c.tmp/mine", "precious");
  ck_assert_int_eq(mkfifo(scratch_path("c.tmp/pipe"), 0600), 0);
  ck_assert_int_eq(flap_durable_begin_folder(scratch_path("c"), temporary), FLAP_INVALID);
  ck_assert(scratch_error_has("pipe"));
  assert_content("c.tmp/mine", "precious");
  /* Nor is a link in the place of the folder followed. */
  ck_assert_int_eq(mkdir(scratch_path("elsewhere"), 0777), 0);
  scratch_text("elsewhere/mine", "precious");
  ck_assert_int_eq(symlink("elsewhere", scratch_path("d.tmp")), 0);
  ck_assert_int_eq(flap_durable_begin_folder(scratch_path("d"), temporary), FLAP_INVALID);
  assert_content("elsewhere/mine", "precious");
}
END_TEST

START_TEST(durable_recovery_brings_back_or_removes_the_old_folder) {
  /* Killed between "c to c.tmp.old" and "c.tmp to c". */
  fill_folder("new");
  ck_assert_int_eq(mkdir(scratch_path("c.tmp.old"), 0777), 0);
  scratch_text("c.tmp.old/state", "old");
  OK(flap_durable_recover_folder(scratch_path("c")));
  assert_content("c/state", "old");
  ck_assert_uint_eq(scratch_count(), 1);
  /* Killed before the removal of c.tmp.old. */
  ck_assert_int_eq(mkdir(scratch_path("c.tmp.old"), 0777), 0);
  OK(flap_durable_recover_folder(scratch_path("c/")));
  assert_content("c/state", "old");
  ck_assert_uint_eq(scratch_count(), 1);
  OK(flap_durable_recover_folder(scratch_path("c")));
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(durable_remove_folder_removes_all_or_nothing) {
  fill_folder("one");
  OK(commit(false));
  ck_assert_int_eq(symlink("/etc/passwd", scratch_path("c/link")), 0);
  ck_assert_int_eq(mkdir(scratch_path("c/model/deep"), 0777), 0);
  ck_assert_int_eq(flap_durable_remove_folder(scratch_path("c")), FLAP_INVALID);
  ck_assert(scratch_error_has("c/model/deep"));
  assert_content("c/state", "one");
  ck_assert_int_eq(rmdir(scratch_path("c/model/deep")), 0);
  OK(flap_durable_remove_folder(scratch_path("c/")));
  ck_assert_uint_eq(scratch_count(), 0);
  ck_assert_int_eq(access("/etc/passwd", F_OK), 0);
  ck_assert_int_eq(flap_durable_remove_folder(scratch_path("c")), FLAP_NOT_FOUND);
  scratch_text("f", "a file");
  ck_assert_int_eq(flap_durable_remove_folder(scratch_path("f")), FLAP_INVALID);
  assert_content("f", "a file");
}
END_TEST

START_TEST(durable_make_folder_makes_those_above) {
  OK(flap_durable_make_folder(scratch_path("a/b//c/")));
  OK(flap_durable_make_folder(scratch_path("a/b/c")));
  ck_assert(scratch_exists("a/b/c"));
  OK(flap_durable_make_folder("/"));
  scratch_text("a/file", "");
  ck_assert_int_eq(flap_durable_make_folder(scratch_path("a/file/x")), FLAP_INVALID);
  ck_assert(scratch_error_has("in the way"));
  ck_assert_int_eq(flap_durable_make_folder(""), FLAP_INVALID);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("durable");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, durable_write_file_replaces_content_and_leaves_no_temporary);
  tcase_add_test(tests, durable_write_file_in_current_folder_needs_no_slash);
  tcase_add_test(tests, durable_write_file_on_full_disk_keeps_the_old_content);
  tcase_add_test(tests, durable_file_in_pieces_appears_at_commit_only);
  tcase_add_test(tests, durable_errors_name_the_path);
  tcase_add_test(tests, durable_copy_file_is_equal_and_refuses_what_is_no_file);
  tcase_add_test(tests, durable_read_all_past_the_end_is_corrupt);
  tcase_add_test(tests, durable_folder_appears_at_commit_only);
  tcase_add_test(tests, durable_folder_refuses_or_replaces_as_told);
  tcase_add_test(tests, durable_folder_replaces_no_file_and_no_strange_folder);
  tcase_add_test(tests, durable_folder_commit_without_begin_is_not_found);
  tcase_add_test(tests, durable_folder_begin_clears_a_leftover);
  tcase_add_test(tests, durable_folder_leftover_with_strange_things_is_left_alone);
  tcase_add_test(tests, durable_recovery_brings_back_or_removes_the_old_folder);
  tcase_add_test(tests, durable_remove_folder_removes_all_or_nothing);
  tcase_add_test(tests, durable_make_folder_makes_those_above);
  suite_add_tcase(suite, tests);
  TCase *plain = tcase_create("durable_without_exchange");
  tcase_add_checked_fixture(plain, setup_without_exchange, teardown);
  tcase_add_test(plain, durable_folder_appears_at_commit_only);
  tcase_add_test(plain, durable_folder_refuses_or_replaces_as_told);
  tcase_add_test(plain, durable_folder_replaces_no_file_and_no_strange_folder);
  suite_add_tcase(suite, plain);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
