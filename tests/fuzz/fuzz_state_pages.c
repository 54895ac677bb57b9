/* optimizer-pages.table of a checkpoint, and the files of pages beside it, which are opened, verified and read.
 *
 * An input is a byte of flags, the table's length in two bytes, the table without its last sum, and what
 * optimizer-pages-2.bin begins with. No input would find a checksum: they are put right, as far as the flags say.
 */
#include "engine/store/state_pages_table.h"
#include "io/block/checksum.h"
#include "io/block/codec.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KNOWN_FILES 3u /* that are there */
#define FILE_BYTES ((size_t)64 << 10)
#define PAGE_BYTES 16384u
#define SCRATCH_BYTES (256u << 10) /* what a codec wants beside a page, and more */
#define READ_VALUES 64u
#define SIZES_ARE_RIGHT 1u
#define PAGES_ARE_RIGHT 2u
#define SUM_IS_WRONG 4u

static unsigned char files[KNOWN_FILES][FILE_BYTES];

static void write_file(uint32_t file) {
  char name[sizeof "in/" FLAP_STATE_PAGES_FILE + 10];
  (void)snprintf(name, sizeof name, "in/" FLAP_STATE_PAGES_FILE, file);
  fuzz_write(name, files[file], FILE_BYTES);
}

/* File 0 is of numbers; file 1 begins with pages that are encoded. */
static void start(void) {
  static _Alignas(16) unsigned char page[PAGE_BYTES], scratch[PAGE_BYTES + SCRATCH_BYTES];
  fuzz_folder("in");
  for (size_t i = 0; i < FILE_BYTES; i++)
    files[0][i] = files[1][i] = (unsigned char)(i * 2654435761u >> 24);
  for (uint32_t i = 0, at = 0; i < 2; i++) {
    for (size_t b = 0; b < PAGE_BYTES; b++)
      page[b] = (unsigned char)(b % 4 == 0 ? b * (i + 1) >> 4 : 7);
    fuzz_must(flap_block_codec_scratch(PAGE_BYTES) <= sizeof scratch, "there is scratch memory");
    const uint32_t stored =
        flap_block_encode(i == 0 ? FLAP_CODEC_LZ4 : FLAP_CODEC_ZSTD, page, PAGE_BYTES, 4, files[1] + at, scratch);
    fuzz_must(stored < PAGE_BYTES, "such a page shrinks");
    at += stored;
  }
  write_file(0);
  write_file(1);
}

static void put_sizes(unsigned char *table, size_t bytes) {
  if (bytes < sizeof(flap_state_pages_header))
    return;
  flap_state_pages_header *header = (flap_state_pages_header *)(void *)table;
  for (uint32_t i = 0; i < FLAP_STATE_PAGES_FILES; i++)
    header->file_bytes[i] = i < KNOWN_FILES ? FILE_BYTES : 0;
}

static void put_checksum(flap_state_pages_row *row, uint32_t region, uint32_t page) {
  if (row->file < KNOWN_FILES && row->place <= FILE_BYTES && row->stored_bytes <= FILE_BYTES - row->place)
    row->checksum = flap_block_checksum(files[row->file] + row->place, row->stored_bytes, region, page, row->epoch);
}

/* Of all pages that there may be, if the rest is possible. */
static void put_checksums(unsigned char *table, size_t bytes) {
  const flap_state_pages_header *header = (const flap_state_pages_header *)(const void *)table;
  if (bytes < sizeof *header || header->page_bytes == 0 || header->dtype > FLAP_F16 ||
      header->optim > FLAP_OPTIM_ADAMW_8BIT || header->slice_count > (bytes - sizeof *header) / 24)
    return;
  const flap_state_pages_slice *slices = (const flap_state_pages_slice *)(const void *)(header + 1);
  flap_state_pages_row *row = (flap_state_pages_row *)(void *)(table + sizeof *header + header->slice_count * 24);
  for (uint32_t i = 0; i < header->slice_count; i++) {
    if (slices[i].elements % FLAP_OPS_BLOCK != 0 || slices[i].elements > (uint64_t)1 << 30)
      return;
    const flap_state_format format =
        flap_layout_state_format((flap_dtype)header->dtype, (flap_optim)header->optim,
                                 slices[i].part == 0 ? FLAP_PART_EMBEDDING : FLAP_PART_LAYER);
    const uint64_t pages =
        flap_state_pages_in(flap_state_pages_region_bytes(&format, slices[i].elements), header->page_bytes);
    for (uint64_t page = 0; page < pages; page++, row++) {
      if ((unsigned char *)(row + 1) > table + bytes)
        return;
      put_checksum(row, slices[i].region, (uint32_t)page);
    }
  }
}

static void write_table(const uint8_t *data, size_t bytes, unsigned flags) {
  const size_t whole = (bytes + 7) / 8 * 8;
  unsigned char *table = calloc(1, whole + sizeof(uint64_t));
  flap_checksum *sum = NULL;
  fuzz_must(table != NULL && flap_checksum_open(&sum) == FLAP_OK, "there is memory for a table");
  if (bytes > 0)
    memcpy(table, data, bytes);
  if (flags & SIZES_ARE_RIGHT)
    put_sizes(table, whole);
  if (flags & PAGES_ARE_RIGHT)
    put_checksums(table, whole);
  flap_checksum_add(sum, table, whole);
  const uint64_t value = flap_checksum_value(sum) + (flags & SUM_IS_WRONG ? 1 : 0);
  memcpy(table + whole, &value, sizeof value);
  fuzz_write("in/" FLAP_STATE_PAGES_TABLE, table, whole + sizeof value);
  flap_checksum_close(sum);
  free(table);
}

static uint64_t elements_of(const uint8_t *table, uint32_t part) {
  const flap_state_pages_header *header = (const flap_state_pages_header *)(const void *)table;
  const flap_state_pages_slice *slices = (const flap_state_pages_slice *)(const void *)(header + 1);
  uint64_t elements = 0;
  for (uint32_t i = 0; i < header->slice_count; i++)
    elements += slices[i].part == part ? slices[i].elements : 0;
  return elements;
}

/* The first values of each section of each part, and the last ones. */
static void read_some(flap_state_pages *pages, const uint8_t *table) {
  unsigned char values[READ_VALUES * sizeof(float)];
  for (uint32_t part = 0; part < flap_state_pages_parts(pages); part++) {
    const flap_state_format format =
        flap_layout_state_format(flap_state_pages_dtype(pages), flap_state_pages_optim(pages),
                                 part == 0 ? FLAP_PART_EMBEDDING : FLAP_PART_LAYER);
    for (int section = 0; section < FLAP_STATE_SECTION_COUNT; section++) {
      if (format.sections[section].value_bytes == 0)
        continue;
      const uint64_t all = elements_of(table, part) / format.sections[section].value_elements;
      const uint64_t count = all < READ_VALUES ? all : READ_VALUES;
      for (int end = 0; end < 2; end++) {
        const flap_status status =
            flap_state_pages_read(pages, part, (flap_state_section)section, end ? all - count : 0, count, values);
        if (status != FLAP_OK)
          fuzz_refused(status, "in/optimizer-pages-");
      }
    }
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static bool ready;
  flap_state_pages *pages = NULL;
  if (!ready)
    start();
  ready = true;
  if (bytes < 3)
    return 0;
  const size_t named = (size_t)(data[1] | data[2] << 8), length = named < bytes - 3 ? named : bytes - 3;
  const size_t rest = bytes - 3 - length < FILE_BYTES ? bytes - 3 - length : FILE_BYTES;
  memset(files[2], 0, FILE_BYTES);
  memcpy(files[2], data + 3 + length, rest);
  write_file(2);
  write_table(data + 3, length, data[0]);
  const flap_status status = flap_state_pages_open(fuzz_path("in"), &pages);
  if (status != FLAP_OK) {
    fuzz_refused(status, "in/optimizer-pages");
    return 0;
  }
  unsigned char *table = malloc(length); /* aligned */
  fuzz_must(table != NULL && length >= sizeof(flap_state_pages_header), "what is opened has a header");
  memcpy(table, data + 3, length);
  read_some(pages, table);
  free(table);
  flap_state_pages_close(pages);
  const flap_status verified = flap_state_pages_verify(fuzz_path("in"), false);
  if (verified != FLAP_OK)
    fuzz_refused(verified, "in/optimizer-pages-");
  return 0;
}
