/* States kept page by page: the table is made in memory while regions are kept, and written when all of them are. */
#include "engine/store/state_pages.h"

#include "base/assert.h"
#include "base/system.h"
#include "base/units.h"
#include "engine/store/state_pages_table.h"
#include "io/block/checksum.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the table is little endian");
_Static_assert(sizeof(flap_state_pages_header) == 80, "a change of the header is another version");
_Static_assert(sizeof(flap_state_pages_slice) == 24, "a change of the slices is another version");
_Static_assert(sizeof(flap_state_pages_row) == 32, "a change of the rows is another version");
_Static_assert(FLAP_F32 == 0 && FLAP_BF16 == 1 && FLAP_F16 == 2, "types in the table have these numbers");
_Static_assert(FLAP_OPTIM_ADAMW == 0 && FLAP_OPTIM_ADAMW_8BIT == 1, "optimizers in the table have these numbers");

uint64_t flap_state_pages_region_bytes(const flap_state_format *format, uint64_t elements) {
  return flap_units_round_up(flap_layout_state_bytes(format, elements), FLAP_BLOCK_ALIGN);
}

uint64_t flap_state_pages_in(uint64_t region_bytes, uint64_t page_bytes) {
  return (region_bytes + page_bytes - 1) / page_bytes;
}

uint64_t flap_state_pages_table_bytes(uint64_t slices, uint64_t pages) {
  return sizeof(flap_state_pages_header) + slices * sizeof(flap_state_pages_slice) +
         pages * sizeof(flap_state_pages_row) + FLAP_STATE_PAGES_SUM_BYTES;
}

flap_status flap_state_pages_file(const char *folder, uint32_t file, char path_out[FLAP_DURABLE_PATH_MAX]) {
  char name[sizeof FLAP_STATE_PAGES_FILE + 10];
  (void)snprintf(name, sizeof name, FLAP_STATE_PAGES_FILE, file);
  return flap_durable_join(path_out, folder, name);
}

static uint64_t region_bytes(const flap_layout *layout, uint32_t slice) {
  return layout->regions[layout->slices[slice].states].bytes;
}

static uint64_t count_pages(const flap_layout *layout, uint64_t page_bytes) {
  uint64_t pages = 0;
  for (uint32_t i = 0; i < layout->slice_count; i++)
    pages += flap_state_pages_in(region_bytes(layout, i), page_bytes);
  return pages;
}

uint64_t flap_state_pages_bytes(const flap_layout *layout, uint64_t page_bytes) {
  uint64_t bytes = flap_state_pages_table_bytes(layout->slice_count, count_pages(layout, page_bytes));
  for (uint32_t i = 0; i < layout->slice_count; i++)
    bytes += region_bytes(layout, i);
  return bytes;
}

/* ---- saving ------------------------------------------------------------------------------------------------ */

typedef struct save_job {
  const char *folder;
  flap_file_piece piece;
  uint64_t page_bytes, table_bytes;
  unsigned char *table;
  flap_state_pages_header *header; /* in the table */
  flap_state_pages_row *rows;      /* likewise */
  /* the slice that is kept */
  uint32_t region;
  uint64_t region_bytes;
  flap_state_pages_row *first_row;
  /* pages that are copied */
  char copied_path[FLAP_DURABLE_PATH_MAX];
  flap_large_file copied;
  bool copies; /* there is such a file, and it has not ended */
  uint64_t copied_bytes, copied_announced;
} save_job;

static flap_status begin_table(const flap_layout *layout, save_job *job) {
  const uint64_t pages = count_pages(layout, job->page_bytes);
  job->table_bytes = flap_state_pages_table_bytes(layout->slice_count, pages);
  job->table = calloc(1, job->table_bytes);
  if (job->table == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for the table of %llu pages", job->folder,
                          (unsigned long long)pages);
  job->header = (flap_state_pages_header *)(void *)job->table;
  *job->header = (flap_state_pages_header){.version = FLAP_STATE_PAGES_VERSION,
                                           .dtype = (uint32_t)layout->spec.shape.dtype,
                                           .optim = (uint32_t)layout->spec.optim,
                                           .page_bytes = (uint32_t)job->page_bytes,
                                           .part_count = layout->part_count,
                                           .slice_count = layout->slice_count,
                                           .page_count = pages};
  memcpy(job->header->magic, FLAP_STATE_PAGES_MAGIC, sizeof job->header->magic);
  flap_state_pages_slice *slices = (flap_state_pages_slice *)(void *)(job->header + 1);
  for (uint32_t i = 0; i < layout->slice_count; i++) {
    const flap_layout_slice *slice = &layout->slices[i];
    slices[i] = (flap_state_pages_slice){slice->part, slice->states, slice->first_element, slice->elements};
  }
  job->rows = (flap_state_pages_row *)(void *)(slices + layout->slice_count);
  return FLAP_OK;
}

/* Each page is told of once. */
static flap_state_pages_row *take_row(const save_job *job, uint64_t offset, uint64_t *bytes_out) {
  flap_assert(offset % job->page_bytes == 0 && offset < job->region_bytes);
  flap_state_pages_row *row = &job->first_row[offset / job->page_bytes];
  const uint64_t left = job->region_bytes - offset;
  flap_assert(row->stored_bytes == 0);
  *bytes_out = left < job->page_bytes ? left : job->page_bytes;
  return row;
}

/* The file has its length from the start, so a full disk is found before its first byte. */
static flap_status begin_copied(flap_pager *pager, const flap_layout *layout, save_job *job) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < layout->slice_count; i++)
    bytes += flap_pager_copied_bytes(pager, layout->slices[i].states);
  job->copied_announced = bytes;
  if (bytes == 0)
    return FLAP_OK;
  FLAP_TRY(flap_state_pages_file(job->folder, 0, job->copied_path));
  FLAP_TRY(flap_large_file_create(&job->copied, job->copied_path, bytes, job->piece));
  job->copies = true;
  return FLAP_OK;
}

static flap_status copy_pages(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  save_job *job = context;
  flap_assert(job->copies);
  for (uint64_t done = 0, page = 0; done < bytes; done += page) {
    flap_state_pages_row *row = take_row(job, offset + done, &page);
    const unsigned char *data = (const unsigned char *)memory + done;
    flap_assert(page <= bytes - done);
    *row = (flap_state_pages_row){.checksum =
                                      flap_block_checksum(data, page, job->region, (uint32_t)(row - job->first_row), 0),
                                  .place = job->copied_bytes,
                                  .stored_bytes = (uint32_t)page};
    FLAP_TRY(flap_large_file_append(&job->copied, data, page));
    job->copied_bytes += page;
  }
  return FLAP_OK;
}

static flap_status note_extent(void *context, const flap_pager_extent *extent) {
  const save_job *job = context;
  uint64_t page = 0;
  flap_state_pages_row *row = take_row(job, extent->offset, &page);
  flap_assert(extent->bytes == page && extent->stored_bytes > 0 && extent->stored_bytes <= page);
  flap_assert(extent->file > 0 && extent->file < FLAP_STATE_PAGES_FILES);
  *row = (flap_state_pages_row){.checksum = extent->checksum,
                                .place = extent->place,
                                .stored_bytes = extent->stored_bytes,
                                .epoch = extent->epoch,
                                .file = extent->file};
  return FLAP_OK;
}

static flap_status keep_slices(flap_pager *pager, const flap_layout *layout, save_job *job) {
  job->first_row = job->rows;
  for (uint32_t i = 0; i < layout->slice_count; i++) {
    job->region = layout->slices[i].states;
    job->region_bytes = region_bytes(layout, i);
    const uint64_t pages = flap_state_pages_in(job->region_bytes, job->page_bytes);
    FLAP_TRY(flap_pager_keep(pager, job->region, copy_pages, note_extent, job));
    for (uint64_t page = 0; page < pages; page++)
      flap_assert(job->first_row[page].stored_bytes > 0);
    job->first_row += pages;
  }
  return FLAP_OK;
}

static flap_status add_size(save_job *job, uint32_t file, const char *path, flap_checksums *checksums) {
  struct stat about;
  if (flap_system_stat(path, &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", path);
  job->header->file_bytes[file] = (uint64_t)about.st_size;
  return checksums != NULL ? flap_checksums_add_pages(checksums, path, (uint64_t)about.st_size) : FLAP_OK;
}

static flap_status end_copied(save_job *job, flap_checksums *checksums) {
  if (!job->copies)
    return FLAP_OK;
  flap_assert(job->copied_bytes == job->copied_announced);
  FLAP_TRY(flap_large_file_commit(&job->copied));
  job->copies = false;
  return add_size(job, 0, job->copied_path, checksums);
}

static flap_status link_extents(flap_pager *pager, save_job *job, flap_checksums *checksums) {
  bool used[FLAP_STATE_PAGES_FILES] = {false};
  for (uint64_t i = 0; i < job->header->page_count; i++)
    used[job->rows[i].file] = true;
  for (uint32_t file = 1; file < FLAP_STATE_PAGES_FILES; file++) {
    char path[FLAP_DURABLE_PATH_MAX];
    if (!used[file])
      continue;
    FLAP_TRY(flap_state_pages_file(job->folder, file, path));
    FLAP_TRY(flap_pager_link(pager, file, path));
    FLAP_TRY(add_size(job, file, path, checksums));
  }
  return FLAP_OK;
}

static flap_status append_table(const save_job *job, const char *path) {
  flap_large_file file;
  FLAP_TRY(flap_large_file_create(&file, path, job->table_bytes, (flap_file_piece){.room = job->piece.room}));
  flap_status status = flap_large_file_append(&file, job->table, job->table_bytes);
  if (status == FLAP_OK)
    status = flap_large_file_commit(&file);
  if (status != FLAP_OK)
    flap_large_file_abort(&file);
  return status;
}

/* It ends with its own sum; that of checksums.json is of all of it. */
static flap_status write_table(const save_job *job, flap_checksums *checksums) {
  const uint64_t bytes = job->table_bytes - FLAP_STATE_PAGES_SUM_BYTES;
  char path[FLAP_DURABLE_PATH_MAX];
  flap_checksum *sum = NULL;
  FLAP_TRY(flap_durable_join(path, job->folder, FLAP_STATE_PAGES_TABLE));
  FLAP_TRY(flap_checksum_open(&sum));
  flap_checksum_add(sum, job->table, bytes);
  const uint64_t value = flap_checksum_value(sum);
  memcpy(job->table + bytes, &value, sizeof value);
  flap_checksum_add(sum, &value, sizeof value);
  flap_status status = append_table(job, path);
  if (status == FLAP_OK && checksums != NULL)
    status = flap_checksums_add(checksums, path, sum);
  flap_checksum_close(sum);
  return status;
}

flap_status flap_state_pages_save(flap_pager *pager, const flap_layout *layout, const char *folder,
                                  flap_file_piece piece, flap_checksums *checksums) {
  save_job job = {.folder = folder, .piece = piece, .page_bytes = flap_pager_page_bytes(pager)};
  flap_status status;
  flap_assert(layout->spec.mode == FLAP_MODE_TRAIN);
  FLAP_TRY_GOTO(status, begin_table(layout, &job));
  FLAP_TRY_GOTO(status, begin_copied(pager, layout, &job));
  FLAP_TRY_GOTO(status, keep_slices(pager, layout, &job));
  FLAP_TRY_GOTO(status, end_copied(&job, checksums));
  FLAP_TRY_GOTO(status, link_extents(pager, &job, checksums));
  status = write_table(&job, checksums);
fail:
  if (job.copies)
    flap_large_file_abort(&job.copied);
  free(job.table);
  return status;
}
