/* run.yaml to flap_run_config: what is accepted, and what each refusal says. */
#include "tools/config_keys.h"
#include "tools/config_yaml.h"

#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static flap_run_config config; /* large */

#define BASE "model: {model_type: llama}\noutput_dir: out\ndataset: a.txt\n"

static flap_status load_with(const char *text, const char *const *overrides, size_t count) {
  return flap_config_load_text("run.yaml", text, strlen(text), overrides, count, FLAP_CONFIG_TRAIN, &config);
}

static flap_status load(const char *text) {
  return load_with(text, NULL, 0);
}

static flap_status load_base(const char *more, const char *const *overrides, size_t count) {
  char text[4096];
  (void)snprintf(text, sizeof text, "%s%s", BASE, more);
  return load_with(text, overrides, count);
}

static void refuse(const char *text, const char *message) {
  flap_error_clear();
  flap_status status = load(text);
  ck_assert_msg(status != FLAP_OK, "accepted: %s", text);
  ck_assert_msg(strstr(flap_error_message(), message) != NULL, "said \"%s\", wanted \"%s\"", flap_error_message(),
                message);
  ck_assert_ptr_null(strchr(flap_error_message(), '\n'));
}

static void refuse_base(const char *more, const char *message) {
  char text[4096];
  (void)snprintf(text, sizeof text, "%s%s", BASE, more);
  refuse(text, message);
}

static void refuse_override(const char *override, const char *message) {
  flap_error_clear();
  flap_status status = load_base("", &override, 1);
  ck_assert_msg(status != FLAP_OK, "accepted: %s", override);
  ck_assert_msg(strstr(flap_error_message(), message) != NULL, "said \"%s\", wanted \"%s\"", flap_error_message(),
                message);
}

START_TEST(config_minimal_has_defaults) {
  ck_assert_int_eq(load(BASE), FLAP_OK);
  ck_assert_double_eq(config.learning_rate, 5e-5);
  ck_assert_uint_eq(config.gradient_accumulation_steps, 1);
  ck_assert_uint_eq(config.max_steps, 0);
  ck_assert_int_eq(config.vram.kind, FLAP_SIZE_MAX);
  ck_assert_int_eq(flap_run_config_dtype(&config), FLAP_BF16);
  ck_assert_uint_eq(config.dataset_count, 1);
  ck_assert_str_eq(config.dataset[0], "a.txt");
  ck_assert_str_eq(config.source, "run.yaml");
  flap_run_config_close(&config);
}
END_TEST

START_TEST(config_full_file_fills_every_field) {
  static const char text[] =
      "# a comment\n"
      "model:\n"
      "  model_type: llama\n"
      "  hidden_size: 192\n"
      "  rms_norm_eps: 1e-5\n"
      "  tie_word_embeddings: true\n"
      "  rope_scaling: null\n"
      "  rope_parameters: {factor: 8.0, rope_type: llama3}\n"
      "tokenizer: bytes\n"
      "dataset: [a.txt, 'b*.jsonl']\n"
      "val_size: 0.05\ncutoff_len: 128\npacking: true\nneat_packing: false\ntemplate: none\n"
      "per_device_train_batch_size: 2\ngradient_accumulation_steps: 8\n"
      "max_steps: 1e2\nnum_train_epochs: 1.5\nlearning_rate: 1e-3\nlr_scheduler_type: cosine\n"
      "warmup_steps: 10\nwarmup_ratio: 0.1\noptim: adamw_bnb_8bit\nweight_decay: 0.1\n"
      "adam_beta1: 0.8\nadam_beta2: .95\nadam_epsilon: 1.0e-6\nmax_grad_norm: 0\n"
      "bf16: true\nfp16: no\ngradient_dtype: fp32\nactivations: recompute\n"
      "gradient_checkpointing: true\nseed: 7\nlogging_steps: 5\neval_strategy: steps\n"
      "eval_steps: 50\nsave_strategy: no\nsave_steps: 25\nsave_total_limit: 2\n"
      "save_only_model: false\noutput_dir: runs/a b\noverwrite_output_dir: true\n"
      "resume_from_checkpoint: runs/a b/checkpoint-5\nexport: none\nreport_to: none\n"
      "device: cpu\nvram: 7MiB\nram: \"20 MiB\"\n"
      "disk:\n  - path: /mnt/a\n    size: 1GB\n  - /mnt/b\n  - {path: /mnt/c, size: min}\n"
      "expert: {segment_layers: 2, tail_layers: 3, group_micro_batches: 4, clip: fold, recompute: layers,\n"
      "  page_bytes: 64KiB, slice_bytes: 1MiB, staging_bytes: 3MiB, io: threads, threads: 2, matmul: first}\n";
  ck_assert_msg(load(text) == FLAP_OK, "%s", flap_error_message());
  ck_assert_int_eq(json_integer_value(json_object_get(config.model, "hidden_size")), 192);
  ck_assert(json_is_real(json_object_get(config.model, "rms_norm_eps")));
  ck_assert_double_eq(json_real_value(json_object_get(config.model, "rms_norm_eps")), 1e-5);
  ck_assert(json_is_true(json_object_get(config.model, "tie_word_embeddings")));
  ck_assert(json_is_null(json_object_get(config.model, "rope_scaling")));
  ck_assert_str_eq(json_string_value(json_object_get(json_object_get(config.model, "rope_parameters"), "rope_type")),
                   "llama3");
  ck_assert_str_eq(config.tokenizer, "bytes");
  ck_assert_uint_eq(config.dataset_count, 2);
  ck_assert_str_eq(config.dataset[1], "b*.jsonl");
  ck_assert_double_eq(config.val_size, 0.05);
  ck_assert_uint_eq(config.cutoff_len, 128);
  ck_assert_uint_eq(config.per_device_train_batch_size, 2);
  ck_assert_uint_eq(config.gradient_accumulation_steps, 8);
  ck_assert_uint_eq(config.max_steps, 100);
  ck_assert_double_eq(config.num_train_epochs, 1.5);
  ck_assert_double_eq(config.learning_rate, 1e-3);
  ck_assert_int_eq(config.lr_scheduler_type, FLAP_SCHEDULER_COSINE);
  ck_assert_uint_eq(config.warmup_steps, 10);
  ck_assert_double_eq(config.warmup_ratio, 0.1);
  ck_assert_int_eq(config.optim, FLAP_OPTIM_ADAMW_8BIT);
  ck_assert_double_eq(config.weight_decay, 0.1);
  ck_assert_double_eq(config.adam_beta1, 0.8);
  ck_assert_double_eq(config.adam_beta2, 0.95);
  ck_assert_double_eq(config.adam_epsilon, 1e-6);
  ck_assert_double_eq(config.max_grad_norm, 0);
  ck_assert(config.bf16 && !config.fp16);
  ck_assert_int_eq(config.gradient_dtype, FLAP_F32);
  ck_assert_int_eq(config.activations, FLAP_ACTIVATIONS_RECOMPUTE);
  ck_assert_uint_eq(config.seed, 7);
  ck_assert_uint_eq(config.logging_steps, 5);
  ck_assert_uint_eq(config.eval_steps, 50);
  ck_assert_int_eq(config.save_strategy, FLAP_STRATEGY_NO);
  ck_assert_uint_eq(config.save_steps, 25);
  ck_assert_uint_eq(config.save_total_limit, 2);
  ck_assert(!config.save_only_model && config.overwrite_output_dir && !config.export_final);
  ck_assert_str_eq(config.output_dir, "runs/a b");
  ck_assert_str_eq(config.resume_from_checkpoint, "runs/a b/checkpoint-5");
  ck_assert_int_eq(config.device, FLAP_RUN_DEVICE_CPU);
  ck_assert_uint_eq(config.vram.bytes, 7u << 20);
  ck_assert_uint_eq(config.ram.bytes, 20u << 20);
  ck_assert_uint_eq(config.disk_count, 3);
  ck_assert_str_eq(config.disk[0].path, "/mnt/a");
  ck_assert_uint_eq(config.disk[0].size.bytes, 1000000000);
  ck_assert_int_eq(config.disk[1].size.kind, FLAP_SIZE_MAX);
  ck_assert_int_eq(config.disk[2].size.kind, FLAP_SIZE_MIN);
  ck_assert_uint_eq(config.expert.segment_layers, 2);
  ck_assert_uint_eq(config.expert.tail_layers, 3);
  ck_assert_uint_eq(config.expert.group_micro_batches, 4);
  ck_assert_int_eq(config.expert.clip, FLAP_CLIP_FOLD);
  ck_assert_int_eq(config.expert.recompute, FLAP_RECOMPUTE_LAYERS);
  ck_assert_uint_eq(config.expert.page_bytes, 65536);
  ck_assert_uint_eq(config.expert.slice_bytes, 1u << 20);
  ck_assert_uint_eq(config.expert.staging_bytes, 3u << 20);
  ck_assert_int_eq(config.expert.io, FLAP_RUN_IO_THREADS);
  ck_assert_uint_eq(config.expert.threads, 2);
  ck_assert_int_eq(config.expert.matmul, FLAP_RUN_MATMUL_FIRST);
  flap_run_config_close(&config);
}
END_TEST

START_TEST(config_null_and_later_overrides_take_defaults_back) {
  const char *const overrides[] = {"learning_rate=1", "learning_rate=null", "dataset=b.txt", "disk=", "export=final"};
  ck_assert_int_eq(load_base("disk: /mnt/a\nseed: ~\nexport: none\nresume_from_checkpoint: null\n", overrides, 5),
                   FLAP_OK);
  ck_assert_double_eq(config.learning_rate, 5e-5);
  ck_assert_uint_eq(config.seed, 42);
  ck_assert_uint_eq(config.disk_count, 0);
  ck_assert_uint_eq(config.dataset_count, 1);
  ck_assert_str_eq(config.dataset[0], "b.txt");
  ck_assert(config.export_final);
  flap_run_config_close(&config);
}
END_TEST

START_TEST(config_resume_has_words_beside_folders) {
  static const struct {
    const char *given, *stored;
  } cases[] = {{"true", "true"}, {"latest", "true"}, {"false", ""}, {"auto", "auto"}, {"./auto", "./auto"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char override[64];
    (void)snprintf(override, sizeof override, "resume_from_checkpoint=%s", cases[i].given);
    const char *const overrides[] = {override};
    ck_assert_int_eq(load_base("", overrides, 1), FLAP_OK);
    ck_assert_str_eq(config.resume_from_checkpoint, cases[i].stored);
    flap_run_config_close(&config);
  }
  refuse_base("resume_from_checkpoint: auto\noverwrite_output_dir: true\n",
              "run.yaml:5: overwrite_output_dir: contradicts resume_from_checkpoint: auto");
}
END_TEST

START_TEST(config_overrides_reach_into_mappings) {
  const char *const overrides[] = {"expert.clip=sweep",
                                   "model.hidden_size=64",
                                   "model.rope_scaling.factor=8",
                                   "model.model_type=null",
                                   "disk=[{path: /a, size: 1GiB, weight: 2.5}, {path: /b, weight: 1}]",
                                   "vram=min",
                                   "expert={threads: 3}",
                                   "model={head_dim: 8}",
                                   "output_dir='a = b'",
                                   "dataset=*.txt"};
  ck_assert_msg(load_base("expert: {clip: fold, threads: 1, io: threads}\n", overrides, 10) == FLAP_OK, "%s",
                flap_error_message());
  ck_assert_int_eq(config.expert.clip, FLAP_CLIP_SWEEP);
  ck_assert_uint_eq(config.expert.threads, 3);
  ck_assert_int_eq(config.expert.io, FLAP_RUN_IO_THREADS);
  ck_assert_int_eq(json_integer_value(json_object_get(config.model, "hidden_size")), 64);
  ck_assert_int_eq(json_integer_value(json_object_get(config.model, "head_dim")), 8);
  ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(config.model, "rope_scaling"), "factor")), 8);
  ck_assert_ptr_null(json_object_get(config.model, "model_type"));
  ck_assert_uint_eq(config.disk_count, 2);
  ck_assert(config.disk[0].weight == 2.5 && config.disk[1].weight == 1);
  ck_assert_int_eq(config.vram.kind, FLAP_SIZE_MIN);
  ck_assert_str_eq(config.output_dir, "a = b");
  ck_assert_str_eq(config.dataset[0], "*.txt");
  flap_run_config_close(&config);
}
END_TEST

START_TEST(config_updates_happen_when_one_key_says) {
  refuse_base("expert: {update: late}\n", "run.yaml:4: expert.update: wanted one of auto, fold, sweep, backward");
  refuse_base("expert: {update: sweep, clip: fold}\n", "run.yaml:4: expert.clip: contradicts expert.update");
  static const struct {
    const char *text;
    flap_update_when update;
    bool norm;
  } good[] = {{BASE "max_grad_norm: 0\nexpert: {update: backward}\n", FLAP_UPDATE_BACKWARD, false},
              {BASE "expert: {update: backward}\n", FLAP_UPDATE_BACKWARD, true},
              {BASE "fp16: true\nbf16: false\nexpert: {update: backward}\n", FLAP_UPDATE_BACKWARD, true},
              {BASE "max_grad_norm: 0\nfp16: true\nbf16: false\n", FLAP_UPDATE_AUTO, true},
              {BASE "expert: {clip: sweep, update: sweep}\n", FLAP_UPDATE_SWEEP, true},
              {BASE "expert: {clip: fold}\n", FLAP_UPDATE_FOLD, true}};
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    ck_assert_int_eq(load(good[i].text), FLAP_OK);
    ck_assert_int_eq(flap_run_config_update(&config.expert), good[i].update);
    ck_assert(flap_run_config_needs_norm(&config) == good[i].norm);
    flap_run_config_close(&config);
  }
}
END_TEST

START_TEST(config_saved_tensors_are_words_and_recompute_saves_none) {
  ck_assert_int_eq(load(BASE "expert: {saved: all_but_mlp}\nactivations: keep\n"), FLAP_OK);
  ck_assert_int_eq(config.expert.saved, FLAP_RUN_SAVED_ALL_BUT_MLP);
  flap_run_config_close(&config);
  ck_assert_int_eq(load(BASE "activations: recompute\nexpert: {saved: auto}\n"), FLAP_OK);
  ck_assert_int_eq(config.expert.saved, FLAP_RUN_SAVED_AUTO);
  flap_run_config_close(&config);
  ck_assert_int_eq(load(BASE), FLAP_OK);
  ck_assert_int_eq(config.expert.matmul, FLAP_RUN_MATMUL_TUNED);
  flap_run_config_close(&config);
  refuse_base("expert: {matmul: best}\n", "run.yaml:4: expert.matmul: wanted one of tuned, first");
  refuse_base("expert: {saved: some}\n", "run.yaml:4: expert.saved: wanted one of auto, attention, all_but_mlp, all");
  refuse_base("activations: recompute\nexpert: {saved: attention}\n",
              "run.yaml:5: expert.saved: attention contradicts recomputing all activations");
  refuse_base("gradient_checkpointing: true\nexpert: {saved: all}\n",
              "run.yaml:5: expert.saved: all contradicts recomputing all activations");
}
END_TEST

START_TEST(config_fp32_run_has_fp32_gradients) {
  ck_assert_int_eq(load(BASE "bf16: false\n"), FLAP_OK);
  ck_assert_int_eq(config.gradient_dtype, FLAP_F32);
  ck_assert_int_eq(flap_run_config_dtype(&config), FLAP_F32);
  flap_run_config_close(&config);
  refuse_base("bf16: false\ngradient_dtype: bf16\n", "run.yaml:5: gradient_dtype: must be fp32");
}
END_TEST

START_TEST(config_eval_strategy_follows_hugging_face) {
  ck_assert_int_eq(load(BASE "eval_strategy: steps\nval_size: 1\nlogging_steps: 7\n"), FLAP_OK);
  ck_assert_uint_eq(config.eval_steps, 7);
  flap_run_config_close(&config);
  ck_assert_int_eq(load(BASE "evaluation_strategy: no\nval_size: 1\neval_steps: 7\n"), FLAP_OK);
  ck_assert_uint_eq(config.eval_steps, 0);
  flap_run_config_close(&config);
  refuse_base("eval_strategy: epoch\n", "run.yaml:4: eval_strategy: epoch is not supported yet");
  refuse_base("eval_strategy: no\nevaluation_strategy: no\n", "evaluation_strategy: given beside eval_strategy");
  refuse_base("eval_steps: 5\n", "run.yaml:4: eval_steps: nothing is held out");
}
END_TEST

START_TEST(config_paths_begin_at_home) {
  const char *const overrides[] = {"output_dir=~/runs/first", "dataset=[~/a.txt, ~b.txt, a/~/c.txt]",
                                   "disk={path: '~', size: 1GiB}", "tokenizer=~/t"};
  ck_assert_int_eq(setenv("HOME", "/home/me", 1), 0);
  ck_assert_int_eq(load_base("", overrides, 4), FLAP_OK);
  ck_assert_str_eq(config.output_dir, "/home/me/runs/first");
  ck_assert_str_eq(config.dataset[0], "/home/me/a.txt");
  ck_assert_str_eq(config.dataset[1], "~b.txt");
  ck_assert_str_eq(config.dataset[2], "a/~/c.txt");
  ck_assert_str_eq(config.disk[0].path, "/home/me");
  ck_assert_str_eq(config.tokenizer, "/home/me/t");
  flap_run_config_close(&config);
  ck_assert_int_eq(unsetenv("HOME"), 0);
  refuse_base("tokenizer: ~/t\n", "run.yaml:4: tokenizer: ~ stands for the home folder, but HOME is not set");
}
END_TEST

START_TEST(config_unknown_key_names_the_nearest) {
  refuse_base("learning_rat: 1\n", "run.yaml:4: learning_rat: unknown key; did you mean learning_rate?");
  refuse_base("gradient_accumulation: 1\n", "did you mean gradient_accumulation_steps?");
  refuse_base("cutoff-len: 1\n", "did you mean cutoff_len?");
  refuse_base("expert: {clipp: fold}\n", "run.yaml:4: expert.clipp: unknown key; did you mean expert.clip?");
  refuse_base("qqqqqqqqq: 1\n", "run.yaml:4: qqqqqqqqq: unknown key; flap train --help-config");
  refuse_base("expert.clip: fold\n", "run.yaml:4: expert.clip: unknown key");
  refuse_override("vrma=1GiB", "command line: vrma: unknown key; did you mean vram?");
  refuse_override("expert.thread=1", "command line: expert.thread: unknown key; did you mean expert.threads?");
  refuse_base("\"bad\\nkey\": 1\n", "run.yaml:4: bad?key: unknown key");
}
END_TEST

START_TEST(config_wrong_type_says_what_is_wanted) {
  refuse_base("learning_rate: fast\n", "run.yaml:4: learning_rate: wanted a number, found fast");
  refuse_base("learning_rate: '1e-4'\n", "learning_rate: wanted a number, found \"1e-4\"");
  refuse_base("learning_rate: .nan\n", "learning_rate: wanted a number, found .nan");
  refuse_base("learning_rate: inf\n", "learning_rate: wanted a number, found inf");
  refuse_base("learning_rate: 1e999\n", "learning_rate: wanted a number, found 1e999");
  refuse_base("learning_rate: 0x10\n", "learning_rate: wanted a number, found 0x10");
  refuse_base("\n\nmax_steps: 1.5\n", "run.yaml:6: max_steps: wanted a whole number");
  refuse_base("max_steps: -2\n", "max_steps: wanted a whole number, or -1, found -2");
  refuse_base("logging_steps: -1\n", "logging_steps: wanted a whole number, found -1");
  refuse_base("cutoff_len: 4294967296\n", "cutoff_len: 4294967296 is more than 4294967295");
  refuse_base("seed: 18446744073709551615\n", "seed: 18446744073709551615 is more than 9223372036854775807");
  refuse_base("max_steps: 9223372036854775808\n", "max_steps: 9223372036854775808 is more than 9223372036854775807");
  refuse_base("seed: 99999999999999999999\n", "seed: 99999999999999999999 is more than 9223372036854775807");
  refuse_base("bf16: maybe\n", "bf16: wanted true or false, found maybe");
  refuse_base("bf16: [true]\n", "bf16: wanted true or false, found a list");
  refuse_base("lr_scheduler_type: polynomial\n",
              "lr_scheduler_type: wanted one of linear, cosine, constant, constant_with_warmup, found polynomial");
  refuse_base("vram: 24 bananas\n",
              "vram: wanted a size (24GiB, 512 MB), max or min, found 24 bananas: \"24 bananas\" has no "
              "known unit");
  refuse_base("vram: 9000000000TiB\n", "\"9000000000TiB\" is too large for a size");
  refuse_base("vram: {size: 1}\n", "vram: wanted a size (24GiB, 512 MB), max or min, found a mapping");
  refuse_base("expert: {page_bytes: large}\n", "expert.page_bytes: wanted a size (64KiB, 1 MiB), found large");
  refuse_base("expert: fold\n", "expert: wanted a mapping, such as {clip: fold}");
  refuse_base("tokenizer: [a]\n", "tokenizer: wanted a path, found a list");
  refuse_base("export: sometimes\n", "export: wanted one of final, none, found sometimes");
  refuse("model: llama\n", "run.yaml:1: model: wanted a mapping of config.json keys, found llama");
  refuse("dataset: [a, [b]]\n", "run.yaml:1: dataset: wanted a path, a glob, or a list of them, found a list");
  refuse("dataset: {a: b}\n", "dataset: wanted a path, a glob, or a list of them, found a mapping");
  refuse_override("learning_rate=fast", "command line: learning_rate: wanted a number, found fast");
  refuse_override("warmup_steps=0.1", "command line: warmup_steps: wanted a whole number, found 0.1");
}
END_TEST

START_TEST(config_disk_errors_name_the_entry) {
  refuse_base("disk:\n  - path: /a\n    size: 1GB\n  - size: 1GB\n", "run.yaml:7: disk: an entry without a path");
  refuse_base("disk:\n  - path: /a\n    sice: 1GB\n",
              "run.yaml:6: disk: unknown key sice: an entry has path, size and weight");
  refuse_base("disk:\n  - path: /a\n    size: big\n", "run.yaml:6: disk.size: wanted a size");
  refuse_base("disk: [/a, /b, /a]\n", "run.yaml:4: disk: /a is given twice");
  refuse_base("disk: {path: /a, size: 0}\n", "run.yaml:4: disk: must be more than 0 bytes");
  refuse_base("disk: {path: /a, weight: heavy}\n", "run.yaml:4: disk.weight: wanted a number");
  refuse_base("disk: {path: /a, weight: 0}\n", "run.yaml:4: disk.weight: must be above 0");
  refuse_base("disk: [{path: /a, weight: 2}, /b]\n", "run.yaml:4: disk: /a has a weight and /b has none");
  refuse_base("disk: [/a, {path: /b, weight: 2}]\n", "run.yaml:4: disk: /b has a weight and /a has none");
  refuse_base("disk: [[]]\n", "disk: wanted a list of {path, size, weight}, a path, or a list of paths, found a list");
  refuse_base("disk: [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]\n", "disk: more than 16 entries");
}
END_TEST

START_TEST(config_what_is_not_supported_says_what_is) {
  refuse_base("optim: sgd\n", "run.yaml:4: optim: wanted adamw or adamw_8bit, found sgd");
  refuse_base("optim: 8\n", "run.yaml:4: optim: wanted adamw or adamw_8bit, found 8");
  refuse_base("packing: false\n", "run.yaml:4: packing: false is not supported yet");
  refuse_base("neat_packing: true\n", "run.yaml:4: neat_packing: true is not supported yet: use packing: true");
  refuse_base("template: llama3\n", "run.yaml:4: template: llama3: chat templates are not supported yet");
  refuse_base("report_to: wandb\n", "run.yaml:4: report_to: wandb is not supported: use none");
  refuse_base("report_to: [none, wandb]\n", "report_to: none is not supported");
}
END_TEST

START_TEST(config_fp16_alone_takes_the_place_of_bf16) {
  ck_assert_msg(load(BASE "fp16: true\n") == FLAP_OK, "%s", flap_error_message());
  ck_assert_int_eq(flap_run_config_dtype(&config), FLAP_F16);
  ck_assert_int_eq(config.gradient_dtype, FLAP_BF16);
  ck_assert(config.fp16_init_scale == 65536 && config.fp16_min_scale == 1 && config.fp16_growth_interval == 2000);
  flap_run_config_close(&config);
  ck_assert_int_eq(load(BASE "fp16: true\nbf16: false\ngradient_dtype: fp32\nfp16_init_scale: 1024\n"
                             "fp16_min_scale: 0.5\nfp16_growth_interval: 10\n"),
                   FLAP_OK);
  ck_assert_int_eq(flap_run_config_dtype(&config), FLAP_F16);
  ck_assert_int_eq(config.gradient_dtype, FLAP_F32);
  ck_assert(config.fp16_init_scale == 1024 && config.fp16_min_scale == 0.5 && config.fp16_growth_interval == 10);
  flap_run_config_close(&config);
  refuse_base("bf16: true\nfp16: true\n", "run.yaml:5: fp16: contradicts bf16");
  refuse_base("fp16: true\nfp16_init_scale: 1000\n", "run.yaml:5: fp16_init_scale: 1000 must be a power of two");
  refuse_base("fp16: true\nfp16_init_scale: .inf\n", "run.yaml:5: fp16_init_scale: ");
  refuse_base("fp16: true\nfp16_min_scale: 0\n", "run.yaml:5: fp16_min_scale: 0 must be a power of two");
  refuse_base("fp16: true\nfp16_init_scale: 2\nfp16_min_scale: 4\n",
              "run.yaml:6: fp16_min_scale: 4 is more than fp16_init_scale, 2");
  refuse_base("fp16: true\nfp16_growth_interval: 0\n", "run.yaml:5: fp16_growth_interval: must be at least 1");
}
END_TEST

START_TEST(config_ranges_and_contradictions_name_line_and_key) {
  refuse("output_dir: o\ndataset: d\n", "run.yaml: model: missing");
  refuse(BASE "model_name_or_path: m\n", "run.yaml:4: model_name_or_path: contradicts model");
  refuse("model: {}\ndataset: d\n", "run.yaml: output_dir: missing");
  refuse("model: {}\noutput_dir: d\n", "run.yaml: dataset: missing");
  refuse_base("learning_rate: -1\n", "run.yaml:4: learning_rate: -1 must be between 0 and 1e+06");
  refuse_base("learning_rate: 1e30\n", "run.yaml:4: learning_rate: 1e+30 must be between 0 and 1e+06");
  refuse_base("warmup_ratio: 2\n", "run.yaml:4: warmup_ratio: 2 must be between 0 and 1");
  refuse_base("adam_beta1: 1\n", "run.yaml:4: adam_beta1: 1 must be at least 0 and below 1");
  refuse_base("adam_beta2: -0.5\n", "run.yaml:4: adam_beta2:");
  refuse_base("adam_epsilon: 0\n", "run.yaml:4: adam_epsilon:");
  refuse_base("weight_decay: -1\n", "run.yaml:4: weight_decay:");
  refuse_base("max_grad_norm: -1\n", "run.yaml:4: max_grad_norm:");
  refuse_base("num_train_epochs: 0\n", "run.yaml:4: num_train_epochs: 0 must be above 0");
  refuse_base("num_train_epochs: 1e300\n", "run.yaml:4: num_train_epochs: 1e+300 must be above 0 and at most 1e+09");
  refuse_base("val_size: -1\n", "run.yaml:4: val_size:");
  refuse_base("val_size: 1.5\n", "run.yaml:4: val_size: 1.5 must be a whole number of sequences");
  refuse_base("cutoff_len: 0\n", "run.yaml:4: cutoff_len:");
  refuse_base("per_device_train_batch_size: 0\n", "run.yaml:4: per_device_train_batch_size:");
  refuse_base("gradient_accumulation_steps: 0\n", "run.yaml:4: gradient_accumulation_steps:");
  refuse_base("per_device_train_batch_size: 4000000000\ngradient_accumulation_steps: 4000000000\n",
              "run.yaml:5: gradient_accumulation_steps: 4000000000 micro-batches");
  refuse_base("cutoff_len: 1\nper_device_train_batch_size: 4194304\ngradient_accumulation_steps: 1024\n",
              "run.yaml:6: gradient_accumulation_steps: 1024 micro-batches of 4194304 sequences");
  refuse_base("cutoff_len: 65536\nper_device_train_batch_size: 32768\n",
              "run.yaml:5: per_device_train_batch_size: 32768 sequences of 65536 tokens (cutoff_len) are more than the "
              "2147483647 tokens");
  refuse_base("logging_steps: 0\n", "run.yaml:4: logging_steps:");
  refuse_base("save_steps: 0\n", "run.yaml:4: save_steps:");
  refuse_base("vram: 0\n", "run.yaml:4: vram: must be more than 0 bytes");
  refuse_base("gradient_checkpointing: true\nactivations: keep\n",
              "run.yaml:4: gradient_checkpointing: true contradicts");
  refuse_base("expert: {page_bytes: 5000}\n", "run.yaml:4: expert.page_bytes: 5000 must be a power of two");
  refuse_base("expert: {page_bytes: 8MiB}\n", "run.yaml:4: expert.page_bytes:");
  refuse_base("expert: {slice_bytes: 65MiB}\n", "run.yaml:4: expert.slice_bytes:");
  refuse_base("expert: {threads: 257}\n", "run.yaml:4: expert.threads: 257 is more than 256");
  refuse_base("expert: {staging_bytes: 4KiB}\n", "run.yaml:4: expert.staging_bytes:");
  refuse_base("expert:\n  clip: fold\n  group_micro_batches: 2\n",
              "run.yaml:6: expert.group_micro_batches: 2 is more than the 1 micro-batches");
  refuse_override("adam_beta1=7", "command line: adam_beta1: 7 must be");
}
END_TEST

START_TEST(config_broken_yaml_names_the_line) {
  refuse("a: [1, 2\n", "run.yaml:2: not YAML:");
  refuse("a: b: c\n", "run.yaml:1: not YAML:");
  refuse("- a\n- b\n", "run.yaml: wanted lines of the form key: value");
  refuse("just words\n", "run.yaml: wanted lines of the form key: value");
  refuse("\x01\x02", "run.yaml: byte 0: not text");
  refuse("\xff\xfe\xfd", "run.yaml");
  refuse("seed: 1\nvram: 1GiB\nseed: 2\n", "run.yaml:3: seed: given twice (first on line 1)");
  refuse("model: {a: 1, b: 2, a: 3}\n", "run.yaml:1: a: given twice");
  refuse("expert:\n  clip: fold\n  clip: sweep\n", "run.yaml:3: clip: given twice (first on line 2)");
  refuse("seed: &a 1\n", "run.yaml:1: anchors and aliases");
  refuse("model: &a {x: 1}\n", "run.yaml:1: anchors and aliases");
  refuse("seed: *a\n", "anchors and aliases");
  refuse("seed: !!int 1\n", "run.yaml:1: tags (!) are not supported");
  refuse("seed: 1\n---\nseed: 2\n", "run.yaml:2: a second document starts here");
  refuse("[a]: b\n", "run.yaml:1: a key must be a word");
  refuse("output_dir: \"a\\0b\"\n", "run.yaml:1: a NUL byte");
  refuse_override("seed", "command line: seed: not an override: write key=value");
  refuse_override("=1", "not an override");
  refuse_override("a..b=1", "not a key");
  refuse_override(".a=1", "not a key");
  refuse_override("expert.=1", "not a key");
  refuse_override("dataset=[a", "not YAML");
}
END_TEST

START_TEST(config_hostile_sizes_are_refused_early) {
  size_t bytes = (size_t)1 << 21;
  char *text = malloc(bytes + 1);
  memset(text, '[', bytes);
  memcpy(text, "a: ", 3);
  text[bytes] = '\0';
  refuse(text, "run.yaml: more than 1048576 bytes");
  text[1000000] = '\0';
  refuse(text, "nested more than 16 deep");
  for (size_t i = 0; i < 50000; i++)
    memcpy(text + i * 5, "- x\n ", 5);
  memcpy(text, "-  \n ", 5);
  text[250000] = '\0';
  refuse(text, "run.yaml");
  memset(text, 'x', 200000);
  memcpy(text, "output_dir: ", 12);
  text[200000] = '\0';
  refuse(text, "run.yaml:1: output_dir: longer than 4095 bytes");
  strcpy(text, "model: [");
  for (size_t i = 0; i < 30000; i++)
    strcpy(text + 8 + 2 * i, "1,");
  strcat(text, "]\n");
  refuse(text, "run.yaml:1: more than 20000 values");
  free(text);
}
END_TEST

START_TEST(config_use_takes_the_trained_model) {
  const char *const overrides[] = {"model_name_or_path=other", "tokenizer=bytes"};
  static const char text[] = "model: {model_type: llama}\ntokenizer: tok\noutput_dir: out\n";
  ck_assert_int_eq(flap_config_load_text("run.yaml", text, sizeof text - 1, NULL, 0, FLAP_CONFIG_USE, &config),
                   FLAP_OK);
  ck_assert_str_eq(config.model_name_or_path, "out");
  ck_assert_str_eq(config.tokenizer, "");
  ck_assert_ptr_null(config.model);
  flap_run_config_close(&config);
  ck_assert_int_eq(flap_config_load_text("run.yaml", text, sizeof text - 1, overrides, 2, FLAP_CONFIG_USE, &config),
                   FLAP_OK);
  ck_assert_str_eq(config.model_name_or_path, "other");
  ck_assert_str_eq(config.tokenizer, "bytes");
  flap_run_config_close(&config);
}
END_TEST

START_TEST(config_missing_file_is_named) {
  ck_assert_int_eq(flap_config_load("/nonexistent/run.yaml", NULL, 0, FLAP_CONFIG_TRAIN, &config), FLAP_NOT_FOUND);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "/nonexistent/run.yaml"));
  ck_assert_int_eq(flap_config_load("/", NULL, 0, FLAP_CONFIG_TRAIN, &config), FLAP_INVALID);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "a folder"));
}
END_TEST

START_TEST(config_reference_lists_every_key_with_its_default) {
  char *text = NULL;
  size_t bytes = 0;
  FILE *out = open_memstream(&text, &bytes);
  flap_config_print_reference(out);
  (void)fclose(out);
  for (size_t i = 0; flap_config_key_at(i); i++) {
    char line[96];
    if (!flap_config_key_at(i)->name)
      continue;
    (void)snprintf(line, sizeof line, "\n  %s: ", flap_config_key_at(i)->name);
    ck_assert_msg(strstr(text, line) != NULL, "%s", line);
  }
  ck_assert_ptr_nonnull(strstr(text, "learning_rate: number (default: 5e-05)"));
  ck_assert_ptr_nonnull(
      strstr(text, "lr_scheduler_type: linear|cosine|constant|constant_with_warmup (default: linear)"));
  ck_assert_ptr_nonnull(strstr(text, "expert.page_bytes: size (default: auto)"));
  ck_assert_ptr_nonnull(strstr(text, "export: final|none (default: final)"));
  for (const char *line = text; *line; line += strcspn(line, "\n") + (line[strcspn(line, "\n")] == '\n'))
    ck_assert_msg(strcspn(line, "\n") <= 120, "%.40s", line);
  free(text);
}
END_TEST

/* Bytes of a sound file changed, dropped, repeated and joined: whatever comes out, it is a configuration or an error
 * with a text, and nothing is leaked or read out of bounds (which the sanitizers see). */
START_TEST(config_mutated_bytes_never_break_the_reader) {
  static const char seed_text[] =
      BASE "disk:\n  - {path: /a, size: 1GiB}\nexpert: {clip: fold}\nlearning_rate: 1e-4\n"
           "vram: '7 MiB'\nreport_to: [none]\nmodel_name_or_path: \"x\\ty\"\n? a\n: |\n  b\n";
  static const char alphabet[] = "[]{}:,-#&*!|>'\"%@`?~ \n\tabcdefe0123456789.\\\x80\xff";
  uint64_t state = 12345;
  for (uint32_t round = 0; round < 20000; round++) {
    char text[512];
    size_t bytes = sizeof seed_text - 1;
    memcpy(text, seed_text, bytes);
    for (uint32_t edits = 1 + round % 7; edits > 0; edits--) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      size_t at = (size_t)(state >> 33) % bytes;
      char c = alphabet[(size_t)(state >> 20) % (sizeof alphabet - 1)];
      if (state >> 62 == 0 && bytes < sizeof text - 1) {
        memmove(text + at + 1, text + at, bytes - at);
        text[at] = c;
        bytes++;
      } else if (state >> 62 == 1 && bytes > 1) {
        memmove(text + at, text + at + 1, bytes - at - 1);
        bytes--;
      } else {
        text[at] = c;
      }
    }
    flap_error_clear();
    const char *const overrides[] = {text};
    text[bytes] = '\0';
    flap_status status = flap_config_load_text("run.yaml", text, bytes, round % 5 == 0 ? overrides : NULL,
                                               round % 5 == 0, FLAP_CONFIG_TRAIN, &config);
    if (status == FLAP_OK)
      flap_run_config_close(&config);
    else
      ck_assert_str_ne(flap_error_message(), "");
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("tools");
  TCase *cases = tcase_create("config");
  tcase_set_timeout(cases, 300);
  tcase_add_test(cases, config_minimal_has_defaults);
  tcase_add_test(cases, config_full_file_fills_every_field);
  tcase_add_test(cases, config_null_and_later_overrides_take_defaults_back);
  tcase_add_test(cases, config_resume_has_words_beside_folders);
  tcase_add_test(cases, config_overrides_reach_into_mappings);
  tcase_add_test(cases, config_saved_tensors_are_words_and_recompute_saves_none);
  tcase_add_test(cases, config_updates_happen_when_one_key_says);
  tcase_add_test(cases, config_fp32_run_has_fp32_gradients);
  tcase_add_test(cases, config_eval_strategy_follows_hugging_face);
  tcase_add_test(cases, config_paths_begin_at_home);
  tcase_add_test(cases, config_unknown_key_names_the_nearest);
  tcase_add_test(cases, config_wrong_type_says_what_is_wanted);
  tcase_add_test(cases, config_disk_errors_name_the_entry);
  tcase_add_test(cases, config_what_is_not_supported_says_what_is);
  tcase_add_test(cases, config_fp16_alone_takes_the_place_of_bf16);
  tcase_add_test(cases, config_ranges_and_contradictions_name_line_and_key);
  tcase_add_test(cases, config_broken_yaml_names_the_line);
  tcase_add_test(cases, config_hostile_sizes_are_refused_early);
  tcase_add_test(cases, config_use_takes_the_trained_model);
  tcase_add_test(cases, config_missing_file_is_named);
  tcase_add_test(cases, config_reference_lists_every_key_with_its_default);
  tcase_add_test(cases, config_mutated_bytes_never_break_the_reader);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
