/* The table of configuration keys: name, kind, place in flap_run_config, meaning.
 *
 * Role: the one list that reading, the nearest-key search and `flap train --help-config` share. A key is a row
 * of the table in config_keys.c and a member of flap_run_config (engine/run_config.h), whose default and range are in
 * engine/run_config.c. Keys whose value needs more than a place to be stored have a setter in config_set.c.
 */
#ifndef FLAP_TOOLS_CONFIG_KEYS_H
#define FLAP_TOOLS_CONFIG_KEYS_H

#include "base/status.h"
#include "engine/run_config.h"
#include "tools/yaml_tree.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_config_kind {
  FLAP_CONFIG_U32,
  FLAP_CONFIG_U64,
  FLAP_CONFIG_NUMBER, /* double */
  FLAP_CONFIG_BOOL,
  FLAP_CONFIG_PATH,  /* char[FLAP_PATH_MAX] */
  FLAP_CONFIG_WORD,  /* one of `words`, stored in an enum */
  FLAP_CONFIG_SIZE,  /* flap_size */
  FLAP_CONFIG_BYTES, /* uint64_t, a size with a unit */
  FLAP_CONFIG_CUSTOM /* `set` does it */
} flap_config_kind;

typedef struct flap_config_word {
  const char *text;
  int value;
} flap_config_word;

/* What is set, and where it came from. */
typedef struct flap_config_reader {
  flap_run_config *config;
  const char *file;   /* NULL: the command line */
  uint32_t lines[96]; /* by index in the table: the line that set the key last; FLAP_CONFIG_UNSET, or 0: command line */
  uint64_t eval_steps; /* as given, and the strategy that may overrule it */
  bool eval_no, eval_by_steps;
  bool recompute; /* gradient_checkpointing: true */
} flap_config_reader;
#define FLAP_CONFIG_UNSET UINT32_MAX

typedef struct flap_config_key flap_config_key;
struct flap_config_key {
  const char *name; /* dotted for keys of `expert` */
  flap_config_kind kind;
  size_t offset;                 /* in flap_run_config */
  const flap_config_word *words; /* ends with a NULL text */
  /* Custom keys: stores `value` (never null), or the default when it is NULL. */
  flap_status (*set)(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);
  const char *wanted;   /* what a value looks like, for custom keys: "a path, or a list of paths" */
  const char *fallback; /* the default as text, for custom keys */
  const char *help;
};

/* All keys, in the order of the reference; `index` counts from 0; NULL past the end. */
const flap_config_key *flap_config_key_at(size_t index);
/* SIZE_MAX when there is none. */
size_t flap_config_key_find(const char *name);
/* The nearest key, or NULL. With a prefix ("expert."), among the keys that start with it. */
const char *flap_config_key_nearest(const char *name, const char *prefix);

/* The words of a key as "linear|cosine". Returned. */
char *flap_config_words(const flap_config_word *words, const char *separator, char *buffer, size_t buffer_bytes);

/* The reference of all keys: kind, default and meaning, in 100 columns. */
void flap_config_print_reference(FILE *out);

/* Setters of custom keys (config_set.c). */
flap_status flap_config_set_dataset(flap_config_reader *reader, const flap_config_key *key,
                                    const flap_yaml_node *value);
flap_status flap_config_set_disk(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);
flap_status flap_config_set_model(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);
flap_status flap_config_set_optim(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);
flap_status flap_config_set_report_to(flap_config_reader *reader, const flap_config_key *key,
                                      const flap_yaml_node *value);
flap_status flap_config_set_packing(flap_config_reader *reader, const flap_config_key *key,
                                    const flap_yaml_node *value);
flap_status flap_config_set_template(flap_config_reader *reader, const flap_config_key *key,
                                     const flap_yaml_node *value);
flap_status flap_config_set_max_steps(flap_config_reader *reader, const flap_config_key *key,
                                      const flap_yaml_node *value);
flap_status flap_config_set_eval(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);
flap_status flap_config_set_ssd_budget(flap_config_reader *reader, const flap_config_key *key,
                                       const flap_yaml_node *value);
flap_status flap_config_set_resume(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);
flap_status flap_config_set_checkpointing(flap_config_reader *reader, const flap_config_key *key,
                                          const flap_yaml_node *value);

/* "file:line: key: " and the text, as FLAP_INVALID (or `status`); on the command line, "command line: key: ". */
flap_status flap_config_error(const flap_config_reader *reader, flap_status status, const flap_yaml_node *at,
                              const char *key, const char *format, ...) FLAP_PRINTF(5, 6);
/* "...: key: found X; wanted <kind>". */
flap_status flap_config_error_type(const flap_config_reader *reader, const flap_yaml_node *at,
                                   const flap_config_key *key);
/* Stores a value of a kind that needs no setter; NULL stores the default. */
flap_status flap_config_set_plain(flap_config_reader *reader, const flap_config_key *key, const flap_yaml_node *value);

#ifdef __cplusplus
}
#endif
#endif
