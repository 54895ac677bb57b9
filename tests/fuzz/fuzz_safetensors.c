/* A safetensors file: the first byte says whether it comes as it is, or as a header and data whose length is made to
 * fit. */
#include "io/formats/safetensors.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdlib.h>

#define FILE_NAME "input.safetensors"

/* What open accepts can be read to the last byte, and is found by its name. */
static void read_all(const flap_safetensors *reader, size_t bytes_max) {
  uint64_t bytes = 0;
  char *values = malloc(bytes_max);
  for (uint64_t i = 0; i < flap_safetensors_count(reader); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    fuzz_must(tensor->bytes <= bytes_max, "a tensor is no larger than the file");
    fuzz_must(flap_safetensors_read(reader, tensor, 0, tensor->bytes, values) == FLAP_OK, "a tensor can be read");
    fuzz_must(flap_safetensors_find(reader, tensor->name) == tensor, "a tensor is found by its name");
    bytes += tensor->bytes;
  }
  fuzz_must(bytes == flap_safetensors_bytes(reader), "the tensors make the sum");
  free(values);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  if (bytes == 0)
    return 0;
  if (data[0] % 2 == 0)
    fuzz_write_safetensors(FILE_NAME, data + 1, bytes - 1);
  else
    fuzz_write(FILE_NAME, data + 1, bytes - 1);
  flap_safetensors *reader = NULL;
  flap_status status = flap_safetensors_open(fuzz_path(FILE_NAME), &reader);
  if (status == FLAP_OK)
    read_all(reader, bytes);
  else
    fuzz_refused(status, FILE_NAME);
  flap_safetensors_close(reader);
  return 0;
}
