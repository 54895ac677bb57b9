/* Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011). A value is a pure function of (seed, name, counter), so nothing depends on who draws first. */
#ifndef FLAP_BASE_PHILOX_H
#define FLAP_BASE_PHILOX_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_philox {
  uint32_t key[2];
} flap_philox;

/* The stream of `name` under `seed`; the same pair gives the same stream on every machine. */
flap_philox flap_philox_stream(uint64_t seed, const char *name);

/* The bare generator: ten rounds over a 128-bit counter under a 64-bit key, least significant word first. */
void flap_philox_4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t words_out[4]);

/* Four uniform 32-bit words for a counter, which fills the two lower words of the generator's; the upper two are 0. */
void flap_philox_block(const flap_philox *stream, uint64_t counter, uint32_t words_out[4]);

/* A stream serves one of the three kinds below, because they read the same blocks.
 *
 * Element `index` of the stream: uniform in [0, 1) with 24 bits; standard normal (Box-Muller in fp64 by
 * polynomials of our own, so on every machine the same bits; element pairs share a block); uniform integer below
 * `bound` (> 0, unbiased enough for bound < 2^32: multiply-shift on 64 bits). */
float flap_philox_uniform(const flap_philox *stream, uint64_t index);
float flap_philox_normal(const flap_philox *stream, uint64_t index);
/* Normals `first` .. `first` + count, the same bits, several at a time: a seventh of the time. */
void flap_philox_normals(const flap_philox *stream, uint64_t first, uint64_t count, float *values_out);
uint64_t flap_philox_below(const flap_philox *stream, uint64_t index, uint64_t bound);

#ifdef __cplusplus
}
#endif
#endif
