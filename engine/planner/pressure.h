/* Whether a machine can give what a plan takes, found before anything is taken: the OOM killer is no answer.
 *
 * Folder-private.
 */
#ifndef FLAP_ENGINE_PLANNER_PRESSURE_H
#define FLAP_ENGINE_PLANNER_PRESSURE_H

#include "engine/machine/host_memory.h"
#include "engine/planner/prepare.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of a prepared plan: FLAP_BUDGET names what limits it (a container, ulimit, WSL, the machine), and budgets that work
 * there, or says that none do. On the cpu device both tiers come out of the host's memory, and free swap counts beside
 * what the machine has free. */
FLAP_CHECKED flap_status flap_pressure_check(const flap_prepared *prepared, const flap_host_memory *memory);
/* The same for this host as it is now, or for the memory of the machine that is described instead. */
FLAP_CHECKED flap_status flap_pressure_check_here(const flap_prepared *prepared);

/* Of a plan that is not to run: FLAP_NO_SPACE names the disk that has no room for what would lie there, alone or with
 * the others on its drive, or no file so large (`ulimit -f`). A machine that is described has the disks of its
 * description.
 */
FLAP_CHECKED flap_status flap_pressure_check_disks(const flap_prepared *prepared);
/* Of a plan that is not to run: what a run would say in the log if this host does not let its staging buffers be
 * registered (`ulimit -l`). */
void flap_pressure_warn_of_buffers(const flap_prepared *prepared);

#ifdef __cplusplus
}
#endif
#endif
