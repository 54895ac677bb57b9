/* Products by tiles on Hopper (sm_90a), for kernels whose epilogues do more than a library's: see matmul_swiglu.cu.
 *
 * A tile is 128 rows of a times 256 columns. A cluster of two thread blocks has two tiles above each other: each copies
 * its own rows of a, and half of what both multiply with, which arrives in both. In a thread block
 *   one thread        starts the copies (TMA) of what comes next, also of the next tile;
 *   two warpgroups    multiply, 64 rows each (wgmma), and leave their half of the tile, rounded, in shared memory;
 *   three warps       finish it from there: whatever is computed of it and stored, while the next tile is multiplied.
 * So products never wait for what memory bounds, as long as finishing a tile takes less than multiplying one.
 *
 * Stages are handed over by barriers: FULL is raised by the copies' bytes, FREE by the warpgroups of both blocks;
 * halves of the tile by C_FULL, which the multipliers raise, and C_FREE, which the finishers do.
 *
 * Tiles are worked off in bands of BAND pairs of rows, all columns of a band before the next, so that what runs at a
 * time shares rows and columns in the L2 cache. Which cluster computes what depends on the number of multiprocessors,
 * and what it computes does not. K is summed in its order.
 *
 * Arrivals at a barrier of the other block say neither .release nor .cluster: that would be a fence of all memory for
 * each stage, which halves the rate, and what is handed over are only reads that are done. */
#ifndef FLAP_KERNELS_CUDA_MATMUL_TILES_CUH
#define FLAP_KERNELS_CUDA_MATMUL_TILES_CUH

#include "kernels/cuda/barriers.cuh"
#include "kernels/cuda/cuda_elements.cuh"
#include "kernels/cuda/matmul_tiles.h"
#include "kernels/cuda/wgmma.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

constexpr uint32_t ROWS = FLAP_CUDA_TILE_ROWS, COLUMNS = FLAP_CUDA_TILE_COLUMNS;
constexpr uint32_t DEPTH = 64; /* of a stage: a panel */
constexpr uint32_t PAIR = 2;   /* thread blocks of a cluster */
constexpr uint32_t BAND = 8;
constexpr uint32_t STAGES = 3;
constexpr uint32_t MULTIPLIERS = 256, THREADS = MULTIPLIERS + 128;
constexpr uint32_t FINISHERS = 3; /* warps; the fourth copies */
constexpr int MULTIPLIER_REGISTERS = 184, HELPER_REGISTERS = 3 * 168 - 2 * MULTIPLIER_REGISTERS;

/* Shared memory, from a multiple of ALIGNMENT. */
constexpr uint32_t ALIGNMENT = 1024;
constexpr uint32_t A_BYTES = ROWS * PANEL_ROW, B_BYTES = COLUMNS * PANEL_ROW, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr uint32_t C = STAGES * STAGE_BYTES; /* a tile's sums, rounded: panels of ROWS rows */
constexpr uint32_t FULL = C + ROWS * COLUMNS * 2, FREE = FULL + STAGES * BARRIER_BYTES;
constexpr uint32_t C_FULL = FREE + STAGES * BARRIER_BYTES, C_FREE = C_FULL + 2 * BARRIER_BYTES; /* of each half */
constexpr uint32_t TILES_BYTES = (C_FREE + 2 * BARRIER_BYTES + 15) / 16 * 16; /* what follows is the finishers' */

/* What there is to do; sizes in elements. */
struct tile_work {
  uint32_t rows, width;   /* of the output */
  uint32_t steps;         /* of DEPTH, along K */
  uint32_t pairs, places; /* tiles: pairs of them along the rows, and along the columns */
  uint32_t place_columns; /* of the output from one place to the next */
  uint32_t second_rows;   /* b's rows of a tile begin at its first column, and COLUMNS / 2 more so many rows on (NT) */
};

struct tile_place {
  uint32_t row, column; /* the first ones, of this thread block */
};

/* ---- copies by TMA ---- */

/* A box of the map at (column, row) to `to`, whose bytes `barrier` counts; or in both blocks, each at that place and to
 * its own barrier. */
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

__device__ __forceinline__ uint32_t tile_count(const tile_work &work) {
  return work.pairs * work.places;
}

__device__ __forceinline__ tile_place place_tile(const tile_work &work, uint32_t tile, uint32_t rank) {
  const uint32_t band = tile / (BAND * work.places), within = tile - band * (BAND * work.places);
  const uint32_t left = work.pairs - band * BAND, height = left < BAND ? left : BAND;
  const uint32_t pair = band * BAND + within % height, place = within / height;
  return {(pair * PAIR + rank) * ROWS, place * work.place_columns};
}

/* ---- the thread that copies ---- */

/* ALONG: K runs along the rows of b (NT), else across them (NN). */
template <bool ALONG>
__device__ __forceinline__ void copy_tiles(const tile_work &work, const CUtensorMap *a, const CUtensorMap *b,
                                           uint32_t shared, uint32_t rank) {
  uint32_t stage = 0, parity = 1; /* of a new barrier the phase before the first is over */
  for (uint32_t tile = blockIdx.x / PAIR; tile < tile_count(work); tile += gridDim.x / PAIR) {
    const tile_place at = place_tile(work, tile, rank);
    for (uint32_t step = 0; step < work.steps; ++step) {
      const uint32_t full = shared + FULL + stage * BARRIER_BYTES, to = shared + stage * STAGE_BYTES;
      const uint32_t half = to + A_BYTES + rank * (B_BYTES / 2), depth = step * DEPTH;
      barrier_wait(shared + FREE + stage * BARRIER_BYTES, parity);
      barrier_expect(full, STAGE_BYTES);
      copy_box(to, a, depth, at.row, full);
      if (ALONG) {
        copy_box_to_both(half, b, depth, at.column + rank * work.second_rows, full);
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

/* A stage is free once the warpgroup has read it, for the copies of both blocks. One lane says so for the four warps,
 * whose products end together; CUTLASS's pipelines rely on it too. */
__device__ __forceinline__ void give_back(uint32_t shared, uint32_t stage) {
  const uint32_t thread = threadIdx.x % 128;
  if (thread < PAIR)
    barrier_arrive_in(shared + FREE + stage * BARRIER_BYTES, thread);
}

/* Where the warpgroup is in the ring. */
struct ring {
  uint32_t stage, parity;
};

template <typename T, bool ALONG>
__device__ __forceinline__ void multiply_tile(float (&c)[1][COLUMNS / 8][4], ring &r, uint32_t shared, uint32_t steps) {
  uint32_t before = 0;
  wgmma_hold(c);
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t from = shared + r.stage * STAGE_BYTES;
    const wgmma_operand a(from + threadIdx.x / 128 * (64 * PANEL_ROW), 16);
    const wgmma_operand b(from + A_BYTES, ALONG ? 16 : DEPTH * PANEL_ROW);
    barrier_wait(shared + FULL + r.stage * BARRIER_BYTES, r.parity);
    wgmma_begin();
#pragma unroll
    for (uint32_t k = 0; k < DEPTH / 16; ++k)
      if (ALONG)
        wgmma<T>::shared(c, a.at(k * 32), b.at(k * 32), step + k > 0);
      else
        wgmma<T>::right_across(c, a.at(k * 32), b.at(k * (16 * PANEL_ROW)), step + k > 0);
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
  wgmma_hold(c);
  give_back(shared, before);
}

/* A bias is added before the only rounding. */
template <typename T>
__device__ __forceinline__ void add_bias(float (&c)[1][COLUMNS / 8][4], const T *bias, uint32_t width) {
#pragma unroll
  for (uint32_t n = 0; n < COLUMNS / 8; ++n) {
    const uint32_t column = n * 8 + threadIdx.x % 4 * 2;
    if (column >= width)
      continue;
    const float2 pair = tensor_element<T>::unpack(*reinterpret_cast<const uint32_t *>(bias + column));
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      c[0][n][i] += i % 2 == 0 ? pair.x : pair.y;
  }
}

/* The warpgroup's half of the tile goes to shared memory, for those who finish it. */
template <typename T>
__device__ __forceinline__ void hand_over(const float (&c)[1][COLUMNS / 8][4], uint32_t shared, uint32_t parity) {
  const uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const uint32_t row = shared + C + (threadIdx.x / 32 * 16 + (lane & 15)) * PANEL_ROW;
  barrier_wait(shared + C_FREE + group * BARRIER_BYTES, parity);
#pragma unroll
  for (uint32_t k = 0; k < COLUMNS / 16; ++k) {
    uint32_t w[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      w[i] = tensor_element<T>::pack(c[0][2 * k + i / 2][i % 2 * 2], c[0][2 * k + i / 2][i % 2 * 2 + 1]);
    stmatrix(row + k / 4 * (ROWS * PANEL_ROW) + (((k % 4 * 2 + (lane >> 4)) ^ (lane & 7)) << 4), w);
  }
  shared_writes_to_wgmma(); /* or to copies: both are the asynchronous proxy */
  barrier_arrive_warp(shared + C_FULL + group * BARRIER_BYTES);
}

/* ---- what warps that finish tiles use ---- */

/* 8 neighbours of a row of the rounded tile. */
template <typename T>
__device__ __forceinline__ raw_group<T> read_tile(uint32_t shared, uint32_t row, uint32_t column) {
  return load_shared<T>(shared + C + column / 64 * (ROWS * PANEL_ROW) + row * PANEL_ROW +
                    ((column / 8 % 8 ^ row % 8) << 4));
}

/* 16 bytes at once: left to the compiler, these stores come in pieces of 4 bytes, four times as many. */
template <typename T> __device__ __forceinline__ void write_rounded(T *to, const float (&x)[GROUP]) {
  uint32_t w[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i)
    w[i] = tensor_element<T>::pack(x[2 * i], x[2 * i + 1]);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}

/* A half of a tile is theirs from wait to release; `parity` changes from tile to tile. */
__device__ __forceinline__ void half_wait(uint32_t shared, uint32_t half, uint32_t parity) {
  barrier_wait(shared + C_FULL + half * BARRIER_BYTES, parity);
}
__device__ __forceinline__ void half_release(uint32_t shared, uint32_t half) {
  barrier_arrive_warp(shared + C_FREE + half * BARRIER_BYTES);
}

/* Panels `first` to first + count - 1 of a half go out as they are, to columns `column` on of the map, if one thread
 * asks for it; the half is not to be released before store_wait. */
__device__ __forceinline__ void store_panels(const CUtensorMap *map, uint32_t shared, uint32_t half, uint32_t first,
                                             uint32_t count, uint32_t row, uint32_t column) {
  for (uint32_t panel = 0; panel < count; ++panel)
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(map),
                 "r"(column + panel * 64), "r"(row + half * (ROWS / 2)),
                 "r"(shared + C + (first + panel) * (ROWS * PANEL_ROW) + half * (ROWS / 2 * PANEL_ROW))
                 : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void store_wait() { /* until they are read */
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}
__device__ __forceinline__ void store_end() { /* until they are written */
  asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

/* ---- all of it ---- */

/* The body of a kernel. `finish` (shared, place, finisher, parity) is called by each of the finishers for each tile. */
template <typename T, bool ALONG, typename FINISH>
__device__ __forceinline__ void run_tiles(const tile_work &work, const CUtensorMap *a, const CUtensorMap *b,
                                          const T *bias, const FINISH &finish) {
  extern __shared__ unsigned char dynamic[];
  const uint32_t shared = (shared_address(dynamic) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
  const uint32_t rank = cluster_rank(), warp = threadIdx.x / 32;
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
    uint32_t parity = 0;
    if (helper < FINISHERS) {
      for (uint32_t tile = blockIdx.x / PAIR; tile < tile_count(work); tile += gridDim.x / PAIR, parity ^= 1)
        finish(shared, place_tile(work, tile, rank), helper, parity);
      store_end();
    } else if (threadIdx.x % 32 == 0) {
      copy_tiles<ALONG>(work, a, b, shared, rank);
    }
    __syncwarp();
  } else {
    registers_take<MULTIPLIER_REGISTERS>();
    float c[1][COLUMNS / 8][4];
    ring r = {0, 0};
    uint32_t parity = 1;
    for (uint32_t tile = blockIdx.x / PAIR; tile < tile_count(work); tile += gridDim.x / PAIR, parity ^= 1) {
      multiply_tile<T, ALONG>(c, r, shared, work.steps);
      if (bias != nullptr) {
        const tile_place at = place_tile(work, tile, rank);
        add_bias(c, bias + at.column, work.width - at.column);
      }
      hand_over<T>(c, shared, parity);
    }
  }
  cluster_meet(); /* what one block of a pair copies or frees is the other's too */
}

/* ---- host side ---- */

using encode_function = decltype(&cuTensorMapEncodeTiled);

/* NULL: the driver has none. Looked for once. */
inline encode_function find_encode() {
  static const encode_function found = [] {
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<encode_function>(entry)
                                                                          : nullptr;
  }();
  return found;
}

/* A matrix of 16-bit elements, rows by columns, in boxes of box_rows by 64 columns: a panel, with its swizzle. What
 * lies beyond comes as zeros. */
inline cudaError_t map_matrix(CUtensorMap *map_out, flap_dtype dtype, const void *matrix, uint64_t rows,
                              uint64_t columns, uint64_t ld, uint32_t box_rows) {
  const encode_function encode = find_encode();
  if (encode == nullptr)
    return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {ld * 2};
  const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
  const CUresult result =
      encode(map_out, dtype == FLAP_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void *>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline tile_work work_of(uint32_t rows, uint32_t width, uint32_t k, uint32_t place_columns, uint32_t second_rows) {
  tile_work work = {};
  work.rows = rows;
  work.width = width;
  work.steps = static_cast<uint32_t>(cuda_ceil(k, DEPTH));
  work.pairs = static_cast<uint32_t>(cuda_ceil(rows, PAIR * ROWS));
  work.places = static_cast<uint32_t>(cuda_ceil(width, place_columns));
  work.place_columns = place_columns;
  work.second_rows = second_rows;
  return work;
}

/* `extra_bytes` of shared memory for those that finish. */
template <typename... PARAMETERS, typename... ARGUMENTS>
cudaError_t launch_tiles(void (*kernel)(PARAMETERS...), const tile_work &work, uint32_t multiprocessors,
                         uint32_t extra_bytes, cudaStream_t stream, const ARGUMENTS &...arguments) {
  const uint32_t bytes = TILES_BYTES + extra_bytes + ALIGNMENT;
  const uint32_t tiles = work.pairs * work.places, clusters = multiprocessors / PAIR;
  flap_assert(clusters > 0);
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess)
    return status;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = PAIR;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(PAIR * (tiles < clusters ? tiles : clusters));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#endif
