/* Homes in RAM: regions share their places only if no program needs both, and RAM is spent as far as it reaches. */
#include "engine/step/setup.h"

#include "base/philox.h"
#include "base/units.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRIALS 60u
#define LAYERS_MAX 7u

typedef struct trial {
  flap_model_config model;
  flap_setup_spec spec;
  flap_choice choice;
  flap_setup setup;
} trial;

typedef struct source {
  flap_philox stream;
  uint64_t drawn;
} source;

static uint32_t below(source *s, uint32_t bound) {
  return (uint32_t)flap_philox_below(&s->stream, s->drawn++, bound);
}

static uint64_t first_seed(void) {
  const char *text = getenv("FLAP_TEST_SEED");
  return text != NULL ? strtoull(text, NULL, 10) : 7;
}

static void open_trial(uint64_t seed, trial *t) {
  source s = {.stream = flap_philox_stream(seed, "homes")};
  memset(t, 0, sizeof *t);
  const uint32_t layers = 1 + below(&s, LAYERS_MAX), parts = layers + 2;
  t->model = (flap_model_config){.family = flap_model_find_family("llama"),
                                 .vocab_size = 300,
                                 .hidden_size = 32,
                                 .intermediate_size = 96,
                                 .num_hidden_layers = layers,
                                 .num_attention_heads = 2,
                                 .num_key_value_heads = 1,
                                 .max_position_embeddings = 64,
                                 .rms_norm_eps = 1e-5,
                                 .initializer_range = 0.02,
                                 .tie_word_embeddings = below(&s, 2) == 1,
                                 .rope = {.theta = 10000}};
  ck_assert_int_eq(flap_model_finish_config(&t->model), FLAP_OK);
  t->spec = (flap_setup_spec){.model = &t->model,
                              .shape = {.dtype = FLAP_BF16, .batch = 1 + below(&s, 3), .sequence = 32},
                              .mode = FLAP_MODE_TRAIN,
                              .gradient_dtype = FLAP_BF16,
                              .micro_batches = 1 + below(&s, 4),
                              .threads = 2,
                              .device = FLAP_DEVICE_CPU,
                              .needs_no_norm = below(&s, 2) == 1};
  t->choice = (flap_choice){.segment_layers = 1 + below(&s, layers),
                            .group_micro_batches = 1 + below(&s, t->spec.micro_batches),
                            .layerwise = below(&s, 2) == 1,
                            .saved_mask = FLAP_MODEL_SAVED_ALL,
                            .sweep = below(&s, 4) == 0,
                            .spread = below(&s, 2) == 1,
                            .host_parts = below(&s, 2) * below(&s, parts + 1),
                            .host_spares_first = below(&s, 2) == 1,
                            .slice_elements = (1 + below(&s, 3)) * FLAP_OPS_BLOCK,
                            .page_bytes = FLAP_BLOCK_ALIGN << below(&s, 3),
                            .read_buffers = 2,
                            .write_buffers = 2};
  t->choice.transfer_bytes = t->choice.page_bytes << below(&s, 2);
  const uint32_t tail = flap_layout_least_tail(layers, t->choice.segment_layers);
  t->choice.tail_layers = tail + below(&s, (layers - tail) / t->choice.segment_layers + 1) * t->choice.segment_layers;
  t->choice.saved_layers = below(&s, 2) * below(&s, layers / t->choice.segment_layers + 1) * t->choice.segment_layers;
  if (below(&s, 2) == 1) {
    t->choice.backward_parts = below(&s, parts + 1);
    t->choice.host_backward_parts = t->choice.backward_parts > 0 ? below(&s, parts + 1) : 0;
  }
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    t->choice.resident_bytes[k] = below(&s, 4) == 0 ? below(&s, 1u << 20) : 0;
  ck_assert_msg(flap_setup_build(&t->spec, &t->choice, &t->setup) == FLAP_OK, "%s", flap_error_message());
}

/* ---- who holds something when ---------------------------------------------------------------------------- */

typedef struct follower {
  const trial *t;
  uint64_t seed;
  bool *holds; /* per region */
  uint32_t held[FLAP_PAGER_OVERLAYS_MAX][2], shared;
} follower;

static void set_holds(follower *f, uint32_t region, bool holds) {
  const flap_layout_region *r = &f->t->setup.layout.regions[region];
  if (r->overlay > 0) {
    uint32_t *held = f->held[r->overlay - 1];
    held[r->side] += holds;
    held[r->side] -= f->holds[region];
    ck_assert_msg(held[0] == 0 || held[1] == 0,
                  "seed %llu: region %u of overlay %u comes while the other side is there", (unsigned long long)f->seed,
                  region, r->overlay);
    f->shared += holds;
  }
  f->holds[region] = holds;
}

/* Jobs of the host end as late as they may: when the weights that they change are leased. */
static void end_jobs(follower *f, const flap_program *p, const flap_op **waiting, uint32_t *count, uint32_t weights) {
  uint32_t ended = 0;
  for (uint32_t i = 0; i < *count; i++)
    if (p->leases[waiting[i]->operand[2]].region == weights || weights == FLAP_REGION_NONE)
      ended = i + 1; /* in their order */
  for (uint32_t i = 0; i < ended; i++)
    set_holds(f, p->leases[waiting[i]->operand[1]].region, false);
  *count -= ended;
  memmove(waiting, waiting + ended, *count * sizeof *waiting);
}

static void follow(follower *f, flap_setup_program kind) {
  const flap_program *p = &f->t->setup.programs[kind];
  const flap_op **waiting = calloc(p->op_count + 1, sizeof *waiting);
  uint32_t count = 0;
  ck_assert_ptr_nonnull(waiting);
  for (uint32_t i = 0; i < p->op_count; i++) {
    const flap_op *op = &p->ops[i];
    if (op->kind == FLAP_OP_HOST_ADAMW) {
      waiting[count++] = op;
      continue;
    }
    if (op->kind == FLAP_OP_PIN)
      end_jobs(f, p, waiting, &count, p->leases[op->operand[0]].region);
    if (op->kind != FLAP_OP_UNPIN)
      continue;
    const flap_lease *lease = &p->leases[op->operand[0]];
    if (lease->mode != FLAP_LEASE_READ)
      set_holds(f, lease->region, lease->mode == FLAP_LEASE_UPDATE || lease->mode == FLAP_LEASE_CREATE);
  }
  end_jobs(f, p, waiting, &count, FLAP_REGION_NONE); /* a program's end waits for them */
  free(waiting);
}

/* As runs go: whatever may follow whatever. */
START_TEST(nothing_is_there_with_what_it_shares_its_place_with) {
  static const flap_setup_program folded[] = {FLAP_SETUP_FIRST,   FLAP_SETUP_STEADY,  FLAP_SETUP_STEADY,
                                              FLAP_SETUP_LAST,    FLAP_SETUP_FORWARD, FLAP_SETUP_SINGLE,
                                              FLAP_SETUP_FIRST,   FLAP_SETUP_SWEEP,   FLAP_SETUP_FORWARD,
                                              FLAP_SETUP_FORWARD, FLAP_SETUP_FIRST};
  static const flap_setup_program alone[] = {FLAP_SETUP_SINGLE, FLAP_SETUP_SINGLE, FLAP_SETUP_FORWARD,
                                             FLAP_SETUP_SINGLE};
  uint32_t shared = 0;
  for (uint64_t seed = first_seed(); seed < first_seed() + TRIALS; seed++) {
    trial t;
    open_trial(seed, &t);
    follower f = {.t = &t, .seed = seed, .holds = calloc(t.setup.layout.region_count, sizeof(bool))};
    ck_assert_ptr_nonnull(f.holds);
    if (flap_setup_folds(&t.setup))
      for (size_t i = 0; i < sizeof folded / sizeof *folded; i++)
        follow(&f, folded[i]);
    else
      for (size_t i = 0; i < sizeof alone / sizeof *alone; i++)
        follow(&f, alone[i]);
    shared += f.shared;
    free(f.holds);
    flap_setup_close(&t.setup);
  }
  ck_assert_uint_gt(shared, 1000);
}
END_TEST

/* ---- how RAM is spent ------------------------------------------------------------------------------------ */

/* By another way than the setup's: the longer side of each overlay, and what is in none. */
static uint64_t ram_of(const flap_setup *setup, uint64_t *alone_out) {
  uint64_t sides[FLAP_PAGER_OVERLAYS_MAX][2] = {{0}}, bytes = 0;
  *alone_out = 0;
  for (uint32_t i = 0; i < setup->layout.region_count; i++) {
    const flap_pager_region *r = &setup->regions[i];
    if (r->ring == FLAP_PAGER_RESIDENT)
      continue;
    const uint64_t all = r->bytes, pages = r->ram_pages * setup->choice.page_bytes, ram = all < pages ? all : pages;
    *alone_out += ram;
    if (r->overlay == 0)
      bytes += ram;
    else
      sides[r->overlay - 1][r->side] += ram;
  }
  for (uint32_t i = 0; i < FLAP_PAGER_OVERLAYS_MAX; i++)
    bytes += sides[i][0] > sides[i][1] ? sides[i][0] : sides[i][1];
  return bytes;
}

static uint64_t place(trial *t, uint64_t ram_bytes, uint64_t *alone_out) {
  t->choice.ram_bytes = ram_bytes;
  ck_assert_int_eq(flap_setup_place(&t->setup, &t->choice), FLAP_OK);
  const uint64_t bytes = ram_of(&t->setup, alone_out);
  ck_assert_uint_eq(t->setup.sizes.ram_home_bytes, bytes);
  return bytes;
}

START_TEST(ram_is_spent_to_the_last_page_and_never_beyond) {
  uint64_t saved = 0;
  for (uint64_t seed = first_seed(); seed < first_seed() + TRIALS; seed++) {
    trial t;
    open_trial(seed, &t);
    uint64_t alone;
    const uint64_t least = place(&t, 0, &alone), all = place(&t, UINT64_MAX / 2, &alone);
    ck_assert_uint_eq(t.setup.sizes.disk_bytes, 0);
    saved += alone - all;
    for (uint32_t share = 1; share <= 8; share++) {
      const uint64_t given = (all - least) * share / 8, spent = place(&t, given, &alone);
      ck_assert_uint_le(spent, least + given);
      /* What is left is less than what one more page takes, of any region that has some on disk. */
      if (t.setup.sizes.disk_bytes > 0)
        ck_assert_msg(spent + t.choice.page_bytes > least + given, "seed %llu: %llu of %llu bytes are spent",
                      (unsigned long long)seed, (unsigned long long)(spent - least), (unsigned long long)given);
    }
    ck_assert_uint_eq(t.setup.sizes.disk_bytes, 0);
    flap_setup_close(&t.setup);
  }
  ck_assert_uint_gt(saved, 0);
}
END_TEST

/* ---- placing anew ---------------------------------------------------------------------------------------- */

/* Another choice that differs in placement: from one to the next few things change. */
static void draw_placement(source *s, flap_setup *setup, flap_choice *choice) {
  const uint32_t k = below(s, FLAP_CLASS_COUNT);
  const uint64_t rams[] = {0, UINT64_MAX / 2, below(s, 1u << 21), choice->ram_bytes};
  switch (below(s, 5)) {
  case 0:
    choice->resident_bytes[k] = below(s, 3) * (setup->staying_bytes[k] / 2 + 1);
    break;
  case 1:
    choice->resident_bytes[k] = below(s, 1u << 20);
    break;
  case 2:
    choice->extra_slots[k] = below(s, 4);
    choice->keeps_embedding = below(s, 2) == 1;
    break;
  case 3:
    choice->page_bytes = FLAP_BLOCK_ALIGN << below(s, 3);
    choice->transfer_bytes = choice->page_bytes << below(s, 2);
    break;
  default:
    choice->trace_events = below(s, 2) * below(s, 1000);
    choice->workers = below(s, 3);
  }
  choice->ram_bytes = rams[below(s, 4)];
}

static uint64_t pages_of(const flap_setup *setup, uint32_t region) {
  const uint64_t page = setup->choice.page_bytes, all = (setup->regions[region].bytes + page - 1) / page;
  return setup->regions[region].ram_pages < all ? setup->regions[region].ram_pages : all;
}

static void compare_setups(const flap_setup *a, const flap_setup *b) {
  flap_pager_sizes sizes;
  flap_pager_measure(&a->pager, &sizes); /* of all regions, and not of what placing keeps account of */
  ck_assert_mem_eq(&a->sizes, &sizes, sizeof sizes);
  ck_assert_mem_eq(&a->sizes, &b->sizes, sizeof sizes);
  ck_assert_mem_eq(a->classes, b->classes, sizeof a->classes);
  ck_assert_mem_eq(a->resident, b->resident, a->layout.region_count * sizeof *a->resident);
  ck_assert_uint_eq(a->vram_bytes, b->vram_bytes);
  ck_assert_uint_eq(a->ram_bytes, b->ram_bytes);
  ck_assert_uint_eq(a->ram_arena_bytes, b->ram_arena_bytes);
  ck_assert_uint_eq(a->disk_bytes, b->disk_bytes);
  ck_assert_uint_eq(a->pager.ring_count, b->pager.ring_count);
  for (uint32_t i = 0; i < a->pager.ring_count; i++) {
    ck_assert_str_eq(a->rings[i].name, b->rings[i].name);
    ck_assert_uint_eq(a->rings[i].slot_bytes, b->rings[i].slot_bytes);
    ck_assert_uint_eq(a->rings[i].slots, b->rings[i].slots);
  }
  for (uint32_t i = 0; i < a->layout.region_count; i++) {
    ck_assert_uint_eq(a->regions[i].ring, b->regions[i].ring);
    ck_assert_uint_eq(pages_of(a, i), pages_of(b, i));
  }
}

START_TEST(placing_anew_comes_to_what_placing_afresh_does) {
  for (uint64_t seed = first_seed(); seed < first_seed() + TRIALS; seed++) {
    source s = {.stream = flap_philox_stream(seed, "placements")};
    trial t;
    open_trial(seed, &t);
    flap_choice choice = t.choice;
    for (int i = 0; i < 24; i++) {
      flap_setup afresh;
      draw_placement(&s, &t.setup, &choice);
      ck_assert_int_eq(flap_setup_place(&t.setup, &choice), FLAP_OK);
      ck_assert_int_eq(flap_setup_build(&t.spec, &choice, &afresh), FLAP_OK);
      compare_setups(&t.setup, &afresh);
      flap_setup_close(&afresh);
    }
    flap_setup_close(&t.setup);
  }
}
END_TEST

START_TEST(a_sketch_counts_what_lists_hold) {
  for (uint64_t seed = first_seed(); seed < first_seed() + 4 * TRIALS; seed++) {
    flap_setup sketch;
    trial t;
    open_trial(seed, &t);
    ck_assert_int_eq(flap_setup_sketch(&t.spec, &t.choice, &sketch), FLAP_OK);
    for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++) {
      const flap_program *counted = &sketch.programs[i], *listed = &t.setup.programs[i];
      ck_assert_int_eq(sketch.has_program[i], t.setup.has_program[i]);
      ck_assert_int_eq(counted->ops == NULL, i != (int)sketch.steady);
      ck_assert_uint_eq(counted->op_count, listed->op_count);
      ck_assert_uint_eq(counted->lease_count, listed->lease_count);
      ck_assert_uint_eq(counted->job_count, listed->job_count);
      ck_assert_uint_eq(counted->before_sweep, listed->before_sweep);
      ck_assert_mem_eq(counted->live_max, listed->live_max, sizeof listed->live_max);
    }
    ck_assert_int_eq(flap_setup_list_programs(&sketch), FLAP_OK);
    compare_setups(&sketch, &t.setup);
    flap_setup_close(&sketch);
    flap_setup_close(&t.setup);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("homes");
  TCase *tcase = tcase_create("homes");
  tcase_set_timeout(tcase, 120);
  tcase_add_test(tcase, nothing_is_there_with_what_it_shares_its_place_with);
  tcase_add_test(tcase, ram_is_spent_to_the_last_page_and_never_beyond);
  tcase_add_test(tcase, placing_anew_comes_to_what_placing_afresh_does);
  tcase_add_test(tcase, a_sketch_counts_what_lists_hold);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
