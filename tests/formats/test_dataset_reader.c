/* The reader hands out what fetch would, from any cursor, with nothing allocated after open, and passes errors on. */
#include "io/formats/dataset_reader.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOKENS = 5000, LENGTH = 16, SEQUENCES = 5, DEPTH = 3 };

/* Allocations of any thread, by our code (the linker's --wrap). */
static atomic_uint allocations;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);

void *__wrap_malloc(size_t bytes) {
  (void)atomic_fetch_add(&allocations, 1);
  return __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  (void)atomic_fetch_add(&allocations, 1);
  return __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
  (void)atomic_fetch_add(&allocations, 1);
  return __real_realloc(old, bytes);
}

static flap_dataset *dataset;
static flap_arena arena;
static flap_reader_config config;

static void write_tokens(uint32_t count) {
  int32_t header[256] = {20240801, 7, (int32_t)count};
  char *file = malloc(sizeof header + 4 * (size_t)count);
  memcpy(file, header, sizeof header);
  for (uint32_t i = 0; i < count; i++)
    memcpy(file + sizeof header + 4 * i, &i, 4);
  scratch_write("t.bin", file, sizeof header + 4 * (size_t)count);
  free(file);
}

static void setup(void) {
  scratch_setup();
  write_tokens(TOKENS);
  const char *path = scratch_path("t.bin");
  const flap_dataset_config data = {
      .paths = &path, .path_count = 1, .vocabulary = TOKENS, .sequence_length = LENGTH, .seed = 3, .val_size = 0.1};
  ck_assert_msg(flap_dataset_open(&data, &dataset) == FLAP_OK, "%s", flap_error_message());
  config = (flap_reader_config){
      .dataset = dataset, .sequence_length = LENGTH, .sequences = SEQUENCES, .depth = DEPTH, .cursor = 0};
  ck_assert_int_eq(flap_arena_open(&arena, "test", flap_reader_measure(&config)), FLAP_OK);
}

static void teardown(void) {
  flap_arena_close(&arena);
  flap_dataset_close(dataset);
  scratch_teardown();
}

static flap_reader *open_reader(uint64_t cursor) {
  flap_reader *reader;
  config.cursor = cursor;
  ck_assert_msg(flap_reader_open(&config, &arena, &reader) == FLAP_OK, "%s", flap_error_message());
  ck_assert_ptr_nonnull(reader);
  flap_arena_seal(&arena);
  return reader;
}

static void assert_next_is(flap_reader *reader, uint64_t cursor) {
  static int32_t tokens[SEQUENCES * LENGTH], targets[SEQUENCES * LENGTH];
  const int32_t *got_tokens, *got_targets;
  ck_assert_uint_eq(flap_reader_cursor(reader), cursor);
  ck_assert_msg(flap_reader_next(reader, &got_tokens, &got_targets) == FLAP_OK, "%s", flap_error_message());
  ck_assert_int_eq(flap_dataset_fetch(dataset, cursor, SEQUENCES, tokens, targets), FLAP_OK);
  ck_assert_mem_eq(got_tokens, tokens, sizeof tokens);
  ck_assert_mem_eq(got_targets, targets, sizeof targets);
  ck_assert_uint_eq(flap_reader_cursor(reader), cursor + SEQUENCES);
}

START_TEST(reader_batches_follow_the_cursor_over_epochs) {
  flap_reader *reader = open_reader(0);
  for (uint64_t cursor = 0; cursor < 3 * flap_dataset_sequences(dataset); cursor += SEQUENCES)
    assert_next_is(reader, cursor);
  flap_reader_close(reader);
}
END_TEST

START_TEST(reader_resumed_at_any_cursor_gives_the_same_batches) {
  const uint64_t bytes = flap_reader_measure(&config);
  for (uint64_t i = 0; i < 300; i++) {
    const uint64_t cursor = i * i * 7;
    flap_reader *reader = open_reader(cursor);
    for (uint64_t k = 0; k < i % 5; k++)
      assert_next_is(reader, cursor + k * SEQUENCES);
    flap_reader_close(reader);
    flap_arena_close(&arena);
    ck_assert_int_eq(flap_arena_open(&arena, "test", bytes), FLAP_OK);
  }
}
END_TEST

START_TEST(reader_measure_is_what_open_takes) {
  flap_arena measuring;
  flap_reader *reader = (flap_reader *)&arena;
  flap_arena_measure(&measuring, "measuring");
  flap_reader_config without = config;
  without.dataset = NULL;
  ck_assert_int_eq(flap_reader_open(&without, &measuring, &reader), FLAP_OK);
  ck_assert_ptr_null(reader);
  ck_assert_uint_eq(flap_reader_measure(&config), (measuring.bytes_used + 63) / 64 * 64);
  reader = open_reader(0);
  ck_assert_uint_eq(arena.bytes_used, measuring.bytes_used);
  flap_reader_close(reader);
}
END_TEST

START_TEST(reader_allocates_nothing_after_open) {
  ck_assert_uint_gt(atomic_load(&allocations), 0); /* the wrapping works: opening the dataset allocated */
  flap_reader *reader = open_reader(0);
  const int32_t *tokens, *targets;
  unsigned before = atomic_load(&allocations);
  flap_status status = FLAP_OK;
  for (uint64_t i = 0; i < 1000 && status == FLAP_OK; i++)
    status = flap_reader_next(reader, &tokens, &targets);
  flap_reader_close(reader);
  unsigned after = atomic_load(&allocations);
  ck_assert_int_eq(status, FLAP_OK);
  ck_assert_uint_eq(before, after);
}
END_TEST

START_TEST(reader_truncated_file_is_an_error_of_next) {
  flap_reader *reader = open_reader(0);
  assert_next_is(reader, 0);
  ck_assert_int_eq(truncate(scratch_path("t.bin"), 1024), 0);
  const int32_t *tokens, *targets;
  flap_status status = FLAP_OK;
  /* Batches that were ready are still good. */
  uint64_t cursor = SEQUENCES;
  for (int i = 0; i < DEPTH + 1 && status == FLAP_OK; i++) {
    ck_assert_uint_eq(flap_reader_cursor(reader), cursor);
    status = flap_reader_next(reader, &tokens, &targets);
    cursor += SEQUENCES;
  }
  ck_assert_int_eq(status, FLAP_CORRUPT);
  ck_assert(scratch_error_has("t.bin"));
  ck_assert_ptr_null(tokens);
  cursor = flap_reader_cursor(reader);
  ck_assert_int_eq(flap_reader_next(reader, &tokens, &targets), FLAP_CORRUPT);
  ck_assert_uint_eq(flap_reader_cursor(reader), cursor);
  /* The file comes back; what is read ahead may have met it half written. */
  write_tokens(TOKENS);
  for (int i = 0; i < DEPTH + 1; i++, cursor += SEQUENCES)
    while (flap_reader_next(reader, &tokens, &targets) != FLAP_OK)
      ck_assert_uint_eq(flap_reader_cursor(reader), cursor);
  assert_next_is(reader, cursor);
  flap_reader_close(reader);
}
END_TEST

START_TEST(reader_closed_at_once_stops) {
  flap_reader_close(open_reader(99));
  flap_reader_close(NULL);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *cases = tcase_create("dataset_reader");
  tcase_set_timeout(cases, 60);
  tcase_add_checked_fixture(cases, setup, teardown);
  tcase_add_test(cases, reader_batches_follow_the_cursor_over_epochs);
  tcase_add_test(cases, reader_resumed_at_any_cursor_gives_the_same_batches);
  tcase_add_test(cases, reader_measure_is_what_open_takes);
  tcase_add_test(cases, reader_allocates_nothing_after_open);
  tcase_add_test(cases, reader_truncated_file_is_an_error_of_next);
  tcase_add_test(cases, reader_closed_at_once_stops);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed != 0;
}
