/* The Llama family by its own rules: the same bits whether kept or computed again and on any number of threads,
 * gradients against finite differences on random shapes, and charges on the sim device. */
#include "tests/model/model_fixture.h"

#include "base/philox.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Sanitizers make everything several times slower. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CASES 4
#else
#define CASES 12
#endif
#define SAVED_TENSORS 6 /* qkv, attention, lse, rstd, residual, gate_up */
#define SPARE_SETS 8u   /* of normalized_input, normalized_residual, inner */

typedef struct random_case {
  flap_model_config config;
  flap_model_shape shape;
} random_case;

static uint32_t pick(const flap_philox *stream, uint64_t *next, const uint32_t *choices, uint32_t count) {
  return choices[flap_philox_below(stream, (*next)++, count)];
}

/* Small models of all kinds: with and without matrices of whole blocks, wide and narrow heads, biases, tied or not. */
static random_case make_case(uint32_t number, flap_dtype dtype) {
  flap_philox stream = flap_philox_stream(number, "case");
  uint64_t next = 0;
#define PICK(...) pick(&stream, &next, (const uint32_t[]){__VA_ARGS__}, sizeof((uint32_t[]){__VA_ARGS__}) / 4)
  static const uint32_t heads[][2] = {{1, 1}, {2, 1}, {4, 4}, {4, 2}, {6, 2}, {8, 1}};
  const uint32_t *pair = heads[PICK(0, 1, 2, 3, 4, 5)];
  flap_model_config config = {.family = flap_model_find_family("llama"),
                              .num_attention_heads = pair[0],
                              .num_key_value_heads = pair[1],
                              .max_position_embeddings = 64,
                              .rms_norm_eps = 1e-5,
                              .initializer_range = 0.02,
                              .rope = {.theta = 100}};
  config.vocab_size = PICK(17, 64, 97);
  config.hidden_size = PICK(8, 24, 64, 64);
  config.intermediate_size = PICK(8, 40, 64, 128);
  config.num_hidden_layers = PICK(1, 2);
  config.head_dim = PICK(2, 6, 16, 64);
  config.tie_word_embeddings = PICK(0, 1);
  uint32_t biases = PICK(0, 0, 1, 2, 2); /* none, on q, k, v and o, on q, k and v */
  config.attention_bias = biases == 1;
  if (biases == 2)
    config.family = flap_model_find_family("qwen2");
  flap_model_shape shape = {.dtype = dtype};
  shape.batch = PICK(1, 2, 3);
  shape.sequence = PICK(1, 7, 16, 33);
#undef PICK
  ck_assert_msg(flap_model_finish_config(&config) == FLAP_OK, "case %u: %s", number, flap_error_message());
  return (random_case){config, shape};
}

static void open_saving(model_fixture *fixture, const random_case *chosen, uint32_t mask, uint32_t threads,
                        uint64_t seed) {
  fixture_open_saving(fixture, FLAP_DEVICE_CPU, threads, &chosen->config, &chosen->shape, mask);
  fixture_random_weights(fixture, seed);
  fixture_random_batch(fixture, seed);
  fixture_zero_gradients(fixture);
}

static void open_case(model_fixture *fixture, const random_case *chosen, uint32_t threads, uint64_t seed) {
  open_saving(fixture, chosen, FLAP_MODEL_SAVED_ALL, threads, seed);
}

static uint32_t layers_of(flap_part part, const flap_model_config *config) {
  return part == FLAP_PART_LAYER ? config->num_hidden_layers : 1;
}

static void assert_same_gradients(const model_fixture *a, const model_fixture *b, int number) {
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t i = 0; i < layers_of((flap_part)part, &a->config); i++)
      ck_assert_msg(memcmp(a->gradients[part][i], b->gradients[part][i],
                           flap_model_part_elements(&a->config, (flap_part)part) * sizeof(float)) == 0,
                    "case %d: gradients of part %d, layer %u", number, part, i);
}

static char *place_of(const flap_model_saved *saved, const flap_saved_tensor *tensors, uint32_t i) {
  return (char *)((saved->mask >> i & 1) != 0 ? saved->kept : saved->scratch) + tensors[i].offset;
}

/* What the mask does not keep is lost and computed again; what it keeps is not even written. */
static void lose_and_recompute(model_fixture *f, uint32_t layer) {
  const flap_model_saved *saved = &f->saved[layer];
  const uint64_t kept_bytes = flap_model_saved_bytes(&f->config, &f->shape, saved->mask);
  char *copy = malloc(kept_bytes + 1);
  ck_assert(copy != NULL);
  memset(saved->scratch, 0xff, flap_model_scratch_bytes(&f->config, &f->shape, saved->mask));
  memset(f->run.workspace, 0xff, flap_model_workspace_bytes(&f->config, &f->shape));
  memcpy(copy, saved->kept, kept_bytes);
  flap_model_layer_recompute(&f->run, f->weights[FLAP_PART_LAYER][layer], f->x[layer], saved);
  ck_assert(memcmp(copy, saved->kept, kept_bytes) == 0);
  free(copy);
}

static void check_recompute(const random_case *chosen, uint32_t mask, int number) {
  model_fixture kept, again;
  open_case(&kept, chosen, 2, 5);
  open_saving(&again, chosen, mask, 2, 5);
  fixture_forward(&kept);
  fixture_forward(&again);

  flap_saved_tensor whole[FLAP_MODEL_SAVED_MAX], parts[FLAP_MODEL_SAVED_MAX];
  const uint32_t count = flap_model_saved_tensors(&chosen->config, &chosen->shape, FLAP_MODEL_SAVED_ALL, whole);
  ck_assert_uint_eq(flap_model_saved_tensors(&chosen->config, &chosen->shape, mask, parts), count);
  for (uint32_t layer = 0; layer < chosen->config.num_hidden_layers; layer++) {
    ck_assert_mem_eq(kept.x[layer + 1], again.x[layer + 1], flap_model_hidden_bytes(&chosen->config, &chosen->shape));
    for (int pass = 0; pass < 2; pass++) { /* as the forward left it, and computed again */
      for (uint32_t i = 0; i < count; i++)
        ck_assert_msg((whole[i].spare && (mask >> i & 1) == 0) ||
                          memcmp(place_of(&kept.saved[layer], whole, i), place_of(&again.saved[layer], parts, i),
                                 whole[i].bytes) == 0,
                      "case %d, mask %#x, pass %d: %s", number, mask, pass, whole[i].name);
      if (pass == 0)
        lose_and_recompute(&again, layer);
    }
  }
  double loss = fixture_backward(&kept, 0.25f);
  ck_assert(isfinite(loss));
  ck_assert_double_eq(loss, fixture_backward(&again, 0.25f));
  assert_same_gradients(&kept, &again, number);
  ck_assert_str_eq(fixture_overrun(&kept), "");
  ck_assert_str_eq(fixture_overrun(&again), "");
  fixture_close(&kept);
  fixture_close(&again);
}

/* Every set of tensors of which attention's result and its statistics are both kept or neither, each with some set of
 * the spare ones, and everything with every set of them. */
START_TEST(recompute_leaves_the_same_bits_whatever_is_kept) {
  const random_case chosen = make_case((uint32_t)_i, _i % 2 ? FLAP_F32 : FLAP_BF16);
  const random_case other = make_case((uint32_t)_i, _i % 2 ? FLAP_BF16 : FLAP_F32);
  for (uint32_t mask = 0; mask < 1u << SAVED_TENSORS; mask++)
    if ((mask >> 1 & 1) == (mask >> 2 & 1))
      check_recompute(&chosen, mask | (mask + (uint32_t)_i) % SPARE_SETS << SAVED_TENSORS, _i);
  for (uint32_t spare = 0; spare < SPARE_SETS; spare++)
    check_recompute(&chosen, ((1u << SAVED_TENSORS) - 1) | spare << SAVED_TENSORS, _i);
  uint32_t set_count;
  const flap_saved_set *sets = flap_model_saved_sets(&other.config, &set_count);
  check_recompute(&other, 0, _i);
  for (uint32_t i = 0; i < set_count; i++)
    check_recompute(&other, sets[i].mask, _i);
}
END_TEST

/* A recompute starts from what is kept and from nothing before it: with the residual stream spoilt, gate and up are;
 * with attention's result spoilt, the residual stream is, but q, k and v are not; statistics of the norms serve the
 * backward alone. And what is kept is not written, not even with what it holds. */
static const struct {
  const char *spoilt, *follows, *stays;
  uint32_t mask;
} CHAINS[] = {{"residual", "gate_up", NULL, 0x1f},
              {"rstd", NULL, "gate_up", 0x1f},
              {"attention", "residual", "qkv", 0x06},
              {"qkv", "attention", NULL, 0x01},
              {"gate_up", NULL, "residual", 0x20}};
#define CHAIN_COUNT ((int)(sizeof CHAINS / sizeof *CHAINS))

START_TEST(recompute_starts_from_what_is_kept) {
  const random_case chosen = make_case(3, FLAP_BF16);
  model_fixture f;
  open_saving(&f, &chosen, CHAINS[_i].mask, 1, 5);
  fixture_forward(&f);
  flap_saved_tensor tensors[FLAP_MODEL_SAVED_MAX];
  const uint32_t count = flap_model_saved_tensors(&chosen.config, &chosen.shape, CHAINS[_i].mask, tensors);
  char *place[FLAP_MODEL_SAVED_MAX], *before[FLAP_MODEL_SAVED_MAX];
  uint32_t checked = 0;
  for (uint32_t i = 0; i < count; i++) {
    place[i] = place_of(&f.saved[0], tensors, i);
    before[i] = malloc(tensors[i].bytes);
    ck_assert(before[i] != NULL);
    if (strcmp(tensors[i].name, CHAINS[_i].spoilt) == 0)
      memset(place[i], 0, tensors[i].bytes);
    memcpy(before[i], place[i], tensors[i].bytes);
  }
  flap_model_layer_recompute(&f.run, f.weights[FLAP_PART_LAYER][0], f.x[0], &f.saved[0]);
  for (uint32_t i = 0; i < count; i++) {
    const bool same = memcmp(before[i], place[i], tensors[i].bytes) == 0;
    const char *name = tensors[i].name;
    if (CHAINS[_i].follows != NULL && strcmp(name, CHAINS[_i].follows) == 0)
      ck_assert_msg(!same, "%s does not follow from %s", name, CHAINS[_i].spoilt);
    else if (strcmp(name, CHAINS[_i].spoilt) == 0 || (CHAINS[_i].stays != NULL && strcmp(name, CHAINS[_i].stays) == 0))
      ck_assert_msg(same, "%s is written or follows from %s", name, CHAINS[_i].spoilt);
    else
      continue;
    checked++;
  }
  ck_assert_uint_ge(checked, 2);
  for (uint32_t i = 0; i < count; i++)
    free(before[i]);
  fixture_close(&f);
}
END_TEST

START_TEST(threads_leave_the_same_bits) {
  random_case chosen = make_case((uint32_t)_i, _i % 2 ? FLAP_F32 : FLAP_BF16);
  model_fixture one, three;
  open_case(&one, &chosen, 1, 6);
  open_case(&three, &chosen, 3, 6);
  fixture_forward(&one);
  fixture_forward(&three);
  ck_assert_double_eq(fixture_backward(&one, 1.0f), fixture_backward(&three, 1.0f));
  assert_same_gradients(&one, &three, _i);
  fixture_close(&one);
  fixture_close(&three);
}
END_TEST

/* ---- the first micro-batch ------------------------------------------------------------------------------- */

/* Without accumulation a backward gives what adding to zeros gives, whatever was in the sums; gaps become zero. Only
 * the embedding's own backward adds always: its sums are poisoned where the head writes them first. */
static void poison_gradients(const model_fixture *f) {
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t i = 0; i < layers_of((flap_part)part, &f->config); i++)
      if (part != FLAP_PART_EMBEDDING || f->config.tie_word_embeddings)
        memset(f->gradients[part][i], 0xff, flap_model_part_elements(&f->config, (flap_part)part) * sizeof(float));
}

/* Two alike behind their forward; what the second one's backward does not write is NaN. */
static void open_two(int index, flap_dtype dtype, model_fixture *one, model_fixture *poisoned) {
  random_case chosen = make_case((uint32_t)index, dtype);
  open_case(one, &chosen, 2, 7);
  open_case(poisoned, &chosen, 2, 7);
  fixture_forward(one);
  fixture_forward(poisoned);
  poison_gradients(poisoned);
}

START_TEST(first_backward_equals_adding_to_zeros) {
  model_fixture zeros, fresh;
  open_two(_i, _i % 2 ? FLAP_F32 : FLAP_BF16, &zeros, &fresh);
  fresh.fresh = true;
  ck_assert_double_eq(fixture_backward(&zeros, 0.5f), fixture_backward(&fresh, 0.5f));
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t i = 0; i < layers_of((flap_part)part, &zeros.config); i++)
      for (uint64_t j = 0; j < flap_model_part_elements(&zeros.config, (flap_part)part); j++)
        ck_assert_msg(zeros.gradients[part][i][j] == fresh.gradients[part][i][j],
                      "case %d: part %d, sum %llu: %g, not %g", _i, part, (unsigned long long)j,
                      (double)fresh.gradients[part][i][j], (double)zeros.gradients[part][i][j]);
  fixture_close(&zeros);
  fixture_close(&fresh);
}
END_TEST

/* To the bit, gaps included, and with nothing behind them. */
START_TEST(final_gradients_are_the_sums_rounded_once) {
  model_fixture sums, final;
  open_two(_i, FLAP_BF16, &sums, &final);
  sums.fresh = final.fresh = final.final = true;
  ck_assert_double_eq(fixture_backward(&sums, 0.5f), fixture_backward(&final, 0.5f));
  const uint64_t elements = flap_model_part_elements(&sums.config, FLAP_PART_LAYER);
  for (uint32_t i = 0; i < sums.config.num_hidden_layers; i++) {
    const uint16_t *rounded = (const uint16_t *)(const void *) final.gradients[FLAP_PART_LAYER][i];
    for (uint64_t j = 0; j < elements; j++)
      ck_assert_msg(rounded[j] == flap_f32_to_bf16(sums.gradients[FLAP_PART_LAYER][i][j]),
                    "case %d: layer %u, gradient %llu: %04x, not that of %g", _i, i, (unsigned long long)j, rounded[j],
                    (double)sums.gradients[FLAP_PART_LAYER][i][j]);
    ck_assert_uint_eq(rounded[elements], 0xffff);
  }
  ck_assert_str_eq(fixture_overrun(&final), "");
  fixture_close(&sums);
  fixture_close(&final);
}
END_TEST

/* ---- biases ---------------------------------------------------------------------------------------------- */

/* With weights of zero a projection's result is its bias, and position 0 is not turned: the first row of the saved q, k
 * and v is their three biases side by side, exactly. The matrices are whole blocks, so one product makes that row; the
 * biases are not, so they have gaps between them. */
START_TEST(biases_of_one_product_stand_at_their_columns) {
  flap_model_config config = {.family = flap_model_find_family(_i & 1 ? "qwen2" : "llama"),
                              .vocab_size = 17,
                              .hidden_size = 64,
                              .intermediate_size = 64,
                              .num_hidden_layers = 1,
                              .num_attention_heads = 8,
                              .num_key_value_heads = 4,
                              .head_dim = 16,
                              .max_position_embeddings = 64,
                              .rms_norm_eps = 1e-6,
                              .initializer_range = 0.02,
                              .attention_bias = true,
                              .rope = {.theta = 100}};
  ck_assert_msg(flap_model_finish_config(&config) == FLAP_OK, "%s", flap_error_message());
  random_case chosen = {config, {.dtype = _i & 2 ? FLAP_BF16 : FLAP_F32, .batch = 2, .sequence = 5}};
  model_fixture fixture;
  open_case(&fixture, &chosen, 2, 9);

  static const char *const names[] = {"q_proj", "k_proj", "v_proj"};
  const uint64_t element = flap_dtype_bytes(chosen.shape.dtype);
  char *weights = fixture.weights[FLAP_PART_LAYER][0], expected[256 * sizeof(float)];
  uint64_t matrix_end = 0, bytes = 0;
  flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
  uint32_t count = flap_model_tensors(&config, FLAP_PART_LAYER, 0, tensors);
  for (size_t n = 0; n < sizeof names / sizeof *names; n++)
    for (uint32_t i = 0; i < count; i++) {
      char *values = weights + tensors[i].offset * element;
      if (!strstr(tensors[i].name, names[n]))
        continue;
      if (tensors[i].rank == 2) {
        ck_assert(n == 0 || tensors[i].offset == matrix_end);
        matrix_end = tensors[i].offset + tensors[i].elements;
        memset(values, 0, tensors[i].elements * element);
      } else {
        memcpy(expected + bytes, values, tensors[i].elements * element);
        bytes += tensors[i].elements * element;
      }
    }
  ck_assert_uint_eq(bytes, 256 * element);

  fixture_forward(&fixture);
  flap_saved_tensor kept[FLAP_MODEL_SAVED_MAX];
  (void)flap_model_saved_tensors(&config, &chosen.shape, FLAP_MODEL_SAVED_ALL, kept);
  ck_assert_str_eq(kept[0].name, "qkv");
  ck_assert_mem_eq((char *)fixture.saved[0].kept + kept[0].offset, expected, bytes);
  ck_assert_mem_eq((char *)fixture.saved[0].kept + kept[0].offset + 5 * bytes, expected, bytes);
  ck_assert_str_eq(fixture_overrun(&fixture), "");
  fixture_close(&fixture);
}
END_TEST

/* ---- finite differences ---------------------------------------------------------------------------------- */

static double loss_of(model_fixture *fixture) {
  fixture_forward(fixture);
  flap_model_head_loss(&fixture->run, fixture->weights[FLAP_PART_HEAD][0], fixture_projection(fixture),
                       fixture->x[fixture->config.num_hidden_layers], fixture->targets, 1.0f, fixture->losses, NULL,
                       NULL, NULL, false);
  double sum = 0;
  for (uint32_t i = 0; i < fixture->shape.batch * fixture->shape.sequence; i++)
    sum += fixture->losses[i];
  return sum;
}

static double length_of(const float *values, uint64_t elements) {
  double square = 0;
  for (uint64_t i = 0; i < elements; i++)
    square += (double)values[i] * values[i];
  return sqrt(square);
}

/* Moves one tensor both ways along its own gradient, where the slope is the gradient's length; or, where the gradient
 * is so short that fp32 losses cannot show it, along noise, which must then show nothing either. */
static void check_slope(model_fixture *fixture, const flap_model_tensor *tensor, float *weights,
                        const float *gradient) {
  uint64_t elements = tensor->elements;
  double length = length_of(gradient, elements);
  float *original = malloc(elements * sizeof *original), *direction = malloc(elements * sizeof *direction);
  ck_assert(original && direction);
  memcpy(original, weights, elements * sizeof *original);
  flap_philox stream = flap_philox_stream(9, tensor->name);
  for (uint64_t i = 0; i < elements; i++)
    direction[i] = length < 1e-3 ? flap_philox_normal(&stream, i) : gradient[i];
  double norm = length_of(direction, elements), expected = 0;
  for (uint64_t i = 0; i < elements; i++)
    expected += direction[i] / norm * gradient[i];

  double step = 0.05 / length; /* far enough to show in the loss, near enough for its curvature not to */
  if (step > 2e-2)
    step = 2e-2;
  double losses[2];
  for (int side = 0; side < 2; side++) {
    for (uint64_t i = 0; i < elements; i++)
      weights[i] = original[i] + (float)((side ? step : -step) * direction[i] / norm);
    losses[side] = loss_of(fixture);
  }
  memcpy(weights, original, elements * sizeof *original);
  free(original);
  free(direction);
  double slope = (losses[1] - losses[0]) / (2 * step), noise = 4e-7 * fabs(losses[0]) / step;
  ck_assert_msg(fabs(slope - expected) <= 0.02 * length + noise, "%s: slope %g, gradient %g", tensor->name, slope,
                expected);
}

START_TEST(gradients_agree_with_finite_differences) {
  random_case chosen = make_case((uint32_t)_i, FLAP_F32);
  model_fixture fixture;
  open_case(&fixture, &chosen, 1, 7);
  fixture_forward(&fixture);
  fixture_backward(&fixture, 1.0f);
  for (int part = 0; part < FLAP_PART_COUNT; part++)
    for (uint32_t layer = 0; layer < layers_of((flap_part)part, &chosen.config); layer++) {
      flap_model_tensor tensors[FLAP_MODEL_TENSORS_MAX];
      uint32_t count = flap_model_tensors(&chosen.config, (flap_part)part, layer, tensors);
      for (uint32_t i = 0; i < count; i++)
        check_slope(&fixture, &tensors[i], (float *)fixture.weights[part][layer] + tensors[i].offset,
                    fixture.gradients[part][layer] + tensors[i].offset);
    }
  ck_assert_str_eq(fixture_overrun(&fixture), "");
  fixture_close(&fixture);
}
END_TEST

/* ---- sampling -------------------------------------------------------------------------------------------- */

/* Random shapes; the golden test does this for recorded models. bf16 rounds at other places here than there, so only
 * fp32 is compared closely. */
START_TEST(decode_follows_the_full_forward) {
  random_case chosen = make_case((uint32_t)_i, FLAP_F32);
  chosen.shape.batch = 1;
  model_fixture full, pieces;
  open_case(&full, &chosen, 2, 8);
  open_case(&pieces, &chosen, 2, 8);
  fixture_forward(&full);
  uint32_t layers = chosen.config.num_hidden_layers, hidden = chosen.config.hidden_size;
  for (uint32_t first = 0, tokens; first < chosen.shape.sequence; first += tokens) {
    tokens = first % 3 + 1; /* 1, 2, 1, 2... */
    if (tokens > chosen.shape.sequence - first)
      tokens = chosen.shape.sequence - first;
    flap_model_run embed = pieces.run;
    embed.shape.sequence = tokens;
    void *x = pieces.x[0];
    flap_model_embed(&embed, pieces.weights[FLAP_PART_EMBEDDING][0], pieces.tokens + first, x);
    for (uint32_t i = 0; i < layers; i++)
      flap_model_layer_decode(&pieces.run, pieces.weights[FLAP_PART_LAYER][i], x, pieces.saved[0].kept, pieces.cache[i],
                              pieces.cache_positions, tokens, first);
    const float *expected = (const float *)full.x[layers] + (uint64_t)first * hidden;
    double error = fixture_relative_error(x, expected, (uint64_t)tokens * hidden);
    ck_assert_msg(error < 1e-5, "case %d: positions from %u are off by %g", _i, first, error);
  }
  ck_assert_str_eq(fixture_overrun(&pieces), "");
  fixture_close(&full);
  fixture_close(&pieces);
}
END_TEST

/* ---- the sim device -------------------------------------------------------------------------------------- */

static double busy(model_fixture *fixture) {
  ck_assert_int_eq(flap_device_synchronize(fixture->device), FLAP_OK);
  return (double)flap_device_busy_ns(fixture->device, FLAP_STREAM_COMPUTE);
}

/* `call` charges at least `promised` operations, and at most the share `above` more. */
#define CHECK_CHARGE(promised, above, call)                                                                            \
  do {                                                                                                                 \
    double before = busy(&fixture);                                                                                    \
    call;                                                                                                              \
    double charged = busy(&fixture) - before, least = (promised);                                                      \
    ck_assert_msg(charged >= least && charged <= least * (1 + (above)), "%s: charged %g, promised %g", #call, charged, \
                  least);                                                                                              \
  } while (0)

/* On this machine an operation takes a nanosecond and a launch one more; large widths make element-wise work a small
 * share. */
START_TEST(sim_charges_the_flops_that_the_family_promises) {
  flap_model_config config = {.family = flap_model_find_family("llama"),
                              .vocab_size = 8000,
                              .hidden_size = 1024,
                              .intermediate_size = 2816,
                              .num_hidden_layers = 1,
                              .num_attention_heads = 16,
                              .num_key_value_heads = 4,
                              .max_position_embeddings = 2048,
                              .rms_norm_eps = 1e-5,
                              .initializer_range = 0.02,
                              .rope = {.theta = 10000}};
  ck_assert_int_eq(flap_model_finish_config(&config), FLAP_OK);
  flap_model_shape shape = {.dtype = FLAP_BF16, .batch = 2, .sequence = 512};
  model_fixture fixture;
  fixture_open(&fixture, FLAP_DEVICE_SIM, 1, &config, &shape);
  const flap_model_run *run = &fixture.run;
  void *layer = fixture.weights[FLAP_PART_LAYER][0], *head = fixture.weights[FLAP_PART_HEAD][0];
  void *projection = fixture_projection(&fixture), *embedding = fixture.weights[FLAP_PART_EMBEDDING][0];
  float *dembedding = fixture.gradients[FLAP_PART_EMBEDDING][0], *dlayer = fixture.gradients[FLAP_PART_LAYER][0];
  float *dhead = fixture.gradients[FLAP_PART_HEAD][0], *dprojection = fixture_projection_gradient(&fixture);
  void *x = fixture.x[0], *y = fixture.x[1], *dx = fixture.dx, *cache = fixture.cache[0];
  const flap_model_saved *saved = &fixture.saved[0], nothing = {.scratch = saved->kept};
  const flap_model_gradient added = {.sums = dlayer, .dtype = FLAP_F32, .accumulate = true};
  int32_t *ids = fixture.tokens, *targets = fixture.targets;
  float *losses = fixture.losses;
  double tokens = 1024;
  double layer_flops = flap_model_forward_flops(&config, &shape, FLAP_PART_LAYER);
  double head_flops = flap_model_forward_flops(&config, &shape, FLAP_PART_HEAD);
  double attention = 2 * tokens * 512 * 1024, down = 2 * tokens * 1024 * 2816;
  ck_assert_double_eq(layer_flops, 2 * tokens * (1024.0 * (1536 + 1024) + 3 * 1024.0 * 2816) + attention);
  ck_assert_double_eq(head_flops, 2 * tokens * 1024 * 8000);

  CHECK_CHARGE(layer_flops, 0.02, flap_model_layer_forward(run, layer, x, saved, y));
  CHECK_CHARGE(layer_flops - down, 0.02, flap_model_layer_recompute(run, layer, x, &nothing));
  uint32_t set_count;
  const flap_saved_set *sets = flap_model_saved_sets(&config, &set_count);
  ck_assert_double_eq(flap_model_recompute_flops(&config, &shape, 0), layer_flops - down);
  ck_assert_double_eq(flap_model_recompute_flops(&config, &shape, FLAP_MODEL_SAVED_ALL), 0);
  for (uint32_t i = 0; i < set_count; i++) {
    const flap_model_saved some = {.kept = saved->kept, .scratch = saved->kept, .mask = sets[i].mask};
    CHECK_CHARGE(flap_model_recompute_flops(&config, &shape, sets[i].mask), 0.02,
                 flap_model_layer_recompute(run, layer, x, &some));
  }
  /* Two matmuls for each of the forward's, and 5 passes over attention's squares for its 2. */
  CHECK_CHARGE(2 * layer_flops + 0.5 * attention, 0.02, flap_model_layer_backward(run, layer, x, saved, dx, &added));
  CHECK_CHARGE(head_flops, 0.05,
               flap_model_head_loss(run, head, projection, x, targets, 1, losses, NULL, NULL, NULL, false));
  CHECK_CHARGE(3 * head_flops, 0.05,
               flap_model_head_loss(run, head, projection, x, targets, 1, losses, dx, dhead, dprojection, true));
  CHECK_CHARGE(head_flops / tokens, 0.01, flap_model_logits(run, head, projection, x, 3, fixture.logits));
  CHECK_CHARGE((layer_flops - attention) / tokens, 0.02,
               flap_model_layer_decode(run, layer, x, saved->kept, cache, fixture.cache_positions, 1, 0));
  CHECK_CHARGE(1, 0, flap_model_embed(run, embedding, ids, x));
  CHECK_CHARGE(tokens * 1024, 0.01, flap_model_embed_backward(run, ids, fixture.order, dx, dembedding));
  fixture_close(&fixture);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("llama_layer");
  TCase *tests = tcase_create("layer");
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, recompute_leaves_the_same_bits_whatever_is_kept, 0, CASES);
  tcase_add_loop_test(tests, recompute_starts_from_what_is_kept, 0, CHAIN_COUNT);
  tcase_add_loop_test(tests, threads_leave_the_same_bits, 0, CASES);
  tcase_add_loop_test(tests, first_backward_equals_adding_to_zeros, 0, CASES);
  tcase_add_loop_test(tests, final_gradients_are_the_sums_rounded_once, 0, CASES);
  tcase_add_loop_test(tests, biases_of_one_product_stand_at_their_columns, 0, 4);
  tcase_add_loop_test(tests, gradients_agree_with_finite_differences, 0, CASES);
  tcase_add_loop_test(tests, decode_follows_the_full_forward, 0, CASES);
  tcase_add_test(tests, sim_charges_the_flops_that_the_family_promises);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
