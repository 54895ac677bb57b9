/* States read from pages. Nothing of a table is used before all of it is known to be possible: counts and sizes agree
 * with its length, slices are the whole of each part once, and each page lies within a file that is there.
 */
#include "engine/store/state_pages.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/system.h"
#include "engine/store/state_pages_table.h"
#include "io/block/checksum.h"
#include "io/block/codec.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TABLE_BYTES_MAX ((uint64_t)4 << 30)
#define ELEMENTS_MAX ((uint64_t)1 << 48) /* of a part: its bytes and their sums fit 64 bits */
#define PART_NAME_MAX 24

/* A page as it was before it was stored. */
typedef struct page_cache {
  unsigned char *page;
  uint64_t row; /* UINT64_MAX: nothing is in it */
} page_cache;

struct flap_state_pages {
  char folder[FLAP_DURABLE_PATH_MAX], path[FLAP_DURABLE_PATH_MAX];
  char paths[FLAP_STATE_PAGES_FILES][FLAP_DURABLE_PATH_MAX];
  int fds[FLAP_STATE_PAGES_FILES]; /* -1: there is no such file */
  unsigned char *table;
  uint64_t table_bytes;
  /* in the table */
  const flap_state_pages_header *header;
  const flap_state_pages_slice *slices;
  const flap_state_pages_row *rows;
  /* what follows from it */
  uint64_t *first_rows;   /* of slices */
  uint32_t *first_slices; /* of parts, and slice_count */
  page_cache caches[FLAP_STATE_SECTION_COUNT];
  unsigned char *memory, *stored, *scratch; /* `memory` is all of it, caches as well */
};

static flap_part kind_of(const flap_state_pages *pages, uint32_t part) {
  return part == 0 ? FLAP_PART_EMBEDDING : part + 1 < pages->header->part_count ? FLAP_PART_LAYER : FLAP_PART_HEAD;
}

static flap_state_format format_of(const flap_state_pages *pages, uint32_t part) {
  return flap_layout_state_format(flap_state_pages_dtype(pages), flap_state_pages_optim(pages), kind_of(pages, part));
}

static uint64_t part_elements(const flap_state_pages *pages, uint32_t part) {
  const flap_state_pages_slice *last = &pages->slices[pages->first_slices[part + 1] - 1];
  return last->first_element + last->elements;
}

static uint64_t region_bytes(const flap_state_pages *pages, const flap_state_pages_slice *slice) {
  const flap_state_format format = format_of(pages, slice->part);
  return flap_state_pages_region_bytes(&format, slice->elements);
}

static uint64_t min_of(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* ---- the table --------------------------------------------------------------------------------------------- */

static flap_status broken(const flap_state_pages *pages, const char *what, uint64_t number) {
  return flap_error_set(FLAP_CORRUPT, "%s: is not a table as FLAP writes it: %s %llu", pages->path, what,
                        (unsigned long long)number);
}

static flap_status read_table(flap_state_pages *pages, int fd) {
  struct stat about;
  if (flap_system_fstat(fd, &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", pages->path);
  pages->table_bytes = S_ISREG(about.st_mode) ? (uint64_t)about.st_size : 0;
  if (pages->table_bytes < flap_state_pages_table_bytes(0, 0) || pages->table_bytes > TABLE_BYTES_MAX ||
      pages->table_bytes % sizeof(uint64_t) != 0)
    return broken(pages, "it has so many bytes:", pages->table_bytes);
  pages->table = malloc(pages->table_bytes);
  if (pages->table == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for its %llu bytes", pages->path,
                          (unsigned long long)pages->table_bytes);
  return flap_durable_read_all(fd, pages->path, 0, pages->table, pages->table_bytes);
}

static flap_status open_table(flap_state_pages *pages) {
  const int fd = flap_system_open(pages->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", pages->path);
  const flap_status status = read_table(pages, fd);
  (void)flap_system_close(fd);
  return status;
}

static flap_status check_sum(const flap_state_pages *pages) {
  const uint64_t bytes = pages->table_bytes - FLAP_STATE_PAGES_SUM_BYTES;
  uint64_t wanted = 0;
  flap_checksum *sum = NULL;
  FLAP_TRY(flap_checksum_open(&sum));
  flap_checksum_add(sum, pages->table, bytes);
  const uint64_t value = flap_checksum_value(sum);
  flap_checksum_close(sum);
  memcpy(&wanted, pages->table + bytes, sizeof wanted);
  return value == wanted ? FLAP_OK : flap_error_set(FLAP_CORRUPT, "%s: is not what was saved", pages->path);
}

static flap_status check_header(flap_state_pages *pages) {
  const flap_state_pages_header *header = (const flap_state_pages_header *)(const void *)pages->table;
  pages->header = header;
  pages->slices = (const flap_state_pages_slice *)(const void *)(header + 1);
  FLAP_TRY(check_sum(pages));
  if (memcmp(header->magic, FLAP_STATE_PAGES_MAGIC, sizeof header->magic) != 0)
    return flap_error_set(FLAP_CORRUPT, "%s: is no table of pages", pages->path);
  if (header->version == 0 || header->version > FLAP_STATE_PAGES_VERSION)
    return flap_error_set(FLAP_UNSUPPORTED, "%s: is of version %u, but this program reads versions up to %u",
                          pages->path, header->version, FLAP_STATE_PAGES_VERSION);
  if (header->dtype > FLAP_F16)
    return broken(pages, "its weights are of no known type:", header->dtype);
  if (header->optim > FLAP_OPTIM_ADAMW_8BIT)
    return broken(pages, "it is of no known optimizer:", header->optim);
  if (header->page_bytes == 0 || header->page_bytes % FLAP_BLOCK_ALIGN != 0 ||
      header->page_bytes > FLAP_BLOCK_REQUEST_BYTES_MAX)
    return broken(pages, "its pages have so many bytes:", header->page_bytes);
  if (header->page_count > pages->table_bytes / sizeof(flap_state_pages_row) ||
      flap_state_pages_table_bytes(header->slice_count, header->page_count) != pages->table_bytes)
    return broken(pages, "its slices and pages are not as many as its bytes say:", header->page_count);
  if (header->part_count == 0 || header->part_count > header->slice_count)
    return broken(pages, "its parts are so many:", header->part_count);
  pages->rows = (const flap_state_pages_row *)(const void *)(pages->slices + header->slice_count);
  return FLAP_OK;
}

/* Of each part, in order, all elements once. */
static flap_status check_slices(flap_state_pages *pages) {
  const flap_state_pages_header *header = pages->header;
  pages->first_rows = malloc(header->slice_count * sizeof *pages->first_rows);
  pages->first_slices = malloc((header->part_count + (uint64_t)1) * sizeof *pages->first_slices);
  if (pages->first_rows == NULL || pages->first_slices == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for %u slices", pages->path, header->slice_count);
  uint32_t parts = 0;
  uint64_t end = 0, rows = 0;
  for (uint32_t i = 0; i < header->slice_count; i++) {
    const flap_state_pages_slice *slice = &pages->slices[i];
    if (slice->part == parts && parts < header->part_count) {
      pages->first_slices[parts++] = i;
      end = 0;
    }
    if (parts == 0 || slice->part != parts - 1 || slice->first_element != end || slice->elements == 0 ||
        slice->elements > ELEMENTS_MAX - end || slice->elements % FLAP_OPS_BLOCK != 0)
      return broken(pages, "these elements of a part are not where they should be: slice", i);
    end += slice->elements;
    const uint64_t count = flap_state_pages_in(region_bytes(pages, slice), header->page_bytes);
    if (count > UINT32_MAX || count > header->page_count - rows)
      return broken(pages, "it has too few pages for slice", i);
    pages->first_rows[i] = rows;
    rows += count;
  }
  pages->first_slices[parts] = header->slice_count;
  if (parts != header->part_count || rows != header->page_count)
    return broken(pages, "of its parts or pages there are only", parts != header->part_count ? parts : rows);
  return FLAP_OK;
}

static uint64_t page_bytes_of(const flap_state_pages *pages, uint32_t slice, uint64_t number) {
  const uint64_t before = number * pages->header->page_bytes;
  return min_of(region_bytes(pages, &pages->slices[slice]) - before, pages->header->page_bytes);
}

static flap_status check_row(const flap_state_pages *pages, uint64_t index, uint64_t bytes) {
  const flap_state_pages_row *row = &pages->rows[index];
  if (row->file >= FLAP_STATE_PAGES_FILES || row->zero != 0)
    return broken(pages, "it names no file for page", index);
  const uint64_t file_bytes = pages->header->file_bytes[row->file];
  if (row->stored_bytes == 0 || row->stored_bytes % FLAP_BLOCK_ALIGN != 0 || row->stored_bytes > bytes ||
      row->place % FLAP_BLOCK_ALIGN != 0 || row->place > file_bytes || row->stored_bytes > file_bytes - row->place)
    return broken(pages, "it has no such place for page", index);
  if (row->file == 0 && (row->stored_bytes != bytes || row->epoch != 0))
    return broken(pages, "it has another copy than there can be for page", index);
  return FLAP_OK;
}

static flap_status check_rows(const flap_state_pages *pages) {
  for (uint32_t i = 0; i < pages->header->slice_count; i++) {
    const uint64_t bytes = region_bytes(pages, &pages->slices[i]), page_bytes = pages->header->page_bytes;
    const uint64_t count = flap_state_pages_in(bytes, page_bytes);
    for (uint64_t page = 0; page < count; page++)
      FLAP_TRY(check_row(pages, pages->first_rows[i] + page, min_of(bytes - page * page_bytes, page_bytes)));
  }
  return FLAP_OK;
}

static flap_status open_file(flap_state_pages *pages, uint32_t file) {
  const uint64_t bytes = pages->header->file_bytes[file];
  const char *path = pages->paths[file];
  struct stat about;
  FLAP_TRY(flap_state_pages_file(pages->folder, file, pages->paths[file]));
  if (bytes == 0)
    return FLAP_OK;
  pages->fds[file] = flap_system_open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (pages->fds[file] < 0)
    return errno == ENOENT ? flap_error_set(FLAP_CORRUPT, "%s: is missing, but was saved", path)
                           : flap_error_set_os(errno, "cannot open %s", path);
  if (flap_system_fstat(pages->fds[file], &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", path);
  if (!S_ISREG(about.st_mode) || (uint64_t)about.st_size != bytes)
    return flap_error_set(FLAP_CORRUPT, "%s: has %llu bytes, but was saved with %llu", path,
                          (unsigned long long)about.st_size, (unsigned long long)bytes);
  return FLAP_OK;
}

/* Each piece is a multiple of FLAP_BLOCK_ALIGN, but for the last. */
static flap_status take_memory(flap_state_pages *pages) {
  const uint64_t page_bytes = pages->header->page_bytes;
  pages->memory = malloc((FLAP_STATE_SECTION_COUNT + 1) * page_bytes + flap_block_codec_scratch(page_bytes));
  if (pages->memory == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for pages of %llu bytes", pages->path,
                          (unsigned long long)page_bytes);
  for (uint32_t i = 0; i < FLAP_STATE_SECTION_COUNT; i++)
    pages->caches[i] = (page_cache){pages->memory + i * page_bytes, UINT64_MAX};
  pages->stored = pages->memory + FLAP_STATE_SECTION_COUNT * page_bytes;
  pages->scratch = pages->stored + page_bytes;
  return FLAP_OK;
}

static flap_status open_all(flap_state_pages *pages) {
  FLAP_TRY(flap_durable_join(pages->path, pages->folder, FLAP_STATE_PAGES_TABLE));
  FLAP_TRY(open_table(pages));
  FLAP_TRY(check_header(pages));
  FLAP_TRY(check_slices(pages));
  FLAP_TRY(check_rows(pages));
  for (uint32_t i = 0; i < FLAP_STATE_PAGES_FILES; i++)
    FLAP_TRY(open_file(pages, i));
  return take_memory(pages);
}

flap_status flap_state_pages_open(const char *folder, flap_state_pages **pages_out) {
  flap_state_pages *pages = strlen(folder) < FLAP_DURABLE_PATH_MAX ? calloc(1, sizeof *pages) : NULL;
  if (pages == NULL)
    return flap_error_set(strlen(folder) < FLAP_DURABLE_PATH_MAX ? FLAP_NO_MEMORY : FLAP_INVALID,
                          "%.200s: no memory to read its states, or too long a path", folder);
  strcpy(pages->folder, folder);
  for (uint32_t i = 0; i < FLAP_STATE_PAGES_FILES; i++)
    pages->fds[i] = -1;
  const flap_status status = open_all(pages);
  if (status != FLAP_OK) {
    flap_state_pages_close(pages);
    return status;
  }
  *pages_out = pages;
  return FLAP_OK;
}

void flap_state_pages_close(flap_state_pages *pages) {
  if (pages == NULL)
    return;
  for (uint32_t i = 0; i < FLAP_STATE_PAGES_FILES; i++)
    if (pages->fds[i] >= 0)
      (void)flap_system_close(pages->fds[i]);
  free(pages->table);
  free(pages->first_rows);
  free(pages->first_slices);
  free(pages->memory);
  free(pages);
}

/* ---- what it is of ----------------------------------------------------------------------------------------- */

const char *flap_state_pages_path(const flap_state_pages *pages) {
  return pages->path;
}

flap_dtype flap_state_pages_dtype(const flap_state_pages *pages) {
  return (flap_dtype)pages->header->dtype;
}

flap_optim flap_state_pages_optim(const flap_state_pages *pages) {
  return (flap_optim)pages->header->optim;
}

uint32_t flap_state_pages_parts(const flap_state_pages *pages) {
  return pages->header->part_count;
}

/* "layer 3" */
static const char *name_part(const flap_state_pages *pages, uint32_t part, char name[PART_NAME_MAX]) {
  const flap_part kind = kind_of(pages, part);
  if (kind == FLAP_PART_LAYER)
    (void)snprintf(name, PART_NAME_MAX, "layer %u", part - 1);
  else
    (void)snprintf(name, PART_NAME_MAX, "the %s", kind == FLAP_PART_EMBEDDING ? "embedding" : "head");
  return name;
}

flap_status flap_state_pages_check(const flap_state_pages *pages, const flap_model_config *config,
                                   flap_dtype weight_dtype, flap_optim optim) {
  const flap_dtype dtype = flap_state_pages_dtype(pages);
  const uint32_t parts = config->num_hidden_layers + 2;
  char name[PART_NAME_MAX];
  if (dtype != weight_dtype)
    return flap_error_set(FLAP_INVALID, "%s: has the states of %s weights, but this run needs %s", pages->path,
                          flap_dtype_name(dtype), flap_dtype_name(weight_dtype));
  if (flap_state_pages_optim(pages) != optim)
    return flap_error_set(FLAP_INVALID, "%s: has the states of %s, but this run needs %s", pages->path,
                          flap_run_config_optim_name(flap_state_pages_optim(pages)), flap_run_config_optim_name(optim));
  if (pages->header->part_count != parts)
    return flap_error_set(FLAP_INVALID,
                          "%s: has states of %u parts of a model, but the model's configuration needs %u: does "
                          "config.json belong to these states?",
                          pages->path, pages->header->part_count, parts);
  for (uint32_t i = 0; i < parts; i++) {
    const uint64_t has = part_elements(pages, i), needs = flap_model_part_elements(config, kind_of(pages, i));
    if (has != needs)
      return flap_error_set(FLAP_INVALID,
                            "%s: has states of %llu elements for %s, but the model's configuration needs %llu: does "
                            "config.json belong to these states?",
                            pages->path, (unsigned long long)has, name_part(pages, i, name), (unsigned long long)needs);
  }
  return FLAP_OK;
}

/* ---- pages ------------------------------------------------------------------------------------------------- */

static flap_status corrupt(const flap_state_pages *pages, uint32_t slice, const flap_state_pages_row *row,
                           const char *what) {
  char name[PART_NAME_MAX];
  return flap_error_set(FLAP_CORRUPT, "%s: the %u bytes at byte %llu, states of %s, %s", pages->paths[row->file],
                        row->stored_bytes, (unsigned long long)row->place,
                        name_part(pages, pages->slices[slice].part, name), what);
}

static flap_status read_once(const flap_state_pages *pages, uint32_t slice, uint64_t number, unsigned char *to,
                             bool *good_out) {
  const flap_state_pages_row *row = &pages->rows[pages->first_rows[slice] + number];
  FLAP_TRY(flap_durable_read_all(pages->fds[row->file], pages->paths[row->file], row->place, to, row->stored_bytes));
  *good_out = flap_block_checksum(to, row->stored_bytes, pages->slices[slice].region, (uint32_t)number, row->epoch) ==
              row->checksum;
  return FLAP_OK;
}

/* What a bus turned over on the way comes right when it is read again, and not from the page cache. */
static flap_status read_stored(const flap_state_pages *pages, uint32_t slice, uint64_t number, unsigned char *to) {
  const flap_state_pages_row *row = &pages->rows[pages->first_rows[slice] + number];
  bool good = false;
  FLAP_TRY(read_once(pages, slice, number, to, &good));
  if (good)
    return FLAP_OK;
  (void)posix_fadvise(pages->fds[row->file], (off_t)row->place, (off_t)row->stored_bytes, POSIX_FADV_DONTNEED);
  FLAP_TRY(read_once(pages, slice, number, to, &good));
  if (!good)
    return corrupt(pages, slice, row, "are not what was saved, nor were they when they were read again");
  flap_log(FLAP_LOG_WARNING,
           "%s: the %u bytes at byte %llu were not what was saved, and were when they were read again: the disk or the "
           "way from it fails at times; look into the system's log",
           pages->paths[row->file], row->stored_bytes, (unsigned long long)row->place);
  return FLAP_OK;
}

/* Page `number` of a slice, as it was in the region. */
static flap_status read_page(const flap_state_pages *pages, uint32_t slice, uint64_t number, unsigned char *to) {
  const flap_state_pages_row *row = &pages->rows[pages->first_rows[slice] + number];
  const uint64_t bytes = page_bytes_of(pages, slice, number);
  if (row->stored_bytes == bytes)
    return read_stored(pages, slice, number, to);
  FLAP_TRY(read_stored(pages, slice, number, pages->stored));
  if (!flap_block_decode(pages->stored, row->stored_bytes, to, (uint32_t)bytes, pages->scratch))
    return corrupt(pages, slice, row, "were saved as no page can be");
  return FLAP_OK;
}

static flap_status read_cached(flap_state_pages *pages, page_cache *cache, uint32_t slice, uint64_t number) {
  const uint64_t row = pages->first_rows[slice] + number;
  if (cache->row == row)
    return FLAP_OK;
  cache->row = UINT64_MAX;
  FLAP_TRY(read_page(pages, slice, number, cache->page));
  cache->row = row;
  return FLAP_OK;
}

/* `bytes` of a slice's region from `offset`. */
static flap_status read_region(flap_state_pages *pages, page_cache *cache, uint32_t slice, uint64_t offset,
                               uint64_t bytes, unsigned char *to) {
  const uint64_t page_bytes = pages->header->page_bytes;
  while (bytes > 0) {
    const uint64_t at = offset % page_bytes, part = min_of(bytes, page_bytes - at);
    FLAP_TRY(read_cached(pages, cache, slice, offset / page_bytes));
    memcpy(to, cache->page + at, part);
    to += part;
    offset += part;
    bytes -= part;
  }
  return FLAP_OK;
}

/* The slice of the part that has the element. */
static uint32_t find_slice(const flap_state_pages *pages, uint32_t part, uint64_t element) {
  uint32_t low = pages->first_slices[part], high = pages->first_slices[part + 1];
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (pages->slices[middle].first_element <= element)
      low = middle;
    else
      high = middle;
  }
  return low;
}

flap_status flap_state_pages_read(flap_state_pages *pages, uint32_t part, flap_state_section section, uint64_t first,
                                  uint64_t count, void *to) {
  flap_assert(part < pages->header->part_count && section < FLAP_STATE_SECTION_COUNT);
  const flap_state_format format = format_of(pages, part);
  const uint64_t value_bytes = format.sections[section].value_bytes, shared = format.sections[section].value_elements;
  const uint64_t values = part_elements(pages, part) / shared;
  flap_assert(value_bytes > 0 && first <= values && count <= values - first);
  unsigned char *at = to;
  while (count > 0) {
    const uint32_t index = find_slice(pages, part, first * shared);
    const flap_state_pages_slice *slice = &pages->slices[index];
    const uint64_t in_slice = first - slice->first_element / shared;
    const uint64_t run = min_of(count, slice->elements / shared - in_slice);
    const uint64_t offset = flap_layout_state_offset(&format, section, slice->elements) + in_slice * value_bytes;
    FLAP_TRY(read_region(pages, &pages->caches[section], index, offset, run * value_bytes, at));
    at += run * value_bytes;
    first += run;
    count -= run;
  }
  return FLAP_OK;
}

/* Nothing of it is of use to anybody in the page cache, before or after. */
static void drop_cached(const flap_state_pages *pages) {
  for (uint32_t i = 1; i < FLAP_STATE_PAGES_FILES; i++)
    if (pages->fds[i] >= 0)
      (void)posix_fadvise(pages->fds[i], 0, 0, POSIX_FADV_DONTNEED);
}

static flap_status verify_pages(flap_state_pages *pages, bool shared) {
  for (uint32_t i = 0; i < pages->header->slice_count; i++) {
    const uint64_t count = flap_state_pages_in(region_bytes(pages, &pages->slices[i]), pages->header->page_bytes);
    for (uint64_t page = 0; page < count; page++)
      if (!shared || pages->rows[pages->first_rows[i] + page].file > 0)
        FLAP_TRY(read_page(pages, i, page, pages->caches[0].page));
  }
  return FLAP_OK;
}

flap_status flap_state_pages_verify(const char *folder, bool shared) {
  flap_state_pages *pages = NULL;
  FLAP_TRY(flap_state_pages_open(folder, &pages));
  if (shared)
    drop_cached(pages);
  const flap_status status = verify_pages(pages, shared);
  if (shared)
    drop_cached(pages);
  flap_state_pages_close(pages);
  return status;
}
