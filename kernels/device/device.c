#include "kernels/device/device_internal.h"
#ifdef FLAP_CUDA
#include "kernels/device/device_cuda.h"
#include "kernels/device/device_cuda_internal.h"
#endif

#include "base/assert.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One row per kind; a kind that this build has not is NULL. */
static const flap_device_table *tables[] = {
    [FLAP_DEVICE_CPU] = &flap_device_cpu_table,
#ifdef FLAP_CUDA
    [FLAP_DEVICE_CUDA] = &flap_device_cuda_table,
#else
    [FLAP_DEVICE_CUDA] = NULL,
#endif
    [FLAP_DEVICE_SIM] = &flap_device_sim_table,
};
#define KIND_COUNT (sizeof tables / sizeof tables[0])
#define NO_CUDA "device: cuda: this build has no CUDA; set device to cpu, or use a build with CUDA"

const flap_device_table *flap_device_replace_table(flap_device_kind kind, const flap_device_table *table) {
  flap_assert((size_t)kind < KIND_COUNT);
  const flap_device_table *before = tables[kind];
  tables[kind] = table;
  return before;
}

flap_status flap_device_open(const flap_device_config *config, flap_device **device_out) {
  flap_assert(config && device_out);
  flap_assert((size_t)config->kind < KIND_COUNT);
  *device_out = NULL;
  const flap_device_table *table = tables[config->kind];
  if (!table)
    return flap_error_set(FLAP_UNSUPPORTED, NO_CUDA);
  if (config->vram_bytes == 0)
    return flap_error_set(FLAP_INVALID, "vram: the budget is 0 bytes; give the device some memory");
  flap_device *device = calloc(1, table->struct_bytes);
  if (!device)
    return flap_error_set(FLAP_NO_MEMORY, "device: no memory for its %zu bytes of state", table->struct_bytes);
  device->table = table;
  device->config = *config;
  int error = pthread_mutex_init(&device->trace_lock, NULL);
  if (error) {
    free(device);
    return flap_error_set_os(error, "device: cannot make a lock");
  }
  flap_status status = table->open(device);
  if (status != FLAP_OK) {
    pthread_mutex_destroy(&device->trace_lock);
    free(device);
    return status;
  }
  flap_assert(device->arena && (uintptr_t)device->arena % 4096 == 0 && device->arena_bytes > 0);
  *device_out = device;
  return FLAP_OK;
}

void flap_device_close(flap_device *device) {
  if (!device)
    return;
  device->table->close(device);
  pthread_mutex_destroy(&device->trace_lock);
  free(device);
}

flap_device_kind flap_device_get_kind(const flap_device *device) {
  return device->config.kind;
}
const char *flap_device_describe(const flap_device *device) {
  return device->description;
}
bool flap_device_has_bytes(const flap_device *device) {
  return device->table->has_bytes;
}
flap_pool *flap_device_pool(const flap_device *device) {
  return device->config.pool;
}

void *flap_device_arena(const flap_device *device, uint64_t *bytes_out) {
  if (bytes_out)
    *bytes_out = device->arena_bytes;
  return device->arena;
}

flap_status flap_device_pin_host(flap_device *device, void *memory, uint64_t bytes) {
  return device->table->pin_host(device, memory, bytes);
}

/* Addresses are compared as numbers, because the host side of a copy is of another object. */
static bool in_arena(const flap_device *device, const void *address, uint64_t bytes) {
  uintptr_t start = (uintptr_t)device->arena, at = (uintptr_t)address;
  return at >= start && bytes <= device->arena_bytes && at - start <= device->arena_bytes - bytes;
}

void flap_device_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes) {
  flap_assert((unsigned)stream < FLAP_STREAM_COUNT);
  flap_assert(stream == FLAP_STREAM_D2H || in_arena(device, to, bytes));
  flap_assert(stream == FLAP_STREAM_H2D || in_arena(device, from, bytes));
  if (bytes > 0)
    device->table->copy(device, stream, to, from, bytes);
}

void flap_device_event_record(flap_device *device, flap_event event, flap_stream stream, bool notify) {
  flap_assert((unsigned)stream < FLAP_STREAM_COUNT);
  flap_assert(event < device->config.events_max);
  flap_assert(!notify || device->config.notify);
  device->table->event_record(device, event, stream, notify);
}

bool flap_device_event_done(flap_device *device, flap_event event) {
  flap_assert(event < device->config.events_max);
  return device->table->event_done(device, event);
}

void flap_device_event_wait(flap_device *device, flap_event event) {
  flap_assert(event < device->config.events_max);
  device->table->event_wait(device, event);
}

void flap_device_stream_wait(flap_device *device, flap_stream stream, flap_event event) {
  flap_assert((unsigned)stream < FLAP_STREAM_COUNT);
  flap_assert(event < device->config.events_max);
  device->table->stream_wait(device, stream, event);
}

flap_status flap_device_synchronize(flap_device *device) {
  return device->table->synchronize(device);
}

flap_status flap_device_outcome(flap_device *device) {
  return device->table->outcome ? device->table->outcome(device) : FLAP_OK;
}

flap_status flap_device_upload(flap_device *device, void *to, const void *from, uint64_t bytes) {
  flap_assert(in_arena(device, to, bytes));
  return bytes > 0 ? device->table->upload(device, to, from, bytes) : FLAP_OK;
}

flap_status flap_device_download(flap_device *device, void *to, const void *from, uint64_t bytes) {
  flap_assert(in_arena(device, from, bytes));
  return bytes > 0 ? device->table->download(device, to, from, bytes) : FLAP_OK;
}

void flap_device_sim_kernel(flap_device *device, double flops, double bytes, bool bf16) {
  flap_assert(device->table->sim_kernel);
  flap_assert(flops >= 0 && bytes >= 0);
  device->table->sim_kernel(device, flops, bytes, bf16);
}

void flap_device_sim_work(flap_device *device, uint64_t ns) {
  flap_assert(device->table->sim_work);
  device->table->sim_work(device, ns);
}

void flap_device_sim_slow_copies(flap_device *device, double times) {
  flap_assert(device->table->sim_slow_copies && times >= 1);
  device->table->sim_slow_copies(device, times);
}

uint64_t flap_device_busy_ns(const flap_device *device, flap_stream stream) {
  flap_assert((unsigned)stream < FLAP_STREAM_COUNT);
  return atomic_load_explicit(&device->busy_ns[stream], memory_order_relaxed);
}

void flap_device_note_compute(flap_device *device, uint64_t ns) {
  if (device->table->note_compute)
    device->table->note_compute(device, ns);
}

void flap_device_limit_ahead(flap_device *device) {
  if (device->table->limit_ahead)
    device->table->limit_ahead(device);
}

void flap_device_set_trace(flap_device *device, flap_device_trace_fn fn, void *context) {
  pthread_mutex_lock(&device->trace_lock);
  device->trace_fn = fn;
  device->trace_context = context;
  pthread_mutex_unlock(&device->trace_lock);
}

uint64_t flap_device_rested_ns(const flap_device *device) {
  return atomic_load_explicit(&device->rested_ns, memory_order_relaxed);
}

void flap_device_label_rests(flap_device *device, uint64_t label) {
  device->rest_label = label;
}

void flap_device_time_exactly(flap_device *device, bool exactly) {
  atomic_store_explicit(&device->exact, exactly, memory_order_relaxed);
}

uint64_t flap_device_idle_since_ns(flap_device *device) {
  return device->table->idle_since_ns ? device->table->idle_since_ns(device) : 0;
}

void flap_device_expect_rest(flap_device *device) {
  if (device->table->expect_rest)
    device->table->expect_rest(device);
}

void flap_device_label_compute(flap_device *device, uint64_t label) {
  if (device->table->label_compute)
    device->table->label_compute(device, label);
}

void flap_device_copied(flap_device *device, flap_stream stream, uint64_t started_ns, uint64_t ended_ns,
                        uint64_t bytes) {
  flap_assert(ended_ns >= started_ns);
  atomic_fetch_add_explicit(&device->busy_ns[stream], ended_ns - started_ns, memory_order_relaxed);
  flap_device_observe(device, stream, started_ns, ended_ns, bytes);
}

void flap_device_observe(flap_device *device, flap_stream stream, uint64_t started_ns, uint64_t ended_ns,
                         uint64_t bytes) {
  pthread_mutex_lock(&device->trace_lock);
  if (device->trace_fn)
    device->trace_fn(device->trace_context, stream, started_ns, ended_ns, bytes);
  pthread_mutex_unlock(&device->trace_lock);
}

uint64_t flap_device_memory_peak(const flap_device *device) {
  return device->table->memory_peak(device);
}

/* Assumptions, not measurements: what such machines typically reach in practice, rounded, a little below the figures of
 * their data sheets. They only give a plan somewhere to start from. */
void flap_device_default_machine(flap_device_kind kind, flap_machine *machine_out) {
  if (kind == FLAP_DEVICE_CPU) {
    *machine_out = (flap_machine){
        .name = "2 cores (assumed)",
        .flops_bf16 = 60e9, /* stored as bf16, converted, and multiplied in fp32 */
        .flops_f32 = 80e9,  /* two cores with 256-bit fused multiply-add */
        .device_bytes = 12e9,
        .h2d_bytes = 5e9,
        .d2h_bytes = 5e9,
        .disk_read_bytes = 1.5e9,
        .disk_write_bytes = 1e9,
        .host_bytes = 12e9,
        .launch_ns = 3000,
        .copy_ns = 5000,
        .disk_ns = 100000,
        .synchronous = true,
        .shared_cores = 2,
    };
    return;
  }
  *machine_out = (flap_machine){
      .name = "24 GB consumer card (assumed)",
      .flops_bf16 = 120e12,
      .flops_f32 = 40e12,
      .device_bytes = 800e9,
      .h2d_bytes = 22e9, /* PCIe 4.0, 16 lanes, pinned */
      .d2h_bytes = 22e9,
      .disk_read_bytes = 6e9, /* one PCIe 4.0 NVMe disk */
      .disk_write_bytes = 4e9,
      .host_bytes = 40e9, /* two channels of DDR5 */
      .launch_ns = 5000,
      .copy_ns = 10000,
      .disk_ns = 80000,
      .synchronous = false,
      .shared_cores = 0,
  };
}

/* Of a kind that is no card, or not in this build. */
static flap_status no_card(flap_device_kind kind) {
  return kind == FLAP_DEVICE_CUDA ? flap_error_set(FLAP_UNSUPPORTED, NO_CUDA)
                                  : flap_error_set(FLAP_UNSUPPORTED, "device kind %d is not a card", (int)kind);
}

flap_status flap_device_budget_max(flap_device_kind kind, uint64_t *bytes_out) {
  *bytes_out = 0;
#ifdef FLAP_CUDA
  if (kind == FLAP_DEVICE_CUDA)
    return flap_cuda_memory_budget_max(bytes_out);
#endif
  return no_card(kind);
}

flap_status flap_device_find(flap_device_kind kind, char *name_out, size_t bytes) {
  (void)snprintf(name_out, bytes, "%s", "");
#ifdef FLAP_CUDA
  if (kind == FLAP_DEVICE_CUDA) {
    flap_cuda_properties card;
    FLAP_TRY(flap_device_cuda_find(&card));
    (void)snprintf(name_out, bytes, "%s, driver %u.%u", card.name, card.driver / 1000, card.driver % 1000 / 10);
    return FLAP_OK;
  }
#endif
  return no_card(kind);
}
