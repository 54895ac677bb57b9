/* Tables and sizes: offsets, totals, keys, and every way in which a configuration can be wrong. */
#include "model/model.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static flap_model_config good_config(void) {
  return (flap_model_config){.family = flap_model_find_family("llama"),
                             .vocab_size = 256,
                             .hidden_size = 192,
                             .intermediate_size = 512,
                             .num_hidden_layers = 12,
                             .num_attention_heads = 6,
                             .num_key_value_heads = 3,
                             .max_position_embeddings = 1024,
                             .rms_norm_eps = 1e-5,
                             .initializer_range = 0.02,
                             .tie_word_embeddings = true,
                             .rope = {.theta = 10000}};
}

/* ---- registry and keys ----------------------------------------------------------------------------------- */

START_TEST(families_are_found_by_model_type) {
  static const char *const known[][2] = {
      {"llama", "LlamaForCausalLM"}, {"mistral", "MistralForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    const flap_family *family = flap_model_find_family(known[i][0]);
    ck_assert_ptr_nonnull(family);
    ck_assert_str_eq(flap_model_family_name(family), known[i][0]);
    ck_assert_str_eq(flap_model_architecture(family), known[i][1]);
    ck_assert_ptr_nonnull(strstr(flap_model_families(), known[i][0]));
  }
  ck_assert_ptr_null(flap_model_find_family("gpt2"));
  ck_assert_ptr_null(flap_model_find_family(""));
}
END_TEST

static const flap_model_key *find_key(const char *family, const char *name) {
  uint32_t count;
  const flap_model_key *keys = flap_model_keys(flap_model_find_family(family), &count);
  const flap_model_key *found = NULL;
  for (uint32_t i = 0; i < count; i++)
    if (strcmp(keys[i].name, name) == 0) {
      ck_assert_msg(!found, "%s: %s stands twice in the table", family, name);
      found = &keys[i];
    }
  return found;
}

START_TEST(keys_are_unique_and_lie_inside_the_struct) {
  static const char *const families[] = {"llama", "mistral", "qwen2"};
  for (size_t f = 0; f < sizeof families / sizeof *families; f++) {
    uint32_t count;
    const flap_model_key *keys = flap_model_keys(flap_model_find_family(families[f]), &count);
    for (uint32_t i = 0; i < count; i++) {
      static const size_t sizes[] = {[FLAP_KEY_COUNT] = sizeof(uint32_t),
                                     [FLAP_KEY_NUMBER] = sizeof(double),
                                     [FLAP_KEY_BOOL] = sizeof(bool),
                                     [FLAP_KEY_ROPE] = sizeof(flap_rope),
                                     [FLAP_KEY_MUST_BE] = 0,
                                     [FLAP_KEY_ALL_MUST_BE] = 0,
                                     [FLAP_KEY_IGNORED] = 0};
      ck_assert_ptr_eq(find_key(families[f], keys[i].name), &keys[i]);
      ck_assert_uint_le(keys[i].offset + sizes[keys[i].kind], sizeof(flap_model_config));
      bool pinned = keys[i].kind == FLAP_KEY_MUST_BE || keys[i].kind == FLAP_KEY_ALL_MUST_BE;
      ck_assert_int_eq(pinned, keys[i].must_be != NULL);
    }
  }
}
END_TEST

START_TEST(keys_that_change_the_math_are_pinned) {
  static const struct {
    const char *family, *key, *must_be;
  } pinned[] = {{"llama", "hidden_act", "\"silu\""},
                {"llama", "mlp_bias", "false"},
                {"llama", "pretraining_tp", "1"},
                {"llama", "attention_dropout", "0.0"},
                {"llama", "partial_rotary_factor", "1.0"},
                {"llama", "quantization_config", "null"},
                {"mistral", "sliding_window", "null"},
                {"mistral", "hidden_act", "\"silu\""},
                {"mistral", "attention_dropout", "0.0"},
                {"mistral", "quantization_config", "null"},
                {"qwen2", "use_sliding_window", "false"},
                {"qwen2", "hidden_act", "\"silu\""},
                {"qwen2", "attention_dropout", "0.0"},
                {"qwen2", "quantization_config", "null"},
                {"qwen2", "use_mrope", "false"}};
  for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++) {
    const flap_model_key *key = find_key(pinned[i].family, pinned[i].key);
    ck_assert_msg(key && key->kind == FLAP_KEY_MUST_BE, "%s: %s", pinned[i].family, pinned[i].key);
    ck_assert_str_eq(key->must_be, pinned[i].must_be);
  }
  ck_assert_int_eq(find_key("qwen2", "layer_types")->kind, FLAP_KEY_ALL_MUST_BE);
  ck_assert_str_eq(find_key("qwen2", "layer_types")->must_be, "\"full_attention\"");
  ck_assert(find_key("llama", "rope_theta") < find_key("llama", "rope_scaling"));
  ck_assert(find_key("llama", "rope_theta") < find_key("llama", "rope_parameters"));
}
END_TEST

/* ---- configurations -------------------------------------------------------------------------------------- */

START_TEST(finish_derives_what_was_absent) {
  flap_model_config config = good_config();
  config.num_key_value_heads = 0;
  config.head_dim = 0;
  ck_assert_msg(flap_model_finish_config(&config) == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(config.num_key_value_heads, 6);
  ck_assert_uint_eq(config.head_dim, 32);

  config = good_config();
  config.head_dim = 48; /* given: need not be hidden / heads */
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  ck_assert_uint_eq(config.head_dim, 48);
  ck_assert_uint_eq(config.num_key_value_heads, 3);
}
END_TEST

#define CHANGE(name, statement)                 \
  static void name(flap_model_config *config) { \
    statement;                                  \
  }
CHANGE(no_family, config->family = NULL)
CHANGE(no_vocabulary, config->vocab_size = 0)
CHANGE(huge_vocabulary, config->vocab_size = 1u << 30)
CHANGE(no_hidden, config->hidden_size = 0)
CHANGE(huge_hidden, config->hidden_size = 1u << 30)
CHANGE(no_intermediate, config->intermediate_size = 0)
CHANGE(huge_intermediate, config->intermediate_size = UINT32_MAX)
CHANGE(no_layers, config->num_hidden_layers = 0)
CHANGE(huge_layers, config->num_hidden_layers = UINT32_MAX)
CHANGE(no_heads, config->num_attention_heads = 0)
CHANGE(odd_groups, config->num_key_value_heads = 4)
CHANGE(more_key_heads, config->num_key_value_heads = 12)
CHANGE(uneven_heads, (config->num_attention_heads = 5, config->num_key_value_heads = 5))
CHANGE(odd_head, config->head_dim = 33)
CHANGE(huge_head, config->head_dim = 1u << 19)
CHANGE(no_positions, config->max_position_embeddings = 0)
CHANGE(zero_epsilon, config->rms_norm_eps = 0)
CHANGE(nan_epsilon, config->rms_norm_eps = NAN)
CHANGE(huge_epsilon, config->rms_norm_eps = 2)
CHANGE(negative_range, config->initializer_range = -0.02)
CHANGE(zero_theta, config->rope.theta = 0)
CHANGE(infinite_theta, config->rope.theta = INFINITY)
CHANGE(unknown_rope, config->rope.kind = (flap_rope_kind)77)
CHANGE(linear_no_factor, config->rope.kind = FLAP_ROPE_LINEAR)
static void llama3_rope(flap_model_config *config) {
  config->rope = (flap_rope){.kind = FLAP_ROPE_LLAMA3,
                             .theta = 500000,
                             .factor = 8,
                             .low_freq_factor = 1,
                             .high_freq_factor = 4,
                             .original_max_position = 8192};
}
CHANGE(llama3_no_factor, (llama3_rope(config), config->rope.factor = 0))
CHANGE(llama3_no_low, (llama3_rope(config), config->rope.low_freq_factor = 0))
CHANGE(llama3_no_band, (llama3_rope(config), config->rope.high_freq_factor = 1))
CHANGE(llama3_no_positions, (llama3_rope(config), config->rope.original_max_position = 0))

START_TEST(bad_configurations_are_refused_and_the_key_is_named) {
  static const struct {
    void (*change)(flap_model_config *);
    const char *key, *value;
  } cases[] = {
      {no_family, "model_type", "llama"},
      {no_vocabulary, "vocab_size", "0"},
      {huge_vocabulary, "vocab_size", "1073741824"},
      {no_hidden, "hidden_size", "0"},
      {huge_hidden, "hidden_size", "1073741824"},
      {no_intermediate, "intermediate_size", "0"},
      {huge_intermediate, "intermediate_size", "4294967295"},
      {no_layers, "num_hidden_layers", "0"},
      {huge_layers, "num_hidden_layers", "4294967295"},
      {no_heads, "num_attention_heads", "0"},
      {odd_groups, "num_key_value_heads", "4"},
      {more_key_heads, "num_key_value_heads", "12"},
      {uneven_heads, "head_dim", "192"},
      {odd_head, "head_dim", "33"},
      {huge_head, "head_dim", "524288"},
      {no_positions, "max_position_embeddings", "0"},
      {zero_epsilon, "rms_norm_eps", "0"},
      {nan_epsilon, "rms_norm_eps", "nan"},
      {huge_epsilon, "rms_norm_eps", "2"},
      {negative_range, "initializer_range", "-0.02"},
      {zero_theta, "rope_theta", "0"},
      {infinite_theta, "rope_theta", "inf"},
      {unknown_rope, "rope_scaling.rope_type", "llama3"},
      {linear_no_factor, "rope_scaling.factor", "0"},
      {llama3_no_factor, "rope_scaling.factor", "0"},
      {llama3_no_low, "rope_scaling.low_freq_factor", "0"},
      {llama3_no_band, "rope_scaling.high_freq_factor", "1"},
      {llama3_no_positions, "rope_scaling.original_max_position_embeddings", "0"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    flap_model_config config = good_config();
    cases[i].change(&config);
    flap_error_clear();
    ck_assert_msg(flap_model_finish_config(&config) == FLAP_INVALID, "case %zu (%s) was accepted", i, cases[i].key);
    ck_assert_msg(strstr(flap_error_message(), cases[i].key) && strstr(flap_error_message(), cases[i].value),
                  "case %zu: \"%s\" should name %s and %s", i, flap_error_message(), cases[i].key, cases[i].value);
  }
}
END_TEST

START_TEST(good_configurations_are_accepted) {
  static void (*const changes[])(flap_model_config *) = {llama3_rope};
  for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
    flap_model_config config = good_config();
    changes[i](&config);
    ck_assert_msg(flap_model_finish_config(&config) == FLAP_OK, "%s", flap_error_message());
  }
  flap_model_config linear = good_config();
  linear.rope = (flap_rope){.kind = FLAP_ROPE_LINEAR, .theta = 10000, .factor = 2};
  ck_assert_msg(flap_model_finish_config(&linear) == FLAP_OK, "%s", flap_error_message());
  flap_model_config mistral = good_config();
  mistral.family = flap_model_find_family("mistral");
  ck_assert_msg(flap_model_finish_config(&mistral) == FLAP_OK, "%s", flap_error_message());
}
END_TEST

static uint32_t count_of(const flap_model_config *config, const char *part_of_name) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(config, FLAP_PART_LAYER, 0, tensors), found = 0;
  for (uint32_t i = 0; i < count; i++)
    found += strstr(tensors[i].name, part_of_name) != NULL;
  return found;
}

START_TEST(biases_are_where_the_family_has_them) {
  static const struct {
    const char *family;
    bool key;
    uint32_t inputs, outputs; /* biases of q, k and v, and of o */
  } cases[] = {{"llama", false, 0, 0},
               {"llama", true, 3, 1},
               {"mistral", false, 0, 0},
               {"qwen2", false, 3, 0},
               {"qwen2", true, 3, 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    flap_model_config config = good_config();
    config.family = flap_model_find_family(cases[i].family);
    config.attention_bias = cases[i].key;
    config.output_bias = !cases[i].outputs;
    ck_assert_msg(flap_model_finish_config(&config) == FLAP_OK, "%s", flap_error_message());
    ck_assert_uint_eq(count_of(&config, ".bias"), cases[i].inputs + cases[i].outputs);
    ck_assert_uint_eq(count_of(&config, "o_proj.bias"), cases[i].outputs);
    ck_assert_uint_eq(count_of(&config, ".weight"), 9);
  }
}
END_TEST

/* ---- tensors and sizes ----------------------------------------------------------------------------------- */

START_TEST(parts_are_laid_out_in_blocks_without_overlap) {
  flap_model_config config = good_config();
  for (int variant = 0; variant < 6; variant++) {
    config.family = flap_model_find_family(variant < 4 ? "llama" : "qwen2");
    config.tie_word_embeddings = variant & 1;
    config.attention_bias = variant & 2;
    config.head_dim = 0;
    ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
    uint64_t parameters = 0;
    for (int part = 0; part < FLAP_PART_COUNT; part++) {
      flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
      uint32_t count = flap_model_tensors(&config, (flap_part)part, 7, tensors);
      ck_assert_uint_eq(count, flap_model_tensors(&config, (flap_part)part, 7, NULL));
      uint64_t end = 0;
      for (uint32_t i = 0; i < count; i++) {
        ck_assert_uint_eq(tensors[i].offset, (end + FLAP_OPS_BLOCK - 1) / FLAP_OPS_BLOCK * FLAP_OPS_BLOCK);
        end = tensors[i].offset + tensors[i].elements;
        parameters += tensors[i].elements * (part == FLAP_PART_LAYER ? config.num_hidden_layers : 1);
        ck_assert_int_eq(part == FLAP_PART_LAYER, strncmp(tensors[i].name, "model.layers.7.", 15) == 0);
        bool norm = strstr(tensors[i].name, "norm") != NULL, bias = strstr(tensors[i].name, ".bias") != NULL;
        ck_assert_int_eq(tensors[i].decays, !norm && !bias);
        ck_assert_int_eq(tensors[i].init, norm ? FLAP_INIT_ONES : bias ? FLAP_INIT_ZEROS : FLAP_INIT_NORMAL);
      }
      ck_assert_uint_eq(flap_model_part_elements(&config, (flap_part)part),
                        (end + FLAP_OPS_BLOCK - 1) / FLAP_OPS_BLOCK * FLAP_OPS_BLOCK);
    }
    ck_assert_uint_eq(flap_model_parameters(&config), parameters);
    uint64_t d = 192, f = 512, kv = 96, v = 256;
    uint64_t biases = variant < 2 ? 0 : variant < 4 ? 2 * d + 2 * kv : d + 2 * kv;
    uint64_t layer = 2 * d + 2 * d * d + 2 * kv * d + 3 * f * d + biases;
    ck_assert_uint_eq(parameters, 12 * layer + d + v * d * (config.tie_word_embeddings ? 1 : 2));
    ck_assert_uint_eq(flap_model_head_projection(&config), config.tie_word_embeddings ? 0 : FLAP_OPS_BLOCK);
  }
}
END_TEST

/* q, k, v and gate, up are neighbours without a gap where their sizes are multiples of a block. */
START_TEST(matrices_with_one_input_are_adjacent) {
  flap_model_config config = good_config();
  config.num_key_value_heads = 6;
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(&config, FLAP_PART_LAYER, 0, tensors);
  static const char *const pairs[][2] = {
      {"q_proj.weight", "k_proj.weight"}, {"k_proj.weight", "v_proj.weight"}, {"gate_proj.weight", "up_proj.weight"}};
  for (size_t p = 0; p < 3; p++) {
    uint32_t found = 0;
    for (uint32_t i = 0; i + 1 < count; i++)
      if (strstr(tensors[i].name, pairs[p][0]) && strstr(tensors[i + 1].name, pairs[p][1])) {
        found++;
        ck_assert_uint_eq(tensors[i].offset + tensors[i].elements, tensors[i + 1].offset);
      }
    ck_assert_uint_eq(found, 1);
  }
}
END_TEST

START_TEST(saved_block_holds_its_tensors_and_their_costs_add_up) {
  flap_model_config config = good_config();
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  for (int dtype = FLAP_F32; dtype <= FLAP_BF16; dtype++) {
    flap_model_shape shape = {.dtype = (flap_dtype)dtype, .batch = 3, .sequence = 67};
    flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
    uint32_t count = flap_model_saved_tensors(&config, &shape, FLAP_MODEL_SAVED_ALL, tensors);
    uint64_t end = 0;
    double recompute = 0;
    for (uint32_t i = 0; i < count; i++) {
      ck_assert_uint_eq(tensors[i].offset % 256, 0);
      ck_assert_uint_ge(tensors[i].offset, end);
      ck_assert_uint_gt(tensors[i].bytes, 0);
      end = tensors[i].offset + tensors[i].bytes;
      recompute += tensors[i].recompute_flops;
    }
    uint64_t bytes = flap_model_saved_bytes(&config, &shape, FLAP_MODEL_SAVED_ALL);
    ck_assert_uint_eq(bytes % 4096, 0);
    ck_assert(bytes >= end && bytes - end < 4096);
    /* Everything of a forward but the down-projection. */
    double down = 2.0 * 3 * 67 * 192 * 512;
    ck_assert_double_eq(recompute, flap_model_forward_flops(&config, &shape, FLAP_PART_LAYER) - down);
  }
}
END_TEST

/* Whatever is kept, each tensor is in one of two blocks, and no two of a block overlap. */
START_TEST(kept_and_other_tensors_fill_two_blocks) {
  flap_model_config config = good_config();
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  const flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 3, .sequence = 67};
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  const uint32_t count = flap_model_saved_tensors(&config, &shape, 0, tensors);
  for (uint32_t mask = 0; mask < 1u << count; mask++) {
    uint64_t end[2] = {0, 0};
    double again = 0;
    (void)flap_model_saved_tensors(&config, &shape, mask, tensors);
    for (uint32_t i = 0; i < count; i++) {
      const uint32_t block = mask >> i & 1;
      ck_assert_uint_eq(tensors[i].offset % 256, 0);
      ck_assert(tensors[i].offset >= end[block] && tensors[i].offset - end[block] < 256);
      if (block == 1 || !tensors[i].spare)
        end[block] = tensors[i].offset + tensors[i].bytes;
      again += block == 0 ? tensors[i].recompute_flops : 0;
    }
    ck_assert_uint_eq(flap_model_saved_bytes(&config, &shape, mask), (end[1] + 4095) / 4096 * 4096);
    ck_assert_uint_eq(flap_model_scratch_bytes(&config, &shape, mask), (end[0] + 4095) / 4096 * 4096);
    ck_assert_double_eq(flap_model_recompute_flops(&config, &shape, mask), again);
  }
}
END_TEST

START_TEST(saved_sets_grow_up_to_all) {
  static const char *const families[] = {"llama", "mistral", "qwen2"};
  for (size_t f = 0; f < sizeof families / sizeof *families; f++) {
    flap_model_config config = good_config();
    config.family = flap_model_find_family(families[f]);
    ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
    const flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 64};
    uint32_t count;
    const flap_saved_set *sets = flap_model_saved_sets(&config, &count);
    ck_assert_uint_gt(count, 1);
    for (uint32_t i = 0; i < count; i++) {
      const uint64_t bytes = flap_model_saved_bytes(&config, &shape, sets[i].mask);
      ck_assert_uint_gt(bytes, i == 0 ? 0 : flap_model_saved_bytes(&config, &shape, sets[i - 1].mask));
    }
    ck_assert_uint_eq(sets[count - 1].mask, FLAP_MODEL_SAVED_ALL);
  }
}
END_TEST

START_TEST(sizes_of_the_demo_are_small) {
  flap_model_config config = good_config();
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 256};
  ck_assert_uint_eq(flap_model_hidden_bytes(&config, &shape), 256 * 192 * 2);
  /* One row of the inner width per token, the norm's statistics, and fp32 sums for the vectors of a layer. */
  ck_assert_uint_le(flap_model_workspace_bytes(&config, &shape), 256 * 512 * 2 + 4096 + 2 * FLAP_OPS_BLOCK * 4);
  ck_assert_uint_eq(flap_model_workspace_bytes(&config, &shape) % 4096, 0);
  ck_assert_uint_eq(flap_model_rope_bytes(&config, 256), 256 * 32 * 4);
  ck_assert_uint_eq(flap_model_cache_bytes(&config, FLAP_BF16, 256), 2 * 256 * 96 * 2);

  flap_ops_limits limits;
  flap_model_ops_limits(&config, &shape, 5, &limits);
  ck_assert(limits.dtype == FLAP_BF16 && limits.batch_max == 1 && limits.sequence_max == 256 &&
            limits.tokens_max == 256 && limits.hidden == 192 && limits.intermediate == 512 &&
            limits.vocabulary == 256 && limits.heads == 6 && limits.kv_heads == 3 && limits.head_size == 32 &&
            limits.threads == 5);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("model_tables");
  TCase *tests = tcase_create("tables");
  tcase_add_test(tests, families_are_found_by_model_type);
  tcase_add_test(tests, keys_are_unique_and_lie_inside_the_struct);
  tcase_add_test(tests, keys_that_change_the_math_are_pinned);
  tcase_add_test(tests, finish_derives_what_was_absent);
  tcase_add_test(tests, bad_configurations_are_refused_and_the_key_is_named);
  tcase_add_test(tests, good_configurations_are_accepted);
  tcase_add_test(tests, biases_are_where_the_family_has_them);
  tcase_add_test(tests, parts_are_laid_out_in_blocks_without_overlap);
  tcase_add_test(tests, matrices_with_one_input_are_adjacent);
  tcase_add_test(tests, saved_block_holds_its_tensors_and_their_costs_add_up);
  tcase_add_test(tests, kept_and_other_tensors_fill_two_blocks);
  tcase_add_test(tests, saved_sets_grow_up_to_all);
  tcase_add_test(tests, sizes_of_the_demo_are_small);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
