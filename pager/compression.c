/* Pages on disk, made shorter where that saves time.
 *
 * A chunk's pages are packed: each stands on disk right behind the one before, at the place of the chunk, which has
 * room for all of them as they are. So a chunk stays one request, only a shorter one, and space is known before the
 * run. A page that is shorter on disk than in its region is an encoded one.
 *
 * Whether pages of a class are encoded is asked buffer by buffer. `lz4` and `zstd` say yes. `auto` says yes when it
 * pays, by what it measured of this class and what is known of the disks: now and then it encodes a page only to see
 * how far it shrinks and how long that takes. It begins where leases do wait for disks, or where a pool has
 * shown how far the class shrinks, and ends when it no longer does. Packing and unpacking happen in the buffer, from
 * the front and from the back, with a page of memory beside per worker.
 */
#include "pager/pager_internal.h"

#include "io/block/checksum.h"

#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define LOOK_EVERY 32u  /* buffers of a class from one look to the next */
#define WEIGHT 0.25     /* of what was seen last, in what is known */
#define GAIN_LEAST 0.95 /* at most this of the time is left, for it to pay */
#define WAIT_SHARE 0.05 /* of the time leases wait for disks, for it to begin */
#define WAIT_WINDOW_NS (50u * 1000 * 1000)
#define DECODE_SHARE 0.25 /* of what encoding takes, as long as nothing was decoded */

bool pager_compresses(const flap_pager_config *config) {
  if (config->compression == FLAP_COMPRESSION_OFF || config->page_bytes <= FLAP_BLOCK_ALIGN)
    return false;
  return config->compression != FLAP_COMPRESSION_AUTO || config->pool_bytes > 0 ||
         (config->transfer_bytes > pager_small_bytes && config->disk_rates.alone_bytes > 0 &&
          config->disk_rates.other_alone_bytes > 0);
}

uint64_t flap_pager_worker_bytes(const flap_pager_config *config) {
  return pager_compresses(config) ? config->page_bytes + flap_block_codec_scratch(config->page_bytes) : 0;
}

/* ---- whether it pays -------------------------------------------------------------------------------------- */

/* For a byte that is read once and written once. */
static double disk_seconds_of(const flap_duplex *rates) {
  const double longer =
      1 / (rates->alone_bytes < rates->other_alone_bytes ? rates->alone_bytes : rates->other_alone_bytes);
  const double both = flap_duplex_least_seconds(1, 1, rates);
  return both > longer ? both : longer;
}

/* Where compute wants the same cores the codec's time comes on top; elsewhere it passes beside. */
bool flap_pager_encoding_pays(const flap_duplex *disks, double share, double codec_seconds, bool shared_cores) {
  const double disk_seconds = disk_seconds_of(disks), shorter = share * disk_seconds;
  const double longer = codec_seconds > shorter ? codec_seconds : shorter;
  return (shared_cores ? shorter + codec_seconds : longer) < GAIN_LEAST * disk_seconds;
}

static bool pays(const flap_pager *pager, const pager_class *klass) {
  const double decode_ns = klass->decode_ns > 0 ? klass->decode_ns : DECODE_SHARE * klass->encode_ns;
  const double codec_ns = (klass->encode_ns + decode_ns) / (pager->worker_count > 0 ? pager->worker_count : 1);
  return flap_pager_encoding_pays(&pager->disk_rates, klass->share, 1e-9 * codec_ns, pager->shared_cores);
}

bool pager_shrinks_on_disk(const flap_pager *pager, const pager_buffer *buffer) {
  return pager->disk_share < 1 && pager->regions[buffer->region].element_bytes > 1;
}

static void blend(double *known, double seen) {
  *known = *known > 0 ? *known + WEIGHT * (seen - *known) : seen;
}

void pager_compression_watch(flap_pager *pager) {
  const uint64_t now_ns = pager_now_ns(pager), span_ns = now_ns - pager->watched_ns;
  if (!pager->compresses || span_ns < WAIT_WINDOW_NS)
    return;
  const uint64_t stall_ns = pager->stats.stall_ns[FLAP_LANE_DISK_READ] + pager->stats.stall_ns[FLAP_LANE_DISK_WRITE];
  atomic_store(&pager->disks_are_waited_for,
               (double)(stall_ns - pager->watched_stall_ns) > WAIT_SHARE * (double)span_ns);
  pager->watched_ns = now_ns;
  pager->watched_stall_ns = stall_ns;
}

pager_packing pager_compression_choose(flap_pager *pager, const pager_buffer *buffer) {
  const pager_region *region = &pager->regions[buffer->region];
  if (!pager->compresses || region->element_bytes == 0)
    return PACKING_PLAIN;
  pager_class *klass = &pager->classes[region->klass];
  if (pager->always_compresses || klass->on)
    return PACKING_ENCODED;
  return klass->plain_count++ % LOOK_EVERY == 0 && atomic_load(&pager->disks_are_waited_for) ? PACKING_LOOK
                                                                                             : PACKING_PLAIN;
}

void pager_compression_learn(flap_pager *pager, const pager_buffer *buffer, const pager_packed *packed) {
  pager_class *klass = &pager->classes[pager->regions[buffer->region].klass];
  if (packed->decoded_bytes > 0)
    blend(&klass->decode_ns, packed->decode_ns / (double)packed->decoded_bytes);
  if (packed->tried_bytes == 0)
    return;
  blend(&klass->share, (double)packed->made_bytes / (double)packed->tried_bytes);
  blend(&klass->encode_ns, packed->encode_ns / (double)packed->tried_bytes);
  klass->on = !pager->always_compresses && pays(pager, klass);
}

/* ---- packing and unpacking, without any lock -------------------------------------------------------------- */

/* Of this thread alone: waiting for a core is not the codec's. */
static double thread_ns(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

uint32_t pager_encode(const flap_pager *pager, const pager_buffer *buffer, flap_codec codec, const unsigned char *from,
                      uint32_t bytes, const pager_scratch *scratch, pager_packed *packed) {
  const uint32_t element_bytes = pager->regions[buffer->region].element_bytes;
  const double started_ns = thread_ns();
  const uint32_t made = flap_block_encode(codec, from, bytes, element_bytes, scratch->page, scratch->codec);
  packed->encode_ns += thread_ns() - started_ns;
  packed->tried_bytes += bytes;
  packed->made_bytes += made;
  return made;
}

bool pager_decode(const pager_scratch *scratch, uint32_t stored_bytes, unsigned char *to, uint32_t bytes,
                  pager_packed *packed) {
  const double started_ns = thread_ns();
  if (!flap_block_decode(scratch->page, stored_bytes, to, bytes, scratch->codec))
    return false;
  packed->decode_ns += thread_ns() - started_ns;
  packed->decoded_bytes += bytes;
  return true;
}

/* Each page moves towards the front of the buffer, and never onto one that is still to be packed. The epoch counts
 * writings, so the checksum of an older writing of the same page does not match. */
void pager_pack(flap_pager *pager, const pager_buffer *buffer, pager_packing packing, const pager_scratch *scratch,
                pager_packed *packed_out) {
  const pager_region *region = &pager->regions[buffer->region];
  pager_page *page = pager_pages_of(pager, region) + buffer->first_page;
  uint32_t at = 0;
  *packed_out = (pager_packed){.tried_bytes = 0};
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    unsigned char *from = buffer->memory + i * pager->page_bytes, *to = buffer->memory + at;
    const uint32_t bytes = (uint32_t)pager_chunk_bytes(pager, region, buffer->first_page + i, 1);
    uint32_t stored = bytes;
    if (packing == PACKING_ENCODED || (packing == PACKING_LOOK && i == 0))
      stored = pager_encode(pager, buffer, pager->codec, from, bytes, scratch, packed_out);
    if (packing != PACKING_ENCODED)
      stored = bytes;
    if (stored < bytes)
      memcpy(to, scratch->page, stored);
    else if (to != from)
      memmove(to, from, bytes);
    page[i].extent = page[0].extent + at / FLAP_BLOCK_ALIGN;
    page[i].stored_bytes = stored;
    page[i].file = region->file & PAGER_FILE_MASK;
    page[i].compared = page[i].kept_unread = false;
    page[i].epoch++;
    page[i].checksum = flap_block_checksum(to, stored, buffer->region, buffer->first_page + i, page[i].epoch);
    at += stored;
  }
}

/* The page of the buffer that is not what was written, or page_count. */
static uint32_t find_corrupt(const pager_buffer *buffer, const pager_page *page, uint32_t *end_out) {
  uint32_t at = 0;
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    if (flap_block_checksum(buffer->memory + at, page[i].stored_bytes, buffer->region, buffer->first_page + i,
                            page[i].epoch) != page[i].checksum)
      return i;
    at += page[i].stored_bytes;
  }
  *end_out = at;
  return buffer->page_count;
}

/* The last page first: each moves towards the end of the buffer, and never onto one that is still packed. */
uint32_t pager_unpack(const flap_pager *pager, const pager_buffer *buffer, const pager_scratch *scratch,
                      pager_packed *packed_out) {
  const pager_region *region = &pager->regions[buffer->region];
  const pager_page *page = pager_pages_of(pager, region) + buffer->first_page;
  uint32_t at = 0;
  *packed_out = (pager_packed){.tried_bytes = 0};
  const uint32_t corrupt = find_corrupt(buffer, page, &at);
  if (corrupt < buffer->page_count)
    return corrupt;
  for (uint32_t i = buffer->page_count; i-- > 0;) {
    unsigned char *to = buffer->memory + i * pager->page_bytes;
    const uint32_t bytes = (uint32_t)pager_chunk_bytes(pager, region, buffer->first_page + i, 1);
    at -= page[i].stored_bytes;
    if (page[i].stored_bytes == bytes) {
      if (to != buffer->memory + at)
        memmove(to, buffer->memory + at, bytes);
      continue;
    }
    memcpy(scratch->page, buffer->memory + at, page[i].stored_bytes);
    if (!pager_decode(scratch, page[i].stored_bytes, to, bytes, packed_out))
      return i;
  }
  return buffer->page_count;
}
