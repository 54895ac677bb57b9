/* Text to token ids and back: a built-in byte tokenizer, and BPE from a Hugging Face tokenizer.json, byte-level (GPT-2,
 * Llama 3, Qwen2) or in the style of SentencePiece (Llama 2, TinyLlama, Mistral, Phi-3, Gemma).
 *
 * Role: the same ids, and the same text from ids, as the `tokenizers` library for the files that this reader accepts;
 * everything else in a tokenizer.json is refused with FLAP_UNSUPPORTED, the file and the key named, so no text is ever
 * tokenised in another way than its model expects. Accepted: model BPE (merges as "a b" or ["a", "b"]); added tokens;
 * post_processor ByteLevel and TemplateProcessing; and
 *   byte-level: pre_tokenizer ByteLevel, or a Sequence of Split and Digits that ends with ByteLevel; normalizer none or
 *     NFC; decoder ByteLevel; ignore_merges;
 *   with byte_fallback and all of <0x00> to <0xFF>: normalizer none, or Prepend of U+2581 and Replace of spaces by it,
 * or one of them; pre_tokenizer none, Metaspace, or a Split at spaces where none are left; decoder Replace or
 * Metaspace, then ByteFallback, Fuse, and Strip at the start, any of which may be missing.
 *
 * White space is Unicode's; letters and digits are what PCRE2's version of Unicode says, so a character that is newer
 * than that may be split off its word where the library, with newer tables, does not. NFC is that of Unicode 14, and
 * the library's may be of an older one: marks that came in between are put in order here, and there not. truncation and
 * padding are ignored, as they are by default in transformers.
 *
 * It knows nothing of models or devices. Threading: one thread at a time per tokenizer (encode keeps a word
 * cache); the functions that take a const tokenizer may run on several threads at once while nobody encodes.
 */
#ifndef FLAP_IO_FORMATS_TOKENIZER_H
#define FLAP_IO_FORMATS_TOKENIZER_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_tokenizer flap_tokenizer;

/* A list of ids that grows. Start with {0}; set count to 0 to use it again. */
typedef struct flap_ids {
  int32_t *ids;
  uint64_t count;
  uint64_t capacity;
} flap_ids;

void flap_ids_free(flap_ids *ids);

/* Ids 0 to 255 are the bytes, 256 is the end token "<|endoftext|>"; vocabulary 257. */
FLAP_CHECKED flap_status flap_tokenizer_open_bytes(flap_tokenizer **tokenizer_out);

/* `path` is a tokenizer.json or a folder that holds one. tokenizer_config.json, special_tokens_map.json and
 * config.json beside a file of that name are read for the begin and end tokens, where they exist. FLAP_NOT_FOUND,
 * FLAP_INVALID (malformed) and FLAP_UNSUPPORTED name the file and the key. */
FLAP_CHECKED flap_status flap_tokenizer_open(const char *path, flap_tokenizer **tokenizer_out);
void flap_tokenizer_close(flap_tokenizer *tokenizer); /* NULL is fine */

/* The path it came from, or "bytes". Lives as long as the tokenizer. */
const char *flap_tokenizer_name(const flap_tokenizer *tokenizer);

/* The largest id + 1. */
uint32_t flap_tokenizer_vocabulary(const flap_tokenizer *tokenizer);

/* The tokens that end and begin a document, -1 where there is none. End: eos_token of tokenizer_config.json,
 * then of special_tokens_map.json, then eos_token_id of config.json, then the first of "<|endoftext|>",
 * "<|end_of_text|>", "</s>", "<eos>" that exists. Begin: likewise with bos, then the first token that the
 * post-processor puts before a text. */
int32_t flap_tokenizer_end(const flap_tokenizer *tokenizer);
int32_t flap_tokenizer_begin(const flap_tokenizer *tokenizer);

/* The id of a token as tokenizer.json spells it ("<|im_end|>", or "Ġthe"); -1 if there is none. */
int32_t flap_tokenizer_find(const flap_tokenizer *tokenizer, const char *token);

/* Whether the token is marked special in added_tokens: to be hidden from readers of generated text. */
bool flap_tokenizer_is_special(const flap_tokenizer *tokenizer, int32_t id);

/* Whether it is byte-level behind NFC, which is what transformers 5 makes of a model_type that it has a tokenizer class
 * for (qwen2), whatever tokenizer.json says. */
bool flap_tokenizer_is_nfc_byte_level(const flap_tokenizer *tokenizer);

typedef enum flap_tokenizer_flags {
  FLAP_TOKENIZER_BEGIN = 1,    /* first what the post-processor's template puts before a text */
  FLAP_TOKENIZER_END = 2,      /* last what it puts after a text */
  FLAP_TOKENIZER_SPECIAL = 3,  /* both: add_special_tokens=True of the library */
  FLAP_TOKENIZER_LITERAL = 4,  /* special tokens spelt out in the text are plain text */
  FLAP_TOKENIZER_CONTINUE = 8, /* the text continues an earlier piece: no space is put before it */
} flap_tokenizer_flags;

/* Appends the ids of `bytes` bytes of text (NUL bytes are text; need not be terminated). Bytes that are not UTF-8
 * are kept: each run of them is a word of its own, with byte_fallback of byte tokens, and no U+2581 is put behind it.
 * FLAP_NO_MEMORY; FLAP_INVALID for 2^30 bytes and more, and when the pre-tokenizer's pattern gives up. */
FLAP_CHECKED flap_status flap_tokenizer_encode(flap_tokenizer *tokenizer, const char *text, uint64_t bytes,
                                               unsigned flags, flap_ids *ids);

/* Where a long text may be cut so that the pieces, encoded one after the other (all but the first with
 * FLAP_TOKENIZER_CONTINUE), give the ids of the whole. Returns how many of the `bytes` bytes at `text` make the next
 * piece: all of them if bytes <= piece_bytes and `last` (nothing follows). Otherwise the first of these that there is:
 * the last line cut within piece_bytes; the last word cut within them; the first cut of either kind after them; all
 * bytes if `last`; the last newline; the last whole character.
 *
 * Byte-level: a line cut is between a newline that follows a character that is no white space and a character that is
 * none; a word cut is before a space that stands between two ASCII letters. There the published GPT-2, Llama-3 and
 * Qwen2 patterns always split, and NFC and added tokens never join (cuts that would tear an added token are passed
 * over, as are line cuts where add_prefix_space may put a space). With the last two kinds, and with other patterns, ids
 * at the cut may differ from those of the whole.
 *
 * With byte_fallback both kinds are one: after a character that is no white space and not U+2581, where no merge of the
 * vocabulary joins it to the next one and no added token begins, ends or goes on. There the ids are those of the whole
 * with every vocabulary and every text; with the last two kinds they may differ at the cut. These come up only where
 * FLAP_TOKENIZER_WINDOW_BYTES hold no such place: a single letter repeated, say.
 *
 * It depends on the text alone, so the pieces are the same whatever way the text was read, if the caller shows
 * min(rest, FLAP_TOKENIZER_WINDOW_BYTES) bytes each time. */
#define FLAP_TOKENIZER_PIECE_BYTES ((uint64_t)1 << 20)
#define FLAP_TOKENIZER_WINDOW_BYTES ((uint64_t)8 << 20)
uint64_t flap_tokenizer_cut(const flap_tokenizer *tokenizer, const char *text, uint64_t bytes, uint64_t piece_bytes,
                            bool last);

/* The bytes that the token stands for by itself; not terminated, not necessarily whole UTF-8 characters. NULL and 0 for
 * ids that do not exist. Lives as long as the tokenizer. For text use a stream: where it begins makes a difference. */
const char *flap_tokenizer_decode(const flap_tokenizer *tokenizer, int32_t id, uint64_t *bytes_out);

/* The text of ids that come one after the other. What put and end return, appended, is what the library's decode makes
 * of all of them: with byte_fallback, byte tokens are held back until another one follows, and are U+FFFD each if all
 * of them together are no UTF-8. A byte-level token's bytes are given as they are, at once; those that are no UTF-8,
 * which the library replaces, too. Ids that do not exist are passed over, as by the library; hiding special tokens is
 * up to the caller, by not putting them. Opening takes no memory; the tokenizer must outlive the stream. */
typedef struct flap_tokenizer_stream {
  const flap_tokenizer *tokenizer;
  uint32_t strip_spaces; /* still to be dropped where the text begins */
  bool begun;            /* a token was put */
  char *text, *run;      /* what is returned; byte tokens that are held back */
  uint64_t text_max, run_max, run_bytes;
} flap_tokenizer_stream;

void flap_tokenizer_stream_open(const flap_tokenizer *tokenizer, flap_tokenizer_stream *stream);
void flap_tokenizer_stream_close(flap_tokenizer_stream *stream); /* of {0} is fine */

/* The text that is certain now: not terminated, often of 0 bytes, never NULL; lives until the next call.
 * FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_tokenizer_stream_put(flap_tokenizer_stream *stream, int32_t id, const char **text_out,
                                                   uint64_t *bytes_out);
/* What was held back; more may be put afterwards, as what follows in the same text. */
FLAP_CHECKED flap_status flap_tokenizer_stream_end(flap_tokenizer_stream *stream, const char **text_out,
                                                   uint64_t *bytes_out);

/* Writes into an existing folder what `transformers` needs to give the same ids: copies of tokenizer.json,
 * tokenizer_config.json and special_tokens_map.json as they were opened (a missing tokenizer_config.json is
 * written), or new ones for the byte tokenizer. Each file is written under a temporary name, synced and renamed. */
FLAP_CHECKED flap_status flap_tokenizer_save(const flap_tokenizer *tokenizer, const char *folder);

#ifdef __cplusplus
}
#endif
#endif
