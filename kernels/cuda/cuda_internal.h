/* Private to kernels/cuda: the state behind the cuda ops, how to launch, and what each file provides.
 *
 * 1. Launch on cuda_stream(ops), asked for once at the head of every operation. Never synchronise, never allocate.
 * 2. After the launches of an operation: cuda_launched(ops, "name"). Errors are sticky in the device; nothing returns
 *    them, and an operation after a failed one may launch or not.
 * 3. Operations run one after another in the stream, so they take turns in one scratch: cuda_scratch(ops), of
 *    cuda_scratch_bytes(ops) bytes, aligned to 256, as large as the largest need that cuda_sizes.c knows.
 *    cuBLASLt has a workspace of its own: an operation may call cuda_matmul and keep its scratch.
 * 4. Which kernel runs and the order of its sums are a function of shape and dtype. Not of addresses (an unaligned
 *    pointer changes how bytes are loaded, not what is added to what), but for products; not of the number of
 *    multiprocessors. Nor is its grid, but that of attention's forward and of products by tiles on Hopper, where it
 *    decides which block computes what, and not what.
 *    Blocks add to the same floats only in attention's backward on Hopper, each in its turn, so in a fixed order.
 * 5. Everything is compiled with -fmad=false: a fused multiply-add is written, fmaf() or an mma instruction.
 *
 * The header is C11 and C++17, so that cuda_ops.c is C and kernels are C++. */
#ifndef FLAP_KERNELS_CUDA_INTERNAL_H
#define FLAP_KERNELS_CUDA_INTERNAL_H

#include "kernels/cuda/cuda_sizes.h"
#include "kernels/device/device_cuda.h"
#include "kernels/ops_internal.h"

#include <cuda_runtime_api.h>

/* In the numerics text: another one whenever a change of kernels changes bits, so that no run goes on with other ones
 * unnoticed. */
#define CUDA_KERNELS "kernels 8"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cuda_blas cuda_blas;

typedef struct cuda_ops {
  cuda_blas *blas;
  unsigned char *scratch;
  uint64_t scratch_bytes;
} cuda_ops;

static inline cuda_ops *cuda_state(const flap_ops *ops) {
  return (cuda_ops *)ops->state;
}

static inline cudaStream_t cuda_stream(flap_ops *ops) {
  return (cudaStream_t)flap_device_cuda_compute(ops->device);
}

static inline void *cuda_scratch(const flap_ops *ops) {
  return cuda_state(ops)->scratch;
}
static inline uint64_t cuda_scratch_bytes(const flap_ops *ops) {
  return cuda_state(ops)->scratch_bytes;
}

/* Makes an error of `what` sticky; success is fine. */
static inline void cuda_check(flap_ops *ops, const char *what, cudaError_t error) {
  if (error != cudaSuccess)
    flap_device_cuda_fail(ops->device, what, (int)error, cudaGetErrorString(error));
}

/* After launches: whether they were accepted. */
static inline void cuda_launched(flap_ops *ops, const char *what) {
  cuda_check(ops, what, cudaGetLastError());
}

static inline uint64_t cuda_ceil(uint64_t a, uint64_t b) {
  return (a + b - 1) / b;
}
static inline uint32_t cuda_min(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

/* ---- cuda_blas.c: cuBLASLt, found at run time ---- */

flap_status cuda_blas_open(flap_ops *ops, void *workspace, cuda_blas **blas_out);
void cuda_blas_close(cuda_blas *blas);
/* "cublaslt-13.1.0"; static storage or the object's. */
const char *cuda_blas_version(const cuda_blas *blas);
/* The same without a device: only looks for the library. */
flap_status cuda_blas_find_version(char *version_out, size_t bytes);
/* Before the first product; see flap_ops_set_matmuls. */
flap_status cuda_blas_set_table(cuda_blas *blas, struct flap_matmul_table *table, flap_matmul_mode mode);
void cuda_matmul(flap_ops *ops, const flap_matmul *matmul);

/* ---- cuda_matmul_plain.cu ---- */

/* The same in fp32 arithmetic, for any alignment. */
void cuda_matmul_plain(flap_ops *ops, const flap_matmul *matmul);

/* ---- cuda_attention*.cu ---- */

void cuda_attention(flap_ops *ops, const flap_attention *attention);
void cuda_attention_backward(flap_ops *ops, const flap_attention *attention, void *dq, void *dk, void *dv,
                             const void *dout);
void cuda_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                           const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                           uint32_t heads, uint32_t kv_heads, uint32_t head_size);

/* ---- cuda_norm.cu ---- */

void cuda_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                  const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon);
/* sums (width) += parts (count, width), added in an order that count alone decides. */
void cuda_fold_rows(flap_ops *ops, float *sums, const float *parts, uint32_t count, uint32_t width);
/* `rows` rows of row_bytes, both sides with the same stride. */
void cuda_copy_rows(flap_ops *ops, void *to, const void *from, uint64_t row_bytes, uint32_t rows,
                    uint64_t stride_bytes);
void cuda_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                           const void *dy, const void *x, const void *weight, const float *rstd, const void *dresidual,
                           uint32_t token_count, uint32_t hidden);

/* ---- cuda_rows.cu ---- */

/* Whether this build has code for the GPU. */
cudaError_t cuda_kernels_there(void);
void cuda_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                        uint32_t ld);
/* c (M, N) fp32, row stride ldc: = bias, or += bias. */
void cuda_bias_prepare(flap_ops *ops, flap_dtype dtype, float *c, const void *bias, uint32_t m, uint32_t n,
                       uint32_t ldc, bool accumulate);
void cuda_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                    uint32_t token_count, uint32_t hidden);
void cuda_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                             const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden);
void cuda_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements);
void cuda_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count, uint32_t sequence,
               uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld, bool inverse);
void cuda_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                 uint32_t intermediate, uint32_t ld);
void cuda_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                          const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                          uint32_t intermediate);

/* ---- cuda_matmul_tiles.c ---- */

bool cuda_matmul_swiglu(flap_ops *ops, const flap_matmul *matmul, void *out);
bool cuda_matmul_swiglu_backward(flap_ops *ops, const flap_matmul *matmul, void *dgate, void *dup, uint32_t ld_d,
                                 bool again, const void *gate, const void *up, uint32_t ld);
bool cuda_matmul_rope(flap_ops *ops, const flap_matmul *matmul, const float *cos_sin, uint32_t sequence,
                      uint32_t first_position, uint32_t heads, uint32_t head_size);

/* ---- cuda_head.cu ---- */

void cuda_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                    const void *x, const void *weight, const int32_t *targets, float loss_scale, uint32_t token_count,
                    uint32_t hidden, uint32_t vocabulary);

/* ---- cuda_optimizer.cu ---- */

void cuda_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares, flap_dtype sum_dtype,
                         const void *sum, uint64_t elements);
void cuda_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight,
                void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks, int32_t *fault,
                uint64_t elements);
void cuda_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                     void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                     const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);

#ifdef __cplusplus
}
#endif
#endif
