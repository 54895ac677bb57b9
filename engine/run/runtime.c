#include "engine/run/runtime.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/units.h"
#include "engine/machine/codec_rates.h"
#include "engine/step/update.h"
#include "io/formats/trace.h"

#include <string.h>

#define VRAM_SPARE_BYTES (64 * FLAP_MIB)

/* ---- pieces ---------------------------------------------------------------------------------------------- */

static void trace_transfer(void *context, flap_lane lane, uint32_t region, uint64_t started_ns, uint64_t ended_ns,
                           uint64_t bytes) {
  static const flap_trace_lane lanes[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = FLAP_TRACE_H2D,
                                                         [FLAP_LANE_D2H] = FLAP_TRACE_D2H,
                                                         [FLAP_LANE_DISK_READ] = FLAP_TRACE_DISK_READ,
                                                         [FLAP_LANE_DISK_WRITE] = FLAP_TRACE_DISK_WRITE,
                                                         [FLAP_LANE_HOST] = FLAP_TRACE_HOST};
  const flap_runtime *runtime = context;
  if (!__atomic_load_n(&runtime->tracing, __ATOMIC_ACQUIRE))
    return;
  const char *name = region < runtime->lists.layout.region_count
                         ? flap_engine_class_name(runtime->lists.layout.regions[region].klass)
                         : "transfer";
  flap_trace_add(runtime->lists.trace, lanes[lane], name, region, started_ns, ended_ns, bytes);
}

static void trace_compute(void *context, uint64_t label, uint64_t started_ns, uint64_t ended_ns) {
  const flap_runtime *runtime = context;
  flap_executor_trace(runtime->lists.trace, label, started_ns, ended_ns);
}

/* Of a budget, a max of which can be many GiB, no more is taken, and zeroed, than the plan uses; on a card with
 * something to spare, for how much the driver takes there for itself is not the plan's to say. */
static uint64_t vram_to_take(const flap_runtime *runtime, const flap_setup *setup, uint64_t budget_bytes) {
  const uint64_t spare = setup->spec.device == FLAP_DEVICE_CPU ? 0 : VRAM_SPARE_BYTES;
  return runtime->simulated || setup->vram_bytes + spare >= budget_bytes ? budget_bytes : setup->vram_bytes + spare;
}

static void configure_pager(flap_runtime *runtime, const flap_setup *setup, const flap_runtime_config *config,
                            flap_pager_config *pager) {
  *pager = setup->pager;
  pager->device = (flap_device_config){.kind = runtime->simulated ? FLAP_DEVICE_SIM : setup->spec.device,
                                       .vram_bytes = vram_to_take(runtime, setup, config->vram_bytes),
                                       .pool = runtime->pool,
                                       .clock = runtime->clock};
  flap_setup_block_config(setup, &pager->disk);
  if (config->shared_folder != NULL && pager->disk.disk_count == 1) {
    if (flap_block_can_link(pager->disk.disks[0].path, config->shared_folder))
      pager->shared_folder = config->shared_folder;
    else
      flap_log(FLAP_LOG_DEBUG, "%s: its file system names no files of disk %s: checkpoints copy states from there",
               config->shared_folder, pager->disk.disks[0].path);
  }
  if (runtime->simulated) {
    pager->device.machine = *config->machine;
    pager->clock = runtime->clock;
    pager->counts_no_stalls = config->trace == NULL;
    pager->disk.disk_count = 0; /* one disk of the machine's rates */
    const double share = flap_codec_share(setup->choice.workers, setup->spec.threads);
    pager->encode_bytes = share * config->machine->encode_bytes;
    pager->decode_bytes = share * config->machine->decode_bytes;
    pager->disk_share = flap_codec_disk_share(config->machine, &setup->pager, setup->spec.threads, setup->spec.optim);
    pager->compression = pager->pool_bytes > 0 || pager->disk_share < 1 ? FLAP_COMPRESSION_ZSTD : FLAP_COMPRESSION_OFF;
    pager->workers = 0; /* there are no bytes to work on */
  }
  if (!runtime->simulated || config->trace != NULL) {
    pager->trace = trace_transfer;
    pager->trace_compute = trace_compute;
    pager->trace_context = runtime;
  }
}

static flap_status open_executor(flap_runtime *runtime, const flap_setup *setup, const flap_runtime_config *config) {
  flap_executor *x = &runtime->executor;
  flap_device *device = flap_pager_device(runtime->pager);
  uint64_t rest_bytes = 0;
  void *rest = flap_pager_vram_rest(runtime->pager, &rest_bytes);
  if (rest_bytes < setup->vram_scratch_bytes) {
    char need[FLAP_UNITS_TEXT_MAX], have[FLAP_UNITS_TEXT_MAX];
    return flap_error_set(FLAP_BUDGET, "vram: workspaces take %s, and %s are left for them; raise vram",
                          flap_units_format_bytes(setup->vram_scratch_bytes, need, sizeof need),
                          flap_units_format_bytes(rest_bytes, have, sizeof have));
  }
  flap_arena_borrow(&runtime->vram, "vram", rest, rest_bytes);
  x->config = config->optimizer;
  x->layout = &runtime->lists.layout;
  x->programs = runtime->lists.programs;
  x->pager = runtime->pager;
  x->host_optimizer = runtime->host_optimizer;
  x->times = runtime->simulated ? config->times : NULL;
  flap_buffers_take_device(x->layout, setup->spec.device, setup->spec.threads, &runtime->vram, &x->device);
  flap_arena_seal(&runtime->vram);
  flap_buffers_take_host(x->layout, setup->pager.leases_max, &runtime->ram, &x->host);
  if (!runtime->simulated)
    flap_buffers_fill_decay(x->layout, &x->host);
  flap_ops_limits limits;
  flap_buffers_limits(x->layout, setup->spec.threads, &limits);
  FLAP_TRY(flap_ops_open(device, &limits, x->device.ops_workspace, &runtime->ops));
  FLAP_TRY(flap_matmul_choice_give(config->matmuls, runtime->ops, false));
  x->ops = runtime->ops;
  return flap_executor_open(x);
}

/* ---- opening --------------------------------------------------------------------------------------------- */

flap_status flap_runtime_open(flap_setup *setup, const flap_runtime_config *config, flap_runtime *runtime_out) {
  memset(runtime_out, 0, sizeof *runtime_out);
  flap_setup_set_disks(setup, config->disk_bytes);
  runtime_out->spec = setup->spec;
  runtime_out->vram_pager_bytes = setup->sizes.vram_bytes;
  runtime_out->block_bytes = setup->ram_bytes - setup->ram_arena_bytes;
  runtime_out->disk_bytes = setup->disk_bytes;
  flap_status status = FLAP_OK;
  flap_pager_config pager;
  FLAP_TRY_GOTO(status, flap_pool_open(setup->spec.threads, &runtime_out->pool));
  if (setup->choice.host_parts > 0)
    FLAP_TRY_GOTO(
        status, flap_host_optimizer_open(flap_update_host_threads(setup->spec.threads), &runtime_out->host_optimizer));
  FLAP_TRY_GOTO(status, flap_arena_open(&runtime_out->ram, "ram", setup->ram_arena_bytes));
  configure_pager(runtime_out, setup, config, &pager);
  FLAP_TRY_GOTO(status, flap_pager_open(&pager, &runtime_out->ram, &runtime_out->pager));
  flap_setup_take_lists(setup, &runtime_out->ram, &runtime_out->lists);
  FLAP_TRY_GOTO(status, open_executor(runtime_out, setup, config));
  if (setup->spec.reader_depth == 0)
    flap_arena_seal(&runtime_out->ram);
  return FLAP_OK;
fail:
  flap_runtime_close(runtime_out);
  return status;
}

void flap_runtime_start_trace(flap_runtime *runtime) {
  runtime->executor.trace = runtime->lists.trace;
  flap_device_time_exactly(flap_pager_device(runtime->pager), true);
  __atomic_store_n(&runtime->tracing, 1, __ATOMIC_RELEASE);
}

void flap_runtime_stop_trace(flap_runtime *runtime) {
  if (runtime->executor.timed)
    return;
  runtime->executor.trace = NULL;
  flap_device_time_exactly(flap_pager_device(runtime->pager), false);
  flap_device_label_compute(flap_pager_device(runtime->pager), 0);
  flap_device_label_rests(flap_pager_device(runtime->pager), 0);
  __atomic_store_n(&runtime->tracing, 0, __ATOMIC_RELEASE);
}

flap_status flap_runtime_open_reader(flap_runtime *runtime, const flap_dataset *dataset, uint64_t cursor) {
  const flap_reader_config config = {.dataset = dataset,
                                     .sequence_length = runtime->spec.shape.sequence,
                                     .sequences = runtime->spec.shape.batch * runtime->spec.micro_batches,
                                     .depth = runtime->spec.reader_depth,
                                     .cursor = cursor};
  flap_assert(runtime->spec.reader_depth > 0 && runtime->reader == NULL);
  FLAP_TRY(flap_reader_open(&config, &runtime->ram, &runtime->reader));
  flap_arena_seal(&runtime->ram);
  return FLAP_OK;
}

static flap_status nothing(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)offset, (void)bytes, (void)memory;
  return FLAP_OK;
}

flap_status flap_runtime_open_simulated(flap_setup *setup, const flap_runtime_config *config,
                                        flap_runtime *runtime_out) {
  memset(runtime_out, 0, sizeof *runtime_out);
  runtime_out->spec = setup->spec;
  runtime_out->simulated = true;
  flap_status status = FLAP_OK;
  flap_arena homes, host;
  flap_pager_config pager;
  flap_host_buffers buffers;
  flap_arena_measure(&homes, "ram");
  flap_arena_measure(&host, "ram");
  flap_buffers_take_host(&setup->layout, setup->pager.leases_max, &host, &buffers);
  FLAP_TRY_GOTO(status, flap_clock_open(&runtime_out->clock));
  FLAP_TRY_GOTO(status, flap_arena_open(&runtime_out->ram, "ram", host.bytes_used));
  configure_pager(runtime_out, setup, config, &pager);
  FLAP_TRY_GOTO(status, flap_pager_open(&pager, &homes, &runtime_out->pager));
  flap_setup_take_lists(setup, &homes, &runtime_out->lists);
  runtime_out->lists.trace = config->trace;
  FLAP_TRY_GOTO(status, open_executor(runtime_out, setup, config));
  for (uint32_t i = 0; i < setup->layout.region_count; i++)
    if (setup->layout.regions[i].overlay == 0) /* the others hold nothing between a run's start and its first step */
      FLAP_TRY_GOTO(status, flap_pager_fill(runtime_out->pager, i, nothing, NULL));
  return FLAP_OK;
fail:
  flap_runtime_close(runtime_out);
  return status;
}

void flap_runtime_close(flap_runtime *runtime) {
  flap_reader_close(runtime->reader);
  flap_ops_close(runtime->ops);
  flap_pager_close(runtime->pager);
  if (!runtime->simulated)
    for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++)
      flap_program_close(&runtime->lists.programs[i]);
  flap_pool_close(runtime->pool);
  flap_host_optimizer_close(runtime->host_optimizer); /* the pager, whose jobs use it, is closed */
  flap_clock_close(runtime->clock);
  flap_arena_close(&runtime->ram);
  memset(runtime, 0, sizeof *runtime);
}

void flap_runtime_peaks(const flap_runtime *runtime, flap_peaks *peaks_out) {
  *peaks_out = (flap_peaks){
      .vram_bytes = runtime->vram_pager_bytes + flap_units_round_up(runtime->vram.bytes_used, FLAP_BLOCK_ALIGN),
      .ram_bytes = flap_units_round_up(runtime->ram.bytes_used, FLAP_BLOCK_ALIGN) + runtime->block_bytes,
      .disk_bytes = runtime->disk_bytes};
  if (runtime->spec.device == FLAP_DEVICE_CUDA && !runtime->simulated) /* as the driver says */
    peaks_out->vram_bytes = flap_device_memory_peak(flap_pager_device(runtime->pager));
}
