/* Ids to text. A run of byte tokens is held back until it ends: the library makes text of it if all of it is UTF-8, and
 * otherwise U+FFFD of each of its bytes. */
#include "io/formats/tokenizer_internal.h"

#include "base/assert.h"
#include "io/formats/tokenizer_utf8.h"

#include <stdlib.h>
#include <string.h>

#define REPLACEMENT "\xef\xbf\xbd"

void flap_tokenizer_stream_open(const flap_tokenizer *tokenizer, flap_tokenizer_stream *stream) {
  *stream = (flap_tokenizer_stream){.tokenizer = tokenizer};
  if (tokenizer->metaspace != NULL)
    stream->strip_spaces = tokenizer->metaspace->decoder.strip_spaces;
}

void flap_tokenizer_stream_close(flap_tokenizer_stream *stream) {
  free(stream->text);
  free(stream->run);
  *stream = (flap_tokenizer_stream){0};
}

static flap_status reserve(char **memory, uint64_t *max, uint64_t bytes) {
  if (bytes <= *max)
    return FLAP_OK;
  uint64_t count = bytes < 256 ? 256 : 2 * bytes;
  char *grown = realloc(*memory, count);
  if (grown == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for %llu bytes of text", (unsigned long long)count);
  *memory = grown;
  *max = count;
  return FLAP_OK;
}

/* What the run of byte tokens is, at the start of the text to return; there must be room for `more` behind it. */
static flap_status end_run(flap_tokenizer_stream *stream, uint64_t more, uint64_t *bytes_out) {
  const uint64_t bytes = stream->run_bytes, mark = strlen(REPLACEMENT);
  FLAP_TRY(reserve(&stream->text, &stream->text_max, bytes * mark + more));
  stream->run_bytes = 0;
  if (bytes > 0 && flap_utf8_valid(stream->run, bytes) == bytes) {
    memcpy(stream->text, stream->run, bytes);
    *bytes_out = bytes;
    return FLAP_OK;
  }
  for (uint64_t i = 0; i < bytes; i++)
    memcpy(stream->text + i * mark, REPLACEMENT, mark);
  *bytes_out = bytes * mark;
  return FLAP_OK;
}

static void give(flap_tokenizer_stream *stream, uint64_t bytes, const char **text_out, uint64_t *bytes_out) {
  const char *text = bytes > 0 ? stream->text : "";
  for (; bytes > 0 && stream->strip_spaces > 0 && *text == ' '; text++, bytes--)
    stream->strip_spaces--;
  if (bytes > 0)
    stream->strip_spaces = 0;
  *text_out = text;
  *bytes_out = bytes;
}

flap_status flap_tokenizer_stream_put(flap_tokenizer_stream *stream, int32_t id, const char **text_out,
                                      uint64_t *bytes_out) {
  const flap_tokenizer *tokenizer = stream->tokenizer;
  *text_out = "";
  *bytes_out = 0;
  if (id < 0 || (uint32_t)id >= tokenizer->id_count || tokenizer->tokens[id].raw == NULL)
    return FLAP_OK;
  const flap_token *token = &tokenizer->tokens[id];
  if (tokenizer->metaspace == NULL) {
    *text_out = token->bytes;
    *bytes_out = token->byte_count;
    return FLAP_OK;
  }
  /* Behind the room for the run, where the token's own text will be if it ends it. */
  uint64_t before = 0, held = stream->run_bytes * strlen(REPLACEMENT);
  uint32_t spelt;
  const char *spelling = flap_tokenizer_spelling(tokenizer, id, &spelt);
  FLAP_TRY(reserve(&stream->text, &stream->text_max, held + spelt));
  uint64_t count = flap_metaspace_decode(tokenizer->metaspace, spelling, spelt, !stream->begun, stream->text + held);
  int byte = tokenizer->metaspace->decoder.byte_fallback ? flap_metaspace_byte(stream->text + held, count) : -1;
  if (byte >= 0) {
    FLAP_TRY(reserve(&stream->run, &stream->run_max, stream->run_bytes + 1));
    stream->run[stream->run_bytes++] = (char)byte;
    stream->begun = true;
    return FLAP_OK;
  }
  FLAP_TRY(end_run(stream, spelt, &before));
  memmove(stream->text + before, stream->text + held, count);
  stream->begun = true;
  give(stream, before + count, text_out, bytes_out);
  return FLAP_OK;
}

flap_status flap_tokenizer_stream_end(flap_tokenizer_stream *stream, const char **text_out, uint64_t *bytes_out) {
  uint64_t bytes = 0;
  *text_out = "";
  *bytes_out = 0;
  FLAP_TRY(end_run(stream, 0, &bytes));
  give(stream, bytes, text_out, bytes_out);
  return FLAP_OK;
}
