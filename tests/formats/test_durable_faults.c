/* Durable files and folders when any system call fails, or when the process dies at any system call.
 *
 * The linker sends the library's calls here (--wrap). A countdown chooses the call that fails; a dead process is one
 * where every later call fails too. Afterwards calls work again, as after a restart, and recovery must find the old
 * state or the new one, whole.
 */
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OK(call) ck_assert_msg((call) == FLAP_OK, "%s", flap_error_message())
#define CALLS_MAX 200u
#define LOG_MAX 256u

static unsigned calls;        /* since arm() */
static unsigned failing_call; /* from 1; 0: none */
static bool stays_dead;
static char call_log[LOG_MAX]; /* a letter per call that worked */

static void arm(unsigned call, bool dead) {
  calls = 0;
  failing_call = call;
  stays_dead = dead;
  call_log[0] = '\0';
}

static bool is_failing(char letter) {
  calls++;
  if (failing_call != 0 && (calls == failing_call || (stays_dead && calls > failing_call))) {
    errno = EIO;
    return true;
  }
  size_t length = strlen(call_log);
  if (length + 1 < LOG_MAX) {
    call_log[length] = letter;
    call_log[length + 1] = '\0';
  }
  return false;
}

ssize_t __real_write(int fd, const void *data, size_t bytes);
ssize_t __wrap_write(int fd, const void *data, size_t bytes);
int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __real_rename(const char *from, const char *to);
int __wrap_rename(const char *from, const char *to);
int __real_renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags);
int __wrap_renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags);
int __real_unlink(const char *path);
int __wrap_unlink(const char *path);
int __real_unlinkat(int fd, const char *path, int flags);
int __wrap_unlinkat(int fd, const char *path, int flags);
int __real_rmdir(const char *path);
int __wrap_rmdir(const char *path);
int __real_mkdir(const char *path, mode_t mode);
int __wrap_mkdir(const char *path, mode_t mode);

/* Short writes too: a file is never written in one call. */
ssize_t __wrap_write(int fd, const void *data, size_t bytes) {
  return is_failing('W') ? -1 : __real_write(fd, data, bytes > 2 ? bytes / 2 : bytes);
}

int __wrap_fsync(int fd) {
  return is_failing('F') ? -1 : __real_fsync(fd);
}

int __wrap_rename(const char *from, const char *to) {
  return is_failing('R') ? -1 : __real_rename(from, to);
}

int __wrap_renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
  return is_failing('R') ? -1 : __real_renameat2(from_fd, from, to_fd, to, flags);
}

int __wrap_unlink(const char *path) {
  return is_failing('U') ? -1 : __real_unlink(path);
}

int __wrap_unlinkat(int fd, const char *path, int flags) {
  return is_failing('U') ? -1 : __real_unlinkat(fd, path, flags);
}

int __wrap_rmdir(const char *path) {
  return is_failing('U') ? -1 : __real_rmdir(path);
}

int __wrap_mkdir(const char *path, mode_t mode) {
  return is_failing('M') ? -1 : __real_mkdir(path, mode);
}

static void setup(void) {
  scratch_setup();
  arm(0, false);
}

static void teardown(void) {
  arm(0, false);
  flap_durable_refuse_exchange(false);
  scratch_teardown();
}

static bool holds(const char *name, const char *expected) {
  if (!scratch_exists(name))
    return false;
  char *text = scratch_read(name, NULL);
  bool same = strcmp(text, expected) == 0;
  free(text);
  return same;
}

/* Positions of the first and last `letter`; -1 when there is none. */
static int first(char letter) {
  const char *at = strchr(call_log, letter);
  return at ? (int)(at - call_log) : -1;
}

static int last(char letter) {
  const char *at = strrchr(call_log, letter);
  return at ? (int)(at - call_log) : -1;
}

START_TEST(durable_file_is_synced_before_and_its_folder_after_the_rename) {
  arm(0, false);
  OK(flap_durable_write_file(scratch_path("f"), "12345678", 8));
  ck_assert(holds("f", "12345678"));
  ck_assert_int_lt(last('W'), first('F'));
  ck_assert_int_lt(first('F'), first('R'));
  ck_assert_int_lt(first('R'), last('F'));
  ck_assert_int_eq(first('R'), last('R'));
}
END_TEST

START_TEST(durable_folder_is_synced_whole_before_and_above_after_the_rename) {
  char temporary[FLAP_DURABLE_PATH_MAX];
  OK(flap_durable_begin_folder(scratch_path("c"), temporary));
  scratch_text("c.tmp/a", "1");
  ck_assert_int_eq(mkdir(scratch_path("c.tmp/sub"), 0777), 0);
  scratch_text("c.tmp/sub/b", "2");
  arm(0, false);
  OK(flap_durable_commit_folder(scratch_path("c"), false));
  ck_assert_str_eq(call_log, "FFFFRF"); /* two files, two folders; rename; the folder above */
}
END_TEST

START_TEST(durable_file_is_old_or_new_after_any_failure) {
  for (int dead = 0; dead < 2; dead++) {
    unsigned call = 1;
    flap_status status;
    do {
      arm(0, false);
      OK(flap_durable_write_file(scratch_path("f"), "old one", 7));
      arm(call, dead);
      status = flap_durable_write_file(scratch_path("f"), "new two!", 8);
      bool reached = calls >= call;
      arm(0, false);
      ck_assert_msg(reached == (status != FLAP_OK), "call %u: %s", call, flap_status_name(status));
      ck_assert_msg(holds("f", "new two!") || (status != FLAP_OK && holds("f", "old one")), "call %u", call);
      ck_assert_msg(dead || !scratch_exists("f.tmp"), "call %u leaves a temporary", call);
      call++;
    } while (status != FLAP_OK && call < CALLS_MAX);
    ck_assert_int_eq(status, FLAP_OK);
    ck_assert_uint_gt(call, 6);
  }
}
END_TEST

/* One replacement of folder "c", whose two files say `text`. */
static flap_status replace_folder(const char *text) {
  char temporary[FLAP_DURABLE_PATH_MAX], path[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_durable_begin_folder(scratch_path("c"), temporary));
  FLAP_TRY(flap_durable_join(path, temporary, "state"));
  FLAP_TRY(flap_durable_write_file(path, text, strlen(text)));
  FLAP_TRY(flap_durable_join(path, temporary, "model"));
  FLAP_TRY(flap_durable_make_folder(path));
  FLAP_TRY(flap_durable_join(path, temporary, "model/config.json"));
  FLAP_TRY(flap_durable_write_file(path, text, strlen(text)));
  return flap_durable_commit_folder(scratch_path("c"), true);
}

static bool folder_holds(const char *text) {
  return holds("c/state", text) && holds("c/model/config.json", text);
}

static void fail_everywhere(bool dead) {
  unsigned call = 1;
  flap_status status;
  do {
    arm(0, false);
    OK(replace_folder("old"));
    arm(call, dead);
    status = replace_folder("new");
    bool reached = calls >= call;
    if (!dead && status != FLAP_OK)
      flap_durable_abort_folder(scratch_path("c"));
    arm(0, false);
    OK(flap_durable_recover_folder(scratch_path("c")));
    if (status == FLAP_OK)
      ck_assert_msg(folder_holds("new"), "call %u: committed, but not there", call);
    else
      ck_assert_msg(folder_holds("new") || folder_holds("old"), "call %u: neither old nor new", call);
    ck_assert_uint_eq(scratch_count(), 1);
    if (!reached)
      break;
    call++;
  } while (call < CALLS_MAX);
  ck_assert_int_eq(status, FLAP_OK);
  ck_assert_uint_gt(call, 15);
  ck_assert_uint_lt(call, CALLS_MAX);
}

START_TEST(durable_folder_is_old_or_new_after_any_failure) {
  fail_everywhere(false);
}
END_TEST

START_TEST(durable_folder_is_old_or_new_after_death_anywhere) {
  fail_everywhere(true);
}
END_TEST

START_TEST(durable_folder_without_exchange_is_old_or_new_after_any_failure) {
  flap_durable_refuse_exchange(true);
  fail_everywhere(false);
}
END_TEST

START_TEST(durable_folder_without_exchange_is_old_or_new_after_death_anywhere) {
  flap_durable_refuse_exchange(true);
  fail_everywhere(true);
}
END_TEST

START_TEST(durable_removed_folder_is_whole_or_nameless_after_death_anywhere) {
  unsigned call = 1;
  flap_status status;
  do {
    arm(0, false);
    OK(replace_folder("old"));
    arm(call, true);
    status = flap_durable_remove_folder(scratch_path("c"));
    arm(0, false);
    ck_assert_msg(!scratch_exists("c") || folder_holds("old"), "call %u: half of it is left", call);
    OK(flap_durable_recover_folder(scratch_path("c")));
    ck_assert(!scratch_exists("c.tmp"));
    call++;
  } while (status != FLAP_OK && call < CALLS_MAX);
  ck_assert_int_eq(status, FLAP_OK);
  ck_assert_uint_gt(call, 5);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("durable_faults");
  tcase_set_timeout(tests, 60);
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, durable_file_is_synced_before_and_its_folder_after_the_rename);
  tcase_add_test(tests, durable_folder_is_synced_whole_before_and_above_after_the_rename);
  tcase_add_test(tests, durable_file_is_old_or_new_after_any_failure);
  tcase_add_test(tests, durable_folder_is_old_or_new_after_any_failure);
  tcase_add_test(tests, durable_folder_is_old_or_new_after_death_anywhere);
  tcase_add_test(tests, durable_folder_without_exchange_is_old_or_new_after_any_failure);
  tcase_add_test(tests, durable_folder_without_exchange_is_old_or_new_after_death_anywhere);
  tcase_add_test(tests, durable_removed_folder_is_whole_or_nameless_after_death_anywhere);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
