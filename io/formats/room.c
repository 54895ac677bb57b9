#include "io/formats/room.h"

#include "base/log.h"
#include "base/system.h"
#include "base/units.h"
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/statvfs.h>

#define BLOCK_BYTES ((uint64_t)4096)

/* The folder has one user, so the name can be the same each time, and an earlier life's is removed with this one's. */
static int open_and_unlink(const char *path) {
  const int fd = flap_system_open(path, O_CREAT | O_TRUNC | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, FLAP_DURABLE_FILE_MODE);
  if (fd < 0 || flap_system_unlink(path) == 0)
    return fd;
  const int os_error = errno;
  (void)flap_system_close(fd);
  errno = os_error;
  return -1;
}

flap_status flap_room_open(const char *folder, flap_room *room_out) {
  char path[FLAP_DURABLE_PATH_MAX];
  *room_out = FLAP_ROOM_NONE;
  FLAP_TRY(flap_durable_join(path, folder, FLAP_ROOM_FILE));
  room_out->fd = flap_system_open(folder, O_TMPFILE | O_WRONLY | O_CLOEXEC, FLAP_DURABLE_FILE_MODE);
  /* File systems without O_TMPFILE say so in one of these ways. */
  if (room_out->fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == ENOENT || errno == EINVAL))
    room_out->fd = open_and_unlink(path);
  return room_out->fd >= 0 ? FLAP_OK : flap_error_set_os(errno, "cannot reserve space in %s", folder);
}

static bool grow(flap_room *room, uint64_t bytes) {
  if (flap_system_fallocate(room->fd, (off_t)bytes) != 0)
    return false;
  room->bytes = bytes;
  return true;
}

/* Others may take it meanwhile, and the file system some for itself. */
static void take_what_is_there(flap_room *room, uint64_t wanted) {
  struct statvfs about;
  if (fstatvfs(room->fd, &about) != 0)
    return;
  const uint64_t left = wanted - room->bytes, blocks = about.f_bavail * about.f_frsize / BLOCK_BYTES;
  const uint64_t there = blocks < left / BLOCK_BYTES ? blocks : left / BLOCK_BYTES;
  if (there == 0 || grow(room, room->bytes + there * BLOCK_BYTES))
    return;
  if (!grow(room, room->bytes + (there - there / 64) * BLOCK_BYTES))
    (void)flap_system_ftruncate(room->fd, (off_t)room->bytes); /* some systems keep what they found */
}

/* EFBIG: no file may be as large as those together. */
static flap_status keep(flap_room *room, uint64_t wanted) {
  if (room->bytes >= wanted || grow(room, wanted))
    return FLAP_OK;
  const int os_error = errno;
  (void)flap_system_ftruncate(room->fd, (off_t)room->bytes); /* as above */
  flap_status status = flap_error_set_os(os_error, "cannot reserve %llu bytes", (unsigned long long)wanted);
  if (os_error == EOPNOTSUPP || os_error == ENOSYS || os_error == EFBIG)
    return FLAP_UNSUPPORTED;
  if (status == FLAP_NO_SPACE)
    take_what_is_there(room, wanted);
  return status;
}

flap_status flap_room_keep(flap_room *room, uint64_t bytes, uint64_t spare) {
  if (room == NULL || room->fd < 0)
    return FLAP_OK;
  FLAP_TRY(keep(room, flap_units_round_up(bytes, BLOCK_BYTES)));
  const flap_status status = keep(room, flap_units_round_up(bytes + spare, BLOCK_BYTES));
  if (status != FLAP_NO_SPACE && status != FLAP_UNSUPPORTED)
    return status;
  flap_error_clear(); /* nothing to spare */
  return FLAP_OK;
}

bool flap_room_helps(flap_room *room, flap_status status, uint64_t bytes) {
  if (status != FLAP_NO_SPACE || !flap_room_give(room, bytes))
    return false;
  flap_error_clear();
  return true;
}

bool flap_room_give(flap_room *room, uint64_t bytes) {
  if (room == NULL || room->fd < 0 || room->bytes == 0)
    return false;
  const uint64_t given = flap_units_round_up(bytes, BLOCK_BYTES);
  flap_room_leave(room, given < room->bytes ? room->bytes - given : 0);
  return true;
}

/* A system that does not give it back has no room for whoever wanted it: they will be told. */
void flap_room_leave(flap_room *room, uint64_t bytes) {
  if (room->fd < 0 || room->bytes <= bytes)
    return;
  if (flap_system_ftruncate(room->fd, (off_t)bytes) != 0)
    flap_log(FLAP_LOG_DEBUG, "reserved space could not be given back");
  room->bytes = bytes;
}

void flap_room_close(flap_room *room) {
  if (room->fd >= 0)
    (void)flap_system_close(room->fd);
  *room = FLAP_ROOM_NONE;
}
