#include "engine/machine/machine_cuda.h"

#include "base/arena.h"
#include "base/units.h"
#include "engine/machine/host_memory.h"
#include "kernels/device/measure_memory.h"
#include "kernels/measure_ops.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define PROBE_LEFT (256 * FLAP_MIB) /* to others, of a small card */
#define PROBE_STEP (64 * FLAP_MIB)  /* by which a budget is passed that holds no operands */
#define SIDE 4096u                  /* of the square matrices */
#define SIDE_LITTLE 2048u           /* in a small budget; large cards do not come to their best with it */
#define HEAD_SIZE 128u
#define ROUNDS 7
#define ROUND_NS (4u * 1000 * 1000) /* some twenty products in bf16, one or two in fp32 */
#define COPY_BYTES (64 * FLAP_MIB)
#define COPIES 8
#define HOST_UNIT (2 * FLAP_MIB)
#define HOST_BYTES_MIN (64 * FLAP_MIB)
#define HOST_ROUND_NS (10u * 1000 * 1000)
#define OVERHEAD_MARGIN (32 * FLAP_MIB) /* the driver's own figure moves a little from run to run */

/* Of a card that is small or in use, all that is free: that is enough, or else the measurements say so. */
static flap_status probe_vram(uint64_t budget, uint64_t *bytes_out) {
  uint64_t bytes;
  FLAP_TRY(flap_device_budget_max(FLAP_DEVICE_CUDA, &bytes));
  bytes = bytes < FLAP_MACHINE_CUDA_VRAM + PROBE_LEFT ? bytes / 16 * 15 : FLAP_MACHINE_CUDA_VRAM;
  *bytes_out = budget > 0 && budget < bytes ? budget : bytes;
  return FLAP_OK;
}

/* ---- kernels --------------------------------------------------------------------------------------------- */

/* The rate of large squares, and of copies within the card; and what is left of a budget. */
static flap_status measure_with(flap_ops_meter *meter, uint32_t side, flap_machine *machine) {
  flap_rate bf16, f32, copy = {0};
  (void)snprintf(machine->name, sizeof machine->name, "%.63s", flap_ops_meter_describe(meter));
  machine->overhead_bytes = flap_ops_meter_overhead(meter) + OVERHEAD_MARGIN;
  FLAP_TRY(flap_ops_measure_matmul(meter, FLAP_BF16, FLAP_NT, side, side, side, false, &bf16));
  for (uint64_t bytes = 4 * COPY_BYTES; copy.rounds == 0 && bytes >= COPY_BYTES; bytes /= 2)
    FLAP_TRY(flap_ops_measure_copy(meter, bytes, &copy));
  FLAP_TRY(flap_ops_measure_matmul(meter, FLAP_F32, FLAP_NT, side, side, side, false, &f32));
  if (bf16.rounds == 0 || copy.rounds == 0 || f32.rounds == 0)
    return flap_error_set(FLAP_NO_MEMORY,
                          "measuring the card: it has too little free memory: end what else uses the GPU");
  machine->flops_bf16 = bf16.median;
  machine->flops_f32 = f32.median;
  machine->device_bytes = copy.median;
  return FLAP_OK;
}

static flap_status measure_kernels(uint64_t vram_bytes, flap_machine *machine) {
  const uint32_t side = vram_bytes < FLAP_MACHINE_CUDA_VRAM ? SIDE_LITTLE : SIDE;
  const flap_ops_meter_config config = {.kind = FLAP_DEVICE_CUDA,
                                        .vram_bytes = vram_bytes,
                                        .tokens_max = side,
                                        .heads = side / HEAD_SIZE,
                                        .head_size_max = HEAD_SIZE};
  const flap_rate_effort effort = {.rounds = ROUNDS, .round_ns = ROUND_NS};
  flap_ops_meter *meter;
  FLAP_TRY(flap_ops_meter_open(&config, &effort, &meter));
  const flap_status status = measure_with(meter, side, machine);
  flap_ops_meter_close(meter);
  return status;
}

/* ---- the bus --------------------------------------------------------------------------------------------- */

static flap_status time_copies(flap_device *device, flap_stream stream, unsigned char *host, double *rate_out) {
  uint64_t arena_bytes = 0;
  unsigned char *memory = flap_device_arena(device, &arena_bytes);
  double rates[ROUNDS];
  for (int round = 0; round < ROUNDS; round++) {
    FLAP_TRY(flap_device_synchronize(device));
    const uint64_t started_ns = flap_units_now_ns();
    for (int i = 0; i < COPIES; i++)
      flap_device_copy(device, stream, stream == FLAP_STREAM_H2D ? memory : host,
                       stream == FLAP_STREAM_H2D ? host : memory, COPY_BYTES);
    FLAP_TRY(flap_device_synchronize(device));
    rates[round] = (double)(COPIES * COPY_BYTES) * 1e9 / (double)(flap_units_now_ns() - started_ns);
  }
  *rate_out = flap_rate_of(rates, ROUNDS).median;
  return FLAP_OK;
}

/* Both ways at once, each to and from memory of its own: the medians of what each stream was busy for. */
static flap_status time_both(flap_device *device, unsigned char *host, flap_machine *machine) {
  uint64_t arena_bytes = 0;
  unsigned char *memory = flap_device_arena(device, &arena_bytes);
  double rates[2][ROUNDS];
  for (int round = 0; round < ROUNDS; round++) {
    const uint64_t before[2] = {flap_device_busy_ns(device, FLAP_STREAM_H2D),
                                flap_device_busy_ns(device, FLAP_STREAM_D2H)};
    for (int i = 0; i < COPIES; i++) {
      flap_device_copy(device, FLAP_STREAM_H2D, memory, host, COPY_BYTES);
      flap_device_copy(device, FLAP_STREAM_D2H, host + COPY_BYTES, memory + COPY_BYTES, COPY_BYTES);
    }
    FLAP_TRY(flap_device_synchronize(device));
    const uint64_t busy[2] = {flap_device_busy_ns(device, FLAP_STREAM_H2D) - before[0],
                              flap_device_busy_ns(device, FLAP_STREAM_D2H) - before[1]};
    for (int way = 0; way < 2; way++)
      rates[way][round] = (double)(COPIES * COPY_BYTES) * 1e9 / (double)(busy[way] > 0 ? busy[way] : 1);
  }
  machine->h2d_both_bytes = fmin(flap_rate_of(rates[0], ROUNDS).median, machine->h2d_bytes);
  machine->d2h_both_bytes = fmin(flap_rate_of(rates[1], ROUNDS).median, machine->d2h_bytes);
  return FLAP_OK;
}

static flap_status measure_bus(uint64_t vram_bytes, flap_machine *machine) {
  const flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = vram_bytes, .events_max = 2};
  flap_arena host;
  flap_device *device = NULL;
  FLAP_TRY(flap_arena_open(&host, "measuring the bus", 2 * COPY_BYTES));
  unsigned char *memory = flap_arena_take(&host, 2 * COPY_BYTES, 4096);
  memset(memory, 1, 2 * COPY_BYTES);
  flap_status status = flap_device_open(&config, &device);
  if (status == FLAP_OK)
    status = flap_device_pin_host(device, memory, 2 * COPY_BYTES);
  if (status == FLAP_OK)
    status = time_copies(device, FLAP_STREAM_H2D, memory, &machine->h2d_bytes);
  if (status == FLAP_OK)
    status = time_copies(device, FLAP_STREAM_D2H, memory, &machine->d2h_bytes);
  if (status == FLAP_OK)
    status = time_both(device, memory, machine);
  flap_device_close(device); /* unpins */
  flap_arena_close(&host);
  return status;
}

/* ---- all ------------------------------------------------------------------------------------------------- */

/* As an optimizer uses it: read, changed and written. In more memory than caches hold, where there is so much. */
static flap_status measure_host(uint32_t threads, flap_machine *machine) {
  const flap_rate_effort effort = {.rounds = ROUNDS, .round_ns = HOST_ROUND_NS};
  const uint64_t wanted = flap_measure_host_bytes(), free_bytes = flap_host_memory_free(false) / 4;
  const uint64_t bytes = wanted < free_bytes ? wanted : free_bytes / HOST_UNIT * HOST_UNIT;
  flap_rate rates[FLAP_MEMORY_PATTERNS];
  flap_pool *pool;
  FLAP_TRY(flap_pool_open(threads, &pool));
  const flap_status status = flap_measure_host_memory(pool, bytes < HOST_BYTES_MIN ? HOST_BYTES_MIN : bytes,
                                                      1u << FLAP_MEMORY_MODIFY, &effort, rates);
  flap_pool_close(pool);
  machine->host_bytes = rates[FLAP_MEMORY_MODIFY].median;
  return status;
}

static flap_status measure_card(uint64_t vram_bytes, flap_machine *machine) {
  FLAP_TRY(measure_kernels(vram_bytes, machine));
  return measure_bus(vram_bytes, machine);
}

/* A budget that does not even hold context and operands is passed by as little as possible: what the plan then says of
 * it, and what is enough, is worth more than that it cannot be measured. */
static flap_status measure_within(uint64_t budget, flap_machine *machine) {
  uint64_t vram_bytes;
  FLAP_TRY(probe_vram(budget, &vram_bytes));
  flap_status status = measure_card(vram_bytes, machine);
  while (vram_bytes == budget && (status == FLAP_BUDGET || status == FLAP_NO_MEMORY)) {
    flap_error_clear();
    budget += PROBE_STEP;
    FLAP_TRY(probe_vram(budget, &vram_bytes));
    status = measure_card(vram_bytes, machine);
  }
  return status;
}

flap_status flap_machine_measure_cuda(uint32_t threads, uint64_t vram_bytes, flap_machine *machine_out) {
  flap_machine machine;
  flap_device_default_machine(FLAP_DEVICE_CUDA, &machine);
  FLAP_TRY(measure_host(threads, &machine));
  FLAP_TRY(measure_within(vram_bytes, &machine));
  machine.process_bytes = flap_host_memory_kib(&FLAP_HOST_ROOTS, "self/status", "VmRSS:");
  machine.synchronous = false;
  machine.shared_cores = 0;
  machine.disk_read_bytes = machine.disk_write_bytes = machine.disk_both_bytes = 0;
  *machine_out = machine;
  return FLAP_OK;
}
