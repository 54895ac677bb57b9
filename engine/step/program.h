/* Step programs: what happens in one optimizer step, one evaluation or one generated token, op by op.
 *
 * A program is known before it runs. It lists ops in order; pins and unpins are ops too, so the leases of the pager and
 * their lifetimes can be read off. Numbers never depend on the choices made here (segments, groups, when parts are
 * updated, saved or recomputed): they only decide when the same arithmetic happens.
 */
#ifndef FLAP_ENGINE_STEP_PROGRAM_H
#define FLAP_ENGINE_STEP_PROGRAM_H

#include "engine/step/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_op_kind {
  FLAP_OP_PIN,             /* lease[0] */
  FLAP_OP_UNPIN,           /* lease[0] */
  FLAP_OP_EMBED,           /* memory: embedding, x_out */
  FLAP_OP_LAYER_FORWARD,   /* weights, x_in, kept (none: nothing is), x_out, scratch (none: everything is kept) */
  FLAP_OP_LAYER_RECOMPUTE, /* weights, x_in, kept, nothing, scratch: what is not kept */
  FLAP_OP_HEAD,            /* head, projection holder, x_in, dx (none: loss only), head sums, projection sums */
  FLAP_OP_LAYER_BACKWARD,  /* weights, x_in, kept, dx, scratch, sums */
  FLAP_OP_EMBED_BACKWARD,  /* dx, embedding sums */
  FLAP_OP_ZERO,            /* sums; `index` is the part: where they are only added to */
  FLAP_OP_STORE_GRADIENT,  /* sums, gradient (none: they are only measured); `index` is the slice */
  FLAP_OP_ADAMW,           /* weights, states, gradient (or the sums that it is in); `index` is the slice */
  FLAP_OP_HOST_ADAMW,      /* states, gradient, weights: three leases in a row of a job of the host; likewise */
  FLAP_OP_LOSSES,          /* the losses of all micro-batches are complete, and updates in the only backward begin */
  FLAP_OP_NORM,            /* the norms of all gradients are complete: collect them, with the losses */
  FLAP_OP_LAYER_DECODE,    /* weights, x, cache, scratch; `index` is the layer */
  FLAP_OP_LOGITS,          /* head, projection holder, x */
  FLAP_OP_KIND_COUNT
} flap_op_kind;
const char *flap_program_op_name(flap_op_kind kind);

/* An operand: a lease of the program, a buffer of the executor's, or nothing. */
typedef uint32_t flap_operand;
#define FLAP_OPERAND_NONE UINT32_MAX
#define FLAP_OPERAND_BUFFER 0x80000000u /* | index: hidden-state buffers, then scratch for saved tensors */
#define FLAP_OPERAND_INPUT 0x40000000u  /* | lease of saved activations: the layer input behind the kept tensors */

#define FLAP_OP_OPERANDS 6
typedef struct flap_op {
  uint8_t kind;
  bool fresh;     /* HEAD, LAYER_BACKWARD: the first to write the sums, whatever they hold */
  uint32_t index; /* layer, slice or part, as the kind says */
  uint32_t micro_batch;
  flap_operand operand[FLAP_OP_OPERANDS];
} flap_op;

/* Which step this is. */
typedef struct flap_program_spec {
  enum { FLAP_PROGRAM_STEP, FLAP_PROGRAM_SWEEP, FLAP_PROGRAM_FORWARD, FLAP_PROGRAM_DECODE } kind;
  /* Of the parts that are not updated in the backward, which the layout says: */
  bool pending; /* STEP: the previous step's update is folded into this forward */
  bool sweep;   /* STEP: this step's update happens at its end */
  bool spread;  /* STEP, pending: a layer's update is spread over the forward of the segment before it */
} flap_program_spec;

typedef struct flap_program {
  flap_program_spec spec;
  uint32_t op_count, lease_count;
  uint32_t ops_max, leases_max; /* of the heap; 0 once placed */
  uint32_t job_count;
  uint32_t before_sweep; /* leases before those of this step's own update; all, where it has none */
  flap_op *ops;          /* NULL, as leases: it was only counted */
  flap_lease *leases;
  uint32_t live_max[FLAP_CLASS_COUNT]; /* streaming leases of a class that are live at the same time, at most */
} flap_program;

/* How many buffers the programs of a layout need beside the leases: hidden states (T, D), and scratch for the saved
 * tensors of a layer that are not kept, of so many bytes each. */
uint32_t flap_program_hidden_buffers(const flap_layout *layout);
uint32_t flap_program_scratch_buffers(const flap_layout *layout);
uint64_t flap_program_scratch_bytes(const flap_layout *layout);

/* Builds on the heap, for planning. `resident` (per region; NULL: nothing is) decides what counts for live_max. */
FLAP_CHECKED flap_status flap_program_build(const flap_layout *layout, const flap_program_spec *spec,
                                            const bool *resident, flap_program *program_out);
/* The same without the lists, in a fraction of the time and with no memory: its counts and live_max. */
FLAP_CHECKED flap_status flap_program_count(const flap_layout *layout, const flap_program_spec *spec,
                                            const bool *resident, flap_program *program_out);
/* What counting a step that sweeps at its end would come to, from the same step without and the sweep alone. */
void flap_program_join(const flap_program *step, const flap_program *sweep, flap_program *program_out);
/* Moves the lists from the heap to an arena, for running. */
void flap_program_place(flap_program *program, flap_arena *arena);
/* Frees what is on the heap. */
void flap_program_close(flap_program *program);

#ifdef __cplusplus
}
#endif
#endif
