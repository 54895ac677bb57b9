#include "tools/text.h"

#include "base/units.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

flap_text flap_text_bytes(uint64_t bytes) {
  flap_text t;
  (void)flap_units_format_bytes(bytes, t.text, sizeof t.text);
  return t;
}

flap_text flap_text_count(uint64_t count) {
  flap_text t;
  (void)flap_units_format_count(count, t.text, sizeof t.text);
  return t;
}

flap_text flap_text_seconds(double seconds) {
  flap_text t = {"-"};
  if (isfinite(seconds) && seconds >= 0)
    (void)flap_units_format_seconds(seconds, t.text, sizeof t.text);
  return t;
}

flap_text flap_text_grouped(uint64_t value) {
  char digits[24];
  flap_text t;
  size_t length = (size_t)snprintf(digits, sizeof digits, "%llu", (unsigned long long)value);
  size_t used = 0;
  for (size_t i = 0; i < length; i++) {
    if (i > 0 && (length - i) % 3 == 0)
      t.text[used++] = ',';
    t.text[used++] = digits[i];
  }
  t.text[used] = '\0';
  return t;
}

flap_text flap_text_ratio(double numerator, double denominator, int decimals) {
  flap_text t = {"-"};
  if (denominator > 0 && isfinite(numerator / denominator))
    (void)snprintf(t.text, sizeof t.text, "%.*f", decimals, numerator / denominator);
  return t;
}

flap_text flap_text_percent(double numerator, double denominator) {
  flap_text t = {"-"};
  if (denominator > 0 && isfinite(numerator / denominator))
    (void)snprintf(t.text, sizeof t.text, "%.0f%%", 100 * numerator / denominator);
  return t;
}

flap_text flap_text_share(double numerator, double denominator) {
  flap_text t = {"-"};
  if (denominator > 0 && isfinite(numerator / denominator))
    (void)snprintf(t.text, sizeof t.text, 100 * numerator / denominator >= 99.5 ? "%.0f%%" : "%.2g%%",
                   100 * numerator / denominator);
  return t;
}

flap_text flap_text_rate(double per_second) {
  flap_text t = {"-"};
  if (!isfinite(per_second) || per_second < 0)
    return t;
  static const char *const units[] = {"", "k", "M", "G"};
  size_t unit = 0;
  while (per_second >= 999.5 && unit < 3) {
    per_second /= 1000;
    unit++;
  }
  int decimals = unit == 0 || per_second >= 99.95 ? 0 : per_second >= 9.995 ? 1 : 2;
  (void)snprintf(t.text, sizeof t.text, "%.*f%s", decimals, per_second, units[unit]);
  return t;
}

void flap_text_print_word(FILE *out, const char *text) {
  static const char safe[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=,:+@%";
  if (text[0] && text[strspn(text, safe)] == '\0') {
    fputs(text, out);
    return;
  }
  fputc('\'', out);
  for (; *text; text++) {
    if (*text == '\'')
      fputs("'\\''", out); /* close, an escaped quote, open again */
    else
      fputc(*text, out);
  }
  fputc('\'', out);
}
