/* The pool: what stands there instead of on disk, how evenly, what of it when bytes do not shrink or are damaged, and
 * that no block is ever lost. */
#include "pager/pager_internal.h"

#include "base/philox.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#define PAGE (128u << 10)
#if defined(__SANITIZE_THREAD__)
#define PAGES 16u
#else
#define PAGES 32u
#endif
#define REGION_BYTES ((uint64_t)PAGES * PAGE)
#define REGIONS 2u

typedef struct rig {
  flap_arena arena;
  flap_pager *pager;
  unsigned char *plain[REGIONS];
  flap_pager_stats before;
} rig;

typedef enum content { NUMBERS, NOISE } content;

/* One page as often as there are, but for its number. */
static void make_bytes(rig *r, uint32_t region, content what) {
  const flap_philox stream = flap_philox_stream(region, "pool");
  unsigned char *page = r->plain[region] = malloc(REGION_BYTES);
  for (uint32_t i = 0; i < PAGE; i += 4) {
    uint32_t word = (uint32_t)flap_philox_below(&stream, i, (uint64_t)1 << 32);
    if (what == NUMBERS) /* of exponents there are four */
      word = (word & 0x80ffffff) | 0x3d000000;
    memcpy(page + i, &word, sizeof word);
  }
  for (uint32_t i = 1; i < PAGES; i++) {
    memcpy(page + i * PAGE, page, PAGE);
    memcpy(page + i * PAGE, &i, sizeof i);
  }
}

static void rig_open(rig *r, uint64_t pool_bytes, uint32_t workers, content first, content second, bool shared) {
  flap_pager_region regions[REGIONS];
  for (uint32_t i = 0; i < REGIONS; i++)
    regions[i] = (flap_pager_region){.bytes = REGION_BYTES, .element_bytes = 4, .klass = (uint8_t)i};
  const flap_pager_ring ring = {.name = "ring", .slot_bytes = REGION_BYTES, .slots = 1};
  flap_pager_config config = {.page_bytes = PAGE,
                              .transfer_bytes = PAGE,
                              .region_count = REGIONS,
                              .regions = regions,
                              .ring_count = 1,
                              .rings = &ring,
                              .read_buffers = 4,
                              .write_buffers = 4,
                              .workers = workers,
                              .compression = FLAP_COMPRESSION_ZSTD,
                              .pool_bytes = pool_bytes / FLAP_PAGER_POOL_BLOCK * FLAP_PAGER_POOL_BLOCK,
                              .leases_max = REGIONS};
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  ck_assert_uint_eq(sizes.pool_bytes, config.pool_bytes);
  ck_assert_uint_eq(sizes.disk_bytes, REGIONS * REGION_BYTES); /* whatever stands in the pool */
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  config.disk = (flap_block_config){
      .backend = FLAP_BLOCK_SIM, .disk_count = 1, .disks = {{.bytes = sizes.disk_bytes}}, .sim = {.seed = 1}};
  ck_assert_int_eq(flap_arena_open(&r->arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_msg(flap_pager_open(&config, &r->arena, &r->pager) == FLAP_OK, "%s", flap_error_message());
  r->pager->regions[1].shared = shared; /* a folder for it is another test's */
  pager_pool_init(r->pager);
  make_bytes(r, 0, first);
  make_bytes(r, 1, second);
}

static void rig_close(rig *r) {
  flap_pager_close(r->pager);
  flap_arena_close(&r->arena);
  for (uint32_t i = 0; i < REGIONS; i++)
    free(r->plain[i]);
}

static flap_status fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  memcpy(memory, (const unsigned char *)context + offset, bytes);
  return FLAP_OK;
}

static flap_status drain(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  ck_assert_mem_eq(memory, (const unsigned char *)context + offset, bytes);
  return FLAP_OK;
}

/* Each block is free, or of one chunk. */
static void check_blocks(const flap_pager *pager) {
  const pager_pool *pool = &pager->pool;
  uint32_t *seen = calloc(pool->block_count + 1, sizeof *seen), free_count = 0, all = 0;
  for (uint32_t block = pool->free_head; block != PAGER_NONE; block = pool->next[block], free_count++)
    ck_assert_uint_eq(seen[block]++, 0);
  ck_assert_uint_eq(free_count, pool->free_count);
  for (uint32_t page = 0; page < pager->page_count; page++)
    for (uint32_t block = pool->heads[page]; block != PAGER_NONE; block = pool->next[block])
      ck_assert_uint_eq(seen[block]++, 0);
  for (uint32_t block = 0; block < pool->block_count; block++)
    all += seen[block];
  ck_assert_uint_eq(all, pool->block_count);
  free(seen);
}

/* Writes and reads all so often; what the last of these moved. */
static flap_pager_stats run_steps(rig *r, uint32_t steps) {
  static const flap_lease leases[REGIONS] = {{.region = 0, .mode = FLAP_LEASE_UPDATE},
                                             {.region = 1, .mode = FLAP_LEASE_UPDATE}};
  flap_pager_stats before = {.reread = 0}, after = {.reread = 0};
  for (uint32_t step = 0; step < steps; step++) {
    flap_pager_get_stats(r->pager, &before);
    ck_assert_int_eq(flap_pager_begin(r->pager, leases, REGIONS), FLAP_OK);
    for (uint32_t i = 0; i < REGIONS; i++) {
      void *memory = NULL;
      ck_assert_int_eq(flap_pager_pin(r->pager, i, &memory), FLAP_OK);
      ck_assert_mem_eq(memory, r->plain[i], REGION_BYTES);
      flap_pager_unpin(r->pager, i);
    }
    ck_assert_int_eq(flap_pager_end(r->pager), FLAP_OK);
    ck_assert_int_eq(flap_pager_settle(r->pager), FLAP_OK);
    check_blocks(r->pager);
  }
  flap_pager_get_stats(r->pager, &after);
  for (int i = 0; i < 2; i++) {
    const int lane = i == 0 ? FLAP_LANE_DISK_READ : FLAP_LANE_DISK_WRITE;
    after.bytes[lane] -= before.bytes[lane];
    after.disk_bytes[i] -= before.disk_bytes[i];
    after.pooled_bytes[i] -= before.pooled_bytes[i];
    ck_assert_uint_eq(after.bytes[lane], REGIONS * REGION_BYTES); /* as planned, wherever they stand */
  }
  return after;
}

static void fill_and_drain(rig *r, bool drains) {
  for (uint32_t i = 0; i < REGIONS; i++)
    ck_assert_int_eq(drains ? flap_pager_drain(r->pager, i, drain, r->plain[i])
                            : flap_pager_fill(r->pager, i, fill, r->plain[i]),
                     FLAP_OK);
}

static const uint32_t worker_counts[] = {0, 3};

START_TEST(with_room_for_all_disks_rest_even_where_nothing_shrinks) {
  rig r;
  rig_open(&r, 3 * REGION_BYTES, worker_counts[_i], NUMBERS, NOISE, false);
  fill_and_drain(&r, false);
  const flap_pager_stats last = run_steps(&r, 8);
  for (int i = 0; i < 2; i++) {
    ck_assert_uint_eq(last.pooled_bytes[i], REGIONS * REGION_BYTES);
    ck_assert_uint_eq(last.disk_bytes[i], 0);
  }
  fill_and_drain(&r, true);
  rig_close(&r);
}
END_TEST

START_TEST(what_fits_is_more_than_the_pool_and_evenly_spread) {
  rig r;
  rig_open(&r, REGION_BYTES, worker_counts[_i], NUMBERS, NUMBERS, false);
  fill_and_drain(&r, false);
  const flap_pager_stats last = run_steps(&r, 8);
  ck_assert_uint_gt(last.pooled_bytes[1], REGION_BYTES + REGION_BYTES / 20); /* of the numbers a seventh goes */
  ck_assert_uint_lt(last.pooled_bytes[1], REGION_BYTES + REGION_BYTES / 4);
  for (uint32_t first = 0; first + 8 <= REGIONS * PAGES; first += 4) {
    uint32_t pooled = 0;
    for (uint32_t page = first; page < first + 8; page++)
      pooled += r.pager->pool.heads[page] != PAGER_NONE;
    ck_assert_msg(pooled >= 2 && pooled <= 7, "of the 8 pages from %u on %u are in the pool", first, pooled);
  }
  fill_and_drain(&r, true);
  rig_close(&r);
}
END_TEST

START_TEST(what_does_not_shrink_leaves_the_room_to_what_does) {
  rig r;
  rig_open(&r, REGION_BYTES / 2, worker_counts[_i], NUMBERS, NOISE, false);
  fill_and_drain(&r, false);
  const flap_pager_stats last = run_steps(&r, 8);
  uint32_t noise = 0;
  for (uint32_t page = 0; page < PAGES; page++)
    noise += r.pager->pool.heads[PAGES + page] != PAGER_NONE;
  ck_assert_uint_le(noise, 6); /* credit of 32 pages at 0.31, less 4 that are not spent on noise */
  ck_assert_uint_gt(last.pooled_bytes[1], REGION_BYTES / 3);
  rig_close(&r);
}
END_TEST

START_TEST(regions_that_checkpoints_share_stay_on_disk) {
  rig r;
  rig_open(&r, 3 * REGION_BYTES, 3, NUMBERS, NUMBERS, true);
  ck_assert_int_eq(flap_pager_fill(r.pager, 0, fill, r.plain[0]), FLAP_OK);
  pthread_mutex_lock(&r.pager->work_lock);
  const pager_buffer of[] = {{.region = 0}, {.region = 1}};
  ck_assert(pager_pool_wants(r.pager, &of[0]));
  ck_assert(!pager_pool_wants(r.pager, &of[1]));
  pthread_mutex_unlock(&r.pager->work_lock);
  rig_close(&r);
}
END_TEST

START_TEST(damage_in_the_pool_is_said_to_be_the_memorys) {
  rig r;
  rig_open(&r, 3 * REGION_BYTES, worker_counts[_i], NUMBERS, NUMBERS, false);
  fill_and_drain(&r, false);
  const uint32_t head = r.pager->pool.heads[3];
  ck_assert_uint_ne(head, PAGER_NONE);
  r.pager->pool.memory[head * FLAP_PAGER_POOL_BLOCK] ^= 0xff; /* the first byte of what says how it is encoded */
  ck_assert_int_eq(flap_pager_drain(r.pager, 0, drain, r.plain[0]), FLAP_CORRUPT);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "ram: region 0, page 3"));
  rig_close(&r);
}
END_TEST

START_TEST(expected_share_is_what_a_pool_holds_of_states_that_shrink_by_an_eighth) {
  ck_assert_double_eq(flap_pager_pooled_share(0, 1000000), 0);
  ck_assert_double_eq(flap_pager_pooled_share(1000000, 1000000), 1);
  ck_assert_double_eq_tol(flap_pager_pooled_share(500000, 1000000), 0.5 / 0.87, 0.01);
}
END_TEST

int main(void) {
  pager_full_checks = true;
  const int both = (int)(sizeof worker_counts / sizeof *worker_counts);
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("pool");
  tcase_set_timeout(tcase, 120);
  tcase_add_loop_test(tcase, with_room_for_all_disks_rest_even_where_nothing_shrinks, 0, both);
  tcase_add_loop_test(tcase, what_fits_is_more_than_the_pool_and_evenly_spread, 0, both);
  tcase_add_loop_test(tcase, what_does_not_shrink_leaves_the_room_to_what_does, 0, both);
  tcase_add_test(tcase, regions_that_checkpoints_share_stay_on_disk);
  tcase_add_loop_test(tcase, damage_in_the_pool_is_said_to_be_the_memorys, 0, both);
  tcase_add_test(tcase, expected_share_is_what_a_pool_holds_of_states_that_shrink_by_an_eighth);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
