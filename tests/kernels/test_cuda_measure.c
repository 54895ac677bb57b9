/* What `flap bench` measures on a GPU: products, attention, copies and AdamW of every kind, copies to and from it,
 * pinning; within the budget. How fast is no matter, but for what no GPU is too slow for. Skipped where there is none.
 */
#include "kernels/device/measure_memory.h"
#include "kernels/measure_ops.h"

#include "base/units.h"

#include <check.h>
#include <stdio.h>

#define VRAM (2 * FLAP_GIB)

static const flap_rate_effort effort = {.rounds = 3, .round_ns = 3000000};

static void check_rate(const flap_rate *rate, double least, const char *name) {
  printf("%-28s %10.1f G/s, %u rounds\n", name, rate->median / 1e9, rate->rounds);
  ck_assert_msg(rate->rounds >= 1 && rate->median > least && rate->median < 1e16, "%s: %g", name, rate->median);
  ck_assert(rate->least <= rate->median && rate->median <= rate->most);
}

static flap_ops_meter *open_meter(void) {
  const flap_ops_meter_config config = {
      .kind = FLAP_DEVICE_CUDA, .vram_bytes = VRAM, .tokens_max = 2048, .heads = 16, .head_size_max = 128};
  flap_ops_meter *meter = NULL;
  ck_assert_msg(flap_ops_meter_open(&config, &effort, &meter) == FLAP_OK, "%s", flap_error_message());
  return meter;
}

static void succeeds(flap_status status) {
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
}

START_TEST(meter_measures_every_kernel_on_a_gpu) {
  const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};
  flap_ops_meter *meter = open_meter();
  flap_rate rate, backward;
  ck_assert_uint_gt(flap_ops_meter_overhead(meter), 0);
  ck_assert_uint_lt(flap_ops_meter_overhead(meter), VRAM);
  for (int d = 0; d < 3; d++)
    for (int transpose = FLAP_NN; transpose <= FLAP_TN; transpose++) {
      succeeds(flap_ops_measure_matmul(meter, dtypes[d], (flap_transpose)transpose, 2048, 5504, 2048,
                                       transpose == FLAP_TN, &rate));
      check_rate(&rate, 1e11, "product");
    }
  for (uint32_t head_size = 64; head_size <= 128; head_size *= 2) {
    succeeds(flap_ops_measure_attention(meter, FLAP_BF16, 2048, head_size, &rate, &backward));
    check_rate(&rate, 1e11, "attention");
    check_rate(&backward, 1e11, "attention, backward");
  }
  succeeds(flap_ops_measure_copy(meter, 128 * FLAP_MIB, &rate));
  check_rate(&rate, 1e10, "copy");
  for (int eight_bit = 0; eight_bit < 2; eight_bit++) {
    succeeds(flap_ops_measure_adamw(meter, (uint64_t)16 << 20, eight_bit != 0, &rate));
    check_rate(&rate, 1e10, eight_bit ? "AdamW, 8-bit" : "AdamW");
  }
  flap_ops_meter_close(meter);
}
END_TEST

START_TEST(meter_has_no_rate_for_what_does_not_fit_on_a_gpu) {
  flap_ops_meter *meter = open_meter();
  flap_rate rate;
  succeeds(flap_ops_measure_copy(meter, VRAM / 2, &rate));
  ck_assert_uint_eq(rate.rounds, 0);
  succeeds(flap_ops_measure_copy(meter, FLAP_MIB, &rate));
  check_rate(&rate, 1e9, "a small copy");
  flap_ops_meter_close(meter);
}
END_TEST

START_TEST(copies_have_a_rate_for_every_way_kind_and_size_on_a_gpu) {
  flap_copies_meter *meter = NULL;
  flap_rate pin, rate;
  succeeds(flap_copies_meter_open(FLAP_DEVICE_CUDA, VRAM, 16 * FLAP_MIB, 64 * FLAP_MIB, &meter, &pin));
  check_rate(&pin, 1e8, "pinning");
  for (int way = FLAP_COPIES_H2D; way <= FLAP_COPIES_BOTH; way++)
    for (int pinned = 0; pinned < 2; pinned++)
      for (uint64_t bytes = 4096; bytes <= 16 * FLAP_MIB; bytes *= 4096) {
        succeeds(flap_copies_measure(meter, (flap_copies_way)way, pinned != 0, bytes, &effort, &rate));
        check_rate(&rate, 1e6, pinned ? "pinned copy" : "pageable copy");
      }
  flap_copies_meter_close(meter);
  ck_assert_int_eq(flap_copies_meter_open(FLAP_DEVICE_CUDA, VRAM, VRAM, 2 * VRAM, &meter, &pin), FLAP_NO_MEMORY);
  ck_assert_ptr_null(meter);
}
END_TEST

int main(void) {
  const flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = VRAM, .events_max = 1};
  flap_device *device = NULL;
  if (flap_device_open(&config, &device) != FLAP_OK) {
    printf("%s\n", flap_error_message());
    return 77;
  }
  flap_device_close(device);
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("cuda_measure");
  tcase_add_test(tests, meter_measures_every_kernel_on_a_gpu);
  tcase_add_test(tests, meter_has_no_rate_for_what_does_not_fit_on_a_gpu);
  tcase_add_test(tests, copies_have_a_rate_for_every_way_kind_and_size_on_a_gpu);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK); /* a context does not survive a fork */
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? 1 : 0;
}
