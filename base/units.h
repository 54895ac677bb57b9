/* Sizes, counts and times as people write and read them. */
#ifndef FLAP_BASE_UNITS_H
#define FLAP_BASE_UNITS_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_KIB ((uint64_t)1 << 10)
#define FLAP_MIB ((uint64_t)1 << 20)
#define FLAP_GIB ((uint64_t)1 << 30)
#define FLAP_TIB ((uint64_t)1 << 40)

/* "24GiB", "1.5 GB", "512 KiB", "4096" (bytes), "64k" is refused (k of what?). Units: B, KB, MB, GB, TB
 * (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024), any case; a blank may stand before the unit. A fraction
 * is rounded down to whole bytes: 1.1GiB. What is negative, empty, past 2^62, a fraction of bytes (1.5B) or of one byte
 * is refused: FLAP_INVALID, with the text quoted. */
FLAP_CHECKED flap_status flap_units_parse_bytes(const char *text, uint64_t *bytes_out);

/* "7.00 MiB", "24.0 GiB", "512 B": three significant digits, into `buffer` (at least 16 bytes), returned. */
#define FLAP_UNITS_TEXT_MAX 24
char *flap_units_format_bytes(uint64_t bytes, char *buffer, size_t buffer_bytes);
/* "5.36 M", "1.36 B", "812". */
char *flap_units_format_count(uint64_t count, char *buffer, size_t buffer_bytes);
/* "1h 03m", "4m 07s", "12.3 s", "850 ms". */
char *flap_units_format_seconds(double seconds, char *buffer, size_t buffer_bytes);

/* a rounded up to a multiple of `multiple` (> 0); asserts on overflow. */
uint64_t flap_units_round_up(uint64_t a, uint64_t multiple);
/* Products and sums that must not wrap: false on overflow. */
bool flap_units_mul(uint64_t a, uint64_t b, uint64_t *product_out);
bool flap_units_add(uint64_t a, uint64_t b, uint64_t *sum_out);

/* Monotonic wall time in nanoseconds. */
uint64_t flap_units_now_ns(void);

#ifdef __cplusplus
}
#endif
#endif
