/* What the Llama family's parts are made of, and what they take: tensors, saved tensors, scratch, operations. */
#include "model/llama_internal.h"

#include "base/units.h"

#include <stdio.h>
#include <string.h>

/* ---- tensors --------------------------------------------------------------------------------------------- */

static const char *const LAYER_NAMES[LLAMA_ROLES] = {
    [LLAMA_INPUT_NORM] = "input_layernorm.weight", [LLAMA_Q] = "self_attn.q_proj.weight",
    [LLAMA_K] = "self_attn.k_proj.weight",         [LLAMA_V] = "self_attn.v_proj.weight",
    [LLAMA_O] = "self_attn.o_proj.weight",         [LLAMA_Q_BIAS] = "self_attn.q_proj.bias",
    [LLAMA_K_BIAS] = "self_attn.k_proj.bias",      [LLAMA_V_BIAS] = "self_attn.v_proj.bias",
    [LLAMA_O_BIAS] = "self_attn.o_proj.bias",      [LLAMA_POST_NORM] = "post_attention_layernorm.weight",
    [LLAMA_GATE] = "mlp.gate_proj.weight",         [LLAMA_UP] = "mlp.up_proj.weight",
    [LLAMA_DOWN] = "mlp.down_proj.weight",
};

llama_dims llama_dims_of(const flap_model_config *config) {
  llama_dims dims = {.d = config->hidden_size,
                     .f = config->intermediate_size,
                     .hd = config->head_dim,
                     .hq = config->num_attention_heads,
                     .hkv = config->num_key_value_heads};
  dims.q = dims.hq * dims.hd;
  dims.kv = dims.hkv * dims.hd;
  dims.qkv = dims.q + 2 * dims.kv;
  return dims;
}

void llama_role_shape(const llama_dims *dims, llama_role role, uint32_t *outputs_out, uint32_t *inputs_out) {
  static const uint32_t none = 0;
  const uint32_t *const shapes[LLAMA_ROLES][2] = {
      [LLAMA_INPUT_NORM] = {&dims->d, &none}, [LLAMA_Q] = {&dims->q, &dims->d},    [LLAMA_K] = {&dims->kv, &dims->d},
      [LLAMA_V] = {&dims->kv, &dims->d},      [LLAMA_O] = {&dims->d, &dims->q},    [LLAMA_Q_BIAS] = {&dims->q, &none},
      [LLAMA_K_BIAS] = {&dims->kv, &none},    [LLAMA_V_BIAS] = {&dims->kv, &none}, [LLAMA_O_BIAS] = {&dims->d, &none},
      [LLAMA_POST_NORM] = {&dims->d, &none},  [LLAMA_GATE] = {&dims->f, &dims->d}, [LLAMA_UP] = {&dims->f, &dims->d},
      [LLAMA_DOWN] = {&dims->d, &dims->f},
  };
  *outputs_out = *shapes[role][0];
  *inputs_out = *shapes[role][1];
}

bool llama_has_role(const flap_model_config *config, llama_role role) {
  if (role >= LLAMA_Q_BIAS && role <= LLAMA_V_BIAS)
    return config->attention_bias;
  return role != LLAMA_O_BIAS || config->output_bias;
}

static void fill_tensor(flap_model_tensor *tensor, uint64_t rows, uint64_t columns, flap_init init) {
  tensor->rank = columns ? 2 : 1;
  tensor->shape[0] = rows;
  tensor->shape[1] = columns;
  tensor->init = init;
  tensor->decays = tensor->rank == 2;
}

static uint32_t layer_tensors(const flap_model_config *config, uint32_t layer, flap_model_tensor *tensors_out) {
  llama_dims dims = llama_dims_of(config);
  char prefix[32]; /* printed once: plans ask for the sizes of layers thousands of times, and these come with names */
  const size_t prefix_bytes = (size_t)snprintf(prefix, sizeof prefix, "model.layers.%u.", layer);
  uint32_t count = 0;
  for (llama_role role = 0; role < LLAMA_ROLES; role++) {
    if (!llama_has_role(config, role))
      continue;
    flap_model_tensor *tensor = &tensors_out[count++];
    uint32_t outputs, inputs;
    llama_role_shape(&dims, role, &outputs, &inputs);
    bool norm = role == LLAMA_INPUT_NORM || role == LLAMA_POST_NORM;
    fill_tensor(tensor, outputs, inputs, norm ? FLAP_INIT_ONES : inputs ? FLAP_INIT_NORMAL : FLAP_INIT_ZEROS);
    memcpy(tensor->name, prefix, prefix_bytes);
    strcpy(tensor->name + prefix_bytes, LAYER_NAMES[role]);
  }
  return count;
}

uint32_t llama_tensors(const flap_model_config *config, flap_part part, uint32_t layer,
                       flap_model_tensor *tensors_out) {
  if (part == FLAP_PART_LAYER)
    return layer_tensors(config, layer, tensors_out);

  if (part == FLAP_PART_EMBEDDING) {
    snprintf(tensors_out->name, sizeof tensors_out->name, "model.embed_tokens.weight");
    fill_tensor(tensors_out, config->vocab_size, config->hidden_size, FLAP_INIT_NORMAL);
    return 1;
  }
  snprintf(tensors_out->name, sizeof tensors_out->name, "model.norm.weight");
  fill_tensor(tensors_out, config->hidden_size, 0, FLAP_INIT_ONES);
  if (config->tie_word_embeddings)
    return 1;
  snprintf(tensors_out[1].name, sizeof tensors_out[1].name, "lm_head.weight");
  fill_tensor(&tensors_out[1], config->vocab_size, config->hidden_size, FLAP_INIT_NORMAL);
  return 2;
}

/* ---- sizes and costs ------------------------------------------------------------------------------------- */

/* Per byte of its 16-bit result a product costs as many operations as the hidden size, whichever it is; attention costs
 * the sequence's length, and a GPU does it at a third of the rate. So attention is worth keeping first where sequences
 * are long. All but gate and up is about half of the bytes: a step between nothing and everything. */
#define LLAMA_SAVED_ATTENTION (1u << LLAMA_ATTENTION | 1u << LLAMA_LSE)
#define LLAMA_SAVED_BUT_MLP (LLAMA_SAVED_ATTENTION | 1u << LLAMA_QKV | 1u << LLAMA_RSTD | 1u << LLAMA_RESIDUAL)
const flap_saved_set llama_saved_sets[LLAMA_SAVED_SETS] = {
    {"attention", LLAMA_SAVED_ATTENTION},
    {"all_but_mlp", LLAMA_SAVED_BUT_MLP},
    {"all", LLAMA_SAVED_BUT_MLP | 1u << LLAMA_GATE_UP},
    {"everything", FLAP_MODEL_SAVED_ALL},
};

static double matmul_flops(uint64_t m, uint64_t n, uint64_t k) {
  return 2.0 * (double)m * (double)n * (double)k;
}

/* Scores and their product with the values, for the lower half of each S×S square. */
static double attention_flops(const flap_model_config *config, const flap_model_shape *shape) {
  llama_dims dims = llama_dims_of(config);
  return matmul_flops((uint64_t)shape->batch * shape->sequence, shape->sequence, dims.q);
}

uint32_t llama_saved_tensors(const flap_model_config *config, const flap_model_shape *shape, flap_saved_tensor *out) {
  llama_dims dims = llama_dims_of(config);
  uint64_t tokens = (uint64_t)shape->batch * shape->sequence;
  uint64_t element = flap_dtype_bytes(shape->dtype);
  out[LLAMA_QKV] = (flap_saved_tensor){.name = "qkv",
                                       .bytes = tokens * dims.qkv * element, // (T, HQ·HD + 2·HKV·HD), rotated
                                       .recompute_flops = matmul_flops(tokens, dims.qkv, dims.d)};
  out[LLAMA_ATTENTION] = (flap_saved_tensor){.name = "attention",
                                             .bytes = tokens * dims.q * element, // (T, HQ·HD)
                                             .recompute_flops = attention_flops(config, shape)};
  /* The statistics come out of the same kernel as `attention`, and those of a norm out of a pass: they cost no more. */
  out[LLAMA_LSE] = (flap_saved_tensor){.name = "lse", .bytes = tokens * dims.hq * sizeof(float)}; // (B, HQ, S)
  out[LLAMA_RSTD] = (flap_saved_tensor){.name = "rstd", .bytes = 2 * tokens * sizeof(float)}; // of both norms, (2, T)
  out[LLAMA_RESIDUAL] = (flap_saved_tensor){.name = "residual",
                                            .bytes = tokens * dims.d * element, // (T, D)
                                            .recompute_flops = matmul_flops(tokens, dims.d, dims.q)};
  out[LLAMA_GATE_UP] = (flap_saved_tensor){.name = "gate_up",
                                           .bytes = tokens * 2 * dims.f * element, // (T, 2·F)
                                           .recompute_flops = matmul_flops(tokens, 2 * (uint64_t)dims.f, dims.d)};
  const flap_saved_tensor normalized = {.bytes = tokens * dims.d * element, .spare = true}; // (T, D)
  out[LLAMA_NORMALIZED_INPUT] = out[LLAMA_NORMALIZED_RESIDUAL] = normalized;
  out[LLAMA_NORMALIZED_INPUT].name = "normalized_input";
  out[LLAMA_NORMALIZED_RESIDUAL].name = "normalized_residual";
  out[LLAMA_INNER] =
      (flap_saved_tensor){.name = "inner", .bytes = tokens * dims.f * element, .spare = true}; // (T, F): silu(gate)·up
  return LLAMA_SAVED_COUNT;
}

double llama_forward_flops(const flap_model_config *config, const flap_model_shape *shape, flap_part part) {
  llama_dims dims = llama_dims_of(config);
  uint64_t tokens = (uint64_t)shape->batch * shape->sequence;
  if (part == FLAP_PART_EMBEDDING)
    return 0;
  if (part == FLAP_PART_HEAD)
    return matmul_flops(tokens, config->vocab_size, dims.d);
  return matmul_flops(tokens, (uint64_t)dims.qkv + dims.q, dims.d) + attention_flops(config, shape) +
         matmul_flops(tokens, 3 * (uint64_t)dims.f, dims.d);
}

bool llama_dqkv_fits_saved(const llama_dims *dims) {
  return dims->qkv <= 2 * (uint64_t)dims->f;
}

uint64_t llama_vector_elements(const flap_model_config *config, llama_role role) {
  const llama_dims dims = llama_dims_of(config);
  uint32_t outputs, inputs;
  llama_role_shape(&dims, role, &outputs, &inputs);
  return inputs > 0 || !llama_has_role(config, role) ? 0 : flap_units_round_up(outputs, FLAP_OPS_BLOCK);
}

uint64_t llama_all_vector_elements(const flap_model_config *config) {
  uint64_t elements = 0;
  for (llama_role role = 0; role < LLAMA_ROLES; role++)
    elements += llama_vector_elements(config, role);
  return elements;
}

llama_workspace llama_workspace_of(const flap_model_config *config, const flap_model_shape *shape) {
  llama_dims dims = llama_dims_of(config);
  uint64_t tokens = (uint64_t)shape->batch * shape->sequence;
  uint64_t row = tokens * flap_dtype_bytes(shape->dtype); /* bytes of one column of activations */
  uint64_t hidden = flap_units_round_up(row * dims.d, FLAP_MODEL_ALIGN);
  uint64_t inner = flap_units_round_up(row * dims.f, FLAP_MODEL_ALIGN);
  uint64_t heads = flap_units_round_up(row * dims.q, FLAP_MODEL_ALIGN);
  uint64_t bias = config->attention_bias ? dims.qkv * flap_dtype_bytes(shape->dtype) : 0;
  llama_workspace space = {.rstd = 0, .bias = flap_units_round_up(tokens * sizeof(float), FLAP_MODEL_ALIGN)};
  space.vectors = space.bias + flap_units_round_up(bias, FLAP_MODEL_ALIGN);
  space.first = space.vectors + (shape->dtype == FLAP_BF16 ? llama_all_vector_elements(config) * sizeof(float) : 0);
  space.second = space.first + hidden;
  space.dqkv = space.first + (2 * hidden > heads ? 2 * hidden : heads);
  space.bytes = space.dqkv;
  if (!llama_dqkv_fits_saved(&dims))
    space.bytes += row * dims.qkv;
  if (space.first + inner > space.bytes)
    space.bytes = space.first + inner;
  return space;
}

uint64_t llama_workspace_bytes(const flap_model_config *config, const flap_model_shape *shape) {
  return llama_workspace_of(config, shape).bytes;
}
