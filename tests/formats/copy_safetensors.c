/* The other half of safetensors_reference.py: reads with our reader, writes with our writer.
 *
 * copy_safetensors copy <file or folder> <file>            all tensors, and the metadata "format" and "note"
 * copy_safetensors shard <file or folder> <folder> <bytes> the same in shards of at most so many bytes, and an index
 * copy_safetensors check <file>...                         per file one line: "ok", or the status and the message
 */
#include "io/formats/durable.h"
#include "io/formats/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAIRS_MAX 2u

static flap_status write_tensors(const flap_safetensors *reader, uint64_t first, uint64_t end, const char *path) {
  static const char *const keys[PAIRS_MAX] = {"format", "note"};
  flap_safetensors_pair pairs[PAIRS_MAX];
  uint64_t pair_count = 0;
  flap_safetensors_writer *writer = NULL;
  flap_safetensors_entry *entries = calloc(end - first + 1, sizeof *entries);
  if (!entries)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for entries");
  for (uint64_t i = first; i < end; i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    flap_safetensors_entry *entry = &entries[i - first];
    *entry = (flap_safetensors_entry){.name = tensor->name, .dtype = tensor->dtype, .rank = tensor->rank};
    memcpy(entry->shape, tensor->shape, sizeof entry->shape);
  }
  for (unsigned i = 0; i < PAIRS_MAX; i++)
    if (flap_safetensors_metadata(reader, keys[i]))
      pairs[pair_count++] = (flap_safetensors_pair){keys[i], flap_safetensors_metadata(reader, keys[i])};
  flap_status status =
      flap_safetensors_write_begin(path, entries, end - first, pairs, pair_count, (flap_file_piece){0}, &writer);
  free(entries);
  if (status != FLAP_OK)
    return status;
  for (uint64_t i = first; i < end && status == FLAP_OK; i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    void *data = malloc(tensor->bytes + 1);
    status = data ? flap_safetensors_read(reader, tensor, 0, tensor->bytes, data)
                  : flap_error_set(FLAP_NO_MEMORY, "no memory for %s", tensor->name);
    if (status == FLAP_OK)
      status = flap_safetensors_write(writer, data, tensor->bytes);
    free(data);
  }
  if (status == FLAP_OK)
    return flap_safetensors_write_end(writer);
  flap_safetensors_write_abort(writer);
  return status;
}

static flap_status write_shards(const flap_safetensors *reader, const char *folder, uint64_t bytes_max, uint64_t *bytes,
                                uint32_t *shard_of, const char **names) {
  uint64_t count = flap_safetensors_count(reader), next = 0;
  for (uint64_t i = 0; i < count; i++) {
    bytes[i] = flap_safetensors_at(reader, i)->bytes;
    names[i] = flap_safetensors_at(reader, i)->name;
  }
  uint32_t shards = flap_safetensors_plan_shards(bytes, count, bytes_max, shard_of);
  for (uint32_t shard = 0; shard < shards; shard++) {
    char name[FLAP_SAFETENSORS_SHARD_NAME_MAX], path[FLAP_DURABLE_PATH_MAX];
    uint64_t first = next;
    while (next < count && shard_of[next] == shard)
      next++;
    flap_safetensors_shard_name(shard, shards, name);
    FLAP_TRY(flap_durable_join(path, folder, name));
    FLAP_TRY(write_tensors(reader, first, next, path));
  }
  return flap_safetensors_write_index(folder, names, shard_of, count, shards, flap_safetensors_bytes(reader));
}

static flap_status shard(const flap_safetensors *reader, const char *folder, uint64_t bytes_max) {
  uint64_t count = flap_safetensors_count(reader);
  uint64_t *bytes = calloc(count + 1, sizeof *bytes);
  uint32_t *shard_of = calloc(count + 1, sizeof *shard_of);
  const char **names = calloc(count + 1, sizeof *names);
  flap_status status = bytes && shard_of && names ? write_shards(reader, folder, bytes_max, bytes, shard_of, names)
                                                  : flap_error_set(FLAP_NO_MEMORY, "no memory for a list of shards");
  free(bytes);
  free(shard_of);
  free(names);
  return status;
}

static int check(int count, char **paths) {
  for (int i = 0; i < count; i++) {
    flap_safetensors *reader = NULL;
    flap_status status = flap_safetensors_open(paths[i], &reader);
    if (status == FLAP_OK)
      printf("ok\n");
    else
      printf("%s: %s\n", flap_status_name(status), flap_error_message());
    flap_safetensors_close(reader);
  }
  return 0;
}

int main(int argc, char **argv) {
  flap_safetensors *reader = NULL;
  flap_status status;
  if (argc >= 2 && strcmp(argv[1], "check") == 0)
    return check(argc - 2, argv + 2);
  bool copies = argc == 4 && strcmp(argv[1], "copy") == 0, shards = argc == 5 && strcmp(argv[1], "shard") == 0;
  if (!copies && !shards) {
    fprintf(stderr, "usage: see the head of copy_safetensors.c\n");
    return 2;
  }
  status = flap_safetensors_open(argv[2], &reader);
  if (status == FLAP_OK && copies)
    status = write_tensors(reader, 0, flap_safetensors_count(reader), argv[3]);
  else if (status == FLAP_OK)
    status = shard(reader, argv[3], strtoull(argv[4], NULL, 10));
  flap_safetensors_close(reader);
  if (status != FLAP_OK)
    fprintf(stderr, "%s\n", flap_error_message());
  return status == FLAP_OK ? 0 : 1;
}
