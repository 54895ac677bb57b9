/* The loops that run over many elements, compiled once per instruction set from cpu_vector_body.inc.
 *
 * Every function gives the same bits in every table: the arithmetic is written out, reductions use 16 partial sums that
 * are folded as a tree, and fused multiply-adds are either explicit or absent. Arrays are fp32 unless their type says
 * otherwise; outputs may be one of the inputs exactly, but must not overlap them otherwise. */
#ifndef FLAP_KERNELS_CPU_VECTOR_H
#define FLAP_KERNELS_CPU_VECTOR_H

#include "kernels/ops.h"

#include <stddef.h>

#define FLAP_CPU_LANES 16u

typedef struct flap_cpu_vector {
  const char *name;

  /* Conversions, by rows with strides in elements. Those to 16 bits round to nearest even. */
  void (*from_bf16)(float *out, size_t out_stride, const uint16_t *in, size_t in_stride, size_t rows, size_t columns);
  void (*to_bf16)(uint16_t *out, size_t out_stride, const float *in, size_t in_stride, size_t rows, size_t columns);
  void (*from_f16)(float *out, size_t out_stride, const uint16_t *in, size_t in_stride, size_t rows, size_t columns);
  void (*to_f16)(uint16_t *out, size_t out_stride, const float *in, size_t in_stride, size_t rows, size_t columns);

  void (*add)(float *out, const float *a, const float *b, size_t count);
  void (*scale)(float *x, float factor, size_t count);
  void (*round_bf16)(float *x, size_t count); /* each to the nearest bf16 value */
  void (*round_f16)(float *x, size_t count);
  /* partial sums of lane i % 16 += x² */
  void (*squares)(float sums[FLAP_CPU_LANES], const float *x, size_t count);
  void (*dot)(float sums[FLAP_CPU_LANES], const float *a, const float *b, size_t count);
  float (*max)(const float *x, size_t count, float initial);

  /* out = dtype(x * rstd) * weight. `dtype` is what is rounded to in the middle, here and below; FLAP_F32: nothing. */
  void (*normalise)(float *out, const float *x, const float *weight, float rstd, flap_dtype dtype, size_t count);
  /* sums += dy * weight * x. */
  void (*norm_dot)(float sums[FLAP_CPU_LANES], const float *dy, const float *weight, const float *x, size_t count);
  /* out = rstd * (dy * weight - x * mean) (+ residual); dweight += dy * dtype(x * rstd). */
  void (*norm_backward)(float *out, float *dweight, const float *dy, const float *x, const float *weight,
                        const float *residual, float rstd, float mean, flap_dtype dtype, size_t count);

  /* Rotates `heads` heads at x in place; cosines and sines of head_size / 2 angles. */
  void (*rope)(float *x, const float *cosines, const float *sines, size_t heads, size_t head_size, bool inverse);

  void (*swiglu)(float *out, const float *gate, const float *up, flap_dtype dtype, size_t count);
  void (*swiglu_backward)(float *dgate, float *dup, const float *dout, const float *gate, const float *up,
                          flap_dtype dtype, size_t count);

  /* One row of an attention tile: the first `valid` of `count` scores become exp(score * scale - maximum), the rest 0;
   * maximum and sum are brought up to date. Returns the factor for what was accumulated before. Up to the next multiple
   * of 16 beyond `valid`, the row must be memory that may be overwritten. */
  float (*softmax_row)(float *scores, size_t valid, size_t count, float scale, float *maximum, float *sum);
  /* Backward of a row: scores become probabilities p = exp(score * scale - lse), dp becomes p * (dp - delta) * scale.
   */
  void (*softmax_row_backward)(float *scores, float *dp, size_t valid, size_t count, float scale, float lse,
                               float delta);

  /* sums += exp(x - maximum); then out = exp(x - maximum - log_sum) * factor. */
  void (*exp_sums)(float sums[FLAP_CPU_LANES], const float *x, float maximum, size_t count);
  void (*softmax)(float *out, const float *x, float maximum, float log_sum, float factor, size_t count);
  void (*exponential)(float *out, const float *x, size_t count);

  /* AdamW as ops.h tells, `decay` being 1 where nothing decays. Each returns whether a weight was refused. */
  bool (*adamw_split)(const flap_adamw *scalars, float decay, uint16_t *high, int16_t *low, float *m, float *v,
                      const float *grad, size_t count);
  bool (*adamw_f16)(const flap_adamw *scalars, float decay, uint16_t *weight, float *master, float *m, float *v,
                    const float *grad, size_t count);
  bool (*adamw_f32)(const flap_adamw *scalars, float decay, float *weight, float *m, float *v, const float *grad,
                    size_t count);

  /* The 8-bit moments of flap_ops_adamw_8bit, whole blocks of FLAP_OPS_MOMENT_BLOCK: codes to fp32, and fp32 to codes
   * with the blocks' largest values. The latter returns whether a moment was not finite. */
  void (*moments_load)(float *m, float *v, const int8_t *m_codes, const uint8_t *v_codes, const float *m_largest,
                       const float *v_largest, size_t count);
  bool (*moments_store)(int8_t *m_codes, uint8_t *v_codes, float *m_largest, float *v_largest, const float *m,
                        const float *v, size_t count);
} flap_cpu_vector;

extern const flap_cpu_vector flap_cpu_vector_generic;
#if defined(__x86_64__)
extern const flap_cpu_vector flap_cpu_vector_avx2;
extern const flap_cpu_vector flap_cpu_vector_avx512;
#endif

/* The tables this processor can run, best first; returns how many (at most 3). */
uint32_t flap_cpu_vector_list(const flap_cpu_vector *tables_out[3]);

/* The tree that folds partial sums. */
static inline float flap_cpu_fold(const float sums[FLAP_CPU_LANES]) {
  float eight[8];
  for (int i = 0; i < 8; ++i)
    eight[i] = sums[i] + sums[i + 8];
  const float a = eight[0] + eight[4], b = eight[1] + eight[5], c = eight[2] + eight[6], d = eight[3] + eight[7];
  return (a + c) + (b + d);
}

#endif
