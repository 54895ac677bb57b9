#include "io/formats/shard.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little endian");

#define MAGIC_NARROW 20240520
#define VERSION_NARROW 1
#define MAGIC_WIDE 20240801
#define VERSION_WIDE 7

static flap_status check_header(const char *path, uint64_t file_bytes, const int32_t header[3], flap_shard *shard) {
  if (header[0] == MAGIC_NARROW && header[1] == VERSION_NARROW)
    shard->width = 2;
  else if (header[0] == MAGIC_WIDE && header[1] == VERSION_WIDE)
    shard->width = 4;
  else if (header[0] == MAGIC_NARROW || header[0] == MAGIC_WIDE)
    return flap_error_set(FLAP_UNSUPPORTED,
                          "%s: version %d of a token shard; known are 1 (with magic %d) and 7 (with %d)", path,
                          header[1], MAGIC_NARROW, MAGIC_WIDE);
  else
    return flap_error_set(FLAP_INVALID, "%s: not a token shard: it starts with %d, not with the magic %d or %d", path,
                          header[0], MAGIC_NARROW, MAGIC_WIDE);
  if (header[2] < 0)
    return flap_error_set(FLAP_INVALID, "%s: its header counts %d tokens", path, header[2]);
  shard->tokens = (uint64_t)header[2];
  shard->offset = FLAP_SHARD_HEADER_BYTES;
  if (file_bytes - FLAP_SHARD_HEADER_BYTES != shard->tokens * shard->width)
    return flap_error_set(FLAP_CORRUPT, "%s: its header counts %llu tokens of %u bytes, but %llu bytes follow it", path,
                          (unsigned long long)shard->tokens, (unsigned)shard->width,
                          (unsigned long long)(file_bytes - FLAP_SHARD_HEADER_BYTES));
  return FLAP_OK;
}

flap_status flap_shard_open(const char *path, flap_shard *shard_out) {
  flap_shard shard = {.fd = -1};
  *shard_out = (flap_shard){0};
  flap_status status = FLAP_OK;
  shard.path = strdup(path);
  if (shard.path == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to open it", path);
  shard.fd = flap_system_open(path, O_RDONLY | O_CLOEXEC, 0);
  shard.owns_fd = true;
  struct stat info;
  if (shard.fd < 0 || flap_system_fstat(shard.fd, &info) != 0) {
    status = flap_error_set_os(errno, "%s: cannot open the token shard", path);
    goto fail;
  }
  if (!S_ISREG(info.st_mode) || info.st_size < (off_t)FLAP_SHARD_HEADER_BYTES) {
    status = flap_error_set(FLAP_CORRUPT, "%s: %lld bytes are too few for the header of a token shard (%u bytes)", path,
                            (long long)info.st_size, FLAP_SHARD_HEADER_BYTES);
    goto fail;
  }
  int32_t header[3];
  FLAP_TRY_GOTO(status, flap_durable_read_all(shard.fd, path, 0, header, sizeof header));
  FLAP_TRY_GOTO(status, check_header(path, (uint64_t)info.st_size, header, &shard));
  *shard_out = shard;
  return FLAP_OK;
fail:
  flap_shard_close(&shard);
  return status;
}

void flap_shard_close(flap_shard *shard) {
  if (shard->owns_fd && shard->fd >= 0)
    (void)flap_system_close(shard->fd);
  free(shard->path);
  *shard = (flap_shard){0};
}

flap_status flap_shard_read(const flap_shard *shard, uint64_t first, uint64_t count, uint32_t vocabulary,
                            int32_t *ids_out) {
  flap_assert(first <= shard->tokens && count <= shard->tokens - first);
  union {
    uint16_t narrow[4096];
    uint32_t wide[2048];
  } raw;
  while (count > 0) {
    uint64_t step = sizeof raw / shard->width;
    step = step < count ? step : count;
    flap_status status =
        flap_durable_read_all(shard->fd, shard->path, shard->offset + first * shard->width, &raw, step * shard->width);
    if (status != FLAP_OK)
      return flap_error_prefix(status, "reading tokens");
    for (uint64_t i = 0; i < step; i++) {
      uint32_t id = shard->width == 2 ? raw.narrow[i] : raw.wide[i];
      if (id >= vocabulary)
        return flap_error_set(FLAP_INVALID, "%s: token %llu has the id %u, but the vocabulary has only %u ids",
                              shard->path, (unsigned long long)(first + i), (unsigned)id, (unsigned)vocabulary);
      ids_out[i] = (int32_t)id;
    }
    ids_out += step;
    first += step;
    count -= step;
  }
  return FLAP_OK;
}

flap_status flap_shard_flush(flap_shard_sink *sink) {
  uint64_t bytes = sink->buffered;
  sink->buffered = 0;
  return flap_durable_write_all(sink->fd, sink->path, sink->buffer, bytes);
}

flap_status flap_shard_put(flap_shard_sink *sink, const int32_t *ids, uint64_t count) {
  if (count > sink->tokens_max - sink->tokens)
    return flap_error_set(FLAP_BUDGET, "%s: more than %llu tokens", sink->path, (unsigned long long)sink->tokens_max);
  sink->tokens += count;
  for (uint64_t i = 0; i < count; i++) {
    if (sink->buffered + sink->width > FLAP_SHARD_SINK_BYTES)
      FLAP_TRY(flap_shard_flush(sink));
    if (sink->width == 2) {
      uint16_t id = (uint16_t)ids[i];
      flap_assert(id == ids[i]);
      memcpy(sink->buffer + sink->buffered, &id, 2);
    } else {
      memcpy(sink->buffer + sink->buffered, &ids[i], 4);
    }
    sink->buffered += sink->width;
  }
  return FLAP_OK;
}

void flap_shard_make_header(uint32_t width, uint64_t tokens, unsigned char header_out[FLAP_SHARD_HEADER_BYTES]) {
  flap_assert(tokens <= FLAP_SHARD_TOKENS_MAX && (width == 2 || width == 4));
  const int32_t header[3] = {width == 2 ? MAGIC_NARROW : MAGIC_WIDE, width == 2 ? VERSION_NARROW : VERSION_WIDE,
                             (int32_t)tokens};
  memset(header_out, 0, FLAP_SHARD_HEADER_BYTES);
  memcpy(header_out, header, sizeof header);
}
