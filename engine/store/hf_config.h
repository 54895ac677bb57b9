/* Hugging Face config.json to and from a model configuration, by the table of keys that each family gives. */
#ifndef FLAP_ENGINE_STORE_HF_CONFIG_H
#define FLAP_ENGINE_STORE_HF_CONFIG_H

#include "model/model.h"

struct json_t;

#ifdef __cplusplus
extern "C" {
#endif

/* `source` names the origin in messages ("run.yaml: model", "/models/x/config.json"). `model_type` picks the family;
 * its keys are read in the table's order, then the family derives and checks the rest. With `strict`, a key that the
 * family does not know is refused with the nearest one it knows (inline models); otherwise it is passed over
 * (config.json files hold many). vocab_size may be absent when fallback_vocabulary > 0 (the tokenizer's). FLAP_INVALID
 * and FLAP_UNSUPPORTED name source and key. */
FLAP_CHECKED flap_status flap_hf_config_parse(const struct json_t *object, const char *source, bool strict,
                                              uint32_t fallback_vocabulary, flap_model_config *config_out);
/* `folder`/config.json, not strict. */
FLAP_CHECKED flap_status flap_hf_config_read(const char *folder, flap_model_config *config_out);

/* Tokens by which texts end and begin, and that fill up, as a config.json has them: an id, or of `eos` a list of some.
 * NULL: none. */
typedef struct flap_hf_ids {
  struct json_t *eos, *bos, *pad;
} flap_hf_ids;

/* Of `folder`/config.json; what is something else counts as none. To be closed even after a failure. */
FLAP_CHECKED flap_status flap_hf_config_read_ids(const char *folder, flap_hf_ids *ids_out);
void flap_hf_ids_close(flap_hf_ids *ids); /* {0} is fine */

/* The text of a config.json that transformers loads; the caller frees it with free(). `dtype` becomes torch_dtype. Ids
 * are those of `kept` (NULL: none), and where it has none eos_token_id and bos_token_id. One below 0 becomes null: left
 * out, transformers would put a default of its own there. */
FLAP_CHECKED flap_status flap_hf_config_format(const flap_model_config *config, flap_dtype dtype, int64_t eos_token_id,
                                               int64_t bos_token_id, const flap_hf_ids *kept, char **text_out);

/* Writes "rms_norm_eps: 1e-6 then, 0.1 now; ..." for what two models compute differently by their configuration: "" if
 * nothing. What only limits how long sequences may be, or how weights begin, does not count. A text that does not fit
 * is cut. Stores how many keys differ. FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_hf_config_differences(const flap_model_config *then, const flap_model_config *now,
                                                    char *text_out, size_t text_bytes, uint32_t *count_out);

#ifdef __cplusplus
}
#endif
#endif
