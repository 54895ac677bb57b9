/* The pool: RAM in which chunks of regions on disk stand encoded, instead of on the disk.
 *
 * Pages that shrink are worth more RAM than they take: a pool of P bytes spares the disks P over what a byte comes to,
 * where P bytes of homes spare them P. Their extents on disk stay theirs, for what does not shrink, or no longer, has
 * to go somewhere: so a pool takes nothing from what a plan promises.
 *
 *   full ──worker: pager_pool_pack──► in the pool: free at once       (no room: packed ──► disk, as without one)
 *   free ──pager_buffer_read──► read ──worker: pager_pool_unpack──► verified
 *
 * Which chunks stand there is decided anew each time one is full: as many as will fit, by what chunks came to lately,
 * evenly spread over all, so that disks and codec work side by side at any moment of a step. What does not shrink is
 * passed over. The pool is cut into blocks, and a chunk's are linked in a list, so nothing has to be moved to make
 * room. Blocks are given back when the chunk is written anew: what was read may be read again.
 *
 * Regions that checkpoints share stay on disk. Of a simulation no bytes are there: a chunk comes to
 * FLAP_PAGER_CODED_SHARE of its pages, and the codec takes its turns on the clock.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#include <string.h>

#define POOL_WEIGHT 0.02  /* of the last chunk, in what is known */
#define POOL_FILLED 0.995 /* of its blocks, to be aimed at */
#define PLAIN_SHARE 0.97  /* a chunk that comes to more gains nothing here */
#define CREDIT_MAX 5.0
/* With so much left the pool is not filled by what shrinks, so what does not may stand here too. */
#define CREDIT_SPARE 4.0
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
  const double wanted = FLAP_PAGER_CODED_SHARE * (double)disk_bytes, room = POOL_FILLED * (double)pool_bytes;
  return room < wanted ? room / wanted : pool_bytes > 0 ? 1 : 0;
}

void pager_pool_init(flap_pager *pager) {
  pager_pool *pool = &pager->pool;
  pool->share = FLAP_PAGER_CODED_SHARE;
  pool->free_count = pool->block_count;
  pool->free_head = pool->block_count > 0 ? 0 : PAGER_NONE;
  for (uint32_t i = 0; i < pool->block_count; i++)
    pool->next[i] = i + 1 < pool->block_count ? i + 1 : PAGER_NONE;
  for (uint32_t i = 0; pool->block_count > 0 && i < pager->page_count; i++)
    pool->heads[i] = PAGER_NONE;
  pool->eligible_bytes = 0;
  for (uint32_t i = 0; i < pager->region_count; i++) {
    pager_region *region = &pager->regions[i];
    region->poolable = region->ring != FLAP_PAGER_RESIDENT && !region->shared && region->element_bytes > 0;
    if (region->poolable)
      pool->eligible_bytes += pager_disk_bytes(pager->page_bytes, region->bytes, region->ram_pages);
  }
}

bool pager_pool_has(const flap_pager *pager, const pager_buffer *buffer) {
  return pager->pool.block_count > 0 && *head_of(pager, buffer) != PAGER_NONE;
}

bool pager_pool_wants(flap_pager *pager, const pager_buffer *buffer) {
  pager_pool *pool = &pager->pool;
  if (pool->block_count == 0 || !pager->regions[buffer->region].poolable)
    return false;
  const double wanted = pool->share * (double)pool->eligible_bytes;
  const double room = POOL_FILLED * (double)pool->block_count * FLAP_PAGER_POOL_BLOCK;
  const bool room_left = pager_pool_has(pager, buffer) || /* its own blocks come back */
                         pool->free_count >= blocks_of((uint64_t)(pool->share * (double)chunk_bytes(pager, buffer)));
  pool->credit = smaller(pool->credit + (room < wanted ? room / wanted : 1), room_left ? CREDIT_MAX : 1);
  if (pool->credit < 1 || !room_left)
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

/* What chunks come to, by whole blocks. */
static void learn(pager_pool *pool, uint64_t taken, uint64_t bytes) {
  pool->share += POOL_WEIGHT * ((double)blocks_of(taken) * (double)FLAP_PAGER_POOL_BLOCK / (double)bytes - pool->share);
}

/* ---- bytes: callers hold no lock ---------------------------------------------------------------------------- */

/* Where the next bytes of a chunk go, or come from. */
typedef struct cursor {
  uint32_t block; /* PAGER_NONE: the next one begins a block that is not taken yet */
  uint64_t at;    /* in the block */
} cursor;

/* `in`: from memory into the pool, else out of it. Blocks that follow are linked already. */
static void move_bytes(const pager_pool *pool, cursor *c, unsigned char *memory, uint64_t bytes, bool in) {
  for (uint64_t done = 0, count; done < bytes; done += count) {
    if (c->at == FLAP_PAGER_POOL_BLOCK)
      *c = (cursor){.block = pool->next[c->block]};
    flap_assert(c->block < pool->block_count);
    unsigned char *there = pool->memory + c->block * FLAP_PAGER_POOL_BLOCK + c->at;
    const uint64_t left = FLAP_PAGER_POOL_BLOCK - c->at;
    count = bytes - done < left ? bytes - done : left;
    if (in)
      memcpy(there, memory + done, count);
    else
      memcpy(memory + done, there, count);
    c->at += count;
  }
}

/* Room for so many bytes more behind the cursor, in blocks that are linked to its chunk. */
static bool extend(flap_pager *pager, uint32_t *head, cursor *c, uint64_t bytes) {
  pager_pool *pool = &pager->pool;
  const uint64_t left = *head != PAGER_NONE ? FLAP_PAGER_POOL_BLOCK - c->at : 0;
  uint32_t more = PAGER_NONE;
  if (bytes <= left)
    return true;
  pthread_mutex_lock(&pager->work_lock);
  const bool taken = take(pool, blocks_of(bytes - left), &more);
  pthread_mutex_unlock(&pager->work_lock);
  if (!taken)
    return false;
  if (*head == PAGER_NONE) {
    *head = more;
    *c = (cursor){.block = more};
  } else {
    pool->next[c->block] = more;
  }
  return true;
}

void pager_pool_forget(flap_pager *pager, const pager_buffer *buffer) {
  if (!pager_pool_has(pager, buffer))
    return;
  pthread_mutex_lock(&pager->work_lock);
  give_back(&pager->pool, head_of(pager, buffer));
  pthread_mutex_unlock(&pager->work_lock);
}

/* With the first page of a chunk it is seen how far the others shrink. */
static bool is_worth(flap_pager *pager, uint64_t stored, uint64_t bytes) {
  pager_pool *pool = &pager->pool;
  pthread_mutex_lock(&pager->work_lock);
  const bool worth = (double)stored <= PLAIN_SHARE * (double)bytes || pool->credit >= CREDIT_SPARE;
  pool->credit += worth ? 0 : 1; /* for the next one */
  pthread_mutex_unlock(&pager->work_lock);
  return worth;
}

static pager_page *pages_of(const flap_pager *pager, const pager_buffer *buffer) {
  return pager_pages_of(pager, &pager->regions[buffer->region]) + buffer->first_page;
}

static uint32_t page_bytes_of(const flap_pager *pager, const pager_buffer *buffer, uint32_t page) {
  return (uint32_t)pager_chunk_bytes(pager, &pager->regions[buffer->region], buffer->first_page + page, 1);
}

/* Each page from scratch memory right into the pool: of what is moved once more the memory's rate is what all cores
 * together are held up by. */
bool pager_pool_pack(flap_pager *pager, pager_buffer *buffer, const pager_scratch *scratch, pager_packed *packed_out) {
  pager_page *page = pages_of(pager, buffer);
  uint32_t head = PAGER_NONE;
  cursor c = {.block = PAGER_NONE};
  uint64_t taken = 0, tried = 0;
  bool worth = true, fits = true;
  *packed_out = (pager_packed){.tried_bytes = 0};
  pager_pool_forget(pager, buffer);
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    unsigned char *from = buffer->memory + i * pager->page_bytes;
    const uint32_t bytes = page_bytes_of(pager, buffer, i);
    const uint32_t stored = pager_encode(pager, buffer, FLAP_CODEC_ZSTD, from, bytes, scratch, packed_out);
    worth = i > 0 || is_worth(pager, stored, bytes);
    fits = worth && extend(pager, &head, &c, stored);
    taken += stored;
    tried += bytes;
    if (!fits)
      break;
    move_bytes(&pager->pool, &c, stored < bytes ? scratch->page : from, stored, true);
    page[i].stored_bytes = stored;
    page[i].epoch++;
    page[i].checksum = 0; /* as a page at home in RAM has none */
  }
  pthread_mutex_lock(&pager->work_lock);
  if (worth)
    learn(&pager->pool, taken, tried);
  if (!fits)
    give_back(&pager->pool, &head);
  pthread_mutex_unlock(&pager->work_lock);
  *head_of(pager, buffer) = head;
  return fits;
}

uint32_t pager_pool_unpack(const flap_pager *pager, const pager_buffer *buffer, const pager_scratch *scratch,
                           pager_packed *packed_out) {
  const pager_page *page = pages_of(pager, buffer);
  cursor c = {.block = *head_of(pager, buffer)};
  *packed_out = (pager_packed){.tried_bytes = 0};
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    unsigned char *to = buffer->memory + i * pager->page_bytes;
    const uint32_t bytes = page_bytes_of(pager, buffer, i), stored = page[i].stored_bytes;
    move_bytes(&pager->pool, &c, stored < bytes ? scratch->page : to, stored, false);
    if (stored < bytes && !pager_decode(scratch, stored, to, bytes, packed_out))
      return i;
  }
  return buffer->page_count;
}

/* ---- with the pager's lock --------------------------------------------------------------------------------- */

void pager_pool_moved(flap_pager *pager, const pager_buffer *buffer, flap_lane lane) {
  if (buffer->at_rest || buffer->again)
    return;
  pager->stats.bytes[lane] += chunk_bytes(pager, buffer);
  pager->stats.pooled_bytes[lane == FLAP_LANE_DISK_READ ? 0 : 1] += chunk_bytes(pager, buffer);
}

/* As if it shrank by what is usual. */
static bool simulate_put(flap_pager *pager, pager_buffer *buffer) {
  const uint64_t bytes = (uint64_t)(FLAP_PAGER_CODED_SHARE * (double)chunk_bytes(pager, buffer));
  cursor c = {.block = PAGER_NONE};
  pager_pool_forget(pager, buffer);
  return pager_pool_wants(pager, buffer) && extend(pager, head_of(pager, buffer), &c, bytes);
}

static void coded(void *context) {
  flap_pager *pager = context;
  pager_lock(pager);
  pager->coding_count--;
  pager_heap_add(pager, &pager->checks, pager_queue_take(pager, &pager->coding));
  pager_pump(pager);
  pager_leave(pager);
}

bool pager_codec_simulate(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  const bool read = index < pager->read_buffers;
  if (pager->has_bytes)
    return false;
  if (!read && pager->pool.block_count > 0)
    buffer->pooled = simulate_put(pager, buffer);
  const double rate = read ? pager->decode_bytes : pager->encode_bytes;
  if (!(buffer->pooled || pager_shrinks_on_disk(pager, buffer)) || rate <= 0)
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
