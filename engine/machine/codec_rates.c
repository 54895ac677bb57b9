#include "engine/machine/codec_rates.h"

#include "base/philox.h"
#include "io/block/codec.h"

#include <stdlib.h>
#include <time.h>

#define PAGE_BYTES (1u << 20)
#define PAGES 4 /* the first one warms up */

static double thread_seconds(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The fastest of a few pages: what is slower was disturbed. */
void flap_codec_measure(flap_machine *machine) {
  unsigned char *memory = malloc(3 * (uint64_t)PAGE_BYTES + flap_block_codec_scratch(PAGE_BYTES));
  machine->encode_bytes = machine->decode_bytes = 0;
  if (memory == NULL)
    return;
  unsigned char *encoded = memory + PAGE_BYTES, *decoded = encoded + PAGE_BYTES, *scratch = decoded + PAGE_BYTES;
  const flap_philox stream = flap_philox_stream(1, "codec rates");
  flap_philox_normals(&stream, 0, PAGE_BYTES / sizeof(float), (float *)(void *)memory);
  for (int i = 0; i < PAGES; i++) {
    const double started = thread_seconds();
    const uint32_t stored = flap_block_encode(FLAP_CODEC_ZSTD, memory, PAGE_BYTES, 4, encoded, scratch);
    const double between = thread_seconds();
    const bool whole = stored < PAGE_BYTES && flap_block_decode(encoded, stored, decoded, PAGE_BYTES, scratch);
    const double encode = between - started, decode = thread_seconds() - between;
    if (i == 0 || !whole || encode <= 0 || decode <= 0)
      continue;
    machine->encode_bytes = PAGE_BYTES / encode > machine->encode_bytes ? PAGE_BYTES / encode : machine->encode_bytes;
    machine->decode_bytes = PAGE_BYTES / decode > machine->decode_bytes ? PAGE_BYTES / decode : machine->decode_bytes;
  }
  free(memory);
}
