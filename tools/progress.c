#include "tools/progress.h"

#include "tools/print_plan.h"
#include "tools/text.h"

#include <math.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define LINE_BYTES 384
#define STALLS_BYTES 128
#define STALL_SHARE_MIN 0.01
#define LESS_MAX 4

static int terminal_columns(FILE *out) {
  struct winsize size;
  if (ioctl(fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
    return size.ws_col;
  return 80;
}

void flap_progress_init(flap_progress *progress, FILE *out) {
  memset(progress, 0, sizeof *progress);
  progress->out = out;
  progress->terminal = isatty(fileno(out)) == 1;
}

void flap_progress_end_line(flap_progress *progress) {
  if (progress->line_open)
    fputc('\n', progress->out);
  progress->line_open = false;
  (void)fflush(progress->out);
}

/* ---- callbacks ------------------------------------------------------------------------------------------- */

static void on_planned(void *context, const flap_plan *plan, const char *disk_backend) {
  flap_progress *progress = context;
  progress->plan = *plan;
  progress->planned = true;
  flap_progress_end_line(progress);
  fprintf(progress->out, "%s parameters (state %s) on %s\n", flap_text_count(plan->parameters).text,
          flap_text_bytes(plan->state_bytes).text, plan->device_name);
  fprintf(progress->out, "vram %s of %s, ram %s of %s, disk %s of %s (%s)\n", flap_text_bytes(plan->vram_bytes).text,
          flap_text_bytes(plan->vram_budget).text, flap_text_bytes(plan->ram_bytes).text,
          flap_text_bytes(plan->ram_budget).text, flap_text_bytes(plan->disk_bytes).text,
          flap_text_bytes(plan->disk_budget).text, disk_backend ? disk_backend : "none");
  fprintf(progress->out, "expected %s a step, %s tokens/s\n", flap_text_seconds(plan->step_seconds).text,
          flap_text_rate(plan->tokens_per_second).text);
  (void)fflush(progress->out);
}

static void on_prepared(void *context, uint64_t train_tokens, uint64_t heldout_tokens, uint64_t sequences,
                        uint64_t resumed_step) {
  flap_progress *progress = context;
  flap_progress_end_line(progress);
  fprintf(progress->out, "data: %s training tokens in %s sequences, %s held out\n",
          flap_text_grouped(train_tokens).text, flap_text_grouped(sequences).text,
          flap_text_grouped(heldout_tokens).text);
  if (resumed_step > 0)
    fprintf(progress->out, "continuing after step %llu\n", (unsigned long long)resumed_step);
  (void)fflush(progress->out);
}

/* The lanes that compute rested for at least a hundredth of the step, with their shares of it. */
static void format_stalls(const flap_step_report *report, char text[STALLS_BYTES]) {
  size_t length = 0;
  text[0] = '\0';
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    const double seconds = report->stall_seconds[lane];
    if (!(seconds > 0 && seconds >= STALL_SHARE_MIN * report->step_seconds) || length >= STALLS_BYTES)
      continue;
    length +=
        (size_t)snprintf(text + length, STALLS_BYTES - length, "%s %s %s", length == 0 ? "  waits" : ",",
                         flap_pager_lane_name((flap_lane)lane), flap_text_percent(seconds, report->step_seconds).text);
  }
}

/* `less` of it: without the learning rate, then the norm, the stalls, the share of the bound. */
static int format_step(const flap_step_report *report, int less, char line[LINE_BYTES]) {
  char scale[48] = "", norm[32] = "", rate[32] = "", share[48] = "", stalls[STALLS_BYTES] = "";
  if (report->loss_scale > 0)
    (void)snprintf(scale, sizeof scale, "  scale %.9g%s", report->loss_scale, report->skipped ? ": skipped" : "");
  if (less < 1)
    (void)snprintf(rate, sizeof rate, "  lr %.3g", report->learning_rate);
  if (less < 2)
    (void)snprintf(norm, sizeof norm, "  norm %.3g", fabs(report->grad_norm));
  if (less < 3)
    format_stalls(report, stalls);
  if (less < LESS_MAX && !report->defers_update)
    (void)snprintf(share, sizeof share, "  %s of bound",
                   flap_text_percent(report->bound_seconds, report->step_seconds).text);
  /* Neither loss nor norm is below 0; the sign of a NaN, in a step that is skipped, would say nothing. */
  return snprintf(line, LINE_BYTES, "step %llu/%llu  loss %.4f%s%s%s  %s tok/s%s%s  ETA %s",
                  (unsigned long long)report->step, (unsigned long long)report->max_steps, fabs(report->loss), norm,
                  rate, scale, flap_text_rate(report->tokens_per_second).text, share, stalls,
                  flap_text_seconds(report->eta_seconds).text);
}

static void on_stepped(void *context, const flap_step_report *report) {
  flap_progress *progress = context;
  char line[LINE_BYTES];
  if (!progress->terminal && !report->logged)
    return;
  int length = format_step(report, 0, line);
  if (!progress->terminal) {
    fprintf(progress->out, "%s\n", line);
  } else {
    const int columns = terminal_columns(progress->out) - 1; /* a line that wraps cannot be rewritten */
    for (int less = 1; length > columns && less <= LESS_MAX; less++)
      length = format_step(report, less, line);
    if (length > columns && columns >= 0)
      line[columns < LINE_BYTES ? columns : LINE_BYTES - 1] = '\0';
    fprintf(progress->out, "\r%s\033[K", line);
    progress->line_open = true;
  }
  (void)fflush(progress->out);
}

void flap_progress_print_eval(FILE *out, const char *title, const flap_eval_report *report) {
  fprintf(out, "%s: loss %.4f nats per token (perplexity %.4g), unigram entropy %.4f, %s tokens, in %s\n", title,
          report->loss, exp(report->loss), report->unigram_entropy, flap_text_grouped(report->tokens).text,
          flap_text_seconds(report->seconds).text);
}

static void on_evaluated(void *context, const flap_eval_report *report) {
  flap_progress *progress = context;
  char title[64];
  flap_progress_end_line(progress);
  (void)snprintf(title, sizeof title, "held-out after step %llu", (unsigned long long)report->step);
  flap_progress_print_eval(progress->out, title, report);
  (void)fflush(progress->out);
}

static void on_saved(void *context, const char *folder, double seconds) {
  flap_progress *progress = context;
  flap_progress_end_line(progress);
  fprintf(progress->out, "saved %s in %s\n", folder, flap_text_seconds(seconds).text);
  (void)fflush(progress->out);
}

flap_observer flap_progress_observer(flap_progress *progress) {
  return (flap_observer){.context = progress,
                         .planned = on_planned,
                         .prepared = on_prepared,
                         .stepped = on_stepped,
                         .evaluated = on_evaluated,
                         .saved = on_saved};
}

/* ---- summary --------------------------------------------------------------------------------------------- */

static void print_peaks(FILE *out, const flap_plan *plan, const flap_peaks *peaks) {
  const struct {
    const char *name;
    uint64_t budget, planned, peak;
  } rows[] = {{"vram", plan->vram_budget, plan->vram_bytes, peaks->vram_bytes},
              {"ram", plan->ram_budget, plan->ram_bytes, peaks->ram_bytes},
              {"disk", plan->disk_budget, plan->disk_bytes, peaks->disk_bytes}};
  fprintf(out, "\n%-12s%14s%14s%14s%10s\n", "tier", "budget", "planned", "peak", "share");
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
    fprintf(out, "%-12s%14s%14s%14s%10s\n", rows[i].name, flap_text_bytes(rows[i].budget).text,
            flap_text_bytes(rows[i].planned).text, flap_text_bytes(rows[i].peak).text,
            flap_text_percent((double)rows[i].peak, (double)rows[i].budget).text);
  fprintf(out, "%-12s%14s%14s%14s\n", "process", "", flap_text_bytes(plan->process_bytes).text,
          flap_text_bytes(peaks->process_bytes).text);
}

static void print_lanes(FILE *out, const flap_plan *plan, const uint64_t *bytes) {
  double parameters = (double)plan->parameters;
  fprintf(out, "\n%-12s%16s%16s%16s   bytes per parameter and step\n", "lane", "moved", "planned", "bound");
  for (int i = 0; i < FLAP_LANE_COUNT; i++)
    fprintf(out, "%-12s%16s%16s%16s\n", flap_pager_lane_name((flap_lane)i),
            flap_text_ratio((double)bytes[i], parameters, 2).text,
            flap_text_ratio((double)plan->lane_bytes[i], parameters, 2).text,
            flap_text_ratio((double)plan->bound_bytes[i], parameters, 2).text);
}

/* Nothing to say where pages are on disk as they are. */
static void print_compression(FILE *out, const flap_plan *plan, const flap_train_result *result) {
  const uint64_t *moved = result->disk_bytes, *pooled = result->pooled_bytes;
  const uint64_t pages[2] = {result->disk_lane_bytes[0] - pooled[0], result->disk_lane_bytes[1] - pooled[1]};
  if (pooled[0] + pooled[1] > 0)
    fprintf(out, "\nthe pool in ram gave pages of %s and took %s, which the disks did not move\n",
            flap_text_bytes(pooled[0]).text, flap_text_bytes(pooled[1]).text);
  if (plan->compression == FLAP_COMPRESSION_OFF || moved[0] + moved[1] == 0)
    return;
  fprintf(out, "\ndisks read %s and wrote %s for pages of %s and %s (compression: %s): ratio %s\n",
          flap_text_bytes(moved[0]).text, flap_text_bytes(moved[1]).text, flap_text_bytes(pages[0]).text,
          flap_text_bytes(pages[1]).text, flap_print_compression(plan->compression),
          flap_text_ratio((double)(pages[0] + pages[1]), (double)(moved[0] + moved[1]), 3).text);
}

/* What the drives bore: measured, but for the sizes of files and what the start wrote. */
static void print_wear(FILE *out, const flap_plan *plan, const flap_train_result *result) {
  const uint64_t written = result->disk_written_bytes + result->saved_bytes;
  const uint64_t pages = result->disk_lane_bytes[1];
  const double stored = pages > 0 ? (double)result->disk_bytes[1] / (double)pages : 0; /* of a page that is written */
  if (written == 0)
    return;
  fprintf(out, "written to drives: %s (%s a step), %s of it to save", flap_text_bytes(written).text,
          flap_text_bytes((uint64_t)((double)result->steady_lane_bytes[FLAP_LANE_DISK_WRITE] * stored)).text,
          flap_text_bytes(result->saved_bytes).text);
  if (result->trained_tokens > 0)
    fprintf(out, "; %.4g TB per billion tokens", (double)written / (double)result->trained_tokens * 1e9 / 1e12);
  if (plan->ssd_tbw_bytes > 0)
    fprintf(out, "; %s of ssd_tbw", flap_text_share((double)written, (double)plan->ssd_tbw_bytes).text);
  fputc('\n', out);
}

void flap_progress_summary(flap_progress *progress, const flap_run_config *config, const flap_train_result *result) {
  FILE *out = progress->out;
  flap_progress_end_line(progress);
  fprintf(out, "\n%llu steps in %s\n", (unsigned long long)result->steps,
          flap_text_seconds(result->total_seconds).text);
  if (result->skipped_steps > 0)
    fprintf(out, "%llu of them were skipped: float16 overflowed, and the loss scale was halved\n",
            (unsigned long long)result->skipped_steps);
  if (result->last_eval.tokens > 0) {
    fprintf(out, "held-out loss %.4f before, %.4f after; unigram entropy of the same text %.4f nats per token\n",
            result->first_eval.loss, result->last_eval.loss, result->last_eval.unigram_entropy);
  }
  if (progress->planned) {
    const flap_plan *plan = &progress->plan;
    print_peaks(out, plan, &result->peaks);
    if (result->median_step_seconds > 0) {
      print_lanes(out, plan, result->steady_lane_bytes);
      print_compression(out, plan, result);
      fprintf(out, "\nmedian step %s, expected %s, bound %s (%s): %s of the bound reached\n",
              flap_text_seconds(result->median_step_seconds).text, flap_text_seconds(plan->step_seconds).text,
              flap_text_seconds(plan->bound_seconds).text, flap_print_bound_lane(plan),
              flap_text_percent(plan->bound_seconds, result->median_step_seconds).text);
      if (result->median_step_seconds < plan->bound_seconds && plan->compression != FLAP_COMPRESSION_OFF)
        fputs("the bound counts every byte as it is, and what is compressed takes fewer\n", out);
      else if (result->median_step_seconds < plan->bound_seconds)
        fprintf(out, "no step can be faster than the bound: the machine was busy when its rates were measured; "
                     "`flap bench machine` measures them again\n");
    }
  }
  print_wear(out, &progress->plan, result);
  if (result->checkpoint[0])
    fprintf(out, "newest checkpoint: %s\n", result->checkpoint);
  if (result->exported)
    fprintf(out, "trained model, in Hugging Face's format: %s\n", config->output_dir);
  (void)fflush(out);
}
