/* Measures the cpu kernels at the shapes of a small model: products against plain sgemm, attention, the share of each
 * kind of operation in a layer, head and optimizer.
 *
 *   bench_ops [threads]
 *
 * AdamW is measured over more memory than caches hold, against a loop that reads and writes the same arrays on the same
 * threads and computes next to nothing.
 *
 * Rates are of the best of several runs. "of sgemm" compares with one fp32 cblas_sgemm of the whole product on one
 * thread, times the threads. Thread i of the pool is pinned to CPU i. */
#include "base/philox.h"
#include "base/units.h"
#include "kernels/ops.h"

#include <assert.h>
#include <cblas.h>
#include <dlfcn.h>
#include <sched.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 1024, HIDDEN = 192, INTERMEDIATE = 512, VOCABULARY = 257, HEADS = 6, KV_HEADS = 2, HEAD_SIZE = 32 };
enum { SEQUENCE = 256, ELEMENTS = 1 << 20 };
#define BUFFER_BYTES ((uint64_t)6 << 20)
#define BUFFERS 10

typedef struct bench {
  flap_ops *ops;
  __typeof__(&cblas_sgemm) sgemm;
  uint32_t threads;
  unsigned char *buffers[BUFFERS];
  flap_dtype dtype;
  flap_matmul matmul;
  flap_attention attention;
} bench;

typedef void (*bench_fn)(bench *b);

static double seconds_of(bench *b, bench_fn fn) {
  double best = 1e9;
  for (int run = 0; run < 7; ++run) {
    uint32_t calls = 0;
    const uint64_t start_ns = flap_units_now_ns();
    uint64_t now_ns;
    do {
      fn(b);
      ++calls;
      now_ns = flap_units_now_ns();
    } while (now_ns - start_ns < 20000000);
    const double seconds = (double)(now_ns - start_ns) * 1e-9 / calls;
    best = seconds < best ? seconds : best;
  }
  return best;
}

static void run_matmul(bench *b) {
  flap_ops_matmul(b->ops, &b->matmul);
}

static void run_sgemm(bench *b) {
  const flap_matmul *x = &b->matmul;
  b->sgemm(CblasRowMajor, x->transpose == FLAP_TN ? CblasTrans : CblasNoTrans,
           x->transpose == FLAP_NT ? CblasTrans : CblasNoTrans, (blasint)x->m, (blasint)x->n, (blasint)x->k, 1,
           (const float *)x->a, (blasint)x->lda, (const float *)x->b, (blasint)x->ldb, 0, (float *)x->c,
           (blasint)x->ldc);
}

static double matmul(bench *b, flap_transpose transpose, uint32_t m, uint32_t n, uint32_t k, bool print) {
  b->matmul = (flap_matmul){.transpose = transpose, .m = m, .n = n, .k = k, .dtype = b->dtype, .c_dtype = b->dtype};
  b->matmul.a = b->buffers[0];
  b->matmul.b = b->buffers[1];
  b->matmul.c = b->buffers[2];
  b->matmul.lda = transpose == FLAP_TN ? m : k;
  b->matmul.ldb = transpose == FLAP_NT ? k : n;
  b->matmul.ldc = n;
  b->matmul.accumulate = transpose == FLAP_TN;
  if (transpose == FLAP_TN)
    b->matmul.c_dtype = FLAP_F32;
  const double seconds = seconds_of(b, run_matmul);
  if (!print)
    return seconds;
  const double plain = seconds_of(b, run_sgemm), gflop = 2e-9 * m * n * k;
  static const char *const names[] = {"NN", "NT", "TN"};
  printf("matmul %s %4u x %4u, k %4u, %-8s %7.1f GFLOP/s  %3.0f%% of sgemm\n", names[transpose], m, n, k,
         flap_dtype_name(b->dtype), gflop / seconds, 100 * plain / (seconds * b->threads));
  return seconds;
}

static void run_attention(bench *b) {
  flap_ops_attention(b->ops, &b->attention);
}

static void run_attention_backward(bench *b) {
  flap_ops_attention_backward(b->ops, &b->attention, b->buffers[5], b->buffers[6], b->buffers[7], b->buffers[8]);
}

static void attention(bench *b, uint32_t sequence, uint32_t head_size, double *forward_out, double *backward_out) {
  b->attention = (flap_attention){.batch = TOKENS / sequence, .sequence = sequence, .head_size = head_size};
  b->attention.heads = HIDDEN / head_size;
  b->attention.kv_heads = b->attention.heads % 3 == 0 ? b->attention.heads / 3 : 1;
  b->attention.q_stride = b->attention.heads * head_size;
  b->attention.kv_stride = b->attention.kv_heads * head_size;
  b->attention.q = b->buffers[0];
  b->attention.k = b->buffers[1];
  b->attention.v = b->buffers[2];
  b->attention.out = b->buffers[3];
  b->attention.lse = (float *)(void *)b->buffers[4];
  b->attention.dtype = b->dtype;
  *forward_out = seconds_of(b, run_attention);
  *backward_out = seconds_of(b, run_attention_backward);
  if (sequence == 0)
    return;
  const double pairs = (double)TOKENS * b->attention.heads * (sequence + 1) / 2;
  printf("attention S %4u, HD %3u, %-8s forward %6.1f GFLOP/s, backward %6.1f GFLOP/s (causal pairs counted)\n",
         sequence, head_size, flap_dtype_name(b->dtype), 4e-9 * pairs * head_size / *forward_out,
         1e-8 * pairs * head_size / *backward_out);
}

/* ---- a layer ---- */

static void run_norm(bench *b) {
  flap_ops_rmsnorm(b->ops, b->dtype, b->buffers[3], (float *)(void *)b->buffers[4], b->buffers[5], b->buffers[0],
                   b->buffers[1], b->buffers[2], TOKENS, HIDDEN, 1e-5f);
}
static void run_norm_backward(bench *b) {
  flap_ops_rmsnorm_backward(b->ops, b->dtype, b->buffers[3], (float *)(void *)b->buffers[5], NULL, b->buffers[0],
                            b->buffers[1], b->buffers[2], (float *)(void *)b->buffers[4], b->buffers[6], TOKENS,
                            HIDDEN);
}
static void run_rope(bench *b) { /* of q and k */
  flap_ops_rope(b->ops, b->dtype, b->buffers[0], (float *)(void *)b->buffers[9], TOKENS, SEQUENCE, 0, HEADS, HEAD_SIZE,
                HIDDEN, false);
  flap_ops_rope(b->ops, b->dtype, b->buffers[1], (float *)(void *)b->buffers[9], TOKENS, SEQUENCE, 0, KV_HEADS,
                HEAD_SIZE, KV_HEADS * HEAD_SIZE, false);
}
static void run_swiglu(bench *b) {
  flap_ops_swiglu(b->ops, b->dtype, b->buffers[2], b->buffers[0], b->buffers[1], TOKENS, INTERMEDIATE, INTERMEDIATE);
}
static void run_swiglu_backward(bench *b) {
  flap_ops_swiglu_backward(b->ops, b->dtype, b->buffers[3], b->buffers[4], INTERMEDIATE, NULL, b->buffers[2],
                           b->buffers[0], b->buffers[1], INTERMEDIATE, TOKENS, INTERMEDIATE);
}
static void run_add(bench *b) {
  flap_ops_add(b->ops, b->dtype, b->buffers[2], b->buffers[0], b->buffers[1], (uint64_t)TOKENS * HIDDEN);
}

static void refill(bench *b);

static void layer(bench *b) {
  const uint32_t kv = KV_HEADS * HEAD_SIZE;
  const uint32_t widths[7][2] = {{HIDDEN, HIDDEN},      {kv, HIDDEN},           {kv, HIDDEN},
                                 {HIDDEN, HIDDEN},      {INTERMEDIATE, HIDDEN}, {INTERMEDIATE, HIDDEN},
                                 {HIDDEN, INTERMEDIATE}};
  double products = 0, flops = 0;
  for (int i = 0; i < 7; ++i) {
    products += matmul(b, FLAP_NT, TOKENS, widths[i][0], widths[i][1], false);
    products += matmul(b, FLAP_NN, TOKENS, widths[i][1], widths[i][0], false);
    products += matmul(b, FLAP_TN, widths[i][0], widths[i][1], TOKENS, false);
    flops += 6.0 * TOKENS * widths[i][0] * widths[i][1];
  }
  refill(b);
  double forward, backward;
  attention(b, SEQUENCE, HEAD_SIZE, &forward, &backward);
  refill(b);
  const struct {
    const char *name;
    bench_fn fn;
    int calls;
  } rows[] = {{"rmsnorm", run_norm, 2},  {"rmsnorm backward", run_norm_backward, 2},  {"rope", run_rope, 2},
              {"swiglu", run_swiglu, 1}, {"swiglu backward", run_swiglu_backward, 1}, {"add", run_add, 2}};
  double element_wise = 0, times[6];
  for (int i = 0; i < 6; ++i) {
    times[i] = seconds_of(b, rows[i].fn);
    element_wise += rows[i].calls * times[i];
    refill(b);
  }
  const double all = products + forward + backward + element_wise;
  printf("layer of %d tokens, hidden %d, intermediate %d, %s, forward and backward: %.3f ms\n", TOKENS, HIDDEN,
         INTERMEDIATE, flap_dtype_name(b->dtype), all * 1e3);
  printf("  products %.1f%% (%.1f GFLOP/s), attention %.1f%%, element-wise %.1f%%:", 100 * products / all,
         flops * 1e-9 / products, 100 * (forward + backward) / all, 100 * element_wise / all);
  for (int i = 0; i < 6; ++i)
    printf(" %d %s %.0f us%s", rows[i].calls, rows[i].name, times[i] * 1e6, i < 5 ? "," : "\n");
}

/* ---- head and optimizer ---- */

static void run_head(bench *b) {
  static int32_t targets[TOKENS];
  for (int i = 0; i < TOKENS; ++i)
    targets[i] = i % VOCABULARY;
  flap_ops_head_loss(b->ops, b->dtype, (float *)(void *)b->buffers[0], b->buffers[1], (float *)(void *)b->buffers[2],
                     true, b->buffers[3], b->buffers[4], targets, 1.0f / TOKENS, TOKENS, HIDDEN, VOCABULARY);
}
static void run_gradient_store(bench *b) {
  flap_ops_gradient_store(b->ops, FLAP_BF16, b->buffers[0], (float *)(void *)b->buffers[1], FLAP_F32, b->buffers[6],
                          ELEMENTS);
}

/* Ordinary values: speed must not depend on NaN or denormal numbers. */
static void refill(bench *b) {
  for (int i = 0; i < BUFFERS; ++i)
    for (uint64_t j = 0; j < BUFFER_BYTES / 4; ++j) {
      const float value = (float)((j * 2654435761u + (uint64_t)i) % 2001) * 1e-3f - 1.0f;
      if (b->dtype == FLAP_F32 || i == 4 || i == 6 || i == 9)
        ((float *)(void *)b->buffers[i])[j] = i == 6 ? value * value + 0.01f : value;
      else
        ((uint32_t *)(void *)b->buffers[i])[j] = (uint32_t)flap_f32_to_bf16(value) * 0x10001u;
    }
}

/* ---- AdamW, out of memory ---- */

enum { OPTIMIZER_ELEMENTS = 16 << 20, ITEM_ELEMENTS = 16384, PIECES = 4 };
static_assert(OPTIMIZER_ELEMENTS / FLAP_OPS_BLOCK <= FLAP_OPS_ADAMW_BLOCKS_MAX, "one call");

typedef uint32_t words __attribute__((vector_size(16), may_alias));
#define GRAD_WORDS (ITEM_ELEMENTS * 2 / PIECES / sizeof(words))

/* What AdamW reads and writes, and a gradient that it only reads. */
typedef struct optimizer {
  flap_ops *ops;
  flap_pool *pool;
  unsigned char *arrays[6]; /* high, low, m, v, largest m, largest v */
  uint64_t bytes[6];        /* of an item */
  unsigned char *grad;
  uint32_t sums[256]; /* by worker, so that the gradient is read */
  bool eight_bit;
} optimizer;

/* In pieces, as AdamW goes through its arrays. */
static void sweep_item(void *context, uint64_t item, uint32_t worker) {
  optimizer *o = context;
  words sum = {0};
  for (uint64_t piece = 0; piece < PIECES; ++piece) {
    for (int i = 0; i < 6; ++i) {
      words *array = (words *)(void *)(o->arrays[i] + item * o->bytes[i] + piece * (o->bytes[i] / PIECES));
      for (uint64_t j = 0; j < o->bytes[i] / PIECES / sizeof(words); ++j)
        array[j] ^= 1;
    }
    const words *grad = (const words *)(const void *)o->grad + (item * PIECES + piece) * GRAD_WORDS;
    for (uint64_t j = 0; j < GRAD_WORDS; ++j)
      sum ^= grad[j];
  }
  o->sums[worker % 256] ^= sum[0] ^ sum[3];
}

static void run_sweep(optimizer *o) {
  flap_pool_run(o->pool, OPTIMIZER_ELEMENTS / ITEM_ELEMENTS, sweep_item, o);
}

static void run_optimizer(optimizer *o) {
  static const uint8_t decay_blocks[OPTIMIZER_ELEMENTS / FLAP_OPS_BLOCK / 8];
  static int32_t fault;
  const flap_adamw s = {.learning_rate = 1e-6f,
                        .beta1 = 0.9f,
                        .beta2 = 0.95f,
                        .one_minus_beta1 = 0.1f,
                        .one_minus_beta2 = 0.05f,
                        .inverse_bias1 = 1,
                        .inverse_sqrt_bias2 = 1,
                        .epsilon = 1e-8f,
                        .decay = 1,
                        .gradient_scale = 1};
  int16_t *low = (int16_t *)(void *)o->arrays[1];
  if (o->eight_bit)
    flap_ops_adamw_8bit(o->ops, &s, FLAP_BF16, FLAP_BF16, o->arrays[0], low, (int8_t *)o->arrays[2], o->arrays[3],
                        (float *)(void *)o->arrays[4], (float *)(void *)o->arrays[5], o->grad, decay_blocks, &fault,
                        OPTIMIZER_ELEMENTS);
  else
    flap_ops_adamw(o->ops, &s, FLAP_BF16, FLAP_BF16, o->arrays[0], low, (float *)(void *)o->arrays[2],
                   (float *)(void *)o->arrays[3], o->grad, decay_blocks, &fault, OPTIMIZER_ELEMENTS);
}

/* The best of several runs of each, taken in turn: what else the machine does meets both. */
static void compare_optimizer(optimizer *o, const char *name, double bytes) {
  double best[2] = {1e9, 1e9};
  for (int run = 0; run < 30; ++run) { /* two sweeps leave the numbers as they were */
    const bool sweep = run % 3 < 2;
    const uint64_t start_ns = flap_units_now_ns();
    if (sweep)
      run_sweep(o);
    else
      run_optimizer(o);
    const double seconds = (double)(flap_units_now_ns() - start_ns) * 1e-9;
    best[sweep] = seconds < best[sweep] ? seconds : best[sweep];
  }
  printf("%s: %.3f ns per parameter, %.1f GB/s; a bare loop over the same memory %.1f GB/s: %.0f%% of it\n", name,
         best[0] * 1e9 / OPTIMIZER_ELEMENTS, bytes * OPTIMIZER_ELEMENTS * 1e-9 / best[0],
         bytes * OPTIMIZER_ELEMENTS * 1e-9 / best[1], 100 * best[1] / best[0]);
}

static int optimizers(flap_ops *ops, flap_pool *pool) {
  const uint64_t sizes[2][6] = {{2, 2, 4, 4, 0, 0}, {2, 2, 1, 1, 0, 0}}; /* bytes of an element */
  for (int form = 0; form < 2; ++form) {
    optimizer o = {.ops = ops, .pool = pool, .eight_bit = form == 1};
    uint64_t total = 0, used = 0;
    for (int i = 0; i < 6; ++i) {
      o.bytes[i] = sizes[form][i] * ITEM_ELEMENTS;
      if (o.eight_bit && i >= 4)
        o.bytes[i] = ITEM_ELEMENTS / FLAP_OPS_MOMENT_BLOCK * sizeof(float);
      total += o.bytes[i] * (OPTIMIZER_ELEMENTS / ITEM_ELEMENTS);
    }
    total += (uint64_t)OPTIMIZER_ELEMENTS * 2;
    unsigned char *memory = aligned_alloc(4096, total);
    if (memory == NULL)
      return 1;
    memset(memory, 0, total);
    for (int i = 0; i < 6; ++i) {
      o.arrays[i] = memory + used;
      used += o.bytes[i] * (OPTIMIZER_ELEMENTS / ITEM_ELEMENTS);
    }
    o.grad = memory + used;
    for (uint64_t j = 0; j < OPTIMIZER_ELEMENTS; ++j) {
      const float value = (float)(j * 2654435761u % 2001) * 1e-3f - 1.0f;
      ((uint16_t *)(void *)o.grad)[j] = flap_f32_to_bf16(value);
      ((uint16_t *)(void *)o.arrays[0])[j] = flap_f32_to_bf16(value);
    }
    for (int step = 0; step < 3; ++step)
      run_optimizer(&o); /* moments of ordinary size */
    double bytes = 2;
    for (int i = 0; i < 6; ++i)
      bytes += 2.0 * (double)o.bytes[i] / ITEM_ELEMENTS;
    compare_optimizer(
        &o, o.eight_bit ? "adamw, split master, bf16 gradient, 8-bit moments" : "adamw, split master, bf16 gradient",
        bytes);
    free(memory);
  }
  return 0;
}

static void run_all(bench *b) {
  const uint32_t sequences[] = {128, 256, 512};
  double forward, backward;
  refill(b);
  (void)matmul(b, FLAP_NT, TOKENS, INTERMEDIATE, HIDDEN, true);
  (void)matmul(b, FLAP_NT, TOKENS, HIDDEN, HIDDEN, true);
  (void)matmul(b, FLAP_NT, TOKENS, HIDDEN, INTERMEDIATE, true);
  (void)matmul(b, FLAP_NN, TOKENS, HIDDEN, INTERMEDIATE, true);
  (void)matmul(b, FLAP_TN, INTERMEDIATE, HIDDEN, TOKENS, true);
  (void)matmul(b, FLAP_TN, HIDDEN, HIDDEN, TOKENS, true);
  refill(b);
  for (int i = 0; i < 3; ++i)
    for (uint32_t head_size = 32; head_size <= 64; head_size *= 2)
      attention(b, sequences[i], head_size, &forward, &backward);
  refill(b);
  layer(b);
  refill(b);
  const double head = seconds_of(b, run_head);
  printf("head of %d tokens, vocabulary %d, %s: %.3f ms, %.1f GFLOP/s\n", TOKENS, VOCABULARY, flap_dtype_name(b->dtype),
         head * 1e3, 6e-9 * TOKENS * HIDDEN * VOCABULARY / head);
}

/* Every worker on a CPU of its own, for schedulers that would rather keep them together: an item waits until all others
 * have started, so each worker gets one. */
/* ---- normal numbers --------------------------------------------------------------------------------------- */

#define NORMALS 8192u
static float normals[NORMALS];

static void run_normals(bench *b) {
  (void)b;
  const flap_philox stream = flap_philox_stream(1, "normals");
  flap_philox_normals(&stream, 0, NORMALS, normals);
}

/* The same by the C library's functions, a pair at a time. */
static void run_library_normals(bench *b) {
  (void)b;
  const flap_philox stream = flap_philox_stream(1, "normals");
  for (uint32_t i = 0; i < NORMALS; i += 2) {
    uint32_t block[4];
    flap_philox_block(&stream, i / 2, block);
    const double u = (double)((((uint64_t)block[1] << 32 | block[0]) >> 11) + 1) * 0x1p-53;
    const double angle = 6.283185307179586 * ((double)(((uint64_t)block[3] << 32 | block[2]) >> 11) * 0x1p-53);
    const double radius = sqrt(-2.0 * log(u));
    normals[i] = (float)(radius * cos(angle));
    normals[i + 1] = (float)(radius * sin(angle));
  }
}

static void pin_item(void *context, uint64_t item, uint32_t worker) {
  (void)item;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(worker, &set);
  (void)sched_setaffinity(0, sizeof set, &set);
  uint32_t *waiting = context;
  (void)__atomic_sub_fetch(waiting, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(waiting, __ATOMIC_SEQ_CST) > 0)
    (void)sched_yield();
}

static void pin(flap_pool *pool) {
  uint32_t waiting = flap_pool_threads(pool);
  flap_pool_run(pool, waiting, pin_item, &waiting);
}

static int open_ops(bench *b, flap_pool *pool, flap_device **device_out) {
  flap_device_config config = {.kind = FLAP_DEVICE_CPU, .vram_bytes = (uint64_t)80 << 20, .events_max = 1};
  config.pool = pool;
  flap_ops_limits limits = {.dtype = b->dtype, .batch_max = TOKENS, .sequence_max = TOKENS, .tokens_max = TOKENS};
  limits.hidden = HIDDEN;
  limits.intermediate = INTERMEDIATE;
  limits.vocabulary = VOCABULARY;
  limits.heads = limits.kv_heads = HEADS;
  limits.head_size = 64;
  limits.threads = b->threads;
  if (flap_device_open(&config, device_out) != FLAP_OK)
    return 1;
  uint64_t bytes;
  unsigned char *arena = flap_device_arena(*device_out, &bytes);
  const uint64_t workspace = flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits);
  if (workspace > (uint64_t)16 << 20 || flap_ops_open(*device_out, &limits, arena, &b->ops) != FLAP_OK)
    return 1;
  char text[FLAP_UNITS_TEXT_MAX];
  printf("%s, %u threads, workspace %s\n", flap_ops_numerics(b->ops), b->threads,
         flap_units_format_bytes(workspace, text, sizeof text));
  for (int i = 0; i < BUFFERS; ++i)
    b->buffers[i] = arena + ((uint64_t)16 << 20) + (uint64_t)i * BUFFER_BYTES;
  return 0;
}

/* Of the library that the ops have loaded. */
static void find_sgemm(bench *b) {
  void *const library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_NOLOAD);
  void *const symbol = library != NULL ? dlsym(library, "cblas_sgemm") : NULL;
  if (symbol == NULL) {
    (void)fprintf(stderr, "bench_ops: the ops have loaded no OpenBLAS\n");
    exit(EXIT_FAILURE);
  }
  memcpy(&b->sgemm, &symbol, sizeof symbol);
}

int main(int argc, char **argv) {
  flap_pool *pool;
  if (flap_pool_open(argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0, &pool) != FLAP_OK) {
    (void)fprintf(stderr, "bench_ops: %s\n", flap_error_message());
    return EXIT_FAILURE;
  }
  pin(pool);
  const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};
  for (int i = 0; i < 3; ++i) {
    bench b = {.threads = flap_pool_threads(pool), .dtype = dtypes[i]};
    flap_device *device = NULL;
    if (open_ops(&b, pool, &device) != 0) {
      (void)fprintf(stderr, "bench_ops: %s\n", flap_error_message());
      return EXIT_FAILURE;
    }
    find_sgemm(&b);
    run_all(&b);
    if (dtypes[i] == FLAP_BF16) {
      refill(&b);
      printf("gradient_store, bf16: %.2f ns per parameter\n", seconds_of(&b, run_gradient_store) * 1e9 / ELEMENTS);
      printf("normal numbers, one thread: %.2f ns each; by the C library's functions %.2f ns\n",
             seconds_of(&b, run_normals) * 1e9 / NORMALS, seconds_of(&b, run_library_normals) * 1e9 / NORMALS);
      if (optimizers(b.ops, pool) != 0) {
        (void)fprintf(stderr, "bench_ops: no memory for the optimizer's states\n");
        return EXIT_FAILURE;
      }
    }
    flap_ops_close(b.ops);
    flap_device_close(device);
  }
  flap_pool_close(pool);
  return EXIT_SUCCESS;
}
