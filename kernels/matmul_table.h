/* Which algorithm computes a product of which shape: a recorded table, for one model of GPU and one library version.
 *
 * A library of products offers several algorithms for a shape, and its first answer is often some percent slower than
 * its best. Which one is best is found by timing them, once; and since algorithms differ in the order of their sums,
 * what was found is recorded and decides the bits from then on.
 *
 * The table is the caller's struct and allocates nothing. It knows no files and no CUDA: algorithms are bytes that mean
 * something to the library of the target alone. Entries lie in the order of their keys. Threading: none of its own.
 */
#ifndef FLAP_KERNELS_MATMUL_TABLE_H
#define FLAP_KERNELS_MATMUL_TABLE_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_MATMUL_ENTRIES_MAX 128u /* a layer and the head of a model have some fifty shapes */
#define FLAP_MATMUL_ALGORITHM_BYTES 64u
#define FLAP_MATMUL_TARGET_MAX 128u

/* All that may decide which algorithms a product can have. Without padding: keys are compared as bytes. */
typedef struct flap_matmul_key {
  uint32_t m, n, k, lda, ldb, ldc;
  uint8_t transpose, dtype, c_dtype;
  uint8_t added;                     /* 0: nothing, 1: c itself (accumulate), 2: a residual */
  uint8_t bias;                      /* its alignment; 0: none */
  uint8_t align_a, align_b, align_c; /* bytes: 1, 2, 4, 8 or 16; c's is the residual's too */
} flap_matmul_key;

typedef struct flap_matmul_entry {
  flap_matmul_key key;
  uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES];
} flap_matmul_entry;

/* All zero is an empty table. */
typedef struct flap_matmul_table {
  char target[FLAP_MATMUL_TARGET_MAX]; /* "sm_90 NVIDIA H100 80GB HBM3, 132 multiprocessors, cublaslt-13.1.0" */
  uint32_t count;
  flap_matmul_entry entries[FLAP_MATMUL_ENTRIES_MAX];
} flap_matmul_table;

/* ---- keys ------------------------------------------------------------------------------------------------- */

flap_matmul_key flap_matmul_key_of(const flap_matmul *matmul);
/* Whether some product that flap_ops_matmul takes has this key: for keys that come from outside. */
bool flap_matmul_key_valid(const flap_matmul_key *key);
/* "NT 2048 x 1536, k 8960, bfloat16 to float32", for people. Returned. */
#define FLAP_MATMUL_TEXT_MAX 96u
const char *flap_matmul_key_text(const flap_matmul_key *key, char text_out[FLAP_MATMUL_TEXT_MAX]);

/* ---- entries ---------------------------------------------------------------------------------------------- */

/* NULL: not there. Valid until the table changes. */
const flap_matmul_entry *flap_matmul_table_find(const flap_matmul_table *table, const flap_matmul_key *key);
/* False: it is full. A key that is there keeps what it has. */
bool flap_matmul_table_add(flap_matmul_table *table, const flap_matmul_key *key,
                           const uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES]);
void flap_matmul_table_remove(flap_matmul_table *table, uint32_t index);
/* Of all entries, for the numerics key and against damage; not of the target. 0 for an empty table. */
uint64_t flap_matmul_table_digest(const flap_matmul_table *table);

#ifdef __cplusplus
}
#endif
#endif
