/* finished.json in output_dir: a run came to its end there, after so many steps.
 *
 * It is written when all else is durable, but the trace, and goes when a run begins to write there: so who starts a run
 * again and again (resume_from_checkpoint: auto) can tell that nothing is left to do, without looking at weights or
 * data.
 */
#ifndef FLAP_ENGINE_STORE_FINISHED_H
#define FLAP_ENGINE_STORE_FINISHED_H

#include "base/status.h"
#include "io/formats/room.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_finished {
  uint64_t steps; /* 0: no run came to its end */
  bool has_model; /* it exported one, and a model of FLAP's is there */
} flap_finished;

/* Room is taken where there is no other; NULL is fine. */
FLAP_CHECKED flap_status flap_finished_write(const char *output_dir, uint64_t steps, bool exported, flap_room *room);
/* A file of that name that is not FLAP's, or cannot be understood, is none. */
FLAP_CHECKED flap_status flap_finished_read(const char *output_dir, flap_finished *finished_out);
/* Only if it is FLAP's; nothing there is fine. */
FLAP_CHECKED flap_status flap_finished_remove(const char *output_dir);

#ifdef __cplusplus
}
#endif
#endif
