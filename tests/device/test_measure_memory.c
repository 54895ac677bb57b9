/* What `flap bench` measures of memory: plausible rates for every pattern and way, and refusals. */
#include "kernels/device/measure_memory.h"

#include "base/units.h"

#include <check.h>
#include <string.h>

#define EFFORT \
  { .rounds = 2, .round_ns = 2000000 }

/* Whatever else the machine does, more than 100 kB/s are moved, and nothing yet moves 10 TB/s. */
static void check_rate(const flap_rate *rate, const char *name) {
  ck_assert_msg(rate->median > 1e5 && rate->median < 1e13, "%s: %g", name, rate->median);
  ck_assert(rate->least <= rate->median && rate->median <= rate->most && rate->rounds >= 1);
}

START_TEST(host_memory_has_a_rate_for_every_pattern) {
  flap_pool *pool = NULL;
  flap_rate rates[FLAP_MEMORY_PATTERNS];
  const flap_rate_effort effort = EFFORT;
  ck_assert_int_eq(flap_pool_open((uint32_t)_i + 1, &pool), FLAP_OK);
  ck_assert_int_eq(flap_measure_host_memory(pool, 8 * FLAP_MIB, FLAP_MEMORY_ALL, &effort, rates), FLAP_OK);
  for (int i = 0; i < FLAP_MEMORY_PATTERNS; i++)
    check_rate(&rates[i], "a pattern");
  ck_assert_int_eq(flap_measure_host_memory(pool, 8 * FLAP_MIB, 1u << FLAP_MEMORY_MODIFY, &effort, rates), FLAP_OK);
  for (int i = 0; i < FLAP_MEMORY_PATTERNS; i++)
    if (i == FLAP_MEMORY_MODIFY)
      check_rate(&rates[i], "the pattern");
    else
      ck_assert_uint_eq(rates[i].rounds, 0);
  flap_pool_close(pool);
}
END_TEST

START_TEST(host_bytes_are_beyond_caches_and_in_whole_pieces) {
  const uint64_t bytes = flap_measure_host_bytes();
  ck_assert_uint_ge(bytes, 64 * FLAP_MIB);
  ck_assert_uint_le(bytes, FLAP_GIB);
  ck_assert_uint_eq(bytes % (2 * FLAP_MIB), 0);
}
END_TEST

START_TEST(copies_have_a_rate_for_every_way_kind_and_size) {
  flap_copies_meter *meter = NULL;
  flap_rate pin, rate;
  const flap_rate_effort effort = EFFORT;
  ck_assert_msg(flap_copies_meter_open(FLAP_DEVICE_CPU, 8 * FLAP_MIB, 2 * FLAP_MIB, 4 * FLAP_MIB, &meter, &pin) ==
                    FLAP_OK,
                "%s", flap_error_message());
  ck_assert(strstr(flap_copies_meter_describe(meter), "cpu") != NULL);
  ck_assert_uint_eq(pin.rounds, 3);
  for (int way = FLAP_COPIES_H2D; way <= FLAP_COPIES_BOTH; way++)
    for (int pinned = 0; pinned < 2; pinned++)
      for (uint64_t bytes = 4096; bytes <= 2 * FLAP_MIB; bytes *= 512) {
        ck_assert_int_eq(flap_copies_measure(meter, (flap_copies_way)way, pinned != 0, bytes, &effort, &rate), FLAP_OK);
        check_rate(&rate, "a copy");
      }
  flap_copies_meter_close(meter);
}
END_TEST

START_TEST(copies_that_do_not_fit_are_refused) {
  flap_copies_meter *meter = NULL;
  flap_rate pin = {.rounds = 1};
  ck_assert_int_eq(flap_copies_meter_open(FLAP_DEVICE_CPU, FLAP_MIB, 2 * FLAP_MIB, 4 * FLAP_MIB, &meter, &pin),
                   FLAP_NO_MEMORY);
  ck_assert(strstr(flap_error_message(), "need 4.00 MiB, and 1.00 MiB are left") != NULL);
  ck_assert(meter == NULL && pin.rounds == 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("device");
  TCase *tests = tcase_create("measure_memory");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, host_memory_has_a_rate_for_every_pattern, 0, 2);
  tcase_add_test(tests, host_bytes_are_beyond_caches_and_in_whole_pieces);
  tcase_add_test(tests, copies_have_a_rate_for_every_way_kind_and_size);
  tcase_add_test(tests, copies_that_do_not_fit_are_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? 1 : 0;
}
