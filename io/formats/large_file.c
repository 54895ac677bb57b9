#include "io/formats/large_file.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

static flap_status allocate(int fd, const char *path, uint64_t bytes) {
  if (bytes == 0 || flap_system_fallocate(fd, (off_t)bytes) == 0 || errno == EOPNOTSUPP || errno == ENOSYS)
    return FLAP_OK;
  return flap_durable_write_error(errno, path);
}

/* Somebody may take of what is given back before it is allocated: then there may be some to spare. */
static flap_status reserve(int fd, const char *path, uint64_t bytes, flap_room *room) {
  (void)flap_room_give(room, bytes);
  flap_status status = allocate(fd, path, bytes);
  for (uint64_t more = FLAP_WRITE_BEHIND_ALIGN; flap_room_helps(room, status, more); more *= 2)
    status = allocate(fd, path, bytes);
  return status;
}

flap_status flap_large_file_create(flap_large_file *file, const char *path, uint64_t bytes, flap_file_piece piece) {
  *file = (flap_large_file){.path = path};
  file->target.fd = flap_system_open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, FLAP_DURABLE_FILE_MODE);
  if (file->target.fd < 0)
    return flap_error_set_os(errno, "cannot create %s", path);
  const flap_status status = reserve(file->target.fd, path, bytes, piece.room);
  if (status != FLAP_OK) {
    flap_large_file_abort(file);
    return status;
  }
  if (piece.behind != NULL && flap_write_behind_join(piece.behind)) {
    file->behind = piece.behind;
    (void)flap_write_target_set_direct(&file->target, true);
  }
  return FLAP_OK;
}

static flap_status outcome(const flap_large_file *file, int os_error) {
  return os_error == 0 ? FLAP_OK : flap_durable_write_error(os_error, file->path);
}

static flap_status write_now(flap_large_file *file, const void *data, uint64_t bytes) {
  FLAP_TRY(outcome(file, flap_write_target_write(&file->target, data, bytes, file->written)));
  file->written += bytes;
  return FLAP_OK;
}

static void hand_over(flap_large_file *file) {
  flap_write_behind_put(file->behind, file->block, &file->target, file->written, file->held);
  file->written += file->held;
  file->block = NULL;
  file->held = 0;
}

flap_status flap_large_file_append(flap_large_file *file, const void *data, uint64_t bytes) {
  const unsigned char *from = data;
  flap_assert(file->target.fd >= 0);
  if (file->behind == NULL)
    return write_now(file, from, bytes);
  while (bytes > 0) {
    if (file->block == NULL)
      FLAP_TRY(outcome(file, flap_write_behind_take(file->behind, &file->target, &file->block)));
    const uint64_t room = file->behind->block_bytes - file->held, part = bytes < room ? bytes : room;
    memcpy(file->block->memory + file->held, from, part);
    file->held += part;
    from += part;
    bytes -= part;
    if (part == room)
      hand_over(file);
  }
  return FLAP_OK;
}

/* What is less than a block of the disk goes through the cache. */
static flap_status write_held(flap_large_file *file) {
  if (file->held == 0)
    return FLAP_OK;
  const unsigned char *data = file->block->memory;
  const uint64_t rest = file->target.direct ? file->held % FLAP_WRITE_BEHIND_ALIGN : 0, whole = file->held - rest;
  FLAP_TRY(write_now(file, data, whole));
  if (rest > 0 && !flap_write_target_set_direct(&file->target, false))
    return flap_durable_write_error(errno, file->path);
  return write_now(file, data + whole, rest);
}

static void leave(flap_large_file *file) {
  if (file->behind == NULL)
    return;
  if (file->block != NULL)
    flap_write_behind_give_back(file->behind, file->block);
  flap_write_behind_leave(file->behind);
  file->block = NULL;
  file->behind = NULL;
}

static flap_status finish(flap_large_file *file) {
  if (file->behind != NULL) {
    FLAP_TRY(outcome(file, flap_write_behind_wait(file->behind, &file->target)));
    FLAP_TRY(write_held(file));
  }
  return flap_system_fsync(file->target.fd) == 0 ? FLAP_OK : flap_durable_write_error(errno, file->path);
}

flap_status flap_large_file_commit(flap_large_file *file) {
  flap_assert(file->target.fd >= 0);
  FLAP_TRY(finish(file));
  leave(file);
  const int fd = file->target.fd;
  file->target.fd = -1;
  return flap_system_close(fd) == 0 ? FLAP_OK : flap_durable_write_error(errno, file->path);
}

void flap_large_file_abort(flap_large_file *file) {
  if (file->behind != NULL)
    flap_write_behind_drop(file->behind, &file->target);
  leave(file);
  if (file->target.fd >= 0)
    (void)flap_system_close(file->target.fd);
  file->target.fd = -1;
  (void)flap_system_unlink(file->path);
}
