/* The file that keeps measured rates: $XDG_CACHE_HOME/flap/machine.json, or the file that FLAP_MACHINE names.
 *
 * Folder-private, but for tests. The file is
 *
 *   {"format": "flap machine 1",
 *    "machines": [{"device": "cpu", "threads": 2, "host": "<CPU, cores>", "name": "<for people>",
 *                  "flops_bf16": ..., <every rate of flap_machine by its name>,
 *                  "disks": [{"path": "/fast", "number": 2049, "span_bytes": 67108864,
 *                             "disk_read_bytes": ..., "disk_write_bytes": ...}]}]}
 *
 * In an entry, `name`, `h2d_both_bytes`, `d2h_both_bytes`, `encode_bytes` and `decode_bytes` (0: not known, and without
 * these no pool is chosen), `launch_ns`, `copy_ns`, `disk_ns`, `synchronous`, `shared_cores`, `overhead_bytes` and
 * `process_bytes` may be absent (the defaults of the device), `threads` and `host` too (any), and its own
 * `disk_read_bytes` and `disk_write_bytes` serve every path that `disks` does not name. `disk_both_bytes` may be absent
 * beside them.
 *
 * The default file is a cache: entries count only for the same device, threads and host, and whatever is wrong with the
 * file, it is as if it were not there. A file named by FLAP_MACHINE is what somebody asked for: an entry of the device
 * is used as it is, also on another host, the one with the right threads first; and a file that cannot be read is an
 * error.
 *
 * Several processes may read and store at once: a file is replaced whole, by one at a time. Threading: one thread per
 * object.
 */
#ifndef FLAP_ENGINE_MACHINE_MACHINE_CACHE_H
#define FLAP_ENGINE_MACHINE_MACHINE_CACHE_H

#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_machine_key {
  const char *device; /* "cpu" */
  uint32_t threads;
  const char *host;
} flap_machine_key;

/* A folder as the cache knows it: the same name may be another disk tomorrow. */
typedef struct flap_machine_disk {
  const char *path;    /* absolute, without links */
  uint64_t number;     /* st_dev */
  uint64_t span_bytes; /* over so many bytes its rates are wanted, or were measured */
} flap_machine_disk;

typedef struct flap_machine_cache {
  char path[FLAP_PATH_MAX]; /* "": there is no place for one */
  bool named;               /* by FLAP_MACHINE */
  struct json_t *root;      /* owned; NULL: nothing there that counts */
} flap_machine_cache;

/* $XDG_CACHE_HOME/flap, or ~/.cache/flap; "": there is no place for one. It need not be there yet. */
void flap_machine_cache_folder(char folder_out[FLAP_PATH_MAX]);
/* "<folder>/<kind>-<hash of the text>.json" of that folder; "": there is no place for one. */
void flap_machine_cache_name(const char *kind, const char *text, char path_out[FLAP_PATH_MAX]);
/* Locks a file that is to be replaced, through a file beside it, in a folder that is there. Closing the descriptor ends
 * it. Nobody waits for long: the holder only writes. */
FLAP_CHECKED flap_status flap_machine_cache_lock(const char *path, int *fd_out);

/* Whether FLAP_MACHINE names a file. */
bool flap_machine_cache_is_named(void);
/* Finds the file and reads it. Fails only for a file that FLAP_MACHINE names and that is there. */
FLAP_CHECKED flap_status flap_machine_cache_open(flap_machine_cache *cache);
void flap_machine_cache_close(flap_machine_cache *cache);

/* Fills all of the machine but its disk rates. False, and no change: not there. */
bool flap_machine_cache_find(const flap_machine_cache *cache, const flap_machine_key *key, flap_machine *machine_out);
/* Fills the disk rates from the entry that flap_machine_cache_find takes, unless they were measured over less than half
 * of the span that is wanted: those of a named file are taken as they are. `disk` NULL: a folder that is not there, for
 * which only rates for every path count. */
bool flap_machine_cache_find_disk(const flap_machine_cache *cache, const flap_machine_key *key,
                                  const flap_machine_disk *disk, flap_machine *machine_out);

/* Writes to the file, after reading it once more: others may have stored meanwhile. With `rates`, the entry of exactly
 * this key gets the machine's rates (its disks stay); otherwise the entry that flap_machine_cache_find takes is kept.
 * With `disk` that entry gets its disk rates. A file that cannot be written is a line in the log. */
void flap_machine_cache_store(const flap_machine_cache *cache, const flap_machine_key *key, const flap_machine *machine,
                              bool rates, const flap_machine_disk *disk);

#ifdef __cplusplus
}
#endif
#endif
