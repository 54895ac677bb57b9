#include "engine/store/run_lock.h"

#include "base/log.h"
#include "base/system.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define HOLDER_BYTES 256 /* "process 1234 on <host> since 2026-01-31 12:00:00 UTC" */
#define TRIES 16         /* a holder that ends takes the file with it */

/* What the file says; control characters of a file that is somebody else's do not reach a terminal. */
static void read_holder(int fd, char text[HOLDER_BYTES]) {
  const ssize_t length = flap_system_pread(fd, text, HOLDER_BYTES - 1, 0);
  text[length > 0 ? length : 0] = '\0';
  text[strcspn(text, "\n")] = '\0';
  for (char *at = text; *at; at++)
    if ((unsigned char)*at < 0x20 || *at == 0x7f)
      *at = '?';
  if (!text[0])
    (void)snprintf(text, HOLDER_BYTES, "another process");
}

/* For people only, so what cannot be written does no harm. */
static void write_holder(int fd) {
  char host[128] = "", since[32] = "", text[HOLDER_BYTES];
  struct tm utc;
  const time_t now = time(NULL);
  if (gethostname(host, sizeof host - 1) != 0)
    (void)snprintf(host, sizeof host, "this host");
  if (gmtime_r(&now, &utc) != NULL)
    (void)strftime(since, sizeof since, "%Y-%m-%d %H:%M:%S", &utc);
  const int length = snprintf(text, sizeof text, "process %ld on %s since %s UTC\n", (long)getpid(), host, since);
  if (flap_system_ftruncate(fd, 0) == 0)
    (void)!flap_system_pwrite(fd, text, (size_t)length, 0);
}

/* Whether the file is still the one of that name. */
static bool is_current(int fd, const char *path) {
  struct stat mine, named;
  return flap_system_fstat(fd, &mine) == 0 && flap_system_stat(path, &named) == 0 && mine.st_dev == named.st_dev &&
         mine.st_ino == named.st_ino;
}

static flap_status refuse(int fd, const char *folder) {
  char holder[HOLDER_BYTES];
  read_holder(fd, holder);
  return flap_error_set(FLAP_INVALID,
                        "%s is in use: %s writes there; wait until it ends, stop it, or name another folder", folder,
                        holder);
}

/* FLAP_OK without a lock: the file went away meanwhile (`again`), or there are no locks. */
static flap_status try_lock(const char *folder, flap_run_lock *lock, bool *again) {
  *again = false;
  const int fd = flap_system_open(lock->path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, FLAP_DURABLE_FILE_MODE);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot create %s, by which %s is locked against a second run", lock->path, folder);
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
    *again = !is_current(fd, lock->path);
    if (!*again) {
      lock->fd = fd;
      write_holder(fd);
      return FLAP_OK;
    }
  } else if (errno == EWOULDBLOCK) {
    const flap_status status = refuse(fd, folder);
    (void)flap_system_close(fd);
    return status;
  } else if (errno == EINTR) {
    *again = true;
  } else {
    flap_log(FLAP_LOG_WARNING, "%s cannot be locked (%s): make sure that no second run writes there", folder,
             strerror(errno));
    (void)flap_system_unlink(lock->path);
  }
  (void)flap_system_close(fd);
  return FLAP_OK;
}

flap_status flap_run_lock_take(const char *folder, flap_run_lock *lock_out) {
  lock_out->fd = -1;
  FLAP_TRY(flap_durable_join(lock_out->path, folder, FLAP_RUN_LOCK_FILE));
  bool again = true;
  for (int i = 0; i < TRIES && again; i++)
    FLAP_TRY(try_lock(folder, lock_out, &again));
  return again ? flap_error_set(FLAP_IO, "%s: %s appears and disappears all the time: is something else using it?",
                                folder, lock_out->path)
               : FLAP_OK;
}

/* The name goes first: whoever opened the file before sees that it is no longer the one of that name. */
void flap_run_lock_release(flap_run_lock *lock) {
  if (lock->fd < 0)
    return;
  (void)flap_system_unlink(lock->path);
  (void)flap_system_close(lock->fd);
  lock->fd = -1;
}
