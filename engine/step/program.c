#include "base/assert.h"
#include "engine/step/program_internal.h"

#include <stdlib.h>

/* Every layer has a place for what it keeps, and for its input. */
static bool saves_all(const flap_layout *layout) {
  return layout->spec.mode == FLAP_MODE_TRAIN && flap_layout_saves_all(&layout->spec);
}

/* What a layer that saves does not keep. */
static uint64_t missing_bytes(const flap_layout *layout) {
  return flap_model_scratch_bytes(layout->spec.model, &layout->spec.shape, layout->spec.saved_mask);
}

uint32_t flap_program_hidden_buffers(const flap_layout *layout) {
  const uint32_t k = flap_layout_longest_segment(&layout->spec);
  if (layout->spec.mode == FLAP_MODE_SAMPLE)
    return 1;
  if (saves_all(layout))
    return 0;
  /* Inputs that a backward finds, by layer in the tail's alone; a forward passes on between two. */
  const uint32_t inputs = (flap_layout_goes_by_layer(&layout->spec) ? layout->spec.tail_layers : k) - 1;
  const uint32_t passing = k < 3 ? k - 1 : 2;
  return inputs > passing ? inputs : passing;
}

uint32_t flap_program_scratch_buffers(const flap_layout *layout) {
  if (saves_all(layout))
    return missing_bytes(layout) > 0 ? 1 : 0;
  return layout->spec.mode == FLAP_MODE_TRAIN && !layout->spec.layerwise ? flap_layout_longest_segment(&layout->spec)
                                                                         : 1;
}

uint64_t flap_program_scratch_bytes(const flap_layout *layout) {
  return saves_all(layout) ? missing_bytes(layout)
                           : flap_model_scratch_bytes(layout->spec.model, &layout->spec.shape, 0);
}

static flap_operand buffer(uint32_t index) {
  return FLAP_OPERAND_BUFFER | index;
}

/* Scratch is numbered behind the hidden-state buffers. */
static flap_operand scratch_buffer(const program_builder *b, uint32_t index) {
  return buffer(b->hidden_buffers + index);
}

/* A part's sums for one group: the first group's first micro-batch writes them, they travel in fp32 between groups, and
 * end with the last. `outlives`: they are needed again after this group's last use here (the tied embedding). */
static flap_operand pin_sums(program_builder *b, uint32_t part, bool first_group, bool last_group, bool outlives) {
  const bool keeps = !last_group || outlives;
  const flap_lease_mode mode =
      first_group ? (keeps ? FLAP_LEASE_CREATE : FLAP_LEASE_SCRATCH) : (keeps ? FLAP_LEASE_UPDATE : FLAP_LEASE_CONSUME);
  return program_pin(b, program_part_of(b, part)->sums, mode);
}

/* The operation appended last begins the sums if this is their first micro-batch. */
static void mark_fresh(program_builder *b, bool fresh) {
  if (!b->failed && !b->counts_only)
    b->program->ops[b->program->op_count - 1].fresh = fresh;
}

/* The input of a segment's layer j > 0 for the micro-batch in work. */
static flap_operand inner_input(const program_builder *b, uint32_t j, bool backward) {
  if (b->saved[j] != NONE)
    return b->saved[j] | FLAP_OPERAND_INPUT;
  /* Forward only passes on; backward needs every layer's input again. */
  return buffer(backward ? j - 1 : (j - 1) % 2);
}

/* Whether layer j is computed again right before its backward, from its own input; a segment that keeps nothing else is
 * as a whole, from its input. */
static bool is_apart(const program_builder *b, uint32_t j) {
  return b->saved[j] == NONE ? b->layout->spec.layerwise : !b->keeps_whole;
}

/* Where the saved tensors of the segment's layer j go that are not kept. */
static flap_operand scratch(const program_builder *b, uint32_t j, bool backward) {
  if (b->saved[j] != NONE && b->keeps_whole)
    return NONE;
  return scratch_buffer(b, backward && !is_apart(b, j) ? j : 0);
}

typedef struct micro_batch_range {
  uint32_t first, end; /* of the group */
  bool first_group, last_group;
} micro_batch_range;

static void recompute(program_builder *b, uint32_t layer, uint32_t j, uint32_t micro_batch, flap_operand x_in) {
  OP(b, FLAP_OP_LAYER_RECOMPUTE, layer, micro_batch, b->weights[j], x_in, b->saved[j], NONE, scratch(b, j, true), NONE);
}

/* Runs a segment's layers forward for one micro-batch; x_out NONE: only what their backward needs. */
static void forward_layers(program_builder *b, uint32_t segment, uint32_t micro_batch, flap_operand x_in,
                           flap_operand x_out, bool backward) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t layer = first; layer < end; layer++) {
    const uint32_t j = layer - first;
    const flap_operand in = j == 0 ? x_in : inner_input(b, j, backward);
    const flap_operand out = layer + 1 == end ? x_out : inner_input(b, j + 1, backward);
    if (program_weights_by_layer(b))
      b->weights[j] = program_pin_weights(b, flap_layout_layer_part(layer), b->folds);
    if (out == NONE)
      recompute(b, layer, j, micro_batch, in);
    else
      OP(b, FLAP_OP_LAYER_FORWARD, layer, micro_batch, b->weights[j], in, b->saved[j], out, scratch(b, j, backward),
         NONE);
    if (program_weights_by_layer(b))
      program_unpin(b, b->weights[j]);
  }
}

/* An evaluation passes through the same places, and leaves nothing in them. */
static void pin_saved(program_builder *b, uint32_t segment, uint32_t micro_batch, flap_lease_mode mode) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  if (b->spec->kind != FLAP_PROGRAM_STEP)
    mode = FLAP_LEASE_SCRATCH;
  for (uint32_t layer = first; layer < end; layer++) {
    const uint32_t region = flap_layout_saved(b->layout, layer, micro_batch);
    b->saved[layer - first] = region == FLAP_REGION_NONE ? NONE : program_pin(b, region, mode);
  }
}

static void unpin_saved(program_builder *b, uint32_t segment) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t j = 0; j < end - first; j++)
    if (b->saved[j] != NONE)
      program_unpin(b, b->saved[j]);
}

static void pin_segment(program_builder *b, uint32_t segment, bool update) {
  uint32_t first_part, first, end;
  const uint32_t count = program_segment_parts(b, segment, &first_part);
  flap_layout_segment(b->layout, segment, &first, &end);
  b->folds = update;
  for (uint32_t j = program_weights_by_layer(b) ? end - first : 0; j < count; j++)
    b->weights[j] = b->next_pinned ? b->next[j] : program_pin_weights(b, first_part + j, update);
  b->next_pinned = false;
}

/* What a segment but the last begins with: the first one's is the embedding's output, made where it is used. */
static flap_operand pin_input(program_builder *b, uint32_t segment, uint32_t micro_batch, flap_operand embedding) {
  const bool step = b->spec->kind == FLAP_PROGRAM_STEP;
  const flap_lease_mode mode = embedding == NONE ? (step ? FLAP_LEASE_READ : FLAP_LEASE_CONSUME)
                                                 : (step ? FLAP_LEASE_CREATE : FLAP_LEASE_SCRATCH);
  const flap_operand x = program_pin(b, flap_layout_boundary(b->layout, segment, micro_batch), mode);
  if (embedding != NONE)
    OP(b, FLAP_OP_EMBED, 0, micro_batch, embedding, x, NONE, NONE, NONE, NONE);
  return x;
}

/* Forward of a segment but the last for the micro-batches of a group. Weights stay pinned from a layer's first use to
 * its last; `embedding`: of the first segment, else NONE. */
static void forward_segment(program_builder *b, uint32_t segment, micro_batch_range range, bool update,
                            flap_operand embedding) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  pin_segment(b, segment, update);
  const bool spread = update && b->spec->spread, has_next = spread && segment + 2 < b->layout->segment_count;
  if (has_next)
    program_next_segment(b, segment + 1);
  for (uint32_t i = range.first; i < range.end; i++) {
    /* Where activations are saved from the segment's first layer on, its backward still starts from this input. */
    const flap_operand x_in = pin_input(b, segment, i, embedding);
    const flap_operand x_out = program_pin(b, flap_layout_boundary(b->layout, segment + 1, i), FLAP_LEASE_CREATE);
    pin_saved(b, segment, i, FLAP_LEASE_CREATE);
    forward_layers(b, segment, i, x_in, x_out, false);
    unpin_saved(b, segment);
    program_unpin(b, x_out);
    program_unpin(b, x_in);
    if (has_next)
      program_next_share(b, i - range.first, range.end - range.first);
    if (spread)
      program_ahead_share(b, segment, i - range.first, range.end - range.first);
  }
  for (uint32_t j = 0; j < end - first && !program_weights_by_layer(b); j++)
    program_unpin(b, b->weights[j]);
}

/* Where the tail is all there is: with its sums leased there would have to be room for two vocabularies. */
static void embed(program_builder *b, micro_batch_range range, bool update) {
  const flap_operand embedding = program_pin_weights(b, 0, update);
  for (uint32_t i = range.first; i < range.end; i++) {
    const flap_operand x = program_pin(b, flap_layout_boundary(b->layout, 0, i), FLAP_LEASE_CREATE);
    OP(b, FLAP_OP_EMBED, 0, i, embedding, x, NONE, NONE, NONE, NONE);
    program_unpin(b, x);
  }
  program_unpin(b, embedding);
}

/* The passes of a group before the tail. */
static void forward(program_builder *b, micro_batch_range range, bool update) {
  const uint32_t last = b->layout->segment_count - 1;
  if (last == 0) {
    embed(b, range, update);
    return;
  }
  const flap_operand embedding = program_pin_weights(b, 0, update);
  if (update && b->spec->spread)
    program_ahead_begin(b);
  forward_segment(b, 0, range, update, embedding);
  program_unpin(b, embedding);
  for (uint32_t segment = 1; segment < last; segment++)
    forward_segment(b, segment, range, update, NONE);
}

/* The last group's backward that updates weights leases them for that. */
static flap_operand pin_for_backward(program_builder *b, uint32_t part) {
  const bool updates = b->last_group && program_pass_updates(b, part);
  return program_pin(b, program_part_of(b, part)->weights, updates ? FLAP_LEASE_UPDATE : FLAP_LEASE_READ);
}

/* In a step of one micro-batch sums live for a layer's backward alone, also where segments are passed as a whole. */
static bool sums_by_layer(const program_builder *b) {
  return b->layout->spec.by_layer && b->layout->spec.micro_batches == 1;
}

/* `fresh`: the scratch memory holds what the segment's last layer left there right before. `finishes`: this is the
 * last micro-batch, and each layer's gradient goes home while those before it compute. */
static void backward_layers(program_builder *b, uint32_t segment, uint32_t micro_batch, flap_operand x_in,
                            flap_operand dx, bool first_sums, bool fresh, bool finishes) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t layer = end; layer-- > first;) {
    const uint32_t j = layer - first;
    const flap_operand in = j == 0 ? x_in : inner_input(b, j, true);
    if (program_weights_by_layer(b))
      b->weights[j] = pin_for_backward(b, flap_layout_layer_part(layer));
    if (is_apart(b, j) && !(fresh && layer + 1 == end))
      recompute(b, layer, j, micro_batch, in);
    if (sums_by_layer(b))
      b->sums[j] = pin_sums(b, flap_layout_layer_part(layer), true, true, false);
    OP(b, FLAP_OP_LAYER_BACKWARD, layer, micro_batch, b->weights[j], in, b->saved[j], dx, scratch(b, j, true),
       b->sums[j]);
    mark_fresh(b, first_sums);
    if (finishes)
      program_finish_part(b, flap_layout_layer_part(layer), b->sums[j], b->weights[j]);
  }
}

/* The layers of a segment have been of use; `finishes`: and their gradients are complete. */
static void leave_layers(program_builder *b, uint32_t first, uint32_t end, bool finishes) {
  for (uint32_t layer = end; layer-- > first;) {
    const uint32_t j = layer - first;
    if (finishes) {
      program_finish_part(b, flap_layout_layer_part(layer), b->sums[j], b->weights[j]);
      continue;
    }
    if (b->spec->kind == FLAP_PROGRAM_STEP)
      program_unpin(b, b->sums[j]);
    program_unpin(b, b->weights[j]);
  }
}

/* What the tail leases beside its segment: the head's sums and the projection, with its sums where it is the embedding.
 */
typedef struct tail_leases {
  flap_operand head, projection, sums, projection_sums;
} tail_leases;

static void pin_tail(program_builder *b, micro_batch_range range, uint32_t first, uint32_t end, tail_leases *t) {
  const bool tied = b->layout->tied;
  t->head = b->weights[end - first];
  t->projection = tied ? program_pin(b, program_part_of(b, 0)->weights, FLAP_LEASE_READ) : t->head;
  t->sums = t->projection_sums = NONE;
  if (b->spec->kind != FLAP_PROGRAM_STEP)
    return;
  for (uint32_t layer = first; layer < end && !sums_by_layer(b); layer++)
    b->sums[layer - first] = pin_sums(b, flap_layout_layer_part(layer), range.first_group, range.last_group, false);
  t->sums = pin_sums(b, program_head_part(b), range.first_group, range.last_group, false);
  t->projection_sums = tied ? pin_sums(b, 0, range.first_group, range.last_group, true) : t->sums;
}

static void leave_projection(program_builder *b, const tail_leases *t) {
  if (!b->layout->tied)
    return;
  if (b->spec->kind == FLAP_PROGRAM_STEP)
    program_unpin(b, t->projection_sums);
  program_unpin(b, t->projection);
}

/* The head has been of use for the last micro-batch, and its gradient is complete. */
static void finish_head(program_builder *b, const tail_leases *t) {
  leave_projection(b, t);
  if (b->layout->spec.backward_parts > 0 && !b->layout->spec.backward_twice)
    OP(b, FLAP_OP_LOSSES, 0, 0, NONE, NONE, NONE, NONE, NONE, NONE);
  program_rounded_begin(b);
  program_finish_part(b, program_head_part(b), t->sums, t->head);
}

/* The tail's parts have been of use for now. */
static void leave_tail(program_builder *b, uint32_t first, uint32_t end, const tail_leases *t) {
  leave_projection(b, t);
  if (b->spec->kind == FLAP_PROGRAM_STEP)
    program_unpin(b, t->sums);
  program_unpin(b, t->head);
  if (!program_weights_by_layer(b))
    leave_layers(b, first, end, false);
}

/* Inputs of segments that the forward left for the first of two backwards serve the second, where all micro-batches
 * have theirs; else that takes another forward. */
static bool shares_inputs(const program_builder *b) {
  return b->layout->spec.group_micro_batches == b->layout->spec.micro_batches;
}

static flap_lease_mode input_mode(const program_builder *b) {
  return b->backward == PROGRAM_BACKWARD_FIRST && shares_inputs(b) ? FLAP_LEASE_READ : FLAP_LEASE_CONSUME;
}

/* The last segment, final norm, logits and loss; in a step also their backward. Each micro-batch goes there and back at
 * once: nothing of it is stored, and nothing computed again. */
static void tail(program_builder *b, micro_batch_range range, bool update) {
  const uint32_t segment = b->layout->segment_count - 1;
  const bool step = b->spec->kind == FLAP_PROGRAM_STEP;
  uint32_t first, end;
  tail_leases t;
  flap_layout_segment(b->layout, segment, &first, &end);
  pin_segment(b, segment, update && !(b->spec->spread && segment > 0));
  pin_tail(b, range, first, end, &t);
  const bool finishes = step && range.last_group;
  for (uint32_t i = range.first; i < range.end; i++) {
    const bool fresh = range.first_group && i == range.first, last = finishes && i + 1 == range.end;
    const flap_operand x_in = program_pin(b, flap_layout_boundary(b->layout, segment, i), input_mode(b));
    const flap_operand x_out = program_pin(b, flap_layout_boundary(b->layout, segment + 1, i), FLAP_LEASE_SCRATCH);
    pin_saved(b, segment, i, FLAP_LEASE_SCRATCH);
    forward_layers(b, segment, i, x_in, x_out, step);
    const flap_operand dx = step ? program_pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_CREATE) : NONE;
    OP(b, FLAP_OP_HEAD, 0, i, t.head, t.projection, x_out, dx, t.sums, t.projection_sums);
    mark_fresh(b, fresh);
    program_unpin(b, x_out);
    if (last)
      finish_head(b, &t);
    if (step)
      backward_layers(b, segment, i, x_in, dx, fresh, true, last);
    unpin_saved(b, segment);
    if (step)
      program_unpin(b, dx);
    program_unpin(b, x_in);
  }
  if (!finishes)
    leave_tail(b, first, end, &t);
}

/* A backward uses up what was saved for it. Where there is another one, layers save once more, as those of the tail do,
 * into the same places; and what they hand on, the next segment's input, has been of use. */
static void save_again(program_builder *b, uint32_t segment, uint32_t micro_batch, flap_operand x_in) {
  const flap_operand x_out =
      program_pin(b, flap_layout_boundary(b->layout, segment + 1, micro_batch), FLAP_LEASE_SCRATCH);
  forward_layers(b, segment, micro_batch, x_in, x_out, true);
  program_unpin(b, x_out);
}

/* Backward of a segment but the last, micro-batch by micro-batch. */
static void backward_segment(program_builder *b, uint32_t segment, micro_batch_range range) {
  b->folds = false; /* what is computed again has its update */
  const bool anew = b->backward == PROGRAM_BACKWARD_SECOND && shares_inputs(b);
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t layer = first; layer < end; layer++) {
    const uint32_t part = flap_layout_layer_part(layer);
    if (!program_weights_by_layer(b))
      b->weights[layer - first] = pin_for_backward(b, part);
    if (!sums_by_layer(b))
      b->sums[layer - first] = pin_sums(b, part, range.first_group, range.last_group, false);
  }
  for (uint32_t i = range.first; i < range.end; i++) {
    const flap_operand dx = program_pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_UPDATE);
    const flap_operand x_in = program_pin(b, flap_layout_boundary(b->layout, segment, i), input_mode(b));
    pin_saved(b, segment, i, anew ? FLAP_LEASE_SCRATCH : FLAP_LEASE_CONSUME);
    const bool saves = b->saved[0] != NONE; /* segments save as a whole */
    if (anew && saves)
      save_again(b, segment, i, x_in);
    else if (!saves)
      forward_layers(b, segment, i, x_in, NONE, true);
    backward_layers(b, segment, i, x_in, dx, range.first_group && i == range.first, anew || !saves, sums_by_layer(b));
    unpin_saved(b, segment);
    program_unpin(b, x_in);
    program_unpin(b, dx);
    program_rounded_share(b, i - range.first, range.end - range.first);
  }
  program_rounded_begin(b);
  if (!sums_by_layer(b))
    leave_layers(b, first, end, range.last_group);
}

/* The input of a segment's layer j, of a segment but the last. */
static uint32_t layer_input(const program_builder *b, uint32_t segment, uint32_t j, uint32_t micro_batch) {
  return j == 0 ? flap_layout_boundary(b->layout, segment, micro_batch) : flap_layout_inner(b->layout, j, micro_batch);
}

/* The inputs of a segment's layers but the first, which has its own. */
static void leave_inputs(program_builder *b, uint32_t segment, micro_batch_range range) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t j = 0; first + j + 1 < end; j++) {
    const uint32_t part = flap_layout_layer_part(first + j);
    const flap_operand weights = program_pin(b, program_part_of(b, part)->weights, FLAP_LEASE_READ);
    for (uint32_t i = range.first; i < range.end; i++) {
      const flap_operand x_in = program_pin(b, layer_input(b, segment, j, i), FLAP_LEASE_READ);
      const flap_operand x_out = program_pin(b, flap_layout_inner(b->layout, j + 1, i), FLAP_LEASE_CREATE);
      OP(b, FLAP_OP_LAYER_FORWARD, first + j, i, weights, x_in, NONE, x_out, scratch_buffer(b, 0), NONE);
      program_unpin(b, x_out);
      program_unpin(b, x_in);
    }
    program_unpin(b, weights);
  }
}

/* Backward of a segment but the last, layer by layer, from the last one on, each for all micro-batches. */
static void backward_by_layer(program_builder *b, uint32_t segment, micro_batch_range range) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  leave_inputs(b, segment, range);
  for (uint32_t layer = end; layer-- > first;) {
    const uint32_t j = layer - first, part = flap_layout_layer_part(layer);
    const flap_operand weights = pin_for_backward(b, part), sums = pin_sums(b, part, true, true, false);
    for (uint32_t i = range.first; i < range.end; i++) {
      const flap_operand dx = program_pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_UPDATE);
      const flap_operand x_in =
          program_pin(b, layer_input(b, segment, j, i), j > 0 ? FLAP_LEASE_CONSUME : input_mode(b));
      OP(b, FLAP_OP_LAYER_RECOMPUTE, layer, i, weights, x_in, NONE, NONE, scratch_buffer(b, 0), NONE);
      OP(b, FLAP_OP_LAYER_BACKWARD, layer, i, weights, x_in, NONE, dx, scratch_buffer(b, 0), sums);
      mark_fresh(b, i == range.first);
      program_unpin(b, x_in);
      program_unpin(b, dx);
    }
    program_finish_part(b, part, sums, weights);
  }
}

/* The embedding's gradient: what the head left of it if tied, then the rows of every micro-batch, in their order. */
static void embed_backward(program_builder *b) {
  const flap_operand sums =
      program_pin(b, program_part_of(b, 0)->sums, b->layout->tied ? FLAP_LEASE_CONSUME : FLAP_LEASE_SCRATCH);
  if (!b->layout->tied)
    OP(b, FLAP_OP_ZERO, 0, 0, sums, NONE, NONE, NONE, NONE, NONE);
  for (uint32_t i = 0; i < b->layout->spec.micro_batches; i++) {
    const flap_operand dx = program_pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_CONSUME);
    OP(b, FLAP_OP_EMBED_BACKWARD, 0, i, dx, sums, NONE, NONE, NONE, NONE);
    program_unpin(b, dx);
    program_rounded_share(b, i, b->layout->spec.micro_batches);
  }
  program_finish_part(b, 0, sums,
                      program_pass_updates(b, 0) ? program_pin(b, program_part_of(b, 0)->weights, FLAP_LEASE_UPDATE)
                                                 : NONE);
}

static void sweep(program_builder *b) {
  program_update_on_host(b);
  for (uint32_t part = 0; part < b->layout->part_count; part++)
    if (program_folds(b, part))
      program_unpin(b, program_pin_weights(b, part, true));
}

/* ---- whole programs -------------------------------------------------------------------------------------- */

/* All groups there and back. */
static void pass_groups(program_builder *b, bool pending) {
  const uint32_t n = b->layout->spec.micro_batches, group = b->layout->spec.group_micro_batches;
  for (uint32_t first = 0; first < n; first += group) {
    micro_batch_range range = {.first = first, .end = first + group < n ? first + group : n};
    range.first_group = first == 0;
    range.last_group = b->last_group = range.end == n;
    const bool update = pending && range.first_group;
    if (b->backward != PROGRAM_BACKWARD_SECOND || !shares_inputs(b))
      forward(b, range, update);
    tail(b, range, update);
    for (uint32_t segment = b->layout->segment_count - 1; segment-- > 0;)
      if (flap_layout_goes_by_layer(&b->layout->spec))
        backward_by_layer(b, segment, range);
      else
        backward_segment(b, segment, range);
  }
  embed_backward(b);
}

static void build_step(program_builder *b) {
  const bool twice = b->layout->spec.backward_twice;
  if (b->spec->pending)
    program_update_on_host(b);
  b->backward = twice ? PROGRAM_BACKWARD_FIRST : PROGRAM_BACKWARD_ONLY;
  pass_groups(b, b->spec->pending);
  OP(b, FLAP_OP_NORM, 0, 0, NONE, NONE, NONE, NONE, NONE, NONE);
  if (twice) {
    b->backward = PROGRAM_BACKWARD_SECOND;
    pass_groups(b, false);
  }
  b->program->before_sweep = b->program->lease_count;
  if (b->spec->sweep)
    sweep(b);
}

static void build_forward(program_builder *b) {
  const uint32_t n = b->layout->spec.micro_batches, group = b->layout->spec.group_micro_batches;
  for (uint32_t first = 0; first < n; first += group) {
    const micro_batch_range range = {.first = first, .end = first + group < n ? first + group : n};
    forward(b, range, false);
    tail(b, range, false);
  }
}

/* New tokens through every layer, with the keys and values of the earlier ones. */
static void build_decode(program_builder *b) {
  const uint32_t layers = b->layout->spec.model->num_hidden_layers;
  const flap_operand x = buffer(0);
  flap_operand embedding = program_pin_weights(b, 0, false);
  OP(b, FLAP_OP_EMBED, 0, 0, embedding, x, NONE, NONE, NONE, NONE);
  program_unpin(b, embedding);
  for (uint32_t layer = 0; layer < layers; layer++) {
    const flap_operand weights = program_pin_weights(b, flap_layout_layer_part(layer), false);
    const flap_operand cache = program_pin(b, flap_layout_cache(b->layout, layer), FLAP_LEASE_UPDATE);
    OP(b, FLAP_OP_LAYER_DECODE, layer, 0, weights, x, cache, scratch_buffer(b, 0), NONE, NONE);
    program_unpin(b, cache);
    program_unpin(b, weights);
  }
  const flap_operand weights = program_pin_weights(b, program_head_part(b), false);
  const flap_operand projection = b->layout->tied ? program_pin_weights(b, 0, false) : weights;
  OP(b, FLAP_OP_LOGITS, 0, 0, weights, projection, x, NONE, NONE, NONE);
  if (b->layout->tied)
    program_unpin(b, projection);
  program_unpin(b, weights);
}

static flap_status build(const flap_layout *layout, const flap_program_spec *spec, const bool *resident,
                         bool counts_only, flap_program *program_out) {
  const uint32_t k = flap_layout_longest_segment(&layout->spec);
  *program_out = (flap_program){.spec = *spec};
  program_builder b = {.layout = layout,
                       .spec = spec,
                       .resident = resident,
                       .program = program_out,
                       .counts_only = counts_only,
                       .hidden_buffers = flap_program_hidden_buffers(layout),
                       .keeps_whole = missing_bytes(layout) == 0};
  const size_t wide = (size_t)k + 1; /* a segment and the head */
  flap_operand *lists = calloc(wide, 4 * sizeof *lists);
  b.rounded = calloc((size_t)layout->rounded_count + 1, sizeof *b.rounded);
  if (lists == NULL || b.rounded == NULL) {
    free(lists);
    free(b.rounded);
    return flap_error_set(FLAP_NO_MEMORY, "no memory to plan a segment of %u layers", k);
  }
  b.weights = lists;
  b.sums = lists + wide;
  b.saved = lists + 2 * wide;
  b.next = lists + 3 * wide;
  switch (spec->kind) {
  case FLAP_PROGRAM_STEP:
    build_step(&b);
    break;
  case FLAP_PROGRAM_SWEEP:
    sweep(&b);
    break;
  case FLAP_PROGRAM_FORWARD:
    build_forward(&b);
    break;
  case FLAP_PROGRAM_DECODE:
    build_decode(&b);
    break;
  }
  free(lists);
  free(b.rounded);
  if (b.failed) {
    flap_program_close(program_out);
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a step program of %u layers", layout->part_count - 2);
  }
  for (uint32_t klass = 0; klass < FLAP_CLASS_COUNT; klass++)
    flap_assert(b.live[klass] == 0);
  return FLAP_OK;
}

flap_status flap_program_build(const flap_layout *layout, const flap_program_spec *spec, const bool *resident,
                               flap_program *program_out) {
  return build(layout, spec, resident, false, program_out);
}

flap_status flap_program_count(const flap_layout *layout, const flap_program_spec *spec, const bool *resident,
                               flap_program *program_out) {
  return build(layout, spec, resident, true, program_out);
}

void flap_program_join(const flap_program *step, const flap_program *sweep, flap_program *program_out) {
  flap_assert(step->spec.kind == FLAP_PROGRAM_STEP && !step->spec.sweep && sweep->spec.kind == FLAP_PROGRAM_SWEEP);
  *program_out = (flap_program){.spec = step->spec,
                                .op_count = step->op_count + sweep->op_count,
                                .lease_count = step->lease_count + sweep->lease_count,
                                .job_count = step->job_count + sweep->job_count,
                                .before_sweep = step->lease_count};
  program_out->spec.sweep = true;
  for (uint32_t k = 0; k < FLAP_CLASS_COUNT; k++)
    program_out->live_max[k] = step->live_max[k] > sweep->live_max[k] ? step->live_max[k] : sweep->live_max[k];
}
