/* JSON files: a thin layer over jansson that says what is wrong, where, in which file and under which key.
 *
 * Not for the step loop: jansson allocates. Threading: as jansson (different roots are independent).
 */
#ifndef FLAP_FORMATS_JSON_FILE_H
#define FLAP_FORMATS_JSON_FILE_H

#include "base/status.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_JSON_BYTES_MAX ((uint64_t)256 << 20) /* a limit that suits every file but data */
#define FLAP_JSON_PATH_MAX 192u
#define FLAP_JSON_WEIGHT_MAX ((uint64_t)8 << 20)

/* ---- loading and writing ------------------------------------------------------------------------------- */

/* Loads a file of at most `bytes_max` bytes. Keys that repeat, and NaN and Infinity (which Python writes, but which are
 * not JSON), are refused. Whole numbers past 64 bits, as in many tokenizer_config.json, make all numbers of the file
 * doubles; the getters below take those too. Errors: FLAP_NOT_FOUND, FLAP_IO, FLAP_INVALID with "file:line:column".
 * The caller owns the root: json_decref. */
FLAP_CHECKED flap_status flap_json_load_file(const char *path, uint64_t bytes_max, json_t **root_out);
/* FLAP_UNSUPPORTED for a text that may take more than half a gigabyte once parsed, as 7 MB of "{}," do: its commas,
 * with 2 for each array and 4 for each object, may be at most FLAP_JSON_WEIGHT_MAX. The largest tokenizers have a
 * quarter of that. All that parses JSON asks first. */
FLAP_CHECKED flap_status flap_json_check_weight(const char *name, const char *text, size_t bytes);
/* The same from memory; `name` stands for the file in messages. */
FLAP_CHECKED flap_status flap_json_load_text(const char *name, const char *text, size_t bytes, json_t **root_out);

/* The text that write_file writes: indented by 2, keys in their order, doubles with the fewest digits (15 to 17, one
 * for the file) that read back equal, a newline at the end. The caller frees it; NULL for lack of memory. */
char *flap_json_text(const json_t *root);
/* Writes that text durably. Jansson cannot hold NaN or infinity: use flap_json_real. */
FLAP_CHECKED flap_status flap_json_write_file(const char *path, const json_t *root);

/* Gives a value away to an object; false for lack of memory, also where that is why either of them is NULL. So what
 * many calls said can be added up, and looked at once. */
static inline bool flap_json_put(json_t *object, const char *key, json_t *value) {
  return json_object_set_new(object, key, value) == 0;
}

/* A new number, or null for NaN and the infinities, which JSON has no words for. */
json_t *flap_json_real(double value);

/* ---- typed access -------------------------------------------------------------------------------------- */

/* An object in a file, and the way to it for messages: "config.json: rope_scaling.factor: ...". Holds no reference: it
 * lives as long as the root, and `file` as long as the caller's string. */
typedef struct flap_json_object {
  const json_t *json;
  const char *file;
  char path[FLAP_JSON_PATH_MAX]; /* "" at the root, else "rope_scaling" */
} flap_json_object;

/* FLAP_INVALID when the root is no object. */
FLAP_CHECKED flap_status flap_json_root(const json_t *root, const char *file, flap_json_object *object_out);

/* There, and not null. */
bool flap_json_has(const flap_json_object *object, const char *key);

/* Required keys. A missing key, a null, a wrong type or a value out of [min, max] is FLAP_INVALID and is named.
 * Integers may be written as whole doubles (2.0). Strings live as long as the root. */
FLAP_CHECKED flap_status flap_json_get_object(const flap_json_object *object, const char *key,
                                              flap_json_object *object_out);
FLAP_CHECKED flap_status flap_json_get_array(const flap_json_object *object, const char *key, const json_t **array_out);
FLAP_CHECKED flap_status flap_json_get_string(const flap_json_object *object, const char *key, const char **value_out);
FLAP_CHECKED flap_status flap_json_get_integer(const flap_json_object *object, const char *key, int64_t min,
                                               int64_t max, int64_t *value_out);
FLAP_CHECKED flap_status flap_json_get_number(const flap_json_object *object, const char *key, double min, double max,
                                              double *value_out);
FLAP_CHECKED flap_status flap_json_get_bool(const flap_json_object *object, const char *key, bool *value_out);
/* At most `count_max` integers, each in [min, max]. */
FLAP_CHECKED flap_status flap_json_get_integers(const flap_json_object *object, const char *key, int64_t min,
                                                int64_t max, int64_t *values_out, size_t count_max, size_t *count_out);

/* json_loadb and json_dumps for when memory may be refused, which those two do not stand: NULL then. After a failure
 * flap_json_no_memory tells whether that was why, so that nothing is known of the text, for jansson often speaks of a
 * mistake in it. The caller frees what dumps returns. */
json_t *flap_json_parse(const char *text, size_t bytes, size_t flags, json_error_t *error_out);
char *flap_json_dumps(const json_t *root, size_t flags);
/* What to add to the text of an error: what to do about NaN, or "". */
const char *flap_json_hint(const char *error_text);
/* Of this thread's newest flap_json_parse or flap_json_dumps. */
bool flap_json_no_memory(void);

/* Optional keys: a missing key or a null stores `fallback`; everything else as above. */
FLAP_CHECKED flap_status flap_json_opt_string(const flap_json_object *object, const char *key, const char *fallback,
                                              const char **value_out);
FLAP_CHECKED flap_status flap_json_opt_integer(const flap_json_object *object, const char *key, int64_t min,
                                               int64_t max, int64_t fallback, int64_t *value_out);
FLAP_CHECKED flap_status flap_json_opt_number(const flap_json_object *object, const char *key, double min, double max,
                                              double fallback, double *value_out);
FLAP_CHECKED flap_status flap_json_opt_bool(const flap_json_object *object, const char *key, bool fallback,
                                            bool *value_out);

/* "file: way.to.key: <text>" as FLAP_INVALID, for checks that the getters do not have. `key` may be NULL. */
flap_status flap_json_error(const flap_json_object *object, const char *key, const char *format, ...) FLAP_PRINTF(3, 4);

#ifdef __cplusplus
}
#endif
#endif
