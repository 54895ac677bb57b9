/* Rates of a cuda device. Folder-private. FLAP_UNSUPPORTED in a build without CUDA, FLAP_NOT_FOUND without a card. */
#ifndef FLAP_ENGINE_MACHINE_MACHINE_CUDA_H
#define FLAP_ENGINE_MACHINE_MACHINE_CUDA_H

#include "kernels/device/device.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What measuring takes of the card where nothing limits it: context, workspace, and operands that caches do not hold.
 */
#define FLAP_MACHINE_CUDA_VRAM ((uint64_t)1536 << 20)

/* All but the disk rates, in a second or two; `threads` of the host for host_bytes. Takes at most
 * FLAP_MACHINE_CUDA_VRAM of the card, and of a budget that is less (0: none) no more than that, as long as it holds the
 * smallest operands that tell anything: no run fits a budget that is much less. */
FLAP_CHECKED flap_status flap_machine_measure_cuda(uint32_t threads, uint64_t vram_bytes, flap_machine *machine_out);

#ifdef __cplusplus
}
#endif
#endif
