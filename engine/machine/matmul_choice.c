#include "engine/machine/matmul_choice.h"

#include "base/log.h"
#include "base/system.h"
#include "engine/machine/machine_cache.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILE_NAME "matmul.json"
#define FORMAT "flap products 1"
#define FILE_BYTES_MAX ((uint64_t)1 << 20)
#define HEX_DIGITS (2 * FLAP_MATMUL_ALGORITHM_BYTES)

static const char *const transpose_names[] = {[FLAP_NN] = "NN", [FLAP_NT] = "NT", [FLAP_TN] = "TN", NULL};
static const char *const dtype_names[] = {
    [FLAP_F32] = "float32", [FLAP_BF16] = "bfloat16", [FLAP_F16] = "float16", NULL};
static const char *const added_names[] = {"nothing", "c", "residual", NULL};

/* ---- writing --------------------------------------------------------------------------------------------- */

static json_t *entry_to_json(const flap_matmul_entry *entry) {
  const flap_matmul_key *key = &entry->key;
  char digits[HEX_DIGITS + 1];
  for (size_t i = 0; i < FLAP_MATMUL_ALGORITHM_BYTES; i++)
    (void)snprintf(digits + 2 * i, 3, "%02x", entry->algorithm[i]);
  json_t *object = json_object();
  bool done = flap_json_put(object, "transpose", json_string(transpose_names[key->transpose]));
  done &= flap_json_put(object, "m", json_integer(key->m));
  done &= flap_json_put(object, "n", json_integer(key->n));
  done &= flap_json_put(object, "k", json_integer(key->k));
  done &= flap_json_put(object, "lda", json_integer(key->lda));
  done &= flap_json_put(object, "ldb", json_integer(key->ldb));
  done &= flap_json_put(object, "ldc", json_integer(key->ldc));
  done &= flap_json_put(object, "dtype", json_string(dtype_names[key->dtype]));
  done &= flap_json_put(object, "c_dtype", json_string(dtype_names[key->c_dtype]));
  done &= flap_json_put(object, "added", json_string(added_names[key->added]));
  done &= flap_json_put(object, "bias_alignment", json_integer(key->bias));
  done &= flap_json_put(object, "a_alignment", json_integer(key->align_a));
  done &= flap_json_put(object, "b_alignment", json_integer(key->align_b));
  done &= flap_json_put(object, "c_alignment", json_integer(key->align_c));
  done &= flap_json_put(object, "algorithm", json_string(digits));
  if (done)
    return object;
  json_decref(object);
  return NULL;
}

static flap_status write_file(const char *path, const flap_matmul_table *table, const char *shapes) {
  char digest[32];
  (void)snprintf(digest, sizeof digest, "0x%016" PRIx64, flap_matmul_table_digest(table));
  json_t *root = json_object(), *products = json_array();
  bool done = flap_json_put(root, "format", json_string(FORMAT));
  done &= flap_json_put(root, "target", json_string(table->target));
  done &= flap_json_put(root, "shapes", json_string(shapes));
  done &= flap_json_put(root, "digest", json_string(digest));
  for (uint32_t i = 0; i < table->count; i++)
    done &= json_array_append_new(products, entry_to_json(&table->entries[i])) == 0;
  done &= flap_json_put(root, "products", products);
  const flap_status status =
      done ? flap_json_write_file(path, root) : flap_error_set(FLAP_NO_MEMORY, "%s: no memory to write it", path);
  json_decref(root);
  return status;
}

flap_status flap_matmul_choice_save(const flap_matmul_choice *choice, const char *folder) {
  char path[FLAP_PATH_MAX];
  FLAP_TRY(flap_durable_join(path, folder, FILE_NAME));
  return write_file(path, &choice->table, choice->shapes);
}

/* ---- reading --------------------------------------------------------------------------------------------- */

/* One of the names, as its index. */
static flap_status read_word(const flap_json_object *object, const char *key, const char *const *names,
                             uint8_t *index_out) {
  const char *text = NULL;
  FLAP_TRY(flap_json_get_string(object, key, &text));
  for (uint8_t i = 0; names[i] != NULL; i++)
    if (strcmp(text, names[i]) == 0) {
      *index_out = i;
      return FLAP_OK;
    }
  return flap_json_error(object, key, "\"%.40s\" is not a value that it can have", text);
}

static flap_status read_size(const flap_json_object *object, const char *key, uint32_t *value_out) {
  int64_t value = 0;
  FLAP_TRY(flap_json_get_integer(object, key, 1, UINT32_MAX, &value));
  *value_out = (uint32_t)value;
  return FLAP_OK;
}

static flap_status read_alignment(const flap_json_object *object, const char *key, int64_t least, uint8_t *value_out) {
  int64_t value = 0;
  FLAP_TRY(flap_json_get_integer(object, key, least, 16, &value));
  *value_out = (uint8_t)value;
  return FLAP_OK;
}

static flap_status read_key(const flap_json_object *object, flap_matmul_key *key) {
  memset(key, 0, sizeof *key);
  FLAP_TRY(read_word(object, "transpose", transpose_names, &key->transpose));
  FLAP_TRY(read_size(object, "m", &key->m));
  FLAP_TRY(read_size(object, "n", &key->n));
  FLAP_TRY(read_size(object, "k", &key->k));
  FLAP_TRY(read_size(object, "lda", &key->lda));
  FLAP_TRY(read_size(object, "ldb", &key->ldb));
  FLAP_TRY(read_size(object, "ldc", &key->ldc));
  FLAP_TRY(read_word(object, "dtype", dtype_names, &key->dtype));
  FLAP_TRY(read_word(object, "c_dtype", dtype_names, &key->c_dtype));
  FLAP_TRY(read_word(object, "added", added_names, &key->added));
  FLAP_TRY(read_alignment(object, "bias_alignment", 0, &key->bias));
  FLAP_TRY(read_alignment(object, "a_alignment", 1, &key->align_a));
  FLAP_TRY(read_alignment(object, "b_alignment", 1, &key->align_b));
  FLAP_TRY(read_alignment(object, "c_alignment", 1, &key->align_c));
  return flap_matmul_key_valid(key) ? FLAP_OK : flap_json_error(object, NULL, "no product has these sizes and types");
}

static int digit_of(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static flap_status read_algorithm(const flap_json_object *object, uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES]) {
  const char *text = NULL;
  FLAP_TRY(flap_json_get_string(object, "algorithm", &text));
  bool good = strlen(text) == HEX_DIGITS;
  for (size_t i = 0; i < FLAP_MATMUL_ALGORITHM_BYTES && good; i++) {
    const int high = digit_of(text[2 * i]), low = digit_of(text[2 * i + 1]);
    good = high >= 0 && low >= 0;
    algorithm[i] = good ? (uint8_t)(16 * high + low) : 0;
  }
  return good ? FLAP_OK : flap_json_error(object, "algorithm", "is not %u hexadecimal digits", HEX_DIGITS);
}

static flap_status read_text(const flap_json_object *root, const char *key, size_t bytes, char *text_out) {
  const char *text = NULL;
  FLAP_TRY(flap_json_get_string(root, key, &text));
  if (strlen(text) >= bytes)
    return flap_json_error(root, key, "is longer than %zu bytes", bytes - 1);
  strcpy(text_out, text);
  return FLAP_OK;
}

static flap_status read_products(const flap_json_object *root, flap_matmul_table *table) {
  const json_t *products;
  FLAP_TRY(flap_json_get_array(root, "products", &products));
  if (json_array_size(products) > FLAP_MATMUL_ENTRIES_MAX)
    return flap_json_error(root, "products", "are %zu, more than %u", json_array_size(products),
                           FLAP_MATMUL_ENTRIES_MAX);
  for (size_t i = 0; i < json_array_size(products); i++) {
    flap_json_object object = {.json = json_array_get(products, i), .file = root->file};
    flap_matmul_entry entry;
    (void)snprintf(object.path, sizeof object.path, "products[%zu]", i);
    if (!json_is_object(object.json))
      return flap_json_error(&object, NULL, "not an object");
    FLAP_TRY(read_key(&object, &entry.key));
    FLAP_TRY(read_algorithm(&object, entry.algorithm));
    if (flap_matmul_table_find(table, &entry.key) != NULL || !flap_matmul_table_add(table, &entry.key, entry.algorithm))
      return flap_json_error(&object, NULL, "the same product as another one");
  }
  return FLAP_OK;
}

static flap_status read_root(const flap_json_object *root, flap_matmul_table *table,
                             char shapes[FLAP_MATMUL_SHAPES_MAX]) {
  const char *format = NULL, *digest = NULL;
  FLAP_TRY(flap_json_get_string(root, "format", &format));
  if (strcmp(format, FORMAT) != 0)
    return flap_json_error(root, "format", "\"%.40s\" instead of \"" FORMAT "\"", format);
  FLAP_TRY(read_text(root, "target", sizeof table->target, table->target));
  FLAP_TRY(read_text(root, "shapes", FLAP_MATMUL_SHAPES_MAX, shapes));
  FLAP_TRY(flap_json_get_string(root, "digest", &digest));
  FLAP_TRY(read_products(root, table));
  char wanted[32];
  (void)snprintf(wanted, sizeof wanted, "0x%016" PRIx64, flap_matmul_table_digest(table));
  if (strcmp(digest, wanted) != 0)
    return flap_json_error(root, "digest", "is not that of its products: the file was damaged, or changed by hand");
  return FLAP_OK;
}

static flap_status read_file(const char *path, flap_matmul_table *table_out, char shapes_out[FLAP_MATMUL_SHAPES_MAX]) {
  json_t *json = NULL;
  flap_json_object root;
  memset(table_out, 0, sizeof *table_out);
  shapes_out[0] = '\0';
  FLAP_TRY(flap_json_load_file(path, FILE_BYTES_MAX, &json));
  flap_status status = flap_json_root(json, path, &root);
  if (status == FLAP_OK)
    status = read_root(&root, table_out, shapes_out);
  json_decref(json);
  return status;
}

/* ---- whose table ----------------------------------------------------------------------------------------- */

static bool is_for(const flap_matmul_table *table, const char *shapes, const flap_matmul_choice *choice) {
  return strcmp(table->target, choice->table.target) == 0 && strcmp(shapes, choice->shapes) == 0;
}

void flap_matmul_choice_describe(const flap_model_config *model, const flap_model_shape *shape,
                                 flap_dtype gradient_dtype, char shapes_out[FLAP_MATMUL_SHAPES_MAX]) {
  (void)snprintf(shapes_out, FLAP_MATMUL_SHAPES_MAX,
                 "%s, hidden %u, intermediate %u, %u heads and %u of keys of %u, vocabulary %u%s%s%s; %u x %u, %s, "
                 "gradients %s",
                 flap_model_family_name(model->family), model->hidden_size, model->intermediate_size,
                 model->num_attention_heads, model->num_key_value_heads, model->head_dim, model->vocab_size,
                 model->tie_word_embeddings ? ", tied" : "", model->attention_bias ? ", biases" : "",
                 model->output_bias ? ", output bias" : "", shape->batch, shape->sequence,
                 flap_dtype_name(shape->dtype), flap_dtype_name(gradient_dtype));
}

static void find_cache(flap_matmul_choice *choice) {
  char text[FLAP_MATMUL_TARGET_MAX + FLAP_MATMUL_SHAPES_MAX + 1];
  (void)snprintf(text, sizeof text, "%s\n%s", choice->table.target, choice->shapes);
  flap_machine_cache_name("matmul", text, choice->cache);
}

/* True: the checkpoint has a table for this run, and that is the one. */
static flap_status take_saved(flap_matmul_choice *choice, const char *folder, bool *taken_out) {
  char path[FLAP_PATH_MAX], shapes[FLAP_MATMUL_SHAPES_MAX];
  flap_matmul_table table;
  *taken_out = false;
  FLAP_TRY(flap_durable_join(path, folder, FILE_NAME));
  const flap_status status = read_file(path, &table, shapes);
  if (status == FLAP_NOT_FOUND) {
    flap_error_clear();
    return FLAP_OK;
  }
  if (status != FLAP_OK)
    return flap_error_prefix(status, "resume_from_checkpoint: restore this file from a copy, or remove it, and the run "
                                     "will compute differently from the one that saved");
  if (!is_for(&table, shapes, choice)) {
    flap_log(FLAP_LOG_DEBUG, "%s is not for this run: it is for %s; %s", path, table.target, shapes);
    return FLAP_OK;
  }
  choice->table = table;
  strcpy(choice->source, path);
  *taken_out = true;
  return FLAP_OK;
}

static void take_cached(flap_matmul_choice *choice) {
  char shapes[FLAP_MATMUL_SHAPES_MAX];
  flap_matmul_table table;
  find_cache(choice);
  if (choice->cache[0] == '\0')
    return;
  const flap_status status = read_file(choice->cache, &table, shapes);
  if (status == FLAP_OK && is_for(&table, shapes, choice)) {
    choice->table = table;
    choice->cached_digest = flap_matmul_table_digest(&table);
    strcpy(choice->source, choice->cache);
    return;
  }
  if (status != FLAP_NOT_FOUND)
    flap_log(FLAP_LOG_WARNING, "algorithms of products are chosen anew: %s",
             status == FLAP_OK ? "the file in the cache is for something else" : flap_error_message());
  flap_error_clear();
}

flap_status flap_matmul_choice_open(const char *target, const flap_model_config *model, const flap_model_shape *shape,
                                    flap_dtype gradient_dtype, flap_run_matmul wanted, const char *resume_folder,
                                    flap_matmul_choice *choice) {
  memset(choice, 0, sizeof *choice);
  if (target[0] == '\0')
    return FLAP_OK;
  choice->given = true;
  (void)snprintf(choice->table.target, sizeof choice->table.target, "%s", target);
  flap_matmul_choice_describe(model, shape, gradient_dtype, choice->shapes);
  if (wanted == FLAP_RUN_MATMUL_FIRST)
    return FLAP_OK;
  bool taken = false;
  if (resume_folder[0] != '\0')
    FLAP_TRY(take_saved(choice, resume_folder, &taken));
  if (taken)
    return FLAP_OK;
  choice->tunes = true;
  take_cached(choice);
  return FLAP_OK;
}

flap_status flap_matmul_choice_give(flap_matmul_choice *choice, flap_ops *ops, bool measuring) {
  if (choice == NULL || !choice->given)
    return FLAP_OK;
  const bool tunes = measuring && choice->tunes;
  const flap_status status = flap_ops_set_matmuls(ops, &choice->table, tunes ? FLAP_MATMUL_TUNE : FLAP_MATMUL_USE);
  if (status != FLAP_OK && choice->source[0] != '\0')
    return flap_error_prefix(status, "%s: remove it to choose algorithms of products anew", choice->source);
  return status;
}

/* ---- keeping --------------------------------------------------------------------------------------------- */

/* Under the lock. */
static flap_status replace_file(flap_matmul_choice *choice) {
  char shapes[FLAP_MATMUL_SHAPES_MAX];
  flap_matmul_table theirs;
  if (read_file(choice->cache, &theirs, shapes) != FLAP_OK)
    flap_error_clear();
  else if (is_for(&theirs, shapes, choice) && flap_matmul_table_digest(&theirs) != choice->cached_digest) {
    for (uint32_t i = 0; i < choice->table.count; i++)
      (void)flap_matmul_table_add(&theirs, &choice->table.entries[i].key, choice->table.entries[i].algorithm);
    choice->table = theirs;
  }
  return write_file(choice->cache, &choice->table, choice->shapes);
}

static flap_status store(flap_matmul_choice *choice) {
  char folder[FLAP_PATH_MAX];
  int fd = -1;
  flap_machine_cache_folder(folder);
  FLAP_TRY(flap_durable_make_folder(folder));
  FLAP_TRY(flap_machine_cache_lock(choice->cache, &fd));
  const flap_status status = replace_file(choice);
  (void)flap_system_close(fd); /* and the lock is gone */
  return status;
}

void flap_matmul_choice_keep(flap_matmul_choice *choice) {
  if (!choice->tunes || flap_matmul_table_digest(&choice->table) == choice->cached_digest)
    return;
  if (choice->cache[0] == '\0') {
    flap_log(FLAP_LOG_WARNING,
             "there is no folder to keep the algorithms of products in: set HOME, or the next run may "
             "choose others");
    return;
  }
  if (store(choice) == FLAP_OK) {
    choice->cached_digest = flap_matmul_table_digest(&choice->table);
    return;
  }
  flap_log(FLAP_LOG_WARNING, "algorithms of products are not kept, and the next run may choose others: %s",
           flap_error_message());
  flap_error_clear();
}
