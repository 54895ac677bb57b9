/* Attention's part of the table: from the arguments of ops.h to the launchers of attention.h. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_internal.h"

#include "base/assert.h"

static flap_cuda_attention_shape shape_of(const flap_attention *x) {
  flap_cuda_attention_shape shape = {.batch = x->batch,
                                     .queries = x->sequence,
                                     .keys = x->sequence,
                                     .heads = x->heads,
                                     .kv_heads = x->kv_heads,
                                     .head_size = x->head_size,
                                     .q_stride = x->q_stride,
                                     .kv_stride = x->kv_stride,
                                     .dtype = x->dtype};
  shape.two_passes = !cuda_attention_chain_pays(&shape);
  return shape;
}

void cuda_attention(flap_ops *ops, const flap_attention *x) {
  const flap_cuda_attention_shape shape = shape_of(x);
  flap_assert(flap_cuda_attention_forward_scratch_bytes(&shape) <= cuda_scratch_bytes(ops));
  cuda_check(
      ops, "attention",
      flap_cuda_attention_forward(&shape, x->out, x->lse, x->q, x->k, x->v, cuda_scratch(ops), cuda_stream(ops)));
}

void cuda_attention_backward(flap_ops *ops, const flap_attention *x, void *dq, void *dk, void *dv, const void *dout) {
  const flap_cuda_attention_shape shape = shape_of(x);
  flap_assert(flap_cuda_attention_backward_scratch_bytes(&shape) <= cuda_scratch_bytes(ops));
  cuda_check(ops, "attention backward",
             flap_cuda_attention_backward(&shape, dq, dk, dv, dout, x->q, x->k, x->v, x->out, x->lse, cuda_scratch(ops),
                                          cuda_stream(ops)));
}

void cuda_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                           const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                           uint32_t heads, uint32_t kv_heads, uint32_t head_size) {
  const flap_cuda_attention_shape shape = {.batch = 1,
                                           .queries = token_count,
                                           .keys = first_position + token_count,
                                           .first_position = first_position,
                                           .heads = heads,
                                           .kv_heads = kv_heads,
                                           .head_size = head_size,
                                           .q_stride = q_stride,
                                           .kv_stride = kv_heads * head_size,
                                           .dtype = dtype};
  flap_assert(flap_cuda_attention_forward_scratch_bytes(&shape) <= cuda_scratch_bytes(ops));
  cuda_check(ops, "attention over a cache",
             flap_cuda_attention_forward(&shape, out, NULL, q, k_cache, v_cache, cuda_scratch(ops), cuda_stream(ops)));
}
