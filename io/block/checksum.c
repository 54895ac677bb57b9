/* XXH3-64 under a seed that says which page of which region in which writing this is. */
#include "io/block/checksum.h"

#include <xxhash.h>

/* Neighbouring identities must give unrelated seeds, so the bits are spread over the whole word (SplitMix64's
 * finaliser, a bijection) before the epoch joins. */
static uint64_t spread(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch) {
  uint64_t seed = spread(spread((uint64_t)region << 32 | page) ^ epoch);
  return XXH3_64bits_withSeed(data, (size_t)bytes, seed);
}
