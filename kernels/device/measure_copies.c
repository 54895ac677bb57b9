/* Copies between host and device: by size, way and kind of memory; and what pinning takes. */
#include "kernels/device/measure_memory.h"

#include "base/arena.h"
#include "base/assert.h"
#include "base/units.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define AREAS 3u /* that are pinned, for the median of so many times */
#define ALIGN ((uint64_t)2 << 20)

struct flap_copies_meter {
  flap_device *device;
  flap_arena pageable, pinned[AREAS];
  uint64_t bytes_max;
  /* one measurement */
  flap_copies_way way;
  unsigned char *host;
  uint64_t bytes, units;
};

static flap_status take_area(flap_arena *arena, uint64_t bytes) {
  FLAP_TRY(flap_arena_open(arena, "measuring copies", bytes));
  (void)flap_arena_take(arena, bytes, ALIGN);
  return FLAP_OK;
}

static flap_status pin_areas(flap_copies_meter *meter, uint64_t bytes, flap_rate *pin_out) {
  double rates[AREAS];
  for (uint32_t i = 0; i < AREAS; i++) {
    FLAP_TRY(take_area(&meter->pinned[i], bytes));
    const uint64_t started_ns = flap_units_now_ns();
    FLAP_TRY(flap_device_pin_host(meter->device, meter->pinned[i].base, bytes));
    const uint64_t ns = flap_units_now_ns() - started_ns;
    rates[i] = (double)bytes * 1e9 / (double)(ns > 0 ? ns : 1);
  }
  *pin_out = flap_rate_of(rates, AREAS);
  return FLAP_OK;
}

static flap_status open_all(flap_copies_meter *meter, flap_device_kind kind, uint64_t vram_bytes, uint64_t pin_bytes,
                            flap_rate *pin_out) {
  const flap_device_config config = {.kind = kind, .vram_bytes = vram_bytes, .events_max = 1};
  uint64_t arena_bytes = 0;
  FLAP_TRY(flap_device_open(&config, &meter->device));
  (void)flap_device_arena(meter->device, &arena_bytes);
  if (arena_bytes < 2 * meter->bytes_max) {
    char wanted[FLAP_UNITS_TEXT_MAX], there[FLAP_UNITS_TEXT_MAX];
    return flap_error_set(FLAP_NO_MEMORY, "vram: copies of this size need %s, and %s are left of it; raise vram",
                          flap_units_format_bytes(2 * meter->bytes_max, wanted, sizeof wanted),
                          flap_units_format_bytes(arena_bytes, there, sizeof there));
  }
  FLAP_TRY(take_area(&meter->pageable, 2 * meter->bytes_max));
  memset(meter->pageable.base, 1, 2 * meter->bytes_max); /* so that no copy takes pages */
  FLAP_TRY(pin_areas(meter, pin_bytes, pin_out));
  memset(meter->pinned[0].base, 1, 2 * meter->bytes_max); /* the one that copies use */
  return FLAP_OK;
}

flap_status flap_copies_meter_open(flap_device_kind kind, uint64_t vram_bytes, uint64_t bytes_max, uint64_t pin_bytes,
                                   flap_copies_meter **meter_out, flap_rate *pin_out) {
  *meter_out = NULL;
  *pin_out = (flap_rate){0};
  flap_assert(bytes_max > 0 && bytes_max % ALIGN == 0 && pin_bytes >= 2 * bytes_max);
  flap_copies_meter *meter = calloc(1, sizeof *meter);
  if (meter == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "measuring copies: no memory");
  meter->bytes_max = bytes_max;
  const flap_status status = open_all(meter, kind, vram_bytes, pin_bytes, pin_out);
  if (status != FLAP_OK)
    flap_copies_meter_close(meter);
  else
    *meter_out = meter;
  return status;
}

const char *flap_copies_meter_describe(const flap_copies_meter *meter) {
  return flap_device_describe(meter->device);
}

/* One direction has the first half of host and arena, the other the second. */
static void launch_way(flap_copies_meter *meter, flap_stream stream) {
  const uint64_t half = stream == FLAP_STREAM_H2D ? 0 : meter->bytes_max;
  unsigned char *there = (unsigned char *)flap_device_arena(meter->device, &(uint64_t){0}) + half;
  unsigned char *here = meter->host + half;
  for (uint64_t i = 0; i < meter->units; i++)
    flap_device_copy(meter->device, stream, stream == FLAP_STREAM_H2D ? there : here,
                     stream == FLAP_STREAM_H2D ? here : there, meter->bytes);
}

static void *launch_back(void *context) {
  launch_way(context, FLAP_STREAM_D2H);
  return NULL;
}

static flap_status run_copies(void *context, uint64_t units) {
  flap_copies_meter *meter = context;
  pthread_t thread;
  meter->units = units;
  if (meter->way == FLAP_COPIES_BOTH) {
    const int error = pthread_create(&thread, NULL, launch_back, meter);
    if (error != 0)
      return flap_error_set_os(error, "measuring copies: cannot start a thread");
  }
  if (meter->way != FLAP_COPIES_D2H)
    launch_way(meter, FLAP_STREAM_H2D);
  else
    launch_way(meter, FLAP_STREAM_D2H);
  if (meter->way == FLAP_COPIES_BOTH)
    (void)pthread_join(thread, NULL);
  return flap_device_synchronize(meter->device);
}

flap_status flap_copies_measure(flap_copies_meter *meter, flap_copies_way way, bool pinned, uint64_t bytes,
                                const flap_rate_effort *effort, flap_rate *rate_out) {
  flap_assert(bytes > 0 && bytes <= meter->bytes_max);
  meter->way = way;
  meter->host = pinned ? meter->pinned[0].base : meter->pageable.base;
  meter->bytes = bytes;
  return flap_rate_measure(effort, run_copies, meter, (double)bytes * (way == FLAP_COPIES_BOTH ? 2 : 1), rate_out);
}

void flap_copies_meter_close(flap_copies_meter *meter) {
  if (meter == NULL)
    return;
  flap_device_close(meter->device); /* unpins */
  flap_arena_close(&meter->pageable);
  for (uint32_t i = 0; i < AREAS; i++)
    flap_arena_close(&meter->pinned[i]);
  free(meter);
}
