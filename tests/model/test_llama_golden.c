/* The Llama family against values that transformers and PyTorch recorded in fp32: tests/golden/README.md. */
#include "tests/model/model_fixture.h"

#include "io/formats/json_file.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const MODELS[] = {"llama_mha", "llama_tied", "llama_gqa", "llama_rope3", "llama_bias", "qwen2_gqa"};
#define MODEL_COUNT ((int)(sizeof MODELS / sizeof *MODELS))
#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())

typedef struct golden {
  char folder[64];
  flap_safetensors *model, *expected;
  json_t *facts;
  double loss;
  uint32_t counted, parameters;
  uint64_t batch, sequence;
  flap_model_config config;
  int32_t *tokens, *targets;
} golden;

static double number_at(const json_t *object, const char *key) {
  const json_t *value = json_object_get(object, key);
  ck_assert_msg(json_is_number(value), "expected.json: %s", key);
  return json_number_value(value);
}

static void golden_open(golden *recorded, const char *name) {
  char path[128];
  snprintf(recorded->folder, sizeof recorded->folder, "tests/golden/%s", name);
  MUST(flap_safetensors_open(recorded->folder, &recorded->model));
  snprintf(path, sizeof path, "%s/expected.safetensors", recorded->folder);
  MUST(flap_safetensors_open(path, &recorded->expected));
  snprintf(path, sizeof path, "%s/expected.json", recorded->folder);
  MUST(flap_json_load_file(path, FLAP_JSON_BYTES_MAX, &recorded->facts));
  const json_t *forward = json_object_get(recorded->facts, "forward");
  recorded->loss = number_at(forward, "loss");
  recorded->counted = (uint32_t)number_at(forward, "counted_tokens");
  recorded->parameters = (uint32_t)number_at(recorded->facts, "parameters");
  recorded->batch = (uint64_t)number_at(recorded->facts, "batch");
  recorded->sequence = (uint64_t)number_at(recorded->facts, "sequence");
  fixture_read_config(recorded->folder, &recorded->config);
  uint64_t elements;
  recorded->tokens = fixture_read_tensor(recorded->expected, "tokens", FLAP_SAFETENSORS_I32, &elements);
  ck_assert_uint_eq(elements, recorded->batch * recorded->sequence);
  recorded->targets = fixture_read_tensor(recorded->expected, "targets", FLAP_SAFETENSORS_I32, &elements);
}

static void golden_close(golden *recorded) {
  flap_safetensors_close(recorded->model);
  flap_safetensors_close(recorded->expected);
  json_decref(recorded->facts);
  free(recorded->tokens);
  free(recorded->targets);
}

static void golden_fixture(const golden *recorded, flap_dtype dtype, uint32_t threads, model_fixture *fixture) {
  flap_model_shape shape = {
      .dtype = dtype, .batch = (uint32_t)recorded->batch, .sequence = (uint32_t)recorded->sequence};
  fixture_open(fixture, FLAP_DEVICE_CPU, threads, &recorded->config, &shape);
  fixture_load_weights(fixture, recorded->model);
  fixture_set_batch(fixture, recorded->tokens, recorded->targets);
  fixture_zero_gradients(fixture);
}

START_TEST(tensors_have_the_names_and_shapes_of_the_file) {
  golden recorded;
  golden_open(&recorded, MODELS[_i]);
  uint64_t seen = 0;
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t layer = 0; layer < (part == FLAP_PART_LAYER ? recorded.config.num_hidden_layers : 1); layer++) {
      flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
      uint32_t count = flap_model_tensors(&recorded.config, (flap_part)part, layer, tensors);
      for (uint32_t i = 0; i < count; i++, seen++) {
        const flap_safetensors_tensor *theirs;
        MUST(flap_safetensors_require(recorded.model, tensors[i].name, &theirs));
        ck_assert_uint_eq(tensors[i].rank, theirs->rank);
        ck_assert_uint_eq(tensors[i].elements, theirs->elements);
        for (uint32_t d = 0; d < theirs->rank; d++)
          ck_assert_uint_eq(tensors[i].shape[d], theirs->shape[d]);
        ck_assert_int_eq(tensors[i].decays, theirs->rank == 2);
      }
    }
  ck_assert_uint_eq(seen, flap_safetensors_count(recorded.model));
  ck_assert_uint_eq(flap_model_parameters(&recorded.config), recorded.parameters);
  golden_close(&recorded);
}
END_TEST

START_TEST(logits_and_loss_agree_with_pytorch) {
  golden recorded;
  model_fixture fixture;
  golden_open(&recorded, MODELS[_i]);
  golden_fixture(&recorded, FLAP_F32, 2, &fixture);
  fixture_forward(&fixture);

  uint32_t layers = recorded.config.num_hidden_layers, vocabulary = recorded.config.vocab_size;
  uint64_t elements;
  float *expected = fixture_read_tensor(recorded.expected, "logits", FLAP_SAFETENSORS_F32, &elements);
  ck_assert_uint_eq(elements, recorded.batch * recorded.sequence * vocabulary);
  for (uint32_t row = 0; row < recorded.batch * recorded.sequence; row++) {
    flap_model_logits(&fixture.run, fixture.weights[FLAP_PART_HEAD][0], fixture_projection(&fixture), fixture.x[layers],
                      row, fixture.logits);
    double error = fixture_relative_error(fixture.logits, expected + (uint64_t)row * vocabulary, vocabulary);
    ck_assert_msg(error < 1e-5, "%s: logits of row %u are off by %g", MODELS[_i], row, error);
  }
  free(expected);

  /* Losses only, without any gradient. */
  flap_model_head_loss(&fixture.run, fixture.weights[FLAP_PART_HEAD][0], fixture_projection(&fixture),
                       fixture.x[layers], fixture.targets, 1.0f, fixture.losses, NULL, NULL, NULL, false);
  double sum = 0;
  uint32_t counted = 0;
  for (uint32_t i = 0; i < recorded.batch * recorded.sequence; i++) {
    sum += fixture.losses[i];
    counted += recorded.targets[i] >= 0;
    ck_assert(recorded.targets[i] >= 0 || fixture.losses[i] == 0.0f);
  }
  ck_assert_uint_eq(counted, recorded.counted);
  ck_assert_double_le(fabs(sum / counted - recorded.loss), 1e-6 * recorded.loss);
  ck_assert_str_eq(fixture_overrun(&fixture), "");
  fixture_close(&fixture);
  golden_close(&recorded);
}
END_TEST

/* The largest relative error of a part's gradients, tensor by tensor; gaps between tensors must still be zero. */
static double worst_gradient(const golden *recorded, const model_fixture *fixture, flap_part part, uint32_t layer,
                             char *name_out) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(&recorded->config, part, layer, tensors);
  const float *gradients = fixture->gradients[part][layer];
  double worst = 0;
  for (uint32_t i = 0; i < count; i++) {
    char name[FLAP_MODEL_NAME_MAX + 8];
    uint64_t elements;
    int length = snprintf(name, sizeof name, "grad.%.*s", FLAP_MODEL_NAME_MAX, tensors[i].name);
    ck_assert_int_lt(length, (int)sizeof name);
    float *expected = fixture_read_tensor(recorded->expected, name, FLAP_SAFETENSORS_F32, &elements);
    ck_assert_uint_eq(elements, tensors[i].elements);
    double error = fixture_relative_error(gradients + tensors[i].offset, expected, elements);
    free(expected);
    if (!(error <= worst)) {
      worst = error;
      memcpy(name_out, name, sizeof name);
    }
    uint64_t end = i + 1 < count ? tensors[i + 1].offset : flap_model_part_elements(&recorded->config, part);
    for (uint64_t j = tensors[i].offset + elements; j < end; j++)
      ck_assert_msg(gradients[j] == 0.0f, "%s: the gap after it is not zero", name);
  }
  return worst;
}

static void check_gradients(const golden *recorded, const model_fixture *fixture, double error_max) {
  char name[FLAP_MODEL_NAME_MAX + 8] = "";
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t layer = 0; layer < (part == FLAP_PART_LAYER ? recorded->config.num_hidden_layers : 1); layer++) {
      double worst = worst_gradient(recorded, fixture, (flap_part)part, layer, name);
      ck_assert_msg(worst < error_max, "%s: %s is off by %g", recorded->folder, name, worst);
    }
}

START_TEST(gradients_agree_with_pytorch) {
  golden recorded;
  model_fixture fixture;
  golden_open(&recorded, MODELS[_i]);
  golden_fixture(&recorded, FLAP_F32, 2, &fixture);
  fixture_forward(&fixture);
  double loss = fixture_backward(&fixture, 1.0f / (float)recorded.counted) / recorded.counted;
  ck_assert_double_le(fabs(loss - recorded.loss), 1e-6 * recorded.loss);
  check_gradients(&recorded, &fixture, 1e-5);
  ck_assert_str_eq(fixture_overrun(&fixture), "");
  fixture_close(&fixture);
  golden_close(&recorded);
}
END_TEST

START_TEST(two_backwards_add_up) {
  golden recorded;
  model_fixture fixture;
  golden_open(&recorded, MODELS[_i]);
  golden_fixture(&recorded, FLAP_F32, 1, &fixture);
  for (int half = 0; half < 2; half++) {
    fixture_forward(&fixture);
    fixture_backward(&fixture, 0.5f / (float)recorded.counted);
  }
  check_gradients(&recorded, &fixture, 1e-5);
  fixture_close(&fixture);
  golden_close(&recorded);
}
END_TEST

/* bf16 has 8 bits of significand: results are those of fp32 up to a few times 2^-8. */
START_TEST(bf16_is_close_to_fp32) {
  golden recorded;
  model_fixture fixture;
  golden_open(&recorded, MODELS[_i]);
  golden_fixture(&recorded, FLAP_BF16, 2, &fixture);
  fixture_forward(&fixture);
  double loss = fixture_backward(&fixture, 1.0f / (float)recorded.counted) / recorded.counted;
  ck_assert(isfinite(loss));
  ck_assert_double_le(fabs(loss - recorded.loss), 5e-3 * recorded.loss);
  check_gradients(&recorded, &fixture, 5e-2);
  ck_assert_str_eq(fixture_overrun(&fixture), "");
  fixture_close(&fixture);
  golden_close(&recorded);
}
END_TEST

/* The first row of the batch, decoded in pieces of `piece` tokens, gives the recorded logits after every piece. */
static void check_decode(const golden *recorded, model_fixture *fixture, uint32_t piece) {
  uint32_t layers = recorded->config.num_hidden_layers, vocabulary = recorded->config.vocab_size;
  uint32_t sequence = (uint32_t)recorded->sequence;
  uint64_t elements;
  float *expected = fixture_read_tensor(recorded->expected, "logits", FLAP_SAFETENSORS_F32, &elements);
  for (uint32_t first = 0; first < sequence; first += piece) {
    uint32_t tokens = sequence - first < piece ? sequence - first : piece;
    flap_model_run embed = fixture->run;
    embed.shape.batch = 1;
    embed.shape.sequence = tokens;
    void *x = fixture->x[0];
    flap_model_embed(&embed, fixture->weights[FLAP_PART_EMBEDDING][0], fixture->tokens + first, x);
    for (uint32_t i = 0; i < layers; i++)
      flap_model_layer_decode(&fixture->run, fixture->weights[FLAP_PART_LAYER][i], x, fixture->saved[0].kept,
                              fixture->cache[i], fixture->cache_positions, tokens, first);
    for (uint32_t row = 0; row < tokens; row++) {
      flap_model_logits(&fixture->run, fixture->weights[FLAP_PART_HEAD][0], fixture_projection(fixture), x, row,
                        fixture->logits);
      const float *theirs = expected + (uint64_t)(first + row) * vocabulary;
      double error = fixture_relative_error(fixture->logits, theirs, vocabulary);
      ck_assert_msg(error < 1e-5, "%s: pieces of %u: row %u is off by %g", recorded->folder, piece, first + row, error);
      uint32_t best = 0, best_expected = 0;
      for (uint32_t v = 1; v < vocabulary; v++) {
        best = fixture->logits[v] > fixture->logits[best] ? v : best;
        best_expected = theirs[v] > theirs[best_expected] ? v : best_expected;
      }
      ck_assert_uint_eq(best, best_expected);
    }
  }
  free(expected);
}

START_TEST(decode_with_a_cache_gives_the_full_forward_logits) {
  static const uint32_t pieces[] = {1, 5, 1000};
  golden recorded;
  golden_open(&recorded, MODELS[_i]);
  for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
    model_fixture fixture;
    golden_fixture(&recorded, FLAP_F32, 2, &fixture);
    check_decode(&recorded, &fixture, pieces[i]);
    ck_assert_str_eq(fixture_overrun(&fixture), "");
    fixture_close(&fixture);
  }
  golden_close(&recorded);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("llama_golden");
  TCase *tests = tcase_create("golden");
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, tensors_have_the_names_and_shapes_of_the_file, 0, MODEL_COUNT);
  tcase_add_loop_test(tests, logits_and_loss_agree_with_pytorch, 0, MODEL_COUNT);
  tcase_add_loop_test(tests, gradients_agree_with_pytorch, 0, MODEL_COUNT);
  tcase_add_loop_test(tests, two_backwards_add_up, 0, MODEL_COUNT);
  tcase_add_loop_test(tests, bf16_is_close_to_fp32, 0, MODEL_COUNT);
  tcase_add_loop_test(tests, decode_with_a_cache_gives_the_full_forward_logits, 0, MODEL_COUNT);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
