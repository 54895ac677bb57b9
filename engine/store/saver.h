/* The saver: writes a checkpoint on a thread of its own, from a snapshot of the pager's, while training goes on.
 *
 * Folder-private. One checkpoint at a time. The engine thread opens the snapshot and starts the saver; it tells it that
 * the update in the snapshot is a good one, which is known only at the end of the program that makes it: until then the
 * checkpoint has no final name. Nor has it before what it shares with the run has been read again: by the next step,
 * or by the saver where none does that before somebody waits for the save. The saver's error record is carried over to
 * whoever collects what came of it.
 *
 * Its thread is there from open to close. While it writes it takes memory for the tables and headers of files, none for
 * weights or states.
 */
#ifndef FLAP_ENGINE_STORE_SAVER_H
#define FLAP_ENGINE_STORE_SAVER_H

#include "engine/store/checkpoint.h"
#include "io/formats/metrics.h"

#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of room that is kept, beyond that of files: a little that others get before these do is no harm. */
#define FLAP_SAVER_SPARE_BYTES ((uint64_t)1 << 20)

/* All of it must outlive the saver. */
typedef struct flap_saver_config {
  const char *output_dir;
  flap_pager *pager;
  const flap_layout *layout;
  flap_artifacts artifacts;
  flap_metrics *metrics; /* what it holds when a save begins is durable before the checkpoint is */
  bool only_model;
  uint32_t total_limit;
  uint64_t room_bytes; /* that are kept for what follows a checkpoint, in the artifacts' room */
} flap_saver_config;

typedef struct flap_saver {
  flap_saver_config config;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t moved;
  bool opened, stop;
  bool read_by_step, awaited;
  enum { FLAP_SAVER_IDLE, FLAP_SAVER_SAVING, FLAP_SAVER_OVER } phase;
  enum { FLAP_SAVER_UNKNOWN, FLAP_SAVER_GOOD, FLAP_SAVER_BAD } update;
  flap_trainer_state state; /* of the step that is saved */
  uint64_t started_ns;
  /* what came of it */
  flap_status status;
  double seconds;
  char folder[FLAP_PATH_MAX], message[2048];
} flap_saver;

/* {0} is fine for close. */
FLAP_CHECKED flap_status flap_saver_open(const flap_saver_config *config, flap_saver *saver);
/* With nothing under way. */
void flap_saver_close(flap_saver *saver);

/* The snapshot is open: the saver drains and ends it. `state` is that of its point. `read_by_step`: a step follows that
 * reads all states as the snapshot has them, before collect. */
void flap_saver_start(flap_saver *saver, const flap_trainer_state *state, bool read_by_step);
/* Whether the update that the snapshot holds is good. Once for each save; a bad one is given up. */
void flap_saver_judge(flap_saver *saver, bool good);

/* A step has ended: what it has read may be what a save waits for. */
void flap_saver_look(flap_saver *saver);

/* Between start and collect. */
bool flap_saver_is_busy(flap_saver *saver);
/* Whether collect would not wait. */
bool flap_saver_is_over(flap_saver *saver);
bool flap_saver_is_judged(flap_saver *saver);
/* Waits for the save that was started, with the snapshot closed. FLAP_OK: it is durable, in saver->folder; else there
 * is nothing of it. It must have been judged. */
FLAP_CHECKED flap_status flap_saver_collect(flap_saver *saver);

#ifdef __cplusplus
}
#endif
#endif
