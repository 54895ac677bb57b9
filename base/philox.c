/* Philox4x32-10: two 32x32 to 64 bit products per round, the key bumped by Weyl constants between rounds. */
#include "base/philox.h"

#include "base/assert.h"

__extension__ typedef unsigned __int128 uint128;

#define MULTIPLIER_0 0xD2511F53u
#define MULTIPLIER_1 0xCD9E8D57u
#define WEYL_0 0x9E3779B9u /* golden ratio */
#define WEYL_1 0xBB67AE85u /* sqrt(3) - 1 */
#define ROUNDS 10

void flap_philox_4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t words_out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < ROUNDS; round++) {
    uint64_t product0 = (uint64_t)MULTIPLIER_0 * c0;
    uint64_t product1 = (uint64_t)MULTIPLIER_1 * c2;
    c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)product1;
    c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)product0;
    k0 += WEYL_0;
    k1 += WEYL_1;
  }
  words_out[0] = c0;
  words_out[1] = c1;
  words_out[2] = c2;
  words_out[3] = c3;
}

/* A bijection of 64 bits in which every input bit reaches every output bit (the finaliser of SplitMix64). */
static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

flap_philox flap_philox_stream(uint64_t seed, const char *name) {
  uint64_t hash = 0xCBF29CE484222325ull; /* FNV-1a */
  for (; *name != '\0'; name++)
    hash = (hash ^ (unsigned char)*name) * 0x100000001B3ull;
  uint64_t key = mix(mix(seed + 0x9E3779B97F4A7C15ull) ^ hash);
  return (flap_philox){{(uint32_t)key, (uint32_t)(key >> 32)}};
}

void flap_philox_block(const flap_philox *stream, uint64_t counter, uint32_t words_out[4]) {
  const uint32_t words[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
  flap_philox_4x32_10(words, stream->key, words_out);
}

float flap_philox_uniform(const flap_philox *stream, uint64_t index) {
  uint32_t words[4];
  flap_philox_block(stream, index / 4, words);
  return (float)(words[index % 4] >> 8) * 0x1p-24f;
}

static uint64_t join(uint32_t low, uint32_t high) {
  return (uint64_t)high << 32 | low;
}

uint64_t flap_philox_below(const flap_philox *stream, uint64_t index, uint64_t bound) {
  flap_assert(bound > 0);
  uint32_t words[4];
  flap_philox_block(stream, index / 2, words);
  uint64_t word = index % 2 == 0 ? join(words[0], words[1]) : join(words[2], words[3]);
  return (uint64_t)((uint128)word * bound >> 64);
}
