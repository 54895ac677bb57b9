/* Files that are replaced whole: temporary name, fsync, rename, fsync of the folder. */
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"

#include "base/assert.h"
#include "base/system.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define COPY_BYTES ((size_t)256 << 10)

flap_status flap_durable_write_error(int os_error, const char *path) {
  if (os_error == EFBIG)
    return flap_error_set(FLAP_NO_SPACE,
                          "cannot write %s: past the largest file that the file system or `ulimit -f` allows", path);
  return flap_error_set_os(os_error, "cannot write %s", path);
}

flap_status flap_durable_sibling(char out[FLAP_DURABLE_PATH_MAX], const char *path, const char *suffix) {
  size_t length = strlen(path);
  while (length > 1 && path[length - 1] == '/')
    length--;
  size_t suffix_length = strlen(suffix);
  if (length == 0 || length + suffix_length >= FLAP_DURABLE_PATH_MAX)
    return flap_error_set(FLAP_INVALID, "%.200s%s: the path is %s", path, suffix, length == 0 ? "empty" : "too long");
  memcpy(out, path, length);
  memcpy(out + length, suffix, suffix_length + 1);
  return FLAP_OK;
}

flap_status flap_durable_join(char path_out[FLAP_DURABLE_PATH_MAX], const char *folder, const char *name) {
  int length = snprintf(path_out, FLAP_DURABLE_PATH_MAX, "%s/%s", folder, name);
  if (length < 0 || (unsigned)length >= FLAP_DURABLE_PATH_MAX)
    return flap_error_set(FLAP_INVALID, "%.200s/%.200s: the path is too long", folder, name);
  return FLAP_OK;
}

flap_status flap_durable_sync_parent(const char *path) {
  char parent[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_durable_sibling(parent, path, ""));
  char *slash = strrchr(parent, '/');
  if (!slash)
    (void)snprintf(parent, sizeof parent, ".");
  else if (slash == parent)
    slash[1] = '\0';
  else
    *slash = '\0';
  int fd = flap_system_open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open the folder %s", parent);
  /* EINVAL: a file system whose folders need no fsync. */
  int os_error = flap_system_fsync(fd) != 0 && errno != EINVAL ? errno : 0;
  (void)flap_system_close(fd);
  return os_error ? flap_durable_write_error(os_error, parent) : FLAP_OK;
}

flap_status flap_durable_write_all(int fd, const char *path, const void *data, uint64_t bytes) {
  const unsigned char *from = data;
  while (bytes > 0) {
    ssize_t written = flap_system_write(
        fd, from, (size_t)(bytes < FLAP_DURABLE_TRANSFER_BYTES_MAX ? bytes : FLAP_DURABLE_TRANSFER_BYTES_MAX));
    if (written <= 0)
      return flap_durable_write_error(written < 0 ? errno : EIO, path);
    from += written;
    bytes -= (uint64_t)written;
  }
  return FLAP_OK;
}

flap_status flap_durable_read_all(int fd, const char *path, uint64_t offset, void *data, uint64_t bytes) {
  unsigned char *to = data;
  while (bytes > 0) {
    ssize_t got = flap_system_pread(
        fd, to, (size_t)(bytes < FLAP_DURABLE_TRANSFER_BYTES_MAX ? bytes : FLAP_DURABLE_TRANSFER_BYTES_MAX),
        (off_t)offset);
    if (got < 0)
      return flap_error_set_os(errno, "cannot read %s", path);
    if (got == 0)
      return flap_error_set(FLAP_CORRUPT, "%s: ends at byte %llu, where %llu more were expected", path,
                            (unsigned long long)offset, (unsigned long long)bytes);
    to += got;
    offset += (uint64_t)got;
    bytes -= (uint64_t)got;
  }
  return FLAP_OK;
}

flap_status flap_durable_begin_file(flap_durable_file *file, const char *path) {
  file->fd = -1;
  FLAP_TRY(flap_durable_sibling(file->path, path, ""));
  FLAP_TRY(flap_durable_sibling(file->temporary, path, ".tmp"));
  file->fd =
      flap_system_open(file->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, FLAP_DURABLE_FILE_MODE);
  if (file->fd < 0)
    return flap_error_set_os(errno, "cannot create %s", file->temporary);
  return FLAP_OK;
}

flap_status flap_durable_append(flap_durable_file *file, const void *data, uint64_t bytes) {
  flap_assert(file->fd >= 0);
  return flap_durable_write_all(file->fd, file->temporary, data, bytes);
}

flap_status flap_durable_commit_file(flap_durable_file *file) {
  flap_assert(file->fd >= 0);
  int os_error = flap_system_fsync(file->fd) != 0 ? errno : 0;
  if (flap_system_close(file->fd) != 0 && !os_error)
    os_error = errno;
  file->fd = -1;
  if (os_error) {
    (void)flap_system_unlink(file->temporary);
    return flap_durable_write_error(os_error, file->temporary);
  }
  if (flap_system_rename(file->temporary, file->path, 0) != 0) {
    os_error = errno;
    (void)flap_system_unlink(file->temporary);
    return flap_error_set_os(os_error, "cannot rename %s to %s", file->temporary, file->path);
  }
  return flap_durable_sync_parent(file->path);
}

void flap_durable_abort_file(flap_durable_file *file) {
  if (file->fd < 0)
    return;
  (void)flap_system_close(file->fd);
  (void)flap_system_unlink(file->temporary);
  file->fd = -1;
}

flap_status flap_durable_write_file(const char *path, const void *data, uint64_t bytes) {
  flap_durable_file file;
  FLAP_TRY(flap_durable_begin_file(&file, path));
  flap_status status = flap_durable_append(&file, data, bytes);
  if (status != FLAP_OK) {
    flap_durable_abort_file(&file);
    return status;
  }
  return flap_durable_commit_file(&file);
}

static flap_status copy_bytes(int from, const char *from_name, flap_durable_file *to) {
  void *buffer = malloc(COPY_BYTES);
  if (!buffer)
    return flap_error_set(FLAP_NO_MEMORY, "cannot copy %s: no memory for a buffer", from_name);
  flap_status status = FLAP_OK;
  for (off_t at = 0; status == FLAP_OK;) {
    const ssize_t got = flap_system_pread(from, buffer, COPY_BYTES, at);
    if (got < 0)
      status = flap_error_set_os(errno, "cannot read %s", from_name);
    if (got <= 0)
      break;
    status = flap_durable_append(to, buffer, (uint64_t)got);
    at += got;
  }
  free(buffer);
  return status;
}

static flap_status copy_to(int from, const char *from_name, const char *to) {
  flap_durable_file file;
  FLAP_TRY(flap_durable_begin_file(&file, to));
  const flap_status status = copy_bytes(from, from_name, &file);
  if (status == FLAP_OK)
    return flap_durable_commit_file(&file);
  flap_durable_abort_file(&file);
  return status;
}

flap_status flap_durable_copy_file(const char *from, const char *to) {
  struct stat about;
  /* O_NONBLOCK: opening a pipe by mistake must not wait for its other end. */
  int fd = flap_system_open(from, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", from);
  flap_status status = FLAP_OK;
  if (flap_system_fstat(fd, &about) != 0)
    status = flap_error_set_os(errno, "cannot look at %s", from);
  else if (!S_ISREG(about.st_mode))
    status = flap_error_set(FLAP_INVALID, "cannot copy %s: it is not a regular file", from);
  else
    status = copy_to(fd, from, to);
  (void)flap_system_close(fd);
  return status;
}

flap_status flap_durable_copy_open_file(int fd, const char *to) {
  struct stat from_info, to_info;
  char name[FLAP_DURABLE_PATH_MAX + 32];
  (void)snprintf(name, sizeof name, "the original of %s", to);
  if (flap_system_fstat(fd, &from_info) != 0)
    return flap_error_set_os(errno, "cannot look at %s", name);
  if (flap_system_stat(to, &to_info) == 0 && to_info.st_dev == from_info.st_dev && to_info.st_ino == from_info.st_ino)
    return FLAP_OK; /* it is already there */
  return copy_to(fd, name, to);
}
