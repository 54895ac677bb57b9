/* Products of cuBLASLt, and the head, against the cpu's: all transposes, types, strides, sums and biases; twice for the
 * same bits. Products that cuBLASLt refuses go through the plain kernel, which is also compared by itself. And products
 * with algorithms from a table: as right, and with the bits of the run that tuned them. */
#include "kernels/cuda/cuda_internal.h"
#include "kernels/matmul_table.h"
#include "tests/kernels/gpu_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const flap_dtype dtypes[] = {FLAP_F32, FLAP_BF16, FLAP_F16};

static void with_rig(int index, void (*body)(gpu_rig *g, rig_random *random)) {
  const flap_ops_limits limits = rig_limits(dtypes[index]);
  gpu_rig g;
  gpu_rig_open(&g, &limits);
  rig_random random = rig_random_named("cuda products");
  body(&g, &random);
  gpu_rig_close(&g);
}

typedef struct product {
  flap_matmul matmul; /* without pointers */
  uint32_t gap;       /* elements between rows, of all operands */
  bool bias, residual, plain;
  bool first_apart; /* computed once more before, into another place: what is tuned is added to many times */
  void **bits_out;  /* gets the result's bytes, to free; or NULL */
} product;

static void run(gpu_rig *g, const product *p, const flap_matmul *x) {
  if (p->plain)
    cuda_matmul_plain(g->ops, x);
  else
    flap_ops_matmul(g->ops, x);
}

static void check_product(gpu_rig *g, rig_random *random, product p) {
  gpu_rig_clear(g);
  flap_matmul *x = &p.matmul;
  const bool tn = x->transpose == FLAP_TN, nt = x->transpose == FLAP_NT;
  x->lda = (tn ? x->m : x->k) + p.gap;
  x->ldb = (nt ? x->k : x->n) + p.gap;
  x->ldc = x->n + p.gap;
  x->dtype = g->dtype;
  operand a = operand_normal(g, random, g->dtype, (uint64_t)(tn ? x->k : x->m) * x->lda, 1, 0);
  operand b = operand_normal(g, random, g->dtype, (uint64_t)(nt ? x->n : x->k) * x->ldb, 1, 0);
  operand bias = operand_normal(g, random, g->dtype, x->n, 1, 0);
  operand c = operand_normal(g, random, x->c_dtype, (uint64_t)x->m * x->ldc, 1, 0), again = operand_copy(&c, 0);
  operand residual = operand_copy(&c, 0);
  flap_matmul on_gpu = *x, on_cpu = *x;
  on_gpu.a = a.gpu, on_gpu.b = b.gpu, on_gpu.bias = p.bias ? bias.gpu : NULL;
  on_cpu.a = a.cpu, on_cpu.b = b.cpu, on_cpu.bias = p.bias ? bias.cpu : NULL;
  on_cpu.dtype = g->dtype;
  on_gpu.residual = p.residual ? residual.gpu : NULL;
  if (p.first_apart) {
    operand apart = operand_copy(&c, 0);
    on_gpu.c = apart.gpu;
    run(g, &p, &on_gpu);
    operand_free(&apart);
  }
  on_gpu.c = again.gpu;
  on_cpu.residual = p.residual ? residual.cpu : NULL;
  run(g, &p, &on_gpu);
  on_gpu.c = c.gpu;
  run(g, &p, &on_gpu);
  operands_equal("product, again", &c, &again);
  if (p.bits_out != NULL)
    *p.bits_out = operand_bytes(&c);
  on_cpu.c = c.cpu;
  flap_ops_matmul(g->cpu.ops, &on_cpu);
  /* Two sums of k products in different orders: each addition may lose 2^-24 of a partial sum of about sqrt(k), which
   * adds up to less than k * 2^-22. On the way to a large result partial sums are as large as that: k roundings of it,
   * in either direction, come to about sqrt(k) * 2^-24 of the result for each of the two sums; twice that is allowed.
   * Operands cut to ten bits of fraction, as tf32 has, would be off by more. Then both are rounded, perhaps to
   * neighbours. */
  const double rounding = 2 * gpu_ulp(x->c_dtype);
  char what[96];
  (void)snprintf(what, sizeof what, "%s %u x %u, k %u, gap %u, %s%s%s",
                 tn   ? "TN"
                 : nt ? "NT"
                      : "NN",
                 x->m, x->n, x->k, p.gap, flap_dtype_name(x->c_dtype), p.bias ? ", bias" : "",
                 x->accumulate ? ", +="
                 : p.residual  ? ", residual"
                               : "");
  operand_near(what, &c, rounding + 1e-6 + 0x1p-22 * sqrt(x->k), 1e-6 + 0x1p-22 * x->k);
  operand_free(&a), operand_free(&b), operand_free(&bias), operand_free(&c), operand_free(&again);
  operand_free(&residual);
}

static product random_product(const gpu_rig *g, rig_random *random, uint32_t round) {
  product p = {.matmul = {.transpose = (flap_transpose)(round % 3)}};
  const uint32_t shapes[][3] = {{1, 1, 1}, {1, 512, 300}, {257, 1, 64}, {64, 64, 1}, {512, 384, 2048}, {128, 3000, 64}};
  const uint32_t count = sizeof shapes / sizeof *shapes;
  const bool listed = round / 3 < count, whole = round % 2 == 0;
  const uint32_t step = whole ? 16 : 1; /* half of them as models have them, half of any size */
  p.matmul.m = listed ? shapes[round / 3][0] : step * rig_between(random, 1, 600 / step);
  p.matmul.n = listed ? shapes[round / 3][1] : step * rig_between(random, 1, 600 / step);
  p.matmul.k = listed ? shapes[round / 3][2] : step * rig_between(random, 1, 600 / step);
  p.gap = rig_between(random, 0, 2) * (whole ? 8 : 3);
  p.matmul.c_dtype = rig_between(random, 0, 1) == 0 ? g->dtype : FLAP_F32;
  p.matmul.accumulate = p.matmul.c_dtype == FLAP_F32 && rig_between(random, 0, 1) == 0;
  p.bias = rig_between(random, 0, 2) == 0;
  p.residual = !p.matmul.accumulate && rig_between(random, 0, 1) == 0;
  return p;
}

static void products(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 90; ++round)
    check_product(g, random, random_product(g, random, round));
}

START_TEST(matmul_any_shape_matches_the_cpu) {
  with_rig(_i, products);
}
END_TEST

static void plain_products(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 30; ++round) {
    product p = random_product(g, random, round);
    p.plain = true;
    check_product(g, random, p);
  }
}

START_TEST(matmul_plain_any_shape_matches_the_cpu) {
  with_rig(_i, plain_products);
}
END_TEST

/* A bias is added before the only rounding, which shows where it cancels the product: few rows and many, as in decoding
 * and training. */
static void biases(gpu_rig *g, rig_random *random) {
  const uint32_t rows[] = {1, 2, 3, 5, 8, 16, 17, 33, 64, 100, 128, 257, 600};
  for (uint32_t round = 0; round < 52; ++round) {
    product p = {.matmul = {.transpose = (flap_transpose)(round % 4 == 0 ? round % 3 : FLAP_NT)}, .bias = true};
    p.matmul.m = rows[round % 13];
    p.matmul.n = 8 * rig_between(random, 1, 100);
    p.matmul.k = round % 5 == 0 ? 4096 : 8 * rig_between(random, 1, 100);
    p.matmul.c_dtype = g->dtype;
    p.gap = round % 7 == 6 ? 1 : round % 2 * 8;
    p.residual = round % 3 == 1;
    if (p.matmul.transpose == FLAP_TN)
      p.matmul.m = (p.matmul.m + 7) / 8 * 8;
    check_product(g, random, p);
  }
}

START_TEST(matmul_bias_is_added_before_the_rounding) {
  with_rig(_i, biases);
}
END_TEST

/* A long inner sum and shapes that tempt to cut it: the same bits every time, and the error of one fp32 sum. */
static void long_sums(gpu_rig *g, rig_random *random) {
  const flap_matmul kinds[] = {{.transpose = FLAP_NN, .c_dtype = FLAP_F32},
                               {.transpose = FLAP_NT, .c_dtype = FLAP_F32},
                               {.transpose = FLAP_TN, .c_dtype = FLAP_F32, .accumulate = true},
                               {.transpose = FLAP_TN, .c_dtype = g->dtype}}; /* a gradient of one micro-batch */
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; ++i) {
    product p = {.matmul = kinds[i]};
    p.matmul.m = 64, p.matmul.n = 96, p.matmul.k = 16384;
    check_product(g, random, p);
  }
}

START_TEST(matmul_long_sum_has_the_same_bits_every_time) {
  with_rig(_i, long_sums);
}
END_TEST

/* More shapes than the table of plans holds, then the first ones again. */
static void many_shapes(gpu_rig *g, rig_random *random) {
  operand a = operand_normal(g, random, g->dtype, 1024 * 64, 1, 0),
          b = operand_normal(g, random, g->dtype, 64 * 64, 1, 0);
  operand first = operand_empty(g, FLAP_F32, 64, 0), c = operand_empty(g, FLAP_F32, 1024 * 64, 0);
  flap_matmul x = {.transpose = FLAP_NT, .n = 64, .k = 64, .a = a.gpu, .b = b.gpu, .dtype = g->dtype};
  x.c_dtype = FLAP_F32;
  x.lda = x.ldb = x.ldc = 64;
  x.m = 1;
  x.c = first.gpu;
  flap_ops_matmul(g->ops, &x);
  x.c = c.gpu;
  for (x.m = 1024; x.m >= 1; --x.m)
    flap_ops_matmul(g->ops, &x);
  float *want = operand_bytes(&first), *got = operand_bytes(&c);
  rig_same("the first row", got, want, 64 * 4);
  free(want), free(got);
  operand_free(&a), operand_free(&b), operand_free(&first), operand_free(&c);
}

START_TEST(matmul_more_shapes_than_are_kept_still_works) {
  with_rig(_i, many_shapes);
}
END_TEST

/* ---- algorithms from a table ---- */

static flap_matmul_table new_table(void) {
  flap_matmul_table table = {.count = 0};
  if (flap_ops_matmul_target(FLAP_DEVICE_CUDA, table.target, sizeof table.target) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  return table;
}

#define TUNED 11u

/* Large enough to be tuned, of every kind that a layer has; and the last, which is not. */
static product tuned_product(const gpu_rig *g, uint32_t index) {
  static const struct {
    flap_transpose transpose;
    uint32_t m, n, k, gap;
    bool f32, accumulate, bias, residual;
  } list[TUNED + 1] = {{FLAP_NT, 1024, 1024, 1024, 0, false, false, false, false},
                       {FLAP_NT, 1024, 1152, 1024, 0, false, false, true, false},
                       {FLAP_NT, 1024, 1024, 1024, 8, false, false, false, true},
                       {FLAP_NT, 1024, 1280, 1024, 0, false, false, true, true},
                       {FLAP_NN, 1024, 1152, 1024, 8, false, false, false, false},
                       {FLAP_NN, 1024, 1024, 1024, 3, false, false, false, false},
                       {FLAP_TN, 1024, 1088, 1024, 0, false, false, false, false},
                       {FLAP_TN, 256, 384, 16384, 0, false, false, false, false}, /* tempts to cut K */
                       {FLAP_TN, 1024, 1088, 1024, 0, true, false, false, false},
                       {FLAP_TN, 1024, 1088, 1024, 0, true, true, false, false},
                       {FLAP_TN, 256, 384, 16384, 0, true, true, false, false}, /* tempts to cut K */
                       {FLAP_NT, 512, 512, 512, 0, false, false, false, false}};
  return (product){.matmul = {.transpose = list[index].transpose,
                              .m = list[index].m,
                              .n = list[index].n,
                              .k = list[index].k,
                              .c_dtype = list[index].f32 ? FLAP_F32 : g->dtype,
                              .accumulate = list[index].accumulate},
                   .gap = list[index].gap,
                   .bias = list[index].bias,
                   .residual = list[index].residual,
                   .first_apart = true};
}

/* All of them with the table; their results are in `bits`. */
static void tuned_products(int index, flap_matmul_table *table, flap_matmul_mode mode, void *bits[TUNED + 1]) {
  const flap_ops_limits limits = rig_limits(dtypes[index]);
  gpu_rig g;
  gpu_rig_open(&g, &limits);
  if (flap_ops_set_matmuls(g.ops, table, mode) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  rig_random random = rig_random_named("cuda tuned products"); /* the same operands every time */
  for (uint32_t i = 0; i <= TUNED; ++i) {
    product p = tuned_product(&g, i);
    const uint32_t before = table->count;
    p.bits_out = &bits[i];
    check_product(&g, &random, p);
    ck_assert_uint_le(table->count, before + (i < TUNED && mode == FLAP_MATMUL_TUNE ? 1 : 0));
  }
  gpu_rig_close(&g);
}

START_TEST(matmul_tuned_products_match_the_cpu_and_keep_their_bits) {
  flap_matmul_table table = new_table();
  void *tuned[TUNED + 1], *used[TUNED + 1], *once_more[TUNED + 1];
  tuned_products(_i, &table, FLAP_MATMUL_TUNE, tuned);
  printf("%u products in the table of %s\n", table.count, table.target);
  ck_assert_uint_ge(table.count, 6); /* with fp32, biases are added beforehand: some products are one */
  const uint64_t digest = flap_matmul_table_digest(&table);
  tuned_products(_i, &table, FLAP_MATMUL_USE, used);
  ck_assert_uint_eq(flap_matmul_table_digest(&table), digest);
  tuned_products(_i, &table, FLAP_MATMUL_TUNE, once_more); /* all of them are there already */
  ck_assert_uint_eq(flap_matmul_table_digest(&table), digest);
  for (uint32_t i = 0; i <= TUNED; ++i) {
    gpu_rig g = {.dtype = dtypes[_i]};
    const product p = tuned_product(&g, i);
    const uint64_t bytes = (uint64_t)p.matmul.m * (p.matmul.n + p.gap) * flap_dtype_bytes(p.matmul.c_dtype);
    char what[64];
    (void)snprintf(what, sizeof what, "tuned product %u, used", i);
    rig_same(what, used[i], tuned[i], bytes);
    rig_same(what, once_more[i], tuned[i], bytes);
    free(tuned[i]), free(used[i]), free(once_more[i]);
  }
}
END_TEST

/* An algorithm for products of other types is refused, or leaves the table when that is to be filled; a table for
 * another GPU or library is refused. */
START_TEST(matmul_table_with_what_is_not_possible_is_refused) {
  const flap_ops_limits limits = rig_limits(FLAP_BF16);
  flap_matmul_table table = new_table(), wrong = new_table();
  void *bits[TUNED + 1];
  tuned_products(0, &table, FLAP_MATMUL_TUNE, bits); /* fp32 */
  for (uint32_t i = 0; i <= TUNED; ++i)
    free(bits[i]);
  ck_assert_uint_gt(table.count, 0);
  flap_matmul_key key = table.entries[0].key;
  key.dtype = FLAP_BF16;
  ck_assert(flap_matmul_table_add(&wrong, &key, table.entries[0].algorithm));
  for (uint32_t round = 0; round < 3; ++round) {
    gpu_rig g;
    gpu_rig_open(&g, &limits);
    if (round == 0)
      ck_assert_int_eq(flap_ops_set_matmuls(g.ops, &wrong, FLAP_MATMUL_USE), FLAP_INVALID);
    else if (round == 1)
      ck_assert_int_eq(flap_ops_set_matmuls(g.ops, &wrong, FLAP_MATMUL_TUNE), FLAP_OK);
    else
      ck_assert_int_eq(flap_ops_set_matmuls(g.ops, &table, FLAP_MATMUL_USE), FLAP_INVALID);
    ck_assert_uint_eq(wrong.count, round == 0 ? 1 : 0);
    table.target[0] = 'x';
    gpu_rig_close(&g);
  }
}
END_TEST

/* ---- head ---- */

static void check_head(gpu_rig *g, rig_random *random, uint32_t tokens, uint32_t hidden, uint32_t vocabulary) {
  gpu_rig_clear(g);
  const flap_dtype dtype = g->dtype;
  const uint64_t x_count = (uint64_t)tokens * hidden, w_count = (uint64_t)vocabulary * hidden;
  int32_t *ids = rig_bytes(tokens * sizeof *ids);
  for (uint32_t i = 0; i < tokens; ++i)
    ids[i] = tokens > 1 && rig_between(random, 0, 5) == 0 ? -100 : (int32_t)rig_between(random, 0, vocabulary - 1);
  operand targets = operand_of(g, FLAP_I32, ids, tokens), x = operand_normal(g, random, dtype, x_count, 1, 0);
  operand weight = operand_normal(g, random, dtype, w_count, 2 / sqrt(hidden), 0);
  operand before = operand_normal(g, random, FLAP_F32, w_count, 0.1, 0);
  operand losses[2], dx[2], dweight[2], loss_only = operand_empty(g, FLAP_F32, tokens, 0);
  for (uint32_t i = 0; i < 2; ++i) { /* once with dx in the place of x */
    losses[i] = operand_empty(g, FLAP_F32, tokens, 0);
    dx[i] = operand_copy(&x, 0);
    dweight[i] = operand_copy(&before, 0);
    flap_ops_head_loss(g->ops, dtype, losses[i].gpu, dx[i].gpu, dweight[i].gpu, true, i == 0 ? x.gpu : dx[i].gpu,
                       weight.gpu, targets.gpu, 0.25f, tokens, hidden, vocabulary);
  }
  flap_ops_head_loss(g->ops, dtype, loss_only.gpu, NULL, NULL, false, x.gpu, weight.gpu, targets.gpu, 1, tokens, hidden,
                     vocabulary);
  operands_equal("losses without a backward", &losses[0], &loss_only);
  operands_equal("losses, again", &losses[0], &losses[1]);
  operands_equal("dx, again", &dx[0], &dx[1]);
  operands_equal("dweight, again", &dweight[0], &dweight[1]);
  flap_ops_head_loss(g->cpu.ops, g->dtype, losses[0].cpu, dx[0].cpu, dweight[0].cpu, true, x.cpu, weight.cpu, ids,
                     0.25f, tokens, hidden, vocabulary);
  /* A logit of up to 8 may be rounded the other way, which moves its probability by as much. */
  const double step = dtype == FLAP_F32 ? 1e-6 : 8 * gpu_ulp(dtype);
  operand_near("losses", &losses[0], 1e-5, 1e-5 + step);
  operand_near("dx", &dx[0], 2 * gpu_ulp(dtype), 1e-5 + step * 0.25 * 2 / sqrt(hidden));
  operand_near("dweight", &dweight[0], 1e-5, (1e-6 + step * 0.25) * (1 + sqrt(tokens)));
  for (uint32_t i = 0; i < 2; ++i)
    operand_free(&losses[i]), operand_free(&dx[i]), operand_free(&dweight[i]);
  operand_free(&targets), operand_free(&x), operand_free(&weight), operand_free(&before), operand_free(&loss_only);
  free(ids);
}

static void head(gpu_rig *g, rig_random *random) {
  check_head(g, random, 1, 1, 1);
  check_head(g, random, 1, 33, 257);
  check_head(g, random, 1000, 24, 257);
  check_head(g, random, 131, 17, 3000);
  check_head(g, random, 64, 40, 1025);
  for (uint32_t i = 0; i < 6; ++i)
    check_head(g, random, rig_between(random, 1, 200), rig_between(random, 1, 60), rig_between(random, 2, 600));
}

START_TEST(head_loss_any_shape_matches_the_cpu) {
  with_rig(_i, head);
}
END_TEST

static void put(flap_dtype dtype, void *values, uint64_t at, float value) {
  if (dtype == FLAP_F32)
    ((float *)values)[at] = value;
  else
    ((uint16_t *)values)[at] = dtype == FLAP_BF16 ? flap_f32_to_bf16(value) : flap_f32_to_f16(value);
}

/* In fp16 they become -infinity: their tokens have no chance then, and the others the loss they had. */
static void head_far_logits(gpu_rig *g, rig_random *random) {
  enum { VOCABULARY = 64, FAR = 24 };
  const int32_t id = VOCABULARY - 1;
  unsigned char x_values[4], weights[VOCABULARY * 4];
  (void)random;
  put(g->dtype, x_values, 0, 30000);
  for (uint64_t i = 0; i < VOCABULARY; ++i)
    put(g->dtype, weights, i, i < FAR ? -30000 : 0);
  operand targets = operand_of(g, FLAP_I32, &id, 1), x = operand_of(g, g->dtype, x_values, 1);
  operand weight = operand_of(g, g->dtype, weights, VOCABULARY), losses = operand_empty(g, FLAP_F32, 1, 0);
  flap_ops_head_loss(g->ops, g->dtype, losses.gpu, NULL, NULL, false, x.gpu, weight.gpu, targets.gpu, 1, 1, 1,
                     VOCABULARY);
  flap_ops_head_loss(g->cpu.ops, g->dtype, losses.cpu, NULL, NULL, false, x.cpu, weight.cpu, targets.cpu, 1, 1, 1,
                     VOCABULARY);
  ck_assert_double_eq_tol(rig_at(FLAP_F32, losses.cpu, 0), log(VOCABULARY - FAR), 1e-5);
  operand_near("losses", &losses, 1e-5, 1e-5);
  operand_free(&targets), operand_free(&x), operand_free(&weight), operand_free(&losses);
}

START_TEST(head_loss_with_logits_out_of_range_matches_the_cpu) {
  with_rig(_i, head_far_logits);
}
END_TEST

START_TEST(head_loss_large_vocabulary_takes_several_chunks) {
  flap_ops_limits limits = {.dtype = dtypes[_i], .batch_max = 1, .sequence_max = 700, .tokens_max = 700};
  limits.hidden = limits.intermediate = 16;
  limits.vocabulary = _i == 0 ? 150001 : 300001; /* 256 and 384 rows of logits at a time */
  limits.heads = limits.kv_heads = 1;
  limits.head_size = 16;
  limits.threads = RIG_THREADS_MAX;
  gpu_rig g;
  gpu_rig_open(&g, &limits);
  rig_random random = rig_random_named("cuda head");
  check_head(&g, &random, 700, 16, limits.vocabulary);
  gpu_rig_close(&g);
}
END_TEST

int main(void) {
  if (!gpu_rig_there())
    return 77;
  Suite *suite = suite_create("kernels");
  TCase *plain = tcase_create("cuda_plain"); /* without cuBLASLt, which racecheck does not follow: CK_RUN_CASE */
  tcase_add_loop_test(plain, matmul_plain_any_shape_matches_the_cpu, 0, 3);
  suite_add_tcase(suite, plain);
  TCase *tests = tcase_create("cuda_products");
  tcase_add_loop_test(tests, matmul_any_shape_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, matmul_bias_is_added_before_the_rounding, 0, 3);
  tcase_add_loop_test(tests, matmul_long_sum_has_the_same_bits_every_time, 0, 3);
  tcase_add_loop_test(tests, matmul_more_shapes_than_are_kept_still_works, 0, 2);
  tcase_add_loop_test(tests, matmul_tuned_products_match_the_cpu_and_keep_their_bits, 0, 3);
  tcase_add_test(tests, matmul_table_with_what_is_not_possible_is_refused);
  tcase_add_loop_test(tests, head_loss_any_shape_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, head_loss_with_logits_out_of_range_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, head_loss_large_vocabulary_takes_several_chunks, 0, 3);
  suite_add_tcase(suite, tests);
  return gpu_rig_main(suite);
}
