/* Shared by checkpoint.c and output_folder.c: what lies in an output_dir, and which of it is ours. */
#ifndef FLAP_ENGINE_STORE_OUTPUT_FOLDER_INTERNAL_H
#define FLAP_ENGINE_STORE_OUTPUT_FOLDER_INTERNAL_H

#include "engine/store/checkpoint.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Steps of the folders `checkpoint-<step>`, ascending. */
typedef struct flap_output_steps {
  uint64_t *steps;
  size_t count, capacity;
} flap_output_steps;

FLAP_CHECKED flap_status flap_output_list(const char *output_dir, flap_output_steps *steps_out);
/* Those of `checkpoint-<step>.tmp` too, so a step may be there twice. */
FLAP_CHECKED flap_status flap_output_list_all(const char *output_dir, flap_output_steps *steps_out);
void flap_output_steps_close(flap_output_steps *steps); /* {0} is fine */

/* True if `name` is "checkpoint-<step>" followed by `suffix`. */
bool flap_output_parse_name(const char *name, const char *suffix, uint64_t *step_out);
FLAP_CHECKED flap_status flap_output_checkpoint_path(const char *output_dir, uint64_t step,
                                                     char path_out[FLAP_PATH_MAX]);

/* Clears up after checkpoints and exports that a crash interrupted. */
FLAP_CHECKED flap_status flap_output_recover(const char *output_dir);

/* Whether the folder's weights were written by FLAP. What is not there, or no model, is not ours; a system that refuses
 * to read, or to give memory, is an error, lest a folder is taken for somebody else's. */
FLAP_CHECKED flap_status flap_output_is_ours(const char *folder, bool *ours_out);
/* The same for messages and reports: what cannot be looked at is not there. Leaves no error record. */
bool flap_output_is_there(const char *folder, const char *name);
/* Whether the folder has an entry of that name. */
FLAP_CHECKED flap_status flap_output_look(const char *folder, const char *name, bool *there_out);

/* config.json, the tokenizer's files and the other companions. */
FLAP_CHECKED flap_status flap_output_write_artifacts(const char *folder, const flap_artifacts *artifacts,
                                                     flap_dtype dtype);

/* Moves the files of a model from the folder `from` to `to`, in an order that never leaves a mixture of old and new
 * weights that would load, and removes weights of the old one that are left. */
FLAP_CHECKED flap_status flap_output_install(const char *from, const char *to);

#ifdef __cplusplus
}
#endif
#endif
