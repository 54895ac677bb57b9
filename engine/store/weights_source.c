/* Files of weights, matched with what a model needs before any of it is read; and states in pages, which were. */
#include "engine/store/weights_internal.h"

#include "base/assert.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHAPE_BYTES 192
#define PREFIX "model."
#define PREFIX_BYTES (sizeof PREFIX - 1)
/* Buffers that older versions of transformers stored; they follow from config.json. */
#define ROTARY_BUFFER "rotary_emb.inv_freq"
#define PROJECTION "lm_head.weight"

static const char *show_shape(const uint64_t *shape, uint32_t rank, char shown[SHAPE_BYTES]) {
  size_t used = (size_t)snprintf(shown, SHAPE_BYTES, "[");
  for (uint32_t i = 0; i < rank; i++)
    used += (size_t)snprintf(shown + used, SHAPE_BYTES - used, "%s%" PRIu64, i ? ", " : "", shape[i]);
  snprintf(shown + used, SHAPE_BYTES - used, "]");
  return shown;
}

static flap_status check_shape(const flap_weights_source *source, const flap_safetensors_tensor *found,
                               const flap_model_tensor *wanted) {
  bool same = found->rank == wanted->rank;
  for (uint32_t i = 0; i < wanted->rank && same; i++)
    same = found->shape[i] == wanted->shape[i];
  if (same)
    return FLAP_OK;
  char has[SHAPE_BYTES], needs[SHAPE_BYTES];
  return flap_error_set(FLAP_INVALID, "%s: tensor %.120s has the shape %s, but the model's configuration needs %s",
                        flap_safetensors_tensor_path(source->reader, found), found->name,
                        show_shape(found->shape, found->rank, has), show_shape(wanted->shape, wanted->rank, needs));
}

static flap_status check_dtype(const flap_weights_source *source, const flap_safetensors_tensor *found,
                               flap_weights_wanted wanted, flap_safetensors_dtype dtype) {
  const char *path = flap_safetensors_tensor_path(source->reader, found);
  const char *name = flap_safetensors_dtype_name(found->dtype);
  if (wanted == FLAP_WANTED_EXACTLY && found->dtype != dtype)
    return flap_error_set(FLAP_INVALID, "%s: tensor %.120s is %s, but this run needs %s", path, found->name, name,
                          flap_safetensors_dtype_name(dtype));
  flap_dtype ours;
  if (wanted == FLAP_WANTED_ANY_FLOAT && (!flap_safetensors_to_flap_dtype(found->dtype, &ours) || ours == FLAP_I32))
    return flap_error_set(FLAP_UNSUPPORTED, "%s: tensor %.120s is %s, but weights must be BF16, F16 or F32", path,
                          found->name, name);
  return FLAP_OK;
}

static const flap_safetensors_tensor *find(const flap_weights_source *source, flap_weights_wanted wanted,
                                           const char *name) {
  const flap_safetensors_tensor *found = flap_safetensors_find(source->reader, name);
  if (found == NULL && wanted == FLAP_WANTED_ANY_FLOAT && strncmp(name, PREFIX, PREFIX_BYTES) == 0)
    found = flap_safetensors_find(source->reader, name + PREFIX_BYTES);
  return found;
}

static flap_status match(flap_weights_source *source, flap_weights_wanted wanted, flap_safetensors_dtype dtype) {
  for (uint64_t i = 0; i < source->list->count; i++) {
    const flap_model_tensor *tensor = &source->list->tensors[i];
    const flap_safetensors_tensor *found = find(source, wanted, tensor->name);
    if (found == NULL)
      return flap_error_set(FLAP_INVALID, "%s: has no tensor %s, which the model's configuration needs",
                            flap_safetensors_path(source->reader), tensor->name);
    FLAP_TRY(check_shape(source, found, tensor));
    FLAP_TRY(check_dtype(source, found, wanted, dtype));
    source->tensors[i] = found;
  }
  return FLAP_OK;
}

static int by_address(const void *a, const void *b) {
  const uintptr_t left = (uintptr_t) * (const void *const *)a, right = (uintptr_t) * (const void *const *)b;
  return left < right ? -1 : left > right;
}

/* What may stand in a file without a place in the model: rotary buffers, and the output projection of a tied one, which
 * is the embedding once more. */
static bool may_be_passed_over(const flap_model_config *config, const char *name) {
  const size_t length = strlen(name), buffer = strlen(ROTARY_BUFFER);
  if (length >= buffer && strcmp(name + length - buffer, ROTARY_BUFFER) == 0)
    return true;
  flap_model_config untied = *config;
  untied.tie_word_embeddings = false;
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t count = flap_model_tensors(&untied, FLAP_PART_HEAD, 0, tensors);
  for (uint32_t i = 0; i < count; i++)
    if (config->tie_word_embeddings && strcmp(tensors[i].name, name) == 0)
      return true;
  return false;
}

/* A tensor that nobody would read is a sign of the wrong config.json: biases, experts, norms that would be left out. */
static flap_status refuse_strangers(const flap_weights_source *source, const flap_model_config *config,
                                    flap_weights_wanted wanted) {
  const uint64_t listed = source->list->count, count = flap_safetensors_count(source->reader);
  const void **known = malloc(listed * sizeof *known);
  if (known == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a list of tensors", flap_safetensors_path(source->reader));
  for (uint64_t i = 0; i < listed; i++)
    known[i] = source->tensors[i];
  qsort(known, listed, sizeof *known, by_address);
  const flap_safetensors_tensor *stranger = NULL;
  for (uint64_t i = 0; i < count && stranger == NULL; i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(source->reader, i);
    const void *key = tensor;
    if (bsearch(&key, known, listed, sizeof *known, by_address) == NULL &&
        (wanted == FLAP_WANTED_EXACTLY || !may_be_passed_over(config, tensor->name)))
      stranger = tensor;
  }
  free(known);
  if (stranger == NULL)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "%s: holds tensor %.120s, which a %s model of this configuration does not have: does "
                        "config.json belong to these weights?",
                        flap_safetensors_tensor_path(source->reader, stranger), stranger->name,
                        flap_model_family_name(config->family));
}

static const flap_safetensors_tensor *find_part(const flap_weights_source *source, const flap_model_config *config,
                                                flap_part part, const char *name) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t count = flap_model_tensors(config, part, 0, tensors);
  for (uint32_t i = 0; i < count; i++)
    if (name == NULL || strcmp(tensors[i].name, name) == 0)
      return find(source, FLAP_WANTED_ANY_FLOAT, tensors[i].name);
  return NULL;
}

/* What stands in a tied model's file as its output projection must be the embedding, or it is of another model, which
 * transformers does not tie either. */
static flap_status check_tied(const flap_weights_source *source, const flap_model_config *config) {
  flap_model_config untied = *config;
  untied.tie_word_embeddings = false;
  const flap_safetensors_tensor *embedding = find_part(source, config, FLAP_PART_EMBEDDING, NULL);
  const flap_safetensors_tensor *projection = find_part(source, &untied, FLAP_PART_HEAD, PROJECTION);
  if (!config->tie_word_embeddings || embedding == NULL || projection == NULL)
    return FLAP_OK;
  const uint64_t chunk = FLAP_WEIGHTS_CHUNK * sizeof *source->raw;
  bool same = embedding->dtype == projection->dtype && embedding->bytes == projection->bytes;
  for (uint64_t at = 0; same && at < embedding->bytes; at += chunk) {
    const uint64_t bytes = embedding->bytes - at < chunk ? embedding->bytes - at : chunk;
    FLAP_TRY(flap_safetensors_read(source->reader, embedding, at, bytes, source->raw));
    FLAP_TRY(flap_safetensors_read(source->reader, projection, at, bytes, source->values));
    same = memcmp(source->raw, source->values, bytes) == 0;
  }
  if (same)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "%s: tensor %.120s is not the embedding, though config.json says so: set "
                        "tie_word_embeddings: false there to train both, or remove that tensor",
                        flap_safetensors_tensor_path(source->reader, projection), projection->name);
}

flap_status flap_weights_source_open(const flap_model_config *config, const flap_weights_list *list, const char *path,
                                     flap_weights_wanted wanted, flap_safetensors_dtype dtype,
                                     flap_weights_source *source_out) {
  flap_status status;
  *source_out = (flap_weights_source){.list = list};
  FLAP_TRY_GOTO(status, flap_safetensors_open(path, &source_out->reader));
  source_out->tensors = calloc(list->count, sizeof(const flap_safetensors_tensor *));
  source_out->raw = malloc(FLAP_WEIGHTS_CHUNK * sizeof(uint16_t));
  source_out->values = malloc(FLAP_WEIGHTS_CHUNK * sizeof(float));
  if (source_out->tensors == NULL || source_out->raw == NULL || source_out->values == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "%s: no memory to read weights", path);
    goto fail;
  }
  FLAP_TRY_GOTO(status, match(source_out, wanted, dtype));
  FLAP_TRY_GOTO(status, refuse_strangers(source_out, config, wanted));
  if (wanted == FLAP_WANTED_ANY_FLOAT)
    FLAP_TRY_GOTO(status, check_tied(source_out, config));
  return FLAP_OK;
fail:
  flap_weights_source_close(source_out);
  return status;
}

flap_status flap_weights_source_open_pages(const flap_weights_list *list, flap_state_pages *pages,
                                           flap_state_section section, flap_safetensors_dtype dtype,
                                           flap_weights_source *source_out) {
  *source_out = (flap_weights_source){.list = list, .pages = pages, .section = section, .pages_dtype = dtype};
  source_out->values = malloc(FLAP_WEIGHTS_CHUNK * sizeof(float));
  if (source_out->values != NULL)
    return FLAP_OK;
  *source_out = (flap_weights_source){0};
  return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to read states", flap_state_pages_path(pages));
}

bool flap_weights_source_is_open(const flap_weights_source *source) {
  return source->reader != NULL || source->pages != NULL;
}

void flap_weights_source_close(flap_weights_source *source) {
  flap_weights_verify_close(source->verify);
  flap_safetensors_close(source->reader);
  free(source->tensors);
  free(source->raw);
  free(source->values);
  *source = (flap_weights_source){0};
}

/* Lists count in what a section has values for: elements, or blocks of some. Offsets are those in the part. */
static flap_status read_pages(const flap_weights_source *source, uint64_t tensor, uint64_t first, uint64_t count,
                              void *to) {
  const flap_weights_list *list = source->list;
  const uint32_t head = flap_state_pages_parts(source->pages) - 1;
  uint32_t part = 0;
  if (tensor >= list->embedding_count && tensor < list->embedding_count + (head - 1) * list->layer_count)
    part = 1 + (uint32_t)((tensor - list->embedding_count) / list->layer_count);
  else if (tensor >= list->embedding_count)
    part = head;
  return flap_state_pages_read(source->pages, part, source->section, list->tensors[tensor].offset + first, count, to);
}

flap_status flap_weights_source_read(const flap_weights_source *source, uint64_t tensor, uint64_t first, uint64_t count,
                                     void *to) {
  if (source->pages != NULL)
    return read_pages(source, tensor, first, count, to);
  const flap_safetensors_tensor *found = source->tensors[tensor];
  const uint64_t bytes = flap_safetensors_dtype_bytes(found->dtype);
  FLAP_TRY(flap_safetensors_read(source->reader, found, first * bytes, count * bytes, to));
  if (source->verify != NULL)
    flap_weights_verify_read(source->verify, found, first * bytes, to, count * bytes);
  return FLAP_OK;
}

flap_status flap_weights_source_numeric(const flap_weights_source *source, uint64_t tensor, uint64_t element,
                                        flap_dtype dtype) {
  const bool pages = source->pages != NULL;
  const flap_safetensors_tensor *found = pages ? NULL : source->tensors[tensor];
  return flap_error_set(FLAP_NUMERIC, "%s: tensor %.120s: element %" PRIu64 " is NaN, infinite, or too large for %s",
                        pages ? flap_state_pages_path(source->pages)
                              : flap_safetensors_tensor_path(source->reader, found),
                        pages ? source->list->tensors[tensor].name : found->name, element, flap_dtype_name(dtype));
}

flap_status flap_weights_source_values(flap_weights_source *source, uint64_t tensor, uint64_t first, uint64_t count) {
  const flap_safetensors_dtype dtype = source->pages != NULL ? source->pages_dtype : source->tensors[tensor]->dtype;
  flap_assert(count <= FLAP_WEIGHTS_CHUNK);
  flap_assert(source->pages == NULL || dtype == FLAP_SAFETENSORS_F32); /* of no other there is scratch */
  FLAP_TRY(flap_weights_source_read(source, tensor, first, count,
                                    dtype == FLAP_SAFETENSORS_F32 ? (void *)source->values : source->raw));
  const uint64_t good = dtype == FLAP_SAFETENSORS_F32    ? flap_values_check(FLAP_F32, source->values, count)
                        : dtype == FLAP_SAFETENSORS_BF16 ? flap_values_from_bf16(source->raw, count, source->values)
                                                         : flap_values_from_f16(source->raw, count, source->values);
  return good == count ? FLAP_OK : flap_weights_source_numeric(source, tensor, first + good, FLAP_F32);
}
