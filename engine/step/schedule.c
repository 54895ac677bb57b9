#include "engine/step/schedule.h"

#include "base/assert.h"

#include <math.h>

#define PI 3.14159265358979323846
#define STEPS_MAX ((uint64_t)1 << 53) /* beyond it doubles skip integers; nobody trains that long */

/* A count that was computed in fp64, rounded up. */
static uint64_t count_up(double value) {
  flap_assert(value >= 0);
  return value >= (double)STEPS_MAX ? STEPS_MAX : (uint64_t)ceil(value);
}

uint64_t flap_schedule_steps(const flap_run_config *config, uint64_t sequences, uint64_t sequences_per_step) {
  flap_assert(sequences_per_step > 0);
  if (config->max_steps > 0)
    return config->max_steps;
  uint64_t steps = count_up(config->num_train_epochs * (double)sequences / (double)sequences_per_step);
  return steps > 0 ? steps : 1;
}

uint64_t flap_schedule_steps_from(const flap_run_config *config, uint64_t sequences, uint64_t sequences_per_step,
                                  uint64_t done, uint64_t seen) {
  const uint64_t steps = flap_schedule_steps(config, sequences, sequences_per_step);
  if (config->max_steps > 0 || seen == done * sequences_per_step)
    return steps;
  const uint64_t wanted = count_up(config->num_train_epochs * (double)sequences);
  if (seen < wanted)
    return done + (wanted - seen - 1) / sequences_per_step + 1;
  const uint64_t more = (seen - wanted) / sequences_per_step;
  return done > more ? done - more : 1;
}

uint64_t flap_schedule_warmup(const flap_run_config *config, uint64_t steps) {
  return config->warmup_steps > 0 ? config->warmup_steps : count_up((double)steps * config->warmup_ratio);
}

/* How far the fall after the warm-up has come: 0 at its first step, 1 at step `steps`. */
static double progress(uint64_t warmup_steps, uint64_t steps, uint64_t step) {
  uint64_t length = steps > warmup_steps ? steps - warmup_steps : 1;
  return (double)(step - warmup_steps) / (double)length;
}

static double fraction(flap_scheduler scheduler, uint64_t warmup_steps, uint64_t steps, uint64_t step) {
  if (scheduler == FLAP_SCHEDULER_CONSTANT)
    return 1;
  if (step < warmup_steps)
    return (double)step / (double)warmup_steps;
  switch (scheduler) {
  case FLAP_SCHEDULER_LINEAR: {
    /* Not 1 - progress, which rounds differently. */
    uint64_t length = steps > warmup_steps ? steps - warmup_steps : 1;
    return step < steps ? (double)(steps - step) / (double)length : 0;
  }
  case FLAP_SCHEDULER_COSINE:
    return fmax(0, 0.5 * (1 + cos(PI * progress(warmup_steps, steps, step))));
  case FLAP_SCHEDULER_CONSTANT:
  case FLAP_SCHEDULER_CONSTANT_WITH_WARMUP:
    return 1;
  }
  flap_assert(false); /* a scheduler without a formula */
  return 0;
}

double flap_schedule_learning_rate(const flap_run_config *config, uint64_t warmup_steps, uint64_t steps,
                                   uint64_t step) {
  return config->learning_rate * fraction(config->lr_scheduler_type, warmup_steps, steps, step);
}

double flap_schedule_clip(double max_grad_norm, double norm) {
  flap_assert(isfinite(norm) && norm >= 0);
  if (!(max_grad_norm > 0))
    return 1;
  double coefficient = max_grad_norm / (norm + 1e-6);
  return coefficient < 1 ? coefficient : 1;
}

void flap_schedule_adamw(const flap_run_config *config, double learning_rate, double gradient_scale, uint64_t update,
                         flap_adamw *scalars_out) {
  const double t = (double)update + 1;
  *scalars_out = (flap_adamw){
      .learning_rate = (float)learning_rate,
      .beta1 = (float)config->adam_beta1,
      .beta2 = (float)config->adam_beta2,
      .one_minus_beta1 = (float)(1 - config->adam_beta1),
      .one_minus_beta2 = (float)(1 - config->adam_beta2),
      .inverse_bias1 = (float)(1 / (1 - pow(config->adam_beta1, t))),
      .inverse_sqrt_bias2 = (float)(1 / sqrt(1 - pow(config->adam_beta2, t))),
      .epsilon = (float)config->adam_epsilon,
      .decay = (float)(1 - learning_rate * config->weight_decay),
      .gradient_scale = (float)gradient_scale,
  };
}
