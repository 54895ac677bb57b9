#include "engine/step/program.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdlib.h>
#include <string.h>

/* `last`: of its part, whose weights have been of use then. */
typedef struct rounded_slice {
  uint32_t index;
  bool last;
  flap_operand weights, gradient;
} rounded_slice;

/* A program under construction. The first failure to get memory sticks; after it nothing is appended. */
typedef struct builder {
  const flap_layout *layout;
  const flap_program_spec *spec;
  const bool *resident;
  flap_program *program;
  uint32_t live[FLAP_CLASS_COUNT];
  bool failed;
  /* Leases of the segment in work, per layer of it; saved: NONE where nothing is kept. */
  flap_operand *weights, *sums, *saved;
  bool keeps_whole; /* a layer that saves keeps every tensor */
  /* Leases of the next segment's weights, and of the head's with the last one's, which are being updated meanwhile. */
  flap_operand *next;
  uint32_t next_part, next_parts, next_slices, next_done;
  bool next_pinned;
  /* Slices whose gradient is rounded and whose update is spread over the backward of the segment behind them, in
   * order: at most as many as there are places for rounded gradients. */
  struct rounded_slice *rounded;
  uint32_t rounded_count, rounded_done;
  bool last_group; /* of micro-batches, in work */
  uint32_t hidden_buffers;
} builder;

const char *flap_program_op_name(flap_op_kind kind) {
  static const char *const names[] = {"pin",      "unpin",      "embed",  "forward",    "recompute", "head",
                                      "backward", "embed back", "zero",   "store grad", "adamw",     "host adamw",
                                      "losses",   "norm",       "decode", "logits"};
  _Static_assert(sizeof names / sizeof *names == FLAP_OP_KIND_COUNT, "a name per kind");
  flap_assert(kind < FLAP_OP_KIND_COUNT);
  return names[kind];
}

/* Every layer has a place for what it keeps, and for its input. */
static bool saves_all(const flap_layout *layout) {
  return layout->spec.mode == FLAP_MODE_TRAIN && flap_layout_saves_all(&layout->spec);
}

/* What a layer that saves does not keep. */
static uint64_t missing_bytes(const flap_layout *layout) {
  return flap_model_scratch_bytes(layout->spec.model, &layout->spec.shape, layout->spec.saved_mask);
}

uint32_t flap_program_hidden_buffers(const flap_layout *layout) {
  const uint32_t k = layout->spec.segment_layers;
  if (layout->spec.mode == FLAP_MODE_SAMPLE)
    return 1;
  if (saves_all(layout))
    return 0;
  return k == 1 ? 0 : k == 2 ? 1 : k - 1 > 2 ? k - 1 : 2;
}

uint32_t flap_program_scratch_buffers(const flap_layout *layout) {
  if (saves_all(layout))
    return missing_bytes(layout) > 0 ? 1 : 0;
  return layout->spec.mode == FLAP_MODE_TRAIN ? layout->spec.segment_layers : 1;
}

uint64_t flap_program_scratch_bytes(const flap_layout *layout) {
  return saves_all(layout) ? missing_bytes(layout)
                           : flap_model_scratch_bytes(layout->spec.model, &layout->spec.shape, 0);
}

/* ---- appending ------------------------------------------------------------------------------------------- */

static bool grow(void **list, uint32_t *max, uint32_t count, size_t element_bytes) {
  if (count < *max)
    return true;
  const uint32_t larger = *max == 0 ? 256 : *max * 2;
  void *memory = realloc(*list, (size_t)larger * element_bytes);
  if (memory == NULL)
    return false;
  *list = memory;
  *max = larger;
  return true;
}

static void append(builder *b, flap_op op) {
  flap_program *p = b->program;
  if (b->failed || !grow((void **)&p->ops, &p->ops_max, p->op_count, sizeof *p->ops)) {
    b->failed = true;
    return;
  }
  p->ops[p->op_count++] = op;
}

#define NO_OPERANDS \
  { FLAP_OPERAND_NONE, FLAP_OPERAND_NONE, FLAP_OPERAND_NONE, FLAP_OPERAND_NONE, FLAP_OPERAND_NONE, FLAP_OPERAND_NONE }

static bool streams(const builder *b, uint32_t region) {
  return b->resident == NULL || !b->resident[region];
}

static flap_operand add_lease(builder *b, flap_lease lease) {
  flap_program *p = b->program;
  flap_assert(lease.region < b->layout->region_count);
  if (b->failed || !grow((void **)&p->leases, &p->leases_max, p->lease_count, sizeof *p->leases)) {
    b->failed = true;
    return FLAP_OPERAND_NONE;
  }
  p->leases[p->lease_count] = lease;
  return p->lease_count++;
}

static flap_operand pin(builder *b, uint32_t region, flap_lease_mode mode) {
  flap_program *p = b->program;
  const flap_operand lease = add_lease(b, (flap_lease){.region = region, .mode = mode});
  if (b->failed)
    return FLAP_OPERAND_NONE;
  append(b, (flap_op){.kind = FLAP_OP_PIN, .operand = {lease}});
  if (streams(b, region)) {
    const flap_region_class klass = b->layout->regions[region].klass;
    if (++b->live[klass] > p->live_max[klass])
      p->live_max[klass] = b->live[klass];
  }
  return lease;
}

static void unpin(builder *b, flap_operand lease) {
  if (b->failed)
    return;
  flap_assert(lease < b->program->lease_count);
  append(b, (flap_op){.kind = FLAP_OP_UNPIN, .operand = {lease}});
  const uint32_t region = b->program->leases[lease].region;
  if (streams(b, region))
    b->live[b->layout->regions[region].klass]--;
}

static void op(builder *b, flap_op_kind kind, uint32_t index, uint32_t micro_batch,
               const flap_operand operand[FLAP_OP_OPERANDS]) {
  flap_op new_op = {.kind = (uint8_t)kind, .index = index, .micro_batch = micro_batch};
  memcpy(new_op.operand, operand, sizeof new_op.operand);
  append(b, new_op);
}

#define OP(b, kind, index, micro_batch, ...) \
  op((b), (kind), (index), (micro_batch), (const flap_operand[FLAP_OP_OPERANDS]){__VA_ARGS__})
#define NONE FLAP_OPERAND_NONE

static flap_operand buffer(uint32_t index) {
  return FLAP_OPERAND_BUFFER | index;
}

/* Scratch is numbered behind the hidden-state buffers. */
static flap_operand scratch_buffer(const builder *b, uint32_t index) {
  return buffer(b->hidden_buffers + index);
}

/* ---- pieces of a step ------------------------------------------------------------------------------------ */

static const flap_layout_part *part_of(const builder *b, uint32_t part) {
  return &b->layout->parts[part];
}
static uint32_t head_part(const builder *b) {
  return b->layout->part_count - 1;
}

static bool in_backward(const builder *b, uint32_t part) {
  return flap_layout_in_backward(b->layout, part);
}

/* On the device, in the forward of the next step. */
static bool folds(const builder *b, uint32_t part) {
  return !flap_layout_is_host(b->layout, part) && !in_backward(b, part);
}

static void update_slice(builder *b, uint32_t index, flap_operand weights) {
  const flap_layout_slice *slice = &b->layout->slices[index];
  const flap_operand states = pin(b, slice->states, FLAP_LEASE_UPDATE);
  const flap_operand gradient = pin(b, slice->gradient, FLAP_LEASE_CONSUME);
  OP(b, FLAP_OP_ADAMW, index, 0, weights, states, gradient, NONE, NONE, NONE);
  unpin(b, gradient);
  unpin(b, states);
}

/* AdamW on every slice of a part whose weights are pinned for update. */
static void update_part(builder *b, uint32_t part, flap_operand weights) {
  const flap_layout_part *p = part_of(b, part);
  flap_assert(folds(b, part));
  for (uint32_t i = p->first_slice; i < p->first_slice + p->slice_count; i++)
    update_slice(b, i, weights);
}

/* Hands the slices of a part over to the host. */
static void update_part_on_host(builder *b, uint32_t part) {
  const flap_layout *layout = b->layout;
  const flap_layout_part *p = part_of(b, part);
  const flap_state_format *format = &layout->state_formats[p->kind];
  for (uint32_t i = p->first_slice; i < p->first_slice + p->slice_count; i++) {
    const flap_layout_slice *slice = &layout->slices[i];
    const flap_lease leases[] = {{.region = slice->states,
                                  .mode = FLAP_LEASE_UPDATE,
                                  .host_bytes = flap_layout_state_bytes(format, slice->elements)},
                                 {.region = slice->gradient,
                                  .mode = FLAP_LEASE_CONSUME,
                                  .host_bytes = slice->elements * flap_dtype_bytes(layout->spec.gradient_dtype)},
                                 {.region = p->weights,
                                  .mode = FLAP_LEASE_UPDATE,
                                  .host_bytes = slice->elements * flap_dtype_bytes(layout->spec.shape.dtype)}};
    flap_operand operand[3];
    for (int j = 0; j < 3; j++)
      operand[j] = add_lease(b, leases[j]);
    OP(b, FLAP_OP_HOST_ADAMW, i, 0, operand[0], operand[1], operand[2], NONE, NONE, NONE);
    b->program->job_count++;
  }
}

/* Of every part that the host updates, but for those of the backward, in the order of the forward: it works along that
 * list while the device computes, and what reads the weights waits for it. */
static void update_on_host(builder *b) {
  for (uint32_t part = 0; part < b->layout->part_count; part++)
    if (flap_layout_is_host(b->layout, part) && !in_backward(b, part))
      update_part_on_host(b, part);
}

/* States stream through a ring that is much smaller than a layer's. Updated in one go, a layer waits for all of them;
 * spread over the forward before it, they stream while that computes. It takes a place in VRAM for the next weights as
 * well. */
static void next_begin(builder *b, uint32_t first_part, uint32_t part_count) {
  b->next_part = first_part;
  b->next_parts = part_count;
  b->next_slices = b->next_done = 0;
  b->next_pinned = false;
  for (uint32_t i = 0; i < part_count; i++)
    b->next_slices += folds(b, first_part + i) ? part_of(b, first_part + i)->slice_count : 0;
}

/* Whether the device changes the weights that it is about to lease for the forward: `update`: by the pending update; or
 * by this step's, where they stay for a backward behind which that happens. */
static flap_operand pin_part(builder *b, uint32_t part, bool update) {
  const flap_layout *layout = b->layout;
  const bool step = b->spec->kind == FLAP_PROGRAM_STEP;
  const bool stays = part == head_part(b) ||
                     (part > 0 && part_of(b, part)->layer / layout->spec.segment_layers + 1 == layout->segment_count);
  const bool changes = folds(b, part) ? update : step && stays && b->last_group && !flap_layout_is_host(layout, part);
  return pin(b, part_of(b, part)->weights, changes ? FLAP_LEASE_UPDATE : FLAP_LEASE_READ);
}

/* The n-th of the next parts' slices that are updated on the device. */
static uint32_t next_slice(const builder *b, uint32_t n) {
  uint32_t part = b->next_part;
  for (;; part++) {
    const uint32_t count = folds(b, part) ? part_of(b, part)->slice_count : 0;
    if (n < count)
      return part_of(b, part)->first_slice + n;
    n -= count;
  }
}

/* Updates the first `until` of the next parts' slices, those that are done already excepted. */
static void next_update(builder *b, uint32_t until) {
  if (b->next_slices == 0)
    return;
  for (uint32_t i = 0; i < b->next_parts && !b->next_pinned; i++)
    b->next[i] = pin_part(b, b->next_part + i, true);
  b->next_pinned = true;
  for (; b->next_done < until; b->next_done++) {
    const uint32_t slice = next_slice(b, b->next_done);
    update_slice(b, slice, b->next[b->layout->slices[slice].part - b->next_part]);
  }
}

/* A part's weights; with the pending update applied if this is the place for it. */
static flap_operand pin_weights(builder *b, uint32_t part, bool update) {
  const flap_operand weights = pin_part(b, part, update);
  if (update && folds(b, part))
    update_part(b, part, weights);
  return weights;
}

/* Rounds a part's finished gradient sums, slice by slice. */
static void store_part(builder *b, uint32_t part, flap_operand sums) {
  const flap_layout_part *p = part_of(b, part);
  for (uint32_t i = p->first_slice; i < p->first_slice + p->slice_count; i++) {
    const flap_operand gradient = pin(b, b->layout->slices[i].gradient, FLAP_LEASE_CREATE);
    OP(b, FLAP_OP_STORE_GRADIENT, i, 0, sums, gradient, NONE, NONE, NONE, NONE);
    unpin(b, gradient);
  }
}

/* Rounds a slice's finished gradient where it is consumed. */
static flap_operand round_slice(builder *b, uint32_t index, flap_operand sums) {
  const flap_operand gradient = pin(b, b->layout->slices[index].gradient, FLAP_LEASE_SCRATCH);
  OP(b, FLAP_OP_STORE_GRADIENT, index, 0, sums, gradient, NONE, NONE, NONE, NONE);
  return gradient;
}

static void update_rounded(builder *b, uint32_t index, flap_operand weights, flap_operand states,
                           flap_operand gradient) {
  OP(b, FLAP_OP_ADAMW, index, 0, weights, states, gradient, NONE, NONE, NONE);
  unpin(b, gradient);
  unpin(b, states);
}

/* Updates the first `until` of the rounded slices, those that are done already excepted. */
static void rounded_update(builder *b, uint32_t until) {
  for (; b->rounded_done < until && !b->failed; b->rounded_done++) {
    const rounded_slice *slice = &b->rounded[b->rounded_done];
    const flap_operand states = pin(b, b->layout->slices[slice->index].states, FLAP_LEASE_UPDATE);
    update_rounded(b, slice->index, slice->weights, states, slice->gradient);
    if (slice->last)
      unpin(b, slice->weights);
  }
}

/* After micro-batch `done` (from 0) of `count`: an equal share after each. */
static void rounded_share(builder *b, uint32_t done, uint32_t count) {
  rounded_update(b, (uint32_t)((uint64_t)b->rounded_count * (done + 1) / count));
}

/* Of those before none are left. */
static void rounded_begin(builder *b) {
  flap_assert(b->failed || b->rounded_done == b->rounded_count);
  b->rounded_count = b->rounded_done = 0;
}

/* A part's gradient is complete: it goes home, or is consumed by the update. Sums and weights have been of use, but for
 * the weights of slices that are only rounded here. */
static void finish_part(builder *b, uint32_t part, flap_operand sums, flap_operand weights) {
  const flap_layout_part *p = part_of(b, part);
  const bool host = flap_layout_is_host(b->layout, part), updates = in_backward(b, part) && !host;
  const bool later = updates && b->layout->spec.spread && part > 0; /* behind the embedding there is no segment */
  if (!updates)
    store_part(b, part, sums);
  for (uint32_t i = p->first_slice; updates && i < p->first_slice + p->slice_count; i++) {
    if (later) {
      flap_assert(b->rounded_count < b->layout->rounded_count);
      b->rounded[b->rounded_count++] = (rounded_slice){.index = i,
                                                       .last = i + 1 == p->first_slice + p->slice_count,
                                                       .weights = weights,
                                                       .gradient = round_slice(b, i, sums)};
    } else {
      const flap_operand states = pin(b, b->layout->slices[i].states, FLAP_LEASE_UPDATE);
      update_rounded(b, i, weights, states, round_slice(b, i, sums));
    }
  }
  unpin(b, sums);
  if (weights != NONE && !later)
    unpin(b, weights);
  if (host && in_backward(b, part))
    update_part_on_host(b, part);
}

/* A part's sums for one group: the first group's first micro-batch writes them, they travel in fp32 between groups, and
 * end with the last. `outlives`: they are needed again after this group's last use here (the tied embedding). */
static flap_operand pin_sums(builder *b, uint32_t part, bool first_group, bool last_group, bool outlives) {
  const bool keeps = !last_group || outlives;
  const flap_lease_mode mode =
      first_group ? (keeps ? FLAP_LEASE_CREATE : FLAP_LEASE_SCRATCH) : (keeps ? FLAP_LEASE_UPDATE : FLAP_LEASE_CONSUME);
  return pin(b, part_of(b, part)->sums, mode);
}

/* The operation appended last begins the sums if this is their first micro-batch. */
static void mark_fresh(builder *b, bool fresh) {
  if (!b->failed)
    b->program->ops[b->program->op_count - 1].fresh = fresh;
}

/* The input of a segment's layer j > 0 for the micro-batch in work. */
static flap_operand inner_input(const builder *b, uint32_t j, bool backward) {
  if (b->saved[j] != NONE)
    return b->saved[j] | FLAP_OPERAND_INPUT;
  /* Forward only passes on; backward needs every layer's input again. */
  return buffer(backward ? j - 1 : (j - 1) % 2);
}

/* Where the saved tensors of the segment's layer j go that are not kept. A segment that keeps nothing is computed again
 * as a whole, from its input; a layer that has its own input, right before its backward. */
static flap_operand scratch(const builder *b, uint32_t j, bool backward) {
  if (b->saved[j] == NONE)
    return scratch_buffer(b, backward ? j : 0);
  return b->keeps_whole ? NONE : scratch_buffer(b, 0);
}

typedef struct micro_batch_range {
  uint32_t first, end; /* of the group */
  bool first_group, last_group;
} micro_batch_range;

static void recompute(builder *b, uint32_t layer, uint32_t j, uint32_t micro_batch, flap_operand x_in) {
  OP(b, FLAP_OP_LAYER_RECOMPUTE, layer, micro_batch, b->weights[j], x_in, b->saved[j], NONE, scratch(b, j, true), NONE);
}

/* Runs a segment's layers forward for one micro-batch; x_out NONE: only what their backward needs. */
static void forward_layers(builder *b, uint32_t segment, uint32_t micro_batch, flap_operand x_in, flap_operand x_out,
                           bool backward) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t layer = first; layer < end; layer++) {
    const uint32_t j = layer - first;
    const flap_operand in = j == 0 ? x_in : inner_input(b, j, backward);
    const flap_operand out = layer + 1 == end ? x_out : inner_input(b, j + 1, backward);
    if (out == NONE)
      recompute(b, layer, j, micro_batch, in);
    else
      OP(b, FLAP_OP_LAYER_FORWARD, layer, micro_batch, b->weights[j], in, b->saved[j], out, scratch(b, j, backward),
         NONE);
  }
}

/* An evaluation passes through the same places, and leaves nothing in them. */
static void pin_saved(builder *b, uint32_t segment, uint32_t micro_batch, flap_lease_mode mode) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  if (b->spec->kind != FLAP_PROGRAM_STEP)
    mode = FLAP_LEASE_SCRATCH;
  for (uint32_t layer = first; layer < end; layer++) {
    const uint32_t region = flap_layout_saved(b->layout, layer, micro_batch);
    b->saved[layer - first] = region == FLAP_REGION_NONE ? NONE : pin(b, region, mode);
  }
}

static void unpin_saved(builder *b, uint32_t segment) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t j = 0; j < end - first; j++)
    if (b->saved[j] != NONE)
      unpin(b, b->saved[j]);
}

/* A segment's parts, one behind the other: its layers, and with the last segment the head. */
static uint32_t segment_parts(const builder *b, uint32_t segment, uint32_t *first_part_out) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  *first_part_out = flap_layout_layer_part(first);
  return end - first + (segment + 1 == b->layout->segment_count ? 1 : 0);
}

static void next_segment(builder *b, uint32_t segment) {
  uint32_t first_part;
  const uint32_t count = segment_parts(b, segment, &first_part);
  next_begin(b, first_part, count);
}

/* After micro-batch `done` (from 0) of `count`: an equal share after each but the last, behind which the next segment
 * follows at once. The weights are leased after the first, by when those of the segment before have left. */
static void next_share(builder *b, uint32_t done, uint32_t count) {
  const uint32_t shares = count > 1 ? count - 1 : 1;
  if (done < shares)
    next_update(b, (uint32_t)((uint64_t)b->next_slices * (done + 1) / shares));
}

static void pin_segment(builder *b, uint32_t segment, bool update) {
  uint32_t first_part;
  const uint32_t count = segment_parts(b, segment, &first_part);
  for (uint32_t j = 0; j < count; j++)
    b->weights[j] = b->next_pinned ? b->next[j] : pin_weights(b, first_part + j, update);
  b->next_pinned = false;
}

/* Forward of a segment but the last for the micro-batches of a group. Weights stay pinned from a layer's first use to
 * its last. */
static void forward_segment(builder *b, uint32_t segment, micro_batch_range range, bool update) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  pin_segment(b, segment, update);
  if (update && b->spec->spread)
    next_segment(b, segment + 1);
  const flap_lease_mode input = b->spec->kind == FLAP_PROGRAM_STEP ? FLAP_LEASE_READ : FLAP_LEASE_CONSUME;
  for (uint32_t i = range.first; i < range.end; i++) {
    /* Where activations are saved from the segment's first layer on, its backward still starts from this input. */
    const flap_operand x_in = pin(b, flap_layout_boundary(b->layout, segment, i), input);
    const flap_operand x_out = pin(b, flap_layout_boundary(b->layout, segment + 1, i), FLAP_LEASE_CREATE);
    pin_saved(b, segment, i, FLAP_LEASE_CREATE);
    forward_layers(b, segment, i, x_in, x_out, false);
    unpin_saved(b, segment);
    unpin(b, x_out);
    unpin(b, x_in);
    if (update && b->spec->spread)
      next_share(b, i - range.first, range.end - range.first);
  }
  for (uint32_t j = 0; j < end - first; j++)
    unpin(b, b->weights[j]);
}

static void embed(builder *b, micro_batch_range range, bool update) {
  const flap_operand embedding = pin_weights(b, 0, update);
  for (uint32_t i = range.first; i < range.end; i++) {
    const flap_operand x = pin(b, flap_layout_boundary(b->layout, 0, i), FLAP_LEASE_CREATE);
    OP(b, FLAP_OP_EMBED, 0, i, embedding, x, NONE, NONE, NONE, NONE);
    unpin(b, x);
  }
  unpin(b, embedding);
}

/* `fresh`: the scratch memory holds what the segment's last layer left there in the forward. */
static void backward_layers(builder *b, uint32_t segment, uint32_t micro_batch, flap_operand x_in, flap_operand dx,
                            bool first_sums, bool fresh) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t layer = end; layer-- > first;) {
    const uint32_t j = layer - first;
    const flap_operand in = j == 0 ? x_in : inner_input(b, j, true);
    if (b->saved[j] != NONE && !b->keeps_whole && !(fresh && layer + 1 == end))
      recompute(b, layer, j, micro_batch, in);
    OP(b, FLAP_OP_LAYER_BACKWARD, layer, micro_batch, b->weights[j], in, b->saved[j], dx, scratch(b, j, true),
       b->sums[j]);
    mark_fresh(b, first_sums);
  }
}

/* The layers of a segment have been of use; `finishes`: and their gradients are complete. */
static void leave_layers(builder *b, uint32_t first, uint32_t end, bool finishes) {
  for (uint32_t layer = end; layer-- > first;) {
    const uint32_t j = layer - first;
    if (finishes) {
      finish_part(b, flap_layout_layer_part(layer), b->sums[j], b->weights[j]);
      continue;
    }
    if (b->spec->kind == FLAP_PROGRAM_STEP)
      unpin(b, b->sums[j]);
    unpin(b, b->weights[j]);
  }
}

/* What the tail leases beside its segment: the head's sums and the projection, with its sums where it is the embedding.
 */
typedef struct tail_leases {
  flap_operand head, projection, sums, projection_sums;
} tail_leases;

static void pin_tail(builder *b, micro_batch_range range, uint32_t first, uint32_t end, tail_leases *t) {
  const bool tied = b->layout->tied;
  t->head = b->weights[end - first];
  t->projection = tied ? pin(b, part_of(b, 0)->weights, FLAP_LEASE_READ) : t->head;
  t->sums = t->projection_sums = NONE;
  if (b->spec->kind != FLAP_PROGRAM_STEP)
    return;
  for (uint32_t layer = first; layer < end; layer++)
    b->sums[layer - first] = pin_sums(b, flap_layout_layer_part(layer), range.first_group, range.last_group, false);
  t->sums = pin_sums(b, head_part(b), range.first_group, range.last_group, false);
  t->projection_sums = tied ? pin_sums(b, 0, range.first_group, range.last_group, true) : t->sums;
}

/* The tail's parts have been of use; with the last group their gradients are complete. */
static void finish_tail(builder *b, micro_batch_range range, uint32_t first, uint32_t end, const tail_leases *t) {
  const bool step = b->spec->kind == FLAP_PROGRAM_STEP, finishes = step && range.last_group;
  if (b->layout->tied && step)
    unpin(b, t->projection_sums);
  if (b->layout->tied)
    unpin(b, t->projection);
  if (finishes) {
    if (b->layout->spec.backward_parts > 0)
      OP(b, FLAP_OP_LOSSES, 0, 0, NONE, NONE, NONE, NONE, NONE, NONE);
    rounded_begin(b);
    finish_part(b, head_part(b), t->sums, t->head);
  } else {
    if (step)
      unpin(b, t->sums);
    unpin(b, t->head);
  }
  leave_layers(b, first, end, finishes);
}

/* The last segment, final norm, logits and loss; in a step also their backward. Each micro-batch goes there and back at
 * once: nothing of it is stored, and nothing computed again. */
static void tail(builder *b, micro_batch_range range, bool update) {
  const uint32_t segment = b->layout->segment_count - 1;
  const bool step = b->spec->kind == FLAP_PROGRAM_STEP;
  uint32_t first, end;
  tail_leases t;
  flap_layout_segment(b->layout, segment, &first, &end);
  pin_segment(b, segment, update);
  pin_tail(b, range, first, end, &t);
  for (uint32_t i = range.first; i < range.end; i++) {
    const bool fresh = range.first_group && i == range.first;
    const flap_operand x_in = pin(b, flap_layout_boundary(b->layout, segment, i), FLAP_LEASE_CONSUME);
    const flap_operand x_out = pin(b, flap_layout_boundary(b->layout, segment + 1, i), FLAP_LEASE_SCRATCH);
    pin_saved(b, segment, i, FLAP_LEASE_SCRATCH);
    forward_layers(b, segment, i, x_in, x_out, step);
    const flap_operand dx = step ? pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_CREATE) : NONE;
    OP(b, FLAP_OP_HEAD, 0, i, t.head, t.projection, x_out, dx, t.sums, t.projection_sums);
    mark_fresh(b, fresh);
    unpin(b, x_out);
    if (step)
      backward_layers(b, segment, i, x_in, dx, fresh, true);
    unpin_saved(b, segment);
    if (step)
      unpin(b, dx);
    unpin(b, x_in);
  }
  finish_tail(b, range, first, end, &t);
}

/* Backward of a segment but the last, micro-batch by micro-batch. */
static void backward_segment(builder *b, uint32_t segment, micro_batch_range range) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  for (uint32_t layer = first; layer < end; layer++) {
    const uint32_t part = flap_layout_layer_part(layer);
    const bool updates = range.last_group && in_backward(b, part) && !flap_layout_is_host(b->layout, part);
    b->weights[layer - first] = pin(b, part_of(b, part)->weights, updates ? FLAP_LEASE_UPDATE : FLAP_LEASE_READ);
    b->sums[layer - first] = pin_sums(b, part, range.first_group, range.last_group, false);
  }
  for (uint32_t i = range.first; i < range.end; i++) {
    const flap_operand dx = pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_UPDATE);
    const flap_operand x_in = pin(b, flap_layout_boundary(b->layout, segment, i), FLAP_LEASE_CONSUME);
    pin_saved(b, segment, i, FLAP_LEASE_CONSUME);
    if (b->saved[0] == NONE) /* segments save as a whole */
      forward_layers(b, segment, i, x_in, NONE, true);
    backward_layers(b, segment, i, x_in, dx, range.first_group && i == range.first, false);
    unpin_saved(b, segment);
    unpin(b, x_in);
    unpin(b, dx);
    rounded_share(b, i - range.first, range.end - range.first);
  }
  rounded_begin(b);
  leave_layers(b, first, end, range.last_group);
}

/* The embedding's gradient: what the head left of it if tied, then the rows of every micro-batch, in their order. */
static void embed_backward(builder *b) {
  const flap_operand sums = pin(b, part_of(b, 0)->sums, b->layout->tied ? FLAP_LEASE_CONSUME : FLAP_LEASE_SCRATCH);
  if (!b->layout->tied)
    OP(b, FLAP_OP_ZERO, 0, 0, sums, NONE, NONE, NONE, NONE, NONE);
  for (uint32_t i = 0; i < b->layout->spec.micro_batches; i++) {
    const flap_operand dx = pin(b, flap_layout_hidden_gradient(b->layout, i), FLAP_LEASE_CONSUME);
    OP(b, FLAP_OP_EMBED_BACKWARD, 0, i, dx, sums, NONE, NONE, NONE, NONE);
    unpin(b, dx);
    rounded_share(b, i, b->layout->spec.micro_batches);
  }
  const bool updates = in_backward(b, 0) && !flap_layout_is_host(b->layout, 0);
  finish_part(b, 0, sums, updates ? pin(b, part_of(b, 0)->weights, FLAP_LEASE_UPDATE) : NONE);
}

static void sweep(builder *b) {
  update_on_host(b);
  for (uint32_t part = 0; part < b->layout->part_count; part++)
    if (folds(b, part))
      unpin(b, pin_weights(b, part, true));
}

/* ---- whole programs -------------------------------------------------------------------------------------- */

static void build_step(builder *b) {
  const flap_layout *layout = b->layout;
  const uint32_t n = layout->spec.micro_batches, group = layout->spec.group_micro_batches;
  const uint32_t last = layout->segment_count - 1;
  if (b->spec->pending)
    update_on_host(b);
  for (uint32_t first = 0; first < n; first += group) {
    micro_batch_range range = {.first = first, .end = first + group < n ? first + group : n};
    range.first_group = first == 0;
    range.last_group = b->last_group = range.end == n;
    const bool update = b->spec->pending && range.first_group;
    embed(b, range, update);
    for (uint32_t segment = 0; segment < last; segment++)
      forward_segment(b, segment, range, update);
    tail(b, range, update);
    for (uint32_t segment = last; segment-- > 0;)
      backward_segment(b, segment, range);
  }
  embed_backward(b);
  OP(b, FLAP_OP_NORM, 0, 0, NONE, NONE, NONE, NONE, NONE, NONE);
  b->program->before_sweep = b->program->lease_count;
  if (b->spec->sweep)
    sweep(b);
}

static void build_forward(builder *b) {
  const uint32_t n = b->layout->spec.micro_batches, group = b->layout->spec.group_micro_batches;
  for (uint32_t first = 0; first < n; first += group) {
    const micro_batch_range range = {.first = first, .end = first + group < n ? first + group : n};
    embed(b, range, false);
    for (uint32_t segment = 0; segment + 1 < b->layout->segment_count; segment++)
      forward_segment(b, segment, range, false);
    tail(b, range, false);
  }
}

/* New tokens through every layer, with the keys and values of the earlier ones. */
static void build_decode(builder *b) {
  const uint32_t layers = b->layout->spec.model->num_hidden_layers;
  const flap_operand x = buffer(0);
  flap_operand embedding = pin_weights(b, 0, false);
  OP(b, FLAP_OP_EMBED, 0, 0, embedding, x, NONE, NONE, NONE, NONE);
  unpin(b, embedding);
  for (uint32_t layer = 0; layer < layers; layer++) {
    const flap_operand weights = pin_weights(b, flap_layout_layer_part(layer), false);
    const flap_operand cache = pin(b, flap_layout_cache(b->layout, layer), FLAP_LEASE_UPDATE);
    OP(b, FLAP_OP_LAYER_DECODE, layer, 0, weights, x, cache, scratch_buffer(b, 0), NONE, NONE);
    unpin(b, cache);
    unpin(b, weights);
  }
  const flap_operand weights = pin_weights(b, head_part(b), false);
  const flap_operand projection = b->layout->tied ? pin_weights(b, 0, false) : weights;
  OP(b, FLAP_OP_LOGITS, 0, 0, weights, projection, x, NONE, NONE, NONE);
  if (b->layout->tied)
    unpin(b, projection);
  unpin(b, weights);
}

flap_status flap_program_build(const flap_layout *layout, const flap_program_spec *spec, const bool *resident,
                               flap_program *program_out) {
  const uint32_t k = layout->spec.segment_layers;
  *program_out = (flap_program){.spec = *spec};
  builder b = {.layout = layout,
               .spec = spec,
               .resident = resident,
               .program = program_out,
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

void flap_program_place(flap_program *program, flap_arena *arena) {
  flap_assert(program->ops_max > 0);
  const uint64_t op_bytes = (uint64_t)program->op_count * sizeof(flap_op);
  const uint64_t lease_bytes = (uint64_t)program->lease_count * sizeof(flap_lease);
  flap_op *ops = flap_arena_take(arena, flap_units_round_up(op_bytes, 64), 64);
  flap_lease *leases = flap_arena_take(arena, flap_units_round_up(lease_bytes, 64), 64);
  if (flap_arena_is_measuring(arena))
    return;
  memcpy(ops, program->ops, op_bytes);
  memcpy(leases, program->leases, lease_bytes);
  flap_program_close(program);
  program->ops = ops;
  program->leases = leases;
}

void flap_program_close(flap_program *program) {
  if (program->ops_max > 0)
    free(program->ops);
  if (program->leases_max > 0)
    free(program->leases);
  program->ops = NULL;
  program->leases = NULL;
  program->ops_max = program->leases_max = 0;
}
