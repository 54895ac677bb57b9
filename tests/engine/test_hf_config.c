/* config.json: what transformers wrote is read, what FLAP writes is read back, and what is wrong is named. */
#include "engine/store/hf_config.h"

#include "io/formats/json_file.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"
#include "tests/model/model_fixture.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BASE                                                                                         \
  "\"model_type\": \"llama\", \"vocab_size\": 100, \"hidden_size\": 32, \"intermediate_size\": 64, " \
  "\"num_hidden_layers\": 2, \"num_attention_heads\": 4"

#define QWEN2                                                                                        \
  "\"model_type\": \"qwen2\", \"vocab_size\": 100, \"hidden_size\": 64, \"intermediate_size\": 64, " \
  "\"num_hidden_layers\": 2"
#define GOLDEN_COUNT 6

static flap_status parse(const char *text, bool strict, uint32_t fallback, flap_model_config *config_out) {
  json_t *root = NULL;
  RIG_OK(flap_json_load_text("test", text, strlen(text), &root));
  const flap_status status = flap_hf_config_parse(root, "run.yaml: model", strict, fallback, config_out);
  json_decref(root);
  return status;
}

static void same_config(const flap_model_config *a, const flap_model_config *b) {
  ck_assert_ptr_eq(a->family, b->family);
  ck_assert_uint_eq(a->vocab_size, b->vocab_size);
  ck_assert_uint_eq(a->hidden_size, b->hidden_size);
  ck_assert_uint_eq(a->intermediate_size, b->intermediate_size);
  ck_assert_uint_eq(a->num_hidden_layers, b->num_hidden_layers);
  ck_assert_uint_eq(a->num_attention_heads, b->num_attention_heads);
  ck_assert_uint_eq(a->num_key_value_heads, b->num_key_value_heads);
  ck_assert_uint_eq(a->head_dim, b->head_dim);
  ck_assert_uint_eq(a->max_position_embeddings, b->max_position_embeddings);
  ck_assert_double_eq(a->rms_norm_eps, b->rms_norm_eps);
  ck_assert_double_eq(a->initializer_range, b->initializer_range);
  ck_assert_int_eq(a->tie_word_embeddings, b->tie_word_embeddings);
  ck_assert_int_eq(a->attention_bias, b->attention_bias);
  ck_assert_int_eq(a->output_bias, b->output_bias);
  ck_assert_int_eq(a->rope.kind, b->rope.kind);
  ck_assert_double_eq(a->rope.theta, b->rope.theta);
  ck_assert_double_eq(a->rope.factor, b->rope.factor);
  ck_assert_double_eq(a->rope.low_freq_factor, b->rope.low_freq_factor);
  ck_assert_double_eq(a->rope.high_freq_factor, b->rope.high_freq_factor);
  ck_assert_uint_eq(a->rope.original_max_position, b->rope.original_max_position);
}

START_TEST(config_golden_files_are_read_and_written_back) {
  static const char *const folders[GOLDEN_COUNT] = {"llama_mha",   "llama_tied", "llama_gqa",
                                                    "llama_rope3", "llama_bias", "qwen2_gqa"};
  char path[128], *text = NULL;
  flap_model_config config, wanted, again;
  (void)snprintf(path, sizeof path, "tests/golden/%s", folders[_i]);
  fixture_read_config(path, &wanted);
  RIG_OK(flap_hf_config_read(path, &config));
  same_config(&config, &wanted);
  RIG_OK(flap_hf_config_format(&config, FLAP_BF16, 7, -1, NULL, &text));
  RIG_OK(parse(text, true, 0, &again));
  same_config(&again, &wanted);
  free(text);
}
END_TEST

START_TEST(config_fallbacks_are_those_of_transformers) {
  flap_model_config config;
  RIG_OK(parse("{" BASE ", \"head_dim\": null, \"rope_scaling\": null}", true, 0, &config));
  ck_assert_uint_eq(config.num_key_value_heads, 4);
  ck_assert_uint_eq(config.head_dim, 8);
  ck_assert_uint_eq(config.max_position_embeddings, 2048);
  ck_assert_double_eq(config.rms_norm_eps, 1e-6);
  ck_assert_double_eq(config.initializer_range, 0.02);
  ck_assert_double_eq(config.rope.theta, 10000);
  ck_assert_int_eq(config.rope.kind, FLAP_ROPE_DEFAULT);
  ck_assert(!config.tie_word_embeddings && !config.attention_bias);
  RIG_OK(parse("{\"model_type\": \"mistral\", \"vocab_size\": 9.0, \"hidden_size\": 32, \"intermediate_size\": 64, "
               "\"num_hidden_layers\": 2, \"num_attention_heads\": 16, \"attention_dropout\": 0}",
               true, 0, &config));
  ck_assert_uint_eq(config.vocab_size, 9);
  ck_assert_uint_eq(config.max_position_embeddings, 131072);
  ck_assert_uint_eq(config.num_key_value_heads, 8);
}
END_TEST

/* What is true of every qwen2 model, and what published files say beside it. */
START_TEST(config_of_qwen2_has_its_own_fallbacks_and_biases) {
  flap_model_config config;
  RIG_OK(parse("{" QWEN2 ", \"num_attention_heads\": 32}", true, 0, &config));
  ck_assert_str_eq(flap_model_architecture(config.family), "Qwen2ForCausalLM");
  ck_assert_uint_eq(config.num_key_value_heads, 32);
  ck_assert_uint_eq(config.max_position_embeddings, 32768);
  ck_assert_double_eq(config.rms_norm_eps, 1e-6);
  ck_assert_double_eq(config.rope.theta, 10000);
  ck_assert(!config.tie_word_embeddings && config.attention_bias && !config.output_bias);
  RIG_OK(parse("{" QWEN2
               ", \"architectures\": [\"Qwen2ForCausalLM\"], \"attention_dropout\": 0.0, \"bos_token_id\": 1, "
               "\"eos_token_id\": 2, \"hidden_act\": \"silu\", \"initializer_range\": 0.02, "
               "\"max_position_embeddings\": 131072, \"max_window_layers\": 28, \"num_attention_heads\": 14, "
               "\"head_dim\": 64, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-06, \"rope_theta\": 1000000.0, "
               "\"sliding_window\": 131072, \"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\", "
               "\"transformers_version\": \"4.43.1\", \"use_cache\": true, \"use_mrope\": false, "
               "\"use_sliding_window\": false, \"layer_types\": [\"full_attention\", \"full_attention\"]}",
               true, 0, &config));
  ck_assert_uint_eq(config.num_key_value_heads, 2);
  ck_assert_double_eq(config.rope.theta, 1e6);
  ck_assert(config.tie_word_embeddings);
  RIG_OK(parse("{" QWEN2 ", \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"layer_types\": [], "
               "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 2e6}}",
               true, 0, &config));
  ck_assert_double_eq(config.rope.theta, 2e6);
  RIG_OK(parse("{" BASE ", \"attention_bias\": true}", true, 0, &config));
  ck_assert(config.attention_bias && config.output_bias);
}
END_TEST

START_TEST(config_of_qwen2_refuses_what_it_cannot_compute) {
  static const struct {
    const char *text;
    flap_status status;
    const char *part, *more;
  } cases[] = {
      {"\"num_attention_heads\": 4", FLAP_INVALID, "num_key_value_heads is 32", "num_attention_heads, which is 4"},
      {"\"num_attention_heads\": 4, \"num_key_value_heads\": 3", FLAP_INVALID, "num_key_value_heads is 3", "divide"},
      {"\"num_attention_heads\": 32, \"use_sliding_window\": true", FLAP_UNSUPPORTED, "use_sliding_window: is true",
       "only false"},
      {"\"num_attention_heads\": 32, \"layer_types\": [\"full_attention\", \"sliding_attention\"]", FLAP_UNSUPPORTED,
       "layer_types: holds \"sliding_attention\"", "only \"full_attention\""},
      {"\"num_attention_heads\": 32, \"layer_types\": \"full_attention\"", FLAP_INVALID, "layer_types: must be",
       "array"},
      {"\"num_attention_heads\": 32, \"attention_dropout\": 0.5", FLAP_UNSUPPORTED, "attention_dropout: is 0.5", "0.0"},
      {"\"num_attention_heads\": 32, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0}", FLAP_UNSUPPORTED,
       "rope_scaling.rope_type: is yarn", ""},
      {"\"num_attention_heads\": 32, \"attention_bias\": true", FLAP_INVALID, "attention_bias: unknown key", ""},
  };
  flap_model_config config;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char text[512];
    (void)snprintf(text, sizeof text, "{" QWEN2 ", %s}", cases[i].text);
    RIG_REFUSED(parse(text, true, 0, &config), cases[i].status, cases[i].part, cases[i].more);
    ck_assert(scratch_error_has("run.yaml: model"));
  }
}
END_TEST

START_TEST(config_vocabulary_may_come_from_the_tokenizer) {
  static const char without[] = "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 64, "
                                "\"num_hidden_layers\": 2, \"num_attention_heads\": 4}";
  flap_model_config config;
  RIG_OK(parse(without, true, 257, &config));
  ck_assert_uint_eq(config.vocab_size, 257);
  RIG_OK(parse("{" BASE "}", true, 257, &config));
  ck_assert_uint_eq(config.vocab_size, 100);
  RIG_REFUSED(parse(without, true, 0, &config), FLAP_INVALID, "run.yaml: model: vocab_size:", "missing");
}
END_TEST

START_TEST(config_rope_mappings_of_both_kinds) {
  flap_model_config config;
  RIG_OK(parse("{" BASE ", \"rope_theta\": 5e5, \"rope_scaling\": {\"type\": \"llama3\", \"rope_type\": \"llama3\", "
               "\"factor\": 8, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
               "\"original_max_position_embeddings\": 8192}}",
               true, 0, &config));
  ck_assert_int_eq(config.rope.kind, FLAP_ROPE_LLAMA3);
  ck_assert_double_eq(config.rope.theta, 5e5);
  ck_assert_double_eq(config.rope.factor, 8);
  ck_assert_uint_eq(config.rope.original_max_position, 8192);
  RIG_OK(parse("{" BASE ", \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 123.5, "
               "\"partial_rotary_factor\": 1}}",
               true, 0, &config));
  ck_assert_double_eq(config.rope.theta, 123.5);
  RIG_OK(parse("{" BASE ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}}", true, 0, &config));
  ck_assert_int_eq(config.rope.kind, FLAP_ROPE_LINEAR);
}
END_TEST

START_TEST(config_what_is_wrong_is_named) {
  static const struct {
    const char *text;
    flap_status status;
    const char *part, *more;
  } cases[] = {
      {"[]", FLAP_INVALID, "run.yaml: model: must hold an object", ""},
      {"{}", FLAP_INVALID, "model_type: this key is missing", "llama, mistral, qwen2"},
      {"{\"model_type\": 3}", FLAP_INVALID, "model_type: must be a string", ""},
      {"{\"model_type\": \"gpt2\"}", FLAP_UNSUPPORTED, "model_type: is gpt2", "llama, mistral, qwen2"},
      {"{\"model_type\": \"llama\"}", FLAP_INVALID, "vocab_size: this key is missing", ""},
      {"{" BASE ", \"head_dim\": \"8\"}", FLAP_INVALID, "head_dim: must be an integer, not a string", ""},
      {"{" BASE ", \"head_dim\": 0}", FLAP_INVALID, "head_dim: 0 is not within 1", ""},
      {"{" BASE ", \"head_dim\": 4294967296}", FLAP_INVALID, "head_dim: 4294967296 is not within", ""},
      {"{" BASE ", \"head_dim\": 1e300}", FLAP_INVALID, "head_dim: must be an integer", ""},
      {"{" BASE ", \"head_dim\": 7}", FLAP_INVALID, "run.yaml: model: head_dim is 7", "even"},
      {"{" BASE ", \"num_key_value_heads\": 3}", FLAP_INVALID, "num_key_value_heads is 3", "divide"},
      {"{" BASE ", \"rms_norm_eps\": []}", FLAP_INVALID, "rms_norm_eps: must be a number, not an array", ""},
      {"{" BASE ", \"tie_word_embeddings\": 1}", FLAP_INVALID, "tie_word_embeddings: must be true or false", ""},
      {"{" BASE ", \"hidden_act\": \"gelu\"}", FLAP_UNSUPPORTED, "hidden_act: is \"gelu\"", "only \"silu\""},
      {"{" BASE ", \"attention_dropout\": 0.1}", FLAP_UNSUPPORTED, "attention_dropout: is 0.1", "only 0.0"},
      {"{" BASE ", \"mlp_bias\": true}", FLAP_UNSUPPORTED, "mlp_bias: is true", "only false"},
      {"{" BASE ", \"quantization_config\": {\"a\": 1}}", FLAP_UNSUPPORTED, "quantization_config: is {\"a\":1}",
       "null"},
      {"{" BASE ", \"rope_scaling\": 2}", FLAP_INVALID, "rope_scaling: must be an object", ""},
      {"{" BASE ", \"rope_scaling\": {\"rope_type\": \"yarn\"}}", FLAP_UNSUPPORTED, "rope_scaling.rope_type: is yarn",
       "default, llama3 and linear"},
      {"{" BASE ", \"rope_scaling\": {\"rope_type\": \"linear\", \"type\": \"llama3\"}}", FLAP_INVALID,
       "rope_scaling.type: is llama3", "contradicts rope_type"},
      {"{" BASE ", \"rope_scaling\": {\"rope_type\": \"linear\", \"factr\": 2}}", FLAP_UNSUPPORTED,
       "rope_scaling.factr: unknown key", "did you mean factor?"},
      {"{" BASE ", \"rope_scaling\": {\"rope_type\": \"linear\"}}", FLAP_INVALID, "rope_scaling.factor is 0", ""},
      {"{" BASE ", \"rope_scaling\": {\"factor\": 2.0}}", FLAP_INVALID,
       "rope_scaling.factor: is of no effect without a rope_type", "linear or llama3"},
      {"{" BASE ", \"rope_parameters\": {\"rope_theta\": 5.0, \"low_freq_factor\": 1}}", FLAP_INVALID,
       "rope_parameters.low_freq_factor: is of no effect without a rope_type", "llama3"},
      {"{" BASE ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2, \"high_freq_factor\": 4}}", FLAP_INVALID,
       "rope_scaling.high_freq_factor: is not used by rope_type linear", "leave it out"},
      {"{" BASE ", \"rope_scaling\": {\"rope_type\": \"default\", \"factor\": 2}}", FLAP_INVALID,
       "rope_scaling.factor: is not used by rope_type default", "linear or llama3"},
      {"{" BASE ", \"rope_parameters\": {\"partial_rotary_factor\": 0.5}}", FLAP_UNSUPPORTED,
       "rope_parameters.partial_rotary_factor: is 0.5", "only 1.0"},
      {"{" BASE ", \"rope_scaling\": {\"rope_type\": \"llama3\", \"original_max_position_embeddings\": -1}}",
       FLAP_INVALID, "rope_scaling.original_max_position_embeddings: -1 is not within", ""},
      {"{" BASE ", \"num_hiden_layers\": 3}", FLAP_INVALID, "num_hiden_layers: unknown key",
       "did you mean num_hidden_layers?"},
      {"{" BASE ", \"zzzzzzzzzzzzzzzz\": 3}", FLAP_INVALID, "zzzzzzzzzzzzzzzz: unknown key", "llama model has none"},
  };
  flap_model_config config;
  const size_t i = (size_t)_i;
  if (i >= sizeof cases / sizeof *cases)
    return;
  RIG_REFUSED(parse(cases[i].text, true, 0, &config), cases[i].status, cases[i].part, cases[i].more);
  ck_assert(scratch_error_has("run.yaml: model"));
}
END_TEST

START_TEST(config_text_of_qwen2_is_what_transformers_wants) {
  flap_model_config config, again;
  char *text = NULL;
  json_t *root = NULL;
  RIG_OK(parse("{" QWEN2 ", \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"rope_theta\": 1e6, "
               "\"sliding_window\": 77}",
               true, 0, &config));
  RIG_OK(flap_hf_config_format(&config, FLAP_BF16, 2, -1, NULL, &text));
  RIG_OK(flap_json_load_text("text", text, strlen(text), &root));
  json_t *wanted = json_pack(
      "{s:[s], s:s, s:s, s:n, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b, s:f, s:n, s:s, s:f, s:b, "
      "s:b}",
      "architectures", "Qwen2ForCausalLM", "model_type", "qwen2", "torch_dtype", "bfloat16", "bos_token_id",
      "eos_token_id", 2, "vocab_size", 100, "hidden_size", 64, "intermediate_size", 64, "num_hidden_layers", 2,
      "num_attention_heads", 4, "num_key_value_heads", 2, "head_dim", 16, "max_position_embeddings", 32768,
      "rms_norm_eps", 1e-6, "initializer_range", 0.02, "tie_word_embeddings", 0, "rope_theta", 1e6, "rope_scaling",
      "hidden_act", "silu", "attention_dropout", 0.0, "use_sliding_window", 0, "use_cache", 1);
  ck_assert_ptr_nonnull(wanted);
  ck_assert_msg(json_equal(root, wanted), "%s", text);
  RIG_OK(parse(text, true, 0, &again));
  same_config(&again, &config);
  json_decref(root);
  json_decref(wanted);
  free(text);
}
END_TEST

START_TEST(config_of_mistral_in_a_folder_says_that_it_has_no_window) {
  static const char mistral[] = "\"model_type\": \"mistral\", \"vocab_size\": 9, \"hidden_size\": 32, "
                                "\"intermediate_size\": 64, \"num_hidden_layers\": 2";
  flap_model_config config;
  char text[512];
  (void)snprintf(text, sizeof text, "{%s, \"num_attention_heads\": 8}", mistral);
  scratch_text("config.json", text);
  RIG_REFUSED(flap_hf_config_read(scratch_path(""), &config), FLAP_UNSUPPORTED,
              "/config.json: sliding_window: is missing, which means 4096 to transformers", "set it to null");
  RIG_OK(parse(text, true, 0, &config)); /* run.yaml: there it means none */
  (void)snprintf(text, sizeof text, "{%s, \"num_attention_heads\": 8, \"sliding_window\": 4096}", mistral);
  scratch_text("config.json", text);
  RIG_REFUSED(flap_hf_config_read(scratch_path(""), &config), FLAP_UNSUPPORTED, "sliding_window: is 4096", "only null");
  (void)snprintf(text, sizeof text, "{%s, \"num_attention_heads\": 8, \"sliding_window\": null}", mistral);
  scratch_text("config.json", text);
  RIG_OK(flap_hf_config_read(scratch_path(""), &config));
  ck_assert_uint_eq(config.num_key_value_heads, 8);
  (void)snprintf(text, sizeof text, "{%s, \"num_attention_heads\": 4, \"sliding_window\": null}", mistral);
  scratch_text("config.json", text);
  RIG_REFUSED(flap_hf_config_read(scratch_path(""), &config), FLAP_INVALID,
              "num_key_value_heads is 8, which is also what mistral takes it to be when it is absent", "which is 4");
}
END_TEST

START_TEST(config_files_may_hold_keys_of_others) {
  flap_model_config config;
  RIG_REFUSED(flap_hf_config_read(scratch_path(""), &config), FLAP_NOT_FOUND, "is not a model folder", "config.json");
  scratch_text("config.json", "{" BASE ", \"num_hiden_layers\": 3, \"auto\": {}}");
  RIG_OK(flap_hf_config_read(scratch_path(""), &config));
  ck_assert_uint_eq(config.num_hidden_layers, 2);
  scratch_text("config.json", "{" BASE ", \"hidden_act\": \"gelu\"}");
  RIG_REFUSED(flap_hf_config_read(scratch_path(""), &config), FLAP_UNSUPPORTED, "/config.json: hidden_act", "gelu");
  scratch_text("config.json", "{" BASE);
  RIG_REFUSED(flap_hf_config_read(scratch_path(""), &config), FLAP_INVALID, "/config.json:1:", "");
}
END_TEST

START_TEST(config_text_is_what_transformers_wants) {
  flap_model_config config, again;
  char *text = NULL;
  json_t *root = NULL;
  RIG_OK(parse("{\"model_type\": \"mistral\", \"vocab_size\": 9, \"hidden_size\": 32, \"intermediate_size\": 64, "
               "\"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 4, "
               "\"tie_word_embeddings\": true, "
               "\"rms_norm_eps\": 1e-5, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, "
               "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}}",
               true, 0, &config));
  RIG_OK(flap_hf_config_format(&config, FLAP_F16, 2, -1, NULL, &text));
  ck_assert_msg(strstr(text, "\"rms_norm_eps\": 1e-5,") != NULL, "%s", text);
  RIG_OK(flap_json_load_text("text", text, strlen(text), &root));
  json_t *wanted =
      json_pack("{s:[s], s:s, s:s, s:n, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b, s:f, "
                "s:{s:s, s:f, s:f, s:f, s:i}, s:s, s:f, s:n, s:b}",
                "architectures", "MistralForCausalLM", "model_type", "mistral", "torch_dtype", "float16",
                "bos_token_id", "eos_token_id", 2, "vocab_size", 9, "hidden_size", 32, "intermediate_size", 64,
                "num_hidden_layers", 2, "num_attention_heads", 4, "num_key_value_heads", 4, "head_dim", 8,
                "max_position_embeddings", 131072, "rms_norm_eps", 1e-5, "initializer_range", 0.02,
                "tie_word_embeddings", 1, "rope_theta", 10000.0, "rope_scaling", "rope_type", "llama3", "factor", 8.0,
                "low_freq_factor", 1.0, "high_freq_factor", 4.0, "original_max_position_embeddings", 8192, "hidden_act",
                "silu", "attention_dropout", 0.0, "sliding_window", "use_cache", 1);
  ck_assert_ptr_nonnull(wanted);
  ck_assert_msg(json_equal(root, wanted), "%s", text);
  RIG_OK(parse(text, true, 0, &again));
  same_config(&again, &config);
  json_decref(root);
  json_decref(wanted);
  free(text);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("hf_config");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_loop_test(tests, config_golden_files_are_read_and_written_back, 0, GOLDEN_COUNT);
  tcase_add_test(tests, config_fallbacks_are_those_of_transformers);
  tcase_add_test(tests, config_of_qwen2_has_its_own_fallbacks_and_biases);
  tcase_add_test(tests, config_of_qwen2_refuses_what_it_cannot_compute);
  tcase_add_test(tests, config_text_of_qwen2_is_what_transformers_wants);
  tcase_add_test(tests, config_vocabulary_may_come_from_the_tokenizer);
  tcase_add_test(tests, config_rope_mappings_of_both_kinds);
  tcase_add_loop_test(tests, config_what_is_wrong_is_named, 0, 40);
  tcase_add_test(tests, config_of_mistral_in_a_folder_says_that_it_has_no_window);
  tcase_add_test(tests, config_files_may_hold_keys_of_others);
  tcase_add_test(tests, config_text_is_what_transformers_wants);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
