/* The tokenizer against the libraries themselves, on random text: `tokenizers` and `transformers` in the Python of
 * $FLAP_VENV or .venv, and unicodedata in any Python. Each part is skipped when its library is not there. */
#include "io/formats/tokenizer.h"
#include "io/formats/tokenizer_nfc.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SCRIPT "tests/formats/tokenizer_reference.py"

static unsigned ran;
static uint64_t cuts;

/* Runs the script with a Python; false if the Python or one of its packages is not there. */
static bool run_script(const char *python, const char *arguments) {
  char command[2048];
  (void)snprintf(command, sizeof command, "%s " SCRIPT " %s 2>%s", python, arguments, scratch_path("errors.txt"));
  int status = system(command);
  if (status != -1 && WIFEXITED(status) && (WEXITSTATUS(status) == 77 || WEXITSTATUS(status) == 127))
    return false;
  if (status != 0) {
    char *errors = scratch_read("errors.txt", NULL);
    ck_abort_msg("%s: %s", command, errors);
  }
  ran++;
  return true;
}

static const char *library_python(void) {
  static char path[1024];
  const char *environment = getenv("FLAP_VENV");
  (void)snprintf(path, sizeof path, "%s/bin/python", environment != NULL ? environment : ".venv");
  return path;
}

static unsigned test_seed(void) {
  static unsigned seed;
  if (seed == 0) {
    const char *text = getenv("FLAP_TEST_SEED");
    seed = text != NULL ? (unsigned)strtoul(text, NULL, 10) : (unsigned)time(NULL);
    printf("FLAP_TEST_SEED=%u\n", seed);
  }
  return seed;
}

static char *from_hex(const char *hex, uint64_t *bytes_out) {
  *bytes_out = strcmp(hex, "-") == 0 ? 0 : strlen(hex) / 2;
  char *text = malloc(*bytes_out + 1);
  ck_assert_ptr_nonnull(text);
  for (uint64_t i = 0; i < *bytes_out; i++) {
    char digits[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
    text[i] = (char)strtoul(digits, NULL, 16);
  }
  return text;
}

START_TEST(nfc_of_random_text_is_that_of_unicodedata) {
  char arguments[1200];
  (void)snprintf(arguments, sizeof arguments, "nfc %u tests/formats/data %s", test_seed(), scratch_path(""));
  if (!run_script("python3", arguments))
    return;
  char *cases = scratch_read("cases.txt", NULL), *save = NULL;
  flap_nfc nfc = {0};
  unsigned count = 0;
  for (char *line = strtok_r(cases, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save), count++) {
    char *space = strchr(line, ' ');
    *space = '\0';
    uint64_t bytes, expected_bytes, got_bytes;
    char *text = from_hex(line, &bytes), *expected = from_hex(space + 1, &expected_bytes);
    const char *got;
    if (flap_nfc_is_stable(text, bytes)) {
      ck_assert_msg(bytes == expected_bytes && memcmp(text, expected, bytes) == 0, "%.300s is not stable", line);
    }
    ck_assert_int_eq(flap_nfc_apply(&nfc, text, bytes, &got, &got_bytes), FLAP_OK);
    ck_assert_msg(got_bytes == expected_bytes && (bytes == 0 || memcmp(got, expected, got_bytes) == 0), "NFC of %.300s",
                  line);
    free(text);
    free(expected);
  }
  ck_assert_uint_gt(count, 3000);
  flap_nfc_close(&nfc);
  free(cases);
}
END_TEST

static void compare_case(flap_tokenizer *tokenizer, const char *file, char *line) {
  char *save = NULL;
  unsigned flags = (unsigned)strtoul(strtok_r(line, " ", &save), NULL, 10);
  const char *hex = strtok_r(NULL, " ", &save);
  char *list = strtok_r(NULL, " ", &save);
  uint64_t bytes;
  char *text = from_hex(hex, &bytes);
  flap_ids ids = {0};
  ck_assert_msg(flap_tokenizer_encode(tokenizer, text, bytes, flags, &ids) == FLAP_OK, "%s", flap_error_message());
  uint64_t count = 0;
  char *inner = NULL;
  if (strcmp(list, "-") != 0) {
    for (const char *id = strtok_r(list, ",", &inner); id != NULL; id = strtok_r(NULL, ",", &inner), count++)
      ck_assert_msg(count < ids.count && ids.ids[count] == atoi(id),
                    "%s: text %.300s (flags %u): id %llu is %d, not %s", file, hex, flags, (unsigned long long)count,
                    count < ids.count ? ids.ids[count] : -1, id);
  }
  ck_assert_msg(count == ids.count, "%s: text %.300s (flags %u): %llu ids, not %llu", file, hex, flags,
                (unsigned long long)ids.count, (unsigned long long)count);
  flap_ids_free(&ids);
  free(text);
}

/* With byte_fallback pieces give the ids of the whole text with every vocabulary. */
static void compare_pieces(flap_tokenizer *tokenizer, const char *file, const char *line) {
  unsigned flags = (unsigned)strtoul(line, NULL, 10) & FLAP_TOKENIZER_LITERAL;
  uint64_t bytes;
  char *hex = strdup(strchr(line, ' ') + 1);
  ck_assert_ptr_nonnull(hex);
  *strchr(hex, ' ') = '\0';
  char *text = from_hex(hex, &bytes);
  flap_ids whole = {0}, pieces = {0};
  ck_assert_int_eq(flap_tokenizer_encode(tokenizer, text, bytes, flags, &whole), FLAP_OK);
  for (uint64_t piece = 1; piece < 60; piece += piece < 4 ? 1 : 9) {
    pieces.count = 0;
    for (uint64_t at = 0, count; at < bytes; at += count) {
      count = flap_tokenizer_cut(tokenizer, text + at, bytes - at, piece, true);
      unsigned more = at > 0 ? FLAP_TOKENIZER_CONTINUE : 0;
      ck_assert_int_eq(flap_tokenizer_encode(tokenizer, text + at, count, flags | more, &pieces), FLAP_OK);
      cuts += at > 0;
    }
    ck_assert_msg(whole.count == pieces.count &&
                      (whole.count == 0 || memcmp(whole.ids, pieces.ids, whole.count * sizeof *whole.ids) == 0),
                  "%s: text %.300s: pieces of %llu bytes have other ids", file, hex, (unsigned long long)piece);
  }
  flap_ids_free(&whole);
  flap_ids_free(&pieces);
  free(text);
  free(hex);
}

static void compare_decoded(const flap_tokenizer *tokenizer, const char *file, char *line) {
  char *hex = strchr(line, ' '), *save = NULL;
  *hex++ = '\0';
  uint64_t bytes, got = 0, count;
  char *wanted = from_hex(hex, &bytes), *text = malloc(4 * bytes + 1024);
  ck_assert_ptr_nonnull(text);
  const char *part;
  bool hide = *line == 's';
  flap_tokenizer_stream stream;
  flap_tokenizer_stream_open(tokenizer, &stream);
  for (const char *id = strtok_r(line + hide, ",", &save); id != NULL && *id != '-'; id = strtok_r(NULL, ",", &save)) {
    if (hide && flap_tokenizer_is_special(tokenizer, atoi(id)))
      continue;
    ck_assert_int_eq(flap_tokenizer_stream_put(&stream, atoi(id), &part, &count), FLAP_OK);
    ck_assert_uint_lt(got + count, 4 * bytes + 1024);
    memcpy(text + got, part, count);
    got += count;
  }
  ck_assert_int_eq(flap_tokenizer_stream_end(&stream, &part, &count), FLAP_OK);
  ck_assert_uint_lt(got + count, 4 * bytes + 1024);
  memcpy(text + got, part, count);
  got += count;
  ck_assert_msg(got == bytes && memcmp(text, wanted, bytes) == 0, "%s: %.300s give \"%.*s\", not \"%.*s\"", file, line,
                (int)got, text, (int)bytes, wanted);
  flap_tokenizer_stream_close(&stream);
  free(text);
  free(wanted);
}

/* <n>.json and <n>.txt, and with SentencePiece's style <n>.decoded; returns how many there are. */
static unsigned compare_variants(bool decoded) {
  unsigned number = 0;
  for (;; number++) {
    char name[32];
    (void)snprintf(name, sizeof name, "%u.json", number);
    if (!scratch_exists(name))
      return number;
    flap_tokenizer *tokenizer;
    ck_assert_msg(flap_tokenizer_open(scratch_path(name), &tokenizer) == FLAP_OK, "%s", flap_error_message());
    (void)snprintf(name, sizeof name, "%u.txt", number);
    char *cases = scratch_read(name, NULL), *save = NULL;
    for (char *line = strtok_r(cases, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save)) {
      if (decoded)
        compare_pieces(tokenizer, name, line);
      compare_case(tokenizer, name, line);
    }
    free(cases);
    (void)snprintf(name, sizeof name, "%u.decoded", number);
    cases = decoded ? scratch_read(name, NULL) : NULL;
    for (char *line = decoded ? strtok_r(cases, "\n", &save) : NULL; line != NULL; line = strtok_r(NULL, "\n", &save))
      compare_decoded(tokenizer, name, line);
    free(cases);
    flap_tokenizer_close(tokenizer);
  }
}

START_TEST(tokenizer_random_options_and_text_give_the_ids_of_the_library) {
  char arguments[1200];
  (void)snprintf(arguments, sizeof arguments, "variants %u tests/formats/data %s", test_seed(), scratch_path(""));
  if (run_script(library_python(), arguments))
    ck_assert_uint_ge(compare_variants(false), 20);
}
END_TEST

START_TEST(tokenizer_with_byte_fallback_gives_the_ids_and_texts_of_the_library) {
  char arguments[1200];
  (void)snprintf(arguments, sizeof arguments, "pieces %u tests/formats/data %s", test_seed(), scratch_path(""));
  if (!run_script(library_python(), arguments))
    return;
  cuts = 0;
  ck_assert_uint_ge(compare_variants(true), 24);
  ck_assert_uint_gt(cuts, 10000); /* there was something to compare */
}
END_TEST

START_TEST(tokenizer_saved_is_loaded_by_transformers_with_the_same_ids) {
  static const char *const texts[] = {"hello  world\n", "it's <|endoftext|> h\xc3\xa9", "",
                                      " \t\x01\xf0\x9f\x98\x80 12345", "Don't   stop .  Now !"};
  static const char *const paths[] = {NULL, "tests/formats/data/tokenizer_gpt2.json",
                                      "tests/formats/data/tokenizer_llama3.json",
                                      "tests/formats/data/tokenizer_qwen2.json"};
  flap_tokenizer *tokenizer;
  ck_assert_int_eq(
      paths[_i] == NULL ? flap_tokenizer_open_bytes(&tokenizer) : flap_tokenizer_open(paths[_i], &tokenizer), FLAP_OK);
  ck_assert_int_eq(flap_tokenizer_save(tokenizer, scratch_path("")), FLAP_OK);
  FILE *file = fopen(scratch_path("texts.txt"), "w");
  for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
    for (const char *at = texts[i]; *at != '\0'; at++)
      ck_assert_int_eq(fprintf(file, "%02x", (unsigned char)*at), 2);
    ck_assert_int_gt(fprintf(file, "%s\n", texts[i][0] == '\0' ? "-" : ""), 0);
  }
  ck_assert_int_eq(fclose(file), 0);
  char arguments[1200];
  (void)snprintf(arguments, sizeof arguments, "load %s", scratch_path(""));
  if (run_script(library_python(), arguments)) {
    char *answers = scratch_read("ids.txt", NULL), *save = NULL;
    ck_assert_int_eq(atoi(strtok_r(answers, "\n", &save)), flap_tokenizer_end(tokenizer));
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
      flap_ids ids = {0};
      ck_assert_int_eq(flap_tokenizer_encode(tokenizer, texts[i], strlen(texts[i]), 0, &ids), FLAP_OK);
      char *line = strtok_r(NULL, "\n", &save), *inner = NULL;
      ck_assert_ptr_nonnull(line);
      uint64_t count = 0;
      for (const char *id = strtok_r(line, ",", &inner); id != NULL && *id != '-'; id = strtok_r(NULL, ",", &inner))
        ck_assert(count < ids.count && ids.ids[count++] == atoi(id));
      ck_assert_uint_eq(count, ids.count);
      flap_ids_free(&ids);
    }
    free(answers);
  }
  flap_tokenizer_close(tokenizer);
}
END_TEST

/* Unforked, so that `ran` counts. */
int main(void) {
  Suite *suite = suite_create("formats");
  TCase *cases = tcase_create("tokenizer_library");
  tcase_add_checked_fixture(cases, scratch_setup, scratch_teardown);
  tcase_add_test(cases, nfc_of_random_text_is_that_of_unicodedata);
  tcase_add_test(cases, tokenizer_random_options_and_text_give_the_ids_of_the_library);
  tcase_add_test(cases, tokenizer_with_byte_fallback_gives_the_ids_and_texts_of_the_library);
  tcase_add_loop_test(cases, tokenizer_saved_is_loaded_by_transformers_with_the_same_ids, 0, 4);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed != 0 ? 1 : ran == 0 ? 77 : 0;
}
