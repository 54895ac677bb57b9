/* Element types and their conversions, the same everywhere.
 *
 * bf16 and fp16 are stored as uint16_t. Rounding is to nearest, ties to even, except in the split master of bf16
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

/* fp16: 5 bits of exponent, 10 of fraction; 65504 is the largest, 2^-24 the smallest that is not 0. The conversions
 * have no branches, so that loops over them become vector code, and keep what processors' own keep: subnormal numbers,
 * signs, infinity, and of a NaN its first bits. */

/* The least magnitude, as bits of fp32, that rounds to infinity in fp16: 65520. */
#define FLAP_F16_LIMIT_BITS 0x477ff000u

static inline float flap_f16_to_f32(uint16_t value) {
  const uint32_t magnitude = value & 0x7fffu, sign = (uint32_t)(value & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = 0x7f800000u | magnitude << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u);
  const uint32_t subnormal = flap_f32_bits((float)(int32_t)magnitude * 0x1p-24f);
  const uint32_t bits = magnitude < 0x400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
  return flap_f32_from_bits(sign | bits);
}

/* Below 2^-14 the sum with 1/2 has the last bit of a subnormal number, 2^-24, so the addition rounds. Above, the bits
 * that go are rounded by an integer addition, whose carry becomes the next exponent. */
static inline uint16_t flap_f32_to_f16(float value) {
  const uint32_t bits = flap_f32_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = flap_f32_bits(flap_f32_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
  const uint32_t half = magnitude < 0x38800000u ? subnormal : magnitude >= FLAP_F16_LIMIT_BITS ? special : normal;
  return (uint16_t)(sign | half);
}

/* flap_f16_to_f32 of flap_f32_to_f16, in fewer operations. */
static inline float flap_f32_round_f16(float value) {
  const uint32_t bits = flap_f32_bits(value), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = flap_f32_bits((flap_f32_from_bits(magnitude) + 0.5f) - 0.5f);
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) & 0xffffe000u;
  const uint32_t special = magnitude > 0x7f800000u ? (magnitude | 0x400000u) & 0xffffe000u : 0x7f800000u;
  const uint32_t rounded = magnitude < 0x38800000u ? subnormal : magnitude >= FLAP_F16_LIMIT_BITS ? special : normal;
  return flap_f32_from_bits(sign | rounded);
}

#ifdef __cplusplus
}
#endif
#endif
