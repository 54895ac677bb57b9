/* Placement never changes the numbers: one small model, trained in every corner of what the planner may choose. Losses,
 * norms, evaluations and every bit of weights and moments must be those of the run that has everything in VRAM.
 */
#include "tests/engine/engine_rig.h"

#include "base/units.h"

#include <math.h>
#include <string.h>

/* A placement meets a third of the numerics that it can, or a sixth where that is all of them, and all placements
 * together every one often. Sanitizers make everything several times slower: then one or two of them. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define NUMERICS_STRIDE 11
#else
#define NUMERICS_STRIDE 3
#endif
#define LAYERS 3u
#define MICRO_BATCHES 3u

/* ---- what decides the numbers ---------------------------------------------------------------------------- */

typedef struct numerics {
  const char *name;
  flap_dtype dtype, gradient_dtype;
  bool tied, bias;
  double init_scale; /* of fp16: the losses' */
  flap_optim optim;
  bool clips_nothing;
  bool one_micro_batch; /* where gradients of layers are bf16 from the start */
} numerics;

static const numerics NUMERICS[] = {
    {"bf16", FLAP_BF16, FLAP_BF16, true, true, 0, FLAP_OPTIM_ADAMW, false, false},
    {"bf16, untied", FLAP_BF16, FLAP_BF16, false, false, 0, FLAP_OPTIM_ADAMW, false, false},
    {"bf16 with fp32 gradients", FLAP_BF16, FLAP_F32, false, true, 0, FLAP_OPTIM_ADAMW, false, false},
    {"bf16, 8-bit moments", FLAP_BF16, FLAP_BF16, true, true, 0, FLAP_OPTIM_ADAMW_8BIT, false, false},
    {"bf16, untied, 8-bit moments", FLAP_BF16, FLAP_BF16, false, true, 0, FLAP_OPTIM_ADAMW_8BIT, false, false},
    {"fp32", FLAP_F32, FLAP_F32, true, false, 0, FLAP_OPTIM_ADAMW, false, false},
    {"fp32, 8-bit moments", FLAP_F32, FLAP_F32, false, true, 0, FLAP_OPTIM_ADAMW_8BIT, false, false},
    {"bf16, no clipping", FLAP_BF16, FLAP_BF16, true, true, 0, FLAP_OPTIM_ADAMW, true, false},
    {"bf16, untied, fp32 gradients, no clipping", FLAP_BF16, FLAP_F32, false, true, 0, FLAP_OPTIM_ADAMW, true, false},
    {"fp32, untied, 8-bit moments, no clipping", FLAP_F32, FLAP_F32, false, false, 0, FLAP_OPTIM_ADAMW_8BIT, true,
     false},
    {"bf16, one micro-batch", FLAP_BF16, FLAP_BF16, true, true, 0, FLAP_OPTIM_ADAMW, false, true},
    {"bf16, one micro-batch, no clipping", FLAP_BF16, FLAP_BF16, false, true, 0, FLAP_OPTIM_ADAMW, true, true},
    {"bf16, untied, one micro-batch", FLAP_BF16, FLAP_BF16, false, false, 0, FLAP_OPTIM_ADAMW, false, true},
    {"fp32, untied, one micro-batch", FLAP_F32, FLAP_F32, false, true, 0, FLAP_OPTIM_ADAMW, false, true},
    {"fp16", FLAP_F16, FLAP_BF16, true, true, 65536, FLAP_OPTIM_ADAMW, false, false},
    {"fp16, 8-bit moments", FLAP_F16, FLAP_BF16, true, true, 65536, FLAP_OPTIM_ADAMW_8BIT, false, false},
    {"fp16 that overflows", FLAP_F16, FLAP_F32, false, false, 0x1p20, FLAP_OPTIM_ADAMW, false, false}};
#define EIGHT_BIT 3
#define OVERFLOWING (NUMERICS_COUNT - 1)
#define NUMERICS_COUNT ((int)(sizeof NUMERICS / sizeof *NUMERICS))

static rig_model models[NUMERICS_COUNT];
static rig_result references[NUMERICS_COUNT];

/* ---- what must not --------------------------------------------------------------------------------------- */

typedef enum home { IN_VRAM, IN_RAM, ON_DISK, MIXED } home;

typedef struct placement {
  const char *name;
  home home;
  uint32_t segment, group; /* 0: as long as there are layers, as many as there are micro-batches */
  uint32_t tail;           /* 0: as short as it can be */
  bool layerwise;
  uint32_t saved; /* layers */
  uint32_t mask;  /* of the tensors that they save; 0: all */
  bool saved_resident;
  bool sweep;
  uint32_t backward; /* parts, of LAYERS + 2, that are updated in the backward, the second where anything is clipped */
  bool spread;
  uint32_t host;          /* parts */
  bool spares_first;      /* of them */
  uint32_t host_backward; /* 0: as backward */
  bool keeps;             /* the embedding's states stay */

  rig_ending ending;
  uint32_t slice_blocks; /* 0: 16 */
  uint64_t page, transfer;
  uint32_t extra_slots, buffers;
  rig_place place; /* threads 0: 2 */
} placement;

/* Sets of Llama's saved tensors: qkv, attention, lse, rstd, residual, gate_up. */
#define ATTENTION 0x06
#define ALL_BUT_MLP 0x1f

static const placement PLACEMENTS[] = {
    {.name = "all in vram, folded", .home = IN_VRAM, .segment = 1},
    {.name = "all in vram, layers in pairs", .home = IN_VRAM, .segment = 2},
    {.name = "least vram", .home = IN_RAM, .segment = 1, .group = 1, .slice_blocks = 1},
    {.name = "least ram", .home = ON_DISK, .segment = 1, .buffers = 1, .page = 4 * FLAP_KIB, .place = {.disks = 1}},
    {.name = "disk, deep rings", .home = ON_DISK, .segment = 1, .extra_slots = 3, .buffers = 4, .place = {.disks = 1}},
    {.name = "a real disk", .home = ON_DISK, .page = 256 * FLAP_KIB, .place = {.disks = 1, .real_disks = true}},
    {.name = "a bit of each", .home = MIXED, .segment = 2, .place = {.disks = 1}},
    {.name = "a bit of each, three disks", .home = MIXED, .segment = 1, .extra_slots = 1, .place = {.disks = 3}},
    {.name = "io_uring", .home = ON_DISK, .buffers = 4, .place = {.io = FLAP_BLOCK_URING, .disks = 1}},
    {.name = "io threads", .home = ON_DISK, .buffers = 4, .place = {.io = FLAP_BLOCK_THREADS, .disks = 1}},
    {.name = "io_uring, three disks", .home = ON_DISK, .buffers = 4, .place = {.io = FLAP_BLOCK_URING, .disks = 3}},
    {.name = "io threads, three disks", .home = ON_DISK, .place = {.io = FLAP_BLOCK_THREADS, .disks = 3}},
    {.name = "segments of 1", .home = IN_RAM, .segment = 1},
    {.name = "segments of 2", .home = IN_RAM, .segment = 2},
    {.name = "segments of 3", .home = IN_RAM, .segment = 3},
    {.name = "groups of 1", .home = IN_RAM, .segment = 1, .group = 1},
    {.name = "groups of 2", .home = IN_RAM, .segment = 1, .group = 2},
    {.name = "groups of 1, segments of 2", .home = IN_RAM, .segment = 2, .group = 1},
    {.name = "groups of 2, segments of 3, disk", .home = ON_DISK, .group = 2, .place = {.disks = 1}},
    {.name = "groups of 1 in vram", .home = IN_VRAM, .group = 1},
    {.name = "one saved layer", .home = IN_RAM, .segment = 1, .saved = 1},
    {.name = "two saved layers", .home = IN_RAM, .segment = 1, .saved = 2},
    {.name = "two saved layers, pairs: one segment", .home = IN_RAM, .segment = 2, .saved = 2},
    {.name = "all layers saved", .home = IN_RAM, .segment = 1, .saved = 3},
    {.name = "all layers saved, one segment", .home = IN_RAM, .segment = 3, .saved = 3},
    {.name = "all layers saved, in pairs", .home = ON_DISK, .segment = 2, .saved = 3, .place = {.disks = 1}},
    {.name = "saved layers in vram", .home = IN_RAM, .segment = 1, .saved = 3, .saved_resident = true},
    {.name = "saved layers in vram, in pairs", .home = IN_RAM, .segment = 2, .saved = 3, .saved_resident = true},
    {.name = "saved layers, groups of 1", .home = IN_RAM, .segment = 1, .group = 1, .saved = 3},
    {.name = "saved layers, groups of 2", .home = ON_DISK, .segment = 3, .group = 2, .saved = 3, .place = {.disks = 2}},
    {.name = "attention of all layers", .home = IN_RAM, .segment = 1, .saved = 3, .mask = ATTENTION},
    {.name = "attention of one layer", .home = IN_RAM, .segment = 1, .saved = 1, .mask = ATTENTION},
    {.name = "attention, one segment", .home = IN_RAM, .segment = 3, .saved = 3, .mask = ATTENTION},
    {.name = "attention, pairs: one segment", .home = IN_RAM, .segment = 2, .saved = 2, .mask = ATTENTION},
    {.name = "attention in vram", .home = IN_RAM, .segment = 3, .saved = 3, .mask = ATTENTION, .saved_resident = true},
    {.name = "attention, everything in vram", .home = IN_VRAM, .segment = 2, .saved = 3, .mask = ATTENTION},
    {.name = "attention, disk, groups of 1",
     .home = ON_DISK,
     .group = 1,
     .saved = 3,
     .mask = ATTENTION,
     .place = {.disks = 1}},
    {.name = "all but the mlp", .home = IN_RAM, .segment = 1, .saved = 3, .mask = ALL_BUT_MLP},
    {.name = "all but the mlp of two layers", .home = IN_RAM, .segment = 1, .saved = 2, .mask = ALL_BUT_MLP},
    {.name = "all but the mlp, one segment", .home = IN_RAM, .segment = 3, .saved = 3, .mask = ALL_BUT_MLP},
    {.name = "all but the mlp, in pairs, disk",
     .home = ON_DISK,
     .segment = 2,
     .saved = 3,
     .mask = ALL_BUT_MLP,
     .place = {.disks = 2}},
    {.name = "all but the mlp in vram",
     .home = IN_RAM,
     .segment = 1,
     .saved = 3,
     .mask = ALL_BUT_MLP,
     .saved_resident = true},
    {.name = "all but the mlp, groups of 2",
     .home = MIXED,
     .group = 2,
     .saved = 3,
     .mask = ALL_BUT_MLP,
     .place = {.disks = 1}},
    {.name = "all but the mlp, swept", .home = IN_RAM, .saved = 3, .mask = ALL_BUT_MLP, .sweep = true},
    {.name = "the mlp alone", .home = IN_RAM, .segment = 2, .saved = 3, .mask = 0x20},
    {.name = "all but what is spare", .home = IN_RAM, .segment = 1, .saved = 3, .mask = 0x3f},
    {.name = "all but what is spare, in vram", .home = IN_VRAM, .segment = 2, .saved = 2, .mask = 0x3f},
    {.name = "one spare tensor", .home = IN_RAM, .segment = 1, .saved = 2, .mask = 0x140},
    {.name = "the residual stream alone", .home = IN_RAM, .segment = 1, .saved = 2, .mask = 0x10},
    {.name = "statistics of norms alone",
     .home = ON_DISK,
     .segment = 3,
     .saved = 3,
     .mask = 0x08,
     .place = {.disks = 1}},
    {.name = "sweep in vram", .home = IN_VRAM, .sweep = true},
    {.name = "sweep from ram", .home = IN_RAM, .segment = 1, .sweep = true},
    {.name = "sweep from disk", .home = ON_DISK, .segment = 2, .group = 1, .sweep = true, .place = {.disks = 1}},
    {.name = "interrupted, then swept", .home = IN_RAM, .segment = 1, .ending = RIG_SWEPT},
    {.name = "interrupted, then swept, disk", .home = ON_DISK, .ending = RIG_SWEPT, .place = {.disks = 1}},
    {.name = "backward in vram", .home = IN_VRAM, .segment = 1, .backward = 5},
    {.name = "backward in vram, spread", .home = IN_VRAM, .segment = 2, .backward = 5, .spread = true},
    {.name = "backward", .home = IN_RAM, .segment = 1, .backward = 5},
    {.name = "backward, spread", .home = IN_RAM, .segment = 1, .backward = 5, .spread = true, .slice_blocks = 1},
    {.name = "backward, one segment", .home = IN_RAM, .segment = 3, .backward = 5, .slice_blocks = 3},
    {.name = "backward, disk", .home = ON_DISK, .segment = 2, .backward = 5, .place = {.disks = 1}},
    {.name = "backward, spread, disk, groups of 1",
     .home = ON_DISK,
     .segment = 2,
     .group = 1,
     .backward = 5,
     .spread = true,
     .place = {.disks = 2}},
    {.name = "backward, groups of 2, mixed",
     .home = MIXED,
     .segment = 1,
     .group = 2,
     .backward = 5,
     .place = {.disks = 1}},
    {.name = "backward, saved layers, spread", .home = IN_RAM, .segment = 2, .saved = 3, .backward = 5, .spread = true},
    {.name = "backward, saved layers in vram", .home = IN_VRAM, .segment = 1, .saved = 3, .backward = 5},
    {.name = "backward, attention in vram, groups of 2",
     .home = IN_RAM,
     .segment = 2,
     .group = 2,
     .saved = 3,
     .mask = ATTENTION,
     .saved_resident = true,
     .backward = 5},
    {.name = "backward, a layer that saves all but the mlp",
     .home = IN_RAM,
     .segment = 1,
     .saved = 1,
     .mask = ALL_BUT_MLP,
     .saved_resident = true,
     .backward = 5,
     .host = 2},
    {.name = "backward of most, the rest folded", .home = IN_RAM, .segment = 1, .backward = 4, .spread = true},
    {.name = "backward of half, the rest folded", .home = MIXED, .segment = 2, .backward = 3, .place = {.disks = 1}},
    {.name = "backward of half, interrupted", .home = IN_RAM, .segment = 1, .backward = 3, .ending = RIG_SWEPT},
    {.name = "backward of some, the rest swept", .home = IN_RAM, .segment = 1, .backward = 2, .sweep = true},
    {.name = "backward, by the host", .home = IN_RAM, .segment = 1, .backward = 5, .host = 5},
    {.name = "backward, half by the host", .home = IN_RAM, .segment = 1, .backward = 5, .spread = true, .host = 3},
    {.name = "backward, some by the host, disk",
     .home = ON_DISK,
     .segment = 2,
     .group = 2,
     .backward = 5,
     .host = 2,
     .place = {.disks = 1}},
    {.name = "backward of half, half by the host",
     .home = IN_RAM,
     .segment = 1,
     .backward = 3,
     .spread = true,
     .host = 3,
     .ending = RIG_SWEPT},
    {.name = "backward of half, half by the host, in vram", .home = IN_VRAM, .segment = 2, .backward = 2, .host = 2},
    {.name = "backward, the host's share folded",
     .home = IN_RAM,
     .segment = 1,
     .backward = 5,
     .host_backward = 2,
     .host = 3},
    {.name = "backward, the embedding stays",
     .home = MIXED,
     .segment = 1,
     .backward = 5,
     .keeps = true,
     .place = {.disks = 1}},
    {.name = "half by the host", .home = IN_RAM, .segment = 1, .spread = true, .host = 3},
    {.name = "some by the host, none of the first", .home = IN_RAM, .segment = 1, .host = 2, .spares_first = true},
    {.name = "a tail of 2", .home = IN_RAM, .segment = 1, .tail = 2},
    {.name = "a tail of 2, spread", .home = IN_RAM, .segment = 1, .tail = 2, .spread = true, .slice_blocks = 1},
    {.name = "a tail of 2, spread, some by the host",
     .home = MIXED,
     .segment = 1,
     .tail = 2,
     .spread = true,
     .host = 2,
     .place = {.disks = 1}},
    {.name = "a tail of 2, swept, groups of 1, disk",
     .home = ON_DISK,
     .segment = 1,
     .tail = 2,
     .group = 1,
     .sweep = true,
     .place = {.disks = 1}},
    {.name = "a tail of 2 behind a layer that saves",
     .home = IN_RAM,
     .segment = 1,
     .tail = 2,
     .saved = 1,
     .mask = 0x06},
    {.name = "a tail of 2, all save", .home = IN_RAM, .segment = 1, .tail = 2, .saved = 3},
    {.name = "a tail of 2, backward, spread",
     .home = IN_RAM,
     .segment = 1,
     .tail = 2,
     .backward = 5,
     .spread = true,
     .slice_blocks = 1},
    {.name = "a tail of 2, interrupted", .home = IN_RAM, .segment = 1, .tail = 2, .spread = true, .ending = RIG_SWEPT},
    {.name = "all of it the tail, segments of 1", .home = IN_RAM, .segment = 1, .tail = 3, .spread = true},
    {.name = "layer by layer", .home = IN_RAM, .segment = 2, .layerwise = true},
    {.name = "layer by layer, in vram", .home = IN_VRAM, .segment = 3, .layerwise = true},
    {.name = "layer by layer, all of it the tail", .home = IN_RAM, .segment = 1, .tail = 3, .layerwise = true},
    {.name = "layer by layer, groups of 1, disk",
     .home = ON_DISK,
     .segment = 2,
     .group = 1,
     .layerwise = true,
     .place = {.disks = 1}},
    {.name = "layer by layer, backward", .home = IN_RAM, .segment = 2, .layerwise = true, .backward = 5},
    {.name = "layer by layer, backward of half, disk",
     .home = MIXED,
     .segment = 3,
     .layerwise = true,
     .backward = 3,
     .place = {.disks = 2}},
    {.name = "layer by layer, backward, spread, some by the host",
     .home = IN_RAM,
     .segment = 2,
     .layerwise = true,
     .backward = 5,
     .spread = true,
     .host = 2,
     .slice_blocks = 1},
    {.name = "layer by layer, half by the host",
     .home = IN_RAM,
     .segment = 2,
     .layerwise = true,
     .backward = 5,
     .host = 3},
    {.name = "layer by layer, swept", .home = IN_RAM, .segment = 2, .layerwise = true, .sweep = true},
    {.name = "layer by layer, interrupted, then swept",
     .home = ON_DISK,
     .segment = 2,
     .layerwise = true,
     .ending = RIG_SWEPT,
     .place = {.disks = 1}},
    {.name = "layer by layer beside layers that save",
     .home = IN_RAM,
     .segment = 1,
     .tail = 2,
     .layerwise = true,
     .saved = 1,
     .mask = ATTENTION},
    {.name = "slices of 1 block", .home = ON_DISK, .slice_blocks = 1, .place = {.disks = 1}},
    {.name = "slices of 3 blocks", .home = IN_RAM, .slice_blocks = 3},
    {.name = "slices of 8192 blocks", .home = IN_RAM, .slice_blocks = FLAP_OPS_ADAMW_BLOCKS_MAX},
    {.name = "pages of 4 KiB", .home = MIXED, .page = 4 * FLAP_KIB, .transfer = 4 * FLAP_KIB, .place = {.disks = 1}},
    {.name = "pages of 12 KiB", .home = MIXED, .page = 12 * FLAP_KIB, .transfer = 36 * FLAP_KIB, .place = {.disks = 2}},
    {.name = "pages of 64 KiB", .home = MIXED, .page = 64 * FLAP_KIB, .place = {.disks = 1}},
    {.name = "pages of 1 MiB", .home = MIXED, .page = FLAP_MIB, .place = {.disks = 1}},
    {.name = "pages of 4 MiB", .home = ON_DISK, .page = 4 * FLAP_MIB, .buffers = 1, .place = {.disks = 1}},
    {.name = "1 thread", .home = IN_RAM, .segment = 1, .place = {.threads = 1}},
    {.name = "3 threads", .home = IN_RAM, .segment = 1, .place = {.threads = 3}},
    {.name = "3 threads, disk", .home = ON_DISK, .segment = 1, .place = {.threads = 3, .disks = 1}},
};
#define PLACEMENT_COUNT ((int)(sizeof PLACEMENTS / sizeof *PLACEMENTS))

/* About half of each class in VRAM; of the rest some in RAM, the others on disk. */
static void mix(flap_choice *choice) {
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    choice->resident_bytes[k] = 300 * FLAP_KIB;
  choice->ram_bytes = FLAP_MIB;
}

static flap_choice choice_of(const rig_model *model, const placement *p) {
  flap_choice choice = p->home == IN_VRAM ? rig_choice_resident(model)
                                          : rig_choice_streaming(model, p->home == ON_DISK || p->home == MIXED);
  if (p->home == MIXED)
    mix(&choice);
  if (p->segment > 0)
    choice.segment_layers = p->segment;
  choice.tail_layers = p->tail;
  choice.layerwise = p->layerwise;
  if (p->group > 0 && p->group < model->micro_batches)
    choice.group_micro_batches = p->group;
  choice.saved_layers = p->saved;
  if (p->mask != 0)
    choice.saved_mask = p->mask;
  if (p->saved_resident)
    choice.resident_bytes[FLAP_CLASS_SAVED] = RIG_EVERYTHING;
  choice.sweep = p->sweep;
  choice.backward_parts = p->backward;
  choice.host_backward_parts = p->host_backward > 0 ? p->host_backward : p->backward;
  choice.keeps_embedding = p->keeps;

  choice.spread = p->spread;
  choice.host_parts = p->host;
  choice.host_spares_first = p->spares_first;
  if (p->slice_blocks > 0)
    choice.slice_elements = (uint64_t)p->slice_blocks * FLAP_OPS_BLOCK;
  if (p->page > 0)
    choice.page_bytes = p->page;
  if (p->transfer > 0)
    choice.transfer_bytes = p->transfer;
  if (choice.transfer_bytes < choice.page_bytes)
    choice.transfer_bytes = choice.page_bytes;
  if (p->buffers > 0)
    choice.read_buffers = choice.write_buffers = p->buffers;
  for (int k = 0; k < FLAP_CLASS_COUNT; k++)
    choice.extra_slots[k] = p->extra_slots;
  return choice;
}

/* Once, before the tests are forked off. */
static void record_references(void) {
  for (int i = 0; i < NUMERICS_COUNT; i++) {
    rig_model *model = &models[i];
    rig_model_small(model);
    model->config.num_hidden_layers = LAYERS;
    model->config.tie_word_embeddings = NUMERICS[i].tied;
    model->config.attention_bias = NUMERICS[i].bias;
    MUST(flap_model_finish_config(&model->config));
    model->micro_batches = NUMERICS[i].one_micro_batch ? 1 : MICRO_BATCHES;
    model->shape.dtype = NUMERICS[i].dtype;
    model->gradient_dtype = NUMERICS[i].gradient_dtype;
    model->options.optim = NUMERICS[i].optim;
    if (NUMERICS[i].clips_nothing)
      model->options.max_grad_norm = 0;
    if (NUMERICS[i].dtype == FLAP_F16) {
      model->options.fp16_init_scale = NUMERICS[i].init_scale;
      model->options.fp16_growth_interval = 2;
    }
    rig_model_random_data(model);
    flap_choice choice = rig_choice_resident(model);
    choice.sweep = true;
    rig_run_choice(model, &(rig_place){.threads = 2}, &choice, RIG_UPDATED, &references[i]);
  }
}

static void forget_references(void) {
  for (int i = 0; i < NUMERICS_COUNT; i++) {
    rig_result_close(&references[i]);
    rig_model_close(&models[i]);
  }
}

/* ---- tests ----------------------------------------------------------------------------------------------- */

/* Updates in the backward are of most interest where nothing is clipped, and where a backward goes before it for the
 * norm; others where updates wait. */
static bool goes_with(const placement *p, int placement_number, const numerics *n) {
  return p->backward > 0 || !n->clips_nothing || placement_number % 4 == 0;
}

START_TEST(every_placement_gives_the_same_bits) {
  const placement *p = &PLACEMENTS[_i];
  rig_place place = p->place;
  int fitting[NUMERICS_COUNT], count = 0;
  if (place.threads == 0)
    place.threads = 2;
  for (int i = 0; i < NUMERICS_COUNT; i++)
    if (goes_with(p, _i, &NUMERICS[i]))
      fitting[count++] = i;
  ck_assert_int_gt(count, 0);
  const int wanted = count == NUMERICS_COUNT ? 2 * NUMERICS_STRIDE : NUMERICS_STRIDE;
  const int stride = wanted < count ? wanted : count;
  for (int at = _i % stride; at < count; at += stride) {
    const int i = fitting[at];
    rig_result got;
    const flap_choice choice = choice_of(&models[i], p);
    rig_run_choice(&models[i], &place, &choice, p->ending, &got);
    const char *difference = rig_difference(&models[i], &references[i], &got);
    ck_assert_msg(*difference == 0, "%s: %s: not the same: %s", p->name, NUMERICS[i].name, difference);
    rig_result_close(&got);
  }
}
END_TEST

/* The runs above would agree if nothing ever happened in them. */
START_TEST(the_references_have_trained) {
  for (int i = 0; i < NUMERICS_COUNT; i++) {
    const rig_result *r = &references[i];
    ck_assert_uint_eq(r->steps, 5);
    ck_assert_uint_eq(r->evaluations, 3);
    ck_assert((r->clips[0] < 1) == !NUMERICS[i].clips_nothing || i == OVERFLOWING); /* clipping takes part */
    ck_assert(r->evaluated[0] == r->evaluated[1]); /* the first step of a warm-up has rate 0 */
    ck_assert(r->evaluated[0] != r->evaluated[2]);
    uint32_t skipped = 0, grown = 0;
    for (uint32_t step = 0; step < r->steps; step++) {
      ck_assert(r->losses[step] > 1 && r->losses[step] < 20);
      ck_assert(r->skipped[step] != 0 ? !isfinite(r->grad_norms[step]) : r->grad_norms[step] > 0.01);
      ck_assert((r->loss_scales[step] > 0) == (NUMERICS[i].dtype == FLAP_F16));
      skipped += r->skipped[step] != 0;
      grown += step > 0 && r->loss_scales[step] > r->loss_scales[step - 1];
    }
    /* Of a scale that is too large some steps are skipped, others are not, and it grows again. */
    ck_assert(i == OVERFLOWING ? skipped > 1 && skipped < r->steps : skipped == 0);
    ck_assert((grown > 0) == (NUMERICS[i].dtype == FLAP_F16));
    for (int j = 0; j < i; j++)
      ck_assert_uint_ne(r->state.digest, references[j].state.digest);
  }
}
END_TEST

/* Two steps, read afterwards. */
static void train_two(const rig_model *model, rig_result *result) {
  engine_rig rig;
  memset(result, 0, sizeof *result);
  const flap_choice choice = rig_choice_streaming(model, false);
  rig_begin(&rig, model, &(rig_place){.threads = 2});
  rig_open_choice(&rig, &choice);
  rig_train(&rig, 0, 2, RIG_UPDATED, result);
  rig_read_state(&rig, &result->state);
  rig_close(&rig);
}

/* The first step has a rate of 0, so both optimizers have the same weights and gradients in the first two steps: what
 * they make of the embedding agrees in every bit, moments included, and of everything else it does not. */
START_TEST(the_embedding_of_adamw_8bit_is_that_of_adamw) {
  const rig_model *eight = &models[EIGHT_BIT + _i]; /* tied, or not */
  rig_model plain = *eight;
  rig_result a, b;
  plain.options.optim = FLAP_OPTIM_ADAMW;
  train_two(eight, &a);
  train_two(&plain, &b);
  ck_assert(a.learning_rates[0] == 0 && a.learning_rates[1] > 0);
  const uint64_t bytes = flap_model_part_elements(&plain.config, FLAP_PART_EMBEDDING) * (2 + 2 + 4 + 4);
  ck_assert_ptr_eq(rig_state_weights(eight, &a.state, 1), a.state.data + bytes);
  ck_assert_ptr_eq(rig_state_weights(&plain, &b.state, 1), b.state.data + bytes);
  ck_assert_mem_eq(a.state.data, b.state.data, bytes);
  const uint64_t layer = flap_model_part_elements(&plain.config, FLAP_PART_LAYER) * 2;
  ck_assert_mem_ne(rig_state_weights(eight, &a.state, 1), rig_state_weights(&plain, &b.state, 1), layer);
  rig_result_close(&a);
  rig_result_close(&b);
}
END_TEST

/* Two steps; with a bit of a part turned over after step `after` (0: never). */
static void train_spoilt(const rig_model *model, uint32_t after, uint32_t part, uint32_t section, uint64_t bit,
                         rig_result *result) {
  engine_rig rig;
  memset(result, 0, sizeof *result);
  const flap_choice choice = rig_choice_streaming(model, true);
  rig_begin(&rig, model, &(rig_place){.threads = 2, .disks = 1});
  rig_open_choice(&rig, &choice);
  for (uint32_t step = 0; step < 2; step++) {
    rig_train(&rig, step, step + 1, RIG_UPDATED, result);
    if (after == step + 1)
      rig_flip_bit(&rig, part, section, bit);
  }
  rig_read_state(&rig, &result->state);
  rig_close(&rig);
}

/* The canary: the lowest bit of any part of the state is noticed; so is, a step later, one that rounding cannot hide.
 */
START_TEST(one_flipped_bit_is_noticed) {
  const rig_model *model = &models[_i == 0 ? 0 : EIGHT_BIT];
  const uint32_t part = _i == 2 ? 0 : 2;     /* the embedding, or a layer */
  const uint32_t sections = _i == 1 ? 6 : 4; /* codes have what they are relative to */
  rig_result clean, spoilt;
  train_spoilt(model, 0, part, 0, 0, &clean);
  for (uint32_t section = 0; section < sections; section++)
    for (uint32_t after = 1; after <= 2; after++) {
      const bool code = sections == 6 && (section == 2 || section == 3);
      const uint64_t bit = after == 2 ? 0 : section == 0 ? 2 : code ? 6 : section > 3 ? 20 : 12;
      train_spoilt(model, after, part, section, bit, &spoilt);
      const char *difference = rig_difference(model, &clean, &spoilt);
      ck_assert_msg(*difference != 0, "section %u, after step %u: nobody noticed", section, after);
      ck_assert_uint_ne(clean.state.digest, spoilt.state.digest);
      rig_result_close(&spoilt);
    }
  train_spoilt(model, 0, part, 0, 0, &spoilt);
  ck_assert_str_eq(rig_difference(model, &clean, &spoilt), "");
  rig_result_close(&spoilt);
  rig_result_close(&clean);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("executor_bits");
  TCase *tests = tcase_create("bits");
  tcase_set_timeout(tests, 120);
  tcase_add_unchecked_fixture(tests, record_references, forget_references);
  tcase_add_loop_test(tests, every_placement_gives_the_same_bits, 0, PLACEMENT_COUNT);
  tcase_add_test(tests, the_references_have_trained);
  tcase_add_loop_test(tests, one_flipped_bit_is_noticed, 0, 3);
  tcase_add_loop_test(tests, the_embedding_of_adamw_8bit_is_that_of_adamw, 0, 2);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
