/* Chooses the next token from logits: temperature, top-k, top-p.
 *
 * Folder-private, but for tests. The same seed, logits and options give the same token on every machine: all arithmetic
 * is fp64 without functions of the system's library, in an order that only the logits decide.
 */
#ifndef FLAP_ENGINE_SAMPLER_H
#define FLAP_ENGINE_SAMPLER_H

#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_sampler {
  const flap_sample_options *options;
  uint32_t vocabulary;
  uint32_t *order;       /* (vocabulary), scratch */
  double *probabilities; /* (vocabulary), scratch: shares before they are divided by their sum */
} flap_sampler;

/* Bytes that open takes from an arena, and opening. The options stay the caller's and must live as long; that
 * temperature is 0 or more and top_p between 0 and 1 has been checked before. With a measuring arena only sizes are
 * counted. */
uint64_t flap_sampler_measure(uint32_t vocabulary);
void flap_sampler_open(flap_sampler *sampler, const flap_sample_options *options, uint32_t vocabulary,
                       flap_arena *arena);

/* The token number `index` (from 0) of the generation, from logits (vocabulary). Temperature 0: the largest logit, the
 * first of equals. Otherwise softmax of logits / temperature in fp64 over the top_k likeliest, cut to the smallest set
 * of the likeliest whose share of those reaches top_p (at least one token); drawn, likeliest first, with element
 * `index` of the Philox stream (seed, "sample"). Among equals the smaller id counts as the likelier. FLAP_NUMERIC names
 * the first logit that is not finite. */
FLAP_CHECKED flap_status flap_sampler_next(flap_sampler *sampler, const float *logits, uint64_t index,
                                           int32_t *token_out);

#ifdef __cplusplus
}
#endif
#endif
