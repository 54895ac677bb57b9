/* Random models under random budgets. For each: the planner's plan runs, takes exactly what it said and moves exactly
 * what it said; its bits are those of the run that has everything in VRAM; the least budgets that the planner names are
 * accepted, a page less is refused with a message that names the budget and a size that works; and more is never
 * refused where less is accepted.
 *
 * FLAP_TEST_SEED repeats a run, FLAP_TEST_CASE one case of it; a failure prints both.
 */
#include "tests/engine/engine_rig.h"

#include "base/philox.h"
#include "base/units.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CHUNKS 8
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CASES_PER_CHUNK 1u /* several times slower */
#else
#define CASES_PER_CHUNK 9u
#endif
#define STEPS 4u
#define VOCABULARY_MAX 300u
#define PAGE FLAP_BLOCK_ALIGN
#define PLENTY_RAM (256 * FLAP_MIB)
#define RAM_INEXACT (256 * FLAP_KIB)
#define PLENTY_DISK (UINT64_MAX / 64)

/* ---- randomness ------------------------------------------------------------------------------------------ */

static uint64_t seed;
static char (*present)[512]; /* of each chunk, the case in work; shared with the parent, which prints it */
static int chunk;

typedef struct random_source {
  flap_philox stream;
  uint64_t drawn;
} random_source;

/* From low to high, both included. */
static uint32_t between(random_source *r, uint32_t low, uint32_t high) {
  return low + (uint32_t)flap_philox_below(&r->stream, r->drawn++, high - low + 1);
}

static bool one_in(random_source *r, uint32_t count) {
  return between(r, 1, count) == 1;
}

/* Between least and most, more often near the least. */
static uint64_t budget_between(random_source *r, uint64_t least, uint64_t most) {
  const uint64_t share = (uint64_t)between(r, 0, 1000) * between(r, 0, 1000);
  return most <= least ? least : least + (most - least) / 1000000 * share;
}

/* ---- a case ---------------------------------------------------------------------------------------------- */

typedef struct trial {
  random_source random;
  rig_model model;
  rig_place place;
  flap_machine machine;
  flap_planner planner;
  engine_rig rig;
  uint64_t vram_most;
} trial;

static void draw_model(random_source *r, rig_model *m) {
  rig_model_small(m);
  flap_model_config *c = &m->config;
  c->num_hidden_layers = between(r, 1, 6);
  c->hidden_size = 16 * between(r, 1, 6);
  c->intermediate_size = 16 * between(r, 1, 8);
  c->vocab_size = between(r, 5, VOCABULARY_MAX);
  c->num_key_value_heads = between(r, 1, 3);
  c->num_attention_heads = c->num_key_value_heads << between(r, 0, 2);
  c->head_dim = 4 * between(r, 1, 6);
  c->tie_word_embeddings = one_in(r, 2);
  c->attention_bias = one_in(r, 3);
  if (one_in(r, 4))
    c->family = flap_model_find_family("qwen2");
  if (one_in(r, 3))
    c->rope = (flap_rope){.kind = FLAP_ROPE_LLAMA3,
                          .theta = 1000,
                          .factor = 8,
                          .low_freq_factor = 1,
                          .high_freq_factor = 4,
                          .original_max_position = 16};
  MUST(flap_model_finish_config(c));
  m->shape.dtype = one_in(r, 3) ? FLAP_F32 : one_in(r, 3) ? FLAP_F16 : FLAP_BF16;
  m->gradient_dtype = m->shape.dtype == FLAP_F32 || one_in(r, 4) ? FLAP_F32 : FLAP_BF16;
  m->options.optim = one_in(r, 3) ? FLAP_OPTIM_ADAMW_8BIT : FLAP_OPTIM_ADAMW;
  m->shape.batch = between(r, 1, 3);
  m->shape.sequence = between(r, 2, 20);
  m->micro_batches = between(r, 1, 4);
  m->seed = between(r, 0, 1u << 30);
  m->options.max_steps = STEPS;
  m->options.warmup_steps = 1;
  m->options.max_grad_norm = one_in(r, 2) ? 0 : 1;
  rig_model_random_data(m);
}

static void draw_choices(trial *t) {
  random_source *r = &t->random;
  flap_expert *e = &t->planner.expert;
  const rig_model *m = &t->model;
  t->place = (rig_place){.threads = between(r, 1, 3), .disks = one_in(r, 4) ? 0 : between(r, 1, RIG_DISKS_MAX)};
  t->place.io = one_in(r, 3) ? FLAP_BLOCK_THREADS : one_in(r, 2) ? FLAP_BLOCK_URING : FLAP_BLOCK_AUTO;
  e->segment_layers = one_in(r, 2) ? between(r, 1, m->config.num_hidden_layers) : 0;
  e->tail_layers = one_in(r, 2) ? between(r, 1, m->config.num_hidden_layers) : 0;
  e->group_micro_batches = one_in(r, 2) ? between(r, 1, m->micro_batches) : 0;
  e->recompute = (flap_recompute)between(r, FLAP_RECOMPUTE_AUTO, FLAP_RECOMPUTE_LAYERS);
  e->clip = one_in(r, 3) ? FLAP_CLIP_SWEEP : one_in(r, 2) ? FLAP_CLIP_FOLD : FLAP_CLIP_AUTO;
  if (one_in(r, 3)) {
    e->clip = FLAP_CLIP_AUTO;
    e->update = FLAP_UPDATE_BACKWARD;
  }
  e->optimizer =
      (flap_optimizer_place)(one_in(r, 2) ? FLAP_OPTIMIZER_AUTO : between(r, FLAP_OPTIMIZER_GPU, FLAP_OPTIMIZER_SPLIT));
  e->page_bytes = one_in(r, 2) ? (uint64_t)PAGE << between(r, 0, 6) : 0;
  e->slice_bytes = one_in(r, 2) ? 40960u * between(r, 1, 20) : 0;
  t->planner.activations = (flap_activations)between(r, FLAP_ACTIVATIONS_AUTO, FLAP_ACTIVATIONS_RECOMPUTE);
  e->saved = one_in(r, 2) ? (flap_run_saved)between(r, FLAP_RUN_SAVED_ATTENTION, FLAP_RUN_SAVED_EVERYTHING)
                          : FLAP_RUN_SAVED_AUTO;
  flap_device_default_machine(FLAP_DEVICE_CPU, &t->machine);
  t->machine.disk_read_bytes *= between(r, 1, 20) / 10.0;
  t->machine.h2d_bytes *= between(r, 1, 20) / 10.0;
  t->machine.flops_bf16 *= between(r, 1, 100) / 10.0;
  t->planner.machine = &t->machine;
  t->place.weighted = one_in(r, 2);
  t->place.compression = (flap_compression)between(r, FLAP_COMPRESSION_OFF, FLAP_COMPRESSION_ZSTD);
  e->staging_bytes = one_in(r, 2) ? (uint64_t)2 * PAGE << between(r, 0, 9) : 0;
}

static void trial_open(trial *t, uint32_t number) {
  char name[32];
  memset(t, 0, sizeof *t);
  (void)snprintf(name, sizeof name, "case %u", number);
  t->random.stream = flap_philox_stream(seed, name);
  draw_model(&t->random, &t->model);
  draw_choices(t);
  rig_begin(&t->rig, &t->model, &t->place);
  t->planner.spec = t->rig.spec;
  const flap_model_config *c = &t->model.config;
  const flap_expert *e = &t->planner.expert;
  (void)snprintf(
      present[chunk], sizeof present[chunk],
      "FLAP_TEST_SEED=%llu FLAP_TEST_CASE=%u: L %u D %u I %u V %u heads %u/%u of %u%s%s, %s, gradients %s, %s, "
      "B %u S %u n %u, threads %u, disks %u, segment %u, tail %u, group %u, clip %d, update %d, page %llu, slice %llu, "
      "act %d, "
      "saved %d, recompute %d, compression %d, staging %llu",
      (unsigned long long)seed, number, c->num_hidden_layers, c->hidden_size, c->intermediate_size, c->vocab_size,
      c->num_attention_heads, c->num_key_value_heads, c->head_dim, c->tie_word_embeddings ? ", tied" : "",
      c->output_bias      ? ", bias"
      : c->attention_bias ? ", qkv bias"
                          : "",
      flap_dtype_name(t->model.shape.dtype), flap_dtype_name(t->model.gradient_dtype),
      flap_run_config_optim_name(t->model.options.optim), t->model.shape.batch, t->model.shape.sequence,
      t->model.micro_batches, t->place.threads, t->place.disks, e->segment_layers, e->tail_layers,
      e->group_micro_batches, (int)e->clip, (int)e->update, (unsigned long long)e->page_bytes,
      (unsigned long long)e->slice_bytes, (int)t->planner.activations, (int)e->saved, (int)e->recompute,
      (int)t->place.compression, (unsigned long long)e->staging_bytes);
}

static void trial_close(trial *t) {
  rig_close(&t->rig);
  rig_model_close(&t->model);
  present[chunk][0] = 0;
}

/* Everything in VRAM, nothing folded: what all others must equal. */
static void run_reference(trial *t, rig_result *result) {
  engine_rig rig;
  flap_choice choice = rig_choice_resident(&t->model);
  choice.sweep = true;
  memset(result, 0, sizeof *result);
  rig_begin(&rig, &t->model, &(rig_place){.threads = 2});
  rig_open_choice(&rig, &choice);
  t->vram_most = rig.setup.vram_bytes;
  rig_evaluate(&rig, result);
  rig_train(&rig, 0, STEPS, RIG_UPDATED, result);
  rig_evaluate(&rig, result);
  rig_read_state(&rig, &result->state);
  rig_close(&rig);
}

/* ---- budgets --------------------------------------------------------------------------------------------- */

static flap_budgets plenty_of(const trial *t) {
  flap_budgets budgets = {.vram_bytes = 8 * t->vram_most, .ram_bytes = PLENTY_RAM};
  for (uint32_t i = 0; i < t->place.disks; i++)
    budgets.disk_bytes[i] = PLENTY_DISK / RIG_DISKS_MAX;
  return budgets;
}

static uint64_t disk_sum(const flap_budgets *budgets) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < FLAP_BLOCK_DISKS_MAX; i++)
    sum += budgets->disk_bytes[i];
  return sum;
}

/* `bytes` over the disks, in random shares. Each is a multiple of the longest transfer, so that stripes fit. */
static void share_disks(trial *t, uint64_t bytes, flap_budgets *budgets) {
  uint64_t left = bytes;
  for (uint32_t i = 0; i < t->place.disks; i++) {
    const uint64_t mine = i + 1 == t->place.disks ? left : left * between(&t->random, 0, 100) / 100;
    budgets->disk_bytes[i] = flap_units_round_up(mine, 4 * FLAP_MIB);
    left -= mine;
  }
}

/* Each budget somewhere between the least that works with those before it, and more than enough. */
static flap_budgets draw_budgets(trial *t) {
  flap_budgets budgets = plenty_of(t);
  uint64_t least = 0;
  MUST(flap_planner_vram_min(&t->planner, &budgets, &least));
  budgets.vram_bytes = budget_between(&t->random, least, t->vram_most + t->vram_most / 4);
  MUST(flap_planner_ram_min(&t->planner, &budgets, &least));
  budgets.ram_bytes = budget_between(&t->random, least, 4 * t->vram_most);
  if (t->place.disks > 0) {
    MUST(flap_planner_disk_min(&t->planner, &budgets, &least));
    share_disks(t, budget_between(&t->random, least, 2 * least), &budgets);
  }
  return budgets;
}

static flap_status choose(const trial *t, const flap_budgets *budgets) {
  flap_setup setup;
  flap_plan_costs costs;
  const flap_status status = flap_planner_choose(&t->planner, budgets, &setup, &costs);
  if (status == FLAP_OK)
    flap_setup_close(&setup);
  return status;
}

/* ---- the run of a plan ----------------------------------------------------------------------------------- */

static void check_sizes(const trial *t, const flap_budgets *budgets) {
  const engine_rig *rig = &t->rig;
  flap_peaks peaks;
  flap_runtime_peaks(&rig->runtime, &peaks);
  ck_assert_uint_eq(peaks.vram_bytes, rig->setup.vram_bytes);
  ck_assert_uint_eq(peaks.ram_bytes, rig->setup.ram_bytes);
  ck_assert_uint_eq(peaks.disk_bytes, rig->setup.disk_bytes);
  ck_assert_uint_le(peaks.vram_bytes, budgets->vram_bytes);
  ck_assert_uint_le(peaks.ram_bytes, budgets->ram_bytes);
  ck_assert_uint_le(peaks.disk_bytes, disk_sum(budgets));
  const uint64_t files = rig_disk_file_bytes(rig);
  ck_assert_uint_ge(files, rig->setup.sizes.disk_bytes);
  ck_assert_uint_le(files, disk_sum(budgets));
}

static void run_plan(trial *t, const flap_budgets *budgets, const rig_result *reference) {
  flap_setup setup;
  flap_plan_costs costs;
  rig_result got = {0};
  uint64_t moved[FLAP_LANE_COUNT];
  MUST(flap_planner_choose(&t->planner, budgets, &setup, &costs));
  ck_assert_double_gt(costs.step_seconds, 0);
  ck_assert_double_gt(costs.compute_seconds, 0);
  ck_assert_double_le(costs.compute_seconds, costs.step_seconds * 1.000001);
  rig_open_setup(&t->rig, &setup, budgets);
  rig_evaluate(&t->rig, &got);
  rig_train(&t->rig, 0, STEPS - 2, RIG_PENDING, &got);
  rig_measure_step(&t->rig, STEPS - 2, &got, moved);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    ck_assert_msg(moved[lane] == costs.lane_bytes[lane], "%s: %llu bytes moved, %llu predicted",
                  flap_pager_lane_name((flap_lane)lane), (unsigned long long)moved[lane],
                  (unsigned long long)costs.lane_bytes[lane]);
  }
  rig_train(&t->rig, STEPS - 1, STEPS, RIG_UPDATED, &got);
  rig_evaluate(&t->rig, &got);
  check_sizes(t, budgets);
  rig_read_state(&t->rig, &got.state);
  const char *difference = rig_difference(&t->model, reference, &got);
  ck_assert_msg(*difference == 0, "not the same bits: %s", difference);

  /* The canary: a comparison that would pass anything is worth nothing. */
  free(got.state.data);
  rig_flip_bit(&t->rig, between(&t->random, 0, t->model.config.num_hidden_layers + 1), 2 + between(&t->random, 0, 1),
               between(&t->random, 0, 4095));
  rig_read_state(&t->rig, &got.state);
  ck_assert_str_ne(rig_difference(&t->model, reference, &got), "");
  rig_shut(&t->rig);
  rig_result_close(&got);
}

/* ---- refusals -------------------------------------------------------------------------------------------- */

typedef enum lever { VRAM, RAM, DISK } lever;
static const char *const LEVER_NAMES[] = {"vram", "ram", "disk"};

static flap_status least_of(const trial *t, lever which, const flap_budgets *budgets, uint64_t *least) {
  return which == VRAM  ? flap_planner_vram_min(&t->planner, budgets, least)
         : which == RAM ? flap_planner_ram_min(&t->planner, budgets, least)
                        : flap_planner_disk_min(&t->planner, budgets, least);
}

static void set_budget(lever which, uint64_t bytes, flap_budgets *budgets) {
  if (which == VRAM) {
    budgets->vram_bytes = bytes;
  } else if (which == RAM) {
    budgets->ram_bytes = bytes;
  } else {
    memset(budgets->disk_bytes, 0, sizeof budgets->disk_bytes);
    budgets->disk_bytes[0] = bytes;
  }
}

/* What a refusal says: "<budget>: ... <number> bytes is the least that works", or another advice without one. */
static bool parse_refusal(const char *message, lever *which, uint64_t *bytes) {
  for (int i = VRAM; i <= DISK; i++) {
    const size_t length = strlen(LEVER_NAMES[i]);
    if (strncmp(message, LEVER_NAMES[i], length) == 0 && message[length] == ':')
      *which = (lever)i;
  }
  const char *end = strstr(message, " bytes is the least that works");
  if (end == NULL)
    end = strstr(message, " bytes in all is the least that works");
  if (end == NULL)
    return false;
  while (end > message && end[-1] >= '0' && end[-1] <= '9')
    end--;
  *bytes = strtoull(end, NULL, 10);
  return true;
}

/* A refusal is FLAP_BUDGET and begins with the name of a budget; and if that gets what the message says, all is well.
 */
static void check_refusal(const trial *t, const flap_budgets *refused, lever expected, bool strict) {
  char message[512];
  lever which = VRAM;
  uint64_t bytes = 0;
  (void)snprintf(message, sizeof message, "%s", flap_error_message());
  const bool names =
      strncmp(message, "vram", 4) == 0 || strncmp(message, "ram:", 4) == 0 || strncmp(message, "disk:", 5) == 0;
  ck_assert_msg(names, "no budget is named: %s", message);
  const bool sized = parse_refusal(message, &which, &bytes);
  if (strict)
    ck_assert_msg(which == expected, "%s is too small, and the message is: %s", LEVER_NAMES[expected], message);
  if (!sized)
    return;
  flap_budgets enough = *refused;
  set_budget(which, bytes, &enough);
  const flap_status status = choose(t, &enough);
  ck_assert_msg(status == FLAP_OK, "advised: %s; but then: %s", message, flap_error_message());
}

/* The least of one budget, the others given, is accepted, and a page is refused. `exact`: so is a page less than the
 * least. `strict`: the others are plenty, so a refusal must name this one. */
static void check_least(const trial *t, lever which, const flap_budgets *given, bool strict) {
  flap_budgets budgets = *given;
  uint64_t least = 0;
  if (which == DISK && t->place.disks == 0)
    return;
  MUST(least_of(t, which, &budgets, &least));
  set_budget(which, least, &budgets);
  flap_status status = choose(t, &budgets);
  ck_assert_msg(status == FLAP_OK, "%s: the least, %llu bytes, is refused: %s", LEVER_NAMES[which],
                (unsigned long long)least, flap_error_message());
  if (least == 0)
    return;
  const bool exact = which == VRAM && strict;
  set_budget(which, exact ? least - PAGE : which == DISK ? 0 : PAGE, &budgets);
  status = choose(t, &budgets);
  if (which == DISK && status == FLAP_OK)
    return; /* in vram and ram after all, with another cut of the step than the least was found for */
  ck_assert_msg(status == FLAP_BUDGET, "%s: %s is not refused", LEVER_NAMES[which],
                exact ? "a page less than the least" : "a page");
  check_refusal(t, &budgets, which, strict);
}

/* The least ram is found from a few cuts of the step, not from all: nearly the least. Another one may do without a
 * disk, and so without two buffers and what a worker compresses in. */
static void check_nearly_least_ram(const trial *t, const flap_budgets *plenty) {
  flap_budgets budgets = *plenty;
  uint64_t least = 0;
  MUST(least_of(t, RAM, &budgets, &least));
  const flap_pager_config compressing = {.page_bytes = t->planner.expert.page_bytes,
                                         .transfer_bytes = t->planner.expert.page_bytes,
                                         .compression = t->planner.spec.compression,
                                         .disk_rates = t->planner.spec.disk_rates};
  const uint64_t inexact = RAM_INEXACT + 2 * t->planner.expert.page_bytes + flap_pager_worker_bytes(&compressing);
  if (least <= inexact)
    return;
  budgets.ram_bytes = least - inexact;
  const flap_status status = choose(t, &budgets);
  ck_assert_msg(status == FLAP_BUDGET, "ram: %llu bytes less than the least, %llu, are enough",
                (unsigned long long)inexact, (unsigned long long)least);
}

/* Any budgets: a plan that fits them, or a refusal that helps. */
static void check_anything(trial *t) {
  random_source *r = &t->random;
  flap_budgets budgets = {.vram_bytes = budget_between(r, 0, t->vram_most),
                          .ram_bytes = budget_between(r, 0, t->vram_most)};
  share_disks(t, budget_between(r, 0, t->vram_most), &budgets);
  flap_setup setup;
  flap_plan_costs costs;
  const flap_status status = flap_planner_choose(&t->planner, &budgets, &setup, &costs);
  if (status != FLAP_OK) {
    ck_assert_int_eq(status, FLAP_BUDGET);
    check_refusal(t, &budgets, VRAM, false);
    return;
  }
  ck_assert_uint_le(setup.vram_bytes, budgets.vram_bytes);
  ck_assert_uint_le(setup.ram_bytes, budgets.ram_bytes);
  ck_assert_uint_le(setup.disk_bytes, disk_sum(&budgets));
  flap_setup_close(&setup);
}

/* More of anything is never refused. */
static void check_monotone(trial *t, const flap_budgets *accepted) {
  flap_budgets more = *accepted;
  random_source *r = &t->random;
  more.vram_bytes += one_in(r, 2) ? 0 : (uint64_t)PAGE * between(r, 1, 2000);
  more.ram_bytes += one_in(r, 2) ? 0 : (uint64_t)PAGE * between(r, 1, 2000);
  if (t->place.disks > 0)
    more.disk_bytes[0] += one_in(r, 2) ? 0 : (uint64_t)PAGE * between(r, 1, 2000);
  const flap_status status = choose(t, &more);
  ck_assert_msg(status == FLAP_OK, "vram %llu ram %llu works, vram %llu ram %llu does not: %s",
                (unsigned long long)accepted->vram_bytes, (unsigned long long)accepted->ram_bytes,
                (unsigned long long)more.vram_bytes, (unsigned long long)more.ram_bytes, flap_error_message());
}

/* ---- evaluations and generation -------------------------------------------------------------------------- */

/* A plan of the trial's planner under random budgets, opened and filled. */
static void open_random(trial *t, flap_plan_costs *costs, flap_budgets *budgets) {
  flap_setup setup;
  *budgets = draw_budgets(t);
  MUST(flap_planner_choose(&t->planner, budgets, &setup, costs));
  rig_open_setup(&t->rig, &setup, budgets);
}

/* A run that only evaluates sees the loss that training saw before its first step. */
static void check_evaluation(trial *t, const rig_result *reference) {
  flap_plan_costs costs;
  flap_budgets budgets;
  flap_pager_stats before, after;
  rig_result got = {0};
  t->planner.spec.mode = FLAP_MODE_FORWARD;
  open_random(t, &costs, &budgets);
  rig_evaluate(&t->rig, &got);
  flap_pager_get_stats(t->rig.runtime.pager, &before);
  rig_evaluate(&t->rig, &got);
  flap_pager_get_stats(t->rig.runtime.pager, &after);
  for (int i = 0; i < 2; i++)
    ck_assert_msg(got.evaluated[i] == reference->evaluated[0], "evaluation %d: %.17g, not %.17g", i, got.evaluated[i],
                  reference->evaluated[0]);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    ck_assert_uint_eq(after.bytes[lane] - before.bytes[lane], costs.lane_bytes[lane]);
  check_sizes(t, &budgets);
  rig_shut(&t->rig);
  const flap_budgets plenty = plenty_of(t);
  check_least(t, (lever)between(&t->random, VRAM, DISK), &plenty, true);
}

static flap_status no_keys(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)offset;
  memset(memory, 0, bytes);
  return FLAP_OK;
}

/* The logits behind the first tokens of the data, taken in pieces of at most the shape's. */
static void decode(trial *t, uint32_t tokens, uint32_t first_piece, float *logits_out) {
  const flap_layout *layout = t->rig.runtime.executor.layout;
  flap_executor_result got = {0};
  for (uint32_t i = 0; i < t->model.config.num_hidden_layers; i++)
    MUST(flap_pager_fill(t->rig.runtime.pager, flap_layout_cache(layout, i), no_keys, NULL));
  for (uint32_t at = 0, piece = first_piece; at < tokens; at += piece, piece = 1) {
    const flap_executor_input input = {.tokens = t->model.tokens + at, .decode_tokens = piece, .decode_position = at};
    MUST(flap_executor_begin(&t->rig.runtime.executor, FLAP_SETUP_DECODE));
    MUST(flap_executor_run(&t->rig.runtime.executor, &input, &got));
  }
  MUST(flap_pager_settle(t->rig.runtime.pager));
  memcpy(logits_out, got.logits, t->model.config.vocab_size * sizeof *logits_out);
}

/* The same tokens give the same logits, whatever streams. */
static void check_generation(trial *t) {
  float logits[2][VOCABULARY_MAX];
  flap_setup setup;
  flap_plan_costs costs;
  flap_budgets budgets;
  const uint32_t piece = between(&t->random, 1, t->model.shape.sequence);
  const uint32_t tokens = piece + between(&t->random, 0, 3);
  t->planner.spec.mode = FLAP_MODE_SAMPLE;
  t->planner.spec.shape.batch = 1;
  t->planner.spec.micro_batches = 1;
  t->planner.spec.cache_positions = tokens;
  const flap_budgets plenty = plenty_of(t);
  MUST(flap_planner_choose(&t->planner, &plenty, &setup, &costs));
  rig_open_setup(&t->rig, &setup, &plenty);
  decode(t, tokens, piece, logits[0]);
  rig_shut(&t->rig);
  open_random(t, &costs, &budgets);
  decode(t, tokens, piece, logits[1]);
  check_sizes(t, &budgets);
  rig_shut(&t->rig);
  for (uint32_t i = 0; i < t->model.config.vocab_size; i++)
    ck_assert_msg(memcmp(&logits[0][i], &logits[1][i], sizeof(float)) == 0, "logit %u is %g, not %g", i,
                  (double)logits[1][i], (double)logits[0][i]);
  check_least(t, (lever)between(&t->random, VRAM, DISK), &plenty, true);
}

static void run_case(uint32_t number) {
  static trial t;
  rig_result reference;
  trial_open(&t, number);
  run_reference(&t, &reference);
  const flap_budgets budgets = draw_budgets(&t), plenty = plenty_of(&t);
  run_plan(&t, &budgets, &reference);
  for (int which = VRAM; which <= DISK; which++) {
    check_least(&t, (lever)which, &plenty, true);
    check_least(&t, (lever)which, &budgets, false);
  }
  check_nearly_least_ram(&t, &plenty);
  check_anything(&t);
  if (one_in(&t.random, 2))
    check_evaluation(&t, &reference);
  else
    check_generation(&t);
  check_monotone(&t, &budgets);
  rig_result_close(&reference);
  trial_close(&t);
}

START_TEST(random_models_under_random_budgets) {
  const char *one = getenv("FLAP_TEST_CASE");
  chunk = _i;
  for (uint32_t i = 0; i < CASES_PER_CHUNK; i++) {
    const uint32_t number = (uint32_t)_i * CASES_PER_CHUNK + i;
    if (one == NULL || strtoul(one, NULL, 10) == number)
      run_case(number);
  }
}
END_TEST

int main(void) {
  const char *given = getenv("FLAP_TEST_SEED");
  seed = given != NULL ? strtoull(given, NULL, 10) : flap_units_now_ns() % 1000000007;
  printf("FLAP_TEST_SEED=%llu\n", (unsigned long long)seed);
  fflush(stdout);
  present = mmap(NULL, CHUNKS * sizeof *present, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (present == MAP_FAILED)
    return EXIT_FAILURE;
  Suite *suite = suite_create("engine_property");
  TCase *tests = tcase_create("property");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, random_models_under_random_budgets, 0, CHUNKS);
  suite_add_tcase(suite, tests);
  const int failed = rig_main(suite);
  for (int i = 0; i < CHUNKS; i++)
    if (present[i][0] != 0)
      printf("%s\n", present[i]);
  return failed;
}
