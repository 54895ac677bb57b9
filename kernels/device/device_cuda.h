/* What kernels need to know of a cuda device, without CUDA's own headers: where to launch, and where errors go.
 *
 * Role: for kernels/cuda alone. Every function asserts that the device is of the kind FLAP_DEVICE_CUDA.
 */
#ifndef FLAP_KERNELS_DEVICE_DEVICE_CUDA_H
#define FLAP_KERNELS_DEVICE_DEVICE_CUDA_H

#include "kernels/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_cuda_properties {
  uint32_t capability;       /* 10 * major + minor: 90 for an H100 */
  uint32_t multiprocessors;  /* never to be used where it could change a result of our kernels */
  uint32_t shared_bytes_max; /* shared memory that one block may opt in to */
  uint32_t driver, runtime;  /* 1000 * major + 10 * minor */
  char name[64];             /* "NVIDIA H100 80GB HBM3" */
} flap_cuda_properties;

/* Of the card that would be opened; starts nothing on it. Errors as flap_device_open's, but for FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_device_cuda_find(flap_cuda_properties *card_out);

const flap_cuda_properties *flap_device_cuda_properties(const flap_device *device);

/* The compute stream (a cudaStream_t), to be asked for before every group of launches: the device measures its busy
 * time from the first launch after an event to the next event. The thread that launches on the compute stream only. */
void *flap_device_cuda_compute(flap_device *device);

/* Makes `error` (a cudaError_t other than success, or another library's code) the device's sticky error, unless there
 * is one already; `what` and `reason` are for people: "rmsnorm", "an illegal memory access was encountered". Any
 * thread. */
void flap_device_cuda_fail(flap_device *device, const char *what, int error, const char *reason);
bool flap_device_cuda_failed(const flap_device *device);

#ifdef __cplusplus
}
#endif
#endif
