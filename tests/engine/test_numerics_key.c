/* What differs between two numerics keys, field by field. */
#include "engine/store/numerics_key.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static const char *differences(const char *saved, const char *now, unsigned wanted) {
  static char text[512];
  ck_assert_uint_eq(flap_numerics_key_differences(saved, now, text, sizeof text), wanted);
  return text;
}

#define CPU "cpu avx2 openblas-0.3.21-Haswell; micro-batch 2 x 64; weights bf16; gradients bf16; adamw fp32"
#define CUDA \
  "cuda sm_90 H100, driver 13.0, runtime 13.0, cuBLASLt 13.1; micro-batch 2 x 64; adamw 8-bit, the embedding fp32"

START_TEST(numerics_equal_keys_have_no_difference) {
  ck_assert_str_eq(differences(CPU, CPU, 0), "");
  ck_assert_str_eq(differences(CUDA "; products 0x12", CUDA "; products 0x12", 0), "");
}
END_TEST

START_TEST(numerics_differences_are_named_with_both_values) {
  ck_assert_str_eq(differences(CPU,
                               "cpu avx512 openblas-0.3.21-Haswell; micro-batch 1 x 64; weights bf16; gradients "
                               "bf16; adamw fp32",
                               2),
                   "kernels: cpu avx2 openblas-0.3.21-Haswell then, cpu avx512 openblas-0.3.21-Haswell now; "
                   "micro-batch: 2 x 64 then, 1 x 64 now");
  ck_assert_str_eq(differences(CUDA,
                               "cuda sm_90 H100, driver 13.1, runtime 13.0, cuBLASLt 13.1; micro-batch 2 x 64; adamw "
                               "fp32",
                               2),
                   "driver: 13.0 then, 13.1 now; adamw: 8-bit, the embedding fp32 then, fp32 now");
}
END_TEST

START_TEST(numerics_fields_that_only_one_has_are_told) {
  ck_assert_str_eq(differences(CPU "; products 0x12", CPU, 1), "products: 0x12 then, none now");
  ck_assert_str_eq(differences(CPU, CPU "; products 0x12", 1), "products: none then, 0x12 now");
  ck_assert_str_eq(differences("", "sim", 1), "kernels: none then, sim now");
}
END_TEST

START_TEST(numerics_long_texts_are_cut) {
  char text[24];
  memset(text, 'x', sizeof text);
  ck_assert_uint_eq(flap_numerics_key_differences(CPU, "sim", text, sizeof text), 5);
  ck_assert_uint_eq(strlen(text), sizeof text - 1);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("numerics_key");
  TCase *tests = tcase_create("all");
  tcase_add_test(tests, numerics_equal_keys_have_no_difference);
  tcase_add_test(tests, numerics_differences_are_named_with_both_values);
  tcase_add_test(tests, numerics_fields_that_only_one_has_are_told);
  tcase_add_test(tests, numerics_long_texts_are_cut);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
