#include "engine/step/buffers.h"

#include "base/units.h"
#include "engine/step/program.h"

void flap_buffers_limits(const flap_layout *layout, uint32_t threads, flap_ops_limits *limits_out) {
  const flap_layout_spec *spec = &layout->spec;
  flap_model_ops_limits(spec->model, &spec->shape, threads, limits_out);
  if (spec->mode == FLAP_MODE_SAMPLE)
    limits_out->cache_tokens_max = spec->cache_positions;
}

static uint64_t step_tokens(const flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  return (uint64_t)spec->shape.batch * spec->shape.sequence * spec->micro_batches;
}

static void *take(flap_arena *arena, uint64_t bytes) {
  return flap_arena_take(arena, flap_units_round_up(bytes, 256), 256);
}

void flap_buffers_take_device(const flap_layout *layout, flap_device_kind kind, uint32_t threads, flap_arena *vram,
                              flap_device_buffers *buffers_out) {
  const flap_layout_spec *spec = &layout->spec;
  const uint64_t tokens = step_tokens(layout);
  const bool train = spec->mode == FLAP_MODE_TRAIN, sample = spec->mode == FLAP_MODE_SAMPLE;
  flap_device_buffers b = {0};
  flap_ops_limits limits;
  flap_buffers_limits(layout, threads, &limits);
  b.ops_workspace = take(vram, flap_ops_workspace_bytes(kind, &limits));
  b.model_workspace = take(vram, flap_model_workspace_bytes(spec->model, &spec->shape));
  b.rope_table = take(vram, flap_model_rope_bytes(spec->model, sample ? spec->cache_positions : spec->shape.sequence));
  b.tokens = take(vram, tokens * 4);
  if (sample) {
    b.logits = take(vram, (uint64_t)spec->model->vocab_size * 4);
  } else {
    b.targets = take(vram, tokens * 4);
    b.losses = take(vram, tokens * 4);
  }
  if (train) {
    b.order = take(vram, tokens * 4);
    b.block_squares = take(vram, layout->block_count * 4);
    b.fault = take(vram, 4);
  }
  b.hidden_bytes = flap_model_hidden_bytes(spec->model, &spec->shape);
  b.scratch_bytes = flap_program_scratch_bytes(layout);
  b.kept_bytes = flap_model_saved_bytes(spec->model, &spec->shape, spec->saved_mask);
  b.hidden_bytes = flap_units_round_up(b.hidden_bytes, 256);
  b.hidden = take(vram, b.hidden_bytes * flap_program_hidden_buffers(layout));
  b.scratch = take(vram, b.scratch_bytes * flap_program_scratch_buffers(layout));
  *buffers_out = b;
}

void flap_buffers_fill_decay(const flap_layout *layout, flap_host_buffers *b) {
  for (uint32_t p = 0; b->decay != NULL && p < layout->part_count; p++) {
    const flap_layout_part *part = &layout->parts[p];
    const uint64_t slice_elements = layout->slice_elements[part->kind];
    flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
    const uint32_t count = flap_model_tensors(layout->spec.model, part->kind, part->layer, tensors);
    for (uint32_t t = 0; t < count; t++) {
      if (!tensors[t].decays)
        continue;
      const uint64_t end = tensors[t].offset + tensors[t].elements;
      for (uint64_t at = tensors[t].offset; at < end; at += FLAP_OPS_BLOCK) {
        const uint64_t slice = part->first_slice + at / slice_elements;
        const uint64_t block = at % slice_elements / FLAP_OPS_BLOCK;
        b->decay[slice * b->decay_stride + block / 8] |= (uint8_t)(1u << (block % 8));
      }
    }
  }
}

void flap_buffers_take_host(const flap_layout *layout, uint32_t leases_max, flap_arena *ram,
                            flap_host_buffers *buffers_out) {
  const flap_layout_spec *spec = &layout->spec;
  const uint64_t tokens = step_tokens(layout);
  flap_host_buffers b = {0};
  b.addresses = FLAP_ARENA_ARRAY(ram, void *, leases_max);
  if (spec->mode == FLAP_MODE_TRAIN) {
    b.order = FLAP_ARENA_ARRAY(ram, int32_t, tokens);
    b.counts = FLAP_ARENA_ARRAY(ram, uint32_t, (uint64_t)spec->model->vocab_size + 1);
    b.block_squares = FLAP_ARENA_ARRAY(ram, float, layout->block_count);
    /* The embedding's slices have no more blocks than those of layers. */
    b.decay_stride = (spec->slice_elements / FLAP_OPS_BLOCK + 7) / 8;
    b.decay = FLAP_ARENA_ARRAY(ram, uint8_t, b.decay_stride * layout->slice_count);
    if (spec->host_parts > 0)
      b.jobs = FLAP_ARENA_ARRAY(ram, flap_host_job, layout->slice_count);
  }
  if (spec->mode == FLAP_MODE_SAMPLE)
    b.logits = FLAP_ARENA_ARRAY(ram, float, spec->model->vocab_size);
  else
    b.losses = FLAP_ARENA_ARRAY(ram, float, tokens);
  b.tokens = FLAP_ARENA_ARRAY(ram, int32_t, tokens);
  if (spec->mode != FLAP_MODE_SAMPLE)
    b.targets = FLAP_ARENA_ARRAY(ram, int32_t, tokens);
  *buffers_out = b;
}
