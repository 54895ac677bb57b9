/* Reads safetensors: headers are parsed and checked whole at open, data is read where it lies.
 *
 * What open has checked, and read relies on:
 *   1. the file has exactly 8 + N bytes of header and the bytes of data that the header tells;
 *   2. each tensor's byte range is that of its dtype and shape, and the ranges cover the data without hole or overlap;
 *   3. names are unique, and sorted in `tensors`.
 */
#include "io/formats/safetensors.h"
#include "io/formats/safetensors_internal.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct tensor_file {
  char *path;
  int fd;
  uint64_t bytes;
  json_t *metadata; /* `__metadata__`, or NULL */
} tensor_file;

struct flap_safetensors {
  char *path;
  tensor_file *files;
  uint32_t file_count;
  flap_safetensors_tensor *tensors; /* names are ours */
  uint64_t count, capacity;
  uint64_t bytes;
};

static flap_status no_memory(const char *path) {
  return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for the list of its tensors", path);
}

static char *join(const char *folder, const char *name) {
  size_t bytes = strlen(folder) + strlen(name) + 2;
  char *path = malloc(bytes);
  if (path)
    (void)snprintf(path, bytes, "%s/%s", folder, name);
  return path;
}

/* ---- one tensor of a header ---------------------------------------------------------------------------- */

static flap_status bad_tensor(const tensor_file *file, const char *name, const char *what) {
  char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
  return flap_error_set(FLAP_CORRUPT, "%s: tensor \"%s\": %s", file->path, flap_safetensors_shown(name, shown), what);
}

static flap_status parse_dtype(const tensor_file *file, const char *name, const json_t *info,
                               flap_safetensors_dtype *dtype_out) {
  char shown[FLAP_SAFETENSORS_SHOWN_BYTES], shown_dtype[FLAP_SAFETENSORS_SHOWN_BYTES];
  const char *text = json_string_value(json_object_get(info, "dtype"));
  if (!text)
    return bad_tensor(file, name, "\"dtype\" is missing or not a string");
  for (int i = 0; i < FLAP_SAFETENSORS_DTYPE_COUNT; i++)
    if (strcmp(text, flap_safetensors_dtype_name((flap_safetensors_dtype)i)) == 0) {
      *dtype_out = (flap_safetensors_dtype)i;
      return FLAP_OK;
    }
  return flap_error_set(FLAP_UNSUPPORTED, "%s: tensor \"%s\": dtype \"%s\" is not one that FLAP reads", file->path,
                        flap_safetensors_shown(name, shown), flap_safetensors_shown(text, shown_dtype));
}

static flap_status parse_shape(const tensor_file *file, const json_t *info, flap_safetensors_tensor *tensor) {
  char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
  const json_t *shape = json_object_get(info, "shape");
  if (!json_is_array(shape))
    return bad_tensor(file, tensor->name, "\"shape\" is missing or not an array");
  size_t rank = json_array_size(shape);
  if (rank > FLAP_SAFETENSORS_RANK_MAX)
    return flap_error_set(FLAP_UNSUPPORTED, "%s: tensor \"%s\": %zu dimensions, but FLAP reads at most %u", file->path,
                          flap_safetensors_shown(tensor->name, shown), rank, FLAP_SAFETENSORS_RANK_MAX);
  tensor->rank = (uint32_t)rank;
  for (size_t i = 0; i < rank; i++) {
    const json_t *dimension = json_array_get(shape, i);
    if (!json_is_integer(dimension) || json_integer_value(dimension) < 0)
      return bad_tensor(file, tensor->name, "\"shape\" holds something else than integers from 0");
    tensor->shape[i] = (uint64_t)json_integer_value(dimension);
  }
  if (!flap_safetensors_size(tensor->dtype, tensor->rank, tensor->shape, &tensor->elements, &tensor->bytes))
    return bad_tensor(file, tensor->name, "its shape has more bytes than any file");
  return FLAP_OK;
}

/* Leaves the offset within the data in file_offset; the caller knows where the data starts. */
static flap_status parse_offsets(const tensor_file *file, const json_t *info, uint64_t data_bytes,
                                 flap_safetensors_tensor *tensor) {
  const json_t *offsets = json_object_get(info, "data_offsets");
  const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
    return bad_tensor(file, tensor->name, "\"data_offsets\" is missing or not two integers");
  int64_t from = json_integer_value(begin), to = json_integer_value(end);
  if (from < 0 || to < from)
    return bad_tensor(file, tensor->name, "\"data_offsets\" are negative or end before they begin");
  if ((uint64_t)to > data_bytes)
    return bad_tensor(file, tensor->name, "its bytes lie past the end of the file, which may be cut short");
  if ((uint64_t)(to - from) != tensor->bytes)
    return bad_tensor(file, tensor->name, "\"data_offsets\" span a different size than dtype and shape make");
  tensor->file_offset = (uint64_t)from;
  return FLAP_OK;
}

static flap_status parse_tensor(const tensor_file *file, const char *name, const json_t *info, uint64_t data_bytes,
                                flap_safetensors_tensor *tensor_out) {
  flap_safetensors_tensor tensor = {.name = name};
  if (!json_is_object(info))
    return bad_tensor(file, name, "is not described by an object");
  FLAP_TRY(parse_dtype(file, name, info, &tensor.dtype));
  FLAP_TRY(parse_shape(file, info, &tensor));
  FLAP_TRY(parse_offsets(file, info, data_bytes, &tensor));
  *tensor_out = tensor;
  return FLAP_OK;
}

static flap_status check_metadata(const tensor_file *file, json_t *metadata) {
  const char *key;
  json_t *value;
  if (!json_is_object(metadata))
    return flap_error_set(FLAP_CORRUPT, "%s: " FLAP_SAFETENSORS_METADATA " is not an object", file->path);
  json_object_foreach(metadata, key, value) {
    char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
    if (!json_is_string(value))
      return flap_error_set(FLAP_CORRUPT, "%s: " FLAP_SAFETENSORS_METADATA ": \"%s\" is not a string", file->path,
                            flap_safetensors_shown(key, shown));
  }
  return FLAP_OK;
}

/* ---- one file ------------------------------------------------------------------------------------------ */

static int by_place(const void *a, const void *b) {
  const flap_safetensors_tensor *one = a, *two = b;
  if (one->file_offset != two->file_offset)
    return one->file_offset < two->file_offset ? -1 : 1;
  return one->bytes < two->bytes ? -1 : one->bytes > two->bytes;
}

static flap_status check_cover(const tensor_file *file, flap_safetensors_tensor *tensors, uint64_t count,
                               uint64_t data_bytes) {
  uint64_t covered = 0;
  if (count > 0)
    qsort(tensors, count, sizeof *tensors, by_place);
  for (uint64_t i = 0; i < count; i++) {
    if (tensors[i].file_offset < covered)
      return bad_tensor(file, tensors[i].name, "its bytes overlap another tensor's");
    if (tensors[i].file_offset > covered)
      return bad_tensor(file, tensors[i].name, "bytes before it belong to no tensor");
    covered += tensors[i].bytes;
  }
  if (covered != data_bytes)
    return flap_error_set(FLAP_CORRUPT, "%s: %llu bytes at its end belong to no tensor", file->path,
                          (unsigned long long)(data_bytes - covered));
  return FLAP_OK;
}

/* Gives the reader the tensors that `wanted` (a weight_map) places in this file, or all where it is NULL. */
static flap_status list_tensors(flap_safetensors *reader, const flap_safetensors_tensor *tensors, uint64_t count,
                                uint32_t file_index, uint64_t data_start, const json_t *wanted) {
  const tensor_file *file = &reader->files[file_index];
  const char *file_name = strrchr(file->path, '/');
  file_name = file_name ? file_name + 1 : file->path;
  if (count > reader->capacity - reader->count) {
    uint64_t capacity = reader->count + count;
    flap_safetensors_tensor *grown = realloc(reader->tensors, capacity * sizeof *grown);
    if (!grown)
      return no_memory(file->path);
    reader->tensors = grown;
    reader->capacity = capacity;
  }
  for (uint64_t i = 0; i < count; i++) {
    const char *place = json_string_value(json_object_get(wanted, tensors[i].name));
    if (wanted && (!place || strcmp(place, file_name) != 0))
      continue;
    flap_safetensors_tensor *tensor = &reader->tensors[reader->count];
    *tensor = tensors[i];
    tensor->file = file_index;
    tensor->file_offset += data_start;
    tensor->name = strdup(tensors[i].name);
    if (!tensor->name)
      return no_memory(file->path);
    reader->count++;
    reader->bytes += tensor->bytes;
  }
  return FLAP_OK;
}

static flap_status parse_header(flap_safetensors *reader, uint32_t file_index, json_t *header, uint64_t data_start,
                                const json_t *wanted) {
  tensor_file *file = &reader->files[file_index];
  uint64_t data_bytes = file->bytes - data_start, count = 0;
  flap_safetensors_tensor *tensors = calloc(json_object_size(header) + 1, sizeof *tensors);
  if (!tensors)
    return no_memory(file->path);
  flap_status status = FLAP_OK;
  const char *name;
  json_t *info;
  json_object_foreach(header, name, info) {
    if (strcmp(name, FLAP_SAFETENSORS_METADATA) == 0) {
      FLAP_TRY_GOTO(status, check_metadata(file, info));
      file->metadata = json_incref(info);
    } else {
      FLAP_TRY_GOTO(status, parse_tensor(file, name, info, data_bytes, &tensors[count]));
      count++;
    }
  }
  FLAP_TRY_GOTO(status, check_cover(file, tensors, count, data_bytes));
  status = list_tensors(reader, tensors, count, file_index, data_start, wanted);
fail:
  free(tensors);
  return status;
}

/* The length of the JSON text, checked against the file's. */
static flap_status read_header_length(const tensor_file *file, uint64_t *length_out) {
  unsigned char raw[FLAP_SAFETENSORS_LENGTH_BYTES];
  if (file->bytes < sizeof raw)
    return flap_error_set(FLAP_CORRUPT, "%s: %llu bytes are too few for a safetensors file", file->path,
                          (unsigned long long)file->bytes);
  FLAP_TRY(flap_durable_read_all(file->fd, file->path, 0, raw, sizeof raw));
  if (memcmp(raw, "version ", sizeof raw) == 0)
    return flap_error_set(FLAP_CORRUPT, "%s: this is a Git LFS pointer; fetch the real file (git lfs pull)",
                          file->path);
  uint64_t length = 0;
  for (unsigned i = 0; i < sizeof raw; i++)
    length |= (uint64_t)raw[i] << (8 * i);
  if (length < 2 || length > FLAP_SAFETENSORS_HEADER_BYTES_MAX)
    return flap_error_set(FLAP_CORRUPT, "%s: a header of %llu bytes is not within 2 and %u; not a safetensors file?",
                          file->path, (unsigned long long)length, FLAP_SAFETENSORS_HEADER_BYTES_MAX);
  if (length > file->bytes - sizeof raw)
    return flap_error_set(FLAP_CORRUPT, "%s: cut short: the header has %llu bytes, the file %llu", file->path,
                          (unsigned long long)length, (unsigned long long)file->bytes);
  *length_out = length;
  return FLAP_OK;
}

static flap_status load_header(const tensor_file *file, uint64_t length, json_t **header_out) {
  char *text = malloc((size_t)length);
  if (!text)
    return no_memory(file->path);
  flap_status status = flap_durable_read_all(file->fd, file->path, FLAP_SAFETENSORS_LENGTH_BYTES, text, length);
  if (status == FLAP_OK && text[0] != '{')
    status = flap_error_set(FLAP_CORRUPT, "%s: the header does not start with {", file->path);
  if (status == FLAP_OK)
    status = flap_json_check_weight(file->path, text, (size_t)length);
  if (status == FLAP_OK) {
    json_error_t error;
    *header_out = flap_json_parse(text, (size_t)length, JSON_REJECT_DUPLICATES, &error);
    if (!*header_out && flap_json_no_memory())
      status = no_memory(file->path);
    else if (!*header_out)
      status = flap_error_set(FLAP_CORRUPT, "%s: header, byte %d: %s", file->path, error.position, error.text);
  }
  free(text);
  return status;
}

/* Takes `path`, which may be NULL for lack of memory. */
static flap_status open_file(flap_safetensors *reader, char *path, const json_t *wanted) {
  if (!path)
    return no_memory(reader->path);
  tensor_file *file = &reader->files[reader->file_count];
  *file = (tensor_file){.path = path, .fd = -1};
  uint32_t file_index = reader->file_count++;
  /* O_NONBLOCK: opening a pipe by mistake must not wait for its other end. */
  file->fd = flap_system_open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (file->fd < 0)
    return flap_error_set_os(errno, "cannot open %s", path);
  struct stat about;
  if (flap_system_fstat(file->fd, &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", path);
  if (!S_ISREG(about.st_mode))
    return flap_error_set(FLAP_INVALID, "%s: not a regular file", path);
  file->bytes = (uint64_t)about.st_size;
  uint64_t length = 0;
  json_t *header = NULL;
  FLAP_TRY(read_header_length(file, &length));
  FLAP_TRY(load_header(file, length, &header));
  flap_status status = parse_header(reader, file_index, header, FLAP_SAFETENSORS_LENGTH_BYTES + length, wanted);
  json_decref(header);
  return status;
}

/* ---- an index and its shards --------------------------------------------------------------------------- */

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* A shard is a plain name in the index's own folder. */
static flap_status check_shard_name(const char *index, const char *tensor, const char *shard) {
  char shown[FLAP_SAFETENSORS_SHOWN_BYTES], shown_shard[FLAP_SAFETENSORS_SHOWN_BYTES];
  const char *what = NULL;
  if (!shard)
    what = "its file name is not a string";
  else if (!*shard || strcmp(shard, ".") == 0 || strcmp(shard, "..") == 0 || strpbrk(shard, "/\\"))
    what = "its file is not a plain name in this folder";
  if (!what)
    return FLAP_OK;
  return flap_error_set(FLAP_CORRUPT, "%s: weight_map: tensor \"%s\": %s: \"%s\"", index,
                        flap_safetensors_shown(tensor, shown), what,
                        flap_safetensors_shown(shard ? shard : "", shown_shard));
}

/* The distinct shards of a weight_map, sorted; the caller frees the list, the names are the map's. */
static flap_status list_shards(const char *index, json_t *map, const char ***shards_out, size_t *count_out) {
  const char **shards = calloc(json_object_size(map) + 1, sizeof *shards);
  if (!shards)
    return no_memory(index);
  size_t count = 0, distinct = 0;
  const char *tensor;
  json_t *value;
  json_object_foreach(map, tensor, value) {
    const char *shard = json_string_value(value);
    flap_status status = check_shard_name(index, tensor, shard);
    if (status != FLAP_OK) {
      free(shards);
      return status;
    }
    shards[count++] = shard;
  }
  qsort(shards, count, sizeof *shards, by_text);
  for (size_t i = 0; i < count; i++)
    if (i == 0 || strcmp(shards[i], shards[distinct - 1]) != 0)
      shards[distinct++] = shards[i];
  *shards_out = shards;
  *count_out = distinct;
  return FLAP_OK;
}

static flap_status open_shards(flap_safetensors *reader, const char *folder, const char *index, json_t *map) {
  const char **shards = NULL;
  size_t count = 0;
  FLAP_TRY(list_shards(index, map, &shards, &count));
  flap_status status = FLAP_OK;
  reader->files = calloc(count + 1, sizeof *reader->files);
  if (!reader->files)
    status = no_memory(index);
  for (size_t i = 0; i < count && status == FLAP_OK; i++) {
    status = open_file(reader, join(folder, shards[i]), map);
    if (status == FLAP_NOT_FOUND)
      status = flap_error_prefix(status, "%s names a shard that is not there", index);
    else if (status == FLAP_IO)
      status = flap_error_prefix(status, "%s names a shard that cannot be read", index);
  }
  free(shards);
  return status;
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const flap_safetensors_tensor *)a)->name, ((const flap_safetensors_tensor *)b)->name);
}

static void sort_by_name(flap_safetensors *reader) {
  if (reader->count > 0)
    qsort(reader->tensors, reader->count, sizeof *reader->tensors, by_name);
}

static flap_status open_index(flap_safetensors *reader, const char *index) {
  json_t *root = NULL;
  char *folder = strdup(index);
  flap_status status = folder ? FLAP_OK : no_memory(index);
  if (status == FLAP_OK)
    status = flap_json_load_file(index, FLAP_SAFETENSORS_HEADER_BYTES_MAX, &root);
  if (status != FLAP_OK)
    goto fail;
  char *slash = strrchr(folder, '/');
  if (slash)
    slash[slash == folder ? 1 : 0] = '\0';
  json_t *map = json_object_get(root, "weight_map");
  if (!json_is_object(map)) {
    status = flap_error_set(FLAP_CORRUPT, "%s: \"weight_map\" is missing or not an object", index);
    goto fail;
  }
  FLAP_TRY_GOTO(status, open_shards(reader, slash ? folder : ".", index, map));
  sort_by_name(reader);
  const char *name;
  json_t *shard;
  json_object_foreach(map, name, shard) {
    char shown[FLAP_SAFETENSORS_SHOWN_BYTES], shown_shard[FLAP_SAFETENSORS_SHOWN_BYTES];
    if (!flap_safetensors_find(reader, name)) {
      status = flap_error_set(FLAP_CORRUPT, "%s: tensor \"%s\" is not in %s, where weight_map says it is", index,
                              flap_safetensors_shown(name, shown),
                              flap_safetensors_shown(json_string_value(shard), shown_shard));
      goto fail;
    }
  }
fail:
  json_decref(root);
  free(folder);
  return status;
}

/* ---- public -------------------------------------------------------------------------------------------- */

static flap_status open_single(flap_safetensors *reader, char *path) {
  reader->files = calloc(1, sizeof *reader->files);
  if (!reader->files) {
    free(path);
    return no_memory(reader->path);
  }
  FLAP_TRY(open_file(reader, path, NULL));
  sort_by_name(reader);
  return FLAP_OK;
}

static flap_status open_folder(flap_safetensors *reader, const char *folder) {
  char *single = join(folder, FLAP_SAFETENSORS_FILE), *index = join(folder, FLAP_SAFETENSORS_INDEX);
  struct stat about;
  flap_status status;
  if (!single || !index) {
    status = no_memory(folder);
  } else if (flap_system_stat(single, &about) == 0) {
    status = open_single(reader, single);
    single = NULL; /* the reader's now */
  } else if (errno != ENOENT) {
    status = flap_error_set_os(errno, "cannot look at %s", single);
  } else if (flap_system_stat(index, &about) == 0) {
    status = open_index(reader, index);
  } else {
    status = flap_error_set(FLAP_NOT_FOUND, "%s: holds neither " FLAP_SAFETENSORS_FILE " nor " FLAP_SAFETENSORS_INDEX,
                            folder);
  }
  free(single);
  free(index);
  return status;
}

static bool is_index_name(const char *path) {
  static const char end[] = ".index.json";
  size_t length = strlen(path);
  return length >= sizeof end - 1 && strcmp(path + length - (sizeof end - 1), end) == 0;
}

static flap_status open_any(flap_safetensors *reader, const char *path) {
  struct stat about;
  reader->path = strdup(path);
  if (!reader->path)
    return no_memory(path);
  if (flap_system_stat(path, &about) != 0)
    return flap_error_set_os(errno, "cannot open %s", path);
  if (S_ISDIR(about.st_mode))
    return open_folder(reader, path);
  if (is_index_name(path))
    return open_index(reader, path);
  char *copy = strdup(path);
  return copy ? open_single(reader, copy) : no_memory(path);
}

flap_status flap_safetensors_open(const char *path, flap_safetensors **reader_out) {
  flap_safetensors *reader = calloc(1, sizeof *reader);
  if (!reader)
    return no_memory(path);
  flap_status status = open_any(reader, path);
  if (status != FLAP_OK) {
    flap_safetensors_close(reader);
    return status;
  }
  *reader_out = reader;
  return FLAP_OK;
}

void flap_safetensors_close(flap_safetensors *reader) {
  if (!reader)
    return;
  for (uint32_t i = 0; i < reader->file_count; i++) {
    if (reader->files[i].fd >= 0)
      (void)flap_system_close(reader->files[i].fd);
    json_decref(reader->files[i].metadata);
    free(reader->files[i].path);
  }
  for (uint64_t i = 0; i < reader->count; i++)
    free((char *)(uintptr_t)reader->tensors[i].name);
  free(reader->files);
  free(reader->tensors);
  free(reader->path);
  free(reader);
}

uint64_t flap_safetensors_count(const flap_safetensors *reader) {
  return reader->count;
}

uint64_t flap_safetensors_bytes(const flap_safetensors *reader) {
  return reader->bytes;
}

const char *flap_safetensors_path(const flap_safetensors *reader) {
  return reader->path;
}

const flap_safetensors_tensor *flap_safetensors_at(const flap_safetensors *reader, uint64_t index) {
  flap_assert(index < reader->count);
  return &reader->tensors[index];
}

const flap_safetensors_tensor *flap_safetensors_find(const flap_safetensors *reader, const char *name) {
  flap_safetensors_tensor key = {.name = name};
  if (reader->count == 0)
    return NULL;
  return bsearch(&key, reader->tensors, reader->count, sizeof key, by_name);
}

flap_status flap_safetensors_require(const flap_safetensors *reader, const char *name,
                                     const flap_safetensors_tensor **tensor_out) {
  *tensor_out = flap_safetensors_find(reader, name);
  if (!*tensor_out)
    return flap_error_set(FLAP_NOT_FOUND, "%s: has no tensor \"%s\"", reader->path, name);
  return FLAP_OK;
}

const char *flap_safetensors_tensor_path(const flap_safetensors *reader, const flap_safetensors_tensor *tensor) {
  flap_assert(tensor->file < reader->file_count);
  return reader->files[tensor->file].path;
}

const char *flap_safetensors_metadata(const flap_safetensors *reader, const char *key) {
  for (uint32_t i = 0; i < reader->file_count; i++) {
    const json_t *value = json_object_get(reader->files[i].metadata, key);
    if (value)
      return json_string_value(value);
  }
  return NULL;
}

flap_status flap_safetensors_read(const flap_safetensors *reader, const flap_safetensors_tensor *tensor,
                                  uint64_t byte_offset, uint64_t bytes, void *dst) {
  flap_assert(byte_offset <= tensor->bytes && bytes <= tensor->bytes - byte_offset);
  flap_assert(tensor->file < reader->file_count);
  const tensor_file *file = &reader->files[tensor->file];
  flap_status status = flap_durable_read_all(file->fd, file->path, tensor->file_offset + byte_offset, dst, bytes);
  if (status != FLAP_OK) {
    char shown[FLAP_SAFETENSORS_SHOWN_BYTES];
    return flap_error_prefix(status, "tensor \"%s\"", flap_safetensors_shown(tensor->name, shown));
  }
  return FLAP_OK;
}
