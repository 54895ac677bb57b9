/* What may be taken of the host's memory, on made-up /proc and /sys: containers of both versions, nested, WSL; and what
 * a plan that does not fit there is told. */
#include "engine/machine/host_memory.h"

#include "engine/planner/planner.h"
#include "engine/planner/pressure.h"
#include "engine/planner/wear.h"
#include "io/formats/durable.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((uint64_t)1 << 20)
#define V1_MOUNTS "35 31 0:32 %s /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
#define V2_MOUNT "36 31 0:28 %s /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"

static flap_host_memory memory;

static void put(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(const char *name, const char *format, ...) {
  char path[1024], text[2048];
  va_list arguments;
  va_start(arguments, format);
  (void)vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  (void)snprintf(path, sizeof path, "%s", scratch_path(name));
  *strrchr(path, '/') = '\0';
  ck_assert_int_eq(flap_durable_make_folder(path), FLAP_OK);
  scratch_text(name, text);
}

static void look(void) {
  static char proc[512], sys[512];
  (void)snprintf(proc, sizeof proc, "%s", scratch_path("proc"));
  (void)snprintf(sys, sizeof sys, "%s", scratch_path("sys"));
  const flap_host_roots roots = {proc, sys};
  flap_host_memory_read(&roots, &memory);
}

static uint64_t left(void) {
  look();
  return flap_host_memory_left(&memory, false);
}

static void setup(void) {
  scratch_setup();
  put("proc/meminfo", "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\nSwapFree: 512 kB\n");
}

/* A group of version 2; a number of MiB, or "max". */
static void group2(const char *path, const char *max, unsigned used_mib, unsigned cache_mib) {
  char name[512], value[64];
  (void)snprintf(value, sizeof value, "%s", max);
  if (strcmp(max, "max") != 0)
    (void)snprintf(value, sizeof value, "%llu", strtoull(max, NULL, 10) << 20);
  (void)snprintf(name, sizeof name, "sys/fs/cgroup%s/memory.max", path);
  put(name, "%s\n", value);
  (void)snprintf(name, sizeof name, "sys/fs/cgroup%s/memory.current", path);
  put(name, "%llu\n", (unsigned long long)(used_mib * MIB));
  (void)snprintf(name, sizeof name, "sys/fs/cgroup%s/memory.stat", path);
  put(name, "anon 5\nactive_file 99999999\ninactive_file %llu\n", (unsigned long long)(cache_mib * MIB));
}

static void in_v2(const char *root, const char *group) {
  put("proc/self/mountinfo", "23 1 0:1 / / rw - ext4 /dev/vda rw\n" V2_MOUNT, root);
  put("proc/self/cgroup", "0::%s\n", group);
}

START_TEST(host_memory_without_groups_is_what_is_free) {
  ck_assert_uint_eq(left(), 8 * MIB);
  ck_assert_uint_eq(memory.total_bytes, 16 * MIB);
  ck_assert_uint_eq(memory.swap_bytes, MIB / 2);
  ck_assert_uint_eq(memory.group_bytes, FLAP_HOST_UNLIMITED);
  in_v2("/", "/");
  ck_assert_uint_eq(left(), 8 * MIB); /* the root group has no such files */
  in_v2("/", "/a");
  group2("/a", "max", 3, 0);
  ck_assert_uint_eq(left(), 8 * MIB);
}
END_TEST

START_TEST(host_memory_tightest_group_of_the_path_counts) {
  in_v2("/", "/outer/inner");
  group2("/outer", "4", 1, 0);
  group2("/outer/inner", "6", 1, 0);
  ck_assert_uint_eq(left(), 3 * MIB);
  ck_assert_str_eq(memory.group, "/outer");
  group2("/outer/inner", "3", 1, 0);
  ck_assert_uint_eq(left(), 2 * MIB);
  ck_assert_str_eq(memory.group, "/outer/inner");
  group2("/outer", "max", 1, 0);
  ck_assert_uint_eq(left(), 2 * MIB);
  char text[128];
  ck_assert_str_eq(flap_host_memory_limit_name(&memory, false, text, sizeof text),
                   "the container (control group /outer/inner)");
  put("sys/fs/cgroup/outer/memory.high", "%llu\n", (unsigned long long)(2 * MIB));
  ck_assert_uint_eq(left(), MIB); /* 2 less the 1 that it uses */
}
END_TEST

START_TEST(host_memory_cache_that_lies_idle_is_free) {
  in_v2("/", "/a");
  group2("/a", "6", 5, 4);
  ck_assert_uint_eq(left(), 5 * MIB);
  group2("/a", "6", 5, 50); /* more than it uses: two files are never of one moment */
  ck_assert_uint_eq(left(), 6 * MIB);
  group2("/a", "6", 7, 0); /* the limit was lowered meanwhile */
  ck_assert_uint_eq(left(), 0);
}
END_TEST

START_TEST(host_memory_version_1_is_read_too) {
  put("proc/self/mountinfo", "31 23 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" V1_MOUNTS V2_MOUNT, "/",
      "/");
  put("proc/self/cgroup", "5:devices:/x\n4:cpu,memory:/outer/inner\n3:memoryless:/y\n0::/\n");
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  put("sys/fs/cgroup/memory/outer/memory.limit_in_bytes", "%llu\n", (unsigned long long)(5 * MIB));
  put("sys/fs/cgroup/memory/outer/memory.usage_in_bytes", "%llu\n", (unsigned long long)(3 * MIB));
  put("sys/fs/cgroup/memory/outer/memory.stat", "inactive_file 77\ntotal_inactive_file %llu\n",
      (unsigned long long)MIB);
  put("sys/fs/cgroup/memory/outer/inner/memory.limit_in_bytes", "9223372036854771712\n");
  ck_assert_uint_eq(left(), 3 * MIB);
  ck_assert_str_eq(memory.group, "/outer");
}
END_TEST

/* Docker with version 1: the container sees its own group as the mount's root, under the name that it has outside. */
START_TEST(host_memory_container_sees_its_group_as_the_root) {
  put("proc/self/mountinfo", V1_MOUNTS, "/docker/abc");
  put("proc/self/cgroup", "4:memory:/docker/abc/sub\n");
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "%llu\n", (unsigned long long)(7 * MIB));
  put("sys/fs/cgroup/memory/sub/memory.limit_in_bytes", "%llu\n", (unsigned long long)(4 * MIB));
  ck_assert_uint_eq(left(), 4 * MIB);
  put("proc/self/cgroup", "4:memory:/docker/abc\n");
  ck_assert_uint_eq(left(), 7 * MIB);
  put("proc/self/cgroup", "4:memory:/docker/abcdef\n"); /* another, which cannot be seen: the mount is all there is */
  ck_assert_uint_eq(left(), 7 * MIB);
  put("proc/self/cgroup", "4:memory:/../other\n");
  ck_assert_uint_eq(left(), 7 * MIB);
}
END_TEST

/* Blanks in mountinfo are codes. */
START_TEST(host_memory_mounts_with_blanks_are_found) {
  put("proc/self/mountinfo", "35 31 0:32 /a\\040b /sys/fs/cgroup/the\\040mount\\134 rw - cgroup cgroup rw,memory\n");
  put("proc/self/cgroup", "4:memory:/a b/c\n");
  put("sys/fs/cgroup/the mount\\/c/memory.limit_in_bytes", "%llu\n", (unsigned long long)(3 * MIB));
  ck_assert_uint_eq(left(), 3 * MIB);
  ck_assert_str_eq(memory.group, "/c");
}
END_TEST

/* Somebody else's group may be mounted too, and before ours. */
START_TEST(host_memory_looks_in_all_mounts_that_are_above_the_group) {
  put("proc/self/mountinfo",
      "34 31 0:32 /other /sys/fs/cgroup/others rw - cgroup cgroup rw,memory\n" V1_MOUNTS
      "36 31 0:32 /x /sys/fs/cgroup/ours rw - cgroup cgroup rw,memory\n",
      "/");
  put("proc/self/cgroup", "4:memory:/x\n");
  put("sys/fs/cgroup/others/memory.limit_in_bytes", "%llu\n", (unsigned long long)MIB);
  ck_assert_uint_eq(left(), 8 * MIB);
  put("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "%llu\n", (unsigned long long)(4 * MIB));
  ck_assert_uint_eq(left(), 4 * MIB);
  put("sys/fs/cgroup/ours/memory.limit_in_bytes", "%llu\n", (unsigned long long)(3 * MIB));
  ck_assert_uint_eq(left(), 3 * MIB);
}
END_TEST

START_TEST(host_memory_that_is_not_told_limits_nothing) {
  char text[128];
  put("proc/meminfo", "MemTotal: 16384 kB\nMemFree: 1024 kB\nBuffers: 1 kB\nCached: 2048 kB\n");
  ck_assert_uint_eq(left(), 3 * MIB);
  put("proc/meminfo", "MemAvailable: 0 kB\nMemFree: 1024 kB\n");
  ck_assert_uint_eq(left(), 0);
  put("proc/meminfo", "nothing\n");
  put("proc/sys/kernel/osrelease", "6.6.87.2-microsoft-standard-WSL2\n");
  ck_assert_uint_eq(left(), FLAP_HOST_UNLIMITED);
  ck_assert_uint_eq(flap_host_memory_left(&memory, true), FLAP_HOST_UNLIMITED);
  in_v2("/", "/a");
  group2("/a", "6", 1, 0);
  ck_assert_uint_eq(left(), 5 * MIB);
  ck_assert_ptr_nonnull(strstr(flap_host_memory_limit_name(&memory, false, text, sizeof text), "/a"));
}
END_TEST

START_TEST(host_memory_nonsense_limits_nothing) {
  in_v2("/", "/a");
  static const char *const nonsense[] = {"", "\n", "-1\n", "12x\n", "99999999999999999999999\n", "abc\n"};
  for (size_t i = 0; i < sizeof nonsense / sizeof *nonsense; i++) {
    put("sys/fs/cgroup/a/memory.max", "%s", nonsense[i]);
    ck_assert_uint_eq(left(), 8 * MIB);
  }
  put("proc/self/cgroup", "0\n::\n0:\nx:y\n");
  put("proc/self/mountinfo", "a b\n - cgroup2\n1 2 3 4\n");
  ck_assert_uint_eq(left(), 8 * MIB);
}
END_TEST

START_TEST(host_memory_of_wsl_may_be_pinned_by_half) {
  char text[128];
  put("proc/meminfo", "MemTotal: 16384 kB\nMemAvailable: 12288 kB\n");
  put("proc/sys/kernel/osrelease", "6.6.87.2-microsoft-standard-WSL2\n");
  ck_assert_uint_eq(left(), 12 * MIB);
  ck_assert_uint_eq(flap_host_memory_left(&memory, true), 8 * MIB);
  ck_assert_ptr_nonnull(strstr(flap_host_memory_limit_name(&memory, true, text, sizeof text), "WSL"));
  put("proc/sys/kernel/osrelease", "6.1.0-43-amd64\n");
  look();
  ck_assert_uint_eq(flap_host_memory_left(&memory, true), 12 * MIB);
  ck_assert_str_eq(flap_host_memory_limit_name(&memory, true, text, sizeof text), "this machine");
}
END_TEST

/* ---- a plan that does not fit ------------------------------------------------------------------------------ */

static flap_run_config config;
static flap_prepared prepared;

static void describe(void) {
  flap_run_config_defaults(&config);
  config.model =
      json_pack("{s:s, s:i, s:i, s:i, s:i, s:i}", "model_type", "llama", "hidden_size", 64, "intermediate_size", 128,
                "num_hidden_layers", 2, "num_attention_heads", 2, "max_position_embeddings", 64);
  strcpy(config.tokenizer, "bytes");
  config.device = FLAP_RUN_DEVICE_CPU;
  config.cutoff_len = 32;
  config.per_device_train_batch_size = 1;
  config.expert.threads = 1;
  config.vram = config.ram = (flap_size){FLAP_SIZE_BYTES, 64 * MIB};
}

static void prepare(void) {
  const flap_status opened = flap_prepare_open(&config, false, &prepared);
  ck_assert_msg(opened == FLAP_OK, "%s", flap_error_message());
  const flap_status planned = flap_prepare_plan(&prepared, FLAP_MODE_TRAIN, 1, 32, 1, 0);
  ck_assert_msg(planned == FLAP_OK, "%s", flap_error_message());
}

/* The number after "<key>=" in the error record. */
static uint64_t advised(const char *key) {
  const char *at = strstr(flap_error_message(), key);
  ck_assert_msg(at != NULL, "%s", flap_error_message());
  return strtoull(at + strlen(key), NULL, 10);
}

START_TEST(pressure_names_the_limit_and_budgets_that_work) {
  const uint64_t process = 96 * MIB; /* what is left beside budgets */
  describe();
  prepare();
  const uint64_t needs = prepared.setup.vram_bytes + prepared.setup.ram_bytes;
  flap_host_memory host = {.total_bytes = 1024 * MIB,
                           .available_bytes = process + needs,
                           .group_bytes = FLAP_HOST_UNLIMITED,
                           .address_bytes = FLAP_HOST_UNLIMITED,
                           .pinned_bytes = FLAP_HOST_UNLIMITED};
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_OK);
  host.available_bytes--;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_BUDGET);
  ck_assert(scratch_error_has("this machine leaves"));
  host.swap_bytes = 1;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_OK);
  host.available_bytes = FLAP_HOST_UNLIMITED;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_OK);

  /* The container leaves three quarters: what is advised has a plan, and that fits. */
  host.available_bytes = 1024 * MIB;
  host.group_bytes = process + needs * 3 / 4;
  strcpy(host.group, "/box");
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_BUDGET);
  ck_assert(scratch_error_has("control group /box"));
  ck_assert(scratch_error_has("works"));
  flap_budgets trial = prepared.budgets;
  trial.vram_bytes = advised("vram=");
  trial.ram_bytes = advised(" ram=");
  flap_setup setup_of_trial;
  flap_plan_costs costs;
  const flap_status chosen = flap_planner_choose(&prepared.planner, &trial, &setup_of_trial, &costs);
  ck_assert_msg(chosen == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_le(setup_of_trial.vram_bytes + setup_of_trial.ram_bytes, needs * 3 / 4);
  flap_setup_close(&setup_of_trial);

  host.group_bytes = process + 4096;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_BUDGET);
  ck_assert(scratch_error_has("no budgets work there"));

  /* A device's driver takes memory of the host, when it is opened. */
  host.group_bytes = needs + 4096 * MIB;
  host.available_bytes = needs + 512 * MIB;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_OK);
  prepared.machine.process_bytes = 4096 * MIB;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_BUDGET);
  host.available_bytes = needs + 4096 * MIB;
  ck_assert_int_eq(flap_pressure_check(&prepared, &host), FLAP_OK);
  flap_prepare_close(&prepared);
  flap_run_config_close(&config);
}
END_TEST

/* ---- disks that are smaller than they were said to be ------------------------------------------------------ */

static uint64_t free_bytes;
flap_status __wrap_flap_block_space(const char *path, uint64_t *free_bytes_out);
flap_status __wrap_flap_block_space(const char *path, uint64_t *free_bytes_out) {
  (void)path;
  *free_bytes_out = free_bytes;
  return FLAP_OK;
}

START_TEST(pressure_counts_the_disks_of_a_drive_together) {
  static const char *const names[] = {"one", "two"};
  free_bytes = 1024 * MIB;
  describe();
  /* States of 19 MiB: whatever the disks were measured to be, there is no plan without them. */
  ck_assert_int_eq(json_object_set_new(config.model, "num_hidden_layers", json_integer(40)), 0);
  config.ram.bytes = config.vram.bytes = 3 * MIB;
  config.disk_count = 2;
  for (uint32_t i = 0; i < 2; i++) {
    ck_assert_int_eq(flap_durable_make_folder(scratch_path(names[i])), FLAP_OK);
    (void)snprintf(config.disk[i].path, sizeof config.disk[i].path, "%s", scratch_path(names[i]));
    config.disk[i].size = (flap_size){FLAP_SIZE_BYTES, 1 << 30};
  }
  prepare();
  uint64_t share[FLAP_RUN_DISKS_MAX];
  flap_prepare_share_of_disks(&prepared, share);
  ck_assert(share[0] > 0 && share[1] > 0);
  free_bytes = share[0] + share[1];
  ck_assert_msg(flap_pressure_check_disks(&prepared) == FLAP_OK, "%s", flap_error_message());
  free_bytes--;
  ck_assert_int_eq(flap_pressure_check_disks(&prepared), FLAP_NO_SPACE);
  ck_assert(scratch_error_has("two"));
  ck_assert(scratch_error_has("for all disks there"));
  free_bytes = share[0] - 1;
  ck_assert_int_eq(flap_pressure_check_disks(&prepared), FLAP_NO_SPACE);
  ck_assert(scratch_error_has("one"));
  ck_assert(scratch_error_has("what is free is"));
  flap_prepare_close(&prepared);
  flap_run_config_close(&config);
}
END_TEST

START_TEST(room_for_checkpoints_is_looked_for_above_what_is_not_there) {
  describe();
  config.save_strategy = FLAP_STRATEGY_STEPS;
  config.save_steps = 10;
  config.export_final = true;
  (void)snprintf(config.output_dir, sizeof config.output_dir, "%s", scratch_path("not/there"));
  prepare();
  flap_plan *plan = &prepared.plan;
  flap_wear_describe(&config, &(flap_wear_run){.end = 50}, plan);
  ck_assert_uint_gt(plan->checkpoint_bytes, 0);
  free_bytes = plan->export_bytes + 2 * plan->checkpoint_bytes; /* of the five, all of which are kept */
  ck_assert_int_eq(flap_wear_check_space(&config, plan), FLAP_OK);
  free_bytes--;
  ck_assert_int_eq(flap_wear_check_space(&config, plan), FLAP_NO_SPACE);
  ck_assert(scratch_error_has("output_dir: "));
  config.save_total_limit = 3;
  flap_wear_describe(&config, &(flap_wear_run){.end = 50}, plan);
  free_bytes = plan->export_bytes + 4 * plan->checkpoint_bytes;
  ck_assert_int_eq(flap_wear_check_space(&config, plan), FLAP_OK);
  free_bytes--;
  ck_assert_int_eq(flap_wear_check_space(&config, plan), FLAP_NO_SPACE);
  strcpy(config.resume_from_checkpoint, "auto");
  ck_assert_int_eq(flap_wear_check_space(&config, plan), FLAP_OK);
  flap_prepare_close(&prepared);
  flap_run_config_close(&config);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("host_memory");
  TCase *tests = tcase_create("all");
  tcase_add_checked_fixture(tests, setup, scratch_teardown);
  tcase_set_timeout(tests, 60);
  tcase_add_test(tests, host_memory_without_groups_is_what_is_free);
  tcase_add_test(tests, host_memory_tightest_group_of_the_path_counts);
  tcase_add_test(tests, host_memory_cache_that_lies_idle_is_free);
  tcase_add_test(tests, host_memory_version_1_is_read_too);
  tcase_add_test(tests, host_memory_container_sees_its_group_as_the_root);
  tcase_add_test(tests, host_memory_mounts_with_blanks_are_found);
  tcase_add_test(tests, host_memory_looks_in_all_mounts_that_are_above_the_group);
  tcase_add_test(tests, host_memory_that_is_not_told_limits_nothing);
  tcase_add_test(tests, host_memory_nonsense_limits_nothing);
  tcase_add_test(tests, host_memory_of_wsl_may_be_pinned_by_half);
  tcase_add_test(tests, pressure_names_the_limit_and_budgets_that_work);
  tcase_add_test(tests, pressure_counts_the_disks_of_a_drive_together);
  tcase_add_test(tests, room_for_checkpoints_is_looked_for_above_what_is_not_there);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
