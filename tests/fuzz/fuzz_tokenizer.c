/* The first byte says which file of a tokenizer's folder the rest is; beside it stand good ones. What opens must encode
 * a text to ids that decode to bytes and to text, with byte_fallback in pieces to the same ids, and be saved and opened
 * again with the same ids. */
#include "io/formats/tokenizer.h"
#include "tests/fuzz/fuzz_rig.h"

#include <string.h>
#include <unistd.h>

static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                    "config.json"};
#define NAMES (sizeof names / sizeof *names)

static const char good[] =
    "{\"added_tokens\":[{\"id\":5,\"content\":\"<|end|>\",\"special\":true}],"
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true},"
    "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"\xc4\xa0\":"
    "3,\"\xc4\xa0"
    "a\":4},\"merges\":[\"a b\",\"\xc4\xa0 a\"]}}";

static const char text[] = "ab aab  \xe2\x96\x81 \xe2\x96\x81"
                           "b caf\xc3\xa9 e\xcc\x81 12345\r\n\n<|end|> it's \xff\xc3 \xf0\x9f\x98\x80\t\0 b";

static void use_stream(const flap_tokenizer *tokenizer, const int32_t *ids, uint64_t count) {
  flap_tokenizer_stream stream;
  flap_tokenizer_stream_open(tokenizer, &stream);
  const char *part;
  uint64_t bytes, used = 0;
  for (uint64_t i = 0; i <= count; i++) {
    flap_status status = i == count ? flap_tokenizer_stream_end(&stream, &part, &bytes)
                                    : flap_tokenizer_stream_put(&stream, ids[i], &part, &bytes);
    fuzz_must(status == FLAP_OK && part != NULL, "ids give text");
    for (uint64_t at = 0; at < bytes; at++)
      used += (unsigned char)part[at];
  }
  fuzz_must(used < UINT64_MAX, "text can be read");
  flap_tokenizer_stream_close(&stream);
}

static void use_pieces(flap_tokenizer *tokenizer, unsigned flags, const int32_t *ids, uint64_t count) {
  flap_ids pieces = {0};
  for (uint64_t at = 0, piece; at < sizeof text - 1; at += piece) {
    piece = flap_tokenizer_cut(tokenizer, text + at, sizeof text - 1 - at, 3, true);
    fuzz_must(piece > 0 && piece <= sizeof text - 1 - at, "a piece is some of the text");
    unsigned more = at > 0 ? FLAP_TOKENIZER_CONTINUE : 0;
    fuzz_must(flap_tokenizer_encode(tokenizer, text + at, piece, flags | more, &pieces) == FLAP_OK, "so is a piece");
  }
  fuzz_must(pieces.count == count && (count == 0 || memcmp(pieces.ids, ids, count * sizeof *ids) == 0),
            "pieces give the ids of the whole");
  flap_ids_free(&pieces);
}

/* Whether a byte token decodes to its byte, as with byte_fallback alone: then any text may be cut. */
static bool falls_back(const flap_tokenizer *tokenizer) {
  uint64_t bytes = 0;
  (void)flap_tokenizer_decode(tokenizer, flap_tokenizer_find(tokenizer, "<0x00>"), &bytes);
  return bytes == 1;
}

static void use(const char *folder, flap_ids *ids) {
  flap_tokenizer *tokenizer = NULL;
  flap_status status = flap_tokenizer_open(folder, &tokenizer);
  fuzz_must(status == FLAP_OK, "it can be opened");
  for (unsigned flags = 0; flags < 16; flags += flags == 3 ? 1 : 3) {
    uint64_t before = ids->count;
    status = flap_tokenizer_encode(tokenizer, text, sizeof text - 1, flags, ids);
    fuzz_must(status == FLAP_OK || status == FLAP_INVALID, "a text is encoded, or the pattern gives up");
    for (uint64_t i = before; status == FLAP_OK && i < ids->count; i++) {
      uint64_t bytes = 0;
      fuzz_must(ids->ids[i] >= 0 && (uint32_t)ids->ids[i] < flap_tokenizer_vocabulary(tokenizer),
                "ids are below the vocabulary");
      fuzz_must(flap_tokenizer_decode(tokenizer, ids->ids[i], &bytes) != NULL, "ids stand for bytes");
    }
    if (ids->count > before)
      use_stream(tokenizer, ids->ids + before, ids->count - before);
    if (falls_back(tokenizer) && (flags & (FLAP_TOKENIZER_SPECIAL | FLAP_TOKENIZER_CONTINUE)) == 0)
      use_pieces(tokenizer, flags, ids->ids + before, ids->count - before);
  }
  uint64_t cut = flap_tokenizer_cut(tokenizer, text, sizeof text - 1, 8, true);
  fuzz_must(cut > 0 && cut <= sizeof text - 1, "a piece is some of the text");
  fuzz_must(flap_tokenizer_end(tokenizer) < (int64_t)flap_tokenizer_vocabulary(tokenizer) &&
                flap_tokenizer_begin(tokenizer) < (int64_t)flap_tokenizer_vocabulary(tokenizer),
            "begin and end are ids");
  flap_tokenizer_close(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static bool ready;
  if (!ready) {
    fuzz_folder("in");
    fuzz_folder("out");
    ready = true;
  }
  if (bytes == 0)
    return 0;
  for (size_t i = 1; i < NAMES; i++) {
    char name[64] = "in/";
    (void)unlink(fuzz_path(strcat(name, names[i])));
  }
  char name[64] = "in/";
  fuzz_text("in/tokenizer.json", good);
  fuzz_write(strcat(name, names[data[0] % NAMES]), data + 1, bytes - 1);
  flap_tokenizer *tokenizer = NULL;
  flap_status status = flap_tokenizer_open(fuzz_path("in"), &tokenizer);
  if (status != FLAP_OK) {
    fuzz_refused(status, fuzz_path("in"));
    return 0;
  }
  flap_ids ids = {0}, again = {0};
  use(fuzz_path("in"), &ids);
  fuzz_must(flap_tokenizer_save(tokenizer, fuzz_path("out")) == FLAP_OK, "it can be saved");
  flap_tokenizer_close(tokenizer);
  use(fuzz_path("out"), &again);
  fuzz_must(ids.count == again.count &&
                (ids.count == 0 || memcmp(ids.ids, again.ids, ids.count * sizeof *ids.ids) == 0),
            "what was saved gives the same ids");
  flap_ids_free(&ids);
  flap_ids_free(&again);
  return 0;
}
