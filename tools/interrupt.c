#include "tools/interrupt.h"

#include "tools/arguments.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A signal this soon after the first is the same wish: `timeout` sends its signal to the program and then to the
 * program's group, and so do batch systems. A person who presses twice is slower, or presses again. */
#define SAME_WISH_NS 150000000

volatile sig_atomic_t flap_interrupt_flag = 0;
static const char *interrupt_notice;
static size_t interrupt_notice_bytes;
static struct timespec first_time; /* of the first signal; valid once the flag is set */

static int64_t ns_since(const struct timespec *then, const struct timespec *now) {
  return (int64_t)(now->tv_sec - then->tv_sec) * 1000000000 + (now->tv_nsec - then->tv_nsec);
}

/* Only calls that are safe in a handler: clock_gettime, write and _exit. */
static void on_signal(int number) {
  (void)number;
  int saved = errno;
  struct timespec now = {0};
  (void)clock_gettime(CLOCK_MONOTONIC, &now);
  if (flap_interrupt_flag) {
    if (ns_since(&first_time, &now) >= SAME_WISH_NS)
      _exit(FLAP_EXIT_INTERRUPTED);
    errno = saved;
    return;
  }
  first_time = now;
  flap_interrupt_flag = 1;
  if (interrupt_notice) {
    ssize_t written = write(STDERR_FILENO, interrupt_notice, interrupt_notice_bytes);
    (void)written;
  }
  errno = saved;
}

void flap_interrupt_install(const char *notice) {
  interrupt_notice = notice;
  interrupt_notice_bytes = notice ? strlen(notice) : 0;
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  /* Neither interrupts the handler of the other, so it runs for one signal at a time on each thread. */
  (void)sigemptyset(&action.sa_mask);
  (void)sigaddset(&action.sa_mask, SIGINT);
  (void)sigaddset(&action.sa_mask, SIGTERM);
  (void)sigaction(SIGINT, &action, NULL);
  (void)sigaction(SIGTERM, &action, NULL);
  action.sa_handler = SIG_IGN;
  (void)sigaction(SIGPIPE, &action, NULL);
}

void flap_interrupt_outlive_terminal(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = SIG_IGN;
  (void)sigemptyset(&action.sa_mask);
  (void)sigaction(SIGHUP, &action, NULL);
}
