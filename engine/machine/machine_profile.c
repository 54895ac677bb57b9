#include "engine/machine/machine_profile.h"

#include "base/units.h"
#include "engine/machine/disk_rates.h"

void flap_machine_profile_disks(const flap_machine_profile *profile, uint32_t disk_count, flap_disk_set *set_out) {
  *set_out = (flap_disk_set){.count = disk_count < profile->disk_count ? disk_count : profile->disk_count};
  for (uint32_t i = 0; i < set_out->count; i++)
    set_out->disks[i] = (flap_disk_rates){.read_bytes = profile->disks[i].read_bytes,
                                          .write_bytes = profile->disks[i].write_bytes,
                                          .both_bytes = profile->disks[i].both_bytes,
                                          .drive = i};
}

void flap_machine_profile_rates(const flap_machine_profile *profile, uint32_t disk_count, flap_machine *machine_out) {
  flap_disk_set set;
  flap_machine_profile_disks(profile, disk_count, &set);
  flap_disk_set_weigh(&set, NULL);
  *machine_out = profile->machine;
  flap_disk_set_rates(&set, NULL, machine_out);
}

static flap_status check_size(const char *key, const flap_machine_profile *profile, const flap_size *size,
                              uint64_t there) {
  char wanted[FLAP_UNITS_TEXT_MAX], has[FLAP_UNITS_TEXT_MAX];
  if (size->kind != FLAP_SIZE_BYTES || size->bytes <= there)
    return FLAP_OK;
  return flap_error_set(
      FLAP_BUDGET, "%s: %s is more than the %s (%llu bytes) of the machine \"%s\": lower it, or use max", key,
      flap_units_format_bytes(size->bytes, wanted, sizeof wanted), flap_units_format_bytes(there, has, sizeof has),
      (unsigned long long)there, profile->machine.name);
}

flap_status flap_machine_profile_check(const flap_machine_profile *profile, const flap_run_config *config) {
  const bool cuda = profile->device == FLAP_RUN_DEVICE_CUDA;
  if (config->device != FLAP_RUN_DEVICE_AUTO && config->device != profile->device)
    return flap_error_set(FLAP_INVALID, "device: %s contradicts machine: the profile \"%s\" is for device %s",
                          cuda ? "cpu" : "cuda", profile->machine.name, cuda ? "cuda" : "cpu");
  if (config->disk_count > profile->disk_count)
    return flap_error_set(FLAP_INVALID, "disk: %u folders, but the machine \"%s\" has %u disk%s", config->disk_count,
                          profile->machine.name, profile->disk_count, profile->disk_count == 1 ? "" : "s");
  FLAP_TRY(check_size("vram", profile, &config->vram, cuda ? profile->vram_bytes : profile->ram_bytes));
  FLAP_TRY(check_size("ram", profile, &config->ram, profile->ram_bytes));
  for (uint32_t i = 0; i < config->disk_count; i++)
    FLAP_TRY(check_size("disk", profile, &config->disk[i].size, profile->disks[i].bytes));
  return FLAP_OK;
}
