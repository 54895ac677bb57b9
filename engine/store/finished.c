#include "engine/store/finished.h"

#include "base/system.h"
#include "engine/store/output_folder_internal.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <errno.h>
#include <string.h>

#define FILE_NAME "finished.json"
#define FORMAT "flap-finished"
#define VERSION 1
#define BYTES_MAX ((uint64_t)64 << 10)

flap_status flap_finished_write(const char *output_dir, uint64_t steps, bool exported, flap_room *room) {
  char path[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, output_dir, FILE_NAME));
  json_t *root = json_pack("{s:s, s:i, s:I, s:b}", "format", FORMAT, "version", VERSION, "steps", (json_int_t)steps,
                           "exported", (int)exported);
  if (root == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", path);
  flap_status status;
  FLAP_WITH_ROOM(status, room, flap_json_write_file(path, root));
  json_decref(root);
  return status;
}

static flap_status parse(const flap_json_object *root, uint64_t *steps_out, bool *exported_out) {
  const char *format = NULL;
  int64_t version = 0, steps = 0;
  FLAP_TRY(flap_json_opt_string(root, "format", "", &format));
  if (strcmp(format, FORMAT) != 0)
    return flap_json_error(root, "format", "is not " FORMAT);
  FLAP_TRY(flap_json_get_integer(root, "version", VERSION, VERSION, &version));
  FLAP_TRY(flap_json_get_integer(root, "steps", 1, INT64_MAX, &steps));
  FLAP_TRY(flap_json_get_bool(root, "exported", exported_out));
  *steps_out = (uint64_t)steps;
  return FLAP_OK;
}

static flap_status read_file(const char *path, uint64_t *steps_out, bool *exported_out) {
  json_t *json = NULL;
  flap_json_object root;
  FLAP_TRY(flap_json_load_file(path, BYTES_MAX, &json));
  flap_status status = flap_json_root(json, path, &root);
  if (status == FLAP_OK)
    status = parse(&root, steps_out, exported_out);
  json_decref(json);
  return status;
}

/* Steps 0: there is none of FLAP's. */
static flap_status look(const char *path, uint64_t *steps_out, bool *exported_out) {
  bool there = false;
  *steps_out = 0;
  FLAP_TRY(flap_durable_look(path, &there));
  if (!there)
    return FLAP_OK;
  const flap_status status = read_file(path, steps_out, exported_out);
  if (status == FLAP_IO || status == FLAP_NO_MEMORY)
    return status;
  if (status != FLAP_OK)
    flap_error_clear();
  return FLAP_OK;
}

flap_status flap_finished_read(const char *output_dir, flap_finished *finished_out) {
  char path[FLAP_PATH_MAX];
  bool exported = false;
  *finished_out = (flap_finished){0};
  FLAP_TRY(flap_durable_join(path, output_dir, FILE_NAME));
  FLAP_TRY(look(path, &finished_out->steps, &exported));
  return exported ? flap_output_is_ours(output_dir, &finished_out->has_model) : FLAP_OK;
}

flap_status flap_finished_remove(const char *output_dir) {
  char path[FLAP_PATH_MAX];
  uint64_t steps = 0;
  bool exported = false;
  FLAP_TRY(flap_durable_join(path, output_dir, FILE_NAME));
  FLAP_TRY(look(path, &steps, &exported));
  if (steps > 0 && flap_system_unlink(path) != 0 && errno != ENOENT)
    return flap_error_set_os(errno, "cannot remove %s", path);
  return FLAP_OK;
}
