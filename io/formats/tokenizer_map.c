/* Open addressing with linear probing; nothing is ever removed. */
#include "io/formats/tokenizer_map.h"

#include "base/assert.h"

#include <stdlib.h>
#include <string.h>

uint64_t flap_text_hash(const char *text, uint64_t bytes) {
  uint64_t hash = bytes * 0x9E3779B97F4A7C15ull;
  while (bytes >= 8) {
    uint64_t word;
    memcpy(&word, text, 8);
    hash = (hash ^ word) * 0xD6E8FEB86659FD93ull;
    hash ^= hash >> 32;
    text += 8;
    bytes -= 8;
  }
  uint64_t rest = 0;
  if (bytes > 0)
    memcpy(&rest, text, bytes);
  hash = (hash ^ rest) * 0xD6E8FEB86659FD93ull;
  hash ^= hash >> 32;
  hash *= 0xD6E8FEB86659FD93ull;
  return hash ^ hash >> 32;
}

flap_status flap_text_map_open(flap_text_map *map, uint64_t count_max) {
  flap_assert(count_max < (uint64_t)1 << 40);
  map->slots = 16;
  while (map->slots < 2 * count_max)
    map->slots *= 2;
  map->count = 0;
  map->entries = calloc(map->slots, sizeof *map->entries);
  if (map->entries == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for a map of %llu entries",
                          (unsigned long long)map->slots);
  return FLAP_OK;
}

void flap_text_map_close(flap_text_map *map) {
  free(map->entries);
  *map = (flap_text_map){0};
}

static flap_text_entry *find_slot(const flap_text_map *map, const char *text, uint32_t bytes) {
  uint64_t slot = flap_text_hash(text, bytes) & (map->slots - 1);
  for (;; slot = (slot + 1) & (map->slots - 1)) {
    flap_text_entry *entry = &map->entries[slot];
    if (entry->text == NULL || (entry->bytes == bytes && memcmp(entry->text, text, bytes) == 0))
      return entry;
  }
}

int32_t flap_text_map_put(flap_text_map *map, const char *text, uint32_t bytes, int32_t id) {
  flap_assert(id >= 0);
  flap_text_entry *entry = find_slot(map, text, bytes);
  if (entry->text == NULL) {
    flap_assert(map->count < map->slots / 2);
    map->count++;
    *entry = (flap_text_entry){.text = text, .bytes = bytes, .id = id};
  }
  return entry->id;
}

int32_t flap_text_map_get(const flap_text_map *map, const char *text, uint32_t bytes) {
  if (map->entries == NULL)
    return -1;
  const flap_text_entry *entry = find_slot(map, text, bytes);
  return entry->text == NULL ? -1 : entry->id;
}
