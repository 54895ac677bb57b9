/* Products with SwiGLU in their epilogues, on Hopper (sm_90a): see matmul_swiglu.h and matmul_tiles.cuh.
 *
 *   forward   the 256 columns of a tile are 128 of gate and the same 128 of up; they go out as they are, and so does
 *             silu(gate) * up, which is made of them in shared memory
 *   backward  256 columns of the gradient of silu(gate) * up, which is never stored: gate and up are read instead, and
 *             their gradients are written, in their place if the caller likes */
#include "kernels/cuda/matmul_swiglu.h"

#include "kernels/cuda/matmul_tiles.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

constexpr uint32_t AHEAD = 5; /* rows of gate and up under way for each finisher, 16 bytes to a lane */
constexpr uint32_t AHEAD_BYTES = FINISHERS * AHEAD * 1024;

template <typename T> struct swiglu_args {
  tile_work work;
  const T *gate_in, *up_in;
  T *gate, *up, *inner;
  uint64_t ld, ld_out;
};

/* Rows half * 64 to half * 64 + 63 of a tile; a warp takes two rows at a time. */
template <typename T>
__device__ __forceinline__ void finish_forward(const swiglu_args<T> &args, uint32_t shared, tile_place at,
                                               uint32_t half, uint32_t finisher) {
  const uint32_t lane = threadIdx.x % 32, column = lane % 16 * GROUP;
  const bool column_valid = at.column + column < args.work.width;
#pragma unroll 2
  for (uint32_t pair = finisher; pair < 32; pair += FINISHERS) {
    const uint32_t within = half * 64 + pair * 2 + lane / 16;
    const uint64_t row = at.row + within;
    float x[GROUP], u[GROUP];
    widen(x, read_tile<T>(shared, within, column));
    widen(u, read_tile<T>(shared, within, 128 + column));
#pragma unroll
    for (uint32_t j = 0; j < GROUP; ++j)
      x[j] = swiglu_value<T>(x[j], u[j]);
    if (row < args.work.rows && column_valid)
      write_rounded(args.inner + row * args.work.width + at.column + column, x);
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    swiglu_forward(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                   const __grid_constant__ CUtensorMap gate, const __grid_constant__ CUtensorMap up,
                   const swiglu_args<T> args) {
  const auto finish = [&](uint32_t shared, tile_place at, uint32_t finisher, uint32_t parity) {
    const bool stores = finisher == 0 && threadIdx.x % 32 == 0;
    for (uint32_t half = 0; half < 2; ++half) {
      half_wait(shared, half, parity);
      if (stores) {
        store_panels(&gate, shared, half, 0, 2, at.row, at.column);
        store_panels(&up, shared, half, 2, 2, at.row, at.column);
      }
      __syncwarp();
      if (args.inner != nullptr)
        finish_forward(args, shared, at, half, finisher);
      if (stores)
        store_wait();
      half_release(shared, half);
    }
  };
  run_tiles<T, true>(args.work, &a, &b, static_cast<const T *>(nullptr), finish);
}

/* A tile's rows, one at a time for each finisher; gate and up come AHEAD rows before they are used, to the lane's own
 * 16 bytes. */
template <typename T>
__device__ __forceinline__ void finish_backward(const swiglu_args<T> &args, uint32_t shared, tile_place at,
                                                uint32_t finisher, uint32_t parity) {
  const uint32_t lane = threadIdx.x % 32, column = at.column + lane * GROUP;
  const uint32_t left = args.work.rows > at.row ? args.work.rows - at.row : 0, rows = left < ROWS ? left : ROWS;
  const bool column_valid = column < args.work.width;
  const uint32_t mine = shared + TILES_BYTES + finisher * (AHEAD * 1024) + lane * 16;
  const auto copy = [&](uint32_t row, uint32_t slot) {
    if (row < rows && column_valid) {
      copy16(mine + slot * 1024, args.gate_in + (uint64_t)(at.row + row) * args.ld + column, 16);
      copy16(mine + slot * 1024 + 512, args.up_in + (uint64_t)(at.row + row) * args.ld + column, 16);
    }
    copies_commit();
  };
  for (uint32_t slot = 0; slot < AHEAD; ++slot)
    copy(finisher + slot * FINISHERS, slot);
  half_wait(shared, 0, parity);
  bool second = false;
  for (uint32_t row = finisher, slot = 0; row < ROWS; row += FINISHERS) {
    if (row >= ROWS / 2 && !second) {
      second = true;
      half_release(shared, 0);
      half_wait(shared, 1, parity);
    }
    copies_wait<AHEAD - 1>();
    if (row < rows && column_valid) {
      float x[GROUP], u[GROUP], d[GROUP];
      widen(x, load_shared<T>(mine + slot * 1024));
      widen(u, load_shared<T>(mine + slot * 1024 + 512));
      widen(d, read_tile<T>(shared, row, lane * GROUP));
#pragma unroll
      for (uint32_t k = 0; k < GROUP; ++k) {
        const swiglu_gradients gradients = swiglu_gradients_of<T>(x[k], u[k], d[k]);
        x[k] = gradients.gate, u[k] = gradients.up, d[k] = gradients.value;
      }
      const uint64_t to = (uint64_t)(at.row + row) * args.ld_out + column;
      write_rounded(args.gate + to, x);
      write_rounded(args.up + to, u);
      if (args.inner != nullptr)
        write_rounded(args.inner + (uint64_t)(at.row + row) * args.work.width + column, d);
    }
    copy(row + AHEAD * FINISHERS, slot);
    slot = slot + 1 == AHEAD ? 0 : slot + 1;
  }
  half_release(shared, 1);
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    swiglu_backward(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                    const swiglu_args<T> args) {
  const auto finish = [&](uint32_t shared, tile_place at, uint32_t finisher, uint32_t parity) {
    finish_backward(args, shared, at, finisher, parity);
  };
  run_tiles<T, false>(args.work, &a, &b, static_cast<const T *>(nullptr), finish);
}

/* ---- host side ---- */

template <typename T> swiglu_args<T> args_of(const flap_cuda_matmul_swiglu *x, uint32_t place_columns) {
  swiglu_args<T> args = {};
  args.work = work_of(x->tokens, x->intermediate, x->hidden, place_columns, x->intermediate);
  args.gate_in = static_cast<const T *>(x->gate_in);
  args.up_in = static_cast<const T *>(x->up_in);
  args.gate = static_cast<T *>(x->gate);
  args.up = static_cast<T *>(x->up);
  args.inner = static_cast<T *>(x->inner);
  args.ld = x->ld;
  args.ld_out = x->ld_out;
  return args;
}

template <typename T>
cudaError_t forward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors, cudaStream_t stream) {
  CUtensorMap a, b, gate, up;
  cudaError_t status = map_matrix(&a, x->dtype, x->a, x->tokens, x->hidden, x->lda, ROWS);
  if (status == cudaSuccess)
    status = map_matrix(&b, x->dtype, x->b, 2ull * x->intermediate, x->hidden, x->ldb, COLUMNS / 2);
  if (status == cudaSuccess)
    status = map_matrix(&gate, x->dtype, x->gate, x->tokens, x->intermediate, x->ld_out, ROWS / 2);
  if (status == cudaSuccess)
    status = map_matrix(&up, x->dtype, x->up, x->tokens, x->intermediate, x->ld_out, ROWS / 2);
  if (status != cudaSuccess)
    return status;
  const swiglu_args<T> args = args_of<T>(x, COLUMNS / 2);
  return launch_tiles(swiglu_forward<T>, args.work, multiprocessors, 0, stream, a, b, gate, up, args);
}

template <typename T>
cudaError_t backward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors, cudaStream_t stream) {
  CUtensorMap a, b;
  cudaError_t status = map_matrix(&a, x->dtype, x->a, x->tokens, x->hidden, x->lda, ROWS);
  if (status == cudaSuccess)
    status = map_matrix(&b, x->dtype, x->b, x->hidden, x->intermediate, x->ldb, DEPTH);
  if (status != cudaSuccess)
    return status;
  const swiglu_args<T> args = args_of<T>(x, COLUMNS);
  return launch_tiles(swiglu_backward<T>, args.work, multiprocessors, AHEAD_BYTES, stream, a, b, args);
}

} // namespace

cudaError_t flap_cuda_matmul_swiglu_forward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors,
                                            cudaStream_t stream) {
  return x->dtype == FLAP_BF16 ? forward<__nv_bfloat16>(x, multiprocessors, stream)
                               : forward<__half>(x, multiprocessors, stream);
}

cudaError_t flap_cuda_matmul_swiglu_backward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors,
                                             cudaStream_t stream) {
  return x->dtype == FLAP_BF16 ? backward<__nv_bfloat16>(x, multiprocessors, stream)
                               : backward<__half>(x, multiprocessors, stream);
}

#endif
