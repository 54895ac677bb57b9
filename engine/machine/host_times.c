#include "engine/machine/host_times.h"

#include "base/arena.h"
#include "base/assert.h"
#include "base/units.h"
#include "engine/step/update.h"
#include "kernels/device/measure_memory.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SLICE_ELEMENTS ((uint64_t)1 << 22)
/* Slices are updated in turn, so that caches hold none of the next ones; but they do not forget in turn, and of a few
 * times as much as they hold a part is found there. */
#define SLICES_MIN 12u /* 0.7 GB with bf16 */
#define SLICES_MAX 48u
#define CACHES 6u
#define PINNED_BYTES_MIN (256 * FLAP_MIB)
#define ROUNDS 5
#define SETTLE_NS 20000000
#define COPIES_NS 100000000
#define WINDOW (FLAP_HOST_TIMES_EVENTS / 2) /* copies under way in each direction */

/* ---- an update, over and over ------------------------------------------------------------------------------ */

/* Slices one behind the other: states, weights, gradient. */
typedef struct slices {
  flap_state_format format;
  flap_update update; /* but for where its bytes are */
  uint64_t states_bytes, weights_bytes, slice_bytes;
  uint32_t count;
  flap_arena arena; /* pages as large as those of a run's memory */
  unsigned char *memory;
  uint8_t *decay;
  int32_t fault;
} slices;

static void size_slices(const flap_op_times_spec *spec, flap_part part, slices *s) {
  s->format = flap_layout_state_format(spec->shape.dtype, spec->optim, part);
  s->states_bytes = flap_units_round_up(flap_layout_state_bytes(&s->format, SLICE_ELEMENTS), 4096);
  s->weights_bytes = SLICE_ELEMENTS * flap_dtype_bytes(spec->shape.dtype);
  s->slice_bytes = s->states_bytes + s->weights_bytes + SLICE_ELEMENTS * flap_dtype_bytes(spec->gradient_dtype);
  const uint64_t wanted = CACHES * flap_measure_cache_bytes() / s->slice_bytes;
  s->count = wanted < SLICES_MIN ? SLICES_MIN : wanted < SLICES_MAX ? (uint32_t)wanted : SLICES_MAX;
}

uint64_t flap_host_times_pinned_bytes(void) {
  const uint64_t beyond_caches = flap_units_round_up(flap_measure_host_bytes(), FLAP_HOST_TIMES_VRAM_BYTES);
  return beyond_caches < PINNED_BYTES_MIN ? PINNED_BYTES_MIN : beyond_caches;
}

/* The embedding's states are never of fewer bytes than a layer's. */
uint64_t flap_host_times_bytes(const flap_op_times_spec *spec) {
  slices s;
  size_slices(spec, FLAP_PART_EMBEDDING, &s);
  return s.count * s.slice_bytes + flap_host_times_pinned_bytes();
}

static flap_status open_slices(const flap_op_times_spec *spec, flap_part part, slices *s) {
  size_slices(spec, part, s);
  s->decay = calloc(SLICE_ELEMENTS / FLAP_OPS_BLOCK / 8, 1);
  if (s->decay == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory to measure the host");
  FLAP_TRY(flap_arena_open(&s->arena, "measuring the host", s->count * s->slice_bytes));
  s->memory = flap_arena_take(&s->arena, s->count * s->slice_bytes, 4096);
  memset(s->memory, 0, s->count * s->slice_bytes);
  s->update = (flap_update){.weight_dtype = spec->shape.dtype,
                            .gradient_dtype = spec->gradient_dtype,
                            .format = &s->format,
                            .elements = SLICE_ELEMENTS,
                            .decay_blocks = s->decay,
                            .fault = &s->fault};
  return FLAP_OK;
}

static void close_slices(slices *s) {
  if (s->memory != NULL)
    flap_arena_close(&s->arena);
  free(s->decay);
}

static void update_all(flap_host_optimizer *optimizer, slices *s) {
  for (uint32_t i = 0; i < s->count; i++) {
    unsigned char *slice = s->memory + i * s->slice_bytes;
    s->update.states = slice;
    s->update.weights = slice + s->states_bytes;
    s->update.gradient = slice + s->states_bytes + s->weights_bytes;
    flap_update_on_host(optimizer, &flap_update_usual_scalars, &s->update);
  }
}

/* The median of several rounds, per element. */
static double time_updates(flap_host_optimizer *optimizer, slices *s) {
  uint64_t times_ns[ROUNDS];
  for (int round = 0; round < ROUNDS; round++) {
    const uint64_t started_ns = flap_units_now_ns();
    update_all(optimizer, s);
    const uint64_t ns = flap_units_now_ns() - started_ns;
    int at = round;
    for (; at > 0 && times_ns[at - 1] > ns; at--)
      times_ns[at] = times_ns[at - 1];
    times_ns[at] = ns;
  }
  return (double)times_ns[ROUNDS / 2] / (double)(s->count * SLICE_ELEMENTS);
}

static void sleep_ns(long ns) {
  const struct timespec time = {.tv_nsec = ns};
  (void)nanosleep(&time, NULL);
}

/* ---- copies meanwhile -------------------------------------------------------------------------------------- */

typedef struct traffic {
  flap_device *device;
  unsigned char *vram, *pinned;
  _Atomic bool stop;
  _Atomic uint64_t copied; /* pairs of copies that ended */
  pthread_t thread;
} traffic;

/* Up out of one half of what is pinned, down into the other. */
static void *copy_both_ways(void *context) {
  traffic *t = context;
  const uint64_t bytes = FLAP_HOST_TIMES_VRAM_BYTES / 2, half = flap_host_times_pinned_bytes() / 2;
  for (uint64_t n = 0; !atomic_load(&t->stop); n++) {
    const flap_event up = (flap_event)(n % WINDOW * 2), down = up + 1;
    if (n >= WINDOW) {
      flap_device_event_wait(t->device, up);
      flap_device_event_wait(t->device, down);
      atomic_fetch_add(&t->copied, 1);
    }
    unsigned char *place = t->pinned + n % (half / bytes) * bytes;
    flap_device_copy(t->device, FLAP_STREAM_H2D, t->vram, place, bytes);
    flap_device_event_record(t->device, up, FLAP_STREAM_H2D, false);
    flap_device_copy(t->device, FLAP_STREAM_D2H, place + half, t->vram + bytes, bytes);
    flap_device_event_record(t->device, down, FLAP_STREAM_D2H, false);
  }
  return NULL;
}

static flap_status start_traffic(traffic *t) {
  atomic_store(&t->stop, false);
  atomic_store(&t->copied, 0);
  const int error = pthread_create(&t->thread, NULL, copy_both_ways, t);
  return error == 0 ? FLAP_OK : flap_error_set_os(error, "cannot start a thread to measure the host");
}

static flap_status end_traffic(traffic *t) {
  atomic_store(&t->stop, true);
  pthread_join(t->thread, NULL);
  return flap_device_synchronize(t->device);
}

/* ---- both -------------------------------------------------------------------------------------------------- */

/* Pairs of copies in a nanosecond, since some were counted. */
static double copies_per_ns(const traffic *t, uint64_t counted, uint64_t since_ns) {
  return (double)(atomic_load(&t->copied) - counted) / (double)(flap_units_now_ns() - since_ns);
}

/* Updates while copies go on, and how many times as long the copies take as without. */
static void time_both(flap_host_optimizer *optimizer, slices *s, traffic *t, double *update_ns, double *slowdown) {
  sleep_ns(SETTLE_NS);
  uint64_t counted = atomic_load(&t->copied), since_ns = flap_units_now_ns();
  sleep_ns(COPIES_NS);
  const double alone = copies_per_ns(t, counted, since_ns);
  counted = atomic_load(&t->copied);
  since_ns = flap_units_now_ns();
  *update_ns = time_updates(optimizer, s);
  const double beside = copies_per_ns(t, counted, since_ns);
  *slowdown = beside > 0 && beside < alone ? alone / beside : 1;
}

static flap_status measure_part(const flap_op_times_spec *spec, flap_part part, flap_host_optimizer *optimizer,
                                traffic *t, flap_host_ns *ns_out, double *slowdown_out) {
  slices s = {.memory = NULL};
  flap_status status = open_slices(spec, part, &s);
  if (status == FLAP_OK) {
    update_all(optimizer, &s); /* starts threads' caches and pages */
    ns_out->alone = time_updates(optimizer, &s);
    status = start_traffic(t);
  }
  if (status == FLAP_OK) {
    time_both(optimizer, &s, t, &ns_out->beside_copies, slowdown_out);
    status = end_traffic(t);
  }
  close_slices(&s);
  return status;
}

flap_status flap_host_times_measure(const flap_op_times_spec *spec, flap_device *device, void *vram, void *pinned,
                                    flap_op_times *times) {
  traffic t = {.device = device, .vram = vram, .pinned = pinned};
  flap_host_optimizer *optimizer = NULL;
  double slowdown = 1;
  FLAP_TRY(flap_host_optimizer_open(flap_update_host_threads(spec->threads), &optimizer));
  flap_status status = measure_part(spec, FLAP_PART_LAYER, optimizer, &t, &times->host, &times->copies_beside_host);
  times->host_embedding = times->host;
  if (status == FLAP_OK && flap_layout_has_codes(spec->optim, FLAP_PART_LAYER))
    status = measure_part(spec, FLAP_PART_EMBEDDING, optimizer, &t, &times->host_embedding, &slowdown);
  flap_host_optimizer_close(optimizer);
  return status;
}

/* Of an update of one element: states and weight read and written, the gradient read. */
static double host_bytes(const flap_op_times_spec *spec, flap_part part) {
  const flap_state_format format = flap_layout_state_format(spec->shape.dtype, spec->optim, part);
  const double states = (double)flap_layout_state_bytes(&format, FLAP_OPS_BLOCK) / FLAP_OPS_BLOCK;
  return 2 * (states + (double)flap_dtype_bytes(spec->shape.dtype)) + (double)flap_dtype_bytes(spec->gradient_dtype);
}

void flap_host_times_from_rate(const flap_op_times_spec *spec, double bytes_per_second, flap_op_times *times) {
  times->copies_beside_host = 1;
  times->host.alone = times->host.beside_copies = host_bytes(spec, FLAP_PART_LAYER) / bytes_per_second * 1e9;
  times->host_embedding.alone = times->host_embedding.beside_copies =
      host_bytes(spec, FLAP_PART_EMBEDDING) / bytes_per_second * 1e9;
}

double flap_host_times_rate(const flap_op_times_spec *spec, double ns_an_element) {
  return host_bytes(spec, FLAP_PART_LAYER) / ns_an_element * 1e9;
}
