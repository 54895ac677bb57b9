/* Conversions of weights, element by element. */
#include "engine/store/weights_internal.h"

#include "base/assert.h"

#define F32_INFINITY 0x7f800000u
#define F32_MAGNITUDE 0x7fffffffu

/* The smallest magnitude of a master weight whose high half would be infinity. */
#define MASTER_LIMIT (F32_INFINITY - 0x8000u)

static bool is_finite(uint32_t bits) {
  return (bits & F32_MAGNITUDE) < F32_INFINITY;
}

uint64_t flap_values_to_high(const float *from, uint64_t count, uint16_t *to) {
  for (uint64_t i = 0; i < count; i++) {
    const uint32_t bits = flap_f32_bits(from[i]);
    if ((bits & F32_MAGNITUDE) >= MASTER_LIMIT)
      return i;
    to[i] = (uint16_t)((bits + 0x8000u) >> 16);
  }
  return count;
}

uint64_t flap_values_to_low(const float *from, uint64_t count, int16_t *to) {
  for (uint64_t i = 0; i < count; i++) {
    const uint32_t bits = flap_f32_bits(from[i]);
    if ((bits & F32_MAGNITUDE) >= MASTER_LIMIT)
      return i;
    /* bits - (hi << 16) lies in [-0x8000, 0x7fff]: its lower 16 bits say all. */
    const uint16_t low = (uint16_t)bits;
    memcpy(&to[i], &low, sizeof low);
  }
  return count;
}

uint64_t flap_values_join(const uint16_t *high, const int16_t *low, uint64_t count, float *to) {
  for (uint64_t i = 0; i < count; i++) {
    const uint32_t bits = ((uint32_t)high[i] << 16) + (uint32_t)(int32_t)low[i];
    if (!is_finite(bits))
      return i;
    to[i] = flap_f32_from_bits(bits);
  }
  return count;
}

uint64_t flap_values_to_bf16(const float *from, uint64_t count, uint16_t *to) {
  for (uint64_t i = 0; i < count; i++) {
    to[i] = flap_f32_to_bf16(from[i]);
    if ((to[i] & 0x7fffu) >= 0x7f80u)
      return i;
  }
  return count;
}

uint64_t flap_values_from_bf16(const uint16_t *from, uint64_t count, float *to) {
  for (uint64_t i = 0; i < count; i++) {
    if ((from[i] & 0x7fffu) >= 0x7f80u)
      return i;
    to[i] = flap_bf16_to_f32(from[i]);
  }
  return count;
}

uint64_t flap_values_from_f16(const uint16_t *from, uint64_t count, float *to) {
  for (uint64_t i = 0; i < count; i++) {
    if ((from[i] & 0x7c00u) == 0x7c00u)
      return i;
    to[i] = flap_f16_to_f32(from[i]);
  }
  return count;
}

uint64_t flap_values_to_f16(const float *from, uint64_t count, uint16_t *to) {
  for (uint64_t i = 0; i < count; i++) {
    to[i] = flap_f32_to_f16(from[i]);
    if ((to[i] & 0x7c00u) == 0x7c00u)
      return i;
  }
  return count;
}

uint64_t flap_values_check(flap_dtype dtype, const void *values, uint64_t count) {
  flap_assert(dtype != FLAP_I32);
  const uint32_t infinity = dtype == FLAP_BF16 ? 0x7f80u : 0x7c00u;
  for (uint64_t i = 0; i < count; i++)
    if (dtype == FLAP_F32 ? !is_finite(((const uint32_t *)values)[i])
                          : (((const uint16_t *)values)[i] & infinity) == infinity)
      return i;
  return count;
}
