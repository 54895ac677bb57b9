/* Plans where states live on disk. How deep staging is where they are updated in bursts: against a few buffers, which
 * `expert.staging_bytes` forces. When a second backward goes against gradients that are stored, which `expert.update`
 * forces. And when layers are computed again one by one, against segments as a whole: `expert.recompute`. What
 * compression shortens. */
#include "base/units.h"
#include "engine/machine/codec_rates.h"
#include "engine/planner/planner.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KINDS 1 /* each plan takes seconds */
#define LAYERWISE_KINDS 0
#else
#define KINDS 3
#define LAYERWISE_KINDS 2
#endif
#define FEW_BYTES (2 * 16 * 4 * (uint64_t)FLAP_MIB) /* as many as there are without it */

typedef struct trial {
  flap_model_config model;
  flap_machine machine;
  flap_planner planner;
  flap_budgets budgets;
} trial;

/* A billion parameters, and a third of their states on a disk. VRAM has no room for updates that are spread over the
 * segment before, so those of a segment come at once, five times a step; computing takes as long as the disk, or
 * longer. */
static void open_trial(trial *t, uint64_t staging_bytes) {
  memset(t, 0, sizeof *t);
  t->model = (flap_model_config){.family = flap_model_find_family("llama"),
                                 .vocab_size = 8192,
                                 .hidden_size = 2048,
                                 .intermediate_size = 5504,
                                 .num_hidden_layers = 20,
                                 .num_attention_heads = 16,
                                 .num_key_value_heads = 16,
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
                                       .shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 2048},
                                       .mode = FLAP_MODE_TRAIN,
                                       .gradient_dtype = FLAP_BF16,
                                       .optim = FLAP_OPTIM_ADAMW,
                                       .micro_batches = 16,
                                       .needs_no_norm = true,
                                       .threads = 2,
                                       .device = FLAP_DEVICE_CUDA,
                                       .io = FLAP_BLOCK_SIM,
                                       .disk_count = 1,
                                       .disk_paths = {"disk"}},
                              .expert = {.optimizer = FLAP_OPTIMIZER_GPU,
                                         .segment_layers = 4,
                                         .recompute = FLAP_RECOMPUTE_SEGMENTS, /* by layer they come a few at a time */
                                         .group_micro_batches = 16,
                                         .staging_bytes = staging_bytes},
                              .activations = FLAP_ACTIVATIONS_RECOMPUTE,
                              .machine = &t->machine};
  t->budgets = (flap_budgets){.vram_bytes = (uint64_t)1850 * FLAP_MIB,
                              .ram_bytes = (uint64_t)9500 * FLAP_MIB,
                              .disk_bytes = {(uint64_t)20 * FLAP_GIB}};
}

typedef struct outcome {
  flap_choice choice;
  flap_plan_costs costs;
  double longest; /* of disk and compute: no step is shorter */
} outcome;

static void plan(const trial *t, outcome *o) {
  flap_setup setup;
  MUST(flap_planner_choose(&t->planner, &t->budgets, &setup, &o->costs));
  o->choice = setup.choice;
  ck_assert_uint_le(setup.ram_bytes, t->budgets.ram_bytes);
  flap_setup_close(&setup);
  o->longest = o->costs.compute_seconds;
  for (int lane = FLAP_LANE_DISK_READ; lane <= FLAP_LANE_DISK_WRITE; lane++)
    if (o->costs.lane_seconds[lane] > o->longest)
      o->longest = o->costs.lane_seconds[lane];
  printf("%u buffers of %llu KiB each way: %.3f s a step, disk and compute at least %.3f s\n", o->choice.read_buffers,
         (unsigned long long)(o->choice.transfer_bytes >> 10), o->costs.step_seconds, o->longest);
}

START_TEST(staging_is_deep_where_updates_come_in_bursts) {
  trial t;
  outcome few, deep;
  open_trial(&t, FEW_BYTES);
  plan(&t, &few);
  ck_assert_uint_eq(few.choice.read_buffers, 16);
  ck_assert_double_gt(few.costs.step_seconds, 1.3 * few.longest);
  open_trial(&t, 0);
  plan(&t, &deep);
  ck_assert_uint_ge(deep.choice.read_buffers, 4 * 16);
  ck_assert_uint_eq(deep.choice.read_buffers, deep.choice.write_buffers);
  ck_assert_double_lt(deep.costs.step_seconds, 1.15 * deep.longest);
  ck_assert_double_lt(deep.costs.step_seconds, 0.8 * few.costs.step_seconds);
}
END_TEST

/* What is forced and too much is as if nothing were; what a disk has no room for is staged in part. */
START_TEST(staging_never_keeps_a_plan_from_fitting) {
  trial t;
  outcome few, all, part;
  open_trial(&t, FEW_BYTES);
  plan(&t, &few);
  open_trial(&t, t.budgets.ram_bytes);
  plan(&t, &all);
  ck_assert_uint_eq(all.choice.read_buffers, few.choice.read_buffers);
  open_trial(&t, t.budgets.ram_bytes / 4);
  t.budgets.disk_bytes[0] = few.costs.lane_bytes[FLAP_LANE_DISK_READ] + FLAP_GIB;
  plan(&t, &part);
  ck_assert(part.choice.read_buffers > 16);
  ck_assert_uint_lt(2 * part.choice.read_buffers * part.choice.transfer_bytes, t.budgets.ram_bytes / 4);
}
END_TEST

/* ---- gradients that are stored, or computed again ---------------------------------------------------------------- */

/* Clipped, and with few tokens, so that the disk is what a step waits for. */
static void plan_clipped(flap_update_when update, uint32_t micro_batches, uint64_t ram_bytes, outcome *o,
                         bool *twice_out) {
  trial t;
  flap_setup setup;
  open_trial(&t, 0);
  t.planner.spec.needs_no_norm = false;
  t.planner.spec.micro_batches = micro_batches;
  t.planner.expert = (flap_expert){.optimizer = FLAP_OPTIMIZER_GPU, .segment_layers = 1, .update = update};
  t.budgets.vram_bytes = (uint64_t)4 * FLAP_GIB;
  t.budgets.ram_bytes = ram_bytes;
  MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &o->costs));
  o->choice = setup.choice;
  *twice_out = setup.layout.spec.backward_twice;
  flap_setup_close(&setup);
}

static uint64_t on_disk(const outcome *o) {
  return o->costs.lane_bytes[FLAP_LANE_DISK_WRITE];
}

START_TEST(gradients_are_computed_again_where_that_spares_the_disk) {
  const uint64_t small = (uint64_t)7500 * FLAP_MIB, enough = (uint64_t)16 * FLAP_GIB;
  const struct {
    uint32_t micro_batches;
    uint64_t ram_bytes;
    flap_update_when other;
    bool twice;
  } kinds[] = {{2, small, FLAP_UPDATE_FOLD, true},
               /* Where computing is what a step waits for, and where no disk is needed, it would take longer. */
               {64, small, FLAP_UPDATE_BACKWARD, false},
               {2, enough, FLAP_UPDATE_BACKWARD, false}};
  outcome chosen, other;
  bool twice, other_twice;
  plan_clipped(kinds[_i].other, kinds[_i].micro_batches, kinds[_i].ram_bytes, &other, &other_twice);
  plan_clipped(FLAP_UPDATE_AUTO, kinds[_i].micro_batches, kinds[_i].ram_bytes, &chosen, &twice);
  ck_assert(twice == kinds[_i].twice && other_twice != twice);
  ck_assert_double_lt(chosen.costs.step_seconds, other.costs.step_seconds);
  ck_assert(kinds[_i].ram_bytes == small || on_disk(&chosen) == 0);
  if (_i > 0)
    return;
  ck_assert_double_lt(chosen.costs.step_seconds, 0.9 * other.costs.step_seconds);
  ck_assert_uint_lt(on_disk(&chosen), on_disk(&other));
  ck_assert_double_gt(chosen.costs.compute_seconds, 1.4 * other.costs.compute_seconds);
}
END_TEST

/* ---- layers computed again one by one --------------------------------------------------------------------------- */

/* Half as wide and twice as deep: inputs of layers are 16 MiB each, and there are 40 for each micro-batch. */
static double plan_narrow(uint32_t micro_batches, uint64_t ram_mib, flap_recompute recompute, bool *layerwise_out) {
  trial t;
  flap_setup setup;
  flap_plan_costs costs;
  open_trial(&t, 0);
  t.model.hidden_size = 1024;
  t.model.intermediate_size = 2816;
  t.model.num_hidden_layers = 40;
  t.model.num_attention_heads = t.model.num_key_value_heads = 8;
  MUST(flap_model_finish_config(&t.model));
  t.planner.spec.shape.batch = 4;
  t.planner.spec.micro_batches = micro_batches;
  t.planner.expert = (flap_expert){.recompute = recompute};
  t.planner.activations = FLAP_ACTIVATIONS_AUTO;
  t.budgets.vram_bytes = (uint64_t)(micro_batches == 1 ? 1536 : 1024) * FLAP_MIB;
  t.budgets.ram_bytes = ram_mib * FLAP_MIB;
  MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &costs));
  *layerwise_out = setup.choice.layerwise;
  printf("%u micro-batches: segments of %u layers%s, %.1f MiB on disk, %.3f s\n", micro_batches,
         setup.choice.segment_layers, setup.choice.layerwise ? ", layerwise" : "",
         (double)setup.disk_bytes / (double)FLAP_MIB, costs.step_seconds);
  flap_setup_close(&setup);
  return costs.step_seconds;
}

START_TEST(plans_are_layerwise_where_disks_are_the_limit) {
  const uint32_t n = _i == 0 ? 1 : 4, ram_mib = _i == 0 ? 5000 : 4000;
  bool chosen, forced, kept_out;
  const double by_itself = plan_narrow(n, ram_mib, FLAP_RECOMPUTE_AUTO, &chosen);
  const double segments = plan_narrow(n, ram_mib, FLAP_RECOMPUTE_SEGMENTS, &kept_out);
  const double layers = plan_narrow(n, ram_mib, FLAP_RECOMPUTE_LAYERS, &forced);
  ck_assert(chosen && forced && !kept_out);
  ck_assert_double_lt(by_itself, 0.95 * segments);
  ck_assert_double_le(by_itself, 1.03 * layers);
}
END_TEST

/* With memory for everything it costs a forward, and gains nothing. */
START_TEST(plans_are_not_layerwise_where_memory_is_plenty) {
  bool chosen;
  (void)plan_narrow(1, 20000, FLAP_RECOMPUTE_AUTO, &chosen);
  ck_assert(!chosen);
}
END_TEST

/* ---- a pool ------------------------------------------------------------------------------------------------------ */

typedef struct pooled {
  double seconds;
  uint64_t pool_bytes, disk_bytes;
} pooled;

static pooled plan_pooled(double codec_bytes, uint64_t forced_bytes, uint64_t disk_bytes,
                          flap_compression compression) {
  trial t;
  flap_setup setup;
  flap_plan_costs costs;
  open_trial(&t, 0);
  t.planner.spec.micro_batches = 1;
  t.planner.spec.compression = compression;
  t.planner.spec.disk_rates = (flap_duplex){.alone_bytes = t.machine.disk_read_bytes,
                                            .other_alone_bytes = t.machine.disk_write_bytes,
                                            .both_bytes = t.machine.disk_both_bytes};
  t.planner.spec.threads = 8;
  t.planner.expert.group_micro_batches = 1;
  t.planner.expert.pool_bytes = forced_bytes;
  t.machine.encode_bytes = codec_bytes;
  t.machine.decode_bytes = 1.5 * codec_bytes;
  t.budgets.disk_bytes[0] = disk_bytes;
  MUST(flap_planner_choose(&t.planner, &t.budgets, &setup, &costs));
  const pooled p = {costs.step_seconds, setup.sizes.pool_bytes, setup.disk_bytes};
  ck_assert_uint_le(setup.ram_bytes, t.budgets.ram_bytes);
  ck_assert_uint_le(setup.disk_bytes, disk_bytes);
  ck_assert(p.pool_bytes == 0 || setup.choice.workers == 6);
  printf("codec of %.1f GB/s: pool of %.1f MiB, %.1f MiB on disk, %.3f s\n", codec_bytes / 1e9,
         (double)p.pool_bytes / (double)FLAP_MIB, (double)p.disk_bytes / (double)FLAP_MIB, p.seconds);
  flap_setup_close(&setup);
  return p;
}

START_TEST(compression_is_counted_where_it_pays) {
  const flap_machine usual = {.disk_read_bytes = 4e9,
                              .disk_write_bytes = 1e9,
                              .disk_both_bytes = 3e9,
                              .encode_bytes = 12e9,
                              .decode_bytes = 18e9};
  const flap_pager_config pager = {.page_bytes = FLAP_MIB,
                                   .transfer_bytes = 4 * FLAP_MIB,
                                   .compression = FLAP_COMPRESSION_AUTO,
                                   .disk_rates = {4e9, 1e9, 3e9}};
  flap_machine machine = usual;
  ck_assert_double_eq(flap_codec_disk_share(&machine, &pager, 16, FLAP_OPTIM_ADAMW), FLAP_PAGER_CODED_SHARE);
  ck_assert_double_eq(flap_codec_disk_share(&machine, &pager, 16, FLAP_OPTIM_ADAMW_8BIT), 1);
  machine.disk_both_bytes = 0; /* the two ways do not slow each other */
  ck_assert_double_eq(flap_codec_disk_share(&machine, &pager, 16, FLAP_OPTIM_ADAMW), FLAP_PAGER_CODED_SHARE);
  machine.shared_cores = 2;
  ck_assert_double_eq(flap_codec_disk_share(&machine, &pager, 16, FLAP_OPTIM_ADAMW), 1);
  machine = usual, machine.encode_bytes = 0; /* not known */
  ck_assert_double_eq(flap_codec_disk_share(&machine, &pager, 16, FLAP_OPTIM_ADAMW), 1);
  machine = usual, machine.encode_bytes = 1.5e9; /* by 8 of the 14 threads 0.77, and with decoding 0.7 GB/s both ways */
  ck_assert_double_eq(flap_codec_disk_share(&machine, &pager, 16, FLAP_OPTIM_ADAMW), 1);
  flap_pager_config other = pager;
  other.compression = FLAP_COMPRESSION_ZSTD; /* whether it pays or not */
  ck_assert_double_eq(flap_codec_disk_share(&machine, &other, 16, FLAP_OPTIM_ADAMW), FLAP_PAGER_CODED_SHARE);
  other.compression = FLAP_COMPRESSION_LZ4;
  ck_assert_double_eq(flap_codec_disk_share(&usual, &other, 16, FLAP_OPTIM_ADAMW), 1);
  other.compression = FLAP_COMPRESSION_OFF;
  ck_assert_double_eq(flap_codec_disk_share(&usual, &other, 16, FLAP_OPTIM_ADAMW), 1);
  other = pager, other.page_bytes = 4096;
  ck_assert_double_eq(flap_codec_disk_share(&usual, &other, 16, FLAP_OPTIM_ADAMW), 1);
  other = pager, other.page_bytes = other.transfer_bytes = 64 * FLAP_KIB;
  ck_assert_double_eq(flap_codec_disk_share(&usual, &other, 16, FLAP_OPTIM_ADAMW), 1);
}
END_TEST

START_TEST(ram_is_a_pool_where_that_spares_the_disk) {
  const uint64_t plenty = (uint64_t)20 * FLAP_GIB;
  const pooled without = plan_pooled(10e9, 1, plenty, FLAP_COMPRESSION_AUTO);
  const pooled with = plan_pooled(10e9, 0, plenty, FLAP_COMPRESSION_AUTO);
  ck_assert_uint_eq(without.pool_bytes, 0);
  ck_assert_uint_gt(with.pool_bytes, FLAP_GIB / 2);
  ck_assert_double_lt(with.seconds, 0.95 * without.seconds);
  ck_assert_uint_gt(with.disk_bytes, without.disk_bytes + with.pool_bytes / 2); /* nothing is promised */
  const pooled slow = plan_pooled(0.2e9, 0, plenty, FLAP_COMPRESSION_AUTO);
  ck_assert_uint_eq(slow.pool_bytes, 0);
  ck_assert_uint_eq(plan_pooled(0, 0, plenty, FLAP_COMPRESSION_AUTO).pool_bytes, 0);
  const pooled off = plan_pooled(10e9, FLAP_GIB, plenty, FLAP_COMPRESSION_OFF);
  ck_assert_uint_eq(off.pool_bytes, 0);
  ck_assert_double_lt(without.seconds, off.seconds * 0.92); /* disks move less of what is compressed, */
  ck_assert_double_gt(without.seconds, off.seconds * 0.85);
  ck_assert_double_eq_tol(slow.seconds, off.seconds, 0.02 * off.seconds); /* and nothing is, where that takes longer */
  const uint64_t little = without.disk_bytes + FLAP_GIB / 2;
  const pooled less = plan_pooled(10e9, FLAP_GIB, little, FLAP_COMPRESSION_AUTO);
  ck_assert(less.pool_bytes > FLAP_GIB / 8 && less.pool_bytes < FLAP_GIB);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tcase = tcase_create("planner staging");
  tcase_set_timeout(tcase, 120);
  tcase_add_test(tcase, staging_is_deep_where_updates_come_in_bursts);
  tcase_add_test(tcase, staging_never_keeps_a_plan_from_fitting);
  tcase_add_loop_test(tcase, gradients_are_computed_again_where_that_spares_the_disk, 0, KINDS);
  tcase_add_loop_test(tcase, plans_are_layerwise_where_disks_are_the_limit, 0, LAYERWISE_KINDS);
  tcase_add_loop_test(tcase, plans_are_not_layerwise_where_memory_is_plenty, 0, LAYERWISE_KINDS / 2);
  tcase_add_test(tcase, compression_is_counted_where_it_pays);
  tcase_add_loop_test(tcase, ram_is_a_pool_where_that_spares_the_disk, 0, LAYERWISE_KINDS / 2);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
