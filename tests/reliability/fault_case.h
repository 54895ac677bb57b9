/* One case of a reliability test: a life of the tiny model in a process of its own, with something going wrong in it,
 * and then what a person would do, in another process.
 *
 * A case is fine if the life ended right in spite of all, with every bit as without, or if it ended with an error that
 * says what happened, left no descriptor and no thread behind, and the repair ends with every bit as without, going on
 * from no earlier checkpoint than the last that was said to be saved.
 */
#ifndef FLAP_TESTS_RELIABILITY_FAULT_CASE_H
#define FLAP_TESTS_RELIABILITY_FAULT_CASE_H

#include "tests/reliability/tiny_run.h"

typedef struct case_hooks {
  void (*before)(const void *plan);        /* in the process of the life: makes things go wrong */
  void (*after)(void);                     /* and right again */
  void (*before_repair)(const void *plan); /* NULL, or: in the process of a repair that is killed as well */
  bool (*fired)(void);                     /* whether something did go wrong */
  bool (*is_right_status)(const void *plan, flap_status status); /* that a life may end with after the fault */
  bool names_a_path;                         /* errors are of files: the record must hold a path in the folder */
  bool must_pass;                            /* nothing that may end the run */
  bool may_end;                              /* the process may end with FAULT_KILLED */
  const char *(*describe)(const void *plan); /* what to give to the test to make this case again */
} case_hooks;

typedef struct case_totals {
  uint64_t cases, passed, refused, killed, not_reached;
} case_totals;

/* Runs the life and the uninterrupted one without faults and keeps their digest, which must be one. Ends the process
 * with a message if something is wrong. The run is in memory that children share, so that what they said was saved is
 * known also of those that were killed. */
tiny_run *case_open(tiny_kind kind);
void case_close(tiny_run *run);
/* Of the uninterrupted life. */
uint64_t case_wanted_digest(void);

/* True if the case is fine; else prints why, and how to make it again. */
bool case_run(tiny_run *run, const case_hooks *hooks, const void *plan, case_totals *totals);

/* Runs fn in a child, for at most `seconds`. The wait status. */
int case_fork(void (*fn)(void *), void *context, unsigned seconds);

/* Memory of zeros that a child and its parent both have. */
void *case_shared(uint64_t bytes);

/* Every `stride`-th of 1..count, from a first one that FLAP_FAULTS_FIRST says, or else follows from the seed and
 * `salt`; with FLAP_FAULTS_EVERY=1 all.
 */
typedef struct case_numbers {
  uint64_t next, stride, count;
} case_numbers;
case_numbers case_pick(uint64_t count, uint64_t wanted, uint64_t salt);
/* 0: no more. */
uint64_t case_next(case_numbers *numbers);
uint64_t case_seed(void);

#endif
