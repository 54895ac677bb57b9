/* The optimizer's operation on a slice, whatever its states hold.
 *
 * Folder-private. Shared by the executor and by what measures operations, so that both launch the same. All of an
 * update is in device memory, or all in the host's.
 */
#ifndef FLAP_ENGINE_STEP_UPDATE_H
#define FLAP_ENGINE_STEP_UPDATE_H

#include "engine/step/layout.h"
#include "kernels/host_optimizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_update {
  flap_dtype weight_dtype, gradient_dtype;
  const flap_state_format *format; /* of the slice's part */
  uint64_t elements;               /* of the slice: a multiple of FLAP_OPS_BLOCK */
  void *weights, *states;          /* the slice's weights; all of its states region */
  const void *gradient;            /* of gradient_dtype */
  const uint8_t *decay_blocks;     /* host memory, always */
  int32_t *fault;                  /* a word */
} flap_update;

/* Scalars of an ordinary step, for measuring. */
extern const flap_adamw flap_update_usual_scalars;

/* Launches one update of device memory; the contract is that of flap_ops_adamw and flap_ops_adamw_8bit. */
void flap_update_launch(flap_ops *ops, const flap_adamw *scalars, const flap_update *update);
/* Threads for the host's updates, of so many that there are cores: two are left to those that launch and copy. */
uint32_t flap_update_host_threads(uint32_t threads);
/* The same by the host's cores, and over when it returns. */
void flap_update_on_host(flap_host_optimizer *optimizer, const flap_adamw *scalars, const flap_update *update);

#ifdef __cplusplus
}
#endif
#endif
