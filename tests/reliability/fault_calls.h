/* System calls that fail, or at which the process ends, as planned: the n-th of a kind, once or from there on.
 *
 * Goes between FLAP's libraries and the system by base/system.h. Counting is of calls that were asked for, retries
 * included, so a plan means the same in every process that makes the same calls. Reads and writes of extent files are
 * kinds of their own, since threads make them in any order.
 */
#ifndef FLAP_TESTS_RELIABILITY_FAULT_CALLS_H
#define FLAP_TESTS_RELIABILITY_FAULT_CALLS_H

#include "tests/reliability/fault_case.h"

typedef enum fault_call {
  FAULT_CALL_OPEN,
  FAULT_CALL_CLOSE,
  FAULT_CALL_READ,
  FAULT_CALL_WRITE,
  FAULT_CALL_SYNC,
  FAULT_CALL_TRUNCATE,
  FAULT_CALL_ALLOCATE,
  FAULT_CALL_RENAME,
  FAULT_CALL_LINK,
  FAULT_CALL_REMOVE,
  FAULT_CALL_MKDIR,
  FAULT_CALL_STAT,
  FAULT_CALL_PAGES_READ, /* of a checkpoint's optimizer-pages-<n>.bin */
  FAULT_CALL_EXTENT_READ,
  FAULT_CALL_EXTENT_WRITE,
  FAULT_CALL_COUNT,
  FAULT_CALL_CHANGE = FAULT_CALL_COUNT /* whichever changes something: write, sync, truncate, allocate, rename, link,
                                          remove, mkdir, a write of an extent, an open that creates or empties */
} fault_call;

typedef enum fault_kind {
  FAULT_EIO,
  FAULT_ENOSPC,
  FAULT_EMFILE,
  FAULT_EINTR,
  FAULT_EOPNOTSUPP,
  FAULT_EMLINK,
  FAULT_SHORT,     /* reads and writes of more than a byte move half */
  FAULT_FLIP,      /* reads: one bit is another, and nothing is said */
  FAULT_LOSE,      /* writes to an extent: nothing is written, and nothing is said */
  FAULT_KILL,      /* the process ends before the call, without another instruction of FLAP's */
  FAULT_KILL_TORN, /* the same, after half of a write */
  FAULT_KIND_COUNT
} fault_kind;

typedef struct fault_plan {
  fault_call call;
  fault_kind kind;
  uint64_t number; /* from 1; 0: never, calls are only counted */
  bool for_ever;   /* that call and all later ones of its kind */
} fault_plan;

#define FAULT_KILLED 137 /* exit status after FAULT_KILL: what a shell says of kill -9 */

const char *fault_call_name(fault_call call);
const char *fault_kind_name(fault_kind kind);
/* "write:EIO:once:17", what fault_plan_read reads; static storage. */
const char *fault_plan_write(const fault_plan *plan);
bool fault_plan_read(const char *text, fault_plan *plan_out);

void fault_calls_install(const fault_plan *plan);
void fault_calls_remove(void);
uint64_t fault_calls_count(fault_call call);
/* How often an undisturbed life of `run` makes each call, FAULT_CALL_CHANGE included; counted in a child. NULL if that
 * life does not end well. */
const uint64_t *fault_calls_of_life(tiny_run *run);
/* The planned fault happened. */
bool fault_calls_fired(void);

#endif
