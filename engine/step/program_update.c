/* When parts are updated: folded into the forward, by the host, or in the backward. */
#include "base/assert.h"
#include "engine/step/program_internal.h"

bool program_in_backward(const program_builder *b, uint32_t part) {
  return flap_layout_in_backward(b->layout, part);
}

bool program_pass_updates(const program_builder *b, uint32_t part) {
  return b->backward != PROGRAM_BACKWARD_FIRST && program_in_backward(b, part) && !flap_layout_is_host(b->layout, part);
}

bool program_folds(const program_builder *b, uint32_t part) {
  return !flap_layout_is_host(b->layout, part) && !program_in_backward(b, part);
}

static void update_slice(program_builder *b, uint32_t index, flap_operand weights) {
  const flap_layout_slice *slice = &b->layout->slices[index];
  const flap_operand states = program_pin(b, slice->states, FLAP_LEASE_UPDATE);
  const flap_operand gradient = program_pin(b, slice->gradient, FLAP_LEASE_CONSUME);
  OP(b, FLAP_OP_ADAMW, index, 0, weights, states, gradient, NONE, NONE, NONE);
  program_unpin(b, gradient);
  program_unpin(b, states);
}

/* AdamW on every slice of a part whose weights are pinned for update. */
static void update_part(program_builder *b, uint32_t part, flap_operand weights) {
  const flap_layout_part *p = program_part_of(b, part);
  flap_assert(program_folds(b, part));
  for (uint32_t i = p->first_slice; i < p->first_slice + p->slice_count; i++)
    update_slice(b, i, weights);
}

/* Hands the slices of a part over to the host. */
static void update_part_on_host(program_builder *b, uint32_t part) {
  const flap_layout *layout = b->layout;
  const flap_layout_part *p = program_part_of(b, part);
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
      operand[j] = program_add_lease(b, leases[j]);
    OP(b, FLAP_OP_HOST_ADAMW, i, 0, operand[0], operand[1], operand[2], NONE, NONE, NONE);
    b->program->job_count++;
  }
}

void program_update_on_host(program_builder *b) {
  for (uint32_t part = 0; part < b->layout->part_count; part++)
    if (flap_layout_is_host(b->layout, part) && !program_in_backward(b, part))
      update_part_on_host(b, part);
}

static uint32_t count_folded(const program_builder *b, uint32_t first_part, uint32_t part_count) {
  uint32_t slices = 0;
  for (uint32_t i = 0; i < part_count; i++)
    slices += program_folds(b, first_part + i) ? program_part_of(b, first_part + i)->slice_count : 0;
  return slices;
}

/* Whether the device changes the weights that it is about to lease for the forward: `update`: by the pending update; or
 * by this step's, where they stay for a backward behind which that happens. */
static flap_operand pin_part(program_builder *b, uint32_t part, bool update) {
  const flap_layout *layout = b->layout;
  const bool step = b->spec->kind == FLAP_PROGRAM_STEP;
  const bool stays = part == program_head_part(b) ||
                     (part > 0 && !program_weights_by_layer(b) &&
                      flap_layout_segment_of(layout, program_part_of(b, part)->layer) + 1 == layout->segment_count);
  const bool changes =
      program_folds(b, part) ? update : step && stays && b->last_group && program_pass_updates(b, part);
  return program_pin(b, program_part_of(b, part)->weights, changes ? FLAP_LEASE_UPDATE : FLAP_LEASE_READ);
}

/* The n-th of the slices that are updated on the device, from a part on. */
static uint32_t folded_slice(const program_builder *b, uint32_t part, uint32_t n) {
  for (;; part++) {
    const uint32_t count = program_folds(b, part) ? program_part_of(b, part)->slice_count : 0;
    if (n < count)
      return program_part_of(b, part)->first_slice + n;
    n -= count;
  }
}

/* Updates the first `until` of the next parts' slices, those that are done already excepted. */
static void next_update(program_builder *b, uint32_t until) {
  if (b->next_slices == 0)
    return;
  for (uint32_t i = 0; i < b->next_parts && !b->next_pinned; i++)
    b->next[i] = pin_part(b, b->next_part + i, true);
  b->next_pinned = true;
  for (; b->next_done < until; b->next_done++) {
    const uint32_t slice = folded_slice(b, b->next_part, b->next_done);
    update_slice(b, slice, b->next[b->layout->slices[slice].part - b->next_part]);
  }
}

flap_operand program_pin_weights(program_builder *b, uint32_t part, bool update) {
  const flap_operand weights = pin_part(b, part, update);
  if (update && program_folds(b, part))
    update_part(b, part, weights);
  return weights;
}

/* Rounds a part's finished gradient sums, slice by slice. */
static void store_part(program_builder *b, uint32_t part, flap_operand sums) {
  const flap_layout_part *p = program_part_of(b, part);
  for (uint32_t i = p->first_slice; i < p->first_slice + p->slice_count; i++) {
    const flap_operand gradient = program_pin(b, b->layout->slices[i].gradient, FLAP_LEASE_CREATE);
    OP(b, FLAP_OP_STORE_GRADIENT, i, 0, sums, gradient, NONE, NONE, NONE, NONE);
    program_unpin(b, gradient);
  }
}

/* Rounds a slice's finished gradient into the place where it is consumed. */
static flap_operand round_slice(program_builder *b, uint32_t index, flap_operand sums) {
  const flap_operand gradient = program_pin(b, b->layout->slices[index].gradient, FLAP_LEASE_SCRATCH);
  OP(b, FLAP_OP_STORE_GRADIENT, index, 0, sums, gradient, NONE, NONE, NONE, NONE);
  return gradient;
}

/* Of a slice whose sums are only looked at, for its norm. */
static void measure_slice(program_builder *b, uint32_t index, flap_operand sums) {
  OP(b, FLAP_OP_STORE_GRADIENT, index, 0, sums, NONE, NONE, NONE, NONE, NONE);
}

static void update_rounded(program_builder *b, uint32_t index, flap_operand weights, flap_operand states,
                           flap_operand gradient) {
  OP(b, FLAP_OP_ADAMW, index, 0, weights, states, gradient, NONE, NONE, NONE);
  program_unpin(b, gradient);
  program_unpin(b, states);
}

/* Updates a slice with its finished gradient: where its sums are, if these are that already. */
static void update_at_once(program_builder *b, uint32_t index, flap_operand sums, flap_operand weights) {
  const flap_layout_slice *slice = &b->layout->slices[index];
  const flap_operand states = program_pin(b, slice->states, FLAP_LEASE_UPDATE);
  if (slice->gradient != FLAP_REGION_NONE) {
    update_rounded(b, index, weights, states, round_slice(b, index, sums));
    return;
  }
  measure_slice(b, index, sums);
  OP(b, FLAP_OP_ADAMW, index, 0, weights, states, sums, NONE, NONE, NONE);
  program_unpin(b, states);
}

/* Updates the first `until` of the rounded slices, those that are done already excepted. */
static void rounded_update(program_builder *b, uint32_t until) {
  for (; b->rounded_done < until && !b->failed; b->rounded_done++) {
    const program_rounded *slice = &b->rounded[b->rounded_done];
    const flap_operand states = program_pin(b, b->layout->slices[slice->index].states, FLAP_LEASE_UPDATE);
    update_rounded(b, slice->index, slice->weights, states, slice->gradient);
    if (slice->last)
      program_unpin(b, slice->weights);
  }
}

void program_rounded_share(program_builder *b, uint32_t done, uint32_t count) {
  rounded_update(b, (uint32_t)((uint64_t)b->rounded_count * (done + 1) / count));
}

void program_rounded_begin(program_builder *b) {
  flap_assert(b->failed || b->rounded_done == b->rounded_count);
  b->rounded_count = b->rounded_done = 0;
}

/* For its norm; leaves nothing. */
static void measure_part(program_builder *b, uint32_t part, flap_operand sums, flap_operand weights) {
  const flap_layout_part *p = program_part_of(b, part);
  for (uint32_t i = p->first_slice; i < p->first_slice + p->slice_count; i++)
    measure_slice(b, i, sums);
  program_unpin(b, sums);
  if (weights != NONE)
    program_unpin(b, weights);
}

void program_finish_part(program_builder *b, uint32_t part, flap_operand sums, flap_operand weights) {
  if (b->backward == PROGRAM_BACKWARD_FIRST) {
    measure_part(b, part, sums, weights);
    return;
  }
  const flap_layout_part *p = program_part_of(b, part);
  const bool host = flap_layout_is_host(b->layout, part), updates = program_pass_updates(b, part);
  const bool later = updates && flap_layout_updates_later(b->layout, part);
  if (!updates)
    store_part(b, part, sums);
  for (uint32_t i = p->first_slice; updates && i < p->first_slice + p->slice_count; i++) {
    if (later) {
      flap_assert(b->rounded_count < b->layout->rounded_count);
      b->rounded[b->rounded_count++] = (program_rounded){.index = i,
                                                         .last = i + 1 == p->first_slice + p->slice_count,
                                                         .weights = weights,
                                                         .gradient = round_slice(b, i, sums)};
    } else {
      update_at_once(b, i, sums, weights);
    }
  }
  program_unpin(b, sums);
  if (weights != NONE && !later)
    program_unpin(b, weights);
  if (host && program_in_backward(b, part))
    update_part_on_host(b, part);
}

uint32_t program_segment_parts(const program_builder *b, uint32_t segment, uint32_t *first_part_out) {
  uint32_t first, end;
  flap_layout_segment(b->layout, segment, &first, &end);
  *first_part_out = flap_layout_layer_part(first);
  return end - first + (segment + 1 == b->layout->segment_count ? 1 : 0);
}

/* States stream through a ring that is much smaller than a layer's. Updated in one go, a layer waits for all of them;
 * spread over the forward before it, they stream while that computes. It takes a place in VRAM for the next weights as
 * well. */
void program_next_segment(program_builder *b, uint32_t segment) {
  b->next_parts = program_segment_parts(b, segment, &b->next_part);
  b->next_slices = count_folded(b, b->next_part, b->next_parts);
  b->next_done = 0;
  b->next_pinned = false;
}

void program_next_share(program_builder *b, uint32_t done, uint32_t count) {
  const uint32_t shares = count > 1 ? count - 1 : 1;
  if (done < shares)
    next_update(b, (uint32_t)((uint64_t)b->next_slices * (done + 1) / shares));
}

static uint32_t tail_parts(const program_builder *b, uint32_t *first_part_out) {
  return program_segment_parts(b, b->layout->segment_count - 1, first_part_out);
}

/* The tail is long, and has the head, whose states are as many as those of several layers: they pass the bus all along
 * the forward of the segments before it. Its weights pass once more. */
void program_ahead_begin(program_builder *b) {
  uint32_t first_part;
  const uint32_t count = tail_parts(b, &first_part);
  b->ahead_slices = count_folded(b, first_part, count);
  b->ahead_done = 0;
}

static void ahead_update(program_builder *b, uint32_t until) {
  uint32_t first_part;
  (void)tail_parts(b, &first_part);
  for (; b->ahead_done < until; b->ahead_done++) {
    const uint32_t slice = folded_slice(b, first_part, b->ahead_done), part = b->layout->slices[slice].part;
    const flap_layout_part *p = program_part_of(b, part);
    if (slice == p->first_slice)
      b->ahead = pin_part(b, part, true);
    update_slice(b, slice, b->ahead);
    if (slice + 1 == p->first_slice + p->slice_count)
      program_unpin(b, b->ahead);
  }
}

void program_ahead_share(program_builder *b, uint32_t segment, uint32_t done, uint32_t count) {
  const uint32_t before = b->layout->segment_count - 1, segments = before > 1 ? before - 1 : before;
  if (segment < segments)
    ahead_update(b, (uint32_t)((uint64_t)b->ahead_slices * (segment * count + done + 1) / (segments * count)));
}
