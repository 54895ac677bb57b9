/* Few queries against many keys: what counts is to read each key and value once, at memory's speed.
 *
 * The keys are cut into parts, as many for every device, and a block takes one part of one key-value head for R rows:
 * the query heads of a group, of one query after the other. As many lanes as a key has chunks of eight columns, a team,
 * work on one key at a time for all R rows, so that keys and values are read whole and once. Teams of a block have the
 * keys of the part in turn, each with a running maximum and sum; they are joined in order at the end of the block, and
 * the parts by a second kernel. */
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_rows.cuh"

namespace {

constexpr int THREADS = 128, DEPTH = 4; /* keys that a team has in flight */

template <int R> struct team_state { float out[R][8], maximum[R], sum[R]; };

/* DEPTH keys from `key` on, `step` apart. `column` is the lane's first; those past the head's size count as zero. */
template <typename T, int R>
__device__ __forceinline__ void add_keys(team_state<R> &state, const attention_args &args, const float (&q)[R][8],
                                         const uint32_t (&seen)[R], const T *k, const T *v, uint32_t key, uint32_t step,
                                         uint32_t end, uint32_t column, uint32_t lanes, bool aligned) {
  float x[DEPTH][8], score[R][DEPTH];
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      x[i][c] = 0.0f;
    if (key + i * step < end && column < args.head_size)
      load_eight(x[i], k + (key + i * step) * args.kv_stride + column, aligned);
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c)
        sum = fmaf(q[r][c], x[i][c], sum);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        if (static_cast<uint32_t>(distance) < lanes)
          sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      score[r][i] = key + i * step < seen[r] && key + i * step < end ? sum * args.scale_log2 : -INFINITY;
    }
#pragma unroll
  for (int i = 0; i < DEPTH; ++i)
    if (key + i * step < end && column < args.head_size)
      load_eight(x[i], v + (key + i * step) * args.kv_stride + column, aligned);
    else
#pragma unroll
      for (int c = 0; c < 8; ++c)
        x[i][c] = 0.0f;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float top = state.maximum[r];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
      top = fmaxf(top, score[r][i]);
    const float base = top == -INFINITY ? 0.0f : top, factor = attention_exp2(state.maximum[r] - base);
    state.sum[r] *= factor;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      state.out[r][c] *= factor;
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      const float p = attention_exp2(score[r][i] - base);
      state.sum[r] += p;
#pragma unroll
      for (int c = 0; c < 8; ++c)
        state.out[r][c] = fmaf(p, x[i][c], state.out[r][c]);
    }
    state.maximum[r] = top;
  }
}

/* Joins the teams of the block in order and writes the part of each row: maximum, sum, unscaled out. */
template <int R>
__device__ __forceinline__ void join_teams(const attention_args &args, const team_state<R> &state, uint64_t row,
                                           uint32_t rows, uint32_t part, uint32_t lanes) {
  __shared__ float out[R][THREADS * 8];
  __shared__ float maximum[R][THREADS], sum[R][THREADS];
  const uint32_t team = threadIdx.x / lanes, teams = THREADS / lanes, width = lanes * 8;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    maximum[r][team] = state.maximum[r]; /* the lanes of a team agree */
    sum[r][team] = state.sum[r];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      out[r][threadIdx.x * 8 + c] = state.out[r][c];
  }
  __syncthreads();
  for (uint32_t index = threadIdx.x; index < R * width; index += THREADS) {
    const uint32_t r = index / width, column = index % width;
    if (r >= rows || column >= args.head_size)
      continue;
    float top = -INFINITY, total = 0.0f, all = 0.0f;
    for (uint32_t i = 0; i < teams; ++i)
      top = fmaxf(top, maximum[r][i]);
    const float base = top == -INFINITY ? 0.0f : top;
    for (uint32_t i = 0; i < teams; ++i) {
      const float factor = attention_exp2(maximum[r][i] - base);
      total = fmaf(factor, sum[r][i], total);
      all = fmaf(factor, out[r][i * width + column], all);
    }
    float *to = args.partial + ((row + r) * args.parts + part) * (args.head_size + 2);
    to[2 + column] = all;
    if (column == 0) {
      to[0] = top;
      to[1] = total;
    }
  }
}

template <typename T, int R>
__global__ void __launch_bounds__(THREADS) attention_few_kernel(const attention_args args) {
  const uint32_t group = args.heads / args.kv_heads, unit_rows = args.queries * group;
  const uint32_t row_groups = (unit_rows + R - 1) / R;
  const uint32_t part = blockIdx.x % args.parts, unit = blockIdx.x / args.parts / row_groups;
  const uint32_t row_first = blockIdx.x / args.parts % row_groups * R, rows = min(unit_rows - row_first, R);
  const uint64_t row = static_cast<uint64_t>(unit) * unit_rows + row_first;
  uint32_t lanes = 1; /* of a team */
  while (lanes * 8 < args.head_size)
    lanes *= 2;
  const uint32_t team = threadIdx.x / lanes, teams = THREADS / lanes, column = threadIdx.x % lanes * 8;
  const bool aligned = aligned_rows(args);
  float q[R][8];
  uint32_t seen[R], last = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const query_row at = query_row_of(args, row + min(static_cast<uint32_t>(r), rows - 1));
    seen[r] = args.first_position + at.query + 1;
    last = max(last, seen[r]);
#pragma unroll
    for (int c = 0; c < 8; ++c)
      q[r][c] = 0.0f;
    if (column < args.head_size)
      load_eight(q[r], static_cast<const T *>(args.q) + query_offset(args, at.sequence, at.query, at.head) + column,
                 aligned);
  }
  const uint64_t base = key_offset(args, unit / args.kv_heads, 0, unit % args.kv_heads);
  const T *k = static_cast<const T *>(args.k) + base, *v = static_cast<const T *>(args.v) + base;
  team_state<R> state;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    state.maximum[r] = -INFINITY;
    state.sum[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      state.out[r][c] = 0.0f;
  }
  const uint32_t part_keys = (args.keys + args.parts - 1) / args.parts;
  const uint32_t end = min((part + 1) * part_keys, last);
  for (uint32_t key = part * part_keys; key < end; key += teams * DEPTH) /* all lanes of a warp go round as often */
    add_keys<T, R>(state, args, q, seen, k, v, key + team, teams, end, column, lanes, aligned);
  join_teams<R>(args, state, row, rows, part, lanes);
}

/* Joins the parts of a row, in order. */
template <typename T> __global__ void __launch_bounds__(THREADS) attention_few_join_kernel(const attention_args args) {
  const uint32_t lane = threadIdx.x & 31;
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * (THREADS / 32) + (threadIdx.x >> 5);
  if (row >= static_cast<uint64_t>(args.batch) * args.heads * args.queries)
    return;
  const query_row r = query_row_of(args, row);
  const uint32_t stride = args.head_size + 2;
  const float *parts = args.partial + row * args.parts * stride;
  float maximum = -INFINITY, sum = 0.0f;
  for (uint32_t part = lane; part < args.parts; part += 32)
    maximum = fmaxf(maximum, parts[part * stride]);
  maximum = warp_max(maximum);
  lane_columns out = zero_columns();
#pragma unroll 4
  for (uint32_t part = 0; part < args.parts; ++part) {
    const float *from = parts + part * stride;
    const float factor = attention_exp2(from[0] - maximum); /* 0 for a part that the row does not see */
    sum = fmaf(from[1], factor, sum);
#pragma unroll
    for (int i = 0; i < ATTENTION_PAIRS; ++i)
      if (column_of(i) < args.head_size) {
        const float2 x = load_pair(from + 2 + column_of(i), true);
        out.pair[i].x = fmaf(factor, x.x, out.pair[i].x);
        out.pair[i].y = fmaf(factor, x.y, out.pair[i].y);
      }
  }
  store_columns(static_cast<T *>(args.out) + r.packed, out, 1.0f / sum, args.head_size);
  if (args.lse_out != NULL && lane == 0)
    args.lse_out[r.statistic] = fmaf(maximum, ATTENTION_LN_2, logf(sum));
}

template <typename T, int R> cudaError_t launch(const attention_args &args, cudaStream_t stream) {
  const uint64_t unit_rows = static_cast<uint64_t>(args.queries) * (args.heads / args.kv_heads);
  const uint64_t units = static_cast<uint64_t>(args.batch) * args.kv_heads;
  const cudaError_t status = attention_launch(attention_few_kernel<T, R>,
                                              units * ((unit_rows + R - 1) / R) * args.parts, THREADS, 0, args, stream);
  return status != cudaSuccess
             ? status
             : attention_launch(attention_few_join_kernel<T>, (units * unit_rows + THREADS / 32 - 1) / (THREADS / 32),
                                THREADS, 0, args, stream);
}

template <typename T> cudaError_t launch(const attention_args &args, cudaStream_t stream) {
  return args.queries * (args.heads / args.kv_heads) == 1 ? launch<T, 1>(args, stream) : launch<T, 4>(args, stream);
}

} // namespace

cudaError_t attention_forward_few(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  attention_args with = args;
  with.parts = cuda_attention_few_parts(args.keys);
  return dtype == FLAP_F32    ? launch<float>(with, stream)
         : dtype == FLAP_BF16 ? launch<__nv_bfloat16>(with, stream)
                              : launch<__half>(with, stream);
}
