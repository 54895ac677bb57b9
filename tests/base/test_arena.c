/* The arena: measuring counts what opening uses, and taking too much is caught. */
#include "base/arena.h"
#include "base/philox.h"

#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

/* A taking code as there are many: sizes and alignments from a seed. */
static void take_like_a_plan(flap_arena *arena, uint64_t seed, void **pointers, uint64_t *sizes, int count) {
  flap_philox stream = flap_philox_stream(seed, "arena");
  for (int i = 0; i < count; i++) {
    uint64_t align = (uint64_t)1 << flap_philox_below(&stream, (uint64_t)(2 * i), 22);
    sizes[i] = flap_philox_below(&stream, (uint64_t)(2 * i + 1), 20000);
    pointers[i] = flap_arena_take(arena, sizes[i], align);
    if (!flap_arena_is_measuring(arena))
      ck_assert_uint_eq((uintptr_t)pointers[i] % align, 0);
  }
}

START_TEST(arena_measured_equals_opened) {
  enum { COUNT = 40 };
  void *pointers[COUNT];
  uint64_t sizes[COUNT];
  for (uint64_t seed = 0; seed < 20; seed++) {
    flap_arena arena;
    flap_arena_measure(&arena, "test");
    ck_assert(flap_arena_is_measuring(&arena));
    take_like_a_plan(&arena, seed, pointers, sizes, COUNT);
    for (int i = 0; i < COUNT; i++)
      ck_assert_ptr_null(pointers[i]);
    uint64_t measured = arena.bytes_used;

    ck_assert_int_eq(flap_arena_open(&arena, "test", measured), FLAP_OK);
    take_like_a_plan(&arena, seed, pointers, sizes, COUNT);
    ck_assert_uint_eq(arena.bytes_used, measured);
    for (int i = 0; i < COUNT; i++) {
      uint64_t dirty = 0; /* counts what an overlapping run would have left here */
      for (uint64_t b = 0; b < sizes[i]; b++)
        dirty += ((unsigned char *)pointers[i])[b] != 0;
      ck_assert_uint_eq(dirty, 0);
      if (sizes[i] > 0)
        memset(pointers[i], 0xff, sizes[i]);
    }
    flap_arena_close(&arena);
  }
}
END_TEST

START_TEST(arena_open_too_large_names_itself) {
  flap_arena arena;
  ck_assert_int_eq(flap_arena_open(&arena, "ram", (uint64_t)1 << 60), FLAP_NO_MEMORY);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "ram"));
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "EiB"));
  ck_assert_int_eq(flap_arena_open(&arena, "ram", UINT64_MAX), FLAP_NO_MEMORY);
  flap_arena_close(&arena);
}
END_TEST

START_TEST(arena_borrowed_memory_is_used_and_not_freed) {
  _Alignas(64) static unsigned char memory[256];
  flap_arena arena;
  flap_arena_borrow(&arena, "test", memory, sizeof memory);
  uint32_t *array = FLAP_ARENA_ARRAY(&arena, uint32_t, 8);
  ck_assert_ptr_eq(array, memory);
  ck_assert_ptr_eq(flap_arena_take(&arena, 64, 64), memory + 64);
  ck_assert_uint_eq(arena.bytes_used, 128);
  flap_arena_close(&arena);
  memory[0] = 1;
}
END_TEST

START_TEST(arena_large_opening_is_zeroed_and_writable) {
  flap_arena arena;
  ck_assert_int_eq(flap_arena_open(&arena, "test", (uint64_t)65 << 20), FLAP_OK);
  unsigned char *pointer = flap_arena_take(&arena, (uint64_t)65 << 20, 4096);
  ck_assert_uint_eq(pointer[((uint64_t)65 << 20) - 1], 0);
  pointer[((uint64_t)65 << 20) - 1] = 1;
  flap_arena_close(&arena);
}
END_TEST

START_TEST(arena_take_past_the_end_asserts) {
  flap_arena arena;
  ck_assert_int_eq(flap_arena_open(&arena, "test", 100), FLAP_OK);
  (void)flap_arena_take(&arena, 100, 1);
  (void)flap_arena_take(&arena, 1, 1);
}
END_TEST

START_TEST(arena_take_after_seal_asserts) {
  flap_arena arena;
  ck_assert_int_eq(flap_arena_open(&arena, "test", 100), FLAP_OK);
  flap_arena_seal(&arena);
  (void)flap_arena_take(&arena, 1, 1);
}
END_TEST

START_TEST(arena_array_overflow_asserts) {
  flap_arena arena;
  flap_arena_measure(&arena, "test");
  (void)FLAP_ARENA_ARRAY(&arena, uint64_t, UINT64_MAX / 4);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("arena");
  tcase_add_test(tests, arena_measured_equals_opened);
  tcase_add_test(tests, arena_open_too_large_names_itself);
  tcase_add_test(tests, arena_borrowed_memory_is_used_and_not_freed);
  tcase_add_test(tests, arena_large_opening_is_zeroed_and_writable);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  if (srunner_fork_status(runner) == CK_FORK) {
    tcase_add_test_raise_signal(tests, arena_take_past_the_end_asserts, SIGABRT);
    tcase_add_test_raise_signal(tests, arena_take_after_seal_asserts, SIGABRT);
    tcase_add_test_raise_signal(tests, arena_array_overflow_asserts, SIGABRT);
  }
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
