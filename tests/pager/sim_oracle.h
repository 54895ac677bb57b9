/* What a simulated pager must do, kept apart from how it does it.
 *
 * A shadow of the machine: a cell for every 4 KiB of VRAM, of pinned RAM and of the disk says what is there, from when
 * on, and until when it is read. It follows the copies and disk requests that the pager asks its device and its disk
 * for, the times that they took as the trace tells them, and what the engine does; nothing of the pager is looked at.
 * What a program means is naive and sequential: a region has a version, which every change counts up, and a use must
 * find all bytes of the present one. From that and from times alone follows
 *
 *  - that every use finds what was stored last, wherever it was in between, and only once it is there;
 *  - that nothing is written where somebody still reads or computes, and nothing read that is not complete: so that no
 *    slot, no buffer and no home is used twice at once;
 *  - that lanes serve one transfer after the other, and that no lane of copies has more than a window of them;
 *  - the bytes on every lane.
 *
 * Threading: one oracle at a time, on one thread. A finding ends the test with the seed.
 */
#ifndef FLAP_TESTS_PAGER_SIM_ORACLE_H
#define FLAP_TESTS_PAGER_SIM_ORACLE_H

#include "pager/pager.h"

#define ORACLE_REGIONS_MAX 8u
#define ORACLE_GRANULES_MAX 64u /* of FLAP_BLOCK_ALIGN, of a region */
#define ORACLE_CELLS_MAX 4096u  /* of a tier */
#define ORACLE_JOBS_MAX 16u
#define ORACLE_EVENTS_MAX 192u
#define ORACLE_WINDOW 16u /* copies on a lane at a time: rule 4 of pager/README.md */

typedef enum oracle_tier { ORACLE_VRAM, ORACLE_RAM, ORACLE_DISK, ORACLE_TIERS } oracle_tier;

typedef struct oracle_cell {
  uint32_t value;               /* whose bytes, of which version; or what was there at first */
  uint16_t readers;             /* disk requests that read it now */
  bool written_now;             /* by a disk request */
  bool pinned;                  /* VRAM: between a pin and its unpin */
  uint64_t written_ns, read_ns; /* the end of the last writing and of the last reading */
} oracle_cell;

typedef struct oracle_job {
  uint32_t count, regions[FLAP_PAGER_JOB_LEASES_MAX], versions[FLAP_PAGER_JOB_LEASES_MAX]; /* behind it */
  bool holds[FLAP_PAGER_JOB_LEASES_MAX];
} oracle_job;

typedef struct oracle_region {
  uint32_t granules, version;
  uint32_t filled_version;               /* of what is where it was put at rest */
  bool holds, resident, kept, is_loaded; /* kept: in a ring that keeps; is_loaded: in this program, as it is now */
  uint64_t bytes, disk_bytes;
  uint32_t home[ORACLE_GRANULES_MAX];     /* the cell of RAM, or of the disk beyond those, where it was last; + 1 */
  uint32_t at_first[ORACLE_GRANULES_MAX]; /* likewise, where it was before anything was moved; + 1 */
} oracle_region;

typedef struct sim_oracle {
  uint64_t seed;
  flap_pager *pager;
  flap_clock *clock;
  uint64_t page_bytes, homes_bytes; /* homes come first in RAM, then staging */
  uintptr_t bases[ORACLE_TIERS];
  uint32_t cell_counts[ORACLE_TIERS];
  uint32_t region_count;
  oracle_region regions[ORACLE_REGIONS_MAX];
  uint64_t free_ns[FLAP_STREAM_COUNT]; /* when a stream has nothing left to do */
  uint64_t events_ns[ORACLE_EVENTS_MAX];
  uint64_t lane_ns[FLAP_LANE_COUNT]; /* when the last transfer of a lane started (disks) or ended */
  uint64_t window_ns[2][ORACLE_WINDOW], copies[2];
  uint64_t copy_started_ns, copy_ended_ns; /* as the trace told of the copy that is being asked for */
  oracle_job jobs[ORACLE_JOBS_MAX];
  uint64_t jobs_given, jobs_seen;
  uint64_t wanted[FLAP_LANE_COUNT], traced[FLAP_LANE_COUNT]; /* bytes */
  /* Not cleared as a whole: */
  uint64_t page_events; /* pages that were moved on a lane, over all runs */
  oracle_cell cells[ORACLE_TIERS][ORACLE_CELLS_MAX];
  uint32_t owners[ORACLE_TIERS][ORACLE_CELLS_MAX]; /* of what was in a cell at first: region and granule, + 1 */
} sim_oracle;

/* What follows is heard by this one; NULL: by nobody. */
void sim_oracle_listen(sim_oracle *oracle);
/* For a pager that was opened just now with `config`, its RAM at `ram`; page_events go on. The trace of the
 * configuration must be sim_oracle_trace. */
void sim_oracle_open(sim_oracle *oracle, uint64_t seed, const flap_pager_config *config, flap_pager *pager, void *ram);
void sim_oracle_trace(void *context, flap_lane lane, uint32_t region, uint64_t started_ns, uint64_t ended_ns,
                      uint64_t bytes);

/* What the engine did. A program begins when its first lease may be pinned. */
void sim_oracle_fill(sim_oracle *oracle, uint32_t region);
void sim_oracle_begin(sim_oracle *oracle);
void sim_oracle_pinned(sim_oracle *oracle, const flap_lease *lease, const void *memory);
/* Before work of so many ns is launched. */
void sim_oracle_compute(sim_oracle *oracle, uint64_t ns);
void sim_oracle_unpinned(sim_oracle *oracle, const flap_lease *lease, const void *memory);
/* Before it is handed over. */
void sim_oracle_job(sim_oracle *oracle, const flap_lease *leases, uint32_t count);
/* Everything is home, and as many bytes were moved as had to be. */
void sim_oracle_settled(sim_oracle *oracle);

#endif
