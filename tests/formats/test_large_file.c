/* Large files: the same bytes past the page cache and through it, in any pieces, written by whatever thread, and when
 * any call is refused.
 *
 * The calls go through a table that behaves as file systems on disks do, whatever the scratch folder lies on: a
 * transfer with O_DIRECT that is not aligned in memory, place and length is refused.
 */
#include "base/system.h"
#include "io/formats/large_file.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK FLAP_WRITE_BEHIND_ALIGN
#define PIECE (4 * BLOCK) /* what is written at a time */
#define PIECES FLAP_WRITE_BEHIND_BLOCKS
#define MEMORY (PIECES * PIECE)
#define DATA_PIECES (PIECES + 3)
#define DATA_MAX (DATA_PIECES * PIECE + 123)
#define NAME "large"

static const flap_system *real;
static unsigned char data[DATA_MAX];
static unsigned char *memory; /* MEMORY bytes */
static flap_write_behind behind;

/* Writes come from several threads. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static struct {
  unsigned writes, direct_writes, syncs, writes_after_sync;
  unsigned call, failing_call; /* of all kinds, from 1; 0: none */
  int os_error;
  bool refuses_direct; /* takes the flag, and no transfer */
  bool cannot_reserve, has_no_room;
  size_t short_bytes;                         /* a write moves no more; 0: all */
  bool held_up;                               /* writes wait */
  const flap_write_target *held_until_failed; /* for this to fail */
  unsigned waiting, closed_while_waiting;
  int bad_file; /* whose writes fail; 0: none */
} disk;

static bool is_direct(int fd) {
  return (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
}

/* With the lock. */
static bool is_failing(void) {
  if (++disk.call != disk.failing_call)
    return false;
  errno = disk.os_error;
  return true;
}

static bool fails(void) {
  pthread_mutex_lock(&lock);
  const bool failing = is_failing();
  pthread_mutex_unlock(&lock);
  return failing;
}

static int disk_open(int folder, const char *path, int flags, mode_t mode) {
  return fails() ? -1 : real->open(folder, path, flags, mode);
}

static int close_it(int fd) {
  const bool failing = is_failing();
  const int result = real->close(fd);
  disk.closed_while_waiting += disk.waiting;
  errno = failing ? disk.os_error : errno;
  return failing ? -1 : result;
}

static int disk_close(int fd) {
  pthread_mutex_lock(&lock);
  const int result = close_it(fd);
  pthread_mutex_unlock(&lock);
  return result;
}

static bool has_failed(const flap_write_target *target) {
  pthread_mutex_lock(&behind.lock);
  const bool failed = target->os_error != 0;
  pthread_mutex_unlock(&behind.lock);
  return failed;
}

static void wait_if_held_up(void) {
  disk.waiting++;
  pthread_cond_broadcast(&moved);
  while (disk.held_up)
    pthread_cond_wait(&moved, &lock);
  const flap_write_target *until = disk.held_until_failed;
  pthread_mutex_unlock(&lock);
  while (until != NULL && !has_failed(until))
    (void)sched_yield();
  pthread_mutex_lock(&lock);
  disk.waiting--;
}

static void hold_up(bool held_up) {
  pthread_mutex_lock(&lock);
  disk.held_up = held_up;
  pthread_cond_broadcast(&moved);
  pthread_mutex_unlock(&lock);
}

static void wait_for_waiting(unsigned count) {
  pthread_mutex_lock(&lock);
  while (disk.waiting < count)
    pthread_cond_wait(&moved, &lock);
  pthread_mutex_unlock(&lock);
}

/* Where the system itself is strict, a part of a direct write goes by another way. */
static ssize_t write_cached(int fd, const void *from, size_t bytes, off_t offset) {
  char path[64];
  (void)snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  const int other = real->open(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
  ck_assert_int_ge(other, 0);
  const ssize_t written = real->pwrite(other, from, bytes, offset);
  ck_assert_int_eq(real->close(other), 0);
  return written;
}

static ssize_t write_it(int fd, const void *from, size_t bytes, off_t offset) {
  wait_if_held_up();
  if (is_failing())
    return -1;
  if (fd == disk.bad_file) {
    errno = disk.os_error;
    return -1;
  }
  const bool direct = is_direct(fd), aligned = ((uintptr_t)from | bytes | (uintptr_t)offset) % BLOCK == 0;
  if (direct && (disk.refuses_direct || !aligned)) {
    errno = EINVAL;
    return -1;
  }
  disk.writes++;
  disk.direct_writes += direct;
  disk.writes_after_sync += disk.syncs > 0;
  if (disk.short_bytes == 0 || bytes <= disk.short_bytes)
    return real->pwrite(fd, from, bytes, offset);
  return write_cached(fd, from, disk.short_bytes, offset);
}

static ssize_t disk_pwrite(int fd, const void *from, size_t bytes, off_t offset) {
  pthread_mutex_lock(&lock);
  const ssize_t written = write_it(fd, from, bytes, offset);
  pthread_mutex_unlock(&lock);
  return written;
}

static int disk_sync(int fd) {
  pthread_mutex_lock(&lock);
  disk.syncs++;
  pthread_mutex_unlock(&lock);
  return fails() ? -1 : real->sync(fd);
}

static int disk_allocate(int fd, off_t bytes) {
  if (fails())
    return -1;
  errno = disk.has_no_room ? ENOSPC : EOPNOTSUPP;
  return disk.has_no_room || disk.cannot_reserve ? -1 : real->allocate(fd, bytes);
}

static void setup(void) {
  static flap_system strict;
  scratch_setup();
  memset(&disk, 0, sizeof disk);
  real = flap_system_default();
  strict = *real;
  strict.open = disk_open;
  strict.close = disk_close;
  strict.pwrite = disk_pwrite;
  strict.sync = disk_sync;
  strict.allocate = disk_allocate;
  memory = aligned_alloc(BLOCK, MEMORY);
  ck_assert_ptr_nonnull(memory);
  for (size_t i = 0; i < DATA_MAX; i++)
    data[i] = (unsigned char)(i * 31 + (i >> 9));
  (void)flap_system_replace(&strict);
}

static void teardown(void) {
  (void)flap_system_replace(NULL);
  free(memory);
  scratch_teardown();
}

static flap_status write_parts(flap_large_file *file, uint64_t bytes, uint64_t part) {
  for (uint64_t done = 0; done < bytes; done += part)
    FLAP_TRY(flap_large_file_append(file, data + done, bytes - done < part ? bytes - done : part));
  return flap_large_file_commit(file);
}

static flap_status write_file(uint64_t bytes, uint64_t part, uint64_t piece_bytes) {
  flap_large_file file;
  ck_assert_int_eq(flap_write_behind_open(memory, PIECES * piece_bytes, &behind), FLAP_OK);
  flap_status status = flap_large_file_create(&file, scratch_path(NAME), bytes, (flap_file_piece){.behind = &behind});
  if (status == FLAP_OK) {
    status = write_parts(&file, bytes, part);
    if (status != FLAP_OK)
      flap_large_file_abort(&file);
  }
  flap_write_behind_close(&behind);
  return status;
}

static void file_holds(const char *name, uint64_t bytes) {
  size_t found;
  char *text = scratch_read(name, &found);
  ck_assert_uint_eq(found, bytes);
  ck_assert(memcmp(text, data, bytes) == 0);
  free(text);
}

static void holds(uint64_t bytes) {
  file_holds(NAME, bytes);
}

static void write_and_compare(uint64_t bytes, uint64_t part, uint64_t piece_bytes) {
  ck_assert_msg(write_file(bytes, part, piece_bytes) == FLAP_OK, "%s", flap_error_message());
  holds(bytes);
}

START_TEST(large_file_of_any_size_in_any_parts_has_these_bytes) {
  static const uint64_t sizes[] = {0,         1,     BLOCK - 1,     BLOCK,    BLOCK + 1,
                                   PIECE - 1, PIECE, PIECE + BLOCK, DATA_MAX, 3 * PIECE + BLOCK + 8};
  static const uint64_t parts[] = {100, BLOCK, BLOCK + 8, PIECE, DATA_MAX};
  static const uint64_t pieces[] = {0, BLOCK, PIECE};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (size_t j = 0; j < sizeof parts / sizeof *parts; j++)
      for (size_t k = 0; k < sizeof pieces / sizeof *pieces; k++)
        write_and_compare(sizes[i], parts[j], pieces[k]);
  ck_assert_uint_eq(disk.syncs, 150);
}
END_TEST

/* All but the last write, of what is less than a block. */
START_TEST(large_file_with_a_piece_goes_past_the_cache) {
  write_and_compare(DATA_MAX, 1000, PIECE);
  ck_assert_uint_eq(disk.writes, DATA_PIECES + 1);
  if (disk.direct_writes == 0)
    printf("no O_DIRECT where the scratch folder is\n");
  else
    ck_assert_uint_eq(disk.direct_writes, DATA_PIECES);
  ck_assert_uint_eq(disk.syncs, 1);
  disk.direct_writes = 0;
  write_and_compare(DATA_MAX, 1000, 0);
  ck_assert_uint_eq(disk.direct_writes, 0);
}
END_TEST

START_TEST(large_file_whose_direct_writes_are_refused_goes_through_the_cache) {
  disk.refuses_direct = true;
  write_and_compare(DATA_MAX, 1000, PIECE);
  ck_assert_uint_eq(disk.direct_writes, 0);
}
END_TEST

START_TEST(large_file_is_whole_after_short_writes) {
  static const size_t lengths[] = {1, 1000, BLOCK, BLOCK + 512, 2 * BLOCK};
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
    disk.short_bytes = lengths[i];
    write_and_compare(DATA_MAX, 5000, PIECE);
  }
}
END_TEST

START_TEST(large_file_where_space_cannot_be_reserved_is_written_all_the_same) {
  disk.cannot_reserve = true;
  write_and_compare(DATA_MAX, 1000, PIECE);
  write_and_compare(DATA_MAX, 1000, 0);
}
END_TEST

START_TEST(large_file_without_room_is_refused_before_the_first_byte) {
  disk.has_no_room = true;
  ck_assert_int_eq(write_file(DATA_MAX, 1000, PIECE), FLAP_NO_SPACE);
  ck_assert(scratch_error_has(scratch_path(NAME)));
  ck_assert_uint_eq(disk.writes, 0);
  ck_assert_uint_eq(scratch_count(), 0);
}
END_TEST

/* EINVAL of a direct write means another way, and only there. */
START_TEST(large_file_names_itself_when_any_call_fails) {
  static const int os_errors[] = {EIO, ENOSPC, EINVAL};
  write_and_compare(DATA_MAX, PIECE, PIECE);
  const unsigned calls = disk.call, direct = disk.direct_writes;
  for (size_t i = 0; i < sizeof os_errors / sizeof *os_errors; i++)
    for (unsigned call = 1; call <= calls; call++) {
      memset(&disk, 0, sizeof disk);
      disk.failing_call = call;
      disk.os_error = os_errors[i];
      const flap_status status = write_file(DATA_MAX, PIECE, PIECE);
      const bool another_way = os_errors[i] == EINVAL && call > 2 && call <= 2 + direct;
      ck_assert_uint_le(disk.syncs, 1);
      ck_assert_uint_eq(disk.writes_after_sync, 0);
      ck_assert_msg((status == FLAP_OK) == another_way, "call %u, %d: %d", call, os_errors[i], status);
      if (another_way) {
        holds(DATA_MAX);
        continue;
      }
      ck_assert(os_errors[i] != ENOSPC || status == FLAP_NO_SPACE);
      ck_assert(scratch_error_has(scratch_path(NAME)));
      ck_assert(call == 1 || !scratch_exists(NAME));
    }
}
END_TEST

/* ---- files beside one another ---------------------------------------------------------------------------- */

static void create(flap_large_file *file, const char *name) {
  const flap_file_piece piece = {.behind = &behind};
  ck_assert_int_eq(flap_large_file_create(file, scratch_path(name), DATA_MAX, piece), FLAP_OK);
}

static void open_behind(void) {
  ck_assert_int_eq(flap_write_behind_open(memory, MEMORY, &behind), FLAP_OK);
}

/* As many blocks as there are, while none of them comes to the disk; the next bytes would wait. */
START_TEST(large_file_is_filled_while_its_writes_are_under_way) {
  flap_large_file file;
  open_behind();
  hold_up(true);
  create(&file, NAME);
  ck_assert_int_eq(flap_large_file_append(&file, data, MEMORY), FLAP_OK);
  ck_assert_uint_eq(disk.writes, 0);
  wait_for_waiting(FLAP_WRITE_BEHIND_THREADS);
  hold_up(false);
  ck_assert_int_eq(flap_large_file_append(&file, data + MEMORY, DATA_MAX - MEMORY), FLAP_OK);
  ck_assert_int_eq(flap_large_file_commit(&file), FLAP_OK);
  flap_write_behind_close(&behind);
  holds(DATA_MAX);
}
END_TEST

/* Where all blocks are under way and fail, whoever waits for one is told. */
START_TEST(large_file_tells_of_a_write_that_failed_behind) {
  flap_large_file file;
  open_behind();
  hold_up(true);
  create(&file, NAME);
  ck_assert_int_eq(flap_large_file_append(&file, data, MEMORY), FLAP_OK);
  wait_for_waiting(FLAP_WRITE_BEHIND_THREADS);
  disk.bad_file = file.target.fd;
  disk.os_error = ENOSPC;
  hold_up(false);
  flap_status status = FLAP_OK;
  for (int i = 0; i < 2 && status == FLAP_OK; i++) /* a block may have come back before the failure */
    status = flap_large_file_append(&file, data, MEMORY);
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert(scratch_error_has(scratch_path(NAME)));
  flap_large_file_abort(&file);
  flap_write_behind_close(&behind);
  ck_assert_uint_eq(disk.writes + disk.syncs, 0);
  ck_assert_uint_eq(scratch_count(), 0);
}
END_TEST

/* What is at the disk is waited for, and what is queued is dropped. */
START_TEST(large_file_is_removed_with_writes_under_way) {
  flap_large_file file;
  open_behind();
  create(&file, NAME);
  disk.held_until_failed = &file.target;
  ck_assert_int_eq(flap_large_file_append(&file, data, MEMORY), FLAP_OK);
  wait_for_waiting(FLAP_WRITE_BEHIND_THREADS);
  flap_large_file_abort(&file);
  ck_assert_uint_eq(disk.writes, FLAP_WRITE_BEHIND_THREADS);
  ck_assert_uint_eq(disk.closed_while_waiting, 0);
  ck_assert_uint_eq(scratch_count(), 0);
  flap_write_behind_close(&behind);
}
END_TEST

static const char *name_of(size_t file) {
  static const char *const names[] = {"0", "1", "2", "3", "4", "5", "6", "7"};
  return names[file];
}

/* In turns, a little more than half a block at a time: all hold some, and those that found no seat need no blocks. */
START_TEST(large_files_share_blocks_and_more_files_than_these_go_through_the_cache) {
  flap_large_file files[FLAP_WRITE_BEHIND_FILES + 2];
  const size_t count = sizeof files / sizeof *files, part = PIECE / 2 + 100;
  open_behind();
  for (size_t i = 0; i < count; i++) {
    create(&files[i], name_of(i));
    ck_assert(is_direct(files[i].target.fd) <= (i < FLAP_WRITE_BEHIND_FILES));
    ck_assert((files[i].behind != NULL) == (i < FLAP_WRITE_BEHIND_FILES));
  }
  for (uint64_t done = 0; done < DATA_MAX; done += part)
    for (size_t i = 0; i < count; i++)
      ck_assert_int_eq(flap_large_file_append(&files[i], data + done, DATA_MAX - done < part ? DATA_MAX - done : part),
                       FLAP_OK);
  for (size_t i = 0; i < count; i++)
    ck_assert_int_eq(flap_large_file_commit(&files[i]), FLAP_OK);
  flap_write_behind_close(&behind);
  for (size_t i = 0; i < count; i++)
    file_holds(name_of(i), DATA_MAX);
}
END_TEST

START_TEST(large_file_that_fails_takes_no_other_with_it) {
  flap_large_file good, bad;
  open_behind();
  create(&good, "good");
  create(&bad, "bad");
  disk.bad_file = bad.target.fd;
  disk.os_error = EIO;
  ck_assert_int_eq(flap_large_file_append(&bad, data, PIECE), FLAP_OK);
  ck_assert_int_eq(flap_large_file_append(&good, data, DATA_MAX), FLAP_OK);
  ck_assert_int_eq(flap_large_file_commit(&good), FLAP_OK);
  const flap_status status = flap_large_file_commit(&bad);
  ck_assert_int_ne(status, FLAP_OK);
  ck_assert(scratch_error_has(scratch_path("bad")));
  flap_large_file_abort(&bad);
  flap_write_behind_close(&behind);
  ck_assert_uint_eq(disk.syncs, 1);
  file_holds("good", DATA_MAX);
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("large_file");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, large_file_of_any_size_in_any_parts_has_these_bytes);
  tcase_add_test(tests, large_file_with_a_piece_goes_past_the_cache);
  tcase_add_test(tests, large_file_whose_direct_writes_are_refused_goes_through_the_cache);
  tcase_add_test(tests, large_file_is_whole_after_short_writes);
  tcase_add_test(tests, large_file_where_space_cannot_be_reserved_is_written_all_the_same);
  tcase_add_test(tests, large_file_without_room_is_refused_before_the_first_byte);
  tcase_add_test(tests, large_file_names_itself_when_any_call_fails);
  tcase_add_test(tests, large_file_is_filled_while_its_writes_are_under_way);
  tcase_add_test(tests, large_file_tells_of_a_write_that_failed_behind);
  tcase_add_test(tests, large_file_is_removed_with_writes_under_way);
  tcase_add_test(tests, large_files_share_blocks_and_more_files_than_these_go_through_the_cache);
  tcase_add_test(tests, large_file_that_fails_takes_no_other_with_it);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
