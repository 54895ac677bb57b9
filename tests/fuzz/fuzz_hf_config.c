/* config.json of a folder; and the same keys as an inline model, where unknown ones are refused. */
#include "engine/store/checkpoint.h"
#include "engine/store/hf_config.h"
#include "io/formats/json_file.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdlib.h>
#include <string.h>

/* What is written reads back the same. */
static void check_round_trip(const flap_model_config *config) {
  char *text = NULL;
  json_t *root = NULL;
  flap_model_config again;
  fuzz_must(flap_hf_config_format(config, FLAP_BF16, 2, 1, NULL, &text) == FLAP_OK, "it can be written");
  fuzz_must(flap_json_load_text("written", text, strlen(text), &root) == FLAP_OK, "what was written is JSON");
  fuzz_must(flap_hf_config_parse(root, "written", true, 0, &again) == FLAP_OK, "what was written is read");
  fuzz_must(again.family == config->family && again.vocab_size == config->vocab_size &&
                again.hidden_size == config->hidden_size && again.intermediate_size == config->intermediate_size &&
                again.num_hidden_layers == config->num_hidden_layers &&
                again.num_attention_heads == config->num_attention_heads &&
                again.num_key_value_heads == config->num_key_value_heads && again.head_dim == config->head_dim &&
                again.max_position_embeddings == config->max_position_embeddings &&
                again.rms_norm_eps == config->rms_norm_eps && again.initializer_range == config->initializer_range &&
                again.tie_word_embeddings == config->tie_word_embeddings &&
                again.attention_bias == config->attention_bias && again.output_bias == config->output_bias &&
                again.rope.kind == config->rope.kind && again.rope.theta == config->rope.theta,
            "what was written reads back the same");
  json_decref(root);
  free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  flap_model_config config, inline_config;
  json_t *root = NULL;
  fuzz_write("config.json", data, bytes);
  flap_status status = flap_hf_config_read(fuzz_path(""), &config);
  if (status != FLAP_OK)
    fuzz_refused(status, "config.json");
  else
    check_round_trip(&config);
  if (flap_json_load_text("run.yaml: model", (const char *)data, bytes, &root) != FLAP_OK)
    return 0;
  flap_status strict = flap_hf_config_parse(root, "run.yaml: model", true, 300, &inline_config);
  if (strict != FLAP_OK)
    fuzz_refused(strict, "run.yaml: model");
  fuzz_must(strict != FLAP_OK || status == FLAP_OK || json_object_get(root, "vocab_size") == NULL ||
                json_is_null(json_object_get(root, "vocab_size")),
            "what is good inline is good in a folder");
  uint64_t file_bytes = 0;
  if (status == FLAP_OK && config.num_hidden_layers <= 64)
    fuzz_must(flap_checkpoint_bytes(&config, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT, false, &file_bytes) != FLAP_OK ||
                  file_bytes > 0,
              "a checkpoint has a size");
  json_decref(root);
  return 0;
}
