/* The sim device: every operation takes time, as much as its arithmetic or traffic, and touches no operand. */
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdlib.h>

#define FLOPS 1e12 /* rates that make times easy: 1 ns per 1000 operations or 100 bytes */
#define BYTES 1e11

typedef struct sim {
  flap_clock *clock;
  flap_device *device;
  flap_ops *ops;
} sim;

static void open_sim(sim *s) {
  ck_assert_int_eq(flap_clock_open(&s->clock), FLAP_OK);
  flap_device_config config = {.kind = FLAP_DEVICE_SIM, .vram_bytes = 1 << 30, .events_max = 1, .clock = s->clock};
  flap_device_default_machine(FLAP_DEVICE_SIM, &config.machine);
  config.machine.flops_bf16 = FLOPS;
  config.machine.flops_f32 = FLOPS / 2;
  config.machine.device_bytes = BYTES;
  config.machine.launch_ns = 0;
  config.machine.shared_cores = 0;
  ck_assert_int_eq(flap_device_open(&config, &s->device), FLAP_OK);
  const flap_ops_limits limits = rig_limits(FLAP_BF16);
  uint64_t bytes;
  ck_assert_int_eq(flap_ops_open(s->device, &limits, flap_device_arena(s->device, &bytes), &s->ops), FLAP_OK);
  ck_assert_str_eq(flap_ops_numerics(s->ops), "sim");
}

static void close_sim(sim *s) {
  flap_ops_close(s->ops);
  flap_device_close(s->device);
  flap_clock_close(s->clock);
}

static double taken_ns(sim *s) {
  static uint64_t before_ns;
  const uint64_t now_ns = flap_device_busy_ns(s->device, FLAP_STREAM_COMPUTE);
  const double taken = (double)(now_ns - before_ns);
  before_ns = now_ns;
  return taken;
}

/* Nothing lives at these addresses, and what would is far apart. */
static void *nowhere(uint64_t index) {
  return (void *)(uintptr_t)(index << 32);
}

START_TEST(sim_matmul_takes_the_longer_of_arithmetic_and_traffic) {
  sim s;
  open_sim(&s);
  (void)taken_ns(&s);
  flap_matmul x = {.transpose = FLAP_NT, .m = 1000, .n = 2000, .k = 3000, .a = nowhere(1), .b = nowhere(2)};
  x.c = nowhere(3);
  x.lda = x.ldb = 3000;
  x.ldc = 2000;
  x.dtype = x.c_dtype = FLAP_BF16;
  flap_ops_matmul(s.ops, &x);
  rig_near("arithmetic", 0, taken_ns(&s), 2.0 * 1000 * 2000 * 3000 / FLOPS * 1e9, 0, 1);
  x.m = 1;
  flap_ops_matmul(s.ops, &x);
  rig_near("traffic", 0, taken_ns(&s), (3000 + 2000.0 * 3000 + 2000) * 2 / BYTES * 1e9, 0, 1);
  x.m = 1000;
  x.dtype = x.c_dtype = FLAP_F32;
  flap_ops_matmul(s.ops, &x);
  rig_near("fp32", 0, taken_ns(&s), 2.0 * 1000 * 2000 * 3000 / (FLOPS / 2) * 1e9, 0, 1);
  close_sim(&s);
}
END_TEST

START_TEST(sim_attention_backward_takes_longer_than_forward) {
  sim s;
  open_sim(&s);
  (void)taken_ns(&s);
  flap_attention x = {.batch = 2, .sequence = 4096, .heads = 8, .kv_heads = 2, .head_size = 64};
  x.q_stride = 512;
  x.kv_stride = 128;
  x.dtype = FLAP_BF16;
  flap_ops_attention(s.ops, &x);
  const double forward = taken_ns(&s);
  rig_near("forward", 0, forward, 4.0 * 64 * 2 * 8 * (4096.0 * 4097 / 2) / FLOPS * 1e9, 0, 1);
  flap_ops_attention_backward(s.ops, &x, nowhere(1), nowhere(2), nowhere(3), nowhere(4));
  rig_near("backward", 0, taken_ns(&s), 2.5 * forward, 1e-6, 2);
  flap_ops_attention_decode(s.ops, FLAP_BF16, nowhere(1), nowhere(2), 512, nowhere(3), nowhere(4), 1, 9999, 8, 2, 64);
  rig_near("decode", 0, taken_ns(&s), 64 * (2.0 * 8 + 2.0 * 10000 * 2) * 2 / BYTES * 1e9, 0, 1);
  close_sim(&s);
}
END_TEST

#define CHARGES(call)                                          \
  do {                                                         \
    call;                                                      \
    ck_assert_msg(taken_ns(&s) > 0, "%s took no time", #call); \
  } while (0)

START_TEST(sim_every_operation_takes_time_and_touches_nothing) {
  sim s;
  open_sim(&s);
  (void)taken_ns(&s);
  void *a = nowhere(1), *b = nowhere(2), *c = nowhere(3), *d = nowhere(4);
  const int32_t *tokens = nowhere(5);
  const flap_adamw scalars = {.learning_rate = 1};
  CHARGES(flap_ops_bias_backward(s.ops, FLAP_BF16, a, b, 1000, 1000, 1000));
  CHARGES(flap_ops_zero(s.ops, a, 1000000));
  CHARGES(flap_ops_copy(s.ops, a, b, 1000000));
  CHARGES(flap_ops_embedding(s.ops, FLAP_BF16, a, tokens, b, 1000, 1000));
  CHARGES(flap_ops_embedding_backward(s.ops, FLAP_BF16, a, tokens, tokens, b, 1000, 1000));
  CHARGES(flap_ops_rmsnorm(s.ops, FLAP_BF16, a, b, c, d, d, a, 1000, 1000, 1e-5f));
  CHARGES(flap_ops_rmsnorm_backward(s.ops, FLAP_BF16, a, b, NULL, c, d, a, b, c, 1000, 1000));
  CHARGES(flap_ops_add(s.ops, FLAP_BF16, a, b, c, 1000000));
  CHARGES(flap_ops_rope(s.ops, FLAP_BF16, a, b, 1000, 100, 0, 8, 64, 512, false));
  CHARGES(flap_ops_swiglu(s.ops, FLAP_BF16, a, b, c, 1000, 1000, 1000));
  CHARGES(flap_ops_swiglu_backward(s.ops, FLAP_BF16, a, b, 1000, NULL, c, a, b, 1000, 1000, 1000));
  flap_matmul up = {.transpose = FLAP_NT, .m = 1000, .n = 2000, .k = 1000, .a = a, .b = b, .c = c};
  up.lda = up.ldb = 1000, up.ldc = 2000;
  up.dtype = up.c_dtype = FLAP_BF16;
  flap_matmul down = up;
  down.transpose = FLAP_NN, down.n = down.ldc = 1000;
  CHARGES(flap_ops_matmul_swiglu(s.ops, &up, d));
  CHARGES(flap_ops_matmul_rope(s.ops, &up, b, 100, 0, 8, 64));
  CHARGES(flap_ops_matmul_swiglu_backward(s.ops, &down, d, nowhere(5), 1000, true, d, nowhere(5), 1000));
  CHARGES(flap_ops_head_loss(s.ops, FLAP_BF16, a, NULL, NULL, false, b, c, tokens, 1, 1000, 100, 1000));
  CHARGES(flap_ops_head_loss(s.ops, FLAP_BF16, a, b, c, true, d, a, tokens, 1, 1000, 100, 1000));
  CHARGES(flap_ops_gradient_store(s.ops, FLAP_BF16, a, b, FLAP_F32, c, FLAP_OPS_BLOCK * 100));
  CHARGES(flap_ops_adamw(s.ops, &scalars, FLAP_BF16, FLAP_BF16, a, b, c, d, a, nowhere(6), nowhere(7),
                         FLAP_OPS_BLOCK * 100));
  CHARGES(flap_ops_adamw_8bit(s.ops, &scalars, FLAP_BF16, FLAP_BF16, a, b, c, d, a, b, c, nowhere(6), nowhere(7),
                              FLAP_OPS_BLOCK * 100));
  close_sim(&s);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_sim");
  tcase_add_test(tests, sim_matmul_takes_the_longer_of_arithmetic_and_traffic);
  tcase_add_test(tests, sim_attention_backward_takes_longer_than_forward);
  tcase_add_test(tests, sim_every_operation_takes_time_and_touches_nothing);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
