/* Opening: what is refused and how it is told, what is measured, and what happens where the system says no. */
#include "tests/block/block_harness.h"

#include "io/block/block_internal.h"

#include <check.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define SKIPPED 77

static const uint64_t stripes[] = {32, 16, 24};

START_TEST(open_bad_folders_are_named) {
  block_harness harness;
  harness_init(&harness, _i == 0 ? FLAP_BLOCK_URING : FLAP_BLOCK_THREADS, "/tmp", 3, stripes, 65536, 4 * MIB);
  flap_block_config config = harness.config;
  config.disks[2].path = "/nowhere/at/all";
  harness_check_refused(&config, FLAP_NOT_FOUND, "/nowhere/at/all: no such folder");
  config.disks[2].path = "/proc/self/status";
  harness_check_refused(&config, FLAP_INVALID, "/proc/self/status: not a folder");
  config.disks[2].path = "/proc";
  harness_check_refused(&config, FLAP_IO, "disk /proc: ");
  for (int d = 0; d < 3; d++)
    ck_assert(harness_folder_is_empty(harness.folders[d]));
  harness_close(&harness);
}
END_TEST

START_TEST(open_bad_configurations_are_refused) {
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_THREADS, "/tmp", 3, stripes, 65536, 4 * MIB);
  flap_block_config config = harness.config;
  config.bytes += 65536;
  harness_check_refused(&config, FLAP_BUDGET, "disk budget: 4.56 MiB needed, 4.50 MiB given");
  ck_assert_uint_eq(flap_block_measure(&config), 0);
  config = harness.config;
  config.bytes = 0;
  harness_check_refused(&config, FLAP_INVALID, "multiple");
  config = harness.config;
  config.bytes -= 1;
  harness_check_refused(&config, FLAP_INVALID, "multiple");
  config = harness.config;
  config.stripe_bytes = 1000;
  harness_check_refused(&config, FLAP_INVALID, "stripe");
  config = harness.config;
  config.disks[1].bytes += FLAP_BLOCK_ALIGN;
  harness_check_refused(&config, FLAP_INVALID, harness.folders[1]);
  config = harness.config;
  config.disk_count = 0;
  harness_check_refused(&config, FLAP_INVALID, "disks");
  config = harness.config;
  config.disk_count = FLAP_BLOCK_DISKS_MAX + 1;
  harness_check_refused(&config, FLAP_INVALID, "disks");
  config = harness.config;
  config.memory = NULL;
  harness_check_refused(&config, FLAP_INVALID, "memory");
  config = harness.config;
  config.requests_max = 0;
  harness_check_refused(&config, FLAP_INVALID, "requests");
  config = harness.config;
  config.read_depth = 100000;
  harness_check_refused(&config, FLAP_INVALID, "depth");
  config = harness.config;
  config.disks[0].path = NULL;
  harness_check_refused(&config, FLAP_INVALID, "path");
  harness_close(&harness);
}
END_TEST

START_TEST(open_more_than_the_disk_has_tells_both_sizes) {
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_AUTO, "/tmp", 1, stripes, 65536, 4 * MIB);
  flap_block_config config = harness.config;
  config.bytes = config.disks[0].bytes = (uint64_t)1 << 60;
  harness_check_refused(&config, FLAP_NO_SPACE, "1.00 EiB wanted");
  ck_assert_ptr_nonnull(strstr(flap_error_message(), " free;"));
  harness_close(&harness);
}
END_TEST

START_TEST(open_takes_what_was_measured) {
  for (int b = 0; b < 4; b++) {
    const flap_block_backend backends[] = {FLAP_BLOCK_AUTO, FLAP_BLOCK_URING, FLAP_BLOCK_THREADS, FLAP_BLOCK_SIM};
    block_harness harness;
    harness_init(&harness, backends[b], "/tmp", 3, stripes, 65536, 4 * MIB);
    uint64_t measured = flap_block_measure(&harness.config);
    ck_assert_uint_gt(measured, 0);
    harness_open(&harness);
    ck_assert_uint_eq(harness.block->arena.bytes_used, measured);
    ck_assert(harness.block->arena.sealed);
    harness_close(&harness);
  }
}
END_TEST

START_TEST(open_reserves_the_space_and_close_gives_it_back) {
  block_harness harness;
  const uint64_t large[] = {4096};
  harness_init(&harness, FLAP_BLOCK_AUTO, "/tmp", 1, large, 65536, 4 * MIB);
  harness_open(&harness);
  struct stat info;
  ck_assert_int_eq(fstat(harness.block->files[0].fd, &info), 0);
  ck_assert_int_eq(info.st_size, 256 * (int64_t)MIB);
  ck_assert_int_ge(info.st_blocks * 512, 256 * (int64_t)MIB);
  ck_assert_uint_eq(info.st_nlink, 0);
  harness_close(&harness);
}
END_TEST

START_TEST(space_tells_free_bytes_and_bad_folders) {
  uint64_t free_bytes = 0;
  ck_assert_int_eq(flap_block_space("/tmp", &free_bytes), FLAP_OK);
  ck_assert_uint_gt(free_bytes, 0);
  ck_assert_int_eq(flap_block_space("/nowhere/at/all", &free_bytes), FLAP_NOT_FOUND);
  ck_assert_uint_eq(free_bytes, 0);
}
END_TEST

static void check_child(int result) {
  if (result == SKIPPED) {
    fprintf(stderr, "skipped: needs rights that this user does not have\n");
    return;
  }
  ck_assert_int_eq(result, 0);
}

static int file_size_limit_story(void *context) {
  (void)context;
  struct rlimit limit = {1 * MIB, 1 * MIB};
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_AUTO, "/tmp", 1, stripes, 65536, 4 * MIB);
  ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
  harness_check_refused(&harness.config, FLAP_NO_SPACE, "ulimit -f");
  harness_close(&harness);
  return 0;
}

START_TEST(open_file_size_limit_is_told_and_does_not_kill) {
  check_child(harness_in_child(file_size_limit_story, NULL));
}
END_TEST

/* --- a system that refuses io_uring, or its buffers ----------------------------------------------------------- */

/* From here on, io_uring_setup gives EPERM, as in many containers. */
static bool forbid_uring(void) {
  struct sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog filter = {sizeof program / sizeof program[0], program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

/* What was logged since the file became stderr. */
static bool stderr_holds(FILE *file, const char *text) {
  char buffer[4096];
  rewind(file);
  size_t length = fread(buffer, 1, sizeof buffer - 1, file);
  buffer[length] = '\0';
  return strstr(buffer, text) != NULL;
}

static void forget_stderr(FILE *file) {
  rewind(file);
  ck_assert_int_eq(ftruncate(fileno(file), 0), 0);
}

static int refused_ring_story(void *context) {
  (void)context;
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_AUTO, "/tmp", 3, stripes, 65536, 24 * MIB);
  FILE *log = tmpfile();
  dup2(fileno(log), STDERR_FILENO);
  if (!forbid_uring())
    return SKIPPED;
  harness_open(&harness);
  ck_assert_int_eq(strncmp(flap_block_describe(harness.block), "threads, ", 9), 0);
  ck_assert(stderr_holds(log, "using threads instead"));
  harness_random_program(&harness, 1, 60);
  flap_block_config config = harness.config;
  config.backend = FLAP_BLOCK_URING;
  harness_check_refused(&config, FLAP_UNSUPPORTED, "io_uring is refused by the system: Operation not permitted");
  harness_close(&harness);
  fclose(log);
  return 0;
}

START_TEST(open_refused_ring_falls_back_to_threads) {
  check_child(harness_in_child(refused_ring_story, NULL));
}
END_TEST

static int refused_buffers_story(void *context) {
  (void)context;
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_URING, "/tmp", 1, stripes, 65536, 24 * MIB);
  FILE *log = tmpfile();
  dup2(fileno(log), STDERR_FILENO);
  /* A user without rights may not lock memory past the limit. */
  const uid_t nobody = 65534;
  struct rlimit limit = {65536, 65536};
  if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0)
    return SKIPPED;
  if (geteuid() == 0 && (chmod(harness.folders[0], 0777) != 0 || setresuid(nobody, nobody, 0) != 0))
    return SKIPPED;
  harness_open(&harness);
  ck_assert(stderr_holds(log, "cannot register 24.0 MiB of buffers"));
  ck_assert(stderr_holds(log, "ulimit -l 29696,")); /* these, a huge page at either end, and the ring */
  forget_stderr(log);
  flap_block_check_memory(&harness.config);
  ck_assert(stderr_holds(log, "cannot register 24.0 MiB of buffers"));
  ck_assert(stderr_holds(log, "ulimit -l 29696,"));
  harness_random_program(&harness, 1, 60);
  (void)!setresuid(0, 0, 0); /* to remove the folder */
  harness_close(&harness);
  fclose(log);
  return 0;
}

START_TEST(open_refused_buffers_are_used_unregistered) {
  check_child(harness_in_child(refused_buffers_story, NULL));
}
END_TEST

/* The limit that is named is one that does. */
static int checked_buffers_story(void *context) {
  (void)context;
  const flap_block_config config = {.backend = FLAP_BLOCK_AUTO, .memory_bytes = 2 * MIB};
  const uint64_t limits[] = {7 * MIB, 2 * MIB};
  FILE *log = tmpfile();
  dup2(fileno(log), STDERR_FILENO);
  for (int i = 0; i < 2; i++) {
    const struct rlimit limit = {limits[i], limits[i]};
    if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || (geteuid() == 0 && setresuid(65534, 65534, 0) != 0))
      return SKIPPED;
    flap_block_check_memory(&config);
    ck_assert(stderr_holds(log, "ulimit -l 7168,") == (i == 1));
  }
  fclose(log);
  return 0;
}

START_TEST(check_of_memory_says_what_is_too_little) {
  check_child(harness_in_child(checked_buffers_story, NULL));
}
END_TEST

static int read_only_story(void *context) {
  (void)context;
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_AUTO, "/tmp", 1, stripes, 65536, 4 * MIB);
  if (chmod(harness.folders[0], 0555) != 0 || (geteuid() == 0 && setresuid(65534, 65534, 0) != 0))
    return SKIPPED;
  harness_check_refused(&harness.config, FLAP_IO, "cannot be written");
  (void)!setresuid(0, 0, 0);
  harness_close(&harness);
  return 0;
}

START_TEST(open_read_only_folder_is_told) {
  check_child(harness_in_child(read_only_story, NULL));
}
END_TEST

/* Whoever plans may find room for other bytes meanwhile, and then fewer go to the disks. */
START_TEST(measure_does_not_depend_on_how_much_is_used) {
  block_harness harness;
  harness_init(&harness, FLAP_BLOCK_SIM, "/tmp", 3, (const uint64_t[]){997, 333, 1009}, 65536, 4 * MIB);
  const uint64_t all = flap_block_measure(&harness.config), bytes = harness.config.bytes;
  ck_assert_uint_gt(all, 0);
  for (harness.config.bytes = 4096; harness.config.bytes < bytes; harness.config.bytes += 61 * 65536)
    ck_assert_uint_eq(flap_block_measure(&harness.config), all);
  harness_close(&harness);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("open");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, open_bad_folders_are_named, 0, 2);
  tcase_add_test(tests, open_bad_configurations_are_refused);
  tcase_add_test(tests, open_more_than_the_disk_has_tells_both_sizes);
  tcase_add_test(tests, open_takes_what_was_measured);
  tcase_add_test(tests, open_reserves_the_space_and_close_gives_it_back);
  tcase_add_test(tests, space_tells_free_bytes_and_bad_folders);
  tcase_add_test(tests, open_file_size_limit_is_told_and_does_not_kill);
  tcase_add_test(tests, measure_does_not_depend_on_how_much_is_used);
  tcase_add_test(tests, open_refused_ring_falls_back_to_threads);
  tcase_add_test(tests, open_refused_buffers_are_used_unregistered);
  tcase_add_test(tests, check_of_memory_says_what_is_too_little);
  tcase_add_test(tests, open_read_only_folder_is_told);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
