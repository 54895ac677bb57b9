#include "io/formats/large_file.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

flap_file_piece flap_file_piece_part(flap_file_piece piece, uint32_t index, uint32_t count) {
  const uint64_t bytes = piece.bytes / count / FLAP_LARGE_FILE_ALIGN * FLAP_LARGE_FILE_ALIGN;
  if (piece.memory == NULL || bytes == 0)
    return (flap_file_piece){.room = piece.room};
  return (flap_file_piece){(unsigned char *)piece.memory + index * bytes, bytes, piece.room};
}

static bool set_direct(int fd, bool direct) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

/* The rest goes through the cache. */
static flap_status leave_direct(flap_large_file *file) {
  file->direct = false;
  return set_direct(file->fd, false) ? FLAP_OK : flap_durable_write_error(errno, file->path);
}

static flap_status allocate(int fd, const char *path, uint64_t bytes) {
  if (bytes == 0 || flap_system_fallocate(fd, (off_t)bytes) == 0 || errno == EOPNOTSUPP || errno == ENOSYS)
    return FLAP_OK;
  return flap_durable_write_error(errno, path);
}

/* Somebody may take of what is given back before it is allocated: then there may be some to spare. */
static flap_status reserve(int fd, const char *path, uint64_t bytes, flap_room *room) {
  (void)flap_room_give(room, bytes);
  flap_status status = allocate(fd, path, bytes);
  for (uint64_t more = FLAP_LARGE_FILE_ALIGN; flap_room_helps(room, status, more); more *= 2)
    status = allocate(fd, path, bytes);
  return status;
}

flap_status flap_large_file_create(flap_large_file *file, const char *path, uint64_t bytes, flap_file_piece piece) {
  piece = flap_file_piece_part(piece, 0, 1);
  flap_assert((uintptr_t)piece.memory % FLAP_LARGE_FILE_ALIGN == 0);
  *file = (flap_large_file){.path = path, .piece = piece.memory, .piece_bytes = piece.bytes};
  file->fd = flap_system_open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, FLAP_DURABLE_FILE_MODE);
  if (file->fd < 0)
    return flap_error_set_os(errno, "cannot create %s", path);
  const flap_status status = reserve(file->fd, path, bytes, piece.room);
  if (status != FLAP_OK) {
    flap_large_file_abort(file);
    return status;
  }
  file->direct = file->piece != NULL && set_direct(file->fd, true);
  return FLAP_OK;
}

/* Some file systems take the flag and then refuse every transfer; some disks have larger blocks. */
static flap_status write_out(flap_large_file *file, const unsigned char *data, uint64_t bytes) {
  while (bytes > 0) {
    const size_t most = (size_t)(bytes < FLAP_DURABLE_TRANSFER_BYTES_MAX ? bytes : FLAP_DURABLE_TRANSFER_BYTES_MAX);
    const ssize_t written = flap_system_pwrite(file->fd, data, most, (off_t)file->written);
    if (written < 0 && errno == EINVAL && file->direct) {
      FLAP_TRY(leave_direct(file));
      continue;
    }
    if (written <= 0)
      return flap_durable_write_error(written < 0 ? errno : EIO, file->path);
    data += written;
    bytes -= (uint64_t)written;
    file->written += (uint64_t)written;
    if (file->direct && file->written % FLAP_LARGE_FILE_ALIGN != 0)
      FLAP_TRY(leave_direct(file));
  }
  return FLAP_OK;
}

flap_status flap_large_file_append(flap_large_file *file, const void *data, uint64_t bytes) {
  const unsigned char *from = data;
  flap_assert(file->fd >= 0);
  if (file->piece == NULL)
    return write_out(file, from, bytes);
  while (bytes > 0) {
    const uint64_t room = file->piece_bytes - file->held, part = bytes < room ? bytes : room;
    memcpy(file->piece + file->held, from, part);
    file->held += part;
    from += part;
    bytes -= part;
    if (file->held < file->piece_bytes)
      break;
    FLAP_TRY(write_out(file, file->piece, file->held));
    file->held = 0;
  }
  return FLAP_OK;
}

/* What is less than a block goes through the cache. */
static flap_status write_held(flap_large_file *file) {
  if (file->held == 0)
    return FLAP_OK;
  const uint64_t whole = file->direct ? file->held / FLAP_LARGE_FILE_ALIGN * FLAP_LARGE_FILE_ALIGN : file->held;
  FLAP_TRY(write_out(file, file->piece, whole));
  if (file->direct && whole < file->held)
    FLAP_TRY(leave_direct(file));
  return write_out(file, file->piece + whole, file->held - whole);
}

flap_status flap_large_file_commit(flap_large_file *file) {
  flap_assert(file->fd >= 0);
  FLAP_TRY(write_held(file));
  if (flap_system_fsync(file->fd) != 0)
    return flap_durable_write_error(errno, file->path);
  const int fd = file->fd;
  file->fd = -1;
  return flap_system_close(fd) == 0 ? FLAP_OK : flap_durable_write_error(errno, file->path);
}

void flap_large_file_abort(flap_large_file *file) {
  if (file->fd >= 0)
    (void)flap_system_close(file->fd);
  file->fd = -1;
  (void)flap_system_unlink(file->path);
}
