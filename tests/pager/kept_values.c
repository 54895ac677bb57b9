#include "tests/pager/kept_values.h"

#include "io/block/checksum.h"
#include "io/block/codec.h"

#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILES_MAX 256u

typedef struct kept_page {
  uint32_t region, number;
  flap_pager_extent extent;
  unsigned char *expected;
  int fd; /* -1: not named yet */
} kept_page;

struct kept_values {
  char folder[256];
  kept_page *pages;
  size_t count, capacity, first; /* the first that is not named yet */
  uint32_t names;
  int fds[FILES_MAX];
};

kept_values *kept_open(const char *folder) {
  kept_values *kept = calloc(1, sizeof *kept);
  ck_assert_ptr_nonnull(kept);
  snprintf(kept->folder, sizeof kept->folder, "%s", folder);
  return kept;
}

void kept_add(kept_values *kept, uint32_t region, uint64_t page_bytes, const flap_pager_extent *extent,
              const void *expected) {
  if (kept->count == kept->capacity) {
    kept->capacity = kept->capacity > 0 ? 2 * kept->capacity : 64;
    kept->pages = realloc(kept->pages, kept->capacity * sizeof *kept->pages);
    ck_assert_ptr_nonnull(kept->pages);
  }
  kept_page *page = &kept->pages[kept->count++];
  *page = (kept_page){.region = region,
                      .number = (uint32_t)(extent->offset / page_bytes),
                      .extent = *extent,
                      .expected = malloc(extent->bytes),
                      .fd = -1};
  ck_assert_ptr_nonnull(page->expected);
  memcpy(page->expected, expected, extent->bytes);
}

static void path_of(const kept_values *kept, uint32_t name, char path_out[300]) {
  snprintf(path_out, 300, "%s/kept-%u", kept->folder, name);
}

static void compare(const kept_page *page) {
  const flap_pager_extent *e = &page->extent;
  unsigned char *stored = malloc(e->stored_bytes), *bytes = malloc(e->bytes);
  void *scratch = malloc(flap_block_codec_scratch(e->bytes));
  ck_assert_int_eq(pread(page->fd, stored, e->stored_bytes, (off_t)e->place), e->stored_bytes);
  ck_assert_msg(flap_block_checksum(stored, e->stored_bytes, page->region, page->number, e->epoch) == e->checksum,
                "region %u, page %u: what was kept is not there any more", page->region, page->number);
  if (e->stored_bytes < e->bytes)
    ck_assert(flap_block_decode(stored, e->stored_bytes, bytes, e->bytes, scratch));
  ck_assert_int_eq(memcmp(e->stored_bytes < e->bytes ? bytes : stored, page->expected, e->bytes), 0);
  free(scratch);
  free(bytes);
  free(stored);
}

flap_status kept_name(kept_values *kept, flap_pager *pager, bool named) {
  int fds[FLAP_BLOCK_FILES_MAX + 1] = {0};
  char path[300];
  for (size_t i = kept->first; i < kept->count; i++) {
    kept_page *page = &kept->pages[i];
    if (!named) {
      free(page->expected);
      continue;
    }
    if (fds[page->extent.file] == 0) {
      ck_assert_uint_lt(kept->names, FILES_MAX);
      path_of(kept, kept->names, path);
      FLAP_TRY(flap_pager_link(pager, page->extent.file, path));
      fds[page->extent.file] = kept->fds[kept->names++] = open(path, O_RDONLY | O_CLOEXEC);
    }
    page->fd = fds[page->extent.file];
    compare(page);
  }
  kept->count = named ? kept->count : kept->first;
  kept->first = kept->count;
  return FLAP_OK;
}

uint64_t kept_compare(const kept_values *kept) {
  for (size_t i = 0; i < kept->first; i++)
    compare(&kept->pages[i]);
  return kept->first;
}

void kept_close(kept_values *kept) {
  if (kept == NULL)
    return;
  for (size_t i = 0; i < kept->count; i++)
    free(kept->pages[i].expected);
  for (uint32_t i = 0; i < kept->names; i++) {
    char path[300];
    path_of(kept, i, path);
    close(kept->fds[i]);
    unlink(path);
  }
  free(kept->pages);
  free(kept);
}
