/* Checkpoints that are written while training goes on: to the byte those that a run writes which stops at that step,
 * whatever the numbers are stored as and wherever they live; going on from one ends with the bits of the run that saved
 * it; and what is not good, or cannot be written, never becomes one.
 */
#include "engine/engine.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/store/state_pages.h"
#include "io/block/block.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define STEPS 6u
#define PATHS 1024u

typedef struct numbers {
  const char *name;
  bool fp16, tied;
  flap_optim optim;
} numbers;

static const numbers NUMBERS[] = {
    {.name = "bf16, tied", .tied = true},
    {.name = "fp16, whose first steps overflow, 8-bit moments, tied",
     .fp16 = true,
     .tied = true,
     .optim = FLAP_OPTIM_ADAMW_8BIT},
    {.name = "fp16, whose first steps overflow", .fp16 = true},
    {.name = "bf16, 8-bit moments", .optim = FLAP_OPTIM_ADAMW_8BIT},
};
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define NUMBER_COUNT 1 /* everything takes several times as long */
#define MIXED_COUNT 1
#define PLACE_STRIDE 3
#else
#define NUMBER_COUNT ((int)(sizeof NUMBERS / sizeof *NUMBERS))
#define PLACE_STRIDE 2 /* each kind of numbers meets half of the places, the next one the others */
#define MIXED_COUNT 2  /* those in bf16: a step in fp16 may be skipped, so its parts wait for all gradients */
#endif

typedef struct place {
  const char *name;
  flap_size vram, ram;
  bool disk, sweep, backward;
  bool twice; /* the backward */
  flap_optimizer_place optimizer;
  uint64_t eval_steps;
  bool only_model;
} place;

#define BYTES(n) \
  { .kind = FLAP_SIZE_BYTES, .bytes = (n) }
#define LEAST \
  { .kind = FLAP_SIZE_MIN }
#define ROOMY BYTES((uint64_t)16 << 20)

static const place PLACES[] = {
    {.name = "resident", .vram = ROOMY, .ram = ROOMY},
    {.name = "in ram", .vram = LEAST, .ram = ROOMY},
    {.name = "on disk", .vram = LEAST, .ram = LEAST, .disk = true},
    {.name = "some of each", .vram = BYTES((uint64_t)1200 << 10), .ram = BYTES((uint64_t)900 << 10), .disk = true},
    {.name = "updated by the host", .vram = LEAST, .ram = ROOMY, .optimizer = FLAP_OPTIMIZER_CPU},
    {.name = "half updated by the host", .vram = LEAST, .ram = ROOMY, .optimizer = FLAP_OPTIMIZER_SPLIT},
    {.name = "on disk, swept", .vram = LEAST, .ram = LEAST, .disk = true, .sweep = true},
    {.name = "in ram, updated in the backward", .vram = LEAST, .ram = ROOMY, .backward = true},
    {.name = "on disk, updated in the backward", .vram = LEAST, .ram = LEAST, .disk = true, .backward = true},
    {.name = "resident, updated in the backward", .vram = ROOMY, .ram = ROOMY, .backward = true},
    {.name = "updated in the backward, half by the host",
     .vram = LEAST,
     .ram = ROOMY,
     .backward = true,
     .optimizer = FLAP_OPTIMIZER_SPLIT},
    {.name = "on disk, updated in a second backward",
     .vram = LEAST,
     .ram = LEAST,
     .disk = true,
     .backward = true,
     .twice = true},
    {.name = "in ram, evaluated between", .vram = LEAST, .ram = ROOMY, .eval_steps = 2},
    {.name = "weights alone", .vram = LEAST, .ram = LEAST, .disk = true, .only_model = true},
};
#define PLACE_COUNT (sizeof PLACES / sizeof *PLACES)

/* ---- a run ------------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t stop;
static struct {
  uint64_t stop_at;       /* a step, after which the person stops the run */
  uint64_t stop_at_saved; /* or when they hear that this one is saved */
  uint64_t kill_at;       /* or after which the process is killed */
  uint64_t stepped, saved[STEPS + 1];
  uint64_t stepped_at_save[STEPS + 1]; /* of each checkpoint, how many steps were done when it was told */
} seen;

static void note_step(void *context, const flap_step_report *report) {
  (void)context;
  seen.stepped = report->step;
  if (report->step == seen.stop_at)
    stop = 1;
  if (report->step == seen.kill_at)
    (void)raise(SIGKILL);
}

static void note_saved(void *context, const char *folder, double seconds) {
  (void)context, (void)seconds;
  const uint64_t step = strtoull(strrchr(folder, '-') + 1, NULL, 10);
  ck_assert_uint_le(step, STEPS);
  seen.saved[step]++;
  seen.stepped_at_save[step] = seen.stepped;
  if (step == seen.stop_at_saved)
    stop = 1;
}

static char disk[64]; /* a folder, whose extents have no names */

/* What plans count on; runs do not. */
typedef struct rates {
  double flops, device_bytes, d2h_bytes, host_bytes;
  bool apart; /* copies beside compute, as on a card */
} rates;

static void write_machine(rates r) {
  const char *path = scratch_path("machine.json");
  FILE *file = fopen(path, "w");
  ck_assert_ptr_nonnull(file);
  fprintf(
      file,
      "{\"format\": \"flap machine 1\", \"machines\": [{\"device\": \"cpu\", \"name\": \"tests\", \"flops_bf16\": %g, "
      "\"flops_f32\": %g, \"device_bytes\": %g, \"h2d_bytes\": %g, \"d2h_bytes\": %g, \"host_bytes\": %g, "
      "\"launch_ns\": %d, \"copy_ns\": %d, \"disk_ns\": 10000, \"synchronous\": %s, \"shared_cores\": %d, "
      "\"disk_read_bytes\": 1e9, \"disk_write_bytes\": 1e9}]}\n",
      r.flops, r.flops, r.device_bytes, r.apart ? 1e9 : 1e10, r.d2h_bytes, r.host_bytes, r.apart ? 0 : 100,
      r.apart ? 0 : 1000, r.apart ? "false" : "true", r.apart ? 0 : 1);
  ck_assert_int_eq(fclose(file), 0);
  ck_assert_int_eq(setenv("FLAP_MACHINE", path, 1), 0);
}

static void write_files(void) {
  write_machine((rates){.flops = 1e11, .device_bytes = 1e10, .d2h_bytes = 1e10, .host_bytes = 1e10});
  FILE *file = fopen(scratch_path("text.txt"), "w");
  ck_assert_ptr_nonnull(file);
  for (int n = 0; n < 60; n++)
    fprintf(file, "The %dth line says that %d and %d make %d.\n", n, n, n + 1, 2 * n + 1);
  ck_assert_int_eq(fclose(file), 0);
  const bool memory = access("/dev/shm", R_OK | W_OK | X_OK) == 0;
  (void)snprintf(disk, sizeof disk, "%s/flap-save-XXXXXX", memory ? "/dev/shm" : "/tmp");
  ck_assert_ptr_nonnull(mkdtemp(disk));
}

/* Nothing dies here, so there is no need to wait for the disk. */
static int no_sync(int fd) {
  (void)fd;
  return 0;
}

static void setup(void) {
  static flap_system without_sync;
  without_sync = *flap_system_default();
  without_sync.sync = no_sync;
  (void)flap_system_replace(&without_sync);
  scratch_setup();
  write_files();
  flap_log_set_level(FLAP_LOG_ERROR);
}

static void teardown(void) {
  (void)rmdir(disk);
  scratch_teardown();
}

static flap_run_config config; /* it holds long paths */

static void configure(const numbers *n, const place *p, const char *out) {
  flap_run_config_defaults(&config);
  config.model = json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:b}", "model_type", "llama", "hidden_size", 32,
                           "intermediate_size", 64, "num_hidden_layers", 3, "num_attention_heads", 2,
                           "max_position_embeddings", 64, "tie_word_embeddings", (int)n->tied);
  (void)snprintf(config.tokenizer, sizeof config.tokenizer, "bytes");
  config.dataset[0] = strdup(scratch_path("text.txt"));
  config.dataset_count = 1;
  config.val_size = 2;
  config.cutoff_len = 16;
  config.per_device_train_batch_size = 1;
  config.gradient_accumulation_steps = 2;
  config.max_steps = STEPS;
  config.learning_rate = 1e-2;
  config.logging_steps = 1;
  config.save_strategy = FLAP_STRATEGY_STEPS;
  config.save_steps = 1000;
  config.save_total_limit = 0;
  config.save_only_model = p->only_model;
  config.export_final = false;
  config.overwrite_output_dir = true;
  config.device = FLAP_RUN_DEVICE_CPU;
  config.bf16 = !n->fp16;
  config.fp16 = n->fp16;
  config.fp16_init_scale = (double)(1 << 30);
  config.optim = n->optim;
  config.eval_steps = p->eval_steps;
  config.vram = p->vram;
  config.ram = p->ram;
  config.expert.threads = 1;
  config.expert.checkpoint_states = FLAP_RUN_STATES_COPIED; /* files can be compared then */
  config.expert.optimizer = p->optimizer;
  config.expert.update = p->sweep ? FLAP_UPDATE_SWEEP : p->backward ? FLAP_UPDATE_BACKWARD : FLAP_UPDATE_FOLD;
  config.max_grad_norm = p->backward && !p->twice ? 0 : 1e9; /* none is as large: the bits are the same */
  (void)snprintf(config.output_dir, sizeof config.output_dir, "%s", scratch_path(out));
  if (!p->disk)
    return;
  config.disk_count = 1;
  (void)snprintf(config.disk[0].path, sizeof config.disk[0].path, "%s", disk);
  config.disk[0].size = (flap_size)BYTES((uint64_t)16 << 20);
}

static flap_status train(void) {
  flap_train_result result;
  const flap_observer observer = {.stepped = note_step, .saved = note_saved};
  memset(seen.saved, 0, sizeof seen.saved);
  seen.stepped = 0;
  stop = 0;
  const flap_status status = flap_engine_train(&config, &observer, &stop, &result);
  flap_run_config_close(&config);
  return status;
}

static void must_train(const char *what) {
  const flap_status status = train();
  ck_assert_msg(status == FLAP_OK, "%s: %s", what, flap_error_message());
}

/* ---- comparing --------------------------------------------------------------------------------------------- */

/* Takes away what depends on how often a run has saved and where it lived: from `word` to the end of its line, and
 * so many lines behind it. */
static void forget(char *text, size_t *bytes, const char *word, int lines) {
  char *from = strstr(text, word);
  if (from == NULL)
    return;
  char *to = from + strcspn(from, "\n");
  for (int i = 0; i < lines; i++)
    to += 1 + strcspn(to + 1, "\n");
  memmove(from, to, *bytes - (size_t)(to - text) + 1);
  *bytes -= (size_t)(to - from);
}

static char *read_lasting(const char *path, size_t *bytes) {
  char *text = scratch_read(path, bytes);
  if (strstr(path, ".json") != NULL) {
    forget(text, bytes, "\"written_bytes\"", 0);
    forget(text, bytes, "\"trainer_state.json\"", 2); /* its size and its sum */
  }
  return text;
}

static void path_in(const char *folder, const char *name, char path_out[PATHS]) {
  const int length = snprintf(path_out, PATHS, "%s/%s", folder, name);
  ck_assert_int_lt(length, PATHS);
}

/* Every file of one folder is in the other, with the same bytes; but for the list of all files, if the other has more.
 */
static void must_be_in(const char *one, const char *other, bool all, const char *what) {
  DIR *folder = opendir(scratch_path(one));
  ck_assert_msg(folder != NULL, "%s: %s is not there", what, one);
  unsigned files = 0;
  for (const struct dirent *entry; (entry = readdir(folder)) != NULL;) {
    char here[PATHS], there[PATHS];
    size_t here_bytes = 0, there_bytes = 0;
    if (entry->d_name[0] == '.' || (!all && strcmp(entry->d_name, "checksums.json") == 0))
      continue;
    path_in(one, entry->d_name, here);
    path_in(other, entry->d_name, there);
    ck_assert_msg(scratch_exists(there), "%s: %s is missing", what, there);
    char *a = read_lasting(here, &here_bytes), *b = read_lasting(there, &there_bytes);
    ck_assert_msg(here_bytes == there_bytes && memcmp(a, b, here_bytes) == 0, "%s: %s differs from %s", what, there,
                  here);
    free(a);
    free(b);
    files++;
  }
  (void)closedir(folder);
  ck_assert_uint_ge(files, 4);
}

static void must_be_same(const char *one, const char *other, const char *what) {
  must_be_in(one, other, true, what);
  must_be_in(other, one, true, what);
}

static char *checkpoint(const char *out, uint64_t step, char path[PATHS]) {
  (void)snprintf(path, PATHS, "%s/checkpoint-%llu", out, (unsigned long long)step);
  return path;
}

/* ---- the same bytes ------------------------------------------------------------------------------------------ */

/* What runs save that are stopped after each step, at rest; or, as the last step but one is not stopped after, when it
 * rests for an evaluation. */
static void make_references(const numbers *n) {
  for (uint64_t step = 1; step <= STEPS; step++) {
    char out[32];
    (void)snprintf(out, sizeof out, "at-rest-%llu", (unsigned long long)step);
    configure(n, &PLACES[0], out);
    if (step == STEPS - 1)
      config.eval_steps = config.save_steps = step;
    else
      seen.stop_at = step;
    must_train(n->name);
    ck_assert_msg(seen.saved[step] == 1, "%s: %llu steps, not saved at %llu", out, (unsigned long long)seen.stepped,
                  (unsigned long long)step);
    seen.stop_at = 0;
  }
}

static void must_be_references(const place *p, const char *what) {
  char mine[PATHS], wanted[PATHS], reference[32];
  for (uint64_t step = 1; step <= STEPS; step++) {
    (void)snprintf(reference, sizeof reference, "at-rest-%llu", (unsigned long long)step);
    must_be_in(checkpoint("out", step, mine), checkpoint(reference, step, wanted), !p->only_model, what);
    if (!p->only_model)
      must_be_in(wanted, mine, true, what);
  }
}

/* A fold is judged by the program that makes it, so its checkpoint is told a step later; at the latest then. */
static void check_when_saved(const place *p, const char *what) {
  for (uint64_t step = 1; step <= STEPS; step++) {
    const bool rests = step == STEPS || (p->eval_steps > 0 && step % p->eval_steps == 0);
    ck_assert_msg(seen.saved[step] == 1, "%s: step %llu was saved %llu times", what, (unsigned long long)step,
                  (unsigned long long)seen.saved[step]);
    if (!rests && !p->sweep)
      ck_assert_msg(seen.stepped_at_save[step] == step + 1, "%s: step %llu was told to be saved after %llu steps", what,
                    (unsigned long long)step, (unsigned long long)seen.stepped_at_save[step]);
  }
}

static void resume(const numbers *n, const place *p, const char *what) {
  char from[PATHS], one[PATHS], other[PATHS];
  configure(n, p, "resumed");
  (void)snprintf(config.resume_from_checkpoint, sizeof config.resume_from_checkpoint, "%s",
                 scratch_path(checkpoint("out", 3, from)));
  config.overwrite_output_dir = false;
  config.save_steps = 1;
  must_train(what);
  must_be_same(checkpoint("out", STEPS, one), checkpoint("resumed", STEPS, other), what);
  must_be_same(checkpoint("out", 4, one), checkpoint("resumed", 4, other), what);
}

START_TEST(background_save_equals_one_at_rest_to_the_byte) {
  const numbers *n = &NUMBERS[_i];
  make_references(n);
  for (size_t i = (size_t)_i % PLACE_STRIDE; i < PLACE_COUNT; i += PLACE_STRIDE) {
    char what[256];
    const place *p = &PLACES[i];
    (void)snprintf(what, sizeof what, "%s, %s", n->name, p->name);
    configure(n, p, "out");
    config.save_steps = 1;
    must_train(what);
    must_be_references(p, what);
    check_when_saved(p, what);
    if (i == 0)
      resume(n, &PLACES[2], what);
  }
}
END_TEST

/* Step 2 is told to be saved between steps 3 and 4, just before step 3 begins to be saved. */
START_TEST(background_save_of_the_step_that_is_stopped_at_is_the_only_one) {
  char mine[PATHS], wanted[PATHS];
  const size_t places[] = {0, 1, 2, 6};
  const uint64_t stops[] = {3, 3, 3, 4}; /* a sweep is run to its end, which is a step more */
  configure(&NUMBERS[0], &PLACES[0], "at-rest-3");
  seen.stop_at = 3;
  must_train("at rest");
  seen.stop_at = 0;
  for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
    const char *what = PLACES[places[i]].name;
    configure(&NUMBERS[0], &PLACES[places[i]], "out");
    config.save_steps = 1;
    seen.stop_at_saved = 2;
    must_train(what);
    seen.stop_at_saved = 0;
    ck_assert_uint_eq(seen.stepped, stops[i]);
    for (uint64_t step = 1; step <= STEPS; step++)
      ck_assert_uint_eq(seen.saved[step], step <= stops[i] ? 1 : 0);
    must_be_same(checkpoint("at-rest-3", 3, wanted), checkpoint("out", 3, mine), what);
  }
}
END_TEST

/* ---- some parts updated in the backward, others in the next forward -------------------------------------------- */

static place mixed = {.name = "mixed", .ram = ROOMY, .backward = true, .optimizer = FLAP_OPTIMIZER_SPLIT};

static void configure_mixed(const numbers *n, const char *out, uint64_t save_steps) {
  configure(n, &mixed, out);
  config.expert.update = FLAP_UPDATE_AUTO; /* so that some of the parts may be folded */
  config.save_steps = save_steps;
}

/* No key asks for such a plan: it is chosen where the bus is the narrowest and both passes are needed as windows. So
 * machines are described until one is, for which it is. */
static void find_mixed(const numbers *n) {
  static const rates machines[] = {
      {2e11, 8.8e8, 1e9, 5.3e9, true},      {1.4e11, 3.6e8, 2e9, 1e9, true}, {4.66e10, 3.6e8, 0.585e9, 4e8, true},
      {1.4e11, 8.8e8, 2.17e9, 5.3e9, true}, {7e10, 3.6e8, 1e9, 4e8, true},   {3e10, 8.8e8, 0.6e9, 1e9, true},
  };
  const uint64_t least = (uint64_t)900 << 10; /* where the first two get one as this is written; each try is a plan */
  for (uint64_t vram = least; vram < 2 * least; vram += (uint64_t)20 << 10)
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++) {
      flap_plan plan;
      write_machine(machines[i]);
      mixed.vram = (flap_size)BYTES(vram);
      configure_mixed(n, "out", 1);
      const flap_status status = flap_engine_plan(&config, NULL, &plan);
      flap_run_config_close(&config);
      if (status == FLAP_OK && plan.backward_parts > 0 && plan.backward_parts < 5)
        return;
    }
  ck_abort_msg("%s: no machine gets a mixed plan: describe others", n->name);
}

static void must_be_at_rest(const char *out, uint64_t step, const char *what) {
  char mine[PATHS], wanted[PATHS], reference[32];
  (void)snprintf(reference, sizeof reference, "at-rest-%llu", (unsigned long long)step);
  must_be_same(checkpoint(out, step, mine), checkpoint(reference, step, wanted), what);
}

static void resume_mixed(const numbers *n, const char *out, const char *from) {
  configure_mixed(n, out, 1000);
  config.overwrite_output_dir = false;
  (void)snprintf(config.resume_from_checkpoint, sizeof config.resume_from_checkpoint, "%s", from);
  must_train("resumed");
}

/* Steps 1, 3 and 5 leave the updates of some parts pending; those that are saved rest, each and every other one. */
START_TEST(background_save_of_a_mixed_plan_equals_one_at_rest_to_the_byte) {
  const numbers *n = &NUMBERS[_i == 0 ? 0 : 3];
  make_references(n);
  find_mixed(n);
  for (uint64_t every = 1; every <= 2; every++) {
    configure_mixed(n, "out", every);
    must_train(mixed.name);
    for (uint64_t step = every; step <= STEPS; step += every) {
      ck_assert_uint_eq(seen.saved[step], 1);
      must_be_at_rest("out", step, mixed.name);
    }
  }
}
END_TEST

/* Stopped, the run makes the half that is pending by itself; killed, it goes on from the last that was saved. */
START_TEST(background_save_of_a_mixed_plan_goes_on_with_the_same_bits) {
  const numbers *n = &NUMBERS[_i == 0 ? 0 : 3];
  char from[PATHS];
  make_references(n);
  find_mixed(n);
  for (uint64_t step = 1; step + 1 < STEPS; step++) { /* behind the last but one the last is run as well */
    configure_mixed(n, "stopped", 1000);
    seen.stop_at = step;
    must_train("stopped");
    seen.stop_at = 0;
    must_be_at_rest("stopped", step, "stopped");
    char *folder = strdup(scratch_path(checkpoint("stopped", step, from)));
    resume_mixed(n, "stopped", folder);
    free(folder);
    must_be_at_rest("stopped", STEPS, "stopped and resumed");
  }
  for (uint64_t step = 3; step <= 5; step += 2) { /* beside the write of the checkpoint before, or behind it */
    configure_mixed(n, "killed", 2);
    seen.kill_at = step;
    const pid_t child = fork();
    if (child == 0) {
      (void)train();
      _exit(1);
    }
    int how = 0;
    ck_assert_int_eq(waitpid(child, &how, 0), child);
    ck_assert(WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL);
    flap_run_config_close(&config);
    seen.kill_at = 0;
    const bool is_saved = scratch_exists(checkpoint("killed", 2, from));
    ck_assert(is_saved || step == 3); /* one at a time: the second waits for the first */
    if (!is_saved)
      continue;
    resume_mixed(n, "killed", "true");
    must_be_at_rest("killed", STEPS, "killed and resumed");
  }
}
END_TEST

/* ---- what must not become a checkpoint -------------------------------------------------------------------------- */

static void train_with(double learning_rate, size_t where) {
  configure(&NUMBERS[0], &PLACES[where], "out");
  config.save_steps = 1;
  config.learning_rate = learning_rate;
  const flap_status status = train();
  ck_assert_msg(status == FLAP_NUMERIC, "%s", flap_error_message());
}

/* The update of step 1 makes weights infinite. That is found out when the program that it is folded into ends, and the
 * loss of step 2 may tell before: by then all files of the checkpoint may be there. */
/* ---- what is shared -------------------------------------------------------------------------------------------- */

static uint32_t read_back; /* how many checkpoints the one that saves has read */

flap_status __real_flap_state_pages_verify(const char *folder, bool shared);
flap_status __wrap_flap_state_pages_verify(const char *folder, bool shared);

flap_status __wrap_flap_state_pages_verify(const char *folder, bool shared) {
  const flap_status status = __real_flap_state_pages_verify(folder, shared);
  read_back += shared && status == FLAP_OK;
  return status;
}

/* Without that what a step reads proves nothing, and all are read back. */
static bool reads_past_the_cache(const char *folder) {
  char *page = aligned_alloc(FLAP_BLOCK_ALIGN, FLAP_BLOCK_ALIGN);
  const int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  ck_assert(page != NULL && fd >= 0 && ftruncate(fd, FLAP_BLOCK_ALIGN) == 0);
  const bool works = fcntl(fd, F_SETFL, O_RDWR | O_DIRECT) == 0 && pread(fd, page, FLAP_BLOCK_ALIGN, 0) > 0;
  close(fd);
  free(page);
  return works;
}

/* The update that a step leaves is read by the next one or, where it is folded into that, by the one behind it. Who
 * cannot wait for that reads it, and so does who saves at rest. (A step that rests makes its own update too.) */
START_TEST(background_save_is_read_by_a_step_where_one_follows) {
  static const struct {
    size_t place;
    uint64_t save_steps, eval_steps;
    uint32_t read_back;
  } cases[] = {{2, 1, 0, STEPS - 1}, {2, 2, 0, 1}, {2, 3, 0, 1}, {2, 2, 3, 1}, {8, 1, 0, 1}, {8, 2, 0, 1}};
  if (!flap_block_can_link(scratch_path(""), scratch_path("")) || !reads_past_the_cache(scratch_path("")))
    return;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const place *p = &PLACES[cases[i].place];
    configure(&NUMBERS[0], p, "out");
    (void)snprintf(config.disk[0].path, sizeof config.disk[0].path, "%s", scratch_path(""));
    config.expert.checkpoint_states = FLAP_RUN_STATES_AUTO;
    config.save_steps = cases[i].save_steps;
    config.eval_steps = cases[i].eval_steps;
    read_back = 0;
    must_train(p->name);
    ck_assert_msg(read_back == cases[i].read_back, "%s, every %llu: %u were read back, not %u", p->name,
                  (unsigned long long)cases[i].save_steps, read_back, cases[i].read_back);
    for (uint64_t step = 1; step <= STEPS; step++)
      ck_assert_uint_eq(seen.saved[step], step % cases[i].save_steps == 0);
  }
}
END_TEST

START_TEST(background_save_of_a_bad_update_is_given_up) {
  char path[PATHS];
  for (size_t i = 0; i < 3; i++) {
    train_with(1e39, i);
    ck_assert(!scratch_exists(checkpoint("out", 1, path)));
    strcat(path, ".tmp");
    ck_assert(!scratch_exists(path));
    ck_assert_uint_eq(seen.saved[1], 0);
  }
}
END_TEST

/* It makes them very large: they can be saved, but the next loss is not finite. */
START_TEST(background_save_is_finished_when_the_next_step_fails) {
  char path[PATHS];
  for (size_t i = 0; i < 3; i++) {
    train_with(1e37, i);
    ck_assert_msg(strstr(flap_error_message(), "step 2: ") != NULL, "%s", flap_error_message());
    ck_assert(scratch_exists(checkpoint("out", 1, path)));
    ck_assert_uint_eq(seen.saved[1], 1);
  }
}
END_TEST

START_TEST(background_save_that_cannot_be_written_ends_the_run_and_keeps_the_last) {
  char path[PATHS], blocked[PATHS + 16];
  configure(&NUMBERS[0], &PLACES[2], "out");
  config.save_steps = 1;
  config.overwrite_output_dir = false;
  ck_assert_int_eq(mkdir(scratch_path("out"), 0700), 0);
  /* Nobody can make a folder of a name that holds what is not FLAP's to remove. */
  (void)snprintf(blocked, sizeof blocked, "%s.tmp", checkpoint("out", 3, path));
  for (int depth = 0; depth < 4; depth++) {
    ck_assert_int_eq(mkdir(scratch_path(blocked), 0700), 0);
    strcat(blocked, "/a");
  }
  const flap_status status = train();
  ck_assert_msg(status != FLAP_OK, "it trained on");
  ck_assert_msg(strstr(flap_error_message(), "checkpoint-3") != NULL, "%s", flap_error_message());
  ck_assert_uint_eq(seen.saved[2], 1);
  ck_assert_uint_eq(seen.saved[3], 0);
  ck_assert_uint_le(seen.stepped, 4);
  ck_assert(scratch_exists(checkpoint("out", 2, path)));
  ck_assert(!scratch_exists(checkpoint("out", 3, path)));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("background_save");
  tcase_set_timeout(tests, 300);
  tcase_add_checked_fixture(tests, setup, teardown);
  tcase_add_loop_test(tests, background_save_equals_one_at_rest_to_the_byte, 0, NUMBER_COUNT);
  tcase_add_test(tests, background_save_of_the_step_that_is_stopped_at_is_the_only_one);
  tcase_add_loop_test(tests, background_save_of_a_mixed_plan_equals_one_at_rest_to_the_byte, 0, MIXED_COUNT);
  tcase_add_loop_test(tests, background_save_of_a_mixed_plan_goes_on_with_the_same_bits, 0, MIXED_COUNT);
  tcase_add_test(tests, background_save_is_read_by_a_step_where_one_follows);
  tcase_add_test(tests, background_save_of_a_bad_update_is_given_up);
  tcase_add_test(tests, background_save_is_finished_when_the_next_step_fails);
  tcase_add_test(tests, background_save_that_cannot_be_written_ends_the_run_and_keeps_the_last);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
