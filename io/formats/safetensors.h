/* safetensors files: one file, or a Hugging Face folder of shards, read and written.
 *
 * Format (the safetensors project's README): 8 bytes little-endian length N, N bytes of JSON that names each tensor's
 * dtype, shape and [begin, end) in the data that follows, then the data without holes. A folder is `model.safetensors`,
 * or shards named by `weight_map` in `model.safetensors.index.json`.
 *
 * Role: moves bytes of named tensors between files and memory. It converts nothing, and knows no models or devices.
 * Every malformed file is FLAP_CORRUPT, what this code does not do is FLAP_UNSUPPORTED, what is not there is
 * FLAP_NOT_FOUND; the record names the file, the tensor and what is wrong with it.
 *
 * Threading: a reader is constant once open, so any number of threads may read from it. A writer has one user.
 * Memory: everything is taken in open / begin; read and write allocate nothing.
 */
#ifndef FLAP_FORMATS_SAFETENSORS_H
#define FLAP_FORMATS_SAFETENSORS_H

#include "base/dtype.h"
#include "base/status.h"
#include "io/formats/checksums.h"
#include "io/formats/large_file.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_SAFETENSORS_RANK_MAX 8u
#define FLAP_SAFETENSORS_HEADER_BYTES_MAX 100000000u /* as the reference implementation */
#define FLAP_SAFETENSORS_SHARD_BYTES 5000000000u     /* what Hugging Face calls "5GB" */
#define FLAP_SAFETENSORS_SHARD_NAME_MAX 48u          /* "model-00001-of-00002.safetensors", numbers of 10 digits */
#define FLAP_SAFETENSORS_FILE "model.safetensors"
#define FLAP_SAFETENSORS_INDEX "model.safetensors.index.json"

/* The element types of whole bytes. 4- and 6-bit types are FLAP_UNSUPPORTED. */
typedef enum flap_safetensors_dtype {
  FLAP_SAFETENSORS_BOOL,
  FLAP_SAFETENSORS_U8,
  FLAP_SAFETENSORS_I8,
  FLAP_SAFETENSORS_F8_E5M2,
  FLAP_SAFETENSORS_F8_E4M3,
  FLAP_SAFETENSORS_F8_E8M0,
  FLAP_SAFETENSORS_I16,
  FLAP_SAFETENSORS_U16,
  FLAP_SAFETENSORS_F16,
  FLAP_SAFETENSORS_BF16,
  FLAP_SAFETENSORS_I32,
  FLAP_SAFETENSORS_U32,
  FLAP_SAFETENSORS_F32,
  FLAP_SAFETENSORS_I64,
  FLAP_SAFETENSORS_U64,
  FLAP_SAFETENSORS_F64,
  FLAP_SAFETENSORS_C64,
  FLAP_SAFETENSORS_DTYPE_COUNT
} flap_safetensors_dtype;

/* "BF16": the name in the file. Static storage. */
const char *flap_safetensors_dtype_name(flap_safetensors_dtype dtype);
uint64_t flap_safetensors_dtype_bytes(flap_safetensors_dtype dtype);
/* F32, BF16, F16 and I32 have a flap_dtype: true, and it is stored. Others: false, nothing stored. */
bool flap_safetensors_to_flap_dtype(flap_safetensors_dtype dtype, flap_dtype *dtype_out);
flap_safetensors_dtype flap_safetensors_from_flap_dtype(flap_dtype dtype);

/* ---- reading ------------------------------------------------------------------------------------------- */

typedef struct flap_safetensors flap_safetensors;

/* Lives as long as its reader. */
typedef struct flap_safetensors_tensor {
  const char *name;
  flap_safetensors_dtype dtype;
  uint32_t rank; /* 0: a scalar */
  uint64_t shape[FLAP_SAFETENSORS_RANK_MAX];
  uint64_t elements;
  uint64_t bytes;
  uint32_t file;        /* which of the reader's files holds it */
  uint64_t file_offset; /* of its first byte in that file */
} flap_safetensors_tensor;

/* `path` is a .safetensors file, an index (a name that ends in .index.json), or a folder that holds
 * FLAP_SAFETENSORS_FILE or, failing that, FLAP_SAFETENSORS_INDEX. All headers are read and checked here, sizes of files
 * included. With an index, exactly the tensors of its weight_map are listed. Symbolic links are followed; shard names
 * that leave the folder are refused. */
FLAP_CHECKED flap_status flap_safetensors_open(const char *path, flap_safetensors **reader_out);

/* Tensors, sorted by name (byte order). */
uint64_t flap_safetensors_count(const flap_safetensors *reader);
const flap_safetensors_tensor *flap_safetensors_at(const flap_safetensors *reader, uint64_t index);
/* NULL when there is none. */
const flap_safetensors_tensor *flap_safetensors_find(const flap_safetensors *reader, const char *name);
/* The same, but FLAP_NOT_FOUND with a record that names the path and the tensor. */
FLAP_CHECKED flap_status flap_safetensors_require(const flap_safetensors *reader, const char *name,
                                                  const flap_safetensors_tensor **tensor_out);
/* Of all listed tensors. */
uint64_t flap_safetensors_bytes(const flap_safetensors *reader);

/* The path given to open, and the file that holds a tensor. They live as long as the reader. */
const char *flap_safetensors_path(const flap_safetensors *reader);
const char *flap_safetensors_tensor_path(const flap_safetensors *reader, const flap_safetensors_tensor *tensor);

/* A string of `__metadata__` in the first file that has the key; NULL when none does. Lives as long as the reader. */
const char *flap_safetensors_metadata(const flap_safetensors *reader, const char *key);

/* Reads `bytes` of the tensor from `byte_offset`; the range must lie inside it (asserted). A file that became shorter
 * since open is FLAP_CORRUPT. */
FLAP_CHECKED flap_status flap_safetensors_read(const flap_safetensors *reader, const flap_safetensors_tensor *tensor,
                                               uint64_t byte_offset, uint64_t bytes, void *dst);
/* NULL is fine. */
void flap_safetensors_close(flap_safetensors *reader);

/* ---- writing ------------------------------------------------------------------------------------------- */

typedef struct flap_safetensors_writer flap_safetensors_writer;

/* What will be written; read during the call only. */
typedef struct flap_safetensors_entry {
  const char *name;
  flap_safetensors_dtype dtype;
  uint32_t rank;
  uint64_t shape[FLAP_SAFETENSORS_RANK_MAX];
} flap_safetensors_entry;

typedef struct flap_safetensors_pair {
  const char *key, *value;
} flap_safetensors_pair;

/* The exact size of the file that write_begin would start, for disk budgets. Fails as write_begin does on bad entries:
 * FLAP_INVALID for a repeated or reserved name, a name that is not UTF-8, a rank or a size out of range. */
FLAP_CHECKED flap_status flap_safetensors_measure(const flap_safetensors_entry *entries, uint64_t count,
                                                  const flap_safetensors_pair *metadata, uint64_t metadata_count,
                                                  uint64_t *file_bytes_out);

/* Creates (or empties) `path` and writes the header; tensors keep the order given. transformers wants the metadata pair
 * {"format", "pt"}. `path` is copied. A file inside a durable folder (durable.h) needs no temporary name of its own.
 * With a piece of memory, which outlives the writer, it goes past the page cache (large_file.h); {0}: through it. */
FLAP_CHECKED flap_status flap_safetensors_write_begin(const char *path, const flap_safetensors_entry *entries,
                                                      uint64_t count, const flap_safetensors_pair *metadata,
                                                      uint64_t metadata_count, flap_file_piece piece,
                                                      flap_safetensors_writer **writer_out);

/* Before any data: the sum of the whole file goes into the list when the file is ended. The list outlives the writer.
 */
void flap_safetensors_write_sum(flap_safetensors_writer *writer, flap_checksums *checksums);

/* Appends data, in any pieces, in the order of the entries. More than the entries need is FLAP_INVALID. After a failure
 * every later call is FLAP_CLOSED. */
FLAP_CHECKED flap_status flap_safetensors_write(flap_safetensors_writer *writer, const void *data, uint64_t bytes);

/* Checks that every byte was given, makes the file durable and ends the writer, whatever the result. On failure the
 * file is removed. */
FLAP_CHECKED flap_status flap_safetensors_write_end(flap_safetensors_writer *writer);
/* Ends the writer and removes the file. NULL is fine. */
void flap_safetensors_write_abort(flap_safetensors_writer *writer);

/* Cuts tensors, in the order given, into shards of at most `shard_bytes_max` (a larger tensor gets one of its own):
 * shard_out[i], from 0, never decreases. Returns the number of shards (0 for no tensors). Callers sort by name first.
 */
uint32_t flap_safetensors_plan_shards(const uint64_t *tensor_bytes, uint64_t count, uint64_t shard_bytes_max,
                                      uint32_t *shard_out);

/* "model-00001-of-00003.safetensors" for shard 0 of 3; FLAP_SAFETENSORS_FILE for shard 0 of 1. */
void flap_safetensors_shard_name(uint32_t shard, uint32_t shards, char name_out[FLAP_SAFETENSORS_SHARD_NAME_MAX]);

/* Writes `<folder>/model.safetensors.index.json` as Hugging Face does; only needed for two shards and more. */
FLAP_CHECKED flap_status flap_safetensors_write_index(const char *folder, const char *const *names,
                                                      const uint32_t *shard_of, uint64_t count, uint32_t shards,
                                                      uint64_t total_bytes);

#ifdef __cplusplus
}
#endif
#endif
