/* The sticky error, the caller's mistakes, and the invariants of pager.c in code. */
#include "pager/pager_internal.h"

#include "base/assert.h"
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

bool pager_full_checks = false;

/* ---- errors ------------------------------------------------------------------------------------------- */

void pager_fail(flap_pager *pager, flap_status status) {
  flap_assert(status != FLAP_OK);
  if (pager->error != FLAP_OK)
    return;
  pager->error = status;
  snprintf(pager->message, sizeof pager->message, "%s", flap_error_message());
}

flap_status pager_error(flap_pager *pager) {
  if (pager->error == FLAP_OK)
    return FLAP_OK;
  return flap_error_set(pager->error, "%s", pager->message);
}

/* ---- mistakes ----------------------------------------------------------------------------------------- */

static void dump_slots(const flap_pager *pager) {
  static const char *const states[] = {"free", "loading", "loaded", "pinned", "released", "storing"};
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    const pager_slot *slot = &pager->slots[i];
    if (slot->state == SLOT_FREE)
      continue;
    const pager_region *region = &pager->regions[slot->region];
    flap_log(FLAP_LOG_ERROR,
             "  ring %s, slot %u: %s, lease %llu, region %u, mode %u; next page %u of %u in ram, %u of %u on disk; "
             "%u pages to load, %u copies under way; changes %u of %u",
             pager->rings[slot->ring].name, i - pager->rings[slot->ring].first_slot, states[slot->state],
             (unsigned long long)slot->order, slot->region, slot->mode, slot->ram_next, region->ram_pages,
             slot->disk_next, region->page_count, slot->pages_left, slot->copies_left, region->changes_released,
             slot->change);
  }
}

static void dump_job(const flap_pager *pager) {
  if (pager->jobs_done == pager->jobs_queued)
    return;
  const pager_job *job = &pager->jobs[pager->jobs_done % pager->jobs_room];
  flap_log(FLAP_LOG_ERROR, "  jobs: %llu of %llu done, the next one %s", (unsigned long long)pager->jobs_done,
           (unsigned long long)pager->jobs_queued, pager->jobs_started > pager->jobs_done ? "runs" : "waits");
  for (uint32_t i = 0; i < job->count; i++) {
    const uint32_t index = job->first_lease + i;
    uint32_t number;
    const flap_lease *what = &pager_program_of(pager, index, &number)->leases[number];
    const pager_region *region = &pager->regions[what->region];
    flap_log(FLAP_LOG_ERROR, "    region %u, mode %u: changes %u of %u, %u copies out of it under way", what->region,
             (unsigned)what->mode, region->changes_released, pager->leases[index].change, region->loading);
  }
}

static void dump(const flap_pager *pager) {
  static const char *const states[] = {"free",    "reading", "read",   "verified", "loading",
                                       "storing", "full",    "packed", "writing"};
  for (uint32_t i = 0; i < pager->program_count; i++) {
    const pager_program *program = &pager->programs[(pager->program_first + i) % PAGER_PROGRAMS_MAX];
    flap_log(FLAP_LOG_ERROR, "  program: %u leases, %u pinned, %u of them released", program->count, program->pinned,
             program->released);
  }
  dump_job(pager);
  for (uint32_t i = 0; i < pager->ring_count; i++)
    flap_log(FLAP_LOG_ERROR, "  ring %s: %u slots, %u free; %u borrowed; %u pinned, next lease %d",
             pager->rings[i].name, pager->rings[i].slots, pager->rings[i].free.count, pager->rings[i].borrowed,
             pager->rings[i].pinned, (int)pager->rings[i].queue_head);
  dump_slots(pager);
  for (uint32_t i = 0; i < pager->buffer_count; i++)
    if (pager->buffers[i].state != BUFFER_FREE)
      flap_log(FLAP_LOG_ERROR, "  buffer %u: %s, region %u, pages from %u, count %u, lease %llu", i,
               states[pager->buffers[i].state], pager->buffers[i].region, pager->buffers[i].first_page,
               pager->buffers[i].page_count, (unsigned long long)pager->buffers[i].order);
  if (pager->snapshot.open)
    flap_log(FLAP_LOG_ERROR, "  snapshot: region %d is drained, piece %u of %u is next", (int)pager->snapshot.region,
             pager->snapshot.next, pager->snapshot.count);
  flap_log(FLAP_LOG_ERROR, "  copies: %llu of %llu h2d, %llu of %llu d2h retired",
           (unsigned long long)pager->h2d.retired, (unsigned long long)pager->h2d.issued,
           (unsigned long long)pager->d2h.retired, (unsigned long long)pager->d2h.issued);
}

void pager_mistake(flap_pager *pager, const char *format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  flap_log(FLAP_LOG_ERROR, "pager: %s", text);
  dump(pager);
  flap_assert_fail(__FILE__, __LINE__, __func__, text);
}

/* ---- what a pin waits for ------------------------------------------------------------------------------- */

/* The slot comes from an earlier occupant that is on its way home. While the compute stream still uses it nobody is
 * charged: compute is busy. */
static flap_lane waits_for_slots(const flap_pager *pager, uint32_t first, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) {
    const pager_slot *slot = &pager->slots[first + i];
    if (slot->state != SLOT_STORING)
      continue;
    if (pager_is_kept_back(&pager->regions[slot->region], slot->change))
      return FLAP_LANE_DISK_WRITE; /* of a checkpoint, say */
    bool needs_buffer = slot->disk_next < pager->regions[slot->region].page_count && pager->write_free == 0;
    const bool copying = pager->writing == 0 && pager->d2h.issued != pager->d2h.retired;
    return needs_buffer && !copying ? FLAP_LANE_DISK_WRITE : FLAP_LANE_D2H;
  }
  return FLAP_LANE_COUNT;
}

/* A chunk that is not home yet holds the load up; PAGE_WRITING is the disk's part of the way. */
static bool waits_for_pages(const flap_pager *pager, const pager_region *region, uint32_t first, uint32_t count,
                            flap_lane *lane_out) {
  const pager_page *page = pager_pages_of(pager, region) + first;
  for (uint32_t i = 0; i < count; i++) {
    if (page[i].stores_left == 0)
      continue;
    *lane_out = page[i].state == PAGE_WRITING || region->kept ? FLAP_LANE_DISK_WRITE : FLAP_LANE_D2H;
    return true;
  }
  return false;
}

flap_lane pager_waits_for(flap_pager *pager, uint32_t lease) {
  uint32_t index = pager->leases[lease].slot;
  uint32_t number;
  const pager_program *program = pager_program_of(pager, lease, &number);
  const uint32_t wanted = program->leases[number].region;
  if (pager->regions[wanted].changes_released !=
      pager->leases[lease].change) /* by a job: all else is unpinned by now */
    return pager->regions[wanted].kept ? FLAP_LANE_DISK_WRITE : FLAP_LANE_HOST;
  if (pager->regions[wanted].lends) {
    const pager_loan *loan = &pager->loans[pager->regions[wanted].loan];
    return waits_for_slots(pager, loan->first_slot, loan->slots);
  }
  if (pager->regions[wanted].ring == FLAP_PAGER_RESIDENT)
    return FLAP_LANE_DISK_WRITE; /* nothing else holds it up than that it is drained */
  if (index == PAGER_NONE) {
    const pager_ring *ring = &pager->rings[pager->regions[wanted].ring];
    return waits_for_slots(pager, ring->first_slot, ring->slots + ring->borrowed);
  }
  const pager_slot *slot = &pager->slots[index];
  const pager_region *region = &pager->regions[slot->region];
  flap_lane lane = FLAP_LANE_H2D;
  if (slot->ram_next < region->ram_pages &&
      waits_for_pages(pager, region, slot->ram_next, pager_copy_pages(pager, region, slot->ram_next), &lane))
    return lane;
  if (slot->disk_next < region->page_count &&
      waits_for_pages(pager, region, slot->disk_next, pager_chunk_pages(pager, region, slot->disk_next), &lane))
    return lane;
  if (pager->leases[lease].asked > 0 || (slot->disk_next < region->page_count && pager->reading > 0))
    return FLAP_LANE_DISK_READ;
  return FLAP_LANE_H2D;
}

/* ---- invariants ---------------------------------------------------------------------------------------- */

static void assert_lanes(const flap_pager *pager) {
  const pager_lane *lanes[] = {&pager->h2d, &pager->d2h};
  for (uint32_t i = 0; i < 2; i++) {
    flap_assert(lanes[i]->retired <= lanes[i]->issued);
    flap_assert(lanes[i]->issued - lanes[i]->retired <= PAGER_WINDOW); /* 6 */
    flap_assert(lanes[i]->issued > lanes[i]->retired || lanes[i]->bytes == 0);
  }
}

/* 1, 2, 3: what a slot's state says about its lists, cursors and copies. */
static void assert_slots(const flap_pager *pager) {
  uint32_t states[SLOT_STORING + 1] = {0};
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    const pager_slot *slot = &pager->slots[i];
    const pager_region *region = &pager->regions[slot->region];
    states[slot->state]++;
    switch ((pager_slot_state)slot->state) {
    case SLOT_FREE:
      flap_assert(slot->copies_left == 0 && slot->ready == PAGER_NONE);
      break;
    case SLOT_LOADING:
      flap_assert(pager_loads(slot->mode) && slot->pages_left > 0);
      break;
    case SLOT_LOADED:
      flap_assert(slot->pages_left == 0 && slot->ready == PAGER_NONE);
      break;
    case SLOT_PINNED:
      flap_assert(region->pinned && slot->pages_left == 0);
      break;
    case SLOT_RELEASED:
      flap_assert(slot->pages_left == 0);
      break;
    case SLOT_STORING:
      flap_assert(pager_stores(slot->mode));
      flap_assert(slot->copies_left > 0 || slot->ram_next < region->ram_pages || slot->disk_next < region->page_count);
      break;
    }
    if (slot->state != SLOT_FREE)
      flap_assert(slot->ram_next <= region->ram_pages && slot->disk_next <= region->page_count);
  }
  flap_assert(states[SLOT_LOADING] == pager->loading.count);
  flap_assert(states[SLOT_RELEASED] == pager->released.count);
  flap_assert(states[SLOT_STORING] == pager->storing.count);
  uint32_t storing_ram = 0;
  for (uint32_t i = pager->storing.head; i != PAGER_NONE; i = pager->slots[i].next)
    storing_ram += pager->slots[i].ram_next < pager->regions[pager->slots[i].region].ram_pages;
  flap_assert(storing_ram == pager->storing_ram);
  uint32_t wants_disk = 0, wants_lane = 0;
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    const pager_slot *slot = &pager->slots[i];
    const pager_region *region = &pager->regions[slot->region];
    const bool loads = slot->state == SLOT_LOADING;
    flap_assert(slot->wants_disk == (loads && slot->disk_next < region->page_count));
    flap_assert(slot->wants_lane == (loads && (slot->ready != PAGER_NONE || slot->ram_next < region->ram_pages)));
    wants_disk += slot->wants_disk;
    wants_lane += slot->wants_lane;
  }
  flap_assert(wants_disk == pager->wants_disk && wants_lane == pager->wants_lane);
  for (uint32_t i = pager->loading.head; i != PAGER_NONE; i = pager->slots[i].next)
    flap_assert(pager->slots[i].next == PAGER_NONE || pager->slots[i].order < pager->slots[pager->slots[i].next].order);
}

/* 14: what is lent is in slots of residents that nobody uses, and these know how much. */
static void assert_loans(const flap_pager *pager) {
  uint32_t used = 0, offered = 0;
  for (uint32_t i = 0; i < pager->loan_count; i++) {
    const pager_loan *loan = &pager->loans[i];
    const pager_region *region = &pager->regions[loan->region];
    uint32_t free = 0;
    for (uint32_t j = 0; j < loan->slots; j++)
      free += pager->slots[loan->first_slot + j].state == SLOT_FREE;
    flap_assert(free == loan->free.count && (free == loan->slots || loan->state == LOAN_OPEN));
    flap_assert((loan->state == LOAN_CLOSED) == (region->pinned || region->holds));
    used += loan->state == LOAN_USED;
    offered += loan->state == LOAN_OPEN && free > 0;
  }
  flap_assert(used == pager->used.count && offered == pager->offered.count);
}

/* 10: of two slots that store the same region, the one that was unpinned first is ahead, or as far. */
static void assert_stores(const flap_pager *pager) {
  for (uint32_t i = pager->storing.head; i != PAGER_NONE; i = pager->slots[i].next)
    for (uint32_t j = pager->slots[i].next; j != PAGER_NONE; j = pager->slots[j].next) {
      const pager_slot *first = &pager->slots[i], *second = &pager->slots[j];
      if (first->region == second->region)
        flap_assert(first->ram_next >= second->ram_next && first->disk_next >= second->disk_next);
    }
}

/* 4: every page that is not idle is in exactly one D2H copy or full or writing buffer; what is left to store of it is
 * that, and one for each slot that has not come to it. */
static void assert_pages(const flap_pager *pager) {
  uint64_t busy = 0, left = 0, carried = 0, waiting = 0;
  for (uint32_t i = 0; i < pager->page_count; i++) {
    busy += pager->pages[i].state != PAGE_IDLE;
    left += pager->pages[i].stores_left;
    flap_assert(pager->pages[i].state == PAGE_IDLE || pager->pages[i].stores_left > 0);
  }
  for (uint64_t i = pager->d2h.retired; i < pager->d2h.issued; i++)
    if (pager->d2h.copies[i % PAGER_WINDOW].slot != PAGER_NONE)
      carried += pager->d2h.copies[i % PAGER_WINDOW].page_count;
  for (uint32_t i = pager->read_buffers; i < pager->read_buffers + pager->write_buffers; i++) {
    const pager_buffer *buffer = &pager->buffers[i];
    if (buffer->state == BUFFER_FULL || buffer->state == BUFFER_PACKED || buffer->state == BUFFER_WRITING ||
        (buffer->state == BUFFER_STORING && buffer->at_rest))
      carried += buffer->page_count;
  }
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    const pager_slot *slot = &pager->slots[i];
    const pager_region *region = &pager->regions[slot->region];
    if (slot->state == SLOT_RELEASED && pager_stores(slot->mode))
      waiting += region->page_count;
    if (slot->state == SLOT_STORING)
      waiting += (region->ram_pages - slot->ram_next) + (region->page_count - slot->disk_next);
  }
  flap_assert(busy == carried);
  flap_assert(left == carried + waiting);
}

/* 5: buffers are counted, and free ones are all in their list; one that carries for a lease with a slot finds it
 * loading. */
static void assert_buffers(const flap_pager *pager) {
  uint32_t read_free = 0, write_free = 0, reading = 0, writing = 0, ahead = 0;
  for (uint32_t i = 0; i < pager->buffer_count; i++) {
    reading += pager->buffers[i].state == BUFFER_READING;
    writing += pager->buffers[i].state == BUFFER_WRITING;
    ahead += pager->buffers[i].state == BUFFER_READING && pager->buffers[i].ahead;
  }
  flap_assert(reading == pager->reading && writing == pager->writing && ahead == pager->reading_ahead);
  flap_assert(ahead <= pager->ahead_max && (pager->behind.head == PAGER_NONE || writing >= pager->behind_max));
  for (uint32_t i = 0; i < pager->read_buffers + pager->write_buffers; i++) {
    const pager_buffer *buffer = &pager->buffers[i];
    bool write = i >= pager->read_buffers;
    flap_assert(buffer->state == BUFFER_FREE || write == (buffer->state >= BUFFER_STORING));
    if (buffer->state == BUFFER_FREE)
      *(write ? &write_free : &read_free) += 1;
    else if (!write && buffer->lease != PAGER_NONE && buffer->state != BUFFER_LOADING &&
             pager->leases[buffer->lease].slot != PAGER_NONE)
      flap_assert(pager->slots[pager->leases[buffer->lease].slot].state == SLOT_LOADING);
  }
  flap_assert(read_free == pager->read_free && write_free == pager->write_free);
  for (uint32_t i = pager->free_heads[0]; i != PAGER_NONE; i = pager->buffers[i].next)
    read_free -= pager->buffers[i].state == BUFFER_FREE;
  for (uint32_t i = pager->free_heads[1]; i != PAGER_NONE; i = pager->buffers[i].next)
    write_free -= pager->buffers[i].state == BUFFER_FREE;
  flap_assert(read_free == 0 && write_free == 0);
}

/* 11: what is unpinned behind the point, and is to be stored, has not begun. */
static void assert_kept(const flap_pager *pager) {
  for (uint32_t i = 0; i < pager->region_count; i++)
    flap_assert(!pager->regions[i].kept || (pager->snapshot.open && pager->regions[i].in_snapshots));
  for (uint32_t i = pager->storing.head; i != PAGER_NONE; i = pager->slots[i].next) {
    const pager_slot *slot = &pager->slots[i];
    const pager_region *region = &pager->regions[slot->region];
    if (pager_is_kept_back(region, slot->change))
      flap_assert(slot->copies_left == 0 && slot->ram_next == 0 && slot->disk_next == region->ram_pages);
  }
}

/* 12: of an overlay one side at a time holds something, or has anything on its way home. */
static void assert_overlays(const flap_pager *pager) {
  uint32_t held = 0, storing = 0;
  for (uint32_t i = 0; i < pager->region_count; i++)
    held += pager->regions[i].overlay > 0 && pager->regions[i].holds;
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    const pager_slot *slot = &pager->slots[i];
    const bool stores = slot->state == SLOT_STORING || (slot->state == SLOT_RELEASED && pager_stores(slot->mode));
    storing += stores && pager->regions[slot->region].overlay > 0;
  }
  for (uint32_t i = 0; i < pager->overlay_count; i++) {
    const pager_overlay *overlay = &pager->overlays[i];
    for (uint32_t side = 0; side < 2; side++) {
      flap_assert(overlay->held[side] + overlay->storing[side] == 0 || overlay->held[1 - side] == 0);
      held -= overlay->held[side];
      storing -= overlay->storing[side];
    }
    flap_assert(overlay->storing[0] == 0 || overlay->storing[1] == 0);
  }
  flap_assert(held == 0 && storing == 0);
}

static void assert_rings(const flap_pager *pager) {
  for (uint32_t i = 0; i < pager->ring_count; i++) {
    const pager_ring *ring = &pager->rings[i];
    flap_assert(ring->free.count <= ring->slots && ring->pinned + ring->free.count <= ring->slots + ring->borrowed);
    flap_assert((ring->queue_head == PAGER_NONE) == (ring->queue_tail == PAGER_NONE));
  }
}

/* 1: nobody queues beside a slot that he may have. */
static void assert_queues(const flap_pager *pager) {
  for (uint32_t i = 0; i < pager->ring_count; i++)
    flap_assert(pager_rings_next_slot(pager, i) == PAGER_NONE);
}

void pager_assert_state(flap_pager *pager) {
  flap_assert(pager->program_count <= PAGER_PROGRAMS_MAX);
  flap_assert(pager->read_free <= pager->read_buffers && pager->write_free <= pager->write_buffers);
  assert_lanes(pager);
  assert_rings(pager);
  if (!pager_full_checks || pager->error != FLAP_OK)
    return;
  assert_queues(pager);
  assert_slots(pager);
  assert_loans(pager);
  assert_stores(pager);
  assert_kept(pager);
  assert_overlays(pager);
  assert_buffers(pager);
  assert_pages(pager);
}
