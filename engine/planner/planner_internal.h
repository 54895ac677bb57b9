/* Private to the planner: candidates (candidates.c), choosing (planner.c), the list of the best (contenders.c),
 * simulating them (simulations.c) and making them better (refine.c), the least budgets (least.c), placement
 * (placement.c), prices (pricing.c). */
#ifndef FLAP_ENGINE_PLANNER_PLANNER_INTERNAL_H
#define FLAP_ENGINE_PLANNER_PLANNER_INTERNAL_H

#include "engine/planner/planner.h"

#define PLANNER_SEGMENTS_MAX 12
#define PLANNER_GROUPS_MAX 16
#define PLANNER_LAYERWISE_MAX 16 /* layers: segments no longer than that are tried layerwise, beside usual lengths */
#define PLANNER_CORRECTIONS_MAX (4 * PLANNER_SEGMENTS_MAX)
#define PLANNER_TAILS_MAX 12
#define PLANNER_SAVED_SHARES 4 /* of the layers save: so many parts of so many, or none */
#define PLANNER_SAVED_MAX (1 + PLANNER_SAVED_SHARES * FLAP_MODEL_SAVED_MAX)
#define PLANNER_SLICES_MAX 24
#define PLANNER_PAGES_MAX 12
#define PLANNER_WORTH_SIMULATING 1.25  /* an estimate is not that far off */
#define PLANNER_TRANSFERS_MAX 200000   /* of simulated steps: no further one of a list is simulated after so many */
#define PLANNER_TRANSFERS_ALL 24000000 /* the same of all lists: what a core simulates in a minute, for people wait */
#define PLANNER_TRANSFERS_COARSE 5000  /* of a step: with more, sizes of slices and pages are as budgets suggest */
#define PLANNER_CONTENDERS 36          /* that are remembered */
#define PLANNER_ALIKE 12          /* of these, with segments of the same length: estimates favour one or the other */
#define PLANNER_SIMULATED 12      /* that are simulated, and half of them with segments of any one length */
#define PLANNER_NOTHING_AHEAD 1.1 /* rings without a slot to run ahead wait for each lease: estimates do not see it */
#define PLANNER_REFINED_CUTS 4    /* ways to cut the step that are tried with other sets of saved tensors */
#define PLANNER_CUTS (1 + 2 * PLANNER_REFINED_CUTS)
#define PLANNER_TAILS_WORSE 2 /* in a row, and longer ones are not tried */
#define PLANNER_ROUNDS 3      /* of refining one choice after the other */
#define PLANNER_REFINED 9     /* contenders of these that are simulated */
#define PLANNER_MEMORY 512    /* simulations that are remembered, */
#define PLANNER_OUTLOOKS 2048 /* and skeletons */
#define PLANNER_DEPTHS 3
#define PLANNER_THREADS_MAX 8u   /* each with a setup of its own */
#define PLANNER_AHEAD 64         /* skeletons that are looked at side by side, before they are entered in order */
#define PLANNER_STARTS 3         /* that are refined in the end, */
#define PLANNER_START_WORTH 1.05 /* if they take no more than so many times as long as the best */
#define PLANNER_FAR 1.15         /* what takes so many times as long is not simulated to a steady state */
#define PLANNER_HOST_SHARES 8    /* of the parts are updated by the host's cores: so many parts of so many, or none */
#define PLANNER_BACKWARDS_MAX 8
#define PLANNER_HOST_GAIN 0.995     /* by this factor at least: the host's memory is the least steady of all lanes */
#define PLANNER_RESERVE 0.05        /* of the rates of lanes, which vary: so much is missing in a second search, */
#define PLANNER_RESERVE_WORTH 1.005 /* if that makes the step of the first one's plan so many times as long, */
#define PLANNER_TRANSFERS_RESERVE 10000000  /* and the first one simulated no more: at most 25 seconds of a core; */
#define PLANNER_RESERVE_GAIN 0.998          /* what it finds must be better by this factor at least, on average, */
#define PLANNER_RESERVE_PRICE 1.01          /* and at most so much worse with lanes as they are */
#define PLANNER_TWICE_GAIN 0.99             /* by this factor at least, for a second backward takes power */
#define PLANNER_TABLE_SLICES 65536          /* about as many slices as a run has at most */
#define PLANNER_SLICE_SHARE 48              /* a slice of states is at most about this part of vram, to begin with */
#define PLANNER_SLICE_BYTES (64 * FLAP_MIB) /* and so many bytes */
#define PLANNER_STAGING_GAIN 0.99           /* by this factor at least, for what is staged makes disks write more */
#define PLANNER_POOL_BUSY 0.8               /* of a step disks are busy, for a pool to be tried */
#define PLANNER_POOL_PARTS 8u               /* of ram, of which a pool is some */
#define PLANNER_POOL_STAGING 2u             /* times the buffers without one, to begin with */
#define PLANNER_POOL_GAIN 0.95              /* by this factor at least: how far states shrink nobody knows before */
#define PLANNER_PAGE_MIN (16 * FLAP_KIB)
#define PLANNER_PAGE_MAX (4 * FLAP_MIB)
#define PLANNER_TRANSFER_MAX (4 * FLAP_MIB)
#define PLANNER_RAM_PART 64 /* the least ram is looked for to such a part of it */

#define PLANNER_LISTS_MAX 2

/* So many layers, or their share of all layers' micro-batches, save the tensors of a mask. */
typedef struct planner_saving {
  uint32_t layers, mask;
} planner_saving;

/* What share, in all parts, is updated in the backward: of those that the device updates, and of those of the host. */
typedef struct planner_backward {
  uint32_t device, host;
} planner_backward;

typedef struct planner_savings {
  uint32_t count;
  planner_saving of[PLANNER_SAVED_MAX];
} planner_savings;

typedef struct planner_candidates {
  uint32_t segment_count, group_count, slice_count, page_count, tail_count;
  uint32_t segments[PLANNER_SEGMENTS_MAX], groups[PLANNER_GROUPS_MAX];
  uint32_t tails[PLANNER_TAILS_MAX]; /* layers that are wanted; the first is that of all candidates to begin with */
  planner_savings saved;             /* all or nothing of so many layers; what saves least first */
  planner_savings partial;           /* some of it */
  uint32_t host_parts;               /* updated by the host's cores: in all candidates, to begin with */
  uint32_t other_host_count, other_hosts[PLANNER_HOST_SHARES + 1]; /* what else is tried with the best */
  planner_backward backward;                                       /* likewise */
  uint32_t other_backward_count;
  planner_backward other_backwards[PLANNER_BACKWARDS_MAX];
  uint64_t slices[PLANNER_SLICES_MAX], pages[PLANNER_PAGES_MAX]; /* ascending */
  uint32_t least_slices; /* of them, up to PLANNER_SLICE_BYTES: what the least budgets are looked for with */
  bool sweep, layerwise;
  double limit_seconds; /* what computes for longer cannot win; 0: there is nothing to win against yet */
} planner_candidates;

/* A way to cut the step, and what is tried first of what is settled with the budgets. */
typedef struct planner_skeleton {
  uint32_t segment, tail, group; /* layers, layers, micro-batches */
  bool layerwise;                /* of segments that save nothing, see flap_layout_spec */
  planner_saving saved;
  bool spread;
  uint32_t host;
  bool spares_first; /* the host the parts that a forward begins with */
  planner_backward backward;
  bool keeps;           /* the embedding's states in VRAM */
  uint64_t slice, page; /* that are tried first: elements, bytes; 0: as the budgets suggest */
  uint64_t staging;     /* bytes; 0: a few buffers */
  uint64_t pool;        /* bytes of ram for encoded chunks */
} planner_skeleton;

/* What a pool of so many bytes has in whole blocks. */
static inline uint64_t planner_pool_blocks(uint64_t bytes) {
  return bytes / FLAP_PAGER_POOL_BLOCK * FLAP_PAGER_POOL_BLOCK;
}

typedef struct planner_contender {
  planner_skeleton s;
  uint32_t depth;
  double estimate, uncorrected;
} planner_contender;

/* How far a placement got; later is further. */
typedef enum planner_reach { PLANNER_NO_VRAM, PLANNER_NO_RAM, PLANNER_NO_DISK, PLANNER_FITS } planner_reach;

/* What is known of a skeleton: whether it fits, and an estimate for each depth, 0 where that does not fit. */
typedef struct planner_outlook {
  planner_skeleton s;
  bool fits;
  planner_reach reach; /* where it does not */
  double estimates[PLANNER_DEPTHS];
} planner_outlook;

/* What was looked at, what was simulated, and what that teaches about estimates. */
typedef struct planner_memory {
  uint64_t transfers, transfers_max; /* that were simulated; and may be, for whoever plans waits */
  uint32_t count;
  struct {
    planner_contender contender;
    flap_plan_costs costs;
  } of[PLANNER_MEMORY];
  uint32_t outlook_count;
  planner_outlook outlooks[PLANNER_OUTLOOKS];
  /* By the length of segments, how they are computed again, and whether updates are spread: what the best simulation so
   * far came to, over its estimate. Waiting between segments, which long ones make much of, estimates see little of. */
  uint32_t correction_count;
  struct {
    planner_skeleton of;
    double ratio;
  } corrections[PLANNER_CORRECTIONS_MAX];
} planner_memory;

/* candidates.c. One list; or, where updates wait for a norm, one of those that wait until the next forward or behind
 * the backward, and one of those that happen in a second backward. Returns how many. */
uint32_t planner_list(const flap_planner *planner, planner_candidates lists_out[PLANNER_LISTS_MAX]);
/* Layers of the tail: as many as are wanted, or the next number that leaves whole segments. */
uint32_t planner_tail(const flap_planner *planner, uint32_t segment, uint32_t wanted);
/* Of a block of FLAP_OPS_BLOCK elements of a layer, the least that a slice can be. The embedding's slices are no
 * larger, but where they are of one block of a wider format. */
uint64_t planner_state_block_bytes(const flap_planner *planner);

/* placement.c. Spends the budgets on a setup that was built for `choice` (its page size may differ): buffers, ring
 * slots, residents, homes. `depth`: slots beyond what is needed at once, so that transfers run ahead. */
planner_reach planner_fill(const flap_planner *planner, const flap_budgets *budgets, const flap_choice *choice,
                           uint32_t depth, flap_setup *setup);
/* What the choice takes before anything is spent. */
uint64_t planner_least_vram(const flap_planner *planner, const flap_choice *choice, flap_setup *setup);
/* The same with slices of no size: what no smaller slice can do without. */
uint64_t planner_least_without_slices(const flap_planner *planner, const flap_choice *choice, flap_setup *setup);
uint64_t planner_least_ram(const flap_planner *planner, const flap_choice *choice, flap_setup *setup);
/* Bytes by which ram is too small for all that is not in VRAM. Places the setup anew, with all of it in RAM. */
uint64_t planner_missing_ram(const flap_budgets *budgets, flap_setup *setup);
/* Bytes by which the disks are too small for the setup as it is placed now. */
uint64_t planner_missing_disk(const flap_planner *planner, const flap_budgets *budgets, const flap_setup *setup);

/* contenders.c. Keeps the best few, each once, in order; equally good ones in the order in which they came. `list` has
 * room for one more than PLANNER_CONTENDERS. */
void planner_enter(planner_contender *list, uint32_t *count_io, planner_contender candidate);
/* Of a list those that are worth simulating, at most so many, in order: half of them at most with segments of one
 * length, as long as there are others. */
uint32_t planner_pick(const planner_contender *list, uint32_t count, uint32_t most,
                      planner_contender picked_out[PLANNER_SIMULATED]);
/* What an estimate is to be multiplied by. */
double planner_correction(const flap_planner *planner, planner_skeleton s);
/* Of outlook_io->s; false: it was not looked at. */
bool planner_recall_outlook(const flap_planner *planner, planner_outlook *outlook_io);
void planner_remember_outlook(const flap_planner *planner, const planner_outlook *outlook);
/* What a simulation of it came to; NULL: there was none. */
const flap_plan_costs *planner_recall(const flap_planner *planner, const planner_contender *contender);
void planner_remember(const flap_planner *planner, const planner_contender *simulated, const flap_plan_costs *costs);

/* planner.c. Whether it makes a difference that layers are computed again one by one. */
bool planner_layerwise_differs(const flap_planner *planner, planner_skeleton s);
/* With the slice and the page given, and nothing spent. */
flap_choice planner_choice_of(const flap_planner *planner, const planner_candidates *c, planner_skeleton s,
                              uint64_t slice, uint64_t page);
/* Of a list of sizes the last that is at most what is wanted; the first, if none is. */
uint32_t planner_preferred_index(const uint64_t *ascending, uint32_t count, uint64_t wanted);
/* The first slice and page size that fit, with transfers that run ahead by `depth`. FLAP_BUDGET if none does, and how
 * far it got. */
FLAP_CHECKED flap_status planner_settle(const flap_planner *planner, const planner_candidates *c, planner_skeleton s,
                                        const flap_budgets *budgets, uint32_t depth, flap_setup *setup_out,
                                        planner_reach *reach_io);
/* The best of all skeletons that fit, with so many parts updated by the host, at most PLANNER_CONTENDERS; `list` has
 * room for one more. The planner has its times. */
FLAP_CHECKED flap_status planner_shortlist(const flap_planner *planner, const planner_candidates *c,
                                           const flap_budgets *budgets, uint32_t host, planner_contender *list,
                                           uint32_t *count_io, planner_reach *reach_io);

/* The best of the lists, with the rates that the planner has; `list` NULL: nothing fits, or what does computes for
 * longer than `limit_seconds` (0: no limit). The planner has its times and a memory. */
typedef struct planner_found {
  const planner_candidates *list;
  planner_contender contender;
  flap_plan_costs costs;
} planner_found;
FLAP_CHECKED flap_status planner_search(const flap_planner *planner, planner_candidates *lists, uint32_t count,
                                        const flap_budgets *budgets, double limit_seconds, planner_found *found_out,
                                        planner_reach *reach_io);

/* Looks at skeletons, as many at a time as there are threads, and remembers what it saw; with one thread, not at all.
 * It is nothing but time that this saves: what is entered, and in what order, is entering's. */
void planner_look_ahead(const flap_planner *planner, const planner_candidates *c, const flap_budgets *budgets,
                        const planner_skeleton *skeletons, uint32_t count);
/* The best that a skeleton can do, over how far transfers may run ahead. FLAP_BUDGET: nothing fits. */
FLAP_CHECKED flap_status planner_enter_skeleton(const flap_planner *planner, const planner_candidates *c,
                                                const flap_budgets *budgets, planner_skeleton s,
                                                planner_contender *list, uint32_t *count_io, planner_reach *reach_io);
/* Whether it comes to the same as another candidate, once only whole segments save: as one with fewer layers of the
 * same set, or as one that saves nothing, which there is unless all layers must. */
bool planner_is_double(const flap_planner *planner, const planner_savings *list, planner_skeleton s);
/* What no placement can beat: computing, and gradient sums that travel in fp32 between groups where VRAM cannot hold
 * them. Saves working out skeletons that cannot win. */
double planner_least_seconds(const flap_planner *planner, const flap_budgets *budgets, planner_skeleton s);
/* Shorter by enough: what the host's cores help with more by 0.5%, for its memory is the least steady of all lanes. Of
 * no seconds: there is none yet. */
bool planner_is_better(const planner_contender *one, const flap_plan_costs *costs, const planner_contender *best,
                       const flap_plan_costs *best_costs);

/* simulations.c. The best of a list, of which at most `most` are simulated, if it is better than the one before, with
 * its costs; of no seconds: there is none before. */
FLAP_CHECKED flap_status planner_simulate_list(const flap_planner *planner, const planner_candidates *c,
                                               const flap_budgets *budgets, const planner_contender *list,
                                               uint32_t count, uint32_t most, planner_contender *best_io,
                                               flap_plan_costs *costs_io);

/* refine.c. From the best of a short list on. */
FLAP_CHECKED flap_status planner_refine(const flap_planner *planner, const planner_candidates *c,
                                        const flap_budgets *budgets, const planner_contender *list, uint32_t count,
                                        planner_contender *best_io, flap_plan_costs *costs_io);

/* least.c. FLAP_BUDGET: which budget is too small, and what works. */
FLAP_CHECKED flap_status planner_refuse(const flap_planner *planner, const flap_budgets *budgets, planner_reach reach);

/* pricing.c. Planners here have their times. */
FLAP_CHECKED flap_status planner_times(const flap_planner *planner, flap_op_times *times_out);
/* A machine whose bus, disks and host have a share of the rates of another one; the same where lanes share the device's
 * cores. */
void planner_slow_lanes(const flap_machine *machine, const flap_op_times *times, double share,
                        flap_machine *machine_out, flap_op_times *times_out);
double planner_estimate(const flap_planner *planner, const flap_setup *setup);
/* Of a step that takes longer than `limit_seconds` (0: none does) the costs are up to a tenth too high. */
FLAP_CHECKED flap_status planner_simulate(const flap_planner *planner, const flap_budgets *budgets, flap_setup *setup,
                                          double limit_seconds, flap_plan_costs *costs_out);

#endif
