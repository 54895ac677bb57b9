/* Weights and states between regions and files.
 *
 * A region is a row of sections: a weights region is one section of weights, a states region is what
 * engine/step/layout.h says: what makes master weights, first and second moments. A section has a value for each
 * element, or for each block of some; then its list of tensors counts in blocks as well, and nothing below has to know.
 * The embedding's states may be of another format than those of the other parts; a file holds a section of all parts,
 * or of those that have it. The pager fills and drains regions in pieces; visit() cuts each piece at sections and
 * tensors and hands the runs to a function per section. Runs come in order, so every file is written front to back.
 */
#include "engine/store/weights.h"

#include "base/assert.h"
#include "base/philox.h"
#include "engine/store/weights_internal.h"
#include "io/formats/durable.h"

#include <stdlib.h>
#include <string.h>

/* ---- files of states --------------------------------------------------------------------------------------- */

/* Formats of states in one model: the embedding's, and that of all other parts. */
typedef enum states_of { STATES_OF_EMBEDDING, STATES_OF_REST, STATES_OF_COUNT } states_of;

/* A section of the states in a checkpoint. */
typedef struct state_file {
  const char *name;
  flap_safetensors_dtype dtype;
  flap_state_section section;
  bool in[STATES_OF_COUNT]; /* whose tensors it has */
  bool blocks;              /* a value for FLAP_OPS_MOMENT_BLOCK elements, not for one */
} state_file;

#define STATE_FILES_MAX (1 + 2 + 4)
#define MOMENT1_FILE "optimizer-exp_avg.safetensors"
#define MOMENT2_FILE "optimizer-exp_avg_sq.safetensors"

static bool has_codes(flap_optim optim, states_of which) {
  return flap_layout_has_codes(optim, which == STATES_OF_EMBEDDING ? FLAP_PART_EMBEDDING : FLAP_PART_LAYER);
}

/* Those of a run, in the order of their sections; returns how many. A tensor has moments in fp32 files or in those of
 * codes, never in both. */
static uint32_t list_state_files(flap_dtype weight_dtype, flap_optim optim, state_file files[STATE_FILES_MAX]) {
  static const state_file low = {FLAP_WEIGHTS_LOW_FILE, FLAP_SAFETENSORS_I16, FLAP_STATE_MASTER, {true, true}, false};
  static const state_file master = {
      FLAP_WEIGHTS_MASTER_FILE, FLAP_SAFETENSORS_F32, FLAP_STATE_MASTER, {true, true}, false};
  static const struct {
    state_file file;
    bool codes;
  } moments[] = {
      {{MOMENT1_FILE, FLAP_SAFETENSORS_F32, FLAP_STATE_MOMENT1, {false}, false}, false},
      {{MOMENT2_FILE, FLAP_SAFETENSORS_F32, FLAP_STATE_MOMENT2, {false}, false}, false},
      {{"optimizer-exp_avg-codes.safetensors", FLAP_SAFETENSORS_I8, FLAP_STATE_MOMENT1, {false}, false}, true},
      {{"optimizer-exp_avg_sq-codes.safetensors", FLAP_SAFETENSORS_U8, FLAP_STATE_MOMENT2, {false}, false}, true},
      {{"optimizer-exp_avg-largest.safetensors", FLAP_SAFETENSORS_F32, FLAP_STATE_LARGEST1, {false}, true}, true},
      {{"optimizer-exp_avg_sq-largest.safetensors", FLAP_SAFETENSORS_F32, FLAP_STATE_LARGEST2, {false}, true}, true}};
  uint32_t count = 0;
  if (weight_dtype != FLAP_F32)
    files[count++] = weight_dtype == FLAP_BF16 ? low : master;
  for (size_t i = 0; i < sizeof moments / sizeof *moments; i++) {
    state_file file = moments[i].file;
    for (int which = 0; which < STATES_OF_COUNT; which++)
      file.in[which] = has_codes(optim, (states_of)which) == moments[i].codes;
    if (file.in[STATES_OF_EMBEDDING] || file.in[STATES_OF_REST])
      files[count++] = file;
  }
  return count;
}

/* The tensors of all parts, of the embedding, and of the rest; these also in blocks. The second and third are views of
 * the first. */
typedef struct state_lists {
  flap_weights_list all, embedding, rest, rest_blocks;
} state_lists;

static flap_status open_lists(const flap_model_config *config, state_lists *lists_out) {
  *lists_out = (state_lists){0};
  FLAP_TRY(flap_weights_list_open(config, &lists_out->all));
  const flap_weights_list *all = &lists_out->all;
  lists_out->embedding = *all;
  lists_out->embedding.count = all->embedding_count;
  lists_out->rest = *all;
  lists_out->rest.tensors += all->embedding_count;
  lists_out->rest.count -= all->embedding_count;
  lists_out->rest.embedding_count = 0;
  return flap_weights_list_blocks(&lists_out->rest, FLAP_OPS_MOMENT_BLOCK, &lists_out->rest_blocks);
}

static void close_lists(state_lists *lists) {
  flap_weights_list_close(&lists->all);
  flap_weights_list_close(&lists->rest_blocks);
}

static const flap_weights_list *list_of(const state_lists *lists, const state_file *file) {
  if (!file->in[STATES_OF_REST])
    return &lists->embedding;
  if (file->in[STATES_OF_EMBEDDING])
    return &lists->all;
  return file->blocks ? &lists->rest_blocks : &lists->rest;
}

/* ---- visiting regions -------------------------------------------------------------------------------------- */

/* `count` values of a tensor from its value `first`, at `values`. `index` is the tensor's in the list. */
typedef flap_status (*run_fn)(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                              uint64_t count, void *values);

typedef struct section {
  run_fn run; /* NULL: nothing to do; filled with zeros */
  void *context;
  uint64_t value_bytes;
  const flap_model_tensor *tensors; /* of the part, in values */
  uint64_t tensor_count;
  uint64_t first_tensor; /* of the part, in the list */
  uint64_t first, count; /* values that the region has of the part */
} section;

#define SECTIONS_MAX FLAP_STATE_SECTION_COUNT

typedef struct visit_region {
  section sections[SECTIONS_MAX];
  flap_pool *pool; /* that clears what is filled; may be NULL */
} visit_region;

static uint64_t min_of(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

static uint64_t max_of(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

/* Values [begin, end) of the part, which start at `memory`. */
static flap_status visit_values(const section *s, uint64_t begin, uint64_t end, char *memory) {
  for (uint64_t i = 0; i < s->tensor_count; i++) {
    const flap_model_tensor *tensor = &s->tensors[i];
    const uint64_t from = max_of(begin, tensor->offset), to = min_of(end, tensor->offset + tensor->elements);
    if (from < to)
      FLAP_TRY(s->run(s->context, s->first_tensor + i, tensor, from - tensor->offset, to - from,
                      memory + (from - begin) * s->value_bytes));
  }
  return FLAP_OK;
}

static flap_status visit(const visit_region *region, uint64_t offset, uint64_t bytes, char *memory) {
  uint64_t start = 0; /* of the section */
  for (uint32_t i = 0; i < SECTIONS_MAX; i++) {
    const section *s = &region->sections[i];
    const uint64_t length = s->count * s->value_bytes;
    const uint64_t from = max_of(offset, start), to = min_of(offset + bytes, start + length);
    if (from < to && s->run != NULL) {
      /* Pieces, sections and values all end at multiples of a value's size. */
      flap_assert((from - start) % s->value_bytes == 0 && (to - start) % s->value_bytes == 0);
      const uint64_t first = s->first + (from - start) / s->value_bytes;
      FLAP_TRY(visit_values(s, first, first + (to - from) / s->value_bytes, memory + (from - offset)));
    }
    start += length;
  }
  return FLAP_OK;
}

#define CLEAR_BYTES ((uint64_t)256 << 10) /* that one thread clears at a time */

typedef struct clearing {
  unsigned char *memory;
  uint64_t bytes;
} clearing;

static void clear_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const clearing *c = context;
  const uint64_t at = item * CLEAR_BYTES;
  memset(c->memory + at, 0, min_of(c->bytes - at, CLEAR_BYTES));
}

static void clear(flap_pool *pool, void *memory, uint64_t bytes) {
  clearing c = {memory, bytes};
  if (pool != NULL && bytes > CLEAR_BYTES)
    flap_pool_run(pool, (bytes + CLEAR_BYTES - 1) / CLEAR_BYTES, clear_item, &c);
  else
    memset(memory, 0, bytes);
}

static flap_status fill_piece(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  const visit_region *region = context;
  clear(region->pool, memory, bytes);
  return visit(region, offset, bytes, memory);
}

static flap_status drain_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  return visit(context, offset, bytes, (char *)(uintptr_t)memory); /* sections that drain only read */
}

/* The part's tensors in a list that has them. */
static void give_tensors(const flap_layout *layout, const flap_weights_list *list, const flap_layout_part *part,
                         section *s) {
  if (part->kind == FLAP_PART_LAYER) {
    s->tensor_count = list->layer_count;
    s->first_tensor = list->embedding_count + part->layer * list->layer_count;
  } else if (part->kind == FLAP_PART_EMBEDDING) {
    s->tensor_count = list->embedding_count;
    s->first_tensor = 0;
  } else {
    s->first_tensor = list->embedding_count + layout->spec.model->num_hidden_layers * list->layer_count;
    s->tensor_count = list->count - s->first_tensor;
  }
  s->tensors = &list->tensors[s->first_tensor];
}

/* The weights regions of all parts, through one function. */
static flap_status visit_weights(flap_pager *pager, const flap_layout *layout, const flap_weights_list *list, bool fill,
                                 run_fn run, void *context) {
  const uint64_t value_bytes = flap_dtype_bytes(layout->spec.shape.dtype);
  for (uint32_t i = 0; i < layout->part_count; i++) {
    visit_region region = {
        .sections = {{.run = run, .context = context, .value_bytes = value_bytes, .count = layout->parts[i].elements}},
        .pool = flap_device_pool(flap_pager_device(pager))};
    give_tensors(layout, list, &layout->parts[i], &region.sections[0]);
    const uint32_t index = layout->parts[i].weights;
    FLAP_TRY(fill ? flap_pager_fill(pager, index, fill_piece, &region)
                  : flap_pager_drain(pager, index, drain_piece, &region));
  }
  return FLAP_OK;
}

/* What is done with a section of the states, and the list of the tensors among which its own are. */
typedef struct section_visit {
  run_fn run; /* NULL: nothing */
  void *context;
  const flap_weights_list *list;
} section_visit;

typedef struct states_visit {
  section_visit sections[STATES_OF_COUNT][FLAP_STATE_SECTION_COUNT];
} states_visit;

/* Wherever the file has the section. */
static void give_visit(states_visit *v, const state_file *file, section_visit visit) {
  for (int which = 0; which < STATES_OF_COUNT; which++)
    if (file->in[which])
      v->sections[which][file->section] = visit;
}

static flap_status visit_slice(flap_pager *pager, const flap_layout *layout, const flap_layout_slice *slice, bool fill,
                               const states_visit *v) {
  const flap_layout_part *part = &layout->parts[slice->part];
  const section_visit *visits = v->sections[part->kind == FLAP_PART_EMBEDDING ? STATES_OF_EMBEDDING : STATES_OF_REST];
  const flap_state_format *format = &layout->state_formats[part->kind];
  visit_region region = {.sections = {{0}}, .pool = flap_device_pool(flap_pager_device(pager))};
  for (uint32_t i = 0; i < FLAP_STATE_SECTION_COUNT; i++) {
    const uint64_t value_elements = format->sections[i].value_elements;
    region.sections[i] = (section){.run = visits[i].run,
                                   .context = visits[i].context,
                                   .value_bytes = format->sections[i].value_bytes,
                                   .first = slice->first_element / value_elements,
                                   .count = slice->elements / value_elements};
    if (visits[i].run != NULL)
      give_tensors(layout, visits[i].list, part, &region.sections[i]);
  }
  return fill ? flap_pager_fill(pager, slice->states, fill_piece, &region)
              : flap_pager_drain(pager, slice->states, drain_piece, &region);
}

static flap_status visit_states(flap_pager *pager, const flap_layout *layout, bool fill, const states_visit *v) {
  for (uint32_t i = 0; i < layout->slice_count; i++)
    FLAP_TRY(visit_slice(pager, layout, &layout->slices[i], fill, v));
  return FLAP_OK;
}

/* Masters are filled in by `run`, moments are zero. */
static flap_status start_states(flap_pager *pager, const flap_layout *layout, const flap_weights_list *list, run_fn run,
                                void *context) {
  const section_visit master = {run, context, list};
  const states_visit v = {
      .sections = {[STATES_OF_EMBEDDING][FLAP_STATE_MASTER] = master, [STATES_OF_REST][FLAP_STATE_MASTER] = master}};
  return visit_states(pager, layout, true, &v);
}

/* ---- from scratch ------------------------------------------------------------------------------------------ */

#define INIT_ITEM ((uint64_t)8192) /* elements that one thread makes at a time */

typedef struct init_context {
  uint64_t seed;
  double range;
  flap_dtype dtype;
  flap_pool *pool; /* may be NULL */
  float *values;   /* INIT_ITEM of each worker */
  /* the run in work */
  const flap_model_tensor *tensor;
  uint64_t first, count;
  void *to;
  bool master; /* what the states have of the weight, not the weight itself */
} init_context;

static void init_values(const init_context *init, uint64_t first, uint64_t count, float *values) {
  if (init->tensor->init != FLAP_INIT_NORMAL) {
    for (uint64_t i = 0; i < count; i++)
      values[i] = init->tensor->init == FLAP_INIT_ONES ? 1.0f : 0.0f;
    return;
  }
  const flap_philox stream = flap_philox_stream(init->seed, init->tensor->name);
  flap_philox_normals(&stream, first, count, values);
  for (uint64_t i = 0; i < count; i++)
    values[i] = (float)(init->range * (double)values[i]);
}

/* A value is a function of its tensor and place alone, so it does not matter who makes it. */
static void init_item(void *context, uint64_t item, uint32_t worker) {
  const init_context *init = context;
  const uint64_t done = item * INIT_ITEM, chunk = min_of(init->count - done, INIT_ITEM);
  if (init->dtype == FLAP_F32 || (init->dtype == FLAP_F16 && init->master)) {
    init_values(init, init->first + done, chunk, (float *)init->to + done);
    return;
  }
  float *values = init->values + worker * INIT_ITEM;
  init_values(init, init->first + done, chunk, values);
  /* A normal value is below 9, initializer_range below 100: everything fits. */
  const uint64_t good = init->dtype == FLAP_F16 ? flap_values_to_f16(values, chunk, (uint16_t *)init->to + done)
                        : init->master          ? flap_values_to_low(values, chunk, (int16_t *)init->to + done)
                                                : flap_values_to_high(values, chunk, (uint16_t *)init->to + done);
  flap_assert(good == chunk);
}

static flap_status init_run(init_context *init, const flap_model_tensor *tensor, uint64_t first, uint64_t count,
                            void *values, bool master) {
  if (master && init->dtype == FLAP_BF16 && tensor->init != FLAP_INIT_NORMAL)
    return FLAP_OK; /* ones and zeros have no low half */
  init->tensor = tensor;
  init->first = first;
  init->count = count;
  init->to = values;
  init->master = master;
  const uint64_t items = (count + INIT_ITEM - 1) / INIT_ITEM;
  if (init->pool != NULL && items > 1) {
    flap_pool_run(init->pool, items, init_item, init);
    return FLAP_OK;
  }
  for (uint64_t i = 0; i < items; i++)
    init_item(init, i, 0);
  return FLAP_OK;
}

static flap_status init_weights_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                    uint64_t count, void *values) {
  (void)index;
  return init_run(context, tensor, first, count, values, false);
}

static flap_status init_master_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                   uint64_t count, void *values) {
  (void)index;
  return init_run(context, tensor, first, count, values, true);
}

flap_status flap_weights_init(flap_pager *pager, const flap_layout *layout, uint64_t seed) {
  flap_weights_list list = {0};
  init_context init = {.seed = seed, .range = layout->spec.model->initializer_range, .dtype = layout->spec.shape.dtype};
  flap_status status;
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  init.pool = flap_device_pool(flap_pager_device(pager));
  init.values = malloc((init.pool != NULL ? flap_pool_threads(init.pool) : 1) * INIT_ITEM * sizeof(float));
  if (init.values == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "no memory to make weights");
    goto fail;
  }
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &list, true, init_weights_run, &init));
  FLAP_TRY_GOTO(status, start_states(pager, layout, &list, init_master_run, &init));
fail:
  free(init.values);
  flap_weights_list_close(&list);
  return status;
}

/* ---- from a folder ----------------------------------------------------------------------------------------- */

typedef struct load_context {
  flap_weights_source source;
  flap_dtype dtype;
} load_context;

/* Values that the region holds as the file does: read in place. */
static flap_status load_same(load_context *load, uint64_t index, uint64_t first, uint64_t count, void *values) {
  FLAP_TRY(flap_weights_source_read(&load->source, index, first, count, values));
  const uint64_t good = flap_values_check(load->dtype, values, count);
  return good == count ? FLAP_OK : flap_weights_source_numeric(&load->source, index, first + good, load->dtype);
}

static flap_status load_weights_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                    uint64_t count, void *values) {
  (void)tensor;
  load_context *load = context;
  if (load->source.tensors[index]->dtype == flap_safetensors_from_flap_dtype(load->dtype))
    return load_same(load, index, first, count, values);
  for (uint64_t done = 0; done < count; done += FLAP_WEIGHTS_CHUNK) {
    const uint64_t chunk = min_of(count - done, FLAP_WEIGHTS_CHUNK);
    FLAP_TRY(flap_weights_source_values(&load->source, index, first + done, chunk));
    uint64_t good = chunk;
    if (load->dtype == FLAP_F32)
      memcpy((float *)values + done, load->source.values, chunk * sizeof(float));
    else if (load->dtype == FLAP_F16)
      good = flap_values_to_f16(load->source.values, chunk, (uint16_t *)values + done);
    else
      good = flap_values_to_high(load->source.values, chunk, (uint16_t *)values + done);
    if (good != chunk)
      return flap_weights_source_numeric(&load->source, index, first + done + good, load->dtype);
  }
  return FLAP_OK;
}

/* The file's value is the master weight, exactly. That it fits was seen when the weight was loaded. */
static flap_status load_master_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                   uint64_t count, void *values) {
  (void)tensor;
  load_context *load = context;
  if (load->dtype == FLAP_BF16 && load->source.tensors[index]->dtype == FLAP_SAFETENSORS_BF16)
    return FLAP_OK; /* the master is the bf16 value: zeros */
  for (uint64_t done = 0; done < count; done += FLAP_WEIGHTS_CHUNK) {
    const uint64_t chunk = min_of(count - done, FLAP_WEIGHTS_CHUNK);
    FLAP_TRY(flap_weights_source_values(&load->source, index, first + done, chunk));
    if (load->dtype == FLAP_F16) {
      memcpy((float *)values + done, load->source.values, chunk * sizeof(float));
      continue;
    }
    const uint64_t good = flap_values_to_low(load->source.values, chunk, (int16_t *)values + done);
    if (good != chunk)
      return flap_weights_source_numeric(&load->source, index, first + done + good, load->dtype);
  }
  return FLAP_OK;
}

flap_status flap_weights_load(flap_pager *pager, const flap_layout *layout, const char *folder) {
  flap_weights_list list = {0};
  flap_checksums checksums = {0};
  load_context load = {.dtype = layout->spec.shape.dtype};
  flap_status status;
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  FLAP_TRY_GOTO(status, flap_weights_source_open(layout->spec.model, &list, folder, FLAP_WANTED_ANY_FLOAT,
                                                 FLAP_SAFETENSORS_F32, &load.source));
  FLAP_TRY_GOTO(status, flap_weights_verify_model_begin(&load.source, folder, &checksums));
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &list, true, load_weights_run, &load));
  FLAP_TRY_GOTO(status, flap_weights_verify_model_end(&load.source, folder));
  FLAP_TRY_GOTO(status, start_states(pager, layout, &list, load_master_run, &load));
fail:
  flap_weights_source_close(&load.source);
  flap_checksums_close(&checksums);
  flap_weights_list_close(&list);
  return status;
}

flap_status flap_weights_check(const flap_model_config *config, const char *folder) {
  flap_weights_list list = {0};
  flap_weights_source source = {0};
  flap_status status = flap_weights_list_open(config, &list);
  if (status == FLAP_OK)
    status = flap_weights_source_open(config, &list, folder, FLAP_WANTED_ANY_FLOAT, FLAP_SAFETENSORS_F32, &source);
  flap_weights_source_close(&source);
  flap_weights_list_close(&list);
  return status;
}

/* ---- saving ------------------------------------------------------------------------------------------------ */

static flap_status save_weights_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                    uint64_t count, void *values) {
  (void)index, (void)tensor, (void)first;
  flap_weights_target *target = context;
  return flap_weights_target_write(target, values, count * flap_dtype_bytes(target->dtype));
}

static flap_status begin_weights(const flap_layout *layout, const flap_weights_list *list, const char *folder,
                                 uint64_t shard_bytes_max, flap_file_piece piece, flap_checksums *checksums,
                                 flap_weights_target *target_out) {
  FLAP_TRY(flap_weights_target_begin(list, folder, layout->spec.shape.dtype, shard_bytes_max, target_out));
  target_out->checksums = checksums;
  target_out->piece = piece;
  return FLAP_OK;
}

flap_status flap_weights_save(flap_pager *pager, const flap_layout *layout, const char *folder,
                              uint64_t shard_bytes_max, flap_file_piece piece, flap_checksums *checksums) {
  flap_weights_list list = {0};
  flap_weights_target target = {0};
  flap_status status;
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  FLAP_TRY_GOTO(status, begin_weights(layout, &list, folder, shard_bytes_max, piece, checksums, &target));
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &list, false, save_weights_run, &target));
  status = flap_weights_target_end(&target);
fail:
  flap_weights_target_abort(&target);
  flap_weights_list_close(&list);
  return status;
}

/* A file that is being written, of values of so many bytes. */
typedef struct save_context {
  flap_safetensors_writer *writer;
  uint64_t value_bytes;
} save_context;

static flap_status save_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                            uint64_t count, void *values) {
  (void)index, (void)tensor, (void)first;
  const save_context *save = context;
  return flap_safetensors_write(save->writer, values, count * save->value_bytes);
}

/* What has a value for a block of elements alone is small: it goes through the cache, and leaves the others' blocks
 * alone. */
static flap_status begin_files(const flap_layout *layout, const state_lists *lists, const char *folder,
                               flap_file_piece piece, flap_checksums *checksums, save_context saves[STATE_FILES_MAX],
                               states_visit *v) {
  state_file files[STATE_FILES_MAX];
  const flap_file_piece cached = {.room = piece.room};
  const uint32_t count = list_state_files(layout->spec.shape.dtype, layout->spec.optim, files);
  for (uint32_t i = 0; i < count; i++) {
    const flap_weights_list *list = list_of(lists, &files[i]);
    FLAP_TRY(flap_weights_file_begin(list, folder, files[i].name, files[i].dtype, files[i].blocks ? cached : piece,
                                     &saves[i].writer));
    flap_safetensors_write_sum(saves[i].writer, checksums);
    saves[i].value_bytes = flap_safetensors_dtype_bytes(files[i].dtype);
    give_visit(v, &files[i], (section_visit){save_run, &saves[i], list});
  }
  return FLAP_OK;
}

static flap_status end_files(save_context saves[STATE_FILES_MAX]) {
  for (uint32_t i = 0; i < STATE_FILES_MAX; i++) {
    flap_safetensors_writer *writer = saves[i].writer;
    saves[i].writer = NULL;
    if (writer != NULL)
      FLAP_TRY(flap_safetensors_write_end(writer));
  }
  return FLAP_OK;
}

/* Beside training the states of a part are there once it was updated, and are what the next update waits for. Its
 * weights may be in use until the program ends, and have the least bytes: they come last, and their files end first. */
static flap_status save_values(flap_pager *pager, const flap_layout *layout, const flap_weights_list *list,
                               flap_weights_target *target, const states_visit *v) {
  FLAP_TRY(visit_states(pager, layout, false, v));
  return visit_weights(pager, layout, list, false, save_weights_run, target);
}

/* All writers are open at once, so that each region is read once. */
flap_status flap_weights_save_all(flap_pager *pager, const flap_layout *layout, const char *folder,
                                  uint64_t shard_bytes_max, flap_file_piece piece, flap_checksums *checksums) {
  state_lists lists;
  flap_weights_target target = {0};
  save_context saves[STATE_FILES_MAX] = {{0}};
  states_visit v = {.sections = {{{0}}}};
  flap_status status;
  flap_assert(layout->spec.mode == FLAP_MODE_TRAIN);
  FLAP_TRY_GOTO(status, open_lists(layout->spec.model, &lists));
  FLAP_TRY_GOTO(status, begin_weights(layout, &lists.all, folder, shard_bytes_max, piece, checksums, &target));
  FLAP_TRY_GOTO(status, begin_files(layout, &lists, folder, piece, checksums, saves, &v));
  FLAP_TRY_GOTO(status, save_values(pager, layout, &lists.all, &target, &v));
  FLAP_TRY_GOTO(status, flap_weights_target_end(&target));
  status = end_files(saves);
fail:
  flap_weights_target_abort(&target);
  for (uint32_t i = 0; i < STATE_FILES_MAX; i++)
    flap_safetensors_write_abort(saves[i].writer);
  close_lists(&lists);
  return status;
}

/* ---- resuming ---------------------------------------------------------------------------------------------- */

static flap_status resume_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                              uint64_t count, void *values) {
  (void)tensor;
  return flap_weights_source_read(context, index, first, count, values);
}

/* Of the states of adamw_8bit: a checkpoint whose embedding has 8-bit moments like everything else has no such file. */
static flap_status without_fp32_moments(const char *path) {
  return flap_error_set(FLAP_NOT_FOUND,
                        "%s: there is no such file, but adamw_8bit keeps the embedding's moments in fp32, there: a "
                        "checkpoint that has them in 8 bits, or not at all, cannot be resumed; give it as "
                        "model_name_or_path to start anew from its weights",
                        path);
}

static flap_status open_states_file(const flap_layout *layout, const flap_weights_list *list, const state_file *file,
                                    const char *folder, const flap_checksums *checksums,
                                    flap_weights_source *source_out) {
  char path[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, file->name));
  const flap_status status =
      flap_weights_source_open(layout->spec.model, list, path, FLAP_WANTED_EXACTLY, file->dtype, source_out);
  if (status == FLAP_NOT_FOUND && !file->in[STATES_OF_REST])
    return without_fp32_moments(path);
  FLAP_TRY(status);
  return flap_weights_verify_begin(source_out, checksums);
}

/* NULL where the folder has files of states. */
static flap_status open_pages(const flap_layout *layout, const char *folder, flap_state_pages **pages_out) {
  const flap_status status = flap_state_pages_open(folder, pages_out);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    return FLAP_OK;
  }
  FLAP_TRY(status);
  return flap_state_pages_check(*pages_out, layout->spec.model, layout->spec.shape.dtype, layout->spec.optim);
}

/* `pages`: where all sections are; NULL: each is in a file. */
static flap_status open_states(const flap_layout *layout, const state_lists *lists, const char *folder,
                               const flap_checksums *checksums, flap_state_pages *pages,
                               flap_weights_source sources[STATE_FILES_MAX], states_visit *v) {
  state_file files[STATE_FILES_MAX];
  const uint32_t count = list_state_files(layout->spec.shape.dtype, layout->spec.optim, files);
  for (uint32_t i = 0; i < count; i++) {
    const flap_weights_list *list = list_of(lists, &files[i]);
    FLAP_TRY(pages != NULL ? flap_weights_source_open_pages(list, pages, files[i].section, files[i].dtype, &sources[i])
                           : open_states_file(layout, list, &files[i], folder, checksums, &sources[i]));
    give_visit(v, &files[i], (section_visit){resume_run, &sources[i], list});
  }
  return FLAP_OK;
}

flap_status flap_weights_resume(flap_pager *pager, const flap_layout *layout, const char *folder,
                                const flap_checksums *checksums) {
  const flap_dtype dtype = layout->spec.shape.dtype;
  state_lists lists;
  flap_weights_source weights = {0}, states[STATE_FILES_MAX] = {{0}};
  flap_state_pages *pages = NULL;
  states_visit v = {.sections = {{{0}}}};
  flap_status status;
  flap_assert(layout->spec.mode == FLAP_MODE_TRAIN);
  FLAP_TRY_GOTO(status, open_lists(layout->spec.model, &lists));
  FLAP_TRY_GOTO(status, flap_weights_source_open(layout->spec.model, &lists.all, folder, FLAP_WANTED_EXACTLY,
                                                 flap_safetensors_from_flap_dtype(dtype), &weights));
  FLAP_TRY_GOTO(status, flap_weights_verify_begin(&weights, checksums));
  FLAP_TRY_GOTO(status, open_pages(layout, folder, &pages));
  FLAP_TRY_GOTO(status, open_states(layout, &lists, folder, checksums, pages, states, &v));
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &lists.all, true, resume_run, &weights));
  FLAP_TRY_GOTO(status, flap_weights_verify_end(&weights));
  FLAP_TRY_GOTO(status, visit_states(pager, layout, true, &v));
  for (uint32_t i = 0; i < STATE_FILES_MAX; i++)
    FLAP_TRY_GOTO(status, flap_weights_verify_end(&states[i]));
fail:
  for (uint32_t i = 0; i < STATE_FILES_MAX; i++)
    flap_weights_source_close(&states[i]);
  flap_state_pages_close(pages);
  flap_weights_source_close(&weights);
  close_lists(&lists);
  return status;
}

/* ---- sizes ------------------------------------------------------------------------------------------------- */

flap_status flap_weights_file_bytes(const flap_model_config *config, flap_dtype dtype, uint64_t shard_bytes_max,
                                    uint64_t *bytes_out) {
  flap_weights_list list = {0};
  flap_status status = flap_weights_list_open(config, &list);
  if (status == FLAP_OK)
    status = flap_weights_measure_target(&list, dtype, shard_bytes_max, bytes_out);
  flap_weights_list_close(&list);
  return status;
}

flap_status flap_weights_states_bytes(const flap_model_config *config, flap_dtype dtype, flap_optim optim,
                                      uint64_t *bytes_out) {
  state_file files[STATE_FILES_MAX];
  const uint32_t count = list_state_files(dtype, optim, files);
  state_lists lists;
  flap_status status = open_lists(config, &lists);
  *bytes_out = 0;
  for (uint32_t i = 0; i < count && status == FLAP_OK; i++) {
    uint64_t file_bytes = 0;
    status = flap_weights_measure_file(list_of(&lists, &files[i]), files[i].dtype, &file_bytes);
    *bytes_out += file_bytes;
  }
  close_lists(&lists);
  return status;
}
