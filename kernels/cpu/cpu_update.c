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
  const flap_cpu_update *update;
  uint64_t blocks, blocks_per_item;
} update_job;

/* One chunk, whatever its moments are stored as. Returns whether something was refused. */
static bool update_chunk(const update_job *job, float decay, uint64_t i, float *m, float *v, const float *grad) {
  const flap_cpu_vector *vector = job->vector;
  const flap_cpu_update *u = job->update;
  if (u->weight_dtype == FLAP_BF16)
    return vector->adamw_split(u->scalars, decay, (uint16_t *)u->weight + i, (int16_t *)u->master + i, m, v, grad,
                               CHUNK);
  if (u->weight_dtype == FLAP_F16)
    return vector->adamw_f16(u->scalars, decay, (uint16_t *)u->weight + i, (float *)u->master + i, m, v, grad, CHUNK);
  return vector->adamw_f32(u->scalars, decay, (float *)u->weight + i, m, v, grad, CHUNK);
}

static bool update_8bit_chunk(const update_job *job, float decay, uint64_t i, const float *grad) {
  const flap_cpu_vector *vector = job->vector;
  const flap_cpu_update *u = job->update;
  const uint64_t block = i / FLAP_OPS_MOMENT_BLOCK;
  float m[CHUNK], v[CHUNK];
  vector->moments_load(m, v, u->m_codes + i, u->v_codes + i, u->m_largest + block, u->v_largest + block, CHUNK);
  const bool refused = update_chunk(job, decay, i, m, v, grad);
  return vector->moments_store(u->m_codes + i, u->v_codes + i, u->m_largest + block, u->v_largest + block, m, v,
                               CHUNK) ||
         refused;
}

static bool update_block(const update_job *job, uint64_t block) {
  const flap_cpu_update *u = job->update;
  const bool decays = (u->decay_blocks[block / 8] >> (block % 8) & 1) != 0;
  const float decay = decays ? u->scalars->decay : 1.0f; /* times 1 changes no bit */
  float buffer[CHUNK];
  bool refused = false;
  for (uint64_t i = block * FLAP_OPS_BLOCK; i < (block + 1) * FLAP_OPS_BLOCK; i += CHUNK) {
    const float *grad = buffer;
    if (u->grad_dtype == FLAP_F32)
      grad = (const float *)u->grad + i;
    else
      job->vector->from_bf16(buffer, CHUNK, (const uint16_t *)u->grad + i, CHUNK, 1, CHUNK);
    if (u->m_codes != NULL)
      refused |= update_8bit_chunk(job, decay, i, grad);
    else
      refused |= update_chunk(job, decay, i, u->m + i, u->v + i, grad);
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
    __atomic_store_n(job->update->fault, 1, __ATOMIC_RELAXED);
}

static uint64_t blocks_per_item(uint64_t blocks) {
  const uint64_t wanted = blocks / ITEMS_MIN;
  return wanted < 1 ? 1 : wanted > BLOCKS_PER_ITEM_MAX ? BLOCKS_PER_ITEM_MAX : wanted;
}

void flap_cpu_update_run(const flap_cpu_vector *vector, flap_pool *pool, const flap_cpu_update *update) {
  flap_assert(update->weight_dtype != FLAP_I32);
  flap_assert(update->grad_dtype == FLAP_F32 || update->grad_dtype == FLAP_BF16);
  update_job job = {.vector = vector, .update = update, .blocks = update->elements / FLAP_OPS_BLOCK};
  job.blocks_per_item = blocks_per_item(job.blocks);
  flap_pool_run(pool, (job.blocks + job.blocks_per_item - 1) / job.blocks_per_item, update_item, &job);
}
