#include "io/formats/write_behind.h"

#include "base/assert.h"
#include "base/system.h"
#include "base/thread.h"
#include "io/formats/durable.h"
#include "io/formats/durable_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <time.h>

/* ---- a write --------------------------------------------------------------------------------------------- */

bool flap_write_target_set_direct(flap_write_target *target, bool direct) {
  const int flags = fcntl(target->fd, F_GETFL);
  if (flags < 0 || fcntl(target->fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) != 0)
    return false;
  atomic_store(&target->direct, direct);
  return true;
}

/* Another thread may have turned O_DIRECT off since this write began: what counts is how it was then. */
int flap_write_target_write(flap_write_target *target, const void *data, uint64_t bytes, uint64_t offset) {
  const unsigned char *from = data;
  while (bytes > 0) {
    const size_t most = (size_t)(bytes < FLAP_DURABLE_TRANSFER_BYTES_MAX ? bytes : FLAP_DURABLE_TRANSFER_BYTES_MAX);
    const bool direct = atomic_load(&target->direct);
    const ssize_t written = flap_system_pwrite(target->fd, from, most, (off_t)offset);
    if (written == 0 || (written < 0 && (errno != EINVAL || !direct)))
      return written < 0 ? errno : EIO;
    if (written > 0) {
      from += written;
      bytes -= (uint64_t)written;
      offset += (uint64_t)written;
    }
    if (direct && (written < 0 || offset % FLAP_WRITE_BEHIND_ALIGN != 0) &&
        !flap_write_target_set_direct(target, false))
      return errno;
  }
  return 0;
}

/* ---- the threads ------------------------------------------------------------------------------------------- */

/* With the lock, which it gives away while it writes. */
static void write_next(flap_write_behind *behind) {
  flap_write_block *block = behind->queue[behind->queue_first];
  flap_write_target *target = block->target;
  behind->queue_first = (behind->queue_first + 1) % FLAP_WRITE_BEHIND_BLOCKS;
  behind->queue_count--;
  if (target->os_error == 0) {
    pthread_mutex_unlock(&behind->lock);
    const int os_error = flap_write_target_write(target, block->memory, block->bytes, block->offset);
    pthread_mutex_lock(&behind->lock);
    if (target->os_error == 0)
      target->os_error = os_error;
  }
  target->under_way--;
  behind->free[behind->free_count++] = block;
  pthread_cond_signal(&behind->done);
}

static void *write_thread(void *context) {
  flap_write_behind *behind = context;
  flap_thread_stand_back();
  pthread_mutex_lock(&behind->lock);
  for (;;) {
    while (behind->queue_count == 0 && !behind->stop)
      pthread_cond_wait(&behind->work, &behind->lock);
    if (behind->stop)
      break;
    write_next(behind);
  }
  pthread_mutex_unlock(&behind->lock);
  return NULL;
}

/* Signals are for the threads of the program. */
static int start_threads(flap_write_behind *behind) {
  sigset_t all, before;
  int os_error = 0;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (behind->started < FLAP_WRITE_BEHIND_THREADS && os_error == 0) {
    os_error = pthread_create(&behind->threads[behind->started], NULL, write_thread, behind);
    if (os_error == 0)
      pthread_setname_np(behind->threads[behind->started++], "flap-write");
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return os_error;
}

/* ---- open and close ---------------------------------------------------------------------------------------- */

flap_status flap_write_behind_open(void *memory, uint64_t bytes, flap_write_behind *behind) {
  *behind = (flap_write_behind){0};
  flap_assert((uintptr_t)memory % FLAP_WRITE_BEHIND_ALIGN == 0);
  const uint64_t block_bytes = bytes / FLAP_WRITE_BEHIND_BLOCKS / FLAP_WRITE_BEHIND_ALIGN * FLAP_WRITE_BEHIND_ALIGN;
  if (memory == NULL || block_bytes == 0)
    return FLAP_OK;
  behind->block_bytes = block_bytes;
  for (uint32_t i = 0; i < FLAP_WRITE_BEHIND_BLOCKS; i++) {
    behind->blocks[i].memory = (unsigned char *)memory + i * block_bytes;
    behind->free[behind->free_count++] = &behind->blocks[i];
  }
  pthread_mutex_init(&behind->lock, NULL);
  pthread_cond_init(&behind->work, NULL);
  pthread_cond_init(&behind->done, NULL);
  const int os_error = start_threads(behind);
  if (os_error == 0)
    return FLAP_OK;
  flap_write_behind_close(behind);
  (void)flap_error_set_os(os_error, "cannot start a thread that writes large files");
  return FLAP_NO_MEMORY;
}

void flap_write_behind_close(flap_write_behind *behind) {
  if (behind->block_bytes == 0)
    return;
  pthread_mutex_lock(&behind->lock);
  flap_assert(behind->files == 0 && behind->free_count == FLAP_WRITE_BEHIND_BLOCKS);
  behind->stop = true;
  pthread_cond_broadcast(&behind->work);
  pthread_mutex_unlock(&behind->lock);
  for (uint32_t i = 0; i < behind->started; i++)
    pthread_join(behind->threads[i], NULL);
  pthread_cond_destroy(&behind->work);
  pthread_cond_destroy(&behind->done);
  pthread_mutex_destroy(&behind->lock);
  *behind = (flap_write_behind){0};
}

double flap_write_behind_seconds(const flap_write_behind *behind) {
  double seconds = 0;
  for (uint32_t i = 0; i < behind->started; i++) {
    clockid_t clock;
    struct timespec t = {0};
    if (pthread_getcpuclockid(behind->threads[i], &clock) == 0 && clock_gettime(clock, &t) == 0)
      seconds += (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
  }
  return seconds;
}

/* ---- the owner's side -------------------------------------------------------------------------------------- */

bool flap_write_behind_join(flap_write_behind *behind) {
  if (behind->block_bytes == 0 || behind->files == FLAP_WRITE_BEHIND_FILES)
    return false;
  behind->files++;
  return true;
}

void flap_write_behind_leave(flap_write_behind *behind) {
  flap_assert(behind->files > 0);
  behind->files--;
}

int flap_write_behind_take(flap_write_behind *behind, const flap_write_target *target, flap_write_block **block_out) {
  *block_out = NULL;
  pthread_mutex_lock(&behind->lock);
  while (behind->free_count == 0 && target->os_error == 0)
    pthread_cond_wait(&behind->done, &behind->lock);
  const int os_error = target->os_error;
  if (os_error == 0)
    *block_out = behind->free[--behind->free_count];
  pthread_mutex_unlock(&behind->lock);
  return os_error;
}

void flap_write_behind_put(flap_write_behind *behind, flap_write_block *block, flap_write_target *target,
                           uint64_t offset, uint64_t bytes) {
  block->target = target;
  block->offset = offset;
  block->bytes = bytes;
  pthread_mutex_lock(&behind->lock);
  behind->queue[(behind->queue_first + behind->queue_count++) % FLAP_WRITE_BEHIND_BLOCKS] = block;
  target->under_way++;
  pthread_cond_signal(&behind->work);
  pthread_mutex_unlock(&behind->lock);
}

void flap_write_behind_give_back(flap_write_behind *behind, flap_write_block *block) {
  pthread_mutex_lock(&behind->lock);
  behind->free[behind->free_count++] = block;
  pthread_mutex_unlock(&behind->lock);
}

int flap_write_behind_wait(flap_write_behind *behind, const flap_write_target *target) {
  pthread_mutex_lock(&behind->lock);
  while (target->under_way > 0)
    pthread_cond_wait(&behind->done, &behind->lock);
  const int os_error = target->os_error;
  pthread_mutex_unlock(&behind->lock);
  return os_error;
}

void flap_write_behind_drop(flap_write_behind *behind, flap_write_target *target) {
  pthread_mutex_lock(&behind->lock);
  if (target->os_error == 0)
    target->os_error = ECANCELED;
  pthread_mutex_unlock(&behind->lock);
  const int dropped = flap_write_behind_wait(behind, target);
  flap_assert(dropped != 0);
}
