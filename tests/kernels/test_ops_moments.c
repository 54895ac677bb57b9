/* AdamW with 8-bit moments: the codes against a table in fp64, the whole operation bit for bit against scalar code, and
 * what must not happen where gradients differ by many orders of magnitude. */
#include "kernels/cpu/cpu_vector.h"
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define BLOCKS 11u
#define ELEMENTS (BLOCKS * FLAP_OPS_BLOCK)
#define MOMENT FLAP_OPS_MOMENT_BLOCK
#define MOMENTS (ELEMENTS / MOMENT)

/* ---- codes ---- */

/* The numbers that codes stand for, from the top decade down: 2^digits codes above 0.1, half as many in each below. */
static void make_table(double *table, int digits) {
  table[0] = 0;
  double high = 1;
  for (int count = 1 << digits; count >= 1; count /= 2, high /= 10)
    for (int i = 1; i <= count; ++i)
      table[count - 1 + i] = high / 10 + i * (high - high / 10) / count;
  table[1] = 10 * high; /* alone in the last decade, which is its upper end */
}

static uint32_t nearest(const double *table, uint32_t count, double ratio, double *distance_out) {
  uint32_t best = 0;
  for (uint32_t code = 1; code < count; ++code)
    if (fabs(table[code] - ratio) < fabs(table[best] - ratio))
      best = code;
  *distance_out = fabs(table[best] - ratio);
  return best;
}

START_TEST(moments_codes_stand_for_the_dynamic_tree) {
  const flap_cpu_vector *tables[3];
  (void)flap_cpu_vector_list(tables);
  double of_m[128], of_v[256];
  make_table(of_m, 6);
  make_table(of_v, 7);
  ck_assert(of_m[127] == 1 && fabs(of_m[63] - 0.1) < 1e-15 && fabs(of_m[1] - 1e-6) < 1e-18);
  ck_assert(of_v[255] == 1 && fabs(of_v[127] - 0.1) < 1e-15 && fabs(of_v[1] - 1e-7) < 1e-19);
  int8_t m_codes[MOMENT];
  uint8_t v_codes[MOMENT];
  for (uint32_t i = 0; i < MOMENT; ++i) {
    m_codes[i] = (int8_t)(i == 0 ? 0 : (int)i - 128);
    v_codes[i] = (uint8_t)i;
  }
  float m[MOMENT], v[MOMENT];
  const float m_largest = 3, v_largest = 0.5f;
  tables[0]->moments_load(m, v, m_codes, v_codes, &m_largest, &v_largest, MOMENT);
  for (uint32_t i = 0; i < MOMENT; ++i) {
    const double ratio = m_codes[i] < 0 ? -of_m[-m_codes[i]] : of_m[m_codes[i]];
    rig_near("m", i, (double)m[i], 3 * ratio, 1e-6, 0);
    rig_near("v", i, (double)v[i], 0.25 * of_v[i] * of_v[i], 1e-6, 0);
  }
  ck_assert(m[1] == -3 && m[255] == 3 && m[128] == 0 && v[255] == 0.25f && v[0] == 0);
  /* Back again: no code may wander when nothing happens. */
  int8_t m_again[MOMENT];
  uint8_t v_again[MOMENT];
  float m_top, v_top;
  ck_assert(!tables[0]->moments_store(m_again, v_again, &m_top, &v_top, m, v, MOMENT));
  rig_same("m codes", m_again, m_codes, MOMENT);
  rig_same("v codes", v_again, v_codes, MOMENT);
  ck_assert(m_top == 3 && v_top == 0.5f);
}
END_TEST

START_TEST(moments_codes_are_the_nearest_and_v_never_zero) {
  const flap_cpu_vector *tables[3];
  (void)flap_cpu_vector_list(tables);
  double of_m[128], of_v[256];
  make_table(of_m, 6);
  make_table(of_v, 7);
  rig_random random = rig_random_named("nearest");
  for (uint32_t round = 0; round < 40; ++round) {
    float m[MOMENT], v[MOMENT], m_top, v_top;
    int8_t m_codes[MOMENT];
    uint8_t v_codes[MOMENT];
    float *sign = rig_normal_f32(&random, MOMENT, 1);
    const double scale = ldexp(1, (int)rig_between(&random, 0, 60) - 30);
    for (uint32_t i = 0; i < MOMENT; ++i) { /* over ten decades, or three */
      const double decades = rig_between(&random, 0, 1000000) * (round % 2 == 0 ? 1e-5 : 3e-6);
      m[i] = (float)copysign(scale * pow(10, -decades), (double)sign[i]);
      v[i] = (float)pow(scale * pow(10, -decades), 2);
    }
    ck_assert(!tables[0]->moments_store(m_codes, v_codes, &m_top, &v_top, m, v, MOMENT));
    double m_largest = 0, v_largest = 0;
    for (uint32_t i = 0; i < MOMENT; ++i) {
      m_largest = fmax(m_largest, fabs((double)m[i]));
      v_largest = fmax(v_largest, sqrt((double)v[i]));
    }
    rig_near("largest m", round, (double)m_top, m_largest, 0, 0);
    rig_near("largest v", round, (double)v_top, v_largest, 1e-7, 0);
    for (uint32_t i = 0; i < MOMENT; ++i) {
      const double m_ratio = fabs((double)m[i]) / m_largest, v_ratio = sqrt((double)v[i]) / v_largest;
      double distance;
      (void)nearest(of_m, 128, m_ratio, &distance);
      rig_near("distance of m", i, fabs(of_m[abs(m_codes[i])] - m_ratio), distance, 0, 1e-6 * m_ratio);
      if (m_codes[i] != 0)
        ck_assert((m_codes[i] < 0) == (m[i] < 0));
      if (nearest(of_v, 256, v_ratio, &distance) == 0)
        ck_assert_uint_eq(v_codes[i], 1);
      else
        rig_near("distance of v", i, fabs(of_v[v_codes[i]] - v_ratio), distance, 0, 1e-6 * v_ratio);
    }
    free(sign);
  }
}
END_TEST

/* ---- the operation against scalar code ---- */

/* ratio(code) and the place of a ratio: the lines of ops.h, whose constants follow from the number of `digits` of the
 * top decade. Line j belongs to the decade with 2^j steps. */
static float ratio_of(uint32_t code, int digits) {
  volatile float best = (float)code * (float)pow(10, -digits);
  for (int j = 1; j <= digits; ++j) {
    const double step = 0.9 * pow(10, j - digits) / (1 << j);
    const double start = pow(10, j - digits - 1) - ((1 << j) - 1) * step;
    const float lift = j == digits ? 0x1p-24f : 0; /* makes the top code's ratio 1 */
    volatile float line = fmaf((float)code, (float)step, (float)start + lift);
    best = line > best ? line : best;
  }
  return best;
}

static int32_t code_of(float ratio, int digits) {
  volatile float place = ratio * (float)pow(10, digits);
  for (int j = 1; j <= digits; ++j) {
    volatile float line =
        fmaf(ratio, (float)((1 << j) * pow(10, digits + 1 - j) / 9), (float)(((1 << j) * 8 - 9) / 9.0));
    place = line < place ? line : place;
  }
  return (int32_t)nearbyintf(place);
}

typedef struct states {
  uint16_t *high;
  int16_t *low;
  float *weight; /* the fp32 form of the same */
  int8_t *m;
  uint8_t *v;
  float *m_largest, *v_largest;
} states;

static void split(float value, uint16_t *high, int16_t *low) {
  const uint32_t bits = flap_f32_bits(value);
  *high = (uint16_t)((bits + 0x8000u) >> 16);
  *low = (int16_t)(bits - ((uint32_t)*high << 16));
}

/* Moments as they are at the start: all bytes zero. */
static states make_states(rig_random *random) {
  states s = {.weight = rig_normal_f32(random, ELEMENTS, 0.5), .high = rig_bytes(ELEMENTS * 2)};
  s.low = rig_bytes(ELEMENTS * 2);
  s.m = calloc(ELEMENTS, 1);
  s.v = calloc(ELEMENTS, 1);
  s.m_largest = calloc(MOMENTS, 4);
  s.v_largest = calloc(MOMENTS, 4);
  for (uint32_t i = 0; i < ELEMENTS; ++i)
    split(s.weight[i], &s.high[i], &s.low[i]);
  return s;
}

static states copy_states(const states *s) {
  return (states){.high = rig_copy(s->high, ELEMENTS * 2),
                  .low = rig_copy(s->low, ELEMENTS * 2),
                  .weight = rig_copy(s->weight, ELEMENTS * 4),
                  .m = rig_copy(s->m, ELEMENTS),
                  .v = rig_copy(s->v, ELEMENTS),
                  .m_largest = rig_copy(s->m_largest, MOMENTS * 4),
                  .v_largest = rig_copy(s->v_largest, MOMENTS * 4)};
}

static void free_states(states *s) {
  free(s->high), free(s->low), free(s->weight), free(s->m), free(s->v), free(s->m_largest), free(s->v_largest);
}

static void same_moments(const states *got, const states *want) {
  rig_same("codes of m", got->m, want->m, ELEMENTS);
  rig_same("codes of v", got->v, want->v, ELEMENTS);
  rig_same("largest m", got->m_largest, want->m_largest, MOMENTS * 4);
  rig_same("largest v", got->v_largest, want->v_largest, MOMENTS * 4);
}

static bool decays(const uint8_t *blocks, uint32_t block) {
  return (blocks[block / 8] >> (block % 8) & 1) != 0;
}

/* The new weight; volatile keeps the compiler from joining or reordering anything. */
static float reference_element(const flap_adamw *s, bool decay, float weight, float *m, float *v, float grad) {
  volatile float g = grad * s->gradient_scale;
  volatile float old_m = s->beta1 * *m, old_v = s->beta2 * *v, scaled = s->one_minus_beta2 * g;
  volatile float first = fmaf(s->one_minus_beta1, g, old_m), second = fmaf(scaled, g, old_v);
  *m = fabsf(first) < 0x1p-100f ? 0 : first;
  *v = second < 0x1p-100f ? 0 : second;
  volatile float root = sqrtf(*v);
  volatile float denom = fmaf(root, s->inverse_sqrt_bias2, s->epsilon);
  volatile float unbiased = *m * s->inverse_bias1;
  volatile float ratio = unbiased / denom;
  volatile float w = decay ? weight * s->decay : weight;
  return fmaf(-s->learning_rate, ratio, w);
}

static void reference_block(states *s, const flap_adamw *scalars, bool decay, uint32_t block, flap_dtype grad_dtype,
                            const void *grad) {
  float m[MOMENT], root[MOMENT], m_top = 0, v_top = 0;
  for (uint32_t i = 0; i < MOMENT; ++i) {
    const uint32_t at = block * MOMENT + i;
    volatile float ratio = ratio_of((uint32_t)abs(s->m[at]), 6), r = ratio_of(s->v[at], 7) * s->v_largest[block];
    m[i] = (s->m[at] < 0 ? -ratio : ratio) * s->m_largest[block];
    float v = r * r;
    s->weight[at] = reference_element(scalars, decay, s->weight[at], &m[i], &v, (float)rig_at(grad_dtype, grad, at));
    root[i] = sqrtf(v);
    m_top = fabsf(m[i]) > m_top ? fabsf(m[i]) : m_top;
    v_top = root[i] > v_top ? root[i] : v_top;
  }
  volatile float m_inverse = m_top > 0 ? 1 / m_top : 0, v_inverse = v_top > 0 ? 1 / v_top : 0;
  for (uint32_t i = 0; i < MOMENT; ++i) {
    const uint32_t at = block * MOMENT + i;
    volatile float m_ratio = fabsf(m[i]) * m_inverse, v_ratio = root[i] * v_inverse;
    const int32_t m_code = code_of(m_ratio, 6), v_code = code_of(v_ratio, 7);
    s->m[at] = (int8_t)(m[i] < 0 ? -m_code : m_code);
    s->v[at] = (uint8_t)(root[i] > 0 && v_code == 0 ? 1 : v_code);
  }
  s->m_largest[block] = m_top;
  s->v_largest[block] = v_top;
}

/* With fp16, `high` takes the weights and `weight` is the master. */
static void *master_at(states *s, flap_dtype dtype, uint64_t at) {
  return dtype == FLAP_F32 ? NULL : dtype == FLAP_F16 ? (void *)(s->weight + at) : (void *)(s->low + at);
}

/* One step in slices of at most `slice` blocks, whose first ones are wherever that puts them. */
static void step(flap_ops *ops, states *s, flap_dtype dtype, const flap_adamw *scalars, flap_dtype grad_dtype,
                 const void *grad, const uint8_t *decay_blocks, uint32_t slice) {
  for (uint32_t first = 0; first < BLOCKS; first += slice) {
    const uint32_t count = BLOCKS - first < slice ? BLOCKS - first : slice;
    const uint64_t at = (uint64_t)first * FLAP_OPS_BLOCK;
    uint8_t bits[BLOCKS / 8 + 1] = {0};
    for (uint32_t i = 0; i < count; ++i)
      if (decays(decay_blocks, first + i))
        bits[i / 8] = (uint8_t)(bits[i / 8] | 1u << i % 8);
    int32_t fault = 0;
    flap_ops_adamw_8bit(ops, scalars, dtype, grad_dtype,
                        dtype == FLAP_F32 ? (void *)(s->weight + at) : (void *)(s->high + at), master_at(s, dtype, at),
                        s->m + at, s->v + at, s->m_largest + at / MOMENT, s->v_largest + at / MOMENT,
                        (const unsigned char *)grad + at * flap_dtype_bytes(grad_dtype), bits, &fault,
                        (uint64_t)count * FLAP_OPS_BLOCK);
    ck_assert_int_eq(fault, 0);
  }
}

/* Gradients whose size differs between elements, with whole blocks of zeros, denormal ones and ones below any moment.
 */
static void *make_gradient(rig_random *random, flap_dtype dtype, uint32_t number) {
  float *values = rig_normal_f32(random, ELEMENTS, 1e-2);
  for (uint32_t i = 0; i < ELEMENTS; ++i) {
    const uint32_t block = i / MOMENT;
    values[i] *= (float)pow(10, -(double)(i % 7) * (block % 3));
    if (block % 5 == 0 || i % 97 == 0)
      values[i] = 0;
    if (block % 5 == 1)
      values[i] *= number == 2 ? 1e-38f : 1e-28f;
    if (block % 11 == 2 && number != 1)
      values[i] = 0; /* decays from the second step on */
  }
  if (dtype == FLAP_F32)
    return values;
  uint16_t *halves = rig_bytes(ELEMENTS * 2);
  for (uint32_t i = 0; i < ELEMENTS; ++i)
    halves[i] = flap_f32_to_bf16(values[i]);
  free(values);
  return halves;
}

static void operation(rig rigs[RIG_THREADS_MAX], flap_dtype grad_dtype) {
  rig_random random = rig_random_named("8-bit");
  states start = make_states(&random), want = copy_states(&start);
  const uint8_t decay_blocks[2] = {0xa6, 0x05};
  const uint32_t slices[RIG_THREADS_MAX] = {BLOCKS, 1, 3};
  states split_got[RIG_THREADS_MAX], f32_got[RIG_THREADS_MAX], f16_got[RIG_THREADS_MAX];
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    split_got[t] = copy_states(&start);
    f32_got[t] = copy_states(&start);
    f16_got[t] = copy_states(&start);
  }
  for (uint32_t number = 1; number <= 4; ++number) {
    const flap_adamw s = rig_adamw(number);
    void *grad = make_gradient(&random, grad_dtype, number);
    for (uint32_t block = 0; block < MOMENTS; ++block)
      reference_block(&want, &s, decays(decay_blocks, block / (FLAP_OPS_BLOCK / MOMENT)), block, grad_dtype, grad);
    for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
      step(rigs[t].ops, &split_got[t], FLAP_BF16, &s, grad_dtype, grad, decay_blocks, slices[t]);
      step(rigs[t].ops, &f32_got[t], FLAP_F32, &s, grad_dtype, grad, decay_blocks,
           slices[(t + number) % RIG_THREADS_MAX]);
      step(rigs[t].ops, &f16_got[t], FLAP_F16, &s, grad_dtype, grad, decay_blocks, slices[t]);
    }
    free(grad);
  }
  for (uint32_t i = 0; i < ELEMENTS; ++i)
    split(want.weight[i], &want.high[i], &want.low[i]);
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    rig_same("fp32 weight", f32_got[t].weight, want.weight, ELEMENTS * 4);
    rig_same("high half", split_got[t].high, want.high, ELEMENTS * 2);
    rig_same("low half", split_got[t].low, want.low, ELEMENTS * 2);
    same_moments(&f32_got[t], &want);
    same_moments(&split_got[t], &want);
    rig_same("master of fp16", f16_got[t].weight, want.weight, ELEMENTS * 4);
    same_moments(&f16_got[t], &want);
    for (uint32_t i = 0; i < ELEMENTS; ++i)
      if (f16_got[t].high[i] != flap_f32_to_f16(want.weight[i]))
        ck_abort_msg("element %u: %04x, of the master %a", i, f16_got[t].high[i], (double)want.weight[i]);
    free_states(&f16_got[t]);
    free_states(&split_got[t]);
    free_states(&f32_got[t]);
  }
  const uint8_t nothing[MOMENT] = {0}; /* block 0 never had a gradient */
  rig_same("m of a block of zeros", want.m, nothing, MOMENT);
  rig_same("v of a block of zeros", want.v, nothing, MOMENT);
  ck_assert(want.m_largest[0] == 0 && want.v_largest[0] == 0 && want.m_largest[3] > 0 && want.v_largest[3] > 0);
  free_states(&start);
  free_states(&want);
}

static void with_rigs(void (*body)(rig rigs[RIG_THREADS_MAX], flap_dtype dtype), flap_dtype dtype) {
  const flap_ops_limits limits = rig_limits(dtype);
  rig_with_threads(&limits, body);
}

START_TEST(adamw_8bit_any_slices_give_the_bits_of_scalar_code) {
  with_rigs(operation, _i == 0 ? FLAP_F32 : FLAP_BF16);
}
END_TEST

/* ---- what cannot be stored ---- */

static void faults(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  const flap_adamw s = rig_adamw(1);
  const uint8_t decay_blocks[2] = {0, 0};
  /* Infinite, NaN, and finite with a square that is not: whose weight may stay, but whose v has no code. */
  const float sorts[4] = {INFINITY, -INFINITY, NAN, 1e25f};
  rig_random random = rig_random_named("faults");
  for (uint32_t sort = 0; sort < 4; ++sort) {
    states start = make_states(&random);
    for (uint32_t i = 0; i < ELEMENTS && dtype == FLAP_F16; ++i)
      start.high[i] = flap_f32_to_f16(start.weight[i]);
    states got = copy_states(&start);
    const uint32_t bad = rig_between(&random, 0, ELEMENTS - 1), block = bad / MOMENT;
    float *grad = rig_normal_f32(&random, ELEMENTS, 1e-2);
    grad[bad] = sorts[sort];
    int32_t fault = 0;
    flap_ops_adamw_8bit(rigs[sort % 3].ops, &s, dtype, FLAP_F32,
                        dtype == FLAP_F32 ? (void *)got.weight : (void *)got.high, master_at(&got, dtype, 0), got.m,
                        got.v, got.m_largest, got.v_largest, grad, decay_blocks, &fault, ELEMENTS);
    ck_assert_int_eq(fault, 1);
    ck_assert(got.v[bad] == 0 && (got.m[bad] == 0 || sort == 3));
    ck_assert(got.high[bad] == start.high[bad] && got.low[bad] == start.low[bad]);
    rig_same("weight", &got.weight[bad], &start.weight[bad], 4);
    ck_assert(isfinite(got.m_largest[block]) && got.v_largest[block] > 0 && got.v_largest[block] < 1);
    const uint32_t good = bad % MOMENT > 0 ? bad - 1 : bad + 1;
    ck_assert_msg(got.v[good] > 0, "a neighbour in the block lost its second moment");
    const bool moved = dtype == FLAP_BF16 ? got.low[good] != start.low[good] : got.weight[good] != start.weight[good];
    ck_assert_msg(moved, "a neighbour in the block was not updated");
    free(grad);
    free_states(&start);
    free_states(&got);
  }
}

START_TEST(adamw_8bit_moment_not_finite_is_reported_and_harms_no_neighbour) {
  with_rigs(faults, rig_dtype(_i));
}
END_TEST

/* ---- accuracy ---- */

/* Minimises sum of curvature/2 (w - 1)² from w = 0 with noisy gradients, in fp32 and in 8 bits, where curvatures in a
 * block span `decades`. Fills how far the two weights are apart, relative to the way that fp32 went, and the longest
 * step in units of the learning rate. */
static void descend(flap_ops *ops, double decades, double *apart_out, double *longest_out) {
  const uint32_t n = FLAP_OPS_BLOCK;
  rig_random random = rig_random_named("descend");
  float *eight = calloc(n, 4), *whole = calloc(n, 4), *m = calloc(n, 4), *v = calloc(n, 4), *grad = calloc(n, 4);
  int8_t *m_codes = calloc(n, 1);
  uint8_t *v_codes = calloc(n, 1);
  float *m_largest = calloc(n / MOMENT, 4), *v_largest = calloc(n / MOMENT, 4), *curvature = calloc(n, 4);
  for (uint32_t i = 0; i < n; ++i)
    curvature[i] = (float)pow(10, -decades * (i % MOMENT) / (MOMENT - 1));
  const uint8_t decay_blocks = 0;
  int32_t fault = 0;
  *longest_out = 0;
  for (uint32_t number = 1; number <= 400; ++number) {
    flap_adamw s = rig_adamw(number);
    s.learning_rate = 5e-3f;
    float *noise = rig_normal_f32(&random, n, 0.3), *before = rig_copy(eight, n * 4);
    for (uint32_t i = 0; i < n; ++i)
      grad[i] = curvature[i] * (whole[i] - 1 + noise[i]);
    flap_ops_adamw(ops, &s, FLAP_F32, FLAP_F32, whole, NULL, m, v, grad, &decay_blocks, &fault, n);
    for (uint32_t i = 0; i < n; ++i)
      grad[i] = curvature[i] * (eight[i] - 1 + noise[i]);
    flap_ops_adamw_8bit(ops, &s, FLAP_F32, FLAP_F32, eight, NULL, m_codes, v_codes, m_largest, v_largest, grad,
                        &decay_blocks, &fault, n);
    for (uint32_t i = 0; i < n; ++i)
      *longest_out = fmax(*longest_out, fabs((double)eight[i] - (double)before[i]) / (double)s.learning_rate);
    free(noise), free(before);
  }
  double apart = 0, way = 0;
  for (uint32_t i = 0; i < n; ++i) {
    apart += pow((double)eight[i] - (double)whole[i], 2);
    way += pow((double)whole[i], 2);
  }
  *apart_out = sqrt(apart / way);
  ck_assert_int_eq(fault, 0);
  free(eight), free(whole), free(m), free(v), free(grad), free(m_codes), free(v_codes), free(m_largest);
  free(v_largest), free(curvature);
}

static void accuracy(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  (void)dtype;
  const double decades[3] = {0, 2, 5}, apart_max[3] = {0.003, 0.01, 0.06};
  for (int i = 0; i < 3; ++i) {
    double apart, longest;
    descend(rigs[0].ops, decades[i], &apart, &longest);
    printf("gradients over %.0f decades: weights %.4f apart, longest step %.2f learning rates\n", decades[i], apart,
           longest);
    ck_assert_msg(apart < apart_max[i], "8 bits and fp32 are %.4f apart", apart);
    ck_assert_msg(longest < 4, "one step was %.2f times the learning rate", longest);
  }
}

START_TEST(adamw_8bit_stays_near_fp32_and_takes_no_huge_step) {
  with_rigs(accuracy, FLAP_F32);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_moments");
  tcase_set_timeout(tests, 300);
  tcase_add_test(tests, moments_codes_stand_for_the_dynamic_tree);
  tcase_add_test(tests, moments_codes_are_the_nearest_and_v_never_zero);
  tcase_add_loop_test(tests, adamw_8bit_any_slices_give_the_bits_of_scalar_code, 0, 2);
  tcase_add_loop_test(tests, adamw_8bit_moment_not_finite_is_reported_and_harms_no_neighbour, 0, RIG_DTYPES);
  tcase_add_test(tests, adamw_8bit_stays_near_fp32_and_takes_no_huge_step);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
