/* Products by warpgroups on Hopper (sm_90a): wgmma, its operands in shared memory or, for the left one, in registers.
 *
 * A warpgroup is four warps, which own 64 rows of the result: warp w rows 16 w to 16 w + 15, as fragments like those of
 * mma.m16n8k16 (attention_tiles.cuh), so the steps between the products are the same. The right operand is read from
 * shared memory once for all four.
 *
 * A panel is a number of rows of 64 elements, 128 bytes, at a multiple of 1024 bytes, with chunk c of row r at place
 * c ^ (r % 8): what the hardware calls the 128-byte swizzle. A tile of HD columns is HD / 64 panels one after another.
 *
 * wgmma is asynchronous. Registers that it reads or writes must rest between wgmma_begin and the wgmma_wait that covers
 * the commit; wgmma_hold keeps the compiler from moving their uses across. What cp.async wrote is made visible to wgmma
 * by panels_arrived, before a barrier. */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_WGMMA_CUH
#define FLAP_KERNELS_CUDA_ATTENTION_WGMMA_CUH

#include "kernels/cuda/attention_tiles.cuh"

constexpr uint32_t PANEL_ROW = 128;

__device__ __forceinline__ void panels_arrived() {
  attention_wait<0>();
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int LEFT> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(LEFT) : "memory");
}

template <int N> __device__ __forceinline__ void wgmma_hold(float (&c)[1][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile("" : "+f"(c[0][n][i])::"memory");
}

template <int N> __device__ __forceinline__ void wgmma_hold(uint32_t (&a)[1][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile("" : "+r"(a[0][n][i])::"memory");
}

/* Where an operand lies: with rows along K ("major" K), groups of 8 rows 1024 bytes apart; `leading` is then unused.
 * With K across the rows, `leading` is the distance of panels and groups of 8 steps of K are 1024 bytes apart. */
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

#define ATTENTION_C4(n) "+f"(c[0][n][0]), "+f"(c[0][n][1]), "+f"(c[0][n][2]), "+f"(c[0][n][3])
#define ATTENTION_C16(n) ATTENTION_C4(n), ATTENTION_C4(n + 1), ATTENTION_C4(n + 2), ATTENTION_C4(n + 3)
#define ATTENTION_C32 ATTENTION_C16(0), ATTENTION_C16(4)
#define ATTENTION_C64 ATTENTION_C32, ATTENTION_C16(8), ATTENTION_C16(12)
#define ATTENTION_P32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTENTION_P64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* From shared memory, both with rows along K; `adds` 0 overwrites the sums. */
#define ATTENTION_WGMMA_SHARED(TYPE, COLUMNS, PLACES, SUMS, A, B, ADDS)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" PLACES "}, " A ", " B \
               ", p, 1, 1, 0, 0;\n}\n"                                                                         \
               : SUMS                                                                                          \
               : "l"(a), "l"(b), "r"(adds))

/* Left operand from registers. ACROSS 1: K of the right one runs across its rows. */
#define ATTENTION_WGMMA_REGISTERS(TYPE, COLUMNS, PLACES, SUMS, A, B, ADDS, ACROSS)                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\n"                                                 \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" PLACES "}, {" A "}, " B \
               ", p, 1, 1, " ACROSS ";\n}\n"                                                                     \
               : SUMS                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

template <typename T> struct wgmma;

template <> struct wgmma<__nv_bfloat16> {
  static __device__ __forceinline__ void shared(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {
    ATTENTION_WGMMA_SHARED("bf16", "64", ATTENTION_P32, ATTENTION_C32, "%32", "%33", "%34");
  }
  static __device__ __forceinline__ void along(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("bf16", "64", ATTENTION_P32, ATTENTION_C32, "%32, %33, %34, %35", "%36", "%37", "0");
  }
  static __device__ __forceinline__ void across(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("bf16", "64", ATTENTION_P32, ATTENTION_C32, "%32, %33, %34, %35", "%36", "%37", "1");
  }
  static __device__ __forceinline__ void shared(float (&c)[1][16][4], uint64_t a, uint64_t b, int adds) {
    ATTENTION_WGMMA_SHARED("bf16", "128", ATTENTION_P64, ATTENTION_C64, "%64", "%65", "%66");
  }
  static __device__ __forceinline__ void along(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("bf16", "128", ATTENTION_P64, ATTENTION_C64, "%64, %65, %66, %67", "%68", "%69", "0");
  }
  static __device__ __forceinline__ void across(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("bf16", "128", ATTENTION_P64, ATTENTION_C64, "%64, %65, %66, %67", "%68", "%69", "1");
  }
};

template <> struct wgmma<__half> {
  static __device__ __forceinline__ void shared(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {
    ATTENTION_WGMMA_SHARED("f16", "64", ATTENTION_P32, ATTENTION_C32, "%32", "%33", "%34");
  }
  static __device__ __forceinline__ void along(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("f16", "64", ATTENTION_P32, ATTENTION_C32, "%32, %33, %34, %35", "%36", "%37", "0");
  }
  static __device__ __forceinline__ void across(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("f16", "64", ATTENTION_P32, ATTENTION_C32, "%32, %33, %34, %35", "%36", "%37", "1");
  }
  static __device__ __forceinline__ void shared(float (&c)[1][16][4], uint64_t a, uint64_t b, int adds) {
    ATTENTION_WGMMA_SHARED("f16", "128", ATTENTION_P64, ATTENTION_C64, "%64", "%65", "%66");
  }
  static __device__ __forceinline__ void along(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("f16", "128", ATTENTION_P64, ATTENTION_C64, "%64, %65, %66, %67", "%68", "%69", "0");
  }
  static __device__ __forceinline__ void across(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) {
    ATTENTION_WGMMA_REGISTERS("f16", "128", ATTENTION_P64, ATTENTION_C64, "%64, %65, %66, %67", "%68", "%69", "1");
  }
};

/* ---- tiles of panels ---- */

/* As attention_load_tile, into panels of ROWS rows. */
template <int HD, int ROWS, int THREADS>
__device__ __forceinline__ void panels_load(uint32_t tile, const uint16_t *from, uint32_t valid, uint64_t stride,
                                            uint32_t head_size) {
  constexpr int CHUNKS = HD / 8, STEP = THREADS / CHUNKS;
  static_assert(STEP % 8 == 0, "the place of a thread's chunk must not depend on the round");
  const uint32_t row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  const bool column_valid = chunk * 8 < head_size;
  const uint16_t *source = from + row * stride + chunk * 8;
  uint32_t to = tile + (chunk >> 3) * (ROWS * PANEL_ROW) + row * PANEL_ROW + (((chunk & 7) ^ (row & 7)) << 4);
#pragma unroll
  for (int i = 0; i < (ROWS + STEP - 1) / STEP; ++i) {
    const bool copied = column_valid && row + i * STEP < valid;
    if (ROWS % STEP == 0 || row + i * STEP < ROWS)
      attention_copy16(to, copied ? source : from, copied ? 16 : 0);
    source += STEP * stride;
    to += STEP * PANEL_ROW;
  }
}

/* c (64, N) = rows (64, HD) · tile (N, HD)ᵀ, committed. `rows`: the first of the warpgroup's in panels of ROWS rows. */
template <typename T, int HD, int ROWS, int N>
__device__ __forceinline__ void panels_multiply(float (&c)[1][N / 8][4], uint32_t rows, uint32_t tile) {
#pragma unroll
  for (int k = 0; k < HD / 16; ++k) {
    const uint32_t panel = k / 4, within = k % 4 * 32;
    wgmma<T>::shared(c, wgmma_descriptor(rows + panel * (ROWS * PANEL_ROW) + within, 16),
                     wgmma_descriptor(tile + panel * (N * PANEL_ROW) + within, 16), k > 0);
  }
  wgmma_commit();
}

/* The warp's 16 rows of a tile with panels of ROWS rows, as left operands; `rows` is the first of them. */
template <int HD, int ROWS> __device__ __forceinline__ void panels_fragments(uint32_t (&a)[HD / 16][4], uint32_t rows) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < HD / 16; ++k)
    attention_ldmatrix(a[k], rows + k / 4 * (ROWS * PANEL_ROW) + (lane & 15) * PANEL_ROW +
                                 (((k % 4 * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
}

/* panels_multiply with the left operand in registers, which halves what is read from shared memory. */
template <typename T, int HD, int N>
__device__ __forceinline__ void panels_multiply(float (&c)[1][N / 8][4], const uint32_t (&left)[HD / 16][4],
                                                uint32_t tile) {
#pragma unroll
  for (int k = 0; k < HD / 16; ++k)
    wgmma<T>::along(c, left[k], wgmma_descriptor(tile + k / 4 * (N * PANEL_ROW) + k % 4 * 32, 16), k > 0);
  wgmma_commit();
}

/* c (64, HD) += left (64, N) · tile (N, HD), committed. */
template <typename T, int HD, int N>
__device__ __forceinline__ void panels_accumulate(float (&c)[1][HD / 8][4], const uint32_t (&left)[1][N / 16][4],
                                                  uint32_t tile) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    wgmma<T>::across(c, left[0][k], wgmma_descriptor(tile + k * (16 * PANEL_ROW), N * PANEL_ROW), 1);
  wgmma_commit();
}

#endif
