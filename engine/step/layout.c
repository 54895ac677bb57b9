#include "engine/step/layout.h"

#include "base/assert.h"
#include "base/units.h"

bool flap_layout_has_codes(flap_optim optim, flap_part part) {
  return optim == FLAP_OPTIM_ADAMW_8BIT && part != FLAP_PART_EMBEDDING;
}

flap_state_format flap_layout_state_format(flap_dtype weight_dtype, flap_optim optim, flap_part part) {
  const bool codes = flap_layout_has_codes(optim, part);
  const uint64_t master_bytes = weight_dtype == FLAP_BF16 ? 2 : weight_dtype == FLAP_F16 ? 4 : 0;
  const uint64_t moment_bytes = codes ? 1 : 4, largest_bytes = codes ? 4 : 0;
  return (flap_state_format){.sections = {[FLAP_STATE_MASTER] = {master_bytes, 1},
                                          [FLAP_STATE_MOMENT1] = {moment_bytes, 1},
                                          [FLAP_STATE_MOMENT2] = {moment_bytes, 1},
                                          [FLAP_STATE_LARGEST1] = {largest_bytes, FLAP_OPS_MOMENT_BLOCK},
                                          [FLAP_STATE_LARGEST2] = {largest_bytes, FLAP_OPS_MOMENT_BLOCK}}};
}

uint64_t flap_layout_state_offset(const flap_state_format *format, flap_state_section section, uint64_t elements) {
  uint64_t offset = 0;
  flap_assert(elements % FLAP_OPS_BLOCK == 0);
  for (int i = 0; i < (int)section; i++)
    offset += elements / format->sections[i].value_elements * format->sections[i].value_bytes;
  return offset;
}

uint64_t flap_layout_state_bytes(const flap_state_format *format, uint64_t elements) {
  return flap_layout_state_offset(format, FLAP_STATE_SECTION_COUNT, elements);
}

void flap_layout_segment(const flap_layout *layout, uint32_t segment, uint32_t *first_out, uint32_t *end_out) {
  const uint32_t layers = layout->spec.model->num_hidden_layers;
  const uint32_t k = layout->spec.segment_layers;
  flap_assert(segment < layout->segment_count);
  *first_out = segment * k;
  *end_out = segment + 1 < layout->segment_count ? (segment + 1) * k : layers;
}

uint32_t flap_layout_least_tail(uint32_t layers, uint32_t segment_layers) {
  return (layers - 1) % segment_layers + 1;
}

uint32_t flap_layout_tail_layer(const flap_layout_spec *spec) {
  return spec->model->num_hidden_layers - spec->tail_layers;
}

uint32_t flap_layout_longest_segment(const flap_layout_spec *spec) {
  const bool others = flap_layout_tail_layer(spec) > 0;
  return others && spec->segment_layers > spec->tail_layers ? spec->segment_layers : spec->tail_layers;
}

uint32_t flap_layout_segment_of(const flap_layout *layout, uint32_t layer) {
  const uint32_t segment = layer / layout->spec.segment_layers;
  return segment < layout->segment_count ? segment : layout->segment_count - 1;
}

uint32_t flap_layout_boundary(const flap_layout *layout, uint32_t segment, uint32_t micro_batch) {
  flap_assert(segment <= layout->segment_count && micro_batch < layout->spec.micro_batches);
  const uint32_t group = layout->spec.group_micro_batches;
  return layout->first_boundary + segment * group + (segment < layout->segment_count ? micro_batch % group : 0);
}

uint32_t flap_layout_inner(const flap_layout *layout, uint32_t j, uint32_t micro_batch) {
  const flap_layout_spec *spec = &layout->spec;
  flap_assert(flap_layout_goes_by_layer(spec) && j > 0 && j < spec->segment_layers);
  flap_assert(micro_batch < spec->micro_batches);
  return layout->first_inner + (j - 1) * spec->micro_batches + micro_batch;
}

uint32_t flap_layout_hidden_gradient(const flap_layout *layout, uint32_t micro_batch) {
  flap_assert(layout->spec.mode == FLAP_MODE_TRAIN && micro_batch < layout->spec.micro_batches);
  return layout->first_hidden_gradient + micro_batch;
}

static uint32_t count_segments(const flap_layout_spec *spec) {
  return flap_layout_tail_layer(spec) / spec->segment_layers + 1;
}

/* What saves is a unit: a segment but the last for one micro-batch of a group, numbered segment by segment. Of all
 * units some are chosen at even distances, so that what they store passes the bus while those between them compute. The
 * last segment's backward follows its forward at once, so its layers need a place for one micro-batch only, and that
 * only where no layer has scratch memory. */
static uint64_t count_units(const flap_layout_spec *spec) {
  return (uint64_t)(count_segments(spec) - 1) * spec->group_micro_batches;
}

static uint64_t saving_units(const flap_layout_spec *spec) {
  const uint64_t all = count_units(spec),
                 some = (uint64_t)(spec->saved_layers / spec->segment_layers) * spec->group_micro_batches;
  return flap_layout_saves_all(spec) || some > all ? all : some;
}

/* So many of the units before this one save. */
static uint64_t saving_before(const flap_layout_spec *spec, uint64_t unit) {
  return unit > 0 ? unit * saving_units(spec) / count_units(spec) : 0;
}

static uint64_t unit_of(const flap_layout_spec *spec, uint32_t layer, uint32_t micro_batch) {
  return (uint64_t)(layer / spec->segment_layers) * spec->group_micro_batches + micro_batch % spec->group_micro_batches;
}

uint64_t flap_layout_saved_count(const flap_layout_spec *spec) {
  return saving_units(spec) * spec->segment_layers;
}

static uint64_t saved_index(const flap_layout_spec *spec, uint32_t layer, uint32_t micro_batch) {
  const uint32_t tail = flap_layout_tail_layer(spec);
  if (layer >= tail)
    return flap_layout_saved_count(spec) + (layer - tail);
  return saving_before(spec, unit_of(spec, layer, micro_batch)) * spec->segment_layers + layer % spec->segment_layers;
}

static bool saves(const flap_layout_spec *spec, uint32_t layer, uint32_t micro_batch) {
  if (layer >= flap_layout_tail_layer(spec))
    return flap_layout_saves_all(spec);
  const uint64_t unit = unit_of(spec, layer, micro_batch);
  return saving_before(spec, unit + 1) > saving_before(spec, unit);
}

uint32_t flap_layout_saved(const flap_layout *layout, uint32_t layer, uint32_t micro_batch) {
  const flap_layout_spec *spec = &layout->spec;
  if (spec->mode != FLAP_MODE_TRAIN || !saves(spec, layer, micro_batch))
    return FLAP_REGION_NONE;
  return layout->first_saved + (uint32_t)saved_index(spec, layer, micro_batch);
}

static uint32_t all_parts(const flap_layout_spec *spec) {
  return spec->model->num_hidden_layers + 2;
}

/* Parts before this one that the host updates. */
static uint32_t hosts_before(const flap_layout_spec *spec, uint32_t part) {
  const uint32_t parts = all_parts(spec), wanted = spec->host_parts,
                 reluctant = spec->host_spares_first || spec->backward_parts > 0 ? 2 : 0;
  const uint32_t first = parts - wanted < reluctant ? parts - wanted : reluctant;
  return part <= first ? 0 : (uint32_t)((uint64_t)(part - first) * wanted / (parts - first));
}

bool flap_layout_is_host(const flap_layout *layout, uint32_t part) {
  const flap_layout_spec *spec = &layout->spec;
  return spec->host_parts > 0 && spec->mode == FLAP_MODE_TRAIN &&
         hosts_before(spec, part + 1) > hosts_before(spec, part);
}

/* Each kind by itself: at distances that are even among all parts one of the two could be of one kind alone. */
bool flap_layout_in_backward(const flap_layout *layout, uint32_t part) {
  const flap_layout_spec *spec = &layout->spec;
  if (spec->backward_parts == 0) /* most often, and without a division */
    return false;
  const bool host = flap_layout_is_host(layout, part);
  const uint32_t parts = all_parts(spec), wanted = host ? spec->host_backward_parts : spec->backward_parts;
  const uint32_t before = hosts_before(spec, part), index = host ? before : part - before;
  return spec->mode == FLAP_MODE_TRAIN && (uint64_t)(index + 1) * wanted / parts > (uint64_t)index * wanted / parts;
}

/* Its gradient never leaves the device. */
static bool is_consumed_at_once(const flap_layout *layout, uint32_t part) {
  return flap_layout_in_backward(layout, part) && !flap_layout_is_host(layout, part);
}

flap_dtype flap_layout_sums_dtype(const flap_layout_spec *spec, flap_part kind) {
  const bool once = kind == FLAP_PART_LAYER && spec->micro_batches == 1;
  return once && spec->shape.dtype == FLAP_BF16 && spec->gradient_dtype == FLAP_BF16 ? FLAP_BF16 : FLAP_F32;
}

static bool waits_for_next(const flap_layout *layout, uint32_t part) {
  return layout->spec.spread && part > 0;
}

bool flap_layout_updates_later(const flap_layout *layout, uint32_t part) {
  return waits_for_next(layout, part) && is_consumed_at_once(layout, part);
}

static flap_part kind_of(const flap_layout *layout, uint32_t part) {
  const uint32_t layers = layout->spec.model->num_hidden_layers;
  return part == 0 ? FLAP_PART_EMBEDDING : part <= layers ? FLAP_PART_LAYER : FLAP_PART_HEAD;
}

/* Its gradient passes through a place that many share, between the sums and the update. */
static bool is_rounded_between(const flap_layout *layout, uint32_t part) {
  return is_consumed_at_once(layout, part) &&
         (waits_for_next(layout, part) || !flap_layout_sums_are_final(&layout->spec, kind_of(layout, part)));
}

uint32_t flap_layout_cache(const flap_layout *layout, uint32_t layer) {
  flap_assert(layout->spec.mode == FLAP_MODE_SAMPLE);
  return layout->first_cache + layer;
}

/* States are moments for the most part. */
static uint8_t element_bytes(const flap_layout *layout, flap_region_class klass) {
  const flap_layout_spec *spec = &layout->spec;
  switch (klass) {
  case FLAP_CLASS_STATES:
  case FLAP_CLASS_VOCABULARY_SUMS:
    return 4;
  case FLAP_CLASS_GRADIENT_SUMS:
    return (uint8_t)flap_dtype_bytes(flap_layout_sums_dtype(spec, FLAP_PART_LAYER));
  case FLAP_CLASS_GRADIENTS:
  case FLAP_CLASS_ROUNDED:
    return (uint8_t)flap_dtype_bytes(spec->gradient_dtype);
  case FLAP_CLASS_WEIGHTS:
  case FLAP_CLASS_VOCABULARY:
  case FLAP_CLASS_BOUNDARIES:
  case FLAP_CLASS_HIDDEN_GRADIENTS:
  case FLAP_CLASS_SAVED:
  case FLAP_CLASS_CACHE:
  case FLAP_CLASS_COUNT:
    break;
  }
  return (uint8_t)flap_dtype_bytes(spec->shape.dtype);
}

static uint32_t add_placed(flap_layout *layout, flap_region_class klass, uint64_t bytes, flap_layout_place place) {
  flap_assert(bytes > 0);
  if (layout->regions != NULL) {
    layout->regions[layout->region_count].klass = klass;
    layout->regions[layout->region_count].place = place;
    layout->regions[layout->region_count].overlay = 0;
    layout->regions[layout->region_count].side = 0;
    layout->regions[layout->region_count].element_bytes = element_bytes(layout, klass);
    layout->regions[layout->region_count].bytes = flap_units_round_up(bytes, FLAP_BLOCK_ALIGN);
  }
  return layout->region_count++;
}

static uint32_t add_region(flap_layout *layout, flap_region_class klass, uint64_t bytes) {
  return add_placed(layout, klass, bytes, FLAP_PLACE_ANY);
}

/* The gradients that a segment leaves are there from the end of its backward until its update, before its next forward;
 * what that forward leaves for its own backward and for the next segment is there from then until before they come
 * again. So they share RAM; likewise the embedding's gradients and what it leaves for the first segment. `before`: so
 * many segments go before what leaves them, and the embedding. */
static void share_place(flap_layout *layout, uint32_t region, uint32_t before, uint8_t side) {
  if (layout->regions == NULL || before >= FLAP_PAGER_OVERLAYS_MAX)
    return;
  layout->regions[region].overlay = (uint16_t)(before + 1);
  layout->regions[region].side = side;
}

/* The first layer whose sums are never there when this one's are: with the place in its segment that this one has in
 * its own; or any. */
static uint32_t first_alike(const flap_layout_spec *spec, uint32_t layer) {
  const uint32_t tail = flap_layout_tail_layer(spec);
  if (spec->by_layer) /* but the tail's, where it passes several micro-batches */
    return spec->micro_batches == 1 || layer <= tail ? 0 : layer;
  const uint32_t place = layer < tail ? layer % spec->segment_layers : layer - tail;
  return place < spec->segment_layers && place < tail ? place : layer;
}

/* Where sums do not travel between groups they live only within a segment's backward, so all segments share those of
 * the first, and a longer tail has the rest to itself; embedding and head share too, unless the embedding's begin in
 * the head (tied). By layer, in a step of one micro-batch, all parts share one place then. */
static uint32_t add_sums(flap_layout *layout, const flap_layout_part *part) {
  const flap_layout_spec *spec = &layout->spec;
  const bool shared = spec->group_micro_batches == spec->micro_batches;
  const bool layer = part->kind == FLAP_PART_LAYER;
  uint64_t elements = part->elements;
  const bool one = spec->by_layer && spec->micro_batches == 1 && !layout->tied;
  if (one && part->kind != FLAP_PART_EMBEDDING)
    return layout->vocabulary_sums;
  if (shared && layer) {
    const uint32_t first = first_alike(spec, part->layer);
    if (first != part->layer) /* where regions are only counted there are no parts to ask */
      return layout->parts == NULL ? FLAP_REGION_NONE : layout->parts[flap_layout_layer_part(first)].sums;
  } else if (shared && !layout->tied) {
    if (part->kind == FLAP_PART_HEAD)
      return layout->vocabulary_sums;
    const uint64_t head = layout->part_elements[FLAP_PART_HEAD];
    elements = head > elements ? head : elements;
  }
  uint64_t bytes = elements * flap_dtype_bytes(flap_layout_sums_dtype(spec, part->kind));
  const uint64_t layer_bytes =
      layout->part_elements[FLAP_PART_LAYER] * flap_dtype_bytes(flap_layout_sums_dtype(spec, FLAP_PART_LAYER));
  if (one && layer_bytes > bytes)
    bytes = layer_bytes;
  const uint32_t region = add_region(layout, layer ? FLAP_CLASS_GRADIENT_SUMS : FLAP_CLASS_VOCABULARY_SUMS, bytes);
  if (part->kind == FLAP_PART_EMBEDDING)
    layout->vocabulary_sums = region;
  return region;
}

/* Slices of a part. */
static uint32_t count_slices(const flap_layout *layout, flap_part kind) {
  return (uint32_t)((layout->part_elements[kind] + layout->slice_elements[kind] - 1) / layout->slice_elements[kind]);
}

/* Gradients that are consumed at once need one place if each slice is updated when it is rounded; if the update of a
 * segment is spread over the next one, places for all of its slices; the head's come with the last segment's. */
static uint32_t count_rounded(const flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  const uint32_t head = spec->model->num_hidden_layers + 1;
  uint32_t most = 0;
  if (spec->backward_parts == 0)
    return 0;
  for (uint32_t part = 0; part <= head; part++)
    most |= is_rounded_between(layout, part);
  if (most == 0 || !spec->spread)
    return most;
  for (uint32_t segment = 0; segment < layout->segment_count; segment++) {
    const bool with_head = segment + 1 == layout->segment_count && is_rounded_between(layout, head);
    uint32_t first, end, here = with_head ? count_slices(layout, FLAP_PART_HEAD) : 0;
    flap_layout_segment(layout, segment, &first, &end);
    for (uint32_t layer = first; layer < end; layer++)
      here += is_rounded_between(layout, flap_layout_layer_part(layer)) ? count_slices(layout, FLAP_PART_LAYER) : 0;
    most = here > most ? here : most;
  }
  return most;
}

static void add_rounded(flap_layout *layout) {
  uint64_t elements = 0;
  for (int kind = 0; kind < FLAP_PART_COUNT; kind++) {
    const uint64_t largest = layout->part_elements[kind] < layout->slice_elements[kind] ? layout->part_elements[kind]
                                                                                        : layout->slice_elements[kind];
    elements = largest > elements ? largest : elements;
  }
  layout->rounded_count = count_rounded(layout);
  for (uint32_t i = 0; i < layout->rounded_count; i++)
    add_region(layout, FLAP_CLASS_ROUNDED, elements * flap_dtype_bytes(layout->spec.gradient_dtype));
}

/* The slices of a segment are neighbours, so they have different places. */
static uint32_t add_gradient(flap_layout *layout, uint64_t elements, bool host, bool at_once, bool between) {
  if (at_once)
    return between ? layout->rounded_next++ % layout->rounded_count : FLAP_REGION_NONE;
  return add_placed(layout, FLAP_CLASS_GRADIENTS, elements * flap_dtype_bytes(layout->spec.gradient_dtype),
                    host ? FLAP_PLACE_HOME : FLAP_PLACE_ANY);
}

static void share_gradient(flap_layout *layout, const flap_layout_part *part, uint32_t gradient) {
  if (part->kind == FLAP_PART_EMBEDDING)
    share_place(layout, gradient, 0, 0);
  else if (part->kind == FLAP_PART_LAYER)
    share_place(layout, gradient, flap_layout_segment_of(layout, part->layer) + 1, 0);
}

/* A part's weights, and in training its gradient sums and its slices. */
static void add_part(flap_layout *layout, flap_part kind, uint32_t layer) {
  const flap_layout_spec *spec = &layout->spec;
  flap_layout_part part = {.kind = kind, .layer = layer, .sums = FLAP_REGION_NONE};
  const bool vocabulary = kind != FLAP_PART_LAYER, host = flap_layout_is_host(layout, layout->part_count);
  const bool at_once = is_consumed_at_once(layout, layout->part_count);
  const bool between = is_rounded_between(layout, layout->part_count);
  part.elements = layout->part_elements[kind];
  part.weights =
      add_placed(layout, vocabulary ? FLAP_CLASS_VOCABULARY : FLAP_CLASS_WEIGHTS,
                 part.elements * flap_dtype_bytes(spec->shape.dtype), host ? FLAP_PLACE_COPIED : FLAP_PLACE_ANY);
  part.first_slice = layout->slice_count;
  part.first_block = layout->block_count;
  if (spec->mode == FLAP_MODE_TRAIN) {
    part.sums = add_sums(layout, &part);
    const uint64_t slice_elements = layout->slice_elements[kind];
    const flap_state_format *format = &layout->state_formats[kind];
    const uint64_t whole_bytes = flap_layout_state_bytes(format, slice_elements);
    for (uint64_t first = 0; first < part.elements; first += slice_elements) {
      const uint64_t left = part.elements - first;
      flap_layout_slice slice = {.part = layout->part_count, .first_element = first};
      slice.elements = left < slice_elements ? left : slice_elements;
      slice.states =
          add_placed(layout, FLAP_CLASS_STATES,
                     slice.elements == slice_elements ? whole_bytes : flap_layout_state_bytes(format, slice.elements),
                     host ? FLAP_PLACE_HOST : FLAP_PLACE_ANY);
      slice.gradient = add_gradient(layout, slice.elements, host, at_once, between);
      if (!at_once)
        share_gradient(layout, &part, slice.gradient);
      if (layout->regions != NULL && flap_layout_has_codes(spec->optim, kind))
        layout->regions[slice.states].element_bytes = 1;
      if (layout->slices != NULL)
        layout->slices[layout->slice_count] = slice;
      layout->slice_count++;
    }
  }
  part.slice_count = layout->slice_count - part.first_slice;
  layout->block_count += part.elements / FLAP_OPS_BLOCK;
  if (layout->parts != NULL)
    layout->parts[layout->part_count] = part;
  layout->part_count++;
}

static void add_activations(flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  const uint64_t hidden = flap_model_hidden_bytes(spec->model, &spec->shape);
  layout->first_boundary = layout->region_count;
  for (uint32_t i = 0; i < layout->segment_count * spec->group_micro_batches + 1; i++) {
    const uint32_t region = add_region(layout, FLAP_CLASS_BOUNDARIES, hidden);
    if (spec->mode == FLAP_MODE_TRAIN)
      share_place(layout, region, i / spec->group_micro_batches, 1);
  }
  if (spec->mode != FLAP_MODE_TRAIN)
    return;
  layout->first_inner = layout->region_count;
  if (flap_layout_goes_by_layer(spec) && layout->segment_count > 1)
    for (uint32_t i = 0; i < (spec->segment_layers - 1) * spec->micro_batches; i++)
      add_region(layout, FLAP_CLASS_BOUNDARIES, hidden);
  layout->first_hidden_gradient = layout->region_count;
  for (uint32_t i = 0; i < spec->micro_batches; i++)
    add_region(layout, FLAP_CLASS_HIDDEN_GRADIENTS, hidden);
  layout->first_saved = layout->region_count;
  const uint64_t kept = flap_model_saved_bytes(spec->model, &spec->shape, spec->saved_mask);
  for (uint32_t segment = 0; segment < layout->segment_count; segment++)
    for (uint32_t i = 0; i < (segment + 1 < layout->segment_count ? spec->group_micro_batches : 1); i++) {
      uint32_t first, end;
      flap_layout_segment(layout, segment, &first, &end);
      for (uint32_t layer = first; layer < end && saves(spec, layer, i); layer++)
        share_place(layout, add_region(layout, FLAP_CLASS_SAVED, kept + (layer > first ? hidden : 0)), segment + 1, 1);
    }
}

static void add_all(flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  const uint32_t layers = spec->model->num_hidden_layers;
  layout->part_count = layout->slice_count = layout->region_count = 0;
  layout->block_count = 0;
  layout->rounded_next = 0;
  add_rounded(layout);
  add_part(layout, FLAP_PART_EMBEDDING, 0);
  for (uint32_t layer = 0; layer < layers; layer++)
    add_part(layout, FLAP_PART_LAYER, layer);
  add_part(layout, FLAP_PART_HEAD, 0);
  if (spec->mode == FLAP_MODE_SAMPLE) {
    layout->first_cache = layout->region_count;
    for (uint32_t layer = 0; layer < layers; layer++)
      add_region(layout, FLAP_CLASS_CACHE,
                 flap_model_cache_bytes(spec->model, spec->shape.dtype, spec->cache_positions));
  } else {
    add_activations(layout);
  }
}

/* A ring's slots are as wide as its largest region: so slices whose elements take more bytes than those of layers have
 * fewer of them, whole blocks, at least one. */
static void give_states(flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  const flap_state_format usual = flap_layout_state_format(spec->shape.dtype, spec->optim, FLAP_PART_LAYER);
  const uint64_t bytes = spec->mode == FLAP_MODE_TRAIN ? flap_layout_state_bytes(&usual, spec->slice_elements) : 0;
  for (int kind = 0; kind < FLAP_PART_COUNT; kind++) {
    flap_state_format *format = &layout->state_formats[kind];
    *format = flap_layout_state_format(spec->shape.dtype, spec->optim, (flap_part)kind);
    const uint64_t blocks = bytes / flap_layout_state_bytes(format, FLAP_OPS_BLOCK);
    layout->slice_elements[kind] = (blocks > 0 ? blocks : 1) * FLAP_OPS_BLOCK;
  }
}

void flap_layout_build(const flap_layout_spec *spec, flap_arena *arena, flap_layout *layout_out) {
  const uint32_t layers = spec->model->num_hidden_layers;
  flap_assert(spec->segment_layers >= 1 && spec->segment_layers <= layers);
  flap_assert(spec->tail_layers >= 1 && spec->tail_layers <= layers);
  flap_assert(flap_layout_tail_layer(spec) % spec->segment_layers == 0);
  flap_assert(spec->saved_layers <= layers && spec->micro_batches >= 1);
  flap_assert(spec->saved_layers == 0 || spec->saved_mask != 0);
  flap_assert(spec->host_parts <= layers + 2 && spec->backward_parts <= layers + 2);
  flap_assert(spec->host_backward_parts <= layers + 2 && (spec->backward_parts > 0 || spec->host_backward_parts == 0));

  flap_assert(spec->group_micro_batches >= 1 && spec->group_micro_batches <= spec->micro_batches);
  flap_assert(spec->mode != FLAP_MODE_TRAIN ||
              (spec->slice_elements > 0 && spec->slice_elements % FLAP_OPS_BLOCK == 0 &&
               spec->slice_elements <= (uint64_t)FLAP_OPS_BLOCK * FLAP_OPS_ADAMW_BLOCKS_MAX));
  *layout_out = (flap_layout){.spec = *spec,
                              .segment_count = count_segments(spec),
                              .first_boundary = FLAP_REGION_NONE,
                              .first_inner = FLAP_REGION_NONE,
                              .first_hidden_gradient = FLAP_REGION_NONE,
                              .first_saved = FLAP_REGION_NONE,
                              .first_cache = FLAP_REGION_NONE,
                              .tied = spec->model->tie_word_embeddings};
  for (int kind = 0; kind < FLAP_PART_COUNT; kind++) /* once: planning builds layouts of many layers by the thousand */
    layout_out->part_elements[kind] = flap_model_part_elements(spec->model, (flap_part)kind);
  give_states(layout_out);
  add_all(layout_out);
  layout_out->parts = FLAP_ARENA_ARRAY(arena, flap_layout_part, layout_out->part_count);
  layout_out->slices = FLAP_ARENA_ARRAY(arena, flap_layout_slice, layout_out->slice_count);
  layout_out->regions = FLAP_ARENA_ARRAY(arena, flap_layout_region, layout_out->region_count);
  if (!flap_arena_is_measuring(arena))
    add_all(layout_out);
}
