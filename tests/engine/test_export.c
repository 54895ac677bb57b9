/* flap_engine_export: exact masters in fp32, correct rounding in 16 bits, whole folders or none. */
#include "engine/store/checkpoint.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights.h"
#include "engine/store/weights_internal.h"
#include "io/formats/safetensors.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>

#define SHARD_MAX ((uint64_t)1 << 40)

/* `out`/checkpoint-1 of a model with seed 9, whose masters also lie in `masters` (fp32). */
static void make_checkpoint(flap_dtype dtype) {
  flap_model_config config;
  flap_tokenizer *tokenizer = NULL;
  weights_rig rig;
  char folder[FLAP_PATH_MAX];
  rig_model(false, true, &config);
  RIG_OK(flap_tokenizer_open_bytes(&tokenizer));
  const flap_artifacts artifacts = {.model = &config, .tokenizer = tokenizer};
  const flap_trainer_state state = {.step = 1};
  rig_open(&rig, &config, dtype, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 9));
  RIG_OK(flap_checkpoint_save(scratch_path("out"), rig.pager, &rig.layout, &artifacts, &state, false, 0, folder));
  rig_close(&rig);
  rig_open(&rig, &config, FLAP_F32, FLAP_MODE_FORWARD, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 9));
  ck_assert_int_eq(mkdir(scratch_path("masters"), 0777), 0);
  RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("masters"), SHARD_MAX, (flap_file_piece){0}, NULL));
  rig_close(&rig);
  flap_tokenizer_close(tokenizer);
}

/* All tensors of an exported folder, against the masters rounded by `round` (NULL: not at all). */
static void compare(const char *folder, flap_safetensors_dtype dtype, float (*round)(float)) {
  flap_safetensors *ours = NULL, *masters = NULL;
  RIG_OK(flap_safetensors_open(scratch_path(folder), &ours));
  RIG_OK(flap_safetensors_open(scratch_path("masters"), &masters));
  ck_assert_uint_eq(flap_safetensors_count(ours), flap_safetensors_count(masters));
  for (uint64_t i = 0; i < flap_safetensors_count(ours); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(ours, i), *master = flap_safetensors_at(masters, i);
    ck_assert_str_eq(tensor->name, master->name);
    ck_assert_int_eq(tensor->dtype, dtype);
    char *values = malloc(tensor->bytes);
    float *wanted = malloc(master->bytes);
    RIG_OK(flap_safetensors_read(ours, tensor, 0, tensor->bytes, values));
    RIG_OK(flap_safetensors_read(masters, master, 0, master->bytes, wanted));
    for (uint64_t e = 0; e < tensor->elements; e++) {
      uint16_t bits;
      float value;
      memcpy(&bits, values + 2 * e, sizeof bits);
      if (dtype == FLAP_SAFETENSORS_F32)
        memcpy(&value, values + 4 * e, sizeof value);
      else
        value = dtype == FLAP_SAFETENSORS_BF16 ? flap_bf16_to_f32(bits) : rig_from_f16(bits);
      const float want = round ? round(wanted[e]) : wanted[e];
      if (flap_f32_bits(value) != flap_f32_bits(want))
        ck_abort_msg("%s: element %llu is %a instead of %a", tensor->name, (unsigned long long)e, (double)value,
                     (double)want);
    }
    free(values);
    free(wanted);
  }
  flap_safetensors_close(ours);
  flap_safetensors_close(masters);
}

static float nearest_bf16(float value) {
  return flap_bf16_to_f32(flap_f32_to_bf16(value));
}

static float nearest_f16(float value) {
  return rig_from_f16(rig_to_f16(value));
}

/* The high half of the split master: ties away from zero. */
static float high_half(float value) {
  return flap_f32_from_bits((flap_f32_bits(value) + 0x8000u) & 0xffff0000u);
}

START_TEST(export_of_a_bf16_checkpoint) {
  make_checkpoint(FLAP_BF16);
  const char *from = "out/checkpoint-1";
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("f32"), FLAP_F32, SHARD_MAX, NULL));
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("new/f16/"), FLAP_F16, SHARD_MAX, NULL));
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("bf16"), FLAP_BF16, 40000, NULL));
  compare("f32", FLAP_SAFETENSORS_F32, NULL); /* both halves: exact */
  compare("new/f16", FLAP_SAFETENSORS_F16, nearest_f16);
  compare("bf16", FLAP_SAFETENSORS_BF16, high_half);
  ck_assert(scratch_exists("bf16/model.safetensors.index.json") && !scratch_exists("bf16/model.safetensors"));
  rig_same_files("masters/model.safetensors", "f32/model.safetensors");
  /* Without the low halves only the bf16 weights are left. */
  ck_assert_int_eq(remove(scratch_path("out/checkpoint-1/optimizer-low.safetensors")), 0);
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("rough"), FLAP_F32, SHARD_MAX, NULL));
  compare("rough", FLAP_SAFETENSORS_F32, high_half);
}
END_TEST

START_TEST(export_of_an_fp32_checkpoint_rounds_to_nearest_even) {
  make_checkpoint(FLAP_F32);
  RIG_OK(flap_engine_export(scratch_path("out/checkpoint-1"), scratch_path("bf16"), FLAP_BF16, SHARD_MAX, NULL));
  RIG_OK(flap_engine_export(scratch_path("out/checkpoint-1"), scratch_path("f16"), FLAP_F16, SHARD_MAX, NULL));
  compare("bf16", FLAP_SAFETENSORS_BF16, nearest_bf16);
  compare("f16", FLAP_SAFETENSORS_F16, nearest_f16);
  RIG_OK(flap_engine_export(scratch_path("f16"), scratch_path("again"), FLAP_F32, SHARD_MAX, NULL));
  compare("again", FLAP_SAFETENSORS_F32, nearest_f16);
}
END_TEST

START_TEST(export_of_an_fp16_checkpoint_rounds_from_its_masters) {
  make_checkpoint(FLAP_F16);
  const char *from = "out/checkpoint-1";
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("f32"), FLAP_F32, SHARD_MAX, NULL));
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("bf16"), FLAP_BF16, SHARD_MAX, NULL));
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("f16"), FLAP_F16, SHARD_MAX, NULL));
  compare("f32", FLAP_SAFETENSORS_F32, NULL);
  compare("bf16", FLAP_SAFETENSORS_BF16, nearest_bf16); /* once, not by way of fp16 */
  compare("f16", FLAP_SAFETENSORS_F16, nearest_f16);
  rig_same_files("out/checkpoint-1/model.safetensors", "f16/model.safetensors");
  rig_same_files("masters/model.safetensors", "f32/model.safetensors");
  ck_assert(!scratch_exists("f32/optimizer-master.safetensors"));
  ck_assert_int_eq(remove(scratch_path("out/checkpoint-1/optimizer-master.safetensors")), 0);
  RIG_OK(flap_engine_export(scratch_path(from), scratch_path("rough"), FLAP_F32, SHARD_MAX, NULL));
  compare("rough", FLAP_SAFETENSORS_F32, nearest_f16);
}
END_TEST

START_TEST(export_folders_hold_config_and_tokenizer_and_no_states) {
  flap_model_config config, wanted;
  flap_tokenizer *tokenizer = NULL;
  make_checkpoint(FLAP_BF16);
  scratch_text("out/checkpoint-1/generation_config.json", "{}\n");
  RIG_OK(flap_engine_export(scratch_path("out/checkpoint-1"), scratch_path("to"), FLAP_F32, SHARD_MAX, NULL));
  static const char *const there[] = {"to/config.json", "to/model.safetensors", "to/tokenizer.json",
                                      "to/tokenizer_config.json", "to/generation_config.json"};
  for (size_t i = 0; i < sizeof there / sizeof *there; i++)
    ck_assert_msg(scratch_exists(there[i]), "%s", there[i]);
  static const char *const not_there[] = {"to/optimizer-low.safetensors", "to/optimizer-exp_avg.safetensors",
                                          "to/trainer_state.json", "to.tmp"};
  for (size_t i = 0; i < sizeof not_there / sizeof *not_there; i++)
    ck_assert_msg(!scratch_exists(not_there[i]), "%s", not_there[i]);
  char *text = scratch_read("to/config.json", NULL);
  ck_assert(strstr(text, "\"torch_dtype\": \"float32\"") && strstr(text, "\"eos_token_id\": 256"));
  free(text);
  RIG_OK(flap_hf_config_read(scratch_path("to"), &config));
  rig_model(false, true, &wanted);
  ck_assert_uint_eq(config.vocab_size, wanted.vocab_size);
  ck_assert_uint_eq(config.head_dim, wanted.head_dim);
  RIG_OK(flap_tokenizer_open(scratch_path("to"), &tokenizer));
  ck_assert_int_eq(flap_tokenizer_end(tokenizer), 256);
  flap_tokenizer_close(tokenizer);
}
END_TEST

START_TEST(export_keeps_what_others_wrote) {
  RIG_OK(flap_engine_export("tests/golden/llama_rope3", scratch_path("to"), FLAP_BF16, SHARD_MAX, NULL));
  char *text = scratch_read("to/config.json", NULL);
  ck_assert(strstr(text, "\"rope_parameters\"") && strstr(text, "\"transformers_version\""));
  ck_assert(strstr(text, "\"dtype\": \"bfloat16\"") && !strstr(text, "torch_dtype"));
  free(text);
  flap_model_config config;
  RIG_OK(flap_hf_config_read(scratch_path("to"), &config));
  RIG_OK(flap_weights_check(&config, scratch_path("to")));
}
END_TEST

START_TEST(export_of_a_qwen2_model_says_so) {
  flap_model_config config, wanted;
  RIG_OK(flap_engine_export("tests/golden/qwen2_gqa", scratch_path("to"), FLAP_F16, SHARD_MAX, NULL));
  char *text = scratch_read("to/config.json", NULL);
  ck_assert(strstr(text, "\"Qwen2ForCausalLM\"") && strstr(text, "\"model_type\": \"qwen2\""));
  free(text);
  RIG_OK(flap_hf_config_read("tests/golden/qwen2_gqa", &wanted));
  RIG_OK(flap_hf_config_read(scratch_path("to"), &config));
  ck_assert_ptr_eq(config.family, wanted.family);
  ck_assert(config.attention_bias && !config.output_bias);
  RIG_OK(flap_weights_check(&config, scratch_path("to")));
}
END_TEST

START_TEST(export_refusals_leave_nothing) {
  make_checkpoint(FLAP_BF16);
  const char *from = "out/checkpoint-1";
  RIG_REFUSED(flap_engine_export(scratch_path(from), scratch_path("masters"), FLAP_F32, SHARD_MAX, NULL), FLAP_INVALID,
              "masters: already there", "");
  RIG_REFUSED(flap_engine_export(scratch_path("none"), scratch_path("to"), FLAP_F32, SHARD_MAX, NULL), FLAP_NOT_FOUND,
              "none", "not a model folder");
  RIG_REFUSED(flap_engine_export(scratch_path(from), "", FLAP_F32, SHARD_MAX, NULL), FLAP_INVALID, "name the folder",
              "");
  RIG_REFUSED(flap_engine_export(scratch_path(from), scratch_path("to"), FLAP_I32, SHARD_MAX, NULL), FLAP_INVALID,
              "bfloat16", "");
  const char *to = scratch_path("to"), *source = scratch_path(from);
  scratch_limit(60000);
  const flap_status full = flap_engine_export(source, to, FLAP_F32, SHARD_MAX, NULL);
  scratch_unlimit();
  ck_assert_int_eq(full, FLAP_NO_SPACE);
  ck_assert(!scratch_exists("to") && !scratch_exists("to.tmp"));
  /* A damaged low half: the file names itself. */
  size_t bytes;
  char *low = scratch_read("out/checkpoint-1/optimizer-low.safetensors", &bytes);
  scratch_write("out/checkpoint-1/optimizer-low.safetensors", low, bytes - 1);
  free(low);
  RIG_REFUSED(flap_engine_export(scratch_path(from), scratch_path("to"), FLAP_F32, SHARD_MAX, NULL), FLAP_CORRUPT,
              "optimizer-low.safetensors", "");
  ck_assert(!scratch_exists("to") && !scratch_exists("to.tmp"));
}
END_TEST

START_TEST(export_that_is_stopped_leaves_nothing) {
  static const volatile sig_atomic_t stop = 1;
  make_checkpoint(FLAP_BF16);
  ck_assert_int_eq(flap_engine_export(scratch_path("out/checkpoint-1"), scratch_path("to"), FLAP_F32, SHARD_MAX, &stop),
                   FLAP_INTERRUPTED);
  ck_assert(!scratch_exists("to") && !scratch_exists("to.tmp"));
}
END_TEST

START_TEST(export_values_too_large_for_half_precision_are_named) {
  make_checkpoint(FLAP_F32);
  static const float values[] = {65519.0f, 65520.0f, -1e30f, NAN};
  flap_safetensors *reader = NULL;
  RIG_OK(flap_safetensors_open(scratch_path("out/checkpoint-1"), &reader));
  const flap_safetensors_tensor *tensor = flap_safetensors_find(reader, "model.layers.0.mlp.up_proj.weight");
  const uint64_t offset = tensor->file_offset + 4 * 77;
  flap_safetensors_close(reader);
  size_t bytes;
  char *file = scratch_read("out/checkpoint-1/model.safetensors", &bytes);
  memcpy(file + offset, &values[_i], sizeof(float));
  scratch_write("out/checkpoint-1/model.safetensors", file, bytes);
  ck_assert_int_eq(unlink(scratch_path("out/checkpoint-1/checksums.json")), 0); /* on purpose */
  free(file);
  const char *from = scratch_path("out/checkpoint-1"), *to = scratch_path("to");
  if (_i == 0)
    RIG_OK(flap_engine_export(from, to, FLAP_F16, SHARD_MAX, NULL)); /* rounds to the largest */
  else
    RIG_REFUSED(flap_engine_export(from, to, FLAP_F16, SHARD_MAX, NULL), FLAP_NUMERIC,
                "model.layers.0.mlp.up_proj.weight", "element 77 is NaN, infinite, or too large for float");
  ck_assert(scratch_exists("to") == (_i == 0) && !scratch_exists("to.tmp"));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("export");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, export_of_a_bf16_checkpoint);
  tcase_add_test(tests, export_of_an_fp32_checkpoint_rounds_to_nearest_even);
  tcase_add_test(tests, export_of_an_fp16_checkpoint_rounds_from_its_masters);
  tcase_add_test(tests, export_folders_hold_config_and_tokenizer_and_no_states);
  tcase_add_test(tests, export_keeps_what_others_wrote);
  tcase_add_test(tests, export_of_a_qwen2_model_says_so);
  tcase_add_test(tests, export_refusals_leave_nothing);
  tcase_add_test(tests, export_that_is_stopped_leaves_nothing);
  tcase_add_loop_test(tests, export_values_too_large_for_half_precision_are_named, 0, 4);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
