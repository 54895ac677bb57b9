/* What operations take on the cpu: the machine's rates, corrected by what the run's own operations reach of them. Those
 * are of large products; small ones, attention and element-wise work reach less, each in its own way.
 *
 * Where a round over all operations would take long, or much memory, they are timed with fewer tokens, and what they
 * reach of the rates there is taken for what they would reach with all. What takes so long per element of a slice is
 * left to the rates: it is bound by memory, and slices are of the planner's size. */
#include "base/pool.h"
#include "engine/machine/op_times_internal.h"

#define ROUND_NS_MAX ((uint64_t)300000000) /* by rates; seven of them are run, or fewer where rates are wrong */
#define SEQUENCE_LEAST 64u

/* A forward before what reads activations, and each operation once. */
static uint64_t round_ns(const flap_op_times *t) {
  uint64_t sets_ns = 0;
  for (uint32_t i = 0; i < t->set_count; i++)
    sets_ns += t->forward_ns + t->set_recompute_ns[i];
  const uint64_t backwards = FLAP_SUMS_KINDS + 1; /* one more, with spare tensors */
  return sets_ns + (3 + backwards) * t->forward_ns + (1 + backwards) * t->recompute_ns +
         backwards * t->backward_ns[FLAP_SUMS_ADDED_TO] + t->loss_ns + 2 * t->head_ns;
}

static bool has_fewer_tokens(flap_model_shape *shape) {
  if (shape->batch > 1)
    shape->batch /= 2;
  else if (shape->sequence >= 2 * SEQUENCE_LEAST)
    shape->sequence /= 2;
  else
    return false;
  return true;
}

/* A difference that others' work has made nothing of tells nothing. */
static uint64_t corrected(uint64_t ns, uint64_t measured_ns, uint64_t estimated_ns) {
  return estimated_ns > 0 && measured_ns > 0 ? (uint64_t)((double)ns * ((double)measured_ns / (double)estimated_ns))
                                             : ns;
}

/* `times`, from rates, by what was measured where `estimated` comes from the same rates. */
static void correct(flap_op_times *times, const flap_op_times *measured, const flap_op_times *estimated) {
#define CORRECT(field) times->field = corrected(times->field, measured->field, estimated->field)
  CORRECT(embed_ns);
  CORRECT(forward_ns);
  CORRECT(recompute_ns);
  CORRECT(loss_ns);
  CORRECT(head_ns);
  CORRECT(head_fresh_ns);
  CORRECT(embed_backward_ns);
  for (int kind = 0; kind < FLAP_SUMS_KINDS; kind++) {
    CORRECT(backward_ns[kind]);
    CORRECT(backward_spare_ns[kind]);
    if (times->backward_spare_ns[kind] > times->backward_ns[kind]) /* each by its own ratio */
      times->backward_spare_ns[kind] = times->backward_ns[kind];
  }
  for (uint32_t i = 0; i < times->set_count; i++)
    CORRECT(set_recompute_ns[i]);
#undef CORRECT
}

flap_status flap_op_times_measure_cpu(const flap_op_times_spec *spec, const flap_machine *machine,
                                      uint64_t memory_bytes, flap_op_times *times_out) {
  const op_times_parts parts = PART_LAYER | PART_HEAD;
  flap_op_times_spec fewer = *spec;
  flap_op_times estimated, measured;
  FLAP_TRY(flap_op_times_from_rates(spec, machine, times_out));
  for (estimated = *times_out;
       round_ns(&estimated) > ROUND_NS_MAX || op_times_bytes(&fewer, parts, FLAP_DEVICE_CPU) > memory_bytes;) {
    if (!has_fewer_tokens(&fewer.shape))
      return flap_error_set(FLAP_BUDGET, "a layer and the head are too large to be timed within a second");
    FLAP_TRY(flap_op_times_from_rates(&fewer, machine, &estimated));
  }
  flap_device_config config = {
      .kind = FLAP_DEVICE_CPU, .vram_bytes = op_times_bytes(&fewer, parts, FLAP_DEVICE_CPU), .events_max = 2};
  FLAP_TRY(flap_pool_open(spec->threads, &config.pool));
  const flap_status status = op_times_run_on(&fewer, parts, &config, FLAP_DEVICE_CPU, &measured);
  flap_pool_close(config.pool);
  FLAP_TRY(status);
  correct(times_out, &measured, &estimated);
  times_out->measured = true;
  return FLAP_OK;
}
