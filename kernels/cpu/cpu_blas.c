#include "kernels/cpu/cpu_blas.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <unistd.h>

#define LIBRARY "libopenblas.so.0"
#define BUFFER_BYTES ((uint64_t)130 << 20)
#define CORE_VARIABLE "OPENBLAS_CORETYPE"
#define THREADS_VARIABLE "OPENBLAS_NUM_THREADS"
#define OPENMP_VARIABLE "OMP_NUM_THREADS" /* read by the OpenMP of the OpenBLAS that uses one */

typedef struct library {
  void *handle;
  char *(*config)(void), *(*core)(void);
  flap_cpu_blas blas;
} library;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static library loaded;

/* ---- which code ------------------------------------------------------------------------------------------ */

/* Those that use vectors of 256 bits or more, and fused multiply-adds. */
static bool is_wide(const char *core) {
  static const char *const wide[] = {"Haswell", "Zen", "Excavator", "SkylakeX", "Cooperlake", "SapphireRapids"};
  for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
    if (strcasecmp(core, wide[i]) == 0)
      return true;
  return false;
}

const char *flap_cpu_blas_better_core(const char *chosen) {
#ifdef __x86_64__
  if (is_wide(chosen))
    return NULL;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? "Cooperlake" : "SkylakeX";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return "Haswell";
#endif
  (void)chosen;
  return NULL;
}

/* ---- loading --------------------------------------------------------------------------------------------- */

static void put_back(const char *variable, char *before) {
  if (before != NULL)
    (void)setenv(variable, before, 1);
  else
    (void)unsetenv(variable);
  free(before);
}

static char *copy_of(const char *variable) {
  const char *value = getenv(variable);
  return value != NULL ? strdup(value) : NULL;
}

static flap_status not_there(const char *what) {
  return flap_error_set(FLAP_NOT_FOUND, "kernels: " LIBRARY " cannot be used: %s; install libopenblas0", what);
}

/* dlsym gives functions as pointers to data. */
static bool find(const library *l, const char *name, void *function_out) {
  void *const symbol = dlsym(l->handle, name);
  memcpy(function_out, &symbol, sizeof symbol);
  return symbol != NULL;
}

/* It starts no threads: the device's pool is the only runtime that runs any. `core` NULL: as it finds best. */
static flap_status load(const char *core, library *l) {
  char *const threads_before = copy_of(THREADS_VARIABLE), *const core_before = copy_of(CORE_VARIABLE);
  char *const openmp_before = copy_of(OPENMP_VARIABLE);
  (void)setenv(THREADS_VARIABLE, "1", 1);
  (void)setenv(OPENMP_VARIABLE, "1", 1);
  if (core != NULL)
    (void)setenv(CORE_VARIABLE, core, 1);
  l->handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  put_back(CORE_VARIABLE, core_before);
  put_back(OPENMP_VARIABLE, openmp_before);
  put_back(THREADS_VARIABLE, threads_before);
  if (l->handle == NULL)
    return not_there(dlerror());
  if (find(l, "cblas_sgemm", &l->blas.sgemm) && find(l, "openblas_get_config", &l->config) &&
      find(l, "openblas_get_corename", &l->core))
    return FLAP_OK;
  const flap_status status = not_there("it is not OpenBLAS");
  dlclose(l->handle);
  return status;
}

/* "0.3.21" out of "OpenBLAS 0.3.21 DYNAMIC_ARCH ...". */
static void name_it(library *l) {
  const char *config = l->config(), *start = strchr(config, ' ');
  start = start != NULL ? start + 1 : config;
  (void)snprintf(l->blas.name, sizeof l->blas.name, "openblas-%.*s-%s", (int)strcspn(start, " "), start, l->core());
}

static flap_status load_best(library *l) {
  FLAP_TRY(load(NULL, l));
  const char *better = getenv(CORE_VARIABLE) == NULL ? flap_cpu_blas_better_core(l->core()) : NULL;
  if (better != NULL) {
    dlclose(l->handle);
    FLAP_TRY(load(better, l));
  }
  name_it(l);
  return FLAP_OK;
}

/* ---- its buffers ----------------------------------------------------------------------------------------- */

/* Of the address space; 0: not known. */
static uint64_t space_in_use(void) {
  unsigned long long pages = 0;
  FILE *file = fopen("/proc/self/statm", "re");
  if (file == NULL)
    return 0;
  if (fscanf(file, "%llu", &pages) != 1)
    pages = 0;
  fclose(file);
  return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Buffers stay, so only those of further threads are looked for. */
flap_status flap_cpu_blas_check_space(uint32_t threads) {
  static uint32_t checked;
  struct rlimit limit;
  flap_status status = FLAP_OK;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
    return FLAP_OK;
  pthread_mutex_lock(&lock);
  const uint64_t more = threads > checked ? (threads - checked) * BUFFER_BYTES : 0, wanted = space_in_use() + more;
  if (more > 0 && wanted > limit.rlim_cur)
    status =
        flap_error_set(FLAP_NO_MEMORY,
                       "kernels: OpenBLAS takes %llu MiB of the address space for %u threads, and the limit of %llu "
                       "MiB does not leave them: ulimit -v %llu, or fewer threads (expert.threads)",
                       (unsigned long long)(more >> 20), threads, (unsigned long long)(limit.rlim_cur >> 20),
                       (unsigned long long)(wanted >> 10));
  else if (threads > checked)
    checked = threads;
  pthread_mutex_unlock(&lock);
  return status;
}

/* ---- the one that is loaded ------------------------------------------------------------------------------ */

flap_status flap_cpu_blas_find(const flap_cpu_blas **blas_out) {
  library found = {.handle = NULL};
  flap_status status = FLAP_OK;
  pthread_mutex_lock(&lock);
  if (loaded.handle == NULL && (status = load_best(&found)) == FLAP_OK)
    loaded = found;
  pthread_mutex_unlock(&lock);
  *blas_out = status == FLAP_OK ? &loaded.blas : NULL;
  return status;
}
