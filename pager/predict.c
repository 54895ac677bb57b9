/* The bytes that a program moves, from its leases alone. Nothing here looks at how the pager does it. */
#include "pager/pager_internal.h"

#include "base/assert.h"

const char *flap_pager_lane_name(flap_lane lane) {
  static const char *const names[FLAP_LANE_COUNT] = {"h2d", "d2h", "disk_read", "disk_write", "host"};
  flap_assert((unsigned)lane < FLAP_LANE_COUNT);
  return names[lane];
}

/* Whether the region is there from an earlier lease, and no job has changed it since. */
static bool is_kept(const flap_lease *leases, uint32_t index) {
  for (uint32_t i = index; i-- > 0;)
    if (leases[i].region == leases[index].region)
      return leases[i].host_bytes == 0;
  return false;
}

void flap_pager_predict(const flap_pager_config *config, const flap_lease *leases, uint32_t count,
                        uint64_t bytes_out[FLAP_LANE_COUNT]) {
  flap_pager_predict_part(config, leases, 0, count, bytes_out);
}

void flap_pager_predict_part(const flap_pager_config *config, const flap_lease *leases, uint32_t first, uint32_t end,
                             uint64_t bytes_out[FLAP_LANE_COUNT]) {
  for (int i = 0; i < FLAP_LANE_COUNT; i++)
    bytes_out[i] = 0;
  for (uint32_t i = first; i < end; i++) {
    flap_assert(leases[i].region < config->region_count);
    const flap_pager_region *region = &config->regions[leases[i].region];
    if (region->ring == FLAP_PAGER_RESIDENT)
      continue;
    if (leases[i].host_bytes > 0) {
      bytes_out[FLAP_LANE_HOST] += pager_job_bytes(&leases[i]);
      continue;
    }
    if (config->rings[region->ring].keeps && is_kept(leases, i))
      continue;
    uint64_t disk = pager_disk_bytes(config->page_bytes, region->bytes, region->ram_pages);
    if (pager_loads(leases[i].mode)) {
      bytes_out[FLAP_LANE_H2D] += region->bytes;
      bytes_out[FLAP_LANE_DISK_READ] += disk;
    }
    if (pager_stores(leases[i].mode)) {
      bytes_out[FLAP_LANE_D2H] += region->bytes;
      bytes_out[FLAP_LANE_DISK_WRITE] += disk;
    }
  }
}
