#include "base/thread.h"

#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NICER 10
#define SLICE_NS 100000u /* the shortest that the kernel takes */

/* The first version of the kernel's struct sched_attr, which not every libc declares. */
typedef struct scheduling {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
} scheduling;

void flap_thread_prefer_latency(void) {
#ifdef SYS_sched_setattr
  const scheduling wanted = {
      .size = sizeof wanted, .policy = SCHED_OTHER, .nice = getpriority(PRIO_PROCESS, 0), .runtime = SLICE_NS};
  (void)syscall(SYS_sched_setattr, 0, &wanted, 0u);
#endif
}

/* On Linux nice is a thread's own; a refusal changes nothing but times. */
void flap_thread_stand_back(void) {
  const id_t thread = (id_t)syscall(SYS_gettid);
  (void)setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + NICER);
}
