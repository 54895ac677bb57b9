/* Staging buffers: pinned RAM between disk and VRAM, and the disk requests that fill and empty it.
 *
 * A read buffer's way:  free → reading (pager_buffer_read) → read (pager_disk_poll) → verified (pager_checks_advance)
 *                            → loading (pager_loads_issue) → free (pager_lane_retire)
 *                       and back, once: read → reading (pager_checks_advance)
 * A write buffer's way: free → storing (pager_stores_issue) → full (pager_stores_copied)
 *                            → packed (pager_checks_advance) → writing (pager_writes_issue) → free (pager_disk_poll)
 * Of a chunk in the pool neither is at the disk: free → read (pager_buffer_read), and full → free (pager_buffer_write).
 * Those of snapshots: see snapshot.c.
 *
 * There may be thousands of buffers, and each pump takes, frees and looks for a few: nothing here walks over all.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

/* ---- lists of buffers ------------------------------------------------------------------------------------ */

void pager_queue_init(pager_queue *queue) {
  *queue = (pager_queue){.head = PAGER_NONE, .tail = PAGER_NONE};
}

void pager_queue_append(flap_pager *pager, pager_queue *queue, uint32_t index) {
  pager->buffers[index].next = PAGER_NONE;
  if (queue->tail == PAGER_NONE)
    queue->head = index;
  else
    pager->buffers[queue->tail].next = index;
  queue->tail = index;
}

uint32_t pager_queue_take(flap_pager *pager, pager_queue *queue) {
  const uint32_t index = queue->head;
  if (index == PAGER_NONE)
    return PAGER_NONE;
  queue->head = pager->buffers[index].next;
  if (queue->head == PAGER_NONE)
    queue->tail = PAGER_NONE;
  return index;
}

static bool is_before(const flap_pager *pager, uint32_t a, uint32_t b) {
  return pager->buffers[a].order < pager->buffers[b].order;
}

void pager_heap_add(const flap_pager *pager, pager_heap *heap, uint32_t index) {
  uint32_t at = heap->count++;
  flap_assert(heap->count <= pager->buffer_count);
  for (; at > 0 && is_before(pager, index, heap->of[(at - 1) / 2]); at = (at - 1) / 2)
    heap->of[at] = heap->of[(at - 1) / 2];
  heap->of[at] = index;
}

uint32_t pager_heap_take(const flap_pager *pager, pager_heap *heap) {
  if (heap->count == 0)
    return PAGER_NONE;
  const uint32_t first = heap->of[0], last = heap->of[--heap->count];
  uint32_t at = 0;
  for (uint32_t child; (child = 2 * at + 1) < heap->count; at = child) {
    if (child + 1 < heap->count && is_before(pager, heap->of[child + 1], heap->of[child]))
      child++;
    if (!is_before(pager, heap->of[child], last))
      break;
    heap->of[at] = heap->of[child];
  }
  heap->of[at] = last;
  return first;
}

/* ---- free buffers ---------------------------------------------------------------------------------------- */

uint32_t pager_buffer_take(flap_pager *pager, bool write, uint32_t region, uint32_t first_page, uint32_t page_count) {
  const uint32_t index = pager->free_heads[write];
  flap_assert(index != PAGER_NONE);
  pager_buffer *buffer = &pager->buffers[index];
  flap_assert(buffer->state == BUFFER_FREE);
  pager->free_heads[write] = buffer->next;
  *(write ? &pager->write_free : &pager->read_free) -= 1;
  buffer->state = write ? BUFFER_STORING : BUFFER_READING;
  buffer->region = region;
  buffer->first_page = first_page;
  buffer->page_count = page_count;
  buffer->order = 0;
  buffer->lease = buffer->next = PAGER_NONE;
  buffer->at_rest = buffer->again = buffer->ahead = buffer->pooled = false;
  return index;
}

void pager_buffer_free(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  flap_assert(buffer->state != BUFFER_FREE);
  buffer->state = BUFFER_FREE;
  buffer->lease = PAGER_NONE;
  if (pager_is_snapshot_buffer(pager, index))
    return;
  const bool write = index >= pager->read_buffers;
  *(write ? &pager->write_free : &pager->read_free) += 1;
  buffer->next = pager->free_heads[write];
  pager->free_heads[write] = index;
}

/* ---- disk requests ------------------------------------------------------------------------------------ */

static void submit(flap_pager *pager, uint32_t index, flap_block_op op) {
  pager_buffer *buffer = &pager->buffers[index];
  const pager_region *region = &pager->regions[buffer->region];
  const pager_page *page = pager_pages_of(pager, region) + buffer->first_page;
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    flap_assert(pager_disk_offset(&page[i]) == pager_disk_offset(page) + bytes && page[i].file == page->file);
    bytes += page[i].stored_bytes;
  }
  if (pager_shrinks_on_disk(pager, buffer))
    bytes = flap_units_round_up((uint64_t)(pager->disk_share * (double)bytes), FLAP_BLOCK_ALIGN);
  buffer->request = (flap_block_request){.op = op,
                                         .file = page->file,
                                         .offset = pager_disk_offset(page),
                                         .buffer = buffer->memory,
                                         .bytes = (uint32_t)bytes,
                                         .user = buffer};
  flap_block_submit(pager->block, &buffer->request);
  *(op == FLAP_BLOCK_READ ? &pager->reading : &pager->writing) += 1;
  pager->reading_ahead += buffer->ahead;
  pager->submitted = true;
}

void pager_buffer_read(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  flap_assert(buffer->state == BUFFER_READING);
  if (!pager_pool_has(pager, buffer)) {
    submit(pager, index, FLAP_BLOCK_READ);
    return;
  }
  buffer->pooled = true;
  buffer->ahead = false;
  buffer->state = BUFFER_READ;
  pager_pool_moved(pager, buffer, FLAP_LANE_DISK_READ);
  pager_checks_add(pager, index);
}

void pager_buffer_write(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  flap_assert(buffer->state == BUFFER_FULL);
  if (buffer->pooled) {
    pager_pool_moved(pager, buffer, FLAP_LANE_DISK_WRITE);
    pager_stores_written(pager, index);
    pager_buffer_free(pager, index);
    return;
  }
  buffer->state = BUFFER_PACKED;
  pager_queue_append(pager, pager->regions[buffer->region].hurried ? &pager->hurried : &pager->behind, index);
}

static void write_next(flap_pager *pager, pager_queue *queue) {
  const uint32_t index = pager_queue_take(pager, queue);
  flap_assert(pager->buffers[index].state == BUFFER_PACKED);
  pager->buffers[index].state = BUFFER_WRITING;
  submit(pager, index, FLAP_BLOCK_WRITE);
}

bool pager_writes_issue(flap_pager *pager) {
  bool progress = false;
  for (; pager->hurried.head != PAGER_NONE; progress = true)
    write_next(pager, &pager->hurried);
  for (; pager->behind.head != PAGER_NONE && pager->writing < pager->behind_max; progress = true)
    write_next(pager, &pager->behind);
  return progress;
}

void pager_writes_hurry(flap_pager *pager, uint32_t region) {
  if (pager->regions[region].hurried)
    return;
  pager->regions[region].hurried = true;
  pager_queue others;
  pager_queue_init(&others);
  for (uint32_t index; (index = pager_queue_take(pager, &pager->behind)) != PAGER_NONE;)
    pager_queue_append(pager, pager->buffers[index].region == region ? &pager->hurried : &others, index);
  pager->behind = others;
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
  *(read ? &pager->reading : &pager->writing) -= 1;
  pager->reading_ahead -= buffer->ahead;
  buffer->ahead = false;
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
    pager_checks_add(pager, index);
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
