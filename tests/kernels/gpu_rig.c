#include "tests/kernels/gpu_rig.h"

#include "base/units.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUARD_BYTES 4096u
#define GUARD 0x5au
#define OPERANDS_BYTES ((uint64_t)1 << 30)
#define VRAM ((uint64_t)4 << 30)

/* ---- fp16 on the host ---- */

double gpu_ulp(flap_dtype dtype) {
  return rig_ulp(dtype);
}

/* ---- the rig ---- */

/* What a failed test left open: its memory is needed by the next one. */
static flap_device *left_device;
static flap_ops *left_ops;

static void close_left(void) {
  flap_ops_close(left_ops);
  flap_device_close(left_device);
  left_ops = NULL;
  left_device = NULL;
}

static flap_status open_device(flap_device **device_out) {
  const flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = VRAM, .events_max = 4};
  return flap_device_open(&config, device_out);
}

/* A GPU that cannot be used, for it is in use, say, is no reason to skip its tests. */
bool gpu_rig_there(void) {
  flap_device *device = NULL;
  const flap_status status = open_device(&device);
  if (status == FLAP_NOT_FOUND || status == FLAP_UNSUPPORTED) {
    printf("skipped: %s\n", flap_error_message());
    return false;
  }
  if (status != FLAP_OK) {
    printf("Error: %s\n", flap_error_message());
    exit(EXIT_FAILURE);
  }
  printf("%s\n", flap_device_describe(device));
  flap_device_close(device);
  return true;
}

int gpu_rig_main(Suite *suite) {
  (void)rig_seed();
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

static void download(const gpu_rig *g, void *to, const void *from, uint64_t bytes) {
  if (flap_device_download(g->device, to, from, bytes) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
}

static void upload(const gpu_rig *g, void *to, const void *from, uint64_t bytes) {
  if (flap_device_upload(g->device, to, from, bytes) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
}

static void fill(const gpu_rig *g, unsigned char *to, unsigned char value, uint64_t bytes) {
  unsigned char *from = rig_bytes(bytes);
  memset(from, value, bytes);
  upload(g, to, from, bytes);
  free(from);
}

static void check_guard(const gpu_rig *g, const unsigned char *from) {
  unsigned char bytes[GUARD_BYTES];
  download(g, bytes, from, sizeof bytes);
  for (size_t i = 0; i < sizeof bytes; ++i)
    if (bytes[i] != GUARD)
      ck_abort_msg("byte %zu of a guard was written, %llu bytes into the arena (seed %llu)", i,
                   (unsigned long long)(from - g->arena), (unsigned long long)rig_seed());
}

void gpu_rig_open(gpu_rig *g, const flap_ops_limits *limits) {
  close_left();
  memset(g, 0, sizeof *g);
  g->dtype = limits->dtype;
  rig_open(&g->cpu, limits, 2);
  if (open_device(&g->device) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  left_device = g->device;
  g->arena = flap_device_arena(g->device, &g->arena_bytes);
  g->workspace_bytes = flap_ops_workspace_bytes(FLAP_DEVICE_CUDA, limits);
  ck_assert_uint_le(2 * GUARD_BYTES + g->workspace_bytes + OPERANDS_BYTES, g->arena_bytes);
  fill(g, g->arena, GUARD, GUARD_BYTES);
  fill(g, g->arena + GUARD_BYTES, 0xff, g->workspace_bytes); /* NaN, in case anybody reads before writing */
  fill(g, g->arena + GUARD_BYTES + g->workspace_bytes, GUARD, GUARD_BYTES);
  if (flap_ops_open(g->device, limits, g->arena + GUARD_BYTES, &g->ops) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  left_ops = g->ops;
  gpu_rig_clear(g);
}

static uint64_t operands_start(const gpu_rig *g) {
  return 2 * GUARD_BYTES + g->workspace_bytes;
}

void gpu_rig_clear(gpu_rig *g) {
  check_guard(g, g->arena);
  check_guard(g, g->arena + GUARD_BYTES + g->workspace_bytes);
  g->used = operands_start(g);
}

void gpu_rig_close(gpu_rig *g) {
  gpu_rig_clear(g);
  if (flap_device_synchronize(g->device) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  /* What was loaded meanwhile came out of what the arena left of the budget. */
  const uint64_t peak = flap_device_memory_peak(g->device);
  printf("charged %llu MiB of %llu MiB\n", (unsigned long long)(peak >> 20), (unsigned long long)(VRAM >> 20));
  ck_assert_uint_le(peak, VRAM);
  close_left();
  rig_close(&g->cpu);
}

/* ---- operands ---- */

static operand operand_make(gpu_rig *g, flap_dtype dtype, uint64_t count, uint32_t shift) {
  operand o = {.rig = g, .dtype = dtype, .count = count};
  const uint64_t bytes = count * flap_dtype_bytes(dtype);
  g->used = flap_units_round_up(g->used, 4096);
  ck_assert_uint_le(g->used + 3 * GUARD_BYTES + bytes, g->arena_bytes);
  unsigned char *start = g->arena + g->used + GUARD_BYTES + shift * flap_dtype_bytes(dtype);
  fill(g, start - GUARD_BYTES, GUARD, GUARD_BYTES);
  fill(g, start + bytes, GUARD, GUARD_BYTES);
  g->used += 3 * GUARD_BYTES + bytes;
  o.gpu = start;
  return o;
}

static void to_gpu(operand *o) {
  upload(o->rig, o->gpu, o->cpu, operand_size(o));
}

operand operand_normal(gpu_rig *g, rig_random *random, flap_dtype dtype, uint64_t count, double scale, uint32_t shift) {
  operand o = operand_make(g, dtype, count, shift);
  o.cpu = rig_normal(random, dtype, count, scale);
  to_gpu(&o);
  return o;
}

operand operand_empty(gpu_rig *g, flap_dtype dtype, uint64_t count, uint32_t shift) {
  operand o = operand_make(g, dtype, count, shift);
  o.cpu = rig_bytes(count * flap_dtype_bytes(dtype));
  fill(g, o.gpu, 0xa5, operand_size(&o));
  return o;
}

operand operand_of(gpu_rig *g, flap_dtype dtype, const void *values, uint64_t count) {
  operand o = operand_make(g, dtype, count, 0);
  o.cpu = rig_copy(values, count * flap_dtype_bytes(dtype));
  to_gpu(&o);
  return o;
}

operand operand_copy(const operand *from, uint32_t shift) {
  operand o = operand_make(from->rig, from->dtype, from->count, shift);
  o.cpu = rig_copy(from->cpu, from->count * flap_dtype_bytes(from->dtype));
  void *bytes = operand_bytes(from);
  upload(o.rig, o.gpu, bytes, operand_size(&o));
  free(bytes);
  return o;
}

/* Also checks that nobody wrote beside the operand. */
void operand_free(operand *o) {
  check_guard(o->rig, (unsigned char *)o->gpu - GUARD_BYTES);
  check_guard(o->rig, (unsigned char *)o->gpu + operand_size(o));
  free(o->cpu);
  o->cpu = NULL;
}

uint64_t operand_size(const operand *o) {
  return o->count * flap_dtype_bytes(o->dtype);
}

void *operand_bytes(const operand *o) {
  void *bytes = rig_bytes(operand_size(o));
  download(o->rig, bytes, o->gpu, operand_size(o));
  return bytes;
}

void operand_near(const char *what, const operand *o, double relative, double absolute) {
  void *bytes = operand_bytes(o);
  for (uint64_t i = 0; i < o->count; ++i)
    rig_near(what, i, rig_at(o->dtype, bytes, i), rig_at(o->dtype, o->cpu, i), relative, absolute);
  free(bytes);
}

void operand_same(const char *what, const operand *o) {
  void *bytes = operand_bytes(o);
  rig_same(what, bytes, o->cpu, operand_size(o));
  free(bytes);
}

void operands_equal(const char *what, const operand *a, const operand *b) {
  void *left = operand_bytes(a), *right = operand_bytes(b);
  rig_same(what, left, right, operand_size(a));
  free(left), free(right);
}
