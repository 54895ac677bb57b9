/* Model families: what tensors a model has, and its forward and backward over resolved pointers.
 *
 * Role: the math of an architecture, as calls of kernels/ops.h on device pointers that the caller resolved. It knows no
 * pages, disks, files or schedules, and holds no state. A family fills a flap_family table.
 *
 * A model is a chain of parts: the embedding, `layers` equal layers, and the head (final norm, and the output
 * projection unless tied). A part's weights are one contiguous run of memory; each of its tensors starts at a
 * multiple of FLAP_OPS_BLOCK elements, and the gap up to the next one is zero and stays zero. The gradient sums
 * of a part have the same layout in fp32; a layer's, where nothing is added to them, may be in bf16.
 *
 * Shapes: T = B·S tokens of a micro-batch, D hidden, F intermediate, V vocabulary. Device pointers are never
 * dereferenced here, so everything also runs on the sim device.
 */
#ifndef FLAP_MODEL_MODEL_H
#define FLAP_MODEL_MODEL_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_family flap_family; /* private to model/ */

/* Names as in a Hugging Face config.json. */
typedef struct flap_model_config {
  const flap_family *family;
  uint32_t vocab_size, hidden_size, intermediate_size, num_hidden_layers;
  uint32_t num_attention_heads, num_key_value_heads, head_dim, max_position_embeddings;
  double rms_norm_eps, initializer_range;
  bool tie_word_embeddings;
  bool attention_bias; /* q, k and v have biases: a key of some families, in others the same for every model */
  bool output_bias;    /* o has one; flap_model_finish_config sets it */
  flap_rope rope;      /* rope_theta and rope_scaling */
} flap_model_config;

/* ---- configuration --------------------------------------------------------------------------------------- */

typedef enum flap_key_kind {
  FLAP_KEY_COUNT,   /* a positive integer, uint32_t */
  FLAP_KEY_NUMBER,  /* double */
  FLAP_KEY_BOOL,    /* bool */
  FLAP_KEY_ROPE,    /* the `rope_scaling` or `rope_parameters` mapping or null, into flap_rope: see below */
  FLAP_KEY_MUST_BE, /* a value that must equal `must_be` (JSON text, as in "\"silu\"", "0.0", "null") or be absent */
  FLAP_KEY_ALL_MUST_BE, /* a list, each element of which must equal `must_be`, or absent */
  FLAP_KEY_IGNORED      /* allowed, without effect on training */
} flap_key_kind;

/* One config.json key that a family reads; the reader of JSON lives elsewhere and fills the struct by this table, in
 * its order. A null counts as absent. A FLAP_KEY_ROPE mapping may hold `rope_type` (or `type`: "default", "llama3",
 * "linear"), `rope_theta`, `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`; it
 * sets the fields that it holds, leaves the others as they are, and anything else in it is an error, as are keys that
 * its type does not use. Absent, it changes nothing. */
typedef struct flap_model_key {
  const char *name;
  flap_key_kind kind;
  size_t offset; /* of the field in flap_model_config */
  bool required;
  double fallback; /* for absent keys that are not required; NAN: stored as NAN (a count as 0), and
                      flap_model_finish_config derives it. Of FLAP_KEY_MUST_BE: what the key is taken to be by
                      transformers, if that is something else, so that a config.json has to have it; 0: the same */
  const char *must_be;
} flap_model_key;

/* The family of a config.json's `model_type` ("llama", "qwen2"...); NULL if there is none. */
const flap_family *flap_model_find_family(const char *model_type);
/* "llama, ..." for messages. */
const char *flap_model_families(void);
const char *flap_model_family_name(const flap_family *family);
/* The `architectures` entry for export: "LlamaForCausalLM". */
const char *flap_model_architecture(const flap_family *family);
const flap_model_key *flap_model_keys(const flap_family *family, uint32_t *count_out);

/* Derives what was absent (num_key_value_heads, head_dim), says which projections have biases, and checks that
 * everything fits together: FLAP_INVALID names the key, its value and what it must be. */
FLAP_CHECKED flap_status flap_model_finish_config(flap_model_config *config);

/* ---- tensors --------------------------------------------------------------------------------------------- */

typedef enum flap_part { FLAP_PART_EMBEDDING, FLAP_PART_LAYER, FLAP_PART_HEAD, FLAP_PART_COUNT } flap_part;
typedef enum flap_init { FLAP_INIT_NORMAL, FLAP_INIT_ONES, FLAP_INIT_ZEROS } flap_init;

#define FLAP_MODEL_NAME_MAX 96
#define FLAP_MODEL_TENSORS_MAX 16 /* of one part */

typedef struct flap_model_tensor {
  char name[FLAP_MODEL_NAME_MAX]; /* Hugging Face's: "model.layers.3.self_attn.q_proj.weight" */
  uint32_t rank;
  uint64_t shape[2];
  uint64_t elements;
  uint64_t offset; /* elements from the start of the part; a multiple of FLAP_OPS_BLOCK */
  flap_init init;  /* normal: mean 0, deviation initializer_range */
  bool decays;     /* weight decay applies: not to norms and biases, as in Hugging Face's Trainer */
} flap_model_tensor;

/* The tensors of a part; `layer` matters for FLAP_PART_LAYER only. Returns the count; fills up to
 * FLAP_MODEL_TENSORS_MAX entries unless `tensors_out` is NULL. */
uint32_t flap_model_tensors(const flap_model_config *config, flap_part part, uint32_t layer,
                            flap_model_tensor *tensors_out);
/* Elements of the part's weights, gaps included: a multiple of FLAP_OPS_BLOCK. */
uint64_t flap_model_part_elements(const flap_model_config *config, flap_part part);
/* Trainable parameters, gaps not included. */
uint64_t flap_model_parameters(const flap_model_config *config);

/* ---- sizes and costs ------------------------------------------------------------------------------------- */

/* The shape of one micro-batch. */
typedef struct flap_model_shape {
  flap_dtype dtype; /* storage of weights and activations */
  uint32_t batch, sequence;
} flap_model_shape;

/* Hidden states (T, D): what passes between parts. */
uint64_t flap_model_hidden_bytes(const flap_model_config *config, const flap_model_shape *shape);

/* A tensor that a layer's forward can leave for its backward, or that can be computed again before it. */
typedef struct flap_saved_tensor {
  const char *name;
  uint64_t offset, bytes; /* in its block, see flap_model_saved; offsets are multiples of 256 */
  double recompute_flops; /* where it is not kept, whatever else is */
  bool spare;             /* where it is not kept it is nowhere: the backward makes it in passing */
} flap_saved_tensor;
#define FLAP_MODEL_SAVED_MAX 16
#define FLAP_MODEL_SAVED_ALL UINT32_MAX

/* Which of a layer's saved tensors are kept from its forward to its backward, and where they are. Those of `mask` (bit
 * i: tensor i) are side by side in one block, the others but spare ones in another, which needs to hold them no longer
 * than a call, or than from a recompute to the backward after it. Neither has the layer's input. */
typedef struct flap_model_saved {
  void *kept;    /* flap_model_saved_bytes(mask); unused with mask 0 */
  void *scratch; /* flap_model_scratch_bytes(mask); unused where that is 0 */
  uint32_t mask;
} flap_model_saved;
/* Returns the count; offsets are those in the block that a tensor is in with this mask. */
uint32_t flap_model_saved_tensors(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask,
                                  flap_saved_tensor *tensors_out);
/* A block of the tensors of `mask`, a multiple of 4096; 0 for none. */
uint64_t flap_model_saved_bytes(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask);
/* The other block, of what `mask` does not keep. */
uint64_t flap_model_scratch_bytes(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask);

/* Masks that are worth choosing from: not empty, in order of size. The last but one, "all", leaves nothing to compute
 * again; the last one, FLAP_MODEL_SAVED_ALL, has the spare tensors too, which saves the backward writing them. */
typedef struct flap_saved_set {
  const char *name; /* "all" */
  uint32_t mask;
} flap_saved_set;
const flap_saved_set *flap_model_saved_sets(const flap_model_config *config, uint32_t *count_out);

/* Scratch in device memory that the functions below need, a multiple of 4096. */
uint64_t flap_model_workspace_bytes(const flap_model_config *config, const flap_model_shape *shape);
/* The KV cache of one layer for so many positions (keys, then values), a multiple of 4096. */
uint64_t flap_model_cache_bytes(const flap_model_config *config, flap_dtype dtype, uint32_t positions);
/* Bytes of the rope table for so many positions: (positions, head_dim) fp32. */
uint64_t flap_model_rope_bytes(const flap_model_config *config, uint32_t positions);

/* Floating-point operations of one micro-batch: matmuls and causal attention (half of S×S). */
double flap_model_forward_flops(const flap_model_config *config, const flap_model_shape *shape, flap_part part);
/* Of flap_model_layer_recompute. */
double flap_model_recompute_flops(const flap_model_config *config, const flap_model_shape *shape, uint32_t mask);
/* Bounds for kernels/ops.h. */
void flap_model_ops_limits(const flap_model_config *config, const flap_model_shape *shape, uint32_t threads,
                           flap_ops_limits *limits_out);

/* ---- forward and backward -------------------------------------------------------------------------------- */

/* What every call needs; pointers are device memory. */
typedef struct flap_model_run {
  const flap_model_config *config;
  flap_model_shape shape;
  flap_ops *ops;
  const float *rope_table; /* of at least shape.sequence (or the cache's) positions */
  void *workspace;
} flap_model_run;

/* x (T, D) = rows of the embedding. */
void flap_model_embed(const flap_model_run *run, const void *embedding, const int32_t *tokens, void *x);

/* One layer: x_out (T, D) from x_in (T, D); both blocks of `saved` receive their tensors. x_out must not
 * be x_in, and overlaps nothing else: it is scratch until it is the result. */
void flap_model_layer_forward(const flap_model_run *run, const void *weights, const void *x_in,
                              const flap_model_saved *saved, void *x_out);

/* The tensors that are not kept, once more, into scratch: the same bits as the forward left there. What is kept is read
 * and not written; nothing is computed that they do not need, and so not the layer's output. */
void flap_model_layer_recompute(const flap_model_run *run, const void *weights, const void *x_in,
                                const flap_model_saved *saved);

/* The gradient of a part's weights, in the part's layout. Fp32 sums += with `accumulate`; without it they are written,
 * gaps included, whatever they were. Or bf16 with bf16 weights, where nothing is added: written likewise, each rounded
 * once. */
typedef struct flap_model_gradient {
  void *sums;
  flap_dtype dtype;
  bool accumulate;
} flap_model_gradient;

/* dx (T, D): in, the gradient of the layer's output; out, of its input. Both blocks of `saved` hold their tensors, and
 * are used up: parts of them are overwritten with gradients, so they serve one backward. */
void flap_model_layer_backward(const flap_model_run *run, const void *weights, const void *x_in,
                               const flap_model_saved *saved, void *dx, const flap_model_gradient *dweights);

/* Final norm, logits, loss, and back: losses (T) fp32; dx (T, D) = gradient of x_in; dhead (the part's layout) and
 * dprojection fp32, += or written as above: where the projection is tied, gaps of the embedding's part included.
 * `projection` is the (V, D) output matrix: flap_model_head_projection says where it is. dx NULL: losses only. */
void flap_model_head_loss(const flap_model_run *run, const void *head, const void *projection, const void *x_in,
                          const int32_t *targets, float loss_scale, float *losses, void *dx, float *dhead,
                          float *dprojection, bool accumulate);
/* Elements from the start of the head part (untied) or of the embedding part (tied). */
uint64_t flap_model_head_projection(const flap_model_config *config);

/* dembedding (V, D) fp32 +=; `order` as flap_ops_embedding_backward wants it. */
void flap_model_embed_backward(const flap_model_run *run, const int32_t *tokens, const int32_t *order, const void *dx,
                               float *dembedding);

/* ---- sampling -------------------------------------------------------------------------------------------- */

/* x (tokens, D) in place, for new tokens at first_position..; their keys and values are written to `cache` (laid out
 * for cache_positions) first. tokens <= T of the shape. `scratch` has flap_model_scratch_bytes(0). */
void flap_model_layer_decode(const flap_model_run *run, const void *weights, void *x, void *scratch, void *cache,
                             uint32_t cache_positions, uint32_t tokens, uint32_t first_position);
/* logits (V) fp32 of row `row` of x (·, D); leaves x as it is. */
void flap_model_logits(const flap_model_run *run, const void *head, const void *projection, const void *x, uint32_t row,
                       float *logits);

#ifdef __cplusplus
}
#endif
#endif
