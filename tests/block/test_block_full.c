/* A full disk, on a real file system: a tmpfs of 8 MiB. Needs the right to mount; without it the program is skipped. */
#include "tests/block/block_harness.h"

#include "io/block/block_internal.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define SKIPPED 77

static int mount_small(char *path) {
  strcpy(path, "/tmp/flap-small-XXXXXX");
  if (mkdtemp(path) == NULL)
    return SKIPPED;
  if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
      mount("none", path, "tmpfs", 0, "size=8m") != 0) {
    rmdir(path);
    return SKIPPED;
  }
  return 0;
}

static void unmount_small(const char *path) {
  ck_assert_int_eq(umount(path), 0);
  ck_assert_int_eq(rmdir(path), 0);
}

/* The whole story on a real file system: refused when too large, then a hole filled by somebody else under a write. */
static int full_disk_story(void *context) {
  char path[64];
  if (mount_small(path) != 0)
    return SKIPPED;
  const uint64_t sizes[] = {64};
  block_harness harness;
  harness_init(&harness, *(flap_block_backend *)context, path, 1, sizes, 65536, 4 * MIB);
  flap_block_config config = harness.config;
  config.bytes = config.disks[0].bytes = 16 * MIB;
  harness_check_refused(&config, FLAP_NO_SPACE, "16.0 MiB wanted, 8.00 MiB free");
  harness_open(&harness);

  flap_block_request request = {.op = FLAP_BLOCK_WRITE, .buffer = harness.memory, .bytes = 1 * MIB};
  harness_run(&harness, &request);
  ck_assert_int_eq(request.status, FLAP_OK);
  int fd = harness.block->files[0].fd;
  ck_assert_int_eq(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2 * MIB, 2 * MIB), 0);
  int other = open(path, O_TMPFILE | O_RDWR, 0600);
  ck_assert_int_ge(other, 0);
  for (unsigned char block[65536]; write(other, memset(block, 1, sizeof block), sizeof block) > 0;)
    ;
  request.offset = 2 * MIB;
  harness_run(&harness, &request);
  ck_assert_int_eq(request.status, FLAP_NO_SPACE);
  ck_assert_int_eq(request.os_error, ENOSPC);
  ck_assert_int_eq(flap_block_explain(harness.block, &request), FLAP_NO_SPACE);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), harness.folders[0]));
  close(other);
  harness_run(&harness, &request); /* there is space again, and nothing was broken for good */
  ck_assert_int_eq(request.status, FLAP_OK);
  harness_close(&harness);
  unmount_small(path);
  return 0;
}

START_TEST(full_disk_is_told_and_survived) {
  flap_block_backend backend = _i == 0 ? FLAP_BLOCK_URING : FLAP_BLOCK_THREADS;
  ck_assert_int_eq(harness_in_child(full_disk_story, &backend), 0);
}
END_TEST

/* Asked in a child of its own, since the mount must not last; without Check, which asserts only inside tests. */
static bool can_mount(void) {
  pid_t child = fork();
  if (child == 0) {
    char path[64];
    if (mount_small(path) != 0)
      _exit(1);
    _exit(umount(path) != 0 || rmdir(path) != 0);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(void) {
  if (!can_mount())
    return SKIPPED;
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("full");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, full_disk_is_told_and_survived, 0, 2);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
