/* The cpu ops as an object: workspace, instruction set, table. */
#include "kernels/cpu/cpu_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdio.h>
#include <stdlib.h>

/* In the numerics text: another one whenever a change of kernels changes bits, so that no run goes on with other ones
 * unnoticed. */
#define CPU_KERNELS "kernels 1"

static uint64_t max_of(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

static uint64_t worker_bytes(const flap_ops_limits *limits) {
  const uint64_t bytes = max_of(flap_cpu_matmul_worker_bytes(), flap_cpu_attention_worker_bytes(limits));
  return flap_units_round_up(bytes, FLAP_OPS_ALIGN);
}

/* Operations run one after another, so they take turns in one shared part. */
static uint64_t shared_bytes(const flap_ops_limits *limits) {
  uint64_t bytes = flap_cpu_attention_shared_bytes(limits);
  bytes = max_of(bytes, flap_cpu_norm_shared_bytes(limits));
  bytes = max_of(bytes, flap_cpu_head_shared_bytes(limits));
  return flap_units_round_up(bytes, FLAP_OPS_ALIGN);
}

static uint64_t cpu_workspace_bytes(const flap_ops_limits *limits) {
  return limits->threads * worker_bytes(limits) + shared_bytes(limits);
}

static const flap_cpu_vector *best_vector(void) {
  const flap_cpu_vector *tables[3];
  (void)flap_cpu_vector_list(tables);
  return tables[0];
}

flap_status flap_ops_cpu_kernels(char *name_out, size_t bytes) {
  const flap_cpu_blas *blas;
  FLAP_TRY(flap_cpu_blas_find(&blas));
  (void)snprintf(name_out, bytes, "%s %s", best_vector()->name, blas->name);
  return FLAP_OK;
}

static flap_status cpu_open(flap_ops *ops) {
  const flap_ops_limits *limits = &ops->limits;
  flap_pool *pool = flap_device_pool(ops->device);
  flap_assert(pool != NULL);
  if (limits->dtype != FLAP_F32 && limits->dtype != FLAP_BF16 && limits->dtype != FLAP_F16)
    return flap_error_set(FLAP_UNSUPPORTED, "kernels: the cpu device computes bfloat16, float16 and float32, not %s",
                          flap_dtype_name(limits->dtype));
  if (flap_pool_threads(pool) > limits->threads)
    return flap_error_set(FLAP_INVALID, "kernels: workspace is for %u threads, but the pool has %u", limits->threads,
                          flap_pool_threads(pool));
  const flap_cpu_blas *blas;
  FLAP_TRY(flap_cpu_blas_find(&blas));
  FLAP_TRY(flap_cpu_blas_check_space(flap_pool_threads(pool)));
  flap_cpu_ops *cpu = calloc(1, sizeof *cpu);
  if (cpu == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "kernels: no memory for the cpu operations");
  cpu->vector = best_vector();
  cpu->sgemm = blas->sgemm;
  cpu->pool = pool;
  cpu->threads = flap_pool_threads(pool);
  cpu->worker_bytes = worker_bytes(limits);
  cpu->workers = ops->workspace;
  cpu->shared = cpu->workers + limits->threads * cpu->worker_bytes;
  cpu->shared_bytes = shared_bytes(limits);
  ops->state = cpu;
  (void)snprintf(ops->numerics, sizeof ops->numerics, "cpu " CPU_KERNELS " %s %s", cpu->vector->name, blas->name);
  return FLAP_OK;
}

static void cpu_close(flap_ops *ops) {
  free(ops->state);
}

void flap_cpu_run(const flap_cpu_ops *cpu, uint64_t items, flap_pool_fn fn, void *context) {
  if (items == 1)
    fn(context, 0, 0);
  else if (items > 1)
    flap_pool_run(cpu->pool, items, fn, context);
}

const flap_ops_table flap_ops_cpu_table = {
    .workspace_bytes = cpu_workspace_bytes,
    .open = cpu_open,
    .close = cpu_close,
    .matmul = flap_cpu_matmul,
    .bias_backward = flap_cpu_bias_backward,
    .zero = flap_cpu_zero,
    .copy = flap_cpu_copy,
    .embedding = flap_cpu_embedding,
    .embedding_backward = flap_cpu_embedding_backward,
    .rmsnorm = flap_cpu_rmsnorm,
    .rmsnorm_backward = flap_cpu_rmsnorm_backward,
    .add = flap_cpu_add,
    .rope = flap_cpu_rope,
    .swiglu = flap_cpu_swiglu,
    .swiglu_backward = flap_cpu_swiglu_backward,
    .attention = flap_cpu_attention,
    .attention_backward = flap_cpu_attention_backward,
    .attention_decode = flap_cpu_attention_decode,
    .head_loss = flap_cpu_head_loss,
    .gradient_store = flap_cpu_gradient_store,
    .adamw = flap_cpu_adamw,
    .adamw_8bit = flap_cpu_adamw_8bit,
};
