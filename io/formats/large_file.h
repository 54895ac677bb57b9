/* A large file, written front to back, past the page cache where the file system takes that.
 *
 * What is written is collected in blocks of memory, and goes to the disk in whole blocks (O_DIRECT), on other threads
 * (write_behind.h), while the next are filled. The kernel then has no pages to find, copy into, write back and forget:
 * of 130 MB that takes 0.013 s of a core's time where the cache takes 0.033 s and more in other threads. The last
 * bytes, less than a block, are written when the file ends, what is no whole block of a disk through the cache; so does
 * all of a file that has no blocks, where a file system does not know O_DIRECT, and behind a write that was refused as
 * misaligned or ended amid a block. The bytes are the same, and either way they last from commit on, not before.
 *
 * Space is reserved when the file is made, where the file system can: a full disk is found before the first byte.
 * Threading: one user of all files that share blocks. The caller owns the name: a file that must appear whole is made
 * in a durable folder (durable.h).
 */
#ifndef FLAP_FORMATS_LARGE_FILE_H
#define FLAP_FORMATS_LARGE_FILE_H

#include "base/status.h"
#include "io/formats/room.h"
#include "io/formats/write_behind.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What large files are made of. {0}: nothing. */
typedef struct flap_file_piece {
  flap_write_behind *behind; /* whose blocks they share; NULL, or beyond FLAP_WRITE_BEHIND_FILES at a time: the cache */
  flap_room *room;           /* that was kept for them; NULL: what the file system has */
} flap_file_piece;

typedef struct flap_large_file {
  flap_write_target target; /* fd: -1 when ended */
  const char *path;         /* the caller's */
  flap_write_behind *behind;
  flap_write_block *block; /* that is filled; NULL: none */
  uint64_t held;           /* in it */
  uint64_t written;        /* or handed over, at the file's start; what is held follows */
} flap_large_file;

/* Creates or empties `path`, which will have `bytes`. `path` and what is in the piece outlive the file, which stays
 * where it is in memory. On failure there is nothing to end, and no file. */
FLAP_CHECKED flap_status flap_large_file_create(flap_large_file *file, const char *path, uint64_t bytes,
                                                flap_file_piece piece);
/* After a failure, which may be that of earlier bytes, only abort. */
FLAP_CHECKED flap_status flap_large_file_append(flap_large_file *file, const void *data, uint64_t bytes);
/* Makes durable all that was appended, as many bytes as were announced, and ends the file. After a failure only abort:
 * an fsync that failed is not tried again. The name lasts with the folder's fsync. */
FLAP_CHECKED flap_status flap_large_file_commit(flap_large_file *file);
/* Ends the file and removes it, once nothing of it is being written. */
void flap_large_file_abort(flap_large_file *file);

#ifdef __cplusplus
}
#endif
#endif
