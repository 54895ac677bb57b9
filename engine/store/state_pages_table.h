/* Shared by state_pages.c and state_pages_read.c: the rows of the table, as they stand in the file. */
#ifndef FLAP_ENGINE_STORE_STATE_PAGES_TABLE_H
#define FLAP_ENGINE_STORE_STATE_PAGES_TABLE_H

#include "engine/store/state_pages.h"
#include "io/formats/durable.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_STATE_PAGES_MAGIC "FLAPPAGE" /* 8 bytes, without a NUL */
#define FLAP_STATE_PAGES_VERSION 2u       /* of version 1 no page is encoded by zstd */

typedef struct flap_state_pages_header {
  char magic[8];
  uint32_t version;
  uint32_t dtype; /* of the weights: 0 float32, 1 bfloat16, 2 float16 */
  uint32_t optim; /* 0 adamw, 1 adamw_8bit */
  uint32_t page_bytes;
  uint32_t part_count; /* embedding, layers in order, head */
  uint32_t slice_count;
  uint64_t page_count;
  uint64_t file_bytes[FLAP_STATE_PAGES_FILES]; /* 0: there is no such file */
} flap_state_pages_header;

/* How many pages it has follows from its elements: its states, rounded up to whole FLAP_BLOCK_ALIGN, are a region. */
typedef struct flap_state_pages_slice {
  uint32_t part, region;
  uint64_t first_element, elements;
} flap_state_pages_slice;

typedef struct flap_state_pages_row {
  uint64_t checksum, place;
  uint32_t stored_bytes, epoch;
  uint32_t file, zero;
} flap_state_pages_row;

#define FLAP_STATE_PAGES_SUM_BYTES sizeof(uint64_t)

/* The bytes of the region, and how many pages of a table that is. */
uint64_t flap_state_pages_region_bytes(const flap_state_format *format, uint64_t elements);
uint64_t flap_state_pages_in(uint64_t region_bytes, uint64_t page_bytes);
uint64_t flap_state_pages_table_bytes(uint64_t slices, uint64_t pages);
FLAP_CHECKED flap_status flap_state_pages_file(const char *folder, uint32_t file, char path_out[FLAP_DURABLE_PATH_MAX]);

#ifdef __cplusplus
}
#endif
#endif
