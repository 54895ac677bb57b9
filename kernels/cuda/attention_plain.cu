/* Attention by plain fp32 arithmetic: for fp32 storage, and for head sizes and strides that the tensor-core kernels do
 * not take.
 *
 * A warp owns one row of the result and takes 32 partners at a time: first a lane has one partner and its dot products
 * with the row, then every lane has a few columns and goes through the 32 partners in order. Rows are numbered so that
 * the heads of a group are neighbours and find each other's keys in the cache. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_rows.cuh"

namespace {

constexpr int WARPS = 8, THREADS = WARPS * 32, HEAD_MAX = FLAP_OPS_CUDA_HEAD_MAX;

template <typename T>
__device__ __forceinline__ float dot(const float *row, const T *other, uint32_t head_size, bool aligned) {
  float sum = 0.0f;
  for (uint32_t d = 0; d < head_size; d += 8) {
    float x[8];
    load_eight(x, other + d, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum = fmaf(row[d + i], x[i], sum);
  }
  return sum;
}

/* ---- forward ---- */

template <typename T>
__global__ void __launch_bounds__(THREADS) attention_plain_forward_kernel(const attention_args args) {
  __shared__ float shared[WARPS][HEAD_MAX];
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * WARPS + warp;
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const query_row r = query_row_of(args, row);
  const bool aligned = aligned_rows(args);
  float *q = shared[warp];
  share_row(q, static_cast<const T *>(args.q) + query_offset(args, r.sequence, r.query, r.head), args.head_size,
            aligned);
  const uint32_t end = args.first_position + r.query + 1;
  float maximum = -INFINITY, sum = 0.0f;
  lane_columns out = zero_columns();
  for (uint32_t key = 0; key < end; key += 32) {
    const uint32_t count = min(32u, end - key);
    const uint64_t offset = key_offset(args, r.sequence, key, r.kv_head);
    float score = -INFINITY;
    if (lane < count)
      score =
          dot(q, static_cast<const T *>(args.k) + offset + lane * args.kv_stride, args.head_size, aligned) * args.scale;
    const float top = fmaxf(maximum, warp_max(score)), factor = expf(maximum - top), p = expf(score - top);
    sum = fmaf(sum, factor, p);
#pragma unroll
    for (int i = 0; i < ATTENTION_PAIRS; ++i) {
      out.pair[i].x *= factor;
      out.pair[i].y *= factor;
    }
    add_rows(out, p, static_cast<const T *>(args.v) + offset, args.kv_stride, count, args.head_size, aligned);
    maximum = top;
  }
  sum = warp_sum(sum);
  store_columns(static_cast<T *>(args.out) + r.packed, out, 1.0f / sum, args.head_size);
  if (args.lse_out != NULL && lane == 0)
    args.lse_out[r.statistic] = maximum + logf(sum);
}

/* ---- backward ---- */

/* lse in powers of two, and the row sum of dout * out; a warp per row of (B, queries, HQ). */
template <typename T>
__global__ void __launch_bounds__(THREADS) attention_statistics_kernel(const attention_args args) {
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const uint64_t token = row / args.heads, offset = row * args.head_size;
  const bool aligned = aligned_rows(args);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < ATTENTION_PAIRS; ++i)
    if (column_of(i) < args.head_size) {
      const float2 a = load_pair(static_cast<const T *>(args.out_in) + offset + column_of(i), aligned);
      const float2 b = load_pair(static_cast<const T *>(args.dout) + offset + column_of(i), aligned);
      sum = fmaf(a.x, b.x, sum);
      sum = fmaf(a.y, b.y, sum);
    }
  sum = warp_sum(sum);
  const uint64_t to = (token / args.queries * args.heads + row % args.heads) * args.queries + token % args.queries;
  if ((threadIdx.x & 31) == 0)
    const_cast<float2 *>(args.statistics)[to] = make_float2(args.lse_in[to] * ATTENTION_LOG2_E, sum);
}

/* The same for rows of whole chunks of 16 bytes, at 16-byte addresses: LANES lanes per row, at memory's speed. */
template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS) attention_statistics_chunks_kernel(const attention_args args) {
  const uint64_t rows = static_cast<uint64_t>(args.batch) * args.heads * args.queries;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const uint32_t lane = threadIdx.x % LANES;
  const bool has_row = row < rows;
  float sum = 0.0f;
  if (has_row && lane * 8 < args.head_size) {
    const uint64_t at = row * args.head_size + lane * 8;
    const uint4 a = *reinterpret_cast<const uint4 *>(static_cast<const T *>(args.out_in) + at);
    const uint4 b = *reinterpret_cast<const uint4 *>(static_cast<const T *>(args.dout) + at);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = tensor_element<T>::unpack(left[i]), y = tensor_element<T>::unpack(right[i]);
      sum = fmaf(x.x, y.x, sum);
      sum = fmaf(x.y, y.y, sum);
    }
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (!has_row || lane != 0)
    return;
  const uint64_t token = row / args.heads;
  const uint64_t to = (token / args.queries * args.heads + row % args.heads) * args.queries + token % args.queries;
  const_cast<float2 *>(args.statistics)[to] = make_float2(args.lse_in[to] * ATTENTION_LOG2_E, sum);
}

template <typename T> cudaError_t statistics_of_chunks(const attention_args &args, cudaStream_t stream) {
  const bool narrow = args.head_size <= 64;
  const uint64_t rows = static_cast<uint64_t>(args.batch) * args.heads * args.queries,
                 per_block = THREADS / (narrow ? 8 : 16);
  return attention_launch(narrow ? attention_statistics_chunks_kernel<T, 8> : attention_statistics_chunks_kernel<T, 16>,
                          (rows + per_block - 1) / per_block, THREADS, 0, args, stream);
}

template <typename T> __global__ void __launch_bounds__(THREADS) attention_plain_dq_kernel(const attention_args args) {
  __shared__ float shared[WARPS][2][HEAD_MAX];
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * WARPS + warp;
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const query_row r = query_row_of(args, row);
  const uint64_t q_offset = query_offset(args, r.sequence, r.query, r.head);
  const bool aligned = aligned_rows(args);
  float *q = shared[warp][0], *dout = shared[warp][1];
  share_row(q, static_cast<const T *>(args.q) + q_offset, args.head_size, aligned);
  share_row(dout, static_cast<const T *>(args.dout) + r.packed, args.head_size, aligned);
  const float lse = args.lse_in[r.statistic], delta = args.statistics[r.statistic].y;
  lane_columns dq = zero_columns();
  for (uint32_t key = 0; key <= r.query; key += 32) {
    const uint32_t count = min(32u, r.query + 1 - key);
    const uint64_t offset = key_offset(args, r.sequence, key, r.kv_head), mine = offset + lane * args.kv_stride;
    float gradient = 0.0f;
    if (lane < count) {
      const float score = dot(q, static_cast<const T *>(args.k) + mine, args.head_size, aligned);
      const float dp = dot(dout, static_cast<const T *>(args.v) + mine, args.head_size, aligned);
      gradient = expf(fmaf(score, args.scale, -lse)) * (dp - delta) * args.scale;
    }
    add_rows(dq, gradient, static_cast<const T *>(args.k) + offset, args.kv_stride, count, args.head_size, aligned);
  }
  store_columns(static_cast<T *>(args.dq) + q_offset, dq, 1.0f, args.head_size);
}

/* A warp per key: the heads of the group in order, the queries of each upwards. */
template <typename T> __global__ void __launch_bounds__(THREADS) attention_plain_dkv_kernel(const attention_args args) {
  __shared__ float shared[WARPS][2][HEAD_MAX];
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = args.heads / args.kv_heads;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * WARPS + warp;
  if (row >= static_cast<uint64_t>(args.batch) * args.kv_heads * args.keys)
    return;
  const uint32_t key = static_cast<uint32_t>(row % args.keys);
  const uint32_t kv_head = static_cast<uint32_t>(row / args.keys % args.kv_heads);
  const uint32_t sequence = static_cast<uint32_t>(row / args.keys / args.kv_heads);
  const uint64_t kv_offset = key_offset(args, sequence, key, kv_head);
  const bool aligned = aligned_rows(args);
  float *k = shared[warp][0], *v = shared[warp][1];
  share_row(k, static_cast<const T *>(args.k) + kv_offset, args.head_size, aligned);
  share_row(v, static_cast<const T *>(args.v) + kv_offset, args.head_size, aligned);
  const uint64_t packed_stride = static_cast<uint64_t>(args.heads) * args.head_size;
  lane_columns dk = zero_columns(), dv = zero_columns();
  for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (uint32_t query = key; query < args.queries; query += 32) {
      const uint32_t count = min(32u, args.queries - query);
      const T *q = static_cast<const T *>(args.q) + query_offset(args, sequence, query, head);
      const T *dout = static_cast<const T *>(args.dout) +
                      (static_cast<uint64_t>(sequence) * args.queries + query) * packed_stride + head * args.head_size;
      float p = 0.0f, gradient = 0.0f;
      if (lane < count) {
        const uint64_t at = (static_cast<uint64_t>(sequence) * args.heads + head) * args.queries + query + lane;
        const float score = dot(k, q + lane * args.q_stride, args.head_size, aligned);
        const float dp = dot(v, dout + lane * packed_stride, args.head_size, aligned);
        p = expf(fmaf(score, args.scale, -args.lse_in[at]));
        gradient = p * (dp - args.statistics[at].y) * args.scale;
      }
      add_rows(dv, p, dout, packed_stride, count, args.head_size, aligned);
      add_rows(dk, gradient, q, args.q_stride, count, args.head_size, aligned);
    }
  store_columns(static_cast<T *>(args.dk) + kv_offset, dk, 1.0f, args.head_size);
  store_columns(static_cast<T *>(args.dv) + kv_offset, dv, 1.0f, args.head_size);
}

uint64_t row_blocks(uint64_t rows) {
  return (rows + WARPS - 1) / WARPS;
}

uint64_t query_rows(const attention_args &args) {
  return static_cast<uint64_t>(args.batch) * args.heads * args.queries;
}

template <typename T> cudaError_t forward(const attention_args &args, cudaStream_t stream) {
  return attention_launch(attention_plain_forward_kernel<T>, row_blocks(query_rows(args)), THREADS, 0, args, stream);
}

template <typename T> cudaError_t backward(const attention_args &args, cudaStream_t stream) {
  const uint64_t keys = static_cast<uint64_t>(args.batch) * args.kv_heads * args.keys;
  const cudaError_t status =
      attention_launch(attention_plain_dkv_kernel<T>, row_blocks(keys), THREADS, 0, args, stream);
  return status != cudaSuccess
             ? status
             : attention_launch(attention_plain_dq_kernel<T>, row_blocks(query_rows(args)), THREADS, 0, args, stream);
}

} // namespace

cudaError_t attention_statistics(const attention_args &args, flap_dtype dtype, float2 *statistics,
                                 cudaStream_t stream) {
  attention_args with = args;
  with.statistics = statistics;
  if (dtype != FLAP_F32 && args.head_size <= ATTENTION_MMA_HEAD_MAX && (args.q_stride | args.kv_stride) % 8 == 0)
    return dtype == FLAP_BF16 ? statistics_of_chunks<__nv_bfloat16>(with, stream)
                              : statistics_of_chunks<__half>(with, stream);
  void (*kernel)(const attention_args) = dtype == FLAP_F32    ? attention_statistics_kernel<float>
                                         : dtype == FLAP_BF16 ? attention_statistics_kernel<__nv_bfloat16>
                                                              : attention_statistics_kernel<__half>;
  return attention_launch(kernel, row_blocks(query_rows(args)), THREADS, 0, with, stream);
}

cudaError_t attention_forward_plain(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return dtype == FLAP_F32    ? forward<float>(args, stream)
         : dtype == FLAP_BF16 ? forward<__nv_bfloat16>(args, stream)
                              : forward<__half>(args, stream);
}

cudaError_t attention_backward_plain(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return dtype == FLAP_F32    ? backward<float>(args, stream)
         : dtype == FLAP_BF16 ? backward<__nv_bfloat16>(args, stream)
                              : backward<__half>(args, stream);
}
