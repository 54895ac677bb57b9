/* What was kept of shared regions, and whether the files that were named still have it. */
#ifndef FLAP_TESTS_PAGER_KEPT_VALUES_H
#define FLAP_TESTS_PAGER_KEPT_VALUES_H

#include "pager/pager.h"

typedef struct kept_values kept_values;

kept_values *kept_open(const char *folder);
/* `expected`: the bytes of the page, copied. */
void kept_add(kept_values *kept, uint32_t region, uint64_t page_bytes, const flap_pager_extent *extent,
              const void *expected);
/* Names the files of all that was added since, and compares; without `named` forgets it. */
flap_status kept_name(kept_values *kept, flap_pager *pager, bool named);
/* Compares everything that ever was kept; returns how many pages. */
uint64_t kept_compare(const kept_values *kept);
/* Removes the names. */
void kept_close(kept_values *kept);

#endif
