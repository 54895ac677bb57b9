/* Lines for people: formatted on the stack, written by one call. */
#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINE_BYTES 2048
#define LEVEL_UNSET (-1)

static atomic_int level_now = LEVEL_UNSET;

static bool read_environment(const char *wanted, int *level_out) {
  static const char *const names[] = {"debug", "info", "warning", "error"};
  *level_out = FLAP_LOG_INFO;
  for (int i = 0; wanted != NULL && i < 4; i++)
    if (strcmp(wanted, names[i]) == 0)
      *level_out = i;
  return wanted == NULL || wanted[0] == '\0' || strcmp(wanted, names[*level_out]) == 0;
}

static int level_from_environment(void) {
  int level;
  (void)read_environment(getenv("FLAP_LOG"), &level);
  return level;
}

void flap_log_check_environment(void) {
  int level;
  if (!read_environment(getenv("FLAP_LOG"), &level))
    flap_log(FLAP_LOG_WARNING, "FLAP_LOG is none of debug, info, warning and error: taken as info");
}

static int level_get(void) {
  int level = atomic_load(&level_now);
  if (level != LEVEL_UNSET)
    return level;
  /* Two threads may both look: they read the same environment. A level set meanwhile wins. */
  int unset = LEVEL_UNSET;
  (void)atomic_compare_exchange_strong(&level_now, &unset, level_from_environment());
  return atomic_load(&level_now);
}

void flap_log_set_level(flap_log_level level) {
  atomic_store(&level_now, (int)level);
}

void flap_log(flap_log_level level, const char *format, ...) {
  static const char *const prefixes[] = {"flap: debug: ", "", "flap: warning: ", "flap: error: "};
  if ((int)level < level_get())
    return;
  char line[LINE_BYTES];
  size_t used = (size_t)snprintf(line, sizeof line, "%s", prefixes[level]);
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line + used, sizeof line - used, format, arguments);
  va_end(arguments);
  if (length < 0)
    return;
  used += (size_t)length;
  if (used > sizeof line - 2) {
    used = sizeof line - 2;
    memcpy(line + used - 3, "...", 3);
  }
  line[used++] = '\n';
  /* stderr has no buffer, so what others print there keeps its order with this. A line that cannot be written is lost:
   * there is nowhere left to say so. */
  ssize_t written = write(STDERR_FILENO, line, used);
  (void)written;
}
