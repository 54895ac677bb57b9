/* Homes in RAM: which pages of which regions live there, within what the choice allows.
 *
 * Classes get RAM in the order of their traffic, each region of a class the same share. What shares its place with
 * another region (an overlay, pager.h) costs only by how much the longer side grows: what fits beside the other side is
 * free.
 */
#include "engine/step/setup_internal.h"

static uint64_t smaller(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* Classes in the order in which they get RAM: most traffic per byte first; of equals, gradients before the others,
 * because what is written and read once a step wears disks for nothing. */
static void order_classes(const flap_setup *setup, flap_region_class order[FLAP_CLASS_COUNT]) {
  for (int k = 0; k < FLAP_CLASS_COUNT; k++) {
    int at = k;
    const double mine = setup->traffic[k] + (k == FLAP_CLASS_GRADIENTS ? 1e-6 : 0);
    while (at > 0) {
      const flap_region_class before = order[at - 1];
      const double other = setup->traffic[before] + (before == FLAP_CLASS_GRADIENTS ? 1e-6 : 0);
      if (other >= mine)
        break;
      order[at] = before;
      at--;
    }
    order[at] = (flap_region_class)k;
  }
}

/* ---- overlays -------------------------------------------------------------------------------------------- */

static setup_room *room_of(const flap_setup *setup, uint32_t region) {
  const uint32_t overlay = setup->regions[region].overlay;
  return overlay > 0 ? &setup->places->rooms[overlay - 1] : NULL;
}

/* By how much a side may grow without making its overlay longer. */
static uint64_t free_of(const setup_room *room, uint32_t side) {
  return room->sides[1 - side] > room->sides[side] ? room->sides[1 - side] - room->sides[side] : 0;
}

/* What so many bytes more of a region cost. */
static uint64_t cost_of(const flap_setup *setup, uint32_t region, uint64_t bytes) {
  const setup_room *room = room_of(setup, region);
  const uint64_t here = room != NULL ? free_of(room, setup->regions[region].side) : 0;
  return bytes > here ? bytes - here : 0;
}

static uint64_t take(flap_setup *setup, uint32_t region, uint64_t bytes) {
  const uint64_t cost = cost_of(setup, region, bytes);
  setup_room *room = room_of(setup, region);
  if (room != NULL)
    room->sides[setup->regions[region].side] += bytes;
  return cost;
}

/* ---- a class --------------------------------------------------------------------------------------------- */

/* The next region of a class for RAM and disk to share, from *at on in places->regions, which is moved behind it;
 * FLAP_REGION_NONE at the end. */
static uint32_t next_region(const flap_setup *setup, const setup_class *c, uint32_t *at) {
  while (*at < c->end) {
    const uint32_t region = setup->places->regions[(*at)++];
    if (!setup->resident[region] && setup->layout.regions[region].place == FLAP_PLACE_ANY)
      return region;
  }
  return FLAP_REGION_NONE;
}

static uint64_t page_span(const flap_setup *setup, uint32_t region, uint64_t page) {
  return smaller(setup->regions[region].bytes - page * setup->choice.page_bytes, setup->choice.page_bytes);
}

/* What all of a class would cost. All its regions are of the same side. */
static uint64_t count_class(flap_setup *setup, const setup_class *c) {
  setup_places *places = setup->places;
  uint64_t cost = c->home_bytes;
  for (uint32_t i = 0; i < places->room_count && c->shares; i++) {
    setup_room *room = &places->rooms[i];
    const uint64_t here = free_of(room, c->side);
    room->free = here >= c->rooms[i] ? 1 : (double)here / (double)c->rooms[i];
    cost -= smaller(here, c->rooms[i]);
  }
  return cost;
}

/* Whether some of a class may live in RAM beside the other side of an overlay, and cost nothing. */
static bool has_free(const flap_setup *setup, const setup_class *c) {
  for (uint32_t i = 0; i < setup->places->room_count && c->shares; i++)
    if (c->rooms[i] > 0 && free_of(&setup->places->rooms[i], c->side) > 0)
      return true;
  return false;
}

static void give_nothing(flap_setup *setup, setup_class *c) {
  if (c->home != SETUP_HOME_NOTHING)
    for (uint32_t at = c->first, i; (i = next_region(setup, c, &at)) != FLAP_REGION_NONE;)
      setup->regions[i].ram_pages = 0;
  c->home = SETUP_HOME_NOTHING;
  c->ram_bytes = 0;
}

/* As many pages as it has, whatever their size is. */
static void give_all(flap_setup *setup, setup_class *c) {
  if (c->home != SETUP_HOME_ALL)
    for (uint32_t at = c->first, i; (i = next_region(setup, c, &at)) != FLAP_REGION_NONE;)
      setup->regions[i].ram_pages = UINT32_MAX;
  c->home = SETUP_HOME_ALL;
  c->ram_bytes = c->home_bytes;
  for (uint32_t i = 0; i < setup->places->room_count && c->shares; i++)
    setup->places->rooms[i].sides[c->side] += c->rooms[i];
}

/* The same share of every region first, of what costs and of what does not, so that each load uses RAM and disk side by
 * side; then the rest, a page here and there. Returns what is left. */
static uint64_t give_some(flap_setup *setup, setup_class *c, uint64_t cost_of_all, uint64_t left) {
  const flap_layout *layout = &setup->layout;
  const uint64_t page_bytes = setup->choice.page_bytes;
  const double share = (double)left / (double)cost_of_all;
  c->home = SETUP_HOME_SOME;
  c->ram_bytes = 0;
  for (uint32_t at = c->first, i; (i = next_region(setup, c, &at)) != FLAP_REGION_NONE;) {
    const uint64_t bytes = layout->regions[i].bytes;
    const setup_room *room = room_of(setup, i);
    const double free = room != NULL ? room->free : 0;
    uint64_t given = (uint64_t)((free + (1 - free) * share) * (double)(bytes / page_bytes));
    while (given > 0 && cost_of(setup, i, smaller(given * page_bytes, bytes)) > left)
      given--;
    setup->regions[i].ram_pages = (uint32_t)given;
    c->ram_bytes += smaller(given * page_bytes, bytes);
    left -= take(setup, i, smaller(given * page_bytes, bytes));
  }
  for (bool more = true; more;) {
    more = false;
    for (uint32_t at = c->first, i; (i = next_region(setup, c, &at)) != FLAP_REGION_NONE;) {
      const uint64_t pages = (layout->regions[i].bytes + page_bytes - 1) / page_bytes;
      if (setup->regions[i].ram_pages >= pages)
        continue;
      const uint64_t span = page_span(setup, i, setup->regions[i].ram_pages);
      if (cost_of(setup, i, span) > left)
        continue;
      setup->regions[i].ram_pages++;
      c->ram_bytes += span;
      left -= take(setup, i, span);
      more = true;
    }
  }
  return left;
}

static uint64_t give_ram(flap_setup *setup, setup_class *c, uint64_t left) {
  if (left == 0 && !has_free(setup, c)) {
    give_nothing(setup, c);
    return 0;
  }
  const uint64_t cost_of_all = count_class(setup, c);
  if (cost_of_all <= left) {
    give_all(setup, c);
    return left - cost_of_all;
  }
  return give_some(setup, c, cost_of_all, left);
}

/* ---- all ------------------------------------------------------------------------------------------------- */

void setup_lay_homes(flap_setup *setup) {
  setup_places *places = setup->places;
  const flap_choice *choice = &setup->choice;
  flap_region_class order[FLAP_CLASS_COUNT];
  if (places->has_homes && places->ram_bytes == choice->ram_bytes && places->page_bytes == choice->page_bytes)
    return;
  uint64_t left = choice->ram_bytes;
  for (uint32_t i = 0; i < places->room_count; i++)
    places->rooms[i] = (setup_room){.sides = {places->forced[i], places->forced[places->room_count + i]}};
  order_classes(setup, order);
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    left = give_ram(setup, &places->classes[order[k]], left);
  places->has_homes = true;
  places->ram_bytes = choice->ram_bytes;
  places->page_bytes = choice->page_bytes;
  places->home_bytes = places->forced_home_bytes + choice->ram_bytes - left;
}
