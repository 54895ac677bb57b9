/* Invariants:
 *  1. symbols form a doubly linked list in text order; a symbol that was merged into its left neighbour has id -1;
 *  2. the heap may hold pairs that no longer exist; they are recognised when they come out;
 *  3. scratch grows with the longest word and is kept, so that steady encoding allocates nothing.
 */
#include "io/formats/bpe.h"

#include "base/assert.h"
#include "io/formats/tokenizer_map.h"

#include <stdlib.h>
#include <string.h>

#define CACHE_SLOTS 16384u /* one MiB */
#define CACHE_WORD_BYTES 30u
#define CACHE_IDS 8u
#define GROWTH_MAX ((uint64_t)1 << 18)

typedef struct merge {
  uint64_t pair; /* left << 32 | right; EMPTY if there is none */
  uint32_t rank;
  int32_t merged;
} merge;

#define EMPTY UINT64_MAX

typedef struct symbol {
  int32_t id;
  int32_t previous, next; /* -1 at the ends */
} symbol;

/* A waiting pair: rank << 32 | position of the left symbol, so that the smallest is the next one. */
typedef uint64_t candidate;

typedef struct cached_word {
  uint8_t bytes; /* 0: empty */
  uint8_t count;
  char word[CACHE_WORD_BYTES];
  int32_t ids[CACHE_IDS];
} cached_word;

struct flap_bpe {
  int32_t byte_ids[256];
  merge *merges;
  uint64_t merge_slots;
  uint64_t merge_count;
  int32_t *merged; /* by rank */
  uint64_t ranks, ranks_max;
  symbol *symbols;
  uint64_t symbols_max;
  candidate *heap;
  uint64_t heap_count, heap_max;
  cached_word *cache;
};

void flap_ids_free(flap_ids *ids) {
  free(ids->ids);
  *ids = (flap_ids){0};
}

flap_status flap_ids_reserve(flap_ids *ids, uint64_t count) {
  if (count <= ids->capacity - ids->count)
    return FLAP_OK;
  uint64_t capacity = ids->capacity < 256 ? 256 : ids->capacity;
  while (capacity - ids->count < count)
    capacity *= 2;
  int32_t *grown = realloc(ids->ids, capacity * sizeof *grown);
  if (grown == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for %llu ids", (unsigned long long)capacity);
  ids->ids = grown;
  ids->capacity = capacity;
  return FLAP_OK;
}

flap_status flap_bpe_open(uint64_t merges_max, flap_bpe **bpe_out) {
  flap_assert(merges_max <= UINT32_MAX);
  *bpe_out = NULL;
  flap_bpe *bpe = calloc(1, sizeof *bpe);
  if (bpe == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for the merges");
  for (int byte = 0; byte < 256; byte++)
    bpe->byte_ids[byte] = -1;
  bpe->merge_slots = 16;
  while (bpe->merge_slots < 2 * merges_max)
    bpe->merge_slots *= 2;
  bpe->merges = malloc(bpe->merge_slots * sizeof *bpe->merges);
  bpe->merged = malloc((merges_max + 1) * sizeof *bpe->merged);
  bpe->ranks_max = merges_max;
  bpe->cache = calloc(CACHE_SLOTS, sizeof *bpe->cache);
  if (bpe->merges == NULL || bpe->merged == NULL || bpe->cache == NULL) {
    flap_bpe_close(bpe);
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for %llu merges", (unsigned long long)merges_max);
  }
  for (uint64_t slot = 0; slot < bpe->merge_slots; slot++)
    bpe->merges[slot].pair = EMPTY;
  *bpe_out = bpe;
  return FLAP_OK;
}

void flap_bpe_close(flap_bpe *bpe) {
  if (bpe == NULL)
    return;
  free(bpe->merges);
  free(bpe->merged);
  free(bpe->symbols);
  free(bpe->heap);
  free(bpe->cache);
  free(bpe);
}

void flap_bpe_set_byte(flap_bpe *bpe, uint8_t byte, int32_t id) {
  bpe->byte_ids[byte] = id;
}

static merge *find_merge(const flap_bpe *bpe, int32_t left, int32_t right) {
  uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  uint64_t hash = pair * 0x9E3779B97F4A7C15ull;
  uint64_t slot = (hash ^ hash >> 32) & (bpe->merge_slots - 1);
  while (bpe->merges[slot].pair != pair && bpe->merges[slot].pair != EMPTY)
    slot = (slot + 1) & (bpe->merge_slots - 1);
  return &bpe->merges[slot];
}

void flap_bpe_put_merge(flap_bpe *bpe, int32_t left, int32_t right, int32_t merged) {
  flap_assert(left >= 0 && right >= 0 && merged >= 0 && bpe->ranks < bpe->ranks_max);
  uint32_t rank = (uint32_t)bpe->ranks++;
  bpe->merged[rank] = merged;
  merge *entry = find_merge(bpe, left, right);
  if (entry->pair == EMPTY) {
    flap_assert(bpe->merge_count < bpe->merge_slots / 2);
    bpe->merge_count++;
    entry->pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  }
  entry->rank = rank;
  entry->merged = merged;
}

/* ---- the heap: lowest rank first, then lowest position ------------------------------------------------- */

#define WAYS 4u /* children of a node: they share a cache line or two, and there are half as many levels as with 2 */

static void heap_push(flap_bpe *bpe, candidate item) {
  flap_assert(bpe->heap_count < bpe->heap_max);
  uint64_t at = bpe->heap_count++;
  while (at > 0 && item < bpe->heap[(at - 1) / WAYS]) {
    bpe->heap[at] = bpe->heap[(at - 1) / WAYS];
    at = (at - 1) / WAYS;
  }
  bpe->heap[at] = item;
}

static candidate heap_pop(flap_bpe *bpe) {
  candidate *heap = bpe->heap;
  candidate top = heap[0];
  candidate item = heap[--bpe->heap_count];
  uint64_t at = 0;
  for (;;) {
    uint64_t first = WAYS * at + 1, end = first + WAYS < bpe->heap_count ? first + WAYS : bpe->heap_count;
    if (first >= end)
      break;
    uint64_t least = first;
    for (uint64_t child = first + 1; child < end; child++)
      least = heap[child] < heap[least] ? child : least;
    if (heap[least] >= item)
      break;
    heap[at] = heap[least];
    at = least;
  }
  heap[at] = item;
  return top;
}

static void push_pair(flap_bpe *bpe, int32_t position, int32_t next) {
  const merge *entry = find_merge(bpe, bpe->symbols[position].id, bpe->symbols[next].id);
  if (entry->pair != EMPTY)
    heap_push(bpe, (uint64_t)entry->rank << 32 | (uint32_t)position);
}

/* ---- words --------------------------------------------------------------------------------------------- */

static flap_status reserve_scratch(flap_bpe *bpe, uint64_t symbol_count) {
  if (symbol_count <= bpe->symbols_max)
    return FLAP_OK;
  /* Short words grow now and then, long ones are rare: no more than they need. */
  uint64_t count = symbol_count < 256 ? 256 : symbol_count < GROWTH_MAX ? symbol_count * 2 : symbol_count;
  symbol *symbols = realloc(bpe->symbols, count * sizeof *symbols);
  if (symbols != NULL)
    bpe->symbols = symbols;
  /* One candidate per neighbouring pair; a merge takes one out and puts in at most two. */
  candidate *heap = realloc(bpe->heap, 2 * count * sizeof *heap);
  if (heap != NULL)
    bpe->heap = heap;
  if (symbols == NULL || heap == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "tokenizer: no memory for a word of %llu symbols",
                          (unsigned long long)symbol_count);
  bpe->symbols_max = count;
  bpe->heap_max = 2 * count;
  return FLAP_OK;
}

static void merge_symbols(flap_bpe *bpe) {
  symbol *symbols = bpe->symbols;
  while (bpe->heap_count > 0) {
    candidate top = heap_pop(bpe);
    int32_t position = (int32_t)(top & UINT32_MAX), merged = bpe->merged[top >> 32];
    symbol *left = &symbols[position];
    if (left->id < 0 || left->next < 0)
      continue;
    symbol *right = &symbols[left->next];
    const merge *entry = find_merge(bpe, left->id, right->id);
    if (entry->pair == EMPTY || entry->merged != merged)
      continue;
    left->id = merged;
    left->next = right->next;
    right->id = -1;
    if (left->next >= 0) {
      symbols[left->next].previous = position;
      push_pair(bpe, position, left->next);
    }
    if (left->previous >= 0)
      push_pair(bpe, left->previous, position);
  }
}

/* Appends what is left of the first `count` symbols, whose ids are set. */
static void encode_symbols(flap_bpe *bpe, int32_t count, flap_ids *ids) {
  symbol *symbols = bpe->symbols;
  if (count == 0)
    return;
  for (int32_t position = 0; position < count; position++) {
    symbols[position].previous = position - 1;
    symbols[position].next = position + 1 < count ? position + 1 : -1;
  }
  bpe->heap_count = 0;
  for (int32_t position = 0; position + 1 < count; position++)
    push_pair(bpe, position, position + 1);
  merge_symbols(bpe);
  for (int32_t position = 0; position >= 0; position = symbols[position].next)
    ids->ids[ids->count++] = symbols[position].id;
}

flap_status flap_bpe_encode_symbols(flap_bpe *bpe, const int32_t *symbol_ids, uint64_t count, flap_ids *ids) {
  if (count >= (uint64_t)1 << 30)
    return flap_error_set(FLAP_INVALID, "tokenizer: a word of %llu symbols is too long", (unsigned long long)count);
  FLAP_TRY(flap_ids_reserve(ids, count));
  if (count <= 1 || bpe->merge_count == 0) {
    if (count > 0)
      memcpy(ids->ids + ids->count, symbol_ids, count * sizeof *symbol_ids);
    ids->count += count;
    return FLAP_OK;
  }
  FLAP_TRY(reserve_scratch(bpe, count));
  for (uint64_t i = 0; i < count; i++)
    bpe->symbols[i].id = symbol_ids[i];
  encode_symbols(bpe, (int32_t)count, ids);
  return FLAP_OK;
}

static flap_status encode_word(flap_bpe *bpe, const char *word, uint64_t bytes, flap_ids *ids) {
  FLAP_TRY(flap_ids_reserve(ids, bytes));
  if (bpe->merge_count == 0) {
    for (uint64_t i = 0; i < bytes; i++) {
      int32_t id = bpe->byte_ids[(uint8_t)word[i]];
      if (id >= 0)
        ids->ids[ids->count++] = id;
    }
    return FLAP_OK;
  }
  FLAP_TRY(reserve_scratch(bpe, bytes));
  int32_t count = 0;
  for (uint64_t i = 0; i < bytes; i++) {
    int32_t id = bpe->byte_ids[(uint8_t)word[i]];
    if (id >= 0)
      bpe->symbols[count++].id = id;
  }
  encode_symbols(bpe, count, ids);
  return FLAP_OK;
}

flap_status flap_bpe_encode(flap_bpe *bpe, const char *word, uint64_t bytes, flap_ids *ids) {
  flap_assert(bytes < (uint64_t)1 << 30);
  if (bytes == 0)
    return FLAP_OK;
  if (bytes > CACHE_WORD_BYTES || bpe->merge_count == 0)
    return encode_word(bpe, word, bytes, ids);
  cached_word *cached = &bpe->cache[flap_text_hash(word, bytes) % CACHE_SLOTS];
  if (cached->bytes == bytes && memcmp(cached->word, word, bytes) == 0) {
    FLAP_TRY(flap_ids_reserve(ids, cached->count));
    memcpy(ids->ids + ids->count, cached->ids, cached->count * sizeof *ids->ids);
    ids->count += cached->count;
    return FLAP_OK;
  }
  uint64_t before = ids->count;
  FLAP_TRY(encode_word(bpe, word, bytes, ids));
  uint64_t count = ids->count - before;
  if (count > 0 && count <= CACHE_IDS) {
    cached->bytes = (uint8_t)bytes;
    cached->count = (uint8_t)count;
    memcpy(cached->word, word, bytes);
    memcpy(cached->ids, ids->ids + before, count * sizeof *ids->ids);
  }
  return FLAP_OK;
}
