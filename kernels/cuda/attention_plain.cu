/* Attention by plain fp32 arithmetic: for fp32 storage, for head sizes and strides that the tensor-core kernels do not
 * take, and for few queries against many keys, where reading the keys is all that costs.
 *
 * A warp owns one row of the result and takes 32 partners at a time: first a lane has one partner and its dot products
 * with the row, then every lane has a few columns and goes through the 32 partners in order. Rows are numbered so that
 * the heads of a group are neighbours and find each other's keys in the cache. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_tiles.cuh"

namespace {

constexpr int WARPS = 8, THREADS = WARPS * 32, HEAD_MAX = FLAP_CUDA_ATTENTION_HEAD_MAX, PAIRS = HEAD_MAX / 64;
constexpr uint32_t PART_KEYS = 256, PARTS_MAX = 64;
constexpr uint32_t ALL_LANES = 0xffffffffu;

/* ---- rows of a storage type ---- */

__device__ __forceinline__ float2 load_pair(const float *from) {
  return make_float2(from[0], from[1]);
}
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16 *from) {
  return make_float2(__bfloat162float(from[0]), __bfloat162float(from[1]));
}
__device__ __forceinline__ float2 load_pair(const __half *from) {
  return make_float2(__half2float(from[0]), __half2float(from[1]));
}

__device__ __forceinline__ void store_pair(float *to, float2 x) {
  to[0] = x.x;
  to[1] = x.y;
}
__device__ __forceinline__ void store_pair(__nv_bfloat16 *to, float2 x) {
  to[0] = __float2bfloat16_rn(x.x);
  to[1] = __float2bfloat16_rn(x.y);
}
__device__ __forceinline__ void store_pair(__half *to, float2 x) {
  to[0] = __float2half_rn(x.x);
  to[1] = __float2half_rn(x.y);
}

/* Eight neighbours, in one load where rows are aligned; the sums that follow do not depend on that. */
template <typename T> __device__ __forceinline__ void load_eight(float (&x)[8], const T *from, bool aligned) {
  if (aligned) {
    constexpr int PER_LOAD = 16 / sizeof(T);
    uint4 raw[8 / PER_LOAD];
#pragma unroll
    for (int i = 0; i < 8 / PER_LOAD; ++i)
      raw[i] = reinterpret_cast<const uint4 *>(from)[i];
    const T *values = reinterpret_cast<const T *>(raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = load_pair(values + 2 * i);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = load_pair(from + 2 * i);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

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

/* The lane's columns of a row: pairs at 2 * lane + 64 * i. */
struct lane_columns {
  float2 pair[PAIRS];
};

__device__ __forceinline__ uint32_t column_of(int i) {
  return 2 * (threadIdx.x & 31) + 64 * i;
}

__device__ __forceinline__ lane_columns zero_columns() {
  lane_columns zero;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    zero.pair[i] = make_float2(0.0f, 0.0f);
  return zero;
}

/* sum += weights of the lanes, in order, times `count` rows. */
template <typename T>
__device__ __forceinline__ void add_rows(lane_columns &sum, float weight, const T *rows, uint64_t stride,
                                         uint32_t count, uint32_t head_size) {
  for (uint32_t j = 0; j < count; ++j) {
    const float w = __shfl_sync(ALL_LANES, weight, static_cast<int>(j));
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
      if (column_of(i) < head_size) {
        const float2 x = load_pair(rows + j * stride + column_of(i));
        sum.pair[i].x = fmaf(w, x.x, sum.pair[i].x);
        sum.pair[i].y = fmaf(w, x.y, sum.pair[i].y);
      }
  }
}

template <typename T>
__device__ __forceinline__ void store_columns(T *to, const lane_columns &x, float factor, uint32_t head_size) {
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    if (column_of(i) < head_size)
      store_pair(to + column_of(i), make_float2(x.pair[i].x * factor, x.pair[i].y * factor));
}

/* A row into the warp's shared memory, as fp32. */
template <typename T> __device__ __forceinline__ void share_row(float *shared, const T *row, uint32_t head_size) {
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    if (column_of(i) < head_size)
      store_pair(shared + column_of(i), load_pair(row + column_of(i)));
  __syncwarp();
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

/* Where a row of queries lies. Rows are numbered (B, HKV, queries, head of the group). */
struct query_row {
  uint32_t sequence, kv_head, head, query;
  uint64_t packed, statistic; /* in (B, queries, HQ, HD) and in (B, HQ, queries) */
};

__device__ __forceinline__ query_row query_row_of(const attention_args &args, uint64_t row) {
  const uint32_t group = args.heads / args.kv_heads;
  query_row r;
  const uint32_t in_group = static_cast<uint32_t>(row % group);
  r.query = static_cast<uint32_t>(row / group % args.queries);
  const uint64_t unit = row / group / args.queries;
  r.kv_head = static_cast<uint32_t>(unit % args.kv_heads);
  r.sequence = static_cast<uint32_t>(unit / args.kv_heads);
  r.head = r.kv_head * group + in_group;
  const uint64_t token = static_cast<uint64_t>(r.sequence) * args.queries + r.query;
  r.packed = (token * args.heads + r.head) * args.head_size;
  r.statistic = (static_cast<uint64_t>(r.sequence) * args.heads + r.head) * args.queries + r.query;
  return r;
}

__device__ __forceinline__ uint64_t query_offset(const attention_args &args, uint32_t sequence, uint32_t query,
                                                 uint32_t head) {
  return (static_cast<uint64_t>(sequence) * args.queries + query) * args.q_stride + head * args.head_size;
}

__device__ __forceinline__ uint64_t key_offset(const attention_args &args, uint32_t sequence, uint32_t key,
                                               uint32_t kv_head) {
  return (static_cast<uint64_t>(sequence) * args.keys + key) * args.kv_stride + kv_head * args.head_size;
}

__device__ __forceinline__ bool aligned_rows(const attention_args &args) {
  return (args.q_stride | args.kv_stride) % 8 == 0;
}

/* ---- forward ---- */

/* One part of the keys for one row; blockIdx.y is the part. */
template <typename T>
__global__ void __launch_bounds__(THREADS) attention_plain_forward_kernel(const attention_args args) {
  __shared__ float shared[WARPS][HEAD_MAX];
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, part = blockIdx.x % args.parts;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x / args.parts) * WARPS + warp;
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const query_row r = query_row_of(args, row);
  float *q = shared[warp];
  share_row(q, static_cast<const T *>(args.q) + query_offset(args, r.sequence, r.query, r.head), args.head_size);
  const uint32_t part_keys = ((args.keys + args.parts - 1) / args.parts + 31) / 32 * 32;
  const uint32_t begin = part * part_keys;
  const uint32_t end = min(begin + part_keys, args.first_position + r.query + 1);
  const bool aligned = aligned_rows(args);
  float maximum = -INFINITY, sum = 0.0f;
  lane_columns out = zero_columns();
  for (uint32_t key = begin; key < end; key += 32) {
    const uint32_t count = min(32u, end - key);
    const uint64_t offset = key_offset(args, r.sequence, key, r.kv_head);
    float score = -INFINITY;
    if (lane < count)
      score =
          dot(q, static_cast<const T *>(args.k) + offset + lane * args.kv_stride, args.head_size, aligned) * args.scale;
    const float top = fmaxf(maximum, warp_max(score)), factor = expf(maximum - top), p = expf(score - top);
    sum = fmaf(sum, factor, p);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      out.pair[i].x *= factor;
      out.pair[i].y *= factor;
    }
    add_rows(out, p, static_cast<const T *>(args.v) + offset, args.kv_stride, count, args.head_size);
    maximum = top;
  }
  sum = warp_sum(sum);
  if (args.parts > 1) {
    float *to = args.partial + (row * args.parts + part) * (args.head_size + 2);
    store_columns(to + 2, out, 1.0f, args.head_size);
    if (lane == 0) {
      to[0] = maximum;
      to[1] = sum;
    }
    return;
  }
  store_columns(static_cast<T *>(args.out) + r.packed, out, 1.0f / sum, args.head_size);
  if (args.lse_out != NULL && lane == 0)
    args.lse_out[r.statistic] = maximum + logf(sum);
}

/* Joins the parts of a row, in order. */
template <typename T>
__global__ void __launch_bounds__(THREADS) attention_plain_join_kernel(const attention_args args) {
  const uint32_t lane = threadIdx.x & 31;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const query_row r = query_row_of(args, row);
  const float *parts = args.partial + row * args.parts * (args.head_size + 2);
  float maximum = -INFINITY, sum = 0.0f;
  for (uint32_t part = 0; part < args.parts; ++part)
    maximum = fmaxf(maximum, parts[part * (args.head_size + 2)]);
  lane_columns out = zero_columns();
  for (uint32_t part = 0; part < args.parts; ++part) {
    const float *from = parts + part * (args.head_size + 2);
    const float factor = expf(from[0] - maximum); /* 0 for a part that the row does not see */
    sum = fmaf(from[1], factor, sum);
    add_rows(out, factor, from + 2, 0, 1, args.head_size);
  }
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
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    if (column_of(i) < args.head_size) {
      const float2 a = load_pair(static_cast<const T *>(args.out_in) + offset + column_of(i));
      const float2 b = load_pair(static_cast<const T *>(args.dout) + offset + column_of(i));
      sum = fmaf(a.x, b.x, sum);
      sum = fmaf(a.y, b.y, sum);
    }
  sum = warp_sum(sum);
  const uint64_t to = (token / args.queries * args.heads + row % args.heads) * args.queries + token % args.queries;
  if ((threadIdx.x & 31) == 0)
    const_cast<float2 *>(args.statistics)[to] = make_float2(args.lse_in[to] * ATTENTION_LOG2_E, sum);
}

template <typename T> __global__ void __launch_bounds__(THREADS) attention_plain_dq_kernel(const attention_args args) {
  __shared__ float shared[WARPS][2][HEAD_MAX];
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * WARPS + warp;
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const query_row r = query_row_of(args, row);
  const uint64_t q_offset = query_offset(args, r.sequence, r.query, r.head);
  float *q = shared[warp][0], *dout = shared[warp][1];
  share_row(q, static_cast<const T *>(args.q) + q_offset, args.head_size);
  share_row(dout, static_cast<const T *>(args.dout) + r.packed, args.head_size);
  const float lse = args.lse_in[r.statistic], delta = args.statistics[r.statistic].y;
  const bool aligned = aligned_rows(args);
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
    add_rows(dq, gradient, static_cast<const T *>(args.k) + offset, args.kv_stride, count, args.head_size);
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
  float *k = shared[warp][0], *v = shared[warp][1];
  share_row(k, static_cast<const T *>(args.k) + kv_offset, args.head_size);
  share_row(v, static_cast<const T *>(args.v) + kv_offset, args.head_size);
  const bool aligned = aligned_rows(args);
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
      add_rows(dv, p, dout, packed_stride, count, args.head_size);
      add_rows(dk, gradient, q, args.q_stride, count, args.head_size);
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
  const uint64_t blocks = row_blocks(query_rows(args));
  cudaError_t status =
      attention_launch(attention_plain_forward_kernel<T>, blocks * args.parts, THREADS, 0, args, stream);
  if (status == cudaSuccess && args.parts > 1)
    status = attention_launch(attention_plain_join_kernel<T>, blocks, THREADS, 0, args, stream);
  return status;
}

template <typename T> cudaError_t backward(const attention_args &args, cudaStream_t stream) {
  const uint64_t keys = static_cast<uint64_t>(args.batch) * args.kv_heads * args.keys;
  const cudaError_t status =
      attention_launch(attention_plain_dkv_kernel<T>, row_blocks(keys), THREADS, 0, args, stream);
  return status != cudaSuccess
             ? status
             : attention_launch(attention_plain_dq_kernel<T>, row_blocks(query_rows(args)), THREADS, 0, args, stream);
}

uint32_t parts_of(uint32_t keys) {
  const uint32_t parts = (keys + PART_KEYS - 1) / PART_KEYS;
  return parts < PARTS_MAX ? parts : PARTS_MAX;
}

} // namespace

uint32_t attention_forward_plain_parts(const flap_cuda_attention_shape *shape) {
  return shape->queries <= ATTENTION_FEW_QUERIES ? parts_of(shape->keys) : 1;
}

uint64_t attention_forward_plain_partial_bytes(const flap_cuda_attention_shape *shape) {
  const uint64_t queries = shape->queries < ATTENTION_FEW_QUERIES ? shape->queries : ATTENTION_FEW_QUERIES;
  const uint32_t parts = parts_of(shape->keys);
  return parts > 1 ? queries * shape->batch * shape->heads * parts * (shape->head_size + 2) * sizeof(float) : 0;
}

cudaError_t attention_statistics(const attention_args &args, flap_dtype dtype, float2 *statistics,
                                 cudaStream_t stream) {
  attention_args with = args;
  with.statistics = statistics;
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
