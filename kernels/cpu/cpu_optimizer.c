/* Gradient rounding and AdamW, in blocks of FLAP_OPS_BLOCK elements. */
#include "kernels/cpu/cpu_internal.h"

#include "base/assert.h"

#define BLOCKS_PER_ITEM 4u

typedef struct optimizer_job {
  const flap_cpu_ops *cpu;
  uint64_t blocks;
  flap_dtype weight_dtype, grad_dtype;
  void *grad_out;
  float *block_squares;
  const float *sum;
  const flap_adamw *scalars;
  void *weight;
  void *master;
  float *m, *v;
  int8_t *m_codes; /* NULL: moments are fp32 */
  uint8_t *v_codes;
  float *m_largest, *v_largest;
  const void *grad;
  const uint8_t *decay_blocks;
  int32_t *fault;
} optimizer_job;

static uint64_t last_block(const optimizer_job *job, uint64_t item) {
  const uint64_t end = (item + 1) * BLOCKS_PER_ITEM;
  return end < job->blocks ? end : job->blocks;
}

static void gradient_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const optimizer_job *job = context;
  const flap_cpu_vector *vector = job->cpu->vector;
  float rounded[FLAP_CPU_CHUNK];
  for (uint64_t block = item * BLOCKS_PER_ITEM; block < last_block(job, item); ++block) {
    float sums[FLAP_CPU_LANES] = {0};
    for (uint64_t i = block * FLAP_OPS_BLOCK; i < (block + 1) * FLAP_OPS_BLOCK; i += FLAP_CPU_CHUNK) {
      const float *values = job->sum + i;
      if (job->grad_dtype != FLAP_F32) {
        memcpy(rounded, values, sizeof rounded);
        vector->round_bf16(rounded, FLAP_CPU_CHUNK);
        values = rounded;
      }
      vector->squares(sums, values, FLAP_CPU_CHUNK);
      if (job->grad_out != NULL)
        flap_cpu_store(job->cpu, job->grad_dtype, job->grad_out, i, values, FLAP_CPU_CHUNK);
    }
    job->block_squares[block] = flap_cpu_fold(sums);
  }
}

void flap_cpu_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares, const float *sum,
                             uint64_t elements) {
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  optimizer_job job = {.cpu = flap_cpu_state(ops), .blocks = elements / FLAP_OPS_BLOCK, .grad_dtype = grad_dtype};
  job.grad_out = grad;
  job.block_squares = block_squares;
  job.sum = sum;
  flap_cpu_run(job.cpu, flap_cpu_ceil(job.blocks, BLOCKS_PER_ITEM), gradient_item, &job);
}

/* One chunk, whatever its moments are stored as. Returns whether something was refused. */
static bool adamw_chunk(const optimizer_job *job, float decay, uint64_t i, float *m, float *v, const float *grad) {
  const flap_cpu_vector *vector = job->cpu->vector;
  if (job->weight_dtype == FLAP_BF16)
    return vector->adamw_split(job->scalars, decay, (uint16_t *)job->weight + i, (int16_t *)job->master + i, m, v, grad,
                               FLAP_CPU_CHUNK);
  if (job->weight_dtype == FLAP_F16)
    return vector->adamw_f16(job->scalars, decay, (uint16_t *)job->weight + i, (float *)job->master + i, m, v, grad,
                             FLAP_CPU_CHUNK);
  return vector->adamw_f32(job->scalars, decay, (float *)job->weight + i, m, v, grad, FLAP_CPU_CHUNK);
}

static bool adamw_8bit_chunk(const optimizer_job *job, float decay, uint64_t i, const float *grad) {
  const flap_cpu_vector *vector = job->cpu->vector;
  const uint64_t block = i / FLAP_OPS_MOMENT_BLOCK;
  float m[FLAP_CPU_CHUNK], v[FLAP_CPU_CHUNK];
  vector->moments_load(m, v, job->m_codes + i, job->v_codes + i, job->m_largest + block, job->v_largest + block,
                       FLAP_CPU_CHUNK);
  const bool refused = adamw_chunk(job, decay, i, m, v, grad);
  return vector->moments_store(job->m_codes + i, job->v_codes + i, job->m_largest + block, job->v_largest + block, m, v,
                               FLAP_CPU_CHUNK) ||
         refused;
}

static void adamw_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const optimizer_job *job = context;
  float buffer[FLAP_CPU_CHUNK];
  bool refused = false;
  for (uint64_t block = item * BLOCKS_PER_ITEM; block < last_block(job, item); ++block) {
    const bool decays = (job->decay_blocks[block / 8] >> (block % 8) & 1) != 0;
    const float decay = decays ? job->scalars->decay : 1.0f; /* times 1 changes no bit */
    for (uint64_t i = block * FLAP_OPS_BLOCK; i < (block + 1) * FLAP_OPS_BLOCK; i += FLAP_CPU_CHUNK) {
      const float *grad = flap_cpu_load(job->cpu, job->grad_dtype, buffer, job->grad, i, FLAP_CPU_CHUNK);
      if (job->m_codes != NULL)
        refused |= adamw_8bit_chunk(job, decay, i, grad);
      else
        refused |= adamw_chunk(job, decay, i, job->m + i, job->v + i, grad);
    }
  }
  if (refused)
    __atomic_store_n(job->fault, 1, __ATOMIC_RELAXED);
}

void flap_cpu_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                    void *weight, void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks,
                    int32_t *fault, uint64_t elements) {
  flap_assert(weight_dtype != FLAP_I32);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  optimizer_job job = {.cpu = flap_cpu_state(ops), .blocks = elements / FLAP_OPS_BLOCK, .grad_dtype = grad_dtype};
  job.weight_dtype = weight_dtype;
  job.scalars = scalars;
  job.weight = weight;
  job.master = master;
  job.m = m;
  job.v = v;
  job.grad = grad;
  job.decay_blocks = decay_blocks;
  job.fault = fault;
  flap_cpu_run(job.cpu, flap_cpu_ceil(job.blocks, BLOCKS_PER_ITEM), adamw_item, &job);
}

void flap_cpu_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                         void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                         const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  flap_assert(weight_dtype != FLAP_I32);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  optimizer_job job = {.cpu = flap_cpu_state(ops), .blocks = elements / FLAP_OPS_BLOCK, .grad_dtype = grad_dtype};
  job.weight_dtype = weight_dtype;
  job.scalars = scalars;
  job.weight = weight;
  job.master = master;
  job.m_codes = m;
  job.v_codes = v;
  job.m_largest = m_largest;
  job.v_largest = v_largest;
  job.grad = grad;
  job.decay_blocks = decay_blocks;
  job.fault = fault;
  flap_cpu_run(job.cpu, flap_cpu_ceil(job.blocks, BLOCKS_PER_ITEM), adamw_item, &job);
}
