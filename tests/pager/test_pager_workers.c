/* Workers check several buffers at once, and the pager goes on meanwhile: the linker sends every checksum here first,
 * where it waits for others. */
#include "pager/pager_internal.h"

#include "base/units.h"
#include "io/block/checksum.h"

#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORKERS 3u
#define PAGES 8u
#define PATIENCE_NS (20u * 1000 * 1000 * 1000) /* a machine that is slower than this fails the test */

static _Atomic uint32_t inside, inside_most, pieces, waiting_in_vain;
static uint32_t wanted_inside, wanted_pieces; /* before a checksum goes on */

uint64_t __real_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);
uint64_t __wrap_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch);

uint64_t __wrap_flap_block_checksum(const void *data, uint64_t bytes, uint32_t region, uint32_t page, uint64_t epoch) {
  const uint32_t now = ++inside;
  for (uint32_t most = inside_most; now > most && !atomic_compare_exchange_weak(&inside_most, &most, now);)
    ;
  const uint64_t end_ns = flap_units_now_ns() + PATIENCE_NS;
  while (inside_most < wanted_inside || pieces < wanted_pieces) {
    if (flap_units_now_ns() > end_ns) {
      waiting_in_vain++;
      break;
    }
    usleep(100);
  }
  const uint64_t sum = __real_flap_block_checksum(data, bytes, region, page, epoch);
  inside--;
  return sum;
}

static flap_status fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context;
  memset(memory, (int)(offset / FLAP_BLOCK_ALIGN) + 1, bytes);
  pieces++;
  return FLAP_OK;
}

static flap_status drain(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  (void)context;
  const unsigned char *at = memory;
  ck_assert_uint_eq(at[0], offset / FLAP_BLOCK_ALIGN + 1);
  ck_assert_uint_eq(at[bytes - 1], at[0]);
  return FLAP_OK;
}

static flap_pager *open_pager(flap_arena *arena, uint32_t workers) {
  static const flap_pager_region region = {.bytes = PAGES * FLAP_BLOCK_ALIGN, .ring = 0};
  static const flap_pager_ring ring = {.name = "ring", .slot_bytes = PAGES * FLAP_BLOCK_ALIGN, .slots = 1};
  flap_pager_config config = {.page_bytes = FLAP_BLOCK_ALIGN,
                              .transfer_bytes = FLAP_BLOCK_ALIGN,
                              .region_count = 1,
                              .regions = &region,
                              .ring_count = 1,
                              .rings = &ring,
                              .read_buffers = PAGES,
                              .write_buffers = PAGES,
                              .workers = workers,
                              .leases_max = 1};
  flap_pager_sizes sizes;
  flap_pager *pager = NULL;
  flap_pager_measure(&config, &sizes);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  config.disk = (flap_block_config){.backend = FLAP_BLOCK_SIM, .disk_count = 1, .disks = {{.bytes = sizes.disk_bytes}}};
  ck_assert_int_eq(flap_arena_open(arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_msg(flap_pager_open(&config, arena, &pager) == FLAP_OK, "%s", flap_error_message());
  return pager;
}

/* Tests may run in one process. */
static void setup(void) {
  inside = inside_most = pieces = waiting_in_vain = 0;
  wanted_inside = wanted_pieces = 0;
}

/* No checksum ends before as many are under way as there are workers and all buffers were filled: so the pager's lock
 * is held by none of them. Reads are verified side by side likewise. */
START_TEST(workers_check_buffers_side_by_side_while_the_pager_goes_on) {
  flap_arena arena;
  flap_pager *pager = open_pager(&arena, WORKERS);
  wanted_inside = WORKERS;
  wanted_pieces = PAGES;
  ck_assert_int_eq(flap_pager_fill(pager, 0, fill, NULL), FLAP_OK);
  ck_assert_uint_eq(waiting_in_vain, 0);
  ck_assert_uint_eq(inside_most, WORKERS);
  inside_most = 0;
  ck_assert_int_eq(flap_pager_drain(pager, 0, drain, NULL), FLAP_OK);
  ck_assert_uint_eq(waiting_in_vain, 0);
  ck_assert_uint_eq(inside_most, WORKERS);
  flap_pager_close(pager);
  flap_arena_close(&arena);
}
END_TEST

START_TEST(without_workers_the_transfer_thread_checks_one_buffer_at_a_time) {
  flap_arena arena;
  flap_pager *pager = open_pager(&arena, 0);
  ck_assert_int_eq(flap_pager_fill(pager, 0, fill, NULL), FLAP_OK);
  ck_assert_int_eq(flap_pager_drain(pager, 0, drain, NULL), FLAP_OK);
  ck_assert_uint_eq(inside_most, 1);
  flap_pager_close(pager);
  flap_arena_close(&arena);
}
END_TEST

int main(void) {
  pager_full_checks = true;
  pager_small_bytes = 0;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("workers");
  tcase_set_timeout(tcase, 60);
  tcase_add_checked_fixture(tcase, setup, NULL);
  tcase_add_test(tcase, workers_check_buffers_side_by_side_while_the_pager_goes_on);
  tcase_add_test(tcase, without_workers_the_transfer_thread_checks_one_buffer_at_a_time);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
