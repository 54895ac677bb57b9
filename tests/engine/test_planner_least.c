/* The least of a budget is one that the planner accepts, and what is accepted has a least: over a walk of small rams
 * and of disks, some too small. And a refusal names a budget, and a size of it that works.
 */
#include "tests/engine/planner_trials.h"

#include "base/units.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
#define ROOM ((uint64_t)1 << 30)
#define PAGE 4096u
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STEPS 3 /* everything takes several times as long */
#define KINDS 1
#else
#define STEPS 6
#define KINDS 2 /* with clipping, and with updates in the backward */
#endif

typedef enum lever { VRAM, RAM, DISK } lever;
static const char *const NAMES[] = {"vram", "ram", "disk"};

static flap_model_config model;
static flap_machine machine;
static flap_op_times times;
static flap_planner planner;

static void open_planner(bool needs_no_norm) {
  model = (flap_model_config){.family = flap_model_find_family("qwen2"),
                              .vocab_size = 320,
                              .hidden_size = 96,
                              .intermediate_size = 256,
                              .num_hidden_layers = 2,
                              .num_attention_heads = 6,
                              .num_key_value_heads = 2,
                              .max_position_embeddings = 128,
                              .rms_norm_eps = 1e-6,
                              .initializer_range = 0.02,
                              .tie_word_embeddings = true,
                              .rope = {.theta = 10000}};
  MUST(flap_model_finish_config(&model));
  flap_device_default_machine(FLAP_DEVICE_CPU, &machine);
  machine.disk_read_bytes = machine.disk_write_bytes = 1e9;
  planner = (flap_planner){.spec = {.model = &model,
                                    .shape = {.dtype = FLAP_BF16, .batch = 4, .sequence = 64},
                                    .mode = FLAP_MODE_TRAIN,
                                    .gradient_dtype = FLAP_BF16,
                                    .micro_batches = 2,
                                    .threads = 1,
                                    .device = FLAP_DEVICE_CPU,
                                    .io = FLAP_BLOCK_SIM,
                                    .needs_no_norm = needs_no_norm,
                                    .disk_count = 1,
                                    .disk_paths = {"disk"}},
                           .machine = &machine};
  MUST(planner_times(&planner, &times));
  planner.times = &times;
}

static flap_status least_of(lever which, const flap_budgets *budgets, uint64_t *least) {
  return which == VRAM  ? flap_planner_vram_min(&planner, budgets, least)
         : which == RAM ? flap_planner_ram_min(&planner, budgets, least)
                        : flap_planner_disk_min(&planner, budgets, least);
}

static uint64_t *budget(flap_budgets *budgets, lever which) {
  return which == VRAM ? &budgets->vram_bytes : which == RAM ? &budgets->ram_bytes : &budgets->disk_bytes[0];
}

static bool is_accepted(const flap_budgets *budgets) {
  flap_setup setup;
  flap_plan_costs costs;
  const flap_status status = flap_planner_choose(&planner, budgets, &setup, &costs);
  if (status == FLAP_OK)
    flap_setup_close(&setup);
  else
    ck_assert_int_eq(status, FLAP_BUDGET);
  return status == FLAP_OK;
}

static const char *describe(const flap_budgets *b) {
  static char text[128];
  (void)snprintf(text, sizeof text, "vram %llu, ram %llu, disk %llu", (unsigned long long)b->vram_bytes,
                 (unsigned long long)b->ram_bytes, (unsigned long long)b->disk_bytes[0]);
  return text;
}

/* "<budget>: ... <number> bytes [in all] is the least that works"; with those numbers a plan fits. */
static void check_advice(const flap_budgets *refused) {
  char message[512];
  flap_budgets advised = *refused;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  unsigned long long vram = 0, ram = 0;
  const char *both = strstr(message, "batch: ");
  if (both != NULL && sscanf(both, "batch: %llu bytes of vram with %llu bytes of ram work", &vram, &ram) == 2) {
    advised.vram_bytes = vram;
    advised.ram_bytes = ram;
  } else {
    const char *number = strstr(message, " bytes is the least");
    if (number == NULL)
      number = strstr(message, " bytes in all is the least");
    ck_assert_msg(number != NULL, "%s: no size is named: %s", describe(refused), message);
    while (number > message && number[-1] >= '0' && number[-1] <= '9')
      number--;
    int named = -1;
    for (int i = VRAM; i <= DISK; i++)
      if (strncmp(message, NAMES[i], strlen(NAMES[i])) == 0 && message[strlen(NAMES[i])] == ':')
        named = i;
    ck_assert_msg(named >= 0, "%s: no budget is named: %s", describe(refused), message);
    *budget(&advised, (lever)named) = strtoull(number, NULL, 10);
  }
  ck_assert_msg(is_accepted(&advised), "%s: %s; but then: %s", describe(refused), message, flap_error_message());
}

/* The least of one budget beside given others. Of vram a page less is refused; of the others, which are looked for in
 * few of all plans, half as much. Returns whether there is one. */
static bool check_least(lever which, const flap_budgets *given, uint64_t *least_out) {
  flap_budgets budgets = *given;
  uint64_t least = 0;
  const flap_status status = least_of(which, given, &least);
  if (status != FLAP_OK) {
    ck_assert_int_eq(status, FLAP_BUDGET);
    *budget(&budgets, which) = ROOM;
    check_advice(&budgets);
    *budget(&budgets, which) = ROOM;
    ck_assert_msg(!is_accepted(&budgets), "%s is accepted, but there is no least %s", describe(&budgets), NAMES[which]);
    return false;
  }
  *budget(&budgets, which) = *least_out = least;
  ck_assert_msg(is_accepted(&budgets), "%s, of which the least %s: %s", describe(&budgets), NAMES[which],
                flap_error_message());
  if (least < PAGE)
    return true;
  *budget(&budgets, which) = which == VRAM ? least - PAGE : least / 2;
  ck_assert_msg(!is_accepted(&budgets), "%s is accepted, but %s %llu is the least", describe(&budgets), NAMES[which],
                (unsigned long long)least);
  return true;
}

/* What is accepted has a least of each budget, whichever of them are tight. */
static void check_accepted(const flap_budgets *accepted) {
  for (int i = VRAM; i <= DISK; i++) {
    uint64_t least = 0;
    const flap_status status = least_of((lever)i, accepted, &least);
    ck_assert_msg(status == FLAP_OK, "%s is accepted, but it has no least %s: %s", describe(accepted), NAMES[i],
                  flap_error_message());
    const uint64_t given = i == VRAM ? accepted->vram_bytes : i == RAM ? accepted->ram_bytes : accepted->disk_bytes[0];
    ck_assert_msg(least <= given * 2, "%s is accepted, but %s %llu is said to be the least", describe(accepted),
                  NAMES[i], (unsigned long long)least);
  }
  uint64_t ram = 0, disk = 0;
  MUST(flap_planner_ram_and_disk_min(&planner, accepted, &ram, &disk));
}

static void walk(lever along, uint64_t first, uint64_t last, unsigned steps, flap_budgets budgets) {
  unsigned found = 0;
  for (unsigned i = 0; i <= steps; i++) {
    *budget(&budgets, along) =
        (first + (last - first) * i / steps) / (along == RAM ? 1 : PAGE) * (along == RAM ? 1 : PAGE);
    flap_budgets accepted = budgets;
    for (int which = VRAM; which <= DISK; which++) {
      if (which == (int)along || !check_least((lever)which, &budgets, budget(&accepted, (lever)which)))
        continue;
      found++;
      if (which == VRAM)
        check_accepted(&accepted);
      accepted = budgets;
    }
  }
  ck_assert_uint_gt(found, steps);
}

/* From what is too small to what is plenty, closest where tables, lists and staging are all that ram has room for. */
START_TEST(least_budgets_beside_a_small_ram_are_accepted) {
  uint64_t least = 0, vram = 0;
  flap_budgets budgets = {.vram_bytes = ROOM, .ram_bytes = ROOM, .disk_bytes = {ROOM}};
  open_planner(_i == 0);
  MUST(flap_planner_vram_min(&planner, &budgets, &vram));
  MUST(flap_planner_ram_min(&planner, &budgets, &least));
  walk(RAM, least * 4 / 5, least * 2, STEPS, budgets);
  budgets.vram_bytes = vram * 3 / 2;
  walk(RAM, least, least * 4, STEPS / 2, budgets);
}
END_TEST

START_TEST(least_budgets_beside_a_small_disk_are_accepted) {
  uint64_t least = 0;
  flap_budgets budgets = {.vram_bytes = ROOM, .ram_bytes = ROOM, .disk_bytes = {ROOM}};
  open_planner(_i == 0);
  MUST(flap_planner_ram_min(&planner, &budgets, &least));
  budgets.ram_bytes = least * 3 / 2;
  walk(DISK, 0, 3 * FLAP_MIB, STEPS, budgets);
}
END_TEST

START_TEST(budgets_that_are_all_too_small_are_told_which_work) {
  flap_budgets budgets = {.vram_bytes = 200000, .ram_bytes = 20000, .disk_bytes = {100000}};
  open_planner(false);
  ck_assert(!is_accepted(&budgets));
  check_advice(&budgets);
  uint64_t least = 0;
  for (int which = VRAM; which <= DISK; which++) {
    ck_assert_int_eq(least_of((lever)which, &budgets, &least), FLAP_BUDGET);
    flap_budgets rest = budgets;
    *budget(&rest, (lever)which) = ROOM;
    check_advice(&rest);
  }
}
END_TEST

/* Without a disk, in a ram that has room for all regions only as some of them share their places: by vram beside which
 * the first slices that are tried have no room. */
START_TEST(ram_that_regions_share_is_enough) {
  static const uint64_t seeds[] = {30, 46, 48}, vram_shares[] = {1, 2, 3}; /* 50ths beyond the least */
  for (size_t i = 0; i < sizeof seeds / sizeof *seeds; i++) {
    planner_trial t;
    flap_setup setup;
    flap_plan_costs costs;
    uint64_t vram = 0, ram = 0;
    planner_trial_open(&t, seeds[i], 6, 6, false);
    t.planner.spec.disk_count = 0;
    t.planner.activations = seeds[i] % 3 == 0 ? FLAP_ACTIVATIONS_OFFLOAD : FLAP_ACTIVATIONS_AUTO;
    t.budgets.ram_bytes = FLAP_BUDGET_PLENTY;
    MUST(flap_planner_vram_min(&t.planner, &t.budgets, &vram));
    t.budgets.vram_bytes = vram + vram_shares[i] * vram / 50;
    MUST(flap_planner_ram_min(&t.planner, &t.budgets, &ram));
    t.budgets.ram_bytes = ram;
    MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &costs));
    ck_assert_uint_le(setup.ram_bytes, ram);
    flap_setup_close(&setup);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("planner least");
  tcase_set_timeout(tcase, 0); /* ctest has one */
  tcase_add_loop_test(tcase, least_budgets_beside_a_small_ram_are_accepted, 0, KINDS);
  tcase_add_loop_test(tcase, least_budgets_beside_a_small_disk_are_accepted, 0, KINDS);
  tcase_add_test(tcase, budgets_that_are_all_too_small_are_told_which_work);
  tcase_add_test(tcase, ram_that_regions_share_is_enough);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
