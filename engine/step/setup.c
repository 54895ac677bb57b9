#include "engine/step/setup_internal.h"

#include "base/assert.h"
#include "base/units.h"
#include "engine/step/buffers.h"
#include "io/formats/dataset_reader.h"
#include "io/formats/trace.h"

#include <stdlib.h>
#include <string.h>

/* What the pager can number: four thousand million blocks of 4 KiB, with room for rounding. Very many micro-batches
 * whose activations are all saved come to more. */
#define REGION_BYTES_MAX ((uint64_t)8 << 40)
/* What moves at a time between RAM and the device. A copy takes some 15 microseconds beside its bytes' time, for its
 * events and its turn: a sixth more for 4 MiB. */
#define COPY_BYTES (16 * FLAP_MIB)
/* What the files of a checkpoint share to be written through: a block for each of 8, or a MiB each and more. */
#define SAVE_BYTES_MIN (32 * FLAP_KIB)
#define SAVE_BYTES_MAX (8 * FLAP_MIB)

static uint64_t smaller(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

_Static_assert(FLAP_CLASS_COUNT <= FLAP_PAGER_CLASSES_MAX, "the pager knows as many classes");

const char *flap_engine_class_name(flap_region_class klass) {
  static const char *const names[] = {"weights",       "vocabulary",      "states",     "gradients",        "rounded",
                                      "gradient_sums", "vocabulary_sums", "boundaries", "hidden_gradients", "saved",
                                      "cache"};
  _Static_assert(sizeof names / sizeof *names == FLAP_CLASS_COUNT, "a name per class");
  flap_assert((unsigned)klass < FLAP_CLASS_COUNT);
  return names[klass];
}

/* ---- layout and programs --------------------------------------------------------------------------------- */

static flap_layout_spec layout_spec(const flap_setup_spec *spec, const flap_choice *choice) {
  const uint32_t least_tail = flap_layout_least_tail(spec->model->num_hidden_layers, choice->segment_layers);
  return (flap_layout_spec){.model = spec->model,
                            .shape = spec->shape,
                            .mode = spec->mode,
                            .gradient_dtype = spec->gradient_dtype,
                            .optim = spec->optim,
                            .micro_batches = spec->micro_batches,
                            .group_micro_batches = choice->group_micro_batches,
                            .segment_layers = choice->segment_layers,
                            .tail_layers = choice->tail_layers > 0 ? choice->tail_layers : least_tail,
                            .layerwise = choice->layerwise,
                            .by_layer = spec->mode == FLAP_MODE_TRAIN && !choice->spread && choice->saved_layers == 0 &&
                                        choice->group_micro_batches == spec->micro_batches &&
                                        (spec->micro_batches == 1 || choice->layerwise),
                            .saved_layers = choice->saved_layers,
                            .saved_mask = choice->saved_mask,
                            .host_parts = choice->host_parts,
                            .host_spares_first = choice->host_spares_first,
                            .backward_parts = choice->backward_parts,
                            .host_backward_parts = choice->host_backward_parts,
                            .backward_twice = choice->backward_parts > 0 && !spec->needs_no_norm,
                            .spread = choice->backward_parts > 0 && choice->spread,
                            .slice_elements = choice->slice_elements,
                            .cache_positions = spec->cache_positions};
}

static flap_status build_layout(flap_setup *setup) {
  const flap_layout_spec spec = layout_spec(&setup->spec, &setup->choice);
  flap_arena arena;
  flap_arena_measure(&arena, "layout");
  flap_layout_build(&spec, &arena, &setup->layout);
  setup->layout_memory = calloc(1, arena.bytes_used); /* a few KiB, thousands of times in a plan: mapping took longer */
  if (setup->layout_memory == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a layout of %u layers", spec.model->num_hidden_layers);
  flap_arena_borrow(&arena, "layout", setup->layout_memory, arena.bytes_used);
  flap_layout_build(&spec, &arena, &setup->layout);
  return FLAP_OK;
}

/* What any layout keeps of a part for good; gradients may be used up where they come. */
static double kept_bytes(const flap_setup_spec *spec, flap_part kind, uint64_t elements) {
  const flap_state_format format = flap_layout_state_format(spec->shape.dtype, spec->optim, kind);
  return (double)elements * (double)flap_dtype_bytes(spec->shape.dtype) +
         (spec->mode == FLAP_MODE_TRAIN ? (double)flap_layout_state_bytes(&format, elements) : 0);
}

flap_status flap_setup_check_model(const flap_setup_spec *spec) {
  char text[FLAP_UNITS_TEXT_MAX];
  double bytes = 0;
  for (int kind = 0; kind < FLAP_PART_COUNT; kind++) {
    const uint64_t elements = flap_model_part_elements(spec->model, (flap_part)kind);
    const double count = kind == FLAP_PART_LAYER ? spec->model->num_hidden_layers : 1;
    bytes +=
        elements > REGION_BYTES_MAX ? (double)elements * count : kept_bytes(spec, (flap_part)kind, elements) * count;
  }
  if (bytes <= (double)REGION_BYTES_MAX)
    return FLAP_OK;
  return flap_error_set(
      FLAP_INVALID,
      "model: %llu parameters are %s of %s, more than the %llu TiB that can be planned with: "
      "make it smaller%s",
      (unsigned long long)flap_model_parameters(spec->model),
      flap_units_format_bytes(bytes < 0x1p63 ? (uint64_t)bytes : (uint64_t)1 << 63, text, sizeof text),
      spec->mode == FLAP_MODE_TRAIN ? "weights and states" : "weights", (unsigned long long)(REGION_BYTES_MAX >> 40),
      spec->mode == FLAP_MODE_TRAIN && spec->optim != FLAP_OPTIM_ADAMW_8BIT ? ", or set optim: adamw_8bit" : "");
}

static flap_status check_regions(const flap_layout *layout) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < layout->region_count; i++)
    if (!flap_units_add(bytes, layout->regions[i].bytes, &bytes) || bytes > REGION_BYTES_MAX)
      return flap_error_set(FLAP_BUDGET, "%u micro-batches a step: more than %llu TiB to keep",
                            layout->spec.micro_batches, (unsigned long long)(REGION_BYTES_MAX >> 40));
  return FLAP_OK;
}

static flap_program_spec program_spec(flap_setup_program program) {
  static const flap_program_spec specs[FLAP_SETUP_PROGRAM_COUNT] = {
      [FLAP_SETUP_FIRST] = {.kind = FLAP_PROGRAM_STEP},
      [FLAP_SETUP_STEADY] = {.kind = FLAP_PROGRAM_STEP, .pending = true},
      [FLAP_SETUP_LAST] = {.kind = FLAP_PROGRAM_STEP, .pending = true, .sweep = true},
      [FLAP_SETUP_SINGLE] = {.kind = FLAP_PROGRAM_STEP, .sweep = true},
      [FLAP_SETUP_SWEEP] = {.kind = FLAP_PROGRAM_SWEEP},
      [FLAP_SETUP_FORWARD] = {.kind = FLAP_PROGRAM_FORWARD},
      [FLAP_SETUP_DECODE] = {.kind = FLAP_PROGRAM_DECODE}};
  return specs[program];
}

/* Whether some part is updated neither in the backward nor in a sweep. */
static bool leaves_updates(const flap_setup *setup) {
  for (uint32_t part = 0; part < setup->layout.part_count; part++)
    if (!setup->choice.sweep && !flap_layout_in_backward(&setup->layout, part))
      return true;
  return false;
}

static void choose_programs(flap_setup *setup) {
  bool *has = setup->has_program;
  switch (setup->spec.mode) {
  case FLAP_MODE_TRAIN:
    has[FLAP_SETUP_SINGLE] = has[FLAP_SETUP_FORWARD] = true;
    has[FLAP_SETUP_FIRST] = has[FLAP_SETUP_STEADY] = has[FLAP_SETUP_LAST] = has[FLAP_SETUP_SWEEP] =
        leaves_updates(setup);

    setup->steady = flap_setup_folds(setup) ? FLAP_SETUP_STEADY : FLAP_SETUP_SINGLE;
    break;
  case FLAP_MODE_FORWARD:
    has[FLAP_SETUP_FORWARD] = true;
    setup->steady = FLAP_SETUP_FORWARD;
    break;
  case FLAP_MODE_SAMPLE:
    has[FLAP_SETUP_DECODE] = true;
    setup->steady = FLAP_SETUP_DECODE;
    break;
  }
}

flap_status flap_setup_list_program(flap_setup *setup, flap_setup_program program) {
  flap_program_spec spec = program_spec(program);
  flap_assert(setup->has_program[program]);
  spec.spread = spec.pending && setup->choice.spread;
  return setup->programs[program].ops_max > 0
             ? FLAP_OK
             : flap_program_build(&setup->layout, &spec, NULL, &setup->programs[program]);
}

flap_status flap_setup_list_programs(flap_setup *setup) {
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++)
    if (setup->has_program[i])
      FLAP_TRY(flap_setup_list_program(setup, (flap_setup_program)i));
  return FLAP_OK;
}

/* The steady one is listed, the others are counted. */
static flap_status count_programs(flap_setup *setup) {
  flap_program *programs = setup->programs;
  FLAP_TRY(flap_setup_list_program(setup, setup->steady));
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++) {
    const flap_program_spec spec = program_spec((flap_setup_program)i);
    const bool joined = flap_setup_folds(setup) && (i == FLAP_SETUP_LAST || i == FLAP_SETUP_SINGLE);
    if (setup->has_program[i] && i != (int)setup->steady && !joined)
      FLAP_TRY(flap_program_count(&setup->layout, &spec, NULL, &programs[i]));
  }
  if (flap_setup_folds(setup)) {
    flap_program_join(&programs[FLAP_SETUP_STEADY], &programs[FLAP_SETUP_SWEEP], &programs[FLAP_SETUP_LAST]);
    flap_program_join(&programs[FLAP_SETUP_FIRST], &programs[FLAP_SETUP_SWEEP], &programs[FLAP_SETUP_SINGLE]);
  }
  return FLAP_OK;
}

static bool moves_in(flap_lease_mode mode) {
  return mode == FLAP_LEASE_READ || mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CONSUME;
}

static bool moves_out(flap_lease_mode mode) {
  return mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CREATE;
}

static void measure_traffic(flap_setup *setup) {
  const flap_program *program = &setup->programs[setup->steady];
  const flap_layout *layout = &setup->layout;
  memset(setup->traffic, 0, sizeof setup->traffic);
  for (uint32_t i = 0; i < layout->region_count; i++) {
    const flap_layout_region *region = &layout->regions[i];
    setup->classes[region->klass].bytes += region->bytes;
    if (region->place == FLAP_PLACE_HOME)
      setup->passing_bytes[region->klass] += region->bytes;
    if (!setup_may_stay(region))
      continue;
    setup->region_counts[region->klass]++;
    setup->staying_bytes[region->klass] += region->bytes;
    if (region->bytes > setup->largest_bytes[region->klass])
      setup->largest_bytes[region->klass] = region->bytes;
  }
  for (uint32_t i = 0; i < program->lease_count; i++) {
    if (program->leases[i].host_bytes > 0)
      continue;
    const flap_layout_region *region = &layout->regions[program->leases[i].region];
    const flap_lease_mode mode = program->leases[i].mode;
    setup->traffic[region->klass] += (double)region->bytes * ((moves_in(mode) ? 1 : 0) + (moves_out(mode) ? 1 : 0));
  }
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    if (setup->staying_bytes[k] + setup->passing_bytes[k] > 0)
      setup->traffic[k] /= (double)(setup->staying_bytes[k] + setup->passing_bytes[k]);
}

/* ---- sizes ----------------------------------------------------------------------------------------------- */

/* Disks without room for a stripe are left out. */
void flap_setup_block_config(const flap_setup *setup, flap_block_config *config_out) {
  const uint64_t stripe = setup->choice.transfer_bytes;
  *config_out = (flap_block_config){.backend = setup->spec.io, .stripe_bytes = stripe};
  for (uint32_t i = 0; i < setup->spec.disk_count; i++) {
    const uint64_t bytes = setup->disk_sizes[i] / stripe * stripe;
    if (bytes > 0)
      config_out->disks[config_out->disk_count++] =
          (flap_block_disk){.path = setup->spec.disk_paths[i], .bytes = bytes, .weight = setup->spec.disk_weights[i]};
  }
}

/* What io/block takes for itself once it is open with these buffers; 0 as long as the disks are too small or not known.
 */
static uint64_t block_bytes(const flap_setup *setup) {
  flap_block_config config;
  flap_setup_block_config(setup, &config);
  uint64_t room = 0;
  for (uint32_t i = 0; i < config.disk_count; i++)
    room += config.disks[i].bytes;
  config.bytes = smaller(setup->sizes.disk_bytes, room);
  if (config.bytes == 0)
    return 0;
  config.requests_max = setup->choice.read_buffers + setup->choice.write_buffers + setup->sizes.snapshot_buffers;
  config.memory = (void *)(uintptr_t)FLAP_BLOCK_ALIGN; /* not touched: only counted */
  config.memory_bytes = setup->sizes.staging_bytes;
  const uint64_t bytes = flap_block_measure(&config);
  flap_assert(bytes > 0);
  return bytes;
}

/* A byte for each parameter, and no more than it takes to keep a disk busy: it does not depend on budgets. */
static uint64_t save_bytes(const flap_setup *setup) {
  uint64_t elements = 0;
  if (!setup->spec.saves_weights)
    return 0;
  for (uint32_t i = 0; i < setup->layout.part_count; i++)
    elements += setup->layout.parts[i].elements;
  const uint64_t bytes = flap_units_round_up(elements, FLAP_BLOCK_ALIGN);
  return bytes < SAVE_BYTES_MIN ? SAVE_BYTES_MIN : smaller(bytes, SAVE_BYTES_MAX);
}

void flap_setup_take_lists(flap_setup *setup, flap_arena *ram, flap_setup_lists *lists_out) {
  memset(lists_out, 0, sizeof *lists_out);
  flap_layout_build(&setup->layout.spec, ram, &lists_out->layout);
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++) {
    if (!setup->has_program[i])
      continue;
    lists_out->programs[i] = setup->programs[i];
    flap_program_place(&lists_out->programs[i], ram);
    if (!flap_arena_is_measuring(ram))
      setup->programs[i] = (flap_program){.spec = setup->programs[i].spec}; /* its lists were moved */
  }
  lists_out->trace = flap_trace_open(ram, setup->choice.trace_events);
  lists_out->save_bytes = save_bytes(setup);
  lists_out->save_memory = flap_arena_take(ram, lists_out->save_bytes, FLAP_BLOCK_ALIGN);
  if (flap_arena_is_measuring(ram))
    lists_out->layout = setup->layout;
}

/* What the run keeps in RAM behind the pager's memory, whose end is aligned for all of it. Only the trace is a matter
 * of placement. */
static uint64_t list_bytes(flap_setup *setup) {
  setup_places *places = setup->places;
  const uint32_t events = setup->choice.trace_events;
  const int which = events > 0;
  if (places->has_list_bytes[which] && places->list_events[which] == events)
    return places->list_bytes[which];
  flap_arena ram;
  flap_host_buffers host_buffers;
  flap_setup_lists lists;
  flap_arena_measure(&ram, "ram");
  flap_setup_take_lists(setup, &ram, &lists);
  flap_buffers_take_host(&setup->layout, setup->pager.leases_max, &ram, &host_buffers);
  if (setup->spec.reader_depth > 0) {
    flap_reader_config reader = {.sequence_length = setup->spec.shape.sequence,
                                 .sequences = setup->spec.shape.batch * setup->spec.micro_batches,
                                 .depth = setup->spec.reader_depth};
    (void)flap_arena_take(&ram, flap_reader_measure(&reader), 64);
  }
  places->has_list_bytes[which] = true;
  places->list_events[which] = events;
  places->list_bytes[which] = ram.bytes_used;
  return ram.bytes_used;
}

static void measure_scratch(flap_setup *setup) {
  flap_arena vram;
  flap_device_buffers buffers;
  flap_arena_measure(&vram, "vram");
  flap_buffers_take_device(&setup->layout, setup->spec.device, setup->spec.threads, &vram, &buffers);
  setup->vram_scratch_bytes = flap_units_round_up(vram.bytes_used, FLAP_BLOCK_ALIGN);
}

static void measure(flap_setup *setup) {
  flap_pager_totals totals;
  flap_pager_config *pager = &setup->pager;
  const flap_choice *choice = &setup->choice;
  pager->page_bytes = choice->page_bytes;
  pager->transfer_bytes = choice->transfer_bytes;
  pager->copy_bytes = flap_units_round_up(COPY_BYTES, choice->page_bytes);
  pager->read_buffers = choice->read_buffers;
  pager->write_buffers = choice->write_buffers;
  pager->workers = choice->workers;
  pager->compression = setup->spec.compression;
  pager->pool_bytes = choice->pool_bytes;
  pager->disk_rates = setup->spec.disk_rates;
  pager->shared_cores = setup->spec.shared_cores;
  pager->region_count = setup->layout.region_count;
  pager->regions = setup->regions;
  pager->rings = setup->rings;
  pager->leases_max = 1;
  pager->jobs_max = 0;
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++) {
    if (!setup->has_program[i])
      continue;
    if (setup->programs[i].lease_count > pager->leases_max)
      pager->leases_max = setup->programs[i].lease_count;
    if (setup->programs[i].job_count > pager->jobs_max)
      pager->jobs_max = setup->programs[i].job_count;
  }
  /* With something on disk and no buffers there is nothing to open: the sizes of homes are wanted all the same. */
  const bool staged = choice->read_buffers > 0 && choice->write_buffers > 0;
  if (!staged)
    pager->read_buffers = pager->write_buffers = 1;
  setup_total(setup, &totals);
  flap_pager_measure_totals(pager, &totals, &setup->sizes);
  if (!staged)
    pager->read_buffers = pager->write_buffers = 0;
  setup->vram_bytes = setup->sizes.vram_bytes + setup->vram_scratch_bytes + setup->spec.vram_overhead_bytes;
  setup->ram_arena_bytes = flap_units_round_up(setup->sizes.ram_bytes + list_bytes(setup), FLAP_BLOCK_ALIGN);
  setup->ram_bytes = setup->ram_arena_bytes + block_bytes(setup);
  setup->ram_other_bytes = setup->ram_bytes - setup->sizes.ram_bytes;
  setup->disk_bytes = flap_units_round_up(setup->sizes.disk_bytes, choice->transfer_bytes);
}

void flap_setup_set_disks(flap_setup *setup, const uint64_t disk_bytes[FLAP_BLOCK_DISKS_MAX]) {
  memcpy(setup->disk_sizes, disk_bytes, sizeof setup->disk_sizes);
  measure(setup);
}

/* ---- the other calls ------------------------------------------------------------------------------------- */

flap_status flap_setup_place(flap_setup *setup, const flap_choice *choice) {
  flap_assert(choice->segment_layers == setup->choice.segment_layers &&
              choice->group_micro_batches == setup->choice.group_micro_batches &&
              choice->saved_layers == setup->choice.saved_layers && choice->saved_mask == setup->choice.saved_mask &&
              choice->layerwise == setup->choice.layerwise && choice->sweep == setup->choice.sweep &&
              choice->spread == setup->choice.spread && choice->slice_elements == setup->choice.slice_elements &&
              choice->host_parts == setup->choice.host_parts &&
              choice->host_spares_first == setup->choice.host_spares_first &&
              choice->backward_parts == setup->choice.backward_parts &&
              choice->host_backward_parts == setup->choice.host_backward_parts);

  setup->choice = *choice;
  setup_lay_rings(setup);
  setup_lay_homes(setup);
  setup_sum_classes(setup);
  measure(setup);
  return FLAP_OK;
}

flap_status flap_setup_sketch(const flap_setup_spec *spec, const flap_choice *choice, flap_setup *setup_out) {
  memset(setup_out, 0, sizeof *setup_out);
  setup_out->spec = *spec;
  setup_out->choice = *choice;
  flap_status status = FLAP_OK;
  FLAP_TRY_GOTO(status, build_layout(setup_out));
  FLAP_TRY_GOTO(status, check_regions(&setup_out->layout));
  choose_programs(setup_out);
  FLAP_TRY_GOTO(status, count_programs(setup_out));
  const uint32_t regions = setup_out->layout.region_count;
  setup_out->resident = calloc(regions, sizeof *setup_out->resident);
  setup_out->regions = calloc(regions, sizeof *setup_out->regions);
  setup_out->rings = calloc(FLAP_CLASS_COUNT + setup_out->layout.part_count, sizeof *setup_out->rings);
  if (setup_out->resident == NULL || setup_out->regions == NULL || setup_out->rings == NULL ||
      setup_places_open(setup_out) == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "no memory to plan %u regions", regions);
    goto fail;
  }
  measure_traffic(setup_out);
  measure_scratch(setup_out);
  return flap_setup_place(setup_out, choice);
fail:
  flap_setup_close(setup_out);
  return status;
}

flap_status flap_setup_build(const flap_setup_spec *spec, const flap_choice *choice, flap_setup *setup_out) {
  FLAP_TRY(flap_setup_sketch(spec, choice, setup_out));
  const flap_status status = flap_setup_list_programs(setup_out);
  if (status != FLAP_OK)
    flap_setup_close(setup_out);
  return status;
}

void flap_setup_close(flap_setup *setup) {
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++)
    flap_program_close(&setup->programs[i]);
  free(setup->resident);
  free(setup->regions);
  free(setup->rings);
  setup_places_close(setup->places);
  setup->places = NULL;
  setup->resident = NULL;
  setup->regions = NULL;
  setup->rings = NULL;
  free(setup->layout_memory);
  setup->layout_memory = NULL;
}
