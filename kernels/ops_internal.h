/* Private to kernels/: what a device kind must provide, and the object behind flap_ops.
 *
 * Arguments were checked by ops.c: an implementation may rely on them. */
#ifndef FLAP_KERNELS_OPS_INTERNAL_H
#define FLAP_KERNELS_OPS_INTERNAL_H

#include "kernels/ops.h"

#define FLAP_OPS_ALIGN 256u

typedef struct flap_ops_table {
  uint64_t (*workspace_bytes)(const flap_ops_limits *limits);
  /* Fills state and numerics of an ops whose other members are set. */
  flap_status (*open)(flap_ops *ops);
  void (*close)(flap_ops *ops);
  /* As flap_ops_set_matmuls and flap_ops_matmul_target say; NULL where tables are of no use. */
  flap_status (*set_matmuls)(flap_ops *ops, struct flap_matmul_table *table, flap_matmul_mode mode);
  flap_status (*matmul_target)(char *target_out, size_t bytes);

  void (*matmul)(flap_ops *ops, const flap_matmul *matmul);
  void (*bias_backward)(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                        uint32_t ld);
  void (*zero)(flap_ops *ops, void *memory, uint64_t bytes);
  void (*copy)(flap_ops *ops, void *to, const void *from, uint64_t bytes);
  void (*embedding)(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                    uint32_t token_count, uint32_t hidden);
  void (*embedding_backward)(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                             const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden);
  void (*rmsnorm)(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                  const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon);
  void (*rmsnorm_backward)(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                           const void *dy, const void *x, const void *weight, const float *rstd, const void *dresidual,
                           uint32_t token_count, uint32_t hidden);
  void (*add)(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements);
  void (*rope)(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count, uint32_t sequence,
               uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld, bool inverse);
  void (*swiglu)(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                 uint32_t intermediate, uint32_t ld);
  void (*swiglu_backward)(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                          const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                          uint32_t intermediate);
  /* Both at once; false: not these operands, and nothing has happened. NULL: none. */
  bool (*matmul_swiglu)(flap_ops *ops, const flap_matmul *matmul, void *out);
  bool (*matmul_swiglu_backward)(flap_ops *ops, const flap_matmul *matmul, void *dgate, void *dup, uint32_t ld_d,
                                 bool again, const void *gate, const void *up, uint32_t ld);
  bool (*matmul_rope)(flap_ops *ops, const flap_matmul *matmul, const float *cos_sin, uint32_t sequence,
                      uint32_t first_position, uint32_t heads, uint32_t head_size);
  void (*attention)(flap_ops *ops, const flap_attention *attention);
  void (*attention_backward)(flap_ops *ops, const flap_attention *attention, void *dq, void *dk, void *dv,
                             const void *dout);
  void (*attention_decode)(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                           const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                           uint32_t heads, uint32_t kv_heads, uint32_t head_size);
  void (*head_loss)(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                    const void *x, const void *weight, const int32_t *targets, float loss_scale, uint32_t token_count,
                    uint32_t hidden, uint32_t vocabulary);
  void (*gradient_store)(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares, flap_dtype sum_dtype,
                         const void *sum, uint64_t elements);
  void (*adamw)(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype, void *weight,
                void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks, int32_t *fault,
                uint64_t elements);
  void (*adamw_8bit)(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                     void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                     const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);
} flap_ops_table;

struct flap_ops {
  const flap_ops_table *table;
  flap_device *device;
  flap_ops_limits limits;
  void *workspace;
  void *state;   /* the implementation's */
  bool measured; /* calls are timed on the calling thread (cpu) */
  char numerics[160];
};

extern const flap_ops_table flap_ops_cpu_table;
extern const flap_ops_table flap_ops_sim_table;
#ifdef FLAP_CUDA
extern const flap_ops_table flap_ops_cuda_table;
#endif

#endif
