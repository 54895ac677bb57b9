/* The virtual clock: a binary heap of events ordered by (time, order of scheduling). */
#include "base/clock.h"

#include "base/assert.h"

#include <stdlib.h>

typedef struct clock_event {
  uint64_t at_ns;
  uint64_t sequence; /* breaks ties, so that equal times keep the order of scheduling */
  flap_clock_fn fn;
  void *context;
} clock_event;

struct flap_clock {
  uint64_t now_ns;
  uint64_t sequence_next;
  clock_event *events; /* the least at 0, the children of i at 2i + 1 and 2i + 2 */
  size_t count, capacity;
};

flap_status flap_clock_open(flap_clock **clock_out) {
  *clock_out = NULL;
  flap_clock *clock = calloc(1, sizeof *clock);
  if (clock == NULL || (clock->events = malloc(FLAP_CLOCK_EVENTS * sizeof *clock->events)) == NULL) {
    free(clock);
    return flap_error_set(FLAP_NO_MEMORY, "virtual clock: no memory for %u events", FLAP_CLOCK_EVENTS);
  }
  clock->capacity = FLAP_CLOCK_EVENTS;
  *clock_out = clock;
  return FLAP_OK;
}

uint64_t flap_clock_now_ns(const flap_clock *clock) {
  return clock->now_ns;
}

static bool event_before(const clock_event *a, const clock_event *b) {
  return a->at_ns != b->at_ns ? a->at_ns < b->at_ns : a->sequence < b->sequence;
}

void flap_clock_schedule(flap_clock *clock, uint64_t at_ns, flap_clock_fn fn, void *context) {
  flap_assert(at_ns >= clock->now_ns);
  if (clock->count == clock->capacity) {
    size_t capacity = clock->capacity * 2;
    clock_event *events = realloc(clock->events, capacity * sizeof *events);
    flap_assert(events != NULL);
    clock->events = events;
    clock->capacity = capacity;
  }
  clock_event event = {.at_ns = at_ns, .sequence = clock->sequence_next++, .fn = fn, .context = context};
  size_t hole = clock->count++;
  while (hole > 0 && event_before(&event, &clock->events[(hole - 1) / 2])) {
    clock->events[hole] = clock->events[(hole - 1) / 2];
    hole = (hole - 1) / 2;
  }
  clock->events[hole] = event;
}

static clock_event event_take(flap_clock *clock) {
  clock_event first = clock->events[0];
  clock_event last = clock->events[--clock->count];
  size_t hole = 0;
  for (;;) {
    size_t child = 2 * hole + 1;
    if (child >= clock->count)
      break;
    if (child + 1 < clock->count && event_before(&clock->events[child + 1], &clock->events[child]))
      child++;
    if (!event_before(&clock->events[child], &last))
      break;
    clock->events[hole] = clock->events[child];
    hole = child;
  }
  clock->events[hole] = last;
  return first;
}

bool flap_clock_advance(flap_clock *clock) {
  if (clock->count == 0)
    return false;
  clock_event event = event_take(clock);
  clock->now_ns = event.at_ns;
  event.fn(event.context);
  return true;
}

void flap_clock_advance_to(flap_clock *clock, uint64_t until_ns) {
  flap_assert(until_ns >= clock->now_ns);
  while (clock->count > 0 && clock->events[0].at_ns <= until_ns)
    (void)flap_clock_advance(clock);
  /* An event may itself have advanced the clock, past the end even; time never runs back. */
  if (clock->now_ns < until_ns)
    clock->now_ns = until_ns;
}

void flap_clock_close(flap_clock *clock) {
  if (clock == NULL)
    return;
  free(clock->events);
  free(clock);
}
