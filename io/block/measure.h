/* What a disk can do through io/block: the rates that plans are made with, and those by size and depth of requests that
 * `flap bench disk` prints.
 *
 * Threading: any thread, a probe one at a time; everything here blocks until its bytes have moved.
 */
#ifndef FLAP_IO_BLOCK_MEASURE_H
#define FLAP_IO_BLOCK_MEASURE_H

#include "base/rate.h"
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
 * and read once each, and then read in its first half while its second is written, request by request. Each of these
 * four passes ends after a quarter of `seconds` (0: when all has been moved), and they go over what the first has
 * written by then. Takes about 5/4 x depth x request_bytes of memory. Where the file system does not do O_DIRECT these
 * are the rates of the page cache, and a warning says so. */
FLAP_CHECKED flap_status flap_block_measure_rates(const char *path, uint64_t bytes, uint32_t request_bytes,
                                                  uint32_t depth, double seconds, flap_block_backend backend,
                                                  flap_block_rates *rates_out);

/* ---- probes ---------------------------------------------------------------------------------------------- */

/* A probe is an extent on each of one or several disks, written once, on which requests of any size and number are then
 * measured. */
typedef struct flap_block_probe flap_block_probe;

#define FLAP_BLOCK_PROBE_DEPTH_MAX 64u

typedef enum flap_block_mix {
  FLAP_BLOCK_MIX_READ,
  FLAP_BLOCK_MIX_WRITE,
  FLAP_BLOCK_MIX_BOTH /* reads of an extent's first half and writes of its second, as many of each */
} flap_block_mix;

typedef struct flap_block_probe_config {
  flap_block_backend backend;
  uint32_t disk_count;
  const char *paths[FLAP_BLOCK_DISKS_MAX]; /* folders */
  uint64_t bytes;                          /* of the extent on each disk: a multiple of 4 MiB, at least 8 MiB */
  uint32_t depth_max;                      /* most requests in flight on a disk, up to FLAP_BLOCK_PROBE_DEPTH_MAX */
  uint64_t flight_bytes;                   /* and most bytes, at least 4 MiB; as much memory is taken for each disk */
} flap_block_probe_config;

/* FLAP_INVALID for a folder in memory (tmpfs): what would be measured is no drive. Other errors as in
 * flap_block_space. */
FLAP_CHECKED flap_status flap_block_probe_check(const char *path);
/* Makes the extents and writes them, which takes as long as it takes to write `bytes` to each disk. Every
 * path is checked; other errors as in flap_block_open. Where the file system does not do O_DIRECT, a warning says that
 * the page cache is measured. */
FLAP_CHECKED flap_status flap_block_probe_open(const flap_block_probe_config *config, flap_block_probe **probe_out);
/* As flap_block_describe. */
const char *flap_block_probe_describe(const flap_block_probe *probe);
/* Bytes per second, of all disks together, with exactly `depth` requests of `request_bytes` in flight on each disk;
 * each of them walks forward through its extent. FLAP_INVALID where depth x request_bytes is more than flight_bytes or
 * than half an extent. */
FLAP_CHECKED flap_status flap_block_probe_measure(flap_block_probe *probe, flap_block_mix mix, uint32_t request_bytes,
                                                  uint32_t depth, const flap_rate_effort *effort, flap_rate *rate_out);
/* Gives the space back. NULL is fine. */
void flap_block_probe_close(flap_block_probe *probe);

#ifdef __cplusplus
}
#endif
#endif
