#include "tests/kernels/ops_rig.h"

#include "base/units.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define GUARD_BYTES 4096u
#define GUARD 0x5au

flap_dtype rig_dtype(int index) {
  static const flap_dtype dtypes[RIG_DTYPES] = {FLAP_F32, FLAP_BF16, FLAP_F16};
  return dtypes[index];
}

flap_ops_limits rig_limits(flap_dtype dtype) {
  return (flap_ops_limits){.dtype = dtype,
                           .batch_max = 4,
                           .sequence_max = 320,
                           .tokens_max = 1024,
                           .hidden = 2100,
                           .intermediate = 512,
                           .vocabulary = 3000,
                           .heads = 12,
                           .kv_heads = 12,
                           .head_size = 80,
                           .cache_tokens_max = 320,
                           .threads = RIG_THREADS_MAX};
}

void rig_open(rig *r, const flap_ops_limits *limits, uint32_t threads) {
  ck_assert_int_eq(flap_pool_open(threads, &r->pool), FLAP_OK);
  flap_device_config config = {.kind = FLAP_DEVICE_CPU, .vram_bytes = 1 << 20, .events_max = 4, .pool = r->pool};
  ck_assert_int_eq(flap_device_open(&config, &r->device), FLAP_OK);
  r->workspace_bytes = flap_ops_workspace_bytes(FLAP_DEVICE_CPU, limits);
  ck_assert_uint_eq(r->workspace_bytes % 256, 0);
  r->memory = aligned_alloc(4096, flap_units_round_up(r->workspace_bytes + 2 * GUARD_BYTES, 4096));
  ck_assert_ptr_nonnull(r->memory);
  memset(r->memory, GUARD, r->workspace_bytes + 2 * GUARD_BYTES);
  memset(r->memory + GUARD_BYTES, 0xff, r->workspace_bytes); /* NaN, in case anybody reads before writing */
  ck_assert_int_eq(flap_ops_open(r->device, limits, r->memory + GUARD_BYTES, &r->ops), FLAP_OK);
}

void rig_close(rig *r) {
  for (size_t i = 0; i < GUARD_BYTES; ++i) {
    if (r->memory[i] != GUARD || r->memory[GUARD_BYTES + r->workspace_bytes + i] != GUARD)
      ck_abort_msg("byte %zu before or after the workspace was written", i);
  }
  flap_ops_close(r->ops);
  ck_assert_int_eq(flap_device_synchronize(r->device), FLAP_OK);
  flap_device_close(r->device);
  flap_pool_close(r->pool);
  free(r->memory);
}

void rig_with_threads(const flap_ops_limits *limits, void (*body)(rig rigs[RIG_THREADS_MAX], flap_dtype dtype)) {
  rig rigs[RIG_THREADS_MAX];
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    rig_open(&rigs[t], limits, t + 1);
  body(rigs, limits->dtype);
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    rig_close(&rigs[t]);
}

int rig_main(Suite *suite) {
  (void)rig_seed();
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

uint64_t rig_seed(void) {
  static uint64_t seed;
  static bool known;
  if (!known) {
    const char *text = getenv("FLAP_TEST_SEED");
    seed = text != NULL ? strtoull(text, NULL, 10) : flap_units_now_ns() % 1000000007u;
    known = true;
    printf("FLAP_TEST_SEED=%llu\n", (unsigned long long)seed);
    (void)fflush(stdout);
  }
  return seed;
}

rig_random rig_random_named(const char *name) {
  return (rig_random){.stream = flap_philox_stream(rig_seed(), name)};
}

uint32_t rig_between(rig_random *random, uint32_t low, uint32_t high) {
  return low + (uint32_t)flap_philox_below(&random->stream, random->drawn++, (uint64_t)high - low + 1);
}

void *rig_bytes(uint64_t bytes) {
  unsigned char *memory = malloc(bytes > 0 ? bytes : 1);
  ck_assert_ptr_nonnull(memory);
  memset(memory, 0xa5, bytes);
  return memory;
}

void *rig_copy(const void *from, uint64_t bytes) {
  void *memory = rig_bytes(bytes);
  memcpy(memory, from, bytes);
  return memory;
}

void *rig_normal(rig_random *random, flap_dtype dtype, uint64_t count, double scale) {
  void *values = rig_bytes(count * flap_dtype_bytes(dtype));
  const uint64_t start = (random->drawn += 64);
  for (uint64_t i = 0; i < count; ++i) {
    const float value = (float)(scale * (double)flap_philox_normal(&random->stream, start + i));
    if (dtype == FLAP_F32)
      ((float *)values)[i] = value;
    else
      ((uint16_t *)values)[i] = dtype == FLAP_F16 ? flap_f32_to_f16(value) : flap_f32_to_bf16(value);
  }
  random->drawn += count + 64;
  return values;
}

float *rig_normal_f32(rig_random *random, uint64_t count, double scale) {
  return rig_normal(random, FLAP_F32, count, scale);
}

double rig_at(flap_dtype dtype, const void *values, uint64_t index) {
  if (dtype == FLAP_F32)
    return (double)((const float *)values)[index];
  const uint16_t half = ((const uint16_t *)values)[index];
  return (double)(dtype == FLAP_F16 ? flap_f16_to_f32(half) : flap_bf16_to_f32(half));
}

double *rig_doubles(flap_dtype dtype, const void *values, uint64_t count) {
  double *doubles = rig_bytes(count * sizeof *doubles);
  for (uint64_t i = 0; i < count; ++i)
    doubles[i] = rig_at(dtype, values, i);
  return doubles;
}

double rig_round(flap_dtype dtype, double value) {
  if (dtype == FLAP_F16)
    return (double)flap_f16_to_f32(flap_f32_to_f16((float)value));
  return dtype == FLAP_F32 ? (double)(float)value : (double)flap_bf16_to_f32(flap_f32_to_bf16((float)value));
}

void rig_near(const char *what, uint64_t index, double got, double want, double relative, double absolute) {
  const double allowed = relative * fabs(want) + absolute;
  if (!(fabs(got - want) <= allowed)) /* Check writes a file at every assertion: one only where it fails */
    ck_abort_msg("%s[%llu]: %.9g, expected %.9g, off by %.3g, allowed %.3g (seed %llu)", what,
                 (unsigned long long)index, got, want, got - want, allowed, (unsigned long long)rig_seed());
}

void rig_same(const char *what, const void *a, const void *b, uint64_t bytes) {
  const unsigned char *left = a, *right = b;
  for (uint64_t i = 0; i < bytes; ++i)
    if (left[i] != right[i])
      ck_abort_msg("%s: byte %llu of %llu differs (seed %llu)", what, (unsigned long long)i, (unsigned long long)bytes,
                   (unsigned long long)rig_seed());
}

double rig_ulp(flap_dtype dtype) {
  return dtype == FLAP_F32 ? 0x1p-23 : dtype == FLAP_F16 ? 0x1p-11 : 0x1p-8;
}

double rig_floor(flap_dtype dtype) {
  return dtype == FLAP_F16 ? 0x1p-25 : 0;
}

flap_adamw rig_adamw(uint32_t step) {
  const double beta1 = 0.9, beta2 = 0.95, rate = 3e-4;
  return (flap_adamw){.learning_rate = (float)rate,
                      .beta1 = (float)beta1,
                      .beta2 = (float)beta2,
                      .one_minus_beta1 = (float)(1 - beta1),
                      .one_minus_beta2 = (float)(1 - beta2),
                      .inverse_bias1 = (float)(1 / (1 - pow(beta1, step))),
                      .inverse_sqrt_bias2 = (float)(1 / sqrt(1 - pow(beta2, step))),
                      .epsilon = 1e-8f,
                      .decay = (float)(1 - rate * 0.1),
                      .gradient_scale = 0.7f};
}

double rig_slope(double *x, double step, double (*f)(void *context), void *context) {
  const double middle = *x;
  *x = middle + step;
  const double above = f(context);
  *x = middle - step;
  const double below = f(context);
  *x = middle;
  return (above - below) / (2 * step);
}
