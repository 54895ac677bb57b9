/* What a model family provides. Private to model/.
 *
 * A family fills a flap_family and is listed in family.c. The functions have the contracts of their
 * namesakes in model.h; what can be derived from them (sums, totals) is derived in family.c.
 */
#ifndef FLAP_MODEL_FAMILY_INTERNAL_H
#define FLAP_MODEL_FAMILY_INTERNAL_H

#include "model/model.h"

/* Device memory blocks start at multiples of this many bytes, and sizes of whole blocks are multiples of the other. */
#define FLAP_MODEL_ALIGN 256u
#define FLAP_MODEL_PAGE 4096u

struct flap_family {
  const char *name; /* the `model_type` */
  const char *architecture;

  const flap_model_key *(*keys)(uint32_t *count_out);
  flap_status (*finish_config)(flap_model_config *config);
  /* Names, shapes, initial values and decay; family.c fills in `elements` and `offset`. */
  uint32_t (*tensors)(const flap_model_config *config, flap_part part, uint32_t layer, flap_model_tensor *tensors_out);
  /* The index of the output projection among the head's tensors; unused when it is tied. */
  uint32_t head_projection_index;
  /* Names, bytes and recompute costs; family.c fills in `offset`. */
  uint32_t (*saved_tensors)(const flap_model_config *config, const flap_model_shape *shape,
                            flap_saved_tensor *tensors_out);
  const flap_saved_set *saved_sets;
  uint32_t saved_set_count;
  uint64_t (*workspace_bytes)(const flap_model_config *config, const flap_model_shape *shape);
  double (*forward_flops)(const flap_model_config *config, const flap_model_shape *shape, flap_part part);

  void (*embed)(const flap_model_run *run, const void *embedding, const int32_t *tokens, void *x);
  void (*embed_backward)(const flap_model_run *run, const int32_t *tokens, const int32_t *order, const void *dx,
                         float *dembedding);
  void (*layer_forward)(const flap_model_run *run, const void *weights, const void *x_in, const flap_model_saved *saved,
                        void *x_out);
  void (*layer_recompute)(const flap_model_run *run, const void *weights, const void *x_in,
                          const flap_model_saved *saved);
  void (*layer_backward)(const flap_model_run *run, const void *weights, const void *x_in,
                         const flap_model_saved *saved, void *dx, const flap_model_gradient *dweights);
  void (*head_loss)(const flap_model_run *run, const void *head, const void *projection, const void *x_in,
                    const int32_t *targets, float loss_scale, float *losses, void *dx, float *dhead, float *dprojection,
                    bool accumulate);
  void (*layer_decode)(const flap_model_run *run, const void *weights, void *x, void *scratch, void *cache,
                       uint32_t cache_positions, uint32_t tokens, uint32_t first_position);
  void (*logits)(const flap_model_run *run, const void *head, const void *projection, const void *x, uint32_t row,
                 float *logits);
};

extern const flap_family flap_model_llama;
extern const flap_family flap_model_mistral; /* without its sliding window, Llama under another name */
extern const flap_family flap_model_qwen2;   /* Llama with biases on q, k and v */

/* Bytes from the start of a layer's KV cache to its values; the keys come first. */
uint64_t flap_model_cache_values(const flap_model_config *config, flap_dtype dtype, uint32_t positions);

/* FLAP_INVALID unless 1 <= value <= max; `key` is the config.json key. */
FLAP_CHECKED flap_status flap_model_check_count(const char *key, uint32_t value, uint32_t max);
/* FLAP_INVALID unless low < value < high and finite. */
FLAP_CHECKED flap_status flap_model_check_number(const char *key, double value, double low, double high);

#endif
