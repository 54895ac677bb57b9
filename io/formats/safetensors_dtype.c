/* Element types of safetensors, and what reader and writer share. */
#include "base/assert.h"
#include "base/units.h"
#include "io/formats/safetensors.h"
#include "io/formats/safetensors_internal.h"

#include <stdio.h>

static const struct {
  const char *name;
  uint32_t bytes;
} dtypes[FLAP_SAFETENSORS_DTYPE_COUNT] = {
    [FLAP_SAFETENSORS_BOOL] = {"BOOL", 1},       [FLAP_SAFETENSORS_U8] = {"U8", 1},
    [FLAP_SAFETENSORS_I8] = {"I8", 1},           [FLAP_SAFETENSORS_F8_E5M2] = {"F8_E5M2", 1},
    [FLAP_SAFETENSORS_F8_E4M3] = {"F8_E4M3", 1}, [FLAP_SAFETENSORS_F8_E8M0] = {"F8_E8M0", 1},
    [FLAP_SAFETENSORS_I16] = {"I16", 2},         [FLAP_SAFETENSORS_U16] = {"U16", 2},
    [FLAP_SAFETENSORS_F16] = {"F16", 2},         [FLAP_SAFETENSORS_BF16] = {"BF16", 2},
    [FLAP_SAFETENSORS_I32] = {"I32", 4},         [FLAP_SAFETENSORS_U32] = {"U32", 4},
    [FLAP_SAFETENSORS_F32] = {"F32", 4},         [FLAP_SAFETENSORS_I64] = {"I64", 8},
    [FLAP_SAFETENSORS_U64] = {"U64", 8},         [FLAP_SAFETENSORS_F64] = {"F64", 8},
    [FLAP_SAFETENSORS_C64] = {"C64", 8},
};

const char *flap_safetensors_dtype_name(flap_safetensors_dtype dtype) {
  flap_assert((unsigned)dtype < FLAP_SAFETENSORS_DTYPE_COUNT);
  return dtypes[dtype].name;
}

uint64_t flap_safetensors_dtype_bytes(flap_safetensors_dtype dtype) {
  flap_assert((unsigned)dtype < FLAP_SAFETENSORS_DTYPE_COUNT);
  return dtypes[dtype].bytes;
}

bool flap_safetensors_to_flap_dtype(flap_safetensors_dtype dtype, flap_dtype *dtype_out) {
  switch (dtype) {
  case FLAP_SAFETENSORS_F32:
    *dtype_out = FLAP_F32;
    return true;
  case FLAP_SAFETENSORS_BF16:
    *dtype_out = FLAP_BF16;
    return true;
  case FLAP_SAFETENSORS_F16:
    *dtype_out = FLAP_F16;
    return true;
  case FLAP_SAFETENSORS_I32:
    *dtype_out = FLAP_I32;
    return true;
  default:
    return false;
  }
}

flap_safetensors_dtype flap_safetensors_from_flap_dtype(flap_dtype dtype) {
  static const flap_safetensors_dtype from[FLAP_DTYPE_COUNT] = {[FLAP_F32] = FLAP_SAFETENSORS_F32,
                                                                [FLAP_BF16] = FLAP_SAFETENSORS_BF16,
                                                                [FLAP_F16] = FLAP_SAFETENSORS_F16,
                                                                [FLAP_I32] = FLAP_SAFETENSORS_I32};
  flap_assert((unsigned)dtype < FLAP_DTYPE_COUNT);
  return from[dtype];
}

const char *flap_safetensors_shown(const char *name, char buffer[FLAP_SAFETENSORS_SHOWN_BYTES]) {
  size_t used = 0;
  for (; name[used] && used + 4 < FLAP_SAFETENSORS_SHOWN_BYTES; used++) {
    unsigned char c = (unsigned char)name[used];
    buffer[used] = (char)(c < 0x20 || c == 0x7f ? '?' : c);
  }
  (void)snprintf(buffer + used, FLAP_SAFETENSORS_SHOWN_BYTES - used, "%s", name[used] ? "..." : "");
  return buffer;
}

bool flap_safetensors_size(flap_safetensors_dtype dtype, uint32_t rank, const uint64_t *shape, uint64_t *elements_out,
                           uint64_t *bytes_out) {
  uint64_t elements = 1, bytes;
  for (uint32_t i = 0; i < rank; i++)
    if (!flap_units_mul(elements, shape[i], &elements))
      return false;
  if (!flap_units_mul(elements, flap_safetensors_dtype_bytes(dtype), &bytes) || bytes > INT64_MAX)
    return false;
  *elements_out = elements;
  *bytes_out = bytes;
  return true;
}
