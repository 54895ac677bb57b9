#include "engine/step/loss_scale.h"

#include "base/assert.h"

#include <math.h>

#define SCALE_MIN 0x1p-24
#define SCALE_MAX 0x1p60

bool flap_loss_scale_valid(double scale) {
  int exponent;
  return scale >= SCALE_MIN && scale <= SCALE_MAX && frexp(scale, &exponent) == 0.5;
}

void flap_loss_scale_begin(flap_dtype weight_dtype, const flap_run_config *config, flap_loss_scale *scale_out) {
  *scale_out = (flap_loss_scale){.scale = weight_dtype == FLAP_F16 ? config->fp16_init_scale : 0};
}

void flap_loss_scale_good(const flap_run_config *config, flap_loss_scale *scale) {
  flap_assert(flap_loss_scale_valid(scale->scale));
  if (++scale->good_steps < config->fp16_growth_interval)
    return;
  scale->good_steps = 0;
  if (scale->scale < SCALE_MAX)
    scale->scale *= 2;
}

bool flap_loss_scale_back_off(const flap_run_config *config, flap_loss_scale *scale) {
  flap_assert(flap_loss_scale_valid(scale->scale));
  if (scale->scale / 2 < config->fp16_min_scale)
    return false;
  scale->scale /= 2;
  scale->good_steps = 0;
  scale->skipped++;
  return true;
}
