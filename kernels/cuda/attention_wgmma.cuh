/* Attention's tiles as operands of wgmma: see wgmma.cuh. */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_WGMMA_CUH
#define FLAP_KERNELS_CUDA_ATTENTION_WGMMA_CUH

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/wgmma.cuh"

/* As attention_load_tile, into panels of ROWS rows. */
template <int HD, int ROWS, int THREADS>
__device__ __forceinline__ void panels_load(uint32_t tile, const uint16_t *from, uint32_t valid, uint64_t stride,
                                            uint32_t head_size) {
  constexpr int CHUNKS = HD / 8, STEP = THREADS / CHUNKS;
  static_assert(STEP % 8 == 0, "the place of a thread's chunk must not depend on the round");
  const uint32_t row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  const bool column_valid = chunk * 8 < head_size;
  const uint16_t *source = from + row * stride + chunk * 8;
  uint32_t to = tile + (chunk >> 3) * (ROWS * PANEL_ROW) + row * PANEL_ROW + (((chunk & 7) ^ (row & 7)) << 4);
#pragma unroll
  for (int i = 0; i < (ROWS + STEP - 1) / STEP; ++i) {
    const bool copied = column_valid && row + i * STEP < valid;
    if (ROWS % STEP == 0 || row + i * STEP < ROWS)
      copy16(to, copied ? source : from, copied ? 16 : 0);
    source += STEP * stride;
    to += STEP * PANEL_ROW;
  }
}

/* c (64, N) = rows (64, HD) · tile (N, HD)ᵀ, committed. `rows`: the first of the warpgroup's in panels of ROWS rows. */
template <typename T, int HD, int ROWS, int N>
__device__ __forceinline__ void panels_multiply(float (&c)[1][N / 8][4], uint32_t rows, uint32_t tile) {
  const wgmma_operand left(rows, 16), right(tile, 16);
#pragma unroll
  for (int k = 0; k < HD / 16; ++k) {
    const uint32_t panel = k / 4, within = k % 4 * 32;
    const uint64_t a = left.at(panel * (ROWS * PANEL_ROW) + within), b = right.at(panel * (N * PANEL_ROW) + within);
    if (k == 0)
      wgmma<T>::shared_first(c, a, b);
    else
      wgmma<T>::shared(c, a, b, 1);
  }
  wgmma_commit();
}

/* The warp's 16 rows of a tile with panels of ROWS rows, as left operands; `rows` is the first of them. */
template <int HD, int ROWS> __device__ __forceinline__ void panels_fragments(uint32_t (&a)[HD / 16][4], uint32_t rows) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < HD / 16; ++k)
    ldmatrix(a[k], rows + k / 4 * (ROWS * PANEL_ROW) + (lane & 15) * PANEL_ROW +
                       (((k % 4 * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
}

/* panels_multiply with the left operand in registers, which halves what is read from shared memory. */
template <typename T, int HD, int N>
__device__ __forceinline__ void panels_multiply(float (&c)[1][N / 8][4], const uint32_t (&left)[HD / 16][4],
                                                uint32_t tile) {
  const wgmma_operand right(tile, 16);
#pragma unroll
  for (int k = 0; k < HD / 16; ++k)
    wgmma<T>::along(c, left[k], right.at(k / 4 * (N * PANEL_ROW) + k % 4 * 32), k > 0);
  wgmma_commit();
}

/* c (64, HD) += left (64, N) · tile (N, HD), committed. */
template <typename T, int HD, int N>
__device__ __forceinline__ void panels_accumulate(float (&c)[1][HD / 8][4], const uint32_t (&left)[1][N / 16][4],
                                                  uint32_t tile) {
  const wgmma_operand right(tile, N * PANEL_ROW);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    wgmma<T>::across(c, left[0][k], right.at(k * (16 * PANEL_ROW)), 1);
  wgmma_commit();
}

/* The same with the left operand in shared memory: 64 rows, `rows` the first of them, in panels of ROWS rows. */
template <typename T, int HD, int ROWS, int N>
__device__ __forceinline__ void panels_accumulate(float (&c)[1][HD / 8][4], uint32_t rows, uint32_t tile) {
  const wgmma_operand left(rows, 16), right(tile, N * PANEL_ROW);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    wgmma<T>::right_across(c, left.at(k / 4 * (ROWS * PANEL_ROW) + k % 4 * 32), right.at(k * (16 * PANEL_ROW)), 1);
  wgmma_commit();
}

/* c (64, 64) = left (N, 64)ᵀ · right (N, 64), committed; both are panels. */
template <typename T, int N>
__device__ __forceinline__ void panels_multiply_across(float (&c)[1][8][4], uint32_t left, uint32_t right) {
  const wgmma_operand a(left, N * PANEL_ROW), b(right, N * PANEL_ROW);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    if (k == 0)
      wgmma<T>::both_across_first(c, a.at(0), b.at(0));
    else
      wgmma<T>::both_across(c, a.at(k * (16 * PANEL_ROW)), b.at(k * (16 * PANEL_ROW)), 1);
  wgmma_commit();
}

/* A warp's 16 rows of packed sums (64, N), into a tile with panels of ROWS rows; `rows` is the first of them. */
template <int N, int ROWS>
__device__ __forceinline__ void panels_store_fragments(uint32_t rows, const uint32_t (&packed)[1][N / 16][4]) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    stmatrix(rows + k / 4 * (ROWS * PANEL_ROW) + (lane & 15) * PANEL_ROW +
                 (((k % 4 * 2 + (lane >> 4)) ^ (lane & 7)) << 4),
             packed[0][k]);
}

#endif
