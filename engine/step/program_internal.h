/* Private to the programs of a step: the list under construction (program_builder.c), when parts are updated
 * (program_update.c), and the passes of a step (program.c). */
#ifndef FLAP_ENGINE_STEP_PROGRAM_INTERNAL_H
#define FLAP_ENGINE_STEP_PROGRAM_INTERNAL_H

#include "engine/step/program.h"

/* `last`: of its part, whose weights have been of use then. */
typedef struct program_rounded {
  uint32_t index;
  bool last;
  flap_operand weights, gradient;
} program_rounded;

/* A program under construction. The first failure to get memory sticks; after it nothing is appended. */
typedef struct program_builder {
  const flap_layout *layout;
  const flap_program_spec *spec;
  const bool *resident;
  flap_program *program;
  uint32_t live[FLAP_CLASS_COUNT];
  bool failed;
  bool counts_only; /* nothing is listed, and in a lease's place there is its region */
  /* Leases of the segment in work, per layer of it; saved: NONE where nothing is kept. */
  flap_operand *weights, *sums, *saved;
  bool keeps_whole; /* a layer that saves keeps every tensor */
  /* Leases of the next segment's weights, which are being updated meanwhile. */
  flap_operand *next;
  uint32_t next_part, next_parts, next_slices, next_done;
  bool next_pinned;
  /* Likewise of the tail, all along the forward before it, one part's weights at a time. */
  flap_operand ahead;
  uint32_t ahead_slices, ahead_done;
  /* Slices whose gradient is rounded and whose update is spread over the backward of the segment behind them, in
   * order: at most as many as there are places for rounded gradients. */
  program_rounded *rounded;
  uint32_t rounded_count, rounded_done;
  bool last_group; /* of micro-batches, in work */
  bool folds;      /* by layer: weights that are leased for a forward pass get the update that is pending */
  /* The backward in work: the only one; the first of two, whose gradients are there for their norm alone; or the
   * second.
   */
  enum { PROGRAM_BACKWARD_ONLY, PROGRAM_BACKWARD_FIRST, PROGRAM_BACKWARD_SECOND } backward;
  uint32_t hidden_buffers;
} program_builder;

/* Whether weights are leased for each pass of a layer alone, also in the forward and in the tail: in a step of one
 * micro-batch a segment needs no room for those of all its layers. */
static inline bool program_weights_by_layer(const program_builder *b) {
  return b->layout->spec.by_layer && b->layout->spec.layerwise && b->layout->spec.micro_batches == 1;
}

/* ---- program_builder.c: appending to the list -------------------------------------------------------------- */

#define NONE FLAP_OPERAND_NONE
#define OP(b, kind, index, micro_batch, ...) \
  ((b)->counts_only                          \
       ? program_count_op(b)                 \
       : program_op((b), (kind), (index), (micro_batch), (const flap_operand[FLAP_OP_OPERANDS]){__VA_ARGS__}))

static inline void program_count_op(program_builder *b) {
  b->program->op_count++;
}

/* The next of the list, to be written; NULL: the builder has failed. */
flap_op *program_append_op(program_builder *b);

/* Inline, so that operands are written where they stay: plans make millions of operations. */
static inline void program_op(program_builder *b, flap_op_kind kind, uint32_t index, uint32_t micro_batch,
                              const flap_operand operand[FLAP_OP_OPERANDS]) {
  flap_op *op = program_append_op(b);
  if (op == NULL)
    return;
  op->kind = (uint8_t)kind;
  op->fresh = false;
  op->index = index;
  op->micro_batch = micro_batch;
  for (uint32_t i = 0; i < FLAP_OP_OPERANDS; i++)
    op->operand[i] = operand[i];
}

/* For a job of the host's, which is no operation of its own. */
flap_operand program_add_lease(program_builder *b, flap_lease lease);
flap_operand program_pin(program_builder *b, uint32_t region, flap_lease_mode mode);
void program_unpin(program_builder *b, flap_operand lease);

/* ---- program_update.c: who updates what when --------------------------------------------------------------- */

static inline const flap_layout_part *program_part_of(const program_builder *b, uint32_t part) {
  return &b->layout->parts[part];
}
static inline uint32_t program_head_part(const program_builder *b) {
  return b->layout->part_count - 1;
}
bool program_in_backward(const program_builder *b, uint32_t part);
/* By the device, and in the backward in work. */
bool program_pass_updates(const program_builder *b, uint32_t part);
/* On the device, in the forward of the next step. */
bool program_folds(const program_builder *b, uint32_t part);
/* A segment's parts, one behind the other: its layers, and with the last segment the head. */
uint32_t program_segment_parts(const program_builder *b, uint32_t segment, uint32_t *first_part_out);

/* A part's weights; with the pending update applied if this is the place for it. */
flap_operand program_pin_weights(program_builder *b, uint32_t part, bool update);
/* Of every part that the host updates, but for those of the backward, in the order of the forward: it works along that
 * list while the device computes, and what reads the weights waits for it. */
void program_update_on_host(program_builder *b);

/* The update of the segment behind the one that is passed: begun with it, an equal share after micro-batch `done` (from
 * 0) of `count`, but for the last, behind which the next segment follows at once. The weights are leased after the
 * first, by when those of the segment before have left, and stay: b->next. */
void program_next_segment(program_builder *b, uint32_t segment);
void program_next_share(program_builder *b, uint32_t done, uint32_t count);
/* The update of the tail, begun before the first segment: an equal share after micro-batch `done` of `count` of each,
 * but for the one right before the tail where there are others, for the tail's weights must be there again when it
 * begins. */
void program_ahead_begin(program_builder *b);
void program_ahead_share(program_builder *b, uint32_t segment, uint32_t done, uint32_t count);

/* A part's gradient is complete: it goes home, or is consumed by the update. Sums and weights have been of use, but for
 * the weights of slices that are only rounded here; weights NONE: they were not leased. */
void program_finish_part(program_builder *b, uint32_t part, flap_operand sums, flap_operand weights);
/* Slices that were only rounded: those of the segment before none are left; an equal share after micro-batch `done`
 * (from 0) of `count`. */
void program_rounded_begin(program_builder *b);
void program_rounded_share(program_builder *b, uint32_t done, uint32_t count);

#endif
