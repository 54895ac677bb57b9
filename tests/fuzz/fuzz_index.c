/* model.safetensors.index.json beside two shards, with a third one that is outside of the folder. */
#include "io/formats/safetensors.h"
#include "tests/fuzz/fuzz_rig.h"

#include <string.h>

static const char one[] =
    "\x38\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}   01234567";
static const char two[] =
    "\x38\0\0\0\0\0\0\0{\"b\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}   01234567";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static bool ready;
  if (!ready) {
    fuzz_folder("model");
    fuzz_write("model/1.safetensors", one, sizeof one - 1);
    fuzz_write("model/2.safetensors", two, sizeof two - 1);
    fuzz_write("c.safetensors", one, sizeof one - 1);
    ready = true;
  }
  fuzz_write("model/" FLAP_SAFETENSORS_INDEX, data, bytes);
  flap_safetensors *reader = NULL;
  flap_status status = flap_safetensors_open(fuzz_path("model"), &reader);
  if (status != FLAP_OK)
    fuzz_refused(status, "safetensors");
  for (uint64_t i = 0; status == FLAP_OK && i < flap_safetensors_count(reader); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    char values[8];
    fuzz_must(tensor->bytes == 8 && flap_safetensors_read(reader, tensor, 0, 8, values) == FLAP_OK, "it can be read");
    fuzz_must(memcmp(values, "01234567", 8) == 0, "the bytes are the tensor's");
    fuzz_must(strncmp(flap_safetensors_tensor_path(reader, tensor), fuzz_path("model/"), strlen(fuzz_path("model/"))) ==
                      0 &&
                  strstr(flap_safetensors_tensor_path(reader, tensor), "..") == NULL,
              "no shard is outside of the folder");
  }
  flap_safetensors_close(reader);
  return 0;
}
