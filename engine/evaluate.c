#include "engine/evaluate.h"

#include "base/assert.h"
#include "base/system.h"
#include "base/units.h"
#include "engine/planner/prepare.h"
#include "engine/planner/pressure.h"
#include "engine/store/checkpoint.h"
#include "engine/store/weights.h"
#include "io/block/block.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define EVAL_MICRO_BATCHES 8u /* of `flap eval`: so many pass while a layer's weights are there */

/* Fills the step's sequences from `first` on; what the text has no more of is not counted. */
static flap_status fetch(flap_runtime *runtime, const flap_dataset *dataset, uint64_t first, uint64_t sequences,
                         uint64_t *counted_out) {
  const uint64_t length = runtime->spec.shape.sequence;
  const uint64_t room = (uint64_t)runtime->spec.shape.batch * runtime->spec.micro_batches;
  const uint64_t count = sequences - first < room ? sequences - first : room;
  int32_t *tokens = runtime->executor.host.tokens, *targets = runtime->executor.host.targets;
  FLAP_TRY(flap_dataset_fetch_heldout(dataset, first, count, tokens, targets, counted_out));
  for (uint64_t i = count * length; i < room * length; i++) {
    tokens[i] = 0;
    targets[i] = -1;
  }
  return FLAP_OK;
}

flap_status flap_evaluate(flap_runtime *runtime, const flap_dataset *dataset, uint64_t step,
                          const volatile sig_atomic_t *stop, flap_eval_report *report_out, uint64_t *programs_out,
                          bool *whole_out) {
  flap_executor *x = &runtime->executor;
  const uint64_t started_ns = flap_units_now_ns(), sequences = flap_dataset_heldout(dataset);
  const uint64_t room = (uint64_t)runtime->spec.shape.batch * runtime->spec.micro_batches;
  double sum = 0, train_nats = 0;
  bool more = true;
  *report_out = (flap_eval_report){.step = step};
  *programs_out = 0;
  *whole_out = false;
  flap_assert(sequences > 0);
  FLAP_TRY(flap_executor_begin(x, FLAP_SETUP_FORWARD));
  for (uint64_t first = 0; more; first += room) {
    flap_executor_input input = {.tokens = x->host.tokens, .targets = x->host.targets, .step = step};
    flap_executor_result result;
    FLAP_TRY(fetch(runtime, dataset, first, sequences, &input.counted));
    *whole_out = first + room >= sequences;
    more = !*whole_out && (stop == NULL || *stop == 0);
    if (more)
      FLAP_TRY(flap_executor_begin(x, FLAP_SETUP_FORWARD));
    FLAP_TRY(flap_executor_run(x, &input, &result));
    sum += result.loss_sum;
    report_out->tokens += input.counted;
    ++*programs_out;
  }
  FLAP_TRY(flap_pager_settle(runtime->pager));
  report_out->loss = sum / (double)report_out->tokens;
  flap_dataset_unigram_entropy(dataset, &report_out->unigram_entropy, &train_nats);
  report_out->seconds = (double)(flap_units_now_ns() - started_ns) * 1e-9;
  return FLAP_OK;
}

/* ---- flap eval ------------------------------------------------------------------------------------------- */

static uint32_t sequence_length(const flap_prepared *p) {
  const uint32_t wanted = p->config->cutoff_len, most = p->model.max_position_embeddings;
  return !p->config->cutoff_len_given && wanted > most ? most : wanted;
}

typedef struct scratch {
  const char *folder;
  uint64_t bytes_max; /* 0: what there is */
} scratch;

/* Where the tokens of a text are while it is evaluated: on the first disk, within its size; without one in a folder for
 * what does not last, of which others get half. /tmp comes last, for it may be in memory. */
static flap_status choose_scratch(const flap_run_config *config, scratch *scratch_out) {
  const char *given = getenv("TMPDIR");
  struct stat about;
  uint64_t free_bytes = 0;
  if (config->disk_count > 0) {
    const flap_size size = config->disk[0].size;
    *scratch_out = (scratch){config->disk[0].path, size.kind == FLAP_SIZE_BYTES ? size.bytes : 0};
    return flap_block_space(scratch_out->folder, &free_bytes); /* says what is wrong with the folder */
  }
  const bool is_given = given != NULL && given[0] != '\0';
  const bool has_var = flap_system_stat("/var/tmp", &about) == 0 && S_ISDIR(about.st_mode);
  *scratch_out = (scratch){.folder = is_given ? given : has_var ? "/var/tmp" : "/tmp"};
  const flap_status status = flap_block_space(scratch_out->folder, &free_bytes);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "the tokens of the text would be in %s%s, unless `disk` names a folder",
                             is_given ? "TMPDIR, " : "", scratch_out->folder);
  scratch_out->bytes_max = free_bytes / 2 > 0 ? free_bytes / 2 : 1;
  return FLAP_OK;
}

static flap_status explain_scratch(const flap_run_config *config, const scratch *where, flap_status status) {
  if (status != FLAP_BUDGET && status != FLAP_NO_SPACE)
    return status;
  if (config->disk_count > 0)
    return flap_error_prefix(status, "disk: %s (give it more, or another folder)", where->folder);
  return flap_error_prefix(status, "%s (name a folder with more room with the key disk)", where->folder);
}

/* Held out: what val_size says; all of the text if it says nothing. */
static flap_status open_dataset(const flap_prepared *p, flap_dataset **dataset_out) {
  const flap_run_config *config = p->config;
  scratch where = {0};
  if (!flap_prepare_only_shards(config))
    FLAP_TRY(choose_scratch(config, &where));
  const flap_dataset_config dataset = {.paths = (const char *const *)config->dataset,
                                       .path_count = config->dataset_count,
                                       .tokenizer = p->tokenizer,
                                       .vocabulary = p->model.vocab_size,
                                       .scratch_folder = where.folder,
                                       .scratch_bytes_max = where.bytes_max,
                                       .sequence_length = sequence_length(p),
                                       .val_size = config->val_size,
                                       .seed = config->seed,
                                       .heldout_all = config->val_size == 0,
                                       .begin_tokens = true};
  return explain_scratch(config, &where, flap_dataset_open(&dataset, dataset_out));
}

static flap_status evaluate_run(flap_prepared *p, const flap_dataset *dataset, flap_eval_report *report) {
  flap_runtime_config config = {.vram_bytes = p->budgets.vram_bytes};
  flap_runtime runtime;
  uint64_t programs = 0;
  bool whole = false;
  memcpy(config.disk_bytes, p->budgets.disk_bytes, sizeof config.disk_bytes);
  FLAP_TRY(flap_runtime_open(&p->setup, &config, &runtime));
  flap_status status = flap_weights_load(runtime.pager, &runtime.lists.layout, p->config->model_name_or_path);
  if (status == FLAP_OK)
    status = flap_evaluate(&runtime, dataset, 0, NULL, report, &programs, &whole);
  flap_runtime_close(&runtime);
  return status;
}

flap_status flap_engine_eval(const flap_run_config *config, const flap_observer *observer,
                             flap_eval_report *report_out) {
  flap_prepared prepared;
  flap_dataset *dataset = NULL;
  flap_status status = FLAP_OK;
  if (strcmp(config->model_name_or_path, config->output_dir) == 0)
    FLAP_TRY(flap_checkpoint_check_model(config->output_dir));
  FLAP_TRY(flap_prepare_open(config, false, &prepared));
  FLAP_TRY_GOTO(status, open_dataset(&prepared, &dataset));
  FLAP_TRY_GOTO(status, flap_prepare_plan(&prepared, FLAP_MODE_FORWARD, config->per_device_train_batch_size,
                                          sequence_length(&prepared), EVAL_MICRO_BATCHES, 0));
  FLAP_TRY_GOTO(status, flap_pressure_check_here(&prepared));
  if (observer != NULL && observer->planned != NULL)
    observer->planned(observer->context, &prepared.plan, NULL);
  FLAP_TRY_GOTO(status, evaluate_run(&prepared, dataset, report_out));
  if (observer != NULL && observer->evaluated != NULL)
    observer->evaluated(observer->context, report_out);
fail:
  flap_dataset_close(dataset);
  flap_prepare_close(&prepared);
  return status;
}
