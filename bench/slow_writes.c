/* A disk that writes at a rate of one's choice, under any program: LD_PRELOAD=libslow_writes.so SLOW_WRITES=<bytes a
 * second>.
 *
 * Large writes by pwrite take their turns at that rate, whatever thread they come from, and are as they were otherwise.
 * So a disk can be made as slow as a step is short, and nothing else on the machine changes.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>

#define LARGE_BYTES 65536u

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double busy_until;

static double now(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double reserve(size_t bytes) {
  const char *rate = getenv("SLOW_WRITES");
  if (rate == NULL || bytes < LARGE_BYTES)
    return 0;
  pthread_mutex_lock(&lock);
  const double started = now() > busy_until ? now() : busy_until, until = started + (double)bytes / atof(rate);
  busy_until = until;
  pthread_mutex_unlock(&lock);
  return until;
}

static void wait_until(double until) {
  const double left = until - now();
  if (left <= 0)
    return;
  const struct timespec t = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
  (void)nanosleep(&t, NULL);
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
  ssize_t (*real)(int, const void *, size_t, off_t);
  *(void **)&real = dlsym(RTLD_NEXT, "pwrite");
  const double until = reserve(bytes);
  const ssize_t written = real(fd, data, bytes, offset);
  wait_until(until);
  return written;
}
