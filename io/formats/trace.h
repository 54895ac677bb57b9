/* A timeline of a run in the Chrome trace format, for Perfetto (https://ui.perfetto.dev) and chrome://tracing.
 *
 * Events go into an array taken at start-up; adding one claims a slot with one atomic addition, so any thread may add
 * at any time without waiting. When the array is full, later events are counted and dropped. Events of one lane that
 * overlap in time (a disk has many requests in flight) are spread over rows when written, because a row holds a stack.
 */
#ifndef FLAP_FORMATS_TRACE_H
#define FLAP_FORMATS_TRACE_H

#include "base/arena.h"
#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_trace_lane {
  FLAP_TRACE_COMPUTE,
  FLAP_TRACE_H2D,
  FLAP_TRACE_D2H,
  FLAP_TRACE_DISK_READ,
  FLAP_TRACE_DISK_WRITE,
  FLAP_TRACE_HOST,
  FLAP_TRACE_STALL,
  FLAP_TRACE_LANE_COUNT
} flap_trace_lane;

#define FLAP_TRACE_NO_DETAIL UINT32_MAX
#define FLAP_TRACE_ROWS_MAX 64u /* per lane; what overlaps more deeply shares the last row */

typedef struct flap_trace flap_trace;

/* Arena bytes that flap_trace_open takes for so many events, alignment included. */
uint64_t flap_trace_measure(uint32_t capacity);

/* Takes the memory of `capacity` events from the arena and lives in it: there is nothing to close. On a measuring arena
 * returns NULL. capacity may be 0 (everything is dropped). */
flap_trace *flap_trace_open(flap_arena *arena, uint32_t capacity);

/* `name` is static storage ("forward"); `detail` is a number shown after it ("forward 12"), or FLAP_TRACE_NO_DETAIL.
 * Times are flap_units_now_ns or virtual, all on one clock. An end before its start counts as its start. `bytes` 0 is
 * left out. A NULL trace does nothing, so callers need no test. */
void flap_trace_add(flap_trace *trace, flap_trace_lane lane, const char *name, uint32_t detail, uint64_t start_ns,
                    uint64_t end_ns, uint64_t bytes);

uint64_t flap_trace_count(const flap_trace *trace);   /* kept */
uint64_t flap_trace_dropped(const flap_trace *trace); /* came when it was full */
/* Empties it. Nobody may add meanwhile. */
void flap_trace_reset(flap_trace *trace);

/* Writes what is complete by now as JSON, durably; times are relative to the first event. One writer at a time; adding
 * may go on. */
FLAP_CHECKED flap_status flap_trace_write(flap_trace *trace, const char *path);
/* Whether the file begins like one that flap_trace_write has written. */
bool flap_trace_is_one(const char *path);

#ifdef __cplusplus
}
#endif
#endif
