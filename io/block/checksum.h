/* Page checksums: XXH3-64, seeded with what the page is, so that a stale or misdirected page is caught. */
#ifndef FLAP_IO_BLOCK_CHECKSUM_H
#define FLAP_IO_BLOCK_CHECKSUM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of `bytes` at `data`, as page `page` of region `region` in its `epoch`-th writing. */
uint64_t flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);

#ifdef __cplusplus
}
#endif
#endif
