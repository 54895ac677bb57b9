/* Unicode normalization form C (UAX #15). Folder-private. */
#ifndef FLAP_IO_FORMATS_TOKENIZER_NFC_H
#define FLAP_IO_FORMATS_TOKENIZER_NFC_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

/* Scratch that is kept between calls; start with {0}. */
typedef struct flap_nfc {
  char *text;
  uint64_t text_bytes, text_bytes_max;
  uint32_t *codes, *sorted;
  uint64_t count, count_max;
} flap_nfc;

void flap_nfc_close(flap_nfc *nfc);

/* Whether no character of the text could change: then NFC is the text itself. Valid UTF-8 only, here and below. */
bool flap_nfc_is_stable(const char *text, uint64_t bytes);

/* The normalized text lies in `nfc` until the next call. */
FLAP_CHECKED flap_status flap_nfc_apply(flap_nfc *nfc, const char *text, uint64_t bytes, const char **text_out,
                                        uint64_t *bytes_out);

#endif
