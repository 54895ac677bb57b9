#include "engine/machine/disk_rates.h"

#include <math.h>

#define WEIGHT_UNIT 1e6 /* weights that people give have so many parts of one */
#define WEIGHT_MAX 1e15 /* sums and products of these stay exact */

static double both_of(const flap_disk_rates *disk) {
  return disk->both_bytes > 0 ? disk->both_bytes : disk->read_bytes + disk->write_bytes;
}

static uint64_t whole_weight(double weight) {
  return weight < 1 ? 1 : (uint64_t)(weight < WEIGHT_MAX ? weight : WEIGHT_MAX);
}

static uint32_t entries_on(const flap_disk_set *set, uint32_t drive) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < set->count; i++)
    count += set->disks[i].drive == drive;
  return count;
}

void flap_disk_set_weigh(flap_disk_set *set, const flap_run_config *config) {
  for (uint32_t i = 0; i < set->count; i++) {
    flap_disk_rates *disk = &set->disks[i];
    const double given = config ? config->disk[i].weight : 0;
    disk->weight = whole_weight(given > 0 ? given * WEIGHT_UNIT : both_of(disk) / entries_on(set, disk->drive));
  }
}

/* The rate of all when one with so many of all bytes has none to spare. */
static double together(double rate, double bytes, double total) {
  return bytes < total ? rate * total / bytes : rate;
}

void flap_disk_set_rates(const flap_disk_set *set, const uint64_t *bytes, flap_machine *machine) {
  double on_drive[FLAP_RUN_DISKS_MAX] = {0}, total = 0;
  machine->disk_read_bytes = machine->disk_write_bytes = machine->disk_both_bytes = 0;
  for (uint32_t i = 0; i < set->count; i++) {
    const double share = set->disks[i].full ? 0 : (double)set->disks[i].weight;
    const double here = bytes ? (double)bytes[i] : share;
    on_drive[set->disks[i].drive] += here;
    total += here;
  }
  if (!(total > 0))
    return;
  double read = INFINITY, write = INFINITY, both = INFINITY;
  bool known = false;
  for (uint32_t i = 0; i < set->count; i++) {
    const flap_disk_rates *disk = &set->disks[i];
    if (!(on_drive[i] > 0)) /* as for those that share another's drive */
      continue;
    read = fmin(read, together(disk->read_bytes, on_drive[i], total));
    write = fmin(write, together(disk->write_bytes, on_drive[i], total));
    both = fmin(both, together(both_of(disk), on_drive[i], total));
    known = known || disk->both_bytes > 0;
  }
  machine->disk_read_bytes = read;
  machine->disk_write_bytes = write;
  machine->disk_both_bytes = known ? both : 0;
}
