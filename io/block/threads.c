/* The fallback: threads that call pread and pwrite. Each takes a piece, moves what the system will move at once, and
 * settles it; whatever is left goes back to its lane. */
#include "io/block/block_internal.h"
#include "base/system.h"
#include "base/thread.h"

#include <errno.h>
#include <unistd.h>

#define THREADS_MAX 8u

typedef struct threads_state {
  pthread_t threads[THREADS_MAX];
  uint32_t started;
  bool stopping;       /* under the block's mutex */
  pthread_cond_t work; /* with the block's mutex: pieces may be waiting, or it is the end */
} threads_state;

static int64_t transfer(const flap_block *block, const block_piece *piece) {
  int fd = block->files[piece->file].fd;
  ssize_t result = piece->op == FLAP_BLOCK_READ
                       ? flap_system_pread(fd, piece->buffer, piece->bytes_left, (off_t)piece->offset)
                       : flap_system_pwrite(fd, piece->buffer, piece->bytes_left, (off_t)piece->offset);
  return result < 0 ? -errno : result;
}

static void *thread_main(void *argument) {
  flap_thread_prefer_latency();
  flap_block *block = argument;
  threads_state *state = block->state;
  pthread_mutex_lock(&block->mutex);
  for (;;) {
    block_piece *piece = block_piece_take(block);
    if (piece == NULL && state->stopping)
      break;
    if (piece == NULL) {
      pthread_cond_wait(&state->work, &block->mutex);
      continue;
    }
    pthread_mutex_unlock(&block->mutex);
    int64_t result = transfer(block, piece);
    pthread_mutex_lock(&block->mutex);
    if (block_piece_settle(block, piece, result)) {
      pthread_mutex_unlock(&block->mutex);
      block_notify(block);
      pthread_mutex_lock(&block->mutex);
    }
  }
  pthread_mutex_unlock(&block->mutex);
  return NULL;
}

static void threads_start(flap_block *block) {
  threads_state *state = block->state;
  pthread_mutex_lock(&block->mutex);
  pthread_cond_broadcast(&state->work);
  pthread_mutex_unlock(&block->mutex);
}

static void threads_close(flap_block *block) {
  threads_state *state = block->state;
  pthread_mutex_lock(&block->mutex);
  state->stopping = true;
  pthread_cond_broadcast(&state->work);
  pthread_mutex_unlock(&block->mutex);
  for (uint32_t i = 0; i < state->started; i++)
    pthread_join(state->threads[i], NULL);
  pthread_cond_destroy(&state->work);
}

static flap_status threads_open(flap_block *block) {
  threads_state *state = block->state;
  pthread_cond_init(&state->work, NULL);
  uint32_t wanted = 0;
  for (uint32_t d = 0; d < block->config.disk_count; d++)
    wanted += block->lanes[d][FLAP_BLOCK_READ].depth + block->lanes[d][FLAP_BLOCK_WRITE].depth;
  if (wanted > THREADS_MAX)
    wanted = THREADS_MAX;
  int os_error = 0;
  while (state->started < wanted && os_error == 0) {
    os_error = block_thread_start(&state->threads[state->started], thread_main, block);
    if (os_error == 0)
      state->started++;
  }
  /* Fewer threads than wanted are slower, not wrong. */
  if (state->started > 0)
    return FLAP_OK;
  threads_close(block);
  (void)flap_error_set_os(os_error, "block storage: cannot start a thread");
  return FLAP_NO_MEMORY;
}

const block_backend block_backend_threads = {
    .name = "threads",
    .has_files = true,
    .state_bytes = sizeof(threads_state),
    .open = threads_open,
    .start = threads_start,
    .close = threads_close,
};
