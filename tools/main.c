/* The `flap` program: finds the subcommand, runs it, and turns its status into an exit status.
 *
 * Exit status: 0 for success, 1 for an error (one line "flap: error: ..." on stderr), 130 when interrupted: at once, or
 * with nothing to take up again. A training run that stops and saves as asked is a success.
 */
#include "base/log.h"
#include "base/nearest.h"
#include "base/status.h"
#include "tools/arguments.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const flap_command *const commands[] = {
    &flap_command_train,  &flap_command_plan,    &flap_command_sample,   &flap_command_eval,
    &flap_command_export, &flap_command_inspect, &flap_command_tokenize, &flap_command_bench,
};
#define COMMANDS (sizeof commands / sizeof commands[0])

static const char *program_name = "flap";

const char *flap_program_name(void) {
  return program_name;
}

static void print_help(void) {
  puts("usage: flap <subcommand> ...\n\n"
       "Trains language models that are far larger than the memory of the device, by paging through RAM and disk.\n");
  for (size_t i = 0; i < COMMANDS; i++)
    printf("  %-10s %s\n", commands[i]->name, commands[i]->summary);
  puts("\n`flap <subcommand> --help` tells more, `flap train --help-config` lists all keys of run.yaml.\n"
       "Exit status: 0 success (also of a run that was stopped gracefully), 1 error, 130 stopped at once.");
}

static flap_status unknown_command(const char *name) {
  const char *names[COMMANDS];
  for (size_t i = 0; i < COMMANDS; i++)
    names[i] = commands[i]->name;
  const char *nearest = flap_nearest_word(name, names, COMMANDS);
  if (nearest)
    return flap_error_set(FLAP_INVALID, "unknown subcommand %.64s; did you mean flap %s?", name, nearest);
  return flap_error_set(FLAP_INVALID, "unknown subcommand %.64s; flap --help lists them", name);
}

static const flap_command *find_command(const char *name) {
  for (size_t i = 0; i < COMMANDS; i++)
    if (strcmp(name, commands[i]->name) == 0)
      return commands[i];
  return NULL;
}

/* `flap help train` is `flap train --help`. */
static flap_status help(int argc, char **argv) {
  static char option[] = "--help";
  if (argc <= 2) {
    print_help();
    return FLAP_OK;
  }
  const flap_command *command = find_command(argv[2]);
  return command != NULL ? command->run(command, 2, (char *[]){argv[2], option, NULL}) : unknown_command(argv[2]);
}

static flap_status run(int argc, char **argv) {
  if (argc < 2)
    return flap_error_set(FLAP_INVALID, "no subcommand; flap --help lists them");
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0)
    return help(argc, argv);
  if (strcmp(argv[1], "--version") == 0) {
    puts("flap " FLAP_VERSION);
    return FLAP_OK;
  }
  const flap_command *command = find_command(argv[1]);
  return command != NULL ? command->run(command, argc - 1, argv + 1) : unknown_command(argv[1]);
}

/* Where the caller closed one of the first three descriptors, the next file that is opened would get its number, and
 * what is printed would be written into it. Opened the wrong way round, so that using it is an error as before. */
static void occupy_standard_descriptors(void) {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
      _exit(FLAP_EXIT_ERROR);
}

int main(int argc, char **argv) {
  occupy_standard_descriptors();
  if (argc > 0)
    program_name = argv[0];
  /* A file that reaches `ulimit -f` is then an error of write, which is cleaned up after and told, and not the end. */
  (void)signal(SIGXFSZ, SIG_IGN);
  flap_log_check_environment();
  flap_status status = run(argc, argv);
  if ((fflush(stdout) != 0 || ferror(stdout)) && status == FLAP_OK)
    status = flap_error_set(FLAP_IO, "standard output cannot be written");
  if (status == FLAP_OK)
    return EXIT_SUCCESS;
  if (status == FLAP_INTERRUPTED)
    return FLAP_EXIT_INTERRUPTED;
  const char *message = flap_error_message();
  fprintf(stderr, "flap: error: %s\n", message[0] ? message : flap_status_name(status));
  return FLAP_EXIT_ERROR;
}
