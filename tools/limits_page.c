/* The page of `flap bench all --html`: tiles, plots, tables; one file, no script, light and dark. */
#include "tools/limits.h"

#include "base/units.h"
#include "io/formats/durable.h"
#include "tools/limits_plot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char style[] =
    ":root{--bg:#f6f7f9;--card:#fff;--text:#1b2430;--dim:#5d6b7c;--line:#e3e8ee;--c0:#2f6fde;--c1:#d9662b;--c2:#1f9d6b;"
    "--c3:#8d51c9;--c4:#b8860b;--c5:#c43b6a}\n"
    "@media(prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2028;--text:#e5eaf0;--dim:#94a2b3;--line:#2b343f;"
    "--c0:#6ea2ff;--c1:#ff9a62;--c2:#4fd09b;--c3:#c292f5;--c4:#e0b64a;--c5:#ff7fa8}}\n"
    "*{box-sizing:border-box}\n"
    "body{margin:0;padding:24px 16px 48px;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"
    "\"Segoe UI\",Roboto,\"DejaVu Sans\",sans-serif}\n"
    "main,header{max-width:1180px;margin:0 auto}\n"
    "h1{font-size:24px;line-height:1.25;margin:0 0 4px}h2{font-size:18px;margin:32px 0 10px}\n"
    "h3{font-size:15px;margin:0 0 4px;overflow-wrap:anywhere}\n"
    ".sub,.note{color:var(--dim);margin:0 0 10px}.note{font-size:13px;line-height:1.4;overflow-wrap:anywhere}\n"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(max(146px,22%),1fr));gap:10px;margin-top:16px}\n"
    ".tile,.card{background:var(--card);border:1px solid var(--line);border-radius:10px}\n"
    ".tile{padding:10px 12px}.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums}\n"
    ".tile b small{font-size:13px;font-weight:500;color:var(--dim)}.tile span{color:var(--dim);font-size:13px}\n"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:14px}\n"
    ".card{padding:14px 16px;min-width:0}\n"
    "svg{display:block;width:100%;height:auto}\n"
    "svg text{font:12px system-ui,-apple-system,\"Segoe UI\",Roboto,\"DejaVu Sans\",sans-serif;fill:var(--dim)}\n"
    "svg text.label{fill:var(--text)}svg text.tick{font-size:11px;font-variant-numeric:tabular-nums}\n"
    ".grid{stroke:var(--line)}.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}\n"
    ".spread{stroke:currentColor;stroke-width:5;stroke-opacity:.28;stroke-linecap:round}\n"
    ".mark,.bar{fill:currentColor}.mark{stroke:var(--card);stroke-width:1}.peak{stroke:var(--text);stroke-width:2}\n"
    ".c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}"
    ".c5{color:var(--c5)}\n"
    ".legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 0;font-size:13px}\n"
    ".legend "
    "i{display:inline-block;width:10px;height:10px;border-radius:3px;background:currentColor;margin-right:6px}\n"
    "details{margin-top:8px;font-size:13px}summary{cursor:pointer;color:var(--dim)}\n"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;margin-top:6px;font-variant-numeric:tabular-"
    "nums}\n"
    "th,td{text-align:right;padding:3px 8px;border-bottom:1px solid var(--line);white-space:nowrap}\n"
    "th:first-child,td:first-child{text-align:left;padding-left:0}th{font-weight:600}td small{color:var(--dim)}\n";

/* ---- parts ----------------------------------------------------------------------------------------------- */

static void print_tile(FILE *out, double value, double unit, const char *unit_name, const char *what) {
  char number[32];
  if (value <= 0)
    return;
  flap_limits_number(value / unit, number, sizeof number);
  fprintf(out, "<div class=\"tile\"><b>%s <small>%s</small></b><span>%s</span></div>\n", number, unit_name, what);
}

static void print_tiles(FILE *out, const flap_machine *m) {
  const bool tera = m->flops_bf16 >= 1e12;
  const double unit = tera ? 1e12 : 1e9;
  const char *name = tera ? "TFLOP/s" : "GFLOP/s";
  fputs("<div class=\"tiles\">\n", out);
  print_tile(out, m->flops_bf16, unit, name, "products, bf16");
  print_tile(out, m->flops_f32, unit, name, "products, fp32");
  print_tile(out, m->device_bytes, 1e9, "GB/s", "memory of the device");
  print_tile(out, m->host_bytes, 1e9, "GB/s", "memory of the host");
  print_tile(out, m->h2d_bytes, 1e9, "GB/s", "host to device");
  print_tile(out, m->d2h_bytes, 1e9, "GB/s", "device to host");
  print_tile(out, m->disk_read_bytes, 1e9, "GB/s", "disk, read");
  print_tile(out, m->disk_write_bytes, 1e9, "GB/s", "disk, write");
  fputs("</div>\n", out);
}

static void print_row(FILE *out, const flap_limits_section *section, const flap_limits_row *row) {
  char number[32];
  fputs("<tr><td>", out);
  flap_plot_text(out, row->label);
  fputs("</td>", out);
  for (uint32_t s = 0; s < section->series_count; s++) {
    const flap_rate *cell = &row->cells[s];
    flap_limits_number(flap_limits_shown(section, cell->median), number, sizeof number);
    fprintf(out, "<td>%s", cell->rounds > 0 ? number : "-");
    if (cell->rounds > 1)
      fprintf(out, " <small>±%.0f%%</small>", 100 * flap_rate_spread(cell));
    fputs("</td>", out);
  }
  fputs("</tr>\n", out);
}

static void print_table(FILE *out, const flap_limits_section *section) {
  fprintf(out, "<details><summary>Figures, %s</summary><div class=\"scroll\"><table>\n<tr><th>",
          flap_limits_unit_name(section));
  flap_plot_text(out, section->x_name);
  fputs("</th>", out);
  for (uint32_t s = 0; s < section->series_count; s++) {
    fputs("<th>", out);
    flap_plot_text(out, section->series[s]);
    fputs("</th>", out);
  }
  fputs("</tr>\n", out);
  for (uint32_t r = 0; r < section->row_count; r++)
    print_row(out, section, &section->rows[r]);
  fputs("</table></div></details>\n", out);
}

static void print_section(FILE *out, const flap_limits_section *section) {
  const char *names[FLAP_LIMITS_SERIES_MAX];
  for (uint32_t s = 0; s < section->series_count; s++)
    names[s] = section->series[s];
  fputs("<section class=\"card\"><h3>", out);
  flap_plot_text(out, section->title);
  fputs("</h3>\n<p class=\"note\">", out);
  flap_plot_text(out, section->note);
  fputs("</p>\n", out);
  if (section->series_count > 1)
    flap_plot_legend(out, names, section->series_count);
  flap_plot_section(out, section);
  if (section->axis == FLAP_LIMITS_LOG)
    print_table(out, section);
  fputs("</section>\n", out);
}

static void print_group(FILE *out, const flap_limits *limits, const char *group, const char *heading) {
  bool any = false;
  for (uint32_t i = 0; i < limits->section_count; i++) {
    if (strcmp(limits->sections[i].group, group) != 0)
      continue;
    if (!any)
      fprintf(out, "<h2>%s</h2>\n<div class=\"cards\">\n", heading);
    any = true;
    print_section(out, &limits->sections[i]);
  }
  if (any)
    fputs("</div>\n", out);
}

static void print_roofline(FILE *out, const flap_limits *limits, const flap_machine *measured, const flap_plan *plan) {
  const char *names[FLAP_PLOT_LANES_MAX];
  fprintf(out,
          "<h2>%s</h2>\n<div class=\"cards\">\n<section class=\"card\"><h3>Roofline</h3>\n<p class=\"note\">%s</p>\n",
          plan != NULL ? "The machine, and a plan on it" : "The machine as a whole",
          plan != NULL
              ? "Slopes: what each lane can feed. Points: the plan's step, at the operations that it does per byte "
                "of that lane; the nearer to its slope, the busier the lane."
              : "What each lane can feed: to the right of where a slope meets the top, arithmetic is the limit. "
                "With --plan the lanes of a run are shown here.");
  flap_plot_legend(out, names, flap_plot_roofline_lanes(measured, names));
  flap_plot_roofline(out, measured, plan);
  fputs("</section>\n", out);
  for (uint32_t i = 0; i < limits->section_count; i++)
    if (strcmp(limits->sections[i].group, "plan") == 0)
      print_section(out, &limits->sections[i]);
  fputs("</div>\n", out);
}

static void print_page(FILE *out, const flap_limits *limits, const flap_machine *measured, const flap_plan *plan) {
  fputs("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<meta name=\"viewport\" "
        "content=\"width=device-width, initial-scale=1\"/>\n<meta name=\"color-scheme\" content=\"light dark\"/>\n"
        "<title>What this machine can do</title>\n<style>\n",
        out);
  fputs(style, out);
  fputs("</style>\n</head>\n<body>\n<header><h1>What this machine can do</h1>\n<p class=\"sub\">", out);
  flap_plot_text(out, measured->name);
  fprintf(out, ". Medians of %u rounds at most, with half of the distance between least and most.%s</p>\n",
          limits->effort.rounds, limits->quick ? " Measured quickly: expect more spread than without --quick." : "");
  print_tiles(out, measured);
  for (uint32_t i = 0; i < limits->note_count; i++) {
    fputs("<p class=\"note\">", out);
    flap_plot_text(out, limits->notes[i]);
    fputs("</p>\n", out);
  }
  fputs("</header>\n<main>\n", out);
  print_roofline(out, limits, measured, plan);
  print_group(out, limits, "gpu", "Kernels");
  print_group(out, limits, "pcie", "Between host and card");
  print_group(out, limits, "host", "Memory of the host");
  print_group(out, limits, "disk", "Disks");
  fputs("</main>\n</body>\n</html>\n", out);
}

flap_status flap_limits_write_page(const char *path, const flap_limits *limits, const flap_machine *measured,
                                   const flap_plan *plan) {
  char *text = NULL;
  size_t bytes = 0;
  FILE *out = open_memstream(&text, &bytes);
  if (out == NULL)
    return flap_error_set_os(errno, "%s: no memory for the page", path);
  print_page(out, limits, measured, plan);
  if (fclose(out) != 0) {
    free(text);
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for the page", path);
  }
  const flap_status status = flap_durable_write_file(path, text, bytes);
  free(text);
  return status;
}
