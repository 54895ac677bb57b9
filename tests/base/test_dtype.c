/* bf16: every value survives the way through fp32, and rounding is to nearest even. */
#include "base/dtype.h"

#include "base/philox.h"

#include <check.h>
#include <math.h>

START_TEST(dtype_bf16_round_trip_is_exact) {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    float value = flap_bf16_to_f32((uint16_t)bits);
    uint16_t back = flap_f32_to_bf16(value);
    if (isnan(value))
      ck_assert(isnan(flap_bf16_to_f32(back)));
    else
      ck_assert_uint_eq(back, bits);
  }
}
END_TEST

START_TEST(dtype_bf16_rounds_to_nearest_even) {
  flap_philox stream = flap_philox_stream(1, "bf16");
  for (uint64_t i = 0; i < 200000; i++) {
    uint32_t bits = (uint32_t)flap_philox_below(&stream, i, (uint64_t)1 << 32);
    if (i % 2 == 0)
      bits = (bits & 0xffff0000u) | 0x8000u; /* a tie */
    double value = (double)flap_f32_from_bits(bits);
    uint16_t below = (uint16_t)(bits >> 16), got = flap_f32_to_bf16((float)value);
    double down = (double)flap_bf16_to_f32(below), up = (double)flap_bf16_to_f32((uint16_t)(below + 1));
    if (!isfinite(value) || !isfinite(up))
      continue;
    double to_down = fabs(value - down), to_up = fabs(up - value);
    uint16_t expected = to_down < to_up || (to_down == to_up && below % 2 == 0) ? below : (uint16_t)(below + 1);
    ck_assert_uint_eq(got, expected);
  }
}
END_TEST

START_TEST(dtype_bf16_keeps_nan_and_overflows_to_infinity) {
  ck_assert(isnan(flap_bf16_to_f32(flap_f32_to_bf16(flap_f32_from_bits(0x7f800001u)))));
  ck_assert(isnan(flap_bf16_to_f32(flap_f32_to_bf16(flap_f32_from_bits(0xffffffffu)))));
  ck_assert_uint_eq(flap_f32_to_bf16(flap_f32_from_bits(0x7f7fffffu)), 0x7f80);
}
END_TEST

START_TEST(dtype_names_and_sizes_agree) {
  ck_assert_uint_eq(flap_dtype_bytes(FLAP_F32), 4);
  ck_assert_uint_eq(flap_dtype_bytes(FLAP_BF16), 2);
  ck_assert_uint_eq(flap_dtype_bytes(FLAP_F16), 2);
  ck_assert_uint_eq(flap_dtype_bytes(FLAP_I32), 4);
  ck_assert_str_eq(flap_dtype_name(FLAP_BF16), "bfloat16");
  ck_assert_str_eq(flap_dtype_name(FLAP_I32), "int32");
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("dtype");
  tcase_add_test(tests, dtype_bf16_round_trip_is_exact);
  tcase_add_test(tests, dtype_bf16_rounds_to_nearest_even);
  tcase_add_test(tests, dtype_bf16_keeps_nan_and_overflows_to_infinity);
  tcase_add_test(tests, dtype_names_and_sizes_agree);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
