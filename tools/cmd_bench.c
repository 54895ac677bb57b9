/* flap bench: what this machine can do, measured through FLAP's own code. */
#include "base/pool.h"
#include "base/units.h"
#include "engine/engine.h"
#include "io/block/measure.h"
#include "tools/arguments.h"
#include "tools/bench.h"
#include "tools/limits.h"
#include "tools/print_plan.h"
#include "tools/text.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARGUMENTS_MAX 32
#define BLOCKS_DEPTH_MAX 256u
#define BYTES_DEFAULT (512 * FLAP_MIB)

static flap_status parse_backend(const flap_command *command, const char *text, flap_block_backend *backend_out) {
  if (strcmp(text, "auto") == 0)
    *backend_out = FLAP_BLOCK_AUTO;
  else if (strcmp(text, "io_uring") == 0)
    *backend_out = FLAP_BLOCK_URING;
  else if (strcmp(text, "threads") == 0)
    *backend_out = FLAP_BLOCK_THREADS;
  else
    return flap_arguments_error(command, "--backend: %.64s is none of auto, io_uring, threads", text);
  return FLAP_OK;
}

static flap_status parse_device(const flap_command *command, const char *text, flap_run_device *device_out) {
  if (strcmp(text, "cpu") == 0)
    *device_out = FLAP_RUN_DEVICE_CPU;
  else if (strcmp(text, "cuda") == 0)
    *device_out = FLAP_RUN_DEVICE_CUDA;
  else if (strcmp(text, "auto") == 0)
    *device_out = FLAP_RUN_DEVICE_AUTO;
  else
    return flap_arguments_error(command, "--device: %.64s is none of auto, cpu, cuda", text);
  return FLAP_OK;
}

/* ---- one measurement of a disk --------------------------------------------------------------------------- */

static flap_status print_disk_json(const char *path, uint64_t bytes, uint64_t request_bytes, uint32_t depth,
                                   const flap_block_rates *rates) {
  char text[FLAP_PATH_MAX]; /* JSON holds UTF-8 alone, and a path is any bytes */
  flap_limits_text(text, sizeof text, "%s", path);
  return flap_bench_print_json(
      json_pack("{s:s, s:I, s:I, s:i, s:f, s:f, s:f}", "path", text, "bytes", (json_int_t)bytes, "request_bytes",
                (json_int_t)request_bytes, "depth", (int)depth, "read_bytes_per_second", rates->read_bytes,
                "write_bytes_per_second", rates->write_bytes, "both_bytes_per_second", rates->both_bytes));
}

static flap_status measure_disk_once(const flap_command *command, const flap_bench_options *options) {
  const uint64_t request_bytes =
      options->request_bytes != FLAP_BENCH_NOT_GIVEN ? options->request_bytes : FLAP_BLOCK_REQUEST_BYTES_MAX;
  const uint32_t depth = options->depth == FLAP_BENCH_NO_DEPTH ? 0 : options->depth;
  uint64_t bytes = options->bytes != FLAP_BENCH_NOT_GIVEN ? options->bytes : BYTES_DEFAULT;
  if (request_bytes == 0 || request_bytes > FLAP_BLOCK_REQUEST_BYTES_MAX || request_bytes % FLAP_BLOCK_ALIGN != 0)
    return flap_arguments_error(command, "--request must be a multiple of 4 KiB, at most 4 MiB");
  if (depth > BLOCKS_DEPTH_MAX)
    return flap_arguments_error(command, "--depth: %u is more than %u", depth, BLOCKS_DEPTH_MAX);
  if (bytes < request_bytes)
    return flap_arguments_error(command, "--bytes must be at least one request, of 4 MiB unless --request says less");
  if (options->path_count > 1)
    return flap_arguments_error(command, "one measurement (--bytes, --request, --depth) takes one folder");
  bytes = bytes / request_bytes * request_bytes;
  const char *path = options->path_count > 0 ? options->paths[0] : ".";
  flap_block_rates rates;
  FLAP_TRY(flap_block_measure_rates(path, bytes, (uint32_t)request_bytes, depth, 0, options->backend, &rates));
  if (options->json)
    return print_disk_json(path, bytes, request_bytes, depth, &rates);
  printf("%s: %s in requests of %s\n", path, flap_text_bytes(bytes).text, flap_text_bytes(request_bytes).text);
  printf("read   %8.3f GB/s\nwrite  %8.3f GB/s\n", rates.read_bytes / 1e9, rates.write_bytes / 1e9);
  printf("both   %8.3f GB/s together, half of it each\n", rates.both_bytes / 1e9);
  return FLAP_OK;
}

/* ---- the rates of plans ---------------------------------------------------------------------------------- */

void flap_bench_print_machine(const flap_machine *machine, bool disks) {
  printf("%s\n", machine->name);
  printf("matmul, bfloat16        %10.1f GFLOP/s\n", machine->flops_bf16 / 1e9);
  printf("matmul, float32         %10.1f GFLOP/s\n", machine->flops_f32 / 1e9);
  printf("memory of the device    %10.2f GB/s\n", machine->device_bytes / 1e9);
  printf("host to device          %10.2f GB/s\n", machine->h2d_bytes / 1e9);
  printf("device to host          %10.2f GB/s\n", machine->d2h_bytes / 1e9);
  if (machine->h2d_both_bytes > 0)
    printf("both at once            %10.2f and %.2f GB/s\n", machine->h2d_both_bytes / 1e9,
           machine->d2h_both_bytes / 1e9);
  printf("memory of the host      %10.2f GB/s\n", machine->host_bytes / 1e9);
  if (machine->encode_bytes > 0)
    printf("page codec              %10.2f GB/s in, %.2f out, all cores but two\n", machine->encode_bytes / 1e9,
           machine->decode_bytes / 1e9);
  if (disks) {
    printf("disk, read              %10.2f GB/s\n", machine->disk_read_bytes / 1e9);
    printf("disk, write             %10.2f GB/s\n", machine->disk_write_bytes / 1e9);
    printf("disk, both at once      %10.2f GB/s together\n", machine->disk_both_bytes / 1e9);
  }
}

static flap_status bench_machine(const flap_command *command, const flap_bench_options *options) {
  flap_machine_profile profile;
  const char *path = options->path_count > 0 ? options->paths[0] : NULL;
  if (options->path_count > 1)
    return flap_arguments_error(command, "machine takes one folder; all takes several");
  FLAP_TRY(flap_engine_profile(options->device, options->threads, path, true, &profile));
  flap_machine machine;
  flap_machine_profile_rates(&profile, profile.disk_count, &machine);
  if (options->json)
    return flap_bench_print_json(flap_print_profile_json(&profile));
  flap_bench_print_machine(&machine, path != NULL);
  return FLAP_OK;
}

/* ---- limits ---------------------------------------------------------------------------------------------- */

static flap_status limits_disk(flap_limits *limits, const flap_bench_options *options) {
  const char *const here[] = {"."};
  return options->path_count > 0 ? flap_limits_disk(limits, options->paths, options->path_count, options->backend)
                                 : flap_limits_disk(limits, here, 1, options->backend);
}

static flap_status limits_host(flap_limits *limits, const flap_bench_options *options) {
  return flap_limits_host(limits, options->threads);
}

/* Without a GPU the record says why; here it also says what to do instead. */
static flap_status suggest(flap_status status, const char *what, const char *instead) {
  char reason[512];
  if (status != FLAP_UNSUPPORTED && status != FLAP_DEVICE && status != FLAP_NOT_FOUND)
    return status == FLAP_OK ? FLAP_OK : flap_error_prefix(status, "%s", what);
  (void)snprintf(reason, sizeof reason, "%s", flap_error_message());
  return flap_error_set(status, "%s: %s; %s", what, reason, instead);
}

static flap_status limits_gpu(flap_limits *limits, const flap_bench_options *options) {
  const bool cpu = options->device == FLAP_RUN_DEVICE_CPU;
  const flap_status status =
      flap_limits_gpu(limits, cpu ? FLAP_DEVICE_CPU : FLAP_DEVICE_CUDA, options->threads, options->vram_bytes);
  return suggest(status, "gpu", "device=cpu measures the same kernels on the processor");
}

static flap_status limits_pcie(flap_limits *limits, const flap_bench_options *options) {
  if (options->device == FLAP_RUN_DEVICE_CPU)
    return flap_error_set(FLAP_INVALID, "pcie: the cpu device has no bus: its copies are memcpy within memory, and "
                                        "flap bench host measures that");
  return suggest(flap_limits_pcie(limits, options->vram_bytes), "pcie",
                 "flap bench host measures what memory does without one");
}

static flap_status bench_limits(flap_status (*measure)(flap_limits *limits, const flap_bench_options *options),
                                const flap_bench_options *options) {
  flap_limits *limits = flap_limits_new(options->json ? NULL : stdout, options->quick);
  if (limits == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for the results");
  flap_status status = measure(limits, options);
  if (status == FLAP_OK && options->json)
    status = flap_bench_print_json(json_pack("{s:s, s:b, s:o}", "format", "flap limits 1", "quick", (int)limits->quick,
                                             "sections", flap_limits_json(limits)));
  free(limits);
  return status;
}

/* ---- the command ----------------------------------------------------------------------------------------- */

static flap_status dispatch(const flap_command *command, const char *what, const flap_bench_options *options) {
  const bool once = options->bytes != FLAP_BENCH_NOT_GIVEN || options->request_bytes != FLAP_BENCH_NOT_GIVEN ||
                    options->depth != FLAP_BENCH_NO_DEPTH;
  const bool all = strcmp(what, "all") == 0, disk = strcmp(what, "disk") == 0;
  if (!all && (options->html || options->profile || options->plan || options->force))
    return flap_arguments_error(command, "--html, --profile, --plan and --force are for bench all");
  if (!disk && once)
    return flap_arguments_error(command, "--bytes, --request and --depth are for bench disk");
  if (disk)
    return once ? measure_disk_once(command, options) : bench_limits(limits_disk, options);
  if (all)
    return flap_bench_all(options);
  if (strcmp(what, "machine") == 0)
    return bench_machine(command, options);
  if (strcmp(what, "host") == 0)
    return bench_limits(limits_host, options);
  if (strcmp(what, "gpu") == 0)
    return bench_limits(limits_gpu, options);
  if (strcmp(what, "pcie") == 0)
    return bench_limits(limits_pcie, options);
  return flap_arguments_error(command, "measure what? disk, pcie, host, gpu, all or machine");
}

/* What follows the first word: device=cpu and vram=2GiB, as in run.yaml, and folders. */
static flap_status take_words(const flap_command *command, const char *const *words, size_t count, const char **device,
                              flap_bench_options *options) {
  const bool folders = strcmp(words[0], "disk") == 0 || strcmp(words[0], "all") == 0;
  for (size_t i = 1; i < count; i++) {
    if (strncmp(words[i], "device=", 7) == 0) {
      *device = words[i] + 7;
    } else if (strncmp(words[i], "vram=", 5) == 0) {
      if (flap_units_parse_bytes(words[i] + 5, &options->vram_bytes) != FLAP_OK)
        return flap_error_prefix(FLAP_INVALID, "vram");
    } else if (!folders) {
      return flap_arguments_error(command, "%.64s: bench %.64s takes device= and vram= alone", words[i], words[0]);
    } else if (options->path_count == FLAP_RUN_DISKS_MAX) {
      return flap_arguments_error(command, "more than %d folders", FLAP_RUN_DISKS_MAX);
    } else {
      options->paths[options->path_count++] = words[i];
    }
  }
  return FLAP_OK;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  flap_bench_options bench = {
      .bytes = FLAP_BENCH_NOT_GIVEN, .request_bytes = FLAP_BENCH_NOT_GIVEN, .depth = FLAP_BENCH_NO_DEPTH};
  const char *backend = "auto", *device = "auto", *path = NULL;
  bool help = false;
  const flap_option options[] = {
      {"--quick", 0, FLAP_OPTION_FLAG, &bench.quick, "Fewer points and shorter rounds: seconds instead of a minute."},
      {"--json", 0, FLAP_OPTION_FLAG, &bench.json, "The figures as JSON; of machine, a file that `machine` can name."},
      {"--device", 0, FLAP_OPTION_TEXT, &device, "auto, cpu or cuda (default: auto). Also device=cpu."},
      {"--threads", 0, FLAP_OPTION_U32, &bench.threads, "Threads that compute, at most; 0 for all cores."},
      {"--vram", 0, FLAP_OPTION_BYTES, &bench.vram_bytes, "gpu, pcie, all: what to take (default: below 4GiB)."},
      {"--path", 0, FLAP_OPTION_TEXT, &path, "A folder on the disk, as the words after disk and all."},
      {"--backend", 0, FLAP_OPTION_TEXT, &backend, "disk, all: auto, io_uring or threads (default: auto)."},
      {"--bytes", 0, FLAP_OPTION_BYTES, &bench.bytes, "disk, once: how much to write and read (default: 512MiB)."},
      {"--request", 0, FLAP_OPTION_BYTES, &bench.request_bytes, "disk, once: bytes of a request (default: 4MiB)."},
      {"--depth", 0, FLAP_OPTION_U32, &bench.depth, "disk, once: requests in flight; 0 for the default."},
      {"--html", 0, FLAP_OPTION_TEXT, &bench.html, "all: also a page with plots, in this file."},
      {"--profile", 0, FLAP_OPTION_TEXT, &bench.profile, "all: where the profile goes (default: profile.json)."},
      {"--plan", 0, FLAP_OPTION_TEXT, &bench.plan, "all: a run.yaml whose lanes are shown beside the limits."},
      {"--force", 0, FLAP_OPTION_FLAG, &bench.force, "all: replace the profile and the page if they are there."},
  };
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count == 0)
    return flap_arguments_error(command, "measure what? disk, pcie, host, gpu, all or machine");
  if (bench.threads > FLAP_POOL_THREADS_MAX)
    return flap_arguments_error(command, "--threads: %u is more than %d", bench.threads, FLAP_POOL_THREADS_MAX);
  if (path)
    bench.paths[bench.path_count++] = path;
  FLAP_TRY(take_words(command, rest, count, &device, &bench));
  FLAP_TRY(parse_backend(command, backend, &bench.backend));
  FLAP_TRY(parse_device(command, device, &bench.device));
  return dispatch(command, rest[0], &bench);
}

const flap_command flap_command_bench = {
    .name = "bench",
    .usage = "disk [folder ...] | pcie | host | gpu | all [folder ...] | machine",
    .summary = "Measure what this machine can do: disks, bus, memory, kernels; for people, and for plans.",
    .details =
        "disk     reading and writing by size of request and by requests in flight; of several folders, each and all\n"
        "         together. With --bytes, --request or --depth: one measurement with these.\n"
        "pcie     copies between host and GPU by size, pinned and pageable, and what pinning takes\n"
        "host     memory by threads, and AdamW on the CPU beside it\n"
        "gpu      matrix products by shape, attention, copies and AdamW; device=cpu: the same on the processor\n"
        "all      all of these, within about a minute; writes a profile for `flap plan machine=`, and with --html a\n"
        "         page with plots\n"
        "machine  the rates that plans calculate with, in seconds; stores them for the plans that follow\n"
        "\n"
        "Figures are medians of several rounds; ± is half of the distance between the least and the most.",
    .run = run,
};
