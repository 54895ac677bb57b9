/* The executor: interprets step programs. It pins and unpins as the program says, and calls the model with the
 * pointers.
 *
 * Folder-private, but for tests. One thread, the engine's. It allocates nothing, but to find out where a number that is
 * not finite came from, which ends the run.
 */
#ifndef FLAP_ENGINE_RUN_EXECUTOR_H
#define FLAP_ENGINE_RUN_EXECUTOR_H

#include "engine/machine/op_times.h"
#include "engine/step/buffers.h"
#include "engine/step/loss_scale.h"
#include "engine/step/setup.h"
#include "kernels/host_optimizer.h"

#ifdef __cplusplus
extern "C" {
#endif

struct flap_trace;

/* What a program works on. (n, T): n micro-batches of T tokens. */
typedef struct flap_executor_input {
  const int32_t *tokens, *targets;         /* host, (n, T); sampling: (decode_tokens), NULL */
  uint64_t counted;                        /* targets that are not negative: losses are means over these */
  uint64_t step;                           /* of a step, from 0 */
  double learning_rate;                    /* of that step */
  uint32_t decode_tokens, decode_position; /* sampling: how many new tokens, and the position of the first */
} flap_executor_input;

typedef struct flap_executor_result {
  double loss; /* mean over the counted tokens */
  double loss_sum;
  double grad_norm;    /* before clipping, without the loss scale; steps only */
  double loss_scale;   /* of the step; 0: not scaled */
  bool skipped;        /* a step of fp16 whose loss or gradients are not finite: its update will change nothing */
  const float *logits; /* (V), of the last token; sampling only; until the next run */
} flap_executor_result;

typedef struct flap_executor {
  /* by the owner, before the first run */
  const flap_run_config *config; /* of the optimizer; NULL where nothing is trained */
  const flap_layout *layout;
  const flap_program *programs; /* FLAP_SETUP_PROGRAM_COUNT */
  flap_pager *pager;
  flap_ops *ops;
  flap_device_buffers device;
  flap_host_buffers host;
  flap_host_optimizer *host_optimizer; /* NULL where the host updates nothing, and in a simulation */
  const flap_op_times *times;          /* a simulation's: what operations take; else NULL */
  struct flap_trace *trace;            /* or NULL */
  bool timed;                          /* launches are over when they return, so their times go to the trace */
  /* of the next step; begun by flap_executor_open, set by the owner who resumes a run */
  flap_loss_scale loss_scale;

  /* its own */
  flap_model_run run;
  uint32_t hidden_buffers;
  flap_setup_program queue[2];
  uint32_t queued;
  const flap_executor_input *input; /* during a run */
  double scale;                     /* likewise: its loss scale, which a second backward needs behind the norm */
  flap_adamw adamw;                 /* of the update that is pending */
  uint64_t update_step;             /* whose update that is, from 1 */
  int32_t host_fault;               /* as device.fault, of the host's updates */
  bool has_update, skips;           /* skips: the pending update is a skipped step's */
  bool knows_norm;                  /* of the step in work */
  enum { FLAP_EXECUTE, FLAP_EXECUTE_NOTHING, FLAP_EXECUTE_SEARCH, FLAP_EXECUTE_UPDATE } mode;
} flap_executor;

/* Uploads what never changes: the rope table. */
FLAP_CHECKED flap_status flap_executor_open(flap_executor *executor);

/* An operation whose launches bore this label ran from start to end: a row of the trace. Any thread. */
void flap_executor_trace(struct flap_trace *trace, uint64_t label, uint64_t started_ns, uint64_t ended_ns);

/* Queues a program, at most two, so that its first transfers begin while the one before still computes. */
FLAP_CHECKED flap_status flap_executor_begin(flap_executor *executor, flap_setup_program program);
/* Runs the oldest queued program to its end. FLAP_NUMERIC names the step and the layer where a value stopped being
 * finite; the executor is of no use then. With fp16 that is so only at the least loss scale: above it the step is
 * skipped. */
FLAP_CHECKED flap_status flap_executor_run(flap_executor *executor, const flap_executor_input *input,
                                           flap_executor_result *result_out);
/* Runs the queued program for its folded update alone: a step that was begun but is not wanted any more. */
FLAP_CHECKED flap_status flap_executor_run_update(flap_executor *executor);

/* How many leases of the program that is queued, the only one, make the update that is pending. */
uint32_t flap_executor_update_leases(const flap_executor *executor);
/* After a failure, whether the updates that were made so far are good as far as can be told: no weight became infinite
 * or NaN, and the device works. What a run returns FLAP_OK for is. */
bool flap_executor_updates_are_good(flap_executor *executor);

#ifdef __cplusplus
}
#endif
#endif
