/* What `flap bench` measures of kernels: a rate for every kind, no rate for what does not fit, and no step of AdamW
 * that is not an ordinary one (measure_ops.c asserts that). */
#include "kernels/measure_ops.h"

#include "base/units.h"

#include <check.h>
#include <string.h>

static flap_pool *pool;
static flap_ops_meter *meter;

static void open_meter(uint64_t vram_bytes) {
  const flap_ops_meter_config config = {.kind = FLAP_DEVICE_CPU,
                                        .pool = pool,
                                        .vram_bytes = vram_bytes,
                                        .tokens_max = 128,
                                        .heads = 4,
                                        .head_size_max = 64};
  const flap_rate_effort effort = {.rounds = 2, .round_ns = 1000000};
  ck_assert_msg(flap_ops_meter_open(&config, &effort, &meter) == FLAP_OK, "%s", flap_error_message());
}

static void set_up(void) {
  ck_assert_int_eq(flap_pool_open(2, &pool), FLAP_OK);
}

static void tear_down(void) {
  flap_ops_meter_close(meter);
  flap_pool_close(pool);
}

static void check_rate(const flap_rate *rate, const char *name) {
  ck_assert_msg(rate->rounds >= 1 && rate->median > 1e6 && rate->median < 1e14, "%s: %g", name, rate->median);
  ck_assert(rate->least <= rate->median && rate->median <= rate->most);
}

START_TEST(meter_measures_products_of_every_dtype_and_transpose) {
  const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};
  flap_rate rate;
  open_meter(16 * FLAP_MIB);
  for (int d = 0; d < 3; d++)
    for (int transpose = FLAP_NN; transpose <= FLAP_TN; transpose++) {
      ck_assert_int_eq(flap_ops_measure_matmul(meter, dtypes[d], (flap_transpose)transpose, 96, 160, 64,
                                               transpose == FLAP_TN, &rate),
                       FLAP_OK);
      check_rate(&rate, "a product");
    }
  ck_assert(strstr(flap_ops_meter_describe(meter), "cpu") != NULL);
  ck_assert_uint_eq(flap_ops_meter_overhead(meter), 0);
}
END_TEST

START_TEST(meter_measures_attention_copies_and_adamw) {
  flap_rate forward, backward, rate;
  open_meter(16 * FLAP_MIB);
  for (uint32_t head_size = 32; head_size <= 64; head_size *= 2) {
    ck_assert_int_eq(flap_ops_measure_attention(meter, FLAP_BF16, 128, head_size, &forward, &backward), FLAP_OK);
    check_rate(&forward, "forward");
    check_rate(&backward, "backward");
  }
  ck_assert_int_eq(flap_ops_measure_copy(meter, FLAP_MIB, &rate), FLAP_OK);
  check_rate(&rate, "copy");
  for (int eight_bit = 0; eight_bit < 2; eight_bit++) {
    ck_assert_int_eq(flap_ops_measure_adamw(meter, 64 * FLAP_OPS_BLOCK, eight_bit != 0, &rate), FLAP_OK);
    check_rate(&rate, "adamw");
  }
}
END_TEST

START_TEST(meter_has_no_rate_for_what_does_not_fit) {
  flap_rate forward, rate;
  open_meter(8 * FLAP_MIB);
  ck_assert_int_eq(flap_ops_measure_matmul(meter, FLAP_F32, FLAP_NT, 1024, 1024, 1024, false, &rate), FLAP_OK);
  ck_assert_uint_eq(rate.rounds, 0);
  ck_assert_int_eq(flap_ops_measure_copy(meter, 8 * FLAP_MIB, &rate), FLAP_OK);
  ck_assert_uint_eq(rate.rounds, 0);
  ck_assert_int_eq(flap_ops_measure_adamw(meter, 1024 * FLAP_OPS_BLOCK, false, &rate), FLAP_OK);
  ck_assert_uint_eq(rate.rounds, 0);
  ck_assert_int_eq(flap_ops_measure_attention(meter, FLAP_BF16, 128, 64, &forward, &rate), FLAP_OK);
  check_rate(&forward, "what fits"); /* is measured after what did not */
}
END_TEST

START_TEST(meter_of_the_vram_that_operands_need_has_room_for_them) {
  flap_ops_meter_config config = {
      .kind = FLAP_DEVICE_CPU, .pool = pool, .tokens_max = 1, .heads = 1, .head_size_max = 64};
  const flap_rate_effort effort = {.rounds = 1, .round_ns = 1000000};
  const uint64_t elements = 128 * FLAP_OPS_BLOCK;
  flap_rate rate;
  config.vram_bytes = flap_ops_meter_vram(&config, 14 * elements);
  ck_assert_int_eq(flap_ops_meter_open(&config, &effort, &meter), FLAP_OK);
  ck_assert_int_eq(flap_ops_measure_adamw(meter, elements, false, &rate), FLAP_OK);
  check_rate(&rate, "adamw");
  ck_assert_int_eq(flap_ops_measure_adamw(meter, 2 * elements, false, &rate), FLAP_OK);
  ck_assert_uint_eq(rate.rounds, 0);
}
END_TEST

START_TEST(meter_without_room_for_the_workspace_is_refused) {
  flap_rate rate;
  open_meter(64 * FLAP_KIB);
  ck_assert_int_eq(flap_ops_measure_copy(meter, 4096, &rate), FLAP_NO_MEMORY);
  ck_assert(strstr(flap_error_message(), "raise vram") != NULL);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("measure_ops");
  tcase_add_checked_fixture(tests, set_up, tear_down);
  tcase_set_timeout(tests, 60);
  tcase_add_test(tests, meter_measures_products_of_every_dtype_and_transpose);
  tcase_add_test(tests, meter_measures_attention_copies_and_adamw);
  tcase_add_test(tests, meter_has_no_rate_for_what_does_not_fit);
  tcase_add_test(tests, meter_of_the_vram_that_operands_need_has_room_for_them);
  tcase_add_test(tests, meter_without_room_for_the_workspace_is_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
