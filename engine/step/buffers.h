/* What the executor keeps beside the regions: workspaces and small buffers in VRAM, and lists on the host.
 *
 * Folder-private. Everything is taken from two arenas in a fixed order, so a measuring arena tells beforehand how much
 * it is.
 */
#ifndef FLAP_ENGINE_STEP_BUFFERS_H
#define FLAP_ENGINE_STEP_BUFFERS_H

#include "engine/step/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* In VRAM. T tokens of a micro-batch, n micro-batches of a step. */
typedef struct flap_device_buffers {
  void *ops_workspace, *model_workspace;
  float *rope_table;
  int32_t *tokens, *targets, *order;    /* (n, T); sample mode: tokens of one piece only */
  float *losses;                        /* (n, T) */
  float *block_squares;                 /* one per block of the run's list of blocks */
  int32_t *fault;                       /* set by the optimizer when a weight would not be finite */
  float *logits;                        /* (V), sample mode */
  unsigned char *hidden, *scratch;      /* the buffers that programs name */
  uint64_t hidden_bytes, scratch_bytes; /* of one of them */
  uint64_t kept_bytes;                  /* of a layer that saves: its input follows */
} flap_device_buffers;

/* What a job of the host is about. */
typedef struct flap_host_job {
  void *executor;
  uint32_t slice;
} flap_host_job;

/* On the host. */
typedef struct flap_host_buffers {
  void **addresses; /* of the leases of the program in work */
  int32_t *order;   /* (n, T): positions of each micro-batch sorted by token, then position */
  uint32_t *counts; /* (V + 1): for that sort */
  float *losses;    /* (n, T) */
  float *block_squares;
  uint8_t *decay; /* bits of the slices' blocks, decay_stride bytes per slice */
  uint64_t decay_stride;
  flap_host_job *jobs;       /* of each slice; NULL where the host updates none */
  int32_t *tokens, *targets; /* (n, T), for evaluations; sample mode: (T) */
  float *logits;             /* (V), sample mode */
} flap_host_buffers;

/* Bounds of every kernel call of a run. */
void flap_buffers_limits(const flap_layout *layout, uint32_t threads, flap_ops_limits *limits_out);
void flap_buffers_take_device(const flap_layout *layout, flap_device_kind kind, uint32_t threads, flap_arena *vram,
                              flap_device_buffers *buffers_out);
/* `leases_max`: of the longest program. */
void flap_buffers_take_host(const flap_layout *layout, uint32_t leases_max, flap_arena *ram,
                            flap_host_buffers *buffers_out);

/* Says which blocks of FLAP_OPS_BLOCK elements decay: those never straddle tensors. Nothing outside training. */
void flap_buffers_fill_decay(const flap_layout *layout, flap_host_buffers *buffers);

#ifdef __cplusplus
}
#endif
#endif
