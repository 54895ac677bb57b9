/* Random programs, wherever the regions live: the bytes are those of a plain run in memory, and the counts those of the
 * prediction. */
#include "tests/pager/pager_cases.h"

#include "pager/pager_internal.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define PACKABLE_BYTES (256u << 10)

static char folder[] = "/tmp/flap-pager-XXXXXX";

typedef enum snapshots { NO_SNAPSHOTS, DRAINED, KEPT } snapshots;

static void run_cases_with(uint32_t first, uint32_t count, case_homes homes, bool tight, flap_block_backend backend,
                           snapshots wanted) {
  static test_case c;
  uint64_t seed = case_first_seed();
  for (uint32_t i = first; i < first + count; i += CASE_STRIDE) {
    case_make(&c, seed + i, homes, tight, 2);
    if (wanted != NO_SNAPSHOTS)
      case_add_snapshots(&c);
    if (wanted == KEPT)
      case_add_sharing(&c, folder);
    case_set_disk(&c, backend, folder);
    c.config.disk.sim = (flap_block_sim){.latency_ns = 200000, .seed = seed + i, .split_probability = 0.1};
    flap_status status = case_run(&c);
    ck_assert_msg(status == FLAP_OK, "seed %llu: %s", (unsigned long long)c.seed, flap_error_message());
  }
  /* Something was compressed, where something could be: of the few cases under a sanitizer there may be none. */
  ck_assert_msg(case_pooled_bytes > 0 || case_packable_bytes < PACKABLE_BYTES, "the pool was never used");
  ck_assert_msg(case_saved_bytes > 0 || case_packable_bytes < PACKABLE_BYTES, "nothing saved of %llu bytes",
                (unsigned long long)case_packable_bytes);
  ck_assert(CASE_STRIDE > 1 || homes == HOMES_RAM || case_packable_bytes >= PACKABLE_BYTES);
}

static void run_cases(uint32_t first, uint32_t count, case_homes homes, bool tight, flap_block_backend backend) {
  run_cases_with(first, count, homes, tight, backend, NO_SNAPSHOTS);
}

START_TEST(programs_all_in_ram_equal_plain_run) {
  run_cases(0, 120, HOMES_RAM, false, FLAP_BLOCK_SIM);
}
END_TEST

START_TEST(programs_all_in_ram_fewest_slots_equal_plain_run) {
  run_cases(1000, 120, HOMES_RAM, true, FLAP_BLOCK_SIM);
}
END_TEST

START_TEST(programs_mixed_homes_simulated_disk_equal_plain_run) {
  run_cases(2000, 80, HOMES_MIXED, false, FLAP_BLOCK_SIM);
}
END_TEST

START_TEST(programs_mixed_homes_one_buffer_each_equal_plain_run) {
  run_cases(3000, 40, HOMES_MIXED, true, FLAP_BLOCK_SIM);
}
END_TEST

START_TEST(programs_all_on_disk_equal_plain_run) {
  run_cases(4000, 40, HOMES_DISK, false, FLAP_BLOCK_SIM);
}
END_TEST

START_TEST(programs_on_files_by_threads_equal_plain_run) {
  run_cases(5000, 40, HOMES_MIXED, false, FLAP_BLOCK_THREADS);
}
END_TEST

START_TEST(programs_on_files_by_default_backend_equal_plain_run) {
  run_cases(6000, 40, HOMES_MIXED, false, FLAP_BLOCK_AUTO);
}
END_TEST

/* Bytes, counts and sizes as without; and those of another thread are the ones of the point. */
START_TEST(snapshots_drained_beside_programs_equal_plain_run) {
  const uint64_t before = case_snapshots;
  run_cases_with(7000, 80, HOMES_RAM, true, FLAP_BLOCK_SIM, DRAINED);
  run_cases_with(8000, 80, HOMES_MIXED, true, FLAP_BLOCK_SIM, DRAINED);
  run_cases_with(9000, 40, HOMES_MIXED, false, FLAP_BLOCK_AUTO, DRAINED);
  run_cases_with(10000, 40, HOMES_DISK, true, FLAP_BLOCK_SIM, DRAINED);
  printf("%llu snapshots\n", (unsigned long long)(case_snapshots - before));
  ck_assert_uint_gt(case_snapshots - before, 200 / CASE_STRIDE);
}
END_TEST

/* Of what was kept nothing is written over, whatever the programs do afterwards, and none of it was read for that. */
START_TEST(snapshots_kept_on_disk_stay_as_they_were) {
  const uint64_t snapshots_before = case_snapshots;
  run_cases_with(11000, 120, HOMES_DISK, true, FLAP_BLOCK_THREADS, KEPT);
  run_cases_with(12000, 80, HOMES_MIXED, false, FLAP_BLOCK_AUTO, KEPT);
  run_cases_with(13000, 80, HOMES_MIXED, true, FLAP_BLOCK_THREADS, KEPT);
  printf("%llu snapshots, %llu pages kept, %llu snapshots without a file to go on in\n",
         (unsigned long long)(case_snapshots - snapshots_before), (unsigned long long)case_kept_pages,
         (unsigned long long)case_unkept);
  ck_assert_uint_gt(case_kept_pages, 2000 / CASE_STRIDE);
}
END_TEST

int main(void) {
  pager_full_checks = true;
  pager_small_bytes = 0; /* workers do all, where there are any */
  if (!mkdtemp(folder))
    return EXIT_FAILURE;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("programs");
  tcase_set_timeout(tcase, 300);
  tcase_add_test(tcase, programs_all_in_ram_equal_plain_run);
  tcase_add_test(tcase, programs_all_in_ram_fewest_slots_equal_plain_run);
  tcase_add_test(tcase, programs_mixed_homes_simulated_disk_equal_plain_run);
  tcase_add_test(tcase, programs_mixed_homes_one_buffer_each_equal_plain_run);
  tcase_add_test(tcase, programs_all_on_disk_equal_plain_run);
  tcase_add_test(tcase, programs_on_files_by_threads_equal_plain_run);
  tcase_add_test(tcase, programs_on_files_by_default_backend_equal_plain_run);
  tcase_add_test(tcase, snapshots_drained_beside_programs_equal_plain_run);
  tcase_add_test(tcase, snapshots_kept_on_disk_stay_as_they_were);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  rmdir(folder);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
