/* Products of the MLP with its activation in their epilogues: what is multiplied never waits for what is element-wise.
 *
 * Private to kernels/cuda. On Hopper (sm_90a) alone, by the tiles of matmul_tiles.cuh. Nothing here allocates or waits;
 * the first error of a launch is returned.
 *
 * Numbers: K is summed in fp32 in one order, that of K, whatever the tile; what the two operations would round between
 * them is rounded here as well, by the same arithmetic. So the result is that of the product and of swiglu in turn, for
 * a product that sums in this order.
 */
#ifndef FLAP_KERNELS_CUDA_MATMUL_SWIGLU_H
#define FLAP_KERNELS_CUDA_MATMUL_SWIGLU_H

#include "kernels/cuda/matmul_tiles.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Operands of one launch, of 16-bit types; strides in elements. All pointers and rows are aligned to 16 bytes, and
 * sizes are multiples of 8. */
typedef struct flap_cuda_matmul_swiglu {
  flap_dtype dtype;
  uint32_t tokens, hidden, intermediate;
  const void *a; /* (T, D), row stride lda: the MLP's input, or the gradient of its output */
  /* Row stride ldb. Forward: (2 F, D), gate's rows and then up's. Backward: (D, F), the projection down. */
  const void *b;
  const void *gate_in, *up_in; /* backward: (T, F), row stride ld */
  void *gate, *up;             /* (T, F), row stride ld_out: the forward's gate and up, or their gradients */
  void *inner;                 /* (T, F) contiguous: silu(gate) * up; NULL if nobody wants it */
  uint64_t lda, ldb, ld, ld_out;
} flap_cuda_matmul_swiglu;

/* `multiprocessors` decides how many thread blocks share the tiles, and nothing else. */
cudaError_t flap_cuda_matmul_swiglu_forward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors,
                                            cudaStream_t stream);
/* gate and up may be gate_in and up_in. */
cudaError_t flap_cuda_matmul_swiglu_backward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors,
                                             cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
