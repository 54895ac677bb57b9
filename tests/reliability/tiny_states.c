#include "tests/reliability/tiny_states.h"

#include "engine/store/hf_config.h"
#include "engine/store/state_pages.h"
#include "io/block/checksum.h"
#include "io/formats/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTIONS 3u

static const struct {
  const char *file;
  flap_state_section section;
  uint64_t value_bytes;
} sections[SECTIONS] = {{"optimizer-low.safetensors", FLAP_STATE_MASTER, 2},
                        {"optimizer-exp_avg.safetensors", FLAP_STATE_MOMENT1, 4},
                        {"optimizer-exp_avg_sq.safetensors", FLAP_STATE_MOMENT2, 4}};

/* Where states are read from: one or the other. */
typedef struct source {
  flap_state_pages *pages;
  flap_safetensors *files[SECTIONS];
} source;

static flap_status open_source(const char *folder, source *from) {
  *from = (source){0};
  const flap_status status = flap_state_pages_open(folder, &from->pages);
  if (status != FLAP_NOT_FOUND)
    return status;
  for (uint32_t i = 0; i < SECTIONS; i++) {
    char path[FLAP_PATH_MAX];
    (void)snprintf(path, sizeof path, "%s/%s", folder, sections[i].file);
    FLAP_TRY(flap_safetensors_open(path, &from->files[i]));
  }
  return FLAP_OK;
}

static void close_source(source *from) {
  flap_state_pages_close(from->pages);
  for (uint32_t i = 0; i < SECTIONS; i++)
    flap_safetensors_close(from->files[i]);
}

static flap_status read_values(source *from, uint32_t part, const flap_model_tensor *tensor, uint32_t section,
                               void *values) {
  if (from->pages != NULL)
    return flap_state_pages_read(from->pages, part, sections[section].section, tensor->offset, tensor->elements,
                                 values);
  const flap_safetensors_tensor *there;
  FLAP_TRY(flap_safetensors_require(from->files[section], tensor->name, &there));
  return flap_safetensors_read(from->files[section], there, 0, there->bytes, values);
}

static flap_status add_part(source *from, const flap_model_config *config, uint32_t part, uint64_t *digest) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t layers = config->num_hidden_layers;
  const flap_part kind = part == 0 ? FLAP_PART_EMBEDDING : part <= layers ? FLAP_PART_LAYER : FLAP_PART_HEAD;
  const uint32_t count = flap_model_tensors(config, kind, kind == FLAP_PART_LAYER ? part - 1 : 0, tensors);
  for (uint32_t i = 0; i < count; i++)
    for (uint32_t section = 0; section < SECTIONS; section++) {
      const uint64_t bytes = tensors[i].elements * sections[section].value_bytes;
      void *values = calloc(1, bytes);
      if (values == NULL)
        return flap_error_set(FLAP_NO_MEMORY, "the digest of states: no memory");
      const flap_status status = read_values(from, part, &tensors[i], section, values);
      *digest = flap_block_checksum(values, bytes, section, part, *digest);
      free(values);
      FLAP_TRY(status);
    }
  return FLAP_OK;
}

static flap_status add_all(const char *folder, uint64_t *digest) {
  flap_model_config config;
  source from;
  FLAP_TRY(flap_hf_config_read(folder, &config));
  flap_status status = open_source(folder, &from);
  for (uint32_t part = 0; status == FLAP_OK && part < config.num_hidden_layers + 2; part++)
    status = add_part(&from, &config, part, digest);
  close_source(&from);
  return status;
}

const char *tiny_states_digest(const char *folder, uint64_t *digest) {
  return add_all(folder, digest) == FLAP_OK ? "" : flap_error_message();
}

bool tiny_states_are_pages(const char *folder, const char **problem_out) {
  char path[FLAP_PATH_MAX];
  *problem_out = "";
  (void)snprintf(path, sizeof path, "%s/%s", folder, FLAP_STATE_PAGES_TABLE);
  if (access(path, F_OK) != 0)
    return false;
  if (flap_state_pages_verify(folder, false) != FLAP_OK)
    *problem_out = flap_error_message();
  return true;
}
