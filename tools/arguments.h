/* Subcommands of `flap` and their arguments. */
#ifndef FLAP_TOOLS_ARGUMENTS_H
#define FLAP_TOOLS_ARGUMENTS_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_EXIT_ERROR 1
/* By a second SIGINT or SIGTERM, and where the first leaves nothing to take up again. */
#define FLAP_EXIT_INTERRUPTED 130

typedef struct flap_command {
  const char *name;
  const char *usage;   /* what follows the name: "<run.yaml> [key=value ...]" */
  const char *summary; /* one line */
  const char *details; /* paragraphs for --help; may be NULL */
  /* argv[0] is the subcommand's name. FLAP_INTERRUPTED is no error: main exits with FLAP_EXIT_INTERRUPTED. */
  flap_status (*run)(const struct flap_command *command, int argc, char **argv);
} flap_command;

typedef enum flap_option_kind {
  FLAP_OPTION_FLAG, /* bool */
  FLAP_OPTION_TEXT, /* const char * */
  FLAP_OPTION_U32,
  FLAP_OPTION_U64,
  FLAP_OPTION_NUMBER, /* double, finite */
  FLAP_OPTION_BYTES   /* uint64_t, with a unit */
} flap_option_kind;

typedef struct flap_option {
  const char *name; /* "--json" */
  char letter;      /* 'o' for "-o"; 0 for none */
  flap_option_kind kind;
  void *value_out; /* keeps its content when the option is not given */
  const char *help;
} flap_option;

/* Sorts argv into options and others; `rest` has room for argc entries. Options may stand anywhere, as --name value or
 * --name=value; after "--" nothing is one. FLAP_INVALID names the argument, with the nearest option. With --help or -h
 * the text was printed and *help_out is true: the command has nothing left to do. */
FLAP_CHECKED flap_status flap_arguments_parse(const flap_command *command, const flap_option *options,
                                              size_t option_count, int argc, char **argv, const char **rest,
                                              size_t *rest_count_out, bool *help_out);
/* "<text>; see flap <name> --help" as FLAP_INVALID. */
flap_status flap_arguments_error(const flap_command *command, const char *format, ...) FLAP_PRINTF(2, 3);

/* FLAP_INVALID unless `path`, which `option` gives, ends in `ending` (".bin"): what is written there replaces what is
 * there, and a slip must not cost somebody's text. */
FLAP_CHECKED flap_status flap_arguments_check_ending(const flap_command *command, const char *option, const char *path,
                                                     const char *ending);

/* FLAP_INVALID if `path`, which `option` gives, is there already, unless that is wanted (`force`). */
FLAP_CHECKED flap_status flap_arguments_check_new(const char *option, const char *path, bool force);

/* argv[0] of the program, for commands that are printed to be typed again. */
const char *flap_program_name(void);

extern const flap_command flap_command_train, flap_command_plan, flap_command_sample, flap_command_eval,
    flap_command_export, flap_command_inspect, flap_command_tokenize, flap_command_bench;

#ifdef __cplusplus
}
#endif
#endif
