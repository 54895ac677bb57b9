/* Element types and their conversions, the same everywhere.
 *
 * bf16 is stored as uint16_t. Rounding to bf16 is to nearest, ties to even, except in the split master
 * (kernels/ops.h), which rounds ties away so that the rest always fits. */
#ifndef FLAP_BASE_DTYPE_H
#define FLAP_BASE_DTYPE_H

#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_dtype { FLAP_F32, FLAP_BF16, FLAP_F16, FLAP_I32, FLAP_DTYPE_COUNT } flap_dtype;

static inline uint64_t flap_dtype_bytes(flap_dtype dtype) {
  return dtype == FLAP_F32 || dtype == FLAP_I32 ? 4 : 2;
}

/* "float32", "bfloat16", "float16", "int32", as Hugging Face's torch_dtype names them. */
static inline const char *flap_dtype_name(flap_dtype dtype) {
  static const char *const names[] = {"float32", "bfloat16", "float16", "int32"};
  return names[dtype];
}

static inline uint32_t flap_f32_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float flap_f32_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float flap_bf16_to_f32(uint16_t value) {
  return flap_f32_from_bits((uint32_t)value << 16);
}

/* To nearest, ties to even; NaN stays NaN. */
static inline uint16_t flap_f32_to_bf16(float value) {
  uint32_t bits = flap_f32_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#ifdef __cplusplus
}
#endif
#endif
