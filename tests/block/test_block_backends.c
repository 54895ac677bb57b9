/* Every backend does the same: random programs over one disk and three, real or simulated, give back what was written.
 */
#include "tests/block/block_harness.h"

#include <check.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

typedef struct geometry {
  uint32_t disk_count;
  uint64_t stripes[3];
  uint64_t stripe_bytes;
} geometry;

static const geometry geometries[] = {
    {1, {96}, 65536},         /* one disk */
    {3, {40, 40, 40}, 65536}, /* equal */
    {3, {50, 7, 33}, 65536},  /* unequal, in no small ratio */
    {3, {200, 1, 100}, 4096}, /* the smallest stripes: requests of many pieces */
    {3, {5, 3, 4}, 1 * MIB},  /* stripes larger than most requests */
};
enum { GEOMETRY_COUNT = sizeof geometries / sizeof geometries[0] };

static const flap_block_backend backends[] = {FLAP_BLOCK_URING, FLAP_BLOCK_THREADS, FLAP_BLOCK_SIM};
enum { BACKEND_COUNT = sizeof backends / sizeof backends[0] };

static void init(block_harness *harness, int backend, int g, const char *parent) {
  const geometry *shape = &geometries[g];
  harness_init(harness, backends[backend], parent, shape->disk_count, shape->stripes, shape->stripe_bytes, 24 * MIB);
}

START_TEST(block_random_program_reads_what_was_written) {
  int backend = _i % BACKEND_COUNT, g = _i / BACKEND_COUNT;
  block_harness harness;
  init(&harness, backend, g, "/tmp");
  harness.config.sim.seed = (uint64_t)_i;
  harness_open(&harness);
  for (uint32_t d = 0; d < harness.config.disk_count; d++)
    ck_assert(harness_folder_is_empty(harness.folders[d]));
  harness_random_program(&harness, (uint64_t)_i, 250);
  harness_close(&harness);
}
END_TEST

START_TEST(block_random_program_on_tmpfs) {
  if (access("/dev/shm", W_OK) != 0)
    return;
  block_harness harness;
  init(&harness, _i, 2, "/dev/shm");
  harness_open(&harness);
  harness_random_program(&harness, 77, 150);
  harness_close(&harness);
}
END_TEST

START_TEST(block_short_transfers_are_resumed) {
  block_harness harness;
  init(&harness, 2, _i % GEOMETRY_COUNT, "/tmp");
  harness.config.sim = (flap_block_sim){.seed = (uint64_t)_i,
                                        .latency_ns = _i % 2 == 0 ? 0 : 50000,
                                        .split_probability = _i < GEOMETRY_COUNT ? 0.5 : 1.0};
  harness_open(&harness);
  harness_random_program(&harness, (uint64_t)_i, 200);
  harness_close(&harness);
}
END_TEST

START_TEST(block_depth_of_one_works) {
  block_harness harness;
  init(&harness, _i, 2, "/tmp");
  harness.config.read_depth = harness.config.write_depth = 1;
  harness.config.sim.split_probability = 0.3;
  harness_open(&harness);
  harness_random_program(&harness, 5, 100);
  harness_close(&harness);
}
END_TEST

START_TEST(block_part_of_the_disks_is_enough) {
  block_harness harness;
  init(&harness, _i, 2, "/tmp");
  harness.config.bytes = 13 * 65536 + 3 * FLAP_BLOCK_ALIGN;
  harness_open(&harness);
  harness_random_program(&harness, 6, 100);
  harness_close(&harness);
}
END_TEST

START_TEST(block_close_waits_for_what_is_in_flight) {
  for (int round = 0; round < 8; round++) {
    block_harness harness;
    init(&harness, _i, 1, "/tmp");
    harness.config.sim.latency_ns = 2000000;
    harness_open(&harness);
    static flap_block_request requests[16];
    for (uint32_t r = 0; r < 16; r++) {
      requests[r] = (flap_block_request){.op = r % 2 == 0 ? FLAP_BLOCK_WRITE : FLAP_BLOCK_READ,
                                         .offset = r * 262144,
                                         .buffer = harness.memory + r * 262144,
                                         .bytes = 262144};
      flap_block_submit(harness.block, &requests[r]);
    }
    if (round % 2 == 0)
      flap_block_flush(harness.block);
    harness_close(&harness); /* frees the buffers: a late transfer would be seen by the sanitizers */
    for (uint32_t r = 0; r < 16; r++)
      ck_assert_uint_gt(requests[r].ended_ns, 0);
  }
}
END_TEST

START_TEST(block_descriptors_and_memory_are_given_back) {
  uint32_t before = 0;
  for (int round = 0; round < 10; round++) {
    block_harness harness;
    init(&harness, _i, 3, "/tmp");
    harness_open(&harness);
    harness_random_program(&harness, 9, 10);
    harness_close(&harness);
    if (round == 0)
      before = harness_count_descriptors();
  }
  ck_assert_uint_eq(harness_count_descriptors(), before);
}
END_TEST

START_TEST(block_nothing_is_allocated_after_open) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  block_harness harness;
  init(&harness, _i, 2, "/tmp");
  harness.config.sim.split_probability = 0.3;
  harness_open(&harness);
  flap_block_request request = {.op = FLAP_BLOCK_WRITE, .buffer = harness.memory, .bytes = 65536};
  harness_run(&harness, &request);
  struct mallinfo2 before = mallinfo2();
  for (uint32_t r = 0; r < 200; r++) {
    request.op = r % 2 == 0 ? FLAP_BLOCK_READ : FLAP_BLOCK_WRITE;
    request.offset = r * 16384;
    harness_run(&harness, &request);
    ck_assert_int_eq(request.status, FLAP_OK);
  }
  struct mallinfo2 after = mallinfo2();
  ck_assert_uint_eq(before.uordblks, after.uordblks);
  ck_assert_uint_eq(before.hblkhd, after.hblkhd);
  harness_close(&harness);
#endif
}
END_TEST

/* The ring registers memory in parts of 1 GiB; a transfer that lies across two is another kind of operation. */
START_TEST(block_buffers_across_registered_parts_work) {
  const uint64_t part = 1024 * MIB;
  block_harness harness;
  init(&harness, 0, 0, "/tmp");
  free(harness.memory);
  harness.memory = mmap(NULL, part + MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ck_assert_ptr_ne(harness.memory, MAP_FAILED);
  (void)madvise(harness.memory, part + MIB, MADV_HUGEPAGE);
  harness.config.memory = harness.memory;
  harness.config.memory_bytes = part + MIB;
  harness_open(&harness);
  unsigned char *across = harness.memory + part - 3 * FLAP_BLOCK_ALIGN;
  for (uint32_t i = 0; i < 131072; i++)
    across[i] = (unsigned char)(i % 253);
  flap_block_request request = {.op = FLAP_BLOCK_WRITE, .buffer = across, .bytes = 131072};
  harness_run(&harness, &request);
  ck_assert_int_eq(request.status, FLAP_OK);
  memset(across, 0, 131072);
  request.op = FLAP_BLOCK_READ;
  harness_run(&harness, &request);
  ck_assert_int_eq(request.status, FLAP_OK);
  /* And within the second part, from what was written by way of both. */
  flap_block_request second = {.op = FLAP_BLOCK_READ, .buffer = harness.memory + part + 524288, .bytes = 131072};
  harness_run(&harness, &second);
  ck_assert_int_eq(second.status, FLAP_OK);
  uint32_t wrong = 0;
  for (uint32_t i = 0; i < 131072; i++)
    wrong += across[i] != i % 253 || across[i] != harness.memory[part + 524288 + i];
  ck_assert_uint_eq(wrong, 0);
  unsigned char *mapping = harness.memory;
  harness.memory = NULL;
  harness_close(&harness);
  munmap(mapping, part + MIB);
}
END_TEST

START_TEST(block_describe_names_the_backend) {
  static const char *const names[] = {"io_uring, ", "threads, ", "sim"};
  block_harness harness;
  init(&harness, _i, 0, "/tmp");
  harness_open(&harness);
  ck_assert_int_eq(strncmp(flap_block_describe(harness.block), names[_i], strlen(names[_i])), 0);
  harness_close(&harness);
}
END_TEST

START_TEST(block_more_requests_than_promised_asserts) {
  block_harness harness;
  init(&harness, 2, 0, "/tmp");
  harness.config.requests_max = 2;
  harness_open(&harness);
  rmdir(harness.folders[0]); /* this test ends by a signal, so nobody cleans up after it */
  flap_block_request requests[3];
  for (int r = 0; r < 3; r++) {
    requests[r] = (flap_block_request){.buffer = harness.memory, .bytes = FLAP_BLOCK_ALIGN};
    flap_block_submit(harness.block, &requests[r]);
  }
}
END_TEST

START_TEST(block_wrong_requests_assert) {
  block_harness harness;
  init(&harness, 2, 0, "/tmp");
  harness_open(&harness);
  rmdir(harness.folders[0]);
  unsigned char *memory = harness.memory;
  uint64_t bytes = harness.config.bytes, memory_bytes = harness.config.memory_bytes;
  const flap_block_request wrong[] = {
      {.buffer = memory, .bytes = 0},
      {.buffer = memory, .bytes = 100},
      {.buffer = memory, .bytes = FLAP_BLOCK_REQUEST_BYTES_MAX + FLAP_BLOCK_ALIGN},
      {.buffer = memory, .bytes = FLAP_BLOCK_ALIGN, .offset = 512},
      {.buffer = memory, .bytes = FLAP_BLOCK_ALIGN, .offset = bytes},
      {.buffer = memory, .bytes = FLAP_BLOCK_ALIGN, .offset = UINT64_MAX - FLAP_BLOCK_ALIGN + 1},
      {.buffer = memory + 8, .bytes = FLAP_BLOCK_ALIGN},
      {.buffer = memory + memory_bytes, .bytes = FLAP_BLOCK_ALIGN},
      {.buffer = memory + memory_bytes - FLAP_BLOCK_ALIGN, .bytes = 2 * FLAP_BLOCK_ALIGN},
  };
  flap_block_request request = wrong[_i];
  flap_block_submit(harness.block, &request);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("backends");
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, block_random_program_reads_what_was_written, 0, BACKEND_COUNT * GEOMETRY_COUNT);
  tcase_add_loop_test(tests, block_random_program_on_tmpfs, 0, 2);
  tcase_add_loop_test(tests, block_short_transfers_are_resumed, 0, 2 * GEOMETRY_COUNT);
  tcase_add_loop_test(tests, block_depth_of_one_works, 0, BACKEND_COUNT);
  tcase_add_loop_test(tests, block_part_of_the_disks_is_enough, 0, BACKEND_COUNT);
  tcase_add_loop_test(tests, block_close_waits_for_what_is_in_flight, 0, BACKEND_COUNT);
  tcase_add_loop_test(tests, block_descriptors_and_memory_are_given_back, 0, BACKEND_COUNT);
  tcase_add_loop_test(tests, block_nothing_is_allocated_after_open, 0, BACKEND_COUNT);
  tcase_add_test(tests, block_buffers_across_registered_parts_work);
  tcase_add_loop_test(tests, block_describe_names_the_backend, 0, BACKEND_COUNT);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  if (srunner_fork_status(runner) == CK_FORK) {
    tcase_add_test_raise_signal(tests, block_more_requests_than_promised_asserts, 6);
    tcase_add_loop_test_raise_signal(tests, block_wrong_requests_assert, 6, 0, 9);
  }
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
