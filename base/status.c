/* Status codes and the thread-local error record. */
#include "base/status.h"

#include "base/assert.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define RECORD_BYTES 1024

static _Thread_local char record[RECORD_BYTES];

const char *flap_status_name(flap_status status) {
  static const char *const names[FLAP_STATUS_COUNT] = {
      [FLAP_OK] = "ok",
      [FLAP_INVALID] = "invalid",
      [FLAP_NOT_FOUND] = "not found",
      [FLAP_BUDGET] = "over budget",
      [FLAP_NO_MEMORY] = "no memory",
      [FLAP_NO_SPACE] = "no space",
      [FLAP_IO] = "input/output error",
      [FLAP_CORRUPT] = "corrupt",
      [FLAP_UNSUPPORTED] = "unsupported",
      [FLAP_DEVICE] = "device error",
      [FLAP_NUMERIC] = "not finite",
      [FLAP_INTERRUPTED] = "interrupted",
      [FLAP_CLOSED] = "closed",
  };
  if ((unsigned)status >= FLAP_STATUS_COUNT)
    return "unknown status";
  return names[status];
}

/* What a file says may be in a message, and reaches a terminal: control characters become question marks, also those
 * that take two bytes in UTF-8 (U+0080 to U+009F). */
static void make_printable(char *text) {
  for (; *text != '\0'; text++) {
    const unsigned char byte = (unsigned char)text[0], next = (unsigned char)text[1];
    if (byte == 0xc2 && next >= 0x80 && next < 0xa0)
      text[0] = text[1] = '?';
    else if (byte < 0x20 || byte == 0x7f)
      *text = '?';
  }
}

/* The arguments may point into the record itself, so the text is made beside it and then copied. */
static void record_replace(const char *format, va_list arguments) {
  char text[RECORD_BYTES];
  (void)vsnprintf(text, sizeof text, format, arguments);
  make_printable(text);
  memcpy(record, text, sizeof record);
}

static void record_append(const char *text) {
  size_t used = strlen(record);
  (void)snprintf(record + used, sizeof record - used, "%s", text);
}

flap_status flap_error_set(flap_status status, const char *format, ...) {
  flap_assert(status != FLAP_OK);
  va_list arguments;
  va_start(arguments, format);
  record_replace(format, arguments);
  va_end(arguments);
  return status;
}

static flap_status status_from_os(int os_error) {
  switch (os_error) {
  case ENOENT:
    return FLAP_NOT_FOUND;
  case ENOSPC:
  case EDQUOT:
    return FLAP_NO_SPACE;
  case ENOMEM:
    return FLAP_NO_MEMORY;
  default:
    return FLAP_IO;
  }
}

flap_status flap_error_set_os(int os_error, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_replace(format, arguments);
  va_end(arguments);
  char buffer[128];
  record_append(": ");
  record_append(strerror_r(os_error, buffer, sizeof buffer));
  if (os_error == EMFILE)
    record_append(" (raise the limit: ulimit -n)");
  return status_from_os(os_error);
}

flap_status flap_error_prefix(flap_status status, const char *format, ...) {
  flap_assert(status != FLAP_OK);
  char before[RECORD_BYTES];
  memcpy(before, record, sizeof before);
  va_list arguments;
  va_start(arguments, format);
  record_replace(format, arguments);
  va_end(arguments);
  if (before[0] != '\0') {
    record_append(": ");
    record_append(before);
  }
  return status;
}

const char *flap_error_message(void) {
  return record;
}

void flap_error_clear(void) {
  record[0] = '\0';
}
