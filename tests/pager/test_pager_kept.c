/* When what was kept has been read again: once a program has, whatever it does with it, and not because something was
 * written since; and never where it is not what was written. */
#include "pager/pager_internal.h"

#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE 4096u
#define PAGES 6u
#define REGIONS 3u /* the last of which has half of its pages in RAM */

typedef struct rig {
  flap_arena arena;
  flap_pager *pager;
  char folder[256];
} rig;

static bool direct = true; /* whatever the file system of the test does */

static bool rig_open(rig *r, uint32_t workers) {
  flap_pager_region regions[REGIONS];
  const flap_pager_ring ring = {.name = "ring", .slot_bytes = PAGES * PAGE, .slots = 1};
  flap_pager_sizes sizes;
  (void)snprintf(r->folder, sizeof r->folder, "%s", scratch_path(""));
  if (!flap_block_can_link(r->folder, r->folder))
    return false;
  for (uint32_t i = 0; i < REGIONS; i++)
    regions[i] = (flap_pager_region){.bytes = PAGES * PAGE, .element_bytes = 4, .shared = true, .in_snapshots = true};
  regions[REGIONS - 1].ram_pages = PAGES / 2;
  flap_pager_config config = {.page_bytes = PAGE,
                              .transfer_bytes = 2 * PAGE,
                              .region_count = REGIONS,
                              .regions = regions,
                              .ring_count = 1,
                              .rings = &ring,
                              .read_buffers = 2,
                              .write_buffers = 2,
                              .workers = workers,
                              .leases_max = REGIONS,
                              .shared_folder = r->folder};
  flap_pager_measure(&config, &sizes);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  config.disk = (flap_block_config){.disk_count = 1, .disks = {{.path = r->folder, .bytes = sizes.disk_bytes}}};
  ck_assert_int_eq(flap_arena_open(&r->arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_msg(flap_pager_open(&config, &r->arena, &r->pager) == FLAP_OK, "%s", flap_error_message());
  r->pager->files_direct = direct;
  return true;
}

static void rig_close(rig *r) {
  flap_pager_close(r->pager);
  flap_arena_close(&r->arena);
}

static flap_status fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context;
  memset(memory, (int)(offset / PAGE + 1), bytes);
  return FLAP_OK;
}

static void fill_all(rig *r) {
  for (uint32_t i = 0; i < REGIONS; i++)
    ck_assert_int_eq(flap_pager_fill(r->pager, i, fill, NULL), FLAP_OK);
  ck_assert_int_eq(flap_pager_next_file(r->pager), FLAP_OK);
}

static flap_status ignore_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  (void)context, (void)offset, (void)bytes, (void)memory;
  return FLAP_OK;
}

static flap_status note_file(void *context, const flap_pager_extent *extent) {
  *(uint32_t *)context = extent->file;
  return FLAP_OK;
}

/* Returns the file that has all of it. */
static uint32_t keep_all(rig *r) {
  uint32_t file = 0;
  ck_assert(flap_pager_can_keep(r->pager));
  for (uint32_t i = 0; i < REGIONS; i++)
    ck_assert_int_eq(flap_pager_keep(r->pager, i, ignore_piece, note_file, &file), FLAP_OK);
  return file;
}

static flap_status run(rig *r, uint32_t first, uint32_t count, flap_lease_mode mode) {
  flap_lease leases[REGIONS] = {0};
  for (uint32_t i = 0; i < count; i++)
    leases[i] = (flap_lease){.region = first + i, .mode = mode};
  FLAP_TRY(flap_pager_begin(r->pager, leases, count));
  for (uint32_t i = 0; i < count; i++) {
    void *memory = NULL;
    FLAP_TRY(flap_pager_pin(r->pager, i, &memory));
    if (mode == FLAP_LEASE_CREATE)
      memset(memory, 7, PAGES * PAGE);
    flap_pager_unpin(r->pager, i);
  }
  FLAP_TRY(flap_pager_end(r->pager));
  return flap_pager_settle(r->pager);
}

/* A program that reads, and one that changes; of some of them, and then of the rest. */
START_TEST(what_was_kept_is_read_by_a_program) {
  static const flap_lease_mode modes[] = {FLAP_LEASE_READ, FLAP_LEASE_UPDATE};
  rig r;
  if (!rig_open(&r, _i > 1 ? 2 : 0))
    return;
  fill_all(&r);
  ck_assert(flap_pager_kept_is_read(r.pager)); /* nothing was kept */
  (void)keep_all(&r);
  ck_assert(!flap_pager_kept_is_read(r.pager));
  ck_assert_int_eq(run(&r, 0, REGIONS - 1, modes[_i % 2]), FLAP_OK);
  ck_assert(!flap_pager_kept_is_read(r.pager));
  ck_assert_int_eq(run(&r, REGIONS - 1, 1, modes[_i % 2]), FLAP_OK);
  ck_assert(flap_pager_kept_is_read(r.pager));
  rig_close(&r);
}
END_TEST

/* Only those that were read since they were written, be it before they were kept. */
START_TEST(what_was_read_before_need_not_be_read_again) {
  rig r;
  if (!rig_open(&r, 0))
    return;
  fill_all(&r);
  ck_assert_int_eq(run(&r, 0, REGIONS, FLAP_LEASE_READ), FLAP_OK);
  (void)keep_all(&r);
  ck_assert(flap_pager_kept_is_read(r.pager));
  ck_assert_int_eq(flap_pager_next_file(r.pager), FLAP_OK);
  ck_assert_int_eq(run(&r, 0, 1, FLAP_LEASE_UPDATE), FLAP_OK);
  ck_assert_int_eq(flap_pager_next_file(r.pager), FLAP_OK);
  (void)keep_all(&r);
  ck_assert(!flap_pager_kept_is_read(r.pager)); /* what was written behind its reading */
  ck_assert_int_eq(run(&r, 0, 1, FLAP_LEASE_READ), FLAP_OK);
  ck_assert(flap_pager_kept_is_read(r.pager));
  rig_close(&r);
}
END_TEST

/* Nobody has read what was written over unread; the next keep begins anew. */
START_TEST(what_is_written_anew_was_not_read) {
  rig r;
  if (!rig_open(&r, 0))
    return;
  fill_all(&r);
  (void)keep_all(&r);
  ck_assert_int_eq(run(&r, 0, REGIONS, FLAP_LEASE_CREATE), FLAP_OK);
  ck_assert_int_eq(run(&r, 0, REGIONS, FLAP_LEASE_READ), FLAP_OK);
  ck_assert(!flap_pager_kept_is_read(r.pager));
  ck_assert_int_eq(flap_pager_next_file(r.pager), FLAP_OK);
  (void)keep_all(&r);
  ck_assert(flap_pager_kept_is_read(r.pager));
  rig_close(&r);
}
END_TEST

/* Through the system's cache nothing is read of a drive. */
START_TEST(what_is_read_through_a_cache_was_not_read) {
  rig r;
  direct = false;
  if (!rig_open(&r, 0))
    return;
  fill_all(&r);
  (void)keep_all(&r);
  ck_assert_int_eq(run(&r, 0, REGIONS, FLAP_LEASE_UPDATE), FLAP_OK);
  ck_assert(!flap_pager_kept_is_read(r.pager));
  rig_close(&r);
}
END_TEST

/* As a drive does that says a write was made, and has it not. */
START_TEST(what_is_not_there_is_never_read) {
  rig r;
  char path[300];
  if (!rig_open(&r, 0))
    return;
  fill_all(&r);
  const uint32_t file = keep_all(&r);
  (void)snprintf(path, sizeof path, "%s/kept", r.folder);
  ck_assert_int_eq(flap_pager_link(r.pager, file, path), FLAP_OK);
  const int fd = open(path, O_WRONLY | O_CLOEXEC);
  ck_assert_int_eq(pwrite(fd, "?", 1, PAGE), 1);
  ck_assert_int_eq(fsync(fd), 0);
  close(fd);
  ck_assert_int_eq(run(&r, 0, REGIONS, FLAP_LEASE_UPDATE), FLAP_CORRUPT);
  ck_assert(!flap_pager_kept_is_read(r.pager));
  rig_close(&r);
  ck_assert_int_eq(unlink(path), 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("pager");
  TCase *tests = tcase_create("kept");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_loop_test(tests, what_was_kept_is_read_by_a_program, 0, 4);
  tcase_add_test(tests, what_was_read_before_need_not_be_read_again);
  tcase_add_test(tests, what_is_written_anew_was_not_read);
  tcase_add_test(tests, what_is_read_through_a_cache_was_not_read);
  tcase_add_test(tests, what_is_not_there_is_never_read);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
