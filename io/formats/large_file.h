/* A large file, written front to back, past the page cache where the file system takes that.
 *
 * What is written is collected in a piece of the caller's memory, and goes to the disk in whole pieces (O_DIRECT). The
 * kernel then has no pages to find, copy into, write back and forget: of 130 MB that takes 0.013 s of a core's time
 * where the cache takes 0.033 s and more in other threads. The last bytes, less than a block, go through the cache; so
 * does everything without a piece, where a file system does not know O_DIRECT, and behind a write that was refused as
 * misaligned or ended amid a block. The bytes are the same, and either way they last from commit on, not before.
 *
 * Space is reserved when the file is made, where the file system can: a full disk is found before the first byte.
 * Threading: one user. The caller owns the name: a file that must appear whole is made in a durable folder (durable.h).
 */
#ifndef FLAP_FORMATS_LARGE_FILE_H
#define FLAP_FORMATS_LARGE_FILE_H

#include "base/status.h"
#include "io/formats/room.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_LARGE_FILE_ALIGN 4096u /* of offsets, sizes and memory: what O_DIRECT wants */

/* What large files are made of. {0}: nothing. Memory aligned to FLAP_LARGE_FILE_ALIGN, of whose bytes whole blocks are
 * used; and room that was kept for them, from which each takes its space. */
typedef struct flap_file_piece {
  void *memory;
  uint64_t bytes;
  flap_room *room; /* NULL: what the file system has */
} flap_file_piece;

/* Part `index` of `count` equal ones of the memory, none where a part would have no block; and the room. */
flap_file_piece flap_file_piece_part(flap_file_piece piece, uint32_t index, uint32_t count);

typedef struct flap_large_file {
  int fd;           /* -1 when ended */
  const char *path; /* the caller's */
  unsigned char *piece;
  uint64_t piece_bytes, held;
  uint64_t written; /* at the file's start; what is held follows */
  bool direct;
} flap_large_file;

/* Creates or empties `path`, which will have `bytes`. `path` and the piece outlive the file. On failure there is
 * nothing to end, and no file. */
FLAP_CHECKED flap_status flap_large_file_create(flap_large_file *file, const char *path, uint64_t bytes,
                                                flap_file_piece piece);
/* After a failure only abort. */
FLAP_CHECKED flap_status flap_large_file_append(flap_large_file *file, const void *data, uint64_t bytes);
/* Makes durable all that was appended, as many bytes as were announced, and ends the file. After a failure only abort:
 * an fsync that failed is not tried again. The name lasts with the folder's fsync. */
FLAP_CHECKED flap_status flap_large_file_commit(flap_large_file *file);
/* Ends the file and removes it. */
void flap_large_file_abort(flap_large_file *file);

#ifdef __cplusplus
}
#endif
#endif
