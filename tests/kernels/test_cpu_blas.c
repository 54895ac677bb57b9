/* OpenBLAS as it is loaded. Each case is a process of its own, for a process loads it once. */
#include "kernels/cpu/cpu_blas.h"

#include <check.h>
#include <dirent.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/wait.h>
#include <unistd.h>

#define CORE "OPENBLAS_CORETYPE"
#define THREADS "OPENBLAS_NUM_THREADS"
#define OPENMP "OMP_NUM_THREADS"

static bool has_fma(void) {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

static uint32_t count_threads(void) {
  uint32_t count = 0;
  DIR *tasks = opendir("/proc/self/task");
  for (const struct dirent *one; tasks != NULL && (one = readdir(tasks)) != NULL;)
    count += one->d_name[0] != '.';
  closedir(tasks);
  return count;
}

static bool ends_with(const char *text, const char *end) {
  const size_t length = strlen(text), end_length = strlen(end);
  return length >= end_length && strcasecmp(text + length - end_length, end) == 0;
}

static bool multiplies(const flap_cpu_blas *blas) {
  const float a[] = {1, 2, 3, 4}, b[] = {5, 6, 7, 8};
  float c[4] = {0};
  blas->sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, 2, 2, 2, 1, a, 2, b, 2, 0, c, 2);
  return c[0] == 19 && c[1] == 22 && c[2] == 43 && c[3] == 50;
}

/* Large enough that a library with threads would use them. */
static bool starts_no_threads(const flap_cpu_blas *blas) {
  enum { N = 512 };
  static float a[N * N], c[N * N];
  const uint32_t threads = count_threads();
  blas->sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, N, N, N, 1, a, N, a, N, 0, c, N);
  return count_threads() == threads;
}

static void run(bool (*is_right)(void)) {
  const pid_t child = fork();
  ck_assert_int_ge(child, 0);
  if (child == 0) {
    (void)unsetenv(CORE);
    (void)unsetenv(THREADS);
    (void)unsetenv(OPENMP);
    _exit(is_right() ? 0 : 1);
  }
  int status = -1;
  ck_assert_int_eq(waitpid(child, &status, 0), child);
  ck_assert_int_eq(status, 0);
}

static bool is_wide_here(void) {
  const flap_cpu_blas *blas, *again;
  const uint32_t threads = count_threads();
  return flap_cpu_blas_find(&blas) == FLAP_OK && flap_cpu_blas_find(&again) == FLAP_OK && again == blas &&
         strncmp(blas->name, "openblas-", strlen("openblas-")) == 0 && multiplies(blas) &&
         (!has_fma() || flap_cpu_blas_better_core(strrchr(blas->name, '-') + 1) == NULL) && starts_no_threads(blas) &&
         count_threads() == threads && getenv(CORE) == NULL && getenv(THREADS) == NULL && getenv(OPENMP) == NULL;
}

START_TEST(library_computes_as_well_as_the_processor_can_and_leaves_no_trace) {
  run(is_wide_here);
}
END_TEST

static bool is_what_was_asked_for(void) {
  const flap_cpu_blas *blas;
  (void)setenv(CORE, "Nehalem", 1); /* code that every processor of 64 bits in use has */
  (void)setenv(THREADS, "3", 1);
  (void)setenv(OPENMP, "3", 1);
  return flap_cpu_blas_find(&blas) == FLAP_OK && ends_with(blas->name, "-Nehalem") && multiplies(blas) &&
         starts_no_threads(blas) && strcmp(getenv(CORE), "Nehalem") == 0 && strcmp(getenv(THREADS), "3") == 0 &&
         strcmp(getenv(OPENMP), "3") == 0;
}

START_TEST(variable_of_the_user_has_the_last_word) {
#ifdef __x86_64__
  run(is_what_was_asked_for);
#endif
}
END_TEST

START_TEST(better_core_only_where_the_chosen_one_is_behind) {
  const char *better = flap_cpu_blas_better_core("Prescott");
  ck_assert_int_eq(better != NULL, has_fma());
  if (better != NULL)
    ck_assert_ptr_null(flap_cpu_blas_better_core(better));
  ck_assert_ptr_null(flap_cpu_blas_better_core("Zen"));
  ck_assert_ptr_null(flap_cpu_blas_better_core("Sapphirerapids"));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("cpu_blas");
  TCase *tests = tcase_create("cpu_blas");
  tcase_add_test(tests, library_computes_as_well_as_the_processor_can_and_leaves_no_trace);
  tcase_add_test(tests, variable_of_the_user_has_the_last_word);
  tcase_add_test(tests, better_core_only_where_the_chosen_one_is_behind);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
