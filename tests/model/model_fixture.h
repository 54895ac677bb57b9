/* A whole model on a device, for tests: weights, gradients, activations and scratch in the arena, each with guard bytes
 * after it. On the cpu device the arena is host memory, so tests read and write it directly; on sim nothing is touched.
 */
#ifndef FLAP_TESTS_MODEL_FIXTURE_H
#define FLAP_TESTS_MODEL_FIXTURE_H

#include "base/clock.h"
#include "base/pool.h"
#include "io/formats/safetensors.h"
#include "model/model.h"

#define FIXTURE_LAYERS_MAX 4u
#define FIXTURE_BLOCKS_MAX 64u

typedef struct model_fixture {
  flap_model_config config;
  flap_model_shape shape;
  flap_pool *pool;
  flap_clock *clock;
  flap_device *device;
  flap_ops *ops;
  flap_model_run run;
  char *arena;
  uint64_t arena_bytes, used;
  struct {
    const char *name;
    char *guard;
  } blocks[FIXTURE_BLOCKS_MAX];
  uint32_t block_count;

  void *weights[FLAP_PART_COUNT][FIXTURE_LAYERS_MAX];
  float *gradients[FLAP_PART_COUNT][FIXTURE_LAYERS_MAX];
  void *x[FIXTURE_LAYERS_MAX + 1];            /* the input of each layer, and of the head */
  flap_model_saved saved[FIXTURE_LAYERS_MAX]; /* every layer has its own scratch */
  void *cache[FIXTURE_LAYERS_MAX];
  uint32_t cache_positions;
  void *dx;
  float *losses, *logits;
  int32_t *tokens, *targets, *order;
  bool fresh; /* fixture_backward writes sums instead of adding to them */
  bool final; /* and those of layers in bf16 */
} model_fixture;

/* Fills the table's fields from the config.json of a folder, as the family's keys say, and finishes the configuration.
 */
void fixture_read_config(const char *folder, flap_model_config *config_out);

void fixture_open(model_fixture *fixture, flap_device_kind kind, uint32_t threads, const flap_model_config *config,
                  const flap_model_shape *shape);
/* The same, but of the saved tensors only those of the mask are kept. */
void fixture_open_saving(model_fixture *fixture, flap_device_kind kind, uint32_t threads,
                         const flap_model_config *config, const flap_model_shape *shape, uint32_t saved_mask);
void fixture_close(model_fixture *fixture);

/* "" when no guard was touched, else the name of the block that somebody wrote past. */
const char *fixture_overrun(const model_fixture *fixture);

/* Weights from fp32 tensors of a file, rounded to the fixture's dtype; gaps become zero. */
void fixture_load_weights(model_fixture *fixture, const flap_safetensors *reader);
/* Normal weights of a fixed seed, norms around one. */
void fixture_random_weights(model_fixture *fixture, uint64_t seed);
/* T tokens and targets; `order` follows. */
void fixture_set_batch(model_fixture *fixture, const int32_t *tokens, const int32_t *targets);
void fixture_random_batch(model_fixture *fixture, uint64_t seed);
void fixture_zero_gradients(model_fixture *fixture);

/* Embedding and layers. */
void fixture_forward(model_fixture *fixture);
/* After fixture_forward: head, layers and embedding; gradients add up. Returns the sum of the losses. */
double fixture_backward(model_fixture *fixture, float loss_scale);
void *fixture_projection(const model_fixture *fixture);
float *fixture_projection_gradient(const model_fixture *fixture);

/* A tensor's values as fp32, from weights (`dtype` of the shape) or gradients. `part_layer` as in flap_model_tensors.
 */
float fixture_value(const model_fixture *fixture, const void *values, uint64_t index);

/* Reads a whole tensor that must be there with this dtype; the caller frees it. */
void *fixture_read_tensor(const flap_safetensors *reader, const char *name, flap_safetensors_dtype dtype,
                          uint64_t *elements_out);

/* |a - b| over |b|, as vectors. */
double fixture_relative_error(const float *a, const float *b, uint64_t elements);

#endif
