/* A layer on a GPU: the same bits of its output, of its input's gradient and of all sums, whatever is kept for the
 * backward and whatever is computed again. The shape is one for which Hopper has products with SwiGLU and RoPE in their
 * epilogues: 4,096 tokens are 16 pairs of tiles high, and the outputs 4, 66 and 33 wide, which is 64, 1,056 and 528
 * tiles for 66 clusters.
 *
 *   test_cuda_layer [cpu]   cpu: the same of the cpu device, to try the test where there is no GPU */
#include "base/philox.h"
#include "base/units.h"
#include "model/model.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
#define VRAM ((uint64_t)4 << 30)
#define THREADS 2u

static flap_device_kind kind = FLAP_DEVICE_CUDA;

typedef struct layer_rig {
  flap_model_config config;
  flap_model_shape shape;
  flap_pool *pool;
  flap_device *device;
  flap_ops *ops;
  char *arena;
  uint64_t arena_bytes, used;
  flap_model_run run;
  void *weights, *x, *x_out, *dx, *sums;
  void *saved; /* what a mask keeps, and then its scratch */
  uint64_t weights_bytes, hidden_bytes, sums_bytes, saved_bytes;
} layer_rig;

/* What one way through the layer leaves, in host memory. */
typedef struct layer_result {
  void *x_out, *dx, *sums;
} layer_result;

static void *take(layer_rig *r, uint64_t bytes) {
  void *block = r->arena + r->used;
  r->used = flap_units_round_up(r->used + bytes, 4096);
  ck_assert_uint_le(r->used, r->arena_bytes);
  return block;
}

static void *host_memory(uint64_t bytes) {
  void *memory = malloc(bytes);
  ck_assert_ptr_nonnull(memory);
  return memory;
}

/* Random bf16 numbers up to `scale`. */
static void *random_values(const char *name, uint64_t elements, float scale) {
  uint16_t *values = host_memory(elements * sizeof *values);
  const flap_philox stream = flap_philox_stream(7, name);
  for (uint64_t i = 0; i < elements; i++) {
    const float value = scale * ((float)flap_philox_below(&stream, i, 2001) - 1000) / 1000;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    values[i] = (uint16_t)(bits >> 16);
  }
  return values;
}

static void upload(const layer_rig *r, void *to, void *from, uint64_t bytes) {
  MUST(flap_device_upload(r->device, to, from, bytes));
  free(from);
}

static void spoil(const layer_rig *r, void *memory, uint64_t bytes) {
  void *ones = host_memory(bytes);
  memset(ones, 0xff, bytes);
  upload(r, memory, ones, bytes);
}

static void *download(const layer_rig *r, const void *from, uint64_t bytes) {
  void *copy = host_memory(bytes);
  MUST(flap_device_download(r->device, copy, from, bytes));
  return copy;
}

static void open_rig(layer_rig *r) {
  memset(r, 0, sizeof *r);
  r->config = (flap_model_config){.family = flap_model_find_family("llama"),
                                  .vocab_size = 64,
                                  .hidden_size = 64,
                                  .intermediate_size = 8448,
                                  .num_hidden_layers = 1,
                                  .num_attention_heads = 8,
                                  .num_key_value_heads = 4,
                                  .head_dim = 64,
                                  .max_position_embeddings = 1024,
                                  .rms_norm_eps = 1e-5,
                                  .initializer_range = 0.02,
                                  .rope = {.theta = 10000}};
  MUST(flap_model_finish_config(&r->config));
  r->shape = (flap_model_shape){.batch = 4, .sequence = 1024, .dtype = FLAP_BF16};
  MUST(flap_pool_open(THREADS, &r->pool));
  const flap_device_config config = {.kind = kind, .vram_bytes = VRAM, .events_max = 1, .pool = r->pool};
  MUST(flap_device_open(&config, &r->device));
  r->arena = flap_device_arena(r->device, &r->arena_bytes);
  flap_ops_limits limits;
  flap_model_ops_limits(&r->config, &r->shape, THREADS, &limits);
  MUST(flap_ops_open(r->device, &limits, take(r, flap_ops_workspace_bytes(kind, &limits)), &r->ops));

  const uint64_t elements = flap_model_part_elements(&r->config, FLAP_PART_LAYER);
  const uint64_t all = flap_model_saved_bytes(&r->config, &r->shape, FLAP_MODEL_SAVED_ALL);
  r->weights_bytes = elements * 2, r->sums_bytes = elements * sizeof(float);
  r->hidden_bytes = flap_model_hidden_bytes(&r->config, &r->shape), r->saved_bytes = 2 * all;
  r->weights = take(r, r->weights_bytes), r->sums = take(r, r->sums_bytes), r->saved = take(r, r->saved_bytes);
  r->x = take(r, r->hidden_bytes), r->x_out = take(r, r->hidden_bytes), r->dx = take(r, r->hidden_bytes);
  float *table = host_memory(flap_model_rope_bytes(&r->config, r->shape.sequence));
  flap_ops_rope_table(&r->config.rope, r->shape.sequence, r->config.head_dim, table);
  void *rope_table = take(r, flap_model_rope_bytes(&r->config, r->shape.sequence));
  upload(r, rope_table, table, flap_model_rope_bytes(&r->config, r->shape.sequence));
  r->run = (flap_model_run){.config = &r->config,
                            .shape = r->shape,
                            .ops = r->ops,
                            .rope_table = rope_table,
                            .workspace = take(r, flap_model_workspace_bytes(&r->config, &r->shape))};
  upload(r, r->weights, random_values("weights", elements, 0.2f), r->weights_bytes);
  upload(r, r->x, random_values("x", r->hidden_bytes / 2, 1), r->hidden_bytes);
}

static void close_rig(layer_rig *r) {
  flap_ops_close(r->ops);
  flap_device_close(r->device);
  flap_pool_close(r->pool);
}

/* There and back; what is not kept is lost in between, and computed again. */
static layer_result pass(const layer_rig *r, uint32_t mask) {
  const uint64_t kept_bytes = flap_model_saved_bytes(&r->config, &r->shape, mask);
  const uint64_t scratch_bytes = flap_model_scratch_bytes(&r->config, &r->shape, mask);
  ck_assert_uint_le(kept_bytes + scratch_bytes, r->saved_bytes);
  const flap_model_saved saved = {.kept = r->saved, .scratch = (char *)r->saved + kept_bytes, .mask = mask};
  const flap_model_gradient sums = {.sums = r->sums, .dtype = FLAP_F32};
  const uint64_t workspace_bytes = flap_model_workspace_bytes(&r->config, &r->shape);
  layer_result result = {0};
  spoil(r, r->saved, r->saved_bytes);
  spoil(r, r->x_out, r->hidden_bytes);
  spoil(r, r->sums, r->sums_bytes);
  flap_model_layer_forward(&r->run, r->weights, r->x, &saved, r->x_out);
  result.x_out = download(r, r->x_out, r->hidden_bytes);
  if (scratch_bytes > 0)
    spoil(r, saved.scratch, scratch_bytes);
  spoil(r, r->run.workspace, workspace_bytes);
  flap_model_layer_recompute(&r->run, r->weights, r->x, &saved);
  upload(r, r->dx, random_values("dx", r->hidden_bytes / 2, 0.01f), r->hidden_bytes);
  flap_model_layer_backward(&r->run, r->weights, r->x, &saved, r->dx, &sums);
  result.dx = download(r, r->dx, r->hidden_bytes);
  result.sums = download(r, r->sums, r->sums_bytes);
  MUST(flap_device_synchronize(r->device));
  return result;
}

static void free_result(layer_result *result) {
  free(result->x_out), free(result->dx), free(result->sums);
}

START_TEST(layer_has_the_same_bits_whatever_is_kept) {
  layer_rig r;
  open_rig(&r);
  layer_result want = pass(&r, FLAP_MODEL_SAVED_ALL);
  uint32_t count;
  const flap_saved_set *sets = flap_model_saved_sets(&r.config, &count);
  for (uint32_t i = 0; i <= count; i++) { /* the last time nothing */
    layer_result got = pass(&r, i < count ? sets[i].mask : 0);
    const char *name = i < count ? sets[i].name : "nothing";
    ck_assert_msg(memcmp(got.x_out, want.x_out, r.hidden_bytes) == 0, "%s kept: another output", name);
    ck_assert_msg(memcmp(got.dx, want.dx, r.hidden_bytes) == 0, "%s kept: another gradient of the input", name);
    ck_assert_msg(memcmp(got.sums, want.sums, r.sums_bytes) == 0, "%s kept: other sums", name);
    free_result(&got);
  }
  free_result(&want);
  close_rig(&r);
}
END_TEST

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "cpu") == 0)
    kind = FLAP_DEVICE_CPU;
  char name[128];
  if (kind == FLAP_DEVICE_CUDA && flap_device_find(kind, name, sizeof name) != FLAP_OK) {
    printf("skipped: %s\n", flap_error_message());
    return 77;
  }
  Suite *suite = suite_create("model");
  TCase *tests = tcase_create("cuda_layer");
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, layer_has_the_same_bits_whatever_is_kept);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK); /* a context does not survive a fork */
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
