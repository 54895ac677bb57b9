#include "tools/arguments.h"

#include "base/nearest.h"
#include "base/units.h"
#include "tools/config_keys.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OPTIONS_MAX 32u

flap_status flap_arguments_error(const flap_command *command, const char *format, ...) {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  (void)vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return flap_error_set(FLAP_INVALID, "%s; see flap %s --help", text, command->name);
}

flap_status flap_arguments_check_ending(const flap_command *command, const char *option, const char *path,
                                        const char *ending) {
  const size_t length = strlen(path), ending_length = strlen(ending);
  if (length > ending_length && strcmp(path + length - ending_length, ending) == 0)
    return FLAP_OK;
  return flap_arguments_error(command, "%s: %.200s must end in %s", option, path, ending);
}

flap_status flap_arguments_check_new(const char *option, const char *path, bool force) {
  if (force || access(path, F_OK) != 0)
    return FLAP_OK;
  return flap_error_set(FLAP_INVALID, "%s: %.3000s is there already: remove it, name another, or give --force", option,
                        path);
}

static void print_help(const flap_command *command, const flap_option *options, size_t count) {
  static const char *const placeholders[] = {"", " TEXT", " N", " N", " X", " SIZE"};
  printf("usage: flap %s %s\n\n%s\n", command->name, command->usage, command->summary);
  if (command->details)
    printf("\n%s\n", command->details);
  puts("\noptions:");
  for (size_t i = 0; i < count; i++) {
    char left[64];
    if (options[i].letter)
      (void)snprintf(left, sizeof left, "-%c, %s%s", options[i].letter, options[i].name, placeholders[options[i].kind]);
    else
      (void)snprintf(left, sizeof left, "%s%s", options[i].name, placeholders[options[i].kind]);
    printf("  %-24s %s\n", left, options[i].help);
  }
  printf("  %-24s %s\n", "-h, --help", "This text.");
}

static const flap_option *find(const flap_option *options, size_t count, const char *argument, size_t name_bytes) {
  for (size_t i = 0; i < count; i++) {
    bool whole = strlen(options[i].name) == name_bytes && strncmp(options[i].name, argument, name_bytes) == 0;
    bool letter = options[i].letter && name_bytes == 2 && argument[0] == '-' && argument[1] == options[i].letter;
    if (whole || letter)
      return &options[i];
  }
  return NULL;
}

/* A key of run.yaml that was written as an option: "--max-steps" is max_steps. */
static bool is_key(const flap_command *command, const char *name, char key_out[64]) {
  if (strstr(command->usage, "key=value") == NULL || strncmp(name, "--", 2) != 0)
    return false;
  (void)snprintf(key_out, 64, "%s", name + 2);
  for (char *at = key_out; *at != '\0'; at++)
    *at = *at == '-' ? '_' : *at;
  return flap_config_key_find(key_out) != SIZE_MAX;
}

/* `next` may be its value. */
static flap_status unknown(const flap_command *command, const flap_option *options, size_t count, const char *argument,
                           size_t name_bytes, const char *next) {
  const char *names[OPTIONS_MAX + 1];
  char name[64], key[64];
  for (size_t i = 0; i < count; i++)
    names[i] = options[i].name;
  names[count] = "--help";
  (void)snprintf(name, sizeof name, "%.*s", (int)name_bytes, argument);
  if (is_key(command, name, key)) {
    const char *value = argument[name_bytes] == '=' ? argument + name_bytes + 1 : next;
    return flap_arguments_error(command, "unknown option %s: keys are written %s=%.100s", name, key,
                                value != NULL && strncmp(value, "--", 2) != 0 ? value : "...");
  }
  const char *nearest = flap_nearest_word(name, names, count + 1);
  return nearest ? flap_arguments_error(command, "unknown option %s (did you mean %s?)", name, nearest)
                 : flap_arguments_error(command, "unknown option %s", name);
}

static flap_status parse_integer(const flap_command *command, const flap_option *option, const char *text,
                                 uint64_t max) {
  char *end = NULL;
  errno = 0;
  unsigned long long value = strtoull(text, &end, 10);
  if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || value > max)
    return flap_arguments_error(command, "%s: %.64s is not a whole number of at most %llu", option->name, text,
                                (unsigned long long)max);
  if (option->kind == FLAP_OPTION_U32)
    *(uint32_t *)option->value_out = (uint32_t)value;
  else
    *(uint64_t *)option->value_out = value;
  return FLAP_OK;
}

static flap_status store(const flap_command *command, const flap_option *option, const char *text) {
  char *end = NULL;
  switch (option->kind) {
  case FLAP_OPTION_U32:
    return parse_integer(command, option, text, UINT32_MAX);
  case FLAP_OPTION_U64:
    return parse_integer(command, option, text, UINT64_MAX);
  case FLAP_OPTION_NUMBER: {
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(value))
      return flap_arguments_error(command, "%s: %.64s is not a number", option->name, text);
    *(double *)option->value_out = value;
    return FLAP_OK;
  }
  case FLAP_OPTION_BYTES:
    if (flap_units_parse_bytes(text, option->value_out) != FLAP_OK)
      return flap_error_prefix(FLAP_INVALID, "%s", option->name);
    return FLAP_OK;
  default:
    *(const char **)option->value_out = text;
    return FLAP_OK;
  }
}

flap_status flap_arguments_parse(const flap_command *command, const flap_option *options, size_t option_count, int argc,
                                 char **argv, const char **rest, size_t *rest_count_out, bool *help_out) {
  bool ended = false;
  *rest_count_out = 0;
  *help_out = false;
  for (int i = 1; i < argc; i++) {
    const char *argument = argv[i];
    if (ended || argument[0] != '-' || argument[1] == '\0') {
      rest[(*rest_count_out)++] = argument;
      continue;
    }
    if (strcmp(argument, "--") == 0) {
      ended = true;
      continue;
    }
    if (strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0) {
      print_help(command, options, option_count);
      *help_out = true;
      return FLAP_OK;
    }
    const char *equals = argument[1] == '-' ? strchr(argument, '=') : NULL;
    size_t name_bytes = equals ? (size_t)(equals - argument) : strlen(argument);
    const flap_option *option = find(options, option_count, argument, name_bytes);
    if (!option)
      return unknown(command, options, option_count, argument, name_bytes, i + 1 < argc ? argv[i + 1] : NULL);
    if (option->kind == FLAP_OPTION_FLAG) {
      if (equals)
        return flap_arguments_error(command, "%s takes no value", option->name);
      *(bool *)option->value_out = true;
      continue;
    }
    if (!equals && i + 1 == argc)
      return flap_arguments_error(command, "%s needs a value", option->name);
    FLAP_TRY(store(command, option, equals ? equals + 1 : argv[++i]));
  }
  return FLAP_OK;
}
