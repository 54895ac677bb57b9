/* All threads at once, over memory that is in no core's cache: what they share holds them up more than what each
 * computes. As in a pool, a page passes through scratch memory of the thread's own. */
#include "engine/machine/codec_rates.h"

#include "base/philox.h"
#include "base/pool.h"
#include "base/units.h"
#include "engine/machine/host_memory.h"
#include "io/block/codec.h"

#include <stdlib.h>
#include <string.h>

#define PAGE_BYTES (4u << 20)
/* Of each thread, and as many that they are encoded to: as in states one of low halves, four of moments. */
#define PAGES 5u
#define THREAD_BYTES ((2 * PAGES + 2) * (uint64_t)PAGE_BYTES) /* pages, what they come to, scratch */
#define MEMORY_PARTS 8                                        /* of what is free, one is taken at most */
#define WORDS_BYTES 16u
#define NS 1e9

typedef struct bench {
  unsigned char *pages, *stored, *scratch; /* PAGES, PAGES, and one with what the codec needs: of each thread */
  uint64_t scratch_bytes;
  uint32_t *bytes; /* that a page came to */
} bench;

static void fill(void *context, uint64_t thread, uint32_t worker) {
  const bench *b = context;
  const flap_philox stream = flap_philox_stream(thread, "codec rates");
  unsigned char *pages = b->pages + thread * PAGES * PAGE_BYTES;
  (void)worker;
  float *const normals = (float *)(void *)(pages + PAGE_BYTES);
  flap_philox_normals(&stream, 0, PAGE_BYTES / sizeof(float), normals);
  for (uint32_t i = 0; i < PAGE_BYTES / WORDS_BYTES; i++) { /* the low halves of floats: any number */
    uint32_t words[4];
    flap_philox_block(&stream, i, words);
    memcpy(pages + i * WORDS_BYTES, words, WORDS_BYTES);
  }
  memcpy(pages + 2 * PAGE_BYTES, normals, PAGE_BYTES);
  for (uint32_t i = 0; i < PAGE_BYTES / sizeof(float); i++)
    normals[i + 2 * (PAGE_BYTES / sizeof(float))] = normals[i] * normals[i];
  memcpy(pages + 4 * PAGE_BYTES, pages + 3 * PAGE_BYTES, PAGE_BYTES);
  memset(b->stored + thread * PAGES * PAGE_BYTES, 0, PAGES * PAGE_BYTES);
  memset(b->scratch + thread * b->scratch_bytes, 0, b->scratch_bytes);
}

static void encode(void *context, uint64_t thread, uint32_t worker) {
  const bench *b = context;
  unsigned char *scratch = b->scratch + thread * b->scratch_bytes;
  (void)worker;
  for (uint64_t i = thread * PAGES; i < (thread + 1) * PAGES; i++) {
    b->bytes[i] =
        flap_block_encode(FLAP_CODEC_ZSTD, b->pages + i * PAGE_BYTES, PAGE_BYTES, 4, scratch, scratch + PAGE_BYTES);
    memcpy(b->stored + i * PAGE_BYTES, b->bytes[i] < PAGE_BYTES ? scratch : b->pages + i * PAGE_BYTES, b->bytes[i]);
  }
}

static void decode(void *context, uint64_t thread, uint32_t worker) {
  const bench *b = context;
  unsigned char *scratch = b->scratch + thread * b->scratch_bytes;
  (void)worker;
  for (uint64_t i = thread * PAGES; i < (thread + 1) * PAGES; i++) {
    memcpy(scratch, b->stored + i * PAGE_BYTES, b->bytes[i]);
    (void)flap_block_decode(scratch, b->bytes[i], b->pages + i * PAGE_BYTES, PAGE_BYTES, scratch + PAGE_BYTES);
  }
}

static double rate_of(flap_pool *pool, uint32_t threads, flap_pool_fn fn, bench *b) {
  const uint64_t started_ns = flap_units_now_ns();
  flap_pool_run(pool, threads, fn, b);
  const uint64_t took_ns = flap_units_now_ns() - started_ns;
  return took_ns > 0 ? (double)threads * PAGES * PAGE_BYTES / (double)took_ns * NS : 0;
}

double flap_codec_disk_share(const flap_machine *machine, const flap_pager_config *pager, uint32_t cores,
                             flap_optim optim) {
  const flap_duplex disk = {machine->disk_read_bytes, machine->disk_write_bytes, machine->disk_both_bytes};
  if (machine->shared_cores > 0 || !(machine->encode_bytes > 0) || !(machine->decode_bytes > 0) ||
      !(disk.alone_bytes > 0) || !(disk.other_alone_bytes > 0) || optim != FLAP_OPTIM_ADAMW ||
      flap_pager_worker_bytes(pager) == 0) /* nothing is compressed */
    return 1;
  const double workers_share = flap_codec_share(flap_codec_workers(cores, pager->pool_bytes > 0), cores);
  const double codec_seconds = (1 / machine->encode_bytes + 1 / machine->decode_bytes) / workers_share;
  const bool encodes = pager->compression == FLAP_COMPRESSION_ZSTD ||
                       (pager->compression == FLAP_COMPRESSION_AUTO &&
                        flap_pager_encoding_pays(&disk, FLAP_PAGER_CODED_SHARE, codec_seconds, false));
  return encodes ? FLAP_PAGER_CODED_SHARE : 1;
}

void flap_codec_measure(uint32_t threads, flap_machine *machine) {
  bench b = {.scratch_bytes = flap_units_round_up(PAGE_BYTES + flap_block_codec_scratch(PAGE_BYTES), 64)};
  flap_pool *pool = NULL;
  const uint64_t pages_bytes = (uint64_t)threads * PAGES * PAGE_BYTES;
  machine->encode_bytes = machine->decode_bytes = 0;
  if (threads * THREAD_BYTES > flap_host_memory_free(false) / MEMORY_PARTS)
    return;
  unsigned char *memory = malloc(2 * pages_bytes + threads * b.scratch_bytes + threads * PAGES * sizeof *b.bytes);
  if (memory != NULL && flap_pool_open(threads, &pool) == FLAP_OK) {
    b.pages = memory;
    b.stored = memory + pages_bytes;
    b.scratch = memory + 2 * pages_bytes;
    b.bytes = (uint32_t *)(void *)(b.scratch + threads * b.scratch_bytes);
    flap_pool_run(pool, threads, fill, &b);
    machine->encode_bytes = rate_of(pool, threads, encode, &b);
    machine->decode_bytes = rate_of(pool, threads, decode, &b);
  }
  flap_error_clear(); /* a pool that could not be opened: nothing is known */
  flap_pool_close(pool);
  free(memory);
}
