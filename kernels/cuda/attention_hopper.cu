/* The kernels of attention_backward.cu for Hopper (sm_90a): the same tiles, order of sums and steps between the
 * products, which are done by warpgroups (attention_wgmma.cuh) at twice the rate.
 *
 * A warpgroup has 64 rows, a block WGS warpgroups, and there is one block per multiprocessor: while one warpgroup
 * computes exponentials another multiplies. Tiles have two stages; a stage is filled after the barrier behind which no
 * warpgroup multiplies from it any more. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/attention_wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

template <int HD> constexpr int WGS = HD == 64 ? 3 : 2;
template <int HD> constexpr int THREADS = WGS<HD> * 128;
template <int HD> constexpr int ROWS = WGS<HD> * 64; /* of a block: queries, or keys in the pass for dk and dv */
/* Whether queries, and dout, are held in registers rather than read from shared memory for every tile of keys. */
template <int HD> constexpr bool HELD = WGS<HD> == 2;
constexpr uint32_t ALIGNMENT = 1024;

/* The dynamic shared memory from its first multiple of ALIGNMENT. */
__device__ __forceinline__ unsigned char *aligned_shared(unsigned char *shared) {
  return shared + (ALIGNMENT - shared_address(shared) % ALIGNMENT) % ALIGNMENT;
}

template <int HD, int N> constexpr uint32_t tile_bytes = N *HD * 2;

/* A warpgroup's 64 rows of a tile (ROWS, HD) as a left operand, in shared memory or, where HELD, in registers. */
template <int HD, bool HELD> struct left_rows {
  uint32_t rows;
  __device__ __forceinline__ void open(uint32_t tile) { rows = tile + (threadIdx.x >> 7) * 64 * PANEL_ROW; }
  template <typename T, int N> __device__ __forceinline__ void multiply(float (&c)[1][N / 8][4], uint32_t right) const {
    panels_multiply<T, HD, ROWS<HD>, N>(c, rows, right);
  }
};

template <int HD> struct left_rows<HD, true> {
  uint32_t held[HD / 16][4];
  __device__ __forceinline__ void open(uint32_t tile) {
    panels_fragments<HD, ROWS<HD>>(held, tile + (threadIdx.x >> 5) * 16 * PANEL_ROW);
  }
  template <typename T, int N> __device__ __forceinline__ void multiply(float (&c)[1][N / 8][4], uint32_t right) const {
    panels_multiply<T, HD, N>(c, held, right);
  }
};

/* ---- backward, pass one: dk and dv ---- */

constexpr int STEP = 64; /* queries, and in pass two keys, at a time */

template <int HD> constexpr uint32_t keys_stage_bytes = 2 * tile_bytes<HD, STEP> + ALIGNMENT; /* the last: statistics */
template <int HD> constexpr uint32_t keys_fixed_bytes = 2 * tile_bytes<HD, ROWS<HD>>;
template <int HD> constexpr uint32_t keys_shared_bytes = keys_fixed_bytes<HD> + 2 * keys_stage_bytes<HD> + ALIGNMENT;

/* The walk of one block over (head of the part, tile of queries), the tiles running fastest; a step ahead of the sums.
 */
struct query_walk {
  const uint16_t *q, *dout; /* of the first head of the part, at the sequence's first token */
  const float2 *statistics;
  uint32_t tile_first, tile_end; /* per head */
  uint32_t head, tile;           /* of the step that is loaded next */
};

template <int HD>
__device__ __forceinline__ void load_queries(const attention_args &args, query_walk &walk, uint32_t stage) {
  const uint32_t query = walk.tile * STEP, valid = args.queries - query, column = walk.head * args.head_size;
  const uint64_t packed_stride = static_cast<uint64_t>(args.heads) * args.head_size;
  panels_load<HD, STEP, THREADS<HD>>(stage, walk.q + query * args.q_stride + column, valid, args.q_stride,
                                     args.head_size);
  panels_load<HD, STEP, THREADS<HD>>(stage + tile_bytes<HD, STEP>, walk.dout + query * packed_stride + column, valid,
                                     packed_stride, args.head_size);
  if (threadIdx.x < STEP) {
    const bool copied = threadIdx.x < valid;
    const float2 *from = walk.statistics + static_cast<uint64_t>(walk.head) * args.queries + query;
    copy8(stage + 2 * tile_bytes<HD, STEP> + threadIdx.x * 8, from + (copied ? threadIdx.x : 0),
                    copied ? 8 : 0);
  }
  copies_commit();
  if (++walk.tile == walk.tile_end) {
    walk.tile = walk.tile_first;
    ++walk.head;
  }
}

/* Adds one tile of queries, and starts the copy of the next when the tensor cores have work; dk's product is still
 * running on return. */
template <typename T, int HD, typename F>
__device__ __forceinline__ void add_queries(float (&dk)[1][HD / 8][4], float (&dv)[1][HD / 8][4],
                                            uint32_t (&p)[1][STEP / 16][4], uint32_t (&ds)[1][STEP / 16][4],
                                            uint32_t k_rows, uint32_t v_rows, uint32_t q_tile, const float4 *statistics,
                                            int distance, float scale_log2, F load_next) {
  const uint32_t dout_tile = q_tile + tile_bytes<HD, STEP>;
  float scores[1][STEP / 8][4], gradient[1][STEP / 8][4];
  wgmma_hold(scores);
  wgmma_hold(gradient);
  wgmma_begin();
  panels_multiply<T, HD, ROWS<HD>, STEP>(scores, k_rows, q_tile);
  panels_multiply<T, HD, ROWS<HD>, STEP>(gradient, v_rows, dout_tile);
  load_next();
  wgmma_wait<1>();
  wgmma_hold(scores);
  attention_probabilities_of_keys<1, STEP>(scores, statistics, distance, scale_log2);
  attention_pack<T, 1, STEP>(p, scores);
  wgmma_hold(p);
  wgmma_hold(dv);
  wgmma_begin();
  panels_accumulate<T, HD, STEP>(dv, p, dout_tile);
  wgmma_wait<1>();
  wgmma_hold(gradient);
  attention_gradient_of_keys<1, STEP>(gradient, scores, statistics);
  attention_pack<T, 1, STEP>(ds, gradient);
  wgmma_hold(ds);
  wgmma_hold(dk);
  wgmma_begin();
  panels_accumulate<T, HD, STEP>(dk, ds, q_tile);
}

template <typename T, int HD>
__global__ void __launch_bounds__(THREADS<HD>, 1) attention_hopper_keys_kernel(const attention_args args) {
  extern __shared__ unsigned char dynamic[];
  unsigned char *shared = aligned_shared(dynamic);
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + tile_bytes<HD, ROWS<HD>>;
  const uint32_t stage_first = v_tile + tile_bytes<HD, ROWS<HD>>;
  const uint32_t warp = threadIdx.x >> 5, group_first = (warp >> 2) * 64, first = warp * 16;

  const attention_key_block block = attention_key_block_of<ROWS<HD>>(args);
  panels_load<HD, ROWS<HD>, THREADS<HD>>(k_tile, attention_at(args.k, block.kv), block.rows, args.kv_stride,
                                         args.head_size);
  panels_load<HD, ROWS<HD>, THREADS<HD>>(v_tile, attention_at(args.v, block.kv), block.rows, args.kv_stride,
                                         args.head_size);
  query_walk walk;
  walk.q = attention_at(args.q, block.q);
  walk.dout = attention_at(args.dout, block.packed);
  walk.statistics = args.statistics + block.statistic;
  walk.tile_first = walk.tile = block.key / STEP;
  walk.tile_end = (args.queries + STEP - 1) / STEP;
  walk.head = 0;
  load_queries<HD>(args, walk, stage_first);

  float dk[1][HD / 8][4], dv[1][HD / 8][4];
  uint32_t p[1][STEP / 16][4], ds[1][STEP / 16][4];
  attention_clear<1, HD / 8>(dk);
  attention_clear<1, HD / 8>(dv);
  const uint32_t steps = (walk.tile_end - walk.tile_first) * block.heads;
  uint32_t query = walk.tile_first * STEP;
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t tile = stage_first + (step & 1) * keys_stage_bytes<HD>;
    panels_arrived();
    wgmma_wait<0>();
    wgmma_hold(dk);
    wgmma_hold(dv);
    wgmma_hold(p);
    wgmma_hold(ds);
    __syncthreads();
    const auto load_next = [&] {
      if (step + 1 < steps)
        load_queries<HD>(args, walk, stage_first + (~step & 1) * keys_stage_bytes<HD>);
    };
    const float4 *statistics = reinterpret_cast<const float4 *>(
        shared + keys_fixed_bytes<HD> + (step & 1) * keys_stage_bytes<HD> + 2 * tile_bytes<HD, STEP>);
    if (query + STEP > block.key + group_first)
      add_queries<T, HD>(dk, dv, p, ds, k_tile + group_first * PANEL_ROW, v_tile + group_first * PANEL_ROW, tile,
                         statistics, static_cast<int>(block.key + first) - static_cast<int>(query), args.scale_log2,
                         load_next);
    else
      load_next();
    query += STEP;
    if (query >= walk.tile_end * STEP)
      query = walk.tile_first * STEP;
  }
  wgmma_wait<0>();
  wgmma_hold(dk);
  wgmma_hold(dv);
  __syncthreads();

  attention_store_keys<T, HD, 1, ROWS<HD>>(args, block, first, dk, dv, shared);
}

/* ---- backward, pass two: dq ---- */

template <int HD>
constexpr uint32_t queries_shared_bytes = 2 * tile_bytes<HD, ROWS<HD>> + 4 * tile_bytes<HD, STEP> + ALIGNMENT;

template <int HD>
__device__ __forceinline__ void load_keys(const attention_args &args, const uint16_t *k, const uint16_t *v,
                                          uint32_t key, uint32_t end, uint32_t stage) {
  const uint64_t offset = key * args.kv_stride;
  panels_load<HD, STEP, THREADS<HD>>(stage, k + offset, end - key, args.kv_stride, args.head_size);
  panels_load<HD, STEP, THREADS<HD>>(stage + tile_bytes<HD, STEP>, v + offset, end - key, args.kv_stride,
                                     args.head_size);
  copies_commit();
}

/* Adds one tile of keys, and starts the copy of the next. */
template <typename T, int HD, typename F>
__device__ __forceinline__ void
add_keys(float (&dq)[1][HD / 8][4], const left_rows<HD, HELD<HD>> &q, const left_rows<HD, HELD<HD>> &dout,
         uint32_t k_tile, const float2 (&statistics)[1][2], int distance, float scale_log2, F load_next) {
  float scores[1][STEP / 8][4], gradient[1][STEP / 8][4];
  uint32_t ds[1][STEP / 16][4];
  wgmma_hold(scores);
  wgmma_hold(gradient);
  wgmma_begin();
  q.template multiply<T, STEP>(scores, k_tile);
  dout.template multiply<T, STEP>(gradient, k_tile + tile_bytes<HD, STEP>);
  load_next();
  wgmma_wait<1>();
  wgmma_hold(scores);
  attention_probabilities_of_queries<1, STEP>(scores, statistics, distance, scale_log2);
  wgmma_wait<0>();
  wgmma_hold(gradient);
  attention_gradient_of_queries<1, STEP>(gradient, scores, statistics);
  attention_pack<T, 1, STEP>(ds, gradient);
  wgmma_hold(ds);
  wgmma_hold(dq);
  wgmma_begin();
  panels_accumulate<T, HD, STEP>(dq, ds, k_tile);
  wgmma_wait<0>();
  wgmma_hold(dq);
}

template <typename T, int HD>
__global__ void __launch_bounds__(THREADS<HD>, 1) attention_hopper_queries_kernel(const attention_args args) {
  extern __shared__ unsigned char dynamic[];
  unsigned char *shared = aligned_shared(dynamic);
  const uint32_t q_tile = shared_address(shared), dout_tile = q_tile + tile_bytes<HD, ROWS<HD>>;
  const uint32_t stage_first = dout_tile + tile_bytes<HD, ROWS<HD>>;
  const uint32_t warp = threadIdx.x >> 5, group_first = (warp >> 2) * 64, first = warp * 16;
  const attention_query_block block = attention_query_block_of<ROWS<HD>>(args);
  const uint32_t end = block.query + block.rows;
  const uint16_t *k = attention_at(args.k, block.kv), *v = attention_at(args.v, block.kv);
  panels_load<HD, ROWS<HD>, THREADS<HD>>(q_tile, attention_at(args.q, block.q), block.rows, args.q_stride,
                                         args.head_size);
  panels_load<HD, ROWS<HD>, THREADS<HD>>(dout_tile, attention_at(args.dout, block.packed), block.rows,
                                         block.packed_stride, args.head_size);
  load_keys<HD>(args, k, v, 0, end, stage_first);

  float2 statistics[1][2];
  attention_load_statistics<1>(statistics, args.statistics + block.statistic, first, block.rows);
  float dq[1][HD / 8][4];
  attention_clear<1, HD / 8>(dq);
  left_rows<HD, HELD<HD>> q_rows, dout_rows;
  panels_arrived();
  __syncthreads();
  q_rows.open(q_tile);
  dout_rows.open(dout_tile);
  for (uint32_t key = 0, stage = 0; key < end; key += STEP, stage ^= 1) {
    const uint32_t k_tile = stage_first + stage * 2 * tile_bytes<HD, STEP>;
    panels_arrived();
    __syncthreads();
    const auto load_next = [&] {
      if (key + STEP < end)
        load_keys<HD>(args, k, v, key + STEP, end, stage_first + (stage ^ 1) * 2 * tile_bytes<HD, STEP>);
    };
    if (key < block.query + group_first + 64)
      add_keys<T, HD>(dq, q_rows, dout_rows, k_tile, statistics,
                      static_cast<int>(block.query + first) - static_cast<int>(key), args.scale_log2, load_next);
    else
      load_next();
  }
  __syncthreads();
  float scale[1][2];
  attention_fill<1>(scale, args.scale);
  attention_store_rows<T, HD, 1>(attention_at(args.dq, block.q + first * args.q_stride), args.q_stride,
                                 block.rows > first ? block.rows - first : 0, args.head_size, dq, scale,
                                 shared + first * attention_row_bytes<HD>);
}

/* ---- launches ---- */

template <int HD> uint64_t tiles_of(uint32_t rows) {
  return (rows + ROWS<HD> - 1) / ROWS<HD>;
}

template <typename T, int HD> cudaError_t backward(const attention_args &args, cudaStream_t stream) {
  cudaError_t status = attention_launch(attention_hopper_keys_kernel<T, HD>,
                                        tiles_of<HD>(args.keys) * args.batch * args.kv_heads * args.parts, THREADS<HD>,
                                        keys_shared_bytes<HD>, args, stream);
  if (status == cudaSuccess)
    status =
        attention_launch(attention_hopper_queries_kernel<T, HD>, tiles_of<HD>(args.queries) * args.batch * args.heads,
                         THREADS<HD>, queries_shared_bytes<HD>, args, stream);
  return status;
}

} // namespace

cudaError_t attention_backward_hopper(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return ATTENTION_FOR_TILES(backward, args, dtype, stream);
}

#endif
