/* Figures as short texts, to be used within one expression: printf("%s", flap_text_bytes(n).text). */
#ifndef FLAP_TOOLS_TEXT_H
#define FLAP_TOOLS_TEXT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_text {
  char text[32];
} flap_text;

flap_text flap_text_bytes(uint64_t bytes);   /* "7.00 MiB" */
flap_text flap_text_count(uint64_t count);   /* "5.36 M" */
flap_text flap_text_seconds(double seconds); /* "4m 07s"; "-" when not finite or negative */
flap_text flap_text_grouped(uint64_t value); /* "1,234,567" */
flap_text flap_text_ratio(double numerator, double denominator, int decimals); /* "-" when the denominator is 0 */
flap_text flap_text_percent(double numerator, double denominator);             /* "87%" */
flap_text flap_text_share(double numerator, double denominator);               /* "0.0042%": two digits */
flap_text flap_text_rate(double per_second);                                   /* "12.3k": tokens per second */

/* `text` as a word for a shell, quoted if it needs to be. */
void flap_text_print_word(FILE *out, const char *text);

#ifdef __cplusplus
}
#endif
#endif
