/* Extent files: unnamed, reserved, and read and written past the page cache where the file system allows that.
 *
 * A person must never find left-overs, so the file has no name: O_TMPFILE where there is such a thing, and otherwise a
 * name that is removed in the next call. The kernel gives the space back when the last descriptor goes, however the
 * process ends.
 */
#include "io/block/block_internal.h"

#include "base/log.h"
#include "base/system.h"
#include "base/units.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static flap_status check_folder(const char *path) {
  struct stat info;
  if (flap_system_stat(path, &info) != 0) {
    int os_error = errno;
    if (os_error == ENOENT)
      return flap_error_set(FLAP_NOT_FOUND, "disk %s: no such folder; create it or name another", path);
    return flap_error_set_os(os_error, "disk %s: cannot look at the folder", path);
  }
  if (!S_ISDIR(info.st_mode))
    return flap_error_set(FLAP_INVALID, "disk %s: not a folder; name the folder in which the space may be taken", path);
  if (access(path, W_OK | X_OK) != 0)
    return flap_error_set_os(errno, "disk %s: the folder cannot be written; change its permissions or name another",
                             path);
  return FLAP_OK;
}

flap_status flap_block_space(const char *path, uint64_t *free_bytes_out) {
  *free_bytes_out = 0;
  FLAP_TRY(check_folder(path));
  struct statvfs info;
  if (statvfs(path, &info) != 0)
    return flap_error_set_os(errno, "disk %s: cannot ask for its free space", path);
  if (!flap_units_mul(info.f_bavail, info.f_frsize, free_bytes_out))
    *free_bytes_out = UINT64_MAX;
  return FLAP_OK;
}

/* A descriptor of a file without a name, or -errno. */
static int create_unnamed(const char *path) {
  int fd = flap_system_open(path, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0)
    return fd;
  /* File systems without O_TMPFILE say so in one of these ways. */
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL)
    return -errno;
  char name[4096];
  int length = snprintf(name, sizeof name, "%s/.flap-extent-XXXXXX", path);
  if (length < 0 || (size_t)length >= sizeof name)
    return -ENAMETOOLONG;
  fd = flap_system_mkostemp(name, O_CLOEXEC);
  if (fd < 0)
    return -errno;
  if (flap_system_unlink(name) != 0) {
    int os_error = errno;
    (void)flap_system_close(fd);
    return -os_error;
  }
  return fd;
}

static flap_status refuse_space(const char *path, uint64_t wanted_bytes) {
  char wanted[FLAP_UNITS_TEXT_MAX], available[FLAP_UNITS_TEXT_MAX];
  uint64_t free_bytes = 0;
  FLAP_TRY(flap_block_space(path, &free_bytes));
  flap_units_format_bytes(wanted_bytes, wanted, sizeof wanted);
  flap_units_format_bytes(free_bytes, available, sizeof available);
  return flap_error_set(FLAP_NO_SPACE,
                        "disk %s: %s wanted, %s free; free some space, lower the size of this disk, or add another",
                        path, wanted, available);
}

/* Asked first, for reaching it would end a process that does not ignore SIGXFSZ. */
static flap_status check_limit(const char *path, uint64_t bytes) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && bytes > limit.rlim_cur) {
    char wanted[FLAP_UNITS_TEXT_MAX], allowed[FLAP_UNITS_TEXT_MAX];
    flap_units_format_bytes(bytes, wanted, sizeof wanted);
    flap_units_format_bytes(limit.rlim_cur, allowed, sizeof allowed);
    return flap_error_set(FLAP_NO_SPACE,
                          "disk %s: %s wanted, files may not be larger than %s here; raise the limit (ulimit -f)", path,
                          wanted, allowed);
  }
  return FLAP_OK;
}

static flap_status reserve(const char *path, int fd, uint64_t bytes) {
  FLAP_TRY(check_limit(path, bytes));
  if (flap_system_fallocate(fd, (off_t)bytes) == 0)
    return FLAP_OK;
  if (errno == EOPNOTSUPP || errno == ENOSYS) {
    flap_log(FLAP_LOG_WARNING, "disk %s: this file system cannot reserve space; if others fill it, a run may fail",
             path);
    if (flap_system_ftruncate(fd, (off_t)bytes) == 0)
      return FLAP_OK;
  }
  if (errno == ENOSPC || errno == EDQUOT)
    return refuse_space(path, bytes);
  char wanted[FLAP_UNITS_TEXT_MAX];
  int os_error = errno;
  flap_units_format_bytes(bytes, wanted, sizeof wanted);
  return flap_error_set_os(os_error, "disk %s: cannot reserve %s", path, wanted);
}

/* Some file systems take the flag and then refuse every transfer, so one is tried. */
static bool set_direct(int fd) {
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) != 0)
    return false;
  void *page = aligned_alloc(FLAP_BLOCK_ALIGN, FLAP_BLOCK_ALIGN);
  bool works = page != NULL && flap_system_pread(fd, page, FLAP_BLOCK_ALIGN, 0) == (ssize_t)FLAP_BLOCK_ALIGN;
  free(page);
  if (!works)
    (void)fcntl(fd, F_SETFL, flags);
  return works;
}

flap_status block_file_open(const char *path, uint64_t bytes, block_file *file_out) {
  *file_out = (block_file){.fd = -1};
  FLAP_TRY(check_folder(path));
  int fd = create_unnamed(path);
  if (fd < 0) {
    /* The folder is there; some special file systems say "no such file" all the same. */
    flap_status status = flap_error_set_os(-fd, "disk %s: cannot create a file in the folder", path);
    return status == FLAP_NOT_FOUND ? FLAP_IO : status;
  }
  flap_status status = bytes > 0 ? reserve(path, fd, bytes) : FLAP_OK;
  if (status != FLAP_OK) {
    (void)flap_system_close(fd);
    return status;
  }
  *file_out = (block_file){.fd = fd, .direct = bytes > 0 && set_direct(fd), .bytes = bytes};
  return FLAP_OK;
}

/* ---- files that can get a name ------------------------------------------------------------------------------ */

/* A removal that failed is tried once more: the name would stay in somebody's folder. */
static bool takes_name(int fd, const char *name) {
  if (flap_system_link(fd, name) != 0 &&
      (errno != EEXIST || flap_system_unlink(name) != 0 || flap_system_link(fd, name) != 0))
    return false;
  return flap_system_unlink(name) == 0 || flap_system_unlink(name) == 0;
}

bool flap_block_can_link(const char *path, const char *folder) {
  struct stat of_disk, of_folder;
  char name[4096];
  if (flap_system_stat(path, &of_disk) != 0 || flap_system_stat(folder, &of_folder) != 0 ||
      of_disk.st_dev != of_folder.st_dev)
    return false;
  const int length = snprintf(name, sizeof name, "%s/" FLAP_BLOCK_TRIAL_FILE, folder);
  const int fd = flap_system_open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0)
    return false;
  const bool works = length > 0 && (size_t)length < sizeof name &&
                     flap_system_fallocate(fd, (off_t)FLAP_BLOCK_ALIGN) == 0 && takes_name(fd, name);
  (void)flap_system_close(fd);
  return works;
}

flap_status block_file_open_linkable(const char *folder, uint64_t bytes, block_file *file_out) {
  char wanted[FLAP_UNITS_TEXT_MAX];
  *file_out = (block_file){.fd = -1};
  flap_units_format_bytes(bytes, wanted, sizeof wanted);
  const int fd = flap_system_open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0)
    return flap_error_set_os(errno, "%s: cannot create a file for extents", folder);
  if (flap_system_fallocate(fd, (off_t)bytes) != 0) {
    const int os_error = errno;
    (void)flap_system_close(fd);
    if (os_error == ENOSPC || os_error == EDQUOT)
      return refuse_space(folder, bytes);
    if (os_error == EFBIG)
      return flap_error_set(FLAP_NO_SPACE, "%s: files may not be as large as %s here; raise the limit (ulimit -f)",
                            folder, wanted);
    return flap_error_set_os(os_error, "%s: cannot reserve %s for extents", folder, wanted);
  }
  *file_out = (block_file){.fd = fd, .direct = set_direct(fd), .bytes = bytes};
  return FLAP_OK;
}

void block_file_close(block_file *file) {
  if (file->fd >= 0)
    (void)flap_system_close(file->fd);
  file->fd = -1;
}
