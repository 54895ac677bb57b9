#include "engine/store/saver.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/thread.h"
#include "base/units.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* On this thread, and on those that write for it. */
static double computed_seconds(const flap_saver *saver) {
  const flap_write_behind *behind = saver->config.artifacts.piece.behind;
  struct timespec t;
  (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9 + (behind != NULL ? flap_write_behind_seconds(behind) : 0);
}

/* ---- its thread ------------------------------------------------------------------------------------------ */

static flap_status wait_for_judgement(flap_saver *saver) {
  pthread_mutex_lock(&saver->lock);
  while (saver->update == FLAP_SAVER_UNKNOWN)
    pthread_cond_wait(&saver->moved, &saver->lock);
  const bool good = saver->update == FLAP_SAVER_GOOD;
  pthread_mutex_unlock(&saver->lock);
  return good ? FLAP_OK : flap_error_set(FLAP_CLOSED, "the run ended with an error in the step that it follows");
}

/* What is shared was written long ago, and nobody has read it since: the next step does. It has nothing to wait for
 * where nothing is shared. */
static bool wait_for_reading(flap_saver *saver) {
  pthread_mutex_lock(&saver->lock);
  bool read = flap_pager_kept_is_read(saver->config.pager);
  while (!read && saver->read_by_step && !saver->awaited) {
    pthread_cond_wait(&saver->moved, &saver->lock);
    read = flap_pager_kept_is_read(saver->config.pager);
  }
  pthread_mutex_unlock(&saver->lock);
  return read;
}

/* For the next one, right when an old one was removed. What was saved is safe whether there is any or not. */
static void keep_room(const flap_saver *saver) {
  const flap_saver_config *c = &saver->config;
  const uint64_t copied = flap_pager_can_keep(c->pager) ? 0 : flap_pager_shared_bytes(c->pager);
  if (flap_room_keep(c->artifacts.piece.room, c->room_bytes + copied, FLAP_SAVER_SPARE_BYTES) == FLAP_OK)
    return;
  flap_log(FLAP_LOG_WARNING, "output_dir: %s: the next checkpoint may find no room: %s", c->output_dir,
           flap_error_message());
  flap_error_clear();
}

/* The file that the next checkpoint leaves to the run, in the place of one that was removed. Without it the next one is
 * a copy. */
static void next_extents(const flap_saver *saver) {
  flap_pager *pager = saver->config.pager;
  flap_status status = flap_pager_next_file(pager);
  if (flap_room_helps(saver->config.artifacts.piece.room, status, flap_pager_shared_bytes(pager)))
    status = flap_pager_next_file(pager);
  if (status == FLAP_OK && (flap_pager_can_keep(pager) || flap_pager_shared_bytes(pager) == 0))
    return;
  if (status == FLAP_OK) {
    flap_log(FLAP_LOG_WARNING, "the next checkpoint will be a copy: all files of extents are in use");
    return;
  }
  flap_log(FLAP_LOG_WARNING, "the next checkpoint will not share what is on the disk: %s", flap_error_message());
  flap_error_clear();
}

static flap_status commit(flap_saver *saver) {
  const flap_saver_config *c = &saver->config;
  FLAP_TRY(flap_metrics_sync(c->metrics));
  FLAP_TRY(wait_for_judgement(saver));
  const bool read = wait_for_reading(saver);
  FLAP_TRY(flap_checkpoint_commit(c->output_dir, saver->folder, saver->state.step, c->total_limit, !read));
  if (saver->state.step < saver->state.max_steps) {
    next_extents(saver);
    keep_room(saver);
  }
  return FLAP_OK;
}

/* The snapshot ends before anything is waited for that only the engine thread can bring. */
static flap_status save(flap_saver *saver) {
  const flap_saver_config *c = &saver->config;
  flap_status status = flap_checkpoint_write(c->output_dir, c->pager, c->layout, &c->artifacts, &saver->state,
                                             c->only_model, saver->folder);
  flap_pager_snapshot_end(c->pager);
  FLAP_TRY(status);
  status = commit(saver);
  if (status != FLAP_OK)
    flap_checkpoint_abandon(saver->folder);
  return status;
}

static void work(flap_saver *saver) {
  const double before = computed_seconds(saver);
  saver->status = save(saver);
  saver->seconds = (double)(flap_units_now_ns() - saver->started_ns) * 1e-9;
  if (saver->status != FLAP_OK)
    (void)snprintf(saver->message, sizeof saver->message, "%s", flap_error_message());
  else
    flap_log(FLAP_LOG_DEBUG, "step %llu was saved in %.3f s, of which the saver computed %.3f s",
             (unsigned long long)saver->state.step, saver->seconds, computed_seconds(saver) - before);
}

static void *saver_thread(void *context) {
  flap_saver *saver = context;
  flap_thread_stand_back();
  pthread_mutex_lock(&saver->lock);
  for (;;) {
    while (saver->phase != FLAP_SAVER_SAVING && !saver->stop)
      pthread_cond_wait(&saver->moved, &saver->lock);
    if (saver->stop)
      break;
    pthread_mutex_unlock(&saver->lock);
    work(saver);
    pthread_mutex_lock(&saver->lock);
    saver->phase = FLAP_SAVER_OVER;
    pthread_cond_broadcast(&saver->moved);
  }
  pthread_mutex_unlock(&saver->lock);
  return NULL;
}

/* ---- open and close -------------------------------------------------------------------------------------- */

/* Signals are for the threads of the program. */
flap_status flap_saver_open(const flap_saver_config *config, flap_saver *saver) {
  sigset_t all, before;
  *saver = (flap_saver){.config = *config};
  pthread_mutex_init(&saver->lock, NULL);
  pthread_cond_init(&saver->moved, NULL);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int error = pthread_create(&saver->thread, NULL, saver_thread, saver);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  saver->opened = error == 0;
  if (error == 0) {
    pthread_setname_np(saver->thread, "flap-saver");
    return FLAP_OK;
  }
  pthread_cond_destroy(&saver->moved);
  pthread_mutex_destroy(&saver->lock);
  (void)flap_error_set_os(error, "cannot start the thread that saves checkpoints");
  return FLAP_NO_MEMORY;
}

void flap_saver_close(flap_saver *saver) {
  if (!saver->opened)
    return;
  pthread_mutex_lock(&saver->lock);
  flap_assert(saver->phase == FLAP_SAVER_IDLE);
  saver->stop = true;
  pthread_cond_broadcast(&saver->moved);
  pthread_mutex_unlock(&saver->lock);
  pthread_join(saver->thread, NULL);
  pthread_cond_destroy(&saver->moved);
  pthread_mutex_destroy(&saver->lock);
  saver->opened = false;
}

/* ---- the engine thread's side ----------------------------------------------------------------------------- */

void flap_saver_start(flap_saver *saver, const flap_trainer_state *state, bool read_by_step) {
  pthread_mutex_lock(&saver->lock);
  flap_assert(saver->phase == FLAP_SAVER_IDLE);
  saver->state = *state;
  saver->started_ns = flap_units_now_ns();
  saver->update = FLAP_SAVER_UNKNOWN;
  saver->read_by_step = read_by_step;
  saver->awaited = false;
  saver->phase = FLAP_SAVER_SAVING;
  pthread_cond_broadcast(&saver->moved);
  pthread_mutex_unlock(&saver->lock);
}

void flap_saver_judge(flap_saver *saver, bool good) {
  pthread_mutex_lock(&saver->lock);
  flap_assert(saver->phase != FLAP_SAVER_IDLE && saver->update == FLAP_SAVER_UNKNOWN);
  saver->update = good ? FLAP_SAVER_GOOD : FLAP_SAVER_BAD;
  pthread_cond_broadcast(&saver->moved);
  pthread_mutex_unlock(&saver->lock);
}

void flap_saver_look(flap_saver *saver) {
  pthread_mutex_lock(&saver->lock);
  pthread_cond_broadcast(&saver->moved);
  pthread_mutex_unlock(&saver->lock);
}

bool flap_saver_is_judged(flap_saver *saver) {
  pthread_mutex_lock(&saver->lock);
  const bool judged = saver->update != FLAP_SAVER_UNKNOWN;
  pthread_mutex_unlock(&saver->lock);
  return judged;
}

bool flap_saver_is_busy(flap_saver *saver) {
  if (!saver->opened)
    return false;
  pthread_mutex_lock(&saver->lock);
  const bool busy = saver->phase != FLAP_SAVER_IDLE;
  pthread_mutex_unlock(&saver->lock);
  return busy;
}

bool flap_saver_is_over(flap_saver *saver) {
  pthread_mutex_lock(&saver->lock);
  const bool over = saver->phase == FLAP_SAVER_OVER;
  pthread_mutex_unlock(&saver->lock);
  return over;
}

flap_status flap_saver_collect(flap_saver *saver) {
  pthread_mutex_lock(&saver->lock);
  flap_assert(saver->phase != FLAP_SAVER_IDLE && saver->update != FLAP_SAVER_UNKNOWN);
  saver->awaited = true;
  pthread_cond_broadcast(&saver->moved);
  while (saver->phase != FLAP_SAVER_OVER)
    pthread_cond_wait(&saver->moved, &saver->lock);
  saver->phase = FLAP_SAVER_IDLE;
  pthread_mutex_unlock(&saver->lock);
  return saver->status == FLAP_OK ? FLAP_OK : flap_error_set(saver->status, "%s", saver->message);
}
