/* Storing values: the plain kinds by the table, and the keys that need more than that. */
#include "base/units.h"
#include "tools/config_keys.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- errors --------------------------------------------------------------------------------------------- */

flap_status flap_config_error(const flap_config_reader *reader, flap_status status, const flap_yaml_node *at,
                              const char *key, const char *format, ...) {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  (void)vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  flap_yaml_quote quote;
  key = flap_yaml_quote_text(key, &quote);
  if (!reader->file)
    return flap_error_set(status, "command line: %s: %s", key, text);
  return flap_error_set(status, "%s:%u: %s: %s", reader->file, at->line, key, text);
}

static const char *found_text(const flap_yaml_node *value, char *buffer, size_t bytes) {
  if (value->kind == FLAP_YAML_SEQUENCE)
    return "a list";
  if (value->kind == FLAP_YAML_MAPPING)
    return "a mapping";
  flap_yaml_quote quote;
  (void)snprintf(buffer, bytes, value->plain ? "%s" : "\"%s\"", flap_yaml_quote_text(value->text, &quote));
  return buffer;
}

flap_status flap_config_error_type(const flap_config_reader *reader, const flap_yaml_node *at,
                                   const flap_config_key *key) {
  static const char *const wanted[] = {
      [FLAP_CONFIG_U32] = "a whole number",
      [FLAP_CONFIG_U64] = "a whole number",
      [FLAP_CONFIG_NUMBER] = "a number",
      [FLAP_CONFIG_BOOL] = "true or false",
      [FLAP_CONFIG_PATH] = "a path",
      [FLAP_CONFIG_SIZE] = "a size (24GiB, 512 MB), max or min",
      [FLAP_CONFIG_BYTES] = "a size (64KiB, 1 MiB)",
  };
  char found[FLAP_YAML_QUOTE_MAX + 8], list[160];
  const char *want = key->kind == FLAP_CONFIG_CUSTOM ? key->wanted : wanted[key->kind];
  if (key->words)
    want = flap_config_words(key->words, ", ", list, sizeof list);
  return flap_config_error(reader, FLAP_INVALID, at, key->name, "wanted %s%s, found %s", key->words ? "one of " : "",
                           want, found_text(at, found, sizeof found));
}

/* ---- plain kinds ---------------------------------------------------------------------------------------- */

/* A whole number of at least 0, also as 1e5. False with no record when it is none. */
static bool whole_number(const flap_yaml_node *value, uint64_t *value_out) {
  int64_t integer = 0;
  double number = 0;
  if (flap_yaml_is_integer(value, &integer)) {
    *value_out = (uint64_t)integer;
    return integer >= 0;
  }
  if (!flap_yaml_is_number(value, &number) || !(number >= 0 && number <= 9007199254740992.0) ||
      number != (double)(uint64_t)number)
    return false;
  *value_out = (uint64_t)number;
  return true;
}

/* What whole_number does not take: a number that is too large, or none. */
static flap_status wrong_whole_number(const flap_config_reader *reader, const flap_yaml_node *value,
                                      const flap_config_key *key) {
  if (value->kind == FLAP_YAML_SCALAR && value->plain && value->text[strspn(value->text, "0123456789")] == '\0')
    return flap_config_error(reader, FLAP_INVALID, value, key->name, "%.40s is more than %lld", value->text,
                             (long long)INT64_MAX);
  return flap_config_error_type(reader, value, key);
}

static bool is_text(const flap_yaml_node *value, const char *text) {
  return value->kind == FLAP_YAML_SCALAR && strcmp(value->text, text) == 0;
}

/* What is written like a size and is none, is told why. */
static flap_status read_bytes(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value,
                              uint64_t *bytes_out) {
  char reason[256], refusal[512];
  if (value->kind == FLAP_YAML_SCALAR && flap_units_parse_bytes(value->text, bytes_out) == FLAP_OK)
    return FLAP_OK;
  (void)snprintf(reason, sizeof reason, "%s", flap_error_message());
  const flap_status status = flap_config_error_type(reader, value, key);
  if (value->kind != FLAP_YAML_SCALAR || value->text[0] < '0' || value->text[0] > '9')
    return status;
  (void)snprintf(refusal, sizeof refusal, "%s", flap_error_message());
  return flap_error_set(status, "%s: %s", refusal, reason);
}

static flap_status parse_size(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value,
                              flap_size *size_out) {
  flap_size size = {FLAP_SIZE_BYTES, 0};
  if (is_text(value, "max"))
    size.kind = FLAP_SIZE_MAX;
  else if (is_text(value, "min"))
    size.kind = FLAP_SIZE_MIN;
  else
    FLAP_TRY(read_bytes(reader, key, value, &size.bytes));
  *size_out = size;
  return FLAP_OK;
}

static flap_status set_word(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value,
                            void *field) {
  for (const flap_config_word *word = key->words; word->text; word++)
    if (is_text(value, word->text)) {
      if (key->kind == FLAP_CONFIG_BOOL)
        *(bool *)field = word->value != 0;
      else
        memcpy(field, &word->value, sizeof word->value);
      return FLAP_OK;
    }
  return flap_config_error_type(reader, value, key);
}

/* A leading ~ or ~/ is the home folder, as in a shell, which does not see a file. */
static flap_status store_path(flap_config_reader *reader, const char *key, const flap_yaml_node *value,
                              char path[FLAP_PATH_MAX]) {
  const char *text = value->text, *home = "";
  if (text[0] == '~' && (text[1] == '/' || text[1] == '\0')) {
    home = getenv("HOME");
    if (home == NULL || home[0] == '\0')
      return flap_config_error(reader, FLAP_INVALID, value, key,
                               "~ stands for the home folder, but HOME is not set: write the path out");
    text++;
  }
  const size_t home_bytes = strlen(home), text_bytes = strlen(text);
  if (home_bytes >= FLAP_PATH_MAX || text_bytes >= FLAP_PATH_MAX - home_bytes)
    return flap_config_error(reader, FLAP_INVALID, value, key, "longer than %d bytes", FLAP_PATH_MAX - 1);
  memcpy(path, home, home_bytes);
  memcpy(path + home_bytes, text, text_bytes + 1);
  return FLAP_OK;
}

static size_t field_bytes(flap_config_kind kind) {
  static const size_t bytes[] = {[FLAP_CONFIG_U32] = sizeof(uint32_t),   [FLAP_CONFIG_U64] = sizeof(uint64_t),
                                 [FLAP_CONFIG_NUMBER] = sizeof(double),  [FLAP_CONFIG_BOOL] = sizeof(bool),
                                 [FLAP_CONFIG_PATH] = FLAP_PATH_MAX,     [FLAP_CONFIG_WORD] = sizeof(int),
                                 [FLAP_CONFIG_SIZE] = sizeof(flap_size), [FLAP_CONFIG_BYTES] = sizeof(uint64_t)};
  return bytes[kind];
}
_Static_assert(sizeof(flap_clip) == sizeof(int) && sizeof(flap_update_when) == sizeof(int) &&
                   sizeof(flap_dtype) == sizeof(int),
               "enums are stored as int");

static void store_default(flap_config_reader *reader, const flap_config_key *key) {
  static flap_run_config defaults;
  flap_run_config_defaults(&defaults);
  memcpy((char *)reader->config + key->offset, (const char *)&defaults + key->offset, field_bytes(key->kind));
}

flap_status flap_config_set_plain(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  if (!value) {
    store_default(reader, key);
    return FLAP_OK;
  }
  void *field = (char *)reader->config + key->offset;
  bool automatic = strncmp(key->name, "expert.", 7) == 0 && is_text(value, "auto");
  uint64_t whole = 0;
  if (key->words)
    return set_word(reader, key, value, field);
  switch (key->kind) {
  case FLAP_CONFIG_U32:
  case FLAP_CONFIG_U64:
    if (!automatic && !whole_number(value, &whole))
      return wrong_whole_number(reader, value, key);
    if (key->kind == FLAP_CONFIG_U32 && whole > UINT32_MAX)
      return flap_config_error(reader, FLAP_INVALID, value, key->name, "%s is more than %u", value->text, UINT32_MAX);
    if (key->kind == FLAP_CONFIG_U32)
      memcpy(field, &(uint32_t){(uint32_t)whole}, sizeof(uint32_t));
    else
      memcpy(field, &whole, sizeof whole);
    return FLAP_OK;
  case FLAP_CONFIG_NUMBER: {
    double number = 0;
    if (!flap_yaml_is_number(value, &number))
      return flap_config_error_type(reader, value, key);
    memcpy(field, &number, sizeof number);
    return FLAP_OK;
  }
  case FLAP_CONFIG_BOOL:
    return flap_yaml_is_bool(value, field) ? FLAP_OK : flap_config_error_type(reader, value, key);
  case FLAP_CONFIG_PATH:
    if (value->kind != FLAP_YAML_SCALAR)
      return flap_config_error_type(reader, value, key);
    return store_path(reader, key->name, value, field);
  case FLAP_CONFIG_SIZE:
    return parse_size(reader, key, value, field);
  case FLAP_CONFIG_BYTES:
    if (!automatic)
      FLAP_TRY(read_bytes(reader, key, value, &whole));
    memcpy(field, &whole, sizeof whole);
    return FLAP_OK;
  default:
    return flap_config_error_type(reader, value, key);
  }
}

/* ---- dataset and disk ----------------------------------------------------------------------------------- */

static flap_status add_dataset(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  flap_run_config *config = reader->config;
  if (value->kind != FLAP_YAML_SCALAR || flap_yaml_is_null(value) || !value->text[0])
    return flap_config_error_type(reader, value, key);
  if (config->dataset_count == FLAP_RUN_DATASETS_MAX)
    return flap_config_error(reader, FLAP_INVALID, value, key->name, "more than %d entries: use a glob",
                             FLAP_RUN_DATASETS_MAX);
  char path[FLAP_PATH_MAX];
  FLAP_TRY(store_path(reader, key->name, value, path));
  char *copy = strdup(path);
  if (!copy)
    return flap_error_set(FLAP_NO_MEMORY, "not enough memory for the list of data");
  config->dataset[config->dataset_count++] = copy;
  return FLAP_OK;
}

flap_status flap_config_set_dataset(flap_config_reader *reader, const flap_config_key *key,
                                    const flap_yaml_node *value) {
  flap_run_config *config = reader->config;
  while (config->dataset_count > 0)
    free(config->dataset[--config->dataset_count]);
  if (!value)
    return FLAP_OK;
  if (value->kind != FLAP_YAML_SEQUENCE)
    return add_dataset(reader, key, value);
  for (const flap_yaml_node *entry = value->first; entry; entry = entry->next)
    FLAP_TRY(add_dataset(reader, key, entry));
  return FLAP_OK;
}

static flap_status set_weight(flap_config_reader *reader, const flap_yaml_node *field, flap_run_disk *disk) {
  static const flap_config_key key = {.name = "disk.weight", .kind = FLAP_CONFIG_NUMBER};
  if (flap_yaml_is_null(field))
    return FLAP_OK;
  if (!flap_yaml_is_number(field, &disk->weight))
    return flap_config_error_type(reader, field, &key);
  if (!(disk->weight > 0))
    return flap_config_error(reader, FLAP_INVALID, field, key.name, "must be above 0");
  return FLAP_OK;
}

static flap_status set_disk_field(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *field,
                                  flap_run_disk *disk) {
  static const flap_config_key size_key = {.name = "disk.size", .kind = FLAP_CONFIG_SIZE};
  static const flap_config_key path_key = {.name = "disk.path", .kind = FLAP_CONFIG_PATH};
  if (strcmp(field->key, "size") == 0)
    return flap_yaml_is_null(field) ? FLAP_OK : parse_size(reader, &size_key, field, &disk->size);
  if (strcmp(field->key, "weight") == 0)
    return set_weight(reader, field, disk);
  if (strcmp(field->key, "path") != 0) {
    flap_yaml_quote quote;
    return flap_config_error(reader, FLAP_INVALID, field, key->name,
                             "unknown key %s: an entry has path, size and weight",
                             flap_yaml_quote_text(field->key, &quote));
  }
  if (field->kind != FLAP_YAML_SCALAR || flap_yaml_is_null(field))
    return flap_config_error_type(reader, field, &path_key);
  return store_path(reader, path_key.name, field, disk->path);
}

static flap_status add_disk(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  flap_run_config *config = reader->config;
  if (config->disk_count == FLAP_RUN_DISKS_MAX)
    return flap_config_error(reader, FLAP_INVALID, value, key->name, "more than %d entries", FLAP_RUN_DISKS_MAX);
  flap_run_disk *disk = &config->disk[config->disk_count];
  memset(disk, 0, sizeof *disk);
  disk->size.kind = FLAP_SIZE_MAX;
  if (value->kind == FLAP_YAML_MAPPING) {
    for (const flap_yaml_node *field = value->first; field; field = field->next)
      FLAP_TRY(set_disk_field(reader, key, field, disk));
  } else if (value->kind == FLAP_YAML_SCALAR && !flap_yaml_is_null(value)) {
    FLAP_TRY(store_path(reader, key->name, value, disk->path));
  } else {
    return flap_config_error_type(reader, value, key);
  }
  if (!disk->path[0])
    return flap_config_error(reader, FLAP_INVALID, value, key->name,
                             "an entry without a path: name an existing folder");
  config->disk_count++;
  return FLAP_OK;
}

flap_status flap_config_set_disk(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  reader->config->disk_count = 0;
  if (!value)
    return FLAP_OK;
  if (value->kind != FLAP_YAML_SEQUENCE)
    return add_disk(reader, key, value);
  for (const flap_yaml_node *entry = value->first; entry; entry = entry->next)
    FLAP_TRY(add_disk(reader, key, entry));
  return FLAP_OK;
}

/* ---- model ---------------------------------------------------------------------------------------------- */

static flap_status to_json(flap_config_reader *reader, const flap_yaml_node *node, json_t **json_out);

static flap_status scalar_to_json(flap_config_reader *reader, const flap_yaml_node *node, json_t **json_out) {
  bool flag = false;
  int64_t integer = 0;
  double number = 0;
  if (flap_yaml_is_null(node))
    *json_out = json_null();
  else if (flap_yaml_is_bool(node, &flag))
    *json_out = json_boolean(flag);
  else if (flap_yaml_is_integer(node, &integer))
    *json_out = json_integer(integer);
  else if (flap_yaml_is_number(node, &number))
    *json_out = json_real(number);
  else
    *json_out = json_string(node->text);
  if (!*json_out)
    return flap_config_error(reader, FLAP_INVALID, node, "model", "a value that is not UTF-8 text");
  return FLAP_OK;
}

/* Adds the entries of `mapping` to `object`; on the command line mappings are merged and a null takes a key away. */
static flap_status merge_mapping(flap_config_reader *reader, const flap_yaml_node *mapping, json_t *object) {
  for (const flap_yaml_node *entry = mapping->first; entry; entry = entry->next) {
    json_t *present = json_object_get(object, entry->key);
    if (!reader->file && entry->kind == FLAP_YAML_MAPPING && json_is_object(present)) {
      FLAP_TRY(merge_mapping(reader, entry, present));
      continue;
    }
    if (!reader->file && flap_yaml_is_null(entry)) {
      (void)json_object_del(object, entry->key);
      continue;
    }
    json_t *value = NULL;
    FLAP_TRY(to_json(reader, entry, &value));
    if (json_object_set_new(object, entry->key, value) != 0)
      return flap_config_error(reader, FLAP_INVALID, entry, "model", "a key that is not UTF-8 text");
  }
  return FLAP_OK;
}

static flap_status to_json(flap_config_reader *reader, const flap_yaml_node *node, json_t **json_out) {
  if (node->kind == FLAP_YAML_SCALAR)
    return scalar_to_json(reader, node, json_out);
  json_t *container = node->kind == FLAP_YAML_MAPPING ? json_object() : json_array();
  flap_status status = container ? FLAP_OK : flap_error_set(FLAP_NO_MEMORY, "not enough memory for the model keys");
  if (status == FLAP_OK && node->kind == FLAP_YAML_MAPPING) {
    status = merge_mapping(reader, node, container);
  } else if (status == FLAP_OK) {
    for (const flap_yaml_node *entry = node->first; entry && status == FLAP_OK; entry = entry->next) {
      json_t *value = NULL;
      status = to_json(reader, entry, &value);
      if (status == FLAP_OK && json_array_append_new(container, value) != 0)
        status = flap_error_set(FLAP_NO_MEMORY, "not enough memory for the model keys");
    }
  }
  if (status != FLAP_OK) {
    json_decref(container);
    return status;
  }
  *json_out = container;
  return FLAP_OK;
}

flap_status flap_config_set_model(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  flap_run_config *config = reader->config;
  if (!value || reader->file) {
    json_decref(config->model);
    config->model = NULL;
  }
  if (!value)
    return FLAP_OK;
  if (value->kind != FLAP_YAML_MAPPING)
    return flap_config_error_type(reader, value, key);
  if (!config->model)
    config->model = json_object();
  if (!config->model)
    return flap_error_set(FLAP_NO_MEMORY, "not enough memory for the model keys");
  return merge_mapping(reader, value, config->model);
}

/* ---- words that mean more, or less, than elsewhere ------------------------------------------------------- */

flap_status flap_config_set_optim(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  if (!value || is_text(value, "adamw") || is_text(value, "adamw_torch"))
    reader->config->optim = FLAP_OPTIM_ADAMW;
  else if (is_text(value, "adamw_8bit") || is_text(value, "adamw_bnb_8bit"))
    reader->config->optim = FLAP_OPTIM_ADAMW_8BIT;
  else
    return flap_config_error_type(reader, value, key);
  return FLAP_OK;
}

flap_status flap_config_set_report_to(flap_config_reader *reader, const flap_config_key *key,
                                      const flap_yaml_node *value) {
  const flap_yaml_node *word = value && value->kind == FLAP_YAML_SEQUENCE ? value->first : value;
  if (!word || (is_text(word, "none") && (word == value || !word->next)))
    return FLAP_OK;
  if (word->kind != FLAP_YAML_SCALAR)
    return flap_config_error_type(reader, value, key);
  flap_yaml_quote quote;
  return flap_config_error(reader, FLAP_UNSUPPORTED, value, key->name,
                           "%s is not supported: use none, and read metrics.jsonl in output_dir",
                           flap_yaml_quote_text(word->text, &quote));
}

flap_status flap_config_set_packing(flap_config_reader *reader, const flap_config_key *key,
                                    const flap_yaml_node *value) {
  bool flag = false;
  if (!value)
    return FLAP_OK;
  if (!flap_yaml_is_bool(value, &flag))
    return flap_config_error_type(reader, value, key);
  bool neat = strcmp(key->name, "neat_packing") == 0;
  if (flag != neat)
    return FLAP_OK;
  return flap_config_error(reader, FLAP_UNSUPPORTED, value, key->name,
                           "%s is not supported yet: use %s, which joins "
                           "documents by the end token",
                           neat ? "true" : "false", neat ? "packing: true" : "true");
}

flap_status flap_config_set_template(flap_config_reader *reader, const flap_config_key *key,
                                     const flap_yaml_node *value) {
  if (!value || is_text(value, "none") || is_text(value, "empty"))
    return FLAP_OK;
  if (value->kind != FLAP_YAML_SCALAR)
    return flap_config_error_type(reader, value, key);
  flap_yaml_quote quote;
  return flap_config_error(reader, FLAP_UNSUPPORTED, value, key->name,
                           "%s: chat templates are not supported yet: use none, which trains on the text as it stands",
                           flap_yaml_quote_text(value->text, &quote));
}

flap_status flap_config_set_max_steps(flap_config_reader *reader, const flap_config_key *key,
                                      const flap_yaml_node *value) {
  uint64_t steps = 0;
  int64_t integer = 0;
  if (value && !(flap_yaml_is_integer(value, &integer) && integer == -1) && !whole_number(value, &steps))
    return wrong_whole_number(reader, value, key);
  reader->config->max_steps = steps;
  return FLAP_OK;
}

flap_status flap_config_set_eval(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value) {
  if (strcmp(key->name, "eval_steps") == 0) {
    reader->eval_steps = 0;
    return !value || whole_number(value, &reader->eval_steps) ? FLAP_OK : wrong_whole_number(reader, value, key);
  }
  reader->eval_no = value && is_text(value, "no");
  reader->eval_by_steps = value && is_text(value, "steps");
  if (value && is_text(value, "epoch"))
    return flap_config_error(reader, FLAP_UNSUPPORTED, value, key->name,
                             "epoch is not supported yet: use steps with eval_steps");
  if (value && !reader->eval_no && !reader->eval_by_steps)
    return flap_config_error_type(reader, value, key);
  return FLAP_OK;
}

flap_status flap_config_set_resume(flap_config_reader *reader, const flap_config_key *key,
                                   const flap_yaml_node *value) {
  bool flag = false;
  char *path = reader->config->resume_from_checkpoint;
  path[0] = '\0';
  if (!value)
    return FLAP_OK;
  if (flap_yaml_is_bool(value, &flag)) {
    strcpy(path, flag ? "true" : "");
    return FLAP_OK;
  }
  if (value->kind != FLAP_YAML_SCALAR)
    return flap_config_error_type(reader, value, key);
  FLAP_TRY(store_path(reader, key->name, value, path));
  if (strcmp(path, "latest") == 0) /* a folder of that name is ./latest */
    strcpy(path, "true");
  return FLAP_OK;
}

/* "5%" is a share of ssd_tbw, anything else a size. */
flap_status flap_config_set_ssd_budget(flap_config_reader *reader, const flap_config_key *key,
                                       const flap_yaml_node *value) {
  flap_run_config *config = reader->config;
  config->ssd_budget = 0;
  config->ssd_budget_share = 0;
  if (!value)
    return FLAP_OK;
  if (value->kind != FLAP_YAML_SCALAR)
    return flap_config_error_type(reader, value, key);
  const size_t length = strlen(value->text);
  if (length > 1 && value->text[length - 1] == '%') {
    char *end = NULL;
    const double percent = strtod(value->text, &end);
    if (end != value->text + length - 1 || !(percent > 0 && percent <= 100))
      return flap_config_error_type(reader, value, key);
    config->ssd_budget_share = percent / 100;
    return FLAP_OK;
  }
  if (flap_units_parse_bytes(value->text, &config->ssd_budget) != FLAP_OK || config->ssd_budget == 0) {
    flap_error_clear();
    return flap_config_error_type(reader, value, key);
  }
  return FLAP_OK;
}

flap_status flap_config_set_checkpointing(flap_config_reader *reader, const flap_config_key *key,
                                          const flap_yaml_node *value) {
  reader->recompute = false;
  if (value && !flap_yaml_is_bool(value, &reader->recompute))
    return flap_config_error_type(reader, value, key);
  return FLAP_OK;
}
