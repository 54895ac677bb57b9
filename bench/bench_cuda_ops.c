/* Measures the cuda kernels at the shapes of a model of 8 billion parameters: rates of products, of memory traffic for
 * what is bound by it, pinning and copies, and what the driver charges in the end.
 *
 *   bench_cuda_ops [quick]
 *
 * Rates are medians of several runs of several calls, over operands that together exceed the GPU's cache. Traffic
 * counts each operand read or written once. */
#include "base/units.h"
#include "kernels/ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { TOKENS = 8192, HIDDEN = 4096, INTERMEDIATE = 14336, VOCABULARY = 128256, HEADS = 32, HEAD_SIZE = 128 };
#define ELEMENTS ((uint64_t)32 << 20)
#define BUFFERS 8
#define GIB ((uint64_t)1 << 30)
#define RUNS 7

typedef struct bench {
  flap_device *device;
  flap_ops *ops;
  unsigned char *buffers[BUFFERS]; /* random numbers, GIB each but for the last two: 2.25 GIB */
  flap_dtype dtype;
  flap_matmul matmul;
} bench;

typedef void (*bench_fn)(bench *b);

static void die(const char *what) {
  fprintf(stderr, "bench_cuda_ops: %s: %s\n", what, flap_error_message());
  exit(1);
}

static int ascending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void synchronize(bench *b) {
  if (flap_device_synchronize(b->device) != FLAP_OK)
    die("a kernel");
}

static double seconds_of(bench *b, bench_fn fn) {
  double times[RUNS];
  fn(b);
  synchronize(b);
  for (int run = 0; run < RUNS; ++run) {
    const uint64_t start_ns = flap_units_now_ns();
    for (int call = 0; call < 10; ++call)
      fn(b);
    synchronize(b);
    times[run] = (double)(flap_units_now_ns() - start_ns) * 1e-10;
  }
  qsort(times, RUNS, sizeof *times, ascending);
  return times[RUNS / 2];
}

static float *f32(bench *b, int buffer) {
  return (float *)(void *)b->buffers[buffer];
}

/* A number per token; buffer 5 begins with tokens, their order, and these. */
static float *statistics(bench *b) {
  return f32(b, 5) + 2 * TOKENS;
}

/* ---- products ---- */

static void run_matmul(bench *b) {
  flap_ops_matmul(b->ops, &b->matmul);
}

static void matmul(bench *b, flap_transpose transpose, uint32_t m, uint32_t n, uint32_t k, bool accumulate) {
  static const char *const names[] = {"NN", "NT", "TN"};
  b->matmul =
      (flap_matmul){.transpose = transpose, .m = m, .n = n, .k = k, .dtype = b->dtype, .accumulate = accumulate};
  b->matmul.c_dtype = accumulate ? FLAP_F32 : b->dtype;
  b->matmul.a = b->buffers[0];
  b->matmul.b = b->buffers[1];
  b->matmul.c = b->buffers[6];
  b->matmul.lda = transpose == FLAP_TN ? m : k;
  b->matmul.ldb = transpose == FLAP_NT ? k : n;
  b->matmul.ldc = n;
  const double seconds = seconds_of(b, run_matmul);
  printf("matmul %s %6u x %6u, k %6u %-8s%s %8.3f ms %7.1f TFLOP/s\n", names[transpose], m, n, k,
         flap_dtype_name(b->dtype), accumulate ? " +=" : "   ", seconds * 1e3, 2e-12 * m * n * k / seconds);
  fflush(stdout);
}

/* ---- products and what follows them ---- */

static flap_matmul product_to(bench *b, flap_transpose transpose, uint32_t n, int to) {
  return (flap_matmul){.transpose = transpose,
                       .m = TOKENS,
                       .n = n,
                       .k = HIDDEN,
                       .a = b->buffers[0],
                       .b = b->buffers[1],
                       .c = b->buffers[to],
                       .lda = HIDDEN,
                       .ldb = transpose == FLAP_NT ? HIDDEN : n,
                       .ldc = n,
                       .dtype = b->dtype,
                       .c_dtype = b->dtype};
}
static flap_matmul gate_up_of(bench *b) {
  return product_to(b, FLAP_NT, 2 * INTERMEDIATE, 6);
}
static flap_matmul down_of(bench *b) {
  return product_to(b, FLAP_NN, INTERMEDIATE, 2);
}
static flap_matmul qkv_of(bench *b) {
  return product_to(b, FLAP_NT, 3 * HIDDEN, 6);
}
/* Gate and up lie side by side; their gradients go to buffer 7. */
static void *up_of(bench *b, int gate) {
  return b->buffers[gate] + (uint64_t)INTERMEDIATE * flap_dtype_bytes(b->dtype);
}
static void run_gate_up(bench *b) {
  const flap_matmul matmul = gate_up_of(b);
  flap_ops_matmul_swiglu(b->ops, &matmul, b->buffers[2]);
}
static void run_gate_up_apart(bench *b) {
  const flap_matmul matmul = gate_up_of(b);
  flap_ops_matmul(b->ops, &matmul);
  flap_ops_swiglu(b->ops, b->dtype, b->buffers[2], matmul.c, up_of(b, 6), TOKENS, INTERMEDIATE, 2 * INTERMEDIATE);
}
static void run_down(bench *b) {
  const flap_matmul matmul = down_of(b);
  flap_ops_matmul_swiglu_backward(b->ops, &matmul, b->buffers[7], up_of(b, 7), 2 * INTERMEDIATE, true, b->buffers[6],
                                  up_of(b, 6), 2 * INTERMEDIATE);
}
static void run_down_apart(bench *b) {
  const flap_matmul matmul = down_of(b);
  flap_ops_matmul(b->ops, &matmul);
  flap_ops_swiglu_backward(b->ops, b->dtype, b->buffers[7], up_of(b, 7), 2 * INTERMEDIATE, matmul.c, matmul.c,
                           b->buffers[6], up_of(b, 6), 2 * INTERMEDIATE, TOKENS, INTERMEDIATE);
}
static void run_qkv(bench *b) {
  const flap_matmul matmul = qkv_of(b);
  flap_ops_matmul_rope(b->ops, &matmul, f32(b, 5) + ELEMENTS, TOKENS, 0, 2 * HEADS, HEAD_SIZE);
}
static void run_qkv_apart(bench *b) {
  const flap_matmul matmul = qkv_of(b);
  flap_ops_matmul(b->ops, &matmul);
  flap_ops_rope(b->ops, b->dtype, matmul.c, f32(b, 5) + ELEMENTS, TOKENS, TOKENS, 0, 2 * HEADS, HEAD_SIZE, 3 * HIDDEN,
                false);
}

static void together(bench *b, const char *name, bench_fn fn, bench_fn apart) {
  const double one = seconds_of(b, fn), two = seconds_of(b, apart);
  printf("%-28s %8.3f ms, as two operations %.3f ms\n", name, one * 1e3, two * 1e3);
  fflush(stdout);
}

static void products_and_more(bench *b) {
  together(b, "product with swiglu", run_gate_up, run_gate_up_apart);
  together(b, "product with its backward", run_down, run_down_apart);
  together(b, "product with rope", run_qkv, run_qkv_apart);
}

/* ---- what memory bounds ---- */

static void run_norm(bench *b) {
  flap_ops_rmsnorm(b->ops, b->dtype, b->buffers[0], statistics(b), NULL, b->buffers[1], NULL, b->buffers[2], TOKENS,
                   HIDDEN, 1e-5f);
}
static void run_norm_residual(bench *b) {
  flap_ops_rmsnorm(b->ops, b->dtype, b->buffers[0], statistics(b), b->buffers[3], b->buffers[1], b->buffers[4],
                   b->buffers[2], TOKENS, HIDDEN, 1e-5f);
}
static void run_norm_backward(bench *b) {
  flap_ops_rmsnorm_backward(b->ops, b->dtype, b->buffers[0], f32(b, 6), NULL, b->buffers[1], b->buffers[3],
                            b->buffers[2], statistics(b), b->buffers[4], TOKENS, HIDDEN);
}
static void run_add(bench *b) {
  flap_ops_add(b->ops, b->dtype, b->buffers[0], b->buffers[1], b->buffers[2], (uint64_t)TOKENS * HIDDEN);
}
static void run_rope(bench *b) {
  flap_ops_rope(b->ops, b->dtype, b->buffers[0], f32(b, 5) + ELEMENTS, TOKENS, TOKENS, 0, HEADS, HEAD_SIZE, HIDDEN,
                false);
}
static void run_swiglu(bench *b) {
  flap_ops_swiglu(b->ops, b->dtype, b->buffers[2], b->buffers[0], b->buffers[1], TOKENS, INTERMEDIATE, INTERMEDIATE);
}
static void run_swiglu_backward(bench *b) {
  flap_ops_swiglu_backward(b->ops, b->dtype, b->buffers[3], b->buffers[4], INTERMEDIATE, NULL, b->buffers[2],
                           b->buffers[0], b->buffers[1], INTERMEDIATE, TOKENS, INTERMEDIATE);
}
static void run_bias(bench *b) {
  flap_ops_bias_backward(b->ops, b->dtype, f32(b, 6), b->buffers[0], TOKENS, 6144, 6144);
}
static void run_store(bench *b) {
  flap_ops_gradient_store(b->ops, FLAP_BF16, b->buffers[0], f32(b, 6), FLAP_F32, f32(b, 1), ELEMENTS);
}
static void run_embedding(bench *b) {
  flap_ops_embedding(b->ops, b->dtype, b->buffers[0], (int32_t *)(void *)b->buffers[5], b->buffers[7], TOKENS, HIDDEN);
}
static void run_embedding_backward(bench *b) {
  int32_t *ids = (int32_t *)(void *)b->buffers[5];
  flap_ops_embedding_backward(b->ops, b->dtype, f32(b, 6), ids, ids + TOKENS, b->buffers[0], TOKENS, HIDDEN);
}
static void run_zero(bench *b) {
  flap_ops_zero(b->ops, b->buffers[4], GIB / 2);
}
static void run_copy(bench *b) {
  flap_ops_copy(b->ops, b->buffers[4], b->buffers[3], GIB / 2);
}

static void adamw(bench *b, flap_dtype weight) {
  static const uint8_t decays[FLAP_OPS_ADAMW_BLOCKS_MAX / 8] = {0xff};
  const flap_adamw s = {1e-4f, 0.9f, 0.95f, 0.1f, 0.05f, 1.1f, 1.2f, 1e-8f, 0.99999f, 1.0f};
  flap_ops_adamw(b->ops, &s, weight, FLAP_BF16, b->buffers[0],
                 weight == FLAP_BF16 ? (int16_t *)(void *)b->buffers[1] : NULL, f32(b, 2), f32(b, 3), b->buffers[4],
                 decays, (int32_t *)(void *)b->buffers[6], ELEMENTS);
}
static void run_adamw_split(bench *b) {
  adamw(b, FLAP_BF16);
}
static void run_adamw_whole(bench *b) {
  adamw(b, FLAP_F32);
}

/* The codes are any bytes; what they are relative to lies beyond what other rows use of buffer 5. */
static void adamw_8bit(bench *b, flap_dtype weight) {
  static const uint8_t decays[FLAP_OPS_ADAMW_BLOCKS_MAX / 8] = {0xff};
  const flap_adamw s = {1e-4f, 0.9f, 0.95f, 0.1f, 0.05f, 1.1f, 1.2f, 1e-8f, 0.99999f, 1.0f};
  float *largest = f32(b, 5) + 2 * ELEMENTS;
  flap_ops_adamw_8bit(b->ops, &s, weight, FLAP_BF16, b->buffers[0],
                      weight == FLAP_BF16 ? (int16_t *)(void *)b->buffers[1] : NULL, (int8_t *)b->buffers[2],
                      b->buffers[3], largest, largest + ELEMENTS / FLAP_OPS_MOMENT_BLOCK, b->buffers[4], decays,
                      (int32_t *)(void *)b->buffers[6], ELEMENTS);
}
static void run_adamw_8bit_split(bench *b) {
  adamw_8bit(b, FLAP_BF16);
}
static void run_adamw_8bit_whole(bench *b) {
  adamw_8bit(b, FLAP_F32);
}

static void run_head(bench *b) {
  flap_ops_head_loss(b->ops, b->dtype, statistics(b), b->buffers[0], f32(b, 6), true, b->buffers[1], b->buffers[7],
                     (int32_t *)(void *)b->buffers[5], 1e-4f, TOKENS / 2, HIDDEN, VOCABULARY);
}
static void run_head_loss(bench *b) {
  flap_ops_head_loss(b->ops, b->dtype, statistics(b), NULL, NULL, false, b->buffers[1], b->buffers[7],
                     (int32_t *)(void *)b->buffers[5], 1e-4f, TOKENS / 2, HIDDEN, VOCABULARY);
}

static void traffic(bench *b, const char *name, bench_fn fn, double bytes) {
  const double seconds = seconds_of(b, fn);
  printf("%-28s %8.3f ms %8.0f GB/s\n", name, seconds * 1e3, bytes / seconds * 1e-9);
  fflush(stdout);
}

static void all_traffic(bench *b) {
  const double rows = 2.0 * TOKENS * HIDDEN, wide = 2.0 * TOKENS * INTERMEDIATE, elements = (double)ELEMENTS;
  traffic(b, "copy within the GPU", run_copy, (double)GIB);
  traffic(b, "zero", run_zero, (double)GIB / 2);
  traffic(b, "rmsnorm", run_norm, 2 * rows);
  traffic(b, "rmsnorm of a sum", run_norm_residual, 4 * rows);
  traffic(b, "rmsnorm backward", run_norm_backward, 4 * rows);
  traffic(b, "add", run_add, 3 * rows);
  traffic(b, "rope", run_rope, 2 * rows);
  traffic(b, "swiglu", run_swiglu, 3 * wide);
  traffic(b, "swiglu backward", run_swiglu_backward, 5 * wide);
  traffic(b, "bias backward", run_bias, 2.0 * TOKENS * 6144);
  traffic(b, "gradient store", run_store, 6 * elements);
  traffic(b, "adamw, split master", run_adamw_split, 26 * elements);
  traffic(b, "adamw, fp32", run_adamw_whole, 26 * elements);
  traffic(b, "adamw 8-bit, split master", run_adamw_8bit_split, (14 + 16.0 / FLAP_OPS_MOMENT_BLOCK) * elements);
  traffic(b, "adamw 8-bit, fp32", run_adamw_8bit_whole, (14 + 16.0 / FLAP_OPS_MOMENT_BLOCK) * elements);
  traffic(b, "embedding", run_embedding, 2 * rows);
  traffic(b, "embedding backward", run_embedding_backward, 5 * rows);
}

/* ---- setting up ---- */

static void fill(bench *b, unsigned char *to, uint64_t bytes) {
  const uint64_t piece = (uint64_t)64 << 20;
  static uint32_t *values;
  if (values == NULL) {
    values = malloc(piece);
    uint32_t state = 1;
    for (uint64_t i = 0; i < piece / 4; ++i) { /* two bf16 between 2^-9 and 2, any sign; fp32 likewise */
      state = state * 1664525u + 1013904223u;
      values[i] = (state & 0x83ff83ffu) | 0x3c003c00u;
    }
  }
  for (uint64_t at = 0; at < bytes; at += piece)
    if (flap_device_upload(b->device, to + at, values, bytes - at < piece ? bytes - at : piece) != FLAP_OK)
      die("fill");
}

static void set_up(bench *b, unsigned char *memory, uint64_t bytes) {
  uint64_t used = 0;
  for (int i = 0; i < BUFFERS; ++i) {
    const uint64_t size = i < 6 ? GIB : GIB * 9 / 4;
    b->buffers[i] = memory + used;
    used += size;
    if (used > bytes) {
      fprintf(stderr, "bench_cuda_ops: this needs a GPU with 24 GB\n");
      exit(1);
    }
    fill(b, b->buffers[i], size);
  }
  int32_t *ids = malloc(2 * TOKENS * sizeof *ids); /* tokens in ascending order, so positions are sorted too */
  for (int32_t i = 0; i < TOKENS; ++i) {
    ids[i] = (int32_t)((int64_t)i * i / TOKENS * (VOCABULARY / TOKENS));
    ids[TOKENS + i] = i;
  }
  if (flap_device_upload(b->device, b->buffers[5], ids, 2 * TOKENS * sizeof *ids) != FLAP_OK)
    die("fill");
  free(ids);
}

static void copies(bench *b, uint64_t bytes) {
  const uint64_t piece = (uint64_t)4 << 20;
  unsigned char *host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (host == MAP_FAILED)
    return;
  const uint64_t start_ns = flap_units_now_ns();
  if (flap_device_pin_host(b->device, host, bytes) != FLAP_OK)
    die("pin");
  const double seconds = (double)(flap_units_now_ns() - start_ns) * 1e-9;
  printf("pinning %.0f GiB: %.2f s, %.1f GB/s\n", (double)bytes / (double)GIB, seconds, (double)bytes * 1e-9 / seconds);
  for (int both = 0; both < 3; ++both) {
    const uint64_t begin_ns = flap_units_now_ns();
    for (uint64_t at = 0; at < GIB; at += piece) {
      if (both != 1)
        flap_device_copy(b->device, FLAP_STREAM_H2D, b->buffers[0] + at, host + at, piece);
      if (both != 0)
        flap_device_copy(b->device, FLAP_STREAM_D2H, host + GIB + at, b->buffers[1] + at, piece);
    }
    synchronize(b);
    static const char *const names[] = {"H2D", "D2H", "both at once, each"};
    printf("copies of 4 MiB, %s: %.1f GB/s\n", names[both], (double)GIB / (double)(flap_units_now_ns() - begin_ns));
  }
  fflush(stdout);
}

static void products(bench *b) {
  matmul(b, FLAP_NT, 8192, 8192, 8192, false);
  matmul(b, FLAP_NT, TOKENS, HIDDEN, HIDDEN, false);
  matmul(b, FLAP_NT, TOKENS, INTERMEDIATE, HIDDEN, false);
  matmul(b, FLAP_NT, TOKENS, HIDDEN, INTERMEDIATE, false);
  matmul(b, FLAP_NN, TOKENS, HIDDEN, INTERMEDIATE, false);
  matmul(b, FLAP_NN, TOKENS, INTERMEDIATE, HIDDEN, false);
  matmul(b, FLAP_TN, INTERMEDIATE, HIDDEN, TOKENS, true);
  matmul(b, FLAP_TN, HIDDEN, INTERMEDIATE, TOKENS, true);
  matmul(b, FLAP_TN, HIDDEN, HIDDEN, 2048, true);
  matmul(b, FLAP_NT, 1, HIDDEN, HIDDEN, false);
  b->dtype = FLAP_F32;
  matmul(b, FLAP_NT, 4096, 4096, 4096, false);
  b->dtype = FLAP_BF16;
}

int main(int argc, char **argv) {
  const bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
  bench b = {.dtype = FLAP_BF16};
  const flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = 14 * GIB, .events_max = 1};
  uint64_t start_ns = flap_units_now_ns();
  if (flap_device_open(&config, &b.device) != FLAP_OK)
    die("open");
  uint64_t bytes = 0;
  unsigned char *arena = flap_device_arena(b.device, &bytes);
  printf("%s, opened in %.2f s; budget %.0f MiB, arena %.0f MiB, charged %.0f MiB\n", flap_device_describe(b.device),
         (double)(flap_units_now_ns() - start_ns) * 1e-9, (double)config.vram_bytes / 1048576, (double)bytes / 1048576,
         (double)flap_device_memory_peak(b.device) / 1048576);
  flap_ops_limits limits = {.dtype = FLAP_BF16, .batch_max = 1, .sequence_max = TOKENS, .tokens_max = TOKENS};
  limits.hidden = HIDDEN, limits.intermediate = INTERMEDIATE, limits.vocabulary = VOCABULARY;
  limits.heads = HEADS, limits.kv_heads = 8, limits.head_size = HEAD_SIZE, limits.threads = 1;
  const uint64_t workspace = flap_ops_workspace_bytes(FLAP_DEVICE_CUDA, &limits);
  start_ns = flap_units_now_ns();
  if (flap_ops_open(b.device, &limits, arena, &b.ops) != FLAP_OK)
    die("ops");
  printf("%s; workspace %.0f MiB, opened in %.2f s\n", flap_ops_numerics(b.ops), (double)workspace / 1048576,
         (double)(flap_units_now_ns() - start_ns) * 1e-9);
  set_up(&b, arena + workspace, bytes - workspace);
  products(&b);
  products_and_more(&b);
  all_traffic(&b);
  const double flops = 2.0 * TOKENS / 2 * HIDDEN * VOCABULARY;
  const double loss = seconds_of(&b, run_head_loss), head = seconds_of(&b, run_head);
  printf("head of %u tokens: loss %.2f ms %.0f TFLOP/s, with backward %.2f ms %.0f TFLOP/s\n", TOKENS / 2, loss * 1e3,
         flops / loss * 1e-12, head * 1e3, 3 * flops / head * 1e-12);
  copies(&b, quick ? 2 * GIB : 24 * GIB);
  printf("charged at most %.0f MiB of %.0f MiB\n", (double)flap_device_memory_peak(b.device) / 1048576,
         (double)config.vram_bytes / 1048576);
  flap_ops_close(b.ops);
  flap_device_close(b.device);
  return 0;
}
