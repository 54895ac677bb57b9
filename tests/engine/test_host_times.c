/* Updates by the host's cores are timed beside copies of a device, here the cpu one, whose copies are real. */
#include "engine/machine/host_times.h"

#include "base/units.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>

/* A sanitizer takes a minute over these updates, whose kernels and lanes have tests of their own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FIRST_OPTIM 2
#else
#define FIRST_OPTIM 0
#endif

START_TEST(host_is_timed_alone_and_beside_copies) {
  const flap_optim optims[] = {FLAP_OPTIM_ADAMW, FLAP_OPTIM_ADAMW_8BIT};
  const flap_device_config config = {
      .kind = FLAP_DEVICE_CPU, .vram_bytes = FLAP_HOST_TIMES_VRAM_BYTES, .events_max = FLAP_HOST_TIMES_EVENTS};
  const flap_op_times_spec spec = {
      .shape = {.dtype = FLAP_BF16}, .gradient_dtype = FLAP_BF16, .optim = optims[_i], .training = true, .threads = 2};
  flap_device *device = NULL;
  flap_op_times times = {.measured = false};
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_OK);
  void *pinned = calloc(1, flap_host_times_pinned_bytes()), *vram = flap_device_arena(device, NULL);
  ck_assert_int_eq(flap_host_times_measure(&spec, device, vram, pinned, &times), FLAP_OK);
  printf("ns per element: %.3f, beside copies %.3f, which take %.2f times as long\n", times.host.alone,
         times.host.beside_copies, times.copies_beside_host);
  ck_assert(times.host.alone > 0.01 && times.host.alone < 1000);
  ck_assert(times.host.beside_copies > 0.5 * times.host.alone); /* they share cores here */
  ck_assert(times.copies_beside_host >= 1 && times.copies_beside_host < 100);
  ck_assert(times.host_embedding.alone > 0);
  ck_assert_uint_gt(flap_device_busy_ns(device, FLAP_STREAM_H2D), 0);
  ck_assert_uint_gt(flap_device_busy_ns(device, FLAP_STREAM_D2H), 0);
  flap_device_close(device);
  free(pinned);
}
END_TEST

START_TEST(host_times_follow_the_rate_of_memory) {
  const flap_op_times_spec spec = {.shape = {.dtype = FLAP_BF16}, .gradient_dtype = FLAP_BF16, .training = true};
  flap_op_times times = {.measured = false};
  flap_host_times_from_rate(&spec, 26e9, &times);
  ck_assert_double_eq_tol(times.host.alone, 1, 1e-9); /* 14 bytes read and 12 written */
  ck_assert_double_eq_tol(times.host.beside_copies, 1, 1e-9);
  ck_assert_double_eq_tol(times.host_embedding.alone, 1, 1e-9);
  ck_assert_double_eq_tol(times.copies_beside_host, 1, 1e-9);
  ck_assert_double_eq_tol(flap_host_times_rate(&spec, times.host.alone), 26e9, 1);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("host_times");
  TCase *tests = tcase_create("all");
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, host_is_timed_alone_and_beside_copies, FIRST_OPTIM, 2);
  tcase_add_test(tests, host_times_follow_the_rate_of_memory);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
