/* Opening: limits, devices and pools that do not fit are refused; workspace sizes; names; timing. */
#include "base/units.h"
#include "tests/kernels/ops_rig.h"

#include <stdlib.h>

/* The model of the example that must train within 7 MiB of VRAM. */
static flap_ops_limits small_model(uint32_t tokens, uint32_t threads) {
  return (flap_ops_limits){.dtype = FLAP_BF16,
                           .batch_max = tokens / 256,
                           .sequence_max = 256,
                           .tokens_max = tokens,
                           .hidden = 192,
                           .intermediate = 512,
                           .vocabulary = 257,
                           .heads = 6,
                           .kv_heads = 2,
                           .head_size = 32,
                           .cache_tokens_max = 512,
                           .threads = threads};
}

START_TEST(workspace_small_model_is_below_one_mebibyte) {
  for (uint32_t tokens = 256; tokens <= 2048; tokens *= 2) {
    const flap_ops_limits limits = small_model(tokens, 2);
    const uint64_t bytes = flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits);
    ck_assert_uint_lt(bytes, FLAP_MIB);
    ck_assert_uint_eq(bytes, flap_ops_workspace_bytes(FLAP_DEVICE_SIM, &limits));
  }
}
END_TEST

START_TEST(workspace_grows_with_what_needs_it_and_less_than_activations) {
  flap_ops_limits limits = small_model(1024, 2);
  const uint64_t small = flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits);
  limits.threads = 3;
  ck_assert_uint_gt(flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits), small);
  limits = small_model(16384, 2);
  limits.hidden = 4096;
  limits.intermediate = 14336;
  limits.heads = 32;
  limits.kv_heads = 8;
  limits.head_size = 128;
  limits.vocabulary = 128256;
  /* Below the logits of 100 tokens, and a tenth of one activation of all tokens. */
  ck_assert_uint_lt(flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits), (uint64_t)100 * 128256 * 2);
  ck_assert_uint_lt(flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits) / 4, (uint64_t)16384 * 4096 * 2 / 10);
}
END_TEST

/* A plan for a machine with a card is made in any build, so the sizes are known in any. By hand: 32 MiB of cuBLASLt,
 * and the largest of what attention, norms and the head want in turn. */
START_TEST(workspace_of_cuda_is_known_without_cuda) {
  flap_ops_limits limits = {.dtype = FLAP_BF16,
                            .batch_max = 2,
                            .sequence_max = 4096,
                            .tokens_max = 8192,
                            .hidden = 4096,
                            .intermediate = 14336,
                            .vocabulary = 128256,
                            .heads = 32,
                            .kv_heads = 8,
                            .head_size = 128,
                            .threads = 2};
  /* Logits: 256 MiB would hold 1,046 rows of 128,256, and 2,048 is the least. */
  ck_assert_uint_eq(flap_ops_workspace_bytes(FLAP_DEVICE_CUDA, &limits), 32 * FLAP_MIB + (uint64_t)2048 * 128256 * 2);
  limits.vocabulary = 250; /* 256 apart, 4,096 rows at most: 2 MiB; a norm's parts: 256 of 4,096 floats, 4 MiB */
  /* Attention: 8 bytes per token and head, and 264 blocks of 128 keys with two sums of 128 floats; for Hopper dq of all
   * heads in floats, with a ticket counter and two flags for each of 64 tiles of 64 heads. */
  const uint64_t chain = (uint64_t)2 * 4096 * 32 * 128 * 4 + flap_units_round_up((1 + 2 * 64 * 64) * 4, 256);
  const uint64_t attention = (uint64_t)2 * 4096 * 32 * 8 + (uint64_t)264 * 128 * 128 * 2 * 4 + chain;
  ck_assert_uint_eq(flap_ops_workspace_bytes(FLAP_DEVICE_CUDA, &limits), 32 * FLAP_MIB + attention);
  limits.sequence_max = limits.batch_max = 1; /* one query: 32 heads of 130 floats; then the norm decides */
  limits.kv_heads = 32;
  limits.tokens_max = 1;
  ck_assert_uint_eq(flap_ops_workspace_bytes(FLAP_DEVICE_CUDA, &limits), 36 * FLAP_MIB);
}
END_TEST

START_TEST(open_names_the_instruction_set_and_blas) {
  const flap_ops_limits limits = rig_limits(FLAP_BF16);
  rig r;
  rig_open(&r, &limits, 2);
  const char *numerics = flap_ops_numerics(r.ops);
  ck_assert_msg(strncmp(numerics, "cpu kernels ", 12) == 0 && strstr(numerics, " openblas-") != NULL, "\"%s\"",
                numerics);
  ck_assert_ptr_eq(flap_ops_device(r.ops), r.device);
  rig_close(&r);
}
END_TEST

START_TEST(open_more_pool_threads_than_workspace_is_refused) {
  flap_pool *pool;
  flap_device *device;
  ck_assert_int_eq(flap_pool_open(2, &pool), FLAP_OK);
  flap_device_config config = {.kind = FLAP_DEVICE_CPU, .vram_bytes = 1 << 20, .events_max = 1, .pool = pool};
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_OK);
  flap_ops_limits limits = rig_limits(FLAP_BF16);
  void *workspace = aligned_alloc(4096, flap_units_round_up(flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits), 4096));
  flap_ops *ops;
  limits.threads = 1;
  ck_assert_int_eq(flap_ops_open(device, &limits, workspace, &ops), FLAP_INVALID);
  ck_assert_ptr_null(ops);
  limits.threads = 2;
  limits.dtype = FLAP_I32;
  ck_assert_int_eq(flap_ops_open(device, &limits, workspace, &ops), FLAP_UNSUPPORTED);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "int32"));
  limits = rig_limits(FLAP_BF16);
  limits.kv_heads = 5;
  ck_assert_int_eq(flap_ops_open(device, &limits, workspace, &ops), FLAP_INVALID);
  limits = rig_limits(FLAP_BF16);
  limits.head_size = 31;
  ck_assert_int_eq(flap_ops_open(device, &limits, workspace, &ops), FLAP_INVALID);
  flap_ops_close(NULL);
  free(workspace);
  flap_device_close(device);
  flap_pool_close(pool);
}
END_TEST

START_TEST(compute_time_is_told_to_the_device) {
  const flap_ops_limits limits = rig_limits(FLAP_F32);
  rig r;
  rig_open(&r, &limits, 1);
  const uint64_t bytes = (uint64_t)4 << 20;
  unsigned char *memory = malloc(bytes);
  const uint64_t before_ns = flap_device_busy_ns(r.device, FLAP_STREAM_COMPUTE), start_ns = flap_units_now_ns();
  for (int i = 0; i < 8; ++i)
    flap_ops_zero(r.ops, memory, bytes);
  const uint64_t wall_ns = flap_units_now_ns() - start_ns;
  const uint64_t busy_ns = flap_device_busy_ns(r.device, FLAP_STREAM_COMPUTE) - before_ns;
  ck_assert_uint_gt(busy_ns, wall_ns / 2);
  ck_assert_uint_le(busy_ns, wall_ns);
  free(memory);
  rig_close(&r);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_front");
  tcase_add_test(tests, workspace_small_model_is_below_one_mebibyte);
  tcase_add_test(tests, workspace_grows_with_what_needs_it_and_less_than_activations);
  tcase_add_test(tests, workspace_of_cuda_is_known_without_cuda);
  tcase_add_test(tests, open_names_the_instruction_set_and_blas);
  tcase_add_test(tests, open_more_pool_threads_than_workspace_is_refused);
  tcase_add_test(tests, compute_time_is_told_to_the_device);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
