#include "engine/planner/planner.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/pool.h"
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

uint32_t planner_preferred_index(const uint64_t *ascending, uint32_t count, uint64_t wanted) {
  uint32_t index = 0;
  while (index + 1 < count && ascending[index + 1] <= wanted)
    index++;
  return index;
}

bool planner_layerwise_differs(const flap_planner *planner, planner_skeleton s) {
  return (s.segment > 1 || s.tail > 1) && s.saved.layers < planner->spec.model->num_hidden_layers;
}

flap_choice planner_choice_of(const flap_planner *planner, const planner_candidates *c, planner_skeleton s,
                              uint64_t slice, uint64_t page) {
  flap_choice choice = {.segment_layers = s.segment,
                        .tail_layers = s.tail,
                        .layerwise = s.layerwise && planner_layerwise_differs(planner, s),
                        .group_micro_batches = s.group,
                        .saved_layers = s.saved.layers,
                        .saved_mask = s.saved.mask,
                        .sweep = c->sweep,
                        .spread = s.spread,
                        .host_parts = s.host,
                        .host_spares_first = s.spares_first,
                        .backward_parts = s.backward.device,
                        .host_backward_parts = s.backward.host,
                        .keeps_embedding = s.keeps,
                        .slice_elements = slice,
                        .page_bytes = page,
                        .transfer_bytes = page,
                        .staging_bytes = s.staging,
                        .pool_bytes =
                            planner->spec.compression == FLAP_COMPRESSION_OFF ? 0 : planner_pool_blocks(s.pool)};
  if (planner->spec.disk_count > 0)
    choice.read_buffers = choice.write_buffers = choice.workers = 1;
  return choice;
}

/* Whether the regions alone are more than all tiers together, but for what workspaces take of vram; or those of the
 * host more than ram. With any slice or page size they are as many bytes, but for what rounding each region up has
 * added. Of an overlay the longer side counts: the other may have all of its bytes in the same place. */
static bool has_no_room(const flap_planner *planner, const flap_budgets *budgets, const flap_setup *setup) {
  double bytes = 0, host = 0, room = (double)budgets->vram_bytes + (double)budgets->ram_bytes;
  double sides[FLAP_PAGER_OVERLAYS_MAX + 1][2] = {{0}};
  room -= (double)setup->vram_scratch_bytes + (double)setup->spec.vram_overhead_bytes;
  for (uint32_t i = 0; i < planner->spec.disk_count; i++)
    room += (double)budgets->disk_bytes[i];
  for (uint32_t i = 0; i < setup->layout.region_count; i++) {
    const flap_layout_region *region = &setup->layout.regions[i];
    const double least = (double)(region->bytes - FLAP_BLOCK_ALIGN);
    if (region->overlay > 0)
      sides[region->overlay][region->side] += least;
    else
      bytes += least;
    host += region->place != FLAP_PLACE_ANY ? least : 0;
  }
  for (uint32_t i = 1; i <= FLAP_PAGER_OVERLAYS_MAX; i++)
    bytes += sides[i][0] > sides[i][1] ? sides[i][0] : sides[i][1];
  return bytes > room || host > (double)budgets->ram_bytes;
}

/* Whether ram lacks more than another page size could save, which is tables alone. */
static bool pages_cannot_help(const flap_setup *setup, uint64_t missing) {
  return missing > setup->sizes.table_bytes;
}

/* Or than smaller slices could save: their rings, and as much as rounding and tables may differ by, which small models
 * are made of. */
static bool slices_cannot_help(const flap_budgets *budgets, const flap_setup *setup, uint64_t missing) {
  const uint64_t rings = setup->classes[FLAP_CLASS_STATES].ring_bytes +
                         setup->classes[FLAP_CLASS_GRADIENTS].ring_bytes +
                         setup->classes[FLAP_CLASS_ROUNDED].resident_bytes;
  return missing > rings + budgets->ram_bytes / 64 + 64 * FLAP_MIB;
}

/* The first slice and page size that fit, with everything placed. FLAP_BUDGET if none does, and how far it got. */
flap_status planner_settle(const flap_planner *planner, const planner_candidates *c, planner_skeleton s,
                           const flap_budgets *budgets, uint32_t depth, flap_setup *setup, planner_reach *reach) {
  const uint64_t share = budgets->vram_bytes / PLANNER_SLICE_SHARE;
  const uint64_t slice_bytes = share < PLANNER_SLICE_BYTES ? share : PLANNER_SLICE_BYTES;
  const uint64_t slice_wanted = slice_bytes / planner_state_block_bytes(planner) * FLAP_OPS_BLOCK;
  const uint64_t page_wanted =
      budgets->ram_bytes / 256 < budgets->vram_bytes / 64 ? budgets->ram_bytes / 256 : budgets->vram_bytes / 64;
  const uint32_t slice_first = planner_preferred_index(c->slices, c->slice_count, s.slice > 0 ? s.slice : slice_wanted);
  const uint32_t page_first = planner_preferred_index(c->pages, c->page_count, s.page > 0 ? s.page : page_wanted);
  uint64_t slice_least = 0; /* smaller ones have longer lists, and those of this one are too long for ram already */
  for (uint32_t i = 0; i < c->slice_count; i++) {
    const uint64_t slice = c->slices[from_preferred(slice_first, c->slice_count, i)];
    planner_reach furthest = PLANNER_NO_VRAM;
    if (slice < slice_least)
      continue;
    flap_choice choice = planner_choice_of(planner, c, s, slice, c->pages[page_first]);
    FLAP_TRY(flap_setup_sketch(&planner->spec, &choice, setup));
    uint64_t missing = 0; /* of ram, where there is no disk */
    for (uint32_t j = 0; j < c->page_count; j++) {
      choice.page_bytes = choice.transfer_bytes = c->pages[from_preferred(page_first, c->page_count, j)];
      const planner_reach got = planner_fill(planner, budgets, &choice, depth, setup);
      if (got == PLANNER_FITS)
        return FLAP_OK;
      furthest = got > furthest ? got : furthest;
      const bool lacks = got == PLANNER_NO_DISK && planner->spec.disk_count == 0;
      missing = lacks ? planner_missing_ram(budgets, setup) : 0;
      if (got == PLANNER_NO_VRAM || pages_cannot_help(setup, missing))
        break; /* pages make no difference */
    }
    *reach = furthest > *reach ? furthest : *reach;
    const uint64_t lists = setup->ram_arena_bytes - setup->sizes.ram_bytes;
    if (furthest == PLANNER_NO_RAM && setup->choice.trace_events == 0 && lists > budgets->ram_bytes)
      slice_least = slice;
    const bool hopeless = slices_cannot_help(budgets, setup, missing) ||
                          planner_least_without_slices(planner, &choice, setup) > budgets->vram_bytes ||
                          has_no_room(planner, budgets, setup);
    flap_setup_close(setup);
    if (hopeless)
      break;
  }
  return flap_error_set(FLAP_BUDGET, "no plan fits");
}

/* ---- choosing -------------------------------------------------------------------------------------------- */

/* Over how far transfers may run ahead. */
static const uint32_t depths[PLANNER_DEPTHS] = {1, 3, 0};

static flap_status look_at_depths(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                  planner_outlook *outlook) {
  flap_setup setup;
  outlook->reach = PLANNER_NO_VRAM;
  FLAP_TRY(planner_settle(planner, c, outlook->s, budgets, 0, &setup, &outlook->reach));
  const flap_choice settled = setup.choice;
  for (int d = PLANNER_DEPTHS - 1; d >= 0; d--) { /* from depth 0, at which it is settled */
    flap_choice choice = settled;
    choice.transfer_bytes = choice.page_bytes;
    choice.read_buffers = choice.write_buffers = choice.workers = planner->spec.disk_count > 0 ? 1 : 0;
    if (depths[d] > 0 && planner_fill(planner, budgets, &choice, depths[d], &setup) != PLANNER_FITS)
      continue;
    outlook->estimates[d] = planner_estimate(planner, &setup) * (depths[d] == 0 ? PLANNER_NOTHING_AHEAD : 1);
  }
  flap_setup_close(&setup);
  outlook->fits = true;
  return FLAP_OK;
}

/* What several threads look at: each takes the next. */
typedef struct ahead {
  const flap_planner *planner;
  const planner_candidates *candidates;
  const flap_budgets *budgets;
  planner_outlook outlooks[PLANNER_AHEAD];
  flap_status statuses[PLANNER_AHEAD];
} ahead;

static void look_at_one(void *context, uint64_t item, uint32_t worker) {
  ahead *a = context;
  (void)worker;
  a->statuses[item] = look_at_depths(a->planner, a->candidates, a->budgets, &a->outlooks[item]);
}

void planner_look_ahead(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                        const planner_skeleton *skeletons, uint32_t count) {
  ahead a = {.planner = planner, .candidates = c, .budgets = budgets};
  uint32_t unknown = 0;
  flap_assert(count <= PLANNER_AHEAD);
  if (planner->pool == NULL || planner->memory->outlook_count + count > PLANNER_OUTLOOKS)
    return;
  for (uint32_t i = 0; i < count; i++) {
    planner_outlook *outlook = &a.outlooks[unknown];
    *outlook = (planner_outlook){.s = skeletons[i]};
    unknown += !planner_recall_outlook(planner, outlook);
  }
  flap_pool_run(planner->pool, unknown, look_at_one, &a);
  for (uint32_t i = 0; i < unknown; i++) /* what failed is looked at once more, and fails where it is entered */
    if (a.statuses[i] == FLAP_OK || a.statuses[i] == FLAP_BUDGET)
      planner_remember_outlook(planner, &a.outlooks[i]);
}

flap_status planner_enter_skeleton(const flap_planner *planner, const planner_candidates *c,
                                   const flap_budgets *budgets, planner_skeleton s, planner_contender *list,
                                   uint32_t *count, planner_reach *reach) {
  planner_outlook outlook = {.s = s};
  if (!planner_recall_outlook(planner, &outlook)) {
    const flap_status status = look_at_depths(planner, c, budgets, &outlook);
    if (status == FLAP_OK || status == FLAP_BUDGET)
      planner_remember_outlook(planner, &outlook);
    if (status != FLAP_BUDGET)
      FLAP_TRY(status);
  }
  *reach = outlook.reach > *reach ? outlook.reach : *reach;
  if (!outlook.fits)
    return flap_error_set(FLAP_BUDGET, "no plan fits");
  for (int d = 0; d < PLANNER_DEPTHS; d++)
    if (outlook.estimates[d] > 0)
      planner_enter(list, count,
                    (planner_contender){.s = s,
                                        .depth = depths[d],
                                        .estimate = outlook.estimates[d] * planner_correction(planner, s),
                                        .uncorrected = outlook.estimates[d]});
  return FLAP_OK;
}

/* Layers of a skeleton that are computed again, over the micro-batches of a group: those that save nothing, but for the
 * last segment's. */
static double unsaved_layers(const flap_planner *planner, planner_skeleton s) {
  const flap_layout_spec spec = {.model = planner->spec.model,
                                 .segment_layers = s.segment,
                                 .tail_layers = s.tail,
                                 .group_micro_batches = s.group,
                                 .saved_layers = s.saved.layers};
  return flap_layout_tail_layer(&spec) - (double)flap_layout_saved_count(&spec) / s.group;
}

/* Of a micro-batch, on average. Where nothing is saved, all layers of a segment but the last run as in the forward;
 * layerwise they are then computed again, and those of the last segment. */
static double recompute_ns(const flap_planner *planner, planner_skeleton s) {
  const flap_op_times *t = planner->times;
  const double unsaved = unsaved_layers(planner, s), segments = unsaved / s.segment;
  const bool layerwise = s.layerwise && planner_layerwise_differs(planner, s);
  const double again_layers = layerwise ? unsaved + s.tail - 1 : segments;
  const double again = (double)t->forward_ns * (unsaved - segments) + (double)t->recompute_ns * again_layers;
  const double saving = planner->spec.model->num_hidden_layers - s.tail - unsaved;
  return saving > 0 ? again + (double)flap_op_times_recompute(t, s.saved.mask) * saving : again;
}

bool planner_is_double(const flap_planner *planner, const planner_savings *list, planner_skeleton s) {
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

/* Of all layers for a micro-batch. */
static double backwards_ns(const flap_planner *planner, planner_skeleton s, flap_sums_written sums) {
  const double layers = planner->spec.model->num_hidden_layers, unsaved = unsaved_layers(planner, s);
  return unsaved * (double)flap_op_times_backward(planner->times, 0, sums) +
         (layers - unsaved) * (double)flap_op_times_backward(planner->times, s.saved.mask, sums);
}

double planner_least_seconds(const flap_planner *planner, const flap_budgets *budgets, planner_skeleton s) {
  const flap_setup_spec *spec = &planner->spec;
  const flap_op_times *t = planner->times;
  const double layers = spec->model->num_hidden_layers, n = spec->micro_batches;
  if (spec->mode != FLAP_MODE_TRAIN)
    return 0;
  const flap_sums_written first = spec->micro_batches > 1 ? FLAP_SUMS_FRESH : FLAP_SUMS_FINAL;
  const double fresh_ns = backwards_ns(planner, s, first) + (double)t->head_fresh_ns;
  const double adding_ns = backwards_ns(planner, s, FLAP_SUMS_ADDED_TO) + (double)t->head_ns;
  const double forward_ns = n * layers * (double)t->forward_ns, sums_ns = fresh_ns + (n - 1) * adding_ns;
  planner_skeleton unsaved = s; /* what is saved serves one backward; layers that saved may need no computing again */
  unsaved.saved.layers = 0;
  unsaved.layerwise = s.layerwise && s.saved.layers == 0;
  const double again_ns = n * (recompute_ns(planner, unsaved) + s.tail * (double)t->forward_ns) + sums_ns;
  const bool twice = s.backward.device > 0 && !spec->needs_no_norm;
  const double once_ns = forward_ns + n * recompute_ns(planner, s) + sums_ns;
  const double computing = (once_ns + (twice ? again_ns : 0)) * 1e-9;
  const double groups = ceil(n / s.group), sums = 4.0 * (double)flap_model_parameters(spec->model);
  const double travels = sums > (double)budgets->vram_bytes ? sums - (double)budgets->vram_bytes : 0;
  const double moving = (groups - 1) * travels / planner->machine->h2d_bytes;
  return computing > moving ? computing : moving;
}

/* Skeletons that wait to be entered, in their order. */
typedef struct waiting {
  uint32_t count;
  planner_skeleton of[PLANNER_AHEAD];
} waiting;

static bool cannot_win(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                       planner_skeleton s, const planner_contender *list, uint32_t count) {
  if (count == 0 && c->limit_seconds <= 0)
    return false;
  const double least = planner_least_seconds(planner, budgets, s);
  return (count > 0 && least > list[0].estimate * PLANNER_WORTH_SIMULATING) ||
         (c->limit_seconds > 0 && least >= c->limit_seconds);
}

static flap_status enter_waiting(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                 waiting *w, planner_contender *list, uint32_t *count, planner_reach *reach) {
  planner_look_ahead(planner, c, budgets, w->of, w->count);
  for (uint32_t i = 0; i < w->count; i++) {
    if (cannot_win(planner, c, budgets, w->of[i], list, *count))
      continue;
    const flap_status status = planner_enter_skeleton(planner, c, budgets, w->of[i], list, count, reach);
    if (status != FLAP_OK && status != FLAP_BUDGET)
      return status;
  }
  w->count = 0;
  return FLAP_OK;
}

/* As many at a time as keep all threads busy and few of them from knowing what the ones before them came to. */
static uint32_t waiting_max(const flap_planner *planner) {
  const uint32_t threads = planner->pool != NULL ? flap_pool_threads(planner->pool) : 1;
  return threads == 1 ? 1 : 2 * threads < PLANNER_AHEAD ? 2 * threads : PLANNER_AHEAD;
}

/* `host`: parts that the host's cores update, in all of them. */
flap_status planner_shortlist(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                              uint32_t host, planner_contender *list, uint32_t *count, planner_reach *reach) {
  const uint32_t most = waiting_max(planner);
  waiting w = {.count = 0};
  for (uint32_t j = c->saved.count; j-- > 0;) /* those that compute least first */
    for (uint32_t i = 0; i < c->segment_count; i++)
      for (uint32_t g = 0; g < c->group_count; g++)
        for (int spread = c->sweep || planner->spec.mode != FLAP_MODE_TRAIN ? 0 : 1; spread >= 0; spread--) {
          const planner_skeleton s = {.segment = c->segments[i],
                                      .tail = planner_tail(planner, c->segments[i], c->tails[0]),
                                      .group = c->groups[g],
                                      .layerwise = c->layerwise,
                                      .saved = c->saved.of[j],
                                      .spread = spread == 1,
                                      .host = host,
                                      .backward = c->backward,
                                      .staging = planner->expert.staging_bytes,
                                      .pool = planner->expert.pool_bytes};
          if (planner_is_double(planner, &c->saved, s) || cannot_win(planner, c, budgets, s, list, *count))
            continue;
          w.of[w.count++] = s;
          if (w.count == most)
            FLAP_TRY(enter_waiting(planner, c, budgets, &w, list, count, reach));
        }
  return enter_waiting(planner, c, budgets, &w, list, count, reach);
}

bool planner_is_better(const planner_contender *one, const flap_plan_costs *costs, const planner_contender *best,
                       const flap_plan_costs *best_costs) {
  const double wanted = one->s.host > best->s.host ? PLANNER_HOST_GAIN : 0.9999;
  return best_costs->step_seconds <= 0 || costs->step_seconds < best_costs->step_seconds * wanted;
}

/* The best of one list, of no seconds if nothing of it fits, or can win. */
static flap_status best_of_list(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                                planner_contender *best, flap_plan_costs *costs, planner_reach *reach) {
  planner_contender list[PLANNER_CONTENDERS + 1];
  uint32_t count = 0;
  *best = (planner_contender){.depth = 0};
  *costs = (flap_plan_costs){0};
  FLAP_TRY(planner_shortlist(planner, c, budgets, c->host_parts, list, &count, reach));
  if (count == 0)
    return FLAP_OK;
  FLAP_TRY(planner_simulate_list(planner, c, budgets, list, count, PLANNER_SIMULATED, best, costs));
  return costs->step_seconds > 0 ? planner_refine(planner, c, budgets, list, count, best, costs) : FLAP_OK;
}

flap_status planner_search(const flap_planner *planner, planner_candidates *lists, uint32_t count,
                           const flap_budgets *budgets, double limit_seconds, planner_found *found_out,
                           planner_reach *reach) {
  const uint64_t before = planner->memory->transfers;
  *found_out = (planner_found){.list = NULL};
  for (uint32_t i = 0; i < count; i++) {
    planner_found one = {.list = &lists[i]};
    const uint64_t transfers = planner->memory->transfers;
    memset(planner->memory, 0, sizeof *planner->memory); /* of other candidates */
    planner->memory->transfers = transfers;
    planner->memory->transfers_max = before + (PLANNER_TRANSFERS_ALL - before) / count * (i + 1);
    lists[i].limit_seconds = found_out->list != NULL ? found_out->costs.step_seconds : limit_seconds;
    FLAP_TRY(best_of_list(planner, &lists[i], budgets, &one.contender, &one.costs, reach));
    if (one.costs.step_seconds > 0 &&
        (found_out->list == NULL || one.costs.step_seconds < found_out->costs.step_seconds * PLANNER_TWICE_GAIN))
      *found_out = one;
  }
  return FLAP_OK;
}

/* Rates of lanes, and what a plan comes to with each. */
typedef struct rated {
  flap_machine machine;
  flap_op_times times;
  flap_plan_costs costs;
} rated;

/* Faster than they are by half of the reserve, as they are, slower by half, and slower by all of it. */
enum { FASTER, AS_MEASURED, SLOWER, SLOWEST, RATED };

static flap_status simulate_rated(const flap_planner *planner, const flap_budgets *budgets, const planner_found *found,
                                  rated rates[RATED], double *average_out) {
  flap_setup setup;
  planner_reach reach = PLANNER_NO_VRAM;
  flap_status status = FLAP_OK;
  *average_out = 0;
  FLAP_TRY(planner_settle(planner, found->list, found->contender.s, budgets, found->contender.depth, &setup, &reach));
  for (int i = 0; i < RATED && status == FLAP_OK; i++) {
    flap_planner other = *planner;
    other.machine = &rates[i].machine;
    other.times = &rates[i].times;
    status = planner_simulate(&other, budgets, &setup, 0, &rates[i].costs);
    *average_out += rates[i].costs.step_seconds / RATED;
  }
  flap_setup_close(&setup);
  return status;
}

/* What one plan must be of another one, on average over all rates, to take its place: shorter by more where the host
 * helps with more, or where the backward happens twice. */
static double wanted_of(const planner_found *found, const planner_found *best) {
  const double host = found->contender.s.host > best->contender.s.host ? PLANNER_HOST_GAIN : 1;
  const double twice = found->list > best->list ? PLANNER_TWICE_GAIN : 1;
  return PLANNER_RESERVE_GAIN * host * twice;
}

/* Searches once more, for slower lanes. What that finds is the plan if it is better on average, and hardly worse with
 * lanes as they are. */
static flap_status search_with_reserve(const flap_planner *planner, planner_candidates *lists, uint32_t count,
                                       const flap_budgets *budgets, planner_found *best) {
  rated rates[RATED];
  planner_found found;
  planner_reach reach = PLANNER_NO_VRAM;
  double best_average, found_average;
  for (int i = 0; i < RATED; i++)
    planner_slow_lanes(planner->machine, planner->times, 1 - PLANNER_RESERVE / 2 * (i - AS_MEASURED), &rates[i].machine,
                       &rates[i].times);
  FLAP_TRY(simulate_rated(planner, budgets, best, rates, &best_average));
  const double slowest = rates[SLOWEST].costs.step_seconds;
  if (slowest < best->costs.step_seconds * PLANNER_RESERVE_WORTH)
    return FLAP_OK;
  flap_log(FLAP_LOG_DEBUG, "plan: %.4f s, and %.4f s with slower lanes, for which what follows is searched",
           best->costs.step_seconds, slowest);
  flap_planner slower = *planner;
  slower.machine = &rates[SLOWEST].machine;
  slower.times = &rates[SLOWEST].times;
  FLAP_TRY(planner_search(&slower, lists, count, budgets, slowest, &found, &reach));
  if (found.list == NULL)
    return FLAP_OK;
  FLAP_TRY(simulate_rated(planner, budgets, &found, rates, &found_average));
  found.costs = rates[AS_MEASURED].costs;
  flap_log(FLAP_LOG_DEBUG,
           "plan: lanes as they are, and on average over faster and slower ones: %.4f and %.4f s; of "
           "the search for slower ones %.4f and %.4f s",
           best->costs.step_seconds, best_average, found.costs.step_seconds, found_average);
  if (found.costs.lane_bytes[FLAP_LANE_DISK_READ] == 0 && found_average < best_average * wanted_of(&found, best) &&
      found.costs.step_seconds < best->costs.step_seconds * PLANNER_RESERVE_PRICE)
    *best = found;
  return FLAP_OK;
}

static flap_status choose(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup_out,
                          flap_plan_costs *costs_out) {
  planner_candidates lists[PLANNER_LISTS_MAX];
  planner_found best;
  planner_reach reach = PLANNER_NO_VRAM;
  const uint32_t count = planner_list(planner, lists);
  FLAP_TRY(planner_search(planner, lists, count, budgets, 0, &best, &reach));
  if (best.list == NULL)
    return planner_refuse(planner, budgets, reach);
  /* What a disk does varies by more than any reserve. */
  if (!planner->quick && planner->spec.mode == FLAP_MODE_TRAIN && planner->machine->shared_cores == 0 &&
      best.costs.lane_bytes[FLAP_LANE_DISK_READ] == 0 && planner->memory->transfers <= PLANNER_TRANSFERS_RESERVE)
    FLAP_TRY(search_with_reserve(planner, lists, count, budgets, &best));
  *costs_out = best.costs;
  FLAP_TRY(planner_settle(planner, best.list, best.contender.s, budgets, best.contender.depth, setup_out, &reach));
  const flap_status status = flap_setup_list_programs(setup_out);
  if (status != FLAP_OK)
    flap_setup_close(setup_out);
  return status;
}

/* As many threads as the run may have, those of this machine if nothing else is said. Where they cannot be started one
 * does it all. */
static void open_pool(flap_planner *planner) {
  const uint32_t wanted = planner->expert.threads > 0 ? planner->expert.threads : flap_pool_threads_available();
  const uint32_t threads = wanted < PLANNER_THREADS_MAX ? wanted : PLANNER_THREADS_MAX;
  planner->pool = NULL;
  if (threads > 1 && flap_pool_open(threads, &planner->pool) != FLAP_OK)
    planner->pool = NULL;
}

flap_status flap_planner_choose(const flap_planner *given, const flap_budgets *budgets, flap_setup *setup_out,
                                flap_plan_costs *costs_out) {
  flap_planner planner = *given;
  flap_op_times times;
  if (planner.times == NULL) {
    FLAP_TRY(planner_times(given, &times));
    planner.times = &times;
  }
  planner.memory = calloc(1, sizeof *planner.memory);
  if (planner.memory == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory to plan");
  open_pool(&planner);
  const flap_status status = choose(&planner, budgets, setup_out, costs_out);
  flap_pool_close(planner.pool);
  free(planner.memory);
  return status;
}
