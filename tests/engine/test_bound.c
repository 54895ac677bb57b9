/* The machine bound: cases computed by hand, and never above what a placement of a real step program moves. */
#include "engine/planner/bound.h"
#include "engine/step/program.h"

#include "base/philox.h"
#include "base/units.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Elements, by hand, each tensor padded to 4096. A layer: q, o 64x64 and k, v 32x64: 4 x 4096; gate, up, down 128x64:
 * 3 x 8192; two norms: 2 x 4096. Two layers, the embedding 256x64, and the final norm. */
#define EMBEDDING 16384
#define ELEMENTS (2 * (4 * 4096 + 3 * 8192 + 2 * 4096) + EMBEDDING + 4096)

/* Operations of a forward of 2 x 32 tokens, by hand: 2·T·(rows)·64 for q, k, v, o and for gate, up, down; half of
 * 4·T·S·64 for attention; the head. */
#define FORWARD (2 * (2. * 64 * 192 * 64 + 2. * 64 * 32 * 64 + 2. * 64 * 384 * 64) + 2. * 64 * 256 * 64)

static flap_model_config model(void) {
  flap_model_config config = {.family = flap_model_find_family("llama"),
                              .vocab_size = 256,
                              .hidden_size = 64,
                              .intermediate_size = 128,
                              .num_hidden_layers = 2,
                              .num_attention_heads = 4,
                              .num_key_value_heads = 2,
                              .head_dim = 16,
                              .max_position_embeddings = 64,
                              .rms_norm_eps = 1e-5,
                              .initializer_range = 0.02,
                              .tie_word_embeddings = true,
                              .rope = {.theta = 10000}};
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  return config;
}

static const flap_machine gpu = {.flops_bf16 = 2e9,
                                 .flops_f32 = 1e9,
                                 .device_bytes = 1e9,
                                 .h2d_bytes = 4e6,
                                 .d2h_bytes = 2e6,
                                 .disk_read_bytes = 1e6,
                                 .disk_write_bytes = 5e5}; /* and a host that cannot help */

static flap_bound bound_when(const flap_model_config *config, flap_dtype dtype, bool needs_no_norm, uint64_t vram,
                             uint64_t ram, const flap_machine *machine) {
  flap_bound_spec spec = {.model = config,
                          .shape = {.dtype = dtype, .batch = 2, .sequence = 32},
                          .micro_batches = 4,
                          .gradient_dtype = dtype,
                          .needs_no_norm = needs_no_norm,
                          .vram_bytes = vram,
                          .ram_bytes = ram,
                          .machine = machine};
  flap_bound bound;
  memset(&bound, 0xff, sizeof bound);
  flap_bound_compute(&spec, &bound);
  return bound;
}

/* Of steps that wait for no norm. */
static flap_bound bound_of(const flap_model_config *config, flap_dtype dtype, uint64_t vram, uint64_t ram,
                           const flap_machine *machine) {
  return bound_when(config, dtype, true, vram, ram, machine);
}

static void near(double got, double want) {
  ck_assert_msg(fabs(got - want) <= 1e-12 * want, "%.17g instead of %.17g", got, want);
}

/* But for shares of whole bytes. */
static void about(double got, double want) {
  ck_assert_msg(fabs(got - want) <= 1e-4 * want, "%.17g instead of %.17g", got, want);
}

START_TEST(everything_in_vram_is_bound_by_compute) {
  flap_model_config config = model();
  flap_bound bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS, 0, &gpu);
  near(bound.compute_seconds, 3 * FORWARD * 4 / 2e9);
  near(bound.seconds, bound.compute_seconds);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    ck_assert_uint_eq(bound.lane_bytes[lane], 0);
    ck_assert_double_eq(bound.lane_seconds[lane], 0);
  }
  ck_assert_double_eq(bound.shared_seconds, 0);
  near(bound_of(&config, FLAP_F32, UINT64_MAX, UINT64_MAX, &gpu).compute_seconds, 3 * FORWARD * 4 / 1e9);
}
END_TEST

START_TEST(what_vram_cannot_hold_crosses_once_each_way) {
  flap_model_config config = model();
  flap_bound bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 2000000, &gpu);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 1000000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_D2H], 1000000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_READ], 0);
  near(bound.lane_seconds[FLAP_LANE_H2D], 0.25);
  near(bound.lane_seconds[FLAP_LANE_D2H], 0.5);
  near(bound.seconds, 0.5);
  /* What the driver keeps of the budget holds none of it. */
  flap_machine driver = gpu;
  driver.overhead_bytes = 600000;
  bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 400000, 2000000, &driver);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 1000000);
  ck_assert_uint_eq(bound_of(&config, FLAP_BF16, 7, 0, &driver).lane_bytes[FLAP_LANE_H2D], 12 * ELEMENTS);
  bound = bound_of(&config, FLAP_F32, 12 * ELEMENTS - 7, 7, &gpu);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 7);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_WRITE], 0);
}
END_TEST

START_TEST(moments_of_8_bits_are_counted_with_what_they_are_relative_to) {
  flap_model_config config = model();
  const uint64_t elements = _i == 0 ? ELEMENTS : ELEMENTS + EMBEDDING; /* an untied projection has codes like a layer */
  config.tie_word_embeddings = _i == 0;
  static const struct {
    flap_dtype dtype;
    uint64_t element_bytes; /* weight, master, two codes; the embedding's moments are fp32 instead */
  } kinds[] = {{FLAP_BF16, 2 + 2 + 2}, {FLAP_F16, 2 + 4 + 2}, {FLAP_F32, 4 + 0 + 2}};
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    flap_bound_spec spec = {.model = &config,
                            .shape = {.dtype = kinds[i].dtype, .batch = 2, .sequence = 32},
                            .micro_batches = 4,
                            .gradient_dtype = kinds[i].dtype,
                            .optim = FLAP_OPTIM_ADAMW_8BIT,
                            .needs_no_norm = true,
                            .vram_bytes = kinds[i].element_bytes * elements + (elements - EMBEDDING) / 32 +
                                          EMBEDDING * (8 - 2) - 5,
                            .machine = &gpu};
    flap_bound bound;
    flap_bound_compute(&spec, &bound);
    ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 5);
    ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_WRITE], 5);
    spec.vram_bytes += 5;
    flap_bound_compute(&spec, &bound);
    ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 0);
  }
}
END_TEST

START_TEST(what_ram_cannot_hold_either_is_read_and_written) {
  flap_model_config config = model();
  flap_bound bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 400000, &gpu);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 1000000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_READ], 600000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_WRITE], 600000);
  near(bound.lane_seconds[FLAP_LANE_DISK_READ], 0.6);
  near(bound.lane_seconds[FLAP_LANE_DISK_WRITE], 1.2);
  near(bound.seconds, 1.2);
  flap_machine diskless = gpu;
  diskless.disk_read_bytes = diskless.disk_write_bytes = 0;
  ck_assert(isinf(bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 400000, &diskless).seconds));
  ck_assert(isfinite(bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 1000000, &diskless).seconds));
}
END_TEST

START_TEST(shared_cores_add_copies_to_compute) {
  flap_model_config config = model();
  flap_machine cpu = gpu;
  cpu.shared_cores = 2;
  cpu.h2d_bytes = cpu.d2h_bytes = 4e6;
  cpu.host_bytes = 12e6; /* read and written by both cores: 3e6 copied by each, dearer than alone */
  const double compute = 3 * FORWARD * 4 / 2e9;
  flap_bound bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 1000000, &cpu);
  near(bound.shared_seconds, compute + (0.25 + 0.25) / 2);
  near(bound.seconds, compute + 0.25);
  cpu.host_bytes = 40e6; /* 10e6 copied by each of them together: cheaper than alone */
  bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 1000000, &cpu);
  near(bound.shared_seconds, compute + (0.1 + 0.1) / 2);
  ck_assert_double_ge(bound.seconds, 0.25); /* one thread copies a lane */
}
END_TEST

START_TEST(both_ways_at_once_take_what_both_can_do) {
  flap_model_config config = model();
  flap_machine both = gpu; /* 4e6 up and 2e6 down alone; 1e6 read and 5e5 written */
  both.h2d_both_bytes = 2.5e6;
  both.d2h_both_bytes = 1e6;
  flap_bound bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 1000000, &both);
  near(bound.copies_seconds, 0.5 + 250000 / 4e6); /* 3.5e6 together for as long as down takes, then 4e6 up alone */
  near(bound.seconds, 0.5625);
  both.d2h_both_bytes = 1.7e6;
  bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 1000000, &both);
  near(bound.copies_seconds, 0.5); /* 4.2e6 together would be shorter, but down alone takes that long */
  near(bound.seconds, 0.5);
  both.h2d_both_bytes = 2e6;
  both.h2d_bytes = 2.2e6;
  both.d2h_both_bytes = 1e6;
  bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 1000000, &both);
  near(bound.seconds, 2 * 1000000 / 3e6);
  both.disk_both_bytes = 1.1e6;
  bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 400000, &both);
  near(bound.disks_seconds, 600000 / 5e5); /* writing takes longer alone than both do at the rate of both */
  near(bound.seconds, 600000 / 5e5);
  both.disk_write_bytes = 1e6;
  bound = bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 400000, &both);
  near(bound.seconds, 2 * 600000 / 1.1e6);
  both.disk_both_bytes = 0;
  ck_assert_double_eq(bound_of(&config, FLAP_BF16, 12 * ELEMENTS - 1000000, 400000, &both).disks_seconds, 0);
}
END_TEST

/* Where computing takes longest nothing is computed twice, and every gradient waits. */
START_TEST(gradients_that_wait_for_the_norm_cross_with_the_states) {
  flap_model_config config = model();
  flap_machine slow = gpu;
  slow.flops_bf16 = slow.flops_f32 = 1e6;
  flap_bound bound = bound_when(&config, FLAP_BF16, false, 14 * ELEMENTS - 1000000, 400000, &slow);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 1000000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_D2H], 1000000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_READ], 600000);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_DISK_WRITE], 600000);
  near(bound.seconds, 3 * FORWARD * 4 / 1e6);
  bound = bound_when(&config, FLAP_F32, false, 16 * ELEMENTS - 7, 7, &slow);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 7);
}
END_TEST

/* Where computing takes hardly any time no gradient waits; but updates do, and no backward is beside them. */
START_TEST(updates_that_wait_for_the_norm_have_no_backward_beside_them) {
  flap_model_config config = model();
  const uint64_t vram = 12 * ELEMENTS - 1000000;
  flap_machine machine = gpu;
  machine.d2h_bytes = 8e6;
  const double compute = 3 * FORWARD * 4 / 2e9;
  flap_bound bound = bound_when(&config, FLAP_BF16, false, vram, 1000000, &machine);
  ck_assert_uint_eq(bound.lane_bytes[FLAP_LANE_H2D], 1000000);
  near(bound.update_seconds, 1000000 / 4e6);
  near(bound.seconds, 1000000 / 4e6 + compute * 2 / 3);
  machine.d2h_bytes = 1e6; /* out of VRAM goes what has changed */
  near(bound_when(&config, FLAP_BF16, false, vram, 1000000, &machine).update_seconds, 1000000 / 1e6);
  bound =
      bound_when(&config, FLAP_BF16, false, vram, 400000, &machine); /* and to the disk what RAM cannot hold of it */
  near(bound.update_seconds, fmax(1000000 / 1e6, 600000 / 5e5));
  machine.d2h_bytes = 8e6;
  machine.flops_bf16 = 1e8; /* all of it fits beside the forward */
  ck_assert_double_lt(bound_when(&config, FLAP_BF16, false, vram, 1000000, &machine).update_seconds, compute * 20 / 3);
  near(bound_when(&config, FLAP_BF16, false, vram, 1000000, &machine).seconds, compute * 20);
  bound = bound_of(&config, FLAP_BF16, vram, 1000000, &gpu);
  ck_assert_double_eq(bound.update_seconds, 0);
  near(bound.seconds, 1000000 / 2e6);
}
END_TEST

/* In between, as many gradients are computed again as make computing take as long as what they spare. */
START_TEST(gradients_are_computed_again_as_long_as_it_pays) {
  flap_model_config config = model();
  flap_machine machine = gpu;
  machine.h2d_bytes = 40e6; /* so that all is out long before the end, and only the disk counts */
  machine.d2h_bytes = 40e6;
  machine.disk_write_bytes = 1e6;
  const uint64_t vram = 12 * ELEMENTS - 1000000, ram = 600000;
  /* 400000 bytes are on disk in any case, and 2 * ELEMENTS if all gradients wait. */
  machine.flops_bf16 = 1e15;
  flap_bound bound = bound_when(&config, FLAP_BF16, false, vram, ram, &machine);
  near(bound.lane_seconds[FLAP_LANE_DISK_READ], 0.4);
  /* Of a layer's 49152 elements 36864 are of matrices; embedding, norms and gaps need no product. With half of the
   * products made again, as many bytes wait as there are elements in matrices; forward and products take as long. */
  const double matrices = 2 * 36864, products = 2. * 4 * 64 * matrices, seconds = (400000 + matrices) / 1e6;
  machine.flops_bf16 = (FORWARD * 4 + products / 2) / seconds;
  bound = bound_when(&config, FLAP_BF16, false, vram, ram, &machine);
  about(bound.update_seconds, seconds);
  about(bound.compute_seconds, FORWARD * 8 / machine.flops_bf16 + seconds);
  about(bound.seconds, bound.compute_seconds);
  ck_assert(fabs((double)bound.lane_bytes[FLAP_LANE_DISK_WRITE] - 400000 - matrices) < 100);
}
END_TEST

START_TEST(bounds_never_rise_with_a_budget) {
  flap_model_config config = model();
  double before = INFINITY;
  for (uint64_t vram = 0; vram < 16 * ELEMENTS; vram += 50000) {
    flap_bound bound = bound_of(&config, FLAP_BF16, vram, 300000, &gpu);
    ck_assert_double_le(bound.seconds, before);
    before = bound.seconds;
  }
  near(before, 3 * FORWARD * 4 / 2e9);
}
END_TEST

/* ---- against programs ------------------------------------------------------------------------------------ */

static flap_philox stream;
static uint64_t drawn;

static uint64_t below(uint64_t bound) {
  return flap_philox_below(&stream, drawn++, bound);
}

typedef struct placement {
  flap_layout layout;
  flap_program program;
  bool *resident;
  flap_pager_region *regions;
  flap_pager_ring rings[FLAP_CLASS_COUNT];
  flap_pager_config config;
  flap_arena arena;
} placement;

static void build_layout(placement *p, const flap_model_config *config, flap_dtype dtype, flap_dtype gradient_dtype,
                         flap_optim optim, bool backward, bool twice) {
  flap_layout_spec spec = {.model = config,
                           .shape = {.dtype = dtype, .batch = 1, .sequence = 8},
                           .mode = FLAP_MODE_TRAIN,
                           .gradient_dtype = gradient_dtype,
                           .optim = optim,
                           .micro_batches = 4,
                           .segment_layers = 1 + (uint32_t)below(4),
                           .group_micro_batches = 1u << below(3),
                           .host_parts = below(2) ? 0 : (uint32_t)below(config->num_hidden_layers + 3),
                           .slice_elements = FLAP_OPS_BLOCK * (1 + below(4))};
  const uint32_t layers = config->num_hidden_layers, segment = spec.segment_layers;
  spec.tail_layers = flap_layout_least_tail(layers, segment); /* mostly: long ones have so much in VRAM */
  if (below(4) == 0)
    spec.tail_layers += (uint32_t)below((layers - spec.tail_layers) / segment + 1) * segment;
  if (backward) {
    spec.backward_parts = 1 + (uint32_t)below(config->num_hidden_layers + 2);
    spec.host_backward_parts = (uint32_t)below(config->num_hidden_layers + 3);
    spec.spread = below(2);
    spec.backward_twice = twice;
  }
  flap_arena measuring;
  flap_arena_measure(&measuring, "layout");
  flap_layout_build(&spec, &measuring, &p->layout);
  ck_assert_int_eq(flap_arena_open(&p->arena, "layout", measuring.bytes_used), FLAP_OK);
  flap_layout_build(&spec, &p->arena, &p->layout);
}

/* Every region somewhere by chance; rings as deep as the program needs. */
static void place(placement *p) {
  const uint32_t count = p->layout.region_count;
  const uint64_t resident_of_8 = below(9), page_bytes = 4096;
  p->resident = calloc(count, sizeof *p->resident);
  p->regions = calloc(count, sizeof *p->regions);
  for (uint32_t i = 0; i < count; i++)
    p->resident[i] = below(8) < resident_of_8 && p->layout.regions[i].place == FLAP_PLACE_ANY;
  flap_program_spec spec = {.kind = FLAP_PROGRAM_STEP};
  spec.pending = below(2);
  spec.sweep = !spec.pending;
  ck_assert_int_eq(flap_program_build(&p->layout, &spec, p->resident, &p->program), FLAP_OK);
  for (uint32_t i = 0; i < FLAP_CLASS_COUNT; i++)
    p->rings[i] = (flap_pager_ring){.name = "ring", .slot_bytes = page_bytes, .slots = p->program.live_max[i]};
  for (uint32_t i = 0; i < count; i++) {
    const flap_layout_region *region = &p->layout.regions[i];
    uint64_t pages = region->bytes / page_bytes;
    p->regions[i] = (flap_pager_region){.bytes = region->bytes, .ring = (uint32_t)region->klass};
    p->regions[i].ram_pages = (uint32_t)(below(3) == 0 ? pages : below(pages + 1));
    if (region->place != FLAP_PLACE_ANY)
      p->regions[i].ram_pages = (uint32_t)pages;
    if (region->place == FLAP_PLACE_HOST)
      p->regions[i].ring = FLAP_PAGER_HOST;
    else if (p->resident[i])
      p->regions[i] = (flap_pager_region){.bytes = region->bytes, .ring = FLAP_PAGER_RESIDENT};
    else if (p->rings[region->klass].slot_bytes < region->bytes)
      p->rings[region->klass].slot_bytes = region->bytes;
  }
  for (uint32_t i = 0; i < FLAP_CLASS_COUNT; i++)
    if (p->rings[i].slots == 0)
      p->rings[i].slots = 1;
  p->config = (flap_pager_config){.page_bytes = page_bytes,
                                  .transfer_bytes = 4 * page_bytes,
                                  .region_count = count,
                                  .regions = p->regions,
                                  .ring_count = FLAP_CLASS_COUNT,
                                  .rings = p->rings,
                                  .read_buffers = 1,
                                  .write_buffers = 1,
                                  .leases_max = p->program.lease_count};
}

/* Whoever updates what, some lane is busy for as long as the bound's busiest one. */
static flap_machine helped(void) {
  flap_machine machine = gpu;
  machine.host_bytes = 2e7;
  return machine;
}

static void check_time(int round, const uint64_t moved[FLAP_LANE_COUNT], const flap_bound *bound) {
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = gpu.h2d_bytes,
                                         [FLAP_LANE_D2H] = gpu.d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = gpu.disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = gpu.disk_write_bytes,
                                         [FLAP_LANE_HOST] = helped().host_bytes};
  double longest = 0, least = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    longest = fmax(longest, (double)moved[lane] / rates[lane]);
    least = fmax(least, bound->lane_seconds[lane]);
  }
  ck_assert_msg(longest >= least * 0.999999, "round %d: %g s, but at least %g s", round, longest, least);
}

/* Everything is outside VRAM. */
static flap_bound_spec outside(const flap_model_config *config, const flap_machine *machine) {
  return (flap_bound_spec){.model = config,
                           .shape = {.dtype = FLAP_BF16, .batch = 1, .sequence = 8},
                           .micro_batches = 1,
                           .gradient_dtype = FLAP_BF16,
                           .ram_bytes = 1ull << 40,
                           .machine = machine};
}

/* Nothing waits for a norm: the state alone crosses. The host reads gradients that the device made all the same. */
START_TEST(gradients_that_wait_for_nothing_need_not_cross) {
  const flap_model_config config = model();
  flap_machine machine = helped(), slow = gpu;
  slow.flops_bf16 = 1;
  flap_bound_spec spec = outside(&config, &slow);
  flap_bound waiting, free_of_it;
  flap_bound_compute(&spec, &waiting);
  spec.machine = &gpu;
  spec.needs_no_norm = true;
  flap_bound_compute(&spec, &free_of_it);
  for (int lane = FLAP_LANE_H2D; lane <= FLAP_LANE_D2H; lane++)
    ck_assert_uint_eq(free_of_it.lane_bytes[lane] * 14, waiting.lane_bytes[lane] * 12);
  const double alone = free_of_it.lane_seconds[FLAP_LANE_D2H];
  spec.machine = &machine;
  flap_bound_compute(&spec, &free_of_it);
  about(free_of_it.lane_seconds[FLAP_LANE_HOST], free_of_it.lane_seconds[FLAP_LANE_D2H]);
  /* Of 12 bytes a parameter the bus takes all, or 2 out; the host 26 at ten times the rate. */
  about(free_of_it.seconds, alone * 26 / 10 / 12 * (12 / (26 / 10.0 + 10)));
}
END_TEST

/* Then bus and host are busy for equally long, and less long than the bus alone. */
START_TEST(host_shares_the_update) {
  const flap_model_config config = model();
  flap_machine machine = helped(), slow = gpu;
  machine.flops_bf16 = slow.flops_bf16 = 1e15; /* so that no backward is seen, and no gradient waits */
  flap_bound_spec spec = outside(&config, &machine);
  flap_bound bound, alone;
  flap_bound_compute(&spec, &bound);
  spec.machine = &slow;
  flap_bound_compute(&spec, &alone);
  ck_assert(bound.seconds < alone.seconds);
  about(bound.lane_seconds[FLAP_LANE_HOST], bound.lane_seconds[FLAP_LANE_D2H]);
  about(bound.seconds, bound.lane_seconds[FLAP_LANE_HOST]);
  /* Of 12 bytes a parameter the bus takes all, or 2 out; the host 26 at ten times the rate. */
  const double share = 12 / (26 / 10.0 + 10);
  about(bound.seconds, alone.seconds * 26 / 10 / 12 * share);
  machine.host_bytes = 1e12; /* it updates all, and the bus carries weights and gradients */
  spec.machine = &machine;
  flap_bound_compute(&spec, &bound);
  about(bound.lane_seconds[FLAP_LANE_D2H], alone.lane_seconds[FLAP_LANE_D2H] * 2 / 12);
}
END_TEST

START_TEST(no_program_moves_less_than_the_bound) {
  flap_model_config config = model();
  config.num_hidden_layers = 12; /* and few tokens: most bytes are state */
  uint32_t bounded[FLAP_LANE_COUNT] = {0};
  stream = flap_philox_stream(7, "placements");
  for (int round = 0; round < 1600; round++) {
    placement p;
    memset(&p, 0, sizeof p);
    config.tie_word_embeddings = round % 2 == 0;
    const flap_dtype dtype = below(2) ? FLAP_BF16 : FLAP_F32;
    const flap_dtype gradient_dtype = dtype == FLAP_F32 || below(2) ? FLAP_F32 : FLAP_BF16;
    const flap_optim optim = below(2) ? FLAP_OPTIM_ADAMW_8BIT : FLAP_OPTIM_ADAMW;
    const bool backward = below(2), twice = backward && below(2);
    build_layout(&p, &config, dtype, gradient_dtype, optim, backward, twice);
    place(&p);
    flap_pager_sizes sizes;
    uint64_t moved[FLAP_LANE_COUNT];
    flap_pager_measure(&p.config, &sizes);
    flap_pager_predict(&p.config, p.program.leases, p.program.lease_count, moved);
    flap_machine machine = p.layout.spec.host_parts == 0 ? gpu : helped();
    const bool waits = !backward && p.layout.spec.host_parts == 0;
    if (waits || !backward || twice) /* so that the bound's gradients wait, or are computed again */
      machine.flops_bf16 = machine.flops_f32 = waits ? 1 : 1e18;
    flap_bound_spec spec = {.model = &config,
                            .shape = p.layout.spec.shape,
                            .micro_batches = 4,
                            .gradient_dtype = gradient_dtype,
                            .optim = optim,
                            .needs_no_norm = backward && !twice,
                            .vram_bytes = sizes.vram_bytes,
                            .ram_bytes = sizes.ram_bytes,
                            .machine = &machine};
    flap_bound bound;
    flap_bound_compute(&spec, &bound);
    for (int lane = 0; lane < FLAP_LANE_HOST && p.layout.spec.host_parts == 0; lane++) {
      ck_assert_msg(moved[lane] >= bound.lane_bytes[lane], "round %d: %llu bytes on %s, but at least %llu", round,
                    (unsigned long long)moved[lane], flap_pager_lane_name((flap_lane)lane),
                    (unsigned long long)bound.lane_bytes[lane]);
      bounded[lane] += bound.lane_bytes[lane] > 0;
    }
    check_time(round, moved, &bound);
    flap_program_close(&p.program);
    flap_arena_close(&p.arena);
    free(p.resident);
    free(p.regions);
  }
  for (int lane = 0; lane < FLAP_LANE_HOST; lane++) /* the bound said something */
    ck_assert_uint_gt(bounded[lane], 40);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("bound");
  TCase *tests = tcase_create("all");
  tcase_set_timeout(tests, 60);
  tcase_add_test(tests, everything_in_vram_is_bound_by_compute);
  tcase_add_test(tests, what_vram_cannot_hold_crosses_once_each_way);
  tcase_add_loop_test(tests, moments_of_8_bits_are_counted_with_what_they_are_relative_to, 0, 2);
  tcase_add_test(tests, what_ram_cannot_hold_either_is_read_and_written);
  tcase_add_test(tests, shared_cores_add_copies_to_compute);
  tcase_add_test(tests, both_ways_at_once_take_what_both_can_do);
  tcase_add_test(tests, host_shares_the_update);
  tcase_add_test(tests, gradients_that_wait_for_nothing_need_not_cross);
  tcase_add_test(tests, gradients_that_wait_for_the_norm_cross_with_the_states);
  tcase_add_test(tests, gradients_are_computed_again_as_long_as_it_pays);
  tcase_add_test(tests, updates_that_wait_for_the_norm_have_no_backward_beside_them);
  tcase_add_test(tests, bounds_never_rise_with_a_budget);
  tcase_add_test(tests, no_program_moves_less_than_the_bound);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
