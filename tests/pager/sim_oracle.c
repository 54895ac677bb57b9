#include "tests/pager/sim_oracle.h"

#include <check.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define GRANULE FLAP_BLOCK_ALIGN

/* A value is what was in a cell at first (AT_FIRST, tier, cell), or region, granule and version. */
#define AT_FIRST 0x80000000u
#define VERSION_BITS 22u

static _Thread_local sim_oracle *listening;

static uint32_t value_of(uint32_t region, uint32_t granule, uint32_t version) {
  return (region * ORACLE_GRANULES_MAX + granule) << VERSION_BITS | (version & ((1u << VERSION_BITS) - 1));
}
static uint32_t at_first(uint32_t tier, uint32_t cell) {
  return AT_FIRST | tier << 20 | cell;
}

#define EXPECT(oracle, condition, ...)     \
  do {                                     \
    if (__builtin_expect(!(condition), 0)) \
      found(oracle, __VA_ARGS__);          \
  } while (0)

static __attribute__((noreturn, cold, format(printf, 2, 3))) void found(const sim_oracle *o, const char *format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  ck_abort_msg("seed %llu, at %llu ns: %s", (unsigned long long)o->seed,
               (unsigned long long)flap_clock_now_ns(o->clock), text);
}

void sim_oracle_listen(sim_oracle *oracle) {
  listening = oracle;
}

/* ---- cells ------------------------------------------------------------------------------------------------ */

static uint32_t cell_at(const sim_oracle *o, oracle_tier tier, const void *address, uint64_t bytes) {
  const uintptr_t at = (uintptr_t)address - o->bases[tier];
  EXPECT(o, at % GRANULE == 0 && bytes % GRANULE == 0 && (at + bytes) / GRANULE <= o->cell_counts[tier],
         "%llu bytes at %#llx are not of tier %d", (unsigned long long)bytes, (unsigned long long)(uintptr_t)address,
         (int)tier);
  return (uint32_t)(at / GRANULE);
}

static void read_cell(sim_oracle *o, oracle_tier tier, uint32_t index, uint64_t from_ns, uint64_t to_ns) {
  oracle_cell *cell = &o->cells[tier][index];
  EXPECT(o, cell->written_ns <= from_ns && !cell->written_now, "cell %u of tier %d is read from %llu ns, written %llu",
         index, (int)tier, (unsigned long long)from_ns, (unsigned long long)cell->written_ns);
  if (cell->read_ns < to_ns)
    cell->read_ns = to_ns;
}

static void write_cell(sim_oracle *o, oracle_tier tier, uint32_t index, uint64_t from_ns, uint64_t to_ns,
                       uint32_t value) {
  oracle_cell *cell = &o->cells[tier][index];
  EXPECT(o,
         cell->written_ns <= from_ns && cell->read_ns <= from_ns && cell->readers == 0 && !cell->written_now &&
             !cell->pinned,
         "cell %u of tier %d is written from %llu ns, while it is used: written until %llu, read until %llu, %u "
         "requests read it, %s",
         index, (int)tier, (unsigned long long)from_ns, (unsigned long long)cell->written_ns,
         (unsigned long long)cell->read_ns, cell->readers, cell->pinned ? "pinned" : "not pinned");
  cell->value = value;
  cell->written_ns = to_ns;
}

/* Where a granule is at home from now on, by the value that was put there. */
static void note_home(sim_oracle *o, uint32_t value, uint32_t place) {
  if (value & AT_FIRST)
    return; /* nothing that a use left behind */
  const uint32_t which = value >> VERSION_BITS;
  o->regions[which / ORACLE_GRANULES_MAX].home[which % ORACLE_GRANULES_MAX] = place + 1;
}

/* ---- what the pager asks for ------------------------------------------------------------------------------- */

void sim_oracle_trace(void *context, flap_lane lane, uint32_t region, uint64_t started_ns, uint64_t ended_ns,
                      uint64_t bytes) {
  sim_oracle *o = context;
  const bool disk = lane == FLAP_LANE_DISK_READ || lane == FLAP_LANE_DISK_WRITE;
  EXPECT(o, region < o->region_count && started_ns <= ended_ns && started_ns >= o->lane_ns[lane],
         "lane %d begins something at %llu ns, before %llu", (int)lane, (unsigned long long)started_ns,
         (unsigned long long)o->lane_ns[lane]);
  o->lane_ns[lane] = disk ? started_ns : ended_ns;
  o->traced[lane] += bytes;
  if (lane != FLAP_LANE_HOST) {
    o->page_events += (bytes + o->page_bytes - 1) / o->page_bytes;
    o->copy_started_ns = started_ns;
    o->copy_ended_ns = ended_ns;
    return;
  }
  EXPECT(o, o->jobs_seen < o->jobs_given, "a job that nobody gave");
  const oracle_job *job = &o->jobs[o->jobs_seen++ % ORACLE_JOBS_MAX];
  for (uint32_t i = 0; i < job->count; i++) {
    oracle_region *r = &o->regions[job->regions[i]];
    for (uint32_t g = 0; g < r->granules; g++) {
      if (r->home[g] == 0)
        continue; /* it was never moved, so nobody knows where it is */
      read_cell(o, ORACLE_RAM, r->home[g] - 1, started_ns, started_ns);
      EXPECT(o, o->cells[ORACLE_RAM][r->home[g] - 1].value == value_of(job->regions[i], g, job->versions[i] - 1),
             "a job finds other bytes than the last of region %u", job->regions[i]);
      write_cell(o, ORACLE_RAM, r->home[g] - 1, started_ns, ended_ns, value_of(job->regions[i], g, job->versions[i]));
    }
  }
}

void __real_flap_device_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes);
void __wrap_flap_device_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes);
void __wrap_flap_device_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes) {
  sim_oracle *o = listening;
  __real_flap_device_copy(device, stream, to, from, bytes); /* which tells the trace */
  if (!o)
    return;
  const bool up = stream == FLAP_STREAM_H2D;
  const oracle_tier to_tier = up ? ORACLE_VRAM : ORACLE_RAM, from_tier = up ? ORACLE_RAM : ORACLE_VRAM;
  const uint32_t to_cell = cell_at(o, to_tier, to, bytes), from_cell = cell_at(o, from_tier, from, bytes);
  uint64_t *window_ns = &o->window_ns[up][o->copies[up]++ % ORACLE_WINDOW];
  EXPECT(o, *window_ns <= flap_clock_now_ns(o->clock), "more than %u copies are on a lane", ORACLE_WINDOW);
  *window_ns = o->free_ns[stream] = o->copy_ended_ns;
  for (uint32_t i = 0; i < bytes / GRANULE; i++) {
    read_cell(o, from_tier, from_cell + i, o->copy_started_ns, o->copy_ended_ns);
    EXPECT(o, !o->cells[from_tier][from_cell + i].pinned, "a slot is stored while it is pinned");
    const uint32_t value = o->cells[from_tier][from_cell + i].value;
    write_cell(o, to_tier, to_cell + i, o->copy_started_ns, o->copy_ended_ns, value);
    if (!up && (to_cell + i) * (uint64_t)GRANULE < o->homes_bytes)
      note_home(o, value, to_cell + i);
  }
}

void __real_flap_device_event_record(flap_device *device, flap_event event, flap_stream stream, bool notify);
void __wrap_flap_device_event_record(flap_device *device, flap_event event, flap_stream stream, bool notify);
void __wrap_flap_device_event_record(flap_device *device, flap_event event, flap_stream stream, bool notify) {
  sim_oracle *o = listening;
  if (o) {
    EXPECT(o, event < ORACLE_EVENTS_MAX, "event %u is more than the oracle follows", event);
    const uint64_t now_ns = flap_clock_now_ns(o->clock);
    o->events_ns[event] = o->free_ns[stream] > now_ns ? o->free_ns[stream] : now_ns;
  }
  __real_flap_device_event_record(device, event, stream, notify);
}

void __real_flap_device_stream_wait(flap_device *device, flap_stream stream, flap_event event);
void __wrap_flap_device_stream_wait(flap_device *device, flap_stream stream, flap_event event);
void __wrap_flap_device_stream_wait(flap_device *device, flap_stream stream, flap_event event) {
  sim_oracle *o = listening;
  if (o && o->free_ns[stream] < o->events_ns[event])
    o->free_ns[stream] = o->events_ns[event];
  __real_flap_device_stream_wait(device, stream, event);
}

/* From here to its end a request has its buffer, and what it reads or writes on the disk. */
void __real_flap_block_submit(flap_block *block, flap_block_request *request);
void __wrap_flap_block_submit(flap_block *block, flap_block_request *request);
void __wrap_flap_block_submit(flap_block *block, flap_block_request *request) {
  sim_oracle *o = listening;
  if (o) {
    const bool reads = request->op == FLAP_BLOCK_READ;
    const uint32_t buffer = cell_at(o, ORACLE_RAM, request->buffer, request->bytes);
    const uint32_t disk = cell_at(o, ORACLE_DISK, (void *)(uintptr_t)request->offset, request->bytes);
    const uint64_t now_ns = flap_clock_now_ns(o->clock);
    EXPECT(o, buffer * (uint64_t)GRANULE >= o->homes_bytes, "a disk request in the homes");
    for (uint32_t i = 0; i < request->bytes / GRANULE; i++) {
      oracle_cell *from = reads ? &o->cells[ORACLE_DISK][disk + i] : &o->cells[ORACLE_RAM][buffer + i];
      oracle_cell *to = reads ? &o->cells[ORACLE_RAM][buffer + i] : &o->cells[ORACLE_DISK][disk + i];
      EXPECT(o, from->written_ns <= now_ns && !from->written_now, "a disk request takes bytes that are not complete");
      EXPECT(o, to->written_ns <= now_ns && to->read_ns <= now_ns && to->readers == 0 && !to->written_now,
             "a disk request writes where somebody reads or writes");
      from->readers++;
      to->written_now = true;
    }
  }
  __real_flap_block_submit(block, request);
}

flap_block_request *__real_flap_block_poll(flap_block *block);
flap_block_request *__wrap_flap_block_poll(flap_block *block);
flap_block_request *__wrap_flap_block_poll(flap_block *block) {
  sim_oracle *o = listening;
  flap_block_request *request = __real_flap_block_poll(block);
  if (!o || !request)
    return request;
  const bool reads = request->op == FLAP_BLOCK_READ;
  const uint32_t buffer = cell_at(o, ORACLE_RAM, request->buffer, request->bytes);
  const uint32_t disk = cell_at(o, ORACLE_DISK, (void *)(uintptr_t)request->offset, request->bytes);
  for (uint32_t i = 0; i < request->bytes / GRANULE; i++) {
    oracle_cell *from = reads ? &o->cells[ORACLE_DISK][disk + i] : &o->cells[ORACLE_RAM][buffer + i];
    oracle_cell *to = reads ? &o->cells[ORACLE_RAM][buffer + i] : &o->cells[ORACLE_DISK][disk + i];
    EXPECT(o, from->readers > 0 && to->written_now, "a disk request ends that was never asked for");
    from->readers--;
    to->written_now = false;
    to->value = from->value;
    from->read_ns = to->written_ns = request->ended_ns;
    if (!reads)
      note_home(o, to->value, o->cell_counts[ORACLE_RAM] + disk + i);
  }
  return request;
}

/* ---- what the engine did ----------------------------------------------------------------------------------- */

static uint32_t count_cells(const sim_oracle *o, uint64_t bytes) {
  EXPECT(o, bytes / GRANULE <= ORACLE_CELLS_MAX, "%llu bytes are more than the oracle follows",
         (unsigned long long)bytes);
  return (uint32_t)(bytes / GRANULE);
}

static void open_region(oracle_region *r, const flap_pager_config *config, const flap_pager_region *region) {
  const uint64_t ram_bytes = region->ram_pages * config->page_bytes;
  memset(r, 0, sizeof *r);
  r->granules = (uint32_t)(region->bytes / GRANULE);
  r->bytes = region->bytes;
  r->resident = region->ring == FLAP_PAGER_RESIDENT;
  r->disk_bytes = r->resident || region->bytes < ram_bytes ? 0 : region->bytes - ram_bytes;
  r->kept = region->ring < FLAP_PAGER_HOST && config->rings[region->ring].keeps;
}

void sim_oracle_open(sim_oracle *o, uint64_t seed, const flap_pager_config *config, flap_pager *pager, void *ram) {
  flap_pager_sizes sizes;
  flap_pager_measure(config, &sizes);
  memset(o, 0, offsetof(sim_oracle, page_events));
  o->seed = seed;
  o->pager = pager;
  o->clock = config->clock;
  o->page_bytes = config->page_bytes;
  o->homes_bytes = sizes.ram_home_bytes;
  o->bases[ORACLE_VRAM] = (uintptr_t)flap_device_arena(flap_pager_device(pager), NULL);
  o->bases[ORACLE_RAM] = (uintptr_t)ram;
  o->cell_counts[ORACLE_VRAM] = count_cells(o, sizes.vram_bytes);
  o->cell_counts[ORACLE_RAM] = count_cells(o, sizes.ram_home_bytes + sizes.staging_bytes);
  o->cell_counts[ORACLE_DISK] = count_cells(o, sizes.disk_bytes);
  for (uint32_t tier = 0; tier < ORACLE_TIERS; tier++) {
    memset(o->owners[tier], 0, o->cell_counts[tier] * sizeof(uint32_t));
    for (uint32_t i = 0; i < o->cell_counts[tier]; i++)
      o->cells[tier][i] = (oracle_cell){.value = at_first(tier, i)};
  }
  o->region_count = config->region_count;
  for (uint32_t i = 0; i < config->region_count; i++)
    open_region(&o->regions[i], config, &config->regions[i]);
}

/* Only regions that never held anything are filled, so their first bytes are the filled ones. */
void sim_oracle_fill(sim_oracle *o, uint32_t region) {
  o->regions[region].holds = true;
}

void sim_oracle_begin(sim_oracle *o) {
  for (uint32_t i = 0; i < o->region_count; i++)
    o->regions[i].is_loaded = false;
}

/* Bytes that were there at first have no name until somebody uses them. Then their place is this granule's, for good:
 * no other one was there, and this one was nowhere else. */
static bool is_first(sim_oracle *o, uint32_t value, uint32_t region, uint32_t granule) {
  const uint32_t tier = value >> 20 & 7, cell = value & 0xfffff;
  const uint32_t owner = region * ORACLE_GRANULES_MAX + granule + 1;
  oracle_region *r = &o->regions[region];
  uint32_t *place = &r->at_first[granule], here = (tier == ORACLE_DISK ? o->cell_counts[ORACLE_RAM] : 0) + cell + 1;
  if (r->version != r->filled_version || (tier == ORACLE_VRAM) != r->resident)
    return false;
  if (o->owners[tier][cell] == 0 && *place == 0) {
    o->owners[tier][cell] = owner;
    *place = here;
  }
  return o->owners[tier][cell] == owner && *place == here;
}

static uint64_t compute_ns(const sim_oracle *o) {
  const uint64_t now_ns = flap_clock_now_ns(o->clock), free_ns = o->free_ns[FLAP_STREAM_COMPUTE];
  return free_ns > now_ns ? free_ns : now_ns;
}

static bool loads(flap_lease_mode mode) {
  return mode == FLAP_LEASE_READ || mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CONSUME;
}
static bool leaves(flap_lease_mode mode) {
  return mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CREATE;
}

static void count_lease(sim_oracle *o, oracle_region *r, flap_lease_mode mode) {
  if (r->resident)
    return;
  if (loads(mode) && !(r->kept && r->is_loaded)) {
    o->wanted[FLAP_LANE_H2D] += r->bytes;
    o->wanted[FLAP_LANE_DISK_READ] += r->disk_bytes;
  }
  if (leaves(mode)) {
    o->wanted[FLAP_LANE_D2H] += r->bytes;
    o->wanted[FLAP_LANE_DISK_WRITE] += r->disk_bytes;
  }
  r->is_loaded = true;
}

void sim_oracle_pinned(sim_oracle *o, const flap_lease *lease, const void *memory) {
  oracle_region *r = &o->regions[lease->region];
  const uint32_t first = cell_at(o, ORACLE_VRAM, memory, r->bytes);
  const uint64_t from_ns = compute_ns(o);
  for (uint32_t g = 0; g < r->granules; g++) {
    oracle_cell *cell = &o->cells[ORACLE_VRAM][first + g];
    EXPECT(o, cell->written_ns <= from_ns, "region %u is used at %llu ns, and there at %llu", lease->region,
           (unsigned long long)from_ns, (unsigned long long)cell->written_ns);
    EXPECT(o, !cell->pinned, "region %u got a slot that is pinned", lease->region);
    cell->pinned = true;
    if (!loads(lease->mode)) {
      EXPECT(o, cell->read_ns <= from_ns, "region %u got a slot that is stored until %llu ns", lease->region,
             (unsigned long long)cell->read_ns);
      continue;
    }
    const uint32_t value = cell->value;
    EXPECT(o, value & AT_FIRST ? is_first(o, value, lease->region, g) : value == value_of(lease->region, g, r->version),
           "granule %u of region %u at version %u is not what was stored last: value %#x", g, lease->region, r->version,
           value);
    cell->read_ns = from_ns;
  }
  count_lease(o, r, lease->mode);
}

void sim_oracle_compute(sim_oracle *o, uint64_t ns) {
  o->free_ns[FLAP_STREAM_COMPUTE] = compute_ns(o) + ns;
}

void sim_oracle_unpinned(sim_oracle *o, const flap_lease *lease, const void *memory) {
  oracle_region *r = &o->regions[lease->region];
  const uint32_t first = cell_at(o, ORACLE_VRAM, memory, r->bytes);
  const uint64_t to_ns = compute_ns(o);
  if (lease->mode != FLAP_LEASE_READ) {
    r->version++;
    r->holds = leaves(lease->mode);
  }
  for (uint32_t g = 0; g < r->granules; g++) {
    oracle_cell *cell = &o->cells[ORACLE_VRAM][first + g];
    cell->pinned = false;
    cell->read_ns = to_ns;
    if (lease->mode == FLAP_LEASE_READ)
      continue;
    cell->written_ns = to_ns;
    cell->value = value_of(lease->region, g, r->version);
  }
}

void sim_oracle_job(sim_oracle *o, const flap_lease *leases, uint32_t count) {
  oracle_job *job = &o->jobs[o->jobs_given++ % ORACLE_JOBS_MAX];
  EXPECT(o, o->jobs_given - o->jobs_seen <= ORACLE_JOBS_MAX, "too many jobs for the oracle");
  job->count = count;
  for (uint32_t i = 0; i < count; i++) {
    oracle_region *r = &o->regions[leases[i].region];
    if (r->filled_version == r->version && r->home[0] == 0)
      r->filled_version++; /* changed where it is */
    r->version++;
    r->holds = leaves(leases[i].mode);
    r->is_loaded = false;
    job->regions[i] = leases[i].region;
    job->versions[i] = r->version;
    o->wanted[FLAP_LANE_HOST] += leases[i].host_bytes * (r->holds ? 2 : 1);
  }
}

static void check_home(sim_oracle *o, uint32_t region) {
  const oracle_region *r = &o->regions[region];
  for (uint32_t g = 0; g < r->granules; g++) {
    if (r->home[g] == 0) {
      EXPECT(o, r->version == r->filled_version, "region %u was changed and never came home", region);
      continue;
    }
    const uint32_t place = r->home[g] - 1, ram = o->cell_counts[ORACLE_RAM];
    const uint32_t value = place < ram ? o->cells[ORACLE_RAM][place].value : o->cells[ORACLE_DISK][place - ram].value;
    EXPECT(o, value == value_of(region, g, r->version), "granule %u of region %u is not home", g, region);
  }
}

void sim_oracle_settled(sim_oracle *o) {
  flap_pager_stats stats;
  flap_pager_get_stats(o->pager, &stats);
  EXPECT(o, o->jobs_seen == o->jobs_given, "%llu jobs of %llu were run", (unsigned long long)o->jobs_seen,
         (unsigned long long)o->jobs_given);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    EXPECT(o, o->traced[lane] == o->wanted[lane] && stats.bytes[lane] == o->wanted[lane],
           "lane %d moved %llu bytes and counted %llu, where %llu are needed", lane,
           (unsigned long long)o->traced[lane], (unsigned long long)stats.bytes[lane],
           (unsigned long long)o->wanted[lane]);
  for (uint32_t i = 0; i < o->region_count; i++)
    if (o->regions[i].holds && !o->regions[i].resident)
      check_home(o, i);
}
