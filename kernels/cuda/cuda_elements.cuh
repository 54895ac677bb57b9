/* Loading, storing and adding up elements of any storage type: what the row-wise kernels share.
 *
 * A thread works on groups of 8 consecutive elements: 16 bytes of a 16-bit type, 32 of fp32. Whether a group is read as
 * whole vectors or element by element depends on alignment and on the row's end, and changes no result: which thread
 * has which elements, and the order of sums, never do.
 */
#ifndef FLAP_KERNELS_CUDA_ELEMENTS_CUH
#define FLAP_KERNELS_CUDA_ELEMENTS_CUH

#include "base/assert.h"
#include "kernels/cuda/cuda_internal.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define GROUP 8u
#define WARP 32u
#define WARP_ALL 0xffffffffu

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) {
  return x;
}
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

/* Rounded to the storage type, as fp32. */
template <typename T> __device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

/* e^x and 1/x for results that are rounded to T: in fp32 the exact functions; for the 16-bit types the card's own, some
 * 2^-21 off, because with -fmad=false the exact ones make kernels that should be bound by memory wait for arithmetic. */
template <typename T> __device__ inline float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
template <> __device__ inline float exponential<float>(float x) {
  return expf(x);
}
template <typename T> __device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <> __device__ inline float reciprocal<float>(float x) {
  return 1.0f / x;
}

/* silu(gate) * up, silu rounded before the product; and with dout, the gradient of it, those of gate and up. One text,
 * because kernels that do more than this must give the same bits. */
template <typename T> __device__ inline float swiglu_value(float gate, float up) {
  return rounded<T>(gate * reciprocal<T>(1.0f + exponential<T>(-gate))) * up;
}
struct swiglu_gradients {
  float gate, up, value;
};
template <typename T> __device__ inline swiglu_gradients swiglu_gradients_of(float gate, float up, float dout) {
  const float sigmoid = reciprocal<T>(1.0f + exponential<T>(-gate)), silu = gate * sigmoid;
  return {dout * up * (sigmoid * (1.0f + gate * (1.0f - sigmoid))), dout * rounded<T>(silu), rounded<T>(silu) * up};
}

/* A pair of a head turned by an angle. */
__device__ inline void rope_turn(float &first, float &second, float cosine, float sine) {
  const float x = first, y = second;
  first = x * cosine - y * sine;
  second = y * cosine + x * sine;
}

/* A group as it is stored: half the registers of fp32 for the 16-bit types, so that more of them can be under way. */
template <typename T> struct alignas(16) raw_group { T elements[GROUP]; };

template <typename T> __device__ inline raw_group<T> load_raw(const T *p, uint32_t valid, bool vectors) {
  raw_group<T> raw;
  if (vectors) {
#pragma unroll
    for (uint32_t i = 0; i < sizeof raw / 16; ++i)
      reinterpret_cast<uint4 *>(raw.elements)[i] = reinterpret_cast<const uint4 *>(p)[i];
  } else {
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      raw.elements[i] = i < valid ? p[i] : from_float<T>(0.0f);
  }
  return raw;
}

/* A group of a 16-bit type at an address in shared memory. */
template <typename T> __device__ __forceinline__ raw_group<T> load_shared(uint32_t from) {
  raw_group<T> raw;
  static_assert(sizeof raw == sizeof(uint4));
  uint4 w;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(from));
  *reinterpret_cast<uint4 *>(raw.elements) = w;
  return raw;
}

template <typename T> __device__ inline void widen(float out[GROUP], const raw_group<T> &raw) {
#pragma unroll
  for (uint32_t i = 0; i < GROUP; ++i)
    out[i] = to_float(raw.elements[i]);
}

/* Loads the group at `p`, of which `valid` elements are there; the others become 0. `vectors`: p is aligned to 16 bytes
 * and all 8 are there. */
template <typename T> __device__ inline void load_group(float out[GROUP], const T *p, uint32_t valid, bool vectors) {
  widen(out, load_raw(p, valid, vectors));
}

template <typename T> __device__ inline void store_group(T *p, const float in[GROUP], uint32_t valid, bool vectors) {
  if (vectors) {
    alignas(16) T elements[GROUP];
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      elements[i] = from_float<T>(in[i]);
#pragma unroll
    for (uint32_t i = 0; i < sizeof elements / 16; ++i)
      reinterpret_cast<uint4 *>(p)[i] = reinterpret_cast<const uint4 *>(elements)[i];
  } else {
#pragma unroll
    for (uint32_t i = 0; i < GROUP; ++i)
      if (i < valid)
        p[i] = from_float<T>(in[i]);
  }
}

/* The sum over a block, in an order that the number of threads alone decides; every thread gets it. `shared` has a
 * float per warp; it is free for use again after the next barrier. */
__device__ inline float block_sum(float value, float *shared) {
#pragma unroll
  for (uint32_t distance = WARP / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(WARP_ALL, value, distance);
  const uint32_t warps = blockDim.x / WARP;
  if (warps == 1)
    return value;
  if (threadIdx.x % WARP == 0)
    shared[threadIdx.x / WARP] = value;
  __syncthreads();
  value = threadIdx.x % WARP < warps ? shared[threadIdx.x % WARP] : 0.0f;
#pragma unroll
  for (uint32_t distance = WARP / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(WARP_ALL, value, distance);
  return value;
}

/* ---- host side ---- */

static inline bool aligned16(const void *pointer) {
  return ((uintptr_t)pointer & 15u) == 0;
}

/* Rows of `stride` elements that start at `pointer` all start at multiples of 16 bytes. NULL is fine. */
static inline bool rows_aligned(flap_dtype dtype, const void *pointer, uint64_t stride) {
  return aligned16(pointer) && stride * flap_dtype_bytes(dtype) % 16 == 0;
}

/* Calls `launch` with a type tag for the storage type. */
#define CUDA_FOR_DTYPE(dtype, T, ...)   \
  do {                                  \
    if ((dtype) == FLAP_BF16) {         \
      using T = __nv_bfloat16;          \
      __VA_ARGS__;                      \
    } else if ((dtype) == FLAP_F16) {   \
      using T = __half;                 \
      __VA_ARGS__;                      \
    } else {                            \
      flap_assert((dtype) == FLAP_F32); \
      using T = float;                  \
      __VA_ARGS__;                      \
    }                                   \
  } while (0)

#endif
