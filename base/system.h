/* The system calls on files, through one table that tests may replace.
 *
 * Role: everything below `tools/` that opens, closes, reads, writes, syncs, sizes, renames, links, removes or looks at
 * (stat) a file, or makes a folder, calls it by these names. So a test can make any of these calls fail, keep a record
 * of them, or end the process at one, in the code that people run. Nothing else replaces the table: there is no option
 * and no environment variable.
 *
 * What changes no file goes round it: lists of folders (readdir, scandir, glob), access, statvfs, realpath, locks
 * (flock), flags and places of descriptors (fcntl, lseek), advice on caches, and reading by streams (FILE: /proc, /sys,
 * metrics.jsonl once it is open). So do transfers by io_uring; what became of one is told by `transferred`.
 *
 * The functions return what the system's return, with errno; they differ in one thing. A call that a signal interrupted
 * is made again, up to FLAP_SYSTEM_TRIES_MAX times in a row, so that callers need no loops of their own, and a system
 * that interrupts for ever is an error and not a hang. An fsync that failed is never made again: interrupted is not
 * failed. A close is never made again either, since the descriptor is gone.
 *
 * Threading: any thread. Replacing the table is for when no other thread makes calls.
 */
#ifndef FLAP_BASE_SYSTEM_H
#define FLAP_BASE_SYSTEM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_SYSTEM_TRIES_MAX 1000

typedef struct flap_system {
  int (*open)(int folder, const char *path, int flags, mode_t mode); /* openat */
  int (*close)(int fd);
  ssize_t (*read)(int fd, void *data, size_t bytes);
  ssize_t (*pread)(int fd, void *data, size_t bytes, off_t offset);
  ssize_t (*write)(int fd, const void *data, size_t bytes);
  ssize_t (*pwrite)(int fd, const void *data, size_t bytes, off_t offset);
  int (*sync)(int fd); /* fsync */
  int (*truncate)(int fd, off_t bytes);
  int (*allocate)(int fd, off_t bytes);                            /* fallocate from 0; sets the size; all or nothing */
  int (*rename)(const char *from, const char *to, unsigned flags); /* renameat2 */
  int (*link)(int fd, const char *path);                           /* linkat: a name for an open file */
  int (*remove)(int folder, const char *path, int flags);          /* unlinkat */
  int (*make_folder)(const char *path, mode_t mode);               /* mkdir */
  int (*stat)(int folder, const char *path, struct stat *about_out, int flags); /* fstatat; also of open files */
  /* What became of a transfer that the system made by itself (io_uring): bytes, or -errno. It comes after the transfer,
   * on any thread; the default returns `result`. */
  int64_t (*transferred)(int fd, bool written, void *data, int64_t result);
} flap_system;

/* Calls go through `table` from here on; NULL: the system's own. Returns the table before. */
const flap_system *flap_system_replace(const flap_system *table);
/* The system's own. */
const flap_system *flap_system_default(void);

int flap_system_open(const char *path, int flags, mode_t mode);
int flap_system_openat(int folder, const char *path, int flags, mode_t mode);
int flap_system_close(int fd);
ssize_t flap_system_read(int fd, void *data, size_t bytes);
ssize_t flap_system_pread(int fd, void *data, size_t bytes, off_t offset);
ssize_t flap_system_write(int fd, const void *data, size_t bytes);
ssize_t flap_system_pwrite(int fd, const void *data, size_t bytes, off_t offset);
int flap_system_fsync(int fd);
int flap_system_ftruncate(int fd, off_t bytes);
int flap_system_fallocate(int fd, off_t bytes);
int flap_system_rename(const char *from, const char *to, unsigned flags); /* of renameat2 */
/* A name for an open file that may have none (O_TMPFILE), on its own file system. */
int flap_system_link(int fd, const char *path);
int flap_system_unlink(const char *path);
int flap_system_unlinkat(int folder, const char *path, int flags);
int flap_system_rmdir(const char *path);
int flap_system_mkdir(const char *path, mode_t mode);
int flap_system_stat(const char *path, struct stat *about_out);
int flap_system_lstat(const char *path, struct stat *about_out);
int flap_system_fstat(int fd, struct stat *about_out);
int flap_system_fstatat(int folder, const char *path, struct stat *about_out, int flags);
/* Whether both are there, and are one file or folder under two names. */
bool flap_system_is_same(const char *a, const char *b);
int64_t flap_system_transferred(int fd, bool written, void *data, int64_t result);
/* A new file with a name of its own; the last six characters of `path` must be XXXXXX, and are replaced. */
int flap_system_mkostemp(char *path, int flags);

#ifdef __cplusplus
}
#endif
#endif
