#include "tests/reliability/fault_calls.h"

#include "base/system.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DESCRIPTORS_MAX 1024

static const char *const call_names[] = {"open",       "close",       "read",         "write",  "sync",  "truncate",
                                         "allocate",   "rename",      "link",         "remove", "mkdir", "stat",
                                         "pages-read", "extent-read", "extent-write", "change"};
static const char *const kind_names[] = {"EIO",   "ENOSPC", "EMFILE", "EINTR", "EOPNOTSUPP", "EMLINK",
                                         "short", "flip",   "lose",   "kill",  "torn"};
static const int os_errors[FAULT_KIND_COUNT] = {EIO, ENOSPC, EMFILE, EINTR, EOPNOTSUPP, EMLINK};

static fault_plan plan;
static atomic_uint_fast64_t counts[FAULT_CALL_COUNT + 1];
static atomic_bool fired;
static atomic_bool is_extent[DESCRIPTORS_MAX], is_pages[DESCRIPTORS_MAX];
static const flap_system *real;

const char *fault_call_name(fault_call call) {
  return call_names[call];
}

const char *fault_kind_name(fault_kind kind) {
  return kind_names[kind];
}

const char *fault_plan_write(const fault_plan *given) {
  static char text[80];
  (void)snprintf(text, sizeof text, "%s:%s:%s:%llu", call_names[given->call], kind_names[given->kind],
                 given->for_ever ? "ever" : "once", (unsigned long long)given->number);
  return text;
}

static int find_name(const char *const *names, size_t count, const char *name) {
  for (size_t i = 0; i < count; i++)
    if (strcmp(names[i], name) == 0)
      return (int)i;
  return -1;
}

bool fault_plan_read(const char *text, fault_plan *plan_out) {
  char call[16], kind[16], times[8];
  unsigned long long number;
  if (sscanf(text, "%15[^:]:%15[^:]:%7[^:]:%llu", call, kind, times, &number) != 4)
    return false;
  const int call_index = find_name(call_names, sizeof call_names / sizeof *call_names, call);
  const int kind_index = find_name(kind_names, sizeof kind_names / sizeof *kind_names, kind);
  if (call_index < 0 || kind_index < 0)
    return false;
  *plan_out = (fault_plan){.call = (fault_call)call_index,
                           .kind = (fault_kind)kind_index,
                           .number = number,
                           .for_ever = strcmp(times, "ever") == 0};
  return true;
}

/* ---- the decision -------------------------------------------------------------------------------------------- */

static bool counts_as(fault_call call, bool changes) {
  const uint64_t number = atomic_fetch_add(&counts[call], 1) + 1;
  const uint64_t change = changes ? atomic_fetch_add(&counts[FAULT_CALL_CHANGE], 1) + 1 : 0;
  const uint64_t mine = plan.call == call ? number : plan.call == FAULT_CALL_CHANGE ? change : 0;
  if (mine == 0 || plan.number == 0 || (plan.for_ever ? mine < plan.number : mine != plan.number))
    return false;
  atomic_store(&fired, true);
  return true;
}

/* True: the call fails, and errno says how. Does not return where the process is to end. */
static bool fails(fault_call call, bool changes) {
  if (!counts_as(call, changes) || (plan.kind >= FAULT_SHORT && plan.kind < FAULT_KILL))
    return false;
  if (plan.kind >= FAULT_KILL)
    _exit(FAULT_KILLED);
  errno = os_errors[plan.kind];
  return true;
}

/* Of a read or write: how many bytes it may move, or -1; and the fault that happens to it, FAULT_KIND_COUNT for none.
 */
static ssize_t allowed(fault_call call, bool changes, size_t bytes, fault_kind *fault_out) {
  *fault_out = FAULT_KIND_COUNT;
  if (!counts_as(call, changes))
    return (ssize_t)bytes;
  *fault_out = plan.kind;
  if (plan.kind == FAULT_KILL)
    _exit(FAULT_KILLED);
  if (plan.kind == FAULT_SHORT || plan.kind == FAULT_KILL_TORN)
    return (ssize_t)(bytes > 1 ? bytes / 2 : bytes);
  if (plan.kind == FAULT_FLIP || plan.kind == FAULT_LOSE)
    return (ssize_t)bytes;
  errno = os_errors[plan.kind];
  return -1;
}

static bool of_extent(int fd) {
  return fd >= 0 && fd < DESCRIPTORS_MAX && atomic_load(&is_extent[fd]);
}

static fault_call read_of(int fd) {
  const bool pages = fd >= 0 && fd < DESCRIPTORS_MAX && atomic_load(&is_pages[fd]);
  return of_extent(fd) ? FAULT_CALL_EXTENT_READ : pages ? FAULT_CALL_PAGES_READ : FAULT_CALL_READ;
}

/* ---- the calls ----------------------------------------------------------------------------------------------- */

static int faulty_open(int folder, const char *path, int flags, mode_t mode) {
  if (fails(FAULT_CALL_OPEN, (flags & (O_CREAT | O_TRUNC)) != 0))
    return -1;
  const int fd = real->open(folder, path, flags, mode);
  if (fd >= 0 && fd < DESCRIPTORS_MAX) {
    atomic_store(&is_extent[fd], (flags & O_TMPFILE) == O_TMPFILE);
    atomic_store(&is_pages[fd], strstr(path, "/optimizer-pages-") != NULL);
  }
  return fd;
}

/* As Linux does it: the descriptor is gone, whatever close returns. */
static int faulty_close(int fd) {
  const bool failing = fails(FAULT_CALL_CLOSE, false);
  const int os_error = errno, result = real->close(fd);
  if (failing)
    errno = os_error;
  return failing ? -1 : result;
}

static ssize_t flipped(void *data, ssize_t got, fault_kind fault) {
  if (fault == FAULT_FLIP && got > 0)
    ((unsigned char *)data)[got > 6 ? 6 : 0] ^= 0x10; /* near the start: ends of pages may hold nothing */
  return got;
}

static ssize_t faulty_read(int fd, void *data, size_t bytes) {
  fault_kind fault;
  const ssize_t most = allowed(read_of(fd), false, bytes, &fault);
  return most < 0 ? -1 : flipped(data, real->read(fd, data, (size_t)most), fault);
}

static ssize_t faulty_pread(int fd, void *data, size_t bytes, off_t offset) {
  fault_kind fault;
  const ssize_t most = allowed(read_of(fd), false, bytes, &fault);
  return most < 0 ? -1 : flipped(data, real->pread(fd, data, (size_t)most, offset), fault);
}

static ssize_t faulty_write(int fd, const void *data, size_t bytes) {
  fault_kind fault;
  const ssize_t most = allowed(FAULT_CALL_WRITE, true, bytes, &fault);
  const ssize_t result = most < 0 ? -1 : real->write(fd, data, (size_t)most);
  if (fault == FAULT_KILL_TORN)
    _exit(FAULT_KILLED);
  return result;
}

static ssize_t faulty_pwrite(int fd, const void *data, size_t bytes, off_t offset) {
  fault_kind fault;
  const ssize_t most = allowed(of_extent(fd) ? FAULT_CALL_EXTENT_WRITE : FAULT_CALL_WRITE, true, bytes, &fault);
  if (fault == FAULT_LOSE)
    return most;
  const ssize_t result = most < 0 ? -1 : real->pwrite(fd, data, (size_t)most, offset);
  if (fault == FAULT_KILL_TORN)
    _exit(FAULT_KILLED);
  return result;
}

static int faulty_sync(int fd) {
  return fails(FAULT_CALL_SYNC, true) ? -1 : real->sync(fd);
}

static int faulty_truncate(int fd, off_t bytes) {
  return fails(FAULT_CALL_TRUNCATE, true) ? -1 : real->truncate(fd, bytes);
}

static int faulty_allocate(int fd, off_t bytes) {
  return fails(FAULT_CALL_ALLOCATE, true) ? -1 : real->allocate(fd, bytes);
}

static int faulty_rename(const char *from, const char *to, unsigned flags) {
  return fails(FAULT_CALL_RENAME, true) ? -1 : real->rename(from, to, flags);
}

static int faulty_link(int fd, const char *path) {
  return fails(FAULT_CALL_LINK, true) ? -1 : real->link(fd, path);
}

static int faulty_remove(int folder, const char *path, int flags) {
  return fails(FAULT_CALL_REMOVE, true) ? -1 : real->remove(folder, path, flags);
}

static int faulty_make_folder(const char *path, mode_t mode) {
  return fails(FAULT_CALL_MKDIR, true) ? -1 : real->make_folder(path, mode);
}

static int faulty_stat(int folder, const char *path, struct stat *about_out, int flags) {
  return fails(FAULT_CALL_STAT, false) ? -1 : real->stat(folder, path, about_out, flags);
}

/* The transfer was made, and is told as another one. A write that only seems lost is no lost write: FAULT_LOSE is for
 * threads. */
static int64_t faulty_transferred(int fd, bool written, void *data, int64_t result) {
  fault_kind fault;
  (void)fd;
  if (result <= 0)
    return result;
  const ssize_t most =
      allowed(written ? FAULT_CALL_EXTENT_WRITE : FAULT_CALL_EXTENT_READ, written, (size_t)result, &fault);
  if (fault == FAULT_KILL_TORN)
    _exit(FAULT_KILLED);
  return most < 0 ? -errno : flipped(data, most, written ? FAULT_KIND_COUNT : fault);
}

static const flap_system faulty = {
    .open = faulty_open,
    .close = faulty_close,
    .read = faulty_read,
    .pread = faulty_pread,
    .write = faulty_write,
    .pwrite = faulty_pwrite,
    .sync = faulty_sync,
    .truncate = faulty_truncate,
    .allocate = faulty_allocate,
    .rename = faulty_rename,
    .link = faulty_link,
    .remove = faulty_remove,
    .make_folder = faulty_make_folder,
    .stat = faulty_stat,
    .transferred = faulty_transferred,
};

void fault_calls_install(const fault_plan *given) {
  plan = *given;
  real = flap_system_default();
  atomic_store(&fired, false);
  for (int i = 0; i <= FAULT_CALL_COUNT; i++)
    atomic_store(&counts[i], 0);
  (void)flap_system_replace(&faulty);
}

void fault_calls_remove(void) {
  (void)flap_system_replace(NULL);
}

uint64_t fault_calls_count(fault_call call) {
  return atomic_load(&counts[call]);
}

bool fault_calls_fired(void) {
  return atomic_load(&fired);
}

static uint64_t *of_life; /* written by the child */

static void count_life(void *context) {
  fault_calls_install(&(fault_plan){0});
  const flap_status status = tiny_run_live(context);
  fault_calls_remove();
  for (int i = 0; i <= FAULT_CALL_CHANGE; i++)
    of_life[i] = status == FLAP_OK ? fault_calls_count((fault_call)i) : 0;
}

const uint64_t *fault_calls_of_life(tiny_run *run) {
  of_life = case_shared((FAULT_CALL_CHANGE + 1) * sizeof *of_life);
  tiny_run_clear(run);
  return case_fork(count_life, run, 60) == 0 ? of_life : NULL;
}
