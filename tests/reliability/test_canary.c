/* A program that does not compare the checksums of pages must fail the test that turns a bit of a page over, and the
 * test that loses a write: otherwise these tests would see nothing. Its checkpoints are copies: where they share
 * extents they have its wrong checksums, which is seen without any fault. The canaries of fsync, and of extents that a
 * checkpoint shares and the run writes over, are in test_power_cut.c.
 */
#include "io/block/checksum.h"
#include "tests/reliability/fault_calls.h"
#include "tests/reliability/fault_case.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>

#define FAULTS 12u

uint64_t __real_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);
uint64_t __wrap_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);

static bool unchecked; /* every checksum is equal to every other */

uint64_t __wrap_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch) {
  return unchecked ? 1 : __real_flap_block_checksum(data, bytes, region, page, epoch);
}

static void before(const void *plan) {
  fault_calls_install(plan);
  unchecked = true;
}

static void after(void) {
  fault_calls_remove();
  unchecked = false; /* the digest of the results is made with it */
}

static bool is_right_status(const void *plan, flap_status status) {
  (void)plan;
  return status == FLAP_CORRUPT;
}

static const char *describe(const void *plan) {
  return fault_plan_write(plan);
}

static const case_hooks hooks = {.before = before,
                                 .after = after,
                                 .fired = fault_calls_fired,
                                 .is_right_status = is_right_status,
                                 .describe = describe};

static const uint64_t *counts; /* of the calls of a life */

/* How many of the faults are noticed; a bit that nobody reads again may pass, and a page that is written over. */
static unsigned notice(tiny_run *run, fault_call call, fault_kind kind) {
  case_totals totals = {0};
  unsigned noticed = 0;
  for (uint64_t i = 0; i < FAULTS && noticed == 0; i++)
    noticed += !case_run(run, &hooks,
                         &(fault_plan){.call = call, .kind = kind, .number = 1 + i * counts[call] / FAULTS}, &totals);
  return noticed;
}

START_TEST(canary_without_checksums_ends_with_other_bits) {
  tiny_run *run = case_open(TINY_COPIED);
  counts = fault_calls_of_life(run);
  ck_assert_ptr_nonnull(counts);
  printf("two complaints follow, and must:\n");
  const unsigned flips = notice(run, FAULT_CALL_EXTENT_READ, FAULT_FLIP);
  const unsigned losses = notice(run, FAULT_CALL_EXTENT_WRITE, FAULT_LOSE);
  case_close(run);
  ck_assert_msg(flips > 0, "a program without checksums passes, with a bit of a page turned over");
  ck_assert_msg(losses > 0, "a program without checksums passes, with a write lost");
}
END_TEST

int main(void) {
  Suite *suite = suite_create("reliability");
  TCase *tests = tcase_create("canary");
  tcase_set_timeout(tests, 0);
  tcase_add_test(tests, canary_without_checksums_ends_with_other_bits);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
