/* Gradient rounding with sums of squares, and AdamW: a block of threads per FLAP_OPS_BLOCK elements.
 *
 * AdamW is written in the arithmetic that ops.h lists, each operation rounded by itself, so that its bits are the
 * cpu's. */
#include "kernels/cuda/cuda_elements.cuh"
#include "kernels/moments.h"

#define STORE_THREADS 256u
#define ADAMW_THREADS 512u
static_assert(ADAMW_THREADS * GROUP == FLAP_OPS_BLOCK, "a thread has one group");
static_assert(FLAP_OPS_BLOCK % (STORE_THREADS * GROUP) == 0, "a thread has whole groups");

template <typename T, typename S>
__global__ void __launch_bounds__(STORE_THREADS)
    store_gradient(T *grad, float *block_squares, const S *sum, bool sum_vectors, bool grad_vectors) {
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
  if (threadIdx.x == 0 && block_squares != nullptr)
    block_squares[blockIdx.x] = squares;
}

template <typename T, typename S>
static void launch_store(flap_ops *ops, void *grad, float *block_squares, const void *sum, uint32_t blocks) {
  store_gradient<<<blocks, STORE_THREADS, 0, cuda_stream(ops)>>>((T *)grad, block_squares, (const S *)sum,
                                                                 aligned16(sum), aligned16(grad));
  cuda_launched(ops, "gradient store");
}

void cuda_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares, flap_dtype sum_dtype,
                         const void *sum, uint64_t elements) {
  const uint32_t blocks = (uint32_t)(elements / FLAP_OPS_BLOCK);
  if (blocks == 0)
    return;
  if (grad_dtype == FLAP_F32)
    launch_store<float, float>(ops, grad, block_squares, sum, blocks);
  else if (sum_dtype == FLAP_F32)
    launch_store<__nv_bfloat16, float>(ops, grad, block_squares, sum, blocks);
  else
    launch_store<__nv_bfloat16, __nv_bfloat16>(ops, grad, block_squares, sum, blocks);
}

/* ---- AdamW ---- */

/* Which blocks of a launch decay: whether the first one does, and where that changes. A slice holds a few tensors, so
 * these are few numbers, while a bit for each block would make arguments of a kilobyte: CUDA has room for about a dozen
 * launches of that size, and then blocks whoever launches, and with it all who call CUDA. */
#define DECAY_CHANGES_MAX 14u
struct block_range {
  uint32_t first, count; /* blocks of the slice */
  uint32_t decays, change_count, changes[DECAY_CHANGES_MAX];
};

static bool decays_at(const uint8_t *decay_blocks, uint32_t block) {
  return (decay_blocks[block / 8] >> (block % 8) & 1) != 0;
}

/* The blocks from `first` on that one launch can take. */
static block_range take_range(const uint8_t *decay_blocks, uint32_t first, uint32_t end) {
  block_range range = {};
  range.first = first;
  range.decays = decays_at(decay_blocks, first);
  uint32_t block = first + 1;
  for (bool decays = range.decays; block < end; ++block) {
    if (decays_at(decay_blocks, block) == decays)
      continue;
    if (range.change_count == DECAY_CHANGES_MAX)
      break;
    range.changes[range.change_count++] = block;
    decays = !decays;
  }
  range.count = block - first;
  return range;
}

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

/* One element's update; true where the weight was refused, and left as it was. */
__device__ inline bool update_split(const flap_adamw &s, float decay, uint16_t *high, int16_t *low, float *m, float *v,
                                    float grad) {
  const uint32_t before = ((uint32_t)*high << 16) + (uint32_t)(int32_t)*low;
  const uint32_t after = __float_as_uint(adamw_element(s, decay, __uint_as_float(before), m, v, grad));
  const bool bad = (after & 0x7fffffffu) + 0x8000u >= 0x7f800000u;
  const uint32_t bits = bad ? before : after;
  *high = (uint16_t)((bits + 0x8000u) >> 16);
  *low = (int16_t)(uint16_t)bits;
  return bad;
}
/* `limit`: bits of the least magnitude that is refused; infinity's, unless a rounding must stay finite too. */
__device__ inline bool update_whole(const flap_adamw &s, float decay, float *weight, float *m, float *v, float grad,
                                    uint32_t limit = 0x7f800000u) {
  const float after = adamw_element(s, decay, *weight, m, v, grad);
  const bool bad = (__float_as_uint(after) & 0x7fffffffu) >= limit;
  *weight = bad ? *weight : after;
  return bad;
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
  block_range blocks;
  void *weight;
  void *master; /* what the master has beside `weight`, as ops.h tells */
  float *m, *v;
  const void *grad;
  int32_t *fault;
  bool vectors;
};

__device__ inline uint32_t block_of(const adamw_arguments &a) {
  return a.blocks.first + blockIdx.x;
}

/* The first element of this thread's group. */
__device__ inline uint64_t group_of(const adamw_arguments &a) {
  return (uint64_t)block_of(a) * FLAP_OPS_BLOCK + threadIdx.x * GROUP;
}

__device__ inline float block_decay(const adamw_arguments &a) {
  bool decays = a.blocks.decays != 0;
  for (uint32_t i = 0; i < a.blocks.change_count; ++i)
    decays ^= block_of(a) >= a.blocks.changes[i];
  return decays ? a.scalars.decay : 1.0f; /* times 1 changes no bit */
}

template <typename G>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_split(const __grid_constant__ adamw_arguments a) {
  const uint64_t at = group_of(a);
  uint16_t *weight = (uint16_t *)a.weight + at;
  alignas(16) uint16_t high[GROUP];
  alignas(16) int16_t low[GROUP];
  float grad[GROUP], m[GROUP], v[GROUP];
  load_words(high, weight, a.vectors);
  load_words(low, (const int16_t *)a.master + at, a.vectors);
  load_group(grad, (const G *)a.grad + at, GROUP, a.vectors);
  load_group(m, a.m + at, GROUP, a.vectors);
  load_group(v, a.v + at, GROUP, a.vectors);
  const float decay = block_decay(a);
  bool refused = false;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    refused |= update_split(a.scalars, decay, &high[i], &low[i], &m[i], &v[i], grad[i]);
  store_words(weight, high, a.vectors);
  store_words((int16_t *)a.master + at, low, a.vectors);
  store_group(a.m + at, m, GROUP, a.vectors);
  store_group(a.v + at, v, GROUP, a.vectors);
  if (refused)
    *a.fault = 1;
}

template <typename G>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_whole(const __grid_constant__ adamw_arguments a) {
  const uint64_t at = group_of(a);
  float *weight = (float *)a.weight + at;
  float values[GROUP], grad[GROUP], m[GROUP], v[GROUP];
  load_group(values, weight, GROUP, a.vectors);
  load_group(grad, (const G *)a.grad + at, GROUP, a.vectors);
  load_group(m, a.m + at, GROUP, a.vectors);
  load_group(v, a.v + at, GROUP, a.vectors);
  const float decay = block_decay(a);
  bool refused = false;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    refused |= update_whole(a.scalars, decay, &values[i], &m[i], &v[i], grad[i]);
  store_group(weight, values, GROUP, a.vectors);
  store_group(a.m + at, m, GROUP, a.vectors);
  store_group(a.v + at, v, GROUP, a.vectors);
  if (refused)
    *a.fault = 1;
}

/* The fp16 weight is not read: it is its master, rounded. */
template <typename G>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_master(const __grid_constant__ adamw_arguments a) {
  const uint64_t at = group_of(a);
  float *master = (float *)a.master + at;
  float values[GROUP], grad[GROUP], m[GROUP], v[GROUP];
  load_group(values, master, GROUP, a.vectors);
  load_group(grad, (const G *)a.grad + at, GROUP, a.vectors);
  load_group(m, a.m + at, GROUP, a.vectors);
  load_group(v, a.v + at, GROUP, a.vectors);
  const float decay = block_decay(a);
  bool refused = false;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    refused |= update_whole(a.scalars, decay, &values[i], &m[i], &v[i], grad[i], FLAP_F16_LIMIT_BITS);
  store_group((__half *)a.weight + at, values, GROUP, a.vectors);
  store_group(master, values, GROUP, a.vectors);
  store_group(a.m + at, m, GROUP, a.vectors);
  store_group(a.v + at, v, GROUP, a.vectors);
  if (refused)
    *a.fault = 1;
}

static void launch_adamw(flap_ops *ops, flap_dtype weight_dtype, flap_dtype grad_dtype, const adamw_arguments &a) {
  const cudaStream_t stream = cuda_stream(ops);
  const uint32_t blocks = a.blocks.count;
  if (weight_dtype == FLAP_BF16 && grad_dtype == FLAP_BF16)
    adamw_split<__nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_BF16)
    adamw_split<float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_F16 && grad_dtype == FLAP_BF16)
    adamw_master<__nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_F16)
    adamw_master<float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (grad_dtype == FLAP_BF16)
    adamw_whole<__nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else
    adamw_whole<float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
}

void cuda_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight,
                void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks, int32_t *fault,
                uint64_t elements) {
  flap_assert(weight_dtype == FLAP_F32 || weight_dtype == FLAP_BF16 || weight_dtype == FLAP_F16);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  const uint32_t blocks = (uint32_t)(elements / FLAP_OPS_BLOCK);
  if (blocks == 0)
    return;
  adamw_arguments a = {};
  a.scalars = *scalars;
  a.weight = weight;
  a.master = master;
  a.m = m;
  a.v = v;
  a.grad = grad;
  a.fault = fault;
  a.vectors = aligned16(weight) && aligned16(master) && aligned16(m) && aligned16(v) && aligned16(grad);
  for (uint32_t done = 0; done < blocks; done += a.blocks.count) {
    a.blocks = take_range(decay_blocks, done, blocks);
    launch_adamw(ops, weight_dtype, grad_dtype, a);
  }
  cuda_launched(ops, "adamw");
}

/* ---- AdamW with 8-bit moments ---- */

#define M_CODES 128u
#define V_CODES 256u
static_assert(WARP * GROUP == FLAP_OPS_MOMENT_BLOCK, "a warp has one block of moments");
static_assert(M_CODES + V_CODES <= ADAMW_THREADS, "a thread makes one ratio");

struct adamw_8bit_arguments {
  adamw_arguments common; /* m and v are NULL */
  int8_t *m;
  uint8_t *v;
  float *m_largest, *v_largest;
};

/* The ratios of all codes: reading two numbers of shared memory is much cheaper than the lines of the decades. */
struct moment_ratios {
  float m[M_CODES], v[V_CODES];
};

__device__ inline void make_ratios(moment_ratios *ratios) {
  if (threadIdx.x < V_CODES)
    ratios->v[threadIdx.x] = flap_moment_v_ratio((float)threadIdx.x);
  else if (threadIdx.x < V_CODES + M_CODES)
    ratios->m[threadIdx.x - V_CODES] = flap_moment_m_ratio((float)(threadIdx.x - V_CODES));
}

/* Eight bytes, or one after another where the address is odd. */
template <typename B> __device__ inline void load_bytes(B out[GROUP], const B *p, bool vectors) {
  if (vectors)
    *reinterpret_cast<uint2 *>(out) = *reinterpret_cast<const uint2 *>(p);
  else
    for (uint32_t i = 0; i < GROUP; ++i)
      out[i] = p[i];
}
template <typename B> __device__ inline void store_bytes(B *p, const B in[GROUP], bool vectors) {
  if (vectors)
    *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<const uint2 *>(in);
  else
    for (uint32_t i = 0; i < GROUP; ++i)
      p[i] = in[i];
}

__device__ inline void read_moments(float m[GROUP], float v[GROUP], const int8_t m_codes[GROUP],
                                    const uint8_t v_codes[GROUP], float m_largest, float v_largest,
                                    const moment_ratios &ratios) {
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    const int32_t code = m_codes[i];
    const float ratio = ratios.m[abs(code) % M_CODES];
    m[i] = __fmul_rn(code < 0 ? -ratio : ratio, m_largest);
    const float root = __fmul_rn(ratios.v[v_codes[i]], v_largest);
    v[i] = __fmul_rn(root, root);
  }
}

/* The number, or 0 where it is not finite, with a mark in *refused. */
__device__ inline float finite(float x, bool *refused) {
  const bool bad = (__float_as_uint(x) & 0x7fffffffu) >= 0x7f800000u;
  *refused |= bad;
  return bad ? 0.0f : x;
}

/* The largest of a warp's numbers, none of which is negative: their bits sort as they do. */
__device__ inline float warp_largest(float x) {
  return __uint_as_float(__reduce_max_sync(WARP_ALL, __float_as_uint(x)));
}

/* Codes of a warp's block, and its largest values; returns whether one of the thread's moments was refused. */
__device__ inline bool write_moments(int8_t m_codes[GROUP], uint8_t v_codes[GROUP], float *m_largest, float *v_largest,
                                     float m[GROUP], float v[GROUP]) {
  bool refused = false;
  float m_top = 0, v_top = 0;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    m[i] = finite(m[i], &refused);
    v[i] = finite(__fsqrt_rn(v[i]), &refused);
    m_top = fmaxf(m_top, fabsf(m[i]));
    v_top = fmaxf(v_top, v[i]);
  }
  m_top = warp_largest(m_top);
  v_top = warp_largest(v_top);
  const float m_inverse = flap_moment_inverse(m_top), v_inverse = flap_moment_inverse(v_top);
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i) {
    const float m_place = flap_moment_m_place(__fmul_rn(fabsf(m[i]), m_inverse));
    m_codes[i] = (int8_t)flap_moment_code(copysignf(m_place, m[i]));
    const float v_place = flap_moment_v_place(__fmul_rn(v[i], v_inverse));
    v_codes[i] = (uint8_t)flap_moment_code(fmaxf(v_place, v[i] > 0 ? 1.0f : 0.0f));
  }
  *m_largest = m_top;
  *v_largest = v_top;
  return refused;
}

/* The weight of a thread's group, loaded before anything is computed. */
struct split_weight {
  alignas(16) uint16_t high[GROUP];
  alignas(16) int16_t low[GROUP];
};
struct whole_weight {
  float values[GROUP];
};
struct half_weight { /* the fp32 master of an fp16 weight, which is not read */
  float values[GROUP];
};

__device__ inline void load_weight(split_weight *weight, const adamw_arguments &a, uint64_t at) {
  load_words(weight->high, (const uint16_t *)a.weight + at, a.vectors);
  load_words(weight->low, (const int16_t *)a.master + at, a.vectors);
}
__device__ inline void load_weight(whole_weight *weight, const adamw_arguments &a, uint64_t at) {
  load_group(weight->values, (const float *)a.weight + at, GROUP, a.vectors);
}

__device__ inline void load_weight(half_weight *weight, const adamw_arguments &a, uint64_t at) {
  load_group(weight->values, (const float *)a.master + at, GROUP, a.vectors);
}

__device__ inline void store_weight(const adamw_arguments &a, uint64_t at, const split_weight &weight) {
  store_words((uint16_t *)a.weight + at, weight.high, a.vectors);
  store_words((int16_t *)a.master + at, weight.low, a.vectors);
}
__device__ inline void store_weight(const adamw_arguments &a, uint64_t at, const whole_weight &weight) {
  store_group((float *)a.weight + at, weight.values, GROUP, a.vectors);
}

__device__ inline void store_weight(const adamw_arguments &a, uint64_t at, const half_weight &weight) {
  store_group((__half *)a.weight + at, weight.values, GROUP, a.vectors);
  store_group((float *)a.master + at, weight.values, GROUP, a.vectors);
}

__device__ inline bool update_element(split_weight *weight, uint32_t i, const flap_adamw &s, float decay, float *m,
                                      float *v, float grad) {
  return update_split(s, decay, &weight->high[i], &weight->low[i], m, v, grad);
}
__device__ inline bool update_element(whole_weight *weight, uint32_t i, const flap_adamw &s, float decay, float *m,
                                      float *v, float grad) {
  return update_whole(s, decay, &weight->values[i], m, v, grad);
}

__device__ inline bool update_element(half_weight *weight, uint32_t i, const flap_adamw &s, float decay, float *m,
                                      float *v, float grad) {
  return update_whole(s, decay, &weight->values[i], m, v, grad, FLAP_F16_LIMIT_BITS);
}

template <typename W, typename G>
__device__ inline bool update(W *weight, const adamw_arguments &a, const raw_group<G> &grad, float m[GROUP],
                              float v[GROUP]) {
  const float decay = block_decay(a);
  bool refused = false;
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    refused |= update_element(weight, i, a.scalars, decay, &m[i], &v[i], to_float(grad.elements[i]));
  return refused;
}

template <typename W, typename G>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_8bit(const __grid_constant__ adamw_8bit_arguments a) {
  __shared__ moment_ratios ratios;
  const uint64_t at = group_of(a.common);
  const uint64_t moment_block = at / FLAP_OPS_MOMENT_BLOCK;
  W weight;
  alignas(8) int8_t m_codes[GROUP];
  alignas(8) uint8_t v_codes[GROUP];
  float m[GROUP], v[GROUP];
  load_weight(&weight, a.common, at);
  const raw_group<G> grad = load_raw((const G *)a.common.grad + at, GROUP, a.common.vectors);
  load_bytes(m_codes, a.m + at, a.common.vectors);
  load_bytes(v_codes, a.v + at, a.common.vectors);
  float m_largest = a.m_largest[moment_block], v_largest = a.v_largest[moment_block];
  make_ratios(&ratios);
  __syncthreads();
  read_moments(m, v, m_codes, v_codes, m_largest, v_largest, ratios);
  bool refused = update(&weight, a.common, grad, m, v);
  store_weight(a.common, at, weight);
  refused |= write_moments(m_codes, v_codes, &m_largest, &v_largest, m, v);
  store_bytes(a.m + at, m_codes, a.common.vectors);
  store_bytes(a.v + at, v_codes, a.common.vectors);
  if (threadIdx.x % WARP == 0) {
    a.m_largest[moment_block] = m_largest;
    a.v_largest[moment_block] = v_largest;
  }
  if (refused)
    *a.common.fault = 1;
}

static void launch_adamw_8bit(flap_ops *ops, flap_dtype weight_dtype, flap_dtype grad_dtype,
                              const adamw_8bit_arguments &a) {
  const cudaStream_t stream = cuda_stream(ops);
  const uint32_t blocks = a.common.blocks.count;
  if (weight_dtype == FLAP_BF16 && grad_dtype == FLAP_BF16)
    adamw_8bit<split_weight, __nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_BF16)
    adamw_8bit<split_weight, float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_F16 && grad_dtype == FLAP_BF16)
    adamw_8bit<half_weight, __nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (weight_dtype == FLAP_F16)
    adamw_8bit<half_weight, float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else if (grad_dtype == FLAP_BF16)
    adamw_8bit<whole_weight, __nv_bfloat16><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
  else
    adamw_8bit<whole_weight, float><<<blocks, ADAMW_THREADS, 0, stream>>>(a);
}

void cuda_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                     void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                     const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  flap_assert(weight_dtype == FLAP_F32 || weight_dtype == FLAP_BF16 || weight_dtype == FLAP_F16);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  const uint32_t blocks = (uint32_t)(elements / FLAP_OPS_BLOCK);
  if (blocks == 0)
    return;
  adamw_8bit_arguments a = {};
  a.common.scalars = *scalars;
  a.common.weight = weight;
  a.common.master = master;
  a.common.grad = grad;
  a.common.fault = fault;
  a.common.vectors = aligned16(weight) && aligned16(master) && aligned16(m) && aligned16(v) && aligned16(grad);
  a.m = m;
  a.v = v;
  a.m_largest = m_largest;
  a.v_largest = v_largest;
  for (uint32_t done = 0; done < blocks; done += a.common.blocks.count) {
    a.common.blocks = take_range(decay_blocks, done, blocks);
    launch_adamw_8bit(ops, weight_dtype, grad_dtype, a);
  }
  cuda_launched(ops, "adamw, 8-bit moments");
}
