/* AdamW over whole blocks of FLAP_OPS_BLOCK elements, on the threads of a pool: what the cpu device and the optimizer
 * for host memory share. Private to kernels/cpu/; it needs a table of loops and a pool, and knows no device. */
#ifndef FLAP_KERNELS_CPU_UPDATE_H
#define FLAP_KERNELS_CPU_UPDATE_H

#include "base/pool.h"
#include "kernels/cpu/cpu_vector.h"

/* The arguments behind the pool are those of flap_ops_adamw and flap_ops_adamw_8bit. They return when every element has
 * been updated. */
void flap_cpu_update_adamw(const flap_cpu_vector *vector, flap_pool *pool, const flap_adamw *scalars,
                           flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight, void *master, float *m,
                           float *v, const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);
void flap_cpu_update_adamw_8bit(const flap_cpu_vector *vector, flap_pool *pool, const flap_adamw *scalars,
                                flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight, void *master, int8_t *m,
                                uint8_t *v, float *m_largest, float *v_largest, const void *grad,
                                const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);

#endif
