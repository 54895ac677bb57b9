/* Element-wise and row-wise operations: rows are read in chunks as fp32, computed, rounded and stored. */
#include "kernels/cpu/cpu_internal.h"

#include "base/assert.h"

#include <math.h>

typedef struct bytes_job {
  unsigned char *to;
  const unsigned char *from; /* NULL: zero */
  uint64_t bytes;
} bytes_job;

#define BYTES_ITEM (256u << 10)

static void bytes_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const bytes_job *job = context;
  const uint64_t start = item * BYTES_ITEM;
  const uint64_t bytes = job->bytes - start < BYTES_ITEM ? job->bytes - start : BYTES_ITEM;
  if (job->from != NULL)
    memcpy(job->to + start, job->from + start, bytes);
  else
    memset(job->to + start, 0, bytes);
}

void flap_cpu_zero(flap_ops *ops, void *memory, uint64_t bytes) {
  bytes_job job = {.to = memory, .bytes = bytes};
  flap_cpu_run(flap_cpu_state(ops), flap_cpu_ceil(bytes, BYTES_ITEM), bytes_item, &job);
}

void flap_cpu_copy(flap_ops *ops, void *to, const void *from, uint64_t bytes) {
  bytes_job job = {.to = to, .from = from, .bytes = bytes};
  flap_cpu_run(flap_cpu_state(ops), flap_cpu_ceil(bytes, BYTES_ITEM), bytes_item, &job);
}

/* ---- add ---- */

typedef struct add_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  void *out;
  const void *a, *b;
  uint64_t elements;
} add_job;

static void add_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const add_job *job = context;
  float a_buffer[FLAP_CPU_CHUNK], b_buffer[FLAP_CPU_CHUNK], out[FLAP_CPU_CHUNK];
  const uint64_t start = item * FLAP_CPU_ITEM;
  const uint64_t end = start + FLAP_CPU_ITEM < job->elements ? start + FLAP_CPU_ITEM : job->elements;
  for (uint64_t i = start; i < end; i += FLAP_CPU_CHUNK) {
    const size_t count = end - i < FLAP_CPU_CHUNK ? (size_t)(end - i) : FLAP_CPU_CHUNK;
    const float *a = flap_cpu_load(job->cpu, job->dtype, a_buffer, job->a, i, count);
    const float *b = flap_cpu_load(job->cpu, job->dtype, b_buffer, job->b, i, count);
    job->cpu->vector->add(out, a, b, count);
    flap_cpu_store(job->cpu, job->dtype, job->out, i, out, count);
  }
}

void flap_cpu_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements) {
  add_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .out = out, .a = a, .b = b, .elements = elements};
  flap_cpu_run(job.cpu, flap_cpu_ceil(elements, FLAP_CPU_ITEM), add_item, &job);
}

/* ---- bias backward: each item sums some columns over all tokens ---- */

#define BIAS_COLUMNS 64u

typedef struct bias_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  float *dbias;
  const void *dy;
  uint32_t tokens, n, ld;
} bias_job;

static void bias_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const bias_job *job = context;
  const uint32_t column = (uint32_t)item * BIAS_COLUMNS;
  const uint32_t count = flap_cpu_min(BIAS_COLUMNS, job->n - column);
  float sum[BIAS_COLUMNS] = {0}, buffer[BIAS_COLUMNS];
  for (uint32_t token = 0; token < job->tokens; ++token) {
    const uint64_t offset = (uint64_t)token * job->ld + column;
    job->cpu->vector->add(sum, sum, flap_cpu_load(job->cpu, job->dtype, buffer, job->dy, offset, count), count);
  }
  job->cpu->vector->add(job->dbias + column, job->dbias + column, sum, count);
}

void flap_cpu_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                            uint32_t ld) {
  bias_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .dbias = dbias, .dy = dy};
  job.tokens = tokens;
  job.n = n;
  job.ld = ld;
  flap_cpu_run(job.cpu, flap_cpu_ceil(n, BIAS_COLUMNS), bias_item, &job);
}

/* ---- embedding ---- */

typedef struct embedding_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  void *out;
  float *dtable;
  const int32_t *tokens, *order;
  const void *in; /* the table, or dx */
  uint32_t token_count, hidden, per_item;
} embedding_job;

static void embedding_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const embedding_job *job = context;
  const uint32_t start = (uint32_t)item * job->per_item;
  const uint32_t end = flap_cpu_min(start + job->per_item, job->token_count);
  const size_t row_bytes = job->hidden * flap_dtype_bytes(job->dtype);
  for (uint32_t token = start; token < end; ++token)
    memcpy((unsigned char *)job->out + token * row_bytes,
           (const unsigned char *)job->in + (uint64_t)job->tokens[token] * row_bytes, row_bytes);
}

void flap_cpu_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                        uint32_t token_count, uint32_t hidden) {
  embedding_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .out = out, .tokens = tokens, .in = table};
  job.token_count = token_count;
  job.hidden = hidden;
  job.per_item = flap_cpu_rows_per_item(hidden);
  flap_cpu_run(job.cpu, flap_cpu_ceil(token_count, job.per_item), embedding_item, &job);
}

static int32_t token_at(const embedding_job *job, uint32_t index) {
  return job->tokens[job->order[index]];
}

/* An item owns the runs of equal tokens that start among its positions, and follows the last one past its end. */
static void embedding_backward_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const embedding_job *job = context;
  float buffer[FLAP_CPU_CHUNK];
  const uint32_t start = (uint32_t)item * job->per_item;
  const uint32_t end = flap_cpu_min(start + job->per_item, job->token_count);
  uint32_t i = start;
  while (i > 0 && i < end && token_at(job, i) == token_at(job, i - 1))
    ++i;
  if (i == end)
    return; /* all of it continues a run that began before */
  for (; i < job->token_count && (i < end || token_at(job, i) == token_at(job, i - 1)); ++i) {
    float *row = job->dtable + (uint64_t)token_at(job, i) * job->hidden;
    const uint64_t offset = (uint64_t)job->order[i] * job->hidden;
    for (uint32_t column = 0; column < job->hidden; column += FLAP_CPU_CHUNK) {
      const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->hidden - column);
      const float *dx = flap_cpu_load(job->cpu, job->dtype, buffer, job->in, offset + column, count);
      job->cpu->vector->add(row + column, row + column, dx, count);
    }
  }
}

void flap_cpu_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                                 const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden) {
  embedding_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .dtable = dtable, .tokens = tokens};
  job.order = order;
  job.in = dx;
  job.token_count = token_count;
  job.hidden = hidden;
  job.per_item = flap_cpu_rows_per_item(hidden);
  flap_cpu_run(job.cpu, flap_cpu_ceil(token_count, job.per_item), embedding_backward_item, &job);
}

/* ---- rmsnorm ---- */

typedef struct norm_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  void *out, *sum_out, *normalized;
  const void *x, *residual, *weight, *dy;
  const float *rstd_in;
  float *rstd, *parts, *dweight;
  uint32_t token_count, hidden, per_item, parts_count;
  float epsilon;
} norm_job;

/* Stores x + residual where there is one, and returns the mean square of what gets normalised. */
static float norm_statistics(const norm_job *job, uint64_t offset) {
  const flap_cpu_ops *cpu = job->cpu;
  float x_buffer[FLAP_CPU_CHUNK], residual_buffer[FLAP_CPU_CHUNK], sum[FLAP_CPU_CHUNK];
  float sums[FLAP_CPU_LANES] = {0};
  for (uint32_t i = 0; i < job->hidden; i += FLAP_CPU_CHUNK) {
    const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->hidden - i);
    const float *x = flap_cpu_load(cpu, job->dtype, x_buffer, job->x, offset + i, count);
    if (job->residual != NULL) {
      cpu->vector->add(sum, x, flap_cpu_load(cpu, job->dtype, residual_buffer, job->residual, offset + i, count),
                       count);
      flap_cpu_round(cpu, job->dtype, sum, count);
      flap_cpu_store(cpu, job->dtype, job->sum_out, offset + i, sum, count);
      x = sum;
    }
    cpu->vector->squares(sums, x, count);
  }
  return flap_cpu_fold(sums) / (float)job->hidden;
}

static void norm_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const norm_job *job = context;
  const flap_cpu_ops *cpu = job->cpu;
  float x_buffer[FLAP_CPU_CHUNK], weight_buffer[FLAP_CPU_CHUNK], out[FLAP_CPU_CHUNK];
  const uint32_t start = (uint32_t)item * job->per_item;
  const uint32_t end = flap_cpu_min(start + job->per_item, job->token_count);
  const void *normalised = job->residual != NULL ? job->sum_out : job->x;
  for (uint32_t token = start; token < end; ++token) {
    const uint64_t offset = (uint64_t)token * job->hidden;
    const float rstd = 1.0f / sqrtf(norm_statistics(job, offset) + job->epsilon);
    job->rstd[token] = rstd;
    for (uint32_t i = 0; i < job->hidden; i += FLAP_CPU_CHUNK) {
      const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->hidden - i);
      const float *x = flap_cpu_load(cpu, job->dtype, x_buffer, normalised, offset + i, count);
      const float *weight = flap_cpu_load(cpu, job->dtype, weight_buffer, job->weight, i, count);
      cpu->vector->normalise(out, x, weight, rstd, job->dtype, count);
      flap_cpu_store(cpu, job->dtype, job->out, offset + i, out, count);
    }
  }
}

void flap_cpu_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                      const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon) {
  norm_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .out = out, .sum_out = sum_out, .x = x};
  job.residual = residual;
  job.weight = weight;
  job.rstd = rstd;
  job.token_count = token_count;
  job.hidden = hidden;
  job.per_item = flap_cpu_rows_per_item(hidden);
  job.epsilon = epsilon;
  flap_cpu_run(job.cpu, flap_cpu_ceil(token_count, job.per_item), norm_item, &job);
}

/* With y = x rstd: the mean over the row of dy * weight * y, times rstd, is what x is multiplied with. */
static float norm_mean(const norm_job *job, uint64_t offset, float rstd) {
  const flap_cpu_ops *cpu = job->cpu;
  float x_buffer[FLAP_CPU_CHUNK], dy_buffer[FLAP_CPU_CHUNK], weight_buffer[FLAP_CPU_CHUNK];
  float sums[FLAP_CPU_LANES] = {0};
  for (uint32_t i = 0; i < job->hidden; i += FLAP_CPU_CHUNK) {
    const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->hidden - i);
    const float *dy = flap_cpu_load(cpu, job->dtype, dy_buffer, job->dy, offset + i, count);
    const float *x = flap_cpu_load(cpu, job->dtype, x_buffer, job->x, offset + i, count);
    const float *weight = flap_cpu_load(cpu, job->dtype, weight_buffer, job->weight, i, count);
    cpu->vector->norm_dot(sums, dy, weight, x, count);
  }
  return flap_cpu_fold(sums) / (float)job->hidden * rstd * rstd;
}

/* An item is one of the parts of the tokens, with its own partial sum of dweight. */
static void norm_backward_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const norm_job *job = context;
  const flap_cpu_ops *cpu = job->cpu;
  float x_buffer[FLAP_CPU_CHUNK], dy_buffer[FLAP_CPU_CHUNK], weight_buffer[FLAP_CPU_CHUNK];
  float residual_buffer[FLAP_CPU_CHUNK], out[FLAP_CPU_CHUNK], normalized[FLAP_CPU_CHUNK];
  float *part = job->parts + item * job->hidden;
  memset(part, 0, job->hidden * sizeof *part);
  const uint32_t start = (uint32_t)item * job->per_item;
  const uint32_t end = flap_cpu_min(start + job->per_item, job->token_count);
  for (uint32_t token = start; token < end; ++token) {
    const uint64_t offset = (uint64_t)token * job->hidden;
    const float rstd = job->rstd_in[token];
    const float mean = norm_mean(job, offset, rstd);
    for (uint32_t i = 0; i < job->hidden; i += FLAP_CPU_CHUNK) {
      const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->hidden - i);
      const float *dy = flap_cpu_load(cpu, job->dtype, dy_buffer, job->dy, offset + i, count);
      const float *x = flap_cpu_load(cpu, job->dtype, x_buffer, job->x, offset + i, count);
      const float *weight = flap_cpu_load(cpu, job->dtype, weight_buffer, job->weight, i, count);
      const float *residual = job->residual == NULL
                                  ? NULL
                                  : flap_cpu_load(cpu, job->dtype, residual_buffer, job->residual, offset + i, count);
      cpu->vector->norm_backward(out, part + i, dy, x, weight, residual, rstd, mean, job->dtype, count);
      /* Both from x before either is stored: dx may lie where dy is, and so may the normalised row. */
      if (job->normalized != NULL)
        cpu->vector->normalise(normalized, x, weight, rstd, job->dtype, count);
      flap_cpu_store(cpu, job->dtype, job->out, offset + i, out, count);
      if (job->normalized != NULL)
        flap_cpu_store(cpu, job->dtype, job->normalized, offset + i, normalized, count);
    }
  }
}

uint64_t flap_cpu_norm_shared_bytes(const flap_ops_limits *limits) {
  const uint32_t widest = limits->hidden > limits->head_size ? limits->hidden : limits->head_size;
  return (uint64_t)FLAP_CPU_NORM_PARTS * widest * sizeof(float);
}

void flap_cpu_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                               const void *dy, const void *x, const void *weight, const float *rstd,
                               const void *dresidual, uint32_t token_count, uint32_t hidden) {
  norm_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .out = dx_out, .x = x, .residual = dresidual};
  job.normalized = normalized_out;
  flap_assert((uint64_t)FLAP_CPU_NORM_PARTS * hidden * sizeof(float) <= job.cpu->shared_bytes);
  job.weight = weight;
  job.dy = dy;
  job.rstd_in = rstd;
  job.parts = (float *)(void *)job.cpu->shared;
  job.token_count = token_count;
  job.hidden = hidden;
  const uint32_t least = (uint32_t)flap_cpu_ceil(token_count, FLAP_CPU_NORM_PARTS);
  const uint32_t rows = flap_cpu_rows_per_item(hidden);
  job.per_item = least > rows ? least : rows;
  const uint32_t parts = (uint32_t)flap_cpu_ceil(token_count, job.per_item);
  flap_cpu_run(job.cpu, parts, norm_backward_item, &job);
  for (uint32_t part = 0; part < parts; ++part)
    job.cpu->vector->add(dweight, dweight, job.parts + (uint64_t)part * hidden, hidden);
}

/* ---- rope ---- */

typedef struct rope_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  void *x;
  const float *cos_sin;
  uint32_t token_count, sequence, first_position, heads, head_size, ld, per_item;
  bool inverse;
} rope_job;

static void rope_item(void *context, uint64_t item, uint32_t worker) {
  const rope_job *job = context;
  const flap_cpu_ops *cpu = job->cpu;
  const uint32_t half = job->head_size / 2;
  float *buffer = flap_cpu_scratch(cpu, worker);
  const uint32_t heads_per_chunk = job->head_size >= FLAP_CPU_CHUNK ? 1 : FLAP_CPU_CHUNK / job->head_size;
  const uint32_t start = (uint32_t)item * job->per_item;
  const uint32_t end = flap_cpu_min(start + job->per_item, job->token_count);
  for (uint32_t token = start; token < end; ++token) {
    const uint64_t position = job->first_position + token % job->sequence;
    const float *cosines = job->cos_sin + position * job->head_size;
    for (uint32_t head = 0; head < job->heads; head += heads_per_chunk) {
      const uint32_t heads = flap_cpu_min(heads_per_chunk, job->heads - head);
      const uint64_t offset = (uint64_t)token * job->ld + (uint64_t)head * job->head_size;
      if (job->dtype == FLAP_F32) {
        cpu->vector->rope((float *)job->x + offset, cosines, cosines + half, heads, job->head_size, job->inverse);
        continue;
      }
      (void)flap_cpu_load(cpu, job->dtype, buffer, job->x, offset, heads * job->head_size);
      cpu->vector->rope(buffer, cosines, cosines + half, heads, job->head_size, job->inverse);
      flap_cpu_store(cpu, job->dtype, job->x, offset, buffer, heads * job->head_size);
    }
  }
}

void flap_cpu_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count,
                   uint32_t sequence, uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld,
                   bool inverse) {
  rope_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .x = x, .cos_sin = cos_sin, .inverse = inverse};
  flap_assert(head_size * sizeof(float) <= job.cpu->worker_bytes);
  job.token_count = token_count;
  job.sequence = sequence;
  job.first_position = first_position;
  job.heads = heads;
  job.head_size = head_size;
  job.ld = ld;
  job.per_item = flap_cpu_rows_per_item(heads * head_size);
  flap_cpu_run(job.cpu, flap_cpu_ceil(token_count, job.per_item), rope_item, &job);
}

/* ---- swiglu ---- */

typedef struct swiglu_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  void *out, *dgate, *dup;
  const void *gate, *up, *dout;
  uint32_t token_count, width, ld, ld_d, per_item;
} swiglu_job;

static void swiglu_item(void *context, uint64_t item, uint32_t worker) {
  (void)worker;
  const swiglu_job *job = context;
  const flap_cpu_ops *cpu = job->cpu;
  float gate_buffer[FLAP_CPU_CHUNK], up_buffer[FLAP_CPU_CHUNK], dout_buffer[FLAP_CPU_CHUNK];
  float out[FLAP_CPU_CHUNK], out2[FLAP_CPU_CHUNK], again[FLAP_CPU_CHUNK];
  const uint32_t start = (uint32_t)item * job->per_item;
  const uint32_t end = flap_cpu_min(start + job->per_item, job->token_count);
  for (uint32_t token = start; token < end; ++token) {
    for (uint32_t i = 0; i < job->width; i += FLAP_CPU_CHUNK) {
      const uint32_t count = flap_cpu_min(FLAP_CPU_CHUNK, job->width - i);
      const uint64_t offset = (uint64_t)token * job->ld + i, packed = (uint64_t)token * job->width + i;
      const float *gate = flap_cpu_load(cpu, job->dtype, gate_buffer, job->gate, offset, count);
      const float *up = flap_cpu_load(cpu, job->dtype, up_buffer, job->up, offset, count);
      if (job->dout == NULL) {
        cpu->vector->swiglu(out, gate, up, job->dtype, count);
        flap_cpu_store(cpu, job->dtype, job->out, packed, out, count);
        continue;
      }
      const float *dout = flap_cpu_load(cpu, job->dtype, dout_buffer, job->dout, packed, count);
      cpu->vector->swiglu_backward(out, out2, dout, gate, up, job->dtype, count);
      if (job->out != NULL) { /* which may lie where dout is, but not where gate and up are */
        cpu->vector->swiglu(again, gate, up, job->dtype, count);
        flap_cpu_store(cpu, job->dtype, job->out, packed, again, count);
      }
      flap_cpu_store(cpu, job->dtype, job->dgate, (uint64_t)token * job->ld_d + i, out, count);
      flap_cpu_store(cpu, job->dtype, job->dup, (uint64_t)token * job->ld_d + i, out2, count);
    }
  }
}

void flap_cpu_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                     uint32_t intermediate, uint32_t ld) {
  swiglu_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .out = out, .gate = gate, .up = up};
  job.token_count = token_count;
  job.width = intermediate;
  job.ld = ld;
  job.per_item = flap_cpu_rows_per_item(intermediate);
  flap_cpu_run(job.cpu, flap_cpu_ceil(token_count, job.per_item), swiglu_item, &job);
}

void flap_cpu_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                              const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                              uint32_t intermediate) {
  swiglu_job job = {.cpu = flap_cpu_state(ops), .dtype = dtype, .dgate = dgate, .dup = dup, .gate = gate, .up = up};
  job.out = out;
  job.dout = dout;
  job.token_count = token_count;
  job.width = intermediate;
  job.ld = ld;
  job.ld_d = ld_d;
  job.per_item = flap_cpu_rows_per_item(intermediate);
  flap_cpu_run(job.cpu, flap_cpu_ceil(token_count, job.per_item), swiglu_item, &job);
}
