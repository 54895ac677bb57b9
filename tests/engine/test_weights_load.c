/* Weights from files of others: every dtype that is accepted gives exactly its values, and what does not fit the model
 * is refused with a name. */
#include "engine/store/weights.h"

#include "base/philox.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights_internal.h"
#include "io/formats/safetensors.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TENSORS_MAX 64u

/* A file to be written, tensor by tensor, from fp32 values; the tests change entries before. */
typedef struct plan {
  uint64_t count;
  flap_safetensors_entry entries[TENSORS_MAX];
  char names[TENSORS_MAX][FLAP_MODEL_NAME_MAX];
  float *values[TENSORS_MAX];
} plan;

static uint64_t elements_of(const flap_safetensors_entry *entry) {
  uint64_t elements = 1;
  for (uint32_t i = 0; i < entry->rank; i++)
    elements *= entry->shape[i];
  return elements;
}

static void add(plan *p, const char *name, flap_safetensors_dtype dtype, uint32_t rank, uint64_t rows,
                uint64_t columns) {
  const flap_philox stream = flap_philox_stream(11, name);
  const uint64_t i = p->count++;
  ck_assert_uint_lt(i, TENSORS_MAX);
  (void)snprintf(p->names[i], sizeof p->names[i], "%s", name);
  p->entries[i] = (flap_safetensors_entry){.name = p->names[i], .dtype = dtype, .rank = rank, .shape = {rows, columns}};
  const uint64_t elements = elements_of(&p->entries[i]);
  p->values[i] = malloc(elements * sizeof(float));
  flap_philox_normals(&stream, 0, elements, p->values[i]);
}

static plan *plan_of(const flap_model_config *config, flap_safetensors_dtype dtype) {
  plan *p = calloc(1, sizeof *p);
  flap_weights_list list;
  RIG_OK(flap_weights_list_open(config, &list));
  for (uint64_t i = 0; i < list.count; i++)
    add(p, list.tensors[i].name, dtype, list.tensors[i].rank, list.tensors[i].shape[0], list.tensors[i].shape[1]);
  flap_weights_list_close(&list);
  return p;
}

static void plan_free(plan *p) {
  for (uint64_t i = 0; i < p->count; i++)
    free(p->values[i]);
  free(p);
}

static uint64_t index_of(const plan *p, const char *name) {
  for (uint64_t i = 0; i < p->count; i++)
    if (strcmp(p->names[i], name) == 0)
      return i;
  ck_abort_msg("no tensor %s in the plan", name);
}

/* Values are rounded to the entry's dtype independently of the code under test, and stored back as rounded. */
static void write_tensor(flap_safetensors_writer *writer, const flap_safetensors_entry *entry, float *values) {
  const uint64_t elements = elements_of(entry);
  for (uint64_t i = 0; i < elements; i++) {
    const uint16_t half = rig_to_f16(values[i]);
    const uint16_t brain = flap_f32_to_bf16(values[i]);
    switch (entry->dtype) {
    case FLAP_SAFETENSORS_F16:
      values[i] = rig_from_f16(half);
      RIG_OK(flap_safetensors_write(writer, &half, 2));
      break;
    case FLAP_SAFETENSORS_BF16:
      values[i] = flap_bf16_to_f32(brain);
      RIG_OK(flap_safetensors_write(writer, &brain, 2));
      break;
    default:
      RIG_OK(flap_safetensors_write(writer, &values[i], 4));
    }
  }
}

static const char *write_plan(plan *p, const char *name) {
  flap_safetensors_writer *writer = NULL;
  RIG_OK(
      flap_safetensors_write_begin(scratch_path(name), p->entries, p->count, NULL, 0, (flap_file_piece){0}, &writer));
  for (uint64_t i = 0; i < p->count; i++)
    write_tensor(writer, &p->entries[i], p->values[i]);
  RIG_OK(flap_safetensors_write_end(writer));
  return scratch_path(name);
}

/* Every tensor's master is the value in the file, bit for bit. */
static void check_masters(const weights_rig *rig, const plan *p) {
  for (uint64_t i = 0; i < p->count; i++) {
    const uint64_t elements = elements_of(&p->entries[i]);
    float *master = malloc(3 * elements * sizeof(float));
    rig_read(rig, p->names[i], master, master + elements, master + 2 * elements);
    ck_assert_msg(memcmp(master, p->values[i], elements * sizeof(float)) == 0, "%s", p->names[i]);
    for (uint64_t e = elements; e < 3 * elements; e++)
      ck_assert_uint_eq(flap_f32_bits(master[e]), 0);
    free(master);
  }
}

START_TEST(load_masters_are_exactly_the_values_of_the_file) {
  static const flap_safetensors_dtype dtypes[] = {FLAP_SAFETENSORS_F32, FLAP_SAFETENSORS_F16, FLAP_SAFETENSORS_BF16};
  flap_model_config config;
  rig_model(_i % 2, true, &config);
  plan *p = plan_of(&config, dtypes[_i / 2]);
  p->entries[3].dtype = FLAP_SAFETENSORS_F32; /* mixtures are fine */
  (void)write_plan(p, "w.safetensors");
  /* A third of the placements for each file: together every one is met with every kind of tensor. */
  for (uint32_t i = (uint32_t)_i % 3; i < 3 * RIG_PLACEMENTS; i += 3) {
    weights_rig rig;
    static const flap_dtype kinds[] = {FLAP_BF16, FLAP_F32, FLAP_F16};
    if (!RIG_MEETS(_i, i / 3))
      continue;
    rig_open(&rig, &config, kinds[i / 3 % 3], FLAP_MODE_TRAIN, &rig_placements[i % RIG_PLACEMENTS], scratch_path(""));
    RIG_OK(flap_weights_load(rig.pager, &rig.layout, scratch_path("w.safetensors")));
    check_masters(&rig, p);
    rig_close(&rig);
  }
  plan_free(p);
}
END_TEST

START_TEST(load_golden_models_of_transformers) {
  static const char *const folders[] = {"llama_mha", "llama_tied", "llama_gqa", "llama_rope3", "llama_bias"};
  char path[128];
  flap_model_config config;
  weights_rig rig;
  flap_safetensors *reader = NULL;
  (void)snprintf(path, sizeof path, "tests/golden/%s", folders[_i]);
  RIG_OK(flap_hf_config_read(path, &config));
  RIG_OK(flap_weights_check(&config, path));
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[3], scratch_path(""));
  RIG_OK(flap_weights_load(rig.pager, &rig.layout, path));
  RIG_OK(flap_safetensors_open(path, &reader));
  for (uint64_t i = 0; i < flap_safetensors_count(reader); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    float *wanted = malloc(tensor->bytes), *master = malloc(tensor->bytes);
    RIG_OK(flap_safetensors_read(reader, tensor, 0, tensor->bytes, wanted));
    rig_read(&rig, tensor->name, master, NULL, NULL);
    ck_assert_mem_eq(master, wanted, tensor->bytes);
    free(wanted);
    free(master);
  }
  flap_safetensors_close(reader);
  rig_close(&rig);
}
END_TEST

START_TEST(load_other_names_and_known_extras_are_fine) {
  flap_model_config config;
  weights_rig rig;
  rig_model(true, false, &config);
  plan *p = plan_of(&config, FLAP_SAFETENSORS_BF16), *bare = plan_of(&config, FLAP_SAFETENSORS_BF16);
  for (uint64_t i = 0; i < bare->count; i++)
    memmove(bare->names[i], bare->names[i] + strlen("model."), strlen(bare->names[i]) - strlen("model.") + 1);
  add(bare, "lm_head.weight", FLAP_SAFETENSORS_BF16, 2, config.vocab_size, config.hidden_size);
  add(bare, "layers.0.self_attn.rotary_emb.inv_freq", FLAP_SAFETENSORS_F32, 1, 6, 0);
  (void)write_plan(p, "full.safetensors"); /* rounds the values that are compared */
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  for (uint64_t i = 0; i < p->count; i++)
    memcpy(bare->values[i], p->values[i], elements_of(&p->entries[i]) * sizeof(float));
  const uint64_t embedding = index_of(bare, "embed_tokens.weight"), projection = index_of(bare, "lm_head.weight");
  memcpy(bare->values[projection], bare->values[embedding], elements_of(&bare->entries[embedding]) * sizeof(float));
  RIG_OK(flap_weights_load(rig.pager, &rig.layout, write_plan(bare, "bare.safetensors")));
  check_masters(&rig, p);
  rig_close(&rig);
  plan_free(p);
  plan_free(bare);
}
END_TEST

/* ---- refusals ------------------------------------------------------------------------------------------------ */

static void refuse(const flap_model_config *config, plan *p, flap_status wanted, const char *text, const char *more) {
  const char *path = write_plan(p, "w.safetensors");
  RIG_REFUSED(flap_weights_check(config, path), wanted, text, more);
  ck_assert(scratch_error_has("w.safetensors"));
  plan_free(p);
}

START_TEST(load_what_does_not_fit_the_model_is_refused) {
  flap_model_config config;
  rig_model(false, false, &config);
  const flap_safetensors_dtype bf16 = FLAP_SAFETENSORS_BF16;

  plan *p = plan_of(&config, bf16);
  p->entries[0].shape[0]--;
  refuse(&config, p, FLAP_INVALID, "model.embed_tokens.weight has the shape [396, 48]", "needs [397, 48]");

  p = plan_of(&config, bf16);
  const uint64_t norm = index_of(p, "model.norm.weight");
  p->entries[norm].rank = 2;
  p->entries[norm].shape[1] = 1;
  refuse(&config, p, FLAP_INVALID, "model.norm.weight has the shape [48, 1]", "needs [48]");

  p = plan_of(&config, bf16);
  p->entries[2].dtype = FLAP_SAFETENSORS_I32;
  refuse(&config, p, FLAP_UNSUPPORTED, p->names[2], "is I32, but weights must be");

  p = plan_of(&config, bf16);
  (void)snprintf(p->names[4], sizeof p->names[4], "other");
  refuse(&config, p, FLAP_INVALID, "has no tensor model.layers.0.self_attn.v_proj.weight", "configuration needs");

  p = plan_of(&config, bf16);
  add(p, "model.layers.0.self_attn.q_proj.bias", bf16, 1, 48, 0);
  refuse(&config, p, FLAP_INVALID, "q_proj.bias", "does config.json belong");

  p = plan_of(&config, bf16);
  add(p, "norm.weight", bf16, 1, 48, 0);
  refuse(&config, p, FLAP_INVALID, "holds tensor norm.weight", "does config.json belong");

  rig_model(true, false, &config); /* tied weights for an untied model */
  p = plan_of(&config, bf16);
  config.tie_word_embeddings = false;
  refuse(&config, p, FLAP_INVALID, "has no tensor lm_head.weight", "configuration needs");

  config.tie_word_embeddings = true; /* and untied ones for a tied model */
  p = plan_of(&config, bf16);
  add(p, "lm_head.weight", bf16, 2, config.vocab_size, config.hidden_size);
  const uint64_t embedding = index_of(p, "model.embed_tokens.weight"), projection = index_of(p, "lm_head.weight");
  memcpy(p->values[projection], p->values[embedding], elements_of(&p->entries[embedding]) * sizeof(float));
  p->values[projection][elements_of(&p->entries[embedding]) - 1] += 1;
  refuse(&config, p, FLAP_INVALID, "lm_head.weight is not the embedding", "tie_word_embeddings: false");

  RIG_REFUSED(flap_weights_check(&config, scratch_path("nowhere")), FLAP_NOT_FOUND, "nowhere", "No such file");
  RIG_REFUSED(flap_weights_check(&config, scratch_path("")), FLAP_NOT_FOUND, "model.safetensors", "neither");
}
END_TEST

START_TEST(load_values_that_are_not_finite_are_refused) {
  static const struct {
    flap_safetensors_dtype file;
    flap_dtype ours;
    float value;
  } cases[] = {{FLAP_SAFETENSORS_F32, FLAP_BF16, NAN},        {FLAP_SAFETENSORS_F32, FLAP_F32, INFINITY},
               {FLAP_SAFETENSORS_BF16, FLAP_BF16, NAN},       {FLAP_SAFETENSORS_BF16, FLAP_F32, -INFINITY},
               {FLAP_SAFETENSORS_F16, FLAP_BF16, INFINITY},   {FLAP_SAFETENSORS_F16, FLAP_F32, NAN},
               {FLAP_SAFETENSORS_F32, FLAP_BF16, 0x1.ffp127f}};
  flap_model_config config;
  weights_rig rig;
  rig_model(false, false, &config);
  plan *p = plan_of(&config, cases[_i].file);
  const uint64_t index = index_of(p, "model.layers.1.mlp.up_proj.weight");
  p->values[index][5000] = cases[_i].value;
  const char *path = write_plan(p, "w.safetensors");
  rig_open(&rig, &config, cases[_i].ours, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_REFUSED(flap_weights_load(rig.pager, &rig.layout, path), FLAP_NUMERIC, "w.safetensors: tensor",
              "layers.1.mlp.up_proj.weight: element 5000 is NaN");
  p->values[index][5000] = 1.0f;
  RIG_OK(flap_weights_load(rig.pager, &rig.layout, write_plan(p, "w.safetensors"))); /* the pager still works */
  rig_close(&rig);
  plan_free(p);
}
END_TEST

/* Damaged files give a status, whichever byte was hit. */
START_TEST(load_damaged_files_never_crash) {
  flap_model_config config;
  weights_rig rig;
  rig_model(false, false, &config);
  plan *p = plan_of(&config, FLAP_SAFETENSORS_BF16);
  (void)write_plan(p, "w.safetensors");
  size_t bytes;
  uint64_t header = 0;
  char *good = scratch_read("w.safetensors", &bytes), *bad = malloc(bytes);
  memcpy(&header, good, sizeof header);
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  const flap_philox stream = flap_philox_stream(3, "damage");
  uint32_t refused = 0;
  for (uint64_t i = 0; i < 120; i++) {
    memcpy(bad, good, bytes);
    size_t length = bytes;
    if (i % 4 == 0)
      length = flap_philox_below(&stream, 4 * i, bytes);
    for (uint64_t hit = 0; i % 4 != 0 && hit <= i % 3; hit++)
      bad[flap_philox_below(&stream, 4 * i + hit, 8 + header)] = (char)flap_philox_below(&stream, 4 * i + 3, 256);
    scratch_write("bad.safetensors", bad, length);
    flap_error_clear();
    const flap_status status = flap_weights_load(rig.pager, &rig.layout, scratch_path("bad.safetensors"));
    refused += status != FLAP_OK;
    ck_assert(status == FLAP_OK || scratch_error_has("bad.safetensors"));
    ck_assert(length == bytes || status == FLAP_CORRUPT);
  }
  ck_assert_uint_gt(refused, 90);
  free(good);
  free(bad);
  rig_close(&rig);
  plan_free(p);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("weights_load");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, load_masters_are_exactly_the_values_of_the_file, 0, 6);
  tcase_add_loop_test(tests, load_golden_models_of_transformers, 0, 5);
  tcase_add_test(tests, load_other_names_and_known_extras_are_fine);
  tcase_add_test(tests, load_what_does_not_fit_the_model_is_refused);
  tcase_add_loop_test(tests, load_values_that_are_not_finite_are_refused, 0, 7);
  tcase_add_test(tests, load_damaged_files_never_crash);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
