/* Losses on held-out text, by forward programs of a run that is open and at rest.
 *
 * Folder-private.
 */
#ifndef FLAP_ENGINE_EVALUATE_H
#define FLAP_ENGINE_EVALUATE_H

#include "engine/run/runtime.h"

#include <signal.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Sequences [0, count) of the held-out part. Each token counts once; the sum runs in the order of the text, so batches
 * and groups make no difference but through the shape of the micro-batch. `step` is for the report. Once `stop` (may be
 * NULL) is not zero no further program is begun: then `*whole_out` is false, and the report is of a part. */
FLAP_CHECKED flap_status flap_evaluate(flap_runtime *runtime, const flap_dataset *dataset, uint64_t step,
                                       const volatile sig_atomic_t *stop, flap_eval_report *report_out,
                                       uint64_t *programs_out, bool *whole_out);

#ifdef __cplusplus
}
#endif
#endif
