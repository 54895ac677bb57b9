/* The list of the best candidates so far: which stay on it, which of them are simulated, and what simulations teach
 * about estimates. */
#include "engine/planner/planner_internal.h"

#include <string.h>

static bool same_skeleton(const planner_skeleton *s, const planner_skeleton *t) {
  return s->segment == t->segment && s->tail == t->tail && s->group == t->group && s->layerwise == t->layerwise &&
         s->spread == t->spread && s->saved.layers == t->saved.layers && s->saved.mask == t->saved.mask &&
         s->host == t->host && s->spares_first == t->spares_first && s->backward.device == t->backward.device &&
         s->backward.host == t->backward.host && s->keeps == t->keeps && s->slice == t->slice && s->page == t->page &&
         s->staging == t->staging && s->pool == t->pool;
}

static bool same_contender(const planner_contender *a, const planner_contender *b) {
  return a->depth == b->depth && same_skeleton(&a->s, &b->s);
}

/* Of those with segments of one length there are enough: the worst of them goes, if it is worse than this one. */
static bool make_way(planner_contender *list, uint32_t *count, const planner_contender *candidate) {
  uint32_t alike = 0, worst = 0;
  for (uint32_t i = 0; i < *count; i++)
    if (list[i].s.segment == candidate->s.segment) {
      alike++;
      worst = i;
    }
  if (alike < PLANNER_ALIKE)
    return true;
  if (candidate->estimate >= list[worst].estimate)
    return false;
  memmove(&list[worst], &list[worst + 1], (*count - worst - 1) * sizeof *list);
  (*count)--;
  return true;
}

void planner_enter(planner_contender *list, uint32_t *count, planner_contender candidate) {
  for (uint32_t i = 0; i < *count; i++)
    if (same_contender(&list[i], &candidate))
      return;
  if (!make_way(list, count, &candidate))
    return;
  uint32_t at = *count;
  while (at > 0 && candidate.estimate < list[at - 1].estimate)
    at--;
  if (at >= PLANNER_CONTENDERS)
    return;
  const uint32_t last = *count < PLANNER_CONTENDERS ? *count : PLANNER_CONTENDERS - 1;
  memmove(&list[at + 1], &list[at], (last - at) * sizeof *list);
  list[at] = candidate;
  *count = last + 1;
}

uint32_t planner_pick(const planner_contender *list, uint32_t count, uint32_t most,
                      planner_contender picked_out[PLANNER_SIMULATED]) {
  bool taken[PLANNER_CONTENDERS + 1] = {false};
  uint32_t picked = 0;
  for (int again = 0; again < 2; again++)
    for (uint32_t i = 0; i < count && picked < most; i++) {
      uint32_t alike = 0, cut_alike = 0;
      for (uint32_t j = 0; j < i; j++) {
        const bool same = taken[j] && list[j].s.segment == list[i].s.segment;
        alike += same;
        cut_alike += same && list[j].s.group == list[i].s.group;
      }
      if (taken[i] || list[i].estimate > list[0].estimate * PLANNER_WORTH_SIMULATING ||
          (!again && (alike >= most / 2 || cut_alike >= most / 3)))
        continue;
      taken[i] = true;
      picked++;
    }
  picked = 0;
  for (int others = 0; others < 2; others++) /* the best of each length come first: of long steps few are simulated */
    for (uint32_t i = 0; i < count; i++) {
      bool is_first = true;
      for (uint32_t j = 0; j < i && is_first; j++)
        is_first = !taken[j] || list[j].s.segment != list[i].s.segment;
      if (taken[i] && is_first == (others == 0))
        picked_out[picked++] = list[i];
    }
  return picked;
}

static bool waits_alike(planner_skeleton a, planner_skeleton b) {
  return a.segment == b.segment && a.layerwise == b.layerwise && a.spread == b.spread;
}

double planner_correction(const flap_planner *planner, planner_skeleton s) {
  const planner_memory *memory = planner->memory;
  for (uint32_t i = 0; memory != NULL && i < memory->correction_count; i++)
    if (waits_alike(memory->corrections[i].of, s))
      return memory->corrections[i].ratio;
  return 1;
}

static void learn(planner_memory *memory, const planner_contender *simulated, double seconds) {
  const double ratio = seconds / simulated->uncorrected;
  uint32_t i = 0;
  if (!(simulated->uncorrected > 0))
    return;
  while (i < memory->correction_count && !waits_alike(memory->corrections[i].of, simulated->s))
    i++;
  if (i == PLANNER_CORRECTIONS_MAX)
    return;
  if (i == memory->correction_count)
    memory->correction_count++;
  else if (memory->corrections[i].ratio <= ratio)
    return;
  memory->corrections[i].of = simulated->s;
  memory->corrections[i].ratio = ratio;
}

bool planner_recall_outlook(const flap_planner *planner, planner_outlook *outlook) {
  const planner_memory *memory = planner->memory;
  for (uint32_t i = 0; memory != NULL && i < memory->outlook_count; i++)
    if (same_skeleton(&memory->outlooks[i].s, &outlook->s)) {
      *outlook = memory->outlooks[i];
      return true;
    }
  return false;
}

void planner_remember_outlook(const flap_planner *planner, const planner_outlook *outlook) {
  planner_memory *memory = planner->memory;
  if (memory != NULL && memory->outlook_count < PLANNER_OUTLOOKS)
    memory->outlooks[memory->outlook_count++] = *outlook;
}

const flap_plan_costs *planner_recall(const flap_planner *planner, const planner_contender *contender) {
  const planner_memory *memory = planner->memory;
  for (uint32_t i = 0; memory != NULL && i < memory->count; i++)
    if (same_contender(&memory->of[i].contender, contender))
      return &memory->of[i].costs;
  return NULL;
}

void planner_remember(const flap_planner *planner, const planner_contender *simulated, const flap_plan_costs *costs) {
  planner_memory *memory = planner->memory;
  if (memory == NULL)
    return;
  learn(memory, simulated, costs->step_seconds);
  if (memory->count == PLANNER_MEMORY)
    return;
  memory->of[memory->count].contender = *simulated;
  memory->of[memory->count++].costs = *costs;
}
