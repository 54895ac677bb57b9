/* llm.c's .bin: the first byte says how large the vocabulary is; then the three numbers of the header, then tokens. The
 * zeros that fill the header are put in between, so that inputs are short. */
#include "io/formats/dataset.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdlib.h>
#include <string.h>

#define HEADER_BYTES 1024u
#define NUMBERS_BYTES 12u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static const uint32_t vocabularies[] = {257, 65536, 1 << 20, INT32_MAX};
  if (bytes == 0)
    return 0;
  const uint32_t vocabulary = vocabularies[data[0] % 3];
  data++, bytes--;
  if (bytes < NUMBERS_BYTES) {
    fuzz_write("input.bin", data, bytes);
  } else {
    uint8_t *file = calloc(1, HEADER_BYTES + bytes - NUMBERS_BYTES);
    memcpy(file, data, NUMBERS_BYTES);
    memcpy(file + HEADER_BYTES, data + NUMBERS_BYTES, bytes - NUMBERS_BYTES);
    fuzz_write("input.bin", file, HEADER_BYTES + bytes - NUMBERS_BYTES);
    free(file);
  }
  const char *paths[] = {fuzz_path("input.bin")};
  const flap_dataset_config config = {.paths = paths, .path_count = 1, .vocabulary = vocabulary, .sequence_length = 2};
  flap_dataset *dataset = NULL;
  flap_status status = flap_dataset_open(&config, &dataset);
  if (status != FLAP_OK) {
    fuzz_refused(status, "input.bin");
    return 0;
  }
  for (uint64_t i = 0; i < flap_dataset_sequences(dataset); i++) {
    int32_t tokens[2], targets[2];
    fuzz_must(flap_dataset_fetch(dataset, i, 1, tokens, targets) == FLAP_OK, "every sequence can be read");
    fuzz_must(tokens[0] >= 0 && (uint32_t)tokens[0] < vocabulary && (uint32_t)targets[1] < vocabulary,
              "ids are below the vocabulary");
  }
  flap_dataset_close(dataset);
  return 0;
}
