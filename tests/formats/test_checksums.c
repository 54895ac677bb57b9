/* Checksums of a folder's files: taken in pieces, written, read again; every change of a file is found. */
#include "io/formats/checksums.h"
#include "io/formats/safetensors.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static flap_checksums list;

static void setup(void) {
  scratch_setup();
  list = (flap_checksums){0};
}

static void teardown(void) {
  flap_checksums_close(&list);
  scratch_teardown();
}

static void must(flap_status status) {
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
}

START_TEST(checksum_is_xxh3_whatever_the_pieces) {
  flap_checksum *sum = NULL;
  must(flap_checksum_open(&sum));
  ck_assert_uint_eq(flap_checksum_value(sum), 0x2d06800538d394c2ull); /* XXH3-64 of nothing, seed 0 */
  unsigned char data[100000];
  for (size_t i = 0; i < sizeof data; i++)
    data[i] = (unsigned char)(i * 2654435761u >> 24);
  flap_checksum_add(sum, data, sizeof data);
  const uint64_t whole = flap_checksum_value(sum);
  flap_checksum_close(sum);
  must(flap_checksum_open(&sum));
  for (size_t at = 0, piece = 1; at < sizeof data; at += piece, piece = piece * 3 % 5003) {
    if (piece > sizeof data - at)
      piece = sizeof data - at;
    flap_checksum_add(sum, data + at, piece);
  }
  ck_assert_uint_eq(flap_checksum_bytes(sum), sizeof data);
  ck_assert_uint_eq(flap_checksum_value(sum), whole);
  data[77777] ^= 1;
  flap_checksum_close(sum);
  must(flap_checksum_open(&sum));
  flap_checksum_add(sum, data, sizeof data);
  ck_assert_uint_ne(flap_checksum_value(sum), whole);
  flap_checksum_close(sum);
}
END_TEST

static void write_folder(void) {
  const size_t before = list.count;
  flap_safetensors_writer *writer = NULL;
  const flap_safetensors_entry entry = {.name = "a", .dtype = FLAP_SAFETENSORS_U8, .rank = 1, .shape = {1000}};
  unsigned char data[1000] = {1, 2, 3};
  must(flap_safetensors_write_begin(scratch_path("large.safetensors"), &entry, 1, NULL, 0, (flap_file_piece){0},
                                    &writer));
  flap_safetensors_write_sum(writer, &list);
  must(flap_safetensors_write(writer, data, 300));
  must(flap_safetensors_write(writer, data + 300, 700));
  must(flap_safetensors_write_end(writer));
  ck_assert_uint_eq(list.count, before + 1);
  scratch_text("small.json", "{}");
  scratch_text("empty", "");
  ck_assert_int_eq(symlink("small.json", scratch_path("link")), 0); /* not a file of the folder's own */
  must(flap_checksums_add_rest(&list, scratch_path("")));
  ck_assert_uint_eq(list.count, before + 3);
  must(flap_checksums_write(&list, scratch_path("")));
  flap_checksums_close(&list);
  must(flap_checksums_read(scratch_path(""), &list));
  ck_assert_uint_eq(list.count, before + 3);
}

static flap_status check_all(void) {
  FLAP_TRY(flap_checksums_check_sizes(&list, scratch_path("")));
  for (size_t i = 0; i < list.count; i++)
    FLAP_TRY(flap_checksums_check_file(&list.entries[i], scratch_path("")));
  return FLAP_OK;
}

START_TEST(checksums_of_the_writer_are_those_of_the_file) {
  write_folder();
  must(check_all());
  const flap_checksums_entry *entry = flap_checksums_find(&list, "large.safetensors");
  ck_assert_ptr_nonnull(entry);
  size_t bytes = 0;
  free(scratch_read("large.safetensors", &bytes));
  ck_assert_uint_eq(entry->bytes, bytes);
  ck_assert_ptr_null(flap_checksums_find(&list, "large"));
}
END_TEST

START_TEST(checksums_find_every_change) {
  write_folder();
  size_t bytes = 0;
  char *content = scratch_read("large.safetensors", &bytes);
  for (size_t at = 0; at < bytes; at += 97) {
    content[at] = (char)(content[at] ^ 0x10);
    scratch_write("large.safetensors", content, bytes);
    ck_assert_int_eq(check_all(), FLAP_CORRUPT);
    ck_assert(scratch_error_has("large.safetensors"));
    content[at] = (char)(content[at] ^ 0x10);
  }
  scratch_write("large.safetensors", content, bytes - 1);
  ck_assert_int_eq(flap_checksums_check_sizes(&list, scratch_path("")), FLAP_CORRUPT);
  scratch_write("large.safetensors", content, bytes);
  free(content);
  must(check_all());
  ck_assert_int_eq(unlink(scratch_path("small.json")), 0);
  ck_assert_int_eq(flap_checksums_check_sizes(&list, scratch_path("")), FLAP_CORRUPT);
  ck_assert(scratch_error_has("small.json"));
  scratch_text("small.json", "{}");
  scratch_text("empty", "x");
  ck_assert_int_eq(check_all(), FLAP_CORRUPT);
}
END_TEST

START_TEST(checksums_of_a_file_that_is_checked_page_by_page_are_its_size) {
  scratch_text("pages-1.bin", "these are pages");
  must(flap_checksums_add_pages(&list, scratch_path("pages-1.bin"), 15));
  write_folder();
  const flap_checksums_entry *entry = flap_checksums_find(&list, "pages-1.bin");
  ck_assert_ptr_nonnull(entry);
  ck_assert(entry->pages && entry->bytes == 15 && entry->value == 0);
  ck_assert(!flap_checksums_find(&list, "small.json")->pages);
  scratch_text("pages-1.bin", "those are pages"); /* which others find */
  must(flap_checksums_check_file(entry, scratch_path("")));
  must(flap_checksums_check_sizes(&list, scratch_path("")));
  scratch_text("pages-1.bin", "these are page");
  ck_assert_int_eq(flap_checksums_check_file(entry, scratch_path("")), FLAP_CORRUPT);
  ck_assert(scratch_error_has("pages-1.bin"));
  ck_assert_int_eq(flap_checksums_check_sizes(&list, scratch_path("")), FLAP_CORRUPT);
  ck_assert_int_eq(unlink(scratch_path("pages-1.bin")), 0);
  ck_assert_int_eq(flap_checksums_check_file(entry, scratch_path("")), FLAP_CORRUPT);
  ck_assert(scratch_error_has("missing"));
}
END_TEST

START_TEST(checksums_bad_files_are_refused) {
  static const char *const bad[] = {
      "",
      "[]",
      "{}",
      "{\"format\": \"flap-checksums\", \"version\": 2, \"files\": []}",
      "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [{\"name\": \"../x\", \"bytes\": 1, \"checksum\": "
      "\"0x0123456789abcdef\"}]}",
      "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [{\"name\": \"..\", \"bytes\": 1, \"checksum\": "
      "\"0x0123456789abcdef\"}]}",
      "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [{\"name\": \"x\", \"bytes\": -1, \"checksum\": "
      "\"0x0123456789abcdef\"}]}",
      "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [{\"name\": \"x\", \"bytes\": 1, \"checksum\": "
      "\"0x0123456789abcdeg\"}]}",
      "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [{\"name\": \"x\", \"bytes\": 1, \"checksum\": "
      "\"0x012\"}]}",
      "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [7]}"};
  ck_assert_int_eq(flap_checksums_read(scratch_path(""), &list), FLAP_NOT_FOUND);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    scratch_text(FLAP_CHECKSUMS_FILE, bad[i]);
    ck_assert_msg(flap_checksums_read(scratch_path(""), &list) == FLAP_CORRUPT, "%zu: %s", i, flap_error_message());
    ck_assert(scratch_error_has(FLAP_CHECKSUMS_FILE));
    ck_assert_uint_eq(list.count, 0);
  }
}
END_TEST

/* Looking for each among the others would take hours for what fits the largest file that is read. */
START_TEST(checksums_of_more_files_than_there_can_be_are_refused) {
  static const char entry[] = "{\"name\": \"%05u\", \"bytes\": 1, \"checksum\": \"0x0123456789abcdef\"}%s";
  enum { FILES = 16385 };
  char *text = malloc(FILES * sizeof entry + 128);
  ck_assert_ptr_nonnull(text);
  for (unsigned files = FILES - 1; files <= FILES; files++) {
    size_t used = (size_t)snprintf(text, 128, "{\"format\": \"flap-checksums\", \"version\": 1, \"files\": [");
    for (unsigned i = 0; i < files; i++)
      used += (size_t)snprintf(text + used, sizeof entry + 8, entry, i, i + 1 < files ? "," : "]}");
    scratch_text(FLAP_CHECKSUMS_FILE, text);
    ck_assert_int_eq(flap_checksums_read(scratch_path(""), &list), files < FILES ? FLAP_OK : FLAP_CORRUPT);
    ck_assert_uint_eq(list.count, files < FILES ? files : 0);
    flap_checksums_close(&list);
  }
  ck_assert(scratch_error_has("files: are 16385, more than 16384"));
  free(text);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("checksums");
  TCase *tests = tcase_create("all");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_test(tests, checksum_is_xxh3_whatever_the_pieces);
  tcase_add_test(tests, checksums_of_the_writer_are_those_of_the_file);
  tcase_add_test(tests, checksums_find_every_change);
  tcase_add_test(tests, checksums_of_a_file_that_is_checked_page_by_page_are_its_size);
  tcase_add_test(tests, checksums_bad_files_are_refused);
  tcase_add_test(tests, checksums_of_more_files_than_there_can_be_are_refused);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
