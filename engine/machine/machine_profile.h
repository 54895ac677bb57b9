/* A machine as it is described, not as it is found: what `flap plan` plans for when `machine` names one.
 *
 * Plain data; tools/ fills it from a file or a preset. Sizes are what a program sees there: of the card what its driver
 * calls the memory in all, of the host what Linux calls MemTotal, less what other programs hold. `max` takes its usual
 * reserves from them.
 */
#ifndef FLAP_ENGINE_MACHINE_MACHINE_PROFILE_H
#define FLAP_ENGINE_MACHINE_MACHINE_PROFILE_H

#include "engine/run_config.h"
#include "kernels/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_profile_disk {
  uint64_t bytes;                 /* that are free there */
  double read_bytes, write_bytes; /* per second, alone */
  double both_bytes;  /* per second, read and written together while both go on; 0: as much as each does alone */
  uint64_t tbw_bytes; /* that may be written to it in all; 0: not known */
} flap_profile_disk;

typedef struct flap_machine_profile {
  flap_run_device device; /* cpu or cuda */
  uint64_t vram_bytes;    /* cuda; 0 on the cpu device, whose vram is a part of ram */
  uint64_t ram_bytes;
  uint32_t threads;     /* that compute */
  flap_machine machine; /* its rates; those of the disks are 0: they follow from the disks that a run uses */
  uint32_t disk_count;
  flap_profile_disk disks[FLAP_RUN_DISKS_MAX];
} flap_machine_profile;

/* The first `disk_count` disks of the machine; without weights. */
struct flap_disk_set;
void flap_machine_profile_disks(const flap_machine_profile *profile, uint32_t disk_count,
                                struct flap_disk_set *set_out);
/* The rates for a run with the first `disk_count` disks of the machine: striped over, they work side by side. */
void flap_machine_profile_rates(const flap_machine_profile *profile, uint32_t disk_count, flap_machine *machine_out);
/* Sizes that the configuration gives against what is there. FLAP_BUDGET or FLAP_INVALID names the key. */
FLAP_CHECKED flap_status flap_machine_profile_check(const flap_machine_profile *profile, const flap_run_config *config);

#ifdef __cplusplus
}
#endif
#endif
