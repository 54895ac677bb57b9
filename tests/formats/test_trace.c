/* The trace file: valid JSON always, times relative, rows without overlap, many threads at once. */
#include "base/philox.h"
#include "io/formats/trace.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <jansson.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define OK(call) ck_assert_msg((call) == FLAP_OK, "%s", flap_error_message())
#define NAME "trace.json"

static flap_arena arena;

static flap_trace *open_trace(uint32_t capacity) {
  uint64_t bytes = flap_trace_measure(capacity);
  OK(flap_arena_open(&arena, "trace", bytes));
  flap_trace *trace = flap_trace_open(&arena, capacity);
  ck_assert_ptr_nonnull(trace);
  ck_assert_uint_le(arena.bytes_used, bytes);
  return trace;
}

/* Writes, parses, and checks what every trace must keep: known names of lanes, no negative time, no overlap in a row.
 */
static json_t *write_and_check(flap_trace *trace, size_t events_expected) {
  OK(flap_trace_write(trace, scratch_path(NAME)));
  json_error_t error;
  json_t *root = json_load_file(scratch_path(NAME), JSON_REJECT_DUPLICATES, &error);
  ck_assert_msg(root != NULL, "%d:%d: %s", error.line, error.column, error.text);
  json_t *list = json_object_get(root, "traceEvents");
  double row_end[FLAP_TRACE_LANE_COUNT * FLAP_TRACE_ROWS_MAX + 1];
  bool named[FLAP_TRACE_LANE_COUNT * FLAP_TRACE_ROWS_MAX + 1] = {false};
  size_t events = 0, index;
  json_t *event;
  for (size_t i = 0; i < sizeof row_end / sizeof row_end[0]; i++)
    row_end[i] = 0;
  json_array_foreach(list, index, event) {
    const char *phase = json_string_value(json_object_get(event, "ph"));
    json_int_t thread = json_integer_value(json_object_get(event, "tid"));
    ck_assert_int_eq(json_integer_value(json_object_get(event, "pid")), 1);
    if (strcmp(phase, "M") == 0) {
      named[thread] = true;
      continue;
    }
    ck_assert_str_eq(phase, "X");
    double start = json_real_value(json_object_get(event, "ts")),
           length = json_real_value(json_object_get(event, "dur"));
    ck_assert(named[thread]);
    ck_assert(start >= 0 && length >= 0);
    if (thread % FLAP_TRACE_ROWS_MAX != 0) /* the last row of a lane takes what is left */
      ck_assert_msg(start > row_end[thread] - 1e-6, "row %d overlaps at %f", (int)thread, start);
    row_end[thread] = start + length;
    events++;
  }
  ck_assert_uint_eq(events, events_expected);
  ck_assert_uint_eq((size_t)json_integer_value(json_object_get(json_object_get(root, "otherData"), "events")), events);
  return root;
}

static const json_t *find_event(const json_t *root, const char *name) {
  size_t index;
  json_t *event;
  json_array_foreach(json_object_get(root, "traceEvents"), index, event) {
    if (strcmp(json_string_value(json_object_get(event, "name")), name) == 0)
      return event;
  }
  ck_abort_msg("no event \"%s\"", name);
  return NULL;
}

START_TEST(trace_empty_is_valid_and_names_the_lanes) {
  flap_trace *trace = open_trace(4);
  json_t *root = write_and_check(trace, 0);
  size_t index, lanes = 0;
  json_t *event;
  json_array_foreach(json_object_get(root, "traceEvents"), index, event) {
    lanes += strcmp(json_string_value(json_object_get(event, "name")), "thread_name") == 0;
  }
  ck_assert_uint_eq(lanes, FLAP_TRACE_LANE_COUNT);
  json_decref(root);
  flap_arena_close(&arena);
}
END_TEST

START_TEST(trace_events_have_relative_times_and_details) {
  flap_trace *trace = open_trace(16);
  flap_trace_add(trace, FLAP_TRACE_COMPUTE, "forward", 12, 5000001500, 5000004000, 0);
  flap_trace_add(trace, FLAP_TRACE_DISK_READ, "read \"weights\"\n", FLAP_TRACE_NO_DETAIL, 5000000000, 5000000001, 4096);
  flap_trace_add(trace, FLAP_TRACE_STALL, "h2d", 0, 5000002000, 5000001000, 0); /* ends before it starts */
  json_t *root = write_and_check(trace, 3);
  const json_t *event = find_event(root, "forward 12");
  ck_assert(json_real_value(json_object_get(event, "ts")) == 1.5);
  ck_assert(json_real_value(json_object_get(event, "dur")) == 2.5);
  ck_assert_ptr_null(json_object_get(event, "args"));
  event = find_event(root, "read \"weights\"\n");
  ck_assert(json_real_value(json_object_get(event, "ts")) == 0);
  ck_assert(json_real_value(json_object_get(event, "dur")) == 0.001);
  ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(event, "args"), "bytes")), 4096);
  event = find_event(root, "h2d 0");
  ck_assert(json_real_value(json_object_get(event, "ts")) == 2);
  ck_assert(json_real_value(json_object_get(event, "dur")) == 0);
  json_decref(root);
  flap_arena_close(&arena);
}
END_TEST

START_TEST(trace_full_counts_what_it_drops) {
  flap_trace *trace = open_trace(3);
  for (uint32_t i = 0; i < 10; i++)
    flap_trace_add(trace, FLAP_TRACE_H2D, "copy", i, i, i + 1, 1);
  ck_assert_uint_eq(flap_trace_count(trace), 3);
  ck_assert_uint_eq(flap_trace_dropped(trace), 7);
  json_t *root = write_and_check(trace, 3);
  ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(root, "otherData"), "dropped_events")), 7);
  json_decref(root);
  flap_trace_reset(trace);
  ck_assert_uint_eq(flap_trace_count(trace), 0);
  ck_assert_uint_eq(flap_trace_dropped(trace), 0);
  json_decref(write_and_check(trace, 0));
  flap_trace_add(trace, FLAP_TRACE_H2D, "copy", 0, 1, 2, 0);
  json_decref(write_and_check(trace, 1));
  flap_arena_close(&arena);
}
END_TEST

START_TEST(trace_without_memory_drops_or_does_nothing) {
  flap_arena measuring;
  flap_arena_measure(&measuring, "trace");
  ck_assert_ptr_null(flap_trace_open(&measuring, 100));
  ck_assert_uint_gt(flap_trace_measure(100), measuring.bytes_used - 1);
  flap_trace_add(NULL, FLAP_TRACE_H2D, "copy", 0, 1, 2, 0);
  flap_trace *trace = open_trace(0);
  flap_trace_add(trace, FLAP_TRACE_H2D, "copy", 0, 1, 2, 0);
  ck_assert_uint_eq(flap_trace_dropped(trace), 1);
  json_decref(write_and_check(trace, 0));
  flap_arena_close(&arena);
}
END_TEST

START_TEST(trace_taken_from_a_used_arena_fits_its_measure) {
  flap_arena used;
  uint64_t bytes = flap_trace_measure(5);
  OK(flap_arena_open(&used, "used", bytes + 1));
  (void)flap_arena_take(&used, 1, 1);
  ck_assert_ptr_nonnull(flap_trace_open(&used, 5));
  flap_arena_close(&used);
}
END_TEST

START_TEST(trace_random_events_are_laid_out_without_overlap) {
  enum { COUNT = 3000 };
  flap_philox stream = flap_philox_stream(11, "trace");
  flap_trace *trace = open_trace(COUNT);
  for (uint64_t i = 0; i < COUNT; i++) {
    uint64_t start = 1000000 + flap_philox_below(&stream, 3 * i, 2000000);
    flap_trace_add(trace, (flap_trace_lane)flap_philox_below(&stream, 3 * i + 1, FLAP_TRACE_LANE_COUNT), "event",
                   (uint32_t)i, start, start + flap_philox_below(&stream, 3 * i + 2, 20000), i);
  }
  json_decref(write_and_check(trace, COUNT));
  flap_arena_close(&arena);
}
END_TEST

START_TEST(trace_deeper_than_the_rows_is_still_whole) {
  flap_trace *trace = open_trace(200);
  for (uint32_t i = 0; i < 200; i++)
    flap_trace_add(trace, FLAP_TRACE_DISK_WRITE, "write", i, 10 + i, 100000 + i, 1);
  json_decref(write_and_check(trace, 200));
  flap_arena_close(&arena);
}
END_TEST

#define THREADS 4u
#define PER_THREAD 5000u

static void *add_many(void *argument) {
  for (uint32_t i = 0; i < PER_THREAD; i++)
    flap_trace_add(argument, FLAP_TRACE_HOST, "item", i, 10 * i + 1, 10 * i + 6, 0);
  return NULL;
}

START_TEST(trace_threads_add_and_write_at_once) {
  flap_trace *trace = open_trace(THREADS * PER_THREAD - 1000);
  pthread_t threads[THREADS];
  for (unsigned i = 0; i < THREADS; i++)
    ck_assert_int_eq(pthread_create(&threads[i], NULL, add_many, trace), 0);
  OK(flap_trace_write(trace, scratch_path(NAME)));
  json_t *early = json_load_file(scratch_path(NAME), 0, NULL);
  ck_assert_ptr_nonnull(early);
  json_decref(early);
  for (unsigned i = 0; i < THREADS; i++)
    ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
  ck_assert_uint_eq(flap_trace_count(trace), THREADS * PER_THREAD - 1000);
  ck_assert_uint_eq(flap_trace_dropped(trace), 1000);
  json_decref(write_and_check(trace, THREADS * PER_THREAD - 1000));
  flap_arena_close(&arena);
}
END_TEST

START_TEST(trace_write_on_full_disk_is_no_space_and_keeps_the_old) {
  flap_trace *trace = open_trace(1000);
  json_decref(write_and_check(trace, 0));
  for (uint32_t i = 0; i < 1000; i++)
    flap_trace_add(trace, FLAP_TRACE_D2H, "copy", i, i, i + 1, 1);
  scratch_limit(40000);
  flap_status status = flap_trace_write(trace, scratch_path(NAME));
  scratch_unlimit();
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert(scratch_error_has(NAME));
  json_t *old = json_load_file(scratch_path(NAME), 0, NULL);
  ck_assert_ptr_nonnull(old);
  json_decref(old);
  ck_assert_uint_eq(scratch_count(), 1);
  flap_arena_close(&arena);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("trace");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_test(tests, trace_empty_is_valid_and_names_the_lanes);
  tcase_add_test(tests, trace_events_have_relative_times_and_details);
  tcase_add_test(tests, trace_full_counts_what_it_drops);
  tcase_add_test(tests, trace_without_memory_drops_or_does_nothing);
  tcase_add_test(tests, trace_taken_from_a_used_arena_fits_its_measure);
  tcase_add_test(tests, trace_random_events_are_laid_out_without_overlap);
  tcase_add_test(tests, trace_deeper_than_the_rows_is_still_whole);
  tcase_add_test(tests, trace_threads_add_and_write_at_once);
  tcase_add_test(tests, trace_write_on_full_disk_is_no_space_and_keeps_the_old);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
