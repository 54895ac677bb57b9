/* Documents to tokens, with bounded memory: a window of the file, and the longest line of a .jsonl. */
#include "io/formats/dataset_internal.h"

#include "base/system.h"
#include "io/formats/json_file.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINE_BYTES_MAX ((uint64_t)256 << 20)

typedef struct context {
  const flap_dataset_file *file;
  const flap_dataset_config *config;
  flap_tokenizer *tokenizer;
  flap_shard_sink *sink;
  unsigned first_flags; /* of a document's first piece */
  int fd;
  char *buffer; /* what was read and not yet used */
  uint64_t capacity, count;
  bool at_end;
  flap_ids ids;
} context;

static flap_status reserve(context *c, uint64_t bytes) {
  if (bytes <= c->capacity)
    return FLAP_OK;
  char *grown = realloc(c->buffer, bytes);
  if (grown == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for %llu bytes of text", c->file->path,
                          (unsigned long long)bytes);
  c->buffer = grown;
  c->capacity = bytes;
  return FLAP_OK;
}

/* Reads until the buffer holds `bytes`, or the file ends. */
static flap_status fill(context *c, uint64_t bytes) {
  FLAP_TRY(reserve(c, bytes));
  while (c->count < bytes && !c->at_end) {
    ssize_t got = flap_system_read(c->fd, c->buffer + c->count, bytes - c->count);
    if (got < 0)
      return flap_error_set_os(errno, "%s: reading text", c->file->path);
    c->at_end = got == 0;
    c->count += (uint64_t)got;
  }
  return FLAP_OK;
}

static void drop(context *c, uint64_t bytes) {
  memmove(c->buffer, c->buffer + bytes, c->count - bytes);
  c->count -= bytes;
}

static flap_status put_piece(context *c, const char *text, uint64_t bytes, bool is_first) {
  FLAP_TRY(flap_dataset_go_on(c->config));
  c->ids.count = 0;
  flap_status status = flap_tokenizer_encode(c->tokenizer, text, bytes,
                                             is_first ? c->first_flags : (unsigned)FLAP_TOKENIZER_CONTINUE, &c->ids);
  if (status != FLAP_OK)
    return flap_error_prefix(status, "%s", c->file->path);
  return flap_shard_put(c->sink, c->ids.ids, c->ids.count);
}

static flap_status put_end(context *c) {
  int32_t end = flap_tokenizer_end(c->tokenizer);
  return flap_shard_put(c->sink, &end, 1);
}

static flap_status tokenize_text(context *c) {
  bool is_first = true;
  for (;;) {
    /* One byte more than the window tells whether the window is the end. */
    FLAP_TRY(fill(c, FLAP_TOKENIZER_WINDOW_BYTES + 1));
    if (c->count == 0)
      break;
    bool last = c->count <= FLAP_TOKENIZER_WINDOW_BYTES;
    uint64_t window = last ? c->count : FLAP_TOKENIZER_WINDOW_BYTES;
    uint64_t bytes = flap_tokenizer_cut(c->tokenizer, c->buffer, window, FLAP_TOKENIZER_PIECE_BYTES, last);
    FLAP_TRY(put_piece(c, c->buffer, bytes, is_first));
    drop(c, bytes);
    is_first = false;
  }
  return is_first ? FLAP_OK : put_end(c);
}

static flap_status put_document(context *c, const char *text, uint64_t bytes) {
  if (bytes == 0)
    return FLAP_OK;
  for (uint64_t at = 0; at < bytes;) {
    bool last = bytes - at <= FLAP_TOKENIZER_WINDOW_BYTES;
    uint64_t window = last ? bytes - at : FLAP_TOKENIZER_WINDOW_BYTES;
    uint64_t count = flap_tokenizer_cut(c->tokenizer, text + at, window, FLAP_TOKENIZER_PIECE_BYTES, last);
    FLAP_TRY(put_piece(c, text + at, count, at == 0));
    at += count;
  }
  return put_end(c);
}

static bool is_blank(const char *line, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; i++)
    if (line[i] != ' ' && line[i] != '\t' && line[i] != '\r')
      return false;
  return true;
}

static flap_status check_weight(const context *c, const char *line, uint64_t bytes, uint64_t number) {
  char place[32];
  (void)snprintf(place, sizeof place, "line %llu", (unsigned long long)number);
  const flap_status status = flap_json_check_weight(place, line, bytes);
  return status == FLAP_OK ? FLAP_OK : flap_error_prefix(status, "%s", c->file->path);
}

static flap_status put_line(context *c, const char *line, uint64_t bytes, uint64_t number) {
  if (is_blank(line, bytes))
    return FLAP_OK;
  FLAP_TRY(check_weight(c, line, bytes, number));
  json_error_t error;
  /* Integers as doubles: of the other keys only the syntax matters, not the size of their numbers. */
  json_t *object = flap_json_parse(line, bytes, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &error);
  if (object == NULL && flap_json_no_memory())
    return flap_error_set(FLAP_NO_MEMORY, "%s:%llu: no memory for the line", c->file->path, (unsigned long long)number);
  if (object == NULL)
    return flap_error_set(FLAP_INVALID, "%s:%llu: not a line of JSON: %s%s", c->file->path, (unsigned long long)number,
                          error.text, flap_json_hint(error.text));
  const json_t *text = json_object_get(object, "text"); /* NULL too if it is no object */
  flap_status status;
  if (!json_is_object(object))
    status = flap_error_set(FLAP_INVALID, "%s:%llu: the line must be a JSON object with a string \"text\"",
                            c->file->path, (unsigned long long)number);
  else if (!json_is_string(text))
    status = flap_error_set(FLAP_INVALID, "%s:%llu: %s", c->file->path, (unsigned long long)number,
                            text == NULL ? "the object has no \"text\"" : "\"text\" must be a string");
  else
    status = put_document(c, json_string_value(text), json_string_length(text));
  json_decref(object);
  return status;
}

static flap_status tokenize_jsonl(context *c) {
  uint64_t number = 0, want = (uint64_t)1 << 20, used = 0, searched = 0;
  for (;;) {
    FLAP_TRY(fill(c, want));
    if (number == 0 && used == 0 && c->count >= 3 && memcmp(c->buffer, "\xef\xbb\xbf", 3) == 0)
      used = searched = 3; /* a byte order mark */
    const char *newline;
    while ((newline = memchr(c->buffer + searched, '\n', c->count - searched)) != NULL) {
      uint64_t end = (uint64_t)(newline - c->buffer);
      FLAP_TRY(put_line(c, c->buffer + used, end - used, ++number));
      used = searched = end + 1;
    }
    if (c->at_end)
      return put_line(c, c->buffer + used, c->count - used, ++number);
    drop(c, used);
    searched = c->count;
    used = 0;
    if (c->count == want) { /* a line that is longer than the buffer */
      if (want >= LINE_BYTES_MAX)
        return flap_error_set(FLAP_UNSUPPORTED, "%s:%llu: the line is longer than %llu MiB", c->file->path,
                              (unsigned long long)number + 1, (unsigned long long)(LINE_BYTES_MAX >> 20));
      want *= 2;
    }
  }
}

flap_status flap_dataset_tokenize(const flap_dataset_file *file, const flap_dataset_config *config,
                                  flap_shard_sink *sink) {
  context c = {.file = file,
               .config = config,
               .tokenizer = config->tokenizer,
               .sink = sink,
               .first_flags = config->begin_tokens ? FLAP_TOKENIZER_BEGIN : 0};
  c.fd = flap_system_open(file->path, O_RDONLY | O_CLOEXEC, 0);
  if (c.fd < 0)
    return flap_error_set_os(errno, "dataset: %s", file->path);
  flap_status status = file->kind == FLAP_DATA_TEXT ? tokenize_text(&c) : tokenize_jsonl(&c);
  (void)flap_system_close(c.fd);
  free(c.buffer);
  flap_ids_free(&c.ids);
  return status;
}
