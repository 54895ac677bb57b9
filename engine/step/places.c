/* Residents and rings: which regions stay in VRAM, and what the others pass through. Planning places setups by the
 * thousand, each time a little otherwise, so only classes that changed are looked at.
 */
#include "base/assert.h"
#include "engine/step/setup_internal.h"

#include <stdlib.h>
#include <string.h>

#define BORROWED_MAX 256u /* slots; each takes two events of the device */

/* ---- residents ------------------------------------------------------------------------------------------- */

/* Of `regions` regions of a class, `wanted` are chosen at even distances. */
static bool is_chosen(uint64_t index, uint64_t wanted, uint64_t regions) {
  if (wanted == 0 || wanted == regions)
    return wanted > 0; /* most often, and without a division */
  return (index + 1) * wanted / regions > index * wanted / regions;
}

/* The embedding's gradient is complete when the backward is over, and the next forward begins with its weights: its
 * states pass the bus while nothing computes, unless they stay. */
static uint64_t preferred_states(const flap_setup *setup) {
  const flap_layout *layout = &setup->layout;
  return setup->choice.keeps_embedding && !flap_layout_is_host(layout, 0) ? layout->parts[0].slice_count : 0;
}

/* Of a class whose `first` regions are chosen before the others. */
static bool stays(uint64_t index, uint64_t wanted, uint64_t regions, uint64_t first) {
  if (index < first)
    return index < wanted;
  return is_chosen(index - first, wanted > first ? wanted - first : 0, regions - first);
}

static void enter_streaming(setup_class *c, const flap_layout_region *region) {
  if (region->place == FLAP_PLACE_HOST)
    return;
  c->streaming++;
  c->slot_bytes = region->bytes > c->slot_bytes ? region->bytes : c->slot_bytes;
}

/* Residents that hold nothing for a part of a step: gradient sums in the forward, activations from their last
 * backward until the next forward comes to them. Meanwhile their memory is for states that pass (pager.h, rings that
 * borrow): those that a forward begins with are loaded while the backward before it ends. */
static bool may_lend(int klass) {
  switch (klass) {
  case FLAP_CLASS_GRADIENT_SUMS:
  case FLAP_CLASS_VOCABULARY_SUMS:
  case FLAP_CLASS_BOUNDARIES:
  case FLAP_CLASS_HIDDEN_GRADIENTS:
  case FLAP_CLASS_SAVED:
    return true;
  default:
    return false;
  }
}

static void choose_class(flap_setup *setup, int k, uint64_t wanted, uint64_t preferred) {
  setup_places *places = setup->places;
  setup_class *c = &places->classes[k];
  uint64_t index = 0;
  c->is_chosen = true;
  c->wanted = wanted;
  c->preferred = preferred;
  c->slot_bytes = c->streaming = c->resident_bytes = c->kept_bytes = c->home_bytes = c->page_bytes = 0;
  c->lenders = c->lender_bytes = 0;
  c->ring = UINT32_MAX;
  c->home = SETUP_HOME_UNKNOWN;
  places->has_homes = false;
  if (c->shares)
    memset(c->rooms, 0, places->room_count * sizeof *c->rooms);
  for (uint32_t at = c->first; at < c->end; at++) {
    const uint32_t i = places->regions[at];
    const flap_layout_region *region = &setup->layout.regions[i];
    const bool any = region->place == FLAP_PLACE_ANY;
    setup->resident[i] = setup_may_stay(region) && stays(index++, wanted, setup->region_counts[k], preferred);
    if (setup->resident[i]) {
      c->resident_bytes += region->bytes;
      c->kept_bytes += any ? region->bytes : 0;
      if (!any)
        continue;
      setup->regions[i].ring = FLAP_PAGER_RESIDENT;
      setup->regions[i].ram_pages = 0;
      setup->regions[i].lends = may_lend(k);
      if (may_lend(k))
        c->lender_bytes = c->lenders++ == 0 || region->bytes < c->lender_bytes ? region->bytes : c->lender_bytes;
      continue;
    }
    setup->regions[i].lends = false;
    enter_streaming(c, region);
    c->home_bytes += any ? region->bytes : 0;
    if (any && region->overlay > 0)
      c->rooms[region->overlay - 1] += region->bytes;
  }
}

static void choose_residents(flap_setup *setup) {
  const uint64_t states = preferred_states(setup); /* the first of their class */
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    const setup_class *c = &setup->places->classes[k];
    const uint64_t bytes_max = setup->choice.resident_bytes[k], regions = setup->region_counts[k];
    const uint64_t preferred = k == FLAP_CLASS_STATES ? states : 0;
    uint64_t wanted = 0;
    if (regions > 0)
      wanted = bytes_max >= setup->staying_bytes[k] ? regions : bytes_max / setup->largest_bytes[k];
    if (!c->is_chosen || c->wanted != wanted || c->preferred != preferred)
      choose_class(setup, k, wanted, preferred);
  }
}

/* ---- rings ----------------------------------------------------------------------------------------------- */

static void count_live(const flap_setup *setup, uint32_t live_max[FLAP_CLASS_COUNT]) {
  memset(live_max, 0, FLAP_CLASS_COUNT * sizeof *live_max);
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++)
    for (int k = 0; setup->has_program[i] && k < FLAP_CLASS_COUNT; k++)
      if (setup->programs[i].live_max[k] > live_max[k])
        live_max[k] = setup->programs[i].live_max[k];
}

static void write_ring(flap_setup *setup, setup_class *c, uint32_t ring) {
  if (c->ring == ring)
    return;
  c->ring = ring;
  for (uint32_t at = c->first; at < c->end; at++) {
    const uint32_t i = setup->places->regions[at];
    if (!setup->resident[i] && setup->layout.regions[i].place != FLAP_PLACE_HOST)
      setup->regions[i].ring = ring;
  }
}

/* A copy that stays in VRAM is a ring of one slot that keeps what it loaded. */
static void lay_copies(flap_setup *setup) {
  const flap_layout *layout = &setup->layout;
  for (uint32_t part = 0; part < layout->part_count; part++) {
    const uint32_t i = layout->parts[part].weights;
    const flap_layout_region *region = &layout->regions[i];
    if (!setup->resident[i] || region->place != FLAP_PLACE_COPIED)
      continue;
    setup->rings[setup->pager.ring_count] = (flap_pager_ring){
        .name = flap_engine_class_name(region->klass), .slot_bytes = region->bytes, .slots = 1, .keeps = true};
    setup->regions[i].ring = setup->pager.ring_count++;
  }
}

static void borrow(flap_setup *setup) {
  const flap_class_plan *states = &setup->classes[FLAP_CLASS_STATES];
  uint64_t slots = 0;
  if (states->ring_slots == 0)
    return;
  flap_pager_ring *ring = &setup->rings[setup->places->classes[FLAP_CLASS_STATES].ring];
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    const setup_class *c = &setup->places->classes[k];
    slots += c->lenders * (c->lender_bytes / ring->slot_bytes);
  }
  ring->borrowed = (uint32_t)(slots < BORROWED_MAX ? slots : BORROWED_MAX);
}

/* A ring per class that streams, as wide as the largest region that streams. */
void setup_lay_rings(flap_setup *setup) {
  uint32_t live_max[FLAP_CLASS_COUNT];
  choose_residents(setup);
  count_live(setup, live_max);
  setup->pager.ring_count = 0;
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    setup_class *c = &setup->places->classes[k];
    setup->classes[k].ring_slots = 0;
    setup->classes[k].ring_bytes = 0;
    if (c->streaming == 0)
      continue;
    const uint32_t live = live_max[k] > 0 ? live_max[k] : 1;
    const flap_pager_ring ring = {.name = flap_engine_class_name((flap_region_class)k),
                                  .slot_bytes = c->slot_bytes,
                                  .slots = live + setup->choice.extra_slots[k]};
    write_ring(setup, c, setup->pager.ring_count);
    setup->rings[setup->pager.ring_count++] = ring;
    setup->classes[k].ring_slots = ring.slots;
    setup->classes[k].ring_bytes = ring.slots * ring.slot_bytes;
  }
  borrow(setup);
  lay_copies(setup);
}

/* ---- sums ------------------------------------------------------------------------------------------------ */

void setup_sum_classes(flap_setup *setup) {
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    const setup_class *c = &setup->places->classes[k];
    flap_class_plan *row = &setup->classes[k];
    row->resident_bytes = c->resident_bytes;
    row->ram_bytes = c->forced_bytes + c->ram_bytes;
    row->disk_bytes = c->home_bytes - c->ram_bytes;
  }
}

/* Neighbours are mostly of one size. */
static void count_pages(const flap_setup *setup, setup_class *c) {
  const uint64_t page_bytes = setup->choice.page_bytes;
  uint64_t bytes = 0, pages = 0;
  if (c->page_bytes == page_bytes)
    return;
  c->page_bytes = page_bytes;
  c->pages = 0;
  for (uint32_t at = c->first; at < c->end; at++) {
    const flap_pager_region *region = &setup->regions[setup->places->regions[at]];
    if (region->ring == FLAP_PAGER_RESIDENT)
      continue;
    if (region->bytes != bytes) {
      bytes = region->bytes;
      pages = (bytes + page_bytes - 1) / page_bytes;
    }
    c->pages += pages;
  }
}

void setup_total(const flap_setup *setup, flap_pager_totals *totals_out) {
  setup_places *places = setup->places;
  flap_pager_totals t = {.home_bytes = places->home_bytes, .overlays = places->room_count};
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    setup_class *c = &places->classes[k];
    const uint64_t disk_bytes = c->home_bytes - c->ram_bytes;
    count_pages(setup, c);
    t.resident_bytes += c->kept_bytes;
    t.disk_bytes += disk_bytes;
    t.pages += c->pages;
    t.snapshots_move = t.snapshots_move || (c->in_snapshots && (c->kept_bytes > 0 || disk_bytes > 0));
  }
  *totals_out = t;
}

/* ---- opening --------------------------------------------------------------------------------------------- */

static bool is_saved(const flap_setup_spec *spec, flap_region_class klass) {
  return (spec->saves_weights && (klass == FLAP_CLASS_WEIGHTS || klass == FLAP_CLASS_VOCABULARY)) ||
         (spec->saves_states && klass == FLAP_CLASS_STATES);
}

static void list_regions(const flap_layout *layout, setup_places *places) {
  uint32_t next[FLAP_CLASS_COUNT] = {0}, count = 0;
  for (uint32_t i = 0; i < layout->region_count; i++) {
    const flap_layout_region *region = &layout->regions[i];
    setup_class *c = &places->classes[region->klass];
    next[region->klass]++;
    c->shares |= region->overlay > 0;
    c->side |= region->side;
    places->room_count = region->overlay > places->room_count ? region->overlay : places->room_count;
  }
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    places->classes[k].first = count;
    count += next[k];
    next[k] = places->classes[k].first;
    places->classes[k].end = count;
  }
  for (uint32_t i = 0; i < layout->region_count; i++)
    places->regions[next[layout->regions[i].klass]++] = i;
}

/* What lives in RAM in any case, as a whole. */
static void enter_forced(flap_setup *setup, uint32_t i) {
  setup_places *places = setup->places;
  const flap_layout_region *region = &setup->layout.regions[i];
  setup->regions[i].ram_pages = UINT32_MAX;
  places->classes[region->klass].forced_bytes += region->bytes;
  if (region->overlay > 0)
    places->forced[region->side * places->room_count + region->overlay - 1] += region->bytes;
  else
    places->forced_home_bytes += region->bytes;
}

static void write_regions(flap_setup *setup) {
  setup_places *places = setup->places;
  for (uint32_t i = 0; i < setup->layout.region_count; i++) {
    const flap_layout_region *region = &setup->layout.regions[i];
    setup->regions[i] =
        (flap_pager_region){.bytes = region->bytes,
                            .ring = FLAP_PAGER_HOST,
                            .klass = (uint8_t)region->klass,
                            .element_bytes = region->element_bytes,
                            .in_snapshots = is_saved(&setup->spec, region->klass),
                            .shared = region->klass == FLAP_CLASS_STATES && is_saved(&setup->spec, region->klass),
                            .overlay = region->overlay,
                            .side = region->side};
    if (region->place != FLAP_PLACE_ANY)
      enter_forced(setup, i);
  }
  for (uint32_t i = 0; i < places->room_count; i++) {
    const uint64_t one = places->forced[i], other = places->forced[places->room_count + i];
    places->forced_home_bytes += one > other ? one : other;
  }
}

setup_places *setup_places_open(flap_setup *setup) {
  const flap_layout *layout = &setup->layout;
  setup_places *places = calloc(1, sizeof *places);
  if (places == NULL)
    return NULL;
  setup->places = places;
  places->regions = calloc(layout->region_count, sizeof *places->regions);
  if (places->regions != NULL)
    list_regions(layout, places);
  const size_t rooms = (size_t)places->room_count + 1;
  places->rooms = calloc(rooms, sizeof *places->rooms);
  places->forced = calloc(rooms, 2 * sizeof *places->forced);
  places->class_rooms = calloc(rooms, FLAP_CLASS_COUNT * sizeof *places->class_rooms);
  if (places->regions == NULL || places->rooms == NULL || places->forced == NULL || places->class_rooms == NULL) {
    setup_places_close(places);
    setup->places = NULL;
    return NULL;
  }
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    places->classes[k].rooms = places->class_rooms + (size_t)k * rooms;
    places->classes[k].in_snapshots = is_saved(&setup->spec, (flap_region_class)k);
  }
  write_regions(setup);
  return places;
}

void setup_places_close(setup_places *places) {
  if (places == NULL)
    return;
  free(places->regions);
  free(places->rooms);
  free(places->forced);
  free(places->class_rooms);
  free(places);
}
