/* A machine's profile as `flap plan machine=<file>` reads it. */
#include "tests/fuzz/fuzz_rig.h"
#include "tools/machine_file.h"

#include <math.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  flap_machine_profile profile;
  flap_status status = flap_machine_file_parse("machine.yaml", (const char *)data, bytes, &profile);
  if (status != FLAP_OK) {
    fuzz_refused(status, "machine.yaml");
    return 0;
  }
  const flap_machine *machine = &profile.machine;
  fuzz_must(memchr(machine->name, 0, sizeof machine->name) != NULL, "the name ends");
  fuzz_must(profile.disk_count <= FLAP_RUN_DISKS_MAX && profile.threads > 0 && profile.ram_bytes > 0, "counts hold");
  fuzz_must(isfinite(machine->flops_bf16) && machine->flops_bf16 >= 1 && machine->h2d_bytes >= 1 &&
                machine->d2h_bytes >= 1 && machine->host_bytes >= 1 && machine->device_bytes >= 1,
            "there are rates to divide by");
  return 0;
}
