#include "tests/reliability/fault_case.h"

#include "base/philox.h"
#include "tests/reliability/fault_calls.h"
#include "tests/reliability/tiny_states.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

#define SECONDS_MAX 60 /* of one life, which takes tens of milliseconds: sanitizers, and busy machines */
#define BLAS_THREADS 1u
#define DEFAULT_SEED 20240607u

/* What a child found out; in memory that both have. */
typedef struct report {
  flap_status status;
  char message[1024], problem[600], phase[32];
  uint64_t resumed_step, digest;
  bool fired;
} report;

static report *shared;
static uint64_t wanted_digest;

static void fatal(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

void *case_shared(uint64_t bytes) {
  void *memory = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    fatal("mmap", "cannot");
  return memory;
}

int case_fork(void (*fn)(void *), void *context, unsigned seconds) {
  fflush(NULL);
  const pid_t child = fork();
  if (child < 0)
    fatal("fork", "cannot");
  if (child == 0) {
    alarm(seconds);
    fn(context);
    _exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child)
    fatal("waitpid", "cannot");
  return status;
}

/* ---- in the child -------------------------------------------------------------------------------------------- */

static unsigned count_entries(const char *path) {
  unsigned count = 0;
  DIR *folder = opendir(path);
  while (folder != NULL && readdir(folder) != NULL)
    count++;
  if (folder != NULL)
    (void)closedir(folder);
  return count;
}

typedef struct child_job {
  tiny_run *run;
  const case_hooks *hooks;
  const void *plan;
} child_job;

static void keep(const tiny_run *run, flap_status status) {
  shared->status = status;
  shared->resumed_step = run->resumed_step;
  (void)snprintf(shared->message, sizeof shared->message, "%s", status == FLAP_OK ? "" : flap_error_message());
  (void)snprintf(shared->phase, sizeof shared->phase, "%s", run->phase);
  if (status == FLAP_OK && shared->problem[0] == '\0')
    (void)snprintf(shared->problem, sizeof shared->problem, "%s", tiny_run_digest(run, &shared->digest));
}

/* BLAS starts its thread anew after a fork, when it is first used. A thread that was joined may be listed a moment
 * longer. */
static void check_left_behind(unsigned descriptors, unsigned threads) {
  unsigned now = 0;
  threads += BLAS_THREADS;
  for (int i = 0; i < 100 && (now = count_entries("/proc/self/task")) > threads; i++)
    (void)usleep(1000);
  if (now > threads)
    (void)snprintf(shared->problem, sizeof shared->problem, "%u threads were left behind", now - threads);
  now = count_entries("/proc/self/fd");
  if (now > descriptors)
    (void)snprintf(shared->problem, sizeof shared->problem, "%u descriptors were left open", now - descriptors);
#if defined(__SANITIZE_ADDRESS__)
  if (__lsan_do_recoverable_leak_check() != 0)
    (void)snprintf(shared->problem, sizeof shared->problem, "memory was left behind");
#endif
}

static void live(void *context) {
  const child_job *job = context;
  const unsigned descriptors = count_entries("/proc/self/fd"), threads = count_entries("/proc/self/task");
  flap_error_clear();
  if (job->hooks != NULL)
    job->hooks->before(job->plan);
  const flap_status status = tiny_run_live(job->run);
  if (job->hooks != NULL) {
    shared->fired = job->hooks->fired();
    job->hooks->after();
  }
  check_left_behind(descriptors, threads);
  keep(job->run, status);
}

static void broken_repair(void *context) {
  const child_job *job = context;
  job->hooks->before_repair(job->plan);
  keep(job->run, tiny_run_repair(job->run));
}

static void repair(void *context) {
  const child_job *job = context;
  keep(job->run, tiny_run_repair(job->run));
}

/* ---- judging ------------------------------------------------------------------------------------------------- */

static bool complain(const child_job *job, const char *format, const char *detail) {
  char text[2048];
  (void)snprintf(text, sizeof text, format, detail);
  fprintf(stderr, "%s: %s (while %s)\n  again: FLAP_FAULT=%s\n", job->hooks->describe(job->plan), text, shared->phase,
          job->hooks->describe(job->plan));
  return false;
}

static bool ended_badly(const child_job *job, int wait_status, const char *when) {
  char text[128];
  if (WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == 0)
    return false;
  const int number = WIFSIGNALED(wait_status) ? WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
  (void)snprintf(text, sizeof text, "%s %s %d%s", when, WIFSIGNALED(wait_status) ? "ended by signal" : "exit status",
                 number, WIFSIGNALED(wait_status) && number == SIGALRM ? ": it hung" : "");
  complain(job, "%s", text);
  return true;
}

static bool is_right(const child_job *job, const char *when) {
  if (shared->problem[0] != '\0')
    return complain(job, when, shared->problem);
  if (shared->digest != wanted_digest)
    return complain(job, when, "other bits than without the fault");
  return true;
}

static bool is_clean(const child_job *job) {
  if (shared->problem[0] != '\0')
    return complain(job, "after an error, %s", shared->problem);
  if (job->hooks->must_pass)
    return complain(job, "it must not fail, but did: %s", shared->message);
  if (shared->message[0] == '\0')
    return complain(job, "%s", "an error without a message");
  if (!job->hooks->is_right_status(job->plan, shared->status)) {
    char text[1200];
    (void)snprintf(text, sizeof text, "%s: %s", flap_status_name(shared->status), shared->message);
    return complain(job, "the wrong kind of error: %s", text);
  }
  char above[TINY_PATH_MAX]; /* folders above are made too, where they are not there: "/dev" */
  (void)snprintf(above, sizeof above, "%.*s", 1 + (int)strcspn(job->run->folder + 1, "/"), job->run->folder);
  if (job->hooks->names_a_path && strstr(shared->message, above) == NULL)
    return complain(job, "the message names no file: %s", shared->message);
  return true;
}

static bool was_killed(int wait_status) {
  return WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == FAULT_KILLED;
}

static bool repair_is_right(const child_job *job) {
  char text[128];
  if (job->hooks->before_repair != NULL) {
    const int broken = case_fork(broken_repair, (void *)(uintptr_t)job, SECONDS_MAX);
    if (!was_killed(broken) && ended_badly(job, broken, "the repair that is killed too"))
      return false;
  }
  const uint64_t saved_step = job->run->saved_step;
  memset(shared, 0, sizeof *shared);
  (void)snprintf(shared->phase, sizeof shared->phase, "repairing");
  const int wait_status = case_fork(repair, (void *)(uintptr_t)job, SECONDS_MAX);
  if (ended_badly(job, wait_status, "the repair"))
    return false;
  if (shared->status != FLAP_OK)
    return complain(job, "it cannot be repaired: %s", shared->message);
  if (shared->resumed_step < saved_step) {
    (void)snprintf(text, sizeof text, "step %llu was saved, and lost", (unsigned long long)saved_step);
    return complain(job, "%s", text);
  }
  return is_right(job, "after the repair: %s");
}

bool case_run(tiny_run *run, const case_hooks *hooks, const void *plan, case_totals *totals) {
  const child_job job = {.run = run, .hooks = hooks, .plan = plan};
  tiny_run_clear(run);
  memset(shared, 0, sizeof *shared);
  (void)snprintf(shared->phase, sizeof shared->phase, "living");
  totals->cases++;
  const int wait_status = case_fork(live, (void *)(uintptr_t)&job, SECONDS_MAX);
  if (hooks->may_end && was_killed(wait_status)) {
    totals->killed++;
    return repair_is_right(&job);
  }
  if (ended_badly(&job, wait_status, "the run"))
    return false;
  totals->not_reached += !shared->fired;
  if (shared->status == FLAP_OK) {
    totals->passed++;
    return is_right(&job, "it passed, but: %s");
  }
  totals->refused++;
  return is_clean(&job) && repair_is_right(&job);
}

/* ---- the reference ------------------------------------------------------------------------------------------- */

static void reference(tiny_run *run, void (*fn)(void *), const char *what) {
  const child_job job = {.run = run};
  tiny_run_clear(run);
  memset(shared, 0, sizeof *shared);
  const int wait_status = case_fork(fn, (void *)(uintptr_t)&job, SECONDS_MAX);
  if (wait_status != 0 || shared->status != FLAP_OK || shared->problem[0] != '\0')
    fatal(what, shared->status != FLAP_OK ? shared->message : shared->problem[0] ? shared->problem : "it crashed");
}

/* Otherwise a test of what checkpoints share would see nothing. */
static void check_sharing(const tiny_run *run) {
  char path[TINY_PATH_MAX + 32];
  const char *problem;
  (void)snprintf(path, sizeof path, "%s/out/checkpoint-%u", run->folder, TINY_STEPS);
  if (tiny_states_are_pages(path, &problem) !=
      (run->kind == TINY_ON_DISK || run->kind == TINY_TWICE || run->kind == TINY_ON_URING))
    fatal(path, "its states are shared with the disk, and should not be, or the other way round");
}

tiny_run *case_open(tiny_kind kind) {
  tiny_run *run = case_shared(sizeof *run);
  shared = case_shared(sizeof *shared);
  tiny_run_open(run, kind);
  reference(run, repair, "the run that nothing interrupts");
  wanted_digest = shared->digest;
  reference(run, live, "the run that is interrupted and resumed");
  if (shared->digest != wanted_digest)
    fatal("the run that is interrupted and resumed", "it ends with other bits");
  check_sharing(run);
  return run;
}

uint64_t case_wanted_digest(void) {
  return wanted_digest;
}

void case_close(tiny_run *run) {
  tiny_run_close(run);
  (void)munmap(shared, sizeof *shared);
  (void)munmap(run, sizeof *run);
}

/* ---- which ones ---------------------------------------------------------------------------------------------- */

static uint64_t number_from(const char *name, uint64_t fallback) {
  const char *text = getenv(name);
  return text != NULL && *text ? strtoull(text, NULL, 10) : fallback;
}

uint64_t case_seed(void) {
  return number_from("FLAP_TEST_SEED", DEFAULT_SEED);
}

case_numbers case_pick(uint64_t count, uint64_t wanted, uint64_t salt) {
  const uint64_t fewest = wanted > 0 && count > wanted ? (count + wanted - 1) / wanted : 1;
  const uint64_t stride = number_from("FLAP_FAULTS_EVERY", fewest);
  const flap_philox stream = flap_philox_stream(case_seed(), "reliability cases");
  const uint64_t first = 1 + (stride > 1 ? flap_philox_below(&stream, salt, stride) : 0);
  return (case_numbers){.next = number_from("FLAP_FAULTS_FIRST", first), .stride = stride, .count = count};
}

uint64_t case_next(case_numbers *numbers) {
  if (numbers->next > numbers->count)
    return 0;
  const uint64_t number = numbers->next;
  numbers->next += numbers->stride;
  return number;
}
