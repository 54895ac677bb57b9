/* JSON files: what is wrong, where, and under which key. */
#include "io/formats/json_file.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call) ck_assert_msg((call) == FLAP_OK, "%s", flap_error_message())

static json_t *root;
static flap_json_object config;

static void setup(void) {
  static const char text[] =
      "{\"hidden_size\": 64, \"eps\": 1e-05, \"whole\": 3.0, \"name\": \"Llama\", \"tied\": true, \"none\": null,\n"
      " \"list\": [1, 2, 3.0], \"mixed\": [1, \"2\"], \"rope_scaling\": {\"factor\": 8, \"deep\": {\"x\": 2.5}}}";
  scratch_setup();
  OK(flap_json_load_text("config.json", text, strlen(text), &root));
  OK(flap_json_root(root, "config.json", &config));
}

static void teardown(void) {
  json_decref(root);
  root = NULL;
  scratch_teardown();
}

START_TEST(json_load_bad_file_names_line_and_column) {
  static const struct {
    const char *text;
    const char *what;
  } cases[] = {
      {"", ":1:0: "},
      {"{\"a\": 1,\n \"b\": }", ":2:7: "},
      {"{\"a\": 1, \"a\": 2}", "duplicate"},
      {"{\"a\": 1} x", "end of file expected"},
      {"{\"a\": NaN}", "NaN and Infinity are not JSON"},
      {"{\"a\": Infinity}", "NaN and Infinity are not JSON"},
      {"{\"a\": -Infinity}", "NaN and Infinity are not JSON"},
      {"{\"a\": 1e999}", "real number overflow"},
      {"{\"a\": \"\xff\"}", ":1:"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    json_t *bad = NULL;
    scratch_text("bad.json", cases[i].text);
    ck_assert_int_eq(flap_json_load_file(scratch_path("bad.json"), FLAP_JSON_BYTES_MAX, &bad), FLAP_INVALID);
    ck_assert_msg(scratch_error_has(cases[i].what) && scratch_error_has("bad.json:"), "%s: %s", cases[i].text,
                  flap_error_message());
  }
}
END_TEST

START_TEST(json_load_refuses_absent_large_and_no_files) {
  json_t *bad = NULL;
  ck_assert_int_eq(flap_json_load_file(scratch_path("absent"), 10, &bad), FLAP_NOT_FOUND);
  ck_assert_int_eq(flap_json_load_file(scratch_path(""), 10, &bad), FLAP_INVALID);
  scratch_text("f", "[1, 2, 3, 4]");
  ck_assert_int_eq(flap_json_load_file(scratch_path("f"), 11, &bad), FLAP_INVALID);
  ck_assert(scratch_error_has("12 bytes"));
  OK(flap_json_load_file(scratch_path("f"), 12, &bad));
  flap_json_object object;
  ck_assert_int_eq(flap_json_root(bad, "f", &object), FLAP_INVALID);
  ck_assert(scratch_error_has("f: must hold an object, not an array"));
  json_decref(bad);
}
END_TEST

START_TEST(json_load_takes_integers_past_64_bits_as_python_does) {
  static const char text[] = "{\"model_max_length\": 1000000000000000019884624838656, \"n\": 7}";
  json_t *loaded = NULL;
  flap_json_object object;
  double number;
  int64_t integer;
  OK(flap_json_load_text("t", text, strlen(text), &loaded));
  OK(flap_json_root(loaded, "t", &object));
  OK(flap_json_get_number(&object, "model_max_length", 0, 1e40, &number));
  ck_assert(number == 1e30);
  ck_assert_int_eq(flap_json_get_integer(&object, "model_max_length", 0, INT64_MAX, &integer), FLAP_INVALID);
  OK(flap_json_get_integer(&object, "n", 0, 10, &integer));
  ck_assert_int_eq(integer, 7);
  json_decref(loaded);
}
END_TEST

START_TEST(json_get_returns_values) {
  int64_t integer, list[4];
  double number;
  const char *string;
  bool flag;
  size_t count;
  flap_json_object scaling, deep;
  OK(flap_json_get_integer(&config, "hidden_size", 1, 64, &integer));
  ck_assert_int_eq(integer, 64);
  OK(flap_json_get_integer(&config, "whole", 3, 3, &integer));
  ck_assert_int_eq(integer, 3);
  OK(flap_json_get_number(&config, "eps", 0, 1, &number));
  ck_assert(number == 1e-05);
  OK(flap_json_get_number(&config, "hidden_size", 0, 100, &number));
  ck_assert(number == 64);
  OK(flap_json_get_string(&config, "name", &string));
  ck_assert_str_eq(string, "Llama");
  OK(flap_json_get_bool(&config, "tied", &flag));
  ck_assert(flag);
  OK(flap_json_get_integers(&config, "list", 1, 3, list, 4, &count));
  ck_assert_uint_eq(count, 3);
  ck_assert(list[0] == 1 && list[1] == 2 && list[2] == 3);
  OK(flap_json_get_object(&config, "rope_scaling", &scaling));
  OK(flap_json_get_object(&scaling, "deep", &deep));
  OK(flap_json_get_number(&deep, "x", 0, 3, &number));
  ck_assert(number == 2.5);
  ck_assert(flap_json_has(&config, "eps") && !flap_json_has(&config, "none") && !flap_json_has(&config, "absent"));
}
END_TEST

START_TEST(json_get_of_wrong_things_names_file_and_key) {
  int64_t integer, list[2];
  double number;
  const char *string;
  bool flag;
  size_t count;
  flap_json_object scaling, deep;
#define REFUSED(call, text)                                       \
  do {                                                            \
    ck_assert_int_eq((call), FLAP_INVALID);                       \
    ck_assert_str_eq(flap_error_message(), "config.json: " text); \
  } while (0)
  REFUSED(flap_json_get_integer(&config, "absent", 0, 1, &integer), "absent: this key is missing");
  REFUSED(flap_json_get_integer(&config, "none", 0, 1, &integer), "none: must be an integer, not null");
  REFUSED(flap_json_get_integer(&config, "name", 0, 1, &integer), "name: must be an integer, not a string");
  REFUSED(flap_json_get_integer(&config, "hidden_size", 65, 99, &integer), "hidden_size: 64 is not within 65 and 99");
  REFUSED(flap_json_get_integer(&config, "hidden_size", 1, 63, &integer), "hidden_size: 64 is not within 1 and 63");
  ck_assert_int_eq(flap_json_get_integer(&config, "eps", 0, 1, &integer), FLAP_INVALID);
  REFUSED(flap_json_get_number(&config, "tied", 0, 1, &number), "tied: must be a number, not true or false");
  REFUSED(flap_json_get_number(&config, "hidden_size", 0, 1, &number), "hidden_size: 64 is not within 0 and 1");
  REFUSED(flap_json_get_string(&config, "list", &string), "list: must be a string, not an array");
  REFUSED(flap_json_get_bool(&config, "hidden_size", &flag), "hidden_size: must be true or false, not a number");
  REFUSED(flap_json_get_integers(&config, "mixed", 0, 9, list, 2, &count), "mixed: must be an integer, not a string");
  REFUSED(flap_json_get_integers(&config, "list", 0, 9, list, 2, &count),
          "list: has 3 integers, but at most 2 are allowed");
  REFUSED(flap_json_get_object(&config, "list", &deep), "list: must be an object, not an array");
  OK(flap_json_get_object(&config, "rope_scaling", &scaling));
  OK(flap_json_get_object(&scaling, "deep", &deep));
  REFUSED(flap_json_get_string(&deep, "x", &string), "rope_scaling.deep.x: must be a string, not a number");
  REFUSED(flap_json_error(&deep, NULL, "odd %d", 3), "rope_scaling.deep: odd 3");
  REFUSED(flap_json_error(&config, NULL, "odd"), "odd");
#undef REFUSED
}
END_TEST

START_TEST(json_opt_falls_back_on_missing_and_null_only) {
  int64_t integer;
  double number;
  const char *string;
  bool flag;
  OK(flap_json_opt_integer(&config, "absent", 0, 1, -5, &integer));
  ck_assert_int_eq(integer, -5);
  OK(flap_json_opt_integer(&config, "none", 0, 1, -6, &integer));
  ck_assert_int_eq(integer, -6);
  OK(flap_json_opt_integer(&config, "hidden_size", 0, 100, -6, &integer));
  ck_assert_int_eq(integer, 64);
  ck_assert_int_eq(flap_json_opt_integer(&config, "hidden_size", 0, 1, -6, &integer), FLAP_INVALID);
  OK(flap_json_opt_number(&config, "absent", 0, 1, 9.5, &number));
  ck_assert(number == 9.5);
  OK(flap_json_opt_string(&config, "absent", "x", &string));
  ck_assert_str_eq(string, "x");
  OK(flap_json_opt_bool(&config, "none", true, &flag));
  ck_assert(flag);
  ck_assert_int_eq(flap_json_opt_bool(&config, "name", true, &flag), FLAP_INVALID);
}
END_TEST

START_TEST(json_written_file_reads_back_equal_and_brief) {
  json_t *object =
      json_pack("{s:f, s:I, s:s, s:o, s:o, s:[i,i]}", "rms_norm_eps", 1e-5, "big", (json_int_t)INT64_MAX, "text",
                "caf\xc3\xa9 \"x\"\n", "nan", flap_json_real(NAN), "inf", flap_json_real(-INFINITY), "list", 1, 2);
  json_t *again = NULL;
  OK(flap_json_write_file(scratch_path("f.json"), object));
  char *text = scratch_read("f.json", NULL);
  ck_assert_ptr_nonnull(strstr(text, "\n  \"rms_norm_eps\": 1e-5"));
  ck_assert_int_eq(text[strlen(text) - 1], '\n');
  free(text);
  OK(flap_json_load_file(scratch_path("f.json"), FLAP_JSON_BYTES_MAX, &again));
  ck_assert(json_equal(object, again));
  ck_assert(json_is_null(json_object_get(again, "nan")) && json_is_null(json_object_get(again, "inf")));
  json_decref(again);
  json_object_set_new(object, "third", json_real(1.0 / 3.0)); /* 16 digits */
  json_object_set_new(object, "sum", json_real(0.1 + 0.2));   /* 17 digits */
  OK(flap_json_write_file(scratch_path("f.json"), object));
  OK(flap_json_load_file(scratch_path("f.json"), FLAP_JSON_BYTES_MAX, &again));
  ck_assert(json_equal(object, again));
  json_decref(again);
  json_decref(object);
}
END_TEST

START_TEST(json_long_way_of_keys_is_cut_in_messages) {
  json_t *top = json_object(), *at = top;
  for (int i = 0; i < 40; i++) {
    json_object_set_new(at, "a_long_key", json_object());
    at = json_object_get(at, "a_long_key");
  }
  flap_json_object object;
  OK(flap_json_root(top, "f", &object));
  for (int i = 0; i < 40; i++)
    OK(flap_json_get_object(&object, "a_long_key", &object));
  ck_assert_uint_lt(strlen(object.path), FLAP_JSON_PATH_MAX);
  ck_assert_ptr_nonnull(strstr(object.path, "..."));
  json_decref(top);
}
END_TEST

/* ---- memory that is refused ------------------------------------------------------------------------------------ */

void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
static uint64_t requests, refused_request;
static bool for_ever;

void *__wrap_malloc(size_t bytes) {
  requests++;
  const bool refused = refused_request > 0 && (requests == refused_request || (for_ever && requests > refused_request));
  return refused ? NULL : __real_malloc(bytes);
}

/* Check itself asks for memory too, so nothing is refused when it does. */
static void refuse(uint64_t request) {
  requests = 0;
  refused_request = request;
}

static json_t *parse_refused(const char *text, size_t flags, uint64_t request) {
  json_error_t error;
  refuse(request);
  json_t *parsed = flap_json_parse(text, strlen(text), flags, &error);
  refused_request = 0;
  return parsed;
}

static char *dump_refused(const json_t *value, uint64_t request) {
  refuse(request);
  char *text = flap_json_dumps(value, JSON_COMPACT);
  refused_request = 0;
  return text;
}

static void parse_and_dump_at_each_request(const char *text) {
  const size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY;
  json_t *whole = parse_refused(text, flags, 0);
  const uint64_t of_parse = requests;
  ck_assert(!flap_json_no_memory());
  for (uint64_t n = 1; n <= of_parse; n++)
    ck_assert_msg(parse_refused(text, flags, n) == NULL && flap_json_no_memory(), "request %llu of %s",
                  (unsigned long long)n, text);
  if (whole == NULL)
    return; /* the text is a mistake */
  free(dump_refused(whole, 0));
  const uint64_t of_dump = requests;
  for (uint64_t n = 1; n <= of_dump; n++)
    ck_assert_msg(dump_refused(whole, n) == NULL && flap_json_no_memory(), "request %llu for %s", (unsigned long long)n,
                  text);
  json_decref(whole);
}

/* Tokens of every length at which jansson's buffer for them grows, and one more and less. */
START_TEST(json_memory_refused_at_any_request_is_told_and_gives_nothing) {
  static const char *const shapes[] = {"[\"%s\"]",     "{\"%s\": 1}", "[1%s, 2]", "[0.1%s]", "[-1%sE2]",
                                       "{\"a\": 2%s}", "[%s]",        "[\"%s",    "[\"a\\",  "%s"};
  static const char *const parts[] = {"7", "q", "\\n", "\\u00e9", "\\\"", "\xe2\x82\xac"};
  char part[512], text[600];
  for (int ever = 0; ever < 2; ever++)
    for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++)
      for (size_t p = 0; p < sizeof parts / sizeof *parts; p++)
        for (size_t count = 10, length = 0; count < 70; count++, length = 0) {
          for (size_t i = 0; i < count; i++)
            length += (size_t)snprintf(part + length, sizeof part - length, "%s", parts[p]);
          (void)snprintf(text, sizeof text, shapes[shape], part);
          for_ever = ever;
          parse_and_dump_at_each_request(text);
        }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("json_file");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, json_load_bad_file_names_line_and_column);
  tcase_add_test(tests, json_load_refuses_absent_large_and_no_files);
  tcase_add_test(tests, json_load_takes_integers_past_64_bits_as_python_does);
  tcase_add_test(tests, json_get_returns_values);
  tcase_add_test(tests, json_get_of_wrong_things_names_file_and_key);
  tcase_add_test(tests, json_opt_falls_back_on_missing_and_null_only);
  tcase_add_test(tests, json_written_file_reads_back_equal_and_brief);
  tcase_add_test(tests, json_long_way_of_keys_is_cut_in_messages);
  tcase_add_test(tests, json_memory_refused_at_any_request_is_told_and_gives_nothing);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
