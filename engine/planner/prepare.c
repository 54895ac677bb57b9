#include "engine/planner/prepare.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/system.h"
#include "base/units.h"
#include "engine/machine/host_times.h"
#include "engine/machine/machine_cache.h"
#include "engine/machine/machine_profile.h"
#include "engine/machine/op_times_cache.h"
#include "engine/planner/budgets.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define RATES_ALIKE 0.98 /* no plan is made again for less */

/* ---- model and tokenizer --------------------------------------------------------------------------------- */

bool flap_prepare_only_shards(const flap_run_config *config) {
  for (uint32_t i = 0; i < config->dataset_count; i++) {
    const char *path = config->dataset[i];
    const size_t length = strlen(path);
    if (length < 4 || strcmp(path + length - 4, ".bin") != 0)
      return false;
  }
  return config->dataset_count > 0;
}

static flap_status open_tokenizer(flap_prepared *p) {
  const flap_run_config *config = p->config;
  if (strcmp(config->tokenizer, "bytes") == 0)
    return flap_tokenizer_open_bytes(&p->tokenizer);
  if (config->tokenizer[0])
    return flap_tokenizer_open(config->tokenizer, &p->tokenizer);
  if (!config->model_name_or_path[0]) {
    if (flap_prepare_only_shards(config))
      return FLAP_OK;
    return flap_error_set(FLAP_INVALID, "tokenizer: missing: name a tokenizer.json, or `bytes`");
  }
  const flap_status status = flap_tokenizer_open(config->model_name_or_path, &p->tokenizer);
  if ((status != FLAP_NOT_FOUND && status != FLAP_UNSUPPORTED) || !flap_prepare_only_shards(config))
    return status;
  if (status == FLAP_UNSUPPORTED && !p->quiet)
    flap_log(FLAP_LOG_INFO, "the tokenizer is not read, for all data are tokens already: %s", flap_error_message());
  flap_error_clear();
  p->tokenizer = NULL;
  return FLAP_OK;
}

static flap_status check_folder(const char *path) {
  struct stat info;
  if (flap_system_stat(path, &info) != 0 || !S_ISDIR(info.st_mode))
    return flap_error_set(FLAP_NOT_FOUND,
                          "model_name_or_path: %s is not a folder here: name a Hugging Face folder that was downloaded",
                          path);
  return FLAP_OK;
}

static flap_status open_model(flap_prepared *p) {
  const flap_run_config *config = p->config;
  const uint32_t vocabulary = p->tokenizer != NULL ? flap_tokenizer_vocabulary(p->tokenizer) : 0;
  if (config->model != NULL) {
    char source[FLAP_PATH_MAX + 16];
    (void)snprintf(source, sizeof source, "%s: model", config->source);
    FLAP_TRY(flap_hf_config_parse(config->model, source, true, vocabulary, &p->model));
  } else {
    FLAP_TRY(flap_hf_config_read(config->model_name_or_path, &p->model));
    FLAP_TRY(flap_weights_check(&p->model, config->model_name_or_path));
  }
  if (vocabulary > p->model.vocab_size)
    return flap_error_set(FLAP_INVALID, "tokenizer: %s has %u tokens, more than the model's vocab_size of %u",
                          flap_tokenizer_name(p->tokenizer), vocabulary, p->model.vocab_size);
  return FLAP_OK;
}

flap_status flap_prepare_open(const flap_run_config *config, bool quiet, flap_prepared *p) {
  memset(p, 0, sizeof *p);
  p->quiet = quiet;
  p->config = config;
  flap_status status = FLAP_OK;
  if (config->model == NULL)
    FLAP_TRY(check_folder(config->model_name_or_path));
  FLAP_TRY_GOTO(status, open_tokenizer(p));
  FLAP_TRY_GOTO(status, open_model(p));
  return FLAP_OK;
fail:
  flap_prepare_close(p);
  return status;
}

void flap_prepare_close(flap_prepared *p) {
  if (p->has_setup)
    flap_setup_close(&p->setup);
  flap_tokenizer_close(p->tokenizer);
  memset(p, 0, sizeof *p);
}

/* ---- what is given --------------------------------------------------------------------------------------- */

static uint32_t thread_count(const flap_run_config *config) {
  cpu_set_t set;
  if (config->profile != NULL && config->expert.threads == 0)
    return config->profile->threads;
  if (config->expert.threads > 0)
    return config->expert.threads < FLAP_POOL_THREADS_MAX ? config->expert.threads : FLAP_POOL_THREADS_MAX;
  const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return cores < 1 ? 1 : cores > FLAP_POOL_THREADS_MAX ? FLAP_POOL_THREADS_MAX : (uint32_t)cores;
}

/* What kernels of the cuda device can do is known before there is one. */
static flap_status check_heads(const flap_prepared *p) {
  const uint32_t size = p->model.head_dim;
  if (size % FLAP_OPS_CUDA_HEAD_STEP == 0 && size <= FLAP_OPS_CUDA_HEAD_MAX)
    return FLAP_OK;
  return flap_error_set(FLAP_DEVICE,
                        "model: head_dim is %u, and the cuda device computes attention for multiples of %u up to %u: "
                        "set device to cpu",
                        size, FLAP_OPS_CUDA_HEAD_STEP, FLAP_OPS_CUDA_HEAD_MAX);
}

/* A machine that is described is not asked anything, and neither is this one. */
static flap_status take_profile(flap_prepared *p, const flap_machine_profile *profile) {
  flap_setup_spec *spec = &p->planner.spec;
  FLAP_TRY(flap_machine_profile_check(profile, p->config));
  if (profile->device == FLAP_RUN_DEVICE_CUDA)
    FLAP_TRY(check_heads(p));
  p->machine = profile->machine;
  flap_machine_profile_disks(profile, p->config->disk_count, &p->disks);
  spec->device = profile->device == FLAP_RUN_DEVICE_CUDA ? FLAP_DEVICE_CUDA : FLAP_DEVICE_CPU;
  spec->vram_overhead_bytes = p->machine.overhead_bytes;
  return FLAP_OK;
}

/* What a run may put on a disk, as far as its configuration says it. */
static uint64_t bytes_of_disk(const flap_run_config *config, uint32_t disk) {
  if (disk >= config->disk_count || config->disk[disk].size.kind == FLAP_SIZE_MIN)
    return 0;
  return config->disk[disk].size.kind == FLAP_SIZE_MAX ? UINT64_MAX : config->disk[disk].size.bytes;
}

/* Entries on one drive share its rates, which the one that may hold most asks for. Folders that are not there are found
 * later. */
static uint64_t bytes_on_drive(const flap_run_config *config, uint32_t disk) {
  uint64_t most = bytes_of_disk(config, disk);
  struct stat here, there;
  if (disk >= config->disk_count || flap_system_stat(config->disk[disk].path, &here) != 0)
    return most;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    const uint64_t bytes = bytes_of_disk(config, i);
    if (bytes > most && flap_system_stat(config->disk[i].path, &there) == 0 && there.st_dev == here.st_dev)
      most = bytes;
  }
  return most;
}

/* What is asked of this machine for a run, with one of its disks if it has any. */
static flap_machine_query query_of(const flap_prepared *p, flap_run_device device, uint32_t disk) {
  const flap_run_config *config = p->config;
  return (flap_machine_query){.device = device,
                              .threads = p->planner.spec.threads,
                              .vram_bytes = config->vram.kind == FLAP_SIZE_BYTES ? config->vram.bytes : 0,
                              .disk_path = disk < config->disk_count ? config->disk[disk].path : NULL,
                              .disk_bytes = bytes_on_drive(config, disk)};
}

/* auto: a GPU that FLAP can use, else the CPU. */
static flap_status choose_device(flap_prepared *p) {
  const flap_run_device wanted = p->config->device;
  flap_machine_query query = query_of(p, FLAP_RUN_DEVICE_CUDA, 0);
  flap_setup_spec *spec = &p->planner.spec;
  if (p->config->profile != NULL)
    return take_profile(p, p->config->profile);
  if (wanted != FLAP_RUN_DEVICE_CPU) {
    flap_status status = flap_engine_machine(&query, &p->machine);
    if (status == FLAP_OK)
      status = check_heads(p);
    if (status == FLAP_OK) {
      spec->device = FLAP_DEVICE_CUDA;
      spec->vram_overhead_bytes = p->machine.overhead_bytes;
      return FLAP_OK;
    }
    if (wanted == FLAP_RUN_DEVICE_CUDA || !flap_engine_falls_to_cpu(status))
      return status;
  }
  query.device = FLAP_RUN_DEVICE_CPU;
  return flap_engine_machine(&query, &p->machine);
}

/* One folder has as many names as there are links to it. */
static flap_status look_at_disks(const flap_run_config *config, struct stat about[FLAP_RUN_DISKS_MAX]) {
  for (uint32_t i = 0; i < config->disk_count; i++) {
    if (flap_system_stat(config->disk[i].path, &about[i]) != 0)
      return flap_error_set(FLAP_NOT_FOUND, "disk %s: no such folder: make it, or name another", config->disk[i].path);
    for (uint32_t j = 0; j < i; j++)
      if (about[i].st_dev == about[j].st_dev && about[i].st_ino == about[j].st_ino)
        return flap_error_set(FLAP_INVALID, "disk: %s and %s are the same folder: leave one of them out",
                              config->disk[j].path, config->disk[i].path);
  }
  return FLAP_OK;
}

/* Of each drive once, however many folders lie on it. */
static flap_status gather_disks(flap_prepared *p) {
  const flap_run_config *config = p->config;
  const flap_run_device device =
      p->planner.spec.device == FLAP_DEVICE_CUDA ? FLAP_RUN_DEVICE_CUDA : FLAP_RUN_DEVICE_CPU;
  struct stat about[FLAP_RUN_DISKS_MAX];
  p->disks.count = config->disk_count;
  FLAP_TRY(look_at_disks(config, about));
  for (uint32_t i = 0; i < config->disk_count; i++) {
    flap_machine machine = p->machine;
    uint32_t drive = 0;
    while (about[drive].st_dev != about[i].st_dev)
      drive++;
    if (drive == i && i > 0) {
      const flap_machine_query query = query_of(p, device, i);
      FLAP_TRY(flap_engine_machine(&query, &machine));
    }
    p->disks.disks[i] = (flap_disk_rates){.read_bytes = machine.disk_read_bytes,
                                          .write_bytes = machine.disk_write_bytes,
                                          .both_bytes = machine.disk_both_bytes,
                                          .drive = drive,
                                          .full = !(machine.disk_read_bytes > 0)};
    if (drive < i) {
      p->disks.disks[i] = p->disks.disks[drive];
      p->disks.disks[i].drive = drive;
    }
  }
  return FLAP_OK;
}

static void give_disk_rates(flap_prepared *p, const uint64_t *bytes) {
  flap_disk_set_rates(&p->disks, bytes, &p->machine);
  p->planner.spec.disk_rates = (flap_duplex){.alone_bytes = p->machine.disk_read_bytes,
                                             .other_alone_bytes = p->machine.disk_write_bytes,
                                             .both_bytes = p->machine.disk_both_bytes};
}

static flap_status check_saved(const flap_prepared *p) {
  const char *wanted = flap_run_config_saved(p->config->expert.saved);
  uint32_t count;
  const flap_saved_set *sets = flap_model_saved_sets(&p->model, &count);
  for (uint32_t i = 0; wanted != NULL && i < count; i++)
    if (strcmp(sets[i].name, wanted) == 0)
      return FLAP_OK;
  if (wanted == NULL)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID, "expert.saved: %s is nothing that models of the %s family can keep: use all",
                        wanted, flap_model_family_name(p->model.family));
}

static flap_status give_spec(flap_prepared *p, flap_run_mode mode, const flap_model_shape *shape,
                             uint32_t micro_batches, uint32_t cache_positions) {
  static const flap_block_backend backends[] = {[FLAP_RUN_IO_AUTO] = FLAP_BLOCK_AUTO,
                                                [FLAP_RUN_IO_URING] = FLAP_BLOCK_URING,
                                                [FLAP_RUN_IO_THREADS] = FLAP_BLOCK_THREADS};
  const flap_run_config *config = p->config;
  flap_setup_spec *spec = &p->planner.spec;
  *spec = (flap_setup_spec){.model = &p->model,
                            .shape = *shape,
                            .mode = mode,
                            .gradient_dtype = shape->dtype == FLAP_F32 ? FLAP_F32 : config->gradient_dtype,
                            .optim = config->optim,
                            .micro_batches = micro_batches,
                            .cache_positions = cache_positions,
                            .threads = thread_count(config),
                            .device = FLAP_DEVICE_CPU,
                            .saves_weights = mode == FLAP_MODE_TRAIN && config->save_strategy != FLAP_STRATEGY_NO,
                            .saves_states = mode == FLAP_MODE_TRAIN && config->save_strategy != FLAP_STRATEGY_NO &&
                                            !config->save_only_model,
                            .reader_depth = mode == FLAP_MODE_TRAIN ? 2 : 0,
                            .io = backends[config->expert.io],
                            .needs_no_norm = !flap_run_config_needs_norm(config),
                            .compression = config->compression,
                            .disk_count = config->disk_count};
  for (uint32_t i = 0; i < config->disk_count; i++)
    spec->disk_paths[i] = config->disk[i].path;
  p->planner.expert = config->expert;
  p->planner.activations = config->activations;
  p->planner.machine = &p->machine;
  p->planner.quick = p->quiet;
  const struct {
    const char *key;
    uint32_t layers;
  } wanted[] = {{"segment_layers", config->expert.segment_layers}, {"tail_layers", config->expert.tail_layers}};
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted && mode == FLAP_MODE_TRAIN; i++)
    if (wanted[i].layers > p->model.num_hidden_layers)
      return flap_error_set(FLAP_INVALID, "expert.%s: %u is more than the %u layers of the model", wanted[i].key,
                            wanted[i].layers, p->model.num_hidden_layers);
  FLAP_TRY(flap_setup_check_model(spec));
  FLAP_TRY(check_saved(p));
  FLAP_TRY(choose_device(p));
  if (config->profile == NULL)
    FLAP_TRY(gather_disks(p));
  flap_disk_set_weigh(&p->disks, config);
  for (uint32_t i = 0; i < p->disks.count; i++)
    spec->disk_weights[i] = p->disks.disks[i].weight;
  give_disk_rates(p, NULL);
  spec->shared_cores = p->machine.shared_cores > 0;
  return FLAP_OK;
}

static flap_status check_sequence(const flap_prepared *p, uint32_t positions) {
  if (positions <= p->model.max_position_embeddings)
    return FLAP_OK;
  if (!p->config->cutoff_len_given)
    return flap_error_set(FLAP_INVALID,
                          "cutoff_len: missing, and the default of %u tokens is more than the model's "
                          "max_position_embeddings of %u: give one",
                          positions, p->model.max_position_embeddings);
  return flap_error_set(FLAP_INVALID, "cutoff_len: %u tokens are more than the model's max_position_embeddings of %u",
                        positions, p->model.max_position_embeddings);
}

uint32_t flap_prepare_micro_batches_max(const flap_model_config *model) {
  const uint32_t layers = model->num_hidden_layers;
  return FLAP_PREPARE_LAYER_PASSES_MAX / (layers < FLAP_PREPARE_LAYERS_MAX ? layers : FLAP_PREPARE_LAYERS_MAX);
}

/* Before anything is measured or made: what is too long to plan would not end. */
static flap_status check_length(const flap_prepared *p, uint32_t batch, uint32_t micro_batches) {
  const uint32_t layers = p->model.num_hidden_layers, most = flap_prepare_micro_batches_max(&p->model);
  if (layers > FLAP_PREPARE_LAYERS_MAX)
    return flap_error_set(FLAP_INVALID,
                          "model: num_hidden_layers: %u layers are more than the %u that can be planned with: make "
                          "them fewer and wider",
                          layers, FLAP_PREPARE_LAYERS_MAX);
  if (micro_batches <= most)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID,
                        "gradient_accumulation_steps: %u micro-batches are more than the %u that can be planned with "
                        "%u layers: give fewer, and a larger per_device_train_batch_size (now %u)",
                        micro_batches, most, layers, batch);
}

static flap_status give_matmuls(flap_prepared *p) {
  const flap_setup_spec *spec = &p->planner.spec;
  char target[FLAP_MATMUL_TARGET_MAX];
  FLAP_TRY(flap_ops_matmul_target(FLAP_DEVICE_CUDA, target, sizeof target));
  return flap_matmul_choice_open(target, spec->model, &spec->shape, spec->gradient_dtype, p->config->expert.matmul,
                                 p->resume_folder != NULL ? p->resume_folder : "", &p->matmuls);
}

/* Budgets must not decide what is tuned: with too little for a layer and the head at once, they take turns. */
static flap_status tune_apart(flap_prepared *p, const flap_op_times_spec *of) {
  if (!p->matmuls.tunes || p->matmuls.table.count > 0)
    return FLAP_OK;
  const flap_status status = flap_op_times_tune_cuda(of, p->machine.overhead_bytes, p->budgets.vram_bytes);
  if (status == FLAP_OK)
    flap_matmul_choice_keep(&p->matmuls);
  if (status != FLAP_BUDGET)
    return status;
  p->matmuls.table.count = 0; /* what a layer's were is not all: another budget would find more */
  flap_log(FLAP_LOG_DEBUG, "products are not tuned: %s", flap_error_message());
  flap_error_clear();
  return FLAP_OK;
}

static void log_times(const flap_op_times *t) {
  flap_log(FLAP_LOG_DEBUG,
           "operations take, ms: forward %.3f, recompute %.3f, backward %.3f (first %.3f, only %.3f), head %.3f (first "
           "%.3f), embedding's backward %.3f; ns an element: adamw %.4f, by the host %.4f (beside copies %.4f, which "
           "take %.2f times as long), rounding %.4f, measuring %.4f; layer behind layer takes %.3f times as long",
           (double)t->forward_ns * 1e-6, (double)t->recompute_ns * 1e-6,
           (double)t->backward_ns[FLAP_SUMS_ADDED_TO] * 1e-6, (double)t->backward_ns[FLAP_SUMS_FRESH] * 1e-6,
           (double)t->backward_ns[FLAP_SUMS_FINAL] * 1e-6, (double)t->head_ns * 1e-6, (double)t->head_fresh_ns * 1e-6,
           (double)t->embed_backward_ns * 1e-6, t->adamw_ns, t->host.alone, t->host.beside_copies,
           t->copies_beside_host, t->store_ns, t->measure_ns, t->sustained);
}

/* After tuning the products of a card. */
static flap_status measure_times(flap_prepared *p, const flap_op_times_spec *of) {
  if (of->matmuls == NULL)
    return flap_op_times_measure_cpu(of, &p->machine, p->budgets.vram_bytes + p->budgets.ram_bytes, &p->times);
  FLAP_TRY(flap_op_times_measure_cuda(of, p->machine.overhead_bytes, p->budgets.vram_bytes, &p->times));
  flap_matmul_choice_keep(&p->matmuls);
  return FLAP_OK;
}

/* Operations that are faster than rates show that somebody else was at work when these were measured. A bound must not
 * be passed. */
static void raise_rates(const flap_op_times_spec *of, const flap_op_times *times, flap_machine *machine) {
  double *rate = of->shape.dtype == FLAP_F32 ? &machine->flops_f32 : &machine->flops_bf16;
  const double reached =
      flap_model_forward_flops(of->model, &of->shape, FLAP_PART_LAYER) / (double)times->forward_ns * 1e9;
  if (times->forward_ns > 0 && reached > *rate)
    *rate = reached;
  if (machine->shared_cores == 0 && of->training && times->host.alone > 0)
    machine->host_bytes = fmax(machine->host_bytes, flap_host_times_rate(of, times->host.alone));
}

/* What was timed for such a run before, or else now. */
static flap_status find_times(flap_prepared *p, const flap_op_times_spec *of) {
  flap_op_times_cache cache;
  if (of->matmuls != NULL)
    FLAP_TRY(give_matmuls(p));
  flap_op_times_cache_open(of, &p->machine, &cache);
  if (!flap_op_times_cache_find(&cache, of, &p->times)) {
    FLAP_TRY(measure_times(p, of));
    flap_op_times_cache_open(of, &p->machine, &cache); /* with the products that were chosen meanwhile */
    flap_op_times_cache_keep(&cache, &p->times);
  }
  if (!(p->times.host.alone > 0)) /* ram is too small to measure it in */
    flap_host_times_from_rate(of, p->machine.host_bytes, &p->times);
  raise_rates(of, &p->times, &p->machine);
  log_times(&p->times);
  return FLAP_OK;
}

/* A device here times the run's own layer, but where rates are given; where that cannot be, rates must do. */
static flap_status give_times(flap_prepared *p) {
  const flap_setup_spec *spec = &p->planner.spec;
  const bool card = spec->device == FLAP_DEVICE_CUDA,
             host_helps = card && p->planner.expert.optimizer != FLAP_OPTIMIZER_GPU;
  const flap_op_times_spec of = {.model = spec->model,
                                 .shape = spec->shape,
                                 .gradient_dtype = spec->gradient_dtype,
                                 .optim = spec->optim,
                                 .training = spec->mode == FLAP_MODE_TRAIN,
                                 .threads = spec->threads,
                                 .launch_ns = p->machine.launch_ns,
                                 .host_bytes = host_helps ? p->budgets.ram_bytes : 0,
                                 .matmuls = card ? &p->matmuls : NULL};
  const bool here = p->config->profile == NULL && (card || !flap_machine_cache_is_named());
  p->planner.times = &p->times;
  if (here && spec->mode == FLAP_MODE_TRAIN) {
    const flap_status status = find_times(p, &of);
    if (status != FLAP_BUDGET && (card || status != FLAP_NO_MEMORY)) /* what a run lacks is said with its plan */
      return status;
    flap_log(FLAP_LOG_DEBUG, "operations are not timed: %s", flap_error_message());
    flap_error_clear();
    if (card)
      FLAP_TRY(tune_apart(p, &of));
  }
  return flap_op_times_from_rates(&of, &p->machine, &p->times);
}

void flap_prepare_share_of_disks(const flap_prepared *p, uint64_t bytes_out[FLAP_RUN_DISKS_MAX]) {
  flap_block_config config;
  uint64_t bytes[FLAP_BLOCK_DISKS_MAX];
  flap_setup_block_config(&p->setup, &config);
  config.bytes = p->setup.sizes.disk_bytes;
  flap_block_share(&config, bytes);
  memset(bytes_out, 0, FLAP_RUN_DISKS_MAX * sizeof *bytes_out);
  for (uint32_t i = 0, k = 0; i < p->disks.count && k < config.disk_count; i++)
    if (config.disks[k].path == p->planner.spec.disk_paths[i]) /* those without room for a stripe are left out */
      bytes_out[i] = bytes[k++];
}

/* Rates are those of the shares that weights ask for. Where a disk is too small for its own, the others have more to
 * do, and all together are slower: how much is known once it is known how many bytes lie on them. */
static flap_status plan_anew(flap_prepared *p) {
  const flap_machine before = p->machine;
  uint64_t bytes[FLAP_RUN_DISKS_MAX];
  if (p->disks.count < 2 || p->setup.sizes.disk_bytes == 0)
    return FLAP_OK;
  flap_prepare_share_of_disks(p, bytes);
  give_disk_rates(p, bytes);
  if (p->machine.disk_read_bytes > RATES_ALIKE * before.disk_read_bytes &&
      p->machine.disk_write_bytes > RATES_ALIKE * before.disk_write_bytes)
    return FLAP_OK;
  flap_setup_close(&p->setup);
  p->has_setup = false;
  FLAP_TRY(flap_planner_choose(&p->planner, &p->budgets, &p->setup, &p->costs));
  p->has_setup = true;
  return FLAP_OK;
}

static flap_status choose(flap_prepared *p) {
  FLAP_TRY(flap_budgets_resolve(p->config, &p->planner, &p->disks, &p->budgets));
  give_disk_rates(p, NULL); /* without disks that turned out to be full */
  FLAP_TRY(give_times(p));
  FLAP_TRY(flap_planner_choose(&p->planner, &p->budgets, &p->setup, &p->costs));
  p->has_setup = true;
  return plan_anew(p);
}

/* A disk that is full is no obstacle, unless it would be needed. */
static flap_status choose_without_full_disks(flap_prepared *p) {
  char full[FLAP_BUDGETS_TEXT_MAX];
  const flap_status status = choose(p);
  if (status != FLAP_OK && status != FLAP_BUDGET)
    return status;
  if (!flap_budgets_full_disk(p->config, &p->disks, full))
    return status;
  if (status == FLAP_BUDGET)
    return flap_error_prefix(status, "%s", full);
  if (!p->quiet)
    flap_log(FLAP_LOG_WARNING, "%s", full);
  return FLAP_OK;
}

flap_status flap_prepare_plan(flap_prepared *p, flap_run_mode mode, uint32_t batch, uint32_t sequence,
                              uint32_t micro_batches, uint32_t cache_positions) {
  const flap_model_shape shape = {.dtype = flap_run_config_dtype(p->config), .batch = batch, .sequence = sequence};
  flap_assert(!p->has_setup);
  FLAP_TRY(check_length(p, batch, micro_batches));
  if (mode != FLAP_MODE_SAMPLE)
    FLAP_TRY(check_sequence(p, sequence));
  FLAP_TRY(give_spec(p, mode, &shape, micro_batches, cache_positions));
  FLAP_TRY(choose_without_full_disks(p));
  return flap_plan_describe(p, &p->plan);
}
