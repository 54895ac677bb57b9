/* Rates of a cuda device. Folder-private. FLAP_UNSUPPORTED in a build without CUDA, FLAP_NOT_FOUND without a card. */
#ifndef FLAP_ENGINE_MACHINE_MACHINE_CUDA_H
#define FLAP_ENGINE_MACHINE_MACHINE_CUDA_H

#include "kernels/device/device.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* All but the disk rates, in about a second; `threads` of the host for host_bytes. Takes at most 3 GiB of the card. */
FLAP_CHECKED flap_status flap_machine_measure_cuda(uint32_t threads, flap_machine *machine_out);

#ifdef __cplusplus
}
#endif
#endif
