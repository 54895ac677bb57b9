/* Nothing is taken in the step loop: no allocation by FLAP's code, no thread, no file descriptor, once the run is open
 * and the first step has been. The linker sends FLAP's calls of malloc and its kin to the counters here; those of other
 * libraries, which may keep small buffers, are not counted.
 *
 * Check's own assertions allocate, so the loop compares numbers and the assertions come after it.
 */
#include "tests/engine/engine_rig.h"

#include "base/units.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- counters -------------------------------------------------------------------------------------------- */

static _Atomic uint64_t allocations, allocated_bytes, frees;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__real_aligned_alloc(size_t align, size_t bytes);
int __real_posix_memalign(void **memory, size_t align, size_t bytes);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, long offset);
void __real_free(void *memory);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__wrap_aligned_alloc(size_t align, size_t bytes);
int __wrap_posix_memalign(void **memory, size_t align, size_t bytes);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, long offset);
void __wrap_free(void *memory);

/* The heap's; arenas are mappings, larger than they are by what aligns them. */
static void count(size_t bytes) {
  allocations++;
  allocated_bytes += bytes;
}
void *__wrap_malloc(size_t bytes) {
  count(bytes);
  return __real_malloc(bytes);
}
void *__wrap_calloc(size_t elements, size_t bytes) {
  count(elements * bytes);
  return __real_calloc(elements, bytes);
}
void *__wrap_realloc(void *memory, size_t bytes) {
  count(bytes);
  return __real_realloc(memory, bytes);
}
void *__wrap_aligned_alloc(size_t align, size_t bytes) {
  count(bytes);
  return __real_aligned_alloc(align, bytes);
}
int __wrap_posix_memalign(void **memory, size_t align, size_t bytes) {
  count(bytes);
  return __real_posix_memalign(memory, align, bytes);
}
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, long offset) {
  allocations++;
  return __real_mmap(at, bytes, protection, flags, fd, offset);
}
void __wrap_free(void *memory) {
  frees += memory != NULL;
  __real_free(memory);
}

static bool is_ring_worker(const char *task) {
  char path[64], name[32] = "";
  (void)snprintf(path, sizeof path, "/proc/self/task/%.20s/comm", task);
  const int fd = open(path, O_RDONLY);
  const ssize_t length = fd < 0 ? -1 : read(fd, name, sizeof name - 1);
  if (fd >= 0)
    (void)close(fd);
  return length <= 0 || strncmp(name, "iou-", 4) == 0;
}

/* `tasks`: without those that the kernel lends to an io_uring, which come and go. */
static uint32_t entries_of(const char *path, bool tasks) {
  uint32_t entries = 0;
  DIR *folder = opendir(path);
  for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;)
    entries += entry->d_name[0] != '.' && !(tasks && is_ring_worker(entry->d_name));
  if (folder != NULL)
    (void)closedir(folder);
  return entries;
}

/* ---- what is in use -------------------------------------------------------------------------------------- */

typedef struct usage {
  uint64_t allocations, frees;
  uint32_t threads, descriptors;
} usage;

static usage look(void) {
  /* The folders first: reading them is this test's own use. */
  usage u = {.threads = entries_of("/proc/self/task", true), .descriptors = entries_of("/proc/self/fd", false)};
  u.allocations = allocations;
  u.frees = frees;
  return u;
}

/* ---- runs ------------------------------------------------------------------------------------------------ */

typedef struct way {
  const char *name;
  bool from_disk, sweep;
  flap_block_backend io;
  uint32_t saved, group;
  uint32_t mask;           /* of saved tensors; 0: all */
  uint32_t backward, host; /* parts */
} way;

static const way WAYS[] = {
    {.name = "ram, folded"},
    {.name = "ram, sweep, saved layers", .sweep = true, .saved = 2},
    {.name = "io_uring, folded", .from_disk = true, .io = FLAP_BLOCK_URING, .group = 1},
    {.name = "ram, saved attention", .saved = 2, .mask = 0x06},
    {.name = "disk, all saved but the mlp", .from_disk = true, .saved = 2, .mask = 0x1f},
    {.name = "io threads, folded", .from_disk = true, .io = FLAP_BLOCK_THREADS, .saved = 2},
    {.name = "ram, in the backward", .backward = 4},
    {.name = "io_uring, most in the backward, half by the host",
     .from_disk = true,
     .io = FLAP_BLOCK_URING,
     .backward = 3,
     .host = 2},
    {.name = "io_uring, sweep", .from_disk = true, .sweep = true, .io = FLAP_BLOCK_URING},
};
#define WAY_COUNT ((int)(sizeof WAYS / sizeof *WAYS))
#define STEPS 12u
#define HANDLES (256 * FLAP_KIB) /* most of it: the queues of copies and events of two copy streams */

static void open_way(engine_rig *rig, const rig_model *model, const way *w) {
  flap_choice choice = rig_choice_streaming(model, w->from_disk);
  choice.segment_layers = 1;
  choice.sweep = w->sweep;
  choice.saved_layers = w->saved;
  if (w->mask != 0)
    choice.saved_mask = w->mask;
  choice.trace_events = 4096;
  choice.backward_parts = choice.host_backward_parts = w->backward;
  choice.spread = w->backward > 0;
  choice.host_parts = w->host;
  if (w->group > 0)
    choice.group_micro_batches = w->group;
  rig_begin(rig, model, &(rig_place){.threads = 2, .io = w->io, .disks = w->from_disk ? 1 : 0});
  rig_open_choice(rig, &choice);
}

/* All that a run's loop does: steps with the next one begun, and now and then a rest with an evaluation, or a stop that
 * leaves an update for a program of its own. */
static flap_status loop(engine_rig *rig, uint32_t first, uint32_t end) {
  flap_executor *x = &rig->runtime.executor;
  const bool sweep = !flap_setup_folds(&rig->setup);
  const rig_model *model = rig->model;
  const uint64_t tokens = (uint64_t)model->shape.batch * model->shape.sequence * model->micro_batches;
  flap_executor_result result;
  for (uint32_t step = first; step < end; step++) {
    const flap_executor_input input = {.tokens = model->tokens + step * tokens,
                                       .targets = model->targets + step * tokens,
                                       .counted = tokens,
                                       .step = step,
                                       .learning_rate = 1e-3};
    const bool begins = step == first, rests = step + 1 == end;
    if (begins)
      FLAP_TRY(flap_executor_begin(x, sweep ? FLAP_SETUP_SINGLE : FLAP_SETUP_FIRST));
    if (!rests)
      FLAP_TRY(flap_executor_begin(x, sweep             ? FLAP_SETUP_SINGLE
                                      : step + 2 == end ? FLAP_SETUP_LAST
                                                        : FLAP_SETUP_STEADY));
    FLAP_TRY(flap_executor_run(x, &input, &result));
    if (!rests)
      continue;
    FLAP_TRY(flap_executor_begin(x, FLAP_SETUP_FORWARD));
    FLAP_TRY(flap_executor_run(x, &input, &result));
    FLAP_TRY(flap_executor_begin(x, sweep ? FLAP_SETUP_SINGLE : FLAP_SETUP_FIRST));
    FLAP_TRY(flap_executor_run(x, &input, &result));
    if (!sweep) {
      FLAP_TRY(flap_executor_begin(x, FLAP_SETUP_SWEEP));
      FLAP_TRY(flap_executor_run(x, &input, &result));
    }
    FLAP_TRY(flap_pager_settle(rig->runtime.pager));
  }
  return FLAP_OK;
}

START_TEST(steps_take_nothing) {
  const way *w = &WAYS[_i];
  rig_model model;
  engine_rig rig;
  rig_model_small(&model);
  model.options.max_steps = STEPS;
  model.options.max_grad_norm = w->backward > 0 ? 0 : 1;
  rig_model_random_data(&model);
  open_way(&rig, &model, w);
  MUST(loop(&rig, 0, 2)); /* the first steps; libraries warm up */
  (void)look();
  const usage before = look();
  flap_status status = loop(&rig, 2, STEPS / 2);
  const usage halfway = look();
  if (status == FLAP_OK)
    status = loop(&rig, STEPS / 2, STEPS);
  const usage after = look();
  ck_assert_msg(status == FLAP_OK, "%s: %s", w->name, flap_error_message());
  ck_assert_msg(after.allocations == before.allocations, "%s: %llu allocations in the step loop", w->name,
                (unsigned long long)(after.allocations - before.allocations));
  ck_assert_msg(after.frees == before.frees, "%s: %llu frees in the step loop", w->name,
                (unsigned long long)(after.frees - before.frees));
  ck_assert_uint_eq(halfway.threads, before.threads);
  ck_assert_uint_eq(after.threads, before.threads);
  ck_assert_uint_eq(halfway.descriptors, before.descriptors);
  ck_assert_uint_eq(after.descriptors, before.descriptors);
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

/* Otherwise the test above could not fail. */
START_TEST(the_counters_count) {
  rig_model model;
  engine_rig rig;
  rig_model_small(&model);
  open_way(&rig, &model, &WAYS[2]); /* once for nothing: OpenBLAS starts threads that stay */
  rig_close(&rig);
  const usage before = look();
  rig_model_random_data(&model);
  const usage between = look();
  ck_assert_uint_ge(between.allocations, before.allocations + 2);
  open_way(&rig, &model, &WAYS[2]);
  const usage open = look();
  ck_assert_uint_gt(open.allocations, between.allocations);
  ck_assert_uint_gt(open.threads, before.threads);
  ck_assert_uint_gt(open.descriptors, before.descriptors);
  rig_close(&rig);
  usage closed = look();
  for (int tries = 0; tries < 1000 && closed.threads != before.threads; tries++) {
    (void)usleep(1000); /* a thread that was joined is still on its way out */
    closed = look();
  }
  ck_assert_uint_eq(closed.threads, before.threads);
  ck_assert_uint_eq(closed.descriptors, before.descriptors);
  rig_model_close(&model);
}
END_TEST

/* Beside its two arenas (ram, and the vram of a device that is this host) a run takes from the heap what the block
 * files were measured to take, and handles. */
START_TEST(open_takes_the_arenas_and_little_more) {
  const way *w = &WAYS[_i];
  rig_model model;
  engine_rig rig;
  flap_setup setup;
  rig_model_small(&model);
  rig_model_random_data(&model);
  flap_choice choice = rig_choice_streaming(&model, w->from_disk);
  choice.trace_events = 1024;
  choice.ram_bytes /= w->from_disk ? 2 : 1;
  rig_begin(&rig, &model, &(rig_place){.threads = 2, .io = w->io, .disks = w->from_disk ? 1 : 0});
  MUST(flap_setup_build(&rig.spec, &choice, &setup));
  const flap_budgets budgets = {.vram_bytes = setup.vram_bytes, .disk_bytes = {setup.disk_bytes}};
  const flap_runtime_config config = {
      .vram_bytes = budgets.vram_bytes, .optimizer = &model.options, .disk_bytes = {setup.disk_bytes}};
  flap_runtime runtime;
  const uint64_t before = allocated_bytes;
  MUST(flap_runtime_open(&setup, &config, &runtime));
  const uint64_t taken = allocated_bytes - before, predicted = setup.ram_bytes - setup.ram_arena_bytes;
  ck_assert_msg(taken <= predicted + HANDLES, "%s: %llu bytes taken, %llu predicted", w->name,
                (unsigned long long)taken, (unsigned long long)predicted);
  ck_assert_uint_ge(taken, predicted / 2);
  ck_assert_uint_eq(flap_device_memory_peak(flap_pager_device(runtime.pager)), setup.vram_bytes);
  flap_runtime_close(&runtime);
  flap_setup_close(&setup);
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine_steady");
  TCase *tests = tcase_create("steady");
  tcase_set_timeout(tests, 60);
  tcase_add_test(tests, the_counters_count);
  tcase_add_loop_test(tests, steps_take_nothing, 0, WAY_COUNT);
  tcase_add_loop_test(tests, open_takes_the_arenas_and_little_more, 0, WAY_COUNT);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
