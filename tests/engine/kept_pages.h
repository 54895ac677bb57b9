/* What a pager would keep of states for a checkpoint, made up of the regions of a real one: pages of another size, some
 * copied and some in files, encoded and as they are, in files that begin with something else.
 *
 * The linker puts functions of kept_pages.c in place of the pager's: a program that has this file is linked with
 * --wrap of flap_pager_can_keep, _copied_bytes, _keep, _link and _page_bytes.
 */
#ifndef FLAP_TESTS_ENGINE_KEPT_PAGES_H
#define FLAP_TESTS_ENGINE_KEPT_PAGES_H

#include "pager/pager.h"

#include <stdio.h>

#define KEPT_PAGE_MAX 65536u
#define KEPT_FILES 3u /* of FLAP_BLOCK_FILES_MAX: there may be fewer than there can be */

extern struct kept_pages {
  char folder[256]; /* of the run's files */
  bool can_keep;
  uint32_t page_bytes;
  bool all_copied, none_copied;
  FILE *files[1 + KEPT_FILES];  /* NULL: not begun */
  uint32_t keeps, failing_keep; /* from 1; 0: none */
  bool link_fails;
} kept_pages;

/* The run's files are others from here on. */
void kept_pages_next_files(void);

/* For flap_pager_fill of a states region; `context` is its number, a uint32_t. Some pages are random, some compress,
 * and no two blocks are alike. */
flap_status kept_pages_fill(void *context, uint64_t offset, uint64_t bytes, void *memory);

/* For flap_pager_drain. Begins as {0}; the caller frees the bytes. */
typedef struct kept_bytes {
  unsigned char *bytes;
  uint64_t count;
} kept_bytes;
flap_status kept_pages_append(void *context, uint64_t offset, uint64_t bytes, const void *memory);

#endif
