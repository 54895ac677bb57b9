/* Checkpoints and output_dir: saved whole, found again, pruned and cleared without touching what is somebody else's,
 * and intact whichever system call a process dies at. */
#include "engine/store/checkpoint.h"
#include "engine/store/finished.h"

#include "engine/store/hf_config.h"
#include "engine/store/output_folder_internal.h"
#include "engine/store/run_lock.h"
#include "engine/store/weights.h"
#include "io/formats/checksums.h"
#include "io/formats/durable.h"
#include "io/formats/safetensors.h"
#include "tests/device/device_faults.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <ftw.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHARD_MAX ((uint64_t)1 << 40)

/* ---- system calls: the linker sends those of FLAP's libraries here -------------------------------------------- */

static unsigned calls;     /* since armed */
static unsigned last_call; /* after so many every call fails, as if the process had died; 0: never */

static bool is_dead(void) {
  calls++;
  if (last_call == 0 || calls <= last_call)
    return false;
  errno = EIO;
  return true;
}

static void arm(unsigned call) {
  calls = 0;
  last_call = call;
}

ssize_t __real_write(int fd, const void *data, size_t bytes);
ssize_t __wrap_write(int fd, const void *data, size_t bytes);
int __wrap_fsync(int fd);
int __real_rename(const char *from, const char *to);
int __wrap_rename(const char *from, const char *to);
int __real_renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags);
int __wrap_renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags);
int __real_unlink(const char *path);
int __wrap_unlink(const char *path);
int __real_unlinkat(int fd, const char *path, int flags);
int __wrap_unlinkat(int fd, const char *path, int flags);
int __real_rmdir(const char *path);
int __wrap_rmdir(const char *path);
int __real_mkdir(const char *path, mode_t mode);
int __wrap_mkdir(const char *path, mode_t mode);

ssize_t __wrap_write(int fd, const void *data, size_t bytes) {
  return is_dead() ? -1 : __real_write(fd, data, bytes);
}
/* A dead process loses nothing of what it wrote, so there is no need to wait for the disk. */
int __wrap_fsync(int fd) {
  (void)fd;
  return is_dead() ? -1 : 0;
}
int __wrap_rename(const char *from, const char *to) {
  return is_dead() ? -1 : __real_rename(from, to);
}
int __wrap_renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
  return is_dead() ? -1 : __real_renameat2(from_fd, from, to_fd, to, flags);
}
int __wrap_unlink(const char *path) {
  return is_dead() ? -1 : __real_unlink(path);
}
int __wrap_unlinkat(int fd, const char *path, int flags) {
  return is_dead() ? -1 : __real_unlinkat(fd, path, flags);
}
int __wrap_rmdir(const char *path) {
  return is_dead() ? -1 : __real_rmdir(path);
}
int __wrap_mkdir(const char *path, mode_t mode) {
  return is_dead() ? -1 : __real_mkdir(path, mode);
}

/* ---- a run ---------------------------------------------------------------------------------------------------- */

static flap_model_config config;
static flap_tokenizer *tokenizer;
static flap_artifacts artifacts;
static flap_matmul_choice matmuls; /* a table that is given is saved too */
static weights_rig rig;

static void setup(void) {
  scratch_setup();
  arm(0);
  rig_model(false, true, &config);
  RIG_OK(flap_tokenizer_open_bytes(&tokenizer));
  matmuls.given = false;
  artifacts = (flap_artifacts){.model = &config, .tokenizer = tokenizer};
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
}

/* A model of a few thousand parameters, for tests that save hundreds of times. */
static void shrink(void) {
  rig_close(&rig);
  config.vocab_size = 61;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 1;
  config.head_dim = 4;
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
}

static void teardown(void) {
  arm(0);
  rig_close(&rig);
  flap_tokenizer_close(tokenizer);
  scratch_teardown();
}

/* Removes a folder of the scratch folder, if it is there, and the files in it. */
static void remove_folder(const char *name) {
  if (scratch_exists(name))
    RIG_OK(flap_durable_remove_folder(scratch_path(name)));
}

static flap_trainer_state state_of(uint64_t step) {
  return (flap_trainer_state){.step = step,
                              .max_steps = 1000,
                              .cursor = 8 * step,
                              .written_bytes = step << 40,
                              .seed = UINT64_MAX - step,
                              .dataset_digest = 0xfedcba9876543210u,
                              .optim = step > 1 ? FLAP_OPTIM_ADAMW_8BIT : FLAP_OPTIM_ADAMW,
                              .loss_scale = {.scale = step > 1 ? 1024 : 0, .good_steps = 7, .skipped = 2},
                              .matmuls = &matmuls,
                              .numerics = "cpu; avx2; \"quoted\""};
}

/* The weights of step `step` are those of the seed `step`. */
static flap_status save(uint64_t step, bool only_model, uint32_t limit) {
  char folder[FLAP_PATH_MAX];
  const flap_trainer_state state = state_of(step);
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, step));
  return flap_checkpoint_save(scratch_path("out"), rig.pager, &rig.layout, &artifacts, &state, only_model, limit,
                              folder);
}

static void must_save(uint64_t step, bool only_model, uint32_t limit) {
  RIG_OK(save(step, only_model, limit));
}

/* The weights in `path` are those of seed `step`. */
static void check_weights(const char *path, uint64_t step) {
  char copy[FLAP_PATH_MAX];
  (void)snprintf(copy, sizeof copy, "%s", path);
  (void)mkdir(scratch_path("wanted"), 0777);
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, step));
  RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("wanted"), SHARD_MAX, (flap_file_piece){0}, NULL));
  RIG_OK(flap_weights_load(rig.pager, &rig.layout, copy));
  (void)mkdir(scratch_path("found"), 0777);
  RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("found"), SHARD_MAX, (flap_file_piece){0}, NULL));
  rig_same_files("wanted/model.safetensors", "found/model.safetensors");
}

static uint64_t find_step(const char *from) {
  char folder[FLAP_PATH_MAX];
  flap_trainer_state state;
  RIG_OK(flap_checkpoint_find(scratch_path("out"), from, folder, &state));
  return state.step;
}

START_TEST(checkpoint_is_found_with_everything_in_it) {
  char folder[FLAP_PATH_MAX];
  flap_trainer_state state;
  flap_model_config again;
  must_save(3, false, 0);
  must_save(10, false, 0);
  must_save(9, false, 0);
  RIG_OK(flap_checkpoint_find(scratch_path("out"), "true", folder, &state));
  const flap_trainer_state wanted = state_of(10);
  ck_assert_uint_eq(state.step, 10);
  ck_assert_uint_eq(state.max_steps, wanted.max_steps);
  ck_assert_uint_eq(state.cursor, wanted.cursor);
  ck_assert_uint_eq(state.written_bytes, wanted.written_bytes);
  ck_assert_uint_eq(state.seed, wanted.seed);
  ck_assert_uint_eq(state.dataset_digest, wanted.dataset_digest);
  ck_assert_str_eq(state.numerics, wanted.numerics);
  ck_assert(state.loss_scale.scale == 1024 && state.loss_scale.good_steps == 7 && state.loss_scale.skipped == 2);
  ck_assert_str_eq(folder, scratch_path("out/checkpoint-10"));
  ck_assert(!scratch_exists("out/checkpoint-10.tmp"));
  RIG_OK(flap_hf_config_read(folder, &again));
  ck_assert_uint_eq(again.vocab_size, config.vocab_size);
  RIG_OK(flap_weights_resume(rig.pager, &rig.layout, folder, NULL));
  check_weights(folder, 10);
  ck_assert(scratch_exists("out/checkpoint-10/tokenizer.json"));
  RIG_OK(flap_checkpoint_find(scratch_path("elsewhere"), scratch_path("out/checkpoint-3/"), folder, &state));
  ck_assert_uint_eq(state.step, 3);
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), scratch_path("out/checkpoint-3/"), folder, &state),
              FLAP_INVALID, "holds checkpoint-9, checkpoint-10", "move what is later away");
  ck_assert_uint_eq(find_step(scratch_path("out/checkpoint-10")), 10);
  /* The same step again replaces it. */
  must_save(10, false, 0);
  ck_assert_uint_eq(find_step("true"), 10);
}
END_TEST

#define TARGET "sm_90 NVIDIA Test, cublaslt-13.1.0"

/* As many products as there can be, each with long numbers. */
static void fill_matmuls(void) {
  const flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 2, .sequence = 64};
  RIG_OK(flap_matmul_choice_open(TARGET, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_FIRST, "", &matmuls));
  for (uint32_t i = 0; i < FLAP_MATMUL_ENTRIES_MAX; i++) {
    const uint32_t most = UINT32_MAX - i;
    const flap_matmul_key key = {.m = most,
                                 .n = most,
                                 .k = most,
                                 .lda = most,
                                 .ldb = most,
                                 .ldc = most,
                                 .transpose = FLAP_NN,
                                 .dtype = FLAP_BF16,
                                 .c_dtype = FLAP_BF16,
                                 .added = 2,
                                 .bias = 16,
                                 .align_a = 16,
                                 .align_b = 16,
                                 .align_c = 16};
    const uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES] = {(uint8_t)i, 0xff};
    ck_assert(flap_matmul_table_add(&matmuls.table, &key, algorithm));
  }
}

static flap_matmul_choice saved_matmuls; /* as the run that goes on has them */

static flap_status open_saved_matmuls(const char *folder) {
  const flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 2, .sequence = 64};
  return flap_matmul_choice_open(TARGET, &config, &shape, FLAP_BF16, FLAP_RUN_MATMUL_TUNED, folder, &saved_matmuls);
}

/* The run that goes on has the table of the one that saved; weights alone have none. */
START_TEST(checkpoint_carries_the_table_of_products) {
  must_save(1, false, 0);
  ck_assert(!scratch_exists("out/checkpoint-1/matmul.json")); /* no card, no table */
  fill_matmuls();
  must_save(2, false, 0);
  must_save(3, true, 0);
  ck_assert(!scratch_exists("out/checkpoint-3/matmul.json"));
  ck_assert_uint_eq(find_step("true"), 2);
  RIG_OK(open_saved_matmuls(scratch_path("out/checkpoint-2")));
  ck_assert(saved_matmuls.given && !saved_matmuls.tunes);
  ck_assert_uint_eq(saved_matmuls.table.count, FLAP_MATMUL_ENTRIES_MAX);
  ck_assert_mem_eq(saved_matmuls.table.entries, matmuls.table.entries, sizeof matmuls.table.entries);
}
END_TEST

static uint64_t count_checkpoints(void) {
  uint64_t count = 0;
  RIG_OK(flap_checkpoint_count(scratch_path("out"), &count));
  ck_assert_str_eq(flap_error_message(), "");
  return count;
}

START_TEST(checkpoint_limit_deletes_the_oldest_of_ours) {
  ck_assert_uint_eq(count_checkpoints(), 0); /* there is no folder yet */
  must_save(1, false, 0);
  must_save(2, false, 0);
  must_save(100, true, 0);
  ck_assert_int_eq(mkdir(scratch_path("out/checkpoint-0"), 0777), 0); /* somebody else's */
  scratch_text("out/checkpoint-0/notes", "mine");
  ck_assert_uint_eq(count_checkpoints(), 3);
  must_save(11, false, 3);
  ck_assert_uint_eq(count_checkpoints(), 3);
  ck_assert(!scratch_exists("out/checkpoint-1") && scratch_exists("out/checkpoint-2"));
  must_save(12, false, 1);
  ck_assert(!scratch_exists("out/checkpoint-2") && !scratch_exists("out/checkpoint-11"));
  ck_assert(scratch_exists("out/checkpoint-12") && !scratch_exists("out/checkpoint-100"));
  ck_assert(scratch_exists("out/checkpoint-0/notes"));
}
END_TEST

START_TEST(checkpoint_nothing_to_resume_is_explained) {
  char folder[FLAP_PATH_MAX];
  flap_trainer_state state;
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), FLAP_NOT_FOUND, "/out",
              "resume_from_checkpoint");
  ck_assert_int_eq(mkdir(scratch_path("out"), 0777), 0);
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), FLAP_NOT_FOUND, "/out",
              "resume_from_checkpoint: auto");
  must_save(4, true, 0);
  ck_assert(!scratch_exists("out/checkpoint-4/optimizer-low.safetensors"));
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), FLAP_NOT_FOUND, "weights only",
              "model_name_or_path");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "auto", folder, &state), FLAP_NOT_FOUND, "weights only",
              "model_name_or_path");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), scratch_path("out/checkpoint-4"), folder, &state),
              FLAP_NOT_FOUND, "checkpoint-4", "weights only");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), scratch_path("out/checkpoint-5"), folder, &state),
              FLAP_NOT_FOUND, "checkpoint-5", "No such file");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), scratch_path("out/checkpoint-4/config.json"), folder, &state),
              FLAP_INVALID, "config.json is not a folder", "");
  must_save(2, false, 0);
  ck_assert_uint_eq(find_step("true"), 2);
}
END_TEST

/* The power failed while a checkpoint was replaced on a file system that cannot exchange names: the old one is put
 * back, whoever's run names it, and not under the eyes of a run that is at work there. */
START_TEST(checkpoint_that_is_named_is_put_back_after_a_crash) {
  char folder[FLAP_PATH_MAX], aside[2 * FLAP_PATH_MAX], theirs[FLAP_PATH_MAX];
  flap_trainer_state state;
  flap_run_lock lock;
  must_save(2, false, 0);
  (void)snprintf(theirs, sizeof theirs, "%s", scratch_path("out/checkpoint-2"));
  (void)snprintf(aside, sizeof aside, "%s.tmp.old", theirs);
  ck_assert_int_eq(rename(theirs, aside), 0);
  ck_assert_uint_eq(find_step(theirs), 2); /* the run's own folder */
  ck_assert(scratch_exists("out/checkpoint-2") && !scratch_exists("out/checkpoint-2.tmp.old"));
  ck_assert_int_eq(mkdir(scratch_path("mine"), 0777), 0);
  ck_assert_int_eq(rename(theirs, aside), 0);
  RIG_OK(flap_run_lock_take(scratch_path("out"), &lock));
  RIG_REFUSED(flap_checkpoint_find(scratch_path("mine"), theirs, folder, &state), FLAP_INVALID, "out", "");
  ck_assert(!scratch_exists("out/checkpoint-2"));
  flap_run_lock_release(&lock);
  RIG_OK(flap_checkpoint_find(scratch_path("mine"), theirs, folder, &state));
  ck_assert_uint_eq(state.step, 2);
  ck_assert(scratch_exists("out/checkpoint-2") && !scratch_exists("out/checkpoint-2.tmp.old"));
}
END_TEST

START_TEST(checkpoint_paths_that_cannot_be_are_refused) {
  static char longer[FLAP_PATH_MAX + 1];
  char folder[FLAP_PATH_MAX];
  flap_trainer_state state;
  memset(longer, 'a', FLAP_PATH_MAX);
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "", folder, &state), FLAP_INVALID, "resume_from_checkpoint",
              "empty");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), longer, folder, &state), FLAP_INVALID, "resume_from_checkpoint",
              "too long");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "/checkpoint-7/", folder, &state), FLAP_NOT_FOUND,
              "/checkpoint-7", "No such file");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "nowhere/checkpoint-7", folder, &state), FLAP_NOT_FOUND,
              "nowhere/checkpoint-7", "No such file");
}
END_TEST

START_TEST(checkpoint_bad_trainer_states_are_refused) {
#define STATE(more)                                                                             \
  "{\"format\": \"flap-trainer-state\", \"version\": 1, \"global_step\": 2, \"max_steps\": 3, " \
  "\"sequences_consumed\": 4, \"numerics\": \"n\", " more "}"
#define LONGS "\"seed\": \"5\", \"dataset_digest\": \"0x0\""
  static const struct {
    const char *text;
    flap_status status;
    const char *part;
  } cases[] = {
      {"{\"global_step\": 7, \"epoch\": 1.0}", FLAP_INVALID, "format: must be flap-trainer-state"},
      {"{\"format\": \"flap-trainer-state\", \"version\": 2}", FLAP_UNSUPPORTED, "version: is 2"},
      {STATE("\"seed\": 5, \"dataset_digest\": \"0x0\""), FLAP_INVALID, "seed: must be a string"},
      {STATE("\"seed\": \"-5\", \"dataset_digest\": \"0x0\""), FLAP_INVALID, "seed: -5 is not a whole number"},
      {STATE("\"seed\": \"5x\", \"dataset_digest\": \"0x0\""), FLAP_INVALID, "seed: 5x is not"},
      {STATE("\"seed\": \"99999999999999999999\", \"dataset_digest\": \"0x0\""), FLAP_INVALID, "seed: 9999"},
      {STATE("\"seed\": \"5\""), FLAP_INVALID, "dataset_digest: this key is missing"},
      {STATE(LONGS ", \"optim\": \"sgd\""), FLAP_INVALID, "optim: sgd is neither adamw nor adamw_8bit"},
      {STATE(LONGS ", \"written_bytes\": -1"), FLAP_INVALID, "written_bytes: "},
      {STATE(LONGS ", \"optim\": 8"), FLAP_INVALID, "optim: must be a string"},
      {STATE(LONGS ", \"loss_scale\": 3"), FLAP_INVALID, "loss_scale: 3 is not a power of two"},
      {STATE(LONGS ", \"loss_scale\": -1"), FLAP_INVALID, "loss_scale: "},
      {STATE(LONGS ", \"loss_scale\": 4"), FLAP_INVALID, "loss_scale_good_steps: this key is missing"},
      {STATE(LONGS ", \"loss_scale\": 4, \"loss_scale_good_steps\": 1, \"updates_applied\": 3"), FLAP_INVALID,
       "updates_applied: 3 is more than the 2 steps"},
      {"{", FLAP_INVALID, "trainer_state.json:1:"},
  };
  char folder[FLAP_PATH_MAX];
  flap_trainer_state state;
  must_save(2, false, 0);
  scratch_text("out/checkpoint-2/trainer_state.json", "{}");
  RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), FLAP_CORRUPT, "was saved with",
              "checkpoint-2/trainer_state.json");
  ck_assert_int_eq(unlink(scratch_path("out/checkpoint-2/" FLAP_CHECKSUMS_FILE)),
                   0); /* which would find all of these */
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    scratch_text("out/checkpoint-2/trainer_state.json", cases[i].text);
    RIG_REFUSED(flap_checkpoint_find(scratch_path("out"), "true", folder, &state), cases[i].status, cases[i].part,
                "checkpoint-2/trainer_state.json");
  }
  scratch_text("out/checkpoint-2/trainer_state.json", STATE("\"seed\": \"5\", \"dataset_digest\": \"0xab\""));
  RIG_OK(flap_checkpoint_find(scratch_path("out"), "true", folder, &state));
  ck_assert_uint_eq(state.dataset_digest, 0xab);
  ck_assert_int_eq(state.optim, FLAP_OPTIM_ADAMW); /* from before there was a choice */
  ck_assert_uint_eq(state.written_bytes, 0);       /* or a count */
}
END_TEST

static uint64_t bytes_seen;

static int add_bytes(const char *path, const struct stat *about, int kind, struct FTW *where) {
  (void)path, (void)kind, (void)where;
  bytes_seen += S_ISREG(about->st_mode) ? (uint64_t)about->st_blocks * 512 : 0;
  return 0;
}

static uint64_t scratch_bytes(const char *name) {
  bytes_seen = 0;
  ck_assert_int_eq(nftw(scratch_path(name), add_bytes, 8, FTW_PHYS), 0);
  return bytes_seen;
}

START_TEST(output_folder_occupied_and_cleared) {
  char what[FLAP_PATH_MAX];
  uint64_t freed = 0;
  RIG_OK(flap_checkpoint_clear_bytes(scratch_path("out"), &freed));
  ck_assert_uint_eq(freed, 0);
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_eq(what, "");
  RIG_OK(flap_checkpoint_clear(scratch_path("out")));
  ck_assert_int_eq(mkdir(scratch_path("out"), 0777), 0);
  scratch_text("out/notes.txt", "mine");
  scratch_text("out/trace.json", "[]");
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_eq(what, "");
  scratch_text("out/metrics.jsonl", "{}\n");
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_ne(what, "");
  ck_assert_str_eq(what, scratch_path("out/metrics.jsonl"));
  must_save(5, false, 0);
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_ne(what, "");
  ck_assert_str_eq(what, scratch_path("out/checkpoint-5"));
  RIG_OK(flap_checkpoint_export(scratch_path("out"), rig.pager, &rig.layout, &artifacts));
  ck_assert_int_eq(mkdir(scratch_path("out/checkpoint-6.tmp"), 0777), 0);
  scratch_text("out/checkpoint-6.tmp/model.safetensors", "half");
  const uint64_t before = scratch_bytes("out");
  RIG_OK(flap_checkpoint_clear_bytes(scratch_path("out"), &freed));
  RIG_OK(flap_checkpoint_clear(scratch_path("out")));
  const uint64_t left = scratch_bytes("out");
  ck_assert_uint_le(freed, before - left);
  ck_assert_uint_ge(freed + (64 << 10), before - left); /* small files are not all counted */
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_eq(what, "");
  ck_assert(scratch_exists("out/notes.txt"));
  ck_assert_int_eq(unlink(scratch_path("out/notes.txt")), 0);
  ck_assert_msg(rmdir(scratch_path("out")) == 0, "clear left something");
}
END_TEST

START_TEST(output_folder_with_only_leftovers_is_told_from_one_with_results) {
  char what[FLAP_PATH_MAX], folder[FLAP_PATH_MAX] = "x";
  flap_trainer_state state;
  RIG_OK(flap_checkpoint_find(scratch_path("out"), "auto", folder, &state));
  ck_assert_str_eq(folder, "");
  ck_assert_int_eq(mkdir(scratch_path("out"), 0777), 0);
  ck_assert_int_eq(mkdir(scratch_path("out/checkpoint-6.tmp"), 0777), 0);
  ck_assert_int_eq(mkdir(scratch_path("out/export.tmp"), 0777), 0);
  scratch_text("out/export.tmp/config.json", "{}");
  scratch_text("out/trace.json", "[]");
  scratch_text("out/notes.txt", "mine");
  scratch_text("out/metrics.jsonl", "{\"step\": 0}\n");
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_eq(what, "");
  scratch_text("out/metrics.jsonl", "{\"step\": 0}\n{\"step\": 1}\n");
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_eq(what, scratch_path("out/metrics.jsonl"));
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), false, what));
  ck_assert_str_eq(what, "");
  RIG_OK(flap_checkpoint_clear_leftovers(scratch_path("out")));
  ck_assert(!scratch_exists("out/metrics.jsonl") && !scratch_exists("out/trace.json"));
  ck_assert(!scratch_exists("out/checkpoint-6.tmp") && !scratch_exists("out/export.tmp"));
  ck_assert(scratch_exists("out/notes.txt"));
  ck_assert_int_eq(symlink("notes.txt", scratch_path("out/metrics.jsonl")), 0); /* somebody else's way */
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), false, what));
  ck_assert_str_eq(what, scratch_path("out/metrics.jsonl"));
  ck_assert_int_eq(unlink(scratch_path("out/metrics.jsonl")), 0);
  /* With results, all of them stay. */
  must_save(4, false, 0);
  ck_assert_uint_eq(find_step("auto"), 4);
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), false, what));
  ck_assert_str_eq(what, scratch_path("out/checkpoint-4"));
  RIG_OK(flap_checkpoint_export(scratch_path("out"), rig.pager, &rig.layout, &artifacts));
  RIG_OK(flap_checkpoint_clear_leftovers(scratch_path("out")));
  ck_assert_uint_eq(find_step("auto"), 4);
  ck_assert(scratch_exists("out/config.json") && scratch_exists("out/model.safetensors"));
}
END_TEST

static flap_finished finished_in_out(void) {
  flap_finished finished = {.steps = 77, .has_model = true};
  RIG_OK(flap_finished_read(scratch_path("out"), &finished));
  ck_assert_str_eq(flap_error_message(), "");
  return finished;
}

START_TEST(finished_run_is_known_by_its_mark_and_its_model) {
  static const char *const others[] = {"",
                                       "{}",
                                       "not json",
                                       "[]",
                                       "{\"format\": \"flap-finished\", \"version\": 1}",
                                       "{\"format\": \"theirs\", \"version\": 1, \"steps\": 8, \"exported\": true}",
                                       "{\"format\": \"flap-finished\", \"version\": 1, \"steps\": 0}"};
  ck_assert_uint_eq(finished_in_out().steps, 0);
  RIG_OK(flap_finished_remove(scratch_path("out"))); /* there is no folder yet */
  ck_assert_int_eq(mkdir(scratch_path("out"), 0777), 0);
  for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
    scratch_text("out/finished.json", others[i]);
    ck_assert_uint_eq(finished_in_out().steps, 0);
    RIG_OK(flap_finished_remove(scratch_path("out")));
    ck_assert(scratch_exists("out/finished.json"));
  }
  RIG_OK(flap_finished_write(scratch_path("out"), 8, true, NULL));
  ck_assert(finished_in_out().steps == 8 && !finished_in_out().has_model);
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  RIG_OK(flap_checkpoint_export(scratch_path("out"), rig.pager, &rig.layout, &artifacts));
  ck_assert(finished_in_out().steps == 8 && finished_in_out().has_model);
  RIG_OK(
      flap_finished_write(scratch_path("out"), 9, false, NULL)); /* which exported none: the model is an earlier one */
  ck_assert(finished_in_out().steps == 9 && !finished_in_out().has_model);
  RIG_OK(flap_finished_remove(scratch_path("out")));
  ck_assert(!scratch_exists("out/finished.json"));
}
END_TEST

START_TEST(output_folder_of_others_is_not_cleared) {
  char what[FLAP_PATH_MAX];
  uint64_t freed = 1;
  must_save(5, true, 0);
  ck_assert_int_eq(rename(scratch_path("out/checkpoint-5"), scratch_path("theirs")), 0);
  /* The same model without the mark, as another program writes it. */
  const uint16_t zero = 0;
  flap_safetensors_writer *writer = NULL;
  const flap_safetensors_entry entry = {.name = "x", .dtype = FLAP_SAFETENSORS_BF16, .rank = 1, .shape = {1}};
  RIG_OK(flap_safetensors_write_begin(scratch_path("theirs/model.safetensors"), &entry, 1, NULL, 0,
                                      (flap_file_piece){0}, &writer));
  RIG_OK(flap_safetensors_write(writer, &zero, 2));
  RIG_OK(flap_safetensors_write_end(writer));
  ck_assert_int_eq(rename(scratch_path("theirs"), scratch_path("out/checkpoint-5")), 0);
  scratch_text("out/config.json", "{}");
  RIG_OK(flap_checkpoint_clear(scratch_path("out")));
  RIG_OK(flap_checkpoint_occupied(scratch_path("out"), true, what));
  ck_assert_str_ne(what, "");
  ck_assert(scratch_exists("out/checkpoint-5/model.safetensors") && scratch_exists("out/config.json"));
  RIG_OK(flap_checkpoint_clear_bytes(scratch_path("out"), &freed));
  ck_assert_uint_eq(freed, 0);
  must_save(6, true, 1);
  ck_assert(scratch_exists("out/checkpoint-5/model.safetensors"));
}
END_TEST

START_TEST(output_folder_sizes_are_enough) {
  uint64_t bytes = 0, actual = 0;
  static const char *const files[] = {"config.json",
                                      "tokenizer.json",
                                      "tokenizer_config.json",
                                      "model.safetensors",
                                      "trainer_state.json",
                                      "matmul.json",
                                      "optimizer-low.safetensors",
                                      "optimizer-exp_avg.safetensors",
                                      "optimizer-exp_avg_sq.safetensors"};
  fill_matmuls();
  must_save(5, false, 0);
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    char name[128];
    struct stat about;
    (void)snprintf(name, sizeof name, "out/checkpoint-5/%s", files[i]);
    ck_assert_int_eq(stat(scratch_path(name), &about), 0);
    actual += (uint64_t)about.st_size;
  }
  RIG_OK(flap_checkpoint_bytes(&config, FLAP_BF16, FLAP_OPTIM_ADAMW, false, &bytes));
  ck_assert_uint_ge(bytes, actual);
  ck_assert_uint_le(bytes, actual + ((uint64_t)128 << 10));
  uint64_t model = 0, only = 0;
  RIG_OK(flap_checkpoint_bytes(&config, FLAP_BF16, FLAP_OPTIM_ADAMW, true, &only));
  RIG_OK(flap_checkpoint_export_bytes(&config, FLAP_BF16, &model));
  ck_assert_uint_eq(only, model);
  ck_assert_uint_lt(only, bytes);
}
END_TEST

/* ---- failures ------------------------------------------------------------------------------------------------- */

START_TEST(checkpoint_full_disk_leaves_the_old_one) {
  must_save(1, false, 0);
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 2));
  char folder[FLAP_PATH_MAX];
  const flap_trainer_state state = state_of(2);
  const char *out = scratch_path("out");
  scratch_limit(100000);
  const flap_status status = flap_checkpoint_save(out, rig.pager, &rig.layout, &artifacts, &state, false, 1, folder);
  scratch_unlimit();
  ck_assert_int_eq(status, FLAP_NO_SPACE);
  ck_assert(scratch_error_has("saving ") && scratch_error_has("checkpoint-2"));
  ck_assert(!scratch_exists("out/checkpoint-2") && !scratch_exists("out/checkpoint-2.tmp"));
  ck_assert_uint_eq(find_step("true"), 1);
}
END_TEST

/* A copy that fails leaves old bytes where new ones should be: no checkpoint may be made of them, whichever it is. */
START_TEST(checkpoint_of_a_device_that_fails_is_not_saved) {
  char folder[FLAP_PATH_MAX];
  const flap_trainer_state state = state_of(1);
  const rig_placement placement = {.homes = RIG_VRAM, .slice_blocks = 1, .page_bytes = 4096, .transfer_bytes = 8192};
  shrink();
  rig_close(&rig);
  device_faults_install(DEVICE_CALL_COPY, 0);
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &placement, scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  for (uint64_t copy = 1;; copy++) {
    device_faults_install(DEVICE_CALL_COPY, copy);
    const flap_status status =
        flap_checkpoint_save(scratch_path("out"), rig.pager, &rig.layout, &artifacts, &state, false, 0, folder);
    const bool reached = device_faults_count(DEVICE_CALL_COPY) >= copy;
    ck_assert_msg(status == (reached ? FLAP_DEVICE : FLAP_OK), "copy %llu: %s", (unsigned long long)copy,
                  flap_status_name(status));
    if (!reached) {
      ck_assert_uint_gt(copy, 10);
      break;
    }
    ck_assert(!scratch_exists("out/checkpoint-1"));
  }
  device_faults_remove();
}
END_TEST

/* The process dies after each of its system calls in turn, while it saves step 2 beside (or over) the older one. */
START_TEST(checkpoint_death_at_any_call_leaves_a_whole_one) {
  const uint64_t old_step = _i == 0 ? 1 : 2;
  shrink();
  fill_matmuls();
  matmuls.table.count = 3;
  unsigned old_found = 0, new_found = 0;
  for (unsigned call = 1;; call++) {
    char folder[FLAP_PATH_MAX];
    flap_trainer_state state;
    ck_assert_uint_lt(call, 2000);
    const flap_trainer_state old = state_of(old_step), new = state_of(2);
    RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
    RIG_OK(flap_checkpoint_save(scratch_path("out"), rig.pager, &rig.layout, &artifacts, &old, false, 1, folder));
    RIG_OK(flap_weights_init(rig.pager, &rig.layout, 2));
    const char *out = scratch_path("out");
    arm(call);
    const flap_status status = flap_checkpoint_save(out, rig.pager, &rig.layout, &artifacts, &new, false, 1, folder);
    const bool died = calls > call;
    arm(0);
    RIG_OK(flap_checkpoint_find(scratch_path("out"), "true", folder, &state));
    flap_safetensors *reader = NULL;
    RIG_OK(flap_safetensors_open(folder, &reader));
    flap_safetensors_close(reader);
    RIG_OK(flap_weights_resume(rig.pager, &rig.layout, folder, NULL));
    RIG_OK(open_saved_matmuls(folder));
    ck_assert(!saved_matmuls.tunes && saved_matmuls.table.count == 3);
    ck_assert(!scratch_exists("out/checkpoint-2.tmp") && !scratch_exists("out/checkpoint-1.tmp"));
    /* Whose weights they are shows in the first element. */
    uint32_t part;
    const uint64_t elements = rig_tensor(&rig, "lm_head.weight", &part).elements;
    float *found = malloc(elements * sizeof(float)), *wanted = malloc(elements * sizeof(float));
    rig_read(&rig, "lm_head.weight", found, NULL, NULL);
    RIG_OK(flap_weights_init(rig.pager, &rig.layout, 2));
    rig_read(&rig, "lm_head.weight", wanted, NULL, NULL);
    const bool is_new = memcmp(found, wanted, elements * sizeof(float)) == 0;
    if (!is_new) {
      RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
      rig_read(&rig, "lm_head.weight", wanted, NULL, NULL);
      ck_assert_mem_eq(found, wanted, elements * sizeof(float));
      ck_assert_uint_eq(state.step, old_step);
    }
    free(found);
    free(wanted);
    ck_assert_msg(is_new || status != FLAP_OK, "call %u: the old one after a success", call);
    old_found += !is_new;
    new_found += is_new;
    RIG_OK(flap_checkpoint_clear(scratch_path("out")));
    if (!died)
      break;
  }
  ck_assert_uint_gt(old_found, 20);
  ck_assert_uint_gt(new_found, 1);
}
END_TEST

/* The final model replaces one of other weights; whatever call is the last, whoever loads finds one of both, or none.
 */
START_TEST(export_death_at_any_call_leaves_one_model_or_none) {
  unsigned old_found = 0, new_found = 0, none = 0;
  shrink();
  for (unsigned call = 1;; call++) {
    ck_assert_uint_lt(call, 2000);
    ck_assert_int_eq(mkdir(scratch_path("out"), 0777), 0);
    RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
    RIG_OK(flap_checkpoint_export(scratch_path("out"), rig.pager, &rig.layout, &artifacts));
    if (_i % 2) { /* the old one in shards */
      ck_assert_int_eq(unlink(scratch_path("out/model.safetensors")), 0);
      RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("out"), 1000, (flap_file_piece){0}, NULL));
    }
    RIG_OK(flap_weights_init(rig.pager, &rig.layout, 2));
    bool died;
    if (_i / 2) { /* the new one in shards */
      ck_assert_int_eq(mkdir(scratch_path("new"), 0777), 0);
      RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("new"), 1000, (flap_file_piece){0}, NULL));
      const char *from = scratch_path("new"), *to = scratch_path("out");
      arm(call);
      (void)!flap_output_install(from, to);
      died = calls > call;
    } else {
      const char *out = scratch_path("out");
      arm(call);
      (void)!flap_checkpoint_export(out, rig.pager, &rig.layout, &artifacts);
      died = calls > call;
    }
    arm(0);
    if (flap_weights_load(rig.pager, &rig.layout, scratch_path("out")) == FLAP_OK) {
      (void)mkdir(scratch_path("found"), 0777), (void)mkdir(scratch_path("wanted"), 0777);
      size_t bytes;
      RIG_OK(flap_weights_save(rig.pager, &rig.layout, scratch_path("found"), SHARD_MAX, (flap_file_piece){0}, NULL));
      char *found = scratch_read("found/model.safetensors", &bytes);
      bool same[2];
      for (uint64_t seed = 1; seed <= 2; seed++) {
        RIG_OK(flap_weights_init(rig.pager, &rig.layout, seed));
        RIG_OK(
            flap_weights_save(rig.pager, &rig.layout, scratch_path("wanted"), SHARD_MAX, (flap_file_piece){0}, NULL));
        char *wanted = scratch_read("wanted/model.safetensors", NULL);
        same[seed - 1] = memcmp(found, wanted, bytes) == 0;
        free(wanted);
      }
      free(found);
      ck_assert_msg(same[0] || same[1], "call %u: a mixture of two models", call);
      old_found += same[0];
      new_found += same[1];
    } else {
      none++;
    }
    if (!died) { /* nothing of the old one is left */
      ck_assert(scratch_exists("out/model.safetensors") == (_i / 2 == 0));
      ck_assert(scratch_exists("out/model.safetensors.index.json") == (_i / 2 == 1));
      ck_assert(!scratch_exists("out/export.tmp"));
    }
    RIG_OK(flap_checkpoint_clear(scratch_path("out")));
    remove_folder("out");
    remove_folder("new");
    if (!died)
      break;
  }
  ck_assert(_i == 3 || old_found > 0); /* from shards to shards the first call unlinks the old index */
  ck_assert_uint_gt(new_found, 0);
  ck_assert(_i / 2 == 1 || none == 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("checkpoint");
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_set_timeout(tests, 240);
  tcase_add_test(tests, checkpoint_is_found_with_everything_in_it);
  tcase_add_test(tests, checkpoint_carries_the_table_of_products);
  tcase_add_test(tests, checkpoint_limit_deletes_the_oldest_of_ours);
  tcase_add_test(tests, checkpoint_nothing_to_resume_is_explained);
  tcase_add_test(tests, checkpoint_that_is_named_is_put_back_after_a_crash);
  tcase_add_test(tests, checkpoint_paths_that_cannot_be_are_refused);
  tcase_add_test(tests, checkpoint_bad_trainer_states_are_refused);
  tcase_add_test(tests, output_folder_occupied_and_cleared);
  tcase_add_test(tests, output_folder_with_only_leftovers_is_told_from_one_with_results);
  tcase_add_test(tests, finished_run_is_known_by_its_mark_and_its_model);
  tcase_add_test(tests, output_folder_of_others_is_not_cleared);
  tcase_add_test(tests, output_folder_sizes_are_enough);
  tcase_add_test(tests, checkpoint_full_disk_leaves_the_old_one);
  tcase_add_test(tests, checkpoint_of_a_device_that_fails_is_not_saved);
  tcase_add_loop_test(tests, checkpoint_death_at_any_call_leaves_a_whole_one, 0, 2);
  tcase_add_loop_test(tests, export_death_at_any_call_leaves_one_model_or_none, 0, 4);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
