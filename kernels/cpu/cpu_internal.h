/* Private to kernels/cpu/: the state of the cpu ops, their workspace, and helpers shared by their files. */
#ifndef FLAP_KERNELS_CPU_INTERNAL_H
#define FLAP_KERNELS_CPU_INTERNAL_H

#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_vector.h"
#include "kernels/ops_internal.h"

/* Matmul tiles: at most this many rows and columns of c, and for 16-bit types this much of k converted at a time. */
#define FLAP_CPU_TILE 128u
#define FLAP_CPU_TILE_K 256u
/* Attention tiles; rows of scores are whole vectors. */
#define FLAP_CPU_QUERIES 64u
#define FLAP_CPU_KEYS 128u
/* Elements of a row that are held as fp32 at a time. */
#define FLAP_CPU_CHUNK 1024u
/* Work for one item of an element-wise loop, in elements. */
#define FLAP_CPU_ITEM 16384u
/* Partial sums over tokens of a norm's weight gradient. */
#define FLAP_CPU_NORM_PARTS 32u

typedef struct flap_cpu_ops {
  const flap_cpu_vector *vector;
  __typeof__(&cblas_sgemm) sgemm;
  flap_pool *pool;
  uint32_t threads;
  unsigned char *workers; /* scratch of each worker, worker_bytes apart */
  uint64_t worker_bytes;
  unsigned char *shared; /* scratch of the operation */
  uint64_t shared_bytes;
} flap_cpu_ops;

static inline flap_cpu_ops *flap_cpu_state(const flap_ops *ops) {
  return ops->state;
}

static inline float *flap_cpu_scratch(const flap_cpu_ops *cpu, uint32_t worker) {
  return (float *)(void *)(cpu->workers + worker * cpu->worker_bytes);
}

static inline uint32_t flap_cpu_min(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}
static inline uint64_t flap_cpu_ceil(uint64_t a, uint64_t b) {
  return (a + b - 1) / b;
}

/* Element `offset` of an array of `dtype`. */
static inline const void *flap_cpu_at(flap_dtype dtype, const void *base, uint64_t offset) {
  return (const unsigned char *)base + offset * flap_dtype_bytes(dtype);
}
static inline void *flap_cpu_at_mutable(flap_dtype dtype, void *base, uint64_t offset) {
  return (unsigned char *)base + offset * flap_dtype_bytes(dtype);
}

/* A rectangle of a 16-bit type to fp32, and back, rounded to nearest even. */
static inline void flap_cpu_widen(const flap_cpu_ops *cpu, flap_dtype dtype, float *out, size_t out_stride,
                                  const void *in, uint64_t offset, size_t in_stride, size_t rows, size_t columns) {
  (dtype == FLAP_F16 ? cpu->vector->from_f16 : cpu->vector->from_bf16)(out, out_stride, (const uint16_t *)in + offset,
                                                                       in_stride, rows, columns);
}
static inline void flap_cpu_narrow(const flap_cpu_ops *cpu, flap_dtype dtype, void *out, uint64_t offset,
                                   size_t out_stride, const float *in, size_t in_stride, size_t rows, size_t columns) {
  (dtype == FLAP_F16 ? cpu->vector->to_f16 : cpu->vector->to_bf16)((uint16_t *)out + offset, out_stride, in, in_stride,
                                                                   rows, columns);
}

/* Each value to the nearest that the type has. */
static inline void flap_cpu_round(const flap_cpu_ops *cpu, flap_dtype dtype, float *values, size_t count) {
  if (dtype != FLAP_F32)
    (dtype == FLAP_F16 ? cpu->vector->round_f16 : cpu->vector->round_bf16)(values, count);
}

/* `count` elements as fp32: in place where they are fp32, converted into `buffer` otherwise. */
static inline const float *flap_cpu_load(const flap_cpu_ops *cpu, flap_dtype dtype, float *buffer, const void *base,
                                         uint64_t offset, size_t count) {
  if (dtype == FLAP_F32)
    return (const float *)base + offset;
  flap_cpu_widen(cpu, dtype, buffer, count, base, offset, count, 1, count);
  return buffer;
}

static inline void flap_cpu_store(const flap_cpu_ops *cpu, flap_dtype dtype, void *base, uint64_t offset,
                                  const float *values, size_t count) {
  if (dtype == FLAP_F32)
    memcpy((float *)base + offset, values, count * sizeof *values);
  else
    flap_cpu_narrow(cpu, dtype, base, offset, count, values, count, 1, count);
}

/* A rectangle as fp32, with its row stride: in place where it is fp32, converted into `buffer` otherwise. */
static inline const float *flap_cpu_load_tile(const flap_cpu_ops *cpu, flap_dtype dtype, float *buffer,
                                              const void *base, uint64_t offset, uint64_t stride, uint32_t rows,
                                              uint32_t columns, uint32_t *stride_out) {
  if (dtype == FLAP_F32) {
    *stride_out = (uint32_t)stride;
    return (const float *)base + offset;
  }
  flap_cpu_widen(cpu, dtype, buffer, columns, base, offset, stride, rows, columns);
  *stride_out = columns;
  return buffer;
}

static inline void flap_cpu_store_tile(const flap_cpu_ops *cpu, flap_dtype dtype, void *base, uint64_t offset,
                                       uint64_t stride, const float *values, uint32_t rows, uint32_t columns) {
  if (dtype != FLAP_F32) {
    flap_cpu_narrow(cpu, dtype, base, offset, stride, values, columns, rows, columns);
    return;
  }
  for (uint32_t row = 0; row < rows; ++row)
    memcpy((float *)base + offset + row * stride, values + (uint64_t)row * columns, columns * sizeof *values);
}

/* Runs items on the pool; a single one on the calling thread. */
void flap_cpu_run(const flap_cpu_ops *cpu, uint64_t items, flap_pool_fn fn, void *context);

/* Rows of one item, for rows of `width` elements: a function of shape. */
static inline uint32_t flap_cpu_rows_per_item(uint32_t width) {
  return width >= FLAP_CPU_ITEM ? 1 : FLAP_CPU_ITEM / width;
}

/* What each file needs: bytes of scratch per worker, and shared. */
uint64_t flap_cpu_matmul_worker_bytes(void);
uint64_t flap_cpu_attention_worker_bytes(const flap_ops_limits *limits);
uint64_t flap_cpu_attention_shared_bytes(const flap_ops_limits *limits);
uint64_t flap_cpu_norm_shared_bytes(const flap_ops_limits *limits);
uint64_t flap_cpu_head_shared_bytes(const flap_ops_limits *limits);

void flap_cpu_matmul(flap_ops *ops, const flap_matmul *matmul);
void flap_cpu_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                            uint32_t ld);
void flap_cpu_zero(flap_ops *ops, void *memory, uint64_t bytes);
void flap_cpu_copy(flap_ops *ops, void *to, const void *from, uint64_t bytes);
void flap_cpu_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                        uint32_t token_count, uint32_t hidden);
void flap_cpu_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                                 const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden);
void flap_cpu_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                      const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon);
void flap_cpu_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                               const void *dy, const void *x, const void *weight, const float *rstd,
                               const void *dresidual, uint32_t token_count, uint32_t hidden);
void flap_cpu_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements);
void flap_cpu_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count,
                   uint32_t sequence, uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld,
                   bool inverse);
void flap_cpu_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                     uint32_t intermediate, uint32_t ld);
void flap_cpu_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                              const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                              uint32_t intermediate);
void flap_cpu_attention(flap_ops *ops, const flap_attention *attention);
void flap_cpu_attention_backward(flap_ops *ops, const flap_attention *attention, void *dq, void *dk, void *dv,
                                 const void *dout);
void flap_cpu_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                               const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                               uint32_t heads, uint32_t kv_heads, uint32_t head_size);
void flap_cpu_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                        const void *x, const void *weight, const int32_t *targets, float loss_scale,
                        uint32_t token_count, uint32_t hidden, uint32_t vocabulary);
void flap_cpu_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares,
                             flap_dtype sum_dtype, const void *sum, uint64_t elements);
void flap_cpu_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                    void *weight, void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks,
                    int32_t *fault, uint64_t elements);
void flap_cpu_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                         void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                         const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);

#endif
