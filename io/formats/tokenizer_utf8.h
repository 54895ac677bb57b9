/* UTF-8, strictly: no surrogates, no long forms, nothing past U+10FFFF. Folder-private. */
#ifndef FLAP_IO_FORMATS_TOKENIZER_UTF8_H
#define FLAP_IO_FORMATS_TOKENIZER_UTF8_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* The length of the character at `text`, 0 if there is none in the `bytes` bytes. */
static inline unsigned flap_utf8_decode(const char *text, uint64_t bytes, uint32_t *code_out) {
  const unsigned char *at = (const unsigned char *)text;
  if (bytes == 0)
    return 0;
  uint32_t code = at[0];
  if (code < 0x80) {
    *code_out = code;
    return 1;
  }
  unsigned length = code >= 0xF0 ? 4 : code >= 0xE0 ? 3 : 2;
  if (code < 0xC2 || code > 0xF4 || bytes < length)
    return 0;
  code &= 0xFFu >> (length + 1);
  for (unsigned i = 1; i < length; i++) {
    if ((at[i] & 0xC0) != 0x80)
      return 0;
    code = code << 6 | (at[i] & 0x3Fu);
  }
  static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  if (code < least[length] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
    return 0;
  *code_out = code;
  return length;
}

/* Writes at most 4 bytes; returns how many. */
static inline unsigned flap_utf8_encode(uint32_t code, char *out) {
  if (code < 0x80) {
    out[0] = (char)code;
    return 1;
  }
  if (code < 0x800) {
    out[0] = (char)(0xC0 | code >> 6);
    out[1] = (char)(0x80 | (code & 0x3F));
    return 2;
  }
  if (code < 0x10000) {
    out[0] = (char)(0xE0 | code >> 12);
    out[1] = (char)(0x80 | (code >> 6 & 0x3F));
    out[2] = (char)(0x80 | (code & 0x3F));
    return 3;
  }
  out[0] = (char)(0xF0 | code >> 18);
  out[1] = (char)(0x80 | (code >> 12 & 0x3F));
  out[2] = (char)(0x80 | (code >> 6 & 0x3F));
  out[3] = (char)(0x80 | (code & 0x3F));
  return 4;
}

/* How many leading bytes are whole, valid characters. */
static inline uint64_t flap_utf8_valid(const char *text, uint64_t bytes) {
  uint64_t at = 0;
  uint32_t code;
  while (at < bytes) {
    unsigned length = flap_utf8_decode(text + at, bytes - at, &code);
    if (length == 0)
      break;
    at += length;
  }
  return at;
}

/* The character that ends just before `at`; its length, 0 at the start or after a byte that is no part of one. */
static inline unsigned flap_utf8_decode_before(const char *text, uint64_t at, uint32_t *code_out) {
  for (unsigned length = 1; length <= 4 && length <= at; length++) {
    if (((unsigned char)text[at - length] & 0xC0) != 0x80)
      return flap_utf8_decode(text + at - length, length, code_out) == length ? length : 0;
  }
  return 0;
}

/* Unicode's White_Space. */
static inline bool flap_utf8_is_space(uint32_t code) {
  return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 || code == 0x1680 ||
         (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F ||
         code == 0x3000;
}

/* A file's text for a message: at most 60 bytes of whole characters, control characters replaced. */
#define FLAP_UTF8_SHOWN_BYTES 64u
static inline const char *flap_utf8_show(const char *text, char buffer[FLAP_UTF8_SHOWN_BYTES]) {
  uint64_t used = 0;
  uint32_t code = 0;
  for (unsigned length; *text != '\0' && used < FLAP_UTF8_SHOWN_BYTES - 5; text += length) {
    uint64_t rest = strnlen(text, 4);
    length = flap_utf8_decode(text, rest, &code);
    bool shown = length > 0 && code >= 0x20 && (code < 0x7F || code >= 0xA0) && code != 0x2028 && code != 0x2029;
    length += length == 0;
    used += shown ? flap_utf8_encode(code, buffer + used) : flap_utf8_encode('?', buffer + used);
  }
  buffer[used] = '\0';
  return buffer;
}

#endif
