/* Stores: a slot's bytes to where its region lives, in RAM by a D2H copy, on disk through a write buffer.
 *
 * What is wanted first goes first: each copy on the lane is taken from the slot that the earliest lease waits for,
 * be it for the slot or for the region's bytes, and among equals from the one that was unpinned first. (In the order of
 * unpins alone, activations that nobody needs before the backward would stand before states whose slots the next loads
 * wait for.) Stores of one region are wanted alike, so they stay in order; a page that an earlier one of them still
 * writes is waited for. So one page is never written twice at a time, and the later bytes win. What a snapshot keeps at
 * home is not written before it is drained.
 *
 * A page's way: idle → copying (issue) → idle (pager_stores_copied, in RAM)
 *                                      → writing (pager_stores_copied, on disk) → idle (pager_stores_written)
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

static bool chunk_is_idle(const flap_pager *pager, const pager_region *region, uint32_t first_page, uint32_t count) {
  const pager_page *page = pager_pages_of(pager, region) + first_page;
  for (uint32_t i = 0; i < count; i++)
    if (page[i].state != PAGE_IDLE)
      return false;
  return true;
}

static void move_pages(flap_pager *pager, uint32_t region, uint32_t first_page, uint32_t count, pager_page_state from,
                       pager_page_state to) {
  pager_page *page = pager_pages_of(pager, &pager->regions[region]) + first_page;
  if (to == PAGE_IDLE)
    pager_loads_came_home(pager, &pager->regions[region]);
  for (uint32_t i = 0; i < count; i++) {
    flap_assert(page[i].state == from);
    page[i].state = (uint8_t)to;
    if (to == PAGE_IDLE) {
      flap_assert(page[i].stores_left > 0);
      page[i].stores_left--;
    }
  }
}

/* Of the pages that are left, in RAM or on disk, the next that go together may go now. */
static bool can_store(const flap_pager *pager, const pager_slot *s, bool disk, uint32_t *count_out) {
  const pager_region *region = &pager->regions[s->region];
  const uint32_t first = disk ? s->disk_next : s->ram_next;
  if (pager_is_kept_back(region, s->change))
    return false;
  if (first >= (disk ? region->page_count : region->ram_pages) || (disk && pager->write_free == 0))
    return false;
  *count_out = disk ? pager_chunk_pages(pager, region, first) : pager_copy_pages(pager, region, first);
  return chunk_is_idle(pager, region, first, *count_out);
}

static void store(flap_pager *pager, uint32_t slot, bool disk, uint32_t count) {
  pager_slot *s = &pager->slots[slot];
  const pager_region *region = &pager->regions[s->region];
  const uint32_t first = disk ? s->disk_next : s->ram_next;
  pager_copy copy = {.slot = slot,
                     .buffer = PAGER_NONE,
                     .region = s->region,
                     .first_page = first,
                     .page_count = count,
                     .bytes = pager_chunk_bytes(pager, region, first, count)};
  unsigned char *to = NULL;
  if (disk) {
    copy.buffer = pager_buffer_take(pager, true, s->region, first, count);
    pager->buffers[copy.buffer].order = s->order;
    to = pager->buffers[copy.buffer].memory;
    s->disk_next += count;
  } else {
    to = region->home + first * pager->page_bytes;
    s->ram_next += count;
    pager->storing_ram -= s->ram_next == region->ram_pages;
  }
  move_pages(pager, s->region, first, count, PAGE_IDLE, PAGE_COPYING);
  pager_lane_copy(pager, &pager->d2h, to, s->memory + first * pager->page_bytes, &copy);
}

/* The lease that waits for this slot, or for what is in it, as orders are counted; UINT64_MAX for none. */
static uint64_t wanted_by(const flap_pager *pager, const pager_slot *s) {
  const uint64_t next = pager_rings_next_order(pager, s->ring), by_region = pager->regions[s->region].wanted;
  const uint64_t lender = pager->rings[s->ring].borrowed > 0 ? pager->lender_order : UINT64_MAX;
  const uint64_t by_ring = next < lender ? next : lender; /* one answer for all slots of a ring, borrowed or not */
  return by_ring < by_region ? by_ring : by_region;
}

/* One copy. Disk pages of a slot come first: their way is the longer one. */
static bool store_most_wanted(flap_pager *pager) {
  uint32_t best = PAGER_NONE, best_count = 0;
  uint64_t best_order = 0;
  bool best_disk = false;
  if (pager->write_free == 0 && pager->storing_ram == 0)
    return false; /* as most often where disks are what everybody waits for */
  for (uint32_t slot = pager->storing.head; slot != PAGER_NONE; slot = pager->slots[slot].next) {
    const pager_slot *s = &pager->slots[slot];
    const uint64_t order = wanted_by(pager, s);
    uint32_t count = 0;
    if (best != PAGER_NONE && order >= best_order)
      continue;
    const bool disk = can_store(pager, s, true, &count);
    if (!disk && !can_store(pager, s, false, &count))
      continue;
    best = slot;
    best_order = order;
    best_disk = disk;
    best_count = count;
  }
  if (best == PAGER_NONE)
    return false;
  store(pager, best, best_disk, best_count);
  return true;
}

bool pager_stores_issue(flap_pager *pager) {
  bool progress = false;
  while (pager_lane_has_room(&pager->d2h) && store_most_wanted(pager))
    progress = true;
  return progress;
}

void pager_stores_copied(flap_pager *pager, const pager_copy *copy) {
  if (copy->buffer == PAGER_NONE) {
    move_pages(pager, copy->region, copy->first_page, copy->page_count, PAGE_COPYING, PAGE_IDLE);
  } else {
    move_pages(pager, copy->region, copy->first_page, copy->page_count, PAGE_COPYING, PAGE_WRITING);
    pager->buffers[copy->buffer].state = BUFFER_FULL;
    pager_checks_add(pager, copy->buffer);
  }
  pager_rings_stored(pager, copy->slot);
}

void pager_stores_written(flap_pager *pager, uint32_t index) {
  const pager_buffer *buffer = &pager->buffers[index];
  move_pages(pager, buffer->region, buffer->first_page, buffer->page_count, PAGE_WRITING, PAGE_IDLE);
}
