/* Snapshots: values of one point of the programs, read by a thread of the caller's while programs run on.
 *
 * A region's value at the point is there once the last change before it is unpinned (or its job is over), and home once
 * the stores of these are. It stays there: the store of a later change is kept back, a job does not begin, and a
 * resident region is not pinned for one. So nothing is copied, and what is kept costs nothing until somebody wants to
 * change it. The drain takes RAM pages where they are; pages on disk and resident bytes come through buffers of its
 * own, which the pump fills:
 *
 *   buffer, disk:      free → reading (pager_snapshot_issue) → read → verified → free (the drain)
 *   buffer, resident:  free → storing (pager_snapshot_issue) → verified (pager_lane_retire) → free (the drain)
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#include <stdatomic.h>

/* ---- the point ------------------------------------------------------------------------------------------- */

static bool is_reached(const pager_region *region) {
  return (int32_t)(region->changes_released - region->kept_change) >= 0;
}

/* Resident bytes are read once the compute stream is past their last change. An event for each of them would be too
 * many: changes that follow one another share one, a mark. */
static uint8_t mark_of(const pager_snapshot *s, uint32_t change) {
  return (uint8_t)(1 + (uint64_t)change * PAGER_MARKS / s->changes);
}

static void record_mark(flap_pager *pager, uint32_t mark) {
  flap_device_event_record(pager->device, pager_mark_event(pager, mark), FLAP_STREAM_COMPUTE, true);
  pager->snapshot.marked = mark;
}

static void mark_change(flap_pager *pager, pager_region *region, bool is_last) {
  pager_snapshot *s = &pager->snapshot;
  flap_assert(s->changed < s->changes);
  const uint8_t mark = mark_of(s, s->changed++);
  if (is_last)
    region->mark = mark;
  if (s->changed == s->changes || mark_of(s, s->changed) != mark)
    record_mark(pager, mark);
}

void pager_snapshot_changed(flap_pager *pager, pager_region *region) {
  if (!region->kept)
    return;
  const int32_t behind = (int32_t)(region->changes_released - region->kept_change);
  if (behind == 0)
    region->kept_holds = region->holds;
  if (behind <= 0 && region->ring == FLAP_PAGER_RESIDENT)
    mark_change(pager, region, behind == 0);
}

/* Changes by leases behind the point are queued, but none of the snapshot's. */
static void leave_out(flap_pager *pager, uint32_t until) {
  if (pager->program_count == 0) {
    flap_assert(until == 0);
    return;
  }
  const pager_program *last = &pager->programs[(pager->program_first + pager->program_count - 1) % PAGER_PROGRAMS_MAX];
  flap_assert(until <= last->count);
  for (uint32_t i = until; i < last->count; i++) {
    flap_assert(pager->leases[last->first_lease + i].state == LEASE_QUEUED);
    if (last->leases[i].mode != FLAP_LEASE_READ)
      pager->regions[last->leases[i].region].kept_change--;
  }
}

void flap_pager_snapshot_begin(flap_pager *pager, uint32_t until) {
  pager_enter(pager);
  flap_assert(pager->has_bytes && !pager->snapshot.open);
  pager->snapshot = (pager_snapshot){.open = true, .region = PAGER_NONE};
  for (uint32_t i = 0; i < pager->region_count; i++)
    pager->regions[i].kept_change = pager->regions[i].changes_queued;
  leave_out(pager, until);
  for (uint32_t i = 0; i < pager->region_count; i++) {
    pager_region *region = &pager->regions[i];
    region->kept = region->in_snapshots;
    region->kept_holds = region->holds;
    if (!region->kept)
      continue;
    const uint32_t left = region->kept_change - region->changes_released;
    flap_assert((int32_t)left >= 0);
    region->mark = 0;
    if (region->ring == FLAP_PAGER_RESIDENT)
      pager->snapshot.changes += left;
  }
  record_mark(pager, 0);
  pager_leave(pager);
}

void flap_pager_snapshot_cut_off(flap_pager *pager) {
  pager_enter(pager);
  pager->snapshot.cut_off = true;
  pager_leave(pager);
  pager_ring_bell(pager);
}

void flap_pager_snapshot_end(flap_pager *pager) {
  pager_enter(pager);
  flap_assert(pager->snapshot.open && pager->snapshot.region == PAGER_NONE);
  pager->snapshot.open = false;
  for (uint32_t i = 0; i < pager->region_count; i++)
    pager->regions[i].kept = false;
  pager_leave(pager);
  pager_ring_bell(pager);
}

/* ---- pieces through buffers --------------------------------------------------------------------------------- */

typedef struct piece {
  uint32_t first_page, page_count; /* of a resident region: its number, and 1 */
  uint64_t offset, bytes;
} piece;

static uint64_t smaller(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

static uint32_t count_pieces(const flap_pager *pager, const pager_region *region) {
  if (region->ring == FLAP_PAGER_RESIDENT)
    return (uint32_t)((region->bytes + pager->snapshot_bytes - 1) / pager->snapshot_bytes);
  return (region->page_count - region->ram_pages + pager->pages_per_transfer - 1) / pager->pages_per_transfer;
}

static piece piece_at(const flap_pager *pager, const pager_region *region, uint32_t number) {
  if (region->ring == FLAP_PAGER_RESIDENT) {
    const uint64_t offset = number * pager->snapshot_bytes;
    return (piece){number, 1, offset, smaller(pager->snapshot_bytes, region->bytes - offset)};
  }
  const uint32_t first = region->ram_pages + number * pager->pages_per_transfer;
  const uint32_t count = pager_chunk_pages(pager, region, first);
  return (piece){first, count, first * pager->page_bytes, pager_chunk_bytes(pager, region, first, count)};
}

static uint32_t take_buffer(flap_pager *pager, const piece *p) {
  for (uint32_t i = pager->read_buffers + pager->write_buffers; i < pager->buffer_count; i++) {
    pager_buffer *buffer = &pager->buffers[i];
    if (buffer->state != BUFFER_FREE)
      continue;
    buffer->region = pager->snapshot.region;
    buffer->first_page = p->first_page;
    buffer->page_count = p->page_count;
    buffer->order = UINT64_MAX; /* everything else is needed before */
    buffer->lease = buffer->next = PAGER_NONE;
    buffer->at_rest = true; /* as far as counting goes */
    buffer->again = buffer->ahead = buffer->pooled = false;
    return i;
  }
  return PAGER_NONE;
}

/* At most as many copies as there are buffers, ahead of the stores that wait for the lane: so it comes to its turn
 * where they keep the lane busy. */
static bool ask_for(flap_pager *pager, pager_region *region, uint32_t number) {
  const bool resident = region->ring == FLAP_PAGER_RESIDENT;
  const piece p = piece_at(pager, region, number);
  if (resident && !pager_lane_has_room(&pager->d2h))
    return false;
  const uint32_t taken = take_buffer(pager, &p);
  if (taken == PAGER_NONE)
    return false;
  pager_buffer *buffer = &pager->buffers[taken];
  buffer->state = resident ? BUFFER_STORING : BUFFER_READING;
  if (!resident) {
    pager_buffer_read(pager, taken);
    return true;
  }
  const pager_copy copy = {.slot = PAGER_NONE, .buffer = taken, .region = pager->snapshot.region, .bytes = p.bytes};
  pager_lane_copy(pager, &pager->d2h, buffer->memory, region->home + p.offset, &copy);
  return true;
}

bool pager_snapshot_issue(flap_pager *pager) {
  pager_snapshot *s = &pager->snapshot;
  bool progress = false;
  if (s->region == PAGER_NONE)
    return false;
  while (s->next < s->count && ask_for(pager, &pager->regions[s->region], s->next)) {
    s->next++;
    progress = true;
  }
  return progress;
}

/* ---- the drain ---------------------------------------------------------------------------------------------- */

/* Slots that wait with a later value than that of the point. */
static uint32_t count_kept_back(const flap_pager *pager, const pager_region *region) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    const pager_slot *s = &pager->slots[i];
    count += (s->state == SLOT_RELEASED || s->state == SLOT_STORING) && &pager->regions[s->region] == region &&
             pager_stores(s->mode) && pager_is_kept_back(region, s->change);
  }
  return count;
}

/* What is still to be stored of each page is what waits. */
static bool is_home(const flap_pager *pager, const pager_region *region) {
  const pager_page *page = pager_pages_of(pager, region);
  const uint32_t kept_back = count_kept_back(pager, region);
  for (uint32_t i = 0; i < region->page_count; i++)
    if (page[i].state != PAGE_IDLE || page[i].stores_left != kept_back)
      return false;
  return true;
}

/* Jobs that were handed over go on by themselves. */
static bool never_comes(const flap_pager *pager, const pager_region *region) {
  if (!pager->snapshot.cut_off || pager->jobs_done != pager->jobs_queued)
    return false;
  return !is_reached(region) || (region->ring == FLAP_PAGER_RESIDENT && region->mark > pager->snapshot.marked);
}

static bool is_there_or_never(flap_pager *pager, uint32_t index) {
  const pager_region *region = &pager->regions[index];
  if (never_comes(pager, region))
    return true;
  if (!is_reached(region))
    return false;
  if (region->ring == FLAP_PAGER_RESIDENT)
    return region->mark <= pager->snapshot.marked &&
           flap_device_event_done(pager->device, pager_mark_event(pager, region->mark));
  return is_home(pager, region);
}

static uint32_t find_piece(const flap_pager *pager, uint32_t first_page) {
  for (uint32_t i = pager->read_buffers + pager->write_buffers; i < pager->buffer_count; i++)
    if (pager->buffers[i].state != BUFFER_FREE && pager->buffers[i].first_page == first_page)
      return i;
  return PAGER_NONE;
}

static bool piece_is_there(flap_pager *pager, uint32_t first_page) {
  const uint32_t index = find_piece(pager, first_page);
  return index != PAGER_NONE && pager->buffers[index].state == BUFFER_VERIFIED;
}

static bool nothing_is_under_way(flap_pager *pager, uint32_t unused) {
  (void)unused;
  for (uint32_t i = pager->read_buffers + pager->write_buffers; i < pager->buffer_count; i++)
    if (pager->buffers[i].state != BUFFER_FREE && pager->buffers[i].state != BUFFER_VERIFIED)
      return false;
  return true;
}

/* The callback works without the lock. */
static flap_status deliver(flap_pager *pager, flap_pager_drain_fn drain, void *context, uint64_t offset, uint64_t bytes,
                           const void *memory) {
  pager_leave(pager);
  const flap_status status = drain(context, offset, bytes, memory);
  pager_enter(pager);
  return status;
}

static flap_status deliver_ram(flap_pager *pager, const pager_region *region, flap_pager_drain_fn drain,
                               void *context) {
  for (uint32_t page = 0; page < region->ram_pages;) {
    const uint32_t count = pager_chunk_pages(pager, region, page);
    const uint64_t offset = page * pager->page_bytes;
    FLAP_TRY(
        deliver(pager, drain, context, offset, pager_chunk_bytes(pager, region, page, count), region->home + offset));
    page += count;
  }
  return FLAP_OK;
}

static flap_status deliver_pieces(flap_pager *pager, const pager_region *region, flap_pager_drain_fn drain,
                                  void *context) {
  for (uint32_t i = 0; i < pager->snapshot.count; i++) {
    const piece p = piece_at(pager, region, i);
    pager_wait_to_drain(pager, piece_is_there, p.first_page);
    FLAP_TRY(pager_error(pager));
    const uint32_t taken = find_piece(pager, p.first_page);
    const flap_status status = deliver(pager, drain, context, p.offset, p.bytes, pager->buffers[taken].memory);
    pager_buffer_free(pager, taken);
    FLAP_TRY(status);
    pager_ring_bell(pager);
  }
  return FLAP_OK;
}

/* A callback that stopped early, or a failure, leaves pieces behind. */
static void clear_up(flap_pager *pager) {
  pager->snapshot.count = pager->snapshot.next;
  pager_wait_to_drain(pager, nothing_is_under_way, 0);
  for (uint32_t i = pager->read_buffers + pager->write_buffers; i < pager->buffer_count; i++)
    if (pager->buffers[i].state == BUFFER_VERIFIED)
      pager_buffer_free(pager, i);
  pager->snapshot.region = PAGER_NONE;
}

static flap_status deliver_all(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain,
                               flap_pager_extent_fn extent, void *context) {
  pager_region *region = &pager->regions[index];
  const bool resident = region->ring == FLAP_PAGER_RESIDENT;
  pager->snapshot.region = index;
  pager->snapshot.next = 0;
  pager->snapshot.count = resident || extent == NULL ? count_pieces(pager, region) : 0;
  pager_ring_bell(pager);
  flap_status status = resident ? FLAP_OK : deliver_ram(pager, region, drain, context);
  if (status == FLAP_OK)
    status = deliver_pieces(pager, region, drain, context);
  clear_up(pager);
  if (status == FLAP_OK && extent != NULL)
    status = pager_extents_tell(pager, index, extent, context);
  return status == FLAP_OK ? flap_device_outcome(pager->device) : status;
}

flap_status pager_snapshot_drain(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain,
                                 flap_pager_extent_fn extent, void *context) {
  pager_region *region = &pager->regions[index];
  if (!region->kept || pager->snapshot.region != PAGER_NONE)
    pager_mistake(pager, "region %u is drained, but is none of the snapshot's any more, or beside another one", index);
  pager_wait_to_drain(pager, is_there_or_never, index);
  FLAP_TRY(pager_error(pager));
  if (never_comes(pager, region))
    return flap_error_set(FLAP_CLOSED, "the run ended before the step was complete");
  if (!region->kept_holds)
    pager_mistake(pager, "region %u is drained, but holds nothing at the point of the snapshot", index);
  FLAP_TRY(deliver_all(pager, index, drain, extent, context));
  if (extent != NULL)
    pager_extents_turn(pager, region);
  region->kept = false;
  pager_ring_bell(pager);
  return FLAP_OK;
}
