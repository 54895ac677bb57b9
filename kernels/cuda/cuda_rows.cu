/* Element-wise operations, rotations, the embedding and column sums. */
#include "kernels/cuda/cuda_elements.cuh"

#define THREADS 256u
/* A thread takes several groups of a long array, in strides of the grid. */
#define GRID_MAX 8192u

static uint32_t grid_for(uint64_t threads) {
  const uint64_t blocks = cuda_ceil(threads, THREADS);
  return blocks < GRID_MAX ? (uint32_t)blocks : GRID_MAX;
}

/* ---- add ---- */

template <typename T> __global__ void add_kernel(T *out, const T *a, const T *b, uint64_t elements, bool vectors) {
  const uint64_t groups = (elements + GROUP - 1) / GROUP;
  for (uint64_t group = blockIdx.x * (uint64_t)THREADS + threadIdx.x; group < groups;
       group += (uint64_t)gridDim.x * THREADS) {
    const uint64_t at = group * GROUP, left = elements - at;
    const uint32_t valid = left < GROUP ? (uint32_t)left : GROUP;
    const bool whole = vectors && valid == GROUP;
    float left_values[GROUP], right_values[GROUP];
    load_group(left_values, a + at, valid, whole);
    load_group(right_values, b + at, valid, whole);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      left_values[i] += right_values[i];
    store_group(out + at, left_values, valid, whole);
  }
}

void cuda_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements) {
  if (elements == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const bool vectors = aligned16(out) && aligned16(a) && aligned16(b);
  CUDA_FOR_DTYPE(dtype, T,
                 add_kernel<T><<<grid_for(cuda_ceil(elements, GROUP)), THREADS, 0, stream>>>(
                     (T *)out, (const T *)a, (const T *)b, elements, vectors));
  cuda_launched(ops, "add");
}

/* ---- bias: a block sums some columns over a part of the tokens; the parts are added in order ---- */

#define BIAS_LANES 8u /* groups of columns side by side: 64 columns */
#define BIAS_ROWS 32u
#define BIAS_COLUMNS (BIAS_LANES * GROUP)

/* parts (gridDim.y, n) = sums over the tokens of each part. */
template <typename T>
__global__ void __launch_bounds__(BIAS_LANES *BIAS_ROWS)
    bias_kernel(float *parts, const T *dy, uint32_t tokens, uint32_t n, uint32_t ld, bool vectors) {
  __shared__ float shared[BIAS_ROWS][BIAS_COLUMNS + 1];
  const uint32_t column = blockIdx.x * BIAS_COLUMNS + threadIdx.x * GROUP;
  const uint32_t valid = column < n ? min(n - column, GROUP) : 0;
  const uint32_t per_part = (tokens + gridDim.y - 1) / gridDim.y;
  const uint32_t first = blockIdx.y * per_part, last = min(first + per_part, tokens);
  const bool whole = vectors && valid == GROUP;
  float sum[GROUP] = {};
  if (valid > 0) {
#pragma unroll 4
    for (uint32_t token = first + threadIdx.y; token < last; token += BIAS_ROWS) {
      float values[GROUP];
      load_group(values, dy + (uint64_t)token * ld + column, valid, whole);
#pragma unroll
      for (uint32_t i = 0; i < GROUP; ++i)
        sum[i] += values[i];
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    shared[threadIdx.y][threadIdx.x * GROUP + i] = sum[i];
  __syncthreads();
  const uint32_t mine = threadIdx.y * BIAS_LANES + threadIdx.x, at = blockIdx.x * BIAS_COLUMNS + mine;
  if (mine >= BIAS_COLUMNS || at >= n)
    return;
  float total = 0;
  for (uint32_t row = 0; row < BIAS_ROWS; ++row)
    total += shared[row][mine];
  parts[(uint64_t)blockIdx.y * n + at] = total;
}

void cuda_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                        uint32_t ld) {
  if (tokens == 0 || n == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const bool vectors = rows_aligned(dtype, dy, ld);
  const uint32_t parts = cuda_bias_parts(tokens);
  const uint64_t fitting = cuda_scratch_bytes(ops) / (parts * sizeof(float)) / BIAS_COLUMNS * BIAS_COLUMNS;
  const uint32_t columns_max = fitting < n ? (uint32_t)fitting : n; /* wider than any bias of the limits */
  float *scratch = (float *)cuda_scratch(ops);
  flap_assert(columns_max > 0);
  for (uint32_t column = 0; column < n; column += columns_max) {
    const uint32_t columns = cuda_min(columns_max, n - column);
    const dim3 grid((uint32_t)cuda_ceil(columns, BIAS_COLUMNS), parts), threads(BIAS_LANES, BIAS_ROWS);
    CUDA_FOR_DTYPE(dtype, T,
                   bias_kernel<T>
                   <<<grid, threads, 0, stream>>>(scratch, (const T *)dy + column, tokens, columns, ld, vectors));
    cuda_launched(ops, "bias backward");
    cuda_fold_rows(ops, dbias + column, scratch, parts, columns);
  }
}

template <typename T>
__global__ void bias_prepare_kernel(float *c, const T *bias, uint32_t n, uint32_t ldc, bool accumulate) {
  const uint32_t column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= n)
    return;
  float *at = c + (uint64_t)blockIdx.y * ldc + column;
  *at = (accumulate ? *at : 0.0f) + to_float(bias[column]);
}

void cuda_bias_prepare(flap_ops *ops, flap_dtype dtype, float *c, const void *bias, uint32_t m, uint32_t n,
                       uint32_t ldc, bool accumulate) {
  const cudaStream_t stream = cuda_stream(ops);
  const uint32_t rows_max = 65535; /* of a grid */
  for (uint32_t row = 0; row < m; row += rows_max)
    CUDA_FOR_DTYPE(dtype, T,
                   bias_prepare_kernel<T>
                   <<<dim3((uint32_t)cuda_ceil(n, THREADS), cuda_min(rows_max, m - row)), THREADS, 0, stream>>>(
                       c + (uint64_t)row * ldc, (const T *)bias, n, ldc, accumulate));
  cuda_launched(ops, "bias");
}

/* ---- embedding ---- */

/* Rows as words of 16 or 2 bytes: nothing is computed with them. */
template <typename W> __global__ void embedding_kernel(W *out, const int32_t *tokens, const W *table, uint32_t words) {
  const uint64_t to = (uint64_t)blockIdx.x * words, from = (uint64_t)tokens[blockIdx.x] * words;
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    out[to + i] = table[from + i];
}

void cuda_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                    uint32_t token_count, uint32_t hidden) {
  if (token_count == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const uint32_t bytes = hidden * (uint32_t)flap_dtype_bytes(dtype);
  if (rows_aligned(dtype, out, hidden) && rows_aligned(dtype, table, hidden))
    embedding_kernel<<<token_count, THREADS, 0, stream>>>((uint4 *)out, tokens, (const uint4 *)table, bytes / 16);
  else
    embedding_kernel<<<token_count, THREADS, 0, stream>>>((uint16_t *)out, tokens, (const uint16_t *)table, bytes / 2);
  cuda_launched(ops, "embedding");
}

#define RUN_AHEAD 4u /* rows under way at a time */

/* Block (i, columns): if a run of equal tokens starts at i, adds its rows one after another, as ops.h wants it. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    embedding_backward_kernel(float *dtable, const int32_t *tokens, const int32_t *order, const T *dx,
                              uint32_t token_count, uint32_t hidden, bool vectors) {
  const uint32_t first = blockIdx.x, column = (blockIdx.y * THREADS + threadIdx.x) * GROUP;
  const int32_t token = tokens[order[first]];
  if ((first > 0 && tokens[order[first - 1]] == token) || column >= hidden)
    return;
  const uint32_t valid = min(hidden - column, GROUP);
  float *row = dtable + (uint64_t)token * hidden + column;
  float sum[GROUP];
  load_group(sum, row, valid, vectors);
  for (uint32_t i = first;;) {
    uint32_t count = 0;
    int32_t positions[RUN_AHEAD];
#pragma unroll
    for (uint32_t k = 0; k < RUN_AHEAD; ++k) {
      positions[k] = i + k < token_count ? order[i + k] : 0;
      if (count == k && i + k < token_count && tokens[positions[k]] == token)
        ++count;
    }
    float values[RUN_AHEAD][GROUP];
#pragma unroll
    for (uint32_t k = 0; k < RUN_AHEAD; ++k)
      if (k < count)
        load_group(values[k], dx + (uint64_t)positions[k] * hidden + column, valid, vectors);
#pragma unroll
    for (uint32_t k = 0; k < RUN_AHEAD; ++k)
#pragma unroll
      for (uint32_t j = 0; j < GROUP; ++j)
        if (k < count)
          sum[j] += values[k][j];
    i += count;
    if (count < RUN_AHEAD)
      break;
  }
  store_group(row, sum, valid, vectors);
}

void cuda_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                             const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden) {
  if (token_count == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const bool vectors = hidden % GROUP == 0 && rows_aligned(FLAP_F32, dtable, hidden) && rows_aligned(dtype, dx, hidden);
  const dim3 grid(token_count, (uint32_t)cuda_ceil(hidden, THREADS * GROUP));
  CUDA_FOR_DTYPE(dtype, T,
                 embedding_backward_kernel<T>
                 <<<grid, THREADS, 0, stream>>>(dtable, tokens, order, (const T *)dx, token_count, hidden, vectors));
  cuda_launched(ops, "embedding backward");
}

/* ---- rope ---- */

struct rope_arguments {
  const float *cos_sin;
  uint32_t sequence, first_position, heads, half, ld;
  float sign;
};

/* Pairs of one head of one token: `count` of them from pair `i` on. */
template <typename T, uint32_t COUNT>
__device__ inline void rope_pairs(T *head, const float *table, uint32_t i, const rope_arguments &a) {
  float first[GROUP], second[GROUP], cosines[GROUP], sines[GROUP];
  load_group(first, head + i, COUNT, COUNT == GROUP);
  load_group(second, head + a.half + i, COUNT, COUNT == GROUP);
  load_group(cosines, table + i, COUNT, COUNT == GROUP);
  load_group(sines, table + a.half + i, COUNT, COUNT == GROUP);
#pragma unroll
  for (uint32_t k = 0; k < COUNT; ++k)
    rope_turn(first[k], second[k], cosines[k], a.sign * sines[k]);
  store_group(head + i, first, COUNT, COUNT == GROUP);
  store_group(head + a.half + i, second, COUNT, COUNT == GROUP);
}

/* A block per token; a thread has some pairs of some heads. */
template <typename T, uint32_t COUNT> __global__ void rope_kernel(T *x, const rope_arguments a) {
  const uint32_t token = blockIdx.x, per_head = a.half / COUNT;
  const uint64_t position = a.first_position + token % a.sequence;
  const float *table = a.cos_sin + position * 2 * a.half;
  for (uint32_t item = threadIdx.x; item < a.heads * per_head; item += blockDim.x)
    rope_pairs<T, COUNT>(x + (uint64_t)token * a.ld + (item / per_head) * 2 * a.half, table, item % per_head * COUNT,
                         a);
}

void cuda_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count, uint32_t sequence,
               uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld, bool inverse) {
  if (token_count == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const rope_arguments a = {cos_sin, sequence, first_position, heads, head_size / 2, ld, inverse ? -1.0f : 1.0f};
  const bool vectors = a.half % GROUP == 0 && rows_aligned(dtype, x, ld) && aligned16(cos_sin);
  const uint32_t items = heads * a.half / (vectors ? GROUP : 1);
  const uint32_t threads = cuda_min(THREADS, (uint32_t)cuda_ceil(items, WARP) * WARP);
  if (vectors)
    CUDA_FOR_DTYPE(dtype, T, rope_kernel<T, GROUP><<<token_count, threads, 0, stream>>>((T *)x, a));
  else
    CUDA_FOR_DTYPE(dtype, T, rope_kernel<T, 1><<<token_count, threads, 0, stream>>>((T *)x, a));
  cuda_launched(ops, "rope");
}

/* ---- swiglu ---- */

struct swiglu_arguments {
  uint32_t groups; /* of all rows together */
  uint32_t per_row, width, ld, ld_d;
  bool vectors;
};

/* Where a group is: its column, and offsets in packed rows, rows of gate and up, and rows of their gradients. */
struct swiglu_place {
  uint64_t packed, strided, strided_d;
  uint32_t valid;
  bool whole;
};

__device__ inline swiglu_place place_of(const swiglu_arguments &a, uint32_t group) {
  const uint32_t of_row = group / a.per_row, column = (group - of_row * a.per_row) * GROUP, left = a.width - column;
  const uint64_t row = of_row;
  swiglu_place p;
  p.packed = row * a.width + column;
  p.strided = row * a.ld + column;
  p.strided_d = row * a.ld_d + column;
  p.valid = left < GROUP ? left : GROUP;
  p.whole = a.vectors && p.valid == GROUP;
  return p;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) swiglu_kernel(T *out, const T *gate, const T *up, const swiglu_arguments a) {
  const uint64_t step = (uint64_t)gridDim.x * THREADS;
  for (uint64_t group = blockIdx.x * THREADS + threadIdx.x; group < a.groups; group += step) {
    const swiglu_place p = place_of(a, (uint32_t)group);
    float x[GROUP], u[GROUP];
    load_group(x, gate + p.strided, p.valid, p.whole);
    load_group(u, up + p.strided, p.valid, p.whole);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      x[i] = swiglu_value<T>(x[i], u[i]);
    store_group(out + p.packed, x, p.valid, p.whole);
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    swiglu_backward_kernel(T *dgate, T *dup, T *out, const T *dout, const T *gate, const T *up,
                           const swiglu_arguments a) {
  const uint64_t step = (uint64_t)gridDim.x * THREADS;
  for (uint64_t group = blockIdx.x * THREADS + threadIdx.x; group < a.groups; group += step) {
    const swiglu_place p = place_of(a, (uint32_t)group);
    float x[GROUP], u[GROUP], d[GROUP];
    load_group(x, gate + p.strided, p.valid, p.whole);
    load_group(u, up + p.strided, p.valid, p.whole);
    load_group(d, dout + p.packed, p.valid, p.whole);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i) {
      const swiglu_gradients gradients = swiglu_gradients_of<T>(x[i], u[i], d[i]);
      x[i] = gradients.gate, u[i] = gradients.up, d[i] = gradients.value;
    }
    if (out != nullptr)
      store_group(out + p.packed, d, p.valid, p.whole);
    store_group(dgate + p.strided_d, x, p.valid, p.whole);
    store_group(dup + p.strided_d, u, p.valid, p.whole);
  }
}

static swiglu_arguments swiglu_shape(uint32_t tokens, uint32_t width, uint32_t ld, uint32_t ld_d) {
  swiglu_arguments a = {};
  a.per_row = (uint32_t)cuda_ceil(width, GROUP);
  flap_assert((uint64_t)tokens * a.per_row <= UINT32_MAX);
  a.groups = tokens * a.per_row;
  a.width = width;
  a.ld = ld;
  a.ld_d = ld_d;
  return a;
}

void cuda_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                 uint32_t intermediate, uint32_t ld) {
  if (token_count == 0 || intermediate == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  swiglu_arguments a = swiglu_shape(token_count, intermediate, ld, ld);
  a.vectors = rows_aligned(dtype, out, intermediate) && rows_aligned(dtype, gate, ld) && rows_aligned(dtype, up, ld);
  CUDA_FOR_DTYPE(dtype, T,
                 swiglu_kernel<T>
                 <<<grid_for(a.groups), THREADS, 0, stream>>>((T *)out, (const T *)gate, (const T *)up, a));
  cuda_launched(ops, "swiglu");
}

void cuda_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                          const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                          uint32_t intermediate) {
  if (token_count == 0 || intermediate == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  swiglu_arguments a = swiglu_shape(token_count, intermediate, ld, ld_d);
  a.vectors = rows_aligned(dtype, dout, intermediate) && rows_aligned(dtype, gate, ld) && rows_aligned(dtype, up, ld) &&
              rows_aligned(dtype, dgate, ld_d) && rows_aligned(dtype, dup, ld_d) &&
              rows_aligned(dtype, out, intermediate);
  CUDA_FOR_DTYPE(dtype, T,
                 swiglu_backward_kernel<T><<<grid_for(a.groups), THREADS, 0, stream>>>(
                     (T *)dgate, (T *)dup, (T *)out, (const T *)dout, (const T *)gate, (const T *)up, a));
  cuda_launched(ops, "swiglu backward");
}

cudaError_t cuda_kernels_there(void) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, (const void *)add_kernel<float>);
}
