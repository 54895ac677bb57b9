#include "base/duplex.h"

#include "base/assert.h"

#include <math.h>

#define NS 1e9
#define TIME_MAX 4e18 /* ns; a transfer that long is a mistake in the rates */

static uint64_t rounded(double ns) {
  flap_assert(ns >= 0 && ns < TIME_MAX);
  return (uint64_t)llround(ns);
}

uint64_t flap_duplex_end_ns(const flap_duplex *lanes, uint64_t start_ns, double bytes, uint64_t other_start_ns,
                            uint64_t other_end_ns) {
  const uint64_t plain_ns = start_ns + rounded(bytes / lanes->alone_bytes * NS);
  const uint64_t from_ns = start_ns > other_start_ns ? start_ns : other_start_ns;
  if (lanes->both_bytes <= 0 || from_ns >= other_end_ns || plain_ns <= from_ns)
    return plain_ns;
  const double rest_rate = lanes->both_bytes - lanes->other_alone_bytes;
  const double slow_rate = fmin(rest_rate, lanes->alone_bytes); /* measured rates of both may be above those alone */
  const double left = fmax(bytes - (double)(from_ns - start_ns) * lanes->alone_bytes / NS, 0);
  const double beside = slow_rate > 0 ? (double)(other_end_ns - from_ns) * slow_rate / NS : 0;
  if (beside >= left)
    return from_ns + rounded(left / slow_rate * NS);
  return other_end_ns + rounded((left - beside) / lanes->alone_bytes * NS);
}

double flap_duplex_least_seconds(double bytes, double other_bytes, const flap_duplex *lanes) {
  const double rate = lanes->alone_bytes, other_rate = lanes->other_alone_bytes, both = lanes->both_bytes;
  if (both <= 0 || both >= rate + other_rate)
    return 0;
  /* What a second of the best mixes moves lies on the line through (rate, left) and (other_left, other_rate). */
  const double left = fmax(both - rate, 0), other_left = fmax(both - other_rate, 0);
  const double seconds =
      (bytes * (other_rate - left) + other_bytes * (rate - other_left)) / (rate * other_rate - left * other_left);
  return fmax(seconds, fmax(bytes / rate, other_bytes / other_rate));
}
