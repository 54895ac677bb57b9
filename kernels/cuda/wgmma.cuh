/* Products by warpgroups on Hopper (sm_90a): wgmma, its operands in shared memory or, for the left one, in registers.
 *
 * A warpgroup is four warps, which own 64 rows of the result: warp w rows 16 w to 16 w + 15, as fragments like those of
 * mma.m16n8k16 (tensor_cores.cuh), so the steps between the products are the same. The right operand is read from
 * shared memory once for all four.
 *
 * A panel is a number of rows of 64 elements, 128 bytes, at a multiple of 1024 bytes, with chunk c of row r at place
 * c ^ (r % 8): what the hardware calls the 128-byte swizzle. A tile of HD columns is HD / 64 panels one after another.
 *
 * wgmma is asynchronous. Registers that it reads or writes must rest between wgmma_begin and the wgmma_wait that covers
 * the commit; wgmma_hold keeps the compiler from moving their uses across. What cp.async wrote is made visible to wgmma
 * by panels_arrived, before a barrier. */
#ifndef FLAP_KERNELS_CUDA_WGMMA_CUH
#define FLAP_KERNELS_CUDA_WGMMA_CUH

#include "kernels/cuda/tensor_cores.cuh"

constexpr uint32_t PANEL_ROW = 128;

__device__ __forceinline__ void panels_arrived() {
  copies_wait<0>();
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
 * With K across the rows, `leading` is the distance of panels and groups of 8 steps of K are 1024 bytes apart. The
 * steps of a product differ by a constant, which is added when the product is started: descriptors that the compiler
 * keeps from one tile to the next would take the registers of a tile. */
struct wgmma_operand {
  uint32_t low;
  __device__ __forceinline__ wgmma_operand(uint32_t address, uint32_t leading)
      : low((address & 0x3ffff) >> 4 | leading >> 4 << 16) {
    asm volatile("" : "+r"(low));
  }
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    return static_cast<uint64_t>(1024 >> 4 | 1u << 30) << 32 | (low + (offset >> 4));
  }
};

/* Sums as operands; `how` "+f": read and written, "=&f": written. */
#define WGMMA_C4(how, n) how(c[0][n][0]), how(c[0][n][1]), how(c[0][n][2]), how(c[0][n][3])
#define WGMMA_C16(how, n) WGMMA_C4(how, n), WGMMA_C4(how, n + 1), WGMMA_C4(how, n + 2), WGMMA_C4(how, n + 3)
#define WGMMA_C32(how) WGMMA_C16(how, 0), WGMMA_C16(how, 4)
#define WGMMA_C64(how) WGMMA_C32(how), WGMMA_C16(how, 8), WGMMA_C16(how, 12)
#define WGMMA_C128(how) WGMMA_C64(how), WGMMA_C16(how, 16), WGMMA_C16(how, 20), WGMMA_C16(how, 24), WGMMA_C16(how, 28)
#define WGMMA_P32                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_P64                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define WGMMA_P128                                                                                         \
  WGMMA_P64 ", "                                                                                           \
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

/* From shared memory; `adds` 0 overwrites the sums. ACROSS: whether K of the left and the right one runs across their
 * rows. */
#define WGMMA_SHARED(TYPE, COLUMNS, PLACES, SUMS, A, B, ADDS, ACROSS)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" PLACES "}, " A ", " B \
               ", p, 1, 1, " ACROSS ";\n}\n"                                                                   \
               : SUMS                                                                                          \
               : "l"(a), "l"(b), "r"(adds))

/* Left operand from registers. ACROSS 1: K of the right one runs across its rows. */
#define WGMMA_REGISTERS(TYPE, COLUMNS, PLACES, SUMS, A, B, ADDS, ACROSS)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\n"                                                 \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" PLACES "}, {" A "}, " B \
               ", p, 1, 1, " ACROSS ";\n}\n"                                                                     \
               : SUMS                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

template <typename T> struct wgmma;

/* The products of one storage type, which the instructions name TYPE. */
#define WGMMA_PRODUCTS(T, TYPE)                                                                                        \
  template <> struct wgmma<T> {                                                                                        \
    static __device__ __forceinline__ void shared(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {             \
      WGMMA_SHARED(TYPE, "64", WGMMA_P32, WGMMA_C32("+f"), "%32", "%33", "%34", "0, 0");                               \
    }                                                                                                                  \
    static __device__ __forceinline__ void both_across(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {        \
      WGMMA_SHARED(TYPE, "64", WGMMA_P32, WGMMA_C32("+f"), "%32", "%33", "%34", "1, 1");                               \
    }                                                                                                                  \
    static __device__ __forceinline__ void shared_first(float (&c)[1][8][4], uint64_t a, uint64_t b) {                 \
      const int adds = 0;                                                                                              \
      WGMMA_SHARED(TYPE, "64", WGMMA_P32, WGMMA_C32("=&f"), "%32", "%33", "%34", "0, 0");                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void both_across_first(float (&c)[1][8][4], uint64_t a, uint64_t b) {            \
      const int adds = 0;                                                                                              \
      WGMMA_SHARED(TYPE, "64", WGMMA_P32, WGMMA_C32("=&f"), "%32", "%33", "%34", "1, 1");                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void right_across(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {       \
      WGMMA_SHARED(TYPE, "64", WGMMA_P32, WGMMA_C32("+f"), "%32", "%33", "%34", "0, 1");                               \
    }                                                                                                                  \
    static __device__ __forceinline__ void along(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {  \
      WGMMA_REGISTERS(TYPE, "64", WGMMA_P32, WGMMA_C32("+f"), "%32, %33, %34, %35", "%36", "%37", "0");                \
    }                                                                                                                  \
    static __device__ __forceinline__ void across(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) { \
      WGMMA_REGISTERS(TYPE, "64", WGMMA_P32, WGMMA_C32("+f"), "%32, %33, %34, %35", "%36", "%37", "1");                \
    }                                                                                                                  \
    static __device__ __forceinline__ void shared(float (&c)[1][16][4], uint64_t a, uint64_t b, int adds) {            \
      WGMMA_SHARED(TYPE, "128", WGMMA_P64, WGMMA_C64("+f"), "%64", "%65", "%66", "0, 0");                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void shared_first(float (&c)[1][16][4], uint64_t a, uint64_t b) {                \
      const int adds = 0;                                                                                              \
      WGMMA_SHARED(TYPE, "128", WGMMA_P64, WGMMA_C64("=&f"), "%64", "%65", "%66", "0, 0");                             \
    }                                                                                                                  \
    static __device__ __forceinline__ void right_across(float (&c)[1][16][4], uint64_t a, uint64_t b, int adds) {      \
      WGMMA_SHARED(TYPE, "128", WGMMA_P64, WGMMA_C64("+f"), "%64", "%65", "%66", "0, 1");                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void along(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) { \
      WGMMA_REGISTERS(TYPE, "128", WGMMA_P64, WGMMA_C64("+f"), "%64, %65, %66, %67", "%68", "%69", "0");               \
    }                                                                                                                  \
    static __device__ __forceinline__ void across(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b,            \
                                                  int adds) {                                                          \
      WGMMA_REGISTERS(TYPE, "128", WGMMA_P64, WGMMA_C64("+f"), "%64, %65, %66, %67", "%68", "%69", "1");               \
    }                                                                                                                  \
    static __device__ __forceinline__ void shared(float (&c)[1][32][4], uint64_t a, uint64_t b, int adds) {            \
      WGMMA_SHARED(TYPE, "256", WGMMA_P128, WGMMA_C128("+f"), "%128", "%129", "%130", "0, 0");                         \
    }                                                                                                                  \
    static __device__ __forceinline__ void right_across(float (&c)[1][32][4], uint64_t a, uint64_t b, int adds) {      \
      WGMMA_SHARED(TYPE, "256", WGMMA_P128, WGMMA_C128("+f"), "%128", "%129", "%130", "0, 1");                         \
    }                                                                                                                  \
  };

WGMMA_PRODUCTS(__nv_bfloat16, "bf16")
WGMMA_PRODUCTS(__half, "f16")
#undef WGMMA_PRODUCTS

#endif
