#include "engine/planner/budgets.h"

#include "base/units.h"
#include "engine/machine/host_memory.h"
#include "engine/machine/machine_profile.h"
#include "io/block/block.h"
#include "kernels/device/device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define PROCESS_BYTES (96 * FLAP_MIB) /* without a device's driver */
#define DISK_MOST ((uint64_t)1 << 53) /* more than the pager can number; sums of all disks stay far from 2^64 */
#define DISK_UNIT (4 * FLAP_MIB)      /* the largest stripe: several disks that share what is needed get whole ones */

uint64_t flap_budgets_resident(void) {
  return flap_host_memory_kib(&FLAP_HOST_ROOTS, "self/status", "VmRSS:");
}

uint64_t flap_budgets_resident_peak(void) {
  return flap_host_memory_kib(&FLAP_HOST_ROOTS, "self/status", "VmHWM:");
}

uint64_t flap_budgets_process_more(const flap_machine *machine, bool described) {
  const uint64_t resident = described ? 0 : flap_budgets_resident(), whole = machine->process_bytes;
  return whole > resident + PROCESS_BYTES ? whole - resident : PROCESS_BYTES;
}

/* A tenth is left to others, or half a gigabyte, but never more than a quarter. */
static flap_status available_memory(const flap_run_config *config, const flap_machine *machine, bool pinned,
                                    uint64_t *bytes_out) {
  flap_host_memory memory = {.available_bytes = 0};
  uint64_t available;
  if (config->profile == NULL)
    flap_host_memory_read(&FLAP_HOST_ROOTS, &memory);
  available = config->profile != NULL ? config->profile->ram_bytes : flap_host_memory_left(&memory, pinned);
  if (available == FLAP_HOST_UNLIMITED)
    return flap_error_set(FLAP_BUDGET, "%s: max: this system does not say how much memory is free: give a size",
                          pinned || config->vram.kind != FLAP_SIZE_MAX ? "ram" : "vram");
  const uint64_t tenth = available / 10, quarter = available / 4;
  const uint64_t others = quarter < 512 * FLAP_MIB ? quarter : 512 * FLAP_MIB;
  const uint64_t reserve =
      (tenth > others ? tenth : others) + flap_budgets_process_more(machine, config->profile != NULL);
  *bytes_out = available > reserve ? available - reserve : 0;
  if (*bytes_out > 0 || config->profile != NULL)
    return FLAP_OK;
  char limit[320], text[FLAP_UNITS_TEXT_MAX];
  return flap_error_set(
      FLAP_BUDGET, "%s: max: %s leaves %s, which is too little for any run: end other programs, or raise that limit",
      pinned || config->vram.kind != FLAP_SIZE_MAX ? "ram" : "vram",
      flap_host_memory_limit_name(&memory, pinned, limit, sizeof limit),
      flap_units_format_bytes(available, text, sizeof text));
}

/* A card has its own memory; some of it is left for a display and for what the driver takes in passing. */
static flap_status resolve_card(const flap_run_config *config, const flap_machine *machine, flap_budgets *budgets) {
  budgets->vram_bytes = config->vram.kind == FLAP_SIZE_BYTES ? config->vram.bytes : FLAP_BUDGET_PLENTY;
  budgets->ram_bytes = config->ram.kind == FLAP_SIZE_BYTES ? config->ram.bytes : FLAP_BUDGET_PLENTY;
  if (config->vram.kind == FLAP_SIZE_MAX) {
    uint64_t most = config->profile != NULL ? config->profile->vram_bytes : 0;
    if (config->profile == NULL)
      FLAP_TRY(flap_device_budget_max(FLAP_DEVICE_CUDA, &most));
    const uint64_t reserve = most / 20 > 512 * FLAP_MIB ? most / 20 : 512 * FLAP_MIB;
    budgets->vram_bytes = most > reserve ? most - reserve : 0;
  }
  if (config->ram.kind == FLAP_SIZE_MAX)
    FLAP_TRY(available_memory(config, machine, true, &budgets->ram_bytes));
  return FLAP_OK;
}

/* On the cpu device both tiers come out of one memory. */
static flap_status resolve_memory(const flap_run_config *config, const flap_planner *planner, flap_budgets *budgets) {
  if (planner->spec.device == FLAP_DEVICE_CUDA)
    return resolve_card(config, planner->machine, budgets);
  const bool vram_max = config->vram.kind == FLAP_SIZE_MAX, ram_max = config->ram.kind == FLAP_SIZE_MAX;
  uint64_t available = 0;
  if (vram_max || ram_max)
    FLAP_TRY(available_memory(config, planner->machine, false, &available));
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

/* ---- disks ----------------------------------------------------------------------------------------------- */

static flap_status look_at_free(const flap_run_config *config, uint32_t index, uint64_t *bytes_out) {
  if (config->profile == NULL)
    return flap_block_space(config->disk[index].path, bytes_out);
  *bytes_out = config->profile->disks[index].bytes;
  return FLAP_OK;
}

/* Of what is free on its drive, less a reserve and the sizes that are given there, an equal part for each `max`. */
static uint64_t share_of_max(const flap_run_config *config, const flap_disk_set *disks, uint32_t index,
                             uint64_t free_bytes) {
  uint64_t taken = free_bytes / 20 > FLAP_GIB ? free_bytes / 20 : FLAP_GIB;
  uint32_t shares = 0;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    const flap_size *size = &config->disk[i].size;
    if (disks->disks[i].drive != disks->disks[index].drive)
      continue;
    shares += size->kind == FLAP_SIZE_MAX ? 1 : 0;
    if (size->kind == FLAP_SIZE_BYTES && !flap_units_add(taken, size->bytes, &taken))
      taken = UINT64_MAX;
  }
  return free_bytes > taken ? (free_bytes - taken) / shares : 0;
}

static flap_status resolve_disk(const flap_run_config *config, flap_disk_set *disks, uint32_t index,
                                uint64_t *bytes_out) {
  const flap_size *size = &config->disk[index].size;
  uint64_t free_bytes = 0;
  FLAP_TRY(look_at_free(config, index, &free_bytes));
  *bytes_out = size->kind == FLAP_SIZE_BYTES ? size->bytes : FLAP_BUDGET_PLENTY;
  if (size->kind == FLAP_SIZE_MAX)
    *bytes_out = share_of_max(config, disks, index, free_bytes);
  if (*bytes_out > DISK_MOST)
    *bytes_out = DISK_MOST;
  if (*bytes_out == 0)
    disks->disks[index].full = true;
  if (disks->disks[index].full)
    *bytes_out = 0;
  return FLAP_OK;
}

bool flap_budgets_full_disk(const flap_run_config *config, const flap_disk_set *disks,
                            char text_out[FLAP_BUDGETS_TEXT_MAX]) {
  for (uint32_t i = 0; i < disks->count; i++) {
    char free_text[FLAP_UNITS_TEXT_MAX];
    uint64_t free_bytes = 0;
    if (!disks->disks[i].full)
      continue;
    if (look_at_free(config, i, &free_bytes) != FLAP_OK)
      flap_error_clear();
    (void)snprintf(text_out, FLAP_BUDGETS_TEXT_MAX, "disk %s is not used, for only %s are free there%s",
                   config->disk[i].path, flap_units_format_bytes(free_bytes, free_text, sizeof free_text),
                   config->disk[i].size.kind == FLAP_SIZE_MAX ? ", of which max leaves 1 GiB or more" : "");
    return true;
  }
  return false;
}

uint64_t flap_budgets_disk(const flap_planner *planner, const flap_budgets *budgets) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < planner->spec.disk_count; i++)
    sum += budgets->disk_bytes[i];
  return sum;
}

static bool is_min_of(const flap_run_config *config, const flap_disk_set *disks, uint32_t index) {
  return config->disk[index].size.kind == FLAP_SIZE_MIN && !disks->disks[index].full;
}

/* What is needed beyond the disks of a given size, shared by those that are `min` as their weights are. */
static flap_status shrink_disks(const flap_run_config *config, const flap_planner *planner, const flap_disk_set *disks,
                                flap_budgets *budgets) {
  const uint64_t *weights = planner->spec.disk_weights;
  uint64_t needed = 0, given = 0;
  double weight_sum = 0;
  uint32_t shares = 0;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    const bool is_min = is_min_of(config, disks, i);
    shares += is_min ? 1 : 0;
    weight_sum += is_min ? (double)weights[i] : 0;
    given += is_min ? 0 : budgets->disk_bytes[i];
  }
  if (shares == 0)
    return FLAP_OK;
  FLAP_TRY(flap_planner_disk_min(planner, budgets, &needed));
  const uint64_t missing = needed > given ? needed - given : 0;
  for (uint32_t i = 0; i < config->disk_count; i++) {
    if (!is_min_of(config, disks, i))
      continue;
    const double part = weight_sum > 0 ? (double)weights[i] / weight_sum : 1.0 / shares;
    uint64_t share = shares == 1 ? missing : (uint64_t)ceil((double)missing * part);
    if (shares > 1 || given > 0)
      share = flap_units_round_up(share, DISK_UNIT) + DISK_UNIT;
    budgets->disk_bytes[i] = share > 0 ? share : DISK_UNIT;
  }
  return FLAP_OK;
}

flap_status flap_budgets_resolve(const flap_run_config *config, const flap_planner *planner, flap_disk_set *disks,
                                 flap_budgets *budgets_out) {
  memset(budgets_out, 0, sizeof *budgets_out);
  FLAP_TRY(resolve_memory(config, planner, budgets_out));
  budgets_out->vram_given_bytes = config->vram.kind == FLAP_SIZE_BYTES ? config->vram.bytes : 0;
  budgets_out->vram_bytes = budgets_out->vram_bytes / FLAP_BLOCK_ALIGN * FLAP_BLOCK_ALIGN;
  for (uint32_t i = 0; i < config->disk_count; i++)
    FLAP_TRY(resolve_disk(config, disks, i, &budgets_out->disk_bytes[i]));
  if (config->vram.kind == FLAP_SIZE_MIN)
    FLAP_TRY(flap_planner_vram_min(planner, budgets_out, &budgets_out->vram_bytes));
  if (config->ram.kind == FLAP_SIZE_MIN)
    FLAP_TRY(flap_planner_ram_min(planner, budgets_out, &budgets_out->ram_bytes));
  return shrink_disks(config, planner, disks, budgets_out);
}
