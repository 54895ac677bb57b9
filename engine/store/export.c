/* A checkpoint or model folder as a plain Hugging Face folder, in another dtype if wanted. */
#include "engine/engine.h"
#include "engine/store/companions.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights_internal.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <stdlib.h>
#include <string.h>

typedef struct export_job {
  flap_model_config config;
  flap_weights_list list;
  /* `master`: what makes exact masters of the weights: their low halves (bf16) or the masters themselves (fp16). It is
   * not open where there is none, or none is wanted. */
  flap_weights_source weights, master;
  flap_checksums checksums[2];      /* of their folder, if it is a checkpoint */
  flap_state_pages *pages;          /* that masters are in; NULL: none, or a file */
  flap_safetensors_dtype master_of; /* weights of this type */
  flap_dtype dtype;
  const volatile sig_atomic_t *stop;
  uint16_t *halves; /* FLAP_WEIGHTS_CHUNK: converted values, or low halves before that */
  flap_weights_target target;
} export_job;

/* ---- weights ------------------------------------------------------------------------------------------------- */

static flap_status numeric(const export_job *job, uint64_t tensor, uint64_t element) {
  return flap_weights_source_numeric(&job->weights, tensor, element, job->dtype);
}

/* The exact master weights from both halves, in place of the weights' values. */
static flap_status join_halves(export_job *job, uint64_t tensor, uint64_t first, uint64_t count) {
  FLAP_TRY(flap_weights_source_read(&job->weights, tensor, first, count, job->weights.raw));
  FLAP_TRY(flap_weights_source_read(&job->master, tensor, first, count, job->halves));
  const uint64_t good =
      flap_values_join(job->weights.raw, (const int16_t *)(const void *)job->halves, count, job->weights.values);
  return good == count ? FLAP_OK : numeric(job, tensor, first + good);
}

static flap_status write_same(export_job *job, uint64_t tensor, uint64_t first, uint64_t count) {
  void *data = job->weights.values; /* large enough for any dtype */
  FLAP_TRY(flap_weights_source_read(&job->weights, tensor, first, count, data));
  const uint64_t good = flap_values_check(job->dtype, data, count);
  if (good != count)
    return numeric(job, tensor, first + good);
  return flap_weights_target_write(&job->target, data, count * flap_dtype_bytes(job->dtype));
}

static flap_status write_chunk(export_job *job, uint64_t tensor, uint64_t first, uint64_t count) {
  const flap_safetensors_dtype from = job->weights.tensors[tensor]->dtype;
  if (from == flap_safetensors_from_flap_dtype(job->dtype))
    return write_same(job, tensor, first, count);
  const bool exact = flap_weights_source_is_open(&job->master) && from == job->master_of;
  flap_weights_source *source = exact && from == FLAP_SAFETENSORS_F16 ? &job->master : &job->weights;
  if (exact && from == FLAP_SAFETENSORS_BF16)
    FLAP_TRY(join_halves(job, tensor, first, count));
  else
    FLAP_TRY(flap_weights_source_values(source, tensor, first, count));
  const float *values = source->values;
  if (job->dtype == FLAP_F32)
    return flap_weights_target_write(&job->target, values, count * sizeof(float));
  const uint64_t good = job->dtype == FLAP_BF16 ? flap_values_to_bf16(values, count, job->halves)
                                                : flap_values_to_f16(values, count, job->halves);
  if (good != count)
    return numeric(job, tensor, first + good);
  return flap_weights_target_write(&job->target, job->halves, count * sizeof(uint16_t));
}

static flap_status write_weights(export_job *job, const char *folder, uint64_t max_shard_bytes) {
  FLAP_TRY(flap_weights_target_begin(&job->list, folder, job->dtype, max_shard_bytes, &job->target));
  for (uint64_t tensor = 0; tensor < job->list.count; tensor++) {
    const uint64_t elements = job->list.tensors[tensor].elements;
    for (uint64_t first = 0; first < elements; first += FLAP_WEIGHTS_CHUNK) {
      const uint64_t left = elements - first;
      if (job->stop != NULL && *job->stop != 0)
        return FLAP_INTERRUPTED;
      FLAP_TRY(write_chunk(job, tensor, first, left < FLAP_WEIGHTS_CHUNK ? left : FLAP_WEIGHTS_CHUNK));
    }
  }
  return flap_weights_target_end(&job->target);
}

/* ---- the other files ----------------------------------------------------------------------------------------- */

/* The source's config.json with the new dtype: it may hold keys that matter to others. */
static flap_status write_config(const export_job *job, const char *from_folder, const char *to_folder) {
  char from[FLAP_PATH_MAX], to[FLAP_PATH_MAX];
  json_t *root = NULL;
  FLAP_TRY(flap_durable_join(from, from_folder, "config.json"));
  FLAP_TRY(flap_durable_join(to, to_folder, "config.json"));
  FLAP_TRY(flap_json_load_file(from, FLAP_JSON_BYTES_MAX, &root));
  const char *dtype = flap_dtype_name(job->dtype);
  bool failed =
      json_object_set_new(root, "architectures", json_pack("[s]", flap_model_architecture(job->config.family))) != 0;
  const bool newer = json_object_get(root, "dtype") != NULL;
  if (newer)
    failed = failed || json_object_set_new(root, "dtype", json_string(dtype)) != 0;
  if (!newer || json_object_get(root, "torch_dtype") != NULL)
    failed = failed || json_object_set_new(root, "torch_dtype", json_string(dtype)) != 0;
  const flap_status status =
      failed ? flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", to) : flap_json_write_file(to, root);
  json_decref(root);
  return status;
}

/* As they are: a file that FLAP cannot read may be read by others. */
static flap_status copy_files(const char *from_folder, const char *to_folder) {
  bool there = false;
  for (size_t i = 0; i < FLAP_COMPANION_COUNT; i++) {
    char from[FLAP_PATH_MAX], to[FLAP_PATH_MAX];
    FLAP_TRY(flap_durable_join(from, from_folder, flap_companion_names[i]));
    FLAP_TRY(flap_durable_join(to, to_folder, flap_companion_names[i]));
    FLAP_TRY(flap_durable_look(from, &there));
    if (there)
      FLAP_TRY(flap_durable_copy_file(from, to));
  }
  return FLAP_OK;
}

/* ---- all of it ----------------------------------------------------------------------------------------------- */

static flap_status open_pages(export_job *job, const char *folder) {
  FLAP_TRY(flap_state_pages_open(folder, &job->pages));
  const flap_dtype weights = flap_state_pages_dtype(job->pages);
  FLAP_TRY(flap_state_pages_check(job->pages, &job->config, weights, flap_state_pages_optim(job->pages)));
  job->master_of = flap_safetensors_from_flap_dtype(weights);
  if (weights == FLAP_F32 || job->dtype == weights)
    return FLAP_OK;
  return flap_weights_source_open_pages(&job->list, job->pages, FLAP_STATE_MASTER,
                                        weights == FLAP_BF16 ? FLAP_SAFETENSORS_I16 : FLAP_SAFETENSORS_F32,
                                        &job->master);
}

/* Weights of a checkpoint that are wanted in another type are rounded from the masters, where these are there. */
static flap_status open_masters(export_job *job, const char *folder) {
  char table[FLAP_PATH_MAX];
  bool in_pages = false;
  static const struct {
    flap_dtype weights;
    const char *name;
    flap_safetensors_dtype dtype;
  } kinds[] = {{FLAP_BF16, FLAP_WEIGHTS_LOW_FILE, FLAP_SAFETENSORS_I16},
               {FLAP_F16, FLAP_WEIGHTS_MASTER_FILE, FLAP_SAFETENSORS_F32}};
  FLAP_TRY(flap_durable_join(table, folder, FLAP_STATE_PAGES_TABLE));
  FLAP_TRY(flap_durable_look(table, &in_pages));
  if (in_pages)
    return open_pages(job, folder);
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds && !flap_weights_source_is_open(&job->master); i++) {
    char path[FLAP_PATH_MAX];
    bool there = false;
    FLAP_TRY(flap_durable_join(path, folder, kinds[i].name));
    job->master_of = flap_safetensors_from_flap_dtype(kinds[i].weights);
    FLAP_TRY(flap_durable_look(path, &there));
    if (job->dtype != kinds[i].weights && there)
      FLAP_TRY(
          flap_weights_source_open(&job->config, &job->list, path, FLAP_WANTED_EXACTLY, kinds[i].dtype, &job->master));
  }
  return FLAP_OK;
}

static flap_status open_sources(export_job *job, const char *folder) {
  FLAP_TRY(flap_hf_config_read(folder, &job->config));
  FLAP_TRY(flap_weights_list_open(&job->config, &job->list));
  FLAP_TRY(flap_weights_source_open(&job->config, &job->list, folder, FLAP_WANTED_ANY_FLOAT, FLAP_SAFETENSORS_F32,
                                    &job->weights));
  FLAP_TRY(flap_weights_verify_model_begin(&job->weights, folder, &job->checksums[0]));
  FLAP_TRY(open_masters(job, folder));
  if (job->pages == NULL && flap_weights_source_is_open(&job->master)) /* pages are compared one by one */
    FLAP_TRY(flap_weights_verify_model_begin(&job->master, folder, &job->checksums[1]));
  job->halves = malloc(FLAP_WEIGHTS_CHUNK * sizeof *job->halves);
  return job->halves != NULL ? FLAP_OK : flap_error_set(FLAP_NO_MEMORY, "%s: no memory to export it", folder);
}

static flap_status make_parent(const char *path) {
  char parent[FLAP_PATH_MAX];
  size_t length = strlen(path);
  while (length > 1 && path[length - 1] == '/')
    length--;
  while (length > 0 && path[length - 1] != '/')
    length--;
  if (length <= 1)
    return FLAP_OK;
  if (length >= sizeof parent)
    return flap_error_set(FLAP_INVALID, "%.200s: the path is too long", path);
  memcpy(parent, path, length);
  parent[length] = '\0';
  return flap_durable_make_folder(parent);
}

static flap_status write_folder(export_job *job, const char *from_folder, const char *to_folder,
                                uint64_t max_shard_bytes) {
  char temporary[FLAP_PATH_MAX];
  FLAP_TRY(make_parent(to_folder));
  FLAP_TRY(flap_durable_begin_folder(to_folder, temporary));
  flap_status status = write_config(job, from_folder, temporary);
  if (status == FLAP_OK)
    status = copy_files(from_folder, temporary);
  if (status == FLAP_OK)
    status = write_weights(job, temporary, max_shard_bytes);
  if (status == FLAP_OK)
    status = flap_weights_verify_model_end(&job->weights, from_folder);
  if (status == FLAP_OK)
    status = flap_weights_verify_model_end(&job->master, from_folder);
  if (status == FLAP_OK)
    status = flap_durable_commit_folder(to_folder, false);
  if (status != FLAP_OK) {
    flap_weights_target_abort(&job->target);
    flap_durable_abort_folder(to_folder);
  }
  return status;
}

flap_status flap_engine_export(const char *from_folder, const char *to_folder, flap_dtype dtype,
                               uint64_t max_shard_bytes, const volatile sig_atomic_t *stop) {
  export_job job = {.dtype = dtype, .stop = stop};
  if (dtype != FLAP_F32 && dtype != FLAP_BF16 && dtype != FLAP_F16)
    return flap_error_set(FLAP_INVALID, "models are exported as bfloat16, float16 or float32");
  if (to_folder[0] == '\0')
    return flap_error_set(FLAP_INVALID, "export: name the folder to make");
  bool there = false;
  FLAP_TRY(flap_durable_look(to_folder, &there));
  if (there)
    return flap_error_set(FLAP_INVALID, "%s: already there; remove it or choose another folder", to_folder);
  flap_status status = open_sources(&job, from_folder);
  if (status == FLAP_OK)
    status = write_folder(&job, from_folder, to_folder, max_shard_bytes);
  free(job.halves);
  flap_weights_source_close(&job.master);
  flap_state_pages_close(job.pages);
  flap_weights_source_close(&job.weights);
  flap_checksums_close(&job.checksums[0]);
  flap_checksums_close(&job.checksums[1]);
  flap_weights_list_close(&job.list);
  return status;
}

flap_status flap_engine_weights_dtype(const char *folder, flap_dtype *dtype_out) {
  flap_model_config config;
  flap_weights_list list = {0};
  flap_weights_source weights = {0};
  flap_status status;
  *dtype_out = FLAP_F32;
  FLAP_TRY(flap_hf_config_read(folder, &config));
  FLAP_TRY(flap_weights_list_open(&config, &list));
  FLAP_TRY_GOTO(
      status, flap_weights_source_open(&config, &list, folder, FLAP_WANTED_ANY_FLOAT, FLAP_SAFETENSORS_F32, &weights));
  for (uint64_t i = 0; i < list.count; i++) {
    flap_dtype dtype = FLAP_F32;
    (void)flap_safetensors_to_flap_dtype(weights.tensors[i]->dtype, &dtype);
    *dtype_out = i == 0 || dtype == *dtype_out ? dtype : FLAP_F32;
  }
  flap_weights_source_close(&weights);
fail:
  flap_weights_list_close(&list);
  return status;
}
