/* Memory of the cuda device.
 *
 * The budget is what the driver charges to this process. NVML tells that per process; where it does not know us
 * (another process-id namespace), the growth of the card's use since before our context stands for it; without NVML, an
 * assumed context and the growth since then.
 */
#include "kernels/device/device_cuda_internal.h"

#include "base/units.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* CUDA loads kernels, ours and cuBLASLt's, when they are first launched, into memory that the budget must still have.
 * On an H100 all tests together added 4 MiB to what the context had taken. */
#define LIBRARY_RESERVE ((uint64_t)64 << 20)
#define CONTEXT_ASSUMED ((uint64_t)640 << 20)
#define GRAIN ((uint64_t)2 << 20) /* of device allocations, and of the host's huge pages */
/* Host memory is pinned in pieces by several threads: most of the time goes into finding and zeroing pages. */
#define PIN_CHUNK ((uint64_t)512 << 20)
#define PIN_THREADS 8u

/* ---- what the driver charges ---------------------------------------------------------------------------- */

/* The part of nvml.h that is needed; it is not always installed, and its layout is fixed by the names' versions. */
typedef struct nvml_memory {
  unsigned long long total, free, used;
} nvml_memory;
typedef struct nvml_process {
  unsigned int pid;
  unsigned long long used; /* all ones: not known */
  unsigned int gpu_instance, compute_instance;
} nvml_process;
#define NVML_PROCESSES_MAX 128u

struct flap_cuda_nvml {
  void *library, *card;
  int (*shutdown)(void);
  int (*memory_info)(void *card, nvml_memory *memory_out);
  int (*processes)(void *card, unsigned int *count, nvml_process *processes_out);
};

/* dlsym gives a data pointer; the standard converts it to a function only through its bytes. */
static bool find(void *library, const char *name, void *function_out) {
  void *symbol = dlsym(library, name);
  *(void **)function_out = symbol;
  return symbol != NULL;
}

static flap_cuda_nvml *nvml_open(void) {
  flap_cuda_nvml *nvml = calloc(1, sizeof *nvml);
  if (!nvml)
    return NULL;
  int (*init)(void) = NULL;
  int (*by_bus)(const char *bus, void **card_out) = NULL;
  char bus[32] = "";
  nvml->library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  bool there = nvml->library && find(nvml->library, "nvmlInit_v2", &init) &&
               find(nvml->library, "nvmlShutdown", &nvml->shutdown) &&
               find(nvml->library, "nvmlDeviceGetHandleByPciBusId_v2", &by_bus) &&
               find(nvml->library, "nvmlDeviceGetMemoryInfo", &nvml->memory_info) &&
               find(nvml->library, "nvmlDeviceGetComputeRunningProcesses_v3", &nvml->processes);
  if (there && init() == 0) {
    if (cudaDeviceGetPCIBusId(bus, sizeof bus, 0) == cudaSuccess && by_bus(bus, &nvml->card) == 0)
      return nvml;
    (void)nvml->shutdown();
  }
  if (nvml->library)
    (void)dlclose(nvml->library);
  free(nvml);
  return NULL;
}

static uint64_t used_of_card(const flap_cuda_memory *memory) {
  nvml_memory m = {0};
  return memory->nvml && memory->nvml->memory_info(memory->nvml->card, &m) == 0 ? m.used : 0;
}

static uint64_t used_by_process(const flap_cuda_memory *memory) {
  nvml_process processes[NVML_PROCESSES_MAX];
  unsigned int count = NVML_PROCESSES_MAX;
  if (!memory->nvml || memory->nvml->processes(memory->nvml->card, &count, processes) != 0)
    return 0;
  for (unsigned int i = 0; i < count && i < NVML_PROCESSES_MAX; i++)
    if (processes[i].pid == (unsigned int)getpid() && processes[i].used != ~0ull)
      return processes[i].used;
  return 0;
}

static uint64_t free_of_card(void) {
  size_t bytes_free = 0, total = 0;
  return cudaMemGetInfo(&bytes_free, &total) == cudaSuccess ? bytes_free : 0;
}

flap_status flap_cuda_memory_free_of_card(uint64_t *bytes_out) {
  *bytes_out = free_of_card();
  if (*bytes_out == 0)
    return flap_error_set(FLAP_DEVICE, "cuda: the free memory of the card cannot be told: %s",
                          cudaGetErrorString(cudaGetLastError()));
  return FLAP_OK;
}

/* Of the first open in this process: later ones find its context in use. */
static pthread_once_t first_open = PTHREAD_ONCE_INIT;
static uint64_t first_used;
static flap_cuda_memory *first_memory;

static void note_first(void) {
  first_used = used_of_card(first_memory);
}

void flap_cuda_memory_open(flap_cuda_memory *memory) {
  static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
  memory->nvml = nvml_open();
  pthread_mutex_lock(&opening);
  first_memory = memory;
  pthread_once(&first_open, note_first);
  memory->used_before = first_used;
  pthread_mutex_unlock(&opening);
}

uint64_t flap_cuda_memory_charged(const flap_cuda_memory *memory) {
  uint64_t used = used_by_process(memory);
  if (used > 0)
    return used;
  used = used_of_card(memory);
  if (used > memory->used_before)
    return used - memory->used_before;
  uint64_t now = free_of_card();
  return CONTEXT_ASSUMED + (memory->free_after > now ? memory->free_after - now : 0);
}

uint64_t flap_cuda_memory_peak(flap_cuda_memory *memory) {
  uint64_t now = flap_cuda_memory_charged(memory), before = atomic_load(&memory->peak);
  while (now > before && !atomic_compare_exchange_weak(&memory->peak, &before, now)) {
  }
  return now > before ? now : before;
}

/* ---- the arena ------------------------------------------------------------------------------------------ */

flap_status flap_cuda_memory_arena(flap_cuda_memory *memory, uint64_t budget, void **arena_out, uint64_t *bytes_out) {
  memory->free_after = free_of_card();
  uint64_t context = flap_cuda_memory_charged(memory), taken = context + LIBRARY_RESERVE;
  char given[FLAP_UNITS_TEXT_MAX], base[FLAP_UNITS_TEXT_MAX], reserve[FLAP_UNITS_TEXT_MAX], left[FLAP_UNITS_TEXT_MAX];
  (void)flap_units_format_bytes(budget, given, sizeof given);
  (void)flap_units_format_bytes(context, base, sizeof base);
  (void)flap_units_format_bytes(LIBRARY_RESERVE, reserve, sizeof reserve);
  (void)flap_units_format_bytes(memory->free_after, left, sizeof left);
  uint64_t bytes = budget > taken ? (budget - taken) / GRAIN * GRAIN : 0;
  if (bytes == 0)
    return flap_error_set(
        FLAP_NO_MEMORY,
        "vram: of %s, CUDA itself takes %s, and %s are kept for the kernels that it loads: nothing is "
        "left; raise vram",
        given, base, reserve);
  if (bytes > memory->free_after)
    return flap_error_set(FLAP_NO_MEMORY,
                          "vram: %s are asked for, but beside CUDA's own %s the GPU has only %s free; lower vram, or "
                          "end what else uses the GPU",
                          given, base, left);
  cudaError_t error = cudaMalloc(arena_out, bytes);
  if (error == cudaSuccess)
    error = cudaMemset(*arena_out, 0, bytes);
  if (error == cudaSuccess)
    error = cudaDeviceSynchronize();
  if (error != cudaSuccess)
    return flap_error_set(error == cudaErrorMemoryAllocation ? FLAP_NO_MEMORY : FLAP_DEVICE,
                          "vram: cannot take %llu bytes of the GPU's memory: %s; lower vram", (unsigned long long)bytes,
                          cudaGetErrorString(error));
  *bytes_out = bytes;
  (void)flap_cuda_memory_peak(memory);
  return FLAP_OK;
}

/* ---- pinned host memory --------------------------------------------------------------------------------- */

typedef struct pin_job {
  flap_cuda_pin pin;
  uint64_t chunks;
  _Atomic uint64_t next;
  _Atomic int error; /* the first cudaError_t */
  _Atomic bool *done;
} pin_job;

static uint64_t chunks_of(const flap_cuda_pin *pin) {
  return (pin->end - pin->base + pin->chunk_bytes - 1) / pin->chunk_bytes;
}

/* The part of the memory between two seams. */
static void chunk_of(const flap_cuda_pin *pin, uint64_t index, uintptr_t *start_out, uintptr_t *end_out) {
  uintptr_t start = pin->base + index * pin->chunk_bytes, end = start + pin->chunk_bytes;
  *start_out = start < pin->start ? pin->start : start;
  *end_out = end > pin->end ? pin->end : end;
}

static void *pin_main(void *context) {
  pin_job *job = context;
  for (;;) {
    uint64_t index = atomic_fetch_add(&job->next, 1);
    if (index >= job->chunks || atomic_load(&job->error) != cudaSuccess)
      return NULL;
    uintptr_t start, end;
    chunk_of(&job->pin, index, &start, &end);
    uintptr_t first = (start + GRAIN - 1) / GRAIN * GRAIN, last = end / GRAIN * GRAIN;
    if (first < last) { /* both only make it faster */
      (void)madvise((void *)first, last - first, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_WRITE
      (void)madvise((void *)first, last - first, MADV_POPULATE_WRITE);
#endif
    }
    cudaError_t error = cudaHostRegister((void *)start, end - start, cudaHostRegisterPortable);
    int none = cudaSuccess;
    if (error == cudaSuccess)
      atomic_store(&job->done[index], true);
    else
      (void)atomic_compare_exchange_strong(&job->error, &none, (int)error);
  }
}

static void unpin(const flap_cuda_pin *pin, const _Atomic bool *done) {
  for (uint64_t i = 0; i < chunks_of(pin); i++) {
    uintptr_t start, end;
    chunk_of(pin, i, &start, &end);
    if (!done || atomic_load(&done[i]))
      (void)cudaHostUnregister((void *)start);
  }
}

/* Bytes that were pinned before one could not be. */
static uint64_t pinned_bytes(const pin_job *job) {
  uint64_t bytes = 0;
  for (uint64_t i = 0; i < job->chunks; i++) {
    uintptr_t start, end;
    chunk_of(&job->pin, i, &start, &end);
    bytes += atomic_load(&job->done[i]) ? end - start : 0;
  }
  return bytes;
}

static void run_pinning(pin_job *job) {
  pthread_t threads[PIN_THREADS];
  uint64_t wanted = job->chunks < PIN_THREADS ? job->chunks : PIN_THREADS, started = 0;
  while (started + 1 < wanted && pthread_create(&threads[started], NULL, pin_main, job) == 0)
    started++;
  (void)pin_main(job); /* this thread works too, and alone where no other could be started */
  for (uint64_t i = 0; i < started; i++)
    (void)pthread_join(threads[i], NULL);
}

flap_status flap_cuda_memory_pin(flap_cuda_memory *memory, void *start, uint64_t bytes) {
  if (bytes == 0)
    return FLAP_OK;
  char text[FLAP_UNITS_TEXT_MAX];
  (void)flap_units_format_bytes(bytes, text, sizeof text);
  uint32_t count = atomic_load(&memory->pin_count);
  if (count == FLAP_CUDA_PINS_MAX)
    return flap_error_set(FLAP_UNSUPPORTED, "cuda: more than %u host areas to pin", FLAP_CUDA_PINS_MAX);
  pin_job job = {.pin = {.start = (uintptr_t)start, .end = (uintptr_t)start + bytes}};
  job.pin.base = job.pin.start / GRAIN * GRAIN;
  job.pin.chunk_bytes = PIN_CHUNK;
  job.chunks = chunks_of(&job.pin);
  job.done = calloc(job.chunks, sizeof *job.done);
  if (!job.done)
    return flap_error_set(FLAP_NO_MEMORY, "cuda: no memory to pin %s", text);
  run_pinning(&job);
  int error = atomic_load(&job.error);
  if (error != cudaSuccess) {
    char done[FLAP_UNITS_TEXT_MAX], less[FLAP_UNITS_TEXT_MAX];
    (void)flap_units_format_bytes(pinned_bytes(&job), done, sizeof done);
    (void)flap_units_format_bytes(bytes - pinned_bytes(&job), less, sizeof less);
    unpin(&job.pin, job.done);
    (void)cudaGetLastError();
    free(job.done);
    return flap_error_set(
        error == cudaErrorMemoryAllocation ? FLAP_NO_MEMORY : FLAP_DEVICE,
        "cuda: cannot pin %s of host memory, only %s of it: %s; lower ram by %s, or raise what may be "
        "locked or taken here (ulimit -l, the container's limit; WSL pins half of its memory)",
        text, done, cudaGetErrorString((cudaError_t)error), less);
  }
  free(job.done);
  memory->pins[count] = job.pin;
  atomic_store(&memory->pin_count, count + 1); /* copies on other threads see the whole entry */
  return FLAP_OK;
}

uint64_t flap_cuda_memory_piece(const flap_cuda_memory *memory, const void *address, uint64_t bytes) {
  uintptr_t at = (uintptr_t)address;
  uint32_t count = atomic_load(&memory->pin_count);
  for (uint32_t i = 0; i < count; i++) {
    const flap_cuda_pin *pin = &memory->pins[i];
    if (at < pin->start || at >= pin->end)
      continue;
    uintptr_t seam = pin->base + ((at - pin->base) / pin->chunk_bytes + 1) * pin->chunk_bytes;
    uintptr_t end = seam < pin->end ? seam : pin->end;
    return bytes < end - at ? bytes : end - at;
  }
  return bytes;
}

void flap_cuda_memory_close(flap_cuda_memory *memory) {
  uint32_t count = atomic_load(&memory->pin_count);
  for (uint32_t i = 0; i < count; i++)
    unpin(&memory->pins[i], NULL);
  if (memory->nvml) {
    (void)memory->nvml->shutdown();
    (void)dlclose(memory->nvml->library);
    free(memory->nvml);
  }
}
