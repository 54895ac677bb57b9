#include "tools/limits_plot.h"

#include <math.h>
#include <string.h>

#define WIDTH 420.0
#define HEIGHT 250.0
#define LEFT 44.0
#define RIGHT 10.0
#define TOP 10.0
#define BOTTOM 38.0
#define LABELS_MAX 9u /* along x before every second one is left out */
#define BAR 13.0      /* high */
#define GROUP_LABEL 17.0
#define GROUP_GAP 7.0
#define BAR_TEXT 86.0 /* for the number behind a bar */

void flap_plot_text(FILE *out, const char *text) {
  for (; *text; text++)
    switch (*text) {
    case '&':
      fputs("&amp;", out);
      break;
    case '<':
      fputs("&lt;", out);
      break;
    case '>':
      fputs("&gt;", out);
      break;
    case '"':
      fputs("&quot;", out);
      break;
    default:
      fputc(*text, out);
    }
}

void flap_plot_legend(FILE *out, const char *const *names, uint32_t count) {
  fputs("<p class=\"legend\">", out);
  for (uint32_t i = 0; i < count; i++) {
    fprintf(out, "<span><i class=\"c%u\"></i>", i);
    flap_plot_text(out, names[i]);
    fputs("</span>", out);
  }
  fputs("</p>\n", out);
}

static void open_svg(FILE *out, double height, const char *title) {
  fprintf(out, "<svg viewBox=\"0 0 %.0f %.0f\" role=\"img\"><title>", WIDTH, height);
  flap_plot_text(out, title);
  fputs("</title>\n", out);
}

/* What pointing at a mark tells. */
static void print_tip(FILE *out, const flap_limits_section *section, uint32_t r, uint32_t s) {
  const flap_rate *cell = &section->rows[r].cells[s];
  char number[32];
  flap_limits_number(flap_limits_shown(section, cell->median), number, sizeof number);
  fputs("<title>", out);
  flap_plot_text(out, section->rows[r].label);
  fputs(", ", out);
  flap_plot_text(out, section->series[s]);
  fprintf(out, ": %s %s", number, flap_limits_unit_name(section));
  if (cell->rounds > 1)
    fprintf(out, " ± %.0f%% in %u rounds", 100 * flap_rate_spread(cell), cell->rounds);
  fputs("</title>", out);
}

static double largest_shown(const flap_limits_section *section) {
  double most = 0;
  for (uint32_t r = 0; r < section->row_count; r++)
    for (uint32_t s = 0; s < section->series_count; s++)
      if (section->rows[r].cells[s].rounds > 0) {
        most = fmax(most, flap_limits_shown(section, section->rows[r].cells[s].most));
        most = fmax(most, flap_limits_shown(section, section->rows[r].cells[s].median));
      }
  return most > 0 ? most : 1;
}

/* ---- lines ----------------------------------------------------------------------------------------------- */

/* 1, 2 or 5 times a power of ten: four to eight of them reach `most`. */
static double tick_step(double most) {
  const double raw = most / 5, power = pow(10, floor(log10(raw)));
  const double leading = raw / power;
  return power * (leading < 1.5 ? 1 : leading < 3.5 ? 2 : leading < 7.5 ? 5 : 10);
}

typedef struct frame {
  double x_least, x_most, y_most; /* x in doublings */
} frame;

static double at_x(const frame *f, double x) {
  const double span = f->x_most - f->x_least;
  const double share = span > 0 ? (log2(x) - f->x_least) / span : 0.5;
  return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16);
}

static double at_y(const frame *f, double y) {
  return HEIGHT - BOTTOM - y / f->y_most * (HEIGHT - TOP - BOTTOM);
}

static void print_axes(FILE *out, const flap_limits_section *section, const frame *f, double step) {
  for (double y = 0; y < f->y_most + step / 2; y += step) {
    fprintf(out, "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>", LEFT, WIDTH - RIGHT,
            at_y(f, y), at_y(f, y));
    fprintf(out, "<text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n", LEFT - 5, at_y(f, y) + 4,
            round(y / step) * step);
  }
  const uint32_t every = section->row_count > LABELS_MAX ? 3 : section->row_count > LABELS_MAX / 2 + 2 ? 2 : 1;
  for (uint32_t r = 0; r < section->row_count; r++) {
    if (r % every != 0)
      continue;
    fprintf(out, "<text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", at_x(f, section->rows[r].x),
            HEIGHT - BOTTOM + 15);
    flap_plot_text(out, section->rows[r].label);
    fputs("</text>\n", out);
  }
  fprintf(out, "<text class=\"name\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">", WIDTH - RIGHT, HEIGHT - 6);
  flap_plot_text(out, section->x_name);
  fprintf(out, "</text><text class=\"name\" x=\"%.1f\" y=\"%.1f\">%s</text>\n", 4.0, HEIGHT - 6,
          flap_limits_unit_name(section));
}

static void print_series(FILE *out, const flap_limits_section *section, const frame *f, uint32_t s) {
  fprintf(out, "<g class=\"c%u\"><polyline class=\"line\" points=\"", s);
  for (uint32_t r = 0; r < section->row_count; r++)
    if (section->rows[r].cells[s].rounds > 0)
      fprintf(out, "%.1f,%.1f ", at_x(f, section->rows[r].x),
              at_y(f, flap_limits_shown(section, section->rows[r].cells[s].median)));
  fputs("\"/>\n", out);
  for (uint32_t r = 0; r < section->row_count; r++) {
    const flap_rate *cell = &section->rows[r].cells[s];
    if (cell->rounds == 0)
      continue;
    const double x = at_x(f, section->rows[r].x);
    fprintf(out, "<line class=\"spread\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>", x, x,
            at_y(f, flap_limits_shown(section, cell->least)), at_y(f, flap_limits_shown(section, cell->most)));
    fprintf(out, "<circle class=\"mark\" cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\">", x,
            at_y(f, flap_limits_shown(section, cell->median)));
    print_tip(out, section, r, s);
    fputs("</circle>\n", out);
  }
  fputs("</g>\n", out);
}

static void plot_lines(FILE *out, const flap_limits_section *section) {
  const double most = largest_shown(section), step = tick_step(most);
  frame f = {.x_least = INFINITY, .x_most = -INFINITY, .y_most = ceil(most / step) * step};
  for (uint32_t r = 0; r < section->row_count; r++) {
    f.x_least = fmin(f.x_least, log2(section->rows[r].x));
    f.x_most = fmax(f.x_most, log2(section->rows[r].x));
  }
  open_svg(out, HEIGHT, section->title);
  print_axes(out, section, &f, step);
  for (uint32_t s = 0; s < section->series_count; s++)
    print_series(out, section, &f, s);
  fputs("</svg>\n", out);
}

/* ---- bars ------------------------------------------------------------------------------------------------ */

static void plot_bars(FILE *out, const flap_limits_section *section) {
  const double group = GROUP_LABEL + BAR * section->series_count + GROUP_GAP, most = largest_shown(section);
  open_svg(out, group * section->row_count + 4, section->title);
  for (uint32_t r = 0; r < section->row_count; r++) {
    const double top = group * r;
    fprintf(out, "<text class=\"label\" x=\"2\" y=\"%.1f\">", top + GROUP_LABEL - 5);
    flap_plot_text(out, section->rows[r].label);
    fputs("</text>\n", out);
    for (uint32_t s = 0; s < section->series_count; s++) {
      const flap_rate *cell = &section->rows[r].cells[s];
      const double y = top + GROUP_LABEL + BAR * s;
      if (cell->rounds == 0) {
        fprintf(out, "<text class=\"tick\" x=\"2\" y=\"%.1f\">not measured</text>\n", y + BAR - 3);
        continue;
      }
      const double shown = flap_limits_shown(section, cell->median);
      const double width = fmax(1, shown / most * (WIDTH - BAR_TEXT));
      char number[32];
      flap_limits_number(shown, number, sizeof number);
      fprintf(out, "<rect class=\"c%u bar\" x=\"2\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" rx=\"2\">", s, y, width,
              BAR - 2);
      print_tip(out, section, r, s);
      fprintf(out, "</rect><text class=\"tick\" x=\"%.1f\" y=\"%.1f\">%s", width + 7, y + BAR - 3, number);
      if (cell->rounds > 1)
        fprintf(out, " ±%.0f%%", 100 * flap_rate_spread(cell));
      fputs("</text>\n", out);
    }
  }
  fputs("</svg>\n", out);
}

void flap_plot_section(FILE *out, const flap_limits_section *section) {
  if (section->axis == FLAP_LIMITS_LOG)
    plot_lines(out, section);
  else
    plot_bars(out, section);
}

/* ---- roofline -------------------------------------------------------------------------------------------- */

/* Both axes in decades. */
typedef struct roofs {
  double x_least, x_most, y_least, y_most;
} roofs;

static double roof_x(const roofs *f, double x) {
  return LEFT + (log10(x) - f->x_least) / (f->x_most - f->x_least) * (WIDTH - LEFT - RIGHT);
}

static double roof_y(const roofs *f, double y) {
  return HEIGHT - BOTTOM - (log10(y) - f->y_least) / (f->y_most - f->y_least) * (HEIGHT - TOP - BOTTOM);
}

/* "10 G", "100 T". */
static void decade_name(int decade, char *text, size_t bytes) {
  static const char *const prefixes[] = {"", " k", " M", " G", " T", " P", " E"};
  const int thousands = decade < 0 ? 0 : decade / 3 > 6 ? 6 : decade / 3;
  (void)snprintf(text, bytes, "%g%s", pow(10, decade - 3 * thousands), prefixes[thousands]);
}

static void print_decades(FILE *out, const roofs *f) {
  char name[16];
  const int x_every = f->x_most - f->x_least > 7 ? 2 : 1;
  for (int d = (int)f->x_least; d <= (int)f->x_most; d += x_every) {
    const double x = roof_x(f, pow(10, d));
    decade_name(d, name, sizeof name);
    fprintf(out,
            "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/><text class=\"tick\" x=\"%.1f\" "
            "y=\"%.1f\" text-anchor=\"middle\">%s</text>\n",
            x, x, TOP, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 15, name);
  }
  for (int d = (int)f->y_least; d <= (int)f->y_most; d++) {
    const double y = roof_y(f, pow(10, d));
    decade_name(d, name, sizeof name);
    fprintf(out,
            "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/><text class=\"tick\" x=\"%.1f\" "
            "y=\"%.1f\" text-anchor=\"end\">%s</text>\n",
            LEFT, WIDTH - RIGHT, y, y, LEFT - 5, y + 4, name);
  }
  fprintf(out,
          "<text class=\"name\" x=\"4\" y=\"%.1f\">FLOP/s</text><text class=\"name\" x=\"%.1f\" y=\"%.1f\" "
          "text-anchor=\"end\">operations per byte of the lane</text>\n",
          HEIGHT - 6, WIDTH - RIGHT, HEIGHT - 6);
}

/* The slope of a lane up to the peak, from where it enters the plot. */
static void print_roof(FILE *out, const roofs *f, uint32_t colour, double rate, double peak, const char *name) {
  const double left = fmax(pow(10, f->x_least), pow(10, f->y_least) / rate), ridge = peak / rate;
  fprintf(out,
          "<g class=\"c%u\"><line class=\"line\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"><title>%s: %.4g GB/s",
          colour, roof_x(f, left), roof_y(f, left * rate), roof_x(f, ridge), roof_y(f, peak), name, rate / 1e9);
  fprintf(out, "; from %.4g operations per byte on, arithmetic is the limit</title></line></g>\n", ridge);
}

typedef struct roof_lane {
  const char *name;
  double rate, plan_bytes;
} roof_lane;

static uint32_t list_lanes(const flap_machine *machine, const flap_plan *plan, roof_lane *lanes) {
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_HOST] = machine->host_bytes,
                                         [FLAP_LANE_H2D] = machine->h2d_bytes,
                                         [FLAP_LANE_D2H] = machine->d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = machine->disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = machine->disk_write_bytes};
  uint32_t count = 0;
  lanes[count++] = (roof_lane){"memory of the device", machine->device_bytes, 0};
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    if (rates[lane] > 0)
      lanes[count++] = (roof_lane){flap_pager_lane_name((flap_lane)lane), rates[lane],
                                   plan != NULL ? (double)plan->lane_bytes[lane] : 0};
  return count;
}

/* Points of lanes with about the same bytes lie on each other: later ones are smaller. */
static void print_points(FILE *out, const roofs *f, const roof_lane *lanes, uint32_t count, double work, double reached,
                         double peak) {
  for (uint32_t i = 0; i < count && reached > 0; i++) {
    if (lanes[i].plan_bytes <= 0)
      continue;
    const double x = work / lanes[i].plan_bytes, share = reached / fmin(peak, x * lanes[i].rate);
    fprintf(out,
            "<g class=\"c%u\"><circle class=\"mark\" cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\"><title>%s in the plan: %.4g "
            "operations per byte, at %.0f%% of this roof</title></circle></g>\n",
            i, roof_x(f, x), roof_y(f, reached), 7 - 0.9 * i, lanes[i].name, x, 100 * share);
  }
}

uint32_t flap_plot_roofline_lanes(const flap_machine *machine, const char *names_out[FLAP_PLOT_LANES_MAX]) {
  roof_lane lanes[FLAP_PLOT_LANES_MAX];
  const uint32_t count = list_lanes(machine, NULL, lanes);
  for (uint32_t i = 0; i < count; i++)
    names_out[i] = lanes[i].name;
  return count;
}

void flap_plot_roofline(FILE *out, const flap_machine *machine, const flap_plan *plan) {
  roof_lane lanes[FLAP_PLOT_LANES_MAX];
  const uint32_t count = list_lanes(machine, plan, lanes);
  const bool f32 = plan != NULL && plan->dtype == FLAP_F32;
  const double peak = f32 ? machine->flops_f32 : machine->flops_bf16;
  /* The products of the step, each once: what the bound counts, at the rate that it counts with. */
  const double once_seconds = plan != NULL ? 1.5 * plan->bound_backward_seconds : 0;
  const double work = plan != NULL ? once_seconds * (f32 ? plan->machine.flops_f32 : plan->machine.flops_bf16) : 0;
  const double reached = plan != NULL && plan->step_seconds > 0 ? work / plan->step_seconds : 0;
  double x_least = INFINITY, x_most = 0;
  for (uint32_t i = 0; i < count; i++) {
    x_least = fmin(x_least, peak / lanes[i].rate);
    x_most = fmax(x_most, fmax(peak / lanes[i].rate, lanes[i].plan_bytes > 0 ? work / lanes[i].plan_bytes : 0));
  }
  const double y_least = reached > 0 ? fmin(reached / 3, peak / 1000) : peak / 1000;
  const roofs f = {floor(log10(x_least / 20)), ceil(log10(x_most * 2)), floor(log10(y_least)), ceil(log10(peak * 1.2))};
  open_svg(out, HEIGHT, "Roofline");
  print_decades(out, &f);
  fprintf(out,
          "<line class=\"peak\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"><title>%s products: %.4g "
          "TFLOP/s</title></line>\n",
          roof_x(&f, peak / lanes[0].rate), WIDTH - RIGHT, roof_y(&f, peak), roof_y(&f, peak), f32 ? "fp32" : "bf16",
          peak / 1e12);
  for (uint32_t i = 0; i < count; i++)
    print_roof(out, &f, i, lanes[i].rate, peak, lanes[i].name);
  print_points(out, &f, lanes, count, work, reached, peak);
  fputs("</svg>\n", out);
}
