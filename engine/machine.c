/* Rates of this machine: from the file that keeps them, or measured. */
#include "base/units.h"
#include "engine/budgets.h"
#include "engine/engine.h"
#include "engine/machine_cache.h"
#include "engine/machine_cuda.h"
#include "io/block/measure.h"
#include "kernels/device/measure_machine.h"
#include "kernels/ops.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MATMUL_M 512u
#define MATMUL_N 1024u
#define MATMUL_K 512u
#define MATMUL_HEADS 8u
#define MATMUL_NS_MAX (75u * 1000 * 1000) /* per dtype and round */
#define MATMUL_CALLS_MAX 512u
#define OPERAND_ALIGN 4096u

#define DISK_REQUEST_BYTES (256 * FLAP_KIB)
#define DISK_PROBE_BYTES FLAP_MIB
#define DISK_BYTES_MAX (64 * FLAP_MIB)
#define DISK_SECONDS_MAX 0.9 /* of the four passes together */

/* ---- matmul ---------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
  uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
  return (left > right) - (left < right);
}

/* Ones: denormal numbers, or whatever an arena holds, might be slow. */
static flap_status upload_ones(flap_device *device, flap_dtype dtype, void *to, uint64_t count) {
  uint64_t bytes = count * flap_dtype_bytes(dtype);
  unsigned char *ones = malloc(bytes);
  if (!ones)
    return flap_error_set(FLAP_NO_MEMORY, "measuring matmuls: no memory for %llu bytes", (unsigned long long)bytes);
  for (uint64_t i = 0; i < count; i++) {
    const float one = 1;
    const uint16_t one_bf16 = flap_f32_to_bf16(one);
    memcpy(ones + i * flap_dtype_bytes(dtype), dtype == FLAP_F32 ? (const void *)&one : (const void *)&one_bf16,
           flap_dtype_bytes(dtype));
  }
  flap_status status = flap_device_upload(device, to, ones, bytes);
  free(ones);
  return status;
}

/* The median over as many calls as the time allows; the first one, which takes pages and wakes the pool, is left out.
 */
static flap_status time_matmul(flap_ops *ops, const flap_matmul *matmul, double *flops_out) {
  uint64_t ns[MATMUL_CALLS_MAX];
  uint32_t count = 0;
  flap_device *device = flap_ops_device(ops);
  flap_ops_matmul(ops, matmul);
  FLAP_TRY(flap_device_synchronize(device));
  const uint64_t begun_ns = flap_units_now_ns();
  uint64_t before_ns = begun_ns;
  do {
    flap_ops_matmul(ops, matmul);
    FLAP_TRY(flap_device_synchronize(device));
    uint64_t after_ns = flap_units_now_ns();
    ns[count++] = after_ns > before_ns ? after_ns - before_ns : 1;
    before_ns = after_ns;
  } while (count < MATMUL_CALLS_MAX && before_ns - begun_ns < MATMUL_NS_MAX);
  qsort(ns, count, sizeof ns[0], ascending);
  *flops_out = 2.0 * matmul->m * matmul->n * matmul->k * 1e9 / (double)ns[count / 2];
  return FLAP_OK;
}

static flap_status measure_on(flap_device *device, const flap_ops_limits *limits, double *flops_out) {
  const flap_dtype dtype = limits->dtype;
  uint64_t arena_bytes;
  unsigned char *a = flap_device_arena(device, &arena_bytes);
  unsigned char *b = a + flap_units_round_up(MATMUL_M * MATMUL_K * sizeof(float), OPERAND_ALIGN);
  unsigned char *c = b + flap_units_round_up(MATMUL_N * MATMUL_K * sizeof(float), OPERAND_ALIGN);
  unsigned char *workspace = c + flap_units_round_up(MATMUL_M * MATMUL_N * sizeof(float), OPERAND_ALIGN);
  FLAP_TRY(upload_ones(device, dtype, a, MATMUL_M * MATMUL_K));
  FLAP_TRY(upload_ones(device, dtype, b, MATMUL_N * MATMUL_K));
  flap_ops *ops;
  FLAP_TRY(flap_ops_open(device, limits, workspace, &ops));
  const flap_matmul matmul = {.transpose = FLAP_NT,
                              .m = MATMUL_M,
                              .n = MATMUL_N,
                              .k = MATMUL_K,
                              .a = a,
                              .b = b,
                              .c = c,
                              .lda = MATMUL_K,
                              .ldb = MATMUL_K,
                              .ldc = MATMUL_N,
                              .dtype = dtype,
                              .c_dtype = dtype};
  flap_status status = time_matmul(ops, &matmul, flops_out);
  flap_ops_close(ops);
  return status;
}

/* Matrices of a layer of a small model, where CPUs come to their best: the bound needs a rate that no shape exceeds by
 * much. */
static flap_status measure_matmul(flap_pool *pool, flap_dtype dtype, double *flops_out) {
  const flap_ops_limits limits = {.dtype = dtype,
                                  .batch_max = 1,
                                  .sequence_max = MATMUL_M,
                                  .tokens_max = MATMUL_M,
                                  .hidden = MATMUL_K,
                                  .intermediate = MATMUL_N,
                                  .vocabulary = MATMUL_N,
                                  .heads = MATMUL_HEADS,
                                  .kv_heads = MATMUL_HEADS,
                                  .head_size = MATMUL_K / MATMUL_HEADS,
                                  .threads = flap_pool_threads(pool)};
  const uint64_t operand_bytes = flap_units_round_up(MATMUL_M * MATMUL_K * sizeof(float), OPERAND_ALIGN) +
                                 flap_units_round_up(MATMUL_N * MATMUL_K * sizeof(float), OPERAND_ALIGN) +
                                 flap_units_round_up(MATMUL_M * MATMUL_N * sizeof(float), OPERAND_ALIGN);
  const flap_device_config config = {
      .kind = FLAP_DEVICE_CPU,
      .vram_bytes =
          flap_units_round_up(operand_bytes + flap_ops_workspace_bytes(FLAP_DEVICE_CPU, &limits), OPERAND_ALIGN),
      .events_max = 1,
      .pool = pool};
  flap_device *device;
  FLAP_TRY(flap_device_open(&config, &device));
  flap_status status = measure_on(device, &limits, flops_out);
  flap_device_close(device);
  return status;
}

/* ---- the host -------------------------------------------------------------------------------------------- */

static uint32_t count_cores(void) {
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return count > 0 ? (uint32_t)count : 1;
}

/* "model name : Intel(R) ..." of /proc/cpuinfo; "CPU" where it does not say. */
static void read_cpu_name(char *name_out, size_t bytes) {
  (void)snprintf(name_out, bytes, "CPU");
  FILE *file = fopen("/proc/cpuinfo", "re");
  if (!file)
    return;
  char line[256];
  while (fgets(line, sizeof line, file)) {
    const char *colon = strchr(line, ':');
    if (strncmp(line, "model name", strlen("model name")) != 0 || !colon)
      continue;
    line[strcspn(line, "\n")] = '\0';
    colon += 1 + strspn(colon + 1, " \t");
    if (*colon)
      (void)snprintf(name_out, bytes, "%s", colon);
    break;
  }
  fclose(file);
}

/* Somebody else's burst of work would pass for a slow machine, so there are two rounds, apart, and the faster counts.
 */
static flap_status measure_matmuls(flap_pool *pool, flap_machine *machine) {
  double bf16, f32;
  FLAP_TRY(measure_matmul(pool, FLAP_BF16, &bf16));
  FLAP_TRY(measure_matmul(pool, FLAP_F32, &f32));
  machine->flops_bf16 = bf16 > machine->flops_bf16 ? bf16 : machine->flops_bf16;
  machine->flops_f32 = f32 > machine->flops_f32 ? f32 : machine->flops_f32;
  return FLAP_OK;
}

static flap_status measure_rates(flap_pool *pool, flap_machine *machine) {
  machine->flops_bf16 = machine->flops_f32 = 0;
  FLAP_TRY(measure_matmuls(pool, machine));
  FLAP_TRY(flap_device_measure_host(pool, machine));
  return measure_matmuls(pool, machine);
}

/* All but the disk rates. Lanes share the cores when compute wants all of them; when it leaves some, copies run there,
 * and how many then share what is not worth a model: none, so that the bound stays one. */
static flap_status measure_cpu(uint32_t threads, const char *cpu, flap_machine *machine_out) {
  flap_machine machine;
  flap_pool *pool;
  flap_device_default_machine(FLAP_DEVICE_CPU, &machine);
  FLAP_TRY(flap_pool_open(threads, &pool));
  flap_status status = measure_rates(pool, &machine);
  flap_pool_close(pool);
  if (status != FLAP_OK)
    return status;
  const uint32_t cores = count_cores();
  machine.shared_cores = threads >= cores ? cores : 0;
  (void)snprintf(machine.name, sizeof machine.name, "%.47s, %u thread%s", cpu, threads, threads == 1 ? "" : "s");
  machine.disk_read_bytes = machine.disk_write_bytes = machine.disk_both_bytes = 0;
  *machine_out = machine;
  return FLAP_OK;
}

/* ---- disks ----------------------------------------------------------------------------------------------- */

/* A small extent tells how large a one the time allows. */
static flap_status measure_disk(const char *path, flap_machine *machine) {
  uint64_t free_bytes;
  flap_block_rates rates;
  FLAP_TRY(flap_block_space(path, &free_bytes));
  FLAP_TRY(flap_block_measure_rates(path, DISK_PROBE_BYTES, DISK_REQUEST_BYTES, 0, FLAP_BLOCK_AUTO, &rates));
  double allowed = DISK_SECONDS_MAX / (2 / rates.write_bytes + 1 / rates.read_bytes + 1 / rates.both_bytes);
  uint64_t bytes = allowed < (double)DISK_BYTES_MAX ? (uint64_t)allowed : DISK_BYTES_MAX;
  bytes = bytes < free_bytes / 2 ? bytes : free_bytes / 2;
  bytes -= bytes % DISK_PROBE_BYTES;
  if (bytes > DISK_PROBE_BYTES)
    FLAP_TRY(flap_block_measure_rates(path, bytes, DISK_REQUEST_BYTES, 0, FLAP_BLOCK_AUTO, &rates));
  machine->disk_read_bytes = rates.read_bytes;
  machine->disk_write_bytes = rates.write_bytes;
  machine->disk_both_bytes = rates.both_bytes;
  return FLAP_OK;
}

/* ---- all of it ------------------------------------------------------------------------------------------- */

typedef struct machine_wish {
  uint32_t threads;
  char cpu[128];
  flap_machine_key key;
  const char *disk_path; /* as given; NULL: none */
  char real_path[FLAP_PATH_MAX];
  flap_machine_disk disk;
  bool disk_found; /* the folder is there, and `disk` says what it is */
  bool fresh;
  bool cuda;
} machine_wish;

static flap_status gather(const flap_machine_cache *cache, const machine_wish *wish, flap_machine *machine_out) {
  flap_machine machine = {.name = ""};
  const flap_machine_disk *disk = wish->disk_found ? &wish->disk : NULL;
  bool rates = wish->fresh || !flap_machine_cache_find(cache, &wish->key, &machine);
  if (rates)
    FLAP_TRY(wish->cuda ? flap_machine_measure_cuda(wish->threads, &machine)
                        : measure_cpu(wish->threads, wish->cpu, &machine));
  bool disk_rates =
      wish->disk_path && ((wish->fresh && disk) || !flap_machine_cache_find_disk(cache, &wish->key, disk, &machine));
  if (disk_rates) {
    if (!disk)
      return flap_error_set(FLAP_NOT_FOUND, "disk %s: no such folder: make it, or name another", wish->disk_path);
    FLAP_TRY(measure_disk(wish->disk_path, &machine));
  }
  if (rates || disk_rates)
    flap_machine_cache_store(cache, &wish->key, &machine, rates, disk_rates ? disk : NULL);
  *machine_out = machine;
  return FLAP_OK;
}

static uint32_t count_threads(uint32_t wanted) {
  const uint32_t cores = count_cores();
  return wanted > 0 ? wanted : cores < FLAP_POOL_THREADS_MAX ? cores : FLAP_POOL_THREADS_MAX;
}

flap_status flap_engine_machine(flap_run_device device, uint32_t threads, const char *disk_path, bool fresh,
                                flap_machine *machine_out) {
  const uint32_t cores = count_cores();
  machine_wish wish = {.disk_path = disk_path, .fresh = fresh, .cuda = device == FLAP_RUN_DEVICE_CUDA};
  wish.threads = count_threads(threads);
  if (wish.threads > FLAP_POOL_THREADS_MAX)
    return flap_error_set(FLAP_INVALID, "threads: %u are more than the %d that are possible", wish.threads,
                          FLAP_POOL_THREADS_MAX);
  read_cpu_name(wish.cpu, sizeof wish.cpu);
  char host[320], card[128] = "";
  if (wish.cuda)
    FLAP_TRY(flap_machine_cuda_name(card, sizeof card));
  (void)snprintf(host, sizeof host, "%s%s%s, %u core%s", card, wish.cuda ? "; " : "", wish.cpu, cores,
                 cores == 1 ? "" : "s");
  wish.key = (flap_machine_key){.device = wish.cuda ? "cuda" : "cpu", .threads = wish.threads, .host = host};
  struct stat about;
  if (disk_path && realpath(disk_path, wish.real_path) && stat(wish.real_path, &about) == 0) {
    wish.disk = (flap_machine_disk){.path = wish.real_path, .number = (uint64_t)about.st_dev};
    wish.disk_found = true;
  }
  flap_machine_cache cache;
  FLAP_TRY(flap_machine_cache_open(&cache));
  flap_status status = gather(&cache, &wish, machine_out);
  flap_machine_cache_close(&cache);
  return status;
}

flap_status flap_engine_profile(flap_run_device device, uint32_t threads, const char *disk_path, bool fresh,
                                flap_machine_profile *profile_out) {
  flap_machine_profile *profile = profile_out;
  memset(profile, 0, sizeof *profile);
  flap_machine *machine = &profile->machine;
  FLAP_TRY(flap_engine_machine(device, threads, disk_path, fresh, machine));
  profile->device = device == FLAP_RUN_DEVICE_CUDA ? FLAP_RUN_DEVICE_CUDA : FLAP_RUN_DEVICE_CPU;
  profile->threads = count_threads(threads);
  profile->ram_bytes = flap_budgets_free_memory();
  if (profile->device == FLAP_RUN_DEVICE_CUDA)
    FLAP_TRY(flap_machine_cuda_free(&profile->vram_bytes));
  if (disk_path) {
    flap_profile_disk *disk = &profile->disks[profile->disk_count++];
    *disk = (flap_profile_disk){.read_bytes = machine->disk_read_bytes,
                                .write_bytes = machine->disk_write_bytes,
                                .both_bytes = machine->disk_both_bytes};
    FLAP_TRY(flap_block_space(disk_path, &disk->bytes));
  }
  machine->disk_read_bytes = machine->disk_write_bytes = machine->disk_both_bytes = 0;
  return FLAP_OK;
}
