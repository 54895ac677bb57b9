/* The attention kernels for CUDA against fp64 on the host, with a bound per element that follows the roundings; and
 * that two runs give the same bits, that nothing outside the results and the told scratch is written. */
#include "base/philox.h"
#include "kernels/cuda/attention.h"

#include <check.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUARD_BYTES 4096u
#define POISON 0xa5

typedef flap_cuda_attention_shape shape;

static void cuda_ok(cudaError_t status, const char *what) {
  ck_assert_msg(status == cudaSuccess, "%s: %s", what, cudaGetErrorString(status));
}

/* ---- values ---- */

static uint16_t to_f16(double value) { /* to nearest even */
  const uint16_t sign = value < 0 ? 0x8000u : 0u;
  const double magnitude = fabs(value);
  if (magnitude == 0)
    return sign;
  int exponent;
  frexp(magnitude, &exponent);
  const int last = exponent - 11 < -24 ? -24 : exponent - 11; /* power of the last bit */
  const uint32_t units = (uint32_t)nearbyint(ldexp(magnitude, -last));
  const uint32_t bits = ((uint32_t)(last + 24) << 10) + units; /* the leading bit of normal numbers adds one */
  return (uint16_t)(sign | bits);
}

static double from_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? (double)NAN : (double)INFINITY)
                           : exponent == 0 ? ldexp(fraction, -24)
                                           : ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

static double value_at(flap_dtype dtype, const void *values, uint64_t i) {
  if (dtype == FLAP_F32)
    return (double)((const float *)values)[i];
  const uint16_t bits = ((const uint16_t *)values)[i];
  return dtype == FLAP_BF16 ? (double)flap_bf16_to_f32(bits) : from_f16(bits);
}

static void store_at(flap_dtype dtype, void *values, uint64_t i, double value) {
  if (dtype == FLAP_F32)
    ((float *)values)[i] = (float)value;
  else
    ((uint16_t *)values)[i] = dtype == FLAP_BF16 ? flap_f32_to_bf16((float)value) : to_f16(value);
}

/* Relative error of storing a value; for fp32, of a sum of some hundred terms and the exponentials in it. */
static double roundoff(flap_dtype dtype) {
  return dtype == FLAP_BF16 ? 0x1p-8 : dtype == FLAP_F16 ? 0x1p-11 : 0x1p-18;
}

static uint64_t drawn;
static flap_philox normals, shapes;

static double normal(void) {
  return (double)flap_philox_normal(&normals, drawn++);
}

static uint32_t between(uint32_t low, uint32_t high) {
  return low + (uint32_t)flap_philox_below(&shapes, drawn++, (uint64_t)high - low + 1);
}

/* ---- operands: host and device copies, with a guard after each ---- */

typedef struct operand {
  unsigned char *host, *device;
  uint64_t bytes;
} operand;

static operand make(uint64_t bytes) {
  operand x = {.bytes = bytes};
  x.host = malloc(bytes + GUARD_BYTES);
  ck_assert_ptr_nonnull(x.host);
  memset(x.host, POISON, bytes + GUARD_BYTES);
  cuda_ok(cudaMalloc((void **)&x.device, bytes + GUARD_BYTES), "cudaMalloc");
  return x;
}

static operand make_normal(flap_dtype dtype, uint64_t count, double scale) {
  operand x = make(count * flap_dtype_bytes(dtype));
  for (uint64_t i = 0; i < count; ++i)
    store_at(dtype, x.host, i, normal() * scale);
  return x;
}

static void upload(operand *x) {
  cuda_ok(cudaMemcpy(x->device, x->host, x->bytes + GUARD_BYTES, cudaMemcpyHostToDevice), "upload");
}

static void poison(operand *x) {
  cuda_ok(cudaMemset(x->device, POISON, x->bytes + GUARD_BYTES), "poison");
}

/* Fetches a result; its guard must be as it was. */
static void download(operand *x, const char *what) {
  cuda_ok(cudaMemcpy(x->host, x->device, x->bytes + GUARD_BYTES, cudaMemcpyDeviceToHost), what);
  for (uint32_t i = 0; i < GUARD_BYTES; ++i)
    ck_assert_msg(x->host[x->bytes + i] == POISON, "%s: written past its end", what);
}

static void drop(operand *x) {
  free(x->host);
  cudaFree(x->device);
}

typedef struct problem {
  shape s;
  uint64_t q_count, kv_count, out_count, lse_count;
  operand q, k, v, dout, out, lse, dq, dk, dv, scratch, forward_scratch;
} problem;

static problem problem_of(shape s) {
  problem p = {.s = s};
  p.q_count = (uint64_t)s.batch * s.queries * s.q_stride;
  p.kv_count = (uint64_t)s.batch * s.keys * s.kv_stride;
  p.out_count = (uint64_t)s.batch * s.queries * s.heads * s.head_size;
  p.lse_count = (uint64_t)s.batch * s.queries * s.heads;
  p.q = make_normal(s.dtype, p.q_count, 1.5);
  p.k = make_normal(s.dtype, p.kv_count, 1.0);
  p.v = make_normal(s.dtype, p.kv_count, 1.0);
  p.dout = make_normal(s.dtype, p.out_count, 1.0);
  p.out = make(p.out_count * flap_dtype_bytes(s.dtype));
  p.lse = make(p.lse_count * sizeof(float));
  p.dq = make(p.q.bytes);
  p.dk = make(p.k.bytes);
  p.dv = make(p.v.bytes);
  p.scratch = make(flap_cuda_attention_backward_scratch_bytes(&s));
  p.forward_scratch = make(flap_cuda_attention_forward_scratch_bytes(&s));
  upload(&p.q);
  upload(&p.k);
  upload(&p.v);
  upload(&p.dout);
  return p;
}

static void close_problem(problem *p) {
  operand *const all[] = {&p->q,  &p->k,  &p->v,       &p->dout,           &p->out, &p->lse, &p->dq,
                          &p->dk, &p->dv, &p->scratch, &p->forward_scratch};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
    drop(all[i]);
}

/* ---- the reference ---- */

/* Sums in fp64; *_error: what roundings before the last one may do to each at worst, in roundoffs. */
typedef struct reference {
  double *out, *lse, *dq, *dk, *dv;
  double *out_error, *dq_error, *dk_error, *dv_error;
  double *p, *row;
} reference;

static double *doubles(uint64_t count) {
  double *x = calloc(count, sizeof *x);
  ck_assert_ptr_nonnull(x);
  return x;
}

static double *unpack(flap_dtype dtype, const operand *x) {
  const uint64_t count = x->bytes / flap_dtype_bytes(dtype);
  double *values = doubles(count);
  for (uint64_t i = 0; i < count; ++i)
    values[i] = value_at(dtype, x->host, i);
  return values;
}

typedef struct inputs {
  double *q, *k, *v, *dout;
} inputs;

/* Probabilities of one row, and its results of the forward. */
static void reference_row(const problem *p, const inputs *in, reference *r, uint32_t b, uint32_t t, uint32_t head) {
  const shape *s = &p->s;
  const uint32_t hd = s->head_size, seen = s->first_position + t + 1, kv_head = head / (s->heads / s->kv_heads);
  const double *q = in->q + ((uint64_t)b * s->queries + t) * s->q_stride + (uint64_t)head * hd;
  const double *k = in->k + (uint64_t)b * s->keys * s->kv_stride + (uint64_t)kv_head * hd;
  const double *v = in->v + (k - in->k);
  double top = -INFINITY, sum = 0;
  for (uint32_t j = 0; j < seen; ++j) {
    double score = 0;
    for (uint32_t d = 0; d < hd; ++d)
      score += q[d] * k[(uint64_t)j * s->kv_stride + d];
    r->p[j] = score / sqrt(hd);
    top = fmax(top, r->p[j]);
  }
  for (uint32_t j = 0; j < seen; ++j)
    sum += r->p[j] = exp(r->p[j] - top);
  r->lse[((uint64_t)b * s->heads + head) * s->queries + t] = top + log(sum);
  const uint64_t to = (((uint64_t)b * s->queries + t) * s->heads + head) * hd;
  for (uint32_t j = 0; j < seen; ++j) {
    r->p[j] /= sum;
    for (uint32_t d = 0; d < hd; ++d) {
      r->out[to + d] += r->p[j] * v[(uint64_t)j * s->kv_stride + d];
      r->out_error[to + d] += r->p[j] * fabs(v[(uint64_t)j * s->kv_stride + d]);
    }
  }
}

/* Adds one row's part of the gradients. A score's gradient is rounded once, after delta was computed from a rounded
 * out. */
static void reference_row_backward(const problem *p, const inputs *in, reference *r, uint32_t b, uint32_t t,
                                   uint32_t head) {
  const shape *s = &p->s;
  const uint32_t hd = s->head_size, kv_head = head / (s->heads / s->kv_heads);
  const double scale = 1 / sqrt(hd);
  const uint64_t row = (((uint64_t)b * s->queries + t) * s->heads + head) * hd;
  const uint64_t q = ((uint64_t)b * s->queries + t) * s->q_stride + (uint64_t)head * hd;
  double delta = 0, delta_error = 0;
  for (uint32_t d = 0; d < hd; ++d) {
    delta += in->dout[row + d] * r->out[row + d];
    delta_error += fabs(in->dout[row + d]) * (r->out_error[row + d] + fabs(r->out[row + d]));
  }
  for (uint32_t j = 0; j <= t; ++j) {
    const uint64_t kv = ((uint64_t)b * s->keys + j) * s->kv_stride + (uint64_t)kv_head * hd;
    double dp = 0, dp_error = 0;
    for (uint32_t d = 0; d < hd; ++d) {
      dp += in->dout[row + d] * in->v[kv + d];
      dp_error += fabs(in->dout[row + d] * in->v[kv + d]) * 0x1p-10; /* fp32 sums */
    }
    const double ds = r->p[j] * (dp - delta) * scale;
    const double error = fabs(ds) + r->p[j] * (delta_error + dp_error) * scale;
    for (uint32_t d = 0; d < hd; ++d) {
      r->dq[q + d] += ds * in->k[kv + d];
      r->dq_error[q + d] += error * fabs(in->k[kv + d]);
      r->dk[kv + d] += ds * in->q[q + d];
      r->dk_error[kv + d] += error * fabs(in->q[q + d]);
      r->dv[kv + d] += r->p[j] * in->dout[row + d];
      r->dv_error[kv + d] += r->p[j] * fabs(in->dout[row + d]);
    }
  }
}

static reference reference_of(const problem *p, bool backward) {
  const shape *s = &p->s;
  inputs in = {unpack(s->dtype, &p->q), unpack(s->dtype, &p->k), unpack(s->dtype, &p->v), unpack(s->dtype, &p->dout)};
  reference r = {.out = doubles(p->out_count),
                 .lse = doubles(p->lse_count),
                 .dq = doubles(p->q_count),
                 .dk = doubles(p->kv_count),
                 .dv = doubles(p->kv_count),
                 .out_error = doubles(p->out_count),
                 .dq_error = doubles(p->q_count),
                 .dk_error = doubles(p->kv_count),
                 .dv_error = doubles(p->kv_count),
                 .p = doubles(s->keys)};
  for (uint32_t b = 0; b < s->batch; ++b)
    for (uint32_t head = 0; head < s->heads; ++head)
      for (uint32_t t = 0; t < s->queries; ++t) {
        reference_row(p, &in, &r, b, t, head);
        if (backward)
          reference_row_backward(p, &in, &r, b, t, head);
      }
  free(in.q);
  free(in.k);
  free(in.v);
  free(in.dout);
  return r;
}

static void close_reference(reference *r) {
  double *const all[] = {r->out,       r->lse,      r->dq,       r->dk,       r->dv,
                         r->out_error, r->dq_error, r->dk_error, r->dv_error, r->p};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
    free(all[i]);
}

/* ---- comparisons ---- */

static const char *describe(const shape *s) {
  static char text[160];
  snprintf(text, sizeof text, "%s%s%s%s B %u T %u first %u HQ %u HKV %u HD %u strides %u %u", flap_dtype_name(s->dtype),
           s->portable ? " portable" : "", s->little_shared ? " little shared memory" : "",
           s->two_passes ? " two passes" : "", s->batch, s->queries, s->first_position, s->heads, s->kv_heads,
           s->head_size, s->q_stride, s->kv_stride);
  return text;
}

/* `width` of each `stride` elements are results and must be within the bound, the rest must still be poison. Over many
 * elements the error is held to half of the bound, since roundings are not all of one sign. */
static void compare(const shape *s, const char *what, const operand *got, const double *want, const double *error,
                    uint32_t width, uint32_t stride) {
  const double unit = roundoff(s->dtype);
  const uint64_t count = got->bytes / flap_dtype_bytes(s->dtype), element = flap_dtype_bytes(s->dtype);
  double bound_square = 0, error_square = 0;
  for (uint64_t i = 0; i < count; ++i) {
    if (i % stride >= width) {
      for (uint64_t byte = 0; byte < element; ++byte)
        ck_assert_msg(got->host[i * element + byte] == POISON, "%s: %s: gap at %llu written", describe(s), what,
                      (unsigned long long)i);
      continue;
    }
    const double value = value_at(s->dtype, got->host, i), off = fabs(value - want[i]);
    ck_assert_msg(off <= 1.1 * unit * (error[i] + fabs(want[i])) + 1e-6, "%s: %s[%llu] is %.9g, not %.9g (bound %.3g)",
                  describe(s), what, (unsigned long long)i, value, want[i],
                  1.1 * unit * (error[i] + fabs(want[i])) + 1e-6);
    const double limit = unit * (error[i] + fabs(want[i])) + 1e-6;
    bound_square += limit * limit;
    error_square += off * off;
  }
  ck_assert_msg(count < 2000 || sqrt(error_square) <= 0.5 * sqrt(bound_square),
                "%s: %s: norm of error %.3g (bound %.3g)", describe(s), what, sqrt(error_square),
                0.5 * sqrt(bound_square));
}

static void compare_lse(const problem *p, const reference *r) {
  for (uint64_t i = 0; i < p->lse_count; ++i) {
    const double got = (double)((const float *)(const void *)p->lse.host)[i];
    ck_assert_msg(fabs(got - r->lse[i]) <= 2e-5 * (1 + fabs(r->lse[i])), "%s: lse[%llu] is %.9g, not %.9g",
                  describe(&p->s), (unsigned long long)i, got, r->lse[i]);
  }
}

static void forward_once(problem *p) {
  poison(&p->out);
  poison(&p->lse);
  poison(&p->forward_scratch);
  cuda_ok(flap_cuda_attention_forward(&p->s, p->out.device, (float *)(void *)p->lse.device, p->q.device, p->k.device,
                                      p->v.device, p->forward_scratch.device, NULL),
          describe(&p->s));
  download(&p->out, "out");
  download(&p->lse, "lse");
  download(&p->forward_scratch, "scratch of the forward");
}

static void backward_once(problem *p) {
  poison(&p->dq);
  poison(&p->dk);
  poison(&p->dv);
  poison(&p->scratch);
  cuda_ok(flap_cuda_attention_backward(&p->s, p->dq.device, p->dk.device, p->dv.device, p->dout.device, p->q.device,
                                       p->k.device, p->v.device, p->out.device, (const float *)(void *)p->lse.device,
                                       p->scratch.device, NULL),
          describe(&p->s));
  download(&p->dq, "dq");
  download(&p->dk, "dk");
  download(&p->dv, "dv");
  download(&p->scratch, "scratch");
}

/* Runs `once` and again, and compares the bits of the results. */
static void twice(problem *p, void (*once)(problem *p), operand *const results[], size_t count) {
  unsigned char *first[4];
  once(p);
  for (size_t i = 0; i < count; ++i) {
    first[i] = malloc(results[i]->bytes);
    ck_assert_ptr_nonnull(first[i]);
    memcpy(first[i], results[i]->host, results[i]->bytes);
  }
  once(p);
  for (size_t i = 0; i < count; ++i) {
    ck_assert_msg(memcmp(first[i], results[i]->host, results[i]->bytes) == 0, "%s: result %zu differs from run to run",
                  describe(&p->s), i);
    free(first[i]);
  }
}

static void check_kernels(problem *p, const reference *r, bool backward) {
  const shape *s = &p->s;
  const uint32_t q_width = s->heads * s->head_size, kv_width = s->kv_heads * s->head_size;
  twice(p, forward_once, (operand *const[]){&p->out, &p->lse}, 2);
  compare(s, "out", &p->out, r->out, r->out_error, 1, 1);
  compare_lse(p, r);
  if (!backward)
    return;
  twice(p, backward_once, (operand *const[]){&p->dq, &p->dk, &p->dv}, 3);
  compare(s, "dq", &p->dq, r->dq, r->dq_error, q_width, s->q_stride);
  compare(s, "dk", &p->dk, r->dk, r->dk_error, kv_width, s->kv_stride);
  compare(s, "dv", &p->dv, r->dv, r->dv_error, kv_width, s->kv_stride);
}

/* Also by the kernels of two passes and by those for every GPU, where this one has others. */
static void check_shape(shape s, bool backward) {
  problem p = problem_of(s);
  reference r = reference_of(&p, backward);
  check_kernels(&p, &r, backward);
  const char *path = flap_cuda_attention_path(&s, true);
  if (backward && strcmp(path, "chain") == 0) {
    p.s.two_passes = true;
    check_kernels(&p, &r, backward);
  }
  if (strcmp(path, "chain") == 0 || strcmp(path, "wgmma") == 0) {
    p.s.portable = true;
    check_kernels(&p, &r, backward);
  }
  p.s.portable = p.s.little_shared = true;
  check_kernels(&p, &r, backward);
  close_reference(&r);
  close_problem(&p);
}

static shape shape_of(flap_dtype dtype, uint32_t batch, uint32_t queries, uint32_t kv_heads, uint32_t group,
                      uint32_t head_size) {
  shape s = {.dtype = dtype, .batch = batch, .queries = queries, .keys = queries, .kv_heads = kv_heads};
  s.heads = kv_heads * group;
  s.head_size = head_size;
  s.q_stride = s.heads * head_size;
  s.kv_stride = kv_heads * head_size;
  return s;
}

/* ---- tests ---- */

static const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};

START_TEST(attention_lengths_around_tiles_match_fp64) {
  static const uint32_t lengths[] = {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 257};
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; ++i) {
    check_shape(shape_of(FLAP_BF16, 1, lengths[i], 1, 2, 64), true);
    check_shape(shape_of(FLAP_BF16, 1, lengths[i], 1, 1, 128), true);
  }
}
END_TEST

START_TEST(attention_head_sizes_and_groups_match_fp64) {
  static const uint32_t head_sizes[] = {8, 32, 64, 80, 96, 128, 136, 256}, groups[] = {1, 2, 4, 8};
  for (size_t i = 0; i < sizeof head_sizes / sizeof *head_sizes; ++i)
    for (size_t j = 0; j < sizeof groups / sizeof *groups; ++j)
      check_shape(shape_of(dtypes[(i + j) % 3], between(1, 2), between(20, 90), 1, groups[j], head_sizes[i]), true);
}
END_TEST

START_TEST(attention_random_shapes_and_strides_match_fp64) {
  static const uint32_t head_sizes[] = {32, 64, 80, 96, 128};
  for (uint32_t i = 0; i < 24; ++i) {
    shape s = shape_of(dtypes[i % 3], between(1, 3), between(1, 200), between(1, 2), 1u << between(0, 3),
                       head_sizes[between(0, 4)]);
    if (s.kv_heads * s.heads > 8)
      s.queries = s.keys = s.queries / 4 + 1;
    if (i % 2 != 0) /* one matrix for q, k and v */
      s.q_stride = s.kv_stride = (s.heads + 2 * s.kv_heads) * s.head_size;
    if (i % 5 == 0) /* strides that only plain loads can take */
      s.q_stride += 3;
    check_shape(s, true);
  }
}
END_TEST

START_TEST(attention_many_blocks_take_a_group_in_one_part) {
  check_shape(shape_of(FLAP_BF16, 34, 20, 4, 2, 64), true);
  check_shape(shape_of(FLAP_F16, 34, 18, 4, 2, 96), true);
}
END_TEST

/* More heads than there are slots for sums of dq, so that a slot serves one head after another. */
START_TEST(attention_many_heads_take_turns_in_slots) {
  check_shape(shape_of(FLAP_BF16, 70, 140, 1, 1, 64), true);
  check_shape(shape_of(FLAP_F16, 35, 140, 2, 1, 128), true);
  check_shape(shape_of(FLAP_BF16, 17, 133, 8, 2, 72), true);
}
END_TEST

/* Norm of a - b over the norm of b. */
static double distance(flap_dtype dtype, const unsigned char *a, const operand *b) {
  double off = 0, all = 0;
  for (uint64_t i = 0; i < b->bytes / flap_dtype_bytes(dtype); ++i) {
    const double x = value_at(dtype, a, i), y = value_at(dtype, b->host, i);
    off += (x - y) * (x - y);
    all += y * y;
  }
  return sqrt(off / all);
}

/* Lengths that the reference would take too long for: the kernels are compared with those for every GPU, which differ
 * in the order of sums. */
START_TEST(attention_long_sequences_match_the_portable_kernels) {
  static const uint32_t shapes_of[][5] = {
      {1, 4096, 2, 1, 128}, {2, 2048, 20, 1, 128}, {1, 2048, 4, 4, 128}, {1, 3000, 3, 2, 64}, {3, 1111, 24, 1, 64}};
  for (size_t i = 0; i < sizeof shapes_of / sizeof *shapes_of; ++i) {
    const uint32_t *x = shapes_of[i];
    problem p = problem_of(shape_of(FLAP_BF16, x[0], x[1], x[2], x[3], x[4]));
    operand *const results[] = {&p.dq, &p.dk, &p.dv};
    unsigned char *ours[3];
    forward_once(&p);
    twice(&p, backward_once, results, 3);
    for (size_t j = 0; j < 3; ++j) {
      ours[j] = malloc(results[j]->bytes);
      ck_assert_ptr_nonnull(ours[j]);
      memcpy(ours[j], results[j]->host, results[j]->bytes);
    }
    p.s.portable = true;
    backward_once(&p);
    for (size_t j = 0; j < 3; ++j) {
      const double off = distance(p.s.dtype, ours[j], results[j]);
      ck_assert_msg(off <= 4e-3, "%s: result %zu is off by %g of its norm", describe(&p.s), j, off);
      free(ours[j]);
    }
    close_problem(&p);
  }
}
END_TEST

START_TEST(attention_decode_against_a_cache_matches_fp64) {
  static const uint32_t tokens[] = {1, 2, 5, 16, 17, 40}, firsts[] = {0, 1, 255, 700, 3000};
  for (size_t i = 0; i < sizeof tokens / sizeof *tokens; ++i)
    for (size_t j = 0; j < sizeof firsts / sizeof *firsts; ++j) {
      static const uint32_t head_sizes[] = {64, 128, 96, 160};
      shape s = shape_of(dtypes[(i + 2 * j) % 3], 1, tokens[i], 1, 1u << between(0, 2), head_sizes[(i + j) % 4]);
      s.first_position = firsts[j];
      s.keys = s.first_position + s.queries;
      check_shape(s, false);
    }
}
END_TEST

/* Scores of some hundreds: the running maximum has to carry them, and lse too. */
START_TEST(attention_large_scores_stay_finite) {
  shape s = shape_of(FLAP_BF16, 1, 150, 1, 2, 128);
  problem p = problem_of(s);
  for (uint64_t i = 0; i < p.q_count; ++i)
    store_at(s.dtype, p.q.host, i, 24 * value_at(s.dtype, p.q.host, i));
  upload(&p.q);
  reference r = reference_of(&p, true);
  twice(&p, forward_once, (operand *const[]){&p.out, &p.lse}, 2);
  compare(&s, "out", &p.out, r.out, r.out_error, 1, 1);
  compare_lse(&p, &r);
  backward_once(&p);
  for (uint64_t i = 0; i < p.q_count; ++i)
    ck_assert_msg(isfinite(value_at(s.dtype, p.dq.host, i)), "dq[%llu] is not finite", (unsigned long long)i);
  close_reference(&r);
  close_problem(&p);
}
END_TEST

START_TEST(attention_of_smaller_shapes_needs_no_more_scratch) {
  for (uint32_t i = 0; i < 2000; ++i) {
    const uint32_t group = between(1, 8);
    shape large = shape_of(FLAP_BF16, between(1, 40), between(1, 9000), between(1, 8), group, 8 * between(1, 32));
    large.first_position = between(0, 9000);
    shape small = large;
    small.batch = between(1, large.batch);
    small.queries = small.keys = between(1, large.queries);
    small.first_position = between(0, large.first_position);
    ck_assert_uint_le(flap_cuda_attention_backward_scratch_bytes(&small),
                      flap_cuda_attention_backward_scratch_bytes(&large));
    ck_assert_uint_le(flap_cuda_attention_forward_scratch_bytes(&small),
                      flap_cuda_attention_forward_scratch_bytes(&large));
  }
}
END_TEST

START_TEST(attention_refuses_what_it_cannot_take) {
  shape s = shape_of(FLAP_BF16, 1, 32, 1, 1, 64);
  problem p = problem_of(s);
  s.head_size = 60;
  ck_assert_int_eq(
      flap_cuda_attention_forward(&s, p.out.device, NULL, p.q.device, p.k.device, p.v.device, p.scratch.device, NULL),
      cudaErrorInvalidValue);
  s = p.s;
  ck_assert_int_eq(flap_cuda_attention_forward(&s, p.out.device, NULL, p.q.device + 2, p.k.device, p.v.device,
                                               p.scratch.device, NULL),
                   cudaErrorMisalignedAddress);
  close_problem(&p);
}
END_TEST

int main(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    printf("no CUDA device: skipped\n");
    return 77;
  }
  const char *text = getenv("FLAP_TEST_SEED");
  const uint64_t seed = text != NULL ? strtoull(text, NULL, 0) : 20;
  printf("FLAP_TEST_SEED=%llu\n", (unsigned long long)seed);
  normals = flap_philox_stream(seed, "cuda attention values");
  shapes = flap_philox_stream(seed, "cuda attention shapes");
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("cuda_attention");
  tcase_set_timeout(tests, 300);
  tcase_add_test(tests, attention_lengths_around_tiles_match_fp64);
  tcase_add_test(tests, attention_head_sizes_and_groups_match_fp64);
  tcase_add_test(tests, attention_random_shapes_and_strides_match_fp64);
  tcase_add_test(tests, attention_many_blocks_take_a_group_in_one_part);
  tcase_add_test(tests, attention_many_heads_take_turns_in_slots);
  tcase_add_test(tests, attention_long_sequences_match_the_portable_kernels);
  tcase_add_test(tests, attention_decode_against_a_cache_matches_fp64);
  tcase_add_test(tests, attention_large_scores_stay_finite);
  tcase_add_test(tests, attention_of_smaller_shapes_needs_no_more_scratch);
  tcase_add_test(tests, attention_refuses_what_it_cannot_take);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK); /* a CUDA context does not survive a fork */
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
