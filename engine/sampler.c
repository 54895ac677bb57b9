/* 1. `order` holds token ids. Its front [0, heaped) is a binary heap with the likeliest token on top; what was taken
 * off stands behind it, so that the token taken as number r stands at order[vocabulary - 1 - r].
 * 2. Only as many tokens are taken off as the cuts and the draw need: with a peaked distribution that is a handful of a
 *    hundred thousand. */
#include "engine/sampler.h"

#include "base/assert.h"
#include "base/philox.h"

#include <math.h>

#define DRAW_BITS 53 /* a double holds every one of the numbers that may be drawn */

uint64_t flap_sampler_measure(uint32_t vocabulary) {
  flap_arena arena;
  flap_sample_options options = {.top_p = 1};
  flap_sampler sampler;
  flap_arena_measure(&arena, "sampler");
  flap_sampler_open(&sampler, &options, vocabulary, &arena);
  return arena.bytes_used;
}

void flap_sampler_open(flap_sampler *sampler, const flap_sample_options *options, uint32_t vocabulary,
                       flap_arena *arena) {
  flap_assert(vocabulary > 0 && vocabulary <= INT32_MAX);
  flap_assert(options->temperature >= 0 && options->top_p >= 0 && options->top_p <= 1);
  *sampler = (flap_sampler){.options = options, .vocabulary = vocabulary};
  sampler->probabilities = FLAP_ARENA_ARRAY(arena, double, vocabulary);
  sampler->order = FLAP_ARENA_ARRAY(arena, uint32_t, vocabulary);
}

/* e^x for x <= 0, within a few units of the last place. The C library picks its own by instruction set, and they
 * differ in the last bit; this one is additions and multiplications, the same everywhere. */
static double exp_of(double x) {
  if (!(x > -708)) /* below the normal numbers, and no share of anything */
    return 0;
  const double n = floor(x * 1.44269504088896340736 + 0.5);
  /* ln 2 in two parts: n times the first is exact. */
  const double r = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
  double sum = 1;
  for (int degree = 14; degree > 0; degree--) /* Taylor, |r| <= 0.35: the rest is below 2^-61 */
    sum = 1 + sum * r / degree;
  return ldexp(sum, (int)n);
}

static bool likelier(const float *logits, uint32_t a, uint32_t b) {
  return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

static void sift_down(uint32_t *heap, uint32_t count, uint32_t at, const float *logits) {
  const uint32_t token = heap[at];
  for (;;) {
    uint64_t child = 2 * (uint64_t)at + 1;
    if (child >= count)
      break;
    if (child + 1 < count && likelier(logits, heap[child + 1], heap[child]))
      child++;
    if (likelier(logits, token, heap[child]))
      break;
    heap[at] = heap[child];
    at = (uint32_t)child;
  }
  heap[at] = token;
}

/* Takes the likeliest off the heap. */
static uint32_t take(flap_sampler *sampler, const float *logits, uint32_t *heaped) {
  uint32_t *heap = sampler->order, last = --*heaped;
  const uint32_t token = heap[0];
  heap[0] = heap[last];
  heap[last] = token;
  if (last > 0)
    sift_down(heap, last, 0, logits);
  return token;
}

/* The token that is taken as number `rank`, whether it was before or is only now. */
static uint32_t ranked(flap_sampler *sampler, const float *logits, uint32_t *heaped, uint32_t rank) {
  const uint32_t at = sampler->vocabulary - 1 - rank;
  return at >= *heaped ? sampler->order[at] : take(sampler, logits, heaped);
}

/* What the draw chooses from: the `count` likeliest, and the sum of their shares. Those that were taken off the heap
 * stay taken. */
static uint32_t cut(flap_sampler *sampler, const float *logits, uint32_t *heaped, double *total_out) {
  const flap_sample_options *options = sampler->options;
  const double *shares = sampler->probabilities;
  uint32_t count = sampler->vocabulary;
  double total = 0;
  if (options->top_k > 0 && options->top_k < count) {
    count = options->top_k;
    for (uint32_t rank = 0; rank < count; rank++)
      total += shares[ranked(sampler, logits, heaped, rank)];
  } else {
    for (uint32_t i = 0; i < count; i++)
      total += shares[i];
  }
  *total_out = total;
  if (options->top_p >= 1)
    return count;
  double sum = 0;
  for (uint32_t rank = 0; rank < count; rank++) {
    sum += shares[ranked(sampler, logits, heaped, rank)];
    if (sum >= options->top_p * total) {
      *total_out = sum;
      return rank + 1;
    }
  }
  return count; /* roundings kept the sum below a share of nearly 1 */
}

static flap_status find_largest(const flap_sampler *sampler, const float *logits, uint32_t *token_out) {
  uint32_t largest = 0;
  for (uint32_t i = 0; i < sampler->vocabulary; i++) {
    if (!isfinite(logits[i]))
      return flap_error_set(FLAP_NUMERIC,
                            "sampling: the logit of token %u is %g: the weights are broken, or the model overflows in "
                            "this dtype",
                            i, (double)logits[i]);
    if (logits[i] > logits[largest])
      largest = i;
  }
  *token_out = largest;
  return FLAP_OK;
}

flap_status flap_sampler_next(flap_sampler *sampler, const float *logits, uint64_t index, int32_t *token_out) {
  const flap_sample_options *options = sampler->options;
  const uint32_t vocabulary = sampler->vocabulary;
  uint32_t token = 0;
  FLAP_TRY(find_largest(sampler, logits, &token));
  *token_out = (int32_t)token;
  if (options->temperature == 0)
    return FLAP_OK;
  const double largest = (double)logits[token];
  for (uint32_t i = 0; i < vocabulary; i++) {
    sampler->probabilities[i] = exp_of(((double)logits[i] - largest) / options->temperature);
    sampler->order[i] = i;
  }
  for (uint32_t at = vocabulary / 2; at-- > 0;)
    sift_down(sampler->order, vocabulary, at, logits);

  uint32_t heaped = vocabulary;
  double total = 0, sum = 0;
  const uint32_t count = cut(sampler, logits, &heaped, &total);
  const flap_philox stream = flap_philox_stream(options->seed, "sample");
  const double drawn = (double)flap_philox_below(&stream, index, (uint64_t)1 << DRAW_BITS) * 0x1p-53 * total;
  for (uint32_t rank = 0; rank < count; rank++) {
    const uint32_t next = ranked(sampler, logits, &heaped, rank);
    if (sampler->probabilities[next] == 0)
      break; /* so are all behind it; roundings may lead here, chance must not */
    token = next;
    sum += sampler->probabilities[token];
    if (sum > drawn)
      break;
  }
  *token_out = (int32_t)token;
  return FLAP_OK;
}
