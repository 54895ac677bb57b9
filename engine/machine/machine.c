/* Rates of this machine: from the file that keeps them, or measured. */
#include "base/log.h"
#include "base/system.h"
#include "base/units.h"
#include "engine/engine.h"
#include "engine/machine/codec_rates.h"
#include "engine/machine/host_memory.h"
#include "engine/machine/machine_cache.h"
#include "engine/machine/machine_cuda.h"
#include "io/block/measure.h"
#include "kernels/device/measure_machine.h"
#include "kernels/measure_ops.h"

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
#define MATMUL_ROUNDS 15u
#define MATMUL_ROUND_NS (5u * 1000 * 1000)

/* Small runs have small transfers and large ones have large: disks of hosts that many share are up to a third slower by
 * those. */
#define DISK_REQUEST_BYTES (256 * FLAP_KIB)
#define DISK_REQUEST_BYTES_LARGE (4 * FLAP_MIB)
#define DISK_PROBE_BYTES FLAP_MIB
/* A small extent is measured, or a share of what a run may put on the disk: what is written and read anew within a
 * second comes from caches, of the drive or of a host, that serve no run of many gigabytes. */
#define DISK_SPAN_MIN (64 * FLAP_MIB)
#define DISK_SPAN_MAX (2 * FLAP_GIB)
#define DISK_SPAN_SHARE 8u
#define DISK_SECONDS 0.9     /* of the four passes together, over a small extent */
#define DISK_SECONDS_MAX 3.0 /* over a large one after it */

/* ---- matmul ---------------------------------------------------------------------------------------------- */

/* Matrices of a layer of a small model, where CPUs come to their best: the bound needs a rate that no shape exceeds by
 * much. */
static flap_status measure_matmul(flap_pool *pool, flap_dtype dtype, double *flops_out) {
  const flap_rate_effort effort = {.rounds = MATMUL_ROUNDS, .round_ns = MATMUL_ROUND_NS};
  flap_ops_meter_config config = {.kind = FLAP_DEVICE_CPU,
                                  .pool = pool,
                                  .tokens_max = MATMUL_M,
                                  .heads = MATMUL_HEADS,
                                  .head_size_max = MATMUL_K / MATMUL_HEADS};
  config.vram_bytes =
      flap_ops_meter_vram(&config, (MATMUL_M * MATMUL_K + MATMUL_N * MATMUL_K + MATMUL_M * MATMUL_N) * sizeof(float));
  flap_ops_meter *meter;
  flap_rate rate;
  FLAP_TRY(flap_ops_meter_open(&config, &effort, &meter));
  const flap_status status = flap_ops_measure_matmul(meter, dtype, FLAP_NT, MATMUL_M, MATMUL_N, MATMUL_K, false, &rate);
  flap_ops_meter_close(meter);
  *flops_out = rate.median;
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

static uint64_t span_of(uint64_t disk_bytes) {
  const uint64_t span = disk_bytes / DISK_SPAN_SHARE;
  return span < DISK_SPAN_MIN ? DISK_SPAN_MIN : span < DISK_SPAN_MAX ? span : DISK_SPAN_MAX;
}

/* How many bytes the four passes move in so many seconds. */
static uint64_t bytes_in(double seconds, const flap_block_rates *rates, uint64_t bytes_max, uint64_t unit) {
  const double allowed = seconds / (2 / rates->write_bytes + 1 / rates->read_bytes + 1 / rates->both_bytes);
  const uint64_t bytes = allowed < (double)bytes_max ? (uint64_t)allowed : bytes_max;
  return bytes - bytes % unit;
}

/* A small extent tells how large a one the time allows, as far as it can: what is beyond a cache may be slower by far,
 * so the clock has the last word. */
static flap_status measure_disk(const char *path, uint64_t span_bytes, flap_machine *machine) {
  uint64_t free_bytes;
  flap_block_rates rates;
  FLAP_TRY(flap_block_space(path, &free_bytes));
  FLAP_TRY(flap_block_measure_rates(path, DISK_PROBE_BYTES, DISK_REQUEST_BYTES, 0, 0, FLAP_BLOCK_AUTO, &rates));
  const uint64_t most = span_bytes < free_bytes / 2 ? span_bytes : free_bytes / 2;
  uint64_t bytes = bytes_in(DISK_SECONDS, &rates, most < DISK_SPAN_MIN ? most : DISK_SPAN_MIN, DISK_PROBE_BYTES);
  if (bytes > DISK_PROBE_BYTES)
    FLAP_TRY(flap_block_measure_rates(path, bytes, DISK_REQUEST_BYTES, 0, DISK_SECONDS, FLAP_BLOCK_AUTO, &rates));
  bytes = bytes_in(DISK_SECONDS_MAX, &rates, most, DISK_REQUEST_BYTES_LARGE);
  if (span_bytes > DISK_SPAN_MIN && bytes > DISK_PROBE_BYTES)
    FLAP_TRY(
        flap_block_measure_rates(path, bytes, DISK_REQUEST_BYTES_LARGE, 0, DISK_SECONDS_MAX, FLAP_BLOCK_AUTO, &rates));
  machine->disk_read_bytes = rates.read_bytes;
  machine->disk_write_bytes = rates.write_bytes;
  machine->disk_both_bytes = rates.both_bytes;
  return FLAP_OK;
}

/* ---- all of it ------------------------------------------------------------------------------------------- */

typedef struct machine_wish {
  const flap_machine_query *query;
  uint32_t threads;
  char cpu[128];
  flap_machine_key key;
  char real_path[FLAP_PATH_MAX];
  flap_machine_disk disk;
  bool disk_found; /* the folder is there, and `disk` says what it is */
  bool cuda;
} machine_wish;

static flap_status gather(const flap_machine_cache *cache, const machine_wish *wish, flap_machine *machine_out) {
  flap_machine machine = {.name = ""};
  const flap_machine_disk *disk = wish->disk_found ? &wish->disk : NULL;
  bool rates = wish->query->fresh || !flap_machine_cache_find(cache, &wish->key, &machine);
  if (rates)
    FLAP_TRY(wish->cuda ? flap_machine_measure_cuda(wish->threads, wish->query->vram_bytes, &machine)
                        : measure_cpu(wish->threads, wish->cpu, &machine));
  if (wish->query->disk_path && machine.encode_bytes <= 0 && machine.shared_cores == 0 && !cache->named) {
    flap_codec_measure(flap_codec_threads(wish->threads), &machine);
    rates = rates || machine.encode_bytes > 0;
  }
  bool disk_rates = wish->query->disk_path &&
                    ((wish->query->fresh && disk) || !flap_machine_cache_find_disk(cache, &wish->key, disk, &machine));
  if (disk_rates) {
    if (!disk)
      return flap_error_set(FLAP_NOT_FOUND, "disk %s: no such folder: make it, or name another",
                            wish->query->disk_path);
    const flap_status status = measure_disk(wish->query->disk_path, disk->span_bytes, &machine);
    if (status == FLAP_NO_SPACE && !wish->query->fresh) {
      flap_log(FLAP_LOG_DEBUG, "disk %s is not measured: %s", wish->query->disk_path, flap_error_message());
      flap_error_clear();
      machine.disk_read_bytes = machine.disk_write_bytes = machine.disk_both_bytes = 0;
      disk_rates = false;
    } else if (status != FLAP_OK) {
      return status;
    }
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

/* Rates that were measured within a small budget say less: they do not count for runs that have more. */
static flap_status describe_host(const machine_wish *wish, char *host_out, size_t bytes) {
  char what[128];
  const uint32_t cores = count_cores();
  const bool is_little = wish->cuda && wish->query->vram_bytes > 0 && wish->query->vram_bytes < FLAP_MACHINE_CUDA_VRAM;
  FLAP_TRY(wish->cuda ? flap_device_find(FLAP_DEVICE_CUDA, what, sizeof what)
                      : flap_ops_cpu_kernels(what, sizeof what));
  (void)snprintf(host_out, bytes, "%s%s; %s, %u core%s", what, is_little ? ", measured in little vram" : "", wish->cpu,
                 cores, cores == 1 ? "" : "s");
  return FLAP_OK;
}

flap_status flap_engine_machine(const flap_machine_query *query, flap_machine *machine_out) {
  machine_wish wish = {.query = query, .cuda = query->device == FLAP_RUN_DEVICE_CUDA};
  wish.threads = count_threads(query->threads);
  if (wish.threads > FLAP_POOL_THREADS_MAX)
    return flap_error_set(FLAP_INVALID, "threads: %u are more than the %d that are possible", wish.threads,
                          FLAP_POOL_THREADS_MAX);
  read_cpu_name(wish.cpu, sizeof wish.cpu);
  char host[384];
  FLAP_TRY(describe_host(&wish, host, sizeof host));
  wish.key = (flap_machine_key){.device = wish.cuda ? "cuda" : "cpu", .threads = wish.threads, .host = host};
  struct stat about;
  if (query->disk_path && realpath(query->disk_path, wish.real_path) && flap_system_stat(wish.real_path, &about) == 0) {
    wish.disk = (flap_machine_disk){
        .path = wish.real_path, .number = (uint64_t)about.st_dev, .span_bytes = span_of(query->disk_bytes)};
    wish.disk_found = true;
  }
  flap_machine_cache cache;
  FLAP_TRY(flap_machine_cache_open(&cache));
  flap_status status = gather(&cache, &wish, machine_out);
  flap_machine_cache_close(&cache);
  return status;
}

bool flap_engine_falls_to_cpu(flap_status status) {
  if (status != FLAP_UNSUPPORTED && status != FLAP_NOT_FOUND && status != FLAP_DEVICE)
    return false;
  flap_log(status == FLAP_DEVICE ? FLAP_LOG_WARNING : FLAP_LOG_DEBUG, "device: cpu, for %s", flap_error_message());
  flap_error_clear();
  return true;
}

flap_status flap_engine_profile(flap_run_device device, uint32_t threads, const char *disk_path, bool fresh,
                                flap_machine_profile *profile_out) {
  flap_machine_profile *profile = profile_out;
  memset(profile, 0, sizeof *profile);
  flap_machine *machine = &profile->machine;
  const flap_machine_query query = {.device = device, .threads = threads, .disk_path = disk_path, .fresh = fresh};
  FLAP_TRY(flap_engine_machine(&query, machine));
  profile->device = device == FLAP_RUN_DEVICE_CUDA ? FLAP_RUN_DEVICE_CUDA : FLAP_RUN_DEVICE_CPU;
  profile->threads = count_threads(threads);
  profile->ram_bytes = flap_host_memory_free(false);
  if (profile->device == FLAP_RUN_DEVICE_CUDA)
    FLAP_TRY(flap_device_budget_max(FLAP_DEVICE_CUDA, &profile->vram_bytes));
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
