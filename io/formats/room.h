/* Room on a file system for files that are still to be written: a file without a name, whose space is given back piece
 * by piece as they are made. Nobody else can have it before, and it goes with the process, however that ends.
 *
 * What is given back is free for a moment, until whoever asked for it allocates. Threading: one user at a time.
 */
#ifndef FLAP_FORMATS_ROOM_H
#define FLAP_FORMATS_ROOM_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_ROOM_FILE "flap-room.tmp" /* its name for a moment, where a file system knows no files without one */

typedef struct flap_room {
  int fd; /* -1: none */
  uint64_t bytes;
} flap_room;

/* No room yet, and for those who want none: all functions below do nothing with it, and succeed. */
#define FLAP_ROOM_NONE ((flap_room){.fd = -1})

/* In `folder`, which has one user: what an earlier process left there of it is removed. Takes nothing yet. */
FLAP_CHECKED flap_status flap_room_open(const char *folder, flap_room *room_out);
/* Has at least `bytes`, and up to `spare` more where there is more; NULL is fine. FLAP_NO_SPACE: it has less than
 * `bytes`, but what there was. FLAP_UNSUPPORTED: the file system cannot reserve so much, or nothing at all. */
FLAP_CHECKED flap_status flap_room_keep(flap_room *room, uint64_t bytes, uint64_t spare);
/* Gives back `bytes`, in whole blocks, or all it has if that is less. False: it had nothing. NULL is fine. */
bool flap_room_give(flap_room *room, uint64_t bytes);
/* Whether a call that returned this may do better when it is made again: it found no space, and some was given back. */
bool flap_room_helps(flap_room *room, flap_status status, uint64_t bytes);
/* A call that makes small files, or a folder, and may be made again: whenever it finds no space it gets twice as much
 * of what was kept. Nothing is given where there is space. */
#define FLAP_WITH_ROOM(status, room, call) \
  for (uint64_t bytes_ = FLAP_ROOM_SMALL_BYTES; flap_room_helps((room), (status) = (call), bytes_); bytes_ *= 2)
#define FLAP_ROOM_SMALL_BYTES ((uint64_t)16 << 10)
/* Gives back what is more than `bytes`. */
void flap_room_leave(flap_room *room, uint64_t bytes);
void flap_room_close(flap_room *room);

#ifdef __cplusplus
}
#endif
#endif
