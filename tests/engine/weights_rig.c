#include "tests/engine/weights_rig.h"

#include "base/philox.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Works outside of a running test too: write_model has none. */
#define MUST(call)                                              \
  do {                                                          \
    if ((call) != FLAP_OK) {                                    \
      fprintf(stderr, "%s: %s\n", #call, flap_error_message()); \
      abort();                                                  \
    }                                                           \
  } while (0)

const rig_placement rig_placements[RIG_PLACEMENTS] = {
    {RIG_VRAM, 512, 4096, 4096}, {RIG_RAM, 1, 4096, 8192},       {RIG_DISK, 3, 4096, 12288},
    {RIG_MIXED, 2, 8192, 16384}, {RIG_DISK, 512, 65536, 131072}, {RIG_MIXED, 5, 16384, 65536},
};

void rig_model(bool tied, bool attention_bias, flap_model_config *config_out) {
  *config_out = (flap_model_config){.family = flap_model_find_family("llama"),
                                    .vocab_size = 397,
                                    .hidden_size = 48,
                                    .intermediate_size = 136,
                                    .num_hidden_layers = 2,
                                    .num_attention_heads = 4,
                                    .num_key_value_heads = 2,
                                    .max_position_embeddings = 64,
                                    .rms_norm_eps = 1e-5,
                                    .initializer_range = 0.02,
                                    .tie_word_embeddings = tied,
                                    .attention_bias = attention_bias,
                                    .rope = {.theta = 10000}};
  MUST(flap_model_finish_config(config_out));
}

static void build_layout(weights_rig *rig, flap_dtype dtype, flap_optim optim, flap_run_mode mode,
                         const rig_placement *placement) {
  const flap_layout_spec spec = {.model = &rig->config,
                                 .shape = {.dtype = dtype, .batch = 1, .sequence = 4},
                                 .mode = mode,
                                 .gradient_dtype = dtype,
                                 .optim = optim,
                                 .micro_batches = 1,
                                 .group_micro_batches = 1,
                                 .segment_layers = 1,
                                 .tail_layers = 1,
                                 .slice_elements = placement->slice_blocks * FLAP_OPS_BLOCK};
  flap_arena measuring;
  flap_arena_measure(&measuring, "tables");
  flap_layout_build(&spec, &measuring, &rig->layout);
  MUST(flap_arena_open(&rig->tables, "tables", measuring.bytes_used + 4096));
  flap_layout_build(&spec, &rig->tables, &rig->layout);
}

static uint32_t ram_pages(rig_homes homes, uint32_t index, uint32_t pages) {
  if (homes == RIG_MIXED)
    return index % 4 == 1 ? pages : index % 4 == 2 ? pages / 2 : 0;
  return homes == RIG_RAM ? pages : 0;
}

void rig_open(weights_rig *rig, const flap_model_config *config, flap_dtype dtype, flap_run_mode mode,
              const rig_placement *placement, const char *disk) {
  rig_open_optim(rig, config, dtype, FLAP_OPTIM_ADAMW, mode, placement, disk);
}

void rig_open_optim(weights_rig *rig, const flap_model_config *config, flap_dtype dtype, flap_optim optim,
                    flap_run_mode mode, const rig_placement *placement, const char *disk) {
  memset(rig, 0, sizeof *rig);
  rig->config = *config;
  build_layout(rig, dtype, optim, mode, placement);
  const uint32_t count = rig->layout.region_count;
  flap_pager_region *regions = calloc(count, sizeof *regions);
  flap_pager_ring ring = {.name = "all", .slots = 1};
  const rig_homes homes = placement->homes;
  for (uint32_t i = 0; i < count; i++) {
    const uint64_t bytes = rig->layout.regions[i].bytes;
    const uint32_t pages = (uint32_t)((bytes + placement->page_bytes - 1) / placement->page_bytes);
    const bool resident = homes == RIG_VRAM || (homes == RIG_MIXED && i % 4 == 0);
    regions[i] = (flap_pager_region){.bytes = bytes, .ring = resident ? FLAP_PAGER_RESIDENT : 0};
    regions[i].ram_pages = resident ? 0 : ram_pages(homes, i, pages);
    if (bytes > ring.slot_bytes)
      ring.slot_bytes = bytes;
  }
  flap_pager_config pager = {.page_bytes = placement->page_bytes,
                             .transfer_bytes = placement->transfer_bytes,
                             .region_count = count,
                             .regions = regions,
                             .ring_count = 1,
                             .rings = &ring,
                             .leases_max = 4};
  if (homes == RIG_DISK || homes == RIG_MIXED)
    pager.read_buffers = pager.write_buffers = 3;
  flap_pager_sizes sizes;
  flap_pager_measure(&pager, &sizes);
  pager.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  pager.disk = (flap_block_config){.disk_count = 1, .disks = {{.path = disk, .bytes = sizes.disk_bytes}}};
  MUST(flap_arena_open(&rig->ram, "ram", sizes.ram_bytes));
  MUST(flap_pager_open(&pager, &rig->ram, &rig->pager));
  free(regions);
}

void rig_close(weights_rig *rig) {
  flap_pager_close(rig->pager);
  flap_arena_close(&rig->ram);
  flap_arena_close(&rig->tables);
}

/* ---- reading, straight from the regions ---------------------------------------------------------------------- */

flap_model_tensor rig_tensor(const weights_rig *rig, const char *name, uint32_t *part_out) {
  for (uint32_t part = 0; part < rig->layout.part_count; part++) {
    flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
    const flap_layout_part *p = &rig->layout.parts[part];
    const uint32_t count = flap_model_tensors(&rig->config, p->kind, p->layer, tensors);
    for (uint32_t i = 0; i < count; i++)
      if (strcmp(tensors[i].name, name) == 0) {
        *part_out = part;
        return tensors[i];
      }
  }
  ck_abort_msg("no tensor %s", name);
}

static flap_status append(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  memcpy((char *)context + offset, memory, bytes);
  return FLAP_OK;
}

static void *drain(const weights_rig *rig, uint32_t region) {
  void *bytes = malloc(rig->layout.regions[region].bytes);
  MUST(flap_pager_drain(rig->pager, region, append, bytes));
  return bytes;
}

static void check_gaps(const weights_rig *rig, const flap_layout_part *part, uint64_t first, uint64_t elements,
                       const char *values, uint64_t element_bytes) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t count = flap_model_tensors(&rig->config, part->kind, part->layer, tensors);
  for (uint64_t i = 0; i < elements; i++) {
    bool inside = false;
    for (uint32_t t = 0; t < count && !inside; t++)
      inside = first + i >= tensors[t].offset && first + i < tensors[t].offset + tensors[t].elements;
    for (uint64_t b = 0; b < element_bytes && !inside; b++)
      if (values[i * element_bytes + b] != 0)
        ck_abort_msg("element %llu of a gap is not zero", (unsigned long long)(first + i));
  }
}

/* Numbers that 256 elements share each: those that no tensor has a part in are zero. */
static void check_largest_gaps(const weights_rig *rig, const flap_layout_part *part, uint64_t first, uint64_t elements,
                               const float *values) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t count = flap_model_tensors(&rig->config, part->kind, part->layer, tensors);
  for (uint64_t i = 0; i < elements / 256; i++) {
    const uint64_t begin = first + i * 256, end = begin + 256;
    bool inside = false;
    for (uint32_t t = 0; t < count && !inside; t++)
      inside = end > tensors[t].offset && begin < tensors[t].offset + tensors[t].elements;
    if (!inside && flap_f32_bits(values[i]) != 0)
      ck_abort_msg("what the codes from element %llu of a gap are relative to is not zero", (unsigned long long)begin);
  }
}

/* The moments of a slice as fp32, one after the other, after a look at their gaps; codes as whole numbers. Owned by the
 * caller. */
static float *moments_of(const weights_rig *rig, const flap_layout_part *part, const flap_layout_slice *slice,
                         const char *states) {
  const uint64_t n = slice->elements, first = slice->first_element;
  const bool codes = rig->layout.spec.optim == FLAP_OPTIM_ADAMW_8BIT && part->kind != FLAP_PART_EMBEDDING;
  float *moments = malloc(2 * n * sizeof *moments);
  ck_assert_ptr_nonnull(moments);
  check_gaps(rig, part, first, n, states, codes ? 1 : 4);
  check_gaps(rig, part, first, n, states + n * (codes ? 1 : 4), codes ? 1 : 4);
  if (!codes) {
    memcpy(moments, states, 2 * n * sizeof *moments);
    return moments;
  }
  for (uint64_t i = 0; i < n; i++) {
    moments[i] = (float)(int8_t)states[i];
    moments[n + i] = (float)(uint8_t)states[n + i];
  }
  const float *largest = (const float *)(const void *)(states + 2 * n);
  check_largest_gaps(rig, part, first, n, largest);
  check_largest_gaps(rig, part, first, n, largest + n / 256);
  return moments;
}

/* One section of a slice into the tensor's array. */
static void pick(const flap_layout_slice *slice, const flap_model_tensor *tensor, const float *section, float *out) {
  for (uint64_t i = 0; out && i < slice->elements; i++) {
    const uint64_t element = slice->first_element + i;
    if (element >= tensor->offset && element < tensor->offset + tensor->elements)
      out[element - tensor->offset] = section[i];
  }
}

static float *rig_copy_floats(const float *from, uint64_t count) {
  float *copy = malloc(count * sizeof *copy);
  ck_assert_ptr_nonnull(copy);
  memcpy(copy, from, count * sizeof *copy);
  return copy;
}

static void check_rounded(const flap_layout_slice *slice, const flap_model_tensor *tensor, const float *master,
                          const float *rounded) {
  for (uint64_t i = 0; i < tensor->elements; i++) {
    const uint64_t element = tensor->offset + i;
    if (element < slice->first_element || element >= slice->first_element + slice->elements)
      continue;
    if (flap_f32_bits(rig_from_f16(rig_to_f16(master[i]))) != flap_f32_bits(rounded[i]))
      ck_abort_msg("element %llu: the fp16 weight is not its master, rounded", (unsigned long long)i);
  }
}

void rig_read(const weights_rig *rig, const char *name, float *master, float *moment1, float *moment2) {
  uint32_t index;
  const flap_model_tensor tensor = rig_tensor(rig, name, &index);
  const flap_layout_part *part = &rig->layout.parts[index];
  const flap_dtype dtype = rig->layout.spec.shape.dtype;
  const bool halves = dtype == FLAP_BF16;
  const uint64_t master_bytes = dtype == FLAP_BF16 ? 2 : dtype == FLAP_F16 ? 4 : 0;
  uint16_t *weights = drain(rig, part->weights);
  check_gaps(rig, part, 0, part->elements, (const char *)weights, dtype == FLAP_F32 ? 4 : 2);
  for (uint64_t i = 0; i < tensor.elements; i++)
    master[i] = dtype == FLAP_F16 ? flap_f16_to_f32(weights[tensor.offset + i])
                : halves          ? flap_bf16_to_f32(weights[tensor.offset + i])
                                  : ((const float *)(const void *)weights)[tensor.offset + i];
  for (uint32_t s = part->first_slice; s < part->first_slice + part->slice_count; s++) {
    const flap_layout_slice *slice = &rig->layout.slices[s];
    char *states = drain(rig, slice->states);
    float *moments = moments_of(rig, part, slice, states + slice->elements * master_bytes);
    if (master_bytes > 0)
      check_gaps(rig, part, slice->first_element, slice->elements, states, master_bytes);
    if (dtype == FLAP_F16 && moment1 != NULL) { /* the weight is its master, rounded */
      float *rounded = rig_copy_floats(master, tensor.elements);
      pick(slice, &tensor, (const float *)(const void *)states, master);
      check_rounded(slice, &tensor, master, rounded);
      free(rounded);
    } else if (dtype == FLAP_F16) {
      pick(slice, &tensor, (const float *)(const void *)states, master);
    }
    pick(slice, &tensor, moments, moment1);
    pick(slice, &tensor, moments + slice->elements, moment2);
    free(moments);
    for (uint64_t i = 0; halves && i < slice->elements; i++) {
      const uint64_t element = slice->first_element + i;
      if (element < tensor.offset || element >= tensor.offset + tensor.elements)
        continue;
      float *value = &master[element - tensor.offset];
      const int32_t low = ((const int16_t *)(const void *)states)[i];
      *value = flap_f32_from_bits(flap_f32_bits(*value) + (uint32_t)low);
    }
    free(states);
  }
  free(weights);
}

/* ---- half precision ------------------------------------------------------------------------------------------ */

float rig_from_f16(uint16_t half) {
  const int exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  const double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  return (float)copysign(magnitude, half & 0x8000 ? -1.0 : 1.0);
}

/* nearbyint takes ties to even; a fraction that becomes 2048 carries into the exponent. */
uint16_t rig_to_f16(float value) {
  const double magnitude = fabs((double)value);
  uint32_t bits;
  int exponent;
  (void)frexp(magnitude, &exponent); /* magnitude = m * 2^exponent, 0.5 <= m < 1 */
  if (!(magnitude < 65520.0))
    bits = 0x7c00;
  else if (magnitude < 0x1p-14)
    bits = (uint32_t)nearbyint(ldexp(magnitude, 24));
  else
    bits = ((uint32_t)(exponent + 14) << 10) + (uint32_t)nearbyint(ldexp(magnitude, 11 - exponent)) - 1024;
  return (uint16_t)(bits | (signbit(value) ? 0x8000u : 0));
}

/* ---- files --------------------------------------------------------------------------------------------------- */

void rig_same_files(const char *a, const char *b) {
  size_t a_bytes, b_bytes;
  char *left = scratch_read(a, &a_bytes), *right = scratch_read(b, &b_bytes);
  ck_assert_msg(a_bytes == b_bytes && memcmp(left, right, a_bytes) == 0, "%s and %s differ", a, b);
  free(left);
  free(right);
}

void rig_scribble(const char *name, uint64_t seed) {
  size_t bytes;
  uint64_t header = 0;
  char *data = scratch_read(name, &bytes);
  memcpy(&header, data, sizeof header);
  const flap_philox stream = flap_philox_stream(seed, "scribble");
  for (uint64_t i = 8 + header; i < bytes; i++)
    data[i] = (char)flap_philox_below(&stream, i, 256);
  scratch_write(name, data, bytes);
  free(data);
}
