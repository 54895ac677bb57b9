/* Room for files: taken, given back, and left to nobody when its process ends. */
#include "base/system.h"
#include "io/formats/large_file.h"
#include "io/formats/metrics.h"
#include "io/formats/room.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK ((uint64_t)4096)
#define OK(call) ck_assert_msg((call) == FLAP_OK, "%s", flap_error_message())

/* A file system of so many bytes: what fallocate took, ftruncate and close give back, and others may take. */
static const flap_system *real;
static struct {
  uint64_t left, held[64]; /* by descriptor */
  int allocate_error;      /* instead; 0: none */
  bool no_tmpfile, keeps_part;
  unsigned full_writes; /* so many find no room, whatever is left */
} disk;

static int disk_open(int folder, const char *path, int flags, mode_t mode) {
  if (disk.no_tmpfile && (flags & O_TMPFILE) == O_TMPFILE) {
    errno = EOPNOTSUPP;
    return -1;
  }
  return real->open(folder, path, flags, mode);
}

static int disk_close(int fd) {
  disk.left += disk.held[fd];
  disk.held[fd] = 0;
  return real->close(fd);
}

static int disk_allocate(int fd, off_t bytes) {
  const uint64_t more = (uint64_t)bytes > disk.held[fd] ? (uint64_t)bytes - disk.held[fd] : 0;
  errno = disk.allocate_error;
  if (disk.allocate_error != 0)
    return -1;
  if (more > disk.left) {
    if (disk.keeps_part) {
      disk.held[fd] += disk.left;
      disk.left = 0;
    }
    errno = ENOSPC;
    return -1;
  }
  disk.held[fd] += more;
  disk.left -= more;
  return real->allocate(fd, bytes);
}

static int disk_truncate(int fd, off_t bytes) {
  if ((uint64_t)bytes < disk.held[fd]) {
    disk.left += disk.held[fd] - (uint64_t)bytes;
    disk.held[fd] = (uint64_t)bytes;
  }
  return real->truncate(fd, bytes);
}

static ssize_t disk_write(int fd, const void *data, size_t bytes) {
  if (disk.full_writes == 0)
    return real->write(fd, data, bytes);
  disk.full_writes--;
  errno = ENOSPC;
  return -1;
}

static void setup(void) {
  static flap_system small;
  scratch_setup();
  memset(&disk, 0, sizeof disk);
  disk.left = 100 * BLOCK;
  real = flap_system_default();
  small = *real;
  small.open = disk_open;
  small.close = disk_close;
  small.allocate = disk_allocate;
  small.truncate = disk_truncate;
  small.write = disk_write;
  (void)flap_system_replace(&small);
}

static void teardown(void) {
  (void)flap_system_replace(NULL);
  scratch_teardown();
}

static uint64_t bytes_of(const flap_room *room) {
  struct stat about;
  ck_assert_int_eq(fstat(room->fd, &about), 0);
  return (uint64_t)about.st_size;
}

START_TEST(room_is_kept_and_given_back_in_blocks) {
  flap_room room;
  OK(flap_room_open(scratch_path(""), &room));
  ck_assert(!flap_room_give(&room, 1));
  OK(flap_room_keep(&room, 10 * BLOCK - 5, 0));
  ck_assert_uint_eq(disk.left, 90 * BLOCK);
  OK(flap_room_keep(&room, 3 * BLOCK, 0)); /* it has more */
  ck_assert(flap_room_give(&room, BLOCK + 1));
  ck_assert_uint_eq(disk.left, 92 * BLOCK);
  OK(flap_room_keep(&room, 15 * BLOCK, 5 * BLOCK));
  ck_assert_uint_eq(disk.left, 80 * BLOCK);
  flap_room_leave(&room, 30 * BLOCK);
  flap_room_leave(&room, 5 * BLOCK);
  ck_assert_uint_eq(disk.left, 95 * BLOCK);
  ck_assert_uint_eq(bytes_of(&room), 5 * BLOCK);
  ck_assert(flap_room_give(&room, 50 * BLOCK)); /* all of it */
  ck_assert(!flap_room_give(&room, 1));
  ck_assert_uint_eq(disk.left, 100 * BLOCK);
  ck_assert_uint_eq(scratch_count(), 0);
  flap_room_close(&room);
  flap_room_close(&room);
  ck_assert_uint_eq(scratch_count(), 0);
}
END_TEST

START_TEST(room_that_is_not_there_is_what_there_is) {
  flap_room room;
  disk.keeps_part = _i != 0;
  OK(flap_room_open(scratch_path(""), &room));
  OK(flap_room_keep(&room, 10 * BLOCK, 0));
  ck_assert_int_eq(flap_room_keep(&room, 101 * BLOCK, 0), FLAP_NO_SPACE);
  ck_assert_uint_eq(room.bytes, 100 * BLOCK); /* by what the system says, a 64th less than what was wanted */
  ck_assert_uint_eq(disk.left, 0);
  ck_assert_int_eq(flap_room_keep(&room, 900 * BLOCK, 0), FLAP_NO_SPACE); /* and it says that there is more */
  ck_assert_uint_eq(room.bytes, 100 * BLOCK);
  ck_assert_uint_eq(bytes_of(&room), 100 * BLOCK);
  OK(flap_room_keep(&room, 100 * BLOCK, BLOCK)); /* none to spare */
  ck_assert_uint_eq(room.bytes, 100 * BLOCK);
  flap_room_close(&room);
  ck_assert_uint_eq(disk.left, 100 * BLOCK);
}
END_TEST

START_TEST(room_where_none_can_be_kept_is_unsupported) {
  static const int os_errors[] = {EOPNOTSUPP, ENOSYS, EFBIG};
  flap_room room;
  OK(flap_room_open(scratch_path(""), &room));
  for (size_t i = 0; i < sizeof os_errors / sizeof *os_errors; i++) {
    disk.allocate_error = os_errors[i];
    ck_assert_int_eq(flap_room_keep(&room, BLOCK, 0), FLAP_UNSUPPORTED);
  }
  disk.allocate_error = EIO;
  ck_assert_int_eq(flap_room_keep(&room, BLOCK, 0), FLAP_IO);
  flap_room_close(&room);
  ck_assert_int_eq(flap_room_open(scratch_path("nowhere"), &room), FLAP_NOT_FOUND);
  OK(flap_room_keep(&room, BLOCK, 0));
  ck_assert(!flap_room_give(&room, 1) && !flap_room_give(NULL, 1));
}
END_TEST

/* What a process left that ended between making the file and taking its name is gone with the next. */
START_TEST(room_without_unnamed_files_leaves_no_name) {
  flap_room room;
  disk.no_tmpfile = true;
  scratch_write(FLAP_ROOM_FILE, "left", 4);
  OK(flap_room_open(scratch_path(""), &room));
  ck_assert_uint_eq(scratch_count(), 0);
  OK(flap_room_keep(&room, 2 * BLOCK, 0));
  ck_assert_uint_eq(disk.left, 98 * BLOCK);
  flap_room_close(&room);
}
END_TEST

/* Somebody else takes all that is left: files find their room all the same, and not a block more. */
START_TEST(room_is_there_for_large_files_when_others_took_the_rest) {
  static const unsigned char data[3 * 4096 + 7];
  flap_room room;
  flap_large_file file;
  OK(flap_room_open(scratch_path(""), &room));
  OK(flap_room_keep(&room, 8 * BLOCK, 0));
  disk.left = 0;
  for (int i = 0; i < 2; i++) {
    OK(flap_large_file_create(&file, scratch_path(i == 0 ? "a" : "b"), sizeof data, (flap_file_piece){.room = &room}));
    OK(flap_large_file_append(&file, data, sizeof data));
    OK(flap_large_file_commit(&file));
    disk.left = 0;
  }
  ck_assert_uint_eq(room.bytes, 0);
  ck_assert_int_eq(flap_large_file_create(&file, scratch_path("c"), BLOCK, (flap_file_piece){.room = &room}),
                   FLAP_NO_SPACE);
  ck_assert_uint_eq(scratch_count(), 2);
  flap_room_close(&room);
}
END_TEST

START_TEST(room_is_there_for_a_line_that_finds_none) {
  flap_room room;
  flap_metrics *metrics;
  OK(flap_room_open(scratch_path(""), &room));
  OK(flap_room_keep(&room, 10 * BLOCK, 0));
  OK(flap_metrics_open(scratch_path("metrics.jsonl"), -1, &metrics));
  flap_metrics_give_room(metrics, &room);
  for (unsigned i = 0; i < 3; i++) { /* 1 block, 1 and 2 and 4, and then 1 and the last */
    disk.full_writes = 1 + 2 * i;
    flap_metrics_begin_line(metrics);
    flap_metrics_add_integer(metrics, "step", i);
    const flap_status status = flap_metrics_end_line(metrics);
    ck_assert_int_eq(status, i < 2 ? FLAP_OK : FLAP_NO_SPACE);
    ck_assert_uint_eq(room.bytes, (i == 0 ? 9 : i == 1 ? 2 : 0) * BLOCK);
  }
  flap_metrics_close(metrics);
  char *text = scratch_read("metrics.jsonl", NULL);
  ck_assert_str_eq(text, "{\"step\": 0}\n{\"step\": 1}\n");
  free(text);
  flap_room_close(&room);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("room");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, room_is_kept_and_given_back_in_blocks);
  tcase_add_loop_test(tests, room_that_is_not_there_is_what_there_is, 0, 2);
  tcase_add_test(tests, room_where_none_can_be_kept_is_unsupported);
  tcase_add_test(tests, room_without_unnamed_files_leaves_no_name);
  tcase_add_test(tests, room_is_there_for_large_files_when_others_took_the_rest);
  tcase_add_test(tests, room_is_there_for_a_line_that_finds_none);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
