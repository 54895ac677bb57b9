/* The table of cosines and sines for rotary position embeddings (Su et al. 2021), made on the host.
 *
 * The arithmetic is that of transformers: frequencies, their scaling and the angles are fp32 values. Each fp32 power,
 * cosine and sine is computed in fp64 and rounded once, so the table hardly depends on the C library. */
#include "kernels/ops.h"

#include "base/assert.h"

#include <math.h>

/* The frequency scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between
 * blended. */
static float scale_llama3(const flap_rope *rope, float frequency) {
  const float original = (float)rope->original_max_position;
  const float low = (float)rope->low_freq_factor;
  const float factor = (float)rope->factor;
  const float wavelength = (float)(2.0 * 3.14159265358979323846) / frequency;
  if (wavelength > (float)(rope->original_max_position / rope->low_freq_factor))
    return frequency / factor;
  if (wavelength < (float)(rope->original_max_position / rope->high_freq_factor))
    return frequency;
  const float smooth = (original / wavelength - low) / (float)(rope->high_freq_factor - rope->low_freq_factor);
  return (1.0f - smooth) * frequency / factor + smooth * frequency;
}

void flap_ops_rope_table(const flap_rope *rope, uint32_t positions, uint32_t head_size, float *table_out) {
  flap_assert(head_size % 2 == 0);
  const uint32_t half = head_size / 2;
  for (uint32_t i = 0; i < half; ++i) {
    const float exponent = (float)(2 * i) / (float)head_size;
    float frequency = 1.0f / (float)pow((double)(float)rope->theta, (double)exponent);
    if (rope->kind == FLAP_ROPE_LLAMA3)
      frequency = scale_llama3(rope, frequency);
    else if (rope->kind == FLAP_ROPE_LINEAR)
      frequency = frequency / (float)rope->factor;
    for (uint32_t position = 0; position < positions; ++position) {
      const float angle = (float)position * frequency;
      table_out[(uint64_t)position * head_size + i] = (float)cos((double)angle);
      table_out[(uint64_t)position * head_size + half + i] = (float)sin((double)angle);
    }
  }
}
