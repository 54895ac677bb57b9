/* Learning rates, AdamW's scalars and the clip coefficient: what is computed once per step on the host, in fp64.
 *
 * Folder-private, but for tests. Pure functions. Where Hugging Face's Trainer has a formula, it is this one, in fp64
 * (transformers 4.57: optimization.py, training_args.py).
 */
#ifndef FLAP_ENGINE_STEP_SCHEDULE_H
#define FLAP_ENGINE_STEP_SCHEDULE_H

#include "engine/run_config.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Optimizer steps of a run: max_steps if given; else ceil(num_train_epochs * sequences / sequences_per_step), and at
 * least 1. The Trainer rounds up per epoch, because its last step of an epoch may be a short one. Our data has no seam
 * between epochs and every step is full, so the rounding happens once, at the end of the run. */
uint64_t flap_schedule_steps(const flap_run_config *config, uint64_t sequences, uint64_t sequences_per_step);
/* The same of a run that goes on after `done` steps, which took `seen` sequences, however many each of them took then.
 * Less than `done`: it has gone on for longer than that. */
uint64_t flap_schedule_steps_from(const flap_run_config *config, uint64_t sequences, uint64_t sequences_per_step,
                                  uint64_t done, uint64_t seen);
/* warmup_steps if given, else ceil(warmup_ratio * steps). May be more than `steps`: then the run ends warming up. */
uint64_t flap_schedule_warmup(const flap_run_config *config, uint64_t steps);
/* The learning rate of step `step` (from 0) of `steps`, as transformers.get_scheduler gives it for lr_scheduler_type.
 * Skipped steps do not count in `step`, as they do not in the Trainer, whose scheduler stands still when the optimizer
 * did nothing: after k of them a run ends k steps before the schedule does.
 * All but the constant schedule rise from 0 at step 0 to learning_rate at step warmup_steps, linearly; the constant one
 * has no warm-up, whatever warmup_steps is. Linear and cosine then fall to 0 at step `steps`, which is never taken. */
double flap_schedule_learning_rate(const flap_run_config *config, uint64_t warmup_steps, uint64_t steps, uint64_t step);
/* max_grad_norm / (norm + 1e-6) where that is below 1, as torch.nn.utils.clip_grad_norm_; otherwise, and for
 * max_grad_norm 0, exactly 1. The norm is finite: whoever measured it has refused anything else. */
double flap_schedule_clip(double max_grad_norm, double norm);
/* The scalars of update `update` (from 0; AdamW's t is update + 1), each computed in fp64 and rounded once to fp32.
 * `gradient_scale`: the clip coefficient, over the loss scale where there is one. */
void flap_schedule_adamw(const flap_run_config *config, double learning_rate, double gradient_scale, uint64_t update,
                         flap_adamw *scalars_out);

#ifdef __cplusplus
}
#endif
#endif
