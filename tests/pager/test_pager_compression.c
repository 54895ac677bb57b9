/* When pages are compressed, where they stand then, and what happens to those that were damaged in ways that no
 * checksum tells: the linker sends every checksum here, which can be made blind. */
#include "pager/pager_internal.h"

#include "base/philox.h"
#include "io/block/checksum.h"

#include <check.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define PAGE (64u << 10)
#define PAGES 8u
#define PER_CHUNK 4u
#define REGIONS 2u /* the first holds numbers that shrink, the second noise */

static atomic_bool blind;

uint64_t __real_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);
uint64_t __wrap_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);

uint64_t __wrap_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch) {
  return blind ? 0 : __real_flap_block_checksum(data, bytes, region, page, epoch);
}

typedef struct rig {
  flap_arena arena;
  flap_pager *pager;
  unsigned char *plain[REGIONS];
} rig;

static void make_bytes(rig *r) {
  flap_philox stream = flap_philox_stream(5, "pages");
  uint64_t drawn = 0;
  for (uint32_t region = 0; region < REGIONS; region++) {
    r->plain[region] = malloc(PAGES * PAGE);
    for (uint32_t i = 0; i < PAGES * PAGE; i += 4) {
      uint32_t word = (uint32_t)flap_philox_below(&stream, drawn++, (uint64_t)1 << 32);
      if (region == 0) /* the pages differ in how far they shrink */
        word = i / PAGE % 3 == 0 ? word & 0x00030000 : i / PAGE % 3 == 1 ? (word & 0x8000ffff) | 0x3d800000 : word;
      memcpy(r->plain[region] + i, &word, sizeof word);
    }
  }
}

static flap_status fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  memcpy(memory, (const unsigned char *)context + offset, bytes);
  return FLAP_OK;
}

static flap_status drain(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  ck_assert_mem_eq(memory, (const unsigned char *)context + offset, bytes);
  return FLAP_OK;
}

static flap_status drain_blindly(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  (void)context, (void)offset, (void)bytes, (void)memory;
  return FLAP_OK;
}

static uint32_t workers = 2;

static void rig_open(rig *r, flap_compression compression, double disk_bytes_per_second, const flap_block_sim *sim) {
  flap_pager_region regions[REGIONS];
  for (uint32_t i = 0; i < REGIONS; i++)
    regions[i] = (flap_pager_region){.bytes = PAGES * PAGE, .ring = 0, .element_bytes = 4, .klass = (uint8_t)i};
  const flap_pager_ring ring = {.name = "ring", .slot_bytes = PAGES * PAGE, .slots = 1};
  flap_pager_config config = {
      .page_bytes = PAGE,
      .transfer_bytes = PER_CHUNK * PAGE,
      .region_count = REGIONS,
      .regions = regions,
      .ring_count = 1,
      .rings = &ring,
      .read_buffers = 2,
      .write_buffers = 2,
      .workers = workers,
      .compression = compression,
      .disk_rates = {.alone_bytes = disk_bytes_per_second, .other_alone_bytes = disk_bytes_per_second},
      .shared_cores = true,
      .leases_max = REGIONS};
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  config.disk = (flap_block_config){
      .backend = FLAP_BLOCK_SIM, .disk_count = 1, .disks = {{.bytes = sizes.disk_bytes}}, .sim = *sim};
  ck_assert_int_eq(flap_arena_open(&r->arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_msg(flap_pager_open(&config, &r->arena, &r->pager) == FLAP_OK, "%s", flap_error_message());
  make_bytes(r);
}

static void rig_close(rig *r) {
  flap_pager_close(r->pager);
  flap_arena_close(&r->arena);
  for (uint32_t i = 0; i < REGIONS; i++)
    free(r->plain[i]);
}

static void fill_all(rig *r) {
  for (uint32_t i = 0; i < REGIONS; i++)
    ck_assert_int_eq(flap_pager_fill(r->pager, i, fill, r->plain[i]), FLAP_OK);
}

/* ---- where pages stand ----------------------------------------------------------------------------------- */

START_TEST(pages_of_a_chunk_are_packed_from_its_place_on) {
  rig r;
  uint32_t encoded = 0, plain = 0;
  rig_open(&r, FLAP_COMPRESSION_LZ4, 0, &(flap_block_sim){.seed = 1});
  fill_all(&r);
  for (uint32_t i = 0; i < REGIONS; i++) {
    const pager_page *page = pager_pages_of(r.pager, &r.pager->regions[i]);
    for (uint32_t j = 0; j < PAGES; j++) {
      const uint32_t place = (i * PAGES + j / PER_CHUNK * PER_CHUNK) * (PAGE / FLAP_BLOCK_ALIGN);
      const uint32_t before = page[j > 0 ? j - 1 : 0].extent + page[j > 0 ? j - 1 : 0].stored_bytes / FLAP_BLOCK_ALIGN;
      ck_assert_uint_eq(page[j].extent, j % PER_CHUNK == 0 ? place : before);
      ck_assert_uint_eq(page[j].stored_bytes % FLAP_BLOCK_ALIGN, 0);
      ck_assert(i == 0 || page[j].stored_bytes == PAGE); /* noise stays as it is */
      encoded += page[j].stored_bytes < PAGE;
      plain += page[j].stored_bytes == PAGE;
    }
  }
  ck_assert_uint_ge(encoded, PAGES / 2);
  ck_assert_uint_gt(plain, PAGES); /* of the first region too: plain pages move within a chunk */
  for (uint32_t i = 0; i < REGIONS; i++)
    ck_assert_int_eq(flap_pager_drain(r.pager, i, drain, r.plain[i]), FLAP_OK);
  rig_close(&r);
}
END_TEST

/* ---- when ------------------------------------------------------------------------------------------------- */

/* Writes all regions so often, and checks them; `on` is what `auto` thinks of each class then. */
static void run_steps(rig *r, uint32_t steps, bool on[REGIONS]) {
  static const flap_lease leases[REGIONS] = {{.region = 0, .mode = FLAP_LEASE_UPDATE},
                                             {.region = 1, .mode = FLAP_LEASE_UPDATE}};
  for (uint32_t step = 0; step < steps; step++) {
    ck_assert_int_eq(flap_pager_begin(r->pager, leases, REGIONS), FLAP_OK);
    for (uint32_t i = 0; i < REGIONS; i++) {
      void *memory = NULL;
      ck_assert_int_eq(flap_pager_pin(r->pager, i, &memory), FLAP_OK);
      ck_assert_mem_eq(memory, r->plain[i], PAGES * PAGE);
      flap_pager_unpin(r->pager, i);
    }
    ck_assert_int_eq(flap_pager_end(r->pager), FLAP_OK);
  }
  ck_assert_int_eq(flap_pager_settle(r->pager), FLAP_OK);
  for (uint32_t i = 0; i < REGIONS; i++)
    on[i] = r->pager->classes[i].on;
}

START_TEST(auto_compresses_what_shrinks_on_disks_that_are_slow_and_waited_for) {
  rig r;
  bool on[REGIONS];
  flap_pager_stats stats;
  rig_open(&r, FLAP_COMPRESSION_AUTO, 1e6, &(flap_block_sim){.seed = 1, .latency_ns = 2000000});
  fill_all(&r);
  run_steps(&r, 1, on);
  flap_pager_get_stats(r.pager, &stats);
  ck_assert_uint_eq(stats.disk_bytes[1], stats.bytes[FLAP_LANE_DISK_WRITE]); /* nothing was waited for until then */
  run_steps(&r, 150, on);
  ck_assert(on[0] && !on[1]);
  flap_pager_get_stats(r.pager, &stats);
  ck_assert_uint_lt(stats.disk_bytes[0], stats.bytes[FLAP_LANE_DISK_READ]);
  ck_assert_uint_lt(stats.disk_bytes[1], stats.bytes[FLAP_LANE_DISK_WRITE]);
  rig_close(&r);
}
END_TEST

START_TEST(auto_leaves_pages_alone_where_disks_are_faster_than_the_codec) {
  rig r;
  bool on[REGIONS];
  flap_pager_stats stats;
  rig_open(&r, FLAP_COMPRESSION_AUTO, 1e12, &(flap_block_sim){.seed = 1, .latency_ns = 2000000});
  fill_all(&r);
  run_steps(&r, 100, on);
  ck_assert(!on[0] && !on[1]);
  ck_assert(r.pager->classes[0].encode_ns > 0); /* it was looked at */
  flap_pager_get_stats(r.pager, &stats);
  ck_assert_uint_eq(stats.disk_bytes[0], stats.bytes[FLAP_LANE_DISK_READ]);
  ck_assert_uint_eq(stats.disk_bytes[1], stats.bytes[FLAP_LANE_DISK_WRITE]);
  rig_close(&r);
}
END_TEST

/* ---- damage ------------------------------------------------------------------------------------------------ */

/* With checksums that see nothing, a flipped bit gets to the codec: it refuses, or gives other bytes, and nobody
 * crashes. */
START_TEST(damage_that_checksums_miss_is_refused_by_the_codec_or_harmless) {
  uint32_t refused = 0;
  blind = true;
  workers = 0; /* or what is written first, and so turned over, would be now one chunk, now another */
  for (uint64_t seed = 1; seed <= 40; seed++) {
    rig r;
    rig_open(&r, FLAP_COMPRESSION_LZ4, 0, &(flap_block_sim){.seed = seed, .corrupt_write_at = 1});
    ck_assert_int_eq(flap_pager_fill(r.pager, 0, fill, r.plain[0]), FLAP_OK);
    const flap_status status = flap_pager_drain(r.pager, 0, drain_blindly, NULL);
    ck_assert(status == FLAP_OK || status == FLAP_CORRUPT);
    if (status == FLAP_CORRUPT)
      ck_assert_ptr_nonnull(strstr(flap_error_message(), "region 0, page "));
    refused += status == FLAP_CORRUPT;
    rig_close(&r);
  }
  ck_assert_uint_gt(refused, 0);
}
END_TEST

/* A page table that is wrong about a length is found out, by the checksum or else by the codec. */
START_TEST(wrong_length_in_the_table_is_found) {
  for (int blindly = 0; blindly <= 1; blindly++) {
    rig r;
    rig_open(&r, FLAP_COMPRESSION_LZ4, 0, &(flap_block_sim){.seed = 1});
    ck_assert_int_eq(flap_pager_fill(r.pager, 0, fill, r.plain[0]), FLAP_OK);
    pager_page *last = pager_pages_of(r.pager, &r.pager->regions[0]) + PER_CHUNK - 1;
    ck_assert_uint_lt(last->stored_bytes, PAGE);
    ck_assert_uint_gt(last->stored_bytes, FLAP_BLOCK_ALIGN);
    last->stored_bytes -= FLAP_BLOCK_ALIGN;
    blind = blindly;
    ck_assert_int_eq(flap_pager_drain(r.pager, 0, drain_blindly, NULL), FLAP_CORRUPT);
    blind = false;
    rig_close(&r);
  }
}
END_TEST

int main(void) {
  pager_full_checks = true;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("compression");
  tcase_set_timeout(tcase, 120);
  tcase_add_test(tcase, pages_of_a_chunk_are_packed_from_its_place_on);
  tcase_add_test(tcase, auto_compresses_what_shrinks_on_disks_that_are_slow_and_waited_for);
  tcase_add_test(tcase, auto_leaves_pages_alone_where_disks_are_faster_than_the_codec);
  tcase_add_test(tcase, damage_that_checksums_miss_is_refused_by_the_codec_or_harmless);
  tcase_add_test(tcase, wrong_length_in_the_table_is_found);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
