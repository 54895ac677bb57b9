/* Rates of this machine: measured plausibly, kept, found again, and safe from broken files and from company. */
#include "engine/engine.h"

#include "base/log.h"
#include "base/units.h"
#include "io/formats/json_file.h"

#include <check.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[256];

static const char *path_of(const char *name) {
  static char paths[4][512];
  static unsigned turn;
  char *path = paths[turn++ % 4];
  (void)snprintf(path, sizeof paths[0], "%s/%s", folder, name);
  return path;
}

static void setup(void) {
  const char *temporary = getenv("TMPDIR");
  (void)snprintf(folder, sizeof folder, "%s/flap_machine_XXXXXX", temporary ? temporary : "/tmp");
  ck_assert_ptr_nonnull(mkdtemp(folder));
  ck_assert_int_eq(setenv("XDG_CACHE_HOME", path_of("cache"), 1), 0);
  ck_assert_int_eq(unsetenv("FLAP_MACHINE"), 0);
}

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *where) {
  (void)about, (void)kind, (void)where;
  return remove(path);
}

static void teardown(void) {
  (void)nftw(folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static void write_text(const char *path, const char *text) {
  FILE *file = fopen(path, "w");
  ck_assert_ptr_nonnull(file);
  ck_assert_int_ge(fputs(text, file), 0);
  ck_assert_int_eq(fclose(file), 0);
}

static char *read_text(const char *path) {
  FILE *file = fopen(path, "r");
  ck_assert_msg(file != NULL, "%s is missing", path);
  char *text = calloc(1, 65536);
  (void)!fread(text, 1, 65535, file);
  (void)fclose(file);
  return text;
}

static flap_machine machine_for(uint32_t threads, const char *disk, uint64_t disk_bytes, bool fresh) {
  flap_machine machine;
  memset(&machine, 0xff, sizeof machine);
  const flap_machine_query query = {
      .device = FLAP_RUN_DEVICE_AUTO, .threads = threads, .disk_path = disk, .disk_bytes = disk_bytes, .fresh = fresh};
  const flap_status status = flap_engine_machine(&query, &machine);
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
  return machine;
}

/* Where only the status matters. */
static flap_status ask(flap_run_device device, uint32_t threads, const char *disk, bool fresh) {
  flap_machine machine;
  const flap_machine_query query = {.device = device, .threads = threads, .disk_path = disk, .fresh = fresh};
  return flap_engine_machine(&query, &machine);
}

static flap_machine machine_of(uint32_t threads, const char *disk, bool fresh) {
  return machine_for(threads, disk, 0, fresh);
}

static void same_rates(const flap_machine *a, const flap_machine *b) {
  ck_assert_str_eq(a->name, b->name);
  ck_assert_double_eq(a->flops_bf16, b->flops_bf16);
  ck_assert_double_eq(a->flops_f32, b->flops_f32);
  ck_assert_double_eq(a->device_bytes, b->device_bytes);
  ck_assert_double_eq(a->h2d_bytes, b->h2d_bytes);
  ck_assert_double_eq(a->d2h_bytes, b->d2h_bytes);
  ck_assert_double_eq(a->host_bytes, b->host_bytes);
  ck_assert_uint_eq(a->launch_ns, b->launch_ns);
  ck_assert_uint_eq(a->copy_ns, b->copy_ns);
  ck_assert_uint_eq(a->disk_ns, b->disk_ns);
  ck_assert_int_eq(a->synchronous, b->synchronous);
  ck_assert_uint_eq(a->shared_cores, b->shared_cores);
}

/* A file with one entry of made-up numbers; %s is more of the entry. */
static const char *made_up(const char *more) {
  static char text[2048];
  (void)snprintf(text, sizeof text,
                 "{\"format\": \"flap machine 1\", \"machines\": [{\"device\": \"cpu\", \"flops_bf16\": 1e9,"
                 " \"flops_f32\": 2e9, \"device_bytes\": 3e9, \"h2d_bytes\": 4e9, \"d2h_bytes\": 5e9,"
                 " \"host_bytes\": 6e9%s}]}\n",
                 more);
  return text;
}

START_TEST(measured_rates_are_plausible_and_quick) {
  uint64_t begun_ns = flap_units_now_ns();
  flap_machine machine = machine_of(2, folder, false);
  double seconds = (double)(flap_units_now_ns() - begun_ns) * 1e-9;
  printf("%s: bf16 %.1f, fp32 %.1f GFLOP/s; copies %.1f and %.1f, host %.1f GB/s; disk %.2f and %.2f GB/s; launch %.1f "
         "us; measured in %.2f s\n",
         machine.name, machine.flops_bf16 * 1e-9, machine.flops_f32 * 1e-9, machine.h2d_bytes * 1e-9,
         machine.d2h_bytes * 1e-9, machine.host_bytes * 1e-9, machine.disk_read_bytes * 1e-9,
         machine.disk_write_bytes * 1e-9, (double)machine.launch_ns * 1e-3, seconds);
  ck_assert_double_lt(seconds, 20); /* two, where nobody else works */
  ck_assert(machine.flops_bf16 > 1e8 && machine.flops_bf16 < 1e15);
  ck_assert(machine.flops_f32 > 1e8 && machine.flops_f32 < 1e15);
  ck_assert(machine.h2d_bytes > 1e7 && machine.h2d_bytes < 1e13);
  ck_assert(machine.d2h_bytes > 1e7 && machine.d2h_bytes < 1e13);
  ck_assert(machine.host_bytes > 1e7 && machine.device_bytes > 1e7);
  ck_assert(machine.disk_read_bytes > 1e4 && machine.disk_write_bytes > 1e4);
  ck_assert(machine.disk_ns > 0 && machine.copy_ns > 0 && machine.synchronous);
  ck_assert_ptr_nonnull(strstr(machine.name, ", 2 threads"));
}
END_TEST

START_TEST(measured_rates_are_kept_by_threads_and_disk) {
  flap_machine first = machine_of(1, NULL, false);
  ck_assert_double_eq(first.disk_read_bytes, 0);
  flap_machine again = machine_of(1, NULL, false);
  same_rates(&first, &again);
  flap_machine with_disk = machine_of(1, folder, false); /* only the disk is new */
  same_rates(&first, &with_disk);
  ck_assert_double_gt(with_disk.disk_read_bytes, 0);
  flap_machine kept = machine_of(1, path_of("."), false); /* the same folder by another name */
  ck_assert_double_eq(kept.disk_read_bytes, with_disk.disk_read_bytes);
  ck_assert_double_eq(kept.disk_write_bytes, with_disk.disk_write_bytes);
  ck_assert_double_gt(with_disk.disk_both_bytes, 0);
  ck_assert_double_eq(kept.disk_both_bytes, with_disk.disk_both_bytes);
  flap_machine two = machine_of(2, NULL, false);
  ck_assert_ptr_nonnull(strstr(two.name, ", 2 threads"));
  again = machine_of(1, folder, false);
  same_rates(&first, &again);
  ck_assert_double_eq(again.disk_read_bytes, with_disk.disk_read_bytes);
}
END_TEST

static bool same_disk(const flap_machine *a, const flap_machine *b) {
  return a->disk_read_bytes == b->disk_read_bytes && a->disk_write_bytes == b->disk_write_bytes &&
         a->disk_both_bytes == b->disk_both_bytes;
}

START_TEST(a_run_that_needs_much_of_a_disk_measures_more_of_it) {
  const uint64_t gib = (uint64_t)1 << 30;
  const flap_machine little = machine_of(1, folder, false), much = machine_for(1, folder, 2 * gib, false);
  ck_assert(!same_disk(&little, &much));
  same_rates(&little, &much); /* only the disk */
  char *text = read_text(path_of("cache/flap/machine.json"));
  ck_assert_ptr_nonnull(strstr(text, "\"span_bytes\": 268435456"));
  free(text);
  const flap_machine less = machine_for(1, folder, gib, false), twice = machine_for(1, folder, 4 * gib, false);
  ck_assert(same_disk(&less, &much));
  ck_assert(same_disk(&twice, &much)); /* near enough */
  const flap_machine again = machine_of(1, folder, false);
  ck_assert(same_disk(&again, &much));
}
END_TEST

START_TEST(fresh_measures_again) {
  flap_machine first = machine_of(1, NULL, false);
  char *before = read_text(path_of("cache/flap/machine.json"));
  (void)machine_of(1, NULL, true);
  char *after = read_text(path_of("cache/flap/machine.json"));
  ck_assert_str_ne(before, after);
  flap_machine second = machine_of(1, NULL, false);
  ck_assert(first.flops_f32 != second.flops_f32 || first.h2d_bytes != second.h2d_bytes ||
            first.host_bytes != second.host_bytes);
  free(before);
  free(after);
}
END_TEST

START_TEST(broken_caches_are_replaced) {
  static const char *const broken[] = {"", "{", "[]", "{\"format\": \"another\"}",
                                       "{\"format\": \"flap machine 1\", \"machines\": [{\"device\": \"cpu\"}]}"};
  (void)machine_of(1, NULL, false);
  for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
    write_text(path_of("cache/flap/machine.json"), broken[i]);
    flap_machine measured = machine_of(1, NULL, false), kept = machine_of(1, NULL, false);
    same_rates(&measured, &kept);
  }
}
END_TEST

START_TEST(entries_of_other_hosts_do_not_count_in_the_cache) {
  ck_assert_int_eq(mkdir(path_of("cache"), 0777), 0);
  ck_assert_int_eq(mkdir(path_of("cache/flap"), 0777), 0);
  write_text(path_of("cache/flap/machine.json"), made_up(", \"threads\": 1, \"host\": \"abacus\""));
  flap_machine measured = machine_of(1, NULL, false);
  ck_assert_double_ne(measured.flops_bf16, 1e9);
  char *text = read_text(path_of("cache/flap/machine.json"));
  ck_assert_ptr_nonnull(strstr(text, "abacus")); /* a home that several machines share */
  free(text);
}
END_TEST

START_TEST(a_cache_that_cannot_be_written_is_no_error) {
  write_text(path_of("cache"), "a file where a folder should be");
  (void)machine_of(1, NULL, false);
  ck_assert_str_eq(flap_error_message(), "");
  ck_assert_int_eq(unsetenv("XDG_CACHE_HOME"), 0);
  char *home = strdup(getenv("HOME") ? getenv("HOME") : "/");
  ck_assert_int_eq(unsetenv("HOME"), 0);
  (void)machine_of(1, NULL, false);
  ck_assert_int_eq(setenv("HOME", home, 1), 0);
  free(home);
}
END_TEST

START_TEST(a_named_file_is_used_as_it_is) {
  const char *name = path_of("mine.json");
  write_text(name,
             made_up(", \"name\": \"abacus\", \"threads\": 3, \"host\": \"elsewhere\", \"disk_read_bytes\": 7e8,"
                     " \"disk_write_bytes\": 6e8, \"disk_both_bytes\": 8e8, \"h2d_both_bytes\": 3e9,"
                     " \"d2h_both_bytes\": 2e9, \"launch_ns\": 11, \"copy_ns\": 12, \"disk_ns\": 13,"
                     " \"synchronous\": true, \"shared_cores\": 5, \"overhead_bytes\": 14, \"process_bytes\": 15"));
  ck_assert_int_eq(setenv("FLAP_MACHINE", name, 1), 0);
  char *before = read_text(name);
  flap_machine machine = machine_of(2, "/there/is/no/such/folder", false);
  const flap_machine expected = {.name = "abacus",
                                 .flops_bf16 = 1e9,
                                 .flops_f32 = 2e9,
                                 .device_bytes = 3e9,
                                 .h2d_bytes = 4e9,
                                 .d2h_bytes = 5e9,
                                 .h2d_both_bytes = 3e9,
                                 .d2h_both_bytes = 2e9,
                                 .host_bytes = 6e9,
                                 .launch_ns = 11,
                                 .copy_ns = 12,
                                 .disk_ns = 13,
                                 .synchronous = true,
                                 .shared_cores = 5};
  same_rates(&machine, &expected);
  ck_assert(machine.overhead_bytes == 14 && machine.process_bytes == 15);
  ck_assert_double_eq(machine.disk_read_bytes, 7e8);
  ck_assert_double_eq(machine.disk_write_bytes, 6e8);
  ck_assert_double_eq(machine.disk_both_bytes, 8e8);
  machine = machine_of(2, NULL, false);
  ck_assert_double_eq(machine.disk_read_bytes, 0);
  char *after = read_text(name);
  ck_assert_str_eq(before, after);
  ck_assert_int_ne(access(path_of("cache"), F_OK), 0);
  free(before);
  free(after);
}
END_TEST

START_TEST(a_named_file_gets_the_disks_that_it_lacks) {
  const char *name = path_of("mine.json");
  write_text(name, made_up(""));
  ck_assert_int_eq(setenv("FLAP_MACHINE", name, 1), 0);
  flap_machine measured = machine_of(2, folder, false), kept = machine_of(1, folder, false);
  ck_assert_double_eq(measured.flops_bf16, 1e9);
  ck_assert_double_eq(kept.flops_bf16, 1e9);
  ck_assert_double_gt(measured.disk_read_bytes, 0);
  ck_assert_double_eq(measured.disk_read_bytes, kept.disk_read_bytes);
  ck_assert_double_eq(measured.disk_write_bytes, kept.disk_write_bytes);
}
END_TEST

START_TEST(a_named_file_that_is_not_there_is_made) {
  const char *name = path_of("new/folder/mine.json");
  ck_assert_int_eq(setenv("FLAP_MACHINE", name, 1), 0);
  flap_machine measured = machine_of(1, NULL, false);
  ck_assert_int_eq(access(name, R_OK), 0);
  flap_machine kept = machine_of(1, NULL, false);
  same_rates(&measured, &kept);
}
END_TEST

START_TEST(a_named_file_that_is_malformed_is_an_error) {
  const char *const broken[][2] = {
      {"{", "mine.json:"},
      {"{\"format\": \"another\", \"machines\": []}", "format"},
      {"{\"format\": \"flap machine 1\", \"machines\": [{\"device\": \"cpu\"}]}", "machines[0].flops_bf16"},
      {"{\"format\": \"flap machine 1\", \"machines\": [3]}", "machines[0]"},
      {NULL, "machines[0].h2d_bytes"},
      {NULL, "machines[0].flops_f32"},
      {NULL, "machines[0].disks[0].number"}};
  const char *name = path_of("mine.json");
  ck_assert_int_eq(setenv("FLAP_MACHINE", name, 1), 0);
  for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
    char text[2048];
    (void)snprintf(text, sizeof text, "%s", broken[i][0] ? broken[i][0] : made_up(", \"disks\": [{\"path\": \"/\"}]"));
    if (i == 4)
      memcpy(strstr(text, "4e9"), "4e5", 3);
    if (i == 5)
      memcpy(strstr(text, "2e9"), "2e7", 3); /* no step of a large model would end in the time that a clock has */
    write_text(name, text);
    for (int fresh = 0; fresh < 2; fresh++) {
      ck_assert_int_eq(ask(FLAP_RUN_DEVICE_CPU, 1, NULL, fresh), FLAP_INVALID);
      ck_assert_msg(strstr(flap_error_message(), "FLAP_MACHINE") && strstr(flap_error_message(), "mine.json") &&
                        strstr(flap_error_message(), broken[i][1]),
                    "%s", flap_error_message());
      char *after = read_text(name);
      ck_assert_str_eq(after, text); /* it is not ours to repair */
      free(after);
    }
  }
}
END_TEST

START_TEST(processes_at_once_leave_a_whole_file) {
  enum { PROCESSES = 4 };
  pid_t children[PROCESSES];
  for (uint32_t i = 0; i < PROCESSES; i++) {
    children[i] = fork();
    ck_assert_int_ge(children[i], 0);
    if (children[i] == 0)
      _exit(ask(FLAP_RUN_DEVICE_CPU, i + 1, NULL, false) == FLAP_OK ? 0 : 1);
  }
  for (uint32_t i = 0; i < PROCESSES; i++) {
    int how;
    ck_assert_int_eq(waitpid(children[i], &how, 0), children[i]);
    ck_assert(WIFEXITED(how) && WEXITSTATUS(how) == 0);
  }
  json_t *root;
  ck_assert_int_eq(flap_json_load_file(path_of("cache/flap/machine.json"), 1 << 20, &root), FLAP_OK);
  ck_assert_uint_eq(json_array_size(json_object_get(root, "machines")), PROCESSES); /* and nobody's entry was lost */
  json_decref(root);
}
END_TEST

START_TEST(what_cannot_be_done_is_said) {
#ifdef FLAP_CUDA
  ck_assert_int_eq(setenv("CUDA_VISIBLE_DEVICES", "", 1), 0); /* no GPU, wherever this runs */
  ck_assert_int_eq(ask(FLAP_RUN_DEVICE_CUDA, 0, NULL, false), FLAP_NOT_FOUND);
#else
  ck_assert_int_eq(ask(FLAP_RUN_DEVICE_CUDA, 0, NULL, false), FLAP_UNSUPPORTED);
#endif
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "cuda"));
  ck_assert_int_eq(ask(FLAP_RUN_DEVICE_CPU, FLAP_POOL_THREADS_MAX + 1, NULL, false), FLAP_INVALID);
  write_text(path_of("mine.json"), made_up(""));
  ck_assert_int_eq(setenv("FLAP_MACHINE", path_of("mine.json"), 1), 0);
  ck_assert_int_eq(ask(FLAP_RUN_DEVICE_CPU, 1, path_of("nowhere"), false), FLAP_NOT_FOUND);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "nowhere"));
  ck_assert_int_ne(ask(FLAP_RUN_DEVICE_CPU, 1, path_of("mine.json"), false), FLAP_OK);
}
END_TEST

int main(void) {
  flap_log_set_level(FLAP_LOG_ERROR);
  Suite *suite = suite_create("machine");
  TCase *tests = tcase_create("all");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, measured_rates_are_plausible_and_quick);
  tcase_add_test(tests, measured_rates_are_kept_by_threads_and_disk);
  tcase_add_test(tests, a_run_that_needs_much_of_a_disk_measures_more_of_it);
  tcase_add_test(tests, fresh_measures_again);
  tcase_add_test(tests, broken_caches_are_replaced);
  tcase_add_test(tests, entries_of_other_hosts_do_not_count_in_the_cache);
  tcase_add_test(tests, a_cache_that_cannot_be_written_is_no_error);
  tcase_add_test(tests, a_named_file_is_used_as_it_is);
  tcase_add_test(tests, a_named_file_gets_the_disks_that_it_lacks);
  tcase_add_test(tests, a_named_file_that_is_not_there_is_made);
  tcase_add_test(tests, a_named_file_that_is_malformed_is_an_error);
  tcase_add_test(tests, processes_at_once_leave_a_whole_file);
  tcase_add_test(tests, what_cannot_be_done_is_said);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
