/* The table of system calls, and the retries after signals. */
#include "base/system.h"

#include "base/assert.h"
#include "base/units.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define NAME_TRIES_MAX 100
#define BLOCK_BYTES 512u /* of st_blocks */
#define NAME_CHARACTERS 6u

static int system_open(int folder, const char *path, int flags, mode_t mode) {
  return openat(folder, path, flags, mode);
}

/* Whether a file may come to be of so many bytes. What it has counts as there already. */
static bool has_space(int fd, off_t bytes) {
  struct statvfs system;
  struct stat file;
  uint64_t space = 0;
  if (fstatvfs(fd, &system) != 0 || fstat(fd, &file) != 0 || system.f_blocks == 0) /* no limit, or none that is told */
    return true;
  return !flap_units_mul(system.f_bavail, system.f_frsize, &space) ||
         !flap_units_add(space, (uint64_t)file.st_blocks * BLOCK_BYTES, &space) || (uint64_t)bytes <= space;
}

/* Some file systems (ext4) take all there is before they find that it is not enough, and whoever else wants some of it
 * at that moment finds none. */
static int system_allocate(int fd, off_t bytes) {
  if (bytes > 0 && !has_space(fd, bytes)) {
    errno = ENOSPC;
    return -1;
  }
  return fallocate(fd, 0, 0, bytes);
}

static int system_rename(const char *from, const char *to, unsigned flags) {
  return flags == 0 ? rename(from, to) : renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
}

/* By the descriptor itself only a privileged process may, before Linux 6.10; by its name in /proc whoever opened it. */
static int system_link(int fd, const char *path) {
  char name[32];
  (void)snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  if (linkat(AT_FDCWD, name, AT_FDCWD, path, AT_SYMLINK_FOLLOW) == 0)
    return 0;
  return errno == ENOENT && access("/proc/self/fd", X_OK) != 0 ? linkat(fd, "", AT_FDCWD, path, AT_EMPTY_PATH) : -1;
}

static int64_t system_transferred(int fd, bool written, void *data, int64_t result) {
  (void)fd, (void)written, (void)data;
  return result;
}

static const flap_system default_table = {
    .open = system_open,
    .close = close,
    .read = read,
    .pread = pread,
    .write = write,
    .pwrite = pwrite,
    .sync = fsync,
    .truncate = ftruncate,
    .allocate = system_allocate,
    .rename = system_rename,
    .link = system_link,
    .remove = unlinkat,
    .make_folder = mkdir,
    .stat = fstatat,
    .transferred = system_transferred,
};

static const flap_system *_Atomic table = &default_table;

const flap_system *flap_system_replace(const flap_system *replacement) {
  return atomic_exchange(&table, replacement ? replacement : &default_table);
}

const flap_system *flap_system_default(void) {
  return &default_table;
}

static const flap_system *calls(void) {
  return atomic_load_explicit(&table, memory_order_acquire);
}

/* Makes the call until it returns something else than that a signal interrupted it. */
#define UNINTERRUPTED(type, call)                                              \
  do {                                                                         \
    type result_;                                                              \
    int tries_ = 0;                                                            \
    do                                                                         \
      result_ = (call);                                                        \
    while (result_ < 0 && errno == EINTR && ++tries_ < FLAP_SYSTEM_TRIES_MAX); \
    return result_;                                                            \
  } while (0)

int flap_system_openat(int folder, const char *path, int flags, mode_t mode) {
  UNINTERRUPTED(int, calls()->open(folder, path, flags, mode));
}

int flap_system_open(const char *path, int flags, mode_t mode) {
  return flap_system_openat(AT_FDCWD, path, flags, mode);
}

int flap_system_close(int fd) {
  const int result = calls()->close(fd);
  return result != 0 && errno == EINTR ? 0 : result;
}

ssize_t flap_system_read(int fd, void *data, size_t bytes) {
  UNINTERRUPTED(ssize_t, calls()->read(fd, data, bytes));
}

ssize_t flap_system_pread(int fd, void *data, size_t bytes, off_t offset) {
  UNINTERRUPTED(ssize_t, calls()->pread(fd, data, bytes, offset));
}

ssize_t flap_system_write(int fd, const void *data, size_t bytes) {
  UNINTERRUPTED(ssize_t, calls()->write(fd, data, bytes));
}

ssize_t flap_system_pwrite(int fd, const void *data, size_t bytes, off_t offset) {
  UNINTERRUPTED(ssize_t, calls()->pwrite(fd, data, bytes, offset));
}

int flap_system_fsync(int fd) {
  UNINTERRUPTED(int, calls()->sync(fd));
}

int flap_system_ftruncate(int fd, off_t bytes) {
  UNINTERRUPTED(int, calls()->truncate(fd, bytes));
}

int flap_system_fallocate(int fd, off_t bytes) {
  UNINTERRUPTED(int, calls()->allocate(fd, bytes));
}

int flap_system_rename(const char *from, const char *to, unsigned flags) {
  UNINTERRUPTED(int, calls()->rename(from, to, flags));
}

int flap_system_link(int fd, const char *path) {
  UNINTERRUPTED(int, calls()->link(fd, path));
}

int flap_system_unlinkat(int folder, const char *path, int flags) {
  UNINTERRUPTED(int, calls()->remove(folder, path, flags));
}

int flap_system_unlink(const char *path) {
  return flap_system_unlinkat(AT_FDCWD, path, 0);
}

int flap_system_rmdir(const char *path) {
  return flap_system_unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

int flap_system_mkdir(const char *path, mode_t mode) {
  UNINTERRUPTED(int, calls()->make_folder(path, mode));
}

int flap_system_fstatat(int folder, const char *path, struct stat *about_out, int flags) {
  UNINTERRUPTED(int, calls()->stat(folder, path, about_out, flags));
}

int flap_system_stat(const char *path, struct stat *about_out) {
  return flap_system_fstatat(AT_FDCWD, path, about_out, 0);
}

bool flap_system_is_same(const char *a, const char *b) {
  struct stat of_a, of_b;
  return flap_system_stat(a, &of_a) == 0 && flap_system_stat(b, &of_b) == 0 && of_a.st_dev == of_b.st_dev &&
         of_a.st_ino == of_b.st_ino;
}

int flap_system_lstat(const char *path, struct stat *about_out) {
  return flap_system_fstatat(AT_FDCWD, path, about_out, AT_SYMLINK_NOFOLLOW);
}

int flap_system_fstat(int fd, struct stat *about_out) {
  return flap_system_fstatat(fd, "", about_out, AT_EMPTY_PATH);
}

int64_t flap_system_transferred(int fd, bool written, void *data, int64_t result) {
  return calls()->transferred(fd, written, data, result);
}

/* Two processes, or two threads, that try the same name are told apart by O_EXCL. */
int flap_system_mkostemp(char *path, int flags) {
  static atomic_uint counter;
  const size_t length = strlen(path);
  flap_assert(length >= NAME_CHARACTERS && strcmp(path + length - NAME_CHARACTERS, "XXXXXX") == 0);
  for (int i = 0; i < NAME_TRIES_MAX; i++) {
    char name[16];
    const uint64_t number = (uint64_t)getpid() * 7919u + flap_units_now_ns() + atomic_fetch_add(&counter, 1);
    (void)snprintf(name, sizeof name, "%06x", (unsigned)(number & 0xffffffu));
    memcpy(path + length - NAME_CHARACTERS, name, NAME_CHARACTERS);
    const int fd = flap_system_open(path, flags | O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd >= 0 || errno != EEXIST)
      return fd;
  }
  return -1;
}
