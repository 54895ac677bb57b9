/* The power fails at any moment of a whole life of a tiny model, and the disk keeps of what was not yet synced whatever
 * it likes. The code that recovers and loads must then find the last checkpoint that was said to be saved, or a newer
 * one, whole and to the bit; of the exported models each whole or not at all; and of metrics.jsonl every line up to the
 * checkpoint. A share of the cuts is trained on to the end, and compared to the bit. Half of the cuts are of a life
 * whose data are in RAM, the others of one whose states are on disk, where checkpoints share its extents.
 *
 * FLAP_POWER_CUTS says how many cuts (3,000); FLAP_POWER_CUT=<ram or disk>:<entry>:<sector>:<share>:<rubbish>:<seed>
 * looks at one. The second half are canaries: with an fsync left out, or made after the rename, or with extents written
 * over that a checkpoint names, these very tests must fail.
 */
#include "base/philox.h"
#include "engine/store/checkpoint.h"
#include "io/block/checksum.h"
#include "io/formats/durable.h"
#include "io/formats/metrics.h"
#include "tests/reliability/cut_disk.h"
#include "tests/reliability/fault_case.h"
#include "tests/reliability/tiny_states.h"

#include <check.h>
#include <dirent.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CUTS 3000u
#define CANARY_CUTS 2000u
#define RESUME_EVERY 150u /* distinct states */
#define SEEN_BITS 20u
#define MARK_TRAINED 100u  /* in the record: the trained model was said to be there */
#define MARK_EXPORTED 101u /* and the exported one */
#define PATH_BYTES 1024u
#define FILE_BYTES_MAX ((size_t)1 << 20)

static tiny_run *run; /* the life that is recorded */
static char scratch[TINY_PATH_MAX];
static uint64_t good_checkpoint[TINY_STEPS + 1], good_exported, good_model, good_shard;
static uint64_t *seen;
static char problem[2048];

/* ---- looking ------------------------------------------------------------------------------------------------- */

static const char *join(const char *folder, const char *name) {
  static char paths[8][PATH_BYTES];
  static unsigned next;
  char *path = paths[next++ % 8];
  const size_t length = strlen(folder), name_length = strlen(name);
  if (length + name_length + 2 > PATH_BYTES)
    abort();
  memmove(path, folder, length);
  path[length] = '/';
  memcpy(path + length + 1, name, name_length + 1);
  return path;
}

static bool is_there(const char *path) {
  struct stat about;
  return lstat(path, &about) == 0;
}

static uint64_t digest_file(const char *path, uint64_t digest) {
  static char data[FILE_BYTES_MAX];
  FILE *file = fopen(path, "rb");
  if (file == NULL)
    return 0;
  const size_t bytes = fread(data, 1, sizeof data, file);
  (void)fclose(file);
  return flap_block_checksum(data, bytes, (uint32_t)bytes, 0, digest);
}

/* Extents have places that nobody wrote, where anything may be; of the others tiny_states_are_pages knows the sums. */
static bool is_extent(const char *name) {
  unsigned number;
  return sscanf(name, "optimizer-pages-%u.bin", &number) == 1 && number > 0;
}

/* Of the files in a folder, whatever their order. */
static uint64_t digest_folder(const char *given) {
  char path[PATH_BYTES]; /* join has few buffers, and a folder may have more files */
  uint64_t sum = 0;
  (void)snprintf(path, sizeof path, "%s", given);
  DIR *folder = opendir(path);
  for (const struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;)
    if (entry->d_name[0] != '.' && !is_extent(entry->d_name))
      sum += digest_file(join(path, entry->d_name), flap_block_checksum(entry->d_name, strlen(entry->d_name), 0, 0, 7));
  if (folder != NULL)
    (void)closedir(folder);
  return sum;
}

static uint64_t digest_model(const char *out) {
  static const char *const names[] = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"};
  uint64_t digest = 1;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    digest = digest_file(join(out, names[i]), digest);
  return digest;
}

/* ---- the life that is recorded ------------------------------------------------------------------------------- */

static void note_saved(uint64_t step) {
  char name[64];
  (void)snprintf(name, sizeof name, "out/checkpoint-%llu", (unsigned long long)step);
  good_checkpoint[step] = digest_folder(join(run->folder, name));
  cut_disk_mark(step);
}

static int remove_entry(const char *path, const struct stat *about, int type, struct FTW *where) {
  (void)about, (void)type;
  return where->level == 0 ? 0 : remove(path);
}

static void empty_scratch(void) {
  ck_assert_int_eq(nftw(scratch, remove_entry, 16, FTW_DEPTH | FTW_PHYS), 0);
}

static void start_record(tiny_kind kind, cut_mistake mistake) {
  run = case_open(kind);
  run->saved = note_saved;
  tiny_run_clear(run);
  (void)snprintf(scratch, sizeof scratch, "%.400s-cut", run->folder);
  ck_assert_int_eq(mkdir(scratch, 0700), 0);
  seen = calloc((size_t)1 << SEEN_BITS, sizeof *seen);
  ck_assert_ptr_nonnull(seen);
  cut_disk_start(run->folder, mistake);
}

static uint32_t end_record(void) {
  cut_disk_mark(MARK_EXPORTED);
  good_exported = digest_folder(join(run->folder, "exported"));
  good_shard = digest_file(join(run->folder, "tokens.bin"), 1);
  good_model = digest_model(join(run->folder, "out"));
  return cut_disk_stop();
}

static uint32_t record(tiny_kind kind, cut_mistake mistake) {
  start_record(kind, mistake);
  ck_assert_msg(tiny_run_live(run) == FLAP_OK, "%s", flap_error_message());
  return end_record();
}

static void forget(void) {
  empty_scratch();
  ck_assert_int_eq(rmdir(scratch), 0);
  cut_disk_free();
  free(seen);
  case_close(run);
}

/* True the first time. What is promised is part of the state. */
static bool is_new(uint64_t digest, uint64_t marked) {
  const uint64_t mask = ((uint64_t)1 << SEEN_BITS) - 1;
  digest = digest * 31 + marked + 1;
  for (uint64_t i = digest & mask;; i = (i + 1) & mask) {
    if (seen[i] == digest)
      return false;
    if (seen[i] == 0) {
      seen[i] = digest;
      return true;
    }
  }
}

/* ---- judging ------------------------------------------------------------------------------------------------- */

static bool wrong(const char *format, const char *detail) {
  (void)snprintf(problem, sizeof problem, format, detail);
  return false;
}

/* Steps 1 .. step, each once. */
static bool metrics_are_whole(const char *out, uint64_t step) {
  flap_metrics *metrics = NULL;
  const char *path = join(out, "metrics.jsonl");
  if (flap_metrics_open(path, (int64_t)step, &metrics) != FLAP_OK)
    return wrong("metrics.jsonl cannot be opened: %s", flap_error_message());
  flap_metrics_close(metrics);
  char line[4096];
  uint64_t found = 0;
  FILE *file = fopen(path, "r");
  while (file != NULL && fgets(line, sizeof line, file) != NULL)
    found += strstr(line, "\"grad_norm\"") != NULL;
  if (file != NULL)
    (void)fclose(file);
  return found == step ? true : wrong("%s", "metrics.jsonl lost lines that a checkpoint has made last");
}

static bool checkpoint_is_whole(const char *out, uint64_t saved) {
  char folder[FLAP_PATH_MAX];
  const char *pages;
  flap_trainer_state state;
  const flap_status status = flap_checkpoint_find(out, "true", folder, &state);
  if (status != FLAP_OK && (saved > 0 || status != FLAP_NOT_FOUND))
    return wrong("no checkpoint is found: %s", flap_error_message());
  if (status != FLAP_OK)
    return true;
  if (state.step < saved)
    return wrong("%s", "the checkpoint that was said to be saved is gone");
  if (state.step > TINY_STEPS || good_checkpoint[state.step] == 0 ||
      digest_folder(folder) != good_checkpoint[state.step])
    return wrong("%s is not whole", strrchr(folder, '/') + 1);
  if (tiny_states_are_pages(folder, &pages) && pages[0] != '\0')
    return wrong("%s", pages);
  return metrics_are_whole(out, state.step);
}

static bool shard_is_whole(uint64_t marked) {
  const char *shard = join(scratch, "tokens.bin");
  if (is_there(shard) ? digest_file(shard, 1) != good_shard : marked > 0)
    return wrong("%s", "the token shard is not whole");
  return true;
}

static bool models_are_whole(const char *out, uint64_t marked) {
  const char *exported = join(scratch, "exported");
  if (flap_durable_recover_folder(exported) != FLAP_OK)
    return wrong("the exported model cannot be recovered: %s", flap_error_message());
  if (is_there(exported) ? digest_folder(exported) != good_exported : marked == MARK_EXPORTED)
    return wrong("%s", "the exported model is not whole");
  const bool there = is_there(join(out, "model.safetensors"));
  if (there ? digest_model(out) != good_model : marked >= MARK_TRAINED)
    return wrong("%s", "the trained model is not whole");
  return true;
}

static void resume(void *context) {
  uint64_t digest = 0;
  tiny_run again = *run;
  (void)context;
  again.saved = NULL;
  (void)snprintf(again.folder, sizeof again.folder, "%s", scratch);
  if (tiny_run_repair(&again) != FLAP_OK) {
    fprintf(stderr, "%s\n", flap_error_message());
    _exit(2);
  }
  const char *missing = tiny_run_digest(&again, &digest);
  if (missing[0] != '\0')
    fprintf(stderr, "%s\n", missing);
  _exit(missing[0] == '\0' && digest == case_wanted_digest() ? 0 : 3);
}

static bool resumes_to_the_same(void) {
  ck_assert_int_eq(mkdir(join(scratch, "disk"), 0700), 0);
  ck_assert_int_eq(symlink(join(run->folder, "text.txt"), join(scratch, "text.txt")), 0);
  return case_fork(resume, NULL, 60) == 0 ? true : wrong("%s", "training on does not end with the same bits");
}

/* Counts distinct states; those are looked at, and of them a share is trained on. */
static bool look(const cut *at, uint64_t *distinct) {
  const uint64_t marked = cut_disk_marked(at->entry);
  if (!is_new(cut_disk_replay(at), marked))
    return true;
  ++*distinct;
  empty_scratch();
  cut_disk_materialise(scratch);
  const char *out = join(scratch, "out");
  char folder[PATH_BYTES];
  (void)snprintf(folder, sizeof folder, "%s", out);
  flap_error_clear();
  return checkpoint_is_whole(folder, marked > TINY_STEPS ? TINY_STEPS : marked) && models_are_whole(folder, marked) &&
         shard_is_whole(marked) && (*distinct % RESUME_EVERY != 0 || resumes_to_the_same());
}

static cut cut_number(uint64_t number, uint32_t entries) {
  static const uint32_t shares[] = {0, 13, 64, 128, 192, 243, 256};
  const flap_philox dice = flap_philox_stream(case_seed(), "moments of power cuts");
  return (cut){.entry = number < entries ? (uint32_t)number + 1
                                         : 1 + (uint32_t)flap_philox_below(&dice, 4 * number, entries),
               .sector_bytes = flap_philox_below(&dice, 4 * number + 1, 2) ? 512 : 4096,
               .kept_share = shares[flap_philox_below(&dice, 4 * number + 2, sizeof shares / sizeof *shares)],
               .rubbish = flap_philox_below(&dice, 4 * number + 3, 2) != 0,
               .seed = case_seed() + number};
}

static const char *const kind_names[] = {[TINY_IN_RAM] = "ram", [TINY_ON_DISK] = "disk", [TINY_TWICE] = "twice"};

static bool read_named(cut *at) {
  const char *named = getenv("FLAP_POWER_CUT");
  char kind[8];
  unsigned entry, sector, share, rubbish;
  unsigned long long seed;
  if (named == NULL)
    return false;
  ck_assert_int_eq(sscanf(named, "%7[a-z]:%u:%u:%u:%u:%llu", kind, &entry, &sector, &share, &rubbish, &seed), 6);
  if (strcmp(kind, kind_names[run->kind]) != 0)
    return false;
  *at = (cut){.entry = entry, .sector_bytes = sector, .kept_share = share, .rubbish = rubbish != 0, .seed = seed};
  return true;
}

/* The number of the first bad cut, from 1; 0: none. */
static uint64_t cut_often(uint64_t cuts, uint32_t entries, uint64_t *distinct) {
  cut at;
  *distinct = 0;
  const bool named = read_named(&at);
  for (uint64_t i = 0; i < (named ? 1 : cuts); i++) {
    if (!named)
      at = cut_number(i, entries);
    if (look(&at, distinct))
      continue;
    (void)snprintf(problem + strlen(problem), sizeof problem - strlen(problem),
                   "; again: FLAP_POWER_CUT=%s:%u:%u:%u:%d:%llu", kind_names[run->kind], at.entry, at.sector_bytes,
                   at.kept_share, at.rubbish, (unsigned long long)at.seed);
    return i + 1;
  }
  return 0;
}

/* ---- tests --------------------------------------------------------------------------------------------------- */

START_TEST(power_cut_at_any_moment_leaves_what_was_saved_whole) {
  const char *wanted = getenv("FLAP_POWER_CUTS");
  const uint64_t cuts = (wanted != NULL ? strtoull(wanted, NULL, 10) : CUTS) / 2;
  uint64_t distinct;
  const uint32_t entries = record((tiny_kind)_i, CUT_NO_MISTAKE);
  const uint64_t bad = cut_often(cuts, entries, &distinct);
  forget();
  printf(
      "seed %llu, %s: %llu power cuts in a record of %u entries left %llu different states, of which %llu were trained "
      "on\n",
      (unsigned long long)case_seed(), kind_names[_i], (unsigned long long)cuts, entries, (unsigned long long)distinct,
      (unsigned long long)(distinct / RESUME_EVERY));
  ck_assert_msg(bad == 0, "%s", problem);
}
END_TEST

/* One more canary: updates write over what a checkpoint names. What it shares is read back before that, which finds
 * those that were made by then; and the others a cut. */
START_TEST(extents_that_are_written_over_are_found) {
  uint64_t distinct;
  start_record(TINY_ON_DISK, CUT_ONE_FILE);
  const flap_status status = tiny_run_live(run);
  if (status == FLAP_OK) {
    ck_assert_uint_gt(cut_often(CANARY_CUTS, end_record(), &distinct), 0);
  } else {
    (void)cut_disk_stop();
    ck_assert_int_eq(status, FLAP_CORRUPT);
    (void)snprintf(problem, sizeof problem, "%s", flap_error_message());
  }
  forget();
  ck_assert_msg(strstr(problem, "/optimizer-pages-") != NULL, "%s", problem);
  printf("canary, updates that write over what a checkpoint names: %s\n", problem);
}
END_TEST

/* The canaries: none of these programs may pass. */
START_TEST(power_cut_finds_what_a_missing_or_late_sync_loses) {
  static const struct {
    tiny_kind kind;
    const char *name;
  } canaries[CUT_MISTAKE_COUNT] = {[CUT_NO_FILE_SYNC] = {TINY_IN_RAM, "no fsync of files"},
                                   [CUT_NO_FOLDER_SYNC] = {TINY_IN_RAM, "no fsync of folders"},
                                   [CUT_RENAME_BEFORE_SYNC] = {TINY_IN_RAM, "fsync after the rename"},
                                   [CUT_NO_EXTENT_SYNC] = {TINY_ON_DISK, "no fsync of extents"}};
  uint64_t distinct;
  const uint32_t entries = record(canaries[_i].kind, (cut_mistake)_i);
  const uint64_t bad = cut_often(CANARY_CUTS, entries, &distinct);
  forget();
  ck_assert_msg(bad > 0, "a program with %s passes", canaries[_i].name);
  printf("canary, %s: seen at cut %llu: %s\n", canaries[_i].name, (unsigned long long)bad, problem);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("reliability");
  TCase *tests = tcase_create("power_cut");
  tcase_set_timeout(tests, 0);
  tcase_add_loop_test(tests, power_cut_at_any_moment_leaves_what_was_saved_whole, TINY_IN_RAM, TINY_TWICE + 1);
  tcase_add_loop_test(tests, power_cut_finds_what_a_missing_or_late_sync_loses, CUT_NO_MISTAKE + 1, CUT_ONE_FILE);
  tcase_add_test(tests, extents_that_are_written_over_are_found);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
