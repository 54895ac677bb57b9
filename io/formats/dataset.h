/* Training data: files of text or tokens, as sequences in a shuffled order that one integer describes.
 *
 * The token stream is the files in byte order of their paths, end to end:
 *   .txt    one document, as it is (line ends and a byte order mark are text)
 *   .jsonl  one document per line: the string `text` of a JSON object; blank lines are skipped
 *   .bin    tokens as llm.c writes them: 256 int32 of header (magic, version, token count), then uint16 (magic
 *           20240520, version 1) or uint32 (magic 20240801, version 7), little endian
 * Every document of text that is not empty is followed by the tokenizer's end token, and with begin_tokens preceded by
 * what the post-processor puts before a text, as run_clm.py of transformers does; .bin shards hold their own.
 * Text is tokenised once, at open, to a scratch file that is unlinked as soon as it is made.
 *
 * A sequence is a window of S+1 tokens, stride S: S inputs and the S tokens that follow each of them. The held-out
 * part is the last h*S + 1 tokens of the stream (h whole sequences); training sequences lie wholly before it, so no
 * held-out token is ever read in training, neither as input nor as target.
 *
 * Training sequence number i (counted since the start of training, over all epochs) is entry i % n of a permutation
 * of the n sequences that is a pure function of (seed, i / n): nothing is stored, and a cursor is one integer.
 *
 * It knows nothing of models or devices. Threading: after open, all functions may be called from several threads.
 */
#ifndef FLAP_IO_FORMATS_DATASET_H
#define FLAP_IO_FORMATS_DATASET_H

#include "base/status.h"
#include "io/formats/tokenizer.h"

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_dataset_config {
  const char *const *paths; /* files and globs; expanded, sorted, and each file taken once */
  uint32_t path_count;
  flap_tokenizer *tokenizer;  /* for text; may be NULL when all files are .bin. Not used after open */
  uint32_t vocabulary;        /* of the model: every id must be below it. 0: the tokenizer's */
  const char *scratch_folder; /* where the scratch file of tokens is made; needed for text only */
  uint64_t scratch_bytes_max; /* more than that is FLAP_BUDGET; 0: no limit */
  uint32_t sequence_length;   /* S > 0 */
  double val_size;   /* below 1: this fraction of all sequences, rounded down, but at least one; from 1: this many
                        sequences; 0: nothing is held out */
  bool heldout_all;  /* all is held out, from two tokens on, val_size says nothing, and there is none for training */
  uint64_t seed;     /* of the order */
  bool begin_tokens; /* documents of text start with the tokenizer's begin tokens */
  const volatile sig_atomic_t *stop; /* non-zero ends reading the files, with FLAP_INTERRUPTED; NULL: nothing does */
} flap_dataset_config;

/* Calls `visit` for each file that the paths name, until one fails; what open says of files that are not there, it says
 * too. */
typedef flap_status (*flap_dataset_visit_fn)(void *context, const char *path);
FLAP_CHECKED flap_status flap_dataset_visit(const char *const *paths, uint32_t path_count, flap_dataset_visit_fn visit,
                                            void *context);

typedef struct flap_dataset flap_dataset;

/* Expands, checks, tokenises, and reads everything once: ids that are too large, a glob without a match, a file that is
 * not what its name says, too few tokens for one sequence (or for the split) are errors that name the file, the
 * line where there is one, and the numbers. */
FLAP_CHECKED flap_status flap_dataset_open(const flap_dataset_config *config, flap_dataset **dataset_out);
void flap_dataset_close(flap_dataset *dataset); /* NULL is fine */

uint64_t
flap_dataset_sequences(const flap_dataset *dataset); /* training sequences in one epoch; > 0 unless all is held out */
uint64_t flap_dataset_heldout(const flap_dataset *dataset); /* held-out sequences */
uint64_t flap_dataset_tokens(const flap_dataset *dataset);  /* of the whole stream */
uint32_t flap_dataset_sequence_length(const flap_dataset *dataset);
uint64_t flap_dataset_scratch_bytes(const flap_dataset *dataset); /* on disk */

/* 64-bit digest of the token stream, S and the split (not of the seed): a resume can check that the data is what it
 * was. */
uint64_t flap_dataset_digest(const flap_dataset *dataset);

/* Mean negative log-probability of the held-out targets, in nats per token, under the frequencies of these targets
 * themselves, and under those of the training part (with one added to each count of the vocabulary, so that an unseen
 * token has a probability). A model that learnt anything but frequencies is below both. Needs held-out > 0. */
void flap_dataset_unigram_entropy(const flap_dataset *dataset, double *own_nats_out, double *train_nats_out);

/* Training sequences number first .. first+count-1: tokens (count, S), targets (count, S). Epochs follow each
 * other without a seam. Allocates nothing. FLAP_IO, FLAP_CORRUPT or FLAP_INVALID when a file changed meanwhile. */
FLAP_CHECKED flap_status flap_dataset_fetch(const flap_dataset *dataset, uint64_t first, uint64_t count,
                                            int32_t *tokens, int32_t *targets);

/* Held-out sequences first .. first+count-1, in the order of the text; first + count <= held-out. Where all is held out
 * the last may be shorter: behind its end tokens are 0 and targets -1. Stores how many targets there are. */
FLAP_CHECKED flap_status flap_dataset_fetch_heldout(const flap_dataset *dataset, uint64_t first, uint64_t count,
                                                    int32_t *tokens, int32_t *targets, uint64_t *targets_out);

/* Which window of the text training sequence number `index` is: [0, flap_dataset_sequences). */
uint64_t flap_dataset_window(const flap_dataset *dataset, uint64_t index);

/* What `flap tokenize` does: the stream of these files as one llm.c shard at out_path (version 1 when the
 * vocabulary is at most 65536, version 7 otherwise), written under a temporary name, synced and renamed. Uses paths,
 * tokenizer, vocabulary, begin_tokens and stop of the config. At most 2^31 - 1 tokens: the header has no room for
 * more. FLAP_INVALID when out_path is one of the files. */
FLAP_CHECKED flap_status flap_dataset_write_shard(const flap_dataset_config *config, const char *out_path,
                                                  uint64_t *tokens_out);

/* The bijection behind the order: element `index` of permutation `epoch` of n. Feistel network of Philox rounds with
 * cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). index < n, n > 0. */
uint64_t flap_dataset_permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t index);

#ifdef __cplusplus
}
#endif
#endif
