/* The quick measurement of the host: plausible, brief, and silent about what it does not measure. */
#include "kernels/device/measure_machine.h"

#include "base/units.h"

#include <check.h>
#include <stdio.h>

START_TEST(measured_host_fills_memory_rates_alone) {
  flap_pool *pool = NULL;
  ck_assert_int_eq(flap_pool_open(2, &pool), FLAP_OK);
  flap_machine before, machine;
  flap_device_default_machine(FLAP_DEVICE_CUDA, &before);
  machine = before;
  machine.h2d_bytes = machine.d2h_bytes = machine.host_bytes = machine.device_bytes = 0;
  uint64_t begun_ns = flap_units_now_ns();
  ck_assert_int_eq(flap_device_measure_host(pool, &machine), FLAP_OK);
  uint64_t taken_ns = flap_units_now_ns() - begun_ns;
  /* Anything that runs this test copies more than 10 MB/s, and nothing yet copies 10 TB/s. */
  double rates[] = {machine.h2d_bytes, machine.d2h_bytes, machine.host_bytes, machine.device_bytes};
  for (uint32_t i = 0; i < 4; i++)
    ck_assert_msg(rates[i] > 1e7 && rates[i] < 1e13, "rate %u is %g", i, rates[i]);
  ck_assert(machine.synchronous);
  ck_assert_uint_eq(machine.shared_cores, 2);
  ck_assert_uint_gt(machine.launch_ns, 0);
  ck_assert_double_eq(machine.flops_bf16, before.flops_bf16);
  ck_assert_double_eq(machine.flops_f32, before.flops_f32);
  ck_assert_double_eq(machine.disk_read_bytes, before.disk_read_bytes);
  ck_assert_uint_eq(machine.copy_ns, before.copy_ns);
  ck_assert_uint_eq(machine.disk_ns, before.disk_ns);
  ck_assert_str_eq(machine.name, before.name);
  /* 300 ms on an idle machine; the bound here leaves room for a busy one and for sanitizers. */
  ck_assert_uint_lt(taken_ns, 5000000000u);
  printf("measured in %.0f ms\n", (double)taken_ns * 1e-6);
  flap_pool_close(pool);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("device");
  TCase *tests = tcase_create("measure");
  tcase_set_timeout(tests, 60);
  tcase_add_test(tests, measured_host_fills_memory_rates_alone);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? 1 : 0;
}
