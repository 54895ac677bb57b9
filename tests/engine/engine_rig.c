#include "tests/engine/engine_rig.h"

#include "base/philox.h"
#include "base/units.h"
#include "engine/step/schedule.h"
#include "engine/store/weights.h"
#include "io/block/checksum.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define SECTIONS 6u
#define STATE_SECTIONS (SECTIONS - 1)
static const char *const SECTION_NAMES[SECTIONS] = {
    "weight",        "rest of the master",       "first moment",
    "second moment", "largest of first moments", "largest of second moments"};

/* ---- models ---------------------------------------------------------------------------------------------- */

void rig_model_small(rig_model *model) {
  memset(model, 0, sizeof *model);
  model->config = (flap_model_config){.family = flap_model_find_family("llama"),
                                      .vocab_size = 120,
                                      .hidden_size = 48,
                                      .intermediate_size = 96,
                                      .num_hidden_layers = 2,
                                      .num_attention_heads = 4,
                                      .num_key_value_heads = 2,
                                      .max_position_embeddings = 64,
                                      .rms_norm_eps = 1e-5,
                                      .initializer_range = 0.1,
                                      .tie_word_embeddings = true,
                                      .attention_bias = true,
                                      .rope = {.theta = 10000}};
  ck_assert_ptr_nonnull(model->config.family);
  MUST(flap_model_finish_config(&model->config));
  model->shape = (flap_model_shape){.dtype = FLAP_BF16, .batch = 2, .sequence = 24};
  model->micro_batches = 2;
  model->gradient_dtype = FLAP_BF16;
  model->seed = 7;
  flap_run_config_defaults(&model->options);
  model->options.learning_rate = 0.01;
  model->options.adam_beta2 = 0.95;
  model->options.weight_decay = 0.1;
  model->options.max_grad_norm = 1.0;
  model->options.warmup_steps = 2;
  model->options.max_steps = 5;
}

static uint64_t step_tokens(const rig_model *model) {
  return (uint64_t)model->shape.batch * model->shape.sequence * model->micro_batches;
}

void rig_model_random_data(rig_model *model) {
  ck_assert_uint_le(model->options.max_steps, RIG_STEPS_MAX);
  const uint64_t count = (model->options.max_steps + 1) * step_tokens(model);
  model->tokens = malloc(count * sizeof *model->tokens);
  model->targets = malloc(count * sizeof *model->targets);
  ck_assert(model->tokens != NULL && model->targets != NULL);
  const flap_philox stream = flap_philox_stream(model->seed, "data");
  for (uint64_t i = 0; i < count; i++) {
    model->tokens[i] = (int32_t)flap_philox_below(&stream, 3 * i, model->config.vocab_size);
    model->targets[i] = (int32_t)flap_philox_below(&stream, 3 * i + 1, model->config.vocab_size);
    if (flap_philox_below(&stream, 3 * i + 2, 8) == 0)
      model->targets[i] = -100;
  }
  for (uint64_t step = 0; step <= model->options.max_steps; step++)
    model->targets[step * step_tokens(model)] = 0; /* some target of every step counts */
}

void rig_model_close(rig_model *model) {
  free(model->tokens);
  free(model->targets);
  model->tokens = model->targets = NULL;
}

#define SHARED_MEMORY_LEAST (512 * FLAP_MIB)

/* ---- folders --------------------------------------------------------------------------------------------- */

static pid_t suite_process; /* in the names of folders, so that rig_main finds those of tests that failed */

static void choose_folder(bool real, char *folder, size_t bytes) {
  struct statvfs space;
  (void)snprintf(folder, bytes, "/dev/shm");
  if (!real && access(folder, R_OK | W_OK | X_OK) == 0 && statvfs(folder, &space) == 0 &&
      (uint64_t)space.f_bavail * space.f_frsize >= SHARED_MEMORY_LEAST)
    return; /* containers often have very little of it */
  const ssize_t length = readlink("/proc/self/exe", folder, bytes - 1);
  folder[length < 0 ? 0 : length] = 0;
  if (strrchr(folder, '/') != NULL)
    *strrchr(folder, '/') = 0;
}

static void make_folders(engine_rig *rig, bool real) {
  char folder[RIG_PATH_MAX - 64];
  choose_folder(real, folder, sizeof folder);
  for (uint32_t i = 0; i < rig->spec.disk_count; i++) {
    (void)snprintf(rig->disks[i], sizeof rig->disks[i], "%s/flap-rig-%ld-%u-XXXXXX", folder, (long)suite_process, i);
    ck_assert_ptr_nonnull(mkdtemp(rig->disks[i]));
    rig->spec.disk_paths[i] = rig->disks[i];
  }
}

/* A test that fails is gone at once; extent files have no names, so its folders are empty. */
static void remove_folders(bool real) {
  char above[RIG_PATH_MAX - 64], prefix[32], path[2 * RIG_PATH_MAX];
  choose_folder(real, above, sizeof above);
  (void)snprintf(prefix, sizeof prefix, "flap-rig-%ld-", (long)suite_process);
  DIR *folder = opendir(above);
  for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;)
    if (strncmp(entry->d_name, prefix, strlen(prefix)) == 0) {
      (void)snprintf(path, sizeof path, "%s/%s", above, entry->d_name);
      (void)rmdir(path);
    }
  if (folder != NULL)
    (void)closedir(folder);
}

uint64_t rig_disk_file_bytes(const engine_rig *rig) {
  uint64_t bytes = 0;
  DIR *folder = opendir("/proc/self/fd");
  ck_assert_ptr_nonnull(folder);
  for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
    char path[RIG_PATH_MAX], target[RIG_PATH_MAX];
    struct stat about;
    (void)snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
    const ssize_t length = readlink(path, target, sizeof target - 1);
    target[length < 0 ? 0 : length] = 0;
    for (uint32_t i = 0; i < rig->spec.disk_count; i++)
      if (strncmp(target, rig->disks[i], strlen(rig->disks[i])) == 0 && stat(path, &about) == 0)
        bytes += (uint64_t)about.st_size;
  }
  (void)closedir(folder);
  return bytes;
}

/* ---- opening --------------------------------------------------------------------------------------------- */

void rig_begin(engine_rig *rig, const rig_model *model, const rig_place *place) {
  memset(rig, 0, sizeof *rig);
  ck_assert_uint_le(place->disks, RIG_DISKS_MAX);
  rig->model = model;
  rig->spec =
      (flap_setup_spec){.model = &model->config,
                        .shape = model->shape,
                        .mode = FLAP_MODE_TRAIN,
                        .gradient_dtype = model->gradient_dtype,
                        .optim = model->options.optim,
                        .micro_batches = model->micro_batches,
                        .threads = place->threads,
                        .device = FLAP_DEVICE_CPU,
                        .io = place->io,
                        .disk_count = place->disks,
                        .compression = place->compression,
                        .needs_no_norm = !flap_run_config_needs_norm(&model->options) && model->shape.dtype != FLAP_F16,
                        .disk_rates = {.alone_bytes = 1e6, .other_alone_bytes = 1e6}};
  for (uint32_t i = 0; i < place->disks; i++)
    rig->spec.disk_weights[i] = place->weighted ? 1 + 3 * i : 0;
  make_folders(rig, place->real_disks);
}

void rig_open_setup(engine_rig *rig, flap_setup *setup, const flap_budgets *budgets) {
  flap_runtime_config config = {.vram_bytes = budgets->vram_bytes, .optimizer = &rig->model->options};
  memcpy(config.disk_bytes, budgets->disk_bytes, sizeof config.disk_bytes);
  const flap_program *steady = &setup->programs[setup->steady];
  flap_pager_predict(&setup->pager, steady->leases, steady->lease_count, rig->predicted);
  MUST(flap_runtime_open(setup, &config, &rig->runtime));
  rig->setup = *setup;
  flap_setup_close(setup);
  rig->setup.resident = NULL;
  rig->setup.regions = NULL;
  rig->setup.places = NULL;
  rig->setup.layout = (flap_layout){0};
  rig->is_open = true;
  rig->pending = false;
  const flap_layout *layout = rig->runtime.executor.layout;
  if (rig->model->folder != NULL)
    MUST(flap_weights_load(rig->runtime.pager, layout, rig->model->folder));
  else
    MUST(flap_weights_init(rig->runtime.pager, layout, rig->model->seed));
}

void rig_open_choice(engine_rig *rig, const flap_choice *choice) {
  flap_setup setup;
  MUST(flap_setup_build(&rig->spec, choice, &setup));
  flap_budgets budgets = {.vram_bytes = setup.vram_bytes, .ram_bytes = setup.ram_bytes};
  /* Disks of different sizes, the first the smallest. */
  const uint64_t shares = (uint64_t)rig->spec.disk_count * (rig->spec.disk_count + 1) / 2;
  for (uint32_t i = 0; i < rig->spec.disk_count; i++)
    budgets.disk_bytes[i] =
        flap_units_round_up(setup.disk_bytes * (i + 1) / shares + choice->transfer_bytes, choice->transfer_bytes);
  rig_open_setup(rig, &setup, &budgets);
}

void rig_shut(engine_rig *rig) {
  if (rig->is_open)
    flap_runtime_close(&rig->runtime);
  rig->is_open = false;
}

void rig_close(engine_rig *rig) {
  rig_shut(rig);
  for (uint32_t i = 0; i < rig->spec.disk_count; i++)
    ck_assert_msg(rmdir(rig->disks[i]) == 0, "%s is not empty", rig->disks[i]);
}

flap_choice rig_choice_resident(const rig_model *model) {
  flap_choice choice = {.segment_layers = model->config.num_hidden_layers,
                        .group_micro_batches = model->micro_batches,
                        .saved_mask = FLAP_MODEL_SAVED_ALL,
                        .slice_elements = 16 * FLAP_OPS_BLOCK,
                        .page_bytes = 16 * FLAP_KIB,
                        .transfer_bytes = 64 * FLAP_KIB};
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    choice.resident_bytes[k] = RIG_EVERYTHING;
  return choice;
}

flap_choice rig_choice_streaming(const rig_model *model, bool from_disk) {
  flap_choice choice = rig_choice_resident(model);
  memset(choice.resident_bytes, 0, sizeof choice.resident_bytes);
  choice.ram_bytes = from_disk ? 0 : RIG_EVERYTHING;
  choice.read_buffers = choice.write_buffers = from_disk ? 2 : 0;
  return choice;
}

/* ---- running --------------------------------------------------------------------------------------------- */

static flap_executor_input input_of(const engine_rig *rig, uint64_t step) {
  const rig_model *model = rig->model;
  const uint64_t tokens = step_tokens(model);
  flap_executor_input input = {
      .tokens = model->tokens + step * tokens, .targets = model->targets + step * tokens, .step = step};
  for (uint64_t i = 0; i < tokens; i++)
    input.counted += input.targets[i] >= 0;
  if (step < model->options.max_steps)
    input.learning_rate =
        flap_schedule_learning_rate(&model->options, flap_schedule_warmup(&model->options, model->options.max_steps),
                                    model->options.max_steps, step - rig->runtime.executor.loss_scale.skipped);
  return input;
}

static flap_setup_program program_of(const engine_rig *rig, bool pending, bool updates) {
  if (!flap_setup_folds(&rig->setup))
    return FLAP_SETUP_SINGLE;
  if (pending)
    return updates ? FLAP_SETUP_LAST : FLAP_SETUP_STEADY;
  return updates ? FLAP_SETUP_SINGLE : FLAP_SETUP_FIRST;
}

static void run_step(engine_rig *rig, uint32_t step, rig_result *result) {
  const flap_executor_input input = input_of(rig, step);
  flap_executor_result got;
  ck_assert_uint_lt(result->steps, RIG_STEPS_MAX);
  MUST(flap_executor_run(&rig->runtime.executor, &input, &got));
  result->losses[result->steps] = got.loss;
  result->loss_scales[result->steps] = got.loss_scale;
  result->skipped[result->steps] = got.skipped ? 1 : 0;
  result->grad_norms[result->steps] = got.grad_norm;
  result->learning_rates[result->steps] = input.learning_rate;
  result->clips[result->steps++] =
      got.skipped ? 1 : flap_schedule_clip(rig->model->options.max_grad_norm, got.grad_norm);
}

void rig_train(engine_rig *rig, uint32_t first, uint32_t end, rig_ending ending, rig_result *result) {
  flap_executor *x = &rig->runtime.executor;
  const bool folds = flap_setup_folds(&rig->setup);
  ck_assert_uint_lt(first, end);
  bool pending = rig->pending;
  for (uint32_t next = first, step = first; step < end; step++) {
    for (; next < end && next < step + 2; next++) { /* the present program and the one behind it */
      const bool updates = next + 1 == end && ending == RIG_UPDATED;
      MUST(flap_executor_begin(x, program_of(rig, pending, updates)));
      pending = folds && !updates;
    }
    run_step(rig, step, result);
  }
  if (pending && ending == RIG_SWEPT) {
    const flap_executor_input input = input_of(rig, end - 1);
    flap_executor_result ignored;
    MUST(flap_executor_begin(x, FLAP_SETUP_SWEEP));
    MUST(flap_executor_run(x, &input, &ignored));
    pending = false;
  }
  rig->pending = pending;
  MUST(flap_pager_settle(rig->runtime.pager));
}

void rig_evaluate(engine_rig *rig, rig_result *result) {
  const flap_executor_input input = input_of(rig, rig->model->options.max_steps);
  flap_executor_result got;
  ck_assert(!rig->pending);
  MUST(flap_executor_begin(&rig->runtime.executor, FLAP_SETUP_FORWARD));
  MUST(flap_executor_run(&rig->runtime.executor, &input, &got));
  MUST(flap_pager_settle(rig->runtime.pager));
  result->evaluated[result->evaluations++] = got.loss;
}

void rig_measure_step(engine_rig *rig, uint32_t step, rig_result *result, uint64_t moved_out[FLAP_LANE_COUNT]) {
  flap_pager_stats before, after;
  ck_assert(rig->pending || !flap_setup_folds(&rig->setup));
  flap_pager_get_stats(rig->runtime.pager, &before);
  MUST(flap_executor_begin(&rig->runtime.executor, rig->setup.steady));
  run_step(rig, step, result);
  MUST(flap_pager_settle(rig->runtime.pager));
  flap_pager_get_stats(rig->runtime.pager, &after);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    moved_out[lane] = after.bytes[lane] - before.bytes[lane];
}

void rig_run_choice(const rig_model *model, const rig_place *place, const flap_choice *choice, rig_ending ending,
                    rig_result *result_out) {
  engine_rig rig;
  const uint32_t steps = (uint32_t)model->options.max_steps;
  memset(result_out, 0, sizeof *result_out);
  rig_begin(&rig, model, place);
  rig_open_choice(&rig, choice);
  rig_evaluate(&rig, result_out);
  rig_train(&rig, 0, 1, ending, result_out);
  rig_evaluate(&rig, result_out);
  rig_train(&rig, 1, steps, ending, result_out);
  rig_evaluate(&rig, result_out);
  rig_read_state(&rig, &result_out->state);
  rig_close(&rig);
}

/* ---- states ---------------------------------------------------------------------------------------------- */

/* Bytes of so many elements of a part, whole blocks, in a section. */
static uint64_t section_bytes(const rig_model *model, flap_part part, uint32_t section, uint64_t elements) {
  const bool codes = model->options.optim == FLAP_OPTIM_ADAMW_8BIT && part != FLAP_PART_EMBEDDING;
  if (section == 0)
    return elements * flap_dtype_bytes(model->shape.dtype);
  if (section == 1)
    return elements * (model->shape.dtype == FLAP_F32 ? 0 : model->shape.dtype == FLAP_F16 ? 4 : 2);
  if (section < 4)
    return elements * (codes ? 1 : 4);
  return codes ? elements / 256 * 4 : 0;
}

/* A region's bytes are those of up to five places, one after the other. */
typedef struct scatter {
  unsigned char *to[STATE_SECTIONS];
  uint64_t bytes[STATE_SECTIONS];
} scatter;

static flap_status scatter_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  const scatter *s = context;
  uint64_t start = 0;
  for (uint32_t i = 0; i < STATE_SECTIONS; i++) {
    const uint64_t end = start + s->bytes[i];
    const uint64_t from = offset > start ? offset : start, to = offset + bytes < end ? offset + bytes : end;
    if (from < to)
      memcpy(s->to[i] + (from - start), (const unsigned char *)memory + (from - offset), to - from);
    start = end;
  }
  return FLAP_OK;
}

static void read_part(engine_rig *rig, const flap_layout_part *part, unsigned char *to) {
  const flap_layout *layout = rig->runtime.executor.layout;
  unsigned char *sections[SECTIONS];
  for (uint32_t i = 0; i < SECTIONS; i++) {
    sections[i] = to;
    to += section_bytes(rig->model, part->kind, i, part->elements);
  }
  scatter weights = {.to = {sections[0]}, .bytes = {section_bytes(rig->model, part->kind, 0, part->elements)}};
  MUST(flap_pager_drain(rig->runtime.pager, part->weights, scatter_piece, &weights));
  for (uint32_t i = part->first_slice; i < part->first_slice + part->slice_count; i++) {
    const flap_layout_slice *slice = &layout->slices[i];
    scatter states;
    for (uint32_t j = 0; j < STATE_SECTIONS; j++) {
      states.to[j] = sections[j + 1] + section_bytes(rig->model, part->kind, j + 1, slice->first_element);
      states.bytes[j] = section_bytes(rig->model, part->kind, j + 1, slice->elements);
    }
    MUST(flap_pager_drain(rig->runtime.pager, slice->states, scatter_piece, &states));
  }
}

static uint64_t part_bytes(const rig_model *model, flap_part part, uint64_t elements) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < SECTIONS; i++)
    bytes += section_bytes(model, part, i, elements);
  return bytes;
}

void rig_read_state(engine_rig *rig, rig_state *state_out) {
  const flap_layout *layout = rig->runtime.executor.layout;
  *state_out = (rig_state){0};
  for (uint32_t i = 0; i < layout->part_count; i++)
    state_out->bytes += part_bytes(rig->model, layout->parts[i].kind, layout->parts[i].elements);
  state_out->data = malloc(state_out->bytes);
  ck_assert_ptr_nonnull(state_out->data);
  memset(state_out->data, 0xee, state_out->bytes);
  unsigned char *to = state_out->data;
  for (uint32_t i = 0; i < layout->part_count; i++) {
    read_part(rig, &layout->parts[i], to);
    to += part_bytes(rig->model, layout->parts[i].kind, layout->parts[i].elements);
  }
  state_out->digest = flap_block_checksum(state_out->data, state_out->bytes, 0, 0, 0);
}

void rig_result_close(rig_result *result) {
  free(result->state.data);
  memset(result, 0, sizeof *result);
}

typedef struct piece_of {
  unsigned char *memory;
} piece_of;

static flap_status keep_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  memcpy(((piece_of *)context)->memory + offset, memory, bytes);
  return FLAP_OK;
}

static flap_status put_piece(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  memcpy(memory, ((piece_of *)context)->memory + offset, bytes);
  return FLAP_OK;
}

void rig_flip_bit(engine_rig *rig, uint32_t part, uint32_t section, uint64_t bit) {
  const flap_layout *layout = rig->runtime.executor.layout;
  const flap_layout_part *p = &layout->parts[part];
  const flap_layout_slice *slice = &layout->slices[p->first_slice];
  uint64_t offset = 0;
  for (uint32_t i = 1; i < section; i++)
    offset += section_bytes(rig->model, p->kind, i, slice->elements);
  const uint32_t region = section == 0 ? p->weights : slice->states;
  ck_assert_uint_lt(bit / 8, section_bytes(rig->model, p->kind, section, section == 0 ? p->elements : slice->elements));
  piece_of copy = {.memory = malloc(layout->regions[region].bytes)};
  ck_assert_ptr_nonnull(copy.memory);
  MUST(flap_pager_drain(rig->runtime.pager, region, keep_piece, &copy));
  copy.memory[offset + bit / 8] ^= (unsigned char)(1u << (bit % 8));
  MUST(flap_pager_fill(rig->runtime.pager, region, put_piece, &copy));
  free(copy.memory);
}

/* ---- comparing ------------------------------------------------------------------------------------------- */

static char difference[256];

static flap_part part_kind(const rig_model *model, uint32_t part) {
  if (part == 0)
    return FLAP_PART_EMBEDDING;
  return part == model->config.num_hidden_layers + 1 ? FLAP_PART_HEAD : FLAP_PART_LAYER;
}

const unsigned char *rig_state_weights(const rig_model *model, const rig_state *state, uint32_t part) {
  const unsigned char *at = state->data;
  for (uint32_t i = 0; i < part; i++)
    at += part_bytes(model, part_kind(model, i), flap_model_part_elements(&model->config, part_kind(model, i)));
  return at;
}

static const char *state_difference(const rig_model *model, uint64_t at) {
  for (uint32_t part = 0; part < model->config.num_hidden_layers + 2; part++) {
    const uint64_t elements = flap_model_part_elements(&model->config, part_kind(model, part));
    for (uint32_t i = 0; i < SECTIONS; i++) {
      const uint64_t bytes = section_bytes(model, part_kind(model, part), i, elements);
      if (at < bytes) {
        (void)snprintf(difference, sizeof difference, "%s of element %llu of part %u", SECTION_NAMES[i],
                       (unsigned long long)((double)at / (double)bytes * (double)elements), part);
        return difference;
      }
      at -= bytes;
    }
  }
  return "bytes behind the last part";
}

static const char *list_difference(const char *name, const double *a, const double *b, uint32_t count) {
  for (uint32_t i = 0; i < count; i++)
    if (memcmp(&a[i], &b[i], sizeof *a) != 0) {
      (void)snprintf(difference, sizeof difference, "%s %u: %.17g and %.17g", name, i, a[i], b[i]);
      return difference;
    }
  return "";
}

const char *rig_difference(const rig_model *model, const rig_result *a, const rig_result *b) {
  if (a->steps != b->steps || a->evaluations != b->evaluations || a->state.bytes != b->state.bytes)
    return "numbers of steps, evaluations or bytes";
  const char *found = list_difference("loss", a->losses, b->losses, a->steps);
  if (*found == 0)
    found = list_difference("grad_norm", a->grad_norms, b->grad_norms, a->steps);
  if (*found == 0)
    found = list_difference("learning_rate", a->learning_rates, b->learning_rates, a->steps);
  if (*found == 0)
    found = list_difference("loss_scale", a->loss_scales, b->loss_scales, a->steps);
  if (*found == 0)
    found = list_difference("skipped", a->skipped, b->skipped, a->steps);
  if (*found == 0)
    found = list_difference("evaluation", a->evaluated, b->evaluated, a->evaluations);
  if (*found != 0)
    return found;
  if (memcmp(a->state.data, b->state.data, a->state.bytes) == 0)
    return a->state.digest == b->state.digest ? "" : "digests, although all bytes agree";
  uint64_t at = 0;
  while (a->state.data[at] == b->state.data[at])
    at++;
  return state_difference(model, at);
}

int rig_main(Suite *suite) {
  SRunner *runner = srunner_create(suite);
  suite_process = getpid();
  srunner_run_all(runner, CK_NORMAL);
  remove_folders(false);
  remove_folders(true);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
