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
 * With K across the rows, `leading` is the distance of panels and groups of 8 steps of K are 1024 bytes apart. The steps
 * of a product differ by a constant, which is added when the product is started: descriptors that the compiler keeps
 * from one tile to the next would take the registers of a tile. */
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
#define ATTENTION_C4(how, n) how(c[0][n][0]), how(c[0][n][1]), how(c[0][n][2]), how(c[0][n][3])
#define ATTENTION_C16(how, n) \
  ATTENTION_C4(how, n), ATTENTION_C4(how, n + 1), ATTENTION_C4(how, n + 2), ATTENTION_C4(how, n + 3)
#define ATTENTION_C32(how) ATTENTION_C16(how, 0), ATTENTION_C16(how, 4)
#define ATTENTION_C64(how) ATTENTION_C32(how), ATTENTION_C16(how, 8), ATTENTION_C16(how, 12)
#define ATTENTION_P32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTENTION_P64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* From shared memory; `adds` 0 overwrites the sums. ACROSS: whether K of the left and the right one runs across their
 * rows. */
#define ATTENTION_WGMMA_SHARED(TYPE, COLUMNS, PLACES, SUMS, A, B, ADDS, ACROSS)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" PLACES "}, " A ", " B \
               ", p, 1, 1, " ACROSS ";\n}\n"                                                                   \
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

/* The products of one storage type, which the instructions name TYPE. */
#define ATTENTION_WGMMA_PRODUCTS(T, TYPE) \
  template <> struct wgmma<T> {                                                                                            \
    static __device__ __forceinline__ void shared(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {                 \
      ATTENTION_WGMMA_SHARED(TYPE, "64", ATTENTION_P32, ATTENTION_C32("+f"), "%32", "%33", "%34", "0, 0");                 \
    }                                                                                                                      \
    static __device__ __forceinline__ void both_across(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {            \
      ATTENTION_WGMMA_SHARED(TYPE, "64", ATTENTION_P32, ATTENTION_C32("+f"), "%32", "%33", "%34", "1, 1");                 \
    }                                                                                                                      \
    static __device__ __forceinline__ void shared_first(float (&c)[1][8][4], uint64_t a, uint64_t b) {                     \
      const int adds = 0;                                                                                                  \
      ATTENTION_WGMMA_SHARED(TYPE, "64", ATTENTION_P32, ATTENTION_C32("=&f"), "%32", "%33", "%34", "0, 0");                \
    }                                                                                                                      \
    static __device__ __forceinline__ void both_across_first(float (&c)[1][8][4], uint64_t a, uint64_t b) {                \
      const int adds = 0;                                                                                                  \
      ATTENTION_WGMMA_SHARED(TYPE, "64", ATTENTION_P32, ATTENTION_C32("=&f"), "%32", "%33", "%34", "1, 1");                \
    }                                                                                                                      \
    static __device__ __forceinline__ void right_across(float (&c)[1][8][4], uint64_t a, uint64_t b, int adds) {           \
      ATTENTION_WGMMA_SHARED(TYPE, "64", ATTENTION_P32, ATTENTION_C32("+f"), "%32", "%33", "%34", "0, 1");                 \
    }                                                                                                                      \
    static __device__ __forceinline__ void along(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {      \
      ATTENTION_WGMMA_REGISTERS(TYPE, "64", ATTENTION_P32, ATTENTION_C32("+f"), "%32, %33, %34, %35", "%36", "%37", "0");  \
    }                                                                                                                      \
    static __device__ __forceinline__ void across(float (&c)[1][8][4], const uint32_t (&a)[4], uint64_t b, int adds) {     \
      ATTENTION_WGMMA_REGISTERS(TYPE, "64", ATTENTION_P32, ATTENTION_C32("+f"), "%32, %33, %34, %35", "%36", "%37", "1");  \
    }                                                                                                                      \
    static __device__ __forceinline__ void shared(float (&c)[1][16][4], uint64_t a, uint64_t b, int adds) {                \
      ATTENTION_WGMMA_SHARED(TYPE, "128", ATTENTION_P64, ATTENTION_C64("+f"), "%64", "%65", "%66", "0, 0");                \
    }                                                                                                                      \
    static __device__ __forceinline__ void shared_first(float (&c)[1][16][4], uint64_t a, uint64_t b) {                    \
      const int adds = 0;                                                                                                  \
      ATTENTION_WGMMA_SHARED(TYPE, "128", ATTENTION_P64, ATTENTION_C64("=&f"), "%64", "%65", "%66", "0, 0");               \
    }                                                                                                                      \
    static __device__ __forceinline__ void right_across(float (&c)[1][16][4], uint64_t a, uint64_t b, int adds) {          \
      ATTENTION_WGMMA_SHARED(TYPE, "128", ATTENTION_P64, ATTENTION_C64("+f"), "%64", "%65", "%66", "0, 1");                \
    }                                                                                                                      \
    static __device__ __forceinline__ void along(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) {     \
      ATTENTION_WGMMA_REGISTERS(TYPE, "128", ATTENTION_P64, ATTENTION_C64("+f"), "%64, %65, %66, %67", "%68", "%69", "0"); \
    }                                                                                                                      \
    static __device__ __forceinline__ void across(float (&c)[1][16][4], const uint32_t (&a)[4], uint64_t b, int adds) {    \
      ATTENTION_WGMMA_REGISTERS(TYPE, "128", ATTENTION_P64, ATTENTION_C64("+f"), "%64, %65, %66, %67", "%68", "%69", "1"); \
    }                                                                                                                      \
  };

ATTENTION_WGMMA_PRODUCTS(__nv_bfloat16, "bf16")
ATTENTION_WGMMA_PRODUCTS(__half, "f16")
#undef ATTENTION_WGMMA_PRODUCTS

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
  const wgmma_operand left(rows, 16), right(tile, 16);
#pragma unroll
  for (int k = 0; k < HD / 16; ++k) {
    const uint32_t panel = k / 4, within = k % 4 * 32;
    const uint64_t a = left.at(panel * (ROWS * PANEL_ROW) + within), b = right.at(panel * (N * PANEL_ROW) + within);
    if (k == 0)
      wgmma<T>::shared_first(c, a, b);
    else
      wgmma<T>::shared(c, a, b, 1);
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
  const wgmma_operand right(tile, 16);
#pragma unroll
  for (int k = 0; k < HD / 16; ++k)
    wgmma<T>::along(c, left[k], right.at(k / 4 * (N * PANEL_ROW) + k % 4 * 32), k > 0);
  wgmma_commit();
}

/* c (64, HD) += left (64, N) · tile (N, HD), committed. */
template <typename T, int HD, int N>
__device__ __forceinline__ void panels_accumulate(float (&c)[1][HD / 8][4], const uint32_t (&left)[1][N / 16][4],
                                                  uint32_t tile) {
  const wgmma_operand right(tile, N * PANEL_ROW);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    wgmma<T>::across(c, left[0][k], right.at(k * (16 * PANEL_ROW)), 1);
  wgmma_commit();
}

/* The same with the left operand in shared memory: 64 rows, `rows` the first of them, in panels of ROWS rows. */
template <typename T, int HD, int ROWS, int N>
__device__ __forceinline__ void panels_accumulate(float (&c)[1][HD / 8][4], uint32_t rows, uint32_t tile) {
  const wgmma_operand left(rows, 16), right(tile, N * PANEL_ROW);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    wgmma<T>::right_across(c, left.at(k / 4 * (ROWS * PANEL_ROW) + k % 4 * 32), right.at(k * (16 * PANEL_ROW)), 1);
  wgmma_commit();
}

/* c (64, 64) = left (N, 64)ᵀ · right (N, 64), committed; both are panels. */
template <typename T, int N>
__device__ __forceinline__ void panels_multiply_across(float (&c)[1][8][4], uint32_t left, uint32_t right) {
  const wgmma_operand a(left, N * PANEL_ROW), b(right, N * PANEL_ROW);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    if (k == 0)
      wgmma<T>::both_across_first(c, a.at(0), b.at(0));
    else
      wgmma<T>::both_across(c, a.at(k * (16 * PANEL_ROW)), b.at(k * (16 * PANEL_ROW)), 1);
  wgmma_commit();
}

/* A warp's 16 rows of packed sums (64, N), into a tile with panels of ROWS rows; `rows` is the first of them. */
template <int N, int ROWS>
__device__ __forceinline__ void panels_store_fragments(uint32_t rows, const uint32_t (&packed)[1][N / 16][4]) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     rows + k / 4 * (ROWS * PANEL_ROW) + (lane & 15) * PANEL_ROW +
                     (((k % 4 * 2 + (lane >> 4)) ^ (lane & 7)) << 4)),
                 "r"(packed[0][k][0]), "r"(packed[0][k][1]), "r"(packed[0][k][2]), "r"(packed[0][k][3])
                 : "memory");
}

#endif
