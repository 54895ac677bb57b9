/* Learning rates, AdamW's scalars and the clip coefficient: what is computed once per step on the host, in fp64.
 *
 * Folder-private, but for tests. Pure functions.
 */
#ifndef FLAP_ENGINE_SCHEDULE_H
#define FLAP_ENGINE_SCHEDULE_H

#include "engine/run_config.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Steps of a run: max_steps, or epochs over `sequences` with `sequences_per_step` each step, rounded up as Hugging
 * Face's Trainer does. At least 1. */
uint64_t flap_schedule_steps(const flap_run_config *config, uint64_t sequences, uint64_t sequences_per_step);
/* warmup_steps if given, else ceil(warmup_ratio * steps). */
uint64_t flap_schedule_warmup(const flap_run_config *config, uint64_t steps);
/* The learning rate of step `step` (from 0), as transformers.get_scheduler gives it for lr_scheduler_type. */
double flap_schedule_learning_rate(const flap_run_config *config, uint64_t warmup_steps, uint64_t steps, uint64_t step);
/* max_grad_norm / (norm + 1e-6) where that is below 1, as torch.nn.utils.clip_grad_norm_; otherwise, and for
 * max_grad_norm 0, exactly 1. */
double flap_schedule_clip(double max_grad_norm, double norm);
/* The scalars of step `step` (from 0; AdamW's t is step + 1). */
void flap_schedule_adamw(const flap_run_config *config, double learning_rate, double clip, uint64_t step,
                         flap_adamw *scalars_out);

#ifdef __cplusplus
}
#endif
#endif
