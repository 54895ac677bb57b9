/* AdamW over memory of the host, whatever device computes: where the states live in RAM, the CPU updates them there.
 *
 * Role: flap_ops_adamw and flap_ops_adamw_8bit (ops.h: formulas, layouts, rounding) on threads of its own. Results are
 * theirs to the bit, on the cpu and on cuda, and do not depend on the number of threads. It knows no device, no pages
 * and no layers.
 *
 * Threading: calls on one optimizer come one at a time, from any thread, which works too and blocks until all elements
 * are updated. Optimizers are independent of each other. Nothing is allocated after open.
 */
#ifndef FLAP_KERNELS_HOST_OPTIMIZER_H
#define FLAP_KERNELS_HOST_OPTIMIZER_H

#include "base/status.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_host_optimizer flap_host_optimizer;

/* Starts the threads; `threads` counts the caller of an update, and 0 means all cores that this process may run on, as
 * in base/pool.h. FLAP_INVALID for more than FLAP_POOL_THREADS_MAX; FLAP_NO_MEMORY, also where no thread starts. */
FLAP_CHECKED flap_status flap_host_optimizer_open(uint32_t threads, flap_host_optimizer **optimizer_out);
/* Ends the threads. NULL is fine. */
void flap_host_optimizer_close(flap_host_optimizer *optimizer);

/* flap_ops_adamw with every pointer into memory of the host, `fault` too: it is set to 1 where a weight was refused,
 * and else left as it is. elements is a multiple of FLAP_OPS_BLOCK, and has no largest value. Other threads must leave
 * the arrays alone until the call returns: a transfer that reads or writes them has ended before. */
void flap_host_adamw(flap_host_optimizer *optimizer, const flap_adamw *scalars, flap_dtype weight_dtype,
                     flap_dtype grad_dtype, void *weight, void *master, float *m, float *v, const void *grad,
                     const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);

/* flap_ops_adamw_8bit in the same way; `fault` is also set where a moment was not finite. */
void flap_host_adamw_8bit(flap_host_optimizer *optimizer, const flap_adamw *scalars, flap_dtype weight_dtype,
                          flap_dtype grad_dtype, void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest,
                          float *v_largest, const void *grad, const uint8_t *decay_blocks, int32_t *fault,
                          uint64_t elements);

#ifdef __cplusplus
}
#endif
#endif
