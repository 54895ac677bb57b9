/* Matrix products: tiles of c fixed by shape, each one item of the pool, each a few single-threaded sgemm calls.
 *
 * 16-bit operands are converted to fp32 in the worker's scratch, FLAP_CPU_TILE_K of k at a time; the parts of k are
 * summed in order, in fp32. */
#include "kernels/cpu/cpu_internal.h"

#include "base/assert.h"

typedef struct matmul_job {
  const flap_cpu_ops *cpu;
  const flap_matmul *x;
  uint32_t tile_m, tile_n; /* sizes */
  uint32_t tiles_n;        /* count */
} matmul_job;

typedef struct operand {
  const float *values;
  uint32_t stride;
} operand;

/* Tiles of nearly the same size, each a multiple of 16 but the last. */
static uint32_t tile_size(uint32_t extent) {
  const uint64_t tiles = flap_cpu_ceil(extent, FLAP_CPU_TILE);
  return (uint32_t)(flap_cpu_ceil(flap_cpu_ceil(extent, tiles), 16) * 16);
}

/* Rows [row, row + rows) and columns [column, column + columns) of a stored matrix. */
static operand load(const matmul_job *job, float *buffer, const void *base, uint32_t stride, uint32_t row,
                    uint32_t rows, uint32_t column, uint32_t columns) {
  operand loaded;
  loaded.values = flap_cpu_load_tile(job->cpu, job->x->dtype, buffer, base, (uint64_t)row * stride + column, stride,
                                     rows, columns, &loaded.stride);
  return loaded;
}

static void finish_tile(const matmul_job *job, const float *tile, uint32_t row, uint32_t rows, uint32_t column,
                        uint32_t columns, uint32_t stride) {
  const flap_matmul *x = job->x;
  const flap_cpu_vector *vector = job->cpu->vector;
  const bool direct = x->c_dtype == FLAP_F32;
  float bias_buffer[FLAP_CPU_TILE], residual_buffer[FLAP_CPU_TILE], sum[FLAP_CPU_TILE];
  const float *bias = x->bias != NULL ? flap_cpu_load(job->cpu, x->dtype, bias_buffer, x->bias, column, columns) : NULL;
  if (bias == NULL && x->residual == NULL) {
    if (!direct)
      flap_cpu_narrow(job->cpu, x->c_dtype, x->c, (uint64_t)row * x->ldc + column, x->ldc, tile, stride, rows, columns);
    return;
  }
  for (uint32_t i = 0; i < rows; ++i) {
    const uint64_t at = (uint64_t)(row + i) * x->ldc + column;
    const float *values = tile + (uint64_t)i * stride;
    if (bias != NULL) {
      vector->add(sum, values, bias, columns);
      values = sum;
    }
    if (x->residual != NULL) {
      const float *residual = flap_cpu_load(job->cpu, x->c_dtype, residual_buffer, x->residual, at, columns);
      vector->add(sum, values, residual, columns);
    }
    flap_cpu_store(job->cpu, x->c_dtype, x->c, at, sum, columns);
  }
}

static void matmul_item(void *context, uint64_t item, uint32_t worker) {
  const matmul_job *job = context;
  const flap_matmul *x = job->x;
  const uint32_t row = (uint32_t)(item / job->tiles_n) * job->tile_m;
  const uint32_t column = (uint32_t)(item % job->tiles_n) * job->tile_n;
  const uint32_t rows = flap_cpu_min(job->tile_m, x->m - row), columns = flap_cpu_min(job->tile_n, x->n - column);
  float *a_buffer = flap_cpu_scratch(job->cpu, worker);
  float *b_buffer = a_buffer + FLAP_CPU_TILE * FLAP_CPU_TILE_K;
  float *tile = b_buffer + FLAP_CPU_TILE * FLAP_CPU_TILE_K;
  uint32_t stride = columns;
  if (x->c_dtype == FLAP_F32) {
    tile = (float *)x->c + (uint64_t)row * x->ldc + column;
    stride = x->ldc;
  }
  const uint32_t step = x->dtype == FLAP_F32 ? x->k : FLAP_CPU_TILE_K;
  for (uint32_t k = 0; k < x->k; k += step) {
    const uint32_t depth = flap_cpu_min(step, x->k - k);
    const operand a = x->transpose == FLAP_TN ? load(job, a_buffer, x->a, x->lda, k, depth, row, rows)
                                              : load(job, a_buffer, x->a, x->lda, row, rows, k, depth);
    const operand b = x->transpose == FLAP_NT ? load(job, b_buffer, x->b, x->ldb, column, columns, k, depth)
                                              : load(job, b_buffer, x->b, x->ldb, k, depth, column, columns);
    job->cpu->sgemm(CblasRowMajor, x->transpose == FLAP_TN ? CblasTrans : CblasNoTrans,
                    x->transpose == FLAP_NT ? CblasTrans : CblasNoTrans, (blasint)rows, (blasint)columns,
                    (blasint)depth, 1.0f, a.values, (blasint)a.stride, b.values, (blasint)b.stride,
                    k > 0 || x->accumulate ? 1.0f : 0.0f, tile, (blasint)stride);
  }
  finish_tile(job, tile, row, rows, column, columns, stride);
}

uint64_t flap_cpu_matmul_worker_bytes(void) {
  return (2 * FLAP_CPU_TILE * FLAP_CPU_TILE_K + FLAP_CPU_TILE * FLAP_CPU_TILE) * sizeof(float);
}

void flap_cpu_matmul(flap_ops *ops, const flap_matmul *matmul) {
  flap_assert(matmul->dtype != FLAP_I32 && matmul->c_dtype != FLAP_I32);
  matmul_job job = {.cpu = flap_cpu_state(ops), .x = matmul};
  job.tile_m = tile_size(matmul->m);
  job.tile_n = tile_size(matmul->n);
  job.tiles_n = (uint32_t)flap_cpu_ceil(matmul->n, job.tile_n);
  flap_cpu_run(job.cpu, flap_cpu_ceil(matmul->m, job.tile_m) * job.tiles_n, matmul_item, &job);
}
