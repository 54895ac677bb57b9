/* Backward attention on the tensor cores, in two passes that both recompute the probabilities from lse.
 *
 * Pass one: a block owns 128 keys of one key-value head and walks the queries that see them, head after head of the
 * group, so dk and dv are summed in registers in one fixed order. Scores are computed transposed, keys as rows: the
 * sums of a product are then the left operand of the next, and nothing but q and dout passes through shared memory.
 * Pass two: a block owns 128 queries of one head and walks the keys, for dq. The scores are computed twice in all (7
 * products instead of 5), and in exchange no two blocks ever add to the same number.
 *
 * Where key blocks are too few to fill a GPU, the heads of a group are taken in parts (a function of the shape) whose
 * fp32 sums are added in order by a third kernel. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_softmax.cuh"

namespace {

/* ---- pass one: dk and dv ---- */

constexpr int KEYS = CUDA_ATTENTION_KEYS, STEP_QUERIES = 64;

/* How the 128 keys are dealt: rows of a warp, and the queries whose scores it holds at a time. The sums of dk and dv
 * take 128 registers either way. */
template <int HD> struct keys_plan;
template <> struct keys_plan<64> { static constexpr int MT = 2, WARPS = 4, QUERIES = 32, BLOCKS = 2; };
template <> struct keys_plan<128> { static constexpr int MT = 1, WARPS = 8, QUERIES = 64, BLOCKS = 1; };

template <int HD> constexpr uint32_t keys_stage_bytes = 2 * STEP_QUERIES *attention_row_bytes<HD> + STEP_QUERIES * 8;
template <int HD> constexpr uint32_t keys_fixed_bytes = 2 * KEYS *attention_row_bytes<HD>;

/* The walk of one block over (head of the part, tile of queries), the tiles running fastest. */
struct query_walk {
  const uint16_t *q, *dout; /* of the first head of the part, at the sequence's first token */
  const float2 *statistics;
  uint32_t tile_first, tiles; /* per head */
};

template <int HD>
__device__ __forceinline__ void load_queries(const attention_args &args, const query_walk &walk, uint32_t step,
                                             uint32_t stage) {
  constexpr int THREADS = keys_plan<HD>::WARPS * 32;
  const uint32_t head = step / walk.tiles, query = (walk.tile_first + step % walk.tiles) * STEP_QUERIES;
  const uint32_t valid = args.queries - query;
  const uint64_t packed_stride = static_cast<uint64_t>(args.heads) * args.head_size;
  const uint32_t column = head * args.head_size;
  attention_load_tile<HD, STEP_QUERIES, THREADS>(stage, walk.q + query * args.q_stride + column, valid, args.q_stride,
                                                 args.head_size);
  attention_load_tile<HD, STEP_QUERIES, THREADS>(stage + STEP_QUERIES * attention_row_bytes<HD>,
                                                 walk.dout + query * packed_stride + column, valid, packed_stride,
                                                 args.head_size);
  if (threadIdx.x < STEP_QUERIES) {
    const bool copied = threadIdx.x < valid;
    const float2 *from = walk.statistics + static_cast<uint64_t>(head) * args.queries + query;
    copy8(stage + 2 * STEP_QUERIES * attention_row_bytes<HD> + threadIdx.x * 8,
                    from + (copied ? threadIdx.x : 0), copied ? 8 : 0);
  }
  copies_commit();
}

template <typename T, int HD>
__device__ __forceinline__ void add_queries(float (&dk)[keys_plan<HD>::MT][HD / 8][4],
                                            float (&dv)[keys_plan<HD>::MT][HD / 8][4], uint32_t k_rows, uint32_t v_rows,
                                            uint32_t q_tile, uint32_t dout_tile, const float4 *statistics, int distance,
                                            float scale_log2) {
  constexpr int MT = keys_plan<HD>::MT, QUERIES = keys_plan<HD>::QUERIES;
  float scores[MT][QUERIES / 8][4], gradient[MT][QUERIES / 8][4];
  attention_clear<MT, QUERIES / 8>(scores);
  attention_multiply<T, HD, MT, QUERIES>(scores, k_rows, q_tile);
  attention_clear<MT, QUERIES / 8>(gradient);
  attention_multiply<T, HD, MT, QUERIES>(gradient, v_rows, dout_tile);
  attention_probabilities_of_keys<MT, QUERIES>(scores, statistics, distance, scale_log2);
  attention_gradient_of_keys<MT, QUERIES>(gradient, scores, statistics);
  uint32_t packed[MT][QUERIES / 16][4];
  attention_pack<T, MT, QUERIES>(packed, scores);
  attention_accumulate<T, HD, MT, QUERIES>(dv, packed, dout_tile);
  attention_pack<T, MT, QUERIES>(packed, gradient);
  attention_accumulate<T, HD, MT, QUERIES>(dk, packed, q_tile);
}

template <typename T, int HD>
__global__ void __launch_bounds__(keys_plan<HD>::WARPS * 32, keys_plan<HD>::BLOCKS)
    attention_backward_keys_kernel(const attention_args args) {
  constexpr int MT = keys_plan<HD>::MT, THREADS = keys_plan<HD>::WARPS * 32, QUERIES = keys_plan<HD>::QUERIES;
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + KEYS * ROW;
  const uint32_t stage_first = v_tile + KEYS * ROW;
  const uint32_t warp = threadIdx.x >> 5;

  const attention_key_block block = attention_key_block_of<KEYS>(args);
  attention_load_tile<HD, KEYS, THREADS>(k_tile, attention_at(args.k, block.kv), block.rows, args.kv_stride,
                                         args.head_size);
  attention_load_tile<HD, KEYS, THREADS>(v_tile, attention_at(args.v, block.kv), block.rows, args.kv_stride,
                                         args.head_size);
  query_walk walk;
  walk.q = attention_at(args.q, block.q);
  walk.dout = attention_at(args.dout, block.packed);
  walk.statistics = args.statistics + block.statistic;
  walk.tile_first = block.key / STEP_QUERIES;
  walk.tiles = (args.queries + STEP_QUERIES - 1) / STEP_QUERIES - walk.tile_first;
  load_queries<HD>(args, walk, 0, stage_first);

  float dk[MT][HD / 8][4], dv[MT][HD / 8][4];
  attention_clear<MT, HD / 8>(dk);
  attention_clear<MT, HD / 8>(dv);
  const uint32_t first = warp * MT * 16; /* of the warp's keys */
  const uint32_t steps = walk.tiles * block.heads;
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t stage = args.stages == 2 ? step & 1 : 0;
    const uint32_t tile = stage_first + stage * keys_stage_bytes<HD>;
    copies_wait<0>();
    __syncthreads();
    if (args.stages == 2 && step + 1 < steps)
      load_queries<HD>(args, walk, step + 1, stage_first + (stage ^ 1) * keys_stage_bytes<HD>);
    const uint32_t query = (walk.tile_first + step % walk.tiles) * STEP_QUERIES;
    const float4 *statistics = reinterpret_cast<const float4 *>(shared + keys_fixed_bytes<HD> +
                                                                stage * keys_stage_bytes<HD> + 2 * STEP_QUERIES * ROW);
#pragma unroll 1
    for (uint32_t offset = 0; offset < STEP_QUERIES; offset += QUERIES)
      if (query + offset + QUERIES > block.key + first)
        add_queries<T, HD>(dk, dv, k_tile + first * ROW, v_tile + first * ROW, tile + offset * ROW,
                           tile + (STEP_QUERIES + offset) * ROW, statistics + offset / 2,
                           static_cast<int>(block.key + first) - static_cast<int>(query + offset), args.scale_log2);
    if (args.stages == 1) {
      __syncthreads();
      if (step + 1 < steps)
        load_queries<HD>(args, walk, step + 1, stage_first);
    }
  }

  attention_store_keys<T, HD, MT, KEYS>(args, block, first, dk, dv, shared);
}

/* Adds the parts in order. A thread has two columns. */
template <typename T>
__global__ void __launch_bounds__(256) attention_backward_parts_kernel(const attention_args args) {
  const uint64_t row_pairs = static_cast<uint64_t>(args.kv_heads) * args.head_size / 2;
  const uint64_t pairs = static_cast<uint64_t>(args.batch) * args.keys * row_pairs;
  const uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= 2 * pairs)
    return;
  const float2 *from = reinterpret_cast<const float2 *>(args.partial) + index;
  float2 sum = from[0];
  for (uint32_t part = 1; part < args.parts; ++part) {
    const float2 next = from[part * 2 * pairs];
    sum.x += next.x;
    sum.y += next.y;
  }
  const uint64_t within = index % pairs;
  uint16_t *to = static_cast<uint16_t *>(index < pairs ? args.dk : args.dv);
  *reinterpret_cast<uint32_t *>(to + within / row_pairs * args.kv_stride + within % row_pairs * 2) =
      tensor_element<T>::pack(sum.x, sum.y);
}

/* ---- pass two: dq ---- */

constexpr int QUERY_ROWS = 128, QUERY_WARPS = 4, QUERY_THREADS = QUERY_WARPS * 32, QUERY_MT = 2;

template <int HD> constexpr int step_keys = HD == 64 ? 64 : 32;
template <int HD> constexpr uint32_t queries_stage_bytes = 2 * step_keys<HD> *attention_row_bytes<HD>;
template <int HD> constexpr uint32_t queries_fixed_bytes = 2 * QUERY_ROWS *attention_row_bytes<HD>;

template <int HD>
__device__ __forceinline__ void load_keys(const attention_args &args, const uint16_t *k, const uint16_t *v,
                                          uint32_t key, uint32_t end, uint32_t stage) {
  constexpr int N = step_keys<HD>;
  const uint64_t offset = key * args.kv_stride;
  attention_load_tile<HD, N, QUERY_THREADS>(stage, k + offset, end - key, args.kv_stride, args.head_size);
  attention_load_tile<HD, N, QUERY_THREADS>(stage + N * attention_row_bytes<HD>, v + offset, end - key, args.kv_stride,
                                            args.head_size);
  copies_commit();
}

template <typename T, int HD>
__global__ void __launch_bounds__(QUERY_THREADS, 2) attention_backward_queries_kernel(const attention_args args) {
  constexpr int MT = QUERY_MT, N = step_keys<HD>;
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t q_tile = shared_address(shared), dout_tile = q_tile + QUERY_ROWS * ROW;
  const uint32_t stage_first = dout_tile + QUERY_ROWS * ROW;
  const uint32_t warp = threadIdx.x >> 5, first = warp * MT * 16;
  const attention_query_block block = attention_query_block_of<QUERY_ROWS>(args);
  const uint32_t end = block.query + block.rows;
  const uint16_t *k = attention_at(args.k, block.kv), *v = attention_at(args.v, block.kv);
  attention_load_tile<HD, QUERY_ROWS, QUERY_THREADS>(q_tile, attention_at(args.q, block.q), block.rows, args.q_stride,
                                                     args.head_size);
  attention_load_tile<HD, QUERY_ROWS, QUERY_THREADS>(dout_tile, attention_at(args.dout, block.packed), block.rows,
                                                     block.packed_stride, args.head_size);
  load_keys<HD>(args, k, v, 0, end, stage_first);

  float2 statistics[MT][2];
  attention_load_statistics<MT>(statistics, args.statistics + block.statistic, first, block.rows);
  float dq[MT][HD / 8][4];
  attention_clear<MT, HD / 8>(dq);
  uint32_t stage = 0;
  for (uint32_t key = 0; key < end; key += N) {
    const uint32_t k_tile = stage_first + stage * queries_stage_bytes<HD>;
    copies_wait<0>();
    __syncthreads();
    stage = args.stages == 2 ? stage ^ 1 : 0;
    if (args.stages == 2 && key + N < end)
      load_keys<HD>(args, k, v, key + N, end, stage_first + stage * queries_stage_bytes<HD>);
    if (key < block.query + first + MT * 16) {
      float scores[MT][N / 8][4], gradient[MT][N / 8][4];
      attention_clear<MT, N / 8>(scores);
      attention_multiply<T, HD, MT, N>(scores, q_tile + first * ROW, k_tile);
      attention_clear<MT, N / 8>(gradient);
      attention_multiply<T, HD, MT, N>(gradient, dout_tile + first * ROW, k_tile + N * ROW);
      attention_probabilities_of_queries<MT, N>(
          scores, statistics, static_cast<int>(block.query + first) - static_cast<int>(key), args.scale_log2);
      attention_gradient_of_queries<MT, N>(gradient, scores, statistics);
      uint32_t packed[MT][N / 16][4];
      attention_pack<T, MT, N>(packed, gradient);
      attention_accumulate<T, HD, MT, N>(dq, packed, k_tile);
    }
    if (args.stages == 1) {
      __syncthreads();
      if (key + N < end)
        load_keys<HD>(args, k, v, key + N, end, stage_first);
    }
  }
  float scale[MT][2];
  attention_fill<MT>(scale, args.scale);
  attention_store_rows<T, HD, MT>(attention_at(args.dq, block.q + first * args.q_stride), args.q_stride,
                                  block.rows > first ? block.rows - first : 0, args.head_size, dq, scale,
                                  shared + first * ROW);
}

/* ---- launches ---- */

/* Two stages where the device has the shared memory; the bits are the same with one. Returns the bytes of it. */
template <uint32_t FIXED, uint32_t STAGE> uint32_t choose_stages(attention_args *args) {
  args->stages = FIXED + 2 * STAGE <= args->shared_max ? 2 : 1;
  return FIXED + args->stages * STAGE;
}

template <typename T, int HD> cudaError_t launch(attention_args args, cudaStream_t stream) {
  uint32_t bytes = choose_stages<keys_fixed_bytes<HD>, keys_stage_bytes<HD>>(&args);
  const uint64_t key_tiles = (args.keys + KEYS - 1) / KEYS, query_tiles = (args.queries + QUERY_ROWS - 1) / QUERY_ROWS;
  cudaError_t status =
      attention_launch(attention_backward_keys_kernel<T, HD>, key_tiles * args.batch * args.kv_heads * args.parts,
                       keys_plan<HD>::WARPS * 32, bytes, args, stream);
  bytes = choose_stages<queries_fixed_bytes<HD>, queries_stage_bytes<HD>>(&args);
  if (status == cudaSuccess)
    status = attention_launch(attention_backward_queries_kernel<T, HD>, query_tiles * args.batch * args.heads,
                              QUERY_THREADS, bytes, args, stream);
  return status;
}

} // namespace

cudaError_t attention_backward_join_parts(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  if (args.parts == 1)
    return cudaSuccess;
  const uint64_t pairs = static_cast<uint64_t>(args.batch) * args.keys * args.kv_heads * args.head_size;
  return attention_launch(dtype == FLAP_BF16 ? attention_backward_parts_kernel<__nv_bfloat16>
                                             : attention_backward_parts_kernel<__half>,
                          (pairs + 255) / 256, 256, 0, args, stream);
}

cudaError_t attention_backward_mma(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return ATTENTION_FOR_TILES(launch, args, dtype, stream);
}
