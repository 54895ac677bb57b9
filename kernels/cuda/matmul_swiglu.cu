/* Products with SwiGLU in their epilogues, on Hopper (sm_90a): see matmul_swiglu.h.
 *
 * A tile is 128 rows of a (tokens) times 256 columns. A cluster of two thread blocks has two tiles above each other:
 * each copies its own rows of a, and half of what both multiply with, which arrives in both. In a thread block one
 * thread starts the copies (TMA) of what comes next, also of the next tile, and two warpgroups multiply 64 rows each.
 * Stages are handed over by barriers: `full` is raised by the copies' bytes, `free` by the warpgroups of both blocks.
 *
 *   forward   256 columns are 128 of gate and the same 128 of up, so one thread has both of an element, and
 *             silu(gate) * up is made of registers
 *   backward  256 columns of the gradient of silu(gate) * up, which is never stored: gate and up are read instead, and
 *             their gradients are written in their place
 *
 * The fragments of a row are spread over the four lanes of a quad, two elements each; four blocks of 8 columns are
 * transposed in the quad, so that a lane has 8 neighbours: 16 bytes to load or store.
 *
 * Tiles are worked off in bands of BAND pairs of rows, all columns of a band before the next, so that what runs at a
 * time shares rows and columns in the L2 cache. Which cluster computes what depends on the number of multiprocessors,
 * and what it computes does not. */
#include "kernels/cuda/matmul_swiglu.h"

#include "kernels/cuda/attention_barriers.cuh"
#include "kernels/cuda/attention_wgmma.cuh"
#include "kernels/cuda/cuda_elements.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

constexpr uint32_t ROWS = FLAP_CUDA_MATMUL_SWIGLU_ROWS, COLUMNS = FLAP_CUDA_MATMUL_SWIGLU_COLUMNS;
constexpr uint32_t DEPTH = 64; /* of a stage: a panel */
constexpr uint32_t PAIR = 2;   /* thread blocks of a cluster */
constexpr uint32_t BAND = 8;
constexpr uint32_t STAGES = 3;
constexpr uint32_t MULTIPLIERS = 256, THREADS = MULTIPLIERS + 128;
constexpr uint32_t FINISHERS = 3; /* warps; the fourth copies */
constexpr int MULTIPLIER_REGISTERS = 184, HELPER_REGISTERS = 3 * 168 - 2 * MULTIPLIER_REGISTERS;
constexpr uint32_t ALIGNMENT = 1024;
constexpr uint32_t A_BYTES = ROWS * PANEL_ROW, B_BYTES = COLUMNS * PANEL_ROW, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr uint32_t C = STAGES * STAGE_BYTES; /* a tile's sums, rounded: panels of ROWS rows */
constexpr uint32_t FULL = C + ROWS * COLUMNS * 2, FREE = FULL + STAGES * BARRIER_BYTES;
constexpr uint32_t C_FULL = FREE + STAGES * BARRIER_BYTES, C_FREE = C_FULL + 2 * BARRIER_BYTES; /* of each half */
constexpr uint32_t AHEAD = 5; /* rows of gate and up under way for each finisher, 16 bytes to a lane */
constexpr uint32_t GATE_UP = (C_FREE + 2 * BARRIER_BYTES + 15) / 16 * 16;
constexpr uint32_t SHARED_BYTES = GATE_UP + FINISHERS * AHEAD * 2 * 32 * 16 + ALIGNMENT;

template <typename T> struct swiglu_args {
  const T *gate_in, *up_in;
  T *gate, *up, *inner;
  uint64_t ld, ld_out;
  uint32_t tokens, intermediate, steps; /* steps of DEPTH */
  uint32_t pairs, columns;              /* tiles: pairs of rows, and columns */
};

/* ---- clusters, and copies by TMA ---- */

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

/* The same barrier in thread block `rank` of the cluster. */
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 there;\n"
               "mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
               "r"(rank)
               : "memory");
}

/* One arrival, and so many bytes to come by copies. */
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

/* A box of the map at (column, row) to `to`, in every thread block of `blocks` (bits) and to its barrier there. */
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t column, uint32_t row,
                                         uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
               "[%4];\n" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void copy_box_to_both(uint32_t to, const CUtensorMap *map, uint32_t column, uint32_t row,
                                                 uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%2, %3}], [%4], %5;\n" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3))
               : "memory");
}

/* ---- which tile ---- */

struct tile_place {
  uint32_t row, column; /* the first ones; row of this thread block, column of gate and up */
};

template <bool FORWARD, typename T>
__device__ __forceinline__ tile_place place_tile(const swiglu_args<T> &args, uint32_t tile, uint32_t rank) {
  const uint32_t band = tile / (BAND * args.columns), within = tile - band * (BAND * args.columns);
  const uint32_t left = args.pairs - band * BAND, height = left < BAND ? left : BAND;
  const uint32_t pair = band * BAND + within % height, column = within / height;
  return {(pair * PAIR + rank) * ROWS, column * (FORWARD ? COLUMNS / 2 : COLUMNS)};
}

/* ---- the thread that copies ---- */

template <bool FORWARD, typename T>
__device__ __forceinline__ void copy_tiles(const swiglu_args<T> &args, const CUtensorMap *a, const CUtensorMap *b,
                                           uint32_t shared, uint32_t rank, uint32_t tiles) {
  uint32_t stage = 0, parity = 1; /* of a new barrier the phase before the first is over */
  for (uint32_t tile = blockIdx.x / PAIR; tile < tiles; tile += gridDim.x / PAIR) {
    const tile_place at = place_tile<FORWARD>(args, tile, rank);
    for (uint32_t step = 0; step < args.steps; ++step) {
      const uint32_t full = shared + FULL + stage * BARRIER_BYTES, to = shared + stage * STAGE_BYTES;
      const uint32_t half = to + A_BYTES + rank * (B_BYTES / 2), depth = step * DEPTH;
      barrier_wait(shared + FREE + stage * BARRIER_BYTES, parity);
      barrier_expect(full, STAGE_BYTES);
      copy_box(to, a, depth, at.row, full);
      if (FORWARD) { /* the first block copies gate's rows, the second up's */
        copy_box_to_both(half, b, depth, rank * args.intermediate + at.column, full);
      } else { /* four panels of 64 columns */
        const uint32_t column = at.column + rank * (COLUMNS / 2);
        copy_box_to_both(half, b, column, depth, full);
        copy_box_to_both(half + DEPTH * PANEL_ROW, b, column + 64, depth, full);
      }
      if (++stage == STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

/* ---- the warpgroups that multiply ---- */

#define SUMS_4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_16(n) SUMS_4(n), SUMS_4(n + 1), SUMS_4(n + 2), SUMS_4(n + 3)
#define SUMS_128 SUMS_16(0), SUMS_16(4), SUMS_16(8), SUMS_16(12), SUMS_16(16), SUMS_16(20), SUMS_16(24), SUMS_16(28)
#define PLACES_128                                                                                       \
  ATTENTION_P64 ", "                                                                                     \
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "       \
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
                "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
                "%125, %126, %127"
#define PRODUCT_256(TYPE, ACROSS)                                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                     \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" PLACES_128 "}, %128, %129, p, " \
               "1, 1, 0, " ACROSS ";\n}\n"                                                                       \
               : SUMS_128                                                                                        \
               : "l"(a), "l"(b), "r"(adds))

/* c (64, 256) = or += a · b; K of b runs along its rows (NT) or across them (NN). */
template <typename T, bool ALONG>
__device__ __forceinline__ void multiply_256(float (&c)[COLUMNS / 8][4], uint64_t a, uint64_t b, int adds);
template <>
__device__ __forceinline__ void multiply_256<__nv_bfloat16, true>(float (&c)[COLUMNS / 8][4], uint64_t a, uint64_t b,
                                                                  int adds) {
  PRODUCT_256("bf16", "0");
}
template <>
__device__ __forceinline__ void multiply_256<__nv_bfloat16, false>(float (&c)[COLUMNS / 8][4], uint64_t a, uint64_t b,
                                                                   int adds) {
  PRODUCT_256("bf16", "1");
}
template <>
__device__ __forceinline__ void multiply_256<__half, true>(float (&c)[COLUMNS / 8][4], uint64_t a, uint64_t b,
                                                           int adds) {
  PRODUCT_256("f16", "0");
}
template <>
__device__ __forceinline__ void multiply_256<__half, false>(float (&c)[COLUMNS / 8][4], uint64_t a, uint64_t b,
                                                            int adds) {
  PRODUCT_256("f16", "1");
}

__device__ __forceinline__ void hold_sums(float (&c)[COLUMNS / 8][4]) {
#pragma unroll
  for (uint32_t n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile("" : "+f"(c[n][i])::"memory");
}

/* A stage is free once the warpgroup has read it, for the copies of both blocks. */
__device__ __forceinline__ void give_back(uint32_t shared, uint32_t stage) {
  const uint32_t thread = threadIdx.x % 128;
  if (thread < PAIR)
    barrier_arrive_in(shared + FREE + stage * BARRIER_BYTES, thread);
}

/* Where the warpgroup is in the ring. */
struct ring {
  uint32_t stage, parity;
};

template <typename T, bool FORWARD>
__device__ __forceinline__ void multiply_tile(float (&c)[COLUMNS / 8][4], ring &r, uint32_t shared, uint32_t steps) {
  uint32_t before = 0;
  hold_sums(c);
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t from = shared + r.stage * STAGE_BYTES;
    const wgmma_operand a(from + threadIdx.x / 128 * (64 * PANEL_ROW), 16);
    const wgmma_operand b(from + A_BYTES, FORWARD ? 16 : DEPTH * PANEL_ROW);
    barrier_wait(shared + FULL + r.stage * BARRIER_BYTES, r.parity);
    wgmma_begin();
#pragma unroll
    for (uint32_t k = 0; k < DEPTH / 16; ++k)
      multiply_256<T, FORWARD>(c, a.at(k * 32), b.at(k * (FORWARD ? 32 : 16 * PANEL_ROW)), step + k > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0)
      give_back(shared, before);
    before = r.stage;
    if (++r.stage == STAGES) {
      r.stage = 0;
      r.parity ^= 1;
    }
  }
  wgmma_wait<0>();
  hold_sums(c);
  give_back(shared, before);
}

/* The warpgroup's half of the tile goes to shared memory, for those who finish it. */
template <typename T>
__device__ __forceinline__ void hand_over(const float (&c)[COLUMNS / 8][4], uint32_t shared, uint32_t parity) {
  const uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const uint32_t row = shared + C + (threadIdx.x / 32 * 16 + (lane & 15)) * PANEL_ROW;
  barrier_wait(shared + C_FREE + group * BARRIER_BYTES, parity);
#pragma unroll
  for (uint32_t k = 0; k < COLUMNS / 16; ++k) {
    uint32_t w[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      w[i] = attention_element<T>::pack(c[2 * k + i / 2][i % 2 * 2], c[2 * k + i / 2][i % 2 * 2 + 1]);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     row + k / 4 * (ROWS * PANEL_ROW) + (((k % 4 * 2 + (lane >> 4)) ^ (lane & 7)) << 4)),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  }
  shared_writes_to_wgmma(); /* or to copies: both are the asynchronous proxy */
  barrier_arrive_warp(shared + C_FULL + group * BARRIER_BYTES);
}

/* ---- the warpgroup that finishes tiles ---- */

template <typename T> __device__ __forceinline__ raw_group<T> read_16(uint32_t from) {
  raw_group<T> raw;
  uint4 w;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(from));
  *reinterpret_cast<uint4 *>(raw.elements) = w;
  return raw;
}

/* 8 neighbours of a row of the rounded tile. */
template <typename T>
__device__ __forceinline__ raw_group<T> read_tile(uint32_t shared, uint32_t row, uint32_t column) {
  return read_16<T>(shared + C + column / 64 * (ROWS * PANEL_ROW) + row * PANEL_ROW +
                    ((column / 8 % 8 ^ row % 8) << 4));
}

/* 16 bytes at once: left to the compiler, these stores come in pieces of 4 bytes, four times as many. */
template <typename T> __device__ __forceinline__ void write_rounded(T *to, const float (&x)[GROUP]) {
  uint32_t w[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i)
    w[i] = attention_element<T>::pack(x[2 * i], x[2 * i + 1]);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}

/* A half's gate and up go out as they are, each panel by a copy. */
__device__ __forceinline__ void store_half(const CUtensorMap *gate, const CUtensorMap *up, uint32_t shared,
                                           tile_place at, uint32_t half) {
#pragma unroll
  for (uint32_t panel = 0; panel < COLUMNS / 64; ++panel)
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(panel < 2 ? gate : up),
        "r"(at.column + panel % 2 * 64), "r"(at.row + half * 64),
        "r"(shared + C + panel * (ROWS * PANEL_ROW) + half * (64 * PANEL_ROW))
        : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

/* Rows half * 64 to half * 64 + 63 of a tile; a warp takes two rows at a time. */
template <typename T>
__device__ __forceinline__ void finish_forward(const swiglu_args<T> &args, uint32_t shared, tile_place at,
                                               uint32_t half, uint32_t finisher) {
  const uint32_t lane = threadIdx.x % 32, column = lane % 16 * GROUP;
  const bool column_valid = at.column + column < args.intermediate;
#pragma unroll 2
  for (uint32_t pair = finisher; pair < 32; pair += FINISHERS) {
    const uint32_t within = half * 64 + pair * 2 + lane / 16;
    const uint64_t row = at.row + within;
    float x[GROUP], u[GROUP];
    widen(x, read_tile<T>(shared, within, column));
    widen(u, read_tile<T>(shared, within, 128 + column));
#pragma unroll
    for (uint32_t j = 0; j < GROUP; ++j)
      x[j] = rounded<T>(x[j] * reciprocal<T>(1.0f + exponential<T>(-x[j]))) * u[j];
    if (row < args.tokens && column_valid)
      write_rounded(args.inner + row * args.intermediate + at.column + column, x);
  }
}

/* A tile's rows, one at a time for each finisher; gate and up come AHEAD rows before they are used, to the lane's own
 * 16 bytes. */
template <typename T>
__device__ __forceinline__ void finish_backward(const swiglu_args<T> &args, uint32_t shared, tile_place at,
                                                uint32_t finisher, uint32_t parity) {
  const uint32_t lane = threadIdx.x % 32, column = at.column + lane * GROUP;
  const uint32_t left = args.tokens > at.row ? args.tokens - at.row : 0, rows = left < ROWS ? left : ROWS;
  const bool column_valid = column < args.intermediate;
  const uint32_t mine = shared + GATE_UP + finisher * (AHEAD * 1024) + lane * 16;
  const auto copy = [&](uint32_t row, uint32_t slot) {
    if (row < rows && column_valid) {
      attention_copy16(mine + slot * 1024, args.gate_in + (uint64_t)(at.row + row) * args.ld + column, 16);
      attention_copy16(mine + slot * 1024 + 512, args.up_in + (uint64_t)(at.row + row) * args.ld + column, 16);
    }
    attention_commit();
  };
  for (uint32_t slot = 0; slot < AHEAD; ++slot)
    copy(finisher + slot * FINISHERS, slot);
  barrier_wait(shared + C_FULL, parity);
  bool second = false;
  for (uint32_t row = finisher, slot = 0; row < ROWS; row += FINISHERS) {
    if (row >= ROWS / 2 && !second) {
      second = true;
      barrier_arrive_warp(shared + C_FREE);
      barrier_wait(shared + C_FULL + BARRIER_BYTES, parity);
    }
    attention_wait<AHEAD - 1>();
    if (row < rows && column_valid) {
      float x[GROUP], u[GROUP], d[GROUP];
      widen(x, read_16<T>(mine + slot * 1024));
      widen(u, read_16<T>(mine + slot * 1024 + 512));
      widen(d, read_tile<T>(shared, row, lane * GROUP));
#pragma unroll
      for (uint32_t k = 0; k < GROUP; ++k) {
        const float sigmoid = reciprocal<T>(1.0f + exponential<T>(-x[k])), silu = x[k] * sigmoid;
        const float dgate = d[k] * u[k] * (sigmoid * (1.0f + x[k] * (1.0f - sigmoid)));
        const float dup = d[k] * rounded<T>(silu);
        d[k] = rounded<T>(silu) * u[k];
        u[k] = dup;
        x[k] = dgate;
      }
      const uint64_t to = (uint64_t)(at.row + row) * args.ld_out + column;
      write_rounded(args.gate + to, x);
      write_rounded(args.up + to, u);
      if (args.inner != nullptr)
        write_rounded(args.inner + (uint64_t)(at.row + row) * args.intermediate + column, d);
    }
    copy(row + AHEAD * FINISHERS, slot);
    slot = slot + 1 == AHEAD ? 0 : slot + 1;
  }
  barrier_arrive_warp(shared + C_FREE + BARRIER_BYTES);
}

template <bool FORWARD, typename T>
__device__ __forceinline__ void finish_tiles(const swiglu_args<T> &args, const CUtensorMap *gate, const CUtensorMap *up,
                                             uint32_t shared, uint32_t rank, uint32_t tiles, uint32_t finisher) {
  uint32_t parity = 0;
  for (uint32_t tile = blockIdx.x / PAIR; tile < tiles; tile += gridDim.x / PAIR, parity ^= 1) {
    const tile_place at = place_tile<FORWARD>(args, tile, rank);
    if (!FORWARD) {
      finish_backward(args, shared, at, finisher, parity);
      continue;
    }
    const bool stores = finisher == 0 && threadIdx.x % 32 == 0;
    for (uint32_t half = 0; half < 2; ++half) {
      barrier_wait(shared + C_FULL + half * BARRIER_BYTES, parity);
      if (stores)
        store_half(gate, up, shared, at, half);
      __syncwarp();
      finish_forward(args, shared, at, half, finisher);
      if (stores)
        asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
      barrier_arrive_warp(shared + C_FREE + half * BARRIER_BYTES);
    }
  }
  if (FORWARD)
    asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

template <typename T, bool FORWARD>
__global__ void __launch_bounds__(THREADS, 1)
    matmul_swiglu_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                         const __grid_constant__ CUtensorMap gate, const __grid_constant__ CUtensorMap up,
                         const swiglu_args<T> args) {
  extern __shared__ unsigned char dynamic[];
  const uint32_t shared = (attention_shared_address(dynamic) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
  const uint32_t rank = cluster_rank(), tiles = args.pairs * args.columns, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < STAGES; ++i) {
      barrier_open(shared + FULL + i * BARRIER_BYTES, 1);
      barrier_open(shared + FREE + i * BARRIER_BYTES, 2 * PAIR);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      barrier_open(shared + C_FULL + i * BARRIER_BYTES, 4 * WARP_ARRIVALS);
      barrier_open(shared + C_FREE + i * BARRIER_BYTES, FINISHERS * WARP_ARRIVALS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  cluster_meet();
  if (threadIdx.x >= MULTIPLIERS) {
    registers_give_up<HELPER_REGISTERS>();
    const uint32_t helper = warp - MULTIPLIERS / 32;
    if (helper < FINISHERS)
      finish_tiles<FORWARD>(args, &gate, &up, shared, rank, tiles, helper);
    else if (threadIdx.x % 32 == 0)
      copy_tiles<FORWARD>(args, &a, &b, shared, rank, tiles);
    __syncwarp();
  } else {
    registers_take<MULTIPLIER_REGISTERS>();
    float c[COLUMNS / 8][4];
    ring r = {0, 0};
    uint32_t parity = 1;
    for (uint32_t tile = blockIdx.x / PAIR; tile < tiles; tile += gridDim.x / PAIR, parity ^= 1) {
      multiply_tile<T, FORWARD>(c, r, shared, args.steps);
      hand_over<T>(c, shared, parity);
    }
  }
  cluster_meet(); /* what one block of a pair copies or frees is the other's too */
}

/* ---- host side ---- */

using encode_function = decltype(&cuTensorMapEncodeTiled);

cudaError_t find_encode(encode_function *encode_out) {
  void *found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess)
    return status;
  *encode_out = reinterpret_cast<encode_function>(found);
  return result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
}

/* A matrix of 16-bit elements, rows by columns, in boxes of box_rows by 64 columns: a panel, with its swizzle. What
 * lies beyond comes as zeros. */
cudaError_t map_matrix(encode_function encode, CUtensorMap *map_out, flap_dtype dtype, const void *matrix,
                       uint64_t rows, uint64_t columns, uint64_t ld, uint32_t box_rows) {
  const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {ld * 2};
  const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
  const CUresult result =
      encode(map_out, dtype == FLAP_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void *>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

template <typename T, bool FORWARD>
cudaError_t launch(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors, cudaStream_t stream) {
  encode_function encode;
  CUtensorMap a, b, gate = {}, up = {};
  cudaError_t status = find_encode(&encode);
  if (status == cudaSuccess)
    status = map_matrix(encode, &a, x->dtype, x->a, x->tokens, x->hidden, x->lda, ROWS);
  if (status == cudaSuccess)
    status = FORWARD ? map_matrix(encode, &b, x->dtype, x->b, 2ull * x->intermediate, x->hidden, x->ldb, COLUMNS / 2)
                     : map_matrix(encode, &b, x->dtype, x->b, x->hidden, x->intermediate, x->ldb, DEPTH);
  if (FORWARD && status == cudaSuccess)
    status = map_matrix(encode, &gate, x->dtype, x->gate, x->tokens, x->intermediate, x->ld_out, 64);
  if (FORWARD && status == cudaSuccess)
    status = map_matrix(encode, &up, x->dtype, x->up, x->tokens, x->intermediate, x->ld_out, 64);
  if (status != cudaSuccess)
    return status;
  swiglu_args<T> args = {};
  args.gate_in = static_cast<const T *>(x->gate_in);
  args.up_in = static_cast<const T *>(x->up_in);
  args.gate = static_cast<T *>(x->gate);
  args.up = static_cast<T *>(x->up);
  args.inner = static_cast<T *>(x->inner);
  args.ld = x->ld;
  args.ld_out = x->ld_out;
  args.tokens = x->tokens;
  args.intermediate = x->intermediate;
  args.steps = ceil_div(x->hidden, DEPTH);
  args.pairs = ceil_div(x->tokens, PAIR * ROWS);
  args.columns = ceil_div(x->intermediate, FORWARD ? COLUMNS / 2 : COLUMNS);
  const uint32_t tiles = args.pairs * args.columns, clusters = multiprocessors / PAIR;
  const auto kernel = matmul_swiglu_kernel<T, FORWARD>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (status != cudaSuccess)
    return status;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = PAIR;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(PAIR * (tiles < clusters ? tiles : clusters));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = SHARED_BYTES;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, a, b, gate, up, args);
}

} // namespace

cudaError_t flap_cuda_matmul_swiglu_forward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors,
                                            cudaStream_t stream) {
  return x->dtype == FLAP_BF16 ? launch<__nv_bfloat16, true>(x, multiprocessors, stream)
                               : launch<__half, true>(x, multiprocessors, stream);
}

cudaError_t flap_cuda_matmul_swiglu_backward(const flap_cuda_matmul_swiglu *x, uint32_t multiprocessors,
                                             cudaStream_t stream) {
  return x->dtype == FLAP_BF16 ? launch<__nv_bfloat16, false>(x, multiprocessors, stream)
                               : launch<__half, false>(x, multiprocessors, stream);
}

#endif
