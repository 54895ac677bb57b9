/* Faults by countdown: each gives the status it should, once, to the right request, and nothing ever hangs. */
#include "tests/block/block_harness.h"

#include "io/block/block_internal.h"
#include "io/block/checksum.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define REQUEST_BYTES 131072u
#define COUNT 12u

static const uint64_t stripes[] = {30, 7, 13};

static void init(block_harness *harness, uint32_t disk_count) {
  harness_init(harness, FLAP_BLOCK_SIM, "/tmp", disk_count, stripes, 65536, 4 * MIB);
  harness->config.sim = (flap_block_sim){.seed = 3, .latency_ns = 20000, .split_probability = 0.3};
}

#define PERIOD 251u /* no power of two: what lies a block or a stripe away differs */

static void fill(unsigned char *data, uint32_t tag) {
  for (uint32_t i = 0; i < PERIOD; i++)
    data[i] = (unsigned char)(tag * 31 + i);
  for (uint32_t done = PERIOD; done < REQUEST_BYTES; done *= 2)
    memcpy(data + done, data, done < REQUEST_BYTES - done ? done : REQUEST_BYTES - done);
}

/* Requests of one kind over COUNT places, all in flight together. */
static void run_all(block_harness *harness, flap_block_op op, uint32_t tag, flap_block_request *requests) {
  for (uint32_t r = 0; r < COUNT; r++) {
    unsigned char *buffer = harness->memory + r * REQUEST_BYTES;
    requests[r] =
        (flap_block_request){.op = op, .offset = (uint64_t)r * REQUEST_BYTES, .buffer = buffer, .bytes = REQUEST_BYTES};
    if (op == FLAP_BLOCK_WRITE)
      fill(buffer, tag + r);
    else
      memset(buffer, 0, REQUEST_BYTES);
    flap_block_submit(harness->block, &requests[r]);
  }
  flap_block_flush(harness->block);
  for (uint32_t r = 0; r < COUNT; r++)
    (void)harness_wait(harness);
  ck_assert_ptr_null(flap_block_poll(harness->block));
}

static bool holds(const block_harness *harness, uint32_t r, uint32_t tag) {
  static unsigned char expected[REQUEST_BYTES];
  fill(expected, tag + r);
  return memcmp(harness->memory + r * REQUEST_BYTES, expected, REQUEST_BYTES) == 0;
}

static void check_statuses(const flap_block_request *requests, uint32_t failing, flap_status status, int os_error) {
  for (uint32_t r = 0; r < COUNT; r++) {
    ck_assert_int_eq(requests[r].status, r == failing ? status : FLAP_OK);
    ck_assert_int_eq(requests[r].os_error, r == failing ? os_error : 0);
  }
}

static uint32_t geometry_of(int i) {
  return i % 2 == 0 ? 1 : 3;
}

START_TEST(fault_read_error_reaches_the_request_that_it_hit) {
  uint32_t n = 1 + (uint32_t)_i / 2 % COUNT;
  block_harness harness;
  init(&harness, geometry_of(_i));
  harness.config.sim.fail_read_at = n;
  harness_open(&harness);
  flap_block_request requests[COUNT];
  run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
  check_statuses(requests, COUNT, FLAP_OK, 0);
  run_all(&harness, FLAP_BLOCK_READ, 1, requests);
  check_statuses(requests, n - 1, FLAP_IO, EIO);
  ck_assert_int_eq(flap_block_explain(harness.block, &requests[n - 1]), FLAP_IO);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), harness.folders[requests[n - 1].disk]));
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "reading 128 KiB"));
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "Input/output error"));
  for (uint32_t r = 0; r < COUNT; r++)
    ck_assert(r == n - 1 || holds(&harness, r, 1));
  run_all(&harness, FLAP_BLOCK_READ, 1, requests); /* fires once */
  check_statuses(requests, COUNT, FLAP_OK, 0);
  for (uint32_t r = 0; r < COUNT; r++)
    ck_assert(holds(&harness, r, 1));
  harness_close(&harness);
}
END_TEST

START_TEST(fault_write_error_and_full_disk_reach_the_request) {
  uint32_t n = 1 + (uint32_t)_i / 2 % COUNT;
  for (int full = 0; full < 2; full++) {
    block_harness harness;
    init(&harness, geometry_of(_i));
    if (full)
      harness.config.sim.full_write_at = n;
    else
      harness.config.sim.fail_write_at = n;
    harness_open(&harness);
    flap_block_request requests[COUNT];
    run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
    check_statuses(requests, n - 1, full ? FLAP_NO_SPACE : FLAP_IO, full ? ENOSPC : EIO);
    ck_assert_int_eq(flap_block_explain(harness.block, &requests[n - 1]), requests[n - 1].status);
    ck_assert_ptr_nonnull(strstr(flap_error_message(), full ? "free some space" : "dmesg"));
    run_all(&harness, FLAP_BLOCK_WRITE, 2, requests);
    check_statuses(requests, COUNT, FLAP_OK, 0);
    harness_close(&harness);
  }
}
END_TEST

static uint32_t count_flipped(const block_harness *harness, uint32_t request) {
  static unsigned char expected[REQUEST_BYTES];
  uint32_t flipped = 0;
  fill(expected, request + 1);
  if (memcmp(expected, harness->memory + request * REQUEST_BYTES, REQUEST_BYTES) == 0)
    return 0;
  for (uint32_t i = 0; i < REQUEST_BYTES; i++)
    flipped += (uint32_t)__builtin_popcount(expected[i] ^ harness->memory[request * REQUEST_BYTES + i]);
  return flipped;
}

START_TEST(fault_corrupt_read_flips_one_bit_and_the_checksum_sees_it) {
  uint32_t n = 1 + (uint32_t)_i / 2 % COUNT;
  block_harness harness;
  init(&harness, geometry_of(_i));
  harness.config.sim.corrupt_read_at = n;
  harness_open(&harness);
  flap_block_request requests[COUNT];
  run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
  uint64_t sum = flap_block_checksum(harness.memory + (n - 1) * REQUEST_BYTES, REQUEST_BYTES, 4, n, 9);
  run_all(&harness, FLAP_BLOCK_READ, 1, requests);
  check_statuses(requests, COUNT, FLAP_OK, 0);
  ck_assert_uint_eq(count_flipped(&harness, n - 1), 1);
  ck_assert_uint_ne(flap_block_checksum(harness.memory + (n - 1) * REQUEST_BYTES, REQUEST_BYTES, 4, n, 9), sum);
  for (uint32_t r = 0; r < COUNT; r++)
    ck_assert(r == n - 1 || holds(&harness, r, 1));
  harness_close(&harness);
}
END_TEST

START_TEST(fault_corrupt_write_flips_one_bit_of_what_is_stored) {
  const uint32_t n = 1 + (uint32_t)_i / 2 % COUNT;
  block_harness harness;
  init(&harness, geometry_of(_i));
  harness.config.sim.corrupt_write_at = n;
  harness_open(&harness);
  flap_block_request requests[COUNT];
  run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
  ck_assert_uint_eq(count_flipped(&harness, n - 1), 0); /* the caller's bytes are as they were */
  for (int again = 0; again < 2; again++) {
    memset(harness.memory, 0, COUNT * REQUEST_BYTES);
    run_all(&harness, FLAP_BLOCK_READ, 1, requests);
    check_statuses(requests, COUNT, FLAP_OK, 0);
    for (uint32_t r = 0; r < COUNT; r++)
      ck_assert_uint_eq(count_flipped(&harness, r), r == n - 1);
  }
  harness_close(&harness);
}
END_TEST

START_TEST(fault_lost_write_leaves_the_old_page) {
  uint32_t n = 1 + (uint32_t)_i / 2 % COUNT;
  block_harness harness;
  init(&harness, geometry_of(_i));
  harness.config.sim.lose_write_at = COUNT + n;
  harness_open(&harness);
  flap_block_request requests[COUNT];
  run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
  run_all(&harness, FLAP_BLOCK_WRITE, 100, requests);
  check_statuses(requests, COUNT, FLAP_OK, 0);
  run_all(&harness, FLAP_BLOCK_READ, 0, requests);
  for (uint32_t r = 0; r < COUNT; r++)
    ck_assert(holds(&harness, r, r == n - 1 ? 1 : 100));
  harness_close(&harness);
}
END_TEST

/* A file that is shorter than it should be, as after a damaged file system: a read meets its end. */
START_TEST(fault_real_end_of_file_is_an_error_not_a_hang) {
  block_harness harness;
  init(&harness, 3);
  harness.config.backend = _i == 0 ? FLAP_BLOCK_URING : FLAP_BLOCK_THREADS;
  harness_open(&harness);
  flap_block_request requests[COUNT];
  run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
  check_statuses(requests, COUNT, FLAP_OK, 0);
  for (uint32_t d = 0; d < 3; d++)
    ck_assert_int_eq(ftruncate(harness.block->files[d].fd, 3 * FLAP_BLOCK_ALIGN), 0);
  run_all(&harness, FLAP_BLOCK_READ, 1, requests);
  uint32_t failed = 0;
  for (uint32_t r = 0; r < COUNT; r++) {
    failed += requests[r].status == FLAP_IO && requests[r].os_error == EIO;
    ck_assert(requests[r].status == FLAP_OK || requests[r].status == FLAP_IO);
  }
  ck_assert_uint_eq(failed, COUNT); /* 128 KiB requests over 12 KiB files */
  harness_close(&harness);
}
END_TEST

/* A descriptor that no longer allows what is asked. */
START_TEST(fault_real_system_error_is_reported) {
  block_harness harness;
  init(&harness, 1);
  harness.config.backend = FLAP_BLOCK_THREADS;
  harness_open(&harness);
  int read_only = open("/dev/null", O_RDONLY | O_CLOEXEC);
  ck_assert_int_ge(read_only, 0);
  ck_assert_int_ge(dup3(read_only, harness.block->files[0].fd, O_CLOEXEC), 0);
  close(read_only);
  flap_block_request requests[COUNT];
  run_all(&harness, FLAP_BLOCK_WRITE, 1, requests);
  for (uint32_t r = 0; r < COUNT; r++) {
    ck_assert_int_eq(requests[r].status, FLAP_IO);
    ck_assert_int_eq(requests[r].os_error, EBADF);
  }
  harness_close(&harness);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("faults");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, fault_read_error_reaches_the_request_that_it_hit, 0, 2 * COUNT);
  tcase_add_loop_test(tests, fault_write_error_and_full_disk_reach_the_request, 0, 2 * COUNT);
  tcase_add_loop_test(tests, fault_corrupt_read_flips_one_bit_and_the_checksum_sees_it, 0, 2 * COUNT);
  tcase_add_loop_test(tests, fault_corrupt_write_flips_one_bit_of_what_is_stored, 0, 2 * COUNT);
  tcase_add_loop_test(tests, fault_lost_write_leaves_the_old_page, 0, 2 * COUNT);
  tcase_add_loop_test(tests, fault_real_end_of_file_is_an_error_not_a_hang, 0, 2);
  tcase_add_test(tests, fault_real_system_error_is_reported);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
