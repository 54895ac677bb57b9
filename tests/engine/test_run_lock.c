/* The lock of a folder: one holder at a time, also while others come and go; its file goes with its holder. */
#include "engine/store/run_lock.h"

#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- flock: the linker sends run_lock.c's calls here -------------------------------------------------------- */

static flap_run_lock *leaves, *comes; /* what happens between another's open and its flock; NULL: nothing */

int __real_flock(int fd, int operation);
int __wrap_flock(int fd, int operation);

int __wrap_flock(int fd, int operation) {
  if (leaves != NULL) {
    flap_run_lock_release(leaves);
    leaves = NULL;
    ck_assert_int_eq(flap_run_lock_take(scratch_path(""), comes), FLAP_OK);
  }
  return __real_flock(fd, operation);
}

START_TEST(run_lock_file_that_went_away_before_it_was_locked_is_not_taken) {
  flap_run_lock first, second, third;
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &first), FLAP_OK);
  leaves = &first, comes = &third;
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &second), FLAP_INVALID);
  ck_assert_int_eq(second.fd, -1);
  flap_run_lock_release(&third);
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &second), FLAP_OK);
  flap_run_lock_release(&second);
}
END_TEST

START_TEST(run_lock_second_holder_is_refused_by_number) {
  flap_run_lock first, second;
  char wanted[64];
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &first), FLAP_OK);
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &second), FLAP_INVALID);
  (void)snprintf(wanted, sizeof wanted, "process %ld on ", (long)getpid());
  ck_assert_ptr_nonnull(strstr(flap_error_message(), wanted));
  ck_assert_int_eq(second.fd, -1);
  flap_run_lock_release(&second); /* holds nothing, so it takes nothing away */
  ck_assert(scratch_exists(FLAP_RUN_LOCK_FILE));
  flap_run_lock_release(&first);
  ck_assert(!scratch_exists(FLAP_RUN_LOCK_FILE));
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &second), FLAP_OK);
  flap_run_lock_release(&second);
}
END_TEST

START_TEST(run_lock_file_left_behind_locks_nothing) {
  flap_run_lock lock;
  scratch_text(FLAP_RUN_LOCK_FILE, "process 1 on a host that was switched off, with a line longer than the next one's, "
                                   "so that what is left of it would be seen\n");
  ck_assert_int_eq(flap_run_lock_take(scratch_path(""), &lock), FLAP_OK);
  char text[256] = "";
  ck_assert_int_gt(pread(lock.fd, text, sizeof text - 1, 0), 0);
  ck_assert_ptr_null(strstr(text, "would be seen"));
  flap_run_lock_release(&lock);
}
END_TEST

/* Nobody is led to write into a file elsewhere. */
START_TEST(run_lock_link_is_refused) {
  flap_run_lock lock;
  ck_assert_int_eq(symlink("elsewhere", scratch_path(FLAP_RUN_LOCK_FILE)), 0);
  ck_assert_int_ne(flap_run_lock_take(scratch_path(""), &lock), FLAP_OK);
  ck_assert(!scratch_exists("elsewhere"));
  ck_assert_int_ne(flap_run_lock_take(scratch_path("no such folder"), &lock), FLAP_OK);
}
END_TEST

/* Returns how often it held the lock, or -1 when it was not alone. */
static int come_and_go(const char *folder, const char *witness) {
  int held = 0;
  for (int i = 0; i < 200; i++) {
    flap_run_lock lock;
    if (flap_run_lock_take(folder, &lock) != FLAP_OK)
      continue;
    const int fd = open(witness, O_CREAT | O_EXCL | O_WRONLY, 0600);
    if (fd < 0)
      return -1;
    close(fd);
    held++;
    if (unlink(witness) != 0)
      return -1;
    flap_run_lock_release(&lock);
  }
  return held;
}

START_TEST(run_lock_processes_that_compete_hold_it_one_at_a_time) {
  char folder[FLAP_PATH_MAX], witness[FLAP_PATH_MAX];
  (void)snprintf(folder, sizeof folder, "%s", scratch_path(""));
  (void)snprintf(witness, sizeof witness, "%s", scratch_path("witness"));
  enum { CHILDREN = 4 };
  for (int i = 0; i < CHILDREN; i++) {
    const pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
      const int held = come_and_go(folder, witness);
      _exit(held < 0 ? 1 : 0); /* one of them may have been unlucky all the time */
    }
  }
  for (int i = 0; i < CHILDREN; i++) {
    int status = 0;
    ck_assert_int_gt(wait(&status), 0);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), 0);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("run_lock");
  TCase *tests = tcase_create("run_lock");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_test(tests, run_lock_file_that_went_away_before_it_was_locked_is_not_taken);
  tcase_add_test(tests, run_lock_second_holder_is_refused_by_number);
  tcase_add_test(tests, run_lock_file_left_behind_locks_nothing);
  tcase_add_test(tests, run_lock_link_is_refused);
  tcase_add_test(tests, run_lock_processes_that_compete_hold_it_one_at_a_time);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
