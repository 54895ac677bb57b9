/* What each operation of a step takes on a device: measured there, or added up from the machine's rates on the sim
 * device.
 *
 * Folder-private, but for tests. A layer is a dozen kernels whose rates depend on its widths, and attention reaches a
 * third of what products reach: so a plan for this machine asks the device itself, with the layer and the micro-batch
 * of the run. The planner's estimates and simulations charge these times.
 */
#ifndef FLAP_ENGINE_MACHINE_OP_TIMES_H
#define FLAP_ENGINE_MACHINE_OP_TIMES_H

#include "engine/machine/matmul_choice.h"
#include "engine/step/layout.h"
#include "engine/step/program.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of an update by the host's cores, per element. */
typedef struct flap_host_ns {
  double alone, beside_copies; /* while nothing else uses the host's memory; while copies go both ways */
} flap_host_ns;

/* What a layer's backward does to the sums of gradients: adds to them, writes them first, or writes stored gradients in
 * their place, as in a step of one micro-batch. */
typedef enum flap_sums_written {
  FLAP_SUMS_ADDED_TO,
  FLAP_SUMS_FRESH,
  FLAP_SUMS_FINAL,
  FLAP_SUMS_KINDS
} flap_sums_written;

typedef struct flap_op_times {
  bool measured; /* on the device; else from rates */
  /* of one micro-batch; recompute: of everything, and of what a set of saved tensors does not keep */
  uint64_t embed_ns, forward_ns, recompute_ns, loss_ns;
  uint32_t set_count; /* of the family's sets, in training */
  uint32_t set_mask[FLAP_MODEL_SAVED_MAX];
  uint64_t set_recompute_ns[FLAP_MODEL_SAVED_MAX];
  /* in training: where no spare tensor is kept, and where all are; the head's sums are added to, or written first */
  uint64_t backward_ns[FLAP_SUMS_KINDS], backward_spare_ns[FLAP_SUMS_KINDS];
  uint64_t head_ns, head_fresh_ns, embed_backward_ns;
  uint64_t launch_ns;                      /* of an operation on a slice, beside its elements */
  double store_ns, measure_ns;             /* per element of a slice: of fp32 sums; where only the norm is wanted */
  double store_final_ns, measure_final_ns; /* where these are gradients as they are stored */
  double zero_ns;                          /* per element of fp32 sums */
  double adamw_ns, adamw_embedding_ns; /* per element of a slice; the embedding's moments may be of another format */
  flap_host_ns host, host_embedding;   /* likewise, by the host's cores */
  double copies_beside_host;           /* how many times as long copies both ways take meanwhile; 1: as long */
  /* How many times as long layers take where nothing else comes between for seconds, 1 where that is no
   * matter: a card at its limit of power pays for each rest that it does not get. */
  double sustained;
} flap_op_times;

typedef struct flap_op_times_spec {
  const flap_model_config *model;
  flap_model_shape shape;
  flap_dtype gradient_dtype;
  flap_optim optim;
  bool training;
  uint32_t threads;
  uint64_t launch_ns;          /* of the machine */
  flap_matmul_choice *matmuls; /* of a card: used, and filled where it tunes; NULL: first answers */
  uint64_t host_bytes; /* of host memory, that may be taken to measure updates by its cores; 0: they are not wanted */
} flap_op_times_spec;

/* From rates: runs each operation once on the sim device. */
FLAP_CHECKED flap_status flap_op_times_from_rates(const flap_op_times_spec *spec, const flap_machine *machine,
                                                  flap_op_times *times_out);
/* Runs all operations on the cuda device in rounds, with at most so much of the card's memory. FLAP_BUDGET: that is too
 * little for a layer and the head at once. Takes about fifteen seconds, some of them to warm the card up, and one
 * more where products are tuned. */
FLAP_CHECKED flap_status flap_op_times_measure_cuda(const flap_op_times_spec *spec, uint64_t overhead_bytes,
                                                    uint64_t vram_bytes, flap_op_times *times_out);
/* Runs a layer's and the head's operations on the cpu device, with at most so much memory, and corrects what rates say
 * of them; the rest is from rates. FLAP_BUDGET: even of a few tokens that would take too long, or too much memory.
 * Takes up to three seconds, for small models less. */
FLAP_CHECKED flap_status flap_op_times_measure_cpu(const flap_op_times_spec *spec, const flap_machine *machine,
                                                   uint64_t memory_bytes, flap_op_times *times_out);
/* Only tunes the products of a training step, a layer's and then the head's: where there is not room for both at once.
 * About two seconds. FLAP_BUDGET: too little even for that. */
FLAP_CHECKED flap_status flap_op_times_tune_cuda(const flap_op_times_spec *spec, uint64_t overhead_bytes,
                                                 uint64_t vram_bytes);

/* Of an operation of a program of this layout. 0 for what computes nothing, and for decoding, whose cost depends on the
 * position. */
uint64_t flap_op_times_of(const flap_op_times *times, const flap_layout *layout, const flap_op *op);
/* Of an update of a slice by the host's cores, FLAP_OP_HOST_ADAMW, while copies go both ways. */
uint64_t flap_op_times_beside_copies(const flap_op_times *times, const flap_layout *layout, const flap_op *op);
/* Of computing again what is not kept with a mask; that of a mask which is no set of the family's is not known, and
 * taken for that of everything. */
uint64_t flap_op_times_recompute(const flap_op_times *times, uint32_t mask);
/* Of a layer's backward where such a set is kept; 0: nothing is. */
uint64_t flap_op_times_backward(const flap_op_times *times, uint32_t mask, flap_sums_written sums);

#ifdef __cplusplus
}
#endif
#endif
