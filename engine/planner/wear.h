/* What a run writes to drives in all, and whether that is within ssd_budget, and output_dir has room for it.
 *
 * Folder-private. Counted are the states that are laid down at the start, what each step writes, every checkpoint and
 * the export; output_dir may be on another drive than `disk`, but both wear. A run that goes on counts from its
 * checkpoint on, where trainer_state.json says what all its lives had written. Not counted are what the file system
 * adds, the few evaluations, and what a life that was killed wrote after its last checkpoint.
 */
#ifndef FLAP_ENGINE_PLANNER_WEAR_H
#define FLAP_ENGINE_PLANNER_WEAR_H

#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_wear_run {
  uint64_t start, end;                /* steps: done before it, and in the end */
  uint64_t step_sequences, sequences; /* of a step, and of an epoch; 0 where the data are not known: then
                                         num_train_epochs says how many epochs there are */
} flap_wear_run;

/* What these steps of a run write: fills the plan's members of a run. The plan's other members are there. */
void flap_wear_describe(const flap_run_config *config, const flap_wear_run *run, flap_plan *plan);

/* FLAP_BUDGET when a described run, with what it wrote before, writes more than ssd_budget; says how many steps would
 * not. */
FLAP_CHECKED flap_status flap_wear_check(const flap_run_config *config, const flap_plan *plan);

/* Of a plan that is not to run: FLAP_NO_SPACE when output_dir has no room for what a new run writes there, two of its
 * checkpoints where it keeps all. Not of a described machine, nor of a run that finds its folder full: only that knows
 * what it has there. */
FLAP_CHECKED flap_status flap_wear_check_space(const flap_run_config *config, const flap_plan *plan);

/* The most checkpoints that are in output_dir at once, of so many that this run writes (0: not known) beside so many
 * that are there already. */
uint64_t flap_wear_checkpoints_at_once(const flap_run_config *config, uint64_t written, uint64_t there);
/* Whether checkpoints are to share the states on the one disk that the run has, as far as can be told without trying
 * (flap_block_can_link). */
bool flap_wear_shares(const flap_run_config *config, const char *disk_path);
/* What states take of the disks once, at the start. */
uint64_t flap_wear_start_bytes(const flap_plan *plan);

#ifdef __cplusplus
}
#endif
#endif
