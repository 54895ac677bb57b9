/* The front of the ops: picks the table of the device's kind, checks arguments, times calls on the cpu device. */
#include "kernels/ops_internal.h"

#include "base/assert.h"
#include "base/units.h"
#include "kernels/cuda/cuda_sizes.h"

#include <stdlib.h>

static const flap_ops_table *table_of(flap_device_kind kind) {
  switch (kind) {
  case FLAP_DEVICE_CPU:
    return &flap_ops_cpu_table;
  case FLAP_DEVICE_SIM:
    return &flap_ops_sim_table;
  case FLAP_DEVICE_CUDA:
#ifdef FLAP_CUDA
    return &flap_ops_cuda_table;
#else
    return NULL;
#endif
  }
  return NULL;
}

uint64_t flap_ops_workspace_bytes(flap_device_kind kind, const flap_ops_limits *limits) {
  flap_assert(limits != NULL);
  if (kind == FLAP_DEVICE_CUDA) /* also of a build without CUDA: it plans for machines that have it */
    return flap_units_round_up(cuda_workspace_bytes(limits), FLAP_OPS_ALIGN);
  return flap_units_round_up(table_of(kind)->workspace_bytes(limits), FLAP_OPS_ALIGN);
}

static flap_status check_limits(const flap_ops_limits *limits) {
  if (limits->tokens_max == 0 || limits->hidden == 0 || limits->vocabulary == 0 || limits->threads == 0 ||
      limits->kv_heads == 0 || limits->heads % limits->kv_heads != 0 || limits->head_size % 2 != 0)
    return flap_error_set(FLAP_INVALID,
                          "kernels: %u tokens, hidden size %u, vocabulary %u, %u heads over %u key/value heads of size "
                          "%u: sizes must be positive, heads a multiple of key/value heads, the head size even",
                          limits->tokens_max, limits->hidden, limits->vocabulary, limits->heads, limits->kv_heads,
                          limits->head_size);
  return FLAP_OK;
}

flap_status flap_ops_open(flap_device *device, const flap_ops_limits *limits, void *workspace, flap_ops **ops_out) {
  *ops_out = NULL;
  flap_device_kind kind = flap_device_get_kind(device);
  const flap_ops_table *table = table_of(kind);
  if (table == NULL)
    return flap_error_set(FLAP_UNSUPPORTED, "kernels: this build has none for the device \"%s\"; build with FLAP_CUDA",
                          flap_device_describe(device));
  FLAP_TRY(check_limits(limits));
  flap_assert(((uintptr_t)workspace & (FLAP_OPS_ALIGN - 1)) == 0);
  flap_ops *ops = calloc(1, sizeof *ops);
  if (ops == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "kernels: no memory for the table of operations");
  ops->table = table;
  ops->device = device;
  ops->limits = *limits;
  ops->workspace = workspace;
  ops->measured = kind == FLAP_DEVICE_CPU;
  flap_status status = table->open(ops);
  if (status != FLAP_OK) {
    free(ops);
    return status;
  }
  *ops_out = ops;
  return FLAP_OK;
}

void flap_ops_close(flap_ops *ops) {
  if (ops == NULL)
    return;
  ops->table->close(ops);
  free(ops);
}

flap_device *flap_ops_device(const flap_ops *ops) {
  return ops->device;
}

const char *flap_ops_numerics(const flap_ops *ops) {
  return ops->numerics;
}

flap_status flap_ops_matmul_target(flap_device_kind kind, char *target_out, size_t bytes) {
  const flap_ops_table *table = table_of(kind);
  flap_assert(bytes > 0);
  target_out[0] = '\0';
  if (table == NULL)
    return flap_error_set(FLAP_UNSUPPORTED, "kernels: this build has none for cuda devices; build with FLAP_CUDA");
  return table->matmul_target != NULL ? table->matmul_target(target_out, bytes) : FLAP_OK;
}

flap_status flap_ops_set_matmuls(flap_ops *ops, struct flap_matmul_table *table, flap_matmul_mode mode) {
  return ops->table->set_matmuls != NULL ? ops->table->set_matmuls(ops, table, mode) : FLAP_OK;
}

static uint64_t begin(const flap_ops *ops) {
  return ops->measured ? flap_units_now_ns() : 0;
}

static void end(const flap_ops *ops, uint64_t started_ns) {
  if (ops->measured)
    flap_device_note_compute(ops->device, flap_units_now_ns() - started_ns);
}

void flap_ops_matmul(flap_ops *ops, const flap_matmul *matmul) {
  const flap_matmul *x = matmul;
  flap_assert(x->m > 0 && x->n > 0 && x->k > 0);
  flap_assert(x->lda >= (x->transpose == FLAP_TN ? x->m : x->k));
  flap_assert(x->ldb >= (x->transpose == FLAP_NT ? x->k : x->n));
  flap_assert(x->c_dtype == FLAP_F32 || x->c_dtype == x->dtype);
  flap_assert(x->ldc >= x->n && (!x->accumulate || (x->c_dtype == FLAP_F32 && x->residual == NULL)));
  flap_assert(x->residual == NULL || x->residual != x->c);
  uint64_t started_ns = begin(ops);
  ops->table->matmul(ops, matmul);
  end(ops, started_ns);
}

void flap_ops_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                            uint32_t ld) {
  flap_assert(ld >= n);
  uint64_t started_ns = begin(ops);
  ops->table->bias_backward(ops, dtype, dbias, dy, tokens, n, ld);
  end(ops, started_ns);
}

void flap_ops_zero(flap_ops *ops, void *memory, uint64_t bytes) {
  uint64_t started_ns = begin(ops);
  ops->table->zero(ops, memory, bytes);
  end(ops, started_ns);
}

void flap_ops_copy(flap_ops *ops, void *to, const void *from, uint64_t bytes) {
  uint64_t started_ns = begin(ops);
  ops->table->copy(ops, to, from, bytes);
  end(ops, started_ns);
}

void flap_ops_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                        uint32_t token_count, uint32_t hidden) {
  uint64_t started_ns = begin(ops);
  ops->table->embedding(ops, dtype, out, tokens, table, token_count, hidden);
  end(ops, started_ns);
}

void flap_ops_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                                 const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden) {
  uint64_t started_ns = begin(ops);
  ops->table->embedding_backward(ops, dtype, dtable, tokens, order, dx, token_count, hidden);
  end(ops, started_ns);
}

void flap_ops_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                      const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon) {
  flap_assert(residual == NULL || sum_out != NULL);
  uint64_t started_ns = begin(ops);
  ops->table->rmsnorm(ops, dtype, out, rstd, sum_out, x, residual, weight, token_count, hidden, epsilon);
  end(ops, started_ns);
}

void flap_ops_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                               const void *dy, const void *x, const void *weight, const float *rstd,
                               const void *dresidual, uint32_t token_count, uint32_t hidden) {
  uint64_t started_ns = begin(ops);
  ops->table->rmsnorm_backward(ops, dtype, dx_out, dweight, normalized_out, dy, x, weight, rstd, dresidual, token_count,
                               hidden);
  end(ops, started_ns);
}

void flap_ops_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements) {
  uint64_t started_ns = begin(ops);
  ops->table->add(ops, dtype, out, a, b, elements);
  end(ops, started_ns);
}

void flap_ops_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count,
                   uint32_t sequence, uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld,
                   bool inverse) {
  flap_assert(sequence > 0 && head_size % 2 == 0 && ld >= heads * head_size);
  uint64_t started_ns = begin(ops);
  ops->table->rope(ops, dtype, x, cos_sin, token_count, sequence, first_position, heads, head_size, ld, inverse);
  end(ops, started_ns);
}

void flap_ops_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                     uint32_t intermediate, uint32_t ld) {
  flap_assert(ld >= intermediate);
  uint64_t started_ns = begin(ops);
  ops->table->swiglu(ops, dtype, out, gate, up, token_count, intermediate, ld);
  end(ops, started_ns);
}

void flap_ops_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                              const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                              uint32_t intermediate) {
  flap_assert(ld >= intermediate && ld_d >= intermediate);
  uint64_t started_ns = begin(ops);
  ops->table->swiglu_backward(ops, dtype, dgate, dup, ld_d, out, dout, gate, up, ld, token_count, intermediate);
  end(ops, started_ns);
}

static void check_attention(const flap_attention *x) {
  flap_assert(x->kv_heads > 0 && x->heads % x->kv_heads == 0);
  flap_assert(x->q_stride >= x->heads * x->head_size && x->kv_stride >= x->kv_heads * x->head_size);
}

static uint64_t bytes_of(flap_dtype dtype, uint32_t rows, uint32_t columns, uint32_t ld) {
  return rows > 0 ? ((uint64_t)(rows - 1) * ld + columns) * flap_dtype_bytes(dtype) : 0;
}

static bool apart(const void *one, uint64_t bytes, const void *other, uint64_t other_bytes) {
  const uintptr_t a = (uintptr_t)one, b = (uintptr_t)other;
  return a + bytes <= b || b + other_bytes <= a;
}

/* Whether an output of so many columns overlaps neither of the product's operands. */
static bool apart_from_operands(const flap_matmul *x, const void *out, uint32_t columns, uint32_t ld) {
  const uint64_t bytes = bytes_of(x->dtype, x->m, columns, ld);
  return apart(out, bytes, x->a, bytes_of(x->dtype, x->m, x->k, x->lda)) &&
         apart(out, bytes, x->b,
               x->transpose == FLAP_NT ? bytes_of(x->dtype, x->n, x->k, x->ldb)
                                       : bytes_of(x->dtype, x->k, x->n, x->ldb));
}

static void check_product(const flap_matmul *x, flap_transpose transpose) {
  flap_assert(x->m > 0 && x->n > 0 && x->k > 0 && x->transpose == transpose && x->c_dtype == x->dtype);
  flap_assert(x->lda >= x->k && x->ldb >= (transpose == FLAP_NT ? x->k : x->n) && x->ldc >= x->n);
  flap_assert(x->residual == NULL && !x->accumulate && apart_from_operands(x, x->c, x->n, x->ldc));
}

void flap_ops_matmul_swiglu(flap_ops *ops, const flap_matmul *matmul, void *out) {
  const flap_ops_table *table = ops->table;
  const uint32_t intermediate = matmul->n / 2;
  check_product(matmul, FLAP_NT);
  flap_assert(matmul->n % 2 == 0 && matmul->bias == NULL);
  flap_assert(out == NULL || apart_from_operands(matmul, out, intermediate, intermediate));
  uint64_t started_ns = begin(ops);
  if (table->matmul_swiglu == NULL || !table->matmul_swiglu(ops, matmul, out)) {
    const char *up = (const char *)matmul->c + (uint64_t)intermediate * flap_dtype_bytes(matmul->dtype);
    table->matmul(ops, matmul);
    if (out != NULL)
      table->swiglu(ops, matmul->dtype, out, matmul->c, up, matmul->m, intermediate, matmul->ldc);
  }
  end(ops, started_ns);
}

void flap_ops_matmul_swiglu_backward(flap_ops *ops, const flap_matmul *matmul, void *dgate, void *dup, uint32_t ld_d,
                                     bool again, const void *gate, const void *up, uint32_t ld) {
  const flap_ops_table *table = ops->table;
  check_product(matmul, FLAP_NN);
  flap_assert(matmul->ldc == matmul->n && ld >= matmul->n && ld_d >= matmul->n && matmul->bias == NULL);
  flap_assert((dgate != gate && dup != up) || ld_d == ld);
  flap_assert(apart_from_operands(matmul, dgate, matmul->n, ld_d) && apart_from_operands(matmul, dup, matmul->n, ld_d));
  uint64_t started_ns = begin(ops);
  if (table->matmul_swiglu_backward == NULL ||
      !table->matmul_swiglu_backward(ops, matmul, dgate, dup, ld_d, again, gate, up, ld)) {
    table->matmul(ops, matmul);
    table->swiglu_backward(ops, matmul->dtype, dgate, dup, ld_d, again ? matmul->c : NULL, matmul->c, gate, up, ld,
                           matmul->m, matmul->n);
  }
  end(ops, started_ns);
}

void flap_ops_matmul_rope(flap_ops *ops, const flap_matmul *matmul, const float *cos_sin, uint32_t sequence,
                          uint32_t first_position, uint32_t heads, uint32_t head_size) {
  const flap_ops_table *table = ops->table;
  check_product(matmul, FLAP_NT);
  flap_assert(sequence > 0 && head_size % 2 == 0 && matmul->n >= heads * head_size);
  uint64_t started_ns = begin(ops);
  if (table->matmul_rope == NULL ||
      !table->matmul_rope(ops, matmul, cos_sin, sequence, first_position, heads, head_size)) {
    table->matmul(ops, matmul);
    table->rope(ops, matmul->dtype, matmul->c, cos_sin, matmul->m, sequence, first_position, heads, head_size,
                matmul->ldc, false);
  }
  end(ops, started_ns);
}

void flap_ops_attention(flap_ops *ops, const flap_attention *attention) {
  check_attention(attention);
  uint64_t started_ns = begin(ops);
  ops->table->attention(ops, attention);
  end(ops, started_ns);
}

void flap_ops_attention_backward(flap_ops *ops, const flap_attention *attention, void *dq, void *dk, void *dv,
                                 const void *dout) {
  check_attention(attention);
  uint64_t started_ns = begin(ops);
  ops->table->attention_backward(ops, attention, dq, dk, dv, dout);
  end(ops, started_ns);
}

void flap_ops_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                               const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                               uint32_t heads, uint32_t kv_heads, uint32_t head_size) {
  flap_assert(kv_heads > 0 && heads % kv_heads == 0 && q_stride >= heads * head_size);
  uint64_t started_ns = begin(ops);
  ops->table->attention_decode(ops, dtype, out, q, q_stride, k_cache, v_cache, token_count, first_position, heads,
                               kv_heads, head_size);
  end(ops, started_ns);
}

void flap_ops_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                        const void *x, const void *weight, const int32_t *targets, float loss_scale,
                        uint32_t token_count, uint32_t hidden, uint32_t vocabulary) {
  flap_assert(dx == NULL || dweight != NULL);
  uint64_t started_ns = begin(ops);
  ops->table->head_loss(ops, dtype, losses, dx, dweight, accumulate, x, weight, targets, loss_scale, token_count,
                        hidden, vocabulary);
  end(ops, started_ns);
}

void flap_ops_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares,
                             flap_dtype sum_dtype, const void *sum, uint64_t elements) {
  flap_assert(elements % FLAP_OPS_BLOCK == 0);
  flap_assert(grad_dtype == FLAP_F32 || grad_dtype == FLAP_BF16);
  flap_assert(sum_dtype == FLAP_F32 || sum_dtype == grad_dtype);
  uint64_t started_ns = begin(ops);
  ops->table->gradient_store(ops, grad_dtype, grad, block_squares, sum_dtype, sum, elements);
  end(ops, started_ns);
}

void flap_ops_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                    void *weight, void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks,
                    int32_t *fault, uint64_t elements) {
  flap_assert(elements % FLAP_OPS_BLOCK == 0 && elements / FLAP_OPS_BLOCK <= FLAP_OPS_ADAMW_BLOCKS_MAX);
  flap_assert((weight_dtype == FLAP_F32) == (master == NULL));
  uint64_t started_ns = begin(ops);
  ops->table->adamw(ops, scalars, weight_dtype, grad_dtype, weight, master, m, v, grad, decay_blocks, fault, elements);
  end(ops, started_ns);
}

void flap_ops_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                         void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                         const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  flap_assert(elements % FLAP_OPS_BLOCK == 0 && elements / FLAP_OPS_BLOCK <= FLAP_OPS_ADAMW_BLOCKS_MAX);
  flap_assert((weight_dtype == FLAP_F32) == (master == NULL));
  uint64_t started_ns = begin(ops);
  ops->table->adamw_8bit(ops, scalars, weight_dtype, grad_dtype, weight, master, m, v, m_largest, v_largest, grad,
                         decay_blocks, fault, elements);
  end(ops, started_ns);
}
