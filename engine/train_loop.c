/* The step loop.
 *
 * A step rests when something needs the weights after it: an evaluation, the end. Before such a step no next one is
 * begun, and its program ends with the update; between others the next program is queued before the present one runs,
 * so that transfers never pause. A checkpoint between two steps is written beside those that follow. The engine thread
 * allocates nothing between two rests.
 */
#include "engine/train_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdlib.h>
#include <string.h>

#define TRACED_STEP 2  /* the trace begins with the third step of the process: a steady one */
#define TRACED_STEPS 2 /* on a GPU; elsewhere until the trace is full */

static bool stop_asked(const trainer *t) {
  return t->stop != NULL && *t->stop != 0;
}

/* By what was read, for earlier lives may have taken more or fewer sequences a step. */
static uint64_t epochs_done(const trainer *t, uint64_t step) {
  return (t->cursor + step * t->step_sequences - t->step * t->step_sequences) / t->sequences;
}

/* Where one step makes the updates of two, some folded and some in its backward, there is no moment between them at
 * which all are made once: then such a step rests before a save. */
static bool rests_for_saves(const trainer *t) {
  return flap_setup_folds(&t->prepared.setup) && t->prepared.setup.choice.backward_parts > 0;
}

/* A step that is queued already cannot be told to rest any more. */
static void look_at_the_clock(trainer *t, bool queued) {
  const double minutes = (double)(flap_units_now_ns() - t->saved_ns) / 60e9;
  if (t->config->save_minutes > 0 && minutes >= t->config->save_minutes && t->due_step <= t->step)
    t->due_step = queued && rests_for_saves(t) ? t->step + 2 : t->step;
}

/* After so many steps. */
static bool save_is_due(const trainer *t, uint64_t step) {
  if (step == t->due_step && step > 0)
    return true;
  switch (t->config->save_strategy) {
  case FLAP_STRATEGY_NO:
    return false;
  case FLAP_STRATEGY_STEPS:
    return step % t->config->save_steps == 0 || step == t->steps;
  case FLAP_STRATEGY_EPOCH:
    return epochs_done(t, step) > epochs_done(t, step - 1) || step == t->steps;
  }
  return false;
}

static bool eval_is_due(const trainer *t, uint64_t step) {
  return flap_dataset_heldout(t->dataset) > 0 &&
         (step == t->steps || (t->config->eval_steps > 0 && step % t->config->eval_steps == 0));
}

static bool rests_after(const trainer *t, uint64_t step) {
  return step == t->steps || eval_is_due(t, step) || (rests_for_saves(t) && save_is_due(t, step));
}

/* The program of the step after `done` steps. */
static flap_setup_program program_for(const trainer *t, uint64_t done, bool pending) {
  if (!flap_setup_folds(&t->prepared.setup))
    return FLAP_SETUP_SINGLE;
  if (rests_after(t, done + 1))
    return pending ? FLAP_SETUP_LAST : FLAP_SETUP_SINGLE;
  return pending ? FLAP_SETUP_STEADY : FLAP_SETUP_FIRST;
}

/* ---- reports --------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
  const double left = *(const double *)a, right = *(const double *)b;
  return (left > right) - (left < right);
}

static void find_median(trainer *t) {
  const uint64_t count = t->time_count < TRAINER_TIMES_MAX ? t->time_count : TRAINER_TIMES_MAX;
  if (count == 0)
    return;
  qsort(t->times, count, sizeof *t->times, ascending);
  t->result->median_step_seconds =
      count % 2 == 1 ? t->times[count / 2] : (t->times[count / 2 - 1] + t->times[count / 2]) / 2;
}

static double model_flops(const trainer *t) {
  const flap_setup_spec *spec = &t->prepared.planner.spec;
  const double layers = (double)spec->model->num_hidden_layers;
  return 3.0 * spec->micro_batches *
         (layers * flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_LAYER) +
          flap_model_forward_flops(spec->model, &spec->shape, FLAP_PART_HEAD));
}

static void write_both_ways(flap_metrics *m, const char *name, const uint64_t bytes[2]) {
  flap_metrics_open_object(m, name);
  flap_metrics_add_integer(m, "read", (int64_t)bytes[0]);
  flap_metrics_add_integer(m, "written", (int64_t)bytes[1]);
  flap_metrics_close_object(m);
}

/* What the disks moved, what the pool did instead, and how much longer the pages are that the disks moved. */
static void write_disk_bytes(flap_metrics *m, const flap_step_report *report) {
  const uint64_t lanes = report->lane_bytes[FLAP_LANE_DISK_READ] + report->lane_bytes[FLAP_LANE_DISK_WRITE];
  const uint64_t moved = report->disk_bytes[0] + report->disk_bytes[1];
  const uint64_t pooled = report->pooled_bytes[0] + report->pooled_bytes[1];
  write_both_ways(m, "disk_bytes", report->disk_bytes);
  write_both_ways(m, "pooled_bytes", report->pooled_bytes);
  flap_metrics_add_number(m, "compression_ratio", moved > 0 ? (double)(lanes - pooled) / (double)moved : 1);
}

static flap_status write_metrics(trainer *t, const flap_step_report *report) {
  flap_metrics *m = t->metrics;
  flap_metrics_begin_line(m);
  flap_metrics_add_integer(m, "step", (int64_t)report->step);
  flap_metrics_add_number(m, "epoch", report->epoch);
  flap_metrics_add_number(m, "loss", report->loss);
  flap_metrics_add_number(m, "grad_norm", report->grad_norm);
  flap_metrics_add_number(m, "learning_rate", report->learning_rate);
  if (report->loss_scale > 0) {
    flap_metrics_add_number(m, "loss_scale", report->loss_scale);
    flap_metrics_add_bool(m, "skipped", report->skipped);
  }
  flap_metrics_add_number(m, "tokens_per_second", report->tokens_per_second);
  flap_metrics_add_number(m, "mfu", report->mfu);
  flap_metrics_add_number(m, "step_seconds", report->step_seconds);
  flap_metrics_add_number(m, "bound_seconds", report->bound_seconds);
  if (report->defers_update)
    flap_metrics_add_bool(m, "defers_update", true);
  flap_metrics_open_object(m, "stall_seconds");
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    flap_metrics_add_number(m, flap_pager_lane_name((flap_lane)lane), report->stall_seconds[lane]);
  flap_metrics_close_object(m);
  flap_metrics_open_object(m, "bytes");
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    flap_metrics_add_integer(m, flap_pager_lane_name((flap_lane)lane), (int64_t)report->lane_bytes[lane]);
  flap_metrics_close_object(m);
  write_disk_bytes(m, report);
  return flap_metrics_end_line(m);
}

/* One step that waits, for a checkpoint or the disk, says little about those to come, and the first of a life nothing
 * where it leaves its update to them. */
static double eta(trainer *t, double seconds, bool defers) {
  if (!defers || t->usual_seconds > 0)
    t->usual_seconds = t->usual_seconds > 0 ? 0.9 * t->usual_seconds + 0.1 * seconds : seconds;
  return (t->usual_seconds > 0 ? t->usual_seconds : t->prepared.plan.step_seconds) * (double)(t->steps - t->step);
}

/* The first step of a life, or behind a rest, where updates are folded: it has none to make, and leaves its own. */
static bool defers_update(const trainer *t, flap_setup_program program) {
  const flap_program_spec *spec = &t->prepared.setup.programs[program].spec;
  return flap_setup_folds(&t->prepared.setup) && !spec->pending && !spec->sweep;
}

static flap_status report_step(trainer *t, const flap_executor_result *result, double learning_rate, double seconds,
                               bool defers, const flap_pager_stats *before) {
  const flap_plan *plan = &t->prepared.plan;
  const double rate = plan->dtype == FLAP_F32 ? plan->machine.flops_f32 : plan->machine.flops_bf16;
  flap_pager_stats after;
  flap_pager_get_stats(t->runtime.pager, &after);
  flap_step_report report = {.step = t->step,
                             .max_steps = t->steps,
                             .epoch = (double)t->cursor / (double)t->sequences,
                             .loss = result->loss,
                             .grad_norm = result->grad_norm,
                             .loss_scale = result->loss_scale,
                             .skipped = result->skipped,
                             .learning_rate = learning_rate,
                             .tokens = plan->tokens_per_step,
                             .step_seconds = seconds,
                             .tokens_per_second = (double)plan->tokens_per_step / seconds,
                             .mfu = model_flops(t) / seconds / rate,
                             .bound_seconds = plan->bound_seconds,
                             .defers_update = defers,
                             .eta_seconds = eta(t, seconds, defers)};
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    report.stall_seconds[lane] = (double)(after.stall_ns[lane] - before->stall_ns[lane]) * 1e-9;
    report.lane_bytes[lane] = after.bytes[lane] - before->bytes[lane];
  }
  for (int i = 0; i < 2; i++) {
    report.disk_bytes[i] = after.disk_bytes[i] - before->disk_bytes[i];
    report.pooled_bytes[i] = after.pooled_bytes[i] - before->pooled_bytes[i];
  }
  report.logged = result->skipped || t->step == 1 || t->step == t->steps || t->step % t->config->logging_steps == 0;
  if (report.logged)
    FLAP_TRY(write_metrics(t, &report));
  if (t->observer.stepped != NULL)
    t->observer.stepped(t->observer.context, &report);
  return FLAP_OK;
}

/* ---- a step ---------------------------------------------------------------------------------------------- */

/* Runs the queued step; `rests`: nothing is queued behind it. */
static flap_status run_step(trainer *t, flap_setup_program program, bool rests, uint64_t *ended_ns) {
  flap_executor_result result;
  const uint64_t updates = t->step - t->runtime.executor.loss_scale.skipped; /* before this step */
  flap_executor_input input = {.step = t->step,
                               .counted = t->step_sequences * t->config->cutoff_len,
                               .learning_rate = flap_schedule_learning_rate(t->config, t->warmup, t->steps, updates)};
  flap_pager_stats before;
  flap_pager_get_stats(t->runtime.pager, &before);
  FLAP_TRY(flap_reader_next(t->runtime.reader, &input.tokens, &input.targets));
  FLAP_TRY(flap_executor_run(&t->runtime.executor, &input, &result));
  if (rests)
    FLAP_TRY(flap_pager_settle(t->runtime.pager));
  const uint64_t now_ns = flap_units_now_ns();
  const double seconds = (double)(now_ns - *ended_ns) * 1e-9;
  *ended_ns = now_ns;
  t->runs[program]++;
  if (program == t->prepared.setup.steady)
    t->times[t->time_count++ % TRAINER_TIMES_MAX] = seconds;
  t->step++;
  t->cursor += t->step_sequences;
  trainer_approve_save(t);
  return report_step(t, &result, input.learning_rate, seconds, defers_update(t, program), &before);
}

/* The person wants to stop: the update that is pending is made, by the program that is queued or by one of its own. */
static flap_status bring_to_rest(trainer *t, bool queued, flap_setup_program next) {
  if (t->pending && queued) {
    FLAP_TRY(flap_executor_run_update(&t->runtime.executor));
    t->runs[next]++;
  } else if (t->pending) {
    const flap_executor_input input = {.step = t->step};
    flap_executor_result ignored;
    FLAP_TRY(flap_executor_begin(&t->runtime.executor, FLAP_SETUP_SWEEP));
    FLAP_TRY(flap_executor_run(&t->runtime.executor, &input, &ignored));
    t->runs[FLAP_SETUP_SWEEP]++;
  }
  t->pending = false;
  trainer_approve_save(t);
  return flap_pager_settle(t->runtime.pager);
}

/* Each step reads all states in its updates; where these are folded into the step behind it, that is one later. */
static bool is_read_by_step(const trainer *t) {
  return !flap_setup_folds(&t->prepared.setup) || !(rests_after(t, t->step + 1) || save_is_due(t, t->step + 1));
}

/* Between two steps, with the next one queued. */
static flap_status look_after_saves(trainer *t) {
  FLAP_TRY(trainer_collect_save(t, false));
  look_at_the_clock(t, true);
  if (rests_for_saves(t))
    return FLAP_OK;
  return save_is_due(t, t->step) && t->saved_step != t->step ? trainer_begin_save(t, is_read_by_step(t)) : FLAP_OK;
}

/* Steps until one rests, or until the person wants to stop. */
static flap_status run_to_rest(trainer *t) {
  bool queued = false, rests = false;
  flap_setup_program program = program_for(t, t->step, t->pending);
  uint64_t ended_ns = flap_units_now_ns();
  FLAP_TRY(flap_executor_begin(&t->runtime.executor, program));
  const uint64_t first = t->resume_folder[0] ? t->state.step : 0;
  do {
    rests = rests_after(t, t->step + 1);
    if (t->step == first + TRACED_STEP)
      flap_runtime_start_trace(&t->runtime);
    if (t->step == first + TRACED_STEP + TRACED_STEPS)
      flap_runtime_stop_trace(&t->runtime);
    const bool pending = flap_setup_folds(&t->prepared.setup) && !rests;
    const flap_setup_program next = rests ? program : program_for(t, t->step + 1, pending);
    queued = !rests && !stop_asked(t);
    if (queued)
      FLAP_TRY(flap_executor_begin(&t->runtime.executor, next));
    FLAP_TRY(run_step(t, program, rests, &ended_ns));
    t->pending = pending;
    program = next;
    if (queued && !stop_asked(t))
      FLAP_TRY(look_after_saves(t));
  } while (queued && !stop_asked(t));
  if (rests)
    return FLAP_OK;
  if (queued && !t->prepared.setup.programs[program].spec.pending) {
    /* A swept step was begun: it is run as a whole, for nothing in it is only an update. */
    FLAP_TRY(run_step(t, program, true, &ended_ns));
    return FLAP_OK;
  }
  if (queued && t->prepared.setup.programs[program].spec.sweep) {
    FLAP_TRY(run_step(t, program, true, &ended_ns));
    t->pending = false;
    return FLAP_OK;
  }
  return bring_to_rest(t, queued, program);
}

flap_status trainer_loop(trainer *t) {
  t->saved_ns = flap_units_now_ns();
  if (!stop_asked(t))
    FLAP_TRY(trainer_evaluate_first(t));
  while (t->step < t->steps && !stop_asked(t)) {
    FLAP_TRY(run_to_rest(t));
    FLAP_TRY(trainer_collect_save(t, true));
    if (eval_is_due(t, t->step) && !stop_asked(t)) /* a save is what is waited for then */
      FLAP_TRY(trainer_evaluate(t));
    look_at_the_clock(t, false);
    if (save_is_due(t, t->step) && t->saved_step != t->step)
      FLAP_TRY(t->step < t->steps && !stop_asked(t) ? trainer_begin_save(t, is_read_by_step(t)) : trainer_save(t));
  }
  FLAP_TRY(trainer_collect_save(t, true));
  t->result->interrupted = t->step < t->steps;
  if (t->result->interrupted && t->step > t->state.step && t->saved_step != t->step &&
      t->config->save_strategy != FLAP_STRATEGY_NO)
    FLAP_TRY(trainer_save(t));
  find_median(t);
  return FLAP_OK;
}
