/* Budgets as people give them: a size, `max` (what is there, less a reserve) or `min` (the least that the plan
 * accepts).
 *
 * Folder-private. The reserves: of RAM, one part in ten of what is available (engine/machine/host_memory.h), at least
 * 512 MiB, and what the process takes beside its budgets; of a disk, one part in twenty of what is free, at least 1
 * GiB. On the cpu device VRAM is RAM too: where both are `max`, each gets half. Of a card, one part in twenty of what
 * is free, at least 512 MiB. Of several `min`, vram is made least first, then ram, then disk.
 */
#ifndef FLAP_ENGINE_PLANNER_BUDGETS_H
#define FLAP_ENGINE_PLANNER_BUDGETS_H

#include "engine/planner/planner.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_BUDGETS_PROCESS_BYTES ((uint64_t)96 << 20) /* code, stacks, libraries: about */

FLAP_CHECKED flap_status flap_budgets_resolve(const flap_run_config *config, const flap_planner *planner,
                                              flap_budgets *budgets_out);
/* The sum of the disks. */
uint64_t flap_budgets_disk(const flap_planner *planner, const flap_budgets *budgets);
/* Resident bytes of this process now, and the most so far; 0 where the system does not tell. */
uint64_t flap_budgets_resident(void);
uint64_t flap_budgets_resident_peak(void);

#ifdef __cplusplus
}
#endif
#endif
