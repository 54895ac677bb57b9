/* Files beside the linear space: written and read as the disk is, named while the block goes on, and closed. */
#include "tests/block/block_harness.h"

#include "base/system.h"
#include "io/block/block.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB ((uint64_t)1 << 10)
#define BYTES (256 * KIB)

static const uint64_t stripes[] = {16};
static block_harness harness;
static const flap_block_backend backends[] = {FLAP_BLOCK_URING, FLAP_BLOCK_THREADS};

static void open_harness(int backend) {
  harness_init(&harness, backends[backend], "/tmp", 1, stripes, 65536, 2 * 64 * KIB);
  harness_open(&harness);
}

static void path_of(const char *name, char path_out[128]) {
  snprintf(path_out, 128, "%s/%s", harness.folders[0], name);
}

/* 64 KiB from `offset` of the file on are `value`. */
static void put(uint32_t file, uint64_t offset, int value) {
  memset(harness.memory, value, 64 * KIB);
  flap_block_request request = {
      .op = FLAP_BLOCK_WRITE, .file = file, .offset = offset, .buffer = harness.memory, .bytes = 64 * KIB};
  harness_run(&harness, &request);
  ck_assert_int_eq(request.status, FLAP_OK);
}

static void expect(uint32_t file, uint64_t offset, int value) {
  unsigned char *there = harness.memory + 64 * KIB;
  flap_block_request request = {
      .op = FLAP_BLOCK_READ, .file = file, .offset = offset, .buffer = there, .bytes = 64 * KIB};
  harness_run(&harness, &request);
  ck_assert_int_eq(request.status, FLAP_OK);
  for (uint64_t i = 0; i < 64 * KIB; i++)
    ck_assert_msg(there[i] == value, "file %u, byte %llu", file, (unsigned long long)(offset + i));
}

static void expect_named(const char *path, uint64_t offset, int value) {
  unsigned char *there = harness.memory;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat about;
  ck_assert_int_ge(fd, 0);
  ck_assert_int_eq(fstat(fd, &about), 0);
  ck_assert_int_eq(about.st_size, BYTES);
  ck_assert_int_eq(about.st_mode & 0777, 0600);
  ck_assert_int_eq(pread(fd, there, 64 * KIB, (off_t)offset), 64 * KIB);
  ck_assert_int_eq(there[0], value);
  ck_assert_int_eq(memcmp(there, there + 1, 64 * KIB - 1), 0);
  close(fd);
}

START_TEST(files_are_apart_and_keep_what_a_name_has) {
  char path[128];
  open_harness(_i);
  for (uint32_t file = 1; file <= FLAP_BLOCK_FILES_MAX; file++)
    ck_assert_int_eq(flap_block_file_open(harness.block, file, harness.folders[0], BYTES), FLAP_OK);
  for (uint32_t file = 0; file <= FLAP_BLOCK_FILES_MAX; file++)
    put(file, 64 * KIB, 10 + (int)file);
  for (uint32_t file = 0; file <= FLAP_BLOCK_FILES_MAX; file++)
    expect(file, 64 * KIB, 10 + (int)file);
  ck_assert(harness_folder_is_empty(harness.folders[0]));
  path_of("named", path);
  ck_assert_int_eq(flap_block_file_link(harness.block, 2, path), FLAP_OK);
  /* Another file has the number from here on. */
  flap_block_file_close(harness.block, 2);
  ck_assert_int_eq(flap_block_file_open(harness.block, 2, harness.folders[0], BYTES), FLAP_OK);
  put(2, 64 * KIB, 99);
  expect(2, 64 * KIB, 99);
  expect(1, 64 * KIB, 11);
  expect_named(path, 64 * KIB, 12);
  ck_assert_int_eq(unlink(path), 0);
  harness_close(&harness);
}
END_TEST

START_TEST(files_leave_no_descriptor_and_no_space) {
  open_harness(_i);
  const uint32_t before = harness_count_descriptors();
  for (int i = 0; i < 50; i++) {
    ck_assert_int_eq(flap_block_file_open(harness.block, 1 + (uint32_t)i % 4, harness.folders[0], BYTES), FLAP_OK);
    put(1 + (uint32_t)i % 4, 0, i);
    flap_block_file_close(harness.block, 1 + (uint32_t)i % 4);
    flap_block_file_close(harness.block, 1 + (uint32_t)i % 4);
  }
  ck_assert_uint_eq(harness_count_descriptors(), before);
  harness_close(&harness);
}
END_TEST

START_TEST(refusals_name_the_folder_or_the_name) {
  char path[128];
  open_harness(_i);
  ck_assert_int_eq(flap_block_file_open(harness.block, 1, "/nowhere/at/all", BYTES), FLAP_NOT_FOUND);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "/nowhere/at/all"));
  ck_assert_int_eq(flap_block_file_open(harness.block, 1, harness.folders[0], (uint64_t)1 << 50), FLAP_NO_SPACE);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), harness.folders[0]));
  ck_assert_int_eq(flap_block_file_open(harness.block, 1, harness.folders[0], (uint64_t)1 << 43), FLAP_NO_SPACE);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), harness.folders[0]));
  ck_assert_int_eq(flap_block_file_open(harness.block, 1, harness.folders[0], BYTES), FLAP_OK);
  path_of("there", path);
  ck_assert_int_eq(flap_block_file_link(harness.block, 1, path), FLAP_OK);
  ck_assert_int_ne(flap_block_file_link(harness.block, 1, path), FLAP_OK); /* it is there already */
  ck_assert_ptr_nonnull(strstr(flap_error_message(), path));
  ck_assert_int_eq(unlink(path), 0);
  harness_close(&harness);
}
END_TEST

/* ---- where it works ---------------------------------------------------------------------------------------------- */

static int link_error;

static int refuse_link(int fd, const char *path) {
  (void)fd, (void)path;
  errno = link_error;
  return -1;
}

static int open_without_unnamed(int folder, const char *path, int flags, mode_t mode) {
  if ((flags & O_TMPFILE) != O_TMPFILE)
    return flap_system_default()->open(folder, path, flags, mode);
  errno = EOPNOTSUPP;
  return -1;
}

START_TEST(linking_is_tried_before_it_is_counted_on) {
  char folder[] = "/tmp/flap-link-XXXXXX", elsewhere[] = "/dev/shm/flap-link-XXXXXX", left[128];
  flap_system calls = *flap_system_default();
  struct stat here, there;
  ck_assert_ptr_nonnull(mkdtemp(folder));
  ck_assert(flap_block_can_link(folder, folder));
  ck_assert(harness_folder_is_empty(folder));
  ck_assert(!flap_block_can_link(folder, "/nowhere/at/all"));
  ck_assert(!flap_block_can_link("/nowhere/at/all", folder));
  /* What a process left that ended amid this is taken away. */
  snprintf(left, sizeof left, "%s/" FLAP_BLOCK_TRIAL_FILE, folder);
  close(open(left, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  ck_assert(flap_block_can_link(folder, folder));
  ck_assert(harness_folder_is_empty(folder));
  if (mkdtemp(elsewhere) != NULL && stat(folder, &here) == 0 && stat(elsewhere, &there) == 0) {
    ck_assert(flap_block_can_link(elsewhere, folder) == (here.st_dev == there.st_dev));
    rmdir(elsewhere);
  }
  calls.link = refuse_link;
  link_error = EPERM;
  (void)flap_system_replace(&calls);
  ck_assert(!flap_block_can_link(folder, folder));
  calls = *flap_system_default();
  calls.open = open_without_unnamed;
  ck_assert(!flap_block_can_link(folder, folder));
  (void)flap_system_replace(NULL);
  ck_assert_int_eq(rmdir(folder), 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block files");
  TCase *tcase = tcase_create("files");
  tcase_set_timeout(tcase, 60);
  tcase_add_loop_test(tcase, files_are_apart_and_keep_what_a_name_has, 0, 2);
  tcase_add_loop_test(tcase, files_leave_no_descriptor_and_no_space, 0, 2);
  tcase_add_loop_test(tcase, refusals_name_the_folder_or_the_name, 0, 2);
  tcase_add_test(tcase, linking_is_tried_before_it_is_counted_on);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
