/* The engine: plans runs, and trains, evaluates, samples and exports models.
 *
 * Role: everything that a subcommand of `flap` does, without command line, YAML or printing. What happens is told to an
 * observer; texts for people are made by tools/.
 *
 * Threading: one run at a time per process; the calling thread is the engine thread. The observer is called on it.
 */
#ifndef FLAP_ENGINE_ENGINE_H
#define FLAP_ENGINE_ENGINE_H

#include "engine/machine/machine_profile.h"
#include "engine/run_config.h"
#include "model/model.h"
#include "pager/pager.h"

#include <signal.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- plan ------------------------------------------------------------------------------------------------ */

/* Classes of regions, in the order of tables. */
typedef enum flap_region_class {
  FLAP_CLASS_WEIGHTS,          /* of the layers: bf16 halves of the master, fp16, or fp32 */
  FLAP_CLASS_VOCABULARY,       /* weights of embedding and head */
  FLAP_CLASS_STATES,           /* optimizer slices: the rest of the master, and moments */
  FLAP_CLASS_GRADIENTS,        /* rounded gradients, in slices */
  FLAP_CLASS_ROUNDED,          /* rounded gradients on their way to an update in the backward: places that all share */
  FLAP_CLASS_GRADIENT_SUMS,    /* of the layers: fp32; bf16 where a step has one micro-batch and gradients are bf16 */
  FLAP_CLASS_VOCABULARY_SUMS,  /* of embedding and head; of layers too, where all take turns in one place */
  FLAP_CLASS_BOUNDARIES,       /* inputs of segments, per micro-batch; of layers, where a backward goes by layer */
  FLAP_CLASS_HIDDEN_GRADIENTS, /* gradient of the hidden state, per micro-batch */
  FLAP_CLASS_SAVED,            /* activations saved for the backward */
  FLAP_CLASS_CACHE,            /* keys and values, when sampling */
  FLAP_CLASS_COUNT
} flap_region_class;
const char *flap_engine_class_name(flap_region_class klass);

typedef struct flap_class_plan {
  uint64_t bytes;                                 /* of all regions of the class */
  uint64_t resident_bytes, ram_bytes, disk_bytes; /* where they live */
  uint32_t ring_slots;
  uint64_t ring_bytes; /* slots × slot size */
} flap_class_plan;

typedef struct flap_plan {
  /* the model and the step */
  uint64_t parameters, state_bytes; /* state: weights and moments */
  uint64_t tokens_per_step;
  uint32_t layers, micro_batches;
  flap_dtype dtype, gradient_dtype;
  flap_optim optim;
  flap_device_kind device;
  char device_name[96];
  flap_machine machine;

  /* choices */
  uint32_t segment_layers, tail_layers, group_micro_batches, saved_layers;
  bool layerwise;                  /* layers that save nothing are computed again one by one, not as a segment */
  uint32_t host_parts, part_count; /* of embedding, layers and head so many are updated by the host's cores */
  char saved_tensors[128];         /* what of a layer these save: "attention, lse"; "" for no layer */
  bool saved_whole;                /* which is all there is */
  bool saved_resident;             /* the saved activations stay in VRAM */
  uint32_t backward_parts;         /* that are updated in the backward of their own step; the others: */
  bool backward_twice;             /* once more, behind one that is for the norm alone */
  bool sweep;                      /* else the update is folded into the next forward */
  uint64_t page_bytes, transfer_bytes, slice_bytes;
  uint32_t read_buffers, write_buffers, workers;
  flap_compression compression; /* of pages on disk; no figure here counts on it */
  flap_class_plan classes[FLAP_CLASS_COUNT];

  /* budgets (resolved) and what is used of them: exact predictions */
  uint64_t vram_budget, ram_budget, disk_budget;
  uint64_t vram_bytes, ram_bytes, disk_bytes;
  uint64_t vram_pager_bytes, vram_scratch_bytes; /* regions and rings; workspaces and small buffers */
  uint64_t ram_home_bytes, ram_staging_bytes, ram_pool_bytes, ram_table_bytes, ram_other_bytes;
  uint64_t ram_shared_bytes; /* by how much the classes' ram_bytes are more than ram_home_bytes: of two that share their
                                place each counts, and only one of them is there at a time */
  uint64_t process_bytes;    /* code, stacks, libraries: estimated beside the budget */
  uint64_t disk_sizes[FLAP_RUN_DISKS_MAX]; /* resolved */
  uint64_t export_bytes, checkpoint_bytes; /* files written to output_dir: final export; each checkpoint */
  uint64_t checkpoint_shared_bytes; /* of these, states that a checkpoint shares with the run, and does not write */
  uint64_t checkpoints_at_once;     /* in output_dir, at most; of a run that keeps all its own, or 2 if not known */

  /* what a steady step moves (exact) and is expected to take */
  uint64_t lane_bytes[FLAP_LANE_COUNT];
  double compute_seconds, step_seconds; /* simulated */
  double lane_seconds[FLAP_LANE_COUNT]; /* for which each lane is busy in it, simulated */
  double disk_share;    /* of the bytes of pages on disk, what disks are expected to move in these seconds; 1: all */
  double pooled_share;  /* of what the disks would move, expected to stay in ram, encoded; lanes count all of it */
  double bound_seconds; /* machine bound, independent of the plan */
  uint64_t bound_bytes[FLAP_LANE_COUNT]; /* least bytes at these budgets */
  double bound_lane_seconds[FLAP_LANE_COUNT];
  double bound_compute_seconds;                     /* with what it computes again rather than have it stored */
  double bound_backward_seconds;                    /* of these, a backward: two thirds of what is computed once */
  double bound_copies_seconds, bound_disks_seconds; /* both ways at once; 0 where the rates are not known */
  double bound_update_seconds;                      /* of an update that waits for the norm, before the next step */
  double tokens_per_second;
  double unclipped_step_seconds; /* expected with max_grad_norm 0, after one search; 0: not planned, for it would hardly
                                    be another, or take long */

  /* what training (without checkpoints and exports) writes to the disks, and how long they bear it */
  uint64_t ssd_step_bytes; /* a step */
  double ssd_bytes_per_billion_tokens;
  uint64_t ssd_tbw_bytes; /* that may be written in all: ssd_tbw, or the machine's; 0: not known */
  double ssd_steps;       /* until that is used up; 0: not known, or nothing is written */

  /* and what the whole run writes, checkpoints and export included; all 0 where the number of steps follows from data
   * that were not read */
  uint64_t run_steps, run_checkpoints, ssd_run_bytes;
  uint64_t ssd_before_bytes; /* of a run that goes on: what it wrote up to its checkpoint */
  uint64_t ssd_budget_bytes; /* that the run may write: ssd_budget; 0: any number */

  /* the least that would be accepted, other budgets unchanged */
  uint64_t vram_min, ram_min, disk_min;
} flap_plan;

/* Plans a training run: reads model and tokenizer (not the data). FLAP_BUDGET names the budget and the smallest that
 * works. `trace_path` (or NULL): the file where the expected timeline of a step goes, in the form of trace.json. */
FLAP_CHECKED flap_status flap_engine_plan(const flap_run_config *config, const char *trace_path, flap_plan *plan_out);

/* From how many tokens a step on compute hides everything else: what a step with one backward computes, where that
 * fits. */
#define FLAP_KNEE_SHARE 0.9 /* of the step is then compute */
#define FLAP_KNEE_MICRO_BATCHES_MAX 1024
typedef struct flap_knee {
  uint32_t micro_batches;   /* the fewest, to about an eighth; 0: not even the most that were tried: more than fit, or
                               more   than compute gains by */
  uint32_t tried_max;       /* the most that were tried */
  uint64_t tokens_per_step; /* of micro_batches, or of tried_max */
  double step_seconds, compute_seconds, tokens_per_second; /* with them */
} flap_knee;
/* Plans with other numbers of micro-batches, at most a dozen times, each of which takes as long as flap_engine_plan;
 * with how many, `trying` (or NULL) is told before. Hiding is taken to grow with them, though one alone takes less VRAM
 * for gradient sums than two. What `expert` says of groups must fit one micro-batch. FLAP_BUDGET
 * if not even one micro-batch has a plan. */
FLAP_CHECKED flap_status flap_engine_knee(const flap_run_config *config,
                                          void (*trying)(void *context, uint32_t micro_batches), void *context,
                                          flap_knee *knee_out);

/* ---- train ----------------------------------------------------------------------------------------------- */

typedef struct flap_step_report {
  uint64_t step, max_steps; /* step counts from 1 */
  double epoch;
  double loss;       /* mean over the step's tokens */
  double grad_norm;  /* before clipping; neither is finite where fp16 overflowed */
  double loss_scale; /* with fp16, of this step; else 0 */
  bool skipped;      /* with fp16: it overflowed, and nothing was updated */
  double learning_rate;
  uint64_t tokens;
  double step_seconds, tokens_per_second, mfu; /* mfu: of the machine's matmul rate */
  double bound_seconds;
  bool defers_update; /* to the next step: it took less than steps take, even less than the bound perhaps */
  double stall_seconds[FLAP_LANE_COUNT]; /* in which compute rested, by the lane that it rested for */
  uint64_t lane_bytes[FLAP_LANE_COUNT];
  uint64_t disk_bytes[2];   /* of those of the disks, what was read and written, compressed or not */
  uint64_t pooled_bytes[2]; /* of these, what came from the pool and went there instead, as pages */
  double eta_seconds;       /* by what steps took of late */
  bool logged;              /* a logging step, or a skipped one: also a line in metrics.jsonl */
} flap_step_report;

typedef struct flap_eval_report {
  uint64_t step;
  double loss; /* mean over the held-out tokens, nats */
  uint64_t tokens;
  double unigram_entropy; /* of the held-out text, nats per token */
  double seconds;
} flap_eval_report;

typedef struct flap_peaks {
  uint64_t vram_bytes, ram_bytes, disk_bytes; /* measured */
  uint64_t process_bytes;                     /* resident set beside the budgets */
} flap_peaks;

typedef struct flap_train_result {
  uint64_t steps;         /* done, those before a resume included */
  uint64_t skipped_steps; /* of these; with fp16 only */
  bool interrupted;
  flap_eval_report first_eval, last_eval; /* tokens 0: no held-out part */
  flap_peaks peaks;
  uint64_t steady_lane_bytes[FLAP_LANE_COUNT]; /* measured on the last steady step; 0 if there was none */
  uint64_t pooled_bytes[2];                    /* of disk_lane_bytes, what the pool gave and took */
  uint64_t disk_lane_bytes[2], disk_bytes[2];  /* of all programs, read and written: of pages, and of what they were on
                                                  disk */
  double median_step_seconds;                  /* over steady steps */
  double total_seconds;
  uint64_t disk_written_bytes;    /* to the disks: states at the start, and what steps wrote */
  uint64_t saved_bytes;           /* to output_dir: checkpoints and export */
  uint64_t trained_tokens;        /* by this process */
  char checkpoint[FLAP_PATH_MAX]; /* the newest one, "" if none */
  bool exported;
  bool complete; /* with resume_from_checkpoint: auto, the run had come to its end before: nothing was done */
} flap_train_result;

/* Called on the engine thread; each may be NULL. */
typedef struct flap_observer {
  void *context;
  void (*planned)(void *context, const flap_plan *plan, const char *disk_backend);
  void (*prepared)(void *context, uint64_t train_tokens, uint64_t heldout_tokens, uint64_t sequences,
                   uint64_t resumed_step);
  void (*stepped)(void *context, const flap_step_report *report);
  void (*evaluated)(void *context, const flap_eval_report *report);
  /* It is durable; `seconds` since it was begun. Steps may have been done meanwhile. */
  void (*saved)(void *context, const char *folder, double seconds);
} flap_observer;

/* Trains as configured. `stop` turns non-zero (a signal handler sets it) to finish the step, save (unless
 * save_strategy is no) and return with result.interrupted. Resumed from the last step's checkpoint it has only the
 * export left to do. Writes output_dir: a Hugging Face folder at the end (export_final), checkpoint-<step>/,
 * metrics.jsonl, trace.json, finished.json; nothing if it is stopped before the first step. On an error output_dir
 * holds what was saved before and nothing half-written. */
FLAP_CHECKED flap_status flap_engine_train(const flap_run_config *config, const flap_observer *observer,
                                           const volatile sig_atomic_t *stop, flap_train_result *result_out);

/* ---- eval, sample, export --------------------------------------------------------------------------------- */

/* Loss of the model in config->model_name_or_path on config->dataset (all of it if val_size is 0, else its held-out
 * part). */
FLAP_CHECKED flap_status flap_engine_eval(const flap_run_config *config, const flap_observer *observer,
                                          flap_eval_report *report_out);

typedef struct flap_sample_options {
  const char *prompt;
  uint32_t max_new_tokens;
  bool fewer_if_full; /* no more than the model has positions for; otherwise too many are FLAP_INVALID */
  double temperature; /* 0: greedy */
  uint32_t top_k;     /* 0: all */
  double top_p;       /* 1: all */
  uint64_t seed;
} flap_sample_options;
/* Called with the text of each new token as it comes, which may be of 0 bytes: byte tokens are held back until it is
 * certain what they are (flap_tokenizer_stream). FLAP_INTERRUPTED stops. */
typedef flap_status (*flap_sample_fn)(void *context, const char *bytes, uint64_t byte_count);
/* Generates from the model in config->model_name_or_path, weights streamed when they do not fit. */
FLAP_CHECKED flap_status flap_engine_sample(const flap_run_config *config, const flap_sample_options *options,
                                            flap_sample_fn emit, void *context);

/* A checkpoint or model folder to a plain Hugging Face folder (weights, config, tokenizer; no optimizer states),
 * sharded by max_shard_bytes, in `dtype`: weights of another type are rounded from their masters where the folder is a
 * checkpoint. The target must not exist. FLAP_INTERRUPTED, with nothing left, when `stop` (may be NULL) turns
 * non-zero. */
FLAP_CHECKED flap_status flap_engine_export(const char *from_folder, const char *to_folder, flap_dtype dtype,
                                            uint64_t max_shard_bytes, const volatile sig_atomic_t *stop);
/* The type of a folder's weights, float32 where they have several: exported in it, none of them loses anything. */
FLAP_CHECKED flap_status flap_engine_weights_dtype(const char *folder, flap_dtype *dtype_out);

/* ---- checkpoints of a run ---------------------------------------------------------------------------------- */

typedef enum flap_checkpoint_state {
  FLAP_CHECKPOINT_WHOLE,   /* every file is what was saved, to the byte */
  FLAP_CHECKPOINT_UNKNOWN, /* without checksums: an earlier version saved it */
  FLAP_CHECKPOINT_UNREAD,  /* all files are there with their sizes; nothing else was asked for */
  FLAP_CHECKPOINT_UNFINISHED /* left by a crash; the next run removes it */,
  FLAP_CHECKPOINT_BROKEN
} flap_checkpoint_state;

typedef struct flap_checkpoint_report {
  char folder[FLAP_PATH_MAX];
  uint64_t step;
  int64_t saved_at; /* seconds since 1970, UTC */
  uint64_t bytes;   /* of its files */
  bool resumable;   /* it has the optimizer's states */
  flap_checkpoint_state state;
  char problem[1024];  /* what is wrong with a broken one, else "" */
  char numerics[512];  /* the numerics key, "" where it is not known */
  double read_seconds; /* that comparing took */
} flap_checkpoint_report;

/* Tells of each checkpoint in an output_dir, in the order of steps, or of `folder` if it is one itself: with `verify`
 * every file is read and compared with its checksum. Changes nothing, and may run beside a training run. Stores how
 * many there were; `report` must not keep what it is given. */
FLAP_CHECKED flap_status flap_engine_inspect(const char *folder, bool verify,
                                             void (*report)(void *context, const flap_checkpoint_report *report),
                                             void *context, uint32_t *count_out);

/* ---- machine --------------------------------------------------------------------------------------------- */

typedef struct flap_machine_query {
  flap_run_device device;
  uint32_t threads;      /* 0: all cores */
  uint64_t vram_bytes;   /* cuda: the budget of the run, which is not exceeded to measure; 0: there is none yet */
  const char *disk_path; /* a folder; NULL: none, and its rates are 0 */
  uint64_t disk_bytes;   /* that the run may put there; 0: little */
  bool fresh;            /* measured again */
} flap_machine_query;

/* Rates of this machine: measured once (about two seconds at most), then kept in $XDG_CACHE_HOME/flap/machine.json (or
 * ~/.cache), or in the file that FLAP_MACHINE names; such a file is used as it is when it is there. Caches of drives
 * and of hosts serve small files faster than large ones, so disks of which a run may need much are measured over more,
 * in up to four seconds, if they were not yet; a disk that has no room to measure in has rates of 0 too, or is
 * FLAP_NO_SPACE if `fresh`. For cuda what flap_device_open may say; FLAP_INVALID for a malformed file in FLAP_MACHINE;
 * a cache that cannot be written is no error. */
FLAP_CHECKED flap_status flap_engine_machine(const flap_machine_query *query, flap_machine *machine_out);

/* What `device: auto` does after cuda failed with this status: whether it takes the CPU, for there is no GPU, or, with
 * a warning, none that can be used. Clears the error then. */
bool flap_engine_falls_to_cpu(flap_status status);

/* The same as a profile that `machine` can name elsewhere: with the memory of host, card and disk that is free now. */
FLAP_CHECKED flap_status flap_engine_profile(flap_run_device device, uint32_t threads, const char *disk_path,
                                             bool fresh, flap_machine_profile *profile_out);

#ifdef __cplusplus
}
#endif
#endif
