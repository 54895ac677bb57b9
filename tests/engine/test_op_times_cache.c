/* What operations take on a card, kept from one run to the next: found again to the last digit, for the same card,
 * rates, shapes and products alone; and bad files are as if they were not there. */
#include "engine/machine/host_times.h"
#include "engine/machine/op_times_cache.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TARGET "sm_90 NVIDIA Test, cublaslt-13.1.0"

static flap_model_config config;
static flap_machine machine;
static flap_matmul_choice matmuls;
static flap_op_times_spec spec;
static flap_op_times times;
static flap_op_times_cache cache;

static void fill_times(void) {
  const flap_saved_set *sets = flap_model_saved_sets(&config, &times.set_count);
  for (uint32_t i = 0; i < times.set_count; i++) {
    times.set_mask[i] = sets[i].mask;
    times.set_recompute_ns[i] = 900 - i;
  }
  times.measured = true;
  times.embed_ns = 1, times.forward_ns = 2, times.recompute_ns = 3, times.loss_ns = 4, times.head_ns = 5;
  times.head_fresh_ns = 6, times.embed_backward_ns = 9;
  times.launch_ns = 10, times.store_ns = 0.1, times.zero_ns = 1.0 / 3, times.adamw_ns = 0.0099;
  for (uint32_t i = 0; i < FLAP_SUMS_KINDS; i++)
    times.backward_ns[i] = 11 + i, times.backward_spare_ns[i] = 8 - i;
  times.measure_ns = 0.11, times.store_final_ns = 0.12, times.measure_final_ns = 0.13;
  times.adamw_embedding_ns = 0.7, times.host = (flap_host_ns){0.19671234567890123, 0.275};
  times.host_embedding = (flap_host_ns){0.2, 0.3}, times.copies_beside_host = 1.37;
  times.sustained = 1.25;
}

static void setup(void) {
  scratch_setup();
  ck_assert_int_eq(setenv("XDG_CACHE_HOME", scratch_path("cache"), 1), 0);
  rig_model(false, true, &config);
  memset(&times, 0, sizeof times);
  fill_times();
  flap_device_default_machine(FLAP_DEVICE_CUDA, &machine);
  const flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 2, .sequence = 64};
  RIG_OK(flap_matmul_choice_open(TARGET, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, "", &matmuls));
  spec = (flap_op_times_spec){.model = &config,
                              .shape = shape,
                              .gradient_dtype = FLAP_BF16,
                              .training = true,
                              .threads = 4,
                              .matmuls = &matmuls};
  spec.host_bytes = flap_host_times_bytes(&spec);
}

static bool finds(flap_op_times *found) {
  memset(found, 0, sizeof *found);
  flap_op_times_cache_open(&spec, &machine, &cache);
  const bool there = flap_op_times_cache_find(&cache, &spec, found);
  ck_assert_str_eq(flap_error_message(), "");
  return there;
}

static void keep(void) {
  flap_op_times_cache_open(&spec, &machine, &cache);
  flap_op_times_cache_keep(&cache, &times);
  ck_assert_str_eq(flap_error_message(), "");
}

START_TEST(times_are_found_again_to_the_last_digit) {
  flap_op_times found;
  ck_assert(!finds(&found));
  ck_assert(!scratch_exists("cache")); /* looking leaves nothing behind */
  keep();
  ck_assert(finds(&found));
  ck_assert_mem_eq(&found, &times, sizeof times);
}
END_TEST

/* A run on the cpu has no table of products, and does not take a card's for its own. */
START_TEST(times_of_the_cpu_are_kept_too) {
  flap_op_times found;
  keep();
  spec.matmuls = NULL;
  spec.host_bytes = 0;
  ck_assert(!finds(&found));
  keep();
  ck_assert(finds(&found));
  ck_assert_mem_eq(&found, &times, sizeof times);
  spec.shape.sequence *= 2;
  ck_assert(!finds(&found));
}
END_TEST

/* Each of these makes another run of it, or another machine. */
START_TEST(times_belong_to_a_run_and_a_machine) {
  flap_op_times found;
  keep();
  const flap_op_times_spec same = spec;
  const flap_machine here = machine;
  for (int change = 0; change < 9; change++) {
    spec = same;
    machine = here;
    matmuls.table.count = 0;
    switch (change) {
    case 0:
      spec.threads = 8;
      break;
    case 1:
      spec.gradient_dtype = FLAP_F32;
      break;
    case 2:
      spec.optim = FLAP_OPTIM_ADAMW_8BIT;
      break;
    case 3:
      machine.h2d_bytes *= 1.0001; /* measured anew */
      break;
    case 4:
      machine.host_bytes *= 1.0001;
      break;
    case 5:
      (void)snprintf(machine.name, sizeof machine.name, "another card");
      break;
    case 6:
      matmuls.table.count = 1; /* other algorithms */
      break;
    case 7:
      spec.shape.batch = 3;
      break;
    default:
      (void)snprintf(matmuls.table.target, sizeof matmuls.table.target, "another library");
    }
    ck_assert_msg(!finds(&found), "change %d", change);
  }
}
END_TEST

START_TEST(times_without_the_host_serve_those_who_do_not_ask) {
  flap_op_times found;
  times.host = times.host_embedding = (flap_host_ns){0, 0};
  keep();
  ck_assert(!finds(&found));
  spec.host_bytes = 0;
  ck_assert(finds(&found));
}
END_TEST

START_TEST(sets_of_another_version_do_not_count) {
  flap_op_times found;
  times.set_mask[0] ^= 1u << 20;
  keep();
  ck_assert(!finds(&found));
  times.set_count--;
  keep();
  ck_assert(!finds(&found));
}
END_TEST

/* The file with `from` replaced; or cut there, where `to` is NULL. */
static void damage(const char *text, const char *from, const char *to) {
  const char *at = strstr(text, from);
  ck_assert_msg(at != NULL, "%s is not in the file", from);
  FILE *file = fopen(cache.path, "w");
  ck_assert_ptr_nonnull(file);
  ck_assert_uint_eq(fwrite(text, 1, (size_t)(at - text), file), (size_t)(at - text));
  if (to != NULL)
    ck_assert_int_gt(fprintf(file, "%s%s", to, at + strlen(from)), 0);
  ck_assert_int_eq(fclose(file), 0);
}

START_TEST(bad_files_are_as_if_they_were_not_there) {
  static const char *const changes[][2] = {{"flap times 4", "flap times 0"},
                                           {"\"forward_ns\": 2", "\"forward_ns\": -2"},
                                           {"\"forward_ns\": 2", "\"forward_ns\": \"2\""},
                                           {"\"forward_ns\"", "\"forwards_ns\""},
                                           {"\"copies_beside_host\": 1.37", "\"copies_beside_host\": 0.5"},
                                           {"\"sustained\": 1.25", "\"sustained\": 0.99"},
                                           {"\"adamw_ns\": 0.0099", "\"adamw_ns\": 1e300"},
                                           {"\"sets\": [", "\"sets\": [7, "},
                                           {"\"mask\"", "\"masks\""},
                                           {"\"sets\"", NULL}};
  flap_op_times found;
  char text[8192];
  keep();
  FILE *file = fopen(cache.path, "r");
  const size_t bytes = fread(text, 1, sizeof text - 1, file);
  text[bytes] = '\0';
  (void)fclose(file);
  for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
    damage(text, changes[i][0], changes[i][1]);
    ck_assert_msg(!finds(&found), "%s", changes[i][0]);
    keep(); /* mends it */
    ck_assert(finds(&found));
  }
}
END_TEST

START_TEST(where_there_is_no_place_nothing_is_kept) {
  flap_op_times found;
  ck_assert_int_eq(unsetenv("XDG_CACHE_HOME"), 0);
  ck_assert_int_eq(setenv("HOME", "", 1), 0);
  keep();
  ck_assert_str_eq(cache.path, "");
  ck_assert(!finds(&found));
  ck_assert_int_eq(setenv("XDG_CACHE_HOME", "/proc/no/such/folder", 1), 0);
  keep();
  ck_assert(!finds(&found));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("op times cache");
  tcase_set_timeout(tests, 120);
  tcase_add_checked_fixture(tests, setup, scratch_teardown);
  tcase_add_test(tests, times_are_found_again_to_the_last_digit);
  tcase_add_test(tests, times_of_the_cpu_are_kept_too);
  tcase_add_test(tests, times_belong_to_a_run_and_a_machine);
  tcase_add_test(tests, times_without_the_host_serve_those_who_do_not_ask);
  tcase_add_test(tests, sets_of_another_version_do_not_count);
  tcase_add_test(tests, bad_files_are_as_if_they_were_not_there);
  tcase_add_test(tests, where_there_is_no_place_nothing_is_kept);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
