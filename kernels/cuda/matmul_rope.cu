/* Products whose heads are rotated before they are stored, on Hopper (sm_90a): see matmul_rope.h and matmul_tiles.cuh.
 * A tile's 256 columns are whole heads, of 64 or 128. */
#include "kernels/cuda/matmul_rope.h"

#include "kernels/cuda/matmul_tiles.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

template <typename T> struct rope_args {
  tile_work work;
  const T *bias;
  const float *cos_sin;
  T *c;
  uint64_t ldc;
  uint32_t sequence, first_position, rotated; /* columns that are */
};

__device__ __forceinline__ void load_8(float (&out)[GROUP], const float *from) {
  const float4 low = *reinterpret_cast<const float4 *>(from), high = *reinterpret_cast<const float4 *>(from + 4);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

/* Rows half * 64 to half * 64 + 63 of a tile; a warp takes two rows at a time, and a lane 8 columns of the first half
 * of a head with those of the second that they turn with. */
template <typename T, uint32_t HD>
__device__ __forceinline__ void finish_rope(const rope_args<T> &args, uint32_t shared, tile_place at, uint32_t half,
                                            uint32_t finisher) {
  constexpr uint32_t LANES = HD / 2 / GROUP; /* of a head */
  const uint32_t lane = threadIdx.x % 32, pair_column = lane % LANES * GROUP;
  const uint32_t column = lane % 16 / LANES * HD + pair_column;
  const bool column_valid = at.column + column < args.work.width, rotates = at.column + column < args.rotated;
#pragma unroll 2
  for (uint32_t pair = finisher; pair < 32; pair += FINISHERS) {
    const uint32_t within = half * 64 + pair * 2 + lane / 16, row = at.row + within;
    if (row >= args.work.rows || !column_valid)
      continue;
    float x[GROUP], y[GROUP];
    widen(x, read_tile<T>(shared, within, column));
    widen(y, read_tile<T>(shared, within, column + HD / 2));
    if (rotates) {
      const float *table = args.cos_sin + (uint64_t)(args.first_position + row % args.sequence) * HD + pair_column;
      float cosines[GROUP], sines[GROUP];
      load_8(cosines, table);
      load_8(sines, table + HD / 2);
#pragma unroll
      for (uint32_t k = 0; k < GROUP; ++k)
        rope_turn(x[k], y[k], cosines[k], sines[k]);
    }
    T *to = args.c + (uint64_t)row * args.ldc + at.column + column;
    write_rounded(to, x);
    write_rounded(to + HD / 2, y);
  }
}

template <typename T, uint32_t HD>
__global__ void __launch_bounds__(THREADS, 1)
    matmul_rope(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const rope_args<T> args) {
  const auto finish = [&](uint32_t shared, tile_place at, uint32_t finisher, uint32_t parity) {
    for (uint32_t half = 0; half < 2; ++half) {
      half_wait(shared, half, parity);
      finish_rope<T, HD>(args, shared, at, half, finisher);
      half_release(shared, half);
    }
  };
  run_tiles<T, true>(args.work, &a, &b, args.bias, finish);
}

template <typename T>
cudaError_t launch(const flap_cuda_matmul_rope *x, uint32_t multiprocessors, cudaStream_t stream) {
  CUtensorMap a, b;
  cudaError_t status = map_matrix(&a, x->dtype, x->a, x->tokens, x->hidden, x->lda, ROWS);
  if (status == cudaSuccess)
    status = map_matrix(&b, x->dtype, x->b, x->width, x->hidden, x->ldb, COLUMNS / 2);
  if (status != cudaSuccess)
    return status;
  rope_args<T> args = {};
  args.work = work_of(x->tokens, x->width, x->hidden, COLUMNS, COLUMNS / 2);
  args.bias = static_cast<const T *>(x->bias);
  args.cos_sin = x->cos_sin;
  args.c = static_cast<T *>(x->c);
  args.ldc = x->ldc;
  args.sequence = x->sequence;
  args.first_position = x->first_position;
  args.rotated = x->heads * x->head_size;
  return launch_tiles(x->head_size == 64 ? matmul_rope<T, 64> : matmul_rope<T, 128>, args.work, multiprocessors, 0,
                      stream, a, b, args);
}

} // namespace

cudaError_t flap_cuda_matmul_rope_forward(const flap_cuda_matmul_rope *x, uint32_t multiprocessors,
                                          cudaStream_t stream) {
  return x->dtype == FLAP_BF16 ? launch<__nv_bfloat16>(x, multiprocessors, stream)
                               : launch<__half>(x, multiprocessors, stream);
}

#endif
