/* How a disk's file is made: space that cannot be reserved, file systems that lack what is asked for first, and limits.
 * The system's answers are made up by calls of our own in its table. */
#include "tests/block/block_harness.h"

#include "base/system.h"
#include "io/block/block_internal.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define BYTES ((uint64_t)1 << 20)

static int fallocate_errors[4]; /* one after the other; 0: the system's own answer */
static unsigned fallocate_calls;
static int unnamed_error; /* of open with O_TMPFILE */
static char folder[64];

static int allocate(int fd, off_t bytes) {
  ck_assert_uint_lt(fallocate_calls, 4);
  errno = fallocate_errors[fallocate_calls++];
  return errno != 0 ? -1 : flap_system_default()->allocate(fd, bytes);
}

static int open_file(int in_folder, const char *path, int flags, mode_t mode) {
  if ((flags & O_TMPFILE) == O_TMPFILE && unnamed_error != 0) {
    errno = unnamed_error;
    return -1;
  }
  return flap_system_default()->open(in_folder, path, flags, mode);
}

static void setup(void) {
  memset(fallocate_errors, 0, sizeof fallocate_errors);
  fallocate_calls = 0;
  unnamed_error = 0;
  static flap_system calls;
  calls = *flap_system_default();
  calls.allocate = allocate;
  calls.open = open_file;
  (void)flap_system_replace(&calls);
  strcpy(folder, "/tmp/flap-reserve-XXXXXX");
  ck_assert_ptr_nonnull(mkdtemp(folder));
  flap_error_clear();
}

static void teardown(void) {
  (void)flap_system_replace(NULL);
  ck_assert_int_eq(rmdir(folder), 0);
}

static void check_made(uint64_t bytes) {
  block_file file;
  struct stat about;
  ck_assert_msg(block_file_open(folder, bytes, &file) == FLAP_OK, "%s", flap_error_message());
  ck_assert_int_eq(fstat(file.fd, &about), 0);
  ck_assert_int_eq(about.st_size, (off_t)bytes);
  ck_assert_uint_eq(about.st_nlink, 0);
  ck_assert(harness_folder_is_empty(folder));
  block_file_close(&file);
  ck_assert_int_eq(file.fd, -1);
}

static void check_refused(flap_status status, const char *text) {
  block_file file;
  const uint32_t descriptors = harness_count_descriptors();
  ck_assert_msg(block_file_open(folder, BYTES, &file) == status, "%s", flap_error_message());
  ck_assert_int_eq(file.fd, -1);
  ck_assert_msg(strstr(flap_error_message(), text) && strstr(flap_error_message(), folder), "%s", flap_error_message());
  ck_assert_uint_eq(harness_count_descriptors(), descriptors);
}

START_TEST(reserve_without_support_takes_a_file_of_that_size) {
  static const int errors[] = {EOPNOTSUPP, ENOSYS};
  fallocate_errors[0] = errors[_i];
  check_made(BYTES);
  ck_assert_uint_eq(fallocate_calls, 1);
}
END_TEST

START_TEST(reserve_that_was_interrupted_is_tried_again) {
  fallocate_errors[0] = fallocate_errors[1] = EINTR;
  check_made(BYTES);
  ck_assert_uint_eq(fallocate_calls, 3);
}
END_TEST

START_TEST(reserve_that_fails_says_what_was_wanted) {
  fallocate_errors[0] = ENOSPC; /* others took it since the system was asked */
  fallocate_errors[1] = EDQUOT;
  fallocate_errors[2] = EIO;
  check_refused(FLAP_NO_SPACE, "1.00 MiB wanted");
  check_refused(FLAP_NO_SPACE, "free some space");
  check_refused(FLAP_IO, "cannot reserve 1.00 MiB: Input/output error");
}
END_TEST

START_TEST(file_systems_without_unnamed_files_get_one_that_loses_its_name) {
  static const int errors[] = {EOPNOTSUPP, EISDIR, ENOENT, EINVAL};
  unnamed_error = errors[_i];
  check_made(BYTES);
  check_made(0);
}
END_TEST

START_TEST(folder_in_which_no_file_can_be_made_is_named) {
  unnamed_error = EMFILE;
  check_refused(FLAP_IO, "cannot create a file in the folder: Too many open files");
}
END_TEST

START_TEST(limit_of_the_size_of_files_is_told_and_not_run_into) {
  struct rlimit limit;
  ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const struct rlimit smaller = {.rlim_cur = BYTES / 2, .rlim_max = limit.rlim_max};
  block_file file;
  ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &smaller), 0);
  const flap_status status = block_file_open(folder, BYTES, &file); /* Check writes a file at each of its asserts */
  const bool lifted = setrlimit(RLIMIT_FSIZE, &limit) == 0;
  ck_assert(lifted);
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert_msg(strstr(flap_error_message(), "512 KiB here; raise the limit (ulimit -f)") != NULL, "%s",
                flap_error_message());
  ck_assert_uint_eq(fallocate_calls, 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("reserve");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_loop_test(tests, reserve_without_support_takes_a_file_of_that_size, 0, 2);
  tcase_add_test(tests, reserve_that_was_interrupted_is_tried_again);
  tcase_add_test(tests, reserve_that_fails_says_what_was_wanted);
  tcase_add_loop_test(tests, file_systems_without_unnamed_files_get_one_that_loses_its_name, 0, 4);
  tcase_add_test(tests, folder_in_which_no_file_can_be_made_is_named);
  tcase_add_test(tests, limit_of_the_size_of_files_is_told_and_not_run_into);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
