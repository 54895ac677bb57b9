#include "tests/model/model_fixture.h"

#include "base/philox.h"
#include "base/units.h"
#include "io/formats/json_file.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUARD_BYTES 512u
#define GUARD 0xa5
#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())

/* ---- configuration --------------------------------------------------------------------------------------- */

static void read_rope(const json_t *mapping, flap_rope *rope) {
  const char *key;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)mapping, key, value) {
    double number = json_number_value(value);
    if (strcmp(key, "rope_type") == 0) {
      const char *type = json_string_value(value);
      rope->kind = strcmp(type, "llama3") == 0   ? FLAP_ROPE_LLAMA3
                   : strcmp(type, "linear") == 0 ? FLAP_ROPE_LINEAR
                                                 : FLAP_ROPE_DEFAULT;
    } else if (strcmp(key, "rope_theta") == 0) {
      rope->theta = number;
    } else if (strcmp(key, "factor") == 0) {
      rope->factor = number;
    } else if (strcmp(key, "low_freq_factor") == 0) {
      rope->low_freq_factor = number;
    } else if (strcmp(key, "high_freq_factor") == 0) {
      rope->high_freq_factor = number;
    } else if (strcmp(key, "original_max_position_embeddings") == 0) {
      rope->original_max_position = (uint32_t)number;
    } else {
      ck_abort_msg("unknown key in a rope mapping: %s", key);
    }
  }
}

static void read_key(const flap_model_key *key, const json_t *value, flap_model_config *config) {
  void *field = (char *)config + key->offset;
  bool absent = !value || json_is_null(value);
  ck_assert_msg(!absent || !key->required, "%s is missing", key->name);
  switch (key->kind) {
  case FLAP_KEY_COUNT:
    *(uint32_t *)field = !absent                ? (uint32_t)json_integer_value(value)
                         : isnan(key->fallback) ? 0
                                                : (uint32_t)key->fallback;
    break;
  case FLAP_KEY_NUMBER:
    *(double *)field = absent ? key->fallback : json_number_value(value);
    break;
  case FLAP_KEY_BOOL:
    *(bool *)field = absent ? key->fallback != 0 : json_is_true(value);
    break;
  case FLAP_KEY_ROPE:
    if (!absent)
      read_rope(value, field);
    break;
  case FLAP_KEY_MUST_BE:
  case FLAP_KEY_ALL_MUST_BE:
  case FLAP_KEY_IGNORED:
    break;
  }
}

void fixture_read_config(const char *folder, flap_model_config *config_out) {
  char path[512];
  snprintf(path, sizeof path, "%s/config.json", folder);
  json_t *root = NULL;
  MUST(flap_json_load_file(path, FLAP_JSON_BYTES_MAX, &root));

  memset(config_out, 0, sizeof *config_out);
  config_out->family = flap_model_find_family(json_string_value(json_object_get(root, "model_type")));
  ck_assert_ptr_nonnull(config_out->family);
  uint32_t count;
  const flap_model_key *keys = flap_model_keys(config_out->family, &count);
  for (uint32_t i = 0; i < count; i++)
    read_key(&keys[i], json_object_get(root, keys[i].name), config_out);

  /* The other way round: everything that transformers writes is in the table. */
  const char *name;
  json_t *value;
  json_object_foreach(root, name, value) {
    uint32_t i = 0;
    while (i < count && strcmp(keys[i].name, name) != 0)
      i++;
    ck_assert_msg(i < count, "%s: %s is not in the table of keys", path, name);
  }
  json_decref(root);
  MUST(flap_model_finish_config(config_out));
}

/* ---- memory ---------------------------------------------------------------------------------------------- */

/* The next block of the arena. While `arena` is NULL this only measures. */
static void *take(model_fixture *fixture, const char *name, uint64_t bytes) {
  uint64_t start = flap_units_round_up(fixture->used, 4096);
  fixture->used = start + bytes + GUARD_BYTES;
  if (!fixture->arena)
    return NULL;
  ck_assert_uint_le(fixture->used, fixture->arena_bytes);
  ck_assert_uint_lt(fixture->block_count, FIXTURE_BLOCKS_MAX);
  char *block = fixture->arena + start;
  fixture->blocks[fixture->block_count].name = name;
  fixture->blocks[fixture->block_count++].guard = block + bytes;
  if (flap_device_has_bytes(fixture->device)) {
    memset(block, 0xff, bytes); /* NaN, so that reading what nobody wrote shows */
    memset(block + bytes, GUARD, GUARD_BYTES);
  }
  return block;
}

static void take_all(model_fixture *fixture, uint32_t saved_mask, uint64_t ops_bytes, void **ops_workspace_out) {
  const flap_model_config *config = &fixture->config;
  const flap_model_shape *shape = &fixture->shape;
  uint64_t tokens = (uint64_t)shape->batch * shape->sequence;
  uint64_t element = flap_dtype_bytes(shape->dtype);
  uint32_t layers = config->num_hidden_layers;
  *ops_workspace_out = take(fixture, "ops workspace", ops_bytes);
  for (int part = 0; part < FLAP_PART_COUNT; part++) {
    uint64_t elements = flap_model_part_elements(config, (flap_part)part);
    for (uint32_t i = 0; i < (part == FLAP_PART_LAYER ? layers : 1); i++) {
      fixture->weights[part][i] = take(fixture, "weights", elements * element);
      fixture->gradients[part][i] = take(fixture, "gradients", elements * sizeof(float));
    }
  }
  for (uint32_t i = 0; i <= layers; i++)
    fixture->x[i] = take(fixture, "hidden state", flap_model_hidden_bytes(config, shape));
  fixture->cache_positions = shape->sequence + 3;
  for (uint32_t i = 0; i < layers; i++) {
    fixture->saved[i].mask = saved_mask;
    fixture->saved[i].kept = take(fixture, "kept tensors", flap_model_saved_bytes(config, shape, saved_mask));
    fixture->saved[i].scratch = take(fixture, "other tensors", flap_model_scratch_bytes(config, shape, saved_mask));
    fixture->cache[i] = take(fixture, "cache", flap_model_cache_bytes(config, shape->dtype, fixture->cache_positions));
  }
  fixture->dx = take(fixture, "dx", flap_model_hidden_bytes(config, shape));
  fixture->losses = take(fixture, "losses", tokens * sizeof(float));
  fixture->logits = take(fixture, "logits", config->vocab_size * sizeof(float));
  fixture->tokens = take(fixture, "tokens", tokens * sizeof(int32_t));
  fixture->targets = take(fixture, "targets", tokens * sizeof(int32_t));
  fixture->order = take(fixture, "order", tokens * sizeof(int32_t));
  fixture->run.rope_table = take(fixture, "rope", flap_model_rope_bytes(config, fixture->cache_positions));
  fixture->run.workspace = take(fixture, "workspace", flap_model_workspace_bytes(config, shape));
}

/* An operation takes a nanosecond, a launch one more, and nothing else takes time. */
static flap_machine flop_counter(void) {
  return (flap_machine){.name = "one flop per ns",
                        .flops_bf16 = 1e9,
                        .flops_f32 = 1e9,
                        .device_bytes = 1e18,
                        .h2d_bytes = 1e18,
                        .d2h_bytes = 1e18,
                        .disk_read_bytes = 1e18,
                        .disk_write_bytes = 1e18,
                        .host_bytes = 1e18,
                        .launch_ns = 1};
}

void fixture_open(model_fixture *fixture, flap_device_kind kind, uint32_t threads, const flap_model_config *config,
                  const flap_model_shape *shape) {
  fixture_open_saving(fixture, kind, threads, config, shape, FLAP_MODEL_SAVED_ALL);
}

void fixture_open_saving(model_fixture *fixture, flap_device_kind kind, uint32_t threads,
                         const flap_model_config *config, const flap_model_shape *shape, uint32_t saved_mask) {
  *fixture = (model_fixture){.config = *config, .shape = *shape};
  ck_assert_uint_le(config->num_hidden_layers, FIXTURE_LAYERS_MAX);
  flap_ops_limits limits;
  flap_model_ops_limits(config, shape, threads, &limits);
  limits.cache_tokens_max = shape->sequence + 3;
  uint64_t ops_bytes = flap_ops_workspace_bytes(kind, &limits);

  void *ops_workspace;
  take_all(fixture, saved_mask, ops_bytes, &ops_workspace);
  MUST(flap_pool_open(threads, &fixture->pool));
  MUST(flap_clock_open(&fixture->clock));
  flap_device_config device_config = {.kind = kind,
                                      .vram_bytes = flap_units_round_up(fixture->used, 4096),
                                      .events_max = 4,
                                      .pool = fixture->pool,
                                      .clock = fixture->clock,
                                      .machine = flop_counter()};
  MUST(flap_device_open(&device_config, &fixture->device));
  fixture->arena = flap_device_arena(fixture->device, &fixture->arena_bytes);
  fixture->used = 0;
  take_all(fixture, saved_mask, ops_bytes, &ops_workspace);
  MUST(flap_ops_open(fixture->device, &limits, ops_workspace, &fixture->ops));

  fixture->run.config = &fixture->config;
  fixture->run.shape = *shape;
  fixture->run.ops = fixture->ops;
  if (flap_device_has_bytes(fixture->device))
    flap_ops_rope_table(&config->rope, fixture->cache_positions, config->head_dim,
                        (float *)(uintptr_t)fixture->run.rope_table);
}

void fixture_close(model_fixture *fixture) {
  flap_ops_close(fixture->ops);
  flap_device_close(fixture->device);
  flap_clock_close(fixture->clock);
  flap_pool_close(fixture->pool);
}

const char *fixture_overrun(const model_fixture *fixture) {
  for (uint32_t i = 0; i < fixture->block_count; i++)
    for (uint32_t j = 0; j < GUARD_BYTES; j++)
      if ((unsigned char)fixture->blocks[i].guard[j] != GUARD)
        return fixture->blocks[i].name;
  return "";
}

/* ---- contents -------------------------------------------------------------------------------------------- */

static void store(const model_fixture *fixture, void *values, uint64_t index, float value) {
  if (fixture->shape.dtype == FLAP_BF16)
    ((uint16_t *)values)[index] = flap_f32_to_bf16(value);
  else
    ((float *)values)[index] = value;
}

float fixture_value(const model_fixture *fixture, const void *values, uint64_t index) {
  if (fixture->shape.dtype == FLAP_BF16)
    return flap_bf16_to_f32(((const uint16_t *)values)[index]);
  return ((const float *)values)[index];
}

void *fixture_read_tensor(const flap_safetensors *reader, const char *name, flap_safetensors_dtype dtype,
                          uint64_t *elements_out) {
  const flap_safetensors_tensor *tensor;
  MUST(flap_safetensors_require(reader, name, &tensor));
  ck_assert_msg(tensor->dtype == dtype, "%s is %s", name, flap_safetensors_dtype_name(tensor->dtype));
  void *values = malloc(tensor->bytes);
  ck_assert_ptr_nonnull(values);
  MUST(flap_safetensors_read(reader, tensor, 0, tensor->bytes, values));
  *elements_out = tensor->elements;
  return values;
}

/* Zeroes a part's weights, then fills each tensor: from the file, or with noise if there is none. */
static void fill_part(model_fixture *fixture, flap_part part, uint32_t layer, const flap_safetensors *reader,
                      uint64_t seed) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(&fixture->config, part, layer, tensors);
  char *weights = fixture->weights[part][layer];
  uint64_t element = flap_dtype_bytes(fixture->shape.dtype);
  memset(weights, 0, flap_model_part_elements(&fixture->config, part) * element);
  for (uint32_t i = 0; i < count; i++) {
    void *to = weights + tensors[i].offset * element;
    float *values = NULL;
    if (reader) {
      uint64_t elements;
      values = fixture_read_tensor(reader, tensors[i].name, FLAP_SAFETENSORS_F32, &elements);
      ck_assert_uint_eq(elements, tensors[i].elements);
    }
    flap_philox stream = flap_philox_stream(seed, tensors[i].name);
    for (uint64_t j = 0; j < tensors[i].elements; j++)
      store(fixture, to, j,
            values ? values[j]
                   : (tensors[i].init == FLAP_INIT_ONES ? 1.0f : 0.0f) + 0.1f * flap_philox_normal(&stream, j));
    free(values);
  }
}

static void fill_all(model_fixture *fixture, const flap_safetensors *reader, uint64_t seed) {
  fill_part(fixture, FLAP_PART_EMBEDDING, 0, reader, seed);
  for (uint32_t i = 0; i < fixture->config.num_hidden_layers; i++)
    fill_part(fixture, FLAP_PART_LAYER, i, reader, seed);
  fill_part(fixture, FLAP_PART_HEAD, 0, reader, seed);
}

void fixture_load_weights(model_fixture *fixture, const flap_safetensors *reader) {
  fill_all(fixture, reader, 0);
}

void fixture_random_weights(model_fixture *fixture, uint64_t seed) {
  fill_all(fixture, NULL, seed);
}

void fixture_set_batch(model_fixture *fixture, const int32_t *tokens, const int32_t *targets) {
  uint32_t count = fixture->shape.batch * fixture->shape.sequence, place = 0;
  memcpy(fixture->tokens, tokens, count * sizeof *tokens);
  memcpy(fixture->targets, targets, count * sizeof *targets);
  for (uint32_t token = 0; token < fixture->config.vocab_size; token++)
    for (uint32_t position = 0; position < count; position++)
      if (tokens[position] == (int32_t)token)
        fixture->order[place++] = (int32_t)position;
  ck_assert_uint_eq(place, count);
}

void fixture_random_batch(model_fixture *fixture, uint64_t seed) {
  uint32_t count = fixture->shape.batch * fixture->shape.sequence;
  int32_t *tokens = malloc(2 * count * sizeof *tokens);
  ck_assert_ptr_nonnull(tokens);
  flap_philox stream = flap_philox_stream(seed, "batch");
  for (uint32_t i = 0; i < 2 * count; i++)
    tokens[i] = (int32_t)flap_philox_below(&stream, i, fixture->config.vocab_size);
  tokens[count] = -100;
  fixture_set_batch(fixture, tokens, tokens + count);
  free(tokens);
}

void fixture_zero_gradients(model_fixture *fixture) {
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t i = 0; i < (part == FLAP_PART_LAYER ? fixture->config.num_hidden_layers : 1); i++)
      memset(fixture->gradients[part][i], 0,
             flap_model_part_elements(&fixture->config, (flap_part)part) * sizeof(float));
}

/* ---- the model ------------------------------------------------------------------------------------------- */

void *fixture_projection(const model_fixture *fixture) {
  flap_part part = fixture->config.tie_word_embeddings ? FLAP_PART_EMBEDDING : FLAP_PART_HEAD;
  return (char *)fixture->weights[part][0] +
         flap_model_head_projection(&fixture->config) * flap_dtype_bytes(fixture->shape.dtype);
}

float *fixture_projection_gradient(const model_fixture *fixture) {
  flap_part part = fixture->config.tie_word_embeddings ? FLAP_PART_EMBEDDING : FLAP_PART_HEAD;
  return fixture->gradients[part][0] + flap_model_head_projection(&fixture->config);
}

void fixture_forward(model_fixture *fixture) {
  flap_model_embed(&fixture->run, fixture->weights[FLAP_PART_EMBEDDING][0], fixture->tokens, fixture->x[0]);
  for (uint32_t i = 0; i < fixture->config.num_hidden_layers; i++)
    flap_model_layer_forward(&fixture->run, fixture->weights[FLAP_PART_LAYER][i], fixture->x[i], &fixture->saved[i],
                             fixture->x[i + 1]);
}

double fixture_backward(model_fixture *fixture, float loss_scale) {
  uint32_t layers = fixture->config.num_hidden_layers;
  flap_model_head_loss(&fixture->run, fixture->weights[FLAP_PART_HEAD][0], fixture_projection(fixture),
                       fixture->x[layers], fixture->targets, loss_scale, fixture->losses, fixture->dx,
                       fixture->gradients[FLAP_PART_HEAD][0], fixture_projection_gradient(fixture), !fixture->fresh);
  for (uint32_t i = layers; i-- > 0;) {
    const flap_model_gradient dweights = {.sums = fixture->gradients[FLAP_PART_LAYER][i],
                                          .dtype = fixture->final ? FLAP_BF16 : FLAP_F32,
                                          .accumulate = !fixture->fresh};
    flap_model_layer_backward(&fixture->run, fixture->weights[FLAP_PART_LAYER][i], fixture->x[i], &fixture->saved[i],
                              fixture->dx, &dweights);
  }
  flap_model_embed_backward(&fixture->run, fixture->tokens, fixture->order, fixture->dx,
                            fixture->gradients[FLAP_PART_EMBEDDING][0]);
  double sum = 0;
  if (flap_device_has_bytes(fixture->device))
    for (uint32_t i = 0; i < fixture->shape.batch * fixture->shape.sequence; i++)
      sum += fixture->losses[i];
  return sum;
}

double fixture_relative_error(const float *a, const float *b, uint64_t elements) {
  double difference = 0, size = 0;
  for (uint64_t i = 0; i < elements; i++) {
    difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    size += (double)b[i] * b[i];
  }
  return sqrt(difference / size);
}
