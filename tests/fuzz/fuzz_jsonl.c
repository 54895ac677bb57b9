/* Text to train on: the first byte says whether the rest is .jsonl or .txt, and whether a part is held out. */
#include "io/formats/dataset.h"
#include "tests/fuzz/fuzz_rig.h"

#define SEQUENCE 3
#define FETCHED 32 /* sequences of a dataset, spread over it: each is a call of the system */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static flap_tokenizer *tokenizer;
  if (!tokenizer)
    fuzz_must(flap_tokenizer_open_bytes(&tokenizer) == FLAP_OK, "there is a tokenizer");
  if (bytes == 0)
    return 0;
  const char *name = data[0] & 1 ? "input.txt" : "input.jsonl";
  fuzz_write(name, data + 1, bytes - 1);
  const char *paths[] = {fuzz_path(name)};
  const flap_dataset_config config = {.paths = paths,
                                      .path_count = 1,
                                      .tokenizer = tokenizer,
                                      .scratch_folder = fuzz_path(""),
                                      .sequence_length = SEQUENCE,
                                      .val_size = data[0] & 2 ? 0.25 : 0};
  flap_dataset *dataset = NULL;
  flap_status status = flap_dataset_open(&config, &dataset);
  if (status != FLAP_OK) {
    fuzz_refused(status, name);
    return 0;
  }
  fuzz_must(flap_dataset_tokens(dataset) <= bytes, "a token stands for at least a byte, or ends a document");
  uint64_t sequences = flap_dataset_sequences(dataset), heldout = flap_dataset_heldout(dataset);
  uint64_t counted = 0;
  for (uint64_t i = 0; i < sequences + heldout; i += 1 + (sequences + heldout) / FETCHED) {
    int32_t tokens[SEQUENCE], targets[SEQUENCE];
    status = i < sequences ? flap_dataset_fetch(dataset, i, 1, tokens, targets)
                           : flap_dataset_fetch_heldout(dataset, i - sequences, 1, tokens, targets, &counted);
    fuzz_must(status == FLAP_OK && tokens[1] == targets[0], "a sequence can be read");
  }
  flap_dataset_close(dataset);
  return 0;
}
