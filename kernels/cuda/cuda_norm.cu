/* RMSNorm: a block per row forward; backward a block per run of rows, which also sums its part of the weight's
 * gradient.
 *
 * Each thread has the same columns in every row: groups threadIdx, threadIdx + blockDim, ... The first HELD of them
 * stay in registers; rows wider than that are read again. The number of threads and of runs is a function of shape. */
#include "kernels/cuda/cuda_elements.cuh"

#define FORWARD_HELD 2u
#define FORWARD_THREADS 512u
/* The parts of dweight take about this many floats together, whatever the width. */
#define PARTS_ELEMENTS (1u << 20)
#define PARTS_MAX 1024u
#define PARTS_MIN 32u
#define FOLD_COLUMNS 32u
#define FOLD_ROWS 8u

/* x, or x + residual, which is stored too. */
template <typename T>
__device__ inline void load_normalised(float out[GROUP], T *sum_out, const T *x, const T *residual, uint32_t valid,
                                       bool vectors) {
  load_group(out, x, valid, vectors);
  if (residual == nullptr)
    return;
  float other[GROUP];
  load_group(other, residual, valid, vectors);
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    out[i] = rounded<T>(out[i] + other[i]);
  store_group(sum_out, out, valid, vectors);
}

template <typename T>
__device__ inline void store_normalised(T *out, const float x[GROUP], const T *weight, float rstd, uint32_t valid,
                                        bool vectors) {
  float w[GROUP], y[GROUP];
  load_group(w, weight, valid, vectors);
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    y[i] = rounded<T>(x[i] * rstd) * w[i];
  store_group(out, y, valid, vectors);
}

__device__ inline float add_squares(float sum, const float x[GROUP]) {
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    sum += x[i] * x[i];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(FORWARD_THREADS)
    norm_forward(T *out, float *rstd_out, T *sum_out, const T *x, const T *residual, const T *weight, uint32_t hidden,
                 float epsilon, bool vectors) {
  __shared__ float shared[WARP];
  const uint64_t row = (uint64_t)blockIdx.x * hidden;
  const uint32_t groups = (hidden + GROUP - 1) / GROUP, step = blockDim.x;
  float held[FORWARD_HELD][GROUP], squares = 0;
#pragma unroll
  for (uint32_t k = 0; k < FORWARD_HELD; ++k) {
    const uint32_t group = threadIdx.x + k * step, at = group * GROUP;
    if (group < groups) {
      load_normalised(held[k], sum_out + row + at, x + row + at, residual == nullptr ? nullptr : residual + row + at,
                      hidden - at, vectors);
      squares = add_squares(squares, held[k]);
    }
  }
  for (uint32_t group = threadIdx.x + FORWARD_HELD * step; group < groups; group += step) {
    float values[GROUP];
    const uint32_t at = group * GROUP;
    load_normalised(values, sum_out + row + at, x + row + at, residual == nullptr ? nullptr : residual + row + at,
                    hidden - at, vectors);
    squares = add_squares(squares, values);
  }
  const float rstd = 1.0f / sqrtf(block_sum(squares, shared) / (float)hidden + epsilon);
  if (threadIdx.x == 0)
    rstd_out[blockIdx.x] = rstd;
#pragma unroll
  for (uint32_t k = 0; k < FORWARD_HELD; ++k) {
    const uint32_t group = threadIdx.x + k * step, at = group * GROUP;
    if (group < groups)
      store_normalised(out + row + at, held[k], weight + at, rstd, hidden - at, vectors);
  }
  const T *normalised = residual == nullptr ? x : sum_out;
  for (uint32_t group = threadIdx.x + FORWARD_HELD * step; group < groups; group += step) {
    float values[GROUP];
    const uint32_t at = group * GROUP;
    load_group(values, normalised + row + at, hidden - at, vectors);
    store_normalised(out + row + at, values, weight + at, rstd, hidden - at, vectors);
  }
}

/* ---- backward ---- */

template <typename T> struct backward_arguments {
  T *dx;
  float *parts;
  const T *dy, *x, *weight, *dresidual;
  const float *rstd;
  uint32_t tokens, hidden, rows_per_part;
  bool vectors;
};

__device__ inline float add_products(float sum, const float dy[GROUP], const float w[GROUP], const float x[GROUP]) {
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    sum += dy[i] * w[i] * x[i];
  return sum;
}

/* Writes dx of one group, and adds to its columns' gradient of the weight. */
template <typename T>
__device__ inline void backward_group(const backward_arguments<T> &a, float dweight[GROUP], uint64_t at, uint32_t valid,
                                      const float dy[GROUP], const float w[GROUP], const float x[GROUP], float rstd,
                                      float mean) {
  float out[GROUP];
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    dweight[i] += dy[i] * rounded<T>(x[i] * rstd);
    out[i] = rstd * (dy[i] * w[i] - x[i] * mean);
  }
  if (a.dresidual != nullptr) {
    float residual[GROUP];
    load_group(residual, a.dresidual + at, valid, a.vectors);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      out[i] += residual[i];
  }
  store_group(a.dx + at, out, valid, a.vectors);
}

/* HELD groups of columns per thread have their dweight in registers; with HELD 1 the operands stay there too. What is
 * wider sums dweight in its part in memory. */
template <typename T, uint32_t HELD, uint32_t THREADS>
__global__ void __launch_bounds__(THREADS) norm_backward(const backward_arguments<T> a) {
  __shared__ float shared[2][WARP];
  const uint32_t groups = (a.hidden + GROUP - 1) / GROUP, step = blockDim.x;
  const uint32_t first = blockIdx.x * a.rows_per_part, last = min(first + a.rows_per_part, a.tokens);
  float *part = a.parts + (uint64_t)blockIdx.x * a.hidden;
  float dweight[HELD][GROUP] = {}, dy[GROUP], w[GROUP], x[GROUP];
  for (uint32_t token = first; token < last; ++token) {
    const uint64_t row = (uint64_t)token * a.hidden;
    float sum = 0;
    for (uint32_t group = threadIdx.x; group < groups; group += step) {
      const uint32_t at = group * GROUP, valid = a.hidden - at;
      load_group(dy, a.dy + row + at, valid, a.vectors);
      load_group(x, a.x + row + at, valid, a.vectors);
      load_group(w, a.weight + at, valid, a.vectors);
      sum = add_products(sum, dy, w, x);
      if (HELD == 1)
        break; /* all there is */
    }
    const float rstd = a.rstd[token];
    const float mean = block_sum(sum, shared[token % 2]) / (float)a.hidden * rstd * rstd;
#pragma unroll
    for (uint32_t k = 0; k < HELD; ++k) {
      const uint32_t group = threadIdx.x + k * step, at = group * GROUP, valid = a.hidden - at;
      if (group >= groups)
        continue;
      if (HELD > 1) {
        load_group(dy, a.dy + row + at, valid, a.vectors);
        load_group(x, a.x + row + at, valid, a.vectors);
        load_group(w, a.weight + at, valid, a.vectors);
      }
      backward_group(a, dweight[k], row + at, valid, dy, w, x, rstd, mean);
    }
    for (uint32_t group = threadIdx.x + HELD * step; HELD > 1 && group < groups; group += step) {
      const uint32_t at = group * GROUP, valid = a.hidden - at;
      float sums[GROUP];
      load_group(dy, a.dy + row + at, valid, a.vectors);
      load_group(x, a.x + row + at, valid, a.vectors);
      load_group(w, a.weight + at, valid, a.vectors);
      for (uint32_t i = 0; i < GROUP; ++i)
        sums[i] = token == first || i >= valid ? 0.0f : part[at + i];
      backward_group(a, sums, row + at, valid, dy, w, x, rstd, mean);
      store_group(part + at, sums, valid, false);
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < HELD; ++k) {
    const uint32_t group = threadIdx.x + k * step, at = group * GROUP;
    if (group < groups)
      store_group(part + at, dweight[k], a.hidden - at, a.hidden % GROUP == 0);
  }
}

/* dweight += the parts, in an order that their number alone decides. */
__global__ void norm_fold(float *dweight, const float *parts, uint32_t count, uint32_t hidden) {
  __shared__ float shared[FOLD_ROWS][FOLD_COLUMNS];
  const uint32_t column = blockIdx.x * FOLD_COLUMNS + threadIdx.x;
  float sum = 0;
  if (column < hidden)
    for (uint32_t part = threadIdx.y; part < count; part += FOLD_ROWS)
      sum += parts[(uint64_t)part * hidden + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= hidden)
    return;
  for (uint32_t row = 1; row < FOLD_ROWS; ++row)
    sum += shared[row][threadIdx.x];
  dweight[column] += sum;
}

/* ---- host ---- */

static uint32_t parts_max(uint32_t hidden) {
  const uint32_t parts = PARTS_ELEMENTS / hidden;
  return parts > PARTS_MAX ? PARTS_MAX : parts < PARTS_MIN ? PARTS_MIN : parts;
}

uint64_t cuda_norm_workspace_bytes(const flap_ops_limits *limits) {
  /* Norms of heads have more rows than there are tokens, so the parts are bounded by the width alone. */
  const uint64_t widest = limits->hidden > limits->head_size ? limits->hidden : limits->head_size;
  const uint64_t elements = widest * PARTS_MIN > PARTS_ELEMENTS ? widest * PARTS_MIN : PARTS_ELEMENTS;
  return (elements < PARTS_MAX * widest ? elements : PARTS_MAX * widest) * sizeof(float);
}

static uint32_t threads_for(uint32_t hidden, uint32_t threads_max) {
  const uint32_t threads = (uint32_t)cuda_ceil(cuda_ceil(hidden, GROUP), WARP) * WARP;
  return cuda_min(threads, threads_max);
}

void cuda_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                  const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon) {
  if (token_count == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const bool vectors = rows_aligned(dtype, out, hidden) && rows_aligned(dtype, sum_out, hidden) &&
                       rows_aligned(dtype, x, hidden) && rows_aligned(dtype, residual, hidden) &&
                       rows_aligned(dtype, weight, hidden) && hidden % GROUP == 0;
  CUDA_FOR_DTYPE(dtype, T,
                 norm_forward<T><<<token_count, threads_for(hidden, FORWARD_THREADS), 0, stream>>>(
                     (T *)out, rstd, (T *)sum_out, (const T *)x, (const T *)residual, (const T *)weight, hidden,
                     epsilon, vectors));
  cuda_launched(ops, "rmsnorm");
}

template <typename T>
static void launch_backward(const backward_arguments<T> &arguments, uint32_t parts, cudaStream_t stream) {
  const uint32_t threads = threads_for(arguments.hidden, 1024);
  if (cuda_ceil(arguments.hidden, GROUP) <= threads)
    norm_backward<T, 1, 1024><<<parts, threads, 0, stream>>>(arguments);
  else
    norm_backward<T, 4, 512><<<parts, 512, 0, stream>>>(arguments);
}

void cuda_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, const void *dy, const void *x,
                           const void *weight, const float *rstd, const void *dresidual, uint32_t token_count,
                           uint32_t hidden) {
  if (token_count == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const bool vectors = rows_aligned(dtype, dx_out, hidden) && rows_aligned(dtype, dy, hidden) &&
                       rows_aligned(dtype, x, hidden) && rows_aligned(dtype, weight, hidden) &&
                       rows_aligned(dtype, dresidual, hidden) && hidden % GROUP == 0;
  const uint32_t rows = (uint32_t)cuda_ceil(token_count, parts_max(hidden));
  const uint32_t parts = (uint32_t)cuda_ceil(token_count, rows);
  float *scratch = (float *)cuda_scratch(ops);
  flap_assert((uint64_t)parts * hidden * sizeof(float) <= cuda_scratch_bytes(ops));
  CUDA_FOR_DTYPE(dtype, T,
                 launch_backward<T>({(T *)dx_out, scratch, (const T *)dy, (const T *)x, (const T *)weight,
                                     (const T *)dresidual, rstd, token_count, hidden, rows, vectors},
                                    parts, stream));
  norm_fold<<<(uint32_t)cuda_ceil(hidden, FOLD_COLUMNS), dim3(FOLD_COLUMNS, FOLD_ROWS), 0, stream>>>(dweight, scratch,
                                                                                                     parts, hidden);
  cuda_launched(ops, "rmsnorm backward");
}
