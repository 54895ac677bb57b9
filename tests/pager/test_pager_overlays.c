/* Regions that share their RAM: how much they take, that both sides keep their bytes in turn, and that whoever would
 * overwrite one with the other is told. */
#include "pager/pager_internal.h"

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define REGIONS 5u
#define PAGE FLAP_BLOCK_ALIGN

/* Two of 3 pages on one side, one of 5 on the other, of which 4 are in RAM; and two that share with nobody. */
typedef struct shared_pager {
  flap_arena arena;
  flap_pager *pager;
  flap_pager_config config;
  flap_pager_region regions[REGIONS];
  flap_pager_ring ring;
} shared_pager;

static void must(flap_status status) {
  if (status == FLAP_OK)
    return;
  fprintf(stderr, "%s\n", flap_error_message());
  _exit(3);
}

static void open_shared(shared_pager *s) {
  *s = (shared_pager){.ring = {.name = "ring", .slot_bytes = 5 * PAGE, .slots = 2},
                      .regions = {{.bytes = 3 * PAGE, .ram_pages = 3, .overlay = 1, .side = 0},
                                  {.bytes = 3 * PAGE, .ram_pages = 3, .overlay = 1, .side = 0},
                                  {.bytes = 5 * PAGE, .ram_pages = 4, .overlay = 1, .side = 1},
                                  {.bytes = 2 * PAGE, .ram_pages = 2},
                                  {.bytes = 2 * PAGE, .ring = FLAP_PAGER_RESIDENT, .overlay = 1, .side = 1}}};
  s->config = (flap_pager_config){.page_bytes = PAGE,
                                  .transfer_bytes = PAGE,
                                  .region_count = REGIONS,
                                  .regions = s->regions,
                                  .ring_count = 1,
                                  .rings = &s->ring,
                                  .read_buffers = 1,
                                  .write_buffers = 1,
                                  .leases_max = 8};
  flap_pager_sizes sizes;
  flap_pager_measure(&s->config, &sizes);
  s->config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  s->config.disk =
      (flap_block_config){.backend = FLAP_BLOCK_SIM, .disk_count = 1, .disks = {{.bytes = sizes.disk_bytes}}};
  must(flap_arena_open(&s->arena, "ram", sizes.ram_bytes));
  must(flap_pager_open(&s->config, &s->arena, &s->pager));
}

static void close_shared(shared_pager *s) {
  flap_pager_close(s->pager);
  flap_arena_close(&s->arena);
}

START_TEST(an_overlay_is_as_large_as_its_longer_side) {
  static shared_pager s;
  flap_pager_sizes sizes;
  open_shared(&s);
  flap_pager_measure(&s.config, &sizes);
  ck_assert_uint_eq(sizes.ram_home_bytes, (6 + 2) * PAGE);
  ck_assert_uint_eq(sizes.disk_bytes, PAGE);
  s.regions[2] = (flap_pager_region){.bytes = 5 * PAGE, .ram_pages = 5, .overlay = 1, .side = 0};
  flap_pager_measure(&s.config, &sizes); /* all on one side */
  ck_assert_uint_eq(sizes.ram_home_bytes, (3 + 3 + 5 + 2) * PAGE);
  close_shared(&s);
}
END_TEST

/* ---- in turn --------------------------------------------------------------------------------------------- */

static void use(shared_pager *s, uint32_t index, const flap_lease *lease, int value) {
  unsigned char *memory = NULL;
  must(flap_pager_pin(s->pager, index, (void **)&memory));
  const uint64_t bytes = s->regions[lease->region].bytes;
  if (lease->mode == FLAP_LEASE_CREATE)
    memset(memory, value, bytes);
  else
    for (uint64_t i = 0; i < bytes; i++)
      if (memory[i] != (unsigned char)value)
        ck_abort_msg("byte %llu of region %u is %u, not %d", (unsigned long long)i, lease->region, memory[i], value);
  flap_pager_unpin(s->pager, index);
}

START_TEST(both_sides_keep_their_bytes_in_turn) {
  static const flap_lease leases[] = {
      {.region = 0, .mode = FLAP_LEASE_CREATE},  {.region = 1, .mode = FLAP_LEASE_CREATE},
      {.region = 0, .mode = FLAP_LEASE_CONSUME}, {.region = 1, .mode = FLAP_LEASE_READ},
      {.region = 1, .mode = FLAP_LEASE_CONSUME}, {.region = 2, .mode = FLAP_LEASE_CREATE},
      {.region = 2, .mode = FLAP_LEASE_READ},    {.region = 2, .mode = FLAP_LEASE_CONSUME}};
  static const int values[] = {0, 1, 0, 1, 1, 2, 2, 2};
  static shared_pager s;
  open_shared(&s);
  pager_full_checks = true;
  for (int turn = 0; turn < 20; turn++) {
    must(flap_pager_begin(s.pager, leases, 8));
    for (uint32_t i = 0; i < 8; i++)
      use(&s, i, &leases[i], 10 * turn + values[i]);
    must(flap_pager_end(s.pager));
  }
  must(flap_pager_settle(s.pager));
  close_shared(&s);
}
END_TEST

/* ---- mistakes -------------------------------------------------------------------------------------------- */

static void run(shared_pager *s, const flap_lease *leases, uint32_t count) {
  must(flap_pager_begin(s->pager, leases, count));
  for (uint32_t i = 0; i < count; i++) {
    void *memory;
    must(flap_pager_pin(s->pager, i, &memory));
    flap_pager_unpin(s->pager, i);
  }
}

static void created_over_another(shared_pager *s) {
  static const flap_lease leases[] = {{.region = 1, .mode = FLAP_LEASE_CREATE},
                                      {.region = 2, .mode = FLAP_LEASE_CREATE}};
  run(s, leases, 2);
}

static void emptied_without_loading(shared_pager *s) {
  static const flap_lease leases[] = {{.region = 1, .mode = FLAP_LEASE_CREATE},
                                      {.region = 1, .mode = FLAP_LEASE_SCRATCH}};
  run(s, leases, 2);
}

static flap_status fill_nothing(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)offset;
  memset(memory, 7, bytes);
  return FLAP_OK;
}

static void filled_over_another(shared_pager *s) {
  must(flap_pager_fill(s->pager, 0, fill_nothing, NULL));
  must(flap_pager_fill(s->pager, 2, fill_nothing, NULL));
}

static const struct {
  void (*make)(shared_pager *s);
  const char *says;
} mistakes[] = {
    {created_over_another, "region 2 shares its RAM with 1 regions of overlay 1 that hold something"},
    {emptied_without_loading, "lease 1 empties region 1 of overlay 1 without loading it"},
    {filled_over_another, "region 2 shares its RAM with 1 regions"},
};

START_TEST(mistake_is_told) {
  static char text[65536];
  int ends[2], status = 0;
  ck_assert_int_eq(pipe(ends), 0);
  const pid_t child = fork();
  ck_assert_int_ge(child, 0);
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    alarm(20);
    static shared_pager s;
    open_shared(&s);
    mistakes[_i].make(&s);
    _exit(0);
  }
  close(ends[1]);
  size_t bytes = 0;
  for (ssize_t got; bytes < sizeof text - 1 && (got = read(ends[0], text + bytes, sizeof text - 1 - bytes)) > 0;)
    bytes += (size_t)got;
  text[bytes] = 0;
  close(ends[0]);
  ck_assert_int_eq(waitpid(child, &status, 0), child);
  ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "status %d, %s", status, text);
  ck_assert_msg(strstr(text, mistakes[_i].says) != NULL, "\"%s\" does not say \"%s\"", text, mistakes[_i].says);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("pager overlays");
  TCase *tcase = tcase_create("overlays");
  tcase_add_test(tcase, an_overlay_is_as_large_as_its_longer_side);
  tcase_add_test(tcase, both_sides_keep_their_bytes_in_turn);
  tcase_add_loop_test(tcase, mistake_is_told, 0, (int)(sizeof mistakes / sizeof mistakes[0]));
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
