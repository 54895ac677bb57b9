/* JSON text made by hand where jansson's allocations are not wanted: metrics and traces. Folder-private. */
#ifndef FLAP_FORMATS_JSON_ESCAPE_H
#define FLAP_FORMATS_JSON_ESCAPE_H

#include <stddef.h>

/* Writes `text` with quotes and escapes, and a NUL, into `out`. Returns the length without the NUL, or 0 if it does not
 * fit. Bytes past 127 are copied: `text` is UTF-8. */
size_t flap_json_escape(const char *text, char *out, size_t out_bytes);

#endif
