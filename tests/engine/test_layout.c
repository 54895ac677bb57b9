/* What regions hold: the formats of states, part by part, how parts are cut into slices, and layers into segments. */
#include "base/units.h"
#include "engine/step/layout.h"

#include <check.h>
#include <stdlib.h>

#define LAYERS 7u

/* 7,000 x 96: the embedding has more blocks than a layer, and does not fill its last one. */
static void make_model(bool tied, flap_model_config *config_out) {
  *config_out = (flap_model_config){.family = flap_model_find_family("llama"),
                                    .vocab_size = 7000,
                                    .hidden_size = 96,
                                    .intermediate_size = 256,
                                    .num_hidden_layers = 3,
                                    .num_attention_heads = 4,
                                    .num_key_value_heads = 2,
                                    .max_position_embeddings = 64,
                                    .rms_norm_eps = 1e-5,
                                    .initializer_range = 0.02,
                                    .tie_word_embeddings = tied,
                                    .rope = {.theta = 10000}};
  ck_assert_int_eq(flap_model_finish_config(config_out), FLAP_OK);
}

static void build(const flap_model_config *config, flap_dtype dtype, flap_optim optim, uint64_t slice_blocks,
                  flap_arena *arena, flap_layout *layout_out) {
  const flap_layout_spec spec = {.model = config,
                                 .shape = {.dtype = dtype, .batch = 1, .sequence = 8},
                                 .mode = FLAP_MODE_TRAIN,
                                 .gradient_dtype = dtype,
                                 .optim = optim,
                                 .micro_batches = 2,
                                 .group_micro_batches = 1,
                                 .segment_layers = 2,
                                 .tail_layers = flap_layout_least_tail(config->num_hidden_layers, 2),
                                 .slice_elements = slice_blocks * FLAP_OPS_BLOCK};
  flap_arena measuring;
  flap_arena_measure(&measuring, "layout");
  flap_layout_build(&spec, &measuring, layout_out);
  ck_assert_int_eq(flap_arena_open(arena, "layout", measuring.bytes_used), FLAP_OK);
  flap_layout_build(&spec, arena, layout_out);
}

/* By hand: of a block of 4,096 elements, without its weights. */
static uint64_t block_bytes(flap_dtype dtype, bool codes) {
  const uint64_t master = dtype == FLAP_BF16 ? 2 : dtype == FLAP_F16 ? 4 : 0;
  return codes ? 4096 * (master + 2) + 4096 / 256 * 2 * 4 : 4096 * (master + 8);
}

/* Slices follow one another without gaps; each region has what its elements take. */
static void check_part(const flap_layout *layout, const flap_layout_part *part, uint64_t of_block,
                       uint64_t slice_blocks) {
  uint64_t first = 0;
  for (uint32_t i = part->first_slice; i < part->first_slice + part->slice_count; i++) {
    const flap_layout_slice *slice = &layout->slices[i];
    const uint64_t blocks = slice->elements / 4096, bytes = layout->regions[slice->states].bytes;
    const bool last = i + 1 == part->first_slice + part->slice_count;
    ck_assert_ptr_eq(&layout->parts[slice->part], part);
    ck_assert_uint_eq(slice->first_element, first);
    ck_assert_uint_eq(slice->elements % 4096, 0);
    ck_assert(last ? blocks >= 1 && blocks <= slice_blocks : blocks == slice_blocks);
    ck_assert_uint_eq(bytes, (blocks * of_block + 4095) / 4096 * 4096);
    ck_assert_uint_eq(layout->regions[slice->gradient].bytes,
                      slice->elements * flap_dtype_bytes(layout->spec.gradient_dtype));
    first += slice->elements;
  }
  ck_assert_uint_eq(first, part->elements);
}

START_TEST(the_embedding_of_adamw_8bit_has_fp32_moments_in_slices_of_no_more_bytes) {
  static const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};
  static const uint64_t wanted[][4] = {
      {1, 3, 16, 100}, /* blocks of a layer's slice; of the embedding's, where 3 x 16,512 bytes hold one of 40,960: */
      {1, 1, 6, 40},   /* bf16 */
      {1, 1, 8, 50},   /* fp16: 24,704 and 49,152 */
      {1, 1, 4, 25}};  /* fp32: 8,320 and 32,768 */
  const flap_dtype dtype = dtypes[_i % 3];
  for (int tied = 0; tied < 2; tied++)
    for (int k = 0; k < 4; k++) {
      const uint64_t blocks = wanted[0][k];
      flap_model_config config;
      flap_layout layout;
      flap_arena arena;
      make_model(tied, &config);
      build(&config, dtype, FLAP_OPTIM_ADAMW_8BIT, blocks, &arena, &layout);
      check_part(&layout, &layout.parts[0], block_bytes(dtype, false), wanted[1 + _i % 3][k]);
      for (uint32_t i = 1; i < layout.part_count; i++)
        check_part(&layout, &layout.parts[i], block_bytes(dtype, true), blocks);
      /* The ring's slots are no wider for it, but where not even a block would fit. */
      const uint64_t widest = layout.regions[layout.slices[0].states].bytes;
      if (blocks > 3)
        ck_assert_uint_le(widest, (blocks * block_bytes(dtype, true) + 4095) / 4096 * 4096);
      flap_arena_close(&arena);
    }
}
END_TEST

START_TEST(all_parts_of_adamw_have_the_same_format_and_slices) {
  flap_model_config config;
  flap_layout layout;
  flap_arena arena;
  make_model(_i, &config);
  build(&config, FLAP_BF16, FLAP_OPTIM_ADAMW, 5, &arena, &layout);
  for (uint32_t i = 0; i < layout.part_count; i++)
    check_part(&layout, &layout.parts[i], 40960, 5);
  flap_arena_close(&arena);
}
END_TEST

/* A region is of one layer and micro-batch of a group; `taken` has room for all. */
static void take(const flap_layout *layout, bool *taken, uint32_t region, flap_region_class klass) {
  ck_assert_uint_lt(region, layout->region_count);
  ck_assert(layout->regions[region].klass == klass && !taken[region]);
  taken[region] = true;
}

static void check_saved(const flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  bool *taken = calloc(layout->region_count, 1);
  uint64_t before_tail = 0;
  uint32_t of_class = 0;
  ck_assert_ptr_nonnull(taken);
  for (uint32_t layer = 0; layer < LAYERS; layer++)
    for (uint32_t i = 0; i < spec->group_micro_batches; i++) {
      const bool tail = layer >= flap_layout_tail_layer(spec);
      const uint32_t region = flap_layout_saved(layout, layer, i);
      if (tail && i > 0)
        ck_assert_uint_eq(region, flap_layout_saved(layout, layer, 0)); /* one place for all of them */
      else if (region != FLAP_REGION_NONE)
        take(layout, taken, region, FLAP_CLASS_SAVED);
      if (tail)
        ck_assert_int_eq(region != FLAP_REGION_NONE, flap_layout_saves_all(spec));
      before_tail += !tail && region != FLAP_REGION_NONE;
    }
  ck_assert_uint_eq(before_tail, flap_layout_saved_count(spec));
  for (uint32_t region = 0; region < layout->region_count; region++) {
    ck_assert(layout->regions[region].klass != FLAP_CLASS_SAVED || taken[region]); /* none is left over */
    of_class += layout->regions[region].klass == FLAP_CLASS_SAVED;
  }
  ck_assert_uint_eq(of_class, before_tail + (flap_layout_saves_all(spec) ? spec->tail_layers : 0));
  free(taken);
}

/* Segments of k layers, one behind the other, and the tail; sums of a segment's layers are different ones, and no more
 * than those of the longest. */
static void check_segments(const flap_layout *layout) {
  const flap_layout_spec *spec = &layout->spec;
  uint32_t next = 0, sums = 0;
  for (uint32_t s = 0; s < layout->segment_count; s++) {
    uint32_t first, end;
    flap_layout_segment(layout, s, &first, &end);
    ck_assert_uint_eq(first, next);
    ck_assert_uint_eq(end - first, s + 1 < layout->segment_count ? spec->segment_layers : spec->tail_layers);
    for (uint32_t layer = first; layer < end; layer++) {
      ck_assert_uint_eq(flap_layout_segment_of(layout, layer), s);
      for (uint32_t other = first; other < layer; other++)
        ck_assert_uint_ne(layout->parts[layer + 1].sums, layout->parts[other + 1].sums);
    }
    next = end;
  }
  ck_assert_uint_eq(next, LAYERS);
  for (uint32_t region = 0; region < layout->region_count; region++)
    sums += layout->regions[region].klass == FLAP_CLASS_GRADIENT_SUMS;
  ck_assert_uint_eq(sums,
                    spec->group_micro_batches == spec->micro_batches ? flap_layout_longest_segment(spec) : LAYERS);
}

START_TEST(tails_of_any_length_leave_whole_segments) {
  flap_model_config config;
  make_model(_i, &config);
  config.num_hidden_layers = LAYERS;
  for (uint32_t k = 1; k <= LAYERS; k++)
    for (uint32_t tail = flap_layout_least_tail(LAYERS, k); tail <= LAYERS; tail += k)
      for (uint32_t group = 1; group <= 3; group++)
        for (uint32_t saved = 0; saved <= LAYERS; saved++) {
          flap_layout layout;
          flap_arena arena, measuring;
          const flap_layout_spec spec = {.model = &config,
                                         .shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 8},
                                         .mode = FLAP_MODE_TRAIN,
                                         .gradient_dtype = FLAP_BF16,
                                         .micro_batches = 3,
                                         .group_micro_batches = group,
                                         .segment_layers = k,
                                         .tail_layers = tail,
                                         .saved_layers = saved,
                                         .saved_mask = saved > 0 ? FLAP_MODEL_SAVED_ALL : 0,
                                         .slice_elements = FLAP_OPS_BLOCK};
          flap_arena_measure(&measuring, "layout");
          flap_layout_build(&spec, &measuring, &layout);
          const uint32_t counted = layout.region_count;
          ck_assert_int_eq(flap_arena_open(&arena, "layout", measuring.bytes_used), FLAP_OK);
          flap_layout_build(&spec, &arena, &layout);
          ck_assert_uint_eq(layout.region_count, counted);
          check_segments(&layout);
          check_saved(&layout);
          flap_arena_close(&arena);
        }
}
END_TEST

/* What a part's sums take, by hand: fp32, but a layer's in bf16. */
static uint64_t sums_bytes(const flap_layout_part *part) {
  return part->elements * (part->kind == FLAP_PART_LAYER ? 2 : 4);
}

/* By layer no two parts' sums are there at once, but the embedding's where the head begins them (tied): they share the
 * place that the largest takes. */
START_TEST(by_layer_all_sums_have_one_place) {
  flap_model_config config;
  make_model(_i, &config);
  config.num_hidden_layers = LAYERS;
  for (uint32_t k = 1; k <= LAYERS; k++) {
    flap_layout layout;
    flap_arena arena, measuring;
    const flap_layout_spec spec = {.model = &config,
                                   .shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 8},
                                   .mode = FLAP_MODE_TRAIN,
                                   .gradient_dtype = FLAP_BF16,
                                   .micro_batches = 1,
                                   .group_micro_batches = 1,
                                   .segment_layers = k,
                                   .tail_layers = flap_layout_least_tail(LAYERS, k),
                                   .by_layer = true,
                                   .slice_elements = FLAP_OPS_BLOCK};
    flap_arena_measure(&measuring, "layout");
    flap_layout_build(&spec, &measuring, &layout);
    const uint32_t counted = layout.region_count;
    ck_assert_int_eq(flap_arena_open(&arena, "layout", measuring.bytes_used), FLAP_OK);
    flap_layout_build(&spec, &arena, &layout);
    ck_assert_uint_eq(layout.region_count, counted);
    const flap_layout_part *parts = layout.parts, *head = &parts[LAYERS + 1];
    uint64_t largest = 0;
    for (uint32_t i = layout.tied ? 1 : 0; i < layout.part_count; i++) {
      const uint64_t bytes = sums_bytes(&parts[i]);
      if (layout.tied ? parts[i].kind == FLAP_PART_LAYER : true) {
        ck_assert_uint_eq(parts[i].sums, parts[1].sums);
        largest = bytes > largest ? bytes : largest;
      }
    }
    ck_assert_uint_eq(layout.regions[parts[1].sums].bytes, flap_units_round_up(largest, FLAP_BLOCK_ALIGN));
    ck_assert(!layout.tied || (parts[0].sums != parts[1].sums && head->sums != parts[0].sums));
    flap_arena_close(&arena);
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("layout");
  TCase *tests = tcase_create("all");
  tcase_add_loop_test(tests, the_embedding_of_adamw_8bit_has_fp32_moments_in_slices_of_no_more_bytes, 0, 3);
  tcase_add_loop_test(tests, all_parts_of_adamw_have_the_same_format_and_slices, 0, 2);
  tcase_add_loop_test(tests, tails_of_any_length_leave_whole_segments, 0, 2);
  tcase_add_loop_test(tests, by_layer_all_sums_have_one_place, 0, 2);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
