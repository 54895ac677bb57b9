/* Staging buffers: pinned RAM between disk and VRAM, and the disk requests that fill and empty it.
 *
 * A read buffer's way:  free → reading (pager_buffer_read) → read (pager_disk_poll) → verified (pager_checks_advance)
 *                            → loading (pager_loads_issue) → free (pager_lane_retire)
 *                       and back, once: read → reading (pager_checks_advance)
 * A write buffer's way: free → storing (pager_stores_issue) → full (pager_stores_copied)
 *                            → writing (pager_checks_advance) → free (pager_disk_poll)
 * Those of snapshots: see snapshot.c.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

uint32_t pager_buffer_take(flap_pager *pager, bool write, uint32_t region, uint32_t first_page, uint32_t page_count) {
  uint32_t begin = write ? pager->read_buffers : 0;
  uint32_t end = write ? begin + pager->write_buffers : pager->read_buffers;
  for (uint32_t i = begin; i < end; i++) {
    pager_buffer *buffer = &pager->buffers[i];
    if (buffer->state != BUFFER_FREE)
      continue;
    buffer->state = write ? BUFFER_STORING : BUFFER_READING;
    buffer->region = region;
    buffer->first_page = first_page;
    buffer->page_count = page_count;
    buffer->order = 0;
    buffer->slot = buffer->lease = buffer->next = PAGER_NONE;
    buffer->at_rest = buffer->again = buffer->handed = false;
    *(write ? &pager->write_free : &pager->read_free) -= 1;
    return i;
  }
  return PAGER_NONE;
}

void pager_buffer_free(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  flap_assert(buffer->state != BUFFER_FREE);
  buffer->state = BUFFER_FREE;
  buffer->slot = buffer->lease = PAGER_NONE;
  if (!pager_is_snapshot_buffer(pager, index))
    *(index < pager->read_buffers ? &pager->read_free : &pager->write_free) += 1;
}

/* ---- disk requests ------------------------------------------------------------------------------------ */

static void submit(flap_pager *pager, uint32_t index, flap_block_op op) {
  pager_buffer *buffer = &pager->buffers[index];
  const pager_region *region = &pager->regions[buffer->region];
  const pager_page *page = pager_pages_of(pager, region) + buffer->first_page;
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    flap_assert(pager_disk_offset(&page[i]) == pager_disk_offset(page) + bytes); /* adjacent */
    bytes += page[i].stored_bytes;
  }
  buffer->request = (flap_block_request){
      .op = op, .offset = pager_disk_offset(page), .buffer = buffer->memory, .bytes = (uint32_t)bytes, .user = buffer};
  flap_block_submit(pager->block, &buffer->request);
  pager->submitted = true;
}

void pager_buffer_read(flap_pager *pager, uint32_t index) {
  flap_assert(pager->buffers[index].state == BUFFER_READING);
  submit(pager, index, FLAP_BLOCK_READ);
}

void pager_buffer_write(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  flap_assert(buffer->state == BUFFER_FULL);
  buffer->slot = PAGER_NONE;
  buffer->state = BUFFER_WRITING;
  submit(pager, index, FLAP_BLOCK_WRITE);
}

static void account(flap_pager *pager, const pager_buffer *buffer) {
  const flap_block_request *request = &buffer->request;
  flap_lane lane = request->op == FLAP_BLOCK_READ ? FLAP_LANE_DISK_READ : FLAP_LANE_DISK_WRITE;
  if (pager->trace)
    pager->trace(pager->trace_context, lane, buffer->region, request->started_ns, request->ended_ns, request->bytes);
  if (buffer->at_rest || buffer->again)
    return;
  pager->stats.bytes[lane] +=
      pager_chunk_bytes(pager, &pager->regions[buffer->region], buffer->first_page, buffer->page_count);
  pager->stats.disk_bytes[request->op == FLAP_BLOCK_READ ? 0 : 1] += request->bytes;
  pager->disk_ns[request->op == FLAP_BLOCK_READ ? 0 : 1] +=
      request->ended_ns - request->started_ns - pager->disk_latency_ns;
}

static void complete(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  flap_block_request *request = &buffer->request;
  bool read = request->op == FLAP_BLOCK_READ;
  flap_assert(buffer->state == (read ? BUFFER_READING : BUFFER_WRITING));
  if (request->status != FLAP_OK) {
    pager_fail(pager,
               flap_error_prefix(flap_block_explain(pager->block, request), "region %u, pages %u to %u", buffer->region,
                                 buffer->first_page, buffer->first_page + buffer->page_count - 1));
    pager_buffer_free(pager, index); /* what it was for stays undone: nothing goes on after a failure */
    return;
  }
  account(pager, buffer);
  if (read) {
    buffer->state = BUFFER_READ;
  } else {
    pager_stores_written(pager, index);
    pager_buffer_free(pager, index);
  }
}

bool pager_disk_poll(flap_pager *pager) {
  if (!pager->block)
    return false;
  bool progress = false;
  for (flap_block_request *request; (request = flap_block_poll(pager->block)) != NULL;) {
    complete(pager, (uint32_t)((pager_buffer *)request->user - pager->buffers));
    progress = true;
  }
  return progress;
}
