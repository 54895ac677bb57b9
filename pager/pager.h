/* The pager: VRAM as a cache over pinned RAM, and RAM over disk, for programs that are known before they run.
 *
 * Role: keeps regions (runs of bytes with a name's worth of meaning to the engine, none to the pager) in their homes,
 * and moves them to VRAM ahead of use and back after it. It calls the device and the block files; nobody above it.
 *
 * Homes. A region is either resident (all of it in VRAM for the whole run), or it streams: its first `ram_pages` pages
 * live in RAM and the others on disk, and a lease brings it whole into one slot of its ring in VRAM. A ring is a set of
 * equal slots; slots go to leases in program order, as soon as one is free, so prefetching needs no guessing and no
 * eviction.
 *
 * Overlays. Regions that never hold anything while certain others do may share their RAM with these: an overlay has two
 * sides, each as large as its regions' RAM pages together, at the same place. When a lease that changes a region of one
 * side is unpinned, or such a region is filled, no region of the other holds anything. They are emptied by leases that
 * load them (CONSUME), not by SCRATCH: then they were home. What a job empties counts as empty when the job is over; so
 * something between the two waits for it. The planner's duty, checked here.
 *
 * Jobs of the host. Some leases are for work of the host's cores on what lives in RAM: a job waits until its regions'
 * bytes are home and nobody reads them any more, runs on a thread of the pager's, one after another, and counts as a
 * change like any other. The engine hands a job over and goes on; what a later lease loads waits for it.
 *
 * Programs. The engine hands over a list of leases in the order in which it will pin them. The pager works ahead
 * through that list (and through the list of the next program, when it has been handed over already). Per lease: pin →
 * use → unpin. At most `slots` leases of a ring are live at any time: the planner's duty, checked here.
 *
 * Snapshots. The values that some regions have at one point of the programs can be read while programs run on: each is
 * kept at home from the moment it is there until it was read, and what would change it waits meanwhile.
 *
 * Threading: the engine thread begins, pins, unpins, ends. One transfer thread owns completions and the copy streams;
 * the engine thread never reaps I/O. Jobs run on a third, checksums on `workers` more. A thread of the caller's may
 * drain a snapshot. On the sim device there is no thread: whoever waits advances the clock, and all calls come
 * from one thread, for nothing is locked. A completion never raises.
 * A transfer that failed, or bytes that are not what was written even when they are read once more (FLAP_CORRUPT), make
 * the pager's error sticky, and from then on every call but close and stats returns it.
 */
#ifndef FLAP_PAGER_PAGER_H
#define FLAP_PAGER_PAGER_H

#include "base/arena.h"
#include "base/duplex.h"
#include "io/block/block.h"
#include "io/block/codec.h"
#include "kernels/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_PAGER_RESIDENT UINT32_MAX   /* instead of a ring */
#define FLAP_PAGER_HOST (UINT32_MAX - 1) /* likewise: lives in RAM, and only jobs of the host lease it */
#define FLAP_PAGER_JOB_LEASES_MAX 4
#define FLAP_PAGER_CLASSES_MAX 16u
#define FLAP_PAGER_OVERLAYS_MAX 1023u
#define FLAP_PAGER_POOL_BLOCK ((uint64_t)16 << 10)
#define FLAP_PAGER_BUFFERS_MAX 32768u /* read buffers, and write buffers */

typedef struct flap_pager_region {
  uint64_t bytes; /* > 0, a multiple of FLAP_BLOCK_ALIGN; at most the slot_bytes of its ring */
  uint32_t ring;  /* index, FLAP_PAGER_RESIDENT, or FLAP_PAGER_HOST */
  uint32_t
      ram_pages; /* pages that live in RAM: the first ones. Resident regions have none; those that jobs lease all */
  /* For compression: how wide the numbers are that it holds (1, 2 or 4 bytes; 0: its pages stay as they are), and of
   * which class it is (below FLAP_PAGER_CLASSES_MAX): what is learnt of one region goes for its class. */
  uint8_t element_bytes, klass;
  bool shared; /* its pages on disk lie where checkpoints can share them: see flap_pager_keep. One of the snapshots */
  bool in_snapshots; /* belongs to every snapshot; such a region is of no overlay, and does not lend */
  bool lends;        /* resident, with leases of its own that are not READ: see flap_pager_ring */
  uint8_t side;      /* of its overlay: 0 or 1 */
  uint16_t overlay;  /* from 1 to FLAP_PAGER_OVERLAYS_MAX; 0: its RAM is its own */
} flap_pager_region;

typedef struct flap_pager_ring {
  const char *name;    /* for messages and the trace; static storage */
  uint64_t slot_bytes; /* a multiple of FLAP_BLOCK_ALIGN */
  uint32_t slots;
  bool keeps; /* one slot for one region, which device leases only read: loaded once in a program, and again behind a
                 job */
  /* So many slots more, of one ring at most, in the memory of residents that lend, as many in each as fit; there must
   * be room for them. One of these is taken where none of the ring's own is free, while the resident holds nothing, and
   * only for a lease that comes before the resident's next one. No lease of the ring may be pinned when one of such a
   * resident is. */
  uint32_t borrowed;
} flap_pager_ring;

/* Lanes, for statistics and the trace. */
typedef enum flap_lane {
  FLAP_LANE_H2D,
  FLAP_LANE_D2H,
  FLAP_LANE_DISK_READ,
  FLAP_LANE_DISK_WRITE,
  FLAP_LANE_HOST, /* jobs; their bytes are those of memory that they read and write */
  FLAP_LANE_COUNT
} flap_lane;
const char *flap_pager_lane_name(flap_lane lane); /* "h2d", "d2h", "disk_read", "disk_write", "host" */

typedef void (*flap_pager_trace_fn)(void *context, flap_lane lane, uint32_t region, uint64_t started_ns,
                                    uint64_t ended_ns, uint64_t bytes);

typedef struct flap_pager_config {
  uint64_t page_bytes;     /* a multiple of FLAP_BLOCK_ALIGN: the unit of checksums and homes */
  uint64_t transfer_bytes; /* a multiple of page_bytes, at most FLAP_BLOCK_REQUEST_BYTES_MAX: adjacent pages are merged
                              up to this; the size of a staging buffer */
  uint64_t copy_bytes;     /* a multiple of page_bytes: adjacent pages in RAM are copied to and from the device up to
                              this together; 0: transfer_bytes */
  uint32_t region_count;
  const flap_pager_region *regions; /* not kept */
  uint32_t ring_count;
  const flap_pager_ring *rings; /* not kept */
  /* Staging; at least 1 each when anything lives on disk. With as many as a burst of leases moves, disks work while
   * there is only computing. */
  uint32_t read_buffers, write_buffers;
  uint32_t workers; /* threads that check and compress what is read and written; 0: the transfer thread does it */
  flap_compression compression; /* of pages on disk */
  /* RAM in which chunks of regions on disk stand encoded instead of there, as many as fit; a multiple of
   * FLAP_PAGER_POOL_BLOCK. What regions take on disk is the same: nobody knows before how far bytes shrink. None
   * where nothing lives on disk, or nothing is compressed. */
  uint64_t pool_bytes;
  flap_duplex disk_rates; /* for FLAP_COMPRESSION_AUTO: reading and writing, of all disks together; 0: never */
  bool shared_cores;      /* for the same: compute wants the cores that workers run on */
  uint32_t leases_max;    /* of the longest program */
  uint32_t jobs_max;      /* of the program with most jobs */
  /* Only for open: */
  flap_device_config device; /* notify and events_max are the pager's to fill: it opens the device */
  flap_block_config disk;    /* bytes, memory, requests_max and notify are the pager's to fill; not opened when no page
                                lives on disk */
  /* A folder in which the extents of shared regions are files that can get a name, on the file system of the one disk
   * (flap_block_can_link); it outlives the pager. NULL: none are. Not with a clock. */
  const char *shared_folder;
  flap_clock *clock;                 /* with the sim device */
  double encode_bytes, decode_bytes; /* with it: bytes that are coded a second, all workers together; 0: at once */
  double disk_share;         /* with it, where pages are compressed: of their bytes disks move such a share; 0: all */
  bool counts_no_stalls;     /* nobody asks for stalls: they are not looked for, and a simulation takes less time */
  flap_pager_trace_fn trace; /* any thread; NULL for none */
  /* Work on the compute stream that was labelled (flap_device_label_compute), and rests of it (label_rests); any
   * thread; NULL for none. */
  void (*trace_compute)(void *context, uint64_t label, uint64_t started_ns, uint64_t ended_ns);
  void *trace_context;
} flap_pager_config;

typedef struct flap_pager_sizes {
  uint64_t vram_bytes; /* resident regions and rings */
  uint64_t ram_bytes;  /* all of the below, exactly what open takes from the arena */
  uint64_t ram_home_bytes, staging_bytes, table_bytes, pool_bytes;
  uint64_t disk_bytes;       /* the linear space of the extent files */
  uint64_t shared_bytes;     /* of these, in a file for shared regions */
  uint32_t snapshot_buffers; /* part of the staging; each is a request of the disks, as the other buffers are */
} flap_pager_sizes;

/* Of table_bytes, what one more worker takes; 0 where nothing is compressed. */
uint64_t flap_pager_worker_bytes(const flap_pager_config *config);
/* What sizes depend on of all regions. */
typedef struct flap_pager_totals {
  uint64_t resident_bytes; /* for good in VRAM */
  uint64_t home_bytes;     /* that live in RAM; of an overlay the longer side */
  uint64_t disk_bytes, pages;
  uint64_t shared_bytes; /* of disk_bytes, of regions that are shared */
  uint32_t overlays;     /* the highest number of one */
  bool snapshots_move;   /* some region of theirs is in VRAM for good, or some of it on disk */
} flap_pager_totals;
void flap_pager_total(const flap_pager_config *config, flap_pager_totals *totals_out);
/* What a configuration of these totals will take, whatever its regions are: for a planner that keeps account of them.
 */
void flap_pager_measure_totals(const flap_pager_config *config, const flap_pager_totals *totals,
                               flap_pager_sizes *sizes_out);
/* What a configuration will take; a pure function of the first group of fields. */
void flap_pager_measure(const flap_pager_config *config, flap_pager_sizes *sizes_out);

typedef struct flap_pager flap_pager;

/* Opens device and disks. `ram` gives sizes.ram_bytes (homes and staging are pinned with the device); `vram_bytes` of
 * the device's arena are the pager's, from its start; the rest of the arena is the caller's (flap_pager_vram_rest).
 * Nothing is taken after open. On the sim device no host memory for bytes is touched: pass an arena that measures. */
FLAP_CHECKED flap_status flap_pager_open(const flap_pager_config *config, flap_arena *ram, flap_pager **pager_out);
flap_device *flap_pager_device(const flap_pager *pager);
void *flap_pager_vram_rest(const flap_pager *pager, uint64_t *bytes_out);
/* "io_uring, O_DIRECT" or "none". */
const char *flap_pager_disk_describe(const flap_pager *pager);

/* ---- at rest: no program begun --------------------------------------------------------------------------- */

/* Fills a region through a callback, piece by piece in order: fill(context, offset, bytes, memory) writes `bytes` at
 * `memory`. Pieces are at most transfer_bytes (page_bytes when nothing is on disk and no staging exists: the callback
 * must not care). A region that was never filled or created holds nothing, and loading it is an assert. */
typedef flap_status (*flap_pager_fill_fn)(void *context, uint64_t offset, uint64_t bytes, void *memory);
FLAP_CHECKED flap_status flap_pager_fill(flap_pager *pager, uint32_t region, flap_pager_fill_fn fill, void *context);

/* Reads a region wherever it lives, piece by piece in order; verified like any other read. While a snapshot is open it
 * is of this, and not only at rest: see below. */
typedef flap_status (*flap_pager_drain_fn)(void *context, uint64_t offset, uint64_t bytes, const void *memory);
FLAP_CHECKED flap_status flap_pager_drain(flap_pager *pager, uint32_t region, flap_pager_drain_fn drain, void *context);

/* ---- programs -------------------------------------------------------------------------------------------- */

/* What a lease does with its region's bytes. */
typedef enum flap_lease_mode {
  FLAP_LEASE_READ,    /* loaded; unchanged */
  FLAP_LEASE_UPDATE,  /* loaded; changed; written back */
  FLAP_LEASE_CREATE,  /* not loaded: the user writes all of it; written back */
  FLAP_LEASE_CONSUME, /* loaded; afterwards the region holds nothing */
  FLAP_LEASE_SCRATCH  /* neither loaded nor written back; afterwards the region holds nothing */
} flap_lease_mode;

typedef struct flap_lease {
  uint32_t region;
  flap_lease_mode mode; /* of a job: UPDATE or CONSUME */
  uint64_t host_bytes;  /* > 0: a job's lease, of which it uses so many bytes; 0: a lease of the device */
} flap_lease;

/* Queues a program behind the one in progress; at most two are queued. `leases` must stay as they are until its end.
 * Leases of one region must not overlap in time (pin of the later after unpin of the earlier). */
FLAP_CHECKED flap_status flap_pager_begin(flap_pager *pager, const flap_lease *leases, uint32_t count);

/* Pins lease `index` of the oldest queued program; indexes come in order. Blocks until the region's copy was enqueued,
 * and orders the compute stream after it; the pointer is device memory, valid until the unpin. */
FLAP_CHECKED flap_status flap_pager_pin(flap_pager *pager, uint32_t index, void **memory_out);
/* Everything launched on the compute stream so far is the lease's last use. Any order. */
void flap_pager_unpin(flap_pager *pager, uint32_t index);

/* Work of the host's cores. run(context, memory) gets the places in RAM of the job's regions, in the order of its
 * leases; NULL: there is nothing to do, and the bytes stay as they are. */
typedef void (*flap_pager_job_fn)(void *context, void *const memory[]);
typedef struct flap_pager_job {
  flap_pager_job_fn run;
  void *context; /* until the job is over */
  /* With a virtual clock: what it takes, and what while copies go on as it begins; run is not called then. Copies that
   * are enqueued while it runs take `copies_beside` times as long; 0 and 1: as long. */
  uint64_t ns, beside_copies_ns;
  double copies_beside;
} flap_pager_job;
/* Hands over a job with leases [first, first + count) of the oldest program, in the place of their pins and unpins, and
 * does not wait for it. The leases of its regions before it must be unpinned, and it counts as unpinned for those
 * behind it. Jobs run one after another in the order of their handing over. */
void flap_pager_run_job(flap_pager *pager, uint32_t first, uint32_t count, const flap_pager_job *job);

/* The oldest program has ended: all its leases were pinned and unpinned; jobs of it are waited for. Write-backs may
 * still be under way. */
FLAP_CHECKED flap_status flap_pager_end(flap_pager *pager);
/* Waits until everything is written back and no program is queued: at rest. */
FLAP_CHECKED flap_status flap_pager_settle(flap_pager *pager);

/* ---- snapshots ------------------------------------------------------------------------------------------ */

/* Opens a snapshot: the values that the regions with `in_snapshots` have once the first `until` leases of the program
 * begun last, and all programs before it, have changed them. None of its later leases may be pinned yet, nor before all
 * of those are unpinned. With no program queued (and until 0) the values are those of now. One at a time; not on the
 * sim device. Nothing is copied: a region's value stays at home until flap_pager_drain has delivered it. Until then
 * what would change it waits: the store of a lease behind the point, or a job, or the pin where the region is resident.
 *
 * While it is open, one thread, any but the engine's, may call flap_pager_drain for these regions, once for each, in
 * any order. It waits until the value is there and home, and delivers it as at rest. After its last piece it asks the
 * device, so that nothing of one that failed is taken for good. A region that holds nothing at the point must not be
 * drained. */
void flap_pager_snapshot_begin(flap_pager *pager, uint32_t until);
/* No program goes on: a drain of a value that will not come any more returns FLAP_CLOSED. Others go on. From the
 * engine thread. */
void flap_pager_snapshot_cut_off(flap_pager *pager);
/* Lets go of what was not drained, and closes the snapshot. From any thread, with no drain under way. */
void flap_pager_snapshot_end(flap_pager *pager);

/* ---- extents that checkpoints share ---------------------------------------------------------------------- */

/* Where a page of a shared region stands, for as long as its file is open or has a name. */
typedef struct flap_pager_extent {
  uint64_t offset;       /* of the page, in the region */
  uint32_t bytes;        /* of the page */
  uint32_t stored_bytes; /* there; fewer than `bytes` if it is encoded (io/block/codec.h) */
  uint64_t place;        /* in the file, in bytes */
  uint64_t checksum;     /* of what is stored there, seeded with region, number of the page, and epoch */
  uint32_t epoch;
  uint32_t file; /* from 1 to FLAP_BLOCK_FILES_MAX */
} flap_pager_extent;
typedef flap_status (*flap_pager_extent_fn)(void *context, const flap_pager_extent *extent);

/* Whether the next file is there, so that flap_pager_keep may be called. False where nothing is shared. */
bool flap_pager_can_keep(const flap_pager *pager);
/* Like flap_pager_drain, at rest or of a snapshot, but nothing is read from disk: of the pages there it says where they
 * stand, after it has delivered the others. They stay as they are, for whatever is written of the region from then on
 * goes to the next file. Once for each shared region, and for no other, then link and next. */
FLAP_CHECKED flap_status flap_pager_keep(flap_pager *pager, uint32_t region, flap_pager_drain_fn drain,
                                         flap_pager_extent_fn extent, void *context);
/* Whether all pages that were kept since the last flap_pager_next_file, and stand on the disk, have been read since
 * they were written, and compared. The next program that changes the regions does
 * that, but never where they are read through the system's cache. From any thread. */
bool flap_pager_kept_is_read(flap_pager *pager);
/* Makes a file durable in which extents stand, and names it; the name lasts with its folder's fsync. */
FLAP_CHECKED flap_status flap_pager_link(flap_pager *pager, uint32_t file, const char *path);
/* After all were kept, or at the start: closes files in which nothing stands that the run still needs, and makes the
 * next one, of sizes.shared_bytes. Where too many are still needed there is none, and FLAP_OK: see can_keep. From the
 * thread that keeps. */
FLAP_CHECKED flap_status flap_pager_next_file(flap_pager *pager);
/* Of a file; 0 where nothing is shared. */
uint64_t flap_pager_shared_bytes(const flap_pager *pager);
uint64_t flap_pager_page_bytes(const flap_pager *pager);
/* Of a shared region, what a keep delivers: all that is not on disk. */
uint64_t flap_pager_copied_bytes(const flap_pager *pager, uint32_t region);

/* ---- statistics ------------------------------------------------------------------------------------------ */

typedef struct flap_pager_stats {
  uint64_t bytes[FLAP_LANE_COUNT];    /* moved by programs since open: not by fill and drain; of disks, as they are in
                                         regions */
  uint64_t disk_bytes[2];             /* of these, what was read from disks and written to them, compressed or not */
  uint64_t pooled_bytes[2];           /* of these, as they are in regions, what came from the pool and went there */
  uint64_t stall_ns[FLAP_LANE_COUNT]; /* time that compute rested, by the lane that a pin waited for; for a snapshot to
                                         be drained: FLAP_LANE_DISK_WRITE */
  uint64_t stream_stall_ns;           /* of FLAP_LANE_H2D's, what compute rested on its own stream, behind pins */
  uint64_t stalled_until;             /* ns, as the pager's clock: until when compute rested in a pin last */
  uint64_t busy_ns[FLAP_LANE_COUNT];  /* for disks: sum of request times over the depth; copies: as the device measured,
                                         with  those of snapshots */
  uint64_t reread; /* requests that were read once more, because their bytes were not what was written; their second
                      reading is in none of the above. Of fill and drain too */
} flap_pager_stats;
void flap_pager_get_stats(flap_pager *pager, flap_pager_stats *stats_out);

/* Whether `auto` encodes a byte that is read once and written once: it comes to `share` of one, for which the codec
 * takes so many seconds, both ways; of cores that compute wants, or beside all else. */
bool flap_pager_encoding_pays(const flap_duplex *disks, double share, double codec_seconds, bool shared_cores);
/* What a chunk comes to until chunks were seen, of its bytes: states of exact AdamW, trained for a while. */
#define FLAP_PAGER_CODED_SHARE 0.87
/* Of the pages that live on disk what share a pool of so many bytes is expected to hold, if they shrink as states of
 * exact AdamW do. */
double flap_pager_pooled_share(uint64_t pool_bytes, uint64_t disk_bytes);

/* The bytes that one run of a program moves on each lane: a pure function of the configuration, for the plan. */
void flap_pager_predict(const flap_pager_config *config, const flap_lease *leases, uint32_t count,
                        uint64_t bytes_out[FLAP_LANE_COUNT]);
/* Of its leases [first, end) alone. */
void flap_pager_predict_part(const flap_pager_config *config, const flap_lease *leases, uint32_t first, uint32_t end,
                             uint64_t bytes_out[FLAP_LANE_COUNT]);

void flap_pager_close(flap_pager *pager);

#ifdef __cplusplus
}
#endif
#endif
