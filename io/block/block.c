/* The front of io/block: checks, cuts and queues requests, settles pieces, and hands out what is complete.
 *
 * A request goes: open (submitted) -> its pieces wait in lanes -> in flight -> settled -> complete (pollable) ->
 * polled. Everything is taken from one arena at open; submit, flush and poll only move list nodes.
 */
#include "io/block/block_internal.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/system.h"
#include "base/units.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_DEFAULT 16u
#define DEPTH_MAX 1024u
#define REQUESTS_MAX (1u << 20)
#define TRIES_MAX 1000u /* of one piece without progress; then it fails instead of turning round for ever */

/* --- configuration and memory --------------------------------------------------------------------------------- */

static flap_status check_disks(const flap_block_config *config) {
  if (config->disk_count == 0 || config->disk_count > FLAP_BLOCK_DISKS_MAX)
    return flap_error_set(FLAP_INVALID, "block storage: %u disks given, 1 to %u are possible", config->disk_count,
                          FLAP_BLOCK_DISKS_MAX);
  uint64_t total = 0;
  for (uint32_t d = 0; d < config->disk_count; d++) {
    const flap_block_disk *disk = &config->disks[d];
    if (disk->path == NULL && config->backend != FLAP_BLOCK_SIM)
      return flap_error_set(FLAP_INVALID, "block storage: disk %u has no path", d);
    if (config->disk_count > 1 && (disk->bytes == 0 || disk->bytes % config->stripe_bytes != 0))
      return flap_error_set(FLAP_INVALID, "disk %s: its size must be a multiple of the stripe, %llu bytes",
                            disk->path == NULL ? "(simulated)" : disk->path, (unsigned long long)config->stripe_bytes);
    if (!flap_units_add(total, disk->bytes, &total) || total > (uint64_t)1 << 62)
      return flap_error_set(FLAP_INVALID, "block storage: the sizes of the disks add up to too much");
  }
  if (config->bytes > total) {
    char wanted[FLAP_UNITS_TEXT_MAX], given[FLAP_UNITS_TEXT_MAX];
    return flap_error_set(FLAP_BUDGET, "disk budget: %s needed, %s given; raise the size of a disk or add one",
                          flap_units_format_bytes(config->bytes, wanted, sizeof wanted),
                          flap_units_format_bytes(total, given, sizeof given));
  }
  return FLAP_OK;
}

static flap_status check_config(const flap_block_config *config) {
  if ((unsigned)config->backend > FLAP_BLOCK_SIM)
    return flap_error_set(FLAP_INVALID, "block storage: no such backend");
  if (config->disk_count > 1 && (config->stripe_bytes == 0 || config->stripe_bytes % FLAP_BLOCK_ALIGN != 0))
    return flap_error_set(FLAP_INVALID, "block storage: the stripe must be a multiple of %u bytes", FLAP_BLOCK_ALIGN);
  FLAP_TRY(check_disks(config));
  if (config->bytes == 0 || config->bytes % FLAP_BLOCK_ALIGN != 0)
    return flap_error_set(FLAP_INVALID, "block storage: its size must be a multiple of %u bytes", FLAP_BLOCK_ALIGN);
  if (config->requests_max == 0 || config->requests_max > REQUESTS_MAX)
    return flap_error_set(FLAP_INVALID, "block storage: 1 to %u requests are possible", REQUESTS_MAX);
  if (config->read_depth > DEPTH_MAX || config->write_depth > DEPTH_MAX)
    return flap_error_set(FLAP_INVALID, "block storage: a depth of at most %u is possible", DEPTH_MAX);
  bool has_memory = config->memory != NULL && config->memory_bytes > 0;
  if (!has_memory && !(config->backend == FLAP_BLOCK_SIM && config->sim.clock != NULL))
    return flap_error_set(FLAP_INVALID, "block storage: no memory given for buffers");
  return FLAP_OK;
}

static uint64_t state_bytes(flap_block_backend backend) {
  switch (backend) {
  case FLAP_BLOCK_URING:
    return block_backend_uring.state_bytes;
  case FLAP_BLOCK_THREADS:
    return block_backend_threads.state_bytes;
  case FLAP_BLOCK_SIM:
    return block_backend_sim.state_bytes;
  case FLAP_BLOCK_AUTO:
    break;
  }
  /* Which of the two it will be is known only when the system was asked. */
  uint64_t uring = block_backend_uring.state_bytes, threads = block_backend_threads.state_bytes;
  return uring > threads ? uring : threads;
}

/* Takes everything in a fixed order: run on a measuring arena for the size, on a real one for the memory. */
static flap_block *lay_out(flap_arena *arena, const flap_block_config *config) {
  bool measuring = flap_arena_is_measuring(arena);
  flap_block *block = FLAP_ARENA_ARRAY(arena, flap_block, 1);
  flap_block_disk used[FLAP_BLOCK_DISKS_MAX];
  block_map_use(config->disk_count, config->disks, config->stripe_bytes, config->bytes, used);
  block_phase *phases = FLAP_ARENA_ARRAY(arena, block_phase, block_map_phases_max(config->disk_count));
  uint64_t piece_count = (uint64_t)config->requests_max * block_map_runs_max(config->disk_count, config->stripe_bytes);
  block_piece *pieces = FLAP_ARENA_ARRAY(arena, block_piece, piece_count);
  void *state = flap_arena_take(arena, state_bytes(config->backend), 64);
  char *paths[FLAP_BLOCK_DISKS_MAX] = {NULL};
  for (uint32_t d = 0; d < config->disk_count; d++) {
    const char *path = config->disks[d].path == NULL ? "(simulated)" : config->disks[d].path;
    paths[d] = flap_arena_take(arena, strlen(path) + 1, 1);
    if (!measuring)
      memcpy(paths[d], path, strlen(path) + 1);
  }
  if (measuring)
    return NULL;
  block->config = *config;
  for (uint32_t d = 0; d < config->disk_count; d++)
    block->config.disks[d].path = paths[d];
  block_map_build(&block->map, config->disk_count, used, config->stripe_bytes,
                  block_map_phases_by_size(config->disk_count), phases);
  for (uint64_t i = 0; i < piece_count; i++) {
    pieces[i].next = block->pieces_free;
    block->pieces_free = &pieces[i];
  }
  block->state = state;
  return block;
}

uint64_t flap_block_measure(const flap_block_config *config) {
  if (check_config(config) != FLAP_OK)
    return 0;
  flap_arena arena;
  flap_arena_measure(&arena, "block storage");
  (void)lay_out(&arena, config);
  return arena.bytes_used;
}

/* --- open and close ------------------------------------------------------------------------------------------- */

static void close_files(flap_block *block) {
  for (uint32_t i = 0; i < BLOCK_FILES_MAX; i++)
    block_file_close(&block->files[i]);
}

static flap_status open_files(flap_block *block) {
  for (uint32_t i = 0; i < BLOCK_FILES_MAX; i++)
    block->files[i].fd = -1;
  if (block->config.backend == FLAP_BLOCK_SIM)
    return FLAP_OK;
  for (uint32_t d = 0; d < block->config.disk_count; d++) {
    uint64_t bytes = block_map_disk_bytes(&block->map, d, block->config.bytes);
    flap_status status = block_file_open(block->config.disks[d].path, bytes, &block->files[d]);
    if (status != FLAP_OK) {
      close_files(block);
      return status;
    }
  }
  return FLAP_OK;
}

static flap_status open_backend(flap_block *block) {
  switch (block->config.backend) {
  case FLAP_BLOCK_SIM:
    block->backend = &block_backend_sim;
    break;
  case FLAP_BLOCK_THREADS:
    block->backend = &block_backend_threads;
    break;
  case FLAP_BLOCK_URING:
  case FLAP_BLOCK_AUTO:
    block->backend = &block_backend_uring;
    break;
  }
  flap_status status = block->backend->open(block);
  if (status != FLAP_OK && block->config.backend == FLAP_BLOCK_AUTO) {
    flap_log(FLAP_LOG_WARNING, "%s; using threads instead, which is slower", flap_error_message());
    memset(block->state, 0, state_bytes(FLAP_BLOCK_AUTO));
    block->backend = &block_backend_threads;
    status = block->backend->open(block);
  }
  return status;
}

flap_status flap_block_open(const flap_block_config *config, flap_block **block_out) {
  *block_out = NULL;
  FLAP_TRY(check_config(config));
  flap_arena arena;
  FLAP_TRY(flap_arena_open(&arena, "block storage", flap_block_measure(config)));
  flap_block *block = lay_out(&arena, config);
  flap_arena_seal(&arena);
  block->arena = arena;
  for (uint32_t d = 0; d < config->disk_count; d++) {
    block->lanes[d][FLAP_BLOCK_READ].depth = config->read_depth == 0 ? DEPTH_DEFAULT : config->read_depth;
    block->lanes[d][FLAP_BLOCK_WRITE].depth = config->write_depth == 0 ? DEPTH_DEFAULT : config->write_depth;
  }
  pthread_mutex_init(&block->mutex, NULL);
  pthread_cond_init(&block->idle, NULL);
  flap_status status = open_files(block);
  if (status == FLAP_OK) {
    status = open_backend(block);
    if (status != FLAP_OK)
      close_files(block);
  }
  if (status != FLAP_OK) {
    pthread_cond_destroy(&block->idle);
    pthread_mutex_destroy(&block->mutex);
    flap_arena_close(&arena);
    return status;
  }
  *block_out = block;
  return FLAP_OK;
}

void flap_block_close(flap_block *block) {
  if (block == NULL)
    return;
  flap_block_flush(block);
  if (block->config.backend == FLAP_BLOCK_SIM && block->config.sim.clock != NULL) {
    while (block->requests_active > 0 && flap_clock_advance(block->config.sim.clock))
      ;
  }
  pthread_mutex_lock(&block->mutex);
  while (block->requests_active > 0)
    pthread_cond_wait(&block->idle, &block->mutex);
  pthread_mutex_unlock(&block->mutex);
  block->backend->close(block);
  close_files(block);
  pthread_cond_destroy(&block->idle);
  pthread_mutex_destroy(&block->mutex);
  flap_arena arena = block->arena; /* the block itself lies in it */
  flap_arena_close(&arena);
}

const char *flap_block_describe(const flap_block *block) {
  if (!block->backend->has_files)
    return "sim";
  bool direct = true;
  for (uint32_t d = 0; d < block->config.disk_count; d++)
    direct = direct && (block->files[d].direct || block_map_disk_bytes(&block->map, d, block->config.bytes) == 0);
  if (block->backend == &block_backend_uring)
    return direct ? "io_uring, O_DIRECT" : "io_uring, buffered";
  return direct ? "threads, O_DIRECT" : "threads, buffered";
}

/* --- requests ------------------------------------------------------------------------------------------------- */

static void queue_push(block_queue *queue, block_piece *piece) {
  piece->next = NULL;
  if (queue->last == NULL)
    queue->first = piece;
  else
    queue->last->next = piece;
  queue->last = piece;
}

static void queue_push_front(block_queue *queue, block_piece *piece) {
  piece->next = queue->first;
  queue->first = piece;
  if (queue->last == NULL)
    queue->last = piece;
}

static block_piece *queue_pop(block_queue *queue) {
  block_piece *piece = queue->first;
  if (piece == NULL)
    return NULL;
  queue->first = piece->next;
  if (queue->first == NULL)
    queue->last = NULL;
  piece->next = NULL;
  return piece;
}

static uint32_t block_file_index(uint32_t file) {
  flap_assert(file > 0 && file <= FLAP_BLOCK_FILES_MAX);
  return FLAP_BLOCK_DISKS_MAX + file - 1;
}

/* Mistakes of the caller, found where they are made. */
static void assert_request(const flap_block *block, const flap_block_request *request) {
  const flap_block_config *config = &block->config;
  flap_assert(request->op == FLAP_BLOCK_READ || request->op == FLAP_BLOCK_WRITE);
  flap_assert(request->bytes > 0 && request->bytes <= FLAP_BLOCK_REQUEST_BYTES_MAX);
  flap_assert(request->bytes % FLAP_BLOCK_ALIGN == 0 && request->offset % FLAP_BLOCK_ALIGN == 0);
  flap_assert(request->file <= FLAP_BLOCK_FILES_MAX);
  const block_file *file = request->file > 0 ? &block->files[block_file_index(request->file)] : NULL;
  const uint64_t space = file != NULL && file->fd >= 0 ? file->bytes : file != NULL ? 0 : config->bytes;
  flap_assert(request->offset <= space && request->bytes <= space - request->offset);
  if (config->backend == FLAP_BLOCK_SIM && config->sim.clock != NULL)
    return;
  uintptr_t buffer = (uintptr_t)request->buffer, memory = (uintptr_t)config->memory;
  flap_assert(buffer % FLAP_BLOCK_ALIGN == 0 && buffer >= memory);
  flap_assert(buffer - memory <= config->memory_bytes && request->bytes <= config->memory_bytes - (buffer - memory));
}

/* A file beside the linear space is all on the first disk. */
static void cut_into_pieces(flap_block *block, flap_block_request *request) {
  for (uint32_t done = 0; done < request->bytes;) {
    const block_run run = request->file > 0
                              ? (block_run){.disk = 0, .offset = request->offset, .bytes = request->bytes}
                              : block_map_find(&block->map, request->offset + done, request->bytes - done);
    block_piece *piece = block->pieces_free;
    flap_assert(piece != NULL);
    block->pieces_free = piece->next;
    *piece = (block_piece){.request = request,
                           .buffer = (unsigned char *)request->buffer + done,
                           .offset = run.offset,
                           .bytes_left = (uint32_t)run.bytes,
                           .disk = run.disk,
                           .file = request->file > 0 ? block_file_index(request->file) : run.disk,
                           .op = request->op};
    queue_push(&block->lanes[run.disk][request->op].waiting, piece);
    request->pieces_left++;
    done += (uint32_t)run.bytes;
  }
}

void flap_block_submit(flap_block *block, flap_block_request *request) {
  assert_request(block, request);
  request->status = FLAP_OK;
  request->os_error = 0;
  request->disk = 0;
  request->started_ns = request->ended_ns = 0;
  request->next = NULL;
  request->pieces_left = 0;
  memset(request->private_state, 0, sizeof request->private_state);
  pthread_mutex_lock(&block->mutex);
  flap_assert(block->requests_open < block->config.requests_max);
  block->requests_open++;
  block->requests_active++;
  if (block->backend->accept == NULL || !block->backend->accept(block, request))
    cut_into_pieces(block, request);
  pthread_mutex_unlock(&block->mutex);
}

void flap_block_flush(flap_block *block) {
  block->backend->start(block);
}

flap_block_request *flap_block_poll(flap_block *block) {
  pthread_mutex_lock(&block->mutex);
  flap_block_request *request = block->done_first;
  if (request != NULL) {
    block->done_first = request->next;
    if (block->done_first == NULL)
      block->done_last = NULL;
    request->next = NULL;
    block->requests_open--;
  }
  pthread_mutex_unlock(&block->mutex);
  return request;
}

/* --- files beside the linear space ------------------------------------------------------------------------------ */

static void set_file(flap_block *block, uint32_t index, block_file file) {
  block->files[index] = file;
  if (block->backend->file_changed != NULL)
    block->backend->file_changed(block, index);
}

flap_status flap_block_file_open(flap_block *block, uint32_t file, const char *folder, uint64_t bytes) {
  const uint32_t index = block_file_index(file);
  block_file opened;
  flap_assert(block->files[index].fd < 0 && bytes > 0 && bytes % FLAP_BLOCK_ALIGN == 0);
  flap_assert(block->backend->has_files && block->config.disk_count == 1);
  FLAP_TRY(block_file_open_linkable(folder, bytes, &opened));
  block->folder = folder;
  set_file(block, index, opened);
  return FLAP_OK;
}

bool flap_block_file_is_direct(const flap_block *block, uint32_t file) {
  return block->files[block_file_index(file)].direct;
}

flap_status flap_block_file_link(flap_block *block, uint32_t file, const char *path) {
  const int fd = block->files[block_file_index(file)].fd;
  flap_assert(fd >= 0);
  if (flap_system_fsync(fd) != 0)
    return flap_error_set_os(errno, "cannot make %s durable", path);
  if (flap_system_link(fd, path) != 0)
    return flap_error_set_os(errno, "cannot give the extents of the run the name %s", path);
  return FLAP_OK;
}

void flap_block_file_close(flap_block *block, uint32_t file) {
  const uint32_t index = block_file_index(file);
  block_file closed = block->files[index];
  if (closed.fd < 0)
    return;
  set_file(block, index, (block_file){.fd = -1});
  block_file_close(&closed);
}

/* --- for the backends ----------------------------------------------------------------------------------------- */

block_piece *block_piece_take(flap_block *block) {
  uint32_t lane_count = block->config.disk_count * 2;
  for (uint32_t i = 0; i < lane_count; i++) {
    uint32_t index = (block->lane_next + i) % lane_count;
    block_lane *lane = &block->lanes[index / 2][index % 2];
    if (lane->waiting.first == NULL || lane->in_flight == lane->depth)
      continue;
    block->lane_next = (index + 1) % lane_count;
    block_piece *piece = queue_pop(&lane->waiting);
    lane->in_flight++;
    if (piece->request->started_ns == 0)
      piece->request->started_ns = flap_units_now_ns();
    return piece;
  }
  return NULL;
}

/* What a transfer's result means for the rest of the piece: true when the piece is over, with *os_error_out. */
static bool piece_progress(block_piece *piece, int64_t result, int *os_error_out) {
  *os_error_out = 0;
  bool interrupted = result == -EINTR || result == -EAGAIN || result == -ECANCELED;
  if (result < 0 && !interrupted) {
    *os_error_out = (int)-result;
    return true;
  }
  if (result == 0) {
    /* The extent is as long as the space, so there is no end of file to reach. */
    *os_error_out = EIO;
    return true;
  }
  flap_assert(result <= (int64_t)piece->bytes_left);
  /* O_DIRECT may stop at any sector; it goes on only from where everything is aligned, so a part is moved again. */
  uint32_t moved = interrupted ? 0 : (uint32_t)result & ~(FLAP_BLOCK_ALIGN - 1);
  piece->buffer += moved;
  piece->offset += moved;
  piece->bytes_left -= moved;
  piece->tries = moved > 0 ? 0 : piece->tries + 1;
  if (piece->tries > TRIES_MAX)
    *os_error_out = interrupted ? (int)-result : EIO;
  return piece->bytes_left == 0 || *os_error_out != 0;
}

bool block_piece_settle(flap_block *block, block_piece *piece, int64_t result) {
  block_lane *lane = &block->lanes[piece->disk][piece->op];
  flap_assert(lane->in_flight > 0);
  lane->in_flight--;
  int os_error = 0;
  if (!piece_progress(piece, result, &os_error)) {
    queue_push_front(&lane->waiting, piece);
    return false;
  }
  flap_block_request *request = piece->request;
  if (os_error != 0 && request->status == FLAP_OK) {
    request->status = os_error == ENOSPC || os_error == EDQUOT ? FLAP_NO_SPACE : FLAP_IO;
    request->os_error = os_error;
    request->disk = piece->disk;
  }
  piece->next = block->pieces_free;
  block->pieces_free = piece;
  flap_assert(request->pieces_left > 0);
  if (--request->pieces_left > 0)
    return false;
  block_request_complete(block, request, flap_units_now_ns());
  return true;
}

void block_request_complete(flap_block *block, flap_block_request *request, uint64_t now_ns) {
  request->ended_ns = now_ns;
  request->next = NULL;
  if (block->done_last == NULL)
    block->done_first = request;
  else
    block->done_last->next = request;
  block->done_last = request;
  flap_assert(block->requests_active > 0);
  if (--block->requests_active == 0)
    pthread_cond_broadcast(&block->idle);
}

void block_notify(flap_block *block) {
  if (block->config.notify != NULL)
    block->config.notify(block->config.notify_context);
}

/* Signals are for the threads that expect them. */
int block_thread_start(pthread_t *thread, void *(*main)(void *), void *argument) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int os_error = pthread_create(thread, NULL, main, argument);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return os_error;
}

/* --- for people ----------------------------------------------------------------------------------------------- */

const char *flap_block_locate(const flap_block *block, uint64_t offset, uint64_t *place_out) {
  const block_run run = block_map_find(&block->map, offset, 1);
  *place_out = run.offset;
  return block->config.disks[run.disk].path;
}

flap_status flap_block_explain(const flap_block *block, const flap_block_request *request) {
  if (request->status == FLAP_OK)
    return FLAP_OK;
  const char *path = request->file > 0 ? block->folder : block->config.disks[request->disk].path;
  const char *verb = request->op == FLAP_BLOCK_READ ? "reading" : "writing";
  const char *advice =
      request->status == FLAP_NO_SPACE
          ? request->file > 0 ? "free some space there" : "free some space there, or give this disk a smaller size"
          : "look at the system's log (dmesg) and check the drive";
  char size[FLAP_UNITS_TEXT_MAX], text[128];
  flap_units_format_bytes(request->bytes, size, sizeof size);
  return flap_error_set(request->status, "disk %s: %s %s at byte %llu failed: %s; %s", path, verb, size,
                        (unsigned long long)request->offset, strerror_r(request->os_error, text, sizeof text), advice);
}
