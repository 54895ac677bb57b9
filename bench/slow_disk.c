/* A disk as slow as one likes, under any program: LD_PRELOAD=libslow_disk.so SLOW_WRITES=<bytes a second>
 * [SLOW_READS=<bytes a second>].
 *
 * Writes of 4 KiB and more by pwrite take their turns at that rate, whatever thread they come from, and are as they
 * were otherwise. So a disk can be made as slow as a step is short, and nothing else on the machine changes. io_uring
 * goes past it, unless there is SLOW_READS: then such reads by pread take turns of their own, and the system refuses
 * io_uring, so that a program which has another way takes that: a disk whose rates do not change from one minute to the
 * next.
 */
#include <dlfcn.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>

#define LARGE_BYTES 4096u

ssize_t pread(int fd, void *data, size_t bytes, off_t offset);
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset);

typedef struct turns {
  const char *variable; /* of the environment: the rate */
  pthread_mutex_t lock;
  double busy_until;
} turns;

static turns reads = {"SLOW_READS", PTHREAD_MUTEX_INITIALIZER, 0},
             writes = {"SLOW_WRITES", PTHREAD_MUTEX_INITIALIZER, 0};

static double now(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double reserve(turns *of, size_t bytes) {
  const char *text = getenv(of->variable);
  const double rate = text != NULL ? atof(text) : 0;
  if (!(rate > 0) || bytes < LARGE_BYTES)
    return 0;
  pthread_mutex_lock(&of->lock);
  const double started = now() > of->busy_until ? now() : of->busy_until, until = started + (double)bytes / rate;
  of->busy_until = until;
  pthread_mutex_unlock(&of->lock);
  return until;
}

static void wait_until(double until) {
  const int error = errno; /* the call's own */
  for (double left; (left = until - now()) > 0;) {
    const struct timespec t = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
    (void)nanosleep(&t, NULL);
  }
  errno = error;
}

ssize_t pread(int fd, void *data, size_t bytes, off_t offset) {
  ssize_t (*real)(int, void *, size_t, off_t);
  *(void **)&real = dlsym(RTLD_NEXT, "pread");
  const double until = reserve(&reads, bytes);
  const ssize_t got = real(fd, data, bytes, offset);
  wait_until(until);
  return got;
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
  ssize_t (*real)(int, const void *, size_t, off_t);
  *(void **)&real = dlsym(RTLD_NEXT, "pwrite");
  const double until = reserve(&writes, bytes);
  const ssize_t written = real(fd, data, bytes, offset);
  wait_until(until);
  return written;
}

/* Whatever becomes of this, the program runs: its rates show whether it was slowed. */
__attribute__((constructor)) static void refuse_io_uring(void) {
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
  if (getenv(reads.variable) == NULL)
    return;
  (void)prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  (void)prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
