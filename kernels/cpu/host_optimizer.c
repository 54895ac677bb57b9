#include "kernels/host_optimizer.h"

#include "base/assert.h"
#include "kernels/cpu/cpu_update.h"

#include <stdlib.h>

struct flap_host_optimizer {
  const flap_cpu_vector *vector;
  flap_pool *pool;
};

flap_status flap_host_optimizer_open(uint32_t threads, flap_host_optimizer **optimizer_out) {
  *optimizer_out = NULL;
  flap_host_optimizer *optimizer = calloc(1, sizeof *optimizer);
  if (optimizer == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "host optimizer: no memory for %zu bytes", sizeof *optimizer);
  const flap_status status = flap_pool_open(threads, &optimizer->pool);
  if (status != FLAP_OK) {
    free(optimizer);
    return status;
  }
  const flap_cpu_vector *tables[3];
  (void)flap_cpu_vector_list(tables);
  optimizer->vector = tables[0];
  *optimizer_out = optimizer;
  return FLAP_OK;
}

void flap_host_optimizer_close(flap_host_optimizer *optimizer) {
  if (optimizer == NULL)
    return;
  flap_pool_close(optimizer->pool);
  free(optimizer);
}

static void check(flap_dtype weight_dtype, const void *master, uint64_t elements) {
  flap_assert(elements % FLAP_OPS_BLOCK == 0);
  flap_assert((weight_dtype == FLAP_F32) == (master == NULL));
}

void flap_host_adamw(flap_host_optimizer *optimizer, const flap_adamw *scalars, flap_dtype weight_dtype,
                     flap_dtype grad_dtype, void *weight, void *master, float *m, float *v, const void *grad,
                     const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  check(weight_dtype, master, elements);
  flap_cpu_update_adamw(optimizer->vector, optimizer->pool, scalars, weight_dtype, grad_dtype, weight, master, m, v,
                        grad, decay_blocks, fault, elements);
}

void flap_host_adamw_8bit(flap_host_optimizer *optimizer, const flap_adamw *scalars, flap_dtype weight_dtype,
                          flap_dtype grad_dtype, void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest,
                          float *v_largest, const void *grad, const uint8_t *decay_blocks, int32_t *fault,
                          uint64_t elements) {
  check(weight_dtype, master, elements);
  flap_cpu_update_adamw_8bit(optimizer->vector, optimizer->pool, scalars, weight_dtype, grad_dtype, weight, master, m,
                             v, m_largest, v_largest, grad, decay_blocks, fault, elements);
}
