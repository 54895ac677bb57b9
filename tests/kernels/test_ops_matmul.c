/* Matrix products and the bias gradient against sums in fp64. */
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct shape {
  flap_transpose transpose;
  uint32_t m, n, k;
  flap_dtype dtype, c_dtype;
  bool accumulate, bias, residual;
  uint32_t pad; /* added to every row stride */
} shape;

static double expected(const shape *s, const flap_matmul *x, const double *a, const double *b, uint32_t i, uint32_t j,
                       double *magnitude_out) {
  double sum = 0, magnitude = 0;
  for (uint32_t k = 0; k < s->k; ++k) {
    const double left = s->transpose == FLAP_TN ? a[(uint64_t)k * x->lda + i] : a[(uint64_t)i * x->lda + k];
    const double right = s->transpose == FLAP_NT ? b[(uint64_t)j * x->ldb + k] : b[(uint64_t)k * x->ldb + j];
    sum += left * right;
    magnitude += fabs(left * right);
  }
  *magnitude_out = magnitude;
  return sum;
}

static void check_matmul(rig rigs[RIG_THREADS_MAX], rig_random *random, const shape *s) {
  const bool tn = s->transpose == FLAP_TN, nt = s->transpose == FLAP_NT;
  flap_matmul x = {.transpose = s->transpose, .m = s->m, .n = s->n, .k = s->k, .dtype = s->dtype};
  x.c_dtype = s->c_dtype;
  x.accumulate = s->accumulate;
  x.lda = (tn ? s->m : s->k) + s->pad;
  x.ldb = (nt ? s->k : s->n) + s->pad;
  x.ldc = s->n + s->pad;
  const uint32_t a_rows = tn ? s->k : s->m, b_rows = nt ? s->n : s->k;
  /* Exactly what may be read: the last row is not padded. */
  const uint64_t a_count = (uint64_t)a_rows * x.lda - s->pad, b_count = (uint64_t)b_rows * x.ldb - s->pad;
  const uint64_t c_count = (uint64_t)s->m * x.ldc - s->pad, c_bytes = c_count * flap_dtype_bytes(s->c_dtype);
  void *a = rig_normal(random, s->dtype, a_count, 1), *b = rig_normal(random, s->dtype, b_count, 1);
  void *bias = s->bias ? rig_normal(random, s->dtype, s->n, 1) : NULL;
  void *c_before = rig_normal(random, s->c_dtype, c_count, 1), *c[RIG_THREADS_MAX];
  x.a = a;
  x.b = b;
  x.bias = bias;
  x.residual = s->residual ? c_before : NULL;
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    c[t] = rig_copy(c_before, c_bytes);
    x.c = c[t];
    flap_ops_matmul(rigs[t].ops, &x);
    rig_same("c of several threads", c[0], c[t], c_bytes);
  }
  double *a64 = rig_doubles(s->dtype, a, a_count), *b64 = rig_doubles(s->dtype, b, b_count);
  const uint32_t step = s->m * (uint64_t)s->n * s->k > 2000000 ? 7 : 1; /* sample big ones */
  for (uint32_t i = 0; i < s->m; ++i)
    for (uint32_t j = i % step; j < s->n; j += step) {
      const uint64_t at = (uint64_t)i * x.ldc + j;
      double magnitude, want = expected(s, &x, a64, b64, i, j, &magnitude);
      want += s->bias ? rig_at(s->dtype, bias, j) : 0;
      want += s->accumulate || s->residual ? rig_at(s->c_dtype, c_before, at) : 0;
      rig_near("c", at, rig_at(s->c_dtype, c[0], at), want, rig_ulp(s->c_dtype),
               1e-6 + 0x1p-23 * magnitude * sqrt((double)s->k));
    }
  for (uint32_t i = 0; i + 1 < s->m && s->pad > 0; ++i) /* nothing between the rows was touched */
    rig_same("padding of c", (unsigned char *)c[0] + ((uint64_t)i * x.ldc + s->n) * flap_dtype_bytes(s->c_dtype),
             (unsigned char *)c_before + ((uint64_t)i * x.ldc + s->n) * flap_dtype_bytes(s->c_dtype),
             s->pad * flap_dtype_bytes(s->c_dtype));
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    free(c[t]);
  free(a), free(b), free(bias), free(c_before), free(a64), free(b64);
}

static void with_rigs(int index, void (*body)(rig rigs[RIG_THREADS_MAX], flap_dtype dtype)) {
  const flap_ops_limits limits = rig_limits(rig_dtype(index));
  rig_with_threads(&limits, body);
}

static void random_shapes(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("matmul");
  for (uint32_t i = 0; i < 24; ++i) {
    shape s = {.transpose = (flap_transpose)(i % 3), .dtype = dtype, .c_dtype = i % 2 ? FLAP_F32 : dtype};
    s.m = rig_between(&random, 1, 300);
    s.n = rig_between(&random, 1, 300);
    s.k = rig_between(&random, 1, 300);
    s.accumulate = s.c_dtype == FLAP_F32 && rig_between(&random, 0, 1) == 1;
    s.bias = rig_between(&random, 0, 1) == 1;
    s.residual = !s.accumulate && rig_between(&random, 0, 1) == 1;
    s.pad = rig_between(&random, 0, 1) * rig_between(&random, 1, 9);
    check_matmul(rigs, &random, &s);
  }
}

static void chosen_shapes(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("matmul chosen");
  for (int transpose = FLAP_NN; transpose <= FLAP_TN; ++transpose) {
    const uint32_t sizes[][3] = {{1, 1, 1}, {1, 192, 192}, {128, 128, 256}, {129, 257, 513}, {1, 300, 700}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
      shape s = {.transpose = (flap_transpose)transpose, .dtype = dtype, .c_dtype = dtype};
      s.m = sizes[i][0];
      s.n = sizes[i][1];
      s.k = sizes[i][2];
      check_matmul(rigs, &random, &s);
    }
  }
}

START_TEST(matmul_random_shapes_match_sums_in_fp64) {
  with_rigs(_i, random_shapes);
}
END_TEST

START_TEST(matmul_edge_shapes_match_sums_in_fp64) {
  with_rigs(_i, chosen_shapes);
}
END_TEST

/* Two products with accumulate, against one product over the joined k: the gradient of two micro-batches. */
static void accumulating(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("matmul accumulate");
  const uint32_t m = 37, n = 21, k = 64;
  void *a = rig_normal(&random, dtype, (uint64_t)2 * k * m, 1), *b = rig_normal(&random, dtype, (uint64_t)2 * k * n, 1);
  float *whole = rig_bytes(m * n * sizeof(float)), *parts = rig_bytes(m * n * sizeof(float));
  flap_matmul x = {.transpose = FLAP_TN, .m = m, .n = n, .k = 2 * k, .a = a, .b = b, .c = whole, .lda = m, .ldb = n};
  x.ldc = n;
  x.dtype = dtype;
  x.c_dtype = FLAP_F32;
  flap_ops_matmul(rigs[0].ops, &x);
  flap_ops_zero(rigs[0].ops, parts, m * n * sizeof(float));
  x.accumulate = true;
  x.k = k;
  x.c = parts;
  flap_ops_matmul(rigs[0].ops, &x);
  x.a = (const unsigned char *)a + (uint64_t)k * m * flap_dtype_bytes(dtype);
  x.b = (const unsigned char *)b + (uint64_t)k * n * flap_dtype_bytes(dtype);
  flap_ops_matmul(rigs[0].ops, &x);
  for (uint32_t i = 0; i < m * n; ++i)
    rig_near("sum of two", i, (double)parts[i], (double)whole[i], 1e-5, 1e-4);
  free(a), free(b), free(whole), free(parts);
}

START_TEST(matmul_accumulate_twice_equals_joined_k) {
  with_rigs(_i, accumulating);
}
END_TEST

/* Memory that ends where nothing may be read: BLAS itself is not instrumented by sanitizers. */
static float *before_the_end(uint64_t count, void **mapping_out, size_t *bytes_out) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (count * sizeof(float) + page - 1) / page * page;
  unsigned char *mapping = mmap(NULL, used + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ck_assert_ptr_ne(mapping, MAP_FAILED);
  ck_assert_int_eq(mprotect(mapping + used, page, PROT_NONE), 0);
  *mapping_out = mapping;
  *bytes_out = used + page;
  return (float *)(void *)(mapping + used - count * sizeof(float));
}

START_TEST(matmul_fp32_operands_are_not_read_beyond_their_end) {
  const flap_ops_limits limits = rig_limits(FLAP_F32);
  rig r;
  rig_open(&r, &limits, 1);
  const uint32_t sizes[][3] = {{1, 1, 1}, {3, 5, 7}, {17, 33, 31}, {128, 96, 64}, {131, 259, 67}, {64, 128, 33}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    const uint32_t m = sizes[i][0], n = sizes[i][1], k = sizes[i][2];
    void *mappings[3];
    size_t bytes[3];
    flap_matmul x = {.transpose = (flap_transpose)_i, .m = m, .n = n, .k = k, .dtype = FLAP_F32, .c_dtype = FLAP_F32};
    float *a = before_the_end((uint64_t)m * k, &mappings[0], &bytes[0]);
    float *b = before_the_end((uint64_t)n * k, &mappings[1], &bytes[1]);
    float *c = before_the_end((uint64_t)m * n, &mappings[2], &bytes[2]);
    for (uint32_t j = 0; j < m * k; ++j)
      a[j] = 1;
    for (uint32_t j = 0; j < n * k; ++j)
      b[j] = 2;
    x.a = a;
    x.b = b;
    x.c = c;
    x.lda = _i == FLAP_TN ? m : k;
    x.ldb = _i == FLAP_NT ? k : n;
    x.ldc = n;
    flap_ops_matmul(r.ops, &x);
    for (uint32_t j = 0; j < m * n; ++j)
      rig_near("c", j, (double)c[j], 2.0 * k, 0, 0);
    for (int j = 0; j < 3; ++j)
      ck_assert_int_eq(munmap(mappings[j], bytes[j]), 0);
  }
  rig_close(&r);
}
END_TEST

static void bias(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("bias");
  for (uint32_t round = 0; round < 6; ++round) {
    const uint32_t tokens = round == 0 ? 1 : rig_between(&random, 1, 200), n = rig_between(&random, 1, 200);
    const uint32_t ld = n + round % 3;
    const uint64_t count = (uint64_t)tokens * ld - (ld - n);
    void *dy = rig_normal(&random, dtype, count, 1);
    float *before = rig_normal_f32(&random, n, 1), *first = NULL;
    for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
      float *dbias = rig_copy(before, n * sizeof *before);
      flap_ops_bias_backward(rigs[t].ops, dtype, dbias, dy, tokens, n, ld);
      if (t == 0) {
        first = dbias;
        continue;
      }
      rig_same("dbias of several threads", first, dbias, n * sizeof *dbias);
      free(dbias);
    }
    for (uint32_t j = 0; j < n; ++j) {
      double sum = (double)before[j];
      for (uint32_t i = 0; i < tokens; ++i)
        sum += rig_at(dtype, dy, (uint64_t)i * ld + j);
      rig_near("dbias", j, (double)first[j], sum, 1e-5, 1e-4);
    }
    free(dy), free(before), free(first);
  }
}

START_TEST(bias_backward_sums_columns) {
  with_rigs(_i, bias);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_matmul");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, matmul_random_shapes_match_sums_in_fp64, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, matmul_edge_shapes_match_sums_in_fp64, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, matmul_accumulate_twice_equals_joined_k, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, matmul_fp32_operands_are_not_read_beyond_their_end, FLAP_NN, FLAP_TN + 1);
  tcase_add_loop_test(tests, bias_backward_sums_columns, 0, RIG_DTYPES);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
