/* The Llama family: what a member reads from config.json, what its parts are made of. Private to model/.
 *
 * The members share their tensors (llama_shapes.c) and their math (llama.c), which read nothing but the configuration;
 * they differ in their keys, in the fallbacks of these, and in which projections have biases.
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

/* ---- what a layer is made of ----------------------------------------------------------------------------- */

typedef enum llama_role {
  LLAMA_INPUT_NORM,
  LLAMA_Q,
  LLAMA_K,
  LLAMA_V,
  LLAMA_O,
  LLAMA_Q_BIAS,
  LLAMA_K_BIAS,
  LLAMA_V_BIAS,
  LLAMA_O_BIAS,
  LLAMA_POST_NORM,
  LLAMA_GATE,
  LLAMA_UP,
  LLAMA_DOWN,
  LLAMA_ROLES
} llama_role;
#define LLAMA_BIAS_OF (LLAMA_Q_BIAS - LLAMA_Q) /* from a projection's role to its bias's */

/* Widths that everything else is made of. */
typedef struct llama_dims {
  uint32_t d, f;  /* hidden, intermediate */
  uint32_t q, kv; /* all query heads, all key heads: heads · head_dim */
  uint32_t qkv;   /* a row of queries, keys and values */
  uint32_t hd, hq, hkv;
} llama_dims;
llama_dims llama_dims_of(const flap_model_config *config);

/* Output and input width of a projection; norms and biases, vectors, have their width as outputs and no inputs. */
void llama_role_shape(const llama_dims *dims, llama_role role, uint32_t *outputs_out, uint32_t *inputs_out);
bool llama_has_role(const flap_model_config *config, llama_role role);
/* Elements of a vector with the gap behind it, for the next tensor begins a block; 0 for others. Of all together. */
uint64_t llama_vector_elements(const flap_model_config *config, llama_role role);
uint64_t llama_all_vector_elements(const flap_model_config *config);

typedef enum llama_saved {
  LLAMA_QKV,
  LLAMA_ATTENTION,
  LLAMA_LSE,
  LLAMA_RSTD,
  LLAMA_RESIDUAL,
  LLAMA_GATE_UP,
  LLAMA_NORMALIZED_INPUT,
  LLAMA_NORMALIZED_RESIDUAL,
  LLAMA_INNER,
  LLAMA_SAVED_COUNT
} llama_saved;

#define LLAMA_SAVED_SETS 4u
extern const flap_saved_set llama_saved_sets[LLAMA_SAVED_SETS];

/* Byte offsets in the workspace. `first` holds, one after the other, everything of one row per token that dies before
 * the next comes: normalised inputs, silu(gate)·up and its gradient, the gradient of attention. */
typedef struct llama_workspace {
  uint64_t rstd;    /* (T) fp32: the final norm's; a layer's where they are kept and come once more */
  uint64_t bias;    /* (qkv), where q, k and v have biases: these side by side, as one product wants them */
  uint64_t vectors; /* fp32 sums of norms' and biases' gradients, one behind the other: if the layer's are bf16 */
  uint64_t first;   /* (T, max(D, F, HQ·HD)) */
  uint64_t second;  /* (T, D), while `first` holds no more than that */
  uint64_t dqkv;    /* (T, qkv), beside `first` and `second`; unused where the saved gate and up are wide enough */
  uint64_t bytes;
} llama_workspace;
llama_workspace llama_workspace_of(const flap_model_config *config, const flap_model_shape *shape);
bool llama_dqkv_fits_saved(const llama_dims *dims);

/* For flap_family, with the contracts that it gives. */
uint32_t llama_tensors(const flap_model_config *config, flap_part part, uint32_t layer, flap_model_tensor *tensors_out);
uint32_t llama_saved_tensors(const flap_model_config *config, const flap_model_shape *shape, flap_saved_tensor *out);
double llama_forward_flops(const flap_model_config *config, const flap_model_shape *shape, flap_part part);
uint64_t llama_workspace_bytes(const flap_model_config *config, const flap_model_shape *shape);

#endif
