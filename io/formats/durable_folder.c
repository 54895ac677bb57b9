/* Folders that appear and disappear whole.
 *
 *            begin_folder           commit_folder (no final yet)
 *   nothing ──────────────▶ x.tmp ───────────────────────────────▶ x
 *                             │     commit_folder (replace)
 *                             ├───────────────▶ x and x.tmp exchange names ──▶ the old one, x.tmp, is removed
 *                             │     where names cannot be exchanged
 *                             └───────────────▶ x to x.tmp.old, x.tmp to x ──▶ x.tmp.old is removed
 *
 * A crash on any edge leaves x whole, old or new, or else x.tmp.old, which recover_folder renames back.
 */
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"

#include "base/system.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_bool exchange_refused;

void flap_durable_refuse_exchange(bool refuse) {
  atomic_store(&exchange_refused, refuse);
}

/* ---- walking ------------------------------------------------------------------------------------------- */

typedef enum walk_action { WALK_CHECK, WALK_SYNC, WALK_REMOVE } walk_action;

static flap_status walk(int fd, const char *path, int levels_below, walk_action action);

static flap_status walk_file(int folder, const char *name, const char *path, walk_action action) {
  if (action == WALK_REMOVE && flap_system_unlinkat(folder, name, 0) != 0)
    return flap_error_set_os(errno, "cannot remove %s/%s", path, name);
  if (action == WALK_SYNC) {
    int fd = flap_system_openat(folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC, 0);
    if (fd < 0)
      return flap_error_set_os(errno, "cannot open %s/%s to make it durable", path, name);
    int os_error = flap_system_fsync(fd) != 0 ? errno : 0;
    (void)flap_system_close(fd);
    if (os_error) {
      flap_status status = flap_durable_write_error(os_error, name);
      return flap_error_prefix(status, "%s", path);
    }
  }
  return FLAP_OK;
}

static flap_status walk_subfolder(int folder, const char *name, const char *path, int levels_below,
                                  walk_action action) {
  char below[FLAP_DURABLE_PATH_MAX];
  FLAP_TRY(flap_durable_join(below, path, name));
  if (levels_below == 0)
    return flap_error_set(FLAP_INVALID, "%s: folders this deep were not put there by FLAP; remove it by hand", below);
  int fd = flap_system_openat(folder, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open the folder %s", below);
  FLAP_TRY(walk(fd, below, levels_below - 1, action));
  if (action == WALK_REMOVE && flap_system_unlinkat(folder, name, AT_REMOVEDIR) != 0)
    return flap_error_set_os(errno, "cannot remove the folder %s", below);
  return FLAP_OK;
}

static flap_status walk_entry(int folder, const char *name, const char *path, int levels_below, walk_action action) {
  struct stat about;
  if (flap_system_fstatat(folder, name, &about, AT_SYMLINK_NOFOLLOW) != 0)
    return flap_error_set_os(errno, "cannot look at %s/%s", path, name);
  if (S_ISDIR(about.st_mode))
    return walk_subfolder(folder, name, path, levels_below, action);
  if (S_ISREG(about.st_mode))
    return walk_file(folder, name, path, action);
  if (!S_ISLNK(about.st_mode))
    return flap_error_set(FLAP_INVALID, "%s/%s: neither a file nor a folder; remove it by hand", path, name);
  return action == WALK_REMOVE ? walk_file(folder, name, path, action) : FLAP_OK;
}

/* Does `action` to everything in the folder, then (for WALK_SYNC) to the folder itself. Takes the descriptor. */
static flap_status walk(int fd, const char *path, int levels_below, walk_action action) {
  DIR *folder = fdopendir(fd);
  if (!folder) {
    flap_status failed = flap_error_set_os(errno, "cannot list the folder %s", path);
    (void)flap_system_close(fd);
    return failed;
  }
  flap_status status = FLAP_OK;
  while (status == FLAP_OK) {
    errno = 0;
    struct dirent *entry = readdir(folder);
    if (!entry) {
      if (errno)
        status = flap_error_set_os(errno, "cannot list the folder %s", path);
      break;
    }
    if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
      status = walk_entry(fd, entry->d_name, path, levels_below, action);
  }
  if (status == FLAP_OK && action == WALK_SYNC && flap_system_fsync(fd) != 0 && errno != EINVAL)
    status = flap_durable_write_error(errno, path);
  (void)closedir(folder);
  return status;
}

static flap_status walk_path(const char *path, walk_action action) {
  int fd = flap_system_open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
  if (fd < 0) {
    int os_error = errno;
    if (os_error == ENOTDIR || os_error == ELOOP)
      return flap_error_set(FLAP_INVALID, "%s: not a folder", path);
    return flap_error_set_os(os_error, "cannot open the folder %s", path);
  }
  return walk(fd, path, 1, action);
}

/* Removes all or, when it holds something of others, nothing. */
static flap_status remove_tree(const char *path) {
  FLAP_TRY(walk_path(path, WALK_CHECK));
  FLAP_TRY(walk_path(path, WALK_REMOVE));
  if (flap_system_rmdir(path) != 0)
    return flap_error_set_os(errno, "cannot remove the folder %s", path);
  return FLAP_OK;
}

static flap_status rename_durably(const char *from, const char *to) {
  if (flap_system_rename(from, to, 0) != 0)
    return flap_error_set_os(errno, "cannot rename %s to %s", from, to);
  return flap_durable_sync_parent(to);
}

/* ---- public -------------------------------------------------------------------------------------------- */

flap_status flap_durable_look(const char *path, bool *there_out) {
  struct stat about;
  *there_out = flap_system_lstat(path, &about) == 0;
  if (!*there_out && errno != ENOENT && errno != ENOTDIR)
    return flap_error_set_os(errno, "cannot look at %s", path);
  return FLAP_OK;
}

flap_status flap_durable_make_folder(const char *path) {
  char partial[FLAP_DURABLE_PATH_MAX];
  struct stat about;
  FLAP_TRY(flap_durable_sibling(partial, path, ""));
  for (char *at = partial + 1;; at++) {
    char kept = *at;
    if (kept != '/' && kept != '\0')
      continue;
    *at = '\0';
    if (flap_system_mkdir(partial, FLAP_DURABLE_FOLDER_MODE) == 0)
      FLAP_TRY(flap_durable_sync_parent(partial));
    else if (errno != EEXIST)
      return flap_error_set_os(errno, "cannot make the folder %s", partial);
    else if (flap_system_stat(partial, &about) != 0)
      return flap_error_set_os(errno, "cannot look at the folder %s", partial);
    else if (!S_ISDIR(about.st_mode))
      return flap_error_set(FLAP_INVALID, "cannot make the folder %s: a file of that name is in the way", partial);
    *at = kept;
    if (kept == '\0')
      return FLAP_OK;
  }
}

flap_status flap_durable_recover_folder(const char *final_path) {
  char final[FLAP_DURABLE_PATH_MAX], temporary[FLAP_DURABLE_PATH_MAX], old[FLAP_DURABLE_PATH_MAX];
  bool final_there = false, temporary_there = false, old_there = false;
  FLAP_TRY(flap_durable_sibling(final, final_path, ""));
  FLAP_TRY(flap_durable_sibling(temporary, final_path, ".tmp"));
  FLAP_TRY(flap_durable_sibling(old, final_path, ".tmp.old"));
  FLAP_TRY(flap_durable_look(old, &old_there));
  FLAP_TRY(flap_durable_look(final, &final_there));
  FLAP_TRY(flap_durable_look(temporary, &temporary_there));
  if (old_there && final_there)
    FLAP_TRY(remove_tree(old));
  else if (old_there)
    FLAP_TRY(rename_durably(old, final));
  return temporary_there ? remove_tree(temporary) : FLAP_OK;
}

flap_status flap_durable_begin_folder(const char *final_path, char temporary_out[FLAP_DURABLE_PATH_MAX]) {
  FLAP_TRY(flap_durable_sibling(temporary_out, final_path, ".tmp"));
  FLAP_TRY(flap_durable_recover_folder(final_path));
  if (flap_system_mkdir(temporary_out, FLAP_DURABLE_FOLDER_MODE) != 0)
    return flap_error_set_os(errno, "cannot make the folder %s", temporary_out);
  return FLAP_OK;
}

static int exchange(const char *a, const char *b) {
  if (atomic_load(&exchange_refused)) {
    errno = EINVAL;
    return -1;
  }
  return flap_system_rename(a, b, RENAME_EXCHANGE);
}

/* Puts `temporary` in the place of the folder `final`, and removes the old one. */
static flap_status replace_folder(const char *temporary, const char *final) {
  char old[FLAP_DURABLE_PATH_MAX];
  bool old_there = false;
  FLAP_TRY(flap_durable_sibling(old, final, ".tmp.old"));
  FLAP_TRY(walk_path(final, WALK_CHECK));
  const char *rest = temporary;
  if (exchange(temporary, final) != 0) {
    int os_error = errno;
    if (os_error != EINVAL && os_error != ENOSYS)
      return flap_error_set_os(os_error, "cannot put %s in the place of %s", temporary, final);
    FLAP_TRY(flap_durable_look(old, &old_there));
    if (old_there)
      FLAP_TRY(remove_tree(old));
    FLAP_TRY(rename_durably(final, old));
    if (flap_system_rename(temporary, final, 0) != 0) {
      os_error = errno;
      (void)flap_system_rename(old, final, 0);
      return flap_error_set_os(os_error, "cannot rename %s to %s", temporary, final);
    }
    rest = old;
  }
  const flap_status status = flap_durable_sync_parent(final);
  if (status != FLAP_OK) {
    /* Which of both names the disk knows is open, so both folders stay whole: not as `x.tmp`, which an abort removes.
     */
    if (rest == temporary)
      (void)flap_system_rename(temporary, old, 0);
    return status;
  }
  /* The new folder is in place. What cannot be removed of the old one waits for the next recovery. */
  if (remove_tree(rest) != FLAP_OK)
    flap_error_clear();
  return FLAP_OK;
}

flap_status flap_durable_commit_folder(const char *final_path, bool replace) {
  char final[FLAP_DURABLE_PATH_MAX], temporary[FLAP_DURABLE_PATH_MAX];
  bool there = false;
  FLAP_TRY(flap_durable_sibling(final, final_path, ""));
  FLAP_TRY(flap_durable_sibling(temporary, final_path, ".tmp"));
  FLAP_TRY(walk_path(temporary, WALK_SYNC));
  FLAP_TRY(flap_durable_look(final, &there));
  if (!there) {
    if (flap_system_rename(temporary, final, RENAME_NOREPLACE) == 0)
      return flap_durable_sync_parent(final);
    /* Without RENAME_NOREPLACE a plain rename does: it puts a folder over nothing but an empty folder. */
    if (errno == EINVAL || errno == ENOSYS)
      return rename_durably(temporary, final);
    if (errno != EEXIST)
      return flap_error_set_os(errno, "cannot rename %s to %s", temporary, final);
  }
  if (!replace)
    return flap_error_set(FLAP_INVALID, "%s: already there; remove it or choose another folder", final);
  return replace_folder(temporary, final);
}

/* Whoever calls this has an error to tell, and the record is kept for it. */
void flap_durable_abort_folder(const char *final_path) {
  char temporary[FLAP_DURABLE_PATH_MAX], message[1024];
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  bool there = false;
  if (flap_durable_sibling(temporary, final_path, ".tmp") == FLAP_OK &&
      flap_durable_look(temporary, &there) == FLAP_OK && there)
    (void)!remove_tree(temporary);
  flap_error_clear();
  if (message[0] != '\0')
    (void)flap_error_set(FLAP_IO, "%s", message);
}

flap_status flap_durable_remove_folder(const char *path) {
  char final[FLAP_DURABLE_PATH_MAX], temporary[FLAP_DURABLE_PATH_MAX];
  bool there = false;
  FLAP_TRY(flap_durable_sibling(final, path, ""));
  FLAP_TRY(flap_durable_sibling(temporary, path, ".tmp"));
  FLAP_TRY(walk_path(final, WALK_CHECK));
  FLAP_TRY(flap_durable_look(temporary, &there));
  if (there)
    FLAP_TRY(remove_tree(temporary));
  FLAP_TRY(rename_durably(final, temporary));
  return remove_tree(temporary);
}
