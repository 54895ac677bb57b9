/* The memory of the host, by the threads of a pool. */
#include "kernels/device/measure_memory.h"

#include "base/arena.h"
#include "base/assert.h"
#include "base/units.h"

#include <string.h>
#include <unistd.h>

#define PIECE_BYTES FLAP_MIB
/* Of a vector of 16 bytes, which every processor has: one word at a time, instructions would be measured. */
#define LANES 2u
#define CACHES 4u
#define BYTES_MIN (64 * FLAP_MIB)
#define BYTES_MAX FLAP_GIB

typedef uint64_t words __attribute__((vector_size(LANES * sizeof(uint64_t))));

typedef struct host_meter {
  flap_pool *pool;
  unsigned char *memory;
  uint64_t bytes;
  uint64_t sums[FLAP_POOL_THREADS_MAX]; /* so that nothing is loaded for nobody */
  flap_pool_fn piece;
  uint64_t pieces;
} host_meter;

static words *piece_of(const host_meter *meter, uint64_t item) {
  return (words *)(void *)(meter->memory + item * PIECE_BYTES);
}

static void read_piece(void *context, uint64_t item, uint32_t worker) {
  host_meter *meter = context;
  const words *from = piece_of(meter, item);
  words a = {0}, b = {0}, c = {0}, d = {0}; /* apart, so that no addition waits for the one before */
  for (uint64_t i = 0; i < PIECE_BYTES / sizeof *from; i += 4) {
    a += from[i];
    b += from[i + 1];
    c += from[i + 2];
    d += from[i + 3];
  }
  a += b + (c + d);
  for (uint32_t lane = 0; lane < LANES; lane++)
    meter->sums[worker] += a[lane];
}

static void write_piece(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  memset(piece_of(context, item), (int)(item % 255) + 1, PIECE_BYTES);
}

static void modify_piece(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  words *at = piece_of(context, item);
  for (uint64_t i = 0; i < PIECE_BYTES / sizeof *at; i += 4) {
    at[i] += 1;
    at[i + 1] += 1;
    at[i + 2] += 1;
    at[i + 3] += 1;
  }
}

/* From the second half to the first. */
static void copy_piece(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const host_meter *meter = context;
  memcpy(piece_of(meter, item), piece_of(meter, item + meter->bytes / PIECE_BYTES / 2), PIECE_BYTES);
}

static flap_status run_passes(void *context, uint64_t units) {
  host_meter *meter = context;
  for (uint64_t i = 0; i < units; i++)
    flap_pool_run(meter->pool, meter->pieces, meter->piece, meter);
  return FLAP_OK;
}

flap_status flap_measure_host_memory(flap_pool *pool, uint64_t bytes, uint32_t wanted, const flap_rate_effort *effort,
                                     flap_rate *rates_out) {
  static const struct {
    flap_pool_fn piece;
    uint32_t moves; /* times that a byte of the memory is counted */
    bool halves;
  } patterns[FLAP_MEMORY_PATTERNS] = {[FLAP_MEMORY_READ] = {read_piece, 1, false},
                                      [FLAP_MEMORY_WRITE] = {write_piece, 1, false},
                                      [FLAP_MEMORY_MODIFY] = {modify_piece, 2, false},
                                      [FLAP_MEMORY_COPY] = {copy_piece, 1, true}};
  flap_assert(bytes > 0 && bytes % (2 * PIECE_BYTES) == 0);
  memset(rates_out, 0, FLAP_MEMORY_PATTERNS * sizeof *rates_out);
  flap_arena arena;
  host_meter meter = {.pool = pool, .bytes = bytes};
  FLAP_TRY(flap_arena_open(&arena, "measuring memory", bytes));
  meter.memory = flap_arena_take(&arena, bytes, PIECE_BYTES);
  meter.piece = write_piece; /* whoever works with a page takes it, so it lies near him where that matters */
  meter.pieces = bytes / PIECE_BYTES;
  flap_status status = run_passes(&meter, 1);
  for (uint32_t i = 0; i < FLAP_MEMORY_PATTERNS && status == FLAP_OK; i++) {
    if ((wanted >> i & 1) == 0)
      continue;
    meter.piece = patterns[i].piece;
    meter.pieces = bytes / PIECE_BYTES / (patterns[i].halves ? 2 : 1);
    status = flap_rate_measure(effort, run_passes, &meter, (double)bytes * patterns[i].moves, &rates_out[i]);
  }
  flap_arena_close(&arena);
  return status;
}

uint64_t flap_measure_cache_bytes(void) {
  const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return cache > 0 ? (uint64_t)cache : 0;
}

uint64_t flap_measure_host_bytes(void) {
  const uint64_t wanted = CACHES * flap_measure_cache_bytes();
  const uint64_t bytes = wanted < BYTES_MIN ? BYTES_MIN : wanted > BYTES_MAX ? BYTES_MAX : wanted;
  return flap_units_round_up(bytes, 2 * PIECE_BYTES);
}
