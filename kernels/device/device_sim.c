/* The simulated device: no bytes, a virtual clock, and the rates of a machine profile.
 *
 * 1. A stream is a lane, first come first served: `free_ns` is when everything launched on it so far has ended. Work
 *    starts at max(now, free_ns), and its end is known when it is launched. So an event is a time.
 * 2. machine.synchronous: whoever launches on the compute stream lives through it: the clock stands at the end of the
 *    work when the launch returns, and ran everything else that happened meanwhile. Otherwise launches run ahead.
 * 3. machine.shared_cores: a copy of duration d takes d / shared_cores of the compute lane, charged at the moment when
 *    the copy starts, so that a copy that ran while nothing was computed delays nothing that comes later. A launch that
 *    is being lived through is stretched; one that ran ahead keeps the end that was promised. Copies are never slowed.
 * 4. machine.h2d_both_bytes and d2h_both_bytes: a copy that starts while the other direction is busy gets what both
 *    together can do, less what the other was promised. `busy_from_ns` is where the lane's last copies without a gap
 *    begin: earlier ones are forgotten.
 * 5. Work on the compute stream that bears a label is told to the observer when it is launched, with the end that it
 * has then.
 * 6. A notify is scheduled on the clock at the time of its event. Close waits for all of them.
 */
#include "kernels/device/device_internal.h"

#include "base/assert.h"
#include "base/duplex.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SIM_ARENA ((uintptr_t)1 << 46) /* nobody's address; may be computed with */
#define SIM_TIME_MAX 4e18              /* ns; a launch that long is a mistake in the profile */

/* What a copy on a lane will take from the compute lane when it starts; copies of a lane start in order. */
typedef struct charges {
  uint64_t *ns;
  uint32_t first, count, capacity;
} charges;

typedef struct sim_device {
  flap_device base;
  uint64_t *events; /* the time of each event */
  uint64_t free_ns[FLAP_STREAM_COUNT], busy_from_ns[FLAP_STREAM_COUNT];
  double slowdown; /* of copies */
  uint64_t label;  /* of what is launched on the compute stream; 0: none */
  charges charges[FLAP_STREAM_COUNT];
  uint32_t scheduled; /* functions that the clock still holds for us */
} sim_device;

static sim_device *self(flap_device *device) {
  return (sim_device *)device;
}
static uint64_t now(const sim_device *sim) {
  return flap_clock_now_ns(sim->base.config.clock);
}
static uint64_t later(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

static uint64_t duration(double amount, double per_second) {
  double ns = amount / per_second * 1e9;
  flap_assert(ns >= 0 && ns < SIM_TIME_MAX);
  return (uint64_t)llround(ns);
}

/* ---- open and close ------------------------------------------------------------------------------------- */

static flap_status check_machine(const flap_machine *machine) {
  const struct {
    const char *name;
    double rate;
  } rates[] = {
      {"flops_bf16", machine->flops_bf16}, {"flops_f32", machine->flops_f32}, {"device_bytes", machine->device_bytes},
      {"h2d_bytes", machine->h2d_bytes},   {"d2h_bytes", machine->d2h_bytes},
  };
  for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++)
    if (!(rates[i].rate > 0) || !isfinite(rates[i].rate))
      return flap_error_set(FLAP_INVALID, "machine \"%.63s\": %s is %g; a rate per second above 0 is needed",
                            machine->name, rates[i].name, rates[i].rate);
  if (!(machine->h2d_both_bytes >= 0) || !(machine->d2h_both_bytes >= 0) || !isfinite(machine->h2d_both_bytes) ||
      !isfinite(machine->d2h_both_bytes))
    return flap_error_set(FLAP_INVALID,
                          "machine \"%.63s\": h2d_both_bytes is %g and d2h_both_bytes %g; rates per second, "
                          "or 0 where they are not known, are needed",
                          machine->name, machine->h2d_both_bytes, machine->d2h_both_bytes);
  return FLAP_OK;
}

static flap_status sim_open(flap_device *base) {
  sim_device *sim = self(base);
  const flap_device_config *config = &base->config;
  flap_assert(config->clock);
  FLAP_TRY(check_machine(&config->machine));
  if (config->vram_bytes > SIM_ARENA)
    return flap_error_set(
        FLAP_INVALID,
        "vram: %llu bytes are more than can be planned with (%llu): lower vram, or the batch or sequences "
        "that need so much",
        (unsigned long long)config->vram_bytes, (unsigned long long)SIM_ARENA);
  sim->events = calloc(config->events_max ? config->events_max : 1, sizeof *sim->events);
  if (!sim->events)
    return flap_error_set(FLAP_NO_MEMORY, "device sim: no memory for %u events", config->events_max);
  snprintf(base->description, sizeof base->description, "sim of %.63s", config->machine.name);
  base->arena = (void *)SIM_ARENA; /* never dereferenced */
  base->arena_bytes = config->vram_bytes;
  sim->slowdown = 1;
  return FLAP_OK;
}

static flap_status sim_pin_host(flap_device *device, void *memory, uint64_t bytes) {
  (void)device, (void)memory, (void)bytes;
  return FLAP_OK;
}

/* ---- shared cores --------------------------------------------------------------------------------------- */

static void charge(sim_device *sim, uint64_t ns) {
  uint64_t *free_ns = &sim->free_ns[FLAP_STREAM_COMPUTE];
  *free_ns = later(*free_ns, now(sim)) + ns;
}

static void charge_next(sim_device *sim, flap_stream stream) {
  charges *c = &sim->charges[stream];
  flap_assert(c->count > 0 && sim->scheduled > 0);
  sim->scheduled--;
  charge(sim, c->ns[c->first]);
  c->first = (c->first + 1) % c->capacity;
  c->count--;
}

static void charge_h2d(void *context) {
  charge_next(context, FLAP_STREAM_H2D);
}
static void charge_d2h(void *context) {
  charge_next(context, FLAP_STREAM_D2H);
}

static bool charges_push(charges *c, uint64_t ns) {
  if (c->count == c->capacity) {
    uint32_t capacity = c->capacity ? c->capacity * 2 : 64;
    uint64_t *grown = malloc(capacity * sizeof *grown);
    if (!grown)
      return false;
    for (uint32_t i = 0; i < c->count; i++)
      grown[i] = c->ns[(c->first + i) % c->capacity];
    free(c->ns);
    *c = (charges){.ns = grown, .count = c->count, .capacity = capacity};
  }
  c->ns[(c->first + c->count++) % c->capacity] = ns;
  return true;
}

static void share_cores(sim_device *sim, flap_stream stream, uint64_t start_ns, uint64_t copy_ns) {
  uint32_t cores = sim->base.config.machine.shared_cores;
  if (cores == 0)
    return;
  uint64_t ns = copy_ns / cores;
  if (start_ns <= now(sim) || !charges_push(&sim->charges[stream], ns)) {
    charge(sim, ns); /* it starts now; or there is no memory to remember it by, and early is better than never */
    return;
  }
  sim->scheduled++;
  flap_clock_schedule(sim->base.config.clock, start_ns, stream == FLAP_STREAM_H2D ? charge_h2d : charge_d2h, sim);
}

/* ---- launches ------------------------------------------------------------------------------------------- */

/* Appends work to the compute lane; returns its end, at which the clock stands if the machine is synchronous. */
static void compute(sim_device *sim, uint64_t ns) {
  uint64_t *free_ns = &sim->free_ns[FLAP_STREAM_COMPUTE];
  const uint64_t start_ns = later(*free_ns, now(sim));
  *free_ns = start_ns + ns;
  atomic_fetch_add_explicit(&sim->base.busy_ns[FLAP_STREAM_COMPUTE], ns, memory_order_relaxed);
  if (sim->base.config.machine.synchronous)
    while (*free_ns > now(sim)) /* copies that start meanwhile move the end */
      flap_clock_advance_to(sim->base.config.clock, *free_ns);
  if (sim->label != 0)
    flap_device_observe(&sim->base, FLAP_STREAM_COMPUTE, start_ns, *free_ns, sim->label);
}

static void sim_label_compute(flap_device *device, uint64_t label) {
  self(device)->label = label;
}

static void sim_work(flap_device *device, uint64_t ns) {
  compute(self(device), ns);
}

static void sim_kernel(flap_device *device, double flops, double bytes, bool bf16) {
  const flap_machine *machine = &device->config.machine;
  uint64_t math_ns = duration(flops, bf16 ? machine->flops_bf16 : machine->flops_f32);
  uint64_t memory_ns = duration(bytes, machine->device_bytes);
  compute(self(device), machine->launch_ns + later(math_ns, memory_ns));
}

/* The end of a copy whose first byte moves at start_ns. */
static uint64_t copy_end(const sim_device *sim, flap_stream stream, uint64_t start_ns, double bytes) {
  const flap_machine *machine = &sim->base.config.machine;
  const flap_stream other = stream == FLAP_STREAM_H2D ? FLAP_STREAM_D2H : FLAP_STREAM_H2D;
  const double h2d = machine->h2d_bytes, d2h = machine->d2h_bytes;
  const bool known = machine->h2d_both_bytes > 0 && machine->d2h_both_bytes > 0;
  const flap_duplex lanes = {.alone_bytes = stream == FLAP_STREAM_H2D ? h2d : d2h,
                             .other_alone_bytes = stream == FLAP_STREAM_H2D ? d2h : h2d,
                             .both_bytes = known ? machine->h2d_both_bytes + machine->d2h_both_bytes : 0};
  return flap_duplex_end_ns(&lanes, start_ns, bytes, sim->busy_from_ns[other], sim->free_ns[other]);
}

static void sim_slow_copies(flap_device *device, double times) {
  self(device)->slowdown = times;
}

static void sim_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes) {
  (void)to, (void)from;
  sim_device *sim = self(device);
  const flap_machine *machine = &device->config.machine;
  if (stream == FLAP_STREAM_COMPUTE) {
    sim_kernel(device, 0, 2.0 * (double)bytes, false); /* read and written in device memory */
    return;
  }
  uint64_t start_ns = later(sim->free_ns[stream], now(sim));
  uint64_t end_ns = copy_end(sim, stream, start_ns + machine->copy_ns, (double)bytes * sim->slowdown);
  if (start_ns > sim->free_ns[stream])
    sim->busy_from_ns[stream] = start_ns;
  sim->free_ns[stream] = end_ns;
  share_cores(sim, stream, start_ns, end_ns - start_ns);
  flap_device_copied(device, stream, start_ns, end_ns, bytes);
}

/* ---- events --------------------------------------------------------------------------------------------- */

static void notify(void *context) {
  sim_device *sim = context;
  flap_assert(sim->scheduled > 0);
  sim->scheduled--;
  sim->base.config.notify(sim->base.config.notify_context);
}

static void sim_event_record(flap_device *device, flap_event event, flap_stream stream, bool with_notify) {
  sim_device *sim = self(device);
  sim->events[event] = later(sim->free_ns[stream], now(sim));
  if (!with_notify)
    return;
  sim->scheduled++;
  flap_clock_schedule(device->config.clock, sim->events[event], notify, sim);
}

static bool sim_event_done(flap_device *device, flap_event event) {
  return self(device)->events[event] <= now(self(device));
}

/* What happens on the way may record the event again; this waits for what was asked for. */
static void sim_event_wait(flap_device *device, flap_event event) {
  sim_device *sim = self(device);
  uint64_t at_ns = sim->events[event];
  if (at_ns > now(sim))
    flap_clock_advance_to(device->config.clock, at_ns);
}

static void sim_stream_wait(flap_device *device, flap_stream stream, flap_event event) {
  sim_device *sim = self(device);
  const bool beside = stream == FLAP_STREAM_COMPUTE && !device->config.machine.synchronous;
  const uint64_t start_ns = later(sim->free_ns[stream], now(sim)), end_ns = sim->events[event];
  if (beside && end_ns > start_ns) {
    atomic_fetch_add_explicit(&device->rested_ns, end_ns - start_ns, memory_order_relaxed);
    if (device->rest_label != 0)
      flap_device_observe(device, stream, start_ns, end_ns, device->rest_label);
  }
  if (end_ns > sim->free_ns[stream]) /* until then the lane rests */
    sim->free_ns[stream] = sim->busy_from_ns[stream] = end_ns;
  if (stream == FLAP_STREAM_COMPUTE && !beside)
    sim_event_wait(device, event);
}

static uint64_t sim_idle_since_ns(flap_device *device) {
  const sim_device *sim = self(device);
  const uint64_t free_ns = sim->free_ns[FLAP_STREAM_COMPUTE];
  return device->config.machine.synchronous ? 0 : free_ns <= now(sim) ? free_ns : UINT64_MAX;
}

/* A notify on the way may launch more, so the end is looked at again until nothing is left. */
static flap_status sim_synchronize(flap_device *device) {
  sim_device *sim = self(device);
  for (;;) {
    uint64_t end_ns = now(sim);
    for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
      end_ns = later(end_ns, sim->free_ns[i]);
    if (end_ns == now(sim) && sim->scheduled == 0)
      return FLAP_OK;
    flap_clock_advance_to(device->config.clock, end_ns);
  }
}

static void sim_close(flap_device *device) {
  sim_device *sim = self(device);
  (void)sim_synchronize(device); /* never fails */
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    free(sim->charges[i].ns);
  free(sim->events);
}

/* In order with the compute stream means: of its time. */
static flap_status sim_upload(flap_device *device, void *to, const void *from, uint64_t bytes) {
  (void)to, (void)from;
  const flap_machine *machine = &device->config.machine;
  compute(self(device), machine->copy_ns + duration((double)bytes, machine->h2d_bytes));
  return FLAP_OK;
}

static flap_status sim_download(flap_device *device, void *to, const void *from, uint64_t bytes) {
  (void)from;
  sim_device *sim = self(device);
  const flap_machine *machine = &device->config.machine;
  compute(sim, machine->copy_ns + duration((double)bytes, machine->d2h_bytes));
  if (sim->free_ns[FLAP_STREAM_COMPUTE] > now(sim))
    flap_clock_advance_to(device->config.clock, sim->free_ns[FLAP_STREAM_COMPUTE]);
  if (to != NULL)
    memset(to, 0, bytes);
  return FLAP_OK;
}

static uint64_t sim_memory_peak(const flap_device *device) {
  return device->arena_bytes;
}

const flap_device_table flap_device_sim_table = {
    .struct_bytes = sizeof(sim_device),
    .has_bytes = false,
    .open = sim_open,
    .close = sim_close,
    .pin_host = sim_pin_host,
    .copy = sim_copy,
    .event_record = sim_event_record,
    .event_done = sim_event_done,
    .event_wait = sim_event_wait,
    .stream_wait = sim_stream_wait,
    .synchronize = sim_synchronize,
    .upload = sim_upload,
    .download = sim_download,
    .idle_since_ns = sim_idle_since_ns,
    .label_compute = sim_label_compute,
    .sim_work = sim_work,
    .sim_kernel = sim_kernel,
    .sim_slow_copies = sim_slow_copies,
    .memory_peak = sim_memory_peak,
};
