/* flap_engine_knee: from how many tokens a step on compute hides everything else. */
#include "engine/planner/prepare.h"

#include <math.h>

#define TRIES_MAX 12
#define GAIN 1.01 /* of compute's share by twice the micro-batches: less is none */
#define IDLE_MAX 2

typedef struct search {
  const flap_run_config *config;
  uint32_t tries;
  flap_plan plan; /* of the last try */
} search;

/* Plans a step of so many micro-batches. FLAP_BUDGET: they do not fit. */
static flap_status plan_with(search *s, uint32_t micro_batches) {
  flap_prepared prepared;
  s->tries++;
  FLAP_TRY(flap_prepare_open(s->config, &prepared));
  prepared.quiet = true; /* flap_engine_plan has told what there is to tell */
  const flap_status status = flap_prepare_plan(&prepared, FLAP_MODE_TRAIN, s->config->per_device_train_batch_size,
                                               s->config->cutoff_len, micro_batches, 0);
  s->plan = prepared.plan;
  flap_prepare_close(&prepared);
  return status;
}

static bool is_hidden(const flap_plan *plan) {
  return plan->compute_seconds >= FLAP_KNEE_SHARE * plan->step_seconds;
}

static void note(const flap_plan *plan, flap_knee *knee) {
  knee->tokens_per_step = plan->tokens_per_step;
  knee->step_seconds = plan->step_seconds;
  knee->compute_seconds = plan->compute_seconds;
  knee->tokens_per_second = plan->tokens_per_second;
}

/* What the lanes take is about the same for every number of micro-batches, and compute grows with it. States move
 * during the forward alone, a third of compute at most, so that a few times what is moved must be computed. */
static uint32_t guess(const flap_plan *one) {
  double longest = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    longest = fmax(longest, one->lane_seconds[lane]);
  const double wanted = ceil(4 * longest / one->compute_seconds);
  return wanted < 1 ? 1 : wanted > FLAP_KNEE_MICRO_BATCHES_MAX ? FLAP_KNEE_MICRO_BATCHES_MAX : (uint32_t)wanted;
}

/* Up from `tried` until compute hides the rest; `high_out` 0: it never does. Where activations stream too, they grow
 * with compute: once two doublings have given compute no larger share, more would only take longer to plan. */
static flap_status climb(search *s, uint32_t tried, uint32_t *low_io, uint32_t *high_out, flap_knee *knee) {
  double best_share = s->plan.compute_seconds / s->plan.step_seconds;
  uint32_t idle = 0; /* doublings without a gain */
  *high_out = 0;
  while (s->tries < TRIES_MAX) {
    const flap_status status = plan_with(s, tried);
    if (status == FLAP_BUDGET) { /* more than fit: what does is as far as it goes */
      flap_error_clear();
      return FLAP_OK;
    }
    FLAP_TRY(status);
    knee->tried_max = tried > knee->tried_max ? tried : knee->tried_max;
    note(&s->plan, knee);
    if (is_hidden(&s->plan)) {
      *high_out = tried;
      return FLAP_OK;
    }
    const double share = s->plan.compute_seconds / s->plan.step_seconds;
    idle = share < best_share * GAIN ? idle + 1 : 0;
    best_share = fmax(share, best_share);
    if (tried == FLAP_KNEE_MICRO_BATCHES_MAX || idle == IDLE_MAX)
      return FLAP_OK;
    *low_io = tried;
    tried = tried > FLAP_KNEE_MICRO_BATCHES_MAX / 2 ? FLAP_KNEE_MICRO_BATCHES_MAX : tried * 2;
  }
  return FLAP_OK;
}

/* Between one number that does not do and one that does. */
static flap_status halve(search *s, uint32_t low, uint32_t high, flap_knee *knee) {
  while (high - low > 1 + high / 8 && s->tries < TRIES_MAX) {
    const uint32_t middle = low + (high - low) / 2;
    FLAP_TRY(plan_with(s, middle));
    if (is_hidden(&s->plan)) {
      high = middle;
      note(&s->plan, knee);
    } else {
      low = middle;
    }
  }
  knee->micro_batches = high;
  return FLAP_OK;
}

flap_status flap_engine_knee(const flap_run_config *config, flap_knee *knee_out) {
  search s = {.config = config};
  uint32_t low = 1, high = 0;
  *knee_out = (flap_knee){.tried_max = 1};
  FLAP_TRY(plan_with(&s, 1));
  note(&s.plan, knee_out);
  if (is_hidden(&s.plan)) {
    knee_out->micro_batches = 1;
    return FLAP_OK;
  }
  const uint32_t guessed = guess(&s.plan);
  FLAP_TRY(climb(&s, guessed > 2 ? guessed : 2, &low, &high, knee_out));
  return high > 0 ? halve(&s, low, high, knee_out) : FLAP_OK;
}
