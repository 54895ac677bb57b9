/* Layers that save nothing, computed again one by one: what the operations of a step read was written for them, in one
 * block of scratch memory; in a step of one micro-batch, weights and sums are leased layer by layer; and the planner
 * does it where memory is what a step waits for. That the bits are those of all other ways is test_executor_bits's.
 */
#include "tests/engine/engine_rig.h"

#include "base/units.h"

#include <stdio.h>
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
  const flap_program *program;
  content of[BUFFERS_MAX + REGIONS_MAX];
  bool leased[LEASES_MAX];
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

static void check_backward(contents *c, const flap_layout *layout, const flap_op *op) {
  check_holds(c, op->operand[4], (content){.tensors = true, .layer = op->index, .micro_batch = op->micro_batch});
  place_of(c, op->operand[4])->layer = UINT32_MAX;
  check_leased(c, op->operand[3], flap_layout_hidden_gradient(layout, op->micro_batch));
  check_leased(c, op->operand[5], layout->parts[flap_layout_layer_part(op->index)].sums);
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
  c->program = program;
  for (uint32_t i = 0; i < BUFFERS_MAX + REGIONS_MAX; i++)
    c->of[i].layer = UINT32_MAX;
  for (uint32_t i = 0; i < program->op_count; i++) {
    const flap_op *op = &program->ops[i];
    const content input = {.layer = op->index, .micro_batch = op->micro_batch};
    const bool passes = op->kind == FLAP_OP_LAYER_FORWARD || op->kind == FLAP_OP_LAYER_RECOMPUTE;
    if (op->kind == FLAP_OP_PIN || op->kind == FLAP_OP_UNPIN)
      c->leased[op->operand[0]] = op->kind == FLAP_OP_PIN;
    if (op->kind == FLAP_OP_EMBED)
      *place_of(c, op->operand[1]) = input;
    if (!passes && op->kind != FLAP_OP_LAYER_BACKWARD)
      continue;
    check_holds(c, op->operand[1], input);
    check_leased(c, op->operand[0], layout->parts[flap_layout_layer_part(op->index)].weights);
    if (passes)
      check_pass(c, op);
    else
      check_backward(c, layout, op);
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

/* ---- plans ----------------------------------------------------------------------------------------------- */

typedef struct trial {
  flap_model_config model;
  flap_machine machine;
  flap_planner planner;
  flap_budgets budgets;
} trial;

/* A billion parameters in one micro-batch; what memory does not hold passes a disk, which takes longer than all else.
 * Inputs of layers are 16 MiB each, and 40 of them. */
static void open_trial(trial *t, uint64_t ram_mib) {
  memset(t, 0, sizeof *t);
  t->model = (flap_model_config){.family = flap_model_find_family("llama"),
                                 .vocab_size = 8192,
                                 .hidden_size = 1024,
                                 .intermediate_size = 2816,
                                 .num_hidden_layers = 40,
                                 .num_attention_heads = 8,
                                 .num_key_value_heads = 8,
                                 .max_position_embeddings = 2048,
                                 .rms_norm_eps = 1e-5,
                                 .initializer_range = 0.1,
                                 .rope = {.theta = 10000}};
  MUST(flap_model_finish_config(&t->model));
  flap_device_default_machine(FLAP_DEVICE_CUDA, &t->machine);
  t->machine.flops_bf16 = t->machine.flops_f32 = 60e12;
  t->machine.device_bytes = 2e12;
  t->machine.h2d_bytes = t->machine.d2h_bytes = 50e9;
  t->machine.disk_read_bytes = 1.6e9;
  t->machine.disk_write_bytes = 2.1e9;
  t->machine.disk_both_bytes = 2.2e9;
  t->planner = (flap_planner){.spec = {.model = &t->model,
                                       .shape = {.dtype = FLAP_BF16, .batch = 4, .sequence = 2048},
                                       .mode = FLAP_MODE_TRAIN,
                                       .gradient_dtype = FLAP_BF16,
                                       .optim = FLAP_OPTIM_ADAMW,
                                       .micro_batches = 1,
                                       .needs_no_norm = true,
                                       .threads = 2,
                                       .device = FLAP_DEVICE_CUDA,
                                       .io = FLAP_BLOCK_SIM,
                                       .disk_count = 1,
                                       .disk_paths = {"disk"}},
                              .machine = &t->machine};
  t->budgets = (flap_budgets){.vram_bytes = (uint64_t)1536 * FLAP_MIB,
                              .ram_bytes = ram_mib * FLAP_MIB,
                              .disk_bytes = {(uint64_t)20 * FLAP_GIB}};
}

static double plan(uint64_t ram_mib, flap_recompute recompute, bool *layerwise_out) {
  trial t;
  flap_setup setup;
  flap_plan_costs costs;
  open_trial(&t, ram_mib);
  t.planner.expert.recompute = recompute;
  MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &costs));
  *layerwise_out = setup.choice.layerwise;
  printf("%llu MiB of RAM: segments of %u layers%s, %.1f MiB on disk, %.3f s\n", (unsigned long long)ram_mib,
         setup.choice.segment_layers, setup.choice.layerwise ? ", layer by layer" : "",
         (double)setup.disk_bytes / (double)FLAP_MIB, costs.step_seconds);
  flap_setup_close(&setup);
  return costs.step_seconds;
}

START_TEST(plans_compute_layer_by_layer_where_disks_are_the_limit) {
  bool chosen, forced, kept_out;
  const double by_itself = plan(5000, FLAP_RECOMPUTE_AUTO, &chosen);
  const double segments = plan(5000, FLAP_RECOMPUTE_SEGMENTS, &kept_out);
  const double layers = plan(5000, FLAP_RECOMPUTE_LAYERS, &forced);
  ck_assert(chosen && forced && !kept_out);
  ck_assert_double_lt(by_itself, 0.95 * segments);
  ck_assert_double_le(by_itself, 1.01 * layers);
}
END_TEST

/* With memory for everything it costs a forward, and gains nothing. */
START_TEST(plans_do_not_where_memory_is_plenty) {
  bool chosen;
  (void)plan(20000, FLAP_RECOMPUTE_AUTO, &chosen);
  ck_assert(!chosen);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("layerwise");
  TCase *tests = tcase_create("all");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, one_block_serves_all_layers, 0, (int)(sizeof WAYS / sizeof *WAYS));
  tcase_add_loop_test(tests, weights_and_sums_are_leased_layer_by_layer, 0, (int)(sizeof WAYS / sizeof *WAYS));
  tcase_add_test(tests, plans_compute_layer_by_layer_where_disks_are_the_limit);
  tcase_add_test(tests, plans_do_not_where_memory_is_plenty);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
