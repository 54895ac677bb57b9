/* The pager's calls. The engine thread's side of the state; the other side is transfer.c.
 *
 *   lease:  queued ──rings_assign──► has a slot ──pin──► pinned ──unpin──► released
 *   slot:   free ──rings_assign──► loading ──loads_issue──► loaded ──pin──► pinned ──unpin──► released
 *             ▲    (nothing to load: straight to loaded)                                       │ rings_release
 *             ├───────────────────────────── nothing to store ────────────────────────────────┤
 *             └──────────────── pager_rings_stored ◄── storing ◄───────────────────────────────┘
 *
 * Invariants, asserted by pager_assert_state (the first four kinds in full only when tests ask for it):
 *  1. Slots of a ring go to its leases in program order; nobody queues beside a free slot, but for borrowed ones whose
 *     resident is needed before.
 *  2. A slot is free only when no copy touches it and the compute stream is done with it. It may be free while the
 *     disk still writes what it held, from a write buffer.
 *  3. A slot is loaded when all its copies are enqueued and its load event is recorded behind them.
 *  4. A page that is not idle is carried by exactly one D2H copy or write buffer. Its `stores_left` counts that carrier
 *     and the released slots that have not come to it; a load starts only at 0, so it reads the last bytes, once home.
 *  5. Of the read buffers half, but no more than 16 (and one at least), are held only for slots that are owned, and
 *     move on without waiting for anything but disk and lane; write buffers likewise. So these always come back. The
 *     other read buffers may read ahead, for leases that get their slots later, in program order. Of what nobody waits
 *     for no more is asked of the disk at a time than it works on.
 *  6. At most PAGER_WINDOW copies are under way on each lane, and none is begun beside PAGER_WINDOW_BYTES of them.
 *  7. A region's load starts only when all leases before it that change the region are released.
 *  8. A job begins when all leases before it that change its regions are released, their bytes are home, and no H2D
 * copy reads them. What comes behind it and loads, or is pinned, waits for its end.
 *  9. The slot of a ring that keeps holds its region's bytes as of `change`; a lease of the same program and number of
 * changes takes them as they are.
 * 10. Stores of one region go in the order of the unpins: page by page, none passes an earlier one.
 * 11. What a snapshot keeps stays as it is at home until it is drained: of its region no store of a lease behind the
 *     point has begun, no such job, and where it is resident no such lease is pinned.
 * 12. A page of a shared region is written to its region's file, which a keep changes while nothing of the region is on
 *     its way. A file is closed when no page that is idle stands there, and no region writes there (not asserted: which
 *     are open is for the thread that keeps).
 * 13. Of an overlay one side at a time holds something, or has anything on its way home.
 * 14. After a failure nothing new starts; what is under way is collected.
 * 15. While a resident holds something, is pinned, or may still be used by the compute stream, nothing of it is lent.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdlib.h>
#include <string.h>

#define SIM_MEMORY ((uintptr_t)1 << 45) /* host memory that is not there: addresses for the sim device */

/* ---- open and close ----------------------------------------------------------------------------------- */

static flap_status take_memory(const flap_pager_config *config, flap_arena *ram, flap_pager **pager_out,
                               unsigned char **homes_out) {
  flap_pager_sizes sizes;
  flap_pager_measure(config, &sizes);
  unsigned char *memory = flap_arena_take(ram, sizes.ram_bytes, FLAP_BLOCK_ALIGN);
  unsigned char *table = memory ? memory + sizes.ram_home_bytes + sizes.staging_bytes : NULL;
  unsigned char *pool = memory ? table + sizes.table_bytes : NULL;
  void *owned = NULL;
  if (!memory) {
    flap_assert(config->clock); /* only a simulation can do without memory */
    memory = (unsigned char *)SIM_MEMORY;
    table = owned = aligned_alloc(FLAP_BLOCK_ALIGN, sizes.table_bytes);
    if (!table)
      return flap_error_set(FLAP_NO_MEMORY, "pager: no memory for %llu bytes of tables",
                            (unsigned long long)sizes.table_bytes);
  }
  memset(table, 0, sizes.table_bytes);
  flap_arena arena;
  flap_arena_borrow(&arena, "pager table", table, sizes.table_bytes);
  flap_pager *pager = FLAP_ARENA_ARRAY(&arena, flap_pager, 1);
  pager_lay_out(pager, config, &arena);
  pager->pool.memory = pool;
  pager->owned_table = owned;
  *pager_out = pager;
  *homes_out = memory;
  return FLAP_OK;
}

static void init(flap_pager *pager, const flap_pager_config *config) {
  pager->clock = config->clock;
  pager->counts_no_stalls = config->counts_no_stalls;
  pager->trace = config->trace;
  pager->trace_compute = config->trace_compute;
  pager->trace_context = config->trace_context;
  pthread_mutex_init(&pager->lock, NULL);
  pthread_cond_init(&pager->engine_wake, NULL);
  pthread_cond_init(&pager->drain_wake, NULL);
  pthread_cond_init(&pager->let_in, NULL);
  pthread_mutex_init(&pager->job_lock, NULL);
  pthread_cond_init(&pager->job_wake, NULL);
  pthread_mutex_init(&pager->work_lock, NULL);
  pthread_cond_init(&pager->work_wake, NULL);
  pthread_mutex_init(&pager->bell_lock, NULL);
  pthread_cond_init(&pager->bell, NULL);
  pager->snapshot.region = PAGER_NONE;
  pager_list_init(&pager->loading);
  pager_list_init(&pager->released);
  pager_list_init(&pager->storing);
  pager_list_init(&pager->used);
  pager->lender_order = UINT64_MAX;
  pager_queue_init(&pager->hurried);
  pager_queue_init(&pager->behind);
  pager_queue_init(&pager->at_rest);
  pager_queue_init(&pager->coding);
  flap_event events = pager_events(pager);
  pager->h2d = (pager_lane){.stream = FLAP_STREAM_H2D, .lane = FLAP_LANE_H2D, .first_event = events - 2 * PAGER_WINDOW};
  pager->d2h = (pager_lane){.stream = FLAP_STREAM_D2H, .lane = FLAP_LANE_D2H, .first_event = events - PAGER_WINDOW};
}

static flap_status open_device(flap_pager *pager, const flap_pager_config *config, unsigned char *homes) {
  flap_device_config device = config->device;
  flap_assert((device.kind == FLAP_DEVICE_SIM) == (config->clock != NULL));
  device.clock = config->clock;
  device.events_max = pager_events(pager);
  device.notify = pager_ring_bell;
  device.notify_context = pager;
  FLAP_TRY(flap_device_open(&device, &pager->device));
  pager->has_bytes = flap_device_has_bytes(pager->device);
  uint64_t vram_bytes = 0;
  unsigned char *vram = flap_device_arena(pager->device, &vram_bytes);
  if (pager->sizes.vram_bytes > vram_bytes) {
    char need[FLAP_UNITS_TEXT_MAX], have[FLAP_UNITS_TEXT_MAX];
    return flap_error_set(FLAP_BUDGET,
                          "vram: regions and rings take %s, and %s of the budget are left for them on %s; raise vram",
                          flap_units_format_bytes(pager->sizes.vram_bytes, need, sizeof need),
                          flap_units_format_bytes(vram_bytes, have, sizeof have), flap_device_describe(pager->device));
  }
  pager_place(pager, homes, homes + pager->sizes.ram_home_bytes, vram);
  uint64_t pinned = pager->sizes.ram_home_bytes + pager->sizes.staging_bytes;
  if (pinned > 0)
    FLAP_TRY(flap_device_pin_host(pager->device, homes, pinned));
  if (pager->trace)
    flap_device_set_trace(pager->device, pager_lane_traced, pager);
  return FLAP_OK;
}

static uint32_t depth_of(const flap_block_config *disk, uint32_t depth, uint32_t buffers) {
  uint32_t all = (depth ? depth : 16) * (disk->disk_count ? disk->disk_count : 1);
  return all < buffers ? all : buffers;
}

/* A simulated disk has the machine's rates, unless it was given its own. */
static void simulate_disk(flap_block_config *disk, const flap_pager_config *config, uint64_t bytes) {
  disk->backend = FLAP_BLOCK_SIM;
  disk->sim.clock = config->clock;
  if (disk->sim.read_bytes_per_second <= 0)
    disk->sim.read_bytes_per_second = config->device.machine.disk_read_bytes;
  if (disk->sim.write_bytes_per_second <= 0)
    disk->sim.write_bytes_per_second = config->device.machine.disk_write_bytes;
  if (disk->sim.both_bytes_per_second <= 0)
    disk->sim.both_bytes_per_second = config->device.machine.disk_both_bytes;
  if (disk->sim.latency_ns == 0)
    disk->sim.latency_ns = config->device.machine.disk_ns;
  if (disk->stripe_bytes == 0)
    disk->stripe_bytes = config->page_bytes;
  if (disk->disk_count == 0) {
    disk->disk_count = 1;
    disk->disks[0] = (flap_block_disk){.path = "sim", .bytes = flap_units_round_up(bytes, disk->stripe_bytes)};
  }
}

static flap_status open_disk(flap_pager *pager, const flap_pager_config *config) {
  if (pager->sizes.disk_bytes == 0)
    return FLAP_OK;
  flap_block_config disk = config->disk;
  disk.bytes = pager->sizes.disk_bytes - pager->sizes.shared_bytes;
  if (disk.bytes == 0)
    disk.bytes = FLAP_BLOCK_ALIGN; /* all of it is in files */
  disk.memory = pager->staging;
  disk.memory_bytes = pager->sizes.staging_bytes;
  disk.requests_max = pager->buffer_count;
  disk.notify = pager_ring_bell;
  disk.notify_context = pager;
  pager->ahead_max = pager->read_depth = depth_of(&disk, disk.read_depth, pager->read_buffers);
  pager->behind_max = pager->write_depth = depth_of(&disk, disk.write_depth, pager->write_buffers);
  if (config->clock) {
    simulate_disk(&disk, config, pager->sizes.disk_bytes);
    pager->read_depth = pager->write_depth = 1; /* its lanes serve one request at a time */
    pager->disk_latency_ns = disk.sim.latency_ns;
  }
  FLAP_TRY(flap_block_open(&disk, &pager->block));
  return pager_extents_open(pager, config);
}

flap_status flap_pager_open(const flap_pager_config *config, flap_arena *ram, flap_pager **pager_out) {
  flap_status status = FLAP_OK;
  flap_pager *pager = NULL;
  unsigned char *homes = NULL;
  *pager_out = NULL;
  FLAP_TRY(take_memory(config, ram, &pager, &homes));
  init(pager, config);
  FLAP_TRY_GOTO(status, open_device(pager, config, homes));
  FLAP_TRY_GOTO(status, open_disk(pager, config));
  if (!config->clock) {
    FLAP_TRY_GOTO(status, pager_thread_start(pager));
    FLAP_TRY_GOTO(status, pager_jobs_open(pager));
    FLAP_TRY_GOTO(status, pager_checks_open(pager));
  }
  *pager_out = pager;
  return FLAP_OK;
fail:
  flap_pager_close(pager);
  return status;
}

static bool nothing_under_way(const flap_pager *pager) {
  if (pager->h2d.issued != pager->h2d.retired || pager->d2h.issued != pager->d2h.retired ||
      pager->jobs_done != pager->jobs_started)
    return false;
  return pager->reading == 0 && pager->writing == 0 && pager->coding_count == 0;
}

/* Events on the clock know the pager and its requests, so they happen before it goes. */
static void wind_down_clock(flap_pager *pager) {
  pager_enter(pager);
  if (pager->error == FLAP_OK)
    pager->error = FLAP_CLOSED; /* nothing new starts */
  for (bool advanced = true; advanced;) {
    pager_pump(pager);
    if (nothing_under_way(pager) && !pager->pump_scheduled)
      break;
    pager_leave(pager);
    advanced = flap_clock_advance(pager->clock);
    pager_enter(pager);
  }
  pager_leave(pager);
  pager->closing = true;
}

void flap_pager_close(flap_pager *pager) {
  if (!pager)
    return;
  flap_assert(pager->snapshot.region == PAGER_NONE); /* nobody drains any more */
  pager_jobs_close(pager);
  pager_thread_stop(pager);
  pager_checks_close(pager);
  if (pager->clock && pager->device)
    wind_down_clock(pager);
  /* Both wait for what is under way; the bell is rung until then. */
  flap_block_close(pager->block);
  flap_device_close(pager->device);
  pthread_cond_destroy(&pager->bell);
  pthread_mutex_destroy(&pager->bell_lock);
  pthread_cond_destroy(&pager->engine_wake);
  pthread_cond_destroy(&pager->drain_wake);
  pthread_cond_destroy(&pager->let_in);
  pthread_mutex_destroy(&pager->job_lock);
  pthread_mutex_destroy(&pager->work_lock);
  pthread_cond_destroy(&pager->work_wake);
  pthread_cond_destroy(&pager->job_wake);
  pthread_mutex_destroy(&pager->lock);
  free(pager->owned_table);
}

flap_device *flap_pager_device(const flap_pager *pager) {
  return pager->device;
}

void *flap_pager_vram_rest(const flap_pager *pager, uint64_t *bytes_out) {
  uint64_t bytes = 0;
  unsigned char *vram = flap_device_arena(pager->device, &bytes);
  *bytes_out = bytes - pager->sizes.vram_bytes;
  return vram + pager->sizes.vram_bytes;
}

const char *flap_pager_disk_describe(const flap_pager *pager) {
  return pager->block ? flap_block_describe(pager->block) : "none";
}

/* ---- programs ----------------------------------------------------------------------------------------- */

static bool is_streaming(const pager_region *region) {
  return region->ring < FLAP_PAGER_HOST;
}

static void queue_lease(flap_pager *pager, pager_region *region, uint32_t lease) {
  pager_ring *ring = &pager->rings[region->ring];
  if (ring->queue_tail == PAGER_NONE)
    ring->queue_head = lease;
  else
    pager->leases[ring->queue_tail].next_in_ring = lease;
  ring->queue_tail = lease;
}

flap_status flap_pager_begin(flap_pager *pager, const flap_lease *leases, uint32_t count) {
  pager_enter(pager);
  flap_status status = pager_error(pager);
  if (status != FLAP_OK) {
    pager_leave(pager);
    return status;
  }
  flap_assert(count <= pager->leases_max && pager->program_count < PAGER_PROGRAMS_MAX);
  uint32_t place = (pager->program_first + pager->program_count) % PAGER_PROGRAMS_MAX;
  pager->program_count++;
  uint32_t first = place * pager->leases_max;
  pager->programs[place] =
      (pager_program){.leases = leases, .count = count, .first_order = pager->order_next, .first_lease = first};
  pager->order_next += count;
  for (uint32_t i = 0; i < count; i++) {
    flap_assert(leases[i].region < pager->region_count && (unsigned)leases[i].mode <= FLAP_LEASE_SCRATCH);
    pager_region *region = &pager->regions[leases[i].region];
    pager->leases[first + i] = (pager_lease){.slot = PAGER_NONE,
                                             .next_in_ring = PAGER_NONE,
                                             .change = region->changes_queued,
                                             .disk_next = region->ram_pages,
                                             .ready = PAGER_NONE,
                                             .state = LEASE_QUEUED};
    if (leases[i].mode != FLAP_LEASE_READ)
      region->changes_queued++;
    if (is_streaming(region) && leases[i].host_bytes == 0)
      queue_lease(pager, region, first + i);
    else if (region->lends)
      pager_loan_queue(pager, region->loan, first + i);
  }
  pager_leave(pager);
  pager_ring_bell(pager);
  return FLAP_OK;
}

/* What is not loaded still waits for jobs that take the region's bytes before it. */
static bool lease_is_loaded(flap_pager *pager, uint32_t lease) {
  uint32_t slot = pager->leases[lease].slot;
  return slot != PAGER_NONE && pager->slots[slot].state == SLOT_LOADED &&
         pager->regions[pager->slots[slot].region].changes_released == pager->leases[lease].change;
}

/* A change of what is resident is a change at home; and of one that lends what is lent comes back first. */
static bool may_change_resident(flap_pager *pager, uint32_t lease) {
  uint32_t number;
  const flap_lease *what = &pager_program_of(pager, lease, &number)->leases[number];
  const pager_region *region = &pager->regions[what->region];
  if (region->lends && pager_loan_is_lent(pager, region->loan)) {
    pager->lender_order = pager_order_of(pager, lease);
    return false;
  }
  pager->lender_order = UINT64_MAX;
  return !pager_is_kept_back(region, pager->leases[lease].change);
}

/* What would make a pin wait for ever is a mistake of the planner's, and is told as one. */
static void check_pin(flap_pager *pager, uint32_t index, const flap_lease *what, const pager_lease *lease) {
  const pager_region *region = &pager->regions[what->region];
  if (region->pinned)
    pager_mistake(pager, "lease %u pins region %u while an earlier lease of it is pinned", index, what->region);
  if (region->overlay > 0 && region->holds && what->mode == FLAP_LEASE_SCRATCH)
    pager_mistake(pager, "lease %u empties region %u of overlay %u without loading it", index, what->region,
                  region->overlay);
  if (!is_streaming(region)) {
    if (pager_loads(what->mode) && !region->holds)
      pager_mistake(pager, "lease %u reads region %u, which is resident but holds nothing", index, what->region);
    if (region->lends && pager_loan_is_pinned(pager, region->loan))
      pager_mistake(pager, "lease %u needs region %u, but a lease of the ring that borrows from it is pinned", index,
                    what->region);
    return;
  }
  const pager_ring *ring = &pager->rings[region->ring];
  if (lease->slot == PAGER_NONE && ring->pinned >= ring->slots)
    pager_mistake(pager, "lease %u needs a slot of ring %s, but all %u are pinned: more leases live than slots", index,
                  ring->name, ring->slots);
}

/* Later work on the compute stream starts after the load. Where compute runs on this thread, that waits here; elsewhere
 * the device tells how long the stream rested. */
static void order_compute(flap_pager *pager, uint32_t slot) {
  const uint64_t started_ns = pager_now_ns(pager);
  pager_leave(pager);
  flap_device_stream_wait(pager->device, FLAP_STREAM_COMPUTE, pager_load_event(slot));
  pager_enter(pager);
  pager_stalled(pager, FLAP_LANE_H2D, started_ns, pager_now_ns(pager));
}

flap_status flap_pager_pin(flap_pager *pager, uint32_t index, void **memory_out) {
  *memory_out = NULL;
  pager_enter(pager);
  flap_status status = pager_error(pager);
  if (status != FLAP_OK)
    goto fail;
  pager_program *program = &pager->programs[pager->program_first];
  flap_assert(pager->program_count > 0 && index == program->pinned && index < program->count);
  const flap_lease *what = &program->leases[index];
  pager_lease *lease = &pager->leases[program->first_lease + index];
  pager_region *region = &pager->regions[what->region];
  flap_assert(what->host_bytes == 0 && region->ring != FLAP_PAGER_HOST);
  check_pin(pager, index, what, lease);
  if (is_streaming(region) || what->mode != FLAP_LEASE_READ)
    pager_wait_until(pager, is_streaming(region) ? lease_is_loaded : may_change_resident, program->first_lease + index,
                     true);
  status = pager_error(pager);
  if (status != FLAP_OK)
    goto fail;
  if (is_streaming(region)) {
    pager->slots[lease->slot].state = SLOT_PINNED;
    pager->rings[region->ring].pinned++;
  } else if (region->lends) {
    pager_loan_pinned(pager, region->loan);
  }
  region->pinned = true;
  lease->state = LEASE_PINNED;
  program->pinned++;
  if (is_streaming(region) && pager_loads(what->mode))
    order_compute(pager, lease->slot);
  *memory_out = is_streaming(region) ? pager->slots[lease->slot].memory : region->home;
  pager_leave(pager);
  return FLAP_OK;
fail:
  pager_leave(pager);
  return status;
}

/* The region's bytes are those of this lease from now on, wherever they are on their way. */
static void release_region(flap_pager *pager, pager_region *region, flap_lease_mode mode) {
  region->pinned = false;
  if (mode == FLAP_LEASE_READ)
    return;
  region->changes_released++;
  pager_set_holds(pager, region, pager_stores(mode));
  pager_snapshot_changed(pager, region);
  if (!is_streaming(region) || !pager_stores(mode))
    return;
  pager_count_store(pager, region, true);
  pager_page *page = pager_pages_of(pager, region);
  for (uint32_t i = 0; i < region->page_count; i++)
    page[i].stores_left++;
}

void flap_pager_unpin(flap_pager *pager, uint32_t index) {
  pager_enter(pager);
  pager_program *program = &pager->programs[pager->program_first];
  flap_assert(pager->program_count > 0 && index < program->pinned);
  const flap_lease *what = &program->leases[index];
  pager_lease *lease = &pager->leases[program->first_lease + index];
  flap_assert(lease->state == LEASE_PINNED && what->host_bytes == 0);
  pager_region *region = &pager->regions[what->region];
  lease->state = LEASE_RELEASED;
  program->released++;
  release_region(pager, region, what->mode);
  if (is_streaming(region)) {
    flap_device_event_record(pager->device, pager_use_event(lease->slot), FLAP_STREAM_COMPUTE, true);
    pager->slots[lease->slot].state = SLOT_RELEASED;
    pager->rings[region->ring].pinned--;
    pager_list_append(pager, &pager->released, lease->slot);
  } else if (region->lends) {
    pager_loan_unpinned(pager, region->loan);
  }
  pager_leave(pager);
  pager_ring_bell(pager);
}

static bool jobs_are_over(flap_pager *pager, uint32_t program) {
  return pager->programs[program].in_jobs == 0;
}

flap_status flap_pager_end(flap_pager *pager) {
  pager_enter(pager);
  flap_status status = pager_error(pager);
  if (status == FLAP_OK) {
    const pager_program *program = &pager->programs[pager->program_first];
    flap_assert(pager->program_count > 0);
    flap_assert(program->pinned == program->count && program->released + program->in_jobs == program->count);
    const uint64_t started_ns = pager_now_ns(pager);
    flap_device_expect_rest(pager->device);
    pager_wait_until(pager, jobs_are_over, pager->program_first, false);
    pager_stalled(pager, FLAP_LANE_HOST, started_ns, pager_now_ns(pager));
    status = pager_error(pager);
  }
  if (status == FLAP_OK) {
    pager->program_first = (pager->program_first + 1) % PAGER_PROGRAMS_MAX;
    pager->program_count--;
  }
  pager_leave(pager);
  return status;
}

flap_status flap_pager_settle(flap_pager *pager) {
  pager_enter(pager);
  flap_status status = pager_error(pager);
  if (status == FLAP_OK) {
    flap_assert(pager->program_count == 0);
    pager_wait_until(pager, pager_is_idle, 0, false);
    status = pager_error(pager);
  }
  pager_leave(pager);
  return status == FLAP_OK ? flap_device_synchronize(pager->device) : status;
}

/* ---- statistics --------------------------------------------------------------------------------------- */

void flap_pager_get_stats(flap_pager *pager, flap_pager_stats *stats_out) {
  pager_enter(pager);
  *stats_out = pager->stats;
  stats_out->stream_stall_ns = flap_device_rested_ns(pager->device);
  stats_out->stall_ns[FLAP_LANE_H2D] += stats_out->stream_stall_ns;
  stats_out->busy_ns[FLAP_LANE_H2D] = flap_device_busy_ns(pager->device, FLAP_STREAM_H2D) - pager->at_rest_ns[0];
  stats_out->busy_ns[FLAP_LANE_D2H] = flap_device_busy_ns(pager->device, FLAP_STREAM_D2H) - pager->at_rest_ns[1];
  if (pager->block) {
    stats_out->busy_ns[FLAP_LANE_DISK_READ] = pager->disk_ns[0] / pager->read_depth;
    stats_out->busy_ns[FLAP_LANE_DISK_WRITE] = pager->disk_ns[1] / pager->write_depth;
  }
  pager_leave(pager);
}
