/* How the cuda kernels cut shapes into pieces, and the device memory that this takes: arithmetic alone.
 *
 * Private to kernels/. Built in every build, also without CUDA, because a plan for another machine sets aside what the
 * kernels there will take. The kernels ask the same functions, so planned and taken sizes are one. All of it is a
 * function of shape and dtype, never of the GPU. */
#ifndef FLAP_KERNELS_CUDA_SIZES_H
#define FLAP_KERNELS_CUDA_SIZES_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Shapes and operands of attention. q (B, queries, HQ, HD), k and v (B, keys, HKV, HD), each with a token stride in
 * elements; out and dout (B, queries, HQ, HD) contiguous; lse (B, HQ, queries) fp32, in natural logarithms of the
 * scaled scores. Query t of a sequence is at position first_position + t and sees the keys up to there: keys =
 * first_position + queries. */
typedef struct flap_cuda_attention_shape {
  uint32_t batch, queries, keys, first_position;
  uint32_t heads, kv_heads, head_size;
  uint32_t q_stride, kv_stride;
  flap_dtype dtype;
  bool portable;      /* for tests and benchmarks: the kernels for every GPU, also where there are faster ones; */
  bool little_shared; /* of these the ones for 100 KiB of shared memory in a multiprocessor, as consumers' GPUs have; */
  bool two_passes;    /* on Hopper those that compute scores twice, also where the scratch has room for the others */
} flap_cuda_attention_shape;

/* ---- all of it ---- */

/* Device memory of cuBLASLt itself, apart from the scratch in which the operations take turns. */
#define CUDA_BLAS_WORKSPACE_BYTES ((uint64_t)32 << 20)
uint64_t cuda_scratch_needed(const flap_ops_limits *limits);
/* Both. */
uint64_t cuda_workspace_bytes(const flap_ops_limits *limits);

/* ---- attention ---- */

/* Up to so many queries, tiles of 128 would be wasted, and taking the keys in parts is what helps. */
#define CUDA_ATTENTION_FEW_QUERIES 16u
/* Keys of a tile of the backward. */
#define CUDA_ATTENTION_KEYS 128u

/* The chain is faster than two passes, as far as was measured: for all but short sequences. If for a shape, then for
 * all larger ones of the same heads. */
bool cuda_attention_chain_pays(const flap_cuda_attention_shape *shape);

/* Scratch of a forward and of a backward. Both grow with batch, queries and first_position, so that the bytes of the
 * largest shape do for all smaller ones of the same heads. */
uint64_t flap_cuda_attention_forward_scratch_bytes(const flap_cuda_attention_shape *shape);
uint64_t flap_cuda_attention_backward_scratch_bytes(const flap_cuda_attention_shape *shape);
/* The first part of a backward's scratch: a pair of floats per query and head. */
uint64_t cuda_attention_statistics_bytes(const flap_cuda_attention_shape *shape);
/* In how many parts the heads of a group are taken for dk and dv. */
uint32_t cuda_attention_backward_parts(const flap_cuda_attention_shape *shape);
/* The backward in one kernel on Hopper (attention_chain.cu): dq is summed in fp32 in the scratch, by tiles of this many
 * elements, 64 x 128 or 128 x 64, in slots of a head each. */
#define CUDA_ATTENTION_CHAIN_ELEMENTS 8192u
typedef struct cuda_attention_chain {
  uint32_t slots;         /* 0: the scratch would be too large, and the other kernels run */
  uint32_t section_units; /* units of heads, whose blocks of keys are handed out together */
  uint64_t turns, sums;   /* where in the scratch: flags, to be zeroed, and the sums */
  uint64_t turns_bytes;
} cuda_attention_chain;
cuda_attention_chain cuda_attention_chain_of(const flap_cuda_attention_shape *shape);
/* In how many parts the keys are taken where there are few queries. */
uint32_t cuda_attention_few_parts(uint32_t keys);

/* ---- norms: rows whose sums of dweight one block keeps ---- */

uint32_t cuda_norm_parts(uint32_t hidden);

/* ---- biases: in how many parts the tokens are summed ---- */

uint32_t cuda_bias_parts(uint32_t tokens);

/* ---- head: rows of logits at a time, and how far apart they are, in elements ---- */

uint32_t cuda_head_rows(flap_dtype dtype, uint32_t vocabulary);
uint32_t cuda_head_stride(uint32_t vocabulary);

#ifdef __cplusplus
}
#endif
#endif
