/* Pages that a disk gives back with a bit turned over, as zeros, as they were one writing before, or from another
 * place: none is ever handed on, whether a program loads it or a drain reads it. If the disk does so once, the page is
 * read again and nothing comes of it; if it does so for ever, the pager stops.
 *
 * FLAP_TEST_DAMAGES=1000000 takes so many: RELIABILITY.md of tests/ says what came of that. */
#include "base/log.h"
#include "base/philox.h"
#include "base/system.h"
#include "pager/pager.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE FLAP_BLOCK_ALIGN
#define REGIONS 3u
#define PAGES_EACH 2u
#define PAGES (REGIONS * PAGES_EACH)
#define SPACE (PAGES * PAGE)
#define EACH 4u /* damages of a pager, of which the last one is for ever */
#define DAMAGES_DEFAULT 1000

typedef enum damage_kind { DAMAGE_FLIP, DAMAGE_ZEROS, DAMAGE_STALE, DAMAGE_MISDIRECTED, DAMAGE_KINDS } damage_kind;

/* What the disk holds, and held one writing before; and what it gives back in place of a page. One thread at a time
 * reads or writes a page, and the damage is set while none does. */
static unsigned char current[SPACE], previous[SPACE];
static struct {
  bool active, once;
  damage_kind kind;
  uint32_t page, other;
  uint32_t bit;
} damage;

static ssize_t write_page(int fd, const void *data, size_t bytes, off_t offset) {
  const size_t at = (size_t)offset;
  if (at + bytes <= SPACE) {
    memcpy(previous + at, current + at, bytes);
    memcpy(current + at, data, bytes);
  }
  return flap_system_default()->pwrite(fd, data, bytes, offset);
}

static void spoil(unsigned char *page) {
  switch (damage.kind) {
  case DAMAGE_FLIP:
    page[damage.bit / 8] ^= (unsigned char)(1u << damage.bit % 8);
    break;
  case DAMAGE_ZEROS:
    memset(page, 0, PAGE);
    break;
  case DAMAGE_STALE:
    memcpy(page, previous + damage.page * PAGE, PAGE);
    break;
  case DAMAGE_MISDIRECTED:
    memcpy(page, current + damage.other * PAGE, PAGE);
    break;
  case DAMAGE_KINDS:
    break;
  }
}

static ssize_t read_page(int fd, void *data, size_t bytes, off_t offset) {
  const ssize_t got = flap_system_default()->pread(fd, data, bytes, offset);
  const off_t at = (off_t)(damage.page * PAGE) - offset;
  if (!damage.active || at < 0 || at + (off_t)PAGE > got)
    return got;
  spoil((unsigned char *)data + at);
  damage.active = !damage.once;
  return got;
}

/* ---- one damage ---------------------------------------------------------------------------------------------- */

static flap_status put_random(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  const flap_philox *stream = context;
  for (uint64_t i = 0; i < bytes; i += 16) {
    uint32_t words[4];
    flap_philox_block(stream, (offset + i) / 16, words);
    memcpy((unsigned char *)memory + i, words, 16);
  }
  return FLAP_OK;
}

/* What is handed on must be what was written. */
static flap_status compare(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  const uint32_t region = *(const uint32_t *)context;
  ck_assert_msg(memcmp(memory, current + region * PAGES_EACH * PAGE + offset, bytes) == 0,
                "a damaged page of region %u was handed on", region);
  return FLAP_OK;
}

static flap_status read_by_drain(flap_pager *pager) {
  flap_status status = FLAP_OK;
  for (uint32_t region = 0; region < REGIONS && status == FLAP_OK; region++)
    status = flap_pager_drain(pager, region, compare, &region);
  return status;
}

static flap_status read_by_program(flap_pager *pager) {
  static const flap_lease leases[REGIONS] = {{.region = 0}, {.region = 1}, {.region = 2}};
  flap_status status = flap_pager_begin(pager, leases, REGIONS);
  for (uint32_t region = 0; region < REGIONS && status == FLAP_OK; region++) {
    void *memory = NULL;
    status = flap_pager_pin(pager, region, &memory);
    if (status != FLAP_OK)
      break;
    (void)compare(&region, 0, PAGES_EACH * PAGE, memory); /* vram of the cpu device */
    flap_pager_unpin(pager, region);
  }
  return status == FLAP_OK ? flap_pager_end(pager) : status;
}

static flap_pager *open_filled(flap_arena *arena, uint64_t number) {
  static flap_pager_region regions[REGIONS];
  static const flap_pager_ring ring = {.name = "ring", .slot_bytes = PAGES_EACH * PAGE, .slots = 2};
  for (uint32_t i = 0; i < REGIONS; i++)
    regions[i] = (flap_pager_region){.bytes = PAGES_EACH * PAGE};
  flap_pager_config config = {.page_bytes = PAGE,
                              .transfer_bytes = PAGES_EACH * PAGE,
                              .region_count = REGIONS,
                              .regions = regions,
                              .ring_count = 1,
                              .rings = &ring,
                              .read_buffers = 2,
                              .write_buffers = 2,
                              .leases_max = REGIONS};
  flap_pager_sizes sizes;
  flap_pager *pager = NULL;
  flap_pager_measure(&config, &sizes);
  ck_assert_uint_eq(sizes.disk_bytes, SPACE);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  config.disk = (flap_block_config){.backend = FLAP_BLOCK_THREADS,
                                    .read_depth = 1,
                                    .write_depth = 1,
                                    .disk_count = 1,
                                    .disks = {{.path = "/tmp", .bytes = sizes.disk_bytes}}};
  ck_assert_int_eq(flap_arena_open(arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_msg(flap_pager_open(&config, arena, &pager) == FLAP_OK, "%s", flap_error_message());
  for (uint32_t writing = 0; writing < 2; writing++)
    for (uint32_t region = 0; region < REGIONS; region++) {
      char name[64];
      (void)snprintf(name, sizeof name, "damage %u of %u", writing, region);
      flap_philox stream = flap_philox_stream(number, name);
      ck_assert_int_eq(flap_pager_fill(pager, region, put_random, &stream), FLAP_OK);
    }
  return pager;
}

static uint32_t below(const flap_philox *stream, uint32_t draw, uint32_t count) {
  return (uint32_t)flap_philox_below(stream, draw, count);
}

static void choose_damage(const flap_philox *stream, bool once) {
  damage.kind = below(stream, 0, 2) == 0 ? DAMAGE_FLIP : (damage_kind)below(stream, 1, DAMAGE_KINDS);
  damage.page = below(stream, 2, PAGES);
  damage.other = (damage.page + 1 + below(stream, 3, PAGES - 1)) % PAGES;
  damage.bit = below(stream, 4, PAGE * 8);
  damage.once = once;
  damage.active = true;
}

/* `again`: how many pages were read once more before. */
static void try_damage(flap_pager *pager, uint64_t seed, uint64_t number, bool once, uint64_t again) {
  const flap_philox stream = flap_philox_stream(seed + number, "damage");
  choose_damage(&stream, once);
  const flap_status status = below(&stream, 5, 2) == 0 ? read_by_drain(pager) : read_by_program(pager);
  flap_pager_stats stats;
  flap_pager_get_stats(pager, &stats);
  ck_assert_msg(status == (once ? FLAP_OK : FLAP_CORRUPT) && stats.reread == again + 1,
                "damage %llu (seed %llu): kind %d of page %u, %s: %s, read again %llu times",
                (unsigned long long)number, (unsigned long long)seed, (int)damage.kind, damage.page,
                once ? "once" : "for ever", flap_status_name(status), (unsigned long long)(stats.reread - again));
  ck_assert_msg(once || strstr(flap_error_message(), "/tmp") != NULL, "%s", flap_error_message());
}

/* Of one pager: all damages but the last pass, and the last one stops it. */
static void try_damages(uint64_t seed, uint64_t first, uint64_t count) {
  flap_arena arena;
  damage.active = false;
  flap_pager *pager = open_filled(&arena, seed + first);
  for (uint64_t i = 0; i < count; i++)
    try_damage(pager, seed, first + i, i + 1 < count, i);
  flap_pager_close(pager);
  flap_arena_close(&arena);
}

static uint64_t number_from(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

/* ---- what is said --------------------------------------------------------------------------------------------- */

static void disturb_reads(void) {
  static flap_system calls;
  calls = *flap_system_default();
  calls.pread = read_page;
  calls.pwrite = write_page;
  (void)flap_system_replace(&calls);
}

/* Of the first 16, and then of those whose number is a power of two. */
START_TEST(damage_that_goes_away_is_told_but_not_each_time) {
  char line[512];
  uint32_t lines = 0;
  flap_arena arena;
  FILE *log = tmpfile();
  const int before = dup(STDERR_FILENO);
  disturb_reads();
  damage.active = false;
  flap_pager *pager = open_filled(&arena, 1);
  ck_assert(log != NULL && dup2(fileno(log), STDERR_FILENO) >= 0);
  flap_log_set_level(FLAP_LOG_WARNING);
  for (uint64_t i = 0; i < 70; i++)
    try_damage(pager, 1, i, true, i);
  ck_assert_int_ge(dup2(before, STDERR_FILENO), 0);
  rewind(log);
  while (fgets(line, sizeof line, log) != NULL) {
    ck_assert_msg(strstr(line, "flap: warning: disk /tmp: region ") != NULL && strstr(line, ", page ") != NULL &&
                      strstr(line, "at byte ") != NULL && strstr(line, "reading them again") != NULL,
                  "%s", line);
    lines++;
  }
  ck_assert_uint_eq(lines, 18);
  flap_pager_close(pager);
  flap_arena_close(&arena);
  (void)close(before);
  (void)fclose(log);
  (void)flap_system_replace(NULL);
}
END_TEST

START_TEST(damage_of_a_page_is_found_before_its_use) {
  const uint64_t seed = number_from("FLAP_TEST_SEED", 20261126),
                 count = number_from("FLAP_TEST_DAMAGES", DAMAGES_DEFAULT);
  disturb_reads();
  flap_log_set_level(FLAP_LOG_ERROR); /* each damage warns */
  for (uint64_t i = 0; i < count; i += EACH)
    try_damages(seed, i, count - i < EACH ? count - i : EACH);
  (void)flap_system_replace(NULL);
  printf("FLAP_TEST_SEED=%llu: %llu damaged pages, all found\n", (unsigned long long)seed, (unsigned long long)count);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("pager");
  TCase *tests = tcase_create("damage");
  tcase_set_timeout(tests, 0);
  tcase_add_test(tests, damage_that_goes_away_is_told_but_not_each_time);
  tcase_add_test(tests, damage_of_a_page_is_found_before_its_use);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
