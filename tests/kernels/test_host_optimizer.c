/* AdamW over memory of the host, bit for bit against the operations of the cpu device, whatever the number of threads.
 * Those are held to scalar code by test_ops_optimizer and test_ops_moments. */
#include "kernels/host_optimizer.h"
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdlib.h>

/* Sanitizers make everything several times slower: two of the four numbers of threads then, and one step. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define OPTIMIZERS 2u
#define STEPS 1u
#define SIZE_STRIDE 3u /* the smallest and the largest */
#else
#define OPTIMIZERS 4u
#define STEPS 3u
#define SIZE_STRIDE 1u
#endif
#define SLICE (64u * FLAP_OPS_BLOCK)
/* One block, an odd number, bytes of the decay mask that are full, and enough that an item has several blocks and the
 * last one fewer. */
static const uint32_t sizes[] = {1, 21, 256, 1101};
static const uint32_t thread_counts[] = {1, 3, 2, 7};

typedef struct states {
  flap_dtype dtype;
  uint64_t elements;
  void *weight, *master; /* master: int16 beside bf16, fp32 beside fp16, NULL beside fp32 */
  float *m, *v, *m_largest, *v_largest;
  int8_t *m_codes;
  uint8_t *v_codes;
  uint64_t weight_bytes, master_bytes;
} states;

/* Values of a period that no power of two divides: drawing millions of them takes long. */
#define DRAWN 5003u
static void *repeat(rig_random *random, flap_dtype dtype, uint64_t elements, double scale) {
  const uint64_t bytes = flap_dtype_bytes(dtype), all = elements * bytes;
  unsigned char *drawn = rig_normal(random, dtype, DRAWN, scale), *values = rig_bytes(all);
  for (uint64_t at = 0; at < all; at += DRAWN * bytes)
    memcpy(values + at, drawn, all - at < DRAWN * bytes ? all - at : DRAWN * bytes);
  free(drawn);
  return values;
}

static states make_states(rig_random *random, flap_dtype dtype, uint64_t elements) {
  const uint64_t blocks = elements / FLAP_OPS_MOMENT_BLOCK;
  states s = {.dtype = dtype, .elements = elements, .weight = repeat(random, dtype, elements, 0.5)};
  s.weight_bytes = elements * flap_dtype_bytes(dtype);
  if (dtype == FLAP_BF16) {
    s.master_bytes = elements * sizeof(int16_t);
    s.master = repeat(random, FLAP_BF16, elements, 1); /* any bits are a low half */
  } else if (dtype == FLAP_F16) {
    s.master_bytes = elements * sizeof(float);
    s.master = repeat(random, FLAP_F32, elements, 0.5);
  }
  s.m = repeat(random, FLAP_F32, elements, 1e-3);
  s.v = repeat(random, FLAP_F32, elements, 1e-3);
  for (uint64_t i = 0; i < elements; ++i)
    s.v[i] *= s.v[i];
  s.m_codes = calloc(elements, 1); /* the state at the start */
  s.v_codes = calloc(elements, 1);
  s.m_largest = calloc(blocks, sizeof(float));
  s.v_largest = calloc(blocks, sizeof(float));
  ck_assert(s.m_codes != NULL && s.v_codes != NULL && s.m_largest != NULL && s.v_largest != NULL);
  return s;
}

static states copy_states(const states *s) {
  const uint64_t blocks = s->elements / FLAP_OPS_MOMENT_BLOCK;
  states copy = *s;
  copy.weight = rig_copy(s->weight, s->weight_bytes);
  if (s->master != NULL)
    copy.master = rig_copy(s->master, s->master_bytes);
  copy.m = rig_copy(s->m, s->elements * sizeof(float));
  copy.v = rig_copy(s->v, s->elements * sizeof(float));
  copy.m_codes = rig_copy(s->m_codes, s->elements);
  copy.v_codes = rig_copy(s->v_codes, s->elements);
  copy.m_largest = rig_copy(s->m_largest, blocks * sizeof(float));
  copy.v_largest = rig_copy(s->v_largest, blocks * sizeof(float));
  return copy;
}

static void free_states(states *s) {
  free(s->weight), free(s->master), free(s->m), free(s->v);
  free(s->m_codes), free(s->v_codes), free(s->m_largest), free(s->v_largest);
}

static void same_states(const states *got, const states *want) {
  const uint64_t blocks = want->elements / FLAP_OPS_MOMENT_BLOCK;
  rig_same("weight", got->weight, want->weight, want->weight_bytes);
  rig_same("master", got->master, want->master, want->master_bytes);
  rig_same("m", got->m, want->m, want->elements * sizeof(float));
  rig_same("v", got->v, want->v, want->elements * sizeof(float));
  rig_same("m's codes", got->m_codes, want->m_codes, want->elements);
  rig_same("v's codes", got->v_codes, want->v_codes, want->elements);
  rig_same("largest m", got->m_largest, want->m_largest, blocks * sizeof(float));
  rig_same("largest v", got->v_largest, want->v_largest, blocks * sizeof(float));
}

typedef struct step {
  flap_adamw scalars;
  flap_dtype grad_dtype;
  const void *grad;
  const uint8_t *decay_blocks;
  bool eight_bit;
} step;

/* In slices so short that every item of the device is one block: longer items are the host's alone. */
static int32_t on_device(flap_ops *ops, const step *p, states *s) {
  int32_t fault = 0;
  for (uint64_t at = 0; at < s->elements; at += SLICE) {
    const uint64_t count = s->elements - at < SLICE ? s->elements - at : SLICE, block = at / FLAP_OPS_MOMENT_BLOCK;
    unsigned char *weight = (unsigned char *)s->weight + at * flap_dtype_bytes(s->dtype);
    unsigned char *master = s->master;
    if (master != NULL)
      master += at * (s->master_bytes / s->elements);
    const unsigned char *grad = (const unsigned char *)p->grad + at * flap_dtype_bytes(p->grad_dtype);
    const uint8_t *mask = p->decay_blocks + at / FLAP_OPS_BLOCK / 8;
    if (p->eight_bit)
      flap_ops_adamw_8bit(ops, &p->scalars, s->dtype, p->grad_dtype, weight, master, s->m_codes + at, s->v_codes + at,
                          s->m_largest + block, s->v_largest + block, grad, mask, &fault, count);
    else
      flap_ops_adamw(ops, &p->scalars, s->dtype, p->grad_dtype, weight, master, s->m + at, s->v + at, grad, mask,
                     &fault, count);
  }
  return fault;
}

/* `fault` is what stands in the word before; returned is what stands there after. */
static int32_t on_host(flap_host_optimizer *optimizer, const step *p, states *s, int32_t fault) {
  if (p->eight_bit)
    flap_host_adamw_8bit(optimizer, &p->scalars, s->dtype, p->grad_dtype, s->weight, s->master, s->m_codes, s->v_codes,
                         s->m_largest, s->v_largest, p->grad, p->decay_blocks, &fault, s->elements);
  else
    flap_host_adamw(optimizer, &p->scalars, s->dtype, p->grad_dtype, s->weight, s->master, s->m, s->v, p->grad,
                    p->decay_blocks, &fault, s->elements);
  return fault;
}

static uint8_t *draw_mask(rig_random *random, uint32_t blocks) {
  const uint32_t bytes = (blocks + 7) / 8;
  uint8_t *mask = rig_bytes(bytes);
  for (uint32_t i = 0; i < bytes; ++i)
    mask[i] = (uint8_t)rig_between(random, 0, 255);
  return mask;
}

static void open_all(flap_host_optimizer *optimizers[OPTIMIZERS], rig *device) {
  const flap_ops_limits limits = rig_limits(FLAP_BF16);
  rig_open(device, &limits, 2);
  for (uint32_t t = 0; t < OPTIMIZERS; ++t)
    ck_assert_int_eq(flap_host_optimizer_open(thread_counts[t], &optimizers[t]), FLAP_OK);
}

static void close_all(flap_host_optimizer *optimizers[OPTIMIZERS], rig *device) {
  for (uint32_t t = 0; t < OPTIMIZERS; ++t)
    flap_host_optimizer_close(optimizers[t]);
  rig_close(device);
}

static void compare_steps(flap_host_optimizer *optimizers[OPTIMIZERS], flap_ops *ops, flap_dtype dtype,
                          flap_dtype grad_dtype, uint32_t blocks) {
  rig_random random = rig_random_named("steps");
  states want = make_states(&random, dtype, (uint64_t)blocks * FLAP_OPS_BLOCK), got[OPTIMIZERS];
  const states start = copy_states(&want);
  for (uint32_t t = 0; t < OPTIMIZERS; ++t)
    got[t] = copy_states(&want);
  for (uint32_t number = 1; number <= STEPS; ++number) {
    void *grad = repeat(&random, grad_dtype, want.elements, 1e-2);
    uint8_t *mask = draw_mask(&random, blocks);
    for (uint32_t form = 0; form < 2; ++form) {
      const step p = {rig_adamw(number), grad_dtype, grad, mask, form == 1};
      ck_assert_int_eq(on_device(ops, &p, &want), 0);
      for (uint32_t t = 0; t < OPTIMIZERS; ++t)
        ck_assert_int_eq(on_host(optimizers[t], &p, &got[t], 5), 5);
    }
    free(grad);
    free(mask);
  }
  ck_assert(memcmp(want.weight, start.weight, want.weight_bytes) != 0);
  ck_assert(memcmp(want.v_codes, start.v_codes, want.elements) != 0);
  for (uint32_t t = 0; t < OPTIMIZERS; ++t) {
    same_states(&got[t], &want);
    free_states(&got[t]);
  }
  states unused = start;
  free_states(&unused);
  free_states(&want);
}

/* Weight types by gradient types. */
START_TEST(host_adamw_any_threads_give_the_bits_of_the_cpu_device) {
  flap_host_optimizer *optimizers[OPTIMIZERS];
  rig device;
  open_all(optimizers, &device);
  for (uint32_t size = 0; size < sizeof sizes / sizeof sizes[0]; size += SIZE_STRIDE)
    compare_steps(optimizers, device.ops, rig_dtype(_i / 2), _i % 2 == 0 ? FLAP_F32 : FLAP_BF16, sizes[size]);
  close_all(optimizers, &device);
}
END_TEST

/* A gradient that is infinite, NaN, or nothing wrong at all, at any place. */
START_TEST(host_adamw_weight_not_finite_is_refused_and_reported) {
  flap_host_optimizer *optimizers[OPTIMIZERS];
  rig device;
  open_all(optimizers, &device);
  rig_random random = rig_random_named("faults");
  for (uint32_t sort = 0; sort < 12; ++sort) {
    const flap_dtype dtype = rig_dtype((int)(sort % RIG_DTYPES));
    const uint32_t blocks = sort == 0 ? 1101 : 21;
    states want = make_states(&random, dtype, (uint64_t)blocks * FLAP_OPS_BLOCK);
    float *grad = repeat(&random, FLAP_F32, want.elements, 1e-2);
    const uint32_t bad = rig_between(&random, 0, blocks * FLAP_OPS_BLOCK - 1);
    const bool is_bad = sort / RIG_DTYPES % 2 == 0;
    if (is_bad)
      grad[bad] = sort < 6 ? INFINITY : NAN;
    uint8_t *mask = draw_mask(&random, blocks);
    for (uint32_t form = 0; form < 2; ++form) {
      const step p = {rig_adamw(1), FLAP_F32, grad, mask, form == 1};
      states got[OPTIMIZERS];
      for (uint32_t t = 0; t < OPTIMIZERS; ++t)
        got[t] = copy_states(&want);
      ck_assert_int_eq(on_device(device.ops, &p, &want), is_bad ? 1 : 0);
      for (uint32_t t = 0; t < OPTIMIZERS; ++t) {
        ck_assert_int_eq(on_host(optimizers[t], &p, &got[t], 0), is_bad ? 1 : 0);
        same_states(&got[t], &want);
        free_states(&got[t]);
      }
    }
    free(grad);
    free(mask);
    free_states(&want);
  }
  close_all(optimizers, &device);
}
END_TEST

START_TEST(host_optimizer_too_many_threads_are_refused) {
  flap_host_optimizer *optimizer = (flap_host_optimizer *)&optimizer;
  ck_assert_int_eq(flap_host_optimizer_open(FLAP_POOL_THREADS_MAX + 1, &optimizer), FLAP_INVALID);
  ck_assert_ptr_null(optimizer);
  flap_host_optimizer_close(optimizer);
}
END_TEST

START_TEST(host_adamw_no_elements_does_nothing) {
  flap_host_optimizer *optimizer;
  ck_assert_int_eq(flap_host_optimizer_open(0, &optimizer), FLAP_OK); /* all cores */
  const flap_adamw s = rig_adamw(1);
  int32_t fault = 0;
  flap_host_adamw(optimizer, &s, FLAP_F32, FLAP_F32, NULL, NULL, NULL, NULL, NULL, NULL, &fault, 0);
  ck_assert_int_eq(fault, 0);
  flap_host_optimizer_close(optimizer);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("host_optimizer");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, host_adamw_any_threads_give_the_bits_of_the_cpu_device, 0, 2 * RIG_DTYPES);
  tcase_add_test(tests, host_adamw_weight_not_finite_is_refused_and_reported);
  tcase_add_test(tests, host_optimizer_too_many_threads_are_refused);
  tcase_add_test(tests, host_adamw_no_elements_does_nothing);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
