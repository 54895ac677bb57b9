/* io_uring: one ring for all disks, one thread that reaps.
 *
 * Whoever flushes, and the reaper after completions, pumps: takes pieces as the lanes' depths allow, describes them to
 * the ring, and submits. The submission side belongs to `submit_mutex`; the completion side to the reaper alone. The
 * ring has room for every lane at full depth, so it never runs full.
 *
 * Buffers and files are registered where the system allows it, which saves pinning pages and looking up files for every
 * transfer. Memory is registered in parts of at most 1 GiB, the kernel's limit; a transfer that lies across two parts
 * is an ordinary one.
 *
 * A piece is written by the pump, under the block's mutex, before it is submitted, and by the reaper, under the same
 * mutex, after its completion.
 */
#include "io/block/block_internal.h"

#include "base/assert.h"
#include "base/system.h"
#include "base/thread.h"
#include "base/log.h"
#include "base/units.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PART_BYTES FLAP_GIB
#define REAP_MAX 64u
#define TRIAL_PARTS 1024u /* the most buffers that every kernel registers */
/* Whole huge pages are charged, so the two at the ends as well, of which only parts are registered; and by some kernels
 * the ring itself. */
#define ENDS_BYTES (4 * FLAP_MIB)
#define RING_BYTES FLAP_MIB

typedef struct uring_state {
  struct io_uring ring;
  pthread_mutex_t submit_mutex;
  pthread_t reaper;
  bool fixed_buffers, fixed_files;
} uring_state;

static uint64_t least(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* The registered part that holds all of the piece's buffer, or -1. */
static int fixed_part(const flap_block *block, const block_piece *piece) {
  const uring_state *state = block->state;
  if (!state->fixed_buffers)
    return -1;
  uint64_t first = (uint64_t)(piece->buffer - (unsigned char *)block->config.memory);
  uint64_t last = first + piece->bytes_left - 1;
  return first / PART_BYTES == last / PART_BYTES ? (int)(first / PART_BYTES) : -1;
}

static void describe_piece(flap_block *block, block_piece *piece, struct io_uring_sqe *sqe) {
  const uring_state *state = block->state;
  int fd = state->fixed_files ? (int)piece->file : block->files[piece->file].fd;
  int part = fixed_part(block, piece);
  if (piece->op == FLAP_BLOCK_READ) {
    if (part >= 0)
      io_uring_prep_read_fixed(sqe, fd, piece->buffer, piece->bytes_left, piece->offset, part);
    else
      io_uring_prep_read(sqe, fd, piece->buffer, piece->bytes_left, piece->offset);
  } else {
    if (part >= 0)
      io_uring_prep_write_fixed(sqe, fd, piece->buffer, piece->bytes_left, piece->offset, part);
    else
      io_uring_prep_write(sqe, fd, piece->buffer, piece->bytes_left, piece->offset);
  }
  if (state->fixed_files)
    sqe->flags |= IOSQE_FIXED_FILE;
  io_uring_sqe_set_data(sqe, piece);
}

/* With submit_mutex held. The system may be short of memory for a moment; anything else would be our own mistake. */
static void submit_all(uring_state *state) {
  while (io_uring_sq_ready(&state->ring) > 0) {
    int result = io_uring_submit(&state->ring);
    if (result >= 0 || result == -EINTR)
      continue;
    flap_assert(result == -EAGAIN || result == -EBUSY || result == -ENOMEM);
    (void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
}

static void uring_start(flap_block *block) {
  uring_state *state = block->state;
  pthread_mutex_lock(&state->submit_mutex);
  pthread_mutex_lock(&block->mutex);
  block_piece *piece;
  while (io_uring_sq_space_left(&state->ring) > 0 && (piece = block_piece_take(block)) != NULL)
    describe_piece(block, piece, io_uring_get_sqe(&state->ring));
  pthread_mutex_unlock(&block->mutex);
  submit_all(state);
  pthread_mutex_unlock(&state->submit_mutex);
}

static int64_t result_of(const flap_block *block, const block_piece *piece, int32_t result) {
  return flap_system_transferred(block->files[piece->file].fd, piece->op == FLAP_BLOCK_WRITE, piece->buffer, result);
}

/* Settles what has arrived. False when the end was asked for: a completion without a piece. */
static bool reap(flap_block *block, bool *completed_out) {
  uring_state *state = block->state;
  struct io_uring_cqe *cqes[REAP_MAX];
  unsigned count = io_uring_peek_batch_cqe(&state->ring, cqes, REAP_MAX);
  bool go_on = true;
  *completed_out = false;
  pthread_mutex_lock(&block->mutex);
  for (unsigned i = 0; i < count; i++) {
    block_piece *piece = io_uring_cqe_get_data(cqes[i]);
    if (piece == NULL)
      go_on = false;
    else if (block_piece_settle(block, piece, result_of(block, piece, cqes[i]->res)))
      *completed_out = true;
  }
  pthread_mutex_unlock(&block->mutex);
  io_uring_cq_advance(&state->ring, count);
  return go_on;
}

static void *reaper_main(void *argument) {
  flap_thread_prefer_latency();
  flap_block *block = argument;
  uring_state *state = block->state;
  bool go_on = true;
  while (go_on) {
    struct io_uring_cqe *cqe = NULL;
    int result = io_uring_wait_cqe(&state->ring, &cqe);
    if (result != 0) {
      flap_assert(result == -EINTR || result == -EAGAIN || result == -ENOMEM);
      continue;
    }
    bool completed = false;
    go_on = reap(block, &completed);
    if (go_on)
      uring_start(block); /* the disk first, then whoever waits */
    if (completed)
      block_notify(block);
  }
  return NULL;
}

/* Everything works without registration, only a little slower; so a refusal is told and no more. */
static void tell_refusal(uint64_t bytes, int os_error) {
  char size[FLAP_UNITS_TEXT_MAX];
  flap_units_format_bytes(bytes, size, sizeof size);
  flap_log(FLAP_LOG_WARNING,
           "io_uring: cannot register %s of buffers (%s); transfers will cost more CPU; raise the limit on locked "
           "memory: ulimit -l %llu, and as much again for each other program of yours that does the same",
           size, strerror(os_error), (unsigned long long)((bytes + ENDS_BYTES + RING_BYTES) / 1024));
}

static void register_memory(flap_block *block) {
  uring_state *state = block->state;
  uint64_t count = (block->config.memory_bytes + PART_BYTES - 1) / PART_BYTES;
  struct iovec *parts = calloc(count, sizeof *parts);
  int result = -ENOMEM;
  if (parts != NULL) {
    for (uint64_t i = 0; i < count; i++) {
      parts[i].iov_base = (unsigned char *)block->config.memory + i * PART_BYTES;
      parts[i].iov_len = (size_t)least(PART_BYTES, block->config.memory_bytes - i * PART_BYTES);
    }
    result = io_uring_register_buffers(&state->ring, parts, (unsigned)count);
  }
  free(parts);
  state->fixed_buffers = result == 0;
  if (result != 0)
    tell_refusal(block->config.memory_bytes, -result);
}

/* The system charges each buffer for its pages, also where several are of the same: so a little memory, registered many
 * times over, tells what it would say to a lot. Huge pages it would count once. */
static int register_trial(struct io_uring *ring, uint64_t bytes) {
  static struct iovec parts[TRIAL_PARTS];
  const uint64_t part_bytes = flap_units_round_up((bytes + TRIAL_PARTS - 1) / TRIAL_PARTS, FLAP_MIB);
  void *memory = mmap(NULL, part_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  unsigned count = 0;
  if (memory == MAP_FAILED)
    return 0;
  (void)madvise(memory, part_bytes, MADV_NOHUGEPAGE);
  for (uint64_t left = bytes; left > 0; left -= parts[count++].iov_len)
    parts[count] = (struct iovec){.iov_base = memory, .iov_len = (size_t)least(part_bytes, left)};
  const int result = io_uring_register_buffers(ring, parts, count);
  if (result == 0)
    (void)io_uring_unregister_buffers(ring);
  (void)munmap(memory, part_bytes);
  return result;
}

void flap_block_check_memory(const flap_block_config *config) {
  struct io_uring ring;
  const bool wanted = config->backend == FLAP_BLOCK_AUTO || config->backend == FLAP_BLOCK_URING;
  if (!wanted || config->memory_bytes == 0 || io_uring_queue_init(1, &ring, 0) != 0)
    return;
  const int result = register_trial(&ring, config->memory_bytes + ENDS_BYTES);
  io_uring_queue_exit(&ring);
  if (result == -ENOMEM)
    tell_refusal(config->memory_bytes, ENOMEM);
}

static void register_files(flap_block *block) {
  uring_state *state = block->state;
  int fds[BLOCK_FILES_MAX];
  for (uint32_t i = 0; i < BLOCK_FILES_MAX; i++)
    fds[i] = block->files[i].fd; /* -1: a place that is kept */
  state->fixed_files = io_uring_register_files(&state->ring, fds, BLOCK_FILES_MAX) == 0;
}

/* The kernel holds open what is registered. */
static void uring_file_changed(flap_block *block, uint32_t index) {
  uring_state *state = block->state;
  pthread_mutex_lock(&state->submit_mutex);
  if (state->fixed_files && io_uring_register_files_update(&state->ring, index, &block->files[index].fd, 1) != 1) {
    (void)io_uring_unregister_files(&state->ring);
    state->fixed_files = false;
  }
  pthread_mutex_unlock(&state->submit_mutex);
}

/* The kernel takes a ring apart some time after its descriptor is closed. What is registered is given back first, so
 * that the disk's space and the memory are free when close returns. */
static void close_ring(uring_state *state) {
  if (state->fixed_files)
    (void)io_uring_unregister_files(&state->ring);
  if (state->fixed_buffers)
    (void)io_uring_unregister_buffers(&state->ring);
  io_uring_queue_exit(&state->ring);
}

static flap_status uring_open(flap_block *block) {
  uring_state *state = block->state;
  uint32_t entries = 1; /* the one that ends the reaper */
  for (uint32_t d = 0; d < block->config.disk_count; d++)
    entries += block->lanes[d][FLAP_BLOCK_READ].depth + block->lanes[d][FLAP_BLOCK_WRITE].depth;
  struct io_uring_params params = {.flags = IORING_SETUP_CLAMP};
  int result = io_uring_queue_init_params(entries, &state->ring, &params);
  if (result != 0) {
    char text[128];
    return flap_error_set(FLAP_UNSUPPORTED,
                          "io_uring is refused by the system: %s (a kernel without it, kernel.io_uring_disabled, a "
                          "container's filter)",
                          strerror_r(-result, text, sizeof text));
  }
  register_files(block);
  register_memory(block);
  pthread_mutex_init(&state->submit_mutex, NULL);
  int os_error = block_thread_start(&state->reaper, reaper_main, block);
  if (os_error != 0) {
    pthread_mutex_destroy(&state->submit_mutex);
    close_ring(state);
    (void)flap_error_set_os(os_error, "io_uring: cannot start a thread");
    return FLAP_NO_MEMORY;
  }
  return FLAP_OK;
}

static void uring_close(flap_block *block) {
  uring_state *state = block->state;
  pthread_mutex_lock(&state->submit_mutex);
  struct io_uring_sqe *sqe = io_uring_get_sqe(&state->ring);
  flap_assert(sqe != NULL);
  io_uring_prep_nop(sqe);
  io_uring_sqe_set_data(sqe, NULL);
  submit_all(state);
  pthread_mutex_unlock(&state->submit_mutex);
  pthread_join(state->reaper, NULL);
  pthread_mutex_destroy(&state->submit_mutex);
  close_ring(state);
}

const block_backend block_backend_uring = {
    .name = "io_uring",
    .has_files = true,
    .state_bytes = sizeof(uring_state),
    .open = uring_open,
    .start = uring_start,
    .file_changed = uring_file_changed,
    .close = uring_close,
};
