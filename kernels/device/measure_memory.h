/* What memory can do: the host's, by its threads, and the copies between host and device.
 *
 * Role: measures, and knows neither tables nor machines; `flap bench` prints what comes of it. Threading: any thread;
 * blocks for about as long as the effort says, per rate.
 */
#ifndef FLAP_KERNELS_DEVICE_MEASURE_MEMORY_H
#define FLAP_KERNELS_DEVICE_MEASURE_MEMORY_H

#include "base/pool.h"
#include "base/rate.h"
#include "kernels/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- the host -------------------------------------------------------------------------------------------- */

typedef enum flap_memory_pattern {
  FLAP_MEMORY_READ,   /* every byte loaded: bytes read */
  FLAP_MEMORY_WRITE,  /* memset: bytes written. That a cache reads a line before it is written is not counted */
  FLAP_MEMORY_MODIFY, /* loaded, changed, stored where it was, as an optimizer does: bytes read and written */
  FLAP_MEMORY_COPY,   /* memcpy: bytes read and written */
  FLAP_MEMORY_PATTERNS
} flap_memory_pattern;

/* Bytes per second of all threads of the pool over `bytes` of memory (a multiple of 2 MiB; beyond the caches if it is
 * to be memory's rate), pieces of 1 MiB at a time: of the patterns whose bits are in `wanted`, the others are all 0.
 * rates_out[FLAP_MEMORY_PATTERNS]. Takes `bytes` of memory, gives them back. FLAP_NO_MEMORY. */
#define FLAP_MEMORY_ALL ((1u << FLAP_MEMORY_PATTERNS) - 1)
FLAP_CHECKED flap_status flap_measure_host_memory(flap_pool *pool, uint64_t bytes, uint32_t wanted,
                                                  const flap_rate_effort *effort, flap_rate *rates_out);

/* Of this host's last cache; 0 where it is not known. */
uint64_t flap_measure_cache_bytes(void);
/* A size beyond the caches of this host: four times its last cache, 64 MiB to 1 GiB. */
uint64_t flap_measure_host_bytes(void);

/* ---- host and device ------------------------------------------------------------------------------------- */

typedef struct flap_copies_meter flap_copies_meter;

typedef enum flap_copies_way { FLAP_COPIES_H2D, FLAP_COPIES_D2H, FLAP_COPIES_BOTH } flap_copies_way;

/* Opens a device of the kind, with a budget of `vram_bytes`, and takes host memory for copies of up to `bytes_max`
 * (a multiple of 2 MiB): pageable memory of twice that, a half for each direction, and three areas of `pin_bytes` (at
 * least as much) that are pinned one after the other. *pin_out is the bytes pinned per second, of memory that nobody
 * had touched: its pages are found and zeroed meanwhile, as in a run; several threads share in what is larger than 512
 * MiB (on the cpu device nothing is pinned, and it means nothing). Each direction has bytes_max of the arena.
 * FLAP_NO_MEMORY, also where the arena is too small; FLAP_DEVICE, FLAP_UNSUPPORTED. */
FLAP_CHECKED flap_status flap_copies_meter_open(flap_device_kind kind, uint64_t vram_bytes, uint64_t bytes_max,
                                                uint64_t pin_bytes, flap_copies_meter **meter_out, flap_rate *pin_out);
/* For people; lives as long as the meter. */
const char *flap_copies_meter_describe(const flap_copies_meter *meter);
/* Bytes per second of copies of `bytes` each (1 to bytes_max), one launched after another without waiting in between;
 * both ways at once are launched by a thread each, and what is counted is the sum. */
FLAP_CHECKED flap_status flap_copies_measure(flap_copies_meter *meter, flap_copies_way way, bool pinned, uint64_t bytes,
                                             const flap_rate_effort *effort, flap_rate *rate_out);
/* Closes the device, then gives the memory back. NULL is fine. */
void flap_copies_meter_close(flap_copies_meter *meter);

#ifdef __cplusplus
}
#endif
#endif
