/* safetensors: what is written reads back, single and sharded; what is not whole is refused. */
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/safetensors.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <errno.h>
#include <jansson.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME "model.safetensors"

static const flap_safetensors_entry entries[] = {
    {.name = "wte.weight", .dtype = FLAP_SAFETENSORS_BF16, .rank = 2, .shape = {5, 3}},
    {.name = "a.bias", .dtype = FLAP_SAFETENSORS_F32, .rank = 1, .shape = {7}},
    {.name = "scalar", .dtype = FLAP_SAFETENSORS_I64, .rank = 0},
    {.name = "nothing", .dtype = FLAP_SAFETENSORS_F16, .rank = 3, .shape = {2, 0, 4}},
    {.name = "\xc3\xa9t\xc3\xa9 \"quoted\"\n",
     .dtype = FLAP_SAFETENSORS_U8,
     .rank = 8,
     .shape = {1, 1, 1, 1, 1, 1, 1, 9}},
};
#define ENTRIES (sizeof entries / sizeof entries[0])
static const flap_safetensors_pair pairs[] = {{"format", "pt"}, {"note", "caf\xc3\xa9"}};
static const uint64_t entry_bytes[ENTRIES] = {30, 28, 8, 0, 9};
#define DATA_BYTES 75u

static void fill(unsigned char *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    data[i] = (unsigned char)(i * 37 + 11);
}

static void write_example(const char *path) {
  unsigned char data[DATA_BYTES];
  flap_safetensors_writer *writer = NULL;
  fill(data, sizeof data);
  ck_assert_int_eq(flap_safetensors_write_begin(path, entries, ENTRIES, pairs, 2, (flap_file_piece){0}, &writer),
                   FLAP_OK);
  /* Pieces need not end where tensors do. */
  ck_assert_int_eq(flap_safetensors_write(writer, data, 41), FLAP_OK);
  ck_assert_int_eq(flap_safetensors_write(writer, data + 41, 0), FLAP_OK);
  ck_assert_int_eq(flap_safetensors_write(writer, data + 41, 34), FLAP_OK);
  ck_assert_msg(flap_safetensors_write_end(writer) == FLAP_OK, "%s", flap_error_message());
}

START_TEST(safetensors_written_file_reads_back_equal) {
  unsigned char data[DATA_BYTES], got[DATA_BYTES];
  fill(data, sizeof data);
  write_example(scratch_path(NAME));
  flap_safetensors *reader = NULL;
  ck_assert_msg(flap_safetensors_open(scratch_path(NAME), &reader) == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(flap_safetensors_count(reader), ENTRIES);
  ck_assert_uint_eq(flap_safetensors_bytes(reader), DATA_BYTES);
  size_t from = 0;
  for (size_t i = 0; i < ENTRIES; i++) {
    const flap_safetensors_tensor *tensor = NULL;
    ck_assert_int_eq(flap_safetensors_require(reader, entries[i].name, &tensor), FLAP_OK);
    ck_assert_str_eq(tensor->name, entries[i].name);
    ck_assert_int_eq(tensor->dtype, entries[i].dtype);
    ck_assert_uint_eq(tensor->rank, entries[i].rank);
    ck_assert_mem_eq(tensor->shape, entries[i].shape, sizeof tensor->shape);
    ck_assert_uint_eq(tensor->bytes, entry_bytes[i]);
    ck_assert_uint_eq(tensor->elements * flap_safetensors_dtype_bytes(tensor->dtype), entry_bytes[i]);
    ck_assert_int_eq(flap_safetensors_read(reader, tensor, 0, tensor->bytes, got), FLAP_OK);
    ck_assert_int_eq(memcmp(got, data + from, tensor->bytes), 0);
    if (tensor->bytes > 3) {
      ck_assert_int_eq(flap_safetensors_read(reader, tensor, 3, tensor->bytes - 3, got), FLAP_OK);
      ck_assert_int_eq(memcmp(got, data + from + 3, tensor->bytes - 3), 0);
    }
    from += tensor->bytes;
  }
  for (uint64_t i = 1; i < flap_safetensors_count(reader); i++)
    ck_assert_int_lt(strcmp(flap_safetensors_at(reader, i - 1)->name, flap_safetensors_at(reader, i)->name), 0);
  ck_assert_str_eq(flap_safetensors_metadata(reader, "format"), "pt");
  ck_assert_str_eq(flap_safetensors_metadata(reader, "note"), "caf\xc3\xa9");
  ck_assert_ptr_null(flap_safetensors_metadata(reader, "absent"));
  ck_assert_ptr_null(flap_safetensors_find(reader, "absent"));
  const flap_safetensors_tensor *absent;
  ck_assert_int_eq(flap_safetensors_require(reader, "absent", &absent), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("absent") && scratch_error_has(NAME));
  flap_safetensors_close(reader);
}
END_TEST

START_TEST(safetensors_written_file_has_measured_size_and_aligned_data) {
  uint64_t expected = 0, header = 0;
  size_t bytes;
  write_example(scratch_path(NAME));
  ck_assert_int_eq(flap_safetensors_measure(entries, ENTRIES, pairs, 2, &expected), FLAP_OK);
  char *file = scratch_read(NAME, &bytes);
  memcpy(&header, file, 8);
  ck_assert_uint_eq(bytes, expected);
  ck_assert_uint_eq(header % 8, 0);
  ck_assert_uint_eq(bytes, 8 + header + DATA_BYTES);
  /* Tensors keep the order given. */
  ck_assert(strstr(file + 8, "wte.weight") < strstr(file + 8, "a.bias"));
  free(file);
}
END_TEST

START_TEST(safetensors_empty_file_has_no_tensors) {
  flap_safetensors_writer *writer = NULL;
  flap_safetensors *reader = NULL;
  ck_assert_int_eq(flap_safetensors_write_begin(scratch_path(NAME), NULL, 0, NULL, 0, (flap_file_piece){0}, &writer),
                   FLAP_OK);
  ck_assert_int_eq(flap_safetensors_write_end(writer), FLAP_OK);
  ck_assert_int_eq(flap_safetensors_open(scratch_path(NAME), &reader), FLAP_OK);
  ck_assert_uint_eq(flap_safetensors_count(reader), 0);
  ck_assert_ptr_null(flap_safetensors_find(reader, "x"));
  flap_safetensors_close(reader);
}
END_TEST

START_TEST(safetensors_dtypes_map_both_ways) {
  for (int i = 0; i < FLAP_DTYPE_COUNT; i++) {
    flap_dtype back;
    flap_safetensors_dtype there = flap_safetensors_from_flap_dtype((flap_dtype)i);
    ck_assert(flap_safetensors_to_flap_dtype(there, &back));
    ck_assert_int_eq((int)back, i);
    ck_assert_uint_eq(flap_safetensors_dtype_bytes(there), flap_dtype_bytes((flap_dtype)i));
  }
  flap_dtype untouched = FLAP_F16;
  ck_assert(!flap_safetensors_to_flap_dtype(FLAP_SAFETENSORS_I64, &untouched));
  ck_assert_int_eq(untouched, FLAP_F16);
  ck_assert_str_eq(flap_safetensors_dtype_name(FLAP_SAFETENSORS_F8_E4M3), "F8_E4M3");
}
END_TEST

/* ---- writer mistakes ------------------------------------------------------------------------------------ */

static void refuse_entries(const flap_safetensors_entry *bad, uint64_t count, const char *what) {
  flap_safetensors_writer *writer = NULL;
  uint64_t bytes;
  ck_assert_int_eq(
      flap_safetensors_write_begin(scratch_path("bad"), bad, count, NULL, 0, (flap_file_piece){0}, &writer),
      FLAP_INVALID);
  ck_assert_msg(scratch_error_has(what), "%s, without: %s", flap_error_message(), what);
  ck_assert_int_eq(flap_safetensors_measure(bad, count, NULL, 0, &bytes), FLAP_INVALID);
  ck_assert(!scratch_exists("bad"));
}

START_TEST(safetensors_writer_refuses_bad_entries_and_leaves_no_file) {
  flap_safetensors_entry twice[] = {entries[0], entries[0]};
  refuse_entries(twice, 2, "twice");
  refuse_entries(&(flap_safetensors_entry){.name = "__metadata__"}, 1, "reserved");
  refuse_entries(&(flap_safetensors_entry){.name = "a\xff"}, 1, "UTF-8");
  refuse_entries(&(flap_safetensors_entry){.name = "a", .rank = 9}, 1, "dimensions");
  refuse_entries(&(flap_safetensors_entry){.name = "a", .rank = 2, .shape = {UINT64_MAX, 2}}, 1, "more bytes");
  refuse_entries(&(flap_safetensors_entry){.name = "a", .rank = 2, .shape = {0, UINT64_MAX}}, 1, "out of range");
  flap_safetensors_entry huge[] = {{.name = "a", .rank = 1, .shape = {INT64_MAX}},
                                   {.name = "b", .rank = 1, .shape = {1}}};
  refuse_entries(huge, 2, "more bytes");
}
END_TEST

START_TEST(safetensors_writer_refuses_bad_metadata_and_index) {
  static const flap_safetensors_pair twice[] = {{"format", "pt"}, {"format", "tf"}};
  static const flap_safetensors_pair bytes[] = {{"format", "\xff"}};
  static const char *const names[] = {"a", "a"};
  static const uint32_t shard_of[] = {0, 1};
  flap_safetensors_writer *writer = NULL;
  ck_assert_int_eq(
      flap_safetensors_write_begin(scratch_path(NAME), entries, 1, twice, 2, (flap_file_piece){0}, &writer),
      FLAP_INVALID);
  ck_assert(scratch_error_has("\"format\"") && scratch_error_has(NAME));
  ck_assert_int_eq(
      flap_safetensors_write_begin(scratch_path(NAME), entries, 1, bytes, 1, (flap_file_piece){0}, &writer),
      FLAP_INVALID);
  ck_assert_int_eq(flap_safetensors_write_index(scratch_path(""), names, shard_of, 2, 2, 8), FLAP_INVALID);
  ck_assert(scratch_error_has("\"a\"") && scratch_error_has(FLAP_SAFETENSORS_INDEX));
  ck_assert_uint_eq(scratch_count(), 0);
}
END_TEST

START_TEST(safetensors_writer_given_too_little_or_too_much_removes_file) {
  unsigned char data[DATA_BYTES + 1] = {0};
  flap_safetensors_writer *writer = NULL;
  const char *path = scratch_path(NAME);
  ck_assert_int_eq(flap_safetensors_write_begin(path, entries, ENTRIES, NULL, 0, (flap_file_piece){0}, &writer),
                   FLAP_OK);
  ck_assert_int_eq(flap_safetensors_write(writer, data, DATA_BYTES - 1), FLAP_OK);
  ck_assert_int_eq(flap_safetensors_write_end(writer), FLAP_INVALID);
  ck_assert(scratch_error_has("1 bytes of its tensors were never given"));
  ck_assert(!scratch_exists(NAME));

  ck_assert_int_eq(flap_safetensors_write_begin(path, entries, ENTRIES, NULL, 0, (flap_file_piece){0}, &writer),
                   FLAP_OK);
  ck_assert_int_eq(flap_safetensors_write(writer, data, DATA_BYTES + 1), FLAP_INVALID);
  ck_assert_int_eq(flap_safetensors_write(writer, data, 1), FLAP_CLOSED);
  ck_assert_int_eq(flap_safetensors_write_end(writer), FLAP_CLOSED);
  ck_assert(!scratch_exists(NAME));

  ck_assert_int_eq(flap_safetensors_write_begin(path, entries, ENTRIES, NULL, 0, (flap_file_piece){0}, &writer),
                   FLAP_OK);
  ck_assert(scratch_exists(NAME));
  flap_safetensors_write_abort(writer);
  ck_assert(!scratch_exists(NAME));
  ck_assert_int_eq(
      flap_safetensors_write_begin(scratch_path("no/where"), entries, ENTRIES, NULL, 0, (flap_file_piece){0}, &writer),
      FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("no/where"));
}
END_TEST

static int cannot_reserve(int fd, off_t bytes) {
  (void)fd, (void)bytes;
  errno = EOPNOTSUPP;
  return -1;
}

/* With space reserved nothing is begun; without, the header or the data find that there is none. */
START_TEST(safetensors_writer_on_full_disk_is_no_space_with_path) {
  static unsigned char data[DATA_BYTES];
  const flap_file_piece none = {0};
  flap_safetensors_writer *writer = NULL;
  uint64_t whole;
  ck_assert_int_eq(flap_safetensors_measure(entries, ENTRIES, NULL, 0, &whole), FLAP_OK);
  flap_system without = *flap_system_default();
  without.allocate = cannot_reserve;
  scratch_limit(whole - 1);
  flap_status reserved = flap_safetensors_write_begin(scratch_path(NAME), entries, ENTRIES, NULL, 0, none, &writer);
  bool named = scratch_error_has(scratch_path(NAME));
  (void)flap_system_replace(&without);
  flap_status begun = flap_safetensors_write_begin(scratch_path(NAME), entries, ENTRIES, NULL, 0, none, &writer);
  flap_status written = begun == FLAP_OK ? flap_safetensors_write(writer, data, DATA_BYTES) : begun;
  named = named && scratch_error_has(scratch_path(NAME));
  flap_status ended = begun == FLAP_OK ? flap_safetensors_write_end(writer) : begun;
  scratch_limit(20); /* not even the header */
  flap_status refused = flap_safetensors_write_begin(scratch_path("other"), entries, ENTRIES, NULL, 0, none, &writer);
  scratch_unlimit();
  (void)flap_system_replace(NULL);
  ck_assert_int_eq(reserved, FLAP_NO_SPACE);
  ck_assert_int_eq(begun, FLAP_OK);
  ck_assert_int_eq(written, FLAP_NO_SPACE);
  ck_assert(named);
  ck_assert_int_eq(ended, FLAP_CLOSED);
  ck_assert_int_eq(refused, FLAP_NO_SPACE);
  ck_assert(scratch_error_has(scratch_path("other")));
  ck_assert_uint_eq(scratch_count(), 0);
}
END_TEST

/* ---- files that are not whole --------------------------------------------------------------------------- */

START_TEST(safetensors_file_cut_anywhere_is_refused) {
  size_t bytes;
  flap_safetensors *reader = NULL;
  write_example(scratch_path(NAME));
  char *file = scratch_read(NAME, &bytes);
  for (size_t cut = 0; cut < bytes; cut++) {
    scratch_write("cut", file, cut);
    ck_assert_msg(flap_safetensors_open(scratch_path("cut"), &reader) == FLAP_CORRUPT, "%zu of %zu bytes", cut, bytes);
    ck_assert(scratch_error_has(scratch_path("cut")));
  }
  char *longer = calloc(1, bytes + 1);
  memcpy(longer, file, bytes);
  scratch_write("longer", longer, bytes + 1);
  ck_assert_int_eq(flap_safetensors_open(scratch_path("longer"), &reader), FLAP_CORRUPT);
  ck_assert(scratch_error_has("belong to no tensor"));
  free(longer);
  free(file);
}
END_TEST

START_TEST(safetensors_file_cut_after_open_is_found_by_read) {
  unsigned char got[64];
  flap_safetensors *reader = NULL;
  write_example(scratch_path(NAME));
  ck_assert_int_eq(flap_safetensors_open(scratch_path(NAME), &reader), FLAP_OK);
  const flap_safetensors_tensor *tensor = flap_safetensors_find(reader, "wte.weight");
  ck_assert_int_eq(truncate(scratch_path(NAME), (off_t)tensor->file_offset + 10), 0);
  ck_assert_int_eq(flap_safetensors_read(reader, tensor, 0, 10, got), FLAP_OK);
  ck_assert_int_eq(flap_safetensors_read(reader, tensor, 0, 30, got), FLAP_CORRUPT);
  ck_assert(scratch_error_has("wte.weight") && scratch_error_has(NAME));
  flap_safetensors_close(reader);
}
END_TEST

START_TEST(safetensors_open_of_what_is_no_file_says_so) {
  flap_safetensors *reader = NULL;
  ck_assert_int_eq(flap_safetensors_open(scratch_path("absent"), &reader), FLAP_NOT_FOUND);
  ck_assert_int_eq(flap_safetensors_open(scratch_path(""), &reader), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("holds neither"));
  ck_assert_int_eq(mkfifo(scratch_path("pipe"), 0600), 0);
  ck_assert_int_eq(flap_safetensors_open(scratch_path("pipe"), &reader), FLAP_INVALID);
  ck_assert(scratch_error_has("regular"));
  scratch_text("pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n");
  ck_assert_int_eq(flap_safetensors_open(scratch_path("pointer"), &reader), FLAP_CORRUPT);
  ck_assert(scratch_error_has("git lfs pull"));
}
END_TEST

/* ---- shards --------------------------------------------------------------------------------------------- */

/* Three tensors in two shards: a and b, then c. */
static void write_shards(void) {
  static const char *const names[] = {"a", "b", "c"};
  static const uint32_t shard_of[] = {0, 0, 1};
  flap_safetensors_entry all[3];
  for (unsigned i = 0; i < 3; i++)
    all[i] = (flap_safetensors_entry){.name = names[i], .dtype = FLAP_SAFETENSORS_U8, .rank = 1, .shape = {4}};
  for (uint32_t shard = 0, next = 0; shard < 2; shard++) {
    char name[FLAP_SAFETENSORS_SHARD_NAME_MAX];
    flap_safetensors_writer *writer = NULL;
    flap_safetensors_shard_name(shard, 2, name);
    uint32_t count = shard == 0 ? 2 : 1;
    ck_assert_int_eq(
        flap_safetensors_write_begin(scratch_path(name), all + next, count, pairs, 1, (flap_file_piece){0}, &writer),
        FLAP_OK);
    for (uint32_t i = next; i < next + count; i++) {
      char data[4] = {names[i][0], 1, 2, 3};
      ck_assert_int_eq(flap_safetensors_write(writer, data, 4), FLAP_OK);
    }
    ck_assert_int_eq(flap_safetensors_write_end(writer), FLAP_OK);
    next += count;
  }
  ck_assert_int_eq(flap_safetensors_write_index(scratch_path(""), names, shard_of, 3, 2, 12), FLAP_OK);
}

static void check_shards(const char *path) {
  flap_safetensors *reader = NULL;
  ck_assert_msg(flap_safetensors_open(path, &reader) == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(flap_safetensors_count(reader), 3);
  ck_assert_uint_eq(flap_safetensors_bytes(reader), 12);
  for (unsigned i = 0; i < 3; i++) {
    char got[4];
    const flap_safetensors_tensor *tensor = flap_safetensors_at(reader, i);
    ck_assert_int_eq(tensor->name[0], 'a' + (int)i);
    ck_assert_int_eq(flap_safetensors_read(reader, tensor, 0, 4, got), FLAP_OK);
    ck_assert_int_eq(got[0], 'a' + (int)i);
    ck_assert_ptr_nonnull(strstr(flap_safetensors_tensor_path(reader, tensor), i < 2 ? "00001-of" : "00002-of"));
  }
  ck_assert_str_eq(flap_safetensors_metadata(reader, "format"), "pt");
  flap_safetensors_close(reader);
}

START_TEST(safetensors_shards_read_back_by_folder_and_by_index) {
  write_shards();
  check_shards(scratch_path(""));
  check_shards(scratch_path(FLAP_SAFETENSORS_INDEX));
  char here[1024];
  ck_assert_ptr_nonnull(getcwd(here, sizeof here));
  ck_assert_int_eq(chdir(scratch_path("")), 0);
  check_shards(FLAP_SAFETENSORS_INDEX);
  check_shards(".");
  ck_assert_int_eq(chdir(here), 0);
}
END_TEST

START_TEST(safetensors_shards_may_be_links) {
  write_shards();
  ck_assert_int_eq(mkdir(scratch_path("blobs"), 0777), 0);
  ck_assert_int_eq(rename(scratch_path("model-00001-of-00002.safetensors"), scratch_path("blobs/first")), 0);
  ck_assert_int_eq(symlink("blobs/first", scratch_path("model-00001-of-00002.safetensors")), 0);
  check_shards(scratch_path(""));
}
END_TEST

START_TEST(safetensors_index_is_as_hugging_face_writes_it) {
  write_shards();
  json_t *index = json_load_file(scratch_path(FLAP_SAFETENSORS_INDEX), 0, NULL);
  ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(index, "metadata"), "total_size")), 12);
  const json_t *map = json_object_get(index, "weight_map");
  ck_assert_uint_eq(json_object_size(map), 3);
  ck_assert_str_eq(json_string_value(json_object_get(map, "a")), "model-00001-of-00002.safetensors");
  ck_assert_str_eq(json_string_value(json_object_get(map, "c")), "model-00002-of-00002.safetensors");
  json_decref(index);
}
END_TEST

START_TEST(safetensors_index_decides_between_shards) {
  /* Both shards hold "a"; only the one that the index names counts, and "c", which it does not name, is not listed. */
  write_shards();
  flap_safetensors *reader = NULL;
  scratch_text(FLAP_SAFETENSORS_INDEX, "{\"weight_map\": {\"a\": \"one\", \"b\": \"two\"}}");
  scratch_safetensors("one", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", "1", 1);
  scratch_safetensors("two",
                      "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                      "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
                      "23", 2);
  ck_assert_msg(flap_safetensors_open(scratch_path(""), &reader) == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(flap_safetensors_count(reader), 2);
  char got = 0;
  ck_assert_int_eq(flap_safetensors_read(reader, flap_safetensors_find(reader, "a"), 0, 1, &got), FLAP_OK);
  ck_assert_int_eq(got, '1');
  flap_safetensors_close(reader);
}
END_TEST

#define X32 "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"

START_TEST(safetensors_bad_index_is_refused_by_name) {
  static const struct {
    const char *index;
    flap_status status;
    const char *what;
  } cases[] = {
      {"{\"weight_map\": {\"a\": \"../out\"}}", FLAP_CORRUPT, "plain name"},
      {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", FLAP_CORRUPT, "plain name"},
      {"{\"weight_map\": {\"a\": \"sub/one\"}}", FLAP_CORRUPT, "plain name"},
      {"{\"weight_map\": {\"a\": \"sub\\\\one\"}}", FLAP_CORRUPT, "plain name"},
      {"{\"weight_map\": {\"a\": \"..\"}}", FLAP_CORRUPT, "plain name"},
      {"{\"weight_map\": {\"a\": \"\"}}", FLAP_CORRUPT, "plain name"},
      {"{\"weight_map\": {\"a\": 3}}", FLAP_CORRUPT, "not a string"},
      {"{\"weight_map\": []}", FLAP_CORRUPT, "weight_map"},
      {"{}", FLAP_CORRUPT, "weight_map"},
      {"[]", FLAP_CORRUPT, "weight_map"},
      {"{\"weight_map\": {\"a\": \"one\", \"a\": \"one\"}}", FLAP_INVALID, "duplicate"},
      {"{\"weight_map\": {\"a\": \"absent.safetensors\"}}", FLAP_NOT_FOUND, "absent.safetensors"},
      {"{\"weight_map\": {\"a\": \"" X32 X32 X32 X32 X32 X32 X32 X32 "\"}}", FLAP_IO, "too long"},
      {"{\"weight_map\": {\"z\": \"model-00001-of-00002.safetensors\"}}", FLAP_CORRUPT, "\"z\" is not in model-00001"},
      {"{\"weight_map\": {\"c\": \"model-00001-of-00002.safetensors\"}}", FLAP_CORRUPT, "\"c\" is not in model-00001"},
      {"not json", FLAP_INVALID, ":1:"},
  };
  write_shards();
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    flap_safetensors *reader = NULL;
    scratch_text(FLAP_SAFETENSORS_INDEX, cases[i].index);
    ck_assert_msg(flap_safetensors_open(scratch_path(""), &reader) == cases[i].status, "%s: %s", cases[i].index,
                  flap_error_message());
    ck_assert_msg(scratch_error_has(cases[i].what) && scratch_error_has(FLAP_SAFETENSORS_INDEX), "%s: %s",
                  cases[i].index, flap_error_message());
  }
}
END_TEST

START_TEST(safetensors_plan_shards_fills_in_order) {
  static const uint64_t sizes[] = {4, 4, 3, 20, 1, 9, 0, 1};
  uint32_t shard[8];
  ck_assert_uint_eq(flap_safetensors_plan_shards(sizes, 8, 10, shard), 5);
  static const uint32_t expected[] = {0, 0, 1, 2, 3, 3, 4, 4};
  for (unsigned i = 0; i < 8; i++)
    ck_assert_msg(shard[i] == expected[i], "tensor %u: shard %u", i, shard[i]);
  ck_assert_uint_eq(flap_safetensors_plan_shards(sizes, 0, 10, shard), 0);
  ck_assert_uint_eq(flap_safetensors_plan_shards(sizes, 8, UINT64_MAX, shard), 1);
  char name[FLAP_SAFETENSORS_SHARD_NAME_MAX];
  flap_safetensors_shard_name(0, 1, name);
  ck_assert_str_eq(name, "model.safetensors");
  flap_safetensors_shard_name(2, 12, name);
  ck_assert_str_eq(name, "model-00003-of-00012.safetensors");
}
END_TEST

/* ---- threads -------------------------------------------------------------------------------------------- */

static void *read_many(void *argument) {
  const flap_safetensors *reader = argument;
  const flap_safetensors_tensor *tensor = flap_safetensors_find(reader, "wte.weight");
  unsigned char data[DATA_BYTES], got[32];
  fill(data, sizeof data);
  for (unsigned i = 0; i < 500; i++)
    if (flap_safetensors_read(reader, tensor, i % 30, 30 - i % 30, got) != FLAP_OK ||
        memcmp(got, data + i % 30, 30 - i % 30) != 0)
      return argument;
  return NULL;
}

START_TEST(safetensors_reader_serves_threads_at_once) {
  pthread_t threads[4];
  flap_safetensors *reader = NULL;
  write_example(scratch_path(NAME));
  ck_assert_int_eq(flap_safetensors_open(scratch_path(NAME), &reader), FLAP_OK);
  for (unsigned i = 0; i < 4; i++)
    ck_assert_int_eq(pthread_create(&threads[i], NULL, read_many, reader), 0);
  for (unsigned i = 0; i < 4; i++) {
    void *failed;
    ck_assert_int_eq(pthread_join(threads[i], &failed), 0);
    ck_assert_ptr_null(failed);
  }
  flap_safetensors_close(reader);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *tests = tcase_create("safetensors");
  tcase_set_timeout(tests, 60);
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_add_test(tests, safetensors_written_file_reads_back_equal);
  tcase_add_test(tests, safetensors_written_file_has_measured_size_and_aligned_data);
  tcase_add_test(tests, safetensors_empty_file_has_no_tensors);
  tcase_add_test(tests, safetensors_dtypes_map_both_ways);
  tcase_add_test(tests, safetensors_writer_refuses_bad_entries_and_leaves_no_file);
  tcase_add_test(tests, safetensors_writer_refuses_bad_metadata_and_index);
  tcase_add_test(tests, safetensors_writer_given_too_little_or_too_much_removes_file);
  tcase_add_test(tests, safetensors_writer_on_full_disk_is_no_space_with_path);
  tcase_add_test(tests, safetensors_file_cut_anywhere_is_refused);
  tcase_add_test(tests, safetensors_file_cut_after_open_is_found_by_read);
  tcase_add_test(tests, safetensors_open_of_what_is_no_file_says_so);
  tcase_add_test(tests, safetensors_shards_read_back_by_folder_and_by_index);
  tcase_add_test(tests, safetensors_shards_may_be_links);
  tcase_add_test(tests, safetensors_index_is_as_hugging_face_writes_it);
  tcase_add_test(tests, safetensors_index_decides_between_shards);
  tcase_add_test(tests, safetensors_bad_index_is_refused_by_name);
  tcase_add_test(tests, safetensors_plan_shards_fills_in_order);
  tcase_add_test(tests, safetensors_reader_serves_threads_at_once);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
