/* With one thread and with several the planner looks at the same candidates, simulates the same ones in the same order,
 * and comes to the same plan, or the same refusal. */
#include "tests/engine/planner_trials.h"

#include "base/log.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TRIALS 3u
#else
#define TRIALS 16u
#endif
#define LOG_BYTES (1u << 20)
#define MESSAGE_BYTES 1024

/* Threads that are refused, and memory that is refused to all threads but the first. */
static bool threads_fail, memory_fails;
static pthread_t first_thread;

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument) {
  return threads_fail ? EAGAIN : __real_pthread_create(thread, attributes, main, argument);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  return memory_fails && !pthread_equal(pthread_self(), first_thread) ? NULL : __real_calloc(count, bytes);
}

typedef struct outcome {
  flap_status status;
  flap_choice choice;
  uint64_t vram_bytes, ram_bytes, disk_bytes;
  flap_plan_costs costs;
  char message[MESSAGE_BYTES];
  char *log; /* what it tells on the way */
} outcome;

static uint64_t first_seed(void) {
  const char *text = getenv("FLAP_TEST_SEED");
  return text != NULL ? strtoull(text, NULL, 10) : 1;
}

/* Lines for people are written to the descriptor of stderr. */
static int begin_log(FILE *file) {
  const int before = dup(STDERR_FILENO);
  ck_assert_int_ge(before, 0);
  ck_assert_int_ge(dup2(fileno(file), STDERR_FILENO), 0);
  flap_log_set_level(FLAP_LOG_DEBUG);
  return before;
}

static char *end_log(FILE *file, int before) {
  char *text = calloc(1, LOG_BYTES);
  ck_assert_ptr_nonnull(text);
  flap_log_set_level(FLAP_LOG_INFO);
  ck_assert_int_ge(dup2(before, STDERR_FILENO), 0);
  (void)close(before);
  rewind(file);
  const size_t length = fread(text, 1, LOG_BYTES - 1, file);
  ck_assert_uint_lt(length, LOG_BYTES - 1);
  (void)fclose(file);
  return text;
}

static void plan(const planner_trial *trial, uint32_t threads, outcome *out) {
  flap_planner planner = trial->planner;
  flap_setup setup;
  FILE *file = tmpfile();
  ck_assert_ptr_nonnull(file);
  memset(out, 0, sizeof *out);
  planner.expert.threads = threads;
  const int before = begin_log(file);
  out->status = flap_planner_choose(&planner, &trial->budgets, &setup, &out->costs);
  out->log = end_log(file, before);
  if (out->status != FLAP_OK) {
    (void)snprintf(out->message, sizeof out->message, "%s", flap_error_message());
    out->costs = (flap_plan_costs){0};
    return;
  }
  out->choice = setup.choice;
  out->vram_bytes = setup.vram_bytes;
  out->ram_bytes = setup.ram_bytes;
  out->disk_bytes = setup.disk_bytes;
  flap_setup_close(&setup);
}

static void compare(const planner_trial *trial, const outcome *one, const outcome *many) {
  if (strcmp(one->log, many->log) != 0) /* too long for a message of Check's */
    printf("with one thread\n%s\nwith several\n%s\n", one->log, many->log);
  ck_assert_msg(strcmp(one->log, many->log) == 0, "%s: others were simulated", trial->words);
  ck_assert_int_eq(one->status, many->status);
  ck_assert_str_eq(one->message, many->message);
  ck_assert_mem_eq(&one->costs, &many->costs, sizeof one->costs);
  ck_assert_uint_eq(one->vram_bytes, many->vram_bytes);
  ck_assert_uint_eq(one->ram_bytes, many->ram_bytes);
  ck_assert_uint_eq(one->disk_bytes, many->disk_bytes);
  ck_assert_uint_eq(one->choice.slice_elements, many->choice.slice_elements);
  ck_assert_uint_eq(one->choice.page_bytes, many->choice.page_bytes);
  ck_assert_uint_eq(one->choice.staging_bytes, many->choice.staging_bytes);
  ck_assert_mem_eq(one->choice.extra_slots, many->choice.extra_slots, sizeof one->choice.extra_slots);
  ck_assert_mem_eq(one->choice.resident_bytes, many->choice.resident_bytes, sizeof one->choice.resident_bytes);
}

START_TEST(a_plan_does_not_depend_on_how_many_threads_look_for_it) {
  static const uint32_t threads[] = {2, 4, 32};
  uint32_t simulated = 0;
  for (uint64_t seed = first_seed(); seed < first_seed() + TRIALS; seed++) {
    planner_trial trial;
    outcome one, many;
    planner_trial_open(&trial, seed, 6, 6, seed % 2 == 0);
    plan(&trial, 1, &one);
    plan(&trial, threads[seed % 3], &many);
    compare(&trial, &one, &many);
    simulated += strstr(one.log, "simulated") != NULL;
    free(one.log);
    free(many.log);
  }
  ck_assert_uint_gt(simulated, TRIALS / 2);
}
END_TEST

/* With room for nothing. */
START_TEST(a_refusal_does_not_depend_on_it_either) {
  planner_trial trial;
  outcome one, many;
  planner_trial_open(&trial, first_seed(), 6, 6, false);
  trial.budgets.ram_bytes = trial.budgets.vram_bytes = 1u << 16;
  plan(&trial, 1, &one);
  plan(&trial, 4, &many);
  ck_assert_int_eq(one.status, FLAP_BUDGET);
  compare(&trial, &one, &many);
  free(one.log);
  free(many.log);
}
END_TEST

START_TEST(one_thread_plans_where_others_cannot_be_started) {
  planner_trial trial;
  outcome one, many;
  planner_trial_open(&trial, first_seed(), 6, 6, false);
  plan(&trial, 1, &one);
  threads_fail = true;
  plan(&trial, 4, &many);
  threads_fail = false;
  compare(&trial, &one, &many);
  free(one.log);
  free(many.log);
}
END_TEST

/* Which thread simulates what is a matter of time; that nothing else comes of it than the plan or the error is not. */
START_TEST(what_fails_on_another_thread_is_told) {
  uint32_t failed = 0;
  first_thread = pthread_self();
  for (uint64_t seed = first_seed(); seed < first_seed() + TRIALS; seed++) {
    planner_trial trial;
    outcome one, many;
    planner_trial_open(&trial, seed, 6, 6, seed % 2 == 0);
    plan(&trial, 1, &one);
    memory_fails = true;
    plan(&trial, 4, &many);
    memory_fails = false;
    if (many.status == FLAP_NO_MEMORY)
      ck_assert_ptr_nonnull(strstr(many.message, "memory"));
    else
      compare(&trial, &one, &many);
    failed += many.status == FLAP_NO_MEMORY;
    free(one.log);
    free(many.log);
  }
  ck_assert_uint_gt(failed, 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("planner threads");
  TCase *tcase = tcase_create("planner threads");
  tcase_set_timeout(tcase, 300);
  tcase_add_test(tcase, a_plan_does_not_depend_on_how_many_threads_look_for_it);
  tcase_add_test(tcase, a_refusal_does_not_depend_on_it_either);
  tcase_add_test(tcase, one_thread_plans_where_others_cannot_be_started);
  tcase_add_test(tcase, what_fails_on_another_thread_is_told);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
