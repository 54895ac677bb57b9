/* Products with what follows them in one kernel: which of them those of matmul_swiglu.h and matmul_rope.h compute. */
#include "kernels/cuda/cuda_internal.h"
#include "kernels/cuda/matmul_rope.h"
#include "kernels/cuda/matmul_swiglu.h"

#define HOPPER 90u

static bool aligned(const void *pointer, uint64_t stride) {
  return (uintptr_t)pointer % 16 == 0 && stride % 8 == 0;
}

/* Whether an output of rows by columns, in tiles of so many columns, keeps nine tenths of a GPU's clusters busy over
 * all its rounds: for others cuBLASLt has other tiles. The number of clusters is that of an H100, not what this GPU
 * has: which kernel runs is a function of shape. */
static bool fills(uint32_t rows, uint32_t columns, uint32_t tile_columns) {
  const uint64_t clusters = 66, tile = 2 * FLAP_CUDA_TILE_ROWS * (uint64_t)tile_columns;
  const uint64_t tiles = cuda_ceil(rows, 2 * FLAP_CUDA_TILE_ROWS) * cuda_ceil(columns, tile_columns);
  return (uint64_t)rows * columns * 10 >= cuda_ceil(tiles, clusters) * clusters * 9 * tile;
}

static bool takes(flap_ops *ops, const flap_matmul *x, uint32_t columns) {
  return flap_device_cuda_properties(ops->device)->capability == HOPPER &&
         (x->dtype == FLAP_BF16 || x->dtype == FLAP_F16) && x->k % 8 == 0 && columns % 8 == 0 &&
         aligned(x->a, x->lda) && aligned(x->b, x->ldb) && aligned(x->c, x->ldc);
}

static uint32_t multiprocessors(flap_ops *ops) {
  return flap_device_cuda_properties(ops->device)->multiprocessors;
}

bool cuda_matmul_swiglu(flap_ops *ops, const flap_matmul *x, void *out) {
  const uint32_t intermediate = x->n / 2;
  if (!takes(ops, x, intermediate) || !aligned(out, intermediate) ||
      !fills(x->m, intermediate, FLAP_CUDA_TILE_COLUMNS / 2))
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
      !fills(x->m, x->n, FLAP_CUDA_TILE_COLUMNS))
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

bool cuda_matmul_rope(flap_ops *ops, const flap_matmul *x, const float *cos_sin, uint32_t sequence,
                      uint32_t first_position, uint32_t heads, uint32_t head_size) {
  if ((head_size != 64 && head_size != 128) || x->n % head_size != 0 || !takes(ops, x, x->n) || !aligned(x->bias, 0) ||
      !aligned(cos_sin, 0) || !fills(x->m, x->n, FLAP_CUDA_TILE_COLUMNS))
    return false;
  const cudaStream_t stream = cuda_stream(ops);
  const flap_cuda_matmul_rope launch = {.dtype = x->dtype,
                                        .tokens = x->m,
                                        .hidden = x->k,
                                        .width = x->n,
                                        .a = x->a,
                                        .b = x->b,
                                        .bias = x->bias,
                                        .c = x->c,
                                        .lda = x->lda,
                                        .ldb = x->ldb,
                                        .ldc = x->ldc,
                                        .cos_sin = cos_sin,
                                        .sequence = sequence,
                                        .first_position = first_position,
                                        .heads = heads,
                                        .head_size = head_size};
  cuda_check(ops, "a product with rope", flap_cuda_matmul_rope_forward(&launch, multiprocessors(ops), stream));
  return true;
}
