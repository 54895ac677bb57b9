/* At rest: regions are filled and drained, wherever they live, while no program is queued.
 *
 * Where a disk is involved several buffers are under way at a time, and the transfer thread does checksums while the
 * callback works. The callback runs without the lock. What lives in RAM is filled and drained in place.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

typedef struct piece {
  uint64_t offset, bytes;
} piece;

static flap_status come_to_rest(flap_pager *pager, uint32_t region) {
  FLAP_TRY(pager_error(pager));
  if (pager->program_count > 0 || pager->snapshot.open)
    pager_mistake(pager, "region %u is filled or drained while a program is queued or a snapshot is open", region);
  pager_wait_until(pager, pager_is_idle, 0, false);
  return pager_error(pager);
}

static flap_status leave(flap_pager *pager, flap_status status) {
  if (status == FLAP_OK)
    status = pager_error(pager);
  pager_leave(pager);
  return status;
}

/* ---- resident regions --------------------------------------------------------------------------------- */

static bool lanes_are_empty(flap_pager *pager, uint32_t unused) {
  (void)unused;
  return pager->h2d.issued == pager->h2d.retired && pager->d2h.issued == pager->d2h.retired;
}

/* Waits for all streams, and tells whether the device failed. */
static flap_status synchronize(flap_pager *pager) {
  pager_leave(pager);
  flap_status status = flap_device_synchronize(pager->device);
  pager_enter(pager);
  return status;
}

/* A copy of its own, waited for; its time is not the programs'. A copy that failed has left old bytes where it should
 * have put new ones, and a checkpoint must not get them: so the device is asked before anybody reads them. */
static flap_status copy_at_rest(flap_pager *pager, pager_lane *lane, void *to, const void *from, uint32_t region,
                                uint64_t bytes) {
  uint64_t before = flap_device_busy_ns(pager->device, lane->stream);
  pager_copy copy = {.slot = PAGER_NONE, .buffer = PAGER_NONE, .region = region, .bytes = bytes};
  pager_lane_copy(pager, lane, to, from, &copy);
  pager_wait_until(pager, lanes_are_empty, 0, false);
  FLAP_TRY(pager_error(pager));
  const flap_status status = synchronize(pager); /* and the device has counted the copy */
  pager->at_rest_ns[lane->lane == FLAP_LANE_H2D ? 0 : 1] += flap_device_busy_ns(pager->device, lane->stream) - before;
  return status;
}

static piece resident_piece(const flap_pager *pager, const pager_region *region, uint64_t offset) {
  uint64_t rest = region->bytes - offset;
  return (piece){.offset = offset, .bytes = rest < pager->bounce_bytes ? rest : pager->bounce_bytes};
}

static flap_status fill_resident(flap_pager *pager, uint32_t index, flap_pager_fill_fn fill, void *context) {
  pager_region *region = &pager->regions[index];
  FLAP_TRY(synchronize(pager)); /* compute may still use the region */
  for (uint64_t offset = 0; offset < region->bytes;) {
    piece p = resident_piece(pager, region, offset);
    pager_leave(pager);
    flap_status status = fill(context, p.offset, p.bytes, pager->bounce);
    pager_enter(pager);
    FLAP_TRY(status);
    FLAP_TRY(copy_at_rest(pager, &pager->h2d, region->home + offset, pager->bounce, index, p.bytes));
    offset += p.bytes;
  }
  return FLAP_OK;
}

static flap_status drain_resident(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain, void *context) {
  pager_region *region = &pager->regions[index];
  FLAP_TRY(synchronize(pager)); /* compute may still use the region */
  for (uint64_t offset = 0; offset < region->bytes;) {
    piece p = resident_piece(pager, region, offset);
    FLAP_TRY(copy_at_rest(pager, &pager->d2h, pager->bounce, region->home + offset, index, p.bytes));
    pager_leave(pager);
    flap_status status = drain(context, p.offset, p.bytes, pager->bounce);
    pager_enter(pager);
    FLAP_TRY(status);
    offset += p.bytes;
  }
  return FLAP_OK;
}

/* ---- what lives in RAM -------------------------------------------------------------------------------- */

/* One of the two callbacks is given. Nobody else touches the homes of a pager at rest. */
static flap_status visit_ram(flap_pager *pager, uint32_t index, flap_pager_fill_fn fill, flap_pager_drain_fn drain,
                             void *context) {
  const pager_region *region = &pager->regions[index];
  for (uint32_t page = 0; page < region->ram_pages;) {
    uint32_t count = pager_chunk_pages(pager, region, page);
    uint64_t offset = page * pager->page_bytes, bytes = pager_chunk_bytes(pager, region, page, count);
    pager_leave(pager);
    flap_status status = fill ? fill(context, offset, bytes, region->home + offset)
                              : drain(context, offset, bytes, region->home + offset);
    pager_enter(pager);
    FLAP_TRY(status);
    page += count;
  }
  return FLAP_OK;
}

/* ---- what lives on disk ------------------------------------------------------------------------------- */

static bool write_buffer_is_free(flap_pager *pager, uint32_t unused) {
  (void)unused;
  return pager->write_free > 0;
}

static void mark_storing(flap_pager *pager, const pager_region *region, uint32_t first, uint32_t count) {
  pager_page *page = pager_pages_of(pager, region) + first;
  for (uint32_t i = 0; i < count; i++) {
    flap_assert(page[i].state == PAGE_IDLE);
    page[i].state = PAGE_COPYING;
    page[i].stores_left++;
  }
}

/* From here on the buffer goes the way of a write-back; or, if nothing was put in, nowhere. */
static void hand_over(flap_pager *pager, uint32_t index, bool filled) {
  pager_buffer *buffer = &pager->buffers[index];
  pager_page *page = pager_pages_of(pager, &pager->regions[buffer->region]) + buffer->first_page;
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    page[i].state = filled ? PAGE_WRITING : PAGE_IDLE;
    if (!filled)
      page[i].stores_left--;
  }
  if (filled) {
    buffer->state = BUFFER_FULL;
    pager_checks_add(pager, index);
    pager_ring_bell(pager);
  } else {
    pager_buffer_free(pager, index);
  }
}

static flap_status fill_disk(flap_pager *pager, uint32_t index, flap_pager_fill_fn fill, void *context) {
  const pager_region *region = &pager->regions[index];
  flap_status status = FLAP_OK;
  for (uint32_t page = region->ram_pages; page < region->page_count && status == FLAP_OK;) {
    pager_wait_until(pager, write_buffer_is_free, 0, false);
    FLAP_TRY(pager_error(pager));
    uint32_t count = pager_chunk_pages(pager, region, page);
    uint32_t taken = pager_buffer_take(pager, true, index, page, count);
    pager->buffers[taken].at_rest = true;
    mark_storing(pager, region, page, count);
    pager_leave(pager);
    status = fill(context, page * pager->page_bytes, pager_chunk_bytes(pager, region, page, count),
                  pager->buffers[taken].memory);
    pager_enter(pager);
    hand_over(pager, taken, status == FLAP_OK);
    page += count;
  }
  pager_wait_until(pager, pager_is_idle, 0, false);
  return status;
}

static bool next_is_verified(flap_pager *pager, uint32_t unused) {
  (void)unused;
  return pager->buffers[pager->at_rest.head].state == BUFFER_VERIFIED;
}

static void read_ahead(flap_pager *pager, uint32_t index, uint32_t *next) {
  const pager_region *region = &pager->regions[index];
  bool submitted = false;
  while (*next < region->page_count && pager->read_free > 0) {
    uint32_t count = pager_chunk_pages(pager, region, *next);
    uint32_t taken = pager_buffer_take(pager, false, index, *next, count);
    pager->buffers[taken].at_rest = true;
    pager_queue_append(pager, &pager->at_rest, taken);
    pager_buffer_read(pager, taken);
    *next += count;
    submitted = true;
  }
  if (submitted)
    pager_ring_bell(pager); /* the pump flushes */
}

static flap_status drain_disk(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain, void *context) {
  const pager_region *region = &pager->regions[index];
  flap_status status = FLAP_OK;
  uint32_t next = region->ram_pages;
  for (uint32_t page = region->ram_pages; page < region->page_count && status == FLAP_OK;) {
    read_ahead(pager, index, &next);
    pager_wait_until(pager, next_is_verified, 0, false);
    FLAP_TRY(pager_error(pager));
    uint32_t taken = pager_queue_take(pager, &pager->at_rest), count = pager->buffers[taken].page_count;
    flap_assert(pager->buffers[taken].first_page == page);
    pager_leave(pager);
    status = drain(context, page * pager->page_bytes, pager_chunk_bytes(pager, region, page, count),
                   pager->buffers[taken].memory);
    pager_enter(pager);
    pager_buffer_free(pager, taken);
    page += count;
  }
  /* A callback that stopped early leaves reads behind. */
  while (pager->at_rest.head != PAGER_NONE) {
    pager_wait_until(pager, next_is_verified, 0, false);
    if (pager->error != FLAP_OK)
      break;
    pager_buffer_free(pager, pager_queue_take(pager, &pager->at_rest));
  }
  return status;
}

/* ---- the two calls ------------------------------------------------------------------------------------ */

static void set_holds(flap_pager *pager, pager_region *region, bool holds) {
  pager_set_holds(pager, region, holds);
  if (region->lends)
    pager_loan_at_rest(pager, region->loan);
}

flap_status flap_pager_fill(flap_pager *pager, uint32_t index, flap_pager_fill_fn fill, void *context) {
  flap_assert(index < pager->region_count);
  pager_enter(pager);
  flap_status status = come_to_rest(pager, index);
  pager_region *region = &pager->regions[index];
  if (status != FLAP_OK)
    return leave(pager, status);
  set_holds(pager, region, false);
  if (region->ring < FLAP_PAGER_HOST && pager->rings[region->ring].keeps)
    pager->slots[pager->rings[region->ring].first_slot].keeps = false;
  if (!pager->has_bytes) {
    set_holds(pager, region, true);
    return leave(pager, FLAP_OK);
  }
  if (region->ring == FLAP_PAGER_RESIDENT) {
    status = fill_resident(pager, index, fill, context);
  } else {
    status = visit_ram(pager, index, fill, NULL, context);
    if (status == FLAP_OK)
      status = fill_disk(pager, index, fill, context);
  }
  set_holds(pager, region, status == FLAP_OK && pager->error == FLAP_OK);
  return leave(pager, status);
}

static flap_status drain_or_keep(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain,
                                 flap_pager_extent_fn extent, void *context) {
  flap_assert(pager->has_bytes && index < pager->region_count);
  pager_enter(pager);
  if (pager->snapshot.open && pager->error == FLAP_OK)
    return leave(pager, pager_snapshot_drain(pager, index, drain, extent, context));
  flap_status status = come_to_rest(pager, index);
  pager_region *region = &pager->regions[index];
  if (status != FLAP_OK)
    return leave(pager, status);
  if (!region->holds)
    pager_mistake(pager, "region %u is drained, but it holds nothing", index);
  if (region->ring == FLAP_PAGER_RESIDENT) {
    status = drain_resident(pager, index, drain, context);
  } else {
    status = visit_ram(pager, index, NULL, drain, context);
    if (status == FLAP_OK)
      status =
          extent != NULL ? pager_extents_tell(pager, index, extent, context) : drain_disk(pager, index, drain, context);
  }
  if (status == FLAP_OK && extent != NULL)
    pager_extents_turn(pager, region);
  return leave(pager, status);
}

flap_status flap_pager_drain(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain, void *context) {
  return drain_or_keep(pager, index, drain, NULL, context);
}

flap_status flap_pager_keep(flap_pager *pager, uint32_t index, flap_pager_drain_fn drain, flap_pager_extent_fn extent,
                            void *context) {
  return drain_or_keep(pager, index, drain, extent, context);
}
