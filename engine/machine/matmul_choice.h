/* Which algorithms the products of a training run take on a card: the recorded table of kernels/matmul_table.h, its
 * files, and whose table counts.
 *
 * Folder-private, but for tests. A table belongs to a model of GPU, a library version (its target), and the shapes of a
 * run: widths of the model, micro-batch and dtypes. All that runs of these shapes can use is in it, with one
 * micro-batch a step or several, and nothing else; so its digest stands in the numerics key, and budgets have no say.
 *
 *   resumed    the checkpoint's table, as it is, where it is for this target and these shapes; else as
 *   new        this machine's, $XDG_CACHE_HOME/flap/matmul-<hash>.json (or ~/.cache); what is missing in it is timed
 *              with the run's own layer before the plan (op_times.h), and added to the file
 *
 * With `expert: {matmul: first}` it is an empty one, whose products take the library's first answers. A file is
 *
 *   {"format": "flap products 1", "target": "sm_90 ...", "shapes": "llama, hidden 1536 ...", "digest": "0x...",
 *    "products": [{"transpose": "NT", "m": 2048, ..., "algorithm": "<128 hexadecimal digits>"}]}
 *
 * A bad file of the cache is made anew; one of a checkpoint is an error. Several processes may use the cache at once:
 * what the first one stored counts for all.
 */
#ifndef FLAP_ENGINE_MACHINE_MATMUL_CHOICE_H
#define FLAP_ENGINE_MACHINE_MATMUL_CHOICE_H

#include "engine/run_config.h"
#include "kernels/matmul_table.h"
#include "model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_MATMUL_SHAPES_MAX 256u

typedef struct flap_matmul_choice {
  bool given; /* there is a table, if only an empty one: the device has use of it */
  bool tunes; /* what is missing is timed before the plan */
  flap_matmul_table table;
  char shapes[FLAP_MATMUL_SHAPES_MAX];
  char source[FLAP_PATH_MAX]; /* the file that the table is from; "": none */
  char cache[FLAP_PATH_MAX];  /* the file to keep it in; "": none */
  uint64_t cached_digest;     /* of what was found there; 0: nothing */
} flap_matmul_choice;

/* All that widths of products follow from, in words; how many layers there are does not matter. */
void flap_matmul_choice_describe(const flap_model_config *model, const flap_model_shape *shape,
                                 flap_dtype gradient_dtype, char shapes_out[FLAP_MATMUL_SHAPES_MAX]);
/* Looks for the table of a run on `target` (flap_ops_matmul_target; "": none is given). `resume_folder`: the checkpoint
 * that it goes on from, or "". */
FLAP_CHECKED flap_status flap_matmul_choice_open(const char *target, const flap_model_config *model,
                                                 const flap_model_shape *shape, flap_dtype gradient_dtype,
                                                 flap_run_matmul wanted, const char *resume_folder,
                                                 flap_matmul_choice *choice_out);
/* Sets the ops' table, to be filled or (`measuring` false) only used. NULL, or a choice without a table: nothing. The
 * choice must outlive the ops. An error names the file that the table is from. */
FLAP_CHECKED flap_status flap_matmul_choice_give(flap_matmul_choice *choice, flap_ops *ops, bool measuring);
/* After measuring: stores what has changed in the cache. If somebody else stored meanwhile, theirs counts. A file that
 * cannot be written is a line in the log. */
void flap_matmul_choice_keep(flap_matmul_choice *choice);

/* `folder`/matmul.json, durably. */
FLAP_CHECKED flap_status flap_matmul_choice_save(const flap_matmul_choice *choice, const char *folder);

#ifdef __cplusplus
}
#endif
#endif
