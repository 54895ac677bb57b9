/* flap_engine_knee: from how many tokens a step on compute hides everything else. */
#include "engine/planner/prepare.h"

#include <math.h>

#define TRIES_MAX 12
#define GAIN 1.01 /* of compute's share by twice the micro-batches: less is none */
#define IDLE_MAX 2
#define LEAP_MAX 4u

/* What is known of a number of micro-batches: by how much compute is longer than it must be, in seconds. */
typedef struct point {
  uint32_t micro_batches;
  double surplus; /* below 0: it does not hide the rest */
} point;

typedef struct search {
  const flap_run_config *config, *given; /* with one backward alone; as the person gave it */
  void (*trying)(void *context, uint32_t micro_batches);
  void *context;
  uint32_t tries, most; /* micro-batches that can be planned with */
  flap_plan plan;       /* of the last try */
} search;

static flap_status plan_as(search *s, const flap_run_config *config, uint32_t micro_batches) {
  flap_prepared prepared;
  FLAP_TRY(flap_prepare_open(config, true, &prepared)); /* flap_engine_plan has told what there is to tell */
  const uint32_t most = flap_prepare_micro_batches_max(&prepared.model);
  s->most = most < FLAP_KNEE_MICRO_BATCHES_MAX ? most : FLAP_KNEE_MICRO_BATCHES_MAX;
  const flap_status status = flap_prepare_plan(&prepared, FLAP_MODE_TRAIN, config->per_device_train_batch_size,
                                               config->cutoff_len, micro_batches, 0);
  s->plan = prepared.plan;
  flap_prepare_close(&prepared);
  return status;
}

/* Plans a step of so many micro-batches; for lack of room, with two backwards. FLAP_BUDGET: they do not fit. */
static flap_status plan_with(search *s, uint32_t micro_batches) {
  s->tries++;
  if (s->trying != NULL)
    s->trying(s->context, micro_batches);
  const flap_status status = plan_as(s, s->config, micro_batches);
  if (status != FLAP_BUDGET || s->config == s->given)
    return status;
  flap_error_clear();
  return plan_as(s, s->given, micro_batches);
}

static bool is_hidden(const flap_plan *plan) {
  return plan->compute_seconds >= FLAP_KNEE_SHARE * plan->step_seconds;
}

static point point_of(const flap_plan *plan) {
  return (point){plan->micro_batches, plan->compute_seconds - FLAP_KNEE_SHARE * plan->step_seconds};
}

static void note(const flap_plan *plan, flap_knee *knee) {
  knee->tokens_per_step = plan->tokens_per_step;
  knee->step_seconds = plan->step_seconds;
  knee->compute_seconds = plan->compute_seconds;
  knee->tokens_per_second = plan->tokens_per_second;
}

static uint32_t bounded(double wanted, uint32_t least, uint32_t most) {
  return !(wanted > least) ? least : wanted < most ? (uint32_t)wanted : most;
}

/* Where a line through two points says that compute begins to hide the rest. */
static double crossing(point a, point b) {
  return a.micro_batches - a.surplus * ((double)b.micro_batches - a.micro_batches) / (b.surplus - a.surplus);
}

/* What the lanes take is about the same for every number of micro-batches, and compute grows with it. States move
 * during the forward alone, a third of compute at most, so that a few times what is moved must be computed. */
static uint32_t guess(const search *s) {
  double longest = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    longest = fmax(longest, s->plan.lane_seconds[lane]);
  return bounded(ceil(4 * longest / s->plan.compute_seconds), 2, s->most);
}

/* Twice as many, or what the last two points suggest, and a bit more: the more micro-batches, the more they hide. */
static uint32_t farther(const search *s, point before, point now) {
  const double twice = 2.0 * now.micro_batches;
  const double wanted = now.surplus > before.surplus ? crossing(before, now) * 17 / 16 + 1 : twice;
  const double least = fmin(twice, now.micro_batches * 5.0 / 4 + 1);
  return bounded(fmax(fmin(wanted, (double)LEAP_MAX * now.micro_batches), least), 1, s->most);
}

/* Up from `tried` until compute hides the rest; *high_out of 0 micro-batches: it never does. Where activations stream
 * too, they grow with compute: once two doublings have given compute no larger share, more would only take longer to
 * plan. */
static flap_status climb(search *s, uint32_t tried, point *low_io, point *high_out, flap_knee *knee) {
  double best_share = s->plan.compute_seconds / s->plan.step_seconds;
  uint32_t compared = 1, idle = 0; /* doublings without a gain */
  *high_out = (point){0};
  while (s->tries < TRIES_MAX && tried > low_io->micro_batches) {
    const flap_status status = plan_with(s, tried);
    if (status == FLAP_BUDGET) { /* more than fit: what does is as far as it goes */
      flap_error_clear();
      return FLAP_OK;
    }
    FLAP_TRY(status);
    knee->tried_max = tried;
    note(&s->plan, knee);
    const point now = point_of(&s->plan), before = *low_io;
    if (is_hidden(&s->plan)) {
      *high_out = now;
      return FLAP_OK;
    }
    const double share = s->plan.compute_seconds / s->plan.step_seconds;
    if (tried >= 2 * compared) {
      idle = share < best_share * GAIN ? idle + 1 : 0;
      best_share = fmax(share, best_share);
      compared = tried;
    }
    if (idle == IDLE_MAX)
      return FLAP_OK;
    *low_io = now;
    tried = farther(s, before, now);
  }
  return FLAP_OK;
}

/* Just below where a line between the two crosses, if that would do, else just above it; every second time the middle,
 * so that the rest is halved in any case. */
static uint32_t between(point low, point high, bool middle) {
  const uint32_t enough = high.micro_batches - (1 + high.micro_batches / 8);
  const double crosses = crossing(low, high);
  if (middle)
    return low.micro_batches + (high.micro_batches - low.micro_batches) / 2;
  return bounded(crosses >= enough ? enough : crosses * 17 / 16 + 1, low.micro_batches + 1, high.micro_batches - 1);
}

/* Between one number that does not do and one that does. */
static flap_status narrow(search *s, point low, point high, flap_knee *knee) {
  for (bool middle = false; high.micro_batches - low.micro_batches > 1 + high.micro_batches / 8 && s->tries < TRIES_MAX;
       middle = !middle) {
    FLAP_TRY(plan_with(s, between(low, high, middle)));
    if (is_hidden(&s->plan)) {
      high = point_of(&s->plan);
      note(&s->plan, knee);
    } else {
      low = point_of(&s->plan);
    }
  }
  knee->micro_batches = high.micro_batches;
  return FLAP_OK;
}

flap_status flap_engine_knee(const flap_run_config *config, void (*trying)(void *context, uint32_t micro_batches),
                             void *context, flap_knee *knee_out) {
  flap_run_config once = *config;
  search s = {.config = config, .given = config, .trying = trying, .context = context};
  *knee_out = (flap_knee){.tried_max = 1};
  if (flap_run_config_needs_norm(config) && flap_run_config_update(&config->expert) == FLAP_UPDATE_AUTO) {
    once.expert.update = FLAP_UPDATE_FOLD; /* what a second backward computes hides the disk, but is for nothing else */
    s.config = &once;
  }
  FLAP_TRY(plan_with(&s, 1));
  note(&s.plan, knee_out);
  if (is_hidden(&s.plan)) {
    knee_out->micro_batches = 1;
    return FLAP_OK;
  }
  point low = point_of(&s.plan), high;
  FLAP_TRY(climb(&s, guess(&s), &low, &high, knee_out));
  return high.micro_batches > 0 ? narrow(&s, low, high, knee_out) : FLAP_OK;
}
