/* Quoting and escaping of JSON strings. */
#include "io/formats/json_escape.h"

#include <stdio.h>

#define ESCAPED_BYTES_MAX 6u /* "\u001f" */

size_t flap_json_escape(const char *text, char *out, size_t out_bytes) {
  size_t used = 0;
  if (out_bytes < 3)
    return 0;
  out[used++] = '"';
  for (const unsigned char *at = (const unsigned char *)text; *at; at++) {
    if (out_bytes - used < ESCAPED_BYTES_MAX + 2)
      return 0;
    if (*at == '"' || *at == '\\') {
      out[used++] = '\\';
      out[used++] = (char)*at;
    } else if (*at < 0x20 || *at == 0x7f) {
      used += (size_t)snprintf(out + used, out_bytes - used, "\\u%04x", *at);
    } else {
      out[used++] = (char)*at;
    }
  }
  out[used++] = '"';
  out[used] = '\0';
  return used;
}
