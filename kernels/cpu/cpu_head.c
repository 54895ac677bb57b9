/* Logits and cross-entropy, chunk by chunk of tokens: logits, then their gradient in place, then the two products. */
#include "kernels/cpu/cpu_internal.h"

#include "base/assert.h"

#include <math.h>

/* Logits of a chunk take about this much, but a chunk has at least HEAD_ROWS_MIN tokens, so that dweight is not read
 * and written for too few of them. */
#define HEAD_CHUNK_BYTES (256u << 10)
#define HEAD_ROWS_MIN 64u
#define HEAD_ROWS_MAX 1024u
/* Rows of one softmax item, in elements. */
#define HEAD_ITEM 8192u

static uint32_t chunk_rows(flap_dtype dtype, uint32_t vocabulary) {
  const uint64_t fit = HEAD_CHUNK_BYTES / (vocabulary * flap_dtype_bytes(dtype)) / HEAD_ROWS_MIN * HEAD_ROWS_MIN;
  return fit < HEAD_ROWS_MIN ? HEAD_ROWS_MIN : fit > HEAD_ROWS_MAX ? HEAD_ROWS_MAX : (uint32_t)fit;
}

uint64_t flap_cpu_head_shared_bytes(const flap_ops_limits *limits) {
  const uint64_t rows = flap_cpu_min(chunk_rows(limits->dtype, limits->vocabulary), limits->tokens_max);
  return rows * limits->vocabulary * flap_dtype_bytes(limits->dtype);
}

typedef struct head_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  void *logits; /* become their gradient when `backward` */
  float *losses;
  const int32_t *targets;
  uint32_t rows, vocabulary, per_item;
  float loss_scale;
  bool backward;
} head_job;

static float row_maximum(const head_job *job, uint64_t row) {
  float buffer[FLAP_CPU_CHUNK], maximum = -INFINITY;
  for (uint32_t i = 0; i < job->vocabulary; i += FLAP_CPU_CHUNK) {
    const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->vocabulary - i);
    const float *x = flap_cpu_load(job->cpu, job->dtype, buffer, job->logits, row + i, count);
    maximum = job->cpu->vector->max(x, count, maximum);
  }
  return maximum;
}

static float row_log_sum(const head_job *job, uint64_t row, float maximum) {
  float buffer[FLAP_CPU_CHUNK], sums[FLAP_CPU_LANES] = {0};
  for (uint32_t i = 0; i < job->vocabulary; i += FLAP_CPU_CHUNK) {
    const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->vocabulary - i);
    const float *x = flap_cpu_load(job->cpu, job->dtype, buffer, job->logits, row + i, count);
    job->cpu->vector->exp_sums(sums, x, maximum, count);
  }
  return (float)log((double)flap_cpu_fold(sums));
}

/* (softmax - one at the target) * loss_scale, rounded, in place of the logits. */
static void row_gradient(const head_job *job, uint64_t row, float maximum, float log_sum, uint32_t target) {
  float buffer[FLAP_CPU_CHUNK], out[FLAP_CPU_CHUNK];
  for (uint32_t i = 0; i < job->vocabulary; i += FLAP_CPU_CHUNK) {
    const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->vocabulary - i);
    const float *x = flap_cpu_load(job->cpu, job->dtype, buffer, job->logits, row + i, count);
    const float at_target = target >= i && target - i < count ? x[target - i] : 0.0f;
    job->cpu->vector->softmax(out, x, maximum, log_sum, job->loss_scale, count);
    if (target >= i && target - i < count) {
      float probability;
      job->cpu->vector->softmax(&probability, &at_target, maximum, log_sum, 1.0f, 1);
      out[target - i] = (probability - 1.0f) * job->loss_scale;
    }
    flap_cpu_store(job->cpu, job->dtype, job->logits, row + i, out, count);
  }
}

static void head_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const head_job *job = context;
  const uint32_t start = (uint32_t)item * job->per_item, end = flap_cpu_min(start + job->per_item, job->rows);
  for (uint32_t i = start; i < end; ++i) {
    const uint64_t row = (uint64_t)i * job->vocabulary;
    const int32_t target = job->targets[i];
    if (target < 0) {
      job->losses[i] = 0.0f;
      if (job->backward)
        memset(flap_cpu_at_mutable(job->dtype, job->logits, row), 0, job->vocabulary * flap_dtype_bytes(job->dtype));
      continue;
    }
    float at_target;
    const float maximum = row_maximum(job, row), log_sum = row_log_sum(job, row, maximum);
    at_target = *flap_cpu_load(job->cpu, job->dtype, &at_target, job->logits, row + (uint64_t)target, 1);
    job->losses[i] = log_sum - (at_target - maximum);
    if (job->backward)
      row_gradient(job, row, maximum, log_sum, (uint32_t)target);
  }
}

void flap_cpu_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                        const void *x, const void *weight, const int32_t *targets, float loss_scale,
                        uint32_t token_count, uint32_t hidden, uint32_t vocabulary) {
  head_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .vocabulary = vocabulary, .loss_scale = loss_scale};
  job.logits = job.cpu->shared;
  job.backward = dx != NULL;
  job.per_item = vocabulary >= HEAD_ITEM ? 1 : HEAD_ITEM / vocabulary;
  const uint32_t chunk = chunk_rows(dtype, vocabulary);
  const uint64_t held = (uint64_t)flap_cpu_min(chunk, token_count) * vocabulary * flap_dtype_bytes(dtype);
  flap_assert(held <= job.cpu->shared_bytes);
  for (uint32_t token = 0; token < token_count; token += chunk) {
    const void *rows = flap_cpu_at(dtype, x, (uint64_t)token * hidden);
    job.rows = flap_cpu_min(chunk, token_count - token);
    job.losses = losses + token;
    job.targets = targets + token;
    flap_matmul matmul = {.transpose = FLAP_NT, .m = job.rows, .n = vocabulary, .k = hidden, .a = rows, .b = weight};
    matmul.c = job.logits;
    matmul.lda = matmul.ldb = hidden;
    matmul.ldc = vocabulary;
    matmul.dtype = matmul.c_dtype = dtype;
    flap_cpu_matmul(ops, &matmul);
    flap_cpu_run(job.cpu, flap_cpu_ceil(job.rows, job.per_item), head_item, &job);
    if (!job.backward)
      continue;
    /* dweight first: dx may take the place of x. */
    matmul = (flap_matmul){.transpose = FLAP_TN, .m = vocabulary, .n = hidden, .k = job.rows, .a = job.logits};
    matmul.b = rows;
    matmul.c = dweight;
    matmul.lda = vocabulary;
    matmul.ldb = matmul.ldc = hidden;
    matmul.dtype = dtype;
    matmul.c_dtype = FLAP_F32;
    matmul.accumulate = accumulate || token > 0;
    flap_cpu_matmul(ops, &matmul);
    matmul = (flap_matmul){.transpose = FLAP_NN, .m = job.rows, .n = hidden, .k = vocabulary, .a = job.logits};
    matmul.b = weight;
    matmul.c = flap_cpu_at_mutable(dtype, dx, (uint64_t)token * hidden);
    matmul.lda = vocabulary;
    matmul.ldb = matmul.ldc = hidden;
    matmul.dtype = matmul.c_dtype = dtype;
    flap_cpu_matmul(ops, &matmul);
  }
}
