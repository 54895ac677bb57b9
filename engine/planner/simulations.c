/* Simulates the best of a list, as many at a time as there are threads. What is remembered, told and chosen is what it
 * would be one after the other, so a plan does not depend on their number.
 */
#include "base/assert.h"
#include "base/log.h"
#include "base/pool.h"
#include "engine/planner/planner_internal.h"

#include <stdio.h>

#define MESSAGE_BYTES 1024

static void tell(const planner_contender *of, const flap_setup *setup, double seconds) {
  const planner_skeleton *s = &of->s;
  flap_log(FLAP_LOG_DEBUG,
           "plan: segments of %u, tail of %u%s, groups of %u, %u layers saved (tensors %#x), %s, %u parts updated by "
           "the host%s, %u and %u in the backward%s, depth %u, %u buffers: estimated %.4f s, simulated %.4f s",
           s->segment, s->tail, s->layerwise ? ", layerwise" : "", s->group, s->saved.layers, s->saved.mask,
           s->spread ? "spread" : "at once", s->host, s->spares_first ? ", the first ones last" : "",
           s->backward.device, s->backward.host, s->keeps ? ", embedding kept" : "", of->depth,
           setup->choice.read_buffers, of->estimate, seconds);
}

/* A contender on its way through: settled first, for how many transfers it makes decides whether it is simulated. */
typedef struct simulation {
  const planner_contender *of;
  bool is_known, is_settled;
  flap_setup setup;
  flap_plan_costs costs;
  flap_status status;
  char message[MESSAGE_BYTES]; /* of the thread that failed */
} simulation;

/* As many as there are threads, each with its setup. */
typedef struct wave {
  const flap_planner *planner;
  const planner_candidates *candidates;
  const flap_budgets *budgets;
  double limit_seconds; /* what takes longer is far from the best that there was before the list */
  uint32_t count;
  simulation of[PLANNER_THREADS_MAX];
} wave;

static void keep_status(simulation *s, flap_status status) {
  s->status = status;
  if (status != FLAP_OK)
    (void)snprintf(s->message, sizeof s->message, "%s", flap_error_message());
}

static void settle_one(void *context, uint64_t item, uint32_t worker) {
  wave *w = context;
  simulation *s = &w->of[item];
  planner_reach reach = PLANNER_NO_VRAM;
  (void)worker;
  if (s->is_known)
    return;
  keep_status(s, planner_settle(w->planner, w->candidates, s->of->s, w->budgets, s->of->depth, &s->setup, &reach));
  s->is_settled = s->status == FLAP_OK;
}

static void simulate_one(void *context, uint64_t item, uint32_t worker) {
  wave *w = context;
  simulation *s = &w->of[item];
  (void)worker;
  if (s->is_settled)
    keep_status(s, planner_simulate(w->planner, w->budgets, &s->setup, w->limit_seconds, &s->costs));
}

static void run_wave(wave *w, flap_pool_fn fn) {
  if (w->planner->pool != NULL)
    flap_pool_run(w->planner->pool, w->count, fn, w);
  for (uint32_t i = 0; i < w->count && w->planner->pool == NULL; i++)
    fn(w, i, 0);
}

static uint64_t count_transfers(const simulation *s) {
  const flap_program *program = &s->setup.programs[s->setup.steady];
  uint64_t bytes[FLAP_LANE_COUNT], transfers = 0;
  flap_pager_predict(&s->setup.pager, program->leases, program->lease_count, bytes);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    transfers += bytes[lane] / s->setup.choice.transfer_bytes;
  return transfers;
}

/* Whoever plans has waited long enough: the best so far is the plan. */
static bool is_over(const flap_planner *planner) {
  return planner->memory != NULL && planner->memory->transfers >= planner->memory->transfers_max;
}

/* The first of them that is not simulated, after so many transfers before. */
static uint32_t cut_wave(const wave *w, uint64_t *transfers_io) {
  planner_memory *memory = w->planner->memory;
  uint32_t end = 0;
  for (; end < w->count && *transfers_io < PLANNER_TRANSFERS_MAX; end++) {
    const uint64_t more = w->of[end].is_settled ? count_transfers(&w->of[end]) : 0;
    if (is_over(w->planner))
      break;
    *transfers_io += more;
    if (memory != NULL)
      memory->transfers += more;
  }
  return end;
}

static flap_status end_simulation(const flap_planner *planner, simulation *s) {
  if (s->is_settled)
    tell(s->of, &s->setup, s->costs.step_seconds);
  if (s->status != FLAP_OK)
    return flap_error_set(s->status, "%s", s->message);
  if (!s->is_known)
    planner_remember(planner, s->of, &s->costs);
  return FLAP_OK;
}

static void close_wave(wave *w, uint32_t first) {
  for (uint32_t i = first; i < w->count; i++) {
    if (w->of[i].is_settled)
      flap_setup_close(&w->of[i].setup);
    w->of[i].is_settled = false;
  }
}

/* `transfers_io`: simulated so far, which is what it costs a person's patience. What comes of a wave is what came of
 * its members one after the other. */
static flap_status simulate_wave(wave *w, uint64_t *transfers_io, planner_contender *best, flap_plan_costs *costs) {
  flap_status status = FLAP_OK;
  run_wave(w, settle_one);
  const uint32_t end = cut_wave(w, transfers_io);
  close_wave(w, end);
  w->count = end;
  run_wave(w, simulate_one);
  for (uint32_t i = 0; i < end && status == FLAP_OK; i++) {
    const simulation *s = &w->of[i];
    status = end_simulation(w->planner, &w->of[i]);
    if (status == FLAP_OK && planner_is_better(s->of, &s->costs, best, costs)) {
      *best = *s->of;
      *costs = s->costs;
    }
  }
  close_wave(w, 0);
  return status;
}

flap_status planner_simulate_list(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                  const planner_contender *all, uint32_t all_count, uint32_t most,
                                  planner_contender *best, flap_plan_costs *costs) {
  planner_contender list[PLANNER_SIMULATED];
  const uint32_t count = planner_pick(all, all_count, most, list);
  const uint32_t threads = planner->pool != NULL ? flap_pool_threads(planner->pool) : 1;
  const double limit_seconds = costs->step_seconds * PLANNER_FAR;
  uint64_t transfers = 0;
  flap_assert(threads <= PLANNER_THREADS_MAX);
  for (uint32_t i = 0; i < count && transfers < PLANNER_TRANSFERS_MAX && !is_over(planner);) {
    wave w = {.planner = planner, .candidates = c, .budgets = budgets, .limit_seconds = limit_seconds};
    for (; i < count && w.count < threads; i++) {
      simulation *s = &w.of[w.count++];
      const flap_plan_costs *known = planner_recall(planner, &list[i]);
      s->of = &list[i];
      s->is_known = known != NULL;
      if (known != NULL)
        s->costs = *known;
    }
    FLAP_TRY(simulate_wave(&w, &transfers, best, costs));
  }
  return FLAP_OK;
}
