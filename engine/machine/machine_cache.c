#include "engine/machine/machine_cache.h"

#include "base/log.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/json_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#define FORMAT "flap machine 1"
#define FILE_BYTES_MAX ((uint64_t)1 << 20)
#define RATE_MAX 1e24
#define NS_MAX ((int64_t)1 << 40)
#define CORES_MAX 65536
#define OVERHEAD_MAX ((int64_t)1 << 40)
#define DISKS_MAX 64u /* of an entry: scratch folders come and go, so the oldest are forgotten */
#define LOCK_TRIES 100
#define LOCK_PAUSE_NS (10 * 1000 * 1000)

/* ---- where ----------------------------------------------------------------------------------------------- */

static bool join(char path_out[FLAP_PATH_MAX], const char *folder, const char *rest) {
  int length = snprintf(path_out, FLAP_PATH_MAX, "%s%s", folder, rest);
  if (length > 0 && length < FLAP_PATH_MAX)
    return true;
  path_out[0] = '\0';
  return false;
}

/* The XDG base directory specification: a relative path counts as none. */
void flap_machine_cache_folder(char folder_out[FLAP_PATH_MAX]) {
  const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  folder_out[0] = '\0';
  if (cache && cache[0] == '/')
    (void)join(folder_out, cache, "/flap");
  else if (home && home[0] == '/')
    (void)join(folder_out, home, "/.cache/flap");
}

/* FNV-1a */
static uint64_t hash_of(const char *text) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (; *text != '\0'; text++)
    hash = (hash ^ (unsigned char)*text) * 0x100000001b3ull;
  return hash;
}

void flap_machine_cache_name(const char *kind, const char *text, char path_out[FLAP_PATH_MAX]) {
  char folder[FLAP_PATH_MAX], name[64];
  flap_machine_cache_folder(folder);
  (void)snprintf(name, sizeof name, "/%.32s-%016" PRIx64 ".json", kind, hash_of(text));
  path_out[0] = '\0';
  if (folder[0] != '\0')
    (void)join(path_out, folder, name);
}

static void find_default_path(char path_out[FLAP_PATH_MAX]) {
  char folder[FLAP_PATH_MAX];
  flap_machine_cache_folder(folder);
  path_out[0] = '\0';
  if (folder[0])
    (void)join(path_out, folder, "/machine.json");
}

/* ---- reading --------------------------------------------------------------------------------------------- */

/* The object at `index` of an array that is called `name` in messages. */
static flap_status object_at(const flap_json_object *parent, const char *name, const json_t *array, size_t index,
                             flap_json_object *object_out) {
  *object_out = (flap_json_object){.json = json_array_get(array, index), .file = parent->file};
  (void)snprintf(object_out->path, sizeof object_out->path, "%.*s%s%s[%zu]", (int)(sizeof object_out->path / 2),
                 parent->path, parent->path[0] ? "." : "", name, index);
  return json_is_object(object_out->json) ? FLAP_OK : flap_json_error(object_out, NULL, "not an object");
}

typedef struct disk_rates {
  double read, write, both; /* bytes per second; both 0: not known */
  int64_t span;             /* over so many bytes; 0: not said */
} disk_rates;

typedef struct entry_key {
  const char *device, *host; /* host NULL: any */
  int64_t threads;           /* 0: any */
} entry_key;

static flap_status read_key(const flap_json_object *entry, entry_key *key_out) {
  FLAP_TRY(flap_json_get_string(entry, "device", &key_out->device));
  FLAP_TRY(flap_json_opt_string(entry, "host", NULL, &key_out->host));
  return flap_json_opt_integer(entry, "threads", 1, FLAP_POOL_THREADS_MAX, 0, &key_out->threads);
}

/* Of both ways at once, or of the codec; 0: not known. */
static flap_status read_both(const flap_json_object *object, const char *key, double least, double *rate_out) {
  FLAP_TRY(flap_json_opt_number(object, key, 0, RATE_MAX, 0, rate_out));
  return *rate_out == 0 ? FLAP_OK : flap_json_get_number(object, key, least, RATE_MAX, rate_out);
}

static flap_status read_rates(const flap_json_object *entry, flap_machine *machine) {
  const struct {
    const char *name;
    double least, *rate;
  } rates[] = {{"flops_bf16", FLAP_MACHINE_FLOPS_MIN, &machine->flops_bf16},
               {"flops_f32", FLAP_MACHINE_FLOPS_MIN, &machine->flops_f32},
               {"device_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->device_bytes},
               {"h2d_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->h2d_bytes},
               {"d2h_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->d2h_bytes},
               {"host_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->host_bytes}};
  for (size_t i = 0; i < sizeof rates / sizeof *rates; i++)
    FLAP_TRY(flap_json_get_number(entry, rates[i].name, rates[i].least, RATE_MAX, rates[i].rate));
  FLAP_TRY(read_both(entry, "encode_states_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->encode_bytes));
  FLAP_TRY(read_both(entry, "decode_states_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->decode_bytes));
  FLAP_TRY(read_both(entry, "h2d_both_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->h2d_both_bytes));
  return read_both(entry, "d2h_both_bytes", FLAP_MACHINE_MEMORY_MIN, &machine->d2h_both_bytes);
}

static flap_status read_machine(const flap_json_object *entry, flap_machine *machine_out) {
  flap_machine machine;
  entry_key key;
  FLAP_TRY(read_key(entry, &key));
  flap_device_default_machine(strcmp(key.device, "cuda") == 0 ? FLAP_DEVICE_CUDA : FLAP_DEVICE_CPU, &machine);
  FLAP_TRY(read_rates(entry, &machine));
  const char *name;
  int64_t launch_ns, copy_ns, disk_ns, cores, overhead, process;
  FLAP_TRY(flap_json_opt_string(entry, "name", machine.name, &name));
  FLAP_TRY(flap_json_opt_integer(entry, "launch_ns", 0, NS_MAX, (int64_t)machine.launch_ns, &launch_ns));
  FLAP_TRY(flap_json_opt_integer(entry, "copy_ns", 0, NS_MAX, (int64_t)machine.copy_ns, &copy_ns));
  FLAP_TRY(flap_json_opt_integer(entry, "disk_ns", 0, NS_MAX, (int64_t)machine.disk_ns, &disk_ns));
  FLAP_TRY(flap_json_opt_integer(entry, "shared_cores", 0, CORES_MAX, machine.shared_cores, &cores));
  FLAP_TRY(flap_json_opt_integer(entry, "overhead_bytes", 0, OVERHEAD_MAX, 0, &overhead));
  FLAP_TRY(flap_json_opt_integer(entry, "process_bytes", 0, OVERHEAD_MAX, 0, &process));
  FLAP_TRY(flap_json_opt_bool(entry, "synchronous", machine.synchronous, &machine.synchronous));
  if (name != machine.name)
    (void)snprintf(machine.name, sizeof machine.name, "%.63s", name);
  machine.launch_ns = (uint64_t)launch_ns;
  machine.copy_ns = (uint64_t)copy_ns;
  machine.disk_ns = (uint64_t)disk_ns;
  machine.shared_cores = (uint32_t)cores;
  machine.overhead_bytes = (uint64_t)overhead;
  machine.process_bytes = (uint64_t)process;
  machine.disk_read_bytes = machine_out->disk_read_bytes;
  machine.disk_write_bytes = machine_out->disk_write_bytes;
  machine.disk_both_bytes = machine_out->disk_both_bytes;
  *machine_out = machine;
  return FLAP_OK;
}

/* The rates of a disk or of an entry; `required`, or 0 when absent. One way alone is an error; both at once may be
 * absent. */
static flap_status read_disk_rates(const flap_json_object *object, bool required, disk_rates *rates_out) {
  *rates_out = (disk_rates){0};
  if (!required && !flap_json_has(object, "disk_read_bytes") && !flap_json_has(object, "disk_write_bytes"))
    return FLAP_OK;
  FLAP_TRY(flap_json_get_number(object, "disk_read_bytes", FLAP_MACHINE_DISK_MIN, RATE_MAX, &rates_out->read));
  FLAP_TRY(flap_json_get_number(object, "disk_write_bytes", FLAP_MACHINE_DISK_MIN, RATE_MAX, &rates_out->write));
  return read_both(object, "disk_both_bytes", FLAP_MACHINE_DISK_MIN, &rates_out->both);
}

/* The rates that an entry holds for a disk (NULL: for every path); 0 if none. Reads all disks, so that a file is either
 * well-formed or not, whatever is asked of it. */
static flap_status read_disks(const flap_json_object *entry, const flap_machine_disk *disk, disk_rates *rates_out) {
  FLAP_TRY(read_disk_rates(entry, false, rates_out));
  if (!flap_json_has(entry, "disks"))
    return FLAP_OK;
  const json_t *disks;
  FLAP_TRY(flap_json_get_array(entry, "disks", &disks));
  for (size_t i = 0; i < json_array_size(disks); i++) {
    flap_json_object object;
    const char *path;
    int64_t number;
    disk_rates rates;
    FLAP_TRY(object_at(entry, "disks", disks, i, &object));
    FLAP_TRY(flap_json_get_string(&object, "path", &path));
    FLAP_TRY(flap_json_get_integer(&object, "number", INT64_MIN, INT64_MAX, &number));
    FLAP_TRY(read_disk_rates(&object, true, &rates));
    FLAP_TRY(flap_json_opt_integer(&object, "span_bytes", 0, INT64_MAX, 0, &rates.span));
    if (disk && strcmp(path, disk->path) == 0 && (uint64_t)number == disk->number)
      *rates_out = rates;
  }
  return FLAP_OK;
}

static flap_status get_machines(const json_t *root, const char *file, flap_json_object *object_out,
                                const json_t **machines_out) {
  const char *format;
  FLAP_TRY(flap_json_root(root, file, object_out));
  FLAP_TRY(flap_json_get_string(object_out, "format", &format));
  if (strcmp(format, FORMAT) != 0)
    return flap_json_error(object_out, "format", "\"%.40s\" instead of \"" FORMAT "\"", format);
  return flap_json_get_array(object_out, "machines", machines_out);
}

static flap_status check(const json_t *root, const char *file) {
  flap_json_object object, entry;
  const json_t *machines;
  FLAP_TRY(get_machines(root, file, &object, &machines));
  for (size_t i = 0; i < json_array_size(machines); i++) {
    flap_machine machine = {0};
    disk_rates rates;
    FLAP_TRY(object_at(&object, "machines", machines, i, &entry));
    FLAP_TRY(read_machine(&entry, &machine));
    FLAP_TRY(read_disks(&entry, NULL, &rates));
  }
  return FLAP_OK;
}

/* A file that is well-formed, or an error and no root. */
static flap_status load(const char *path, json_t **root_out) {
  *root_out = NULL;
  json_t *root = NULL;
  FLAP_TRY(flap_json_load_file(path, FILE_BYTES_MAX, &root));
  flap_status status = check(root, path);
  if (status == FLAP_OK)
    *root_out = root;
  else
    json_decref(root);
  return status;
}

bool flap_machine_cache_is_named(void) {
  const char *named = getenv("FLAP_MACHINE");
  return named && named[0];
}

flap_status flap_machine_cache_open(flap_machine_cache *cache) {
  *cache = (flap_machine_cache){.named = flap_machine_cache_is_named()};
  if (!cache->named)
    find_default_path(cache->path);
  else if (!join(cache->path, getenv("FLAP_MACHINE"), ""))
    return flap_error_set(FLAP_INVALID, "FLAP_MACHINE: the path is longer than %d bytes", FLAP_PATH_MAX - 1);
  if (!cache->path[0])
    return FLAP_OK;
  flap_status status = load(cache->path, &cache->root);
  if (status == FLAP_OK)
    return FLAP_OK;
  if (cache->named && status != FLAP_NOT_FOUND)
    return flap_error_prefix(status, "FLAP_MACHINE");
  flap_log(FLAP_LOG_DEBUG, "no measured rates to use: %s", flap_error_message());
  flap_error_clear();
  return FLAP_OK;
}

void flap_machine_cache_close(flap_machine_cache *cache) {
  json_decref(cache->root);
  cache->root = NULL;
}

/* ---- finding --------------------------------------------------------------------------------------------- */

/* How well an entry suits; 0: not at all. */
static int suits(const entry_key *entry, const flap_machine_key *key, bool named) {
  if (strcmp(entry->device, key->device) != 0)
    return 0;
  bool same_threads = entry->threads == key->threads, same_host = entry->host && strcmp(entry->host, key->host) == 0;
  if (same_threads && same_host)
    return 5;
  if (!named)
    return 0;
  return same_threads ? 4 : entry->threads == 0 ? 3 : same_host ? 2 : 1;
}

/* The entry of a checked file that suits best, the first of equals; false: there is none. */
static bool find_entry(json_t *root, const flap_machine_key *key, bool named, flap_json_object *entry_out) {
  flap_json_object object, entry;
  const json_t *machines;
  if (!root || get_machines(root, "", &object, &machines) != FLAP_OK)
    return false;
  int best = 0;
  for (size_t i = 0; i < json_array_size(machines); i++) {
    entry_key entry_names;
    if (object_at(&object, "machines", machines, i, &entry) != FLAP_OK || read_key(&entry, &entry_names) != FLAP_OK)
      continue;
    int grade = suits(&entry_names, key, named);
    if (grade > best) {
      best = grade;
      *entry_out = entry;
    }
  }
  return best > 0;
}

bool flap_machine_cache_find(const flap_machine_cache *cache, const flap_machine_key *key, flap_machine *machine_out) {
  flap_json_object entry;
  return find_entry(cache->root, key, cache->named, &entry) && read_machine(&entry, machine_out) == FLAP_OK;
}

bool flap_machine_cache_find_disk(const flap_machine_cache *cache, const flap_machine_key *key,
                                  const flap_machine_disk *disk, flap_machine *machine_out) {
  flap_json_object entry;
  disk_rates rates;
  if (!find_entry(cache->root, key, cache->named, &entry) || read_disks(&entry, disk, &rates) != FLAP_OK ||
      rates.read == 0)
    return false;
  if (disk && !cache->named && (uint64_t)rates.span < disk->span_bytes / 2)
    return false;
  machine_out->disk_read_bytes = rates.read;
  machine_out->disk_write_bytes = rates.write;
  machine_out->disk_both_bytes = rates.both;
  return true;
}

/* ---- storing --------------------------------------------------------------------------------------------- */

static bool put_rates(json_t *entry, const flap_machine_key *key, const flap_machine *machine) {
  bool done = flap_json_put(entry, "device", json_string(key->device));
  done &= flap_json_put(entry, "threads", json_integer(key->threads));
  done &= flap_json_put(entry, "host", json_string(key->host));
  done &= flap_json_put(entry, "name", json_string(machine->name));
  done &= flap_json_put(entry, "flops_bf16", json_real(machine->flops_bf16));
  done &= flap_json_put(entry, "flops_f32", json_real(machine->flops_f32));
  done &= flap_json_put(entry, "device_bytes", json_real(machine->device_bytes));
  done &= flap_json_put(entry, "h2d_bytes", json_real(machine->h2d_bytes));
  done &= flap_json_put(entry, "d2h_bytes", json_real(machine->d2h_bytes));
  if (machine->h2d_both_bytes > 0 && machine->d2h_both_bytes > 0) {
    done &= flap_json_put(entry, "h2d_both_bytes", json_real(machine->h2d_both_bytes));
    done &= flap_json_put(entry, "d2h_both_bytes", json_real(machine->d2h_both_bytes));
  }
  done &= flap_json_put(entry, "host_bytes", json_real(machine->host_bytes));
  if (machine->encode_bytes > 0 && machine->decode_bytes > 0) {
    done &= flap_json_put(entry, "encode_states_bytes", json_real(machine->encode_bytes));
    done &= flap_json_put(entry, "decode_states_bytes", json_real(machine->decode_bytes));
  }
  done &= flap_json_put(entry, "launch_ns", json_integer((json_int_t)machine->launch_ns));
  done &= flap_json_put(entry, "copy_ns", json_integer((json_int_t)machine->copy_ns));
  done &= flap_json_put(entry, "disk_ns", json_integer((json_int_t)machine->disk_ns));
  done &= flap_json_put(entry, "synchronous", json_boolean(machine->synchronous));
  done &= flap_json_put(entry, "shared_cores", json_integer(machine->shared_cores));
  if (machine->overhead_bytes > 0)
    done &= flap_json_put(entry, "overhead_bytes", json_integer((json_int_t)machine->overhead_bytes));
  if (machine->process_bytes > 0)
    done &= flap_json_put(entry, "process_bytes", json_integer((json_int_t)machine->process_bytes));
  return done;
}

/* What was known of the path is replaced, also when it was another disk. */
static bool put_disk(json_t *entry, const flap_machine *machine, const flap_machine_disk *disk) {
  json_t *disks = json_object_get(entry, "disks");
  if (!json_is_array(disks) && !flap_json_put(entry, "disks", disks = json_array()))
    return false;
  for (size_t i = json_array_size(disks); i-- > 0;) {
    const char *path = json_string_value(json_object_get(json_array_get(disks, i), "path"));
    if (!path || strcmp(path, disk->path) == 0)
      (void)json_array_remove(disks, i);
  }
  while (json_array_size(disks) >= DISKS_MAX)
    (void)json_array_remove(disks, 0);
  json_t *added = json_object();
  bool done = flap_json_put(added, "path", json_string(disk->path));
  done &= flap_json_put(added, "number", json_integer((json_int_t)disk->number));
  if (disk->span_bytes > 0)
    done &= flap_json_put(added, "span_bytes", json_integer((json_int_t)disk->span_bytes));
  done &= flap_json_put(added, "disk_read_bytes", json_real(machine->disk_read_bytes));
  done &= flap_json_put(added, "disk_write_bytes", json_real(machine->disk_write_bytes));
  if (machine->disk_both_bytes > 0)
    done &= flap_json_put(added, "disk_both_bytes", json_real(machine->disk_both_bytes));
  if (!done) {
    json_decref(added);
    return false;
  }
  return json_array_append_new(disks, added) == 0;
}

/* The entry to change: what is found, or a new one at the end. Borrowed; NULL: no memory. */
static json_t *entry_for(json_t *root, const flap_machine_key *key, bool loosely) {
  flap_json_object entry;
  json_t *machines = json_object_get(root, "machines");
  if (!find_entry(root, key, loosely, &entry))
    return json_array_append_new(machines, json_object()) == 0 ? json_array_get(machines, json_array_size(machines) - 1)
                                                               : NULL;
  for (size_t i = 0; i < json_array_size(machines); i++)
    if (json_array_get(machines, i) == entry.json)
      return json_array_get(machines, i);
  return NULL;
}

/* Under the lock. */
static flap_status replace_file(const flap_machine_cache *cache, const flap_machine_key *key,
                                const flap_machine *machine, bool rates, const flap_machine_disk *disk) {
  json_t *root = NULL;
  flap_status status = load(cache->path, &root);
  if (status != FLAP_OK) {
    if (cache->named && status != FLAP_NOT_FOUND)
      return status;
    root = json_pack("{s:s, s:[]}", "format", FORMAT, "machines");
  }
  json_t *entry = root ? entry_for(root, key, cache->named && !rates) : NULL;
  /* Somebody may have removed the entry whose disk this is: then it takes all of it. */
  bool done = entry && ((!rates && json_object_size(entry) > 0) || put_rates(entry, key, machine)) &&
              (!disk || put_disk(entry, machine, disk));
  if (done)
    status = flap_json_write_file(cache->path, root);
  else
    status = flap_error_set(FLAP_INVALID, "%s: no memory, or a name or a path that is not UTF-8", cache->path);
  json_decref(root);
  return status;
}

/* A lock on a file beside, since the file itself is replaced. */
flap_status flap_machine_cache_lock(const char *path, int *fd_out) {
  char name[FLAP_PATH_MAX];
  if (!join(name, path, ".lock"))
    return flap_error_set(FLAP_INVALID, "%s: too long a path to lock", path);
  int fd = flap_system_open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, FLAP_DURABLE_FILE_MODE);
  if (fd < 0)
    return flap_error_set_os(errno, "cannot open %s", name);
  for (int i = 0; i < LOCK_TRIES; i++) {
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
      *fd_out = fd;
      return FLAP_OK;
    }
    if (errno != EWOULDBLOCK && errno != EINTR)
      break;
    (void)nanosleep(&(struct timespec){.tv_nsec = LOCK_PAUSE_NS}, NULL);
  }
  flap_status status = flap_error_set_os(errno, "cannot lock %s", name);
  (void)flap_system_close(fd);
  return status;
}

static flap_status make_folder_of(const char *path) {
  char folder[FLAP_PATH_MAX];
  if (!join(folder, path, "") || !strrchr(folder, '/') || strrchr(folder, '/') == folder)
    return FLAP_OK;
  *strrchr(folder, '/') = '\0';
  return flap_durable_make_folder(folder);
}

static flap_status store(const flap_machine_cache *cache, const flap_machine_key *key, const flap_machine *machine,
                         bool rates, const flap_machine_disk *disk) {
  int fd = -1;
  FLAP_TRY(make_folder_of(cache->path));
  FLAP_TRY(flap_machine_cache_lock(cache->path, &fd));
  flap_status status = replace_file(cache, key, machine, rates, disk);
  (void)flap_system_close(fd); /* and the lock is gone */
  return status;
}

void flap_machine_cache_store(const flap_machine_cache *cache, const flap_machine_key *key, const flap_machine *machine,
                              bool rates, const flap_machine_disk *disk) {
  if (!cache->path[0] || store(cache, key, machine, rates, disk) == FLAP_OK)
    return;
  flap_log(cache->named ? FLAP_LOG_WARNING : FLAP_LOG_DEBUG, "measured rates are not kept: %s", flap_error_message());
  flap_error_clear();
}
