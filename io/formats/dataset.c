/* Invariants of an open dataset:
 *  1. segments are the files in order; starts[i] is the stream position of the first token of segment i, and
 *     starts[segment_count] the number of tokens;
 *  2. training windows lie in [0, heldout_start), held-out windows in [heldout_start, tokens);
 *  3. every id was seen to be below the vocabulary once, and is checked again each time it is read.
 */
#include "io/formats/dataset_internal.h"

#include "base/assert.h"
#include "base/philox.h"
#include "base/system.h"
#include "base/units.h"
#include "io/formats/durable.h"
#include "io/formats/tokenizer_map.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK_TOKENS 65536u

struct flap_dataset {
  flap_shard *segments;
  uint64_t *starts; /* [segment_count + 1] */
  uint64_t segment_count;
  int scratch_fd; /* -1: no text */
  uint64_t scratch_bytes;
  uint32_t vocabulary, sequence_length;
  uint64_t seed;
  uint64_t sequences, heldout, heldout_start;
  double own_nats, train_nats;
  uint64_t digest;
};

void flap_dataset_close(flap_dataset *dataset) {
  if (dataset == NULL)
    return;
  /* Without memory for them they are counted, but not there. */
  for (uint64_t i = 0; dataset->segments != NULL && i < dataset->segment_count; i++)
    flap_shard_close(&dataset->segments[i]);
  if (dataset->scratch_fd >= 0)
    (void)flap_system_close(dataset->scratch_fd);
  free(dataset->segments);
  free(dataset->starts);
  free(dataset);
}

uint64_t flap_dataset_sequences(const flap_dataset *dataset) {
  return dataset->sequences;
}
uint64_t flap_dataset_heldout(const flap_dataset *dataset) {
  return dataset->heldout;
}
uint64_t flap_dataset_tokens(const flap_dataset *dataset) {
  return dataset->starts[dataset->segment_count];
}
uint32_t flap_dataset_sequence_length(const flap_dataset *dataset) {
  return dataset->sequence_length;
}
uint64_t flap_dataset_scratch_bytes(const flap_dataset *dataset) {
  return dataset->scratch_bytes;
}
uint64_t flap_dataset_digest(const flap_dataset *dataset) {
  return dataset->digest;
}

void flap_dataset_unigram_entropy(const flap_dataset *dataset, double *own_nats_out, double *train_nats_out) {
  flap_assert(dataset->heldout > 0);
  *own_nats_out = dataset->own_nats;
  *train_nats_out = dataset->train_nats;
}

/* ---- order --------------------------------------------------------------------------------------------- */

#define ROUNDS 6u
#define HALF_BITS_MIN 3u

/* Halves of b bits make a domain of 4^b >= n, at most four times n (or 64): few steps of the walk leave it. */
uint64_t flap_dataset_permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t index) {
  flap_assert(n > 0 && index < n && n <= (uint64_t)1 << 62);
  flap_philox epochs = flap_philox_stream(seed, "dataset order");
  uint32_t words[4];
  flap_philox_block(&epochs, epoch, words);
  flap_philox rounds = {.key = {words[0], words[1]}};
  unsigned bits = HALF_BITS_MIN;
  while ((uint64_t)1 << (2 * bits) < n)
    bits++;
  uint64_t mask = ((uint64_t)1 << bits) - 1;
  do {
    uint64_t left = index >> bits, right = index & mask;
    for (uint64_t round = 0; round < ROUNDS; round++) {
      flap_philox_block(&rounds, round << 32 | right, words);
      uint64_t next = left ^ (words[0] & mask);
      left = right;
      right = next;
    }
    index = left << bits | right;
  } while (index >= n);
  return index;
}

uint64_t flap_dataset_window(const flap_dataset *dataset, uint64_t index) {
  return flap_dataset_permute(dataset->seed, index / dataset->sequences, dataset->sequences,
                              index % dataset->sequences);
}

/* ---- reading ------------------------------------------------------------------------------------------- */

static flap_status read_stream(const flap_dataset *dataset, uint64_t first, uint64_t count, int32_t *ids_out) {
  uint64_t low = 0, high = dataset->segment_count;
  while (high - low > 1) {
    uint64_t middle = (low + high) / 2;
    if (dataset->starts[middle] <= first)
      low = middle;
    else
      high = middle;
  }
  for (uint64_t segment = low; count > 0; segment++) {
    flap_assert(segment < dataset->segment_count);
    uint64_t rest = dataset->starts[segment + 1] - first;
    uint64_t step = count < rest ? count : rest;
    FLAP_TRY(flap_shard_read(&dataset->segments[segment], first - dataset->starts[segment], step, dataset->vocabulary,
                             ids_out));
    ids_out += step;
    first += step;
    count -= step;
  }
  return FLAP_OK;
}

/* Held-out windows end with the stream, which the last one may pass where all is held out: the rest is padding. */
static uint64_t targets_of_window(const flap_dataset *dataset, uint64_t first) {
  const uint64_t left = flap_dataset_tokens(dataset) - 1 - first, length = dataset->sequence_length;
  return left < length ? left : length;
}

static flap_status fetch_part(const flap_dataset *dataset, uint64_t first, uint64_t count, int32_t *tokens,
                              int32_t *targets) {
  FLAP_TRY(read_stream(dataset, first, count, tokens));
  FLAP_TRY(read_stream(dataset, first + 1, count, targets));
  for (uint64_t i = count; i < dataset->sequence_length; i++) {
    tokens[i] = 0;
    targets[i] = -1;
  }
  return FLAP_OK;
}

static flap_status fetch_window(const flap_dataset *dataset, uint64_t first, int32_t *tokens, int32_t *targets) {
  uint64_t length = dataset->sequence_length;
  FLAP_TRY(read_stream(dataset, first, length, tokens));
  memcpy(targets, tokens + 1, (length - 1) * sizeof *targets);
  return read_stream(dataset, first + length, 1, targets + length - 1);
}

flap_status flap_dataset_fetch(const flap_dataset *dataset, uint64_t first, uint64_t count, int32_t *tokens,
                               int32_t *targets) {
  uint64_t length = dataset->sequence_length;
  for (uint64_t i = 0; i < count; i++)
    FLAP_TRY(fetch_window(dataset, flap_dataset_window(dataset, first + i) * length, tokens + i * length,
                          targets + i * length));
  return FLAP_OK;
}

flap_status flap_dataset_fetch_heldout(const flap_dataset *dataset, uint64_t first, uint64_t count, int32_t *tokens,
                                       int32_t *targets, uint64_t *targets_out) {
  flap_assert(first <= dataset->heldout && count <= dataset->heldout - first);
  uint64_t length = dataset->sequence_length;
  *targets_out = 0;
  for (uint64_t i = 0; i < count; i++) {
    const uint64_t start = dataset->heldout_start + (first + i) * length, part = targets_of_window(dataset, start);
    FLAP_TRY(part == length ? fetch_window(dataset, start, tokens + i * length, targets + i * length)
                            : fetch_part(dataset, start, part, tokens + i * length, targets + i * length));
    *targets_out += part;
  }
  return FLAP_OK;
}

/* ---- opening ------------------------------------------------------------------------------------------- */

/* Takes the file's place on the disk away from its name at once, so that nothing is left behind whatever happens. */
static flap_status open_scratch(const char *folder, int *fd_out) {
  char path[FLAP_DURABLE_PATH_MAX];
  if (folder == NULL)
    return flap_error_set(FLAP_INVALID, "dataset: text needs a folder for its tokens");
  FLAP_TRY(flap_durable_join(path, folder, ".flap-tokens-XXXXXX"));
  *fd_out = flap_system_mkostemp(path, O_CLOEXEC);
  if (*fd_out < 0)
    return flap_error_set_os(errno, "%s: cannot make a file for tokens", folder);
  if (flap_system_unlink(path) != 0)
    return flap_error_set_os(errno, "%s", path);
  return FLAP_OK;
}

/* The record names the folder and the reason; what was to be written there, and what else can be done, is known here.
 */
static flap_status explain_no_room(flap_status status) {
  if (status != FLAP_NO_SPACE)
    return status;
  return flap_error_prefix(status,
                           "dataset: no room for the tokens of the text (2 to 4 bytes each), which flap tokenize "
                           "can write elsewhere");
}

static flap_status tokenize_all(flap_dataset *dataset, const flap_dataset_config *config, const flap_file_list *files,
                                unsigned char *buffer) {
  FLAP_TRY(open_scratch(config->scratch_folder, &dataset->scratch_fd));
  uint32_t tokenizer_vocabulary = flap_tokenizer_vocabulary(config->tokenizer);
  flap_shard_sink sink = {.fd = dataset->scratch_fd,
                          .path = config->scratch_folder,
                          .width = tokenizer_vocabulary <= FLAP_SHARD_NARROW_VOCABULARY ? 2 : 4,
                          .buffer = buffer};
  sink.tokens_max = config->scratch_bytes_max > 0 ? config->scratch_bytes_max / sink.width : UINT64_MAX / 8;
  for (uint64_t i = 0; i < files->count; i++) {
    if (files->files[i].kind == FLAP_DATA_SHARD)
      continue;
    flap_shard *segment = &dataset->segments[i];
    uint64_t before = sink.tokens;
    flap_status status = flap_dataset_tokenize(&files->files[i], config, &sink);
    if (status == FLAP_BUDGET)
      return flap_error_set(
          FLAP_BUDGET,
          "dataset: the tokens of the text need more than the %llu bytes of disk that are left for them; at %s",
          (unsigned long long)config->scratch_bytes_max, files->files[i].path);
    FLAP_TRY(explain_no_room(status));
    *segment = (flap_shard){.path = strdup(files->files[i].path),
                            .fd = dataset->scratch_fd,
                            .offset = before * sink.width,
                            .tokens = sink.tokens - before,
                            .width = sink.width};
    if (segment->path == NULL)
      return flap_error_set(FLAP_NO_MEMORY, "dataset: no memory for the name %s", files->files[i].path);
  }
  dataset->scratch_bytes = sink.tokens * sink.width;
  return explain_no_room(flap_shard_flush(&sink));
}

static flap_status open_segments(flap_dataset *dataset, const flap_dataset_config *config,
                                 const flap_file_list *files) {
  dataset->segment_count = files->count;
  dataset->segments = calloc(files->count, sizeof *dataset->segments);
  dataset->starts = calloc(files->count + 1, sizeof *dataset->starts);
  unsigned char *buffer = malloc(FLAP_SHARD_SINK_BYTES);
  flap_status status = FLAP_OK;
  if (dataset->segments == NULL || dataset->starts == NULL || buffer == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "dataset: no memory for %llu files", (unsigned long long)files->count);
    goto fail;
  }
  bool has_text = false;
  for (uint64_t i = 0; i < files->count; i++) {
    if (files->files[i].kind == FLAP_DATA_SHARD)
      FLAP_TRY_GOTO(status, flap_shard_open(files->files[i].path, &dataset->segments[i]));
    else
      has_text = true;
  }
  if (has_text)
    FLAP_TRY_GOTO(status, tokenize_all(dataset, config, files, buffer));
  for (uint64_t i = 0; i < files->count; i++)
    dataset->starts[i + 1] = dataset->starts[i] + dataset->segments[i].tokens;
fail:
  free(buffer);
  return status;
}

/* All is held out, from the first token that another one follows, in a shorter sequence at the end if need be. */
static flap_status split_nothing_off(flap_dataset *dataset) {
  const uint64_t tokens = flap_dataset_tokens(dataset), length = dataset->sequence_length;
  if (tokens < 2)
    return flap_error_set(FLAP_INVALID,
                          "dataset: %s: %llu tokens are too few: one that another one follows is the least",
                          dataset->segments[0].path, (unsigned long long)tokens);
  dataset->heldout = (tokens - 1 + length - 1) / length;
  dataset->heldout_start = 0;
  dataset->sequences = 0;
  return FLAP_OK;
}

static flap_status split(flap_dataset *dataset, double val_size, bool heldout_all) {
  uint64_t tokens = flap_dataset_tokens(dataset), length = dataset->sequence_length;
  uint64_t all = tokens > 0 ? (tokens - 1) / length : 0;
  const char *first = dataset->segments[0].path, *others = dataset->segment_count > 1 ? " and others" : "";
  if (!(val_size >= 0) || (val_size >= 1 && (val_size != floor(val_size) || val_size > 1e15)))
    return flap_error_set(FLAP_INVALID, "val_size: %g is neither a fraction below 1 nor a whole number of sequences",
                          val_size);
  if (heldout_all)
    return split_nothing_off(dataset);
  if (all == 0)
    return flap_error_set(
        FLAP_INVALID,
        "dataset: %s%s: %llu tokens are too few: one sequence takes %llu (%llu inputs and one more target); "
        "add text, or shorten the sequences",
        first, others, (unsigned long long)tokens, (unsigned long long)length + 1, (unsigned long long)length);
  if (val_size >= 1)
    dataset->heldout = (uint64_t)val_size;
  else if (val_size > 0)
    dataset->heldout = (uint64_t)(val_size * (double)all) > 0 ? (uint64_t)(val_size * (double)all) : 1;
  bool fits = dataset->heldout <= all;
  dataset->heldout_start = tokens;
  if (fits && dataset->heldout > 0)
    dataset->heldout_start = tokens - (dataset->heldout * length + 1);
  dataset->sequences = fits && dataset->heldout_start > 0 ? (dataset->heldout_start - 1) / length : 0;
  if (dataset->sequences == 0)
    return flap_error_set(
        FLAP_INVALID,
        "dataset: %s%s: %llu tokens are too few for %llu held-out sequences of %llu tokens and one for "
        "training (%llu tokens in all); add text, lower val_size, or shorten the sequences",
        first, others, (unsigned long long)tokens, (unsigned long long)dataset->heldout, (unsigned long long)length,
        (unsigned long long)((dataset->heldout + 1) * length + 2));
  return FLAP_OK;
}

/* Nats per held-out target under its own frequencies, and under those of training with one added to each count. */
static void measure_entropy(flap_dataset *dataset, const uint64_t *train, const uint64_t *heldout) {
  double targets = (double)(flap_dataset_tokens(dataset) - 1 - dataset->heldout_start);
  double train_total = (double)dataset->heldout_start + (double)dataset->vocabulary;
  for (uint32_t id = 0; id < dataset->vocabulary; id++) {
    if (heldout[id] == 0)
      continue;
    double share = (double)heldout[id] / targets;
    dataset->own_nats -= share * log(share);
    dataset->train_nats -= share * log(((double)train[id] + 1) / train_total);
  }
}

/* Reads the whole stream once: ids, counts, digest. */
static flap_status inspect(flap_dataset *dataset, const flap_dataset_config *config) {
  uint64_t *train = calloc(2 * (uint64_t)dataset->vocabulary, sizeof *train);
  int32_t *chunk = malloc(CHUNK_TOKENS * sizeof *chunk);
  flap_status status = FLAP_OK;
  if (train == NULL || chunk == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "dataset: no memory to count %u tokens", (unsigned)dataset->vocabulary);
    goto fail;
  }
  uint64_t *heldout = train + dataset->vocabulary;
  uint64_t tokens = flap_dataset_tokens(dataset);
  const uint64_t shape[3] = {tokens, dataset->sequence_length, dataset->heldout};
  dataset->digest = flap_text_hash((const char *)shape, sizeof shape);
  for (uint64_t first = 0; first < tokens; first += CHUNK_TOKENS) {
    uint64_t count = tokens - first < CHUNK_TOKENS ? tokens - first : CHUNK_TOKENS;
    FLAP_TRY_GOTO(status, flap_dataset_go_on(config));
    FLAP_TRY_GOTO(status, read_stream(dataset, first, count, chunk));
    const uint64_t link[2] = {dataset->digest, flap_text_hash((const char *)chunk, count * sizeof *chunk)};
    dataset->digest = flap_text_hash((const char *)link, sizeof link);
    for (uint64_t i = 0; i < count; i++) {
      if (first + i < dataset->heldout_start)
        train[chunk[i]]++;
      else if (first + i > dataset->heldout_start) /* the first one is no target */
        heldout[chunk[i]]++;
    }
  }
  if (dataset->heldout > 0)
    measure_entropy(dataset, train, heldout);
fail:
  free(train);
  free(chunk);
  return status;
}

flap_status flap_dataset_open(const flap_dataset_config *config, flap_dataset **dataset_out) {
  *dataset_out = NULL;
  if (config->sequence_length == 0)
    return flap_error_set(FLAP_INVALID, "dataset: sequences of no tokens");
  flap_file_list files;
  FLAP_TRY(flap_dataset_expand(config->paths, config->path_count, &files));
  flap_status status = FLAP_OK;
  flap_dataset *dataset = calloc(1, sizeof *dataset);
  if (dataset == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "dataset: no memory");
    goto fail;
  }
  dataset->scratch_fd = -1;
  dataset->sequence_length = config->sequence_length;
  dataset->seed = config->seed;
  FLAP_TRY_GOTO(status, flap_dataset_check_config(config, &files, &dataset->vocabulary));
  FLAP_TRY_GOTO(status, open_segments(dataset, config, &files));
  FLAP_TRY_GOTO(status, split(dataset, config->val_size, config->heldout_all));
  FLAP_TRY_GOTO(status, inspect(dataset, config));
  flap_file_list_free(&files);
  *dataset_out = dataset;
  return FLAP_OK;
fail:
  flap_file_list_free(&files);
  flap_dataset_close(dataset);
  return status;
}
