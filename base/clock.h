/* A virtual clock: a queue of events in virtual time, for simulated devices and disks.
 *
 * Nothing runs by itself: whoever would have waited calls flap_clock_advance, which runs the next event.
 * Events at the same time run in the order in which they were scheduled, so a simulation is a pure function
 * of its inputs. Threading: one thread.
 */
#ifndef FLAP_BASE_CLOCK_H
#define FLAP_BASE_CLOCK_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_CLOCK_EVENTS 4096u

typedef struct flap_clock flap_clock;
typedef void (*flap_clock_fn)(void *context);

/* Takes room for FLAP_CLOCK_EVENTS events at a time. The queue grows where more are wanted (and asserts when the system
 * refuses that); a clock is for planning and tests, never for the step loop. */
FLAP_CHECKED flap_status flap_clock_open(flap_clock **clock_out);
uint64_t flap_clock_now_ns(const flap_clock *clock);

/* Runs fn(context) at `at_ns` (not before now). */
void flap_clock_schedule(flap_clock *clock, uint64_t at_ns, flap_clock_fn fn, void *context);

/* Moves to the next event's time and runs it; false, and no change, when there is none. */
bool flap_clock_advance(flap_clock *clock);
/* Runs every event up to and at `until_ns`, then stands at `until_ns`. */
void flap_clock_advance_to(flap_clock *clock, uint64_t until_ns);
void flap_clock_close(flap_clock *clock);

#ifdef __cplusplus
}
#endif
#endif
