/* The disk measurement: it gives rates, leaves nothing, and refuses nonsense. How fast is no matter here. */
#include "tests/block/block_harness.h"

#include "io/block/measure.h"

#include <check.h>
#include <linux/magic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

START_TEST(measure_rates_are_finite_and_nothing_is_left) {
  const flap_block_backend backends[] = {FLAP_BLOCK_AUTO, FLAP_BLOCK_URING, FLAP_BLOCK_THREADS, FLAP_BLOCK_SIM};
  char folder[] = "/tmp/flap-test-XXXXXX";
  ck_assert_ptr_nonnull(mkdtemp(folder));
  flap_block_rates rates = {0};
  flap_status status = flap_block_measure_rates(folder, 24 * MIB, 65536, 4, 0, backends[_i], &rates);
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
  ck_assert(isfinite(rates.read_bytes) && rates.read_bytes > 1e6);
  ck_assert(isfinite(rates.write_bytes) && rates.write_bytes > 1e6);
  ck_assert(isfinite(rates.both_bytes) && rates.both_bytes > 1e6);
  ck_assert_int_eq(rmdir(folder), 0);
}
END_TEST

static uint64_t pause_ns, submits;
uint64_t __real_flap_units_now_ns(void);
uint64_t __wrap_flap_units_now_ns(void);
uint64_t __wrap_flap_units_now_ns(void) { /* at each look at the clock so much more has gone by */
  static uint64_t paused_ns;
  return __real_flap_units_now_ns() + __atomic_add_fetch(&paused_ns, pause_ns, __ATOMIC_RELAXED);
}
void __real_flap_block_submit(flap_block *block, flap_block_request *request);
void __wrap_flap_block_submit(flap_block *block, flap_block_request *request);
void __wrap_flap_block_submit(flap_block *block, flap_block_request *request) {
  submits++;
  __real_flap_block_submit(block, request);
}

START_TEST(measure_ends_in_the_time_that_it_has) {
  flap_block_rates rates = {0};
  submits = 0; /* the same process may have run others before */
  ck_assert_int_eq(flap_block_measure_rates("/tmp", 24 * MIB, 65536, 4, 1e6, FLAP_BLOCK_SIM, &rates), FLAP_OK);
  ck_assert_uint_eq(submits, 4 * 24 * MIB / 65536);
  submits = 0;
  pause_ns = 10000000;
  ck_assert_int_eq(flap_block_measure_rates("/tmp", 24 * MIB, 65536, 4, 0.4, FLAP_BLOCK_SIM, &rates), FLAP_OK);
  pause_ns = 0;
  ck_assert_uint_le(submits, 4 * 16); /* of each pass the first ones, and ten */
  ck_assert(rates.read_bytes > 0 && rates.write_bytes > 0 && rates.both_bytes > 0);
}
END_TEST

START_TEST(measure_extent_smaller_than_the_queue_works) {
  flap_block_rates rates = {0};
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, MIB, 0, 0, FLAP_BLOCK_AUTO, &rates), FLAP_OK);
  ck_assert(rates.read_bytes > 0 && rates.write_bytes > 0 && rates.both_bytes > 0);
}
END_TEST

START_TEST(measure_nonsense_is_refused) {
  flap_block_rates rates = {1, 1, 1};
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, 0, 4, 0, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, 1000, 4, 0, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/tmp", 3 * MIB, 2 * MIB, 4, 0, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/tmp", MIB, MIB, 5000, 0, FLAP_BLOCK_AUTO, &rates), FLAP_INVALID);
  ck_assert_int_eq(flap_block_measure_rates("/nowhere", MIB, MIB, 4, 0, FLAP_BLOCK_AUTO, &rates), FLAP_NOT_FOUND);
  ck_assert(rates.read_bytes == 0 && rates.write_bytes == 0 && rates.both_bytes == 0);
}
END_TEST

static flap_block_probe_config probe_config(flap_block_backend backend, const char *first, const char *second) {
  return (flap_block_probe_config){.backend = backend,
                                   .disk_count = second ? 2 : 1,
                                   .paths = {first, second},
                                   .bytes = 16 * MIB,
                                   .depth_max = 16,
                                   .flight_bytes = 4 * MIB};
}

/* Extents of 16 MiB and rounds of some hundred requests: every slot goes round its extent, so overlaps would be found
 * by the simulated disk, whose requests end out of order. */
START_TEST(probe_measures_every_mix_size_and_depth) {
  const flap_block_backend backends[] = {FLAP_BLOCK_AUTO, FLAP_BLOCK_URING, FLAP_BLOCK_THREADS, FLAP_BLOCK_SIM};
  const struct {
    uint32_t request_bytes, depth;
  } cells[] = {{16384, 1}, {16384, 16}, {262144, 3}, {262144, 16}, {FLAP_BLOCK_REQUEST_BYTES_MAX, 1}};
  const flap_rate_effort effort = {.rounds = 2, .round_ns = 2000000};
  char folder[] = "/tmp/flap-test-XXXXXX";
  ck_assert_ptr_nonnull(mkdtemp(folder));
  const flap_block_probe_config config = probe_config(backends[_i / 2], folder, _i % 2 ? folder : NULL);
  flap_block_probe *probe = NULL;
  ck_assert_msg(flap_block_probe_open(&config, &probe) == FLAP_OK, "%s", flap_error_message());
  ck_assert(flap_block_probe_describe(probe)[0] != '\0');
  for (size_t i = 0; i < sizeof cells / sizeof *cells; i++)
    for (int mix = FLAP_BLOCK_MIX_READ; mix <= FLAP_BLOCK_MIX_BOTH; mix++) {
      flap_rate rate = {0};
      ck_assert_msg(flap_block_probe_measure(probe, (flap_block_mix)mix, cells[i].request_bytes, cells[i].depth,
                                             &effort, &rate) == FLAP_OK,
                    "%s", flap_error_message());
      ck_assert(rate.rounds >= 1 && isfinite(rate.median) && rate.median > 1e4);
    }
  flap_block_probe_close(probe);
  ck_assert_int_eq(rmdir(folder), 0);
}
END_TEST

START_TEST(probe_nonsense_is_refused) {
  const flap_rate_effort effort = {.rounds = 1, .round_ns = 1000000};
  flap_block_probe *probe = NULL;
  flap_rate rate = {.rounds = 1};
  flap_block_probe_config config = probe_config(FLAP_BLOCK_AUTO, "/nowhere", NULL);
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_NOT_FOUND);
  config.paths[0] = "/tmp";
  config.bytes = 9 * MIB;
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_INVALID);
  config.bytes = 16 * MIB;
  config.depth_max = 65;
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_INVALID);
  config.depth_max = 16;
  config.disk_count = 0;
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_INVALID);
  config.disk_count = 1;
  config.flight_bytes = MIB;
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_INVALID);
  ck_assert_ptr_null(probe);
  config.flight_bytes = 16 * MIB;
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_OK);
  ck_assert_int_eq(flap_block_probe_measure(probe, FLAP_BLOCK_MIX_READ, 5000, 1, &effort, &rate), FLAP_INVALID);
  ck_assert_int_eq(flap_block_probe_measure(probe, FLAP_BLOCK_MIX_READ, 65536, 17, &effort, &rate), FLAP_INVALID);
  ck_assert_int_eq(flap_block_probe_measure(probe, FLAP_BLOCK_MIX_READ, 65536, 0, &effort, &rate), FLAP_INVALID);
  /* It fits in flight, but two halves of the extent do not hold it. */
  ck_assert_int_eq(flap_block_probe_measure(probe, FLAP_BLOCK_MIX_BOTH, MIB, 9, &effort, &rate), FLAP_INVALID);
  ck_assert_uint_eq(rate.rounds, 0);
  flap_block_probe_close(probe);
}
END_TEST

START_TEST(probe_of_a_folder_in_memory_is_refused) {
  struct statfs info;
  flap_block_probe *probe = NULL;
  const flap_block_probe_config config = probe_config(FLAP_BLOCK_AUTO, "/dev/shm", NULL);
  if (statfs("/dev/shm", &info) != 0 || info.f_type != TMPFS_MAGIC)
    return; /* nothing here is a tmpfs */
  ck_assert_int_eq(flap_block_probe_open(&config, &probe), FLAP_INVALID);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "/dev/shm: the folder is in memory"));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("measure");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, measure_rates_are_finite_and_nothing_is_left, 0, 4);
  tcase_add_test(tests, measure_extent_smaller_than_the_queue_works);
  tcase_add_test(tests, measure_ends_in_the_time_that_it_has);
  tcase_add_test(tests, measure_nonsense_is_refused);
  tcase_add_loop_test(tests, probe_measures_every_mix_size_and_depth, 0, 8);
  tcase_add_test(tests, probe_nonsense_is_refused);
  tcase_add_test(tests, probe_of_a_folder_in_memory_is_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
