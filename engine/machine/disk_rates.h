/* What several disks do together, striped over: their weights, and the rates that plans calculate with.
 *
 * Folder-private, but for tests. Folders on one drive share what it can do.
 */
#ifndef FLAP_ENGINE_MACHINE_DISK_RATES_H
#define FLAP_ENGINE_MACHINE_DISK_RATES_H

#include "engine/run_config.h"
#include "kernels/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_disk_rates {
  double read_bytes, write_bytes; /* per second, of its drive, alone */
  double both_bytes;              /* read and written together; 0: not known, and taken for both at full rate */
  uint32_t drive;                 /* the first entry that lies on the same one; its own number if there is none */
  uint64_t weight;                /* for striping */
  bool full;                      /* no room to measure or to use it: nothing will lie there */
} flap_disk_rates;

typedef struct flap_disk_set {
  uint32_t count;
  flap_disk_rates disks[FLAP_RUN_DISKS_MAX];
} flap_disk_set;

/* Gives weights: those of the configuration (NULL: none), or what each can do while both ways go on; a drive's is split
 * among the entries that lie on it. */
void flap_disk_set_weigh(flap_disk_set *set, const flap_run_config *config);
/* The rates of all together into `machine`, with so many bytes on each (NULL: in proportion to weights): bytes are
 * moved everywhere at a time, so the drive that takes longest decides. 0 where there is no disk, or no bytes. */
void flap_disk_set_rates(const flap_disk_set *set, const uint64_t *bytes, flap_machine *machine);

#ifdef __cplusplus
}
#endif
#endif
