/* Logits and cross-entropy, chunk by chunk of tokens: logits, then their gradient in place, then the two products. */
#include "kernels/cuda/cuda_elements.cuh"

#define THREADS 1024u

/* The sum of e^(x - maximum) over some values, and their maximum; empty: 0 and -infinity. */
struct softmax_sum {
  float maximum, sum;
};

template <typename T> __device__ inline softmax_sum joined(softmax_sum a, softmax_sum b) {
  softmax_sum both;
  both.maximum = fmaxf(a.maximum, b.maximum);
  if (both.maximum == -INFINITY) {
    both.sum = a.sum + b.sum;
    return both;
  }
  both.sum = a.sum * exponential<T>(a.maximum - both.maximum) + b.sum * exponential<T>(b.maximum - both.maximum);
  return both;
}

__device__ inline softmax_sum shuffled(softmax_sum mine, uint32_t distance) {
  softmax_sum other;
  other.maximum = __shfl_xor_sync(WARP_ALL, mine.maximum, distance);
  other.sum = __shfl_xor_sync(WARP_ALL, mine.sum, distance);
  return other;
}

/* Joins the block's, pairs of lanes that differ in one bit: both sides of a pair compute the same, a and b exchanged.
 */
template <typename T> __device__ inline softmax_sum block_softmax(softmax_sum mine, softmax_sum *shared) {
#pragma unroll
  for (uint32_t distance = WARP / 2; distance > 0; distance /= 2)
    mine = joined<T>(mine, shuffled(mine, distance));
  if (threadIdx.x % WARP == 0)
    shared[threadIdx.x / WARP] = mine;
  __syncthreads();
  mine = shared[threadIdx.x % WARP];
#pragma unroll
  for (uint32_t distance = WARP / 2; distance > 0; distance /= 2)
    mine = joined<T>(mine, shuffled(mine, distance));
  return mine;
}

template <typename T> __device__ inline softmax_sum row_sum(const T *row, uint32_t vocabulary) {
  softmax_sum mine = {-INFINITY, 0};
  for (uint32_t at = threadIdx.x * GROUP; at < vocabulary; at += THREADS * GROUP) {
    const uint32_t valid = min(vocabulary - at, GROUP);
    float x[GROUP], maximum = mine.maximum;
    load_group(x, row + at, valid, valid == GROUP);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      maximum = i < valid ? fmaxf(maximum, x[i]) : maximum;
    if (maximum > mine.maximum) {
      mine.sum *= exponential<T>(mine.maximum - maximum);
      mine.maximum = maximum;
    }
    /* Nothing is finite so far: each counts as 0, as to the cpu, where the difference would not be a number. */
    const float base = mine.maximum == -INFINITY ? 0.0f : mine.maximum;
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      mine.sum += i < valid ? exponential<T>(x[i] - base) : 0.0f;
  }
  return mine;
}

/* (softmax - one at the target) * loss_scale, rounded, in place of the logits. */
template <typename T>
__device__ inline void row_gradient(T *row, uint32_t vocabulary, float maximum, float log_sum, uint32_t target,
                                    float loss_scale) {
  for (uint32_t at = threadIdx.x * GROUP; at < vocabulary; at += THREADS * GROUP) {
    const uint32_t valid = min(vocabulary - at, GROUP);
    float x[GROUP];
    load_group(x, row + at, valid, valid == GROUP);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i) {
      const float probability = exponential<T>((x[i] - maximum) - log_sum);
      x[i] = (at + i == target ? probability - 1.0f : probability) * loss_scale;
    }
    store_group(row + at, x, valid, valid == GROUP);
  }
}

/* A block per token. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    loss_kernel(T *logits, float *losses, const int32_t *targets, uint32_t vocabulary, uint32_t stride,
                float loss_scale, bool backward) {
  __shared__ softmax_sum shared[WARP];
  T *row = logits + (uint64_t)blockIdx.x * stride;
  const int32_t target = targets[blockIdx.x];
  if (target < 0) {
    if (threadIdx.x == 0)
      losses[blockIdx.x] = 0;
    for (uint32_t at = threadIdx.x; backward && at < vocabulary; at += THREADS)
      row[at] = from_float<T>(0);
    return;
  }
  const softmax_sum all = block_softmax<T>(row_sum(row, vocabulary), shared);
  const float log_sum = logf(all.sum);
  if (threadIdx.x == 0)
    losses[blockIdx.x] = log_sum - (to_float(row[target]) - all.maximum);
  if (!backward)
    return;
  __syncthreads(); /* the target's logit was read before it is overwritten */
  row_gradient(row, vocabulary, all.maximum, log_sum, (uint32_t)target, loss_scale);
}

/* dweight += (or =) gradientᵀ x, then dx = gradient · weight: in this order, since dx may take the place of x. */
static void head_backward(flap_ops *ops, flap_dtype dtype, const void *gradient, uint32_t rows, uint32_t stride,
                          void *dx, float *dweight, bool accumulate, const void *x, const void *weight,
                          uint32_t hidden, uint32_t vocabulary) {
  flap_matmul matmul = {};
  matmul.transpose = FLAP_TN;
  matmul.m = vocabulary;
  matmul.n = hidden;
  matmul.k = rows;
  matmul.a = gradient;
  matmul.b = x;
  matmul.c = dweight;
  matmul.lda = stride;
  matmul.ldb = matmul.ldc = hidden;
  matmul.dtype = dtype;
  matmul.c_dtype = FLAP_F32;
  matmul.accumulate = accumulate;
  cuda_matmul(ops, &matmul);
  matmul.transpose = FLAP_NN;
  matmul.m = rows;
  matmul.k = vocabulary;
  matmul.b = weight;
  matmul.c = dx;
  matmul.c_dtype = dtype;
  matmul.accumulate = false;
  cuda_matmul(ops, &matmul);
}

void cuda_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate, const void *x,
                    const void *weight, const int32_t *targets, float loss_scale, uint32_t token_count, uint32_t hidden,
                    uint32_t vocabulary) {
  const uint32_t chunk = cuda_head_rows(dtype, vocabulary), stride = cuda_head_stride(vocabulary);
  const uint64_t row_bytes = hidden * flap_dtype_bytes(dtype);
  flap_assert((uint64_t)cuda_min(chunk, token_count) * stride * flap_dtype_bytes(dtype) <= cuda_scratch_bytes(ops));
  void *logits = cuda_scratch(ops);
  for (uint32_t token = 0; token < token_count; token += chunk) {
    const uint32_t rows = cuda_min(chunk, token_count - token);
    const unsigned char *x_rows = (const unsigned char *)x + token * row_bytes;
    flap_matmul matmul = {};
    matmul.transpose = FLAP_NT;
    matmul.m = rows;
    matmul.n = vocabulary;
    matmul.k = hidden;
    matmul.a = x_rows;
    matmul.b = weight;
    matmul.c = logits;
    matmul.lda = matmul.ldb = hidden;
    matmul.ldc = stride;
    matmul.dtype = matmul.c_dtype = dtype;
    cuda_matmul(ops, &matmul);
    const cudaStream_t stream = cuda_stream(ops);
    CUDA_FOR_DTYPE(dtype, T,
                   loss_kernel<T><<<rows, THREADS, 0, stream>>>((T *)logits, losses + token, targets + token,
                                                                vocabulary, stride, loss_scale, dx != nullptr));
    cuda_launched(ops, "cross-entropy");
    if (dx != nullptr)
      head_backward(ops, dtype, logits, rows, stride, (unsigned char *)dx + token * row_bytes, dweight,
                    accumulate || token > 0, x_rows, weight, hidden, vocabulary);
  }
}
