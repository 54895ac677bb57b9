/* The tensors of a model as a list, and the files that hold all of them. */
#include "engine/store/weights_internal.h"

#include "base/assert.h"
#include "io/formats/durable.h"
#include "io/formats/room.h"

#include <stdlib.h>
#include <string.h>

/* transformers refuses a file without the first pair. */
static const flap_safetensors_pair METADATA[] = {{"format", "pt"}, {FLAP_WEIGHTS_MARK_KEY, FLAP_WEIGHTS_MARK_VALUE}};
#define METADATA_COUNT (sizeof METADATA / sizeof *METADATA)

/* ---- the list ---------------------------------------------------------------------------------------------- */

flap_status flap_weights_list_open(const flap_model_config *config, flap_weights_list *list_out) {
  const uint64_t layers = config->num_hidden_layers;
  const uint32_t embedding = flap_model_tensors(config, FLAP_PART_EMBEDDING, 0, NULL);
  const uint32_t layer = flap_model_tensors(config, FLAP_PART_LAYER, 0, NULL);
  const uint32_t head = flap_model_tensors(config, FLAP_PART_HEAD, 0, NULL);
  const uint64_t count = embedding + layers * layer + head;
  *list_out = (flap_weights_list){.count = count, .embedding_count = embedding, .layer_count = layer};
  list_out->tensors = malloc((count + FLAP_MODEL_TENSORS_MAX) * sizeof *list_out->tensors);
  if (list_out->tensors == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a list of %llu tensors", (unsigned long long)count);
  flap_model_tensor *next = list_out->tensors;
  next += flap_model_tensors(config, FLAP_PART_EMBEDDING, 0, next);
  for (uint32_t i = 0; i < layers; i++)
    next += flap_model_tensors(config, FLAP_PART_LAYER, i, next);
  next += flap_model_tensors(config, FLAP_PART_HEAD, 0, next);
  flap_assert(next == list_out->tensors + count);
  return FLAP_OK;
}

flap_status flap_weights_list_blocks(const flap_weights_list *list, uint64_t block, flap_weights_list *list_out) {
  flap_assert(FLAP_OPS_BLOCK % block == 0);
  *list_out = *list;
  list_out->tensors = malloc(list->count * sizeof *list_out->tensors);
  if (list_out->tensors == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a list of %llu tensors", (unsigned long long)list->count);
  for (uint64_t i = 0; i < list->count; i++) {
    flap_model_tensor *tensor = &list_out->tensors[i];
    *tensor = list->tensors[i];
    tensor->elements = (tensor->elements + block - 1) / block;
    tensor->offset /= block;
    tensor->rank = 1;
    tensor->shape[0] = tensor->elements;
    tensor->shape[1] = 0;
  }
  return FLAP_OK;
}

void flap_weights_list_close(flap_weights_list *list) {
  free(list->tensors);
  *list = (flap_weights_list){0};
}

flap_safetensors_entry *flap_weights_entries(const flap_weights_list *list, flap_safetensors_dtype dtype) {
  flap_safetensors_entry *entries = calloc(list->count, sizeof *entries);
  for (uint64_t i = 0; entries != NULL && i < list->count; i++) {
    const flap_model_tensor *tensor = &list->tensors[i];
    entries[i] = (flap_safetensors_entry){
        .name = tensor->name, .dtype = dtype, .rank = tensor->rank, .shape = {tensor->shape[0], tensor->shape[1]}};
  }
  return entries;
}

/* ---- model.safetensors and its shards ---------------------------------------------------------------------- */

static flap_status plan(flap_weights_target *target, uint64_t shard_bytes_max) {
  const flap_weights_list *list = target->list;
  uint64_t *bytes = malloc(list->count * sizeof *bytes);
  target->shard_of = malloc(list->count * sizeof *target->shard_of);
  target->entries = flap_weights_entries(list, flap_safetensors_from_flap_dtype(target->dtype));
  if (bytes == NULL || target->shard_of == NULL || target->entries == NULL) {
    free(bytes);
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a list of %llu tensors", target->folder,
                          (unsigned long long)list->count);
  }
  for (uint64_t i = 0; i < list->count; i++) {
    bytes[i] = list->tensors[i].elements * flap_dtype_bytes(target->dtype);
    target->total_bytes += bytes[i];
  }
  target->shards = flap_safetensors_plan_shards(bytes, list->count, shard_bytes_max, target->shard_of);
  free(bytes);
  return FLAP_OK;
}

static uint64_t shard_end(const flap_weights_target *target, uint64_t first) {
  uint64_t end = first;
  while (end < target->list->count && target->shard_of[end] == target->shard_of[first])
    end++;
  return end;
}

flap_status flap_weights_target_begin(const flap_weights_list *list, const char *folder, flap_dtype dtype,
                                      uint64_t shard_bytes_max, flap_weights_target *target_out) {
  *target_out = (flap_weights_target){.list = list, .folder = folder, .dtype = dtype};
  const flap_status status = plan(target_out, shard_bytes_max);
  if (status != FLAP_OK)
    flap_weights_target_abort(target_out);
  return status;
}

static flap_status end_shard(flap_weights_target *target) {
  flap_safetensors_writer *writer = target->writer;
  target->writer = NULL;
  return writer != NULL ? flap_safetensors_write_end(writer) : FLAP_OK;
}

static flap_status next_tensor(flap_weights_target *target) {
  const uint64_t tensor = target->next;
  flap_assert(tensor < target->list->count);
  if (tensor == 0 || target->shard_of[tensor] != target->shard_of[tensor - 1]) {
    char path[FLAP_DURABLE_PATH_MAX], name[FLAP_SAFETENSORS_SHARD_NAME_MAX];
    FLAP_TRY(end_shard(target));
    flap_safetensors_shard_name(target->shard_of[tensor], target->shards, name);
    FLAP_TRY(flap_durable_join(path, target->folder, name));
    FLAP_TRY(flap_safetensors_write_begin(path, &target->entries[tensor], shard_end(target, tensor) - tensor, METADATA,
                                          METADATA_COUNT, target->piece, &target->writer));
    flap_safetensors_write_sum(target->writer, target->checksums);
  }
  target->bytes_left = target->list->tensors[tensor].elements * flap_dtype_bytes(target->dtype);
  target->next++;
  return FLAP_OK;
}

flap_status flap_weights_target_write(flap_weights_target *target, const void *data, uint64_t bytes) {
  if (target->bytes_left == 0)
    FLAP_TRY(next_tensor(target));
  flap_assert(bytes <= target->bytes_left);
  target->bytes_left -= bytes;
  return flap_safetensors_write(target->writer, data, bytes);
}

static flap_status write_index(const flap_weights_target *target) {
  if (target->shards < 2)
    return FLAP_OK;
  const uint64_t count = target->list->count;
  const char **names = malloc(count * sizeof *names);
  if (names == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for the index of its shards", target->folder);
  for (uint64_t i = 0; i < count; i++)
    names[i] = target->list->tensors[i].name;
  flap_status status = FLAP_OK;
  FLAP_WITH_ROOM(status, target->piece.room,
                 flap_safetensors_write_index(target->folder, names, target->shard_of, count, target->shards,
                                              target->total_bytes));
  free(names);
  return status;
}

flap_status flap_weights_target_end(flap_weights_target *target) {
  flap_assert(target->next == target->list->count && target->bytes_left == 0);
  flap_status status = end_shard(target);
  if (status == FLAP_OK)
    status = write_index(target);
  flap_weights_target_abort(target);
  return status;
}

void flap_weights_target_abort(flap_weights_target *target) {
  flap_safetensors_write_abort(target->writer);
  free(target->shard_of);
  free(target->entries);
  *target = (flap_weights_target){0};
}

/* ---- one file ---------------------------------------------------------------------------------------------- */

flap_status flap_weights_file_begin(const flap_weights_list *list, const char *folder, const char *name,
                                    flap_safetensors_dtype dtype, flap_file_piece piece,
                                    flap_safetensors_writer **writer_out) {
  char path[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, name));
  flap_safetensors_entry *entries = flap_weights_entries(list, dtype);
  if (entries == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a list of tensors", path);
  const flap_status status =
      flap_safetensors_write_begin(path, entries, list->count, METADATA, METADATA_COUNT, piece, writer_out);
  free(entries);
  return status;
}

/* ---- sizes ------------------------------------------------------------------------------------------------- */

static flap_status measure_file(const flap_safetensors_entry *entries, uint64_t count, uint64_t *bytes) {
  uint64_t file_bytes = 0;
  FLAP_TRY(flap_safetensors_measure(entries, count, METADATA, METADATA_COUNT, &file_bytes));
  *bytes += file_bytes;
  return FLAP_OK;
}

/* Upwards: a line of the index is four blanks, a name, a file's name, and ten characters of punctuation. */
static uint64_t index_bytes(const flap_weights_target *target) {
  uint64_t bytes = target->shards > 1 ? 256 : 0;
  for (uint64_t i = 0; target->shards > 1 && i < target->list->count; i++)
    bytes += strlen(target->list->tensors[i].name) + FLAP_SAFETENSORS_SHARD_NAME_MAX + 16;
  return bytes;
}

flap_status flap_weights_measure_target(const flap_weights_list *list, flap_dtype dtype, uint64_t shard_bytes_max,
                                        uint64_t *bytes_out) {
  flap_weights_target target;
  *bytes_out = 0;
  FLAP_TRY(flap_weights_target_begin(list, "model.safetensors", dtype, shard_bytes_max, &target));
  flap_status status = FLAP_OK;
  for (uint64_t first = 0; first < list->count && status == FLAP_OK;) {
    const uint64_t end = shard_end(&target, first);
    status = measure_file(&target.entries[first], end - first, bytes_out);
    first = end;
  }
  *bytes_out += index_bytes(&target);
  flap_weights_target_abort(&target);
  return status;
}

flap_status flap_weights_measure_file(const flap_weights_list *list, flap_safetensors_dtype dtype,
                                      uint64_t *bytes_out) {
  flap_safetensors_entry *entries = flap_weights_entries(list, dtype);
  if (entries == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a list of tensors");
  *bytes_out = 0;
  const flap_status status = measure_file(entries, list->count, bytes_out);
  free(entries);
  return status;
}
