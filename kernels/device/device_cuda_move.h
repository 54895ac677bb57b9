/* Small transfers of the cuda device. Private to kernels/device. */
#ifndef FLAP_KERNELS_DEVICE_DEVICE_CUDA_MOVE_H
#define FLAP_KERNELS_DEVICE_DEVICE_CUDA_MOVE_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Asynchronous, in order with a stream: `bytes` > 0 from memory that the card can read to memory that it can write, its
 * own or pinned. What a launch may fail with. */
cudaError_t flap_cuda_move(void *to, const void *from, uint64_t bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
