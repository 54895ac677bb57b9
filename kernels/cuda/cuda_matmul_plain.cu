/* Matrix products of any shape, stride and alignment, in fp32 arithmetic: for the few that cuBLASLt refuses. */
#include "kernels/cuda/cuda_elements.cuh"

#define TILE 32u
#define ROWS 8u /* of threads: each has TILE / ROWS results */

struct plain_arguments {
  flap_matmul x;
  uint64_t a_row, a_column, b_row, b_column; /* strides of op(a) (M, K) and op(b) (K, N) */
};

template <typename T, typename C> __global__ void __launch_bounds__(TILE *ROWS) plain_kernel(const plain_arguments p) {
  __shared__ float a_tile[TILE][TILE + 1], b_tile[TILE][TILE + 1];
  const T *a = (const T *)p.x.a, *b = (const T *)p.x.b, *bias = (const T *)p.x.bias;
  const uint32_t row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
  float sums[TILE / ROWS] = {};
  for (uint32_t k0 = 0; k0 < p.x.k; k0 += TILE) {
    for (uint32_t i = threadIdx.y; i < TILE; i += ROWS) {
      const uint32_t row = row0 + i, k = k0 + threadIdx.x, kb = k0 + i, column = column0 + threadIdx.x;
      a_tile[i][threadIdx.x] = row < p.x.m && k < p.x.k ? to_float(a[row * p.a_row + k * p.a_column]) : 0.0f;
      b_tile[i][threadIdx.x] = kb < p.x.k && column < p.x.n ? to_float(b[kb * p.b_row + column * p.b_column]) : 0.0f;
    }
    __syncthreads();
    for (uint32_t k = 0; k < TILE; ++k)
#pragma unroll
      for (uint32_t i = 0; i < TILE / ROWS; ++i)
        sums[i] = fmaf(a_tile[threadIdx.y + i * ROWS][k], b_tile[k][threadIdx.x], sums[i]);
    __syncthreads();
  }
  const uint32_t column = column0 + threadIdx.x;
  for (uint32_t i = 0; i < TILE / ROWS; ++i) {
    const uint32_t row = row0 + threadIdx.y + i * ROWS;
    if (row >= p.x.m || column >= p.x.n)
      continue;
    C *at = (C *)p.x.c + (uint64_t)row * p.x.ldc + column;
    float sum = sums[i] + (bias != nullptr ? to_float(bias[column]) : 0.0f);
    if (p.x.residual != nullptr)
      sum += to_float(((const C *)p.x.residual)[(uint64_t)row * p.x.ldc + column]);
    if (p.x.accumulate)
      sum += to_float(*at);
    *at = from_float<C>(sum);
  }
}

void cuda_matmul_plain(flap_ops *ops, const flap_matmul *matmul) {
  const cudaStream_t stream = cuda_stream(ops);
  plain_arguments p = {};
  p.x = *matmul;
  const bool tn = matmul->transpose == FLAP_TN, nt = matmul->transpose == FLAP_NT;
  p.a_row = tn ? 1 : matmul->lda;
  p.a_column = tn ? matmul->lda : 1;
  p.b_row = nt ? 1 : matmul->ldb;
  p.b_column = nt ? matmul->ldb : 1;
  const dim3 threads(TILE, ROWS);
  const uint32_t rows_max = 65535u * TILE; /* of a grid */
  const uint64_t a_bytes = flap_dtype_bytes(matmul->dtype), c_bytes = flap_dtype_bytes(matmul->c_dtype);
  for (uint32_t row = 0; row < matmul->m; row += rows_max) {
    p.x.m = cuda_min(rows_max, matmul->m - row);
    p.x.a = (const unsigned char *)matmul->a + row * p.a_row * a_bytes;
    p.x.c = (unsigned char *)matmul->c + (uint64_t)row * matmul->ldc * c_bytes;
    if (matmul->residual != nullptr)
      p.x.residual = (const unsigned char *)matmul->residual + (uint64_t)row * matmul->ldc * c_bytes;
    const dim3 grid((uint32_t)cuda_ceil(matmul->n, TILE), (uint32_t)cuda_ceil(p.x.m, TILE));
    if (matmul->c_dtype == FLAP_F32)
      CUDA_FOR_DTYPE(matmul->dtype, T, plain_kernel<T, float><<<grid, threads, 0, stream>>>(p));
    else
      CUDA_FOR_DTYPE(matmul->dtype, T, plain_kernel<T, T><<<grid, threads, 0, stream>>>(p));
  }
  cuda_launched(ops, "a matrix product");
}
