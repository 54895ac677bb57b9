/* What an operation of a program takes, out of what was timed. */
#include "engine/machine/op_times.h"

uint64_t flap_op_times_recompute(const flap_op_times *t, uint32_t mask) {
  for (uint32_t i = 0; i < t->set_count; i++)
    if (t->set_mask[i] == mask)
      return t->set_recompute_ns[i];
  return t->recompute_ns;
}

uint64_t flap_op_times_backward(const flap_op_times *t, uint32_t mask, flap_sums_written sums) {
  return mask == FLAP_MODEL_SAVED_ALL ? t->backward_spare_ns[sums] : t->backward_ns[sums];
}

static uint64_t per_element(const flap_op_times *t, double element_ns, uint64_t elements) {
  return t->launch_ns + (uint64_t)(element_ns * (double)elements);
}

/* Per element of a slice whose gradient is stored or measured. */
static double gradient_ns(const flap_op_times *t, const flap_layout *layout, const flap_op *op) {
  const flap_part kind = layout->parts[layout->slices[op->index].part].kind;
  const bool final = flap_layout_sums_are_final(&layout->spec, kind);
  if (op->operand[1] == FLAP_OPERAND_NONE)
    return final ? t->measure_final_ns : t->measure_ns;
  return final ? t->store_final_ns : t->store_ns;
}

static const flap_host_ns *host_of(const flap_op_times *t, const flap_layout *layout, const flap_op *op) {
  const flap_layout_slice *slice = &layout->slices[op->index];
  return layout->parts[slice->part].kind == FLAP_PART_EMBEDDING ? &t->host_embedding : &t->host;
}

uint64_t flap_op_times_beside_copies(const flap_op_times *t, const flap_layout *layout, const flap_op *op) {
  return (uint64_t)(host_of(t, layout, op)->beside_copies * (double)layout->slices[op->index].elements);
}

uint64_t flap_op_times_of(const flap_op_times *t, const flap_layout *layout, const flap_op *op) {
  switch ((flap_op_kind)op->kind) {
  case FLAP_OP_EMBED:
    return t->embed_ns;
  case FLAP_OP_LAYER_FORWARD:
    return t->forward_ns;
  case FLAP_OP_LAYER_RECOMPUTE:
    return op->operand[2] == FLAP_OPERAND_NONE ? t->recompute_ns : flap_op_times_recompute(t, layout->spec.saved_mask);
  case FLAP_OP_HEAD:
    return op->operand[3] == FLAP_OPERAND_NONE ? t->loss_ns : op->fresh ? t->head_fresh_ns : t->head_ns;
  case FLAP_OP_LAYER_BACKWARD: {
    const bool final = layout->spec.micro_batches == 1 && flap_layout_sums_are_final(&layout->spec, FLAP_PART_LAYER);
    return flap_op_times_backward(t, op->operand[2] == FLAP_OPERAND_NONE ? 0 : layout->spec.saved_mask,
                                  final       ? FLAP_SUMS_FINAL
                                  : op->fresh ? FLAP_SUMS_FRESH
                                              : FLAP_SUMS_ADDED_TO);
  }
  case FLAP_OP_EMBED_BACKWARD:
    return t->embed_backward_ns;
  case FLAP_OP_ZERO:
    return per_element(t, t->zero_ns, layout->parts[op->index].elements);
  case FLAP_OP_STORE_GRADIENT:
    return per_element(t, gradient_ns(t, layout, op), layout->slices[op->index].elements);
  case FLAP_OP_ADAMW: {
    const flap_layout_slice *slice = &layout->slices[op->index];
    const bool embedding = layout->parts[slice->part].kind == FLAP_PART_EMBEDDING;
    return per_element(t, embedding ? t->adamw_embedding_ns : t->adamw_ns, slice->elements);
  }
  case FLAP_OP_HOST_ADAMW:
    return (uint64_t)(host_of(t, layout, op)->alone * (double)layout->slices[op->index].elements);
  case FLAP_OP_PIN:
  case FLAP_OP_UNPIN:
  case FLAP_OP_LOSSES:
  case FLAP_OP_NORM:
  case FLAP_OP_LAYER_DECODE:
  case FLAP_OP_LOGITS:
  case FLAP_OP_KIND_COUNT:
    break;
  }
  return 0;
}
