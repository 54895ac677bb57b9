/* Memory of the cuda device: what the driver charges, the arena, and pinned host memory. Private to kernels/device. */
#ifndef FLAP_KERNELS_DEVICE_DEVICE_CUDA_INTERNAL_H
#define FLAP_KERNELS_DEVICE_DEVICE_CUDA_INTERNAL_H

#include "base/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FLAP_CUDA_PINS_MAX 256u

typedef struct flap_cuda_pin {
  uintptr_t start, end;
  uintptr_t base;       /* seams are at base + n * chunk_bytes */
  uint64_t chunk_bytes; /* each piece between seams was pinned by itself */
} flap_cuda_pin;

typedef struct flap_cuda_nvml flap_cuda_nvml; /* the driver's management library, found at run time */

typedef struct flap_cuda_memory {
  flap_cuda_nvml *nvml; /* NULL where it is not there */
  uint64_t arena_bytes; /* 0 before it was taken */
  _Atomic uint64_t peak;
  flap_cuda_pin pins[FLAP_CUDA_PINS_MAX];
  _Atomic uint32_t pin_count;
} flap_cuda_memory;

/* Of a zeroed struct, before anything else here. Finds NVML, and gives the process its context, once, which it weighs:
 * whoever needs one gets it by this. FLAP_DEVICE, FLAP_NO_MEMORY; close is due in any case. */
FLAP_CHECKED flap_status flap_cuda_memory_start(flap_cuda_memory *memory);
/* Unpins. The arena was freed by then. */
void flap_cuda_memory_close(flap_cuda_memory *memory);

/* Once there is a context: takes what the budget leaves as one zeroed allocation. */
flap_status flap_cuda_memory_arena(flap_cuda_memory *memory, uint64_t budget, void **arena_out, uint64_t *bytes_out);

/* What the driver charges to this process now; and the highest that was ever seen, now included. */
uint64_t flap_cuda_memory_charged(const flap_cuda_memory *memory);
uint64_t flap_cuda_memory_peak(flap_cuda_memory *memory);

/* What nobody uses of the whole card now, and what this process does: the largest budget. Makes a context. */
FLAP_CHECKED flap_status flap_cuda_memory_budget_max(uint64_t *bytes_out);

flap_status flap_cuda_memory_pin(flap_cuda_memory *memory, void *start, uint64_t bytes);
/* How many of `bytes` at a host address come before the next seam of pinned memory. */
uint64_t flap_cuda_memory_piece(const flap_cuda_memory *memory, const void *address, uint64_t bytes);

#endif
