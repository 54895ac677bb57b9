/* The 8-bit codes of AdamW's moments, one text for the cpu and for cuda: what a code stands for, and the code of a
 * number.
 *
 * Role: private to kernels/; arithmetic of single numbers. Blocks and their largest value are the caller's.
 *
 * Dynamic tree quantisation (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): a decade of ratios
 * to the block's largest value has half as many codes as the decade above it, evenly spaced. Ours puts codes on the
 * powers of ten: m's code 127 is 1, 63 is 0.1, 31 is 0.01, down to 1, which is 1e-6, and 0, which is 0; with a sign.
 * v's code 255 is 1, 127 is 0.1, down to 1, which is 1e-7, and 0, which is 0. So the largest value and zero are exact,
 * for either sign.
 *
 * Between powers of ten code and ratio are linear in each other, and steps only grow with the ratio. A ratio is
 * therefore the largest of the decades' lines at the code, and a code the smallest of the inverse lines at the ratio,
 * rounded to an integer: the nearest code, without a table or a branch. Ties go to the even code. */
#ifndef FLAP_KERNELS_MOMENTS_H
#define FLAP_KERNELS_MOMENTS_H

#include "base/dtype.h"

#ifdef __CUDACC__
#define FLAP_MOMENT static __device__ inline
#define FLAP_MOMENT_FMA(x, a, b) __fmaf_rn(x, a, b)
#define FLAP_MOMENT_MIN(a, b) fminf(a, b)
#define FLAP_MOMENT_MAX(a, b) fmaxf(a, b)
#define FLAP_MOMENT_BITS(x) __float_as_uint(x)
#else
#define FLAP_MOMENT static inline
#define FLAP_MOMENT_FMA(x, a, b) __builtin_fmaf(x, a, b)
#define FLAP_MOMENT_MIN(a, b) ((a) < (b) ? (a) : (b))
#define FLAP_MOMENT_MAX(a, b) ((a) > (b) ? (a) : (b))
#define FLAP_MOMENT_BITS(x) flap_f32_bits(x)
#endif

/* The ratio of m's code without its sign, 0 to 127. The top decade's line begins one unit of the last place higher than
 * it would, here and for v, so that the ratio of the top code is 1 to the bit. */
FLAP_MOMENT float flap_moment_m_ratio(float code) {
  float ratio = code * 1e-6f;
  float line = FLAP_MOMENT_FMA(code, 4.5e-6f, -3.5e-6f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 2.25e-5f, -5.75e-5f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 1.125e-4f, -6.875e-4f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 5.625e-4f, -7.4375e-3f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 2.8125e-3f, -7.71875e-2f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 1.40625e-2f, -7.8593743e-1f);
  return FLAP_MOMENT_MAX(ratio, line);
}

/* The ratio of v's code, 0 to 255; it is one of square roots. */
FLAP_MOMENT float flap_moment_v_ratio(float code) {
  float ratio = code * 1e-7f;
  float line = FLAP_MOMENT_FMA(code, 4.5e-7f, -3.5e-7f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 2.25e-6f, -5.75e-6f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 1.125e-5f, -6.875e-5f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 5.625e-5f, -7.4375e-4f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 2.8125e-4f, -7.71875e-3f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 1.40625e-3f, -7.859375e-2f);
  ratio = FLAP_MOMENT_MAX(ratio, line);
  line = FLAP_MOMENT_FMA(code, 7.03125e-3f, -7.929687e-1f);
  return FLAP_MOMENT_MAX(ratio, line);
}

/* Where m's ratio, 0 to about 1, lies between the codes. The constants are those above, turned around: 2^j / 0.9 times
 * a power of ten, and 2^j * 8/9 - 1. */
FLAP_MOMENT float flap_moment_m_place(float ratio) {
  float place = ratio * 1e6f;
  float line = FLAP_MOMENT_FMA(ratio, (float)(2e6 / 9), (float)(7.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(4e5 / 9), (float)(23.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(8e4 / 9), (float)(55.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(16e3 / 9), (float)(119.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(32e2 / 9), (float)(247.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(64e1 / 9), (float)(503.0 / 9));
  return FLAP_MOMENT_MIN(place, line);
}

/* The same for the ratio of v's square roots. */
FLAP_MOMENT float flap_moment_v_place(float ratio) {
  float place = ratio * 1e7f;
  float line = FLAP_MOMENT_FMA(ratio, (float)(2e7 / 9), (float)(7.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(4e6 / 9), (float)(23.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(8e5 / 9), (float)(55.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(16e4 / 9), (float)(119.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(32e3 / 9), (float)(247.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(64e2 / 9), (float)(503.0 / 9));
  place = FLAP_MOMENT_MIN(place, line);
  line = FLAP_MOMENT_FMA(ratio, (float)(128e1 / 9), (float)(1015.0 / 9));
  return FLAP_MOMENT_MIN(place, line);
}

/* A place as a code in the low byte, two's complement if negative. Adding 1.5 * 2^23 rounds to an integer, to nearest
 * even, and leaves it in the low bits. */
FLAP_MOMENT uint32_t flap_moment_code(float place) {
  return FLAP_MOMENT_BITS(place + 12582912.0f) & 0xffu;
}

/* The factor that makes ratios out of a block's values; 0 for a block of zeros, whose ratios are 0 then. */
FLAP_MOMENT float flap_moment_inverse(float largest) {
  return largest > 0.0f ? 1.0f / largest : 0.0f;
}

#endif
