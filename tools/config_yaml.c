#include "tools/config_yaml.h"

#include "engine/machine/machine_profile.h"
#include "tools/config_keys.h"
#include "tools/machine_file.h"
#include "tools/yaml_tree.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static flap_status unknown_key(const flap_config_reader *reader, const flap_yaml_node *entry, const char *name,
                               const char *prefix) {
  const char *nearest = flap_config_key_nearest(name, prefix);
  if (nearest)
    return flap_config_error(reader, FLAP_INVALID, entry, name, "unknown key; did you mean %s?", nearest);
  return flap_config_error(reader, FLAP_INVALID, entry, name, "unknown key; flap train --help-config lists all keys");
}

static flap_status set_key(flap_config_reader *reader, size_t index, const flap_yaml_node *entry) {
  const flap_config_key *key = flap_config_key_at(index);
  const flap_yaml_node *value = flap_yaml_is_null(entry) ? NULL : entry;
  reader->lines[index] = value ? entry->line : FLAP_CONFIG_UNSET;
  return key->set ? key->set(reader, key, value) : flap_config_set_plain(reader, key, value);
}

static flap_status set_expert(flap_config_reader *reader, const flap_yaml_node *mapping) {
  if (mapping->kind != FLAP_YAML_MAPPING && !flap_yaml_is_null(mapping))
    return flap_config_error(reader, FLAP_INVALID, mapping, "expert", "wanted a mapping, such as {clip: fold}");
  for (const flap_yaml_node *entry = mapping->first; entry; entry = entry->next) {
    char name[FLAP_YAML_QUOTE_MAX + 16];
    flap_yaml_quote quote;
    (void)snprintf(name, sizeof name, "expert.%s", flap_yaml_quote_text(entry->key, &quote));
    size_t index = flap_config_key_find(name);
    if (index == SIZE_MAX)
      return unknown_key(reader, entry, name, "expert.");
    FLAP_TRY(set_key(reader, index, entry));
  }
  return FLAP_OK;
}

static flap_status read_tree(flap_config_reader *reader, const flap_yaml_node *root) {
  if (root->kind != FLAP_YAML_MAPPING)
    return flap_error_set(FLAP_INVALID, "%s: wanted lines of the form key: value", reader->file);
  for (const flap_yaml_node *entry = root->first; entry; entry = entry->next) {
    if (strcmp(entry->key, "expert") == 0) {
      FLAP_TRY(set_expert(reader, entry));
      continue;
    }
    size_t index = strchr(entry->key, '.') ? SIZE_MAX : flap_config_key_find(entry->key);
    if (index == SIZE_MAX)
      return unknown_key(reader, entry, entry->key, NULL);
    FLAP_TRY(set_key(reader, index, entry));
  }
  return FLAP_OK;
}

static bool is_data(const char *name) {
  static const char *const endings[] = {".txt", ".jsonl", ".bin"};
  const size_t length = strlen(name);
  for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++)
    if (length > strlen(endings[i]) && strcmp(name + length - strlen(endings[i]), endings[i]) == 0)
      return strchr(name, '=') == NULL;
  return false;
}

static flap_status read_override(flap_config_reader *reader, const char *text) {
  flap_yaml_node *tree = NULL;
  flap_yaml_quote quote;
  if (is_data(text))
    return flap_error_set(FLAP_INVALID, "command line: %s: not an override: write dataset=%.200s",
                          flap_yaml_quote_text(text, &quote), text);
  flap_status status = flap_yaml_from_override(text, &tree);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "command line");
  status = read_tree(reader, tree);
  flap_yaml_free(tree);
  return status;
}

/* ---- the whole ------------------------------------------------------------------------------------------- */

static uint32_t line_of(const flap_config_reader *reader, const char *key) {
  return reader->lines[flap_config_key_find(key)];
}

/* "run.yaml:7: " or what else tells where `key` was given; the file alone when it was not given at all. */
static void prefix_place(const flap_config_reader *reader, const char *file, const char *key, size_t key_bytes) {
  char name[64];
  (void)snprintf(name, sizeof name, "%.*s", (int)key_bytes, key);
  size_t index = flap_config_key_find(name);
  uint32_t line = index == SIZE_MAX ? FLAP_CONFIG_UNSET : reader->lines[index];
  if (line == FLAP_CONFIG_UNSET)
    (void)flap_error_prefix(FLAP_INVALID, "%s", file);
  else if (line == 0)
    (void)flap_error_prefix(FLAP_INVALID, "command line");
  else
    (void)flap_error_prefix(FLAP_INVALID, "%s:%u", file, line);
}

/* flap_run_config_check names the key first; where that key was given is known here. */
static flap_status place_error(const flap_config_reader *reader, const char *file, flap_status status) {
  if (status != FLAP_OK) {
    const char *message = flap_error_message();
    prefix_place(reader, file, message, strcspn(message, ":"));
  }
  return status;
}

static flap_status finish_keys(flap_config_reader *reader) {
  flap_run_config *config = reader->config;
  config->cutoff_len_given = line_of(reader, "cutoff_len") != FLAP_CONFIG_UNSET;
  config->eval_steps = reader->eval_steps;
  if (reader->eval_no)
    config->eval_steps = 0;
  else if (reader->eval_by_steps && config->eval_steps == 0)
    config->eval_steps = config->logging_steps; /* as Hugging Face's Trainer */

  uint32_t new_line = line_of(reader, "eval_strategy"), old_line = line_of(reader, "evaluation_strategy");
  if (new_line != FLAP_CONFIG_UNSET && old_line != FLAP_CONFIG_UNSET && new_line != 0 && old_line != 0)
    return flap_error_set(FLAP_INVALID, "evaluation_strategy: given beside eval_strategy, which means the same");
  if (reader->recompute) {
    if (config->activations == FLAP_ACTIVATIONS_KEEP || config->activations == FLAP_ACTIVATIONS_OFFLOAD)
      return flap_error_set(FLAP_INVALID, "gradient_checkpointing: true contradicts activations: use one of them");
    config->activations = FLAP_ACTIVATIONS_RECOMPUTE;
  }
  if (config->fp16 && line_of(reader, "bf16") == FLAP_CONFIG_UNSET)
    config->bf16 = false; /* who asks for fp16 alone has not asked for both */
  if (!config->bf16 && !config->fp16) {
    if (line_of(reader, "gradient_dtype") != FLAP_CONFIG_UNSET && config->gradient_dtype != FLAP_F32)
      return flap_error_set(FLAP_INVALID, "gradient_dtype: must be fp32 when bf16 is false and weights are fp32");
    config->gradient_dtype = FLAP_F32;
  }
  return FLAP_OK;
}

/* eval and sample use what training left: the folder in output_dir, with its own tokenizer. */
static flap_status use_trained_model(flap_config_reader *reader) {
  flap_run_config *config = reader->config;
  bool named = line_of(reader, "model_name_or_path") == 0; /* on the command line */
  if (!named) {
    if (!config->output_dir[0])
      return flap_error_set(FLAP_INVALID, "output_dir: missing: it names the folder of the trained model");
    strcpy(config->model_name_or_path, config->output_dir);
  }
  json_decref(config->model);
  config->model = NULL;
  if (line_of(reader, "tokenizer") != 0)
    config->tokenizer[0] = '\0';
  return FLAP_OK;
}

/* Disks of a machine that is not here have no folders: their names only tell them apart. */
static void take_disks(flap_run_config *config) {
  const flap_machine_profile *profile = config->profile;
  for (uint32_t i = 0; i < profile->disk_count; i++) {
    flap_run_disk *disk = &config->disk[i];
    memset(disk, 0, sizeof *disk);
    disk->size.kind = FLAP_SIZE_MAX;
    (void)snprintf(disk->path, sizeof disk->path, "disk %u of %s", i + 1, profile->machine.name);
  }
  config->disk_count = profile->disk_count;
}

static flap_status load_machine(flap_config_reader *reader, flap_config_purpose purpose) {
  flap_run_config *config = reader->config;
  if (!config->machine[0])
    return FLAP_OK;
  if (purpose != FLAP_CONFIG_PLAN)
    return flap_error_set(FLAP_INVALID,
                          "machine: %s is a machine to plan for, and only flap plan does: take it out, "
                          "and vram, ram and disk are those of this machine",
                          config->machine);
  config->profile = malloc(sizeof *config->profile);
  if (!config->profile)
    return flap_error_set(FLAP_NO_MEMORY, "machine: not enough memory");
  flap_status status = flap_machine_file_load(config->machine, config->profile);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "machine");
  if (line_of(reader, "disk") == FLAP_CONFIG_UNSET)
    take_disks(config);
  return FLAP_OK;
}

static flap_status finish(flap_config_reader *reader, const char *file, bool is_folder, flap_config_purpose purpose) {
  flap_run_config *config = reader->config;
  FLAP_TRY(place_error(reader, file, finish_keys(reader)));
  FLAP_TRY(place_error(reader, file, load_machine(reader, purpose)));
  if (purpose == FLAP_CONFIG_USE && !is_folder)
    FLAP_TRY(place_error(reader, file, use_trained_model(reader)));
  if (purpose == FLAP_CONFIG_USE && !config->output_dir[0])
    strcpy(config->output_dir, config->model_name_or_path); /* nothing is written there */
  if (purpose == FLAP_CONFIG_TRAIN && config->dataset_count == 0)
    return place_error(reader, file,
                       flap_error_set(FLAP_INVALID, "dataset: missing: name a .txt, .jsonl or .bin file, or a glob"));
  return place_error(reader, file, flap_run_config_check(config));
}

static flap_status load_tree(const char *name, const flap_yaml_node *root, bool is_folder, const char *const *overrides,
                             size_t override_count, flap_config_purpose purpose, flap_run_config *config) {
  flap_config_reader reader = {.config = config, .file = name};
  for (size_t i = 0; i < sizeof reader.lines / sizeof reader.lines[0]; i++)
    reader.lines[i] = FLAP_CONFIG_UNSET;
  flap_run_config_defaults(config);
  if (strlen(name) >= FLAP_PATH_MAX)
    return flap_error_set(FLAP_INVALID, "the path of the configuration is longer than %d bytes", FLAP_PATH_MAX - 1);
  strcpy(config->source, name);
  if (is_folder)
    strcpy(config->model_name_or_path, name);
  if (root)
    FLAP_TRY(read_tree(&reader, root));
  reader.file = NULL;
  for (size_t i = 0; i < override_count; i++)
    FLAP_TRY(read_override(&reader, overrides[i]));
  return finish(&reader, name, is_folder, purpose);
}

static flap_status load(const char *name, flap_yaml_node *root, bool is_folder, const char *const *overrides,
                        size_t override_count, flap_config_purpose purpose, flap_run_config *config) {
  flap_status status = load_tree(name, root, is_folder, overrides, override_count, purpose, config);
  flap_yaml_free(root);
  if (status != FLAP_OK)
    flap_run_config_close(config);
  return status;
}

/* "max_steps=3", where a file is wanted. */
static bool is_override(const char *path) {
  char name[64];
  const size_t bytes = strcspn(path, "=");
  if (path[bytes] == '\0' || bytes >= sizeof name)
    return false;
  memcpy(name, path, bytes);
  name[bytes] = '\0';
  return flap_config_key_find(name) != SIZE_MAX;
}

static flap_status load_file(const char *path, flap_yaml_node **root_out) {
  const flap_status status = flap_yaml_load(path, root_out);
  if (status != FLAP_NOT_FOUND || !is_override(path))
    return status;
  return flap_error_set(FLAP_INVALID, "%.200s: there is no such file: the configuration comes first, then key=value",
                        path);
}

flap_status flap_config_load(const char *path, const char *const *overrides, size_t override_count,
                             flap_config_purpose purpose, flap_run_config *config_out) {
  struct stat info;
  bool is_folder = purpose == FLAP_CONFIG_USE && stat(path, &info) == 0 && S_ISDIR(info.st_mode);
  flap_yaml_node *root = NULL;
  if (!is_folder)
    FLAP_TRY(load_file(path, &root));
  return load(path, root, is_folder, overrides, override_count, purpose, config_out);
}

flap_status flap_config_load_text(const char *name, const char *text, size_t bytes, const char *const *overrides,
                                  size_t override_count, flap_config_purpose purpose, flap_run_config *config_out) {
  flap_yaml_node *root = NULL;
  FLAP_TRY(flap_yaml_parse(name, text, bytes, &root));
  return load(name, root, false, overrides, override_count, purpose, config_out);
}
