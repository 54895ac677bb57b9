/* Checkpoints and exported folders: what output_dir holds.
 *
 * A checkpoint is a folder `checkpoint-<step>`: a Hugging Face folder (config.json, model*.safetensors, tokenizer
 * files, and what the folder that is trained further had beside them: engine/store/companions.h), the optimizer's
 * states (engine/store/weights.h, or where the pager can keep them engine/store/state_pages.h), trainer_state.json,
 * where the run was on a card matmul.json (engine/machine/matmul_choice.h), and the checksums of all of these
 * (io/formats/checksums.h). It is written under a temporary name, synced and renamed. It says nothing about placement,
 * so a run may resume at any budget.
 */
#ifndef FLAP_ENGINE_STORE_CHECKPOINT_H
#define FLAP_ENGINE_STORE_CHECKPOINT_H

#include "engine/machine/matmul_choice.h"
#include "engine/step/layout.h"
#include "engine/step/loss_scale.h"
#include "engine/store/companions.h"
#include "engine/store/numerics_key.h"
#include "io/formats/large_file.h"
#include "io/formats/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* trainer_state.json, all that a resumed run must know beside weights and states. */
typedef struct flap_trainer_state {
  uint64_t step;          /* done; less those that were skipped, AdamW's t */
  uint64_t max_steps;     /* of the run that saved: where that is another number now, its schedule is another one */
  uint64_t cursor;        /* training sequences consumed */
  uint64_t written_bytes; /* to drives by all lives of the run up to here, this checkpoint included; 0 where a version
                             saved that did not count */
  uint64_t seed;
  uint64_t dataset_digest;
  flap_optim optim;
  flap_loss_scale loss_scale;        /* all zero but with fp16 */
  const flap_matmul_choice *matmuls; /* saved in a file of its own, and read by whom it is for; NULL, or without a
                                       table: no file */
  char numerics[FLAP_NUMERICS_MAX];  /* the numerics key */
} flap_trainer_state;

/* What goes into every folder beside the weights, and what these are written through. */
typedef struct flap_artifacts {
  const flap_model_config *model;
  const flap_tokenizer *tokenizer;   /* NULL: none is written */
  const flap_companions *companions; /* NULL: none */
  flap_file_piece piece;             /* of one user at a time; its room is that of all files */
} flap_artifacts;

/* Writes `output_dir`/checkpoint-<step> (replacing one of the same name), then deletes the oldest of FLAP's checkpoints
 * beyond `total_limit` (0: none), never the new one; one that cannot be deleted is said in the log. With only_model no
 * states and no trainer_state.json are written. The pager must be at rest. On an error everything is as before, but if
 * it is the sync of output_dir, last of all, that failed: then the new one is there too. */
FLAP_CHECKED flap_status flap_checkpoint_save(const char *output_dir, flap_pager *pager, const flap_layout *layout,
                                              const flap_artifacts *artifacts, const flap_trainer_state *state,
                                              bool only_model, uint32_t total_limit, char folder_out[FLAP_PATH_MAX]);
/* The same in two steps. Write makes all files under the temporary name; commit gives them the final one, which
 * `folder` is; `read_back`: once what the checkpoint shares with the run has been read, and is what was written. The
 * pager is at rest while they are written, or this is the thread that drains its snapshot. A failure of either leaves
 * everything as before, and so does abandon, instead of commit. */
FLAP_CHECKED flap_status flap_checkpoint_write(const char *output_dir, flap_pager *pager, const flap_layout *layout,
                                               const flap_artifacts *artifacts, const flap_trainer_state *state,
                                               bool only_model, char folder_out[FLAP_PATH_MAX]);
FLAP_CHECKED flap_status flap_checkpoint_commit(const char *output_dir, const char *folder, uint64_t step,
                                                uint32_t total_limit, bool read_back);
void flap_checkpoint_abandon(const char *folder);

/* Resolves resume_from_checkpoint: "true" means the newest checkpoint with states in output_dir (recovering what a
 * crash left half-renamed); "auto" too, but where there is no checkpoint the folder is "" and nothing is wrong;
 * otherwise a folder. The caller holds output_dir's lock (engine/store/run_lock.h), if it is there. Compares sizes and
 * small files with their checksums, and reads and checks trainer_state.json; the weights are checked when they are
 * read. FLAP_NOT_FOUND says what was looked for, and when there are weights only. A folder in output_dir beside which
 * later checkpoints stand is FLAP_INVALID: they would come before all that is trained from it. */
FLAP_CHECKED flap_status flap_checkpoint_find(const char *output_dir, const char *resume_from,
                                              char folder_out[FLAP_PATH_MAX], flap_trainer_state *state_out);
/* Whether a checkpoint that is there stands in output_dir itself, by its path or by where a link leads. */
FLAP_CHECKED flap_status flap_checkpoint_lies_in(const char *folder, const char *output_dir, bool *lies_out);
/* Fills weights and states from a checkpoint that was found. Every byte is compared with its checksum on the way: what
 * does not agree is FLAP_CORRUPT, and names the file and the checkpoint to go back to. One without checksums, of an
 * earlier version, is taken with a warning. */
FLAP_CHECKED flap_status flap_checkpoint_load(flap_pager *pager, const flap_layout *layout, const char *folder);

/* FLAP_NOT_FOUND where output_dir holds no trained model; it names a checkpoint to take instead, if there is one. */
FLAP_CHECKED flap_status flap_checkpoint_check_model(const char *output_dir);

/* What a checkpoint's trainer_state.json says, unchecked otherwise; for looking at it. */
FLAP_CHECKED flap_status flap_checkpoint_read_state(const char *folder, flap_trainer_state *state_out);

/* Names something in output_dir that a new run would overwrite or mix with: config.json, weights, checkpoints; with
 * `lines` also a metrics.jsonl with steps, and without them one that is no file; "": there is nothing. */
FLAP_CHECKED flap_status flap_checkpoint_occupied(const char *output_dir, bool lines, char what_out[FLAP_PATH_MAX]);
/* Names something in output_dir that flap_checkpoint_clear leaves there, for it is not FLAP's, but a run would write
 * over: a model, a checkpoint; "": there is nothing. */
FLAP_CHECKED flap_status flap_checkpoint_foreign(const char *output_dir, char what_out[FLAP_PATH_MAX]);
/* How many checkpoints of ours are in output_dir; none where there is no such folder. */
FLAP_CHECKED flap_status flap_checkpoint_count(const char *output_dir, uint64_t *count_out);
/* Deletes from output_dir what earlier runs of FLAP left there, and nothing else: for overwrite_output_dir. Models and
 * checkpoints are known by the mark in their weights' metadata; metrics.jsonl and trace.json by their names. So the
 * caller must not have in there what it reads. */
FLAP_CHECKED flap_status flap_checkpoint_clear(const char *output_dir);
/* Whether that could delete the file or folder `path`, or what is in it: output_dir itself, something in a checkpoint's
 * folder, a file of a model, metrics.jsonl. Of what is not there it is false. */
FLAP_CHECKED flap_status flap_checkpoint_clear_takes(const char *output_dir, const char *path, bool *takes_out);
/* What that would free of the file system of output_dir: about, and no more. */
FLAP_CHECKED flap_status flap_checkpoint_clear_bytes(const char *output_dir, uint64_t *bytes_out);
/* Only what a life that ended before its first checkpoint leaves: metrics.jsonl, trace.json, finished.json, and
 * checkpoints and exports that were not finished. Checkpoints and models stay. */
FLAP_CHECKED flap_status flap_checkpoint_clear_leftovers(const char *output_dir);

/* Makes output_dir itself a Hugging Face folder: config.json, model*.safetensors, tokenizer files. All is written to a
 * temporary folder in it first, then renamed file by file, so that a crash leaves the old model, the new one, or none
 * that would load. Weights of an earlier export with other shards are removed. */
FLAP_CHECKED flap_status flap_checkpoint_export(const char *output_dir, flap_pager *pager, const flap_layout *layout,
                                                const flap_artifacts *artifacts);

/* Disk space that one checkpoint, and the final export, take (files of a few kilobytes estimated upwards). */
FLAP_CHECKED flap_status flap_checkpoint_bytes(const flap_model_config *config, flap_dtype dtype, flap_optim optim,
                                               bool only_model, uint64_t *bytes_out);
FLAP_CHECKED flap_status flap_checkpoint_export_bytes(const flap_model_config *config, flap_dtype dtype,
                                                      uint64_t *bytes_out);

#ifdef __cplusplus
}
#endif
#endif
