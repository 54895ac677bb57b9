/* Every request for memory fails in turn, and every start of a thread, and every open, pinning, copy and kernel of the
 * device, in a whole life of a tiny model. The linker sends the requests of FLAP's libraries here (--wrap); those of
 * jansson come by way of json_file.c. By itself the test takes a sample; FLAP_FAULTS_EVERY=1 takes all, and
 * FLAP_FAULT=<what a failure printed> one.
 */
#include "tests/device/device_faults.h"
#include "tests/reliability/fault_case.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SAMPLE 3u /* of each row and way, where not all are taken */

typedef enum memory_call { MEMORY_TAKE, MEMORY_MAP, MEMORY_THREAD, MEMORY_CALL_COUNT } memory_call;

typedef struct memory_plan {
  uint32_t call; /* of memory_call, then of device_call */
  bool for_ever;
  uint64_t number;
} memory_plan;

#define DEVICE_FIRST ((uint32_t)MEMORY_CALL_COUNT)
#define CALLS (DEVICE_FIRST + DEVICE_CALL_COUNT)
static const char *const names[CALLS] = {"memory", "map", "thread", "device-open", "pin", "copy", "kernel"};

static memory_plan plan;
static atomic_uint_fast64_t numbers[MEMORY_CALL_COUNT];
static atomic_bool memory_fired, armed;

static bool refused(memory_call call) {
  if (!atomic_load(&armed))
    return false;
  const uint64_t number = atomic_fetch_add(&numbers[call], 1) + 1;
  if (plan.number == 0 || plan.call != (uint32_t)call || number < plan.number ||
      (number > plan.number && !plan.for_ever))
    return false;
  atomic_store(&memory_fired, true);
  errno = ENOMEM;
  return true;
}

/* ---- what the linker puts in place ---------------------------------------------------------------------------- */

void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__real_aligned_alloc(size_t align, size_t bytes);
void *__wrap_aligned_alloc(size_t align, size_t bytes);
char *__real_strdup(const char *text);
char *__wrap_strdup(const char *text);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);

void *__wrap_malloc(size_t bytes) {
  return refused(MEMORY_TAKE) ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  return refused(MEMORY_TAKE) ? NULL : __real_calloc(count, bytes);
}

void *__wrap_realloc(void *memory, size_t bytes) {
  return refused(MEMORY_TAKE) ? NULL : __real_realloc(memory, bytes);
}

void *__wrap_aligned_alloc(size_t align, size_t bytes) {
  return refused(MEMORY_TAKE) ? NULL : __real_aligned_alloc(align, bytes);
}

char *__wrap_strdup(const char *text) {
  return refused(MEMORY_TAKE) ? NULL : __real_strdup(text);
}

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  return refused(MEMORY_MAP) ? MAP_FAILED : __real_mmap(at, bytes, protection, flags, fd, offset);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument) {
  return refused(MEMORY_THREAD) ? EAGAIN : __real_pthread_create(thread, attributes, main, argument);
}

/* ---- hooks --------------------------------------------------------------------------------------------------- */

static void before(const void *given) {
  plan = *(const memory_plan *)given;
  atomic_store(&memory_fired, false);
  for (int i = 0; i < MEMORY_CALL_COUNT; i++)
    atomic_store(&numbers[i], 0);
  device_faults_install(plan.call >= DEVICE_FIRST ? (device_call)(plan.call - DEVICE_FIRST) : DEVICE_CALL_OPEN,
                        plan.call >= DEVICE_FIRST ? plan.number : 0);
  atomic_store(&armed, true);
}

static void after(void) {
  atomic_store(&armed, false);
  device_faults_remove();
}

static bool fired(void) {
  return plan.call >= DEVICE_FIRST ? device_faults_count((device_call)(plan.call - DEVICE_FIRST)) >= plan.number
                                   : atomic_load(&memory_fired);
}

static const char *describe(const void *given) {
  static char text[64];
  const memory_plan *p = given;
  (void)snprintf(text, sizeof text, "%s:%s:%llu", names[p->call], p->for_ever ? "ever" : "once",
                 (unsigned long long)p->number);
  return text;
}

static bool is_right_status(const void *given, flap_status status) {
  const memory_plan *p = given;
  const bool broken = p->call == DEVICE_FIRST + DEVICE_CALL_COPY || p->call == DEVICE_FIRST + DEVICE_CALL_KERNEL;
  return status == (broken ? FLAP_DEVICE : FLAP_NO_MEMORY);
}

static const case_hooks hooks = {
    .before = before, .after = after, .fired = fired, .is_right_status = is_right_status, .describe = describe};

/* ---- the cases ----------------------------------------------------------------------------------------------- */

static uint64_t *counts;

static void count_calls(void *context) {
  before(&(memory_plan){0});
  const flap_status status = tiny_run_live(context);
  after();
  for (uint32_t i = 0; i < CALLS && status == FLAP_OK; i++)
    counts[i] = i >= DEVICE_FIRST ? device_faults_count((device_call)(i - DEVICE_FIRST)) : atomic_load(&numbers[i]);
}

static bool read_named(const char *text, memory_plan *plan_out) {
  char name[16], times[8];
  unsigned long long number;
  if (sscanf(text, "%15[^:]:%7[^:]:%llu", name, times, &number) != 3)
    return false;
  for (uint32_t i = 0; i < CALLS; i++)
    if (strcmp(name, names[i]) == 0) {
      *plan_out = (memory_plan){.call = i, .for_ever = strcmp(times, "ever") == 0, .number = number};
      return true;
    }
  return false;
}

static unsigned run_call(tiny_run *run, uint32_t call, case_totals *totals) {
  unsigned bad = 0;
  /* A device that failed is failed for good, so there is one way only. */
  for (uint32_t for_ever = 0; for_ever < (call < DEVICE_FIRST ? 2u : 1u); for_ever++) {
    case_numbers picked = case_pick(counts[call], SAMPLE, 2 * call + for_ever);
    for (uint64_t number; (number = case_next(&picked)) != 0;)
      bad += !case_run(run, &hooks, &(memory_plan){.call = call, .for_ever = for_ever, .number = number}, totals);
  }
  return bad;
}

/* All calls of [first, end). */
static void run_calls(tiny_kind kind, uint32_t first, uint32_t end) {
  memory_plan named;
  case_totals totals = {0};
  unsigned bad = 0;
  tiny_run *run = case_open(kind);
  counts = case_shared(CALLS * sizeof *counts);
  tiny_run_clear(run);
  ck_assert_int_eq(case_fork(count_calls, run, 60), 0);
  if (getenv("FLAP_FAULT") != NULL) {
    ck_assert_msg(read_named(getenv("FLAP_FAULT"), &named), "FLAP_FAULT=%s is not a fault", getenv("FLAP_FAULT"));
    if (named.call >= first && named.call < end)
      bad += !case_run(run, &hooks, &named, &totals);
  } else {
    for (uint32_t call = first; call < end; call++) {
      ck_assert_msg(counts[call] > 0, "a life makes no call of the kind %s", names[call]);
      bad += run_call(run, call, &totals);
      printf("  %s: %llu calls of a life\n", names[call], (unsigned long long)counts[call]);
    }
  }
  case_close(run);
  printf("seed %llu: %llu faults: %llu passed, %llu refused and repaired, %llu not reached, %u bad\n",
         (unsigned long long)case_seed(), (unsigned long long)totals.cases, (unsigned long long)totals.passed,
         (unsigned long long)totals.refused, (unsigned long long)totals.not_reached, bad);
  ck_assert_uint_eq(bad, 0);
  ck_assert(totals.not_reached <= totals.cases / 20 + 1 || getenv("FLAP_FAULT") != NULL);
}

START_TEST(fault_at_any_request_for_memory_is_refused_and_loses_nothing) {
  run_calls(TINY_IN_RAM, 0, DEVICE_FIRST);
}
END_TEST

START_TEST(fault_at_any_call_of_the_device_is_told_before_anything_is_saved) {
  run_calls(TINY_ON_DISK, DEVICE_FIRST, CALLS);
}
END_TEST

START_TEST(fault_at_any_call_of_a_device_that_holds_all_is_told_before_anything_is_saved) {
  run_calls(TINY_IN_RAM, DEVICE_FIRST, CALLS);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("reliability");
  TCase *tests = tcase_create("fault_memory");
  tcase_set_timeout(tests, 0); /* each case has its own limit */
  tcase_add_test(tests, fault_at_any_request_for_memory_is_refused_and_loses_nothing);
  tcase_add_test(tests, fault_at_any_call_of_the_device_is_told_before_anything_is_saved);
  tcase_add_test(tests, fault_at_any_call_of_a_device_that_holds_all_is_told_before_anything_is_saved);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
