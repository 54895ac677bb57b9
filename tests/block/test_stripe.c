/* The map from the linear space to disks: a bijection, within bounds, in proportion. */
#include "io/block/block_internal.h"

#include "base/philox.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#define STRIPE 4096u

static uint32_t by_size_most = UINT32_MAX; /* fewer phases than usual go by size */

static block_map make_map(uint32_t disk_count, const uint64_t *stripes, flap_block_disk *disks) {
  for (uint32_t d = 0; d < disk_count; d++)
    disks[d] = (flap_block_disk){.path = "-", .bytes = stripes[d] * STRIPE};
  block_phase *phases = calloc(block_map_phases_max(disk_count) + 1, sizeof *phases);
  block_map map;
  const uint32_t usual = block_map_phases_by_size(disk_count), by_size = usual < by_size_most ? usual : by_size_most;
  block_map_build(&map, disk_count, disks, STRIPE, by_size, phases);
  ck_assert_uint_le(map.phase_count, by_size + disk_count);
  ck_assert(map.phase_count < usual || by_size < usual); /* so many are never needed */
  return map;
}

static bool in_proportion = true;

/* Every stripe of the linear space, one by one. */
static void check_map(uint32_t disk_count, const uint64_t *stripes) {
  flap_block_disk disks[FLAP_BLOCK_DISKS_MAX];
  block_map map = make_map(disk_count, stripes, disks);
  uint64_t total = 0, next[FLAP_BLOCK_DISKS_MAX] = {0};
  for (uint32_t d = 0; d < disk_count; d++)
    total += stripes[d];
  for (uint64_t s = 0; s < total; s++) {
    for (uint32_t d = 0; d < disk_count; d++)
      ck_assert_uint_eq(block_map_disk_bytes(&map, d, s * STRIPE), next[d] * STRIPE);
    block_run run = block_map_find(&map, s * STRIPE, STRIPE);
    ck_assert_uint_lt(run.disk, disk_count);
    ck_assert_uint_eq(run.bytes, STRIPE);
    /* Each disk is used in order and without gaps: with the bounds, that is a bijection. */
    ck_assert_uint_eq(run.offset, next[run.disk] * STRIPE);
    next[run.disk]++;
    ck_assert_uint_le(next[run.disk], stripes[run.disk]);
    block_run inside = block_map_find(&map, s * STRIPE + 1000, 96);
    ck_assert_uint_eq(inside.disk, run.disk);
    ck_assert_uint_eq(inside.offset, run.offset + 1000);
    ck_assert_uint_eq(inside.bytes, 96);
    /* In proportion all the way: never further from the share than one pattern's rounding. */
    for (uint32_t d = 0; d < disk_count && in_proportion; d++) {
      double share = (double)(s + 1) * (double)stripes[d] / (double)total;
      double error = (double)next[d] - share;
      double slack = 2 + (double)total / BLOCK_PATTERN_MAX;
      ck_assert_msg(error < slack && error > -slack, "disk %u at stripe %llu of %llu: %f off", d, (unsigned long long)s,
                    (unsigned long long)total, error);
    }
  }
  for (uint32_t d = 0; d < disk_count; d++)
    ck_assert_uint_eq(next[d], stripes[d]);
  free(map.phases);
}

START_TEST(stripe_small_sizes_are_covered_exhaustively) {
  for (uint64_t a = 1; a <= 12; a++)
    for (uint64_t b = 1; b <= 12; b++) {
      check_map(2, (const uint64_t[]){a, b});
      for (uint64_t c = 1; c <= 12; c += 3)
        check_map(3, (const uint64_t[]){a, b, c});
    }
}
END_TEST

START_TEST(stripe_odd_sizes_are_covered) {
  check_map(2, (const uint64_t[]){997, 1});
  check_map(2, (const uint64_t[]){997, 499});
  check_map(3, (const uint64_t[]){1009, 7, 333});
  check_map(4, (const uint64_t[]){64, 64, 64, 64});
  check_map(5, (const uint64_t[]){1, 1, 1, 1, 1000});
  check_map(16, (const uint64_t[]){1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597});
}
END_TEST

START_TEST(stripe_random_sizes_are_covered) {
  flap_philox stream = flap_philox_stream(1, "stripe");
  uint64_t draw = 0;
  for (int round = 0; round < 40; round++) {
    uint32_t disk_count = 2 + (uint32_t)flap_philox_below(&stream, draw++, 15);
    uint64_t stripes[FLAP_BLOCK_DISKS_MAX];
    for (uint32_t d = 0; d < disk_count; d++) {
      stripes[d] = 1 + flap_philox_below(&stream, draw, (uint64_t)1 << flap_philox_below(&stream, draw + 1, 9));
      draw += 2;
    }
    check_map(disk_count, stripes);
  }
}
END_TEST

/* However few phases go by size, all stripes are used; only not in proportion any more. */
START_TEST(stripe_phases_that_do_not_go_by_size_use_the_rest) {
  for (by_size_most = 0; by_size_most < 3; by_size_most++) {
    in_proportion = false;
    check_map(2, (const uint64_t[]){997, 499});
    check_map(3, (const uint64_t[]){1009, 7, 333});
    check_map(5, (const uint64_t[]){1, 1, 1, 1, 1000});
    check_map(16, (const uint64_t[]){1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597});
  }
}
END_TEST

START_TEST(stripe_small_ratios_are_exact_in_one_phase) {
  flap_block_disk disks[FLAP_BLOCK_DISKS_MAX];
  block_map map = make_map(3, (const uint64_t[]){1000, 2000, 3000}, disks);
  ck_assert_uint_eq(map.phase_count, 1);
  ck_assert_uint_eq(map.phases[0].period, 6);
  free(map.phases);
}
END_TEST

START_TEST(stripe_huge_sizes_stay_within_few_phases) {
  flap_philox stream = flap_philox_stream(2, "stripe");
  uint64_t draw = 0;
  for (int round = 0; round < 500; round++) {
    uint32_t disk_count = 2 + (uint32_t)flap_philox_below(&stream, draw++, 15);
    uint64_t stripes[FLAP_BLOCK_DISKS_MAX], total = 0;
    for (uint32_t d = 0; d < disk_count; d++) {
      stripes[d] = 1 + flap_philox_below(&stream, draw, (uint64_t)1 << flap_philox_below(&stream, draw + 1, 44));
      draw += 2;
      total += stripes[d];
    }
    flap_block_disk disks[FLAP_BLOCK_DISKS_MAX];
    block_map map = make_map(disk_count, stripes, disks);
    /* Spot checks: two neighbours anywhere lie on different places, within their disks. */
    for (int i = 0; i < 50; i++) {
      uint64_t s = flap_philox_below(&stream, draw++, total);
      block_run run = block_map_find(&map, s * STRIPE, STRIPE);
      ck_assert_uint_lt(run.offset / STRIPE, stripes[run.disk]);
      ck_assert_uint_eq(run.offset, block_map_disk_bytes(&map, run.disk, s * STRIPE));
    }
    for (uint32_t d = 0; d < disk_count; d++)
      ck_assert_uint_eq(block_map_disk_bytes(&map, d, total * STRIPE), stripes[d] * STRIPE);
    free(map.phases);
  }
}
END_TEST

START_TEST(stripe_runs_join_and_cover_a_request) {
  flap_block_disk disks[FLAP_BLOCK_DISKS_MAX];
  const uint64_t stripes[] = {900, 100};
  block_map map = make_map(2, stripes, disks);
  flap_philox stream = flap_philox_stream(3, "stripe");
  uint32_t longest = 0;
  for (uint64_t i = 0; i < 300; i++) {
    uint64_t bytes = STRIPE * (1 + flap_philox_below(&stream, 2 * i, FLAP_BLOCK_REQUEST_BYTES_MAX / STRIPE / 2));
    uint64_t offset = STRIPE * flap_philox_below(&stream, 2 * i + 1, 1000 - bytes / STRIPE);
    uint32_t runs = 0;
    for (uint64_t done = 0; done < bytes; runs++) {
      block_run run = block_map_find(&map, offset + done, bytes - done);
      for (uint64_t at = 0; at < run.bytes; at += STRIPE) {
        block_run single = block_map_find(&map, offset + done + at, STRIPE);
        ck_assert_uint_eq(single.disk, run.disk);
        ck_assert_uint_eq(single.offset, run.offset + at);
      }
      if (run.bytes / STRIPE > longest)
        longest = (uint32_t)(run.bytes / STRIPE);
      done += run.bytes;
      ck_assert_uint_le(done, bytes);
    }
    ck_assert_uint_le(runs, block_map_runs_max(2, STRIPE));
  }
  ck_assert_uint_ge(longest, 8); /* nine of ten neighbours lie on the first disk */
  free(map.phases);
}
END_TEST

START_TEST(stripe_one_disk_is_the_identity) {
  flap_block_disk disks[1];
  block_map map = make_map(1, (const uint64_t[]){100}, disks);
  block_run run = block_map_find(&map, 12288, 40960);
  ck_assert_uint_eq(run.disk, 0);
  ck_assert_uint_eq(run.offset, 12288);
  ck_assert_uint_eq(run.bytes, 40960);
  ck_assert_uint_eq(block_map_disk_bytes(&map, 0, 12288), 12288);
  ck_assert_uint_eq(block_map_runs_max(1, 0), 1);
  free(map.phases);
}
END_TEST

/* ---- weights ------------------------------------------------------------------------------------------------ */

static void use(uint32_t disk_count, const uint64_t *stripes, const uint64_t *weights, uint64_t needed,
                uint64_t *used_out) {
  flap_block_disk disks[FLAP_BLOCK_DISKS_MAX] = {{.path = NULL}}, used[FLAP_BLOCK_DISKS_MAX];
  for (uint32_t d = 0; d < disk_count; d++)
    disks[d] = (flap_block_disk){.path = "-", .bytes = stripes[d] * STRIPE, .weight = weights[d]};
  block_map_use(disk_count, disks, STRIPE, needed * STRIPE - (needed > 0), used);
  for (uint32_t d = 0; d < disk_count; d++)
    used_out[d] = used[d].bytes / STRIPE;
}

START_TEST(stripe_weights_decide_as_far_as_sizes_go) {
  uint64_t used[FLAP_BLOCK_DISKS_MAX];
  use(2, (const uint64_t[]){1000, 1000}, (const uint64_t[]){3, 1}, 400, used);
  ck_assert(used[0] == 300 && used[1] == 100);
  use(2, (const uint64_t[]){1000, 4000}, (const uint64_t[]){7, 7}, 1000, used); /* sizes have no say */
  ck_assert(used[0] == 500 && used[1] == 500);
  use(3, (const uint64_t[]){100, 1000, 1000}, (const uint64_t[]){8, 2, 1}, 400, used); /* the fast one is full */
  ck_assert(used[0] == 100 && used[1] == 200 && used[2] == 100);
  use(3, (const uint64_t[]){100, 120, 1000}, (const uint64_t[]){8, 2, 1}, 700, used); /* and then the next */
  ck_assert(used[0] == 100 && used[1] == 120 && used[2] == 480);
  use(2, (const uint64_t[]){100, 300}, (const uint64_t[]){1000, 1}, 400, used); /* all of it */
  ck_assert(used[0] == 100 && used[1] == 300);
  use(2, (const uint64_t[]){100, 300}, (const uint64_t[]){1, 0}, 40, used); /* no weight for one: by size */
  ck_assert(used[0] == 100 && used[1] == 300);
}
END_TEST

/* Every stripe that is needed has a place, no disk more than it has, and none that has room is further below its share
 * than rounding. */
START_TEST(stripe_random_weights_use_what_is_needed) {
  flap_philox stream = flap_philox_stream(3, "weights");
  uint64_t draw = 0;
  for (int round = 0; round < 2000; round++) {
    const uint32_t disk_count = 2 + (uint32_t)flap_philox_below(&stream, draw++, 15);
    uint64_t stripes[FLAP_BLOCK_DISKS_MAX], weights[FLAP_BLOCK_DISKS_MAX], used[FLAP_BLOCK_DISKS_MAX], total = 0,
                                                                                                       sum = 0;
    double most = 0;
    for (uint32_t d = 0; d < disk_count; d++) {
      stripes[d] = 1 + flap_philox_below(&stream, draw, (uint64_t)1 << flap_philox_below(&stream, draw + 1, 40));
      weights[d] = 1 + flap_philox_below(&stream, draw + 2, (uint64_t)1 << flap_philox_below(&stream, draw + 3, 50));
      draw += 4;
      total += stripes[d];
    }
    const uint64_t needed = 1 + flap_philox_below(&stream, draw++, total);
    use(disk_count, stripes, weights, needed, used);
    for (uint32_t d = 0; d < disk_count; d++) {
      ck_assert_uint_le(used[d], stripes[d]);
      sum += used[d];
      const double level = ((double)used[d] - 1) / (double)weights[d];
      most = level > most ? level : most;
    }
    ck_assert_uint_eq(sum, needed);
    for (uint32_t d = 0; d < disk_count; d++)
      ck_assert(used[d] == stripes[d] || ((double)used[d] + 1) / (double)weights[d] >= most * (1 - 1e-9));
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("stripe");
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, stripe_small_sizes_are_covered_exhaustively);
  tcase_add_test(tests, stripe_odd_sizes_are_covered);
  tcase_add_test(tests, stripe_random_sizes_are_covered);
  tcase_add_test(tests, stripe_small_ratios_are_exact_in_one_phase);
  tcase_add_test(tests, stripe_huge_sizes_stay_within_few_phases);
  tcase_add_test(tests, stripe_runs_join_and_cover_a_request);
  tcase_add_test(tests, stripe_one_disk_is_the_identity);
  tcase_add_test(tests, stripe_phases_that_do_not_go_by_size_use_the_rest);
  tcase_add_test(tests, stripe_weights_decide_as_far_as_sizes_go);
  tcase_add_test(tests, stripe_random_weights_use_what_is_needed);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
