/* Attention against a naive fp64 softmax over all keys; its backward against finite differences of that. */
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdlib.h>

typedef struct naive {
  uint32_t batch, queries, keys, first, heads, kv_heads, head_size, q_stride, kv_stride;
  double *q, *k, *v;
  double *out, *lse; /* (B, T, HQ, HD), (B, HQ, T) */
  double *c;         /* weights of out in the loss */
  double *row;       /* keys */
} naive;

static double dot_of(const double *a, const double *b, uint32_t count) {
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i)
    sum += a[i] * b[i];
  return sum;
}

static void naive_row(naive *n, uint32_t b, uint32_t t, uint32_t head) {
  const uint32_t kv_head = head / (n->heads / n->kv_heads), seen = n->first + t + 1;
  const double *q = n->q + ((uint64_t)b * n->queries + t) * n->q_stride + (uint64_t)head * n->head_size;
  double top = -INFINITY, sum = 0;
  for (uint32_t key = 0; key < seen; ++key) {
    const double *k = n->k + ((uint64_t)b * n->keys + key) * n->kv_stride + (uint64_t)kv_head * n->head_size;
    n->row[key] = dot_of(q, k, n->head_size) / sqrt(n->head_size);
    top = n->row[key] > top ? n->row[key] : top;
  }
  for (uint32_t key = 0; key < seen; ++key)
    sum += exp(n->row[key] - top);
  n->lse[((uint64_t)b * n->heads + head) * n->queries + t] = top + log(sum);
  double *out = n->out + (((uint64_t)b * n->queries + t) * n->heads + head) * n->head_size;
  for (uint32_t i = 0; i < n->head_size; ++i)
    out[i] = 0;
  for (uint32_t key = 0; key < seen; ++key) {
    const double *v = n->v + ((uint64_t)b * n->keys + key) * n->kv_stride + (uint64_t)kv_head * n->head_size;
    for (uint32_t i = 0; i < n->head_size; ++i)
      out[i] += exp(n->row[key] - top) / sum * v[i];
  }
}

static double naive_loss(void *context) {
  naive *n = context;
  for (uint32_t b = 0; b < n->batch; ++b)
    for (uint32_t t = 0; t < n->queries; ++t)
      for (uint32_t head = 0; head < n->heads; ++head)
        naive_row(n, b, t, head);
  return dot_of(n->out, n->c, n->batch * n->queries * n->heads * n->head_size);
}

typedef struct operands {
  flap_attention x;
  uint64_t q_count, kv_count, out_count, lse_count;
  void *q, *k, *v, *dout;
  naive n;
} operands;

static operands make(rig_random *random, flap_dtype dtype, uint32_t batch, uint32_t sequence, uint32_t kv_heads,
                     uint32_t group, uint32_t head_size, uint32_t pad) {
  operands o = {0};
  o.x = (flap_attention){.batch = batch, .sequence = sequence, .heads = kv_heads * group, .kv_heads = kv_heads};
  o.x.head_size = head_size;
  o.x.dtype = dtype;
  o.x.q_stride = o.x.heads * head_size + pad;
  o.x.kv_stride = kv_heads * head_size + 2 * pad;
  const uint64_t tokens = (uint64_t)batch * sequence;
  o.q_count = tokens * o.x.q_stride - pad;
  o.kv_count = tokens * o.x.kv_stride - 2 * pad;
  o.out_count = tokens * o.x.heads * head_size;
  o.lse_count = tokens * o.x.heads;
  o.x.q = o.q = rig_normal(random, dtype, o.q_count, 1.5);
  o.x.k = o.k = rig_normal(random, dtype, o.kv_count, 1.5);
  o.x.v = o.v = rig_normal(random, dtype, o.kv_count, 1);
  o.dout = rig_normal(random, dtype, o.out_count, 1);
  o.n = (naive){.batch = batch, .queries = sequence, .keys = sequence, .heads = o.x.heads, .kv_heads = kv_heads};
  o.n.head_size = head_size;
  o.n.q_stride = o.x.q_stride;
  o.n.kv_stride = o.x.kv_stride;
  o.n.q = rig_doubles(dtype, o.q, o.q_count);
  o.n.k = rig_doubles(dtype, o.k, o.kv_count);
  o.n.v = rig_doubles(dtype, o.v, o.kv_count);
  o.n.c = rig_doubles(dtype, o.dout, o.out_count);
  o.n.out = rig_bytes(o.out_count * 8);
  o.n.lse = rig_bytes(o.lse_count * 8);
  o.n.row = rig_bytes(sequence * 8);
  return o;
}

static void release(operands *o) {
  free(o->q), free(o->k), free(o->v), free(o->dout), free(o->n.q), free(o->n.k), free(o->n.v), free(o->n.c);
  free(o->n.out), free(o->n.lse), free(o->n.row);
}

static void check_forward(rig rigs[RIG_THREADS_MAX], operands *o) {
  const uint64_t bytes = o->out_count * flap_dtype_bytes(o->x.dtype);
  void *out[RIG_THREADS_MAX];
  float *lse[RIG_THREADS_MAX];
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    o->x.out = out[t] = rig_bytes(bytes);
    o->x.lse = lse[t] = rig_bytes(o->lse_count * 4);
    flap_ops_attention(rigs[t].ops, &o->x);
    rig_same("out of several threads", out[0], out[t], bytes);
    rig_same("lse of several threads", lse[0], lse[t], o->lse_count * 4);
  }
  (void)naive_loss(&o->n);
  for (uint64_t i = 0; i < o->out_count; ++i)
    rig_near("out", i, rig_at(o->x.dtype, out[0], i), o->n.out[i], rig_ulp(o->x.dtype), 1e-5);
  for (uint64_t i = 0; i < o->lse_count; ++i)
    rig_near("lse", i, (double)lse[0][i], o->n.lse[i], 1e-6, 1e-5);
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    free(out[t]), free(lse[t]);
}

static void check_padding(const char *what, const void *values, uint64_t tokens, uint32_t width, uint32_t stride,
                          flap_dtype dtype) {
  const unsigned char *bytes = values;
  const uint64_t size = flap_dtype_bytes(dtype);
  for (uint64_t token = 0; token + 1 < tokens; ++token)
    for (uint64_t i = (token * stride + width) * size; i < (token + 1) * stride * size; ++i)
      if (bytes[i] != 0xa5)
        ck_abort_msg("%s: byte %llu, between two tokens, was written", what, (unsigned long long)i);
}

static void check_backward(rig rigs[RIG_THREADS_MAX], rig_random *random, operands *o) {
  const flap_dtype dtype = o->x.dtype;
  const uint64_t size = flap_dtype_bytes(dtype), tokens = (uint64_t)o->x.batch * o->x.sequence;
  o->x.out = rig_bytes(o->out_count * size);
  o->x.lse = rig_bytes(o->lse_count * 4);
  flap_ops_attention(rigs[1].ops, &o->x);
  unsigned char *grads[RIG_THREADS_MAX][3];
  const uint64_t counts[3] = {o->q_count, o->kv_count, o->kv_count};
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    for (uint32_t which = 0; which < 3; ++which)
      grads[t][which] = rig_bytes(counts[which] * size);
    flap_ops_attention_backward(rigs[t].ops, &o->x, grads[t][0], grads[t][1], grads[t][2], o->dout);
    for (uint32_t which = 0; which < 3; ++which)
      rig_same("gradients of several threads", grads[0][which], grads[t][which], counts[which] * size);
  }
  check_padding("dq", grads[0][0], tokens, o->x.heads * o->x.head_size, o->x.q_stride, dtype);
  check_padding("dk", grads[0][1], tokens, o->x.kv_heads * o->x.head_size, o->x.kv_stride, dtype);
  check_padding("dv", grads[0][2], tokens, o->x.kv_heads * o->x.head_size, o->x.kv_stride, dtype);
  double *values[3] = {o->n.q, o->n.k, o->n.v};
  const char *names[3] = {"dq", "dk", "dv"};
  for (uint32_t which = 0; which < 3; ++which)
    for (uint32_t probe = 0; probe < 12; ++probe) {
      const uint32_t stride = which == 0 ? o->x.q_stride : o->x.kv_stride;
      const uint32_t heads = which == 0 ? o->x.heads : o->x.kv_heads;
      const uint64_t at = (uint64_t)rig_between(random, 0, (uint32_t)tokens - 1) * stride +
                          rig_between(random, 0, heads * o->x.head_size - 1);
      const double want = rig_slope(&values[which][at], 1e-4, naive_loss, &o->n);
      /* bf16: out was rounded before backward reads it, which moves delta a little. */
      rig_near(names[which], at, rig_at(dtype, grads[0][which], at), want, rig_ulp(dtype),
               dtype == FLAP_F32 ? 1e-4 : 4e-2);
    }
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    free(grads[t][0]), free(grads[t][1]), free(grads[t][2]);
  free(o->x.out), free(o->x.lse);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHAPES 8u
#else
#define SHAPES 12u
#endif

static void attention(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("attention");
  const uint32_t chosen[][6] = {/* B, S, HKV, group, HD, pad */
                                {1, 1, 1, 1, 2, 0},    {2, 64, 1, 2, 32, 0}, {1, 65, 2, 3, 16, 3},
                                {1, 129, 1, 1, 80, 0}, {3, 63, 2, 1, 6, 5},  {1, 300, 1, 2, 8, 0}};
  for (uint32_t i = 0; i < SHAPES; ++i) {
    const bool drawn = i >= 6;
    operands o =
        drawn
            ? make(&random, dtype, rig_between(&random, 1, 3), rig_between(&random, 1, 140), rig_between(&random, 1, 3),
                   rig_between(&random, 1, 4), 2 * rig_between(&random, 1, 20), rig_between(&random, 0, 4))
            : make(&random, dtype, chosen[i][0], chosen[i][1], chosen[i][2], chosen[i][3], chosen[i][4], chosen[i][5]);
    check_forward(rigs, &o);
    if (o.out_count * o.x.sequence < 3000000) /* what the naive loss can afford twice per probe */
      check_backward(rigs, &random, &o);
    release(&o);
  }
}

START_TEST(attention_any_shape_matches_naive_and_finite_differences) {
  const flap_ops_limits limits = rig_limits(rig_dtype(_i));
  rig_with_threads(&limits, attention);
}
END_TEST

/* Large scores: the running maximum keeps everything finite. */
static void large_scores(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("attention large");
  operands o = make(&random, dtype, 1, 150, 1, 1, 16, 0);
  for (uint64_t i = 0; i < o.q_count; ++i) {
    ((float *)o.q)[i] *= 60;
    o.n.q[i] = (double)((float *)o.q)[i];
  }
  o.x.out = rig_bytes(o.out_count * 4);
  o.x.lse = rig_bytes(o.lse_count * 4);
  flap_ops_attention(rigs[0].ops, &o.x);
  (void)naive_loss(&o.n);
  for (uint64_t i = 0; i < o.out_count; ++i)
    rig_near("out", i, (double)((float *)o.x.out)[i], o.n.out[i], 1e-3, 1e-3);
  free(o.x.out), free(o.x.lse);
  release(&o);
}

START_TEST(attention_large_scores_stay_finite) {
  const flap_ops_limits limits = rig_limits(FLAP_F32);
  rig_with_threads(&limits, large_scores);
}
END_TEST

static void decode(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("decode");
  for (uint32_t round = 0; round < 12; ++round) {
    const uint32_t count = round < 4 ? 1 : rig_between(&random, 1, 90);
    const uint32_t first = round == 0 ? 0 : rig_between(&random, 0, 200);
    const uint32_t kv_heads = rig_between(&random, 1, 3), group = rig_between(&random, 1, 3);
    const uint32_t head_size = 2 * rig_between(&random, 1, 20), pad = round % 2;
    naive n = {.batch = 1, .queries = count, .keys = first + count, .first = first, .heads = kv_heads * group};
    n.kv_heads = kv_heads;
    n.head_size = head_size;
    n.q_stride = n.heads * head_size + pad;
    n.kv_stride = kv_heads * head_size;
    const uint64_t q_count = (uint64_t)count * n.q_stride - pad, out_count = (uint64_t)count * n.heads * head_size;
    const uint64_t kv_count = (uint64_t)n.keys * n.kv_stride;
    void *q = rig_normal(&random, dtype, q_count, 1), *k = rig_normal(&random, dtype, kv_count, 1);
    void *v = rig_normal(&random, dtype, kv_count, 1), *first_out = NULL;
    n.q = rig_doubles(dtype, q, q_count);
    n.k = rig_doubles(dtype, k, kv_count);
    n.v = rig_doubles(dtype, v, kv_count);
    n.out = rig_bytes(out_count * 8);
    n.c = rig_bytes(out_count * 8);
    n.lse = rig_bytes((uint64_t)count * n.heads * 8);
    n.row = rig_bytes(n.keys * 8);
    for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
      void *out = rig_bytes(out_count * flap_dtype_bytes(dtype));
      flap_ops_attention_decode(rigs[t].ops, dtype, out, q, n.q_stride, k, v, count, first, n.heads, kv_heads,
                                head_size);
      if (t == 0)
        first_out = out;
      rig_same("out of several threads", first_out, out, out_count * flap_dtype_bytes(dtype));
      if (t > 0)
        free(out);
    }
    (void)naive_loss(&n);
    for (uint64_t i = 0; i < out_count; ++i)
      rig_near("out", i, rig_at(dtype, first_out, i), n.out[i], rig_ulp(dtype), 1e-5);
    free(q), free(k), free(v), free(first_out), free(n.q), free(n.k), free(n.v), free(n.out), free(n.c), free(n.lse);
    free(n.row);
  }
}

START_TEST(decode_any_position_matches_naive) {
  const flap_ops_limits limits = rig_limits(rig_dtype(_i));
  rig_with_threads(&limits, decode);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_attention");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, attention_any_shape_matches_naive_and_finite_differences, 0, RIG_DTYPES);
  tcase_add_test(tests, attention_large_scores_stay_finite);
  tcase_add_loop_test(tests, decode_any_position_matches_naive, 0, RIG_DTYPES);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
