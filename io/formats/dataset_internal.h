/* What the dataset's files share. Folder-private. */
#ifndef FLAP_IO_FORMATS_DATASET_INTERNAL_H
#define FLAP_IO_FORMATS_DATASET_INTERNAL_H

#include "io/formats/dataset.h"
#include "io/formats/shard.h"

#include <stdint.h>

typedef enum flap_dataset_kind { FLAP_DATA_TEXT, FLAP_DATA_JSONL, FLAP_DATA_SHARD } flap_dataset_kind;

typedef struct flap_dataset_file {
  char *path;
  flap_dataset_kind kind;
  uint64_t device, inode; /* a file with two names is taken once */
} flap_dataset_file;

typedef struct flap_file_list {
  flap_dataset_file *files;
  uint64_t count, capacity;
} flap_file_list;

/* FLAP_INTERRUPTED, with no record, when somebody asked for it. */
FLAP_CHECKED flap_status flap_dataset_go_on(const flap_dataset_config *config);

/* Files and globs, expanded, in byte order of their paths. */
FLAP_CHECKED flap_status flap_dataset_expand(const char *const *paths, uint32_t path_count, flap_file_list *files);
void flap_file_list_free(flap_file_list *files);

/* Appends the documents of a .txt or .jsonl to the sink, each followed by the end token. */
FLAP_CHECKED flap_status flap_dataset_tokenize(const flap_dataset_file *file, const flap_dataset_config *config,
                                               flap_shard_sink *sink);

/* The vocabulary that the config asks for; FLAP_INVALID when text has no tokenizer, or the tokenizer no end token. */
FLAP_CHECKED flap_status flap_dataset_check_config(const flap_dataset_config *config, const flap_file_list *files,
                                                   uint32_t *vocabulary_out);

#endif
