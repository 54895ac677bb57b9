/* The linear space over several disks.
 *
 * Which part of each disk is used follows from their weights (block_map_use); these parts are the sizes from then on.
 *
 * Stripes go round the disks in a short pattern in which each disk has slots in proportion to its size. Where sizes are
 * in a small ratio the pattern is exact and one phase covers everything. Where they are not, the pattern is rounded;
 * it then repeats until some disk is nearly full, and the next phase begins with a pattern made for what is left.
 * Every phase keeps these properties:
 *
 * 1. A disk's stripes are used in order and without gaps, from 0 on.
 * 2. No disk is asked for more than it has: a weight never exceeds what is left of the disk, since the period never
 *    exceeds what is left of all of them.
 * 3. At least one repeat is made, so phases come to an end; together they use every stripe of every disk.
 * 4. There are at most block_map_phases_max: those that do not go by size take a stripe of each disk that has any,
 *    and each of these fills one.
 */
#include "io/block/block_internal.h"

#include "base/assert.h"
#include "base/units.h"

#include <string.h>

#define PHASES_MORE 8u

__extension__ typedef unsigned __int128 uint128;

/* ---- how much of each disk --------------------------------------------------------------------------------- */

/* Disks that are too small for their share are taken whole, until the others' shares of what is left fit them. Returns
 * the sum of their weights. */
static uint128 fill_small(uint32_t disk_count, const flap_block_disk *disks, const uint64_t *size, uint64_t *left,
                          bool *full, uint64_t *used) {
  for (;;) {
    uint128 weights = 0;
    for (uint32_t d = 0; d < disk_count; d++)
      weights += full[d] ? 0 : disks[d].weight;
    bool found = false;
    for (uint32_t d = 0; d < disk_count && !found; d++) {
      if (full[d] || (uint128)*left * disks[d].weight < weights * size[d])
        continue;
      found = full[d] = true;
      used[d] = size[d];
      *left -= size[d];
    }
    if (!found)
      return weights;
  }
}

void block_map_use(uint32_t disk_count, const flap_block_disk *disks, uint64_t stripe_bytes, uint64_t bytes,
                   flap_block_disk *used_out) {
  uint64_t size[FLAP_BLOCK_DISKS_MAX], used[FLAP_BLOCK_DISKS_MAX] = {0}, total = 0;
  bool full[FLAP_BLOCK_DISKS_MAX] = {false}, weighted = disk_count > 1;
  memcpy(used_out, disks, disk_count * sizeof *disks);
  if (!weighted)
    return;
  uint64_t left = bytes / stripe_bytes + (bytes % stripe_bytes != 0);
  for (uint32_t d = 0; d < disk_count; d++) {
    weighted = weighted && disks[d].weight > 0;
    size[d] = disks[d].bytes / stripe_bytes;
    total += size[d];
  }
  if (!weighted || left > total)
    return;
  const uint128 weights = fill_small(disk_count, disks, size, &left, full, used);
  uint64_t given = 0;
  for (uint32_t d = 0; d < disk_count; d++) {
    used[d] = full[d] ? used[d] : (uint64_t)((uint128)left * disks[d].weight / weights);
    given += full[d] ? 0 : used[d];
  }
  for (uint32_t d = 0; given < left; d = (d + 1) % disk_count) /* what rounding left: a stripe each, there is room */
    if (!full[d] && used[d] < size[d]) {
      used[d]++;
      given++;
    }
  for (uint32_t d = 0; d < disk_count; d++)
    used_out[d].bytes = used[d] * stripe_bytes;
}

void flap_block_share(const flap_block_config *config, uint64_t bytes_out[FLAP_BLOCK_DISKS_MAX]) {
  flap_block_disk used[FLAP_BLOCK_DISKS_MAX];
  uint64_t total = 0;
  memset(bytes_out, 0, FLAP_BLOCK_DISKS_MAX * sizeof *bytes_out);
  block_map_use(config->disk_count, config->disks, config->stripe_bytes, config->bytes, used);
  for (uint32_t d = 0; d < config->disk_count; d++)
    total += used[d].bytes;
  for (uint32_t d = 0; d < config->disk_count && total > 0; d++)
    bytes_out[d] = (uint64_t)((uint128)used[d].bytes * config->bytes / total);
}

/* ---- the pattern -------------------------------------------------------------------------------------------- */

static uint64_t greatest_divisor(uint64_t a, uint64_t b) {
  while (b != 0) {
    uint64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

/* Weights by the method of largest remainders: floors first, then one more for the largest fractions. */
static void weigh(uint32_t disk_count, const uint64_t *left, uint64_t total, uint32_t period, uint8_t *weight_out) {
  uint64_t rest[FLAP_BLOCK_DISKS_MAX];
  uint32_t given = 0;
  for (uint32_t d = 0; d < disk_count; d++) {
    uint128 share = (uint128)left[d] * period;
    weight_out[d] = (uint8_t)(share / total);
    rest[d] = (uint64_t)(share % total);
    given += weight_out[d];
  }
  while (given < period) {
    uint32_t best = 0;
    for (uint32_t d = 1; d < disk_count; d++)
      if (rest[d] > rest[best])
        best = d;
    flap_assert(rest[best] > 0);
    rest[best] = 0;
    weight_out[best]++;
    given++;
  }
}

/* Spreads each disk's slots evenly: every slot goes to the disk that is furthest behind its share. */
static void spread(uint32_t disk_count, block_phase *phase) {
  int32_t credit[FLAP_BLOCK_DISKS_MAX] = {0};
  uint8_t rank[FLAP_BLOCK_DISKS_MAX] = {0};
  for (uint32_t slot = 0; slot < phase->period; slot++) {
    uint32_t best = 0;
    for (uint32_t d = 0; d < disk_count; d++) {
      credit[d] += phase->weight[d];
      if (credit[d] > credit[best])
        best = d;
    }
    credit[best] -= (int32_t)phase->period;
    phase->slot_disk[slot] = (uint8_t)best;
    phase->slot_rank[slot] = rank[best]++;
  }
}

/* A slot for each disk that has a stripe left: a phase of this kind ends with a disk that is full. */
static uint32_t weigh_equally(uint32_t disk_count, const uint64_t *left, uint8_t *weight_out) {
  uint32_t period = 0;
  for (uint32_t d = 0; d < disk_count; d++) {
    weight_out[d] = left[d] > 0;
    period += weight_out[d];
  }
  return period;
}

/* The phase that begins with `used` stripes of each disk taken, out of `size`. False when nothing is left. */
static bool next_phase(uint32_t disk_count, const uint64_t *size, const uint64_t *used, uint64_t stripe_first,
                       bool equally, block_phase *phase_out) {
  uint64_t left[FLAP_BLOCK_DISKS_MAX], total = 0, divisor = 0;
  for (uint32_t d = 0; d < disk_count; d++) {
    left[d] = size[d] - used[d];
    total += left[d];
    divisor = greatest_divisor(divisor, left[d]);
  }
  if (total == 0)
    return false;
  memset(phase_out, 0, sizeof *phase_out);
  phase_out->stripe_first = stripe_first;
  uint64_t exact = total / divisor;
  phase_out->period = exact < BLOCK_PATTERN_MAX ? (uint32_t)exact : BLOCK_PATTERN_MAX;
  if (equally)
    phase_out->period = weigh_equally(disk_count, left, phase_out->weight);
  else
    weigh(disk_count, left, total, phase_out->period, phase_out->weight);
  phase_out->repeats = UINT64_MAX;
  for (uint32_t d = 0; d < disk_count; d++) {
    phase_out->stripe_base[d] = used[d];
    if (phase_out->weight[d] > 0 && left[d] / phase_out->weight[d] < phase_out->repeats)
      phase_out->repeats = left[d] / phase_out->weight[d];
  }
  flap_assert(phase_out->repeats > 0);
  spread(disk_count, phase_out);
  return true;
}

/* Walks through the phases. What is left after those that go by size is hardly anything. */
static uint32_t make_phases(uint32_t disk_count, const flap_block_disk *disks, uint64_t stripe_bytes, uint32_t by_size,
                            block_phase *phases) {
  uint64_t size[FLAP_BLOCK_DISKS_MAX], used[FLAP_BLOCK_DISKS_MAX] = {0}, stripe = 0;
  for (uint32_t d = 0; d < disk_count; d++)
    size[d] = disks[d].bytes / stripe_bytes;
  uint32_t count = 0;
  for (block_phase phase; next_phase(disk_count, size, used, stripe, count >= by_size, &phase); count++) {
    for (uint32_t d = 0; d < disk_count; d++)
      used[d] += phase.repeats * phase.weight[d];
    stripe += phase.repeats * phase.period;
    flap_assert(count < by_size + disk_count);
    phases[count] = phase;
  }
  return count;
}

uint32_t block_map_phases_by_size(uint32_t disk_count) {
  return disk_count + PHASES_MORE;
}

void block_map_build(block_map *map, uint32_t disk_count, const flap_block_disk *disks, uint64_t stripe_bytes,
                     uint32_t by_size, block_phase *phases) {
  *map = (block_map){.disk_count = disk_count, .stripe_bytes = stripe_bytes, .phases = phases};
  if (disk_count > 1)
    map->phase_count = make_phases(disk_count, disks, stripe_bytes, by_size, phases);
}

/* The last phase that begins at or before the stripe. */
static const block_phase *phase_of(const block_map *map, uint64_t stripe) {
  uint32_t low = 0, high = map->phase_count;
  while (high - low > 1) {
    uint32_t middle = low + (high - low) / 2;
    if (map->phases[middle].stripe_first <= stripe)
      low = middle;
    else
      high = middle;
  }
  return &map->phases[low];
}

static uint64_t stripe_place(const block_map *map, uint64_t stripe, uint32_t *disk_out) {
  const block_phase *phase = phase_of(map, stripe);
  uint64_t repeat = (stripe - phase->stripe_first) / phase->period;
  uint32_t slot = (uint32_t)((stripe - phase->stripe_first) % phase->period);
  flap_assert(repeat < phase->repeats);
  uint32_t disk = phase->slot_disk[slot];
  *disk_out = disk;
  return phase->stripe_base[disk] + repeat * phase->weight[disk] + phase->slot_rank[slot];
}

block_run block_map_find(const block_map *map, uint64_t offset, uint64_t bytes) {
  if (map->disk_count == 1)
    return (block_run){.disk = 0, .offset = offset, .bytes = bytes};
  uint64_t stripe = offset / map->stripe_bytes, inside = offset % map->stripe_bytes;
  block_run run = {0};
  uint64_t place = stripe_place(map, stripe, &run.disk);
  run.offset = place * map->stripe_bytes + inside;
  run.bytes = map->stripe_bytes - inside;
  /* Neighbours that are neighbours on the disk too travel together. */
  while (run.bytes < bytes) {
    uint32_t disk = 0;
    if (stripe_place(map, ++stripe, &disk) != ++place || disk != run.disk)
      break;
    run.bytes += map->stripe_bytes;
  }
  if (run.bytes > bytes)
    run.bytes = bytes;
  return run;
}

uint64_t block_map_disk_bytes(const block_map *map, uint32_t disk, uint64_t bytes) {
  if (map->disk_count == 1)
    return bytes;
  uint64_t stripes = bytes / map->stripe_bytes + (bytes % map->stripe_bytes != 0), count = 0;
  for (uint32_t p = 0; p < map->phase_count && stripes > 0; p++) {
    const block_phase *phase = &map->phases[p];
    uint64_t here = phase->repeats * phase->period;
    if (stripes < here)
      here = stripes;
    count += here / phase->period * phase->weight[disk];
    for (uint32_t slot = 0; slot < here % phase->period; slot++)
      count += phase->slot_disk[slot] == disk;
    stripes -= here;
  }
  return count * map->stripe_bytes;
}

uint32_t block_map_runs_max(uint32_t disk_count, uint64_t stripe_bytes) {
  return disk_count == 1 ? 1 : (uint32_t)((FLAP_BLOCK_REQUEST_BYTES_MAX - 1) / stripe_bytes + 2);
}
