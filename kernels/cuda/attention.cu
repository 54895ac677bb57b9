/* Which attention kernels a shape gets, and the layout of the scratch. The choice is a function of the shape alone, so
 * operands whose addresses the tensor-core kernels could not use are an error rather than another choice. */
#include "kernels/cuda/attention.h"

#include "kernels/cuda/attention_launch.cuh"

#include <math.h>

namespace {

bool rows_aligned(const flap_cuda_attention_shape *shape) {
  return shape->q_stride % 8 == 0 && shape->kv_stride % 8 == 0;
}

bool takes_tiles(const flap_cuda_attention_shape *shape) {
  return shape->dtype != FLAP_F32 && shape->head_size <= ATTENTION_MMA_HEAD_MAX && rows_aligned(shape);
}

/* Whether this is a GPU for the kernels of sm_90a; which GPU it is, is part of the numerics key. */
bool takes_hopper(const flap_cuda_attention_shape *shape) {
  int device = 0, major = 0;
  return !shape->portable && takes_tiles(shape) && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

bool valid(const flap_cuda_attention_shape *shape) {
  return shape->batch > 0 && shape->queries > 0 && shape->kv_heads > 0 && shape->heads % shape->kv_heads == 0 &&
         shape->heads > 0 && shape->head_size > 0 && shape->head_size % FLAP_OPS_CUDA_HEAD_STEP == 0 &&
         shape->head_size <= FLAP_OPS_CUDA_HEAD_MAX && shape->keys == shape->first_position + shape->queries &&
         (shape->dtype == FLAP_F32 || shape->dtype == FLAP_BF16 || shape->dtype == FLAP_F16);
}

bool aligned(const void *a, const void *b, const void *c, const void *d) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c) |
           reinterpret_cast<uintptr_t>(d)) &
          15) == 0;
}

/* What a GPU has that is made for consumers: compute capability 8.6, 8.9 and 12.0. */
constexpr int LITTLE_SHARED_MAX = 99 * 1024, LITTLE_SHARED_ALL = 100 * 1024;

cudaError_t look_at_shared(attention_args *args, bool little) {
  int device = 0, most = LITTLE_SHARED_MAX, all = LITTLE_SHARED_ALL;
  cudaError_t status = little ? cudaSuccess : cudaGetDevice(&device);
  if (status == cudaSuccess && !little)
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess && !little)
    status = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  args->shared_max = static_cast<uint32_t>(most);
  args->shared_all = static_cast<uint32_t>(all);
  return status;
}

attention_args arguments(const flap_cuda_attention_shape *shape, const void *q, const void *k, const void *v) {
  attention_args args = {};
  args.q = q;
  args.k = k;
  args.v = v;
  args.parts = 1;
  args.stages = 1;
  args.batch = shape->batch;
  args.queries = shape->queries;
  args.keys = shape->keys;
  args.first_position = shape->first_position;
  args.heads = shape->heads;
  args.kv_heads = shape->kv_heads;
  args.head_size = shape->head_size;
  args.q_stride = shape->q_stride;
  args.kv_stride = shape->kv_stride;
  const double scale = 1.0 / sqrt(static_cast<double>(shape->head_size));
  args.scale = static_cast<float>(scale);
  args.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  return args;
}

bool takes_chain(const flap_cuda_attention_shape *shape) {
  return !shape->two_passes && takes_hopper(shape) && cuda_attention_chain_of(shape).slots > 0;
}

cudaError_t backward_chain(attention_args args, const flap_cuda_attention_shape *shape, void *scratch,
                           cudaStream_t stream) {
  const cuda_attention_chain chain = cuda_attention_chain_of(shape);
  args.turns = reinterpret_cast<uint32_t *>(static_cast<unsigned char *>(scratch) + chain.turns);
  args.sums = reinterpret_cast<float4 *>(static_cast<unsigned char *>(scratch) + chain.sums);
  args.slots = chain.slots;
  args.section_units = chain.section_units;
  const cudaError_t status = cudaMemsetAsync(args.turns, 0, chain.turns_bytes, stream);
  return status != cudaSuccess ? status : attention_backward_chain(args, shape->dtype, stream);
}

} // namespace

const char *flap_cuda_attention_path(const flap_cuda_attention_shape *shape, bool backward) {
  if (!backward && shape->queries <= CUDA_ATTENTION_FEW_QUERIES)
    return "few";
  if (!takes_tiles(shape))
    return "plain";
  if (backward && takes_chain(shape))
    return "chain";
  return !takes_hopper(shape) ? "mma" : backward ? "wgmma" : "stream";
}

cudaError_t flap_cuda_attention_forward(const flap_cuda_attention_shape *shape, void *out, float *lse, const void *q,
                                        const void *k, const void *v, void *scratch, cudaStream_t stream) {
  if (!valid(shape))
    return cudaErrorInvalidValue;
  if (rows_aligned(shape) && !aligned(out, q, k, v))
    return cudaErrorMisalignedAddress;
  attention_args args = arguments(shape, q, k, v);
  args.out = out;
  args.lse_out = lse;
  args.partial = static_cast<float *>(scratch);
  if (shape->queries <= CUDA_ATTENTION_FEW_QUERIES)
    return attention_forward_few(args, shape->dtype, stream);
  if (!takes_tiles(shape))
    return attention_forward_plain(args, shape->dtype, stream);
  if (takes_hopper(shape))
    return attention_forward_stream(args, shape->dtype, stream);
  const cudaError_t status = look_at_shared(&args, shape->little_shared);
  return status != cudaSuccess ? status : attention_forward_mma(args, shape->dtype, stream);
}

cudaError_t flap_cuda_attention_backward(const flap_cuda_attention_shape *shape, void *dq, void *dk, void *dv,
                                         const void *dout, const void *q, const void *k, const void *v, const void *out,
                                         const float *lse, void *scratch, cudaStream_t stream) {
  if (!valid(shape) || shape->first_position != 0)
    return cudaErrorInvalidValue;
  if (rows_aligned(shape) && (!aligned(q, k, v, out) || !aligned(dq, dk, dv, dout)))
    return cudaErrorMisalignedAddress;
  attention_args args = arguments(shape, q, k, v);
  args.dq = dq;
  args.dk = dk;
  args.dv = dv;
  args.dout = dout;
  args.out_in = out;
  args.lse_in = lse;
  float2 *statistics = static_cast<float2 *>(scratch);
  cudaError_t status = attention_statistics(args, shape->dtype, statistics, stream);
  if (status != cudaSuccess)
    return status;
  args.statistics = statistics;
  args.partial =
      reinterpret_cast<float *>(static_cast<unsigned char *>(scratch) + cuda_attention_statistics_bytes(shape));
  if (!takes_tiles(shape))
    return attention_backward_plain(args, shape->dtype, stream);
  args.parts = cuda_attention_backward_parts(shape);
  const bool hopper = takes_hopper(shape);
  if (!hopper)
    status = look_at_shared(&args, shape->little_shared);
  if (status != cudaSuccess)
    return status;
  if (!hopper)
    status = attention_backward_mma(args, shape->dtype, stream);
  else if (!takes_chain(shape))
    status = attention_backward_hopper(args, shape->dtype, stream);
  else
    status = backward_chain(args, shape, scratch, stream);
  return status != cudaSuccess ? status : attention_backward_join_parts(args, shape->dtype, stream);
}
