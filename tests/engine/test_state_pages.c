/* States page by page: the same bits whatever pages and slices they were saved in and are resumed with, and every
 * change of a table or a page found. What the pager keeps is made up: see kept_pages.h.
 */
#include "engine/store/state_pages.h"

#include "base/philox.h"
#include "base/system.h"
#include "engine/engine.h"
#include "engine/store/checkpoint.h"
#include "engine/store/weights.h"
#include "io/block/checksum.h"
#include "tests/engine/kept_pages.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHARD_MAX ((uint64_t)1 << 40)
#define NAME_MAX_BYTES 64

static const struct {
  flap_dtype dtype;
  flap_optim optim;
} formats[] = {{FLAP_BF16, FLAP_OPTIM_ADAMW},     {FLAP_F32, FLAP_OPTIM_ADAMW},
               {FLAP_F16, FLAP_OPTIM_ADAMW},      {FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT},
               {FLAP_F32, FLAP_OPTIM_ADAMW_8BIT}, {FLAP_F16, FLAP_OPTIM_ADAMW_8BIT}};
#define FORMATS ((int)(sizeof formats / sizeof *formats))

static void setup(void) {
  scratch_setup();
  kept_pages = (struct kept_pages){.page_bytes = 4096};
  (void)snprintf(kept_pages.folder, sizeof kept_pages.folder, "%s", scratch_path(""));
}

static void teardown(void) {
  kept_pages_next_files();
  scratch_teardown();
}

/* ---- states ------------------------------------------------------------------------------------------------ */

static void open_rig(weights_rig *rig, int format, bool tied, const rig_placement *placement) {
  flap_model_config config;
  rig_model(tied, !tied, &config);
  rig_open_optim(rig, &config, formats[format].dtype, formats[format].optim, FLAP_MODE_TRAIN, placement,
                 scratch_path(""));
  RIG_OK(flap_weights_init(rig->pager, &rig->layout, 5));
}

static void open_filled(weights_rig *rig, int format, bool tied, const rig_placement *placement) {
  open_rig(rig, format, tied, placement);
  for (uint32_t i = 0; i < rig->layout.slice_count; i++)
    RIG_OK(flap_pager_fill(rig->pager, rig->layout.slices[i].states, kept_pages_fill, &rig->layout.slices[i].states));
}

static const char *make(const char *folder) {
  ck_assert_int_eq(mkdir(scratch_path(folder), 0777), 0);
  return scratch_path(folder);
}

static void save_pages(const weights_rig *rig, const char *folder, flap_checksums *checksums) {
  RIG_OK(flap_state_pages_save(rig->pager, &rig->layout, make(folder), (flap_file_piece){0}, checksums));
  kept_pages_next_files();
}

static void same_files_of_states(const char *a, const char *b) {
  static const char *const names[] = {"low",           "master",           "exp_avg",         "exp_avg_sq",
                                      "exp_avg-codes", "exp_avg_sq-codes", "exp_avg-largest", "exp_avg_sq-largest"};
  uint32_t same = 0;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    char left[128], right[128];
    (void)snprintf(left, sizeof left, "%s/optimizer-%s.safetensors", a, names[i]);
    (void)snprintf(right, sizeof right, "%s/optimizer-%s.safetensors", b, names[i]);
    ck_assert_int_eq(scratch_exists(left), scratch_exists(right));
    if (!scratch_exists(left))
      continue;
    rig_same_files(left, right);
    same++;
  }
  ck_assert_uint_ge(same, 2);
}

START_TEST(state_pages_resume_in_any_placement) {
  static const uint32_t sizes[] = {4096, 12288, KEPT_PAGE_MAX};
  const int format = _i % FORMATS;
  const bool tied = _i / FORMATS % 2;
  weights_rig rig;
  kept_pages.page_bytes = sizes[_i % 3];
  kept_pages.all_copied = _i == 1;
  kept_pages.none_copied = _i == 2;
  open_filled(&rig, format, tied, &rig_placements[_i % 2 == 0 ? 2 : 1]);
  RIG_OK(flap_weights_save_all(rig.pager, &rig.layout, make("from"), SHARD_MAX, (flap_file_piece){0}, NULL));
  save_pages(&rig, "pages", NULL);
  RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("pages"), SHARD_MAX, (flap_file_piece){0}, NULL));
  rig_close(&rig);
  ck_assert_int_eq(scratch_exists("pages/optimizer-pages-0.bin"), !kept_pages.none_copied);
  ck_assert_int_eq(scratch_exists("pages/optimizer-pages-1.bin"), !kept_pages.all_copied);
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
  for (uint32_t p = 0; p < RIG_PLACEMENTS; p++) {
    char name[16];
    if (!RIG_MEETS(_i, p))
      continue;
    (void)snprintf(name, sizeof name, "p%u", p);
    open_rig(&rig, format, tied, &rig_placements[p]);
    RIG_OK(flap_weights_resume(rig.pager, &rig.layout, scratch_path("pages"), NULL));
    RIG_OK(flap_weights_save_all(rig.pager, &rig.layout, make(name), SHARD_MAX, (flap_file_piece){0}, NULL));
    rig_close(&rig);
    same_files_of_states("from", name);
  }
}
END_TEST

/* `count` values straight from the regions. */
static void expect(const weights_rig *rig, uint32_t part, flap_state_section section, uint64_t first, uint64_t count,
                   unsigned char *to) {
  const flap_layout *layout = &rig->layout;
  const flap_state_format *format = &layout->state_formats[layout->parts[part].kind];
  const uint64_t bytes = format->sections[section].value_bytes, shared = format->sections[section].value_elements;
  for (uint32_t s = 0; s < layout->slice_count; s++) {
    const flap_layout_slice *slice = &layout->slices[s];
    kept_bytes all = {0};
    if (slice->part != part)
      continue;
    RIG_OK(flap_pager_drain(rig->pager, slice->states, kept_pages_append, &all));
    const unsigned char *values = all.bytes + flap_layout_state_offset(format, section, slice->elements);
    const uint64_t begin = slice->first_element / shared, end = begin + slice->elements / shared;
    for (uint64_t i = begin > first ? begin : first; i < end && i < first + count; i++)
      memcpy(to + (i - first) * bytes, values + (i - begin) * bytes, bytes);
    free(all.bytes);
  }
}

START_TEST(state_pages_are_read_in_any_order) {
  weights_rig rig;
  flap_state_pages *pages = NULL;
  kept_pages.page_bytes = 8192;
  open_filled(&rig, _i, false, &rig_placements[1]);
  save_pages(&rig, "pages", NULL);
  RIG_OK(flap_state_pages_open(scratch_path("pages"), &pages));
  RIG_OK(flap_state_pages_check(pages, &rig.config, formats[_i].dtype, formats[_i].optim));
  ck_assert_uint_eq(flap_state_pages_parts(pages), rig.layout.part_count);
  const flap_philox stream = flap_philox_stream(11, "reads");
  uint32_t reads = 0;
  for (uint64_t i = 0; i < 240; i++) {
    const uint32_t part = (uint32_t)flap_philox_below(&stream, 4 * i, rig.layout.part_count);
    const flap_state_section section =
        (flap_state_section)flap_philox_below(&stream, 4 * i + 1, FLAP_STATE_SECTION_COUNT);
    const flap_state_format *format = &rig.layout.state_formats[rig.layout.parts[part].kind];
    const uint64_t bytes = format->sections[section].value_bytes;
    if (bytes == 0)
      continue;
    const uint64_t values = rig.layout.parts[part].elements / format->sections[section].value_elements;
    const uint64_t first = flap_philox_below(&stream, 4 * i + 2, values);
    const uint64_t count = flap_philox_below(&stream, 4 * i + 3, i % 3 == 0 ? values - first + 1 : 1);
    unsigned char *wanted = calloc(count + 1, bytes), *got = calloc(count + 1, bytes);
    expect(&rig, part, section, first, count, wanted);
    RIG_OK(flap_state_pages_read(pages, part, section, first, count, got));
    ck_assert_msg(memcmp(wanted, got, (count + 1) * bytes) == 0, "read %llu differs", (unsigned long long)i);
    reads += count > 0;
    free(wanted);
    free(got);
  }
  ck_assert_uint_gt(reads, 20);
  flap_state_pages_close(pages);
  rig_close(&rig);
}
END_TEST

START_TEST(state_pages_have_the_bytes_that_are_said) {
  weights_rig rig;
  flap_checksums checksums = {0};
  kept_pages.page_bytes = 8192;
  open_filled(&rig, 0, false, &rig_placements[1]);
  save_pages(&rig, "pages", &checksums);
  uint64_t bytes = 0;
  ck_assert_uint_eq(checksums.count, 2 + KEPT_FILES);
  for (size_t i = 0; i < checksums.count; i++) {
    const flap_checksums_entry *entry = &checksums.entries[i];
    ck_assert_int_eq(entry->pages, strcmp(entry->name, FLAP_STATE_PAGES_TABLE) != 0);
    bytes += entry->bytes;
  }
  RIG_OK(flap_checksums_check_sizes(&checksums, scratch_path("pages")));
  const flap_checksums_entry *table = flap_checksums_find(&checksums, FLAP_STATE_PAGES_TABLE);
  RIG_OK(flap_checksums_check_file(table, scratch_path("pages")));
  ck_assert_uint_eq(table->bytes % 8, 0);
  /* The files of the test begin with something else: 1 + 2 + 3 pages of it. */
  ck_assert_uint_le(bytes, flap_state_pages_bytes(&rig.layout, kept_pages.page_bytes) + 6 * FLAP_BLOCK_ALIGN);
  flap_checksums_close(&checksums);
  kept_pages.all_copied = true;
  save_pages(&rig, "copied", &checksums);
  bytes = 0;
  for (size_t i = 0; i < checksums.count; i++)
    bytes += checksums.entries[i].bytes;
  ck_assert_uint_eq(bytes, flap_state_pages_bytes(&rig.layout, kept_pages.page_bytes));
  flap_checksums_close(&checksums);
  rig_close(&rig);
}
END_TEST

START_TEST(state_pages_of_another_model_are_refused) {
  weights_rig rig;
  flap_state_pages *pages = NULL;
  flap_model_config other;
  open_filled(&rig, 3, false, &rig_placements[0]);
  save_pages(&rig, "pages", NULL);
  ck_assert_int_eq(flap_state_pages_open(scratch_path(""), &pages), FLAP_NOT_FOUND);
  ck_assert_int_eq(flap_state_pages_verify(scratch_path(""), false), FLAP_NOT_FOUND);
  RIG_OK(flap_state_pages_open(scratch_path("pages"), &pages));
  ck_assert_int_eq(flap_state_pages_dtype(pages), FLAP_BF16);
  ck_assert_int_eq(flap_state_pages_optim(pages), FLAP_OPTIM_ADAMW_8BIT);
  RIG_REFUSED(flap_state_pages_check(pages, &rig.config, FLAP_F16, FLAP_OPTIM_ADAMW_8BIT), FLAP_INVALID,
              FLAP_STATE_PAGES_TABLE, "bfloat16");
  RIG_REFUSED(flap_state_pages_check(pages, &rig.config, FLAP_BF16, FLAP_OPTIM_ADAMW), FLAP_INVALID,
              FLAP_STATE_PAGES_TABLE, "adamw_8bit");
  other = rig.config;
  other.num_hidden_layers = 3;
  RIG_REFUSED(flap_state_pages_check(pages, &other, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT), FLAP_INVALID,
              FLAP_STATE_PAGES_TABLE, "4 parts");
  other = rig.config;
  other.intermediate_size *= 3;
  RIG_REFUSED(flap_state_pages_check(pages, &other, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT), FLAP_INVALID,
              FLAP_STATE_PAGES_TABLE, "layer 0");
  flap_state_pages_close(pages);
  rig_close(&rig);
}
END_TEST

/* ---- damage ------------------------------------------------------------------------------------------------ */

#define TABLE "pages/" FLAP_STATE_PAGES_TABLE
#define HEADER_BYTES 80
#define SLICE_BYTES 24
#define ROW_BYTES 32

/* A folder `pages` of few pages, and its table. */
static char *save_small(int format, size_t *bytes_out) {
  weights_rig rig;
  kept_pages.page_bytes = 16384;
  open_filled(&rig, format, false, &rig_placements[2]);
  save_pages(&rig, "pages", NULL);
  rig_close(&rig);
  return scratch_read(TABLE, bytes_out);
}

static void write_table(char *table, size_t bytes, bool repaired) {
  flap_checksum *sum = NULL;
  if (repaired) {
    RIG_OK(flap_checksum_open(&sum));
    flap_checksum_add(sum, table, bytes - 8);
    const uint64_t value = flap_checksum_value(sum);
    memcpy(table + bytes - 8, &value, sizeof value);
    flap_checksum_close(sum);
  }
  scratch_write(TABLE, table, bytes);
}

static void must_be_refused(const char *what, size_t place) {
  flap_error_clear();
  const flap_status status = flap_state_pages_verify(scratch_path("pages"), false);
  if (status != FLAP_CORRUPT && status != FLAP_INVALID && status != FLAP_UNSUPPORTED)
    ck_abort_msg("%s %zu: status %d: %s", what, place, (int)status, flap_error_message());
  if (strstr(flap_error_message(), "optimizer-pages") == NULL)
    ck_abort_msg("%s %zu: the message names no file: %s", what, place, flap_error_message());
}

START_TEST(state_pages_every_changed_byte_of_a_table_is_found) {
  size_t bytes;
  char *table = save_small(3 * _i, &bytes);
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
  for (size_t i = 0; i < bytes; i++) {
    table[i] = (char)(table[i] ^ 1 << i % 8);
    write_table(table, bytes, false);
    flap_state_pages *pages = NULL;
    if (flap_state_pages_open(scratch_path("pages"), &pages) != FLAP_CORRUPT)
      ck_abort_msg("byte %zu may be changed", i);
    table[i] = (char)(table[i] ^ 1 << i % 8);
  }
  for (size_t left = 0; left < bytes; left += 61) {
    write_table(table, left, false);
    must_be_refused("of so many bytes", left);
  }
  write_table(table, bytes, false);
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
  free(table);
}
END_TEST

/* Whoever wrote the table wrote a wrong one. */
START_TEST(state_pages_every_wrong_number_of_a_table_is_found) {
  size_t bytes;
  char *table = save_small(3 * _i, &bytes);
  for (size_t i = 0; i < bytes - 8; i++)
    for (size_t bit = i < HEADER_BYTES ? 0 : i * 5 % 8; bit < 8; bit += i < HEADER_BYTES ? 1 : 8) {
      table[i] = (char)(table[i] ^ 1 << bit);
      write_table(table, bytes, true);
      must_be_refused("byte", i);
      table[i] = (char)(table[i] ^ 1 << bit);
    }
  write_table(table, bytes, true);
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
  free(table);
}
END_TEST

static void put(char *table, size_t at, uint64_t value, size_t bytes) {
  memcpy(table + at, &value, bytes);
}

START_TEST(state_pages_hostile_numbers_are_refused) {
  size_t bytes;
  char *table = save_small(0, &bytes), *hostile = malloc(bytes);
  uint32_t slices;
  memcpy(&slices, table + 28, sizeof slices);
  const size_t slice = HEADER_BYTES, rows = slice + slices * SLICE_BYTES;
  size_t copied = rows;
  while (table[copied + 24] != 0)
    copied += ROW_BYTES;
  const struct {
    size_t at, bytes;
    uint64_t value;
    flap_status status;
  } cases[] = {
      {0, 8, 0, FLAP_CORRUPT},     /* magic */
      {8, 4, 0, FLAP_UNSUPPORTED}, /* version */
      {8, 4, 3, FLAP_UNSUPPORTED}, /* */
      {12, 4, 3, FLAP_CORRUPT},    /* dtype */
      {16, 4, 2, FLAP_CORRUPT},    /* optim */
      {20, 4, 0, FLAP_CORRUPT},    /* page_bytes */
      {20, 4, 4095, FLAP_CORRUPT}, /* */
      {20, 4, 4096, FLAP_CORRUPT}, /* more pages than there are */
      {20, 4, (4u << 20) + 4096, FLAP_CORRUPT},
      {20, 4, 0xfffff000u, FLAP_CORRUPT},
      {24, 4, 0, FLAP_CORRUPT},                 /* part_count */
      {24, 4, UINT32_MAX, FLAP_CORRUPT},        /* */
      {28, 4, 0, FLAP_CORRUPT},                 /* slice_count */
      {28, 4, UINT32_MAX, FLAP_CORRUPT},        /* */
      {32, 8, 0, FLAP_CORRUPT},                 /* page_count */
      {32, 8, UINT64_MAX, FLAP_CORRUPT},        /* */
      {32, 8, (uint64_t)1 << 59, FLAP_CORRUPT}, /* 32 times that is 0 */
      {40, 8, 0, FLAP_CORRUPT},                 /* file_bytes */
      {48, 8, UINT64_MAX, FLAP_CORRUPT},        /* */
      {72, 8, 4096, FLAP_CORRUPT},              /* of a file that is not there */
      {slice, 4, UINT32_MAX, FLAP_CORRUPT},     /* part */
      {slice, 4, 1, FLAP_CORRUPT},
      {slice + 4, 4, UINT32_MAX, FLAP_CORRUPT}, /* region */
      {slice + 8, 8, 4096, FLAP_CORRUPT},       /* first_element */
      {slice + 8, 8, UINT64_MAX, FLAP_CORRUPT}, /* */
      {slice + 16, 8, 0, FLAP_CORRUPT},         /* elements */
      {slice + 16, 8, 1, FLAP_CORRUPT},         /* */
      {slice + 16, 8, UINT64_MAX - 4095, FLAP_CORRUPT},
      {slice + 16, 8, (uint64_t)1 << 48, FLAP_CORRUPT},
      {slice + 16, 8, (uint64_t)1 << 36, FLAP_CORRUPT},
      {rows + 8, 8, UINT64_MAX - 4095, FLAP_CORRUPT}, /* place */
      {rows + 8, 8, 8, FLAP_CORRUPT},
      {rows + 8, 8, (uint64_t)1 << 40, FLAP_CORRUPT},
      {rows + 16, 4, 0, FLAP_CORRUPT}, /* stored_bytes */
      {rows + 16, 4, 1, FLAP_CORRUPT},
      {rows + 16, 4, 16384 + 4096, FLAP_CORRUPT},
      {rows + 16, 4, 0xfffff000u, FLAP_CORRUPT},
      {rows + 24, 4, FLAP_STATE_PAGES_FILES, FLAP_CORRUPT}, /* file */
      {rows + 24, 4, UINT32_MAX, FLAP_CORRUPT},
      {rows + 24, 4, 4, FLAP_CORRUPT},      /* none */
      {rows + 28, 4, 1, FLAP_CORRUPT},      /* zero */
      {copied + 16, 4, 4096, FLAP_CORRUPT}, /* encoded, which a copy never is */
      {copied + 20, 4, 1, FLAP_CORRUPT},    /* epoch */
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    memcpy(hostile, table, bytes);
    put(hostile, cases[i].at, cases[i].value, cases[i].bytes);
    write_table(hostile, bytes, true);
    flap_error_clear();
    flap_state_pages *pages = NULL;
    const bool opens = cases[i].at == slice + 4; /* then its pages do not agree */
    const flap_status status = opens ? flap_state_pages_verify(scratch_path("pages"), false)
                                     : flap_state_pages_open(scratch_path("pages"), &pages);
    ck_assert_msg(status == cases[i].status, "case %zu: status %d: %s", i, (int)status, flap_error_message());
  }
  memcpy(hostile, table, bytes);
  put(hostile, 8, 1, 4); /* the version before, which is read too */
  write_table(hostile, bytes, true);
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
  free(hostile);
  free(table);
}
END_TEST

static uint64_t number_at(const char *table, size_t at, size_t bytes) {
  uint64_t value = 0;
  memcpy(&value, table + at, bytes);
  return value;
}

START_TEST(state_pages_changed_stale_and_misplaced_pages_are_found) {
  size_t bytes;
  char *table = save_small(0, &bytes);
  const size_t rows = HEADER_BYTES + (size_t)number_at(table, 28, 4) * SLICE_BYTES;
  const size_t count = (size_t)number_at(table, 32, 8);
  ck_assert_uint_gt(count, 20);
  for (size_t i = 0; i < count; i++) {
    const size_t row = rows + i * ROW_BYTES;
    const uint64_t place = number_at(table, row + 8, 8), stored = number_at(table, row + 16, 4);
    char name[NAME_MAX_BYTES], at[NAME_MAX_BYTES];
    (void)snprintf(name, sizeof name, "pages/optimizer-pages-%u.bin", (unsigned)number_at(table, row + 24, 4));
    (void)snprintf(at, sizeof at, "%llu bytes at byte %llu", (unsigned long long)stored, (unsigned long long)place);
    FILE *file = fopen(scratch_path(name), "r+b");
    ck_assert_int_eq(fseek(file, (long)(place + (i * 977) % stored), SEEK_SET), 0);
    const int was = fgetc(file);
    ck_assert_int_eq(fseek(file, -1, SEEK_CUR), 0);
    (void)fputc(was ^ 1 << i % 8, file);
    (void)fflush(file);
    RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, name + 6, at);
    ck_assert_int_eq(fseek(file, -1, SEEK_CUR), 0);
    (void)fputc(was, file);
    (void)fclose(file);
  }
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
  /* Another writing of the page, and another page of the same length. */
  uint32_t swapped = 0;
  for (size_t i = 0; i + 1 < count; i++) {
    char *row = table + rows + i * ROW_BYTES, *next = row + ROW_BYTES, keep[ROW_BYTES];
    memcpy(keep, row, sizeof keep);
    if (number_at(row, 24, 4) != 0) {
      put(row, 20, number_at(row, 20, 4) - 1, 4);
      write_table(table, bytes, true);
      RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, "states of",
                  "not what was saved");
      memcpy(row, keep, sizeof keep);
    }
    if (memcmp(row + 16, next + 16, 4) != 0)
      continue;
    memcpy(row, next, ROW_BYTES); /* with its checksum: it is of another number, or another region */
    write_table(table, bytes, true);
    must_be_refused("the neighbour's row in place of", i);
    memcpy(row, keep, sizeof keep);
    swapped++;
  }
  ck_assert_uint_gt(swapped, 3);
  free(table);
}
END_TEST

/* Bytes that have their checksum, and were never encoded. */
START_TEST(state_pages_that_cannot_be_decoded_are_told) {
  static unsigned char noise[16384];
  size_t bytes;
  char *table = save_small(0, &bytes), name[NAME_MAX_BYTES];
  const size_t rows = HEADER_BYTES + (size_t)number_at(table, 28, 4) * SLICE_BYTES;
  uint32_t page = 0; /* of the first slice */
  while (table[rows + page * ROW_BYTES + 24] == 0 || number_at(table, rows + page * ROW_BYTES + 16, 4) == sizeof noise)
    page++;
  ck_assert_uint_lt(page, 7); /* its last is shorter */
  const size_t row = rows + page * ROW_BYTES, stored = (size_t)number_at(table, row + 16, 4);
  memset(noise, 0xfd, sizeof noise);
  (void)snprintf(name, sizeof name, "pages/optimizer-pages-%d.bin", table[row + 24]);
  FILE *file = fopen(scratch_path(name), "r+b");
  ck_assert_int_eq(fseek(file, (long)number_at(table, row + 8, 8), SEEK_SET), 0);
  ck_assert_uint_eq(fwrite(noise, 1, stored, file), stored);
  (void)fclose(file);
  RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, name + 6, "not what was saved");
  const uint32_t region = (uint32_t)number_at(table, HEADER_BYTES + 4, 4);
  put(table, row, flap_block_checksum(noise, stored, region, page, number_at(table, row + 20, 4)), 8);
  write_table(table, bytes, true);
  RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, name + 6, "no page can be");
  free(table);
}
END_TEST

START_TEST(state_pages_short_and_missing_files_are_named) {
  size_t bytes;
  free(save_small(0, &bytes));
  for (unsigned i = 0; i <= KEPT_FILES; i++) {
    char name[NAME_MAX_BYTES], aside[NAME_MAX_BYTES];
    size_t whole;
    (void)snprintf(name, sizeof name, "pages/optimizer-pages-%u.bin", i);
    (void)snprintf(aside, sizeof aside, "aside-%u", i);
    char *data = scratch_read(name, &whole);
    ck_assert_int_eq(truncate(scratch_path(name), (off_t)whole - 1), 0);
    RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, name + 6, "was saved with");
    scratch_write(name, data, whole);
    ck_assert_int_eq(rename(scratch_path(name), scratch_path(aside)), 0);
    RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, name + 6, "missing");
    ck_assert_int_eq(mkdir(scratch_path(name), 0777), 0);
    RIG_REFUSED(flap_state_pages_verify(scratch_path("pages"), false), FLAP_CORRUPT, name + 6, "was saved with");
    ck_assert_int_eq(rmdir(scratch_path(name)), 0);
    ck_assert_int_eq(rename(scratch_path(aside), scratch_path(name)), 0);
    free(data);
  }
  RIG_OK(flap_state_pages_verify(scratch_path("pages"), false));
}
END_TEST

/* A bus that turns a bit over: in so many readings of the page at this length and place. */
static uint32_t wrong_readings;
static uint64_t wrong_at;

static ssize_t read_wrong(int fd, void *data, size_t bytes, off_t offset) {
  const ssize_t got = flap_system_default()->pread(fd, data, bytes, offset);
  if (got > 0 && (uint64_t)offset == wrong_at && wrong_readings > 0) {
    wrong_readings--;
    ((char *)data)[7] ^= 4;
  }
  return got;
}

#define FIRST 2048 /* of the second moments, whose page begins with it: 3 * 4096 * (2 + 4) + 2048 * 4 = 5 * 16384 */

START_TEST(state_pages_read_wrong_once_are_read_again) {
  size_t bytes;
  char *table = save_small(0, &bytes);
  flap_system wrong = *flap_system_default();
  wrong.pread = read_wrong;
  const size_t last = bytes - 8 - ROW_BYTES;
  wrong_at = number_at(table, last + 8, 8);
  ck_assert_uint_gt(wrong_at, 0);
  (void)flap_system_replace(&wrong);
  for (uint32_t times = 1; times <= 2; times++) {
    flap_state_pages *pages = NULL;
    char value[4], first[4], again[4];
    RIG_OK(flap_state_pages_open(scratch_path("pages"), &pages));
    const uint32_t part = flap_state_pages_parts(pages) - 1;
    RIG_OK(flap_state_pages_read(pages, part, FLAP_STATE_MOMENT2, FIRST, 1, first));
    wrong_readings = times;
    /* The last value of the last part's last section is on the last page. */
    const uint64_t elements = number_at(table, HEADER_BYTES + (number_at(table, 28, 4) - 1) * SLICE_BYTES + 8, 8) +
                              number_at(table, HEADER_BYTES + (number_at(table, 28, 4) - 1) * SLICE_BYTES + 16, 8);
    const flap_status status = flap_state_pages_read(pages, part, FLAP_STATE_MOMENT2, elements - 1, 1, value);
    ck_assert_uint_eq(wrong_readings, 0);
    ck_assert_int_eq(status, times == 1 ? FLAP_OK : FLAP_CORRUPT);
    /* What was not right is not taken for what was read, nor for what was there before. */
    RIG_OK(flap_state_pages_read(pages, part, FLAP_STATE_MOMENT2, FIRST, 1, again));
    ck_assert_mem_eq(first, again, sizeof first);
    if (times == 2)
      RIG_OK(flap_state_pages_read(pages, part, FLAP_STATE_MOMENT2, elements - 1, 1, value));
    flap_state_pages_close(pages);
  }
  (void)flap_system_replace(NULL);
  free(table);
}
END_TEST

/* ---- saving that fails ------------------------------------------------------------------------------------- */

static int no_room(int fd, off_t bytes) {
  (void)fd, (void)bytes;
  errno = ENOSPC;
  return -1;
}

static int no_sync(int fd) {
  (void)fd;
  errno = EIO;
  return -1;
}

static flap_status save_again(const weights_rig *rig, const char *folder) {
  const flap_status status = flap_state_pages_save(rig->pager, &rig->layout, make(folder), (flap_file_piece){0}, NULL);
  kept_pages_next_files();
  return status;
}

START_TEST(state_pages_failed_saves_are_told) {
  weights_rig rig;
  flap_system system = *flap_system_default();
  open_filled(&rig, 0, false, &rig_placements[1]);
  kept_pages.failing_keep = 7;
  ck_assert_int_eq(save_again(&rig, "keep"), FLAP_IO);
  ck_assert(!scratch_exists("keep/optimizer-pages-0.bin") && !scratch_exists("keep/" FLAP_STATE_PAGES_TABLE));
  kept_pages.failing_keep = 0;
  kept_pages.link_fails = true;
  ck_assert_int_eq(save_again(&rig, "link"), FLAP_IO);
  ck_assert(!scratch_exists("link/" FLAP_STATE_PAGES_TABLE));
  kept_pages.link_fails = false;
  system.allocate = no_room;
  (void)flap_system_replace(&system);
  ck_assert_int_eq(save_again(&rig, "room"), FLAP_NO_SPACE);
  ck_assert(!scratch_exists("room/optimizer-pages-0.bin"));
  kept_pages.none_copied = true; /* then it is the table that has no room */
  ck_assert_int_eq(save_again(&rig, "table"), FLAP_NO_SPACE);
  ck_assert(!scratch_exists("table/" FLAP_STATE_PAGES_TABLE));
  kept_pages.none_copied = false;
  system.allocate = flap_system_default()->allocate;
  system.sync = no_sync;
  ck_assert_int_eq(save_again(&rig, "end"), FLAP_IO);
  ck_assert(!scratch_exists("end/optimizer-pages-0.bin") && !scratch_exists("end/" FLAP_STATE_PAGES_TABLE));
  (void)flap_system_replace(NULL);
  ck_assert_int_eq(save_again(&rig, "good"), FLAP_OK);
  RIG_OK(flap_state_pages_verify(scratch_path("good"), false));
  rig_close(&rig);
}
END_TEST

/* ---- checkpoints ------------------------------------------------------------------------------------------- */

/* `filled`: the states are no numbers that weights could have. */
static void save_checkpoint(int format, const char *output_dir, uint64_t step, bool keeps, bool filled) {
  weights_rig rig;
  flap_tokenizer *tokenizer = NULL;
  char folder[FLAP_PATH_MAX];
  kept_pages.can_keep = keeps;
  kept_pages.page_bytes = 8192;
  (filled ? open_filled : open_rig)(&rig, format, false, &rig_placements[2]);
  RIG_OK(flap_tokenizer_open_bytes(&tokenizer));
  const flap_artifacts artifacts = {.model = &rig.config, .tokenizer = tokenizer};
  const flap_trainer_state state = {.step = step, .optim = formats[format].optim};
  RIG_OK(flap_checkpoint_save(scratch_path(output_dir), rig.pager, &rig.layout, &artifacts, &state, false, 0, folder));
  kept_pages_next_files();
  flap_tokenizer_close(tokenizer);
  rig_close(&rig);
}

static flap_checkpoint_report reported;

static void report(void *context, const flap_checkpoint_report *about) {
  (void)context;
  reported = *about;
}

static void inspect(const char *folder, bool verify, flap_checkpoint_state wanted, const char *problem) {
  uint32_t count = 0;
  RIG_OK(flap_engine_inspect(scratch_path(folder), verify, report, NULL, &count));
  ck_assert_uint_eq(count, 1);
  ck_assert_msg(reported.state == wanted && strstr(reported.problem, problem) != NULL, "state %d: %s",
                (int)reported.state, reported.problem);
}

static void flip(const char *name, long at) {
  FILE *file = fopen(scratch_path(name), "r+b");
  ck_assert_ptr_nonnull(file);
  ck_assert_int_eq(fseek(file, at, at < 0 ? SEEK_END : SEEK_SET), 0);
  const int was = fgetc(file);
  ck_assert_int_eq(fseek(file, -1, SEEK_CUR), 0);
  (void)fputc(was ^ 1, file);
  (void)fclose(file);
}

START_TEST(state_pages_of_a_checkpoint_are_checked_where_it_is_looked_at) {
  static const char *const place = "out/checkpoint-2";
  char folder[FLAP_PATH_MAX], older[64];
  flap_trainer_state state;
  weights_rig rig;
  save_checkpoint(0, "out", 2, true, true);
  ck_assert(scratch_exists("out/checkpoint-2/" FLAP_STATE_PAGES_TABLE));
  ck_assert(!scratch_exists("out/checkpoint-2/optimizer-exp_avg.safetensors"));
  open_rig(&rig, 0, false, &rig_placements[4]);
  RIG_OK(flap_checkpoint_find(scratch_path("out"), "true", folder, &state));
  ck_assert_uint_eq(state.step, 2);
  RIG_OK(flap_checkpoint_load(rig.pager, &rig.layout, folder));
  inspect(place, true, FLAP_CHECKPOINT_WHOLE, "");
  (void)snprintf(older, sizeof older, "%s/optimizer-pages-1.bin", place);
  flip(older, FLAP_BLOCK_ALIGN + 100);
  RIG_OK(flap_checkpoint_find(scratch_path("out"), "true", folder, &state)); /* which reads no pages */
  RIG_REFUSED(flap_checkpoint_load(rig.pager, &rig.layout, folder), FLAP_CORRUPT, "optimizer-pages-1.bin",
              "nothing was trained on it");
  inspect(place, false, FLAP_CHECKPOINT_UNREAD, "");
  inspect(place, true, FLAP_CHECKPOINT_BROKEN, "optimizer-pages-1.bin");
  flip(older, FLAP_BLOCK_ALIGN + 100);
  inspect(place, true, FLAP_CHECKPOINT_WHOLE, "");
  flip("out/checkpoint-2/" FLAP_STATE_PAGES_TABLE, 200);
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), FLAP_CORRUPT, FLAP_STATE_PAGES_TABLE,
              "nothing was trained on it");
  flip("out/checkpoint-2/" FLAP_STATE_PAGES_TABLE, 200);
  ck_assert_int_eq(unlink(scratch_path(older)), 0);
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), FLAP_CORRUPT, "optimizer-pages-1.bin",
              "missing");
  rig_close(&rig);
}
END_TEST

/* The same masters, wherever they are. */
START_TEST(state_pages_of_a_checkpoint_are_exported) {
  static const int kinds[] = {0, 1, 2, 3};
  const int format = kinds[_i];
  save_checkpoint(format, "copies", 1, false, false);
  save_checkpoint(format, "pages", 1, true, false);
  ck_assert(scratch_exists("pages/checkpoint-1/" FLAP_STATE_PAGES_TABLE));
  ck_assert(!scratch_exists("copies/checkpoint-1/" FLAP_STATE_PAGES_TABLE));
  const flap_dtype to = formats[format].dtype == FLAP_F32 ? FLAP_BF16 : FLAP_F32;
  RIG_OK(flap_engine_export(scratch_path("copies/checkpoint-1"), scratch_path("a"), to, SHARD_MAX, NULL));
  RIG_OK(flap_engine_export(scratch_path("pages/checkpoint-1"), scratch_path("b"), to, SHARD_MAX, NULL));
  rig_same_files("a/model.safetensors", "b/model.safetensors");
  if (formats[format].dtype == FLAP_F32)
    return;
  /* They are not the weights alone, widened. */
  ck_assert_int_eq(unlink(scratch_path("pages/checkpoint-1/" FLAP_STATE_PAGES_TABLE)), 0);
  RIG_OK(flap_engine_export(scratch_path("pages/checkpoint-1"), scratch_path("c"), to, SHARD_MAX, NULL));
  size_t bytes, rounded_bytes;
  char *exact = scratch_read("b/model.safetensors", &bytes);
  char *rounded = scratch_read("c/model.safetensors", &rounded_bytes);
  ck_assert(bytes == rounded_bytes && memcmp(exact, rounded, bytes) != 0);
  free(exact);
  free(rounded);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("state_pages");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, state_pages_resume_in_any_placement, 0, 2 * FORMATS);
  tcase_add_loop_test(tests, state_pages_are_read_in_any_order, 0, FORMATS);
  tcase_add_test(tests, state_pages_have_the_bytes_that_are_said);
  tcase_add_test(tests, state_pages_of_another_model_are_refused);
  tcase_add_loop_test(tests, state_pages_every_changed_byte_of_a_table_is_found, 0, 2);
  tcase_add_loop_test(tests, state_pages_every_wrong_number_of_a_table_is_found, 0, 2);
  tcase_add_test(tests, state_pages_hostile_numbers_are_refused);
  tcase_add_test(tests, state_pages_changed_stale_and_misplaced_pages_are_found);
  tcase_add_test(tests, state_pages_that_cannot_be_decoded_are_told);
  tcase_add_test(tests, state_pages_short_and_missing_files_are_named);
  tcase_add_test(tests, state_pages_read_wrong_once_are_read_again);
  tcase_add_test(tests, state_pages_failed_saves_are_told);
  tcase_add_test(tests, state_pages_of_a_checkpoint_are_checked_where_it_is_looked_at);
  tcase_add_loop_test(tests, state_pages_of_a_checkpoint_are_exported, 0, 4);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
