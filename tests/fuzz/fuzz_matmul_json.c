/* matmul.json of a checkpoint, for the run that it is for or for another. */
#include "engine/machine/matmul_choice.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static const flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 4};
  static flap_model_config config;
  static bool ready;
  if (!ready) {
    config.family = flap_model_find_family("llama");
    fuzz_folder("in");
    fuzz_folder("out");
    fuzz_must(setenv("XDG_CACHE_HOME", fuzz_path("cache"), 1) == 0, "there is room for a variable");
    ready = true;
  }
  fuzz_write("in/matmul.json", data, bytes);
  flap_matmul_choice *choice = malloc(2 * sizeof *choice), *again = choice + 1;
  flap_status status =
      flap_matmul_choice_open("card", &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, fuzz_path("in"), choice);
  if (status != FLAP_OK) {
    fuzz_refused(status, "matmul.json");
  } else if (choice->source[0]) {
    fuzz_must(flap_matmul_choice_save(choice, fuzz_path("out")) == FLAP_OK, "it can be saved");
    fuzz_must(flap_matmul_choice_open("card", &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, fuzz_path("out"),
                                      again) == FLAP_OK,
              "what was saved is read");
    fuzz_must(memcmp(&choice->table, &again->table, sizeof choice->table) == 0, "and is the same");
    for (uint32_t i = 0; i < choice->table.count; i++)
      fuzz_must(flap_matmul_key_valid(&choice->table.entries[i].key), "every key is of some product");
  }
  free(choice);
  return 0;
}
