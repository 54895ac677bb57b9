/* The least that must be moved into a cache of a size, whoever manages it.
 *
 * Farthest next use, with perfect knowledge of a list of uses that is run over and over (Belady, "A study of
 * replacement algorithms for a virtual-storage computer", 1966). A thing is so many pages, each of which may stay by
 * itself. What is in use is in the cache as a whole. A page needs loading at a use that loads, unless it stayed since
 * the use before; whenever there is too little room, what is used again last goes, or of it as much as must. No choice
 * of pages to keep loads fewer: of all that overlap at that moment, the one that goes frees its room for longest.
 * Nothing here knows of slots, classes, transfers or time.
 */
#ifndef FLAP_TESTS_ENGINE_LEAST_TRAFFIC_H
#define FLAP_TESTS_ENGINE_LEAST_TRAFFIC_H

#include <stdbool.h>
#include <stdint.h>

#define LEAST_THINGS_MAX 4096u
#define LEAST_EVENTS_MAX 65536u

typedef enum least_kind {
  LEAST_LOAD,    /* a use begins, and needs what is in the thing */
  LEAST_WRITE,   /* likewise, but it does not: it writes all of it, or drops it */
  LEAST_DONE,    /* the use is over, and the thing holds something */
  LEAST_DROPPED, /* the use is over, and nothing of it is wanted */
  LEAST_CHANGED  /* it was changed elsewhere: what the cache has of it is old */
} least_kind;

typedef struct least_event {
  least_kind kind;
  uint32_t thing;
} least_event;

typedef struct least_traffic {
  uint32_t thing_count, event_count;
  uint64_t pages[LEAST_THINGS_MAX]; /* of each thing */
  least_event events[LEAST_EVENTS_MAX];
} least_traffic;

/* Pages that one run of the list loads at least, over `runs` of them, of which the first begins with a cache of
 * `capacity` pages that holds whatever is best. At most what any cache loads in a run that it repeats for ever. */
double least_traffic_pages(const least_traffic *list, uint64_t capacity, uint32_t runs);

#endif
