/* The configurations of the Llama family: keys of config.json with the fallbacks of transformers, and checks.
 *
 * Invariants:
 *   1. What a key may say that would change the math, and that llama.c does not compute, is refused (FLAP_KEY_MUST_BE,
 *      FLAP_KEY_ALL_MUST_BE); a key that is ignored says nothing about training.
 *   2. A finished configuration is complete: nothing after it asks which member of the family it is for.
 */
#include "model/llama_internal.h"

#include <math.h>
#include <stddef.h>

/* ---- keys ------------------------------------------------------------------------------------------------ */

#define LLAMA_WIDTH_MAX (1u << 20) /* hidden, intermediate, heads · head_dim: keeps every row stride within uint32 */
#define LLAMA_VOCABULARY_MAX (1u << 24)
#define LLAMA_LAYERS_MAX (1u << 16)
#define LLAMA_POSITIONS_MAX (1u << 30)
#define QWEN2_KEY_VALUE_HEADS 32 /* what an absent num_key_value_heads means there, whatever the query heads */
#define MISTRAL_KEY_VALUE_HEADS 8
#define MISTRAL_SLIDING_WINDOW 4096

#define FIELD(name) offsetof(flap_model_config, name)
#define COUNT_KEY(key) \
  { #key, FLAP_KEY_COUNT, FIELD(key), true, 0, NULL }
#define COUNT_KEY_OR(key, fallback) \
  { #key, FLAP_KEY_COUNT, FIELD(key), false, fallback, NULL }
#define NUMBER_KEY_OR(key, fallback) \
  { #key, FLAP_KEY_NUMBER, FIELD(key), false, fallback, NULL }
#define BOOL_KEY(key) \
  { #key, FLAP_KEY_BOOL, FIELD(key), false, 0, NULL }
#define MUST_BE_KEY(key, text) \
  { key, FLAP_KEY_MUST_BE, 0, false, 0, text }
#define ALL_MUST_BE_KEY(key, text) \
  { key, FLAP_KEY_ALL_MUST_BE, 0, false, 0, text }
#define MUST_BE_KEY_NOT_ABSENT(key, text, absent) \
  { key, FLAP_KEY_MUST_BE, 0, false, absent, text }
#define IGNORED_KEY(key) \
  { key, FLAP_KEY_IGNORED, 0, false, 0, NULL }

/* What all model types have, with transformers' fallbacks. `rope_theta` stands before the mappings: newer files have
 * it inside `rope_parameters`, which then wins. */
#define LLAMA_COMMON_KEYS                                                                                     \
  COUNT_KEY(vocab_size), COUNT_KEY(hidden_size), COUNT_KEY(intermediate_size), COUNT_KEY(num_hidden_layers),  \
      COUNT_KEY(num_attention_heads), COUNT_KEY_OR(head_dim, NAN), NUMBER_KEY_OR(rms_norm_eps, 1e-6),         \
      NUMBER_KEY_OR(initializer_range, 0.02), BOOL_KEY(tie_word_embeddings),                                  \
      {"rope_theta", FLAP_KEY_NUMBER, FIELD(rope.theta), false, 10000.0, NULL},                               \
      {"rope_scaling", FLAP_KEY_ROPE, FIELD(rope), false, 0, NULL},                                           \
      {"rope_parameters", FLAP_KEY_ROPE, FIELD(rope), false, 0, NULL}, MUST_BE_KEY("hidden_act", "\"silu\""), \
      MUST_BE_KEY("attention_dropout", "0.0"), MUST_BE_KEY("partial_rotary_factor", "1.0"),                   \
      MUST_BE_KEY("quantization_config", "null")

/* Keys that say nothing about training this model: who made it, how to sample from it, how to hold it. */
#define LLAMA_IGNORED_KEYS                                                                                             \
  IGNORED_KEY("model_type"), IGNORED_KEY("architectures"), IGNORED_KEY("_name_or_path"),                               \
      IGNORED_KEY("transformers_version"), IGNORED_KEY("torch_dtype"), IGNORED_KEY("dtype"), IGNORED_KEY("use_cache"), \
      IGNORED_KEY("bos_token_id"), IGNORED_KEY("eos_token_id"), IGNORED_KEY("pad_token_id"),                           \
      IGNORED_KEY("unk_token_id"), IGNORED_KEY("sep_token_id"), IGNORED_KEY("max_window_layers"),                      \
      IGNORED_KEY("output_attentions"), IGNORED_KEY("output_hidden_states"), IGNORED_KEY("return_dict"),               \
      IGNORED_KEY("id2label"), IGNORED_KEY("label2id"), IGNORED_KEY("chunk_size_feed_forward"),                        \
      IGNORED_KEY("is_encoder_decoder"), IGNORED_KEY("problem_type"), IGNORED_KEY("attn_implementation"),              \
      IGNORED_KEY("_attn_implementation"), IGNORED_KEY("_attn_implementation_autoset"), IGNORED_KEY("auto_map")

static const flap_model_key LLAMA_KEYS[] = {
    LLAMA_COMMON_KEYS,        COUNT_KEY_OR(num_key_value_heads, NAN), COUNT_KEY_OR(max_position_embeddings, 2048),
    BOOL_KEY(attention_bias), MUST_BE_KEY("mlp_bias", "false"),       MUST_BE_KEY("pretraining_tp", "1"),
    LLAMA_IGNORED_KEYS,
};

static const flap_model_key MISTRAL_KEYS[] = {
    LLAMA_COMMON_KEYS,
    COUNT_KEY_OR(num_key_value_heads, MISTRAL_KEY_VALUE_HEADS),
    COUNT_KEY_OR(max_position_embeddings, 131072),
    MUST_BE_KEY_NOT_ABSENT("sliding_window", "null", MISTRAL_SLIDING_WINDOW),
    LLAMA_IGNORED_KEYS,
};

/* `sliding_window` and `max_window_layers` say nothing where `use_sliding_window` is false, and published files have
 * them all the same. */
static const flap_model_key QWEN2_KEYS[] = {
    LLAMA_COMMON_KEYS,
    COUNT_KEY_OR(num_key_value_heads, QWEN2_KEY_VALUE_HEADS),
    COUNT_KEY_OR(max_position_embeddings, 32768),
    MUST_BE_KEY("use_sliding_window", "false"),
    ALL_MUST_BE_KEY("layer_types", "\"full_attention\""),
    MUST_BE_KEY("use_mrope", "false"),
    IGNORED_KEY("sliding_window"),
    LLAMA_IGNORED_KEYS,
};

#define TABLE(keys) (*count_out = (uint32_t)(sizeof(keys) / sizeof *(keys)), (keys))

const flap_model_key *flap_llama_keys(uint32_t *count_out) {
  return TABLE(LLAMA_KEYS);
}

const flap_model_key *flap_mistral_keys(uint32_t *count_out) {
  return TABLE(MISTRAL_KEYS);
}

const flap_model_key *flap_qwen2_keys(uint32_t *count_out) {
  return TABLE(QWEN2_KEYS);
}

/* ---- checks ---------------------------------------------------------------------------------------------- */

static flap_status finish_heads(flap_model_config *config) {
  if (config->num_key_value_heads == 0)
    config->num_key_value_heads = config->num_attention_heads;
  FLAP_TRY(flap_model_check_count("num_key_value_heads", config->num_key_value_heads, LLAMA_WIDTH_MAX));
  if (config->num_attention_heads % config->num_key_value_heads != 0)
    return flap_error_set(FLAP_INVALID, "num_key_value_heads is %u; it must divide num_attention_heads, which is %u",
                          config->num_key_value_heads, config->num_attention_heads);

  if (config->head_dim == 0) {
    if (config->hidden_size % config->num_attention_heads != 0)
      return flap_error_set(FLAP_INVALID,
                            "hidden_size is %u; it must be a multiple of num_attention_heads, which is %u, unless "
                            "head_dim is given",
                            config->hidden_size, config->num_attention_heads);
    config->head_dim = config->hidden_size / config->num_attention_heads;
  }
  FLAP_TRY(flap_model_check_count("head_dim", config->head_dim, LLAMA_WIDTH_MAX));
  if (config->head_dim % 2 != 0)
    return flap_error_set(FLAP_INVALID, "head_dim is %u; it must be even, because rotary embeddings turn pairs",
                          config->head_dim);
  if ((uint64_t)config->num_attention_heads * config->head_dim > LLAMA_WIDTH_MAX)
    return flap_error_set(FLAP_INVALID, "num_attention_heads is %u and head_dim %u; their product must be at most %u",
                          config->num_attention_heads, config->head_dim, LLAMA_WIDTH_MAX);
  return FLAP_OK;
}

static flap_status check_rope(const flap_rope *rope) {
  FLAP_TRY(flap_model_check_number("rope_theta", rope->theta, 0, 1e18));
  if (rope->kind == FLAP_ROPE_DEFAULT)
    return FLAP_OK;
  if (rope->kind != FLAP_ROPE_LLAMA3 && rope->kind != FLAP_ROPE_LINEAR)
    return flap_error_set(FLAP_INVALID, "rope_scaling.rope_type is unknown; it must be default, llama3 or linear");
  FLAP_TRY(flap_model_check_number("rope_scaling.factor", rope->factor, 0, 1e6));
  if (rope->kind == FLAP_ROPE_LINEAR)
    return FLAP_OK;
  FLAP_TRY(flap_model_check_number("rope_scaling.low_freq_factor", rope->low_freq_factor, 0, 1e6));
  FLAP_TRY(
      flap_model_check_number("rope_scaling.high_freq_factor", rope->high_freq_factor, rope->low_freq_factor, 1e6));
  return flap_model_check_count("rope_scaling.original_max_position_embeddings", rope->original_max_position,
                                LLAMA_POSITIONS_MAX);
}

static flap_status check_all(flap_model_config *config) {
  FLAP_TRY(flap_model_check_count("vocab_size", config->vocab_size, LLAMA_VOCABULARY_MAX));
  FLAP_TRY(flap_model_check_count("hidden_size", config->hidden_size, LLAMA_WIDTH_MAX));
  FLAP_TRY(flap_model_check_count("intermediate_size", config->intermediate_size, LLAMA_WIDTH_MAX));
  FLAP_TRY(flap_model_check_count("num_hidden_layers", config->num_hidden_layers, LLAMA_LAYERS_MAX));
  FLAP_TRY(flap_model_check_count("num_attention_heads", config->num_attention_heads, LLAMA_WIDTH_MAX));
  FLAP_TRY(finish_heads(config));
  FLAP_TRY(flap_model_check_count("max_position_embeddings", config->max_position_embeddings, LLAMA_POSITIONS_MAX));
  FLAP_TRY(flap_model_check_number("rms_norm_eps", config->rms_norm_eps, 0, 1));
  FLAP_TRY(flap_model_check_number("initializer_range", config->initializer_range, 0, 100));
  return check_rope(&config->rope);
}

flap_status flap_llama_finish_config(flap_model_config *config) {
  config->output_bias = config->attention_bias;
  return check_all(config);
}

/* Most small models would fail on the fallback, which the general message could not tell from a key. */
static flap_status check_fallback_heads(const flap_model_config *config, const char *family, uint32_t fallback) {
  if (config->num_key_value_heads != fallback || config->num_attention_heads % fallback == 0)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "num_key_value_heads is %u, which is also what %s takes it to be when it is absent; it "
                        "must divide num_attention_heads, which is %u: say how many there are",
                        config->num_key_value_heads, family, config->num_attention_heads);
}

flap_status flap_mistral_finish_config(flap_model_config *config) {
  FLAP_TRY(check_fallback_heads(config, "mistral", MISTRAL_KEY_VALUE_HEADS));
  return flap_llama_finish_config(config);
}

flap_status flap_qwen2_finish_config(flap_model_config *config) {
  config->attention_bias = true;
  config->output_bias = false;
  FLAP_TRY(check_fallback_heads(config, "qwen2", QWEN2_KEY_VALUE_HEADS));
  return check_all(config);
}
