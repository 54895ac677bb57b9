/* Chooses the next token from logits: temperature, top-k, top-p.
 *
 * Folder-private, but for tests. The same seed, logits and options give the same token on every machine.
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
  double *probabilities; /* (vocabulary), scratch */
} flap_sampler;

/* Bytes that open takes from an arena, and opening. */
uint64_t flap_sampler_measure(uint32_t vocabulary);
void flap_sampler_open(flap_sampler *sampler, const flap_sample_options *options, uint32_t vocabulary,
                       flap_arena *arena);

/* The token number `index` (from 0) of the generation. Temperature 0: the largest logit, the first of equals. Otherwise
 * softmax of logits / temperature in fp64 over the top_k largest, cut to the smallest set of likeliest tokens whose
 * share reaches top_p; drawn with element `index` of the Philox stream (seed, "sample"). Ties keep the order of ids.
 * FLAP_NUMERIC if a logit is not finite. */
FLAP_CHECKED flap_status flap_sampler_next(flap_sampler *sampler, const float *logits, uint64_t index,
                                           int32_t *token_out);

#ifdef __cplusplus
}
#endif
#endif
