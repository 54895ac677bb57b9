/* What a disk can do through io/block: the rates that plans are made with and that `flap bench disk` prints.
 *
 * Threading: any thread; blocks for as long as it takes to move `bytes` four times.
 */
#ifndef FLAP_IO_BLOCK_MEASURE_H
#define FLAP_IO_BLOCK_MEASURE_H

#include "io/block/block.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_block_rates {
  double read_bytes, write_bytes; /* per second, alone */
  double both_bytes;              /* per second, read and written together, half of the bytes each */
} flap_block_rates;

/* Bytes per second of sequential requests of `request_bytes`, `depth` in flight (0: the default), over an extent of
 * `bytes` (a multiple of request_bytes) in the folder `path`. The extent is written once before anything is timed,
 * because space that was only reserved reads and writes at other rates than space that holds data; then it is written
 * and read once each, and then read in its first half while its second is written, request by request. Takes about 5/4
 * x depth x request_bytes of memory. Where the file system does not do O_DIRECT these are the rates of the page cache,
 * and a warning says so. */
FLAP_CHECKED flap_status flap_block_measure_rates(const char *path, uint64_t bytes, uint32_t request_bytes,
                                                  uint32_t depth, flap_block_backend backend,
                                                  flap_block_rates *rates_out);

#ifdef __cplusplus
}
#endif
#endif
