/* What the attention kernels of plain fp32 arithmetic share: rows of any storage type, spread over the lanes of a warp,
 * and where the rows of an operand lie. */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_ROWS_CUH
#define FLAP_KERNELS_CUDA_ATTENTION_ROWS_CUH

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.cuh"

namespace {

constexpr int ATTENTION_PAIRS = FLAP_OPS_CUDA_HEAD_MAX / 64; /* of columns, that a lane has of a row */

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

/* Two neighbours, from an even place of a row. Rows that are aligned are read by whole words, and only that. */
template <typename T> __device__ __forceinline__ float2 load_pair(const T *from, bool aligned) {
  struct alignas(2 * sizeof(T)) pair {
    T x, y;
  };
  if (aligned) {
    const pair both = *reinterpret_cast<const pair *>(from);
    return make_float2(to_float(both.x), to_float(both.y));
  }
  return make_float2(to_float(from[0]), to_float(from[1]));
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
  struct alignas(16) eight {
    T x[8];
  } raw;
  if (aligned)
    raw = *reinterpret_cast<const eight *>(from);
  else
    for (int i = 0; i < 8; ++i)
      raw.x[i] = from[i];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    x[i] = to_float(raw.x[i]);
}

/* The lane's columns of a row: pairs at 2 * lane + 64 * i. */
struct lane_columns {
  float2 pair[ATTENTION_PAIRS];
};

__device__ __forceinline__ uint32_t column_of(int i) {
  return 2 * (threadIdx.x & 31) + 64 * i;
}

__device__ __forceinline__ lane_columns zero_columns() {
  lane_columns zero;
#pragma unroll
  for (int i = 0; i < ATTENTION_PAIRS; ++i)
    zero.pair[i] = make_float2(0.0f, 0.0f);
  return zero;
}

/* sum += weights of the lanes, in order, times `count` rows. */
template <typename T>
__device__ __forceinline__ void add_rows(lane_columns &sum, float weight, const T *rows, uint64_t stride,
                                         uint32_t count, uint32_t head_size, bool aligned) {
  for (uint32_t j = 0; j < count; ++j) {
    const float w = __shfl_sync(0xffffffffu, weight, static_cast<int>(j));
#pragma unroll
    for (int i = 0; i < ATTENTION_PAIRS; ++i)
      if (column_of(i) < head_size) {
        const float2 x = load_pair(rows + j * stride + column_of(i), aligned);
        sum.pair[i].x = fmaf(w, x.x, sum.pair[i].x);
        sum.pair[i].y = fmaf(w, x.y, sum.pair[i].y);
      }
  }
}

template <typename T>
__device__ __forceinline__ void store_columns(T *to, const lane_columns &x, float factor, uint32_t head_size) {
#pragma unroll
  for (int i = 0; i < ATTENTION_PAIRS; ++i)
    if (column_of(i) < head_size)
      store_pair(to + column_of(i), make_float2(x.pair[i].x * factor, x.pair[i].y * factor));
}

/* A row into the warp's shared memory, as fp32. */
template <typename T>
__device__ __forceinline__ void share_row(float *shared, const T *row, uint32_t head_size, bool aligned) {
#pragma unroll
  for (int i = 0; i < ATTENTION_PAIRS; ++i)
    if (column_of(i) < head_size)
      store_pair(shared + column_of(i), load_pair(row + column_of(i), aligned));
  __syncwarp();
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
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

} // namespace

#endif
