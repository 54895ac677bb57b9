/* Gradient rounding and AdamW, bit for bit against one element after another with fmaf of the C library. */
#include "tests/kernels/ops_rig.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#define BLOCKS 21u
#define ELEMENTS (BLOCKS * FLAP_OPS_BLOCK)

static void with_rigs(void (*body)(rig rigs[RIG_THREADS_MAX], flap_dtype dtype), flap_dtype dtype) {
  const flap_ops_limits limits = rig_limits(dtype);
  rig_with_threads(&limits, body);
}

static uint32_t bits_of(uint16_t high, int16_t low) {
  return ((uint32_t)high << 16) + (uint32_t)(int32_t)low;
}

static void split(float value, uint16_t *high, int16_t *low) {
  const uint32_t bits = flap_f32_bits(value);
  *high = (uint16_t)((bits + 0x8000u) >> 16);
  *low = (int16_t)(bits - ((uint32_t)*high << 16));
}

/* One element as ops.h tells; volatile keeps the compiler from joining or reordering anything. */
static float reference(const flap_adamw *s, bool decays, float weight, float *m, float *v, float grad) {
  volatile float g = grad * s->gradient_scale;
  volatile float old_m = s->beta1 * *m, old_v = s->beta2 * *v, scaled = s->one_minus_beta2 * g;
  volatile float first = fmaf(s->one_minus_beta1, g, old_m), second = fmaf(scaled, g, old_v);
  if (fabsf(first) < 0x1p-100f)
    first = 0;
  if (fabsf(second) < 0x1p-100f)
    second = 0;
  *m = first;
  *v = second;
  volatile float root = sqrtf(second);
  volatile float denom = fmaf(root, s->inverse_sqrt_bias2, s->epsilon);
  volatile float unbiased = first * s->inverse_bias1;
  volatile float ratio = unbiased / denom;
  volatile float w = decays ? weight * s->decay : weight;
  return fmaf(-s->learning_rate, ratio, w);
}

typedef struct states {
  uint16_t *high;
  int16_t *low;
  float *weight, *m, *v; /* weight: the fp32 form of the same */
} states;

static states make_states(rig_random *random) {
  states s = {.weight = rig_normal_f32(random, ELEMENTS, 0.5), .m = rig_normal_f32(random, ELEMENTS, 1e-3)};
  s.v = rig_normal_f32(random, ELEMENTS, 1e-3);
  s.high = rig_bytes(ELEMENTS * 2);
  s.low = rig_bytes(ELEMENTS * 2);
  for (uint32_t i = 0; i < ELEMENTS; ++i) {
    s.v[i] = s.v[i] * s.v[i];
    if (i % 97 == 0)
      s.m[i] = s.v[i] = 0;
    if (i % 101 == 0)
      s.m[i] = 0x1.1p-100f; /* falls below the limit in the first step */
    split(s.weight[i], &s.high[i], &s.low[i]);
  }
  return s;
}

static states copy_states(const states *s) {
  return (states){.high = rig_copy(s->high, ELEMENTS * 2),
                  .low = rig_copy(s->low, ELEMENTS * 2),
                  .weight = rig_copy(s->weight, ELEMENTS * 4),
                  .m = rig_copy(s->m, ELEMENTS * 4),
                  .v = rig_copy(s->v, ELEMENTS * 4)};
}

static void free_states(states *s) {
  free(s->high), free(s->low), free(s->weight), free(s->m), free(s->v);
}

static bool decays(const uint8_t *blocks, uint32_t element) {
  const uint32_t block = element / FLAP_OPS_BLOCK;
  return (blocks[block / 8] >> (block % 8) & 1) != 0;
}

static void adamw(rig rigs[RIG_THREADS_MAX], flap_dtype grad_dtype) {
  rig_random random = rig_random_named("adamw");
  states start = make_states(&random), want = copy_states(&start);
  const uint8_t decay_blocks[3] = {0xa6, 0x01, 0x12};
  states split_got[RIG_THREADS_MAX], f32_got[RIG_THREADS_MAX], f16_got[RIG_THREADS_MAX];
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    split_got[t] = copy_states(&start);
    f16_got[t] = copy_states(&start); /* `high` takes the fp16 weight, `weight` is the master */
    f32_got[t] = copy_states(&start);
  }
  for (uint32_t step = 1; step <= 3; ++step) {
    const flap_adamw s = rig_adamw(step);
    void *grad = rig_normal(&random, grad_dtype, ELEMENTS, step == 3 ? 1e-18 : 1e-2);
    for (uint32_t i = 0; i < ELEMENTS; i += 101)
      memset((unsigned char *)grad + i * flap_dtype_bytes(grad_dtype), 0, flap_dtype_bytes(grad_dtype));
    for (uint32_t i = 0; i < ELEMENTS; ++i)
      want.weight[i] = reference(&s, decays(decay_blocks, i), want.weight[i], &want.m[i], &want.v[i],
                                 (float)rig_at(grad_dtype, grad, i));
    for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
      int32_t fault = 0;
      flap_ops_adamw(rigs[t].ops, &s, FLAP_BF16, grad_dtype, split_got[t].high, split_got[t].low, split_got[t].m,
                     split_got[t].v, grad, decay_blocks, &fault, ELEMENTS);
      flap_ops_adamw(rigs[t].ops, &s, FLAP_F32, grad_dtype, f32_got[t].weight, NULL, f32_got[t].m, f32_got[t].v, grad,
                     decay_blocks, &fault, ELEMENTS);
      flap_ops_adamw(rigs[t].ops, &s, FLAP_F16, grad_dtype, f16_got[t].high, f16_got[t].weight, f16_got[t].m,
                     f16_got[t].v, grad, decay_blocks, &fault, ELEMENTS);
      ck_assert_int_eq(fault, 0);
    }
    free(grad);
  }
  uint32_t zeros = 0;
  for (uint32_t i = 0; i < ELEMENTS; ++i)
    zeros += want.m[i] == 0 ? 1 : 0;
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    rig_same("fp32 weight", f32_got[t].weight, want.weight, ELEMENTS * 4);
    rig_same("m", f32_got[t].m, want.m, ELEMENTS * 4);
    rig_same("v", f32_got[t].v, want.v, ELEMENTS * 4);
    rig_same("m of split", split_got[t].m, want.m, ELEMENTS * 4);
    rig_same("v of split", split_got[t].v, want.v, ELEMENTS * 4);
    rig_same("master of fp16", f16_got[t].weight, want.weight, ELEMENTS * 4);
    rig_same("m of fp16", f16_got[t].m, want.m, ELEMENTS * 4);
    rig_same("v of fp16", f16_got[t].v, want.v, ELEMENTS * 4);
    for (uint32_t i = 0; i < ELEMENTS; ++i)
      if (rig_at(FLAP_F16, f16_got[t].high, i) != rig_round(FLAP_F16, (double)want.weight[i]))
        ck_abort_msg("element %u: %04x, of the master %a", i, f16_got[t].high[i], (double)want.weight[i]);
    for (uint32_t i = 0; i < ELEMENTS; ++i) {
      uint16_t high;
      int16_t low;
      split(want.weight[i], &high, &low);
      if (high != split_got[t].high[i] || low != split_got[t].low[i] ||
          bits_of(high, low) != flap_f32_bits(want.weight[i]))
        ck_abort_msg("element %u: (%04x, %04x), expected (%04x, %04x)", i, split_got[t].high[i],
                     (unsigned)(uint16_t)split_got[t].low[i], high, (unsigned)(uint16_t)low);
    }
    free_states(&split_got[t]);
    free_states(&f32_got[t]);
    free_states(&f16_got[t]);
  }
  ck_assert_uint_eq(zeros, (ELEMENTS + 100) / 101); /* those without a gradient, and no other */
  free_states(&start);
  free_states(&want);
}

START_TEST(adamw_all_forms_give_the_bits_of_scalar_fmaf) {
  with_rigs(adamw, _i == 0 ? FLAP_F32 : FLAP_BF16);
}
END_TEST

/* No gradient and no rate: what is left is the split and its inverse, for every sort of bits. */
static void round_trip(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  (void)dtype;
  const flap_adamw s = {.beta1 = 0.9f,
                        .beta2 = 0.9f,
                        .one_minus_beta1 = 0.1f,
                        .one_minus_beta2 = 0.1f,
                        .inverse_bias1 = 1,
                        .inverse_sqrt_bias2 = 1,
                        .epsilon = 1e-8f,
                        .decay = 1,
                        .gradient_scale = 1};
  const uint32_t elements = 16 * FLAP_OPS_BLOCK;
  uint16_t *high = rig_bytes(elements * 2);
  int16_t *low = rig_bytes(elements * 2);
  uint32_t *bits = rig_bytes(elements * 4);
  float *m = rig_bytes(elements * 4), *v = rig_bytes(elements * 4), *grad = rig_bytes(elements * 4);
  const uint8_t decay_blocks[2] = {0xff, 0xff};
  rig_random random = rig_random_named("round trip");
  for (uint32_t i = 0; i < elements; ++i) {
    bits[i] = rig_between(&random, 0, 0xffffffffu);
    if (i % 4 == 0)
      bits[i] = (bits[i] & 0xffff0000u) | (0x7ffeu + i / 4 % 4); /* around the tie */
    if ((bits[i] & 0x7fffffffu) + 0x8000u >= 0x7f800000u)
      bits[i] &= 0x3fffffffu;
    if (bits[i] == 0x80000000u)
      bits[i] = 0; /* -0 + 0 is +0 */
    split(flap_f32_from_bits(bits[i]), &high[i], &low[i]);
    m[i] = v[i] = grad[i] = 0;
  }
  int32_t fault = 0;
  flap_ops_adamw(rigs[1].ops, &s, FLAP_BF16, FLAP_F32, high, low, m, v, grad, decay_blocks, &fault, elements);
  ck_assert_int_eq(fault, 0);
  for (uint32_t i = 0; i < elements; ++i)
    if (bits_of(high[i], low[i]) != bits[i])
      ck_abort_msg("element %u: %08x, expected %08x", i, bits_of(high[i], low[i]), bits[i]);
  free(high), free(low), free(bits), free(m), free(v), free(grad);
}

START_TEST(adamw_no_update_reassembles_every_bit) {
  with_rigs(round_trip, FLAP_BF16);
}
END_TEST

static void faults(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  const flap_adamw s = rig_adamw(1);
  const bool is_split = dtype == FLAP_BF16, is_f16 = dtype == FLAP_F16;
  rig_random random = rig_random_named("faults");
  /* One bad element each: an infinite gradient, a NaN gradient, a weight about to round to infinity, a NaN weight. */
  for (uint32_t sort = 0; sort < 4; ++sort) {
    states start = make_states(&random);
    const uint32_t bad = rig_between(&random, 0, ELEMENTS - 1);
    float *grad = rig_normal_f32(&random, ELEMENTS, 1e-2);
    if (sort < 2)
      grad[bad] = sort == 0 ? INFINITY : NAN;
    else
      start.weight[bad] = sort == 3 ? NAN : is_f16 ? 65519.0f : is_split ? flap_f32_from_bits(0x7f7f7fffu) : FLT_MAX;
    if (sort == 2)
      grad[bad] = -1e15f;
    split(start.weight[bad], &start.high[bad], &start.low[bad]);
    if (is_f16)
      start.high[bad] = flap_f32_to_f16(start.weight[bad]);
    const uint8_t decay_blocks[3] = {0, 0, 0};
    flap_adamw big = s;
    if (sort == 2)
      big.learning_rate = is_f16 ? 2.0f : is_split ? 0x1p112f : 0x1p105f;
    states got = copy_states(&start);
    int32_t fault = 0;
    if (is_split)
      flap_ops_adamw(rigs[sort % 3].ops, &big, FLAP_BF16, FLAP_F32, got.high, got.low, got.m, got.v, grad, decay_blocks,
                     &fault, ELEMENTS);
    else if (is_f16)
      flap_ops_adamw(rigs[sort % 3].ops, &big, FLAP_F16, FLAP_F32, got.high, got.weight, got.m, got.v, grad,
                     decay_blocks, &fault, ELEMENTS);
    else
      flap_ops_adamw(rigs[sort % 3].ops, &big, FLAP_F32, FLAP_F32, got.weight, NULL, got.m, got.v, grad, decay_blocks,
                     &fault, ELEMENTS);
    ck_assert_int_eq(fault, 1);
    ck_assert_uint_eq(got.high[bad], start.high[bad]);
    ck_assert_int_eq(got.low[bad], start.low[bad]);
    rig_same("weight", &got.weight[bad], &start.weight[bad], 4);
    const uint32_t good = bad > 0 ? bad - 1 : 1;
    const bool moved = is_split ? bits_of(got.high[good], got.low[good]) != bits_of(start.high[good], start.low[good])
                                : got.weight[good] != start.weight[good];
    ck_assert_msg(moved, "the neighbour of a refused weight was not updated");
    free(grad);
    free_states(&start);
    free_states(&got);
  }
}

START_TEST(adamw_weight_not_finite_is_refused_and_reported) {
  with_rigs(faults, rig_dtype(_i));
}
END_TEST

/* ---- gradient_store ---- */

static void gradient(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("gradient");
  float *sum = rig_normal_f32(&random, ELEMENTS, 1);
  sum[5] = flap_f32_from_bits(0x3f808000u); /* ties: to even */
  sum[6] = flap_f32_from_bits(0x3f818000u);
  const uint64_t bytes = ELEMENTS * flap_dtype_bytes(dtype);
  void *grad[RIG_THREADS_MAX];
  float *squares[RIG_THREADS_MAX], measured[BLOCKS], of_final[BLOCKS];
  void *final = rig_bytes(bytes);
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    grad[t] = rig_bytes(bytes);
    squares[t] = rig_bytes(BLOCKS * 4);
    flap_ops_gradient_store(rigs[t].ops, dtype, grad[t], squares[t], FLAP_F32, sum, ELEMENTS);
    flap_ops_gradient_store(rigs[t].ops, dtype, NULL, measured, FLAP_F32, sum, ELEMENTS);
    flap_ops_gradient_store(rigs[t].ops, dtype, final, of_final, dtype, grad[t], ELEMENTS);
    rig_same("grad that was final", grad[t], final, bytes);
    rig_same("squares of what was final", squares[t], of_final, BLOCKS * 4);
    memset(final, 0, bytes);
    flap_ops_gradient_store(rigs[t].ops, dtype, final, NULL, FLAP_F32, sum, ELEMENTS);
    rig_same("grad without squares", grad[t], final, bytes);
    rig_same("grad", grad[0], grad[t], bytes);
    rig_same("squares", squares[0], squares[t], BLOCKS * 4);
    rig_same("squares only measured", squares[0], measured, BLOCKS * 4);
  }
  for (uint32_t block = 0; block < BLOCKS; ++block) {
    double want = 0;
    for (uint32_t i = block * FLAP_OPS_BLOCK; i < (block + 1) * FLAP_OPS_BLOCK; ++i) {
      const double value = rig_at(dtype, grad[0], i);
      rig_near("grad", i, value, rig_round(dtype, (double)sum[i]), 0, 0);
      want += value * value;
    }
    rig_near("squares", block, (double)squares[0][block], want, 1e-5, 0);
  }
  if (dtype == FLAP_BF16) {
    ck_assert_uint_eq(((uint16_t *)grad[0])[5], 0x3f80);
    ck_assert_uint_eq(((uint16_t *)grad[0])[6], 0x3f82);
  }
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    free(grad[t]), free(squares[t]);
  free(final);
  free(sum);
}

START_TEST(gradient_store_rounds_once_and_sums_squares) {
  with_rigs(gradient, _i == 0 ? FLAP_F32 : FLAP_BF16);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_optimizer");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, adamw_all_forms_give_the_bits_of_scalar_fmaf, 0, 2);
  tcase_add_test(tests, adamw_no_update_reassembles_every_bit);
  tcase_add_loop_test(tests, adamw_weight_not_finite_is_refused_and_reported, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, gradient_store_rounds_once_and_sums_squares, 0, 2);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
