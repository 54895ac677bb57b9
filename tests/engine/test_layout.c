/* What regions hold: the formats of states, part by part, and how parts are cut into slices. */
#include "engine/step/layout.h"

#include <check.h>
#include <stdlib.h>

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

int main(void) {
  Suite *suite = suite_create("layout");
  TCase *tests = tcase_create("all");
  tcase_add_loop_test(tests, the_embedding_of_adamw_8bit_has_fp32_moments_in_slices_of_no_more_bytes, 0, 3);
  tcase_add_loop_test(tests, all_parts_of_adamw_have_the_same_format_and_slices, 0, 2);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
