/* What this process may take of the host's memory: the least of what is free, what its control groups leave, and what
 * its limits leave.
 *
 * A container's limit is one of its control group, or of any group above it, in version 1 or 2 of the interface; free
 * memory knows nothing of it, and whoever goes past it is killed. What groups hold in clean file cache that was not
 * used lately counts as free, for the kernel takes it back first.
 *
 * Folder-private. Everything is read from files below two roots, so that tests can have other ones.
 */
#ifndef FLAP_ENGINE_MACHINE_HOST_MEMORY_H
#define FLAP_ENGINE_MACHINE_HOST_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_host_roots {
  const char *proc, *sys;
} flap_host_roots;
extern const flap_host_roots FLAP_HOST_ROOTS; /* /proc and /sys */

#define FLAP_HOST_UNLIMITED UINT64_MAX

typedef struct flap_host_memory {
  uint64_t total_bytes;     /* of the machine; 0: not known */
  uint64_t available_bytes; /* that programs may take now without swapping, as Linux estimates it */
  uint64_t swap_bytes;      /* free */
  uint64_t group_bytes;     /* that the tightest control group leaves */
  uint64_t address_bytes;   /* that `ulimit -v` leaves, and threads do not take for themselves */
  uint64_t pinned_bytes;    /* that may be pinned in all, where the system has a limit for it: half of a WSL's memory */
  char group[256];          /* the tightest one */
} flap_host_memory;

/* What cannot be read is not known, and limits nothing. */
void flap_host_memory_read(const flap_host_roots *roots, flap_host_memory *memory_out);

/* What may be taken now; of it at most `pinned_bytes` if it is to be pinned. */
uint64_t flap_host_memory_left(const flap_host_memory *memory, bool pinned);
/* The same, read now. */
uint64_t flap_host_memory_free(bool pinned);

/* What limits it, in words for a message: "the container (control group /x)". */
const char *flap_host_memory_limit_name(const flap_host_memory *memory, bool pinned, char *text, uint64_t text_bytes);

/* The number of KiB after a key ("MemAvailable:") in a file below /proc, as bytes; 0 where it is not. */
uint64_t flap_host_memory_kib(const flap_host_roots *roots, const char *file, const char *key);

#ifdef __cplusplus
}
#endif
#endif
