/* Measures a disk through io/block, as `flap bench disk` does, with the arguments and the output of plain_uring.
 *
 *   bench_disk [folder] [MiB of file] [KiB of request] [depth] [io_uring | threads]
 */
#include "io/block/measure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t argument(int argc, char **argv, int index, uint64_t otherwise) {
  const uint64_t value = index < argc ? strtoull(argv[index], NULL, 10) : otherwise;
  if (value == 0 || value > 1u << 30) {
    (void)fprintf(stderr, "usage: bench_disk [folder] [MiB of file] [KiB of request] [depth] [io_uring | threads]\n");
    exit(EXIT_FAILURE);
  }
  return value;
}

int main(int argc, char **argv) {
  const char *folder = argc > 1 ? argv[1] : ".";
  const uint64_t bytes = argument(argc, argv, 2, 1024) << 20, request_bytes = argument(argc, argv, 3, 1024) << 10;
  const uint64_t depth = argument(argc, argv, 4, 16);
  const bool threads = argc > 5 && strcmp(argv[5], "threads") == 0;
  if (request_bytes > FLAP_BLOCK_REQUEST_BYTES_MAX) {
    (void)fprintf(stderr, "bench_disk: a request has at most %u KiB\n", FLAP_BLOCK_REQUEST_BYTES_MAX >> 10);
    return EXIT_FAILURE;
  }
  flap_block_rates rates;
  if (flap_block_measure_rates(folder, bytes, (uint32_t)request_bytes, (uint32_t)depth, 0,
                               threads ? FLAP_BLOCK_THREADS : FLAP_BLOCK_URING, &rates) != FLAP_OK) {
    (void)fprintf(stderr, "bench_disk: %s\n", flap_error_message());
    return EXIT_FAILURE;
  }
  printf("read %.3f GB/s\nwrite %.3f GB/s\n", rates.read_bytes * 1e-9, rates.write_bytes * 1e-9);
  return EXIT_SUCCESS;
}
