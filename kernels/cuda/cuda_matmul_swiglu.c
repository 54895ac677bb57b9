/* The MLP's products with its activation: which of them the kernels of matmul_swiglu.h compute. */
#include "kernels/cuda/cuda_internal.h"
#include "kernels/cuda/matmul_swiglu.h"

#define HOPPER 90u

static bool aligned(const void *pointer, uint64_t stride) {
  return (uintptr_t)pointer % 16 == 0 && stride % 8 == 0;
}

/* Rows and columns of an output of `columns` columns a tile each fill the GPU's thread blocks, but for a tenth in the
 * last round. For smaller products cuBLASLt has smaller tiles. The number of clusters is that of an H100, not what this
 * GPU has: which kernel runs is a function of shape. */
static bool fills(uint32_t rows, uint32_t columns, uint32_t tile_columns) {
  const uint64_t clusters = 66;
  const uint64_t tiles = cuda_ceil(rows, 2 * FLAP_CUDA_MATMUL_SWIGLU_ROWS) * cuda_ceil(columns, tile_columns);
  return tiles * 10 >= cuda_ceil(tiles, clusters) * clusters * 9;
}

static bool takes(flap_ops *ops, const flap_matmul *x, uint32_t intermediate) {
  return flap_device_cuda_properties(ops->device)->capability == HOPPER &&
         (x->dtype == FLAP_BF16 || x->dtype == FLAP_F16) && x->k % 8 == 0 && intermediate % 8 == 0 &&
         aligned(x->a, x->lda) && aligned(x->b, x->ldb) && aligned(x->c, x->ldc);
}

static uint32_t multiprocessors(flap_ops *ops) {
  return flap_device_cuda_properties(ops->device)->multiprocessors;
}

bool cuda_matmul_swiglu(flap_ops *ops, const flap_matmul *x, void *out) {
  const uint32_t intermediate = x->n / 2;
  if (!takes(ops, x, intermediate) || !aligned(out, intermediate) ||
      !fills(x->m, intermediate, FLAP_CUDA_MATMUL_SWIGLU_COLUMNS / 2))
    return false;
  const cudaStream_t stream = cuda_stream(ops);
  const flap_cuda_matmul_swiglu launch = {.dtype = x->dtype,
                                          .tokens = x->m,
                                          .hidden = x->k,
                                          .intermediate = intermediate,
                                          .a = x->a,
                                          .b = x->b,
                                          .gate = x->c,
                                          .up = (char *)x->c + (uint64_t)intermediate * flap_dtype_bytes(x->dtype),
                                          .inner = out,
                                          .lda = x->lda,
                                          .ldb = x->ldb,
                                          .ld_out = x->ldc};
  cuda_check(ops, "a product with swiglu", flap_cuda_matmul_swiglu_forward(&launch, multiprocessors(ops), stream));
  return true;
}

bool cuda_matmul_swiglu_backward(flap_ops *ops, const flap_matmul *x, void *dgate, void *dup, uint32_t ld_d, bool again,
                                 const void *gate, const void *up, uint32_t ld) {
  if (!takes(ops, x, x->n) || !aligned(dgate, ld_d) || !aligned(dup, ld_d) || !aligned(gate, ld) || !aligned(up, ld) ||
      !fills(x->m, x->n, FLAP_CUDA_MATMUL_SWIGLU_COLUMNS))
    return false;
  const cudaStream_t stream = cuda_stream(ops);
  const flap_cuda_matmul_swiglu launch = {.dtype = x->dtype,
                                          .tokens = x->m,
                                          .hidden = x->k,
                                          .intermediate = x->n,
                                          .a = x->a,
                                          .b = x->b,
                                          .gate_in = gate,
                                          .up_in = up,
                                          .gate = dgate,
                                          .up = dup,
                                          .inner = again ? x->c : NULL,
                                          .lda = x->lda,
                                          .ldb = x->ldb,
                                          .ld = ld,
                                          .ld_out = ld_d};
  cuda_check(ops, "a product with swiglu's backward",
             flap_cuda_matmul_swiglu_backward(&launch, multiprocessors(ops), stream));
  return true;
}
