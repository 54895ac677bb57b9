/* Shared by the files of io/block, and by nobody else.
 *
 * A request is cut into pieces, one per run of bytes that is contiguous on a disk. Pieces wait in the lane of their
 * disk and direction; a backend takes them out within the lane's depth, moves bytes, and settles each with what the
 * system returned. Settling is the same for every backend: it resumes short transfers, retries interrupted ones, and
 * completes the request with its last piece.
 *
 * Lock order: a backend's own lock first, then flap_block.mutex. Nobody calls notify while holding either.
 */
#ifndef FLAP_IO_BLOCK_BLOCK_INTERNAL_H
#define FLAP_IO_BLOCK_BLOCK_INTERNAL_H

#include "base/arena.h"
#include "io/block/block.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* --- striping: stripe.c --------------------------------------------------------------------------------------- */

#define BLOCK_PATTERN_MAX 64u

/* A stretch of the linear space over which one pattern of disks repeats. */
typedef struct block_phase {
  uint64_t stripe_first; /* in the linear space */
  uint64_t repeats;
  uint32_t period;                            /* slots of the pattern */
  uint8_t slot_disk[BLOCK_PATTERN_MAX];       /* which disk a slot lies on */
  uint8_t slot_rank[BLOCK_PATTERN_MAX];       /* how many earlier slots of the pattern lie on the same disk */
  uint8_t weight[FLAP_BLOCK_DISKS_MAX];       /* slots of each disk */
  uint64_t stripe_base[FLAP_BLOCK_DISKS_MAX]; /* the disk's first stripe in this phase */
} block_phase;

typedef struct block_map {
  uint32_t disk_count;
  uint64_t stripe_bytes;
  uint32_t phase_count; /* 0 for one disk, where the map is the identity */
  block_phase *phases;
} block_map;

typedef struct block_run {
  uint32_t disk;
  uint64_t offset; /* in the disk's extent file */
  uint64_t bytes;
} block_run;

/* What of each disk is used for so many bytes of the linear space: as much of them as its weight is of all weights, or
 * all of it where that is less, and the others more. Without weights all of each: their pattern goes by sizes. */
void block_map_use(uint32_t disk_count, const flap_block_disk *disks, uint64_t stripe_bytes, uint64_t bytes,
                   flap_block_disk *used_out);
/* So many phases go by sizes, which is more than sizes were found to need; at most disk_count more take what is left
 * then. The memory for them does not depend on how much of the disks is used. */
uint32_t block_map_phases_by_size(uint32_t disk_count);
static inline uint32_t block_map_phases_max(uint32_t disk_count) {
  return disk_count == 1 ? 0 : block_map_phases_by_size(disk_count) + disk_count;
}
/* `phases` holds by_size + disk_count entries and must outlive the map. */
void block_map_build(block_map *map, uint32_t disk_count, const flap_block_disk *disks, uint64_t stripe_bytes,
                     uint32_t by_size, block_phase *phases);
/* The longest run from `offset` on, at most `bytes`, that is contiguous on one disk. */
block_run block_map_find(const block_map *map, uint64_t offset, uint64_t bytes);
/* Bytes of `disk` that the first `bytes` of the linear space reach; stripes are counted whole, except on one disk. */
uint64_t block_map_disk_bytes(const block_map *map, uint32_t disk, uint64_t bytes);
/* The most runs that a request may be cut into. */
uint32_t block_map_runs_max(uint32_t disk_count, uint64_t stripe_bytes);

/* --- extent files: files.c ------------------------------------------------------------------------------------ */

typedef struct block_file {
  int fd;
  bool direct;
  uint64_t bytes;
} block_file;

/* An unnamed file of `bytes` in the folder `path`, its space reserved. */
FLAP_CHECKED flap_status block_file_open(const char *path, uint64_t bytes, block_file *file_out);
/* One that can get a name, in a folder that is no disk's. */
FLAP_CHECKED flap_status block_file_open_linkable(const char *folder, uint64_t bytes, block_file *file_out);
void block_file_close(block_file *file);

/* --- pieces and lanes: block.c -------------------------------------------------------------------------------- */

#define BLOCK_FILES_MAX (FLAP_BLOCK_DISKS_MAX + FLAP_BLOCK_FILES_MAX)

typedef struct block_piece {
  struct block_piece *next;
  flap_block_request *request;
  unsigned char *buffer; /* buffer, offset and bytes_left are of what is still to be moved */
  uint64_t offset;       /* in the file */
  uint32_t bytes_left;
  uint32_t disk;
  uint32_t file;  /* in block->files: the disk's, or one beside the linear space */
  uint32_t tries; /* in a row without progress */
  flap_block_op op;
  uint64_t due_ns, order; /* the simulated disk's */
} block_piece;

typedef struct block_queue {
  block_piece *first, *last;
} block_queue;

typedef struct block_lane {
  block_queue waiting;
  uint32_t in_flight, depth;
} block_lane;

typedef struct block_backend block_backend;

struct flap_block {
  flap_block_config config; /* its paths are copies in the arena */
  flap_arena arena;
  const block_backend *backend;
  void *state; /* the backend's own */
  block_map map;
  /* By disk; then those of flap_block_file_open, file n at FLAP_BLOCK_DISKS_MAX + n - 1, whose owner sees to it that
   * nobody uses one while it is opened or closed. */
  block_file files[BLOCK_FILES_MAX];
  const char *folder;    /* of those of flap_block_file_open; the caller's */
  pthread_mutex_t mutex; /* for everything below */
  pthread_cond_t idle;   /* no request is active */
  block_lane lanes[FLAP_BLOCK_DISKS_MAX][2];
  uint32_t lane_next; /* where the search for the next piece begins, so that lanes take turns */
  block_piece *pieces_free;
  flap_block_request *done_first, *done_last;
  uint32_t requests_open;   /* submitted and not yet polled */
  uint32_t requests_active; /* submitted and not yet completed */
};

struct block_backend {
  const char *name;
  bool has_files;
  uint64_t state_bytes;
  /* state is zeroed; files are open. A failure leaves nothing behind. */
  flap_status (*open)(flap_block *block);
  /* With the mutex held, before the request is cut; true when the backend takes the whole request itself. May be NULL.
   */
  bool (*accept)(flap_block *block, flap_block_request *request);
  /* Without the mutex: pieces may be waiting. */
  void (*start)(flap_block *block);
  /* Another descriptor is at block->files[index]; -1 for none. May be NULL. */
  void (*file_changed)(flap_block *block, uint32_t index);
  /* Nothing is in flight any more. */
  void (*close)(flap_block *block);
};

extern const block_backend block_backend_uring, block_backend_threads, block_backend_sim;

/* All with the mutex held. */

/* The next piece that its lane's depth allows, lanes taking turns, counted as in flight; or NULL. */
block_piece *block_piece_take(flap_block *block);
/* `result` is what a read or write returned: bytes moved, or -errno. True when this completed a request, which is then
 * pollable. A piece with something left goes back to the head of its lane. */
bool block_piece_settle(flap_block *block, block_piece *piece, int64_t result);
/* Makes an active request pollable. */
void block_request_complete(flap_block *block, flap_block_request *request, uint64_t now_ns);

/* Without the mutex. */
void block_notify(flap_block *block);
/* Starts a thread with all signals blocked; 0 or errno. */
int block_thread_start(pthread_t *thread, void *(*main)(void *), void *argument);

#endif
