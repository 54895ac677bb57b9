/* What the planner chooses among: every way to cut a step that may be good, whatever the budgets are. */
#include "base/assert.h"
#include "base/units.h"
#include "engine/planner/planner_internal.h"

#include <string.h>

static void add_segments(const flap_planner *planner, planner_candidates *c) {
  static const uint32_t usual[] = {1, 2, 4, 8, 16, 32};
  const uint32_t layers = planner->spec.model->num_hidden_layers;
  if (planner->spec.mode != FLAP_MODE_TRAIN) {
    c->segments[c->segment_count++] = 1;
    return;
  }
  if (planner->expert.segment_layers > 0) {
    c->segments[c->segment_count++] = planner->expert.segment_layers < layers ? planner->expert.segment_layers : layers;
    return;
  }
  for (size_t i = 0; i < sizeof usual / sizeof *usual && usual[i] < layers; i++)
    c->segments[c->segment_count++] = usual[i];
  c->segments[c->segment_count++] = layers;
}

uint32_t planner_tail(const flap_planner *planner, uint32_t segment, uint32_t wanted) {
  const uint32_t layers = planner->spec.model->num_hidden_layers;
  const uint32_t least = flap_layout_least_tail(layers, segment);
  const uint32_t more = wanted > least ? (wanted - least + segment - 1) / segment * segment : 0;
  return least + more < layers ? least + more : layers;
}

/* Longer tails, of as many layers as the model allows. */
static void add_tails(const flap_planner *planner, planner_candidates *c) {
  static const uint32_t usual[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16};
  const uint32_t forced = planner->expert.tail_layers;
  if (planner->spec.mode != FLAP_MODE_TRAIN || forced > 0) {
    c->tails[c->tail_count++] = forced > 0 ? forced : 1;
    return;
  }
  _Static_assert(sizeof usual / sizeof *usual <= PLANNER_TAILS_MAX, "room for them");
  for (size_t i = 0; i < sizeof usual / sizeof *usual && usual[i] <= planner->spec.model->num_hidden_layers; i++)
    c->tails[c->tail_count++] = usual[i];
}

/* A second backward finds what the forward left where all micro-batches are one group; else it takes another forward.
 */
static void add_groups(const flap_planner *planner, bool twice, planner_candidates *c) {
  const uint32_t n = planner->spec.micro_batches;
  if (planner->expert.group_micro_batches > 0 && planner->spec.mode == FLAP_MODE_TRAIN) {
    c->groups[c->group_count++] = planner->expert.group_micro_batches < n ? planner->expert.group_micro_batches : n;
    return;
  }
  for (uint32_t group = n; c->group_count < PLANNER_GROUPS_MAX; group = (group + 1) / 2) {
    c->groups[c->group_count++] = group;
    if (group == 1 || twice)
      break;
  }
}

static void enter_saving(planner_savings *list, uint32_t layers, uint32_t mask) {
  if (list->count == 0 || list->of[list->count - 1].layers != layers || list->of[list->count - 1].mask != mask)
    list->of[list->count++] = (planner_saving){.layers = layers, .mask = mask};
}

/* `activations` forces how many layers save, `expert.saved` what; keep and offload alone mean everything. */
static void add_saved(const flap_planner *planner, planner_candidates *c) {
  const uint32_t layers = planner->spec.model->num_hidden_layers;
  const bool forced = planner->activations != FLAP_ACTIVATIONS_AUTO;
  const char *wanted = flap_run_config_saved(planner->expert.saved);
  uint32_t set_count = 0;
  const flap_saved_set *sets = flap_model_saved_sets(planner->spec.model, &set_count);
  const bool nothing = planner->spec.mode != FLAP_MODE_TRAIN || planner->activations == FLAP_ACTIVATIONS_RECOMPUTE;
  if (nothing || !forced)
    enter_saving(&c->saved, 0, 0);
  flap_assert(set_count <= FLAP_MODEL_SAVED_MAX);
  for (uint32_t i = 0; i < set_count && !nothing; i++) {
    const bool is_first = strcmp(sets[i].name, wanted != NULL ? wanted : "all") == 0;
    const bool spare = sets[i].mask == FLAP_MODEL_SAVED_ALL; /* the planner looks at them last of all */
    for (uint32_t share = forced ? PLANNER_SAVED_SHARES : 1; share <= PLANNER_SAVED_SHARES; share++) {
      const uint32_t saved = layers * share / PLANNER_SAVED_SHARES;
      if (saved > 0 && is_first)
        enter_saving(&c->saved, saved, sets[i].mask);
      else if (saved > 0 && wanted == NULL && !forced && !spare)
        enter_saving(&c->partial, saved, sets[i].mask);
    }
  }
}

uint64_t planner_state_block_bytes(const flap_planner *planner) {
  const flap_state_format format =
      flap_layout_state_format(planner->spec.shape.dtype, planner->spec.optim, FLAP_PART_LAYER);
  return flap_layout_state_bytes(&format, FLAP_OPS_BLOCK);
}

/* Slices: powers of two of blocks; fine enough for small budgets, and few enough for a table of a large model's slices.
 */
static void add_slices(const flap_planner *planner, planner_candidates *c) {
  const uint64_t block_bytes = planner_state_block_bytes(planner);
  const uint64_t most = (uint64_t)FLAP_OPS_ADAMW_BLOCKS_MAX * FLAP_OPS_BLOCK;
  if (planner->spec.mode != FLAP_MODE_TRAIN) {
    c->slices[c->slice_count++] = FLAP_OPS_BLOCK;
    c->least_slices = 1;
    return;
  }
  if (planner->expert.slice_bytes > 0) {
    uint64_t elements = planner->expert.slice_bytes / block_bytes * FLAP_OPS_BLOCK;
    elements = elements < FLAP_OPS_BLOCK ? FLAP_OPS_BLOCK : elements > most ? most : elements;
    c->slices[c->slice_count++] = elements;
    c->least_slices = 1;
    return;
  }
  uint64_t least = FLAP_OPS_BLOCK;
  const uint64_t parameters = flap_model_parameters(planner->spec.model);
  while (parameters / least > PLANNER_TABLE_SLICES)
    least *= 2;
  for (uint64_t elements = least; elements <= most && c->slice_count < PLANNER_SLICES_MAX; elements *= 2) {
    c->least_slices += elements <= PLANNER_SLICE_BYTES / block_bytes * FLAP_OPS_BLOCK ? 1 : 0;
    c->slices[c->slice_count++] = elements;
  }
}

/* The host's cores help where the device's memory is another one; where they are the device they have no time. */
static void add_hosts(const flap_planner *planner, bool twice, planner_candidates *c) {
  const uint32_t parts = planner->spec.model->num_hidden_layers + 2;
  if (planner->spec.mode != FLAP_MODE_TRAIN)
    return;
  switch (planner->expert.optimizer) {
  case FLAP_OPTIMIZER_GPU:
    break;
  case FLAP_OPTIMIZER_CPU:
    c->host_parts = parts;
    break;
  case FLAP_OPTIMIZER_SPLIT:
    c->host_parts = parts / 2;
    break;
  case FLAP_OPTIMIZER_AUTO:
    for (uint32_t share = 1; share <= PLANNER_HOST_SHARES && planner->spec.device == FLAP_DEVICE_CUDA; share++)
      c->other_hosts[c->other_host_count++] = (parts * share + PLANNER_HOST_SHARES - 1) / PLANNER_HOST_SHARES;
    if (planner->spec.device == FLAP_DEVICE_CUDA && (planner->spec.needs_no_norm || twice))
      c->other_hosts[c->other_host_count++] = parts - 1; /* all but the embedding, whose update nothing would hide */
    break;
  }
}

/* In the backward states have most of the step to pass the bus in, and gradients none to pass. Where that is not enough
 * the next forward helps: with parts that the host updates, whose gradients go home in any case, or with all kinds, the
 * last of which is nothing in the backward. */
static void add_updates(const flap_planner *planner, bool twice, planner_candidates *c) {
  const uint32_t parts = planner->spec.model->num_hidden_layers + 2;
  const planner_backward others[] = {{parts, parts * 3 / 4},         {parts, parts / 2},
                                     {parts * 7 / 8, parts * 7 / 8}, {parts * 3 / 4, parts * 3 / 4},
                                     {parts / 2, parts / 2},         {0, 0}};
  const flap_update_when wanted = flap_run_config_update(&planner->expert);
  c->sweep = wanted == FLAP_UPDATE_SWEEP;
  if (planner->spec.mode != FLAP_MODE_TRAIN || !(planner->spec.needs_no_norm || twice) || wanted == FLAP_UPDATE_FOLD ||
      c->sweep)
    return;
  c->backward = (planner_backward){parts, parts};
  if (wanted == FLAP_UPDATE_BACKWARD)
    return;
  c->other_backward_count = sizeof others / sizeof *others - (twice ? 1 : 0);
  memcpy(c->other_backwards, others, sizeof others);
}

static void add_pages(const flap_planner *planner, planner_candidates *c) {
  if (planner->expert.page_bytes > 0) {
    c->pages[c->page_count++] = planner->expert.page_bytes;
    return;
  }
  for (uint64_t bytes = PLANNER_PAGE_MIN; bytes <= PLANNER_PAGE_MAX; bytes *= 2)
    c->pages[c->page_count++] = bytes;
}

/* `twice`: of steps with two backwards. */
static void list(const flap_planner *planner, bool twice, planner_candidates *c) {
  memset(c, 0, sizeof *c);
  c->layerwise = planner->expert.recompute == FLAP_RECOMPUTE_LAYERS;
  add_segments(planner, c);
  add_groups(planner, twice, c);
  add_tails(planner, c);
  add_saved(planner, c);
  add_slices(planner, c);
  add_pages(planner, c);
  add_hosts(planner, twice, c);
  add_updates(planner, twice, c);
}

uint32_t planner_list(const flap_planner *planner, planner_candidates lists[PLANNER_LISTS_MAX]) {
  const flap_update_when wanted = flap_run_config_update(&planner->expert);
  const bool waits = planner->spec.mode == FLAP_MODE_TRAIN && !planner->spec.needs_no_norm;
  uint32_t count = 0;
  if (!waits || wanted != FLAP_UPDATE_BACKWARD)
    list(planner, false, &lists[count++]);
  if (waits && (wanted == FLAP_UPDATE_AUTO || wanted == FLAP_UPDATE_BACKWARD))
    list(planner, true, &lists[count++]);
  return count;
}
