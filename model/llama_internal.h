/* What a member of the Llama family reads from config.json, and how it becomes complete. Private to model/.
 *
 * The members share their tensors and their math, which are in llama.c and read nothing but the configuration; they
 * differ in their keys, in the fallbacks of these, and in which projections have biases.
 */
#ifndef FLAP_MODEL_LLAMA_INTERNAL_H
#define FLAP_MODEL_LLAMA_INTERNAL_H

#include "model/family_internal.h"

/* Tables of keys, for flap_family.keys. */
const flap_model_key *flap_llama_keys(uint32_t *count_out);
const flap_model_key *flap_mistral_keys(uint32_t *count_out);
const flap_model_key *flap_qwen2_keys(uint32_t *count_out);

/* For flap_family.finish_config: sets output_bias (and for qwen2 attention_bias), derives what was absent, and checks
 * everything. */
FLAP_CHECKED flap_status flap_llama_finish_config(flap_model_config *config);
FLAP_CHECKED flap_status flap_mistral_finish_config(flap_model_config *config);
FLAP_CHECKED flap_status flap_qwen2_finish_config(flap_model_config *config);

#endif
