/* What a run is: the struct behind run.yaml. Field names are the configuration keys.
 *
 * The engine knows no YAML and no command line: tools/ fills this struct. flap_run_config_defaults gives every field
 * its documented default; flap_run_config_check refuses what cannot work, naming the key.
 */
#ifndef FLAP_ENGINE_RUN_CONFIG_H
#define FLAP_ENGINE_RUN_CONFIG_H

#include "base/dtype.h"
#include "base/status.h"
#include "io/block/codec.h"

#include <stdbool.h>
#include <stdint.h>

struct json_t;
struct flap_machine_profile;

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_PATH_MAX 4096
#define FLAP_RUN_DATASETS_MAX 64
#define FLAP_RUN_DISKS_MAX 16

/* A size as a person gives it: a number of bytes, what is there less a stated reserve, or the least that works. */
typedef enum flap_size_kind { FLAP_SIZE_BYTES, FLAP_SIZE_MAX, FLAP_SIZE_MIN } flap_size_kind;
typedef struct flap_size {
  flap_size_kind kind;
  uint64_t bytes; /* FLAP_SIZE_BYTES */
} flap_size;

typedef enum flap_run_device { FLAP_RUN_DEVICE_AUTO, FLAP_RUN_DEVICE_CPU, FLAP_RUN_DEVICE_CUDA } flap_run_device;
typedef enum flap_scheduler {
  FLAP_SCHEDULER_LINEAR,
  FLAP_SCHEDULER_COSINE,
  FLAP_SCHEDULER_CONSTANT,
  FLAP_SCHEDULER_CONSTANT_WITH_WARMUP
} flap_scheduler;
/* What the optimizer's moments are kept in; the update is the same: fp32, or 8-bit codes (kernels/README.md) for all
 * but the embedding. */
typedef enum flap_optim { FLAP_OPTIM_ADAMW, FLAP_OPTIM_ADAMW_8BIT } flap_optim;
typedef enum flap_activations {
  FLAP_ACTIVATIONS_AUTO,
  FLAP_ACTIVATIONS_KEEP,
  FLAP_ACTIVATIONS_OFFLOAD,
  FLAP_ACTIVATIONS_RECOMPUTE
} flap_activations;
typedef enum flap_run_saved {
  FLAP_RUN_SAVED_AUTO,
  FLAP_RUN_SAVED_ATTENTION,
  FLAP_RUN_SAVED_ALL_BUT_MLP,
  FLAP_RUN_SAVED_ALL,
  FLAP_RUN_SAVED_EVERYTHING
} flap_run_saved;
/* What is computed again at once, where a segment of several layers saves nothing. */
typedef enum flap_recompute { FLAP_RECOMPUTE_AUTO, FLAP_RECOMPUTE_SEGMENTS, FLAP_RECOMPUTE_LAYERS } flap_recompute;
typedef enum flap_clip { FLAP_CLIP_AUTO, FLAP_CLIP_FOLD, FLAP_CLIP_SWEEP } flap_clip;
/* When a part is updated: in the next forward, right before it is used; behind the whole backward; or in the backward,
 * once its gradient is complete. Where the norm of all gradients is needed first, that is a second backward. */
typedef enum flap_update_when {
  FLAP_UPDATE_AUTO,
  FLAP_UPDATE_FOLD,
  FLAP_UPDATE_SWEEP,
  FLAP_UPDATE_BACKWARD
} flap_update_when;
typedef enum flap_run_io { FLAP_RUN_IO_AUTO, FLAP_RUN_IO_URING, FLAP_RUN_IO_THREADS } flap_run_io;
/* Which algorithm a card's library takes for a product: the one that was fastest when tried here, or its first answer.
 */
typedef enum flap_run_matmul { FLAP_RUN_MATMUL_TUNED, FLAP_RUN_MATMUL_FIRST } flap_run_matmul;
typedef enum flap_strategy { FLAP_STRATEGY_NO, FLAP_STRATEGY_STEPS, FLAP_STRATEGY_EPOCH } flap_strategy;

/* One entry of `disk`. */
typedef struct flap_run_disk {
  char path[FLAP_PATH_MAX]; /* an existing folder */
  flap_size size;
  double weight; /* for striping, beside the others'; 0: what the disk can do as measured */
} flap_run_disk;

/* Where the optimizer runs: on the device, on the host's cores, or on the device for half of the parts. */
typedef enum flap_optimizer_place {
  FLAP_OPTIMIZER_AUTO,
  FLAP_OPTIMIZER_GPU,
  FLAP_OPTIMIZER_CPU,
  FLAP_OPTIMIZER_SPLIT
} flap_optimizer_place;

/* How states on disk get into a checkpoint. */
typedef enum flap_run_states {
  FLAP_RUN_STATES_AUTO,  /* shared with the run where the file system of output_dir is the disk's: see CHECKPOINTS.md */
  FLAP_RUN_STATES_COPIED /* as safetensors */
} flap_run_states;

/* `expert`: choices that are otherwise made by FLAP. 0 or AUTO: its own. None of them changes the numbers, but for
 * `matmul`, which is in the numerics key. */
typedef struct flap_expert {
  uint32_t segment_layers;
  uint32_t tail_layers; /* of the last segment */
  uint32_t group_micro_batches;
  flap_run_saved saved; /* which tensors a layer saves that saves any */
  flap_recompute recompute;
  flap_clip clip; /* the same as update: fold or sweep */
  flap_update_when update;
  flap_optimizer_place optimizer;
  uint64_t page_bytes;    /* a power of two, 4 KiB .. 4 MiB */
  uint64_t slice_bytes;   /* of one state slice; at most 64 MiB */
  uint64_t staging_bytes; /* of RAM between disk and VRAM, where that fits into half of ram */
  uint64_t pool_bytes;    /* of RAM for pages that stand encoded there, not on the disk; below a block
                             (FLAP_PAGER_POOL_BLOCK) none */
  flap_run_io io;
  uint32_t threads; /* of the worker pool; 0: all cores */
  flap_run_matmul matmul;
  flap_run_states checkpoint_states;
} flap_expert;

typedef struct flap_run_config {
  char source[FLAP_PATH_MAX]; /* the file the configuration came from, for messages */

  /* model and data */
  struct json_t *model; /* inline Hugging Face config.json keys, to train from scratch; or NULL. Owned */
  char model_name_or_path[FLAP_PATH_MAX]; /* a Hugging Face folder; or "" */
  char tokenizer[FLAP_PATH_MAX];          /* "bytes", a tokenizer.json, or a folder; "": the one of the model folder */
  uint32_t dataset_count;
  char *dataset[FLAP_RUN_DATASETS_MAX]; /* paths and globs; owned */
  double val_size;       /* below 1 a share of the sequences, otherwise a number of them; 0: no held-out part */
  uint32_t cutoff_len;   /* tokens per sequence */
  bool cutoff_len_given; /* else it is a default, and an evaluation takes no more than the model has positions */

  /* training */
  uint32_t per_device_train_batch_size; /* sequences per micro-batch */
  uint32_t gradient_accumulation_steps; /* micro-batches per step */
  uint64_t max_steps;                   /* 0: num_train_epochs decides */
  double num_train_epochs;
  double learning_rate;
  flap_scheduler lr_scheduler_type;
  uint64_t warmup_steps; /* wins over warmup_ratio when > 0 */
  double warmup_ratio;
  flap_optim optim;
  double weight_decay, adam_beta1, adam_beta2, adam_epsilon;
  double max_grad_norm;          /* 0: no clipping */
  bool bf16, fp16;               /* both false: everything fp32 */
  double fp16_init_scale;        /* of the loss, with fp16: powers of two */
  double fp16_min_scale;         /* an overflow at this one ends the run */
  uint64_t fp16_growth_interval; /* good steps in a row that double it */
  flap_dtype gradient_dtype;     /* FLAP_BF16 or FLAP_F32; with fp32 weights always FLAP_F32 */
  flap_activations activations;  /* gradient_checkpointing: true means recompute */
  uint64_t seed;

  /* reporting and saving */
  uint64_t logging_steps;
  uint64_t eval_steps; /* 0: at the start and the end only */
  flap_strategy save_strategy;
  uint64_t save_steps;
  double save_minutes;       /* as well, when so long was not saved; 0: never */
  uint32_t save_total_limit; /* 0: keep all */
  bool save_only_model;
  char output_dir[FLAP_PATH_MAX];
  bool overwrite_output_dir;
  char resume_from_checkpoint[FLAP_PATH_MAX]; /* "": no; "true": the newest in output_dir; "auto": that, or none; else a
                                                 folder */
  bool allow_numerics_change;                 /* resume although the numerics key is another */
  bool export_final;                          /* export: final|none */

  /* the machine */
  flap_run_device device;
  char machine[FLAP_PATH_MAX];          /* a preset or a file, for planning alone; "": this one */
  struct flap_machine_profile *profile; /* what it says; owned; NULL: this machine */
  flap_size vram, ram;
  uint32_t disk_count;
  flap_run_disk disk[FLAP_RUN_DISKS_MAX];
  flap_compression compression;
  uint64_t ssd_tbw;        /* bytes that may be written to all disks together; 0: not known */
  uint64_t ssd_budget;     /* bytes that this run may write; 0: any number */
  double ssd_budget_share; /* the same as a share of ssd_tbw; 0: ssd_budget says */
  flap_expert expert;
} flap_run_config;

/* The name of the model's set of saved tensors (flap_model_saved_sets); NULL for auto. */
const char *flap_run_config_saved(flap_run_saved saved);

void flap_run_config_defaults(flap_run_config *config);
/* Everything that can be told without reading files: ranges, contradictions. FLAP_INVALID names the key. */
FLAP_CHECKED flap_status flap_run_config_check(const flap_run_config *config);
/* Frees what is owned. */
void flap_run_config_close(flap_run_config *config);

/* Whether updates depend on the norm of all gradients: for clipping, or to know whether fp16 overflowed. */
bool flap_run_config_needs_norm(const flap_run_config *config);
/* What `update` and `clip` say together. */
flap_update_when flap_run_config_update(const flap_expert *expert);
/* As the configuration spells it. */
const char *flap_run_config_optim_name(flap_optim optim);
/* Weights' and activations' storage type. */
flap_dtype flap_run_config_dtype(const flap_run_config *config);

#ifdef __cplusplus
}
#endif
#endif
