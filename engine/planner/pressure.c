#include "engine/planner/pressure.h"

#include "base/assert.h"
#include "base/units.h"
#include "engine/machine/machine_profile.h"
#include "engine/planner/budgets.h"
#include "io/block/block.h"

#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#define LIMIT_BYTES 320

static bool is_card(const flap_prepared *p) {
  return p->planner.spec.device == FLAP_DEVICE_CUDA;
}

static uint64_t taken(const flap_prepared *p, const flap_setup *setup) {
  return setup->ram_bytes + (is_card(p) ? 0 : setup->vram_bytes);
}

/* What a run may take here, less what the process takes beside its budgets. */
static uint64_t room_in(const flap_prepared *p, const flap_host_memory *memory) {
  flap_host_memory with_swap = *memory;
  if (!is_card(p) && /* pinned memory is never swapped */
      !flap_units_add(memory->available_bytes, memory->swap_bytes, &with_swap.available_bytes))
    with_swap.available_bytes = FLAP_HOST_UNLIMITED;
  const uint64_t left = flap_host_memory_left(&with_swap, is_card(p));
  const uint64_t process = flap_budgets_process_more(&p->machine, p->config->profile != NULL);
  return left > process ? left - process : 0;
}

/* A plan that these budgets give, and that there is room for. */
static bool works(const flap_prepared *p, const flap_budgets *trial, uint64_t room) {
  flap_setup setup;
  flap_plan_costs costs;
  flap_planner planner = p->planner;
  planner.quick = true;
  if (flap_planner_choose(&planner, trial, &setup, &costs) != FLAP_OK) {
    flap_error_clear();
    return false;
  }
  const bool fits = taken(p, &setup) <= room;
  flap_setup_close(&setup);
  return fits;
}

/* Budgets that work in so much room: first with another ram alone, then, where vram is of the same memory, with half
 * for each. "" when neither does. */
static void find_budgets(const flap_prepared *p, uint64_t room, char text[LIMIT_BYTES]) {
  flap_budgets trial = p->budgets;
  text[0] = '\0';
  trial.ram_bytes = is_card(p) ? room : room > p->setup.vram_bytes ? room - p->setup.vram_bytes : 0;
  if (!is_card(p) && trial.vram_bytes > p->setup.vram_bytes)
    trial.vram_bytes = p->setup.vram_bytes;
  const bool vram_too = trial.vram_bytes != p->budgets.vram_bytes;
  if (trial.ram_bytes > 0 && works(p, &trial, room)) {
    if (vram_too)
      (void)snprintf(text, LIMIT_BYTES, "vram=%llu ram=%llu works", (unsigned long long)trial.vram_bytes,
                     (unsigned long long)trial.ram_bytes);
    else
      (void)snprintf(text, LIMIT_BYTES, "ram=%llu works", (unsigned long long)trial.ram_bytes);
    return;
  }
  trial.ram_bytes = trial.vram_bytes = room / 2 / FLAP_BLOCK_ALIGN * FLAP_BLOCK_ALIGN;
  if (!is_card(p) && works(p, &trial, room))
    (void)snprintf(text, LIMIT_BYTES, "vram=%llu ram=%llu works", (unsigned long long)trial.vram_bytes,
                   (unsigned long long)trial.ram_bytes);
}

static const char *limit_name(const flap_prepared *p, const flap_host_memory *memory, char text[LIMIT_BYTES]) {
  if (p->config->profile == NULL)
    return flap_host_memory_limit_name(memory, is_card(p), text, LIMIT_BYTES);
  (void)snprintf(text, LIMIT_BYTES, "the machine \"%s\"", p->machine.name);
  return text;
}

flap_status flap_pressure_check(const flap_prepared *p, const flap_host_memory *memory) {
  const uint64_t room = room_in(p, memory), wanted = taken(p, &p->setup);
  char limit[LIMIT_BYTES], budgets[LIMIT_BYTES], wanted_text[FLAP_UNITS_TEXT_MAX], room_text[FLAP_UNITS_TEXT_MAX];
  flap_assert(p->has_setup);
  if (wanted <= room)
    return FLAP_OK;
  find_budgets(p, room, budgets);
  (void)flap_units_format_bytes(wanted, wanted_text, sizeof wanted_text);
  (void)flap_units_format_bytes(room, room_text, sizeof room_text);
  return flap_error_set(FLAP_BUDGET, "%s: this run takes %s of the host's memory, but %s leaves %s: %s",
                        is_card(p) ? "ram" : "vram and ram", wanted_text, limit_name(p, memory, limit), room_text,
                        budgets[0] ? budgets
                                   : "no budgets work there: end other programs, raise that limit, or take "
                                     "more from disk (vram: min, ram: min) or a smaller micro-batch");
}

flap_status flap_pressure_check_here(const flap_prepared *p) {
  flap_host_memory memory = {
      .group_bytes = FLAP_HOST_UNLIMITED, .address_bytes = FLAP_HOST_UNLIMITED, .pinned_bytes = FLAP_HOST_UNLIMITED};
  if (p->config->profile != NULL)
    memory.total_bytes = memory.available_bytes = p->config->profile->ram_bytes;
  else
    flap_host_memory_read(&FLAP_HOST_ROOTS, &memory);
  return flap_pressure_check(p, &memory);
}

/* ---- disks ------------------------------------------------------------------------------------------------- */

static flap_status refuse_disk(const char *path, uint64_t wanted_bytes, const char *there_is, uint64_t there_bytes,
                               const char *what_to_do) {
  char wanted[FLAP_UNITS_TEXT_MAX], there[FLAP_UNITS_TEXT_MAX];
  return flap_error_set(FLAP_NO_SPACE, "disk %s: a run would take %s there, but %s %s: %s", path,
                        flap_units_format_bytes(wanted_bytes, wanted, sizeof wanted), there_is,
                        flap_units_format_bytes(there_bytes, there, sizeof there), what_to_do);
}

/* What one process may write into a file, which is what each disk has. */
static uint64_t file_bytes_max(const flap_prepared *p) {
  struct rlimit limit;
  if (p->config->profile != NULL || getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
    return UINT64_MAX;
  return limit.rlim_cur;
}

flap_status flap_pressure_check_disks(const flap_prepared *p) {
  const flap_machine_profile *profile = p->config->profile;
  const uint64_t file_max = file_bytes_max(p);
  uint64_t share[FLAP_RUN_DISKS_MAX], on_drive[FLAP_RUN_DISKS_MAX] = {0};
  flap_assert(p->has_setup);
  if (p->setup.sizes.disk_bytes == 0)
    return FLAP_OK;
  flap_prepare_share_of_disks(p, share);
  for (uint32_t i = 0; i < p->disks.count; i++) {
    const char *path = p->planner.spec.disk_paths[i];
    uint64_t *wanted = &on_drive[p->disks.disks[i].drive], there = 0;
    *wanted += share[i];
    if (share[i] == 0)
      continue;
    if (share[i] > file_max)
      return refuse_disk(path, share[i], "files may not be larger than", file_max, "raise the limit (ulimit -f)");
    if (profile != NULL)
      there = profile->disks[i].bytes;
    else
      FLAP_TRY(flap_block_space(path, &there));
    if (*wanted > there)
      return refuse_disk(path, *wanted,
                         profile != NULL       ? "that machine's disk has"
                         : *wanted == share[i] ? "what is free is"
                                               : "what is free on that drive, for all disks there, is",
                         there, "free some, give vram or ram more, or add another disk");
  }
  return FLAP_OK;
}

void flap_pressure_warn_of_buffers(const flap_prepared *p) {
  flap_block_config disk;
  if (p->config->profile != NULL || p->setup.sizes.disk_bytes == 0)
    return;
  flap_setup_block_config(&p->setup, &disk);
  disk.memory_bytes = p->setup.sizes.staging_bytes;
  flap_block_check_memory(&disk);
}
