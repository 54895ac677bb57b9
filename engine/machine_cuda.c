#include "engine/machine_cuda.h"

#include "base/arena.h"
#include "base/units.h"
#include "kernels/device/measure_machine.h"
#include "kernels/ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROBE_VRAM (3 * FLAP_GIB)
#define SIDE 4096u  /* of the square matrices */
#define LAUNCHES 16 /* between two looks at the clock */
#define ROUNDS 7
#define COPY_BYTES (64 * FLAP_MIB)
#define COPIES 8
#define FILL_BYTES FLAP_MIB
#define OVERHEAD_MARGIN (32 * FLAP_MIB) /* the driver's own figure moves a little from run to run */

static flap_status open_probe(flap_device **device_out) {
  const flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = PROBE_VRAM, .events_max = 2};
  return flap_device_open(&config, device_out);
}

flap_status flap_machine_cuda_name(char *name_out, size_t bytes) {
  flap_device *device;
  FLAP_TRY(open_probe(&device));
  (void)snprintf(name_out, bytes, "%s", flap_device_describe(device));
  flap_device_close(device);
  return FLAP_OK;
}

flap_status flap_machine_cuda_free(uint64_t *bytes_out) {
  return flap_device_free_bytes(FLAP_DEVICE_CUDA, bytes_out);
}

/* ---- kernels --------------------------------------------------------------------------------------------- */

/* Numbers that are not all alike: a card computes faster on zeros. */
static flap_status fill(flap_device *device, unsigned char *memory, uint64_t bytes) {
  unsigned char *pattern = malloc(FILL_BYTES);
  if (pattern == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "measuring the card: no memory for %llu bytes",
                          (unsigned long long)FILL_BYTES);
  uint32_t state = 1;
  for (uint64_t i = 0; i < FILL_BYTES / 2; i++) {
    state = state * 1664525u + 1013904223u;
    const uint16_t bits = (uint16_t)(0x3f00u | (state >> 16 & 0x80ffu)); /* between a half and two, of either sign */
    memcpy(pattern + 2 * i, &bits, 2);
  }
  flap_status status = FLAP_OK;
  for (uint64_t at = 0; at < bytes && status == FLAP_OK; at += FILL_BYTES)
    status = flap_device_upload(device, memory + at, pattern, bytes - at < FILL_BYTES ? bytes - at : FILL_BYTES);
  free(pattern);
  return status;
}

static int ascending(const void *a, const void *b) {
  const double left = *(const double *)a, right = *(const double *)b;
  return (left > right) - (left < right);
}

/* Median seconds of one matmul, or of one copy within the card where `matmul` is NULL. */
static flap_status time_launches(flap_ops *ops, const flap_matmul *matmul, unsigned char *memory, double *seconds_out) {
  flap_device *device = flap_ops_device(ops);
  double seconds[ROUNDS];
  for (int round = -1; round < ROUNDS; round++) {
    FLAP_TRY(flap_device_synchronize(device));
    const uint64_t started_ns = flap_units_now_ns();
    for (int i = 0; i < LAUNCHES; i++) {
      if (matmul != NULL)
        flap_ops_matmul(ops, matmul);
      else
        flap_ops_copy(ops, memory + 4 * COPY_BYTES, memory, 4 * COPY_BYTES);
    }
    FLAP_TRY(flap_device_synchronize(device));
    if (round >= 0) /* the first one loads code */
      seconds[round] = (double)(flap_units_now_ns() - started_ns) * 1e-9 / LAUNCHES;
  }
  qsort(seconds, ROUNDS, sizeof *seconds, ascending);
  *seconds_out = seconds[ROUNDS / 2];
  return FLAP_OK;
}

static flap_status measure_kernels(flap_device *device, flap_dtype dtype, flap_machine *machine) {
  const flap_ops_limits limits = {.dtype = dtype,
                                  .batch_max = 1,
                                  .sequence_max = SIDE,
                                  .tokens_max = SIDE,
                                  .hidden = SIDE,
                                  .intermediate = SIDE,
                                  .vocabulary = SIDE,
                                  .heads = SIDE / 128,
                                  .kv_heads = SIDE / 128,
                                  .head_size = 128,
                                  .threads = 1};
  const uint64_t matrix = (uint64_t)SIDE * SIDE * flap_dtype_bytes(dtype);
  uint64_t arena_bytes = 0;
  unsigned char *memory = flap_device_arena(device, &arena_bytes);
  const uint64_t workspace = flap_ops_workspace_bytes(FLAP_DEVICE_CUDA, &limits);
  if (arena_bytes < 8 * COPY_BYTES + workspace || arena_bytes < 3 * matrix + workspace)
    return flap_error_set(FLAP_NO_MEMORY, "measuring the card: %llu bytes are left of 3 GiB",
                          (unsigned long long)arena_bytes);
  unsigned char *operands = memory + flap_units_round_up(workspace, 4096);
  FLAP_TRY(fill(device, operands, 2 * matrix));
  flap_ops *ops;
  FLAP_TRY(flap_ops_open(device, &limits, memory, &ops));
  const flap_matmul matmul = {.transpose = FLAP_NT,
                              .m = SIDE,
                              .n = SIDE,
                              .k = SIDE,
                              .a = operands,
                              .b = operands + matrix,
                              .c = operands + 2 * matrix,
                              .lda = SIDE,
                              .ldb = SIDE,
                              .ldc = SIDE,
                              .dtype = dtype,
                              .c_dtype = dtype};
  double seconds = 0, copy_seconds = 0;
  flap_status status = time_launches(ops, &matmul, NULL, &seconds);
  if (status == FLAP_OK)
    status = time_launches(ops, NULL, operands, &copy_seconds);
  flap_ops_close(ops);
  FLAP_TRY(status);
  *(dtype == FLAP_F32 ? &machine->flops_f32 : &machine->flops_bf16) = 2.0 * SIDE * SIDE * SIDE / seconds;
  machine->device_bytes = 2.0 * 4 * COPY_BYTES / copy_seconds;
  return FLAP_OK;
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
  qsort(rates, ROUNDS, sizeof *rates, ascending);
  *rate_out = rates[ROUNDS / 2];
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
  for (int way = 0; way < 2; way++)
    qsort(rates[way], ROUNDS, sizeof **rates, ascending);
  machine->h2d_both_bytes = fmin(rates[0][ROUNDS / 2], machine->h2d_bytes);
  machine->d2h_both_bytes = fmin(rates[1][ROUNDS / 2], machine->d2h_bytes);
  return FLAP_OK;
}

static flap_status measure_bus(flap_device *device, flap_machine *machine) {
  flap_arena host;
  FLAP_TRY(flap_arena_open(&host, "measuring the bus", 2 * COPY_BYTES));
  unsigned char *memory = flap_arena_take(&host, 2 * COPY_BYTES, 4096);
  memset(memory, 1, 2 * COPY_BYTES);
  flap_status status = flap_device_pin_host(device, memory, 2 * COPY_BYTES);
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

static flap_status measure_host(uint32_t threads, flap_machine *machine) {
  flap_machine host;
  flap_pool *pool;
  flap_device_default_machine(FLAP_DEVICE_CPU, &host);
  FLAP_TRY(flap_pool_open(threads, &pool));
  const flap_status status = flap_device_measure_host(pool, &host);
  flap_pool_close(pool);
  machine->host_bytes = host.host_bytes;
  return status;
}

flap_status flap_machine_measure_cuda(uint32_t threads, flap_machine *machine_out) {
  flap_machine machine;
  flap_device *device;
  flap_device_default_machine(FLAP_DEVICE_CUDA, &machine);
  FLAP_TRY(measure_host(threads, &machine));
  FLAP_TRY(open_probe(&device));
  (void)snprintf(machine.name, sizeof machine.name, "%.63s", flap_device_describe(device));
  uint64_t arena_bytes = 0;
  (void)flap_device_arena(device, &arena_bytes);
  machine.overhead_bytes = PROBE_VRAM - arena_bytes + OVERHEAD_MARGIN;
  flap_status status = measure_kernels(device, FLAP_BF16, &machine);
  if (status == FLAP_OK)
    status = measure_kernels(device, FLAP_F32, &machine);
  if (status != FLAP_OK) {
    flap_device_close(device);
    return status;
  }
  FLAP_TRY(measure_bus(device, &machine));
  machine.synchronous = false;
  machine.shared_cores = 0;
  machine.disk_read_bytes = machine.disk_write_bytes = machine.disk_both_bytes = 0;
  *machine_out = machine;
  return FLAP_OK;
}
