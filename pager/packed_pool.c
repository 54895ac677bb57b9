/* The pool: RAM in which chunks of regions on disk stand encoded, instead of on the disk.
 *
 * Pages that shrink are worth more RAM than they take: a pool of P bytes spares the disks P over what a byte comes to,
 * where P bytes of homes spare them P. Their extents on disk stay theirs, for what does not shrink, or no longer, has
 * to go somewhere: so a pool takes nothing from what a plan promises.
 *
 *   full ──worker: encode, pager_pool_put──► in the pool: free at once       (no room: packed ──► disk, as without one)
 *   free ──pager_buffer_read──► read ──worker: pager_pool_get, decode──► verified
 *
 * Which chunks stand there is decided anew each time one is full: as many as will fit, by what chunks came to lately,
 * evenly spread over all, so that disks and codec work side by side at any moment of a step. What does not shrink is
 * passed over. The pool is cut into blocks, and a chunk's are linked in a list, so nothing has to be moved to make
 * room. Blocks are given back when the chunk is written anew: what was read may be read again.
 *
 * Regions that checkpoints share stay on disk. Of a simulation no bytes are there: a chunk comes to POOL_SHARE of its
 * pages, and the codec takes its turns on the clock.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#include <string.h>

#define POOL_SHARE 0.87   /* of a chunk's bytes, until chunks were seen: states of exact AdamW, trained for a while */
#define POOL_WEIGHT 0.02  /* of the last chunk, in what is known */
#define POOL_FILLED 0.995 /* of its blocks, to be aimed at */
#define PLAIN_SHARE 0.97  /* a chunk that comes to more gains nothing here */
#define CREDIT_MAX 5.0
#define CREDIT_SPARE                                                                              \
  4.0 /* with so much the pool is not filled by what shrinks, so what does not may stand here too \
       */
#define NS 1e9

static uint32_t *head_of(const flap_pager *pager, const pager_buffer *buffer) {
  return &pager->pool.heads[pager->regions[buffer->region].first_page + buffer->first_page];
}

static double smaller(double a, double b) {
  return a < b ? a : b;
}

static uint64_t chunk_bytes(const flap_pager *pager, const pager_buffer *buffer) {
  return pager_chunk_bytes(pager, &pager->regions[buffer->region], buffer->first_page, buffer->page_count);
}

static uint32_t blocks_of(uint64_t bytes) {
  return (uint32_t)((bytes + FLAP_PAGER_POOL_BLOCK - 1) / FLAP_PAGER_POOL_BLOCK);
}

double flap_pager_pooled_share(uint64_t pool_bytes, uint64_t disk_bytes) {
  const double wanted = POOL_SHARE * (double)disk_bytes, room = POOL_FILLED * (double)pool_bytes;
  return room < wanted ? room / wanted : pool_bytes > 0 ? 1 : 0;
}

void pager_pool_init(flap_pager *pager) {
  pager_pool *pool = &pager->pool;
  pool->share = POOL_SHARE;
  pool->free_count = pool->block_count;
  pool->free_head = pool->block_count > 0 ? 0 : PAGER_NONE;
  for (uint32_t i = 0; i < pool->block_count; i++)
    pool->next[i] = i + 1 < pool->block_count ? i + 1 : PAGER_NONE;
  for (uint32_t i = 0; pool->block_count > 0 && i < pager->page_count; i++)
    pool->heads[i] = PAGER_NONE;
  for (uint32_t i = 0; i < pager->region_count; i++) {
    const pager_region *region = &pager->regions[i];
    if (region->ring != FLAP_PAGER_RESIDENT && !region->shared && region->element_bytes > 0)
      pool->eligible_bytes += pager_disk_bytes(pager->page_bytes, region->bytes, region->ram_pages);
  }
}

bool pager_pool_has(const flap_pager *pager, const pager_buffer *buffer) {
  return pager->pool.block_count > 0 && *head_of(pager, buffer) != PAGER_NONE;
}

bool pager_pool_wants(flap_pager *pager, const pager_buffer *buffer) {
  pager_pool *pool = &pager->pool;
  const pager_region *region = &pager->regions[buffer->region];
  if (pool->block_count == 0 || region->shared || region->element_bytes == 0)
    return false;
  const double wanted = pool->share * (double)pool->eligible_bytes;
  const double room = POOL_FILLED * (double)pool->block_count * FLAP_PAGER_POOL_BLOCK;
  pool->credit = smaller(pool->credit + (room < wanted ? room / wanted : 1), CREDIT_MAX);
  if (pool->credit < 1)
    return false;
  pool->credit -= 1;
  return true;
}

/* ---- blocks, with work_lock --------------------------------------------------------------------------------- */

static void give_back(pager_pool *pool, uint32_t *head) {
  uint32_t count = 0, last = PAGER_NONE;
  for (uint32_t block = *head; block != PAGER_NONE; block = pool->next[block], count++)
    last = block;
  if (last == PAGER_NONE)
    return;
  pool->next[last] = pool->free_head;
  pool->free_head = *head;
  pool->free_count += count;
  *head = PAGER_NONE;
}

static bool take(pager_pool *pool, uint32_t count, uint32_t *head_out) {
  if (count > pool->free_count)
    return false;
  *head_out = pool->free_head;
  uint32_t last = PAGER_NONE;
  for (uint32_t i = 0; i < count; i++) {
    last = pool->free_head;
    pool->free_head = pool->next[last];
  }
  pool->next[last] = PAGER_NONE;
  pool->free_count -= count;
  return true;
}

/* ---- bytes, without any lock ------------------------------------------------------------------------------- */

/* One after another, block by block; `in`: into the pool. */
static void move_bytes(const pager_pool *pool, uint32_t head, unsigned char *memory, uint64_t bytes, bool in) {
  uint32_t block = head;
  for (uint64_t at = 0; at < bytes; at += FLAP_PAGER_POOL_BLOCK, block = pool->next[block]) {
    flap_assert(block < pool->block_count);
    unsigned char *there = pool->memory + block * FLAP_PAGER_POOL_BLOCK;
    const uint64_t count = bytes - at < FLAP_PAGER_POOL_BLOCK ? bytes - at : FLAP_PAGER_POOL_BLOCK;
    in ? memcpy(there, memory + at, count) : memcpy(memory + at, there, count);
  }
}

static uint64_t stored_bytes(const flap_pager *pager, const pager_buffer *buffer) {
  const pager_page *page = pager_pages_of(pager, &pager->regions[buffer->region]) + buffer->first_page;
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < buffer->page_count; i++)
    bytes += page[i].stored_bytes;
  return bytes;
}

void pager_pool_put(flap_pager *pager, pager_buffer *buffer) {
  pager_pool *pool = &pager->pool;
  if (pool->block_count == 0)
    return;
  const uint64_t all = chunk_bytes(pager, buffer);
  const uint64_t bytes = pager->has_bytes ? stored_bytes(pager, buffer) : (uint64_t)(POOL_SHARE * (double)all);
  const uint32_t count = blocks_of(bytes);
  uint32_t head = PAGER_NONE;
  pthread_mutex_lock(&pager->work_lock);
  give_back(pool, head_of(pager, buffer));
  if (buffer->pooled && (double)bytes > PLAIN_SHARE * (double)all && pool->credit < CREDIT_SPARE) {
    buffer->pooled = false;
    pool->credit += 1; /* for the next one */
  }
  if (buffer->pooled)
    pool->share += POOL_WEIGHT * ((double)count * FLAP_PAGER_POOL_BLOCK / (double)all - pool->share);
  buffer->pooled = buffer->pooled && take(pool, count, &head);
  pthread_mutex_unlock(&pager->work_lock);
  if (buffer->pooled && pager->has_bytes)
    move_bytes(pool, head, buffer->memory, bytes, true);
  *head_of(pager, buffer) = head;
}

void pager_pool_get(const flap_pager *pager, const pager_buffer *buffer) {
  move_bytes(&pager->pool, *head_of(pager, buffer), buffer->memory, stored_bytes(pager, buffer), false);
}

/* ---- with the pager's lock --------------------------------------------------------------------------------- */

void pager_pool_moved(flap_pager *pager, const pager_buffer *buffer, flap_lane lane) {
  if (buffer->at_rest || buffer->again)
    return;
  pager->stats.bytes[lane] += chunk_bytes(pager, buffer);
  pager->stats.pool_bytes[lane == FLAP_LANE_DISK_READ ? 0 : 1] += chunk_bytes(pager, buffer);
}

static void coded(void *context) {
  flap_pager *pager = context;
  pthread_mutex_lock(&pager->lock);
  pager->coding_count--;
  pager_heap_add(pager, &pager->checks, pager_queue_take(pager, &pager->coding));
  pager_pump(pager);
  pthread_mutex_unlock(&pager->lock);
}

bool pager_pool_simulate(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  const bool read = index < pager->read_buffers;
  if (pager->has_bytes || pager->pool.block_count == 0)
    return false;
  if (!read)
    buffer->pooled = pager_pool_wants(pager, buffer);
  const double rate = read ? pager->decode_bytes : pager->encode_bytes;
  if (!buffer->pooled || rate <= 0)
    return false;
  const uint64_t now_ns = pager_now_ns(pager);
  if (pager->coding_until_ns < now_ns)
    pager->coding_until_ns = now_ns;
  pager->coding_until_ns += (uint64_t)((double)chunk_bytes(pager, buffer) / rate * NS);
  pager->coding_count++;
  pager_queue_append(pager, &pager->coding, index);
  flap_clock_schedule(pager->clock, pager->coding_until_ns, coded, pager);
  return true;
}
