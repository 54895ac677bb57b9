/* The disks: by size of request, by number of requests in flight; reading, writing, both. */
#include "tools/limits.h"

#include "base/units.h"
#include "io/block/measure.h"
#include "tools/text.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define EXTENT_BYTES (512 * FLAP_MIB)
#define EXTENT_BYTES_QUICK (64 * FLAP_MIB)
#define FLIGHT_BYTES (64 * FLAP_MIB)
#define FLIGHT_BYTES_QUICK (32 * FLAP_MIB)
#define DEPTH_OF_SIZES 16u
#define DEPTH_OF_SIZES_QUICK 8u
#define REQUEST_OF_DEPTHS (256 * FLAP_KIB) /* FLAP's pages have about this size: smaller or larger with the budgets */
#define REQUEST_LEAST (16 * FLAP_KIB)

typedef struct disk_job {
  flap_limits *limits;
  flap_block_probe *probe;
  const char *place; /* "/mnt/nvme", "3 disks together" */
  uint32_t number;   /* of the folder; 0: all together */
  uint64_t extent_bytes;
  flap_rate_effort effort;
} disk_job;

static flap_status measure_row(disk_job *job, flap_limits_row *row, uint64_t request_bytes, uint32_t depth) {
  for (int mix = FLAP_BLOCK_MIX_READ; mix <= FLAP_BLOCK_MIX_BOTH; mix++)
    FLAP_TRY(flap_block_probe_measure(job->probe, (flap_block_mix)mix, (uint32_t)request_bytes, depth, &job->effort,
                                      &row->cells[mix]));
  return FLAP_OK;
}

static flap_limits_section *begin(disk_job *job, const char *what, const char *x_name) {
  char key[48];
  if (job->number > 0)
    (void)snprintf(key, sizeof key, "disk_%s_%u", what, job->number);
  else
    (void)snprintf(key, sizeof key, "disk_%s_together", what);
  flap_limits_section *section =
      flap_limits_begin(job->limits, "disk", key, FLAP_LIMITS_LOG, FLAP_LIMITS_BYTES, x_name);
  flap_limits_series(section, "read");
  flap_limits_series(section, "write");
  flap_limits_series(section, "half each");
  return section;
}

static flap_status by_size(disk_job *job) {
  const uint32_t depth = job->limits->quick ? DEPTH_OF_SIZES_QUICK : DEPTH_OF_SIZES;
  flap_limits_section *section = begin(job, "request_bytes", "request");
  flap_limits_text(section->title, sizeof section->title, "%s %.100s, by size of request",
                   job->number > 0 ? "Disk" : "Disks,", job->place);
  flap_limits_text(
      section->note, sizeof section->note,
      "%u requests in flight on each disk, forward through an extent of %s that was written before; %s; of "
      "both, the sum.",
      depth, flap_text_bytes(job->extent_bytes).text, flap_block_probe_describe(job->probe));
  for (uint64_t bytes = REQUEST_LEAST; bytes <= FLAP_BLOCK_REQUEST_BYTES_MAX; bytes *= job->limits->quick ? 16 : 2)
    FLAP_TRY(measure_row(job, flap_limits_row_bytes(section, bytes), bytes, depth));
  flap_limits_end(job->limits, section);
  return FLAP_OK;
}

static flap_status by_depth(disk_job *job) {
  flap_limits_section *section = begin(job, "depth", "in flight");
  flap_limits_text(section->title, sizeof section->title, "%s %.100s, by requests in flight",
                   job->number > 0 ? "Disk" : "Disks,", job->place);
  flap_limits_text(section->note, sizeof section->note, "Requests of %s; the rest as above.",
                   flap_text_bytes(REQUEST_OF_DEPTHS).text);
  for (uint32_t depth = 1; depth <= FLAP_BLOCK_PROBE_DEPTH_MAX; depth *= job->limits->quick ? 4 : 2)
    FLAP_TRY(measure_row(job, flap_limits_row_add(section, depth, "%u", depth), REQUEST_OF_DEPTHS, depth));
  flap_limits_end(job->limits, section);
  return FLAP_OK;
}

static flap_status measure_place(disk_job *job, const char *const *paths, uint32_t count, flap_block_backend backend) {
  const bool quick = job->limits->quick;
  flap_block_probe_config config = {.backend = backend,
                                    .disk_count = count,
                                    .bytes = job->extent_bytes,
                                    .depth_max = FLAP_BLOCK_PROBE_DEPTH_MAX,
                                    .flight_bytes = quick ? FLIGHT_BYTES_QUICK : FLIGHT_BYTES};
  memcpy(config.paths, paths, count * sizeof *paths);
  FLAP_TRY(flap_block_probe_open(&config, &job->probe));
  flap_status status = by_size(job);
  if (status == FLAP_OK)
    status = by_depth(job);
  flap_block_probe_close(job->probe);
  return status;
}

flap_status flap_limits_disk(flap_limits *limits, const char *const *paths, uint32_t path_count,
                             flap_block_backend backend) {
  char together[32], real[PATH_MAX];
  disk_job job = {.limits = limits, .extent_bytes = limits->quick ? EXTENT_BYTES_QUICK : EXTENT_BYTES};
  job.effort = limits->effort;
  for (uint32_t i = 0; i < path_count; i++)
    FLAP_TRY(flap_block_probe_check(paths[i]));
  for (uint32_t i = 0; i < path_count; i++) {
    job.place = realpath(paths[i], real) != NULL ? real : paths[i];
    job.number = i + 1;
    FLAP_TRY(measure_place(&job, &paths[i], 1, backend));
  }
  if (path_count < 2)
    return FLAP_OK;
  (void)snprintf(together, sizeof together, "%u together", path_count);
  job.place = together;
  job.number = 0;
  return measure_place(&job, paths, path_count, backend);
}
