/* Dynamic loss scaling (Micikevicius et al. 2018), the rule of torch.amp.GradScaler: fp16 has no numbers below 2^-24,
 * so the loss is multiplied by a scale before the backward, and gradients are divided by it before they are used. When
 * a loss or a gradient is not finite, the step is skipped and the scale halved; after so many good steps in a row it is
 * doubled.
 *
 * Folder-private, but for tests. Scales are powers of two, so that neither multiplication nor division rounds.
 */
#ifndef FLAP_ENGINE_STEP_LOSS_SCALE_H
#define FLAP_ENGINE_STEP_LOSS_SCALE_H

#include "engine/run_config.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a checkpoint must keep of it. All zero: nothing is scaled (bf16 and fp32). */
typedef struct flap_loss_scale {
  double scale;        /* of the next step */
  uint64_t good_steps; /* in a row, since the scale last changed */
  uint64_t skipped;    /* steps of the whole run; AdamW and the learning rate count only the others */
} flap_loss_scale;

/* Before the first step of a run; all zero unless weights are fp16. */
void flap_loss_scale_begin(flap_dtype weight_dtype, const flap_run_config *config, flap_loss_scale *scale_out);
/* After a step whose gradients were finite. */
void flap_loss_scale_good(const flap_run_config *config, flap_loss_scale *scale);
/* After one whose loss or gradients were not: counts it as skipped. False, and nothing changes, where the scale is at
 * fp16_min_scale already: a smaller one would not help. */
bool flap_loss_scale_back_off(const flap_run_config *config, flap_loss_scale *scale);
/* What a scale can be: a power of two from 2^-24 to 2^60. */
bool flap_loss_scale_valid(double scale);

#ifdef __cplusplus
}
#endif
#endif
