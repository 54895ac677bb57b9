#include "tests/engine/least_traffic.h"

#include <check.h>
#include <stdlib.h>

#define NEVER UINT64_MAX

typedef struct thing {
  uint64_t kept;     /* pages in the cache */
  uint64_t next_use; /* when it is loaded again, as events are counted over all runs; NEVER */
  bool in_use;
} thing;

/* When, after event `at`, the thing is next loaded with what it holds now. A list is run over and over. */
static uint64_t next_load(const least_traffic *list, uint64_t at, uint32_t which) {
  for (uint64_t i = at + 1; i <= at + list->event_count; i++) {
    const least_event *event = &list->events[i % list->event_count];
    if (event->thing != which)
      continue;
    return event->kind == LEAST_LOAD ? i : NEVER; /* else it is written or changed before */
  }
  return NEVER;
}

/* Makes room: what is loaded again last goes first. What is in use stays. */
static void shrink(thing *things, uint32_t count, uint64_t *total, uint64_t capacity) {
  while (*total > capacity) {
    thing *last = NULL;
    for (uint32_t i = 0; i < count; i++)
      if (things[i].kept > 0 && !things[i].in_use && (!last || things[i].next_use > last->next_use))
        last = &things[i];
    ck_assert_msg(last != NULL, "what is in use at a time is more than the cache holds");
    const uint64_t gone = last->kept < *total - capacity ? last->kept : *total - capacity;
    last->kept -= gone;
    *total -= gone;
  }
}

double least_traffic_pages(const least_traffic *list, uint64_t capacity, uint32_t runs) {
  thing *things = calloc(list->thing_count, sizeof *things);
  uint64_t loaded = 0, total = 0;
  ck_assert_ptr_nonnull(things);
  for (uint64_t at = 0; at < (uint64_t)runs * list->event_count; at++) {
    const least_event *event = &list->events[at % list->event_count];
    thing *t = &things[event->thing];
    switch (event->kind) {
    case LEAST_LOAD:
      loaded += list->pages[event->thing] - t->kept;
      /* fallthrough */
    case LEAST_WRITE:
      total += list->pages[event->thing] - t->kept;
      t->kept = list->pages[event->thing];
      t->in_use = true;
      break;
    case LEAST_DONE:
      t->in_use = false;
      t->next_use = next_load(list, at, event->thing);
      break;
    case LEAST_DROPPED:
    case LEAST_CHANGED:
      t->in_use = false;
      t->next_use = NEVER;
      break;
    }
    if (!t->in_use && t->next_use == NEVER) {
      total -= t->kept;
      t->kept = 0;
    }
    shrink(things, list->thing_count, &total, capacity);
  }
  free(things);
  /* The cache might have held that much at the start. */
  return loaded > capacity ? (double)(loaded - capacity) / runs : 0;
}
