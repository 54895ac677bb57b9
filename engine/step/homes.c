/* Homes in RAM: which pages of which regions live there, within what the choice allows.
 *
 * Classes get RAM in the order of their traffic, each region of a class the same share. What shares its place with
 * another region (an overlay, pager.h) costs only by how much the longer side grows: what fits beside the other side is
 * free.
 */
#include "engine/step/setup.h"

#include <stdlib.h>
#include <string.h>

/* Of an overlay: how far its sides reach; of the class that is being given RAM, its bytes, and what share of them costs
 * nothing. */
typedef struct overlay_room {
  uint64_t sides[2], klass;
  double free;
} overlay_room;

#define PLENTY ((uint64_t)1 << 60) /* more than all regions together */

struct flap_homes {
  /* Regions that live in RAM as far as there is some, class by class, then those that do in any case. */
  uint32_t *regions;
  uint32_t first[FLAP_CLASS_COUNT + 1], count; /* of each class, and of the latter; all */
  bool shares[FLAP_CLASS_COUNT];               /* whether some of a class are of an overlay, */
  uint8_t side[FLAP_CLASS_COUNT];              /* and then on which side */
  uint32_t room_count;
  overlay_room *rooms; /* overlay n at n - 1 */
};

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

static overlay_room *room_of(const flap_setup *setup, uint32_t region) {
  const uint32_t overlay = setup->regions[region].overlay;
  return overlay > 0 ? &setup->homes->rooms[overlay - 1] : NULL;
}

/* By how much a side may grow without making its overlay longer. */
static uint64_t free_of(const overlay_room *room, uint32_t side) {
  return room->sides[1 - side] > room->sides[side] ? room->sides[1 - side] - room->sides[side] : 0;
}

/* What so many bytes more of a region cost. */
static uint64_t cost_of(const flap_setup *setup, uint32_t region, uint64_t bytes) {
  const overlay_room *room = room_of(setup, region);
  const uint64_t here = room != NULL ? free_of(room, setup->regions[region].side) : 0;
  return bytes > here ? bytes - here : 0;
}

static uint64_t take(flap_setup *setup, uint32_t region, uint64_t bytes) {
  const uint64_t cost = cost_of(setup, region, bytes);
  overlay_room *room = room_of(setup, region);
  if (room != NULL)
    room->sides[setup->regions[region].side] += bytes;
  return cost;
}

/* ---- a class --------------------------------------------------------------------------------------------- */

/* The next region of a class that is not in VRAM, from *at on in homes->regions, which is moved behind it;
 * FLAP_REGION_NONE at the end. */
static uint32_t next_region(const flap_setup *setup, flap_region_class klass, uint32_t *at) {
  const struct flap_homes *homes = setup->homes;
  while (*at < homes->first[klass + 1]) {
    const uint32_t region = homes->regions[(*at)++];
    if (!setup->resident[region])
      return region;
  }
  return FLAP_REGION_NONE;
}

static uint64_t page_span(const flap_setup *setup, uint32_t region, uint64_t page) {
  return smaller(setup->regions[region].bytes - page * setup->choice.page_bytes, setup->choice.page_bytes);
}

/* What all of a class would cost. All its regions are of the same side. */
static uint64_t count_class(const flap_setup *setup, flap_region_class klass) {
  struct flap_homes *homes = setup->homes;
  uint64_t cost = 0;
  for (uint32_t i = 0; i < homes->room_count; i++)
    homes->rooms[i].klass = 0;
  for (uint32_t at = homes->first[klass], i; (i = next_region(setup, klass, &at)) != FLAP_REGION_NONE;) {
    overlay_room *room = room_of(setup, i);
    cost += setup->layout.regions[i].bytes;
    if (room != NULL)
      room->klass += setup->layout.regions[i].bytes;
  }
  for (uint32_t i = 0; i < homes->room_count && homes->shares[klass]; i++) {
    overlay_room *room = &homes->rooms[i];
    const uint64_t here = free_of(room, homes->side[klass]);
    room->free = here >= room->klass ? 1 : (double)here / (double)room->klass;
    cost -= smaller(here, room->klass);
  }
  return cost;
}

/* The same share of every region first, of what costs and of what does not, so that each load uses RAM and disk side by
 * side; then the rest, a page here and there. */
static uint64_t give_ram(flap_setup *setup, flap_region_class klass, uint64_t left) {
  const flap_layout *layout = &setup->layout;
  if (left == 0 && !setup->homes->shares[klass])
    return 0;
  const uint64_t page_bytes = setup->choice.page_bytes;
  const uint64_t cost_of_all = left < PLENTY ? count_class(setup, klass) : 0;
  const bool all = cost_of_all <= left;
  const double share = all ? 1.0 : (double)left / (double)cost_of_all;
  const uint32_t first = setup->homes->first[klass];
  for (uint32_t at = first, i; (i = next_region(setup, klass, &at)) != FLAP_REGION_NONE;) {
    const uint64_t bytes = layout->regions[i].bytes, pages = (bytes + page_bytes - 1) / page_bytes;
    const overlay_room *room = room_of(setup, i);
    const double free = room != NULL ? room->free : 0;
    uint64_t given = all ? pages : (uint64_t)((free + (1 - free) * share) * (double)(bytes / page_bytes));
    while (given > 0 && cost_of(setup, i, smaller(given * page_bytes, bytes)) > left)
      given--;
    setup->regions[i].ram_pages = (uint32_t)given;
    left -= take(setup, i, smaller(given * page_bytes, bytes));
  }
  for (bool more = !all; more;) {
    more = false;
    for (uint32_t at = first, i; (i = next_region(setup, klass, &at)) != FLAP_REGION_NONE;) {
      const uint64_t pages = (layout->regions[i].bytes + page_bytes - 1) / page_bytes;
      if (setup->regions[i].ram_pages >= pages)
        continue;
      const uint64_t span = page_span(setup, i, setup->regions[i].ram_pages);
      if (cost_of(setup, i, span) > left)
        continue;
      setup->regions[i].ram_pages++;
      left -= take(setup, i, span);
      more = true;
    }
  }
  return left;
}

/* ---- all ------------------------------------------------------------------------------------------------- */

/* All pages, whatever the choice says. */
static void give_all(flap_setup *setup) {
  const struct flap_homes *homes = setup->homes;
  for (uint32_t at = homes->first[FLAP_CLASS_COUNT]; at < homes->count; at++) {
    const uint32_t region = homes->regions[at];
    setup->regions[region].ram_pages = UINT32_MAX;
    (void)take(setup, region, setup->layout.regions[region].bytes);
  }
}

void flap_setup_lay_homes(flap_setup *setup) {
  flap_region_class order[FLAP_CLASS_COUNT];
  uint64_t left = setup->choice.ram_bytes;
  memset(setup->homes->rooms, 0, setup->homes->room_count * sizeof *setup->homes->rooms);
  give_all(setup);
  order_classes(setup, order);
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    left = give_ram(setup, order[k], left);
}

/* The place of a region among the classes, behind which come those that live in RAM in any case. */
static int list_of(const flap_layout_region *region) {
  return region->place == FLAP_PLACE_ANY ? (int)region->klass : FLAP_CLASS_COUNT;
}

static void list_regions(const flap_layout *layout, struct flap_homes *homes) {
  uint32_t next[FLAP_CLASS_COUNT + 1] = {0};
  for (uint32_t i = 0; i < layout->region_count; i++) {
    const flap_layout_region *region = &layout->regions[i];
    next[list_of(region)]++;
    homes->shares[region->klass] |= region->overlay > 0;
    homes->side[region->klass] |= region->side;
    homes->room_count = region->overlay > homes->room_count ? region->overlay : homes->room_count;
  }
  for (int k = 0; k <= FLAP_CLASS_COUNT; k++) {
    homes->first[k] = homes->count;
    homes->count += next[k];
    next[k] = homes->first[k];
  }
  for (uint32_t i = 0; i < layout->region_count; i++)
    homes->regions[next[list_of(&layout->regions[i])]++] = i;
}

struct flap_homes *flap_setup_open_homes(const flap_layout *layout) {
  struct flap_homes *homes = calloc(1, sizeof *homes);
  if (homes == NULL)
    return NULL;
  homes->regions = calloc(layout->region_count, sizeof *homes->regions);
  if (homes->regions != NULL)
    list_regions(layout, homes);
  homes->rooms = calloc(homes->room_count + 1, sizeof *homes->rooms);
  if (homes->regions == NULL || homes->rooms == NULL) {
    flap_setup_close_homes(homes);
    return NULL;
  }
  return homes;
}

void flap_setup_close_homes(struct flap_homes *homes) {
  if (homes == NULL)
    return;
  free(homes->regions);
  free(homes->rooms);
  free(homes);
}
