/* A tokenizer.json that is malformed, hostile or not of our kind gives one clear line, and never a crash. */
#include "io/formats/tokenizer.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BASE "tests/formats/data/tokenizer_qwen2.json"
#define PIECES_BASE "tests/formats/data/tokenizer_llama2.json"
static const char *const bases[] = {BASE, PIECES_BASE};

static flap_status open_text(const char *text, size_t bytes) {
  scratch_write("tokenizer.json", text, bytes);
  flap_tokenizer *tokenizer = NULL;
  flap_status status = flap_tokenizer_open(scratch_path(""), &tokenizer);
  ck_assert((status == FLAP_OK) == (tokenizer != NULL));
  if (status == FLAP_OK) {
    flap_ids ids = {0};
    static const char sample[] = "The lighthouse keeper's  caf\xc3\xa9 e\xcc\x81 12345\n\n<|im_start|> \xff";
    flap_status encoded = flap_tokenizer_encode(tokenizer, sample, sizeof sample - 1, FLAP_TOKENIZER_SPECIAL, &ids);
    ck_assert(encoded == FLAP_OK || encoded == FLAP_INVALID);
    for (uint64_t i = 0; i < ids.count; i++) {
      uint64_t count;
      ck_assert_ptr_nonnull(flap_tokenizer_decode(tokenizer, ids.ids[i], &count));
    }
    flap_ids_free(&ids);
  } else {
    ck_assert_uint_gt(strlen(flap_error_message()), 0);
  }
  flap_tokenizer_close(tokenizer);
  return status;
}

/* Puts `value` (JSON) at a path like "model.type" or "added_tokens.0.id" of a file that is good. */
static json_t *with_change(const char *base, const char *path, const char *value) {
  json_t *root = json_load_file(base, 0, NULL);
  json_t *new_value = json_loads(value, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
  ck_assert(root != NULL && new_value != NULL);
  char parts[128];
  (void)snprintf(parts, sizeof parts, "%s", path);
  json_t *at = root;
  char *save = NULL, *part = strtok_r(parts, ".", &save), *next;
  while ((next = strtok_r(NULL, ".", &save)) != NULL) {
    at = json_is_array(at) ? json_array_get(at, (size_t)atoi(part)) : json_object_get(at, part);
    ck_assert_ptr_nonnull(at);
    part = next;
  }
  ck_assert_int_eq(json_is_array(at) ? json_array_set_new(at, (size_t)atoi(part), new_value)
                                     : json_object_set_new(at, part, new_value),
                   0);
  return root;
}

static flap_status open_changed_of(const char *base, const char *path, const char *value) {
  json_t *root = with_change(base, path, value);
  char *text = json_dumps(root, 0);
  ck_assert_ptr_nonnull(text);
  flap_status status = open_text(text, strlen(text));
  free(text);
  json_decref(root);
  return status;
}

static flap_status open_changed(const char *path, const char *value) {
  return open_changed_of(BASE, path, value);
}

typedef struct change {
  const char *path, *value;
  flap_status status;
  const char *message; /* NULL for FLAP_OK */
} change;

static const change changes[] = {
    {"version", "\"1.0\"", FLAP_OK, NULL},
    {"truncation", "{\"max_length\": 3}", FLAP_OK, NULL}, /* what transformers does with it is off by default */
    {"model", "3", FLAP_INVALID, "model"},
    {"model.type", "\"Unigram\"", FLAP_UNSUPPORTED, "model.type: Unigram"},
    {"model.byte_fallback", "true", FLAP_INVALID, "all of <0x00> to <0xFF> must be there: <0x00> is missing"},
    {"model.byte_fallback", "1", FLAP_INVALID, "model.byte_fallback"},
    {"model.dropout", "0.1", FLAP_UNSUPPORTED, "model.dropout"},
    {"model.end_of_word_suffix", "\"</w>\"", FLAP_UNSUPPORTED, "model.end_of_word_suffix"},
    {"model.continuing_subword_prefix", "\"##\"", FLAP_UNSUPPORTED, "model.continuing_subword_prefix"},
    {"model.unk_token", "\"<|endoftext|>\"", FLAP_OK, NULL}, /* all bytes are there: it cannot come up */
    {"model.vocab", "{}", FLAP_INVALID, "merges"},
    {"model.vocab", "[]", FLAP_INVALID, "model.vocab"},
    {"model.vocab.a", "-1", FLAP_INVALID, "\"a\""},
    {"model.vocab.a", "4000000000", FLAP_INVALID, "\"a\""},
    {"model.vocab.a", "16777216", FLAP_INVALID, "\"a\""},
    {"model.vocab.a", "\"x\"", FLAP_INVALID, "\"a\""},
    {"model.vocab.a", "7", FLAP_INVALID, "two tokens have the id 7"},
    {"model.merges", "null", FLAP_INVALID, "model.merges"},
    {"model.merges.0", "\"a b c\"", FLAP_INVALID, "entry 0"},
    {"model.merges.0", "[\"a\"]", FLAP_INVALID, "entry 0"},
    {"model.merges.0", "\"\xe2\x82\xac a\"", FLAP_INVALID, "left half"},
    {"model.merges.0", "[\"\", \"\"]", FLAP_INVALID, "left half"},
    {"model.merges.0", "[\"\", \"a\"]", FLAP_INVALID, "its left half is empty"},
    {"model.merges.0", "\"a \"", FLAP_INVALID, "its right half is empty"},
    {"model.merges.0", "[\"q\", \"~\"]", FLAP_INVALID, "what it makes"},
    {"added_tokens", "{}", FLAP_INVALID, "added_tokens"},
    {"added_tokens.0", "7", FLAP_INVALID, "added_tokens[0]"},
    {"added_tokens.0.id", "5", FLAP_INVALID, "5 is the id of another token"},
    {"added_tokens.0.id", "1048576", FLAP_OK, NULL},
    {"added_tokens.0.id", "16777215", FLAP_INVALID, "the largest id is 16777215"},
    {"added_tokens.0.id", "16777216", FLAP_INVALID, "added_tokens[0].id"},
    {"added_tokens.0.content", "\"a\"", FLAP_INVALID, "here and"},
    {"added_tokens.0.content", "\"\"", FLAP_OK, NULL},
    {"added_tokens.0.single_word", "true", FLAP_UNSUPPORTED, "added_tokens[0].single_word"},
    {"added_tokens.0.special", "1", FLAP_INVALID, "added_tokens[0].special"},
    {"normalizer", "null", FLAP_OK, NULL},
    {"normalizer", "{\"type\": \"Prepend\", \"prepend\": \"\\u2581\"}", FLAP_UNSUPPORTED, "normalizer.type: Prepend"},
    {"normalizer", "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFC\"}, {\"type\": \"Replace\"}]}",
     FLAP_UNSUPPORTED, "normalizers[1].type: Replace"},
    {"normalizer", "\"NFC\"", FLAP_INVALID, "normalizer"},
    {"pre_tokenizer", "null", FLAP_UNSUPPORTED, "pre_tokenizer"},
    {"pre_tokenizer.type", "\"Metaspace\"", FLAP_UNSUPPORTED, "pre_tokenizer.type: Metaspace"},
    {"pre_tokenizer.pretokenizers", "[]", FLAP_UNSUPPORTED, "ByteLevel"},
    {"pre_tokenizer.pretokenizers.0.behavior", "\"MergedWithNext\"", FLAP_UNSUPPORTED, "behavior: MergedWithNext"},
    {"pre_tokenizer.pretokenizers.0.type", "\"ByteLevel\"", FLAP_UNSUPPORTED, "after ByteLevel"},
    {"pre_tokenizer.pretokenizers.0.pattern", "{\"String\": \"..\"}", FLAP_OK, NULL},
    {"pre_tokenizer.pretokenizers.0.pattern", "{\"Glob\": \"*\"}", FLAP_INVALID, "pattern.Regex"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(\"", FLAP_UNSUPPORTED, "not understood"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\bx\"", FLAP_UNSUPPORTED, "escape"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"[a&&b]\"", FLAP_UNSUPPORTED, "classes in classes"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"[a\"", FLAP_UNSUPPORTED, "not closed"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"a{2}+\"", FLAP_UNSUPPORTED, "differently"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(?(1)a|b)\"", FLAP_UNSUPPORTED, "group"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(?R)\"", FLAP_UNSUPPORTED, "group"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(*LIMIT_MATCH=1)a\"", FLAP_UNSUPPORTED, "group"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\p{NoSuchScript}\"", FLAP_UNSUPPORTED, "not understood"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\p{Han}+|\\\\u0041|\\\\x41|\\\\v|[\\\\s\\\\-\\\\]]\"",
     FLAP_OK, NULL},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\\"", FLAP_UNSUPPORTED, "escape"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\pL\"", FLAP_UNSUPPORTED, "braces"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\p{L\"", FLAP_UNSUPPORTED, "not closed"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\p{}\"", FLAP_UNSUPPORTED, "not closed"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\p{L-M}\"", FLAP_UNSUPPORTED, "categories and scripts"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\u12\"", FLAP_UNSUPPORTED, "malformed"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\x{41\"", FLAP_UNSUPPORTED, "malformed"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\xff\"", FLAP_UNSUPPORTED, "past 7f"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"[\\\\S]\"", FLAP_UNSUPPORTED, "in a class"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"[]\"", FLAP_UNSUPPORTED, "an empty class"},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(?i)ab|\\\\P{L}+|\\\\p{Greek}\"", FLAP_OK, NULL},
    {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\"", FLAP_OK, NULL},
    {"decoder", "{\"type\": \"WordPiece\"}", FLAP_UNSUPPORTED, "decoder.type: WordPiece"},
    {"decoder", "null", FLAP_OK, NULL},
    {"post_processor", "{\"type\": \"BertProcessing\"}", FLAP_UNSUPPORTED, "post_processor.type: BertProcessing"},
    {"post_processor", "{\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"x\"}}]}",
     FLAP_INVALID, "special_tokens"},
    {"post_processor",
     "{\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"x\"}}], "
     "\"special_tokens\": {\"x\": {\"ids\": [99999999]}}}",
     FLAP_INVALID, "ids"},
    {"post_processor", "{\"type\": \"TemplateProcessing\", \"single\": []}", FLAP_UNSUPPORTED, "without the text"},
};

static void assert_change(const char *base, const change *c) {
  flap_status status = open_changed_of(base, c->path, c->value);
  ck_assert_msg(status == c->status, "%s = %s is %s: %s", c->path, c->value, flap_status_name(status),
                flap_error_message());
  if (status != FLAP_OK) {
    ck_assert_msg(scratch_error_has("tokenizer.json"), "%s", flap_error_message());
    ck_assert_msg(scratch_error_has(c->message), "%s", flap_error_message());
  }
}

START_TEST(tokenizer_json_of_another_kind_names_file_and_key) {
  assert_change(BASE, &changes[_i]);
}
END_TEST

#define MARK "\\u2581"
#define REPLACE "{\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"" MARK "\"}"
#define BACK "{\"type\": \"Replace\", \"pattern\": {\"String\": \"" MARK "\"}, \"content\": \" \"}"
#define METASPACE(more) "{\"type\": \"Metaspace\", \"replacement\": \"" MARK "\"" more "}"
#define STRIP(content, start, stop) \
  "{\"type\": \"Strip\", \"content\": \"" content "\", \"start\": " start ", \"stop\": " stop "}"
#define DECODERS(list) "{\"type\": \"Sequence\", \"decoders\": [" list "]}"
#define FUSE "{\"type\": \"Fuse\"}"
#define FALLBACK "{\"type\": \"ByteFallback\"}"

static const change piece_changes[] = {
    {"version", "\"1.0\"", FLAP_OK, NULL},
    {"model.byte_fallback", "false", FLAP_UNSUPPORTED, "model.unk_token"},
    {"model.ignore_merges", "true", FLAP_UNSUPPORTED, "model.ignore_merges"},
    {"model.ignore_merges", "false", FLAP_OK, NULL},
    {"model.fuse_unk", "false", FLAP_OK, NULL}, /* with all bytes there nothing is unknown */
    {"model.fuse_unk", "\"yes\"", FLAP_INVALID, "model.fuse_unk"},
    {"model.unk_token", "\"<gone>\"", FLAP_INVALID, "model.unk_token: \"<gone>\" is not in the vocabulary"},
    {"model.unk_token", "null", FLAP_OK, NULL},
    {"model.dropout", "0.5", FLAP_UNSUPPORTED, "model.dropout"},
    {"model.type", "\"Unigram\"", FLAP_UNSUPPORTED, "model.type: Unigram"},
    {"model.type", "\"WordPiece\"", FLAP_UNSUPPORTED, "model.type: WordPiece"},
    {"model.vocab", "{\"a\": 0}", FLAP_INVALID, "<0x00> is missing"},
    {"model.merges.0", "[\"a\", \"<0x00>\"]", FLAP_INVALID, "what it makes"},
    {"model.merges.0", "\"a " MARK "\"", FLAP_INVALID, "what it makes"},
    {"normalizer", "null", FLAP_OK, NULL},
    {"normalizer", REPLACE, FLAP_OK, NULL},
    {"normalizer", "{\"type\": \"NFKC\"}", FLAP_UNSUPPORTED, "normalizer.type: NFKC"},
    {"normalizer", "{\"type\": \"Precompiled\"}", FLAP_UNSUPPORTED, "normalizer.type: Precompiled"},
    {"normalizer", "{\"type\": \"Prepend\", \"prepend\": \"_\"}", FLAP_UNSUPPORTED, "normalizer.prepend: _"},
    {"normalizer.normalizers.1", "{\"type\": \"Prepend\", \"prepend\": \"" MARK "\"}", FLAP_UNSUPPORTED,
     "normalizers[1].type: a second Prepend"},
    {"normalizer.normalizers.1.content", "\"_\"", FLAP_UNSUPPORTED, "normalizers[1].content: _"},
    {"normalizer.normalizers.1.pattern", "{\"Regex\": \" \"}", FLAP_UNSUPPORTED, "normalizers[1].pattern"},
    {"normalizer.normalizers.1.pattern", "{\"String\": \"a\"}", FLAP_UNSUPPORTED, "normalizers[1].pattern: a"},
    {"normalizer.normalizers.1.pattern", "7", FLAP_INVALID, "normalizers[1].pattern"},
    {"normalizer.normalizers.1", "7", FLAP_INVALID, "normalizers[1]"},
    {"pre_tokenizer", METASPACE(""), FLAP_OK, NULL},
    {"pre_tokenizer", METASPACE(", \"prepend_scheme\": \"first\", \"split\": false"), FLAP_OK, NULL},
    {"pre_tokenizer", METASPACE(", \"add_prefix_space\": false"), FLAP_OK, NULL},
    {"pre_tokenizer", METASPACE(", \"prepend_scheme\": \"last\""), FLAP_UNSUPPORTED,
     "pre_tokenizer.prepend_scheme: last"},
    {"pre_tokenizer", METASPACE(", \"prepend_scheme\": \"first\", \"add_prefix_space\": false"), FLAP_INVALID,
     "contradicts"},
    {"pre_tokenizer", "{\"type\": \"Metaspace\"}", FLAP_INVALID, "pre_tokenizer.replacement"},
    {"pre_tokenizer", "{\"type\": \"Metaspace\", \"replacement\": \"_\"}", FLAP_UNSUPPORTED, "replacement: _"},
    {"pre_tokenizer", "{\"type\": \"Sequence\", \"pretokenizers\": [" METASPACE("") ", " METASPACE("") "]}",
     FLAP_UNSUPPORTED, "pretokenizers[1].type: a stage beside Metaspace"},
    {"pre_tokenizer", "{\"type\": \"Sequence\", \"pretokenizers\": []}", FLAP_OK, NULL},
    {"pre_tokenizer", "{\"type\": \"ByteLevel\"}", FLAP_UNSUPPORTED, "pre_tokenizer.type: ByteLevel"},
    {"pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"String\": \" \"}, \"behavior\": \"Isolated\"}", FLAP_OK,
     NULL},
    {"pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"String\": \"a\"}, \"behavior\": \"Isolated\"}",
     FLAP_UNSUPPORTED, "pre_tokenizer.pattern"},
    {"pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"Regex\": \" \"}, \"behavior\": \"Isolated\"}",
     FLAP_UNSUPPORTED, "pre_tokenizer.pattern"},
    {"decoder", "null", FLAP_UNSUPPORTED, "decoder: none"},
    {"decoder", METASPACE(""), FLAP_OK, NULL},
    {"decoder", BACK, FLAP_OK, NULL},
    {"decoder", "{\"type\": \"ByteLevel\"}", FLAP_UNSUPPORTED, "decoder.type: ByteLevel"},
    {"decoder", DECODERS(""), FLAP_OK, NULL},
    {"decoder", DECODERS(BACK ", " FALLBACK ", " FUSE ", " STRIP(" ", "1", "0")), FLAP_OK, NULL},
    {"decoder", DECODERS(FALLBACK ", " BACK), FLAP_UNSUPPORTED, "decoders[1].type: a decoder in another order"},
    {"decoder", DECODERS(BACK ", " STRIP(" ", "1", "0")), FLAP_UNSUPPORTED,
     "decoders[1].type: a decoder in another order"},
    {"decoder", DECODERS(FUSE ", " STRIP(" ", "1", "1")), FLAP_UNSUPPORTED, "decoders[1].stop"},
    {"decoder", DECODERS(FUSE ", " STRIP("a", "1", "0")), FLAP_UNSUPPORTED, "decoders[1].content: a"},
    {"decoder", DECODERS(FUSE ", " STRIP(" ", "-1", "0")), FLAP_INVALID, "decoders[1].start"},
    {"decoder", DECODERS("7"), FLAP_INVALID, "decoders[0]"},
    {"decoder", DECODERS(DECODERS("")), FLAP_UNSUPPORTED, "decoders[0].type: Sequence"},
    {"added_tokens.3.content", "\"a long  text with " MARK " and   spaces        in it\"", FLAP_OK, NULL},
    {"added_tokens.3.single_word", "true", FLAP_UNSUPPORTED, "added_tokens[3].single_word"},
};

START_TEST(tokenizer_json_with_byte_fallback_names_file_and_key) {
  assert_change(PIECES_BASE, &piece_changes[_i]);
}
END_TEST

START_TEST(tokenizer_json_with_byte_fallback_needs_every_byte) {
  for (unsigned byte = 0; byte < 256; byte += 51) {
    char key[8];
    (void)snprintf(key, sizeof key, "<0x%02X>", byte);
    json_t *root = json_load_file(PIECES_BASE, 0, NULL);
    ck_assert_int_eq(json_object_del(json_object_get(json_object_get(root, "model"), "vocab"), key), 0);
    char *text = json_dumps(root, 0);
    ck_assert_int_eq(open_text(text, strlen(text)), FLAP_INVALID);
    ck_assert_msg(scratch_error_has(key) && scratch_error_has("model.vocab"), "%s", flap_error_message());
    free(text);
    json_decref(root);
  }
}
END_TEST

/* Ids may have gaps, and a template must not point into one: its text would have a token that stands for nothing. */
START_TEST(tokenizer_template_with_an_id_in_a_gap_is_refused) {
#define WITH_TEMPLATE(id)                                                                                        \
  "{\"model\": {\"vocab\": {\"a\": 0, \"b\": 7}, \"merges\": []}, \"pre_tokenizer\": {\"type\": \"ByteLevel\"}," \
  "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"b\"}}, "    \
  "{\"Sequence\": {\"id\": \"A\"}}], \"special_tokens\": {\"b\": {\"ids\": [" id "]}}}}"
  static const char good[] = WITH_TEMPLATE("7"), bad[] = WITH_TEMPLATE("5");
  ck_assert_int_eq(open_text(good, sizeof good - 1), FLAP_OK);
  ck_assert_int_eq(open_text(bad, sizeof bad - 1), FLAP_INVALID);
  ck_assert(scratch_error_has("tokenizer.json") && scratch_error_has("ids: 5 is not the id of a token"));
}
END_TEST

START_TEST(tokenizer_errors_are_one_line_whatever_the_file_says) {
  static const char *const cases[][2] = {
      {"model.type", "\"Un\\ni\\u0007gram\""},
      {"model.vocab", "{\"a\\nb\\u001b\": -1}"},
      {"added_tokens.0.content", "\"\\n\""},
      {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(\\n\\u0085\\u2028\""},
      {"pre_tokenizer.pretokenizers.0.behavior", "\"\\r\\u009f\\n\""},
      {"model.merges.0", "\"\\n \\n\""},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    if (open_changed(cases[i][0], cases[i][1]) == FLAP_OK)
      continue;
    for (const char *at = flap_error_message(); *at != '\0'; at++)
      ck_assert_msg((unsigned char)*at >= 0x20 && *at != 0x7f, "case %zu has a control character", i);
  }
}
END_TEST

START_TEST(tokenizer_json_cut_short_anywhere_is_refused) {
  json_t *root = json_load_file(bases[_i], 0, NULL);
  char *text = json_dumps(root, 0);
  size_t bytes = strlen(text);
  for (size_t length = 0; length < bytes; length += length < 300 ? 1 : 401)
    ck_assert_int_eq(open_text(text, length), FLAP_INVALID);
  free(text);
  json_decref(root);
}
END_TEST

/* One byte changed at a time, from a fixed generator: whatever it means then, it must not crash or leak. */
START_TEST(tokenizer_json_with_changed_bytes_never_crashes) {
  json_t *root = json_load_file(bases[_i], 0, NULL);
  char *text = json_dumps(root, 0);
  size_t bytes = strlen(text);
  uint32_t state = 12345;
  unsigned opened = 0;
  for (int i = 0; i < 400; i++) {
    state = state * 1664525u + 1013904223u;
    size_t at = state % bytes;
    char old = text[at];
    state = state * 1664525u + 1013904223u;
    text[at] = "0{}[]\",:\\a-9 \xc3"[(state >> 20) % 14];
    opened += open_text(text, bytes) == FLAP_OK;
    text[at] = old;
  }
  ck_assert_uint_gt(opened, 0);
  ck_assert_uint_lt(opened, 400);
  free(text);
  json_decref(root);
}
END_TEST

START_TEST(tokenizer_pattern_without_end_gives_up) {
  flap_status status = open_changed("pre_tokenizer.pretokenizers.0.pattern.Regex", "\"(?:a+)+[bc]\"");
  ck_assert_int_eq(status, FLAP_OK);
  flap_tokenizer *tokenizer;
  ck_assert_int_eq(flap_tokenizer_open(scratch_path(""), &tokenizer), FLAP_OK);
  char text[64];
  memset(text, 'a', sizeof text);
  flap_ids ids = {0};
  ck_assert_int_eq(flap_tokenizer_encode(tokenizer, text, sizeof text, 0, &ids), FLAP_INVALID);
  ck_assert(scratch_error_has("gave up"));
  flap_ids_free(&ids);
  flap_tokenizer_close(tokenizer);
}
END_TEST

START_TEST(tokenizer_files_beside_are_checked) {
  static const struct {
    const char *name, *text, *message;
  } cases[] = {
      {"tokenizer_config.json", "{\"eos_token\": \"</nope>\"}", "eos_token"},
      {"tokenizer_config.json", "{\"bos_token\": 3}", "bos_token"},
      {"tokenizer_config.json", "[", "tokenizer_config.json"},
      {"special_tokens_map.json", "{\"eos_token\": {\"id\": 3}}", "eos_token"},
      {"config.json", "{\"eos_token_id\": 99999}", "eos_token_id"},
      {"config.json", "{\"eos_token_id\": []}", "eos_token_id"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    scratch_text(cases[i].name, cases[i].text);
    ck_assert_int_eq(open_changed("version", "\"1.0\""), FLAP_INVALID);
    ck_assert_msg(scratch_error_has(cases[i].message) && scratch_error_has(cases[i].name), "%s", flap_error_message());
    ck_assert_int_eq(remove(scratch_path(cases[i].name)), 0);
  }
  scratch_text("tokenizer_config.json", "{\"model_max_length\": 1000000000000000019884624838656}");
  scratch_text("config.json", "{\"eos_token_id\": [1202, 1200], \"bos_token_id\": 1201}");
  ck_assert_int_eq(open_changed("version", "\"1.0\""), FLAP_OK);
  flap_tokenizer *tokenizer;
  ck_assert_int_eq(flap_tokenizer_open(scratch_path("tokenizer.json"), &tokenizer), FLAP_OK);
  ck_assert_int_eq(flap_tokenizer_end(tokenizer), 1202);
  ck_assert_int_eq(flap_tokenizer_begin(tokenizer), 1201);
  flap_tokenizer_close(tokenizer);
  ck_assert_int_eq(flap_tokenizer_open(scratch_path("missing"), &tokenizer), FLAP_NOT_FOUND);
  ck_assert(scratch_error_has("missing"));
}
END_TEST

int main(void) {
  Suite *suite = suite_create("formats");
  TCase *cases = tcase_create("tokenizer_hostile");
  tcase_set_timeout(cases, 120);
  tcase_add_checked_fixture(cases, scratch_setup, scratch_teardown);
  tcase_add_loop_test(cases, tokenizer_json_of_another_kind_names_file_and_key, 0,
                      (int)(sizeof changes / sizeof changes[0]));
  tcase_add_loop_test(cases, tokenizer_json_with_byte_fallback_names_file_and_key, 0,
                      (int)(sizeof piece_changes / sizeof piece_changes[0]));
  tcase_add_test(cases, tokenizer_json_with_byte_fallback_needs_every_byte);
  tcase_add_test(cases, tokenizer_template_with_an_id_in_a_gap_is_refused);
  tcase_add_test(cases, tokenizer_errors_are_one_line_whatever_the_file_says);
  tcase_add_loop_test(cases, tokenizer_json_cut_short_anywhere_is_refused, 0, 2);
  tcase_add_loop_test(cases, tokenizer_json_with_changed_bytes_never_crashes, 0, 2);
  tcase_add_test(cases, tokenizer_pattern_without_end_gives_up);
  tcase_add_test(cases, tokenizer_files_beside_are_checked);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed != 0;
}
