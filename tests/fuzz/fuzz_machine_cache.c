/* machine.json, the measured rates: as the file that FLAP_MACHINE names (first byte even), which must be good, and as a
 * cache, which may be anything and is stored to. */
#include "engine/machine/machine_cache.h"
#include "tests/fuzz/fuzz_rig.h"

#include <jansson.h>
#include <stdlib.h>

static void use(const flap_machine_cache *cache) {
  const flap_machine_key key = {.device = "cpu", .threads = 2, .host = "host"};
  const flap_machine_disk disk = {.path = "/fast", .number = 2049};
  flap_machine machine = {.name = "none"};
  if (flap_machine_cache_find(cache, &key, &machine))
    fuzz_must(machine.flops_bf16 >= 1 && machine.host_bytes >= 1, "there are rates to divide by");
  if (flap_machine_cache_find_disk(cache, &key, &disk, &machine))
    fuzz_must(machine.disk_read_bytes >= 1 && machine.disk_write_bytes >= 1, "there are rates to divide by");
}

static void store_and_find(void) {
  const flap_machine_key key = {.device = "cpu", .threads = 3, .host = "another"};
  const flap_machine_disk disk = {.path = "/new", .number = 7};
  flap_machine machine = {.flops_bf16 = 1e12,
                          .flops_f32 = 1e12,
                          .device_bytes = 1e10,
                          .h2d_bytes = 1e10,
                          .d2h_bytes = 1e10,
                          .host_bytes = 1e10,
                          .disk_read_bytes = 1e9,
                          .disk_write_bytes = 1e9};
  flap_machine found = {.name = "none"};
  flap_machine_cache cache;
  fuzz_must(flap_machine_cache_open(&cache) == FLAP_OK, "a cache is never in the way");
  use(&cache);
  flap_machine_cache_store(&cache, &key, &machine, true, &disk);
  flap_machine_cache_close(&cache);
  fuzz_must(flap_machine_cache_open(&cache) == FLAP_OK, "what was stored is read");
  fuzz_must(flap_machine_cache_find(&cache, &key, &found) && found.flops_bf16 == 1e12, "rates are found again");
  fuzz_must(flap_machine_cache_find_disk(&cache, &key, &disk, &found) && found.disk_read_bytes == 1e9,
            "disks are found again");
  flap_machine_cache_close(&cache);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static bool ready;
  if (!ready) {
    fuzz_folder("flap");
    fuzz_must(setenv("XDG_CACHE_HOME", fuzz_path(""), 1) == 0, "there is room for a variable");
    ready = true;
  }
  if (bytes == 0)
    return 0;
  fuzz_write("flap/machine.json", data + 1, bytes - 1);
  if (data[0] % 2 != 0) {
    fuzz_must(unsetenv("FLAP_MACHINE") == 0, "a variable can be taken away");
    store_and_find();
    return 0;
  }
  fuzz_must(setenv("FLAP_MACHINE", fuzz_path("flap/machine.json"), 1) == 0, "there is room for a variable");
  flap_machine_cache cache;
  flap_status status = flap_machine_cache_open(&cache);
  if (status == FLAP_OK) {
    use(&cache);
    flap_machine_cache_close(&cache);
  } else {
    fuzz_refused(status, "machine.json");
  }
  return 0;
}
