/* The bump arena: one mapping, one counter.
 *
 * Offsets are aligned, and the base is aligned to the largest alignment that may be asked for, so a measuring
 * arena (base NULL) counts exactly the bytes that a real one uses.
 */
#include "base/arena.h"

#include "base/assert.h"
#include "base/units.h"

#include <errno.h>
#include <sys/mman.h>

#define HUGE_PAGES_FROM_BYTES (2 * FLAP_MIB)

void flap_arena_measure(flap_arena *arena, const char *name) {
  *arena = (flap_arena){.name = name, .bytes_max = UINT64_MAX};
}

flap_status flap_arena_open(flap_arena *arena, const char *name, uint64_t bytes) {
  *arena = (flap_arena){.name = name, .bytes_max = bytes};
  if (bytes == 0)
    return FLAP_OK;
  char text[FLAP_UNITS_TEXT_MAX];
  uint64_t length = 0, mapped = 0;
  bool fits = flap_units_add(bytes, 4095, &length);
  length &= ~(uint64_t)4095;
  fits = fits && flap_units_add(length, FLAP_ARENA_ALIGN_MAX, &mapped) && mapped <= SIZE_MAX / 2;
  void *mapping = MAP_FAILED;
  if (fits)
    mapping = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  else
    errno = ENOMEM;
  if (mapping == MAP_FAILED) {
    int os_error = errno;
    flap_units_format_bytes(bytes, text, sizeof text);
    (void)flap_error_set_os(os_error, "%s: cannot map %s of memory", name, text);
    *arena = (flap_arena){.name = name};
    return FLAP_NO_MEMORY;
  }
  /* More was mapped than asked for, so that an aligned run lies inside; the two ends are given back. */
  unsigned char *start = mapping;
  uint64_t head = (FLAP_ARENA_ALIGN_MAX - (uintptr_t)start % FLAP_ARENA_ALIGN_MAX) % FLAP_ARENA_ALIGN_MAX;
  uint64_t tail = FLAP_ARENA_ALIGN_MAX - head;
  if (head > 0)
    (void)munmap(start, (size_t)head);
  if (tail > 0)
    (void)munmap(start + head + length, (size_t)tail);
  arena->base = start + head;
  arena->owns_mapping = true;
  /* Advice only: where the kernel has no huge pages the arena works all the same. Where it has them, disks profit most:
   * a transfer from huge pages is described to the drive in a few long segments instead of one per 4 KiB. */
  if (bytes >= HUGE_PAGES_FROM_BYTES)
    (void)madvise(arena->base, (size_t)length, MADV_HUGEPAGE);
  return FLAP_OK;
}

void flap_arena_borrow(flap_arena *arena, const char *name, void *base, uint64_t bytes) {
  flap_assert(base != NULL || bytes == 0);
  *arena = (flap_arena){.name = name, .base = base, .bytes_max = bytes};
}

bool flap_arena_is_measuring(const flap_arena *arena) {
  return arena->bytes_max == UINT64_MAX;
}

void *flap_arena_take(flap_arena *arena, uint64_t bytes, uint64_t align) {
  flap_assert(!arena->sealed);
  flap_assert(align > 0 && (align & (align - 1)) == 0 && align <= FLAP_ARENA_ALIGN_MAX);
  if (bytes == 0)
    return NULL;
  uint64_t offset = flap_units_round_up(arena->bytes_used, align);
  flap_assert(offset <= arena->bytes_max && bytes <= arena->bytes_max - offset);
  arena->bytes_used = offset + bytes;
  if (flap_arena_is_measuring(arena))
    return NULL;
  unsigned char *pointer = arena->base + offset;
  flap_assert((uintptr_t)pointer % align == 0);
  return pointer;
}

void *flap_arena_take_array(flap_arena *arena, uint64_t element_bytes, uint64_t count, uint64_t align) {
  uint64_t bytes = 0;
  bool fits = flap_units_mul(element_bytes, count, &bytes);
  flap_assert(fits);
  return flap_arena_take(arena, bytes, align);
}

void flap_arena_seal(flap_arena *arena) {
  arena->sealed = true;
}

void flap_arena_close(flap_arena *arena) {
  if (arena->owns_mapping)
    (void)munmap(arena->base, (size_t)((arena->bytes_max + 4095) & ~(uint64_t)4095));
  *arena = (flap_arena){.name = arena->name};
}
