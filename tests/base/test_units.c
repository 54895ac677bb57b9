/* Sizes as people write them, odd ones included. */
#include "base/units.h"

#include <check.h>
#include <string.h>

START_TEST(units_parse_good_sizes_are_exact) {
  static const struct {
    const char *text;
    uint64_t bytes;
  } cases[] = {
      {"0", 0},
      {"4096", 4096},
      {"007", 7},
      {"512B", 512},
      {"512 b", 512},
      {"24GiB", 24 * FLAP_GIB},
      {"24gib", 24 * FLAP_GIB},
      {"24 GIB", 24 * FLAP_GIB},
      {"1.5 GB", 1500000000ull},
      {"1.5GiB", 1610612736ull},
      {"0.5KiB", 512},
      {"1.000KB", 1000},
      {"1.50000000000000000000000000 KB", 1500},
      {"3TB", 3000000000000ull},
      {"1TiB", FLAP_TIB},
      {"0.000000000001TB", 1},
      {"1.1GiB", 1181116006ull},
      {"0.1KiB", 102},
      {"0.99999999999999999999KB", 999},
      {"4194303.9999999999999999999TiB", ((uint64_t)1 << 62) - 1},
      {"4194304TiB", (uint64_t)1 << 62},
      {"4611686018427387904", (uint64_t)1 << 62},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    uint64_t bytes = 12345;
    ck_assert_msg(flap_units_parse_bytes(cases[i].text, &bytes) == FLAP_OK, "%s: %s", cases[i].text,
                  flap_error_message());
    ck_assert_msg(bytes == cases[i].bytes, "%s: %llu", cases[i].text, (unsigned long long)bytes);
  }
}
END_TEST

START_TEST(units_parse_bad_sizes_are_refused_and_quoted) {
  static const char *const texts[] = {
      "",
      " ",
      "-1",
      "-1GiB",
      "+1GiB",
      "GiB",
      ".5GiB",
      "1.GiB",
      "1.",
      "64k",
      "64 k",
      "1Ki",
      "1g",
      "1PiB",
      "1 ",
      "1  GiB",
      " 1GiB",
      "1GiB ",
      "1,5GB",
      "1.5",
      "1.5B",
      "0.0001 KB",
      "1.2.3GB",
      "1e9",
      "0x10",
      "max",
      "1_000",
      "4611686018427387905",
      "4194305TiB",
      "99999999999999999999",
      "18446744073709551616TiB",
      "nan",
      "1GiBs",
      "0.0000000000000000000000001TiB",
  };
  for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
    uint64_t bytes = 12345;
    flap_error_clear();
    ck_assert_msg(flap_units_parse_bytes(texts[i], &bytes) == FLAP_INVALID, "\"%s\" was accepted", texts[i]);
    ck_assert_msg(bytes == 12345, "\"%s\" changed the output", texts[i]);
    ck_assert_ptr_nonnull(strstr(flap_error_message(), texts[i]));
  }
}
END_TEST

static void check_bytes(uint64_t bytes, const char *expected) {
  char text[FLAP_UNITS_TEXT_MAX];
  ck_assert_str_eq(flap_units_format_bytes(bytes, text, sizeof text), expected);
}

START_TEST(units_format_bytes_three_digits) {
  check_bytes(0, "0 B");
  check_bytes(512, "512 B");
  check_bytes(1023, "1023 B");
  check_bytes(1024, "1.00 KiB");
  check_bytes(7 * FLAP_MIB, "7.00 MiB");
  check_bytes(24 * FLAP_GIB, "24.0 GiB");
  check_bytes(100 * FLAP_GIB, "100 GiB");
  check_bytes(1023 * FLAP_KIB, "1023 KiB");
  check_bytes(FLAP_MIB - 1, "1.00 MiB");
  check_bytes(FLAP_GIB - 1, "1.00 GiB");
  check_bytes(UINT64_MAX, "16.0 EiB");
}
END_TEST

static void check_count(uint64_t count, const char *expected) {
  char text[FLAP_UNITS_TEXT_MAX];
  ck_assert_str_eq(flap_units_format_count(count, text, sizeof text), expected);
}

START_TEST(units_format_count_three_digits) {
  check_count(0, "0");
  check_count(812, "812");
  check_count(999, "999");
  check_count(1000, "1.00 K");
  check_count(5360000, "5.36 M");
  check_count(999999, "1.00 M");
  check_count(1360000000, "1.36 B");
  check_count(99949, "99.9 K");
  check_count(99960, "100 K");
}
END_TEST

static void check_seconds(double seconds, const char *expected) {
  char text[FLAP_UNITS_TEXT_MAX];
  ck_assert_str_eq(flap_units_format_seconds(seconds, text, sizeof text), expected);
}

START_TEST(units_format_seconds_as_people_say) {
  check_seconds(0, "0.00 s");
  check_seconds(12e-6, "12.0 us");
  check_seconds(0.850, "850 ms");
  check_seconds(0.00123, "1.23 ms");
  check_seconds(0.9996, "1.00 s");
  check_seconds(12.34, "12.3 s");
  check_seconds(59.96, "1m 00s");
  check_seconds(247, "4m 07s");
  check_seconds(3599.6, "1h 00m");
  check_seconds(3600 + 3 * 60 + 59, "1h 03m");
  check_seconds(100 * 3600, "100h 00m");
  check_seconds(-1, "unknown");
  check_seconds(0.0 / 0.0, "unknown");
  check_seconds(1.0 / 0.0, "unknown");
}
END_TEST

START_TEST(units_arithmetic_reports_overflow) {
  uint64_t result = 0;
  ck_assert(flap_units_mul(1ull << 31, 1ull << 32, &result));
  ck_assert_uint_eq(result, 1ull << 63);
  ck_assert(!flap_units_mul(1ull << 32, 1ull << 32, &result));
  ck_assert(flap_units_add(UINT64_MAX - 1, 1, &result));
  ck_assert_uint_eq(result, UINT64_MAX);
  ck_assert(!flap_units_add(UINT64_MAX, 1, &result));
  ck_assert_uint_eq(flap_units_round_up(0, 7), 0);
  ck_assert_uint_eq(flap_units_round_up(1, 7), 7);
  ck_assert_uint_eq(flap_units_round_up(7, 7), 7);
  ck_assert_uint_eq(flap_units_round_up(UINT64_MAX, 1), UINT64_MAX);
}
END_TEST

START_TEST(units_clock_does_not_run_back) {
  uint64_t before_ns = flap_units_now_ns();
  for (int i = 0; i < 1000; i++) {
    uint64_t now_ns = flap_units_now_ns();
    ck_assert_uint_ge(now_ns, before_ns);
    before_ns = now_ns;
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("base");
  TCase *tests = tcase_create("units");
  tcase_add_test(tests, units_parse_good_sizes_are_exact);
  tcase_add_test(tests, units_parse_bad_sizes_are_refused_and_quoted);
  tcase_add_test(tests, units_format_bytes_three_digits);
  tcase_add_test(tests, units_format_count_three_digits);
  tcase_add_test(tests, units_format_seconds_as_people_say);
  tcase_add_test(tests, units_arithmetic_reports_overflow);
  tcase_add_test(tests, units_clock_does_not_run_back);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
