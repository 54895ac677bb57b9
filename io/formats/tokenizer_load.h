/* What the readers of tokenizer.json share. Folder-private. */
#ifndef FLAP_IO_FORMATS_TOKENIZER_LOAD_H
#define FLAP_IO_FORMATS_TOKENIZER_LOAD_H

#include "io/formats/json_file.h"
#include "io/formats/tokenizer_internal.h"

/* FLAP_UNSUPPORTED, naming the file and the key. */
flap_status flap_tokenizer_unsupported(const flap_json_object *object, const char *key, const char *what);

/* An element of an array as an object; its way is for messages. */
FLAP_CHECKED flap_status flap_tokenizer_array_object(const flap_json_object *parent, const char *key,
                                                     const json_t *array, size_t index, flap_json_object *object_out);

/* ---- SentencePiece-style BPE, in the order in which they are called ------------------------------------- */

/* Characters and bytes, once all tokens of the vocabulary are put. */
FLAP_CHECKED flap_status flap_tokenizer_load_metaspace(flap_tokenizer *tokenizer, const flap_json_object *model,
                                                       const flap_json_object *vocab);
/* Where a merge of these tokens could join two characters. */
FLAP_CHECKED flap_status flap_tokenizer_put_joins(flap_tokenizer *tokenizer, int32_t left, int32_t right);
/* Normalizer, pre-tokenizer and decoder. */
FLAP_CHECKED flap_status flap_tokenizer_load_metaspace_stages(flap_tokenizer *tokenizer, const flap_json_object *root);
/* What each token stands for, once added tokens are there too. */
void flap_tokenizer_finish_metaspace(flap_tokenizer *tokenizer);

#endif
