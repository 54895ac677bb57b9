#include "engine/machine/op_times_internal.h"

#include "base/assert.h"
#include "base/philox.h"
#include "base/units.h"
#include "engine/machine/host_times.h"
#include "engine/step/update.h"

#include <stdlib.h>
#include <string.h>

#define SLICE_ELEMENTS ((uint64_t)1 << 22)
/* A round takes a batch of each operation; long batches are for cards, whose clocks follow what they are doing. */
#define LONG_NS ((uint64_t)1000000)
#define LONG_BATCH_NS ((uint64_t)24000000)
#define SHORT_BATCH_NS ((uint64_t)3000000)
#define CPU_BATCH_NS ((uint64_t)1000000)
/* Rates say how many tokens are timed on the cpu. Where operations take longer than they say, the clock ends the
 * rounds; the first run of what takes so long counts as one, for what it loads is little of it. */
#define CPU_NS_MAX ((uint64_t)3000000000)
#define CPU_LONG_NS ((uint64_t)10000000)
#define BATCH_MAX 1024u
/* The first rounds warm a card up: as it gets hot it draws more power, and its clocks follow, by 2 or 3% within some
 * seconds. */
#define WARM_ROUNDS 3u
#define WARM_CARD_NS ((uint64_t)6000000000)
/* From one round to the next an operation's time on a card at its limit of power varies by 2%, and a layer's backward
 * is what one timing is longer than two others. The mean of the middle of 15 rounds leaves 0.7% of a step's time to
 * chance, where the median of 5 left 1.5%. */
#define CARD_ROUNDS 15u
#define ROUNDS 5u
#define PATTERN_BYTES FLAP_MIB
/* Layers one behind the other are timed in so many pieces of about so long, behind a while in which power settles. */
#define SUSTAINED_PIECES 7u
#define SUSTAINED_NS ((uint64_t)250000000)
#define SETTLING_NS ((uint64_t)500000000)
#define SUSTAINED_MAX 1.1 /* whatever is more was somebody else's */

/* A device with one layer, the vocabulary and a slice on it. Pointers are device memory. */
typedef struct bench {
  const flap_op_times_spec *spec;
  op_times_parts parts;
  flap_device *device;
  flap_clock *clock; /* of sim */
  flap_ops *ops;
  flap_model_run run;
  unsigned char *layer, *head, *projection, *saved_memory, *x_in, *x_out, *dx, *states, *gradient, *weight;
  float *sums, *head_sums, *projection_sums, *losses, *squares;
  int32_t *tokens, *order, *fault;
  void *ops_workspace, *model_workspace, *rope;
  flap_model_saved saved;    /* of the operation that is timed */
  flap_sums_written written; /* likewise */
  uint64_t slices_passed;    /* of a layer's sums, by what stores gradients */
  uint8_t *decay;            /* host memory */
  flap_state_format format;  /* of the slice */
} bench;

/* ---- memory ---------------------------------------------------------------------------------------------- */

static void *take(flap_arena *arena, uint64_t bytes) {
  return flap_arena_take(arena, flap_units_round_up(bytes, 4096), 4096);
}

/* In the order in which they are taken, so that a measuring arena tells the sum. */
static void take_all(bench *b, flap_device_kind kind, flap_arena *arena) {
  const flap_op_times_spec *spec = b->spec;
  const flap_model_config *model = spec->model;
  const uint64_t size = flap_dtype_bytes(spec->shape.dtype),
                 tokens = (uint64_t)spec->shape.batch * spec->shape.sequence;
  const uint64_t layer = flap_model_part_elements(model, FLAP_PART_LAYER);
  const uint64_t head = flap_model_part_elements(model, FLAP_PART_HEAD);
  const uint64_t embedding = flap_model_part_elements(model, FLAP_PART_EMBEDDING);
  const uint64_t hidden = flap_model_hidden_bytes(model, &spec->shape), projection = flap_model_head_projection(model);
  const bool tied = model->tie_word_embeddings;
  flap_ops_limits limits;
  flap_model_ops_limits(model, &spec->shape, spec->threads, &limits);
  b->ops_workspace = take(arena, flap_ops_workspace_bytes(kind, &limits));
  b->model_workspace = take(arena, flap_model_workspace_bytes(model, &spec->shape));
  b->rope = take(arena, flap_model_rope_bytes(model, spec->shape.sequence));
  if (b->parts & PART_LAYER) {
    b->layer = take(arena, layer * size);
    /* Two blocks that make up all tensors are no larger than one of all, but for their ends. */
    b->saved_memory = take(arena, flap_model_saved_bytes(model, &spec->shape, FLAP_MODEL_SAVED_ALL) + 4096);
  }
  if (b->parts & PART_HEAD) {
    b->head = take(arena, head * size);
    b->projection = tied ? take(arena, embedding * size) : b->head + projection * size;
  }
  b->x_in = take(arena, hidden);
  b->x_out = take(arena, hidden);
  b->dx = take(arena, hidden);
  b->tokens = take(arena, tokens * 4);
  b->order = take(arena, tokens * 4);
  b->losses = take(arena, tokens * 4);
  if (!spec->training)
    return;
  if (b->parts & PART_LAYER)
    b->sums = take(arena, layer * 4);
  if (b->parts & PART_HEAD) {
    b->head_sums = take(arena, head * 4);
    b->projection_sums = tied ? take(arena, embedding * 4) : b->head_sums + projection;
  }
  if (!(b->parts & PART_SLICE))
    return;
  b->states = take(arena, SLICE_ELEMENTS * 12); /* at most a master, and two moments */
  b->gradient = take(arena, SLICE_ELEMENTS * 4);
  b->weight = take(arena, SLICE_ELEMENTS * 4);
  b->squares = take(arena, SLICE_ELEMENTS / FLAP_OPS_BLOCK * 4);
  b->fault = take(arena, 4);
}

/* Ordinary values of both signs, about as large as weights are: a card computes faster on zeros. Of parts that are not
 * there, nothing. */
static flap_status fill(bench *b, void *memory, uint64_t bytes, const unsigned char *pattern) {
  for (uint64_t at = 0; memory != NULL && at < bytes; at += PATTERN_BYTES) {
    const uint64_t piece = bytes - at < PATTERN_BYTES ? bytes - at : PATTERN_BYTES;
    unsigned char *to = (unsigned char *)memory + at;
    if (at == 0)
      FLAP_TRY(flap_device_upload(b->device, to, pattern, piece));
    else
      flap_ops_copy(b->ops, to, memory, piece);
  }
  return FLAP_OK;
}

static void zero(bench *b, void *memory, uint64_t bytes) {
  if (memory != NULL)
    flap_ops_zero(b->ops, memory, bytes);
}

static void make_pattern(flap_dtype dtype, unsigned char *pattern) {
  const flap_philox stream = flap_philox_stream(1, "op times");
  for (uint64_t i = 0; i < PATTERN_BYTES / flap_dtype_bytes(dtype); i++) {
    const float value = (float)flap_philox_normal(&stream, i) * 0.02f;
    const uint16_t half = dtype == FLAP_F16 ? flap_f32_to_f16(value) : flap_f32_to_bf16(value);
    if (dtype == FLAP_F32)
      memcpy(pattern + i * 4, &value, 4);
    else
      memcpy(pattern + i * 2, &half, 2);
  }
}

static flap_status upload_tokens(bench *b) {
  const uint64_t count = (uint64_t)b->spec->shape.batch * b->spec->shape.sequence;
  const flap_philox stream = flap_philox_stream(1, "op times tokens");
  int32_t *ids = malloc(count * sizeof *ids);
  if (ids == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory for %llu tokens", (unsigned long long)count);
  for (uint64_t i = 0; i < count; i++)
    ids[i] = (int32_t)flap_philox_below(&stream, i, b->spec->model->vocab_size);
  flap_status status = flap_device_upload(b->device, b->tokens, ids, count * 4);
  /* Every position once, as the embedding's backward wants it: in which order matters little for its time. */
  for (uint64_t i = 0; i < count; i++)
    ids[i] = (int32_t)i;
  if (status == FLAP_OK)
    status = flap_device_upload(b->device, b->order, ids, count * 4);
  free(ids);
  return status;
}

/* Only where there are bytes. */
static flap_status fill_all(bench *b) {
  const flap_op_times_spec *spec = b->spec;
  const flap_model_config *model = spec->model;
  const uint64_t size = flap_dtype_bytes(spec->shape.dtype);
  unsigned char *pattern = malloc(PATTERN_BYTES);
  if (pattern == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory to measure the device");
  make_pattern(spec->shape.dtype, pattern);
  flap_status status = fill(b, b->layer, flap_model_part_elements(model, FLAP_PART_LAYER) * size, pattern);
  if (status == FLAP_OK)
    status = fill(b, b->projection, (uint64_t)model->vocab_size * model->hidden_size * size, pattern);
  if (status == FLAP_OK)
    status = fill(b, b->head, model->hidden_size * size, pattern);
  void *const hidden[] = {b->x_in, b->dx};
  for (size_t i = 0; i < sizeof hidden / sizeof *hidden && status == FLAP_OK; i++)
    status = fill(b, hidden[i], flap_model_hidden_bytes(model, &spec->shape), pattern);
  free(pattern);
  FLAP_TRY(status);
  FLAP_TRY(upload_tokens(b));
  const uint64_t rope_bytes = flap_model_rope_bytes(model, spec->shape.sequence);
  float *table = malloc(rope_bytes);
  if (table == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory to measure the device");
  flap_ops_rope_table(&model->rope, spec->shape.sequence, model->head_dim, table);
  status = flap_device_upload(b->device, b->rope, table, rope_bytes);
  free(table);
  if (spec->training) {
    if (b->parts & PART_SLICE) {
      zero(b, b->states, SLICE_ELEMENTS * 12);
      zero(b, b->gradient, SLICE_ELEMENTS * 4);
      zero(b, b->weight, SLICE_ELEMENTS * 4);
    }
    zero(b, b->sums, flap_model_part_elements(model, FLAP_PART_LAYER) * 4);
    zero(b, b->head_sums, flap_model_part_elements(model, FLAP_PART_HEAD) * 4);
    if (model->tie_word_embeddings)
      zero(b, b->projection_sums, flap_model_part_elements(model, FLAP_PART_EMBEDDING) * 4);
  }
  return status;
}

/* ---- operations ------------------------------------------------------------------------------------------ */

static void place_saved(bench *b, uint32_t mask) {
  const flap_op_times_spec *spec = b->spec;
  b->saved = (flap_model_saved){.kept = b->saved_memory, .mask = mask};
  b->saved.scratch = b->saved_memory + flap_model_saved_bytes(spec->model, &spec->shape, mask);
}

static void run_embed(bench *b) {
  flap_model_embed(&b->run, b->projection, b->tokens, b->x_out);
}
static void run_forward(bench *b) {
  flap_model_layer_forward(&b->run, b->layer, b->x_in, &b->saved, b->x_out);
}
static void run_recompute(bench *b) {
  flap_model_layer_recompute(&b->run, b->layer, b->x_in, &b->saved);
}
static void run_loss(bench *b) {
  flap_model_head_loss(&b->run, b->head, b->projection, b->x_in, b->tokens, 1, b->losses, NULL, NULL, NULL, false);
}
static void run_head(bench *b) {
  flap_model_head_loss(&b->run, b->head, b->projection, b->x_in, b->tokens, 1e-6f, b->losses, b->x_out, b->head_sums,
                       b->projection_sums, b->written == FLAP_SUMS_ADDED_TO);
}
static void run_copy(bench *b) {
  flap_ops_copy(b->ops, b->dx, b->x_in, flap_model_hidden_bytes(b->spec->model, &b->spec->shape));
}
/* A backward leaves gradients in place of the activations that it read and of the gradient that it was given: without
 * fresh ones each time all would soon be zeros, on which a card is faster. */
static void run_backward(bench *b) {
  run_recompute(b);
  run_copy(b);
  const flap_model_gradient dweights = {.sums = b->sums,
                                        .dtype = b->written == FLAP_SUMS_FINAL ? FLAP_BF16 : FLAP_F32,
                                        .accumulate = b->written == FLAP_SUMS_ADDED_TO};
  flap_model_layer_backward(&b->run, b->layer, b->x_in, &b->saved, b->dx, &dweights);
}
static void run_embed_backward(bench *b) {
  flap_model_embed_backward(&b->run, b->tokens, b->order, b->dx, b->projection_sums);
}
/* The sums of a slice: as in a step not those that a cache has from the last time, where a layer's are longer than a
 * cache; of small ones all are hot. */
static const void *next_sums(bench *b) {
  const uint64_t elements = flap_model_part_elements(b->spec->model, FLAP_PART_LAYER);
  if (b->sums == NULL || elements < SLICE_ELEMENTS)
    return b->states;
  b->slices_passed = (b->slices_passed + 1) % (elements / SLICE_ELEMENTS);
  return b->sums + b->slices_passed * SLICE_ELEMENTS;
}
static void run_store_of(bench *b, void *gradient) {
  flap_ops_gradient_store(b->ops, b->spec->gradient_dtype, gradient, b->squares,
                          b->written == FLAP_SUMS_FINAL ? b->spec->gradient_dtype : FLAP_F32, next_sums(b),
                          SLICE_ELEMENTS);
}
static void run_store(bench *b) {
  run_store_of(b, b->gradient);
}
static void run_measure(bench *b) {
  run_store_of(b, NULL);
}
static void run_zero(bench *b) {
  flap_ops_zero(b->ops, b->states, SLICE_ELEMENTS * 4);
}
static void run_adamw(bench *b) {
  const flap_update update = {.weight_dtype = b->spec->shape.dtype,
                              .gradient_dtype = b->spec->gradient_dtype,
                              .format = &b->format,
                              .elements = SLICE_ELEMENTS,
                              .weights = b->weight,
                              .states = b->states,
                              .gradient = b->gradient,
                              .decay_blocks = b->decay,
                              .fault = b->fault};
  flap_update_launch(b->ops, &flap_update_usual_scalars, &update);
}

/* ---- time ------------------------------------------------------------------------------------------------ */

/* An operation that is timed: `run`, with `mask` saved by a forward before if `saves`. */
typedef struct timing {
  void (*run)(bench *b);
  bool saves;
  uint32_t mask;
  flap_sums_written written;
  uint32_t batch;  /* runs at a time */
  uint32_t rounds; /* that were timed */
  uint64_t batch_ns[CARD_ROUNDS + 1];
} timing;

#define TIMINGS_MAX (FLAP_MODEL_SAVED_MAX + 24)

typedef struct timings {
  timing list[TIMINGS_MAX];
  uint32_t count;
} timings;

static timing *add_timing(timings *t, void (*run)(bench *b)) {
  flap_assert(t->count < TIMINGS_MAX);
  t->list[t->count] = (timing){.run = run};
  return &t->list[t->count++];
}

static timing *add_saving(timings *t, void (*run)(bench *b), uint32_t mask) {
  timing *added = add_timing(t, run);
  added->saves = true;
  added->mask = mask;
  return added;
}

/* What is before the operation, and is not timed. */
static void prepare(bench *b, const timing *t) {
  b->written = t->written;
  if (!t->saves)
    return;
  place_saved(b, t->mask);
  run_forward(b); /* so that there are values to compute with */
}

static flap_status time_batch(bench *b, const timing *t, uint32_t batch, uint64_t *ns_out) {
  prepare(b, t);
  FLAP_TRY(flap_device_synchronize(b->device));
  const uint64_t started_ns = flap_units_now_ns();
  for (uint32_t i = 0; i < batch; i++)
    t->run(b);
  FLAP_TRY(flap_device_synchronize(b->device));
  *ns_out = flap_units_now_ns() - started_ns;
  return FLAP_OK;
}

static bool is_card(const bench *b) {
  return flap_device_get_kind(b->device) == FLAP_DEVICE_CUDA;
}

/* Short operations make up little of a step, and so of a round. */
static flap_status choose_batch(bench *b, timing *t) {
  uint64_t once_ns = 0;
  FLAP_TRY(time_batch(b, t, 1, &once_ns)); /* loads code, and tunes products */
  if (!is_card(b) && once_ns >= CPU_LONG_NS) {
    t->batch = 1;
    t->batch_ns[t->rounds++] = once_ns;
    return FLAP_OK;
  }
  FLAP_TRY(time_batch(b, t, 1, &once_ns));
  const uint64_t batch_ns = !is_card(b) ? CPU_BATCH_NS : once_ns >= LONG_NS ? LONG_BATCH_NS : SHORT_BATCH_NS;
  const uint64_t batch = once_ns > 0 ? batch_ns / once_ns + 1 : BATCH_MAX;
  t->batch = batch < BATCH_MAX ? (uint32_t)batch : BATCH_MAX;
  return FLAP_OK;
}

static flap_status time_round(bench *b, timings *all, bool only_new) {
  for (uint32_t i = 0; i < all->count; i++) {
    timing *t = &all->list[i];
    if (only_new && t->rounds > 0)
      continue;
    FLAP_TRY(time_batch(b, t, t->batch, &t->batch_ns[t->rounds]));
    t->rounds++;
  }
  return FLAP_OK;
}

static flap_status warm_up(bench *b, timings *all, uint64_t warm_ns) {
  const uint64_t started_ns = flap_units_now_ns();
  for (uint32_t round = 0; round < WARM_ROUNDS || flap_units_now_ns() - started_ns < warm_ns; round++) {
    FLAP_TRY(time_round(b, all, false));
    for (uint32_t i = 0; i < all->count; i++)
      all->list[i].rounds = 0;
  }
  return FLAP_OK;
}

/* In rounds over all operations, because a card's clocks follow what it has been doing for the last seconds: an
 * operation that is timed by itself, after a pause, is some percent faster than in a step. */
static flap_status time_rounds(bench *b, timings *all, uint64_t warm_ns) {
  const uint64_t started_ns = flap_units_now_ns();
  uint64_t round_ns = started_ns; /* when the last one began */
  for (uint32_t i = 0; i < all->count; i++)
    FLAP_TRY(choose_batch(b, &all->list[i]));
  if (is_card(b))
    FLAP_TRY(warm_up(b, all, warm_ns));
  for (uint32_t round = 0; round < (is_card(b) ? CARD_ROUNDS : ROUNDS); round++) {
    const uint64_t now_ns = flap_units_now_ns();
    if (!is_card(b) && now_ns - started_ns + (now_ns - round_ns) > CPU_NS_MAX)
      return time_round(b, all, true);
    round_ns = now_ns;
    FLAP_TRY(time_round(b, all, false));
  }
  return FLAP_OK;
}

static int compare_ns(const void *a, const void *b) {
  const uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
  return (left > right) - (left < right);
}

/* The mean of the batches but for a quarter at either end. */
static uint64_t middle_ns(const timing *t) {
  const uint32_t first = t->rounds / 4, end = t->rounds - first;
  uint64_t sum_ns = 0;
  for (uint32_t i = first; i < end; i++)
    sum_ns += t->batch_ns[i];
  return sum_ns / (end - first);
}

/* The middle of the rounds; on the cpu the least, because others' work only adds, and differences are taken of two of
 * these; in sim, what one run adds to the lane. */
static uint64_t ns_of(bench *b, timing *t) {
  if (b->clock != NULL) {
    prepare(b, t);
    const uint64_t before_ns = flap_device_busy_ns(b->device, FLAP_STREAM_COMPUTE);
    t->run(b);
    return flap_device_busy_ns(b->device, FLAP_STREAM_COMPUTE) - before_ns;
  }
  flap_assert(t->rounds > 0);
  qsort(t->batch_ns, t->rounds, sizeof *t->batch_ns, compare_ns);
  return (is_card(b) ? middle_ns(t) : t->batch_ns[0]) / t->batch;
}

static uint64_t without(uint64_t ns, uint64_t part_ns) {
  return ns > part_ns ? ns - part_ns : 0;
}

static double element_ns(bench *b, timing *t) {
  return (double)without(ns_of(b, t), b->spec->launch_ns) / SLICE_ELEMENTS;
}

/* The two forms of the optimizer's operation are alike but for this. */
static flap_status time_update(bench *b, flap_part part, double *ns_out) {
  timings one = {.count = 0};
  b->format = flap_layout_state_format(b->spec->shape.dtype, b->spec->optim, part);
  timing *t = add_timing(&one, run_adamw);
  if (b->clock == NULL)
    FLAP_TRY(time_rounds(b, &one, 0));
  *ns_out = element_ns(b, t);
  return FLAP_OK;
}

static flap_status time_updates(bench *b, flap_op_times *t) {
  FLAP_TRY(time_update(b, FLAP_PART_LAYER, &t->adamw_ns));
  t->adamw_embedding_ns = t->adamw_ns;
  if (!flap_layout_has_codes(b->spec->optim, FLAP_PART_LAYER))
    return FLAP_OK;
  return time_update(b, FLAP_PART_EMBEDDING, &t->adamw_embedding_ns);
}

/* Which of the list is what. */
typedef struct named_timings {
  timing *embed, *forward, *recompute, *loss;
  timing *sets[FLAP_MODEL_SAVED_MAX]; /* NULL where nothing is to be computed again */
  timing *copy, *head, *fresh_head, *embed_backward, *zero;
  timing *backward[FLAP_SUMS_KINDS][2]; /* without and with spare tensors; NULL: as the one before it */
  timing *store[2], *measure[2];        /* of fp32 sums; of stored gradients in their place */
} named_timings;

static void list_forward(timings *all, named_timings *n) {
  n->embed = add_timing(all, run_embed);
  n->forward = add_saving(all, run_forward, 0);
  n->recompute = add_saving(all, run_recompute, 0);
  n->loss = add_timing(all, run_loss);
}

/* With them alone kept, a recompute does what it does with nothing kept. */
static uint32_t spare_mask(const flap_op_times_spec *spec) {
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  const uint32_t count = flap_model_saved_tensors(spec->model, &spec->shape, 0, tensors);
  uint32_t mask = 0;
  for (uint32_t i = 0; i < count; i++)
    mask |= (tensors[i].spare ? 1u : 0u) << i;
  return mask;
}

/* Whether writing a layer's gradients as they are stored, in a step of one micro-batch, is another operation than
 * writing fp32 sums. */
static bool writes_final(const flap_op_times_spec *spec) {
  const flap_layout_spec step = {.shape = spec->shape, .gradient_dtype = spec->gradient_dtype, .micro_batches = 1};
  return flap_layout_sums_dtype(&step, FLAP_PART_LAYER) != FLAP_F32;
}

/* On the cpu, where there is less time, spare tensors are looked at in one kind alone: they are a small part of a
 * backward there. */
static void list_backward(bench *b, timings *all, named_timings *n) {
  const bool all_spare = is_card(b) || b->clock != NULL;
  for (int kind = 0; kind < FLAP_SUMS_KINDS; kind++)
    for (int spare = 0; spare < 2; spare++) {
      if ((kind == FLAP_SUMS_FINAL && !writes_final(b->spec)) ||
          (spare == 1 && kind != FLAP_SUMS_ADDED_TO && !all_spare))
        continue;
      timing *t = add_saving(all, run_backward, spare == 1 ? spare_mask(b->spec) : 0);
      t->written = (flap_sums_written)kind;
      n->backward[kind][spare] = t;
    }
}

static void list_training(bench *b, timings *all, named_timings *n, flap_op_times *t) {
  const flap_saved_set *set = flap_model_saved_sets(b->spec->model, &t->set_count);
  flap_assert(t->set_count <= FLAP_MODEL_SAVED_MAX);
  for (uint32_t i = 0; i < t->set_count; i++) {
    t->set_mask[i] = set[i].mask;
    if (flap_model_scratch_bytes(b->spec->model, &b->spec->shape, set[i].mask) > 0)
      n->sets[i] = add_saving(all, run_recompute, set[i].mask);
  }
  n->copy = add_timing(all, run_copy);
  list_backward(b, all, n);
  n->head = add_timing(all, run_head);
  n->fresh_head = add_timing(all, run_head);
  n->embed_backward = add_timing(all, run_embed_backward);
  n->fresh_head->written = FLAP_SUMS_FRESH;
  if (!(b->parts & PART_SLICE))
    return;
  n->zero = add_timing(all, run_zero);
  for (int final = 0; final < 2; final++) {
    n->store[final] = add_timing(all, run_store);
    n->measure[final] = add_timing(all, run_measure);
    n->store[final]->written = n->measure[final]->written = final == 1 ? FLAP_SUMS_FINAL : FLAP_SUMS_FRESH;
  }
}

static void take_forward(bench *b, const named_timings *n, flap_op_times *t) {
  t->embed_ns = ns_of(b, n->embed);
  t->forward_ns = ns_of(b, n->forward);
  t->recompute_ns = ns_of(b, n->recompute);
  t->loss_ns = ns_of(b, n->loss);
}

/* What keeps spare tensors is never slower: beyond that it is chance. */
static void take_backward(bench *b, const named_timings *n, flap_op_times *t) {
  const uint64_t before_ns = ns_of(b, n->copy) + t->recompute_ns;
  uint64_t ns = 0, gain_ns = 0;
  for (int kind = 0; kind < FLAP_SUMS_KINDS; kind++) {
    ns = n->backward[kind][0] != NULL ? without(ns_of(b, n->backward[kind][0]), before_ns) : ns;
    gain_ns = n->backward[kind][1] != NULL ? without(ns, without(ns_of(b, n->backward[kind][1]), before_ns)) : gain_ns;
    t->backward_ns[kind] = ns;
    t->backward_spare_ns[kind] = without(ns, gain_ns);
  }
}

static void take_training(bench *b, const named_timings *n, flap_op_times *t) {
  for (uint32_t i = 0; i < t->set_count; i++)
    t->set_recompute_ns[i] = n->sets[i] != NULL ? ns_of(b, n->sets[i]) : 0;
  take_backward(b, n, t);
  t->head_ns = ns_of(b, n->head);
  t->head_fresh_ns = ns_of(b, n->fresh_head);
  t->embed_backward_ns = ns_of(b, n->embed_backward);
  if (b->parts & PART_SLICE) {
    t->zero_ns = element_ns(b, n->zero);
    t->store_ns = element_ns(b, n->store[0]);
    t->store_final_ns = element_ns(b, n->store[1]);
    t->measure_ns = element_ns(b, n->measure[0]);
    t->measure_final_ns = element_ns(b, n->measure[1]);
  }
}

/* As in a step: so many layers' forwards, then as many backwards, with what these need before them. */
static flap_status time_layers(bench *b, uint64_t layers, uint64_t *ns_out) {
  FLAP_TRY(flap_device_synchronize(b->device));
  const uint64_t started_ns = flap_units_now_ns();
  for (uint64_t i = 0; i < layers; i++)
    run_forward(b);
  for (uint64_t i = 0; i < layers; i++)
    run_backward(b);
  FLAP_TRY(flap_device_synchronize(b->device));
  *ns_out = flap_units_now_ns() - started_ns;
  return FLAP_OK;
}

/* In rounds each operation comes behind others that take less power, and behind short rests; in a step that waits for
 * nothing layer comes behind layer. */
static flap_status time_sustained(bench *b, const named_timings *n, flap_op_times *t) {
  const uint64_t layer_ns = t->forward_ns + ns_of(b, n->backward[FLAP_SUMS_ADDED_TO][0]);
  flap_assert(layer_ns > 0);
  const uint64_t layers = SUSTAINED_NS / layer_ns + 1;
  uint64_t ns[SUSTAINED_PIECES], settling_ns = 0;
  place_saved(b, 0);
  b->written = FLAP_SUMS_ADDED_TO;
  for (uint64_t passed_ns = 0; passed_ns < SETTLING_NS; passed_ns += settling_ns)
    FLAP_TRY(time_layers(b, layers, &settling_ns));
  for (uint32_t i = 0; i < SUSTAINED_PIECES; i++)
    FLAP_TRY(time_layers(b, layers, &ns[i]));
  qsort(ns, SUSTAINED_PIECES, sizeof *ns, compare_ns);
  const double sustained = (double)ns[SUSTAINED_PIECES / 2] / (double)(layers * layer_ns);
  t->sustained = sustained < 1 || sustained > SUSTAINED_MAX ? 1 : sustained;
  return FLAP_OK;
}

static flap_status time_all(bench *b, flap_op_times *t) {
  timings all = {.count = 0};
  named_timings named = {.embed = NULL};
  *t = (flap_op_times){.launch_ns = b->spec->launch_ns, .copies_beside_host = 1, .sustained = 1};
  list_forward(&all, &named);
  if (b->spec->training)
    list_training(b, &all, &named, t);
  if (b->clock == NULL)
    FLAP_TRY(time_rounds(b, &all, WARM_CARD_NS));
  take_forward(b, &named, t);
  if (!b->spec->training)
    return FLAP_OK;
  take_training(b, &named, t);
  if (is_card(b) && b->parts == PARTS_ALL)
    FLAP_TRY(time_sustained(b, &named, t));
  return b->parts & PART_SLICE ? time_updates(b, t) : FLAP_OK;
}

/* Every product that a step has, once: for tuning. */
static flap_status run_products(bench *b) {
  uint32_t count = 0;
  const flap_saved_set *sets = flap_model_saved_sets(b->spec->model, &count);
  for (uint32_t i = 0; i < count && (b->parts & PART_LAYER); i++) {
    place_saved(b, sets[i].mask);
    run_forward(b);
    run_recompute(b);
  }
  for (int kind = FLAP_SUMS_KINDS; kind-- > 0;) {
    b->written = (flap_sums_written)kind;
    if (b->parts & PART_LAYER && (kind != FLAP_SUMS_FINAL || writes_final(b->spec))) {
      place_saved(b, 0);
      run_forward(b);
      run_backward(b);
    }
    if (b->parts & PART_HEAD && kind != FLAP_SUMS_FINAL) {
      run_loss(b);
      run_head(b);
    }
  }
  return flap_device_synchronize(b->device);
}

/* ---- on a device ----------------------------------------------------------------------------------------- */

static flap_status open_ops(bench *b) {
  flap_ops_limits limits;
  flap_model_ops_limits(b->spec->model, &b->spec->shape, b->spec->threads, &limits);
  FLAP_TRY(flap_ops_open(b->device, &limits, b->ops_workspace, &b->ops));
  FLAP_TRY(flap_matmul_choice_give(b->spec->matmuls, b->ops, true));
  b->run = (flap_model_run){.config = b->spec->model,
                            .shape = b->spec->shape,
                            .ops = b->ops,
                            .rope_table = b->rope,
                            .workspace = b->model_workspace};
  b->decay = calloc(FLAP_OPS_ADAMW_BLOCKS_MAX / 8, 1);
  return b->decay != NULL ? FLAP_OK : flap_error_set(FLAP_NO_MEMORY, "no memory to measure the device");
}

uint64_t op_times_bytes(const flap_op_times_spec *spec, op_times_parts parts, flap_device_kind kind) {
  bench b = {.spec = spec, .parts = parts};
  flap_arena arena;
  flap_arena_measure(&arena, "op times");
  take_all(&b, kind, &arena);
  return flap_units_round_up(arena.bytes_used, 4096);
}

/* Copies pass through the memory of what was timed before. */
static flap_status time_host(bench *b, void *vram, void **pinned_out, flap_op_times *times) {
  const uint64_t bytes = flap_host_times_pinned_bytes();
  *pinned_out = aligned_alloc(4096, bytes);
  if (*pinned_out == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "no memory to measure the host");
  memset(*pinned_out, 0, bytes);
  FLAP_TRY(flap_device_pin_host(b->device, *pinned_out, bytes));
  return flap_host_times_measure(b->spec, b->device, vram, *pinned_out, times);
}

flap_status op_times_run_on(const flap_op_times_spec *spec, op_times_parts parts, const flap_device_config *config,
                            flap_device_kind kind, flap_op_times *times_out) {
  bench b = {.spec = spec, .parts = parts, .clock = config->clock};
  flap_arena arena;
  uint64_t bytes = 0;
  void *pinned = NULL;
  flap_status status = flap_device_open(config, &b.device);
  FLAP_TRY(status);
  void *memory = flap_device_arena(b.device, &bytes);
  if (bytes < op_times_bytes(spec, parts, kind)) {
    status = flap_error_set(FLAP_BUDGET, "vram: %llu bytes are too few to time a layer", (unsigned long long)bytes);
    goto fail;
  }
  flap_arena_borrow(&arena, "op times", memory, bytes);
  take_all(&b, kind, &arena);
  FLAP_TRY_GOTO(status, open_ops(&b));
  if (flap_device_has_bytes(b.device))
    FLAP_TRY_GOTO(status, fill_all(&b));
  FLAP_TRY_GOTO(status, times_out != NULL ? time_all(&b, times_out) : run_products(&b));
  if (times_out != NULL && spec->training && kind == FLAP_DEVICE_CUDA &&
      spec->host_bytes >= flap_host_times_bytes(spec))
    FLAP_TRY_GOTO(status, time_host(&b, memory, &pinned, times_out));
fail:
  free(b.decay);
  flap_ops_close(b.ops);
  flap_device_close(b.device);
  free(pinned); /* it was unpinned with the device */
  return status;
}

flap_status flap_op_times_from_rates(const flap_op_times_spec *spec, const flap_machine *machine,
                                     flap_op_times *times_out) {
  flap_clock *clock;
  FLAP_TRY(flap_clock_open(&clock));
  const flap_device_config config = {.kind = FLAP_DEVICE_SIM,
                                     .vram_bytes = op_times_bytes(spec, PARTS_ALL, FLAP_DEVICE_SIM),
                                     .events_max = 2,
                                     .clock = clock,
                                     .machine = *machine};
  const flap_status status = op_times_run_on(spec, PARTS_ALL, &config, FLAP_DEVICE_SIM, times_out);
  flap_clock_close(clock);
  if (spec->training)
    flap_host_times_from_rate(spec, machine->host_bytes, times_out);
  return status;
}

static flap_status run_on_cuda(const flap_op_times_spec *spec, op_times_parts parts, uint64_t overhead_bytes,
                               uint64_t vram_bytes, flap_op_times *times_out) {
  const uint64_t taken = op_times_bytes(spec, parts, FLAP_DEVICE_CUDA);
  const uint64_t needed = taken > FLAP_HOST_TIMES_VRAM_BYTES ? taken : FLAP_HOST_TIMES_VRAM_BYTES;
  if (needed > vram_bytes || overhead_bytes > vram_bytes - needed)
    return flap_error_set(FLAP_BUDGET, "vram: %llu bytes are too few to time a layer", (unsigned long long)vram_bytes);
  const flap_device_config config = {
      .kind = FLAP_DEVICE_CUDA, .vram_bytes = needed + overhead_bytes, .events_max = FLAP_HOST_TIMES_EVENTS};
  return op_times_run_on(spec, parts, &config, FLAP_DEVICE_CUDA, times_out);
}

flap_status flap_op_times_measure_cuda(const flap_op_times_spec *spec, uint64_t overhead_bytes, uint64_t vram_bytes,
                                       flap_op_times *times_out) {
  FLAP_TRY(run_on_cuda(spec, PARTS_ALL, overhead_bytes, vram_bytes, times_out));
  times_out->measured = true;
  return FLAP_OK;
}

flap_status flap_op_times_tune_cuda(const flap_op_times_spec *spec, uint64_t overhead_bytes, uint64_t vram_bytes) {
  FLAP_TRY(run_on_cuda(spec, PART_LAYER, overhead_bytes, vram_bytes, NULL));
  return run_on_cuda(spec, PART_HEAD, overhead_bytes, vram_bytes, NULL);
}
