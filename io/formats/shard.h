/* Tokens in files: llm.c's .bin shards, and runs of bare tokens in a scratch file. Folder-private.
 *
 * llm.c: 256 int32 (magic, version, count, zeros), then the tokens; little endian, as all of FLAP's machines are.
 */
#ifndef FLAP_IO_FORMATS_SHARD_H
#define FLAP_IO_FORMATS_SHARD_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#define FLAP_SHARD_HEADER_BYTES 1024u
#define FLAP_SHARD_TOKENS_MAX ((uint64_t)INT32_MAX) /* what a header can count */
#define FLAP_SHARD_NARROW_VOCABULARY 65536u         /* up to this, ids fit in uint16 */

/* A run of tokens. Threading: read from any thread. */
typedef struct flap_shard {
  char *path; /* of the file that the tokens came from, for messages */
  int fd;
  bool owns_fd;
  uint64_t offset; /* of the first token in the file */
  uint64_t tokens;
  uint32_t width; /* bytes of a token: 2 or 4 */
} flap_shard;

/* Opens a .bin and checks its header against its length. */
FLAP_CHECKED flap_status flap_shard_open(const char *path, flap_shard *shard_out);
void flap_shard_close(flap_shard *shard); /* fine for a zeroed one */

/* Tokens first .. first+count-1. FLAP_CORRUPT when the file has become shorter, or an id is not below `vocabulary`. */
FLAP_CHECKED flap_status flap_shard_read(const flap_shard *shard, uint64_t first, uint64_t count, uint32_t vocabulary,
                                         int32_t *ids_out);

/* Appends tokens to a file, buffered. */
typedef struct flap_shard_sink {
  int fd;
  const char *path; /* of what is written, for messages */
  uint32_t width;
  uint64_t tokens_max;
  uint64_t tokens;       /* so far */
  unsigned char *buffer; /* FLAP_SHARD_SINK_BYTES, the caller's */
  uint64_t buffered;
} flap_shard_sink;

#define FLAP_SHARD_SINK_BYTES ((uint64_t)1 << 20)

/* FLAP_BUDGET when there would be more than tokens_max. Ids must fit the width. */
FLAP_CHECKED flap_status flap_shard_put(flap_shard_sink *sink, const int32_t *ids, uint64_t count);
FLAP_CHECKED flap_status flap_shard_flush(flap_shard_sink *sink);

/* The header for `tokens` tokens of 2 or 4 bytes. */
void flap_shard_make_header(uint32_t width, uint64_t tokens, unsigned char header_out[FLAP_SHARD_HEADER_BYTES]);

#endif
