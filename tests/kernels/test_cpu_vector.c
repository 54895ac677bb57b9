/* Every instruction set gives the same bits, in every loop, at lengths around a vector; and e^x is near e^x. */
#include "kernels/cpu/cpu_vector.h"
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define LENGTH_MAX 300u
#define ROOM 304u /* whole vectors */
#define OUTPUTS 34u

/* What all loops made of the same inputs. */
typedef struct results {
  float values[OUTPUTS][ROOM];
  uint16_t halves[5][LENGTH_MAX];
  bool refused;
} results;

static void fill_results(const flap_cpu_vector *v, results *r, const float *a, const float *b, const float *c,
                         const uint16_t *half, size_t count) {
  memset(r, 0, sizeof *r);
  v->from_bf16(r->values[0], count, half, count, 1, count);
  v->to_bf16(r->halves[0], count, a, count, 1, count);
  v->add(r->values[1], a, b, count);
  memcpy(r->values[2], a, count * 4);
  v->scale(r->values[2], 1.7f, count);
  memcpy(r->values[3], a, count * 4);
  v->round_bf16(r->values[3], count);
  v->squares(r->values[4], a, count);
  v->dot(r->values[5], a, b, count);
  r->values[6][0] = v->max(a, count, -INFINITY);
  v->normalise(r->values[7], a, b, 0.3f, FLAP_BF16, count);
  v->normalise(r->values[8], a, b, 0.3f, FLAP_F32, count);
  v->norm_dot(r->values[9], a, b, c, count);
  v->norm_backward(r->values[10], r->values[11], a, b, c, a, 0.3f, 0.1f, FLAP_BF16, count);
  v->norm_backward(r->values[12], r->values[13], a, b, c, NULL, 0.3f, 0.1f, FLAP_F32, count);
  memcpy(r->values[14], a, count * 4);
  v->rope(r->values[14], b, c, 1, count / 2 * 2, true);
  v->swiglu(r->values[15], a, b, count % 2 == 0 ? FLAP_BF16 : FLAP_F32, count);
  v->swiglu_backward(r->values[16], r->values[17], a, b, c, count % 2 == 0 ? FLAP_BF16 : FLAP_F32, count);
  memcpy(r->values[18], a, count * 4);
  float maximum = 0.5f, sum = 2;
  r->values[6][1] = v->softmax_row(r->values[18], count - count / 3, count, 0.7f, &maximum, &sum);
  r->values[6][2] = maximum;
  r->values[6][3] = sum;
  memcpy(r->values[19], a, count * 4);
  memcpy(r->values[20], b, count * 4);
  v->softmax_row_backward(r->values[19], r->values[20], count - count / 3, count, 0.7f, 1, 0.2f);
  v->exp_sums(r->values[21], a, 2, count);
  v->softmax(r->values[22], a, 2, 1, 0.5f, count);
  const flap_adamw s = {.learning_rate = 1e-3f,
                        .beta1 = 0.9f,
                        .beta2 = 0.99f,
                        .one_minus_beta1 = 0.1f,
                        .one_minus_beta2 = 0.01f,
                        .inverse_bias1 = 2,
                        .inverse_sqrt_bias2 = 3,
                        .epsilon = 1e-8f,
                        .gradient_scale = 0.9f};
  memcpy(r->values[23], a, count * 4);
  float moment[LENGTH_MAX], second[LENGTH_MAX];
  memcpy(moment, b, count * 4);
  for (size_t i = 0; i < count; ++i)
    second[i] = c[i] * c[i];
  memcpy(r->halves[1], half, count * 2);
  memcpy(r->halves[2], half, count * 2);
  r->refused = v->adamw_f32(&s, 0.99f, r->values[23], moment, second, c, count);
  r->refused |= v->adamw_split(&s, 0.99f, r->halves[1], (int16_t *)r->halves[2], moment, second, c, count);
  v->add(r->values[23], r->values[23], moment, count);
  v->add(r->values[23], r->values[23], second, count);

  v->from_f16(r->values[24], count, half, count, 1, count);
  v->to_f16(r->halves[3], count, a, count, 1, count);
  memcpy(r->values[25], a, count * 4);
  v->round_f16(r->values[25], count);
  v->normalise(r->values[26], a, b, 0.3f, FLAP_F16, count);
  v->norm_backward(r->values[27], r->values[28], a, b, c, a, 0.3f, 0.1f, FLAP_F16, count);
  v->swiglu(r->values[29], a, b, FLAP_F16, count);
  v->swiglu_backward(r->values[30], r->values[31], a, b, c, FLAP_F16, count);
  memcpy(r->values[32], a, count * 4);
  r->refused |= v->adamw_f16(&s, 0.99f, r->halves[4], r->values[32], moment, second, c, count);
  memcpy(r->values[33], moment, count * 4);
}

START_TEST(vector_tables_give_the_same_bits) {
  const flap_cpu_vector *tables[3];
  const uint32_t count = flap_cpu_vector_list(tables);
  rig_random random = rig_random_named("vector");
  for (uint32_t length = 1; length <= LENGTH_MAX; length += length < 70 ? 1 : 23) {
    float *a = rig_normal_f32(&random, length, 3), *b = rig_normal_f32(&random, length, 1);
    float *c = rig_normal_f32(&random, length, 0.1);
    uint16_t *half = rig_normal(&random, FLAP_BF16, length, 1);
    results *first = malloc(sizeof *first), *other = malloc(sizeof *other);
    fill_results(tables[0], first, a, b, c, half, length);
    for (uint32_t i = 1; i < count; ++i) {
      fill_results(tables[i], other, a, b, c, half, length);
      for (uint32_t output = 0; output < OUTPUTS; ++output) {
        char what[64];
        (void)snprintf(what, sizeof what, "%s, output %u, length %u", tables[i]->name, output, length);
        rig_same(what, first->values[output], other->values[output], sizeof first->values[output]);
      }
      rig_same("halves", first->halves, other->halves, sizeof first->halves);
      ck_assert(first->refused == other->refused);
    }
    free(a), free(b), free(c), free(half), free(first), free(other);
  }
}
END_TEST

#define MOMENTS 1024u

typedef struct moments {
  int8_t m_codes[MOMENTS];
  uint8_t v_codes[MOMENTS];
  float m_largest[MOMENTS / FLAP_OPS_MOMENT_BLOCK], v_largest[MOMENTS / FLAP_OPS_MOMENT_BLOCK];
  float m[MOMENTS], v[MOMENTS];
} moments;

/* Ordinary numbers, zeros, denormals, the largest, and what is not finite: the first block has all of these, the second
 * is zero, the third has denormals alone. */
static void fill_moments(rig_random *random, float *m, float *v) {
  static const float odd[8] = {0.0f, -0.0f, 0x1p-149f, -0x1p-140f, 0x1.fffffep127f, INFINITY, -INFINITY, NAN};
  float *wide = rig_normal_f32(random, MOMENTS, 12);
  for (uint32_t i = 0; i < MOMENTS; ++i) {
    m[i] = (i % 2 == 0 ? 1.0f : -1.0f) * (float)exp((double)wide[i]);
    v[i] = m[i] * m[i];
    const uint32_t block = i / FLAP_OPS_MOMENT_BLOCK;
    if (block == 0 && i % 5 == 0) {
      m[i] = odd[rig_between(random, 0, 7)];
      v[i] = fabsf(odd[rig_between(random, 0, 7)]);
    } else if (block == 1) {
      m[i] = v[i] = 0;
    } else if (block == 2) {
      m[i] *= 0x1p-149f;
      v[i] *= 0x1p-149f;
    }
  }
  free(wide);
}

START_TEST(vector_tables_give_the_same_moments) {
  const flap_cpu_vector *tables[3];
  const uint32_t count = flap_cpu_vector_list(tables);
  rig_random random = rig_random_named("moments");
  for (uint32_t round = 0; round < 50; ++round) {
    float m[MOMENTS], v[MOMENTS];
    fill_moments(&random, m, v);
    moments *first = calloc(1, sizeof *first), *other = calloc(1, sizeof *other);
    for (uint32_t t = 0; t < count; ++t) {
      moments *to = t == 0 ? first : other;
      const bool refused =
          tables[t]->moments_store(to->m_codes, to->v_codes, to->m_largest, to->v_largest, m, v, MOMENTS);
      ck_assert(refused);
      tables[t]->moments_load(to->m, to->v, to->m_codes, to->v_codes, to->m_largest, to->v_largest, MOMENTS);
      if (t > 0)
        rig_same(tables[t]->name, first, other, sizeof *first);
    }
    for (uint32_t i = 0; i < MOMENTS; ++i)
      ck_assert(isfinite(first->m[i]) && isfinite(first->v_largest[i / FLAP_OPS_MOMENT_BLOCK]));
    free(first), free(other);
  }
}
END_TEST

START_TEST(vector_exponential_within_two_ulp) {
  const flap_cpu_vector *tables[3];
  (void)flap_cpu_vector_list(tables);
  double worst = 0;
  for (int32_t i = -870000; i <= 880000; i += 3) {
    const float x = (float)i * 1e-4f;
    float y;
    tables[0]->exponential(&y, &x, 1);
    const double want = exp((double)x), off = fabs((double)y - want) / want * 0x1p23;
    worst = off > worst ? off : worst;
  }
  ck_assert_msg(worst < 2, "off by %.3f units of 2^-23", worst);
}
END_TEST

START_TEST(vector_exponential_ends_are_zero_infinity_and_nan) {
  const flap_cpu_vector *tables[3];
  const uint32_t count = flap_cpu_vector_list(tables);
  const float x[8] = {-INFINITY, -1e30f, -88.0f, 0.0f, -0.0f, 89.0f, INFINITY, NAN};
  for (uint32_t i = 0; i < count; ++i) {
    float y[8];
    tables[i]->exponential(y, x, 8);
    ck_assert(y[0] == 0 && y[1] == 0 && y[2] == 0 && y[3] == 1 && y[4] == 1);
    ck_assert(isinf(y[5]) && isinf(y[6]) && isnan(y[7]));
  }
}
END_TEST

START_TEST(vector_to_bf16_equals_the_scalar_for_every_upper_half) {
  const flap_cpu_vector *tables[3];
  const uint32_t count = flap_cpu_vector_list(tables);
  const uint32_t lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t high = 0; high < 65536; ++high) {
    float x[6];
    for (uint32_t i = 0; i < 6; ++i)
      x[i] = flap_f32_from_bits(high << 16 | lows[i]);
    for (uint32_t t = 0; t < count; ++t) {
      uint16_t y[6];
      tables[t]->to_bf16(y, 6, x, 6, 1, 6);
      for (uint32_t i = 0; i < 6; ++i)
        if (y[i] != flap_f32_to_bf16(x[i]))
          ck_abort_msg("%s: %08x became %04x", tables[t]->name, high << 16 | lows[i], y[i]);
    }
  }
}
END_TEST

/* Every fp16 number there is, and every fp32 number around each: the processor's conversions are ours to the bit, with
 * subnormal numbers, infinity and NaN. */
START_TEST(vector_f16_equals_the_scalar_for_every_value) {
  const flap_cpu_vector *tables[3];
  const uint32_t count = flap_cpu_vector_list(tables);
  static const int32_t off[] = {-0x1001, -0x1000, -0xfff, -1, 0, 1, 0xfff, 0x1000, 0x1001};
  for (uint32_t start = 0; start < 65536; start += 37) { /* whole vectors, and single elements behind them */
    uint16_t half[37], back[37];
    float x[37], y[37];
    for (uint32_t i = 0; i < 37; ++i)
      half[i] = (uint16_t)(start + i);
    for (uint32_t t = 0; t < count; ++t) {
      tables[t]->from_f16(y, 37, half, 37, 1, 37);
      for (uint32_t i = 0; i < 37; ++i)
        if (flap_f32_bits(y[i]) != flap_f32_bits(flap_f16_to_f32(half[i])))
          ck_abort_msg("%s: %04x became %08x", tables[t]->name, half[i], flap_f32_bits(y[i]));
      for (uint32_t k = 0; k < sizeof off / sizeof *off; ++k) {
        for (uint32_t i = 0; i < 37; ++i)
          x[i] = flap_f32_from_bits(flap_f32_bits(flap_f16_to_f32(half[i])) + (uint32_t)off[k]);
        tables[t]->to_f16(back, 37, x, 37, 1, 37);
        for (uint32_t i = 0; i < 37; ++i)
          if (back[i] != flap_f32_to_f16(x[i]))
            ck_abort_msg("%s: %08x became %04x, expected %04x", tables[t]->name, flap_f32_bits(x[i]), back[i],
                         flap_f32_to_f16(x[i]));
      }
    }
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("cpu_vector");
  tcase_set_timeout(tests, 300);
  tcase_add_test(tests, vector_tables_give_the_same_bits);
  tcase_add_test(tests, vector_tables_give_the_same_moments);
  tcase_add_test(tests, vector_exponential_within_two_ulp);
  tcase_add_test(tests, vector_exponential_ends_are_zero_infinity_and_nan);
  tcase_add_test(tests, vector_to_bf16_equals_the_scalar_for_every_upper_half);
  tcase_add_test(tests, vector_f16_equals_the_scalar_for_every_value);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
