#include "engine/run/executor.h"

#include "base/assert.h"
#include "base/units.h"
#include "engine/step/schedule.h"
#include "engine/step/update.h"
#include "io/formats/trace.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STALL_TRACED_NS 20000
#define WAITS_FOR_H2D "waits for h2d"

/* ---- operands -------------------------------------------------------------------------------------------- */

static unsigned char *address(const flap_executor *x, flap_operand operand) {
  if (operand == FLAP_OPERAND_NONE)
    return NULL;
  if (operand & FLAP_OPERAND_BUFFER) {
    const uint32_t index = operand & ~FLAP_OPERAND_BUFFER;
    return index < x->hidden_buffers ? x->device.hidden + index * x->device.hidden_bytes
                                     : x->device.scratch + (index - x->hidden_buffers) * x->device.scratch_bytes;
  }
  if (operand & FLAP_OPERAND_INPUT)
    return (unsigned char *)x->host.addresses[operand & ~FLAP_OPERAND_INPUT] + x->device.kept_bytes;
  return x->host.addresses[operand];
}

/* Fp32 sums. */
static float *sums_at(const flap_executor *x, flap_operand operand, uint64_t element) {
  return (float *)(void *)address(x, operand) + element;
}

/* A slice's part of its part's sums, whatever they are in. */
static unsigned char *slice_of_sums(const flap_executor *x, flap_operand sums, const flap_layout_slice *slice) {
  const flap_part kind = x->layout->parts[slice->part].kind;
  return address(x, sums) + slice->first_element * flap_dtype_bytes(flap_layout_sums_dtype(&x->layout->spec, kind));
}

static unsigned char *weights_at(const flap_executor *x, flap_operand operand, uint64_t element) {
  return address(x, operand) + element * flap_dtype_bytes(x->run.shape.dtype);
}

static uint64_t tokens_of(const flap_executor *x) {
  return (uint64_t)x->run.shape.batch * x->run.shape.sequence;
}

/* ---- operations ------------------------------------------------------------------------------------------ */

static void embed(flap_executor *x, const flap_op *op) {
  flap_model_run run = x->run;
  if (x->layout->spec.mode == FLAP_MODE_SAMPLE)
    run.shape.sequence = x->input->decode_tokens;
  flap_model_embed(&run, address(x, op->operand[0]), x->device.tokens + op->micro_batch * tokens_of(x),
                   address(x, op->operand[1]));
}

/* The places of a layer's saved tensors; where nothing is kept, all are scratch. */
static flap_model_saved saved(const flap_executor *x, const flap_op *op) {
  return (flap_model_saved){.kept = address(x, op->operand[2]),
                            .scratch = address(x, op->operand[4]),
                            .mask = op->operand[2] == FLAP_OPERAND_NONE ? 0 : x->layout->spec.saved_mask};
}

static void forward(flap_executor *x, const flap_op *op) {
  const flap_model_saved places = saved(x, op);
  flap_model_layer_forward(&x->run, address(x, op->operand[0]), address(x, op->operand[1]), &places,
                           address(x, op->operand[3]));
}

static void recompute(flap_executor *x, const flap_op *op) {
  const flap_model_saved places = saved(x, op);
  flap_model_layer_recompute(&x->run, address(x, op->operand[0]), address(x, op->operand[1]), &places);
}

static void backward(flap_executor *x, const flap_op *op) {
  const flap_model_saved places = saved(x, op);
  const flap_model_gradient dweights = {.sums = address(x, op->operand[5]),
                                        .dtype = flap_layout_sums_dtype(&x->layout->spec, FLAP_PART_LAYER),
                                        .accumulate = !op->fresh};
  flap_model_layer_backward(&x->run, address(x, op->operand[0]), address(x, op->operand[1]), &places,
                            address(x, op->operand[3]), &dweights);
}

/* What losses are multiplied by, and gradients with them. */
static double scale_of(const flap_executor *x) {
  return x->scale > 0 ? x->scale : 1;
}

static void head(flap_executor *x, const flap_op *op) {
  const uint64_t first = op->micro_batch * tokens_of(x), projection = flap_model_head_projection(x->run.config);
  const bool backward = op->operand[3] != FLAP_OPERAND_NONE;
  const float scale = (float)(scale_of(x) / (double)x->input->counted);
  flap_model_head_loss(&x->run, address(x, op->operand[0]), weights_at(x, op->operand[1], projection),
                       address(x, op->operand[2]), x->device.targets + first, scale, x->device.losses + first,
                       address(x, op->operand[3]), backward ? sums_at(x, op->operand[4], 0) : NULL,
                       backward ? sums_at(x, op->operand[5], projection) : NULL, !op->fresh);
}

static void store_gradient(flap_executor *x, const flap_op *op) {
  const flap_layout_slice *slice = &x->layout->slices[op->index];
  const uint64_t block = x->layout->parts[slice->part].first_block + slice->first_element / FLAP_OPS_BLOCK;
  flap_ops_gradient_store(x->ops, x->layout->spec.gradient_dtype, address(x, op->operand[1]),
                          x->device.block_squares + block,
                          flap_layout_sums_dtype(&x->layout->spec, x->layout->parts[slice->part].kind),
                          slice_of_sums(x, op->operand[0], slice), slice->elements);
}

/* But for where its bytes are. */
static flap_update update_of(const flap_executor *x, uint32_t index) {
  const flap_layout_slice *slice = &x->layout->slices[index];
  return (flap_update){.weight_dtype = x->run.shape.dtype,
                       .gradient_dtype = x->layout->spec.gradient_dtype,
                       .format = &x->layout->state_formats[x->layout->parts[slice->part].kind],
                       .elements = slice->elements,
                       .decay_blocks = x->host.decay + index * x->host.decay_stride};
}

/* The update of a skipped step leaves what its leases hold as it is. */
static void adamw(flap_executor *x, const flap_op *op) {
  const flap_layout_slice *slice = &x->layout->slices[op->index];
  flap_update update = update_of(x, op->index);
  update.weights = weights_at(x, op->operand[0], slice->first_element);
  update.states = address(x, op->operand[1]);
  update.gradient =
      slice->gradient == FLAP_REGION_NONE ? slice_of_sums(x, op->operand[2], slice) : address(x, op->operand[2]);
  update.fault = x->device.fault;
  flap_assert(x->has_update);
  if (!x->skips)
    flap_update_launch(x->ops, &x->adamw, &update);
}

/* A job of the pager's, on its thread. The scalars stay as they are until the next norm, by when the forward has used
 * all weights; or, where updates begin in the backward, until the losses of the next step are there, likewise. */
static void update_on_host(void *context, void *const memory[]) {
  const flap_host_job *job = context;
  flap_executor *x = job->executor;
  flap_update update = update_of(x, job->slice);
  const uint64_t weight_bytes = flap_dtype_bytes(update.weight_dtype);
  update.states = memory[0];
  update.gradient = memory[1];
  update.weights = (unsigned char *)memory[2] + x->layout->slices[job->slice].first_element * weight_bytes;
  update.fault = &x->host_fault;
  flap_update_on_host(x->host_optimizer, &x->adamw, &update);
}

/* Where there is nothing to update its leases are passed by all the same. */
static void host_adamw(flap_executor *x, const flap_op *op) {
  flap_pager_job job = {.run = NULL};
  const bool runs = (x->mode == FLAP_EXECUTE || x->mode == FLAP_EXECUTE_UPDATE) && !x->skips;
  if (x->times != NULL) {
    job.ns = flap_op_times_of(x->times, x->layout, op);
    job.beside_copies_ns = flap_op_times_beside_copies(x->times, x->layout, op);
    job.copies_beside = x->times->copies_beside_host;
  } else if (runs) {
    flap_assert(x->has_update);
    x->host.jobs[op->index] = (flap_host_job){.executor = x, .slice = op->index};
    job.run = update_on_host;
    job.context = &x->host.jobs[op->index];
  }
  flap_pager_run_job(x->pager, op->operand[0], 3, &job);
}

static void zero(flap_executor *x, const flap_op *op) {
  flap_ops_zero(x->ops, address(x, op->operand[0]), x->layout->parts[op->index].elements * 4);
}

static flap_status logits(flap_executor *x, const flap_op *op) {
  flap_model_logits(&x->run, address(x, op->operand[0]),
                    weights_at(x, op->operand[1], flap_model_head_projection(x->run.config)),
                    address(x, op->operand[2]), x->input->decode_tokens - 1, x->device.logits);
  return flap_device_download(flap_ops_device(x->ops), x->host.logits, x->device.logits,
                              (uint64_t)x->run.config->vocab_size * 4);
}

/* ---- what is not finite ---------------------------------------------------------------------------------- */

static const char *part_name(const flap_layout_part *part, char *buffer, size_t bytes) {
  if (part->kind == FLAP_PART_EMBEDDING)
    return "the embedding";
  if (part->kind == FLAP_PART_HEAD)
    return "the head";
  (void)snprintf(buffer, bytes, "layer %u", part->layer);
  return buffer;
}

static flap_status not_finite(const flap_executor *x, const char *what, uint32_t part) {
  char name[32], advice[96] = "";
  if (x->loss_scale.scale > 0)
    (void)snprintf(advice, sizeof advice, ", even at the loss scale of %g (fp16_min_scale): use bf16, or",
                   x->loss_scale.scale);
  return flap_error_set(FLAP_NUMERIC,
                        "step %llu: %s %s not finite (NaN or infinity), first in %s%s lower learning_rate, set "
                        "max_grad_norm or more warmup_steps, or look at the data",
                        (unsigned long long)x->input->step + 1, what, strcmp(what, "the loss") == 0 ? "is" : "are",
                        part_name(&x->layout->parts[part], name, sizeof name), advice[0] ? advice : ":");
}

/* Backward runs from the head down, so the highest part with such a gradient is where it began. */
static flap_status gradients_not_finite(const flap_executor *x) {
  for (uint32_t part = x->layout->part_count; part-- > 0;) {
    const flap_layout_part *p = &x->layout->parts[part];
    for (uint64_t block = 0; block < p->elements / FLAP_OPS_BLOCK; block++)
      if (!isfinite(x->host.block_squares[p->first_block + block]))
        return not_finite(x, "gradients", part);
  }
  return not_finite(x, "gradients", x->layout->part_count - 1); /* each block is finite, their sum is not */
}

static bool all_finite(const void *memory, flap_dtype dtype, uint64_t elements) {
  for (uint64_t i = 0; i < elements; i++) {
    const float value = dtype == FLAP_F32   ? ((const float *)memory)[i]
                        : dtype == FLAP_F16 ? flap_f16_to_f32(((const uint16_t *)memory)[i])
                                            : flap_bf16_to_f32(((const uint16_t *)memory)[i]);
    if (!isfinite(value))
      return false;
  }
  return true;
}

static flap_status search_losses(flap_executor *x, uint32_t micro_batch) {
  const uint64_t tokens = tokens_of(x), first = micro_batch * tokens;
  FLAP_TRY(flap_device_download(flap_ops_device(x->ops), x->host.losses, x->device.losses + first, tokens * 4));
  return all_finite(x->host.losses, FLAP_F32, tokens) ? FLAP_OK : not_finite(x, "the loss", x->layout->part_count - 1);
}

/* Looks at what an operation of the forward has just written. */
static flap_status search(flap_executor *x, const flap_op *op) {
  if (op->kind == FLAP_OP_HEAD) /* every hidden state of this micro-batch was finite; others may still follow */
    return search_losses(x, op->micro_batch);
  const uint32_t part = op->kind == FLAP_OP_EMBED ? 0 : flap_layout_layer_part(op->index);
  const flap_operand out = op->kind == FLAP_OP_EMBED ? op->operand[1] : op->operand[3];
  if (op->kind != FLAP_OP_EMBED && op->kind != FLAP_OP_LAYER_FORWARD)
    return FLAP_OK;
  const uint64_t elements = tokens_of(x) * x->run.config->hidden_size;
  const uint64_t bytes = elements * flap_dtype_bytes(x->run.shape.dtype);
  void *copy = malloc(bytes);
  if (copy == NULL)
    return not_finite(x, "the loss", part);
  flap_status status = flap_device_download(flap_ops_device(x->ops), copy, address(x, out), bytes);
  const bool finite = status == FLAP_OK && all_finite(copy, x->run.shape.dtype, elements);
  free(copy);
  return status != FLAP_OK || finite ? status : not_finite(x, "the loss", part);
}

/* ---- results --------------------------------------------------------------------------------------------- */

static flap_status sum_losses(flap_executor *x, flap_executor_result *result) {
  const uint64_t tokens = tokens_of(x) * x->layout->spec.micro_batches;
  float *losses = x->times == NULL ? x->host.losses : NULL; /* a simulation has none */
  FLAP_TRY(flap_device_download(flap_ops_device(x->ops), losses, x->device.losses, tokens * 4));
  result->loss_sum = 0;
  for (uint64_t i = 0; losses != NULL && i < tokens; i++)
    result->loss_sum += (double)losses[i];
  result->loss = result->loss_sum / (double)x->input->counted;
  return FLAP_OK;
}

static flap_status look_for_fault(flap_executor *x, bool *found_out) {
  int32_t fault = 0;
  FLAP_TRY(flap_device_download(flap_ops_device(x->ops), &fault, x->device.fault, sizeof fault));
  *found_out = fault != 0 || __atomic_load_n(&x->host_fault, __ATOMIC_RELAXED) != 0;
  return FLAP_OK;
}

bool flap_executor_updates_are_good(flap_executor *x) {
  bool found = true;
  return look_for_fault(x, &found) == FLAP_OK && !found;
}

/* Of the updates that a run made, those of step `first`, or of that and the one behind it, `last`. From 1. */
static flap_status check_fault(flap_executor *x, uint64_t first, uint64_t last) {
  bool found = false;
  char or_last[32] = "";
  FLAP_TRY(look_for_fault(x, &found));
  if (!found)
    return FLAP_OK;
  if (last > first)
    (void)snprintf(or_last, sizeof or_last, " or %llu", (unsigned long long)last);
  return flap_error_set(FLAP_NUMERIC,
                        "step %llu%s: the optimizer would make a weight infinite or NaN%s: lower learning_rate, or set "
                        "max_grad_norm",
                        (unsigned long long)first, or_last,
                        x->run.shape.dtype == FLAP_F16 ? " (in float16, which ends at 65504)" : "");
}

static bool is_finite(const flap_executor_result *result) {
  return isfinite(result->loss_sum) && isfinite(result->grad_norm);
}

/* Updates begin in the backward, whose scalars depend on no norm. A loss that is not finite is found here, while
 * nothing of this step's has changed a weight. */
static flap_status losses(flap_executor *x, flap_executor_result *result) {
  FLAP_TRY(sum_losses(x, result));
  x->update_step = x->input->step + 1;
  x->has_update = true;
  x->skips = false;
  if (x->config == NULL || !isfinite(result->loss_sum))
    return FLAP_OK;
  flap_assert(!(x->config->max_grad_norm > 0) && !(x->loss_scale.scale > 0));
  flap_schedule_adamw(x->config, x->input->learning_rate, 1, x->input->step, &x->adamw);
  return FLAP_OK;
}

/* The gradients are complete: their norm, the clip coefficient, and the scalars of the update. */
static flap_status norm(flap_executor *x, flap_executor_result *result) {
  x->knows_norm = true;
  FLAP_TRY(sum_losses(x, result));
  float *block_squares = x->times == NULL ? x->host.block_squares : NULL;
  FLAP_TRY(flap_device_download(flap_ops_device(x->ops), block_squares, x->device.block_squares,
                                x->layout->block_count * 4));
  double squares = 0;
  for (uint64_t i = 0; block_squares != NULL && i < x->layout->block_count; i++)
    squares += (double)block_squares[i];
  result->grad_norm = sqrt(squares) / scale_of(x);
  result->loss_scale = x->scale;
  x->update_step = x->input->step + 1;
  x->has_update = true;
  x->skips = false;
  if (x->config == NULL || (x->layout->spec.backward_parts > 0 && !x->layout->spec.backward_twice))
    return FLAP_OK; /* a simulation; or the scalars are those that losses() gave, and jobs use them */
  if (!is_finite(result))
    return FLAP_OK; /* there is no update to scale: the caller skips it, or stops the run */
  const double clip = flap_schedule_clip(x->config->max_grad_norm, result->grad_norm);
  flap_schedule_adamw(x->config, x->input->learning_rate, clip / scale_of(x), x->input->step - x->loss_scale.skipped,
                      &x->adamw);
  if (x->loss_scale.scale > 0)
    flap_loss_scale_good(x->config, &x->loss_scale);
  return FLAP_OK;
}

/* ---- running --------------------------------------------------------------------------------------------- */

/* A simulated operation takes its time, and that is all. False: it has none, and is performed on the sim device. */
static bool charge(flap_executor *x, const flap_op *op) {
  const uint64_t ns = flap_op_times_of(x->times, x->layout, op);
  if (ns == 0)
    return false;
  flap_device_sim_work(flap_ops_device(x->ops), ns);
  return true;
}

static flap_status perform(flap_executor *x, const flap_op *op, flap_executor_result *result) {
  if (x->times != NULL && charge(x, op))
    return FLAP_OK;
  switch ((flap_op_kind)op->kind) {
  case FLAP_OP_EMBED:
    embed(x, op);
    break;
  case FLAP_OP_LAYER_FORWARD:
    forward(x, op);
    break;
  case FLAP_OP_LAYER_RECOMPUTE:
    recompute(x, op);
    break;
  case FLAP_OP_HEAD:
    head(x, op);
    break;
  case FLAP_OP_LAYER_BACKWARD:
    backward(x, op);
    break;
  case FLAP_OP_EMBED_BACKWARD: {
    const uint64_t first = op->micro_batch * tokens_of(x);
    flap_model_embed_backward(&x->run, x->device.tokens + first, x->device.order + first, address(x, op->operand[0]),
                              sums_at(x, op->operand[1], 0));
    break;
  }
  case FLAP_OP_ZERO:
    zero(x, op);
    break;
  case FLAP_OP_STORE_GRADIENT:
    store_gradient(x, op);
    break;
  case FLAP_OP_ADAMW:
    adamw(x, op);
    break;
  case FLAP_OP_LOSSES:
    return losses(x, result);
  case FLAP_OP_NORM:
    return norm(x, result);
  case FLAP_OP_LAYER_DECODE:
    flap_model_layer_decode(&x->run, address(x, op->operand[0]), address(x, op->operand[1]), address(x, op->operand[3]),
                            address(x, op->operand[2]), x->layout->spec.cache_positions, x->input->decode_tokens,
                            x->input->decode_position);
    break;
  case FLAP_OP_LOGITS:
    return logits(x, op);
  case FLAP_OP_PIN:
  case FLAP_OP_UNPIN:
  case FLAP_OP_HOST_ADAMW:
  case FLAP_OP_KIND_COUNT:
    flap_assert(false);
  }
  return FLAP_OK;
}

/* A stall in the trace is what compute rested in a pin, until the end of that. It bears the name of the lane that was
 * waited for most, and the region. Rests on the compute stream are told by the device (flap_executor_trace). */
static void trace_stall(flap_executor *x, uint32_t region, const flap_pager_stats *before,
                        const flap_pager_stats *after) {
  static const char *const names[FLAP_LANE_COUNT] = {[FLAP_LANE_H2D] = WAITS_FOR_H2D,
                                                     [FLAP_LANE_D2H] = "waits for d2h",
                                                     [FLAP_LANE_DISK_READ] = "waits for disk read",
                                                     [FLAP_LANE_DISK_WRITE] = "waits for disk write",
                                                     [FLAP_LANE_HOST] = "waits for the host's update"};
  uint64_t ns[FLAP_LANE_COUNT], all_ns = 0;
  int most = 0;
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    ns[lane] = after->stall_ns[lane] - before->stall_ns[lane];
    if (lane == FLAP_LANE_H2D)
      ns[lane] -= after->stream_stall_ns - before->stream_stall_ns;
    all_ns += ns[lane];
    if (ns[lane] > ns[most])
      most = lane;
  }
  if (all_ns > STALL_TRACED_NS)
    flap_trace_add(x->trace, FLAP_TRACE_STALL, names[most], region, after->stalled_until - all_ns, after->stalled_until,
                   0);
}

static flap_status pin(flap_executor *x, uint32_t lease) {
  if (x->trace == NULL)
    return flap_pager_pin(x->pager, lease, &x->host.addresses[lease]);
  const uint32_t region = x->programs[x->queue[0]].leases[lease].region;
  flap_pager_stats before, after;
  flap_pager_get_stats(x->pager, &before);
  flap_device_label_rests(flap_ops_device(x->ops), ((uint64_t)FLAP_OP_PIN + 1) << 32 | region);
  FLAP_TRY(flap_pager_pin(x->pager, lease, &x->host.addresses[lease]));
  flap_pager_get_stats(x->pager, &after);
  trace_stall(x, region, &before, &after);
  return FLAP_OK;
}

/* Labels of launches on a device that takes their times itself: the kind, from 1, and the index. Slices of one part
 * share a label, because each label costs the device a pause; so do a gradient that is rounded, or measured, for an
 * update at once and that update. */
static uint64_t label_of(const flap_executor *x, const flap_op *op) {
  const bool stores = op->kind == FLAP_OP_STORE_GRADIENT;
  if (x->timed || (!stores && op->kind != FLAP_OP_ADAMW))
    return ((uint64_t)op->kind + 1) << 32 | op->index;
  const uint32_t part = x->layout->slices[op->index].part;
  const bool updates = stores && flap_layout_in_backward(x->layout, part) && !flap_layout_is_host(x->layout, part) &&
                       (x->knows_norm || !x->layout->spec.backward_twice);
  return ((uint64_t)(updates ? FLAP_OP_ADAMW : op->kind) + 1) << 32 | part;
}

void flap_executor_trace(struct flap_trace *trace, uint64_t label, uint64_t started_ns, uint64_t ended_ns) {
  const uint64_t kind = (label >> 32) - 1;
  flap_assert(kind < FLAP_OP_KIND_COUNT);
  if (kind == FLAP_OP_PIN) { /* what is launched behind a pin waits for what it loads */
    if (ended_ns - started_ns > STALL_TRACED_NS)
      flap_trace_add(trace, FLAP_TRACE_STALL, WAITS_FOR_H2D, (uint32_t)label, started_ns, ended_ns, 0);
    return;
  }
  flap_trace_add(trace, FLAP_TRACE_COMPUTE, flap_program_op_name((flap_op_kind)kind), (uint32_t)label, started_ns,
                 ended_ns, 0);
}

static bool is_forward(const flap_op *op) {
  return op->kind == FLAP_OP_EMBED || op->kind == FLAP_OP_LAYER_FORWARD || op->kind == FLAP_OP_HEAD;
}

/* With fp16 a smaller loss scale may help, and the step is skipped. Otherwise the run ends here. */
static flap_status overflowed(flap_executor *x, flap_executor_result *result) {
  if (x->loss_scale.scale > 0 && flap_loss_scale_back_off(x->config, &x->loss_scale)) {
    x->skips = result->skipped = true;
    return FLAP_OK;
  }
  if (isfinite(result->loss_sum))
    return gradients_not_finite(x);
  x->mode = FLAP_EXECUTE_NOTHING; /* the rest of the program would spoil the weights; then the forward is searched */
  return FLAP_OK;
}

static flap_status execute(flap_executor *x, const flap_op *op, flap_executor_result *result) {
  const bool looks = op->kind == FLAP_OP_NORM || op->kind == FLAP_OP_LOSSES;
  if (x->mode == FLAP_EXECUTE_UPDATE && looks)
    x->mode = FLAP_EXECUTE_NOTHING; /* updates from here on would be those of a step that does not happen */
  if (x->mode == FLAP_EXECUTE_NOTHING || (x->mode == FLAP_EXECUTE_UPDATE && op->kind != FLAP_OP_ADAMW))
    return FLAP_OK;
  if (x->mode == FLAP_EXECUTE_SEARCH) {
    if (!is_forward(op))
      return FLAP_OK;
    FLAP_TRY(perform(x, op, result));
    return search(x, op);
  }
  const uint64_t started_ns = x->timed ? flap_units_now_ns() : 0;
  if (x->trace != NULL && !x->timed)
    flap_device_label_compute(flap_ops_device(x->ops), label_of(x, op));
  FLAP_TRY(perform(x, op, result));
  if (x->timed)
    flap_executor_trace(x->trace, label_of(x, op), started_ns, flap_units_now_ns());
  return looks && !is_finite(result) ? overflowed(x, result) : FLAP_OK;
}

static flap_status run_ops(flap_executor *x, flap_setup_program which, flap_executor_result *result) {
  const flap_program *program = &x->programs[which];
  for (uint32_t i = 0; i < program->op_count; i++) {
    const flap_op *op = &program->ops[i];
    flap_device_limit_ahead(flap_ops_device(x->ops)); /* before the pager's lock, which its pump needs */
    if (op->kind == FLAP_OP_PIN)
      FLAP_TRY(pin(x, op->operand[0]));
    else if (op->kind == FLAP_OP_UNPIN)
      flap_pager_unpin(x->pager, op->operand[0]);
    else if (op->kind == FLAP_OP_HOST_ADAMW)
      host_adamw(x, op);
    else
      FLAP_TRY(execute(x, op, result));
  }
  x->queue[0] = x->queue[1];
  x->queued--;
  flap_device_limit_ahead(flap_ops_device(x->ops));
  return flap_pager_end(x->pager);
}

/* Positions of every micro-batch sorted by token, then position: the order in which rows of the embedding are summed.
 */
static void sort_positions(flap_executor *x) {
  const uint64_t tokens = tokens_of(x);
  const uint32_t vocabulary = x->run.config->vocab_size;
  for (uint32_t i = 0; i < x->layout->spec.micro_batches; i++) {
    const int32_t *ids = x->input->tokens + i * tokens;
    int32_t *order = x->host.order + i * tokens;
    memset(x->host.counts, 0, ((uint64_t)vocabulary + 1) * sizeof *x->host.counts);
    for (uint64_t j = 0; j < tokens; j++)
      x->host.counts[ids[j] + 1]++;
    for (uint32_t v = 0; v < vocabulary; v++)
      x->host.counts[v + 1] += x->host.counts[v];
    for (uint64_t j = 0; j < tokens; j++)
      order[x->host.counts[ids[j]]++] = (int32_t)j;
  }
}

static flap_status upload(flap_executor *x, flap_setup_program which) {
  flap_device *device = flap_ops_device(x->ops);
  if (which == FLAP_SETUP_SWEEP)
    return FLAP_OK;
  if (which == FLAP_SETUP_DECODE)
    return flap_device_upload(device, x->device.tokens, x->input->tokens, (uint64_t)x->input->decode_tokens * 4);
  const uint64_t bytes = tokens_of(x) * x->layout->spec.micro_batches * 4;
  FLAP_TRY(flap_device_upload(device, x->device.tokens, x->input->tokens, bytes));
  FLAP_TRY(flap_device_upload(device, x->device.targets, x->input->targets, bytes));
  if (which == FLAP_SETUP_FORWARD)
    return FLAP_OK;
  sort_positions(x);
  return flap_device_upload(device, x->device.order, x->host.order, bytes);
}

/* The loss is not finite: forward once more over the same tokens, with the weights that gave it. */
static flap_status find_cause(flap_executor *x) {
  flap_executor_result ignored = {0};
  x->mode = FLAP_EXECUTE_SEARCH;
  if (x->queued == 0)
    FLAP_TRY(flap_executor_begin(x, FLAP_SETUP_FORWARD));
  FLAP_TRY(run_ops(x, x->queue[0], &ignored));
  return not_finite(x, "the loss", x->layout->part_count - 1);
}

static bool sweeps(flap_setup_program which) {
  return which == FLAP_SETUP_LAST || which == FLAP_SETUP_SINGLE || which == FLAP_SETUP_SWEEP;
}

static bool steps(flap_setup_program which) {
  return which <= FLAP_SETUP_SINGLE;
}

flap_status flap_executor_begin(flap_executor *x, flap_setup_program program) {
  flap_assert(x->queued < 2 && x->programs[program].op_count > 0);
  x->queue[x->queued++] = program;
  return flap_pager_begin(x->pager, x->programs[program].leases, x->programs[program].lease_count);
}

flap_status flap_executor_run(flap_executor *x, const flap_executor_input *input, flap_executor_result *result_out) {
  flap_assert(x->queued > 0);
  const flap_setup_program which = x->queue[0];
  const uint64_t first = x->has_update ? x->update_step : input->step + 1;
  x->input = input;
  x->scale = x->loss_scale.scale;
  x->knows_norm = false;
  x->mode = FLAP_EXECUTE;
  *result_out = (flap_executor_result){.logits = x->host.logits};
  FLAP_TRY(upload(x, which));
  FLAP_TRY(run_ops(x, which, result_out));
  if (x->mode == FLAP_EXECUTE_NOTHING)
    return find_cause(x);
  if (which == FLAP_SETUP_FORWARD)
    FLAP_TRY(sum_losses(x, result_out));
  if (sweeps(which) || steps(which))
    FLAP_TRY(check_fault(x, first, sweeps(which) || x->layout->spec.backward_parts > 0 ? x->update_step : first));
  if (sweeps(which))
    x->has_update = false;
  return FLAP_OK;
}

flap_status flap_executor_run_update(flap_executor *x) {
  flap_executor_result ignored = {0};
  flap_assert(x->queued == 1 && x->has_update && x->programs[x->queue[0]].spec.pending);
  flap_assert(!x->programs[x->queue[0]].spec.sweep);
  x->mode = FLAP_EXECUTE_UPDATE;
  FLAP_TRY(run_ops(x, x->queue[0], &ignored));
  x->has_update = false;
  return check_fault(x, x->update_step, x->update_step);
}

uint32_t flap_executor_update_leases(const flap_executor *x) {
  flap_assert(x->queued == 1 && x->programs[x->queue[0]].spec.pending);
  return x->programs[x->queue[0]].before_sweep;
}

flap_status flap_executor_open(flap_executor *x) {
  const flap_layout_spec *spec = &x->layout->spec;
  x->run = (flap_model_run){.config = spec->model,
                            .shape = spec->shape,
                            .ops = x->ops,
                            .rope_table = x->device.rope_table,
                            .workspace = x->device.model_workspace};
  x->hidden_buffers = flap_program_hidden_buffers(x->layout);
  if (x->config != NULL && spec->mode == FLAP_MODE_TRAIN)
    flap_loss_scale_begin(spec->shape.dtype, x->config, &x->loss_scale);
  flap_device *device = flap_ops_device(x->ops);
  x->timed = flap_device_get_kind(device) == FLAP_DEVICE_CPU;
  const uint32_t positions = spec->mode == FLAP_MODE_SAMPLE ? spec->cache_positions : spec->shape.sequence;
  const uint64_t bytes = (uint64_t)positions * spec->model->head_dim * 4;
  float *table = calloc(1, bytes);
  if (table == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for the rotary table of %u positions", positions);
  if (x->times == NULL) /* a simulation computes nothing */
    flap_ops_rope_table(&spec->model->rope, positions, spec->model->head_dim, table);
  flap_status status = flap_device_upload(device, x->device.rope_table, table, bytes);
  free(table);
  if (status == FLAP_OK && spec->mode == FLAP_MODE_TRAIN)
    flap_ops_zero(x->ops, x->device.fault, 4);
  return status;
}
