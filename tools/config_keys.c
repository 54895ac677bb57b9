#include "tools/config_keys.h"

#include "base/nearest.h"
#include "base/units.h"

#include <stdint.h>
#include <string.h>

#define COLUMNS 100
#define FIELD(field) offsetof(flap_run_config, field)
#define KEYS (sizeof keys / sizeof keys[0])

static const flap_config_word scheduler_words[] = {
    {"linear", FLAP_SCHEDULER_LINEAR},
    {"cosine", FLAP_SCHEDULER_COSINE},
    {"constant", FLAP_SCHEDULER_CONSTANT},
    {"constant_with_warmup", FLAP_SCHEDULER_CONSTANT_WITH_WARMUP},
    {NULL, 0},
};
static const flap_config_word strategy_words[] = {
    {"no", FLAP_STRATEGY_NO}, {"steps", FLAP_STRATEGY_STEPS}, {"epoch", FLAP_STRATEGY_EPOCH}, {NULL, 0}};
static const flap_config_word gradient_words[] = {
    {"bf16", FLAP_BF16}, {"fp32", FLAP_F32}, {"bfloat16", FLAP_BF16}, {"float32", FLAP_F32}, {NULL, 0}};
static const flap_config_word activation_words[] = {{"auto", FLAP_ACTIVATIONS_AUTO},
                                                    {"keep", FLAP_ACTIVATIONS_KEEP},
                                                    {"offload", FLAP_ACTIVATIONS_OFFLOAD},
                                                    {"recompute", FLAP_ACTIVATIONS_RECOMPUTE},
                                                    {NULL, 0}};
static const flap_config_word device_words[] = {
    {"auto", FLAP_RUN_DEVICE_AUTO}, {"cpu", FLAP_RUN_DEVICE_CPU}, {"cuda", FLAP_RUN_DEVICE_CUDA}, {NULL, 0}};
static const flap_config_word update_words[] = {{"auto", FLAP_UPDATE_AUTO},
                                                {"fold", FLAP_UPDATE_FOLD},
                                                {"sweep", FLAP_UPDATE_SWEEP},
                                                {"backward", FLAP_UPDATE_BACKWARD},
                                                {NULL, 0}};
static const flap_config_word clip_words[] = {
    {"auto", FLAP_CLIP_AUTO}, {"fold", FLAP_CLIP_FOLD}, {"sweep", FLAP_CLIP_SWEEP}, {NULL, 0}};
static const flap_config_word optimizer_words[] = {{"auto", FLAP_OPTIMIZER_AUTO},
                                                   {"gpu", FLAP_OPTIMIZER_GPU},
                                                   {"cpu", FLAP_OPTIMIZER_CPU},
                                                   {"split", FLAP_OPTIMIZER_SPLIT},
                                                   {NULL, 0}};
static const flap_config_word saved_words[] = {{"auto", FLAP_RUN_SAVED_AUTO},
                                               {"attention", FLAP_RUN_SAVED_ATTENTION},
                                               {"all_but_mlp", FLAP_RUN_SAVED_ALL_BUT_MLP},
                                               {"all", FLAP_RUN_SAVED_ALL},
                                               {"everything", FLAP_RUN_SAVED_EVERYTHING},
                                               {NULL, 0}};
static const flap_config_word recompute_words[] = {
    {"auto", FLAP_RECOMPUTE_AUTO}, {"segments", FLAP_RECOMPUTE_SEGMENTS}, {"layers", FLAP_RECOMPUTE_LAYERS}, {NULL, 0}};
static const flap_config_word matmul_words[] = {
    {"tuned", FLAP_RUN_MATMUL_TUNED}, {"first", FLAP_RUN_MATMUL_FIRST}, {NULL, 0}};
static const flap_config_word io_words[] = {
    {"auto", FLAP_RUN_IO_AUTO}, {"io_uring", FLAP_RUN_IO_URING}, {"threads", FLAP_RUN_IO_THREADS}, {NULL, 0}};
static const flap_config_word compression_words[] = {{"auto", FLAP_COMPRESSION_AUTO},
                                                     {"off", FLAP_COMPRESSION_OFF},
                                                     {"lz4", FLAP_COMPRESSION_LZ4},
                                                     {"zstd", FLAP_COMPRESSION_ZSTD},
                                                     {NULL, 0}};
static const flap_config_word states_words[] = {
    {"auto", FLAP_RUN_STATES_AUTO}, {"copied", FLAP_RUN_STATES_COPIED}, {NULL, 0}};
static const flap_config_word export_words[] = {{"final", true}, {"none", false}, {NULL, 0}};

/* A key without a kind starts a section of the reference. */
#define SECTION(title) \
  { .help = title }
#define PLAIN(key, key_kind, field, text) \
  { .name = key, .kind = FLAP_CONFIG_##key_kind, .offset = FIELD(field), .help = text }
#define WORD(key, field, list, text) \
  { .name = key, .kind = FLAP_CONFIG_WORD, .offset = FIELD(field), .words = list, .help = text }
#define CUSTOM(key, setter, want, dflt, text) \
  { .name = key, .kind = FLAP_CONFIG_CUSTOM, .set = setter, .wanted = want, .fallback = dflt, .help = text }

static const flap_config_key keys[] = {
    SECTION("Model and data"),
    CUSTOM("model", flap_config_set_model, "a mapping of config.json keys", "none",
           "Train from scratch: the keys of a Hugging Face config.json (model_type, hidden_size, ...)."),
    PLAIN("model_name_or_path", PATH, model_name_or_path,
          "Train further: a Hugging Face folder with config.json and safetensors. Nothing is downloaded."),
    PLAIN("tokenizer", PATH, tokenizer,
          "`bytes` (one token per byte), a tokenizer.json, or a folder with one. By default that of the model folder."),
    CUSTOM("dataset", flap_config_set_dataset, "a path, a glob, or a list of them", "none",
           "Text (.txt), JSON lines with a `text` key (.jsonl), or llm.c token shards (.bin). A file that is "
           "named twice is read once."),
    PLAIN("val_size", NUMBER, val_size,
          "Held out for evaluation: below 1 a share of the sequences, otherwise a number of them; 0 for none. They are "
          "the last of the text, its files in the order of their paths."),
    PLAIN("cutoff_len", U32, cutoff_len,
          "Tokens per sequence. flap eval: by default no more than the model has positions."),
    CUSTOM("packing", flap_config_set_packing, "true", "true",
           "Documents, each with the tokenizer's begin token (if its post-processor has one) and end token, are joined "
           "and "
           "cut into full sequences; attention crosses them. The only way yet."),
    CUSTOM("neat_packing", flap_config_set_packing, "false", "false",
           "true (attention stays within a document) is not supported yet."),
    CUSTOM("template", flap_config_set_template, "none", "none",
           "Chat templates are not supported yet: text is trained on as it stands."),

    SECTION("Training"),
    PLAIN("per_device_train_batch_size", U32, per_device_train_batch_size,
          "Sequences per micro-batch. Part of the numbers: the planner never changes it."),
    PLAIN("gradient_accumulation_steps", U32, gradient_accumulation_steps, "Micro-batches per optimizer step."),
    CUSTOM("max_steps", flap_config_set_max_steps, "a whole number, or -1", "-1",
           "Optimizer steps to train for; -1 or 0 leaves it to num_train_epochs."),
    PLAIN("num_train_epochs", NUMBER, num_train_epochs, "Passes over the training sequences; may be a fraction."),
    PLAIN("learning_rate", NUMBER, learning_rate, "The highest learning rate of the schedule."),
    WORD("lr_scheduler_type", lr_scheduler_type, scheduler_words, "How the learning rate falls after the warm-up."),
    PLAIN("warmup_steps", U64, warmup_steps,
          "Steps over which the learning rate rises from 0; wins over warmup_ratio."),
    PLAIN("warmup_ratio", NUMBER, warmup_ratio, "The same as a share of all steps."),
    CUSTOM("optim", flap_config_set_optim, "adamw or adamw_8bit", "adamw",
           "`adamw` (`adamw_torch` is the same) keeps moments in fp32; `adamw_8bit` (`adamw_bnb_8bit` is taken as it) "
           "in 8 bits, norms' and biases' too, a little more than 2 bytes for each weight instead of 8, but the "
           "embedding's in fp32. Master weights "
           "stay fp32 in both."),
    PLAIN("weight_decay", NUMBER, weight_decay, "Decoupled weight decay; not on norms and biases."),
    PLAIN("adam_beta1", NUMBER, adam_beta1, "Decay of the first moment."),
    PLAIN("adam_beta2", NUMBER, adam_beta2, "Decay of the second moment."),
    PLAIN("adam_epsilon", NUMBER, adam_epsilon, "Added to the root of the second moment."),
    PLAIN("max_grad_norm", NUMBER, max_grad_norm, "Gradients are scaled down to this global norm; 0 for no clipping."),
    PLAIN(
        "bf16", BOOL, bf16,
        "bfloat16 weights and activations beside exact fp32 states. With bf16 and fp16 both false everything is fp32."),
    PLAIN(
        "fp16", BOOL, fp16,
        "float16 weights and activations beside fp32 master weights, with dynamic loss scaling: a step that overflows "
        "is skipped, does not count for the learning rate, and halves the scale. In place of bf16."),
    PLAIN("fp16_init_scale", NUMBER, fp16_init_scale, "With fp16, the first loss scale: a power of two."),
    PLAIN("fp16_growth_interval", U64, fp16_growth_interval,
          "With fp16, the loss scale doubles after so many good steps in a row."),
    PLAIN("fp16_min_scale", NUMBER, fp16_min_scale,
          "With fp16, the least loss scale, a power of two: a step that overflows with it ends the run."),
    WORD("gradient_dtype", gradient_dtype, gradient_words,
         "What finished gradients are rounded to, once; until then they are summed in fp32. fp32 where weights are "
         "fp32."),
    WORD("activations", activations, activation_words,
         "What happens to activations between forward and backward; auto leaves it to the planner, tensor by tensor."),
    CUSTOM("gradient_checkpointing", flap_config_set_checkpointing, "true or false", "false",
           "true is `activations: recompute`."),
    PLAIN("seed", U64, seed, "Of the initial weights and of the order of the data."),

    SECTION("Reporting and saving"),
    PLAIN("logging_steps", U64, logging_steps,
          "A line of metrics.jsonl every so many steps; its loss and times are of that step alone, no means."),
    CUSTOM("eval_strategy", flap_config_set_eval, "no or steps", "no",
           "`steps` evaluates every eval_steps steps, `no` at the start and the end only."),
    CUSTOM("evaluation_strategy", flap_config_set_eval, "no or steps", "no", "The older name of eval_strategy."),
    CUSTOM(
        "eval_steps", flap_config_set_eval, "a whole number", "0",
        "Evaluate every so many steps; 0: at the start and the end only. logging_steps with `eval_strategy: steps`."),
    WORD("save_strategy", save_strategy, strategy_words, "When to write a checkpoint that training can continue from."),
    PLAIN("save_steps", U64, save_steps, "With `save_strategy: steps`: a checkpoint every so many steps."),
    PLAIN("save_minutes", NUMBER, save_minutes,
          "A checkpoint also after so many minutes without one, whatever the strategy (but for `no`); 0 for never."),
    PLAIN("save_total_limit", U32, save_total_limit, "Keep so many checkpoints, and delete the oldest; 0 keeps all."),
    PLAIN("save_only_model", BOOL, save_only_model,
          "Checkpoints hold the weights only: smaller, but no resuming from them."),
    PLAIN("output_dir", PATH, output_dir, "Ends as a Hugging Face folder, with checkpoints and metrics beside."),
    PLAIN("overwrite_output_dir", BOOL, overwrite_output_dir,
          "Start anew in an output_dir that holds an earlier run. Beside resume_from_checkpoint: true it has no say."),
    CUSTOM(
        "resume_from_checkpoint", flap_config_set_resume, "true, auto, latest, false or a checkpoint folder", "false",
        "Continue from a checkpoint, bit for bit; true (or latest) takes the newest in output_dir. auto does that too, "
        "starts anew where there is none (and no model), and does nothing where the run is complete: one command for "
        "scripts that start a run again and again."),
    PLAIN("allow_numerics_change", BOOL, allow_numerics_change,
          "Continue although something differs that decides bits (the device, its libraries, the micro-batch, dtypes): "
          "without it such a run is refused."),
    {.name = "export",
     .kind = FLAP_CONFIG_BOOL,
     .offset = FIELD(export_final),
     .words = export_words,
     .help = "Whether output_dir ends with the trained model."},
    CUSTOM("report_to", flap_config_set_report_to, "none", "none",
           "Only none: see metrics.jsonl and trace.json in output_dir."),

    SECTION("The machine"),
    WORD("device", device, device_words,
         "Where to compute: auto is a GPU where flap was built with CUDA and finds one, else the CPU."),
    PLAIN("machine", PATH, machine,
          "For flap plan alone: plans for that machine instead of this one, which need not have a GPU. A preset (flap "
          "plan --list-machines) or a file of figures; its disks are used where `disk` is not given."),
    PLAIN("vram", SIZE, vram,
          "Memory of the device: a size (7MiB, 24 GB), max (what is there less a reserve) or min (the least that "
          "works)."),
    PLAIN("ram", SIZE, ram, "Memory of the host for everything that FLAP keeps there: a size, max or min."),
    CUSTOM("disk", flap_config_set_disk, "a list of {path, size, weight}, a path, or a list of paths", "none",
           "Folders on fast disks for what fits neither, striped over all of them. Size: as above, max by default. "
           "Weight: "
           "what a disk takes beside the others, as far as its size goes; as measured by default."),
    WORD("compression", compression, compression_words,
         "Of what goes to the disks: auto compresses what it finds to save time, as zstd does; zstd and lz4 compress "
         "all that shrinks. Never of the numbers, and the space is the same."),
    PLAIN("ssd_tbw", BYTES, ssd_tbw,
          "What may be written to the disks in all, as the drive's data sheet has it (600TB); flap plan says how many "
          "steps that is."),
    CUSTOM("ssd_budget", flap_config_set_ssd_budget, "a size, or a share of ssd_tbw such as 5%", "none",
           "What this run may write to drives in all, checkpoints and the trained model included, and what it wrote "
           "before "
           "the checkpoint that it goes on from; a run that would write more is refused."),

    SECTION("Expert choices, which FLAP makes otherwise. None of them changes the numbers, but for expert.matmul"),
    PLAIN("expert.segment_layers", U32, expert.segment_layers, "Layers per segment: only inputs of segments are kept."),
    PLAIN("expert.tail_layers", U32, expert.tail_layers,
          "Layers of the last segment, which goes there and back at once: none of it is recomputed or stored."),
    PLAIN("expert.group_micro_batches", U32, expert.group_micro_batches,
          "Micro-batches that pass the layers together."),
    WORD("expert.saved", expert.saved, saved_words,
         "Which activations a layer saves that saves any: attention's result, all but the MLP's, or all."),
    WORD("expert.recompute", expert.recompute, recompute_words,
         "What is computed again at once, where a segment saves nothing: all of it; or a layer, which takes less vram "
         "and one more forward."),
    WORD("expert.update", expert.update, update_words,
         "Update folded into the next forward, swept after the backward, or in the backward: a second one, where "
         "gradients are clipped or scaled."),
    WORD("expert.clip", expert.clip, clip_words, "The same as expert.update: fold or sweep."),
    WORD("expert.optimizer", expert.optimizer, optimizer_words,
         "Where weights are updated: on the device, by the host's cores, or each of them half."),
    PLAIN("expert.page_bytes", BYTES, expert.page_bytes, "Unit of checksums and homes: a power of two, 4KiB to 4MiB."),
    PLAIN("expert.slice_bytes", BYTES, expert.slice_bytes,
          "Optimizer states move in slices of this size, at most 64MiB."),
    PLAIN("expert.staging_bytes", BYTES, expert.staging_bytes,
          "RAM for what is read from disks ahead and written to them behind; at most half of ram."),
    PLAIN("expert.pool_bytes", BYTES, expert.pool_bytes,
          "RAM in which pages stand compressed instead of on the disk, where compression and budgets allow it; by "
          "itself as much as makes steps shorter. Less than 16KiB: none."),
    WORD("expert.io", expert.io, io_words,
         "How files are read and written; auto is io_uring where the system allows it."),
    PLAIN("expert.threads", U32, expert.threads, "Threads that compute; auto takes all cores."),
    WORD("expert.matmul", expert.matmul, matmul_words,
         "Algorithms of products on a GPU: tuned tries them once for the run's shapes and keeps what was fastest, in "
         "the "
         "cache and in checkpoints; first takes the library's first answer."),
    WORD(
        "expert.checkpoint_states", expert.checkpoint_states, states_words,
        "Optimizer states on disk in checkpoints: auto shares them with the run where output_dir is on the file system "
        "of the one disk; copied writes them once more, as safetensors."),
};

_Static_assert(KEYS <= sizeof((flap_config_reader *)0)->lines / sizeof(uint32_t), "room for a line per key");

static bool is_section(const flap_config_key *key) {
  return !key->name;
}

const flap_config_key *flap_config_key_at(size_t index) {
  return index < KEYS ? &keys[index] : NULL;
}

size_t flap_config_key_find(const char *name) {
  for (size_t i = 0; i < KEYS; i++)
    if (!is_section(&keys[i]) && strcmp(keys[i].name, name) == 0)
      return i;
  return SIZE_MAX;
}

const char *flap_config_key_nearest(const char *name, const char *prefix) {
  const char *names[KEYS];
  size_t count = 0;
  for (size_t i = 0; i < KEYS; i++)
    if (!is_section(&keys[i]) && (!prefix || strncmp(keys[i].name, prefix, strlen(prefix)) == 0))
      names[count++] = keys[i].name;
  if (!prefix)
    names[count++] = "expert";
  return flap_nearest_word(name, names, count);
}

char *flap_config_words(const flap_config_word *words, const char *separator, char *buffer, size_t buffer_bytes) {
  size_t used = 0;
  buffer[0] = '\0';
  for (; words->text && used < buffer_bytes; words++) {
    int n = snprintf(buffer + used, buffer_bytes - used, "%s%s", used ? separator : "", words->text);
    used += n > 0 ? (size_t)n : 0;
  }
  return buffer;
}

/* ---- the reference -------------------------------------------------------------------------------------- */

static const char *size_text(flap_size size, char *buffer, size_t buffer_bytes) {
  if (size.kind != FLAP_SIZE_BYTES)
    return size.kind == FLAP_SIZE_MAX ? "max" : "min";
  return flap_units_format_bytes(size.bytes, buffer, buffer_bytes);
}

static const char *default_text(const flap_config_key *key, const flap_run_config *defaults, char *buffer,
                                size_t bytes) {
  const char *field = (const char *)defaults + key->offset;
  bool expert = strncmp(key->name, "expert.", 7) == 0;
  uint32_t u32 = 0;
  uint64_t u64 = 0;
  double number = 0;
  int word = 0;
  switch (key->kind) {
  case FLAP_CONFIG_U32:
    memcpy(&u32, field, sizeof u32);
    (void)snprintf(buffer, bytes, "%u", u32);
    return expert && u32 == 0 ? "auto" : buffer;
  case FLAP_CONFIG_U64:
    memcpy(&u64, field, sizeof u64);
    (void)snprintf(buffer, bytes, "%llu", (unsigned long long)u64);
    return buffer;
  case FLAP_CONFIG_NUMBER:
    memcpy(&number, field, sizeof number);
    (void)snprintf(buffer, bytes, "%g", number);
    return buffer;
  case FLAP_CONFIG_BOOL:
    if (key->words)
      return *(const bool *)field ? key->words[0].text : key->words[1].text;
    return *(const bool *)field ? "true" : "false";
  case FLAP_CONFIG_PATH:
    return field[0] ? field : "none";
  case FLAP_CONFIG_WORD:
    memcpy(&word, field, sizeof word);
    for (const flap_config_word *w = key->words; w->text; w++)
      if (w->value == word)
        return w->text;
    return "?";
  case FLAP_CONFIG_SIZE:
    return size_text(*(const flap_size *)(const void *)field, buffer, bytes);
  case FLAP_CONFIG_BYTES:
    memcpy(&u64, field, sizeof u64);
    return u64 == 0 ? (expert ? "auto" : "not known") : flap_units_format_bytes(u64, buffer, bytes);
  case FLAP_CONFIG_CUSTOM:
    break;
  }
  return key->fallback;
}

static const char *kind_text(const flap_config_key *key, char *buffer, size_t bytes) {
  if (key->words)
    return flap_config_words(key->words, "|", buffer, bytes);
  switch (key->kind) {
  case FLAP_CONFIG_U32:
  case FLAP_CONFIG_U64:
    return "whole number";
  case FLAP_CONFIG_NUMBER:
    return "number";
  case FLAP_CONFIG_BOOL:
    return "true|false";
  case FLAP_CONFIG_PATH:
    return "path";
  case FLAP_CONFIG_SIZE:
    return "size|max|min";
  case FLAP_CONFIG_BYTES:
    return "size";
  default:
    return key->wanted;
  }
}

static void print_wrapped(FILE *out, const char *text, int indent) {
  int column = 0;
  while (*text) {
    int length = (int)strcspn(text, " ");
    if (column > 0 && column + 1 + length > COLUMNS) {
      fputc('\n', out);
      column = 0;
    }
    column += fprintf(out, "%*s%.*s", column == 0 ? indent : 1, "", length, text);
    text += length;
    text += strspn(text, " ");
  }
  fputc('\n', out);
}

void flap_config_print_reference(FILE *out) {
  static flap_run_config defaults; /* 60 KiB of paths; the command line has one thread */
  flap_run_config_defaults(&defaults);
  fputs("Keys of run.yaml. `flap train run.yaml key=value` overrides one; `null` stands for the default.\n"
        "Sizes: 7MiB, 1.5 GB, 4096 (bytes). Paths start in the current folder, or at ~/ in the home folder.\n"
        "Lists and mappings on a command line: disk='[{path: /mnt/a, size: 1TB}]'.\n",
        out);
  for (size_t i = 0; i < KEYS; i++) {
    const flap_config_key *key = &keys[i];
    if (is_section(key)) {
      fprintf(out, "\n%s\n\n", key->help);
      continue;
    }
    char kind[160], fallback[64];
    fprintf(out, "  %s: %s (default: %s)\n", key->name, kind_text(key, kind, sizeof kind),
            default_text(key, &defaults, fallback, sizeof fallback));
    print_wrapped(out, key->help, 6);
  }
}
