/* Operations of the sim device: each charges its arithmetic and its device-memory traffic, and touches nothing.
 *
 * Traffic counts every operand once per use that a well-tiled kernel makes of it. */
#include "kernels/ops_internal.h"

#include <stdio.h>

static void charge(flap_ops *ops, flap_dtype dtype, double flops, double bytes) {
  flap_device_sim_kernel(ops->device, flops, bytes, dtype != FLAP_F32);
}

static double size_of(flap_dtype dtype) {
  return (double)flap_dtype_bytes(dtype);
}

/* What a plan made on sim must set aside for the real kernels. */
static uint64_t sim_workspace_bytes(const flap_ops_limits *limits) {
  return flap_ops_cpu_table.workspace_bytes(limits);
}

static flap_status sim_open(flap_ops *ops) {
  (void)snprintf(ops->numerics, sizeof ops->numerics, "sim");
  return FLAP_OK;
}

static void sim_close(flap_ops *ops) {
  (void)ops;
}

static void sim_matmul(flap_ops *ops, const flap_matmul *x) {
  const double m = x->m, n = x->n, k = x->k;
  charge(ops, x->dtype, 2 * m * n * k,
         (m * k + n * k + (x->bias != NULL ? n : 0)) * size_of(x->dtype) +
             m * n * size_of(x->c_dtype) * (x->accumulate || x->residual != NULL ? 2 : 1));
}

static void sim_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens,
                              uint32_t n, uint32_t ld) {
  (void)dbias, (void)dy, (void)ld;
  charge(ops, dtype, (double)tokens * n, (double)tokens * n * size_of(dtype) + 8.0 * n);
}

static void sim_zero(flap_ops *ops, void *memory, uint64_t bytes) {
  (void)memory;
  charge(ops, FLAP_F32, 0, (double)bytes);
}

static void sim_copy(flap_ops *ops, void *to, const void *from, uint64_t bytes) {
  (void)to, (void)from;
  charge(ops, FLAP_F32, 0, 2.0 * (double)bytes);
}

static void sim_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                          uint32_t token_count, uint32_t hidden) {
  (void)out, (void)tokens, (void)table;
  charge(ops, dtype, 0, 2.0 * token_count * hidden * size_of(dtype));
}

static void sim_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                                   const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden) {
  (void)dtable, (void)tokens, (void)order, (void)dx;
  charge(ops, dtype, (double)token_count * hidden, (double)token_count * hidden * (size_of(dtype) + 8.0));
}

static void sim_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                        const void *residual, const void *weight, uint32_t token_count, uint32_t hidden,
                        float epsilon) {
  (void)out, (void)rstd, (void)sum_out, (void)x, (void)weight, (void)epsilon;
  const double elements = (double)token_count * hidden;
  charge(ops, dtype, 5 * elements, elements * size_of(dtype) * (residual != NULL ? 4 : 2) + 4.0 * token_count);
}

static void sim_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                                 const void *dy, const void *x, const void *weight, const float *rstd,
                                 const void *dresidual, uint32_t token_count, uint32_t hidden) {
  (void)dx_out, (void)dweight, (void)dy, (void)x, (void)weight, (void)rstd;
  const double elements = (double)token_count * hidden;
  charge(ops, dtype, 12 * elements,
         elements * size_of(dtype) * ((dresidual != NULL ? 4 : 3) + (normalized_out != NULL ? 1 : 0)) +
             4.0 * token_count + 8.0 * hidden);
}

static void sim_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements) {
  (void)out, (void)a, (void)b;
  charge(ops, dtype, (double)elements, 3.0 * (double)elements * size_of(dtype));
}

static void sim_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count,
                     uint32_t sequence, uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld,
                     bool inverse) {
  (void)x, (void)cos_sin, (void)sequence, (void)first_position, (void)ld, (void)inverse;
  const double elements = (double)token_count * heads * head_size;
  charge(ops, dtype, 3 * elements, 2 * elements * size_of(dtype) + 4.0 * token_count * head_size);
}

static void sim_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up,
                       uint32_t token_count, uint32_t intermediate, uint32_t ld) {
  (void)out, (void)gate, (void)up, (void)ld;
  const double elements = (double)token_count * intermediate;
  charge(ops, dtype, 20 * elements, 3 * elements * size_of(dtype));
}

static void sim_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                                const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                                uint32_t intermediate) {
  (void)dgate, (void)dup, (void)ld_d, (void)dout, (void)gate, (void)up, (void)ld;
  const double elements = (double)token_count * intermediate;
  charge(ops, dtype, 26 * elements, (out != NULL ? 6 : 5) * elements * size_of(dtype));
}

/* Query-key pairs under the causal mask. */
static double causal_pairs(double batch, double heads, double queries, double first_position) {
  return batch * heads * (queries * first_position + queries * (queries + 1) / 2);
}

static void sim_attention(flap_ops *ops, const flap_attention *x) {
  const double tokens = (double)x->batch * x->sequence;
  const double pairs = causal_pairs(x->batch, x->heads, x->sequence, 0);
  charge(ops, x->dtype, 4 * pairs * x->head_size,
         tokens * x->head_size * (2.0 * x->heads + 2.0 * x->kv_heads) * size_of(x->dtype) + 4 * tokens * x->heads);
}

static void sim_attention_backward(flap_ops *ops, const flap_attention *x, void *dq, void *dk, void *dv,
                                   const void *dout) {
  (void)dq, (void)dk, (void)dv, (void)dout;
  const double tokens = (double)x->batch * x->sequence;
  const double pairs = causal_pairs(x->batch, x->heads, x->sequence, 0);
  charge(ops, x->dtype, 10 * pairs * x->head_size,
         tokens * x->head_size * (4.0 * x->heads + 4.0 * x->kv_heads) * size_of(x->dtype) + 8 * tokens * x->heads);
}

static void sim_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                                 const void *k_cache, const void *v_cache, uint32_t token_count,
                                 uint32_t first_position, uint32_t heads, uint32_t kv_heads, uint32_t head_size) {
  (void)out, (void)q, (void)q_stride, (void)k_cache, (void)v_cache;
  const double pairs = causal_pairs(1, heads, token_count, first_position);
  const double positions = (double)first_position + token_count;
  charge(ops, dtype, 4 * pairs * head_size,
         head_size * (2.0 * token_count * heads + 2.0 * positions * kv_heads) * size_of(dtype));
}

static void sim_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                          const void *x, const void *weight, const int32_t *targets, float loss_scale,
                          uint32_t token_count, uint32_t hidden, uint32_t vocabulary) {
  (void)losses, (void)dweight, (void)x, (void)weight, (void)targets, (void)loss_scale;
  const double tokens = token_count, logits = tokens * vocabulary, weights = (double)vocabulary * hidden;
  double flops = 2 * logits * hidden + 10 * logits;
  double bytes = (tokens * hidden + weights + 2 * logits) * size_of(dtype);
  if (dx != NULL) {
    flops += 4 * logits * hidden;
    bytes += (2 * tokens * hidden + weights + 3 * logits) * size_of(dtype) + (accumulate ? 8 : 4) * weights;
  }
  charge(ops, dtype, flops, bytes);
}

static void sim_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares,
                               flap_dtype sum_dtype, const void *sum, uint64_t elements) {
  (void)block_squares, (void)sum;
  charge(ops, FLAP_F32, 3.0 * (double)elements,
         (double)elements * (size_of(sum_dtype) + (grad != NULL ? size_of(grad_dtype) : 0)));
}

static void sim_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                      void *weight, void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks,
                      int32_t *fault, uint64_t elements) {
  (void)scalars, (void)weight, (void)master, (void)m, (void)v, (void)grad, (void)decay_blocks;
  (void)fault;
  const double moved = weight_dtype == FLAP_F16 ? 26.0 : 24.0; /* the fp16 weight is written beside its master */
  charge(ops, FLAP_F32, 16.0 * (double)elements, (double)elements * (moved + size_of(grad_dtype)));
}

static void sim_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                           void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                           const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements) {
  (void)scalars, (void)weight, (void)master, (void)m, (void)v, (void)m_largest, (void)v_largest;
  (void)grad, (void)decay_blocks, (void)fault;
  const double weights = weight_dtype == FLAP_F16 ? 10.0 : 8.0;
  const double moments = 2 * (2 + 8.0 / FLAP_OPS_MOMENT_BLOCK); /* read and written */
  charge(ops, FLAP_F32, 105.0 * (double)elements, (double)elements * (weights + moments + size_of(grad_dtype)));
}

const flap_ops_table flap_ops_sim_table = {
    .workspace_bytes = sim_workspace_bytes,
    .open = sim_open,
    .close = sim_close,
    .matmul = sim_matmul,
    .bias_backward = sim_bias_backward,
    .zero = sim_zero,
    .copy = sim_copy,
    .embedding = sim_embedding,
    .embedding_backward = sim_embedding_backward,
    .rmsnorm = sim_rmsnorm,
    .rmsnorm_backward = sim_rmsnorm_backward,
    .add = sim_add,
    .rope = sim_rope,
    .swiglu = sim_swiglu,
    .swiglu_backward = sim_swiglu_backward,
    .attention = sim_attention,
    .attention_backward = sim_attention_backward,
    .attention_decode = sim_attention_decode,
    .head_loss = sim_head_loss,
    .gradient_store = sim_gradient_store,
    .adamw = sim_adamw,
    .adamw_8bit = sim_adamw_8bit,
};
