/* The compute device: an arena of exactly the vram budget, streams, events and asynchronous copies.
 *
 * Role: everything about a device that is not math. Kinds: `cpu` (VRAM is a host arena; compute runs on the calling
 * thread and the worker pool; each copy stream has a thread), `cuda`, and `sim` (no bytes, a virtual clock and
 * a machine profile: addresses may be computed with, never dereferenced).
 *
 * Streams are first in, first out. Work on the compute stream is launched by kernels (kernels/ops.h). Launches and
 * copies may be asynchronous; only events order them between streams. Nothing here allocates after open (but in
 * sim, which is for planning).
 *
 * Threading: each stream has one launching thread at a time; event queries are for any thread.
 */
#ifndef FLAP_KERNELS_DEVICE_DEVICE_H
#define FLAP_KERNELS_DEVICE_DEVICE_H

#include "base/clock.h"
#include "base/pool.h"
#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_device_kind { FLAP_DEVICE_CPU, FLAP_DEVICE_CUDA, FLAP_DEVICE_SIM } flap_device_kind;

typedef enum flap_stream { FLAP_STREAM_COMPUTE, FLAP_STREAM_H2D, FLAP_STREAM_D2H, FLAP_STREAM_COUNT } flap_stream;

/* Measured or assumed rates of a machine; what the simulator and the bound calculate with. All per second. */
typedef struct flap_machine {
  char name[64];
  double flops_bf16, flops_f32;             /* matmul rate with that storage type */
  double device_bytes;                      /* memory traffic of element-wise kernels */
  double h2d_bytes, d2h_bytes;              /* while nothing goes the other way */
  double h2d_both_bytes, d2h_both_bytes;    /* of each while both go on; 0: not known, and taken for as fast as alone */
  double disk_read_bytes, disk_write_bytes; /* of all disks together, while nothing goes the other way */
  double
      disk_both_bytes; /* read and written together while both go on; 0: not known, and taken for both at full rate */
  double host_bytes;   /* read + write by the host's cores */
  double encode_bytes, decode_bytes; /* of pages, with the page codec (io/block/codec.h), by all threads that would
                                        fill a pool together; 0: not known */
  uint64_t launch_ns;                /* fixed cost of a kernel, a copy, a disk request */
  uint64_t copy_ns;
  uint64_t disk_ns;
  bool synchronous;        /* compute blocks the launching thread (the cpu device) */
  uint32_t shared_cores;   /* > 0: lanes share this many cores (the cpu device) */
  uint64_t overhead_bytes; /* of the vram budget that the device keeps: context, libraries, rounding; 0 on the cpu */
  uint64_t process_bytes;  /* of host memory that a process with an open device takes for itself: code, driver,
                              libraries; 0: not known */
} flap_machine;

/* What no machine is slower than, in a file that describes one: below that, steps of large models come to more time
 * than a clock of 64 bits has, in nanoseconds. */
#define FLAP_MACHINE_FLOPS_MIN 1e8
#define FLAP_MACHINE_MEMORY_MIN 1e6 /* bytes per second, of copies and kernels */
#define FLAP_MACHINE_DISK_MIN 1e4   /* likewise */

/* Typical rates for a kind, before anything was measured. */
void flap_device_default_machine(flap_device_kind kind, flap_machine *machine_out);

typedef struct flap_device_config {
  flap_device_kind kind;
  uint64_t vram_bytes; /* the budget: on cpu and sim the arena has exactly this size; on cuda the arena is what is left
                          after the context and library workspaces */
  uint32_t events_max;
  flap_pool *pool;               /* cpu: who computes; must outlive the device; NULL where only copies are made */
  void (*notify)(void *context); /* after an event recorded with notify completed; any thread, the recording one
                                    included (cpu: compute events, inside event_record); must not block */
  void *notify_context;
  flap_clock *clock;    /* sim */
  flap_machine machine; /* sim */
} flap_device_config;

typedef struct flap_device flap_device;
typedef uint32_t flap_event; /* an index below events_max; an event that was never recorded is complete */

/* FLAP_NOT_FOUND (no driver, no GPU), FLAP_DEVICE (too old a driver or card, or it fails), FLAP_UNSUPPORTED (a kind
 * this build has not), FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_device_open(const flap_device_config *config, flap_device **device_out);
flap_device_kind flap_device_get_kind(const flap_device *device);
/* For people: "cpu, 2 threads", "NVIDIA H100 80GB HBM3". */
const char *flap_device_describe(const flap_device *device);
/* The arena: its address in device memory (aligned to at least 4096; a made-up one in sim) and its size. */
void *flap_device_arena(const flap_device *device, uint64_t *bytes_out);
bool flap_device_has_bytes(const flap_device *device); /* false in sim */
flap_pool *flap_device_pool(const flap_device *device);

/* Pins host memory for asynchronous copies (nothing to do on cpu and sim). Undone by close. */
FLAP_CHECKED flap_status flap_device_pin_host(flap_device *device, void *memory, uint64_t bytes);

/* Copies on a stream; H2D and D2H streams carry that direction only. At least 1024 copies and records may be queued per
 * stream; past that the call blocks. 0 bytes are no copy. */
void flap_device_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes);

/* The event completes when everything launched on the stream before has. Recording again moves it; waits that were
 * asked for earlier stay with the earlier recording. */
void flap_device_event_record(flap_device *device, flap_event event, flap_stream stream, bool notify);
bool flap_device_event_done(flap_device *device, flap_event event);
/* Blocks the calling thread (in sim: advances the clock) until the event is complete. */
void flap_device_event_wait(flap_device *device, flap_event event);
/* Later work on `stream` starts after the event. On a stream whose work runs on the calling thread this blocks. */
void flap_device_stream_wait(flap_device *device, flap_stream stream, flap_event event);
/* Waits for every stream, on none of which anybody launches meanwhile, then tells whether the device failed since open.
 * Device errors are sticky. */
FLAP_CHECKED flap_status flap_device_synchronize(flap_device *device);
/* The same without waiting, while others launch: what came before an event that is complete is in the answer. From any
 * thread. */
FLAP_CHECKED flap_status flap_device_outcome(flap_device *device);

/* Small transfers in order with the compute stream; `download` returns when the bytes are there. In sim both only take
 * time, and `download` fills with zeros, unless `to` is NULL. */
FLAP_CHECKED flap_status flap_device_upload(flap_device *device, void *to, const void *from, uint64_t bytes);
FLAP_CHECKED flap_status flap_device_download(flap_device *device, void *to, const void *from, uint64_t bytes);

/* sim: a kernel of so many operations and bytes of device-memory traffic on the compute stream; the dtype chooses the
 * matmul rate. Elsewhere a mistake. */
void flap_device_sim_kernel(flap_device *device, double flops, double bytes, bool bf16);
/* sim: work of so many ns on the compute stream. */
void flap_device_sim_work(flap_device *device, uint64_t ns);
/* sim: copies that are enqueued from here on take so many times as long; 1: as long. */
void flap_device_sim_slow_copies(flap_device *device, double times);
/* Busy time of a stream so far, ns: virtual in sim, measured elsewhere (cpu compute: as told by
 * flap_device_note_compute; cuda compute: of what bears a label). */
uint64_t flap_device_busy_ns(const flap_device *device, flap_stream stream);
void flap_device_note_compute(flap_device *device, uint64_t ns);

/* Rests of the compute stream, where its work runs beside the thread that launches it.
 *
 * How long it rested behind flap_device_stream_wait so far, ns: from the end of what was launched before until the
 * event. 0 where the wait is the calling thread's. */
uint64_t flap_device_rested_ns(const flap_device *device);
/* Such rests bear this label for the observer from here on, as work does; 0: it hears nothing of them. */
void flap_device_label_rests(flap_device *device, uint64_t label);
/* From here on busy times, rests and what the observer hears are exact, at the price of microseconds for each copy and
 * each rest. Else on cuda those of copies and of rests without a label are right on average, one may be 100
 * microseconds off, and rests of less may be missed; elsewhere all are exact. From any thread. */
void flap_device_time_exactly(flap_device *device, bool exactly);
/* Since when it has had nothing to do (flap_units_now_ns or virtual); UINT64_MAX: it has. 0 where its work runs on the
 * calling thread. On cuda only ends of what was launched before flap_device_expect_rest are sure to be known, and up to
 * 100 microseconds late. From any thread. */
uint64_t flap_device_idle_since_ns(flap_device *device);
/* For whoever launches, before it sleeps. Counts as a launch (flap_device_limit_ahead). */
void flap_device_expect_rest(flap_device *device);

/* Blocks while so much stands on the compute stream that CUDA might block the next launch or record there, and with it
 * whoever needs a lock that the caller holds, for as long as what runs now takes. For whoever launches there, before
 * such a lock is taken. At most FLAP_DEVICE_AHEAD_MAX launches, records and waits stand there then. Nothing to do
 * elsewhere.
 */
#define FLAP_DEVICE_AHEAD_MAX 512u
void flap_device_limit_ahead(flap_device *device);

/* What is launched on the compute stream from here on bears this label for the observer, until the next one; 0: it
 * hears nothing of it. Told on cuda, where each label with work costs two events, and in sim; on cpu the caller can
 * take the times. */
void flap_device_label_compute(flap_device *device, uint64_t label);

/* Observes copies for the trace: called with start and end (flap_units_now_ns or virtual) of every copy, on the copying
 * thread; NULL turns it off. For the compute stream it hears of labelled work and rests, with the label in place of the
 * bytes. */
typedef void (*flap_device_trace_fn)(void *context, flap_stream stream, uint64_t started_ns, uint64_t ended_ns,
                                     uint64_t bytes);
void flap_device_set_trace(flap_device *device, flap_device_trace_fn fn, void *context);

/* What the driver charges to this process now, and the highest so far; on cpu and sim the arena. */
uint64_t flap_device_memory_peak(const flap_device *device);

/* The largest budget that a card has now, with no device open: what nobody uses, and what CUDA takes for this process.
 * FLAP_UNSUPPORTED for kinds whose memory is the host's, else as flap_device_open. */
FLAP_CHECKED flap_status flap_device_budget_max(flap_device_kind kind, uint64_t *bytes_out);

/* The card that would be opened, and its driver, as "NVIDIA H100 80GB HBM3, driver 13.0"; starts nothing on it. Errors
 * as those of flap_device_open; FLAP_UNSUPPORTED for kinds that are no cards. */
FLAP_CHECKED flap_status flap_device_find(flap_device_kind kind, char *name_out, size_t bytes);

/* Waits for the streams and gives everything back. NULL is fine. */
void flap_device_close(flap_device *device);

#ifdef __cplusplus
}
#endif
#endif
