/* The projection of queries, keys and values with the rotation of heads in its epilogue.
 *
 * Private to kernels/cuda. On Hopper (sm_90a) alone, by the tiles of matmul_tiles.cuh. Nothing here allocates or waits;
 * the first error of a launch is returned. Numbers: as the product, its bias and rope in turn, with K summed in its
 * order.
 */
#ifndef FLAP_KERNELS_CUDA_MATMUL_ROPE_H
#define FLAP_KERNELS_CUDA_MATMUL_ROPE_H

#include "kernels/cuda/matmul_tiles.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Operands of one launch, of 16-bit types; strides in elements. Pointers are aligned to 16 bytes and rows too, hidden
 * is a multiple of 8, width of the head size, which is 64 or 128. */
typedef struct flap_cuda_matmul_rope {
  flap_dtype dtype;
  uint32_t tokens, hidden, width;
  const void *a, *b; /* (T, D) and (width, D), row strides lda and ldb */
  const void *bias;  /* (width), or NULL */
  void *c;           /* (T, width), row stride ldc: the first `heads` heads of a row are rotated */
  uint64_t lda, ldb, ldc;
  const float *cos_sin; /* as flap_ops_rope has it */
  uint32_t sequence, first_position, heads, head_size;
} flap_cuda_matmul_rope;

cudaError_t flap_cuda_matmul_rope_forward(const flap_cuda_matmul_rope *x, uint32_t multiprocessors,
                                          cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
