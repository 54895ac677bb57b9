#include "tools/limits.h"

#include "base/assert.h"
#include "base/units.h"
#include "io/formats/json_file.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ROUNDS 5u
#define ROUND_NS (30u * 1000 * 1000)
#define QUICK_ROUNDS 3u
#define QUICK_ROUND_NS (6u * 1000 * 1000)
#define LINE 100u
#define TERA_FROM 1e12 /* FLOP/s of a section's best that are told in 10^12 */

/* ---- filling --------------------------------------------------------------------------------------------- */

flap_limits *flap_limits_new(FILE *out, bool quick) {
  flap_limits *limits = calloc(1, sizeof *limits);
  if (limits == NULL)
    return NULL;
  limits->out = out;
  limits->quick = quick;
  limits->effort = quick ? (flap_rate_effort){.rounds = QUICK_ROUNDS, .round_ns = QUICK_ROUND_NS}
                         : (flap_rate_effort){.rounds = ROUNDS, .round_ns = ROUND_NS};
  return limits;
}

/* JSON holds UTF-8 alone, and so does the page. */
static void clean(char *text) {
  for (char *c = text; *c; c++)
    if ((unsigned char)*c < 0x20 || *c == 0x7f)
      *c = '?';
  json_t *value = json_string(text);
  if (value == NULL)
    for (char *c = text; *c; c++)
      if ((unsigned char)*c >= 0x80)
        *c = '?';
  json_decref(value);
}

void flap_limits_text(char *to, size_t bytes, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  (void)vsnprintf(to, bytes, format, arguments);
  va_end(arguments);
  clean(to);
}

flap_limits_section *flap_limits_begin(flap_limits *limits, const char *group, const char *key, flap_limits_axis axis,
                                       flap_limits_unit unit, const char *x_name) {
  flap_assert(limits->section_count < FLAP_LIMITS_SECTIONS_MAX);
  flap_limits_section *section = &limits->sections[limits->section_count++];
  *section = (flap_limits_section){.group = group, .axis = axis, .unit = unit, .x_name = x_name};
  flap_limits_text(section->key, sizeof section->key, "%s", key);
  return section;
}

void flap_limits_series(flap_limits_section *section, const char *name) {
  flap_assert(section->series_count < FLAP_LIMITS_SERIES_MAX);
  flap_limits_text(section->series[section->series_count++], sizeof section->series[0], "%s", name);
}

flap_limits_row *flap_limits_row_add(flap_limits_section *section, double x, const char *format, ...) {
  flap_assert(section->row_count < FLAP_LIMITS_ROWS_MAX);
  flap_limits_row *row = &section->rows[section->row_count++];
  va_list arguments;
  va_start(arguments, format);
  (void)vsnprintf(row->label, sizeof row->label, format, arguments);
  va_end(arguments);
  clean(row->label);
  row->x = x;
  return row;
}

flap_limits_row *flap_limits_row_bytes(flap_limits_section *section, uint64_t bytes) {
  if (bytes % FLAP_MIB == 0)
    return flap_limits_row_add(section, (double)bytes, "%llu MiB", (unsigned long long)(bytes / FLAP_MIB));
  return flap_limits_row_add(section, (double)bytes, "%llu KiB", (unsigned long long)(bytes / FLAP_KIB));
}

void flap_limits_end(flap_limits *limits, const flap_limits_section *section) {
  if (limits->out == NULL)
    return;
  flap_limits_print(limits->out, section);
  (void)fflush(limits->out);
}

void flap_limits_note_failure(flap_limits *limits, const char *part) {
  if (limits->note_count == FLAP_LIMITS_NOTES_MAX)
    return;
  char *note = limits->notes[limits->note_count++];
  flap_limits_text(note, sizeof limits->notes[0], "%s: not measured: %s", part, flap_error_message());
  if (limits->out != NULL)
    fprintf(limits->out, "%s\n\n", note);
}

/* ---- numbers --------------------------------------------------------------------------------------------- */

static bool in_tera(const flap_limits_section *section) {
  for (uint32_t r = 0; r < section->row_count; r++)
    for (uint32_t s = 0; s < section->series_count; s++)
      if (section->rows[r].cells[s].median >= TERA_FROM)
        return true;
  return false;
}

const char *flap_limits_unit_name(const flap_limits_section *section) {
  switch (section->unit) {
  case FLAP_LIMITS_BYTES:
    return "GB/s";
  case FLAP_LIMITS_FLOPS:
    return in_tera(section) ? "TFLOP/s" : "GFLOP/s";
  case FLAP_LIMITS_SECONDS_PER_GIB:
    return "seconds per GiB";
  case FLAP_LIMITS_SECONDS:
    break;
  }
  return "seconds";
}

double flap_limits_shown(const flap_limits_section *section, double value) {
  switch (section->unit) {
  case FLAP_LIMITS_BYTES:
    return value / 1e9;
  case FLAP_LIMITS_FLOPS:
    return value / (in_tera(section) ? 1e12 : 1e9);
  case FLAP_LIMITS_SECONDS_PER_GIB:
    return value > 0 ? (double)FLAP_GIB / value : 0;
  case FLAP_LIMITS_SECONDS:
    break;
  }
  return value;
}

void flap_limits_number(double value, char *text, size_t bytes) {
  (void)snprintf(text, bytes, "%.*f", value >= 999.95 ? 0 : value >= 99.995 ? 1 : value >= 9.9995 ? 2 : 3, value);
}

/* ---- the table ------------------------------------------------------------------------------------------- */

static int label_width(const flap_limits_section *section) {
  size_t width = strlen(section->x_name);
  for (uint32_t r = 0; r < section->row_count; r++)
    width = strlen(section->rows[r].label) > width ? strlen(section->rows[r].label) : width;
  return (int)width + 1;
}

static int column_width(const flap_limits_section *section, uint32_t series) {
  const int name = (int)strlen(section->series[series]) + 2;
  return name > 14 ? name : 14;
}

static void print_cell(FILE *out, const flap_limits_section *section, const flap_rate *cell, int width) {
  char number[32], text[64] = "-";
  if (cell->rounds > 0) {
    flap_limits_number(flap_limits_shown(section, cell->median), number, sizeof number);
    (void)snprintf(text, sizeof text, "%s", number);
    if (cell->rounds > 1)
      (void)snprintf(text, sizeof text, "%s ±%2.0f%%", number, 100 * flap_rate_spread(cell));
  }
  /* "±" is two bytes and one column. */
  fprintf(out, "%*s", width + (cell->rounds > 1 ? 1 : 0), text);
}

/* In lines of at most LINE columns. */
static void print_note(FILE *out, const char *note) {
  size_t column = 0;
  while (*note) {
    const size_t word = strcspn(note, " ");
    if (column > 0 && column + 1 + word > LINE) {
      fputc('\n', out);
      column = 0;
    }
    column += (size_t)fprintf(out, "%s%.*s", column > 0 ? " " : "", (int)word, note);
    note += word;
    note += strspn(note, " ");
  }
}

void flap_limits_print(FILE *out, const flap_limits_section *section) {
  const char *term = getenv("TERM");
  const bool styled = isatty(fileno(out)) == 1 && term && strcmp(term, "dumb") != 0 && !getenv("NO_COLOR");
  const int label = label_width(section);
  fprintf(out, "%s%s%s, %s\n", styled ? "\033[1m" : "", section->title, styled ? "\033[0m" : "",
          flap_limits_unit_name(section));
  fputs(styled ? "\033[2m" : "", out);
  print_note(out, section->note);
  fputs(styled ? "\033[0m\n" : "\n", out);
  fprintf(out, "%-*s", label, section->x_name);
  for (uint32_t s = 0; s < section->series_count; s++)
    fprintf(out, "%*s", column_width(section, s), section->series[s]);
  fputc('\n', out);
  for (uint32_t r = 0; r < section->row_count; r++) {
    fprintf(out, "%-*s", label, section->rows[r].label);
    for (uint32_t s = 0; s < section->series_count; s++)
      print_cell(out, section, &section->rows[r].cells[s], column_width(section, s));
    fputc('\n', out);
  }
  fputc('\n', out);
}

/* ---- JSON ------------------------------------------------------------------------------------------------ */

static void put(json_t *object, const char *key, json_t *value) {
  (void)json_object_set_new(object, key, value);
}

static json_t *rate_json(const flap_rate *rate) {
  if (rate->rounds == 0)
    return json_null();
  json_t *object = json_object();
  put(object, "median", flap_json_real(rate->median));
  put(object, "least", flap_json_real(rate->least));
  put(object, "most", flap_json_real(rate->most));
  put(object, "rounds", json_integer((json_int_t)rate->rounds));
  return object;
}

static json_t *section_json(const flap_limits_section *section) {
  static const char *const units[] = {[FLAP_LIMITS_BYTES] = "bytes per second",
                                      [FLAP_LIMITS_FLOPS] = "operations per second",
                                      [FLAP_LIMITS_SECONDS_PER_GIB] = "bytes per second",
                                      [FLAP_LIMITS_SECONDS] = "seconds"};
  json_t *object = json_object(), *series = json_array(), *rows = json_array();
  put(object, "group", json_string(section->group));
  put(object, "key", json_string(section->key));
  put(object, "title", json_string(section->title));
  put(object, "note", json_string(section->note));
  put(object, "x", json_string(section->x_name));
  put(object, "unit", json_string(units[section->unit]));
  for (uint32_t s = 0; s < section->series_count; s++)
    (void)json_array_append_new(series, json_string(section->series[s]));
  for (uint32_t r = 0; r < section->row_count; r++) {
    const flap_limits_row *row = &section->rows[r];
    json_t *entry = json_object(), *values = json_array();
    for (uint32_t s = 0; s < section->series_count; s++)
      (void)json_array_append_new(values, rate_json(&row->cells[s]));
    put(entry, "label", json_string(row->label));
    put(entry, "x", flap_json_real(row->x));
    put(entry, "values", values);
    (void)json_array_append_new(rows, entry);
  }
  put(object, "series", series);
  put(object, "rows", rows);
  return object;
}

json_t *flap_limits_json(const flap_limits *limits) {
  json_t *sections = json_array();
  for (uint32_t i = 0; i < limits->section_count; i++)
    (void)json_array_append_new(sections, section_json(&limits->sections[i]));
  return sections;
}
