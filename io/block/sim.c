/* The simulated disk, in two kinds.
 *
 * On a virtual clock: no bytes and no threads. The read lane and the write lane each serve requests in the order of
 * their submission, one after the other at the lane's rate; a request completes `latency` after its last byte. Where
 * both lanes together do less than each alone, a request that starts beside the other lane's gets what that leaves.
 *
 * In memory: a thread holds the pieces in flight, gives each a seeded delay, and serves them as they fall due, so that
 * completions come out of order. It may serve a piece in parts, as systems do, and may fail as told. Only that thread
 * touches the store.
 */
#include "io/block/block_internal.h"

#include "base/assert.h"
#include "base/duplex.h"
#include "base/philox.h"
#include "base/units.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define SECTOR_BYTES 512u

typedef enum sim_fault { FAULT_NONE, FAULT_IO, FAULT_FULL, FAULT_CORRUPT, FAULT_LOSE } sim_fault;

typedef struct sim_state {
  /* on the clock */
  uint64_t lane_free_ns[2];
  /* in memory; under the block's mutex, except the store */
  pthread_t thread;
  pthread_cond_t work;
  bool stopping;
  flap_philox stream;
  uint64_t draws;
  uint64_t counts[2]; /* requests so far, reads and writes */
  block_piece *in_flight;
  unsigned char *store[FLAP_BLOCK_DISKS_MAX];
  uint64_t store_bytes[FLAP_BLOCK_DISKS_MAX];
} sim_state;

/* --- on the clock --------------------------------------------------------------------------------------------- */

static void complete_on_clock(void *context) {
  flap_block_request *request = context;
  flap_block *block = (flap_block *)(uintptr_t)request->private_state[0];
  pthread_mutex_lock(&block->mutex);
  block_request_complete(block, request, flap_clock_now_ns(block->config.sim.clock));
  pthread_mutex_unlock(&block->mutex);
  block_notify(block);
}

static void accept_on_clock(flap_block *block, flap_block_request *request) {
  sim_state *state = block->state;
  const flap_block_sim *sim = &block->config.sim;
  const bool reads = request->op == FLAP_BLOCK_READ;
  const flap_duplex lanes = {.alone_bytes = reads ? sim->read_bytes_per_second : sim->write_bytes_per_second,
                             .other_alone_bytes = reads ? sim->write_bytes_per_second : sim->read_bytes_per_second,
                             .both_bytes = sim->both_bytes_per_second};
  uint64_t *free_ns = &state->lane_free_ns[request->op];
  uint64_t now_ns = flap_clock_now_ns(sim->clock);
  request->started_ns = now_ns > *free_ns ? now_ns : *free_ns;
  /* Whatever the other lane has left it works on from now on, without a gap. */
  *free_ns = flap_duplex_end_ns(&lanes, request->started_ns, request->bytes, now_ns,
                                state->lane_free_ns[reads ? FLAP_BLOCK_WRITE : FLAP_BLOCK_READ]);
  request->private_state[0] = (uint64_t)(uintptr_t)block;
  flap_clock_schedule(sim->clock, *free_ns + sim->latency_ns, complete_on_clock, request);
}

/* --- in memory ------------------------------------------------------------------------------------------------ */

static uint64_t draw_below(sim_state *state, uint64_t bound) {
  return flap_philox_below(&state->stream, state->draws++, bound);
}

static bool draw_chance(sim_state *state, double probability) {
  return probability > 0 && (double)draw_below(state, (uint64_t)1 << 32) < probability * 0x1p32;
}

static sim_fault choose_fault(const flap_block_sim *sim, flap_block_op op, uint64_t count) {
  if (op == FLAP_BLOCK_READ)
    return count == sim->fail_read_at ? FAULT_IO : count == sim->corrupt_read_at ? FAULT_CORRUPT : FAULT_NONE;
  if (count == sim->corrupt_write_at)
    return FAULT_CORRUPT;
  if (count == sim->fail_write_at)
    return FAULT_IO;
  if (count == sim->full_write_at)
    return FAULT_FULL;
  return count == sim->lose_write_at ? FAULT_LOSE : FAULT_NONE;
}

static bool sim_accept(flap_block *block, flap_block_request *request) {
  sim_state *state = block->state;
  if (block->config.sim.clock != NULL) {
    accept_on_clock(block, request);
    return true;
  }
  request->private_state[0] = (uint64_t)choose_fault(&block->config.sim, request->op, ++state->counts[request->op]);
  return false;
}

/* How many bytes the piece gets this time, or -errno. */
static int64_t choose_result(sim_state *state, const flap_block_sim *sim, const block_piece *piece) {
  if (!draw_chance(state, sim->split_probability))
    return piece->bytes_left;
  uint64_t kind = draw_below(state, 8);
  if (kind == 0)
    return -EINTR;
  if (kind == 1)
    return -EAGAIN;
  /* A part of at least one sector, short of everything; the last page always comes whole, or it might never. */
  if (piece->bytes_left <= FLAP_BLOCK_ALIGN)
    return piece->bytes_left;
  return (int64_t)(SECTOR_BYTES * (1 + draw_below(state, piece->bytes_left / SECTOR_BYTES - 1)));
}

/* With the mutex held: what happens to the piece now. Faults hit the request once, wherever its pieces lie; a lost
 * write is lost in all of them. */
static int64_t decide(flap_block *block, block_piece *piece, sim_fault *fault_out, uint64_t *flip_bit_out) {
  sim_state *state = block->state;
  uint64_t *pending = &piece->request->private_state[0];
  *fault_out = (sim_fault)*pending;
  if (*fault_out == FAULT_IO || *fault_out == FAULT_FULL) {
    *pending = FAULT_NONE;
    return *fault_out == FAULT_IO ? -EIO : -ENOSPC;
  }
  /* As O_DIRECT would. */
  if (piece->offset % FLAP_BLOCK_ALIGN != 0 || (uintptr_t)piece->buffer % FLAP_BLOCK_ALIGN != 0)
    return -EINVAL;
  int64_t result = choose_result(state, &block->config.sim, piece);
  if (*fault_out == FAULT_CORRUPT) {
    /* The flipped bit must lie in what counts as moved, or the next part would mend it. */
    if (result >= FLAP_BLOCK_ALIGN) {
      *pending = FAULT_NONE;
      *flip_bit_out = draw_below(state, ((uint64_t)result & ~(uint64_t)(FLAP_BLOCK_ALIGN - 1)) * 8);
    } else {
      *fault_out = FAULT_NONE;
    }
  }
  return result;
}

static void move_bytes(sim_state *state, const block_piece *piece, int64_t bytes, sim_fault fault, uint64_t flip_bit) {
  if (bytes <= 0)
    return;
  unsigned char *stored = state->store[piece->disk] + piece->offset;
  flap_assert(piece->offset + (uint64_t)bytes <= state->store_bytes[piece->disk]);
  if (piece->op == FLAP_BLOCK_READ)
    memcpy(piece->buffer, stored, (size_t)bytes);
  else if (fault != FAULT_LOSE)
    memcpy(stored, piece->buffer, (size_t)bytes);
  if (fault == FAULT_CORRUPT)
    (piece->op == FLAP_BLOCK_READ ? piece->buffer : stored)[flip_bit / 8] ^= (unsigned char)(1u << flip_bit % 8);
}

static void take_waiting(flap_block *block) {
  sim_state *state = block->state;
  block_piece *piece;
  while ((piece = block_piece_take(block)) != NULL) {
    piece->due_ns = flap_units_now_ns() + draw_below(state, block->config.sim.latency_ns + 1);
    /* Without a latency everything is due at once, and this alone makes the order. */
    piece->order = draw_below(state, UINT64_MAX);
    if (block->config.sim.latency_ns == 0)
      piece->due_ns = 0;
    piece->next = state->in_flight;
    state->in_flight = piece;
  }
}

static block_piece **find_next_due(sim_state *state) {
  block_piece **best = &state->in_flight;
  for (block_piece **link = best; *link != NULL; link = &(*link)->next) {
    const block_piece *a = *link, *b = *best;
    if (a->due_ns < b->due_ns || (a->due_ns == b->due_ns && a->order < b->order))
      best = link;
  }
  return best;
}

/* With the mutex held; it is released while bytes move and while others are told. */
static void serve(flap_block *block, block_piece *piece) {
  sim_fault fault = FAULT_NONE;
  uint64_t flip_bit = 0;
  int64_t result = decide(block, piece, &fault, &flip_bit);
  pthread_mutex_unlock(&block->mutex);
  move_bytes(block->state, piece, result, fault, flip_bit);
  pthread_mutex_lock(&block->mutex);
  if (block_piece_settle(block, piece, result)) {
    pthread_mutex_unlock(&block->mutex);
    block_notify(block);
    pthread_mutex_lock(&block->mutex);
  }
}

static void *sim_main(void *argument) {
  flap_block *block = argument;
  sim_state *state = block->state;
  pthread_mutex_lock(&block->mutex);
  for (;;) {
    take_waiting(block);
    if (state->in_flight == NULL) {
      if (state->stopping)
        break;
      pthread_cond_wait(&state->work, &block->mutex);
      continue;
    }
    block_piece **link = find_next_due(state), *piece = *link;
    if (piece->due_ns > flap_units_now_ns()) {
      struct timespec until = {.tv_sec = (time_t)(piece->due_ns / 1000000000u),
                               .tv_nsec = (long)(piece->due_ns % 1000000000u)};
      (void)pthread_cond_timedwait(&state->work, &block->mutex, &until);
      continue;
    }
    *link = piece->next;
    serve(block, piece);
  }
  pthread_mutex_unlock(&block->mutex);
  return NULL;
}

/* --- open and close ------------------------------------------------------------------------------------------- */

static void sim_start(flap_block *block) {
  sim_state *state = block->state;
  if (block->config.sim.clock != NULL)
    return;
  pthread_mutex_lock(&block->mutex);
  pthread_cond_signal(&state->work);
  pthread_mutex_unlock(&block->mutex);
}

static void unmap_stores(sim_state *state) {
  for (uint32_t d = 0; d < FLAP_BLOCK_DISKS_MAX; d++)
    if (state->store[d] != NULL)
      (void)munmap(state->store[d], (size_t)state->store_bytes[d]);
}

static flap_status map_stores(flap_block *block) {
  sim_state *state = block->state;
  for (uint32_t d = 0; d < block->config.disk_count; d++) {
    uint64_t bytes = block_map_disk_bytes(&block->map, d, block->config.bytes);
    if (bytes == 0)
      continue;
    void *store = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (store == MAP_FAILED) {
      char size[FLAP_UNITS_TEXT_MAX];
      (void)flap_error_set_os(errno, "simulated disk: cannot map %s",
                              flap_units_format_bytes(bytes, size, sizeof size));
      unmap_stores(state);
      return FLAP_NO_MEMORY;
    }
    state->store[d] = store;
    state->store_bytes[d] = bytes;
  }
  return FLAP_OK;
}

static flap_status sim_open(flap_block *block) {
  sim_state *state = block->state;
  const flap_block_sim *sim = &block->config.sim;
  if (sim->clock != NULL) {
    if (!(sim->read_bytes_per_second > 0) || !(sim->write_bytes_per_second > 0) || !(sim->both_bytes_per_second >= 0))
      return flap_error_set(FLAP_INVALID, "simulated disk: its rates must be above 0");
    return FLAP_OK;
  }
  FLAP_TRY(map_stores(block));
  state->stream = flap_philox_stream(sim->seed, "simulated disk");
  pthread_condattr_t attributes;
  pthread_condattr_init(&attributes);
  pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  pthread_cond_init(&state->work, &attributes);
  pthread_condattr_destroy(&attributes);
  int os_error = block_thread_start(&state->thread, sim_main, block);
  if (os_error == 0)
    return FLAP_OK;
  pthread_cond_destroy(&state->work);
  unmap_stores(state);
  (void)flap_error_set_os(os_error, "simulated disk: cannot start a thread");
  return FLAP_NO_MEMORY;
}

static void sim_close(flap_block *block) {
  sim_state *state = block->state;
  if (block->config.sim.clock != NULL)
    return;
  pthread_mutex_lock(&block->mutex);
  state->stopping = true;
  pthread_cond_signal(&state->work);
  pthread_mutex_unlock(&block->mutex);
  pthread_join(state->thread, NULL);
  pthread_cond_destroy(&state->work);
  unmap_stores(state);
}

const block_backend block_backend_sim = {
    .name = "sim",
    .has_files = false,
    .state_bytes = sizeof(sim_state),
    .open = sim_open,
    .accept = sim_accept,
    .start = sim_start,
    .close = sim_close,
};
