#include "engine/store/companions.h"

#include "base/system.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define TOKENIZER_FILE "tokenizer.json"
#define OF_MODEL (FLAP_COMPANION_COUNT - 1)

const char *const flap_companion_names[FLAP_COMPANION_COUNT] = {
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",  "vocab.json",
    "merges.txt",   "tokenizer.model",       "chat_template.jinja",     "chat_template.json", "generation_config.json"};

/* "": bytes, or a file that nothing beside it belongs to. */
static void tokenizer_folder(const char *tokenizer, char folder_out[FLAP_DURABLE_PATH_MAX]) {
  struct stat about;
  const char *slash = strrchr(tokenizer, '/');
  folder_out[0] = '\0';
  if (strcmp(tokenizer, "bytes") == 0)
    return;
  if (flap_system_stat(tokenizer, &about) == 0 && S_ISDIR(about.st_mode))
    (void)snprintf(folder_out, FLAP_DURABLE_PATH_MAX, "%s", tokenizer);
  else if (strcmp(slash != NULL ? slash + 1 : tokenizer, TOKENIZER_FILE) == 0)
    (void)snprintf(folder_out, FLAP_DURABLE_PATH_MAX, "%.*s", slash != NULL ? (int)(slash - tokenizer) + 1 : 1,
                   slash != NULL ? tokenizer : ".");
}

/* From the first folder that has one; -1 if none has. */
static flap_status open_first(const char *name, const char *const folders[2], int *fd_out) {
  for (int i = 0; i < 2 && *fd_out < 0; i++) {
    char path[FLAP_DURABLE_PATH_MAX];
    struct stat about;
    if (folders[i][0] == '\0')
      continue;
    FLAP_TRY(flap_durable_join(path, folders[i], name));
    *fd_out = flap_system_open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
    if (*fd_out < 0 && errno != ENOENT)
      return flap_error_set_os(errno, "cannot open %s", path);
    if (*fd_out >= 0 && flap_system_fstat(*fd_out, &about) != 0)
      return flap_error_set_os(errno, "cannot look at %s", path);
    if (*fd_out >= 0 && !S_ISREG(about.st_mode))
      return flap_error_set(FLAP_INVALID, "%s: it is not a regular file, and would be copied: take it away", path);
  }
  return FLAP_OK;
}

static bool is_id(const json_t *value, int32_t id) {
  return value == NULL ? id < 0 : json_is_integer(value) && json_integer_value(value) == id;
}

static bool same_ids(const flap_hf_ids *ids, const flap_tokenizer *tokenizer) {
  const json_t *eos = json_is_array(ids->eos) ? json_array_get(ids->eos, 0) : ids->eos;
  return tokenizer != NULL && is_id(eos, flap_tokenizer_end(tokenizer)) &&
         is_id(ids->bos, flap_tokenizer_begin(tokenizer));
}

flap_status flap_companions_open(const flap_companions_source *from, flap_companions *companions) {
  char folder[FLAP_DURABLE_PATH_MAX];
  memset(companions, 0, sizeof *companions);
  companions->opened = true;
  for (size_t i = 0; i < FLAP_COMPANION_COUNT; i++)
    companions->files[i] = -1;
  tokenizer_folder(from->tokenizer, folder);
  const bool own = from->tokenizer[0] == '\0' || flap_system_is_same(folder, from->model) ||
                   flap_system_is_same(folder, from->checkpoint);
  const char *const of_model[2] = {from->model, from->checkpoint}, *const foreign[2] = {folder, ""};
  for (int i = 0; i < 2; i++)
    if (of_model[i][0] != '\0' && companions->ids.eos == NULL)
      FLAP_TRY(flap_hf_config_read_ids(of_model[i], &companions->ids));
  const bool fits = own || same_ids(&companions->ids, from->opened);
  if (!fits)
    flap_hf_ids_close(&companions->ids);
  for (size_t i = from->opened != NULL ? FLAP_COMPANION_TOKENIZER_COUNT : 0; i < OF_MODEL; i++)
    FLAP_TRY(open_first(flap_companion_names[i], own ? of_model : foreign, &companions->files[i]));
  return fits ? open_first(flap_companion_names[OF_MODEL], of_model, &companions->files[OF_MODEL]) : FLAP_OK;
}

flap_status flap_companions_save(const flap_companions *companions, const char *folder) {
  for (size_t i = 0; i < FLAP_COMPANION_COUNT; i++) {
    char path[FLAP_DURABLE_PATH_MAX];
    FLAP_TRY(flap_durable_join(path, folder, flap_companion_names[i]));
    if (companions->files[i] >= 0)
      FLAP_TRY(flap_durable_copy_open_file(companions->files[i], path));
  }
  return FLAP_OK;
}

void flap_companions_close(flap_companions *companions) {
  for (size_t i = 0; i < FLAP_COMPANION_COUNT && companions->opened; i++)
    if (companions->files[i] >= 0)
      (void)flap_system_close(companions->files[i]);
  companions->opened = false;
  flap_hf_ids_close(&companions->ids);
}
