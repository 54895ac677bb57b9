/* trainer_state.json of a checkpoint that is to be resumed. */
#include "engine/store/checkpoint.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static bool ready;
  if (!ready)
    fuzz_folder("checkpoint-5");
  ready = true;
  fuzz_write("checkpoint-5/trainer_state.json", data, bytes);
  char folder[FLAP_PATH_MAX];
  flap_trainer_state state;
  flap_status status = flap_checkpoint_find(fuzz_path(""), "true", folder, &state);
  fuzz_must(strcmp(folder, fuzz_path("checkpoint-5")) == 0, "the folder is the newest");
  if (status == FLAP_OK) {
    fuzz_must(memchr(state.numerics, 0, sizeof state.numerics) != NULL, "the text ends");
    fuzz_must(state.loss_scale.skipped <= state.step && state.step <= INT64_MAX && state.cursor <= INT64_MAX,
              "counts hold");
    fuzz_must(state.loss_scale.scale == 0 || flap_loss_scale_valid(state.loss_scale.scale), "the loss scale is one");
  } else {
    fuzz_refused(status, "trainer_state.json");
  }
  return 0;
}
