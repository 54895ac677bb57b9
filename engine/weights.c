/* Weights and states between regions and files.
 *
 * A region is a row of sections of equal length in elements: a weights region is one section of weights, a states
 * region is what engine/layout.h says: what makes master weights, first and second moments. The pager fills and drains
 * regions in pieces; visit() cuts each piece at sections and tensors and hands the runs to a function per section. Runs
 * come in order, so every file is written front to back.
 */
#include "engine/weights.h"

#include "base/assert.h"
#include "base/philox.h"
#include "engine/weights_internal.h"
#include "io/formats/durable.h"

#include <stdlib.h>
#include <string.h>

#define STATE_SECTIONS 3u
typedef enum state_section { STATE_MASTER, STATE_MOMENT1, STATE_MOMENT2 } state_section;

/* Where a section of the states is in a checkpoint. */
typedef struct state_file {
  const char *name; /* NULL: the format has no such section */
  flap_safetensors_dtype dtype;
} state_file;

static state_file state_file_of(flap_dtype weight_dtype, uint32_t section) {
  if (section == STATE_MOMENT1)
    return (state_file){"optimizer-exp_avg.safetensors", FLAP_SAFETENSORS_F32};
  if (section == STATE_MOMENT2)
    return (state_file){"optimizer-exp_avg_sq.safetensors", FLAP_SAFETENSORS_F32};
  if (weight_dtype == FLAP_BF16)
    return (state_file){FLAP_WEIGHTS_LOW_FILE, FLAP_SAFETENSORS_I16};
  if (weight_dtype == FLAP_F16)
    return (state_file){FLAP_WEIGHTS_MASTER_FILE, FLAP_SAFETENSORS_F32};
  return (state_file){NULL, FLAP_SAFETENSORS_F32};
}

/* ---- visiting regions -------------------------------------------------------------------------------------- */

/* `count` elements of a tensor from its element `first`, at `values`. `index` is the tensor's in the list. */
typedef flap_status (*run_fn)(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                              uint64_t count, void *values);

typedef struct section {
  run_fn run; /* NULL: nothing to do; filled with zeros */
  void *context;
  uint64_t element_bytes;
} section;

typedef struct visit_region {
  const flap_model_tensor *tensors; /* of the part */
  uint64_t tensor_count, first_tensor;
  uint64_t first_element, elements; /* of the part, in each section */
  section sections[STATE_SECTIONS];
} visit_region;

static uint64_t min_of(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

static uint64_t max_of(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

/* Elements [begin, end) of the part, whose values start at `memory`. */
static flap_status visit_elements(const visit_region *region, const section *s, uint64_t begin, uint64_t end,
                                  char *memory) {
  for (uint64_t i = 0; i < region->tensor_count; i++) {
    const flap_model_tensor *tensor = &region->tensors[i];
    const uint64_t from = max_of(begin, tensor->offset), to = min_of(end, tensor->offset + tensor->elements);
    if (from < to)
      FLAP_TRY(s->run(s->context, region->first_tensor + i, tensor, from - tensor->offset, to - from,
                      memory + (from - begin) * s->element_bytes));
  }
  return FLAP_OK;
}

static flap_status visit(const visit_region *region, uint64_t offset, uint64_t bytes, char *memory) {
  uint64_t start = 0; /* of the section */
  for (uint32_t i = 0; i < STATE_SECTIONS; i++) {
    const section *s = &region->sections[i];
    const uint64_t length = region->elements * s->element_bytes;
    const uint64_t from = max_of(offset, start), to = min_of(offset + bytes, start + length);
    if (from < to && s->run != NULL) {
      /* Pieces, sections and elements all end at multiples of an element's size. */
      flap_assert((from - start) % s->element_bytes == 0 && (to - start) % s->element_bytes == 0);
      const uint64_t first = region->first_element + (from - start) / s->element_bytes;
      FLAP_TRY(visit_elements(region, s, first, first + (to - from) / s->element_bytes, memory + (from - offset)));
    }
    start += length;
  }
  return FLAP_OK;
}

static flap_status fill_piece(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  memset(memory, 0, bytes);
  return visit(context, offset, bytes, memory);
}

static flap_status drain_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  return visit(context, offset, bytes, (char *)(uintptr_t)memory); /* sections that drain only read */
}

static visit_region part_of(const flap_layout *layout, const flap_weights_list *list, uint32_t index) {
  const flap_layout_part *part = &layout->parts[index];
  visit_region region = {.elements = part->elements};
  if (part->kind == FLAP_PART_LAYER) {
    region.tensor_count = list->layer_count;
    region.first_tensor = list->embedding_count + part->layer * list->layer_count;
  } else if (part->kind == FLAP_PART_EMBEDDING) {
    region.tensor_count = list->embedding_count;
  } else {
    region.first_tensor = list->embedding_count + layout->spec.model->num_hidden_layers * list->layer_count;
    region.tensor_count = list->count - region.first_tensor;
  }
  region.tensors = &list->tensors[region.first_tensor];
  return region;
}

/* The weights regions of all parts, through one function. */
static flap_status visit_weights(flap_pager *pager, const flap_layout *layout, const flap_weights_list *list, bool fill,
                                 run_fn run, void *context) {
  const uint64_t element_bytes = flap_dtype_bytes(layout->spec.shape.dtype);
  for (uint32_t i = 0; i < layout->part_count; i++) {
    visit_region region = part_of(layout, list, i);
    region.sections[0] = (section){run, context, element_bytes};
    const uint32_t index = layout->parts[i].weights;
    FLAP_TRY(fill ? flap_pager_fill(pager, index, fill_piece, &region)
                  : flap_pager_drain(pager, index, drain_piece, &region));
  }
  return FLAP_OK;
}

/* The states of all slices, through a function and a context per section. */
static flap_status visit_states(flap_pager *pager, const flap_layout *layout, const flap_weights_list *list, bool fill,
                                const run_fn runs[STATE_SECTIONS], void *const contexts[STATE_SECTIONS]) {
  const flap_state_format format = flap_layout_state_format(layout->spec.shape.dtype);
  for (uint32_t i = 0; i < layout->slice_count; i++) {
    const flap_layout_slice *slice = &layout->slices[i];
    visit_region region = part_of(layout, list, slice->part);
    region.first_element = slice->first_element;
    region.elements = slice->elements;
    region.sections[STATE_MASTER] = (section){runs[STATE_MASTER], contexts[STATE_MASTER], format.master_bytes};
    region.sections[STATE_MOMENT1] = (section){runs[STATE_MOMENT1], contexts[STATE_MOMENT1], format.moment1_bytes};
    region.sections[STATE_MOMENT2] = (section){runs[STATE_MOMENT2], contexts[STATE_MOMENT2], format.moment2_bytes};
    FLAP_TRY(fill ? flap_pager_fill(pager, slice->states, fill_piece, &region)
                  : flap_pager_drain(pager, slice->states, drain_piece, &region));
  }
  return FLAP_OK;
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
  FLAP_TRY_GOTO(status, visit_states(pager, layout, &list, true, (run_fn[]){init_master_run, NULL, NULL},
                                     (void *[]){&init, NULL, NULL}));
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
  load_context load = {.dtype = layout->spec.shape.dtype};
  flap_status status;
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  FLAP_TRY_GOTO(status, flap_weights_source_open(layout->spec.model, &list, folder, FLAP_WANTED_ANY_FLOAT,
                                                 FLAP_SAFETENSORS_F32, &load.source));
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &list, true, load_weights_run, &load));
  FLAP_TRY_GOTO(status, visit_states(pager, layout, &list, true, (run_fn[]){load_master_run, NULL, NULL},
                                     (void *[]){&load, NULL, NULL}));
fail:
  flap_weights_source_close(&load.source);
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

flap_status flap_weights_save(flap_pager *pager, const flap_layout *layout, const char *folder,
                              uint64_t shard_bytes_max) {
  flap_weights_list list = {0};
  flap_weights_target target = {0};
  flap_status status;
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  FLAP_TRY_GOTO(status, flap_weights_target_begin(&list, folder, layout->spec.shape.dtype, shard_bytes_max, &target));
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &list, false, save_weights_run, &target));
  status = flap_weights_target_end(&target);
fail:
  flap_weights_target_abort(&target);
  flap_weights_list_close(&list);
  return status;
}

static flap_status save_i16_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                uint64_t count, void *values) {
  (void)index, (void)tensor, (void)first;
  return flap_safetensors_write(context, values, count * sizeof(int16_t));
}

static flap_status save_f32_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                                uint64_t count, void *values) {
  (void)index, (void)tensor, (void)first;
  return flap_safetensors_write(context, values, count * sizeof(float));
}

/* Three writers are open at once, so that each region is read once. */
flap_status flap_weights_save_states(flap_pager *pager, const flap_layout *layout, const char *folder) {
  const flap_dtype dtype = layout->spec.shape.dtype;
  flap_weights_list list = {0};
  flap_safetensors_writer *writers[STATE_SECTIONS] = {0};
  run_fn runs[STATE_SECTIONS] = {0};
  flap_status status;
  flap_assert(layout->spec.mode == FLAP_MODE_TRAIN);
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  for (uint32_t i = 0; i < STATE_SECTIONS; i++) {
    const state_file file = state_file_of(dtype, i);
    if (file.name == NULL)
      continue;
    FLAP_TRY_GOTO(status, flap_weights_file_begin(&list, folder, file.name, file.dtype, &writers[i]));
    runs[i] = file.dtype == FLAP_SAFETENSORS_I16 ? save_i16_run : save_f32_run;
  }
  FLAP_TRY_GOTO(status,
                visit_states(pager, layout, &list, false, runs,
                             (void *[]){writers[STATE_MASTER], writers[STATE_MOMENT1], writers[STATE_MOMENT2]}));
  for (uint32_t i = 0; i < STATE_SECTIONS; i++) {
    flap_safetensors_writer *writer = writers[i];
    writers[i] = NULL;
    if (writer != NULL)
      FLAP_TRY_GOTO(status, flap_safetensors_write_end(writer));
  }
fail:
  for (uint32_t i = 0; i < STATE_SECTIONS; i++)
    flap_safetensors_write_abort(writers[i]);
  flap_weights_list_close(&list);
  return status;
}

/* ---- resuming ---------------------------------------------------------------------------------------------- */

static flap_status resume_run(void *context, uint64_t index, const flap_model_tensor *tensor, uint64_t first,
                              uint64_t count, void *values) {
  (void)tensor;
  return flap_weights_source_read(context, index, first, count, values);
}

static flap_status open_states(const flap_layout *layout, const flap_weights_list *list, const char *folder,
                               flap_weights_source sources[STATE_SECTIONS]) {
  for (uint32_t i = 0; i < STATE_SECTIONS; i++) {
    const state_file file = state_file_of(layout->spec.shape.dtype, i);
    char path[FLAP_DURABLE_PATH_MAX];
    if (file.name == NULL)
      continue;
    FLAP_TRY(flap_durable_join(path, folder, file.name));
    FLAP_TRY(flap_weights_source_open(layout->spec.model, list, path, FLAP_WANTED_EXACTLY, file.dtype, &sources[i]));
  }
  return FLAP_OK;
}

flap_status flap_weights_resume(flap_pager *pager, const flap_layout *layout, const char *folder) {
  const flap_dtype dtype = layout->spec.shape.dtype;
  flap_weights_list list = {0};
  flap_weights_source weights = {0}, states[STATE_SECTIONS] = {{0}};
  flap_status status;
  flap_assert(layout->spec.mode == FLAP_MODE_TRAIN);
  FLAP_TRY_GOTO(status, flap_weights_list_open(layout->spec.model, &list));
  FLAP_TRY_GOTO(status, flap_weights_source_open(layout->spec.model, &list, folder, FLAP_WANTED_EXACTLY,
                                                 flap_safetensors_from_flap_dtype(dtype), &weights));
  FLAP_TRY_GOTO(status, open_states(layout, &list, folder, states));
  FLAP_TRY_GOTO(status, visit_weights(pager, layout, &list, true, resume_run, &weights));
  FLAP_TRY_GOTO(status,
                visit_states(pager, layout, &list, true, (run_fn[]){resume_run, resume_run, resume_run},
                             (void *[]){&states[STATE_MASTER], &states[STATE_MOMENT1], &states[STATE_MOMENT2]}));
fail:
  for (uint32_t i = 0; i < STATE_SECTIONS; i++)
    flap_weights_source_close(&states[i]);
  flap_weights_source_close(&weights);
  flap_weights_list_close(&list);
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

flap_status flap_weights_states_bytes(const flap_model_config *config, flap_dtype dtype, uint64_t *bytes_out) {
  flap_weights_list list = {0};
  flap_status status = flap_weights_list_open(config, &list);
  *bytes_out = 0;
  for (uint32_t i = 0; i < STATE_SECTIONS && status == FLAP_OK; i++) {
    const state_file file = state_file_of(dtype, i);
    uint64_t file_bytes = 0;
    if (file.name == NULL)
      continue;
    status = flap_weights_measure_file(&list, file.dtype, &file_bytes);
    *bytes_out += file_bytes;
  }
  flap_weights_list_close(&list);
  return status;
}
