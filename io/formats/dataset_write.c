/* The stream of some files as one llm.c shard. */
#include "io/formats/dataset_internal.h"

#include "base/system.h"
#include "io/formats/durable.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK_TOKENS 4096u

static flap_status copy_shard(const flap_dataset_config *config, const char *path, uint32_t vocabulary,
                              flap_shard_sink *sink) {
  flap_shard shard;
  FLAP_TRY(flap_shard_open(path, &shard));
  int32_t chunk[CHUNK_TOKENS];
  flap_status status = FLAP_OK;
  for (uint64_t first = 0; first < shard.tokens && status == FLAP_OK; first += CHUNK_TOKENS) {
    uint64_t count = shard.tokens - first < CHUNK_TOKENS ? shard.tokens - first : CHUNK_TOKENS;
    status = flap_dataset_go_on(config);
    if (status == FLAP_OK)
      status = flap_shard_read(&shard, first, count, vocabulary, chunk);
    if (status == FLAP_OK)
      status = flap_shard_put(sink, chunk, count);
  }
  flap_shard_close(&shard);
  return status;
}

static flap_status write_tokens(const flap_dataset_config *config, const flap_file_list *files, uint32_t vocabulary,
                                flap_shard_sink *sink) {
  for (uint64_t i = 0; i < files->count; i++) {
    const flap_dataset_file *file = &files->files[i];
    flap_status status = file->kind == FLAP_DATA_SHARD ? copy_shard(config, file->path, vocabulary, sink)
                                                       : flap_dataset_tokenize(file, config, sink);
    if (status == FLAP_BUDGET)
      return flap_error_set(FLAP_UNSUPPORTED,
                            "%s: a token shard holds at most %llu tokens; write several, of fewer files each",
                            sink->path, (unsigned long long)FLAP_SHARD_TOKENS_MAX);
    FLAP_TRY(status);
  }
  if (sink->tokens == 0)
    return flap_error_set(FLAP_INVALID, "%s: there is no text in the files for it", sink->path);
  return flap_shard_flush(sink);
}

/* By whatever name: what is written replaces the file that has the name. */
static flap_status check_not_read(const flap_file_list *files, const char *out_path) {
  struct stat out;
  if (flap_system_stat(out_path, &out) != 0)
    return FLAP_OK;
  for (uint64_t i = 0; i < files->count; i++)
    if (files->files[i].device == out.st_dev && files->files[i].inode == out.st_ino)
      return flap_error_set(FLAP_INVALID, "%s: one of the files to read, and would be replaced: give another name",
                            out_path);
  return FLAP_OK;
}

static flap_status write_header(const flap_shard_sink *sink) {
  unsigned char header[FLAP_SHARD_HEADER_BYTES];
  flap_shard_make_header(sink->width, sink->tokens, header);
  if (lseek(sink->fd, 0, SEEK_SET) != 0)
    return flap_error_set_os(errno, "%s", sink->path);
  return flap_durable_write_all(sink->fd, sink->path, header, sizeof header);
}

flap_status flap_dataset_write_shard(const flap_dataset_config *config, const char *out_path, uint64_t *tokens_out) {
  *tokens_out = 0;
  flap_file_list files;
  FLAP_TRY(flap_dataset_expand(config->paths, config->path_count, &files));
  flap_durable_file file = {.fd = -1};
  flap_shard_sink sink = {.path = out_path, .tokens_max = FLAP_SHARD_TOKENS_MAX};
  uint32_t vocabulary;
  flap_status status;
  FLAP_TRY_GOTO(status, flap_dataset_check_config(config, &files, &vocabulary));
  FLAP_TRY_GOTO(status, check_not_read(&files, out_path));
  /* The tokenizer may know more ids than a smaller model; what the file can hold is decided by what may come. */
  if (config->tokenizer != NULL && flap_tokenizer_vocabulary(config->tokenizer) > vocabulary)
    vocabulary = flap_tokenizer_vocabulary(config->tokenizer);
  sink.width = vocabulary <= FLAP_SHARD_NARROW_VOCABULARY ? 2 : 4;
  sink.buffer = malloc(FLAP_SHARD_SINK_BYTES);
  if (sink.buffer == NULL) {
    status = flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", out_path);
    goto fail;
  }
  FLAP_TRY_GOTO(status, flap_durable_begin_file(&file, out_path));
  sink.fd = file.fd;
  FLAP_TRY_GOTO(status, write_header(&sink)); /* its place; the count is not known yet */
  FLAP_TRY_GOTO(status, write_tokens(config, &files, vocabulary, &sink));
  FLAP_TRY_GOTO(status, write_header(&sink));
  FLAP_TRY_GOTO(status, flap_durable_commit_file(&file));
  *tokens_out = sink.tokens;
fail:
  if (file.fd >= 0)
    flap_durable_abort_file(&file);
  free(sink.buffer);
  flap_file_list_free(&files);
  return status;
}
