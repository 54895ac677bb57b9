/* System calls by the table: what is replaced is called, signals are outlived, and what interrupts for ever ends. */
#include "base/system.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static flap_system table;
static int interrupts; /* before a call gets through */
static int calls;

static ssize_t interrupted_write(int fd, const void *data, size_t bytes) {
  calls++;
  if (interrupts-- > 0) {
    errno = EINTR;
    return -1;
  }
  return flap_system_default()->write(fd, data, bytes);
}

static int failing_sync(int fd) {
  (void)fd;
  calls++;
  errno = EIO;
  return -1;
}

static int interrupted_close(int fd) {
  calls++;
  (void)flap_system_default()->close(fd);
  errno = EINTR;
  return -1;
}

static void setup(void) {
  table = *flap_system_default();
  table.write = interrupted_write;
  table.sync = failing_sync;
  table.close = interrupted_close;
  calls = interrupts = 0;
  (void)flap_system_replace(&table);
}

static void teardown(void) {
  ck_assert_ptr_eq(flap_system_replace(NULL), &table);
}

static int open_scratch(char path[64]) {
  strcpy(path, "/tmp/flap-system-XXXXXX");
  const int fd = flap_system_mkostemp(path, O_CLOEXEC);
  ck_assert_int_ge(fd, 0);
  return fd;
}

/* Other programs, and tests beside this one, would find none for a moment. */
START_TEST(system_space_that_is_not_there_is_not_taken_for_a_moment) {
  char path[64];
  struct statvfs system;
  struct stat file;
  const int fd = open_scratch(path);
  ck_assert_int_eq(fstatvfs(fd, &system), 0);
  const off_t more = (off_t)(system.f_blocks * system.f_frsize) + ((off_t)1 << 20);
  ck_assert_int_eq(flap_system_fallocate(fd, more), -1);
  ck_assert_int_eq(errno, ENOSPC);
  ck_assert_int_eq(fstat(fd, &file), 0);
  ck_assert_int_eq(file.st_size, 0);
  ck_assert_int_eq(file.st_blocks, 0); /* ext4 would keep what it found */
  ck_assert_int_eq(flap_system_fallocate(fd, 8192), 0);
  ck_assert_int_eq(flap_system_fallocate(fd, 16384), 0);
  ck_assert_int_eq(fstat(fd, &file), 0);
  ck_assert_int_eq(file.st_size, 16384);
  ck_assert_int_eq(close(fd), 0);
  ck_assert_int_eq(unlink(path), 0);
}
END_TEST

START_TEST(system_interrupted_call_is_made_again) {
  char path[64], byte = 0;
  const int fd = open_scratch(path);
  interrupts = 3;
  ck_assert_int_eq(flap_system_write(fd, "x", 1), 1);
  ck_assert_int_eq(calls, 4);
  ck_assert_int_eq(flap_system_pread(fd, &byte, 1, 0), 1);
  ck_assert_int_eq(byte, 'x');
  (void)close(fd);
  ck_assert_int_eq(flap_system_unlink(path), 0);
}
END_TEST

START_TEST(system_interrupted_for_ever_is_an_error) {
  interrupts = 10 * FLAP_SYSTEM_TRIES_MAX;
  ck_assert_int_eq(flap_system_write(STDOUT_FILENO, "x", 1), -1);
  ck_assert_int_eq(errno, EINTR);
  ck_assert_int_eq(calls, FLAP_SYSTEM_TRIES_MAX);
}
END_TEST

START_TEST(system_failed_sync_is_not_made_again) {
  ck_assert_int_eq(flap_system_fsync(STDOUT_FILENO), -1);
  ck_assert_int_eq(errno, EIO);
  ck_assert_int_eq(calls, 1);
}
END_TEST

START_TEST(system_interrupted_close_has_closed) {
  char path[64];
  const int fd = open_scratch(path);
  ck_assert_int_eq(flap_system_close(fd), 0);
  ck_assert_int_eq(calls, 1);
  ck_assert_int_eq(fcntl(fd, F_GETFD), -1);
  ck_assert_int_eq(flap_system_unlink(path), 0);
}
END_TEST

START_TEST(system_one_file_under_two_names_is_the_same) {
  char path[64], other[64], name[80];
  close(open_scratch(path));
  close(open_scratch(other));
  (void)snprintf(name, sizeof name, "%s.link", path);
  ck_assert_int_eq(symlink(path, name), 0);
  ck_assert(flap_system_is_same(path, name));
  ck_assert(flap_system_is_same("/tmp", "/tmp/."));
  ck_assert(!flap_system_is_same(path, other));
  unlink(path);
  ck_assert(!flap_system_is_same(path, name)); /* neither is there */
  ck_assert(!flap_system_is_same("", ""));
  unlink(other);
  unlink(name);
}
END_TEST

START_TEST(system_new_files_have_names_of_their_own) {
  char first[64], second[64];
  struct stat about;
  const int a = open_scratch(first), b = open_scratch(second);
  ck_assert_str_ne(first, second);
  ck_assert_int_eq(flap_system_stat(first, &about), 0);
  ck_assert_uint_eq(about.st_mode & 0777, 0600);
  (void)close(a);
  (void)close(b);
  ck_assert_int_eq(flap_system_unlink(first), 0);
  ck_assert_int_eq(flap_system_unlink(second), 0);
  ck_assert_int_eq(flap_system_lstat(first, &about), -1);
  ck_assert_int_eq(errno, ENOENT);
}
END_TEST

static int interrupted_link(int fd, const char *path) {
  calls++;
  if (interrupts-- > 0) {
    errno = EINTR;
    return -1;
  }
  return flap_system_default()->link(fd, path);
}

/* A file without a name, with one byte. */
static int open_unnamed(void) {
  const int fd = flap_system_open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0)
    ck_assert_int_eq(flap_system_pwrite(fd, "x", 1, 0), 1);
  return fd;
}

/* A name that nothing has. */
static void free_name(char path[64]) {
  (void)close(open_scratch(path));
  ck_assert_int_eq(flap_system_unlink(path), 0);
}

START_TEST(system_link_names_an_open_file_that_has_no_name) {
  char path[64], other[64], byte = 0;
  struct stat about;
  const int fd = open_unnamed();
  free_name(path);
  free_name(other);
  if (fd >= 0) { /* /tmp may lie where there are no such files */
    ck_assert_int_eq(flap_system_link(fd, path), 0);
    ck_assert_int_eq(flap_system_link(fd, other), 0);
    ck_assert(flap_system_is_same(path, other));
    ck_assert_int_eq(flap_system_fstat(fd, &about), 0);
    ck_assert_uint_eq(about.st_nlink, 2);
    (void)close(fd);
    const int again = flap_system_open(path, O_RDONLY | O_CLOEXEC, 0);
    ck_assert_int_eq(flap_system_pread(again, &byte, 1, 0), 1);
    ck_assert_int_eq(byte, 'x');
    (void)close(again);
    ck_assert_int_eq(flap_system_unlink(path), 0);
    ck_assert_int_eq(flap_system_unlink(other), 0);
  }
}
END_TEST

START_TEST(system_link_that_cannot_be_leaves_what_is_there) {
  char path[64], below[80];
  struct stat here, elsewhere;
  const int fd = open_unnamed(), there = open_scratch(path);
  if (fd >= 0) {
    ck_assert_int_eq(flap_system_link(fd, path), -1);
    ck_assert_int_eq(errno, EEXIST);
    (void)snprintf(below, sizeof below, "%s/below", path);
    ck_assert_int_eq(flap_system_link(fd, below), -1);
    ck_assert_int_eq(errno, ENOTDIR);
    ck_assert_int_eq(flap_system_link(fd, "/tmp/no such folder/name"), -1);
    ck_assert_int_eq(errno, ENOENT);
    if (flap_system_stat("/tmp", &here) == 0 && flap_system_stat("/dev/shm", &elsewhere) == 0 &&
        here.st_dev != elsewhere.st_dev) {
      ck_assert_int_eq(flap_system_link(fd, "/dev/shm/flap-system-name"), -1);
      ck_assert_int_eq(errno, EXDEV);
    }
    (void)close(fd);
    ck_assert_int_eq(flap_system_link(fd, below), -1); /* of no open file */
  }
  (void)close(there);
  ck_assert_int_eq(flap_system_unlink(path), 0);
}
END_TEST

START_TEST(system_interrupted_link_is_made_again) {
  char path[64];
  const int fd = open_unnamed();
  free_name(path);
  table.link = interrupted_link;
  interrupts = 3;
  calls = 0;
  if (fd >= 0) {
    ck_assert_int_eq(flap_system_link(fd, path), 0);
    ck_assert_int_eq(calls, 4);
    (void)close(fd);
    ck_assert_int_eq(flap_system_unlink(path), 0);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("system");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, system_space_that_is_not_there_is_not_taken_for_a_moment);
  tcase_add_test(tests, system_interrupted_call_is_made_again);
  tcase_add_test(tests, system_interrupted_for_ever_is_an_error);
  tcase_add_test(tests, system_failed_sync_is_not_made_again);
  tcase_add_test(tests, system_interrupted_close_has_closed);
  tcase_add_test(tests, system_one_file_under_two_names_is_the_same);
  tcase_add_test(tests, system_new_files_have_names_of_their_own);
  tcase_add_test(tests, system_link_names_an_open_file_that_has_no_name);
  tcase_add_test(tests, system_link_that_cannot_be_leaves_what_is_there);
  tcase_add_test(tests, system_interrupted_link_is_made_again);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
