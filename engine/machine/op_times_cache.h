/* The file that keeps what operations take here: $XDG_CACHE_HOME/flap/times-<hash>.json (or ~/.cache).
 *
 * Folder-private, but for tests. Timing takes seconds, and no two measurements are the same; so that `flap train` runs
 * the very plan that `flap plan` showed, both calculate with what was timed first. A file is
 *
 *   {"format": "flap times 4", "key": "<device, version, rates, shapes, optimizer, products>", "forward_ns": ..., ...}
 *
 * and counts only for the same key. The machine's rates are in it: `flap bench machine`, which measures them anew,
 * makes times be taken anew too. So do other algorithms of products. Whatever is wrong with a file, it is as if it were
 * not there.
 *
 * Several processes may use the cache at once: a file is replaced whole. Threading: one thread per object.
 */
#ifndef FLAP_ENGINE_MACHINE_OP_TIMES_CACHE_H
#define FLAP_ENGINE_MACHINE_OP_TIMES_CACHE_H

#include "engine/machine/op_times.h"
#include "engine/run_config.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_OP_TIMES_KEY_MAX 1024u

typedef struct flap_op_times_cache {
  char path[FLAP_PATH_MAX]; /* "": there is no place for one */
  char key[FLAP_OP_TIMES_KEY_MAX];
} flap_op_times_cache;

/* Of a run on this machine, on a card with these products (spec->matmuls, complete or not). */
void flap_op_times_cache_open(const flap_op_times_spec *spec, const flap_machine *machine,
                              flap_op_times_cache *cache_out);
/* False, and no change: not there, or without the host's updates where spec asks for them. */
bool flap_op_times_cache_find(const flap_op_times_cache *cache, const flap_op_times_spec *spec,
                              flap_op_times *times_out);
/* A file that cannot be written is a line in the log. */
void flap_op_times_cache_keep(const flap_op_times_cache *cache, const flap_op_times *times);

#ifdef __cplusplus
}
#endif
#endif
