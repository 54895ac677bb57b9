#include "tests/engine/kept_pages.h"

#include "base/philox.h"
#include "io/block/checksum.h"
#include "io/block/codec.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SCRATCH_BYTES (256u << 10) /* what a codec wants beside a page, and more */
#define PATH_BYTES (sizeof kept_pages.folder + 16)

struct kept_pages kept_pages;

bool __wrap_flap_pager_can_keep(const flap_pager *pager);
uint64_t __wrap_flap_pager_page_bytes(const flap_pager *pager);
flap_status __wrap_flap_pager_keep(flap_pager *pager, uint32_t region, flap_pager_drain_fn drain,
                                   flap_pager_extent_fn extent, void *context);
flap_status __wrap_flap_pager_link(flap_pager *pager, uint32_t file, const char *path);
uint64_t __wrap_flap_pager_copied_bytes(flap_pager *pager, uint32_t region);

bool __wrap_flap_pager_can_keep(const flap_pager *pager) {
  (void)pager;
  return kept_pages.can_keep;
}

uint64_t __wrap_flap_pager_page_bytes(const flap_pager *pager) {
  (void)pager;
  return kept_pages.page_bytes;
}

flap_status kept_pages_append(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  kept_bytes *region = context;
  region->bytes = realloc(region->bytes, offset + bytes);
  memcpy(region->bytes + offset, memory, bytes);
  region->count = offset + bytes;
  return FLAP_OK;
}

static bool is_copied(uint32_t region, uint64_t page) {
  return !kept_pages.none_copied && (kept_pages.all_copied || (region + page * 7) % 5 < 2);
}

uint64_t __wrap_flap_pager_copied_bytes(flap_pager *pager, uint32_t region) {
  kept_bytes all = {0};
  uint64_t copied = 0;
  ck_assert_int_eq(flap_pager_drain(pager, region, kept_pages_append, &all), FLAP_OK);
  for (uint64_t page = 0; page * kept_pages.page_bytes < all.count; page++) {
    const uint64_t left = all.count - page * kept_pages.page_bytes;
    if (is_copied(region, page))
      copied += left < kept_pages.page_bytes ? left : kept_pages.page_bytes;
  }
  free(all.bytes);
  return copied;
}

static const char *name_file(uint32_t number, char path[PATH_BYTES]) {
  (void)snprintf(path, PATH_BYTES, "%s/extents-%u", kept_pages.folder, number);
  return path;
}

static FILE *file_of(uint32_t number) {
  char path[PATH_BYTES];
  if (kept_pages.files[number] == NULL) {
    kept_pages.files[number] = fopen(name_file(number, path), "wb");
    ck_assert_ptr_nonnull(kept_pages.files[number]);
    for (uint32_t i = 0; i < number * FLAP_BLOCK_ALIGN; i++)
      (void)fputc('x', kept_pages.files[number]);
  }
  return kept_pages.files[number];
}

static flap_pager_extent store(uint32_t region, uint64_t page, const unsigned char *bytes, uint32_t count) {
  static _Alignas(16) unsigned char encoded[KEPT_PAGE_MAX], scratch[KEPT_PAGE_MAX + SCRATCH_BYTES];
  ck_assert_uint_le(flap_block_codec_scratch(count), sizeof scratch);
  const uint32_t file = 1 + (uint32_t)(region + page) % KEPT_FILES;
  const uint32_t stored =
      flap_block_encode(page % 2 == 0 ? FLAP_CODEC_ZSTD : FLAP_CODEC_LZ4, bytes, count, 4, encoded, scratch);
  flap_pager_extent extent = {.offset = page * kept_pages.page_bytes,
                              .bytes = count,
                              .stored_bytes = stored,
                              .place = (uint64_t)ftell(file_of(file)),
                              .epoch = 3 + region % 4,
                              .file = file};
  const unsigned char *from = stored < count ? encoded : bytes;
  extent.checksum = flap_block_checksum(from, stored, region, (uint32_t)page, extent.epoch);
  ck_assert_uint_eq(fwrite(from, 1, stored, file_of(file)), stored);
  return extent;
}

flap_status __wrap_flap_pager_keep(flap_pager *pager, uint32_t region, flap_pager_drain_fn drain,
                                   flap_pager_extent_fn extent, void *context) {
  kept_bytes all = {0};
  if (++kept_pages.keeps == kept_pages.failing_keep)
    return flap_error_set(FLAP_IO, "this is not kept");
  FLAP_TRY(flap_pager_drain(pager, region, kept_pages_append, &all));
  flap_status status = FLAP_OK;
  /* Neighbours are delivered together. */
  for (uint64_t page = 0, end = 0; page * kept_pages.page_bytes < all.count && status == FLAP_OK; page = end) {
    for (end = page; end * kept_pages.page_bytes < all.count && is_copied(region, end); end++)
      ;
    const uint64_t from = page * kept_pages.page_bytes, to = end * kept_pages.page_bytes;
    if (end > page)
      status = drain(context, from, (to < all.count ? to : all.count) - from, all.bytes + from);
    else
      end++;
  }
  for (uint64_t page = 0; page * kept_pages.page_bytes < all.count && status == FLAP_OK; page++) {
    const uint64_t from = page * kept_pages.page_bytes, left = all.count - from;
    if (is_copied(region, page))
      continue;
    const flap_pager_extent one =
        store(region, page, all.bytes + from, (uint32_t)(left < kept_pages.page_bytes ? left : kept_pages.page_bytes));
    status = extent(context, &one);
  }
  free(all.bytes);
  return status;
}

flap_status __wrap_flap_pager_link(flap_pager *pager, uint32_t file, const char *path) {
  char from[PATH_BYTES];
  (void)pager;
  if (kept_pages.link_fails)
    return flap_error_set(FLAP_IO, "this gets no name");
  ck_assert_ptr_nonnull(kept_pages.files[file]);
  ck_assert_int_eq(fflush(kept_pages.files[file]), 0);
  ck_assert_int_eq(link(name_file(file, from), path), 0);
  return FLAP_OK;
}

void kept_pages_next_files(void) {
  for (uint32_t i = 1; i <= KEPT_FILES; i++) {
    char path[PATH_BYTES];
    if (kept_pages.files[i] != NULL) {
      (void)fclose(kept_pages.files[i]);
      ck_assert_int_eq(unlink(name_file(i, path)), 0);
    }
    kept_pages.files[i] = NULL;
  }
}

flap_status kept_pages_fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  const uint32_t region = *(const uint32_t *)context;
  const flap_philox stream = flap_philox_stream(region, "states");
  for (uint64_t i = 0; i < bytes; i++) {
    const uint64_t at = offset + i;
    const bool random = (at / 4096 + region) % 3 == 0 || at % 64 < 2;
    ((unsigned char *)memory)[i] = (unsigned char)(random ? flap_philox_below(&stream, at, 256) : at % 4);
  }
  return FLAP_OK;
}
