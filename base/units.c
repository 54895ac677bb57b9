/* Parsing and printing of sizes, counts and times; arithmetic that does not wrap. */
#include "base/units.h"

#include "base/assert.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>

__extension__ typedef unsigned __int128 uint128;

#define BYTES_MAX ((uint64_t)1 << 62)

/* The factor of a unit's name, 0 if there is no such unit. */
static uint64_t unit_factor(const char *name) {
  static const struct {
    const char *name;
    uint64_t factor;
  } units[] = {
      {"", 1},
      {"B", 1},
      {"KB", 1000ull},
      {"MB", 1000000ull},
      {"GB", 1000000000ull},
      {"TB", 1000000000000ull},
      {"KiB", (uint64_t)1 << 10},
      {"MiB", (uint64_t)1 << 20},
      {"GiB", (uint64_t)1 << 30},
      {"TiB", (uint64_t)1 << 40},
  };
  for (size_t i = 0; i < sizeof units / sizeof units[0]; i++)
    if (strcasecmp(name, units[i].name) == 0)
      return units[i].factor;
  return 0;
}

static bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/* Reads the digits at *text into value; false when they exceed `max`. Moves *text past them. */
static bool read_digits(const char **text, uint64_t max, uint64_t *value_out) {
  uint64_t value = 0;
  for (; is_digit(**text); (*text)++) {
    uint64_t digit = (uint64_t)(**text - '0');
    if (value > (max - digit) / 10)
      return false;
    value = value * 10 + digit;
  }
  *value_out = value;
  return true;
}

/* The digits behind the point as numerator / denominator: the first 18, for 10^-12 of a TiB is a byte. *some_out
 * tells whether any is not zero. False without one. */
static bool read_fraction(const char **text, uint64_t *numerator_out, uint64_t *denominator_out, bool *some_out) {
  const char *start = *text;
  size_t digits = 0;
  for (; is_digit(start[digits]); digits++)
    *some_out |= start[digits] != '0';
  *text = start + digits;
  *numerator_out = 0;
  *denominator_out = 1;
  for (size_t i = 0; i < digits && i < 18; i++) {
    *numerator_out = *numerator_out * 10 + (uint64_t)(start[i] - '0');
    *denominator_out *= 10;
  }
  return digits > 0;
}

flap_status flap_units_parse_bytes(const char *text, uint64_t *bytes_out) {
  const char *at = text;
  uint64_t whole = 0, numerator = 0, denominator = 1;
  bool fraction = false;
  if (!is_digit(*at))
    return flap_error_set(FLAP_INVALID, "\"%s\" is not a size: write a number with a unit, such as 24GiB or 1.5 GB",
                          text);
  if (!read_digits(&at, BYTES_MAX, &whole))
    return flap_error_set(FLAP_INVALID, "\"%s\" is too large for a size", text);
  if (*at == '.') {
    at++;
    if (!read_fraction(&at, &numerator, &denominator, &fraction))
      return flap_error_set(FLAP_INVALID, "\"%s\" has no digits behind its point", text);
  }
  if (*at == ' ')
    at++;
  /* A blank promises a unit, and "64k" could be 64 KB or 64 KiB: neither is guessed. */
  uint64_t factor = at > text && at[-1] == ' ' && *at == '\0' ? 0 : unit_factor(at);
  if (factor == 0)
    return flap_error_set(FLAP_INVALID,
                          "\"%s\" has no known unit: use B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB "
                          "(powers of 1024)",
                          text);
  uint128 part = (uint128)numerator * factor;
  uint128 bytes = (uint128)whole * factor + part / denominator;
  if (fraction && (factor == 1 || bytes == 0))
    return flap_error_set(FLAP_INVALID, "\"%s\" is a fraction of a byte", text);
  if (bytes > BYTES_MAX)
    return flap_error_set(FLAP_INVALID, "\"%s\" is too large for a size", text);
  *bytes_out = (uint64_t)bytes;
  return FLAP_OK;
}

/* Prints value in the first unit that keeps it below `base` after rounding to three significant digits. */
static char *format_scaled(double value, double base, const char *const *names, size_t count, char *buffer,
                           size_t buffer_bytes) {
  size_t unit = 0;
  while (unit + 1 < count && (unit == 0 ? value >= base : rint(value) >= base)) {
    value /= base;
    unit++;
  }
  const char *blank = names[unit][0] == '\0' ? "" : " ";
  int decimals = 2;
  if (unit == 0 || value >= 99.95)
    decimals = 0;
  else if (value >= 9.995)
    decimals = 1;
  (void)snprintf(buffer, buffer_bytes, "%.*f%s%s", decimals, value, blank, names[unit]);
  return buffer;
}

char *flap_units_format_bytes(uint64_t bytes, char *buffer, size_t buffer_bytes) {
  static const char *const names[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  return format_scaled((double)bytes, 1024, names, sizeof names / sizeof names[0], buffer, buffer_bytes);
}

char *flap_units_format_count(uint64_t count, char *buffer, size_t buffer_bytes) {
  static const char *const names[] = {"", "K", "M", "B", "T", "Qa", "Qi"};
  return format_scaled((double)count, 1000, names, sizeof names / sizeof names[0], buffer, buffer_bytes);
}

static char *format_significant(double value, const char *unit, char *buffer, size_t buffer_bytes) {
  int decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  (void)snprintf(buffer, buffer_bytes, "%.*f %s", decimals, value, unit);
  return buffer;
}

char *flap_units_format_seconds(double seconds, char *buffer, size_t buffer_bytes) {
  if (!(seconds >= 0) || seconds > 1e15) {
    (void)snprintf(buffer, buffer_bytes, "unknown");
    return buffer;
  }
  if (seconds == 0)
    return format_significant(0, "s", buffer, buffer_bytes);
  if (seconds < 999.5e-6)
    return format_significant(seconds * 1e6, "us", buffer, buffer_bytes);
  if (seconds < 0.9995)
    return format_significant(seconds * 1e3, "ms", buffer, buffer_bytes);
  if (seconds < 59.95)
    return format_significant(seconds, "s", buffer, buffer_bytes);
  uint64_t whole = (uint64_t)(seconds + 0.5);
  if (whole < 3600)
    (void)snprintf(buffer, buffer_bytes, "%um %02us", (unsigned)(whole / 60), (unsigned)(whole % 60));
  else
    (void)snprintf(buffer, buffer_bytes, "%lluh %02um", (unsigned long long)(whole / 3600),
                   (unsigned)(whole % 3600 / 60));
  return buffer;
}

uint64_t flap_units_round_up(uint64_t a, uint64_t multiple) {
  flap_assert(multiple > 0);
  uint64_t rest = a % multiple;
  if (rest == 0)
    return a;
  flap_assert(a <= UINT64_MAX - (multiple - rest));
  return a + (multiple - rest);
}

bool flap_units_mul(uint64_t a, uint64_t b, uint64_t *product_out) {
  return !__builtin_mul_overflow(a, b, product_out);
}

bool flap_units_add(uint64_t a, uint64_t b, uint64_t *sum_out) {
  return !__builtin_add_overflow(a, b, sum_out);
}

uint64_t flap_units_now_ns(void) {
  struct timespec now;
  (void)clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}
