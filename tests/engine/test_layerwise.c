/* Layers that save nothing, computed again one by one: what the operations of a step read was written for them, in one
 * block of scratch memory; weights and sums are leased layer by layer; bits are those of all other ways, in models of
 * several segments (test_executor_bits has more ways, of few layers). When plans do it is test_planner_staging's.
 */
#include "tests/engine/engine_rig.h"

#include "base/units.h"

#include <stdlib.h>
#include <string.h>

#define LAYERS 5u
#define BUFFERS_MAX 16u
#define REGIONS_MAX 1024u
#define LEASES_MAX 8192u

/* ---- programs -------------------------------------------------------------------------------------------- */

static void make_model(rig_model *model, uint32_t micro_batches, bool clips, bool tied) {
  rig_model_small(model);
  model->config.num_hidden_layers = LAYERS;
  model->config.tie_word_embeddings = tied;
  MUST(flap_model_finish_config(&model->config));
  model->micro_batches = micro_batches;
  model->options.max_grad_norm = clips ? 1 : 0;
  rig_model_random_data(model);
}

static void build(const rig_model *model, uint32_t segment, bool layerwise, bool backward, flap_setup *setup_out) {
  engine_rig rig;
  flap_choice choice = rig_choice_streaming(model, false);
  choice.segment_layers = segment;
  choice.layerwise = layerwise;
  choice.backward_parts = choice.host_backward_parts = backward ? LAYERS + 2 : 0;
  rig_begin(&rig, model, &(rig_place){.threads = 1});
  MUST(flap_setup_build(&rig.spec, &choice, setup_out));
  rig_close(&rig);
}

/* What a place holds, a buffer of the executor's or a region: the input of a layer, or the tensors that one leaves for
 * its backward. */
typedef struct content {
  bool tensors;
  uint32_t layer, micro_batch;
} content;

typedef struct contents {
  const flap_layout *layout;
  const flap_program *program;
  content of[BUFFERS_MAX + REGIONS_MAX];
  bool leased[LEASES_MAX];
  bool begun[LEASES_MAX]; /* sums that a backward has written */
  uint32_t of_class[FLAP_CLASS_COUNT];
  uint32_t of_region[REGIONS_MAX];
} contents;

static content *place_of(contents *c, flap_operand operand) {
  const bool buffer = (operand & FLAP_OPERAND_BUFFER) != 0;
  const uint32_t index = buffer ? operand & ~FLAP_OPERAND_BUFFER : c->program->leases[operand].region;
  ck_assert_uint_lt(index, buffer ? BUFFERS_MAX : REGIONS_MAX);
  return &c->of[buffer ? index : BUFFERS_MAX + index];
}

static void check_holds(contents *c, flap_operand operand, content wanted) {
  const content *got = place_of(c, operand);
  ck_assert(got->tensors == wanted.tensors && got->layer == wanted.layer && got->micro_batch == wanted.micro_batch);
}

/* A lease of this region, which is there. */
static void check_leased(const contents *c, flap_operand operand, uint32_t region) {
  ck_assert_uint_lt(operand, c->program->lease_count);
  ck_assert(c->leased[operand] && c->program->leases[operand].region == region);
}

static bool is_sums(flap_region_class klass) {
  return klass == FLAP_CLASS_GRADIENT_SUMS || klass == FLAP_CLASS_VOCABULARY_SUMS;
}

/* Sums of two layers are never in the same place at once; what a lease leaves nothing of is gone. */
static void follow_lease(contents *c, const flap_op *op) {
  const flap_operand operand = op->operand[0];
  const flap_lease *lease = &c->program->leases[operand];
  const flap_region_class klass = c->layout->regions[lease->region].klass;
  const bool pin = op->kind == FLAP_OP_PIN;
  c->leased[operand] = pin;
  c->of_class[klass] += pin ? 1 : UINT32_MAX;
  c->of_region[lease->region] += pin ? 1 : UINT32_MAX;
  ck_assert(!is_sums(klass) || c->of_region[lease->region] <= 1);
  if (!pin && (lease->mode == FLAP_LEASE_CONSUME || lease->mode == FLAP_LEASE_SCRATCH))
    place_of(c, operand)->layer = UINT32_MAX;
}

/* By layer nothing but its own weights and sums is leased. */
static void check_backward(contents *c, const flap_op *op) {
  const flap_layout *layout = c->layout;
  const flap_operand sums = op->operand[5];
  if (flap_layout_goes_by_layer(&layout->spec) && op->index < flap_layout_tail_layer(&layout->spec))
    ck_assert(c->of_class[FLAP_CLASS_WEIGHTS] == 1 && c->of_class[FLAP_CLASS_GRADIENT_SUMS] == 1);
  check_holds(c, op->operand[4], (content){.tensors = true, .layer = op->index, .micro_batch = op->micro_batch});
  place_of(c, op->operand[4])->layer = UINT32_MAX;
  check_leased(c, op->operand[3], flap_layout_hidden_gradient(layout, op->micro_batch));
  check_leased(c, sums, layout->parts[flap_layout_layer_part(op->index)].sums);
  ck_assert(op->fresh == !c->begun[sums]);
  c->begun[sums] = true;
}

static void check_pass(contents *c, const flap_op *op) {
  if (op->operand[3] != FLAP_OPERAND_NONE)
    *place_of(c, op->operand[3]) = (content){.layer = op->index + 1, .micro_batch = op->micro_batch};
  *place_of(c, op->operand[4]) = (content){.tensors = true, .layer = op->index, .micro_batch = op->micro_batch};
}

/* Every layer's operation has its own weights and input, and its backward its own sums, and its own tensors, which
 * serve one backward. Returns how many there are. */
static uint32_t check_places(const flap_layout *layout, const flap_program *program) {
  contents *c = calloc(1, sizeof *c);
  uint32_t backwards = 0;
  ck_assert_ptr_nonnull(c);
  ck_assert_uint_le(program->lease_count, LEASES_MAX);
  c->layout = layout;
  c->program = program;
  for (uint32_t i = 0; i < BUFFERS_MAX + REGIONS_MAX; i++)
    c->of[i].layer = UINT32_MAX;
  for (uint32_t i = 0; i < program->op_count; i++) {
    const flap_op *op = &program->ops[i];
    const content input = {.layer = op->index, .micro_batch = op->micro_batch};
    const bool passes = op->kind == FLAP_OP_LAYER_FORWARD || op->kind == FLAP_OP_LAYER_RECOMPUTE;
    if (op->kind == FLAP_OP_PIN || op->kind == FLAP_OP_UNPIN)
      follow_lease(c, op);
    if (op->kind == FLAP_OP_EMBED)
      *place_of(c, op->operand[1]) = input;
    if (!passes && op->kind != FLAP_OP_LAYER_BACKWARD)
      continue;
    check_holds(c, op->operand[1], input);
    check_leased(c, op->operand[0], layout->parts[flap_layout_layer_part(op->index)].weights);
    if (passes)
      check_pass(c, op);
    else
      check_backward(c, op);
    backwards += !passes;
  }
  free(c);
  return backwards;
}

/* Of all programs that a run with this setup has. */
static void check_programs(const rig_model *model, const flap_setup *setup) {
  const uint32_t wanted = LAYERS * model->micro_batches * (setup->layout.spec.backward_twice ? 2 : 1);
  for (int i = 0; i < FLAP_SETUP_PROGRAM_COUNT; i++) {
    const flap_program *program = &setup->programs[i];
    if (program->op_count == 0)
      continue;
    ck_assert_uint_eq(check_places(&setup->layout, program), program->spec.kind == FLAP_PROGRAM_STEP ? wanted : 0);
  }
}

/* The most leases of a class of regions that are there at once. */
static uint32_t most_leased(const flap_setup *setup, flap_region_class klass) {
  const flap_program *program = &setup->programs[setup->steady];
  uint32_t now = 0, most = 0;
  for (uint32_t i = 0; i < program->op_count; i++) {
    const flap_op *op = &program->ops[i];
    if (op->kind != FLAP_OP_PIN && op->kind != FLAP_OP_UNPIN)
      continue;
    if (setup->layout.regions[program->leases[op->operand[0]].region].klass != klass)
      continue;
    now += op->kind == FLAP_OP_PIN ? 1 : UINT32_MAX;
    most = now > most ? now : most;
  }
  ck_assert_uint_eq(now, 0);
  return most;
}

static uint32_t count_ops(const flap_program *program, flap_op_kind kind) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < program->op_count; i++)
    count += program->ops[i].kind == kind;
  return count;
}

static const struct {
  uint32_t segment, micro_batches;
  bool clips, backward;
} WAYS[] = {{2, 1, false, true}, {3, 1, false, true}, {5, 1, false, true}, {2, 3, false, true},
            {3, 2, true, false}, {3, 1, true, false}, {2, 1, true, true},  {3, 2, true, true},
            {5, 2, false, true}, {1, 1, false, true}, {4, 1, false, false}};

START_TEST(one_block_serves_all_layers) {
  const uint32_t segment = WAYS[_i].segment, n = WAYS[_i].micro_batches;
  rig_model model;
  flap_setup wide, narrow;
  make_model(&model, n, WAYS[_i].clips, _i % 2 == 1);
  build(&model, segment, false, WAYS[_i].backward, &wide);
  build(&model, segment, true, WAYS[_i].backward, &narrow);
  const flap_program *before = &wide.programs[wide.steady], *program = &narrow.programs[narrow.steady];
  check_programs(&model, &wide);
  check_programs(&model, &narrow);
  ck_assert_uint_eq(flap_program_scratch_buffers(&wide.layout), flap_layout_longest_segment(&wide.layout.spec));
  ck_assert_uint_eq(flap_program_scratch_buffers(&narrow.layout), 1);
  const bool less = narrow.vram_scratch_bytes < wide.vram_scratch_bytes;
  ck_assert(less == (segment > 1));
  /* All but the last layers of segments, which their backward follows at once, are computed once more. */
  const uint32_t others = LAYERS - narrow.layout.segment_count;
  const uint32_t passes = WAYS[_i].clips && WAYS[_i].backward ? 2 : 1;
  ck_assert_uint_eq(count_ops(program, FLAP_OP_LAYER_RECOMPUTE),
                    count_ops(before, FLAP_OP_LAYER_RECOMPUTE) + others * n * passes);
  ck_assert_uint_eq(count_ops(program, FLAP_OP_LAYER_FORWARD), count_ops(before, FLAP_OP_LAYER_FORWARD));
  flap_setup_close(&wide);
  flap_setup_close(&narrow);
  rig_model_close(&model);
}
END_TEST

/* Layer by layer a backward needs one layer's at a time; with several micro-batches forward and tail need as many as
 * they pass for each. */
START_TEST(weights_and_sums_are_leased_layer_by_layer) {
  const uint32_t segment = WAYS[_i].segment, tail = flap_layout_least_tail(LAYERS, segment);
  const uint32_t longest = tail > segment ? tail : segment;
  const bool one = WAYS[_i].micro_batches == 1;
  for (int layerwise = 0; layerwise < 2; layerwise++) {
    rig_model model;
    flap_setup setup;
    make_model(&model, WAYS[_i].micro_batches, WAYS[_i].clips, false);
    build(&model, segment, layerwise == 1, WAYS[_i].backward, &setup);
    ck_assert_uint_eq(most_leased(&setup, FLAP_CLASS_WEIGHTS), one && layerwise == 1 ? 1 : longest);
    ck_assert_uint_eq(most_leased(&setup, FLAP_CLASS_GRADIENT_SUMS), one ? 0 : layerwise == 1 ? tail : longest);
    ck_assert_uint_eq(most_leased(&setup, FLAP_CLASS_VOCABULARY_SUMS), 1); /* where those of all parts are, if one */
    flap_setup_close(&setup);
    rig_model_close(&model);
  }
}
END_TEST

/* ---- bits ------------------------------------------------------------------------------------------------ */

typedef enum home { IN_VRAM, IN_RAM, ON_DISK, MIXED } home;

static const struct {
  home home;
  uint32_t segment, tail, micro_batches, backward, host;
  bool clips, tied, sweep;
  rig_ending ending;
} RUNS[] = {{IN_RAM, 2, 1, 3, LAYERS + 2, 0, false, false, false, RIG_UPDATED},
            {IN_RAM, 3, 2, 2, LAYERS + 2, 0, true, false, false, RIG_UPDATED},
            {IN_VRAM, 3, 2, 3, LAYERS + 2, 0, false, true, false, RIG_UPDATED},
            {MIXED, 3, 2, 2, 0, 0, true, true, false, RIG_UPDATED},
            {MIXED, 2, 1, 3, 4, 2, false, false, false, RIG_SWEPT},
            {ON_DISK, 2, 3, 2, 0, 3, true, false, false, RIG_SWEPT},
            {ON_DISK, 3, 2, 2, LAYERS + 2, 0, true, true, false, RIG_UPDATED},
            {IN_RAM, 4, 1, 2, 0, 0, true, false, true, RIG_UPDATED},
            {ON_DISK, 3, 2, 1, LAYERS + 2, 0, true, false, false, RIG_UPDATED},
            {MIXED, 2, 1, 1, 0, 2, true, false, false, RIG_SWEPT},
            {IN_RAM, 4, 1, 1, LAYERS + 2, 0, false, true, false, RIG_UPDATED}};

static flap_choice choice_of(const rig_model *model, int run) {
  const home at = RUNS[run].home;
  flap_choice choice =
      at == IN_VRAM ? rig_choice_resident(model) : rig_choice_streaming(model, at == ON_DISK || at == MIXED);
  for (int k = 0; k < FLAP_CLASS_COUNT && at == MIXED; k++)
    choice.resident_bytes[k] = 300 * FLAP_KIB;
  if (at == MIXED)
    choice.ram_bytes = FLAP_MIB;
  choice.segment_layers = RUNS[run].segment;
  choice.tail_layers = RUNS[run].tail;
  choice.layerwise = true;
  choice.backward_parts = choice.host_backward_parts = RUNS[run].backward;
  choice.host_parts = RUNS[run].host;
  choice.sweep = RUNS[run].sweep;
  return choice;
}

START_TEST(bits_do_not_change) {
  const rig_place memory = {.threads = 2}, disk = {.threads = 2, .disks = 1};
  rig_model model;
  rig_result wanted, got;
  make_model(&model, RUNS[_i].micro_batches, RUNS[_i].clips, RUNS[_i].tied);
  flap_choice resident = rig_choice_resident(&model);
  resident.sweep = true;
  rig_run_choice(&model, &memory, &resident, RIG_UPDATED, &wanted);
  const flap_choice choice = choice_of(&model, _i);
  rig_run_choice(&model, RUNS[_i].home >= ON_DISK ? &disk : &memory, &choice, RUNS[_i].ending, &got);
  const char *difference = rig_difference(&model, &wanted, &got);
  ck_assert_msg(*difference == 0, "not the same: %s", difference);
  rig_result_close(&wanted);
  rig_result_close(&got);
  rig_model_close(&model);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("layerwise");
  TCase *tests = tcase_create("all");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, one_block_serves_all_layers, 0, (int)(sizeof WAYS / sizeof *WAYS));
  tcase_add_loop_test(tests, weights_and_sums_are_leased_layer_by_layer, 0, (int)(sizeof WAYS / sizeof *WAYS));
  tcase_add_loop_test(tests, bits_do_not_change, 0, (int)(sizeof RUNS / sizeof *RUNS));
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
