/* The tokenizer against ids that the `tokenizers` library gave (tests/formats/make_tokenizer_data.py), and its own
 * promises: bytes come back, pieces give the ids of the whole, long words take no longer than they should. */
#include "base/units.h"
#include "io/formats/tokenizer.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DATA "tests/formats/data/"
/* The first three are byte-level, the others in the style of SentencePiece. */
static const char *const families[] = {"gpt2", "llama3", "qwen2", "llama2", "mistral", "gemma"};
enum { FAMILIES = 6, BYTE_LEVEL = 3 };

static flap_tokenizer *open_family(const char *name) {
  char path[128];
  (void)snprintf(path, sizeof path, DATA "tokenizer_%s.json", name);
  flap_tokenizer *tokenizer = NULL;
  ck_assert_msg(flap_tokenizer_open(path, &tokenizer) == FLAP_OK, "%s", flap_error_message());
  return tokenizer;
}

static json_t *load_cases(void) {
  json_error_t error;
  json_t *cases = json_load_file(DATA "tokenizer_cases.json", 0, &error);
  ck_assert_msg(cases != NULL, "%s", error.text);
  return cases;
}

static void encode(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, unsigned flags, flap_ids *ids) {
  ck_assert_msg(flap_tokenizer_encode(tokenizer, text, bytes, flags, ids) == FLAP_OK, "%s", flap_error_message());
}

static void compare_with_record(const char *family, bool special) {
  json_t *cases = load_cases();
  char key[64];
  (void)snprintf(key, sizeof key, "%s%s", family, special ? "_special" : "");
  const json_t *texts = json_object_get(cases, "texts"), *records = json_object_get(cases, key);
  ck_assert_uint_gt(json_array_size(texts), 30);
  ck_assert_uint_eq(json_array_size(texts), json_array_size(records));
  flap_tokenizer *tokenizer = open_family(family);
  flap_ids ids = {0};
  for (size_t i = 0; i < json_array_size(texts); i++) {
    const json_t *text = json_array_get(texts, i), *record = json_array_get(records, i);
    ids.count = 0;
    encode(tokenizer, json_string_value(text), json_string_length(text), special ? FLAP_TOKENIZER_SPECIAL : 0, &ids);
    ck_assert_msg(ids.count == json_array_size(record), "text %zu: %llu ids, not %zu", i, (unsigned long long)ids.count,
                  json_array_size(record));
    for (uint64_t k = 0; k < ids.count; k++)
      ck_assert_msg(ids.ids[k] == json_integer_value(json_array_get(record, k)), "text %zu: id %llu is %d, not %lld", i,
                    (unsigned long long)k, ids.ids[k], (long long)json_integer_value(json_array_get(record, k)));
  }
  flap_ids_free(&ids);
  flap_tokenizer_close(tokenizer);
  json_decref(cases);
}

START_TEST(tokenizer_recorded_corpus_gives_the_recorded_ids) {
  compare_with_record(families[_i], false);
}
END_TEST

START_TEST(tokenizer_special_tokens_asked_for_gives_the_recorded_ids) {
  compare_with_record(families[_i], true);
}
END_TEST

static void assert_decodes_to(const flap_tokenizer *tokenizer, const flap_ids *ids, const char *text, uint64_t bytes) {
  uint64_t at = 0;
  for (uint64_t i = 0; i < ids->count; i++) {
    uint64_t count;
    const char *piece = flap_tokenizer_decode(tokenizer, ids->ids[i], &count);
    ck_assert_ptr_nonnull(piece);
    ck_assert_uint_le(at + count, bytes);
    ck_assert_mem_eq(piece, text + at, count);
    at += count;
  }
  ck_assert_uint_eq(at, bytes);
}

/* Puts ids[0] to ids[count - 1]; what comes out is appended to the `bytes` bytes at `text`, of which there are enough.
 */
static uint64_t put_all(flap_tokenizer_stream *stream, const json_t *ids, char *text, uint64_t bytes) {
  const char *part;
  uint64_t count;
  for (size_t i = 0; i <= json_array_size(ids); i++) {
    flap_status status =
        i == json_array_size(ids)
            ? flap_tokenizer_stream_end(stream, &part, &count)
            : flap_tokenizer_stream_put(stream, (int32_t)json_integer_value(json_array_get(ids, i)), &part, &count);
    ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
    ck_assert_ptr_nonnull(part);
    memcpy(text + bytes, part, count);
    bytes += count;
  }
  return bytes;
}

START_TEST(tokenizer_recorded_ids_give_the_recorded_text) {
  json_t *cases = load_cases();
  char key[64];
  (void)snprintf(key, sizeof key, "%s_decoded", families[_i]);
  const json_t *records = json_object_get(cases, key);
  ck_assert_uint_gt(json_array_size(records), 100);
  flap_tokenizer *tokenizer = open_family(families[_i]);
  static char text[1 << 20];
  for (size_t i = 0; i < json_array_size(records); i++) {
    const json_t *ids = json_array_get(json_array_get(records, i), 0);
    const json_t *wanted = json_array_get(json_array_get(records, i), 1);
    flap_tokenizer_stream stream;
    flap_tokenizer_stream_open(tokenizer, &stream);
    uint64_t bytes = put_all(&stream, ids, text, 0);
    ck_assert_msg(bytes == json_string_length(wanted) &&
                      (bytes == 0 || memcmp(text, json_string_value(wanted), bytes) == 0),
                  "list %zu: \"%.*s\", not \"%s\"", i, (int)bytes, text, json_string_value(wanted));
    flap_tokenizer_stream_close(&stream);
  }
  flap_tokenizer_close(tokenizer);
  json_decref(cases);
}
END_TEST

static void assert_stream_gives(flap_tokenizer_stream *stream, int32_t id, const char *wanted) {
  const char *text;
  uint64_t bytes;
  ck_assert_int_eq(id < 0 ? flap_tokenizer_stream_end(stream, &text, &bytes)
                          : flap_tokenizer_stream_put(stream, id, &text, &bytes),
                   FLAP_OK);
  ck_assert_msg(bytes == strlen(wanted) && memcmp(text, wanted, bytes) == 0, "\"%.*s\", not \"%s\"", (int)bytes, text,
                wanted);
}

/* Bytes are held back until another token, or the end, tells that they are all; the space is dropped once. */
START_TEST(tokenizer_stream_holds_bytes_back_until_they_are_certain) {
  flap_tokenizer *tokenizer = open_family("llama2");
  flap_tokenizer_stream stream;
  flap_tokenizer_stream_open(tokenizer, &stream);
  const int32_t e2 = flap_tokenizer_find(tokenizer, "<0xE2>"), x82 = flap_tokenizer_find(tokenizer, "<0x82>"),
                ac = flap_tokenizer_find(tokenizer, "<0xAC>"), a = flap_tokenizer_find(tokenizer, "a"),
                mark = flap_tokenizer_find(tokenizer, "\xe2\x96\x81");
  ck_assert(e2 >= 0 && x82 >= 0 && ac >= 0 && a >= 0 && mark >= 0);
  assert_stream_gives(&stream, mark, "");
  assert_stream_gives(&stream, mark, " ");
  assert_stream_gives(&stream, e2, "");
  assert_stream_gives(&stream, x82, "");
  assert_stream_gives(&stream, ac, "");
  assert_stream_gives(&stream, a,
                      "\xe2\x82\xac"
                      "a");
  assert_stream_gives(&stream, e2, "");
  assert_stream_gives(&stream, ac, "");
  assert_stream_gives(&stream, mark, "\xef\xbf\xbd\xef\xbf\xbd ");
  assert_stream_gives(&stream, 123456, "");
  assert_stream_gives(&stream, e2, "");
  assert_stream_gives(&stream, -1, "\xef\xbf\xbd");
  assert_stream_gives(&stream, -1, "");
  assert_stream_gives(&stream, mark, " ");
  flap_tokenizer_stream_close(&stream);
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* Whatever the text is, its bytes come back, but for the space in front where that is dropped. */
START_TEST(tokenizer_with_byte_fallback_gives_valid_text_back) {
  json_t *cases = load_cases();
  const json_t *texts = json_object_get(cases, "texts");
  flap_tokenizer *tokenizer = open_family("gemma");
  static char text[1 << 20];
  for (size_t i = 0; i < json_array_size(texts); i++) {
    const json_t *wanted = json_array_get(texts, i);
    flap_ids ids = {0};
    encode(tokenizer, json_string_value(wanted), json_string_length(wanted), 0, &ids);
    json_t *list = json_array();
    for (uint64_t k = 0; k < ids.count; k++)
      ck_assert_int_eq(json_array_append_new(list, json_integer(ids.ids[k])), 0);
    flap_tokenizer_stream stream;
    flap_tokenizer_stream_open(tokenizer, &stream);
    uint64_t bytes = put_all(&stream, list, text, 0);
    ck_assert_msg(bytes == json_string_length(wanted) &&
                      (bytes == 0 || memcmp(text, json_string_value(wanted), bytes) == 0),
                  "text %zu", i);
    flap_tokenizer_stream_close(&stream);
    json_decref(list);
    flap_ids_free(&ids);
  }
  flap_tokenizer_close(tokenizer);
  json_decref(cases);
}
END_TEST

/* Bytes that are no UTF-8 are byte tokens, and what is behind them is no new beginning. */
START_TEST(tokenizer_with_byte_fallback_keeps_bytes_that_are_no_text) {
  flap_tokenizer *tokenizer = open_family("llama2");
  flap_ids ids = {0};
  encode(tokenizer,
         "a\xff\xc3"
         "a",
         4, 0, &ids);
  const int32_t wanted[] = {flap_tokenizer_find(tokenizer, "\xe2\x96\x81"
                                                           "a"),
                            flap_tokenizer_find(tokenizer, "<0xFF>"), flap_tokenizer_find(tokenizer, "<0xC3>"),
                            flap_tokenizer_find(tokenizer, "a")};
  ck_assert_uint_eq(ids.count, 4);
  ck_assert_mem_eq(ids.ids, wanted, sizeof wanted);
  flap_ids_free(&ids);
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* Any bytes at all: half of these are no UTF-8. */
START_TEST(tokenizer_any_bytes_decode_to_themselves) {
  static const char invalid[] = "a\xff\xfe"
                                "b\xc3(\xe2\x82"
                                "c\xf0\x9f\x98\x80\xed\xa0\x80\xc0\xaf\xf5\x80\0d\x80";
  flap_tokenizer *tokenizers[3] = {open_family("gpt2"), open_family("llama3"), NULL};
  ck_assert_int_eq(flap_tokenizer_open_bytes(&tokenizers[2]), FLAP_OK);
  for (int kind = 0; kind < 3; kind++) {
    flap_ids ids = {0};
    encode(tokenizers[kind], invalid, sizeof invalid - 1, 0, &ids);
    assert_decodes_to(tokenizers[kind], &ids, invalid, sizeof invalid - 1);
    for (unsigned length = 0; length < 64; length++) {
      char text[64];
      for (unsigned i = 0; i < length; i++)
        text[i] = (char)((i * 151 + length * 37 + i * i * 11) & 0xff);
      ids.count = 0;
      encode(tokenizers[kind], text, length, 0, &ids);
      assert_decodes_to(tokenizers[kind], &ids, text, length);
    }
    flap_ids_free(&ids);
    flap_tokenizer_close(tokenizers[kind]);
  }
}
END_TEST

START_TEST(tokenizer_of_bytes_gives_bytes_and_the_end_token) {
  flap_tokenizer *tokenizer;
  ck_assert_int_eq(flap_tokenizer_open_bytes(&tokenizer), FLAP_OK);
  ck_assert_uint_eq(flap_tokenizer_vocabulary(tokenizer), 257);
  ck_assert_int_eq(flap_tokenizer_end(tokenizer), 256);
  ck_assert_int_eq(flap_tokenizer_begin(tokenizer), -1);
  ck_assert_int_eq(flap_tokenizer_find(tokenizer, "<|endoftext|>"), 256);
  ck_assert(flap_tokenizer_is_special(tokenizer, 256) && !flap_tokenizer_is_special(tokenizer, 255));
  flap_ids ids = {0};
  encode(tokenizer, "h\xc3\xa9<|endoftext|>\n", 17, 0, &ids);
  const int32_t expected[] = {'h', 0xc3, 0xa9, 256, '\n'};
  ck_assert_uint_eq(ids.count, 5);
  ck_assert_mem_eq(ids.ids, expected, sizeof expected);
  ids.count = 0;
  encode(tokenizer, "<|endoftext|>", 13, FLAP_TOKENIZER_LITERAL, &ids);
  ck_assert_uint_eq(ids.count, 13);
  uint64_t bytes;
  ck_assert_ptr_null(flap_tokenizer_decode(tokenizer, 257, &bytes));
  ck_assert_ptr_null(flap_tokenizer_decode(tokenizer, -1, &bytes));
  flap_ids_free(&ids);
  flap_tokenizer_close(tokenizer);
}
END_TEST

START_TEST(tokenizer_names_of_tokens_are_found) {
  flap_tokenizer *tokenizer = open_family("llama3");
  ck_assert_int_eq(flap_tokenizer_begin(tokenizer), flap_tokenizer_find(tokenizer, "<|begin_of_text|>"));
  ck_assert_int_eq(flap_tokenizer_end(tokenizer), flap_tokenizer_find(tokenizer, "<|end_of_text|>"));
  ck_assert_int_ge(flap_tokenizer_end(tokenizer), 1200);
  ck_assert_int_eq(flap_tokenizer_find(tokenizer, "no such token"), -1);
  ck_assert_uint_eq(flap_tokenizer_vocabulary(tokenizer), 1203);
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* ---- pieces -------------------------------------------------------------------------------------------- */

static void assert_pieces_equal_whole(flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t piece) {
  flap_ids whole = {0}, pieces = {0};
  encode(tokenizer, text, bytes, 0, &whole);
  unsigned flags = 0;
  for (uint64_t at = 0; at < bytes;) {
    uint64_t count = flap_tokenizer_cut(tokenizer, text + at, bytes - at, piece, true);
    ck_assert_uint_gt(count, 0);
    ck_assert_uint_le(count, bytes - at);
    encode(tokenizer, text + at, count, flags, &pieces);
    at += count;
    flags = FLAP_TOKENIZER_CONTINUE;
  }
  ck_assert_uint_eq(whole.count, pieces.count);
  if (whole.count > 0)
    ck_assert_mem_eq(whole.ids, pieces.ids, whole.count * sizeof *whole.ids);
  flap_ids_free(&whole);
  flap_ids_free(&pieces);
}

/* All recorded texts as one, cut at every length up to 120: where there is no safe cut, the piece goes on. */
START_TEST(tokenizer_pieces_give_the_ids_of_the_whole) {
  json_t *cases = load_cases();
  const json_t *texts = json_object_get(cases, "texts");
  flap_tokenizer *tokenizer = open_family(families[_i]);
  for (size_t i = 0; i < json_array_size(texts); i++) {
    const json_t *text = json_array_get(texts, i);
    for (uint64_t piece = 1; piece < 120; piece += 7)
      assert_pieces_equal_whole(tokenizer, json_string_value(text), json_string_length(text), piece);
  }
  flap_tokenizer_close(tokenizer);
  json_decref(cases);
}
END_TEST

/* An added token that strips takes the white space beside it along; one that does not leaves it. */
START_TEST(tokenizer_added_tokens_that_strip_take_white_space_along) {
  scratch_text("tokenizer.json",
               "{\"model\": {\"vocab\": {\"a\": 0, \"b\": 1, \"\\u0120\": 2, \"\\u010a\": 3}, \"merges\": []},"
               "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false},"
               "\"added_tokens\": [{\"id\": 4, \"content\": \"<l>\", \"lstrip\": true, \"special\": true},"
               "{\"id\": 5, \"content\": \"<r>\", \"rstrip\": true, \"special\": true},"
               "{\"id\": 6, \"content\": \"<b>\", \"lstrip\": true, \"rstrip\": true},"
               "{\"id\": 7, \"content\": \"a b\", \"special\": true}]}");
  static const struct {
    const char *text, *ids; /* digits */
  } cases[] = {{"a <l> b", "0421"},          {"a <r> b", "0251"}, {"a <b> b", "061"}, {"a\n \xc2\xa0<l>b", "041"},
               {"<r>\xe2\x80\x83\nb", "51"}, {" <b> <b> ", "66"}, {"<l><r>", "45"},   {"a <l> <l>a", "0440"},
               {"a b a  b", "720221"}};
  flap_tokenizer *tokenizer = NULL;
  flap_ids ids = {0};
  ck_assert_msg(flap_tokenizer_open(scratch_path(""), &tokenizer) == FLAP_OK, "%s", flap_error_message());
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ids.count = 0;
    encode(tokenizer, cases[i].text, strlen(cases[i].text), 0, &ids);
    ck_assert_msg(ids.count == strlen(cases[i].ids), "\"%s\" has %llu ids", cases[i].text,
                  (unsigned long long)ids.count);
    for (uint64_t k = 0; k < ids.count; k++)
      ck_assert_msg(ids.ids[k] == cases[i].ids[k] - '0', "\"%s\": id %llu is %d", cases[i].text, (unsigned long long)k,
                    ids.ids[k]);
  }
  flap_ids_free(&ids);
  /* No cut tears such a token, nor parts it from the space that it takes. */
  static const char text[] = "aa bb a b aa <l> bb <r> aa bb <b> bb\naa a b aa\n<l>bb a b\nb <r>\naa";
  for (uint64_t piece = 1; piece < sizeof text; piece++)
    assert_pieces_equal_whole(tokenizer, text, sizeof text - 1, piece);
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* A cut puts no space where the whole has none, and takes none away. */
START_TEST(tokenizer_cuts_with_a_prefix_space_give_the_ids_of_the_whole) {
  static const char *const stages[] = {
      "{\"type\": \"ByteLevel\", \"add_prefix_space\": true}",
      "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Digits\"}, {\"type\": \"ByteLevel\"}]}",
      ("{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": "
       "\"\\\\s+|\\\\S+\"}, "
       "\"behavior\": \"Isolated\"}, {\"type\": \"ByteLevel\"}]}")};
  static const char text[] = "aa\nbb aa\nbb1\na2 bb<r>\naa bb\naa<n>\nbb aa\nb 12\n12 aa\nbb\n<r>\n<n>aa\n<n>\nbb bb";
  char json[1024];
  (void)snprintf(
      json, sizeof json,
      "{\"model\": {\"vocab\": {\"a\": 0, \"b\": 1, \"\\u0120\": 2, \"\\u010a\": 3, \"1\": 4, \"2\": 5, "
      "\"\\u0120\\u010a\": 6}, \"merges\": [\"\\u0120 \\u010a\"]}, \"pre_tokenizer\": %s, \"added_tokens\": ["
      "{\"id\": 7, \"content\": \"<n>\"}, {\"id\": 8, \"content\": \"<r>\", \"rstrip\": true}%s]}",
      stages[_i % 3], _i < 3 ? "" : ", {\"id\": 9, \"content\": \"\\n\"}");
  scratch_text("tokenizer.json", json);
  flap_tokenizer *tokenizer;
  ck_assert_msg(flap_tokenizer_open(scratch_path(""), &tokenizer) == FLAP_OK, "%s", flap_error_message());
  for (uint64_t piece = 1; piece < sizeof text; piece++)
    assert_pieces_equal_whole(tokenizer, text, sizeof text - 1, piece);
  flap_ids ids = {0};
  encode(tokenizer, "ab", 2, FLAP_TOKENIZER_CONTINUE, &ids);
  ck_assert_uint_eq(ids.count, 2);
  flap_ids_free(&ids);
  flap_tokenizer_close(tokenizer);
}
END_TEST

START_TEST(tokenizer_cut_prefers_lines_then_words_then_characters) {
  flap_tokenizer *tokenizer;
  ck_assert_int_eq(flap_tokenizer_open_bytes(&tokenizer), FLAP_OK);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "a b\nc d\ne f", 11, 9, true), 8);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "ab cd ef", 8, 6, true), 5);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "abcdefgh ij", 11, 4, true), 8);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "12\n\n34567", 9, 8, false), 4);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "123456789", 9, 4, true), 9);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "1234567\xe2\x82", 9, 4, false), 7);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "123456\xe2\x82\xac", 9, 4, false), 9);
  ck_assert_uint_eq(flap_tokenizer_cut(tokenizer, "short", 5, 9, true), 5);
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* What is shown may end within an added token, or hold none at all that is safe. */
START_TEST(tokenizer_with_byte_fallback_cuts_where_nothing_joins) {
  flap_tokenizer *tokenizer = open_family("llama2");
  static const struct {
    const char *text;
    uint64_t bytes, piece;
    bool last;
    uint64_t cut;
  } cases[] = {
      {"ab cd  ef", 9, 9, true, 9},
      {"ab cd  ef", 9, 9, false, 5},
      {"ab cd  ef", 9, 4, true, 4},
      {"ab \xe2\x96\x81 cd", 9, 5, true, 2},
      {"ab [INST] ef", 12, 8, true, 2},
      {"ab [INST] ef", 12, 10, true, 2},
      {"x <pad> y", 9, 6, true, 1},
      {"x <pad>", 5, 5, false, 1},
      {"the", 3, 1, true, 3},
      {"\xe9\xe9 the", 6, 6, false, 6},
      {"\xe9\x9b\xaa\xe9\x9b\xaa", 6, 4, true, 3},
      {"a\n\nb", 4, 2, true, 1},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    ck_assert_msg(flap_tokenizer_cut(tokenizer, cases[i].text, cases[i].bytes, cases[i].piece, cases[i].last) ==
                      cases[i].cut,
                  "case %zu is cut at %llu", i,
                  (unsigned long long)flap_tokenizer_cut(tokenizer, cases[i].text, cases[i].bytes, cases[i].piece,
                                                         cases[i].last));
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* 1 MB of white space, each character of it a token that takes all of what is beside it. */
START_TEST(tokenizer_tokens_that_strip_take_linear_time) {
  enum { BYTES = 1 << 20 };
  static const char *const sides[] = {"lstrip", "rstrip"};
  char json[512], *text = malloc(BYTES);
  memset(text, '\n', BYTES);
  for (size_t i = 0; i < sizeof sides / sizeof sides[0]; i++) {
    (void)snprintf(json, sizeof json,
                   "{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": []}, \"pre_tokenizer\": {\"type\": \"ByteLevel\"}, "
                   "\"added_tokens\": [{\"id\": 1, \"content\": \"\\n\", \"%s\": true, \"special\": true}]}",
                   sides[i]);
    scratch_text("tokenizer.json", json);
    flap_tokenizer *tokenizer;
    flap_ids ids = {0};
    ck_assert_msg(flap_tokenizer_open(scratch_path(""), &tokenizer) == FLAP_OK, "%s", flap_error_message());
    encode(tokenizer, text, BYTES, 0, &ids);
    ck_assert_uint_eq(ids.count, BYTES);
    flap_ids_free(&ids);
    flap_tokenizer_close(tokenizer);
  }
  free(text);
}
END_TEST

/* Words of 1 MB in a few seconds, and of 256 KB under a sanitizer: a quadratic merge would take hours. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LONG_WORD (1 << 18)
#else
#define LONG_WORD (1 << 20)
#endif
START_TEST(tokenizer_long_words_take_linear_time) {
  enum { BYTES = LONG_WORD };
  char *text = malloc(BYTES);
  flap_tokenizer *tokenizer = open_family(families[_i]);
  static const char *const units[] = {" ",         "a",        "\n", "ab",  "=", "\xe3\x80\x80",
                                      "e\xcc\x81", "\xcc\x81", "1",  " \n", "\r"};
  for (size_t unit = 0; unit < sizeof units / sizeof units[0]; unit++) {
    size_t length = strlen(units[unit]);
    uint64_t bytes = BYTES / length * length;
    for (uint64_t at = 0; at < bytes; at += length)
      memcpy(text + at, units[unit], length);
    flap_ids ids = {0};
    uint64_t start = flap_units_now_ns();
    encode(tokenizer, text, bytes, 0, &ids);
    double seconds = (double)(flap_units_now_ns() - start) * 1e-9;
    ck_assert_msg(seconds < 10, "\"%s\" repeated took %.1f s", units[unit], seconds);
    ck_assert_uint_gt(ids.count, 0);
    flap_ids_free(&ids);
  }
  flap_tokenizer_close(tokenizer);
  free(text);
}
END_TEST

/* ---- save ---------------------------------------------------------------------------------------------- */

START_TEST(tokenizer_saved_bytes_open_as_the_same_tokenizer) {
  flap_tokenizer *bytes, *again;
  ck_assert_int_eq(flap_tokenizer_open_bytes(&bytes), FLAP_OK);
  ck_assert_msg(flap_tokenizer_save(bytes, scratch_path("")) == FLAP_OK, "%s", flap_error_message());
  ck_assert_msg(flap_tokenizer_open(scratch_path(""), &again) == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(flap_tokenizer_vocabulary(again), 257);
  ck_assert_int_eq(flap_tokenizer_end(again), 256);
  ck_assert_int_eq(flap_tokenizer_begin(again), -1);
  char text[600];
  for (unsigned i = 0; i < sizeof text; i++)
    text[i] = (char)(i * 7 + i / 256);
  memcpy(text + 100, "<|endoftext|>", 13);
  flap_ids a = {0}, b = {0};
  encode(bytes, text, sizeof text, 0, &a);
  encode(again, text, sizeof text, 0, &b);
  ck_assert_uint_eq(a.count, sizeof text - 12);
  ck_assert_uint_eq(a.count, b.count);
  ck_assert_mem_eq(a.ids, b.ids, a.count * sizeof *a.ids);
  flap_ids_free(&a);
  flap_ids_free(&b);
  flap_tokenizer_close(bytes);
  flap_tokenizer_close(again);
}
END_TEST

START_TEST(tokenizer_saved_is_what_was_opened_even_when_the_files_are_gone) {
  json_t *tokenizer_json = json_load_file(DATA "tokenizer_llama3.json", 0, NULL);
  ck_assert_int_eq(json_dump_file(tokenizer_json, scratch_path("tokenizer.json"), 0), 0);
  json_decref(tokenizer_json);
  scratch_text("tokenizer_config.json", "{\"eos_token\": {\"content\": \"<|eot_id|>\"}, \"bos_token\": null}");
  char *before = scratch_read("tokenizer.json", NULL);
  flap_tokenizer *tokenizer;
  ck_assert_msg(flap_tokenizer_open(scratch_path("tokenizer.json"), &tokenizer) == FLAP_OK, "%s", flap_error_message());
  ck_assert_int_eq(flap_tokenizer_end(tokenizer), flap_tokenizer_find(tokenizer, "<|eot_id|>"));
  ck_assert_int_eq(flap_tokenizer_begin(tokenizer), -1);
  /* Into its own folder: nothing to do, and nothing lost. */
  ck_assert_int_eq(flap_tokenizer_save(tokenizer, scratch_path("")), FLAP_OK);
  char *after = scratch_read("tokenizer.json", NULL);
  ck_assert_str_eq(before, after);
  free(after);
  ck_assert_int_eq(remove(scratch_path("tokenizer.json")), 0);
  ck_assert_int_eq(remove(scratch_path("tokenizer_config.json")), 0);
  ck_assert_msg(flap_tokenizer_save(tokenizer, scratch_path("")) == FLAP_OK, "%s", flap_error_message());
  after = scratch_read("tokenizer.json", NULL);
  ck_assert_str_eq(before, after);
  ck_assert(scratch_exists("tokenizer_config.json"));
  ck_assert(!scratch_exists("special_tokens_map.json"));
  ck_assert_uint_eq(scratch_count(), 2);
  free(before);
  free(after);
  flap_tokenizer_close(tokenizer);
}
END_TEST

START_TEST(tokenizer_without_a_config_is_saved_with_one) {
  flap_tokenizer *tokenizer = open_family("qwen2"), *again;
  ck_assert_int_eq(flap_tokenizer_save(tokenizer, scratch_path("")), FLAP_OK);
  ck_assert(scratch_exists("tokenizer_config.json"));
  ck_assert_int_eq(flap_tokenizer_open(scratch_path(""), &again), FLAP_OK);
  ck_assert_int_eq(flap_tokenizer_end(tokenizer), flap_tokenizer_end(again));
  flap_tokenizer_close(again);
  ck_assert_int_eq(flap_tokenizer_save(tokenizer, scratch_path("missing")), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("missing"));
  flap_tokenizer_close(tokenizer);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *cases = tcase_create("tokenizer");
  tcase_set_timeout(cases, 300);
  tcase_add_checked_fixture(cases, scratch_setup, scratch_teardown);
  tcase_add_loop_test(cases, tokenizer_recorded_corpus_gives_the_recorded_ids, 0, FAMILIES);
  tcase_add_loop_test(cases, tokenizer_special_tokens_asked_for_gives_the_recorded_ids, 0, FAMILIES);
  tcase_add_loop_test(cases, tokenizer_recorded_ids_give_the_recorded_text, BYTE_LEVEL, FAMILIES);
  tcase_add_test(cases, tokenizer_stream_holds_bytes_back_until_they_are_certain);
  tcase_add_test(cases, tokenizer_with_byte_fallback_gives_valid_text_back);
  tcase_add_test(cases, tokenizer_with_byte_fallback_keeps_bytes_that_are_no_text);
  tcase_add_test(cases, tokenizer_any_bytes_decode_to_themselves);
  tcase_add_test(cases, tokenizer_of_bytes_gives_bytes_and_the_end_token);
  tcase_add_test(cases, tokenizer_names_of_tokens_are_found);
  tcase_add_loop_test(cases, tokenizer_pieces_give_the_ids_of_the_whole, 0, FAMILIES);
  tcase_add_test(cases, tokenizer_added_tokens_that_strip_take_white_space_along);
  tcase_add_loop_test(cases, tokenizer_cuts_with_a_prefix_space_give_the_ids_of_the_whole, 0, 6);
  tcase_add_test(cases, tokenizer_cut_prefers_lines_then_words_then_characters);
  tcase_add_test(cases, tokenizer_with_byte_fallback_cuts_where_nothing_joins);
  tcase_add_test(cases, tokenizer_tokens_that_strip_take_linear_time);
  tcase_add_loop_test(cases, tokenizer_long_words_take_linear_time, 0, FAMILIES);
  tcase_add_test(cases, tokenizer_saved_bytes_open_as_the_same_tokenizer);
  tcase_add_test(cases, tokenizer_saved_is_what_was_opened_even_when_the_files_are_gone);
  tcase_add_test(cases, tokenizer_without_a_config_is_saved_with_one);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed != 0;
}
