/* The Llama family: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al. 2023; Dubey et al. 2024), with the
 * tensors and the places of rounding of transformers' LlamaForCausalLM; with other names, keys (llama_config.c) and
 * biases also Mistral and Qwen2 (Qwen team 2024).
 *
 * Invariants:
 *   1. Every value that passes between two calls of kernels/ops.h is stored in the run's dtype (softmax and norm
 *      statistics and losses in fp32), so a value is the same whether it was kept or computed again.
 *   2. A layer's saved tensors are what backward cannot cheaply compute from the layer's input: rotated q, k and v,
 *      attention's result and statistics, those of the norms, the residual stream between the two halves, and gate and
 *      up. Normalised inputs and silu(gate)·up come once more out of the backward of the norm and of the activation,
 *      unless they are kept as well (spare tensors).
 *      Each of them is computed from the layer's input and the ones before it, so any may be kept without the others;
 *      but attention's result and statistics, which one kernel writes, go together. A recompute calls the operations of
 *      the forward, so that a device's kernels, and with them the bits, are the same.
 *   3. Backward reads gate and up for the last time before it writes their gradients over them, and those for the
 *      last time before it writes the gradients of q, k and v there (where they fit).
 *   4. Matrices that share an input and lie side by side are multiplied as one. Whether they do is a function of
 *      shapes: each one's size is a multiple of FLAP_OPS_BLOCK elements. Their biases are then put side by side in the
 *      workspace, which changes no value: a bias is added in fp32, before the one rounding, either way.
 *   5. Gradients of norms and biases are summed in fp32: beside those of matrices, or in the workspace if these are
 *      written in bf16.
 */
#include "model/llama_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <stddef.h>

/* ---- projections ----------------------------------------------------------------------------------------- */

/* Where everything of one layer is during one call. */
typedef struct llama_layer {
  const flap_model_run *run;
  flap_ops *ops;
  flap_dtype dtype;
  uint32_t tokens;
  llama_dims dims;
  const char *weights;
  flap_model_gradient dweights;
  uint64_t offset[LLAMA_ROLES]; /* of each tensor, in elements; UINT64_MAX for absent ones */
  float *vectors[LLAMA_ROLES];  /* fp32 sums of each norm's and bias's gradient, among dweights or in the workspace */
  void *first, *second, *dqkv;  /* workspace */
  char *bias;                   /* workspace too */
  float *spare_rstd;            /* and this */
  uint32_t kept;                /* bits of llama_saved */
  char *qkv, *gate_up;          /* saved tensors, wherever they are */
  void *attention, *residual;
  float *lse, *rstd; /* of the scores; (2, T): of the input's norm, then of the other */
  void *normalized_input, *normalized_residual, *inner; /* `first`, unless they are kept; the second of them, in a
                                                           forward, x_out (finish_layer) */
} llama_layer;

static bool keeps(const llama_layer *layer, llama_saved tensor) {
  return (layer->kept & 1u << tensor) != 0;
}

static void place_saved(llama_layer *layer, const flap_model_saved *saved) {
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  char *place[LLAMA_SAVED_COUNT];
  layer->kept = saved->mask;
  flap_assert(keeps(layer, LLAMA_ATTENTION) == keeps(layer, LLAMA_LSE));
  (void)flap_model_saved_tensors(layer->run->config, &layer->run->shape, saved->mask, tensors);
  for (llama_saved i = 0; i < LLAMA_SAVED_COUNT; i++)
    place[i] = (char *)(keeps(layer, i) ? saved->kept : saved->scratch) + tensors[i].offset;
  layer->qkv = place[LLAMA_QKV];
  layer->attention = place[LLAMA_ATTENTION];
  layer->lse = (float *)(void *)place[LLAMA_LSE];
  layer->rstd = (float *)(void *)place[LLAMA_RSTD];
  layer->residual = place[LLAMA_RESIDUAL];
  layer->gate_up = place[LLAMA_GATE_UP];
  layer->normalized_input = keeps(layer, LLAMA_NORMALIZED_INPUT) ? place[LLAMA_NORMALIZED_INPUT] : layer->first;
  layer->normalized_residual =
      keeps(layer, LLAMA_NORMALIZED_RESIDUAL) ? place[LLAMA_NORMALIZED_RESIDUAL] : layer->first;
  layer->inner = keeps(layer, LLAMA_INNER) ? place[LLAMA_INNER] : layer->first;
}

/* Where vectors are summed: among the others, if these are fp32 sums too. */
static void place_vectors(llama_layer *layer, float *workspace) {
  for (llama_role role = 0; role < LLAMA_ROLES; role++) {
    const uint64_t elements = llama_vector_elements(layer->run->config, role);
    if (elements == 0)
      continue;
    layer->vectors[role] =
        layer->dweights.dtype == FLAP_F32 ? (float *)layer->dweights.sums + layer->offset[role] : workspace;
    workspace += elements;
  }
}

static llama_layer open_layer(const flap_model_run *run, const void *weights, const flap_model_saved *saved) {
  const flap_model_config *config = run->config;
  llama_layer layer = {.run = run,
                       .ops = run->ops,
                       .dtype = run->shape.dtype,
                       .tokens = run->shape.batch * run->shape.sequence,
                       .dims = llama_dims_of(config),
                       .weights = weights};

  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  (void)flap_model_tensors(config, FLAP_PART_LAYER, 0, tensors);
  uint32_t index = 0;
  for (llama_role role = 0; role < LLAMA_ROLES; role++)
    layer.offset[role] = llama_has_role(config, role) ? tensors[index++].offset : UINT64_MAX;

  llama_workspace space = llama_workspace_of(config, &run->shape);
  char *workspace = run->workspace;
  layer.spare_rstd = (float *)(void *)(workspace + space.rstd);
  layer.bias = workspace + space.bias;
  layer.first = workspace + space.first;
  layer.second = workspace + space.second;
  place_saved(&layer, saved);
  layer.dqkv = llama_dqkv_fits_saved(&layer.dims) ? layer.gate_up : workspace + space.dqkv;
  return layer;
}

static const void *weight_of(const llama_layer *layer, llama_role role) {
  return layer->weights + layer->offset[role] * flap_dtype_bytes(layer->dtype);
}

static void *gradient_at(const llama_layer *layer, uint64_t element) {
  return (char *)layer->dweights.sums + element * flap_dtype_bytes(layer->dweights.dtype);
}

static bool has_bias(const llama_layer *layer, llama_role role) {
  return role >= LLAMA_Q && role <= LLAMA_O && layer->offset[role + LLAMA_BIAS_OF] != UINT64_MAX;
}

/* Activations: rows of `columns`-wide steps through memory, in the layer's dtype. */
static char *column(const llama_layer *layer, const void *rows, uint64_t index) {
  return (char *)(uintptr_t)rows + index * flap_dtype_bytes(layer->dtype);
}

/* A projection, or several that read the same input and whose outputs stand side by side in a row. */
typedef struct llama_group {
  llama_role role; /* the first */
  uint32_t count;
  uint32_t outputs, inputs; /* of all, of each */
  bool fused;
} llama_group;

static llama_group open_group(const llama_layer *layer, llama_role first, uint32_t count) {
  llama_group group = {.role = first, .count = count, .fused = true};
  for (uint32_t i = 0; i < count; i++) {
    uint32_t outputs;
    llama_role_shape(&layer->dims, first + i, &outputs, &group.inputs);
    if (i + 1 < count && layer->offset[first + i] + (uint64_t)outputs * group.inputs != layer->offset[first + i + 1])
      group.fused = false;
    group.outputs += outputs;
  }
  return group;
}

/* A run of the group's outputs: of one projection, or of one matmul. */
typedef struct llama_member {
  llama_role role;
  uint32_t outputs, column;
} llama_member;

/* The group's projection `index`. */
static llama_member projection_of(const llama_layer *layer, const llama_group *group, uint32_t index) {
  llama_member member = {0};
  for (uint32_t i = 0; i <= index; i++) {
    uint32_t inputs;
    member.column += member.outputs;
    member.role = group->role + i;
    llama_role_shape(&layer->dims, member.role, &member.outputs, &inputs);
  }
  return member;
}

/* Matmuls, each over one projection or over all. */
static uint32_t member_count(const llama_group *group) {
  return group->fused ? 1 : group->count;
}

static llama_member member_of(const llama_layer *layer, const llama_group *group, uint32_t index) {
  if (!group->fused)
    return projection_of(layer, group, index);
  return (llama_member){.role = group->role, .outputs = group->outputs};
}

/* NULL for none. */
static const void *bias_of(const llama_layer *layer, llama_role role) {
  return has_bias(layer, role) ? weight_of(layer, role + LLAMA_BIAS_OF) : NULL;
}

/* The group's biases side by side in the workspace, or NULL if it has none. In the part each begins a block, so they
 * have gaps between them, and one product takes one vector. */
static const void *gather_biases(const llama_layer *layer, const llama_group *group) {
  if (group->count == 1 || !has_bias(layer, group->role))
    return bias_of(layer, group->role);
  for (uint32_t i = 0; i < group->count; i++) {
    llama_member member = projection_of(layer, group, i);
    flap_ops_copy(layer->ops, column(layer, layer->bias, member.column), bias_of(layer, member.role),
                  member.outputs * flap_dtype_bytes(layer->dtype));
  }
  return layer->bias;
}

/* y (tokens, outputs; row stride ldy) = x (tokens, inputs) Wᵀ. */
static flap_matmul projection(const llama_layer *layer, llama_role role, uint32_t outputs, uint32_t inputs,
                              uint32_t tokens, const void *x, void *y, uint32_t ldy) {
  return (flap_matmul){.transpose = FLAP_NT,
                       .m = tokens,
                       .n = outputs,
                       .k = inputs,
                       .a = x,
                       .b = weight_of(layer, role),
                       .c = y,
                       .lda = inputs,
                       .ldb = inputs,
                       .ldc = ldy,
                       .dtype = layer->dtype,
                       .c_dtype = layer->dtype};
}

/* The same + bias + residual (rows like y's; NULL for none). */
static void project(const llama_layer *layer, llama_role role, uint32_t outputs, uint32_t inputs, const void *bias,
                    uint32_t tokens, const void *x, const void *residual, void *y, uint32_t ldy) {
  flap_matmul matmul = projection(layer, role, outputs, inputs, tokens, x, y, ldy);
  matmul.bias = bias;
  matmul.residual = residual;
  flap_ops_matmul(layer->ops, &matmul);
}

/* y (tokens, all outputs of the group) from x (tokens, inputs). */
static void project_group(const llama_layer *layer, const llama_group *group, uint32_t tokens, const void *x, void *y) {
  for (uint32_t i = 0; i < member_count(group); i++) {
    llama_member member = member_of(layer, group, i);
    const void *bias = group->fused ? gather_biases(layer, group) : bias_of(layer, member.role);
    project(layer, member.role, member.outputs, group->inputs, bias, tokens, x, NULL, column(layer, y, member.column),
            group->outputs);
  }
}

/* Every projection's own, from dy (T, all outputs): gradients of biases have the gaps that biases have. */
static void group_bias_gradient(const llama_layer *layer, const llama_group *group, const void *dy) {
  for (uint32_t i = 0; i < group->count; i++) {
    llama_member member = projection_of(layer, group, i);
    if (has_bias(layer, member.role))
      flap_ops_bias_backward(layer->ops, layer->dtype, layer->vectors[member.role + LLAMA_BIAS_OF],
                             column(layer, dy, member.column), layer->tokens, member.outputs, group->outputs);
  }
}

/* Weight and bias gradients of a group from x (T, inputs) and dy (T, all outputs). */
static void group_weight_gradient(const llama_layer *layer, const llama_group *group, const void *x, const void *dy) {
  for (uint32_t i = 0; i < member_count(group); i++) {
    llama_member member = member_of(layer, group, i);
    flap_matmul matmul = {.transpose = FLAP_TN,
                          .m = member.outputs,
                          .n = group->inputs,
                          .k = layer->tokens,
                          .a = column(layer, dy, member.column),
                          .b = x,
                          .c = gradient_at(layer, layer->offset[member.role]),
                          .lda = group->outputs,
                          .ldb = group->inputs,
                          .ldc = group->inputs,
                          .dtype = layer->dtype,
                          .c_dtype = layer->dweights.dtype,
                          .accumulate = layer->dweights.accumulate};
    flap_ops_matmul(layer->ops, &matmul);
  }
  group_bias_gradient(layer, group, dy);
}

/* dx (T, inputs) from dy (T, all outputs) through a member alone. */
static flap_matmul input_gradient(const llama_layer *layer, const llama_group *group, llama_member member,
                                  const void *dy, void *dx) {
  return (flap_matmul){.transpose = FLAP_NN,
                       .m = layer->tokens,
                       .n = group->inputs,
                       .k = member.outputs,
                       .a = column(layer, dy, member.column),
                       .b = weight_of(layer, member.role),
                       .c = dx,
                       .lda = group->outputs,
                       .ldb = group->inputs,
                       .ldc = group->inputs,
                       .dtype = layer->dtype,
                       .c_dtype = layer->dtype};
}

/* The same through all. Members that cannot be multiplied as one are added up in dtype, as PyTorch does, with `spare`
 * (T, inputs) for the second one's share. */
static void group_input_gradient(const llama_layer *layer, const llama_group *group, const void *dy, void *dx,
                                 void *spare) {
  for (uint32_t i = 0; i < member_count(group); i++) {
    flap_matmul matmul = input_gradient(layer, group, member_of(layer, group, i), dy, i == 0 ? dx : spare);
    flap_ops_matmul(layer->ops, &matmul);
    if (i > 0)
      flap_ops_add(layer->ops, layer->dtype, dx, dx, spare, (uint64_t)layer->tokens * group->inputs);
  }
}

/* ---- one layer ------------------------------------------------------------------------------------------- */

static float *rstd_of(const llama_layer *layer, llama_role norm) {
  return layer->rstd + (norm == LLAMA_POST_NORM ? layer->tokens : 0);
}

static void normalize_to(const llama_layer *layer, void *out, float *rstd, const void *x, llama_role norm,
                         uint32_t tokens) {
  flap_ops_rmsnorm(layer->ops, layer->dtype, out, rstd, NULL, x, NULL, weight_of(layer, norm), tokens, layer->dims.d,
                   (float)layer->run->config->rms_norm_eps);
}

/* out (tokens, D) = the norm of x; its statistics go to where the backward reads them. */
static void normalize(const llama_layer *layer, void *out, const void *x, llama_role norm, uint32_t tokens) {
  normalize_to(layer, out, rstd_of(layer, norm), x, norm, tokens);
}

/* The same, once more: statistics that are kept stay as they are. */
static void normalize_again(const llama_layer *layer, void *out, const void *x, llama_role norm) {
  normalize_to(layer, out, keeps(layer, LLAMA_RSTD) ? layer->spare_rstd : rstd_of(layer, norm), x, norm, layer->tokens);
}

static void rotate(const llama_layer *layer, void *qkv, bool inverse) {
  flap_ops_rope(layer->ops, layer->dtype, qkv, layer->run->rope_table, layer->tokens, layer->run->shape.sequence, 0,
                layer->dims.hq + layer->dims.hkv, layer->dims.hd, layer->dims.qkv, inverse);
}

static flap_attention attention_of(const llama_layer *layer) {
  const llama_dims *dims = &layer->dims;
  return (flap_attention){.batch = layer->run->shape.batch,
                          .sequence = layer->run->shape.sequence,
                          .heads = dims->hq,
                          .kv_heads = dims->hkv,
                          .head_size = dims->hd,
                          .q_stride = dims->qkv,
                          .kv_stride = dims->qkv,
                          .q = layer->qkv,
                          .k = column(layer, layer->qkv, dims->q),
                          .v = column(layer, layer->qkv, dims->q + dims->kv),
                          .out = layer->attention,
                          .lse = layer->lse,
                          .dtype = layer->dtype};
}

/* out (tokens, F) = silu(gate) · up of gate_up (tokens, 2·F). */
static void activate(const llama_layer *layer, void *out, uint32_t tokens) {
  uint32_t f = layer->dims.f;
  flap_ops_swiglu(layer->ops, layer->dtype, out, layer->gate_up, column(layer, layer->gate_up, f), tokens, f, 2 * f);
}

/* The residual stream between the halves: attention's result through the output projection, and x_in. */
static void project_attention(const llama_layer *layer, uint32_t tokens, const void *x_in) {
  const uint32_t d = layer->dims.d, q = layer->dims.q;
  project(layer, LLAMA_O, d, q, bias_of(layer, LLAMA_O), tokens, layer->attention, x_in, layer->residual, d); // (T, D)
}

/* Gate and up of x (tokens, D), the normalised residual stream, and inner = silu(gate) · up, which is not where x is;
 * NULL if it is not wanted. */
static void project_inner(const llama_layer *layer, uint32_t tokens, const void *x, void *inner) {
  llama_group gate_up = open_group(layer, LLAMA_GATE, 2);
  if (gate_up.fused) {
    flap_matmul matmul = projection(layer, LLAMA_GATE, gate_up.outputs, gate_up.inputs, tokens, x, layer->gate_up,
                                    gate_up.outputs);   // (T, 2·F)
    flap_ops_matmul_swiglu(layer->ops, &matmul, inner); // (T, F)
  } else {
    project_group(layer, &gate_up, tokens, x, layer->gate_up);
    if (inner != NULL)
      activate(layer, inner, tokens);
  }
}

/* From attention's result to x_out: the output projection, the second norm, the MLP, and both residuals, which the
 * products add. `x_in` is read before x_out is written, so they may be the same; until the end x_out has what comes out
 * of the norm, if that is not kept. */
static void finish_layer(const llama_layer *layer, uint32_t tokens, const void *x_in, void *x_out) {
  const uint32_t d = layer->dims.d, f = layer->dims.f;
  void *normalized = keeps(layer, LLAMA_NORMALIZED_RESIDUAL) ? layer->normalized_residual : x_out;
  project_attention(layer, tokens, x_in);
  normalize(layer, normalized, layer->residual, LLAMA_POST_NORM, tokens);
  project_inner(layer, tokens, normalized, layer->inner);
  project(layer, LLAMA_DOWN, d, f, NULL, tokens, layer->inner, layer->residual, x_out, d);
}

/* Rotated q, k and v of the normalised input. Queries and keys are neighbours in a row, so they are turned as one. */
static void project_qkv(const llama_layer *layer) {
  const llama_dims *dims = &layer->dims;
  llama_group qkv = open_group(layer, LLAMA_Q, 3);
  if (qkv.fused) {
    flap_matmul matmul = projection(layer, LLAMA_Q, qkv.outputs, qkv.inputs, layer->tokens, layer->normalized_input,
                                    layer->qkv, qkv.outputs); // (T, qkv)
    matmul.bias = gather_biases(layer, &qkv);
    flap_ops_matmul_rope(layer->ops, &matmul, layer->run->rope_table, layer->run->shape.sequence, 0,
                         dims->hq + dims->hkv, dims->hd);
  } else {
    project_group(layer, &qkv, layer->tokens, layer->normalized_input, layer->qkv);
    rotate(layer, layer->qkv, false);
  }
}

static void attend(const llama_layer *layer) {
  flap_attention attention = attention_of(layer);
  flap_ops_attention(layer->ops, &attention);
}

static void llama_layer_forward(const flap_model_run *run, const void *weights, const void *x_in,
                                const flap_model_saved *saved, void *x_out) {
  llama_layer layer = open_layer(run, weights, saved);
  normalize(&layer, layer.normalized_input, x_in, LLAMA_INPUT_NORM, layer.tokens); // (T, D)
  project_qkv(&layer);
  attend(&layer);
  finish_layer(&layer, layer.tokens, x_in, x_out);
}

/* The calls of the forward that write what is not kept, in its order. A norm is wanted for its statistics, or for what
 * is projected from it. */
static void llama_layer_recompute(const flap_model_run *run, const void *weights, const void *x_in,
                                  const flap_model_saved *saved) {
  llama_layer layer = open_layer(run, weights, saved);
  const bool first_norm = !keeps(&layer, LLAMA_QKV) && !keeps(&layer, LLAMA_NORMALIZED_INPUT);
  const bool second_norm = !keeps(&layer, LLAMA_GATE_UP) && !keeps(&layer, LLAMA_NORMALIZED_RESIDUAL);
  if (first_norm || !keeps(&layer, LLAMA_RSTD))
    normalize_again(&layer, layer.first, x_in, LLAMA_INPUT_NORM);
  if (!keeps(&layer, LLAMA_QKV))
    project_qkv(&layer);
  if (!keeps(&layer, LLAMA_ATTENTION))
    attend(&layer);
  if (!keeps(&layer, LLAMA_RESIDUAL))
    project_attention(&layer, layer.tokens, x_in);
  if (second_norm || !keeps(&layer, LLAMA_RSTD))
    normalize_again(&layer, layer.first, layer.residual, LLAMA_POST_NORM);
  if (!keeps(&layer, LLAMA_GATE_UP))
    project_inner(&layer, layer.tokens, layer.normalized_residual, NULL);
}

/* dx: on through the norm of x, from dy in `first`, where the normalised x is then once more if it is not kept. */
static void normalize_backward(const llama_layer *layer, void *dx, void *normalized, const void *x, llama_role norm) {
  void *dy = layer->first;
  flap_ops_rmsnorm_backward(layer->ops, layer->dtype, dx, layer->vectors[norm], normalized == dy ? dy : NULL, dy, x,
                            weight_of(layer, norm), rstd_of(layer, norm), dx, layer->tokens, layer->dims.d);
}

/* dx: from the gradient of the layer's output to that of the residual stream between the halves. */
static void mlp_backward(const llama_layer *layer, void *dx) {
  uint32_t f = layer->dims.f;
  void *gate = layer->gate_up, *up = column(layer, layer->gate_up, f), *dinner = layer->first;
  llama_group gate_up = open_group(layer, LLAMA_GATE, 2);
  llama_group down = open_group(layer, LLAMA_DOWN, 1);

  /* dinner (T, F), over which silu(gate)·up is computed again, if it exists at all. */
  flap_matmul matmul = input_gradient(layer, &down, member_of(layer, &down, 0), dx, dinner);
  flap_ops_matmul_swiglu_backward(layer->ops, &matmul, gate, up, 2 * f, layer->inner == dinner, gate, up, 2 * f);
  group_weight_gradient(layer, &down, layer->inner, dx);

  group_input_gradient(layer, &gate_up, layer->gate_up, layer->first, layer->second); // (T, D), likewise
  normalize_backward(layer, dx, layer->normalized_residual, layer->residual, LLAMA_POST_NORM);
  group_weight_gradient(layer, &gate_up, layer->normalized_residual, layer->gate_up);
}

/* dx: on to the gradient of the layer's input. Gate and up are dead by now: their place may hold dqkv. */
static void attention_backward(const llama_layer *layer, const void *x_in, void *dx) {
  const llama_dims *dims = &layer->dims;
  llama_group output = open_group(layer, LLAMA_O, 1);
  llama_group qkv = open_group(layer, LLAMA_Q, 3);
  group_weight_gradient(layer, &output, layer->attention, dx);
  group_input_gradient(layer, &output, dx, layer->first, NULL); // (T, HQ·HD)
  flap_attention attention = attention_of(layer);
  flap_ops_attention_backward(layer->ops, &attention, layer->dqkv, column(layer, layer->dqkv, dims->q),
                              column(layer, layer->dqkv, dims->q + dims->kv), layer->first);
  rotate(layer, layer->dqkv, true);

  group_input_gradient(layer, &qkv, layer->dqkv, layer->first, layer->second); // (T, D)
  normalize_backward(layer, dx, layer->normalized_input, x_in, LLAMA_INPUT_NORM);
  group_weight_gradient(layer, &qkv, layer->normalized_input, layer->dqkv);
}

/* Sums that are only added to become zero, those of norms and biases; and the gaps between tensors. */
static void clear_vectors(const llama_layer *layer) {
  const flap_model_config *config = layer->run->config;
  const bool apart = layer->dweights.dtype != FLAP_F32; /* the workspace has the vectors, in a row from the first on */
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t count = flap_model_tensors(config, FLAP_PART_LAYER, 0, tensors);
  uint64_t from = 0;
  if (apart)
    flap_ops_zero(layer->ops, layer->vectors[LLAMA_INPUT_NORM], llama_all_vector_elements(config) * sizeof(float));
  for (uint32_t i = 0; i <= count; i++) {
    if (i < count && tensors[i].rank < 2 && !apart)
      continue;
    const uint64_t to = i < count ? tensors[i].offset : flap_model_part_elements(config, FLAP_PART_LAYER);
    if (to > from)
      flap_ops_zero(layer->ops, gradient_at(layer, from), (to - from) * flap_dtype_bytes(layer->dweights.dtype));
    if (i < count)
      from =
          to + (tensors[i].rank < 2 ? flap_units_round_up(tensors[i].elements, FLAP_OPS_BLOCK) : tensors[i].elements);
  }
}

/* Vectors that were summed apart go where they belong, gaps included. */
static void round_vectors(const llama_layer *layer) {
  for (llama_role role = 0; role < LLAMA_ROLES; role++) {
    const uint64_t elements = llama_vector_elements(layer->run->config, role);
    if (elements > 0)
      flap_ops_gradient_store(layer->ops, layer->dweights.dtype, gradient_at(layer, layer->offset[role]), NULL,
                              FLAP_F32, layer->vectors[role], elements);
  }
}

static void llama_layer_backward(const flap_model_run *run, const void *weights, const void *x_in,
                                 const flap_model_saved *saved, void *dx, const flap_model_gradient *dweights) {
  llama_layer layer = open_layer(run, weights, saved);
  layer.dweights = *dweights;
  place_vectors(&layer,
                (float *)(void *)((char *)run->workspace + llama_workspace_of(run->config, &run->shape).vectors));
  if (!dweights->accumulate)
    clear_vectors(&layer);
  mlp_backward(&layer, dx);
  attention_backward(&layer, x_in, dx);
  if (dweights->dtype != FLAP_F32)
    round_vectors(&layer);
}

/* ---- embedding and head ---------------------------------------------------------------------------------- */

static uint32_t tokens_of(const flap_model_run *run) {
  return run->shape.batch * run->shape.sequence;
}

static void llama_embed(const flap_model_run *run, const void *embedding, const int32_t *tokens, void *x) {
  flap_ops_embedding(run->ops, run->shape.dtype, x, tokens, embedding, tokens_of(run), run->config->hidden_size);
}

static void llama_embed_backward(const flap_model_run *run, const int32_t *tokens, const int32_t *order, const void *dx,
                                 float *dembedding) {
  flap_ops_embedding_backward(run->ops, run->shape.dtype, dembedding, tokens, order, dx, tokens_of(run),
                              run->config->hidden_size);
}

/* Sums that the product does not write: the norm's, and the gaps behind both tensors. */
static void clear_head(const flap_model_run *run, float *dhead, float *dprojection) {
  const flap_model_config *config = run->config;
  const bool tied = config->tie_word_embeddings;
  const uint64_t head = flap_model_part_elements(config, FLAP_PART_HEAD), first = flap_model_head_projection(config);
  const uint64_t all = tied ? flap_model_part_elements(config, FLAP_PART_EMBEDDING) : head - first;
  const uint64_t written = (uint64_t)config->vocab_size * config->hidden_size;
  flap_ops_zero(run->ops, dhead, (tied ? head : first) * sizeof(float));
  if (all > written)
    flap_ops_zero(run->ops, dprojection + written, (all - written) * sizeof(float));
}

static void llama_head_loss(const flap_model_run *run, const void *head, const void *projection, const void *x_in,
                            const int32_t *targets, float loss_scale, float *losses, void *dx, float *dhead,
                            float *dprojection, bool accumulate) {
  const flap_model_config *config = run->config;
  flap_dtype dtype = run->shape.dtype;
  uint32_t tokens = tokens_of(run), d = config->hidden_size;
  llama_workspace space = llama_workspace_of(config, &run->shape);
  float *rstd = (float *)(void *)((char *)run->workspace + space.rstd);
  void *normalized = (char *)run->workspace + space.first; // (T, D)
  /* The final norm is the head's first tensor. */
  flap_ops_rmsnorm(run->ops, dtype, normalized, rstd, NULL, x_in, NULL, head, tokens, d, (float)config->rms_norm_eps);
  if (dx && !accumulate)
    clear_head(run, dhead, dprojection);
  flap_ops_head_loss(run->ops, dtype, losses, dx ? normalized : NULL, dprojection, accumulate, normalized, projection,
                     targets, loss_scale, tokens, d, config->vocab_size);
  if (dx)
    flap_ops_rmsnorm_backward(run->ops, dtype, dx, dhead, NULL, normalized, x_in, head, rstd, NULL, tokens, d);
}

/* ---- sampling -------------------------------------------------------------------------------------------- */

static void llama_layer_decode(const flap_model_run *run, const void *weights, void *x, void *scratch, void *cache,
                               uint32_t cache_positions, uint32_t tokens, uint32_t first_position) {
  llama_layer layer = open_layer(run, weights, &(flap_model_saved){.scratch = scratch});
  const llama_dims *dims = &layer.dims;
  char *keys = cache, *values = keys + flap_model_cache_values(run->config, layer.dtype, cache_positions);
  char *new_keys = column(&layer, keys, (uint64_t)first_position * dims->kv);
  char *new_values = column(&layer, values, (uint64_t)first_position * dims->kv);

  normalize(&layer, layer.first, x, LLAMA_INPUT_NORM, tokens);
  project(&layer, LLAMA_Q, dims->q, dims->d, bias_of(&layer, LLAMA_Q), tokens, layer.first, NULL, layer.qkv,
          dims->q); // (tokens, HQ·HD)
  project(&layer, LLAMA_K, dims->kv, dims->d, bias_of(&layer, LLAMA_K), tokens, layer.first, NULL, new_keys, dims->kv);
  project(&layer, LLAMA_V, dims->kv, dims->d, bias_of(&layer, LLAMA_V), tokens, layer.first, NULL, new_values,
          dims->kv);
  flap_ops_rope(layer.ops, layer.dtype, layer.qkv, run->rope_table, tokens, tokens, first_position, dims->hq, dims->hd,
                dims->q, false);
  flap_ops_rope(layer.ops, layer.dtype, new_keys, run->rope_table, tokens, tokens, first_position, dims->hkv, dims->hd,
                dims->kv, false);
  flap_ops_attention_decode(layer.ops, layer.dtype, layer.attention, layer.qkv, dims->q, keys, values, tokens,
                            first_position, dims->hq, dims->hkv, dims->hd);
  finish_layer(&layer, tokens, x, x);
}

static void llama_logits(const flap_model_run *run, const void *head, const void *projection, const void *x,
                         uint32_t row, float *logits) {
  const flap_model_config *config = run->config;
  flap_dtype dtype = run->shape.dtype;
  uint32_t d = config->hidden_size;
  llama_workspace space = llama_workspace_of(config, &run->shape);
  float *rstd = (float *)(void *)((char *)run->workspace + space.rstd);
  void *normalized = (char *)run->workspace + space.first; // (1, D)
  const char *x_row = (const char *)x + (uint64_t)row * d * flap_dtype_bytes(dtype);
  flap_ops_rmsnorm(run->ops, dtype, normalized, rstd, NULL, x_row, NULL, head, 1, d, (float)config->rms_norm_eps);
  flap_matmul matmul = {.transpose = FLAP_NT,
                        .m = 1,
                        .n = config->vocab_size,
                        .k = d,
                        .a = normalized,
                        .b = projection,
                        .c = logits,
                        .lda = d,
                        .ldb = d,
                        .ldc = config->vocab_size,
                        .dtype = dtype,
                        .c_dtype = FLAP_F32};
  flap_ops_matmul(run->ops, &matmul);
}

/* ---- the tables ------------------------------------------------------------------------------------------ */

#define LLAMA_FAMILY(type, class, keys_function, finish_function)                                                  \
  {                                                                                                                \
    .name = type, .architecture = class, .keys = keys_function, .finish_config = finish_function,                  \
    .tensors = llama_tensors, .head_projection_index = 1, .saved_tensors = llama_saved_tensors,                    \
    .saved_sets = llama_saved_sets, .saved_set_count = LLAMA_SAVED_SETS, .workspace_bytes = llama_workspace_bytes, \
    .forward_flops = llama_forward_flops, .embed = llama_embed, .embed_backward = llama_embed_backward,            \
    .layer_forward = llama_layer_forward, .layer_recompute = llama_layer_recompute,                                \
    .layer_backward = llama_layer_backward, .head_loss = llama_head_loss, .layer_decode = llama_layer_decode,      \
    .logits = llama_logits,                                                                                        \
  }

const flap_family flap_model_llama =
    LLAMA_FAMILY("llama", "LlamaForCausalLM", flap_llama_keys, flap_llama_finish_config);
const flap_family flap_model_mistral =
    LLAMA_FAMILY("mistral", "MistralForCausalLM", flap_mistral_keys, flap_mistral_finish_config);
const flap_family flap_model_qwen2 =
    LLAMA_FAMILY("qwen2", "Qwen2ForCausalLM", flap_qwen2_keys, flap_qwen2_finish_config);
