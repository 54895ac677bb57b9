/* run.yaml and key=value overrides, as a run configuration.
 *
 * Role: reads the file, then the overrides (a later one wins), and checks the whole. What is wrong is named with file,
 * line and key ("command line" for overrides), and an unknown key with the nearest real one. Relative paths stay
 * relative to the current folder; ~ and ~/ become the home folder.
 */
#ifndef FLAP_TOOLS_CONFIG_YAML_H
#define FLAP_TOOLS_CONFIG_YAML_H

#include "engine/run_config.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the configuration is for. */
typedef enum flap_config_purpose {
  FLAP_CONFIG_TRAIN, /* dataset must be given */
  FLAP_CONFIG_PLAN,
  FLAP_CONFIG_USE /* eval and sample: the model is the folder `path`, or the trained model in output_dir of the file
                     `path`, unless an override names another model_name_or_path */
} flap_config_purpose;

/* `path` is a file, or for FLAP_CONFIG_USE possibly a folder. On success the caller closes config_out with
 * flap_run_config_close; on failure there is nothing to close. */
FLAP_CHECKED flap_status flap_config_load(const char *path, const char *const *overrides, size_t override_count,
                                          flap_config_purpose purpose, flap_run_config *config_out);

/* The same for a text in memory, for tests; `name` stands for the file. */
FLAP_CHECKED flap_status flap_config_load_text(const char *name, const char *text, size_t bytes,
                                               const char *const *overrides, size_t override_count,
                                               flap_config_purpose purpose, flap_run_config *config_out);

#ifdef __cplusplus
}
#endif
#endif
