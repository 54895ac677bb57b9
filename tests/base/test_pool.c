/* The pool: every item once, no two at a time on one worker, over many runs and pauses. */
#include "base/pool.h"

#include "base/units.h"

#include <check.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ITEMS_MAX 3000

typedef struct ledger {
  atomic_uint runs[ITEMS_MAX];
  atomic_bool busy[FLAP_POOL_THREADS_MAX];
  atomic_uint clashes, strangers;
  uint32_t threads;
  uint64_t plain[ITEMS_MAX]; /* not atomic on purpose: the thread sanitizer watches who writes it when */
} ledger;

static void note_item(void *context, uint64_t item, uint32_t worker) {
  ledger *book = context;
  if (worker >= book->threads) {
    atomic_fetch_add(&book->strangers, 1);
    return;
  }
  if (atomic_exchange(&book->busy[worker], true))
    atomic_fetch_add(&book->clashes, 1);
  atomic_fetch_add(&book->runs[item], 1);
  book->plain[item]++;
  atomic_store(&book->busy[worker], false);
}

static void check_many_runs(uint32_t threads, int runs) {
  ledger *book = calloc(1, sizeof *book);
  flap_pool *pool = NULL;
  ck_assert_int_eq(flap_pool_open(threads, &pool), FLAP_OK);
  ck_assert_uint_eq(flap_pool_threads(pool), threads);
  book->threads = threads;
  uint64_t expected[ITEMS_MAX] = {0};
  for (int run = 0; run < runs; run++) {
    uint64_t items = (uint64_t)(run * 7919) % (run % 10 == 0 ? ITEMS_MAX : 12);
    flap_pool_run(pool, items, note_item, book);
    for (uint64_t i = 0; i < items; i++)
      expected[i]++;
    if (run % 100 == 99)
      usleep(200); /* long enough that the workers sleep */
    if (run % 100 == 0)
      for (uint64_t i = 0; i < ITEMS_MAX; i++)
        ck_assert_uint_eq(book->plain[i], expected[i]);
  }
  for (uint64_t i = 0; i < ITEMS_MAX; i++)
    ck_assert_uint_eq(atomic_load(&book->runs[i]), expected[i]);
  ck_assert_uint_eq(atomic_load(&book->clashes), 0);
  ck_assert_uint_eq(atomic_load(&book->strangers), 0);
  flap_pool_close(pool);
  free(book);
}

START_TEST(pool_many_runs_every_item_once) {
  check_many_runs(1, 500);
  check_many_runs(2, 3000);
  check_many_runs(5, 3000);
  check_many_runs(16, 600);
}
END_TEST

static void sleep_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  atomic_uint *awake = context;
  unsigned now = atomic_fetch_add(&awake[0], 1) + 1;
  unsigned most = atomic_load(&awake[1]);
  while (now > most && !atomic_compare_exchange_weak(&awake[1], &most, now))
    ;
  usleep(item == 0 ? 20000 : 5000);
  atomic_fetch_sub(&awake[0], 1);
}

START_TEST(pool_items_overlap_and_the_run_waits_for_the_last) {
  flap_pool *pool = NULL;
  ck_assert_int_eq(flap_pool_open(4, &pool), FLAP_OK);
  atomic_uint awake[2] = {0, 0};
  for (int run = 0; run < 5; run++) {
    flap_pool_run(pool, 8, sleep_item, awake);
    ck_assert_uint_eq(atomic_load(&awake[0]), 0);
  }
  ck_assert_uint_ge(atomic_load(&awake[1]), 2);
  flap_pool_close(pool);
}
END_TEST

START_TEST(pool_run_allocates_nothing) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  ledger *book = calloc(1, sizeof *book);
  flap_pool *pool = NULL;
  ck_assert_int_eq(flap_pool_open(4, &pool), FLAP_OK);
  book->threads = 4;
  flap_pool_run(pool, 100, note_item, book);
  struct mallinfo2 before = mallinfo2();
  for (int run = 0; run < 100; run++)
    flap_pool_run(pool, 100, note_item, book);
  struct mallinfo2 after = mallinfo2();
  ck_assert_uint_eq(before.uordblks, after.uordblks);
  ck_assert_uint_eq(before.arena, after.arena);
  flap_pool_close(pool);
  free(book);
#endif
}
END_TEST

START_TEST(pool_open_takes_all_cores_and_refuses_too_many) {
  flap_pool *pool = NULL;
  ck_assert_int_eq(flap_pool_open(0, &pool), FLAP_OK);
  ck_assert_uint_ge(flap_pool_threads(pool), 1);
  flap_pool_close(pool);
  ck_assert_int_eq(flap_pool_open(FLAP_POOL_THREADS_MAX + 1, &pool), FLAP_INVALID);
  ck_assert_ptr_null(pool);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "257"));
  flap_pool_close(NULL);
}
END_TEST

START_TEST(pool_open_close_repeats) {
  for (int i = 0; i < 200; i++) {
    flap_pool *pool = NULL;
    ck_assert_int_eq(flap_pool_open((uint32_t)(i % 6 + 1), &pool), FLAP_OK);
    flap_pool_close(pool);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("pool");
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, pool_many_runs_every_item_once);
  tcase_add_test(tests, pool_items_overlap_and_the_run_waits_for_the_last);
  tcase_add_test(tests, pool_run_allocates_nothing);
  tcase_add_test(tests, pool_open_takes_all_cores_and_refuses_too_many);
  tcase_add_test(tests, pool_open_close_repeats);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
