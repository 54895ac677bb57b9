/* metrics.jsonl: one JSON object per line, appended while a run goes on.
 *
 *   flap_metrics_begin_line(metrics);
 *   flap_metrics_add_integer(metrics, "step", 12);
 *   flap_metrics_add_number(metrics, "loss", loss);
 *   flap_metrics_open_object(metrics, "stall_seconds");
 *   flap_metrics_add_number(metrics, "h2d", 0.25);
 *   flap_metrics_close_object(metrics);
 *   FLAP_TRY(flap_metrics_end_line(metrics));
 *
 * Numbers read back to the same bits (%.17g); NaN and the infinities are null, which every
 * JSON reader takes. Lines are built in a buffer that open takes: after that nothing is allocated. A line is handed to
 * the system in one write, so a killed run leaves at most one torn line, which the next open drops.
 * Threading: one user.
 */
#ifndef FLAP_FORMATS_METRICS_H
#define FLAP_FORMATS_METRICS_H

#include "base/status.h"
#include "io/formats/room.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_METRICS_LINE_BYTES_MAX 16384u
#define FLAP_METRICS_DEPTH_MAX 8u

typedef struct flap_metrics flap_metrics;

/* keep_to_step < 0 starts an empty file. Otherwise a file that is there keeps its lines whose integer "step" is at most
 * keep_to_step, and objects without a "step"; later, torn and malformed lines are dropped (the file is rewritten under
 * a temporary name and renamed, only if something is dropped). So a resumed run repeats no step. */
FLAP_CHECKED flap_status flap_metrics_open(const char *path, int64_t keep_to_step, flap_metrics **metrics_out);

/* The first line that has all these keys, of this step (below 0: of any): its step and its numbers, NaN for what is
 * none. No such line, and no file, is false. */
#define FLAP_METRICS_KEYS_MAX 4u
typedef struct flap_metrics_line {
  int64_t step;
  double values[FLAP_METRICS_KEYS_MAX];
} flap_metrics_line;
FLAP_CHECKED flap_status flap_metrics_find(const char *path, int64_t step, const char *const *keys, uint32_t key_count,
                                           flap_metrics_line *line_out, bool *found_out);

/* Whether the file has anything but lines of step 0, which are written before the first step is done. So it is false
 * where nothing would be lost: for no file and an empty one; and true for what is no file, or no metrics. */
FLAP_CHECKED flap_status flap_metrics_has_steps(const char *path, bool *has_out);

/* Begin and end come in pairs, as do open and close of objects; keys are escaped if they need it. */
void flap_metrics_begin_line(flap_metrics *metrics);
void flap_metrics_add_integer(flap_metrics *metrics, const char *key, int64_t value);
void flap_metrics_add_number(flap_metrics *metrics, const char *key, double value);
void flap_metrics_add_bool(flap_metrics *metrics, const char *key, bool value);
void flap_metrics_open_object(flap_metrics *metrics, const char *key);
void flap_metrics_close_object(flap_metrics *metrics);

/* Appends the line. FLAP_INVALID, and nothing written, when it grew past FLAP_METRICS_LINE_BYTES_MAX. When the write
 * fails (FLAP_NO_SPACE, FLAP_IO) what was written of the line is taken back, so the next line is sound. */
FLAP_CHECKED flap_status flap_metrics_end_line(flap_metrics *metrics);

/* Where a line finds no room it takes some of this, and is written; NULL: none. It outlives the metrics. */
void flap_metrics_give_room(flap_metrics *metrics, flap_room *room);

/* fsync, for commits; also from another thread than the one that adds lines, for those that were ended before. */
FLAP_CHECKED flap_status flap_metrics_sync(flap_metrics *metrics);
/* Closes; does not sync. NULL is fine. */
void flap_metrics_close(flap_metrics *metrics);

#ifdef __cplusplus
}
#endif
#endif
