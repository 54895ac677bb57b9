#include "tests/engine/planner_trials.h"

#include "base/philox.h"
#include "base/units.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
#define PLENTY_VRAM ((uint64_t)1 << 30)

typedef struct source {
  flap_philox stream;
  uint64_t drawn;
} source;

/* From low to high, both included. */
static uint32_t between(source *s, uint32_t low, uint32_t high) {
  return low + (uint32_t)flap_philox_below(&s->stream, s->drawn++, high - low + 1);
}
static bool one_in(source *s, uint32_t count) {
  return between(s, 1, count) == 1;
}
/* As often between 1 and 2 as between 2 and 4. */
static double between_powers(source *s, double low, double high) {
  return low * pow(high / low, between(s, 0, 1000) / 1000.0);
}

static void draw_model(source *s, planner_trial *t, uint32_t layers) {
  t->model = (flap_model_config){.family = flap_model_find_family("llama"),
                                 .vocab_size = 64 * between(s, 1, 16),
                                 .hidden_size = 64 * between(s, 1, 2),
                                 .intermediate_size = 64 * between(s, 2, 5),
                                 .num_hidden_layers = between(s, 2, layers),
                                 .num_attention_heads = 4,
                                 .num_key_value_heads = 2,
                                 .max_position_embeddings = 256,
                                 .rms_norm_eps = 1e-5,
                                 .initializer_range = 0.1,
                                 .tie_word_embeddings = one_in(s, 2),
                                 .rope = {.theta = 10000}};
  MUST(flap_model_finish_config(&t->model));
}

static void draw_spec(source *s, planner_trial *t, uint32_t micro_batches) {
  t->planner.spec = (flap_setup_spec){.model = &t->model,
                                      .shape = {.dtype = FLAP_BF16, .batch = between(s, 1, 2)},
                                      .mode = FLAP_MODE_TRAIN,
                                      .gradient_dtype = one_in(s, 4) ? FLAP_F32 : FLAP_BF16,
                                      .optim = one_in(s, 4) ? FLAP_OPTIM_ADAMW_8BIT : FLAP_OPTIM_ADAMW,
                                      .micro_batches = between(s, 1, micro_batches),
                                      .threads = 2,
                                      .device = one_in(s, 2) ? FLAP_DEVICE_CUDA : FLAP_DEVICE_CPU,
                                      .io = FLAP_BLOCK_SIM,
                                      .disk_count = one_in(s, 2),
                                      .disk_paths = {"disk"}};
  t->planner.spec.shape.sequence = 16 * between(s, 2, 10);
}

/* A bus of a gigabyte a second; computing a step takes from a fourth to four times as long as all states do on it. */
static void draw_machine(source *s, planner_trial *t) {
  const flap_setup_spec *spec = &t->planner.spec;
  const double parameters = (double)flap_model_parameters(&t->model);
  const double tokens = (double)spec->shape.batch * spec->shape.sequence * spec->micro_batches;
  const double h2d = 1e9, seconds = 12 * parameters / h2d * between_powers(s, 0.25, 4);
  flap_machine *m = &t->machine;
  flap_device_default_machine(spec->device, m);
  m->flops_bf16 = m->flops_f32 = 6 * parameters * tokens / seconds;
  m->device_bytes = h2d * between_powers(s, 10, 60);
  m->h2d_bytes = h2d;
  m->d2h_bytes = h2d * between_powers(s, 0.5, 1.2);
  m->h2d_both_bytes = one_in(s, 2) ? 0 : h2d * between_powers(s, 0.6, 1);
  m->d2h_both_bytes = m->h2d_both_bytes > 0 ? m->d2h_bytes * between_powers(s, 0.6, 1) : 0;
  m->disk_read_bytes = h2d * between_powers(s, 0.1, 1);
  m->disk_write_bytes = h2d * between_powers(s, 0.1, 1);
  m->disk_both_bytes = one_in(s, 2) ? 0 : fmax(m->disk_read_bytes, m->disk_write_bytes) * between_powers(s, 1, 1.5);
  m->host_bytes = h2d * between_powers(s, 1, 8);
  m->launch_ns = between(s, 0, 2) * 500;
  m->copy_ns = between(s, 0, 3) * 1000;
  m->disk_ns = between(s, 0, 3) * 10000;
  m->synchronous = spec->device == FLAP_DEVICE_CPU;
  m->shared_cores = 0; /* lanes of their own: what shares the cores is another test's */
  m->overhead_bytes = 0;
}

/* Between the least and what has everything in VRAM, and of RAM likewise; a disk has room for all. */
static void draw_budgets(source *s, planner_trial *t) {
  flap_budgets *b = &t->budgets;
  uint64_t least = 0;
  *b = (flap_budgets){.vram_bytes = PLENTY_VRAM, .ram_bytes = PLENTY_VRAM};
  b->disk_bytes[0] = t->planner.spec.disk_count > 0 ? PLENTY_VRAM : 0;
  flap_setup setup;
  flap_plan_costs costs;
  MUST(flap_planner_choose(&t->planner, b, &setup, &costs));
  const uint64_t vram_most = setup.vram_bytes, regions = setup.sizes.vram_bytes;
  flap_setup_close(&setup);
  MUST(flap_planner_vram_min(&t->planner, b, &least));
  b->vram_bytes = least + (uint64_t)((double)(vram_most - least) * between(s, 0, 100) / 100.0);
  if (t->planner.spec.disk_count == 0)
    return;
  MUST(flap_planner_ram_min(&t->planner, b, &least));
  b->ram_bytes = least + (uint64_t)((double)regions * between(s, 0, 120) / 100.0);
}

void planner_trial_open(planner_trial *t, uint64_t seed, uint32_t layers, uint32_t micro_batches, bool needs_no_norm) {
  source s = {.stream = flap_philox_stream(seed, "planner trial")};
  memset(t, 0, sizeof *t);
  t->seed = seed;
  draw_model(&s, t, layers);
  draw_spec(&s, t, micro_batches);
  t->planner.spec.needs_no_norm = needs_no_norm;
  draw_machine(&s, t);
  t->planner.machine = &t->machine;
  MUST(planner_times(&t->planner, &t->times));
  t->planner.times = &t->times;
  draw_budgets(&s, t);
  const flap_setup_spec *spec = &t->planner.spec;
  (void)snprintf(t->words, sizeof t->words,
                 "seed %llu: %u layers of %u, %u micro-batches of %u tokens, %s%s%s, vram %.2f MiB, ram %.2f MiB",
                 (unsigned long long)seed, t->model.num_hidden_layers, t->model.hidden_size, spec->micro_batches,
                 spec->shape.batch * spec->shape.sequence, spec->device == FLAP_DEVICE_CUDA ? "card" : "cpu",
                 spec->disk_count > 0 ? ", a disk" : "", needs_no_norm ? ", nothing clipped" : "",
                 (double)t->budgets.vram_bytes / (double)FLAP_MIB, (double)t->budgets.ram_bytes / (double)FLAP_MIB);
}
