/* The word that somebody probably meant. */
#ifndef FLAP_BASE_NEAREST_H
#define FLAP_BASE_NEAREST_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Edit distance (Levenshtein) of words of up to 64 bytes, blind to case and to - against _; SIZE_MAX for longer ones.
 */
size_t flap_nearest_distance(const char *a, const char *b);

/* Of `count` words, the one nearest to `word` (the first of several), or NULL when none is near enough to be meant. */
const char *flap_nearest_word(const char *word, const char *const *words, size_t count);

#ifdef __cplusplus
}
#endif
#endif
