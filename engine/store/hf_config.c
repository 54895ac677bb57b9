/* config.json by a family's table of keys.
 *
 * Invariants:
 *   1. Which keys there are, in which order they apply, and what they do to the configuration is the family's to say;
 *      nothing here knows an architecture.
 *   2. What format writes, parse reads back to the same configuration.
 */
#include "engine/store/hf_config.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/nearest.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define KEYS_MAX 256u
#define SHOWN_BYTES 64

/* ---- reading --------------------------------------------------------------------------------------------- */

/* A value as short JSON text for a message. */
static const char *show(const json_t *value, char shown[SHOWN_BYTES]) {
  size_t length = json_dumpb(value, shown, SHOWN_BYTES - 1, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(6));
  if (length == 0 || length > SHOWN_BYTES - 1)
    return json_is_object(value) ? "a mapping" : json_is_array(value) ? "a list" : "a long text";
  shown[length] = '\0';
  return shown;
}

static const flap_model_key *find_key(const flap_family *family, const char *name) {
  uint32_t count = 0;
  const flap_model_key *keys = flap_model_keys(family, &count);
  for (uint32_t i = 0; i < count; i++)
    if (strcmp(keys[i].name, name) == 0)
      return &keys[i];
  return NULL;
}

/* NULL for lack of memory. */
static json_t *wanted_value(const flap_model_key *key) {
  json_error_t error;
  return flap_json_parse(key->must_be, strlen(key->must_be), JSON_DECODE_ANY, &error);
}

static bool same_value(const json_t *value, const json_t *wanted) {
  return json_is_number(value) && json_is_number(wanted) ? json_number_value(value) == json_number_value(wanted)
                                                         : json_equal(value, wanted) != 0;
}

/* The element at `index`, or the value itself at 0 where the key is not for a list. */
static const json_t *value_at(const flap_model_key *key, const json_t *value, size_t index) {
  if (key->kind == FLAP_KEY_ALL_MUST_BE)
    return json_array_get(value, index);
  return index == 0 ? value : NULL;
}

/* A model folder's config.json is read by transformers too, which may take an absent key to be what is refused here. */
static flap_status check_not_absent(const flap_json_object *object, const flap_model_key *key) {
  if (key->kind != FLAP_KEY_MUST_BE || key->fallback == 0 || json_object_get(object->json, key->name) != NULL)
    return FLAP_OK;
  (void)flap_json_error(object, key->name,
                        "is missing, which means %.9g to transformers, but only %s is supported: set "
                        "it to %s if that is what the model has",
                        key->fallback, key->must_be, key->must_be);
  return FLAP_UNSUPPORTED;
}

static flap_status check_must_be(const flap_json_object *object, const flap_model_key *key) {
  const json_t *value = json_object_get(object->json, key->name);
  if (value == NULL || json_is_null(value))
    return FLAP_OK;
  if (key->kind == FLAP_KEY_ALL_MUST_BE)
    FLAP_TRY(flap_json_get_array(object, key->name, &value));
  json_t *wanted = wanted_value(key);
  if (wanted == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to read it", object->file);
  const json_t *found = value_at(key, value, 0);
  for (size_t i = 0; found != NULL && same_value(found, wanted); i++)
    found = value_at(key, value, i + 1);
  json_decref(wanted);
  if (found == NULL)
    return FLAP_OK;
  char shown[SHOWN_BYTES];
  (void)flap_json_error(object, key->name, "%s %s, but only %s is supported",
                        key->kind == FLAP_KEY_ALL_MUST_BE ? "holds" : "is", show(found, shown), key->must_be);
  return FLAP_UNSUPPORTED;
}

static flap_status read_rope_type(const flap_json_object *mapping, flap_rope *rope) {
  static const struct {
    const char *name;
    flap_rope_kind kind;
  } kinds[] = {
      {"default", FLAP_ROPE_DEFAULT},
      {"llama3", FLAP_ROPE_LLAMA3},
      {"linear", FLAP_ROPE_LINEAR},
  };
  const char *older = NULL, *name = NULL;
  FLAP_TRY(flap_json_opt_string(mapping, "type", NULL, &older));
  FLAP_TRY(flap_json_opt_string(mapping, "rope_type", older, &name));
  if (name == NULL)
    return FLAP_OK;
  if (older != NULL && strcmp(older, name) != 0)
    return flap_json_error(mapping, "type", "is %.40s, which contradicts rope_type, which is %.40s", older, name);
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (strcmp(kinds[i].name, name) == 0) {
      rope->kind = kinds[i].kind;
      return FLAP_OK;
    }
  (void)flap_json_error(mapping, "rope_type", "is %.40s, but only default, llama3 and linear are supported", name);
  return FLAP_UNSUPPORTED;
}

/* What else may stand in the mapping is a number, or a key that the family only allows one value for. */
static flap_status check_rope_keys(const flap_family *family, const flap_json_object *mapping) {
  static const char *const known[] = {"rope_type",
                                      "type",
                                      "rope_theta",
                                      "factor",
                                      "low_freq_factor",
                                      "high_freq_factor",
                                      "original_max_position_embeddings"};
  const size_t known_count = sizeof known / sizeof *known;
  const char *name;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)mapping->json, name, value) {
    size_t i = 0;
    while (i < known_count && strcmp(known[i], name) != 0)
      i++;
    if (i < known_count || json_is_null(value))
      continue;
    const flap_model_key *key = find_key(family, name);
    if (key != NULL && key->kind == FLAP_KEY_MUST_BE) {
      FLAP_TRY(check_must_be(mapping, key));
      continue;
    }
    const char *nearest = flap_nearest_word(name, known, known_count);
    (void)flap_json_error(mapping, name, "unknown key%s%s%s", nearest ? "; did you mean " : "", nearest ? nearest : "",
                          nearest ? "?" : "");
    return FLAP_UNSUPPORTED;
  }
  return FLAP_OK;
}

/* A key that says nothing would be taken for a scaling that is there. */
static flap_status check_rope_keys_of_type(const flap_json_object *mapping, flap_rope_kind kind) {
  static const struct {
    const char *name;
    bool of_linear;
  } keys[] = {{"factor", true},
              {"low_freq_factor", false},
              {"high_freq_factor", false},
              {"original_max_position_embeddings", false}};
  const bool typed = flap_json_has(mapping, "rope_type") || flap_json_has(mapping, "type");
  for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
    const bool used = typed && (kind == FLAP_ROPE_LLAMA3 || (kind == FLAP_ROPE_LINEAR && keys[i].of_linear));
    if (used || !flap_json_has(mapping, keys[i].name))
      continue;
    if (!typed)
      return flap_json_error(mapping, keys[i].name,
                             "is of no effect without a rope_type: say which (%s), or leave it out",
                             keys[i].of_linear ? "linear or llama3" : "llama3");
    return flap_json_error(
        mapping, keys[i].name, "is not used by rope_type %s: leave it out, or set the rope_type that uses it (%s)",
        kind == FLAP_ROPE_LINEAR ? "linear" : "default", keys[i].of_linear ? "linear or llama3" : "llama3");
  }
  return FLAP_OK;
}

static flap_status read_rope(const flap_family *family, const flap_json_object *object, const char *key,
                             flap_rope *rope) {
  if (!flap_json_has(object, key))
    return FLAP_OK;
  flap_json_object mapping;
  FLAP_TRY(flap_json_get_object(object, key, &mapping));
  FLAP_TRY(check_rope_keys(family, &mapping));
  FLAP_TRY(read_rope_type(&mapping, rope));
  FLAP_TRY(check_rope_keys_of_type(&mapping, rope->kind));
  FLAP_TRY(flap_json_opt_number(&mapping, "rope_theta", -DBL_MAX, DBL_MAX, rope->theta, &rope->theta));
  FLAP_TRY(flap_json_opt_number(&mapping, "factor", -DBL_MAX, DBL_MAX, rope->factor, &rope->factor));
  FLAP_TRY(flap_json_opt_number(&mapping, "low_freq_factor", -DBL_MAX, DBL_MAX, rope->low_freq_factor,
                                &rope->low_freq_factor));
  FLAP_TRY(flap_json_opt_number(&mapping, "high_freq_factor", -DBL_MAX, DBL_MAX, rope->high_freq_factor,
                                &rope->high_freq_factor));
  int64_t positions = 0;
  FLAP_TRY(flap_json_opt_integer(&mapping, "original_max_position_embeddings", 1, UINT32_MAX,
                                 rope->original_max_position, &positions));
  rope->original_max_position = (uint32_t)positions;
  return FLAP_OK;
}

static flap_status read_count(const flap_json_object *object, const flap_model_key *key, uint32_t fallback_vocabulary,
                              uint32_t *field) {
  int64_t value = isnan(key->fallback) ? 0 : (int64_t)key->fallback;
  const bool vocabulary = key->offset == offsetof(flap_model_config, vocab_size) && fallback_vocabulary > 0;
  if (flap_json_has(object, key->name))
    FLAP_TRY(flap_json_get_integer(object, key->name, 1, UINT32_MAX, &value));
  else if (vocabulary)
    value = fallback_vocabulary;
  else if (key->required)
    return flap_json_error(object, key->name, "this key is missing");
  *field = (uint32_t)value;
  return FLAP_OK;
}

static flap_status read_key(const flap_json_object *object, const flap_model_key *key, uint32_t fallback_vocabulary,
                            flap_model_config *config) {
  void *field = (char *)config + key->offset;
  if (key->kind == FLAP_KEY_COUNT)
    return read_count(object, key, fallback_vocabulary, field);
  if (key->required && !flap_json_has(object, key->name))
    return flap_json_error(object, key->name, "this key is missing");
  switch (key->kind) {
  case FLAP_KEY_NUMBER:
    return flap_json_opt_number(object, key->name, -DBL_MAX, DBL_MAX, key->fallback, field);
  case FLAP_KEY_BOOL:
    return flap_json_opt_bool(object, key->name, key->fallback != 0, field);
  case FLAP_KEY_ROPE:
    return read_rope(config->family, object, key->name, field);
  case FLAP_KEY_MUST_BE:
  case FLAP_KEY_ALL_MUST_BE:
    return check_must_be(object, key);
  case FLAP_KEY_COUNT:
  case FLAP_KEY_IGNORED:
    break;
  }
  return FLAP_OK;
}

static flap_status read_family(const flap_json_object *object, const flap_family **family_out) {
  const char *type = NULL;
  if (!flap_json_has(object, "model_type"))
    return flap_json_error(object, "model_type", "this key is missing; it must be one of: %s", flap_model_families());
  FLAP_TRY(flap_json_get_string(object, "model_type", &type));
  *family_out = flap_model_find_family(type);
  if (*family_out != NULL)
    return FLAP_OK;
  (void)flap_json_error(object, "model_type", "is %.60s, but the families that are supported are: %s", type,
                        flap_model_families());
  return FLAP_UNSUPPORTED;
}

static flap_status refuse_unknown(const flap_json_object *object, const flap_family *family) {
  uint32_t count = 0;
  const flap_model_key *keys = flap_model_keys(family, &count);
  const char *names[KEYS_MAX];
  flap_assert(count <= KEYS_MAX);
  for (uint32_t i = 0; i < count; i++)
    names[i] = keys[i].name;
  const char *name;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)object->json, name, value) {
    if (find_key(family, name) != NULL)
      continue;
    const char *nearest = flap_nearest_word(name, names, count);
    if (nearest != NULL)
      return flap_json_error(object, name, "unknown key; did you mean %s?", nearest);
    return flap_json_error(object, name, "unknown key: a %s model has none of that name",
                           flap_model_family_name(family));
  }
  return FLAP_OK;
}

flap_status flap_hf_config_parse(const struct json_t *object, const char *source, bool strict,
                                 uint32_t fallback_vocabulary, flap_model_config *config_out) {
  flap_json_object root;
  memset(config_out, 0, sizeof *config_out);
  FLAP_TRY(flap_json_root(object, source, &root));
  FLAP_TRY(read_family(&root, &config_out->family));
  if (strict)
    FLAP_TRY(refuse_unknown(&root, config_out->family));
  uint32_t count = 0;
  const flap_model_key *keys = flap_model_keys(config_out->family, &count);
  for (uint32_t i = 0; i < count; i++) {
    if (!strict)
      FLAP_TRY(check_not_absent(&root, &keys[i]));
    FLAP_TRY(read_key(&root, &keys[i], fallback_vocabulary, config_out));
  }
  const flap_status status = flap_model_finish_config(config_out);
  return status == FLAP_OK ? FLAP_OK : flap_error_prefix(status, "%s", source);
}

/* Code in the folder may compute something else than the family that model_type names. Said once by a process, which
 * may read the file several times. */
static void warn_of_own_code(const json_t *root, const char *path, const flap_model_config *config) {
  static bool told = false;
  if (told || !json_is_string(json_object_get(json_object_get(root, "auto_map"), "AutoModelForCausalLM")))
    return;
  told = true;
  flap_log(FLAP_LOG_WARNING,
           "%s: auto_map: with trust_remote_code transformers would run the model's own code (AutoModelForCausalLM), "
           "which FLAP does not look at: it is taken for a %s model, as model_type says",
           path, flap_model_family_name(config->family));
}

flap_status flap_hf_config_read(const char *folder, flap_model_config *config_out) {
  char path[FLAP_DURABLE_PATH_MAX];
  json_t *root = NULL;
  FLAP_TRY(flap_durable_join(path, folder, "config.json"));
  flap_status status = flap_json_load_file(path, FLAP_JSON_BYTES_MAX, &root);
  if (status == FLAP_NOT_FOUND)
    return flap_error_prefix(status, "%s is not a model folder", folder);
  FLAP_TRY(status);
  status = flap_hf_config_parse(root, path, false, 0, config_out);
  if (status == FLAP_OK)
    warn_of_own_code(root, path, config_out);
  json_decref(root);
  return status;
}

/* ---- tokens --------------------------------------------------------------------------------------------- */

static bool is_id(const json_t *value) {
  return json_is_integer(value) && json_integer_value(value) >= 0 && json_integer_value(value) <= INT32_MAX;
}

static bool are_ids(const json_t *value) {
  const size_t count = json_array_size(value);
  for (size_t i = 0; i < count; i++)
    if (!is_id(json_array_get(value, i)))
      return false;
  return count > 0;
}

flap_status flap_hf_config_read_ids(const char *folder, flap_hf_ids *ids) {
  char path[FLAP_DURABLE_PATH_MAX];
  json_t *root = NULL;
  memset(ids, 0, sizeof *ids);
  FLAP_TRY(flap_durable_join(path, folder, "config.json"));
  FLAP_TRY(flap_json_load_file(path, FLAP_JSON_BYTES_MAX, &root));
  json_t *eos = json_object_get(root, "eos_token_id"), *bos = json_object_get(root, "bos_token_id"),
         *pad = json_object_get(root, "pad_token_id");
  ids->eos = is_id(eos) || are_ids(eos) ? json_incref(eos) : NULL;
  ids->bos = is_id(bos) ? json_incref(bos) : NULL;
  ids->pad = is_id(pad) ? json_incref(pad) : NULL;
  json_decref(root);
  return FLAP_OK;
}

void flap_hf_ids_close(flap_hf_ids *ids) {
  json_decref(ids->eos);
  json_decref(ids->bos);
  json_decref(ids->pad);
  memset(ids, 0, sizeof *ids);
}

/* ---- writing --------------------------------------------------------------------------------------------- */

static json_t *rope_mapping(const flap_rope *rope) {
  switch (rope->kind) {
  case FLAP_ROPE_LINEAR:
    return json_pack("{s:s, s:f}", "rope_type", "linear", "factor", rope->factor);
  case FLAP_ROPE_LLAMA3:
    return json_pack("{s:s, s:f, s:f, s:f, s:I}", "rope_type", "llama3", "factor", rope->factor, "low_freq_factor",
                     rope->low_freq_factor, "high_freq_factor", rope->high_freq_factor,
                     "original_max_position_embeddings", (json_int_t)rope->original_max_position);
  case FLAP_ROPE_DEFAULT:
    break;
  }
  return json_null();
}

/* Some code asks whether these are there, not what they are; where they are absent they mean what FLAP needs, as lists
 * that may hold one value only do. "use_mrope" is no key of transformers. The older of the two rope mappings is
 * written, because older and newer versions of transformers read it. */
static bool is_written(const flap_model_key *key) {
  static const char *const left_out[] = {"quantization_config", "partial_rotary_factor", "use_mrope",
                                         "rope_parameters"};
  for (size_t i = 0; i < sizeof left_out / sizeof *left_out; i++)
    if (strcmp(left_out[i], key->name) == 0)
      return false;
  return key->kind != FLAP_KEY_IGNORED && key->kind != FLAP_KEY_ALL_MUST_BE;
}

static json_t *key_value(const flap_model_config *config, const flap_model_key *key) {
  const void *field = (const char *)config + key->offset;
  switch (key->kind) {
  case FLAP_KEY_COUNT:
    return json_integer((json_int_t) * (const uint32_t *)field);
  case FLAP_KEY_NUMBER:
    return flap_json_real(*(const double *)field);
  case FLAP_KEY_BOOL:
    return json_boolean(*(const bool *)field);
  case FLAP_KEY_ROPE:
    return rope_mapping(field);
  case FLAP_KEY_MUST_BE:
    return wanted_value(key);
  case FLAP_KEY_ALL_MUST_BE:
  case FLAP_KEY_IGNORED:
    break;
  }
  return NULL;
}

static json_t *token_id(json_t *kept, int64_t id) {
  return kept != NULL ? json_incref(kept) : id < 0 ? json_null() : json_integer((json_int_t)id);
}

flap_status flap_hf_config_format(const flap_model_config *config, flap_dtype dtype, int64_t eos_token_id,
                                  int64_t bos_token_id, const flap_hf_ids *kept, char **text_out) {
  static const flap_hf_ids none = {0};
  const flap_hf_ids *ids = kept != NULL ? kept : &none;
  uint32_t count = 0;
  const flap_model_key *keys = flap_model_keys(config->family, &count);
  json_t *root =
      json_pack("{s:[s], s:s, s:s, s:o, s:o}", "architectures", flap_model_architecture(config->family), "model_type",
                flap_model_family_name(config->family), "torch_dtype", flap_dtype_name(dtype), "bos_token_id",
                token_id(ids->bos, bos_token_id), "eos_token_id", token_id(ids->eos, eos_token_id));
  bool failed = root == NULL || (ids->pad != NULL && json_object_set(root, "pad_token_id", ids->pad) != 0);
  for (uint32_t i = 0; i < count && !failed; i++)
    if (is_written(&keys[i]))
      failed = json_object_set_new(root, keys[i].name, key_value(config, &keys[i])) != 0;
  failed = failed || json_object_set_new(root, "use_cache", json_true()) != 0;
  *text_out = failed ? NULL : flap_json_text(root);
  json_decref(root);
  return *text_out ? FLAP_OK : flap_error_set(FLAP_NO_MEMORY, "no memory for the text of config.json");
}

/* ---- comparing ------------------------------------------------------------------------------------------- */

/* On one line. */
static char *brief_text(const json_t *value) {
  char *text = flap_json_text(value);
  if (text == NULL)
    return NULL;
  char *to = text;
  for (const char *from = text; *from != '\0'; from++)
    if (*from != '\n' && (*from != ' ' || (to > text && to[-1] != ' ' && to[-1] != '{')))
      *to++ = *from;
  *to = '\0';
  return text;
}

static flap_status describe_difference(const char *key, const json_t *then, const json_t *now, char *text,
                                       size_t bytes) {
  char *then_text = brief_text(then), *now_text = brief_text(now);
  const size_t length = strlen(text);
  const bool failed = then_text == NULL || now_text == NULL;
  if (!failed)
    (void)snprintf(text + length, bytes - length, "%s%s: %s then, %s now", length > 0 ? "; " : "", key, then_text,
                   now_text);
  free(then_text);
  free(now_text);
  return failed ? flap_error_set(FLAP_NO_MEMORY, "no memory to compare configurations of models") : FLAP_OK;
}

flap_status flap_hf_config_differences(const flap_model_config *then, const flap_model_config *now, char *text_out,
                                       size_t text_bytes, uint32_t *count_out) {
  uint32_t count = 0;
  const flap_model_key *keys = flap_model_keys(now->family, &count);
  flap_status status = FLAP_OK;
  text_out[0] = '\0';
  *count_out = 0;
  if (then->family != now->family) {
    (void)snprintf(text_out, text_bytes, "model_type: %s then, %s now", flap_model_family_name(then->family),
                   flap_model_family_name(now->family));
    *count_out = 1;
    return FLAP_OK;
  }
  for (uint32_t i = 0; i < count && status == FLAP_OK; i++) {
    if (!is_written(&keys[i]) || strcmp(keys[i].name, "max_position_embeddings") == 0 ||
        strcmp(keys[i].name, "initializer_range") == 0)
      continue;
    json_t *of_then = key_value(then, &keys[i]), *of_now = key_value(now, &keys[i]);
    if (!json_equal(of_then, of_now)) {
      ++*count_out;
      status = describe_difference(keys[i].name, of_then, of_now, text_out, text_bytes);
    }
    json_decref(of_then);
    json_decref(of_now);
  }
  return status;
}
