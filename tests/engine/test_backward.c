/* Updates in the backward: what they move, which places they use, what becomes of a step that is not made, and of one
 * whose loss or gradients are not finite. That they give the bits of all other ways is test_executor_bits's.
 */
#include "tests/engine/engine_rig.h"

#include "base/units.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS 3u
#define PARTS (LAYERS + 2)

static void make_model(rig_model *model) {
  rig_model_small(model);
  model->config.num_hidden_layers = LAYERS;
  model->config.tie_word_embeddings = false;
  MUST(flap_model_finish_config(&model->config));
  model->options.max_grad_norm = 0;
  model->options.warmup_steps = 0;
  rig_model_random_data(model);
}

static flap_choice in_backward(flap_choice choice, bool spread) {
  choice.segment_layers = 1;
  choice.backward_parts = choice.host_backward_parts = PARTS;
  choice.spread = spread;
  choice.slice_elements = 2 * FLAP_OPS_BLOCK;
  return choice;
}

/* ---- what is moved, and where ------------------------------------------------------------------------------ */

static void build(const rig_model *model, const flap_choice *choice, flap_setup *setup_out) {
  engine_rig rig;
  rig_begin(&rig, model, &(rig_place){.threads = 1});
  MUST(flap_setup_build(&rig.spec, choice, setup_out));
  rig_close(&rig);
}

/* The same model, its parts updated in the next forward, and in the backward. */
static void build_both(const rig_model *model, bool spread, flap_setup *folded_out, flap_setup *setup_out) {
  flap_choice choice = rig_choice_streaming(model, false);
  choice.segment_layers = 1;
  choice.slice_elements = 2 * FLAP_OPS_BLOCK;
  build(model, &choice, folded_out);
  choice = in_backward(choice, spread);
  build(model, &choice, setup_out);
  ck_assert(flap_setup_folds(folded_out) && !flap_setup_folds(setup_out));
  ck_assert_uint_eq(setup_out->classes[FLAP_CLASS_GRADIENTS].bytes, 0);
}

/* No gradient goes home, so that a step moves just that much less than a folded one; weights once more, for the
 * embedding, whose gradient is complete long after its weights were of use. */
START_TEST(gradients_do_not_pass_the_bus) {
  rig_model model;
  flap_setup folded, setup;
  uint64_t before[FLAP_LANE_COUNT], moved[FLAP_LANE_COUNT], gradients = 0;
  make_model(&model);
  build_both(&model, _i == 1, &folded, &setup);
  ck_assert_int_eq(setup.steady, FLAP_SETUP_SINGLE);
  ck_assert_double_gt(folded.traffic[FLAP_CLASS_GRADIENTS], 0);
  const flap_program *steady = &folded.programs[folded.steady], *single = &setup.programs[setup.steady];
  flap_pager_predict(&folded.pager, steady->leases, steady->lease_count, before);
  flap_pager_predict(&setup.pager, single->leases, single->lease_count, moved);
  for (uint32_t i = 0; i < folded.layout.slice_count; i++)
    gradients += folded.layout.regions[folded.layout.slices[i].gradient].bytes;
  const uint64_t embedding = setup.layout.regions[setup.layout.parts[0].weights].bytes;
  ck_assert_uint_eq(moved[FLAP_LANE_D2H] + gradients, before[FLAP_LANE_D2H]);
  ck_assert_uint_eq(moved[FLAP_LANE_H2D] + gradients, before[FLAP_LANE_H2D] + embedding);
  flap_setup_close(&folded);
  flap_setup_close(&setup);
  rig_model_close(&model);
}
END_TEST

/* Nor where a norm is needed first; then weights are loaded once more instead. */
START_TEST(a_second_backward_stores_no_gradient_either) {
  rig_model model;
  flap_setup folded, setup;
  make_model(&model);
  model.options.max_grad_norm = 1;
  build_both(&model, _i == 1, &folded, &setup);
  ck_assert(!folded.layout.spec.backward_twice && setup.layout.spec.backward_twice);
  ck_assert_double_eq(setup.traffic[FLAP_CLASS_STATES], folded.traffic[FLAP_CLASS_STATES]);
  /* A forward, a backward, and an update there and back; the tail's forward is that of its backward. */
  ck_assert_double_eq_tol(setup.traffic[FLAP_CLASS_WEIGHTS], (4.0 * (LAYERS - 1) + 3) / LAYERS, 1e-9);
  const flap_program *single = &setup.programs[setup.steady];
  uint32_t rounded[2] = {0}, backwards[2] = {0}, updates = 0, norms = 0;
  for (uint32_t i = 0; i < single->op_count; i++) {
    const uint8_t kind = single->ops[i].kind;
    ck_assert_uint_ne(kind, FLAP_OP_LOSSES);
    rounded[norms] += kind == FLAP_OP_STORE_GRADIENT;
    ck_assert(kind != FLAP_OP_STORE_GRADIENT || (single->ops[i].operand[1] == FLAP_OPERAND_NONE) == (norms == 0));
    backwards[norms] += kind == FLAP_OP_LAYER_BACKWARD;
    ck_assert(kind != FLAP_OP_ADAMW || norms == 1);
    updates += kind == FLAP_OP_ADAMW;
    norms += kind == FLAP_OP_NORM;
    ck_assert_uint_le(norms, 1);
  }
  ck_assert_uint_eq(norms, 1);
  for (int i = 0; i < 2; i++) {
    ck_assert_uint_eq(rounded[i], setup.layout.slice_count);
    ck_assert_uint_eq(backwards[i], LAYERS * model.micro_batches);
  }
  ck_assert_uint_eq(updates, setup.layout.slice_count);
  flap_setup_close(&folded);
  flap_setup_close(&setup);
  rig_model_close(&model);
}
END_TEST

/* One place where each slice is updated at once; else as many as the slices of a segment, of the last one with the
 * head's, and those of a segment have places of their own. */
START_TEST(slices_that_wait_have_places_of_their_own) {
  rig_model model;
  flap_setup setup;
  make_model(&model);
  for (uint32_t segment = 1; segment <= LAYERS; segment++)
    for (uint32_t tail = flap_layout_least_tail(LAYERS, segment); tail <= LAYERS; tail += segment)
      for (int spread = 0; spread < 2; spread++) {
        flap_choice choice = in_backward(rig_choice_streaming(&model, false), spread == 1);
        choice.segment_layers = segment;
        choice.tail_layers = tail;
        build(&model, &choice, &setup);
        const flap_layout *layout = &setup.layout;
        const uint32_t of_layer = layout->parts[1].slice_count, of_head = layout->parts[PARTS - 1].slice_count;
        ck_assert_uint_gt(of_layer, 1);
        const uint32_t at_last = of_layer * tail + of_head;
        const uint32_t waiting =
            layout->segment_count > 1 && of_layer * segment > at_last ? of_layer * segment : at_last;
        ck_assert_uint_eq(layout->rounded_count, spread == 1 ? waiting : 1);
        for (uint32_t s = 0; spread == 1 && s < layout->segment_count; s++) {
          uint32_t first, end;
          bool taken[64] = {false};
          flap_layout_segment(layout, s, &first, &end);
          for (uint32_t layer = first; layer < end; layer++)
            for (uint32_t i = 0; i < of_layer; i++) {
              const uint32_t place = layout->slices[layout->parts[layer + 1].first_slice + i].gradient;
              ck_assert(place < layout->rounded_count && place < 64 && !taken[place]);
              taken[place] = true;
            }
        }
        flap_setup_close(&setup);
      }
  rig_model_close(&model);
}
END_TEST

/* Where sums are stored gradients as they are, those of layers in a step of one micro-batch in bf16, all in fp32, an
 * update takes them where they are: there is no place between, and nothing rounds. Unless it has to wait. */
START_TEST(final_sums_are_consumed_where_they_are) {
  rig_model model;
  flap_setup setup;
  make_model(&model);
  const bool one = _i % 2 == 0, twice = _i > 1; /* micro-batch; backward */
  model.micro_batches = one ? 1 : 2;
  model.gradient_dtype = one ? FLAP_BF16 : FLAP_F32;
  model.options.max_grad_norm = twice ? 1 : 0;
  for (int spread = 0; spread < 2; spread++) {
    const flap_choice choice = in_backward(rig_choice_streaming(&model, false), spread == 1);
    build(&model, &choice, &setup);
    const flap_layout *layout = &setup.layout;
    const flap_program *program = &setup.programs[setup.steady];
    uint32_t in_sums = 0, measured = 0, rounded = 0, i = 0;
    while (twice && program->ops[i].kind != FLAP_OP_NORM)
      i++;
    for (; i < program->op_count; i++) {
      const flap_op *op = &program->ops[i];
      if (op->kind == FLAP_OP_STORE_GRADIENT)
        *(op->operand[1] == FLAP_OPERAND_NONE ? &measured : &rounded) += 1;
      if (op->kind != FLAP_OP_ADAMW)
        continue;
      const flap_layout_slice *slice = &layout->slices[op->index];
      const uint32_t region = program->leases[op->operand[2]].region;
      ck_assert_uint_eq(region,
                        slice->gradient == FLAP_REGION_NONE ? layout->parts[slice->part].sums : slice->gradient);
      in_sums += slice->gradient == FLAP_REGION_NONE;
    }
    const uint32_t of_layers = LAYERS * layout->parts[1].slice_count, of_embedding = layout->parts[0].slice_count;
    const uint32_t at_once = one ? of_layers : layout->slice_count, later = one ? 0 : of_embedding;
    ck_assert_uint_eq(in_sums, spread == 0 ? at_once : later);
    ck_assert_uint_eq(measured, in_sums);
    ck_assert_uint_eq(rounded, layout->slice_count - measured);
    ck_assert_uint_eq(layout->regions[layout->parts[1].sums].bytes, layout->parts[1].elements * (one ? 2 : 4));
    ck_assert_uint_eq(layout->rounded_count == 0, spread == 0 && !one);
    flap_setup_close(&setup);
  }
  rig_model_close(&model);
}
END_TEST

/* A share of either kind, not of one alone; all and none are exact; and the host takes embedding and first layer last.
 */
START_TEST(shares_are_of_both_kinds) {
  rig_model model;
  flap_setup setup;
  make_model(&model);
  model.config.num_hidden_layers = 30;
  for (uint32_t hosts = 0; hosts <= 32; hosts += 4)
    for (uint32_t share = 8; share <= 32; share += 8) {
      flap_choice choice = in_backward(rig_choice_streaming(&model, false), false);
      choice.host_parts = hosts;
      choice.backward_parts = share;
      choice.host_backward_parts = 32 - share;
      build(&model, &choice, &setup);
      uint32_t host = 0, of_host = 0, of_device = 0;
      for (uint32_t part = 0; part < 32; part++) {
        const bool mine = flap_layout_is_host(&setup.layout, part), now = flap_layout_in_backward(&setup.layout, part);
        host += mine;
        of_host += mine && now;
        of_device += !mine && now;
      }
      ck_assert_uint_eq(host, hosts);
      ck_assert_uint_eq(of_device, (32 - hosts) * share / 32);
      ck_assert_uint_eq(of_host, hosts * (32 - share) / 32);
      ck_assert(hosts > 30 || (!flap_layout_is_host(&setup.layout, 0) && !flap_layout_is_host(&setup.layout, 1)));
      ck_assert(flap_setup_folds(&setup) == (share < 32 || hosts > 0));
      flap_setup_close(&setup);
    }
  rig_model_close(&model);
}
END_TEST

/* ---- a step that is begun and not made ----------------------------------------------------------------------- */

static flap_executor_input input_of(const rig_model *model, uint64_t step) {
  const uint64_t tokens = (uint64_t)model->shape.batch * model->shape.sequence * model->micro_batches;
  return (flap_executor_input){.tokens = model->tokens + step * tokens,
                               .targets = model->targets + step * tokens,
                               .counted = tokens,
                               .step = step,
                               .learning_rate = 1e-2};
}

/* Its program makes up for what the step before left, and updates nothing for itself. */
START_TEST(step_that_is_not_made_changes_nothing) {
  rig_model model;
  engine_rig rig;
  rig_state made, begun;
  make_model(&model);
  flap_choice choice = in_backward(rig_choice_streaming(&model, false), _i % 2 == 1);
  choice.backward_parts = choice.host_backward_parts = _i < 2 ? 3 : 0;
  choice.host_parts = 2;
  for (int begins = 0; begins < 2; begins++) {
    const flap_executor_input input = input_of(&model, 0);
    flap_executor_result result;
    rig_begin(&rig, &model, &(rig_place){.threads = 2});
    rig_open_choice(&rig, &choice);
    flap_executor *x = &rig.runtime.executor;
    MUST(flap_executor_begin(x, begins ? FLAP_SETUP_FIRST : FLAP_SETUP_SINGLE));
    if (begins)
      MUST(flap_executor_begin(x, FLAP_SETUP_STEADY));
    MUST(flap_executor_run(x, &input, &result));
    if (begins)
      MUST(flap_executor_run_update(x));
    MUST(flap_pager_settle(rig.runtime.pager));
    rig_read_state(&rig, begins ? &begun : &made);
    rig_close(&rig);
  }
  ck_assert_uint_eq(made.bytes, begun.bytes);
  ck_assert_int_eq(memcmp(made.data, begun.data, made.bytes), 0);
  free(made.data), free(begun.data);
  rig_model_close(&model);
}
END_TEST

/* ---- what is not finite ---------------------------------------------------------------------------------------- */

typedef struct piece {
  unsigned char *memory;
} piece;

static flap_status take_piece(void *context, uint64_t offset, uint64_t bytes, const void *memory) {
  memcpy(((piece *)context)->memory + offset, memory, bytes);
  return FLAP_OK;
}

static flap_status give_piece(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  memcpy(memory, ((piece *)context)->memory + offset, bytes);
  return FLAP_OK;
}

static uint16_t *read_weights(engine_rig *rig, uint32_t part) {
  const uint32_t region = rig->runtime.executor.layout->parts[part].weights;
  piece copy = {.memory = malloc(rig->runtime.executor.layout->regions[region].bytes)};
  ck_assert_ptr_nonnull(copy.memory);
  MUST(flap_pager_drain(rig->runtime.pager, region, take_piece, &copy));
  return (uint16_t *)(void *)copy.memory;
}

/* All of a tensor of a layer. */
static void set_tensor(engine_rig *rig, uint32_t layer, const char *name, float value) {
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  const uint32_t part = flap_layout_layer_part(layer);
  const uint32_t count = flap_model_tensors(&rig->model->config, FLAP_PART_LAYER, layer, tensors);
  uint16_t *weights = read_weights(rig, part);
  uint64_t set = 0;
  for (uint32_t i = 0; i < count; i++)
    for (uint64_t k = 0; strstr(tensors[i].name, name) != NULL && k < tensors[i].elements; k++, set++)
      weights[tensors[i].offset + k] = flap_f32_to_bf16(value);
  ck_assert_uint_gt(set, 0);
  piece copy = {.memory = (unsigned char *)weights};
  MUST(flap_pager_fill(rig->runtime.pager, rig->runtime.executor.layout->parts[part].weights, give_piece, &copy));
  free(weights);
}

/* Of the token of id 0, which nothing but this row is about: no other token has it afterwards. */
static void set_rare_token(engine_rig *rig, rig_model *model, float value) {
  const uint64_t hidden = model->config.hidden_size;
  const uint64_t count = (uint64_t)model->shape.batch * model->shape.sequence * model->micro_batches * 2;
  uint16_t *weights = read_weights(rig, 0);
  for (uint64_t i = 0; i < hidden; i++)
    weights[i] = flap_f32_to_bf16(i % 2 ? value : -value);
  piece copy = {.memory = (unsigned char *)weights};
  MUST(flap_pager_fill(rig->runtime.pager, rig->runtime.executor.layout->parts[0].weights, give_piece, &copy));
  free(weights);
  for (uint64_t i = 0; i < count; i++) /* of two steps */
    if (model->tokens[i] == 0)
      model->tokens[i] = 1;
}

/* The device is this host, and everything is in its memory: whether it still holds a part's weights as they were. */
static bool holds(const engine_rig *rig, const uint16_t *weights, uint32_t part) {
  uint64_t bytes = 0;
  const void *arena = flap_device_arena(flap_pager_device(rig->runtime.pager), &bytes);
  const uint64_t elements = rig->runtime.executor.layout->parts[part].elements;
  return memmem(arena, bytes, weights, elements * sizeof *weights) != NULL;
}

static void end_at(const rig_model *model, const char *what, const char *where, bool finite_loss) {
  engine_rig rig;
  flap_executor_result result;
  const flap_executor_input input = input_of(model, 0);
  uint16_t *before[PARTS];
  flap_choice choice = in_backward(rig_choice_resident(model), false);
  rig_begin(&rig, model, &(rig_place){.threads = 2});
  rig_open_choice(&rig, &choice);
  if (finite_loss) { /* nothing comes through the MLP; what goes back through it is too much */
    set_tensor(&rig, 1, "up_proj", 0);
    set_tensor(&rig, 1, "gate_proj", 1e30f);
    set_tensor(&rig, 1, "down_proj", 1e38f);
  } else {
    set_tensor(&rig, 1, "down_proj", INFINITY);
  }
  for (uint32_t part = 0; part < PARTS; part++)
    before[part] = read_weights(&rig, part);
  MUST(flap_executor_begin(&rig.runtime.executor, FLAP_SETUP_SINGLE));
  ck_assert_int_eq(flap_executor_run(&rig.runtime.executor, &input, &result), FLAP_NUMERIC);
  ck_assert_msg(strstr(flap_error_message(), what) != NULL && strstr(flap_error_message(), where) != NULL, "%s",
                flap_error_message());
  for (uint32_t part = 0; part < PARTS; part++) {
    if (!finite_loss || part == PARTS - 1) /* the head was updated before the layer's gradients were known */
      ck_assert_msg(holds(&rig, before[part], part) != finite_loss, "part %u", part);
    free(before[part]);
  }
  rig_close(&rig);
}

/* Nothing was updated, whichever way. */
START_TEST(loss_that_is_not_finite_leaves_all_weights) {
  rig_model model;
  make_model(&model);
  end_at(&model, "step 1: the loss is not finite", "first in layer 1", false);
  rig_model_close(&model);
}
END_TEST

/* What was complete before is updated by then: the run ends all the same, and with the same message. */
START_TEST(gradients_that_are_not_finite_end_the_run) {
  rig_model model;
  make_model(&model);
  end_at(&model, "step 1: gradients are not finite", "first in layer 1", true);
  rig_model_close(&model);
}
END_TEST

/* A micro-batch passes the head before the next one's last layer is computed. */
START_TEST(layer_at_fault_is_named_though_another_micro_batch_was_done) {
  rig_model model;
  engine_rig rig;
  flap_executor_result result;
  make_model(&model);
  flap_choice choice = in_backward(rig_choice_resident(&model), false);
  rig_begin(&rig, &model, &(rig_place){.threads = 2});
  rig_open_choice(&rig, &choice);
  set_rare_token(&rig, &model, 3.38e38f);
  set_tensor(&rig, LAYERS - 1, "o_proj", 1e37f);
  const flap_executor_input input = input_of(&model, 0);
  model.tokens[(uint64_t)model.shape.batch * model.shape.sequence * model.micro_batches - 1] = 0;
  MUST(flap_executor_begin(&rig.runtime.executor, FLAP_SETUP_SINGLE));
  ck_assert_int_eq(flap_executor_run(&rig.runtime.executor, &input, &result), FLAP_NUMERIC);
  ck_assert_msg(strstr(flap_error_message(), "step 1: the loss is not finite") != NULL &&
                    strstr(flap_error_message(), "first in layer 2:") != NULL,
                "%s", flap_error_message());
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

/* A weight that its decay makes too large, wherever the update of the first step is made. */
START_TEST(update_at_fault_is_named_by_its_step) {
  static const struct {
    flap_setup_program first, second;
    bool stops; /* the second is not made, but for the update */
    const char *text;
  } ways[] = {{FLAP_SETUP_SINGLE, FLAP_SETUP_SINGLE, false, "step 1: the optimizer"},
              {FLAP_SETUP_FIRST, FLAP_SETUP_STEADY, false, "step 1: the optimizer"},
              {FLAP_SETUP_FIRST, FLAP_SETUP_LAST, false, "step 1 or 2: the optimizer"},
              {FLAP_SETUP_FIRST, FLAP_SETUP_STEADY, true, "step 1: the optimizer"}};
  rig_model model;
  engine_rig rig;
  flap_executor_result result;
  flap_status status;
  make_model(&model);
  model.options.weight_decay = 300; /* at a rate of 0.01: twice as large, and negative */
  flap_choice choice = rig_choice_streaming(&model, false);
  choice.segment_layers = 1;
  rig_begin(&rig, &model, &(rig_place){.threads = 2});
  rig_open_choice(&rig, &choice);
  flap_executor *x = &rig.runtime.executor;
  set_rare_token(&rig, &model, 3e38f);
  MUST(flap_executor_begin(x, ways[_i].first));
  {
    const flap_executor_input input = input_of(&model, 0);
    if (ways[_i].first == FLAP_SETUP_FIRST)
      MUST(flap_executor_begin(x, ways[_i].second));
    status = flap_executor_run(x, &input, &result);
  }
  ck_assert_int_eq(status, ways[_i].first == FLAP_SETUP_FIRST ? FLAP_OK : FLAP_NUMERIC);
  const flap_executor_input input = input_of(&model, 1);
  if (status == FLAP_OK)
    ck_assert_int_eq(ways[_i].stops ? flap_executor_run_update(x) : flap_executor_run(x, &input, &result),
                     FLAP_NUMERIC);
  ck_assert_msg(strstr(flap_error_message(), ways[_i].text) != NULL, "%s", flap_error_message());
  rig_close(&rig);
  rig_model_close(&model);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("backward");
  TCase *tests = tcase_create("updates");
  tcase_set_timeout(tests, 60);
  tcase_add_loop_test(tests, gradients_do_not_pass_the_bus, 0, 2);
  tcase_add_loop_test(tests, a_second_backward_stores_no_gradient_either, 0, 2);
  tcase_add_test(tests, slices_that_wait_have_places_of_their_own);
  tcase_add_loop_test(tests, final_sums_are_consumed_where_they_are, 0, 4);
  tcase_add_test(tests, shares_are_of_both_kinds);
  tcase_add_loop_test(tests, step_that_is_not_made_changes_nothing, 0, 4);
  tcase_add_test(tests, loss_that_is_not_finite_leaves_all_weights);
  tcase_add_test(tests, gradients_that_are_not_finite_end_the_run);
  tcase_add_test(tests, layer_at_fault_is_named_though_another_micro_batch_was_done);
  tcase_add_loop_test(tests, update_at_fault_is_named_by_its_step, 0, 4);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
