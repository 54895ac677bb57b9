#include "engine/planner/planner.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/units.h"
#include "engine/planner/planner_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- settling a skeleton on a slice and a page size ------------------------------------------------------- */

/* Indexes in the order in which they are tried: the preferred one, smaller ones downwards, then larger ones upwards. */
static uint32_t from_preferred(uint32_t preferred, uint32_t count, uint32_t turn) {
  flap_assert(preferred < count && turn < count);
  return turn <= preferred ? preferred - turn : turn;
}

static uint32_t preferred_index(const uint64_t *ascending, uint32_t count, uint64_t wanted) {
  uint32_t index = 0;
  while (index + 1 < count && ascending[index + 1] <= wanted)
    index++;
  return index;
}

typedef planner_contender contender;

flap_choice planner_choice_of(const flap_planner *planner, const planner_candidates *c, planner_skeleton s,
                              uint64_t slice, uint64_t page) {
  flap_choice choice = {.segment_layers = s.segment,
                        .group_micro_batches = s.group,
                        .saved_layers = s.saved.layers,
                        .saved_mask = s.saved.mask,
                        .sweep = c->sweep,
                        .spread = s.spread,
                        .host_parts = s.host,
                        .backward_parts = s.backward.device,
                        .host_backward_parts = s.backward.host,
                        .keeps_embedding = s.keeps,
                        .slice_elements = slice,
                        .page_bytes = page,
                        .transfer_bytes = page,
                        .staging_bytes = s.staging};
  if (planner->spec.disk_count > 0)
    choice.read_buffers = choice.write_buffers = choice.workers = 1;
  return choice;
}

/* Whether the regions alone are more than all tiers together, but for what workspaces take of vram; or those of the
 * host more than ram. With any slice or page size they are as many bytes, but for what rounding each region up has
 * added. */
static bool has_no_room(const flap_planner *planner, const flap_budgets *budgets, const flap_setup *setup) {
  double bytes = 0, host = 0, room = (double)budgets->vram_bytes + (double)budgets->ram_bytes;
  room -= (double)setup->vram_scratch_bytes + (double)setup->spec.vram_overhead_bytes;
  for (uint32_t i = 0; i < planner->spec.disk_count; i++)
    room += (double)budgets->disk_bytes[i];
  for (uint32_t i = 0; i < setup->layout.region_count; i++) {
    const flap_layout_region *region = &setup->layout.regions[i];
    const double least = (double)(region->bytes - FLAP_BLOCK_ALIGN);
    bytes += least;
    host += region->place != FLAP_PLACE_ANY ? least : 0;
  }
  return bytes > room || host > (double)budgets->ram_bytes;
}

/* Whether ram lacks more, with no disk, than smaller slices could save: their rings, and as much as rounding and tables
 * may differ by, which small models are made of. Of a setup that was placed without a home in ram. */
static bool slices_cannot_help(const flap_planner *planner, const flap_budgets *budgets, const flap_setup *setup) {
  double homes = 0;
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    homes += (double)setup->classes[k].disk_bytes;
  const double rings = (double)setup->classes[FLAP_CLASS_STATES].ring_bytes +
                       (double)setup->classes[FLAP_CLASS_GRADIENTS].ring_bytes +
                       (double)setup->classes[FLAP_CLASS_ROUNDED].resident_bytes;
  const double ram = (double)budgets->ram_bytes;
  return planner->spec.disk_count == 0 && (double)setup->ram_bytes + homes > ram + rings + ram / 64 + 64.0 * FLAP_MIB;
}

/* The first slice and page size that fit, with everything placed. FLAP_BUDGET if none does, and how far it got. */
flap_status planner_settle(const flap_planner *planner, const planner_candidates *c, planner_skeleton s,
                           const flap_budgets *budgets, uint32_t depth, flap_setup *setup, planner_reach *reach) {
  const uint64_t share = budgets->vram_bytes / PLANNER_SLICE_SHARE;
  const uint64_t slice_bytes = share < PLANNER_SLICE_BYTES ? share : PLANNER_SLICE_BYTES;
  const uint64_t slice_wanted = slice_bytes / planner_state_block_bytes(planner) * FLAP_OPS_BLOCK;
  const uint64_t page_wanted =
      budgets->ram_bytes / 256 < budgets->vram_bytes / 64 ? budgets->ram_bytes / 256 : budgets->vram_bytes / 64;
  const uint32_t slice_first = preferred_index(c->slices, c->slice_count, s.slice > 0 ? s.slice : slice_wanted);
  const uint32_t page_first = preferred_index(c->pages, c->page_count, s.page > 0 ? s.page : page_wanted);
  uint64_t slice_least = 0; /* smaller ones have longer lists, and those of this one are too long for ram already */
  for (uint32_t i = 0; i < c->slice_count; i++) {
    const uint64_t slice = c->slices[from_preferred(slice_first, c->slice_count, i)];
    planner_reach furthest = PLANNER_NO_VRAM;
    if (slice < slice_least)
      continue;
    flap_choice choice = planner_choice_of(planner, c, s, slice, c->pages[page_first]);
    FLAP_TRY(flap_setup_build(&planner->spec, &choice, setup));
    for (uint32_t j = 0; j < c->page_count; j++) {
      choice.page_bytes = choice.transfer_bytes = c->pages[from_preferred(page_first, c->page_count, j)];
      const planner_reach got = planner_fill(planner, budgets, &choice, depth, setup);
      if (got == PLANNER_FITS)
        return FLAP_OK;
      furthest = got > furthest ? got : furthest;
      if (got == PLANNER_NO_VRAM)
        break; /* pages make no difference */
    }
    *reach = furthest > *reach ? furthest : *reach;
    const uint64_t lists = setup->ram_arena_bytes - setup->sizes.ram_bytes;
    if (furthest == PLANNER_NO_RAM && setup->choice.trace_events == 0 && lists > budgets->ram_bytes)
      slice_least = slice;
    const bool hopeless = planner_least_without_slices(planner, &choice, setup) > budgets->vram_bytes ||
                          has_no_room(planner, budgets, setup) ||
                          (furthest == PLANNER_NO_DISK && slices_cannot_help(planner, budgets, setup));
    flap_setup_close(setup);
    if (hopeless)
      break;
  }
  return flap_error_set(FLAP_BUDGET, "no plan fits");
}

/* ---- choosing -------------------------------------------------------------------------------------------- */

static bool same_contender(const contender *a, const contender *b) {
  const planner_skeleton *s = &a->s, *t = &b->s;
  return a->depth == b->depth && s->segment == t->segment && s->group == t->group && s->spread == t->spread &&
         s->saved.layers == t->saved.layers && s->saved.mask == t->saved.mask && s->host == t->host &&
         s->backward.device == t->backward.device && s->backward.host == t->backward.host && s->keeps == t->keeps &&
         s->slice == t->slice && s->page == t->page && s->staging == t->staging;
}

/* Of those with segments of one length there are enough: the worst of them goes, if it is worse than this one. */
static bool make_way(contender *list, uint32_t *count, const contender *candidate) {
  uint32_t alike = 0, worst = 0;
  for (uint32_t i = 0; i < *count; i++)
    if (list[i].s.segment == candidate->s.segment) {
      alike++;
      worst = i;
    }
  if (alike < PLANNER_ALIKE)
    return true;
  if (candidate->estimate >= list[worst].estimate)
    return false;
  memmove(&list[worst], &list[worst + 1], (*count - worst - 1) * sizeof *list);
  (*count)--;
  return true;
}

/* Keeps the best few, each once, in order; equally good ones in the order in which they came. */
static void enter(contender *list, uint32_t *count, contender candidate) {
  for (uint32_t i = 0; i < *count; i++)
    if (same_contender(&list[i], &candidate))
      return;
  if (!make_way(list, count, &candidate))
    return;
  uint32_t at = *count;
  while (at > 0 && candidate.estimate < list[at - 1].estimate)
    at--;
  if (at >= PLANNER_CONTENDERS)
    return;
  const uint32_t last = *count < PLANNER_CONTENDERS ? *count : PLANNER_CONTENDERS - 1;
  memmove(&list[at + 1], &list[at], (last - at) * sizeof *list);
  list[at] = candidate;
  *count = last + 1;
}

/* Of a list those that are worth simulating, at most so many, in order: half of them at most with segments of one
 * length, as long as there are others. */
static uint32_t pick(const contender *list, uint32_t count, uint32_t most, contender picked_out[PLANNER_SIMULATED]) {
  bool taken[PLANNER_CONTENDERS + 1] = {false};
  uint32_t picked = 0;
  for (int again = 0; again < 2; again++)
    for (uint32_t i = 0; i < count && picked < most; i++) {
      uint32_t alike = 0;
      for (uint32_t j = 0; j < i; j++)
        alike += taken[j] && list[j].s.segment == list[i].s.segment;
      if (taken[i] || list[i].estimate > list[0].estimate * PLANNER_WORTH_SIMULATING || (!again && alike >= most / 2))
        continue;
      taken[i] = true;
      picked++;
    }
  picked = 0;
  for (int others = 0; others < 2; others++) /* the best of each length come first: of long steps few are simulated */
    for (uint32_t i = 0; i < count; i++) {
      bool is_first = true;
      for (uint32_t j = 0; j < i && is_first; j++)
        is_first = !taken[j] || list[j].s.segment != list[i].s.segment;
      if (taken[i] && is_first == (others == 0))
        picked_out[picked++] = list[i];
    }
  return picked;
}

static double correction(const flap_planner *planner, uint32_t segment) {
  const planner_corrections *known = planner->corrections;
  for (uint32_t i = 0; known != NULL && i < known->count; i++)
    if (known->of[i].segment == segment)
      return known->of[i].ratio;
  return 1;
}

static void learn(const flap_planner *planner, const contender *simulated, double seconds) {
  planner_corrections *known = planner->corrections;
  const double ratio = seconds / simulated->uncorrected;
  uint32_t i = 0;
  if (known == NULL || !(simulated->uncorrected > 0))
    return;
  while (i < known->count && known->of[i].segment != simulated->s.segment)
    i++;
  if (i == PLANNER_SEGMENTS_MAX)
    return;
  if (i == known->count)
    known->count++;
  else if (known->of[i].ratio <= ratio)
    return;
  known->of[i].segment = simulated->s.segment;
  known->of[i].ratio = ratio;
}

/* The best that a skeleton can do, over how far transfers may run ahead. */
static flap_status enter_skeleton(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                  planner_skeleton s, contender *list, uint32_t *count, planner_reach *reach) {
  static const uint32_t depths[] = {1, 3, 0};
  flap_setup setup;
  FLAP_TRY(planner_settle(planner, c, s, budgets, 0, &setup, reach));
  const flap_choice settled = setup.choice;
  for (size_t d = 0; d < sizeof depths / sizeof *depths; d++) {
    flap_choice choice = settled;
    choice.transfer_bytes = choice.page_bytes;
    choice.read_buffers = choice.write_buffers = choice.workers = planner->spec.disk_count > 0 ? 1 : 0;
    if (planner_fill(planner, budgets, &choice, depths[d], &setup) != PLANNER_FITS)
      continue;
    const double estimate = planner_estimate(planner, &setup) * (depths[d] == 0 ? PLANNER_NOTHING_AHEAD : 1);
    enter(list, count,
          (contender){.s = s,
                      .depth = depths[d],
                      .estimate = estimate * correction(planner, s.segment),
                      .uncorrected = estimate});
  }
  flap_setup_close(&setup);
  return FLAP_OK;
}

/* Layers of a skeleton that are computed again, over the micro-batches of a group: those that save nothing, but for the
 * last segment's. */
static double unsaved_layers(const flap_planner *planner, planner_skeleton s) {
  const flap_layout_spec spec = {.model = planner->spec.model,
                                 .segment_layers = s.segment,
                                 .group_micro_batches = s.group,
                                 .saved_layers = s.saved.layers};
  return planner->spec.model->num_hidden_layers - flap_layout_last_layers(&spec) -
         (double)flap_layout_saved_count(&spec) / s.group;
}

/* Of a micro-batch, on average. Where nothing is saved, all layers of a segment but the last run as in the forward. */
static double recompute_ns(const flap_planner *planner, planner_skeleton s) {
  const flap_op_times *t = planner->times;
  const double unsaved = unsaved_layers(planner, s), segments = unsaved / s.segment;
  const double again = (double)t->forward_ns * (unsaved - segments) + (double)t->recompute_ns * segments;
  const flap_layout_spec spec = {.model = planner->spec.model, .segment_layers = s.segment};
  const double saving = planner->spec.model->num_hidden_layers - flap_layout_last_layers(&spec) - unsaved;
  return saving > 0 ? again + (double)flap_op_times_recompute(t, s.saved.mask) * saving : again;
}

/* Whether it comes to the same as another candidate, once only whole segments save: as one with fewer layers of the
 * same set, or as one that saves nothing, which there is unless all layers must. */
static bool is_double(const flap_planner *planner, const planner_savings *list, planner_skeleton s) {
  const uint32_t layers = planner->spec.model->num_hidden_layers;
  const double unsaved = unsaved_layers(planner, s);
  if (s.saved.layers == layers) /* the last segment saves as well, and needs no scratch memory */
    return false;
  if (s.saved.layers > 0 && s.saved.layers < s.segment)
    return true;
  for (uint32_t j = 0; j < list->count; j++) {
    planner_skeleton other = s;
    other.saved = list->of[j];
    if (other.saved.mask == s.saved.mask && other.saved.layers < s.saved.layers &&
        fabs(unsaved_layers(planner, other) - unsaved) < 0.5 / s.group)
      return true;
  }
  return false;
}

/* What no placement can beat: computing, and gradient sums that travel in fp32 between groups where VRAM cannot hold
 * them. Saves working out skeletons that cannot win. */
static double least_seconds(const flap_planner *planner, const flap_budgets *budgets, planner_skeleton s) {
  const flap_setup_spec *spec = &planner->spec;
  const flap_op_times *t = planner->times;
  const double layers = spec->model->num_hidden_layers, n = spec->micro_batches;
  if (spec->mode != FLAP_MODE_TRAIN)
    return 0;
  const double saving = layers - unsaved_layers(planner, s);
  const double gain_ns = saving * (double)(t->backward_ns - flap_op_times_backward(t, s.saved.mask, false));
  const double fresh_ns = layers * (double)t->backward_fresh_ns + (double)t->head_fresh_ns - gain_ns;
  const double adding_ns = layers * (double)t->backward_ns + (double)t->head_ns - gain_ns;
  const double forward_ns = layers * (double)t->forward_ns + recompute_ns(planner, s);
  const double computing = (n * forward_ns + fresh_ns + (n - 1) * adding_ns) * 1e-9;
  const double groups = ceil(n / s.group), sums = 4.0 * (double)flap_model_parameters(spec->model);
  const double travels = sums > (double)budgets->vram_bytes ? sums - (double)budgets->vram_bytes : 0;
  const double moving = (groups - 1) * travels / planner->machine->h2d_bytes;
  return computing > moving ? computing : moving;
}

/* `host`: parts that the host's cores update, in all of them. */
flap_status planner_shortlist(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                              uint32_t host, contender *list, uint32_t *count, planner_reach *reach) {
  for (uint32_t j = c->saved.count; j-- > 0;) /* those that compute least first */
    for (uint32_t i = 0; i < c->segment_count; i++)
      for (uint32_t g = 0; g < c->group_count; g++)
        for (int spread = c->sweep || planner->spec.mode != FLAP_MODE_TRAIN ? 0 : 1; spread >= 0; spread--) {
          const planner_skeleton s = {c->segments[i],
                                      c->groups[g],
                                      c->saved.of[j],
                                      spread == 1,
                                      host,
                                      c->backward,
                                      false,
                                      0,
                                      0,
                                      planner->expert.staging_bytes};
          if (is_double(planner, &c->saved, s))
            continue;
          if (*count > 0 && least_seconds(planner, budgets, s) > list[0].estimate * PLANNER_WORTH_SIMULATING)
            continue;
          const flap_status status = enter_skeleton(planner, c, budgets, s, list, count, reach);
          if (status != FLAP_OK && status != FLAP_BUDGET)
            return status;
        }
  return FLAP_OK;
}

/* The best of a list, of which at most so many are simulated, if it is better than the one before, with its costs; of
 * no seconds: there is none before. */
static flap_status simulate_list(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                 const contender *all, uint32_t all_count, uint32_t most, contender *best,
                                 flap_plan_costs *costs) {
  contender list[PLANNER_SIMULATED];
  const uint32_t count = pick(all, all_count, most, list);
  uint64_t transfers = 0; /* simulated so far: what it costs a person's patience */
  for (uint32_t i = 0; i < count && transfers < PLANNER_TRANSFERS_MAX; i++) {
    flap_setup setup;
    flap_plan_costs costs_here;
    planner_reach reach = PLANNER_NO_VRAM;
    FLAP_TRY(planner_settle(planner, c, list[i].s, budgets, list[i].depth, &setup, &reach));
    flap_status status = planner_simulate(planner, budgets, &setup, &costs_here);
    for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
      transfers += costs_here.lane_bytes[lane] / setup.choice.transfer_bytes;
    flap_log(FLAP_LOG_DEBUG,
             "plan: segments of %u, groups of %u, %u layers saved (tensors %#x), %s, %u parts updated by the host, %u "
             "and %u in the backward%s, depth %u, %u buffers: estimated %.4f s, simulated %.4f s",
             list[i].s.segment, list[i].s.group, list[i].s.saved.layers, list[i].s.saved.mask,
             list[i].s.spread ? "spread" : "at once", list[i].s.host, list[i].s.backward.device,
             list[i].s.backward.host, list[i].s.keeps ? ", embedding kept" : "", list[i].depth,
             setup.choice.read_buffers, list[i].estimate, costs_here.step_seconds);
    flap_setup_close(&setup);
    FLAP_TRY(status);
    learn(planner, &list[i], costs_here.step_seconds);
    const double wanted = list[i].s.host > best->s.host ? PLANNER_HOST_GAIN : 0.9999;
    if (costs->step_seconds <= 0 || costs_here.step_seconds < costs->step_seconds * wanted) {
      *best = list[i];
      *costs = costs_here;
    }
  }
  return FLAP_OK;
}

static bool same_cut(planner_skeleton a, planner_skeleton b) {
  return a.segment == b.segment && a.group == b.group && a.spread == b.spread;
}

/* The best few ways to cut the step, the best one first, then those of a list in turn. */
typedef struct cut_list {
  planner_skeleton of[PLANNER_CUTS];
  uint32_t count;
} cut_list;

static void enter_cuts(const contender *list, uint32_t count, cut_list *cuts) {
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

/* What a refinement is about, and the best of what it looked at. */
typedef struct refinement {
  const flap_planner *planner;
  const planner_candidates *candidates;
  const flap_budgets *budgets;
  contender list[PLANNER_CONTENDERS + 1];
  uint32_t count;
} refinement;

/* Candidates that compute less than the best step takes. */
static flap_status look_at(refinement *r, planner_skeleton s, const flap_plan_costs *costs) {
  planner_reach reach = PLANNER_NO_VRAM;
  if (least_seconds(r->planner, r->budgets, s) >= costs->step_seconds)
    return FLAP_OK;
  const flap_status status = enter_skeleton(r->planner, r->candidates, r->budgets, s, r->list, &r->count, &reach);
  return status == FLAP_BUDGET ? FLAP_OK : status;
}

static flap_status simulate_best(refinement *r, contender *best, flap_plan_costs *costs) {
  return simulate_list(r->planner, r->candidates, r->budgets, r->list, r->count, PLANNER_REFINED, best, costs);
}

/* Which tensors are saved, by how many layers: for the few best ways to cut the step every set. Among all candidates
 * they would be so many, and estimated so alike, that they would crowd others out of the list, and planning would take
 * three times as long. */
static flap_status refine_saved(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                const cut_list *cuts, contender *best, flap_plan_costs *costs) {
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
        if (!is_double(planner, lists[i], s))
          FLAP_TRY(look_at(&r, s, costs));
      }
  return simulate_best(&r, best, costs);
}

/* How much the host updates. */
static flap_status refine_host(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                               const cut_list *cuts, contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  for (uint32_t k = 0; k < cuts->count && c->other_host_count > 0; k++)
    for (uint32_t j = 0; j < c->other_host_count; j++) {
      planner_skeleton s = cuts->of[k];
      s.host = c->other_hosts[j];
      s.backward = best->s.backward;
      s.keeps = best->s.keeps;
      FLAP_TRY(look_at(&r, s, costs));
      s.saved = best->s.saved;
      if (!is_double(planner, &c->partial, s))
        FLAP_TRY(look_at(&r, s, costs));
    }
  return simulate_best(&r, best, costs);
}

/* How much is updated in the backward, where that may be; then whether the embedding's states should stay: estimates
 * see what that takes from others, but not what it saves. */
static flap_status refine_backward(const flap_planner *planner, const planner_candidates *c,
                                   const flap_budgets *budgets, contender *best, flap_plan_costs *costs) {
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

/* The same with rings as deep as the best one's: estimates tell too little of how deep they must be, and would fill the
 * list with one depth that is not the best. */
static flap_status look_as_deep(refinement *r, planner_skeleton s, const contender *best,
                                const flap_plan_costs *costs) {
  refinement all = {.planner = r->planner, .candidates = r->candidates, .budgets = r->budgets};
  FLAP_TRY(look_at(&all, s, costs));
  for (uint32_t i = 0; i < all.count; i++)
    if (all.list[i].depth == best->depth)
      enter(r->list, &r->count, all.list[i]);
  return FLAP_OK;
}

/* What is saved, with all else as in the best. */
static flap_status refine_saved_of_best(const flap_planner *planner, const planner_candidates *c,
                                        const flap_budgets *budgets, contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  const planner_savings *const lists[] = {&c->partial, &c->saved};
  for (size_t i = 0; i < 2; i++)
    for (uint32_t j = 0; j < lists[i]->count; j++) {
      planner_skeleton s = best->s;
      s.saved = lists[i]->of[j];
      if (!is_double(planner, lists[i], s))
        FLAP_TRY(look_as_deep(&r, s, best, costs));
    }
  return simulate_best(&r, best, costs);
}

/* How many layers save, between the shares that were tried. */
static flap_status refine_layers(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                 contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  const uint32_t all = planner->spec.model->num_hidden_layers, middle = best->s.saved.layers;
  if (middle == 0 || planner->activations != FLAP_ACTIVATIONS_AUTO)
    return FLAP_OK;
  const uint32_t reach = all / PLANNER_SAVED_SHARES;
  for (uint32_t layers = middle > reach ? middle - reach + 1 : 1; layers < middle + reach && layers <= all; layers++) {
    planner_skeleton s = best->s;
    s.saved.layers = layers;
    if (layers != middle)
      FLAP_TRY(look_as_deep(&r, s, best, costs));
  }
  return simulate_best(&r, best, costs);
}

/* The next size of a slice or of a page, from the best one's own, as long as that makes the step shorter. */
static flap_status climb(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                         bool pages, int direction, contender *best, flap_plan_costs *costs) {
  const uint64_t *const sizes = pages ? c->pages : c->slices;
  const uint32_t count = pages ? c->page_count : c->slice_count;
  for (double before = 0; before != costs->step_seconds;) {
    refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
    planner_skeleton s = best->s;
    uint64_t *const size = pages ? &s.page : &s.slice;
    const uint32_t at = preferred_index(sizes, count, *size);
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
                                contender *best, flap_plan_costs *costs) {
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
                                           const flap_budgets *budgets, contender *best, flap_plan_costs *costs) {
  refinement r = {.planner = planner, .candidates = c, .budgets = budgets};
  const planner_savings *const lists[] = {&c->partial, &c->saved};
  if (best->s.slice == 0) /* refine_sizes found too many transfers */
    return FLAP_OK;
  for (uint32_t k = 0; k < c->slice_count; k++)
    for (size_t i = 0; i < 2; i++)
      for (uint32_t j = 0; j < lists[i]->count; j++) {
        planner_skeleton s = best->s;
        s.slice = c->slices[k];
        s.saved = lists[i]->of[j];
        if (!is_double(planner, lists[i], s))
          FLAP_TRY(look_as_deep(&r, s, best, costs));
      }
  return simulate_best(&r, best, costs);
}

/* Spare tensors are worth their place where everything else is kept. Among the candidates they would crowd out others.
 */
static flap_status refine_spare(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                contender *best, flap_plan_costs *costs) {
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
                              const contender *of, uint64_t *bytes_out) {
  flap_setup setup;
  planner_reach reach = PLANNER_NO_VRAM;
  FLAP_TRY(planner_settle(planner, c, of->s, budgets, of->depth, &setup, &reach));
  const flap_choice *choice = &setup.choice;
  *bytes_out = ((uint64_t)choice->read_buffers + choice->write_buffers) * choice->transfer_bytes;
  flap_setup_close(&setup);
  return FLAP_OK;
}

/* `bytes_io`: what is tried, and what budgets made of it; 0 where that is no better. */
static flap_status look_at_staging(const flap_planner *planner, const planner_candidates *c,
                                   const flap_budgets *budgets, uint64_t now, uint64_t *bytes_io, contender *best,
                                   flap_plan_costs *costs) {
  contender tried = *best;
  flap_plan_costs costs_here = {0};
  tried.s.staging = *bytes_io;
  FLAP_TRY(staging_of(planner, c, budgets, &tried, bytes_io));
  if (*bytes_io != now && *bytes_io > 0)
    FLAP_TRY(simulate_list(planner, c, budgets, &tried, 1, 1, &tried, &costs_here));
  if (costs_here.step_seconds > 0 && costs_here.step_seconds < costs->step_seconds * 0.9999) {
    *best = tried;
    *costs = costs_here;
  } else {
    *bytes_io = 0;
  }
  return FLAP_OK;
}

/* How much is read ahead and written behind, where disks are busy for a part of the step and then rest: four times as
 * much as long as that gains, then twice or half of it. What is staged has no home in RAM: the simulation sees both. As
 * many read as write buffers: of other shares none was better. */
static flap_status refine_staging(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                  contender *best, flap_plan_costs *costs) {
  uint64_t now = 0;
  contender found = *best;
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

/* From a start: one kind of choice after the other, as long as that makes the step shorter. */
static flap_status refine_from(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                               cut_list cuts, contender *best, flap_plan_costs *costs) {
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
  FLAP_TRY(refine_saved_of_best(planner, c, budgets, best, costs));
  FLAP_TRY(refine_layers(planner, c, budgets, best, costs));
  FLAP_TRY(refine_saved_and_slices(planner, c, budgets, best, costs));
  FLAP_TRY(refine_spare(planner, c, budgets, best, costs));
  FLAP_TRY(refine_staging(planner, c, budgets, best, costs));
  if (best->s.staging == 0 || planner->expert.staging_bytes > 0)
    return FLAP_OK;
  return refine_backward(planner, c, budgets, best, costs); /* disks that rest less want another share */
}

/* From the best while nobody helps and all or nothing is saved; cuts that are good with the host's help are among those
 * that are tried. Where updates happen in the backward, so many choices hang together that the best with that help is a
 * start of its own. */
static flap_status refine(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                          const contender *list, uint32_t count, contender *best, flap_plan_costs *costs) {
  cut_list cuts = {.of = {best->s}, .count = 1};
  contender helped[PLANNER_CONTENDERS + 1];
  uint32_t helped_count = 0;
  enter_cuts(list, count, &cuts);
  if (c->other_host_count > 0) {
    planner_reach reach = PLANNER_NO_VRAM;
    FLAP_TRY(
        planner_shortlist(planner, c, budgets, c->other_hosts[c->other_host_count / 2], helped, &helped_count, &reach));
    enter_cuts(helped, helped_count, &cuts);
  }
  FLAP_TRY(refine_from(planner, c, budgets, cuts, best, costs));
  if (c->backward.device == 0 || helped_count == 0)
    return FLAP_OK;
  contender other = helped[0];
  flap_plan_costs other_costs = {0};
  FLAP_TRY(simulate_list(planner, c, budgets, helped, helped_count, PLANNER_SIMULATED, &other, &other_costs));
  FLAP_TRY(refine_from(planner, c, budgets, cuts, &other, &other_costs));
  if (other_costs.step_seconds < costs->step_seconds * 0.9999) {
    *best = other;
    *costs = other_costs;
  }
  return FLAP_OK;
}

flap_status flap_planner_choose(const flap_planner *given, const flap_budgets *budgets, flap_setup *setup_out,
                                flap_plan_costs *costs_out) {
  flap_planner timed = *given;
  const flap_planner *planner = &timed;
  flap_op_times times;
  planner_corrections corrections = {.count = 0};
  planner_candidates c;
  contender list[PLANNER_CONTENDERS + 1];
  contender best = {.depth = 0};
  uint32_t count = 0;
  planner_reach reach = PLANNER_NO_VRAM;
  timed.corrections = &corrections;
  if (timed.times == NULL) {
    FLAP_TRY(planner_times(planner, &times));
    timed.times = &times;
  }
  planner_list(planner, &c);
  FLAP_TRY(planner_shortlist(planner, &c, budgets, c.host_parts, list, &count, &reach));
  if (count == 0)
    return planner_refuse(planner, budgets, reach);
  *costs_out = (flap_plan_costs){0};
  FLAP_TRY(simulate_list(planner, &c, budgets, list, count, PLANNER_SIMULATED, &best, costs_out));
  FLAP_TRY(refine(planner, &c, budgets, list, count, &best, costs_out));
  return planner_settle(planner, &c, best.s, budgets, best.depth, setup_out, &reach);
}
