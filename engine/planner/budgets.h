/* Budgets as people give them: a size, `max` (what is there, less a reserve) or `min` (the least that the plan
 * accepts).
 *
 * Folder-private. The reserves: of RAM, one part in ten of what is available (engine/machine/host_memory.h), at least
 * 512 MiB, and what the process takes beside its budgets; of a drive, one part in twenty of what is free, at least 1
 * GiB: several `max` on one get equal parts of what that and the sizes given there leave. On the cpu device VRAM is RAM
 * too: where both are `max`, each gets half. Of a card, one part in twenty of what is free, at least 512 MiB. Of
 * several `min`, vram is made least first, then ram, then disk.
 */
#ifndef FLAP_ENGINE_PLANNER_BUDGETS_H
#define FLAP_ENGINE_PLANNER_BUDGETS_H

#include "engine/machine/disk_rates.h"
#include "engine/planner/planner.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_BUDGETS_TEXT_MAX (FLAP_PATH_MAX + 160)

/* A disk that is full gets nothing; so is one whose `max` leaves nothing. */
FLAP_CHECKED flap_status flap_budgets_resolve(const flap_run_config *config, const flap_planner *planner,
                                              flap_disk_set *disks_io, flap_budgets *budgets_out);
/* Of the first disk that is full: a line for people. False: there is none. */
bool flap_budgets_full_disk(const flap_run_config *config, const flap_disk_set *disks,
                            char text_out[FLAP_BUDGETS_TEXT_MAX]);
/* The sum of the disks. */
uint64_t flap_budgets_disk(const flap_planner *planner, const flap_budgets *budgets);
/* What a process takes beside its budgets, code, stacks, a device's driver, and has not yet: this one, or on a machine
 * that is described one of which there is nothing yet; about. */
uint64_t flap_budgets_process_more(const flap_machine *machine, bool described);
/* Resident bytes of this process now, and the most so far; 0 where the system does not tell. */
uint64_t flap_budgets_resident(void);
uint64_t flap_budgets_resident_peak(void);

#ifdef __cplusplus
}
#endif
#endif
