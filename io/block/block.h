/* Asynchronous block storage: one linear space of bytes over one or several preallocated extent files.
 *
 * Role: moves aligned runs of bytes between registered host memory and disks. It does not know what the bytes are.
 * Backends: io_uring; a pool of threads with pread/pwrite, used where io_uring is refused; and a simulated
 * disk, with bytes and seeded faults (for tests) or without bytes on a virtual clock (for planning).
 *
 * Threading: submit and poll may be called from any thread, one call at a time each (the pager's lock gives
 * that). Completion happens on threads of the backend, which then call config.notify; on the virtual clock
 * they happen inside flap_clock_advance. A completion never raises: it stores its result in the request,
 * and whoever polls decides.
 */
#ifndef FLAP_IO_BLOCK_BLOCK_H
#define FLAP_IO_BLOCK_BLOCK_H

#include "base/clock.h"
#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_BLOCK_ALIGN 4096u /* of offsets, sizes and buffers: what O_DIRECT wants */
#define FLAP_BLOCK_DISKS_MAX 16u
#define FLAP_BLOCK_FILES_MAX 4u                  /* beside the linear space */
#define FLAP_BLOCK_TRIAL_FILE "flap-extents.tmp" /* of flap_block_can_link, for a moment */
#define FLAP_BLOCK_REQUEST_BYTES_MAX (4u << 20)  /* one request; larger runs are the caller's to split */

typedef enum flap_block_backend {
  FLAP_BLOCK_AUTO, /* io_uring, or threads where the system refuses it (said once in the log) */
  FLAP_BLOCK_URING,
  FLAP_BLOCK_THREADS,
  FLAP_BLOCK_SIM
} flap_block_backend;

typedef enum flap_block_op { FLAP_BLOCK_READ, FLAP_BLOCK_WRITE } flap_block_op;

/* One `disk` entry. */
typedef struct flap_block_disk {
  const char *path; /* an existing folder; the extent file is made in it and unlinked at once, so that nothing
                       is left behind whatever happens */
  uint64_t bytes;   /* how much of it may be used; a multiple of stripe_bytes */
  uint64_t weight;  /* how much it can do beside the others, in any unit; 0 for any of them: sizes count instead */
} flap_block_disk;

/* A simulated disk. With `clock` it has no bytes: requests complete at virtual times and buffers are never
 * touched (they may be NULL); the rates are those of all disks together. Without, it keeps its bytes in memory and
 * completes requests on a thread, out of order. Paths of disks are only names here, and may be NULL. */
typedef struct flap_block_sim {
  flap_clock *clock;
  double read_bytes_per_second, write_bytes_per_second; /* with clock: each lane is first come, first served */
  double both_bytes_per_second; /* with clock: of both lanes together while both are busy; 0: they do not slow each
                                   other */
  uint64_t latency_ns;          /* per request; without clock: maximum of a seeded draw */
  uint64_t seed;
  /* Faults, without clock. The countdowns fire once, at the n-th read or the n-th write (1 is the first); 0 is never.
   */
  uint64_t fail_read_at, fail_write_at; /* EIO */
  uint64_t full_write_at;               /* ENOSPC */
  uint64_t corrupt_read_at;             /* one bit flipped, reported as success; what is stored stays right */
  uint64_t corrupt_write_at;            /* one bit of what is stored flipped, reported as success */
  uint64_t lose_write_at;               /* reported as success, never stored: the page stays stale */
  double split_probability;             /* requests served in several short pieces, as short reads and writes */
} flap_block_sim;

typedef struct flap_block_config {
  flap_block_backend backend;
  uint32_t disk_count;
  flap_block_disk disks[FLAP_BLOCK_DISKS_MAX];
  uint64_t stripe_bytes; /* consecutive stripes go to the disks in turn, in proportion to their weights as far as their
                            sizes go; a multiple of FLAP_BLOCK_ALIGN. One disk: no matter */
  uint64_t bytes;        /* the linear space that is needed; at most the sum of the disks */
  uint32_t requests_max; /* submitted and not yet polled; more is a mistake of the caller's and asserts */
  uint32_t read_depth, write_depth; /* of each disk, in flight at the system; 0: the backend's default (16) */
  void *memory;                     /* every buffer lies in here; registered with the system */
  uint64_t memory_bytes;
  void (*notify)(void *context); /* after a completion became pollable; any thread; must not block for long */
  void *notify_context;
  flap_block_sim sim;
} flap_block_config;

/* A request: the caller owns it and its buffer, and leaves both alone from submit until poll returns it. */
typedef struct flap_block_request {
  /* by the caller */
  flap_block_op op;
  uint32_t file;   /* 0: the linear space; else one that flap_block_file_open made */
  uint64_t offset; /* in it; aligned */
  void *buffer;    /* in config.memory; aligned */
  uint32_t bytes;  /* 0 < bytes <= FLAP_BLOCK_REQUEST_BYTES_MAX; aligned */
  void *user;
  /* by the backend: FLAP_OK means that every byte was transferred */
  flap_status status;
  int os_error;                  /* errno of a failure, 0 if none */
  uint32_t disk;                 /* the disk that failed */
  uint64_t started_ns, ended_ns; /* when the system (or the simulated lane) took it, and when it was through;
                                    flap_units_now_ns, or virtual time */
  /* the backend's own */
  struct flap_block_request *next;
  uint32_t pieces_left;
  uint64_t private_state[4];
} flap_block_request;

typedef struct flap_block flap_block;

/* Host bytes that open takes for its queues; the same that open will take. Not counted: the registered memory, the
 * stacks of threads, and the bytes of a simulated disk. 0 for a configuration that open would refuse. */
uint64_t flap_block_measure(const flap_block_config *config);

/* How many of config->bytes each disk will hold, to a few stripes. Uses disks, stripe_bytes and bytes alone, which
 * open would accept. */
void flap_block_share(const flap_block_config *config, uint64_t bytes_out[FLAP_BLOCK_DISKS_MAX]);

/* For a plan: says in the log what open would say, if the system lets less than memory_bytes be registered. Uses
 * backend and memory_bytes alone, and takes a few MiB, for a moment. One thread at a time. */
void flap_block_check_memory(const flap_block_config *config);

/* Creates, preallocates and registers. Errors name the disk's path: no such folder, not writable, too full
 * (with what is free), and say what to do. Nothing stays behind after a failure. */
FLAP_CHECKED flap_status flap_block_open(const flap_block_config *config, flap_block **block_out);

/* Hands a request over; never blocks, never fails: bad luck arrives with the completion. */
void flap_block_submit(flap_block *block, flap_block_request *request);
/* Pushes submitted requests to the system; call once after a batch of submits. */
void flap_block_flush(flap_block *block);
/* A completed request, or NULL. */
flap_block_request *flap_block_poll(flap_block *block);

/* Fills the error record from a failed request: disk path, offset, what the system said, what to do. */
flap_status flap_block_explain(const flap_block *block, const flap_block_request *request);

/* The path of the disk that holds the byte at `offset` of the linear space, and its place in the extent file there. */
const char *flap_block_locate(const flap_block *block, uint64_t offset, uint64_t *place_out);

/* What is in use: "io_uring, O_DIRECT", "threads, O_DIRECT", "threads, buffered", "sim". */
const char *flap_block_describe(const flap_block *block);

/* ---- files beside the linear space, which may get a name ------------------------------------------------- */

/* Whether files of `folder` can be written as part of the disk `path`, and named later: both are on one file system,
 * which knows files without a name. It makes one and names it, for a moment, so `folder` has one user; what an earlier
 * process left there of that is removed. */
bool flap_block_can_link(const char *path, const char *folder);
/* File `file` (1 to FLAP_BLOCK_FILES_MAX), which is closed: `bytes`, reserved, without a name, in `folder`. For one
 * disk that has files, and is on the same drive: its lanes serve both. FLAP_NO_SPACE and others name the folder, which
 * is the same for all, and stays. From any thread, with no request for this file under way, as the next two. */
FLAP_CHECKED flap_status flap_block_file_open(flap_block *block, uint32_t file, const char *folder, uint64_t bytes);
/* Whether what is read of it comes from the drive, not from the system's cache. Of one that is open. */
bool flap_block_file_is_direct(const flap_block *block, uint32_t file);
/* Makes what was written to it durable, and gives it, unless all names that it had were removed, the name `path`, which
 * lasts with the fsync of its folder. */
FLAP_CHECKED flap_status flap_block_file_link(flap_block *block, uint32_t file, const char *path);
/* Its space is free unless it has a name. Fine for one that is closed. */
void flap_block_file_close(flap_block *block, uint32_t file);

/* Waits for what is in flight, closes, and gives the space back. NULL is fine. */
void flap_block_close(flap_block *block);

/* Bytes free to this user on the file system of `path`, and whether the folder can be written. */
FLAP_CHECKED flap_status flap_block_space(const char *path, uint64_t *free_bytes_out);

#ifdef __cplusplus
}
#endif
#endif
