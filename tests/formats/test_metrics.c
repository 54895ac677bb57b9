/* metrics.jsonl: numbers to the bit, resumed runs without repeated steps, no allocation per line. */
#include "base/philox.h"
#include "io/formats/metrics.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define OK(call) ck_assert_msg((call) == FLAP_OK, "%s", flap_error_message())
#define NAME "metrics.jsonl"

static flap_metrics *open_metrics(int64_t keep_to_step) {
  flap_metrics *metrics = NULL;
  OK(flap_metrics_open(scratch_path(NAME), keep_to_step, &metrics));
  return metrics;
}

static flap_status add_step(flap_metrics *metrics, int64_t step, float loss) {
  flap_metrics_begin_line(metrics);
  flap_metrics_add_integer(metrics, "step", step);
  flap_metrics_add_number(metrics, "loss", (double)loss);
  return flap_metrics_end_line(metrics);
}

static void assert_content(const char *expected) {
  char *text = scratch_read(NAME, NULL);
  ck_assert_str_eq(text, expected);
  free(text);
}

/* The file's only line, parsed. */
static json_t *only_line(void) {
  size_t bytes;
  char *text = scratch_read(NAME, &bytes);
  ck_assert_ptr_eq(strchr(text, '\n'), text + bytes - 1);
  json_t *line = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
  ck_assert_msg(line != NULL, "%s", text);
  free(text);
  return line;
}

START_TEST(metrics_line_is_the_object_that_was_built) {
  flap_metrics *metrics = open_metrics(-1);
  flap_metrics_begin_line(metrics);
  flap_metrics_add_integer(metrics, "step", INT64_MIN);
  flap_metrics_open_object(metrics, "stall_seconds");
  flap_metrics_close_object(metrics);
  flap_metrics_open_object(metrics, "bytes");
  flap_metrics_add_number(metrics, "h2d", 0.25);
  flap_metrics_open_object(metrics, "disk");
  flap_metrics_add_bool(metrics, "on", true);
  flap_metrics_close_object(metrics);
  flap_metrics_add_bool(metrics, "off", false);
  flap_metrics_close_object(metrics);
  flap_metrics_add_bool(metrics, "a \"key\"\n caf\xc3\xa9\\\t\x01", true);
  flap_metrics_add_number(metrics, "nan", (double)NAN);
  flap_metrics_add_number(metrics, "inf", -INFINITY);
  OK(flap_metrics_end_line(metrics));
  OK(flap_metrics_sync(metrics));
  flap_metrics_close(metrics);
  json_t *line = only_line();
  json_t *expected =
      json_pack("{s:I, s:{}, s:{s:f, s:{s:b}, s:b}, s:b, s:n, s:n}", "step", (json_int_t)INT64_MIN, "stall_seconds",
                "bytes", "h2d", 0.25, "disk", "on", 1, "off", 0, "a \"key\"\n caf\xc3\xa9\\\t\x01", 1, "nan", "inf");
  ck_assert_ptr_nonnull(expected);
  ck_assert(json_equal(line, expected));
  json_decref(expected);
  json_decref(line);
}
END_TEST

START_TEST(metrics_numbers_read_back_to_the_bit) {
  flap_philox stream = flap_philox_stream(3, "metrics");
  flap_metrics *metrics = open_metrics(-1);
  enum { COUNT = 2000 };
  double numbers[COUNT];
  float floats[COUNT];
  for (uint64_t i = 0; i < COUNT; i++) {
    uint32_t words[4];
    flap_philox_block(&stream, i, words);
    memcpy(&numbers[i], words, sizeof numbers[i]);
    memcpy(&floats[i], words + 2, sizeof floats[i]);
    flap_metrics_begin_line(metrics);
    flap_metrics_add_number(metrics, "d", numbers[i]);
    flap_metrics_add_number(metrics, "f", (double)floats[i]);
    OK(flap_metrics_end_line(metrics));
  }
  flap_metrics_close(metrics);
  FILE *file = fopen(scratch_path(NAME), "r");
  char text[256];
  for (uint64_t i = 0; i < COUNT; i++) {
    ck_assert_ptr_nonnull(fgets(text, sizeof text, file));
    json_t *line = json_loads(text, 0, NULL);
    ck_assert_msg(line != NULL, "%s", text);
    const json_t *d = json_object_get(line, "d"), *f = json_object_get(line, "f");
    ck_assert(isfinite(numbers[i]) ? json_number_value(d) == numbers[i] : json_is_null(d));
    ck_assert(isfinite(floats[i]) ? (float)json_number_value(f) == floats[i] : json_is_null(f));
    json_decref(line);
  }
  ck_assert_ptr_null(fgets(text, sizeof text, file));
  (void)fclose(file);
}
END_TEST

START_TEST(metrics_line_is_in_the_file_when_end_returns) {
  flap_metrics *metrics = open_metrics(-1);
  OK(add_step(metrics, 1, 0.5f));
  assert_content("{\"step\": 1, \"loss\": 0.5}\n");
  OK(add_step(metrics, 2, 0.25f));
  assert_content("{\"step\": 1, \"loss\": 0.5}\n{\"step\": 2, \"loss\": 0.25}\n");
  flap_metrics_close(metrics);
}
END_TEST

START_TEST(metrics_resume_drops_later_and_torn_lines) {
  scratch_text(NAME,
               "{\"step\": 1}\n{\"note\": \"kept\"}\n{\"step\": 2}\n{\"step\": 3}\nnot json\n[]\n{\"step\": 2.5}\n"
               "{\"step\": 3}\n{\"step\": 2, \"again\": true}\n{\"step\": 1, \"lo");
  flap_metrics *metrics = open_metrics(2);
  OK(add_step(metrics, 3, 1));
  flap_metrics_close(metrics);
  assert_content("{\"step\": 1}\n{\"note\": \"kept\"}\n{\"step\": 2}\n{\"step\": 2, \"again\": true}\n"
                 "{\"step\": 3, \"loss\": 1}\n");
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(metrics_resume_ends_a_line_that_lacks_its_newline) {
  scratch_text(NAME, "{\"step\": 1}");
  flap_metrics *metrics = open_metrics(1);
  OK(add_step(metrics, 2, 1));
  flap_metrics_close(metrics);
  assert_content("{\"step\": 1}\n{\"step\": 2, \"loss\": 1}\n");
}
END_TEST

START_TEST(metrics_resume_with_nothing_to_drop_keeps_the_file_itself) {
  struct stat before, after;
  scratch_text(NAME, "{\"step\": 1}\n");
  ck_assert_int_eq(stat(scratch_path(NAME), &before), 0);
  flap_metrics_close(open_metrics(1));
  ck_assert_int_eq(stat(scratch_path(NAME), &after), 0);
  ck_assert(before.st_ino == after.st_ino);
  flap_metrics_close(open_metrics(0));
  assert_content("");
}
END_TEST

START_TEST(metrics_resume_without_a_file_starts_one) {
  flap_metrics_close(open_metrics(10));
  assert_content("");
}
END_TEST

START_TEST(metrics_new_run_starts_an_empty_file) {
  scratch_text(NAME, "{\"step\": 1}\n");
  flap_metrics_close(open_metrics(-1));
  assert_content("");
}
END_TEST

START_TEST(metrics_of_a_life_without_a_step_are_told_from_others) {
#define EVAL "{\"step\": 0, \"eval_loss\": 5.5}\n"
  static const struct {
    const char *text;
    bool has;
  } cases[] = {{"", false},
               {EVAL, false},
               {EVAL EVAL, false},
               {EVAL "{\"step\": 1, \"loss\": 5}\n", true},
               {"{\"step\": 1}\n", true},
               {EVAL "{\"step\": 1, \"lo", true},
               {"{\"step\": 0.0}\n", true},
               {"{}\n", true},
               {"mine", true},
               {"\n", true}};
  bool has = true;
  OK(flap_metrics_has_steps(scratch_path(NAME), &has));
  ck_assert(!has);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    scratch_text(NAME, cases[i].text);
    OK(flap_metrics_has_steps(scratch_path(NAME), &has));
    ck_assert_msg(has == cases[i].has, "%s", cases[i].text);
    assert_content(cases[i].text);
  }
  FILE *file = fopen(scratch_path(NAME), "w"); /* as long as no life without a step gets */
  ck_assert_ptr_nonnull(file);
  for (size_t bytes = 0; bytes < FLAP_METRICS_LINE_BYTES_MAX; bytes += strlen(EVAL))
    ck_assert_int_ge(fputs(EVAL, file), 0);
  ck_assert_int_eq(fclose(file), 0);
  OK(flap_metrics_has_steps(scratch_path(NAME), &has));
  ck_assert(has);
  ck_assert_int_eq(remove(scratch_path(NAME)), 0);
  ck_assert_int_eq(mkfifo(scratch_path(NAME), 0600), 0); /* and nobody waits for the other end */
  OK(flap_metrics_has_steps(scratch_path(NAME), &has));
  ck_assert(has);
}
END_TEST

START_TEST(metrics_open_in_no_folder_names_the_path) {
  flap_metrics *metrics = NULL;
  ck_assert_int_eq(flap_metrics_open(scratch_path("no/m.jsonl"), -1, &metrics), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("no/m.jsonl"));
  ck_assert_int_eq(flap_metrics_open(scratch_path(""), 3, &metrics), FLAP_IO);
}
END_TEST

START_TEST(metrics_line_too_long_is_refused_and_the_next_is_sound) {
  flap_metrics *metrics = open_metrics(-1);
  flap_metrics_begin_line(metrics);
  for (int i = 0; i < 5000; i++)
    flap_metrics_add_integer(metrics, "key", i);
  ck_assert_int_eq(flap_metrics_end_line(metrics), FLAP_INVALID);
  char *long_text = malloc(FLAP_METRICS_LINE_BYTES_MAX + 1);
  memset(long_text, 'a', FLAP_METRICS_LINE_BYTES_MAX);
  long_text[FLAP_METRICS_LINE_BYTES_MAX] = '\0';
  flap_metrics_begin_line(metrics);
  flap_metrics_add_bool(metrics, long_text, true);
  flap_metrics_add_integer(metrics, "after", 1);
  ck_assert_int_eq(flap_metrics_end_line(metrics), FLAP_INVALID);
  free(long_text);
  OK(add_step(metrics, 1, 0.5f));
  flap_metrics_close(metrics);
  assert_content("{\"step\": 1, \"loss\": 0.5}\n");
}
END_TEST

START_TEST(metrics_on_full_disk_takes_the_torn_line_back) {
  flap_metrics *metrics = open_metrics(-1);
  OK(add_step(metrics, 1, 0.5f));
  scratch_limit(35); /* the first line has 25 bytes */
  flap_status status = add_step(metrics, 2, 0.25f);
  scratch_unlimit();
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert(scratch_error_has(NAME));
  OK(add_step(metrics, 3, 0.125f));
  flap_metrics_close(metrics);
  assert_content("{\"step\": 1, \"loss\": 0.5}\n{\"step\": 3, \"loss\": 0.125}\n");
}
END_TEST

/* The linker sends the library's allocations here (--wrap). */
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
static unsigned allocations;

void *__wrap_malloc(size_t bytes) {
  allocations++;
  return __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  allocations++;
  return __real_calloc(count, bytes);
}

void *__wrap_realloc(void *memory, size_t bytes) {
  allocations++;
  return __real_realloc(memory, bytes);
}

START_TEST(metrics_first_line_with_keys_is_found) {
  static const char *const keys[] = {"eval_loss", "eval_tokens"};
  flap_metrics_line line;
  bool found = true;
  OK(flap_metrics_find(scratch_path(NAME), -1, keys, 2, &line, &found));
  ck_assert(!found);
  scratch_text(NAME, "{\"note\": \"eval_loss\"}\n"
                     "{\"step\": 1, \"eval_loss\": 9}\n"
                     "{\"step\": 2, \"eval_loss\": 2.5, \"eval_tokens\": 64}\n"
                     "{\"eval_loss\": 3.5, \"eval_tokens\": 64}\n"
                     "{\"step\": 3, \"loss\": 1}\n"
                     "{\"step\": 4, \"eval_loss\": null, \"eval_tokens\": 32}\n"
                     "{\"step\": 4, \"eval_loss\": 1, \"eval_tokens\": 16}\n"
                     "{\"step\": 5, \"eval_loss\": 1, \"eval_tok");
  OK(flap_metrics_find(scratch_path(NAME), -1, keys, 2, &line, &found));
  ck_assert(found && line.step == 2 && line.values[0] == 2.5 && line.values[1] == 64);
  OK(flap_metrics_find(scratch_path(NAME), 4, keys, 2, &line, &found));
  ck_assert(found && line.step == 4 && isnan(line.values[0]) && line.values[1] == 32);
  for (int64_t step = 3; step <= 5; step += 2) {
    OK(flap_metrics_find(scratch_path(NAME), step, keys, 2, &line, &found));
    ck_assert(!found);
  }
  ck_assert_int_eq(flap_metrics_find(scratch_path(""), -1, keys, 2, &line, &found), FLAP_IO);
}
END_TEST

START_TEST(metrics_lines_allocate_nothing) {
  allocations = 0;
  flap_metrics *metrics = open_metrics(-1);
  ck_assert_uint_gt(allocations, 0); /* so they are counted */
  allocations = 0;
  flap_status status = FLAP_OK;
  for (int64_t step = 1; step < 1000 && status == FLAP_OK; step++)
    status = add_step(metrics, step, 1.0f / (float)step);
  unsigned counted = allocations;
  flap_metrics_close(metrics);
  ck_assert_int_eq(status, FLAP_OK);
  ck_assert_uint_eq(counted, 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("metrics");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_test(tests, metrics_line_is_the_object_that_was_built);
  tcase_add_test(tests, metrics_numbers_read_back_to_the_bit);
  tcase_add_test(tests, metrics_line_is_in_the_file_when_end_returns);
  tcase_add_test(tests, metrics_resume_drops_later_and_torn_lines);
  tcase_add_test(tests, metrics_resume_ends_a_line_that_lacks_its_newline);
  tcase_add_test(tests, metrics_resume_with_nothing_to_drop_keeps_the_file_itself);
  tcase_add_test(tests, metrics_resume_without_a_file_starts_one);
  tcase_add_test(tests, metrics_new_run_starts_an_empty_file);
  tcase_add_test(tests, metrics_of_a_life_without_a_step_are_told_from_others);
  tcase_add_test(tests, metrics_open_in_no_folder_names_the_path);
  tcase_add_test(tests, metrics_line_too_long_is_refused_and_the_next_is_sound);
  tcase_add_test(tests, metrics_on_full_disk_takes_the_torn_line_back);
  tcase_add_test(tests, metrics_first_line_with_keys_is_found);
  tcase_add_test(tests, metrics_lines_allocate_nothing);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
