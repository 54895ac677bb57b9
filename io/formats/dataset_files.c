/* Which files a dataset is made of. */
#include "io/formats/dataset_internal.h"

#include "base/system.h"

#include <errno.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

void flap_file_list_free(flap_file_list *files) {
  for (uint64_t i = 0; i < files->count; i++)
    free(files->files[i].path);
  free(files->files);
  *files = (flap_file_list){0};
}

static flap_status kind_of(const char *path, flap_dataset_kind *kind_out) {
  static const char *const extensions[] = {
      [FLAP_DATA_TEXT] = ".txt", [FLAP_DATA_JSONL] = ".jsonl", [FLAP_DATA_SHARD] = ".bin"};
  const char *slash = strrchr(path, '/');
  const char *dot = strrchr(slash == NULL ? path : slash, '.');
  for (int kind = 0; dot != NULL && kind < 3; kind++) {
    if (strcmp(dot, extensions[kind]) == 0) {
      *kind_out = (flap_dataset_kind)kind;
      return FLAP_OK;
    }
  }
  return flap_error_set(FLAP_UNSUPPORTED,
                        "dataset: %s: what is in it follows from its name, which must end in .txt, .jsonl or .bin",
                        path);
}

static flap_status add_file(flap_file_list *files, const char *path) {
  struct stat info;
  if (flap_system_stat(path, &info) != 0)
    return flap_error_set_os(errno, "dataset: %s", path);
  if (S_ISDIR(info.st_mode))
    return flap_error_set(FLAP_INVALID, "dataset: %s is a folder; name files, for example %s/*.txt", path, path);
  if (!S_ISREG(info.st_mode))
    return flap_error_set(FLAP_INVALID, "dataset: %s is not a regular file", path);
  flap_dataset_kind kind = FLAP_DATA_TEXT;
  FLAP_TRY(kind_of(path, &kind));
  if (files->count == files->capacity) {
    uint64_t capacity = files->capacity == 0 ? 16 : 2 * files->capacity;
    flap_dataset_file *grown = realloc(files->files, capacity * sizeof *grown);
    if (grown == NULL)
      return flap_error_set(FLAP_NO_MEMORY, "dataset: no memory for a list of %llu files",
                            (unsigned long long)capacity);
    files->files = grown;
    files->capacity = capacity;
  }
  char *copy = strdup(path);
  if (copy == NULL)
    return flap_error_set(FLAP_NO_MEMORY, "dataset: no memory for the name %s", path);
  files->files[files->count++] =
      (flap_dataset_file){.path = copy, .kind = kind, .device = (uint64_t)info.st_dev, .inode = (uint64_t)info.st_ino};
  return FLAP_OK;
}

static flap_status add_pattern(flap_file_list *files, const char *pattern) {
  struct stat info;
  /* A name with a star in it that exists is a name. */
  if (strpbrk(pattern, "*?[") == NULL || flap_system_stat(pattern, &info) == 0)
    return add_file(files, pattern);
  glob_t matches;
  int result = glob(pattern, GLOB_ERR, NULL, &matches);
  if (result == GLOB_NOMATCH)
    return flap_error_set(FLAP_NOT_FOUND, "dataset: %s matches no file", pattern);
  if (result == GLOB_NOSPACE)
    return flap_error_set(FLAP_NO_MEMORY, "dataset: no memory for the files of %s", pattern);
  if (result != 0)
    return flap_error_set(FLAP_IO, "dataset: %s: a folder on the way cannot be read", pattern);
  flap_status status = FLAP_OK;
  for (size_t i = 0; i < matches.gl_pathc && status == FLAP_OK; i++)
    status = add_file(files, matches.gl_pathv[i]);
  globfree(&matches);
  return status;
}

static int compare_identity(const void *left, const void *right) {
  const flap_dataset_file *a = left, *b = right;
  if (a->device != b->device)
    return a->device < b->device ? -1 : 1;
  if (a->inode != b->inode)
    return a->inode < b->inode ? -1 : 1;
  return strcmp(a->path, b->path);
}

static int compare_path(const void *left, const void *right) {
  return strcmp(((const flap_dataset_file *)left)->path, ((const flap_dataset_file *)right)->path);
}

flap_status flap_dataset_expand(const char *const *paths, uint32_t path_count, flap_file_list *files) {
  *files = (flap_file_list){0};
  if (path_count == 0)
    return flap_error_set(FLAP_INVALID, "dataset: no files were named");
  for (uint32_t i = 0; i < path_count; i++) {
    flap_status status = add_pattern(files, paths[i]);
    if (status != FLAP_OK) {
      flap_file_list_free(files);
      return status;
    }
  }
  qsort(files->files, files->count, sizeof *files->files, compare_identity);
  uint64_t kept = 0;
  for (uint64_t i = 0; i < files->count; i++) {
    const flap_dataset_file *last = kept > 0 ? &files->files[kept - 1] : NULL;
    if (last != NULL && last->device == files->files[i].device && last->inode == files->files[i].inode)
      free(files->files[i].path);
    else
      files->files[kept++] = files->files[i];
  }
  files->count = kept;
  qsort(files->files, files->count, sizeof *files->files, compare_path);
  return FLAP_OK;
}

flap_status flap_dataset_visit(const char *const *paths, uint32_t path_count, flap_dataset_visit_fn visit,
                               void *context) {
  flap_file_list files;
  FLAP_TRY(flap_dataset_expand(paths, path_count, &files));
  flap_status status = FLAP_OK;
  for (uint64_t i = 0; i < files.count && status == FLAP_OK; i++)
    status = visit(context, files.files[i].path);
  flap_file_list_free(&files);
  return status;
}

flap_status flap_dataset_go_on(const flap_dataset_config *config) {
  return config->stop != NULL && *config->stop != 0 ? FLAP_INTERRUPTED : FLAP_OK;
}

flap_status flap_dataset_check_config(const flap_dataset_config *config, const flap_file_list *files,
                                      uint32_t *vocabulary_out) {
  bool has_text = false;
  for (uint64_t i = 0; i < files->count; i++)
    has_text |= files->files[i].kind != FLAP_DATA_SHARD;
  if (has_text && config->tokenizer == NULL)
    return flap_error_set(FLAP_INVALID, "dataset: text needs a tokenizer");
  if (has_text && flap_tokenizer_end(config->tokenizer) < 0)
    return flap_error_set(
        FLAP_INVALID,
        "%s: it has no end token to put between documents; name one as eos_token in tokenizer_config.json",
        flap_tokenizer_name(config->tokenizer));
  *vocabulary_out = config->vocabulary;
  if (config->vocabulary == 0 && config->tokenizer == NULL)
    return flap_error_set(FLAP_INVALID, "dataset: neither a vocabulary size nor a tokenizer was given");
  if (config->vocabulary == 0)
    *vocabulary_out = flap_tokenizer_vocabulary(config->tokenizer);
  if (*vocabulary_out > (uint32_t)INT32_MAX)
    return flap_error_set(FLAP_INVALID, "dataset: a vocabulary of %u ids is too large", (unsigned)*vocabulary_out);
  return FLAP_OK;
}
