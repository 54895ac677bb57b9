/* Datasets: what the stream is, that the split never leaks, that the order is a permutation, and that bad input says
 * what is wrong. */
#include "io/formats/dataset.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATHS_MAX = 4 };

static const char *paths[PATHS_MAX];
static flap_dataset_config config;
static flap_tokenizer *bytes_tokenizer;

static void setup(void) {
  scratch_setup();
  ck_assert_int_eq(flap_tokenizer_open_bytes(&bytes_tokenizer), FLAP_OK);
  config = (flap_dataset_config){.paths = paths,
                                 .path_count = 1,
                                 .tokenizer = bytes_tokenizer,
                                 .scratch_folder = "/tmp",
                                 .sequence_length = 4,
                                 .seed = 7};
}

static void teardown(void) {
  flap_tokenizer_close(bytes_tokenizer);
  scratch_teardown();
}

static flap_dataset *open_dataset(void) {
  flap_dataset *dataset = NULL;
  ck_assert_msg(flap_dataset_open(&config, &dataset) == FLAP_OK, "%s", flap_error_message());
  return dataset;
}

static void assert_refused(flap_status status, const char *text, const char *more) {
  flap_dataset *dataset = NULL;
  ck_assert_msg(flap_dataset_open(&config, &dataset) == status, "not refused as %s: %s", flap_status_name(status),
                flap_error_message());
  ck_assert_ptr_null(dataset);
  ck_assert_msg(scratch_error_has(text) && scratch_error_has(more), "%s", flap_error_message());
}

/* The whole stream, through held-out windows of one token. */
static int32_t *read_stream(uint64_t *count_out) {
  flap_dataset_config one = config;
  one.sequence_length = 1;
  one.val_size = 0;
  flap_dataset *dataset = NULL;
  ck_assert_msg(flap_dataset_open(&one, &dataset) == FLAP_OK, "%s", flap_error_message());
  *count_out = flap_dataset_tokens(dataset);
  int32_t *stream = calloc(*count_out, sizeof *stream);
  for (uint64_t i = 0; i < flap_dataset_sequences(dataset); i++) {
    int32_t token, target;
    ck_assert_int_eq(flap_dataset_fetch(dataset, i, 1, &token, &target), FLAP_OK);
    uint64_t at = flap_dataset_window(dataset, i);
    stream[at] = token;
    stream[at + 1] = target;
  }
  flap_dataset_close(dataset);
  return stream;
}

static void assert_stream(const char *expected, size_t bytes) {
  uint64_t count;
  int32_t *stream = read_stream(&count);
  ck_assert_uint_eq(count, bytes);
  for (size_t i = 0; i < bytes; i++)
    ck_assert_msg(stream[i] == (expected[i] == '|' ? 256 : (unsigned char)expected[i]), "token %zu is %d", i,
                  stream[i]);
  free(stream);
}

static void write_shard_file(const char *name, int32_t magic, int32_t version, int32_t count, uint32_t width,
                             const uint32_t *ids, size_t id_count) {
  unsigned char *file = calloc(1, 1024 + id_count * width);
  const int32_t header[3] = {magic, version, count};
  memcpy(file, header, sizeof header);
  for (size_t i = 0; i < id_count; i++)
    memcpy(file + 1024 + i * width, &ids[i], width);
  scratch_write(name, file, 1024 + id_count * width);
  free(file);
}

/* ---- the stream ---------------------------------------------------------------------------------------- */

START_TEST(dataset_text_files_are_documents_in_order_of_their_names) {
  scratch_text("b.txt", "second\r\n");
  scratch_text("a.txt", "\xef\xbb\xbf"
                        "first\n\n");
  scratch_text("c.txt", "");
  scratch_text("d.log", "not read");
  paths[0] = scratch_path("*.txt");
  assert_stream("\xef\xbb\xbf"
                "first\n\n|second\r\n|",
                20);
}
END_TEST

START_TEST(dataset_a_file_named_twice_is_taken_once) {
  scratch_text("a.txt", "first");
  scratch_text("b.txt", "second");
  ck_assert_int_eq(symlink(scratch_path("a.txt"), scratch_path("c.txt")), 0);
  paths[0] = scratch_path("b.txt");
  paths[1] = scratch_path("*.txt");
  paths[2] = scratch_path("./a.txt");
  config.path_count = 3;
  uint64_t count;
  free(read_stream(&count));
  ck_assert_uint_eq(count, 13);
}
END_TEST

START_TEST(dataset_jsonl_lines_are_documents) {
  scratch_text("a.jsonl",
               "\xef\xbb\xbf{\"text\": \"one\\u00e9\"}\r\n\n  \t\r\n{\"id\": 99999999999999999999, \"text\": \"\"}\n"
               "{\"meta\": {\"text\": 3}, \"text\": \"t\\u0000w\\no\"}\n{\"text\":\"three\"}");
  paths[0] = scratch_path("a.jsonl");
  assert_stream("one\xc3\xa9|t\0w\no|three|", 18);
}
END_TEST

START_TEST(dataset_begin_tokens_start_each_document) {
  flap_tokenizer *llama;
  ck_assert_int_eq(flap_tokenizer_open("tests/formats/data/tokenizer_llama3.json", &llama), FLAP_OK);
  config.tokenizer = llama;
  config.begin_tokens = true;
  scratch_text("a.jsonl", "{\"text\":\"x\"}\n{\"text\":\"y\"}\n");
  paths[0] = scratch_path("a.jsonl");
  uint64_t count;
  int32_t *stream = read_stream(&count);
  ck_assert_uint_eq(count, 6);
  for (int i = 0; i < 6; i += 3) {
    ck_assert_int_eq(stream[i], flap_tokenizer_begin(llama));
    ck_assert_int_eq(stream[i + 2], flap_tokenizer_end(llama));
  }
  free(stream);
  flap_tokenizer_close(llama);
}
END_TEST

/* Longer than a window of the tokenizer, so it is read and cut in pieces; the ids are those of the whole. */
START_TEST(dataset_long_text_has_the_ids_of_the_whole) {
  flap_tokenizer *gpt2;
  ck_assert_int_eq(flap_tokenizer_open("tests/formats/data/tokenizer_gpt2.json", &gpt2), FLAP_OK);
  uint64_t bytes = FLAP_TOKENIZER_WINDOW_BYTES + 3 * FLAP_TOKENIZER_PIECE_BYTES / 2;
  char *text = malloc(bytes);
  uint32_t state = 1;
  static const char *const words[] = {"the", " lighthouse",  " keeper", "\n",  "\r\n", "\n\n",
                                      "  ",  " caf\xc3\xa9", ".",       " 12", "\xff"};
  uint64_t used = 0;
  while (used + 12 <= bytes) {
    state = state * 1664525u + 1013904223u;
    const char *word = words[(state >> 16) % (sizeof words / sizeof words[0])];
    memcpy(text + used, word, strlen(word));
    used += strlen(word);
  }
  scratch_write("long.txt", text, used);
  paths[0] = scratch_path("long.txt");
  config.tokenizer = gpt2;
  config.sequence_length = 1000;
  flap_dataset *dataset = open_dataset();
  flap_ids ids = {0};
  ck_assert_int_eq(flap_tokenizer_encode(gpt2, text, used, 0, &ids), FLAP_OK);
  ck_assert_uint_eq(flap_dataset_tokens(dataset), ids.count + 1);
  static int32_t tokens[1000], targets[1000];
  for (uint64_t i = 0; i < flap_dataset_sequences(dataset); i++) {
    ck_assert_int_eq(flap_dataset_fetch(dataset, i, 1, tokens, targets), FLAP_OK);
    ck_assert_mem_eq(tokens, ids.ids + 1000 * flap_dataset_window(dataset, i), sizeof tokens);
  }
  flap_ids_free(&ids);
  flap_dataset_close(dataset);
  flap_tokenizer_close(gpt2);
  free(text);
}
END_TEST

START_TEST(dataset_both_versions_of_shards_are_read) {
  const uint32_t narrow[] = {0, 1, 65535, 7, 50256}, wide[] = {128000, 3, 70000, 9};
  write_shard_file("a.bin", 20240520, 1, 5, 2, narrow, 5);
  write_shard_file("b.bin", 20240801, 7, 4, 4, wide, 4);
  paths[0] = scratch_path("*.bin");
  config.tokenizer = NULL;
  config.vocabulary = 128256;
  config.scratch_folder = NULL;
  uint64_t count;
  int32_t *stream = read_stream(&count);
  ck_assert_uint_eq(count, 9);
  for (int i = 0; i < 9; i++)
    ck_assert_int_eq(stream[i], (int32_t)(i < 5 ? narrow[i] : wide[i - 5]));
  free(stream);
}
END_TEST

START_TEST(dataset_written_shard_reads_back_equal) {
  scratch_text("a.txt", "some text\n");
  scratch_text("b.jsonl", "{\"text\": \"more\"}\n");
  paths[0] = scratch_path("a.txt");
  paths[1] = scratch_path("b.jsonl");
  config.path_count = 2;
  uint64_t before_count, after_count, tokens;
  int32_t *before = read_stream(&before_count);
  for (int wide = 0; wide < 2; wide++) {
    config.paths = paths;
    config.path_count = 2;
    config.vocabulary = wide ? 65537 : 65536;
    const char *out = scratch_path("out.bin");
    ck_assert_msg(flap_dataset_write_shard(&config, out, &tokens) == FLAP_OK, "%s", flap_error_message());
    ck_assert_uint_eq(tokens, before_count);
    struct stat info;
    ck_assert_int_eq(stat(out, &info), 0);
    ck_assert_int_eq(info.st_size, (off_t)(1024 + tokens * (wide ? 4 : 2)));
    config.paths = &out;
    config.path_count = 1;
    int32_t *after = read_stream(&after_count);
    ck_assert_uint_eq(after_count, before_count);
    ck_assert_mem_eq(after, before, before_count * sizeof *before);
    free(after);
  }
  free(before);
}
END_TEST

START_TEST(dataset_shards_are_copied_into_a_shard) {
  const uint32_t ids[] = {1, 2, 3, 256, 5, 0};
  uint64_t before_count, after_count, tokens;
  write_shard_file("a.bin", 20240801, 7, 6, 4, ids, 6);
  scratch_text("b.txt", "text");
  paths[0] = scratch_path("a.bin");
  paths[1] = scratch_path("b.txt");
  config.path_count = 2;
  int32_t *before = read_stream(&before_count);
  ck_assert_uint_eq(before_count, 11);
  const char *out = scratch_path("out.bin");
  ck_assert_msg(flap_dataset_write_shard(&config, out, &tokens) == FLAP_OK, "%s", flap_error_message());
  ck_assert_uint_eq(tokens, before_count);
  config.vocabulary = 100; /* a model's that is smaller than the tokenizer's 257, by which the file is made */
  ck_assert_int_eq(flap_dataset_write_shard(&config, out, &tokens), FLAP_OK);
  config.vocabulary = 0;
  config.paths = &out;
  config.path_count = 1;
  int32_t *after = read_stream(&after_count);
  ck_assert_uint_eq(after_count, before_count);
  ck_assert_mem_eq(after, before, before_count * sizeof *before);
  free(before);
  free(after);
}
END_TEST

START_TEST(dataset_shard_never_replaces_what_it_is_made_of) {
  uint64_t tokens;
  scratch_text("a.txt", "some text\n");
  paths[0] = scratch_path("a.txt");
  config.path_count = 1;
  ck_assert_int_eq(symlink(paths[0], scratch_path("b.bin")), 0);
  const char *const outs[] = {paths[0], scratch_path("b.bin")};
  for (int i = 0; i < 2; i++) {
    ck_assert_int_eq(flap_dataset_write_shard(&config, outs[i], &tokens), FLAP_INVALID);
    ck_assert_ptr_nonnull(strstr(flap_error_message(), "one of the files to read"));
  }
  size_t bytes;
  char *text = scratch_read("a.txt", &bytes);
  ck_assert(bytes == 10 && memcmp(text, "some text\n", bytes) == 0);
  free(text);
}
END_TEST

START_TEST(dataset_that_is_stopped_while_it_is_read_leaves_nothing) {
  static const volatile sig_atomic_t stop = 1;
  const uint32_t ids[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  const char *const names[] = {"a.txt", "b.jsonl", "c.bin"};
  uint64_t tokens;
  scratch_text("a.txt", "some text\n");
  scratch_text("b.jsonl", "{\"text\": \"more text\"}\n");
  write_shard_file("c.bin", 20240520, 1, 9, 2, ids, 9);
  config.path_count = 1;
  config.stop = &stop;
  for (int i = 0; i < 3; i++) {
    flap_dataset *dataset = NULL;
    paths[0] = scratch_path(names[i]);
    ck_assert_int_eq(flap_dataset_write_shard(&config, scratch_path("out.bin"), &tokens), FLAP_INTERRUPTED);
    ck_assert(!scratch_exists("out.bin") && !scratch_exists("out.bin.tmp"));
    ck_assert_int_eq(flap_dataset_open(&config, &dataset), FLAP_INTERRUPTED);
  }
}
END_TEST

START_TEST(dataset_shard_that_cannot_be_written_leaves_nothing) {
  const uint32_t ids[] = {1, 2, 3, 257, 5, 0};
  uint64_t tokens;
  write_shard_file("a.bin", 20240801, 7, 6, 4, ids, 6);
  paths[0] = scratch_path("a.bin");
  ck_assert_int_eq(flap_dataset_write_shard(&config, scratch_path("out.bin"), &tokens), FLAP_INVALID);
  ck_assert(scratch_error_has("a.bin") && scratch_error_has("token 3 has the id 257"));
  scratch_text("b.txt", "");
  paths[0] = scratch_path("b.txt");
  ck_assert_int_eq(flap_dataset_write_shard(&config, scratch_path("out.bin"), &tokens), FLAP_INVALID);
  ck_assert(scratch_error_has("out.bin") && scratch_error_has("no text in the files"));
  ck_assert_uint_eq(tokens, 0);
  ck_assert_uint_eq(scratch_count(), 2);
}
END_TEST

/* ---- order and split ----------------------------------------------------------------------------------- */

START_TEST(dataset_permutation_is_a_bijection_for_every_size) {
  enum { MAX = 300 };
  for (uint64_t n = 1; n <= MAX; n++) {
    unsigned char seen[MAX] = {0};
    for (uint64_t i = 0; i < n; i++) {
      uint64_t to = flap_dataset_permute(n, n * 3, n, i);
      ck_assert_uint_lt(to, n);
      ck_assert_uint_eq(seen[to]++, 0);
    }
  }
  static const uint64_t sizes[] = {4095, 4096, 4097, 65537, 100003};
  for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++) {
    unsigned char *seen = calloc(1, sizes[k]);
    for (uint64_t i = 0; i < sizes[k]; i++)
      ck_assert(seen[flap_dataset_permute(1, 2, sizes[k], i)]++ == 0);
    free(seen);
  }
  ck_assert_uint_lt(flap_dataset_permute(1, 1, (uint64_t)1 << 62, ((uint64_t)1 << 62) - 1), (uint64_t)1 << 62);
}
END_TEST

/* Mean distance of i and its image is a third of n for a random permutation; correlation of epochs and seeds is 0. */
START_TEST(dataset_permutation_shuffles_and_differs_by_epoch_and_seed) {
  enum { N = 3000 };
  double distance = 0;
  unsigned same_epoch = 0, same_seed = 0, fixed = 0;
  for (uint64_t i = 0; i < N; i++) {
    uint64_t to = flap_dataset_permute(5, 0, N, i);
    distance += fabs((double)to - (double)i) / N;
    same_epoch += to == flap_dataset_permute(5, 1, N, i);
    same_seed += to == flap_dataset_permute(6, 0, N, i);
    fixed += to == i;
  }
  ck_assert_double_eq_tol(distance / N, 1.0 / 3, 0.02);
  ck_assert_uint_lt(same_epoch, 10);
  ck_assert_uint_lt(same_seed, 10);
  ck_assert_uint_lt(fixed, 10);
}
END_TEST

/* Each token is its own position, so what was fetched tells where it came from. */
static void write_positions(uint32_t count) {
  uint32_t *ids = malloc(count * sizeof *ids);
  for (uint32_t i = 0; i < count; i++)
    ids[i] = i;
  write_shard_file("p.bin", 20240801, 7, (int32_t)count, 4, ids, count);
  free(ids);
  paths[0] = scratch_path("p.bin");
  config.tokenizer = NULL;
  config.vocabulary = count;
}

START_TEST(dataset_heldout_tokens_are_never_seen_in_training) {
  for (uint32_t tokens = 12; tokens < 60; tokens++) {
    for (uint32_t length = 1; length < 6; length++) {
      for (int val = 0; val < 4; val++) {
        static const double sizes[] = {0.1, 0.5, 1, 2};
        write_positions(tokens);
        config.sequence_length = length;
        config.val_size = sizes[val];
        flap_dataset *dataset = NULL;
        if (flap_dataset_open(&config, &dataset) != FLAP_OK) {
          ck_assert(scratch_error_has("too few"));
          continue;
        }
        unsigned char seen[64] = {0};
        uint64_t n = flap_dataset_sequences(dataset), h = flap_dataset_heldout(dataset);
        uint64_t all = (tokens - 1) / length;
        uint64_t fraction = (uint64_t)(sizes[val] * (double)all);
        ck_assert_uint_eq(h, sizes[val] >= 1 ? (uint64_t)sizes[val] : fraction > 0 ? fraction : 1);
        int32_t in[8], out[8];
        for (uint64_t i = 0; i < 3 * n; i++) {
          ck_assert_int_eq(flap_dataset_fetch(dataset, i, 1, in, out), FLAP_OK);
          for (uint32_t k = 0; k < length; k++) {
            ck_assert_int_eq(out[k], in[k] + 1);
            seen[in[k]] = seen[out[k]] = 1;
          }
        }
        for (uint64_t i = 0; i < h; i++) {
          uint64_t counted = 0;
          ck_assert_int_eq(flap_dataset_fetch_heldout(dataset, i, 1, in, out, &counted), FLAP_OK);
          ck_assert_uint_eq(counted, length);
          for (uint32_t k = 0; k < length; k++) {
            ck_assert_int_eq(in[k], (int32_t)(tokens - 1 - (h - i) * length + k));
            ck_assert_int_eq(out[k], in[k] + 1);
            ck_assert(seen[in[k]] == 0 && seen[out[k]] == 0);
          }
        }
        /* Nothing but a rest shorter than a sequence is left out. */
        ck_assert_uint_gt((n + 1) * length + 1, tokens - (h * length + 1));
        flap_dataset_close(dataset);
      }
    }
  }
}
END_TEST

START_TEST(dataset_every_epoch_has_every_sequence_once) {
  write_positions(1000);
  config.sequence_length = 7;
  flap_dataset *dataset = open_dataset();
  uint64_t n = flap_dataset_sequences(dataset);
  ck_assert_uint_eq(n, 142);
  unsigned differs = 0;
  for (uint64_t epoch = 0; epoch < 3; epoch++) {
    unsigned char seen[142] = {0};
    for (uint64_t i = 0; i < n; i++) {
      int32_t in[7], out[7];
      ck_assert_int_eq(flap_dataset_fetch(dataset, epoch * n + i, 1, in, out), FLAP_OK);
      ck_assert_int_eq(in[0] % 7, 0);
      ck_assert_uint_eq(seen[in[0] / 7]++, 0);
      differs += flap_dataset_window(dataset, i) != flap_dataset_window(dataset, epoch * n + i);
    }
  }
  ck_assert_uint_gt(differs, n);
  /* Many at once, over a seam of epochs, are the same as one by one. */
  static int32_t in[20][7], out[20][7], one_in[7], one_out[7];
  ck_assert_int_eq(flap_dataset_fetch(dataset, n - 10, 20, in[0], out[0]), FLAP_OK);
  for (uint64_t i = 0; i < 20; i++) {
    ck_assert_int_eq(flap_dataset_fetch(dataset, n - 10 + i, 1, one_in, one_out), FLAP_OK);
    ck_assert_mem_eq(in[i], one_in, sizeof one_in);
    ck_assert_mem_eq(out[i], one_out, sizeof one_out);
  }
  flap_dataset_close(dataset);
}
END_TEST

START_TEST(dataset_windows_cross_files) {
  uint32_t ids[50];
  for (uint32_t i = 0; i < 50; i++)
    ids[i] = i;
  static const size_t lengths[] = {1, 10, 0, 2, 37};
  size_t at = 0;
  for (int file = 0; file < 5; file++) {
    char name[16];
    (void)snprintf(name, sizeof name, "%d.bin", file);
    write_shard_file(name, 20240520, 1, (int32_t)lengths[file], 2, ids + at, lengths[file]);
    at += lengths[file];
  }
  paths[0] = scratch_path("*.bin");
  config.tokenizer = NULL;
  config.vocabulary = 50;
  uint64_t count;
  int32_t *stream = read_stream(&count);
  ck_assert_uint_eq(count, 50);
  for (int i = 0; i < 50; i++)
    ck_assert_int_eq(stream[i], i);
  free(stream);
  config.sequence_length = 49;
  flap_dataset *dataset = open_dataset();
  int32_t in[49], out[49];
  ck_assert_int_eq(flap_dataset_fetch(dataset, 0, 1, in, out), FLAP_OK);
  for (int i = 0; i < 49; i++)
    ck_assert(in[i] == i && out[i] == i + 1);
  flap_dataset_close(dataset);
}
END_TEST

/* Every token but the first is a target, in a shorter sequence at the end if need be; none is left for training. */
START_TEST(dataset_all_held_out_gives_every_target) {
  config.heldout_all = true;
  config.val_size = 0;
  for (uint32_t tokens = 2; tokens < 40; tokens++) {
    for (uint32_t length = 1; length < 6; length++) {
      write_positions(tokens);
      config.sequence_length = length;
      flap_dataset *dataset = open_dataset();
      uint64_t seen = 0;
      ck_assert_uint_eq(flap_dataset_sequences(dataset), 0);
      for (uint64_t i = 0; i < flap_dataset_heldout(dataset); i++) {
        int32_t in[8], out[8];
        uint64_t counted = 0;
        ck_assert_int_eq(flap_dataset_fetch_heldout(dataset, i, 1, in, out, &counted), FLAP_OK);
        for (uint32_t k = 0; k < length; k++) {
          ck_assert_int_eq(in[k], k < counted ? (int32_t)seen : 0);
          ck_assert_int_eq(out[k], k < counted ? (int32_t)++seen : -1);
        }
      }
      ck_assert_uint_eq(seen, tokens - 1);
      double own = 0, train = 0;
      flap_dataset_unigram_entropy(dataset, &own, &train);
      ck_assert(fabs(own - log((double)(tokens - 1))) < 1e-9); /* every target is another token */
      flap_dataset_close(dataset);
    }
  }
}
END_TEST

START_TEST(dataset_digest_tells_tokens_and_split_apart_but_not_files) {
  scratch_text("a.txt", "abcdefgh");
  paths[0] = scratch_path("a.txt");
  flap_dataset *dataset = open_dataset();
  uint64_t digest = flap_dataset_digest(dataset);
  flap_dataset_close(dataset);
  uint64_t tokens;
  ck_assert_int_eq(flap_dataset_write_shard(&config, scratch_path("a.bin"), &tokens), FLAP_OK);
  paths[0] = scratch_path("a.bin");
  config.seed++;
  dataset = open_dataset();
  ck_assert(flap_dataset_digest(dataset) == digest);
  flap_dataset_close(dataset);
  scratch_text("a.txt", "abcdefgi");
  paths[0] = scratch_path("a.txt");
  dataset = open_dataset();
  ck_assert(flap_dataset_digest(dataset) != digest);
  uint64_t other = flap_dataset_digest(dataset);
  flap_dataset_close(dataset);
  config.sequence_length = 3;
  dataset = open_dataset();
  ck_assert(flap_dataset_digest(dataset) != other);
  flap_dataset_close(dataset);
}
END_TEST

START_TEST(dataset_unigram_entropy_is_that_of_the_heldout_targets) {
  /* Training: 10 tokens, 6 of id 0 and 4 of id 1. Held-out targets: 0 0 1 2 (its first input is no target). */
  const uint32_t ids[] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 3, 0, 0, 1, 2};
  write_shard_file("e.bin", 20240520, 1, 15, 2, ids, 15);
  paths[0] = scratch_path("e.bin");
  config.tokenizer = NULL;
  config.vocabulary = 4;
  config.val_size = 1;
  flap_dataset *dataset = open_dataset();
  double own, train;
  flap_dataset_unigram_entropy(dataset, &own, &train);
  ck_assert_double_eq_tol(own, 0.5 * log(2) + 0.5 * log(4), 1e-12);
  ck_assert_double_eq_tol(train, -(0.5 * log(7.0 / 14) + 0.25 * log(5.0 / 14) + 0.25 * log(1.0 / 14)), 1e-12);
  flap_dataset_close(dataset);
}
END_TEST

/* ---- bad input ----------------------------------------------------------------------------------------- */

START_TEST(dataset_names_that_lead_nowhere_are_refused) {
  paths[0] = scratch_path("*.txt");
  assert_refused(FLAP_NOT_FOUND, "*.txt", "matches no file");
  paths[0] = scratch_path("missing.txt");
  assert_refused(FLAP_NOT_FOUND, "missing.txt", "No such file");
  paths[0] = scratch_path("");
  assert_refused(FLAP_INVALID, "is a folder", "*.txt");
  scratch_text("a.csv", "x");
  paths[0] = scratch_path("a.csv");
  assert_refused(FLAP_UNSUPPORTED, "a.csv", ".jsonl");
  config.path_count = 0;
  assert_refused(FLAP_INVALID, "no files", "");
}
END_TEST

START_TEST(dataset_without_what_it_needs_is_refused) {
  ck_assert_int_eq(mkfifo(scratch_path("pipe.txt"), 0600), 0);
  paths[0] = scratch_path("pipe.txt");
  assert_refused(FLAP_INVALID, "pipe.txt", "not a regular file");
  scratch_text("a.txt", "some text");
  paths[0] = scratch_path("a.txt");
  config.tokenizer = NULL;
  assert_refused(FLAP_INVALID, "text needs a tokenizer", "");
  const uint32_t ids[] = {1, 2, 3, 4, 5, 6};
  write_shard_file("a.bin", 20240520, 1, 6, 2, ids, 6);
  paths[0] = scratch_path("a.bin");
  assert_refused(FLAP_INVALID, "neither a vocabulary size nor a tokenizer", "");
  config.vocabulary = (uint32_t)1 << 31;
  assert_refused(FLAP_INVALID, "a vocabulary of 2147483648 ids", "");
  scratch_text("tokenizer.json", "{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": []}, "
                                 "\"pre_tokenizer\": {\"type\": \"ByteLevel\"}}");
  flap_tokenizer *endless = NULL;
  ck_assert_msg(flap_tokenizer_open(scratch_path("tokenizer.json"), &endless) == FLAP_OK, "%s", flap_error_message());
  config.tokenizer = endless;
  paths[0] = scratch_path("a.txt");
  assert_refused(FLAP_INVALID, "tokenizer.json", "no end token");
  flap_tokenizer_close(endless);
}
END_TEST

START_TEST(dataset_bad_lines_are_named) {
  static const struct {
    const char *text, *where, *what;
  } cases[] = {
      {"{\"text\":\"a\"}\n{\"txt\":\"b\"}\n", "a.jsonl:2:", "no \"text\""},
      {"\n\n{\"text\":7}\n", "a.jsonl:3:", "must be a string"},
      {"{\"text\":\"a\"}\n[\"text\"]", "a.jsonl:2:", "JSON object"},
      {"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n", "a.jsonl:2:", "not a line of JSON"},
      {"{\"text\":\"a\"}\n{\"text\":\"a\n", "a.jsonl:2:", "not a line of JSON"},
      {"{\"text\":\"a\"} {\"text\":\"b\"}\n", "a.jsonl:1:", "not a line of JSON"},
      {"{\"text\":\"\\ud800\"}\n", "a.jsonl:1:", "not a line of JSON"},
      {"{\"text\":\"a\", \"score\": NaN}\n", "a.jsonl:1:", "NaN and Infinity are not JSON"},
      {"{\"text\":\"a\", \"score\": -Infinity}\n", "a.jsonl:1:", "NaN and Infinity are not JSON"},
  };
  paths[0] = scratch_path("a.jsonl");
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    scratch_text("a.jsonl", cases[i].text);
    assert_refused(FLAP_INVALID, cases[i].where, cases[i].what);
  }
}
END_TEST

START_TEST(dataset_malformed_shards_are_refused) {
  const uint32_t ids[] = {1, 2, 3, 4, 5, 6};
  paths[0] = scratch_path("a.bin");
  scratch_write("a.bin", ids, 24);
  assert_refused(FLAP_CORRUPT, "a.bin", "too few");
  write_shard_file("a.bin", 20240520, 1, 7, 2, ids, 6);
  assert_refused(FLAP_CORRUPT, "a.bin", "counts 7 tokens");
  write_shard_file("a.bin", 20240520, 1, 5, 2, ids, 6);
  assert_refused(FLAP_CORRUPT, "a.bin", "12 bytes follow");
  write_shard_file("a.bin", 20240520, 1, -1, 2, ids, 6);
  assert_refused(FLAP_INVALID, "a.bin", "-1 tokens");
  write_shard_file("a.bin", 20240520, 2, 6, 2, ids, 6);
  assert_refused(FLAP_UNSUPPORTED, "a.bin", "version 2");
  write_shard_file("a.bin", 4711, 1, 6, 2, ids, 6);
  assert_refused(FLAP_INVALID, "a.bin", "4711");
}
END_TEST

START_TEST(dataset_ids_past_the_vocabulary_name_the_file) {
  const uint32_t ids[] = {1, 2, 3, 400, 5, 6}, huge[] = {1, 2, 3, 4, 5, 0xffffffff};
  paths[0] = scratch_path("a.bin");
  write_shard_file("a.bin", 20240520, 1, 6, 2, ids, 6);
  config.vocabulary = 400;
  assert_refused(FLAP_INVALID, "a.bin", "token 3 has the id 400");
  write_shard_file("a.bin", 20240801, 7, 6, 4, huge, 6);
  assert_refused(FLAP_INVALID, "a.bin", "4294967295");
  scratch_text("b.txt", "text that ends with the end token");
  paths[0] = scratch_path("b.txt");
  config.vocabulary = 256;
  assert_refused(FLAP_INVALID, "b.txt", "the vocabulary has only 256");
}
END_TEST

START_TEST(dataset_too_little_text_says_the_numbers) {
  scratch_text("a.txt", "abc");
  paths[0] = scratch_path("a.txt");
  assert_refused(FLAP_INVALID, "4 tokens are too few", "one sequence takes 5");
  scratch_text("a.txt", "");
  assert_refused(FLAP_INVALID, "0 tokens are too few", "");
  scratch_text("a.txt", "abcdefghijkl");
  config.val_size = 3;
  assert_refused(FLAP_INVALID, "3 held-out sequences", "18 tokens");
  config.val_size = 1e12;
  assert_refused(FLAP_INVALID, "1000000000000 held-out", "too few");
  static const double wrong[] = {-1, 1.5, NAN, INFINITY};
  for (int i = 0; i < 4; i++) {
    config.val_size = wrong[i];
    assert_refused(FLAP_INVALID, "val_size", "");
  }
}
END_TEST

START_TEST(dataset_scratch_is_unlinked_and_limited) {
  scratch_text("a.txt", "abcdefghijkl");
  paths[0] = scratch_path("a.txt");
  config.scratch_folder = scratch_path("");
  flap_dataset *dataset = open_dataset();
  ck_assert_uint_eq(scratch_count(), 1);
  ck_assert_uint_eq(flap_dataset_scratch_bytes(dataset), 26);
  flap_dataset_close(dataset);
  config.scratch_bytes_max = 26;
  flap_dataset_close(open_dataset());
  config.scratch_bytes_max = 25;
  assert_refused(FLAP_BUDGET, "25 bytes", "a.txt");
  config.scratch_bytes_max = 0;
  flap_dataset *none = NULL;
  scratch_limit(20);
  const flap_status full = flap_dataset_open(&config, &none);
  scratch_unlimit();
  ck_assert_int_eq(full, FLAP_NO_SPACE);
  ck_assert(scratch_error_has("no room for the tokens of the text"));
  config.scratch_folder = scratch_path("missing");
  assert_refused(FLAP_NOT_FOUND, "missing", "");
  config.scratch_folder = NULL;
  assert_refused(FLAP_INVALID, "folder", "");
  config.tokenizer = NULL;
  assert_refused(FLAP_INVALID, "tokenizer", "");
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

START_TEST(dataset_failed_shard_leaves_nothing_behind) {
  scratch_text("a.jsonl", "{\"text\":\"a\"}\n{}\n");
  paths[0] = scratch_path("a.jsonl");
  uint64_t tokens;
  ck_assert_int_eq(flap_dataset_write_shard(&config, scratch_path("o.bin"), &tokens), FLAP_INVALID);
  ck_assert(scratch_error_has("a.jsonl:2"));
  scratch_text("a.jsonl", "\n");
  ck_assert_int_eq(flap_dataset_write_shard(&config, scratch_path("o.bin"), &tokens), FLAP_INVALID);
  ck_assert(scratch_error_has("no text"));
  ck_assert_uint_eq(scratch_count(), 1);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *cases = tcase_create("dataset");
  tcase_set_timeout(cases, 120);
  tcase_add_checked_fixture(cases, setup, teardown);
  tcase_add_test(cases, dataset_text_files_are_documents_in_order_of_their_names);
  tcase_add_test(cases, dataset_a_file_named_twice_is_taken_once);
  tcase_add_test(cases, dataset_jsonl_lines_are_documents);
  tcase_add_test(cases, dataset_begin_tokens_start_each_document);
  tcase_add_test(cases, dataset_long_text_has_the_ids_of_the_whole);
  tcase_add_test(cases, dataset_both_versions_of_shards_are_read);
  tcase_add_test(cases, dataset_written_shard_reads_back_equal);
  tcase_add_test(cases, dataset_shards_are_copied_into_a_shard);
  tcase_add_test(cases, dataset_shard_never_replaces_what_it_is_made_of);
  tcase_add_test(cases, dataset_that_is_stopped_while_it_is_read_leaves_nothing);
  tcase_add_test(cases, dataset_shard_that_cannot_be_written_leaves_nothing);
  tcase_add_test(cases, dataset_without_what_it_needs_is_refused);
  tcase_add_test(cases, dataset_permutation_is_a_bijection_for_every_size);
  tcase_add_test(cases, dataset_permutation_shuffles_and_differs_by_epoch_and_seed);
  tcase_add_test(cases, dataset_heldout_tokens_are_never_seen_in_training);
  tcase_add_test(cases, dataset_every_epoch_has_every_sequence_once);
  tcase_add_test(cases, dataset_windows_cross_files);
  tcase_add_test(cases, dataset_all_held_out_gives_every_target);
  tcase_add_test(cases, dataset_digest_tells_tokens_and_split_apart_but_not_files);
  tcase_add_test(cases, dataset_unigram_entropy_is_that_of_the_heldout_targets);
  tcase_add_test(cases, dataset_names_that_lead_nowhere_are_refused);
  tcase_add_test(cases, dataset_bad_lines_are_named);
  tcase_add_test(cases, dataset_malformed_shards_are_refused);
  tcase_add_test(cases, dataset_ids_past_the_vocabulary_name_the_file);
  tcase_add_test(cases, dataset_too_little_text_says_the_numbers);
  tcase_add_test(cases, dataset_scratch_is_unlinked_and_limited);
  tcase_add_test(cases, dataset_failed_shard_leaves_nothing_behind);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed != 0;
}
