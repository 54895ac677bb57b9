#include "engine/planner/budgets.h"

#include "base/units.h"
#include "engine/machine/host_memory.h"
#include "engine/machine/machine_cuda.h"
#include "engine/machine/machine_profile.h"
#include "io/block/block.h"

#include <math.h>
#include <string.h>

#define DISK_UNIT (4 * FLAP_MIB) /* the largest stripe: several disks that share what is needed get whole ones */

uint64_t flap_budgets_resident(void) {
  return flap_host_memory_kib(&FLAP_HOST_ROOTS, "self/status", "VmRSS:");
}

uint64_t flap_budgets_resident_peak(void) {
  return flap_host_memory_kib(&FLAP_HOST_ROOTS, "self/status", "VmHWM:");
}

static uint64_t available_memory(const flap_run_config *config, bool pinned) {
  const uint64_t available = config->profile != NULL ? config->profile->ram_bytes : flap_host_memory_free(pinned);
  uint64_t reserve = available / 10;
  if (reserve < 512 * FLAP_MIB)
    reserve = 512 * FLAP_MIB;
  reserve += FLAP_BUDGETS_PROCESS_BYTES;
  return available > reserve ? available - reserve : 0;
}

/* A card has its own memory; some of it is left for a display and for what the driver takes in passing. */
static flap_status resolve_card(const flap_run_config *config, flap_budgets *budgets) {
  budgets->vram_bytes = config->vram.kind == FLAP_SIZE_BYTES ? config->vram.bytes : FLAP_BUDGET_PLENTY;
  budgets->ram_bytes = config->ram.kind == FLAP_SIZE_BYTES ? config->ram.bytes : FLAP_BUDGET_PLENTY;
  if (config->vram.kind == FLAP_SIZE_MAX) {
    uint64_t free_bytes = config->profile != NULL ? config->profile->vram_bytes : 0;
    if (config->profile == NULL)
      FLAP_TRY(flap_machine_cuda_free(&free_bytes));
    const uint64_t reserve = free_bytes / 20 > 512 * FLAP_MIB ? free_bytes / 20 : 512 * FLAP_MIB;
    budgets->vram_bytes = free_bytes > reserve ? free_bytes - reserve : 0;
  }
  if (config->ram.kind == FLAP_SIZE_MAX)
    budgets->ram_bytes = available_memory(config, true);
  return FLAP_OK;
}

/* On the cpu device both tiers come out of one memory. */
static flap_status resolve_memory(const flap_run_config *config, flap_device_kind device, flap_budgets *budgets) {
  if (device == FLAP_DEVICE_CUDA)
    return resolve_card(config, budgets);
  const bool vram_max = config->vram.kind == FLAP_SIZE_MAX, ram_max = config->ram.kind == FLAP_SIZE_MAX;
  uint64_t available = vram_max || ram_max ? available_memory(config, false) : 0;
  budgets->vram_bytes = config->vram.kind == FLAP_SIZE_BYTES ? config->vram.bytes : FLAP_BUDGET_PLENTY;
  budgets->ram_bytes = config->ram.kind == FLAP_SIZE_BYTES ? config->ram.bytes : FLAP_BUDGET_PLENTY;
  if (vram_max && ram_max) {
    budgets->vram_bytes = budgets->ram_bytes = available / 2;
  } else if (vram_max || ram_max) {
    const uint64_t other = vram_max ? budgets->ram_bytes : budgets->vram_bytes;
    const uint64_t taken = other == FLAP_BUDGET_PLENTY ? available / 4 : other;
    const uint64_t left = available > taken ? available - taken : 0;
    if (left == 0)
      return flap_error_set(FLAP_BUDGET, "%s: max: %llu bytes for the other tier leave nothing of the %llu available",
                            vram_max ? "vram" : "ram", (unsigned long long)taken, (unsigned long long)available);
    *(vram_max ? &budgets->vram_bytes : &budgets->ram_bytes) = left;
  }
  return FLAP_OK;
}

static flap_status resolve_disk(const flap_run_config *config, uint32_t index, uint64_t *bytes_out) {
  const flap_run_disk *disk = &config->disk[index];
  uint64_t free_bytes = config->profile != NULL ? config->profile->disks[index].bytes : 0;
  if (config->profile == NULL)
    FLAP_TRY(flap_block_space(disk->path, &free_bytes));
  if (disk->size.kind == FLAP_SIZE_BYTES) {
    *bytes_out = disk->size.bytes;
    return FLAP_OK;
  }
  if (disk->size.kind == FLAP_SIZE_MIN) {
    *bytes_out = FLAP_BUDGET_PLENTY;
    return FLAP_OK;
  }
  uint64_t reserve = free_bytes / 20;
  if (reserve < FLAP_GIB)
    reserve = FLAP_GIB;
  if (free_bytes <= reserve)
    return flap_error_set(
        FLAP_NO_SPACE,
        "disk: %s: max: %llu bytes are free, no more than the reserve of %llu: free some, or give a size", disk->path,
        (unsigned long long)free_bytes, (unsigned long long)reserve);
  *bytes_out = free_bytes - reserve;
  return FLAP_OK;
}

uint64_t flap_budgets_disk(const flap_planner *planner, const flap_budgets *budgets) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < planner->spec.disk_count; i++)
    sum += budgets->disk_bytes[i];
  return sum;
}

/* What is needed beyond the disks of a given size, shared by those that are `min` as their weights are. */
static flap_status shrink_disks(const flap_run_config *config, const flap_planner *planner, flap_budgets *budgets) {
  const uint64_t *weights = planner->spec.disk_weights;
  uint64_t needed = 0, given = 0;
  double weight_sum = 0;
  uint32_t shares = 0;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    const bool is_min = config->disk[i].size.kind == FLAP_SIZE_MIN;
    shares += is_min ? 1 : 0;
    weight_sum += is_min ? (double)weights[i] : 0;
    given += is_min ? 0 : budgets->disk_bytes[i];
  }
  if (shares == 0)
    return FLAP_OK;
  FLAP_TRY(flap_planner_disk_min(planner, budgets, &needed));
  const uint64_t missing = needed > given ? needed - given : 0;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    if (config->disk[i].size.kind != FLAP_SIZE_MIN)
      continue;
    const double part = weight_sum > 0 ? (double)weights[i] / weight_sum : 1.0 / shares;
    uint64_t share = shares == 1 ? missing : (uint64_t)ceil((double)missing * part);
    if (shares > 1 || given > 0)
      share = flap_units_round_up(share, DISK_UNIT) + DISK_UNIT;
    budgets->disk_bytes[i] = share > 0 ? share : DISK_UNIT;
  }
  return FLAP_OK;
}

flap_status flap_budgets_resolve(const flap_run_config *config, const flap_planner *planner,
                                 flap_budgets *budgets_out) {
  memset(budgets_out, 0, sizeof *budgets_out);
  FLAP_TRY(resolve_memory(config, planner->spec.device, budgets_out));
  budgets_out->vram_given_bytes = config->vram.kind == FLAP_SIZE_BYTES ? config->vram.bytes : 0;
  budgets_out->vram_bytes = budgets_out->vram_bytes / FLAP_BLOCK_ALIGN * FLAP_BLOCK_ALIGN;
  for (uint32_t i = 0; i < config->disk_count; i++)
    FLAP_TRY(resolve_disk(config, i, &budgets_out->disk_bytes[i]));
  if (config->vram.kind == FLAP_SIZE_MIN)
    FLAP_TRY(flap_planner_vram_min(planner, budgets_out, &budgets_out->vram_bytes));
  if (config->ram.kind == FLAP_SIZE_MIN)
    FLAP_TRY(flap_planner_ram_min(planner, budgets_out, &budgets_out->ram_bytes));
  return shrink_disks(config, planner, budgets_out);
}
