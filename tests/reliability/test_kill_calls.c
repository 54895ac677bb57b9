/* The process ends, as by kill -9, at every place where it changes something on a disk: before each write, sync,
 * rename, removal, creation and transfer to an extent file, and in the middle of each write. Then the same command
 * again must end with the same bits, and go on from the last checkpoint that was said to be saved. By itself it takes a
 * sample; FLAP_FAULTS_EVERY=1 takes all, and FLAP_FAULT=<what a failure printed> one.
 *
 * And it ends in the repair, too: recovery may be killed as well.
 */
#include "tests/reliability/fault_calls.h"
#include "tests/reliability/fault_case.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of each way, where not all are taken. */
#if defined(__SANITIZE_ADDRESS__)
#define SAMPLE 4u
#else
#define SAMPLE 8u
#endif

typedef struct kill_plan {
  fault_plan life, repair; /* of the latter number 0: it is left alone */
} kill_plan;

static void before(const void *plan) {
  fault_calls_install(&((const kill_plan *)plan)->life);
}

static void before_repair(const void *plan) {
  fault_calls_install(&((const kill_plan *)plan)->repair);
}

static bool is_right_status(const void *plan, flap_status status) {
  (void)plan;
  return status == FLAP_OK; /* whoever is killed returns nothing */
}

static const char *describe(const void *plan) {
  static char text[160];
  const kill_plan *p = plan;
  const size_t length = (size_t)snprintf(text, sizeof text, "%s", fault_plan_write(&p->life));
  if (p->repair.number > 0)
    (void)snprintf(text + length, sizeof text - length, ",%s", fault_plan_write(&p->repair));
  return text;
}

static bool read_named(const char *text, kill_plan *plan_out) {
  char life[80];
  const char *comma = strchr(text, ',');
  *plan_out = (kill_plan){0};
  if (comma == NULL)
    return fault_plan_read(text, &plan_out->life);
  (void)snprintf(life, sizeof life, "%.*s", (int)(comma - text), text);
  return fault_plan_read(life, &plan_out->life) && fault_plan_read(comma + 1, &plan_out->repair);
}

static const case_hooks hooks = {.before = before,
                                 .after = fault_calls_remove,
                                 .fired = fault_calls_fired,
                                 .is_right_status = is_right_status,
                                 .must_pass = true,
                                 .may_end = true,
                                 .describe = describe};

static uint64_t changes; /* of anything on a disk, in a life */

static bool run_plan(tiny_run *run, const kill_plan *plan, case_totals *totals) {
  case_hooks now = hooks;
  now.before_repair = plan->repair.number > 0 ? before_repair : NULL;
  return case_run(run, &now, plan, totals);
}

/* One death each, whole and torn; then pairs, where the repair dies too, at a place that follows from the seed. */
static unsigned kill_all(tiny_run *run, tiny_kind kind, case_totals *totals) {
  unsigned bad = 0;
  for (uint64_t way = 0; way < 3; way++) {
    case_numbers numbers = case_pick(changes, way < 2 ? SAMPLE : SAMPLE / 2, 3 * (uint64_t)kind + way);
    const fault_kind dies = way == 1 ? FAULT_KILL_TORN : FAULT_KILL;
    kill_plan plan = {.life = {.call = FAULT_CALL_CHANGE, .kind = dies},
                      .repair = {.call = FAULT_CALL_CHANGE, .kind = dies}};
    while ((plan.life.number = case_next(&numbers)) != 0) {
      plan.repair.number = way < 2 ? 0 : 1 + plan.life.number * 7919 % (changes * 2 / 3);
      bad += !run_plan(run, &plan, totals);
    }
  }
  return bad;
}

static void kill_everywhere(tiny_kind kind) {
  case_totals totals = {0};
  unsigned bad = 0;
  kill_plan plan;
  tiny_run *run = case_open(kind);
  const uint64_t *counts = fault_calls_of_life(run);
  ck_assert_ptr_nonnull(counts);
  changes = counts[FAULT_CALL_CHANGE];
  ck_assert_uint_gt(changes, 0);
  if (getenv("FLAP_FAULT") != NULL) {
    ck_assert(read_named(getenv("FLAP_FAULT"), &plan));
    bad += !run_plan(run, &plan, &totals);
  } else {
    bad = kill_all(run, kind, &totals);
  }
  case_close(run);
  printf("seed %llu: killed %llu times, at places out of %llu, whole, torn, or with its repair: %u bad\n",
         (unsigned long long)case_seed(), (unsigned long long)totals.killed, (unsigned long long)changes, bad);
  ck_assert_uint_eq(bad, 0);
  if (getenv("FLAP_FAULT") == NULL)
    ck_assert_uint_eq(totals.killed, totals.cases);
}

START_TEST(kill_at_any_change_of_files_loses_only_what_was_not_saved) {
  kill_everywhere(TINY_IN_RAM);
}
END_TEST

START_TEST(kill_at_any_change_loses_only_what_was_not_saved_where_data_stream_from_disk) {
  kill_everywhere(TINY_ON_DISK);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("reliability");
  TCase *tests = tcase_create("kill_calls");
  tcase_set_timeout(tests, 0); /* each case has its own limit */
  tcase_add_test(tests, kill_at_any_change_of_files_loses_only_what_was_not_saved);
  tcase_add_test(tests, kill_at_any_change_loses_only_what_was_not_saved_where_data_stream_from_disk);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
