/* Weights and optimizer states between regions of the pager and files, while no program is queued.
 *
 * Folder-private, but for tests. A part's weights region holds its tensors at their offsets with zeros between them;
 * the states region of a slice holds low halves (bf16 only), first and second moments of its run of elements
 * (engine/layout.h). What a file holds never depends on slices, pages or homes. Everything streams: no more memory is
 * taken than readers and writers of safetensors need for their tables, and one piece of a tensor.
 */
#ifndef FLAP_ENGINE_WEIGHTS_H
#define FLAP_ENGINE_WEIGHTS_H

#include "engine/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

struct flap_safetensors;

/* From scratch. Element i of tensor `name` is initializer_range times normal i of the Philox stream (seed, name); norms
 * are ones, biases zeros. The fp32 value is the master weight: with bf16 its low half goes to the states. Moments are
 * zero. In a layout without states only weights are filled. */
FLAP_CHECKED flap_status flap_weights_init(flap_pager *pager, const flap_layout *layout, uint64_t seed);

/* From a Hugging Face folder (or .safetensors file): bf16, fp16 and fp32 tensors; fp32 values become the master as they
 * are, 16-bit ones have no low half. Names may lack the "model." prefix. Tied models may hold lm_head.weight: it is
 * passed over. FLAP_CORRUPT or FLAP_INVALID names file, tensor, and the shape that was wanted; a value that is NaN or
 * infinite is FLAP_NUMERIC. `trained` (may be NULL; from flap_weights_check) is not needed. */
FLAP_CHECKED flap_status flap_weights_load(flap_pager *pager, const flap_layout *layout, const char *folder);
/* Opens, and checks names, shapes and dtypes of everything that load would read, without a pager: errors come before
 * anything is taken. */
FLAP_CHECKED flap_status flap_weights_check(const flap_model_config *config, const char *folder);

/* Writes the compute weights (bf16 high halves, or fp32) into `folder` as model.safetensors, or shards of at most
 * `shard_bytes_max` and their index, as transformers reads them (metadata {"format": "pt"}). */
FLAP_CHECKED flap_status flap_weights_save(flap_pager *pager, const flap_layout *layout, const char *folder,
                                           uint64_t shard_bytes_max);
/* The bytes of these files. */
FLAP_CHECKED flap_status flap_weights_file_bytes(const flap_model_config *config, flap_dtype dtype,
                                                 uint64_t shard_bytes_max, uint64_t *bytes_out);

/* Low halves and moments, as optimizer-low.safetensors (I16; bf16 only), optimizer-exp_avg.safetensors and
 * optimizer-exp_avg_sq.safetensors (F32) under the tensors' own names and shapes. */
FLAP_CHECKED flap_status flap_weights_save_states(flap_pager *pager, const flap_layout *layout, const char *folder);
/* Weights of exactly the layout's dtype, and states, bit for bit as they were saved. */
FLAP_CHECKED flap_status flap_weights_resume(flap_pager *pager, const flap_layout *layout, const char *folder);
FLAP_CHECKED flap_status flap_weights_states_bytes(const flap_model_config *config, flap_dtype dtype,
                                                   uint64_t *bytes_out);

#ifdef __cplusplus
}
#endif
#endif
