#include "tools/interrupt.h"

#include "tools/arguments.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

volatile sig_atomic_t flap_interrupt_flag = 0;
static const char *interrupt_notice;
static size_t interrupt_notice_bytes;

/* Only calls that are safe in a handler: write and _exit. */
static void on_signal(int number) {
  (void)number;
  if (flap_interrupt_flag)
    _exit(FLAP_EXIT_INTERRUPTED);
  flap_interrupt_flag = 1;
  int saved = errno;
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
  (void)sigemptyset(&action.sa_mask);
  (void)sigaction(SIGINT, &action, NULL);
  (void)sigaction(SIGTERM, &action, NULL);
  action.sa_handler = SIG_IGN;
  (void)sigaction(SIGPIPE, &action, NULL);
}
