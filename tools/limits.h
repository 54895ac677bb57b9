/* What this machine can do, as tables: the sections that `flap bench` fills, prints and draws.
 *
 * Role: one form for every measurement, so that a table, JSON and a plot are each written once. A section is one
 * question ("by size of request"); its rows are where it was asked (a size, a number of threads, a shape) and its
 * series what was asked (read, write). Rates are medians with their spread.
 */
#ifndef FLAP_TOOLS_LIMITS_H
#define FLAP_TOOLS_LIMITS_H

#include "base/rate.h"
#include "engine/engine.h"
#include "io/block/block.h"

#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_LIMITS_SERIES_MAX 6u
#define FLAP_LIMITS_ROWS_MAX 16u
#define FLAP_LIMITS_SECTIONS_MAX 64u
#define FLAP_LIMITS_NOTES_MAX 8u

typedef enum flap_limits_unit {
  FLAP_LIMITS_BYTES,           /* rates in bytes per second, shown in 10^9 */
  FLAP_LIMITS_FLOPS,           /* operations per second, in 10^12 on a card, in 10^9 on a CPU */
  FLAP_LIMITS_SECONDS_PER_GIB, /* rates in bytes per second, shown as the seconds that a GiB takes */
  FLAP_LIMITS_SECONDS          /* the cells are seconds */
} flap_limits_unit;

/* How rows are arranged in a plot. */
typedef enum flap_limits_axis {
  FLAP_LIMITS_LOG,  /* by x, each doubling as wide */
  FLAP_LIMITS_NAMES /* a group of bars for each row */
} flap_limits_axis;

typedef struct flap_limits_row {
  char label[48];
  double x;
  flap_rate cells[FLAP_LIMITS_SERIES_MAX]; /* rounds 0: not measured */
} flap_limits_row;

typedef struct flap_limits_section {
  const char *group; /* "disk", "pcie", "host", "gpu", "plan" */
  char key[48];      /* for programs, unique: "disk_request_bytes" */
  char title[160];
  char note[320];     /* what exactly was measured */
  const char *x_name; /* "request" */
  flap_limits_axis axis;
  flap_limits_unit unit;
  uint32_t series_count, row_count;
  char series[FLAP_LIMITS_SERIES_MAX][32];
  flap_limits_row rows[FLAP_LIMITS_ROWS_MAX];
} flap_limits_section;

typedef struct flap_limits {
  FILE *out; /* where each section is printed when it is ended; NULL: nowhere */
  flap_rate_effort effort;
  bool quick;
  uint32_t note_count, section_count;
  char notes[FLAP_LIMITS_NOTES_MAX][256]; /* what was not measured, and why */
  flap_limits_section sections[FLAP_LIMITS_SECTIONS_MAX];
} flap_limits;

/* Large: the caller frees it. NULL for lack of memory. */
flap_limits *flap_limits_new(FILE *out, bool quick);

/* A new section, empty; asserts that there is room. `key` and `title` are formatted by the caller. */
flap_limits_section *flap_limits_begin(flap_limits *limits, const char *group, const char *key, flap_limits_axis axis,
                                       flap_limits_unit unit, const char *x_name);
/* Printf into a field of a section, without control characters, cut to its size. */
void flap_limits_text(char *to, size_t bytes, const char *format, ...) FLAP_PRINTF(3, 4);
void flap_limits_series(flap_limits_section *section, const char *name);
/* A row for so many bytes: "16 KiB". */
flap_limits_row *flap_limits_row_bytes(flap_limits_section *section, uint64_t bytes);
flap_limits_row *flap_limits_row_add(flap_limits_section *section, double x, const char *format, ...) FLAP_PRINTF(3, 4);
/* Prints the section where that was wished for. */
void flap_limits_end(flap_limits *limits, const flap_limits_section *section);
/* What a part could not do, from the error record. */
void flap_limits_note_failure(flap_limits *limits, const char *part);

/* A cell as it is shown, and the unit's name, and the largest number that a cell of the section shows. */
double flap_limits_shown(const flap_limits_section *section, double value);
const char *flap_limits_unit_name(const flap_limits_section *section);
/* "1.234", "12.34", "123.4": four digits. */
void flap_limits_number(double value, char *text, size_t bytes);

void flap_limits_print(FILE *out, const flap_limits_section *section);
/* An array of the sections, in base units (bytes, operations, seconds), for the caller to own. */
struct json_t *flap_limits_json(const flap_limits *limits);

/* ---- what is measured ------------------------------------------------------------------------------------ */

/* Each folder by itself and, of several, all together. */
FLAP_CHECKED flap_status flap_limits_disk(flap_limits *limits, const char *const *paths, uint32_t path_count,
                                          flap_block_backend backend);
/* `threads` 0: all cores. */
FLAP_CHECKED flap_status flap_limits_host(flap_limits *limits, uint32_t threads);
/* Kernels of the device, cpu or cuda. `vram_bytes` 0: the default, below 4 GiB. */
FLAP_CHECKED flap_status flap_limits_gpu(flap_limits *limits, flap_device_kind kind, uint32_t threads,
                                         uint64_t vram_bytes);
/* Copies of the cuda device. FLAP_UNSUPPORTED without CUDA, FLAP_NOT_FOUND without a GPU. */
FLAP_CHECKED flap_status flap_limits_pcie(flap_limits *limits, uint64_t vram_bytes);
/* For how long each lane of a plan is busy, and for how long it would be at the rates of the profile. */
void flap_limits_plan(flap_limits *limits, const flap_plan *plan, const flap_machine *measured);

/* The whole as one HTML page that needs nothing else. `plan` may be NULL. FLAP_NO_MEMORY, or what the file system says.
 */
FLAP_CHECKED flap_status flap_limits_write_page(const char *path, const flap_limits *limits,
                                                const flap_machine *measured, const flap_plan *plan);

#ifdef __cplusplus
}
#endif
#endif
