/* What a person sees while training: a progress line, and a summary at the end.
 *
 * On a terminal the line is rewritten in place; elsewhere there is a plain line per logged step. Other events get lines
 * of their own in both. Threading: the engine thread, which calls the observer.
 */
#ifndef FLAP_TOOLS_PROGRESS_H
#define FLAP_TOOLS_PROGRESS_H

#include "engine/engine.h"

#include <stdbool.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_progress {
  FILE *out;
  bool terminal;
  bool line_open; /* the progress line stands without a newline */
  bool planned;
  flap_plan plan;
} flap_progress;

/* `out` decides between the two ways. */
void flap_progress_init(flap_progress *progress, FILE *out);
/* Callbacks that print; `progress` must stay where it is. */
flap_observer flap_progress_observer(flap_progress *progress);
/* Ends an open progress line, before something else is printed. */
void flap_progress_end_line(flap_progress *progress);

/* Losses, peaks against budgets, bytes against the bound, time against the bound, and where things are. */
void flap_progress_summary(flap_progress *progress, const flap_run_config *config, const flap_train_result *result);
/* "held-out loss 2.31 nats per token (perplexity 10.1), unigram entropy 3.05, 5,120 tokens, in 1.2 s". */
void flap_progress_print_eval(FILE *out, const char *title, const flap_eval_report *report);

#ifdef __cplusplus
}
#endif
#endif
