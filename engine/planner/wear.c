#include "engine/planner/wear.h"

#include "base/assert.h"
#include "base/system.h"
#include "base/units.h"
#include "io/block/block.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

__extension__ typedef unsigned __int128 uint128;

/* Sums and products stay at the most that 64 bits hold: what is said to be so much is over any budget. */
static uint64_t sum_of(uint64_t a, uint64_t b) {
  uint64_t sum;
  return flap_units_add(a, b, &sum) ? sum : UINT64_MAX;
}
static uint64_t product_of(uint64_t a, uint64_t b) {
  uint64_t product;
  return flap_units_mul(a, b, &product) ? product : UINT64_MAX;
}

/* Epochs that so many steps come to; none is shorter than a step. */
static uint64_t epochs_in(uint64_t steps, const flap_wear_run *run) {
  return (uint64_t)((uint128)steps * run->step_sequences / run->sequences);
}

/* After each step that ends an epoch, and after the last. */
static uint64_t count_by_epochs(const flap_run_config *config, const flap_wear_run *run) {
  const uint64_t of_step = run->step_sequences, of_epoch = run->sequences;
  if (of_epoch == 0)
    return (uint64_t)ceil(config->num_train_epochs);
  if (of_step >= of_epoch)
    return run->end - run->start;
  const uint64_t done = epochs_in(run->end, run);
  return done - epochs_in(run->start, run) + (done == epochs_in(run->end - 1, run));
}

/* Those by steps or epochs, and one at the end; between them as many as the clock wants at the speed of the plan. */
static uint64_t count_checkpoints(const flap_run_config *config, const flap_wear_run *run, double step_seconds) {
  const uint64_t steps = run->end - run->start;
  uint64_t count = 0;
  switch (config->save_strategy) {
  case FLAP_STRATEGY_NO:
    return 0;
  case FLAP_STRATEGY_STEPS:
    count =
        run->end / config->save_steps - run->start / config->save_steps + (run->end % config->save_steps != 0 ? 1 : 0);
    break;
  case FLAP_STRATEGY_EPOCH:
    count = count_by_epochs(config, run);
    break;
  }
  if (config->save_minutes > 0) {
    const double by_clock = (double)steps * step_seconds / (60 * config->save_minutes);
    if (by_clock > (double)count)
      count = by_clock < (double)steps ? (uint64_t)by_clock : steps;
  }
  return count > 0 ? count : 1;
}

uint64_t flap_wear_checkpoints_at_once(const flap_run_config *config, uint64_t written, uint64_t there) {
  if (config->save_strategy == FLAP_STRATEGY_NO)
    return there;
  const uint64_t most = there + (written > 0 ? written : 2), limit = config->save_total_limit;
  const uint64_t kept = there > limit ? there : limit; /* what is too much is deleted after the next save */
  return limit > 0 && most > kept + 1 ? kept + 1 : most;
}

uint64_t flap_wear_start_bytes(const flap_plan *plan) {
  const uint64_t bytes = plan->classes[FLAP_CLASS_WEIGHTS].disk_bytes +
                         plan->classes[FLAP_CLASS_VOCABULARY].disk_bytes + plan->classes[FLAP_CLASS_STATES].disk_bytes;
  return (uint64_t)((double)bytes * (1 - plan->pooled_share));
}

/* For a checkpoint. */
static uint64_t written_bytes(const flap_plan *plan) {
  return plan->checkpoint_bytes - plan->checkpoint_shared_bytes;
}

/* A folder that is not there yet will be on the file system of what is to be above it. */
static bool find_above(const char *path, char above[FLAP_PATH_MAX], struct stat *about_out) {
  (void)snprintf(above, FLAP_PATH_MAX, "%s", path);
  while (flap_system_stat(above, about_out) != 0) {
    char *slash = strrchr(above, '/');
    if (errno != ENOENT || strcmp(above, ".") == 0 || strcmp(above, "/") == 0)
      return false;
    if (slash == NULL)
      strcpy(above, ".");
    else
      slash[slash == above ? 1 : 0] = '\0';
  }
  return true;
}

bool flap_wear_shares(const flap_run_config *config, const char *disk_path) {
  char above[FLAP_PATH_MAX];
  struct stat about, output;
  return config->save_strategy != FLAP_STRATEGY_NO && !config->save_only_model && config->profile == NULL &&
         config->expert.checkpoint_states == FLAP_RUN_STATES_AUTO && flap_system_stat(disk_path, &about) == 0 &&
         find_above(config->output_dir, above, &output) && output.st_dev == about.st_dev;
}

static uint64_t budget_of(const flap_run_config *config, const flap_plan *plan) {
  return config->ssd_budget_share > 0 ? (uint64_t)(config->ssd_budget_share * (double)plan->ssd_tbw_bytes)
                                      : config->ssd_budget;
}

void flap_wear_describe(const flap_run_config *config, const flap_wear_run *run, flap_plan *plan) {
  const uint64_t steps = run->end - run->start;
  flap_assert(steps > 0);
  plan->run_steps = steps;
  plan->run_checkpoints = count_checkpoints(config, run, plan->step_seconds);
  plan->checkpoints_at_once = flap_wear_checkpoints_at_once(config, plan->run_checkpoints, 0);
  plan->ssd_run_bytes =
      sum_of(flap_wear_start_bytes(plan) + plan->export_bytes,
             sum_of(product_of(steps, plan->ssd_step_bytes), product_of(plan->run_checkpoints, written_bytes(plan))));
  plan->ssd_budget_bytes = budget_of(config, plan);
}

/* The most steps that stay within the budget, with checkpoints as often as now; 0 when not even one does. */
static uint64_t steps_within(const flap_plan *plan) {
  const double once = (double)flap_wear_start_bytes(plan) + (double)plan->export_bytes;
  const double each = (double)plan->ssd_step_bytes +
                      (double)plan->run_checkpoints * (double)written_bytes(plan) / (double)plan->run_steps;
  const double left = (double)plan->ssd_budget_bytes - (double)plan->ssd_before_bytes - once;
  return left > 0 && each > 0 ? (uint64_t)(left / each) : 0;
}

flap_status flap_wear_check(const flap_run_config *config, const flap_plan *plan) {
  char run[FLAP_UNITS_TEXT_MAX], budget[FLAP_UNITS_TEXT_MAX], step[FLAP_UNITS_TEXT_MAX], saved[FLAP_UNITS_TEXT_MAX];
  char before[FLAP_UNITS_TEXT_MAX + 32] = "";
  const uint64_t all = sum_of(plan->ssd_before_bytes, plan->ssd_run_bytes);
  if (config->ssd_budget_share > 0 && plan->ssd_tbw_bytes == 0)
    return flap_error_set(FLAP_INVALID, "ssd_budget: a share of what? give ssd_tbw, from the drive's data sheet");
  if (plan->ssd_budget_bytes == 0 || all <= plan->ssd_budget_bytes)
    return FLAP_OK;
  (void)flap_units_format_bytes(plan->ssd_run_bytes, run, sizeof run);
  (void)flap_units_format_bytes(plan->ssd_budget_bytes, budget, sizeof budget);
  (void)flap_units_format_bytes(plan->ssd_step_bytes, step, sizeof step);
  (void)flap_units_format_bytes(written_bytes(plan), saved, sizeof saved);
  if (plan->ssd_before_bytes > 0) {
    char bytes[FLAP_UNITS_TEXT_MAX];
    (void)snprintf(before, sizeof before, " beside the %s until now",
                   flap_units_format_bytes(plan->ssd_before_bytes, bytes, sizeof bytes));
  }
  return flap_error_set(FLAP_BUDGET,
                        "ssd_budget: this run would write %s%s, more than the %s that it may: %llu steps of %s, %llu "
                        "checkpoints of %s; %llu %ssteps stay within it, or give ram or vram more, save less often, or "
                        "allow %llu bytes",
                        run, before, budget, (unsigned long long)plan->run_steps, step,
                        (unsigned long long)plan->run_checkpoints, saved, (unsigned long long)steps_within(plan),
                        before[0] ? "more " : "", (unsigned long long)all);
}

flap_status flap_wear_check_space(const flap_run_config *config, const flap_plan *plan) {
  char above[FLAP_PATH_MAX], wanted[FLAP_UNITS_TEXT_MAX], there[FLAP_UNITS_TEXT_MAX];
  char saved[64] = "";
  struct stat about;
  const uint64_t at_once = plan->checkpoints_at_once;
  const uint64_t checkpoints = config->save_total_limit > 0 || at_once < 2 ? at_once : 2;
  const uint64_t needed = sum_of(plan->export_bytes, product_of(checkpoints, plan->checkpoint_bytes));
  uint64_t free_bytes = 0;
  if (config->profile != NULL || config->overwrite_output_dir || config->resume_from_checkpoint[0])
    return FLAP_OK;
  if (!find_above(config->output_dir, above, &about) || flap_block_space(above, &free_bytes) != FLAP_OK) {
    flap_error_clear();
    return FLAP_OK;
  }
  if (needed <= free_bytes)
    return FLAP_OK;
  if (checkpoints > 0)
    (void)snprintf(saved, sizeof saved, ", with %llu checkpoint%s at once", (unsigned long long)checkpoints,
                   checkpoints == 1 ? "" : "s");
  return flap_error_set(FLAP_NO_SPACE,
                        "output_dir: %s would take %s%s, but what is free there is %s: free some, or set "
                        "save_total_limit, save_strategy: no or export: none",
                        config->output_dir, flap_units_format_bytes(needed, wanted, sizeof wanted), saved,
                        flap_units_format_bytes(free_bytes, there, sizeof there));
}
