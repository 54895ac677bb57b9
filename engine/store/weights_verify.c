/* Files of a checkpoint, compared with their checksums while they are read.
 *
 * FLAP writes tensors in the order of its list, and reads them so: bytes of a file come one after the other, and their
 * sum is that of the file once the header in front of them is added. A file that is read in another order, or not
 * whole, is read again for its sum.
 */
#include "base/assert.h"
#include "base/system.h"
#include "engine/store/weights_internal.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct verify_file {
  const char *path; /* NULL: no tensor of the list is in it */
  flap_checksum *sum;
  bool in_order; /* so far */
} verify_file;

struct flap_weights_verify {
  const flap_checksums *checksums;
  uint32_t count;
  verify_file *files; /* by number in the reader */
};

/* What precedes the file's first tensor. */
static flap_status add_header(verify_file *file, uint64_t bytes) {
  unsigned char piece[4096];
  const int fd = flap_system_open(file->path, O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", file->path);
  flap_status status = FLAP_OK;
  for (uint64_t at = 0; at < bytes && status == FLAP_OK;) {
    const uint64_t length = bytes - at < sizeof piece ? bytes - at : sizeof piece;
    status = flap_durable_read_all(fd, file->path, at, piece, length);
    if (status == FLAP_OK)
      flap_checksum_add(file->sum, piece, length);
    at += length;
  }
  (void)flap_system_close(fd);
  return status;
}

static uint64_t data_begins(const flap_safetensors *reader, uint32_t file) {
  uint64_t least = UINT64_MAX;
  for (uint64_t i = 0; i < flap_safetensors_count(reader); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    if (tensor->file == file && tensor->file_offset < least)
      least = tensor->file_offset;
  }
  return least;
}

static flap_status open_files(struct flap_weights_verify *verify, const flap_safetensors *reader) {
  for (uint64_t i = 0; i < flap_safetensors_count(reader); i++)
    if (flap_safetensors_at(reader, i)->file >= verify->count)
      verify->count = flap_safetensors_at(reader, i)->file + 1;
  verify->files = calloc(verify->count, sizeof *verify->files);
  if (verify->files == NULL && verify->count > 0)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for checksums", flap_safetensors_path(reader));
  for (uint64_t i = 0; i < flap_safetensors_count(reader); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    verify_file *file = &verify->files[tensor->file];
    if (file->path != NULL)
      continue;
    file->path = flap_safetensors_tensor_path(reader, tensor);
    file->in_order = true;
    FLAP_TRY(flap_checksum_open(&file->sum));
    FLAP_TRY(add_header(file, data_begins(reader, tensor->file)));
  }
  return FLAP_OK;
}

flap_status flap_weights_verify_begin(flap_weights_source *source, const flap_checksums *checksums) {
  flap_assert(source->verify == NULL);
  if (checksums == NULL)
    return FLAP_OK;
  source->verify = calloc(1, sizeof *source->verify);
  if (source->verify == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for checksums", flap_safetensors_path(source->reader));
  source->verify->checksums = checksums;
  return open_files(source->verify, source->reader);
}

void flap_weights_verify_read(struct flap_weights_verify *verify, const flap_safetensors_tensor *tensor,
                              uint64_t offset, const void *data, uint64_t bytes) {
  verify_file *file = &verify->files[tensor->file];
  file->in_order = file->in_order && flap_checksum_bytes(file->sum) == tensor->file_offset + offset;
  if (file->in_order)
    flap_checksum_add(file->sum, data, bytes);
}

static flap_status check_file(const struct flap_weights_verify *verify, const verify_file *file) {
  char folder[FLAP_DURABLE_PATH_MAX];
  const char *slash = strrchr(file->path, '/'), *name = slash != NULL ? slash + 1 : file->path;
  const flap_checksums_entry *entry = flap_checksums_find(verify->checksums, name);
  if (entry == NULL || entry->pages)
    return flap_error_set(FLAP_CORRUPT, "%s: has no checksum, so it was not saved with the rest", file->path);
  if (file->in_order && flap_checksum_bytes(file->sum) == entry->bytes)
    return flap_checksums_compare(entry, file->path, file->sum);
  (void)snprintf(folder, sizeof folder, "%.*s", slash != NULL ? (int)(slash - file->path) : 1,
                 slash != NULL ? file->path : ".");
  return flap_checksums_check_file(entry, folder);
}

flap_status flap_weights_verify_end(flap_weights_source *source) {
  const struct flap_weights_verify *verify = source->verify;
  for (uint32_t i = 0; verify != NULL && i < verify->count; i++)
    if (verify->files[i].path != NULL)
      FLAP_TRY(check_file(verify, &verify->files[i]));
  return FLAP_OK;
}

flap_status flap_weights_verify_model_begin(flap_weights_source *source, const char *folder,
                                            flap_checksums *checksums) {
  struct stat about;
  if (flap_system_stat(folder, &about) != 0 || !S_ISDIR(about.st_mode)) /* a file is a model too */
    return FLAP_OK;
  const flap_status status = flap_checksums_read(folder, checksums);
  if (status == FLAP_OK)
    return flap_weights_verify_begin(source, checksums);
  if (status != FLAP_NOT_FOUND)
    return status;
  flap_error_clear();
  return FLAP_OK;
}

flap_status flap_weights_verify_model_end(flap_weights_source *source, const char *folder) {
  char message[2048];
  const flap_status status = flap_weights_verify_end(source);
  if (status != FLAP_CORRUPT)
    return status;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  return flap_error_set(status,
                        "%s; take another checkpoint or a copy or, if it was changed on purpose, remove "
                        "%s/" FLAP_CHECKSUMS_FILE,
                        message, folder);
}

void flap_weights_verify_close(struct flap_weights_verify *verify) {
  if (verify == NULL)
    return;
  for (uint32_t i = 0; verify->files != NULL && i < verify->count; i++)
    flap_checksum_close(verify->files[i].sum);
  free(verify->files);
  free(verify);
}
