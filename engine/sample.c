/* flap_engine_sample: tokens one after the other, with a cache of keys and values; weights stream when they do not fit.
 */
#include "base/assert.h"
#include "engine/planner/prepare.h"
#include "engine/planner/pressure.h"
#include "engine/run/runtime.h"
#include "engine/sampler.h"
#include "engine/store/checkpoint.h"
#include "engine/store/weights.h"

#include <string.h>

#define PIECE_TOKENS_MAX 256u /* of the prompt, at a time */

typedef struct generation {
  const flap_sample_options *options;
  flap_prepared prepared;
  flap_runtime runtime;
  bool opened;
  flap_arena memory; /* of the sampler */
  flap_sampler sampler;
  flap_ids prompt;
  flap_tokenizer_stream stream;
  uint32_t new_tokens; /* at most */
  flap_sample_fn emit;
  void *context;
} generation;

/* An empty prompt begins as a document does: with the begin token, or behind the end of the one before. */
static flap_status encode_prompt(generation *g) {
  flap_tokenizer *tokenizer = g->prepared.tokenizer;
  const char *text = g->options->prompt;
  if (tokenizer == NULL) /* data that are tokens already need none, but a text does: why there is none is said here */
    FLAP_TRY(flap_tokenizer_open(g->prepared.config->model_name_or_path, &g->prepared.tokenizer));
  tokenizer = g->prepared.tokenizer;
  FLAP_TRY(flap_tokenizer_encode(tokenizer, text, strlen(text), FLAP_TOKENIZER_BEGIN, &g->prompt));
  if (g->prompt.count > 0)
    return FLAP_OK;
  FLAP_TRY(flap_tokenizer_encode(tokenizer, "", 0, FLAP_TOKENIZER_END, &g->prompt));
  if (g->prompt.count == 0 && flap_tokenizer_end(tokenizer) >= 0) {
    FLAP_TRY(flap_tokenizer_encode(tokenizer, "\n", 1, 0, &g->prompt));
    g->prompt.count = g->prompt.count > 0 ? 1 : 0;
    if (g->prompt.count > 0)
      g->prompt.ids[0] = flap_tokenizer_end(tokenizer);
  }
  return g->prompt.count > 0 ? FLAP_OK : flap_error_set(FLAP_INVALID, "--prompt: nothing to begin with: give a text");
}

static flap_status plan(generation *g) {
  const uint32_t most = g->prepared.model.max_position_embeddings;
  g->new_tokens = g->options->max_new_tokens;
  if (g->prompt.count >= most)
    return flap_error_set(FLAP_INVALID,
                          "--prompt: its %llu tokens leave no room for another in the model's max_position_embeddings "
                          "of %u: give a shorter one",
                          (unsigned long long)g->prompt.count, most);
  if (g->options->fewer_if_full && g->new_tokens > most - g->prompt.count)
    g->new_tokens = (uint32_t)(most - g->prompt.count);
  const uint64_t positions = g->prompt.count + g->new_tokens;
  if (positions > most)
    return flap_error_set(FLAP_INVALID,
                          "--max-new-tokens: %u after a prompt of %llu tokens are more than the model's "
                          "max_position_embeddings of %u",
                          g->new_tokens, (unsigned long long)g->prompt.count, most);
  const uint32_t piece = g->prompt.count < PIECE_TOKENS_MAX ? (uint32_t)g->prompt.count : PIECE_TOKENS_MAX;
  FLAP_TRY(flap_prepare_plan(&g->prepared, FLAP_MODE_SAMPLE, 1, piece, 1, (uint32_t)positions));
  return flap_pressure_check_here(&g->prepared);
}

static flap_status no_keys(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)offset;
  memset(memory, 0, bytes);
  return FLAP_OK;
}

static flap_status open_run(generation *g) {
  flap_runtime_config config = {.vram_bytes = g->prepared.budgets.vram_bytes};
  memcpy(config.disk_bytes, g->prepared.budgets.disk_bytes, sizeof config.disk_bytes);
  FLAP_TRY(flap_runtime_open(&g->prepared.setup, &config, &g->runtime));
  g->opened = true;
  const flap_layout *layout = &g->runtime.lists.layout;
  for (uint32_t i = 0; i < g->prepared.model.num_hidden_layers; i++)
    FLAP_TRY(flap_pager_fill(g->runtime.pager, flap_layout_cache(layout, i), no_keys, NULL));
  FLAP_TRY(flap_weights_load(g->runtime.pager, layout, g->prepared.config->model_name_or_path));
  const uint32_t known = flap_tokenizer_vocabulary(g->prepared.tokenizer);
  const uint32_t vocabulary = known < g->prepared.model.vocab_size ? known : g->prepared.model.vocab_size;
  FLAP_TRY(flap_arena_open(&g->memory, "sampler", flap_sampler_measure(vocabulary)));
  flap_sampler_open(&g->sampler, g->options, vocabulary, &g->memory);
  return FLAP_OK;
}

static flap_status decode(generation *g, const int32_t *tokens, uint32_t count, uint32_t position,
                          const float **logits_out) {
  flap_executor *x = &g->runtime.executor;
  const flap_executor_input input = {.tokens = tokens, .decode_tokens = count, .decode_position = position};
  flap_executor_result result;
  FLAP_TRY(flap_executor_begin(x, FLAP_SETUP_DECODE));
  FLAP_TRY(flap_executor_run(x, &input, &result));
  *logits_out = result.logits;
  return FLAP_OK;
}

static flap_status read_prompt(generation *g, const float **logits_out) {
  const uint32_t piece = g->runtime.spec.shape.sequence;
  for (uint64_t at = 0; at < g->prompt.count; at += piece) {
    const uint64_t left = g->prompt.count - at;
    FLAP_TRY(decode(g, g->prompt.ids + at, left < piece ? (uint32_t)left : piece, (uint32_t)at, logits_out));
  }
  return FLAP_OK;
}

/* The text goes on from the prompt's, which its first tokens may depend on; what the prompt holds back is not ours. */
static flap_status begin_text(generation *g) {
  const char *text;
  uint64_t bytes;
  flap_tokenizer_stream_open(g->prepared.tokenizer, &g->stream);
  for (uint64_t i = 0; i < g->prompt.count; i++)
    if (!flap_tokenizer_is_special(g->prepared.tokenizer, g->prompt.ids[i]))
      FLAP_TRY(flap_tokenizer_stream_put(&g->stream, g->prompt.ids[i], &text, &bytes));
  return flap_tokenizer_stream_end(&g->stream, &text, &bytes);
}

static flap_status generate(generation *g) {
  const float *logits = NULL;
  const char *text;
  uint64_t bytes;
  FLAP_TRY(begin_text(g));
  FLAP_TRY(read_prompt(g, &logits));
  for (uint32_t i = 0; i < g->new_tokens; i++) {
    int32_t token = 0;
    FLAP_TRY(flap_sampler_next(&g->sampler, logits, i, &token));
    if (token == flap_tokenizer_end(g->prepared.tokenizer))
      break;
    if (!flap_tokenizer_is_special(g->prepared.tokenizer, token)) {
      FLAP_TRY(flap_tokenizer_stream_put(&g->stream, token, &text, &bytes));
      FLAP_TRY(g->emit(g->context, text, bytes));
    }
    if (i + 1 < g->new_tokens)
      FLAP_TRY(decode(g, &token, 1, (uint32_t)g->prompt.count + i, &logits));
  }
  FLAP_TRY(flap_tokenizer_stream_end(&g->stream, &text, &bytes));
  if (bytes > 0)
    FLAP_TRY(g->emit(g->context, text, bytes));
  return flap_pager_settle(g->runtime.pager);
}

flap_status flap_engine_sample(const flap_run_config *config, const flap_sample_options *options, flap_sample_fn emit,
                               void *context) {
  generation g = {.options = options, .emit = emit, .context = context};
  flap_status status = FLAP_OK;
  if (strcmp(config->model_name_or_path, config->output_dir) == 0)
    FLAP_TRY(flap_checkpoint_check_model(config->output_dir));
  FLAP_TRY(flap_prepare_open(config, false, &g.prepared));
  FLAP_TRY_GOTO(status, encode_prompt(&g));
  FLAP_TRY_GOTO(status, plan(&g));
  FLAP_TRY_GOTO(status, open_run(&g));
  FLAP_TRY_GOTO(status, generate(&g));
fail:
  if (g.opened)
    flap_runtime_close(&g.runtime);
  flap_arena_close(&g.memory);
  flap_ids_free(&g.prompt);
  flap_tokenizer_stream_close(&g.stream);
  flap_prepare_close(&g.prepared);
  return status;
}
