/* A bump arena with a fixed maximum, taken at start-up and then sealed.
 *
 * The same code that takes memory can first be run on a measuring arena, which only counts; so a size that
 * was planned and the size that is used come from one place. Taking more than the maximum, or after the
 * seal, is a mistake of ours and asserts: plans are checked before anything is taken.
 *
 * Threading: one thread at a time.
 */
#ifndef FLAP_BASE_ARENA_H
#define FLAP_BASE_ARENA_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_ARENA_ALIGN_MAX ((uint64_t)2 << 20) /* the largest alignment that may be asked for */

typedef struct flap_arena {
  const char *name;    /* "ram", for messages; static storage */
  unsigned char *base; /* NULL while measuring */
  uint64_t bytes_max;  /* UINT64_MAX while measuring */
  uint64_t bytes_used; /* grows only; so it is also the peak */
  bool sealed;
  bool owns_mapping;
} flap_arena;

/* An arena that counts and hands out NULL. */
void flap_arena_measure(flap_arena *arena, const char *name);

/* Maps `bytes` of zeroed, page-aligned memory (private, anonymous; huge pages advised for 2 MiB and more).
 * FLAP_NO_MEMORY names the arena and the size. */
FLAP_CHECKED flap_status flap_arena_open(flap_arena *arena, const char *name, uint64_t bytes);

/* An arena over memory that somebody else owns, aligned as much as anything that will be taken from it. */
void flap_arena_borrow(flap_arena *arena, const char *name, void *base, uint64_t bytes);

/* The next `bytes`, aligned to `align` (a power of two, at most FLAP_ARENA_ALIGN_MAX), zeroed if nobody wrote there
 * before. NULL only while measuring, or for 0 bytes. Lives until flap_arena_close. */
void *flap_arena_take(flap_arena *arena, uint64_t bytes, uint64_t align);

/* flap_arena_take for an array of `count` elements; asserts on overflow. */
#define FLAP_ARENA_ARRAY(arena, type, count) \
  ((type *)flap_arena_take_array((arena), sizeof(type), (count), _Alignof(type)))
void *flap_arena_take_array(flap_arena *arena, uint64_t element_bytes, uint64_t count, uint64_t align);

bool flap_arena_is_measuring(const flap_arena *arena);
void flap_arena_seal(flap_arena *arena);
void flap_arena_close(flap_arena *arena);

#ifdef __cplusplus
}
#endif
#endif
