#include "tools/yaml_tree.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml.h>

/* ---- building ------------------------------------------------------------------------------------------- */

typedef struct builder {
  yaml_parser_t parser;
  yaml_event_t event; /* the one that was fetched last; deleted before the next fetch */
  bool has_event;
  const char *name;
  uint32_t nodes;
} builder;

void flap_yaml_free(flap_yaml_node *node) {
  while (node) {
    flap_yaml_node *next = node->next;
    flap_yaml_free(node->first); /* no deeper than FLAP_YAML_DEPTH_MAX */
    free(node->key);
    free(node->text);
    free(node);
    node = next;
  }
}

const char *flap_yaml_quote_text(const char *text, flap_yaml_quote *quote) {
  size_t length = strlen(text);
  size_t kept = length <= FLAP_YAML_QUOTE_MAX ? length : FLAP_YAML_QUOTE_MAX;
  while (kept < length && kept > 0 && ((unsigned char)text[kept] & 0xc0) == 0x80)
    kept--; /* not through the middle of a character */
  for (size_t i = 0; i < kept; i++)
    quote->text[i] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i];
  strcpy(quote->text + kept, kept < length ? "..." : "");
  return quote->text;
}

static uint32_t line_of(const yaml_mark_t *mark) {
  return (uint32_t)mark->line + 1;
}

static void drop_event(builder *b) {
  if (b->has_event)
    yaml_event_delete(&b->event);
  b->has_event = false;
}

static flap_status fetch(builder *b) {
  drop_event(b);
  if (yaml_parser_parse(&b->parser, &b->event)) {
    b->has_event = true;
    return FLAP_OK;
  }
  const yaml_parser_t *p = &b->parser;
  if (p->error == YAML_MEMORY_ERROR)
    return flap_error_set(FLAP_NO_MEMORY, "%s: not enough memory to read it", b->name);
  if (p->error == YAML_READER_ERROR)
    return flap_error_set(FLAP_INVALID, "%s: byte %zu: not text: %s", b->name, p->problem_offset,
                          p->problem ? p->problem : "unreadable");
  const char *problem = p->problem ? p->problem : "not YAML";
  if (p->context)
    return flap_error_set(FLAP_INVALID, "%s:%u: not YAML: %s %s", b->name, line_of(&p->problem_mark), problem,
                          p->context);
  return flap_error_set(FLAP_INVALID, "%s:%u: not YAML: %s", b->name, line_of(&p->problem_mark), problem);
}

static flap_status take_node(builder *b, flap_yaml_kind kind, flap_yaml_node **node_out) {
  uint32_t line = line_of(&b->event.start_mark);
  if (++b->nodes > FLAP_YAML_NODES_MAX)
    return flap_error_set(FLAP_INVALID, "%s:%u: more than %u values", b->name, line, FLAP_YAML_NODES_MAX);
  flap_yaml_node *node = calloc(1, sizeof *node);
  if (!node)
    return flap_error_set(FLAP_NO_MEMORY, "%s: not enough memory to read it", b->name);
  node->kind = kind;
  node->line = line;
  *node_out = node;
  return FLAP_OK;
}

static void append(flap_yaml_node *parent, flap_yaml_node *child) {
  if (parent->last)
    parent->last->next = child;
  else
    parent->first = child;
  parent->last = child;
}

static flap_status check_properties(builder *b, const yaml_char_t *anchor, const yaml_char_t *tag) {
  uint32_t line = line_of(&b->event.start_mark);
  if (anchor)
    return flap_error_set(FLAP_INVALID,
                          "%s:%u: anchors and aliases (& and *) are not supported: quote the text, or "
                          "write the value out",
                          b->name, line);
  if (tag)
    return flap_error_set(FLAP_INVALID, "%s:%u: tags (!) are not supported: quote the text, or leave the tag out",
                          b->name, line);
  return FLAP_OK;
}

/* The scalar of the present event as text of its own. */
static flap_status copy_scalar(builder *b, char **text_out) {
  const char *value = (const char *)b->event.data.scalar.value;
  size_t length = b->event.data.scalar.length;
  if (memchr(value, '\0', length))
    return flap_error_set(FLAP_INVALID, "%s:%u: a NUL byte in a value", b->name, line_of(&b->event.start_mark));
  *text_out = strndup(value, length);
  return *text_out ? FLAP_OK : flap_error_set(FLAP_NO_MEMORY, "%s: not enough memory to read it", b->name);
}

static flap_status build(builder *b, uint32_t depth, flap_yaml_node **node_out);

static flap_status build_sequence(builder *b, uint32_t depth, flap_yaml_node *sequence) {
  for (;;) {
    FLAP_TRY(fetch(b));
    if (b->event.type == YAML_SEQUENCE_END_EVENT)
      return FLAP_OK;
    flap_yaml_node *child = NULL;
    flap_status status = build(b, depth + 1, &child);
    if (child)
      append(sequence, child);
    FLAP_TRY(status);
  }
}

static flap_status build_mapping(builder *b, uint32_t depth, flap_yaml_node *mapping) {
  for (;;) {
    FLAP_TRY(fetch(b));
    if (b->event.type == YAML_MAPPING_END_EVENT)
      return FLAP_OK;
    uint32_t line = line_of(&b->event.start_mark);
    if (b->event.type == YAML_ALIAS_EVENT)
      return check_properties(b, b->event.data.alias.anchor, NULL);
    if (b->event.type != YAML_SCALAR_EVENT)
      return flap_error_set(FLAP_INVALID, "%s:%u: a key must be a word", b->name, line);
    FLAP_TRY(check_properties(b, b->event.data.scalar.anchor, b->event.data.scalar.tag));
    char *key = NULL;
    FLAP_TRY(copy_scalar(b, &key));
    flap_status status = FLAP_OK;
    for (const flap_yaml_node *other = mapping->first; other && status == FLAP_OK; other = other->next) {
      flap_yaml_quote quote;
      if (strcmp(other->key, key) == 0)
        status = flap_error_set(FLAP_INVALID, "%s:%u: %s: given twice (first on line %u)", b->name, line,
                                flap_yaml_quote_text(key, &quote), other->line);
    }
    flap_yaml_node *child = NULL;
    if (status == FLAP_OK)
      status = fetch(b);
    if (status == FLAP_OK)
      status = build(b, depth + 1, &child);
    if (!child) {
      free(key);
      return status;
    }
    child->key = key;
    child->line = line; /* the key's line is where a person looks */
    append(mapping, child);
    FLAP_TRY(status);
  }
}

/* The node of the present event. What was built is stored even on failure, so that the caller frees it. */
static flap_status build(builder *b, uint32_t depth, flap_yaml_node **node_out) {
  uint32_t line = line_of(&b->event.start_mark);
  if (depth > FLAP_YAML_DEPTH_MAX)
    return flap_error_set(FLAP_INVALID, "%s:%u: nested more than %u deep", b->name, line, FLAP_YAML_DEPTH_MAX);
  switch (b->event.type) {
  case YAML_SCALAR_EVENT:
    FLAP_TRY(check_properties(b, b->event.data.scalar.anchor, b->event.data.scalar.tag));
    FLAP_TRY(take_node(b, FLAP_YAML_SCALAR, node_out));
    (*node_out)->plain = b->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    return copy_scalar(b, &(*node_out)->text);
  case YAML_SEQUENCE_START_EVENT:
    FLAP_TRY(check_properties(b, b->event.data.sequence_start.anchor, b->event.data.sequence_start.tag));
    FLAP_TRY(take_node(b, FLAP_YAML_SEQUENCE, node_out));
    return build_sequence(b, depth, *node_out);
  case YAML_MAPPING_START_EVENT:
    FLAP_TRY(check_properties(b, b->event.data.mapping_start.anchor, b->event.data.mapping_start.tag));
    FLAP_TRY(take_node(b, FLAP_YAML_MAPPING, node_out));
    return build_mapping(b, depth, *node_out);
  case YAML_ALIAS_EVENT:
    return check_properties(b, b->event.data.alias.anchor, NULL);
  default:
    return flap_error_set(FLAP_INVALID, "%s:%u: not YAML", b->name, line);
  }
}

static flap_status build_document(builder *b, flap_yaml_node **root_out) {
  FLAP_TRY(fetch(b)); /* stream start */
  FLAP_TRY(fetch(b));
  if (b->event.type == YAML_STREAM_END_EVENT)
    return take_node(b, FLAP_YAML_MAPPING, root_out);
  FLAP_TRY(fetch(b)); /* after the document start */
  FLAP_TRY(build(b, 1, root_out));
  FLAP_TRY(fetch(b)); /* document end */
  FLAP_TRY(fetch(b));
  if (b->event.type != YAML_STREAM_END_EVENT)
    return flap_error_set(FLAP_INVALID, "%s:%u: a second document starts here: one is enough", b->name,
                          line_of(&b->event.start_mark));
  return FLAP_OK;
}

flap_status flap_yaml_parse(const char *name, const char *text, size_t bytes, flap_yaml_node **root_out) {
  *root_out = NULL;
  if (bytes > FLAP_YAML_BYTES_MAX)
    return flap_error_set(FLAP_INVALID, "%s: more than %zu bytes: not a configuration", name, FLAP_YAML_BYTES_MAX);
  builder b = {.name = name};
  if (!yaml_parser_initialize(&b.parser))
    return flap_error_set(FLAP_NO_MEMORY, "%s: not enough memory to read it", name);
  yaml_parser_set_input_string(&b.parser, (const unsigned char *)text, bytes);
  flap_status status = build_document(&b, root_out);
  drop_event(&b);
  yaml_parser_delete(&b.parser);
  if (status != FLAP_OK) {
    flap_yaml_free(*root_out);
    *root_out = NULL;
  }
  return status;
}

/* ---- files and overrides -------------------------------------------------------------------------------- */

static flap_status read_file(const char *path, char *text, size_t bytes_max, size_t *bytes_out) {
  /* A pipe without a writer must not hang in open, and one with a writer must be waited for in read. */
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0)
    return flap_error_set_os(errno, "%s: cannot open", path);
  (void)fcntl(fd, F_SETFL, 0);
  struct stat info;
  flap_status status = FLAP_OK;
  if (fstat(fd, &info) != 0)
    status = flap_error_set_os(errno, "%s: cannot read", path);
  else if (S_ISDIR(info.st_mode))
    status = flap_error_set(FLAP_INVALID, "%s: a folder, not a configuration file", path);
  *bytes_out = 0;
  while (status == FLAP_OK && *bytes_out < bytes_max) {
    ssize_t n = read(fd, text + *bytes_out, bytes_max - *bytes_out);
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      status = flap_error_set_os(errno, "%s: cannot read", path);
    if (n <= 0)
      break;
    *bytes_out += (size_t)n;
  }
  (void)close(fd);
  return status;
}

flap_status flap_yaml_load(const char *path, flap_yaml_node **root_out) {
  *root_out = NULL;
  char *text = malloc(FLAP_YAML_BYTES_MAX + 1); /* one more, to notice that a file is too large */
  if (!text)
    return flap_error_set(FLAP_NO_MEMORY, "%s: not enough memory to read it", path);
  size_t bytes = 0;
  flap_status status = read_file(path, text, FLAP_YAML_BYTES_MAX + 1, &bytes);
  if (status == FLAP_OK)
    status = flap_yaml_parse(path, text, bytes, root_out);
  free(text);
  return status;
}

static flap_yaml_node *new_node(flap_yaml_kind kind, const char *key, size_t key_bytes) {
  flap_yaml_node *node = calloc(1, sizeof *node);
  if (!node)
    return NULL;
  node->kind = kind;
  node->key = key ? strndup(key, key_bytes) : NULL;
  if (key && !node->key) {
    free(node);
    return NULL;
  }
  return node;
}

static void clear_lines(flap_yaml_node *node) {
  for (; node; node = node->next) {
    node->line = 0;
    clear_lines(node->first);
  }
}

/* The value's content goes into `node`, which keeps its key. */
static flap_status parse_value(const char *text, const char *value, flap_yaml_node *node) {
  if (value[0] == '\0' || !strchr("[{\"'", value[0])) {
    node->kind = FLAP_YAML_SCALAR;
    node->plain = true;
    node->text = strdup(value);
    return node->text ? FLAP_OK : flap_error_set(FLAP_NO_MEMORY, "not enough memory for %s", text);
  }
  flap_yaml_quote quote;
  flap_yaml_node *parsed = NULL;
  FLAP_TRY(flap_yaml_parse(flap_yaml_quote_text(text, &quote), value, strlen(value), &parsed));
  node->kind = parsed->kind;
  node->text = parsed->text;
  node->plain = parsed->plain;
  node->first = parsed->first;
  node->last = parsed->last;
  clear_lines(node->first);
  parsed->text = NULL;
  parsed->first = NULL;
  flap_yaml_free(parsed);
  return FLAP_OK;
}

flap_status flap_yaml_from_override(const char *text, flap_yaml_node **root_out) {
  *root_out = NULL;
  flap_yaml_quote quote;
  const char *equals = strchr(text, '=');
  if (!equals || equals == text)
    return flap_error_set(FLAP_INVALID, "%s: not an override: write key=value", flap_yaml_quote_text(text, &quote));
  flap_yaml_node *root = new_node(FLAP_YAML_MAPPING, NULL, 0);
  flap_yaml_node *parent = root;
  flap_status status = FLAP_OK;
  const char *key = text;
  for (uint32_t depth = 1; parent && status == FLAP_OK && key < equals; depth++) {
    const char *dot = memchr(key, '.', (size_t)(equals - key));
    const char *end = dot ? dot : equals;
    if (end == key || end + 1 == equals || depth >= FLAP_YAML_DEPTH_MAX) {
      status = flap_error_set(FLAP_INVALID, "%s: not a key: write key=value or outer.inner=value",
                              flap_yaml_quote_text(text, &quote));
      break;
    }
    flap_yaml_node *child = new_node(FLAP_YAML_MAPPING, key, (size_t)(end - key));
    if (child)
      append(parent, child);
    parent = child;
    key = end + 1;
    if (end == equals)
      break;
  }
  if (status == FLAP_OK && !parent)
    status = flap_error_set(FLAP_NO_MEMORY, "not enough memory for %s", flap_yaml_quote_text(text, &quote));
  if (status == FLAP_OK)
    status = parse_value(text, equals + 1, parent);
  if (status != FLAP_OK) {
    flap_yaml_free(root);
    return status;
  }
  *root_out = root;
  return FLAP_OK;
}

/* ---- scalars -------------------------------------------------------------------------------------------- */

static bool is_plain_scalar(const flap_yaml_node *node) {
  return node->kind == FLAP_YAML_SCALAR && node->plain;
}

bool flap_yaml_is_null(const flap_yaml_node *node) {
  return is_plain_scalar(node) &&
         (node->text[0] == '\0' || strcmp(node->text, "~") == 0 || strcmp(node->text, "null") == 0 ||
          strcmp(node->text, "Null") == 0 || strcmp(node->text, "NULL") == 0);
}

/* "true", "True" and "TRUE", as YAML has it; not "tRUE". */
static bool is_word(const char *text, const char *word) {
  if (strcasecmp(text, word) != 0)
    return false;
  bool rest_lower = true, rest_upper = true;
  for (size_t i = 1; text[i]; i++) {
    rest_lower = rest_lower && islower((unsigned char)text[i]);
    rest_upper = rest_upper && isupper((unsigned char)text[i]);
  }
  return rest_lower || (rest_upper && isupper((unsigned char)text[0]));
}

bool flap_yaml_is_bool(const flap_yaml_node *node, bool *value_out) {
  static const struct {
    const char *word;
    bool value;
  } words[] = {{"true", true}, {"false", false}, {"yes", true}, {"no", false}, {"on", true}, {"off", false}};
  if (!is_plain_scalar(node))
    return false;
  for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
    if (is_word(node->text, words[i].word)) {
      *value_out = words[i].value;
      return true;
    }
  return false;
}

/* sign? (digits [. digits?] | . digits) [e sign? digits]; `whole_out` when there are digits only. strtod alone would
 * take hexadecimal floats, "nan" and leading blanks too. */
static bool looks_like_number(const char *text, bool *whole_out) {
  const char *at = text + (*text == '+' || *text == '-');
  size_t before = strspn(at, "0123456789");
  at += before;
  *whole_out = before > 0 && *at == '\0';
  size_t after = 0;
  if (*at == '.') {
    after = strspn(at + 1, "0123456789");
    at += 1 + after;
  }
  if (before + after == 0)
    return false;
  if (*at == 'e' || *at == 'E') {
    at += 1 + (at[1] == '+' || at[1] == '-');
    size_t digits = strspn(at, "0123456789");
    if (digits == 0)
      return false;
    at += digits;
  }
  return *at == '\0';
}

bool flap_yaml_is_integer(const flap_yaml_node *node, int64_t *value_out) {
  bool whole = false;
  if (!is_plain_scalar(node) || !looks_like_number(node->text, &whole) || !whole)
    return false;
  errno = 0;
  long long value = strtoll(node->text, NULL, 10);
  if (errno != 0)
    return false;
  *value_out = value;
  return true;
}

bool flap_yaml_is_number(const flap_yaml_node *node, double *value_out) {
  bool whole = false;
  if (!is_plain_scalar(node) || !looks_like_number(node->text, &whole))
    return false;
  double value = strtod(node->text, NULL);
  if (!isfinite(value))
    return false;
  *value_out = value;
  return true;
}
