/* How far the page codec makes values shorter, and how fast, by zstd and by LZ4, on one core.
 *
 *   bench_codec [rounds]                       made-up values
 *   bench_codec [rounds] FILE ELEMENT_BYTES    those of a file: a raw array of 1, 2 or 4 bytes each (of a safetensors,
 * say, with its header, which is short)
 *
 * The bound of the ratio is the entropy of the shuffled page's planes, page by page: what a coder that knows only how
 * frequent each byte is could reach. Times are the thread's own, so other work on the machine counts little; each is
 * the median of the rounds.
 */
#include "base/dtype.h"
#include "base/philox.h"
#include "io/block/codec.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGE_BYTES (4u << 20)
#define ROUNDS_MAX 101

static double thread_seconds(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, int count) {
  qsort(values, (size_t)count, sizeof *values, by_value);
  return values[count / 2];
}

static double entropy_bytes(const unsigned char *page, uint32_t bytes, uint32_t element) {
  const double count = bytes / element;
  double bits = 0;
  for (uint32_t plane = 0; plane < element; plane++) {
    uint32_t seen[256] = {0};
    for (uint32_t i = plane; i < bytes; i += element)
      seen[page[i]]++;
    for (int value = 0; value < 256; value++)
      bits -= seen[value] > 0 ? seen[value] * log2(seen[value] / count) : 0;
  }
  return bits / 8;
}

static void measure(const char *name, const unsigned char *bytes, uint64_t count, uint32_t element, int rounds) {
  static const char *const codec_names[] = {[FLAP_CODEC_LZ4] = "lz4", [FLAP_CODEC_ZSTD] = "zstd"};
  unsigned char *encoded = malloc(PAGE_BYTES), *decoded = malloc(PAGE_BYTES),
                *scratch = malloc(flap_block_codec_scratch(PAGE_BYTES));
  if (encoded == NULL || decoded == NULL || scratch == NULL)
    exit(EXIT_FAILURE);
  for (int codec = FLAP_CODEC_LZ4; codec <= FLAP_CODEC_ZSTD; codec++) {
    double in = 0, out = 0, least = 0, encode[ROUNDS_MAX], decode[ROUNDS_MAX];
    for (int round = 0; round < rounds; round++) {
      encode[round] = decode[round] = in = out = least = 0;
      for (uint64_t at = 0; at + PAGE_BYTES <= count; at += PAGE_BYTES) {
        const double started = thread_seconds();
        const uint32_t stored = flap_block_encode((flap_codec)codec, bytes + at, PAGE_BYTES, element, encoded, scratch);
        const double between = thread_seconds();
        const bool right = stored == PAGE_BYTES || (flap_block_decode(encoded, stored, decoded, PAGE_BYTES, scratch) &&
                                                    memcmp(decoded, bytes + at, PAGE_BYTES) == 0);
        decode[round] += stored < PAGE_BYTES ? thread_seconds() - between : 0;
        encode[round] += between - started;
        in += PAGE_BYTES;
        out += stored;
        least += round == 0 ? entropy_bytes(bytes + at, PAGE_BYTES, element) : 0;
        if (!right) {
          (void)fprintf(stderr, "bench_codec: %s: what came back is something else\n", name);
          exit(EXIT_FAILURE);
        }
      }
      if (round == 0)
        printf("%-32s %-5s ratio %7.3f (entropy %.3f)", name, codec_names[codec], in / out, in / least);
    }
    const double slower = median(decode, rounds);
    printf("  encode %6.2f GB/s  decode ", 1e-9 * in / median(encode, rounds));
    if (slower > 0)
      printf("%6.2f GB/s\n", 1e-9 * in / slower);
    else
      printf("     -\n");
  }
  free(encoded);
  free(decoded);
  free(scratch);
}

static void measure_made_up(int rounds) {
  const uint32_t count = PAGE_BYTES / 4;
  const flap_philox stream = flap_philox_stream(1, "codec");
  float *numbers = malloc(PAGE_BYTES), *squares = malloc(PAGE_BYTES);
  uint16_t *halves = malloc(PAGE_BYTES);
  uint32_t *words = calloc(count, 4);
  float *twice = malloc(2 * (size_t)PAGE_BYTES);
  if (numbers == NULL || squares == NULL || halves == NULL || words == NULL || twice == NULL)
    exit(EXIT_FAILURE);
  flap_philox_normals(&stream, 0, 2 * (uint64_t)count, twice);
  for (uint32_t i = 0; i < count; i++) {
    numbers[i] = 0.02f * twice[i];
    squares[i] = numbers[i] * numbers[i];
  }
  for (uint32_t i = 0; i < 2 * count; i++)
    halves[i] = flap_f32_to_bf16(0.02f * twice[i]);
  measure("normal numbers in bf16", (const unsigned char *)halves, PAGE_BYTES, 2, rounds);
  measure("normal numbers in fp32", (const unsigned char *)numbers, PAGE_BYTES, 4, rounds);
  measure("their squares in fp32", (const unsigned char *)squares, PAGE_BYTES, 4, rounds);
  for (uint32_t i = 0; i < count; i++)
    halves[2 * i + flap_philox_below(&stream, i, 2)] = 0;
  measure("bf16, half of them zeros", (const unsigned char *)halves, PAGE_BYTES, 2, rounds);
  measure("zeros", (const unsigned char *)words, PAGE_BYTES, 4, rounds);
  for (uint32_t i = 0; i < count; i++)
    words[i] = (uint32_t)flap_philox_below(&stream, i, (uint64_t)1 << 32);
  measure("random low halves", (const unsigned char *)words, PAGE_BYTES, 2, rounds);
  free(numbers);
  free(squares);
  free(halves);
  free(words);
  free(twice);
}

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 9;
  const uint32_t element = argc > 3 ? (uint32_t)atoi(argv[3]) : 4;
  if (rounds < 1 || rounds > ROUNDS_MAX || argc == 3 || argc > 4 || (element != 1 && element != 2 && element != 4)) {
    (void)fprintf(stderr, "usage: bench_codec [rounds] [FILE ELEMENT_BYTES]\n");
    return EXIT_FAILURE;
  }
  if (argc == 1 || argc == 2) {
    measure_made_up(rounds);
    return EXIT_SUCCESS;
  }
  FILE *file = fopen(argv[2], "rb");
  const long bytes = file != NULL && fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
  unsigned char *values = bytes >= (long)PAGE_BYTES ? malloc((size_t)bytes) : NULL;
  if (values != NULL)
    rewind(file);
  if (values == NULL || fread(values, 1, (size_t)bytes, file) != (size_t)bytes) {
    (void)fprintf(stderr, "bench_codec: %s cannot be read, or has less than a page of 4 MiB\n", argv[2]);
    return EXIT_FAILURE;
  }
  (void)fclose(file);
  measure(argv[2], values, (uint64_t)bytes, element, rounds);
  free(values);
  return EXIT_SUCCESS;
}
