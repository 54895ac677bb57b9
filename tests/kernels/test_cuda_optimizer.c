/* AdamW, with fp32 and with 8-bit moments, and gradient rounding on cuda: bit for bit the cpu's, over several steps and
 * many slices. */
#include "tests/kernels/gpu_rig.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#define BLOCKS 300u
#define ELEMENTS ((uint64_t)BLOCKS * FLAP_OPS_BLOCK)

static void with_rig(void (*body)(gpu_rig *g, rig_random *random, int index), int index) {
  const flap_ops_limits limits = rig_limits(FLAP_BF16);
  gpu_rig g;
  gpu_rig_open(&g, &limits);
  rig_random random = rig_random_named("cuda optimizer");
  body(&g, &random, index);
  gpu_rig_close(&g);
}

/* The states of one tensor: as split halves, as an fp16 weight beside its master, or as one fp32 weight (whose `master`
 * nobody uses). Words of 16 bits are operands of bf16, because those of fp16 are fp32 on the cpu's side. */
typedef struct states {
  operand weight, master, m, v, fault;
  flap_dtype dtype;
} states;

static states make_states(gpu_rig *g, rig_random *random, flap_dtype dtype) {
  states s = {.dtype = dtype};
  float *weight = rig_normal_f32(random, ELEMENTS, 0.5), *m = rig_normal_f32(random, ELEMENTS, 1e-3);
  float *v = rig_normal_f32(random, ELEMENTS, 1e-3);
  uint16_t *high = rig_bytes(ELEMENTS * 2), *low = rig_bytes(ELEMENTS * 2);
  for (uint64_t i = 0; i < ELEMENTS; ++i) {
    v[i] = v[i] * v[i];
    if (i % 97 == 0)
      m[i] = v[i] = 0;
    if (i % 101 == 0)
      m[i] = 0x1.1p-100f, v[i] = 0x1.1p-100f; /* fall below the limit in the first step */
    if (i % 103 == 0)
      v[i] = 0x1p-140f; /* a denormal, which nobody may flush before the comparison */
    const uint32_t bits = flap_f32_bits(weight[i]);
    high[i] = (uint16_t)((bits + 0x8000u) >> 16);
    low[i] = (uint16_t)(bits - ((uint32_t)high[i] << 16));
  }
  for (uint64_t i = 0; i < ELEMENTS && dtype == FLAP_F16; ++i)
    high[i] = flap_f32_to_f16(weight[i]);
  s.weight = dtype == FLAP_F32 ? operand_of(g, FLAP_F32, weight, ELEMENTS) : operand_of(g, FLAP_BF16, high, ELEMENTS);
  s.master = dtype == FLAP_F16 ? operand_of(g, FLAP_F32, weight, ELEMENTS) : operand_of(g, FLAP_BF16, low, ELEMENTS);
  s.m = operand_of(g, FLAP_F32, m, ELEMENTS);
  s.v = operand_of(g, FLAP_F32, v, ELEMENTS);
  const int32_t none = 0;
  s.fault = operand_of(g, FLAP_I32, &none, 1);
  free(weight), free(m), free(v), free(high), free(low);
  return s;
}

static void free_states(states *s) {
  operand_free(&s->weight), operand_free(&s->master), operand_free(&s->m), operand_free(&s->v), operand_free(&s->fault);
}

static unsigned char *at(void *base, uint64_t element, uint64_t bytes) {
  return (unsigned char *)base + element * bytes;
}

/* One step on both sides; the GPU's in slices of `slice` elements. */
static void step(gpu_rig *g, states *s, const flap_adamw *scalars, const operand *grad, uint64_t slice) {
  uint8_t decays[BLOCKS / 8 + 1];
  for (uint32_t i = 0; i < sizeof decays; ++i)
    decays[i] = (uint8_t)(i * 37 + 0xa6);
  const bool whole = s->dtype == FLAP_F32;
  const uint64_t master_bytes = flap_dtype_bytes(s->master.dtype);
  flap_ops_adamw(g->cpu.ops, scalars, s->dtype, grad->dtype, s->weight.cpu, whole ? NULL : s->master.cpu, s->m.cpu,
                 s->v.cpu, grad->cpu, decays, s->fault.cpu, ELEMENTS);
  for (uint64_t start = 0; start < ELEMENTS; start += slice) {
    const uint64_t count = ELEMENTS - start < slice ? ELEMENTS - start : slice, block = start / FLAP_OPS_BLOCK;
    flap_ops_adamw(g->ops, scalars, s->dtype, grad->dtype, at(s->weight.gpu, start, flap_dtype_bytes(s->dtype)),
                   whole ? NULL : at(s->master.gpu, start, master_bytes), (float *)s->m.gpu + start,
                   (float *)s->v.gpu + start, at(grad->gpu, start, flap_dtype_bytes(grad->dtype)), decays + block / 8,
                   s->fault.gpu, count);
  }
}

static void same_states(states *s) {
  operand_same("weight", &s->weight);
  operand_same("master", &s->master);
  operand_same("m", &s->m);
  operand_same("v", &s->v);
  operand_same("fault", &s->fault);
}

static void adamw(gpu_rig *g, rig_random *random, int index) {
  const flap_dtype grad_dtype = index % 2 == 0 ? FLAP_F32 : FLAP_BF16;
  const uint64_t slices[] = {ELEMENTS, 8 * FLAP_OPS_BLOCK, 64 * FLAP_OPS_BLOCK, ELEMENTS};
  states s = make_states(g, random, rig_dtype(index / 2));
  for (uint32_t i = 1; i <= 4; ++i) {
    const flap_adamw scalars = rig_adamw(i);
    operand grad = operand_normal(g, random, grad_dtype, ELEMENTS, i == 3 ? 1e-18 : 1e-2, i == 4 ? 1 : 0);
    step(g, &s, &scalars, &grad, slices[i - 1]);
    same_states(&s);
    operand_free(&grad);
  }
  ck_assert_int_eq(*(int32_t *)s.fault.cpu, 0);
  free_states(&s);
}

START_TEST(adamw_has_the_bits_of_the_cpu) {
  with_rig(adamw, _i);
}
END_TEST

/* Any finite weight, NaN and infinite gradients: what is refused is refused on both sides. */
static void faults(gpu_rig *g, rig_random *random, int index) {
  states s = make_states(g, random, rig_dtype(index));
  flap_adamw scalars = rig_adamw(1);
  /* Where about half of the weights would pass the type's last number: of fp16, 65520 is the first that is too large.
   */
  scalars.learning_rate = s.dtype == FLAP_BF16 ? 0x1p112f : s.dtype == FLAP_F16 ? 65520.0f : 0x1p105f;
  scalars.gradient_scale = 1;
  float *values = rig_normal_f32(random, ELEMENTS, 1e15);
  for (uint64_t i = 0; i < ELEMENTS; i += 1000)
    values[i] = i % 3000 == 0 ? (float)INFINITY : i % 2000 == 0 ? (float)-INFINITY : FLT_MAX;
  operand grad = operand_of(g, FLAP_F32, values, ELEMENTS);
  step(g, &s, &scalars, &grad, ELEMENTS);
  same_states(&s);
  ck_assert_int_eq(*(int32_t *)s.fault.cpu, 1);
  free(values);
  operand_free(&grad);
  free_states(&s);
}

START_TEST(adamw_refuses_what_the_cpu_refuses) {
  with_rig(faults, _i);
}
END_TEST

/* A NaN has many bit patterns, and the two sides may pick another: only weights and the fault count. */
static void not_a_number(gpu_rig *g, rig_random *random, int index) {
  states s = make_states(g, random, rig_dtype(index));
  const flap_adamw scalars = rig_adamw(1);
  float *values = rig_normal_f32(random, ELEMENTS, 1);
  values[rig_between(random, 0, ELEMENTS - 1)] = NAN;
  operand grad = operand_of(g, FLAP_F32, values, ELEMENTS);
  step(g, &s, &scalars, &grad, ELEMENTS);
  operand_same("weight", &s.weight);
  operand_same("master", &s.master);
  operand_same("fault", &s.fault);
  ck_assert_int_eq(*(int32_t *)s.fault.cpu, 1);
  free(values);
  operand_free(&grad);
  free_states(&s);
}

START_TEST(adamw_not_a_number_leaves_the_weight) {
  with_rig(not_a_number, _i);
}
END_TEST

/* ---- 8-bit moments ---- */

/* Bytes are operands of fp32, four to each. */
typedef struct states8 {
  operand weight, master, m, v, m_largest, v_largest, fault; /* as in states */
  flap_dtype dtype;
} states8;

static operand zeros(gpu_rig *g, uint64_t bytes) {
  void *values = calloc(1, bytes);
  operand o = operand_of(g, FLAP_F32, values, bytes / 4);
  free(values);
  return o;
}

static states8 make_states8(gpu_rig *g, rig_random *random, flap_dtype dtype) {
  states8 s = {.dtype = dtype};
  float *weight = rig_normal_f32(random, ELEMENTS, 0.5);
  uint16_t *high = rig_bytes(ELEMENTS * 2), *low = rig_bytes(ELEMENTS * 2);
  for (uint64_t i = 0; i < ELEMENTS; ++i) {
    const uint32_t bits = flap_f32_bits(weight[i]);
    high[i] = (uint16_t)((bits + 0x8000u) >> 16);
    low[i] = (uint16_t)(bits - ((uint32_t)high[i] << 16));
  }
  for (uint64_t i = 0; i < ELEMENTS && dtype == FLAP_F16; ++i)
    high[i] = flap_f32_to_f16(weight[i]);
  s.weight = dtype == FLAP_F32 ? operand_of(g, FLAP_F32, weight, ELEMENTS) : operand_of(g, FLAP_BF16, high, ELEMENTS);
  s.master = dtype == FLAP_F16 ? operand_of(g, FLAP_F32, weight, ELEMENTS) : operand_of(g, FLAP_BF16, low, ELEMENTS);
  s.m = zeros(g, ELEMENTS);
  s.v = zeros(g, ELEMENTS);
  s.m_largest = zeros(g, ELEMENTS / FLAP_OPS_MOMENT_BLOCK * 4);
  s.v_largest = zeros(g, ELEMENTS / FLAP_OPS_MOMENT_BLOCK * 4);
  s.fault = zeros(g, 4);
  free(weight), free(high), free(low);
  return s;
}

static void free_states8(states8 *s) {
  operand_free(&s->weight), operand_free(&s->master), operand_free(&s->m), operand_free(&s->v);
  operand_free(&s->m_largest), operand_free(&s->v_largest), operand_free(&s->fault);
}

/* One step on both sides; the GPU's in slices of `slice` elements. */
static void step8(gpu_rig *g, states8 *s, const flap_adamw *scalars, const operand *grad, uint64_t slice) {
  uint8_t decays[BLOCKS / 8 + 1];
  for (uint32_t i = 0; i < sizeof decays; ++i)
    decays[i] = (uint8_t)(i * 37 + 0xa6);
  const bool whole = s->dtype == FLAP_F32;
  const uint64_t master_bytes = flap_dtype_bytes(s->master.dtype);
  flap_ops_adamw_8bit(g->cpu.ops, scalars, s->dtype, grad->dtype, s->weight.cpu, whole ? NULL : s->master.cpu, s->m.cpu,
                      s->v.cpu, s->m_largest.cpu, s->v_largest.cpu, grad->cpu, decays, s->fault.cpu, ELEMENTS);
  for (uint64_t start = 0; start < ELEMENTS; start += slice) {
    const uint64_t count = ELEMENTS - start < slice ? ELEMENTS - start : slice, block = start / FLAP_OPS_BLOCK;
    const uint64_t moments = start / FLAP_OPS_MOMENT_BLOCK;
    flap_ops_adamw_8bit(g->ops, scalars, s->dtype, grad->dtype, at(s->weight.gpu, start, flap_dtype_bytes(s->dtype)),
                        whole ? NULL : at(s->master.gpu, start, master_bytes), (int8_t *)s->m.gpu + start,
                        (uint8_t *)s->v.gpu + start, (float *)s->m_largest.gpu + moments,
                        (float *)s->v_largest.gpu + moments, at(grad->gpu, start, flap_dtype_bytes(grad->dtype)),
                        decays + block / 8, s->fault.gpu, count);
  }
}

static void same_states8(states8 *s) {
  operand_same("largest m", &s->m_largest);
  operand_same("largest v", &s->v_largest);
  operand_same("codes of m", &s->m);
  operand_same("codes of v", &s->v);
  operand_same("weight", &s->weight);
  operand_same("master", &s->master);
  operand_same("fault", &s->fault);
}

/* Gradients over many orders of magnitude, blocks of zeros, and ones whose squares no moment holds. */
static operand wide_gradient(gpu_rig *g, rig_random *random, flap_dtype dtype, uint32_t shift) {
  float *values = rig_normal_f32(random, ELEMENTS, 1e-2);
  for (uint64_t i = 0; i < ELEMENTS; ++i) {
    const uint64_t block = i / FLAP_OPS_MOMENT_BLOCK;
    values[i] *= (float)pow(10, -(double)(i % 7) * (double)(block % 3));
    if (block % 5 == 0 || i % 97 == 0)
      values[i] = 0;
    else if (block % 5 == 1)
      values[i] *= block % 2 == 0 ? 1e-38f : 1e-28f;
  }
  uint16_t *halves = rig_bytes(ELEMENTS * 2);
  for (uint64_t i = 0; i < ELEMENTS; ++i)
    halves[i] = flap_f32_to_bf16(values[i]);
  operand plain = operand_of(g, dtype, dtype == FLAP_F32 ? (void *)values : (void *)halves, ELEMENTS);
  operand grad = operand_copy(&plain, shift);
  operand_free(&plain);
  free(values), free(halves);
  return grad;
}

static void adamw_8bit(gpu_rig *g, rig_random *random, int index) {
  const flap_dtype grad_dtype = index % 2 == 0 ? FLAP_F32 : FLAP_BF16;
  const uint64_t slices[] = {ELEMENTS, 8 * FLAP_OPS_BLOCK, 64 * FLAP_OPS_BLOCK, ELEMENTS};
  states8 s = make_states8(g, random, rig_dtype(index / 2));
  for (uint32_t i = 1; i <= 4; ++i) {
    const flap_adamw scalars = rig_adamw(i);
    operand grad = wide_gradient(g, random, grad_dtype, i == 4 ? 1 : 0);
    step8(g, &s, &scalars, &grad, slices[i - 1]);
    same_states8(&s);
    operand_free(&grad);
  }
  ck_assert_int_eq(*(int32_t *)s.fault.cpu, 0);
  free_states8(&s);
}

START_TEST(adamw_8bit_has_the_bits_of_the_cpu) {
  with_rig(adamw_8bit, _i);
}
END_TEST

/* No bit pattern of a NaN is stored, so everything is compared. */
static void faults_8bit(gpu_rig *g, rig_random *random, int index) {
  states8 s = make_states8(g, random, rig_dtype(index));
  const flap_adamw scalars = rig_adamw(1);
  const float odd[5] = {INFINITY, -INFINITY, NAN, FLT_MAX, 1e25f};
  float *values = rig_normal_f32(random, ELEMENTS, 1);
  for (uint64_t i = 0; i < ELEMENTS; i += 1000)
    values[i] = odd[i / 1000 % 5];
  operand grad = operand_of(g, FLAP_F32, values, ELEMENTS);
  step8(g, &s, &scalars, &grad, ELEMENTS);
  same_states8(&s);
  ck_assert_int_eq(*(int32_t *)s.fault.cpu, 1);
  free(values);
  operand_free(&grad);
  free_states8(&s);
}

START_TEST(adamw_8bit_refuses_what_the_cpu_refuses) {
  with_rig(faults_8bit, _i);
}
END_TEST

static void gradient(gpu_rig *g, rig_random *random, int index) {
  const flap_dtype dtype = index == 0 ? FLAP_F32 : FLAP_BF16;
  float *values = rig_normal_f32(random, ELEMENTS, 1);
  values[5] = flap_f32_from_bits(0x3f808000u); /* ties: to even */
  values[6] = flap_f32_from_bits(0x3f818000u);
  operand sum = operand_of(g, FLAP_F32, values, ELEMENTS), odd = operand_copy(&sum, 1);
  operand grad = operand_empty(g, dtype, ELEMENTS, 0), again = operand_empty(g, dtype, ELEMENTS, 1);
  operand squares = operand_empty(g, FLAP_F32, BLOCKS, 0), other = operand_empty(g, FLAP_F32, BLOCKS, 0);
  operand measured = operand_empty(g, FLAP_F32, BLOCKS, 0);
  operand final = operand_empty(g, dtype, ELEMENTS, 0), unmeasured = operand_empty(g, dtype, ELEMENTS, 0);
  operand of_final = operand_empty(g, FLAP_F32, BLOCKS, 0);
  flap_ops_gradient_store(g->ops, dtype, grad.gpu, squares.gpu, FLAP_F32, sum.gpu, ELEMENTS);
  flap_ops_gradient_store(g->ops, dtype, again.gpu, other.gpu, FLAP_F32, odd.gpu, ELEMENTS);
  flap_ops_gradient_store(g->ops, dtype, NULL, measured.gpu, FLAP_F32, sum.gpu, ELEMENTS);
  flap_ops_gradient_store(g->ops, dtype, final.gpu, of_final.gpu, dtype, grad.gpu, ELEMENTS);
  flap_ops_gradient_store(g->ops, dtype, unmeasured.gpu, NULL, FLAP_F32, sum.gpu, ELEMENTS);
  flap_ops_gradient_store(g->cpu.ops, dtype, grad.cpu, squares.cpu, FLAP_F32, sum.cpu, ELEMENTS);
  operand_same("grad", &grad);
  operands_equal("grad at an odd address", &grad, &again);
  operand_near("squares", &squares, 2e-6, 0);
  operands_equal("squares, again", &squares, &other);
  operands_equal("squares only measured", &squares, &measured);
  operands_equal("grad that was final", &grad, &final);
  operands_equal("squares of what was final", &squares, &of_final);
  operands_equal("grad without squares", &grad, &unmeasured);
  operand_free(&sum), operand_free(&odd), operand_free(&grad), operand_free(&again);
  operand_free(&squares), operand_free(&other), operand_free(&measured), operand_free(&final), operand_free(&of_final),
      operand_free(&unmeasured);
  free(values);
}

START_TEST(gradient_store_has_the_bits_of_the_cpu) {
  with_rig(gradient, _i);
}
END_TEST

int main(void) {
  if (!gpu_rig_there())
    return 77;
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("cuda_optimizer");
  tcase_add_loop_test(tests, adamw_has_the_bits_of_the_cpu, 0, 2 * RIG_DTYPES);
  tcase_add_loop_test(tests, adamw_refuses_what_the_cpu_refuses, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, adamw_not_a_number_leaves_the_weight, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, adamw_8bit_has_the_bits_of_the_cpu, 0, 2 * RIG_DTYPES);
  tcase_add_loop_test(tests, adamw_8bit_refuses_what_the_cpu_refuses, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, gradient_store_has_the_bits_of_the_cpu, 0, 2);
  suite_add_tcase(suite, tests);
  return gpu_rig_main(suite);
}
