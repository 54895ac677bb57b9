/* Forward attention on the tensor cores (Dao, FlashAttention-2, 2023).
 *
 * A block owns 128 queries of one head: four warps of 32 rows. It walks the keys upwards in tiles with a running
 * maximum and sum. K and V have one tile each in shared memory: while scores are computed from K, V arrives, and while
 * V is used, the next K arrives; the second block of the same multiprocessor fills what remains. Blocks are numbered so
 * that the longest rows of tiles start first, over all heads, which evens out the end of the grid. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_tiles.cuh"

namespace {

constexpr int QUERIES = 128, WARPS = 4, THREADS = WARPS * 32, MT = 2;

template <int HD, int KEYS> constexpr uint32_t forward_shared_bytes = (QUERIES + 2 * KEYS) * attention_row_bytes<HD>;

struct softmax_state {
  float maximum[MT][2], sum[MT][2]; /* of raw scores; of the lane's own columns */
};

/* Hides the keys after each query. `distance` is the first query of the warp less the first key of the tile. */
template <int KEYS> __device__ __forceinline__ void hide_later_keys(float (&scores)[MT][KEYS / 8][4], int distance) {
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = distance + m * 16 + (i >> 1) * 8 + (lane >> 2), column = n * 8 + (lane & 3) * 2 + (i & 1);
        if (column > row)
          scores[m][n][i] = -INFINITY;
      }
}

/* Scores become probabilities relative to the running maximum; what was summed before is rescaled. */
template <int HD, int KEYS>
__device__ __forceinline__ void softmax_tile(float (&scores)[MT][KEYS / 8][4], float (&out)[MT][HD / 8][4],
                                             softmax_state &state, float scale_log2) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.maximum[m][half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
        top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float factor = attention_exp2((state.maximum[m][half] - top) * scale_log2), offset = top * scale_log2;
      float sum = state.sum[m][half] * factor;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
        const float a = attention_exp2(fmaf(scores[m][n][2 * half], scale_log2, -offset));
        const float b = attention_exp2(fmaf(scores[m][n][2 * half + 1], scale_log2, -offset));
        scores[m][n][2 * half] = a;
        scores[m][n][2 * half + 1] = b;
        sum += a + b;
      }
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) {
        out[m][n][2 * half] *= factor;
        out[m][n][2 * half + 1] *= factor;
      }
      state.maximum[m][half] = top;
      state.sum[m][half] = sum;
    }
}

template <typename T, int HD, int KEYS>
__global__ void __launch_bounds__(THREADS, 2) attention_forward_kernel(const attention_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  const uint32_t q_tile = attention_shared_address(shared), k_tile = q_tile + QUERIES * ROW;
  const uint32_t v_tile = k_tile + KEYS * ROW;
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint32_t pairs = args.batch * args.heads, pair = blockIdx.x % pairs;
  const uint32_t query = (gridDim.x / pairs - 1 - blockIdx.x / pairs) * QUERIES;
  const uint32_t sequence = pair / args.heads, head = pair % args.heads;
  const uint32_t kv_head = head / (args.heads / args.kv_heads);
  const uint32_t rows = min(static_cast<uint32_t>(QUERIES), args.queries - query);
  const uint32_t end = args.first_position + query + rows; /* of the keys that are seen */
  const uint16_t *q = static_cast<const uint16_t *>(args.q) +
                      (static_cast<uint64_t>(sequence) * args.queries + query) * args.q_stride + head * args.head_size;
  const uint64_t kv_offset = static_cast<uint64_t>(sequence) * args.keys * args.kv_stride + kv_head * args.head_size;
  const uint16_t *k = static_cast<const uint16_t *>(args.k) + kv_offset;
  const uint16_t *v = static_cast<const uint16_t *>(args.v) + kv_offset;

  attention_load_tile<HD, QUERIES, THREADS>(q_tile, q, rows, args.q_stride, args.head_size);
  attention_load_tile<HD, KEYS, THREADS>(k_tile, k, end, args.kv_stride, args.head_size);
  attention_commit();

  float out[MT][HD / 8][4];
  attention_clear<MT, HD / 8>(out);
  softmax_state state;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.maximum[m][half] = -INFINITY;
      state.sum[m][half] = 0.0f;
    }
  const uint32_t position = args.first_position + query + warp * MT * 16; /* of the warp's first query */
  const uint32_t q_rows = q_tile + warp * MT * 16 * ROW;
  for (uint32_t key = 0; key < end; key += KEYS) {
    attention_wait<0>();
    __syncthreads();
    attention_load_tile<HD, KEYS, THREADS>(v_tile, v + key * args.kv_stride, end - key, args.kv_stride, args.head_size);
    attention_commit();
    const bool seen = key < position + MT * 16;
    float scores[MT][KEYS / 8][4];
    if (seen) {
      attention_clear<MT, KEYS / 8>(scores);
      attention_multiply<T, HD, MT, KEYS>(scores, q_rows, k_tile);
    }
    attention_wait<0>();
    __syncthreads();
    if (key + KEYS < end) {
      attention_load_tile<HD, KEYS, THREADS>(k_tile, k + (key + KEYS) * args.kv_stride, end - key - KEYS,
                                             args.kv_stride, args.head_size);
      attention_commit();
    }
    if (seen) {
      if (key + KEYS > position + 1)
        hide_later_keys<KEYS>(scores, static_cast<int>(position) - static_cast<int>(key));
      softmax_tile<HD, KEYS>(scores, out, state, args.scale_log2);
      uint32_t packed[MT][KEYS / 16][4];
      attention_pack<T, MT, KEYS>(packed, scores);
      attention_accumulate<T, HD, MT, KEYS>(out, packed, v_tile);
    }
  }

  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      factor[m][half] = 1.0f / sum;
      const uint32_t row = warp * MT * 16 + m * 16 + half * 8 + (lane >> 2);
      if (args.lse_out != NULL && (lane & 3) == 0 && row < rows)
        args.lse_out[static_cast<uint64_t>(pair) * args.queries + query + row] =
            state.maximum[m][half] * args.scale + logf(sum);
    }
  const uint32_t first = warp * MT * 16;
  const uint64_t packed_stride = static_cast<uint64_t>(args.heads) * args.head_size;
  uint16_t *to = static_cast<uint16_t *>(args.out) +
                 (static_cast<uint64_t>(sequence) * args.queries + query + first) * packed_stride +
                 head * args.head_size;
  attention_store_rows<T, HD, MT>(to, packed_stride, rows > first ? rows - first : 0, args.head_size, out, factor,
                                  shared + first * ROW);
}

template <typename T, int HD, int KEYS> cudaError_t launch(const attention_args &args, cudaStream_t stream) {
  const uint32_t tiles = (args.queries + QUERIES - 1) / QUERIES;
  return attention_launch(attention_forward_kernel<T, HD, KEYS>, static_cast<uint64_t>(tiles) * args.batch * args.heads,
                          THREADS, forward_shared_bytes<HD, KEYS>, args, stream);
}

} // namespace

cudaError_t attention_forward_mma(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  if (dtype == FLAP_BF16)
    return args.head_size <= 64 ? launch<__nv_bfloat16, 64, 128>(args, stream)
                                : launch<__nv_bfloat16, 128, 64>(args, stream);
  return args.head_size <= 64 ? launch<__half, 64, 128>(args, stream) : launch<__half, 128, 64>(args, stream);
}
