/* Launchers of the attention kernels for CUDA: plain pointers, strides and sizes, and a stream.
 *
 * Role: causal grouped-query attention, forward and backward, in storage types bf16 and fp16 on the tensor cores (mma
 * with fp32 sums, sm_80 on) and in fp32 or with odd strides by plain fp32 arithmetic. Nothing here allocates, waits or
 * knows of ops: scratch is passed in, and the first error of a launch is returned.
 *
 * Numbers: every sum has an order that depends on the shape alone: where blocks add to one number, they take turns. So
 * the same operands give the same bits on every run. Memory: the files attention_*.cu.
 */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_H
#define FLAP_KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda/cuda_sizes.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* flap_cuda_attention_shape, and how much scratch a shape takes: cuda_sizes.h. */

/* lse NULL: not wanted. */
cudaError_t flap_cuda_attention_forward(const flap_cuda_attention_shape *shape, void *out, float *lse, const void *q,
                                        const void *k, const void *v, void *scratch, cudaStream_t stream);

/* first_position is 0. dq has the stride of q, dk and dv that of k and v; the gaps between rows are left alone. */
cudaError_t flap_cuda_attention_backward(const flap_cuda_attention_shape *shape, void *dq, void *dk, void *dv,
                                         const void *dout, const void *q, const void *k, const void *v, const void *out,
                                         const float *lse, void *scratch, cudaStream_t stream);

/* Which kernels the shape gets on the current device: "few" (forward alone), "plain", "mma", "wgmma" or "chain"
 * (backward alone). Static storage. For tests and benchmarks. */
const char *flap_cuda_attention_path(const flap_cuda_attention_shape *shape, bool backward);

#ifdef __cplusplus
}
#endif
#endif
