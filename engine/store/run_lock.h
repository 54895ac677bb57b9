/* One run per folder: whoever holds the lock of an output_dir is the only one who writes there.
 *
 * The lock is flock's on the file `run.lock` in the folder, so the kernel takes it back however its process ends, and a
 * file that is left behind by a kill -9 locks nothing. The file says who holds it, for whom it refuses.
 */
#ifndef FLAP_ENGINE_STORE_RUN_LOCK_H
#define FLAP_ENGINE_STORE_RUN_LOCK_H

#include "base/status.h"
#include "engine/run_config.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_RUN_LOCK_FILE "run.lock"

typedef struct flap_run_lock {
  int fd; /* -1: none is held */
  char path[FLAP_PATH_MAX];
} flap_run_lock;

/* Takes the lock of a folder that is there, or says at once which process has it (FLAP_INVALID, without a key). Where
 * the file system has no locks the log warns, and FLAP_OK comes with none held. */
FLAP_CHECKED flap_status flap_run_lock_take(const char *folder, flap_run_lock *lock_out);
/* Removes the file and lets go. Fine when none is held; the struct must have been through take, or its fd be -1. */
void flap_run_lock_release(flap_run_lock *lock);

#ifdef __cplusplus
}
#endif
#endif
