/* Normal numbers by Box and Muller, from polynomials of our own: so they are the same bits with every C library,
 * compiler and processor, and come several at a time.
 *
 * Every operation is an IEEE one in fp64, in an order that the source fixes (the build forbids fused multiply-adds), so
 * vectors of any width give what a scalar gives. Loops are over lanes of 64 bits only, and choose by masks: compilers
 * turn them into vectors. Logarithm: u = 2^e (1 + f) with 1 + f in (sqrt(1/2), sqrt(2)], and log(1 + f) by the odd
 * series of s = f / (2 + f), fitted (coefficients of fdlibm's e_log.c). Sine and cosine: the angle is taken to the
 * nearest quarter of a turn, and the rest, within an eighth, goes into Taylor's series, whose next term is below 2^-53
 * there.
 */
#include "base/philox.h"

#include <math.h>
#include <string.h>

#define PAIRS 64u /* that are made at a time */

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif

static inline double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint64_t to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* An integer below 2^53, exactly: its two halves in the mantissas of 2^84 and 2^52. */
static inline double to_double(uint64_t value) {
  const double high = from_bits(0x4530000000000000u | value >> 32) - (0x1p84 + 0x1p52);
  return high + from_bits(0x4330000000000000u | (value & 0xffffffffu));
}

/* log of u in (0, 1]. */
static inline double logarithm(double u) {
  const uint64_t root_half = 0x3fe6a09e667f3bcdu; /* the first double above sqrt(1/2) */
  const uint64_t bits = to_bits(u), above = bits - root_half + 0x3ff0000000000000u;
  const double e = from_bits(0x4330000000000000u | above >> 52) - (0x1p52 + 1023);
  const double f = from_bits((above & 0x000fffffffffffffu) + root_half) - 1;
  const double s = f / (2 + f), z = s * s, half = 0.5 * f * f;
  double r = 1.479819860511658591e-01;
  r = r * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  r *= z;
  /* ln 2 in two parts, the first of which times e is exact. */
  return e * 6.93147180369123816490e-01 - ((half - (s * (half + r) + e * 1.90821492927058770002e-10)) - f);
}

/* Cosine and sine of v turns, v in [0, 1). */
static inline void circle(double v, double *cosine_out, double *sine_out) {
  const double shifted = v * 4 + 0x1.8p52; /* to the nearest integer, in the lowest bits */
  const uint64_t quarter = to_bits(shifted);
  const double x = (v * 4 - (shifted - 0x1.8p52)) * 1.57079632679489661923, z = x * x;
  double c = -1.0 / 6402373705728000, s = 1.0 / 355687428096000; /* 1/18!, 1/17! */
  c = c * z + 1.0 / 20922789888000;
  c = c * z - 1.0 / 87178291200;
  c = c * z + 1.0 / 479001600;
  c = c * z - 1.0 / 3628800;
  c = c * z + 1.0 / 40320;
  c = c * z - 1.0 / 720;
  c = c * z + 1.0 / 24;
  c = c * z - 0.5;
  c = c * z + 1;
  s = s * z - 1.0 / 1307674368000;
  s = s * z + 1.0 / 6227020800;
  s = s * z - 1.0 / 39916800;
  s = s * z + 1.0 / 362880;
  s = s * z - 1.0 / 5040;
  s = s * z + 1.0 / 120;
  s = s * z - 1.0 / 6;
  s = s * z * x + x;
  const uint64_t swap = 0 - (quarter & 1), cosine = to_bits(c), sine = to_bits(s);
  const uint64_t first = (cosine & ~swap) | (sine & swap), second = (sine & ~swap) | (cosine & swap);
  *cosine_out = from_bits(first ^ ((quarter + 1) & 2) << 62);
  *sine_out = from_bits(second ^ (quarter & 2) << 62);
}

/* Normals of `count` pairs from pair `first` on, at most PAIRS: of each pair one, then the other. */
VECTORS static void make_pairs(const flap_philox *stream, uint64_t first, uint32_t count, float *values_out) {
  uint64_t word[4][PAIRS];
  const uint64_t low = 0xffffffffu;
  for (uint32_t i = 0; i < count; i++) {
    uint64_t c0 = (first + i) & low, c1 = (first + i) >> 32, c2 = 0, c3 = 0;
    uint64_t k0 = stream->key[0], k1 = stream->key[1];
    for (int round = 0; round < 10; round++) {
      const uint64_t product0 = c0 * 0xD2511F53u, product1 = c2 * 0xCD9E8D57u;
      c0 = product1 >> 32 ^ c1 ^ k0;
      c1 = product1 & low;
      c2 = product0 >> 32 ^ c3 ^ k1;
      c3 = product0 & low;
      k0 = (k0 + 0x9E3779B9u) & low;
      k1 = (k1 + 0xBB67AE85u) & low;
    }
    word[0][i] = c0, word[1][i] = c1, word[2][i] = c2, word[3][i] = c3;
  }
  double cosine[PAIRS], sine[PAIRS];
  for (uint32_t i = 0; i < count; i++) {
    /* (0, 1] for the logarithm, [0, 1) for the angle; 53 bits each. */
    const double u = to_double(((word[1][i] << 32 | word[0][i]) >> 11) + 1) * 0x1p-53;
    const double v = to_double((word[3][i] << 32 | word[2][i]) >> 11) * 0x1p-53;
    const double radius = sqrt(-2.0 * logarithm(u));
    circle(v, &cosine[i], &sine[i]);
    cosine[i] *= radius;
    sine[i] *= radius;
  }
  for (uint32_t i = 0; i < count; i++) {
    values_out[2 * i] = (float)cosine[i];
    values_out[2 * i + 1] = (float)sine[i];
  }
}

float flap_philox_normal(const flap_philox *stream, uint64_t index) {
  float pair[2];
  make_pairs(stream, index / 2, 1, pair);
  return pair[index % 2];
}

void flap_philox_normals(const flap_philox *stream, uint64_t first, uint64_t count, float *values_out) {
  uint64_t done = 0;
  if (count > 0 && first % 2 == 1)
    values_out[done++] = flap_philox_normal(stream, first);
  while (done + 1 < count) {
    const uint64_t left = (count - done) / 2;
    const uint32_t pairs = left < PAIRS ? (uint32_t)left : PAIRS;
    make_pairs(stream, (first + done) / 2, pairs, values_out + done);
    done += 2 * (uint64_t)pairs;
  }
  if (done < count)
    values_out[done] = flap_philox_normal(stream, first + done);
}
