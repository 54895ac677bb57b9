/* The registry of model families, and everything that follows from a family's tables by plain arithmetic.
 *
 * Invariants:
 *   1. A tensor's offset is the sum of its predecessors' elements, each rounded up to FLAP_OPS_BLOCK.
 *   2. Sizes are functions of configuration and shape alone; no call here touches device memory.
 */
#include "model/family_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

static const flap_family *const FAMILIES[] = {&flap_model_llama, &flap_model_mistral, &flap_model_qwen2};
#define FAMILY_COUNT (sizeof FAMILIES / sizeof *FAMILIES)

/* ---- registry -------------------------------------------------------------------------------------------- */

const flap_family *flap_model_find_family(const char *model_type) {
  for (size_t i = 0; i < FAMILY_COUNT; i++)
    if (strcmp(FAMILIES[i]->name, model_type) == 0)
      return FAMILIES[i];
  return NULL;
}

const char *flap_model_families(void) {
  return "llama, mistral, qwen2";
}

const char *flap_model_family_name(const flap_family *family) {
  return family->name;
}

const char *flap_model_architecture(const flap_family *family) {
  return family->architecture;
}

const flap_model_key *flap_model_keys(const flap_family *family, uint32_t *count_out) {
  return family->keys(count_out);
}

flap_status flap_model_finish_config(flap_model_config *config) {
  if (!config->family)
    return flap_error_set(FLAP_INVALID, "model_type is missing; it must be one of: %s", flap_model_families());
  return config->family->finish_config(config);
}

flap_status flap_model_check_count(const char *key, uint32_t value, uint32_t max) {
  if (value < 1 || value > max)
    return flap_error_set(FLAP_INVALID, "%s is %u; it must be between 1 and %u", key, value, max);
  return FLAP_OK;
}

flap_status flap_model_check_number(const char *key, double value, double low, double high) {
  if (!isfinite(value) || value <= low || value >= high)
    return flap_error_set(FLAP_INVALID, "%s is %g; it must be above %g and below %g", key, value, low, high);
  return FLAP_OK;
}

/* ---- tensors --------------------------------------------------------------------------------------------- */

uint32_t flap_model_tensors(const flap_model_config *config, flap_part part, uint32_t layer,
                            flap_model_tensor *tensors_out) {
  flap_model_tensor scratch[FLAP_MODEL_TENSORS_MAX];
  flap_model_tensor *tensors = tensors_out ? tensors_out : scratch;
  uint32_t count = config->family->tensors(config, part, layer, tensors);
  flap_assert(count <= FLAP_MODEL_TENSORS_MAX);

  uint64_t offset = 0;
  for (uint32_t i = 0; i < count; i++) {
    tensors[i].elements = tensors[i].rank == 2 ? tensors[i].shape[0] * tensors[i].shape[1] : tensors[i].shape[0];
    tensors[i].offset = offset;
    offset = flap_units_round_up(offset + tensors[i].elements, FLAP_OPS_BLOCK);
  }
  return count;
}

uint64_t flap_model_part_elements(const flap_model_config *config, flap_part part) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(config, part, 0, tensors);
  if (count == 0)
    return 0;
  return flap_units_round_up(tensors[count - 1].offset + tensors[count - 1].elements, FLAP_OPS_BLOCK);
}

uint64_t flap_model_parameters(const flap_model_config *config) {
  uint64_t parameters = 0;
  for (int part = 0; part < FLAP_PART_COUNT; part++) {
    flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
    uint32_t count = flap_model_tensors(config, (flap_part)part, 0, tensors);
    uint64_t times = part == FLAP_PART_LAYER ? config->num_hidden_layers : 1;
    for (uint32_t i = 0; i < count; i++)
      parameters += times * tensors[i].elements;
  }
  return parameters;
}

uint64_t flap_model_head_projection(const flap_model_config *config) {
  if (config->tie_word_embeddings)
    return 0;
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(config, FLAP_PART_HEAD, 0, tensors);
  flap_assert(config->family->head_projection_index < count);
  return tensors[config->family->head_projection_index].offset;
}

/* ---- sizes and costs ------------------------------------------------------------------------------------- */

uint64_t flap_model_hidden_bytes(const flap_model_config *config, const flap_model_shape *shape) {
  return (uint64_t)shape->batch * shape->sequence * config->hidden_size * flap_dtype_bytes(shape->dtype);
}

static bool is_kept(uint32_t mask, uint32_t tensor) {
  return (mask >> tensor & 1) != 0;
}

uint32_t flap_model_saved_tensors(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask,
                                  flap_saved_tensor *tensors_out) {
  uint32_t count = config->family->saved_tensors(config, shape, tensors_out);
  flap_assert(count > 0 && count <= FLAP_MODEL_SAVED_MAX);
  uint64_t end[2] = {0, 0}; /* of scratch, of what is kept */
  for (uint32_t i = 0; i < count; i++) {
    uint64_t *offset = &end[is_kept(mask, i)];
    tensors_out[i].offset = *offset;
    if (is_kept(mask, i) || !tensors_out[i].spare)
      *offset += flap_units_round_up(tensors_out[i].bytes, FLAP_MODEL_ALIGN);
  }
  return count;
}

static uint64_t block_bytes(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask, bool kept) {
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  uint32_t count = flap_model_saved_tensors(config, shape, mask, tensors);
  uint64_t end = 0;
  for (uint32_t i = 0; i < count; i++)
    if (is_kept(mask, i) == kept && (kept || !tensors[i].spare))
      end = tensors[i].offset + tensors[i].bytes;
  return flap_units_round_up(end, FLAP_MODEL_PAGE);
}

uint64_t flap_model_saved_bytes(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask) {
  return block_bytes(config, shape, mask, true);
}

uint64_t flap_model_scratch_bytes(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask) {
  return block_bytes(config, shape, mask, false);
}

const flap_saved_set *flap_model_saved_sets(const flap_model_config *config, uint32_t *count_out) {
  *count_out = config->family->saved_set_count;
  return config->family->saved_sets;
}

uint64_t flap_model_workspace_bytes(const flap_model_config *config, const flap_model_shape *shape) {
  return flap_units_round_up(config->family->workspace_bytes(config, shape), FLAP_MODEL_PAGE);
}

uint64_t flap_model_cache_values(const flap_model_config *config, flap_dtype dtype, uint32_t positions) {
  uint64_t keys = (uint64_t)positions * config->num_key_value_heads * config->head_dim * flap_dtype_bytes(dtype);
  return flap_units_round_up(keys, FLAP_MODEL_ALIGN);
}

uint64_t flap_model_cache_bytes(const flap_model_config *config, flap_dtype dtype, uint32_t positions) {
  return flap_units_round_up(2 * flap_model_cache_values(config, dtype, positions), FLAP_MODEL_PAGE);
}

uint64_t flap_model_rope_bytes(const flap_model_config *config, uint32_t positions) {
  return (uint64_t)positions * config->head_dim * sizeof(float);
}

double flap_model_forward_flops(const flap_model_config *config, const flap_model_shape *shape, flap_part part) {
  return config->family->forward_flops(config, shape, part);
}

double flap_model_recompute_flops(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask) {
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  uint32_t count = flap_model_saved_tensors(config, shape, mask, tensors);
  double flops = 0;
  for (uint32_t i = 0; i < count; i++)
    flops += is_kept(mask, i) ? 0 : tensors[i].recompute_flops;
  return flops;
}

void flap_model_ops_limits(const flap_model_config *config, const flap_model_shape *shape, uint32_t threads,
                           flap_ops_limits *limits_out) {
  *limits_out = (flap_ops_limits){.dtype = shape->dtype,
                                  .batch_max = shape->batch,
                                  .sequence_max = shape->sequence,
                                  .tokens_max = shape->batch * shape->sequence,
                                  .hidden = config->hidden_size,
                                  .intermediate = config->intermediate_size,
                                  .vocabulary = config->vocab_size,
                                  .heads = config->num_attention_heads,
                                  .kv_heads = config->num_key_value_heads,
                                  .head_size = config->head_dim,
                                  .cache_tokens_max = 0,
                                  .threads = threads};
}

/* ---- forward and backward -------------------------------------------------------------------------------- */

static const flap_family *family_of(const flap_model_run *run) {
  return run->config->family;
}

void flap_model_embed(const flap_model_run *run, const void *embedding, const int32_t *tokens, void *x) {
  family_of(run)->embed(run, embedding, tokens, x);
}

void flap_model_embed_backward(const flap_model_run *run, const int32_t *tokens, const int32_t *order, const void *dx,
                               float *dembedding) {
  family_of(run)->embed_backward(run, tokens, order, dx, dembedding);
}

void flap_model_layer_forward(const flap_model_run *run, const void *weights, const void *x_in,
                              const flap_model_saved *saved, void *x_out) {
  flap_assert(x_out != NULL && x_out != x_in);
  family_of(run)->layer_forward(run, weights, x_in, saved, x_out);
}

void flap_model_layer_recompute(const flap_model_run *run, const void *weights, const void *x_in,
                                const flap_model_saved *saved) {
  family_of(run)->layer_recompute(run, weights, x_in, saved);
}

void flap_model_layer_backward(const flap_model_run *run, const void *weights, const void *x_in,
                               const flap_model_saved *saved, void *dx, const flap_model_gradient *dweights) {
  flap_assert(dx != x_in);
  flap_assert(dweights->dtype == FLAP_F32 ||
              (dweights->dtype == FLAP_BF16 && run->shape.dtype == FLAP_BF16 && !dweights->accumulate));
  family_of(run)->layer_backward(run, weights, x_in, saved, dx, dweights);
}

void flap_model_head_loss(const flap_model_run *run, const void *head, const void *projection, const void *x_in,
                          const int32_t *targets, float loss_scale, float *losses, void *dx, float *dhead,
                          float *dprojection, bool accumulate) {
  flap_assert(!dx || (dx != x_in && dhead && dprojection));
  family_of(run)->head_loss(run, head, projection, x_in, targets, loss_scale, losses, dx, dhead, dprojection,
                            accumulate);
}

void flap_model_layer_decode(const flap_model_run *run, const void *weights, void *x, void *scratch, void *cache,
                             uint32_t cache_positions, uint32_t tokens, uint32_t first_position) {
  flap_assert(tokens > 0 && tokens <= run->shape.batch * run->shape.sequence);
  flap_assert(first_position <= cache_positions && tokens <= cache_positions - first_position);
  family_of(run)->layer_decode(run, weights, x, scratch, cache, cache_positions, tokens, first_position);
}

void flap_model_logits(const flap_model_run *run, const void *head, const void *projection, const void *x, uint32_t row,
                       float *logits) {
  flap_assert(row < run->shape.batch * run->shape.sequence);
  family_of(run)->logits(run, head, projection, x, row, logits);
}
