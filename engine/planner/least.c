/* The least budgets that work, and which one to name where none do. */
#include "base/assert.h"
#include "base/units.h"
#include "engine/planner/planner_internal.h"

typedef enum lever { LEVER_VRAM, LEVER_RAM, LEVER_DISK } lever;

static void set_lever(lever which, uint64_t bytes, flap_budgets *budgets) {
  if (which == LEVER_VRAM)
    budgets->vram_bytes = bytes;
  else if (which == LEVER_RAM)
    budgets->ram_bytes = bytes;
  else
    for (uint32_t i = 0; i < FLAP_BLOCK_DISKS_MAX; i++)
      budgets->disk_bytes[i] = i == 0 ? bytes : 0;
}

static uint64_t taken_of(lever which, const flap_setup *setup) {
  return which == LEVER_VRAM ? flap_units_round_up(setup->vram_bytes, FLAP_BLOCK_ALIGN)
                             : (which == LEVER_RAM ? setup->ram_bytes : setup->disk_bytes);
}

static bool fits_with(const flap_planner *planner, const flap_budgets *budgets, lever which, uint64_t bytes,
                      const flap_choice *choice, flap_setup *setup) {
  flap_budgets trial = *budgets;
  set_lever(which, bytes, &trial);
  return planner_fill(planner, &trial, choice, 0, setup) == PLANNER_FITS;
}

/* The least with which a placed choice fits: more than `low`, at most `high`, which fits. Of vram to a block, of ram to
 * a part of it, where staging and homes leave no exact one. */
static uint64_t least_between(const flap_planner *planner, const flap_budgets *budgets, lever which, uint64_t low,
                              uint64_t high, const flap_choice *choice, flap_setup *setup) {
  const uint64_t unit = which == LEVER_VRAM ? FLAP_BLOCK_ALIGN : 1;
  while (high - low > (which == LEVER_VRAM ? unit : high / PLANNER_RAM_PART + unit)) {
    const uint64_t tried = low + (high - low) / (2 * unit) * unit;
    if (fits_with(planner, budgets, which, tried, choice, setup))
      high = tried;
    else
      low = tried;
  }
  return high;
}

/* The least of one budget with which a given slice and page size can be placed, if it is less than *least_io. 0 is a
 * size: of the disk, where everything fits into vram and ram. Returns whether it could not be less for this choice
 * whatever the other budgets are. */
static bool least_for(const flap_planner *planner, const flap_budgets *budgets, lever which, const flap_choice *choice,
                      flap_setup *setup, uint64_t *least_io) {
  uint64_t low = 0, high = *least_io - 1;
  if (which == LEVER_DISK) {
    if (fits_with(planner, budgets, which, FLAP_BUDGET_PLENTY, choice, setup) && setup->disk_bytes < *least_io)
      *least_io = setup->disk_bytes;
    return *least_io == 0;
  }
  low = which == LEVER_VRAM ? planner_least_vram(planner, choice, setup) : planner_least_ram(planner, choice, setup);
  if (low > high)
    return true;
  if (fits_with(planner, budgets, which, low, choice, setup)) {
    /* Where much is resident, less staging and fewer homes do than what a choice takes before anything is spent. */
    *least_io = which == LEVER_VRAM ? low : least_between(planner, budgets, which, 0, low, choice, setup);
    return true;
  }
  if (high > FLAP_BUDGET_PLENTY)
    high = FLAP_BUDGET_PLENTY;
  else if (which == LEVER_VRAM)
    high = high / FLAP_BLOCK_ALIGN * FLAP_BLOCK_ALIGN;
  if (high <= low || !fits_with(planner, budgets, which, high, choice, setup))
    return false;
  const uint64_t taken = taken_of(which, setup);
  if (taken > low && taken < high && fits_with(planner, budgets, which, taken, choice, setup))
    high = taken;
  *least_io = least_between(planner, budgets, which, low, high, choice, setup);
  return false;
}

/* The levers that a search asks for, and the least of each so far. */
typedef struct search {
  uint32_t count;
  lever which[2]; /* vram alone, for it takes other slices */
  uint64_t least[2];
  bool exact; /* what some choice takes itself, whatever the other budgets are */
} search;

/* All page sizes with a setup of one slice size. Returns whether other budgets make no difference to any. */
static bool least_of_pages(const flap_planner *planner, const flap_budgets *budgets, lever which,
                           const planner_candidates *c, flap_choice choice, flap_setup *setup, uint64_t *least_io) {
  bool alone = true;
  for (uint32_t p = 0; p < c->page_count; p++) {
    choice.page_bytes = choice.transfer_bytes = c->pages[p];
    alone = least_for(planner, budgets, which, &choice, setup, least_io) && alone;
  }
  return alone;
}

/* `is_last_out`: slices behind it, larger ones for vram, smaller ones for ram and disk, are no better as a rule. */
static flap_status least_of_slice(const flap_planner *planner, const flap_budgets *budgets, const planner_candidates *c,
                                  planner_skeleton s, uint64_t slice, search *found, bool *is_last_out) {
  const bool vram = found->which[0] == LEVER_VRAM;
  flap_choice choice = planner_choice_of(planner, c, s, slice, c->pages[0]);
  flap_setup setup;
  const flap_status status = flap_setup_sketch(&planner->spec, &choice, &setup);
  *is_last_out = false;
  if (status == FLAP_BUDGET) /* other groups and segments may have less to keep */
    return FLAP_OK;
  FLAP_TRY(status);
  flap_setup_set_disks(&setup, budgets->disk_bytes);
  const uint64_t own = planner_least_vram(planner, &choice, &setup);
  const bool fits = vram || own <= budgets->vram_bytes;
  bool better = false, alone[2] = {false};
  for (uint32_t i = 0; i < found->count && fits; i++) {
    const uint64_t before = found->least[i];
    alone[i] = least_of_pages(planner, budgets, found->which[i], c, choice, &setup, &found->least[i]);
    better = better || found->least[i] < before;
  }
  found->exact = found->exact || (vram && found->least[0] == own);
  const bool hopeless = found->which[0] == LEVER_RAM && found->least[0] == UINT64_MAX; /* with any ram */
  *is_last_out = vram ? own >= found->least[0] : fits && (hopeless || (alone[0] && !better));
  flap_setup_close(&setup);
  return FLAP_OK;
}

/* The slices of one way to cut the step. */
static flap_status least_of_skeleton(const flap_planner *planner, const flap_budgets *budgets,
                                     const planner_candidates *c, planner_skeleton s, search *found) {
  const bool vram = found->which[0] == LEVER_VRAM;
  for (uint32_t k = 0, last = 0; k < c->least_slices && last < (vram ? 1 : 2); k++) {
    bool is_last = false;
    FLAP_TRY(least_of_slice(planner, budgets, c, s, c->slices[vram ? k : c->least_slices - 1 - k], found, &is_last));
    last += is_last ? 1 : 0;
  }
  return FLAP_OK;
}

/* What saves a budget is known, so not every candidate is tried: no saved layers (and all of them where `expert.saved`
 * leaves something out, for a long segment computes that again in less scratch than everything); groups of all
 * micro-batches or of one; for vram the smallest slices and segments, for ram and disk (tables and lists) the largest
 * slices that vram allows. So ram and disk are looked for in the same setups. What a choice takes itself may not do
 * beside other budgets that are small: then all segments are tried, and slices as long as they help. */
static flap_status find_least(const flap_planner *planner, const flap_budgets *budgets, const planner_candidates *c,
                              search *found) {
  const bool vram = found->which[0] == LEVER_VRAM;
  const planner_saving last = c->saved.of[c->saved.count - 1];
  found->exact = false;
  for (uint32_t i = 0; i < c->segment_count && !(vram && found->exact); i++)
    for (uint32_t g = 0; g < c->group_count; g = g + 1 < c->group_count ? c->group_count - 1 : c->group_count) {
      planner_skeleton s = {.segment = c->segments[i],
                            .tail = planner_tail(planner, c->segments[i], c->tails[0]),
                            .group = c->groups[g],
                            .layerwise = c->layerwise,
                            .saved = c->saved.of[0],
                            .host = c->host_parts,
                            .backward = c->backward};
      FLAP_TRY(least_of_skeleton(planner, budgets, c, s, found));
      s.saved = last;
      if (last.layers > 0 && flap_model_scratch_bytes(planner->spec.model, &planner->spec.shape, last.mask) > 0 &&
          c->saved.count > 1)
        FLAP_TRY(least_of_skeleton(planner, budgets, c, s, found));
    }
  return FLAP_OK;
}

/* Among all candidates, those that would be chosen with plenty of it: what none of the few above can do. */
static flap_status find_among_all(const flap_planner *planner, const flap_budgets *budgets, const planner_candidates *c,
                                  lever which, uint64_t *least_out, planner_reach *reach) {
  flap_budgets trial = *budgets;
  planner_contender list[PLANNER_CONTENDERS + 1];
  uint32_t count = 0;
  set_lever(which, FLAP_BUDGET_PLENTY, &trial);
  FLAP_TRY(planner_shortlist(planner, c, &trial, c->host_parts, list, &count, reach));
  for (uint32_t i = 0; i < count && i < PLANNER_SIMULATED; i++) {
    flap_setup setup;
    FLAP_TRY(planner_settle(planner, c, list[i].s, &trial, 0, &setup, reach));
    const flap_choice choice =
        planner_choice_of(planner, c, list[i].s, setup.choice.slice_elements, setup.choice.page_bytes);
    (void)least_for(planner, budgets, which, &choice, &setup, least_out);
    flap_setup_close(&setup);
  }
  return FLAP_OK;
}

/* The least of each lever; FLAP_BUDGET, with how far a plan got, if there is none for one of them. */
static flap_status look_for_least(const flap_planner *given, const flap_budgets *budgets, search *found,
                                  planner_reach *reach) {
  flap_planner planner = *given;
  planner.memory = NULL; /* which is of other budgets */
  planner.pool = NULL;
  flap_op_times times;
  planner_candidates lists[PLANNER_LISTS_MAX];
  if (found->which[0] == LEVER_DISK && planner.spec.disk_count == 0) {
    planner.spec.disk_count = 1;
    planner.spec.disk_paths[0] = "disk";
  }
  const uint32_t list_count = planner_list(&planner, lists);
  for (uint32_t i = 0; i < found->count; i++)
    found->least[i] = UINT64_MAX;
  for (uint32_t i = 0; i < list_count; i++)
    FLAP_TRY(find_least(&planner, budgets, &lists[i], found));
  for (uint32_t i = 0; i < found->count; i++) {
    if (found->least[i] < UINT64_MAX)
      continue;
    if (planner.times == NULL) {
      FLAP_TRY(planner_times(&planner, &times));
      planner.times = &times;
    }
    for (uint32_t j = 0; j < list_count; j++)
      FLAP_TRY(find_among_all(&planner, budgets, &lists[j], found->which[i], &found->least[i], reach));
    if (found->least[i] == UINT64_MAX)
      return flap_error_set(FLAP_BUDGET, "no plan fits");
  }
  return FLAP_OK;
}

/* ---- what a refusal says --------------------------------------------------------------------------------- */

static const char *const NAMES[] = {[LEVER_VRAM] = "vram", [LEVER_RAM] = "ram"};

/* Whether there is one. */
static bool knows_least(const flap_planner *planner, const flap_budgets *budgets, lever which, uint64_t *least_out) {
  search found = {.count = 1, .which = {which}};
  planner_reach reach = PLANNER_NO_VRAM;
  const bool knows = look_for_least(planner, budgets, &found, &reach) == FLAP_OK;
  *least_out = found.least[0];
  return knows;
}

static flap_status refuse_tier(lever which, const flap_budgets *budgets, uint64_t least) {
  char have[FLAP_UNITS_TEXT_MAX];
  const uint64_t vram_bytes = budgets->vram_given_bytes > 0 ? budgets->vram_given_bytes : budgets->vram_bytes;
  const uint64_t have_bytes = which == LEVER_VRAM ? vram_bytes : budgets->ram_bytes;
  return flap_error_set(FLAP_BUDGET,
                        "%s: %s (%llu bytes) is too small for this model and batch: %llu bytes is the least that works",
                        NAMES[which], flap_units_format_bytes(have_bytes, have, sizeof have),
                        (unsigned long long)have_bytes, (unsigned long long)least);
}

/* Neither alone is enough. */
static flap_status refuse_both(const flap_planner *planner, const flap_budgets *budgets) {
  flap_budgets trial = *budgets;
  uint64_t vram = 0, ram = 0;
  trial.ram_bytes = FLAP_BUDGET_PLENTY;
  const bool knows_vram = knows_least(planner, &trial, LEVER_VRAM, &vram);
  trial.vram_bytes = vram;
  if (!knows_vram || !knows_least(planner, &trial, LEVER_RAM, &ram))
    return flap_error_set(FLAP_BUDGET, "vram, ram: no size is enough for this model and batch: give a smaller "
                                       "per_device_train_batch_size, cutoff_len or model");
  return flap_error_set(FLAP_BUDGET,
                        "vram, ram: both are too small for this model and batch: %llu bytes of vram with %llu bytes of "
                        "ram work",
                        (unsigned long long)vram, (unsigned long long)ram);
}

flap_status planner_refuse(const flap_planner *planner, const flap_budgets *budgets, planner_reach reach) {
  uint64_t least = 0;
  if (reach == PLANNER_NO_VRAM && knows_least(planner, budgets, LEVER_VRAM, &least))
    return refuse_tier(LEVER_VRAM, budgets, least);
  if (reach != PLANNER_NO_DISK && knows_least(planner, budgets, LEVER_RAM, &least))
    return refuse_tier(LEVER_RAM, budgets, least);
  if (knows_least(planner, budgets, LEVER_DISK, &least)) {
    if (planner->spec.disk_count == 0)
      return flap_error_set(FLAP_BUDGET,
                            "ram: the model does not fit vram and ram: raise them, or give a disk of at least %llu "
                            "bytes (disk: [{path: ..., size: ...}])",
                            (unsigned long long)least);
    return flap_error_set(
        FLAP_BUDGET, "disk: too small for what fits neither vram nor ram: %llu bytes in all is the least that works",
        (unsigned long long)least);
  }
  if (reach != PLANNER_NO_VRAM && knows_least(planner, budgets, LEVER_VRAM, &least))
    return refuse_tier(LEVER_VRAM, budgets, least);
  return refuse_both(planner, budgets);
}

/* Where there is no least, another budget is too small, whatever this one is. */
static flap_status find_or_refuse(const flap_planner *planner, const flap_budgets *budgets, search *found) {
  planner_reach reach = PLANNER_NO_VRAM;
  const flap_status status = look_for_least(planner, budgets, found, &reach);
  if (status != FLAP_BUDGET)
    return status;
  flap_budgets rest = *budgets;
  for (uint32_t i = 0; i < found->count; i++)
    if (found->least[i] == UINT64_MAX)
      set_lever(found->which[i], FLAP_BUDGET_PLENTY, &rest);
  return planner_refuse(planner, &rest, reach);
}

flap_status flap_planner_vram_min(const flap_planner *planner, const flap_budgets *budgets, uint64_t *bytes_out) {
  search found = {.count = 1, .which = {LEVER_VRAM}};
  const flap_status status = find_or_refuse(planner, budgets, &found);
  *bytes_out = found.least[0];
  return status;
}

flap_status flap_planner_ram_min(const flap_planner *planner, const flap_budgets *budgets, uint64_t *bytes_out) {
  search found = {.count = 1, .which = {LEVER_RAM}};
  const flap_status status = find_or_refuse(planner, budgets, &found);
  *bytes_out = found.least[0];
  return status;
}

flap_status flap_planner_disk_min(const flap_planner *planner, const flap_budgets *budgets, uint64_t *bytes_out) {
  search found = {.count = 1, .which = {LEVER_DISK}};
  const flap_status status = find_or_refuse(planner, budgets, &found);
  *bytes_out = found.least[0];
  return status;
}

flap_status flap_planner_ram_and_disk_min(const flap_planner *planner, const flap_budgets *budgets, uint64_t *ram_out,
                                          uint64_t *disk_out) {
  search found = {.count = 2, .which = {LEVER_RAM, LEVER_DISK}};
  flap_assert(planner->spec.disk_count > 0);
  const flap_status status = find_or_refuse(planner, budgets, &found);
  *ram_out = found.least[0];
  *disk_out = found.least[1];
  return status;
}
