/* How the files of the attention kernels reach each other; see attention.h for the contract. */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_LAUNCH_CUH
#define FLAP_KERNELS_CUDA_ATTENTION_LAUNCH_CUH

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.cuh"

/* Head sizes up to this go to the kernels on the tensor cores. */
constexpr uint32_t ATTENTION_MMA_HEAD_MAX = 128;

cudaError_t attention_forward_mma(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
/* With args.parts above 1, dk and dv are left in parts. */
cudaError_t attention_backward_mma(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
/* The same two on Hopper alone: attention_stream.cu, attention_hopper.cu and attention_chain.cu are code for sm_90a. */
cudaError_t attention_forward_stream(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
cudaError_t attention_backward_hopper(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
/* The backward on Hopper in one kernel; args.turns, args.slots of cuda_attention_chain_of. */
cudaError_t attention_backward_chain(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
/* Adds the parts of dk and dv in order; nothing where there is one. */
cudaError_t attention_backward_join_parts(const attention_args &args, flap_dtype dtype, cudaStream_t stream);

cudaError_t attention_forward_plain(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
cudaError_t attention_backward_plain(const attention_args &args, flap_dtype dtype, cudaStream_t stream);
/* Fills `statistics` from lse, out and dout, whatever the dtype. */
cudaError_t attention_statistics(const attention_args &args, flap_dtype dtype, float2 *statistics, cudaStream_t stream);

/* For few queries: the keys are read in parts, whose results go through args.partial. */
cudaError_t attention_forward_few(const attention_args &args, flap_dtype dtype, cudaStream_t stream);

/* Calls launch<T, HD>(args, stream) for the storage type and the width of tiles that the head size needs. */
#define ATTENTION_FOR_TILES(launch, args, dtype, stream)                                            \
  ((dtype) == FLAP_BF16     ? (args).head_size <= 64 ? launch<__nv_bfloat16, 64>((args), (stream))  \
                                                     : launch<__nv_bfloat16, 128>((args), (stream)) \
       : (args).head_size <= 64 ? launch<__half, 64>((args), (stream))                              \
                            : launch<__half, 128>((args), (stream)))

/* One launch with `shared_bytes` of dynamic shared memory. Raising the limit of a kernel is cheap and is no work of the
 * stream, so it is done every time: no state is kept between calls, whatever device is current. */
inline cudaError_t attention_launch(void (*kernel)(const attention_args), uint64_t blocks, uint32_t threads,
                                    uint32_t shared_bytes, const attention_args &args, cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess)
      return status;
  }
  kernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

#endif
