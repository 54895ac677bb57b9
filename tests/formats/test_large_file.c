/* Large files: the same bytes past the page cache and through it, in any pieces, and when any call is refused.
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK FLAP_LARGE_FILE_ALIGN
#define PIECE (4 * BLOCK)
#define DATA_MAX (4 * PIECE + 123)
#define NAME "large"

static const flap_system *real;
static unsigned char data[DATA_MAX];
static unsigned char *memory; /* PIECE bytes */

static struct {
  unsigned writes, direct_writes, syncs, writes_after_sync;
  unsigned call, failing_call; /* of all kinds, from 1; 0: none */
  int os_error;
  bool refuses_direct; /* takes the flag, and no transfer */
  bool cannot_reserve, has_no_room;
  size_t short_bytes; /* a write moves no more; 0: all */
} disk;

static bool is_direct(int fd) {
  return (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
}

static bool is_failing(void) {
  if (++disk.call != disk.failing_call)
    return false;
  errno = disk.os_error;
  return true;
}

static int disk_open(int folder, const char *path, int flags, mode_t mode) {
  return is_failing() ? -1 : real->open(folder, path, flags, mode);
}

static int disk_close(int fd) {
  const bool failing = is_failing();
  const int result = real->close(fd);
  errno = failing ? disk.os_error : errno;
  return failing ? -1 : result;
}

static ssize_t disk_pwrite(int fd, const void *from, size_t bytes, off_t offset) {
  if (is_failing())
    return -1;
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
  /* Where the system itself is strict, this part of a direct write goes by another way. */
  const int flags = fcntl(fd, F_GETFL);
  ck_assert_int_eq(fcntl(fd, F_SETFL, flags & ~O_DIRECT), 0);
  const ssize_t written = real->pwrite(fd, from, disk.short_bytes, offset);
  ck_assert_int_eq(fcntl(fd, F_SETFL, flags), 0);
  return written;
}

static int disk_sync(int fd) {
  disk.syncs++;
  return is_failing() ? -1 : real->sync(fd);
}

static int disk_allocate(int fd, off_t bytes) {
  if (is_failing())
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
  memory = aligned_alloc(BLOCK, PIECE);
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
  const flap_file_piece piece = {piece_bytes > 0 ? memory : NULL, piece_bytes, NULL};
  FLAP_TRY(flap_large_file_create(&file, scratch_path(NAME), bytes, piece));
  const flap_status status = write_parts(&file, bytes, part);
  if (status != FLAP_OK)
    flap_large_file_abort(&file);
  return status;
}

static void holds(uint64_t bytes) {
  size_t found;
  char *text = scratch_read(NAME, &found);
  ck_assert_uint_eq(found, bytes);
  ck_assert(memcmp(text, data, bytes) == 0);
  free(text);
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
  ck_assert_uint_eq(disk.writes, 5);
  if (disk.direct_writes == 0)
    printf("no O_DIRECT where the scratch folder is\n");
  else
    ck_assert_uint_eq(disk.direct_writes, 4);
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

START_TEST(large_file_parts_of_a_piece_are_whole_blocks_or_none) {
  const flap_file_piece piece = {memory, PIECE, NULL};
  for (uint32_t count = 1; count <= 4; count++)
    for (uint32_t i = 0; i < count; i++) {
      const flap_file_piece part = flap_file_piece_part(piece, i, count);
      ck_assert_uint_eq(part.bytes, 4 / count * BLOCK);
      ck_assert_ptr_eq(part.memory, memory + i * part.bytes);
    }
  ck_assert_ptr_null(flap_file_piece_part(piece, 0, 5).memory);
  ck_assert_ptr_null(flap_file_piece_part((flap_file_piece){0}, 0, 1).memory);
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
  tcase_add_test(tests, large_file_parts_of_a_piece_are_whole_blocks_or_none);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
