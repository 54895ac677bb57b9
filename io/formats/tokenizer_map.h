/* A map from byte strings to ids. Folder-private. The strings belong to the caller and must outlive the map. */
#ifndef FLAP_IO_FORMATS_TOKENIZER_MAP_H
#define FLAP_IO_FORMATS_TOKENIZER_MAP_H

#include "base/status.h"

#include <stdint.h>

typedef struct flap_text_entry {
  const char *text; /* NULL: empty slot */
  uint32_t bytes;
  int32_t id;
} flap_text_entry;

typedef struct flap_text_map {
  flap_text_entry *entries;
  uint64_t slots; /* a power of two, at least twice the count */
  uint64_t count;
} flap_text_map;

/* Room for `count_max` strings. */
FLAP_CHECKED flap_status flap_text_map_open(flap_text_map *map, uint64_t count_max);
void flap_text_map_close(flap_text_map *map);

/* Returns the id that the string has now: `id`, or an earlier one, which stays. */
int32_t flap_text_map_put(flap_text_map *map, const char *text, uint32_t bytes, int32_t id);
/* -1 if it is not there. */
int32_t flap_text_map_get(const flap_text_map *map, const char *text, uint32_t bytes);

/* A hash of bytes, used by the map and by the word cache. */
uint64_t flap_text_hash(const char *text, uint64_t bytes);

#endif
