/* JSON files with errors for people, over jansson. */
#include "io/formats/json_file.h"

#include "io/formats/durable.h"

#include "base/system.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MESSAGE_BYTES 512
#define WHOLE_DOUBLE_MAX 9007199254740992.0 /* 2^53: beyond it a double does not name one integer */

/* ---- loading ------------------------------------------------------------------------------------------- */

/* Python writes these by default; people then ask why a file that Python reads is refused. */
const char *flap_json_hint(const char *text) {
  const bool is_about_nan = strstr(text, "near 'NaN") || strstr(text, "near 'Infinity") ||
                            strstr(text, "near '-Infinity") || strstr(text, "near '-'");
  return is_about_nan ? " (NaN and Infinity are not JSON: write null or a number)" : "";
}

/* Jansson's requests for memory come here, and what it does when one is refused was read in its source (2.14). It looks
 * at all of them but two: a token that is read goes on without the byte for which its buffer should have grown, and is
 * then another number, or searched for an end that it has not got; and an object's key that is written may be missing
 * from the text. So the first refused request of a parser is served from a reserve that is as large as a token's buffer
 * can get, and from then on the text is at its end: which jansson notices before it has another byte to keep. */
static _Thread_local struct {
  bool refused; /* since the newest parse or dump of this thread */
  void *reserve;
  size_t reserve_bytes;
} memory;

static void *take_memory(size_t bytes) {
  const bool first = !memory.refused;
  void *taken = first || memory.reserve == NULL ? malloc(bytes) : NULL;
  memory.refused = memory.refused || taken == NULL;
  return taken == NULL && first && bytes <= memory.reserve_bytes ? memory.reserve : taken;
}

static void give_memory(void *taken) {
  if (taken != memory.reserve)
    free(taken);
}

static void watch_memory(void) {
  json_set_alloc_funcs(take_memory, give_memory);
}

static void start_watching(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  (void)pthread_once(&once, watch_memory);
  memory.refused = false;
}

/* Behind the end of the string that `at` is in, or past the end of the text. */
static size_t skip_string(const char *text, size_t bytes, size_t at) {
  while (at < bytes && text[at] != '"')
    at += text[at] == '\\' ? 2 : 1;
  return at + 1;
}

/* Of strings with their quotes, numbers and words. */
static size_t longest_token(const char *text, size_t bytes) {
  size_t longest = 0, first = 0;
  for (size_t at = 0; at < bytes; at++) {
    const char c = text[at];
    if (c == '"') {
      first = at;
      at = skip_string(text, bytes, at + 1) - 1;
    } else if (c == ',' || c == ':' || c == '[' || c == ']' || c == '{' || c == '}' || c == ' ' || c == '\n') {
      first = at;
    }
    if (at - first >= longest)
      longest = at - first + 1;
  }
  return longest;
}

typedef struct source {
  const char *text;
  size_t bytes, at;
} source;

/* Byte by byte, so that no more are read once memory was refused. */
static size_t next_byte(void *buffer, size_t bytes, void *context) {
  source *from = context;
  (void)bytes;
  if (memory.refused || from->at == from->bytes)
    return 0;
  *(char *)buffer = from->text[from->at++];
  return 1;
}

json_t *flap_json_parse(const char *text, size_t bytes, size_t flags, json_error_t *error_out) {
  source from = {.text = text, .bytes = bytes};
  memset(error_out, 0, sizeof *error_out);
  start_watching();
  /* A token's buffer doubles when one byte of it is free; a character of several bytes is kept whole. */
  const size_t reserve_bytes = 2 * (longest_token(text, bytes) + 8);
  void *reserve = malloc(reserve_bytes);
  memory.refused = reserve == NULL;
  memory.reserve = reserve;
  memory.reserve_bytes = reserve ? reserve_bytes : 0;
  json_t *root = reserve ? json_load_callback(next_byte, &from, flags, error_out) : NULL;
  if (memory.refused && root != NULL) {
    json_decref(root);
    root = NULL;
  }
  memory.reserve = NULL;
  memory.reserve_bytes = 0;
  free(reserve);
  return root;
}

bool flap_json_no_memory(void) {
  return memory.refused;
}

char *flap_json_dumps(const json_t *root, size_t flags) {
  start_watching();
  char *text = json_dumps(root, flags);
  if (!memory.refused)
    return text;
  free(text);
  return NULL;
}

flap_status flap_json_check_weight(const char *name, const char *text, size_t bytes) {
  uint64_t weight = 0;
  if (bytes <= FLAP_JSON_WEIGHT_MAX / 4)
    return FLAP_OK;
  for (size_t at = 0; at < bytes && weight <= FLAP_JSON_WEIGHT_MAX; at++) {
    if (text[at] == '"')
      at = skip_string(text, bytes, at + 1) - 1;
    else
      weight += text[at] == ',' ? 1 : text[at] == '[' ? 2 : text[at] == '{' ? 4 : 0;
  }
  if (weight <= FLAP_JSON_WEIGHT_MAX)
    return FLAP_OK;
  return flap_error_set(FLAP_UNSUPPORTED, "%s: its JSON has millions of values, more than are read", name);
}

flap_status flap_json_load_text(const char *name, const char *text, size_t bytes, json_t **root_out) {
  FLAP_TRY(flap_json_check_weight(name, text, bytes));
  json_error_t error;
  size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY;
  json_t *root = flap_json_parse(text, bytes, flags, &error);
  if (!root && !flap_json_no_memory() && json_error_code(&error) == json_error_numeric_overflow)
    root = flap_json_parse(text, bytes, flags | JSON_DECODE_INT_AS_REAL, &error);
  if (!root) {
    if (flap_json_no_memory())
      return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to parse %zu bytes of JSON", name, bytes);
    return flap_error_set(FLAP_INVALID, "%s:%d:%d: %s%s", name, error.line, error.column, error.text,
                          flap_json_hint(error.text));
  }
  *root_out = root;
  return FLAP_OK;
}

static flap_status load_open_file(int fd, const char *path, uint64_t bytes_max, json_t **root_out) {
  struct stat about;
  if (flap_system_fstat(fd, &about) != 0)
    return flap_error_set_os(errno, "cannot look at %s", path);
  if (!S_ISREG(about.st_mode))
    return flap_error_set(FLAP_INVALID, "%s: not a regular file", path);
  uint64_t bytes = (uint64_t)about.st_size;
  if (bytes > bytes_max)
    return flap_error_set(FLAP_INVALID, "%s: %llu bytes, but at most %llu are read as JSON", path,
                          (unsigned long long)bytes, (unsigned long long)bytes_max);
  char *text = malloc(bytes > 0 ? (size_t)bytes : 1);
  if (!text)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory to read %llu bytes", path, (unsigned long long)bytes);
  flap_status status = flap_durable_read_all(fd, path, 0, text, bytes);
  if (status == FLAP_OK)
    status = flap_json_load_text(path, text, (size_t)bytes, root_out);
  free(text);
  return status;
}

flap_status flap_json_load_file(const char *path, uint64_t bytes_max, json_t **root_out) {
  int fd = flap_system_open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", path);
  flap_status status = load_open_file(fd, path, bytes_max, root_out);
  (void)flap_system_close(fd);
  return status;
}

/* ---- writing ------------------------------------------------------------------------------------------- */

json_t *flap_json_real(double value) {
  return isfinite(value) ? json_real(value) : json_null();
}

/* 15 digits are enough for what people write (1e-05); 17 are enough for every double. */
static char *dump_briefly(const json_t *root) {
  for (size_t digits = 15;; digits++) {
    char *text = flap_json_dumps(root, JSON_INDENT(2) | JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits));
    if (!text || digits == 17)
      return text;
    json_error_t error;
    json_t *again = flap_json_parse(text, strlen(text), JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    bool same = again && json_equal(root, again);
    json_decref(again);
    if (same)
      return text;
    free(text);
    if (flap_json_no_memory())
      return NULL; /* more digits would be another text */
  }
}

char *flap_json_text(const json_t *root) {
  char *text = dump_briefly(root);
  size_t length = text ? strlen(text) : 0;
  char *ended = text ? realloc(text, length + 2) : NULL;
  if (!ended) {
    free(text);
    return NULL;
  }
  memcpy(ended + length, "\n", 2);
  return ended;
}

flap_status flap_json_write_file(const char *path, const json_t *root) {
  char *text = flap_json_text(root);
  if (!text)
    return flap_error_set(FLAP_NO_MEMORY, "%s: no memory for its JSON text", path);
  flap_status status = flap_durable_write_file(path, text, strlen(text));
  free(text);
  return status;
}

/* ---- typed access -------------------------------------------------------------------------------------- */

flap_status flap_json_error(const flap_json_object *object, const char *key, const char *format, ...) {
  char text[MESSAGE_BYTES];
  va_list arguments;
  va_start(arguments, format);
  (void)vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const char *dot = object->path[0] && key ? "." : "";
  if (!object->path[0] && !key)
    return flap_error_set(FLAP_INVALID, "%s: %s", object->file, text);
  return flap_error_set(FLAP_INVALID, "%s: %s%s%.100s: %s", object->file, object->path, dot, key ? key : "", text);
}

static const char *kind_name(const json_t *value) {
  switch (json_typeof(value)) {
  case JSON_OBJECT:
    return "an object";
  case JSON_ARRAY:
    return "an array";
  case JSON_STRING:
    return "a string";
  case JSON_INTEGER:
  case JSON_REAL:
    return "a number";
  case JSON_TRUE:
  case JSON_FALSE:
    return "true or false";
  case JSON_NULL:
    return "null";
  }
  return "something else";
}

flap_status flap_json_root(const json_t *root, const char *file, flap_json_object *object_out) {
  object_out->json = root;
  object_out->file = file;
  object_out->path[0] = '\0';
  if (!json_is_object(root))
    return flap_error_set(FLAP_INVALID, "%s: must hold an object, not %s", file, root ? kind_name(root) : "nothing");
  return FLAP_OK;
}

bool flap_json_has(const flap_json_object *object, const char *key) {
  const json_t *value = json_object_get(object->json, key);
  return value && !json_is_null(value);
}

static flap_status find(const flap_json_object *object, const char *key, const json_t **value_out) {
  *value_out = json_object_get(object->json, key);
  return *value_out ? FLAP_OK : flap_json_error(object, key, "this key is missing");
}

static flap_status wrong_kind(const flap_json_object *object, const char *key, const char *wanted,
                              const json_t *value) {
  return flap_json_error(object, key, "must be %s, not %s", wanted, kind_name(value));
}

flap_status flap_json_get_object(const flap_json_object *object, const char *key, flap_json_object *object_out) {
  const json_t *value;
  FLAP_TRY(find(object, key, &value));
  if (!json_is_object(value))
    return wrong_kind(object, key, "an object", value);
  flap_json_object below = {.json = value, .file = object->file};
  int length = snprintf(below.path, sizeof below.path, "%s%s%s", object->path, object->path[0] ? "." : "", key);
  if (length < 0 || (size_t)length >= sizeof below.path)
    memcpy(below.path + sizeof below.path - 4, "...", 4);
  *object_out = below;
  return FLAP_OK;
}

flap_status flap_json_get_array(const flap_json_object *object, const char *key, const json_t **array_out) {
  const json_t *value;
  FLAP_TRY(find(object, key, &value));
  if (!json_is_array(value))
    return wrong_kind(object, key, "an array", value);
  *array_out = value;
  return FLAP_OK;
}

flap_status flap_json_get_string(const flap_json_object *object, const char *key, const char **value_out) {
  const json_t *value;
  FLAP_TRY(find(object, key, &value));
  if (!json_is_string(value))
    return wrong_kind(object, key, "a string", value);
  *value_out = json_string_value(value);
  return FLAP_OK;
}

static flap_status take_integer(const flap_json_object *object, const char *key, const json_t *value, int64_t min,
                                int64_t max, int64_t *value_out) {
  int64_t integer;
  if (json_is_integer(value)) {
    integer = json_integer_value(value);
  } else if (json_is_real(value)) {
    double real = json_real_value(value);
    if (!(fabs(real) <= WHOLE_DOUBLE_MAX) || real != floor(real))
      return flap_json_error(object, key, "must be an integer, not %.17g", real);
    integer = (int64_t)real;
  } else {
    return wrong_kind(object, key, "an integer", value);
  }
  if (integer < min || integer > max)
    return flap_json_error(object, key, "%lld is not within %lld and %lld", (long long)integer, (long long)min,
                           (long long)max);
  *value_out = integer;
  return FLAP_OK;
}

flap_status flap_json_get_integer(const flap_json_object *object, const char *key, int64_t min, int64_t max,
                                  int64_t *value_out) {
  const json_t *value;
  FLAP_TRY(find(object, key, &value));
  return take_integer(object, key, value, min, max, value_out);
}

flap_status flap_json_get_number(const flap_json_object *object, const char *key, double min, double max,
                                 double *value_out) {
  const json_t *value;
  FLAP_TRY(find(object, key, &value));
  if (!json_is_number(value))
    return wrong_kind(object, key, "a number", value);
  double number = json_number_value(value);
  if (!(number >= min && number <= max))
    return flap_json_error(object, key, "%.9g is not within %.9g and %.9g", number, min, max);
  *value_out = number;
  return FLAP_OK;
}

flap_status flap_json_get_bool(const flap_json_object *object, const char *key, bool *value_out) {
  const json_t *value;
  FLAP_TRY(find(object, key, &value));
  if (!json_is_boolean(value))
    return wrong_kind(object, key, "true or false", value);
  *value_out = json_is_true(value);
  return FLAP_OK;
}

flap_status flap_json_get_integers(const flap_json_object *object, const char *key, int64_t min, int64_t max,
                                   int64_t *values_out, size_t count_max, size_t *count_out) {
  const json_t *array;
  FLAP_TRY(flap_json_get_array(object, key, &array));
  size_t count = json_array_size(array);
  if (count > count_max)
    return flap_json_error(object, key, "has %zu integers, but at most %zu are allowed", count, count_max);
  for (size_t i = 0; i < count; i++)
    FLAP_TRY(take_integer(object, key, json_array_get(array, i), min, max, &values_out[i]));
  *count_out = count;
  return FLAP_OK;
}

flap_status flap_json_opt_string(const flap_json_object *object, const char *key, const char *fallback,
                                 const char **value_out) {
  *value_out = fallback;
  return flap_json_has(object, key) ? flap_json_get_string(object, key, value_out) : FLAP_OK;
}

flap_status flap_json_opt_integer(const flap_json_object *object, const char *key, int64_t min, int64_t max,
                                  int64_t fallback, int64_t *value_out) {
  *value_out = fallback;
  return flap_json_has(object, key) ? flap_json_get_integer(object, key, min, max, value_out) : FLAP_OK;
}

flap_status flap_json_opt_number(const flap_json_object *object, const char *key, double min, double max,
                                 double fallback, double *value_out) {
  *value_out = fallback;
  return flap_json_has(object, key) ? flap_json_get_number(object, key, min, max, value_out) : FLAP_OK;
}

flap_status flap_json_opt_bool(const flap_json_object *object, const char *key, bool fallback, bool *value_out) {
  *value_out = fallback;
  return flap_json_has(object, key) ? flap_json_get_bool(object, key, value_out) : FLAP_OK;
}
