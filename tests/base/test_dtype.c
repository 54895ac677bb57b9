/* bf16 and fp16: every value survives the way through fp32, and rounding is to nearest even. */
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

/* By the definition: 2^-24 times the fraction, or 2^(exponent - 25) times 1024 and the fraction. */
static double half_value(uint32_t bits) {
  const int exponent = (int)(bits >> 10 & 31), fraction = (int)(bits & 0x3ff);
  const double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

START_TEST(dtype_f16_round_trip_is_exact) {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const float value = flap_f16_to_f32((uint16_t)bits);
    if ((bits & 0x7c00) == 0x7c00)
      ck_assert((bits & 0x3ff) != 0 ? isnan(value) : isinf(value) && (signbit(value) != 0) == (bits >= 0x8000));
    else if (flap_f32_bits(value) != flap_f32_bits((float)half_value(bits)))
      ck_abort_msg("%04x became %g", bits, (double)value);
    if (flap_f32_to_f16(value) != (isnan(value) ? bits | 0x200 : bits))
      ck_abort_msg("%04x became %04x", bits, flap_f32_to_f16(value));
  }
}
END_TEST

/* Between two neighbours: below the middle, at it, above it; and the two ways of rounding agree. */
START_TEST(dtype_f16_rounds_to_nearest_even) {
  for (uint32_t below = 0; below < 0x7c00; below++) {
    const double down = half_value(below), up = below == 0x7bff ? 65536.0 : half_value(below + 1);
    const float middle = (float)((down + up) / 2); /* exact: one more bit than fp16 has */
    const float around[3] = {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
    const uint32_t expected[3] = {below, below + below % 2, below + 1};
    for (int i = 0; i < 3; i++) {
      const uint16_t got = flap_f32_to_f16(around[i]), negative = flap_f32_to_f16(-around[i]);
      if (got != expected[i] || negative != (expected[i] | 0x8000) ||
          flap_f32_bits(flap_f32_round_f16(around[i])) != flap_f32_bits(flap_f16_to_f32(got)))
        ck_abort_msg("%a became %04x, expected %04x", (double)around[i], got, expected[i]);
    }
  }
}
END_TEST

START_TEST(dtype_f16_of_any_bits_rounds_alike_in_both_ways) {
  flap_philox stream = flap_philox_stream(2, "fp16");
  for (uint64_t i = 0; i < 1000000; i++) {
    uint32_t bits = (uint32_t)flap_philox_below(&stream, i, (uint64_t)1 << 32);
    if (i % 2 == 0) /* the range of fp16, and around it */
      bits = (bits & 0x807fffffu) | (96 + (bits >> 23) % 52) << 23;
    const float value = flap_f32_from_bits(bits), back = flap_f16_to_f32(flap_f32_to_f16(value));
    if (flap_f32_bits(flap_f32_round_f16(value)) != flap_f32_bits(back))
      ck_abort_msg("%08x: %a and %a", bits, (double)flap_f32_round_f16(value), (double)back);
  }
  ck_assert_uint_eq(flap_f32_to_f16(65504.0f), 0x7bff);
  ck_assert_uint_eq(flap_f32_to_f16(flap_f32_from_bits(FLAP_F16_LIMIT_BITS - 1)), 0x7bff);
  ck_assert_uint_eq(flap_f32_to_f16(flap_f32_from_bits(FLAP_F16_LIMIT_BITS)), 0x7c00);
  ck_assert_uint_eq(flap_f32_to_f16(-INFINITY), 0xfc00);
  ck_assert_uint_eq(flap_f32_to_f16(0x1p-25f), 0);
  ck_assert_uint_eq(flap_f32_to_f16(-0x1.8p-25f), 0x8001);
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
  tcase_add_test(tests, dtype_f16_round_trip_is_exact);
  tcase_add_test(tests, dtype_f16_rounds_to_nearest_even);
  tcase_add_test(tests, dtype_f16_of_any_bits_rounds_alike_in_both_ways);
  tcase_add_test(tests, dtype_names_and_sizes_agree);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
