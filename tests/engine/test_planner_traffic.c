/* What a plan moves into VRAM, and reads from disk, against farthest next use with perfect knowledge of the step: it
 * is never less, or one of the two is wrong. How much more it is, is printed.
 *
 * FLAP_TRAFFIC_TRIALS says how many models are tried, from FLAP_TEST_SEED on.
 */
#include "tests/engine/least_traffic.h"
#include "tests/engine/planner_trials.h"

#include "base/philox.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TRIALS 6
#else
#define TRIALS 30
#endif
#define RUNS 16 /* of a step: the bound is nearer the more there are */
#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())

static uint64_t number(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

/* ---- the bound itself -------------------------------------------------------------------------------------- */

#define THINGS 4u
#define USES 7u

static uint32_t count_bits(uint32_t set) {
  return (uint32_t)__builtin_popcount(set);
}

/* The least loads over all that may be kept after each use, with a cold cache: every subset, nothing clever. */
static uint32_t least_of_all(const uint32_t *uses, const bool *writes, uint32_t use_count, uint32_t capacity,
                             uint32_t runs) {
  uint32_t best[1u << THINGS], next[1u << THINGS];
  memset(best, 0x7f, sizeof best);
  best[0] = 0;
  for (uint32_t i = 0; i < runs * use_count; i++) {
    const uint32_t thing = uses[i % use_count];
    memset(next, 0x7f, sizeof next);
    for (uint32_t set = 0; set < 1u << THINGS; set++) {
      const uint32_t cost = best[set] + (set >> thing & 1 || writes[i % use_count] ? 0 : 1);
      const uint32_t with = set | 1u << thing;
      for (uint32_t left = 0; left < 1u << THINGS; left++)
        if ((left & ~with) == 0 && count_bits(left | 1u << thing) <= capacity && cost < next[left])
          next[left] = cost;
    }
    memcpy(best, next, sizeof best);
  }
  uint32_t least = UINT32_MAX;
  for (uint32_t set = 0; set < 1u << THINGS; set++)
    least = best[set] < least ? best[set] : least;
  return least;
}

START_TEST(bound_is_the_least_of_all_that_could_be_kept) {
  static least_traffic list;
  const flap_philox stream = flap_philox_stream(number("FLAP_TEST_SEED", 1), "least traffic");
  uint64_t drawn = 0;
  double sum = 0;
  for (uint32_t round = 0; round < 2000; round++) {
    const uint32_t count = 2 + (uint32_t)flap_philox_below(&stream, drawn++, USES - 1);
    const uint32_t capacity = 1 + (uint32_t)flap_philox_below(&stream, drawn++, THINGS - 1);
    uint32_t uses[USES];
    bool writes[USES];
    list.thing_count = THINGS;
    list.event_count = 0;
    for (uint32_t i = 0; i < count; i++) {
      uses[i] = (uint32_t)flap_philox_below(&stream, drawn++, THINGS);
      writes[i] = flap_philox_below(&stream, drawn++, 4) == 0;
      list.events[list.event_count++] = (least_event){.kind = writes[i] ? LEAST_WRITE : LEAST_LOAD, .thing = uses[i]};
      list.events[list.event_count++] = (least_event){.kind = LEAST_DONE, .thing = uses[i]};
    }
    for (uint32_t i = 0; i < THINGS; i++)
      list.pages[i] = 1;
    const uint32_t all = least_of_all(uses, writes, count, capacity, 3);
    const double bound = 3 * least_traffic_pages(&list, capacity, 3);
    ck_assert_double_eq_tol(bound, all > capacity ? all - capacity : 0, 1e-9);
    sum += bound;
  }
  ck_assert_double_gt(sum, 0);
}
END_TEST

/* A scan over more than there is room for: LRU would load everything each time. */
START_TEST(bound_of_a_scan_keeps_all_but_what_passes_through) {
  static least_traffic list;
  list.thing_count = 10;
  list.event_count = 0;
  for (uint32_t i = 0; i < 10; i++) {
    list.pages[i] = 3;
    list.events[list.event_count++] = (least_event){.kind = LEAST_LOAD, .thing = i};
    list.events[list.event_count++] = (least_event){.kind = LEAST_DONE, .thing = i};
  }
  ck_assert_double_eq_tol(least_traffic_pages(&list, 30, 1000), 0, 1e-9);
  /* 5 things of room hit in 4 of 9 uses on average: one passes through at each miss. */
  ck_assert_double_eq_tol(least_traffic_pages(&list, 15, 1000), 30 * 5.0 / 9, 0.1);
}
END_TEST

/* ---- plans -------------------------------------------------------------------------------------------------- */

static void push(least_traffic *list, least_kind kind, uint32_t thing) {
  ck_assert_uint_lt(list->event_count, LEAST_EVENTS_MAX);
  list->events[list->event_count++] = (least_event){.kind = kind, .thing = thing};
}

static bool loads(flap_lease_mode mode) {
  return mode == FLAP_LEASE_READ || mode == FLAP_LEASE_UPDATE || mode == FLAP_LEASE_CONSUME;
}

static least_kind end_of(flap_lease_mode mode) {
  return mode == FLAP_LEASE_CONSUME || mode == FLAP_LEASE_SCRATCH ? LEAST_DROPPED : LEAST_DONE;
}

/* The uses of a steady step, as VRAM sees them; or as VRAM and RAM together do, for which the host's updates are uses
 * like all others. */
static void list_uses(const flap_setup *setup, bool with_ram, least_traffic *list) {
  const flap_program *program = &setup->programs[setup->steady];
  list->thing_count = setup->layout.region_count;
  list->event_count = 0;
  ck_assert_uint_le(list->thing_count, LEAST_THINGS_MAX);
  for (uint32_t i = 0; i < list->thing_count; i++)
    list->pages[i] = setup->layout.regions[i].bytes / FLAP_BLOCK_ALIGN;
  for (uint32_t i = 0; i < program->op_count; i++) {
    const flap_op *op = &program->ops[i];
    const flap_lease *lease = op->operand[0] < program->lease_count ? &program->leases[op->operand[0]] : NULL;
    if (op->kind == FLAP_OP_PIN)
      push(list, loads(lease->mode) ? LEAST_LOAD : LEAST_WRITE, lease->region);
    else if (op->kind == FLAP_OP_UNPIN)
      push(list, end_of(lease->mode), lease->region);
    for (uint32_t k = 0; op->kind == FLAP_OP_HOST_ADAMW && k < 3; k++) {
      const flap_lease *job = &program->leases[op->operand[k]];
      if (with_ram)
        push(list, LEAST_LOAD, job->region);
      push(list, with_ram ? end_of(job->mode) : LEAST_CHANGED, job->region);
    }
  }
}

typedef struct comparison {
  double moved, least; /* bytes, over all trials */
  double nearest;      /* the smallest ratio, where the least is not 0 */
} comparison;

static void compare(comparison *c, const char *what, const planner_trial *trial, uint64_t moved, double least_pages) {
  const double least = least_pages * FLAP_BLOCK_ALIGN;
  ck_assert_msg((double)moved >= least * (1 - 1e-9), "%s: %s of %llu bytes, and farthest next use proves %.0f needed",
                trial->words, what, (unsigned long long)moved, least);
  c->moved += (double)moved;
  c->least += least;
  if (least > 0 && (c->nearest <= 0 || (double)moved / least < c->nearest))
    c->nearest = (double)moved / least;
}

static void report(const char *what, const comparison *c) {
  if (c->least > 0)
    printf("%s: %.2f times as much as farthest next use needs in all, %.2f times where it is nearest\n", what,
           c->moved / c->least, c->nearest);
  else
    printf("%s: farthest next use needs none, and %.0f bytes are moved\n", what, c->moved);
}

START_TEST(plans_move_no_less_than_farthest_next_use) {
  static least_traffic list;
  const uint64_t first = number("FLAP_TEST_SEED", 1), trials = number("FLAP_TRAFFIC_TRIALS", TRIALS);
  comparison bus = {0}, disk = {0};
  for (uint64_t seed = first; seed < first + trials; seed++) {
    planner_trial trial;
    flap_setup setup;
    flap_plan_costs costs;
    planner_trial_open(&trial, seed, 4, 4, seed % 2 == 0);
    MUST(flap_planner_choose(&trial.planner, &trial.budgets, &setup, &costs));
    const flap_pager_sizes *sizes = &setup.sizes;
    const uint64_t vram = sizes->vram_bytes, ram = sizes->ram_home_bytes + sizes->staging_bytes;
    list_uses(&setup, false, &list);
    compare(&bus, "copies to the device", &trial, costs.lane_bytes[FLAP_LANE_H2D],
            least_traffic_pages(&list, vram / FLAP_BLOCK_ALIGN, RUNS));
    list_uses(&setup, true, &list);
    compare(&disk, "reads from disk", &trial, costs.lane_bytes[FLAP_LANE_DISK_READ],
            least_traffic_pages(&list, (vram + ram) / FLAP_BLOCK_ALIGN, RUNS));
    flap_setup_close(&setup);
  }
  report("copies to the device", &bus);
  report("reads from disk", &disk);
  ck_assert_double_gt(bus.least, 0); /* or nothing was compared */
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("planner traffic");
  tcase_set_timeout(tcase, 0); /* ctest has one, and long runs have none */
  tcase_add_test(tcase, bound_is_the_least_of_all_that_could_be_kept);
  tcase_add_test(tcase, bound_of_a_scan_keeps_all_but_what_passes_through);
  tcase_add_test(tcase, plans_move_no_less_than_farthest_next_use);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
