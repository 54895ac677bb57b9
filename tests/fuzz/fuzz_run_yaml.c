/* The first byte says what the run configuration is for; the rest is run.yaml up to a NUL byte, and an override behind
 * it. */
#include "tests/fuzz/fuzz_rig.h"
#include "tools/config_yaml.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  if (bytes == 0)
    return 0;
  static const flap_config_purpose purposes[] = {FLAP_CONFIG_TRAIN, FLAP_CONFIG_PLAN, FLAP_CONFIG_USE};
  const char *text = (const char *)data + 1;
  const char *end = memchr(text, 0, bytes - 1);
  size_t text_bytes = end ? (size_t)(end - text) : bytes - 1;
  char *override = end ? strndup(end + 1, bytes - 2 - text_bytes) : NULL;
  const char *overrides[] = {override};
  flap_run_config *config = malloc(sizeof *config);
  flap_status status =
      flap_config_load_text("run.yaml", text, text_bytes, overrides, override ? 1 : 0, purposes[data[0] % 3], config);
  if (status == FLAP_OK) {
    fuzz_must(flap_run_config_check(config) == FLAP_OK, "what was loaded is checked");
    flap_run_config_close(config);
  } else {
    bool command_line = strncmp(flap_error_message(), "command line", 12) == 0;
    fuzz_refused(status, command_line ? "command line" : "run.yaml");
  }
  free(config);
  free(override);
  return 0;
}
