/* safetensors headers that lie: a table of known lies, and seeded mutations of a good file. */
#include "base/philox.h"
#include "io/formats/safetensors.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define T(dtype, shape, offsets) "{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define GOOD T("\"U8\"", "[8]", "[0,8]")

/* All against 8 bytes of data. */
static const struct {
  const char *header;
  flap_status status;
  const char *what;
} lies[] = {
    /* the header as JSON */
    {"[]", FLAP_CORRUPT, "start with {"},
    {" {\"a\":" GOOD "}", FLAP_CORRUPT, "start with {"},
    {"{\"a\":" GOOD, FLAP_CORRUPT, "header, byte"},
    {"{\"a\":" GOOD "}x", FLAP_CORRUPT, "header, byte"},
    {"{\"a\":" GOOD "}{}", FLAP_CORRUPT, "header, byte"},
    {"{\"a\":" GOOD ",}", FLAP_CORRUPT, "header, byte"},
    {"{a:" GOOD "}", FLAP_CORRUPT, "header, byte"},
    {"{\"a\xff\":" GOOD "}", FLAP_CORRUPT, "header, byte"},
    {"{\"a\\u0000b\":" GOOD "}", FLAP_CORRUPT, "header, byte"},
    {"{\"a\":" GOOD ",\"a\":" GOOD "}", FLAP_CORRUPT, "duplicate"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}", FLAP_CORRUPT, "duplicate"},
    {"{\"a\":" T("\"U8\"", "[NaN]", "[0,8]") "}", FLAP_CORRUPT, "header, byte"},
    {"{\"a\":" T("\"U8\"", "[99999999999999999999]", "[0,8]") "}", FLAP_CORRUPT, "header, byte"},
    {"{\"a\":" T("\"U8\"", "[8]", "[0,18446744073709551615]") "}", FLAP_CORRUPT, "header, byte"},
    /* entries */
    {"{\"a\":null}", FLAP_CORRUPT, "\"a\": is not described by an object"},
    {"{\"a\":[\"U8\",[8],[0,8]]}", FLAP_CORRUPT, "not described by an object"},
    {"{\"a\":{\"shape\":[8],\"data_offsets\":[0,8]}}", FLAP_CORRUPT, "\"dtype\" is missing"},
    {"{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,8]}}", FLAP_CORRUPT, "\"shape\" is missing"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[8]}}", FLAP_CORRUPT, "\"data_offsets\" is missing"},
    /* dtypes */
    {"{\"a\":" T("3", "[8]", "[0,8]") "}", FLAP_CORRUPT, "\"dtype\" is missing"},
    {"{\"a\":" T("\"F4\"", "[16]", "[0,8]") "}", FLAP_UNSUPPORTED, "\"F4\""},
    {"{\"a\":" T("\"f32\"", "[2]", "[0,8]") "}", FLAP_UNSUPPORTED, "\"f32\""},
    {"{\"a\":" T("\"\"", "[2]", "[0,8]") "}", FLAP_UNSUPPORTED, "\"\""},
    /* shapes */
    {"{\"a\":" T("\"U8\"", "8", "[0,8]") "}", FLAP_CORRUPT, "\"shape\""},
    {"{\"a\":" T("\"U8\"", "[-8]", "[0,8]") "}", FLAP_CORRUPT, "\"shape\""},
    {"{\"a\":" T("\"U8\"", "[8.0]", "[0,8]") "}", FLAP_CORRUPT, "\"shape\""},
    {"{\"a\":" T("\"U8\"", "[\"8\"]", "[0,8]") "}", FLAP_CORRUPT, "\"shape\""},
    {"{\"a\":" T("\"U8\"", "[[8]]", "[0,8]") "}", FLAP_CORRUPT, "\"shape\""},
    {"{\"a\":" T("\"U8\"", "[-1,-8]", "[0,8]") "}", FLAP_CORRUPT, "\"shape\""},
    {"{\"a\":" T("\"U8\"", "[1,1,1,1,1,1,1,1,8]", "[0,8]") "}", FLAP_UNSUPPORTED, "dimensions"},
    {"{\"a\":" T("\"U8\"", "[4294967296,4294967296,8]", "[0,8]") "}", FLAP_CORRUPT, "more bytes than any"},
    {"{\"a\":" T("\"F64\"", "[2305843009213693953]", "[0,8]") "}", FLAP_CORRUPT, "more bytes than any"},
    {"{\"a\":" T("\"F64\"", "[9223372036854775807]", "[0,8]") "}", FLAP_CORRUPT, "more bytes than any"},
    /* offsets */
    {"{\"a\":" T("\"U8\"", "[8]", "[0]") "}", FLAP_CORRUPT, "\"data_offsets\""},
    {"{\"a\":" T("\"U8\"", "[8]", "[0,8,8]") "}", FLAP_CORRUPT, "\"data_offsets\""},
    {"{\"a\":" T("\"U8\"", "[8]", "{}") "}", FLAP_CORRUPT, "\"data_offsets\""},
    {"{\"a\":" T("\"U8\"", "[8]", "[0,8.0]") "}", FLAP_CORRUPT, "\"data_offsets\""},
    {"{\"a\":" T("\"U8\"", "[8]", "[-8,0]") "}", FLAP_CORRUPT, "negative"},
    {"{\"a\":" T("\"U8\"", "[8]", "[8,0]") "}", FLAP_CORRUPT, "before they begin"},
    {"{\"a\":" T("\"U8\"", "[9]", "[0,9]") "}", FLAP_CORRUPT, "past the end"},
    {"{\"a\":" T("\"U8\"", "[8]", "[9223372036854775799,9223372036854775807]") "}", FLAP_CORRUPT, "past the end"},
    {"{\"a\":" T("\"U8\"", "[7]", "[0,8]") "}", FLAP_CORRUPT, "different size"},
    {"{\"a\":" T("\"F32\"", "[8]", "[0,8]") "}", FLAP_CORRUPT, "different size"},
    {"{\"a\":" T("\"U8\"", "[0]", "[0,8]") "}", FLAP_CORRUPT, "different size"},
    /* cover */
    {"{}", FLAP_CORRUPT, "8 bytes at its end"},
    {"{\"a\":" T("\"U8\"", "[7]", "[0,7]") "}", FLAP_CORRUPT, "1 bytes at its end"},
    {"{\"a\":" T("\"U8\"", "[7]", "[1,8]") "}", FLAP_CORRUPT, "before it"},
    {"{\"a\":" GOOD ",\"b\":" GOOD "}", FLAP_CORRUPT, "overlap"},
    {"{\"a\":" T("\"U8\"", "[5]", "[0,5]") ",\"b\":" T("\"U8\"", "[4]", "[4,8]") "}", FLAP_CORRUPT, "overlap"},
    {"{\"a\":" T("\"U8\"", "[3]", "[0,3]") ",\"b\":" T("\"U8\"", "[4]", "[4,8]") "}", FLAP_CORRUPT,
     "\"b\": bytes before"},
    {"{\"a\":" GOOD ",\"b\":" T("\"U8\"", "[0]", "[4,4]") "}", FLAP_CORRUPT, "overlap"},
    /* metadata */
    {"{\"__metadata__\":[],\"a\":" GOOD "}", FLAP_CORRUPT, "__metadata__"},
    {"{\"__metadata__\":{\"k\":1},\"a\":" GOOD "}", FLAP_CORRUPT, "\"k\" is not a string"},
    {"{\"__metadata__\":{\"k\":null},\"a\":" GOOD "}", FLAP_CORRUPT, "\"k\" is not a string"},
    {"{\"a\":" GOOD ",\"__metadata__\":" GOOD "}", FLAP_CORRUPT, "__metadata__"},
    /* a name that would break the one line of a message */
    {"{\"x\\ny\":null}", FLAP_CORRUPT, "\"x?y\""},
};

START_TEST(safetensors_lying_header_is_refused_and_named) {
  for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
    flap_safetensors *reader = NULL;
    scratch_safetensors("lie", lies[i].header, "01234567", 8);
    flap_status status = flap_safetensors_open(scratch_path("lie"), &reader);
    ck_assert_msg(status == lies[i].status, "%s: %s: %s", lies[i].header, flap_status_name(status),
                  flap_error_message());
    ck_assert_msg(scratch_error_has(lies[i].what) && scratch_error_has(scratch_path("lie")), "%s: %s", lies[i].header,
                  flap_error_message());
    ck_assert_ptr_null(strchr(flap_error_message(), '\n'));
  }
}
END_TEST

/* What the format allows although few write it. */
START_TEST(safetensors_odd_but_sound_header_is_read) {
  static const char *const headers[] = {
      "{\"a\":" GOOD "}   \n",
      "{ \"a\" : {\"data_offsets\":[0,8],\"shape\":[2,4],\"dtype\":\"I8\"} }",
      "{\"b\":" T("\"U8\"", "[4]", "[4,8]") ",\"a\":" T("\"U8\"", "[4]", "[0,4]") "}",
      "{\"a\":" GOOD ",\"e\":" T("\"F32\"", "[0,9]", "[8,8]") ",\"f\":" T("\"F32\"", "[0]", "[0,0]") "}",
      "{\"\":" GOOD "}",
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8],\"more\":1},\"__metadata__\":{}}",
      "{\"a\":" T("\"F64\"", "[]", "[0,8]") "}",
  };
  for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
    flap_safetensors *reader = NULL;
    scratch_safetensors("odd", headers[i], "01234567", 8);
    ck_assert_msg(flap_safetensors_open(scratch_path("odd"), &reader) == FLAP_OK, "%s: %s", headers[i],
                  flap_error_message());
    ck_assert_uint_eq(flap_safetensors_bytes(reader), 8);
    flap_safetensors_close(reader);
  }
}
END_TEST

START_TEST(safetensors_lying_length_is_refused) {
  static const struct {
    uint64_t length;
    const char *what;
  } cases[] = {{0, "not within"},          {1, "not within"},
               {UINT64_MAX, "not within"}, {100000001, "not within"},
               {100000000, "cut short"},   {(uint64_t)1 << 63, "not within"},
               {3, "cut short"},           {INT64_MAX - 7, "not within"}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    flap_safetensors *reader = NULL;
    unsigned char file[10] = {0, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
    for (unsigned k = 0; k < 8; k++)
      file[k] = (unsigned char)(cases[i].length >> (8 * k));
    scratch_write("length", file, sizeof file);
    ck_assert_int_eq(flap_safetensors_open(scratch_path("length"), &reader), FLAP_CORRUPT);
    ck_assert_msg(scratch_error_has(cases[i].what), "%s", flap_error_message());
  }
}
END_TEST

START_TEST(safetensors_deeply_nested_header_is_refused) {
  enum { DEPTH = 100000 };
  char *header = malloc(DEPTH + 8);
  flap_safetensors *reader = NULL;
  memset(header, '[', DEPTH + 8);
  memcpy(header, "{\"a\":", 5);
  header[DEPTH] = '\0';
  scratch_safetensors("deep", header, NULL, 0);
  ck_assert_int_eq(flap_safetensors_open(scratch_path("deep"), &reader), FLAP_CORRUPT);
  free(header);
}
END_TEST

/* ---- mutations ------------------------------------------------------------------------------------------ */

#define FUZZ_CASES 6000u
#define FUZZ_BYTES_MAX 4096u

static const char fuzz_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},\"a\":" T("\"F32\"", "[2,3]", "[0,24]") ",\"b\":" T(
        "\"BF16\"", "[4]", "[24,32]") ",\"c\":" T("\"U8\"", "[0,5]", "[32,32]") ",\"d\":" T("\"I64\"", "[]",
                                                                                            "[32,40]") "}";

/* Cuts out `removed` bytes at `at` and puts `text` there. */
static size_t splice(char *file, size_t bytes, size_t at, size_t removed, const char *text) {
  size_t added = strlen(text), rest;
  if (removed > bytes - at)
    removed = bytes - at;
  rest = bytes - at - removed;
  if (at + added + rest > FUZZ_BYTES_MAX)
    return bytes;
  memmove(file + at + added, file + at + removed, rest);
  memcpy(file + at, text, added);
  return at + added + rest;
}

static size_t mutate(const flap_philox *stream, uint64_t *draw, char *file, size_t bytes) {
  static const char *const pieces[] = {"-1",
                                       "0",
                                       "18446744073709551615",
                                       "9223372036854775807",
                                       "null",
                                       "[]",
                                       "{}",
                                       "\"",
                                       "\"F64\"",
                                       "1e3",
                                       "\\u0000",
                                       "[",
                                       "}",
                                       ",",
                                       "99",
                                       "\xf0\x9f",
                                       "\"a\":",
                                       "true",
                                       "4",
                                       " "};
  size_t at = (size_t)flap_philox_below(stream, (*draw)++, bytes);
  switch (flap_philox_below(stream, (*draw)++, 4)) {
  case 0:
    file[at] = (char)flap_philox_below(stream, (*draw)++, 256);
    return bytes;
  case 1:
    file[at] = (char)(file[at] ^ (1 << flap_philox_below(stream, (*draw)++, 8)));
    return bytes;
  case 2:
    return splice(file, bytes, at, (size_t)flap_philox_below(stream, (*draw)++, 9), "");
  default: {
    size_t removed = (size_t)flap_philox_below(stream, (*draw)++, 4);
    size_t piece = (size_t)flap_philox_below(stream, (*draw)++, sizeof pieces / sizeof pieces[0]);
    return splice(file, bytes, at, removed, pieces[piece]);
  }
  }
}

/* Whatever open accepts must be readable to the last byte and within the file. */
static void check_accepted(const flap_safetensors *reader, size_t file_bytes) {
  static char got[FUZZ_BYTES_MAX];
  uint64_t bytes = 0;
  for (uint64_t i = 0; i < flap_safetensors_count(reader); i++) {
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    ck_assert_uint_le(tensor->file_offset + tensor->bytes, file_bytes);
    ck_assert_int_eq(flap_safetensors_read(reader, tensor, 0, tensor->bytes, got), FLAP_OK);
    bytes += tensor->bytes;
  }
  ck_assert_uint_eq(bytes, flap_safetensors_bytes(reader));
}

START_TEST(safetensors_mutated_file_never_crashes) {
  const uint64_t seed = 20240917;
  flap_philox stream = flap_philox_stream(seed, "safetensors mutations");
  unsigned accepted = 0, refused = 0;
  uint64_t draw = 0;
  char base[FUZZ_BYTES_MAX], file[FUZZ_BYTES_MAX];
  size_t base_bytes = 8 + sizeof fuzz_header - 1 + 40;
  memset(base, 7, sizeof base);
  for (unsigned i = 0; i < 8; i++)
    base[i] = (char)((uint64_t)(sizeof fuzz_header - 1) >> (8 * i));
  memcpy(base + 8, fuzz_header, sizeof fuzz_header - 1);
  for (unsigned i = 0; i < FUZZ_CASES; i++) {
    flap_safetensors *reader = NULL;
    memcpy(file, base, sizeof file);
    size_t bytes = base_bytes;
    for (uint64_t n = 1 + flap_philox_below(&stream, draw++, 3); n > 0 && bytes > 0; n--)
      bytes = mutate(&stream, &draw, file, bytes);
    /* Half of the time the length is made to fit again, so that mutations reach past the first check. */
    if (bytes > 48 && flap_philox_below(&stream, draw++, 2) == 0)
      for (unsigned k = 0; k < 8; k++)
        file[k] = (char)((uint64_t)(bytes - 48) >> (8 * k));
    scratch_write("fuzz", file, bytes);
    flap_status status = flap_safetensors_open(scratch_path("fuzz"), &reader);
    if (status == FLAP_OK) {
      check_accepted(reader, bytes);
      accepted++;
      flap_safetensors_close(reader);
    } else {
      ck_assert_msg(status == FLAP_CORRUPT || status == FLAP_UNSUPPORTED, "seed %llu case %u: %s",
                    (unsigned long long)seed, i, flap_error_message());
      ck_assert(scratch_error_has(scratch_path("fuzz")));
      refused++;
    }
  }
  /* Both ways were taken, or the mutations would prove little. */
  ck_assert_uint_gt(accepted, FUZZ_CASES / 50);
  ck_assert_uint_gt(refused, FUZZ_CASES / 2);
}
END_TEST

START_TEST(safetensors_mutated_index_never_crashes) {
  static const char base[] = "{\"metadata\": {\"total_size\": 8}, \"weight_map\": {\"a\": \"one\", \"b\": \"two\"}}";
  flap_philox stream = flap_philox_stream(7, "index mutations");
  uint64_t draw = 0;
  unsigned accepted = 0, refused = 0;
  scratch_safetensors("one", "{\"a\":" GOOD "}", "01234567", 8);
  scratch_safetensors("two", "{\"b\":" GOOD "}", "01234567", 8);
  for (unsigned i = 0; i < 1500; i++) {
    char file[FUZZ_BYTES_MAX];
    flap_safetensors *reader = NULL;
    memcpy(file, base, sizeof base);
    size_t bytes = mutate(&stream, &draw, file, sizeof base - 1);
    scratch_write(FLAP_SAFETENSORS_INDEX, file, bytes);
    if (flap_safetensors_open(scratch_path(""), &reader) == FLAP_OK) {
      check_accepted(reader, FUZZ_BYTES_MAX);
      flap_safetensors_close(reader);
      accepted++;
    } else {
      refused++;
    }
  }
  ck_assert_uint_gt(accepted, 30);
  ck_assert_uint_gt(refused, 700);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("safetensors_hostile");
  tcase_set_timeout(tests, 120);
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_test(tests, safetensors_lying_header_is_refused_and_named);
  tcase_add_test(tests, safetensors_odd_but_sound_header_is_read);
  tcase_add_test(tests, safetensors_lying_length_is_refused);
  tcase_add_test(tests, safetensors_deeply_nested_header_is_refused);
  tcase_add_test(tests, safetensors_mutated_file_never_crashes);
  tcase_add_test(tests, safetensors_mutated_index_never_crashes);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
