#include "engine/machine/op_times_cache.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/machine/host_times.h"
#include "engine/machine/machine_cache.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define FORMAT "flap times 4"
#define FILE_BYTES_MAX ((uint64_t)1 << 16)
#define NS_MAX ((int64_t)1 << 40)
#define ELEMENT_NS_MAX 1e9
#define SLOWER_MAX 1e6

/* ---- what is kept ---------------------------------------------------------------------------------------- */

typedef struct field {
  const char *name;
  size_t at; /* in flap_op_times */
} field;
#define FIELD(name) \
  { #name, offsetof(flap_op_times, name) }
#define FIELD_OF(name, at) \
  { name, offsetof(flap_op_times, at) }

static const field whole[] = {FIELD(embed_ns),
                              FIELD(forward_ns),
                              FIELD(recompute_ns),
                              FIELD(loss_ns),
                              FIELD(head_ns),
                              FIELD(head_fresh_ns),
                              FIELD_OF("backward_ns", backward_ns[FLAP_SUMS_ADDED_TO]),
                              FIELD_OF("backward_fresh_ns", backward_ns[FLAP_SUMS_FRESH]),
                              FIELD_OF("backward_final_ns", backward_ns[FLAP_SUMS_FINAL]),
                              FIELD_OF("backward_spare_ns", backward_spare_ns[FLAP_SUMS_ADDED_TO]),
                              FIELD_OF("backward_spare_fresh_ns", backward_spare_ns[FLAP_SUMS_FRESH]),
                              FIELD_OF("backward_spare_final_ns", backward_spare_ns[FLAP_SUMS_FINAL]),
                              FIELD(embed_backward_ns),
                              FIELD(launch_ns)};
static const field fractions[] = {FIELD(store_ns),
                                  FIELD(measure_ns),
                                  FIELD(store_final_ns),
                                  FIELD(measure_final_ns),
                                  FIELD(zero_ns),
                                  FIELD(adamw_ns),
                                  FIELD(adamw_embedding_ns),
                                  FIELD_OF("host_ns", host.alone),
                                  FIELD_OF("host_beside_copies_ns", host.beside_copies),
                                  FIELD_OF("host_embedding_ns", host_embedding.alone),
                                  FIELD_OF("host_embedding_beside_copies_ns", host_embedding.beside_copies)};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

static uint64_t *whole_at(flap_op_times *times, const field *f) {
  return (uint64_t *)(void *)((unsigned char *)times + f->at);
}

static double *fraction_at(flap_op_times *times, const field *f) {
  return (double *)(void *)((unsigned char *)times + f->at);
}

/* ---- whose ----------------------------------------------------------------------------------------------- */

/* What stays when a machine is measured anew; the rest of the key says whether the file still counts. */
static int describe_run(const flap_op_times_spec *spec, const flap_machine *machine, char *text, size_t bytes) {
  char shapes[FLAP_MATMUL_SHAPES_MAX];
  flap_matmul_choice_describe(spec->model, &spec->shape, spec->gradient_dtype, shapes);
  return snprintf(text, bytes, "%s, %s, %u threads; %s, %s, %s", machine->name,
                  spec->matmuls != NULL ? spec->matmuls->table.target : "cpu", spec->threads, shapes,
                  flap_run_config_optim_name(spec->optim), spec->training ? "training" : "forward");
}

void flap_op_times_cache_open(const flap_op_times_spec *spec, const flap_machine *machine, flap_op_times_cache *cache) {
  *cache = (flap_op_times_cache){.path = ""};
  const int length = describe_run(spec, machine, cache->key, sizeof cache->key);
  if (length < 0 || (size_t)length >= sizeof cache->key)
    return;
  flap_machine_cache_name("times", cache->key, cache->path);
  const size_t left = sizeof cache->key - (size_t)length;
  const int more =
      snprintf(cache->key + length, left,
               "; flap " FLAP_VERSION "; products 0x%016" PRIx64 "; rates %.17g %.17g %.17g %.17g %.17g",
               spec->matmuls != NULL ? flap_matmul_table_digest(&spec->matmuls->table) : 0, machine->flops_bf16,
               machine->device_bytes, machine->h2d_bytes, machine->d2h_bytes, machine->host_bytes);
  if (more < 0 || (size_t)more >= left)
    cache->path[0] = '\0';
}

/* ---- reading --------------------------------------------------------------------------------------------- */

static flap_status read_sets(const flap_json_object *root, flap_op_times *times) {
  uint64_t masks[FLAP_MODEL_SAVED_MAX], again[FLAP_MODEL_SAVED_MAX];
  const json_t *list;
  FLAP_TRY(flap_json_get_array(root, "sets", &list));
  if (json_array_size(list) > FLAP_MODEL_SAVED_MAX)
    return flap_json_error(root, "sets", "more than %u", FLAP_MODEL_SAVED_MAX);
  times->set_count = (uint32_t)json_array_size(list);
  for (uint32_t i = 0; i < times->set_count; i++) {
    flap_json_object set = {.json = json_array_get(list, i), .file = root->file, .path = "sets[]"};
    int64_t value = 0;
    if (!json_is_object(set.json))
      return flap_json_error(&set, NULL, "not an object");
    FLAP_TRY(flap_json_get_integer(&set, "mask", 0, UINT32_MAX, &value));
    masks[i] = (uint64_t)value;
    FLAP_TRY(flap_json_get_integer(&set, "recompute_ns", 0, NS_MAX, &value));
    again[i] = (uint64_t)value;
  }
  for (uint32_t i = 0; i < times->set_count; i++) {
    times->set_mask[i] = (uint32_t)masks[i];
    times->set_recompute_ns[i] = again[i];
  }
  return FLAP_OK;
}

static flap_status read_times(const flap_json_object *root, const char **key_out, flap_op_times *times) {
  const char *format;
  FLAP_TRY(flap_json_get_string(root, "format", &format));
  if (strcmp(format, FORMAT) != 0)
    return flap_json_error(root, "format", "\"%.40s\" instead of \"" FORMAT "\"", format);
  FLAP_TRY(flap_json_get_string(root, "key", key_out));
  for (size_t i = 0; i < COUNT(whole); i++) {
    int64_t value = 0;
    FLAP_TRY(flap_json_get_integer(root, whole[i].name, 0, NS_MAX, &value));
    *whole_at(times, &whole[i]) = (uint64_t)value;
  }
  for (size_t i = 0; i < COUNT(fractions); i++)
    FLAP_TRY(flap_json_get_number(root, fractions[i].name, 0, ELEMENT_NS_MAX, fraction_at(times, &fractions[i])));
  FLAP_TRY(flap_json_get_number(root, "copies_beside_host", 1, SLOWER_MAX, &times->copies_beside_host));
  FLAP_TRY(flap_json_get_number(root, "sustained", 1, SLOWER_MAX, &times->sustained));
  times->measured = true;
  return read_sets(root, times);
}

/* A set of tensors that this version does not know would be found by no mask, and one that is missing be priced as
 * none. */
static bool has_sets_of(const flap_op_times_spec *spec, const flap_op_times *times) {
  uint32_t count = 0;
  const flap_saved_set *sets = flap_model_saved_sets(spec->model, &count);
  if (!spec->training)
    return times->set_count == 0;
  if (times->set_count != count)
    return false;
  for (uint32_t i = 0; i < count; i++)
    if (times->set_mask[i] != sets[i].mask)
      return false;
  return true;
}

static bool wants_host(const flap_op_times_spec *spec) {
  return spec->training && spec->host_bytes >= flap_host_times_bytes(spec);
}

bool flap_op_times_cache_find(const flap_op_times_cache *cache, const flap_op_times_spec *spec,
                              flap_op_times *times_out) {
  json_t *json = NULL;
  flap_json_object root;
  flap_op_times times = {.measured = false};
  const char *key = "";
  if (cache->path[0] == '\0')
    return false;
  flap_status status = flap_json_load_file(cache->path, FILE_BYTES_MAX, &json);
  if (status == FLAP_OK)
    status = flap_json_root(json, cache->path, &root);
  if (status == FLAP_OK)
    status = read_times(&root, &key, &times);
  const bool same = status == FLAP_OK && strcmp(key, cache->key) == 0;
  if (status != FLAP_OK && status != FLAP_NOT_FOUND)
    flap_log(FLAP_LOG_DEBUG, "operations are timed anew: %s", flap_error_message());
  flap_error_clear();
  json_decref(json);
  if (!same || !has_sets_of(spec, &times) || (wants_host(spec) && !(times.host.alone > 0)))
    return false;
  *times_out = times;
  return true;
}

/* ---- keeping --------------------------------------------------------------------------------------------- */

static json_t *sets_to_json(const flap_op_times *times) {
  json_t *list = json_array();
  bool done = true;
  for (uint32_t i = 0; i < times->set_count; i++) {
    json_t *set = json_object();
    done &= flap_json_put(set, "mask", json_integer(times->set_mask[i]));
    done &= flap_json_put(set, "recompute_ns", json_integer((json_int_t)times->set_recompute_ns[i]));
    done &= json_array_append_new(list, set) == 0;
  }
  if (done)
    return list;
  json_decref(list);
  return NULL;
}

static flap_status write_file(const flap_op_times_cache *cache, flap_op_times times) {
  json_t *root = json_object();
  bool done = flap_json_put(root, "format", json_string(FORMAT));
  done &= flap_json_put(root, "key", json_string(cache->key));
  for (size_t i = 0; i < COUNT(whole); i++)
    done &= flap_json_put(root, whole[i].name, json_integer((json_int_t)*whole_at(&times, &whole[i])));
  for (size_t i = 0; i < COUNT(fractions); i++)
    done &= flap_json_put(root, fractions[i].name, json_real(*fraction_at(&times, &fractions[i])));
  done &= flap_json_put(root, "copies_beside_host", json_real(times.copies_beside_host));
  done &= flap_json_put(root, "sustained", json_real(times.sustained));
  done &= flap_json_put(root, "sets", sets_to_json(&times));
  const flap_status status = done ? flap_json_write_file(cache->path, root)
                                  : flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", cache->path);
  json_decref(root);
  return status;
}

static flap_status store(const flap_op_times_cache *cache, const flap_op_times *times) {
  char folder[FLAP_PATH_MAX];
  int fd = -1;
  flap_machine_cache_folder(folder);
  FLAP_TRY(flap_durable_make_folder(folder));
  FLAP_TRY(flap_machine_cache_lock(cache->path, &fd));
  const flap_status status = write_file(cache, *times);
  (void)flap_system_close(fd); /* and the lock is gone */
  return status;
}

void flap_op_times_cache_keep(const flap_op_times_cache *cache, const flap_op_times *times) {
  if (cache->path[0] == '\0' || store(cache, times) == FLAP_OK)
    return;
  flap_log(FLAP_LOG_DEBUG, "what operations take is not kept: %s", flap_error_message());
  flap_error_clear();
}
