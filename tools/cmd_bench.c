/* flap bench: what this machine can do, measured through FLAP's own code. */
#include "base/units.h"
#include "engine/engine.h"
#include "io/block/measure.h"
#include "tools/arguments.h"
#include "tools/print_plan.h"
#include "tools/text.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#define ARGUMENTS_MAX 32
#define BLOCKS_DEPTH_MAX 256u

typedef struct bench_options {
  const char *path, *backend, *device;
  uint64_t bytes, request_bytes;
  uint32_t depth, threads;
  bool json;
} bench_options;

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

static flap_status bench_disk(const flap_command *command, const bench_options *options) {
  flap_block_backend backend = FLAP_BLOCK_AUTO;
  FLAP_TRY(parse_backend(command, options->backend, &backend));
  if (options->request_bytes == 0 || options->request_bytes > FLAP_BLOCK_REQUEST_BYTES_MAX ||
      options->request_bytes % FLAP_BLOCK_ALIGN != 0)
    return flap_arguments_error(command, "--request must be a multiple of 4 KiB, at most 4 MiB");
  if (options->depth > BLOCKS_DEPTH_MAX)
    return flap_arguments_error(command, "--depth: %u is more than %u", options->depth, BLOCKS_DEPTH_MAX);
  if (options->bytes < options->request_bytes)
    return flap_arguments_error(command, "--bytes must be at least one request");
  uint64_t bytes = options->bytes / options->request_bytes * options->request_bytes;
  const char *path = options->path ? options->path : ".";
  flap_block_rates rates;
  FLAP_TRY(flap_block_measure_rates(path, bytes, (uint32_t)options->request_bytes, options->depth, backend, &rates));
  if (options->json) {
    json_t *object = json_pack("{s:s, s:I, s:I, s:i, s:f, s:f, s:f}", "path", path, "bytes", (json_int_t)bytes,
                               "request_bytes", (json_int_t)options->request_bytes, "depth", (int)options->depth,
                               "read_bytes_per_second", rates.read_bytes, "write_bytes_per_second", rates.write_bytes,
                               "both_bytes_per_second", rates.both_bytes);
    if (!object)
      return flap_error_set(FLAP_INVALID, "%s: not UTF-8, which JSON needs", path);
    (void)json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    json_decref(object);
    putchar('\n');
    return FLAP_OK;
  }
  printf("%s: %s in requests of %s\n", path, flap_text_bytes(bytes).text, flap_text_bytes(options->request_bytes).text);
  printf("read   %8.3f GB/s\nwrite  %8.3f GB/s\n", rates.read_bytes / 1e9, rates.write_bytes / 1e9);
  printf("both   %8.3f GB/s together, half of it each\n", rates.both_bytes / 1e9);
  return FLAP_OK;
}

static flap_status bench_machine(const flap_command *command, const bench_options *options) {
  flap_run_device device = FLAP_RUN_DEVICE_AUTO;
  if (strcmp(options->device, "cpu") == 0)
    device = FLAP_RUN_DEVICE_CPU;
  else if (strcmp(options->device, "cuda") == 0)
    device = FLAP_RUN_DEVICE_CUDA;
  else if (strcmp(options->device, "auto") != 0)
    return flap_arguments_error(command, "--device: %.64s is none of auto, cpu, cuda", options->device);
  flap_machine_profile profile;
  FLAP_TRY(flap_engine_profile(device, options->threads, options->path, true, &profile));
  flap_machine machine;
  flap_machine_profile_rates(&profile, profile.disk_count, &machine);
  if (options->json) {
    json_t *object = flap_print_profile_json(&profile);
    (void)json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    json_decref(object);
    putchar('\n');
    return FLAP_OK;
  }
  printf("%s\n", machine.name);
  printf("matmul, bfloat16        %10.1f GFLOP/s\n", machine.flops_bf16 / 1e9);
  printf("matmul, float32         %10.1f GFLOP/s\n", machine.flops_f32 / 1e9);
  printf("memory of the device    %10.2f GB/s\n", machine.device_bytes / 1e9);
  printf("host to device          %10.2f GB/s\n", machine.h2d_bytes / 1e9);
  printf("device to host          %10.2f GB/s\n", machine.d2h_bytes / 1e9);
  if (machine.h2d_both_bytes > 0)
    printf("both at once            %10.2f and %.2f GB/s\n", machine.h2d_both_bytes / 1e9,
           machine.d2h_both_bytes / 1e9);
  printf("memory of the host      %10.2f GB/s\n", machine.host_bytes / 1e9);
  if (options->path) {
    printf("disk, read              %10.2f GB/s\n", machine.disk_read_bytes / 1e9);
    printf("disk, write             %10.2f GB/s\n", machine.disk_write_bytes / 1e9);
    printf("disk, both at once      %10.2f GB/s together\n", machine.disk_both_bytes / 1e9);
  }
  return FLAP_OK;
}

static flap_status run(const flap_command *command, int argc, char **argv) {
  bench_options bench = {
      .backend = "auto", .device = "auto", .bytes = 512 * FLAP_MIB, .request_bytes = FLAP_BLOCK_REQUEST_BYTES_MAX};
  bool help = false;
  const flap_option options[] = {
      {"--path", 0, FLAP_OPTION_TEXT, &bench.path, "A folder on the disk (bench disk: the current one by default)."},
      {"--bytes", 0, FLAP_OPTION_BYTES, &bench.bytes, "disk: how much to write and read (default: 512MiB)."},
      {"--request", 0, FLAP_OPTION_BYTES, &bench.request_bytes, "disk: bytes of a request (default: 4MiB)."},
      {"--depth", 0, FLAP_OPTION_U32, &bench.depth, "disk: requests in flight; 0 for the default."},
      {"--backend", 0, FLAP_OPTION_TEXT, &bench.backend, "disk: auto, io_uring or threads (default: auto)."},
      {"--device", 0, FLAP_OPTION_TEXT, &bench.device, "machine: auto, cpu or cuda (default: auto)."},
      {"--threads", 0, FLAP_OPTION_U32, &bench.threads, "machine: threads that compute; 0 for all cores."},
      {"--json", 0, FLAP_OPTION_FLAG, &bench.json,
       "Print the figures as JSON; of the machine, a file that `machine` can name."},
  };
  const char *rest[ARGUMENTS_MAX];
  size_t count = 0;
  if (argc > ARGUMENTS_MAX)
    return flap_arguments_error(command, "more than %d arguments", ARGUMENTS_MAX);
  FLAP_TRY(flap_arguments_parse(command, options, sizeof options / sizeof options[0], argc, argv, rest, &count, &help));
  if (help)
    return FLAP_OK;
  if (count == 1 && strcmp(rest[0], "disk") == 0)
    return bench_disk(command, &bench);
  if (count == 1 && strcmp(rest[0], "machine") == 0)
    return bench_machine(command, &bench);
  return flap_arguments_error(command, "measure what? disk or machine");
}

const flap_command flap_command_bench = {
    .name = "bench",
    .usage = "disk | machine",
    .summary = "Measure the disk, or the rates of the machine that plans calculate with.",
    .details = "`bench machine` also stores what it measured, for the plans that follow.",
    .run = run,
};
