/* The cuda ops as an object: workspace, numerics text, table; and the operations that CUDA does by itself. */
#include "kernels/cuda/cuda_internal.h"
#include "kernels/matmul_table.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static flap_status check_kernels(const flap_cuda_properties *card) {
  const cudaError_t error = cuda_kernels_there();
  if (error == cudaSuccess)
    return FLAP_OK;
  (void)cudaGetLastError();
  return flap_error_set(FLAP_DEVICE,
                        "cuda: this build has no kernels for %s (compute capability %u.%u): %s; build with "
                        "-DCMAKE_CUDA_ARCHITECTURES=%u",
                        card->name, card->capability / 10, card->capability % 10, cudaGetErrorString(error),
                        card->capability);
}

static flap_status cuda_open(flap_ops *ops) {
  const flap_ops_limits *limits = &ops->limits;
  const flap_cuda_properties *card = flap_device_cuda_properties(ops->device);
  if (limits->dtype != FLAP_F32 && limits->dtype != FLAP_BF16 && limits->dtype != FLAP_F16)
    return flap_error_set(FLAP_UNSUPPORTED, "kernels: the cuda device computes bfloat16, float16 and float32, not %s",
                          flap_dtype_name(limits->dtype));
  FLAP_TRY(check_kernels(card));
  cuda_ops *cuda = calloc(1, sizeof *cuda);
  if (cuda == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "kernels: no memory for the cuda operations");
  const flap_status status = cuda_blas_open(ops, ops->workspace, &cuda->blas);
  if (status != FLAP_OK) {
    free(cuda);
    return status;
  }
  cuda->scratch = (unsigned char *)ops->workspace + CUDA_BLAS_WORKSPACE_BYTES;
  cuda->scratch_bytes = cuda_scratch_needed(limits);
  ops->state = cuda;
  (void)snprintf(ops->numerics, sizeof ops->numerics,
                 "cuda " CUDA_KERNELS " sm_%u %s, %u multiprocessors, driver %u.%u, runtime %u.%u, %s",
                 card->capability, card->name, card->multiprocessors, card->driver / 1000, card->driver % 1000 / 10,
                 card->runtime / 1000, card->runtime % 1000 / 10, cuda_blas_version(cuda->blas));
  return FLAP_OK;
}

/* The stream's work may still use the handle's kernels and the workspace. */
static void cuda_close(flap_ops *ops) {
  (void)cudaStreamSynchronize(cuda_stream(ops));
  cuda_blas_close(cuda_state(ops)->blas);
  free(ops->state);
}

/* What algorithms belong to: the library, and the GPU with its multiprocessors, which are not the same in all of a
 * name. */
static void describe_target(const flap_cuda_properties *card, const char *version, char *target_out, size_t bytes) {
  (void)snprintf(target_out, bytes, "sm_%u %.63s, %u multiprocessors, %s", card->capability, card->name,
                 card->multiprocessors, version);
}

/* Without opening a device: of the card that would be opened. */
static flap_status cuda_matmul_target(char *target_out, size_t bytes) {
  flap_cuda_properties card;
  char version[32];
  FLAP_TRY(flap_device_cuda_find(&card));
  FLAP_TRY(cuda_blas_find_version(version, sizeof version));
  describe_target(&card, version, target_out, bytes);
  return FLAP_OK;
}

static flap_status cuda_set_matmuls(flap_ops *ops, flap_matmul_table *table, flap_matmul_mode mode) {
  const flap_cuda_properties *card = flap_device_cuda_properties(ops->device);
  char target[FLAP_MATMUL_TARGET_MAX];
  describe_target(card, cuda_blas_version(cuda_state(ops)->blas), target, sizeof target);
  if (strcmp(table->target, target) != 0)
    return flap_error_set(FLAP_INVALID, "cuda: the table of products is for \"%s\", and this is \"%s\"", table->target,
                          target);
  return cuda_blas_set_table(cuda_state(ops)->blas, table, mode);
}

static void cuda_zero(flap_ops *ops, void *memory, uint64_t bytes) {
  if (bytes > 0)
    cuda_check(ops, "zero", cudaMemsetAsync(memory, 0, bytes, cuda_stream(ops)));
}

static void cuda_copy(flap_ops *ops, void *to, const void *from, uint64_t bytes) {
  if (bytes > 0)
    cuda_check(ops, "copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_stream(ops)));
}

void cuda_copy_rows(flap_ops *ops, void *to, const void *from, uint64_t row_bytes, uint32_t rows,
                    uint64_t stride_bytes) {
  cuda_check(ops, "copy",
             cudaMemcpy2DAsync(to, stride_bytes, from, stride_bytes, row_bytes, rows, cudaMemcpyDeviceToDevice,
                               cuda_stream(ops)));
}

const flap_ops_table flap_ops_cuda_table = {
    .workspace_bytes = cuda_workspace_bytes,
    .open = cuda_open,
    .close = cuda_close,
    .set_matmuls = cuda_set_matmuls,
    .matmul_target = cuda_matmul_target,
    .matmul = cuda_matmul,
    .bias_backward = cuda_bias_backward,
    .zero = cuda_zero,
    .copy = cuda_copy,
    .embedding = cuda_embedding,
    .embedding_backward = cuda_embedding_backward,
    .rmsnorm = cuda_rmsnorm,
    .rmsnorm_backward = cuda_rmsnorm_backward,
    .add = cuda_add,
    .rope = cuda_rope,
    .swiglu = cuda_swiglu,
    .swiglu_backward = cuda_swiglu_backward,
    .matmul_swiglu = cuda_matmul_swiglu,
    .matmul_swiglu_backward = cuda_matmul_swiglu_backward,
    .matmul_rope = cuda_matmul_rope,
    .attention = cuda_attention,
    .attention_backward = cuda_attention_backward,
    .attention_decode = cuda_attention_decode,
    .head_loss = cuda_head_loss,
    .gradient_store = cuda_gradient_store,
    .adamw = cuda_adamw,
    .adamw_8bit = cuda_adamw_8bit,
};
