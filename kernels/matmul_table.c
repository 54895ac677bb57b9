#include "kernels/matmul_table.h"

#include "base/assert.h"

#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(flap_matmul_key) == 32, "no padding: keys are compared and digested as bytes");
_Static_assert(sizeof(flap_matmul_entry) == 32 + FLAP_MATMUL_ALGORITHM_BYTES, "nor have entries any");

/* ---- keys ------------------------------------------------------------------------------------------------- */

/* Of NULL, as good as any. */
static uint8_t alignment(const void *pointer) {
  const uintptr_t lowest = (uintptr_t)pointer & (~(uintptr_t)pointer + 1);
  return lowest == 0 || lowest > 16 ? 16 : (uint8_t)lowest;
}

flap_matmul_key flap_matmul_key_of(const flap_matmul *x) {
  const uint8_t c = alignment(x->c), residual = alignment(x->residual);
  return (flap_matmul_key){.m = x->m,
                           .n = x->n,
                           .k = x->k,
                           .lda = x->lda,
                           .ldb = x->ldb,
                           .ldc = x->ldc,
                           .transpose = (uint8_t)x->transpose,
                           .dtype = (uint8_t)x->dtype,
                           .c_dtype = (uint8_t)x->c_dtype,
                           .added = x->accumulate         ? 1
                                    : x->residual != NULL ? 2
                                                          : 0,
                           .bias = x->bias == NULL ? 0 : alignment(x->bias),
                           .align_a = alignment(x->a),
                           .align_b = alignment(x->b),
                           .align_c = c < residual ? c : residual};
}

static bool is_alignment(uint8_t bytes) {
  return bytes > 0 && bytes <= 16 && (bytes & (bytes - 1)) == 0;
}

static bool is_float(uint8_t dtype) {
  return dtype == FLAP_F32 || dtype == FLAP_BF16 || dtype == FLAP_F16;
}

bool flap_matmul_key_valid(const flap_matmul_key *key) {
  const bool sizes = key->m > 0 && key->n > 0 && key->k > 0 && key->transpose <= FLAP_TN;
  return sizes && key->lda >= (key->transpose == FLAP_TN ? key->m : key->k) &&
         key->ldb >= (key->transpose == FLAP_NT ? key->k : key->n) && key->ldc >= key->n && is_float(key->dtype) &&
         (key->c_dtype == FLAP_F32 || key->c_dtype == key->dtype) && key->added <= 2 &&
         (key->added != 1 || key->c_dtype == FLAP_F32) && (key->bias == 0 || is_alignment(key->bias)) &&
         is_alignment(key->align_a) && is_alignment(key->align_b) && is_alignment(key->align_c);
}

const char *flap_matmul_key_text(const flap_matmul_key *key, char text_out[FLAP_MATMUL_TEXT_MAX]) {
  static const char *const transposes[] = {[FLAP_NN] = "NN", [FLAP_NT] = "NT", [FLAP_TN] = "TN"};
  (void)snprintf(text_out, FLAP_MATMUL_TEXT_MAX, "%s %u x %u, k %u, %s to %s", transposes[key->transpose], key->m,
                 key->n, key->k, flap_dtype_name((flap_dtype)key->dtype), flap_dtype_name((flap_dtype)key->c_dtype));
  return text_out;
}

/* ---- entries ---------------------------------------------------------------------------------------------- */

/* The first entry that does not come before the key. */
static uint32_t place_of(const flap_matmul_table *table, const flap_matmul_key *key) {
  uint32_t low = 0, high = table->count;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (memcmp(&table->entries[middle].key, key, sizeof *key) < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

const flap_matmul_entry *flap_matmul_table_find(const flap_matmul_table *table, const flap_matmul_key *key) {
  const uint32_t place = place_of(table, key);
  if (place == table->count || memcmp(&table->entries[place].key, key, sizeof *key) != 0)
    return NULL;
  return &table->entries[place];
}

bool flap_matmul_table_add(flap_matmul_table *table, const flap_matmul_key *key,
                           const uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES]) {
  const uint32_t place = place_of(table, key);
  flap_assert(table->count <= FLAP_MATMUL_ENTRIES_MAX);
  if (place < table->count && memcmp(&table->entries[place].key, key, sizeof *key) == 0)
    return true;
  if (table->count == FLAP_MATMUL_ENTRIES_MAX)
    return false;
  flap_matmul_entry *entry = &table->entries[place];
  memmove(entry + 1, entry, (table->count - place) * sizeof *entry);
  entry->key = *key;
  memcpy(entry->algorithm, algorithm, sizeof entry->algorithm);
  table->count++;
  return true;
}

void flap_matmul_table_remove(flap_matmul_table *table, uint32_t index) {
  flap_assert(index < table->count);
  flap_matmul_entry *entry = &table->entries[index];
  table->count--;
  memmove(entry, entry + 1, (table->count - index) * sizeof *entry);
}

uint64_t flap_matmul_table_digest(const flap_matmul_table *table) { /* FNV-1a */
  const unsigned char *bytes = (const unsigned char *)table->entries;
  uint64_t hash = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < table->count * sizeof *table->entries; i++)
    hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return table->count == 0 ? 0 : hash;
}
