#include "io/formats/tokenizer_split.h"

#include "base/assert.h"
#include "io/formats/tokenizer_utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATTERN_BYTES_MAX 4096u
#define JIT_STACK_BYTES_MAX (8u << 20)
#define MATCH_LIMIT 200000000u

/* Unicode's White_Space, as the inside of a character class. PCRE2's own \s also has U+180E. */
#define SPACES \
  "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"

struct flap_split {
  char pattern[FLAP_UTF8_SHOWN_BYTES]; /* its start, for messages */
  pcre2_code *code;
  pcre2_match_data *match;
  pcre2_match_context *context;
  pcre2_jit_stack *stack;
  bool removed, invert;
};

/* ---- from Oniguruma's syntax to PCRE2's ---------------------------------------------------------------- */

typedef struct translation {
  const char *at; /* the rest of the pattern */
  bool at_start;
  bool in_class;
  char out[8 * PATTERN_BYTES_MAX];
  size_t out_bytes;
  const char *problem; /* what is refused */
} translation;

static void put(translation *t, const char *text, size_t bytes) {
  if (bytes > sizeof t->out - 1 - t->out_bytes) {
    t->problem = "it is too long";
    return;
  }
  memcpy(t->out + t->out_bytes, text, bytes);
  t->out_bytes += bytes;
  t->out[t->out_bytes] = '\0';
}

static void put_text(translation *t, const char *text) {
  put(t, text, strlen(text));
}

/* \p{...}: names of more than two letters are scripts, which PCRE2 would take with their extensions. */
static void translate_property(translation *t) {
  const char *name = t->at + 2;
  if (*name != '{') {
    t->problem = "\\p needs a name in braces";
    return;
  }
  name++;
  bool negated = *name == '^';
  name += negated;
  size_t length = strcspn(name, "}");
  if (name[length] == '\0' || length == 0) {
    t->problem = "\\p{ is not closed";
    return;
  }
  for (size_t i = 0; i < length; i++) {
    if (!isalpha((unsigned char)name[i]) && name[i] != '_') {
      t->problem = "of \\p only general categories and scripts are understood";
      return;
    }
  }
  bool positive = (t->at[1] == 'p') != negated;
  put_text(t, positive ? "\\p{" : "\\P{");
  if (length > 2 && strncmp(name, "Any", length) != 0)
    put_text(t, "sc:");
  put(t, name, length);
  put_text(t, "}");
  t->at = name + length + 1;
}

/* \xHH, \x{H...}, \uHHHH: a code point. `digits` is where its digits start. */
static void translate_code(translation *t, const char *digits, int count) {
  bool braced = *digits == '{';
  digits += braced;
  char text[16];
  int length = 0;
  while (length < (braced ? 6 : count) && isxdigit((unsigned char)digits[length])) {
    text[length] = digits[length];
    length++;
  }
  text[length] = '\0';
  unsigned long code = strtoul(text, NULL, 16);
  if (length == 0 || (braced && digits[length] != '}') || (!braced && count == 4 && length != 4)) {
    t->problem = "a character number is malformed";
    return;
  }
  if (!braced && count == 2 && code >= 0x80) {
    t->problem = "\\x past 7f is a byte, not a character";
    return;
  }
  char out[24];
  (void)snprintf(out, sizeof out, "\\x{%lx}", code);
  put_text(t, out);
  t->at = digits + length + braced;
}

static void translate_escape(translation *t) {
  char kind = t->at[1];
  switch (kind) {
  case 's':
    put_text(t, t->in_class ? SPACES : "[" SPACES "]");
    t->at += 2;
    return;
  case 'S':
    if (t->in_class) {
      t->problem = "\\S in a class";
      return;
    }
    put_text(t, "[^" SPACES "]");
    t->at += 2;
    return;
  case 'v':
    put_text(t, "\\x{b}");
    t->at += 2;
    return;
  case 'p':
  case 'P':
    translate_property(t);
    return;
  case 'x':
    translate_code(t, t->at + 2, 2);
    return;
  case 'u':
    translate_code(t, t->at + 2, 4);
    return;
  default:
    break;
  }
  /* Letters and digits have meanings of their own; these are the ones that both libraries share. */
  if (kind == '\0' || (isalnum((unsigned char)kind) && strchr("dDrntfae", kind) == NULL)) {
    t->problem = "an escape that is not understood";
    return;
  }
  put(t, t->at, 2);
  t->at += 2;
}

static void translate_in_class(translation *t) {
  char c = *t->at;
  if (c == '[' || (c == '&' && t->at[1] == '&')) {
    t->problem = "classes in classes";
    return;
  }
  put(t, t->at, 1);
  t->at++;
  if (c == ']')
    t->in_class = false;
}

static void translate_group(translation *t) {
  static const char *const known[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
    size_t length = strlen(known[i]);
    if (strncmp(t->at, known[i], length) == 0) {
      put(t, t->at, length);
      t->at += length;
      return;
    }
  }
  /* In the middle of a pattern (?i) groups differently in the two libraries. */
  if (strncmp(t->at, "(?i)", 4) == 0 && t->at_start) {
    put(t, t->at, 4);
    t->at += 4;
    return;
  }
  if (t->at[1] == '?' || t->at[1] == '*') {
    t->problem = "a group of a kind that is not understood";
    return;
  }
  put(t, t->at, 1);
  t->at++;
}

static void translate(translation *t, const char *pattern) {
  t->at = pattern;
  while (*t->at != '\0' && t->problem == NULL) {
    char c = *t->at;
    t->at_start = t->at == pattern;
    if (c == '\\') {
      translate_escape(t);
    } else if (t->in_class) {
      translate_in_class(t);
    } else if (c == '[') {
      size_t length = t->at[1] == '^' ? 2 : 1;
      if (t->at[length] == ']') {
        t->problem = "an empty class";
        break;
      }
      put(t, t->at, length);
      t->at += length;
      t->in_class = true;
    } else if (c == '(') {
      translate_group(t);
    } else if ((c == '}' && t->at[1] == '+') || (c == '{' && t->at[1] == ',')) {
      t->problem = "}+ and {,n}, which the two libraries read differently";
    } else {
      put(t, t->at, 1);
      t->at++;
    }
  }
  if (t->problem == NULL && t->in_class)
    t->problem = "a class that is not closed";
}

static void quote(translation *t, const char *text) {
  for (; *text != '\0' && t->problem == NULL; text++) {
    if (ispunct((unsigned char)*text))
      put(t, "\\", 1);
    put(t, text, 1);
  }
}

/* ---- opening ------------------------------------------------------------------------------------------- */

static flap_status compile(flap_split *split, const flap_split_options *options, const translation *t) {
  pcre2_compile_context *compile_context = pcre2_compile_context_create(NULL);
  if (compile_context == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a pattern", options->file);
  /* In Oniguruma ^ and $ are about lines, and a line ends with a line feed. */
  (void)pcre2_set_newline(compile_context, PCRE2_NEWLINE_LF);
  (void)pcre2_set_parens_nest_limit(compile_context, 100);
  int error = 0;
  PCRE2_SIZE at = 0;
  split->code =
      pcre2_compile((PCRE2_SPTR)t->out, t->out_bytes, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                    &error, &at, compile_context);
  pcre2_compile_context_free(compile_context);
  if (split->code == NULL) {
    PCRE2_UCHAR message[128] = "";
    (void)pcre2_get_error_message(error, message, sizeof message);
    return flap_error_set(FLAP_UNSUPPORTED, "%s: pre_tokenizer: pattern \"%s\" is not understood: %s", options->file,
                          split->pattern, (const char *)message);
  }
  (void)pcre2_jit_compile(split->code, PCRE2_JIT_COMPLETE); /* without it matching is slower, nothing else */
  split->match = pcre2_match_data_create_from_pattern(split->code, NULL);
  split->context = pcre2_match_context_create(NULL);
  split->stack = pcre2_jit_stack_create(64 << 10, JIT_STACK_BYTES_MAX, NULL);
  if (split->match == NULL || split->context == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a pattern", options->file);
  if (split->stack != NULL)
    pcre2_jit_stack_assign(split->context, NULL, split->stack);
  (void)pcre2_set_match_limit(split->context, MATCH_LIMIT);
  return FLAP_OK;
}

flap_status flap_split_open(const flap_split_options *options, flap_split **split_out) {
  *split_out = NULL;
  flap_split *split = calloc(1, sizeof *split);
  translation *t = calloc(1, sizeof *t);
  flap_status status = FLAP_OK;
  if (split == NULL || t == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "%s: no memory for a pattern", options->file);
    goto fail;
  }
  (void)flap_utf8_show(options->pattern, split->pattern);
  if (strlen(options->pattern) > PATTERN_BYTES_MAX)
    t->problem = "it is too long";
  else if (options->literal)
    quote(t, options->pattern);
  else
    translate(t, options->pattern);
  if (t->problem != NULL) {
    status = flap_error_set(FLAP_UNSUPPORTED, "%s: pre_tokenizer: pattern \"%s\" is not supported: %s", options->file,
                            split->pattern, t->problem);
    goto fail;
  }
  split->removed = options->removed;
  split->invert = options->invert;
  FLAP_TRY_GOTO(status, compile(split, options, t));
  free(t);
  *split_out = split;
  return FLAP_OK;
fail:
  free(t);
  flap_split_close(split);
  return status;
}

void flap_split_close(flap_split *split) {
  if (split == NULL)
    return;
  pcre2_code_free(split->code);
  pcre2_match_data_free(split->match);
  pcre2_match_context_free(split->context);
  pcre2_jit_stack_free(split->stack);
  free(split);
}

/* ---- pieces -------------------------------------------------------------------------------------------- */

void flap_split_start(flap_split_cursor *cursor, const char *text, uint64_t bytes) {
  *cursor = (flap_split_cursor){.text = text, .bytes = bytes, .match_end = UINT64_MAX};
}

/* The next match at or after cursor->search. An empty match right after another one does not count. */
static flap_status find_match(flap_split *split, flap_split_cursor *cursor, bool *found_out, uint64_t *start_out,
                              uint64_t *end_out) {
  *found_out = false;
  while (cursor->search <= cursor->bytes) {
    int result = pcre2_match(split->code, (PCRE2_SPTR)cursor->text, cursor->bytes, cursor->search, PCRE2_NO_UTF_CHECK,
                             split->match, split->context);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT)
      result = pcre2_match(split->code, (PCRE2_SPTR)cursor->text, cursor->bytes, cursor->search,
                           PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, split->match, split->context);
    if (result == PCRE2_ERROR_NOMATCH)
      return FLAP_OK;
    if (result < 0) {
      PCRE2_UCHAR message[128] = "";
      (void)pcre2_get_error_message(result, message, sizeof message);
      return flap_error_set(FLAP_INVALID, "tokenizer: pattern \"%s\" gave up on a text of %llu bytes: %s",
                            split->pattern, (unsigned long long)cursor->bytes, (const char *)message);
    }
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(split->match);
    uint64_t start = ends[0], end = ends[1];
    flap_assert(start <= end && end <= cursor->bytes && start >= cursor->search);
    bool counts = start != end || end != cursor->match_end;
    cursor->search = end;
    if (start == end) {
      uint32_t code;
      unsigned length = flap_utf8_decode(cursor->text + end, cursor->bytes - end, &code);
      cursor->search = length > 0 ? end + length : cursor->bytes + 1;
    }
    if (counts) {
      cursor->match_end = end;
      *found_out = true;
      *start_out = start;
      *end_out = end;
      return FLAP_OK;
    }
  }
  return FLAP_OK;
}

static bool emit(const flap_split *split, flap_split_cursor *cursor, uint64_t start, uint64_t end, bool is_match) {
  if (start == end || (split->removed && is_match != split->invert))
    return false;
  cursor->piece = cursor->text + start;
  cursor->piece_bytes = end - start;
  return true;
}

flap_status flap_split_next(flap_split *split, flap_split_cursor *cursor) {
  cursor->piece_bytes = 0;
  for (;;) {
    if (cursor->held_bytes > 0) {
      uint64_t start = cursor->held_at, end = start + cursor->held_bytes;
      cursor->held_bytes = 0;
      if (emit(split, cursor, start, end, true))
        return FLAP_OK;
    }
    if (cursor->ended)
      return FLAP_OK;
    bool found;
    uint64_t start = cursor->bytes, end = cursor->bytes;
    FLAP_TRY(find_match(split, cursor, &found, &start, &end));
    cursor->ended = !found;
    cursor->held_at = start;
    cursor->held_bytes = end - start;
    uint64_t before = cursor->emitted;
    cursor->emitted = end;
    if (emit(split, cursor, before, start, false))
      return FLAP_OK;
  }
}
