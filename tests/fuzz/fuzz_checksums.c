/* checksums.json of a checkpoint, whose sums are then compared with a file that is there. */
#include "io/formats/checksums.h"
#include "tests/fuzz/fuzz_rig.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static bool ready;
  if (!ready) {
    fuzz_folder("in");
    fuzz_folder("out");
    fuzz_text("in/config.json", "{}\n");
    ready = true;
  }
  fuzz_write("in/" FLAP_CHECKSUMS_FILE, data, bytes);
  flap_checksums list = {0}, again = {0};
  flap_status status = flap_checksums_read(fuzz_path("in"), &list);
  if (status != FLAP_OK) {
    fuzz_refused(status, FLAP_CHECKSUMS_FILE);
    return 0;
  }
  for (size_t i = 0; i < list.count; i++) {
    const flap_checksums_entry *entry = &list.entries[i];
    fuzz_must(strchr(entry->name, '/') == NULL && strcmp(entry->name, "..") != 0, "no name leads out of the folder");
    fuzz_must(flap_checksums_find(&list, entry->name) == entry, "no name is there twice");
    status = flap_checksums_check_file(entry, fuzz_path("in"));
    if (status != FLAP_OK)
      fuzz_refused(status, fuzz_path("in"));
  }
  status = flap_checksums_check_sizes(&list, fuzz_path("in"));
  if (status != FLAP_OK)
    fuzz_refused(status, fuzz_path("in"));
  fuzz_must(flap_checksums_write(&list, fuzz_path("out")) == FLAP_OK, "it can be written");
  fuzz_must(flap_checksums_read(fuzz_path("out"), &again) == FLAP_OK && again.count == list.count, "and read again");
  flap_checksums_close(&list);
  flap_checksums_close(&again);
  return 0;
}
