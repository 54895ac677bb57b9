/* Writes safetensors: the header first, from sizes that are all known, then the data in order. */
#include "io/formats/safetensors.h"
#include "io/formats/safetensors_internal.h"

#include "base/assert.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Summed up and then copied into the piece, while it is in a core's own cache. */
#define SUM_BYTES ((uint64_t)64 << 10)

struct flap_safetensors_writer {
  char *path;
  flap_large_file file;
  uint64_t bytes_left; /* of data that the header promises */
  bool failed;
  flap_checksums *checksums; /* takes the file's sum at the end; NULL: nobody wants it */
  flap_checksum *sum;        /* of the header, and of the data if there is a list */
};

/* ---- header -------------------------------------------------------------------------------------------- */

static flap_status no_memory(void) {
  return flap_error_set(FLAP_NO_MEMORY, "no memory for a safetensors header");
}

/* jansson refuses a text for the one reason or the other, and does not say for which. */
static bool is_utf8(const char *text) {
  const size_t length = strlen(text);
  return flap_utf8_valid(text, length) == length;
}

static flap_status bad_entry(const flap_safetensors_entry *entry, const char *what) {
  char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
  return flap_error_set(FLAP_INVALID, "cannot write tensor \"%s\": %s", flap_safetensors_shown(entry->name, shown),
                        what);
}

/* {"dtype", "shape", "data_offsets"}; NULL for lack of memory. */
static json_t *describe(const flap_safetensors_entry *entry, uint64_t begin, uint64_t end) {
  json_t *shape = json_array();
  int failed = shape ? 0 : 1;
  for (uint32_t i = 0; i < entry->rank && !failed; i++)
    failed = json_array_append_new(shape, json_integer((json_int_t)entry->shape[i]));
  if (failed) {
    json_decref(shape);
    return NULL;
  }
  return json_pack("{s:s, s:o, s:[I, I]}", "dtype", flap_safetensors_dtype_name(entry->dtype), "shape", shape,
                   "data_offsets", (json_int_t)begin, (json_int_t)end);
}

static flap_status add_entry(json_t *header, const flap_safetensors_entry *entry, uint64_t *data_bytes) {
  uint64_t elements, bytes;
  if (entry->rank > FLAP_SAFETENSORS_RANK_MAX)
    return bad_entry(entry, "too many dimensions");
  if (!flap_safetensors_size(entry->dtype, entry->rank, entry->shape, &elements, &bytes) ||
      bytes > (uint64_t)INT64_MAX - *data_bytes)
    return bad_entry(entry, "the file would have more bytes than any");
  for (uint32_t i = 0; i < entry->rank; i++)
    if (entry->shape[i] > INT64_MAX) /* beside a 0 the size does not tell */
      return bad_entry(entry, "a dimension is out of range");
  if (strcmp(entry->name, FLAP_SAFETENSORS_METADATA) == 0)
    return bad_entry(entry, "the name is reserved");
  if (json_object_get(header, entry->name))
    return bad_entry(entry, "the name is given twice");
  json_t *info = describe(entry, *data_bytes, *data_bytes + bytes);
  if (!info)
    return no_memory();
  if (json_object_set_new(header, entry->name, info) != 0)
    return is_utf8(entry->name) ? no_memory() : bad_entry(entry, "the name is not UTF-8");
  *data_bytes += bytes;
  return FLAP_OK;
}

static flap_status add_metadata(json_t *header, const flap_safetensors_pair *metadata, uint64_t count) {
  json_t *object = json_object();
  if (!object || json_object_set_new(header, FLAP_SAFETENSORS_METADATA, object) != 0)
    return no_memory();
  for (uint64_t i = 0; i < count; i++) {
    char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
    const bool twice = json_object_get(object, metadata[i].key) != NULL;
    if (!twice && json_object_set_new(object, metadata[i].key, json_string(metadata[i].value)) == 0)
      continue;
    return !twice && is_utf8(metadata[i].key) && is_utf8(metadata[i].value)
               ? no_memory()
               : flap_error_set(FLAP_INVALID, "cannot write metadata \"%s\": given twice, or not UTF-8",
                                flap_safetensors_shown(metadata[i].key, shown));
  }
  return FLAP_OK;
}

/* The JSON text padded with blanks so that the data starts at a multiple of 8; the caller frees it. */
static flap_status header_text(json_t *header, char **text_out, uint64_t *length_out) {
  char *text = flap_json_dumps(header, JSON_COMPACT);
  if (!text)
    return no_memory();
  size_t length = strlen(text), padded = (length + 7) / 8 * 8;
  char *grown = realloc(text, padded + 1);
  if (!grown) {
    free(text);
    return no_memory();
  }
  memset(grown + length, ' ', padded - length);
  if (padded > FLAP_SAFETENSORS_HEADER_BYTES_MAX) {
    free(grown);
    return flap_error_set(FLAP_INVALID, "a safetensors header of %zu bytes is over the format's %u", padded,
                          FLAP_SAFETENSORS_HEADER_BYTES_MAX);
  }
  *text_out = grown;
  *length_out = padded;
  return FLAP_OK;
}

static flap_status make_header(const flap_safetensors_entry *entries, uint64_t count,
                               const flap_safetensors_pair *metadata, uint64_t metadata_count, char **text_out,
                               uint64_t *length_out, uint64_t *data_bytes_out) {
  flap_status status = FLAP_OK;
  uint64_t data_bytes = 0;
  json_t *header = json_object();
  if (!header)
    return no_memory();
  if (metadata_count > 0)
    FLAP_TRY_GOTO(status, add_metadata(header, metadata, metadata_count));
  for (uint64_t i = 0; i < count; i++)
    FLAP_TRY_GOTO(status, add_entry(header, &entries[i], &data_bytes));
  *data_bytes_out = data_bytes;
  status = header_text(header, text_out, length_out);
fail:
  json_decref(header);
  return status;
}

flap_status flap_safetensors_measure(const flap_safetensors_entry *entries, uint64_t count,
                                     const flap_safetensors_pair *metadata, uint64_t metadata_count,
                                     uint64_t *file_bytes_out) {
  char *text = NULL;
  uint64_t length, data_bytes;
  FLAP_TRY(make_header(entries, count, metadata, metadata_count, &text, &length, &data_bytes));
  free(text);
  *file_bytes_out = FLAP_SAFETENSORS_LENGTH_BYTES + length + data_bytes;
  return FLAP_OK;
}

/* ---- a file -------------------------------------------------------------------------------------------- */

static void release(flap_safetensors_writer *writer) {
  if (writer == NULL)
    return;
  flap_checksum_close(writer->sum);
  free(writer->path);
  free(writer);
}

static flap_status write_header(flap_safetensors_writer *writer, const char *text, uint64_t length) {
  unsigned char raw[FLAP_SAFETENSORS_LENGTH_BYTES];
  for (unsigned i = 0; i < sizeof raw; i++)
    raw[i] = (unsigned char)(length >> (8 * i));
  flap_checksum_add(writer->sum, raw, sizeof raw);
  flap_checksum_add(writer->sum, text, length);
  FLAP_TRY(flap_large_file_append(&writer->file, raw, sizeof raw));
  return flap_large_file_append(&writer->file, text, length);
}

flap_status flap_safetensors_write_begin(const char *path, const flap_safetensors_entry *entries, uint64_t count,
                                         const flap_safetensors_pair *metadata, uint64_t metadata_count,
                                         flap_file_piece piece, flap_safetensors_writer **writer_out) {
  char *text = NULL;
  uint64_t length = 0, data_bytes = 0;
  flap_status status = make_header(entries, count, metadata, metadata_count, &text, &length, &data_bytes);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "%s", path);
  flap_safetensors_writer *writer = calloc(1, sizeof *writer);
  if (!writer || !(writer->path = strdup(path)) || flap_checksum_open(&writer->sum) != FLAP_OK) {
    release(writer);
    free(text);
    return no_memory();
  }
  writer->bytes_left = data_bytes;
  status =
      flap_large_file_create(&writer->file, writer->path, FLAP_SAFETENSORS_LENGTH_BYTES + length + data_bytes, piece);
  if (status != FLAP_OK) {
    free(text);
    release(writer);
    return status;
  }
  status = write_header(writer, text, length);
  free(text);
  if (status != FLAP_OK) {
    flap_safetensors_write_abort(writer);
    return status;
  }
  *writer_out = writer;
  return FLAP_OK;
}

void flap_safetensors_write_sum(flap_safetensors_writer *writer, flap_checksums *checksums) {
  writer->checksums = checksums;
}

static flap_status append(flap_safetensors_writer *writer, const unsigned char *data, uint64_t bytes) {
  if (writer->checksums == NULL)
    return flap_large_file_append(&writer->file, data, bytes);
  while (bytes > 0) {
    const uint64_t part = bytes < SUM_BYTES ? bytes : SUM_BYTES;
    flap_checksum_add(writer->sum, data, part);
    FLAP_TRY(flap_large_file_append(&writer->file, data, part));
    data += part;
    bytes -= part;
  }
  return FLAP_OK;
}

flap_status flap_safetensors_write(flap_safetensors_writer *writer, const void *data, uint64_t bytes) {
  if (writer->failed)
    return flap_error_set(FLAP_CLOSED, "%s: an earlier write failed", writer->path);
  flap_status status;
  if (bytes > writer->bytes_left)
    status = flap_error_set(FLAP_INVALID, "%s: given %llu bytes more than its tensors have", writer->path,
                            (unsigned long long)(bytes - writer->bytes_left));
  else
    status = append(writer, data, bytes);
  writer->failed = status != FLAP_OK;
  if (status != FLAP_OK)
    return status;
  writer->bytes_left -= bytes;
  return FLAP_OK;
}

static flap_status finish(flap_safetensors_writer *writer) {
  if (writer->failed)
    return flap_error_set(FLAP_CLOSED, "%s: an earlier write failed", writer->path);
  if (writer->bytes_left > 0)
    return flap_error_set(FLAP_INVALID, "%s: %llu bytes of its tensors were never given", writer->path,
                          (unsigned long long)writer->bytes_left);
  FLAP_TRY(flap_large_file_commit(&writer->file));
  if (writer->checksums != NULL)
    FLAP_TRY(flap_checksums_add(writer->checksums, writer->path, writer->sum));
  return flap_durable_sync_parent(writer->path);
}

flap_status flap_safetensors_write_end(flap_safetensors_writer *writer) {
  flap_status status = finish(writer);
  if (status != FLAP_OK) {
    flap_safetensors_write_abort(writer);
    return status;
  }
  release(writer);
  return FLAP_OK;
}

void flap_safetensors_write_abort(flap_safetensors_writer *writer) {
  if (!writer)
    return;
  flap_large_file_abort(&writer->file);
  release(writer);
}

/* ---- shards -------------------------------------------------------------------------------------------- */

uint32_t flap_safetensors_plan_shards(const uint64_t *tensor_bytes, uint64_t count, uint64_t shard_bytes_max,
                                      uint32_t *shard_out) {
  uint32_t shard = 0;
  uint64_t used = 0;
  for (uint64_t i = 0; i < count; i++) {
    if (i > 0 && (used >= shard_bytes_max || tensor_bytes[i] > shard_bytes_max - used)) {
      flap_assert(shard < UINT32_MAX - 1);
      shard++;
      used = 0;
    }
    shard_out[i] = shard;
    used += tensor_bytes[i];
  }
  return count > 0 ? shard + 1 : 0;
}

void flap_safetensors_shard_name(uint32_t shard, uint32_t shards, char name_out[FLAP_SAFETENSORS_SHARD_NAME_MAX]) {
  flap_assert(shard < shards);
  if (shards == 1)
    (void)snprintf(name_out, FLAP_SAFETENSORS_SHARD_NAME_MAX, "%s", FLAP_SAFETENSORS_FILE);
  else
    (void)snprintf(name_out, FLAP_SAFETENSORS_SHARD_NAME_MAX, "model-%05u-of-%05u.safetensors", shard + 1, shards);
}

flap_status flap_safetensors_write_index(const char *folder, const char *const *names, const uint32_t *shard_of,
                                         uint64_t count, uint32_t shards, uint64_t total_bytes) {
  char path[FLAP_DURABLE_PATH_MAX], shard[FLAP_SAFETENSORS_SHARD_NAME_MAX];
  FLAP_TRY(flap_durable_join(path, folder, FLAP_SAFETENSORS_INDEX));
  json_t *map = json_object();
  json_t *root = json_pack("{s:{s:I}, s:O}", "metadata", "total_size", (json_int_t)total_bytes, "weight_map", map);
  flap_status status = map && root ? FLAP_OK : no_memory();
  for (uint64_t i = 0; i < count && status == FLAP_OK; i++) {
    char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
    flap_safetensors_shard_name(shard_of[i], shards, shard);
    const bool twice = json_object_get(map, names[i]) != NULL;
    if (!twice && json_object_set_new(map, names[i], json_string(shard)) == 0)
      continue;
    status = !twice && is_utf8(names[i]) ? no_memory()
                                         : flap_error_set(FLAP_INVALID, "%s: tensor \"%s\": given twice, or not UTF-8",
                                                          path, flap_safetensors_shown(names[i], shown));
  }
  if (status == FLAP_OK)
    status = flap_json_write_file(path, root);
  json_decref(root);
  json_decref(map);
  return status;
}
