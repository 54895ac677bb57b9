/* What the front (device.c) and the kinds of device share; private to kernels/device.
 *
 * A kind is one table of functions and one struct that begins with struct flap_device. The front checks arguments,
 * keeps the trace and the busy counters, and calls the table; it never looks at the kind otherwise.
 */
#ifndef FLAP_KERNELS_DEVICE_DEVICE_INTERNAL_H
#define FLAP_KERNELS_DEVICE_DEVICE_INTERNAL_H

#include "kernels/device/device.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

typedef struct flap_device_table {
  size_t struct_bytes; /* of the kind's struct */
  bool has_bytes;

  /* Fills arena and description, and takes everything that the device will need. A failure leaves nothing taken. */
  flap_status (*open)(flap_device *device);
  /* Waits for the streams and gives back what open took. */
  void (*close)(flap_device *device);
  flap_status (*pin_host)(flap_device *device, void *memory, uint64_t bytes);
  void (*copy)(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes);
  void (*event_record)(flap_device *device, flap_event event, flap_stream stream, bool notify);
  bool (*event_done)(flap_device *device, flap_event event);
  void (*event_wait)(flap_device *device, flap_event event);
  void (*stream_wait)(flap_device *device, flap_stream stream, flap_event event);
  flap_status (*synchronize)(flap_device *device);
  flap_status (*outcome)(flap_device *device); /* NULL where nothing can fail */
  flap_status (*upload)(flap_device *device, void *to, const void *from, uint64_t bytes);
  flap_status (*download)(flap_device *device, void *to, const void *from, uint64_t bytes);
  void (*limit_ahead)(flap_device *device);                   /* NULL where launches do not run ahead */
  void (*expect_rest)(flap_device *device);                   /* NULL where there is nothing to do */
  uint64_t (*idle_since_ns)(flap_device *device);             /* NULL where compute runs on the calling thread */
  void (*label_compute)(flap_device *device, uint64_t label); /* NULL: cpu */
  void (*note_compute)(flap_device *device, uint64_t ns);     /* NULL where the device measures its own kernels */
  void (*sim_work)(flap_device *device, uint64_t ns);         /* NULL but in sim */
  void (*sim_slow_copies)(flap_device *device, double times); /* likewise */
  void (*sim_kernel)(flap_device *device, double flops, double bytes, bool bf16); /* NULL but in sim */
  uint64_t (*memory_peak)(const flap_device *device);
} flap_device_table;

extern const flap_device_table flap_device_cpu_table;
extern const flap_device_table flap_device_sim_table;
#ifdef FLAP_CUDA
extern const flap_device_table flap_device_cuda_table;
#endif

/* Devices of this kind that are opened from here on use `table`; returns the one before. For tests, which make some of
 * its functions fail; while no device is opened elsewhere. */
const flap_device_table *flap_device_replace_table(flap_device_kind kind, const flap_device_table *table);

struct flap_device {
  const flap_device_table *table;
  flap_device_config config;
  char description[128];
  void *arena;
  uint64_t arena_bytes;
  _Atomic uint64_t busy_ns[FLAP_STREAM_COUNT];
  _Atomic uint64_t rested_ns;
  _Atomic bool exact;         /* flap_device_time_exactly */
  uint64_t rest_label;        /* the launching thread's */
  pthread_mutex_t trace_lock; /* held during a call of trace_fn, so that set_trace(NULL) returns after the last one */
  flap_device_trace_fn trace_fn;
  void *trace_context;
};

/* Tells the observer, if there is one. */
void flap_device_observe(flap_device *device, flap_stream stream, uint64_t started_ns, uint64_t ended_ns,
                         uint64_t bytes);
/* The same, and adds to the stream's busy time. */
void flap_device_copied(flap_device *device, flap_stream stream, uint64_t started_ns, uint64_t ended_ns,
                        uint64_t bytes);

#endif
