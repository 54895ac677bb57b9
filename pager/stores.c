/* Stores: a slot's bytes to where its region lives, in RAM by a D2H copy, on disk through a write buffer.
 *
 * Slots are served in the order in which they were unpinned. A page that an earlier store of the same region still
 * writes is waited for, so that one page is never written twice at a time and the later bytes win.
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
  for (uint32_t i = 0; i < count; i++) {
    flap_assert(page[i].state == from);
    page[i].state = (uint8_t)to;
    if (to == PAGE_IDLE) {
      flap_assert(page[i].stores_left > 0);
      page[i].stores_left--;
    }
  }
}

static bool issue(flap_pager *pager, uint32_t slot, uint32_t first, bool disk) {
  pager_slot *s = &pager->slots[slot];
  const pager_region *region = &pager->regions[s->region];
  uint32_t count = pager_chunk_pages(pager, region, first);
  if (!chunk_is_idle(pager, region, first, count))
    return false;
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
  }
  move_pages(pager, s->region, first, count, PAGE_IDLE, PAGE_COPYING);
  pager_lane_copy(pager, &pager->d2h, to, s->memory + first * pager->page_bytes, &copy);
  return true;
}

bool pager_stores_issue(flap_pager *pager) {
  bool progress = false;
  for (uint32_t slot = pager->storing.head; slot != PAGER_NONE; slot = pager->slots[slot].next) {
    pager_slot *s = &pager->slots[slot];
    const pager_region *region = &pager->regions[s->region];
    /* Disk pages first: their way is the longer one. */
    while (s->disk_next < region->page_count && pager->write_free > 0 && pager_lane_has_room(&pager->d2h) &&
           issue(pager, slot, s->disk_next, true))
      progress = true;
    while (s->ram_next < region->ram_pages && pager_lane_has_room(&pager->d2h) &&
           issue(pager, slot, s->ram_next, false))
      progress = true;
    if (!pager_lane_has_room(&pager->d2h))
      break;
  }
  return progress;
}

void pager_stores_copied(flap_pager *pager, const pager_copy *copy) {
  if (copy->buffer == PAGER_NONE) {
    move_pages(pager, copy->region, copy->first_page, copy->page_count, PAGE_COPYING, PAGE_IDLE);
  } else {
    move_pages(pager, copy->region, copy->first_page, copy->page_count, PAGE_COPYING, PAGE_WRITING);
    pager->buffers[copy->buffer].state = BUFFER_FULL;
  }
  pager_rings_stored(pager, copy->slot);
}

void pager_stores_written(flap_pager *pager, uint32_t index) {
  const pager_buffer *buffer = &pager->buffers[index];
  move_pages(pager, buffer->region, buffer->first_page, buffer->page_count, PAGE_WRITING, PAGE_IDLE);
}
