/* Of the products by tiles on Hopper (matmul_tiles.cuh), what those who choose them need to know. Private to
 * kernels/cuda.
 */
#ifndef FLAP_KERNELS_CUDA_MATMUL_TILES_H
#define FLAP_KERNELS_CUDA_MATMUL_TILES_H

#include "kernels/ops.h"

#include <cuda_runtime_api.h>

/* Rows and columns of a tile. Two, one above the other, are computed at a time, by a cluster of two thread blocks. */
#define FLAP_CUDA_TILE_ROWS 128u
#define FLAP_CUDA_TILE_COLUMNS 256u

#endif
