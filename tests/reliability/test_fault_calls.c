/* Every system call on a file fails in turn: open, read, write, sync, rename ..., with each error, once and for ever,
 * in a whole life of a tiny model. By itself it takes a sample of the calls, from a seed; FLAP_FAULTS_EVERY=1 takes
 * all, and FLAP_FAULT=<what a failure printed> one.
 */
#include "tests/reliability/fault_calls.h"
#include "tests/reliability/fault_case.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SAMPLE 1u /* of each row and way, where not all are taken */
#if defined(__SANITIZE_ADDRESS__)
#define ROW_STRIDE 3u /* several times slower: a third of the rows, by the seed */
#else
#define ROW_STRIDE 1u
#endif

typedef struct fault_row {
  fault_call call;
  fault_kind kind;
  bool once_passes; /* happening once, it must not be noticed */
} fault_row;

static const fault_row rows[] = {
    {FAULT_CALL_OPEN, FAULT_EIO, false},           {FAULT_CALL_OPEN, FAULT_EMFILE, false},
    {FAULT_CALL_OPEN, FAULT_ENOSPC, false},        {FAULT_CALL_OPEN, FAULT_EINTR, true},
    {FAULT_CALL_CLOSE, FAULT_EIO, false},          {FAULT_CALL_CLOSE, FAULT_EINTR, true},
    {FAULT_CALL_READ, FAULT_EIO, false},           {FAULT_CALL_READ, FAULT_EINTR, true},
    {FAULT_CALL_READ, FAULT_SHORT, true},          {FAULT_CALL_WRITE, FAULT_EIO, false},
    {FAULT_CALL_WRITE, FAULT_ENOSPC, false},       {FAULT_CALL_WRITE, FAULT_EINTR, true},
    {FAULT_CALL_WRITE, FAULT_SHORT, true},         {FAULT_CALL_SYNC, FAULT_EIO, false},
    {FAULT_CALL_SYNC, FAULT_ENOSPC, false},        {FAULT_CALL_SYNC, FAULT_EINTR, true},
    {FAULT_CALL_TRUNCATE, FAULT_EIO, false},       {FAULT_CALL_RENAME, FAULT_EIO, false},
    {FAULT_CALL_RENAME, FAULT_ENOSPC, false},      {FAULT_CALL_RENAME, FAULT_EINTR, true},
    {FAULT_CALL_REMOVE, FAULT_EIO, false},         {FAULT_CALL_REMOVE, FAULT_EINTR, true},
    {FAULT_CALL_MKDIR, FAULT_EIO, false},          {FAULT_CALL_MKDIR, FAULT_ENOSPC, false},
    {FAULT_CALL_MKDIR, FAULT_EINTR, true},         {FAULT_CALL_STAT, FAULT_EIO, false},
    {FAULT_CALL_STAT, FAULT_EINTR, true},          {FAULT_CALL_ALLOCATE, FAULT_EIO, false},
    {FAULT_CALL_ALLOCATE, FAULT_ENOSPC, false},    {FAULT_CALL_ALLOCATE, FAULT_EINTR, true},
    {FAULT_CALL_ALLOCATE, FAULT_EOPNOTSUPP, true},
};
static const fault_row disk_rows[] = {
    {FAULT_CALL_EXTENT_READ, FAULT_EIO, false},
    {FAULT_CALL_EXTENT_READ, FAULT_EINTR, true},
    {FAULT_CALL_EXTENT_READ, FAULT_SHORT, true},
    {FAULT_CALL_EXTENT_WRITE, FAULT_EIO, false},
    {FAULT_CALL_EXTENT_WRITE, FAULT_ENOSPC, false},
    {FAULT_CALL_EXTENT_WRITE, FAULT_EINTR, true},
    {FAULT_CALL_EXTENT_WRITE, FAULT_SHORT, true},
    {FAULT_CALL_EXTENT_READ, FAULT_FLIP, true},
    {FAULT_CALL_EXTENT_WRITE, FAULT_LOSE, false},
    {FAULT_CALL_ALLOCATE, FAULT_EIO, false},
    {FAULT_CALL_ALLOCATE, FAULT_ENOSPC, false},
    {FAULT_CALL_ALLOCATE, FAULT_EINTR, true},
    {FAULT_CALL_ALLOCATE, FAULT_EOPNOTSUPP, true},
    /* checkpoints share extents: the first link only tries whether that can be, and then they are copied */
    {FAULT_CALL_LINK, FAULT_EIO, false},
    {FAULT_CALL_LINK, FAULT_ENOSPC, false},
    {FAULT_CALL_LINK, FAULT_EMLINK, false},
    {FAULT_CALL_LINK, FAULT_EOPNOTSUPP, false},
    {FAULT_CALL_LINK, FAULT_EINTR, true},
    {FAULT_CALL_OPEN, FAULT_EMFILE, false},
    {FAULT_CALL_SYNC, FAULT_EIO, false},
    {FAULT_CALL_REMOVE, FAULT_EIO, false},
    {FAULT_CALL_PAGES_READ, FAULT_EIO, false},
    {FAULT_CALL_PAGES_READ, FAULT_EINTR, true},
    {FAULT_CALL_PAGES_READ, FAULT_SHORT, true},
    {FAULT_CALL_PAGES_READ, FAULT_FLIP, true},
};
/* Where they do not share them, saving reads them. */
static const fault_row copied_rows[] = {
    {FAULT_CALL_EXTENT_READ, FAULT_EIO, false},
    {FAULT_CALL_EXTENT_READ, FAULT_FLIP, true},
    {FAULT_CALL_EXTENT_WRITE, FAULT_EIO, false},
    {FAULT_CALL_EXTENT_WRITE, FAULT_LOSE, false},
};
static const fault_row uring_rows[] = {
    {FAULT_CALL_EXTENT_READ, FAULT_EIO, false},     {FAULT_CALL_EXTENT_READ, FAULT_SHORT, true},
    {FAULT_CALL_EXTENT_READ, FAULT_FLIP, true},     {FAULT_CALL_EXTENT_WRITE, FAULT_EIO, false},
    {FAULT_CALL_EXTENT_WRITE, FAULT_ENOSPC, false}, {FAULT_CALL_EXTENT_WRITE, FAULT_EINTR, true},
};
#define COUNT(array) (sizeof(array) / sizeof *(array))

static void before(const void *plan) {
  fault_calls_install(plan);
}

static bool is_right_status(const void *given, flap_status status) {
  const fault_plan *plan = given;
  if (plan->kind == FAULT_FLIP || plan->kind == FAULT_LOSE)
    return status == FLAP_CORRUPT;
  return status == (plan->kind == FAULT_ENOSPC ? FLAP_NO_SPACE : FLAP_IO);
}

static const char *describe(const void *plan) {
  return fault_plan_write(plan);
}

static const uint64_t *counts; /* of the calls of a life */

static bool run_plan(tiny_run *run, const fault_row *row, const fault_plan *plan, case_totals *totals) {
  /* Half a block for ever is no progress where transfers are of whole blocks. */
  const bool of_disk = plan->call >= FAULT_CALL_PAGES_READ;
  /* A file system that cannot reserve, or where checkpoints would share extents, if it is like that from the start. */
  const bool another_way = plan->kind == FAULT_EOPNOTSUPP, from_start = plan->for_ever && plan->number == 1;
  const bool shares = run->kind == TINY_ON_DISK || run->kind == TINY_ON_URING;
  const bool whole = another_way && shares ? from_start
                                           : row->once_passes && (!plan->for_ever || another_way ||
                                                                  (plan->kind == FAULT_SHORT && !of_disk));
  const case_hooks hooks = {.before = before,
                            .after = fault_calls_remove,
                            .fired = fault_calls_fired,
                            .is_right_status = is_right_status,
                            .names_a_path = true,
                            .must_pass = whole,
                            .describe = describe};
  run->removals_fail = plan->call == FAULT_CALL_REMOVE && plan->for_ever;
  return case_run(run, &hooks, plan, totals);
}

static unsigned run_row(tiny_run *run, const fault_row *row, uint64_t salt, case_totals *totals) {
  unsigned bad = 0;
  if (row->kind == FAULT_EOPNOTSUPP)
    bad +=
        !run_plan(run, row, &(fault_plan){.call = row->call, .kind = row->kind, .number = 1, .for_ever = true}, totals);
  for (int for_ever = 0; for_ever < 2; for_ever++) {
    case_numbers numbers = case_pick(counts[row->call], SAMPLE, 2 * salt + (unsigned)for_ever);
    for (uint64_t number; (number = case_next(&numbers)) != 0;)
      bad += !run_plan(run, row,
                       &(fault_plan){.call = row->call, .kind = row->kind, .number = number, .for_ever = for_ever},
                       totals);
  }
  return bad;
}

/* The one that FLAP_FAULT names, as often as wanted. */
static bool run_named(tiny_run *run, const fault_row *from, size_t count, case_totals *totals, unsigned *bad) {
  const char *named = getenv("FLAP_FAULT");
  fault_plan plan;
  if (named == NULL)
    return false;
  ck_assert_msg(fault_plan_read(named, &plan), "FLAP_FAULT=%s is not a fault", named);
  for (size_t i = 0; i < count; i++)
    if (from[i].call == plan.call && from[i].kind == plan.kind)
      *bad += !run_plan(run, &from[i], &plan, totals);
  return true;
}

static void run_rows(tiny_kind kind, const fault_row *from, size_t count) {
  case_totals totals = {0};
  unsigned bad = 0;
  uint64_t calls = 0;
  tiny_run *run = case_open(kind);
  counts = fault_calls_of_life(run);
  ck_assert_ptr_nonnull(counts);
  if (!run_named(run, from, count, &totals, &bad))
    for (size_t i = case_seed() % ROW_STRIDE; i < count; i += ROW_STRIDE) {
      bad += run_row(run, &from[i], i, &totals);
      calls += i < ROW_STRIDE || from[i].call != from[i - ROW_STRIDE].call ? counts[from[i].call] : 0;
    }
  case_close(run);
  printf("seed %llu: %llu faults in %llu calls of a life: %llu passed, %llu refused and repaired, %llu not "
         "reached, %u bad\n",
         (unsigned long long)case_seed(), (unsigned long long)totals.cases, (unsigned long long)calls,
         (unsigned long long)totals.passed, (unsigned long long)totals.refused, (unsigned long long)totals.not_reached,
         bad);
  ck_assert_uint_eq(bad, 0);
  if (getenv("FLAP_FAULT") == NULL) {
    ck_assert_uint_gt(totals.cases, 0);
    /* The thread that reads ahead may get one batch further, or less far. */
    ck_assert_uint_le(totals.not_reached, totals.cases / 20 + 1);
  }
}

START_TEST(fault_at_any_call_on_a_file_is_retried_or_refused_and_loses_nothing) {
  run_rows(TINY_IN_RAM, rows, COUNT(rows));
}
END_TEST

START_TEST(fault_at_any_transfer_of_a_disk_is_retried_or_refused_and_loses_nothing) {
  run_rows(TINY_ON_DISK, disk_rows, COUNT(disk_rows));
}
END_TEST

START_TEST(fault_at_any_transfer_of_a_disk_that_is_copied_is_retried_or_refused_and_loses_nothing) {
  run_rows(TINY_COPIED, copied_rows, COUNT(copied_rows));
}
END_TEST

START_TEST(fault_at_any_transfer_of_io_uring_is_retried_or_refused_and_loses_nothing) {
  run_rows(TINY_ON_URING, uring_rows, COUNT(uring_rows));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("reliability");
  TCase *tests = tcase_create("fault_calls");
  tcase_set_timeout(tests, 0); /* each case has its own limit */
  tcase_add_test(tests, fault_at_any_call_on_a_file_is_retried_or_refused_and_loses_nothing);
  tcase_add_test(tests, fault_at_any_transfer_of_a_disk_is_retried_or_refused_and_loses_nothing);
  tcase_add_test(tests, fault_at_any_transfer_of_a_disk_that_is_copied_is_retried_or_refused_and_loses_nothing);
  tcase_add_test(tests, fault_at_any_transfer_of_io_uring_is_retried_or_refused_and_loses_nothing);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
