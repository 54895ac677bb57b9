/* Machine profiles: files, and the presets that the program carries.
 *
 * A profile is YAML (and so may be JSON), with a key for each figure; tools/machines/ holds those that are compiled in.
 * A preset's name is that of its file, and may say more memory or other disks: rtx4090-128g-2nvme is rtx4090 with 128
 * GiB of RAM and two of its disks.
 */
#ifndef FLAP_TOOLS_MACHINE_FILE_H
#define FLAP_TOOLS_MACHINE_FILE_H

#include "engine/machine/machine_profile.h"

#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What is compiled in (made by tools/CMakeLists.txt from tools/machines). The last one has no name. */
typedef struct flap_machine_preset {
  const char *name, *text;
} flap_machine_preset;
extern const flap_machine_preset flap_machine_presets[];

/* `name` is a preset, or a file: what has a slash in it, or ends in .yaml, .yml or .json. A file of the latter kind
 * that is not there may be a preset of that name. FLAP_NOT_FOUND, or FLAP_INVALID with "name:line: key: what is wrong".
 */
FLAP_CHECKED flap_status flap_machine_file_load(const char *name, flap_machine_profile *profile_out);
/* The same for a text in memory. */
FLAP_CHECKED flap_status flap_machine_file_parse(const char *name, const char *text, size_t bytes,
                                                 flap_machine_profile *profile_out);
/* A table of the presets, and how names are made. */
FLAP_CHECKED flap_status flap_machine_file_list(FILE *out);

#ifdef __cplusplus
}
#endif
#endif
