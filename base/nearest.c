#include "base/nearest.h"

#include <ctype.h>
#include <stdint.h>
#include <string.h>

#define WORD_MAX 64u

static int fold(char c) {
  return c == '-' ? '_' : tolower((unsigned char)c);
}

/* V. I. Levenshtein, "Binary codes capable of correcting deletions, insertions, and reversals" (1966), by rows. */
size_t flap_nearest_distance(const char *a, const char *b) {
  size_t columns = strlen(b);
  if (strlen(a) > WORD_MAX || columns > WORD_MAX)
    return SIZE_MAX;
  size_t row[WORD_MAX + 1];
  for (size_t j = 0; j <= columns; j++)
    row[j] = j;
  for (size_t i = 0; a[i]; i++) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < columns; j++) {
      size_t replaced = diagonal + (fold(a[i]) != fold(b[j]));
      diagonal = row[j + 1];
      size_t shorter = row[j] < diagonal ? row[j] : diagonal;
      row[j + 1] = replaced < shorter + 1 ? replaced : shorter + 1;
    }
  }
  return row[columns];
}

const char *flap_nearest_word(const char *word, const char *const *words, size_t count) {
  const char *best = NULL;
  size_t best_distance = SIZE_MAX;
  for (size_t i = 0; i < count; i++) {
    size_t distance = flap_nearest_distance(word, words[i]);
    if (distance < best_distance) {
      best_distance = distance;
      best = words[i];
    }
  }
  /* Half of the letters may be wrong in a short word, fewer in a long one; beyond that a suggestion only misleads. */
  size_t length = strlen(word);
  size_t allowed = length < 4 ? length / 2 + (length == 1) : length < 12 ? length / 2 : 2 + length / 3;
  return best_distance <= allowed ? best : NULL;
}
