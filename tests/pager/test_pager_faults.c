/* Disks that fail, fill up, lie and forget: the pager says so, once and for all, and closes. And every place to stop
 * at. */
#include "tests/pager/pager_cases.h"

#include "base/log.h"
#include "pager/pager_internal.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUESTS_MAX 4000u /* more than any of these cases has; the countdown ends when it was not reached */

typedef void (*set_fault_fn)(flap_block_sim *sim, uint64_t at);

static void fail_read(flap_block_sim *sim, uint64_t at) {
  sim->fail_read_at = at;
}
static void fail_write(flap_block_sim *sim, uint64_t at) {
  sim->fail_write_at = at;
}
static void fill_up(flap_block_sim *sim, uint64_t at) {
  sim->full_write_at = at;
}
static void corrupt_read(flap_block_sim *sim, uint64_t at) {
  sim->corrupt_read_at = at;
}
static void corrupt_write(flap_block_sim *sim, uint64_t at) {
  sim->corrupt_write_at = at;
}
static void lose_write(flap_block_sim *sim, uint64_t at) {
  sim->lose_write_at = at;
}

typedef struct outcome {
  uint64_t requests; /* that the countdown could hit */
  uint32_t failures; /* of as many runs */
} outcome;

/* Some cases ask little of the disk: there are more of them until so many requests have failed. */
#define FAILURES_MIN (20u / CASE_STRIDE)
#define CASES_MAX 40u

static uint64_t requests_of(const test_case *c, set_fault_fn set) {
  uint64_t pieces = c->config.transfer_bytes, requests = 0, bytes[FLAP_LANE_COUNT];
  case_predict(c, bytes);
  const bool read = set == fail_read || set == corrupt_read;
  requests = bytes[read ? FLAP_LANE_DISK_READ : FLAP_LANE_DISK_WRITE] / pieces; /* at least */
  return requests;
}

/* Lets the fault happen at every n in turn (some of them under sanitizers), until n is past the last request: then the
 * run must succeed. */
static outcome countdown(uint64_t seed, set_fault_fn set, flap_status expected, const char *const *words,
                         bool may_go_unseen, bool snapshots) {
  static test_case c;
  outcome o = {0};
  case_make(&c, seed, HOMES_MIXED, seed % 2 == 0, 1);
  static const flap_compression compressions[] = {FLAP_COMPRESSION_OFF, FLAP_COMPRESSION_LZ4, FLAP_COMPRESSION_ZSTD};
  c.config.compression = compressions[seed % 3];
  c.config.pool_bytes = 0; /* or less would be asked of the disk */
  if (snapshots)
    case_add_snapshots(&c);
  case_set_disk(&c, FLAP_BLOCK_SIM, NULL);
  uint64_t least = requests_of(&c, set);
  uint64_t successes = 0;
  for (uint64_t at = 1; at < REQUESTS_MAX; at += CASE_STRIDE) {
    c.config.disk.sim = (flap_block_sim){.seed = seed + at};
    set(&c.config.disk.sim, at);
    flap_status status = case_run(&c);
    if (status == FLAP_OK) {
      /* A write that was lost may be overwritten, or never be looked at; then nothing is wrong. */
      ck_assert_msg(may_go_unseen || at > least, "seed %llu: request %llu failed and nobody noticed",
                    (unsigned long long)seed, (unsigned long long)at);
      if (++successes > 2 && at > least)
        break;
      continue;
    }
    successes = 0;
    o.failures++;
    o.requests = at;
    ck_assert_msg(status == expected, "seed %llu, request %llu: %s: %s", (unsigned long long)seed,
                  (unsigned long long)at, flap_status_name(status), flap_error_message());
    for (const char *const *word = words; *word; word++)
      ck_assert_msg(strstr(flap_error_message(), *word) != NULL, "\"%s\" does not say \"%s\"", flap_error_message(),
                    *word);
  }
  return o;
}

static void countdowns(set_fault_fn set, flap_status expected, const char *const *words, bool may_go_unseen) {
  uint64_t seed = case_first_seed();
  uint32_t failures = 0;
  const uint32_t cases = may_go_unseen ? 5 : 3;
  for (uint32_t i = 0; i < cases || (failures <= FAILURES_MIN && i < CASES_MAX); i += CASE_STRIDE)
    failures += countdown(seed + 100 + i, set, expected, words, may_go_unseen, i == 0).failures;
  printf("%u runs failed as they should\n", failures);
  ck_assert_uint_gt(failures, FAILURES_MIN); /* otherwise nothing was tested */
}

START_TEST(fault_read_error_at_every_request_is_sticky) {
  const char *words[] = {"region ", "page", "Input/output error", NULL};
  countdowns(fail_read, FLAP_IO, words, false);
}
END_TEST

START_TEST(fault_write_error_at_every_request_is_sticky) {
  const char *words[] = {"region ", "page", "Input/output error", NULL};
  countdowns(fail_write, FLAP_IO, words, false);
}
END_TEST

START_TEST(fault_full_disk_at_every_request_is_sticky) {
  const char *words[] = {"region ", "page", "No space", NULL};
  countdowns(fill_up, FLAP_NO_SPACE, words, false);
}
END_TEST

static const char *const corrupt_words[] = {
    "region ", "page ", "disk (simulated)", "read again", "resume_from_checkpoint", NULL};

/* At every read in turn, until there are no more: nothing comes of it but one more reading. */
START_TEST(fault_flipped_bit_at_every_read_is_mended_by_reading_again) {
  static test_case c;
  const uint64_t seed = case_first_seed();
  uint64_t mended = 0;
  for (uint32_t i = 0; i < 3 || (mended <= FAILURES_MIN && i < CASES_MAX); i += CASE_STRIDE) {
    case_make(&c, seed + 100 + i, HOMES_MIXED, i % 2 == 0, 1);
    c.config.compression = i % 2 == 0 ? FLAP_COMPRESSION_ZSTD : FLAP_COMPRESSION_OFF;
    c.config.pool_bytes = 0;
    case_set_disk(&c, FLAP_BLOCK_SIM, NULL);
    uint64_t rereads = 1;
    for (uint64_t at = 1; at < REQUESTS_MAX && rereads == 1; at += CASE_STRIDE) {
      const uint64_t before = case_rereads;
      c.config.disk.sim = (flap_block_sim){.seed = seed + at, .corrupt_read_at = at};
      ck_assert_msg(case_run(&c) == FLAP_OK, "seed %llu, request %llu: %s", (unsigned long long)seed + 100 + i,
                    (unsigned long long)at, flap_error_message());
      rereads = case_rereads - before;
      mended += rereads;
      ck_assert(rereads == 1 || (rereads == 0 && at > requests_of(&c, corrupt_read)));
    }
  }
  printf("%llu reads came right when they were made again\n", (unsigned long long)mended);
  ck_assert_uint_gt(mended, FAILURES_MIN);
}
END_TEST

/* The second reading is a request like any other. Where requests overlap another one fails; or, the flip having hit
 * the last of them, none. */
START_TEST(fault_read_error_after_a_flipped_bit_is_sticky) {
  static test_case c;
  const uint64_t seed = case_first_seed();
  uint32_t failures = 0;
  case_make(&c, seed + 100, HOMES_MIXED, true, 1);
  case_set_disk(&c, FLAP_BLOCK_SIM, NULL);
  for (uint64_t at = 1; at < 40; at++) {
    c.config.disk.sim = (flap_block_sim){.seed = seed + at, .corrupt_read_at = at, .fail_read_at = at + 1};
    const flap_status status = case_run(&c);
    ck_assert(status == FLAP_OK || status == FLAP_IO);
    failures += status == FLAP_IO;
  }
  ck_assert_uint_gt(failures, 0);
}
END_TEST

START_TEST(fault_flipped_bit_on_the_disk_is_found_when_it_is_read) {
  countdowns(corrupt_write, FLAP_CORRUPT, corrupt_words, true);
}
END_TEST

START_TEST(fault_lost_write_is_found_when_it_is_read) {
  countdowns(lose_write, FLAP_CORRUPT, corrupt_words, true);
}
END_TEST

START_TEST(close_after_every_action_comes_back) {
  static test_case c;
  uint64_t seed = case_first_seed();
  for (uint32_t i = 0; i < 2; i++) {
    case_make(&c, seed + 200 + i, HOMES_MIXED, i == 0, 1);
    if (i == 0)
      case_add_snapshots(&c);
    case_set_disk(&c, FLAP_BLOCK_SIM, NULL);
    c.config.disk.sim = (flap_block_sim){.latency_ns = 20000, .seed = seed};
    for (c.close_after = 1; c.close_after <= c.action_count; c.close_after += CASE_STRIDE)
      ck_assert_int_eq(case_run(&c), FLAP_OK);
  }
}
END_TEST

/* ---- callbacks that fail -------------------------------------------------------------------------------- */

typedef struct stopper {
  uint32_t calls, fail_at;
} stopper;

static flap_status stop_fill(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  stopper *s = context;
  if (++s->calls == s->fail_at)
    return flap_error_set(FLAP_INVALID, "the file ends at %llu", (unsigned long long)offset);
  memset(memory, (int)(offset / FLAP_BLOCK_ALIGN), bytes);
  return FLAP_OK;
}

static flap_status stop_drain(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  stopper *s = context;
  const unsigned char *at = memory;
  if (++s->calls == s->fail_at)
    return flap_error_set(FLAP_NO_SPACE, "the other disk is full");
  ck_assert_uint_eq(at[0], (unsigned char)(offset / FLAP_BLOCK_ALIGN));
  ck_assert_uint_eq(at[bytes - 1], at[0]);
  return FLAP_OK;
}

/* A callback's failure is the caller's own, and does not stick. */
START_TEST(fill_and_drain_callback_failures_are_passed_on) {
  flap_pager_region regions[] = {{.bytes = 20 * FLAP_BLOCK_ALIGN, .ring = 0, .ram_pages = 5},
                                 {.bytes = 9 * FLAP_BLOCK_ALIGN, .ring = FLAP_PAGER_RESIDENT}};
  flap_pager_ring ring = {.name = "ring", .slot_bytes = 20 * FLAP_BLOCK_ALIGN, .slots = 1};
  flap_pager_config config = {.page_bytes = FLAP_BLOCK_ALIGN,
                              .transfer_bytes = FLAP_BLOCK_ALIGN,
                              .region_count = 2,
                              .regions = regions,
                              .ring_count = 1,
                              .rings = &ring,
                              .read_buffers = 3,
                              .write_buffers = 3,
                              .leases_max = 1};
  flap_pager_sizes sizes;
  flap_pager_measure(&config, &sizes);
  config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes};
  config.disk = (flap_block_config){.backend = FLAP_BLOCK_SIM, .disk_count = 1, .disks = {{.bytes = sizes.disk_bytes}}};
  flap_arena arena;
  flap_pager *pager = NULL;
  ck_assert_int_eq(flap_arena_open(&arena, "ram", sizes.ram_bytes), FLAP_OK);
  ck_assert_msg(flap_pager_open(&config, &arena, &pager) == FLAP_OK, "%s", flap_error_message());
  uint32_t pieces[] = {20, 9};
  for (uint32_t region = 0; region < 2; region++) {
    for (uint32_t at = 1; at <= pieces[region]; at++) {
      stopper s = {.fail_at = at};
      ck_assert_int_eq(flap_pager_fill(pager, region, stop_fill, &s), FLAP_INVALID);
    }
    stopper s = {0};
    ck_assert_int_eq(flap_pager_fill(pager, region, stop_fill, &s), FLAP_OK);
    ck_assert_uint_eq(s.calls, pieces[region]);
    for (uint32_t at = 1; at <= pieces[region]; at++) {
      stopper d = {.fail_at = at};
      ck_assert_int_eq(flap_pager_drain(pager, region, stop_drain, &d), FLAP_NO_SPACE);
    }
    stopper d = {0};
    ck_assert_int_eq(flap_pager_drain(pager, region, stop_drain, &d), FLAP_OK);
    ck_assert_uint_eq(d.calls, pieces[region]);
  }
  flap_pager_close(pager);
  flap_arena_close(&arena);
}
END_TEST

/* ---- opening -------------------------------------------------------------------------------------------- */

START_TEST(open_with_too_little_vram_or_disk_is_refused_and_leaves_nothing) {
  static test_case c;
  case_make(&c, 5, HOMES_DISK, false, 1);
  case_set_disk(&c, FLAP_BLOCK_SIM, NULL);
  flap_pager_sizes sizes;
  flap_pager_measure(&c.config, &sizes);
  flap_arena arena;
  flap_pager *pager = NULL;
  c.config.device = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = sizes.vram_bytes - FLAP_BLOCK_ALIGN};
  ck_assert_int_eq(flap_arena_open(&arena, "ram", 2 * sizes.ram_bytes), FLAP_OK);
  ck_assert_int_eq(flap_pager_open(&c.config, &arena, &pager), FLAP_BUDGET);
  ck_assert_ptr_null(pager);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "raise vram"));
  c.config.device.vram_bytes = sizes.vram_bytes;
  c.config.disk.disks[0].bytes = FLAP_BLOCK_ALIGN;
  ck_assert_int_eq(flap_pager_open(&c.config, &arena, &pager), FLAP_BUDGET);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "disk"));
  ck_assert_ptr_null(pager);
  flap_arena_close(&arena);
}
END_TEST

int main(void) {
  pager_full_checks = true;
  flap_log_set_level(FLAP_LOG_ERROR); /* reads that are made again warn */
  pager_small_bytes = 0;              /* workers do all, where there are any */
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("faults");
  tcase_set_timeout(tcase, 300);
  tcase_add_test(tcase, fault_read_error_at_every_request_is_sticky);
  tcase_add_test(tcase, fault_write_error_at_every_request_is_sticky);
  tcase_add_test(tcase, fault_full_disk_at_every_request_is_sticky);
  tcase_add_test(tcase, fault_flipped_bit_at_every_read_is_mended_by_reading_again);
  tcase_add_test(tcase, fault_read_error_after_a_flipped_bit_is_sticky);
  tcase_add_test(tcase, fault_flipped_bit_on_the_disk_is_found_when_it_is_read);
  tcase_add_test(tcase, fault_lost_write_is_found_when_it_is_read);
  tcase_add_test(tcase, close_after_every_action_comes_back);
  tcase_add_test(tcase, fill_and_drain_callback_failures_are_passed_on);
  tcase_add_test(tcase, open_with_too_little_vram_or_disk_is_refused_and_leaves_nothing);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
