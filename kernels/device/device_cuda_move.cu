/* Small transfers between pinned memory and the arena, by a kernel.
 *
 * A copy by CUDA takes its turn on the card's copy engine behind every copy that stands there, whatever stream it is
 * of: with states and gradients on their way that is up to a tenth of a second. A kernel's loads and stores pass
 * between them.
 */
#include "kernels/device/device_cuda_move.h"

#define THREADS 256u
#define BLOCKS_MAX 32u /* enough for the bus, and few enough to run beside anything */

__global__ void __launch_bounds__(THREADS) move_kernel(unsigned char *to, const unsigned char *from, uint64_t words,
                                                       uint64_t bytes) {
  const uint64_t first = (uint64_t)blockIdx.x * THREADS + threadIdx.x, stride = (uint64_t)gridDim.x * THREADS;
  for (uint64_t i = first; i < words; i += stride)
    ((uint4 *)to)[i] = ((const uint4 *)from)[i];
  for (uint64_t i = words * sizeof(uint4) + first; i < bytes; i += stride)
    to[i] = from[i];
}

cudaError_t flap_cuda_move(void *to, const void *from, uint64_t bytes, cudaStream_t stream) {
  const bool aligned = ((uintptr_t)to | (uintptr_t)from) % sizeof(uint4) == 0;
  const uint64_t words = aligned ? bytes / sizeof(uint4) : 0, rest = bytes - words * sizeof(uint4);
  const uint64_t most = words > rest ? words : rest, blocks = (most + THREADS - 1) / THREADS;
  move_kernel<<<(uint32_t)(blocks < BLOCKS_MAX ? blocks : BLOCKS_MAX), THREADS, 0, stream>>>(
      (unsigned char *)to, (const unsigned char *)from, words, bytes);
  return cudaGetLastError();
}
