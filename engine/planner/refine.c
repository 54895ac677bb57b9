/* From a good candidate to a better one: one kind of choice after the other is tried with all else as it is. */
#include "engine/planner/planner_internal.h"

static bool same_cut(planner_skeleton a, planner_skeleton b) {
  return a.segment == b.segment && a.group == b.group && a.layerwise == b.layerwise &&
         a.spread == b.spread; /* and tails as long as they are */
}

/* The best few ways to cut the step, the best one first, then those of a list in turn. */
typedef struct cut_list {
  planner_skeleton of[PLANNER_CUTS];
  uint32_t count;
} cut_list;

static void enter_cuts(const planner_contender *list, uint32_t count, cut_list *cuts) {
  for (uint32_t i = 0, entered = 0; i < count && entered < PLANNER_REFINED_CUTS; i++) {
    bool known = cuts->count == PLANNER_CUTS;
    for (uint32_t k = 0; k < cuts->count; k++)
      known = known || same_cut(cuts->of[k], list[i].s);
    if (known)
      continue;
    cuts->of[cuts->count++] = list[i].s;
    entered++;
  }
}

/* What a refinement is about, the best of what it looked at, and what it is going to look at. */
typedef struct refinement {
  const flap_planner *planner;
  const planner_candidates *candidates;
  const flap_budgets *budgets;
  planner_contender list[PLANNER_CONTENDERS + 1];
  uint32_t count;
  planner_skeleton waiting[PLANNER_AHEAD]; /* in order */
  uint32_t waiting_count;
  bool only_depth; /* contenders with rings of this depth alone are entered */
  uint32_t depth;
} refinement;

static flap_status enter(refinement *r, planner_skeleton s) {
  planner_reach reach = PLANNER_NO_VRAM;
  planner_contender list[PLANNER_CONTENDERS + 1];
  uint32_t count = 0;
  const flap_status status =
      planner_enter_skeleton(r->planner, r->candidates, r->budgets, s, r->only_depth ? list : r->list,
                             r->only_depth ? &count : &r->count, &reach);
  for (uint32_t i = 0; i < count; i++)
    if (list[i].depth == r->depth)
      planner_enter(r->list, &r->count, list[i]);
  return status == FLAP_BUDGET ? FLAP_OK : status;
}

/* All that wait. */
static flap_status look_at_waiting(refinement *r) {
  planner_look_ahead(r->planner, r->candidates, r->budgets, r->waiting, r->waiting_count);
  for (uint32_t i = 0; i < r->waiting_count; i++)
    FLAP_TRY(enter(r, r->waiting[i]));
  r->waiting_count = 0;
  return FLAP_OK;
}

/* Candidates that compute less than the best step takes. */
static flap_status look_at(refinement *r, planner_skeleton s, const flap_plan_costs *costs) {
  if (planner_least_seconds(r->planner, r->budgets, s) >= costs->step_seconds)
    return FLAP_OK;
  r->waiting[r->waiting_count++] = s;
  return r->waiting_count == PLANNER_AHEAD ? look_at_waiting(r) : FLAP_OK;
}

static flap_status simulate_best(refinement *r, planner_contender *best, flap_plan_costs *costs) {
  FLAP_TRY(look_at_waiting(r));
  return planner_simulate_list(r->planner, r->candidates, r->budgets, r->list, r->count, PLANNER_REFINED, best, costs);
}

/* With rings as deep as the best one's: estimates tell too little of how deep they must be, and would fill the list
 * with one depth that is not the best. */
static refinement as_deep(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                          const planner_contender *best) {
  return (refinement){
      .planner = planner, .candidates = c, .budgets = budgets, .only_depth = true, .depth = best->depth};
}

/* Which tensors are saved, by how many layers: for the few best ways to cut the step every set. Among all candidates
 * they would be so many, and estimated so alike, that they would crowd others out of the list, and planning would take
 * three times as long. */
static flap_status refine_saved(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                const cut_list *cuts, planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  const planner_savings *const lists[] = {&c->partial, &c->saved};
  const uint32_t host = best->s.host;
  for (uint32_t k = 0; k < cuts->count; k++)
    for (size_t i = 0; i < (host > 0 ? 2u : 1u); i++) /* with no host's help all or nothing were looked at before */
      for (uint32_t j = 0; j < lists[i]->count; j++) {
        planner_skeleton s = cuts->of[k];
        s.saved = lists[i]->of[j];
        s.host = host;
        s.backward = best->s.backward;
        s.keeps = best->s.keeps;
        if (!planner_is_double(planner, lists[i], s))
          FLAP_TRY(look_at(&r, s, costs));
      }
  return simulate_best(&r, best, costs);
}

/* How much the host updates. */
static flap_status refine_host(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                               const cut_list *cuts, planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  for (uint32_t k = 0; k < cuts->count && c->other_host_count > 0; k++)
    for (uint32_t j = 0; j < c->other_host_count; j++) {
      planner_skeleton s = cuts->of[k];
      s.host = c->other_hosts[j];
      s.backward = best->s.backward;
      s.keeps = best->s.keeps;
      FLAP_TRY(look_at(&r, s, costs));
      s.saved = best->s.saved;
      if (!planner_is_double(planner, &c->partial, s))
        FLAP_TRY(look_at(&r, s, costs));
    }
  return simulate_best(&r, best, costs);
}

/* The same with all else as in the best; then whether it spares the parts that the next forward begins with. */
static flap_status refine_host_of_best(const flap_planner *planner, const planner_candidates *c,
                                       const flap_budgets *budgets, planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  for (uint32_t j = 0; j < c->other_host_count; j++) {
    planner_skeleton s = best->s;
    s.host = c->other_hosts[j];
    FLAP_TRY(look_at(&r, s, costs));
  }
  FLAP_TRY(simulate_best(&r, best, costs));
  if (best->s.host == 0 || best->s.backward.device > 0) /* where updates happen in the backward it does */
    return FLAP_OK;
  planner_skeleton other = best->s;
  other.spares_first = !other.spares_first;
  r.count = 0;
  FLAP_TRY(look_at(&r, other, costs));
  return simulate_best(&r, best, costs);
}

/* How much is updated in the backward, where that may be; then whether the embedding's states should stay: estimates
 * see what that takes from others, but not what it saves. */
static flap_status refine_backward(const flap_planner *planner, const planner_candidates *c,
                                   const flap_budgets *budgets, planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  for (uint32_t j = 0; j < c->other_backward_count; j++)
    for (int spread = 0; spread < 2; spread++) {
      planner_skeleton s = best->s;
      s.backward = c->other_backwards[j];
      s.spread = spread == 1;
      if (s.host == 0 && s.backward.device == best->s.backward.device && s.spread == best->s.spread)
        continue; /* the same, with no part of the host's */
      FLAP_TRY(look_at(&r, s, costs));
    }
  FLAP_TRY(simulate_best(&r, best, costs));
  if (c->backward.device == 0)
    return FLAP_OK;
  planner_skeleton kept = best->s;
  kept.keeps = !kept.keeps;
  r.count = 0;
  FLAP_TRY(look_at(&r, kept, costs));
  return simulate_best(&r, best, costs);
}

/* What is saved, with all else as in the best. */
static flap_status refine_saved_of_best(const flap_planner *planner, const planner_candidates *c,
                                        const flap_budgets *budgets, planner_contender *best, flap_plan_costs *costs) {
  refinement r = as_deep(planner, c, budgets, best);
  const planner_savings *const lists[] = {&c->partial, &c->saved};
  for (size_t i = 0; i < 2; i++)
    for (uint32_t j = 0; j < lists[i]->count; j++) {
      planner_skeleton s = best->s;
      s.saved = lists[i]->of[j];
      if (!planner_is_double(planner, lists[i], s))
        FLAP_TRY(look_at(&r, s, costs));
    }
  return simulate_best(&r, best, costs);
}

/* How long segments are, how many micro-batches are a group, and whether updates are spread, with all else as in the
 * best: other cuts than the first list's may be good with what is saved now, or updated in the backward, or start a
 * better step with a longer tail. */
static flap_status refine_cut(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                              planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  const flap_plan_costs worth = {.step_seconds = costs->step_seconds * PLANNER_START_WORTH};
  for (uint32_t i = 0; i < c->group_count + c->segment_count; i++)
    for (int spread = 0; spread < (c->sweep ? 1 : 2); spread++) {
      planner_skeleton s = best->s;
      if (i < c->group_count) {
        s.group = c->groups[i];
      } else {
        s.segment = c->segments[i - c->group_count];
        s.tail = planner_tail(planner, s.segment, c->tails[0]);
      }
      s.spread = spread == 1;
      FLAP_TRY(look_at(&r, s, &worth));
    }
  return simulate_best(&r, best, costs);
}

/* Lengths of segments whose layers are computed again one by one: those of all candidates; and others with a short
 * tail, which several micro-batches pass with sums of each of its layers. */
static uint32_t layerwise_lengths(const flap_planner *planner, const planner_candidates *c,
                                  uint32_t lengths_out[PLANNER_SEGMENTS_MAX + PLANNER_LAYERWISE_MAX]) {
  const uint32_t layers = planner->spec.model->num_hidden_layers;
  uint32_t count = 0;
  for (uint32_t i = 0; i < c->segment_count; i++)
    lengths_out[count++] = c->segments[i];
  if (planner->expert.segment_layers > 0 || planner->spec.micro_batches == 1)
    return count;
  for (uint32_t k = 3; k <= PLANNER_LAYERWISE_MAX && k < layers; k++)
    if ((k & (k - 1)) != 0 && flap_layout_least_tail(layers, k) <= 2)
      lengths_out[count++] = k;
  return count;
}

/* Whether layers that save nothing are computed again one by one, and how long segments are then: with all else as in
 * the best; or with nothing saved and one group, for then a backward goes by layer, and its updates come a layer at a
 * time. The best of these is refined once more before it is compared. */
static flap_status refine_layerwise(const flap_planner *planner, const planner_candidates *c,
                                    const flap_budgets *budgets, planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  const flap_plan_costs worth = {.step_seconds = costs->step_seconds * PLANNER_START_WORTH};
  uint32_t lengths[PLANNER_SEGMENTS_MAX + PLANNER_LAYERWISE_MAX];
  const uint32_t count = layerwise_lengths(planner, c, lengths);
  planner_contender found = *best;
  flap_plan_costs found_costs = {0};
  if (planner->expert.recompute == FLAP_RECOMPUTE_SEGMENTS || planner->spec.mode != FLAP_MODE_TRAIN)
    return FLAP_OK;
  for (uint32_t i = 0; i < count; i++)
    for (int way = 0; way < 3; way++) {
      planner_skeleton s = best->s;
      s.layerwise = true;
      s.segment = lengths[i];
      s.tail = planner_tail(planner, s.segment, c->tails[0]);
      if (way == 0) {
        s.saved = c->saved.of[0];
        s.group = c->groups[0];
        s.backward = c->backward;
      }
      s.spread = way == 2;
      if (way == 1 && best->s.saved.layers == 0 && best->s.group == c->groups[0] &&
          best->s.backward.device == c->backward.device && best->s.backward.host == c->backward.host)
        continue; /* the first way once more */
      if (planner_layerwise_differs(planner, s) && !planner_is_double(planner, &c->saved, s) && !(s.spread && c->sweep))
        FLAP_TRY(look_at(&r, s, &worth));
    }
  FLAP_TRY(simulate_best(&r, &found, &found_costs));
  if (found_costs.step_seconds <= 0 || found_costs.step_seconds > worth.step_seconds)
    return FLAP_OK;
  FLAP_TRY(refine_backward(planner, c, budgets, &found, &found_costs));
  if (found_costs.step_seconds < costs->step_seconds * 0.9999) {
    *best = found;
    *costs = found_costs;
  }
  return FLAP_OK;
}

/* How many layers save, between the shares that were tried. */
static flap_status refine_layers(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                 planner_contender *best, flap_plan_costs *costs) {
  refinement r = as_deep(planner, c, budgets, best);
  const uint32_t all = planner->spec.model->num_hidden_layers, middle = best->s.saved.layers;
  if (middle == 0 || planner->activations != FLAP_ACTIVATIONS_AUTO)
    return FLAP_OK;
  const uint32_t reach = all / PLANNER_SAVED_SHARES;
  for (uint32_t layers = middle > reach ? middle - reach + 1 : 1; layers < middle + reach && layers <= all; layers++) {
    planner_skeleton s = best->s;
    s.saved.layers = layers;
    if (layers != middle && (layers == all || layers <= all - s.tail))
      FLAP_TRY(look_at(&r, s, costs));
  }
  return simulate_best(&r, best, costs);
}

/* The best with a tail of so many layers, whatever is saved beside it: what it takes of VRAM is missing for that, and
 * there are fewer layers that need it. Rings are as deep as the best one's, or as deep as estimates think best. */
static flap_status best_of_tail(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                const planner_contender *best, uint32_t tail, planner_contender *found,
                                flap_plan_costs *costs) {
  refinement deep = as_deep(planner, c, budgets, best), all = {.planner = planner, .candidates = c, .budgets = budgets};
  refinement other = all;
  const uint32_t least = planner->activations == FLAP_ACTIVATIONS_AUTO ? 0 : PLANNER_SAVED_SHARES;
  const uint32_t layers = planner->spec.model->num_hidden_layers;
  const flap_plan_costs any = {.step_seconds = costs->step_seconds * PLANNER_WORTH_SIMULATING};
  for (uint32_t share = PLANNER_SAVED_SHARES + 1; share-- > least;) {
    planner_skeleton s = best->s;
    s.tail = tail;
    s.saved.layers = s.saved.layers * share / PLANNER_SAVED_SHARES;
    s.saved.layers = s.saved.layers < layers && s.saved.layers > layers - tail ? layers - tail : s.saved.layers;
    s.saved.mask = s.saved.layers > 0 ? s.saved.mask : 0;
    FLAP_TRY(look_at(&deep, s, &any));
    FLAP_TRY(look_at(&all, s, &any));
  }
  FLAP_TRY(look_at_waiting(&deep));
  FLAP_TRY(look_at_waiting(&all));
  for (uint32_t i = 0; i < all.count; i++)
    if (all.list[i].depth != best->depth)
      planner_enter(other.list, &other.count, all.list[i]);
  *costs = (flap_plan_costs){0};
  FLAP_TRY(planner_simulate_list(planner, c, budgets, deep.list, deep.count, 2, found, costs));
  return planner_simulate_list(planner, c, budgets, other.list, other.count, 1, found, costs);
}

/* How long the tail is: longer ones as long as steps get shorter, with some patience. */
static flap_status refine_tail(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                               planner_contender *best, flap_plan_costs *costs) {
  const planner_contender start = *best;
  double before = costs->step_seconds;
  uint32_t tail = start.s.tail;
  for (uint32_t i = 0, worse = 0; i < c->tail_count && worse < PLANNER_TAILS_WORSE; i++) {
    const uint32_t next = planner_tail(planner, start.s.segment, c->tails[i]);
    planner_contender found = start;
    flap_plan_costs found_costs = *costs;
    if (next <= tail)
      continue;
    tail = next;
    FLAP_TRY(best_of_tail(planner, c, budgets, &start, tail, &found, &found_costs));
    if (found_costs.step_seconds <= 0)
      break; /* no room */
    worse = found_costs.step_seconds < before ? 0 : worse + 1;
    before = found_costs.step_seconds;
    if (found_costs.step_seconds < costs->step_seconds * 0.9999) {
      *best = found;
      *costs = found_costs;
    }
  }
  return FLAP_OK;
}

/* The next size of a slice or of a page, from the best one's own, as long as that makes the step shorter. */
static flap_status climb(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                         bool pages, int direction, planner_contender *best, flap_plan_costs *costs) {
  const uint64_t *const sizes = pages ? c->pages : c->slices;
  const uint32_t count = pages ? c->page_count : c->slice_count;
  for (double before = 0; before != costs->step_seconds;) {
    refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
    planner_skeleton s = best->s;
    uint64_t *const size = pages ? &s.page : &s.slice;
    const uint32_t at = planner_preferred_index(sizes, count, *size);
    if (direction < 0 ? at == 0 : at + 1 == count)
      break;
    *size = sizes[direction < 0 ? at - 1 : at + 1];
    before = costs->step_seconds;
    FLAP_TRY(look_at(&r, s, costs));
    FLAP_TRY(simulate_best(&r, best, costs));
  }
  return FLAP_OK;
}

/* Sizes of slices and pages, beside those that the budgets suggest: how transfers fill the gaps that computing leaves,
 * and what each of them costs, is nothing that estimates see. Where a step is made of thousands of transfers it hardly
 * matters, and simulating takes long. */
static flap_status refine_sizes(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                planner_contender *best, flap_plan_costs *costs) {
  flap_setup setup;
  planner_reach reach = PLANNER_NO_VRAM;
  uint64_t transfers = 0;
  FLAP_TRY(planner_settle(planner, c, best->s, budgets, best->depth, &setup, &reach));
  const flap_choice settled = setup.choice;
  flap_setup_close(&setup);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    transfers += costs->lane_bytes[lane] / settled.transfer_bytes;
  if (transfers > PLANNER_TRANSFERS_COARSE)
    return FLAP_OK;
  best->s.slice = settled.slice_elements;
  best->s.page = settled.page_bytes;
  for (int pages = 0; pages < 2; pages++)
    for (int direction = -1; direction < 2; direction += 2)
      FLAP_TRY(climb(planner, c, budgets, pages == 1, direction, best, costs));
  return FLAP_OK;
}

/* What is saved together with how large slices are, where a step has few transfers: one of the two alone may not gain.
 */
static flap_status refine_saved_and_slices(const flap_planner *planner, const planner_candidates *c,
                                           const flap_budgets *budgets, planner_contender *best,
                                           flap_plan_costs *costs) {
  refinement r = as_deep(planner, c, budgets, best);
  const planner_savings *const lists[] = {&c->partial, &c->saved};
  if (best->s.slice == 0) /* refine_sizes found too many transfers */
    return FLAP_OK;
  for (uint32_t k = 0; k < c->slice_count; k++)
    for (size_t i = 0; i < 2; i++)
      for (uint32_t j = 0; j < lists[i]->count; j++) {
        planner_skeleton s = best->s;
        s.slice = c->slices[k];
        s.saved = lists[i]->of[j];
        if (!planner_is_double(planner, lists[i], s))
          FLAP_TRY(look_at(&r, s, costs));
      }
  return simulate_best(&r, best, costs);
}

/* Spare tensors are worth their place where everything else is kept. Among the candidates they would crowd out others.
 */
static flap_status refine_spare(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                planner_contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  uint32_t count = 0;
  const flap_saved_set *sets = flap_model_saved_sets(planner->spec.model, &count);
  if (planner->expert.saved != FLAP_RUN_SAVED_AUTO || best->s.saved.layers < planner->spec.model->num_hidden_layers ||
      best->s.saved.mask != sets[count - 2].mask)
    return FLAP_OK;
  planner_skeleton s = best->s;
  s.saved.mask = sets[count - 1].mask;
  FLAP_TRY(look_at(&r, s, costs));
  return simulate_best(&r, best, costs);
}

/* Bytes of buffers that a skeleton comes to; 0 where nothing is on disk. */
static flap_status staging_of(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                              const planner_contender *of, uint64_t *bytes_out) {
  flap_setup setup;
  planner_reach reach = PLANNER_NO_VRAM;
  FLAP_TRY(planner_settle(planner, c, of->s, budgets, of->depth, &setup, &reach));
  const flap_choice *choice = &setup.choice;
  *bytes_out = ((uint64_t)choice->read_buffers + choice->write_buffers) * choice->transfer_bytes;
  flap_setup_close(&setup);
  return FLAP_OK;
}

/* Simulates one that differs from the best in what estimates know nothing of; whether it takes its place. */
static flap_status look_at_one(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                               planner_skeleton s, planner_contender *best, flap_plan_costs *costs, bool *better_out) {
  planner_contender tried = *best;
  flap_plan_costs costs_here = {0};
  tried.s = s;
  FLAP_TRY(planner_simulate_list(planner, c, budgets, &tried, 1, 1, &tried, &costs_here));
  *better_out = costs_here.step_seconds > 0 && costs_here.step_seconds < costs->step_seconds * 0.9999;
  if (*better_out) {
    *best = tried;
    *costs = costs_here;
  }
  return FLAP_OK;
}

/* `bytes_io`: what is tried, and what budgets made of it; 0 where that is no better. */
static flap_status look_at_staging(const flap_planner *planner, const planner_candidates *c,
                                   const flap_budgets *budgets, uint64_t now, uint64_t *bytes_io,
                                   planner_contender *best, flap_plan_costs *costs) {
  planner_contender tried = *best;
  bool better = false;
  tried.s.staging = *bytes_io;
  FLAP_TRY(staging_of(planner, c, budgets, &tried, bytes_io));
  if (*bytes_io != now && *bytes_io > 0)
    FLAP_TRY(look_at_one(planner, c, budgets, tried.s, best, costs, &better));
  if (!better)
    *bytes_io = 0;
  return FLAP_OK;
}

/* How much is read ahead and written behind, where disks are busy for a part of the step and then rest: four times as
 * much as long as that gains, then twice or half of it. What is staged has no home in RAM: the simulation sees both. As
 * many read as write buffers: of other shares none was better. */
static flap_status refine_staging(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                  planner_contender *best, flap_plan_costs *costs) {
  uint64_t now = 0;
  planner_contender found = *best;
  flap_plan_costs found_costs = *costs;
  const double read = costs->lane_seconds[FLAP_LANE_DISK_READ], write = costs->lane_seconds[FLAP_LANE_DISK_WRITE];
  const double busy = (read > write ? read : write) / costs->step_seconds;
  if (planner->expert.staging_bytes > 0 || busy < 1 - PLANNER_STAGING_GAIN || busy > PLANNER_STAGING_GAIN)
    return FLAP_OK;
  FLAP_TRY(staging_of(planner, c, budgets, best, &now));
  for (uint64_t bytes = 4 * now; bytes > 0; bytes *= 4) {
    FLAP_TRY(look_at_staging(planner, c, budgets, now, &bytes, &found, &found_costs));
    now = bytes > 0 ? bytes : now;
  }
  for (uint64_t bytes = found.s.staging > 0 ? 2 * now : 0, tries = 0; bytes > 0 && tries < 2; tries++) {
    FLAP_TRY(look_at_staging(planner, c, budgets, now, &bytes, &found, &found_costs));
    bytes = bytes > 0 ? 0 : now / 2;
  }
  if (found_costs.step_seconds < costs->step_seconds * PLANNER_STAGING_GAIN) {
    *best = found;
    *costs = found_costs;
  }
  return FLAP_OK;
}

/* Whether RAM could be worth more as a pool: disks are what steps wait for, and cores have nothing to do but to code.
 */
static bool may_pool(const flap_planner *planner, const planner_contender *best, const flap_plan_costs *costs) {
  const flap_setup_spec *spec = &planner->spec;
  const double read = costs->lane_seconds[FLAP_LANE_DISK_READ], write = costs->lane_seconds[FLAP_LANE_DISK_WRITE];
  return planner->expert.pool_bytes == 0 && planner->machine->encode_bytes > 0 && planner->machine->decode_bytes > 0 &&
         best->s.host == 0 && !planner->machine->shared_cores && spec->compression != FLAP_COMPRESSION_OFF &&
         spec->mode == FLAP_MODE_TRAIN && spec->optim == FLAP_OPTIM_ADAMW &&
         (read > write ? read : write) > PLANNER_POOL_BUSY * costs->step_seconds;
}

/* How much of ram is a pool, in parts of ram and then half a part more or less, with buffers enough for what it gives
 * and takes beside the disks. */
static flap_status refine_pool(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                               planner_contender *best, flap_plan_costs *costs) {
  planner_contender found = *best;
  flap_plan_costs found_costs = *costs;
  uint64_t staging = 0;
  if (!may_pool(planner, best, costs))
    return FLAP_OK;
  FLAP_TRY(staging_of(planner, c, budgets, best, &staging));
  const uint64_t part_bytes = budgets->ram_bytes / PLANNER_POOL_PARTS;
  planner_skeleton s = best->s;
  s.staging = planner->expert.staging_bytes > 0 ? planner->expert.staging_bytes : PLANNER_POOL_STAGING * staging;
  bool better = true;
  for (uint64_t part = 1; part < PLANNER_POOL_PARTS && better; part++) {
    s.pool = part_bytes * part;
    FLAP_TRY(look_at_one(planner, c, budgets, s, &found, &found_costs, &better));
  }
  const uint64_t pool = found.s.pool;
  for (int more = 1; more >= 0 && pool > 0; more--) {
    s.pool = more == 1 ? pool + part_bytes / 2 : pool - part_bytes / 2;
    FLAP_TRY(look_at_one(planner, c, budgets, s, &found, &found_costs, &better));
    if (better)
      break;
  }
  if (found_costs.step_seconds < costs->step_seconds * PLANNER_POOL_GAIN) {
    *best = found;
    *costs = found_costs;
  }
  return FLAP_OK;
}

/* The kinds of choices that hang together, one after the other, as long as that makes the step shorter. */
static flap_status refine_kinds(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                cut_list cuts, planner_contender *best, flap_plan_costs *costs) {
  for (int round = 0; round < PLANNER_ROUNDS; round++) {
    const double before = costs->step_seconds;
    FLAP_TRY(refine_sizes(planner, c, budgets, best, costs));
    for (uint32_t k = 0; k < cuts.count; k++) {
      cuts.of[k].slice = best->s.slice;
      cuts.of[k].page = best->s.page;
      cuts.of[k].staging = best->s.staging;
    }
    FLAP_TRY(refine_saved(planner, c, budgets, &cuts, best, costs));
    FLAP_TRY(refine_host(planner, c, budgets, &cuts, best, costs));
    FLAP_TRY(refine_backward(planner, c, budgets, best, costs));
    if (costs->step_seconds >= before)
      break;
  }
  return FLAP_OK;
}

/* What is saved and how long the tail is, in turn. */
static flap_status refine_saved_and_tail(const flap_planner *planner, const planner_candidates *c,
                                         const flap_budgets *budgets, planner_contender *best, flap_plan_costs *costs) {
  for (int round = 0; round < PLANNER_ROUNDS; round++) {
    const double before = costs->step_seconds;
    FLAP_TRY(refine_saved_of_best(planner, c, budgets, best, costs));
    FLAP_TRY(refine_layers(planner, c, budgets, best, costs));
    FLAP_TRY(refine_tail(planner, c, budgets, best, costs));
    FLAP_TRY(refine_layers(planner, c, budgets, best, costs));
    if (costs->step_seconds >= before * 0.9999)
      break;
  }
  return FLAP_OK;
}

/* How much the host updates; where another share is better, what is saved and the tail are refined once more, and so
 * on. */
static flap_status refine_host_and_tail(const flap_planner *planner, const planner_candidates *c,
                                        const flap_budgets *budgets, planner_contender *best, flap_plan_costs *costs) {
  for (int round = 0; round < PLANNER_ROUNDS; round++) {
    const double before = costs->step_seconds;
    FLAP_TRY(refine_host_of_best(planner, c, budgets, best, costs));
    if (costs->step_seconds >= before)
      break;
    FLAP_TRY(refine_saved_and_tail(planner, c, budgets, best, costs));
  }
  return FLAP_OK;
}

static bool same_start(planner_skeleton a, planner_skeleton b) {
  return same_cut(a, b) && (a.host > 0) == (b.host > 0);
}

typedef struct start {
  planner_contender contender;
  flap_plan_costs costs;
} start;

/* The best so far; then the best of those that cut the step otherwise, or with the host's help where that has none and
 * the other way round: with a long tail another one may be the best. */
static uint32_t pick_starts(const flap_planner *planner, const planner_contender *best, const flap_plan_costs *costs,
                            start starts[PLANNER_STARTS]) {
  const planner_memory *memory = planner->memory;
  uint32_t count = 1;
  starts[0] = (start){*best, *costs};
  while (count < PLANNER_STARTS) {
    double least = costs->step_seconds * PLANNER_START_WORTH;
    bool found = false;
    for (uint32_t i = 0; i < memory->count; i++) {
      const planner_contender *of = &memory->of[i].contender;
      bool known = memory->of[i].costs.step_seconds >= least;
      for (uint32_t k = 0; k < count && !known; k++)
        known = same_start(starts[k].contender.s, of->s);
      if (known)
        continue;
      least = memory->of[i].costs.step_seconds;
      starts[count] = (start){*of, memory->of[i].costs};
      found = true;
    }
    if (!found)
      break;
    count++;
  }
  return count;
}

static flap_status refine_starts(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                 planner_contender *best, flap_plan_costs *costs) {
  start starts[PLANNER_STARTS];
  const uint32_t count = pick_starts(planner, best, costs, starts);
  for (uint32_t i = 0; i < count; i++) {
    start *one = &starts[i];
    FLAP_TRY(refine_saved_and_tail(planner, c, budgets, &one->contender, &one->costs));
    if (planner_is_better(&one->contender, &one->costs, best, costs)) {
      *best = one->contender;
      *costs = one->costs;
    }
  }
  return FLAP_OK;
}

/* From the best while nobody helps and all or nothing is saved; cuts that are good with the host's help are among those
 * that are tried. Where updates happen in the backward, so many choices hang together that the best with that help is a
 * start of its own. */
flap_status planner_refine(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                           const planner_contender *list, uint32_t count, planner_contender *best,
                           flap_plan_costs *costs) {
  cut_list cuts = {.of = {best->s}, .count = 1};
  planner_contender helped[PLANNER_CONTENDERS + 1];
  uint32_t helped_count = 0;
  enter_cuts(list, count, &cuts);
  if (c->other_host_count > 0) {
    planner_reach reach = PLANNER_NO_VRAM;
    FLAP_TRY(
        planner_shortlist(planner, c, budgets, c->other_hosts[c->other_host_count / 2], helped, &helped_count, &reach));
    enter_cuts(helped, helped_count, &cuts);
  }
  FLAP_TRY(refine_kinds(planner, c, budgets, cuts, best, costs));
  if (c->backward.device > 0 && helped_count > 0) {
    planner_contender other = helped[0];
    flap_plan_costs other_costs = {0};
    FLAP_TRY(planner_simulate_list(planner, c, budgets, helped, helped_count, PLANNER_SIMULATED, &other, &other_costs));
    if (other_costs.step_seconds > 0) /* or there was no time left to simulate any */
      FLAP_TRY(refine_kinds(planner, c, budgets, cuts, &other, &other_costs));
    if (other_costs.step_seconds > 0 && other_costs.step_seconds < costs->step_seconds * 0.9999) {
      *best = other;
      *costs = other_costs;
    }
  }
  FLAP_TRY(refine_cut(planner, c, budgets, best, costs));
  FLAP_TRY(refine_layerwise(planner, c, budgets, best, costs));
  FLAP_TRY(refine_starts(planner, c, budgets, best, costs));
  FLAP_TRY(refine_host_and_tail(planner, c, budgets, best, costs));
  FLAP_TRY(refine_saved_and_slices(planner, c, budgets, best, costs));
  FLAP_TRY(refine_spare(planner, c, budgets, best, costs));
  FLAP_TRY(refine_pool(planner, c, budgets, best, costs));
  FLAP_TRY(refine_staging(planner, c, budgets, best, costs));
  if (best->s.staging == 0 || planner->expert.staging_bytes > 0)
    return FLAP_OK;
  return refine_backward(planner, c, budgets, best, costs); /* disks that rest less want another share */
}
