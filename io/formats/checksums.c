#include "io/formats/checksums.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define FORMAT "flap-checksums"
#define VERSION 1
#define FILE_BYTES_MAX ((uint64_t)64 << 20)
#define FILES_MAX 16384u /* that a list is read with: each of them is looked for among the others */
#define READ_BYTES ((uint64_t)1 << 20)
#define VALUE_DIGITS 18 /* "0x" and 16 */
#define PAGES "pages"   /* in place of a value */

/* ---- one sum ------------------------------------------------------------------------------------------- */

struct flap_checksum {
  XXH3_state_t *state;
  uint64_t bytes;
};

flap_status flap_checksum_open(flap_checksum **sum_out) {
  flap_checksum *sum = calloc(1, sizeof *sum);
  if (sum != NULL)
    sum->state = XXH3_createState();
  if (sum == NULL || sum->state == NULL) {
    free(sum);
    return flap_error_set(FLAP_NO_MEMORY, "no memory for a checksum");
  }
  (void)XXH3_64bits_reset(sum->state);
  *sum_out = sum;
  return FLAP_OK;
}

void flap_checksum_add(flap_checksum *sum, const void *data, uint64_t bytes) {
  (void)XXH3_64bits_update(sum->state, data, (size_t)bytes);
  sum->bytes += bytes;
}

uint64_t flap_checksum_bytes(const flap_checksum *sum) {
  return sum->bytes;
}

uint64_t flap_checksum_value(const flap_checksum *sum) {
  return XXH3_64bits_digest(sum->state);
}

void flap_checksum_close(flap_checksum *sum) {
  if (sum == NULL)
    return;
  (void)XXH3_freeState(sum->state);
  free(sum);
}

/* ---- the list ------------------------------------------------------------------------------------------ */

const flap_checksums_entry *flap_checksums_find(const flap_checksums *list, const char *name) {
  for (size_t i = 0; i < list->count; i++)
    if (strcmp(list->entries[i].name, name) == 0)
      return &list->entries[i];
  return NULL;
}

void flap_checksums_close(flap_checksums *list) {
  free(list->entries);
  *list = (flap_checksums){0};
}

static flap_status put(flap_checksums *list, const char *name, flap_checksums_entry about) {
  const flap_checksums_entry *known = flap_checksums_find(list, name);
  if (strlen(name) >= FLAP_CHECKSUMS_NAME_MAX)
    return flap_error_set(FLAP_INVALID, "%.64s...: too long a name for " FLAP_CHECKSUMS_FILE, name);
  if (known == NULL && list->count == list->capacity) {
    const size_t capacity = list->capacity > 0 ? 2 * list->capacity : 32;
    flap_checksums_entry *larger = realloc(list->entries, capacity * sizeof *larger);
    if (larger == NULL)
      return flap_error_set(FLAP_NO_MEMORY, "no memory for a list of checksums");
    list->entries = larger;
    list->capacity = capacity;
  }
  flap_checksums_entry *entry = &list->entries[known != NULL ? (size_t)(known - list->entries) : list->count++];
  *entry = about;
  strcpy(entry->name, name);
  return FLAP_OK;
}

static const char *name_of(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash != NULL ? slash + 1 : path;
}

flap_status flap_checksums_add(flap_checksums *list, const char *path, const flap_checksum *sum) {
  return put(list, name_of(path), (flap_checksums_entry){.bytes = sum->bytes, .value = flap_checksum_value(sum)});
}

flap_status flap_checksums_add_pages(flap_checksums *list, const char *path, uint64_t bytes) {
  return put(list, name_of(path), (flap_checksums_entry){.bytes = bytes, .pages = true});
}

/* ---- reading files ------------------------------------------------------------------------------------- */

static flap_status sum_descriptor(int fd, const char *path, flap_checksum *sum) {
  flap_status status = FLAP_OK;
  void *buffer = malloc(READ_BYTES);
  if (buffer == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to read it", path);
  (void)posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
  while (status == FLAP_OK) {
    const ssize_t got = flap_system_read(fd, buffer, READ_BYTES);
    if (got < 0)
      status = flap_error_set_os(errno, "cannot read %s", path);
    if (got <= 0)
      break;
    flap_checksum_add(sum, buffer, (uint64_t)got);
  }
  free(buffer);
  return status;
}

static flap_status sum_file(const char *path, flap_checksum *sum) {
  const int fd = flap_system_open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", path);
  const flap_status status = sum_descriptor(fd, path, sum);
  (void)flap_system_close(fd);
  return status;
}

static flap_status add_file(flap_checksums *list, const char *folder, const char *name) {
  char path[FLAP_DURABLE_PATH_MAX];
  struct stat about;
  flap_checksum *sum = NULL;
  FLAP_TRY(flap_durable_join(path, folder, name));
  if (flap_system_lstat(path, &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", path);
  if (!S_ISREG(about.st_mode))
    return FLAP_OK;
  FLAP_TRY(flap_checksum_open(&sum));
  flap_status status = sum_file(path, sum);
  if (status == FLAP_OK)
    status = put(list, name, (flap_checksums_entry){.bytes = sum->bytes, .value = flap_checksum_value(sum)});
  flap_checksum_close(sum);
  return status;
}

flap_status flap_checksums_add_rest(flap_checksums *list, const char *folder) {
  struct dirent **names = NULL;
  flap_status status = FLAP_OK;
  const int count = scandir(folder, &names, NULL, alphasort); /* sorted, so that equal folders get equal files */
  if (count < 0)
    return flap_error_set_os(errno, "cannot list the folder %s", folder);
  for (int i = 0; i < count; i++) {
    const char *name = names[i]->d_name;
    if (status == FLAP_OK && strcmp(name, FLAP_CHECKSUMS_FILE) != 0 && flap_checksums_find(list, name) == NULL)
      status = add_file(list, folder, name);
    free(names[i]);
  }
  free(names);
  return status;
}

/* ---- checksums.json ------------------------------------------------------------------------------------ */

flap_status flap_checksums_write(const flap_checksums *list, const char *folder) {
  char path[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, FLAP_CHECKSUMS_FILE));
  json_t *files = json_array();
  json_t *root =
      json_pack("{s:s, s:i, s:s, s:O}", "format", FORMAT, "version", VERSION, "algorithm", "XXH3-64", "files", files);
  bool done = root != NULL;
  for (size_t i = 0; i < list->count && done; i++) {
    const flap_checksums_entry *entry = &list->entries[i];
    char value[VALUE_DIGITS + 1];
    (void)snprintf(value, sizeof value, "0x%016" PRIx64, entry->value);
    done = json_array_append_new(files,
                                 json_pack("{s:s, s:I, s:s}", "name", entry->name, "bytes", (json_int_t)entry->bytes,
                                           "checksum", entry->pages ? PAGES : value)) == 0;
  }
  const flap_status status =
      done ? flap_json_write_file(path, root)
           : flap_error_set(FLAP_NO_MEMORY, "%s: no memory, or a file's name that is not UTF-8", path);
  json_decref(root);
  json_decref(files);
  return status;
}

static bool parse_value(const char *text, flap_checksums_entry *entry) {
  char *end = NULL;
  entry->pages = strcmp(text, PAGES) == 0;
  if (entry->pages)
    return true;
  if (strlen(text) != VALUE_DIGITS || strncmp(text, "0x", 2) != 0)
    return false;
  entry->value = strtoull(text, &end, 16);
  return *end == '\0';
}

/* A name may not lead out of the folder. */
static bool is_plain_name(const char *name) {
  return name[0] != '\0' && strchr(name, '/') == NULL && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

static flap_status parse(const char *path, const json_t *json, flap_checksums *list) {
  flap_json_object root;
  const char *format = NULL;
  const json_t *files = NULL;
  int64_t version = 0;
  FLAP_TRY(flap_json_root(json, path, &root));
  FLAP_TRY(flap_json_get_string(&root, "format", &format));
  FLAP_TRY(flap_json_get_integer(&root, "version", VERSION, VERSION, &version));
  FLAP_TRY(flap_json_get_array(&root, "files", &files));
  if (strcmp(format, FORMAT) != 0)
    return flap_json_error(&root, "format", "must be " FORMAT);
  if (json_array_size(files) > FILES_MAX)
    return flap_json_error(&root, "files", "are %zu, more than %u", json_array_size(files), FILES_MAX);
  for (size_t i = 0; i < json_array_size(files); i++) {
    flap_json_object file;
    const char *name = NULL, *text = NULL;
    int64_t bytes = 0;
    flap_checksums_entry entry = {.bytes = 0};
    FLAP_TRY(flap_json_root(json_array_get(files, i), path, &file));
    FLAP_TRY(flap_json_get_string(&file, "name", &name));
    FLAP_TRY(flap_json_get_string(&file, "checksum", &text));
    FLAP_TRY(flap_json_get_integer(&file, "bytes", 0, INT64_MAX, &bytes));
    entry.bytes = (uint64_t)bytes;
    if (!is_plain_name(name) || !parse_value(text, &entry))
      return flap_json_error(&file, NULL, "entry %zu is no plain file name with a checksum", i);
    FLAP_TRY(put(list, name, entry));
  }
  return FLAP_OK;
}

flap_status flap_checksums_read(const char *folder, flap_checksums *list_out) {
  char path[FLAP_DURABLE_PATH_MAX];
  json_t *root = NULL;
  *list_out = (flap_checksums){0};
  FLAP_TRY(flap_durable_join(path, folder, FLAP_CHECKSUMS_FILE));
  flap_status status = flap_json_load_file(path, FILE_BYTES_MAX, &root);
  if (status == FLAP_OK)
    status = parse(path, root, list_out);
  json_decref(root);
  if (status != FLAP_OK)
    flap_checksums_close(list_out);
  return status == FLAP_INVALID ? flap_error_prefix(FLAP_CORRUPT, "not as it was written") : status;
}

/* ---- checking ------------------------------------------------------------------------------------------ */

flap_status flap_checksums_compare(const flap_checksums_entry *entry, const char *path, const flap_checksum *sum) {
  const uint64_t value = flap_checksum_value(sum);
  flap_assert(!entry->pages);
  if (sum->bytes != entry->bytes)
    return flap_error_set(FLAP_CORRUPT, "%s: has %llu bytes, but was saved with %llu", path,
                          (unsigned long long)sum->bytes, (unsigned long long)entry->bytes);
  if (value != entry->value)
    return flap_error_set(FLAP_CORRUPT,
                          "%s: is not what was saved: its checksum is 0x%016" PRIx64 ", but was 0x%016" PRIx64, path,
                          value, entry->value);
  return FLAP_OK;
}

static flap_status check_size(const flap_checksums_entry *entry, const char *path) {
  struct stat about;
  if (flap_system_stat(path, &about) != 0)
    return errno == ENOENT ? flap_error_set(FLAP_CORRUPT, "%s: is missing, but was saved", path)
                           : flap_error_set_os(errno, "%s", path);
  if (!S_ISREG(about.st_mode) || (uint64_t)about.st_size != entry->bytes)
    return flap_error_set(FLAP_CORRUPT, "%s: has %llu bytes, but was saved with %llu", path,
                          (unsigned long long)about.st_size, (unsigned long long)entry->bytes);
  return FLAP_OK;
}

flap_status flap_checksums_check_sizes(const flap_checksums *list, const char *folder) {
  for (size_t i = 0; i < list->count; i++) {
    char path[FLAP_DURABLE_PATH_MAX];
    FLAP_TRY(flap_durable_join(path, folder, list->entries[i].name));
    FLAP_TRY(check_size(&list->entries[i], path));
  }
  return FLAP_OK;
}

flap_status flap_checksums_check_file(const flap_checksums_entry *entry, const char *folder) {
  char path[FLAP_DURABLE_PATH_MAX];
  flap_checksum *sum = NULL;
  FLAP_TRY(flap_durable_join(path, folder, entry->name));
  if (entry->pages)
    return check_size(entry, path);
  FLAP_TRY(flap_checksum_open(&sum));
  flap_status status = sum_file(path, sum);
  if (status == FLAP_OK)
    status = flap_checksums_compare(entry, path, sum);
  flap_checksum_close(sum);
  return status;
}
