#include "kernels/cuda/cuda_sizes.h"

#include "base/units.h"
#include "kernels/ops_internal.h"

/* Blocks that fill a large GPU twice; a constant, so that the order of sums is the same on every device. */
#define BLOCKS_WANTED 264u
/* Units of heads at a time, see ATTENTION_SECTION_UNITS in attention_tiles.cuh; and at most 192 MiB of sums of dq. */
#define CHAIN_HEAD_MAX 128u
#define CHAIN_SECTION_UNITS 32u
#define CHAIN_SUMS_MAX (((uint64_t)192 << 20) / (CUDA_ATTENTION_CHAIN_ELEMENTS * sizeof(float)))
#define FEW_PART_KEYS 128u
#define FEW_PARTS_MAX 64u

/* The parts of dweight take about this many floats together, whatever the width. */
#define NORM_ELEMENTS (1u << 20)
#define NORM_PARTS_MAX 1024u
#define NORM_PARTS_MIN 32u

/* Logits of a chunk take up to this much. dweight, fp32, is read and written once for each chunk, which costs as much
 * as the products of 350 tokens on an H100: so a chunk has many, and where the vocabulary is large at least ROWS_MIN.
 */
#define CHUNK_BYTES ((uint64_t)256 << 20)
#define ROWS_MIN 2048u
#define ROWS_MAX 4096u
#define ROWS_STEP 128u

/* Sums of a bias: a part has so many tokens, more where there are many. */
#define BIAS_PART_TOKENS 256u
/* From where on turns cost less than computing scores twice: the fewest that were measured, see ATTENTION.md. */
#define CHAIN_QUERIES 1000u
#define BIAS_PARTS_MAX 64u
#define ROW_GROUP 8u /* elements that a thread of a row-wise kernel loads at once */

static uint64_t max_of(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}
static uint64_t min_of(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* ---- attention ---- */

uint64_t cuda_attention_statistics_bytes(const flap_cuda_attention_shape *shape) {
  const uint64_t rows = (uint64_t)shape->batch * shape->queries * shape->heads;
  return flap_units_round_up(rows * 2 * sizeof(float), FLAP_OPS_ALIGN);
}

static uint64_t key_blocks(const flap_cuda_attention_shape *shape) {
  return ((uint64_t)shape->keys + CUDA_ATTENTION_KEYS - 1) / CUDA_ATTENTION_KEYS * shape->batch * shape->kv_heads;
}

/* The largest number of equal parts that does not overshoot. */
uint32_t cuda_attention_backward_parts(const flap_cuda_attention_shape *shape) {
  const uint32_t group = shape->heads / shape->kv_heads;
  uint32_t parts = group;
  while (parts > 1 && (group % parts != 0 || key_blocks(shape) * parts > BLOCKS_WANTED))
    --parts;
  return parts;
}

/* For the worst of all smaller shapes: parts times key blocks never exceeds BLOCKS_WANTED unless there is one part. */
static uint64_t backward_partial_bytes(const flap_cuda_attention_shape *shape) {
  const uint64_t group = shape->heads / shape->kv_heads;
  if (group == 1)
    return 0;
  const uint64_t blocks = min_of(key_blocks(shape) * group, BLOCKS_WANTED);
  return blocks * CUDA_ATTENTION_KEYS * shape->head_size * 2 * sizeof(float);
}

bool cuda_attention_chain_pays(const flap_cuda_attention_shape *shape) {
  return shape->queries >= CHAIN_QUERIES;
}

static bool has_chain(const flap_cuda_attention_shape *shape) {
  return !shape->two_passes && shape->dtype != FLAP_F32 && shape->head_size <= CHAIN_HEAD_MAX;
}

static uint64_t chain_tiles(const flap_cuda_attention_shape *shape) {
  const uint32_t queries = CUDA_ATTENTION_CHAIN_ELEMENTS / (shape->head_size <= 64 ? 64 : 128);
  return ((uint64_t)shape->queries + queries - 1) / queries;
}

/* Tiles whose sums are kept: of all heads, or where those are many of two sections of units, so that one is summed
 * while the blocks of the one before finish; and no more than the limit. */
static uint64_t chain_sums(const flap_cuda_attention_shape *shape) {
  const uint64_t all = (uint64_t)shape->batch * shape->heads;
  const uint64_t wanted = (uint64_t)2 * CHAIN_SECTION_UNITS * (shape->heads / shape->kv_heads);
  return min_of(min_of(all, wanted) * chain_tiles(shape), CHAIN_SUMS_MAX);
}

static uint64_t chain_turns_bytes(const flap_cuda_attention_shape *shape) {
  return flap_units_round_up((1 + 2 * chain_sums(shape)) * sizeof(uint32_t), FLAP_OPS_ALIGN);
}

cuda_attention_chain cuda_attention_chain_of(const flap_cuda_attention_shape *shape) {
  cuda_attention_chain chain = {.slots = 0};
  if (!has_chain(shape))
    return chain;
  const uint64_t all = (uint64_t)shape->batch * shape->heads, slots = chain_sums(shape) / chain_tiles(shape);
  const uint64_t unit_heads = shape->heads / shape->kv_heads / cuda_attention_backward_parts(shape);
  chain.section_units =
      (uint32_t)(slots >= all ? CHAIN_SECTION_UNITS : min_of(CHAIN_SECTION_UNITS, slots / (2 * unit_heads)));
  chain.slots = chain.section_units > 0 ? (uint32_t)min_of(slots, all) : 0;
  chain.turns =
      cuda_attention_statistics_bytes(shape) + flap_units_round_up(backward_partial_bytes(shape), FLAP_OPS_ALIGN);
  chain.turns_bytes = chain_turns_bytes(shape);
  chain.sums = chain.turns + chain.turns_bytes;
  return chain;
}

uint64_t flap_cuda_attention_backward_scratch_bytes(const flap_cuda_attention_shape *shape) {
  const uint64_t bytes =
      cuda_attention_statistics_bytes(shape) + flap_units_round_up(backward_partial_bytes(shape), FLAP_OPS_ALIGN);
  if (!has_chain(shape))
    return bytes;
  return bytes + chain_turns_bytes(shape) + chain_sums(shape) * CUDA_ATTENTION_CHAIN_ELEMENTS * sizeof(float);
}

uint32_t cuda_attention_few_parts(uint32_t keys) {
  return (uint32_t)min_of(((uint64_t)keys + FEW_PART_KEYS - 1) / FEW_PART_KEYS, FEW_PARTS_MAX);
}

/* Of the worst of all shapes with fewer queries at the same first position or a lower one. */
uint64_t flap_cuda_attention_forward_scratch_bytes(const flap_cuda_attention_shape *shape) {
  const uint32_t queries = (uint32_t)min_of(shape->queries, CUDA_ATTENTION_FEW_QUERIES);
  return (uint64_t)queries * shape->batch * shape->heads * cuda_attention_few_parts(shape->first_position + queries) *
         (shape->head_size + 2) * sizeof(float);
}

static uint64_t attention_bytes(const flap_ops_limits *limits) {
  flap_cuda_attention_shape shape = {.batch = limits->batch_max,
                                     .queries = limits->sequence_max,
                                     .keys = limits->sequence_max,
                                     .heads = limits->heads,
                                     .kv_heads = limits->kv_heads,
                                     .head_size = limits->head_size,
                                     .q_stride = limits->heads * limits->head_size,
                                     .kv_stride = limits->kv_heads * limits->head_size,
                                     .dtype = limits->dtype};
  uint64_t bytes = 0;
  shape.two_passes = !cuda_attention_chain_pays(&shape); /* then it does not for smaller ones either */
  if (shape.queries > 0)
    bytes =
        max_of(flap_cuda_attention_forward_scratch_bytes(&shape), flap_cuda_attention_backward_scratch_bytes(&shape));
  if (limits->cache_tokens_max > 0) {
    shape.batch = 1;
    shape.queries = shape.first_position = shape.keys = limits->cache_tokens_max;
    bytes = max_of(bytes, flap_cuda_attention_forward_scratch_bytes(&shape));
  }
  return bytes;
}

/* ---- norms ---- */

uint32_t cuda_norm_parts(uint32_t hidden) {
  const uint32_t parts = NORM_ELEMENTS / hidden;
  return parts > NORM_PARTS_MAX ? NORM_PARTS_MAX : parts < NORM_PARTS_MIN ? NORM_PARTS_MIN : parts;
}

/* Norms of heads have more rows than there are tokens, so the parts are bounded by the width alone. */
static uint64_t norm_bytes(const flap_ops_limits *limits) {
  const uint64_t widest = max_of(limits->hidden, limits->head_size);
  const uint64_t elements = max_of(widest * NORM_PARTS_MIN, NORM_ELEMENTS);
  return min_of(elements, NORM_PARTS_MAX * widest) * sizeof(float);
}

/* ---- biases ---- */

uint32_t cuda_bias_parts(uint32_t tokens) {
  return (uint32_t)min_of(((uint64_t)tokens + BIAS_PART_TOKENS - 1) / BIAS_PART_TOKENS, BIAS_PARTS_MAX);
}

static uint64_t bias_bytes(const flap_ops_limits *limits) {
  const uint64_t widest = max_of(limits->hidden, (uint64_t)limits->heads * limits->head_size);
  return cuda_bias_parts(limits->tokens_max) * widest * sizeof(float);
}

/* ---- head ---- */

uint32_t cuda_head_rows(flap_dtype dtype, uint32_t vocabulary) {
  const uint64_t fit = CHUNK_BYTES / (vocabulary * flap_dtype_bytes(dtype)) / ROWS_STEP * ROWS_STEP;
  return fit < ROWS_MIN ? ROWS_MIN : fit > ROWS_MAX ? ROWS_MAX : (uint32_t)fit;
}

/* Rows of logits are apart by whole vectors, whatever the vocabulary. */
uint32_t cuda_head_stride(uint32_t vocabulary) {
  return (vocabulary + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP;
}

static uint64_t head_bytes(const flap_ops_limits *limits) {
  const uint64_t rows = min_of(cuda_head_rows(limits->dtype, limits->vocabulary), limits->tokens_max);
  return rows * cuda_head_stride(limits->vocabulary) * flap_dtype_bytes(limits->dtype);
}

/* ---- all of it ---- */

/* Operations run one after another, so they take turns in one scratch. */
uint64_t cuda_scratch_needed(const flap_ops_limits *limits) {
  const uint64_t bytes =
      max_of(attention_bytes(limits), max_of(max_of(norm_bytes(limits), bias_bytes(limits)), head_bytes(limits)));
  return flap_units_round_up(bytes, FLAP_OPS_ALIGN);
}

uint64_t cuda_workspace_bytes(const flap_ops_limits *limits) {
  return CUDA_BLAS_WORKSPACE_BYTES + cuda_scratch_needed(limits);
}
