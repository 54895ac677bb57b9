/* Gradient rounding with sums of squares, and AdamW: a block of threads per FLAP_OPS_BLOCK elements.
 *
 * AdamW is written in the arithmetic that ops.h lists, each operation rounded by itself, so that its bits are the
 * cpu's. */
#include "kernels/cuda/cuda_elements.cuh"

#define STORE_THREADS 256u
#define ADAMW_THREADS 512u
static_assert(ADAMW_THREADS * GROUP == FLAP_OPS_BLOCK, "a thread has one group");
static_assert(FLAP_OPS_BLOCK % (STORE_THREADS * GROUP) == 0, "a thread has whole groups");

template <typename T>
__global__ void __launch_bounds__(STORE_THREADS)
    store_gradient(T *grad, float *block_squares, const float *sum, bool sum_vectors, bool grad_vectors) {
  __shared__ float shared[WARP];
  float squares = 0;
#pragma unroll
  for (uint32_t k = 0; k < FLAP_OPS_BLOCK / (STORE_THREADS * GROUP); ++k) {
    const uint64_t at = (uint64_t)blockIdx.x * FLAP_OPS_BLOCK + (threadIdx.x + k * STORE_THREADS) * GROUP;
    float values[GROUP];
    load_group(values, sum + at, GROUP, sum_vectors);
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i) {
      values[i] = rounded<T>(values[i]);
      squares += values[i] * values[i];
    }
    if (grad != nullptr)
      store_group(grad + at, values, GROUP, grad_vectors);
  }
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0)
    block_squares[blockIdx.x] = squares;
}

void cuda_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares, const float *sum,
                         uint64_t elements) {
  const uint32_t blocks = (uint32_t)(elements / FLAP_OPS_BLOCK);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  if (blocks == 0)
    return;
  const cudaStream_t stream = cuda_stream(ops);
  if (grad_dtype == FLAP_BF16)
    store_gradient<<<blocks, STORE_THREADS, 0, stream>>>((__nv_bfloat16 *)grad, block_squares, sum, aligned16(sum),
                                                         aligned16(grad));
  else
    store_gradient<<<blocks, STORE_THREADS, 0, stream>>>((float *)grad, block_squares, sum, aligned16(sum),
                                                         aligned16(grad));
  cuda_launched(ops, "gradient store");
}

/* ---- AdamW ---- */

struct decay_bits {
  uint8_t bytes[FLAP_OPS_ADAMW_BLOCKS_MAX / 8];
};

/* The new weight of one element; m and v are updated in place. Kept in step with kernels/cpu/cpu_vector_body.inc. */
__device__ inline float adamw_element(const flap_adamw &s, float decay, float weight, float *m, float *v, float grad) {
  const float smallest = 7.88860905221011805e-31f; /* 2^-100 */
  const float g = __fmul_rn(grad, s.gradient_scale);
  float first = __fmaf_rn(s.one_minus_beta1, g, __fmul_rn(s.beta1, *m));
  float second = __fmaf_rn(__fmul_rn(s.one_minus_beta2, g), g, __fmul_rn(s.beta2, *v));
  first = fabsf(first) < smallest ? 0.0f : first;
  second = fabsf(second) < smallest ? 0.0f : second;
  *m = first;
  *v = second;
  const float denom = __fmaf_rn(__fsqrt_rn(second), s.inverse_sqrt_bias2, s.epsilon);
  return __fmaf_rn(-s.learning_rate, __fdiv_rn(__fmul_rn(first, s.inverse_bias1), denom), __fmul_rn(weight, decay));
}

/* Eight 16-bit words, or one after another where the address is odd. */
template <typename W> __device__ inline void load_words(W out[GROUP], const W *p, bool vectors) {
  if (vectors)
    *reinterpret_cast<uint4 *>(out) = *reinterpret_cast<const uint4 *>(p);
  else
    for (uint32_t i = 0; i < GROUP; ++i)
      out[i] = p[i];
}
template <typename W> __device__ inline void store_words(W *p, const W in[GROUP], bool vectors) {
  if (vectors)
    *reinterpret_cast<uint4 *>(p) = *reinterpret_cast<const uint4 *>(in);
  else
    for (uint32_t i = 0; i < GROUP; ++i)
      p[i] = in[i];
}

struct adamw_arguments {
  flap_adamw scalars;
  decay_bits decays;
  void *weight;
  int16_t *low;
  float *m, *v;
  const void *grad;
  int32_t *fault;
  bool vectors;
};

__device__ inline float block_decay(const adamw_arguments &a) {
  const bool decays = (a.decays.bytes[blockIdx.x / 8] >> (blockIdx.x % 8) & 1) != 0;
  return decays ? a.scalars.decay : 1.0f; /* times 1 changes no bit */
}

template <typename G>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_split(const __grid_constant__ adamw_arguments a) {
  const uint64_t at = (uint64_t)blockIdx.x * FLAP_OPS_BLOCK + threadIdx.x * GROUP;
  uint16_t *weight = (uint16_t *)a.weight + at;
  alignas(16) uint16_t high[GROUP];
  alignas(16) int16_t low[GROUP];
  float grad[GROUP], m[GROUP], v[GROUP];
  load_words(high, weight, a.vectors);
  load_words(low, a.low + at, a.vectors);
  load_group(grad, (const G *)a.grad + at, GROUP, a.vectors);
  load_group(m, a.m + at, GROUP, a.vectors);
  load_group(v, a.v + at, GROUP, a.vectors);
  const float decay = block_decay(a);
  bool refused = false;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    const uint32_t before = ((uint32_t)high[i] << 16) + (uint32_t)(int32_t)low[i];
    const uint32_t after =
        __float_as_uint(adamw_element(a.scalars, decay, __uint_as_float(before), &m[i], &v[i], grad[i]));
    const bool bad = (after & 0x7fffffffu) + 0x8000u >= 0x7f800000u;
    const uint32_t bits = bad ? before : after;
    refused |= bad;
    high[i] = (uint16_t)((bits + 0x8000u) >> 16);
    low[i] = (int16_t)(uint16_t)bits;
  }
  store_words(weight, high, a.vectors);
  store_words(a.low + at, low, a.vectors);
  store_group(a.m + at, m, GROUP, a.vectors);
  store_group(a.v + at, v, GROUP, a.vectors);
  if (refused)
    *a.fault = 1;
}

template <typename G>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_whole(const __grid_constant__ adamw_arguments a) {
  const uint64_t at = (uint64_t)blockIdx.x * FLAP_OPS_BLOCK + threadIdx.x * GROUP;
  float *weight = (float *)a.weight + at;
  float values[GROUP], grad[GROUP], m[GROUP], v[GROUP];
  load_group(values, weight, GROUP, a.vectors);
  load_group(grad, (const G *)a.grad + at, GROUP, a.vectors);
  load_group(m, a.m + at, GROUP, a.vectors);
  load_group(v, a.v + at, GROUP, a.vectors);
  const float decay = block_decay(a);
  bool refused = false;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    const float after = adamw_element(a.scalars, decay, values[i], &m[i], &v[i], grad[i]);
    const bool bad = (__float_as_uint(after) & 0x7fffffffu) >= 0x7f800000u;
    refused |= bad;
    values[i] = bad ? values[i] : after;
  }
  store_group(weight, values, GROUP, a.vectors);
  store_group(a.m + at, m, GROUP, a.vectors);
  store_group(a.v + at, v, GROUP, a.vectors);
  if (refused)
    *a.fault = 1;
}

void cuda_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight,
                int16_t *low, float *m, float *v, const void *grad, const uint8_t *decay_blocks, int32_t *fault,
                uint64_t elements) {
  flap_assert(weight_dtype == FLAP_F32 || weight_dtype == FLAP_BF16);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  const uint32_t blocks = (uint32_t)(elements / FLAP_OPS_BLOCK);
  if (blocks == 0)
    return;
  adamw_arguments a = {};
  a.scalars = *scalars;
  for (uint32_t i = 0; i < (blocks + 7) / 8; ++i)
    a.decays.bytes[i] = decay_blocks[i];
  a.weight = weight;
  a.low = low;
  a.m = m;
  a.v = v;
  a.grad = grad;
  a.fault = fault;
  a.vectors = aligned16(weight) && aligned16(low) && aligned16(m) && aligned16(v) && aligned16(grad);
  const cudaStream_t stream = cuda_stream(ops);
  if (weight_dtype == FLAP_BF16 && grad_dtype == FLAP_BF16)
    adamw_split<__nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_BF16)
    adamw_split<float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (grad_dtype == FLAP_BF16)
    adamw_whole<__nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else
    adamw_whole<float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  cuda_launched(ops, "adamw");
}
