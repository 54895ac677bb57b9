/* Gradient rounding and AdamW, in blocks of FLAP_OPS_BLOCK elements. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/cpu_update.h"

#include "base/assert.h"

#define BLOCKS_PER_ITEM 4u

typedef struct gradient_job {
  const flap_cpu_ops *cpu;
  uint64_t blocks;
  flap_dtype grad_dtype, sum_dtype;
  void *grad_out;
  float *block_squares;
  const void *sum;
} gradient_job;

static uint64_t last_block(const gradient_job *job, uint64_t item) {
  const uint64_t end = (item + 1) * BLOCKS_PER_ITEM;
  return end < job->blocks ? end : job->blocks;
}

static void gradient_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const gradient_job *job = context;
  const flap_cpu_vector *vector = job->cpu->vector;
  float rounded[FLAP_CPU_CHUNK];
  for (uint64_t block = item * BLOCKS_PER_ITEM; block < last_block(job, item); ++block) {
    float sums[FLAP_CPU_LANES] = {0};
    for (uint64_t i = block * FLAP_OPS_BLOCK; i < (block + 1) * FLAP_OPS_BLOCK; i += FLAP_CPU_CHUNK) {
      const float *values = flap_cpu_load(job->cpu, job->sum_dtype, rounded, job->sum, i, FLAP_CPU_CHUNK);
      if (job->grad_dtype != job->sum_dtype) {
        memcpy(rounded, values, sizeof rounded);
        vector->round_bf16(rounded, FLAP_CPU_CHUNK);
        values = rounded;
      }
      vector->squares(sums, values, FLAP_CPU_CHUNK);
      if (job->grad_out != NULL)
        flap_cpu_store(job->cpu, job->grad_dtype, job->grad_out, i, values, FLAP_CPU_CHUNK);
    }
    if (job->block_squares != NULL)
      job->block_squares[block] = flap_cpu_fold(sums);
  }
}

void flap_cpu_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares,
                             flap_dtype sum_dtype, const void *sum, uint64_t elements) {
  gradient_job job = {.cpu = flap_cpu_state(ops),
                      .blocks = elements / FLAP_OPS_BLOCK,
                      .grad_dtype = grad_dtype,
                      .sum_dtype = sum_dtype,
                      .grad_out = grad,
                      .block_squares = block_squares,
                      .sum = sum};
  flap_cpu_run(job.cpu, flap_cpu_ceil(job.blocks, BLOCKS_PER_ITEM), gradient_item, &job);
}

void flap_cpu_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                    void *weight, void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks,
                    int32_t *fault, uint64_t elements) {
  const flap_cpu_ops *cpu = flap_cpu_state(ops);
  flap_cpu_update_adamw(cpu->vector, cpu->pool, scalars, weight_dtype, grad_dtype, weight, master, m, v, grad,
                        decay_blocks, fault, elements);
}

void flap_cpu_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                         void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                         const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  const flap_cpu_ops *cpu = flap_cpu_state(ops);
  flap_cpu_update_adamw_8bit(cpu->vector, cpu->pool, scalars, weight_dtype, grad_dtype, weight, master, m, v, m_largest,
                             v_largest, grad, decay_blocks, fault, elements);
}
