/* AdamW over whole blocks of FLAP_OPS_BLOCK elements, on the threads of a pool: what the cpu device and the optimizer
 * for host memory share. Private to kernels/cpu/; it needs a table of loops and a pool, and knows no device. */
#ifndef FLAP_KERNELS_CPU_UPDATE_H
#define FLAP_KERNELS_CPU_UPDATE_H

#include "base/pool.h"
#include "kernels/cpu/cpu_vector.h"

/* Arguments as flap_ops_adamw and flap_ops_adamw_8bit have them. */
typedef struct flap_cpu_update {
  const flap_adamw *scalars;
  flap_dtype weight_dtype, grad_dtype;
  void *weight;
  void *master;
  float *m, *v;
  int8_t *m_codes; /* NULL: moments are fp32 */
  uint8_t *v_codes;
  float *m_largest, *v_largest;
  const void *grad;
  const uint8_t *decay_blocks;
  int32_t *fault;
  uint64_t elements;
} flap_cpu_update;

/* Returns when every element has been updated. */
void flap_cpu_update_run(const flap_cpu_vector *vector, flap_pool *pool, const flap_cpu_update *update);

#endif
