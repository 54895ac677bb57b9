/* Files and folders that are there whole, or not at all, whatever moment the power fails.
 *
 * The way is always the same: write under a temporary name, fsync, rename, fsync the folder that holds the name. An
 * fsync that failed is never tried again as if nothing had happened; the temporary is removed and the old content
 * stays.
 *
 * Names: what will become `x` is `x.tmp` meanwhile, and whatever stands there is FLAP's to remove. While a folder is
 * replaced on a file system that cannot exchange two names, the old one is `x.tmp.old` for a moment.
 * flap_durable_recover_folder clears both up.
 *
 * A full disk, a quota and a file-size limit are FLAP_NO_SPACE. Threading: any thread; one user per path.
 */
#ifndef FLAP_FORMATS_DURABLE_H
#define FLAP_FORMATS_DURABLE_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_DURABLE_PATH_MAX 4096u /* the NUL included */
/* Of what is made: its owner's alone. Weights and texts may be private; who shares them says so with chmod. */
#define FLAP_DURABLE_FILE_MODE 0600
#define FLAP_DURABLE_FOLDER_MODE 0700

/* ---- files --------------------------------------------------------------------------------------------- */

/* Replaces the content of `path`. */
FLAP_CHECKED flap_status flap_durable_write_file(const char *path, const void *data, uint64_t bytes);

/* The same in pieces: begin opens `<path>.tmp` for writing; commit makes it durable and renames; abort removes it. Both
 * end the file, whatever they return, and commit removes the temporary when it fails. */
typedef struct flap_durable_file {
  int fd; /* -1 when ended */
  char path[FLAP_DURABLE_PATH_MAX];
  char temporary[FLAP_DURABLE_PATH_MAX];
} flap_durable_file;

FLAP_CHECKED flap_status flap_durable_begin_file(flap_durable_file *file, const char *path);
FLAP_CHECKED flap_status flap_durable_append(flap_durable_file *file, const void *data, uint64_t bytes);
FLAP_CHECKED flap_status flap_durable_commit_file(flap_durable_file *file);
void flap_durable_abort_file(flap_durable_file *file); /* fine for one that has ended */

/* Replaces the content of `to` with that of the file `from`. */
FLAP_CHECKED flap_status flap_durable_copy_file(const char *from, const char *to);

/* The same from a file that is open, whatever its position, and may have lost its name; nothing to do where `to` is
 * that file. */
FLAP_CHECKED flap_status flap_durable_copy_open_file(int fd, const char *to);

/* Writes all bytes at the file's position, through short writes and signals. `path` is for the record. */
FLAP_CHECKED flap_status flap_durable_write_all(int fd, const char *path, const void *data, uint64_t bytes);
/* Reads exactly `bytes` at `offset`; FLAP_CORRUPT when the file ends before. */
FLAP_CHECKED flap_status flap_durable_read_all(int fd, const char *path, uint64_t offset, void *data, uint64_t bytes);

/* ---- folders ------------------------------------------------------------------------------------------- */

/* Makes the folder and those above it; fine if it is there. */
FLAP_CHECKED flap_status flap_durable_make_folder(const char *path);

/* Clears up after a crash: removes `<final>.tmp` and `<final>.tmp.old` (which takes its old name back if `final` is not
 * there). Nothing to do is FLAP_OK. */
FLAP_CHECKED flap_status flap_durable_recover_folder(const char *final_path);

/* Recovers, then makes an empty `<final>.tmp`, and stores its path. The folder above must exist. */
FLAP_CHECKED flap_status flap_durable_begin_folder(const char *final_path, char temporary_out[FLAP_DURABLE_PATH_MAX]);

/* Makes all files in `<final>.tmp` durable (one level of folders below it) and gives it its final name. An existing
 * target is replaced if `replace` says so, and otherwise FLAP_INVALID, with the temporary left as it was. */
FLAP_CHECKED flap_status flap_durable_commit_folder(const char *final_path, bool replace);

/* Removes `<final>.tmp`. Nothing there is fine; a failure is left for the next recovery, and the error record stays. */
void flap_durable_abort_folder(const char *final_path);

/* Removes a folder that holds regular files, links (never followed) and at most one level of folders of such. Anything
 * else is FLAP_INVALID, and nothing has been removed then. It loses its name first, so half of it is never seen. A
 * missing folder is FLAP_NOT_FOUND. */
FLAP_CHECKED flap_status flap_durable_remove_folder(const char *path);

/* Whether something stands at `path`, a link counting as itself. What the system refuses to look at is an error: to
 * take it for missing could lose it. */
FLAP_CHECKED flap_status flap_durable_look(const char *path, bool *there_out);

/* "<folder>/<name>"; FLAP_INVALID when too long. */
FLAP_CHECKED flap_status flap_durable_join(char path_out[FLAP_DURABLE_PATH_MAX], const char *folder, const char *name);

/* fsync of the folder that holds `path`, for a caller that made or removed a name itself. */
FLAP_CHECKED flap_status flap_durable_sync_parent(const char *path);

#ifdef __cplusplus
}
#endif
#endif
