#include "base/rate.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdbool.h>
#include <stdlib.h>

#define UNITS_MAX ((uint64_t)1 << 40)
#define TRIES_MAX 12 /* to find how much work fills a round */
#define OVERTIME 3   /* times the time that was meant: then ROUNDS_LATE rounds are enough */
#define ROUNDS_LATE 3u
#define LONGEST_NS (2000u * 1000 * 1000) /* then any */
#define GROWTH_MAX 64u                   /* of the work from one try to the next: the first tries are mostly overhead */

static int ascending(const void *a, const void *b) {
  const double left = *(const double *)a, right = *(const double *)b;
  return (left > right) - (left < right);
}

flap_rate flap_rate_of(double *values, uint32_t count) {
  flap_assert(count > 0 && count <= FLAP_RATE_ROUNDS_MAX);
  qsort(values, count, sizeof *values, ascending);
  const double middle = count % 2 == 1 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
  return (flap_rate){.median = middle, .least = values[0], .most = values[count - 1], .rounds = count};
}

double flap_rate_spread(const flap_rate *rate) {
  return rate->median > 0 ? (rate->most - rate->least) / 2 / rate->median : 0;
}

static flap_status time_units(flap_rate_fn fn, void *context, uint64_t units, uint64_t *ns_out) {
  const uint64_t started_ns = flap_units_now_ns();
  FLAP_TRY(fn(context, units));
  const uint64_t taken_ns = flap_units_now_ns() - started_ns;
  *ns_out = taken_ns > 0 ? taken_ns : 1;
  return FLAP_OK;
}

/* The units that take about round_ns. A try that took long is made twice: once it may have been somebody else's time.
 */
static flap_status find_units(uint64_t round_ns, flap_rate_fn fn, void *context, uint64_t *units_out) {
  uint64_t units = 1, ns = 0;
  bool again = false;
  FLAP_TRY(fn(context, 1));
  for (int i = 0; i < TRIES_MAX && units < UNITS_MAX; i++) {
    FLAP_TRY(time_units(fn, context, units, &ns));
    if (ns > round_ns / 2 && again)
      break;
    again = ns > round_ns / 2;
    if (again)
      continue;
    const uint64_t more = round_ns / ns;
    units *= more < 2 ? 2 : more > GROWTH_MAX ? GROWTH_MAX : more;
  }
  *units_out = units;
  return FLAP_OK;
}

/* Whether so many rounds in so much time are enough. */
static bool is_enough(const flap_rate_effort *effort, uint32_t count, uint64_t ns) {
  if (count >= effort->rounds)
    return true;
  const bool late = ns > OVERTIME * effort->rounds * effort->round_ns;
  return (late && count >= ROUNDS_LATE) || (ns > LONGEST_NS && count >= 1);
}

flap_status flap_rate_measure(const flap_rate_effort *effort, flap_rate_fn fn, void *context, double amount,
                              flap_rate *rate_out) {
  double rates[FLAP_RATE_ROUNDS_MAX];
  uint64_t units = 1, ns = 0;
  uint32_t count = 0;
  *rate_out = (flap_rate){0};
  flap_assert(effort->rounds > 0 && effort->rounds <= FLAP_RATE_ROUNDS_MAX);
  const uint64_t begun_ns = flap_units_now_ns();
  FLAP_TRY(find_units(effort->round_ns, fn, context, &units));
  while (!is_enough(effort, count, flap_units_now_ns() - begun_ns)) {
    FLAP_TRY(time_units(fn, context, units, &ns));
    rates[count++] = amount * (double)units * 1e9 / (double)ns;
  }
  *rate_out = flap_rate_of(rates, count);
  return FLAP_OK;
}
