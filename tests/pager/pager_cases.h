/* Random configurations and programs for the pager's tests, and a runner that checks every byte of them.
 *
 * A case is a pure function of its seed: regions with homes everywhere, rings with as many slots as ever live at a time
 * (and sometimes more), programs of leases, and a script of begin, pin, compute, unpin, end and settle. The runner
 * keeps a plain copy of every region in memory, applies the same changes to it, and compares at every pin, every unpin
 * and at the end.
 */
#ifndef FLAP_TESTS_PAGER_PAGER_CASES_H
#define FLAP_TESTS_PAGER_PAGER_CASES_H

#include "pager/pager.h"

#include <stdbool.h>

#define CASE_REGIONS_MAX 24u
#define CASE_RINGS_MAX 3u
#define CASE_KEPT_MAX 4u /* regions with a ring that keeps */
/* Sanitizers make everything ten times slower: every fourth or eighth case then. */
#if defined(__SANITIZE_THREAD__)
#define CASE_STRIDE 8u
#elif defined(__SANITIZE_ADDRESS__)
#define CASE_STRIDE 4u
#else
#define CASE_STRIDE 1u
#endif

#define CASE_PROGRAMS_MAX 4u
#define CASE_LEASES_MAX 48u
#define CASE_ACTIONS_MAX 1024u

typedef enum case_homes { HOMES_RAM, HOMES_DISK, HOMES_MIXED } case_homes;

typedef enum action_kind {
  ACTION_BEGIN,   /* program `index` */
  ACTION_PIN,     /* lease `index` of the oldest program */
  ACTION_COMPUTE, /* every pinned region takes part */
  ACTION_UNPIN,
  ACTION_JOB, /* of the leases from `index` on that the job `count` has */
  ACTION_END,
  ACTION_SETTLE,
  ACTION_REFILL /* region `index`, at rest */
} action_kind;

typedef struct action {
  action_kind kind;
  uint32_t index, count;
} action;

typedef struct test_case {
  uint64_t seed;
  flap_pager_config config;
  flap_pager_region regions[CASE_REGIONS_MAX];
  flap_pager_ring rings[CASE_RINGS_MAX + CASE_KEPT_MAX];
  bool for_jobs[CASE_REGIONS_MAX];
  bool filled[CASE_REGIONS_MAX];
  bool lends; /* residents do, to ring `borrower` */
  uint32_t borrower;
  uint32_t program_count;
  uint32_t lease_counts[CASE_PROGRAMS_MAX];
  flap_lease leases[CASE_PROGRAMS_MAX][CASE_LEASES_MAX];
  action actions[CASE_ACTIONS_MAX];
  uint32_t action_count;
  bool snapshots;       /* case_add_snapshots was called */
  uint32_t close_after; /* close in the midst of it, after so many actions; 0: never */
} test_case;

/* `tight`: as few slots and buffers as can work. `scale` bounds the sizes: 1 is small, 4 is what the property tests
 * use. */
void case_make(test_case *c, uint64_t seed, case_homes homes, bool tight, uint32_t scale);

/* Marks regions as of snapshots, before the disk is set. case_run then opens snapshots now and then, of any point
 * ahead, which another thread drains in any order, at times not to the end, while the case goes on. */
void case_add_snapshots(test_case *c);
/* Snapshots that were drained to the end, over all cases so far. */
extern uint64_t case_snapshots;

/* Of a case with snapshots, before the disk is set: what they hold is shared, with files in `folder`. Then they are
 * kept where they can be, their files named, and compared at once and at the end of the case. */
void case_add_sharing(test_case *c, const char *folder);
/* Pages that were kept on disk and compared in the end, over all cases so far; snapshots that could not be kept. */
extern uint64_t case_kept_pages, case_unkept;

/* The sum of flap_pager_predict over all programs; what rings that keep load is counted by the case itself. */
void case_predict(const test_case *c, uint64_t bytes_out[FLAP_LANE_COUNT]);

/* Runs a case on the cpu device with the disk of config.disk. Wrong bytes, wrong counts and wrong sizes fail the test;
 * a failure of the pager is returned, after a close that must come back. */
flap_status case_run(const test_case *c);

/* Runs a case on the sim device; a deadlock asserts. On a synchronous machine every nanosecond must be accounted for,
 * as compute or as a stall. Returns the virtual time that it took. */
uint64_t case_run_sim(const test_case *c, bool synchronous);

/* With `compression: lz4` or `zstd`, over all cases so far: what disks did not have to move since it made that shorter,
 * and of how much. */
extern uint64_t case_saved_bytes, case_packable_bytes;
extern uint64_t case_pooled_bytes; /* what the pool gave and took */
/* Requests that were read once more, over all cases that ran to their end. */
extern uint64_t case_rereads;

/* Enough space on one to three disks at `path`, as the seed says. */
void case_set_disk(test_case *c, flap_block_backend backend, const char *path);

/* FLAP_TEST_SEED, or a fixed one; printed, so that a failure can be run again. */
uint64_t case_first_seed(void);

#endif
