#include "kernels/cpu/cpu_update.h"

#include "base/assert.h"

/* Elements whose gradient, and whose 8-bit moments, are held as fp32 at a time: beside them the first cache keeps the
 * lines that the processor fetches ahead. */
#define CHUNK 512u
/* Long items are read as long streams; but there must be many, so that all threads end together. */
#define BLOCKS_PER_ITEM_MAX 32u
#define ITEMS_MIN 128u

typedef struct update_job {
  const flap_cpu_vector *vector;
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
  uint64_t blocks, blocks_per_item;
} update_job;

/* One chunk, whatever its moments are stored as. Returns whether something was refused. */
static bool update_chunk(const update_job *job, float decay, uint64_t i, float *m, float *v, const float *grad) {
  const flap_cpu_vector *vector = job->vector;
  if (job->weight_dtype == FLAP_BF16)
    return vector->adamw_split(job->scalars, decay, (uint16_t *)job->weight + i, (int16_t *)job->master + i, m, v, grad,
                               CHUNK);
  if (job->weight_dtype == FLAP_F16)
    return vector->adamw_f16(job->scalars, decay, (uint16_t *)job->weight + i, (float *)job->master + i, m, v, grad,
                             CHUNK);
  return vector->adamw_f32(job->scalars, decay, (float *)job->weight + i, m, v, grad, CHUNK);
}

static bool update_8bit_chunk(const update_job *job, float decay, uint64_t i, const float *grad) {
  const flap_cpu_vector *vector = job->vector;
  const uint64_t block = i / FLAP_OPS_MOMENT_BLOCK;
  float m[CHUNK], v[CHUNK];
  vector->moments_load(m, v, job->m_codes + i, job->v_codes + i, job->m_largest + block, job->v_largest + block, CHUNK);
  const bool refused = update_chunk(job, decay, i, m, v, grad);
  return vector->moments_store(job->m_codes + i, job->v_codes + i, job->m_largest + block, job->v_largest + block, m, v,
                               CHUNK) ||
         refused;
}

static bool update_block(const update_job *job, uint64_t block) {
  const bool decays = (job->decay_blocks[block / 8] >> (block % 8) & 1) != 0;
  const float decay = decays ? job->scalars->decay : 1.0f; /* times 1 changes no bit */
  float buffer[CHUNK];
  bool refused = false;
  for (uint64_t i = block * FLAP_OPS_BLOCK; i < (block + 1) * FLAP_OPS_BLOCK; i += CHUNK) {
    const float *grad = buffer;
    if (job->grad_dtype == FLAP_F32)
      grad = (const float *)job->grad + i;
    else
      job->vector->from_bf16(buffer, CHUNK, (const uint16_t *)job->grad + i, CHUNK, 1, CHUNK);
    if (job->m_codes != NULL)
      refused |= update_8bit_chunk(job, decay, i, grad);
    else
      refused |= update_chunk(job, decay, i, job->m + i, job->v + i, grad);
  }
  return refused;
}

static void update_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const update_job *job = context;
  const uint64_t first = item * job->blocks_per_item, left = job->blocks - first;
  const uint64_t count = left < job->blocks_per_item ? left : job->blocks_per_item;
  bool refused = false;
  for (uint64_t block = first; block < first + count; ++block)
    refused |= update_block(job, block);
  if (refused)
    __atomic_store_n(job->fault, 1, __ATOMIC_RELAXED);
}

static uint64_t blocks_per_item(uint64_t blocks) {
  const uint64_t wanted = blocks / ITEMS_MIN;
  return wanted < 1 ? 1 : wanted > BLOCKS_PER_ITEM_MAX ? BLOCKS_PER_ITEM_MAX : wanted;
}

static void run(flap_pool *pool, update_job *job, uint64_t elements) {
  flap_assert(job->weight_dtype != FLAP_I32);
  flap_assert(job->grad_dtype == FLAP_F32 || job->grad_dtype == FLAP_BF16);
  job->blocks = elements / FLAP_OPS_BLOCK;
  job->blocks_per_item = blocks_per_item(job->blocks);
  flap_pool_run(pool, (job->blocks + job->blocks_per_item - 1) / job->blocks_per_item, update_item, job);
}

void flap_cpu_update_adamw(const flap_cpu_vector *vector, flap_pool *pool, const flap_adamw *scalars,
                           flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight, void *master, float *m,
                           float *v, const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  update_job job = {.vector = vector, .scalars = scalars, .weight = weight, .master = master};
  job.weight_dtype = weight_dtype, job.grad_dtype = grad_dtype;
  job.m = m, job.v = v;
  job.grad = grad, job.decay_blocks = decay_blocks, job.fault = fault;
  run(pool, &job, elements);
}

void flap_cpu_update_adamw_8bit(const flap_cpu_vector *vector, flap_pool *pool, const flap_adamw *scalars,
                                flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight, void *master, int8_t *m,
                                uint8_t *v, float *m_largest, float *v_largest, const void *grad,
                                const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  update_job job = {.vector = vector, .scalars = scalars, .weight = weight, .master = master};
  job.weight_dtype = weight_dtype, job.grad_dtype = grad_dtype;
  job.m_codes = m, job.v_codes = v;
  job.m_largest = m_largest, job.v_largest = v_largest;
  job.grad = grad, job.decay_blocks = decay_blocks, job.fault = fault;
  run(pool, &job, elements);
}
