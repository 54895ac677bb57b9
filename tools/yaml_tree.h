/* A YAML document as a small tree whose nodes know their line.
 *
 * Role: the part of YAML that configurations need: mappings, sequences and scalars, in block or flow style. Anchors,
 * aliases and tags are refused (so a few lines cannot grow into gigabytes), and so are repeated keys, a second
 * document, and what is deeper, longer or larger than the limits below. It knows no keys of FLAP.
 *
 * Threading: any; trees are independent.
 */
#ifndef FLAP_TOOLS_YAML_TREE_H
#define FLAP_TOOLS_YAML_TREE_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_YAML_BYTES_MAX ((size_t)1 << 20)
#define FLAP_YAML_NODES_MAX 20000u
#define FLAP_YAML_DEPTH_MAX 16u
#define FLAP_YAML_QUOTE_MAX 64u

typedef enum flap_yaml_kind { FLAP_YAML_SCALAR, FLAP_YAML_SEQUENCE, FLAP_YAML_MAPPING } flap_yaml_kind;

typedef struct flap_yaml_node {
  flap_yaml_kind kind;
  uint32_t line;                       /* from 1 */
  char *key;                           /* of this entry of a mapping; NULL elsewhere */
  char *text;                          /* of a scalar, without NUL bytes inside */
  bool plain;                          /* a scalar without quotes: null, true and 12 mean more than their letters */
  struct flap_yaml_node *first, *last; /* children, in order */
  struct flap_yaml_node *next;         /* sibling */
} flap_yaml_node;

/* Parses `bytes` bytes. `name` stands for the file in messages: "name:line: what is wrong". An empty document gives an
 * empty mapping. FLAP_INVALID, FLAP_NO_MEMORY. The caller frees with flap_yaml_free. */
FLAP_CHECKED flap_status flap_yaml_parse(const char *name, const char *text, size_t bytes, flap_yaml_node **root_out);
/* The same for a file. FLAP_NOT_FOUND and FLAP_IO name it. */
FLAP_CHECKED flap_status flap_yaml_load(const char *path, flap_yaml_node **root_out);
void flap_yaml_free(flap_yaml_node *node); /* with its siblings after it; NULL is fine */

/* A tree for "key=value" from a command line, where key may be "a.b.c": nested mappings with one entry each. A value
 * that starts with [ { " or ' is YAML; any other is a plain scalar as it stands. Lines are 0. */
FLAP_CHECKED flap_status flap_yaml_from_override(const char *text, flap_yaml_node **root_out);

/* What a plain scalar says. */
bool flap_yaml_is_null(const flap_yaml_node *node);                  /* null, ~, or nothing at all */
bool flap_yaml_is_bool(const flap_yaml_node *node, bool *value_out); /* true/false, yes/no, on/off */
/* Decimal digits, or a number in decimal or exponent form ("1e-4"); NaN, infinities and what overflows are neither. */
bool flap_yaml_is_integer(const flap_yaml_node *node, int64_t *value_out);
bool flap_yaml_is_number(const flap_yaml_node *node, double *value_out);

/* `text` for a message of one line: cut to FLAP_YAML_QUOTE_MAX bytes, control characters replaced. */
typedef struct flap_yaml_quote {
  char text[FLAP_YAML_QUOTE_MAX + 4];
} flap_yaml_quote;
const char *flap_yaml_quote_text(const char *text, flap_yaml_quote *quote);

#ifdef __cplusplus
}
#endif
#endif
