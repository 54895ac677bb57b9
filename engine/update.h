/* The optimizer's operation on a slice, whatever its states hold.
 *
 * Folder-private. Shared by the executor and by what measures operations, so that both launch the same.
 */
#ifndef FLAP_ENGINE_UPDATE_H
#define FLAP_ENGINE_UPDATE_H

#include "engine/layout.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_update {
  flap_dtype weight_dtype, gradient_dtype;
  const flap_state_format *format; /* of the slice's part */
  uint64_t elements;               /* of the slice: a multiple of FLAP_OPS_BLOCK */
  void *weights, *states;          /* device memory: the slice's weights; all of its states region */
  const void *gradient;            /* device memory, of gradient_dtype */
  const uint8_t *decay_blocks;     /* host memory */
  int32_t *fault;                  /* a device word */
} flap_update;

/* Launches one update; the contract is that of flap_ops_adamw and flap_ops_adamw_8bit. */
void flap_update_launch(flap_ops *ops, const flap_adamw *scalars, const flap_update *update);

#ifdef __cplusplus
}
#endif
#endif
