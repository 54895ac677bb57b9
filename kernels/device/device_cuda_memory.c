/* Memory of the cuda device.
 *
 * The budget is what the driver charges to this process. NVML tells that per process. Where it does not know us
 * (another process-id namespace, Windows beneath), it is our context, by how much more of the card was in use once it
 * was there (without NVML: an assumed size), the arena, and of what the card's use grew beyond both as much as kernels
 * may take: the rest is of other programs, which come and go.
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
#define RESERVE_LEAST ((uint64_t)16 << 20) /* of it, whatever was loaded before the arena was taken */
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

static void nvml_close(flap_cuda_nvml *nvml) {
  if (!nvml)
    return;
  (void)nvml->shutdown();
  (void)dlclose(nvml->library);
  free(nvml);
}

/* 0 where NVML does not tell, here and in the next. */
static uint64_t used_of_card(const flap_cuda_nvml *nvml) {
  nvml_memory m = {0};
  return nvml && nvml->memory_info(nvml->card, &m) == 0 ? m.used : 0;
}

static uint64_t used_by_process(const flap_cuda_nvml *nvml) {
  nvml_process processes[NVML_PROCESSES_MAX];
  unsigned int count = NVML_PROCESSES_MAX;
  if (!nvml || nvml->processes(nvml->card, &count, processes) != 0)
    return 0;
  for (unsigned int i = 0; i < count && i < NVML_PROCESSES_MAX; i++)
    if (processes[i].pid == (unsigned int)getpid() && processes[i].used != ~0ull)
      return processes[i].used;
  return 0;
}

/* The context is the process's, and stays: later opens find it in use, with the kernels that were loaded by then. */
static pthread_mutex_t context_lock = PTHREAD_MUTEX_INITIALIZER;
static bool context_there;           /* all under context_lock */
static uint64_t context_used_before; /* of the whole card, right before it */
static uint64_t context_bytes;       /* and what it takes, streams and events included; 0: not weighed yet */

flap_status flap_cuda_memory_start(flap_cuda_memory *memory) {
  cudaError_t error = cudaSuccess;
  memory->nvml = nvml_open();
  pthread_mutex_lock(&context_lock);
  if (!context_there) {
    context_used_before = used_of_card(memory->nvml);
    (void)cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync); /* refused where another library made a context */
    (void)cudaGetLastError();
    error = cudaSetDevice(0);
    if (error == cudaSuccess)
      error = cudaFree(NULL);
    context_there = error == cudaSuccess;
  }
  pthread_mutex_unlock(&context_lock);
  if (error == cudaSuccess)
    return FLAP_OK;
  (void)cudaGetLastError();
  return flap_error_set(error == cudaErrorMemoryAllocation ? FLAP_NO_MEMORY : FLAP_DEVICE,
                        "cuda: cannot start on the GPU: %s (error %d)", cudaGetErrorString(error), (int)error);
}

/* By how much the card's use grew since before the context. */
static uint64_t grown_since(const flap_cuda_memory *memory, uint64_t before) {
  const uint64_t used = used_of_card(memory->nvml);
  return used > before ? used - before : 0;
}

static uint64_t weigh_context(const flap_cuda_memory *memory) {
  pthread_mutex_lock(&context_lock);
  if (context_bytes == 0) {
    const uint64_t own = used_by_process(memory->nvml), grown = grown_since(memory, context_used_before);
    context_bytes = own > 0 ? own : grown > 0 ? grown : CONTEXT_ASSUMED;
  }
  const uint64_t bytes = context_bytes;
  pthread_mutex_unlock(&context_lock);
  return bytes;
}

uint64_t flap_cuda_memory_charged(const flap_cuda_memory *memory) {
  const uint64_t by_driver = used_by_process(memory->nvml);
  if (by_driver > 0)
    return by_driver;
  const uint64_t own = weigh_context(memory) + memory->arena_bytes;
  const uint64_t grown = grown_since(memory, context_used_before);
  const uint64_t loaded = grown > own ? grown - own : 0;
  return own + (loaded < LIBRARY_RESERVE ? loaded : LIBRARY_RESERVE);
}

uint64_t flap_cuda_memory_peak(flap_cuda_memory *memory) {
  uint64_t now = flap_cuda_memory_charged(memory), before = atomic_load(&memory->peak);
  while (now > before && !atomic_compare_exchange_weak(&memory->peak, &before, now)) {
  }
  return now > before ? now : before;
}

static uint64_t free_of_card(void) {
  size_t bytes_free = 0, total = 0;
  return cudaMemGetInfo(&bytes_free, &total) == cudaSuccess ? bytes_free : 0;
}

flap_status flap_cuda_memory_budget_max(uint64_t *bytes_out) {
  flap_cuda_memory memory = {.nvml = NULL};
  flap_status status = flap_cuda_memory_start(&memory);
  *bytes_out = status == FLAP_OK ? free_of_card() : 0;
  if (status == FLAP_OK && *bytes_out == 0)
    status = flap_error_set(FLAP_DEVICE, "cuda: the free memory of the card cannot be told: %s",
                            cudaGetErrorString(cudaGetLastError()));
  if (status == FLAP_OK)
    *bytes_out += flap_cuda_memory_charged(&memory);
  flap_cuda_memory_close(&memory);
  return status;
}

/* ---- the arena ------------------------------------------------------------------------------------------ */

/* What of a budget is not the arena: the same in every life of a process, unless more was loaded than is kept for it.
 */
static uint64_t not_for_arena(const flap_cuda_memory *memory) {
  const uint64_t kept = weigh_context(memory) + LIBRARY_RESERVE;
  const uint64_t there = flap_cuda_memory_charged(memory) + RESERVE_LEAST;
  return there > kept ? there : kept;
}

flap_status flap_cuda_memory_arena(flap_cuda_memory *memory, uint64_t budget, void **arena_out, uint64_t *bytes_out) {
  const uint64_t context = flap_cuda_memory_charged(memory), taken = not_for_arena(memory), there = free_of_card();
  char given[FLAP_UNITS_TEXT_MAX], base[FLAP_UNITS_TEXT_MAX], reserve[FLAP_UNITS_TEXT_MAX], left[FLAP_UNITS_TEXT_MAX];
  (void)flap_units_format_bytes(budget, given, sizeof given);
  (void)flap_units_format_bytes(context, base, sizeof base);
  (void)flap_units_format_bytes(taken - context, reserve, sizeof reserve);
  (void)flap_units_format_bytes(there, left, sizeof left);
  uint64_t bytes = budget > taken ? (budget - taken) / GRAIN * GRAIN : 0;
  if (bytes == 0)
    return flap_error_set(
        FLAP_NO_MEMORY,
        "vram: of %s, CUDA itself takes %s, and %s are kept for the kernels that it loads: nothing is "
        "left; raise vram",
        given, base, reserve);
  if (bytes > there)
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
  *bytes_out = memory->arena_bytes = bytes;
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
  nvml_close(memory->nvml);
}
