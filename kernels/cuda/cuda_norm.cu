/* RMSNorm: a block per row forward; backward a block per run of rows, which also sums its part of the weight's
 * gradient.
 *
 * Each thread has the same columns in every row: groups threadIdx, threadIdx + blockDim, ... The first HELD of them
 * stay in registers; rows wider than that are read again. The number of threads and of runs is a function of shape. */
#include "kernels/cuda/cuda_elements.cuh"
#include "kernels/cuda/tensor_cores.cuh"

#define FORWARD_HELD 4u
#define FORWARD_THREADS 512u
#define BACKWARD_THREADS 512u
/* Of rows that are on their way, with so many groups per thread: 72 and 96 KiB of shared memory at most, of 99 that a
 * block may have on a consumer's GPU. */
#define RING_ROWS(HELD) ((HELD) == 1 ? 3u : 2u)
#define RING_BYTES(HELD, THREADS) (RING_ROWS(HELD) * 3 * (HELD) * (THREADS)*16)
static_assert(RING_BYTES(1, BACKWARD_THREADS) <= 98 * 1024 && RING_BYTES(2, BACKWARD_THREADS) <= 98 * 1024,
              "every GPU has it");
#define FOLD_COLUMNS 32u
#define FOLD_ROWS 8u

template <typename T> struct forward_arguments {
  T *out, *sum_out;
  float *rstd;
  const T *x, *residual, *weight;
  uint32_t hidden;
  float epsilon;
  bool vectors;
};

/* A group of x, or of x + residual, which is stored too; adds its squares. */
template <typename T>
__device__ inline raw_group<T> load_normalised(const forward_arguments<T> &a, uint64_t at, uint32_t valid,
                                               float *squares) {
  raw_group<T> raw = load_raw(a.x + at, valid, a.vectors);
  float values[GROUP];
  widen(values, raw);
  if (a.residual != nullptr) {
    float other[GROUP];
    load_group(other, a.residual + at, valid, a.vectors);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i) {
      raw.elements[i] = from_float<T>(values[i] + other[i]);
      values[i] = to_float(raw.elements[i]);
    }
    store_group(a.sum_out + at, values, valid, a.vectors);
  }
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    *squares += values[i] * values[i];
  return raw;
}

template <typename T>
__device__ inline void store_normalised(const forward_arguments<T> &a, uint64_t row, uint32_t at,
                                        const raw_group<T> &raw, float rstd) {
  float x[GROUP], w[GROUP];
  widen(x, raw);
  load_group(w, a.weight + at, a.hidden - at, a.vectors);
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    x[i] = rounded<T>(x[i] * rstd) * w[i];
  store_group(a.out + row + at, x, a.hidden - at, a.vectors);
}

template <typename T> __global__ void __launch_bounds__(FORWARD_THREADS) norm_forward(const forward_arguments<T> a) {
  __shared__ float shared[WARP];
  const uint64_t row = (uint64_t)blockIdx.x * a.hidden;
  const uint32_t step = blockDim.x * GROUP;
  raw_group<T> held[FORWARD_HELD];
  float squares = 0;
#pragma unroll
  for (uint32_t k = 0; k < FORWARD_HELD; ++k) {
    const uint32_t at = threadIdx.x * GROUP + k * step;
    if (at < a.hidden)
      held[k] = load_normalised(a, row + at, a.hidden - at, &squares);
  }
  for (uint32_t at = threadIdx.x * GROUP + FORWARD_HELD * step; at < a.hidden; at += step)
    (void)load_normalised(a, row + at, a.hidden - at, &squares);
  const float rstd = 1.0f / sqrtf(block_sum(squares, shared) / (float)a.hidden + a.epsilon);
  if (threadIdx.x == 0)
    a.rstd[blockIdx.x] = rstd;
#pragma unroll
  for (uint32_t k = 0; k < FORWARD_HELD; ++k) {
    const uint32_t at = threadIdx.x * GROUP + k * step;
    if (at < a.hidden)
      store_normalised(a, row, at, held[k], rstd);
  }
  const T *normalised = a.residual == nullptr ? a.x : a.sum_out;
  for (uint32_t at = threadIdx.x * GROUP + FORWARD_HELD * step; at < a.hidden; at += step)
    store_normalised(a, row, at, load_raw(normalised + row + at, a.hidden - at, a.vectors), rstd);
}

/* ---- backward ---- */

template <typename T> struct backward_arguments {
  T *dx, *normalized;
  float *parts;
  const T *dy, *x, *weight, *dresidual;
  const float *rstd;
  uint32_t tokens, hidden, rows_per_part;
  bool vectors;
};

/* What one thread has of one row. */
template <typename T> struct row_operands { raw_group<T> dy, x, residual; };

template <typename T>
__device__ inline row_operands<T> load_row(const backward_arguments<T> &a, uint64_t at, uint32_t valid) {
  row_operands<T> row;
  row.dy = load_raw(a.dy + at, valid, a.vectors);
  row.x = load_raw(a.x + at, valid, a.vectors);
  row.residual = a.dresidual != nullptr ? load_raw(a.dresidual + at, valid, a.vectors) : raw_group<T>{};
  return row;
}

template <typename T> __device__ inline float row_product(float sum, const row_operands<T> &row, const float w[GROUP]) {
  float dy[GROUP], x[GROUP];
  widen(dy, row.dy);
  widen(x, row.x);
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    sum += dy[i] * w[i] * x[i];
  return sum;
}

/* Writes dx of one group, and the normalised values if they are wanted, and adds to its columns' gradient of the weight.
 */
template <typename T>
__device__ inline void backward_group(const backward_arguments<T> &a, float dweight[GROUP], uint64_t at, uint32_t valid,
                                      const row_operands<T> &row, const float w[GROUP], float rstd, float mean) {
  float dy[GROUP], x[GROUP], out[GROUP];
  widen(dy, row.dy);
  widen(x, row.x);
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    const float scaled = rounded<T>(x[i] * rstd);
    dweight[i] += dy[i] * scaled;
    out[i] = rstd * (dy[i] * w[i] - x[i] * mean);
    x[i] = scaled * w[i];
  }
  if (a.normalized != nullptr)
    store_group(a.normalized + at, x, valid, a.vectors);
  if (a.dresidual != nullptr) {
    float added[GROUP];
    widen(added, row.residual);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      out[i] += added[i];
  }
  store_group(a.dx + at, out, valid, a.vectors);
}

/* Rows of at most HELD groups per thread: everything stays in registers. With RING, which takes vectors of a 16-bit
 * type, rows come by copies into shared memory that are one or two rows ahead of what is summed: a row is little, and
 * memory far away. A thread reads only what it has copied itself. Without RING a row is loaded when its turn comes. dx
 * may be stored over dy or dresidual of its own row, never of a later one. */
template <typename T, uint32_t HELD, bool RING>
__global__ void __launch_bounds__(BACKWARD_THREADS, HELD == 1 && sizeof(T) == 2 ? 2 : 1)
    norm_backward_narrow(const backward_arguments<T> a) {
  extern __shared__ __align__(16) unsigned char ring[];
  __shared__ float shared[2][WARP];
  const uint32_t first = blockIdx.x * a.rows_per_part, last = min(first + a.rows_per_part, a.tokens);
  float dweight[HELD][GROUP] = {};
  raw_group<T> weight[HELD] = {};
  uint32_t at[HELD], valid[HELD];
#pragma unroll
  for (uint32_t k = 0; k < HELD; ++k) {
    at[k] = (threadIdx.x + k * blockDim.x) * GROUP;
    valid[k] = at[k] < a.hidden ? a.hidden - at[k] : 0;
    if (valid[k] > 0)
      weight[k] = load_raw(a.weight + at[k], valid[k], a.vectors);
  }
  /* Of one row: dy, x and the residual, the HELD groups of each. */
  const uint32_t place = shared_address(ring) + threadIdx.x * 16, step = blockDim.x * 16;
  constexpr uint32_t ROWS = RING_ROWS(HELD);
  const auto copy_row = [&](uint32_t token) {
    const uint32_t to = place + token % ROWS * (3 * HELD * step);
#pragma unroll
    for (uint32_t k = 0; k < HELD; ++k)
      if (token < last && valid[k] > 0) {
        const uint64_t from = (uint64_t)token * a.hidden + at[k];
        copy16(to + k * step, a.dy + from, 16);
        copy16(to + (HELD + k) * step, a.x + from, 16);
        if (a.dresidual != nullptr)
          copy16(to + (2 * HELD + k) * step, a.dresidual + from, 16);
      }
    copies_commit();
  };
  if (RING)
    for (uint32_t row = 0; row + 1 < ROWS; ++row)
      copy_row(first + row);
  for (uint32_t token = first; token < last; ++token) {
    const uint64_t row_at = (uint64_t)token * a.hidden;
    const uint32_t from = place + token % ROWS * (3 * HELD * step);
    row_operands<T> row[HELD] = {}; /* what is not ours stays zero */
    float w[GROUP], sum = 0;
    if (RING)
      copies_wait<static_cast<int>(ROWS) - 2>();
#pragma unroll
    for (uint32_t k = 0; k < HELD; ++k) {
      if (valid[k] == 0)
        continue;
      if constexpr (RING)
        row[k] = {load_shared<T>(from + k * step), load_shared<T>(from + (HELD + k) * step),
                  load_shared<T>(from + (2 * HELD + k) * step)};
      else
        row[k] = load_row(a, row_at + at[k], valid[k]);
    }
    const float rstd = a.rstd[token];
#pragma unroll
    for (uint32_t k = 0; k < HELD; ++k) {
      widen(w, weight[k]);
      sum = row_product(sum, row[k], w);
    }
    const float mean = block_sum(sum, shared[token % 2]) / (float)a.hidden * rstd * rstd;
    if (RING)
      copy_row(token + ROWS - 1);
#pragma unroll
    for (uint32_t k = 0; k < HELD; ++k) {
      widen(w, weight[k]);
      if (valid[k] > 0)
        backward_group(a, dweight[k], row_at + at[k], valid[k], row[k], w, rstd, mean);
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < HELD; ++k)
    if (valid[k] > 0)
      store_group(a.parts + (uint64_t)blockIdx.x * a.hidden + at[k], dweight[k], valid[k], a.hidden % GROUP == 0);
}

/* Wider rows: HELD groups of columns per thread have their dweight in registers, what is wider still sums it in its
 * part in memory; rows are read twice. */
template <typename T, uint32_t HELD>
__global__ void __launch_bounds__(BACKWARD_THREADS) norm_backward_wide(const backward_arguments<T> a) {
  __shared__ float shared[2][WARP];
  const uint32_t groups = (a.hidden + GROUP - 1) / GROUP, step = blockDim.x;
  const uint32_t first = blockIdx.x * a.rows_per_part, last = min(first + a.rows_per_part, a.tokens);
  float *part = a.parts + (uint64_t)blockIdx.x * a.hidden;
  float dweight[HELD][GROUP] = {}, w[GROUP];
  for (uint32_t token = first; token < last; ++token) {
    const uint64_t row_at = (uint64_t)token * a.hidden;
    float sum = 0;
    for (uint32_t group = threadIdx.x; group < groups; group += step) {
      const uint32_t at = group * GROUP, valid = a.hidden - at;
      load_group(w, a.weight + at, valid, a.vectors);
      sum = row_product(sum, load_row(a, row_at + at, valid), w);
    }
    const float rstd = a.rstd[token];
    const float mean = block_sum(sum, shared[token % 2]) / (float)a.hidden * rstd * rstd;
#pragma unroll
    for (uint32_t k = 0; k < HELD; ++k) {
      const uint32_t at = (threadIdx.x + k * step) * GROUP, valid = a.hidden - at;
      if (at >= a.hidden)
        continue;
      load_group(w, a.weight + at, valid, a.vectors);
      backward_group(a, dweight[k], row_at + at, valid, load_row(a, row_at + at, valid), w, rstd, mean);
    }
    for (uint32_t group = threadIdx.x + HELD * step; group < groups; group += step) {
      const uint32_t at = group * GROUP, valid = a.hidden - at;
      float sums[GROUP];
      load_group(w, a.weight + at, valid, a.vectors);
      for (uint32_t i = 0; i < GROUP; ++i)
        sums[i] = token == first || i >= valid ? 0.0f : part[at + i];
      backward_group(a, sums, row_at + at, valid, load_row(a, row_at + at, valid), w, rstd, mean);
      store_group(part + at, sums, valid, false);
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < HELD; ++k) {
    const uint32_t at = (threadIdx.x + k * step) * GROUP;
    if (at < a.hidden)
      store_group(part + at, dweight[k], a.hidden - at, a.hidden % GROUP == 0);
  }
}

/* sums += the parts, in an order that their number alone decides. */
__global__ void fold_rows(float *sums, const float *parts, uint32_t count, uint32_t hidden) {
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
  sums[column] += sum;
}

/* ---- host ---- */

/* Whole warps, with so many groups of a row per thread. */
static uint32_t threads_for(uint32_t hidden, uint32_t threads_max, uint32_t groups) {
  const uint32_t threads = (uint32_t)cuda_ceil(cuda_ceil(hidden, GROUP), WARP * groups) * WARP;
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
  const uint32_t threads = threads_for(hidden, FORWARD_THREADS, FORWARD_HELD);
  CUDA_FOR_DTYPE(dtype, T,
                 norm_forward<T>
                 <<<token_count, threads, 0, stream>>>({(T *)out, (T *)sum_out, rstd, (const T *)x, (const T *)residual,
                                                        (const T *)weight, hidden, epsilon, vectors}));
  cuda_launched(ops, "rmsnorm");
}

template <typename T, uint32_t HELD>
static cudaError_t launch_narrow(const backward_arguments<T> &arguments, uint32_t parts, cudaStream_t stream) {
  const uint32_t threads = threads_for(arguments.hidden, BACKWARD_THREADS, HELD);
  const uint32_t bytes = RING_BYTES(HELD, threads);
  if (sizeof(T) != 2 || !arguments.vectors) {
    norm_backward_narrow<T, HELD, false><<<parts, threads, 0, stream>>>(arguments);
    return cudaGetLastError();
  }
  const auto kernel = norm_backward_narrow<T, HELD, sizeof(T) == 2>;
  if (bytes > 48 * 1024) { /* what a launch may have unasked */
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess)
      return status;
  }
  kernel<<<parts, threads, bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <typename T>
static cudaError_t launch_backward(const backward_arguments<T> &arguments, uint32_t parts, cudaStream_t stream) {
  const uint32_t threads = threads_for(arguments.hidden, BACKWARD_THREADS, 1);
  const uint32_t groups = (uint32_t)cuda_ceil(arguments.hidden, GROUP);
  if (groups <= threads)
    return launch_narrow<T, 1>(arguments, parts, stream);
  if (groups <= 2 * threads && sizeof(T) == 2) /* two groups of fp32 would not fit into the registers */
    return launch_narrow<T, sizeof(T) == 2 ? 2 : 1>(arguments, parts, stream);
  norm_backward_wide<T, 4><<<parts, threads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

void cuda_fold_rows(flap_ops *ops, float *sums, const float *parts, uint32_t count, uint32_t width) {
  const cudaStream_t stream = cuda_stream(ops);
  fold_rows<<<(uint32_t)cuda_ceil(width, FOLD_COLUMNS), dim3(FOLD_COLUMNS, FOLD_ROWS), 0, stream>>>(sums, parts, count,
                                                                                                    width);
  cuda_launched(ops, "a sum of parts");
}

void cuda_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out, const void *dy, const void *x,
                           const void *weight, const float *rstd, const void *dresidual, uint32_t token_count,
                           uint32_t hidden) {
  if (token_count == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  const bool vectors = rows_aligned(dtype, dx_out, hidden) && rows_aligned(dtype, normalized_out, hidden) &&
                       rows_aligned(dtype, dy, hidden) &&
                       rows_aligned(dtype, x, hidden) && rows_aligned(dtype, weight, hidden) &&
                       rows_aligned(dtype, dresidual, hidden) && hidden % GROUP == 0;
  const uint32_t rows = (uint32_t)cuda_ceil(token_count, cuda_norm_parts(hidden));
  const uint32_t parts = (uint32_t)cuda_ceil(token_count, rows);
  float *scratch = (float *)cuda_scratch(ops);
  cudaError_t status = cudaSuccess;
  flap_assert((uint64_t)parts * hidden * sizeof(float) <= cuda_scratch_bytes(ops));
  CUDA_FOR_DTYPE(dtype, T,
                 status = launch_backward<T>({(T *)dx_out, (T *)normalized_out, scratch, (const T *)dy, (const T *)x,
                                              (const T *)weight, (const T *)dresidual, rstd, token_count, hidden, rows,
                                              vectors},
                                             parts, stream));
  cuda_check(ops, "rmsnorm backward", status);
  cuda_fold_rows(ops, dweight, scratch, parts, hidden);
}
