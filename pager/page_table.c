/* The tables: how large they are, and where every page has its home.
 *
 * One function takes them, on an arena that measures or on a real one, so the size that was planned is the size that is
 * used. A region's disk pages lie adjacent in the linear space, in page order, and regions follow one another; the
 * last page of a region may be shorter than the others. The space is written in place. In RAM the regions of an
 * overlay's side lie one behind the other, and both sides begin at the same place.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdlib.h>

static uint64_t smaller(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

uint64_t pager_disk_bytes(uint64_t page_bytes, uint64_t bytes, uint32_t ram_pages) {
  return bytes - smaller(bytes, ram_pages * page_bytes);
}

uint64_t pager_chunk_bytes(const flap_pager *pager, const pager_region *region, uint32_t first_page, uint32_t count) {
  uint64_t first = first_page * pager->page_bytes;
  return smaller(region->bytes - first, count * pager->page_bytes);
}

uint32_t pager_chunk_pages(const flap_pager *pager, const pager_region *region, uint32_t first_page) {
  uint32_t end = first_page < region->ram_pages ? region->ram_pages : region->page_count;
  return (uint32_t)smaller(pager->pages_per_transfer, end - first_page);
}

uint32_t pager_copy_pages(const flap_pager *pager, const pager_region *region, uint32_t first_page) {
  flap_assert(first_page < region->ram_pages);
  return (uint32_t)smaller(pager->pages_per_copy, region->ram_pages - first_page);
}

uint32_t pager_events(const flap_pager *pager) {
  return 2 * pager->slot_count + PAGER_MARKS + 1 + pager->loan_count + 2 * PAGER_WINDOW;
}

/* ---- sizes --------------------------------------------------------------------------------------------- */

static void check_config(const flap_pager_config *config) {
  flap_assert(config->page_bytes > 0 && config->page_bytes % FLAP_BLOCK_ALIGN == 0);
  flap_assert(config->transfer_bytes > 0 && config->transfer_bytes % config->page_bytes == 0);
  flap_assert(config->transfer_bytes <= FLAP_BLOCK_REQUEST_BYTES_MAX);
  flap_assert(config->copy_bytes % config->page_bytes == 0);
  flap_assert(config->read_buffers <= FLAP_PAGER_BUFFERS_MAX && config->write_buffers <= FLAP_PAGER_BUFFERS_MAX);
  flap_assert(config->region_count > 0 && config->leases_max > 0 && config->leases_max < PAGER_NONE / 2);
  uint32_t borrowers = 0;
  for (uint32_t i = 0; i < config->ring_count; i++) {
    const flap_pager_ring *ring = &config->rings[i];
    borrowers += ring->borrowed > 0;
    flap_assert(!ring->keeps || (ring->slots == 1 && ring->borrowed == 0));
    flap_assert(ring->name && ring->slots > 0 && ring->slot_bytes > 0 && ring->slot_bytes % FLAP_BLOCK_ALIGN == 0);
  }
  flap_assert(borrowers <= 1);
  for (uint32_t i = 0; i < config->region_count; i++) {
    const flap_pager_region *region = &config->regions[i];
    flap_assert(!region->lends || (region->ring == FLAP_PAGER_RESIDENT && !region->in_snapshots));
    flap_assert(region->bytes > 0 && region->bytes % FLAP_BLOCK_ALIGN == 0);
    flap_assert(region->klass < FLAP_PAGER_CLASSES_MAX);
    flap_assert(region->element_bytes <= 2 || region->element_bytes == 4);
    flap_assert(region->overlay <= FLAP_PAGER_OVERLAYS_MAX && region->side <= 1);
    flap_assert(region->overlay == 0 || !region->in_snapshots);
    flap_assert(!region->shared || region->in_snapshots);
    flap_assert(region->ring == FLAP_PAGER_RESIDENT || region->ring == FLAP_PAGER_HOST ||
                (region->ring < config->ring_count && region->bytes <= config->rings[region->ring].slot_bytes));
  }
}

/* How far the sides of overlays reach, and what that adds to what both take. */
typedef struct overlay_sides {
  uint64_t bytes[FLAP_PAGER_OVERLAYS_MAX][2];
  uint32_t count;
} overlay_sides;

static uint64_t extend_side(overlay_sides *sides, uint32_t overlay, uint32_t side, uint64_t bytes) {
  for (; sides->count < overlay; sides->count++)
    sides->bytes[sides->count][0] = sides->bytes[sides->count][1] = 0;
  uint64_t *of = sides->bytes[overlay - 1];
  const uint64_t other = of[1 - side], before = of[side] > other ? of[side] : other;
  of[side] += bytes;
  return of[side] > before ? of[side] - before : 0;
}

void flap_pager_total(const flap_pager_config *config, flap_pager_totals *totals_out) {
  flap_pager_totals t = {0};
  overlay_sides sides;
  sides.count = 0;
  for (uint32_t i = 0; i < config->region_count; i++) {
    const flap_pager_region *region = &config->regions[i];
    t.overlays = region->overlay > t.overlays ? region->overlay : t.overlays;
    if (region->ring == FLAP_PAGER_RESIDENT) {
      t.resident_bytes += region->bytes;
      t.snapshots_move = t.snapshots_move || region->in_snapshots;
      continue;
    }
    uint64_t disk = pager_disk_bytes(config->page_bytes, region->bytes, region->ram_pages);
    t.disk_bytes += disk;
    t.shared_bytes += region->shared && config->shared_folder != NULL ? disk : 0;
    t.snapshots_move = t.snapshots_move || (region->in_snapshots && disk > 0);
    const uint64_t ram = region->bytes - disk;
    t.home_bytes += region->overlay == 0 || ram == 0 ? ram : extend_side(&sides, region->overlay, region->side, ram);
    t.pages += (region->bytes + config->page_bytes - 1) / config->page_bytes;
  }
  *totals_out = t;
}

/* ---- tables ------------------------------------------------------------------------------------------- */

/* A loan for each resident that lends, until there are as many slots as the ring borrows. */
static void fill_loans(flap_pager *pager, const flap_pager_config *config, uint32_t ring) {
  pager_ring *r = &pager->rings[ring];
  uint32_t slot = r->first_slot + r->slots, left = r->borrowed, loan = 0;
  for (uint32_t i = 0; left > 0; i++) {
    flap_assert(i < config->region_count);
    const flap_pager_region *region = &config->regions[i];
    if (!region->lends || region->bytes < r->slot_bytes)
      continue;
    const uint32_t slots = (uint32_t)smaller(region->bytes / r->slot_bytes, left);
    pager->regions[i].lends = true;
    pager->regions[i].loan = loan;
    pager->loans[loan] = (pager_loan){
        .region = i, .first_slot = slot, .slots = slots, .queue_head = PAGER_NONE, .queue_tail = PAGER_NONE};
    pager_list_init(&pager->loans[loan].free);
    for (uint32_t j = 0; j < slots; j++, slot++) {
      pager->slots[slot].loan = loan;
      pager_list_append(pager, &pager->loans[loan].free, slot);
    }
    pager_loan_open(pager, loan);
    left -= slots;
    loan++;
  }
  if (r->borrowed > 0)
    pager->loan_count = loan;
}

static void fill_rings(flap_pager *pager, const flap_pager_config *config) {
  uint32_t slot = 0;
  pager_list_init(&pager->offered);
  for (uint32_t i = 0; i < pager->ring_count; i++) {
    pager_ring *ring = &pager->rings[i];
    ring->name = config->rings[i].name;
    ring->slot_bytes = config->rings[i].slot_bytes;
    ring->slots = config->rings[i].slots;
    ring->keeps = config->rings[i].keeps;
    ring->first_slot = slot;
    ring->queue_head = ring->queue_tail = PAGER_NONE;
    ring->borrowed = config->rings[i].borrowed;
    pager_list_init(&ring->free);
    for (uint32_t j = 0; j < ring->slots + ring->borrowed; j++, slot++) {
      pager->slots[slot].ring = i;
      pager->slots[slot].ready = pager->slots[slot].loan = PAGER_NONE;
      if (j < ring->slots)
        pager_list_append(pager, &ring->free, slot);
    }
    fill_loans(pager, config, i);
  }
}

static void fill_regions(flap_pager *pager, const flap_pager_config *config) {
  uint32_t page = 0, extents[2] = {0, 0}; /* in the linear space, in a file that is shared */
  for (uint32_t i = 0; i < pager->region_count; i++) {
    pager_region *region = &pager->regions[i];
    region->bytes = config->regions[i].bytes;
    region->ring = config->regions[i].ring;
    region->klass = config->regions[i].klass;
    region->element_bytes = config->regions[i].element_bytes;
    region->in_snapshots = config->regions[i].in_snapshots;
    region->side = config->regions[i].side;
    region->shared = config->regions[i].shared && config->shared_folder != NULL;
    region->file = region->shared ? 1 : 0;
    if (region->ring == FLAP_PAGER_RESIDENT)
      continue;
    region->page_count = (uint32_t)((region->bytes + pager->page_bytes - 1) / pager->page_bytes);
    region->wanted = region->passed = UINT64_MAX;
    region->ram_pages = (uint32_t)smaller(config->regions[i].ram_pages, region->page_count);
    region->overlay = region->ram_pages > 0 ? config->regions[i].overlay : 0;
    region->first_page = page;
    for (uint32_t j = 0; j < region->page_count; j++, page++) {
      pager_page *entry = &pager->pages[page];
      *entry = (pager_page){.extent = PAGER_NONE, .state = PAGE_IDLE};
      if (j < region->ram_pages)
        continue;
      entry->file = region->file & PAGER_FILE_MASK;
      entry->extent = extents[region->shared];
      entry->stored_bytes = (uint32_t)pager_chunk_bytes(pager, region, j, 1);
      extents[region->shared] += entry->stored_bytes / FLAP_BLOCK_ALIGN;
    }
  }
}

/* Whoever works on buffers compresses in memory of its own: the workers, or the pump where there are none. */
static void take_workers(flap_pager *pager, const flap_pager_config *config, bool disk, flap_arena *arena) {
  const uint32_t count = pager->worker_count > 0 ? pager->worker_count : 1;
  pager->compresses = disk && pager_compresses(config);
  pager->always_compresses = config->compression != FLAP_COMPRESSION_AUTO;
  pager->codec = flap_compression_codec(config->compression);
  pager->shared_cores = config->shared_cores;
  pager->disk_rates = config->disk_rates;
  pager->workers = FLAP_ARENA_ARRAY(arena, pager_worker, count);
  for (uint32_t i = 0; pager->compresses && i < count; i++) {
    unsigned char *page = flap_arena_take(arena, config->page_bytes, 64);
    void *codec = flap_arena_take(arena, flap_block_codec_scratch(config->page_bytes), 64);
    if (!flap_arena_is_measuring(arena))
      pager->workers[i].scratch = (pager_scratch){.page = page, .codec = codec};
  }
}

/* Where there is no disk, or nothing is compressed, there is none. */
static void take_pool(flap_pager *pager, const flap_pager_config *config, flap_arena *arena) {
  pager_pool *pool = &pager->pool;
  const uint64_t blocks = pager->compresses ? config->pool_bytes / FLAP_PAGER_POOL_BLOCK : 0;
  flap_assert(config->pool_bytes % FLAP_PAGER_POOL_BLOCK == 0 && blocks < PAGER_NONE);
  pool->block_count = (uint32_t)blocks;
  pool->next = FLAP_ARENA_ARRAY(arena, uint32_t, blocks);
  pool->heads = FLAP_ARENA_ARRAY(arena, uint32_t, blocks > 0 ? pager->page_count : 0);
  pager->encode_bytes = config->encode_bytes;
  pager->decode_bytes = config->decode_bytes;
  pager->disk_share = pager->compresses && config->clock && config->disk_share > 0 ? config->disk_share : 1;
}

static void lay_out(flap_pager *pager, const flap_pager_config *config, const flap_pager_totals *totals,
                    flap_arena *arena) {
  flap_pager_sizes sizes = {.vram_bytes = totals->resident_bytes,
                            .ram_home_bytes = totals->home_bytes,
                            .disk_bytes = totals->disk_bytes,
                            .shared_bytes = totals->shared_bytes};
  flap_assert(totals->pages < PAGER_NONE && sizes.disk_bytes / FLAP_BLOCK_ALIGN < PAGER_NONE);
  pager->overlay_count = totals->overlays; /* whatever lives in RAM: so what a table takes does not depend on that */
  pager->page_bytes = config->page_bytes;
  pager->transfer_bytes = config->transfer_bytes;
  pager->pages_per_transfer = (uint32_t)(config->transfer_bytes / config->page_bytes);
  pager->pages_per_copy =
      config->copy_bytes ? (uint32_t)(config->copy_bytes / config->page_bytes) : pager->pages_per_transfer;
  pager->region_count = config->region_count;
  pager->ring_count = config->ring_count;
  pager->page_count = (uint32_t)totals->pages;
  pager->leases_max = config->leases_max;
  for (uint32_t i = 0; i < config->ring_count; i++) {
    pager->slot_count += config->rings[i].slots + config->rings[i].borrowed;
    pager->loan_count += config->rings[i].borrowed; /* as many lend, at most */
    sizes.vram_bytes += config->rings[i].slot_bytes * config->rings[i].slots;
  }
  if (sizes.disk_bytes > 0) {
    flap_assert(config->read_buffers > 0 && config->write_buffers > 0);
    pager->read_buffers = config->read_buffers;
    pager->write_buffers = config->write_buffers;
    pager->worker_count = config->workers;
  }
  /* Of snapshots: what is in RAM is taken where it is; for the rest one piece is on its way in while another is on its
   * way out. Without a disk these are the halves of the buffer that is there for fill and drain. */
  pager->snapshot_buffers = sizes.snapshot_buffers = totals->snapshots_move ? 2 : 0;
  pager->buffer_count = pager->read_buffers + pager->write_buffers + pager->snapshot_buffers;
  /* A resident region passes through a buffer when it is filled or drained: a write buffer, or one that is there for
   * that. */
  const bool disk = sizes.disk_bytes > 0;
  pager->bounce_bytes = disk ? config->transfer_bytes : totals->resident_bytes > 0 ? config->page_bytes : 0;
  pager->snapshot_bytes = disk ? config->transfer_bytes : pager->bounce_bytes / 2;
  sizes.staging_bytes = disk ? pager->buffer_count * config->transfer_bytes : pager->bounce_bytes;

  pager->regions = FLAP_ARENA_ARRAY(arena, pager_region, pager->region_count);
  pager->overlays = FLAP_ARENA_ARRAY(arena, pager_overlay, pager->overlay_count);
  pager->pages = FLAP_ARENA_ARRAY(arena, pager_page, pager->page_count);
  pager->rings = FLAP_ARENA_ARRAY(arena, pager_ring, pager->ring_count);
  pager->slots = FLAP_ARENA_ARRAY(arena, pager_slot, pager->slot_count);
  pager->loans = FLAP_ARENA_ARRAY(arena, pager_loan, pager->loan_count);
  pager->buffers = FLAP_ARENA_ARRAY(arena, pager_buffer, pager->buffer_count);
  pager->checks.of = FLAP_ARENA_ARRAY(arena, uint32_t, pager->buffer_count);
  pager->works.of = FLAP_ARENA_ARRAY(arena, uint32_t, pager->buffer_count);
  take_workers(pager, config, disk, arena);
  take_pool(pager, config, arena);
  pager->leases = FLAP_ARENA_ARRAY(arena, pager_lease, (uint64_t)pager->leases_max * PAGER_PROGRAMS_MAX);
  pager->jobs_room = config->jobs_max * PAGER_PROGRAMS_MAX;
  pager->jobs = FLAP_ARENA_ARRAY(arena, pager_job, pager->jobs_room);
  sizes.table_bytes = flap_units_round_up(arena->bytes_used, FLAP_BLOCK_ALIGN);
  sizes.pool_bytes = pager->pool.block_count * FLAP_PAGER_POOL_BLOCK;
  sizes.ram_bytes = sizes.ram_home_bytes + sizes.staging_bytes + sizes.table_bytes + sizes.pool_bytes;
  pager->sizes = sizes;
}

void flap_pager_measure_totals(const flap_pager_config *config, const flap_pager_totals *totals,
                               flap_pager_sizes *sizes_out) {
  flap_pager pager = {0};
  flap_arena arena;
  flap_arena_measure(&arena, "pager table");
  (void)FLAP_ARENA_ARRAY(&arena, flap_pager, 1);
  lay_out(&pager, config, totals, &arena);
  *sizes_out = pager.sizes;
}

void pager_lay_out(flap_pager *pager, const flap_pager_config *config, flap_arena *arena) {
  flap_pager_totals totals;
  check_config(config);
  flap_pager_total(config, &totals);
  lay_out(pager, config, &totals, arena);
  if (flap_arena_is_measuring(arena))
    return;
  fill_rings(pager, config);
  fill_regions(pager, config);
  pager_pool_init(pager);
}

void flap_pager_measure(const flap_pager_config *config, flap_pager_sizes *sizes_out) {
  flap_pager_totals totals;
  check_config(config);
  flap_pager_total(config, &totals);
  flap_pager_measure_totals(config, &totals, sizes_out);
}

/* ---- places ------------------------------------------------------------------------------------------- */

static void link_free(flap_pager *pager, bool write, uint32_t first, uint32_t count) {
  pager->free_heads[write] = count > 0 ? first : PAGER_NONE;
  for (uint32_t i = first; i + 1 < first + count; i++)
    pager->buffers[i].next = i + 1;
  *(write ? &pager->write_free : &pager->read_free) = count;
}

/* Overlays follow one another from `homes` on: first it is found how large each is. */
static void place_overlays(flap_pager *pager, unsigned char *homes) {
  overlay_sides sides;
  sides.count = 0;
  for (uint32_t i = 0; i < pager->region_count; i++) {
    const pager_region *region = &pager->regions[i];
    if (region->overlay > 0)
      (void)extend_side(&sides, region->overlay, region->side, pager_chunk_bytes(pager, region, 0, region->ram_pages));
  }
  uint64_t at = 0;
  for (uint32_t i = 0; i < sides.count; i++) {
    uint64_t *of = sides.bytes[i];
    const uint64_t bytes = of[0] > of[1] ? of[0] : of[1];
    of[0] = of[1] = at; /* of its next region, from here on */
    at += bytes;
  }
  for (uint32_t i = 0; i < pager->region_count; i++) {
    pager_region *region = &pager->regions[i];
    if (region->overlay == 0)
      continue;
    uint64_t *next = &sides.bytes[region->overlay - 1][region->side];
    region->home = homes + *next;
    *next += pager_chunk_bytes(pager, region, 0, region->ram_pages);
  }
}

void pager_place(flap_pager *pager, unsigned char *homes, unsigned char *staging, unsigned char *vram) {
  for (uint32_t i = 0; i < pager->region_count; i++) {
    pager_region *region = &pager->regions[i];
    if (region->ring == FLAP_PAGER_RESIDENT) {
      region->home = vram;
      vram += region->bytes;
    } else if (region->ram_pages > 0 && region->overlay == 0) {
      region->home = homes;
      homes += pager_chunk_bytes(pager, region, 0, region->ram_pages);
    }
  }
  place_overlays(pager, homes);
  for (uint32_t i = 0; i < pager->slot_count; i++) {
    pager_slot *s = &pager->slots[i];
    const uint64_t slot_bytes = pager->rings[s->ring].slot_bytes;
    if (s->loan != PAGER_NONE) {
      const pager_loan *loan = &pager->loans[s->loan];
      s->memory = pager->regions[loan->region].home + (i - loan->first_slot) * slot_bytes;
      continue;
    }
    s->memory = vram;
    vram += slot_bytes;
  }
  pager->staging = staging;
  for (uint32_t i = 0; i < pager->buffer_count; i++) {
    pager_buffer *buffer = &pager->buffers[i];
    buffer->memory = staging + i * (pager->read_buffers > 0 ? pager->transfer_bytes : pager->snapshot_bytes);
    buffer->lease = buffer->next = PAGER_NONE;
  }
  link_free(pager, false, 0, pager->read_buffers);
  link_free(pager, true, pager->read_buffers, pager->write_buffers);
  pager->bounce = staging + (pager->write_buffers > 0 ? pager->read_buffers * pager->transfer_bytes : 0);
}

/* ---- overlays ----------------------------------------------------------------------------------------- */

static void check_other_side(flap_pager *pager, const pager_region *region) {
  const pager_overlay *overlay = &pager->overlays[region->overlay - 1];
  const uint32_t other = 1u - region->side, index = (uint32_t)(region - pager->regions);
  if (overlay->held[other] > 0)
    pager_mistake(pager, "region %u shares its RAM with %u regions of overlay %u that hold something", index,
                  overlay->held[other], region->overlay);
  flap_assert(overlay->storing[other] == 0); /* what holds nothing was loaded, so it was home */
}

void pager_set_holds(flap_pager *pager, pager_region *region, bool holds) {
  if (region->overlay > 0) {
    uint32_t *held = &pager->overlays[region->overlay - 1].held[region->side];
    if (holds)
      check_other_side(pager, region);
    *held += holds;
    *held -= region->holds;
  }
  region->holds = holds;
}

void pager_count_store(flap_pager *pager, const pager_region *region, bool begins) {
  if (region->overlay == 0)
    return;
  uint32_t *storing = &pager->overlays[region->overlay - 1].storing[region->side];
  flap_assert(begins || *storing > 0);
  begins ? ++*storing : --*storing;
}
