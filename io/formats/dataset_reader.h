/* Read-ahead: a thread that keeps the next batches of a dataset ready in memory.
 *
 * Role: next() hands out batches of `sequences` training sequences in cursor order; the thread fetches into a ring of
 * `depth` batches taken from the caller's arena at open. Nothing is allocated afterwards. What the thread could not
 * read arrives as the status of the next() whose batch it was.
 *
 * Threading: one consumer. The dataset must outlive the reader.
 */
#ifndef FLAP_IO_FORMATS_DATASET_READER_H
#define FLAP_IO_FORMATS_DATASET_READER_H

#include "base/arena.h"
#include "base/status.h"
#include "io/formats/dataset.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_reader_config {
  const flap_dataset *dataset; /* may be NULL on a measuring arena */
  uint32_t sequence_length;    /* of the dataset */
  uint32_t sequences;          /* in a batch, > 0 */
  uint32_t depth;              /* batches in memory, >= 2: one with the caller, the others ahead */
  uint64_t cursor;             /* number of the first sequence that next() returns */
} flap_reader_config;

typedef struct flap_reader flap_reader;

/* Takes its memory from the arena and starts the thread. On a measuring arena it only takes: *reader_out is NULL. */
FLAP_CHECKED flap_status flap_reader_open(const flap_reader_config *config, flap_arena *arena,
                                          flap_reader **reader_out);

/* The bytes that open takes from an arena that is aligned to 64 bytes; a multiple of 64. */
uint64_t flap_reader_measure(const flap_reader_config *config);

/* Blocks until the next batch is ready: (sequences, S) each, valid until the next call of next or close. After a
 * failure the cursor has not moved, and every further next() tries that batch again. */
FLAP_CHECKED flap_status flap_reader_next(flap_reader *reader, const int32_t **tokens_out, const int32_t **targets_out);

/* Number of the first sequence that the next next() returns. */
uint64_t flap_reader_cursor(const flap_reader *reader);

/* Stops the thread and waits for it. The memory stays with the arena. NULL is fine. */
void flap_reader_close(flap_reader *reader);

#ifdef __cplusplus
}
#endif
#endif
