/* Memory in blocks, and threads that write full ones to files while their owner fills the next.
 *
 * Role: below large_file.h, whose files share the blocks. It knows offsets and bytes, not what a file is for. Nothing
 * is allocated after open; the memory is the caller's.
 *
 *   block:  free → filled by its file (take) → queued (put) → written → free; or given back
 *
 * A failure stays with its file: what else is queued of it is dropped, and the owner gets the system's error at the
 * next take or wait. Calls go through base/system.h, one at a time for each thread. Threading: one owner, which is
 * whoever uses the files.
 */
#ifndef FLAP_FORMATS_WRITE_BEHIND_H
#define FLAP_FORMATS_WRITE_BEHIND_H

#include "base/status.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_WRITE_BEHIND_ALIGN 4096u /* of offsets, sizes and memory: what O_DIRECT wants */
#define FLAP_WRITE_BEHIND_BLOCKS 8u
/* At a time; each fills one block at most, so there are always some to be written. */
#define FLAP_WRITE_BEHIND_FILES (FLAP_WRITE_BEHIND_BLOCKS - 2u)
/* So that the disk has a write while the other thread's next one waits for a core. */
#define FLAP_WRITE_BEHIND_THREADS 2u

/* A file as the threads know it. */
typedef struct flap_write_target {
  int fd;
  atomic_bool direct; /* O_DIRECT is on */
  /* under the lock */
  uint32_t under_way; /* blocks, queued or being written */
  int os_error;       /* the first one; 0: none */
} flap_write_target;

typedef struct flap_write_block {
  unsigned char *memory;
  flap_write_target *target;
  uint64_t offset, bytes;
} flap_write_block;

typedef struct flap_write_behind {
  uint64_t block_bytes; /* 0: there are no blocks, and no threads */
  flap_write_block blocks[FLAP_WRITE_BEHIND_BLOCKS];
  pthread_t threads[FLAP_WRITE_BEHIND_THREADS];
  uint32_t started;
  pthread_mutex_t lock;
  pthread_cond_t work, done;
  /* under the lock */
  flap_write_block *free[FLAP_WRITE_BEHIND_BLOCKS], *queue[FLAP_WRITE_BEHIND_BLOCKS];
  uint32_t free_count, queue_first, queue_count;
  uint32_t files;
  bool stop;
} flap_write_behind;

/* `memory`, aligned, outlives it; what is too little for all blocks makes none of them, and then no file joins.
 * FLAP_NO_MEMORY: a thread was refused. {0} is fine for close, and for whoever wants no blocks. */
FLAP_CHECKED flap_status flap_write_behind_open(void *memory, uint64_t bytes, flap_write_behind *behind);
/* When all files have left. */
void flap_write_behind_close(flap_write_behind *behind);

/* Of its threads, since open: what they computed. */
double flap_write_behind_seconds(const flap_write_behind *behind);

/* False: there are no blocks for it. */
bool flap_write_behind_join(flap_write_behind *behind);
/* With nothing under way, and no block taken. */
void flap_write_behind_leave(flap_write_behind *behind);

/* A block to be filled, with block_bytes; waits for one. Returns the target's os_error, and then no block. */
FLAP_CHECKED int flap_write_behind_take(flap_write_behind *behind, const flap_write_target *target,
                                        flap_write_block **block_out);
/* Writes the first `bytes` of it, some time from now. Of a target with O_DIRECT they and `offset` are whole blocks. */
void flap_write_behind_put(flap_write_behind *behind, flap_write_block *block, flap_write_target *target,
                           uint64_t offset, uint64_t bytes);
void flap_write_behind_give_back(flap_write_behind *behind, flap_write_block *block);
/* Until nothing of the target is under way. Returns its os_error. */
FLAP_CHECKED int flap_write_behind_wait(flap_write_behind *behind, const flap_write_target *target);
/* What is queued of it is dropped; what is being written is waited for. */
void flap_write_behind_drop(flap_write_behind *behind, flap_write_target *target);

/* Writes at once, on the calling thread, all of it. Some file systems take O_DIRECT and then refuse every transfer,
 * some disks have larger blocks, and a write may end amid one: then the target is without O_DIRECT from there on.
 * Returns 0 or errno. */
FLAP_CHECKED int flap_write_target_write(flap_write_target *target, const void *data, uint64_t bytes, uint64_t offset);
/* Turns O_DIRECT on or off; false with errno. */
bool flap_write_target_set_direct(flap_write_target *target, bool direct);

#ifdef __cplusplus
}
#endif
#endif
