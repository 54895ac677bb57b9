/* Checkpoints of a run: what is in them, and when they are begun, waited for, and given up. */
#include "engine/train_internal.h"

#include "base/log.h"
#include "base/units.h"
#include "engine/planner/wear.h"

#include <stdio.h>
#include <string.h>

void trainer_numerics_key(const trainer *t, char key[FLAP_NUMERICS_MAX]) {
  const flap_plan *plan = &t->prepared.plan;
  const flap_matmul_table *matmuls = &t->prepared.matmuls.table; /* an empty one is how products are without one */
  char products[48] = "";
  if (matmuls->count > 0)
    (void)snprintf(products, sizeof products, "; products 0x%016llx",
                   (unsigned long long)flap_matmul_table_digest(matmuls));
  (void)snprintf(key, FLAP_NUMERICS_MAX, "%s; micro-batch %u x %u; weights %s; gradients %s; adamw %s%s",
                 flap_ops_numerics(t->runtime.ops), t->config->per_device_train_batch_size, t->config->cutoff_len,
                 flap_dtype_name(plan->dtype), flap_dtype_name(plan->gradient_dtype),
                 plan->optim == FLAP_OPTIM_ADAMW_8BIT ? "8-bit, the embedding fp32" : "fp32", products);
}

flap_artifacts trainer_artifacts(trainer *t) {
  return (flap_artifacts){.model = &t->prepared.model,
                          .tokenizer = t->prepared.tokenizer,
                          .companions = &t->companions,
                          .piece = {&t->behind, &t->room}};
}

/* Of a checkpoint, beside what it shares with the run. */
static uint64_t checkpoint_written_bytes(const trainer *t) {
  return t->prepared.plan.checkpoint_bytes - t->shared_bytes;
}

/* By all lives of the run: so far, and for the checkpoint that is about to be written. */
static uint64_t written_bytes(const trainer *t) {
  const flap_plan *plan = &t->prepared.plan;
  flap_pager_stats stats;
  flap_pager_get_stats(t->runtime.pager, &stats);
  return t->state.written_bytes + flap_wear_start_bytes(plan) + stats.disk_bytes[1] + t->result->saved_bytes +
         checkpoint_written_bytes(t);
}

static flap_trainer_state state_of(trainer *t) {
  t->shared_bytes = flap_pager_can_keep(t->runtime.pager) ? flap_pager_shared_bytes(t->runtime.pager) : 0;
  flap_trainer_state state = {.step = t->step,
                              .max_steps = t->steps,
                              .cursor = t->cursor,
                              .seed = t->config->seed,
                              .optim = t->config->optim,
                              .loss_scale = t->runtime.executor.loss_scale,
                              .matmuls = &t->prepared.matmuls,
                              .written_bytes = written_bytes(t),
                              .dataset_digest = flap_dataset_digest(t->dataset)};
  trainer_numerics_key(t, state.numerics);
  return state;
}

static void note_saved(trainer *t, uint64_t step, double seconds) {
  t->saved_step = step;
  t->saved_ns = flap_units_now_ns();
  t->result->saved_bytes += checkpoint_written_bytes(t);
  if (t->observer.saved != NULL)
    t->observer.saved(t->observer.context, t->result->checkpoint, seconds);
}

flap_status trainer_save(trainer *t) {
  const flap_artifacts artifacts = trainer_artifacts(t);
  FLAP_TRY(trainer_collect_save(t, true));
  const flap_trainer_state state = state_of(t);
  const uint64_t started_ns = flap_units_now_ns();
  FLAP_TRY(flap_pager_settle(t->runtime.pager));
  FLAP_TRY(flap_metrics_sync(t->metrics));
  FLAP_TRY(flap_checkpoint_save(t->config->output_dir, t->runtime.pager, &t->runtime.lists.layout, &artifacts, &state,
                                t->config->save_only_model, t->config->save_total_limit, t->result->checkpoint));
  note_saved(t, t->step, (double)(flap_units_now_ns() - started_ns) * 1e-9);
  return FLAP_OK;
}

/* The update may be pending: then the snapshot holds what the next program makes of the weights first of all. */
flap_status trainer_begin_save(trainer *t, bool read_by_step) {
  FLAP_TRY(trainer_collect_save(t, true));
  const flap_trainer_state state = state_of(t);
  flap_pager_snapshot_begin(t->runtime.pager, t->pending ? flap_executor_update_leases(&t->runtime.executor) : 0);
  flap_saver_start(&t->saver, &state, read_by_step);
  t->saved_ns = flap_units_now_ns();
  if (!t->pending)
    flap_saver_judge(&t->saver, true);
  return FLAP_OK;
}

void trainer_approve_save(trainer *t) {
  if (!flap_saver_is_busy(&t->saver))
    return;
  if (!flap_saver_is_judged(&t->saver))
    flap_saver_judge(&t->saver, true);
  flap_saver_look(&t->saver);
}

flap_status trainer_collect_save(trainer *t, bool wait) {
  if (!flap_saver_is_busy(&t->saver) || (!wait && !flap_saver_is_over(&t->saver)))
    return FLAP_OK;
  FLAP_TRY(flap_saver_collect(&t->saver));
  memcpy(t->result->checkpoint, t->saver.folder, sizeof t->result->checkpoint);
  note_saved(t, t->saver.state.step, t->saver.seconds);
  return FLAP_OK;
}

/* The run ends with an error. A checkpoint in the works is of an earlier step: if all of it is there and good it is
 * finished, and else given up. The error that counts is the run's. */
void trainer_end_save(trainer *t, flap_status status) {
  char message[2048];
  if (!flap_saver_is_busy(&t->saver))
    return;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  flap_pager_snapshot_cut_off(t->runtime.pager);
  if (!flap_saver_is_judged(&t->saver))
    flap_saver_judge(&t->saver, flap_executor_updates_are_good(&t->runtime.executor));
  if (trainer_collect_save(t, true) != FLAP_OK)
    flap_log(FLAP_LOG_DEBUG, "the checkpoint in the works was given up: %s", flap_error_message());
  (void)flap_error_set(status, "%s", message);
}
