/* Loads: a region's pages, from RAM and from disk, into its slot.
 *
 * Slots are served in program order. A slot takes the H2D lane first for buffers that were read for it, because that
 * gives the buffers back, then for its RAM pages; and it asks the disk for what it can find buffers for. Nothing starts
 * before the earlier changes of the region were released, and no chunk before its pages are home: so a load never sees
 * an old byte.
 *
 * What is left of the read buffers reads ahead of the slots, in program order, so that a ring of few slots does not
 * wait for the disk at each lease, and the disk does not rest while there is computing and nothing to load. Half of the
 * buffers, at most KEPT_MAX, are never used for that: the loads that have slots always move on. And the disk is asked
 * for no more of it at a time than it works on, for it serves requests as they come: what a slot needs never stands
 * behind all that was read ahead.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#define KEPT_MAX 16u /* read buffers that never read ahead: enough for a disk to be busy with what is needed first */

/* If not, their stores are told who waits. */
static bool chunk_is_home(const flap_pager *pager, pager_region *region, uint32_t first_page, uint32_t count,
                          uint64_t order) {
  const pager_page *page = pager_pages_of(pager, region) + first_page;
  for (uint32_t i = 0; i < count; i++)
    if (page[i].stores_left > 0) {
      if (order < region->wanted)
        region->wanted = order;
      return false;
    }
  region->wanted = UINT64_MAX;
  region->hurried = false;
  return true;
}

/* What a slot wants is counted, so that whoever looks for something to issue need not pass all slots that want nothing:
 * there are thousands, each waits for its bytes most of the time, and somebody looks at every event. */
void pager_loads_look(flap_pager *pager, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  const pager_region *region = &pager->regions[s->region];
  const bool loads = s->state == SLOT_LOADING;
  const bool disk = loads && s->disk_next < region->page_count;
  const bool lane = loads && (s->ready != PAGER_NONE || s->ram_next < region->ram_pages);
  pager->wants_disk += (uint32_t)disk - (uint32_t)s->wants_disk;
  pager->wants_lane += (uint32_t)lane - (uint32_t)s->wants_lane;
  s->wants_disk = disk;
  s->wants_lane = lane;
}

/* Before the copy, so that whoever sees pages_left at 0 finds the event recorded: the last one records it. */
static void enqueue(flap_pager *pager, uint32_t slot, uint32_t buffer, uint32_t first_page, uint32_t count,
                    const void *from) {
  pager_slot *s = &pager->slots[slot];
  const pager_region *region = &pager->regions[s->region];
  pager_copy copy = {.slot = slot,
                     .buffer = buffer,
                     .region = s->region,
                     .first_page = first_page,
                     .page_count = count,
                     .bytes = pager_chunk_bytes(pager, region, first_page, count)};
  pager->regions[s->region].loading++;
  pager_lane_copy(pager, &pager->h2d, s->memory + first_page * pager->page_bytes, from, &copy);
  flap_assert(s->pages_left >= count);
  s->pages_left -= count;
  if (s->pages_left > 0)
    return;
  flap_device_event_record(pager->device, pager_load_event(slot), FLAP_STREAM_H2D, false);
  pager_list_remove(pager, &pager->loading, slot);
  s->state = SLOT_LOADED;
}

static bool load_from_buffers(flap_pager *pager, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  bool progress = false;
  while (s->ready != PAGER_NONE && pager_lane_has_room(&pager->h2d)) {
    uint32_t index = s->ready;
    pager_buffer *buffer = &pager->buffers[index];
    s->ready = buffer->next;
    buffer->state = BUFFER_LOADING;
    enqueue(pager, slot, index, buffer->first_page, buffer->page_count, buffer->memory);
    progress = true;
  }
  return progress;
}

static bool load_from_ram(flap_pager *pager, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  pager_region *region = &pager->regions[s->region];
  bool progress = false;
  while (s->ram_next < region->ram_pages && pager_lane_has_room(&pager->h2d)) {
    uint32_t first = s->ram_next, count = pager_copy_pages(pager, region, first);
    if (!chunk_is_home(pager, region, first, count, s->order))
      break;
    s->ram_next += count;
    enqueue(pager, slot, PAGER_NONE, first, count, region->home + first * pager->page_bytes);
    progress = true;
  }
  return progress;
}

static void read_for(flap_pager *pager, uint32_t lease, uint32_t region, uint32_t first_page, uint32_t count,
                     uint64_t order, bool ahead) {
  const uint32_t index = pager_buffer_take(pager, false, region, first_page, count);
  pager->buffers[index].lease = lease;
  pager->buffers[index].order = order;
  pager->buffers[index].ahead = ahead;
  pager->leases[lease].asked++;
  pager_buffer_read(pager, index);
}

static bool load_from_disk(flap_pager *pager, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  pager_region *region = &pager->regions[s->region];
  bool progress = false;
  while (s->disk_next < region->page_count && pager->read_free > 0) {
    uint32_t first = s->disk_next, count = pager_chunk_pages(pager, region, first);
    if (!chunk_is_home(pager, region, first, count, s->order)) {
      pager_writes_hurry(pager, s->region);
      break;
    }
    s->disk_next += count;
    read_for(pager, s->lease, s->region, first, count, s->order, false);
    progress = true;
  }
  return progress;
}

bool pager_loads_issue(flap_pager *pager) {
  bool progress = false;
  uint32_t disk_left = pager->wants_disk, lane_left = pager->wants_lane; /* of the slots that were not passed */
  for (uint32_t slot = pager->loading.head, next; slot != PAGER_NONE; slot = next) {
    pager_slot *s = &pager->slots[slot];
    next = s->next; /* a slot that becomes loaded leaves the list */
    const bool disk = disk_left > 0 && pager->read_free > 0;
    if (!disk && !(lane_left > 0 && pager_lane_has_room(&pager->h2d)))
      break;
    disk_left -= s->wants_disk;
    lane_left -= s->wants_lane;
    const pager_region *region = &pager->regions[s->region];
    if (region->changes_released != s->change || !(s->wants_disk || s->wants_lane))
      continue;
    if (!region->holds)
      pager_mistake(pager,
                    "region %u is loaded, but it holds nothing: it was never filled or created, or it was consumed",
                    s->region);
    progress |= load_from_disk(pager, slot);
    progress |= load_from_buffers(pager, slot);
    if (s->state == SLOT_LOADING)
      progress |= load_from_ram(pager, slot);
    pager_loads_look(pager, slot);
  }
  return progress;
}

/* ---- ahead of the slots -------------------------------------------------------------------------------- */

static uint32_t lease_at(const flap_pager *pager, uint64_t order, const flap_lease **what_out) {
  for (uint32_t i = 0; i < pager->program_count; i++) {
    const pager_program *program = &pager->programs[(pager->program_first + i) % PAGER_PROGRAMS_MAX];
    if (order >= program->first_order && order < program->first_order + program->count) {
      const uint32_t index = (uint32_t)(order - program->first_order);
      *what_out = &program->leases[index];
      return program->first_lease + index;
    }
  }
  return PAGER_NONE; /* of a program that has ended */
}

static bool is_home_by_now(flap_pager *pager, pager_region *region, const pager_lease *lease, uint64_t order) {
  const uint32_t first = lease->disk_next;
  return region->changes_released == lease->change && region->holds &&
         chunk_is_home(pager, region, first, pager_chunk_pages(pager, region, first), order);
}

/* A chunk of the lease, if it may be read by now. */
static bool read_chunk_ahead(flap_pager *pager, uint32_t index, const flap_lease *what, uint64_t order) {
  pager_lease *lease = &pager->leases[index];
  pager_region *region = &pager->regions[what->region];
  if (lease->slot != PAGER_NONE || lease->state != LEASE_QUEUED || region->ring == FLAP_PAGER_RESIDENT ||
      !pager_loads(what->mode) || lease->disk_next >= region->page_count)
    return false;
  if (!is_home_by_now(pager, region, lease, order)) {
    region->passed = order < region->passed ? order : region->passed;
    return false;
  }
  const uint32_t first = lease->disk_next, count = pager_chunk_pages(pager, region, first);
  lease->disk_next += count;
  read_for(pager, index, what->region, first, count, order, true);
  return true;
}

/* Looks again from there on. */
void pager_loads_came_home(flap_pager *pager, pager_region *region) {
  if (region->passed < pager->ahead)
    pager->ahead = region->passed;
  region->passed = UINT64_MAX;
}

bool pager_loads_read_ahead(flap_pager *pager) {
  const uint32_t half = (pager->read_buffers + 1) / 2, kept = half < KEPT_MAX ? half : KEPT_MAX;
  bool progress = false;
  while (pager->read_free > kept && pager->reading_ahead < pager->ahead_max && pager->ahead < pager->order_next) {
    const flap_lease *what = NULL;
    uint32_t index = lease_at(pager, pager->ahead, &what);
    if (index != PAGER_NONE && read_chunk_ahead(pager, index, what, pager->ahead))
      progress = true;
    else
      pager->ahead++;
  }
  return progress;
}

void pager_loads_hand_over(flap_pager *pager, uint32_t index, uint32_t slot) {
  pager_lease *lease = &pager->leases[index];
  pager_slot *s = &pager->slots[slot];
  s->disk_next = lease->disk_next;
  s->ready = lease->ready;
  s->lease = index;
  lease->ready = PAGER_NONE;
}

void pager_loads_verified(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  buffer->state = BUFFER_VERIFIED;
  pager_extents_compared(pager, buffer);
  if (buffer->lease == PAGER_NONE)
    return; /* a drain will come for it */
  pager_lease *lease = &pager->leases[buffer->lease];
  uint32_t *ready = lease->slot != PAGER_NONE ? &pager->slots[lease->slot].ready : &lease->ready;
  buffer->next = *ready;
  *ready = index;
  if (lease->slot != PAGER_NONE)
    pager_loads_look(pager, lease->slot);
  flap_assert(lease->asked > 0);
  lease->asked--;
}
