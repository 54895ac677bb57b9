/* What the files of the pager share; private to this folder and its tests.
 *
 * The words. A slot is a place in VRAM that holds one lease's region. A buffer is a piece of pinned RAM between disk
 * and VRAM, and a buffer carries one disk request at a time. A copy lane is one of the device's two copy streams with a
 * bounded window of copies under way. A chunk is a run of adjacent pages that moves as one transfer.
 *
 * Everything here is called with pager->lock held, except where a comment says otherwise. With a clock there is one
 * thread, and the lock is not taken.
 */
#ifndef FLAP_PAGER_PAGER_INTERNAL_H
#define FLAP_PAGER_PAGER_INTERNAL_H

#include "base/assert.h"
#include "base/units.h"
#include "pager/pager.h"

#include <pthread.h>

#define PAGER_NONE UINT32_MAX
#define PAGER_PROGRAMS_MAX 2u
/* Copies under way on a lane, and their bytes, of which the last copy may be beyond: enough to keep it busy, few enough
 * that what is needed first does not stand behind what is needed later. */
#define PAGER_WINDOW 16u
#define PAGER_WINDOW_BYTES (64 * FLAP_MIB)
#define PAGER_LABELS 64u /* regions of the last copies on a lane, for the trace */
#define PAGER_MARKS 32u  /* events of a snapshot, spread over the changes of resident regions before its point */
#define PAGER_MESSAGE_BYTES 768u

/* ---- what is moved -------------------------------------------------------------------------------------- */

typedef enum pager_page_state {
  PAGE_IDLE,    /* nobody writes to its home */
  PAGE_COPYING, /* a D2H copy, or the callback of a fill, writes to its home or to its buffer */
  PAGE_WRITING  /* its buffer is full: checksum, then disk write */
} pager_page_state;

#define PAGER_FILE_MASK 7u /* three bits */
_Static_assert(FLAP_BLOCK_FILES_MAX <= PAGER_FILE_MASK, "every number of a file is in a page's bits");

/* Per page of a streaming region. Whether there are bytes at all is the region's to know (`holds`). */
typedef struct pager_page {
  uint64_t checksum;     /* of what the disk holds, seeded with region, page and epoch; disk pages only */
  uint32_t epoch;        /* writings so far */
  uint32_t extent;       /* where on the disk, in units of FLAP_BLOCK_ALIGN; PAGER_NONE for a page in RAM */
  uint32_t stored_bytes; /* how long it is there; shorter than the page if it is encoded */
  uint16_t stores_left;  /* released leases whose bytes of this page are not home yet */
  uint8_t state;         /* pager_page_state */
  uint8_t file : 3;      /* in which extent is: 0, the linear space, or one of those that can be shared */
  bool compared : 1;     /* what is there has been read since it was written, and was right */
  bool kept_unread : 1;  /* it was kept, and has not been */
} pager_page;

typedef struct pager_region {
  uint64_t bytes;
  unsigned char *home; /* the RAM pages; of a resident region: its place in VRAM */
  uint32_t ring;       /* or FLAP_PAGER_RESIDENT, FLAP_PAGER_HOST */
  uint32_t page_count, ram_pages;
  uint32_t first_page;       /* in the page table */
  uint32_t changes_queued;   /* leases that change it, as of the last begin (wraps) */
  uint32_t changes_released; /* those of them that were unpinned (wraps) */
  uint32_t changes_started;  /* by jobs that were started and are not done */
  uint32_t loading;          /* H2D copies out of its home that are under way */
  uint64_t wanted;           /* the order of a lease that waits for its pages to come home; UINT64_MAX for none */
  uint64_t passed;           /* of the first lease that reading ahead came to before its bytes were home; likewise */
  uint32_t kept_change;      /* changes at the point of the snapshot (wraps) */
  uint8_t mark;              /* of the snapshot, behind its last change; known once it is reached; residents only */
  uint32_t loan;             /* of a resident that lends */
  uint16_t overlay;          /* of a region with RAM pages that share their place; else 0 */
  uint8_t side;
  uint8_t klass, element_bytes;
  bool poolable;    /* may stand in the pool: fixed, and no bit beside others, for workers read it without the lock */
  uint8_t file;     /* that its pages are written to: of one that is shared the file of now; else 0 */
  bool hurried : 1; /* a load that has its slot waits for the disk to have written its pages */
  bool holds : 1;   /* after all of the unpinned leases, there are bytes */
  bool pinned : 1;
  bool in_snapshots : 1;
  bool shared : 1;
  bool lends : 1;
  bool kept : 1;       /* of the open snapshot, and not drained yet */
  bool kept_holds : 1; /* there are bytes at the point; known once it is reached */
} pager_region;

/* By side. */
typedef struct pager_overlay {
  uint32_t held[2];    /* regions that hold something */
  uint32_t storing[2]; /* leases that were unpinned and whose bytes are not all home */
} pager_overlay;

/* ---- where it is moved ---------------------------------------------------------------------------------- */

typedef enum pager_slot_state {
  SLOT_FREE,
  SLOT_LOADING, /* copies are still to be enqueued */
  SLOT_LOADED,  /* all enqueued, and load_event recorded behind them; or nothing to load */
  SLOT_PINNED,
  SLOT_RELEASED, /* unpinned; the compute stream may still use it */
  SLOT_STORING   /* its bytes go home */
} pager_slot_state;

typedef struct pager_slot {
  unsigned char *memory;
  uint64_t order; /* of the lease, counted over all programs: smaller is needed earlier */
  uint32_t ring;
  uint32_t region;
  uint32_t change;             /* the region's changes that must be released before the load starts */
  uint32_t ram_next;           /* the next RAM page to enqueue, in either direction */
  uint32_t disk_next;          /* the next disk page to ask for, in either direction */
  uint32_t pages_left;         /* of a load: pages whose H2D copy is not enqueued */
  uint32_t copies_left;        /* enqueued and not retired */
  uint32_t ready;              /* verified buffers that wait for their H2D copy: head of a list */
  uint32_t previous, next;     /* in the one list that it is on */
  uint32_t lease;              /* in pager->leases, until it is unpinned */
  uint32_t loan;               /* whose memory it is; or PAGER_NONE: its own */
  bool wants_disk, wants_lane; /* while it loads: of its pages some are to be asked for; some are there to be copied */
  bool keeps; /* of a ring that keeps, and it was loaded: in this program, its bytes are those after `change` changes */
  uint8_t state; /* pager_slot_state */
  uint8_t mode;  /* flap_lease_mode */
} pager_slot;

typedef struct pager_list {
  uint32_t head, tail, count;
} pager_list;

typedef struct pager_ring {
  const char *name;
  uint64_t slot_bytes;
  uint32_t slots, first_slot; /* its own; borrowed ones follow */
  uint32_t borrowed;
  bool keeps;
  pager_list free;
  uint32_t pinned;
  uint32_t queue_head, queue_tail; /* leases without a slot, in program order: indexes into pager->leases */
} pager_ring;

typedef enum pager_loan_state {
  LOAN_OPEN,  /* the resident holds nothing, and nobody uses it */
  LOAN_USED,  /* it holds nothing; the compute stream may still use it */
  LOAN_CLOSED /* it holds something, or is pinned */
} pager_loan_state;

/* A resident that lends its memory to slots. */
typedef struct pager_loan {
  uint32_t region;
  uint32_t first_slot, slots;      /* within it */
  pager_list free;                 /* of these */
  uint32_t queue_head, queue_tail; /* its leases that are not pinned yet, in program order */
  uint32_t previous, next;         /* in the one list that it is on */
  uint8_t state;                   /* pager_loan_state */
} pager_loan;

typedef enum pager_lease_state { LEASE_QUEUED, LEASE_PINNED, LEASE_RELEASED } pager_lease_state;

typedef struct pager_lease {
  uint32_t slot; /* or PAGER_NONE */
  uint32_t next_in_ring;
  uint32_t change;    /* as in the slot */
  uint32_t disk_next; /* read ahead, before there is a slot: as in the slot, which takes it over */
  uint32_t ready;     /* likewise */
  uint16_t asked;     /* read buffers that are at the disk for it, or not verified yet */
  uint8_t state;      /* pager_lease_state */
} pager_lease;

typedef struct pager_program {
  const flap_lease *leases;
  uint64_t first_order;
  uint32_t count, pinned, released;
  uint32_t in_jobs;     /* pinned, not released, and a job's */
  uint32_t first_lease; /* in pager->leases */
} pager_program;

/* ---- how it is moved ------------------------------------------------------------------------------------ */

typedef enum pager_buffer_state {
  BUFFER_FREE,
  BUFFER_READING,  /* read buffers: at the disk */
  BUFFER_READ,     /* to be verified */
  BUFFER_VERIFIED, /* waits for its H2D copy, or for the drain that asked for it */
  BUFFER_LOADING,  /* its H2D copy is under way */
  BUFFER_STORING,  /* write buffers: a D2H copy or a fill puts bytes in */
  BUFFER_FULL,     /* to be summed up */
  BUFFER_PACKED,   /* waits for its turn at the disk */
  BUFFER_WRITING   /* at the disk */
} pager_buffer_state;

typedef struct pager_buffer {
  flap_block_request request;
  unsigned char *memory;
  uint64_t order;                          /* of the lease; 0 at rest */
  uint32_t region, first_page, page_count; /* the chunk that it carries */
  uint32_t lease;                          /* that it is read for; or PAGER_NONE: at rest, or a write buffer */
  uint32_t next;                           /* in the one list of buffers that it is in */
  uint8_t state;                           /* pager_buffer_state */
  bool at_rest;                            /* fill or drain: not counted */
  bool again;                              /* read for the second time: what came first was not what was written */
  bool ahead;                              /* its lease had no slot when the disk was asked; until the disk answers */
  bool pooled; /* its chunk is in the pool; of a full one: shall be, and once it was packed: is */
  /* Of whoever works on it, while it is read or full: */
  uint32_t corrupt_page; /* of a read buffer, the first page that is not what was written; or page_count */
} pager_buffer;

/* RAM where chunks stand encoded instead of on disk, in blocks. See packed_pool.c. */
typedef struct pager_pool {
  unsigned char *memory;
  uint32_t *next;  /* by block: the next one of the same chunk, or the next free one */
  uint32_t *heads; /* by page: the first block of the chunk that begins there; PAGER_NONE: it stands on disk */
  uint32_t block_count;
  uint64_t eligible_bytes; /* on disk, of all regions that may stand here */
  /* Under work_lock, as `next` of free blocks; in a simulation the pump's. `next` of a chunk's blocks, and its head,
   * are of whoever has its full buffer, and stay while its pages are idle. */
  uint32_t free_head, free_count;
  double share;  /* of a chunk's bytes, what it comes to: lately */
  double credit; /* of the next chunk, towards standing here */
} pager_pool;

/* Buffers in a row, linked by `next`: in the order in which they came. */
typedef struct pager_queue {
  uint32_t head, tail;
} pager_queue;

/* Buffers of which the one that is needed first comes first: a binary heap by `order`. */
typedef struct pager_heap {
  uint32_t *of;
  uint32_t count;
} pager_heap;

/* A job of the host, from its handing over to its end. */
typedef struct pager_job {
  flap_pager_job job;
  uint32_t first_lease, count; /* in pager->leases */
  uint32_t program;            /* in pager->programs */
  uint64_t started_ns, ended_ns;
} pager_job;

/* A page and what the codec needs beside; NULL where nothing is compressed. */
typedef struct pager_scratch {
  unsigned char *page;
  void *codec;
} pager_scratch;

/* A thread that works on the bytes of buffers. */
typedef struct pager_worker {
  flap_pager *pager;
  pthread_t thread;
  pager_scratch scratch;
} pager_worker;

/* How the pages of a full buffer are stored: as they are; as they are, but one is encoded to see how that would be;
 * encoded, where they shrink. */
typedef enum pager_packing { PACKING_PLAIN, PACKING_LOOK, PACKING_ENCODED } pager_packing;

/* What came of it: bytes of pages that were encoded, what they came to, and how long a thread took. */
typedef struct pager_packed {
  uint64_t tried_bytes, made_bytes, decoded_bytes;
  double encode_ns, decode_ns;
} pager_packed;

/* What `auto` knows of a class, under work_lock. Times are those of a byte of a page; 0: not known yet. */
typedef struct pager_class {
  double share; /* of its bytes, what they are encoded */
  double encode_ns, decode_ns;
  uint32_t plain_count; /* buffers since it went off */
  bool on;
} pager_class;

typedef struct pager_copy {
  uint32_t slot;   /* or PAGER_NONE: at rest */
  uint32_t buffer; /* or PAGER_NONE: from or to a RAM home */
  uint32_t region, first_page, page_count;
  uint64_t bytes;
} pager_copy;

typedef struct pager_lane {
  flap_stream stream;
  flap_lane lane;
  flap_event first_event;
  pager_copy copies[PAGER_WINDOW]; /* copy n at n % PAGER_WINDOW */
  uint64_t issued, retired;
  uint64_t bytes;                /* of those under way */
  uint32_t labels[PAGER_LABELS]; /* region of copy n at n % PAGER_LABELS: written here, read by the copying thread */
  uint64_t traced;               /* the copying thread's own */
} pager_lane;

/* What the engine thread waits for, so that whoever pumps knows when to wake it and whom to charge. */
typedef bool (*pager_ready_fn)(flap_pager *pager, uint32_t argument);
typedef struct pager_wait {
  pager_ready_fn ready; /* NULL: nobody waits */
  uint32_t argument;
  bool is_pin;    /* then argument is a lease, and the time is charged */
  bool sleeping;  /* the thread is in pthread_cond_wait */
  flap_lane lane; /* charged since since_ns; FLAP_LANE_COUNT for none */
  uint64_t since_ns;
} pager_wait;

/* The snapshot, and the drain in progress of one of its regions. */
typedef struct pager_snapshot {
  bool open, cut_off;
  uint32_t changes;     /* of resident regions, that were still to come when it was opened */
  uint32_t changed;     /* of these, unpinned */
  uint32_t marked;      /* the last mark whose event is recorded; of mark 0, before all changes, it is at once */
  uint32_t region;      /* that is drained and read ahead; PAGER_NONE */
  uint32_t next, count; /* pieces of it that pass through buffers: the next one to ask for; all */
} pager_snapshot;

struct flap_pager {
  /* fixed at open */
  uint64_t page_bytes, transfer_bytes;
  uint32_t pages_per_transfer, pages_per_copy;
  uint32_t region_count, ring_count, slot_count, loan_count, page_count, leases_max;
  uint32_t read_buffers, write_buffers, worker_count; /* 0 when nothing is on disk */
  uint32_t snapshot_buffers, buffer_count;            /* all of them */
  uint64_t bounce_bytes, snapshot_bytes;              /* of a buffer for fill and drain, and of one of snapshots */
  flap_pager_sizes sizes;
  pager_region *regions;
  pager_overlay *overlays; /* overlay n at n - 1 */
  uint32_t overlay_count;
  pager_page *pages;
  pager_ring *rings;
  pager_slot *slots;
  pager_loan *loans;
  pager_buffer *buffers; /* the read buffers, the write buffers, then those of snapshots */
  pager_lease *leases;   /* leases_max for each of two programs */
  pager_worker *workers; /* at least one, for its scratch memory */
  bool compresses, always_compresses, shared_cores;
  flap_codec codec; /* where it compresses */
  flap_duplex disk_rates;
  pager_pool pool;
  double encode_bytes, decode_bytes; /* as configured, */
  double disk_share;                 /* likewise; 1 where nothing is compressed */
  uint64_t coding_until_ns;          /* on the clock: when the codec is done with what it was given */
  pager_queue coding;                /* what that is */
  uint32_t coding_count;
  pager_job *jobs;    /* job n at n % jobs_room */
  uint32_t jobs_room; /* for those of two programs */
  unsigned char *staging;
  unsigned char *bounce; /* for fill and drain of resident regions */
  flap_device *device;
  flap_block *block; /* NULL when nothing is on disk */
  flap_clock *clock; /* NULL: real time, with a transfer thread */
  bool counts_no_stalls;
  flap_pager_trace_fn trace;
  void (*trace_compute)(void *context, uint64_t label, uint64_t started_ns, uint64_t ended_ns);
  void *trace_context;
  void *owned_table; /* what open took itself, because the arena only measured */
  uint32_t read_depth, write_depth;
  uint32_t ahead_max, behind_max; /* requests at the disk that nobody waits for: reads, writes */
  const char *shared_folder;      /* of the files below; NULL: nothing is shared */
  uint32_t next_file;             /* that flap_pager_keep turns regions to; 0: none. Of the thread that keeps */
  bool files_open[FLAP_BLOCK_FILES_MAX + 1]; /* by number; 0 stays free. Likewise */
  bool files_direct;                         /* flap_block_file_is_direct, of all */
  uint64_t disk_latency_ns;                  /* of a simulated disk: part of a request's time, but not of its lane's */
  bool has_bytes;

  /* under lock */
  pthread_mutex_t lock;
  pthread_cond_t engine_wake, drain_wake, let_in;
  _Atomic uint32_t wanted;     /* calls of other threads that want the lock: the pump lets them in */
  pager_wait wait, drain_wait; /* the engine thread's; that of whoever drains a snapshot */
  pager_snapshot snapshot;
  uint64_t kept_unread; /* pages that were kept and had not been read since they were written, less those read since */
  pager_program programs[PAGER_PROGRAMS_MAX];
  uint32_t program_first, program_count;
  uint64_t order_next;
  uint64_t ahead;                  /* the first lease, counted as orders are, that reading ahead has not looked at */
  pager_list loading;              /* by order */
  uint32_t wants_disk, wants_lane; /* of the slots that are loading, those that do */
  pager_list released;             /* by unpin */
  uint32_t storing_ram;            /* of the slots that are storing, have pages of RAM left */
  pager_list storing;              /* by unpin */
  pager_list used;                 /* of loans, by unpin */
  pager_list offered;              /* of loans, by when they are needed: the last one first */
  uint64_t lender_order;           /* of the lease that waits for a resident to be given back; UINT64_MAX for none */
  uint32_t read_free, write_free;
  uint32_t free_heads[2];      /* of the lists of free buffers: read, write */
  uint32_t reading, writing;   /* buffers at the disk, those of snapshots too */
  uint32_t reading_ahead;      /* of these */
  pager_queue hurried, behind; /* packed write buffers: those of regions that are hurried, and the others */
  pager_queue at_rest;         /* read buffers of a drain at rest, in the order of the pages */
  pager_heap checks;           /* read and full buffers that the pump looks at itself */
  pager_lane h2d, d2h;
  bool submitted; /* requests since the last flush */
  uint64_t jobs_queued, jobs_done;
  flap_status error;
  char message[PAGER_MESSAGE_BYTES];
  flap_pager_stats stats;
  uint64_t disk_ns[2];    /* sums of request times: read, write */
  uint64_t at_rest_ns[2]; /* copy time of fill and drain: H2D, D2H */

  /* The thread of jobs: a lock of its own, under which nothing is called. */
  pthread_mutex_t job_lock;
  pthread_cond_t job_wake; /* jobs_started grew, or job_stop */
  uint64_t jobs_started;   /* under job_lock; written by the pump alone */
  bool job_stop;
  _Atomic uint64_t jobs_ran; /* of those started; the thread's, or the clock's */
  pthread_t job_thread;
  bool job_thread_started;

  /* The workers: a lock of its own, under which nothing is called. */
  pthread_mutex_t work_lock;
  pthread_cond_t work_wake; /* a buffer waits, or work_stop */
  pager_heap works;         /* buffers that wait for a worker */
  uint32_t worked_count;    /* buffers that workers are done with: at the other end of works.of, the last one first */
  _Atomic uint64_t works_done; /* by workers; grows under work_lock */
  uint64_t works_collected;    /* the pump's own */
  bool work_stop;
  pager_class classes[FLAP_PAGER_CLASSES_MAX];
  _Atomic bool disks_are_waited_for;     /* leases wait for them: as of the last look at stall times */
  uint64_t watched_ns, watched_stall_ns; /* when that was; the pump's own */
  uint32_t workers_started;

  /* The bell of the transfer thread: a lock of its own, under which nothing is called, because it is rung from inside
   * the device and the block files. */
  pthread_mutex_t bell_lock;
  pthread_cond_t bell;
  bool rung, stop; /* with clock: rung since the last pump began, by its one thread */
  pthread_t thread;
  bool thread_started;
  bool pump_scheduled; /* with clock: a pump is among its events */
  bool inside;         /* with clock: what holding the lock is without one */
  bool closing;
};

/* ---- page_table.c: sizes, homes, extents ----------------------------------------------------------------- */

/* Takes all tables from `arena` and fills them; with an arena that measures, only counts. */
void pager_lay_out(flap_pager *pager, const flap_pager_config *config, flap_arena *arena);
/* Tells homes, slots and buffers where they are. */
void pager_place(flap_pager *pager, unsigned char *homes, unsigned char *staging, unsigned char *vram);
uint32_t pager_events(const flap_pager *pager);

uint64_t pager_chunk_bytes(const flap_pager *pager, const pager_region *region, uint32_t first_page, uint32_t count);
/* The pages from first_page on that move together: at most transfer_bytes, all in RAM or all adjacent on disk. */
uint32_t pager_chunk_pages(const flap_pager *pager, const pager_region *region, uint32_t first_page);
/* The same for a copy between a slot and the region's pages in RAM: at most copy_bytes. */
uint32_t pager_copy_pages(const flap_pager *pager, const pager_region *region, uint32_t first_page);
static inline pager_page *pager_pages_of(const flap_pager *pager, const pager_region *region) {
  return pager->pages + region->first_page;
}
/* After all of the unpinned leases the region holds something, or nothing. Whoever makes it hold something finds its
 * overlay's other side empty. */
void pager_set_holds(flap_pager *pager, pager_region *region, bool holds);
/* A lease of the region was unpinned and has to be stored; or all its copies home are over. */
void pager_count_store(flap_pager *pager, const pager_region *region, bool begins);
/* Bytes of a region on disk. */
uint64_t pager_disk_bytes(uint64_t page_bytes, uint64_t bytes, uint32_t ram_pages);

/* ---- rings.c ------------------------------------------------------------------------------------------- */

/* Gives free slots to the next leases of each ring. */
bool pager_rings_assign(flap_pager *pager);
/* Slots whose last use is over are stored, or free. */
bool pager_rings_release(flap_pager *pager);
/* The program of a lease in pager->leases, and its number there. Asked for all the time, so nothing is divided. */
static inline const pager_program *pager_program_of(const flap_pager *pager, uint32_t lease, uint32_t *number_out) {
  _Static_assert(PAGER_PROGRAMS_MAX == 2, "a lease is of the first or of the second");
  const uint32_t place = lease < pager->leases_max ? 0 : 1;
  *number_out = lease - place * pager->leases_max;
  return &pager->programs[place];
}
/* UINT64_MAX for PAGER_NONE. */
static inline uint64_t pager_order_of(const flap_pager *pager, uint32_t lease) {
  if (lease == PAGER_NONE)
    return UINT64_MAX;
  uint32_t number;
  const pager_program *program = pager_program_of(pager, lease, &number);
  return program->first_order + number;
}
/* The order of the next lease that is to get a slot of the ring; UINT64_MAX for none. */
uint64_t pager_rings_next_order(const flap_pager *pager, uint32_t ring);
/* A stored slot is free once its last copy is over. */
void pager_rings_stored(flap_pager *pager, uint32_t slot);
/* The slot that the ring's next lease may have by now; PAGER_NONE for none, or no lease. */
uint32_t pager_rings_next_slot(const flap_pager *pager, uint32_t ring);

/* ---- loans.c: residents whose memory others use meanwhile ---------------------------------------------- */

/* The resident's next lease, in program order. */
void pager_loan_queue(flap_pager *pager, uint32_t loan, uint32_t lease);
/* Of the borrowed slots that are free one for a lease of this order, in the resident that is needed last; PAGER_NONE
 * for none. */
uint32_t pager_loan_slot(const flap_pager *pager, uint64_t order);
/* A slot within is taken, or free again. */
void pager_loan_take(flap_pager *pager, uint32_t slot);
void pager_loan_give_back(flap_pager *pager, uint32_t slot);
/* Its lease is pinned, with nothing lent; unpinned; or what it holds was filled or emptied at rest. */
void pager_loan_pinned(flap_pager *pager, uint32_t loan);
void pager_loan_unpinned(flap_pager *pager, uint32_t loan);
void pager_loan_at_rest(flap_pager *pager, uint32_t loan);
/* It lends, from the start on; or its last use is over, of any. */
void pager_loan_open(flap_pager *pager, uint32_t loan);
bool pager_loans_open(flap_pager *pager);
bool pager_loan_is_lent(const flap_pager *pager, uint32_t loan);
/* Whether any lease of the ring that borrows is pinned. */
bool pager_loan_is_pinned(const flap_pager *pager, uint32_t loan);
static inline flap_event pager_load_event(uint32_t slot) {
  return 2 * slot;
}
static inline flap_event pager_use_event(uint32_t slot) {
  return 2 * slot + 1;
}
static inline bool pager_loads(flap_lease_mode mode) {
  return mode == FLAP_LEASE_READ || mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CONSUME;
}
static inline bool pager_stores(flap_lease_mode mode) {
  return mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CREATE;
}

/* Bytes of memory that a job's lease reads and writes. */
static inline uint64_t pager_job_bytes(const flap_lease *lease) {
  return (pager_loads(lease->mode) ? lease->host_bytes : 0) + (pager_stores(lease->mode) ? lease->host_bytes : 0);
}

void pager_list_init(pager_list *list);
void pager_list_append(flap_pager *pager, pager_list *list, uint32_t slot);
void pager_list_insert_by_order(flap_pager *pager, pager_list *list, uint32_t slot);
void pager_list_remove(flap_pager *pager, pager_list *list, uint32_t slot);

/* ---- lanes.c: copies under way ------------------------------------------------------------------------- */

bool pager_lane_has_room(const pager_lane *lane);
void pager_lane_copy(flap_pager *pager, pager_lane *lane, void *to, const void *from, const pager_copy *copy);
bool pager_lane_retire(flap_pager *pager, pager_lane *lane);
void pager_lane_traced(void *context, flap_stream stream, uint64_t started_ns, uint64_t ended_ns, uint64_t bytes);

/* ---- loads.c, stores.c --------------------------------------------------------------------------------- */

bool pager_loads_issue(flap_pager *pager);
/* What the slot wants may have changed. */
void pager_loads_look(flap_pager *pager, uint32_t slot);
/* Reads from disk for leases that have no slot yet, into buffers that nobody with a slot wants. */
bool pager_loads_read_ahead(flap_pager *pager);
/* Bytes of the region are home that were not: reading ahead may have passed a lease of it. */
void pager_loads_came_home(flap_pager *pager, pager_region *region);
/* The lease has a slot now: what was read ahead for it is the slot's. */
void pager_loads_hand_over(flap_pager *pager, uint32_t lease, uint32_t slot);
void pager_loads_verified(flap_pager *pager, uint32_t buffer);
bool pager_stores_issue(flap_pager *pager);
/* A D2H copy is over. */
void pager_stores_copied(flap_pager *pager, const pager_copy *copy);
void pager_stores_written(flap_pager *pager, uint32_t buffer);

/* ---- staging.c: buffers and disk requests --------------------------------------------------------------- */

void pager_queue_init(pager_queue *queue);
void pager_queue_append(flap_pager *pager, pager_queue *queue, uint32_t buffer);
/* The first one, or PAGER_NONE. */
uint32_t pager_queue_take(flap_pager *pager, pager_queue *queue);
void pager_heap_add(const flap_pager *pager, pager_heap *heap, uint32_t buffer);
/* The one that is needed first, or PAGER_NONE. */
uint32_t pager_heap_take(const flap_pager *pager, pager_heap *heap);

/* A free buffer for a chunk; there is one. */
uint32_t pager_buffer_take(flap_pager *pager, bool write, uint32_t region, uint32_t first_page, uint32_t page_count);
void pager_buffer_free(flap_pager *pager, uint32_t buffer);
void pager_buffer_read(flap_pager *pager, uint32_t buffer);
/* Its bytes are what the page table says by now. It is written at its turn. */
void pager_buffer_write(flap_pager *pager, uint32_t buffer);
/* Asks the disk for writes: all that somebody waits for, and of the others as many as it takes at a time. */
bool pager_writes_issue(flap_pager *pager);
/* A load waits for pages of this region, which are on their way to the disk. */
void pager_writes_hurry(flap_pager *pager, uint32_t region);
bool pager_disk_poll(flap_pager *pager);
static inline uint64_t pager_disk_offset(const pager_page *page) {
  return (uint64_t)page->extent * FLAP_BLOCK_ALIGN;
}

/* ---- snapshot.c: values that are kept while programs go on ----------------------------------------------- */

/* The region has one more change: a lease of it was unpinned, or a job is over. */
void pager_snapshot_changed(flap_pager *pager, pager_region *region);
/* A change of the region with so many before it must wait for the drain. */
static inline bool pager_is_kept_back(const pager_region *region, uint32_t change) {
  return region->kept && (int32_t)(change - region->kept_change) >= 0;
}
/* Asks for the next pieces of the region that is drained. */
bool pager_snapshot_issue(flap_pager *pager);
/* Without `extents` a drain, with it a keep. */
flap_status pager_snapshot_drain(flap_pager *pager, uint32_t region, flap_pager_drain_fn drain,
                                 flap_pager_extent_fn extent, void *context);
static inline bool pager_is_snapshot_buffer(const flap_pager *pager, uint32_t buffer) {
  return buffer >= pager->read_buffers + pager->write_buffers;
}
static inline flap_event pager_mark_event(const flap_pager *pager, uint32_t mark) {
  return 2 * pager->slot_count + mark;
}

/* ---- extents.c: extents that checkpoints share ------------------------------------------------------------- */

/* Says of all pages on disk where they stand. They are home, and stay so. */
flap_status pager_extents_tell(flap_pager *pager, uint32_t region, flap_pager_extent_fn extent, void *context);
/* What is written of the region from now on goes to the next file. Nothing of it is on its way. */
void pager_extents_turn(flap_pager *pager, pager_region *region);
/* The pages of a buffer were read, and are what was written. */
void pager_extents_compared(flap_pager *pager, const pager_buffer *buffer);
/* The file of the start. */
flap_status pager_extents_open(flap_pager *pager, const flap_pager_config *config);

/* ---- checks.c: what is done to the bytes of buffers, and by whom ----------------------------------------- */

/* A buffer is read or full: to the workers with it, or onto the pump's own heap. */
void pager_checks_add(flap_pager *pager, uint32_t buffer);
/* Takes buffers that workers are done with further; small ones are done here, one at a time, and the lock is given up
 * meanwhile. */
bool pager_checks_advance(flap_pager *pager);
/* So many bytes of a buffer the pump looks through itself; tests set it to 0. */
extern uint64_t pager_small_bytes;
flap_status pager_checks_open(flap_pager *pager);
/* Without the lock. What is under way is waited for; what waits is never done. */
void pager_checks_close(flap_pager *pager);

/* ---- compression.c: how pages stand on disk --------------------------------------------------------------- */

/* Whether anything may be compressed with this configuration. */
bool pager_compresses(const flap_pager_config *config);
/* Now and then, with the lock: whether leases wait for disks. */
void pager_compression_watch(flap_pager *pager);
/* These two with work_lock. */
pager_packing pager_compression_choose(flap_pager *pager, const pager_buffer *buffer);
void pager_compression_learn(flap_pager *pager, const pager_buffer *buffer, const pager_packed *packed);
/* On the clock: whether the disk moves fewer bytes of the buffer than it has. */
bool pager_shrinks_on_disk(const flap_pager *pager, const pager_buffer *buffer);
/* A page's encoding in scratch memory, and how long it is; its own length if there is none. And the way back, out of
 * scratch memory. Without any lock. */
uint32_t pager_encode(const flap_pager *pager, const pager_buffer *buffer, flap_codec codec, const unsigned char *from,
                      uint32_t bytes, const pager_scratch *scratch, pager_packed *packed);
bool pager_decode(const pager_scratch *scratch, uint32_t stored_bytes, unsigned char *to, uint32_t bytes,
                  pager_packed *packed);
/* Without any lock. Makes of a full buffer what is written, sums it up, and tells the page table. */
void pager_pack(flap_pager *pager, const pager_buffer *buffer, pager_packing packing, const pager_scratch *scratch,
                pager_packed *packed_out);
/* The way back. Returns the first page that is not what was written; page_count if there is none. */
uint32_t pager_unpack(const flap_pager *pager, const pager_buffer *buffer, const pager_scratch *scratch,
                      pager_packed *packed_out);

/* ---- packed_pool.c: chunks that stand encoded in RAM ------------------------------------------------------------- */

/* All blocks are free, and nothing stands there. Regions are laid out. */
void pager_pool_init(flap_pager *pager);
/* Whether the buffer's chunk stands there. It is home. */
bool pager_pool_has(const flap_pager *pager, const pager_buffer *buffer);
/* Whether the chunk of a full buffer shall stand there: asked once for each. With work_lock, but in a simulation. */
bool pager_pool_wants(flap_pager *pager, const pager_buffer *buffer);
/* These three take work_lock, and callers hold none. Encodes a full buffer into the pool, in place of what that had of
 * the chunk. False when there is no room, or it does not shrink: then the buffer is as it was, and to be packed for the
 * disk. */
bool pager_pool_pack(flap_pager *pager, pager_buffer *buffer, const pager_scratch *scratch, pager_packed *packed_out);
/* The way back, as pager_unpack. */
uint32_t pager_pool_unpack(const flap_pager *pager, const pager_buffer *buffer, const pager_scratch *scratch,
                           pager_packed *packed_out);
/* The chunk goes to the disk: the pool has nothing of it any more. */
void pager_pool_forget(flap_pager *pager, const pager_buffer *buffer);
/* Counts what moved between a buffer and the pool. */
void pager_pool_moved(flap_pager *pager, const pager_buffer *buffer, flap_lane lane);
/* On the clock: the codec takes its time with the buffer, if that is the pool's or shrinks on disk, and hands it to the
 * pump then. */
bool pager_codec_simulate(flap_pager *pager, uint32_t index);

/* ---- jobs.c: work of the host's cores ------------------------------------------------------------------- */

/* Lets jobs run, in their order, whose regions are home and read by no copy. */
bool pager_jobs_start(flap_pager *pager);
/* Looks after those that have run. */
bool pager_jobs_collect(flap_pager *pager);
flap_status pager_jobs_open(flap_pager *pager);
/* Without the lock. The job that runs is waited for; those behind it never run. */
void pager_jobs_close(flap_pager *pager);

/* ---- transfer.c: who pumps, who waits ------------------------------------------------------------------ */

/* Advances everything that can advance. One thread at a time: the transfer thread, or whoever holds the clock. */
void pager_pump(flap_pager *pager);
/* The lock, for those that pump; everybody leaves by the second. With a clock there is one thread, which would take it
 * millions of times: only that nobody is inside twice is looked after. */
static inline void pager_lock(flap_pager *pager) {
  if (pager->clock == NULL) {
    pthread_mutex_lock(&pager->lock);
    return;
  }
  flap_assert(!pager->inside);
  pager->inside = true;
}
static inline void pager_leave(flap_pager *pager) {
  if (pager->clock == NULL) {
    pthread_mutex_unlock(&pager->lock);
    return;
  }
  flap_assert(pager->inside);
  pager->inside = false;
}
/* Takes the lock on the engine thread, or on one that drains. The pump goes on for as long as anything moves, which
 * with both copy lanes busy may be for tens of milliseconds: behind each of these rounds it lets in whoever entered
 * here.
 */
void pager_enter(flap_pager *pager);
/* Something may have become possible. From any thread, with or without the lock. */
void pager_ring_bell(void *context);
/* Waits on the engine thread until ready(argument) or until the pager has failed. */
void pager_wait_until(flap_pager *pager, pager_ready_fn ready, uint32_t argument, bool is_pin);
/* The same on a thread that drains a snapshot. */
void pager_wait_to_drain(flap_pager *pager, pager_ready_fn ready, uint32_t argument);
/* Wakes who need not wait any more. Charges the time since the last look to the lane that the pin waits for. */
void pager_wait_look(flap_pager *pager);
uint64_t pager_now_ns(const flap_pager *pager);
/* Charges a lane with the time between the two in which compute rested: all of it where it runs on the engine thread.
 */
void pager_stalled(flap_pager *pager, flap_lane lane, uint64_t since_ns, uint64_t now_ns);
flap_status pager_thread_start(flap_pager *pager);
void pager_thread_stop(flap_pager *pager);
bool pager_is_idle(flap_pager *pager, uint32_t unused);

/* ---- pager_state.c: errors, mistakes, and the invariants of pager.c in code ------------------------------- */

/* Keeps the first failure: this thread's record becomes the pager's. */
void pager_fail(flap_pager *pager, flap_status status);
/* The sticky error, put into this thread's record. */
flap_status pager_error(flap_pager *pager);
/* The caller broke the contract: says what, prints the state, aborts. */
void pager_mistake(flap_pager *pager, const char *format, ...) FLAP_PRINTF(2, 3) __attribute__((noreturn, cold));
void pager_assert_state(flap_pager *pager);
/* Walks everything after every pump; tests turn it on. */
extern bool pager_full_checks;
/* The lane that lease `lease` waits for. */
flap_lane pager_waits_for(flap_pager *pager, uint32_t lease);

#endif
