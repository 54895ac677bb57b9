/* OpenBLAS, loaded at run time, because what it computes with is decided as it is loaded.
 *
 * A release of OpenBLAS knows the processors of its time. On later ones it falls back to code for the first of 64 bits:
 * release 0.3.21 (Debian 12) reaches 31 to 55 GFLOP/s on two cores of an Emerald Rapids Xeon, and 151 and more when it
 * is told to use what it has for Cooper Lake. Folder-private. */
#ifndef FLAP_KERNELS_CPU_BLAS_H
#define FLAP_KERNELS_CPU_BLAS_H

#include "base/status.h"

#include <cblas.h>

typedef struct flap_cpu_blas {
  __typeof__(&cblas_sgemm) sgemm; /* on the calling thread */
  char name[64];                  /* "openblas-0.3.21-SkylakeX": the release, and whose code */
} flap_cpu_blas;

/* The library, for as long as the process lives; at the first call it is loaded: that sets variables of the environment
 * for a moment. OPENBLAS_CORETYPE, where it is set, has the last word. FLAP_NOT_FOUND: it is not installed. Any thread.
 */
FLAP_CHECKED flap_status flap_cpu_blas_find(const flap_cpu_blas **blas_out);
/* Whether so many threads may multiply at a time: for each of them OpenBLAS takes a buffer of 128 MiB of the address
 * space, of which it touches little, and where `ulimit -v` leaves none it tries for ever. FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_cpu_blas_check_space(uint32_t threads);
/* The name by which OpenBLAS knows code for this processor, where that is better than code for `chosen`; else NULL. */
const char *flap_cpu_blas_better_core(const char *chosen);

#endif
