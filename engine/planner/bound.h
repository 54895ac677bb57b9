/* The machine bound: the least time that a step can take on a machine, whatever the plan.
 *
 * Folder-private, but for tests. Computed from shapes, budgets and rates alone, by code that shares nothing with
 * planner or pager, so that a poor plan cannot flatter itself.
 *
 * Compute. Forward and backward of all micro-batches: 3 times the forward's operations (a backward makes two products
 * for each of the forward's), at the matmul rate of the dtype; and what is computed again, see below. Recomputing
 * activations, element-wise kernels and launches are choices or details, so they count nothing.
 *
 * Bytes. Take the moment of a step when the norm is known. Every gradient is complete and rounded, and waits for
 * the clip coefficient; no state (weight or moment) has been updated yet. So state + gradients exist at once, and what
 * VRAM cannot hold of them lies outside: max(0, state + gradients - vram) bytes. AdamW, on the device, reads each of
 * these bytes before that moment comes again in the next step: they come in once (H2D). And the device changed each of
 * them since that moment in the step before: they went out once (D2H). The same holds for disks with all of VRAM and
 * RAM as what can be held: max(0, state + gradients - vram - ram) bytes are read, and as many written. The budgets
 * count whole, as if nothing else needed room; activations count nothing, since they can be recomputed. A byte takes a
 * byte: what is encoded, on disk or in a pool in RAM, takes less, so such a step can be shorter than this.
 *
 * Where no norm is waited for (nothing is clipped or scaled) a gradient may be gone before the next one is complete.
 * Then take the moment at which a step begins: only the state exists, and the same holds of it without gradients.
 *
 * Nor need a gradient wait if it is computed again once the norm is known. Then it counts no bytes, but operations: of
 * a matrix at least one product more, as many as its forward has; of the embedding, norms and biases none. The share of
 * gradients that do so is the one with which the step can be shortest.
 *
 * Waiting for the norm. Where it is, no update begins before that moment, and no backward of the next step before a
 * forward went through all layers, with their new weights. So between that moment and that backward all bytes that
 * lie outside come in (and are read); of the state, every byte of which has changed, what VRAM (and RAM) cannot hold
 * goes out (is written); and the host updates its share. The longest of these is update_seconds. The backward before
 * that moment, two thirds of compute, is all in front of it; the forward and what is computed again may be beside it.
 *
 * The host's cores may update a share of it all instead, where they are not the device. Then that share of states is no
 * matter of the bus: only its weights come in (H2D) and its gradients go out (D2H), and the host reads and writes its
 * states and reads its gradients. The share is the one with which the step can be shortest, so that no plan beats the
 * bound.
 *
 * Both ways at once. A bus moves less each way while both go on, and a disk less of reading and writing together, than
 * alone. Whatever the order, no moment moves more than both together can, or one alone at its own rate where that is
 * more (base/duplex.h): so that is a least time too, copies_seconds and disks_seconds.
 *
 * The cpu device. Compute and copies share the cores. Matmul rates were measured with all of them, so compute takes all
 * cores for compute_seconds; a copy takes a core for as long as memcpy runs. All this work over the cores is
 * shared_seconds. Per byte the cheaper of two prices is charged: one thread copying alone (h2d_bytes, d2h_bytes), or
 * all cores copying together (host_bytes, which counts a byte read and a byte written), whose rate per core is lower
 * where memory is the limit, but not always where caches help. Disks work by themselves, and checksums count nothing.
 */
#ifndef FLAP_ENGINE_PLANNER_BOUND_H
#define FLAP_ENGINE_PLANNER_BOUND_H

#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_bound_spec {
  const flap_model_config *model;
  flap_model_shape shape; /* of a micro-batch */
  uint32_t micro_batches;
  flap_dtype gradient_dtype;
  flap_optim optim;
  bool needs_no_norm;             /* nothing is clipped or scaled */
  uint64_t vram_bytes, ram_bytes; /* budgets */
  const flap_machine *machine;    /* rates above 0; those of disks may be 0 where nothing needs a disk */
} flap_bound_spec;

typedef struct flap_bound {
  double seconds; /* the largest of those below, and of backward_seconds and update_seconds together; infinite when
                     bytes must go to a disk that the machine has not */
  double compute_seconds;  /* what is computed again included */
  double backward_seconds; /* of these, a backward; one and a half times as long takes what is computed once */
  double lane_seconds[FLAP_LANE_COUNT];
  double copies_seconds, disks_seconds; /* both ways of the bus, and of the disks; 0 where the rates are not known */
  double shared_seconds;                /* cpu device: the CPU work of compute and copies over the cores; else 0 */
  double update_seconds;                /* that no first backward is beside; 0 where no norm is waited for */
  uint64_t lane_bytes[FLAP_LANE_COUNT];
} flap_bound;

void flap_bound_compute(const flap_bound_spec *spec, flap_bound *bound_out);

#ifdef __cplusplus
}
#endif
#endif
