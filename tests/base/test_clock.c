/* The virtual clock: order, ties, events that schedule events. */
#include "base/clock.h"

#include "base/philox.h"

#include <check.h>
#include <stdlib.h>

typedef struct clock_note {
  flap_clock *clock;
  uint64_t at_ns, sequence;
  uint64_t *order; /* order[0] counts; then the sequence numbers as they ran */
} clock_note;

static void note_event(void *context) {
  clock_note *note = context;
  ck_assert_uint_eq(flap_clock_now_ns(note->clock), note->at_ns);
  note->order[++note->order[0]] = note->sequence;
}

START_TEST(clock_events_run_by_time_then_by_scheduling) {
  enum { COUNT = 2000 };
  static clock_note notes[COUNT];
  static uint64_t order[COUNT + 1];
  flap_clock *clock = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  flap_philox stream = flap_philox_stream(1, "clock");
  for (uint64_t i = 0; i < COUNT; i++) {
    notes[i] = (clock_note){clock, flap_philox_below(&stream, i, 100), i, order};
    flap_clock_schedule(clock, notes[i].at_ns, note_event, &notes[i]);
  }
  while (flap_clock_advance(clock))
    ;
  ck_assert_uint_eq(order[0], COUNT);
  for (uint64_t i = 2; i <= COUNT; i++) {
    const clock_note *a = &notes[order[i - 1]], *b = &notes[order[i]];
    ck_assert(a->at_ns < b->at_ns || (a->at_ns == b->at_ns && a->sequence < b->sequence));
  }
  ck_assert(!flap_clock_advance(clock));
  flap_clock_close(clock);
}
END_TEST

typedef struct clock_chain {
  flap_clock *clock;
  int left;
} clock_chain;

static void chain_event(void *context) {
  clock_chain *chain = context;
  if (--chain->left > 0)
    flap_clock_schedule(chain->clock, flap_clock_now_ns(chain->clock) + 10, chain_event, chain);
}

START_TEST(clock_advance_to_runs_what_events_schedule) {
  flap_clock *clock = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  clock_chain chain = {clock, 5};
  flap_clock_schedule(clock, 10, chain_event, &chain);
  flap_clock_advance_to(clock, 30); /* at 10, 20 and 30 */
  ck_assert_int_eq(chain.left, 2);
  ck_assert_uint_eq(flap_clock_now_ns(clock), 30);
  flap_clock_advance_to(clock, 35);
  ck_assert_int_eq(chain.left, 2);
  ck_assert_uint_eq(flap_clock_now_ns(clock), 35);
  flap_clock_advance_to(clock, 1000);
  ck_assert_int_eq(chain.left, 0);
  ck_assert_uint_eq(flap_clock_now_ns(clock), 1000);
  flap_clock_close(clock);
}
END_TEST

START_TEST(clock_event_at_now_runs_without_moving_time) {
  flap_clock *clock = NULL;
  ck_assert_int_eq(flap_clock_open(&clock), FLAP_OK);
  flap_clock_advance_to(clock, 50);
  clock_chain chain = {clock, 1};
  flap_clock_schedule(clock, 50, chain_event, &chain);
  ck_assert(flap_clock_advance(clock));
  ck_assert_uint_eq(flap_clock_now_ns(clock), 50);
  ck_assert_int_eq(chain.left, 0);
  flap_clock_close(clock);
  flap_clock_close(NULL);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("clock");
  tcase_add_test(tests, clock_events_run_by_time_then_by_scheduling);
  tcase_add_test(tests, clock_advance_to_runs_what_events_schedule);
  tcase_add_test(tests, clock_event_at_now_runs_without_moving_time);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
