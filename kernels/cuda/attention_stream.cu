/* The forward on Hopper (sm_90a) by thread blocks that stay: while two warpgroups multiply, other warps copy what comes
 * next, of the same block of queries or of the one after it.
 *
 * A block of work is 128 queries of one head, 64 for each of two warpgroups. The scores of a tile of keys are computed
 * while the tile before is multiplied with its values. The warpgroups meet only at the barriers of tiles, so one
 * multiplies while the other computes exponentials; and between two blocks of work nobody waits for queries and first
 * keys. Two warps copy queries and keys and two values: each tile's barrier is raised by the copies themselves, so a
 * warp has as many tiles under way as there are stages.
 *
 * Which thread block computes what depends on the number of multiprocessors, and what it computes does not. */
#include "kernels/cuda/barriers.cuh"
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/attention_wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

constexpr int QUERIES = 128, KEYS = 128;
constexpr int MULTIPLIERS = 256, THREADS = MULTIPLIERS + 128;
constexpr int MULTIPLIER_REGISTERS = 224, HELPER_REGISTERS = 3 * 168 - 2 * MULTIPLIER_REGISTERS;
constexpr uint32_t ALIGNMENT = 1024, MULTIPLIER_WARPS = MULTIPLIERS / 32;
constexpr uint32_t COPIERS = 2; /* warps to a tile */
template <int HD> constexpr uint32_t STAGES = HD == 64 ? 4 : 2;

/* Shared memory, from a multiple of ALIGNMENT. */
template <int HD> struct stream_layout {
  static constexpr uint32_t TILE = KEYS * HD * 2; /* panels of 128 rows */
  static constexpr uint32_t Q = 0, K = TILE, V = K + STAGES<HD> * TILE;
  static constexpr uint32_t OUT = V + STAGES<HD> * TILE; /* results, on their way to rows */
  static constexpr uint32_t Q_READY = OUT + QUERIES * attention_row_bytes<HD>, Q_FREE = Q_READY + BARRIER_BYTES;
  static constexpr uint32_t K_READY = Q_FREE + BARRIER_BYTES, K_FREE = K_READY + STAGES<HD> * BARRIER_BYTES;
  static constexpr uint32_t V_READY = K_FREE + STAGES<HD> * BARRIER_BYTES,
                            V_FREE = V_READY + STAGES<HD> * BARRIER_BYTES;
  static constexpr uint32_t BYTES = V_FREE + STAGES<HD> * BARRIER_BYTES + ALIGNMENT;
};

template <int HD> __device__ __forceinline__ void open_barriers(uint32_t shared) {
  using at = stream_layout<HD>;
  barrier_open(shared + at::Q_READY, COPIERS * 32);
  barrier_open(shared + at::Q_FREE, MULTIPLIER_WARPS * WARP_ARRIVALS);
  for (uint32_t i = 0; i < STAGES<HD>; ++i) {
    barrier_open(shared + at::K_READY + i * BARRIER_BYTES, COPIERS * 32);
    barrier_open(shared + at::V_READY + i * BARRIER_BYTES, COPIERS * 32);
    barrier_open(shared + at::K_FREE + i * BARRIER_BYTES, MULTIPLIER_WARPS * WARP_ARRIVALS);
    barrier_open(shared + at::V_FREE + i * BARRIER_BYTES, MULTIPLIER_WARPS * WARP_ARRIVALS);
  }
}

/* The next block of work of this thread block, of which it had `count`; false: there is none. With two parts an item is
 * the j-th block of queries of a head from either end, so all items are as long, and in rounds of the grid all thread
 * blocks have as much to do. */
__device__ __forceinline__ bool next_work(const attention_args &args, uint32_t *count, attention_query_block *block) {
  const uint32_t pairs = args.batch * args.heads, tiles = (args.queries + QUERIES - 1) / QUERIES;
  const uint32_t items = (tiles + args.parts - 1) / args.parts; /* of a head */
  for (;;) {
    const uint32_t item = *count / args.parts * gridDim.x + blockIdx.x, end = *count % args.parts;
    if (item >= pairs * items)
      return false;
    ++*count;
    const uint32_t rank = item % items;
    if (end != 0 && tiles - 1 - rank == rank) /* the middle one of an odd number */
      continue;
    *block = attention_query_block_at<QUERIES>(args, {item / items, end == 0 ? rank : tiles - 1 - rank}, tiles);
    return true;
  }
}

/* ---- the warps that copy ---- */

/* A warp's part of a tile of 128 rows; the lanes' copies raise the barrier once they are over. */
template <int HD>
__device__ __forceinline__ void load_tile(uint32_t tile, const uint16_t *from, uint32_t valid, uint64_t stride,
                                          uint32_t head_size, uint32_t copier, uint32_t ready) {
  constexpr uint32_t CHUNKS = HD / 8, STEP = 32 / CHUNKS;
  const uint32_t lane = threadIdx.x & 31, chunk = lane % CHUNKS;
  const uint32_t row = copier * (KEYS / COPIERS) + lane / CHUNKS;
  const bool column_valid = chunk * 8 < head_size;
  const uint16_t *source = from + row * stride + chunk * 8;
  const uint32_t to = tile + (chunk >> 3) * (KEYS * PANEL_ROW) + row * PANEL_ROW;
#pragma unroll 8
  for (uint32_t i = 0; i < KEYS / COPIERS / STEP; ++i) {
    const bool copied = column_valid && row + i * STEP < valid;
    copy16(to + i * (STEP * PANEL_ROW) + (((chunk ^ (row + i * STEP)) & 7) << 4), copied ? source : from,
                     copied ? 16 : 0);
    source += STEP * stride;
  }
  barrier_arrive_copies(ready);
}

/* Queries and keys, or values. */
template <int HD, bool VALUES>
__device__ __forceinline__ void copy_tiles(const attention_args &args, uint32_t shared, uint32_t copier) {
  using at = stream_layout<HD>;
  constexpr uint32_t TILES = VALUES ? at::V : at::K, READY = VALUES ? at::V_READY : at::K_READY;
  constexpr uint32_t FREE = VALUES ? at::V_FREE : at::K_FREE;
  attention_query_block block;
  uint32_t tiles = 0;
  for (uint32_t count = 0, done = 0; next_work(args, &count, &block); ++done) {
    const uint32_t end = args.first_position + block.query + block.rows;
    const uint16_t *from = attention_at(VALUES ? args.v : args.k, block.kv);
    if (!VALUES) {
      barrier_wait(shared + at::Q_FREE, (done & 1) ^ 1);
      load_tile<HD>(shared + at::Q, attention_at(args.q, block.q), block.rows, args.q_stride, args.head_size, copier,
                    shared + at::Q_READY);
    }
    for (uint32_t key = 0; key < end; key += KEYS, ++tiles) {
      const uint32_t stage = tiles % STAGES<HD>;
      barrier_wait(shared + FREE + stage * BARRIER_BYTES, (tiles / STAGES<HD> & 1) ^ 1);
      load_tile<HD>(shared + TILES + stage * at::TILE, from + key * args.kv_stride, end - key, args.kv_stride,
                    args.head_size, copier, shared + READY + stage * BARRIER_BYTES);
    }
  }
}

/* ---- the warpgroups that multiply ---- */

/* Tiles of keys, or of values, as they come: where the next one is. */
template <int HD, uint32_t TILES, uint32_t READY, uint32_t FREE> struct tile_stream {
  uint32_t shared, taken;
  __device__ __forceinline__ uint32_t take() {
    const uint32_t stage = taken % STAGES<HD>;
    barrier_wait(shared + READY + stage * BARRIER_BYTES, taken / STAGES<HD> & 1);
    shared_writes_to_wgmma();
    ++taken;
    return shared + TILES + stage * stream_layout<HD>::TILE;
  }
  /* The one taken last, once no product reads it. */
  __device__ __forceinline__ void give_back() {
    barrier_arrive_warp(shared + FREE + (taken - 1) % STAGES<HD> * BARRIER_BYTES);
  }
};

template <typename T, int HD> __device__ __forceinline__ void multiply(const attention_args &args, uint32_t shared) {
  using at = stream_layout<HD>;
  tile_stream<HD, at::K, at::K_READY, at::K_FREE> keys = {shared, 0};
  tile_stream<HD, at::V, at::V_READY, at::V_FREE> values = {shared, 0};
  const uint32_t first = (threadIdx.x >> 5) * 16; /* the warp's first row */
  attention_query_block block;
  for (uint32_t count = 0, done = 0; next_work(args, &count, &block); ++done) {
    const uint32_t end = args.first_position + block.query + block.rows;
    const uint32_t position = args.first_position + block.query + first; /* of the warp's first query */
    float out[1][HD / 8][4], scores[1][KEYS / 8][4], factor[1][2];
    uint32_t queries[HD / 16][4], packed[1][KEYS / 16][4];
    attention_running<1> state;
    attention_clear<1, HD / 8>(out);
    attention_running_open<1>(state);
    const auto soften = [&](uint32_t key) {
      if (key + KEYS > position + 1)
        attention_hide_later_keys<1, KEYS>(scores, static_cast<int>(position) - static_cast<int>(key));
      attention_softmax_tile<1, KEYS>(scores, state, factor, args.scale_log2);
    };
    barrier_wait(shared + at::Q_READY, done & 1);
    panels_fragments<HD, QUERIES>(queries, shared + at::Q + first * PANEL_ROW);
    barrier_arrive_warp(shared + at::Q_FREE);

    uint32_t tile = keys.take();
    wgmma_hold(scores);
    wgmma_begin();
    panels_multiply<T, HD, KEYS>(scores, queries, tile);
    wgmma_wait<0>();
    wgmma_hold(scores);
    keys.give_back();
    soften(0);
    attention_pack<T, 1, KEYS>(packed, scores);
    /* The scores of a tile are computed while the tile before is multiplied with its values. */
    for (uint32_t key = KEYS; key < end; key += KEYS) {
      tile = keys.take();
      const uint32_t value = values.take();
      wgmma_hold(scores);
      wgmma_hold(out);
      wgmma_hold(packed);
      wgmma_begin();
      panels_multiply<T, HD, KEYS>(scores, queries, tile);
      panels_accumulate<T, HD, KEYS>(out, packed, value);
      wgmma_wait<1>();
      wgmma_hold(scores);
      keys.give_back();
      soften(key);
      wgmma_wait<0>();
      wgmma_hold(out);
      wgmma_hold(packed);
      values.give_back();
      attention_rescale<1, HD>(out, factor);
      attention_pack<T, 1, KEYS>(packed, scores);
    }
    tile = values.take();
    wgmma_hold(out);
    wgmma_hold(packed);
    wgmma_begin();
    panels_accumulate<T, HD, KEYS>(out, packed, tile);
    wgmma_wait<0>();
    wgmma_hold(out);
    values.give_back();

    const uint32_t valid = block.rows > first ? block.rows - first : 0;
    attention_running_close<1>(state, factor, args.lse_out == NULL ? NULL : args.lse_out + block.statistic + first,
                               valid, args.scale);
    attention_store_rows<T, HD, 1>(
        attention_at(args.out, block.packed + first * block.packed_stride), block.packed_stride, valid, args.head_size,
        out, factor,
        static_cast<unsigned char *>(__cvta_shared_to_generic(shared + at::OUT + first * attention_row_bytes<HD>)));
  }
}

template <typename T, int HD>
__global__ void __launch_bounds__(THREADS, 1) attention_stream_kernel(const attention_args args) {
  extern __shared__ unsigned char dynamic[];
  const uint32_t shared = (shared_address(dynamic) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
  if (threadIdx.x == 0)
    open_barriers<HD>(shared);
  __syncthreads();
  const uint32_t warp = threadIdx.x >> 5;
  if (warp >= MULTIPLIER_WARPS) {
    registers_give_up<HELPER_REGISTERS>();
    const uint32_t helper = warp - MULTIPLIER_WARPS;
    if (helper < COPIERS)
      copy_tiles<HD, false>(args, shared, helper);
    else
      copy_tiles<HD, true>(args, shared, helper - COPIERS);
  } else {
    registers_take<MULTIPLIER_REGISTERS>();
    multiply<T, HD>(args, shared);
  }
}

template <typename T, int HD> cudaError_t launch(attention_args args, cudaStream_t stream) {
  const uint64_t pairs = static_cast<uint64_t>(args.batch) * args.heads, tiles = (args.queries + QUERIES - 1) / QUERIES;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess)
    return status;
  const uint64_t blocks_max = static_cast<uint64_t>(processors);
  args.parts = pairs * ((tiles + 1) / 2) >= blocks_max ? 2 : 1; /* few are better spread */
  const uint64_t blocks = pairs * ((tiles + args.parts - 1) / args.parts);
  return attention_launch(attention_stream_kernel<T, HD>, blocks < blocks_max ? blocks : blocks_max, THREADS,
                          stream_layout<HD>::BYTES, args, stream);
}

} // namespace

cudaError_t attention_forward_stream(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return ATTENTION_FOR_TILES(launch, args, dtype, stream);
}

#endif
