/* Weights and optimizer states between regions of the pager and files, while no program is queued.
 *
 * Folder-private, but for tests. A part's weights region holds its tensors at their offsets with zeros between them;
 * the states region of a slice holds what its format says (engine/step/layout.h): low halves (bf16 weights) or the fp32
 * masters (fp16 weights), first and second moments of its run of elements, as fp32 or as codes and what these are
 * relative to. What a file holds never depends on slices, pages or homes. Everything streams: no more memory is taken
 * than readers and writers of safetensors need for their tables, and one piece of a tensor.
 */
#ifndef FLAP_ENGINE_STORE_WEIGHTS_H
#define FLAP_ENGINE_STORE_WEIGHTS_H

#include "engine/step/layout.h"
#include "io/formats/checksums.h"
#include "io/formats/large_file.h"

#ifdef __cplusplus
extern "C" {
#endif

/* From scratch. Element i of tensor `name` is initializer_range times normal i of the Philox stream (seed, name); norms
 * are ones, biases zeros. The fp32 value is the master weight: with bf16 its low half goes to the states, with fp16 all
 * of it, and the weight is its rounding. Moments are
 * zero. In a layout without states only weights are filled. */
FLAP_CHECKED flap_status flap_weights_init(flap_pager *pager, const flap_layout *layout, uint64_t seed);

/* From a Hugging Face folder (or .safetensors file): bf16, fp16 and fp32 tensors. With bf16 weights the value in the
 * file is the master weight, exactly: fp32 and fp16 values leave their low halves in the states, bf16 values have none.
 * With fp16 weights it goes to the states, and the weight is its rounding. With fp32 weights everything is widened.
 * Moments are zero. Names may lack the "model." prefix. Tied models may hold lm_head.weight, and old files rotary
 * buffers: they are passed over; any other tensor that the model does not have is refused. FLAP_CORRUPT, FLAP_INVALID
 * and FLAP_UNSUPPORTED name file and tensor, and the shape that was wanted; a value that is NaN, infinite, or too large
 * for the layout's dtype is FLAP_NUMERIC. After a failure the regions hold anything or nothing. */
FLAP_CHECKED flap_status flap_weights_load(flap_pager *pager, const flap_layout *layout, const char *folder);
/* Opens, and checks names, shapes and dtypes of everything that load would read, without a pager: errors come before
 * anything is taken. */
FLAP_CHECKED flap_status flap_weights_check(const flap_model_config *config, const char *folder);

/* Writes the compute weights (bf16 high halves, fp16, or fp32) into `folder` as model.safetensors, or shards of at most
 * `shard_bytes_max` and their index, as transformers reads them. After a failure complete shards may stay: write into a
 * folder that appears whole (io/formats/durable.h). `checksums` takes those of the weights' files; NULL: none. `piece`
 * has the blocks that files are written in, past the page cache (io/formats/large_file.h); {0}: through the cache. */
FLAP_CHECKED flap_status flap_weights_save(flap_pager *pager, const flap_layout *layout, const char *folder,
                                           uint64_t shard_bytes_max, flap_file_piece piece, flap_checksums *checksums);
/* The bytes of these files; exact but for an index, whose size is estimated upwards. */
FLAP_CHECKED flap_status flap_weights_file_bytes(const flap_model_config *config, flap_dtype dtype,
                                                 uint64_t shard_bytes_max, uint64_t *bytes_out);

/* The same, and the states: optimizer-low.safetensors (I16, with bf16 weights) or optimizer-master.safetensors (F32,
 * with fp16 weights), optimizer-exp_avg.safetensors and optimizer-exp_avg_sq.safetensors (F32), under the tensors' own
 * names and shapes. With adamw_8bit these two have the embedding alone, and all other tensors are in
 * optimizer-exp_avg-codes.safetensors (I8) and optimizer-exp_avg_sq-codes.safetensors (U8), of the same shapes, and in
 * optimizer-exp_avg-largest.safetensors and optimizer-exp_avg_sq-largest.safetensors (F32): under each tensor's name a
 * row of one value for each 256 elements in order, the last for what is left. kernels/moments.h says what a code stands
 * for. Each region is read once, the states before the weights. The layout must have states. */
FLAP_CHECKED flap_status flap_weights_save_all(flap_pager *pager, const flap_layout *layout, const char *folder,
                                               uint64_t shard_bytes_max, flap_file_piece piece,
                                               flap_checksums *checksums);
/* Weights of exactly the layout's dtype, and states, bit for bit as they were saved. The layout must have states; its
 * slices, pages and homes need not be those of the run that saved. Files that lack a tensor, or have another than they
 * should, are refused; so is a checkpoint of adamw_8bit whose embedding has 8-bit moments: FLAP_NOT_FOUND says so. A
 * folder with pages of states (engine/store/state_pages.h) has them there, and whatever is read of these is checked.
 * With `checksums` (NULL: none) every byte of these files is compared with them while it is read: FLAP_CORRUPT names
 * the file. */
FLAP_CHECKED flap_status flap_weights_resume(flap_pager *pager, const flap_layout *layout, const char *folder,
                                             const flap_checksums *checksums);
/* The exact bytes of the states' files. */
FLAP_CHECKED flap_status flap_weights_states_bytes(const flap_model_config *config, flap_dtype dtype, flap_optim optim,
                                                   uint64_t *bytes_out);

#ifdef __cplusplus
}
#endif
#endif
