/* Row-wise and element-wise cuda kernels against the cpu's, at any shape; twice for the same bits, and once more from
 * unaligned addresses, which must change none. Where both do the same operations in the same order, bits are the cpu's.
 */
#include "tests/kernels/gpu_rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const flap_dtype dtypes[] = {FLAP_F32, FLAP_BF16, FLAP_F16};

static void with_rig(int index, void (*body)(gpu_rig *g, rig_random *random)) {
  flap_ops_limits limits = rig_limits(dtypes[index]);
  limits.hidden = 20000; /* wider than what a block holds in registers */
  limits.intermediate = 20000;
  gpu_rig g;
  gpu_rig_open(&g, &limits);
  rig_random random = rig_random_named("cuda rows");
  body(&g, &random);
  gpu_rig_close(&g);
}

/* ---- rmsnorm ---- */

static void check_norm(gpu_rig *g, rig_random *random, uint32_t tokens, uint32_t hidden, bool with_residual) {
  const uint64_t count = (uint64_t)tokens * hidden;
  const flap_dtype dtype = g->dtype;
  gpu_rig_clear(g);
  operand x = operand_normal(g, random, dtype, count, 2, 0), weight = operand_normal(g, random, dtype, hidden, 1, 0);
  operand residual = operand_normal(g, random, dtype, count, 2, 0);
  operand out[3], sum[3], rstd[3];
  for (uint32_t run = 0; run < 3; ++run) { /* the third from and to odd addresses */
    const uint32_t shift = run == 2 ? 1 : 0;
    out[run] = operand_empty(g, dtype, count, shift);
    sum[run] = operand_empty(g, dtype, count, shift);
    rstd[run] = operand_empty(g, FLAP_F32, tokens, shift);
    operand from = operand_copy(&x, shift), other = operand_copy(&residual, shift);
    flap_ops_rmsnorm(g->ops, dtype, out[run].gpu, rstd[run].gpu, with_residual ? sum[run].gpu : NULL, from.gpu,
                     with_residual ? other.gpu : NULL, weight.gpu, tokens, hidden, 1e-5f);
    operand_free(&from), operand_free(&other);
    operands_equal("out, again", &out[0], &out[run]);
    operands_equal("rstd, again", &rstd[0], &rstd[run]);
  }
  flap_ops_rmsnorm(g->cpu.ops, g->dtype, out[0].cpu, rstd[0].cpu, with_residual ? sum[0].cpu : NULL, x.cpu,
                   with_residual ? residual.cpu : NULL, weight.cpu, tokens, hidden, 1e-5f);
  /* x * rstd is rounded, and may be rounded the other way. */
  operand_near("rstd", &rstd[0], 4e-6, 0);
  operand_near("out", &out[0], 4 * gpu_ulp(dtype) + 4e-6, 4 * rig_floor(dtype));
  if (with_residual)
    operand_same("sum", &sum[0]);
  for (uint32_t run = 0; run < 3; ++run)
    operand_free(&out[run]), operand_free(&sum[run]), operand_free(&rstd[run]);
  operand_free(&x), operand_free(&weight), operand_free(&residual);
}

static void norm(gpu_rig *g, rig_random *random) {
  const uint32_t shapes[][2] = {{1, 1},    {1, 2100}, {67, 192}, {3, 1024},  {5, 1025},
                                {300, 33}, {9, 4096}, {4, 8200}, {3, 16392}, {2, 20000}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i) {
    check_norm(g, random, shapes[i][0], shapes[i][1], false);
    check_norm(g, random, shapes[i][0], shapes[i][1], true);
  }
  for (uint32_t i = 0; i < 12; ++i)
    check_norm(g, random, rig_between(random, 1, 99), rig_between(random, 1, 3000), i % 2 == 1);
}

START_TEST(rmsnorm_any_shape_matches_the_cpu) {
  with_rig(_i, norm);
}
END_TEST

/* dx_out takes the place of: nothing, dresidual, dy. */
static void check_norm_backward(gpu_rig *g, rig_random *random, uint32_t tokens, uint32_t hidden, uint32_t place) {
  const uint64_t count = (uint64_t)tokens * hidden;
  const flap_dtype dtype = g->dtype;
  gpu_rig_clear(g);
  operand x = operand_normal(g, random, dtype, count, 1, 0), weight = operand_normal(g, random, dtype, hidden, 1, 0);
  operand dy = operand_normal(g, random, dtype, count, 1, 0), residual = operand_normal(g, random, dtype, count, 1, 0);
  operand dweight = operand_normal(g, random, FLAP_F32, hidden, 1, 0);
  operand rstd = operand_empty(g, FLAP_F32, tokens, 0), out = operand_empty(g, dtype, count, 0);
  flap_ops_rmsnorm(g->cpu.ops, g->dtype, out.cpu, rstd.cpu, NULL, x.cpu, NULL, weight.cpu, tokens, hidden, 1e-5f);
  operand rstd_in = operand_of(g, FLAP_F32, rstd.cpu, tokens), rstd_gpu = operand_empty(g, FLAP_F32, tokens, 0);
  operand normalized = operand_empty(g, dtype, count, 0);
  flap_ops_rmsnorm(g->ops, dtype, normalized.gpu, rstd_gpu.gpu, NULL, x.gpu, NULL, weight.gpu, tokens, hidden, 1e-5f);
  operand_free(&rstd_in);
  rstd_in =
      rstd_gpu; /* with its own statistics the forward's result comes again to the bit; the oracle takes them too */
  float *statistics = operand_bytes(&rstd_gpu);
  memcpy(rstd.cpu, statistics, tokens * sizeof *statistics);
  free(statistics);
  operand dx[3], dw[3];
  for (uint32_t run = 0; run < 3; ++run) {
    const uint32_t shift = run == 2 ? 1 : 0;
    operand dy_run = operand_copy(&dy, shift), residual_run = operand_copy(&residual, shift);
    operand x_run = operand_copy(&x, shift), empty = operand_empty(g, dtype, count, shift);
    dw[run] = operand_copy(&dweight, shift);
    dx[run] = place == 0 ? empty : place == 1 ? residual_run : dy_run;
    operand again = operand_empty(g, dtype, count, shift);
    flap_ops_rmsnorm_backward(g->ops, dtype, dx[run].gpu, dw[run].gpu, place == 1 ? dy_run.gpu : again.gpu, dy_run.gpu,
                              x_run.gpu, weight.gpu, rstd_in.gpu, place == 0 ? NULL : residual_run.gpu, tokens, hidden);
    operands_equal("normalised, again", &normalized, place == 1 ? &dy_run : &again);
    operand_free(&again);
    operands_equal("dx, again", &dx[0], &dx[run]);
    operands_equal("dweight, again", &dw[0], &dw[run]);
    if (place != 0)
      operand_free(&empty);
    if (place != 1)
      operand_free(&residual_run);
    if (place != 2)
      operand_free(&dy_run);
    operand_free(&x_run);
  }
  flap_ops_rmsnorm_backward(g->cpu.ops, g->dtype, dx[0].cpu, dw[0].cpu, NULL, place == 2 ? dx[0].cpu : dy.cpu, x.cpu,
                            weight.cpu, rstd.cpu,
                            place == 0   ? NULL
                            : place == 1 ? dx[0].cpu
                                         : residual.cpu,
                            tokens, hidden);
  /* In narrow rows almost everything cancels, beside a large rstd. */
  operand_near("dx", &dx[0], 2 * gpu_ulp(dtype) + 1e-6, hidden < 8 ? 1e-3 : 2e-5);
  operand_near("dweight", &dw[0], 1e-5, 2e-5 * (1 + sqrt(tokens)));
  for (uint32_t run = 0; run < 3; ++run)
    operand_free(&dx[run]), operand_free(&dw[run]);
  operand_free(&x), operand_free(&weight), operand_free(&dy), operand_free(&residual), operand_free(&dweight);
  operand_free(&rstd), operand_free(&out), operand_free(&rstd_in), operand_free(&normalized);
}

static void norm_backward(gpu_rig *g, rig_random *random) {
  const uint32_t shapes[][2] = {{1, 1},
                                {3, 1025},
                                {1000, 16},
                                {2000, 128},
                                {40, 8192},
                                {5, 8200},
                                {70, 16392},
                                {3, 20000},
                                /* from here on parts of more rows than are on their way at a time */
                                {6000, 128},
                                {3000, 2048},
                                {1500, 4096},
                                {1100, 5120},
                                {700, 8192}};
  for (uint32_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
    check_norm_backward(g, random, shapes[i][0], shapes[i][1], i % 3);
  for (uint32_t i = 0; i < 9; ++i)
    check_norm_backward(g, random, rig_between(random, 1, 300), rig_between(random, 1, 700), i % 3);
}

START_TEST(rmsnorm_backward_any_shape_matches_the_cpu) {
  with_rig(_i, norm_backward);
}
END_TEST

/* ---- rope ---- */

static void rope(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 24; ++round) {
    gpu_rig_clear(g);
    const uint32_t head_size = round % 2 == 0 ? 16 * rig_between(random, 1, 5) : 2 * rig_between(random, 1, 40);
    const uint32_t heads = rig_between(random, 1, 5), batch = rig_between(random, 1, 3);
    const uint32_t sequence = round == 0 ? 1 : rig_between(random, 1, 60), first = rig_between(random, 0, 9);
    const uint32_t tokens = batch * sequence, ld = heads * head_size + (round % 3) * 8;
    const uint64_t count = (uint64_t)tokens * ld;
    const flap_rope spec = {.kind = FLAP_ROPE_DEFAULT, .theta = 10000};
    const bool inverse = round % 4 > 1;
    float *table = rig_bytes((uint64_t)(first + sequence) * head_size * 4);
    flap_ops_rope_table(&spec, first + sequence, head_size, table);
    operand cos_sin = operand_of(g, FLAP_F32, table, (uint64_t)(first + sequence) * head_size);
    operand x = operand_normal(g, random, g->dtype, count, 1, 0), odd = operand_copy(&x, 1);
    flap_ops_rope(g->ops, g->dtype, x.gpu, cos_sin.gpu, tokens, sequence, first, heads, head_size, ld, inverse);
    flap_ops_rope(g->ops, g->dtype, odd.gpu, cos_sin.gpu, tokens, sequence, first, heads, head_size, ld, inverse);
    flap_ops_rope(g->cpu.ops, g->dtype, x.cpu, table, tokens, sequence, first, heads, head_size, ld, inverse);
    operand_same("x", &x);
    operands_equal("x at an odd address", &x, &odd);
    operand_free(&x), operand_free(&odd), operand_free(&cos_sin);
    free(table);
  }
}

START_TEST(rope_any_shape_has_the_bits_of_the_cpu) {
  with_rig(_i, rope);
}
END_TEST

/* ---- swiglu ---- */

static void check_swiglu(gpu_rig *g, rig_random *random, uint32_t tokens, uint32_t width, uint32_t gap, bool in_place) {
  const uint32_t ld = 2 * width + gap;
  const uint64_t count = (uint64_t)tokens * width, strided = (uint64_t)tokens * ld;
  const flap_dtype dtype = g->dtype;
  gpu_rig_clear(g);
  operand both = operand_normal(g, random, dtype, strided, 3, 0), dout = operand_normal(g, random, dtype, count, 1, 0);
  operand out[2], dboth[2];
  const uint64_t bytes = flap_dtype_bytes(dtype);
  for (uint32_t run = 0; run < 2; ++run) {
    operand in = operand_copy(&both, run);
    out[run] = operand_empty(g, dtype, count, run);
    dboth[run] = in_place ? operand_copy(&both, run) : operand_empty(g, dtype, strided, run);
    unsigned char *gate = in.gpu, *dgate = dboth[run].gpu;
    flap_ops_swiglu(g->ops, dtype, out[run].gpu, gate, gate + width * bytes, tokens, width, ld);
    if (in_place)
      gate = dgate;
    operand dout_run = operand_copy(&dout, run), again = operand_empty(g, dtype, count, run);
    flap_ops_swiglu_backward(g->ops, dtype, dgate, dgate + width * bytes, ld, in_place ? dout_run.gpu : again.gpu,
                             dout_run.gpu, gate, gate + width * bytes, ld, tokens, width);
    operands_equal("the forward, again", &out[run], in_place ? &dout_run : &again);
    operand_free(&dout_run), operand_free(&again);
    operand_free(&in);
  }
  operands_equal("out at an odd address", &out[0], &out[1]);
  operands_equal("dgate and dup at odd addresses", &dboth[0], &dboth[1]);
  unsigned char *gate = both.cpu, *dgate = dboth[0].cpu;
  flap_ops_swiglu(g->cpu.ops, g->dtype, out[0].cpu, gate, gate + width * bytes, tokens, width, ld);
  flap_ops_swiglu_backward(g->cpu.ops, g->dtype, dgate, dgate + width * bytes, ld, NULL, dout.cpu, gate,
                           gate + width * bytes, ld, tokens, width);
  /* silu is rounded before it is multiplied. Where the two devices round it to neighbours, they are two of these units
   * apart at the bottom of a binade, and the products, rounded again, by two more. */
  const double ulp = gpu_ulp(dtype);
  operand_near("out", &out[0], 4 * ulp, 1e-6);
  operand_near("dgate and dup", &dboth[0], 4 * ulp, 3e-5);
  for (uint32_t run = 0; run < 2; ++run)
    operand_free(&out[run]), operand_free(&dboth[run]);
  operand_free(&both), operand_free(&dout);
}

static void swiglu(gpu_rig *g, rig_random *random) {
  check_swiglu(g, random, 1, 1, 0, false);
  check_swiglu(g, random, 1, 20000, 8, true);
  check_swiglu(g, random, 300, 512, 0, true);
  for (uint32_t i = 0; i < 12; ++i)
    check_swiglu(g, random, rig_between(random, 1, 99), rig_between(random, 1, 700), i % 3, i % 2 == 0);
}

START_TEST(swiglu_any_shape_matches_the_cpu) {
  with_rig(_i, swiglu);
}
END_TEST

/* ---- add, bias, embedding ---- */

static void add(gpu_rig *g, rig_random *random) {
  const uint64_t counts[] = {1, 7, 8, 4096, 100003, 20000000};
  for (uint32_t i = 0; i < 6; ++i) {
    gpu_rig_clear(g);
    const uint64_t count = counts[i];
    operand a = operand_normal(g, random, g->dtype, count, 1, 0), b = operand_normal(g, random, g->dtype, count, 1, 0);
    operand odd = operand_copy(&a, 1);
    flap_ops_add(g->ops, g->dtype, odd.gpu, odd.gpu, b.gpu, count);
    flap_ops_add(g->ops, g->dtype, b.gpu, a.gpu, b.gpu, count); /* out in the place of an operand */
    flap_ops_add(g->cpu.ops, g->dtype, b.cpu, a.cpu, b.cpu, count);
    operand_same("sum", &b);
    operands_equal("sum at an odd address", &b, &odd);
    operand_free(&a), operand_free(&b), operand_free(&odd);
  }
}

START_TEST(add_any_length_has_the_bits_of_the_cpu) {
  with_rig(_i, add);
}
END_TEST

static void bias(gpu_rig *g, rig_random *random) {
  for (uint32_t i = 0; i < 12; ++i) {
    gpu_rig_clear(g);
    const uint32_t tokens = i == 0 ? 1 : rig_between(random, 1, 1000), n = i == 0 ? 1 : rig_between(random, 1, 500);
    const uint32_t ld = n + i % 3;
    operand dy = operand_normal(g, random, g->dtype, (uint64_t)tokens * ld, 1, 0);
    operand dbias = operand_normal(g, random, FLAP_F32, n, 1, 0), again = operand_copy(&dbias, 1);
    operand odd = operand_copy(&dy, 1);
    flap_ops_bias_backward(g->ops, g->dtype, dbias.gpu, dy.gpu, tokens, n, ld);
    flap_ops_bias_backward(g->ops, g->dtype, again.gpu, odd.gpu, tokens, n, ld);
    flap_ops_bias_backward(g->cpu.ops, g->dtype, dbias.cpu, dy.cpu, tokens, n, ld);
    operand_near("dbias", &dbias, 1e-5, 2e-6 * (1 + sqrt(tokens)));
    operands_equal("dbias, again", &dbias, &again);
    operand_free(&dy), operand_free(&dbias), operand_free(&again), operand_free(&odd);
  }
}

START_TEST(bias_backward_any_shape_matches_the_cpu) {
  with_rig(_i, bias);
}
END_TEST

typedef struct sorted {
  int32_t token, position;
} sorted;

static int by_token(const void *a, const void *b) {
  const sorted *x = a, *y = b;
  return x->token != y->token ? (x->token < y->token ? -1 : 1)
                              : (x->position > y->position) - (x->position < y->position);
}

static void check_embedding(gpu_rig *g, rig_random *random, uint32_t tokens, uint32_t hidden, uint32_t vocabulary) {
  gpu_rig_clear(g);
  int32_t *ids = rig_bytes(tokens * sizeof *ids), *order = rig_bytes(tokens * sizeof *order);
  sorted *pairs = rig_bytes(tokens * sizeof *pairs);
  for (uint32_t i = 0; i < tokens; ++i) {
    ids[i] = (int32_t)rig_between(random, 0, vocabulary - 1);
    pairs[i] = (sorted){ids[i], (int32_t)i};
  }
  qsort(pairs, tokens, sizeof *pairs, by_token);
  for (uint32_t i = 0; i < tokens; ++i)
    order[i] = pairs[i].position;
  operand id = operand_of(g, FLAP_I32, ids, tokens), positions = operand_of(g, FLAP_I32, order, tokens);
  operand table = operand_normal(g, random, g->dtype, (uint64_t)vocabulary * hidden, 1, 0);
  operand out = operand_empty(g, g->dtype, (uint64_t)tokens * hidden, 0);
  operand odd = operand_empty(g, g->dtype, (uint64_t)tokens * hidden, 1);
  flap_ops_embedding(g->ops, g->dtype, out.gpu, id.gpu, table.gpu, tokens, hidden);
  flap_ops_embedding(g->ops, g->dtype, odd.gpu, id.gpu, table.gpu, tokens, hidden);
  flap_ops_embedding(g->cpu.ops, g->dtype, out.cpu, ids, table.cpu, tokens, hidden);
  operand_near("rows", &out, 0, 0);
  operands_equal("rows at an odd address", &out, &odd);
  operand dx = operand_normal(g, random, g->dtype, (uint64_t)tokens * hidden, 1, 0), odd_dx = operand_copy(&dx, 1);
  operand dtable = operand_normal(g, random, FLAP_F32, (uint64_t)vocabulary * hidden, 1, 0);
  operand again = operand_copy(&dtable, 1);
  flap_ops_embedding_backward(g->ops, g->dtype, dtable.gpu, id.gpu, positions.gpu, dx.gpu, tokens, hidden);
  flap_ops_embedding_backward(g->ops, g->dtype, again.gpu, id.gpu, positions.gpu, odd_dx.gpu, tokens, hidden);
  flap_ops_embedding_backward(g->cpu.ops, g->dtype, dtable.cpu, ids, order, dx.cpu, tokens, hidden);
  operand_same("dtable", &dtable); /* rows are added one after another on both sides */
  operands_equal("dtable, again", &dtable, &again);
  operand_free(&id), operand_free(&positions), operand_free(&table), operand_free(&out), operand_free(&odd);
  operand_free(&dx), operand_free(&odd_dx), operand_free(&dtable), operand_free(&again);
  free(ids), free(order), free(pairs);
}

static void embedding(gpu_rig *g, rig_random *random) {
  check_embedding(g, random, 1, 1, 1);
  check_embedding(g, random, 1000, 64, 1); /* one run of all */
  check_embedding(g, random, 700, 2056, 31);
  check_embedding(g, random, 333, 33, 2999);
  for (uint32_t i = 0; i < 8; ++i)
    check_embedding(g, random, rig_between(random, 1, 500), rig_between(random, 1, 300), rig_between(random, 1, 200));
}

START_TEST(embedding_and_its_backward_have_the_bits_of_the_cpu) {
  with_rig(_i, embedding);
}
END_TEST

static void bytes(gpu_rig *g, rig_random *random) {
  gpu_rig_clear(g);
  operand a = operand_normal(g, random, FLAP_F32, 12345, 1, 0), b = operand_empty(g, FLAP_F32, 12345, 0);
  flap_ops_copy(g->ops, b.gpu, a.gpu, 12345 * 4 - 3);
  flap_ops_zero(g->ops, a.gpu, 12345 * 4 - 2);
  flap_ops_copy(g->cpu.ops, b.cpu, a.cpu, 12345 * 4 - 3);
  flap_ops_zero(g->cpu.ops, a.cpu, 12345 * 4 - 2);
  flap_ops_zero(g->ops, a.gpu, 0);
  operand_same("copied", &b);
  operand_same("zeroed", &a);
  operand_free(&a), operand_free(&b);
}

START_TEST(copy_and_zero_touch_exactly_their_bytes) {
  with_rig(_i, bytes);
}
END_TEST

int main(void) {
  if (!gpu_rig_there())
    return 77;
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("cuda_rows");
  tcase_add_loop_test(tests, rmsnorm_any_shape_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, rmsnorm_backward_any_shape_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, rope_any_shape_has_the_bits_of_the_cpu, 0, 3);
  tcase_add_loop_test(tests, swiglu_any_shape_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, add_any_length_has_the_bits_of_the_cpu, 0, 3);
  tcase_add_loop_test(tests, bias_backward_any_shape_matches_the_cpu, 0, 3);
  tcase_add_loop_test(tests, embedding_and_its_backward_have_the_bits_of_the_cpu, 0, 3);
  tcase_add_test(tests, copy_and_zero_touch_exactly_their_bytes);
  suite_add_tcase(suite, tests);
  return gpu_rig_main(suite);
}
