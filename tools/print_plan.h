/* A plan as a table for people, and as JSON for programs. */
#ifndef FLAP_TOOLS_PRINT_PLAN_H
#define FLAP_TOOLS_PRINT_PLAN_H

#include "engine/engine.h"

#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* At most 100 columns. */
void flap_print_plan(FILE *out, const flap_run_config *config, const flap_plan *plan);
/* Every field of flap_plan under its own name; lanes and classes are objects by name, kinds and dtypes words. */
/* `knee` NULL: not asked for; otherwise an object of that name. */
FLAP_CHECKED flap_status flap_print_plan_json(FILE *out, const flap_run_config *config, const flap_plan *plan,
                                              const flap_knee *knee);
/* One line more of the table. */
void flap_print_knee(FILE *out, const flap_knee *knee);
/* A profile that `machine` can name (machine_file.h reads it), as JSON. The caller owns it. */
struct json_t *flap_print_profile_json(const flap_machine_profile *profile);

/* As the configuration spells it. */
const char *flap_print_compression(flap_compression compression);
/* The lane that the bound is set by: "compute", "disk_read", ... */
const char *flap_print_bound_lane(const flap_plan *plan);

#ifdef __cplusplus
}
#endif
#endif
