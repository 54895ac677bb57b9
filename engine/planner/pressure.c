#include "engine/planner/pressure.h"

#include "base/assert.h"
#include "base/units.h"
#include "engine/planner/budgets.h"

#include <stdio.h>
#include <string.h>

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
  if (!is_card(p)) /* pinned memory is never swapped */
    with_swap.available_bytes += memory->swap_bytes;
  const uint64_t left = flap_host_memory_left(&with_swap, is_card(p));
  const uint64_t process = flap_budgets_process_more(&p->machine, false);
  return left > process ? left - process : 0;
}

/* A plan that these budgets give, and that there is room for. */
static bool works(const flap_prepared *p, const flap_budgets *trial, uint64_t room) {
  flap_setup setup;
  flap_plan_costs costs;
  if (flap_planner_choose(&p->planner, trial, &setup, &costs) != FLAP_OK) {
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
                        is_card(p) ? "ram" : "vram and ram", wanted_text,
                        flap_host_memory_limit_name(memory, is_card(p), limit, sizeof limit), room_text,
                        budgets[0] ? budgets
                                   : "no budgets work there: end other programs, raise that limit, or take "
                                     "more from disk (vram: min, ram: min) or a smaller micro-batch");
}

flap_status flap_pressure_check_here(const flap_prepared *p) {
  flap_host_memory memory;
  if (p->config->profile != NULL)
    return FLAP_OK;
  flap_host_memory_read(&FLAP_HOST_ROOTS, &memory);
  return flap_pressure_check(p, &memory);
}

void flap_pressure_warn_of_buffers(const flap_prepared *p) {
  flap_block_config disk;
  if (p->config->profile != NULL || p->setup.sizes.disk_bytes == 0)
    return;
  flap_setup_block_config(&p->setup, &disk);
  disk.memory_bytes = p->setup.sizes.staging_bytes;
  flap_block_check_memory(&disk);
}
