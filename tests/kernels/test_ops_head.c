/* Head and loss against fp64: losses, and gradients by finite differences; chunks, ignored targets, dx over x. */
#include "tests/kernels/ops_rig.h"

#include <math.h>
#include <stdlib.h>

typedef struct head_case {
  uint32_t tokens, hidden, vocabulary;
  double *x, *weight;
  const int32_t *targets;
  uint32_t only_token; /* the loss of all tokens, or of this one */
  flap_dtype dtype;    /* logits are rounded to it */
} head_case;

static double token_loss(const head_case *h, uint32_t token) {
  if (h->targets[token] < 0)
    return 0;
  double sum = 0, at_target = 0;
  for (uint32_t i = 0; i < h->vocabulary; ++i) {
    double logit = 0;
    for (uint32_t j = 0; j < h->hidden; ++j)
      logit += h->x[(uint64_t)token * h->hidden + j] * h->weight[(uint64_t)i * h->hidden + j];
    sum += exp(logit);
    at_target = (uint32_t)h->targets[token] == i ? logit : at_target;
  }
  return log(sum) - at_target;
}

static double head_loss(void *context) {
  const head_case *h = context;
  if (h->only_token < h->tokens)
    return token_loss(h, h->only_token);
  double loss = 0;
  for (uint32_t token = 0; token < h->tokens; ++token)
    loss += token_loss(h, token);
  return loss;
}

static void check_head(rig rigs[RIG_THREADS_MAX], rig_random *random, flap_dtype dtype, uint32_t tokens,
                       uint32_t hidden, uint32_t vocabulary) {
  const uint64_t x_count = (uint64_t)tokens * hidden, w_count = (uint64_t)vocabulary * hidden;
  const uint64_t x_bytes = x_count * flap_dtype_bytes(dtype);
  const double scale = 0.25;
  void *x = rig_normal(random, dtype, x_count, 1);
  void *weight = rig_normal(random, dtype, w_count, 2 / sqrt(hidden)), *dx[RIG_THREADS_MAX];
  float *before = rig_normal_f32(random, w_count, 0.1), *dweight[RIG_THREADS_MAX], *losses[RIG_THREADS_MAX];
  int32_t *targets = rig_bytes(tokens * sizeof *targets);
  for (uint32_t i = 0; i < tokens; ++i)
    targets[i] = tokens > 1 && rig_between(random, 0, 5) == 0 ? -100 : (int32_t)rig_between(random, 0, vocabulary - 1);
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t) {
    dx[t] = rig_copy(x, x_bytes);
    dweight[t] = rig_copy(before, w_count * 4);
    losses[t] = rig_bytes(tokens * 4);
    float *loss_only = rig_bytes(tokens * 4);
    flap_ops_head_loss(rigs[t].ops, dtype, loss_only, NULL, NULL, false, x, weight, targets, 1, tokens, hidden,
                       vocabulary);
    /* With one thread dx is another place than x, else the same. */
    flap_ops_head_loss(rigs[t].ops, dtype, losses[t], dx[t], dweight[t], true, t == 0 ? x : dx[t], weight, targets,
                       (float)scale, tokens, hidden, vocabulary);
    rig_same("losses with and without backward", losses[t], loss_only, tokens * 4);
    rig_same("losses", losses[0], losses[t], tokens * 4);
    rig_same("dx", dx[0], dx[t], x_bytes);
    rig_same("dweight", dweight[0], dweight[t], w_count * 4);
    free(loss_only);
  }
  /* Without accumulation: what adding to zeros gives, whatever was there. */
  float *fresh = rig_bytes(w_count * 4), *zeros = rig_bytes(w_count * 4);
  memset(fresh, 0xff, w_count * 4);
  memset(zeros, 0, w_count * 4);
  flap_ops_head_loss(rigs[0].ops, dtype, losses[0], dx[0], fresh, false, x, weight, targets, (float)scale, tokens,
                     hidden, vocabulary);
  flap_ops_head_loss(rigs[0].ops, dtype, losses[0], dx[0], zeros, true, x, weight, targets, (float)scale, tokens,
                     hidden, vocabulary);
  for (uint64_t i = 0; i < w_count; ++i)
    ck_assert_msg(fresh[i] == zeros[i], "dweight %llu without accumulation", (unsigned long long)i);
  free(fresh), free(zeros);
  head_case h = {.tokens = tokens, .hidden = hidden, .vocabulary = vocabulary, .targets = targets, .dtype = dtype};
  h.x = rig_doubles(dtype, x, x_count);
  h.weight = rig_doubles(dtype, weight, w_count);
  const uint32_t step = 1 + (uint32_t)((uint64_t)tokens * vocabulary * hidden / 3000000);
  for (uint32_t i = 0; i < tokens; ++i) {
    if (targets[i] < 0)
      rig_near("loss", i, (double)losses[0][i], 0, 0, 0);
    else if (i % step == 0)
      rig_near("loss", i, (double)losses[0][i], token_loss(&h, i), 1e-5, dtype == FLAP_F32 ? 1e-5 : 6e-2);
  }
  for (uint32_t probe = 0; probe < 8; ++probe) {
    uint32_t at = rig_between(random, 0, (uint32_t)x_count - 1);
    h.only_token = at / hidden;
    double want = scale * rig_slope(&h.x[at], 1e-4, head_loss, &h);
    /* A sum of so many exponentials in fp32 is off by about 2^-24 of itself times the root of their number, and all
     * probabilities with it; what is multiplied with them is at most about 1. */
    const double normalised = 0x1p-24 * sqrt(vocabulary);
    rig_near("dx", at, rig_at(dtype, dx[0], at), want, rig_ulp(dtype), (dtype == FLAP_F32 ? 2e-6 : 8e-3) + normalised);
    if ((uint64_t)tokens * w_count > 8000000)
      continue;
    at = rig_between(random, 0, (uint32_t)w_count - 1);
    h.only_token = tokens;
    want = scale * rig_slope(&h.weight[at], 1e-4, head_loss, &h) + (double)before[at];
    rig_near("dweight", at, (double)dweight[0][at], want, 1e-5, (dtype == FLAP_F32 ? 1e-5 : 2e-3) * (1 + sqrt(tokens)));
  }
  for (uint32_t t = 0; t < RIG_THREADS_MAX; ++t)
    free(dx[t]), free(dweight[t]), free(losses[t]);
  free(x), free(weight), free(before), free(targets), free(h.x), free(h.weight);
}

static void head(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("head");
  check_head(rigs, &random, dtype, 1, 1, 1);
  check_head(rigs, &random, dtype, 1, 33, 257);
  check_head(rigs, &random, dtype, 1000, 24, 257); /* several chunks */
  check_head(rigs, &random, dtype, 131, 17, 3000); /* rows longer than what is held at a time */
  check_head(rigs, &random, dtype, 64, 40, 1025);
  for (uint32_t i = 0; i < 6; ++i)
    check_head(rigs, &random, dtype, rig_between(&random, 1, 90), rig_between(&random, 1, 60),
               rig_between(&random, 2, 600));
}

START_TEST(head_loss_any_shape_matches_fp64_and_finite_differences) {
  const flap_ops_limits limits = rig_limits(rig_dtype(_i));
  rig_with_threads(&limits, head);
}
END_TEST

/* Only what the head needs is in these limits, so the guards stand right behind it. */
static void tight(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("head tight");
  check_head(rigs, &random, dtype, 70, 8, 40000);
}

START_TEST(head_loss_large_vocabulary_stays_in_workspace) {
  flap_ops_limits limits = {.dtype = rig_dtype(_i), .batch_max = 1, .sequence_max = 70};
  limits.tokens_max = 70;
  limits.hidden = limits.intermediate = 8;
  limits.vocabulary = 40000;
  limits.heads = limits.kv_heads = 1;
  limits.head_size = 8;
  limits.threads = RIG_THREADS_MAX;
  rig_with_threads(&limits, tight);
}
END_TEST

/* Losses are those of the logits that are stored: with logits of fp32 products rounded to bf16, in fp64 from there. */
static void rounded(rig rigs[RIG_THREADS_MAX], flap_dtype dtype) {
  rig_random random = rig_random_named("head rounded");
  const uint32_t tokens = 9, hidden = 1, vocabulary = 50;
  void *x = rig_normal(&random, dtype, tokens, 3), *weight = rig_normal(&random, dtype, vocabulary, 1);
  int32_t targets[9];
  float losses[9];
  for (uint32_t i = 0; i < tokens; ++i)
    targets[i] = (int32_t)i * 5;
  flap_ops_head_loss(rigs[0].ops, dtype, losses, NULL, NULL, false, x, weight, targets, 1, tokens, hidden, vocabulary);
  for (uint32_t i = 0; i < tokens; ++i) {
    double sum = 0, at_target = 0;
    for (uint32_t j = 0; j < vocabulary; ++j) {
      const double logit = rig_round(dtype, rig_at(dtype, x, i) * rig_at(dtype, weight, j)); /* exact before */
      sum += exp(logit);
      at_target = (int32_t)j == targets[i] ? logit : at_target;
    }
    rig_near("loss", i, (double)losses[i], log(sum) - at_target, 1e-6, 1e-6);
  }
  free(x), free(weight);
}

START_TEST(head_loss_bf16_logits_are_rounded_once) {
  const flap_ops_limits limits = rig_limits(FLAP_BF16);
  rig_with_threads(&limits, rounded);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("ops_head");
  tcase_set_timeout(tests, 300);
  tcase_add_loop_test(tests, head_loss_any_shape_matches_fp64_and_finite_differences, 0, RIG_DTYPES);
  tcase_add_loop_test(tests, head_loss_large_vocabulary_stays_in_workspace, 0, RIG_DTYPES);
  tcase_add_test(tests, head_loss_bf16_logits_are_rounded_once);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
