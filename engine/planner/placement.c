/* Spends budgets: what a choice needs comes first, then staging, ring slots, residents, and homes in RAM. */
#include "base/assert.h"
#include "base/units.h"
#include "engine/machine/codec_rates.h"
#include "engine/planner/planner_internal.h"

#include <string.h>

#define BUFFERS_FEW 16u
#define WORKERS_SHARE 64u /* their memory is at most this part of ram */
#define TRACE_EVENTS_MAX 131072u
#define TRACE_EVENT_BYTES 64u    /* about */
#define PLACEMENT_BURST_SHARE 8u /* slots for one burst take at most this part of what is left of vram */

static void place(flap_setup *setup, const flap_choice *choice) {
  const flap_status status = flap_setup_place(setup, choice);
  flap_assert(status == FLAP_OK);
}

/* What may stay in VRAM, and what passes through it in any case. */
static uint64_t class_bytes(const flap_setup *setup, int klass) {
  return setup->staying_bytes[klass] + setup->passing_bytes[klass];
}

static uint64_t slot_bytes(const flap_setup *setup, int klass) {
  const flap_class_plan *row = &setup->classes[klass];
  return row->ring_slots > 0 ? row->ring_bytes / row->ring_slots : 0;
}

/* A class that takes no more as residents than as the ring that it needs stays in VRAM: it costs nothing. */
static void place_least(const flap_planner *planner, flap_setup *setup, flap_choice *choice) {
  memset(choice->extra_slots, 0, sizeof choice->extra_slots);
  memset(choice->resident_bytes, 0, sizeof choice->resident_bytes);
  choice->ram_bytes = 0;
  choice->trace_events = 0;
  place(setup, choice);
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    if (setup->passing_bytes[k] == 0 && class_bytes(setup, k) <= setup->classes[k].ring_bytes)
      choice->resident_bytes[k] = class_bytes(setup, k);
  if (planner->activations == FLAP_ACTIVATIONS_KEEP)
    choice->resident_bytes[FLAP_CLASS_SAVED] = class_bytes(setup, FLAP_CLASS_SAVED);
  place(setup, choice);
}

uint64_t planner_least_vram(const flap_planner *planner, const flap_choice *choice, flap_setup *setup) {
  flap_choice least = *choice;
  place_least(planner, setup, &least);
  return setup->vram_bytes;
}

uint64_t planner_least_without_slices(const flap_planner *planner, const flap_choice *choice, flap_setup *setup) {
  const uint64_t all = planner_least_vram(planner, choice, setup);
  uint64_t slices = 0;
  const flap_region_class sliced[] = {FLAP_CLASS_STATES, FLAP_CLASS_GRADIENTS, FLAP_CLASS_ROUNDED};
  for (size_t i = 0; i < sizeof sliced / sizeof *sliced; i++) {
    const flap_class_plan *row = &setup->classes[sliced[i]];
    slices += row->ring_bytes + row->resident_bytes;
  }
  return all - slices;
}

uint64_t planner_least_ram(const flap_planner *planner, const flap_choice *choice, flap_setup *setup) {
  flap_choice least = *choice;
  place_least(planner, setup, &least);
  return setup->ram_bytes;
}

/* ---- vram ------------------------------------------------------------------------------------------------ */

/* The classes by how often a step leases them: where a slot of a size saves most waiting. */
static void order_by_leases(const flap_setup *setup, int order[FLAP_CLASS_COUNT]) {
  uint64_t leases[FLAP_CLASS_COUNT];
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    const uint64_t slot = slot_bytes(setup, k);
    leases[k] = slot > 0 ? (uint64_t)(setup->traffic[k] * (double)class_bytes(setup, k)) / slot : 0;
    int at = k;
    for (; at > 0 && leases[order[at - 1]] < leases[k]; at--)
      order[at] = order[at - 1];
    order[at] = k;
  }
}

/* How many leases of a class follow one another with hardly any computing between them. Gradients of a segment, or by
 * layer of one, are stored when its backward is over; states are leased with them, a share of the next segment's after
 * each micro-batch, or all of it. With slots for so many, what comes in a burst is moved while the layers before it
 * compute. */
static uint32_t burst_of(const flap_setup *setup, int k) {
  const flap_layout *layout = &setup->layout;
  if ((k != FLAP_CLASS_STATES && k != FLAP_CLASS_GRADIENTS) || setup->spec.mode != FLAP_MODE_TRAIN)
    return 1;
  const uint32_t of_layer = layout->parts[flap_layout_layer_part(0)].slice_count;
  const bool updates = layout->spec.backward_parts == layout->part_count ||
                       (layout->spec.layerwise && layout->spec.micro_batches == 1); /* layer by layer as well */
  const bool by_layer = layout->spec.by_layer && (k == FLAP_CLASS_GRADIENTS || updates);
  const uint32_t slices = of_layer * (by_layer ? 1 : layout->spec.segment_layers);
  if (k == FLAP_CLASS_GRADIENTS || !setup->choice.spread)
    return slices;
  return (slices + layout->spec.group_micro_batches - 1) / layout->spec.group_micro_batches;
}

static void add_slots(const flap_budgets *budgets, uint32_t depth, flap_choice *choice, flap_setup *setup) {
  int order[FLAP_CLASS_COUNT];
  order_by_leases(setup, order);
  uint64_t left = budgets->vram_bytes - setup->vram_bytes;
  for (uint32_t round = 0; round < depth; round++)
    for (int i = 0; i < FLAP_CLASS_COUNT; i++) {
      const int k = order[i];
      const uint64_t bytes = slot_bytes(setup, k);
      const uint64_t slots = setup->classes[k].ring_slots + choice->extra_slots[k];
      if (bytes == 0 || slots * bytes >= class_bytes(setup, k) + bytes)
        continue; /* more slots than regions would never be used */
      const uint64_t regions = class_bytes(setup, k) / bytes + 1;
      uint64_t added = burst_of(setup, k);
      if (added > 1 && added * bytes > left / PLACEMENT_BURST_SHARE)
        added = left / PLACEMENT_BURST_SHARE / bytes > 1 ? left / PLACEMENT_BURST_SHARE / bytes : 1;
      if (slots + added > regions)
        added = regions > slots ? regions - slots : 1;
      if (added * bytes > left)
        continue;
      choice->extra_slots[k] += (uint32_t)added;
      left -= added * bytes;
    }
}

static void make_resident(flap_activations activations, int k, uint64_t *left, flap_choice *choice,
                          const flap_setup *setup) {
  /* Where all stays, the ring goes. */
  const uint64_t ring = setup->passing_bytes[k] == 0 ? setup->classes[k].ring_bytes : 0;
  const uint64_t bytes = setup->staying_bytes[k], slot = slot_bytes(setup, k), before = choice->resident_bytes[k];
  if (slot == 0 || (k == FLAP_CLASS_SAVED && activations == FLAP_ACTIVATIONS_OFFLOAD))
    return;
  if (bytes <= *left + before + ring) {
    *left = *left + before + ring - bytes;
    choice->resident_bytes[k] = bytes;
    if (setup->passing_bytes[k] == 0)
      choice->extra_slots[k] = 0;
    return;
  }
  const uint64_t more = *left / slot * slot;
  choice->resident_bytes[k] = before + more;
  *left -= more;
}

/* Most traffic per byte first. */
static void add_residents(const flap_planner *planner, const flap_budgets *budgets, flap_choice *choice,
                          flap_setup *setup) {
  bool done[FLAP_CLASS_COUNT] = {false};
  uint64_t left = budgets->vram_bytes - setup->vram_bytes;
  if (choice->keeps_embedding) {
    const uint64_t wanted = setup->layout.parts[0].slice_count * setup->largest_bytes[FLAP_CLASS_STATES];
    choice->resident_bytes[FLAP_CLASS_STATES] = wanted < left ? wanted : 0;
    left -= choice->resident_bytes[FLAP_CLASS_STATES];
  }
  for (int round = 0; round < FLAP_CLASS_COUNT; round++) {
    int best = -1;
    for (int k = 0; k < FLAP_CLASS_COUNT; k++)
      if (!done[k] && (best < 0 || setup->traffic[k] > setup->traffic[best]))
        best = k;
    if (best < 0)
      break;
    done[best] = true;
    if (setup->traffic[best] > 0)
      make_resident(planner->activations, best, &left, choice, setup);
  }
}

/* ---- ram and disk ---------------------------------------------------------------------------------------- */

static uint64_t power_of_two_below(uint64_t value) {
  uint64_t power = 1;
  while (power <= value / 2)
    power *= 2;
  return power;
}

/* No more than can be at work for either way; and what they compress with must be a small part of ram. */
static uint32_t count_workers(const flap_setup *setup, const flap_choice *choice, uint64_t ram_bytes) {
  const flap_pager_config config = {.page_bytes = choice->page_bytes,
                                    .transfer_bytes = choice->transfer_bytes,
                                    .compression = setup->spec.compression,
                                    .pool_bytes = choice->pool_bytes,
                                    .disk_rates = setup->spec.disk_rates};
  const uint64_t each = flap_pager_worker_bytes(&config);
  uint32_t workers = flap_codec_workers(setup->spec.threads, choice->pool_bytes > 0);
  if (workers > choice->read_buffers)
    workers = choice->read_buffers;
  while (workers > 1 && workers * each > ram_bytes / WORKERS_SHARE)
    workers--;
  return workers > 0 ? workers : 1;
}

static bool try_staging(const flap_budgets *budgets, uint64_t transfer, uint64_t buffers, flap_choice *choice,
                        flap_setup *setup) {
  const uint64_t events = budgets->ram_bytes / 32 / TRACE_EVENT_BYTES;
  choice->transfer_bytes = transfer;
  choice->read_buffers = choice->write_buffers = (uint32_t)buffers;
  choice->workers = count_workers(setup, choice, budgets->ram_bytes);
  for (int traced = 1; traced >= 0; traced--) {
    choice->trace_events = !traced ? 0 : events < TRACE_EVENTS_MAX ? (uint32_t)events : TRACE_EVENTS_MAX;
    place(setup, choice);
    if (setup->ram_bytes <= budgets->ram_bytes)
      return true;
  }
  return false;
}

/* Staging: what is wanted, at most half of ram; or a few buffers, as large as a quarter of ram allows, but always what
 * works at all. */
static bool add_staging(const flap_budgets *budgets, flap_choice *choice, flap_setup *setup) {
  uint64_t transfer = power_of_two_below(budgets->ram_bytes / (8 * BUFFERS_FEW)); /* as many buffers as may be */
  if (transfer > PLANNER_TRANSFER_MAX)
    transfer = PLANNER_TRANSFER_MAX;
  if (transfer < choice->page_bytes)
    transfer = choice->page_bytes;
  choice->transfer_bytes = choice->page_bytes;
  choice->read_buffers = choice->write_buffers = choice->workers = 1;
  choice->trace_events = 0;
  place(setup, choice);
  if (setup->ram_bytes > budgets->ram_bytes)
    return false; /* so nothing larger needs to be tried */
  const uint64_t wanted = choice->staging_bytes / (2 * transfer);
  if (wanted > 0 && wanted <= FLAP_PAGER_BUFFERS_MAX && choice->staging_bytes <= budgets->ram_bytes / 2 &&
      try_staging(budgets, transfer, wanted, choice, setup))
    return true;
  for (; transfer >= choice->page_bytes; transfer /= 2)
    for (uint32_t buffers = BUFFERS_FEW; buffers > 0; buffers /= 2) {
      const bool least = transfer == choice->page_bytes && buffers == 1;
      if (2 * buffers * transfer > budgets->ram_bytes / 4 && !least)
        continue;
      if (try_staging(budgets, transfer, buffers, choice, setup))
        return true;
    }
  return false;
}

/* Everything that streams fits in RAM: no disk, no staging. */
static bool fit_without_disk(const flap_budgets *budgets, flap_choice *choice, flap_setup *setup) {
  flap_choice trial = *choice;
  const uint64_t events = budgets->ram_bytes / 32 / TRACE_EVENT_BYTES;
  for (int traced = 1; traced >= 0; traced--) {
    trial.read_buffers = trial.write_buffers = trial.workers = 0;
    trial.transfer_bytes = trial.page_bytes;
    while (trial.transfer_bytes * 2 <= PLANNER_TRANSFER_MAX)
      trial.transfer_bytes *= 2; /* copies are merged up to this; nothing is taken for it */
    trial.trace_events = !traced ? 0 : events < TRACE_EVENTS_MAX ? (uint32_t)events : TRACE_EVENTS_MAX;
    trial.ram_bytes = UINT64_MAX / 2;
    place(setup, &trial);
    if (setup->ram_bytes <= budgets->ram_bytes) {
      *choice = trial;
      return true;
    }
  }
  return false;
}

/* A pool takes homes, and what has none stands on disk as well: with as much of a pool as disks have room for. */
static uint64_t smaller_pool(uint64_t pool_bytes, uint64_t missing) {
  const uint64_t less = flap_units_round_up(missing + PLANNER_TRANSFER_MAX, FLAP_PAGER_POOL_BLOCK);
  return missing > 0 && less < pool_bytes ? pool_bytes - less : 0;
}

uint64_t planner_missing_ram(const flap_budgets *budgets, flap_setup *setup) {
  flap_choice all = setup->choice;
  all.ram_bytes = UINT64_MAX / 2;
  place(setup, &all);
  return setup->ram_bytes > budgets->ram_bytes ? setup->ram_bytes - budgets->ram_bytes : 0;
}

uint64_t planner_missing_disk(const flap_planner *planner, const flap_budgets *budgets, const flap_setup *setup) {
  uint64_t capacity = 0;
  for (uint32_t i = 0; i < planner->spec.disk_count; i++)
    capacity += budgets->disk_bytes[i] / setup->choice.transfer_bytes * setup->choice.transfer_bytes;
  return setup->disk_bytes > capacity ? setup->disk_bytes - capacity : 0;
}

planner_reach planner_fill(const flap_planner *planner, const flap_budgets *budgets, const flap_choice *given,
                           uint32_t depth, flap_setup *setup) {
  flap_choice choice = *given;
  if (choice.pool_bytes > budgets->ram_bytes)
    choice.pool_bytes = planner_pool_blocks(budgets->ram_bytes);
  memcpy(setup->disk_sizes, budgets->disk_bytes, sizeof setup->disk_sizes);
  place_least(planner, setup, &choice);
  if (setup->vram_bytes > budgets->vram_bytes)
    return PLANNER_NO_VRAM;
  add_slots(budgets, depth, &choice, setup);
  place(setup, &choice);
  flap_assert(setup->vram_bytes <= budgets->vram_bytes);
  add_residents(planner, budgets, &choice, setup);
  place(setup, &choice);
  flap_assert(setup->vram_bytes <= budgets->vram_bytes);
  if (fit_without_disk(budgets, &choice, setup))
    return PLANNER_FITS;
  if (planner->spec.disk_count == 0) {
    choice.ram_bytes = 0;
    choice.read_buffers = choice.write_buffers = choice.workers = 0;
    choice.transfer_bytes = choice.page_bytes;
    choice.trace_events = 0;
    place(setup, &choice);
    return setup->ram_bytes > budgets->ram_bytes ? PLANNER_NO_RAM : PLANNER_NO_DISK;
  }
  for (uint64_t missing_before = UINT64_MAX;;) {
    choice.ram_bytes = 0;
    if (!add_staging(budgets, &choice, setup)) {
      if (choice.pool_bytes == 0)
        return PLANNER_NO_RAM;
      choice.pool_bytes = choice.pool_bytes > PLANNER_TRANSFER_MAX ? planner_pool_blocks(choice.pool_bytes / 2) : 0;
      continue;
    }
    choice.ram_bytes = budgets->ram_bytes - setup->ram_bytes;
    place(setup, &choice);
    flap_assert(setup->ram_bytes <= budgets->ram_bytes);
    const uint64_t missing = planner_missing_disk(planner, budgets, setup);
    if (missing == 0)
      return PLANNER_FITS;
    if (choice.pool_bytes > 0) {
      choice.pool_bytes = missing < missing_before ? smaller_pool(choice.pool_bytes, missing) : 0;
      missing_before = missing;
      continue;
    }
    if (choice.staging_bytes == 0)
      return PLANNER_NO_DISK;
    choice.staging_bytes = choice.read_buffers > BUFFERS_FEW
                               ? choice.staging_bytes / 2
                               : 0; /* what is staged is not at home in ram, and the disks have no room for more */
  }
}
