/* Forward attention on the tensor cores (Dao, FlashAttention-2, 2023).
 *
 * A block owns 128 queries of one head: four warps of 32 rows. It walks the keys upwards in tiles with a running
 * maximum and sum. K and V have one tile each in shared memory: while scores are computed from K, V arrives, and while
 * V is used, the next K arrives; the second block of the same multiprocessor fills what remains. Where its shared
 * memory holds one block only, tiles of half as many keys make room for the second: other sums, so other bits. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_softmax.cuh"

namespace {

constexpr int QUERIES = 128, WARPS = 4, THREADS = WARPS * 32, MT = 2;

template <int HD, int KEYS> constexpr uint32_t forward_shared_bytes = (QUERIES + 2 * KEYS) * attention_row_bytes<HD>;

template <typename T, int HD, int KEYS>
__global__ void __launch_bounds__(THREADS, 2) attention_forward_kernel(const attention_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  const uint32_t q_tile = shared_address(shared), k_tile = q_tile + QUERIES * ROW;
  const uint32_t v_tile = k_tile + KEYS * ROW;
  const uint32_t warp = threadIdx.x >> 5;
  const attention_query_block block = attention_query_block_of<QUERIES>(args);
  const uint32_t end = args.first_position + block.query + block.rows; /* of the keys that are seen */
  const uint16_t *k = attention_at(args.k, block.kv), *v = attention_at(args.v, block.kv);

  attention_load_tile<HD, QUERIES, THREADS>(q_tile, attention_at(args.q, block.q), block.rows, args.q_stride,
                                            args.head_size);
  attention_load_tile<HD, KEYS, THREADS>(k_tile, k, end, args.kv_stride, args.head_size);
  copies_commit();

  float out[MT][HD / 8][4];
  attention_clear<MT, HD / 8>(out);
  attention_running<MT> state;
  attention_running_open<MT>(state);
  const uint32_t position = args.first_position + block.query + warp * MT * 16; /* of the warp's first query */
  const uint32_t q_rows = q_tile + warp * MT * 16 * ROW;
  for (uint32_t key = 0; key < end; key += KEYS) {
    copies_wait<0>();
    __syncthreads();
    attention_load_tile<HD, KEYS, THREADS>(v_tile, v + key * args.kv_stride, end - key, args.kv_stride, args.head_size);
    copies_commit();
    const bool seen = key < position + MT * 16;
    float scores[MT][KEYS / 8][4];
    if (seen) {
      attention_clear<MT, KEYS / 8>(scores);
      attention_multiply<T, HD, MT, KEYS>(scores, q_rows, k_tile);
    }
    copies_wait<0>();
    __syncthreads();
    if (key + KEYS < end) {
      attention_load_tile<HD, KEYS, THREADS>(k_tile, k + (key + KEYS) * args.kv_stride, end - key - KEYS,
                                             args.kv_stride, args.head_size);
      copies_commit();
    }
    if (seen) {
      if (key + KEYS > position + 1)
        attention_hide_later_keys<MT, KEYS>(scores, static_cast<int>(position) - static_cast<int>(key));
      float factor[MT][2];
      attention_softmax_tile<MT, KEYS>(scores, state, factor, args.scale_log2);
      attention_rescale<MT, HD>(out, factor);
      uint32_t packed[MT][KEYS / 16][4];
      attention_pack<T, MT, KEYS>(packed, scores);
      attention_accumulate<T, HD, MT, KEYS>(out, packed, v_tile);
    }
  }

  const uint32_t first = warp * MT * 16, valid = block.rows > first ? block.rows - first : 0;
  float factor[MT][2];
  attention_running_close<MT>(state, factor, args.lse_out == NULL ? NULL : args.lse_out + block.statistic + first,
                              valid, args.scale);
  attention_store_rows<T, HD, MT>(attention_at(args.out, block.packed + first * block.packed_stride),
                                  block.packed_stride, valid, args.head_size, out, factor, shared + first * ROW);
}

template <typename T, int HD, int KEYS> cudaError_t launch(const attention_args &args, cudaStream_t stream) {
  const uint32_t tiles = (args.queries + QUERIES - 1) / QUERIES;
  return attention_launch(attention_forward_kernel<T, HD, KEYS>, static_cast<uint64_t>(tiles) * args.batch * args.heads,
                          THREADS, forward_shared_bytes<HD, KEYS>, args, stream);
}

constexpr uint32_t SHARED_OF_BLOCK = 1024; /* that the driver takes beside a block's own */

template <typename T> cudaError_t launch_for(const attention_args &args, cudaStream_t stream) {
  if (args.head_size <= 64)
    return launch<T, 64, 128>(args, stream);
  return 2 * (forward_shared_bytes<128, 64> + SHARED_OF_BLOCK) <= args.shared_all ? launch<T, 128, 64>(args, stream)
                                                                                  : launch<T, 128, 32>(args, stream);
}

} // namespace

cudaError_t attention_forward_mma(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return dtype == FLAP_BF16 ? launch_for<__nv_bfloat16>(args, stream) : launch_for<__half>(args, stream);
}
