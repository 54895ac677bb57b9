/* Whose table of algorithms a run takes, and what becomes of its files: kept, found again, shared by processes, and
 * refused or made anew where they are bad. */
#include "engine/machine/matmul_choice.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TARGET "sm_90 NVIDIA Test, cublaslt-13.1.0"

static flap_model_config config;
static flap_model_shape shape;

static void setup(void) {
  scratch_setup();
  ck_assert_int_eq(setenv("XDG_CACHE_HOME", scratch_path("cache"), 1), 0);
  rig_model(false, true, &config);
  shape = (flap_model_shape){.dtype = FLAP_BF16, .batch = 2, .sequence = 64};
}

static void open_choice(flap_matmul_choice *choice, const char *target, const char *resume) {
  RIG_OK(flap_matmul_choice_open(target, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, resume, choice));
}

/* As tuning does. */
static void add(flap_matmul_choice *choice, uint32_t m, uint8_t value) {
  const flap_matmul_key key = {.m = m,
                               .n = 48,
                               .k = 32,
                               .lda = 32,
                               .ldb = 32,
                               .ldc = 48,
                               .transpose = FLAP_NT,
                               .dtype = FLAP_BF16,
                               .c_dtype = FLAP_F32,
                               .added = (uint8_t)(m % 3),
                               .bias = m % 2 == 0 ? 16 : 0,
                               .align_a = 16,
                               .align_b = 8,
                               .align_c = 4};
  uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES];
  for (size_t i = 0; i < sizeof algorithm; i++)
    algorithm[i] = (uint8_t)(value + i);
  ck_assert(flap_matmul_table_add(&choice->table, &key, algorithm));
}

/* Files in the cache; the name of one of them. */
static unsigned cached(char name_out[256]) {
  unsigned count = 0;
  DIR *list = opendir(scratch_path("cache/flap"));
  for (const struct dirent *entry; list != NULL && (entry = readdir(list)) != NULL;) {
    const size_t length = strlen(entry->d_name);
    if (strncmp(entry->d_name, "matmul-", 7) == 0 && strcmp(entry->d_name + length - 5, ".json") == 0) {
      count++;
      (void)snprintf(name_out, 256, "cache/flap/%.200s", entry->d_name);
    }
  }
  if (list != NULL)
    (void)closedir(list);
  return count;
}

static void same_tables(const flap_matmul_choice *a, const flap_matmul_choice *b) {
  ck_assert_str_eq(a->table.target, b->table.target);
  ck_assert_uint_eq(a->table.count, b->table.count);
  ck_assert_mem_eq(a->table.entries, b->table.entries, sizeof a->table.entries);
  ck_assert_uint_eq(flap_matmul_table_digest(&a->table), flap_matmul_table_digest(&b->table));
}

static flap_matmul_choice one, other;

START_TEST(device_without_use_of_a_table_has_none) {
  open_choice(&one, "", "");
  ck_assert(!one.given && !one.tunes);
  RIG_OK(flap_matmul_choice_give(&one, NULL, true)); /* nothing is asked of the ops */
  RIG_OK(flap_matmul_choice_give(NULL, NULL, true));
  flap_matmul_choice_keep(&one);
  ck_assert(!scratch_exists("cache"));
}
END_TEST

START_TEST(new_run_tunes_and_the_next_one_finds_it) {
  char name[256];
  open_choice(&one, TARGET, "");
  ck_assert(one.given && one.tunes && one.table.count == 0);
  flap_matmul_choice_keep(&one); /* nothing was tuned */
  ck_assert(!scratch_exists("cache"));
  for (uint32_t m = FLAP_MATMUL_ENTRIES_MAX; m > 0; m--)
    add(&one, m, (uint8_t)m);
  flap_matmul_choice_keep(&one);
  ck_assert_uint_eq(cached(name), 1);
  open_choice(&other, TARGET, "");
  ck_assert(other.given && other.tunes);
  same_tables(&one, &other);
  /* What has not changed is not written. */
  ck_assert_int_eq(unlink(scratch_path(name)), 0);
  flap_matmul_choice_keep(&one);
  flap_matmul_choice_keep(&other);
  ck_assert(!scratch_exists(name));
}
END_TEST

/* GPU, library, micro-batch, dtypes, widths; but not the number of layers. */
START_TEST(table_belongs_to_target_and_shapes) {
  char name[256];
  open_choice(&one, TARGET, "");
  add(&one, 1, 1);
  flap_matmul_choice_keep(&one);
  open_choice(&other, "sm_90 NVIDIA Test, cublaslt-13.2.0", "");
  ck_assert_uint_eq(other.table.count, 0);
  add(&other, 1, 2);
  flap_matmul_choice_keep(&other);
  ck_assert_uint_eq(cached(name), 2);
  config.num_hidden_layers++;
  open_choice(&other, TARGET, "");
  same_tables(&one, &other);
  shape.batch++;
  open_choice(&other, TARGET, "");
  ck_assert_uint_eq(other.table.count, 0);
  shape.batch--, shape.dtype = FLAP_F16;
  open_choice(&other, TARGET, "");
  ck_assert_uint_eq(other.table.count, 0);
  shape.dtype = FLAP_BF16;
  RIG_OK(flap_matmul_choice_open(TARGET, &config, &shape, FLAP_F32, FLAP_RUN_MATMUL_TUNED, "", &other));
  ck_assert_uint_eq(other.table.count, 0);
  config.intermediate_size++;
  open_choice(&other, TARGET, "");
  ck_assert_uint_eq(other.table.count, 0);
}
END_TEST

START_TEST(first_takes_no_table_from_anywhere) {
  open_choice(&one, TARGET, "");
  add(&one, 1, 1);
  flap_matmul_choice_keep(&one);
  RIG_OK(flap_matmul_choice_save(&one, scratch_path("")));
  RIG_OK(flap_matmul_choice_open(TARGET, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_FIRST, scratch_path(""), &other));
  ck_assert(other.given && !other.tunes && other.table.count == 0);
}
END_TEST

START_TEST(resumed_run_takes_the_checkpoints_table) {
  open_choice(&one, TARGET, "");
  add(&one, 1, 1), add(&one, 2, 2);
  RIG_OK(flap_matmul_choice_save(&one, scratch_path("")));
  open_choice(&other, TARGET, "");
  add(&other, 1, 7), add(&other, 3, 7);
  flap_matmul_choice_keep(&other); /* this machine's is another one */
  open_choice(&other, TARGET, scratch_path(""));
  ck_assert(other.given && !other.tunes);
  same_tables(&one, &other);
  ck_assert(strstr(other.source, "/matmul.json") != NULL);
  /* Another GPU, or other shapes: as a new run. */
  open_choice(&other, "sm_80 NVIDIA Test, cublaslt-13.1.0", scratch_path(""));
  ck_assert(other.tunes && other.table.count == 0);
  shape.sequence *= 2;
  open_choice(&other, TARGET, scratch_path(""));
  ck_assert(other.tunes && other.table.count == 0);
  shape.sequence /= 2;
  /* A run of first answers goes on with them. */
  one.table.count = 0;
  RIG_OK(flap_matmul_choice_save(&one, scratch_path("")));
  open_choice(&other, TARGET, scratch_path(""));
  ck_assert(other.given && !other.tunes && other.table.count == 0);
  /* One without a file: as a new run. */
  ck_assert_int_eq(unlink(scratch_path("matmul.json")), 0);
  open_choice(&other, TARGET, scratch_path(""));
  ck_assert(other.tunes && other.table.count == 2);
}
END_TEST

START_TEST(first_process_to_store_counts_for_all) {
  static flap_matmul_choice third;
  open_choice(&one, TARGET, "");
  open_choice(&other, TARGET, "");
  add(&one, 1, 1);
  add(&other, 1, 9), add(&other, 2, 9);
  flap_matmul_choice_keep(&one);
  flap_matmul_choice_keep(&other);
  ck_assert_uint_eq(other.table.count, 2);
  ck_assert_uint_eq(other.table.entries[0].algorithm[0], 1);
  ck_assert_uint_eq(other.table.entries[1].algorithm[0], 9);
  open_choice(&third, TARGET, "");
  same_tables(&other, &third);
  /* An entry that left the table for another one is not brought back by the file that it is from. */
  flap_matmul_table_remove(&third.table, 0);
  add(&third, 1, 5);
  flap_matmul_choice_keep(&third);
  open_choice(&other, TARGET, "");
  same_tables(&other, &third);
}
END_TEST

/* ---- bad files ------------------------------------------------------------------------------------------- */

typedef struct edit {
  const char *from, *to; /* the first occurrence */
  const char *part;      /* of the message */
} edit;

static const edit edits[] = {
    {"{", "[", "matmul.json:"},
    {"\"flap products 1\"", "\"flap products 2\"", "format: \"flap products 2\" instead of"},
    {"\"flap products 1\"", "1", "format: must be a string"},
    {"\"target\"", "\"tarmac\"", "target: this key is missing"},
    {"\"digest\": \"0x", "\"digest\": \"0X", "digest: is not that of its products"},
    {"\"NT\"", "\"TT\"", "products[0].transpose: \"TT\""},
    {"\"m\": 1,", "\"m\": 0,", "products[0].m"},
    {"\"m\": 1,", "\"m\": 4294967296,", "products[0].m"},
    {"\"m\": 1,", "\"m\": \"1\",", "products[0].m"},
    {"\"m\": 1,", "\"m\": 2,", "digest: is not"},
    {"\"lda\": 32", "\"lda\": 31", "products[0]: no product has these sizes"},
    {"\"bfloat16\"", "\"int32\"", "products[0].dtype: \"int32\""},
    {"\"added\": \"c\"", "\"added\": \"d\"", "products[0].added: \"d\""},
    {"\"b_alignment\": 8", "\"b_alignment\": 7", "products[0]: no product has"},
    {"\"b_alignment\": 8", "\"b_alignment\": 32", "products[0].b_alignment"},
    {"\"algorithm\": \"01", "\"algorithm\": \"0", "products[0].algorithm: is not 128 hexadecimal digits"},
    {"\"algorithm\": \"01", "\"algorithm\": \"010", "products[0].algorithm: is not 128"},
    {"\"algorithm\": \"01", "\"algorithm\": \"0G", "products[0].algorithm: is not 128"},
    {"\"algorithm\": \"01", "\"algorithm\": \"11", "digest: is not"},
    {"\"algorithm\"", "\"algorithms\"", "products[0].algorithm: this key is missing"},
    {"\"products\": [", "\"products\": [7, ", "products[0]: not an object"},
    {"\"products\": [", "\"products\": 7, \"more\": [", "products: must be"},
};

/* The good text with one edit; free() it. */
static char *edited(const char *good, const edit *change) {
  const char *at = strstr(good, change->from);
  ck_assert_msg(at != NULL, "%s is not in the file", change->from);
  const size_t bytes = strlen(good) + strlen(change->to) + 1;
  char *text = malloc(bytes);
  ck_assert_ptr_nonnull(text);
  (void)snprintf(text, bytes, "%.*s%s%s", (int)(at - good), good, change->to, at + strlen(change->from));
  return text;
}

/* In a checkpoint an error that names the file; in the cache as if nothing were there, and made anew. */
static void check_bad(const char *text, size_t bytes, const char *part) {
  char name[256];
  scratch_write("matmul.json", text, bytes);
  RIG_REFUSED(
      flap_matmul_choice_open(TARGET, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, scratch_path(""), &other),
      FLAP_INVALID, "matmul.json", part);
  ck_assert_msg(scratch_error_has("resume_from_checkpoint: restore this file"), "%s", flap_error_message());
  ck_assert_uint_eq(cached(name), 1);
  scratch_write(name, text, bytes);
  open_choice(&other, TARGET, "");
  ck_assert(other.given && other.tunes && other.table.count == 0);
  add(&other, 1, 1);
  flap_matmul_choice_keep(&other);
  open_choice(&other, TARGET, "");
  ck_assert_uint_eq(other.table.count, 1);
}

START_TEST(bad_file_is_refused_or_made_anew) {
  char name[256];
  size_t bytes;
  open_choice(&one, TARGET, "");
  add(&one, 1, 1), add(&one, 2, 2);
  flap_matmul_choice_keep(&one);
  ck_assert_uint_eq(cached(name), 1);
  char *good = scratch_read(name, &bytes);
  for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
    char *text = edited(good, &edits[i]);
    check_bad(text, strlen(text), edits[i].part);
    free(text);
  }
  for (size_t length = 0; length + 2 < bytes; length += 97) /* cut short */
    check_bad(good, length, "");
  const edit twice = {"\"m\": 2,", "\"m\": 1,", ""};
  char *text = edited(good, &twice);
  check_bad(text, strlen(text), ""); /* differs in what is added, so this is the digest */
  free(text);
  char *large = calloc(1, (2u << 20) + 1);
  memset(large, ' ', 2u << 20);
  memcpy(large, good, bytes);
  check_bad(large, 2u << 20, "");
  free(large), free(good);
}
END_TEST

START_TEST(file_with_a_product_twice_or_too_many_is_refused) {
  static const char head[] =
      "{\"format\": \"flap products 1\", \"target\": \"t\", \"shapes\": \"s\", \"digest\": \"0x0\", "
      "\"products\": [";
  static char text[1u << 20];
  char *at = text;
  for (int round = 0; round < 2; round++) {
    const uint32_t count = round == 0 ? 2 : FLAP_MATMUL_ENTRIES_MAX + 1;
    at = text + sprintf(text, "%s", head);
    for (uint32_t i = 0; i < count; i++)
      at += sprintf(
          at,
          "%s{\"transpose\": \"NN\", \"m\": %u, \"n\": 1, \"k\": 1, \"lda\": 1, \"ldb\": 1, \"ldc\": 1, \"dtype\": "
          "\"float32\", \"c_dtype\": \"float32\", \"added\": \"nothing\", \"bias_alignment\": 0, "
          "\"a_alignment\": 4, \"b_alignment\": 4, \"c_alignment\": 4, \"algorithm\": \"%0128u\"}",
          i > 0 ? ", " : "", round == 0 ? 1 : i + 1, i);
    (void)sprintf(at, "]}");
    scratch_text("matmul.json", text);
    RIG_REFUSED(
        flap_matmul_choice_open(TARGET, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, scratch_path(""), &other),
        FLAP_INVALID, "matmul.json", round == 0 ? "products[1]: the same product" : "products: are 129");
  }
}
END_TEST

START_TEST(cache_that_cannot_be_written_is_no_error) {
  scratch_text("cache", "a file where the folder should be");
  open_choice(&one, TARGET, "");
  add(&one, 1, 1);
  flap_matmul_choice_keep(&one);
  ck_assert_uint_eq(one.table.count, 1);
  ck_assert_int_eq(unsetenv("XDG_CACHE_HOME"), 0);
  ck_assert_int_eq(unsetenv("HOME"), 0);
  open_choice(&one, TARGET, "");
  add(&one, 1, 1);
  flap_matmul_choice_keep(&one);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("matmul_choice");
  tcase_set_timeout(tests, 120);
  tcase_add_checked_fixture(tests, setup, scratch_teardown);
  tcase_add_test(tests, device_without_use_of_a_table_has_none);
  tcase_add_test(tests, new_run_tunes_and_the_next_one_finds_it);
  tcase_add_test(tests, table_belongs_to_target_and_shapes);
  tcase_add_test(tests, first_takes_no_table_from_anywhere);
  tcase_add_test(tests, resumed_run_takes_the_checkpoints_table);
  tcase_add_test(tests, first_process_to_store_counts_for_all);
  tcase_add_test(tests, bad_file_is_refused_or_made_anew);
  tcase_add_test(tests, file_with_a_product_twice_or_too_many_is_refused);
  tcase_add_test(tests, cache_that_cannot_be_written_is_no_error);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
