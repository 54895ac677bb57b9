#include "engine/store/numerics_key.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define FIELDS_MAX 32
#define FIRST_FIELD "kernels"

typedef struct field {
  const char *name, *value;
  int name_bytes, value_bytes;
} field;

static void name_field(field *f, const char *text, size_t bytes, bool first) {
  const char *blank = memchr(text, ' ', bytes);
  if (first) {
    *f = (field){FIRST_FIELD, text, (int)strlen(FIRST_FIELD), (int)bytes};
  } else if (blank == NULL) {
    *f = (field){text, "", (int)bytes, 0};
  } else {
    const size_t name = (size_t)(blank - text);
    *f = (field){text, blank + 1, (int)name, (int)(bytes - name - 1)};
  }
}

static unsigned split(const char *key, field fields[FIELDS_MAX]) {
  unsigned count = 0;
  bool in_kernels = true;
  while (*key && count < FIELDS_MAX) {
    const size_t bytes = strcspn(key, in_kernels ? ";," : ";");
    name_field(&fields[count], key, bytes, count == 0);
    count++;
    in_kernels = in_kernels && key[bytes] == ',';
    key += bytes;
    key += strspn(key, ";, ");
  }
  return count;
}

static const field *find(const field *fields, unsigned count, const field *wanted) {
  for (unsigned i = 0; i < count; i++)
    if (fields[i].name_bytes == wanted->name_bytes &&
        strncmp(fields[i].name, wanted->name, (size_t)wanted->name_bytes) == 0)
      return &fields[i];
  return NULL;
}

static bool equal(const field *a, const field *b) {
  return a->value_bytes == b->value_bytes && strncmp(a->value, b->value, (size_t)a->value_bytes) == 0;
}

typedef struct writing {
  char *text;
  size_t bytes, used;
  unsigned count;
} writing;

static void add(writing *w, const field *name, const field *then, const field *now) {
  static const field none = {"", "none", 0, 4};
  const field *was = then != NULL ? then : &none, *is = now != NULL ? now : &none;
  const int length =
      snprintf(w->text + w->used, w->bytes - w->used, "%s%.*s: %.*s then, %.*s now", w->count > 0 ? "; " : "",
               name->name_bytes, name->name, was->value_bytes, was->value, is->value_bytes, is->value);
  w->used += length > 0 ? (size_t)length : 0;
  if (w->used >= w->bytes)
    w->used = w->bytes - 1;
  w->count++;
}

unsigned flap_numerics_key_differences(const char *saved, const char *now, char *text_out, size_t text_bytes) {
  field then[FIELDS_MAX], is[FIELDS_MAX];
  const unsigned then_count = split(saved, then), is_count = split(now, is);
  writing w = {.text = text_out, .bytes = text_bytes};
  text_out[0] = '\0';
  for (unsigned i = 0; i < then_count; i++) {
    const field *other = find(is, is_count, &then[i]);
    if (other == NULL || !equal(&then[i], other))
      add(&w, &then[i], &then[i], other);
  }
  for (unsigned i = 0; i < is_count; i++)
    if (find(then, then_count, &is[i]) == NULL)
      add(&w, &is[i], NULL, &is[i]);
  return w.count;
}
