/* Rates that are measured: medians over rounds, with the spread beside them.
 *
 * Role: times a piece of work over and over, whatever the work is; who measures says what one unit of it amounts to.
 * Threading: any thread; the calling one does the timing.
 */
#ifndef FLAP_BASE_RATE_H
#define FLAP_BASE_RATE_H

#include "base/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_RATE_ROUNDS_MAX 64u

/* Per second, of whatever was counted. All 0 where nothing was measured: then rounds is 0. */
typedef struct flap_rate {
  double median, least, most;
  uint32_t rounds;
} flap_rate;

/* How long to look. A round takes about round_ns, or one unit of work where that takes longer; as many come before the
 * rounds that count as it takes to find out how much work fills one. */
typedef struct flap_rate_effort {
  uint32_t rounds; /* 1 to FLAP_RATE_ROUNDS_MAX */
  uint64_t round_ns;
} flap_rate_effort;

/* Does `units` units of work (at least 1) and returns when they are done. */
typedef flap_status (*flap_rate_fn)(void *context, uint64_t units);

/* Rounds of `fn`; `amount` is what a unit counts (bytes, operations). The first call is never counted: it takes pages,
 * loads code and wakes threads. Work that is much slower than the effort allows for ends after three rounds,
 * and after two seconds with one. What fn returns other than FLAP_OK ends it, and *rate_out is then all 0. */
FLAP_CHECKED flap_status flap_rate_measure(const flap_rate_effort *effort, flap_rate_fn fn, void *context,
                                           double amount, flap_rate *rate_out);

/* Of values that were measured elsewhere; sorts them. 1 to FLAP_RATE_ROUNDS_MAX of them. */
flap_rate flap_rate_of(double *values, uint32_t count);

/* Half of the distance between least and most, relative to the median: 0.02 is "± 2%". */
double flap_rate_spread(const flap_rate *rate);

#ifdef __cplusplus
}
#endif
#endif
